"""The results as a figure: paired differences, scores of replies by method, and what the paper published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from train.metrics.wording import COMPARED, LABELS, LOWER_IS_BETTER, in_units
from train.plotting import PALETTE, canvas, name_rows, to_svg

ACCENT, MUTED = PALETTE["qar"], PALETTE["ft"]
LANGUAGES = {"english": "o", "chinese": "s"}


def figure(results: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """SVG: paired NLL differences; other compared scores with intervals; the paper's ROUGE-L if given."""
    rows = max(len(results["paired"]), len(results["methods"]), 6)
    shown = [key for key in COMPARED if key != "nll" and _measured(results["methods"], key)]
    panels = 1 + len(shown) + bool(published)
    with canvas(2.5 + 3.5 * panels, 1.2 + 0.32 * rows) as drawing:
        left, *others = drawing.subplots(1, panels, squeeze=False)[0]
        _differences(left, results["paired"])
        for axes, key in zip(others, shown, strict=False):
            _scores(axes, results["methods"], key)
        if published:
            _published(others[-1], published)
        return to_svg(drawing, whole_file=True)


def _differences(axes: Axes, paired: Mapping[str, Any]) -> None:
    axes.axvline(0, color="#999999", linewidth=0.8)
    for row, difference in enumerate(paired.values()):
        _point(axes, row, difference["nll"]["diff"], difference["nll"]["ci95"])
    name_rows(axes, [name.replace("_vs_", " - ").replace("_", " ") for name in paired])
    axes.set_xlabel("difference in NLL per reply token\n(left is better)")


def _measured(methods: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: scores for name, scores in methods.items() if scores.get(key) is not None}


def _scores(axes: Axes, methods: Mapping[str, Any], key: str) -> None:
    measured = _measured(methods, key)
    for row, scores in enumerate(measured.values()):
        ends = scores["ci95"][key]
        value, *ends = (in_units(key, value) for value in (scores[key], *(ends or ())))
        _point(axes, row, value, ends)
    name_rows(axes, [name.replace("_", " ") for name in measured])
    side = "left" if key in LOWER_IS_BETTER else "right"
    axes.set_xlabel(f"{LABELS[key]} of generated replies\n({side} is better)")


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
