"""The registered operators: what autograd, ``torch.compile`` and export see of the kernels.

T rows, S rows that have experts, H hidden, I intermediate, R rank, E experts. One forward and one
backward operator serve the three towers; what a tower does not have is None on the way in and has no
elements on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qar_kernels.tile_plan import TilePlan
from qar_kernels.triton import launch
from qar_kernels.triton.configs import CONFIGS
from qar_kernels.triton.launch import Call, Hidden, Weights
from qar_kernels.triton.lora import NUM_ADAPTER_TENSORS, LoraOperands, operand_grads

_NUM_WEIGHTS = 3


@torch.library.custom_op("qar::swiglu_experts", mutates_args=())
def swiglu_experts(
    tower: str,
    x: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    x_expert: Tensor | None,
    expert_gate: Tensor,
    expert_up: Tensor,
    expert_down: Tensor,
    base_y: Tensor | None,
    perm: Tensor,
    plan: Sequence[Tensor],
    lora: Sequence[Tensor],
    scale: float,
    config: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the base rows and of the expert rows; the pre-activations of both where ``save``.

    ``base_y`` (expert tower only) is added to the expert rows' output. ``lora`` is empty, or the tensors of
    :class:`LoraOperands`.
    """
    base_weights, experts = (gate, up, down), (expert_gate, expert_up, expert_down)
    call = _call(tower, base_weights, experts, perm, plan, lora, scale, config)
    rows, expert_rows = _row_sets(tower, x, x_expert)
    base, expert = launch.gate_up(call, rows, expert_rows, save)
    low = base.seen_h @ call.lora.down_a.t() if lora else None
    y, expert_y = launch.down(call, base.h, expert.h, rows, base_y, low)
    return y, expert_y, base.a, base.u, expert.a, expert.u


@swiglu_experts.register_fake
def _(
    tower: str,
    x: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    x_expert: Tensor | None,
    expert_gate: Tensor,
    expert_up: Tensor,
    expert_down: Tensor,
    base_y: Tensor | None,
    perm: Tensor,
    plan: Sequence[Tensor],
    lora: Sequence[Tensor],
    scale: float,
    config: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, expert_rows = _row_sets(tower, x, x_expert)
    hidden = rows.shape[1]
    base_rows = 0 if tower == "expert" else rows.shape[0]
    inter = 16 if gate is None else gate.shape[0]
    saved, saved_expert = (base_rows, expert_rows.shape[0]) if save else (0, 0)
    a = rows.new_empty(saved, inter)
    expert_a = rows.new_empty(saved_expert, expert_gate.shape[1])
    y = rows.new_empty(base_rows, hidden)
    expert_y = rows.new_empty(0 if tower == "fused" else expert_rows.shape[0], hidden)
    return y, expert_y, a, torch.empty_like(a), expert_a, torch.empty_like(expert_a)


@torch.library.custom_op("qar::swiglu_experts_backward", mutates_args=())
def swiglu_experts_backward(
    tower: str,
    d_y: Tensor | None,
    d_y_expert: Tensor | None,
    x: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    x_expert: Tensor | None,
    expert_gate: Tensor,
    expert_up: Tensor,
    expert_down: Tensor,
    a: Tensor,
    u: Tensor,
    expert_a: Tensor,
    expert_u: Tensor,
    perm: Tensor,
    plan: Sequence[Tensor],
    lora: Sequence[Tensor],
    scale: float,
    config: str,
    needs_x: bool,
    needs_base: bool,
    needs_x_expert: bool,
    needs_experts: bool,
    needs_lora: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, gate, up, down, x_expert, the three expert weights and the adapters' operands.

    Unneeded ones are empty.

    Empty pre-activations are recomputed. Nothing that was saved is written to, so a retained graph can
    be walked again.
    """
    base_weights, experts = (gate, up, down), (expert_gate, expert_up, expert_down)
    call = _call(tower, base_weights, experts, perm, plan, lora, scale, config)
    rows, expert_rows = _row_sets(tower, x, x_expert)
    d_rows, d_expert_rows = _row_sets(tower, d_y, d_y_expert)
    base, expert = Hidden(a, u, u), Hidden(expert_a, expert_u, expert_u)
    if expert_a.shape[0] == 0:
        base, expert = launch.gate_up(call, rows, expert_rows, save=True)
    if not (needs_x or needs_base or any(needs_lora)):
        call = call.only_experts()
    d_low = d_rows @ call.lora.down_b if lora and call.tower != "expert" else None
    keep_h = needs_base or (any(needs_lora[4:]) and not call.lora.drops)
    d_base, d_expert = launch.d_hidden(call, d_rows, d_expert_rows, base, expert, keep_h, d_low)

    none = rows.new_empty(0)
    d_x, d_x_expert = none, none
    if needs_x or needs_x_expert:
        d_x, d_x_expert = launch.d_input(call if needs_x else call.only_experts(), d_base, d_expert, rows)
    d_weights = Weights(none, none, none)
    if needs_base:
        d_weights = _base_weight_grads(tower, rows, d_rows, perm, d_base)
    d_experts = Weights(none, none, none)
    if needs_experts:
        d_experts = launch.expert_weight_grads(call, expert_rows, d_expert_rows, d_expert)
    d_x = d_x if needs_x else none
    d_x_expert = d_x_expert if needs_x_expert else none
    d_lora = []
    if any(needs_lora):
        reorder = _row_orders(call)
        d_lora = operand_grads(
            call.lora, needs_lora, d_rows, d_low, d_base.a, d_base.u, d_base.seen_h, *reorder
        )
    return [_own(grad) for grad in (d_x, *d_weights, d_x_expert, *d_experts, *d_lora)]


@swiglu_experts_backward.register_fake
def _(
    tower: str,
    d_y: Tensor | None,
    d_y_expert: Tensor | None,
    x: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    x_expert: Tensor | None,
    expert_gate: Tensor,
    expert_up: Tensor,
    expert_down: Tensor,
    a: Tensor,
    u: Tensor,
    expert_a: Tensor,
    expert_u: Tensor,
    perm: Tensor,
    plan: Sequence[Tensor],
    lora: Sequence[Tensor],
    scale: float,
    config: str,
    needs_x: bool,
    needs_base: bool,
    needs_x_expert: bool,
    needs_experts: bool,
    needs_lora: Sequence[bool],
) -> list[Tensor]:
    base = [(x, needs_x), (gate, needs_base), (up, needs_base), (down, needs_base)]
    experts = [(weight, needs_experts) for weight in (expert_gate, expert_up, expert_down)]
    adapters = zip(lora, needs_lora, strict=False) if any(needs_lora) else ()
    return [
        expert_gate.new_empty(t.shape if needed and t is not None else 0)
        for t, needed in [*base, (x_expert, needs_x_expert), *experts, *adapters]
    ]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    tower, *tensors, _base_y, perm, plan, lora, scale, config, _save = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:], perm, *plan, *lora)
    ctx.num_tensors, ctx.num_plan = len(tensors), len(plan)
    ctx.constants = tower, scale, config


def _backward(ctx: torch.autograd.function.FunctionCtx, *d_outputs: Tensor) -> tuple:
    tower, scale, config = ctx.constants
    saved = ctx.saved_tensors
    tensors, pre = saved[: ctx.num_tensors], saved[ctx.num_tensors : ctx.num_tensors + 4]
    perm, *rest = saved[ctx.num_tensors + 4 :]
    plan, lora = rest[: ctx.num_plan], rest[ctx.num_plan :]
    needs = ctx.needs_input_grad[1 : 1 + ctx.num_tensors]
    needs_lora = list(ctx.needs_input_grad[4 + ctx.num_tensors])[:NUM_ADAPTER_TENSORS]
    d_y, d_y_expert = (grad.contiguous() for grad in d_outputs[:2])
    grads = swiglu_experts_backward(
        tower,
        d_y if tower != "expert" else None,
        d_y_expert if tower != "fused" else None,
        *tensors, *pre, perm, plan, lora, scale, config,
        needs[0], any(needs[1:4]), needs[4], any(needs[5:]), needs_lora,
    )  # fmt: skip
    kept = [grad if needed else None for grad, needed in zip(grads, needs, strict=False)]
    d_lora = [None] * len(lora)
    if any(needs_lora):
        kept_lora = zip(grads[ctx.num_tensors :], needs_lora, strict=True)
        d_lora[:NUM_ADAPTER_TENSORS] = [grad if needed else None for grad, needed in kept_lora]
    d_base_y = d_y_expert if ctx.needs_input_grad[1 + ctx.num_tensors] else None
    return None, *kept, d_base_y, None, [None] * len(plan), d_lora, None, None, None


swiglu_experts.register_autograd(_backward, setup_context=_setup_context)


def _call(
    tower: str,
    base: tuple[Tensor | None, ...],
    experts: tuple[Tensor, ...],
    perm: Tensor,
    plan: Sequence[Tensor],
    lora: Sequence[Tensor],
    scale: float,
    config: str,
) -> Call:
    expert_weights = Weights(*experts)
    base_weights = expert_weights if tower == "expert" else Weights(*base)
    operands = LoraOperands(*lora) if lora else LoraOperands.none(expert_weights.gate)
    return Call(tower, base_weights, expert_weights, perm, TilePlan(*plan), scale, CONFIGS[config], operands)


def _row_sets(tower: str, rows: Tensor | None, expert_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Base rows and expert rows; where a tower has one set it stands in for both."""
    first = expert_rows if tower == "expert" else rows
    second = rows if tower == "fused" else expert_rows
    return first, second


def _base_weight_grads(tower: str, x: Tensor, d_y: Tensor, perm: Tensor, d_base: Hidden) -> Weights:
    """Plain GEMMs over all rows, in the order that ``d_base`` has: the vendor library's best case."""
    if tower == "fused":
        x, d_y = x.index_select(0, perm), d_y.index_select(0, perm)
    return Weights(d_base.a.t() @ x, d_base.u.t() @ x, d_y.t() @ d_base.h)


def _row_orders(call: Call) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From the batch's order of rows to the hidden units', and back."""
    if call.tower != "fused":
        return (lambda rows: rows), (lambda rows: rows)
    return (lambda rows: rows.index_select(0, call.perm)), (lambda rows: rows.index_select(0, call.plan.rank))


def _own(grad: Tensor) -> Tensor:
    """Outputs of an operator may not share memory: an empty one is copied."""
    return grad if grad.numel() else grad.clone()
