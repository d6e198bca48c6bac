"""The results as Markdown: one table of methods, one of paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCORES = {
    "nll": "NLL per token",
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "bleu1": "BLEU-1",
    "bleu4": "BLEU-4",
    "distinct1": "distinct-1",
    "distinct2": "distinct-2",
}
COMPARED = {"nll": "NLL per token", "rougeL": "ROUGE-L"}
IN_NATS = ("nll",)


def markdown(results: Mapping[str, Any]) -> str:
    """The tables; what has not run is named."""
    parts = [_methods(results["methods"]), _pairs(results)]
    if results["missing"]:
        parts.append(f"Not run yet: {', '.join(results['missing'])}.")
    return "\n\n".join(parts) + "\n"


def _methods(methods: Mapping[str, Any]) -> str:
    rows = [["method", "runs", *SCORES.values(), "empty or failed"]]
    for name, scores in methods.items():
        values = [_score(key, scores[key]) for key in SCORES]
        rows.append([name, str(len(scores["per_seed"])), *values, str(scores["empty"] + scores["failed"])])
    return table(rows)


def _pairs(results: Mapping[str, Any]) -> str:
    rows = [["difference", *COMPARED.values()]]
    for name, difference in results["paired"].items():
        first, second = name.split("_vs_")
        rows.append([f"{first} - {second}", *(interval(key, difference.get(key)) for key in COMPARED)])
    for name, swap in results["swap"].items():
        differences = [{"diff": swap[f"{key}_diff"], "ci95": swap[f"{key}_ci95"]} for key in COMPARED]
        cells = map(interval, COMPARED, differences)
        rows.append([f"{name} asked under another id - its own", *cells])
    return table(rows)


def published_table(published: Mapping[str, Any]) -> str:
    """The paper's averages, a row for each language."""
    languages = {language: found["average"] for language, found in published.items()}
    names = list(next(iter(languages.values())))
    rows = [["published ROUGE-L (other data and models)", *names]]
    rows += [[language, *(f"{means[name]:.2f}" for name in names)] for language, means in languages.items()]
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is the heading."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(key: str, difference: Mapping[str, Any] | None) -> str:
    """``diff [lo, hi]``; all but NLL in points."""
    if difference is None or difference["diff"] is None:
        return "not measured"
    scale, digits = (1, 3) if key in IN_NATS else (100, 1)
    text = f"{scale * difference['diff']:+.{digits}f}"
    if difference["ci95"] is None:
        return text
    low, high = (f"{scale * end:+.{digits}f}" for end in difference["ci95"])
    return f"{text} [{low}, {high}]"


def _score(key: str, value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3f}" if key in IN_NATS else f"{100 * value:.1f}"
