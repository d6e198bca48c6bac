"""The passes as autograd, ``torch.compile`` and export see them.

T rows, S rows that have experts, H hidden, I intermediate, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from qar_kernels.autograd import refuse_second_order
from qar_kernels.triton.lora import NUM_ADAPTER_TENSORS
from qar_kernels.triton.passes import Needs, backward, forward, row_sets

_PLAIN = (Tensor, torch.nn.Parameter)

swiglu_experts = torch.library.custom_op("qar::swiglu_experts", forward, mutates_args=())


@swiglu_experts.register_fake
def _(
    tower: str,
    x: Tensor | None,
    base: Sequence[Tensor],
    x_expert: Tensor | None,
    experts: Sequence[Tensor],
    base_y: Tensor | None,
    perm: Tensor,
    plan: Sequence[Tensor],
    lora: Sequence[Tensor],
    scale: float,
    config: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, expert_rows = row_sets(tower, x, x_expert)
    hidden = rows.shape[1]
    base_rows = 0 if tower == "expert" else rows.shape[0]
    inter = base[0].shape[0] if base else 16
    saved, saved_expert = (base_rows, expert_rows.shape[0]) if save else (0, 0)
    a = rows.new_empty(saved, inter)
    expert_a = rows.new_empty(saved_expert, experts[0].shape[1])
    y = rows.new_empty(base_rows, hidden)
    expert_y = rows.new_empty(0 if tower == "fused" else expert_rows.shape[0], hidden)
    return y, expert_y, a, torch.empty_like(a), expert_a, torch.empty_like(expert_a)


swiglu_experts_backward = torch.library.custom_op("qar::swiglu_experts_backward", backward, mutates_args=())


@swiglu_experts_backward.register_fake
def _(
    tower: str,
    d_y: Tensor | None,
    d_y_expert: Tensor | None,
    x: Tensor | None,
    base: Sequence[Tensor],
    x_expert: Tensor | None,
    experts: Sequence[Tensor],
    pre: Sequence[Tensor],
    perm: Tensor,
    plan: Sequence[Tensor],
    lora: Sequence[Tensor],
    scale: float,
    config: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    needed = Needs.unpack(needs)
    asked = (
        (x, needed.x),
        *((weight, needed.base) for weight in base),
        (x_expert, needed.x_expert),
        *((weight, needed.experts) for weight in experts),
        *zip(lora, needed.lora, strict=False),  # the mask has no flag
    )
    return [experts[0].new_empty(tensor.shape if wanted else 0) for tensor, wanted in asked]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    tower, x, base, x_expert, experts, base_y, perm, plan, lora, scale, config, _save = inputs
    ctx.mark_non_differentiable(*output[2:])
    groups = [[x], base, [x_expert], experts, [base_y], [perm], plan, lora]
    _keep(ctx, groups, output[2:], (tower, scale, config))


def _backward(ctx: torch.autograd.function.FunctionCtx, *d_outputs: Tensor) -> tuple:
    _, x, base, x_expert, experts, base_y, perm, plan, lora, *_ = ctx.needs_input_grad
    wanted = [[x], base, [x_expert], experts, [base_y], [perm], plan, lora]
    (d_x,), d_base, (d_x_expert,), d_experts, (d_base_y,), _, d_plan, d_lora = _gradients(
        ctx, d_outputs, wanted, swiglu_experts_backward
    )
    return None, d_x, d_base, d_x_expert, d_experts, d_base_y, None, d_plan, d_lora, None, None, None


swiglu_experts.register_autograd(_backward, setup_context=_setup_context)


def run(
    tower: str,
    x: Tensor | None,
    base: Sequence[Tensor],
    x_expert: Tensor | None,
    experts: Sequence[Tensor],
    base_y: Tensor | None,
    perm: Tensor,
    plan: Sequence[Tensor],
    lora: Sequence[Tensor],
    scale: float,
    config: str,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs of the base rows and of the expert rows.

    The registered operator is left out where nobody has to see it: it costs the host as much as two launches,
    and its autograd, which walks through its lists, as much as five more.
    """
    groups = [[x], base, [x_expert], experts, [base_y], [perm], plan, lora]
    tensors = list(chain.from_iterable(groups))
    differentiates = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    save = differentiates and not recompute
    if differentiates and not is_watched(tensors):
        sizes = [len(group) for group in groups]
        return _Passes.apply((tower, scale, config), save, sizes, *tensors)
    call = swiglu_experts if is_watched(tensors) else forward
    return call(tower, x, base, x_expert, experts, base_y, perm, plan, lora, scale, config, save)[:2]


class _Passes(torch.autograd.Function):
    """Both passes for eager tensors: a call's in a row, and in ``sizes`` how many each argument has."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        constants: tuple[str, float, str],
        save: bool,
        sizes: list[int],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tower, scale, config = constants
        groups = _groups(tensors, sizes)
        (x,), base, (x_expert,), experts, (base_y,), (perm,), plan, lora = groups
        y, expert_y, *pre = forward(
            tower, x, base, x_expert, experts, base_y, perm, plan, lora, scale, config, save
        )
        _keep(ctx, groups, pre, constants)
        ctx.argument_sizes = sizes
        return y, expert_y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *d_outputs: Tensor | None) -> tuple:
        refuse_second_order("backend 'triton'")
        wanted = _groups(ctx.needs_input_grad[3:], ctx.argument_sizes)
        call = swiglu_experts_backward if is_watched(d_outputs) else backward
        return None, None, None, *chain.from_iterable(_gradients(ctx, d_outputs, wanted, call))


def is_watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a trace, a mode or a tensor subclass has to see a registered operator."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return not all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)


def _keep(
    ctx: torch.autograd.function.FunctionCtx, groups: list[Sequence], pre: Sequence[Tensor], constants: tuple
) -> None:
    """Save a call's tensors, the pre-activations in place of ``base_y``, which no gradient needs."""
    kept = [*groups[:4], pre, *groups[5:]]
    ctx.save_for_backward(*chain.from_iterable(kept))
    ctx.kept_sizes = [len(group) for group in kept]
    ctx.constants = constants
    ctx.set_materialize_grads(False)  # else autograd fills zeros of the pre-activations' size in every pass


def _gradients(
    ctx: torch.autograd.function.FunctionCtx,
    d_outputs: Sequence[Tensor | None],
    wanted: Sequence[Sequence[bool]],
    call: Callable[..., list[Tensor]],
) -> list[list[Tensor | None]]:
    """Gradients of x, base, x_expert, experts, base_y, perm, plan and lora, None where not wanted."""
    tower, scale, config = ctx.constants
    (x,), base, (x_expert,), experts, pre, (perm,), plan, lora = _groups(ctx.saved_tensors, ctx.kept_sizes)
    (wants_x,), wants_base, (wants_x_expert,), wants_experts, (wants_base_y,), _, _, wants_lora = wanted
    wants_lora = list(wants_lora)[:NUM_ADAPTER_TENSORS]
    d_y = None if tower == "expert" else _contiguous(d_outputs[0], x)
    d_y_expert = None if tower == "fused" else _contiguous(d_outputs[1], x_expert)
    needs = [wants_x, any(wants_base), wants_x_expert, any(wants_experts), *wants_lora]
    grads = call(
        tower, d_y, d_y_expert, x, base, x_expert, experts, pre, perm, plan, lora, scale, config, needs
    )
    wants = wants_x, *wants_base, wants_x_expert, *wants_experts, *wants_lora
    grads = [grad if want else None for grad, want in zip(grads, wants, strict=True)]
    sizes = 1, len(base), 1, len(experts), len(wants_lora)
    d_x, d_base, d_x_expert, d_experts, d_lora = _groups(grads, sizes)
    d_base_y = [d_y_expert if wants_base_y else None]
    mask = [None] * (len(lora) - len(d_lora))
    return [d_x, d_base, d_x_expert, d_experts, d_base_y, [None], [None] * len(plan), d_lora + mask]


def _contiguous(d_y: Tensor | None, like: Tensor) -> Tensor:
    """An output's gradient; zeros for one of two outputs that nothing was made of."""
    return torch.zeros_like(like) if d_y is None else d_y.contiguous()


def _groups(flat: Sequence[Tensor | None], sizes: Sequence[int]) -> list[list[Tensor | None]]:
    """``flat`` cut into lists of these lengths."""
    rest = iter(flat)
    return [list(islice(rest, size)) for size in sizes]
