# ruff: noqa: ANN001, ANN201, ANN202
"""Forward, first half: the extended gate/up GEMM with the SwiGLU in its epilogue.

T rows, S rows that have experts (the same T rows in the fused tower, other rows in the dual tower),
H hidden, I intermediate (``INTER``), R expert rank (``RANK``), E experts, C segments. "Sorted" means in
the order of ``perm``, where every expert's rows are contiguous.

Persistent: a program walks the tile list with a stride of the grid, expert tiles first, so that their
weight streaming hides under the base tiles' arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qar_kernels.triton.kernels_lora import add_low_rank, drop
from qar_kernels.triton.tiles import (
    expert_step,
    grouped_order,
    load_dense,
    load_rows,
    split_columns,
    store_rows,
    swiglu,
)


@triton.jit
def _expert_gate_up_tile(
    x_ptr, gate_ptr, up_ptr, h_ptr, a_ptr, u_ptr, perm_ptr, offsets_ptr, experts_ptr,
    segment, start, scale,
    H: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one segment, all R columns."""
    expert = tl.load(experts_ptr + segment)
    row = start + tl.arange(0, BLOCK)
    in_segment = row < tl.load(offsets_ptr + segment + 1)
    source = tl.load(perm_ptr + row, mask=in_segment, other=0)
    rank = tl.arange(0, RANK_PAD)
    in_rank = rank < RANK
    gate_ptr += expert * RANK * H
    up_ptr += expert * RANK * H
    a = tl.zeros((BLOCK, RANK_PAD), tl.float32)
    u = tl.zeros((BLOCK, RANK_PAD), tl.float32)
    step: tl.constexpr = expert_step(RANK_PAD, BLOCK_K)
    for k in range(0, H, step):
        x = load_rows(x_ptr, source, in_segment, k, H, step)
        a = tl.dot(x, load_rows(gate_ptr, rank, in_rank, k, H, step).T, a, input_precision=PRECISION)
        u = tl.dot(x, load_rows(up_ptr, rank, in_rank, k, H, step).T, u, input_precision=PRECISION)
    # The scale goes into h in fp32, before it is rounded: the down GEMM then has one accumulator.
    store_rows(h_ptr, swiglu(a, u) * scale, row, in_segment, 0, RANK, RANK_PAD)
    if SAVE:
        store_rows(a_ptr, a, row, in_segment, 0, RANK, RANK_PAD)
        store_rows(u_ptr, u, row, in_segment, 0, RANK, RANK_PAD)


@triton.jit
def _store_swiglu_columns(
    a, u, h_ptr, a_ptr, u_ptr, dropped_h_ptr, mask_ptr, rows, target, inside, col,
    INTER: tl.constexpr, COLUMNS: tl.constexpr, SAVE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """``silu(a) * u`` of some columns, where DROPOUT also masked, where SAVE also the pre-activations."""
    h = swiglu(a, u)
    store_rows(h_ptr, h, target, inside, col, INTER, COLUMNS)
    if DROPOUT:
        h = drop(h, mask_ptr, rows, inside, col, INTER, COLUMNS)
        store_rows(dropped_h_ptr, h, target, inside, col, INTER, COLUMNS)
    if SAVE:
        store_rows(a_ptr, a, target, inside, col, INTER, COLUMNS)
        store_rows(u_ptr, u, target, inside, col, INTER, COLUMNS)


@triton.jit
def _base_gate_up_tile(
    x, gate, up, h_ptr, a_ptr, u_ptr, inverse_perm_ptr, gate_low_ptr, gate_b_ptr, up_low_ptr, up_b_ptr,
    dropped_h_ptr, mask_ptr, tile, T,
    H: tl.constexpr, INTER: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SORT: tl.constexpr, SAVE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M dense rows, BLOCK_N columns of both projections; results go to sorted rows where SORT."""
    row_tile, col_tile = grouped_order(tile, tl.cdiv(T, BLOCK_M), tl.cdiv(INTER, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M
    col = col_tile * BLOCK_N
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATE_RANK > 0:
        a = add_low_rank(
            a, gate_low_ptr, gate_b_ptr, row, T, col, INTER, GATE_RANK, BLOCK_M, BLOCK_N, PRECISION
        )
    if UP_RANK > 0:
        u = add_low_rank(u, up_low_ptr, up_b_ptr, row, T, col, INTER, UP_RANK, BLOCK_M, BLOCK_N, PRECISION)
    for k in range(0, H, BLOCK_K):
        x_tile = load_dense(x, row, k, T, H, BLOCK_M, BLOCK_K, TMA)
        a = tl.dot(
            x_tile, load_dense(gate, col, k, INTER, H, BLOCK_N, BLOCK_K, TMA).T, a, input_precision=PRECISION
        )
        u = tl.dot(
            x_tile, load_dense(up, col, k, INTER, H, BLOCK_N, BLOCK_K, TMA).T, u, input_precision=PRECISION
        )
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < T
    target = rows
    if SORT:
        target = tl.load(inverse_perm_ptr + rows, mask=inside, other=0)
    # In one piece a, u and h do not fit beside each other at 128x128 (up to 10 spills).
    a_left, a_right = split_columns(a, BLOCK_M, BLOCK_N)
    u_left, u_right = split_columns(u, BLOCK_M, BLOCK_N)
    _store_swiglu_columns(
        a_left, u_left, h_ptr, a_ptr, u_ptr, dropped_h_ptr, mask_ptr, rows, target, inside, col,
        INTER, BLOCK_N // 2, SAVE, DROPOUT,
    )  # fmt: skip
    # The right half may lie outside altogether, and then its mask has no columns to compare.
    col += BLOCK_N // 2
    inside &= tl.full((1,), col, tl.int32) < INTER
    _store_swiglu_columns(
        a_right, u_right, h_ptr, a_ptr, u_ptr, dropped_h_ptr, mask_ptr, rows, target, inside, col,
        INTER, BLOCK_N // 2, SAVE, DROPOUT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def gate_up_kernel(
    x,  # (T, H) rows of the base MLP: descriptor where TMA, else pointer
    gate,  # (I, H)
    up,  # (I, H)
    h_ptr,  # (T, I) out: silu(a) * u, sorted where FUSED
    a_ptr,  # (T, I) out where SAVE: gate pre-activations, sorted where FUSED
    u_ptr,  # (T, I) out where SAVE: up pre-activations
    expert_x_ptr,  # (S, H)
    expert_gate_ptr,  # (E, R, H)
    expert_up_ptr,  # (E, R, H)
    expert_h_ptr,  # (S, R) out, sorted: scale * silu(a) * u
    expert_a_ptr,  # (S, R) out where SAVE, sorted
    expert_u_ptr,  # (S, R) out where SAVE, sorted
    perm_ptr,  # (S,) row of each sorted position
    inverse_perm_ptr,  # (S,) sorted position of each row
    offsets_ptr,  # (C + 2,) segment bounds; segment C is the tail of rows without an expert
    experts_ptr,  # (C + 1,) expert of each segment, -1 for none
    tile_segment_ptr,  # (num expert tiles,)
    tile_start_ptr,  # (num expert tiles,) sorted position
    tile_count_ptr,  # (2,) expert tiles in use, without and with the tail
    gate_low_ptr,  # (T, GATE_RANK) scaled product of the gate's adapter with its input
    gate_b_ptr,  # (I, GATE_RANK)
    up_low_ptr,  # (T, UP_RANK)
    up_b_ptr,  # (I, UP_RANK)
    dropped_h_ptr,  # (T, I) out where DROPOUT: h without what the mask drops
    mask_ptr,  # (T, ceil(I / 8)) bits to keep where DROPOUT, in the batch's order
    scale,  # expert_scale
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
    TOWER: tl.constexpr,  # "fused", "dual" or "expert"
    GATE_RANK: tl.constexpr,  # rank of the gate's adapter, 0 for none
    UP_RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SAVE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pre-activations and hidden units of the base MLP and of the experts.

    Grid: (any number of programs,). A tile owns either BLOCK_E rows of one segment and all R columns,
    or BLOCK_M rows and BLOCK_N columns of the base; no output element has two owners.
    """
    expert_tiles = tl.load(tile_count_ptr)
    tiles = expert_tiles
    if TOWER != "expert":
        tiles += tl.cdiv(T, BLOCK_M) * tl.cdiv(INTER, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tile < expert_tiles:
            _expert_gate_up_tile(
                expert_x_ptr, expert_gate_ptr, expert_up_ptr, expert_h_ptr, expert_a_ptr, expert_u_ptr,
                perm_ptr, offsets_ptr, experts_ptr,
                tl.load(tile_segment_ptr + tile), tl.load(tile_start_ptr + tile),
                tl.full((1, 1), scale, tl.float32),
                H, RANK, RANK_PAD, BLOCK_E, BLOCK_K, SAVE, PRECISION,
            )  # fmt: skip
        elif TOWER != "expert":
            _base_gate_up_tile(
                x, gate, up, h_ptr, a_ptr, u_ptr, inverse_perm_ptr,
                gate_low_ptr, gate_b_ptr, up_low_ptr, up_b_ptr,
                dropped_h_ptr, mask_ptr, tile - expert_tiles, T,
                H, INTER, GATE_RANK, UP_RANK, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
                TOWER == "fused", SAVE, TMA, PRECISION,
            )  # fmt: skip
