"""transformers' Trainer with four additions: two parameter groups, reply-only logits, small atomic
checkpoints, and a stop at a loss that is not finite."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME

from qar_models import RowSparseAdamW, average_row_gradients, clip_grad_norm_, sparse_parameters
from train import checkpoints, ranks
from train.batches import LengthGroupedSampler, Windows
from train.config import TrainConfig
from train.errors import UserError
from train.expert_optimizer import ExpertOptimizer
from train.trained import is_querier_part

WEIGHTS = "trained_parts.safetensors"
PARTS = ("lm_loss", "contrastive_loss")


class Counted:
    """A collator whose batches also say which windows they hold, and how many tokens."""

    def __init__(self, collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch, with ``window_ids`` and ``num_tokens`` (padding not counted)."""
        found = {
            "window_ids": [item["window_ids"] for item in items],
            "num_tokens": sum(len(item["labels"]) for item in items),
        }
        return self.collate(items) | found


class QARTrainer(Trainer):
    """A checkpoint holds what is trained (LoRA, experts, contrastive memory), never the base model."""

    def __init__(self, *args: Any, config: TrainConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config
        self.data_collator = Counted(self.data_collator)
        self._sums: dict[str, float | Tensor] = defaultdict(float)  # since the last log
        self._clock, self._logged_step = time.perf_counter(), 0
        self._building: str | None = None
        self._experts_beside: ExpertOptimizer | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one group for LoRA and one for the querier-specific parts."""
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            sparse = sparse_parameters(model)
            if sparse and self.is_deepspeed_enabled:
                self._train_experts_beside(list(sparse.values()), kwargs)
            elif sparse:
                cls = RowSparseAdamW
            without = sparse if self._experts_beside else ()
            self.optimizer = cls(self._parameter_groups(model, without), **kwargs)
        return self.optimizer

    def _train_experts_beside(self, experts: list[nn.Parameter], options: dict[str, Any]) -> None:
        lr, decay = self.config.expert_learning_rate, self.config.expert_weight_decay
        stage = self.accelerator.state.deepspeed_plugin.zero_stage
        self._experts_beside = ExpertOptimizer(
            experts, {**options, "lr": lr, "weight_decay": decay}, stage, self.config.dtype
        )
        self.add_callback(self._experts_beside)

    def _parameter_groups(self, model: nn.Module, without: Collection[str]) -> list[dict[str, Any]]:
        named = [
            (name, value)
            for name, value in model.named_parameters()
            if value.requires_grad and name not in without
        ]
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

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """As the base class, also for row-sparse gradients."""
        if not self._clips_rows():
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients(self.optimizer)
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm or math.inf)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> float | None:
        """As the base class, which measures the norm here if it did not clip."""
        if grad_norm is None and self._clips_rows():
            grad_norm = self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _clips_rows(self) -> bool:
        return bool(sparse_parameters(self.model)) and not self.is_deepspeed_enabled

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As the base class; a loss that is not finite ends the run before a checkpoint can hold it.

        After a step's last micro-batch, row-sparse gradients are averaged over the ranks, which
        DistributedDataParallel and DeepSpeed leave to us. It is done here because it must happen whether or
        not gradients are clipped, and before float16's are unscaled, so that every rank sees the same
        overflow.
        """
        windows = inputs.pop("window_ids")
        self._sums["tokens"] += inputs.pop("num_tokens")
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            step, named = self.state.global_step + 1, ", ".join(windows)
            raise UserError(
                f"step {step}: the loss is {loss.item()} on the windows {named}; no checkpoint holds it; "
                "a lower learning rate or other data may help, in another output_dir"
            )
        if self.accelerator.sync_gradients:
            average_row_gradients(sparse_parameters(self.model).values())
        return loss

    def _get_train_sampler(self, train_dataset: Windows | None = None) -> Sampler | None:
        if self.config.batching != "grouped":
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(self.train_dataset.lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute logits at labelled positions only, and keep the parts of the loss for the log."""
        return_outputs = kwargs.pop("return_outputs", False)
        inputs = {**inputs, "skip_logits": True, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, *args, return_outputs=True, **kwargs)
        self._sums["micro_batches"] += 1
        for name in PARTS:
            if outputs.get(name) is not None:
                self._sums[name] += outputs[name].detach().double()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss, the experts' learning rate and the speed to what is logged."""
        if "loss" in logs:
            logs.update(self._since_last_log())
            if len(self.optimizer.param_groups) > 1:
                ratio = self.config.expert_learning_rate / self.config.learning_rate
                logs["expert_learning_rate"] = logs["learning_rate"] * ratio
        super().log(logs, *args, **kwargs)

    def _since_last_log(self) -> dict[str, float]:
        """Means over the micro-batches of all ranks, and tokens per second."""
        names = sorted(self._sums)
        mine = torch.stack([torch.as_tensor(self._sums[name], dtype=torch.float64) for name in names])
        sums = dict(zip(names, self.accelerator.reduce(mine.to(self.args.device)).tolist(), strict=True))
        now = time.perf_counter()
        found = {"tokens_per_second": sums["tokens"] / (now - self._clock)}
        steps = self.state.global_step - self._logged_step
        if "lm_loss" in sums:  # a micro-batch's lm_loss is its share of the step's
            found["lm_loss"] = sums["lm_loss"] / steps
        if "contrastive_loss" in sums:
            found["contrastive_loss"] = sums["contrastive_loss"] / sums["micro_batches"]
        self._sums.clear()
        self._clock, self._logged_step = now, self.state.global_step
        return found

    def _get_output_dir(self, trial: Any) -> str:
        return self._building or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Build the checkpoint in a hidden folder, then move it into place."""
        run = Path(self.args.output_dir)
        try:
            if ranks.is_main():
                checkpoints.fresh_building(run)
            ranks.wait()
            self._building = str(run / checkpoints.BUILDING)
            super()._save_checkpoint(model, trial)
            ranks.wait()
            if ranks.is_main():
                checkpoints.publish(
                    run / checkpoints.BUILDING / f"checkpoint-{self.state.global_step}",
                    self.config.save_total_limit,
                )
            ranks.wait()
        # torch and safetensors wrap the system's error
        except (OSError, RuntimeError, SafetensorError) as error:
            raise checkpoints.write_failure(run, self.state.global_step, error) from error
        finally:
            self._building = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parts, whole even if ZeRO-3 shards them; all ranks call this, one writes."""
        folder = Path(output_dir or self.args.output_dir)
        with ranks.gathered(value for value in self.model.parameters() if value.requires_grad):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(self._finite_parts(), folder / WEIGHTS)

    def _finite_parts(self) -> dict[str, Tensor]:
        parts = trained_parts(self.model)
        for name, tensor in parts.items():
            if not tensor.isfinite().all():
                step = self.state.global_step
                raise UserError(
                    f"step {step}: '{name}' is not finite; no checkpoint holds it, --resume goes back"
                )
        return parts

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the base class; DeepSpeed's own shards leave the frozen base out too."""
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            if self._experts_beside:
                self._experts_beside.save(Path(output_dir))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        """As the base class; DeepSpeed's shards lack the frozen base, so they are not loaded strictly."""
        self._clock, self._logged_step = time.perf_counter(), self.state.global_step
        self.state.compute_steps(self.args, max_steps)  # a checkpoint has the intervals of its own run
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            if self._experts_beside:
                self._experts_beside.load(Path(resume_from_checkpoint))
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_parts(self.model if model is None else model, Path(resume_from_checkpoint))


def trained_parts(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and the contrastive memory, by their names in the state dict."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = model.state_dict()
    names += [name for name, _ in model.named_buffers() if is_querier_part(name) and name in state]
    return {name: state[name].contiguous() for name in names}


def load_parts(model: nn.Module, checkpoint: Path) -> None:
    """Load the trained parts of ``checkpoint`` into ``model``; ``UserError`` if they are another model's."""
    stored = load_file(checkpoint / WEIGHTS)
    odd = sorted(set(stored) ^ set(trained_parts(model)))
    if odd:
        raise UserError(f"{checkpoint}: other trained parts than this model's, e.g. '{odd[0]}'")
    model.load_state_dict(stored, strict=False)
