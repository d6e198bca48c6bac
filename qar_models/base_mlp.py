"""The parts of a base MLP that the fused operations can take over: plain weights, and LoRA adapters on them.

H hidden, I intermediate. Anything else (other MLPs, quantised weights, DoRA, other tuners, hooks)
must run in its own modules. PEFT need not be installed: its layers are recognised by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from qar_kernels.lora import NO_LORA, Adapter, LoRA

logger = logging.get_logger(__name__)
_PEFT_LINEAR = ("peft.tuners.lora.layer", "Linear")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# by class name, the forward methods that compute down(silu(gate(x)) * up(x)) and nothing else
_SWIGLU: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class BaseMLP:
    """``gate`` (I, H), ``up`` (I, H) and ``down`` (H, I) weights, and the adapters active on them."""

    weights: tuple[Tensor, Tensor, Tensor]
    lora: LoRA


class _NotFusableError(Exception):
    """Why a base MLP must run in its own modules."""


def declare_swiglu(kind: type[nn.Module]) -> None:
    """Let the fused operations compute what MLPs of this class and of subclasses with its ``forward`` do.

    With a SiLU as ``act_fn`` that must be ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, in training too.
    Names do not tell: MLPs with the same three projections drop out, clamp, scale or normalise in between.
    """
    if kind.forward.__module__ == kind.__module__:  # or else somebody has patched the class before
        _SWIGLU[kind.__name__] = kind.forward


def fusable(mlp: nn.Module) -> BaseMLP | None:
    """The weights and adapters of a base MLP, or None if its own modules must run.

    The reason for None is logged once. Called in every forward pass, because adapters may be enabled,
    disabled, merged or put in training mode at any time.
    """
    try:
        _check_arithmetic(mlp)
        activation = getattr(mlp, "act_fn", None)
        if not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
            raise _NotFusableError(f"the activation of {type(mlp).__name__} is not a SiLU in act_fn")
        _refuse_hooks(mlp)
        _refuse_hooks(activation)
        gate, up, down = (_read(projection) for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    except _NotFusableError as reason:
        if not torch.compiler.is_compiling():
            logger.warning_once(f"A base MLP runs in its own modules beside the fused experts: {reason}.")
        return None
    adapters = gate[1], up[1], down[1]
    lora = NO_LORA if adapters == (None, None, None) else LoRA(*adapters)
    return BaseMLP((gate[0], up[0], down[0]), lora)


def _check_arithmetic(mlp: nn.Module) -> None:
    """Refuse a class whose ``forward``, its own, inherited or patched, is not one of those declared."""
    kind = type(mlp)
    forward = kind.forward
    if forward in _SWIGLU.values():
        return
    missing = [name for name in _PROJECTIONS if not hasattr(mlp, name)]
    if missing:
        raise _NotFusableError(f"{kind.__name__} has no {', '.join(missing)}")
    owner = forward.__module__
    if not owner.startswith("transformers.models."):
        raise _NotFusableError(f"the forward method of {kind.__name__} comes from {owner}")
    names = ", ".join(_SWIGLU)
    raise _NotFusableError(f"the forward method of {kind.__name__} is none of those of {names}")


def _read(projection: nn.Module) -> tuple[Tensor, Adapter | None]:
    """Weight and active adapter of a Linear or of PEFT's LoRA around one."""
    kind = type(projection)
    if (kind.__module__, kind.__qualname__) != _PEFT_LINEAR:
        return _weight(projection), None
    _refuse_hooks(projection)
    if projection.disable_adapters and projection.merged:
        raise _NotFusableError("a disabled adapter is merged, and PEFT unmerges it in its own forward")
    weight = _weight(projection.base_layer)
    if projection.disable_adapters or projection.merged:
        return weight, None
    active = [name for name in projection.active_adapters if name in projection.lora_A]
    return weight, _join([_adapter(projection, name) for name in active])


def _adapter(projection: nn.Module, name: str) -> Adapter:
    if name in projection.lora_variant:
        raise _NotFusableError(f"its adapter is a {type(projection.lora_variant[name]).__name__}, not LoRA")
    dropout = projection.lora_dropout[name]
    _refuse_hooks(dropout)
    if type(dropout) not in (nn.Dropout, nn.Identity):
        raise _NotFusableError(f"an adapter's dropout is a {type(dropout).__name__}")
    probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    a, b = _weight(projection.lora_A[name]), _weight(projection.lora_B[name])
    return Adapter(a, b, projection.scaling[name], probability)


def _join(adapters: list[Adapter]) -> Adapter | None:
    """Several active adapters as one, whose rank is the sum of theirs."""
    if len(adapters) < 2:
        return adapters[0] if adapters else None
    if any(adapter.dropout for adapter in adapters):
        raise _NotFusableError("several adapters are active, each with a dropout of its own")
    if len({adapter.a.dtype for adapter in adapters}) > 1:
        raise _NotFusableError("several adapters are active, of different dtypes")
    a = torch.cat([adapter.a for adapter in adapters])
    return Adapter(a, torch.cat([adapter.b * adapter.scale for adapter in adapters], dim=1))


def _weight(linear: nn.Module) -> Tensor:
    """The weight of a plain Linear: no subclass (quantised), bias, hooks (offloading) or shard (ZeRO-3)."""
    if type(linear) is not nn.Linear:
        kind = type(linear)
        raise _NotFusableError(f"a projection is a {kind.__module__}.{kind.__qualname__}, not a torch Linear")
    if linear.bias is not None:
        raise _NotFusableError("a projection has a bias")
    _refuse_hooks(linear)
    weight = linear.weight
    if hasattr(weight, "__tensor_flatten__"):  # a wrapper of other tensors: torchao's quantised, a DTensor
        kind = type(weight)
        raise _NotFusableError(f"a projection's weight is a {kind.__module__}.{kind.__qualname__}")
    if weight.shape != (linear.out_features, linear.in_features):
        raise _NotFusableError("a projection holds only a part of its weight")
    return weight


def _refuse_hooks(module: nn.Module) -> None:
    # not getattr: a module's takes 1 us, and every layer asks for each projection
    state = module.__dict__
    if any(state[hooks] for hooks in _HOOKS) or "_hf_hook" in state:
        raise _NotFusableError(f"its {type(module).__name__} has hooks")
    own = state.get("forward")  # the class's, if accelerate has removed its hooks
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        raise _NotFusableError(f"its {type(module).__name__} has a patched forward")
