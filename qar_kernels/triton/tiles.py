# ruff: noqa: ANN001, ANN201
"""Device functions that every kernel shares: tile loads, tile order, segment lookups, the SwiGLU.

T rows, H hidden, I intermediate, R expert rank (``RANK``; ``RANK_PAD`` is R raised to at least 16, the
smallest side of a matrix instruction).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_columns(row_mask, col, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Mask of a tile's elements; where BLOCK_COLS divides COLS a column needs no comparison.

    The tile must start inside the matrix.
    """
    if COLS % BLOCK_COLS == 0:
        return row_mask[:, None]
    else:
        return row_mask[:, None] & (col + tl.arange(0, BLOCK_COLS) < COLS)[None, :]


@triton.jit
def load_rows(
    ptr, row_index, row_mask, col, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    ROW_POINTERS: tl.constexpr = False,
):  # fmt: skip
    """Gathered rows of a row-major matrix with COLS columns: (len(row_index), BLOCK_COLS).

    What is added to the pointer first, rows (ROW_POINTERS) or all of the offset, decides how many registers
    the compiler spends on pointers; each of the two spilled in kernels where the other does not.
    """
    c = col + tl.arange(0, BLOCK_COLS)
    inside = in_columns(row_mask, col, COLS, BLOCK_COLS)
    rows = row_index.to(tl.int64)[:, None] * COLS
    pointers = ptr + rows + c[None, :] if ROW_POINTERS else ptr + (rows + c[None, :])
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, value, row_index, row_mask, col, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Scatter a (len(row_index), BLOCK_COLS) tile to rows of a matrix with COLS columns."""
    c = col + tl.arange(0, BLOCK_COLS)
    inside = in_columns(row_mask, col, COLS, BLOCK_COLS)
    offsets = row_index.to(tl.int64)[:, None] * COLS + c[None, :]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_dense(
    src,
    row,
    col,
    rows,
    COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TMA: tl.constexpr,
):
    """A (BLOCK_ROWS, BLOCK_COLS) tile of a row-major (rows, COLS) matrix, zeros outside it.

    ``src`` is a tensor descriptor where TMA, else a pointer.
    """
    if TMA:
        return src.load([row, col])
    else:
        r = row + tl.arange(0, BLOCK_ROWS)
        return load_rows(src, r, r < rows, col, COLS, BLOCK_COLS)


@triton.jit
def grouped_order(tile, num_rows, num_cols, GROUP: tl.constexpr):
    """Row and column of a tile, walking GROUP row tiles per column so that weights stay in L2."""
    per_group = GROUP * num_cols
    first = (tile // per_group) * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    inner = tile % per_group
    return first + inner % size, inner // size


@triton.jit
def split_columns(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a (ROWS, COLUMNS) tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.constexpr_function
def segment_stages(rank_pad, block_n, bits, projections):
    """Pipeline stages of the loop over segments, where an expert's tile is found through two other loads.

    At R 128 two stages would need 393 KB of shared memory, and so would eight with tiles above 8 KB. Eight
    ask for four experts' tiles at once: a decode step is short, and each would be waited for alone. Of two
    projections three at once, else (131 KB at R 64) no second program would fit on a multiprocessor.
    """
    if rank_pad > 64:
        return 1
    if rank_pad * block_n * bits > 8 * 8192:
        return 2
    return 8 if projections == 1 else 6


@triton.constexpr_function
def expert_step(rank_pad, block_k):
    """Depth per step of a whole rank: at R 128 four stages of 128 would need 328 KB of shared memory."""
    return min(block_k, 8192 // rank_pad)


@triton.constexpr_function
def split_depth(depth, splits, block_k):
    """Length of each part of a K loop over ``depth``, whole steps of ``block_k``."""
    return triton.cdiv(depth, splits * block_k) * block_k


@triton.constexpr_function
def num_slots(splits, tower):
    """Partial sums per output element: one per part of K and, fused, one for the experts."""
    return splits + 1 if splits > 1 and tower == "fused" else splits


@triton.jit
def slot_at(position, SPLITS: tl.constexpr, FUSED: tl.constexpr):
    """The slot whose tiles come at that position of the tile list: the experts' first, then the parts of K.

    The experts' tiles are chains of loads that wait for each other, and nothing hides a list's last tiles.
    Slots are added up in their own order, whatever the list's.
    """
    if FUSED and SPLITS > 1:
        return tl.where(position == 0, SPLITS, position - 1)
    else:
        return position


@triton.jit
def swiglu(a, u):
    """``silu(a) * u`` in fp32."""
    return a * tl.sigmoid(a) * u


@triton.jit
def swiglu_backward(d_h, a, u):
    """``(d_a, d_u, h)`` of ``h = silu(a) * u``, all fp32."""
    s = tl.sigmoid(a)
    silu = a * s
    return d_h * u * s * (1.0 + a - silu), d_h * silu, silu * u
