# ruff: noqa: ANN001, ANN201, ANN202
"""Backward, second part: the input gradient.

T rows, S rows that have experts (the same T rows in the fused tower, other rows in the dual tower),
H hidden, I intermediate (``INTER``), R expert rank (``RANK``), E experts, C segments. "Sorted" means in
the order of ``perm``, where every expert's rows are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def _segment_d_x(
    acc, d_a_ptr, d_u_ptr, gate_ptr, up_ptr, offsets_ptr, experts_ptr, segment, rows, col,
    H: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + d_a_e · Ag_q + d_u_e · Au_q`` for the rows inside the segment; the others add exact zeros."""
    inside = (rows >= tl.load(offsets_ptr + segment)) & (rows < tl.load(offsets_ptr + segment + 1))
    weights = tl.load(experts_ptr + segment) * RANK * H
    # In steps, like every K loop: in one piece R 128 spills on sm_80, and R 64 does in exact fp32. Up to RANK
    # and not RANK_PAD: load_rows masks columns only where RANK is no multiple of the step.
    part: tl.constexpr = min(RANK_PAD, BLOCK_K)
    # Spills of the experts' own d_x for few rows: rows first 4 at R 16 (sm_90, H 3584); the whole offset 2 at
    # R 8 there, and 4 at R 32 on sm_80.
    row_pointers: tl.constexpr = RANK != 16
    for first in tl.static_range(0, RANK, part):
        rank = first + tl.arange(0, part)
        d_a = load_rows(d_a_ptr, rows, inside, first, RANK, part, ROW_POINTERS=row_pointers)
        gate = load_rows(gate_ptr + weights, rank, rank < RANK, col, H, BLOCK_N)
        acc = tl.dot(d_a, gate, acc, input_precision=PRECISION)
        d_u = load_rows(d_u_ptr, rows, inside, first, RANK, part, ROW_POINTERS=row_pointers)
        up = load_rows(up_ptr + weights, rank, rank < RANK, col, H, BLOCK_N)
        acc = tl.dot(d_u, up, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _base_d_x(
    d_a, d_u, gate, up, row, col, start, end, T, H: tl.constexpr, INTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_a · Wg + d_u · Wu`` over K from start to end: first for the gate, then for the up projection."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, end, BLOCK_K):
        d_a_tile = load_dense(d_a, row, k, T, INTER, BLOCK_M, BLOCK_K, TMA)
        gate_tile = load_dense(gate, k, col, INTER, H, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(d_a_tile, gate_tile, acc, input_precision=PRECISION)
    for k in range(start, end, BLOCK_K):
        d_u_tile = load_dense(d_u, row, k, T, INTER, BLOCK_M, BLOCK_K, TMA)
        up_tile = load_dense(up, k, col, INTER, H, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(d_u_tile, up_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _grouped_d_x_tile(
    d_a_ptr, d_u_ptr, gate_ptr, up_ptr, d_x_ptr, perm_ptr, offsets_ptr, experts_ptr, segment, start, col,
    H: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one segment, BLOCK_N columns; rows without an expert get zeros."""
    rows = start + tl.arange(0, BLOCK)
    inside = rows < tl.load(offsets_ptr + segment + 1)
    acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    if tl.load(experts_ptr + segment) >= 0:
        acc = _segment_d_x(
            acc, d_a_ptr, d_u_ptr, gate_ptr, up_ptr, offsets_ptr, experts_ptr, segment, rows, col,
            H, RANK, RANK_PAD, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    store_rows(d_x_ptr, acc, tl.load(perm_ptr + rows, mask=inside, other=0), inside, col, H, BLOCK_N)


@triton.jit
def _row_tile_d_x(
    d_a, d_u, gate, up, d_x_ptr, expert_d_a_ptr, expert_d_u_ptr, expert_gate_ptr, expert_up_ptr,
    perm_ptr, offsets_ptr, experts_ptr, first_segment_ptr, last_segment_ptr, tile, T,
    H: tl.constexpr, INTER: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, BLOCK_N columns, one slot: a part of K, or (fused) the experts, or all of it."""
    row_tiles = tl.cdiv(T, BLOCK_M)
    columns = tl.cdiv(H, BLOCK_N)
    slot = slot_at(tile // (row_tiles * columns), SPLITS, FUSED)
    row_tile, col_tile = grouped_order(tile % (row_tiles * columns), row_tiles, columns, GROUP)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = col_tile * BLOCK_N
    part: tl.constexpr = split_depth(INTER, SPLITS, BLOCK_K)
    # The experts' slot lies behind the last part, so that its K range is empty.
    acc = _base_d_x(
        d_a, d_u, gate, up, row_tile * BLOCK_M, col, slot * part, tl.minimum(slot * part + part, INTER), T,
        H, INTER, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION,
    )  # fmt: skip
    target = rows
    if FUSED:
        if SPLITS == 1 or slot == SPLITS:
            first = tl.load(first_segment_ptr + row_tile)
            last = tl.load(last_segment_ptr + row_tile)
            bits: tl.constexpr = expert_gate_ptr.dtype.element_ty.primitive_bitwidth
            for segment in tl.range(first, last, num_stages=segment_stages(RANK_PAD, BLOCK_N, bits, 2)):
                acc = _segment_d_x(
                    acc, expert_d_a_ptr, expert_d_u_ptr, expert_gate_ptr, expert_up_ptr,
                    offsets_ptr, experts_ptr, segment, rows, col,
                    H, RANK, RANK_PAD, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
        if SPLITS == 1:
            target = tl.load(perm_ptr + rows, mask=rows < T, other=0)
    store_rows(d_x_ptr + slot.to(tl.int64) * T * H, acc, target, rows < T, col, H, BLOCK_N)


@triton.jit(do_not_specialize=["T"])
def d_x_kernel(
    d_a,  # (T, I) sorted in the fused tower: descriptor where TMA, else pointer
    d_u,  # (T, I)
    gate,  # (I, H)
    up,  # (I, H)
    d_x_ptr,  # (T, H) out, in the batch's order; (slots, T, H) fp32 sums in d_a's order where SPLITS > 1
    expert_d_a_ptr,  # (S, R) sorted
    expert_d_u_ptr,  # (S, R) sorted
    expert_gate_ptr,  # (E, R, H)
    expert_up_ptr,  # (E, R, H)
    expert_d_x_ptr,  # (S, H) out in the dual and expert towers
    perm_ptr,  # (S,)
    offsets_ptr,  # (C + 2,)
    experts_ptr,  # (C + 1,)
    tile_segment_ptr,  # (num expert tiles,)
    tile_start_ptr,  # (num expert tiles,)
    tile_count_ptr,  # (2,)
    first_segment_ptr,  # (num row tiles,)
    last_segment_ptr,  # (num row tiles,)
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
    SPLITS: tl.constexpr,  # parts of the K loops; where more than 1, the experts have a slot of their own
    TOWER: tl.constexpr,  # "fused", "dual" or "expert"
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Input gradient ``d_a · Wg + d_u · Wu + d_a_e · Ag_q + d_u_e · Au_q``.

    Grid: (any number of programs,). Tiles are owned as in ``down_kernel``.
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
                _grouped_d_x_tile(
                    expert_d_a_ptr, expert_d_u_ptr, expert_gate_ptr, expert_up_ptr, expert_d_x_ptr,
                    perm_ptr, offsets_ptr, experts_ptr,
                    tl.load(tile_segment_ptr + owner), tl.load(tile_start_ptr + owner),
                    (tile % columns) * BLOCK_N, H, RANK, RANK_PAD, BLOCK_E, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
        elif TOWER != "expert":
            _row_tile_d_x(
                d_a, d_u, gate, up, d_x_ptr, expert_d_a_ptr, expert_d_u_ptr, expert_gate_ptr, expert_up_ptr,
                perm_ptr, offsets_ptr, experts_ptr, first_segment_ptr, last_segment_ptr,
                tile - grouped_tiles, T, H, INTER, RANK, RANK_PAD, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
                SPLITS, TOWER == "fused", TMA, PRECISION,
            )  # fmt: skip
