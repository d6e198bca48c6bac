"""Segmented experts in plain PyTorch: what ``auto`` runs on a CPU.

T rows, H hidden, R expert rank, E experts. Rows are sorted by expert once, and every segment runs dense
matrix products. Small experts of equally long segments share batched products, for which their weights are
copied once a segment (never once a row); large ones are read in place. Absent experts are never touched.

With one thread a segment's bits depend on its own rows alone; more threads may cut a product, or a buffer,
according to its company.

Registered as custom operators because the loop over segments reads the segment bounds on the host:
``torch.compile`` then sees one opaque node instead of a graph break.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qar_kernels.lora import NO_LORA, LoRA, project
from qar_kernels.row_groups import Group, RowGroups, group_rows
from qar_kernels.segments import Segments

# Measured on one core: up to here a copy of an expert costs less than the calls that batched products save.
_COPY_BYTES = 64 * 2**10
# Elements in two of the widest vector registers, at the least element size.
_VECTORS = 64
# Copies of a group stay in a core's second-level cache.
_CACHE_BYTES = 2**20


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, lora: LoRA = NO_LORA) -> Tensor:
    """The base MLP: ``x`` (T, H), ``gate``/``up`` (I, H), ``down`` (H, I) -> (T, H)."""
    hidden = F.silu(project(x, gate, lora.gate)) * project(x, up, lora.up)
    return project(hidden, down, lora.down)


def expert_mlp(
    x: Tensor, expert_gate: Tensor, expert_up: Tensor, expert_down: Tensor, segments: Segments
) -> Tensor:
    """Row ``t`` through its own expert; rows without one give zeros. ``x`` (T, H) -> (T, H)."""
    weights = expert_gate, expert_up, expert_down
    # A registered operator costs about 60 us a call, as much as the whole work at T = 8, H = 512:
    # eager tensors do without.
    if not _eager(x):
        return torch.ops.qar.expert_mlp(x, *weights, segments.perm, segments.offsets, segments.experts)[0]
    rows = segments.row_groups(_most_together(expert_gate))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return _ExpertMLP.apply(x, *weights, rows)
    return _forward(x, *weights, rows)[0]


def _eager(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _most_together(weight: Tensor) -> int:
    """How many experts' weights ``(E, R, H)`` may be copied to share a batched product."""
    each = weight.shape[1] * weight.shape[2] * weight.element_size()
    return _CACHE_BYTES // each if 0 < each <= _COPY_BYTES else 1


def _forward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, rows: RowGroups
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (T, H) in row order, and the pre-activations of gate and up in grouped order, padded."""
    _check_ids(rows, gate)
    sorted_x = _grouped(x, rows)
    size = x.shape[0], gate.shape[1]
    gate_pre, up_pre = _padded(x, *size), _padded(x, *size)
    gate_rows, up_rows = _rows(gate_pre, *size), _rows(up_pre, *size)
    for group in rows.groups:
        part = _batched(sorted_x, group)
        torch.bmm(part, _weights(gate, group).mT, out=_batched(gate_rows, group))
        torch.bmm(part, _weights(up, group).mT, out=_batched(up_rows, group))
    _clear_from(rows.used * size[1], gate_pre, up_pre)
    hidden = _rows(F.silu(gate_pre).mul_(up_pre), *size)
    # The sorted copy of x is not needed again: its memory holds the sorted output.
    out = torch.empty_like(x) if sorted_x is x else sorted_x
    for group in rows.groups:
        torch.bmm(_batched(hidden, group), _weights(down, group).mT, out=_batched(out, group))
    _clear_from(rows.used, out)
    return _in_row_order(out, rows), gate_pre, up_pre


def _check_ids(rows: RowGroups, weight: Tensor) -> None:
    if rows.max_id >= weight.shape[0]:
        raise ValueError(f"seg: got expert id {rows.max_id}, expected ids below {weight.shape[0]} experts")


def _grouped(tensor: Tensor, rows: RowGroups) -> Tensor:
    return tensor if rows.order is None else tensor.index_select(0, rows.order)


def _in_row_order(tensor: Tensor, rows: RowGroups) -> Tensor:
    return tensor if rows.order is None else torch.empty_like(tensor).index_copy_(0, rows.order, tensor)


def _batched(tensor: Tensor, group: Group) -> Tensor:
    """The group's rows of ``(T, width)`` as ``(count, length, width)``."""
    rows, width = tensor.shape
    if group.stop - group.start < rows:
        tensor = tensor[group.start : group.stop]
    return tensor.view(group.count, -1, width)


def _weights(weight: Tensor, group: Group) -> Tensor:
    """The group's experts: a view where they are neighbours, else a copy."""
    if isinstance(group.experts, slice):
        return weight[group.experts]
    return weight.index_select(0, group.experts)


def _padded(like: Tensor, count: int, width: int) -> Tensor:
    """Room for ``(count, width)`` numbers, flat, in whole vectors.

    PyTorch's silu rounds the vectors of a buffer and the rest behind them differently (by one unit in the
    last place): without a rest a row's result does not change with its place, and so not with its company.
    """
    return like.new_empty(-(-count * width // _VECTORS) * _VECTORS)


def _rows(padded: Tensor, count: int, width: int) -> Tensor:
    """The ``(count, width)`` numbers in what :func:`_padded` made."""
    return padded[: count * width].view(count, width)


def _clear_from(start: int, *tensors: Tensor) -> None:
    for tensor in tensors:
        if start < tensor.shape[0]:
            tensor[start:] = 0


@torch.library.custom_op("qar::expert_mlp", mutates_args=())
def _expert_mlp(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, perm: Tensor, offsets: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, gate, up, down, group_rows(perm, offsets, experts, _most_together(gate)))


@_expert_mlp.register_fake
def _(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, perm: Tensor, offsets: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    pre = _padded(x, x.shape[0], gate.shape[1])
    return torch.empty_like(x), pre, torch.empty_like(pre)


def _grads(
    d_y: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_pre: Tensor,
    up_pre: Tensor,
    rows: RowGroups,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, up, down; those not needed come back empty (0 elements).

    With ``h = silu(a) * u``: ``d_u = d_h * silu(a)`` and ``d_a = d_h * u * silu'(a)``.
    """
    size = x.shape[0], gate.shape[1]
    d_out = _grouped(d_y, rows)
    d_hidden = _padded(x, *size)
    d_hidden_rows = _rows(d_hidden, *size)
    for group in rows.groups:
        torch.bmm(_batched(d_out, group), _weights(down, group), out=_batched(d_hidden_rows, group))
    _clear_from(rows.used * size[1], d_hidden)
    silu = F.silu(gate_pre)
    d_up_pre = _rows(d_hidden * silu, *size)
    d_gate_pre = _rows(torch.ops.aten.silu_backward(d_hidden.mul_(up_pre), gate_pre), *size)

    d_x = x.new_empty(0)
    if needs_x:
        sorted_d_x = torch.empty_like(d_out)
        for group in rows.groups:
            part = _batched(sorted_d_x, group)
            torch.bmm(_batched(d_gate_pre, group), _weights(gate, group), out=part)
            part.baddbmm_(_batched(d_up_pre, group), _weights(up, group))
        _clear_from(rows.used, sorted_d_x)
        d_x = _in_row_order(sorted_d_x, rows)
    if not needs_weights:
        return d_x, gate.new_empty(0), up.new_empty(0), down.new_empty(0)

    sorted_x = _grouped(x, rows)
    hidden = _rows(silu.mul_(up_pre), *size)
    # With every expert present there is nothing to clear: filling is half the cost of a small batch.
    fill = torch.empty_like if rows.present == gate.shape[0] else torch.zeros_like
    d_gate, d_up, d_down = (fill(weight) for weight in (gate, up, down))
    for group in rows.groups:
        part = _batched(sorted_x, group)
        _product_into(d_gate, group, _batched(d_gate_pre, group).mT, part)
        _product_into(d_up, group, _batched(d_up_pre, group).mT, part)
        _product_into(d_down, group, _batched(d_out, group).mT, _batched(hidden, group))
    return d_x, d_gate, d_up, d_down


def _product_into(grad: Tensor, group: Group, left: Tensor, right: Tensor) -> None:
    if isinstance(group.experts, slice):
        torch.bmm(left, right, out=grad[group.experts])
    else:
        grad.index_copy_(0, group.experts, torch.bmm(left, right))


@torch.library.custom_op("qar::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
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
    rows = group_rows(perm, offsets, experts, _most_together(gate))
    return _grads(d_y, x, gate, up, down, gate_pre, up_pre, rows, needs_x, needs_weights)


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
    x, gate, up, down, *segments = inputs
    _, gate_pre, up_pre = output
    ctx.save_for_backward(x, gate, up, down, gate_pre, up_pre, *segments)


def _backward(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor, *_unused: Tensor) -> tuple:
    needs_x, *needs_weight = ctx.needs_input_grad[:4]
    grads = torch.ops.qar.expert_mlp_backward(
        d_y.contiguous(), *ctx.saved_tensors, needs_x, any(needs_weight)
    )
    return *_wanted(grads, ctx.needs_input_grad), None, None, None


def _wanted(grads: tuple[Tensor, ...], needed: tuple[bool, ...]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needed[:4], strict=True)]


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)


class _ExpertMLP(torch.autograd.Function):
    """The same operation for eager tensors, on groups that all layers share."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        rows: RowGroups,
    ) -> Tensor:
        y, gate_pre, up_pre = _forward(x, gate, up, down, rows)
        ctx.save_for_backward(x, gate, up, down, gate_pre, up_pre)
        ctx.rows = rows
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor) -> tuple:
        needs_x, *needs_weight = ctx.needs_input_grad[:4]
        grads = _grads(d_y.contiguous(), *ctx.saved_tensors, ctx.rows, needs_x, any(needs_weight))
        return *_wanted(grads, ctx.needs_input_grad), None
