"""Segmented experts in plain PyTorch: what ``auto`` runs on a CPU.

T rows, H hidden, R expert rank, E experts. Rows are sorted by expert once; each segment then runs
dense matrix products on contiguous slices, reading its expert's weights in place. Nothing is gathered
per row and experts that are absent from the batch are never touched.

Registered as custom operators because the loop over segments reads the segment bounds on the host:
``torch.compile`` then sees one opaque node instead of a graph break.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from qar_kernels.lora import NO_LORA, LoRA, project
from qar_kernels.segments import Segments


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, lora: LoRA = NO_LORA) -> Tensor:
    """The base MLP: ``x`` (T, H), ``gate``/``up`` (I, H), ``down`` (H, I) -> (T, H)."""
    hidden = F.silu(project(x, gate, lora.gate)) * project(x, up, lora.up)
    return project(hidden, down, lora.down)


def expert_mlp(
    x: Tensor, expert_gate: Tensor, expert_up: Tensor, expert_down: Tensor, segments: Segments
) -> Tensor:
    """Row ``t`` through its own expert; rows without one give zeros. ``x`` (T, H) -> (T, H)."""
    args = x, expert_gate, expert_up, expert_down, segments.perm, segments.offsets, segments.experts
    # A registered operator costs about 60 us a call, as much as the whole work at T = 8, H = 512:
    # eager tensors do without.
    if not _eager(x):
        return torch.ops.qar.expert_mlp(*args)[0]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in args[:4])):
        return _forward(*args)[0]
    # One expert for all rows: PyTorch's own autograd costs less than one written in Python does (0.22 ms
    # against 0.32 ms a training step at T = 8, H = 512, R = 16). Not where several ranks train: ZeRO-2 and
    # ZeRO-3 pack gradients in the order in which they come, and that must not depend on a rank's own rows.
    if x.shape[0] and int(segments.offsets[1]) == x.shape[0] and not dist.is_initialized():
        expert = next(_spans(segments.offsets, segments.experts, expert_gate.shape[0]))[0]
        return swiglu_mlp(x, expert_gate[expert], expert_up[expert], expert_down[expert])
    return _ExpertMLP.apply(*args)[0]


def _eager(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _spans(offsets: Tensor, experts: Tensor, num_experts: int) -> Iterator[tuple[int, int, int]]:
    """``(expert, start, end)`` of every segment that has rows."""
    bounds = offsets.tolist()
    for expert, start, end in zip(experts.tolist(), bounds[:-1], bounds[1:], strict=True):
        if expert < 0:
            return
        if expert >= num_experts:
            raise ValueError(f"seg: got expert id {expert}, expected ids below {num_experts} experts")
        yield expert, start, end


def _extent(spans: list[tuple[int, int, int]], rows: int) -> tuple[int, bool]:
    """How many sorted rows have an expert, and whether one expert owns all rows, so in their own order."""
    used = spans[-1][2] if spans else 0
    return used, len(spans) == 1 and used == rows


def _forward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, perm: Tensor, offsets: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (T, H) in row order, and the pre-activations (T, R) of gate and up in sorted order."""
    spans = list(_spans(offsets, experts, gate.shape[0]))
    used, in_order = _extent(spans, x.shape[0])
    rows = x if in_order else x.index_select(0, perm)
    gate_pre = x.new_empty(x.shape[0], gate.shape[1])
    up_pre = torch.empty_like(gate_pre)
    for expert, start, end in spans:
        torch.mm(rows[start:end], gate[expert].t(), out=gate_pre[start:end])
        torch.mm(rows[start:end], up[expert].t(), out=up_pre[start:end])
    gate_pre[used:] = 0
    up_pre[used:] = 0
    wide, inverse = _inverse_sigmoid(gate_pre)
    hidden = torch.div(wide, inverse, out=inverse).to(x.dtype).mul_(up_pre)
    # The sorted copy of x is not needed again: its memory holds the sorted output.
    out = torch.empty_like(x) if in_order else rows
    out[used:] = 0
    for expert, start, end in spans:
        torch.mm(hidden[start:end], down[expert].t(), out=out[start:end])
    return out if in_order else torch.empty_like(out).index_copy_(0, perm, out), gate_pre, up_pre


def _inverse_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``1 / sigmoid(x)``, at least in float32, whose bits do not depend on where an element lies.

    PyTorch's silu and sigmoid round the vector body and the tail of a buffer differently (by one unit in the
    last place): a row's result would change with its company. exp treats both alike, the rest is exact.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide, torch.neg(wide).exp_().add_(1)


_expert_mlp = torch.library.custom_op("qar::expert_mlp", _forward, mutates_args=())


@_expert_mlp.register_fake
def _(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, perm: Tensor, offsets: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    pre = x.new_empty(x.shape[0], gate.shape[1])
    return x.new_empty(x.shape), pre, torch.empty_like(pre)


def _grads(
    d_y: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_pre: Tensor,
    up_pre: Tensor,
    perm: Tensor,
    offsets: Tensor,
    experts: Tensor,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, up, down; those not needed come back empty (0 elements).

    With ``h = silu(a) * u`` and ``s = sigmoid(a)``: ``d_u = d_h * a * s`` and
    ``d_a = d_h * u * s * (1 + a - a * s)``.
    """
    spans = list(_spans(offsets, experts, gate.shape[0]))
    used, in_order = _extent(spans, x.shape[0])
    d_out = d_y if in_order else d_y.index_select(0, perm)
    d_hidden = torch.empty_like(gate_pre)
    d_hidden[used:] = 0
    for expert, start, end in spans:
        torch.mm(d_out[start:end], down[expert], out=d_hidden[start:end])
    sigmoid = _inverse_sigmoid(gate_pre)[1].reciprocal_().to(gate_pre.dtype)
    silu = gate_pre * sigmoid
    d_up_pre = d_hidden * silu
    d_gate_pre = d_hidden.mul_(up_pre).mul_(sigmoid * (1 + gate_pre - silu))

    d_x = x.new_empty(0)
    if needs_x:
        sorted_d_x = torch.empty_like(d_out)
        sorted_d_x[used:] = 0
        for expert, start, end in spans:
            torch.mm(d_gate_pre[start:end], gate[expert], out=sorted_d_x[start:end])
            sorted_d_x[start:end].addmm_(d_up_pre[start:end], up[expert])
        d_x = sorted_d_x if in_order else torch.empty_like(sorted_d_x).index_copy_(0, perm, sorted_d_x)
    if not needs_weights:
        return d_x, gate.new_empty(0), up.new_empty(0), down.new_empty(0)

    rows = x if in_order else x.index_select(0, perm)
    hidden = silu.mul_(up_pre)
    # With every expert present there is nothing to clear: filling is half the cost of a small batch.
    fill = torch.empty_like if len(spans) == gate.shape[0] else torch.zeros_like
    d_gate, d_up, d_down = (fill(weight) for weight in (gate, up, down))
    for expert, start, end in spans:
        torch.mm(d_gate_pre[start:end].t(), rows[start:end], out=d_gate[expert])
        torch.mm(d_up_pre[start:end].t(), rows[start:end], out=d_up[expert])
        torch.mm(d_out[start:end].t(), hidden[start:end], out=d_down[expert])
    return d_x, d_gate, d_up, d_down


_expert_mlp_backward = torch.library.custom_op("qar::expert_mlp_backward", _grads, mutates_args=())


@_expert_mlp_backward.register_fake
def _(
    d_y: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_pre: Tensor,
    up_pre: Tensor,
    perm: Tensor,
    offsets: Tensor,
    experts: Tensor,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x = torch.empty_like(d_y) if needs_x else x.new_empty(0)
    if not needs_weights:
        return d_x, gate.new_empty(0), up.new_empty(0), down.new_empty(0)
    return d_x, torch.empty_like(gate), torch.empty_like(up), torch.empty_like(down)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, gate, up, down, perm, offsets, experts = inputs
    _, gate_pre, up_pre = output
    ctx.mark_non_differentiable(gate_pre, up_pre)
    ctx.save_for_backward(x, gate, up, down, gate_pre, up_pre, perm, offsets, experts)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, d_y: Tensor, _d_gate_pre: Tensor, _d_up_pre: Tensor
) -> tuple:
    needs_x, *needs_weight = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors
    grads = _grads if _eager(d_y) else torch.ops.qar.expert_mlp_backward
    d_x, *d_weights = grads(d_y.contiguous(), *saved, needs_x, any(needs_weight))
    kept = [grad if needed else None for grad, needed in zip(d_weights, needs_weight, strict=True)]
    return d_x if needs_x else None, *kept, None, None, None


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)


class _ExpertMLP(torch.autograd.Function):
    """The same operation for eager tensors."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(torch.autograd.function.once_differentiable(_backward))
