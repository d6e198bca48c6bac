"""Sections of the report, each from its part of the data; None where there is nothing to show."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from markupsafe import Markup

from train.metrics.wording import COMPARED, LABELS, SUMMARY, digits, direction, in_units, interval, score
from train.plotting import PALETTE
from train.report import charts
from train.report.findings import LABELS as NAMES
from train.report.findings import difference, typeset

Part: TypeAlias = Mapping[str, Any]
Figure: TypeAlias = tuple[str, Markup]
"""A caption and an SVG element."""
Cell: TypeAlias = tuple[str, str]
"""A value and its interval, which may be empty."""
_COLUMNS = (*SUMMARY, "perplexity")
_FADED = f"{PALETTE['qar']}80"  # half transparent: QAR asked as another querier


@dataclass(frozen=True)
class Table:
    """A row is its CSS class and its cells."""

    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


@dataclass(frozen=True)
class Section:
    """A titled part of a page; what it holds is shown in this order.

    Attributes:
        half: it takes one of two columns on a wide screen.
        numbers: a table that is folded up.
        samples: as :func:`train.report.render` takes them.
        facts: names and values, in columns.
    """

    title: str
    note: str = ""
    half: bool = False
    table: Table | None = None
    figures: Sequence[Figure] = ()
    numbers: Table | None = None
    samples: Sequence[Part] = ()
    facts: Sequence[tuple[str, Any]] = ()


def methods(scores: Mapping[str, Part]) -> Section:
    """All methods with their scores and 95 % intervals, as a table and as dots with error bars."""
    header = ["Method", *(LABELS[key] for key in _COLUMNS), "Empty", "Replies", "Windows"]
    rows = [(name, _method_row(name, found)) for name, found in scores.items()]
    dots = [_method_dots(scores, key) for key in COMPARED]
    windows = next(iter(scores.values()))["per_querier"].values()  # the same of all methods
    tokens, count = (sum(found[key] for found in windows) for key in ("tokens", "examples"))
    note = (
        f"NLL (in nats) and perplexity of all {tokens} reply tokens of {count} held-out windows; the other "
        "scores (in points) of the generated replies. Brackets: 95 % bootstrap interval over dialogues."
    )
    return Section("Methods", note, table=Table(header, rows), figures=dots)


def _method_row(name: str, scores: Part) -> list[Cell]:
    cells = [_score_cell(key, scores[key], scores["ci95"].get(key)) for key in _COLUMNS]
    counts = [(str(scores[key]), "") for key in ("empty", "generated", "examples")]
    return [(NAMES[name], ""), *cells, *counts]


def _score_cell(key: str, value: float | None, ci: Sequence[float] | None = None) -> Cell:
    return typeset(score(key, value)), typeset(interval(key, ci))


def _method_dots(methods: Mapping[str, Part], key: str) -> Figure:
    known = {name: scores for name, scores in methods.items() if scores[key] is not None}
    values = _in_units(key, [scores[key] for scores in known.values()])
    cis = [_in_units(key, scores["ci95"][key] or ()) for scores in known.values()]
    names, colours = [NAMES[name] for name in known], [PALETTE[name] for name in known]
    chart = charts.interval_dots(names, values, cis, colours, digits(key))
    return f"{LABELS[key]} ({direction(key)})", chart


def _in_units(key: str, values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else in_units(key, value) for value in values]


def training_curves(curves: Mapping[str, Sequence[Part]]) -> Section:
    """The language-model part of the training loss against step."""
    series = {}
    for method, rows in curves.items():
        finite = [(row["step"], row["lm_loss"]) for row in rows if math.isfinite(row["lm_loss"])]
        if finite:
            steps, losses = zip(*finite, strict=True)
            series[NAMES[method]] = (steps, losses, PALETTE[method])
    note = (
        "Language-model loss on the training dialogues: its running mean over a faint line of logged values."
    )
    drawn = [("Loss against step", charts.lines(series, "step", "loss"))]
    return Section("Training", note, half=True, figures=drawn)


def per_querier(methods: Mapping[str, Part]) -> Section | None:
    """FT against QAR for every querier: ROUGE-L bars, the change in NLL and the numbers."""
    sides = {side: methods[side]["per_querier"] for side in ("ft", "qar")}
    names = [name for name in sides["ft"] if all(side[name]["nll"] is not None for side in sides.values())]
    if not names:  # a method diverged
        return None
    gains = {name: sides["qar"][name]["nll"] - sides["ft"][name]["nll"] for name in names}
    names.sort(key=gains.__getitem__)
    drawn = [_nll_changes(names, gains), _rouge_bars(names, sides)]
    return Section(
        "By querier", "Largest gain in NLL first.", figures=drawn, numbers=_querier_table(names, sides)
    )


def _nll_changes(names: Sequence[str], gains: Mapping[str, float]) -> Figure:
    colours = PALETTE["qar"], PALETTE["ft"]
    chart = charts.difference_bars(
        names, [gains[name] for name in names], *colours, "below zero: QAR is better"
    )
    return "Change in NLL, QAR − FT", chart


def _rouge_bars(names: Sequence[str], sides: Mapping[str, Part]) -> Figure:
    series = {
        NAMES[side]: (_in_units("rougeL", [found[name]["rougeL"] for name in names]), PALETTE[side])
        for side, found in sides.items()
    }
    return LABELS["rougeL"], charts.grouped_bars(names, series, "", digits=digits("rougeL"))


def _querier_table(names: Sequence[str], sides: Mapping[str, Part]) -> Table:
    columns = [(key, side) for key in COMPARED for side in ("ft", "qar")]
    header = ["Querier", "Windows", *(f"{LABELS[key]}, {NAMES[side]}" for key, side in columns)]
    rows = []
    for name in names:
        cells = [_score_cell(key, sides[side][name][key]) for key, side in columns]
        rows.append(("", [(name, ""), (str(sides["qar"][name]["examples"]), ""), *cells]))
    return Table(header, rows)


def querier_swap(swap: Part | None) -> Section | None:
    """QAR asked as the true querier and as another one."""
    if swap is None:  # one person asks
        return None
    drawn = []
    for key in COMPARED:
        pair = [swap[f"{key}_{side}"] for side in ("true", "swapped")]
        gap = difference(key, swap[f"{key}_diff"], swap[f"{key}_ci95"])
        series = {"": (_in_units(key, pair), [PALETTE["qar"], _FADED])}
        chart = charts.grouped_bars(["True querier", "Swapped"], series, "", digits=digits(key))
        drawn.append((f"{LABELS[key]}: swapped − true = {gap}", chart))
    note = "Held-out questions asked under another querier's id: a model that uses the id gets worse."
    return Section("Querier swap", note, figures=drawn)


def planted(test: Part) -> Section:
    """Accuracy, against chance, on data whose replies depend on the querier by construction."""
    people = test["per_querier"]
    series = {
        NAMES[side]: (
            [test[f"{side}_accuracy"], *(person[side] for person in people.values())],
            PALETTE[side],
        )
        for side in ("ft", "qar")
    }
    chart = charts.grouped_bars(["All", *people], series, "accuracy", (test["chance"], "chance"))
    note = "Accuracy on held-out questions of a data set whose replies depend on the querier by construction."
    return Section("Planted test", note, half=True, figures=[("Accuracy, overall and by querier", chart)])


def expert_similarity(similarity: Part) -> Section | None:
    """Heat map of {"names": [...], "matrix": [[...]]}: how alike the experts move the hidden states."""
    if len(similarity["names"]) < 2:
        return None
    chart = charts.heat_map(similarity["names"], similarity["matrix"], "cosine")
    note = (
        "All experts read the same windows; an effect is the last hidden state minus its mean over queriers. "
        "Queriers who are answered alike have experts of similar effect. The diagonal is 1 and left blank."
    )
    caption = "Cosine of the experts' effects on hidden states"
    return Section("Querier similarity", note, half=True, figures=[(caption, chart)])


def answers(samples: Sequence[Part]) -> Section:
    """The same question answered to each querier, side by side."""
    note = "The same model and the same words; only the querier changes."
    return Section("One question, several queriers", note, samples=samples)


def settings(conditions: Part, seconds: Mapping[str, float]) -> Section:
    """Data, settings, versions, and how long each stage took."""
    rounded = {stage: f"{value:.0f}" for stage, value in seconds.items()}
    return Section("Run", half=True, facts=list(facts({**conditions, "seconds": rounded})))


def facts(values: Part, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values as they are shown; those of nested mappings are joined by dots."""
    for name, value in values.items():
        title = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from facts(value, f"{title}.")
        elif isinstance(value, list | tuple):
            yield title, ", ".join(map(str, value))
        else:
            yield title, f"{value:.4g}" if isinstance(value, float) else value
