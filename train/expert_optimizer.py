"""The experts' own optimizer beside DeepSpeed's.

ZeRO flattens all parameters of its optimizer into one dense buffer, where the experts of absent queriers
would take time and memory, decay and drift. Experts with row-sparse gradients therefore stay out of it:
every rank holds all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qar_models import RowSparseAdamW, clip_grad_norm_
from train.errors import UserError

FILE = "expert_optimizer.pt"


class ExpertOptimizer(TrainerCallback):
    """Steps whenever DeepSpeed does, at the same fraction of its learning rate.

    The gradients, which the trainer has averaged over the ranks, are clipped by their own norm.

    Args:
        parameters: the experts, in this order on every rank.
        options: for :class:`~qar_models.RowSparseAdamW`.
        zero_stage: DeepSpeed's; 1 or 2.
        dtype: of the run; not float16, whose loss scale DeepSpeed keeps to itself.

    Raises:
        UserError: if the stage or dtype is not supported.
    """

    def __init__(
        self, parameters: list[nn.Parameter], options: dict[str, Any], zero_stage: int, dtype: str
    ) -> None:
        if zero_stage not in (1, 2) or dtype == "float16":
            raise UserError(
                f"expert_gradients: got 'sparse' with ZeRO-{zero_stage} and {dtype}, expected ZeRO-1 or 2 "
                "with float32 or bfloat16, or expert_gradients=dense"
            )
        self.parameters = parameters
        self.optimizer = RowSparseAdamW(parameters, **options)
        self.learning_rate = options["lr"]

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Clip and step."""
        if args.max_grad_norm:
            clip_grad_norm_(self.parameters, args.max_grad_norm)
        scheduled = optimizer.param_groups[0]
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * scheduled["lr"] / scheduled["initial_lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint; it is the same on every rank, so one writes."""
        torch.save(self.optimizer.state_dict(), folder / FILE)

    def load(self, folder: Path) -> None:
        """The inverse of :meth:`save`."""
        state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)
