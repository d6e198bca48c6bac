"""The trained parts of a model: adapter, experts, and how to put them on the base model again.

A folder holds ``adapter_*`` (PEFT), ``experts.safetensors`` and ``trained.json``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qar_models import QARConfig, apply_qar
from train.base_model import default_device, load_base, weights_checksum
from train.config import DTYPES, TrainConfig
from train.data.names import known_querier, split_pair
from train.errors import UserError
from train.files import build_directory, check_place, read_json
from train.settings import config_from

TRAINED, EXPERTS = "trained.json", "experts.safetensors"
KEYS = ("config", "responder", "training_windows", "qar", "base", "base_folder")
EXPERT_NAMES = (".experts.", "norm_specific.", "contrast.")


@dataclass(frozen=True)
class Trained:
    """A model ready to answer, and what it was trained with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: TrainConfig
    responder: str
    queriers: tuple[str, ...]
    training_checksum: str | None = None
    """Of the data, :func:`train.run_file.training_checksum`; None where nothing was trained."""

    @property
    def responders(self) -> list[str]:
        """Everybody for whom the model answers."""
        return sorted({self.roles(name)[1] for name in self.queriers})

    def roles(self, querier: str) -> tuple[str, str]:
        """Who asks and who answers; in a model of several responders ``querier`` is the name of a pair."""
        asker, responder = split_pair(known_querier(self.queriers, querier))
        return asker, responder or self.responder

    def querier_id(self, name: str) -> int:
        """The id of a name that :func:`~train.data.names.known_querier` knows."""
        return self.queriers.index(known_querier(self.queriers, name))


def is_querier_part(name: str) -> bool:
    """Whether a parameter or buffer belongs to the querier-specific tower (and not to base or LoRA)."""
    return any(part in f".{name}" for part in EXPERT_NAMES)


def build(
    model: PreTrainedModel, config: TrainConfig, queriers: tuple[str, ...], num_clusters: int
) -> PeftModel:
    """Experts and LoRA on a plain model, in place; only they are trainable.

    ``ft`` gets the same model without any layer of experts, so that both methods run the same code.

    Raises:
        UserError: if the LoRA targets match nothing or ``trainable_layers`` does not fit.
    """
    layers = model.config.num_hidden_layers
    first = first_trained_layer(config, layers)
    apply_qar(model, config.qar_config(queriers, num_clusters, first if config.method == "qar" else layers))
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        layers_to_transform=list(range(first, layers)),
        task_type="CAUSAL_LM",
    )
    try:
        peft = get_peft_model(model, lora)
    except ValueError as error:
        reason = str(error).partition(". ")[0]  # advice for callers of PEFT follows
        raise UserError(f"lora_targets: got {', '.join(config.lora_targets)}: {reason}") from error
    _check_targets(peft, config)
    for name, parameter in model.named_parameters():
        if is_querier_part(name):
            # PEFT has frozen it. Converting after PEFT would not, but would draw other weights from a seed
            parameter.requires_grad_(True)
            # as PEFT does with LoRA: AdamW in 16 bits would round small updates away
            parameter.data = parameter.data.float()
    return peft


def _check_targets(peft: PeftModel, config: TrainConfig) -> None:
    """PEFT is content where one target of several is found."""
    adapted = [f".{name}" for name in peft.base_model.targeted_module_names]
    for target in config.lora_targets:
        if not any(name.endswith(f".{target}") for name in adapted):
            raise UserError(f"lora_targets: no module of a trained layer is called '{target}'")


def untrained(config: TrainConfig, responder: str, queriers: tuple[str, ...]) -> Trained:
    """The base model as it is, under the interface of the trained ones (zero-shot)."""
    model, tokenizer = load_base(config.model)
    layers = model.config.num_hidden_layers
    apply_qar(model, config.replace(method="ft").qar_config(queriers, 0, layers))
    return Trained(model.to(default_device()).eval(), tokenizer, config, responder, queriers)


def first_trained_layer(config: TrainConfig, num_layers: int) -> int:
    """The lowest layer that is trained."""
    trained = num_layers if config.trainable_layers is None else config.trainable_layers
    if trained > num_layers:
        raise UserError(f"trainable_layers: got {trained}, but the model has {num_layers} layers")
    return num_layers - trained


def save_trained(
    peft: PeftModel, config: TrainConfig, responder: str, training_checksum: str, folder: Path
) -> None:
    """Write the trained parts, atomically."""
    with build_directory(folder) as building:
        # the embeddings are not trained; asking would look the base model up again
        peft.save_pretrained(building, save_embedding_layers=False)
        (building / "README.md").unlink(missing_ok=True)
        _write_experts(peft.get_base_model(), config, responder, training_checksum, building)


def save_with_adapter_of(source: Path, trained: Trained, folder: Path) -> None:
    """Write ``trained`` whose experts changed, with the adapter that lies in ``source``."""
    with build_directory(folder) as building:
        for path in source.glob("adapter_*"):
            shutil.copy2(path, building)
        _write_experts(trained.model, trained.config, trained.responder, trained.training_checksum, building)


def _write_experts(
    model: PreTrainedModel, config: TrainConfig, responder: str, training_checksum: str, folder: Path
) -> None:
    save_file(_expert_state(model), folder / EXPERTS)
    about = {
        "config": config.to_dict(),
        "responder": responder,
        "training_windows": training_checksum,
        "qar": model.qar.to_dict(),
        "base": weights_checksum(model, DTYPES[config.dtype]),
        "base_folder": str(Path(config.model).resolve()) if Path(config.model).is_dir() else None,
    }
    (folder / TRAINED).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")


def check_replaceable(out: Path) -> None:
    """``UserError`` if trained parts cannot be written to ``out``, or would take another thing's place."""
    check_place(out)
    if os.path.lexists(out) and not (out / TRAINED).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there and holds no trained model; choose an empty or a new folder")


def load_trained(folder: Path, dtype: torch.dtype | None = None) -> Trained:
    """The base model with the trained parts of ``folder`` on it, for answering.

    Args:
        folder: what :func:`save_trained` wrote.
        dtype: of all weights (None: the base's in training).

    Raises:
        UserError: if the folder or a file of it is missing or damaged, or the base has other weights now.
    """
    about = read_about(folder)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():  # PEFT would look for it on the hub
            raise UserError(f"{folder / name}: is missing")
    config = config_from(TrainConfig, about["config"], str(folder / TRAINED))
    try:
        qar = QARConfig.from_dict(about["qar"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / TRAINED}: {error}") from error
    known_as = about["base_folder"]
    if known_as and not Path(config.model).is_dir():  # typed as seen from another folder
        config = config.replace(model=known_as)
    trained_in = DTYPES[config.dtype]
    model, tokenizer = load_base(config.model, dtype or trained_in)
    is_exact = dtype in (None, torch.float32, trained_in)
    if is_exact and about["base"] != weights_checksum(model, trained_in):
        raise UserError(
            f"model '{config.model}': other weights than those that {folder} was trained on; "
            f"bring them back, or delete {folder.parent} and train anew"
        )
    apply_qar(model, qar)
    _load_experts(model, folder / EXPERTS)
    try:
        peft = PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter cannot be loaded: {str(error).splitlines()[0]}") from error
    _untie(model)
    merged = peft.merge_and_unload().to(default_device()).eval()
    queriers = qar.querier_names or ()
    return Trained(merged, tokenizer, config, about["responder"], queriers, about["training_windows"])


def _untie(model: PreTrainedModel) -> None:
    """An adapted head, or embedding, gets a weight of its own: merged, the adapter would change both."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    adapted = [end.get_base_layer() for end in ends if isinstance(end, BaseTunerLayer)]
    if adapted and model.config.tie_word_embeddings:
        adapted[0].weight = nn.Parameter(adapted[0].weight.detach().clone())
        model.config.tie_word_embeddings = False


def read_about(folder: Path) -> dict[str, Any]:
    """What ``trained.json`` says."""
    if not (folder / TRAINED).is_file():
        raise UserError(f"{folder}: no trained model there ({TRAINED} is missing)")
    return read_json(folder / TRAINED, KEYS)


def _expert_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if is_querier_part(name)}


def _load_experts(model: PreTrainedModel, path: Path) -> None:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    expected = _expert_state(model)
    if _shapes(stored) != _shapes(expected):
        raise UserError(f"{path}: holds other experts than {TRAINED} describes")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(stored[name])


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
