# ruff: noqa: ANN001, ANN201, ANN202
"""Backward, first part: gradients of the pre-activations.

T rows, S rows that have experts (the same T rows in the fused tower, other rows in the dual tower),
H hidden, I intermediate (``INTER``), R expert rank (``RANK``), E experts, C segments. "Sorted" means in
the order of ``perm``, where every expert's rows are contiguous.

With ``h = silu(a) * u``, ``s = sigmoid(a)``: ``d_u = d_h * a * s``, ``d_a = d_h * u * s * (1 + a - a * s)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qar_kernels.triton.kernels_lora import drop, low_rank_input_grad
from qar_kernels.triton.tiles import (
    grouped_order,
    load_dense,
    load_rows,
    split_columns,
    store_rows,
    swiglu_backward,
)


@triton.jit
def _expert_columns(
    d_h, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, row, inside, col, scale,
    RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From ``d_h / scale`` of some columns and saved pre-activations to ``d_a``, ``d_u``, ``scale * h``."""
    a = load_rows(a_ptr, row, inside, col, RANK, COLUMNS).to(tl.float32)
    u = load_rows(u_ptr, row, inside, col, RANK, COLUMNS).to(tl.float32)
    d_a, d_u, h = swiglu_backward(d_h * scale, a, u)
    store_rows(d_a_ptr, d_a, row, inside, col, RANK, COLUMNS)
    store_rows(d_u_ptr, d_u, row, inside, col, RANK, COLUMNS)
    store_rows(h_ptr, h * scale, row, inside, col, RANK, COLUMNS)


@triton.jit
def _expert_d_hidden_tile(
    d_y_ptr, down_ptr, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, perm_ptr, offsets_ptr, experts_ptr,
    segment, start, scale,
    H: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one segment, all R columns."""
    row = start + tl.arange(0, BLOCK)
    inside = row < tl.load(offsets_ptr + segment + 1)
    source = tl.load(perm_ptr + row, mask=inside, other=0)
    down_ptr += tl.load(experts_ptr + segment) * H * RANK
    d_h = tl.zeros((BLOCK, RANK_PAD), tl.float32)
    for k in range(0, H, BLOCK_K):
        d_y = load_rows(d_y_ptr, source, inside, k, H, BLOCK_K)
        feature = k + tl.arange(0, BLOCK_K)
        # the whole offset first spills 2 at R 128 on sm_90
        down = load_rows(down_ptr, feature, feature < H, 0, RANK, RANK_PAD, ROW_POINTERS=True)
        d_h = tl.dot(d_y, down, d_h, input_precision=PRECISION)
    if BLOCK * RANK_PAD < 64 * 64:
        _expert_columns(
            d_h, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, row, inside, 0, scale, RANK, RANK_PAD,
        )  # fmt: skip
    else:  # in one piece 142 registers instead of 60 at R 64, 255 instead of 100 at R 128 (sm_90)
        left, right = split_columns(d_h, BLOCK, RANK_PAD)
        _expert_columns(
            left, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, row, inside, 0, scale, RANK, RANK_PAD // 2,
        )  # fmt: skip
        _expert_columns(
            right, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, row, inside, RANK_PAD // 2, scale,
            RANK, RANK_PAD // 2,
        )  # fmt: skip


@triton.jit
def _swiglu_backward_columns(
    d_h, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, dropped_h_ptr, mask_ptr, rows, target, inside, col,
    INTER: tl.constexpr, COLUMNS: tl.constexpr, KEEP_H: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """From ``d_h`` of some columns and the saved pre-activations to ``d_a``, ``d_u`` and ``h``."""
    a = load_rows(a_ptr, target, inside, col, INTER, COLUMNS).to(tl.float32)
    u = load_rows(u_ptr, target, inside, col, INTER, COLUMNS).to(tl.float32)
    d_a, d_u, h = swiglu_backward(d_h, a, u)
    store_rows(d_a_ptr, d_a, target, inside, col, INTER, COLUMNS)
    store_rows(d_u_ptr, d_u, target, inside, col, INTER, COLUMNS)
    if KEEP_H:
        store_rows(h_ptr, h, target, inside, col, INTER, COLUMNS)
    if DROPOUT:
        h = drop(h, mask_ptr, rows, inside, col, INTER, COLUMNS)
        store_rows(dropped_h_ptr, h, target, inside, col, INTER, COLUMNS)


@triton.jit
def _base_d_hidden_tile(
    d_y, down, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, inverse_perm_ptr, d_low_ptr, down_a_ptr,
    dropped_h_ptr, mask_ptr, tile, T,
    H: tl.constexpr, INTER: tl.constexpr, LORA_RANK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SORT: tl.constexpr, KEEP_H: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M dense rows, BLOCK_N hidden units; a and u are read and all is written at sorted rows."""
    row_tile, col_tile = grouped_order(tile, tl.cdiv(T, BLOCK_M), tl.cdiv(INTER, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M
    col = col_tile * BLOCK_N
    d_h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LORA_RANK > 0:
        d_h = low_rank_input_grad(
            d_low_ptr, down_a_ptr, mask_ptr, row, T, col,
            INTER, LORA_RANK, DROPOUT, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    for k in range(0, H, BLOCK_K):
        d_y_tile = load_dense(d_y, row, k, T, H, BLOCK_M, BLOCK_K, TMA)
        down_tile = load_dense(down, k, col, H, INTER, BLOCK_K, BLOCK_N, TMA)
        d_h = tl.dot(d_y_tile, down_tile, d_h, input_precision=PRECISION)
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < T
    target = rows
    if SORT:
        target = tl.load(inverse_perm_ptr + rows, mask=inside, other=0)
    # In one piece the derivative needs six (BLOCK_M, BLOCK_N) tiles in registers: 390 spills at 128x128.
    left, right = split_columns(d_h, BLOCK_M, BLOCK_N)
    _swiglu_backward_columns(
        left, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, dropped_h_ptr, mask_ptr, rows, target, inside, col,
        INTER, BLOCK_N // 2, KEEP_H, DROPOUT,
    )  # fmt: skip
    # The right half may lie outside altogether, and then its mask has no columns to compare.
    col += BLOCK_N // 2
    inside &= tl.full((1,), col, tl.int32) < INTER
    _swiglu_backward_columns(
        right, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, dropped_h_ptr, mask_ptr, rows, target, inside, col,
        INTER, BLOCK_N // 2, KEEP_H, DROPOUT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def d_hidden_kernel(
    d_y,  # (T, H) gradient of the base rows' output: descriptor where TMA, else pointer
    down,  # (H, I)
    a_ptr,  # (T, I) saved gate pre-activations, sorted in the fused tower
    u_ptr,  # (T, I) saved up pre-activations
    d_a_ptr,  # (T, I) out
    d_u_ptr,  # (T, I) out
    h_ptr,  # (T, I) out where KEEP_H: recomputed hidden units
    expert_d_y_ptr,  # (S, H)
    expert_down_ptr,  # (E, H, R)
    expert_a_ptr,  # (S, R) sorted
    expert_u_ptr,  # (S, R) sorted
    expert_d_a_ptr,  # (S, R) out, sorted
    expert_d_u_ptr,  # (S, R) out, sorted
    expert_h_ptr,  # (S, R) out, sorted: scale * silu(a) * u
    perm_ptr,  # (S,)
    inverse_perm_ptr,  # (S,)
    offsets_ptr,  # (C + 2,)
    experts_ptr,  # (C + 1,)
    tile_segment_ptr,  # (num expert tiles,)
    tile_start_ptr,  # (num expert tiles,)
    tile_count_ptr,  # (2,)
    d_low_ptr,  # (T, LORA_RANK) gradient of the down adapter's product with its input, in the batch's order
    down_a_ptr,  # (LORA_RANK, I)
    dropped_h_ptr,  # (T, I) out where DROPOUT: recomputed hidden units without what the mask drops
    mask_ptr,  # (T, ceil(I / 8)) bits to keep where DROPOUT, in the batch's order
    scale,
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
    LORA_RANK: tl.constexpr,  # rank of the down adapter, 0 for none
    DROPOUT: tl.constexpr,
    KEEP_H: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the pre-activations: ``d_h = d_y · [Wd | scale · Bd_q]``, SwiGLU derivative behind it.

    Grid: (any number of programs,). Tiles are owned as in ``gate_up_kernel``.
    """
    expert_tiles = tl.load(tile_count_ptr)
    tiles = expert_tiles
    if TOWER != "expert":
        tiles += tl.cdiv(T, BLOCK_M) * tl.cdiv(INTER, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tile < expert_tiles:
            _expert_d_hidden_tile(
                expert_d_y_ptr, expert_down_ptr, expert_a_ptr, expert_u_ptr,
                expert_d_a_ptr, expert_d_u_ptr, expert_h_ptr, perm_ptr, offsets_ptr, experts_ptr,
                tl.load(tile_segment_ptr + tile), tl.load(tile_start_ptr + tile),
                tl.full((1, 1), scale, tl.float32),
                H, RANK, RANK_PAD, BLOCK_E, BLOCK_K, PRECISION,
            )  # fmt: skip
        elif TOWER != "expert":
            _base_d_hidden_tile(
                d_y, down, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, inverse_perm_ptr, d_low_ptr, down_a_ptr,
                dropped_h_ptr, mask_ptr, tile - expert_tiles, T,
                H, INTER, LORA_RANK, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
                TOWER == "fused", KEEP_H, TMA, PRECISION,
            )  # fmt: skip
