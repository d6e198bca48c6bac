"""Turn a checkpoint of an unfinished (or sharded) run into plain safetensors, for evaluation and chat.

python -m train.consolidate runs/alice/qar [--out FOLDER]

Every checkpoint holds the trained parts as whole tensors, besides any shards of DeepSpeed's; this puts them
into the form that ``train.trained.load_trained`` reads.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from train.base_model import load_base
from train.checkpoints import last_checkpoint
from train.cli import run
from train.config import DTYPES
from train.errors import UserError
from train.layers import upper_part
from train.run_file import RUN, read_run
from train.trained import build, check_replaceable, first_trained_layer, save_trained
from train.trainer import load_parts

logger = logging.getLogger(__name__)


def consolidate(folder: Path, out: Path) -> Path:
    """Write the trained parts of the newest intact checkpoint of the run in ``folder`` to ``out``.

    Raises:
        UserError: if there is no run or no intact checkpoint in ``folder``, or it is of another model; if
            ``out`` holds something other than trained parts.
    """
    check_replaceable(out)
    if not (folder / RUN).is_file():
        raise UserError(f"{folder}: no run there ({RUN} is missing)")
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder}: no intact checkpoint there")
    config, about = read_run(folder)
    model, _ = load_base(config.model, DTYPES[config.dtype])
    peft = build(model, config, tuple(about["queriers"]), about["num_clusters"])
    first = first_trained_layer(config, model.config.num_hidden_layers)
    load_parts(upper_part(model, first), checkpoint)
    save_trained(peft, config, about["responder"], about["training_windows"], out)
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
