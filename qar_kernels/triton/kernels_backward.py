# ruff: noqa: ANN001, ANN201, ANN202
"""Backward kernels: hidden gradients, input gradient, expert weight gradients.

T rows, S rows that have experts (the same T rows in the fused tower), H hidden, I intermediate
(``INTER``), R expert rank (``RANK``), E experts, C segments. "Sorted" means in the order of ``perm``.
With ``h = silu(a) * u``, ``s = sigmoid(a)``: ``d_u = d_h * a * s``, ``d_a = d_h * u * s * (1 + a - a * s)``.
Base weight gradients are plain GEMMs over these results and stay with the vendor library.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qar_kernels.triton.tiles import (
    grouped_order,
    load_dense,
    load_rows,
    segment_stages,
    split_columns,
    store_rows,
    swiglu_backward,
)


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
        down = load_rows(down_ptr, feature, feature < H, 0, RANK, RANK_PAD)
        d_h = tl.dot(d_y, down, d_h, input_precision=PRECISION)
    a = load_rows(a_ptr, row, inside, 0, RANK, RANK_PAD).to(tl.float32)
    u = load_rows(u_ptr, row, inside, 0, RANK, RANK_PAD).to(tl.float32)
    d_a, d_u, h = swiglu_backward(d_h * scale, a, u)
    store_rows(d_a_ptr, d_a, row, inside, 0, RANK, RANK_PAD)
    store_rows(d_u_ptr, d_u, row, inside, 0, RANK, RANK_PAD)
    store_rows(h_ptr, h * scale, row, inside, 0, RANK, RANK_PAD)


@triton.jit
def _swiglu_backward_columns(
    d_h, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, target, inside, col,
    INTER: tl.constexpr, COLUMNS: tl.constexpr, KEEP_H: tl.constexpr,
):  # fmt: skip
    """From ``d_h`` of some columns and the saved pre-activations to ``d_a``, ``d_u`` and ``h``."""
    a = load_rows(a_ptr, target, inside, col, INTER, COLUMNS).to(tl.float32)
    u = load_rows(u_ptr, target, inside, col, INTER, COLUMNS).to(tl.float32)
    d_a, d_u, h = swiglu_backward(d_h, a, u)
    store_rows(d_a_ptr, d_a, target, inside, col, INTER, COLUMNS)
    store_rows(d_u_ptr, d_u, target, inside, col, INTER, COLUMNS)
    if KEEP_H:
        store_rows(h_ptr, h, target, inside, col, INTER, COLUMNS)


@triton.jit
def _base_d_hidden_tile(
    d_y, down, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, rank_ptr, tile, T,
    H: tl.constexpr, INTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SORT: tl.constexpr, KEEP_H: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M dense rows, BLOCK_N hidden units; a and u are read and all is written at sorted rows."""
    row_tile, col_tile = grouped_order(tile, tl.cdiv(T, BLOCK_M), tl.cdiv(INTER, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M
    col = col_tile * BLOCK_N
    d_h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        d_y_tile = load_dense(d_y, row, k, T, H, BLOCK_M, BLOCK_K, TMA)
        down_tile = load_dense(down, k, col, H, INTER, BLOCK_K, BLOCK_N, TMA)
        d_h = tl.dot(d_y_tile, down_tile, d_h, input_precision=PRECISION)
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < T
    target = rows
    if SORT:
        target = tl.load(rank_ptr + rows, mask=inside, other=0)
    # In one piece the derivative needs six (BLOCK_M, BLOCK_N) tiles in registers: 390 spills at 128x128.
    left, right = split_columns(d_h, BLOCK_M, BLOCK_N)
    _swiglu_backward_columns(
        left, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, target, inside, col, INTER, BLOCK_N // 2, KEEP_H
    )
    # The right half may lie outside altogether, and then its mask has no columns to compare.
    col += BLOCK_N // 2
    inside &= col < INTER
    _swiglu_backward_columns(
        right, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, target, inside, col, INTER, BLOCK_N // 2, KEEP_H
    )


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
    rank_ptr,  # (S,)
    offsets_ptr,  # (C + 2,)
    experts_ptr,  # (C + 1,)
    tile_segment_ptr,  # (num expert tiles,)
    tile_start_ptr,  # (num expert tiles,)
    tile_count_ptr,  # (2,)
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
                d_y, down, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, rank_ptr, tile - expert_tiles, T,
                H, INTER, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TOWER == "fused", KEEP_H, TMA, PRECISION,
            )  # fmt: skip


@triton.jit
def _segment_d_x(
    acc, d_a_ptr, d_u_ptr, gate_ptr, up_ptr, offsets_ptr, experts_ptr, segment, rows, col,
    H: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + d_a_e · Ag_q + d_u_e · Au_q`` for the rows inside the segment; the others add exact zeros."""
    inside = (rows >= tl.load(offsets_ptr + segment)) & (rows < tl.load(offsets_ptr + segment + 1))
    weights = tl.load(experts_ptr + segment) * RANK * H
    rank = tl.arange(0, RANK_PAD)
    d_a = load_rows(d_a_ptr, rows, inside, 0, RANK, RANK_PAD)
    gate = load_rows(gate_ptr + weights, rank, rank < RANK, col, H, BLOCK_N)
    acc = tl.dot(d_a, gate, acc, input_precision=PRECISION)
    d_u = load_rows(d_u_ptr, rows, inside, 0, RANK, RANK_PAD)
    up = load_rows(up_ptr + weights, rank, rank < RANK, col, H, BLOCK_N)
    return tl.dot(d_u, up, acc, input_precision=PRECISION)


@triton.jit
def _base_d_x(
    d_a, d_u, gate, up, row, col, T, H: tl.constexpr, INTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_a · Wg + d_u · Wu`` in one accumulator: first all of K for the gate, then for the up projection."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, INTER, BLOCK_K):
        d_a_tile = load_dense(d_a, row, k, T, INTER, BLOCK_M, BLOCK_K, TMA)
        gate_tile = load_dense(gate, k, col, INTER, H, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(d_a_tile, gate_tile, acc, input_precision=PRECISION)
    for k in range(0, INTER, BLOCK_K):
        d_u_tile = load_dense(d_u, row, k, T, INTER, BLOCK_M, BLOCK_K, TMA)
        up_tile = load_dense(up, k, col, INTER, H, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(d_u_tile, up_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _grouped_d_x_tile(
    d_a_ptr, d_u_ptr, gate_ptr, up_ptr, d_x_ptr, perm_ptr, offsets_ptr, experts_ptr, segment, start, col,
    H: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one segment, BLOCK_N columns; rows without an expert get zeros."""
    rows = start + tl.arange(0, BLOCK)
    inside = rows < tl.load(offsets_ptr + segment + 1)
    acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    if tl.load(experts_ptr + segment) >= 0:
        acc = _segment_d_x(
            acc, d_a_ptr, d_u_ptr, gate_ptr, up_ptr, offsets_ptr, experts_ptr, segment, rows, col,
            H, RANK, RANK_PAD, BLOCK_N, PRECISION,
        )  # fmt: skip
    store_rows(d_x_ptr, acc, tl.load(perm_ptr + rows, mask=inside, other=0), inside, col, H, BLOCK_N)


@triton.jit(do_not_specialize=["T"])
def d_x_kernel(
    d_a,  # (T, I) sorted in the fused tower: descriptor where TMA, else pointer
    d_u,  # (T, I)
    gate,  # (I, H)
    up,  # (I, H)
    d_x_ptr,  # (T, H) out, in the batch's order
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
        tiles += tl.cdiv(T, BLOCK_M) * columns
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tile < grouped_tiles:
            if TOWER != "fused":
                owner = tile // columns
                _grouped_d_x_tile(
                    expert_d_a_ptr, expert_d_u_ptr, expert_gate_ptr, expert_up_ptr, expert_d_x_ptr,
                    perm_ptr, offsets_ptr, experts_ptr,
                    tl.load(tile_segment_ptr + owner), tl.load(tile_start_ptr + owner),
                    (tile % columns) * BLOCK_N, H, RANK, RANK_PAD, BLOCK_E, BLOCK_N, PRECISION,
                )  # fmt: skip
        elif TOWER != "expert":
            row_tile, col_tile = grouped_order(tile - grouped_tiles, tl.cdiv(T, BLOCK_M), columns, GROUP)
            rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            col = col_tile * BLOCK_N
            acc = _base_d_x(
                d_a,
                d_u,
                gate,
                up,
                row_tile * BLOCK_M,
                col,
                T,
                H,
                INTER,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                TMA,
                PRECISION,
            )
            target = rows
            if TOWER == "fused":
                first = tl.load(first_segment_ptr + row_tile)
                last = tl.load(last_segment_ptr + row_tile)
                for segment in tl.range(first, last, num_stages=segment_stages(RANK_PAD)):
                    acc = _segment_d_x(
                        acc, expert_d_a_ptr, expert_d_u_ptr, expert_gate_ptr, expert_up_ptr,
                        offsets_ptr, experts_ptr, segment, rows, col,
                        H, RANK, RANK_PAD, BLOCK_N, PRECISION,
                    )  # fmt: skip
                target = tl.load(perm_ptr + rows, mask=rows < T, other=0)
            store_rows(d_x_ptr, acc, target, rows < T, col, H, BLOCK_N)


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
