"""A run's dialogues as its configuration asks for them, and as windows that its model reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.baselines import few_shot, load_profiles, querier_profile, role_profile
from train.batches import Windows
from train.config import TrainConfig
from train.data.covering import covering
from train.data.encode import encode_all
from train.data.layout import Example, MQDialog
from train.data.responders import load_dialogues
from train.data.validation import split_validation
from train.errors import UserError
from train.layers import lower_states


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run trains on (``data.train``), picks its epoch by (``valid``), is scored on (``data.dev``)."""

    data: MQDialog
    valid: list[Example]


def load_data(config: TrainConfig) -> RunData:
    """The run's windows.

    The validation part depends on the data alone, not on the run's seed, so runs with different seeds share
    it. Few-shot contexts of training windows come from other training windows; those of scored windows may
    come from the validation part as well.

    Raises:
        UserError: if something is wrong with the files, naming file, record and key.
    """
    dialogues = load_dialogues(Path(config.data))
    if config.validation:
        data, valid = split_validation(dialogues, config.validation)
        scored = with_context(dataclasses.replace(dialogues, dev=[*valid, *data.dev]), config).dev
        train = with_context(dataclasses.replace(data, dev=[]), config).train
        data, valid = dataclasses.replace(data, train=train, dev=scored[len(valid) :]), scored[: len(valid)]
    else:
        data, valid = with_context(dialogues, config), []
    if config.windows == "covering":
        data = dataclasses.replace(data, train=covering(data.train))
    return RunData(data, valid)


CONTEXTS: dict[str, Callable[[MQDialog, TrainConfig], MQDialog]] = {
    "none": lambda data, config: data,
    "role_profile": lambda data, config: role_profile(data, load_profiles(Path(config.profiles))),
    "querier_profile": lambda data, config: querier_profile(data, load_profiles(Path(config.profiles))),
    "few_shot": lambda data, config: few_shot(data),
}
"""What puts each ``context`` before the turns."""


def with_context(data: MQDialog, config: TrainConfig) -> MQDialog:
    """``data`` with the context that the configuration puts before the turns.

    Raises ``UserError`` if there is no such context, or if profiles are damaged or missing.
    """
    if config.context not in CONTEXTS:
        raise UserError(f"context: got {config.context!r}, expected {', '.join(CONTEXTS)}")
    return CONTEXTS[config.context](data, config)


def window_set(
    examples: Sequence[Example],
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    first_layer: int,
) -> Windows:
    """``examples`` as the configuration encodes them, with a plain model's states below ``first_layer``.

    The model is needed only if ``first_layer`` is above 0. Runs in the same parent folder share the states.
    """
    windows = encode_all(examples, tokenizer, **config.encoding)
    cache = Path(config.output_dir).parent / "states"
    return Windows(windows, lower_states(model, windows, first_layer, cache) if first_layer else None)
