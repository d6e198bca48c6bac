"""What an experiment compares: methods, under seeds and on splits, and the settings that they share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.data.dialogue import PLAY_THRESHOLDS, Thresholds
from train.data.prepare import PLAYS, PrepareConfig, prepare
from train.data.transcript import KEYS
from train.errors import UserError
from train.files import unknown_key
from train.settings import config_from


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

    def __post_init__(self) -> None:
        if "_vs_" in self.name:
            raise UserError("'_vs_' joins two methods' names in the results")
        for key in ("seed", "output_dir"):
            if key in self.changes:
                raise UserError(f"'{key}' is set for each cell, not by a method")


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
        columns: of a CSV ``transcript``: the names of the columns of scene, speaker and text.
        queriers: the only people who ask ``responders``; if empty, all who have as many turns and dialogues.
        min_turns, min_dialogues: how many with a responder make somebody a querier. The defaults suit the
            plays; ``train.data.build`` asks for 70 and 20 (the paper).
        clusters: of the queries, for the contrastive loss.
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
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    queriers: tuple[str, ...] = ()
    min_turns: int = PLAY_THRESHOLDS.min_turns
    min_dialogues: int = PLAY_THRESHOLDS.min_dialogues
    clusters: int = PrepareConfig.num_clusters
    splits: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for key in ("generated", "max_new_tokens", "min_turns", "min_dialogues", "clusters"):
            if getattr(self, key) < 1:
                raise UserError(f"key '{key}': got {getattr(self, key)}, expected at least 1")
        for key in ("seeds", "splits"):
            draws = list(getattr(self, key))
            if not draws or min(draws) < 0 or len(set(draws)) < len(draws):
                raise UserError(
                    f"key '{key}': got {draws}, expected a list of distinct whole numbers, 0 or above"
                )
        for key in self.columns:
            if key not in KEYS:
                raise unknown_key(key, KEYS, "columns")
        sources = {
            "transcript": self.transcript and str(self.transcript),
            "columns": self.columns,
            "splits": list(self.splits) if self.splits != (0,) else None,
        }
        for key, value in sources.items():
            if value and not self.responders:
                raise UserError(f"key '{key}': got {value!r}, but no 'responders' to prepare")

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
            columns=tuple(self.columns.items()),
            queriers=self.queriers,
            num_clusters=self.clusters,
            thresholds=Thresholds(self.min_turns, self.min_dialogues),
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
        return config_from(TrainConfig, values, f"method '{cell.method.name}'")
