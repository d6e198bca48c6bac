"""The report of one comparison run: `report.json` and a self-contained `report.html`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.files import write_atomic
from train.report.page import render

__all__ = ["render", "write_html", "write_report"]


def write_report(
    report: Mapping[str, Any],
    out_dir: Path,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    similarity: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
) -> Path:
    """Write `report.json` and `report.html` into `out_dir`; return the path of the page.

    `report` holds "methods" ("ft", "qar" and others → scores as `train.metrics.summarise` gives them),
    "dataset", "model", "paired" ({"qar_vs_ft": `train.metrics.compare`}), "querier_swap"
    (`train.metrics.swap_summary`; None if only one person asks), "planted" and "seconds". `curves` maps a
    method to its log rows ({"step", "lm_loss"}); `similarity` is {"names": [...], "matrix": [[...]]}; a
    sample is {"query", "history", "reference", "asked_by", "answers"}.
    Numbers that are not finite become null. Nothing is written if the page cannot be rendered.
    """
    report = _finite(report)
    page = render(report, curves, similarity, samples)
    write_atomic(out_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    return write_html(page, out_dir)


def write_html(page: str, out_dir: Path) -> Path:
    """Write a rendered page; a lone surrogate in the text becomes a character reference."""
    path = out_dir / "report.html"
    write_atomic(path, page.encode("utf-8", "xmlcharrefreplace"))
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
