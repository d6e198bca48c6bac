"""Row-sparse gradients of stacked experts: rows for the experts present, nothing for the others.

E experts, n experts present. A gradient is a sparse COO tensor over dimension 0 as
``nn.Embedding(sparse=True)`` makes them: indices ``(1, n)``, ascending, values ``(n, ...)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qar_kernels.autograd import refuse_second_order
from qar_kernels.segments import Segments
from qar_kernels.weights import SwiGLUWeights


# a graph break under torch.compile: compiled graphs have neither sparse tensors nor sizes that ids decide
@torch.compiler.disable
def present_rows(bank: SwiGLUWeights, segments: Segments) -> tuple[SwiGLUWeights, Segments]:
    """Copies ``(n, ...)`` of the weights of the experts present, and the segments that index them.

    Kernels, autocast and autograd then see n experts, so that no step of theirs costs anything for the
    others. Gradients arrive at ``bank`` row-sparse.
    """
    ids, renumbered = segments.present
    return SwiGLUWeights(*_TakeRows.apply(ids, *bank)), renumbered


class _TakeRows(torch.autograd.Function):
    """``weight[ids]`` of every weight, for different ids."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(ids)
        ctx.shapes = [weight.shape for weight in weights]
        return tuple(weight.index_select(0, ids) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *d_rows: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("sparse_gradients")
        (ids,) = ctx.saved_tensors
        return None, *(row_sparse(ids, rows, shape) for rows, shape in zip(d_rows, ctx.shapes, strict=True))


def row_sparse(ids: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of shape ``shape`` with ``rows`` at ``ids`` and nothing elsewhere."""
    return torch.sparse_coo_tensor(ids.unsqueeze(0), rows, shape, check_invariants=False)
