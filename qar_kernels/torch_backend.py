"""Segmented experts in plain PyTorch: what ``auto`` runs on a CPU.

T rows, H hidden, I intermediate, R expert rank, E experts. Rows are grouped by expert once per batch, and
every segment runs dense matrix products (:mod:`qar_kernels.row_products`).

With one thread, and R and H multiples of 8, a segment's bits depend on its own rows alone; with more threads,
how a product or a buffer is split may depend on the rest of the batch.

Registered as custom operators because the loop over segments reads the rows' experts on the host:
``torch.compile`` then sees one opaque node instead of a graph break.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qar_kernels import autocast
from qar_kernels.autograd import refuse_second_order
from qar_kernels.lora import NO_LORA, LoRA, project
from qar_kernels.row_products import Products, make_products
from qar_kernels.segments import Segments
from qar_kernels.silu import silu, silu_backward

_PLAIN = (Tensor, torch.nn.Parameter)
_no_view = torch.ops.aten._unsafe_view.default


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, lora: LoRA = NO_LORA) -> Tensor:
    """The base MLP: ``x`` (T, H), ``gate``/``up`` (I, H), ``down`` (H, I) -> (T, H)."""
    hidden = F.silu(project(x, gate, lora.gate)) * project(x, up, lora.up)
    return project(hidden, down, lora.down)


def add_scaled(y: Tensor, x: Tensor, scale: float) -> Tensor:
    """``y + scale * x``, in one pass where PyTorch can be trusted with it.

    Inductor (seen in PyTorch 2.13) drops ``alpha`` where ``y`` or ``x`` comes out of a matrix product.
    """
    return y + scale * x if torch.compiler.is_compiling() else torch.add(y, x, alpha=scale)


def expert_mlp(
    x: Tensor,
    expert_gate: Tensor,
    expert_up: Tensor,
    expert_down: Tensor,
    segments: Segments,
    sparse_gradients: bool = False,
) -> Tensor:
    """Row ``t`` through its own expert; rows without one give zeros. ``x`` (T, H) -> (T, H).

    ``sparse_gradients``: row-sparse gradients of the experts; only if :func:`is_eager`.
    """
    weights = expert_gate, expert_up, expert_down
    # A registered operator costs about 60 us a call, as much as the whole work at T = 8, H = 512:
    # eager tensors do without.
    if not is_eager(x):
        return torch.ops.qar.expert_mlp(x, *weights, segments.row_expert)[0]
    products = products_of(segments, expert_gate)
    if torch.is_grad_enabled() and _need_gradients(x, *weights):
        return _ExpertMLP.apply(x, *weights, products, sparse_gradients)
    return _forward(x, *map(products.select_weights, weights), products)[0]


def products_of(segments: Segments, weight: Tensor) -> Products:
    """The products of a batch with experts of the shape of ``weight`` (E, R, H).

    Its groups are read on the host once per batch, see :meth:`Segments.memo`.
    """
    return segments.memo((weight.shape, weight.dtype), lambda: make_products(segments.row_expert, weight))


def _need_gradients(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> bool:
    return x.requires_grad or gate.requires_grad or up.requires_grad or down.requires_grad


def is_eager(tensor: Tensor) -> bool:
    """Whether the registered operator can be bypassed: a plain tensor with data, outside a trace."""
    return type(tensor) in _PLAIN and not tensor.is_meta and not torch.compiler.is_compiling()


def _forward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, products: Products
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (T, H) in the batch's order; pre-activations of gate and up as the products' rows."""
    x = products.to_grouped(x)
    gate_pre, up_pre = products.linear(x, gate), products.linear(x, up)
    y = products.linear(silu(gate_pre).mul_(up_pre), down)
    return products.to_batch_order(y), gate_pre, up_pre


@torch.library.custom_op("qar::expert_mlp", mutates_args=())
def _expert_mlp(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, row_expert: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    products = make_products(row_expert, gate)
    y, *pre = _forward(x, *map(products.select_weights, (gate, up, down)), products)
    return y, *(rows.view(x.shape[0], gate.shape[1]) for rows in pre)


@_expert_mlp.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, row_expert: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    products: Products,
    shapes: tuple[torch.Size, torch.Size],
    needs_x: bool,
    needs_weights: bool,
    sparse: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate, up, down; None for x, and for all three weights, where not needed.

    ``shapes`` are gate's and down's; the weights themselves are as the products take them. With
    ``h = silu(a) * u``: ``d_u = d_h * silu(a)`` and ``d_a = d_h * u * silu'(a)``.
    """
    if autocast.is_on(d_y):  # the forward pass has cast all of it already, or has not run under autocast
        with torch.autocast(d_y.device.type, enabled=False):
            return _grads(
                d_y, x, gate, up, down, gate_pre, up_pre, products, shapes, needs_x, needs_weights, sparse
            )
    d_out = products.to_grouped(d_y)
    d_hidden = products.linear_backward(d_out, down)
    activated = silu(gate_pre)
    d_up_pre, d_gate_pre = d_hidden * activated, silu_backward(d_hidden.mul_(up_pre), gate_pre)

    d_x = None
    if needs_x:
        d_x = products.linear_backward(d_up_pre, up, add_to=products.linear_backward(d_gate_pre, gate))
        d_x = products.to_batch_order(d_x)
    if not needs_weights:
        return d_x, None, None, None
    rows, hidden = products.to_grouped(x), activated.mul_(up_pre)
    return (
        d_x,
        products.weight_gradient(d_gate_pre, rows, shapes[0], sparse),
        products.weight_gradient(d_up_pre, rows, shapes[0], sparse),
        products.weight_gradient(d_out, hidden, shapes[1], sparse),
    )


@torch.library.custom_op("qar::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    d_y: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_pre: Tensor,
    up_pre: Tensor,
    row_expert: Tensor,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    products = make_products(row_expert, gate)
    taken, pre = map(products.select_weights, (gate, up, down)), map(products.as_grouped, (gate_pre, up_pre))
    grads = _grads(d_y, x, *taken, *pre, products, (gate.shape, down.shape), needs_x, needs_weights)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@_expert_mlp_backward.register_fake
def _(
    d_y: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_pre: Tensor,
    up_pre: Tensor,
    row_expert: Tensor,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x = d_y.new_empty(d_y.shape) if needs_x else x.new_empty(0)
    if not needs_weights:
        return d_x, gate.new_empty(0), up.new_empty(0), down.new_empty(0)
    return d_x, *(weight.new_empty(weight.shape) for weight in (gate, up, down))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, gate, up, down, row_expert = inputs
    _, gate_pre, up_pre = output
    ctx.mark_non_differentiable(gate_pre, up_pre)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate, up, down, gate_pre, up_pre, row_expert)


def _backward(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor, *_unused: Tensor) -> tuple:
    needs_x, *needs_weight = ctx.needs_input_grad[:4]
    grads = torch.ops.qar.expert_mlp_backward(
        d_y.contiguous(), *ctx.saved_tensors, needs_x, any(needs_weight)
    )
    wanted = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:4], strict=True))
    return *wanted, None


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
        products: Products,
        sparse_gradients: bool,
    ) -> Tensor:
        taken = [products.select_weights(weight) for weight in (gate, up, down)]
        y, *pre = _forward(x, *taken, products)
        ctx.save_for_backward(x, *taken, *pre)
        ctx.products, ctx.shapes, ctx.sparse = products, (gate.shape, down.shape), sparse_gradients
        # autograd forbids changing a view that was made in here in place
        return _no_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor) -> tuple:
        refuse_second_order("backend 'torch'")
        needs_x, gate, up, down, *_ = ctx.needs_input_grad
        needs = needs_x, gate or up or down
        saved, constants = ctx.saved_tensors, (ctx.products, ctx.shapes)
        return *_grads(d_y.contiguous(), *saved, *constants, *needs, ctx.sparse), None, None
