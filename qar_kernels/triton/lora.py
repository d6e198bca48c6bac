"""LoRA on the base projections, as the kernels take it: what runs around them.

T rows, H hidden, I intermediate, r rank of an adapter. GEMMs that make or sum over r columns stay with the
vendor library; the kernels have what would otherwise be another pass over a (T, I) or (T, H) result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qar_kernels.lora import Adapter, LoRA
from qar_kernels.triton.kernels_lora import dropout_mask_kernel
from qar_kernels.triton.runner import cdiv, run_kernel

_MASK_LEVELS = 1 << 16  # of a 16-bit random number, see dropout_mask_kernel
_MASK_BLOCK = 1024


class LoraOperands(NamedTuple):
    """The adapters of one call in the rows' dtype. A projection without an adapter has rank 0.

    Attributes:
        gate_low, up_low: ``(T, r)``, ``scale * dropout(x) · aᵀ``.
        gate_b, up_b: ``(I, r)``.
        down_a: ``(r, I)``, times ``scale / (1 - dropout)``.
        down_b: ``(H, r)``.
        mask: ``(T, ceil(I / 8))`` uint8, the hidden units that its dropout keeps, see
            :func:`dropout_mask`; no elements without dropout.
    """

    gate_low: Tensor
    gate_b: Tensor
    up_low: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    mask: Tensor

    @classmethod
    def none(cls, like: Tensor) -> LoraOperands:
        """No adapter anywhere."""
        return cls(*[like.new_empty(0, 0)] * len(cls._fields))

    @property
    def drops(self) -> bool:
        """Whether the down adapter has dropout."""
        return self.mask.numel() > 0


NUM_ADAPTER_TENSORS = 6  # the mask has no gradient


def prepare(lora: LoRA, x: Tensor, intermediate: int) -> LoraOperands:
    """The operands for rows ``x`` (T, H); autograd takes the adapters' share of ``d_x`` from here."""
    rows, hidden = x.shape
    down_a, down_b = x.new_empty(0, intermediate), x.new_empty(hidden, 0)
    mask = x.new_empty(rows, 0, dtype=torch.uint8)
    if lora.down is not None:
        down_a = (lora.down.a * (lora.down.scale / (1 - lora.down.dropout))).to(x.dtype).contiguous()
        down_b = lora.down.b.to(x.dtype).contiguous()
        if lora.down.dropout:
            seed = torch.randint(2**62, (1,), device=x.device)
            mask = dropout_mask(seed, rows, intermediate, lora.down.dropout)
    gate, up = (_low_and_b(adapter, x, intermediate) for adapter in (lora.gate, lora.up))
    return LoraOperands(*gate, *up, down_a, down_b, mask)


def _low_and_b(adapter: Adapter | None, x: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    if adapter is None:
        return x.new_empty(x.shape[0], 0), x.new_empty(out_features, 0)
    return adapter.low(x).to(x.dtype).contiguous(), adapter.b.to(x.dtype).contiguous()


def draw_mask(seed: Tensor, rows: int, columns: int, probability: float) -> Tensor:
    """``(rows, ceil(columns / 8))`` uint8: bit ``c % 8`` of byte ``c // 8`` is 0 with ``probability``.

    A function of ``seed`` (1,) int64 alone, so that a checkpointed layer draws the same mask again. Bits
    take a sixteenth of the memory of 16-bit hidden units. ``probability`` counts to 16 binary digits.
    """
    width = cdiv(columns, 8)
    mask = torch.empty(rows, width, dtype=torch.uint8, device=seed.device)
    run_kernel(
        dropout_mask_kernel, (cdiv(rows * width, _MASK_BLOCK),), seed, mask, rows * width,
        round(probability * _MASK_LEVELS), BLOCK=_MASK_BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return mask


dropout_mask = torch.library.custom_op("qar::dropout_mask", draw_mask, mutates_args=())


@dropout_mask.register_fake
def _(seed: Tensor, rows: int, columns: int, probability: float) -> Tensor:
    return seed.new_empty(rows, (columns + 7) // 8, dtype=torch.uint8)


def operand_grads(
    lora: LoraOperands,
    needs: Sequence[bool],
    d_y: Tensor,
    d_low: Tensor,
    d_gate: Tensor,
    d_up: Tensor,
    dropped_h: Tensor,
    to_hidden: Callable[[Tensor], Tensor],
    to_batch: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Gradients of the operands that need one, empty for the others.

    Args:
        d_y: ``(T, H)`` in the batch's order.
        d_low: ``(T, r)``, ``d_y · down_b`` in the batch's order.
        d_gate, d_up: ``(T, I)`` gradients of the pre-activations, in the hidden units' order.
        dropped_h: ``(T, I)`` hidden units after the down adapter's dropout, in their own order.
        to_hidden, to_batch: reorder rows from the batch's order to the hidden units' and back; only
            matrices with r columns pass through them.
    """
    grads = (
        lambda: to_batch(d_gate @ lora.gate_b),
        lambda: d_gate.t() @ to_hidden(lora.gate_low),
        lambda: to_batch(d_up @ lora.up_b),
        lambda: d_up.t() @ to_hidden(lora.up_low),
        lambda: to_hidden(d_low).t() @ dropped_h,
        lambda: d_y.t() @ to_batch(dropped_h @ lora.down_a.t()),
    )
    return [grad() if needed else d_y.new_empty(0) for grad, needed in zip(grads, needs, strict=True)]
