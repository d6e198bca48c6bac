# ruff: noqa: ANN001, ANN201
"""The reduction of a split K loop, of the forward pass's down and of the backward pass's d_x kernel.

T rows, H hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def reduce_kernel(
    parts_ptr,  # (SLOTS, T, H) fp32
    y_ptr,  # (T, H) out, in the batch's order
    perm_ptr,  # (T,) row of each position where SORTED
    T,
    H: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SORTED: tl.constexpr,
):
    """``y = sum of the slots``, always from the first to the last.

    Grid: (T, ceil(H / BLOCK_N)). A program owns BLOCK_N columns of one row.
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < H
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for slot in range(SLOTS):
        offset = (tl.cast(slot, tl.int64) * T + row) * H
        acc += tl.load(parts_ptr + offset + column, mask=inside, other=0.0)
    target = row.to(tl.int64)
    if SORTED:
        target = tl.load(perm_ptr + row)
    tl.store(y_ptr + target * H + column, acc.to(y_ptr.dtype.element_ty), mask=inside)
