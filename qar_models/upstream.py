"""Checkpoints of the paper's code (arXiv 2412.11736): the one place that knows its names and conventions.

C clusters, Q queriers and phantom classes, K memory slots, P projection, R expert rank, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qar_models.config import QARConfig
from qar_models.families import FAMILIES, Family

_RANK_KEY = "model.layers.0.mlp_specific.gate_proj_low_rank.weight"
_IGNORED = "rotary_emb.inv_freq"  # older transformers saved it, although it follows from the configuration


def load_upstream(
    hf_config: PreTrainedConfig,
    state_dict: Mapping[str, Tensor],
    *,
    num_queriers: int,
    num_clusters: int,
    memory_size: int,
    temperature: float,
    weight: float,
    projection_dim: int,
) -> PreTrainedModel:
    """A model that continues a checkpoint of the reference code exactly.

    One expert for everybody in the ``"replace"`` tower; its rank is the checkpoint's. In training pass
    ``querier_ids=role_pair_id - 2`` and ``response_mask=role_pos_ids == 1``.

    Args:
        hf_config: configuration of the base model, a :class:`~transformers.LlamaConfig` or ``Qwen2Config``.
        state_dict: the reference model's tensors.
        num_queriers: queriers the checkpoint was trained with, the two phantom classes not counted.
        num_clusters: query clusters.
        memory_size: remembered projections per cluster and querier.
        temperature: τ.
        weight: λ, the weight of the contrastive loss.
        projection_dim: width of the two views.

    Raises:
        TypeError: if the family is not supported.
        ValueError: if tensors are missing or unknown, or their shapes do not match the arguments.
    """
    family = _family_of(hf_config)
    if _RANK_KEY not in state_dict:
        raise ValueError(f"state_dict: missing {_RANK_KEY}; expected a checkpoint of the reference code")
    qar = QARConfig(
        num_queriers=num_queriers,
        expert_rank=state_dict[_RANK_KEY].shape[0],
        tower="replace",
        experts="shared",
        num_clusters=num_clusters,
        memory_size=memory_size,
        temperature=temperature,
        contrastive_weight=weight,
        projection_dim=projection_dim,
        contrast="reference",
    )
    config = copy.deepcopy(hf_config)
    family.to_aware(config)
    config.qar = qar.to_dict()
    model = AutoModelForCausalLM.from_config(config, dtype=state_dict[_RANK_KEY].dtype)
    _load(model, state_dict)
    return model


def _family_of(hf_config: PreTrainedConfig) -> Family:
    for family in FAMILIES:
        if type(hf_config) is family.plain.config:
            return family
    supported = ", ".join(family.plain.config.__name__ for family in FAMILIES)
    raise TypeError(f"hf_config: got {type(hf_config).__name__}, expected one of {supported}")


@torch.no_grad()
def _load(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> None:
    contrast = model.contrast
    targets = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name != "contrast.totals" and not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    sources = {name: list(_reference_names(name, len(contrast.writes))) for name in targets}
    _check_names(state_dict, {key for keys in sources.values() for key in keys}, model.config)
    for name, target in targets.items():
        parts = [state_dict[key] for key in sources[name]]
        for key, part in zip(sources[name], parts, strict=True):
            expected = tuple(target.shape[target.dim() - part.dim() :])
            if tuple(part.shape) != expected:
                raise ValueError(f"state_dict: got {key} of shape {tuple(part.shape)}, expected {expected}")
        target.copy_(torch.stack(parts).view(target.shape))
    contrast.totals.copy_(contrast.memory.sum(3, dtype=torch.float64))
    contrast.writes.copy_(_writes(contrast.memory, contrast.writes))


def _reference_names(name: str, clusters: int) -> Iterator[str]:
    """The reference's tensors that, stacked, make up our tensor ``name``."""
    if ".experts." in name:
        layer, projection = name.split(".experts.")
        yield f"{layer}.mlp_specific.{projection}_proj_low_rank.weight"
    elif name.startswith("contrast.head_"):
        kind = name.removeprefix("contrast.head_")
        yield from (f"role_proj_v{view}.{cluster}.{kind}" for view in (1, 2) for cluster in range(clusters))
    elif name == "contrast.memory":
        yield from ("role_avg_emb_view1", "role_avg_emb_view2")
    elif name == "contrast.writes":
        yield "role_avg_emb_ptr"
    elif name.startswith("contrast.norm_role_proj."):
        yield name.replace("contrast.", "model.")
    else:
        yield name


def _check_names(state_dict: Mapping[str, Tensor], expected: set[str], config: PreTrainedConfig) -> None:
    got = {key for key in state_dict if not key.endswith(_IGNORED)}
    if config.tie_word_embeddings:
        got.discard("lm_head.weight")
    for problem, keys in (("missing", expected - got), ("unknown", got - expected)):
        if keys:
            first = sorted(keys)[:3]
            raise ValueError(f"state_dict: {len(keys)} {problem} tensors, the first are {first}")


def _writes(memory: Tensor, pointer: Tensor) -> Tensor:
    """Entries written so far ``(C, Q)``, or as many modulo K once the ring is full.

    The pointer says where the next one goes; the memory itself shows how many slots are filled.
    """
    slots = memory.shape[3]
    filled = (memory[0] != 0).any(-1).sum(-1)
    return torch.where(filled == slots, slots + pointer % slots, pointer)
