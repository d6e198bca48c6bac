"""The windows that cells read; on one split every method is scored on the same held-out windows."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cache

import torch

from train.base_model import load_base, load_tokenizer, weights_checksum
from train.config import DTYPES, TrainConfig
from train.data.encode import encode_all
from train.data.layout import MQDialog
from train.dataset import load_data
from train.errors import UserError
from train.experiment.plan import Cell, Experiment


def cell_data(experiment: Experiment, cell: Cell) -> MQDialog:
    """The cell's dialogues, with those held-out windows only that fit into every method's prompts.

    Raises ``UserError`` if there are none.
    """
    data = _data(_shared(experiment.config(cell)))
    methods = [_shared(experiment.config(dataclasses.replace(cell, method=m))) for m in experiment.methods]
    fitting = frozenset.intersection(*map(_fitting, methods))
    dev = [example for example in data.dev if example.id in fitting]
    if not dev:
        limits = ", ".join(sorted({str(method.max_tokens) for method in methods}))
        raise UserError(
            f"{experiment.config(cell).data}: no held-out window (of {len(data.dev)}) fits into all methods' "
            f"max_tokens ({limits})"
        )
    return dataclasses.replace(data, dev=dev)


def text_checksum(experiment: Experiment, cell: Cell) -> str:
    """A checksum of all text that the cell trains on or is scored on."""
    data = cell_data(experiment, cell)
    return hashlib.sha256(repr((data.train, data.dev)).encode()).hexdigest()


def base_of(model: str, dtype: torch.dtype = torch.float32) -> str:
    """A checksum of the base model's weights in ``dtype``."""
    return _bases(model)[dtype]


@cache
def _bases(model: str) -> dict[torch.dtype, str]:
    loaded, _ = load_base(model)
    return {dtype: weights_checksum(loaded, dtype) for dtype in DTYPES.values()}


def _shared(config: TrainConfig) -> TrainConfig:
    """Without the settings that do not affect the data, so that all seeds share one copy in memory."""
    return config.replace(output_dir=".", seed=0)


@cache
def _data(config: TrainConfig) -> MQDialog:
    return load_data(config).data


@cache
def _fitting(config: TrainConfig) -> frozenset[str]:
    tokenizer = load_tokenizer(config.model)
    return frozenset(window.id for window in encode_all(_data(config).dev, tokenizer, **config.encoding))
