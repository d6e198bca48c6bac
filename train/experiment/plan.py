"""What an experiment compares: methods, under seeds and on splits, and the settings that they share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from train.config import TrainConfig, config_from
from train.data.dialogue import PLAY_THRESHOLDS
from train.data.prepare import PLAYS, PrepareConfig, prepare


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: the row's key in results.
        trained: False for prompting the base model.
        changes: keys of :class:`train.config.TrainConfig` that this method sets.
    """

    name: str
    trained: bool
    changes: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One method under one seed on one split: the unit that is computed, kept and resumed."""

    method: Method
    seed: int
    split: int = 0

    @property
    def name(self) -> str:
        """The cell's name in files and logs."""
        return f"{self.method.name}-seed{self.seed}{_suffix(self.split)}"


def _suffix(split: int) -> str:
    return f"-split{split}" if split else ""


@dataclass(frozen=True)
class Experiment:
    """A whole comparison.

    Attributes:
        output_dir: where cells and results go.
        train: the settings that all methods share, as keys of :class:`train.config.TrainConfig`.
        methods: rows of the table, in order.
        seeds: every trained method runs once under each; untrained ones run under the first only.
        generated: how many held-out windows are answered for ROUGE and BLEU (NLL takes all of them).
        max_new_tokens: of a generated reply.
        pairs: the paired differences, as (method, compared with).
        responders: whose dialogues are prepared first; if there are none, ``train`` names the ``data``.
        transcript: where ``responders`` speak (:mod:`train.data.transcript`); None: Shakespeare's plays.
        columns: pairs for a CSV ``transcript``: scene, speaker or text, and the name of its column.
        queriers: the only people who ask ``responders``; if empty, all who have ``min_dialogues``.
        min_dialogues: how many dialogues with a responder make somebody a querier.
        splits: seeds that draw which dialogues of ``responders`` are held out; everything runs on each.
    """

    output_dir: str
    train: dict[str, Any]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    generated: int = 64
    max_new_tokens: int = 32
    pairs: tuple[tuple[str, str], ...] = (("qar", "ft"),)
    responders: tuple[str, ...] = ()
    transcript: Path | None = None
    columns: tuple[tuple[str, str], ...] = ()
    queriers: tuple[str, ...] = ()
    min_dialogues: int = PLAY_THRESHOLDS.min_dialogues
    splits: tuple[int, ...] = (0,)

    @property
    def show(self) -> str:
        """The show that ``responders`` belong to."""
        return self.transcript.stem if self.transcript else PLAYS

    def prepared(self, split: int) -> Path:
        """Where the data of ``responders`` goes."""
        return Path(self.output_dir) / f"data{_suffix(split)}"

    def prepare(self) -> None:
        """Build the data of ``responders`` unless it is there."""
        shared = PrepareConfig(
            self.show,
            transcript=self.transcript,
            columns=self.columns,
            queriers=self.queriers,
            thresholds=dataclasses.replace(PLAY_THRESHOLDS, min_dialogues=self.min_dialogues),
        )
        for split, responder in product(self.splits, self.responders):
            prepare(dataclasses.replace(shared, responder=responder, out=self.prepared(split), seed=split))

    def cells(self) -> list[Cell]:
        """All cells, split by split and seed by seed, so that those before a stop can be compared."""
        return [
            Cell(method, seed, split)
            for split, seed in product(self.splits, self.seeds)
            for method in self.methods
            if method.trained or seed == self.seeds[0]
        ]

    def config(self, cell: Cell) -> TrainConfig:
        """The configuration of a cell's training run."""
        values = {**self.train, **cell.method.changes, "seed": cell.seed}
        if self.responders:
            values["data"] = str(self.prepared(cell.split) / self.show)
        values["output_dir"] = str(Path(self.output_dir) / "cells" / cell.name)
        return config_from(values, f"method '{cell.method.name}'")
