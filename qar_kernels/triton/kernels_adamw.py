# ruff: noqa: ANN001, ANN201, ANN202
"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) of some rows of a stacked parameter, in place.

E rows owned, n rows with a gradient, WIDTH elements in a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _one_minus_power(log_beta, step):
    """``1 - beta ** step``, by a series where that is small and a difference has few digits."""
    z = log_beta * step
    series = -z * (1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5))))
    return tl.where(z > -0.05, series, 1 - tl.exp(z))


@triton.jit
def adamw_rows_kernel(
    weights_ptr,  # (E, WIDTH) fp32, in and out
    rounded_ptr,  # (E, WIDTH) out where ROUND: the weights in 16 bits
    exp_avg_ptr,  # (E, WIDTH) fp32, in and out
    exp_avg_sq_ptr,  # (E, WIDTH) fp32, in and out
    step_ptr,  # (E,) fp32: steps that each row has made before this one
    ids_ptr,  # (n,) int64, each once
    gradient_ptr,  # (n, WIDTH)
    found_inf_ptr,  # (1,) fp32 where MAY_SKIP: not zero to leave everything as it is
    lr,
    shrink,  # 1 - lr * weight_decay
    log_beta1,
    log_beta2,
    rest1,  # 1 - beta1, computed in double precision
    rest2,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
    MAY_SKIP: tl.constexpr,
):
    """Grid: (n, ceil(WIDTH / BLOCK)). A program owns BLOCK elements of one row."""
    index = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    if MAY_SKIP:
        inside = inside & (tl.load(found_inf_ptr + tl.zeros((1,), tl.int32)) == 0)
    row = tl.load(ids_ptr + index)
    at = row * WIDTH + column
    step = tl.load(step_ptr + row) + 1
    place = index.to(tl.int64) * WIDTH + column
    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0) * shrink
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
    exp_avg += rest1 * (gradient - exp_avg)
    exp_avg_sq += rest2 * (gradient * gradient - exp_avg_sq)
    root = tl.sqrt(exp_avg_sq) / tl.sqrt(_one_minus_power(log_beta2, step))
    weights -= lr / _one_minus_power(log_beta1, step) * exp_avg / (root + eps)
    tl.store(weights_ptr + at, weights, mask=inside)
    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    if ROUND:
        tl.store(rounded_ptr + at, weights.to(rounded_ptr.dtype.element_ty), mask=inside)
