"""``run.json`` beside the checkpoints: what a run is, to resume it, or build its model, as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.config import TrainConfig, config_from
from train.data.layout import MQDialog
from train.errors import UserError
from train.files import read_json, write_atomic

RUN = "run.json"
FREE = ("output_dir", "save_steps", "save_total_limit", "report_to", "gradient_checkpointing")
"""Settings that may change when a run is resumed: they do not change what is computed."""


def write_run(config: TrainConfig, data: MQDialog) -> None:
    """Describe the run in its folder."""
    about = {"config": config.to_dict(), **_of_data(data)}
    write_atomic(Path(config.output_dir) / RUN, json.dumps(about, indent=1, ensure_ascii=False))


def read_run(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration of the run in ``folder``; its ``responder``, ``queriers`` and ``num_clusters``."""
    about = read_json(folder / RUN, ("config", "responder", "queriers", "num_clusters"))
    return config_from(about.pop("config"), str(folder / RUN)), about


def check_continues(config: TrainConfig, data: MQDialog) -> None:
    """``UserError`` naming the first setting, or part of the data, that is not as the run was started."""
    folder = Path(config.output_dir)
    started, of_data = read_run(folder)
    before, now = started.to_dict() | of_data, config.to_dict() | _of_data(data)
    for key in now:
        if key not in FREE and before[key] != now[key]:
            raise UserError(
                f"{folder / RUN}: the run was started with {key}={before[key]!r:.80}, got {now[key]!r:.80}; "
                "another output_dir starts anew"
            )


def _of_data(data: MQDialog) -> dict[str, Any]:
    names = {"responder": data.responder, "queriers": list(data.queriers)}
    return {**names, "num_clusters": data.num_clusters}
