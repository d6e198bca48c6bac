"""Split K: if a GEMM has too few output tiles for the chip, its K loop is cut into parts.

Every part (and in the fused tower the experts' share) writes fp32 sums to a slot of its own, and the
slots are added from the first to the last. T rows, H columns of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qar_kernels.triton.kernels_reduce import reduce_kernel
from qar_kernels.triton.runner import cdiv, run_kernel
from qar_kernels.triton.tiles import num_slots

_COLUMNS = 1024


def count(tiles: int, multiprocessors: int, max_splits: int) -> int:
    """Parts of the K loop: the least power of two that gives three quarters of the multiprocessors a tile.

    It depends on shapes and the device only, never on the ids: a row's order of summation is always the same.
    """
    splits = 1
    while 2 * splits <= max_splits and 4 * splits * tiles < 3 * multiprocessors:
        splits *= 2
    return splits


def partial_sums(out: Tensor, splits: int, tower: str) -> Tensor:
    """``(slots, T, H)`` fp32 to be written where K is split, else ``out`` itself as the one slot."""
    if splits == 1:
        return out[None]
    return out.new_empty(num_slots(splits, tower), *out.shape, dtype=torch.float32)


def reduce(parts: Tensor, out: Tensor, perm: Tensor, tower: str) -> None:
    """Write the sum of the slots to ``out``; in the fused tower they are in the order of ``perm``."""
    slots, rows, columns = parts.shape
    run_kernel(
        reduce_kernel, (rows, cdiv(columns, _COLUMNS)), parts, out, perm, rows,
        H=columns, SLOTS=slots, BLOCK_N=_COLUMNS, SORTED=tower == "fused", num_warps=4, num_stages=1,
    )  # fmt: skip
