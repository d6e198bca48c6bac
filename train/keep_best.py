"""Keep the state of the epoch with the lowest loss on a part of the training data.

The test split plays no part in the choice.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train import ranks
from train.errors import UserError
from train.files import build_directory, read_json
from train.heldout import reply_nll
from train.trainer import QARTrainer, load_parts

BEST, SCORE = "best", "validation.json"
logger = logging.getLogger(__name__)


def discard_best(run: Path) -> None:
    """Delete the best state of an earlier run, which a new run would take for its own."""
    if (run / BEST / SCORE).is_file():
        shutil.rmtree(run / BEST)


class KeepBest(TrainerCallback):
    """After every epoch: score the validation windows, keep the trained parts if they are the best so far.

    The best so far is in ``<output_dir>/best``, so that a resumed run finds it.

    Args:
        trainer: the run's; gives the model and writes its trained parts.
        loader: batches of the validation windows, with labels of their last replies.
    """

    def __init__(self, trainer: QARTrainer, loader: DataLoader) -> None:
        self.trainer, self.loader = trainer, loader
        self.folder = Path(trainer.args.output_dir) / BEST
        self.best = self._stored()  # read once, before any rank writes

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """After an epoch's last step every rank scores the same windows, and rank 0 writes.

        The step's checkpoint comes after this, so a run that is killed in between scores that epoch again.
        """
        if not float(state.epoch).is_integer():
            return
        nll = self._score(model)
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, "valid_nll": nll})
        logger.info("epoch %g: validation NLL %.4f", state.epoch, nll)
        if not nll < self.best:  # nan is no improvement either
            return
        self.best = nll
        if ranks.is_main():
            with build_directory(self.folder) as building:
                self._write(building, nll, state)
        else:
            self.trainer.save_model(str(self.folder))
        ranks.wait()

    def _write(self, folder: Path, nll: float, state: TrainerState) -> None:
        self.trainer.save_model(str(folder))
        score = {"nll": nll, "epoch": state.epoch, "step": state.global_step}
        (folder / SCORE).write_text(json.dumps(score), encoding="utf-8")

    def _stored(self) -> float:
        path = self.folder / SCORE
        return read_json(path, ("nll",))["nll"] if path.is_file() else float("inf")

    def _score(self, model: nn.Module) -> float:
        was_training = model.training
        model.eval()
        with self.trainer.accelerator.autocast():  # as training does
            scored = [reply_nll(model, batch) for batch in self.loader]
        model.train(was_training)
        return float(sum(nll.sum() for nll, _ in scored) / sum(tokens.sum() for _, tokens in scored))

    def load(self) -> None:
        """Put the best state back into the model; ``UserError`` if no epoch's loss was finite."""
        if not (self.folder / SCORE).is_file():
            raise UserError(f"{self.folder.parent}: no epoch ended with a finite validation loss")
        load_parts(self.trainer.model, self.folder)
