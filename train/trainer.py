"""transformers' Trainer, taught three things: two parameter groups, reply-only logits, small checkpoints."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from train.batches import Windows
from train.config import TrainConfig
from train.packing import LengthGroupedSampler
from train.trained import is_querier_part

WEIGHTS = "trained_parts.safetensors"
logger = logging.getLogger(__name__)


class QARTrainer(Trainer):
    """A checkpoint holds what is trained (LoRA, experts, contrastive memory), never the base model."""

    def __init__(self, *args: Any, config: TrainConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config
        self._parts: dict[str, list[Tensor]] = {"lm_loss": [], "contrastive_loss": []}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one group for LoRA and one for the querier-specific parts."""
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = cls(self._parameter_groups(model), **kwargs)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        querier = [value for name, value in named if is_querier_part(name)]
        general = [value for name, value in named if not is_querier_part(name)]
        groups = [
            {"params": general, "lr": self.config.learning_rate, "weight_decay": self.config.weight_decay},
            {
                "params": querier,
                "lr": self.config.expert_learning_rate,
                "weight_decay": self.config.expert_weight_decay,
            },
        ]
        return [group for group in groups if group["params"]]

    def _get_train_sampler(self, train_dataset: Windows | None = None) -> Sampler | None:
        if self.config.batching != "grouped":
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(self.train_dataset.lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Logits at labelled positions only; the loss' parts are kept for the log."""
        return_outputs = kwargs.pop("return_outputs", False)
        inputs = {**inputs, "skip_logits": True, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, *args, return_outputs=True, **kwargs)
        for name, values in self._parts.items():
            if outputs.get(name) is not None:
                values.append(outputs[name].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss to what is logged."""
        accumulation = self.args.gradient_accumulation_steps
        for name, values in self._parts.items():
            if values and "loss" in logs:
                scale = accumulation if name == "lm_loss" else 1  # a micro-batch's lm_loss is its share
                logs[name] = float(torch.stack(values).mean()) * scale
                values.clear()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        kept = {name: state[name].contiguous() for name in trained_names(self.model)}
        partial = folder / f"{WEIGHTS}.partial"
        save_file(kept, partial)
        partial.replace(folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        stored = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        expected = set(trained_names(model))
        if set(stored) != expected:
            odd = sorted(set(stored) ^ expected)[0]
            raise ValueError(f"{resume_from_checkpoint}: other trained parts than this model's, e.g. '{odd}'")
        model.load_state_dict(stored, strict=False)


def trained_names(model: nn.Module) -> list[str]:
    """State-dict names of trainable parameters and of the contrastive memory."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers() if is_querier_part(name)]
    return names + [name for name in buffers if name in model.state_dict()]


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged newer ones are named in the log and passed over."""
    found = [path for path in run.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if _is_whole(path):
            return path
        logger.warning("%s is not a whole checkpoint; falling back to the one before", path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """The state file is written last, so its presence says that the others were written."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        load_file(checkpoint / WEIGHTS)
    except (OSError, ValueError, SafetensorError):
        return False
    # DeepSpeed keeps the optimizer in a folder of its own, with the scheduler in it
    return (checkpoint / "optimizer.pt").is_file() or any(checkpoint.glob("global_step*"))


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Listen from here."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(number, self._previous[number])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and the end."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop listening."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class LossProgress(ProgressCallback):
    """The progress bar, with the loss on it instead of a line for every log entry."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs.get('lm_loss', logs['loss']):.3f}")
