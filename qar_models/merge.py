"""Merging the shared expert into the base MLP, for serving.

H hidden, I intermediate, R expert rank.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qar_kernels.lora import NO_LORA
from qar_models.base_mlp import BaseMLP, fusable
from qar_models.conversion import unwrap

_WIDTH = 16  # makes a row a multiple of 16 bytes in any dtype


@torch.no_grad()
def merge_shared(model: PreTrainedModel) -> None:
    """Widen every base MLP by the shared expert, in place; ``experts`` becomes ``"per_querier"``.

    The units of a SwiGLU add up, so ``base(x) + scale * shared(x)`` is one MLP of I + R units. The shared
    expert then needs no calls of its own and costs R / I of the base. Answers change only by rounding. Units
    that give zero fill up layers without experts and, if I is a multiple of 16, the width to the next one.
    Build optimizers afterwards.

    Args:
        model: a ``tower="residual"`` model with ``experts="shared+per_querier"``, or a PEFT model around one.

    Raises:
        ValueError: for another tower (in ``"replace"`` the shared expert belongs to the other stream) or
            kind of experts, while ``train_only`` is on, or if a base MLP has adapters, biases or quantised
            weights.
    """
    model = unwrap(model)
    qar = model.qar
    if (qar.tower, qar.experts) != ("residual", "shared+per_querier"):
        raise ValueError(
            f"model: got tower={qar.tower!r}, experts={qar.experts!r}, "
            "expected tower='residual', experts='shared+per_querier'"
        )
    if model.model.trained_ids:
        raise ValueError("train_only: still on; end it with train_only(None) first")
    bases = [_plain(layer.mlp) for layer in model.model.layers]
    intermediate = model.config.intermediate_size
    step = math.gcd(intermediate, _WIDTH)
    added = math.ceil((intermediate + qar.expert_rank) / step) * step - intermediate
    for layer, base in zip(model.model.layers, bases, strict=True):
        _widen(layer, base, added, qar.expert_scale)
    model.config.intermediate_size = intermediate + added
    unknown = "none" if qar.unknown_querier == "shared" else qar.unknown_querier
    model.qar = dataclasses.replace(qar, experts="per_querier", unknown_querier=unknown)


def _plain(mlp: nn.Module) -> BaseMLP:
    base = fusable(mlp)
    if base is None or base.lora != NO_LORA:
        raise ValueError(
            "model: got a base MLP with adapters (merge them first), special weights or another forward, "
            "expected plain ones"
        )
    return base


def _widen(layer: nn.Module, base: BaseMLP, added: int, scale: float) -> None:
    gate, up, down = base.weights
    extra = [
        gate.new_zeros(added, gate.shape[1]),
        up.new_zeros(added, up.shape[1]),
        down.new_zeros(down.shape[0], added),
    ]
    if layer.experts is not None:
        rank = layer.experts.shared_gate.shape[0]
        extra[0][:rank] = layer.experts.shared_gate
        extra[1][:rank] = layer.experts.shared_up
        extra[2][:, :rank] = layer.experts.shared_down * scale
        del layer.experts.shared_gate, layer.experts.shared_up, layer.experts.shared_down
    for name, dim, part in zip(("gate", "up", "down"), (0, 0, 1), extra, strict=True):
        _set_weight(getattr(layer.mlp, f"{name}_proj"), part, dim)
    layer.mlp.intermediate_size = gate.shape[0] + added


def _set_weight(linear: nn.Linear, extra: Tensor, dim: int) -> None:
    weight = torch.cat((linear.weight, extra), dim)
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = weight.shape
