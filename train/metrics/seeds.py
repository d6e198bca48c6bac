"""Several runs of one method, under other seeds or with other dialogues held out, as one.

A window's scores are averaged over the runs before dialogues are resampled, so that it does not count once
per run. Intervals and p-values therefore say what other dialogues would change; the values per seed show
how much seeds differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.metrics.records import SCORE_KEYS, Record
from train.metrics.summary import CORPUS_KEYS, compare, summarise, tokens_of
from train.metrics.text import TokenKind

COUNTS = ("empty", "failed")
PER_SEED = ("nll", *SCORE_KEYS, *CORPUS_KEYS)


def pool(runs: Sequence[Sequence[Record]]) -> list[Record]:
    """One record per window, its NLL and scores averaged over those of ``runs`` that hold it.

    Texts of replies are left out; a score is None if a run lacks it. Raises ``ValueError`` if there are no
    runs, if one holds a window twice, or if two disagree on the number of its tokens.
    """
    if not runs:
        raise ValueError("runs: expected the records of at least one run, got none")
    windows: dict[str, list[Record]] = {}
    for run in runs:
        if len({record["id"] for record in run}) < len(run):
            raise ValueError("runs: one holds a window more than once")
        for record in run:
            windows.setdefault(record["id"], []).append(record)
    return [_mean(window) for window in windows.values()]


def _mean(window: Sequence[Record]) -> Record:
    if len({record["tokens"] for record in window}) > 1:
        raise ValueError(f"window '{window[0]['id']}': the runs did not score the same tokens")
    mean = {key: value for key, value in window[0].items() if key not in ("reply", "reference")}
    for key in ("nll_sum", *SCORE_KEYS):
        values = [record.get(key) for record in window]
        mean[key] = None if None in values else float(np.mean(values))
    return mean | {key: any(record.get(key) for record in window) for key in COUNTS}


def summarise_seeds(runs: Sequence[Sequence[Record]], tokens: TokenKind | None = None) -> dict[str, Any]:
    """As ``summarise``, of all ``runs`` together, with ``per_seed`` values.

    Scores of all replies of a run together (``CORPUS_KEYS``) are averaged over the runs, a querier's over the
    runs in which they ask; ``empty`` and ``failed`` are totals over all runs, ``examples`` and ``generated``
    count windows.
    """
    tokens = tokens or tokens_of([record for run in runs for record in run])
    single = [summarise(run, tokens) for run in runs]
    summary = summarise(pool(runs), tokens)
    summary |= _corpus_means(single)
    summary["macro"] |= _corpus_means([one["macro"] for one in single])
    for name, scores in summary["per_querier"].items():
        scores |= _corpus_means([one["per_querier"][name] for one in single if name in one["per_querier"]])
    totals = {key: sum(one[key] for one in single) for key in COUNTS}
    return summary | totals | {"per_seed": [{key: one[key] for key in PER_SEED} for one in single]}


def _corpus_means(parts: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    return {key: _mean_or_none([part[key] for part in parts]) for key in CORPUS_KEYS}


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def compare_seeds(a: Sequence[Sequence[Record]], b: Sequence[Sequence[Record]]) -> dict[str, dict[str, Any]]:
    """As ``compare``, over the runs of two methods; ``a`` and ``b`` may have different numbers of runs.

    If they have the same number, ``per_seed`` of each score holds the differences run by run.
    """
    result = compare(pool(a), pool(b))
    if len(a) == len(b):
        each = [compare(first, second) for first, second in zip(a, b, strict=True)]
        for key, difference in result.items():
            difference["per_seed"] = [one[key]["diff"] for one in each]
    return result
