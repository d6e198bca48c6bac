# ruff: noqa: ANN001, ANN201
"""Backward, third part: expert weight gradients.

T rows, S rows that have experts (the same T rows in the fused tower, other rows in the dual tower),
H hidden, I intermediate (``INTER``), R expert rank (``RANK``), E experts, C segments. "Sorted" means in
the order of ``perm``, where every expert's rows are contiguous.

Base weight gradients are plain GEMMs over the results of ``d_hidden_kernel``: they stay with the vendor
library.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qar_kernels.triton.tiles import load_rows, store_rows


@triton.jit
def expert_weight_grad_kernel(
    x_ptr,  # (S, H)
    d_y_ptr,  # (S, H)
    d_a_ptr,  # (S, R) sorted
    d_u_ptr,  # (S, R) sorted
    h_ptr,  # (S, R) sorted, scaled
    d_gate_ptr,  # (E, R, H) out; experts that are absent keep what is there
    d_up_ptr,  # (E, R, H) out
    d_down_ptr,  # (E, H, R) out
    perm_ptr,  # (S,)
    offsets_ptr,  # (C + 2,)
    experts_ptr,  # (C + 1,)
    segment_count_ptr,  # (1,) segments in use
    H: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``d_gate = d_aᵀ · x``, ``d_up = d_uᵀ · x``, ``d_down = d_yᵀ · h`` over each segment's rows.

    Grid: (any number of programs,). A tile owns BLOCK_N features of one expert, either of gate and up
    or of down, and walks the segment's rows in sorted order: one owner, one order, fp32, no atomics.
    """
    columns = tl.cdiv(H, BLOCK_N)
    tiles = tl.load(segment_count_ptr) * columns * 2
    rank = tl.arange(0, RANK_PAD)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        segment = tile // (2 * columns)
        expert = tl.load(experts_ptr + segment)
        start = tl.load(offsets_ptr + segment).to(tl.int32)
        end = tl.load(offsets_ptr + segment + 1).to(tl.int32)
        col = (tile % columns) * BLOCK_N
        feature = col + tl.arange(0, BLOCK_N)
        in_feature = feature < H
        if (tile // columns) % 2 == 0:
            # Features come first in the product: the matrix instructions want 64 rows, R may be 8.
            d_gate = tl.zeros((BLOCK_N, RANK_PAD), tl.float32)
            d_up = tl.zeros((BLOCK_N, RANK_PAD), tl.float32)
            for row in range(start, end, BLOCK_K):
                rows = row + tl.arange(0, BLOCK_K)
                inside = rows < end
                source = tl.load(perm_ptr + rows, mask=inside, other=0)
                x = load_rows(x_ptr, source, inside, col, H, BLOCK_N).T
                d_a = load_rows(d_a_ptr, rows, inside, 0, RANK, RANK_PAD)
                d_gate = tl.dot(x, d_a, d_gate, input_precision=PRECISION)
                d_u = load_rows(d_u_ptr, rows, inside, 0, RANK, RANK_PAD)
                d_up = tl.dot(x, d_u, d_up, input_precision=PRECISION)
            weights = expert * RANK * H
            store_rows(d_gate_ptr + weights, d_gate.T, rank, rank < RANK, col, H, BLOCK_N)
            store_rows(d_up_ptr + weights, d_up.T, rank, rank < RANK, col, H, BLOCK_N)
        else:
            d_down = tl.zeros((BLOCK_N, RANK_PAD), tl.float32)
            for row in range(start, end, BLOCK_K):
                rows = row + tl.arange(0, BLOCK_K)
                inside = rows < end
                source = tl.load(perm_ptr + rows, mask=inside, other=0)
                d_y = load_rows(d_y_ptr, source, inside, col, H, BLOCK_N).T
                d_down = tl.dot(
                    d_y, load_rows(h_ptr, rows, inside, 0, RANK, RANK_PAD), d_down, input_precision=PRECISION
                )
            store_rows(d_down_ptr + expert * H * RANK, d_down, feature, in_feature, 0, RANK, RANK_PAD)
