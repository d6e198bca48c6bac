"""The passes as autograd, ``torch.compile`` and export see them.

T rows, S rows that have experts, H hidden, I intermediate, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qar_kernels.autograd import refuse_second_order
from qar_kernels.triton.lora import NUM_ADAPTER_TENSORS
from qar_kernels.triton.operands import Constants, Operands, split_arguments
from qar_kernels.triton.passes import Needs, backward, forward, row_sets

_PLAIN = (Tensor, torch.nn.Parameter)

_OPERANDS = (
    "Tensor? x, Tensor[] base, Tensor? x_expert, Tensor[] experts, Tensor? base_y, Tensor perm, "
    "Tensor[] plan, Tensor[] lora, str tower, float scale, str config"
)
_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op(
    "qar::swiglu_experts", mutates_args=(), schema=f"({_OPERANDS}, bool save) -> {_OUTPUTS}"
)
def swiglu_experts(*arguments: Any) -> tuple[Tensor, ...]:
    """:func:`qar_kernels.triton.passes.forward`."""
    operands, constants, rest = split_arguments(arguments)
    return forward(operands, constants, *rest)


@swiglu_experts.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    operands, (tower, *_), (save,) = split_arguments(arguments)
    rows, expert_rows = row_sets(tower, operands.x, operands.x_expert)
    hidden = rows.shape[1]
    base_rows = 0 if tower == "expert" else rows.shape[0]
    inter = operands.base[0].shape[0] if operands.base else 16
    saved, saved_expert = (base_rows, expert_rows.shape[0]) if save else (0, 0)
    a = rows.new_empty(saved, inter)
    expert_a = rows.new_empty(saved_expert, operands.experts[0].shape[1])
    y = rows.new_empty(base_rows, hidden)
    expert_y = rows.new_empty(0 if tower == "fused" else expert_rows.shape[0], hidden)
    return y, expert_y, a, torch.empty_like(a), expert_a, torch.empty_like(expert_a)


@torch.library.custom_op(
    "qar::swiglu_experts_backward",
    mutates_args=(),
    schema=f"({_OPERANDS}, Tensor[] pre, Tensor? d_y, Tensor? d_y_expert, bool[] needs) -> Tensor[]",
)
def swiglu_experts_backward(*arguments: Any) -> list[Tensor]:
    """:func:`qar_kernels.triton.passes.backward`."""
    operands, constants, rest = split_arguments(arguments)
    return backward(operands, constants, *rest)


@swiglu_experts_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    operands, _, (*_, needs) = split_arguments(arguments)
    needed = Needs.unpack(needs)
    asked = (
        (operands.x, needed.x),
        *((weight, needed.base) for weight in operands.base),
        (operands.x_expert, needed.x_expert),
        *((weight, needed.experts) for weight in operands.experts),
        *zip(operands.lora, needed.lora, strict=False),  # the mask has no flag
    )
    return [operands.experts[0].new_empty(tensor.shape if wanted else 0) for tensor, wanted in asked]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    operands, constants, _ = split_arguments(inputs)
    ctx.mark_non_differentiable(*output[2:])
    _keep(ctx, operands, constants, output[2:])


def _backward(ctx: torch.autograd.function.FunctionCtx, *d_outputs: Tensor) -> tuple:
    wanted, constants, rest = split_arguments(ctx.needs_input_grad)
    no_gradients = [None] * (len(constants) + len(rest))
    return *_gradients(ctx, d_outputs, wanted, _registered_backward), *no_gradients


swiglu_experts.register_autograd(_backward, setup_context=_setup_context)


def run(operands: Operands, constants: Constants, recompute: bool) -> tuple[Tensor, Tensor]:
    """Outputs of the base rows and of the expert rows.

    In plain eager mode the registered operator is bypassed: it costs the host as much as two launches, and
    its autograd, which walks through its lists, as much as five more.
    """
    tensors, lengths = operands.flat()
    differentiates = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    save = differentiates and not recompute
    if needs_operator(tensors):
        return swiglu_experts(*operands, *constants, save)[:2]
    if differentiates:
        return _Passes.apply(constants, save, lengths, *tensors)
    return forward(operands, constants, save)[:2]


class _Passes(torch.autograd.Function):
    """Both passes for eager tensors, which come as :meth:`Operands.flat` gives them."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        constants: Constants,
        save: bool,
        lengths: list[int | None],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        operands = Operands.from_flat(tensors, lengths)
        y, expert_y, *pre = forward(operands, constants, save)
        _keep(ctx, operands, constants, pre)
        return y, expert_y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *d_outputs: Tensor | None) -> tuple:
        refuse_second_order("backend 'triton'")
        wanted = Operands.from_flat(ctx.needs_input_grad[3:], ctx.lengths)
        call = _registered_backward if needs_operator(d_outputs) else backward
        return None, None, None, *_gradients(ctx, d_outputs, wanted, call).flat()[0]


def needs_operator(tensors: Iterable[Tensor | None]) -> bool:
    """Whether torch.compile, a dispatch mode or a tensor subclass must see the registered operator."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return not all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)


def _registered_backward(operands: Operands, constants: Constants, *rest: Any) -> list[Tensor]:
    return swiglu_experts_backward(*operands, *constants, *rest)


def _keep(
    ctx: torch.autograd.function.FunctionCtx, operands: Operands, constants: Constants, pre: Sequence[Tensor]
) -> None:
    """Save what the gradients need: not ``base_y``, but the pre-activations."""
    tensors, ctx.lengths = operands._replace(base_y=None).flat()
    ctx.save_for_backward(*tensors, *pre)
    ctx.constants = constants
    ctx.set_materialize_grads(False)  # else autograd fills zeros of the pre-activations' size in every pass


def _gradients(
    ctx: torch.autograd.function.FunctionCtx,
    d_outputs: Sequence[Tensor | None],
    wanted: Operands,
    call: Callable[..., list[Tensor]],
) -> Operands:
    """Gradients of all operands, None where not wanted."""
    *tensors, a, u, expert_a, expert_u = ctx.saved_tensors
    operands = Operands.from_flat(tensors, ctx.lengths)
    tower = ctx.constants.tower
    d_y = None if tower == "expert" else _contiguous(d_outputs[0], operands.x)
    d_y_expert = None if tower == "fused" else _contiguous(d_outputs[1], operands.x_expert)
    adapters = list(wanted.lora)[:NUM_ADAPTER_TENSORS]
    needs = [wanted.x, any(wanted.base), wanted.x_expert, any(wanted.experts), *adapters]
    found = iter(call(operands, ctx.constants, [a, u, expert_a, expert_u], d_y, d_y_expert, needs))

    def take(wants: bool) -> Tensor | None:
        grad = next(found)
        return grad if wants else None

    d_x, d_base = take(wanted.x), [*map(take, wanted.base)]
    d_x_expert, d_experts = take(wanted.x_expert), [*map(take, wanted.experts)]
    d_lora = [*map(take, adapters), *[None] * (len(operands.lora) - len(adapters))]  # the mask has none
    d_base_y = d_y_expert if wanted.base_y else None
    return Operands(d_x, d_base, d_x_expert, d_experts, d_base_y, None, [None] * len(operands.plan), d_lora)


def _contiguous(d_y: Tensor | None, like: Tensor) -> Tensor:
    """An output's gradient; zeros for one of two outputs that nothing was made of."""
    return torch.zeros_like(like) if d_y is None else d_y.contiguous()
