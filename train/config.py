"""Settings of one training run: a YAML file, and ``key=value`` overrides on the command line."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

from qar_models import QARConfig
from qar_models.config import ExpertKind, GradientLayout, Tower, UnknownPolicy
from train.data.encode import Style
from train.errors import UserError
from train.files import read_mapping
from train.settings import TEXTS, config_from, convert, parse_override

Method = Literal["qar", "ft"]
Batching = Literal["packed", "grouped", "padded"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PATHS = ("data", "output_dir", "model", "profiles", "deepspeed")
_COUNTS = ("lora_rank", "batch_size", "gradient_accumulation", "max_tokens", "save_steps", "save_total_limit")
_RANGES: dict[str, tuple[tuple[str, ...], Callable[[float], bool]]] = {
    "at least 1": (_COUNTS, lambda value: value >= 1),
    "a positive number": (
        ("learning_rate", "expert_learning_rate", "epochs", "lora_alpha"),
        lambda value: 0 < value < math.inf,
    ),
    "a number of at least 0": (
        ("weight_decay", "expert_weight_decay", "contrastive_weight"),
        lambda value: 0 <= value < math.inf,
    ),
    "at least 0 and less than 1": (
        ("lora_dropout", "adam_beta2", "warmup_ratio", "validation"),
        lambda value: 0 <= value < 1,
    ),
    "0 to 4294967295": (("seed",), lambda value: 0 <= value < 2**32),  # NumPy's range
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. The defaults suit the demo; ``configs/`` holds others.

    Three defaults differ from those of :class:`qar_models.QARConfig`: ``experts`` (``per_querier`` there),
    ``expert_rank`` (64 there) and ``contrastive_weight`` (0.5 there).

    Attributes:
        data: folder of one responder in the MQDialog layout; or a folder of several such folders, where every
            (querier, responder) pair gets an expert.
        output_dir: where checkpoints and the trained parts go.
        model: ``smollm2-135m-instruct`` (shipped by a Python package), or any path or hub name of a
            Llama, Mistral, Qwen2 or Qwen3.
        method: ``qar``, or ``ft`` for LoRA without experts under the same budget.
        tower, experts, expert_rank, unknown_querier: see :class:`qar_models.QARConfig`.
        share_experts: querier -> whose expert they use instead of one of their own, for people with few
            dialogues; both are names in the data.
        expert_gradients: ``sparse`` for hundreds of queriers or more with experts of their own.
        contrastive_weight: λ; 0 turns the contrastive loss off.
        memory_size, projection_dim: of the contrastive loss.
        lora_rank, lora_alpha, lora_dropout, lora_targets: LoRA on the base model.
        trainable_layers: train the last n layers only (None: all). The layers below are frozen, so their
            activations are computed once and reused in every epoch.
        learning_rate, weight_decay: for LoRA. The rate falls to 0 along a cosine, as does the experts'.
        expert_learning_rate, expert_weight_decay: for the experts and the contrastive heads.
        adam_beta2: of AdamW, for all that is trained.
        warmup_ratio: share of all steps in which the rates rise from 0.
        epochs: how often every window is trained on; a fraction stops within an epoch.
        batch_size: windows of one rank in a forward and backward pass.
        gradient_accumulation: such passes before each step of the optimizer.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        windows: ``every_reply``, the paper's: one window per reply, which repeats most of a dialogue; or
            ``covering``: as few as contain every reply. They are chosen before ``max_tokens`` drops old
            turns, so dialogues longer than that lose some replies.
        validation: share of the training dialogues held out to choose the epoch whose state is kept; 0 trains
            on all of them and keeps the last state.
        batching: ``packed`` puts a batch's windows one behind the other (no padding, the same loss);
            ``padded`` pads them to the longest; ``grouped`` batches windows of similar length, and pads them.
        context: text before the turns: ``none``, a written profile of the responder or of the querier, or
            similar training dialogues, see :mod:`train.baselines`.
        profiles: YAML file of the profiles.
        max_tokens: longest window; older turns are dropped to fit.
        max_turns: at most so many turns in a window (None: no limit); 2 leaves only the query and its reply.
        names_in_prompt: whether the querier's name is part of the prompt.
        style: how turns become text, see :mod:`train.data.encode`.
        dtype: of the base weights and of mixed precision: ``float32``, ``bfloat16`` or ``float16``.
        deepspeed: path of a DeepSpeed configuration, or None.
        save_steps: steps between checkpoints.
        save_total_limit: checkpoints to keep; there is one more while it is being written.
        report_to: logging integrations of transformers (``tensorboard``, ``wandb``), or ``none``.
        seed: of the experts' and LoRA's first values, the order of windows, and dropout.
    """

    data: str
    output_dir: str
    model: str = "smollm2-135m-instruct"
    method: Method = "qar"
    tower: Tower = "residual"
    experts: ExpertKind = "shared+per_querier"
    expert_rank: int = 16
    unknown_querier: UnknownPolicy | None = None
    share_experts: dict[str, str] | None = None
    expert_gradients: GradientLayout = "dense"
    contrastive_weight: float = 0.0
    memory_size: int = 512
    projection_dim: int = 512
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ATTENTION_AND_MLP
    trainable_layers: int | None = None
    learning_rate: float = 5e-4
    expert_learning_rate: float = 1e-3
    weight_decay: float = 0.1
    expert_weight_decay: float = 0.0
    adam_beta2: float = 0.95
    warmup_ratio: float = 0.05
    epochs: float = 2.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    batching: Batching = "packed"
    gradient_checkpointing: bool = False
    windows: Literal["every_reply", "covering"] = "every_reply"
    validation: float = 0.0
    context: Literal["none", "role_profile", "querier_profile", "few_shot"] = "none"
    profiles: str | None = None
    max_tokens: int = 592
    max_turns: int | None = None
    names_in_prompt: bool = True
    style: Style = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    deepspeed: str | None = None
    save_steps: int = 50
    save_total_limit: int = 2
    report_to: str = "tensorboard"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in PATHS:
            path = getattr(self, name)
            object.__setattr__(self, name, os.path.expanduser(path) if path else None)
            if not path and name in ("data", "output_dir", "model"):
                raise UserError(f"{name}: is empty, expected a path")
        for expected, (names, holds) in _RANGES.items():
            for name in names:
                if not holds(getattr(self, name)):
                    raise UserError(f"{name}: got {getattr(self, name)}, expected {expected}")
        try:
            sharing = [name for pair in (self.share_experts or {}).items() for name in pair]
            self.qar_config(
                tuple(dict.fromkeys(sharing)) or ("anybody",), num_clusters=1, first_expert_layer=0
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.validation and self.epochs < 1:
            raise UserError(
                f"epochs: got {self.epochs} with validation={self.validation}, expected at least 1: "
                "states are compared at the end of an epoch"
            )
        if self.context.endswith("profile") and self.profiles is None:
            raise UserError(
                f"context: got '{self.context}' without profiles, expected the path of a YAML file"
            )
        if self.trainable_layers is not None and self.trainable_layers < 1:
            raise UserError(
                f"trainable_layers: got {self.trainable_layers}, expected at least 1, or null for all"
            )
        if self.max_turns is not None:
            self._check_turns()

    def _check_turns(self) -> None:
        if self.max_turns < 2:
            raise UserError(f"max_turns: got {self.max_turns}, expected at least 2, a query and its reply")
        if self.windows == "covering":
            raise UserError(
                "windows: got 'covering' with max_turns, which drops earlier replies, expected 'every_reply'"
            )

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    @property
    def encoding(self) -> dict[str, Any]:
        """The options of :func:`train.data.encode.encode`."""
        return {key: getattr(self, key) for key in ("max_tokens", "max_turns", "names_in_prompt", "style")}

    def qar_config(self, queriers: tuple[str, ...], num_clusters: int, first_expert_layer: int) -> QARConfig:
        """The settings of the querier-specific tower; ``ft`` gets them too, for a model without experts."""
        aware = self.method == "qar"
        return QARConfig(
            num_queriers=len(queriers),
            querier_names=queriers,
            querier_experts=self._experts_of(queriers) if aware else None,
            expert_rank=self.expert_rank,
            tower=self.tower if aware else "residual",
            experts=self.experts if aware else "shared",
            unknown_querier=self.unknown_querier if aware else None,
            expert_gradients=self.expert_gradients if aware else "dense",
            first_expert_layer=first_expert_layer,
            num_clusters=num_clusters if aware and self.contrastive_weight else 0,
            contrastive_weight=self.contrastive_weight,
            memory_size=self.memory_size,
            projection_dim=self.projection_dim,
        )

    def _experts_of(self, queriers: tuple[str, ...]) -> tuple[int, ...] | None:
        if not self.share_experts:
            return None
        owners = [self.share_experts.get(querier, querier) for querier in queriers]
        wrong = [name for name in (*self.share_experts, *self.share_experts.values()) if name not in queriers]
        wrong += [owner for owner in owners if owner in self.share_experts]
        if wrong:
            expected = f"queriers ({', '.join(queriers)}) to use the expert of queriers who keep their own"
            raise UserError(f"share_experts: got '{wrong[0]}', expected {expected}")
        owned = {owner: expert for expert, owner in enumerate(dict.fromkeys(owners))}
        return tuple(owned[owner] for owner in owners)

    def changed(self) -> dict[str, Any]:
        """The values that differ from the defaults, for JSON."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {key: value for key, value in self.to_dict().items() if value != defaults[key]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file of :class:`TrainConfig` keys; ``overrides`` are ``key=value`` with YAML values.

    A file may say ``extends: other.yaml``, relative to its own folder, and then sets only what differs.

    Raises:
        UserError: naming the file and the key that is unknown, missing or of the wrong type.
    """
    values, hints = _read_yaml(path), get_type_hints(TrainConfig)
    for override in overrides:
        key, value = parse_override(override, hints.get(override.partition("=")[0]) in TEXTS)
        values[key] = convert(value, hints[key], f"override '{override}'") if key in hints else value
    return config_from(TrainConfig, values, str(path))


def _read_yaml(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in extended_by:
        raise UserError(f"{path}: extends itself, through {extended_by[-1].name}")
    values = read_mapping(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: key 'extends': got {base!r}, expected the path of a YAML file")
    return _read_yaml(path.parent / base, (*extended_by, path)) | values
