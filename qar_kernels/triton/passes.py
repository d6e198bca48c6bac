"""The forward and the backward pass as plain functions: which launches run, and what PyTorch runs between.

T rows, S rows that have experts, H hidden, I intermediate, R rank, E experts. One function each serves the
three towers; what a tower lacks is None as an input and empty as an output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from qar_kernels.tile_plan import TilePlan
from qar_kernels.triton import launch
from qar_kernels.triton.configs import CONFIGS
from qar_kernels.triton.launch import Call, Hidden
from qar_kernels.triton.lora import LoraOperands, operand_grads
from qar_kernels.triton.operands import Constants, Operands
from qar_kernels.weights import SwiGLUWeights


class Needs(NamedTuple):
    """Which gradients are asked for. Operators take it flat, as a list of flags in this order."""

    x: bool
    base: bool
    x_expert: bool
    experts: bool
    lora: list[bool]  # of each operand that can have a gradient; empty without adapters

    @classmethod
    def unpack(cls, flags: Sequence[bool]) -> Needs:
        """From the flat list."""
        return cls(*flags[:4], list(flags[4:]))


def forward(operands: Operands, constants: Constants, save: bool) -> tuple[Tensor, ...]:
    """Outputs of the base rows and of the expert rows; the pre-activations of both where ``save``."""
    call = _call(operands, constants)
    rows, expert_rows = row_sets(call.tower, operands.x, operands.x_expert)
    hidden, expert_hidden = launch.gate_up(call, rows, expert_rows, save)
    low = hidden.dropped_h @ call.lora.down_a.t() if operands.lora else None
    y, expert_y = launch.down(call, hidden.h, expert_hidden.h, rows, operands.base_y, low)
    return y, expert_y, hidden.a, hidden.u, expert_hidden.a, expert_hidden.u


def backward(
    operands: Operands,
    constants: Constants,
    pre: Sequence[Tensor],
    d_y: Tensor | None,
    d_y_expert: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, the base weights, x_expert, the expert weights and the adapters' operands.

    Unneeded ones are empty. ``pre`` are the pre-activations that the forward pass returned; empty ones are
    computed again. Nothing that was saved is written to, so a retained graph can be walked again.
    """
    needed = Needs.unpack(needs)
    call = _call(operands, constants)
    rows, expert_rows = row_sets(call.tower, operands.x, operands.x_expert)
    d_rows, d_expert_rows = row_sets(call.tower, d_y, d_y_expert)
    hidden, expert_hidden = _pre_activations(call, rows, expert_rows, pre)
    if not (needed.x or needed.base or any(needed.lora)):
        call = call.only_experts()
    adapted = len(operands.lora) > 0
    d_low = d_rows @ call.lora.down_b if adapted and call.tower != "expert" else None
    keep_h = needed.base or (any(needed.lora[4:]) and not call.lora.drops)
    d_base, d_expert = launch.d_hidden(call, d_rows, d_expert_rows, hidden, expert_hidden, keep_h, d_low)

    none = rows.new_empty(0)
    d_x, d_x_expert = _input_grads(call, needed, d_base, d_expert, rows)
    d_weights, d_experts, d_lora = [none] * len(operands.base), [none] * len(operands.experts), []
    if needed.base:
        d_weights = _base_weight_grads(constants.tower, rows, d_rows, operands.perm, d_base)
    if needed.experts:
        d_experts = launch.expert_weight_grads(call, expert_rows, d_expert_rows, d_expert)
    if adapted:
        d_pre = d_base.a, d_base.u, d_base.dropped_h
        d_lora = operand_grads(call.lora, needed.lora, d_rows, d_low, *d_pre, *_row_orders(call))
    return [_own(grad) for grad in (d_x, *d_weights, d_x_expert, *d_experts, *d_lora)]


def _call(operands: Operands, constants: Constants) -> Call:
    experts = SwiGLUWeights(*operands.experts)
    base = SwiGLUWeights(*operands.base) if operands.base else experts
    lora = LoraOperands(*operands.lora) if operands.lora else LoraOperands.none(experts.gate)
    plan, config = TilePlan(*operands.plan), CONFIGS[constants.config]
    return Call(constants.tower, base, experts, operands.perm, plan, constants.scale, config, lora)


def row_sets(tower: str, rows: Tensor | None, expert_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Base rows and expert rows; if a tower has only one of them, it stands in for both."""
    first = expert_rows if tower == "expert" else rows
    second = rows if tower == "fused" else expert_rows
    return first, second


def _pre_activations(
    call: Call, rows: Tensor, expert_rows: Tensor, pre: Sequence[Tensor]
) -> tuple[Hidden, Hidden]:
    a, u, expert_a, expert_u = pre
    if expert_a.shape[0] == 0:
        return launch.gate_up(call, rows, expert_rows, save=True)
    return Hidden(a, u, u), Hidden(expert_a, expert_u, expert_u)


def _input_grads(
    call: Call, needed: Needs, d_base: Hidden, d_expert: Hidden, rows: Tensor
) -> tuple[Tensor, Tensor]:
    none = rows.new_empty(0)
    if not (needed.x or needed.x_expert):
        return none, none
    d_x, d_x_expert = launch.d_input(call if needed.x else call.only_experts(), d_base, d_expert, rows)
    return d_x if needed.x else none, d_x_expert if needed.x_expert else none


def _base_weight_grads(tower: str, x: Tensor, d_y: Tensor, perm: Tensor, d_base: Hidden) -> SwiGLUWeights:
    """Plain GEMMs over all rows, in the order that ``d_base`` has: the vendor library's best case."""
    if tower == "fused":
        x, d_y = x.index_select(0, perm), d_y.index_select(0, perm)
    return SwiGLUWeights(d_base.a.t() @ x, d_base.u.t() @ x, d_y.t() @ d_base.h)


def _row_orders(call: Call) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From the batch's order of rows to the hidden units', and back."""
    if call.tower != "fused":
        return (lambda rows: rows), (lambda rows: rows)
    inverse = call.plan.inverse_perm
    return (lambda rows: rows.index_select(0, call.perm)), (lambda rows: rows.index_select(0, inverse))


def _own(grad: Tensor) -> Tensor:
    """Outputs of an operator may not share memory: an empty one is copied."""
    return grad if grad.numel() else grad.clone()
