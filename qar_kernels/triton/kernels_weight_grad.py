# ruff: noqa: ANN001, ANN201, ANN202
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
def _clear(
    ptr, first, last, row, row_mask, col,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Zeros for a tile of the (ROWS, COLS) matrices of the experts from first to last."""
    for expert in range(first, last):
        matrix = ptr + tl.cast(expert, tl.int64) * ROWS * COLS
        store_rows(
            matrix, tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32), row, row_mask, col, COLS, BLOCK_COLS
        )


@triton.jit(do_not_specialize=["E"])
def expert_weight_grad_kernel(
    x_ptr,  # (S, H)
    d_y_ptr,  # (S, H)
    d_a_ptr,  # (S, R) sorted
    d_u_ptr,  # (S, R) sorted
    h_ptr,  # (S, R) sorted, scaled
    d_gate_ptr,  # (E, R, H) out, zeros for experts that are absent
    d_up_ptr,  # (E, R, H) out
    d_down_ptr,  # (E, H, R) out
    perm_ptr,  # (S,)
    offsets_ptr,  # (C + 2,)
    experts_ptr,  # (C + 1,)
    segment_count_ptr,  # (1,) segments in use
    E,
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
    Segments are sorted by expert, so experts between the last segment's and a tile's own are absent: it
    writes their zeros, too. Behind the last segment is one without rows, for the rest of the bank; it comes
    first, for it may have most to write.
    """
    columns = tl.cdiv(H, BLOCK_N)
    segments = tl.load(segment_count_ptr)
    tiles = (segments + 1) * columns * 2
    rank = tl.arange(0, RANK_PAD)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        segment = segments - tile // (2 * columns)
        behind = segment == segments
        first_absent = tl.load(experts_ptr + segment - 1, mask=segment > 0, other=-1).to(tl.int32) + 1
        expert = tl.load(experts_ptr + segment)
        last_absent = tl.where(behind, E, expert.to(tl.int32))
        start = tl.load(offsets_ptr + segment).to(tl.int32)
        end = tl.where(behind, start, tl.load(offsets_ptr + segment + 1).to(tl.int32))
        col = (tile % columns) * BLOCK_N
        feature = col + tl.arange(0, BLOCK_N)
        in_feature = feature < H
        if (tile // columns) % 2 == 0:
            _clear(d_gate_ptr, first_absent, last_absent, rank, rank < RANK, col, RANK, H, RANK_PAD, BLOCK_N)
            _clear(d_up_ptr, first_absent, last_absent, rank, rank < RANK, col, RANK, H, RANK_PAD, BLOCK_N)
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
            if not behind:
                weights = expert * RANK * H
                store_rows(d_gate_ptr + weights, d_gate.T, rank, rank < RANK, col, H, BLOCK_N)
                store_rows(d_up_ptr + weights, d_up.T, rank, rank < RANK, col, H, BLOCK_N)
        else:
            _clear(d_down_ptr, first_absent, last_absent, feature, in_feature, 0, H, RANK, BLOCK_N, RANK_PAD)
            d_down = tl.zeros((BLOCK_N, RANK_PAD), tl.float32)
            for row in range(start, end, BLOCK_K):
                rows = row + tl.arange(0, BLOCK_K)
                inside = rows < end
                source = tl.load(perm_ptr + rows, mask=inside, other=0)
                d_y = load_rows(d_y_ptr, source, inside, col, H, BLOCK_N).T
                d_down = tl.dot(
                    d_y, load_rows(h_ptr, rows, inside, 0, RANK, RANK_PAD), d_down, input_precision=PRECISION
                )
            if not behind:
                store_rows(d_down_ptr + expert * H * RANK, d_down, feature, in_feature, 0, RANK, RANK_PAD)
