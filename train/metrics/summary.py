"""Scores of a method over its records, and paired differences between methods.

Every interval is a 95 % bootstrap interval over whole dialogues, every p-value comes from a paired
randomisation over them (:mod:`train.metrics.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.metrics.bleu import CORPUS_BLEU_KEYS, DISTINCT_KEYS, corpus_bleu, distinct
from train.metrics.bootstrap import bootstrap_ci, listed, nll_summary, paired_bootstrap, paired_nll
from train.metrics.records import SCORE_KEYS, Record
from train.metrics.text import TokenKind, tokens_for
from train.metrics.wording import COMPARED

CORPUS_KEYS = (*CORPUS_BLEU_KEYS, *DISTINCT_KEYS)
"""Scores of all replies together."""


def _column(records: Sequence[Record], key: str) -> list[Any]:
    return [record[key] for record in records]


def _scored(records: Sequence[Record], key: str) -> list[Record]:
    return [record for record in records if record.get(key) is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _means(records: Sequence[Record]) -> dict[str, float | None]:
    return {key: _mean([record.get(key) for record in records]) for key in SCORE_KEYS}


def _corpus(records: Sequence[Record], tokens: TokenKind) -> dict[str, float | None]:
    """Scores of all replies together; a failed one counts as empty."""
    generated = _scored(records, "rougeL")
    if not generated or any("reference" not in record for record in generated):
        return dict.fromkeys(CORPUS_KEYS)
    replies, references = [r["reply"] or "" for r in generated], _column(generated, "reference")
    return {**corpus_bleu(replies, references, tokens), **distinct(replies, tokens)}


def _intervals(records: Sequence[Record]) -> dict[str, list[float] | None]:
    intervals = {}
    for key in SCORE_KEYS:
        scored = _scored(records, key)
        values, dialogues = _column(scored, key), _column(scored, "dialogue")
        intervals[key] = listed(bootstrap_ci(values, dialogues))
    return intervals


def _token_nll(records: Sequence[Record]) -> float:
    return float(sum(_column(records, "nll_sum")) / sum(_column(records, "tokens")))


def tokens_of(records: Sequence[Record]) -> TokenKind:
    """The kind that suits all references together, by which replies are scored one by one, too."""
    return tokens_for(record["reference"] for record in records if "reference" in record)


def _querier_scores(records: Sequence[Record], name: str, tokens: TokenKind) -> dict[str, Any]:
    own = [record for record in records if record["querier"] == name]
    counts = {"examples": len(own), "tokens": sum(_column(own, "tokens"))}
    return {"nll": _token_nll(own), **_means(own), **_corpus(own, tokens), **counts}


def summarise(records: Sequence[Record], tokens: TokenKind | None = None) -> dict[str, Any]:
    """Scores of one method: overall, as the mean over queriers ("macro"), per querier, with intervals.

    ``SCORE_KEYS`` are means over the ``generated`` examples; ``CORPUS_KEYS`` are scores of all their replies
    together, split into ``tokens`` (None: :func:`tokens_of` the records). Empty and failed replies are
    included and score 0. A value is None if there are no replies or, for ``CORPUS_KEYS``, no texts of them.
    Raises ValueError if there are no records or an example has no scored token.
    """
    if not records:
        raise ValueError("records: expected at least one held-out example, got none")
    overall = nll_summary(*(_column(records, key) for key in ("nll_sum", "tokens", "dialogue")))
    tokens = tokens or tokens_of(records)
    queriers = dict.fromkeys(_column(records, "querier"))
    per_querier = {name: _querier_scores(records, name, tokens) for name in queriers}
    return {
        "nll": overall["nll"],
        "perplexity": overall["perplexity"],
        **_means(records),
        **_corpus(records, tokens),
        "macro": {
            key: _mean([scores[key] for scores in per_querier.values()])
            for key in ("nll", *SCORE_KEYS, *CORPUS_KEYS)
        },
        "ci95": {"nll": overall["ci95"], **_intervals(records)},
        "per_querier": per_querier,
        "empty": sum(bool(record.get("empty")) for record in records),
        "failed": sum(bool(record.get("failed")) for record in records),
        "examples": len(records),
        "generated": len(_scored(records, "rougeL")),
    }


def _matched(a: Sequence[Record], b: Sequence[Record]) -> list[tuple[Record, Record]]:
    others = {record["id"]: record for record in b}
    ids = set(_column(a, "id"))
    if not len(a) == len(b) == len(ids) == len(others) or ids != set(others):
        raise ValueError("the two methods were not evaluated on the same examples, each once")
    pairs = [(record, others[record["id"]]) for record in a]
    if any(first["tokens"] != second["tokens"] for first, second in pairs):
        raise ValueError("the two methods did not score the same tokens")
    return pairs


def compare(a: Sequence[Record], b: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Paired differences `a - b` of two methods on the same examples, matched by id.

    Returns {"nll": {"diff", "ci95", "p"}, "rouge1": ..., ...}, without the scores that no example has on
    both sides. Raises ValueError if the two do not hold the same examples or did not score the same tokens.
    """
    pairs = _matched(a, b)
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    sums, tokens = [_column(side, "nll_sum") for side in (first, second)], _column(first, "tokens")
    result = {"nll": paired_nll(*sums, tokens, _column(first, "dialogue"))}
    for key in SCORE_KEYS:
        scored = [(x, y) for x, y in pairs if x.get(key) is not None and y.get(key) is not None]
        if scored:
            values = ([x[key] for x, _ in scored], [y[key] for _, y in scored])
            result[key] = paired_bootstrap(*values, [x["dialogue"] for x, _ in scored])
    return result


def _mean_of_both(records: Sequence[Record], others: Sequence[Record], key: str) -> float | None:
    """The mean over those ``records`` whose example has a score among the ``others``, too."""
    both = set(_column(_scored(others, key), "id"))
    return _mean([record.get(key) for record in records if record["id"] in both])


def swap_summary(true: Sequence[Record], swapped: Sequence[Record]) -> dict[str, Any]:
    """What asking under another id changes: {"nll_true", "nll_swapped", "nll_diff", "nll_ci95", ...}.

    The same four come for each other score that is ``COMPARED``, over the examples that have it both ways
    (None where there are none). A difference is swapped - true, so useful experts show nll_diff > 0 and
    rougeL_diff < 0.
    """
    differences = compare(swapped, true)
    result = {}
    for side, records, others in (("true", true, swapped), ("swapped", swapped, true)):
        for key in COMPARED:
            result[f"{key}_{side}"] = (
                _token_nll(records) if key == "nll" else _mean_of_both(records, others, key)
            )
    for key in COMPARED:
        difference = differences.get(key, {"diff": None, "ci95": None})
        result |= {f"{key}_diff": difference["diff"], f"{key}_ci95": difference["ci95"]}
    return result
