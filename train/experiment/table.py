"""The results as Markdown: one table of methods, one of paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.metrics.wording import COMPARED, LABELS, TABLE, difference, score

NOT_MEASURED = "not measured"


def markdown(results: Mapping[str, Any]) -> str:
    """The tables, and the names of cells that have not run."""
    parts = [_methods(results["methods"]), _pairs(results)]
    if results["missing"]:
        parts.append(f"Not run yet: {', '.join(results['missing'])}.")
    return "\n\n".join(parts) + "\n"


def _methods(methods: Mapping[str, Any]) -> str:
    columns = [key for key in TABLE if any(key in scores for scores in methods.values())]
    rows = [["method", "runs", *(LABELS[key] for key in columns), "empty or failed"]]
    for name, scores in methods.items():
        values = [score(key, scores.get(key), missing=NOT_MEASURED) for key in columns]
        rows.append([name, str(len(scores["per_seed"])), *values, str(scores["empty"] + scores["failed"])])
    return table(rows)


def _pairs(results: Mapping[str, Any]) -> str:
    found = {}
    for name, differences in results["paired"].items():
        first, second = name.split("_vs_")
        found[f"{first} - {second}"] = differences
    for name, swap in results["swap"].items():
        found[f"{name} asked under another id - its own"] = {
            key: {"diff": swap[f"{key}_diff"], "ci95": swap[f"{key}_ci95"]}
            for key in COMPARED
            if f"{key}_diff" in swap
        }
    columns = [key for key in COMPARED if not found or any(key in row for row in found.values())]
    rows = [["difference", *(LABELS[key] for key in columns)]]
    rows += [
        [name, *(_difference(key, row.get(key) or {}) for key in columns)] for name, row in found.items()
    ]
    return table(rows)


def _difference(key: str, found: Mapping[str, Any]) -> str:
    return difference(key, found.get("diff"), found.get("ci95"), NOT_MEASURED)


def published_table(published: Mapping[str, Any]) -> str:
    """The paper's averages, one row per language."""
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
