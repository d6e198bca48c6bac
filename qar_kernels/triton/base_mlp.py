"""The base MLP of the grouped path: the vendor library's GEMMs, with one pass for the SwiGLU between them.

T rows, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qar_kernels.autograd import refuse_second_order
from qar_kernels.lora import LoRA, add_update, project
from qar_kernels.triton.kernels_swiglu import swiglu_backward_kernel, swiglu_kernel
from qar_kernels.triton.ops import needs_operator
from qar_kernels.triton.runner import cdiv, run_kernel

_BLOCK = 2048


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, lora: LoRA) -> Tensor:
    """``x`` (T, H), ``gate``/``up`` (I, H), ``down`` (H, I) -> (T, H).

    Between the GEMMs eager PyTorch passes over (T, I) five times and saves four results; this passes over it
    three times and saves the two pre-activations.
    """
    a, u = project(x, gate, lora.gate), project(x, up, lora.up)
    if needs_operator((a, u)):
        return project(F.silu(a) * u, down, lora.down)  # the compiler fuses this by itself
    a, u = a.contiguous(), u.contiguous()
    if torch.is_grad_enabled() and (a.requires_grad or u.requires_grad or down.requires_grad):
        y, h = _SwiGLUDown.apply(a, u, down)
    else:
        h = swiglu(a, u)
        y = F.linear(h, down)
    return add_update(y, h, lora.down)


def swiglu(a: Tensor, u: Tensor) -> Tensor:
    """``silu(a) * u`` (T, I), rounded once."""
    h = torch.empty_like(a)
    _launch(swiglu_kernel, a, u, h)
    return h


def swiglu_backward(d_h: Tensor, a: Tensor, u: Tensor, keep_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``a`` and ``u``, and ``h`` recomputed if ``keep_h``, else empty."""
    d_a, d_u, h = torch.empty_like(a), torch.empty_like(u), torch.empty_like(a) if keep_h else a.new_empty(0)
    _launch(swiglu_backward_kernel, d_h, a, u, d_a, d_u, h, KEEP_H=keep_h)
    return d_a, d_u, h


def _launch(kernel: object, *tensors: Tensor, **meta: bool) -> None:
    count = tensors[0].numel()
    grid = (cdiv(count, _BLOCK),)
    run_kernel(kernel, grid, *tensors, count, **meta, BLOCK=_BLOCK, num_warps=4, num_stages=1)


class _SwiGLUDown(torch.autograd.Function):
    """``h = silu(a) * u`` and ``y = h · downᵀ``; ``h`` is computed again for the backward pass, not kept."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, a: Tensor, u: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, u, down)
        ctx.set_materialize_grads(False)
        h = swiglu(a, u)
        return F.linear(h, down), h

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, d_y: Tensor, d_h: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_order("backend 'triton'")
        a, u, down = ctx.saved_tensors
        wants_down = ctx.needs_input_grad[2]
        d_h = torch.mm(d_y, down) if d_h is None else torch.addmm(d_h, d_y, down)
        d_a, d_u, h = swiglu_backward(d_h, a, u, wants_down)
        return d_a, d_u, torch.mm(d_y.t(), h) if wants_down else None
