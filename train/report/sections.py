"""Sections of the report, each from its part of the data; nothing to show gives an empty string."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from train.metrics.wording import COMPARED, LABELS, SUMMARY, digits, in_units
from train.report import charts
from train.report.markup import answer_cards, facts, figure, figures, score_cell, section, table, text
from train.report.wording import LABELS as NAMES
from train.report.wording import difference

Part = Mapping[str, Any]
_COLUMNS = (*SUMMARY, "perplexity")
_FADED = f"{charts.PALETTE['qar']}80"  # half transparent: QAR asked as another querier


def methods(scores: Mapping[str, Part]) -> str:
    """All methods with their scores and 95 % intervals, as a table and as dots with error bars."""
    header = ["Method", *(LABELS[key] for key in _COLUMNS), "Empty", "Replies", "Windows"]
    rows = [(name, _method_row(name, found)) for name, found in scores.items()]
    dots = [
        _method_dots(scores, "nll", "lower is better"),
        _method_dots(scores, "rougeL", "higher is better"),
    ]
    note = (
        "NLL (in nats) and perplexity of all held-out windows; the other scores (in points) of the generated "
        "replies. Brackets: 95 % bootstrap interval over dialogues."
    )
    return section("Methods", table(header, rows), figures(dots), note=note)


def _method_row(name: str, scores: Part) -> list[str]:
    cells = [score_cell(key, scores[key], scores["ci95"].get(key)) for key in _COLUMNS]
    counts = [text(scores[key]) for key in ("empty", "generated", "examples")]
    return [text(NAMES[name]), *cells, *counts]


def _method_dots(methods: Mapping[str, Part], key: str, direction: str) -> str:
    known = {name: scores for name, scores in methods.items() if scores[key] is not None}
    values = _in_units(key, [scores[key] for scores in known.values()])
    cis = [_in_units(key, scores["ci95"][key] or ()) for scores in known.values()]
    names, colours = [NAMES[name] for name in known], [charts.PALETTE[name] for name in known]
    chart = charts.interval_dots(names, values, cis, colours, digits(key))
    return figure(f"{LABELS[key]} ({direction})", chart)


def _in_units(key: str, values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else in_units(key, value) for value in values]


def training_curves(curves: Mapping[str, Sequence[Part]]) -> str:
    """The language-model part of the training loss against step."""
    series = {}
    for method, rows in curves.items():
        finite = [(row["step"], row["lm_loss"]) for row in rows if math.isfinite(row["lm_loss"])]
        if finite:
            steps, losses = zip(*finite, strict=True)
            series[NAMES[method]] = (steps, losses, charts.PALETTE[method])
    note = (
        "Language-model loss on the training dialogues: its running mean over a faint line of logged values."
    )
    chart = figure("Loss against step", charts.lines(series, "step", "loss"))
    return section("Training", figures([chart]), note=note, half=True)


def per_querier(methods: Mapping[str, Part]) -> str:
    """FT against QAR for every querier: ROUGE-L bars, the change in NLL and the numbers."""
    sides = {side: methods[side]["per_querier"] for side in ("ft", "qar")}
    names = [name for name in sides["ft"] if all(side[name]["nll"] is not None for side in sides.values())]
    if not names:  # a method diverged
        return ""
    gains = {name: sides["qar"][name]["nll"] - sides["ft"][name]["nll"] for name in names}
    names.sort(key=gains.__getitem__)
    drawn = figures([_nll_changes(names, gains), _rouge_bars(names, sides)])
    return section("By querier", drawn, _querier_table(names, sides), note="Largest gain in NLL first.")


def _nll_changes(names: Sequence[str], gains: Mapping[str, float]) -> str:
    colours = charts.PALETTE["qar"], charts.PALETTE["ft"]
    chart = charts.difference_bars(
        names, [gains[name] for name in names], *colours, "below zero: QAR is better"
    )
    return figure("Change in NLL, QAR − FT", chart)


def _rouge_bars(names: Sequence[str], sides: Mapping[str, Part]) -> str:
    series = {
        NAMES[side]: (_in_units("rougeL", [found[name]["rougeL"] for name in names]), charts.PALETTE[side])
        for side, found in sides.items()
    }
    return figure(LABELS["rougeL"], charts.grouped_bars(names, series, "", digits=digits("rougeL")))


def _querier_table(names: Sequence[str], sides: Mapping[str, Part]) -> str:
    columns = [(key, side) for key in COMPARED for side in ("ft", "qar")]
    header = ["Querier", "Windows", *(f"{LABELS[key]}, {NAMES[side]}" for key, side in columns)]
    rows = []
    for name in names:
        cells = [score_cell(key, sides[side][name][key]) for key, side in columns]
        rows.append(("", [text(name), text(sides["qar"][name]["examples"]), *cells]))
    return f"<details><summary>The numbers</summary>{table(header, rows)}</details>"


def querier_swap(swap: Part | None) -> str:
    """QAR asked as the true querier and as another one."""
    if swap is None:  # one person asks
        return ""
    parts = []
    for key in COMPARED:
        pair = [swap[f"{key}_{side}"] for side in ("true", "swapped")]
        gap = difference(key, swap[f"{key}_diff"], swap[f"{key}_ci95"])
        series = {"": (_in_units(key, pair), [charts.PALETTE["qar"], _FADED])}
        chart = charts.grouped_bars(["True querier", "Swapped"], series, "", digits=digits(key))
        parts.append(figure(f"{LABELS[key]}: swapped − true = {gap}", chart))
    note = "Held-out questions asked under another querier's id: a model that uses the id gets worse."
    return section("Querier swap", figures(parts), note=note)


def planted(test: Part) -> str:
    """Accuracy, against chance, on data whose replies depend on the querier by construction."""
    people = test["per_querier"]
    series = {
        NAMES[side]: (
            [test[f"{side}_accuracy"], *(person[side] for person in people.values())],
            charts.PALETTE[side],
        )
        for side in ("ft", "qar")
    }
    chart = charts.grouped_bars(["All", *people], series, "accuracy", (test["chance"], "chance"))
    note = "Accuracy on held-out questions of a data set whose replies depend on the querier by construction."
    return section(
        "Planted test", figures([figure("Accuracy, overall and by querier", chart)]), note=note, half=True
    )


def expert_similarity(similarity: Part) -> str:
    """Heat map of {"names": [...], "matrix": [[...]]}: how alike the experts move the hidden states."""
    if len(similarity["names"]) < 2:
        return ""
    chart = charts.heat_map(similarity["names"], similarity["matrix"], "cosine")
    note = (
        "All experts read the same windows; an effect is the last hidden state minus its mean over queriers. "
        "Queriers who are answered alike have experts of similar effect. The diagonal is 1 and left blank."
    )
    caption = "Cosine of the experts' effects on hidden states"
    return section("Querier similarity", figures([figure(caption, chart)]), note=note, half=True)


def answers(samples: Sequence[Part]) -> str:
    """The same question answered to each querier, side by side."""
    note = "The same model and the same words; only the querier changes."
    return section("One question, several queriers", *map(answer_cards, samples), note=note)


def settings(conditions: Part, seconds: Mapping[str, float]) -> str:
    """Data, settings, versions, and how long each stage took."""
    rounded = {stage: f"{value:.0f}" for stage, value in seconds.items()}
    return section("Run", facts({**conditions, "seconds": rounded}), half=True)
