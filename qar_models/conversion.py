"""Plain model <-> querier-aware model, in place.

Nothing of the base model is moved or copied: its modules change to their querier-aware subclasses and
gain ``experts``, so all base parameters keep their names, and adapters or hooks on them stay.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from qar_models.causal_lm import check_no_router_logits
from qar_models.config import QARConfig
from qar_models.contrast import QuerierContrast
from qar_models.contrast_reference import ReferenceContrast
from qar_models.distributed import check_not_sharded
from qar_models.experts import Experts
from qar_models.families import Classes, Family, family_of, has_own_forward
from qar_models.querier_ids import TowerMemo

logger = logging.get_logger(__name__)

CONTRASTS = {"masked": QuerierContrast, "reference": ReferenceContrast}


def apply_qar(model: nn.Module, qar: QARConfig) -> nn.Module:
    """Make a loaded Llama, Mistral, Qwen2 or Qwen3 querier-aware, in place.

    Args:
        model: a ``ForCausalLM`` of a supported family, or a PEFT model around one, whose checkpoints will
            not hold the experts (logged once).
        qar: the settings of the querier-specific tower.

    Returns:
        The same object. With ``tower="residual"`` it computes exactly what it did before, until trained.
        The new parameters require gradients, even where the model's own are frozen.

    Raises:
        TypeError: if ``qar`` is not a QARConfig, the family is not supported, or a module of the model was
            replaced or has a patched ``forward``.
        ValueError: if the model is querier-aware already, the settings do not fit it, its decoder is
            offloaded, or its configuration asks for a router's auxiliary loss (``output_router_logits``).

    From then on ``model.model.norm``, the final norm, is the identity when called, because each tower applies
    it later. Code that reads the hidden states of inner layers (a logit lens) must call
    ``model.model.norm(states, now=True)``.
    """
    if not isinstance(qar, QARConfig):
        raise TypeError(f"qar: got a {type(qar).__name__}, expected a QARConfig")
    base = unwrap(model)
    family = family_of(base)
    if type(base) is family.aware.causal_lm:
        raise ValueError(f"model: {type(base).__name__} is querier-aware already; call remove_qar first")
    _check_fits(base, qar)
    _check_classes(base, family.plain)
    _check_not_offloaded(base)
    if model is not base or getattr(base, "_hf_peft_config_loaded", False):  # PEFT's wrapper, add_adapter
        logger.warning_once(
            "apply_qar: the model already has PEFT adapters. PEFT's checkpoints (Trainer's too) "
            "will not hold the experts. Call apply_qar first, then get_peft_model with "
            f"modules_to_save={_new_modules(qar)}"
        )
    _own_config(model, base.config)
    family.to_aware(base.config)
    base.config.qar = qar.to_dict()
    base.config.architectures = [family.aware.causal_lm.__name__]
    family.to_aware(base)
    install(base)
    _initialize(base)
    return model


def remove_qar(model: nn.Module) -> nn.Module:
    """Give the base model back: the inverse of :func:`apply_qar`, in place.

    Args:
        model: a querier-aware ``ForCausalLM``, or a PEFT model around one.

    Returns:
        The same object, without experts.

    Raises:
        TypeError: if the family is not supported, or a module of the model was replaced or has a patched
            ``forward``.
        ValueError: if the model is not querier-aware.
        NotImplementedError: after FSDP2's ``fully_shard``.
    """
    base = unwrap(model)
    if isinstance(base, nn.Module):
        check_not_sharded(base, "remove_qar")
    family = family_of(base)
    if type(base) is not family.aware.causal_lm:
        raise ValueError(f"model: {type(base).__name__} is not querier-aware")
    _check_classes(base, family.aware)
    decoder = base.model
    if decoder.trained_ids:
        base.train_only(None)
    for layer in decoder.layers:
        del layer.experts, layer.tower, layer.towers_coincide
        family.to_plain(layer)
    for name in ("norm_specific", "qar", "trained_ids", "tower_memo"):
        if hasattr(decoder, name):
            delattr(decoder, name)
    del base.contrast, base.config.qar
    for instance in (decoder.norm, decoder, base, base.config):
        family.to_plain(instance)
    base._no_split_modules = decoder._no_split_modules = {family.plain.layer.__name__}
    base.config.architectures = [type(base).__name__]
    return model


def install(model: PreTrainedModel) -> None:
    """Convert the modules of ``model``, whose configuration already has ``qar``, and add the new ones.

    Experts and contrastive heads get their values later, by initialisation or from a checkpoint.
    """
    family = family_of(model)
    if model.config.qar is None:
        raise ValueError(
            f"config.qar: missing; a plain model loads with {type(model).__name__}.from_base(model, qar)"
        )
    qar = QARConfig.from_dict(model.config.qar)
    _check_fits(model, qar)
    decoder = model.model
    family.to_aware(decoder.norm)
    family.to_aware(decoder)
    decoder.qar = qar
    decoder.trained_ids = []
    decoder.tower_memo = TowerMemo()
    model._no_split_modules = decoder._no_split_modules = {family.aware.layer.__name__}
    for index, layer in enumerate(decoder.layers):
        _install_layer(family, layer, index, qar)
    if qar.tower == "replace":
        decoder.norm_specific = _copy_norm(decoder.norm, family)
    model.contrast = None
    if qar.num_clusters:
        norm = _copy_norm(decoder.norm, family)
        model.contrast = CONTRASTS[qar.contrast](qar, model.config.hidden_size, norm).train(model.training)


def _install_layer(family: Family, layer: nn.Module, index: int, qar: QARConfig) -> None:
    family.to_aware(layer)
    layer.tower = qar.tower
    layer.towers_coincide = qar.tower == "replace" and index <= qar.first_expert_layer
    layer.experts = None
    if index >= qar.first_expert_layer:
        # unlike the weights of a quantised MLP, the norm's has the compute dtype
        like = layer.post_attention_layernorm.weight
        layer.experts = Experts(qar, like.shape[0], like.dtype, like.device).train(layer.training)


def _new_modules(qar: QARConfig) -> list[str]:
    """The names of the modules that a conversion adds."""
    added = {"experts": True, "norm_specific": qar.tower == "replace", "contrast": qar.num_clusters > 0}
    return [name for name, is_added in added.items() if is_added]


def _initialize(model: PreTrainedModel) -> None:
    std = model.config.initializer_range
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts | QuerierContrast):
                module.reset_parameters(std)


def _copy_norm(norm: nn.Module, family: Family) -> nn.Module:
    """A new, trainable norm that starts as a copy of the model's final norm and is applied when called."""
    duplicate = copy.deepcopy(norm)
    family.to_plain(duplicate)
    return duplicate.requires_grad_(True)  # the original may be frozen, as PEFT leaves it


def _check_fits(model: PreTrainedModel, qar: QARConfig) -> None:
    check_no_router_logits(model.config)
    layers = model.config.num_hidden_layers
    if qar.first_expert_layer > layers:
        raise ValueError(
            f"first_expert_layer: got {qar.first_expert_layer}, expected at most {layers} (no experts)"
        )


def _own_config(model: nn.Module, config: PreTrainedConfig) -> None:
    """Replace ``config``, which other models may share, by a copy in every module that refers to it."""
    own = copy.deepcopy(config)
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = own


def _check_classes(model: PreTrainedModel, kinds: Classes) -> None:
    for module in (model, model.model, model.model.norm, *model.model.layers):
        if type(module) not in kinds or has_own_forward(module):
            problem = "with a patched forward" if type(module) in kinds else "in it"
            raise TypeError(
                f"model: got a {type(module).__name__} {problem}, expected its family's own modules; patch "
                "them after apply_qar, and undo that before remove_qar"
            )


def _check_not_offloaded(model: PreTrainedModel) -> None:
    """New parameters go where their layer is; an offloaded layer would look for them in its checkpoint."""
    norms = model.model.norm, *(layer.post_attention_layernorm for layer in model.model.layers)
    hooked = any("_hf_hook" in module.__dict__ for module in model.modules())
    if hooked and any(norm.weight.is_meta for norm in norms):
        raise ValueError(
            "model: got offloaded decoder layers (device_map), expected all of them on a device; convert the "
            "model where it fits, save it, and load the saved folder with the device_map"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The ``ForCausalLM`` itself, or the one inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
