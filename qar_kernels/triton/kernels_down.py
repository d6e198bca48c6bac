# ruff: noqa: ANN001, ANN201, ANN202
"""Forward, second half: the extended down GEMM.

T rows, S rows that have experts (the same T rows in the fused tower, other rows in the dual tower),
H hidden, I intermediate (``INTER``), R expert rank (``RANK``), E experts, C segments. "Sorted" means in
the order of ``perm``, where every expert's rows are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qar_kernels.triton.kernels_lora import add_low_rank
from qar_kernels.triton.tiles import (
    grouped_order,
    load_dense,
    load_rows,
    num_slots,
    segment_stages,
    slot_at,
    split_depth,
    store_rows,
)


@triton.jit
def _segment_down(
    acc, h_ptr, down_ptr, offsets_ptr, experts_ptr, segment, rows, col,
    H: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + h_e · Bdᵀ`` for the rows inside the segment; the others add exact zeros."""
    inside = (rows >= tl.load(offsets_ptr + segment)) & (rows < tl.load(offsets_ptr + segment + 1))
    h = load_rows(h_ptr, rows, inside, 0, RANK, RANK_PAD)
    cols = col + tl.arange(0, BLOCK_N)
    down_ptr += tl.load(experts_ptr + segment) * H * RANK
    down = load_rows(down_ptr, cols, cols < H, 0, RANK, RANK_PAD)
    return tl.dot(h, down.T, acc, input_precision=PRECISION)


@triton.jit
def _grouped_down_tile(
    h_ptr, down_ptr, base_y_ptr, y_ptr, perm_ptr, offsets_ptr, experts_ptr, segment, start, col,
    H: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one segment, BLOCK_N columns; rows without an expert get zeros (plus base_y)."""
    rows = start + tl.arange(0, BLOCK)
    inside = rows < tl.load(offsets_ptr + segment + 1)
    target = tl.load(perm_ptr + rows, mask=inside, other=0)
    acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    if ADD:  # asked for before the experts' operands are waited for
        base_y = load_rows(base_y_ptr, target, inside, col, H, BLOCK_N)
    if tl.load(experts_ptr + segment) >= 0:
        acc = _segment_down(
            acc, h_ptr, down_ptr, offsets_ptr, experts_ptr, segment, rows, col,
            H, RANK, RANK_PAD, BLOCK_N, PRECISION,
        )  # fmt: skip
    if ADD:
        acc += base_y.to(tl.float32)
    store_rows(y_ptr, acc, target, inside, col, H, BLOCK_N)


@triton.jit
def _row_tile_down(
    h, down, y_ptr, expert_h_ptr, expert_down_ptr, perm_ptr, offsets_ptr, experts_ptr,
    first_segment_ptr, last_segment_ptr, low_ptr, b_ptr, tile, T,
    H: tl.constexpr, INTER: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    LORA_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of h, BLOCK_N columns, one slot: a part of K, or (fused) the experts, or all of it."""
    row_tiles = tl.cdiv(T, BLOCK_M)
    columns = tl.cdiv(H, BLOCK_N)
    slot = slot_at(tile // (row_tiles * columns), SPLITS, FUSED)
    row_tile, col_tile = grouped_order(tile % (row_tiles * columns), row_tiles, columns, GROUP)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = col_tile * BLOCK_N
    part: tl.constexpr = split_depth(INTER, SPLITS, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LORA_RANK > 0 and (SPLITS == 1 or slot == 0):
        acc = add_low_rank(
            acc, low_ptr, b_ptr, row_tile * BLOCK_M, T, col, H, LORA_RANK, BLOCK_M, BLOCK_N, PRECISION
        )
    # The experts' slot lies behind the last part, so that its K range is empty.
    for k in range(slot * part, tl.minimum(slot * part + part, INTER), BLOCK_K):
        h_tile = load_dense(h, row_tile * BLOCK_M, k, T, INTER, BLOCK_M, BLOCK_K, TMA)
        down_tile = load_dense(down, col, k, H, INTER, BLOCK_N, BLOCK_K, TMA)
        acc = tl.dot(h_tile, down_tile.T, acc, input_precision=PRECISION)
    target = rows
    if FUSED:
        if SPLITS == 1 or slot == SPLITS:
            first = tl.load(first_segment_ptr + row_tile)
            last = tl.load(last_segment_ptr + row_tile)
            bits: tl.constexpr = expert_down_ptr.dtype.element_ty.primitive_bitwidth
            for segment in tl.range(first, last, num_stages=segment_stages(RANK_PAD, BLOCK_N, bits, 1)):
                acc = _segment_down(
                    acc, expert_h_ptr, expert_down_ptr, offsets_ptr, experts_ptr, segment, rows, col,
                    H, RANK, RANK_PAD, BLOCK_N, PRECISION,
                )  # fmt: skip
        if SPLITS == 1:
            target = tl.load(perm_ptr + rows, mask=rows < T, other=0)
    store_rows(y_ptr + slot.to(tl.int64) * T * H, acc, target, rows < T, col, H, BLOCK_N)


@triton.jit(do_not_specialize=["T"])
def down_kernel(
    h,  # (T, I) sorted where FUSED: descriptor where TMA, else pointer
    down,  # (H, I)
    y_ptr,  # (T, H) out, in the batch's order; (slots, T, H) fp32 sums in h's order where SPLITS > 1
    expert_h_ptr,  # (S, R) sorted, scaled
    expert_down_ptr,  # (E, H, R)
    expert_y_ptr,  # (S, H) out in the dual and expert towers
    base_y_ptr,  # (S, H) what the expert rows are added to where ADD
    perm_ptr,  # (S,)
    offsets_ptr,  # (C + 2,) segment bounds; segment C is the tail of rows without an expert
    experts_ptr,  # (C + 1,) expert of each segment, -1 for none
    tile_segment_ptr,  # (num expert tiles,)
    tile_start_ptr,  # (num expert tiles,)
    tile_count_ptr,  # (2,) expert tiles in use, without and with the tail
    first_segment_ptr,  # (num row tiles,) first segment that meets each tile of BLOCK_M sorted rows
    last_segment_ptr,  # (num row tiles,) one past the last
    low_ptr,  # (T, LORA_RANK) scaled product of the adapter with its input, in h's order
    b_ptr,  # (H, LORA_RANK)
    T,
    H: tl.constexpr,
    INTER: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,  # parts of the K loop; where more than 1, the experts have a slot of their own
    TOWER: tl.constexpr,  # "fused", "dual" or "expert"
    LORA_RANK: tl.constexpr,  # rank of the adapter, 0 for none
    ADD: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Down projections of the base MLP and of the experts.

    Grid: (any number of programs,). A row tile owns BLOCK_M rows of h and BLOCK_N columns (of one slot
    where K is split): its K loop runs over I, then, fused, over the segments that meet its rows. A grouped
    tile (dual and expert towers) owns BLOCK_E rows of one segment; the tail of rows without an expert is a
    segment with no K at all.
    """
    columns = tl.cdiv(H, BLOCK_N)
    grouped_tiles = 0
    if TOWER != "fused":
        grouped_tiles = tl.load(tile_count_ptr + 1) * columns
    tiles = grouped_tiles
    if TOWER != "expert":
        tiles += tl.cdiv(T, BLOCK_M) * columns * num_slots(SPLITS, TOWER)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tile < grouped_tiles:
            if TOWER != "fused":
                owner = tile // columns
                _grouped_down_tile(
                    expert_h_ptr, expert_down_ptr, base_y_ptr, expert_y_ptr,
                    perm_ptr, offsets_ptr, experts_ptr,
                    tl.load(tile_segment_ptr + owner), tl.load(tile_start_ptr + owner),
                    (tile % columns) * BLOCK_N, H, RANK, RANK_PAD, BLOCK_E, BLOCK_N, ADD, PRECISION,
                )  # fmt: skip
        elif TOWER != "expert":
            _row_tile_down(
                h, down, y_ptr, expert_h_ptr, expert_down_ptr, perm_ptr, offsets_ptr, experts_ptr,
                first_segment_ptr, last_segment_ptr, low_ptr, b_ptr, tile - grouped_tiles, T,
                H, INTER, RANK, RANK_PAD, LORA_RANK, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
                SPLITS, TOWER == "fused", TMA, PRECISION,
            )  # fmt: skip
