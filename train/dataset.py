"""The dialogues of a run, as its configuration asks for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.config import TrainConfig
from train.data.covering import covering
from train.data.layout import MQDialog
from train.data.responders import load_dialogues


def load_data(config: TrainConfig) -> MQDialog:
    """The run's training and held-out windows.

    Raises:
        UserError: what is wrong with the files, naming file, record and key.
    """
    data = load_dialogues(Path(config.data))
    return dataclasses.replace(data, train=covering(data.train)) if config.windows == "covering" else data
