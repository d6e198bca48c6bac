"""The language model around the decoder: head, both losses, generation, loading and saving.

B sequences, S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from qar_models.config import CACHE, QARConfig
from qar_models.contrast import QuerierContrast
from qar_models.distributed import mean_over_ranks
from qar_models.membership import MembershipMixin
from qar_models.model_card import write_model_card
from qar_models.modeling import QARModelOutput
from qar_models.packing import ids_of_windows
from qar_models.querier_ids import as_ids, assume_ids_unchanged, check_assistant, check_prompt_ids
from qar_models.row_sparse import sparse_parameters

IGNORE_INDEX = -100
# parameters that answers depend on; the contrastive loss may start afresh, or be left out for serving
_ANSWERING = re.compile(r"(^|\.)(experts|norm_specific)\.")


@dataclass
class QARCausalLMOutput(CausalLMOutputWithPast):
    """The usual fields; ``loss = lm_loss + contrastive_weight * contrastive_loss`` (scalars)."""

    lm_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None


class QARForCausalLMMixin(MembershipMixin):
    """The language model head, both losses, loading and saving."""

    def post_init(self) -> None:
        """Add the querier-aware parts. The base class calls this at the end of its ``__init__``."""
        from qar_models.conversion import install  # which imports this module

        install(self)
        super().post_init()

    @classmethod
    def from_base(cls, model_or_path: str | PathLike[str] | nn.Module, qar: QARConfig, **kwargs: Any) -> Self:
        """A querier-aware model from a plain one.

        Args:
            model_or_path: a loaded model (converted in place) or what ``from_pretrained`` takes.
            qar: the settings of the querier-specific tower.
            **kwargs: for ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation``, ...).

        Raises:
            TypeError: if the model is not a plain one of this class's family.
            TypeError, ValueError: as :func:`~qar_models.apply_qar` does.
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
            ValueError: if the checkpoint's experts and norms are not those that its configuration asks for:
                it is of a plain model, or of another tower.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for problem in ("missing", "unexpected"):
            keys = sorted(key for key in info[f"{problem}_keys"] if _ANSWERING.search(key))
            if keys:
                raise ValueError(
                    f"checkpoint: {problem} tensors ({len(keys)}, first {keys[0]}) for a configuration "
                    f"with tower={model.qar.tower!r} and experts={model.qar.experts!r}; load a plain model "
                    "with from_base"
                )
        if "contrast.norm_role_proj.weight" in info["missing_keys"]:
            # the loss starts afresh, as after apply_qar
            model.contrast.norm_role_proj.load_state_dict(model.model.norm.state_dict())
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As the base class, with a model card (``README.md``) unless the folder has its own.

        With ``push_to_hub`` transformers replaces it by its own card; to keep it, upload the folder instead.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_model_card(self, save_directory)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the base class, with ``querier_ids`` (B,), one per prompt, checked before any work.

        Raises:
            ValueError, TypeError: for ``querier_ids`` that are missing, out of range, or of another shape or
                dtype, or do not suit the ``assistant_model``.
            NotImplementedError: for ``guidance_scale``, whose second forward pass knows no queriers.
        """
        self._check_no_guidance(*args[:1], **kwargs)
        prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        batch_size = next((len(prompt) for prompt in prompts if prompt is not None), 1)
        querier_ids = as_ids(kwargs.pop("querier_ids", None))  # beam search repeats only tensors
        check_prompt_ids(querier_ids, self.qar, batch_size)
        check_assistant(kwargs.get("assistant_model"), querier_ids, batch_size)
        if querier_ids is not None:
            kwargs["querier_ids"] = querier_ids
        with assume_ids_unchanged():
            return super().generate(inputs, *args, **kwargs)

    def _check_no_guidance(
        self, generation_config: GenerationConfig | None = None, guidance_scale: float | None = None, **_: Any
    ) -> None:
        configs = generation_config, self.generation_config
        asked = guidance_scale, *(getattr(config, "guidance_scale", None) for config in configs)
        scale = next((value for value in asked if value is not None), None)
        if scale not in (None, 1) and self.qar.needs_querier_ids:
            raise NotImplementedError(
                f"guidance_scale: got {scale}, expected 1; classifier-free guidance also calls the model "
                "without querier_ids"
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching (``generate_batch``) packs prompts without their ``querier_ids``.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("generate_batch: continuous batching knows no queriers; use generate")

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Parameters with row-sparse gradients, which DDP must leave to average_row_gradients."""
        # as named in the model itself, in a PEFT model around it, and in torch.compile's wrapper of either
        prefixes = ("", "base_model.model.", "_orig_mod.", "_orig_mod.base_model.model.")
        return [prefix + name for name in sparse_parameters(self) for prefix in prefixes]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, QuerierContrast):
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
        cu_seq_lens_q: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> QARCausalLMOutput:
        """As the base class, with the cache as ``past_key_values`` or ``cache`` in every version, and:

        Args:
            querier_ids: ``(B,)``, or ``(B, S)`` for packed rows; -1 for an unknown querier.
            response_mask: ``(B, S)``, 1 on the responder's tokens (contrastive loss).
            cluster_ids: ``(B,)``, the query cluster of each sequence (contrastive loss).
            cu_seq_lens_q: ``(N + 1,)`` bounds of N windows packed into one row (B = 1). No window sees
                another, and the ids are ``(N,)`` (or ``querier_ids`` ``(1, S)``). Fast on a CPU with
                ``model.set_attn_implementation("packed_sdpa")``, on CUDA with flash attention (which also
                needs ``max_length_q`` and ``max_length_k``).
            skip_logits: compute logits at the labelled positions only, and return ``logits=None``. With a
                large vocabulary and few labelled tokens this takes a quarter of the time.
            num_items_in_batch: labelled tokens of the whole optimizer step; the losses are then this batch's
                share of the step's, so that their sum over micro-batches is the mean over tokens.

        Raises:
            ValueError, TypeError: naming the argument, what came and what was expected; also for
                ``shift_labels`` and ``output_router_logits``, which base classes accept.
        """
        if kwargs.get("shift_labels") is not None:
            raise TypeError("shift_labels: got shifted labels, expected 'labels', which are not shifted")
        check_no_router_logits(self.config, kwargs.get("output_router_logits"))
        querier_ids = as_ids(querier_ids)
        outputs: QARModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            querier_ids=querier_ids,
            cu_seq_lens_q=cu_seq_lens_q,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.compute_logits(hidden_states[:, kept])
        found = {}
        if labels is not None:
            labels = _checked_labels(labels, hidden_states, cu_seq_lens_q)
            found["lm_loss"] = self._lm_loss(hidden_states, logits, labels, num_items_in_batch)
            found["loss"] = found["lm_loss"].clone()  # transformers' Trainer scales the loss in place
        if labels is not None and self.contrast is not None:
            ids = ids_of_windows(querier_ids, cu_seq_lens_q)
            contrasted = outputs.querier_states, response_mask, ids, cluster_ids, cu_seq_lens_q
            found["contrastive_loss"] = self.contrast(*contrasted)
            share = self.qar.contrastive_weight * self._share_of_step(labels, num_items_in_batch)
            found["loss"] = found["lm_loss"] + share * found["contrastive_loss"]
        return QARCausalLMOutput(
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
            **found,
        )

    def compute_logits(self, states: Tensor) -> Tensor:
        """Logits ``(..., V)`` of final states ``(..., H)``. Families that scale or cap them override it."""
        return self.lm_head(states)

    def _lm_loss(
        self, hidden_states: Tensor, logits: Tensor | None, labels: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        targets = labels[:, 1:]
        kept = targets != IGNORE_INDEX
        if logits is None:
            scores, targets = self.compute_logits(hidden_states[:, :-1][kept]), targets[kept]
        elif logits.shape[1] == labels.shape[1]:
            scores, targets = logits[:, :-1].flatten(0, 1), targets.flatten()
        else:
            raise ValueError(f"logits_to_keep: got {logits.shape[1]} positions, expected all with labels")
        total = F.cross_entropy(scores.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (kept.sum().clamp(min=1) if num_items is None else num_items)

    def _share_of_step(self, labels: Tensor, num_items: Tensor | int | None) -> Tensor | float:
        """The fraction of the optimizer step's labelled tokens that a rank's batch holds on average."""
        if num_items is None:
            return 1.0
        count = (labels[:, 1:] != IGNORE_INDEX).sum().float()
        return (mean_over_ranks(count) if self.training else count) / num_items


def check_no_router_logits(config: PreTrainedConfig, asked: bool | None = None) -> None:
    """Raise ``ValueError`` where a mixture of experts would add its router's loss: that is not computed.

    Args:
        config: whose ``output_router_logits``, if it has one, is the default.
        asked: the argument of a call.
    """
    if getattr(config, "output_router_logits", False) if asked is None else asked:
        raise ValueError(
            "output_router_logits: got True, expected False; a querier-aware model neither returns a "
            "router's logits nor adds its auxiliary loss"
        )


def _checked_labels(labels: Tensor, hidden_states: Tensor, cu_seq_lens: Tensor | None) -> Tensor:
    """``(B, S)`` int64 on the states' device; the first token of a packed window is not predicted."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got a {type(labels).__name__}, expected an integer tensor (B, S)")
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(hidden_states.shape[:2])} (B, S)"
        )
    if labels.is_floating_point():
        raise TypeError(f"labels: got dtype {labels.dtype}, expected integers")
    labels = labels.to(hidden_states.device, torch.int64)
    if cu_seq_lens is None:
        return labels
    return labels.index_fill(1, cu_seq_lens[:-1].to(labels.device, torch.int64), IGNORE_INDEX)
