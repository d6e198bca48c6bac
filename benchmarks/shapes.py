"""The T x Q matrix and the models whose MLP shapes are measured. T rows, Q queriers in the batch."""

from __future__ import annotations

from dataclasses import dataclass

MODELS = {
    "Llama-3-8B": (4096, 14336),
    "Qwen2.5-7B": (3584, 18944),
    "Qwen2.5-0.5B": (896, 4864),
}
ROWS = (1, 16, 256, 4096, 16384)
QUERIERS = (1, 8, 16, 64, 256)


@dataclass(frozen=True)
class Cell:
    """One measured shape: T rows, Q queriers of E experts of rank R, H hidden, I intermediate."""

    T: int
    Q: int
    E: int
    R: int
    H: int
    I: int  # noqa: E741
    dtype: str = "bfloat16"


def matrix(model: str, rank: int) -> list[Cell]:
    """Every T with every Q that fits (a querier has at least one row)."""
    hidden, inter = MODELS[model]
    return [Cell(t, q, max(QUERIERS), rank, hidden, inter) for t in ROWS for q in QUERIERS if q <= t]
