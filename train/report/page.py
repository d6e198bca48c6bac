"""The whole page, as one self-contained HTML text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.report import sections
from train.report.markup import text
from train.report.wording import findings, headline

_STYLE = Path(__file__).with_name("style.css")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><p class="eyebrow">{title}</p><h1>{headline}</h1><ul class="findings">{findings}</ul></header>
<main>
{body}
</main>
</body>
</html>
"""


def render(
    results: Mapping[str, Any],
    planted: Mapping[str, Any],
    seconds: Mapping[str, float],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    similarity: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
) -> str:
    """The demo's report as HTML; a section that has nothing to show is left out.

    Args:
        results: of the methods "zero_shot", "ft" and "qar" (:func:`train.experiment.results.collect`).
        planted: how often replies show the planted habits: ``ft_accuracy``, ``qar_accuracy``, ``chance`` and
            ``per_querier`` ("ft" and "qar" of each).
        seconds: how long each stage took.
        curves: method -> its log rows (``step``, ``lm_loss``).
        similarity: ``names`` and ``matrix``, the cosines between the effects of their experts.
        samples: of each, ``query``, ``history``, ``reference``, ``asked_by``, ``answers`` (querier -> reply).
    """
    methods, swap = results["methods"], results["swap"].get("qar")
    body = [
        sections.methods(methods),
        sections.answers(samples),
        sections.per_querier(methods),
        sections.querier_swap(swap),
        sections.planted(planted),
        sections.expert_similarity(similarity),
        sections.training_curves(curves),
        sections.settings(results["conditions"], seconds),
    ]
    title = "Querier-aware responder: comparison report"
    return document(title, headline(results), findings(results, planted), body)


def document(title: str, heading: str, lines: Sequence[str], body: Sequence[str]) -> str:
    """A page from texts, which are escaped here, and sections, which are HTML already."""
    return _PAGE.format(
        title=text(title),
        style=_STYLE.read_text(encoding="utf-8"),
        headline=text(heading),
        findings="".join(f"<li>{text(line)}</li>" for line in lines),
        body="\n".join(filter(None, body)),
    )
