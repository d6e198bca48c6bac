# ruff: noqa: ANN001, ANN201
"""LoRA inside the base tiles: low-rank steps of a GEMM, and the dropout on the hidden units.

T rows, I intermediate, r rank of an adapter (``RANK``; 0 where a projection has none). An adapter's product
with its input, ``low`` (T, r), is a plain GEMM outside the kernels; what is here is its product with the
other factor, one more step of the K loop. It comes before the loop, so that the mask needs no second
accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qar_kernels.triton.tiles import in_columns, load_rows


@triton.constexpr_function
def rank_block(rank):
    """Ranks per step: all of a small rank, at most 64, at least a matrix instruction's 16."""
    return min(64, max(16, triton.next_power_of_2(rank)))


@triton.jit
def add_low_rank(
    acc, low_ptr, b_ptr, row, T, col, COLS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + low · bᵀ`` of BLOCK_M rows and BLOCK_N columns: ``low`` (T, RANK), ``b`` (COLS, RANK)."""
    STEP: tl.constexpr = rank_block(RANK)
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    for k in tl.range(0, RANK, STEP, num_stages=1):
        low = load_rows(low_ptr, rows, rows < T, k, RANK, STEP)
        b = load_rows(b_ptr, cols, cols < COLS, k, RANK, STEP)
        acc = tl.dot(low, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def low_rank_input_grad(
    d_low_ptr, a_ptr, mask_ptr, row, T, col, COLS: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_low · a``, masked where DROPOUT: ``d_low`` (T, RANK), ``a`` (RANK, COLS) -> (BLOCK_M, BLOCK_N)."""
    STEP: tl.constexpr = rank_block(RANK)
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < T
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, RANK, STEP, num_stages=1):
        d_low = load_rows(d_low_ptr, rows, inside, k, RANK, STEP)
        rank = k + tl.arange(0, STEP)
        a = load_rows(a_ptr, rank, rank < RANK, col, COLS, BLOCK_N)
        acc = tl.dot(d_low, a, acc, input_precision=PRECISION)
    if DROPOUT:
        acc = drop(acc, mask_ptr, rows, inside, col, COLS, BLOCK_N)
    return acc


@triton.jit
def drop(value, mask_ptr, rows, inside, col, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """``value`` where the bit of its row and column is set, else 0. ``mask`` is (T, ceil(COLS / 8)) bytes."""
    c = col + tl.arange(0, BLOCK_COLS)
    offsets = rows.to(tl.int64)[:, None] * ((COLS + 7) // 8) + (c // 8)[None, :]
    byte = tl.load(mask_ptr + offsets, mask=in_columns(inside, col, COLS, BLOCK_COLS), other=0).to(tl.int32)
    return tl.where(((byte >> (c % 8)[None, :]) & 1) != 0, value, 0.0)


@triton.jit
def dropout_mask_kernel(
    seed_ptr,  # (1,) int64
    mask_ptr,  # (size,) uint8 out: each bit is set with probability 1 - threshold / 65536
    size,
    threshold,
    BLOCK: tl.constexpr,
):
    """Eight independent bits per byte, from one Philox block (Salmon et al., SC 2011): 16 random bits each.

    Grid: (ceil(size / BLOCK),). A program owns BLOCK bytes.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = tl.randint4x(tl.load(seed_ptr), index)
    byte = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(4):
        low_half = (words[i] & 0xFFFF).to(tl.int32)
        high_half = ((words[i] >> 16) & 0xFFFF).to(tl.int32)
        byte |= (low_half >= threshold).to(tl.int32) << (2 * i)
        byte |= (high_half >= threshold).to(tl.int32) << (2 * i + 1)
    tl.store(mask_ptr + index, byte.to(tl.uint8), mask=index < size)
