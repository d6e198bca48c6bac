"""Bootstrap intervals and paired randomisation tests over whole groups of examples (dialogues).

Windows of one dialogue share most of their text, so resampling single examples would give intervals that
are too narrow. A mean, a token-weighted mean and a paired difference are all one ratio, sum of numerators /
sum of denominators, and share one resampler.
"""

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

SAMPLES, LEVEL, SEED = 1000, 0.95, 0
FLIPS, FLIPS_AT_ONCE = 10_000, 500


def _group_sums(values: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    if len(groups) != len(values):
        raise ValueError(f"groups: expected {len(values)} entries, one for each value, got {len(groups)}")
    index = {group: position for position, group in enumerate(dict.fromkeys(groups))}
    return np.bincount([index[group] for group in groups], weights=values)


def _ratio_ci(
    numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[Hashable]
) -> tuple[float, float]:
    """Percentile interval of sum(numerators) / sum(denominators); (nan, nan) for fewer than two groups."""
    numerator, denominator = _group_sums(numerators, groups), _group_sums(denominators, groups)
    count = len(numerator)
    if count < 2:
        return math.nan, math.nan
    draws = _draws(count)
    ratios = (draws @ numerator) / (draws @ denominator)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(maxsize=4)  # all scores of a method share the few numbers of dialogues that they have
def _draws(count: int) -> np.ndarray:
    """How often each of ``count`` groups is in each resample: ``(SAMPLES, count)``."""
    return np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=SAMPLES)


def sign_flip_p(differences: Sequence[float], groups: Sequence[Hashable]) -> float | None:
    """Two-sided p-value of a paired difference: approximate randomisation (Noreen 1989) of whole groups.

    If two methods were alike, the sign of each group's summed difference would be chance. p is the share of
    random signs under which the total is at least as far from 0, counting the observed one, so it is at least
    1 / (FLIPS + 1). None for fewer than two groups. Sums serve for plain and token-weighted means alike,
    because the divisor does not depend on the signs.
    """
    sums = _group_sums(differences, groups)
    if len(sums) < 2:
        return None
    generator, observed, at_least = np.random.default_rng(SEED), abs(sums.sum()), 0
    rounding = 1e-9 * np.abs(sums).sum()
    for _ in range(FLIPS // FLIPS_AT_ONCE):
        signs = generator.integers(0, 2, size=(FLIPS_AT_ONCE, len(sums))) * 2 - 1
        at_least += int((np.abs(signs @ sums) >= observed - rounding).sum())
    return (1 + at_least) / (1 + FLIPS)


def listed(interval: tuple[float, float]) -> list[float] | None:
    """An interval for JSON: [lo, hi], or None if it could not be estimated."""
    return None if math.isnan(interval[0]) else list(interval)


def _check_same_length(first: Sequence[Any], second: Sequence[Any]) -> None:
    if len(first) != len(second) or len(first) == 0:
        sizes = f"{len(first)} and {len(second)}"
        raise ValueError(f"expected two equally long, non-empty lists, got {sizes} items")


def bootstrap_ci(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """Interval of the mean of `values`, by resampling whole `groups`.

    (nan, nan) for fewer than two groups: one dialogue says nothing about the next.
    """
    return _ratio_ci(values, np.ones(len(values)), groups)


def paired_bootstrap(a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable]) -> dict[str, Any]:
    """Mean of `a - b` over the same examples: {"diff", "ci95": [lo, hi] or None, "p": see `sign_flip_p`}."""
    _check_same_length(a, b)
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return {
        "diff": float(difference.mean()),
        "ci95": listed(bootstrap_ci(difference, groups)),
        "p": sign_flip_p(difference, groups),
    }


def nll_summary(
    nll_sums: Sequence[float], token_counts: Sequence[int], groups: Sequence[Hashable]
) -> dict[str, Any]:
    """Token-weighted mean NLL in nats: {"nll", "perplexity", "ci95": [lo, hi] or None}, ci95 of the NLL.

    Raises ValueError if an example has no scored token.
    """
    nll, interval = _token_mean(nll_sums, token_counts, groups)
    return {"nll": nll, "perplexity": float(np.exp(nll)), "ci95": interval}


def paired_nll(
    a_sums: Sequence[float],
    b_sums: Sequence[float],
    token_counts: Sequence[int],
    groups: Sequence[Hashable],
) -> dict[str, Any]:
    """Token-weighted mean of NLL `a - b` over the same tokens: {"diff", "ci95": [lo, hi] or None, "p"}."""
    _check_same_length(a_sums, b_sums)
    difference = np.asarray(a_sums, dtype=np.float64) - np.asarray(b_sums, dtype=np.float64)
    mean, interval = _token_mean(difference, token_counts, groups)
    return {"diff": mean, "ci95": interval, "p": sign_flip_p(difference, groups)}


def _token_mean(
    sums: Sequence[float], token_counts: Sequence[int], groups: Sequence[Hashable]
) -> tuple[float, list[float] | None]:
    _check_same_length(sums, token_counts)
    if min(token_counts) < 1:
        raise ValueError("token_counts: every example needs at least one scored token")
    mean = float(np.sum(sums) / np.sum(token_counts))
    return mean, listed(_ratio_ci(sums, token_counts, groups))
