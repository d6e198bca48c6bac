"""A decoder cut in two, so that frozen lower layers run once per window instead of once per step.

Both parts share the modules of the whole: what is trained in the upper part is trained in the model.
B windows, S tokens, H hidden.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from train.base_model import default_device
from train.data.encode import Encoded
from train.files import write_tensors

BATCH_SIZE = 8
logger = logging.getLogger(__name__)


def upper_part(model: PreTrainedModel, first_layer: int) -> PreTrainedModel:
    """The model from ``first_layer`` up; feed it hidden states as ``inputs_embeds``. From 0: ``model``."""
    if first_layer == 0:
        return model
    part = _shallow(model)
    part.config = _config_of_layers(model.config, first_layer, model.config.num_hidden_layers)
    part.config.use_cache = False  # its layers carry the whole model's indices, which no cache of it fits
    part.model = _decoder_part(model.model, part.config, first_layer, model.config.num_hidden_layers)
    if getattr(model, "qar", None) is not None:
        first_expert = max(0, model.qar.first_expert_layer - first_layer)
        # setting part.qar would change the experts' settings too, which are the whole model's
        part.model.qar = dataclasses.replace(model.qar, first_expert_layer=first_expert)
        part.config.qar = part.qar.to_dict()
    return part


def lower_states(
    model: PreTrainedModel, windows: Sequence[Encoded], num_layers: int, cache: Path
) -> list[Tensor]:
    """Hidden states ``(S, H)`` of every window after the first ``num_layers`` layers of a plain model.

    The accelerator, if there is one, computes them; they are kept in ``cache``, under a name that the model
    and the windows decide.
    """
    path = cache / f"{_states_key(model, windows, num_layers)}.safetensors"
    states = _read(path, len(windows))
    if states is None:
        states = _run_lower(model, windows, num_layers)
        _keep(states, path)
    return states


def _keep(states: Sequence[Tensor], path: Path) -> None:
    try:
        write_tensors(path, {str(index): state for index, state in enumerate(states)})
    except OSError as error:  # they only save time
        logger.warning("%s: the frozen layers' states are not kept (%s)", path, error.strerror)


@torch.no_grad()
def _run_lower(model: PreTrainedModel, windows: Sequence[Encoded], num_layers: int) -> list[Tensor]:
    config = _config_of_layers(model.config, 0, num_layers)
    decoder = _decoder_part(model.model, config, 0, num_layers).eval()
    decoder.norm = nn.Identity()
    home, device = model.device, default_device()
    decoder.to(device)
    order = sorted(range(len(windows)), key=lambda index: len(windows[index].input_ids))
    states: dict[int, Tensor] = {}
    progress = tqdm(total=len(windows), desc="frozen layers", unit="window")
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        rows = [torch.tensor(windows[index].input_ids) for index in chosen]
        ids = pad_sequence(rows, batch_first=True).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        out = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for index, row, state in zip(chosen, rows, out, strict=True):
            states[index] = state[: len(row)].to("cpu", copy=True)
        progress.update(len(chosen))
    progress.close()
    decoder.to(home)
    return [states[index] for index in range(len(windows))]


def _read(path: Path, count: int) -> list[Tensor] | None:
    """The cached states, or None where there are none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            return [stored.get_tensor(str(index)) for index in range(count)]
    except SafetensorError:
        return None


def _states_key(model: PreTrainedModel, windows: Sequence[Encoded], num_layers: int) -> str:
    digest = hashlib.sha256(f"{num_layers} {model.dtype} {model.config.to_json_string()}".encode())
    for part in (model.model.embed_tokens, model.model.layers[:num_layers]):
        for weight in part.state_dict().values():
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    for window in windows:
        digest.update(str(window.input_ids).encode())
    return digest.hexdigest()[:16]


def _decoder_part(
    decoder: PreTrainedModel, config: PreTrainedConfig, start: int, stop: int
) -> PreTrainedModel:
    part = _shallow(decoder)
    part.config = config
    part.layers = nn.ModuleList(decoder.layers[start:stop])
    return part


def _shallow(module: nn.Module) -> nn.Module:
    """A module of its own whose children are the original's."""
    duplicate = copy.copy(module)
    duplicate._modules = dict(module._modules)
    return duplicate


def _config_of_layers(config: PreTrainedConfig, start: int, stop: int) -> PreTrainedConfig:
    part = copy.deepcopy(config)
    part.num_hidden_layers = stop - start
    if getattr(config, "layer_types", None):
        part.layer_types = config.layer_types[start:stop]
    return part
