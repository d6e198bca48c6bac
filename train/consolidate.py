"""A checkpoint of an unfinished (or sharded) run as plain safetensors, ready to answer.

python -m train.consolidate runs/alice/qar [--out FOLDER]

Every checkpoint holds what is trained as whole tensors, whatever DeepSpeed shards beside it; this puts them
into the form that ``train.trained.load_trained`` reads.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from train.base_model import load_base
from train.checkpoints import last_checkpoint
from train.cli import run
from train.config import TrainConfig, config_from
from train.data.layout import MQDialog
from train.errors import UserError
from train.files import read_text, write_atomic
from train.layers import upper_part
from train.trained import build, first_trained_layer, save_trained
from train.trainer import load_parts

ABOUT = "run.json"
logger = logging.getLogger(__name__)


def describe(config: TrainConfig, data: MQDialog) -> None:
    """Write beside a run's checkpoints what is needed to build its model without its data."""
    about = {
        "config": config.to_dict(),
        "responder": data.responder,
        "queriers": list(data.queriers),
        "num_clusters": data.num_clusters,
    }
    write_atomic(Path(config.output_dir) / ABOUT, json.dumps(about, indent=1, ensure_ascii=False))


def consolidate(folder: Path, out: Path) -> Path:
    """Write the trained parts of the newest whole checkpoint of the run in ``folder`` to ``out``.

    Raises:
        UserError: if there is no run or no whole checkpoint in ``folder``, or its model is another one.
    """
    if not (folder / ABOUT).is_file():
        raise UserError(f"{folder}: no run there ({ABOUT} is missing)")
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder}: no whole checkpoint there")
    about = json.loads(read_text(folder / ABOUT))
    config = config_from(about["config"], str(folder / ABOUT))
    model, _ = load_base(config.model)
    peft = build(model, config, tuple(about["queriers"]), about["num_clusters"])
    first = first_trained_layer(config, model.config.num_hidden_layers)
    load_parts(upper_part(model, first) if first else model, checkpoint)
    save_trained(peft, config, about["responder"], out)
    logger.info("%s -> %s", checkpoint, out)
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument("--out", type=Path, help="where the trained parts go (default: RUN/consolidated)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    consolidate(arguments.run, arguments.out or arguments.run / "consolidated")


if __name__ == "__main__":
    run(main)
