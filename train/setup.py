"""What is ready before the first step: the model with what is trained, the windows, and their trainer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, is_tensorboard_available
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from train import ranks
from train.base_model import load_base
from train.batches import Collator, PackingCollator, Windows, use_packed_attention
from train.callbacks import LossProgress
from train.config import DTYPES, TrainConfig
from train.dataset import RunData, window_set
from train.errors import UserError
from train.layers import upper_part
from train.trained import build, first_trained_layer
from train.trainer import QARTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A model ready for training, with its adapters (``peft``), and the part the trainer sees (``model``)."""

    peft: PeftModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows: Windows
    valid: Windows


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


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Windows,
    config: TrainConfig,
    **arguments: Any,
) -> QARTrainer:
    """A trainer of whatever parameters of ``model`` require gradients.

    ``arguments`` are those of ``TrainingArguments`` that the configuration does not set.
    """
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    collator: PackingCollator | Collator = Collator(tokenizer.pad_token_id)
    if config.batching == "packed":
        use_packed_attention(model)
        collator = PackingCollator()
    trainer = QARTrainer(
        model, _arguments(config, **arguments), data_collator=collator, train_dataset=windows, config=config
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LossProgress)
    return trainer


def _arguments(config: TrainConfig, **more: Any) -> TrainingArguments:
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
        **more,
    )


def _available(report_to: str) -> str:
    if report_to == "tensorboard" and not is_tensorboard_available():
        logger.info("tensorboard is not installed: no event files are written")
        return "none"
    return report_to
