"""Sentences of the report: what the run shows, claiming no more than the intervals allow."""

from collections.abc import Mapping, Sequence
from typing import Any

from train.metrics import wording as scores

LABELS = {"zero_shot": "Zero-shot", "ft": "FT", "qar": "QAR"}


def typeset(numbers: str) -> str:
    """`numbers` with true minus signs."""
    return numbers.replace("-", "\N{MINUS SIGN}")


def outcome(ci: Sequence[float] | None, lower_is_better: bool) -> str:
    """`better`, `worse`, `unclear` (the interval includes zero) or `unknown` (no interval)."""
    if ci is None:
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


def headline(results: Mapping[str, Any]) -> str:
    """One sentence: how QAR compares with plain fine-tuning, no stronger than the intervals allow."""
    paired = _paired(results)
    if not paired:
        return "This run does not compare QAR with FT."
    outcomes = {
        metric: outcome(found["ci95"], metric in scores.LOWER_IS_BETTER) for metric, found in paired.items()
    }
    clauses = []
    for kind, phrase in _PHRASES.items():
        named = [scores.LABELS[metric] for metric, found in outcomes.items() if found == kind]
        if named:
            clauses.append(phrase.format(" and ".join(named)))
    return f"QAR is {', and '.join(clauses)}."


def findings(results: Mapping[str, Any], planted: Mapping[str, Any]) -> list[str]:
    """The sentences under the headline, one for each measurement of the run."""
    lines = [_paired_line(metric, found, results) for metric, found in _paired(results).items()]
    swap = results["swap"].get("qar")
    if swap and swap["nll_diff"] is not None:
        lines.append(_swap_line(swap))
    lines.append(_planted_line(planted))
    for method, found in results["methods"].items():
        if found["empty"]:
            share = f"{found['empty']} of {found['generated']}"
            lines.append(f"{LABELS[method]}: {share} replies were empty; each scores 0 and is counted.")
        if found["nll"] is None:
            lines.append(f"{LABELS[method]} has no finite NLL: it diverged.")
    return lines


def _paired(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The differences that there are; a method that diverged has none of NLL."""
    paired = results["paired"]["qar_vs_ft"]
    found = {metric: paired[metric] for metric in scores.COMPARED if metric in paired}
    return {metric: difference for metric, difference in found.items() if difference["diff"] is not None}


def difference(key: str, value: float | None, ci: Sequence[float] | None) -> str:
    """A difference of scores with its interval, as in "+0.120 [+0.050, +0.190]"."""
    return typeset(scores.difference(key, value, ci))


def _paired_line(metric: str, paired: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    qar, ft = (scores.score(metric, results["methods"][method][metric]) for method in ("qar", "ft"))
    gap = difference(metric, paired["diff"], paired["ci95"])
    return f"{scores.LABELS[metric]} ({scores.direction(metric)}): QAR {qar}, FT {ft}, difference {gap}."


def _swap_line(swap: Mapping[str, Any]) -> str:
    gap = difference("nll", swap["nll_diff"], swap["nll_ci95"])
    # A wrong querier should make NLL worse: swapped - true is good news if it is above zero.
    verdict = {
        "better": "the model predicts replies less well under a wrong id, so it does use the id",
        "worse": "the model does better under a wrong id, so the experts do not help",
        "unclear": "the interval includes zero, so there is no sign that the model uses the id",
        "unknown": "without an interval this is not evidence either way",
    }[outcome(swap["nll_ci95"], lower_is_better=False)]
    return f"Asked as another querier, QAR's NLL changes by {gap}: {verdict}."


def _planted_line(planted: Mapping[str, Any]) -> str:
    accuracies = (f"{100 * planted[key]:.0f} %" for key in ("qar_accuracy", "ft_accuracy", "chance"))
    return "Planted test: accuracy {} with QAR and {} with FT; chance is {}.".format(*accuracies)
