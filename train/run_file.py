"""``run.json`` beside the checkpoints: what it takes to resume a run, or to build its model again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from train import ranks
from train.config import TrainConfig
from train.data.layout import MQDialog
from train.errors import UserError
from train.files import read_json, write_atomic
from train.settings import config_from

RUN = "run.json"
KEYS = ("config", "responder", "queriers", "num_clusters", "training_windows", "ranks", "base")
FREE = ("data", "output_dir", "save_steps", "save_total_limit", "report_to", "gradient_checkpointing")
"""Settings that may differ when a run is resumed, because they do not change what is computed.

The data may have moved: its content is compared, not its path.
"""


def write_run(config: TrainConfig, data: MQDialog, base: str) -> None:
    """Describe the run in its folder; ``base`` is the checksum of the base model's weights."""
    about = {"config": config.to_dict(), **_beside_config(data), "base": base}
    write_atomic(Path(config.output_dir) / RUN, json.dumps(about, indent=1, ensure_ascii=False))


def read_run(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration of the run in ``folder``, and what else :func:`write_run` wrote."""
    about = read_json(folder / RUN, KEYS)
    return config_from(TrainConfig, about.pop("config"), str(folder / RUN)), about


def check_continues(config: TrainConfig, data: MQDialog) -> None:
    """``UserError`` naming what differs from the start of the run first: a setting, the data or the ranks."""
    _compare(config, data, FREE)


def check_base(config: TrainConfig, base: str) -> None:
    """``UserError`` if the run was started on other base weights; one without ``run.json`` passes."""
    folder = Path(config.output_dir)
    if (folder / RUN).is_file() and read_run(folder)[1]["base"] != base:
        raise UserError(
            f"{folder / RUN}: the run was started when '{config.model}' had other weights; "
            "another output_dir starts anew"
        )


def check_finished(config: TrainConfig, data: MQDialog) -> None:
    """As :func:`check_continues`, whatever the number of ranks; a run without ``run.json`` passes."""
    if (Path(config.output_dir) / RUN).is_file():
        _compare(config, data, (*FREE, "ranks"))


def training_checksum(data: MQDialog) -> str:
    """A checksum of everything that is trained on."""
    return hashlib.sha256(repr(data.train).encode()).hexdigest()[:16]


def _compare(config: TrainConfig, data: MQDialog, free: tuple[str, ...]) -> None:
    folder = Path(config.output_dir)
    started, about = read_run(folder)
    before, now = started.to_dict() | about, config.to_dict() | _beside_config(data)
    for key in now:
        if key not in free and before[key] != now[key]:
            raise UserError(
                f"{folder / RUN}: the run was started with {key}={before[key]!r:.80}, got {now[key]!r:.80}; "
                "another output_dir starts anew"
            )


def _beside_config(data: MQDialog) -> dict[str, Any]:
    return {
        "responder": data.responder,
        "queriers": list(data.queriers),
        "num_clusters": data.num_clusters,
        "training_windows": training_checksum(data),
        "ranks": ranks.world_size(),
    }
