"""Methods side by side on the same held-out windows of one responder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from train.config import TrainConfig
from train.data.layout import MQDialog
from train.heldout import SAMPLE_SEED, HeldOut, held_out_windows, querier_similarity, score
from train.trained import Trained, load_trained, untrained

METHODS = ("zero_shot", "ft", "qar")
GENERATED = 32
MAX_NEW_TOKENS = 32
SAMPLES, ASKED_BY = 4, 4


class Comparison:
    """Scores of methods whose runs share everything but the method.

    Args:
        config: what the runs share.
        data: the responder's dialogues.
        run_of: the configuration of a trained method's run.
    """

    def __init__(self, config: TrainConfig, data: MQDialog, run_of: Callable[[str], TrainConfig]) -> None:
        self.config, self.data, self.run_of = config, data, run_of

    @cached_property
    def held_out(self) -> HeldOut:
        """The held-out windows, with the states below the trained layers."""
        return held_out_windows(self.config, self.data)

    def load(self, method: str) -> Trained:
        """The model of a method."""
        if method == "zero_shot":
            return untrained(self.config, self.data.responder, tuple(self.data.queriers))
        folder = Path(self.run_of(method).output_dir) / "trained"
        return load_trained(folder, torch.float32)  # scored as the untrained is

    def evaluate(self, method: str) -> dict[str, Any]:
        """Records of every held-out window; for QAR also under swapped ids, expert similarity, samples."""
        trained, held_out = self.load(method), self.held_out
        records, swapped = score(trained, held_out, GENERATED, MAX_NEW_TOKENS)
        result: dict[str, Any] = {"records": records}
        if method == "qar":
            model, names = trained.model, self.data.queriers
            result["swapped"] = swapped
            result["similarity"] = {"names": names, "matrix": querier_similarity(model, held_out)}
            answered = held_out.sample(GENERATED, SAMPLE_SEED)
            result["samples"] = self.samples(model, answered[:: max(1, len(answered) // SAMPLES)])
        return result

    def replies(self, model: Any) -> tuple[list[str], list[int]]:
        """A reply to every held-out window, and who asked."""
        indices = range(len(self.held_out.windows))
        asked_by = self.held_out.querier_ids
        return self.held_out.generate(model, indices, asked_by, MAX_NEW_TOKENS), asked_by

    def samples(self, model: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A few of these windows' queries, each answered to several queriers in one mixed batch."""
        frequent = [name for name, _ in Counter(e.querier for e in self.data.train).most_common(ASKED_BY)]
        chosen = indices[:SAMPLES]
        askers = [self._askers(self.held_out.examples[index].querier, frequent) for index in chosen]
        flat = [(index, name) for index, names in zip(chosen, askers, strict=True) for name in names]
        ids = [self.data.queriers.index(name) for _, name in flat]
        replies = iter(self.held_out.generate(model, [index for index, _ in flat], ids, MAX_NEW_TOKENS))
        samples = []
        for index, names in zip(chosen, askers, strict=True):
            example = self.held_out.examples[index]
            samples.append(
                {
                    "history": [{"from": turn.speaker, "value": turn.text} for turn in example.turns[:-2]],
                    "query": example.query,
                    "reference": example.reply,
                    "asked_by": example.querier,
                    "answers": {name: next(replies) for name in names},
                }
            )
        return samples

    @staticmethod
    def _askers(true: str, frequent: Sequence[str]) -> list[str]:
        return [true, *(name for name in frequent if name != true)][:ASKED_BY]
