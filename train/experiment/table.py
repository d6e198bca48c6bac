"""The results as Markdown: one table of methods, one of paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCORES = {"nll": "NLL per token", "rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"}
PERCENT = ("rougeL", "rouge1", "rouge2")


def markdown(results: Mapping[str, Any]) -> str:
    """Both tables, and what is missing, named."""
    parts = [_methods(results["methods"]), _pairs(results)]
    if results["missing"]:
        parts.append(f"Not run yet: {', '.join(results['missing'])}.")
    return "\n\n".join(parts) + "\n"


def _methods(methods: Mapping[str, Any]) -> str:
    rows = [["method", "seeds", *SCORES.values(), "empty replies"]]
    for name, scores in methods.items():
        values = [_score(key, scores[key]) for key in SCORES]
        rows.append([name, str(len(scores["per_seed"])), *values, str(scores["empty"])])
    return table(rows)


def _pairs(results: Mapping[str, Any]) -> str:
    rows = [["difference", "NLL per token", "ROUGE-L"]]
    for name, difference in results["paired"].items():
        first, second = name.split("_vs_")
        rows.append(
            [f"{first} - {second}", *(interval(key, difference.get(key)) for key in ("nll", "rougeL"))]
        )
    for name, swap in results["swap"].items():
        nll = {"diff": swap["nll_diff"], "ci95": swap["nll_ci95"]}
        rows.append([f"{name} asked under another id - its own", interval("nll", nll), ""])
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is the heading."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(key: str, difference: Mapping[str, Any] | None) -> str:
    """``diff [lo, hi]``; ROUGE in points."""
    if difference is None or difference["diff"] is None:
        return "not measured"
    scale, digits = (100, 1) if key in PERCENT else (1, 3)
    text = f"{scale * difference['diff']:+.{digits}f}"
    if difference["ci95"] is None:
        return text
    low, high = (f"{scale * end:+.{digits}f}" for end in difference["ci95"])
    return f"{text} [{low}, {high}]"


def _score(key: str, value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{100 * value:.1f}" if key in PERCENT else f"{value:.3f}"
