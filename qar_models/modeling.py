"""The querier-aware parts of a decoder, written once for every family.

The mixins stand in front of a transformers class (``class QARLlamaModel(QARModelMixin, LlamaModel)``)
and leave attention, masks, rotary embeddings and caches to it. B sequences, S tokens, H hidden.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from qar_models.config import QARConfig
from qar_models.contrast import QuerierContrast
from qar_models.experts import Experts
from qar_models.membership import MembershipMixin
from qar_models.queriers import make_towers
from qar_models.towers import TowerBatch, TowerCache, general_rows, interleave, repeat_rows, split

IGNORE_INDEX = -100
_QUERIER_AWARE = re.compile(r"(^|\.)(experts|norm_specific|contrast)\.")


@dataclass
class QARModelOutput(BaseModelOutputWithPast):
    """``querier_states`` (B, S, H): states of the querier-specific tower before the final norm."""

    querier_states: Tensor | None = None


@dataclass
class QARCausalLMOutput(CausalLMOutputWithPast):
    """The usual fields; ``loss = lm_loss + contrastive_weight * contrastive_loss`` (scalars)."""

    lm_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None


class DeferredNormMixin:
    """A final norm that does nothing when called: :class:`QARModelMixin` applies it to each tower."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The identity."""
        return hidden_states

    def normalize(self, hidden_states: Tensor) -> Tensor:
        """The norm itself."""
        return super().forward(hidden_states)


class QARDecoderLayerMixin:
    """A decoder layer whose MLP is joined by experts. Llama, Qwen2 and Qwen3 layers share this forward."""

    experts: Experts | None
    towers_coincide: bool  # replace tower, up to the first layer with experts: run the general rows only

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        towers: TowerBatch | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the base class; ``towers`` says which expert each row has."""
        if self.towers_coincide:
            hidden_states, attention_mask, position_ids, position_embeddings = (
                general_rows(value, towers.batch_size)
                for value in (hidden_states, attention_mask, position_ids, position_embeddings)
            )
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return self._feed_forward(hidden_states, towers)

    def _feed_forward(self, hidden_states: Tensor, towers: TowerBatch) -> Tensor:
        normed = self.post_attention_layernorm(hidden_states)
        if self.experts is None:
            return hidden_states + self.mlp(normed)
        if self.experts.qar.tower == "residual":
            return hidden_states + self.experts(self.mlp, normed, towers)
        if self.towers_coincide:  # the towers part here: one input, two outputs
            general, specific = self.experts(self.mlp, normed, towers, normed)
            return interleave(hidden_states + general, hidden_states + specific)
        x, x_specific = split(normed)
        general, specific = self.experts(self.mlp, x, towers, x_specific)
        return hidden_states + interleave(general, specific)


class QARModelMixin:
    """The decoder stack: who asks goes in once, both towers come out."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        querier_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> QARModelOutput:
        """As the base class, with ``querier_ids`` (B,) or (B, S), -1 for an unknown querier."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, seq_len = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        towers = make_towers(self.qar, querier_ids, batch_size, seq_len, device, self.trained_ids)
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        if self.qar.tower == "replace":
            inputs = {name: self._for_both_towers(value, batch_size) for name, value in inputs.items()}
        out = super().forward(**inputs, use_cache=use_cache, towers=towers, **kwargs)
        return self._join_towers(out, past_key_values if use_cache else None)

    @staticmethod
    def _for_both_towers(value: Any, batch_size: int) -> Any:
        if hasattr(value, "get_seq_length"):
            return TowerCache(value, batch_size)
        return repeat_rows(value, batch_size)

    def _join_towers(self, out: BaseModelOutputWithPast, past_key_values: Any) -> QARModelOutput:
        states = out.last_hidden_state
        if self.qar.tower == "residual":
            last_hidden_state = self.norm.normalize(states)
        else:
            general, states = split(states)
            last_hidden_state = (self.norm.normalize(general) + self.norm_specific(states)) / 2
        hidden_states = out.hidden_states
        if hidden_states is not None:
            hidden_states = (*hidden_states[:-1], last_hidden_state)
        return QARModelOutput(
            last_hidden_state=last_hidden_state,
            past_key_values=past_key_values,
            hidden_states=hidden_states,
            attentions=out.attentions,
            querier_states=states,
        )


class QARForCausalLMMixin(MembershipMixin):
    """The language model head, both losses, loading and saving."""

    def post_init(self) -> None:
        """Called at the end of the base class's ``__init__``: add the querier-aware parts, then finish."""
        from qar_models.conversion import install  # conversion builds on the classes of this module

        install(self)
        super().post_init()

    @classmethod
    def from_base(cls, model_or_path: str | PathLike[str] | nn.Module, qar: QARConfig, **kwargs: Any) -> Self:
        """A querier-aware model from a plain one.

        Args:
            model_or_path: a loaded model (converted in place) or what ``from_pretrained`` takes.
            qar: the settings of the querier-specific tower.
            **kwargs: for ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation``, ...).
        """
        from qar_models.conversion import apply_qar

        loaded = isinstance(model_or_path, nn.Module)
        base = model_or_path if loaded else AutoModelForCausalLM.from_pretrained(model_or_path, **kwargs)
        plain = cls.__bases__[1]
        if type(base) is not plain:
            raise TypeError(f"model: got {type(base).__name__}, expected {plain.__name__} for {cls.__name__}")
        return apply_qar(base, qar)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the base class, for a querier-aware checkpoint; use :meth:`from_base` for a plain one.

        Raises:
            ValueError: if the checkpoint lacks experts, norms or heads that its configuration asks for, or
                holds others: it is of a plain model, or of another tower.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for problem in ("missing", "unexpected"):
            keys = sorted(key for key in info[f"{problem}_keys"] if _QUERIER_AWARE.search(key))
            if keys:
                raise ValueError(
                    f"checkpoint: {problem} {keys[0]} and {len(keys) - 1} more, tower={model.qar.tower!r} "
                    f"and experts={model.qar.experts!r}; a plain model loads with from_base"
                )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Experts | QuerierContrast):
            module.reset_parameters(self.config.initializer_range)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        querier_ids: Tensor | None = None,
        response_mask: Tensor | None = None,
        cluster_ids: Tensor | None = None,
        skip_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> QARCausalLMOutput:
        """As the base class, and:

        Args:
            querier_ids: ``(B,)``, or ``(B, S)`` for packed rows; -1 for an unknown querier.
            response_mask: ``(B, S)``, 1 on the responder's tokens (contrastive loss).
            cluster_ids: ``(B,)``, the query cluster of each sequence (contrastive loss).
            skip_logits: compute logits at the labelled positions only and return ``logits=None``; a
                quarter of the time where the vocabulary is large and few tokens are labelled.
            num_items_in_batch: labelled tokens of the whole optimizer step; the losses are then that
                step's share, so that their sum over micro-batches is the mean over tokens.
        """
        outputs: QARModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            querier_ids=querier_ids,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = lm_loss = contrastive_loss = loss = None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        if labels is not None:
            _check_labels(labels, hidden_states)
            loss = lm_loss = self._lm_loss(hidden_states, logits, labels, num_items_in_batch)
        if labels is not None and self.contrast is not None:
            contrastive_loss = self.contrast(outputs.querier_states, response_mask, querier_ids, cluster_ids)
            share = _share_of_step(labels, num_items_in_batch)
            loss = lm_loss + self.qar.contrastive_weight * share * contrastive_loss
        return QARCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            contrastive_loss=contrastive_loss,
        )

    def _lm_loss(
        self, hidden_states: Tensor, logits: Tensor | None, labels: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        targets = labels[:, 1:]
        kept = targets != IGNORE_INDEX
        if logits is None:
            scores, targets = self.lm_head(hidden_states[:, :-1][kept]), targets[kept]
        elif logits.shape[1] == labels.shape[1]:
            scores, targets = logits[:, :-1].flatten(0, 1), targets.flatten()
        else:
            raise ValueError(f"logits_to_keep: got {logits.shape[1]} positions, expected all with labels")
        total = F.cross_entropy(scores.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (kept.sum().clamp(min=1) if num_items is None else num_items)


def _share_of_step(labels: Tensor, num_items: Tensor | int | None) -> Tensor | float:
    """The fraction of the optimizer step's labelled tokens that this batch holds."""
    return 1.0 if num_items is None else (labels[:, 1:] != IGNORE_INDEX).sum() / num_items


def _check_labels(labels: Tensor, hidden_states: Tensor) -> None:
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(hidden_states.shape[:2])} (B, S)"
        )
    if labels.is_floating_point():
        raise TypeError(f"labels: got dtype {labels.dtype}, expected integers")
