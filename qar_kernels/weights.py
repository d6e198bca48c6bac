"""The three matrices of a SwiGLU, which travel together.

H hidden, I intermediate, R expert rank, E experts. All are in ``nn.Linear`` layout (out, in).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SwiGLUWeights(NamedTuple):
    """Weights of ``down · (silu(gate x) * (up x))``, or their gradients.

    Attributes:
        gate, up: ``(I, H)`` of the base, ``(E, R, H)`` of stacked experts.
        down: ``(H, I)`` of the base, ``(E, H, R)`` of stacked experts.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
