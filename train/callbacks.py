"""Callbacks of every run: stopping at Ctrl-C, and the progress bar."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from train import ranks


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    A signal may reach the ranks at different moments, or only one of them; all stop after the same step.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of signals within the block; Python delivers them to the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(number, self._previous[number])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a signal, ask for a checkpoint and the end of training."""
        self.interrupted = ranks.on_any(self.interrupted)
        if self.interrupted:
            control.should_save = control.should_training_stop = True


class LossProgress(ProgressCallback):
    """The progress bar, with loss and speed on it instead of a line for every log entry."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss and the speed; the bar itself says how long the rest takes."""
        if self.training_bar is not None and logs and "loss" in logs:
            loss, speed = logs.get("lm_loss", logs["loss"]), logs["tokens_per_second"]
            self.training_bar.set_postfix(loss=f"{loss:.3f}", tokens=f"{speed:,.0f}/s")
