# ruff: noqa: ANN001, ANN201, ANN202
"""The SwiGLU alone, where vendor-library GEMMs compute its inputs: one pass over them each way."""

from __future__ import annotations

import triton
import triton.language as tl

from qar_kernels.triton.tiles import swiglu, swiglu_backward


@triton.jit
def _block(count, BLOCK: tl.constexpr):
    """Where this program's elements begin, and which of them exist."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    return start, tl.arange(0, BLOCK) < count - start


@triton.jit
def swiglu_kernel(a_ptr, u_ptr, h_ptr, count, BLOCK: tl.constexpr):
    """``h = silu(a) * u`` of ``count`` elements. Grid: (ceil(count / BLOCK),), BLOCK elements a program."""
    start, inside = _block(count, BLOCK)
    a = tl.load(a_ptr + start + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + start + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + start + tl.arange(0, BLOCK), swiglu(a, u).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    d_h_ptr, a_ptr, u_ptr, d_a_ptr, d_u_ptr, h_ptr, count, KEEP_H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients ``d_a`` and ``d_u``; where KEEP_H also ``h`` again. Grid as in ``swiglu_kernel``."""
    start, inside = _block(count, BLOCK)
    d_h = tl.load(d_h_ptr + start + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + start + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + start + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    d_a, d_u, h = swiglu_backward(d_h, a, u)
    tl.store(d_a_ptr + start + tl.arange(0, BLOCK), d_a.to(d_a_ptr.dtype.element_ty), mask=inside)
    tl.store(d_u_ptr + start + tl.arange(0, BLOCK), d_u.to(d_u_ptr.dtype.element_ty), mask=inside)
    if KEEP_H:
        tl.store(h_ptr + start + tl.arange(0, BLOCK), h.to(h_ptr.dtype.element_ty), mask=inside)
