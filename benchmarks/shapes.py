"""What is measured: the cells, and the models whose MLP shapes they take.

T rows, Q queriers present in the batch, E experts owned, R expert rank, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

from qar_kernels.model_shapes import MODEL_SHAPES

MODELS = {name: MODEL_SHAPES[name] for name in ("Llama-3-8B", "Qwen2.5-7B", "Qwen2.5-0.5B", "SmolLM2-135M")}
# The matrix of the GPU suite (design: T x Q at R 64 for the first model; ranks and models around it).
ROWS = (1, 16, 64, 256, 4096, 16384)
QUERIERS = (1, 8, 16, 64, 256)
RANKS = (16, 64, 128)


@dataclass(frozen=True)
class Cell:
    """One measured shape.

    Attributes:
        T: rows in all: for models, tokens that go through the timed call.
        Q: queriers present; each has ``T / Q`` neighbouring rows.
        E: experts owned.
        R: expert rank.
        H: hidden size.
        I: intermediate size; 0 where the experts are measured without a base MLP.
        dtype: of activations and weights.
        S: context: tokens of each sequence that are in the cache or go through the call; None for an MLP.
        L: decoder layers; None for an MLP.
        A: rank of LoRA adapters on the base's three projections; None where there are none.
    """

    T: int
    Q: int
    E: int
    R: int
    H: int
    I: int  # noqa: E741
    dtype: str = "bfloat16"
    S: int | None = None
    L: int | None = None
    A: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.Q <= min(self.T, self.E):
            raise ValueError(f"Q: got {self.Q}, expected 1 to {min(self.T, self.E)} (T {self.T}, E {self.E})")
        if self.T % self.Q:
            raise ValueError(f"T: got {self.T}, expected a multiple of Q ({self.Q})")


def matrix(model: str, rank: int) -> list[Cell]:
    """Every T with every Q that fits (a querier has at least one row)."""
    hidden, inter = MODELS[model]
    return [Cell(t, q, max(QUERIERS), rank, hidden, inter) for t in ROWS for q in QUERIERS if q <= t]
