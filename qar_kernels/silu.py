"""PyTorch's silu over whole vectors.

PyTorch rounds a buffer's whole vectors and its remainder differently (by one unit in the last place). Without
a remainder an element's result does not depend on its position, and so not on the rest of the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements in two of the widest vector registers, at the least element size.
_VECTORS = 64


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    rest = -x.numel() % _VECTORS
    return F.silu(F.pad(x.view(-1), (0, rest)))[: x.numel()].view_as(x) if rest else F.silu(x)


def silu_backward(d_y: Tensor, x: Tensor) -> Tensor:
    """``d_y * silu'(x)``."""
    rest = -x.numel() % _VECTORS
    if not rest:
        return torch.ops.aten.silu_backward(d_y, x)
    flat = (F.pad(tensor.view(-1), (0, rest)) for tensor in (d_y, x))
    return torch.ops.aten.silu_backward(*flat)[: x.numel()].view_as(x)
