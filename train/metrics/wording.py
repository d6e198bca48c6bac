"""How scores are named and written wherever they are shown: NLL in nats, ROUGE and the like in points."""

from __future__ import annotations

import math
from collections.abc import Sequence

LABELS = {
    "nll": "NLL per token",
    "perplexity": "perplexity",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "chrf": "chrF",
    "corpus_bleu4": "corpus BLEU-4",
    "distinct1": "distinct-1",
    "distinct2": "distinct-2",
}
TABLE = ("nll", "rougeL", "rouge1", "rouge2", "bleu1", "bleu4", "chrf", "distinct1", "distinct2")
"""Columns of an experiment's table."""
SUMMARY = ("nll", "rouge1", "rouge2", "rougeL", "corpus_bleu4", "distinct2")
"""Columns where there is less room: on the console and in the report."""
COMPARED = ("nll", "rougeL")
"""Scores whose differences are shown beside the tables; each is ``nll`` or one of a single reply."""
LOWER_IS_BETTER = ("nll", "perplexity")
"""Of all other scores higher ones are better."""
UNSCALED = {"nll": 3, "perplexity": 2}
"""Scores that are shown as they are, with so many decimals; all others are in [0, 1] and shown in points."""
MISSING = "–"


def direction(key: str) -> str:
    """Which values of a score are good ones."""
    return "lower is better" if key in LOWER_IS_BETTER else "higher is better"


def narrow_headings(keys: Sequence[str]) -> list[str]:
    """Labels with one word to a line, so that a table with names fits into 80 columns."""
    return [LABELS[key].replace(" ", "\n") for key in keys]


def in_units(key: str, value: float) -> float:
    """A score as it is shown."""
    return value if key in UNSCALED else 100 * value


def digits(key: str) -> int:
    """Decimals of a score as it is shown."""
    return UNSCALED.get(key, 1)


def score(key: str, value: float | None, signed: bool = False, missing: str = MISSING) -> str:
    """A score or a difference of scores; ``missing`` where there is none or it is not finite."""
    if value is None or not math.isfinite(value):
        return missing
    return f"{in_units(key, value):{'+' if signed else ''}.{digits(key)}f}"


def interval(key: str, ends: Sequence[float | None] | None, signed: bool = False) -> str:
    """An interval as "[low, high]"; nothing where there is none."""
    if not ends or None in ends:
        return ""
    low, high = (score(key, end, signed) for end in ends)
    return f"[{low}, {high}]"


def difference(
    key: str, value: float | None, ends: Sequence[float | None] | None, missing: str = MISSING
) -> str:
    """A difference with its interval, as in "+0.120 [+0.050, +0.190]"."""
    return f"{score(key, value, True, missing)} {interval(key, ends, True)}".rstrip()
