"""Sentences of the report: what the run shows, claiming no more than the intervals allow."""

from collections.abc import Mapping, Sequence
from typing import Any

from train.metrics import wording as scores

LABELS = {"zero_shot": "Zero-shot", "ft": "FT", "qar": "QAR", "rpg": "RPG", "qcg": "QCG"}
LOWER_IS_BETTER = {"nll": True, "rougeL": False}


def label(method: str) -> str:
    """The name of a method as readers know it."""
    return LABELS.get(method, method.replace("_", " ").capitalize())


def typeset(numbers: str) -> str:
    """`numbers` with true minus signs."""
    return numbers.replace("-", "\N{MINUS SIGN}")


def percent(value: float | None) -> str:
    """`value` in [0, 1] as a percentage."""
    return "–" if value is None else f"{100 * value:.0f} %"


def outcome(ci: Sequence[float | None] | None, lower_is_better: bool) -> str:
    """`better`, `worse`, `unclear` (the interval includes zero) or `unknown` (no interval)."""
    if not ci or None in ci:
        return "unknown"
    low, high = ci
    if low <= 0 <= high:
        return "unclear"
    return "better" if (high < 0) == lower_is_better else "worse"


_PHRASES = {
    "better": "better than FT on {}",
    "worse": "worse than FT on {}",
    "unclear": "not clearly different from FT on {} (the 95 % interval includes zero)",
    "unknown": "compared with FT on {} without an interval",
}


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: how QAR compares with plain fine-tuning, no stronger than the intervals allow."""
    paired = _paired(report)
    if not paired:
        return "This run does not compare QAR with FT."
    outcomes = {
        metric: outcome(found.get("ci95"), LOWER_IS_BETTER[metric]) for metric, found in paired.items()
    }
    clauses = []
    for kind, phrase in _PHRASES.items():
        named = [scores.LABELS[metric] for metric, found in outcomes.items() if found == kind]
        if named:
            clauses.append(phrase.format(" and ".join(named)))
    return f"QAR is {', and '.join(clauses)}."


def findings(report: Mapping[str, Any]) -> list[str]:
    """The sentences under the headline, one for each measurement of the run."""
    lines = [_paired_line(metric, found, report) for metric, found in _paired(report).items()]
    if (report.get("querier_swap") or {}).get("nll_diff") is not None:
        lines.append(_swap_line(report["querier_swap"]))
    if report.get("planted"):
        lines.append(_planted_line(report["planted"]))
    for method, found in report["methods"].items():
        if found.get("empty"):
            lines.append(_empty_line(method, found))
        if scores.score("nll", found.get("nll")) == scores.MISSING:
            lines.append(f"{label(method)} has no finite NLL: it diverged, or nothing was scored.")
    return lines


def _paired(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    differences = (report.get("paired") or {}).get("qar_vs_ft") or {}
    known = {metric: differences.get(metric) or {} for metric in scores.COMPARED}
    return {metric: found for metric, found in known.items() if found.get("diff") is not None}


def difference(key: str, value: float | None, ci: Sequence[float | None] | None) -> str:
    """A difference of scores with its interval, as in "+0.120 [+0.050, +0.190]"."""
    return typeset(scores.difference(key, value, ci))


def _paired_line(metric: str, paired: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    found = (report["methods"].get(method, {}).get(metric) for method in ("qar", "ft"))
    qar, ft = (scores.score(metric, value) for value in found)
    direction = "lower" if LOWER_IS_BETTER[metric] else "higher"
    gap = difference(metric, paired["diff"], paired.get("ci95"))
    return f"{scores.LABELS[metric]} ({direction} is better): QAR {qar}, FT {ft}, difference {gap}."


def _swap_line(swap: Mapping[str, Any]) -> str:
    gap = difference("nll", swap.get("nll_diff"), swap.get("nll_ci95"))
    # A wrong querier should make NLL worse: swapped - true is good news if it is above zero.
    verdict = {
        "better": "the model predicts replies less well under a wrong id, so it does use the id",
        "worse": "the model does better under a wrong id, so the experts do not help",
        "unclear": "the interval includes zero, so there is no sign that the model uses the id",
        "unknown": "without an interval this is not evidence either way",
    }[outcome(swap.get("nll_ci95"), lower_is_better=False)]
    return f"Asked as another querier, QAR's NLL changes by {gap}: {verdict}."


def _planted_line(planted: Mapping[str, Any]) -> str:
    accuracies = (percent(planted.get(key)) for key in ("qar_accuracy", "ft_accuracy", "chance"))
    return "Planted test: accuracy {} with QAR and {} with FT; chance is {}.".format(*accuracies)


def _empty_line(method: str, found: Mapping[str, Any]) -> str:
    total = found.get("generated") or found.get("examples")
    share = f"{found['empty']} of {total}" if total else f"{found['empty']}"
    return f"{label(method)}: {share} replies were empty; each scores 0 and is counted."
