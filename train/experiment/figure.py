"""The results as a figure: paired differences, ROUGE-L by method, and what the paper published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from train.metrics.wording import in_units
from train.plotting import PALETTE, canvas, name_rows, to_svg

ACCENT, MUTED = PALETTE["qar"], PALETTE["ft"]
LANGUAGES = {"english": "o", "chinese": "s"}


def figure(results: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """SVG: paired NLL differences, ROUGE-L with intervals, the paper's ROUGE-L if it is given."""
    rows = max(len(results["paired"]), len(results["methods"]), 6)
    with canvas(13 if published else 9.5, 1.2 + 0.32 * rows) as drawing:
        left, middle, *right = drawing.subplots(1, 3 if published else 2)
        _differences(left, results["paired"])
        _rouge(middle, results["methods"])
        if published:
            _published(right[0], published)
        return to_svg(drawing, whole_file=True)


def _differences(axes: Axes, paired: Mapping[str, Any]) -> None:
    axes.axvline(0, color="#999999", linewidth=0.8)
    for row, difference in enumerate(paired.values()):
        _point(axes, row, difference["nll"]["diff"], difference["nll"]["ci95"])
    name_rows(axes, [name.replace("_vs_", " - ").replace("_", " ") for name in paired])
    axes.set_xlabel("difference in NLL per reply token\n(left is better)")


def _rouge(axes: Axes, methods: Mapping[str, Any]) -> None:
    measured = {name: scores for name, scores in methods.items() if scores["rougeL"] is not None}
    for row, scores in enumerate(measured.values()):
        ends = scores["ci95"]["rougeL"]
        value, *ends = (in_units("rougeL", value) for value in (scores["rougeL"], *(ends or ())))
        _point(axes, row, value, ends)
    name_rows(axes, [name.replace("_", " ") for name in measured])
    axes.set_xlabel("ROUGE-L of generated replies\n(right is better)")


def _published(axes: Axes, published: Mapping[str, Any]) -> None:
    means = {language: found["average"] for language, found in published.items()}
    names = list(next(iter(means.values())))
    for language, marker in LANGUAGES.items():
        values = [means[language][name] for name in names]
        axes.plot(values, range(len(names)), marker, color=ACCENT, markersize=5, label=language)
    name_rows(axes, [name.replace("_", " ") for name in names])
    axes.legend(frameon=False)
    axes.set_xlabel("the paper's ROUGE-L\n(other data and models)")


def _point(axes: Axes, row: int, value: float, ends: list[float] | None) -> None:
    if ends:
        axes.plot(ends, [row, row], color=MUTED, linewidth=2, solid_capstyle="round")
    axes.plot([value], [row], "o", color=ACCENT, markersize=5)
