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
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and __package__ is None:
    # run by path, as DeepSpeed's launcher does without --module: Python then looks in train/ only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from peft import PeftModel
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, is_tensorboard_available
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from train import checkpoints, ranks
from train.base_model import load_base, weights_checksum
from train.batches import Collator, PackingCollator, Windows, use_packed_attention
from train.callbacks import LossProgress, StopOnInterrupt
from train.cli import run
from train.config import DTYPES, TrainConfig, load_config
from train.data.layout import MQDialog
from train.dataset import RunData, load_data, window_set
from train.errors import UserError
from train.files import remove_unfinished, write_atomic
from train.keep_best import BEST, KeepBest, discard_best
from train.layers import upper_part
from train.report.run_page import write_run_page
from train.run_file import check_base, check_continues, check_finished, training_checksum, write_run
from train.trained import TRAINED, build, first_trained_layer, read_about, save_trained
from train.trainer import QARTrainer

LOG, TRAINED_FOLDER = "log.json", "trained"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A model ready for training, with its adapters (``peft``), and the part the trainer sees (``model``)."""

    peft: PeftModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows: Windows
    valid: Windows


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


def prepare(config: TrainConfig, found: RunData) -> Prepared:
    """Model and windows, ready for :func:`make_trainer`."""
    _check_machine(config)
    data = found.data
    with ranks.main_first():
        model, tokenizer = load_base(config.model, DTYPES[config.dtype])
    # after loading: converting the small model draws random numbers on one rank, and all must start alike
    transformers.set_seed(config.seed)
    first = first_trained_layer(config, model.config.num_hidden_layers)
    with ranks.main_first():
        windows, valid = (
            window_set(examples, model, tokenizer, config, first) for examples in (data.train, found.valid)
        )
    if not len(windows):
        raise UserError(f"{config.data}: no training window fits into max_tokens={config.max_tokens}")
    if found.valid and not len(valid):
        raise UserError(f"{config.data}: no validation window fits into max_tokens={config.max_tokens}")
    longest, positions = max(windows.lengths + valid.lengths), model.config.max_position_embeddings
    if longest > positions:
        raise UserError(
            f"max_tokens: got {config.max_tokens}, and a window of {longest} tokens, but the model has "
            f"{positions} positions"
        )
    peft = build(model, config, tuple(data.queriers), data.num_clusters)
    trained = upper_part(model, first)
    return Prepared(peft, trained, tokenizer, windows, valid)


def _check_machine(config: TrainConfig) -> None:
    if config.dtype == "float16" and not torch.cuda.is_available():
        raise UserError("dtype: float16 needs a GPU (it scales the loss); on a CPU use bfloat16 or float32")
    installed = get_available_reporting_integrations()
    if config.report_to not in ("none", "all", "tensorboard", *installed):
        names = ", ".join(["none", *installed])
        raise UserError(f"report_to: '{config.report_to}' is not installed or unknown; available: {names}")


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
    as_stored = json.loads(json.dumps(config.to_dict()))
    return (folder / TRAINED).is_file() and read_about(folder)["config"] == as_stored


def make_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Windows, config: TrainConfig
) -> QARTrainer:
    """A trainer of whatever parameters of ``model`` require gradients."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    collator: PackingCollator | Collator = Collator(tokenizer.pad_token_id)
    if config.batching == "packed":
        use_packed_attention(model)
        collator = PackingCollator()
    trainer = QARTrainer(
        model, _arguments(config), data_collator=collator, train_dataset=windows, config=config
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LossProgress)
    return trainer


def _arguments(config: TrainConfig) -> TrainingArguments:
    """The configuration in transformers' terms."""
    return TrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        logging_steps=1,
        save_steps=config.save_steps,
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        deepspeed=config.deepspeed,
        report_to=_available(config.report_to),
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=False,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # every rank's memory already takes in the gathered batch
        use_cpu=not torch.cuda.is_available(),
        accelerator_config={"use_configured_state": ranks.launched()},
    )


def _available(report_to: str) -> str:
    if report_to == "tensorboard" and not is_tensorboard_available():
        logger.info("tensorboard is not installed: no event files are written")
        return "none"
    return report_to


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
        from train.plan import dry_run  # not above: the plan imports this module

        dry_run(config)
    else:
        finetune(config, arguments.resume)


if __name__ == "__main__":
    run(main)
