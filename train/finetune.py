"""Fine-tune on one responder's dialogues.

python -m train.finetune --config train/configs/demo.yaml [key=value ...] [--resume] [--dry-run]
torchrun --nproc-per-node 2 -m train.finetune --config ...
deepspeed train/finetune.py --config ... deepspeed=train/ds/zero2.json    (or --module train.finetune)
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__" and __package__ is None:
    # run by path, as DeepSpeed's launcher does without --module: Python then looks in train/ only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm

from train import checkpoints, ranks
from train.base_model import weights_checksum
from train.batches import Collator
from train.callbacks import StopOnInterrupt
from train.cli import run
from train.config import DTYPES, TrainConfig, load_config
from train.data.layout import MQDialog
from train.dataset import load_data
from train.dry_run import dry_run
from train.errors import UserError
from train.files import check_place, remove_unfinished, write_atomic
from train.keep_best import BEST, KeepBest, discard_best
from train.report.run_page import write_run_page
from train.run_file import check_base, check_continues, check_finished, training_checksum, write_run
from train.settings import config_from
from train.setup import Prepared, make_trainer, prepare
from train.trained import TRAINED, read_about, save_trained

LOG, TRAINED_FOLDER = "log.json", "trained"
logger = logging.getLogger(__name__)


def finetune(config: TrainConfig, resume: bool = False) -> Path:
    """Train, and return the folder with the trained parts (``<output_dir>/trained``).

    A finished run with the same configuration and data is returned as it is.

    Raises:
        UserError: before any training, if something is wrong with data, model or configuration; while
            training, if a loss is not finite or a checkpoint cannot be written.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint written that ``resume`` continues.
    """
    folder = Path(config.output_dir) / TRAINED_FOLDER
    if _is_finished(folder, config):
        check_finished(config, load_data(config).data)
        logger.info("%s is there already", folder)
        return folder
    check_place(folder)
    ranks.start(config.deepspeed)
    with ranks.watching():
        _train(config, resume)
    logger.info("%s is written", folder)
    return folder


def _train(config: TrainConfig, resume: bool) -> None:
    found = load_data(config)
    mine = _checkpoint_to_resume(config, found.data, resume) if ranks.is_main() else None
    checkpoint = ranks.from_main(mine)
    prepared = prepare(config, found)
    base = weights_checksum(prepared.peft.get_base_model(), DTYPES[config.dtype])
    if checkpoint:
        check_base(config, base)
    trainer = make_trainer(prepared.model, prepared.tokenizer, prepared.windows, config)
    stop = StopOnInterrupt()
    trainer.add_callback(stop)
    keep = KeepBest(trainer, validation_loader(prepared, config)) if config.validation else None
    if keep:
        trainer.add_callback(keep)
    if ranks.is_main():
        write_run(config, found.data, base)
    with stop.listening(), logging_redirect_tqdm():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.interrupted:
        logger.info(
            "%s: stopped at step %d; --resume continues", config.output_dir, trainer.state.global_step
        )
        raise KeyboardInterrupt
    _write_results(prepared, config, found.data, trainer.state.log_history, keep)


def _write_results(
    prepared: Prepared,
    config: TrainConfig,
    data: MQDialog,
    history: list[dict[str, float]],
    keep: KeepBest | None,
) -> None:
    """Write the log, its page and the trained parts (the best ones); all ranks call this, one writes."""
    output = Path(config.output_dir)
    with ranks.gathered(value for value in prepared.model.parameters() if value.requires_grad):
        if keep:
            keep.load()  # here, while ZeRO-3's parameters are gathered
        if ranks.is_main():
            write_atomic(output / LOG, json.dumps(history, indent=1))
            write_run_page(history, config.to_dict(), output)
            checksum = training_checksum(data)
            save_trained(prepared.peft, config, data.responder, checksum, output / TRAINED_FOLDER)
    ranks.wait()


def validation_loader(prepared: Prepared, config: TrainConfig) -> DataLoader:
    """Batches of the validation windows whose labels are their last replies."""
    collator = Collator(prepared.tokenizer.pad_token_id, label_key="reply_labels")
    return DataLoader(prepared.valid, batch_size=config.batch_size, collate_fn=collator)


def _checkpoint_to_resume(config: TrainConfig, data: MQDialog, resume: bool) -> Path | None:
    """The newest intact checkpoint; damaged ones and what an earlier run left are cleared away."""
    output = Path(config.output_dir)
    found = checkpoints.all_checkpoints(output)
    if found and not resume:
        raise UserError(
            f"{output}: holds {found[-1].name}; --resume continues it, another output_dir starts anew"
        )
    checkpoint = checkpoints.last_checkpoint(output)
    if checkpoint is None:
        discard_best(output)
    else:
        check_continues(config, data)
    checkpoints.make_room(output, checkpoint)
    for name in (BEST, TRAINED_FOLDER):
        remove_unfinished(output / name)
    return checkpoint


def check_resumes(config: TrainConfig, data: MQDialog, base: Callable[[], str]) -> None:
    """``UserError`` if :func:`finetune` with ``resume`` would refuse what is in the output_dir.

    ``base`` gives the checksum of the base model's weights, and is called only if there is something to
    resume. Nothing is written.
    """
    output = Path(config.output_dir)
    if _is_finished(output / TRAINED_FOLDER, config):
        check_finished(config, data)
    elif checkpoints.last_checkpoint(output):
        check_continues(config, data)
    else:
        return
    check_base(config, base())


def _is_finished(folder: Path, config: TrainConfig) -> bool:
    if not (folder / TRAINED).is_file():
        return False
    # not key by key as it was written: a setting added since then had its default
    return config_from(TrainConfig, read_about(folder)["config"], str(folder / TRAINED)) == config


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file of train/configs")
    parser.add_argument("--resume", action="store_true", help="continue from the last intact checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, time a few steps, and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace keys of the file")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO if ranks.is_main() else logging.ERROR, format="%(message)s")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        dry_run(config)
    else:
        finetune(config, arguments.resume)


if __name__ == "__main__":
    run(main)
