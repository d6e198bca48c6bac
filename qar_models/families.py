"""The supported decoder families. A new one is a configuration, four class statements and a table row.

docs/models.md ("Adding a family") says what to check before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from qar_models.base_mlp import declare_swiglu
from qar_models.causal_lm import QARForCausalLMMixin
from qar_models.config import QARConfigMixin
from qar_models.modeling import DeferredNormMixin, QARDecoderLayerMixin, QARModelMixin


class QARLlamaConfig(QARConfigMixin, LlamaConfig):
    """:class:`LlamaConfig` plus ``qar``, the fields of a :class:`~qar_models.QARConfig`."""

    model_type = "qar_llama"
    qar: dict[str, Any] | None = None


class QARLlamaRMSNorm(DeferredNormMixin, LlamaRMSNorm):
    """Llama's final norm, applied per tower."""


class QARLlamaDecoderLayer(QARDecoderLayerMixin, LlamaDecoderLayer):
    """Llama's decoder layer with experts."""


class QARLlamaModel(QARModelMixin, LlamaModel):
    """Llama's decoder with a querier-specific tower."""

    config_class = QARLlamaConfig


class QARLlamaForCausalLM(QARForCausalLMMixin, LlamaForCausalLM):
    """Querier-aware Llama (Llama 2 and 3, SmolLM2 and others that load as ``LlamaForCausalLM``)."""

    config_class = QARLlamaConfig


class QARMistralConfig(QARConfigMixin, MistralConfig):
    """:class:`MistralConfig` plus ``qar``, the fields of a :class:`~qar_models.QARConfig`."""

    model_type = "qar_mistral"
    qar: dict[str, Any] | None = None


class QARMistralRMSNorm(DeferredNormMixin, MistralRMSNorm):
    """Mistral's final norm, applied per tower."""


class QARMistralDecoderLayer(QARDecoderLayerMixin, MistralDecoderLayer):
    """Mistral's decoder layer with experts."""


class QARMistralModel(QARModelMixin, MistralModel):
    """Mistral's decoder with a querier-specific tower."""

    config_class = QARMistralConfig


class QARMistralForCausalLM(QARForCausalLMMixin, MistralForCausalLM):
    """Querier-aware Mistral (7B, Nemo and others that load as ``MistralForCausalLM``)."""

    config_class = QARMistralConfig


class QARQwen2Config(QARConfigMixin, Qwen2Config):
    """:class:`Qwen2Config` plus ``qar``, the fields of a :class:`~qar_models.QARConfig`."""

    model_type = "qar_qwen2"
    qar: dict[str, Any] | None = None


class QARQwen2RMSNorm(DeferredNormMixin, Qwen2RMSNorm):
    """Qwen2's final norm, applied per tower."""


class QARQwen2DecoderLayer(QARDecoderLayerMixin, Qwen2DecoderLayer):
    """Qwen2's decoder layer with experts."""


class QARQwen2Model(QARModelMixin, Qwen2Model):
    """Qwen2's decoder with a querier-specific tower."""

    config_class = QARQwen2Config


class QARQwen2ForCausalLM(QARForCausalLMMixin, Qwen2ForCausalLM):
    """Querier-aware Qwen2 and Qwen2.5."""

    config_class = QARQwen2Config


class QARQwen3Config(QARConfigMixin, Qwen3Config):
    """:class:`Qwen3Config` plus ``qar``, the fields of a :class:`~qar_models.QARConfig`."""

    model_type = "qar_qwen3"
    qar: dict[str, Any] | None = None


class QARQwen3RMSNorm(DeferredNormMixin, Qwen3RMSNorm):
    """Qwen3's final norm, applied per tower."""


class QARQwen3DecoderLayer(QARDecoderLayerMixin, Qwen3DecoderLayer):
    """Qwen3's decoder layer with experts."""


class QARQwen3Model(QARModelMixin, Qwen3Model):
    """Qwen3's decoder with a querier-specific tower."""

    config_class = QARQwen3Config


class QARQwen3ForCausalLM(QARForCausalLMMixin, Qwen3ForCausalLM):
    """Querier-aware Qwen3 (dense)."""

    config_class = QARQwen3Config


class Classes(NamedTuple):
    """The classes that a conversion exchanges."""

    config: type[PreTrainedConfig]
    norm: type[nn.Module]
    layer: type[nn.Module]
    decoder: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


@dataclass(frozen=True)
class Family:
    """A family's plain classes and their querier-aware subclasses.

    Attributes:
        plain: transformers' classes.
        aware: their subclasses, in the same order.
        mlp: the layers' MLP class, if it computes what
            :func:`~qar_models.base_mlp.declare_swiglu` says. None: each base MLP runs in its own modules.
    """

    plain: Classes
    aware: Classes
    mlp: type[nn.Module] | None

    def to_aware(self, instance: PreTrainedConfig | nn.Module) -> None:
        """Turn one object of the family into its querier-aware subclass, in place."""
        _change_class(instance, self.aware[self.plain.index(type(instance))])

    def to_plain(self, instance: PreTrainedConfig | nn.Module) -> None:
        """The inverse of :meth:`to_aware`."""
        _change_class(instance, self.plain[self.aware.index(type(instance))])


def has_own_forward(module: nn.Module) -> bool:
    """Whether ``module``, seen through accelerate's hooks, has a ``forward`` other than its class's."""
    own = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    if own is None:
        return False
    known = type(module).forward
    # with mixed precision, accelerate also takes off the decorators that transformers has put around it
    while known is not getattr(own, "__func__", None):
        known = getattr(known, "__wrapped__", None)
        if known is None:
            return True
    return False


def _change_class(instance: PreTrainedConfig | nn.Module, kind: type) -> None:
    instance.__class__ = kind
    if "_old_forward" in instance.__dict__:  # accelerate's hooks bound it, and copied its signature
        instance._old_forward = MethodType(kind.forward, instance)
        functools.update_wrapper(instance.forward, instance._old_forward)
    elif "forward" in instance.__dict__:  # left behind by removed hooks
        del instance.forward


FAMILIES = (
    Family(
        Classes(LlamaConfig, LlamaRMSNorm, LlamaDecoderLayer, LlamaModel, LlamaForCausalLM),
        Classes(QARLlamaConfig, QARLlamaRMSNorm, QARLlamaDecoderLayer, QARLlamaModel, QARLlamaForCausalLM),
        LlamaMLP,
    ),
    Family(
        Classes(MistralConfig, MistralRMSNorm, MistralDecoderLayer, MistralModel, MistralForCausalLM),
        Classes(
            QARMistralConfig,
            QARMistralRMSNorm,
            QARMistralDecoderLayer,
            QARMistralModel,
            QARMistralForCausalLM,
        ),
        MistralMLP,
    ),
    Family(
        Classes(Qwen2Config, Qwen2RMSNorm, Qwen2DecoderLayer, Qwen2Model, Qwen2ForCausalLM),
        Classes(QARQwen2Config, QARQwen2RMSNorm, QARQwen2DecoderLayer, QARQwen2Model, QARQwen2ForCausalLM),
        Qwen2MLP,
    ),
    Family(
        Classes(Qwen3Config, Qwen3RMSNorm, Qwen3DecoderLayer, Qwen3Model, Qwen3ForCausalLM),
        Classes(QARQwen3Config, QARQwen3RMSNorm, QARQwen3DecoderLayer, QARQwen3Model, QARQwen3ForCausalLM),
        Qwen3MLP,
    ),
)


for _family in FAMILIES:
    if _family.mlp is not None:
        declare_swiglu(_family.mlp)
    # transformers registers a class here when its __init__ runs, which an in-place conversion skips; without
    # the entry ``output_hidden_states`` and ``output_attentions`` would silently return None
    _decoder = _family.aware.decoder
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(_decoder), _decoder._can_record_outputs)


def family_of(model: nn.Module) -> Family:
    """The family of a plain or querier-aware ``ForCausalLM``.

    Raises:
        TypeError: naming the model's class, if no family has it.
    """
    for family in FAMILIES:
        if type(model) in (family.plain.causal_lm, family.aware.causal_lm):
            return family
    supported = ", ".join(family.plain.causal_lm.__name__ for family in FAMILIES)
    raise TypeError(f"model: got {type(model).__name__}, expected one of {supported}")
