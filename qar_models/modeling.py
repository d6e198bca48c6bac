"""The querier-aware parts of a decoder stack, written once for every family.

The mixins stand in front of a transformers class (``class QARLlamaModel(QARModelMixin, LlamaModel)``)
and leave attention, masks, rotary embeddings and caches to it. B sequences, S tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple, logging

from qar_models.base_mlp import BaseMLP, fusable
from qar_models.config import CACHE, Tower
from qar_models.distributed import is_sharded
from qar_models.experts import Experts
from qar_models.packing import (
    PACKED_ATTENTION,
    check_packed,
    check_positions,
    general_windows,
    named_bounds,
    repeat_windows,
    restarting_positions,
)
from qar_models.querier_ids import TowerMemo
from qar_models.row_sparse import sparse_parameters
from qar_models.towers import TowerBatch, TowerCache, general_rows, interleave, repeat_rows, split

logger = logging.get_logger(__name__)


def check_no_other_cache(kwargs: dict[str, Any]) -> None:
    """Raise ``TypeError`` for a cache by any other name, which would be ignored without a word."""
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise TypeError(f"{name}: got a cache, expected it as 'cache' or 'past_key_values'")


@dataclass
class QARModelOutput(BaseModelOutputWithPast):
    """``querier_states`` (B, S, H): states of the querier-specific tower before the final norm."""

    querier_states: Tensor | None = None


class DeferredNormMixin:
    """A final norm that is the identity when called: :class:`QARModelMixin` applies it later, per tower.

    Callers other than the decoder get the identity too. A context variable could tell them apart, but is lost
    where a compiled forward pass falls back to eager code, which would then normalise twice.
    """

    def forward(self, hidden_states: Tensor, now: bool = False) -> Tensor:
        """The identity; with ``now`` the norm itself."""
        return super().forward(hidden_states) if now else hidden_states


class QARDecoderLayerMixin:
    """A decoder layer with experts beside its MLP. Llama, Mistral and Qwen layers share this forward."""

    experts: Experts | None  # or PEFT's wrapper around them, which hides their settings
    tower: Tower
    towers_coincide: bool  # replace tower, up to the first layer with experts: run the general rows only

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        towers: TowerBatch | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the base class, with the cache among ``kwargs``; ``towers`` holds each row's expert."""
        if self.towers_coincide:
            hidden_states, attention_mask, position_ids, position_embeddings = (
                general_rows(value, towers.batch_size)
                for value in (hidden_states, attention_mask, position_ids, position_embeddings)
            )
            kwargs = general_windows(kwargs)
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
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
        towers = towers.to(normed.device)
        if self.tower == "residual":
            return hidden_states + self.experts(self._base(normed), normed, towers)
        if self.towers_coincide:  # the towers part here: one input, two outputs
            general, specific = self.experts(self._base(normed), normed, towers, normed)
            return interleave(hidden_states + general, hidden_states + specific)
        x, x_specific = split(normed)
        general, specific = self.experts(self._base(x), x, towers, x_specific)
        return hidden_states + interleave(general, specific)

    def _base(self, x: Tensor) -> BaseMLP | Tensor:
        """The base MLP's weights, or else its output. Not the module, which offloading hooks would move."""
        return fusable(self.mlp) or self.mlp(x.contiguous())  # one tower's rows are a strided view


class QARModelMixin:
    """The decoder stack: takes the queriers' ids, runs one tower or both, and joins them at the end."""

    tower_memo: TowerMemo

    # transformers calls this on the innermost pretrained model that holds the module
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Experts):
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
        use_cache: bool | None = None,
        querier_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> QARModelOutput:
        """As the base class, with the cache as ``past_key_values`` or ``cache`` in every version, and:

        Args:
            querier_ids: ``(B,)`` or ``(B, S)``, -1 for an unknown querier; packed: ``(N,)`` or ``(1, T)``.
            cu_seq_lens_q: ``(N + 1,)`` bounds of N windows packed into one row of T tokens; no window sees
                another. Unless given, ``position_ids`` restart in each window.

        Raises:
            ValueError, TypeError: naming the argument, what came and what was expected.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        cache = past_key_values if cache is None else cache
        check_no_other_cache(kwargs)
        self._check_contrast_follows(kwargs)
        if self.training and self.qar.expert_gradients == "sparse":
            self._check_whole_experts()
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, seq_len = inputs_embeds.shape[:2]
        if isinstance(seq_len, Tensor):
            raise NotImplementedError("torch.jit.trace: cannot trace a querier-aware model; use torch.export")
        if cu_seq_lens_q is not None:
            check_packed(cu_seq_lens_q, batch_size, seq_len, attention_mask, cache, use_cache)
            use_cache, kwargs = False, kwargs | self._packed_bounds(cu_seq_lens_q, seq_len)
            attention_mask, position_ids = self._packed_rows(inputs_embeds, position_ids, cu_seq_lens_q)
        towers = self.tower_memo(
            self.qar, querier_ids, batch_size, seq_len, inputs_embeds.device, self.trained_ids, cu_seq_lens_q
        )
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: cache,
        }
        if self.qar.tower == "replace":
            self._check_where_towers_part()
            inputs = {name: self._for_both_towers(value, batch_size) for name, value in inputs.items()}
        out = super().forward(**inputs, use_cache=use_cache, towers=towers, **kwargs)
        return self._join_towers(out, cache if use_cache else None, batch_size)

    def _check_contrast_follows(self, kwargs: dict[str, Any]) -> None:
        """Warn if the contrastive loss's inputs end here: the language model's ``forward`` keeps them."""
        unread = [name for name in ("response_mask", "cluster_ids") if kwargs.get(name) is not None]
        if unread and self.training and self.qar.num_clusters and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{', '.join(unread)}: got by the decoder, so the contrastive loss is not computed; only the "
                "language model's forward does that, which TRL's trainers replace (docs/models.md)"
            )

    def _check_whole_experts(self) -> None:
        """Raise where FSDP2 would find in the backward pass that it cannot reduce row-sparse gradients."""
        if any(is_sharded(weight) for weight in sparse_parameters(self.layers[-1]).values()):
            raise NotImplementedError(
                "expert_gradients: got 'sparse' with sharded experts (fully_shard), expected 'dense', or "
                "ignored_params=set(sparse_parameters(model).values()) in every fully_shard"
            )

    def _packed_rows(
        self, inputs_embeds: Tensor, position_ids: Tensor | None, cu_seq_lens: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Attention mask and positions of windows packed into one row."""
        mask = None
        if self.config._attn_implementation == PACKED_ATTENTION:
            # transformers passes a 4-D mask on as it is, instead of building one of (T, T); nobody reads it
            mask = inputs_embeds.new_empty(1, 1, 1, 1)
        if position_ids is None:
            position_ids = restarting_positions(cu_seq_lens, inputs_embeds.shape[1])
        elif mask is None:
            check_positions(position_ids, cu_seq_lens)
        return mask, position_ids

    def _packed_bounds(self, cu_seq_lens: Tensor, seq_len: int) -> dict[str, Tensor]:
        two_rows = self.qar.tower == "replace"
        return named_bounds(repeat_windows(cu_seq_lens, seq_len) if two_rows else cu_seq_lens)

    @staticmethod
    def _for_both_towers(value: Any, batch_size: int) -> Any:
        if hasattr(value, "get_seq_length"):
            return TowerCache(value, batch_size)
        return repeat_rows(value, batch_size)

    def _check_where_towers_part(self) -> None:
        """Raise ``ValueError`` if layers that were copied or moved part the towers twice, or never."""
        # towers that part before the first layer are right, too; what could be saved is not
        coincide = getattr(next(iter(self.layers), None), "towers_coincide", True)
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, QARDecoderLayerMixin):  # a wrapper, which hides what it holds
                return
            if layer.towers_coincide != coincide:
                raise ValueError(
                    f"layers: got layer {index} with towers_coincide={layer.towers_coincide}, expected "
                    f"{coincide}: with tower='replace' the towers part in the first layer with experts. Set "
                    "the attribute in layers that were copied or moved (PEFT's layer_replication)"
                )
            coincide = coincide and layer.experts is None

    def _join_towers(self, out: BaseModelOutputWithPast, cache: Any, batch_size: int) -> QARModelOutput:
        states = out.last_hidden_state
        if self.qar.tower == "residual":
            last_hidden_state = self.norm(states, now=True)
        else:
            # without any layer of experts the towers never part
            general, states = (states, states) if states.shape[0] == batch_size else split(states)
            last_hidden_state = (self.norm(general, now=True) + self.norm_specific(states)) / 2
        hidden_states = out.hidden_states
        if hidden_states is not None:
            hidden_states = (*hidden_states[:-1], last_hidden_state)
        return QARModelOutput(
            last_hidden_state=last_hidden_state,
            hidden_states=hidden_states,
            attentions=out.attentions,
            querier_states=states,
            **{CACHE: cache},
        )
