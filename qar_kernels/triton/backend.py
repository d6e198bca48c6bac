"""The ``triton`` backend: chooses a path, plans the tiles, checks what kernels need, calls the operators.

T rows, S rows that have experts, H hidden, I intermediate, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from qar_kernels import dispatch
from qar_kernels.lora import NO_LORA, LoRA
from qar_kernels.segments import Segments
from qar_kernels.tile_plan import TilePlan, tile_plan
from qar_kernels.triton import launch, ops
from qar_kernels.triton.base_mlp import swiglu_mlp
from qar_kernels.triton.configs import CONFIGS, select_config
from qar_kernels.triton.lora import prepare
from qar_kernels.triton.operands import Constants, Operands
from qar_kernels.weights import SwiGLUWeights

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAN_FIELDS = tuple(field.name for field in fields(TilePlan))


def fused_mlp(
    x: Tensor,
    base: SwiGLUWeights,
    experts: SwiGLUWeights,
    segments: Segments,
    scale: float,
    recompute: bool,
    lora: LoRA = NO_LORA,
    owned: int | None = None,
) -> Tensor:
    """``base(x) + scale * expert_q(x)``, on the fused path in one gate/up and one down launch.

    ``x`` (T, H) -> (T, H). ``owned``: experts of the bank, where ``experts`` are copies of those present:
    nothing is chosen by how many these are.
    """
    most = _most_segments(segments, experts, owned)
    if _path((x,), base, experts, most, recompute, lora) == "grouped":
        return expert_mlp(x, experts, segments, scale, swiglu_mlp(x, *base, lora), owned)
    return _run("fused", x, base, None, experts, None, segments, most, scale, recompute, lora)[0]


def dual_mlp(
    x: Tensor,
    x_expert: Tensor,
    base: SwiGLUWeights,
    experts: SwiGLUWeights,
    segments: Segments,
    recompute: bool,
    lora: LoRA = NO_LORA,
    owned: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``base(x)`` (T, H) and ``expert_q(x_expert)`` (S, H), on the fused path in the same two launches."""
    most = _most_segments(segments, experts, owned)
    if _path((x, x_expert), base, experts, most, recompute, lora) == "grouped":
        return swiglu_mlp(x, *base, lora), expert_mlp(x_expert, experts, segments, owned=owned)
    return _run("dual", x, base, x_expert, experts, None, segments, most, 1.0, recompute, lora)


def expert_mlp(
    x: Tensor,
    experts: SwiGLUWeights,
    segments: Segments,
    scale: float = 1.0,
    base_y: Tensor | None = None,
    owned: int | None = None,
) -> Tensor:
    """``scale * expert_q(x)``, added to ``base_y`` (S, H) where given. ``x`` (S, H) -> (S, H)."""
    most = _most_segments(segments, experts, owned)
    return _run("expert", None, (), x, experts, base_y, segments, most, scale, False)[1]


def plan_tensors(plan: TilePlan) -> list[Tensor]:
    """The plan's tensors in the order of its fields, as operators take them."""
    return [getattr(plan, field) for field in _PLAN_FIELDS]


def _most_segments(segments: Segments, experts: SwiGLUWeights, owned: int | None) -> int:
    return min(segments.capacity, experts.gate.shape[0] if owned is None else owned)


def _path(
    rows: tuple[Tensor, ...],
    base: SwiGLUWeights,
    experts: SwiGLUWeights,
    segments: int,
    recompute: bool,
    lora: LoRA,
) -> str:
    """``"fused"``, or ``"grouped"``: the base is left to the vendor library, which cannot recompute."""
    if recompute:
        return "fused"
    trainable = *rows, *base, *experts, *lora.factors
    # Checkpointing runs a first pass without gradients, which must draw the same dropout as the second: the
    # two paths draw differently, so dropout counts as training.
    differentiates = torch.is_grad_enabled() or lora.drops
    intermediate, hidden = base[0].shape
    shape = dispatch.Shape(
        rows=rows[0].shape[0],
        segments=segments,
        hidden=hidden,
        intermediate=intermediate,
        rank=experts[0].shape[1],
        dtype=str(rows[0].dtype).removeprefix("torch."),
        training=differentiates and any(t.requires_grad for t in trainable),
        adapted=len(lora.factors) > 0,  # PyTorch 2.11 does not trace bool() of a tuple
    )
    return dispatch.choose_path(rows[0].device, shape)


def _run(
    tower: str,
    x: Tensor | None,
    base: Sequence[Tensor],
    x_expert: Tensor | None,
    experts: SwiGLUWeights,
    base_y: Tensor | None,
    segments: Segments,
    most_segments: int,
    scale: float,
    recompute: bool,
    lora: LoRA = NO_LORA,
) -> tuple[Tensor, Tensor]:
    rows = x_expert if x is None else x
    _check_runnable(rows)
    name = select_config(rows.device, rows.dtype, rows.shape[0], tower, most_segments)
    config = CONFIGS[name]
    plan = tile_plan(segments, config.block_rows, config.block_expert)
    x, x_expert, base_y = (_dense(tensor) for tensor in (x, x_expert, base_y))
    base, experts = ([weight.contiguous() for weight in weights] for weights in (base, experts))
    adapters = [] if not lora.factors else list(prepare(lora, rows, base[0].shape[0]))
    operands = Operands(x, base, x_expert, experts, base_y, segments.perm, plan_tensors(plan), adapters)
    return ops.run(operands, Constants(tower, float(scale), name), recompute)


def _check_runnable(x: Tensor) -> None:
    if x.device.type == "cpu" and not launch.INTERPRETED:
        raise ValueError("backend: got 'triton' with tensors on the CPU, expected 'auto' or 'torch' there")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"x: got dtype {x.dtype}, expected bfloat16, float16 or float32 with backend 'triton'"
        )


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
