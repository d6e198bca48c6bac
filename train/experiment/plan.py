"""What an experiment compares: a YAML file of shared settings, seeds and methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from train.config import TrainConfig, config_from, override_value
from train.data.dialogue import PLAY_THRESHOLDS
from train.data.prepare import PLAYS, PrepareConfig, prepare
from train.errors import UserError
from train.files import read_mapping, unknown_key


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
    """One method under one seed, on one split; what an experiment computes, keeps and resumes."""

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
        train: what all methods share, as keys of :class:`train.config.TrainConfig`.
        methods: rows of the table, in order.
        seeds: every trained method runs once under each; prompting runs under the first.
        generated: held-out windows that are answered for ROUGE and BLEU (all are scored for NLL).
        max_new_tokens: of a generated reply.
        pairs: (method, compared with) of the paired differences.
        responders: of Shakespeare's plays, whose dialogues are prepared first; without them ``train`` names
            the ``data``.
        queriers: of ``responders``, these people only; without them all who have ``min_dialogues``.
        min_dialogues: that a querier must have with a responder to be one.
        splits: draws of which dialogues of ``responders`` are held out; everything runs on each.
    """

    output_dir: str
    train: dict[str, Any]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    generated: int = 64
    max_new_tokens: int = 32
    pairs: tuple[tuple[str, str], ...] = (("qar", "ft"),)
    responders: tuple[str, ...] = ()
    queriers: tuple[str, ...] = ()
    min_dialogues: int = PLAY_THRESHOLDS.min_dialogues
    splits: tuple[int, ...] = (0,)

    def prepared(self, split: int) -> Path:
        """Where the data of ``responders`` goes."""
        return Path(self.output_dir) / f"data{_suffix(split)}"

    def prepare(self) -> None:
        """Build the data of ``responders``, or find it built."""
        thresholds = dataclasses.replace(PLAY_THRESHOLDS, min_dialogues=self.min_dialogues)
        for split, responder in product(self.splits, self.responders):
            people = {"responder": responder, "queriers": self.queriers, "thresholds": thresholds}
            prepare(PrepareConfig(PLAYS, out=self.prepared(split), seed=split, **people))

    def cells(self) -> list[Cell]:
        """Every cell, split by split and seed by seed: a stopped experiment holds whole comparisons."""
        return [
            Cell(method, seed, split)
            for split, seed in product(self.splits, self.seeds)
            for method in self.methods
            if method.trained or seed == self.seeds[0]
        ]

    def config(self, cell: Cell) -> TrainConfig:
        """The training run of a cell."""
        values = {**self.train, **cell.method.changes, "seed": cell.seed}
        if self.responders:
            values["data"] = str(self.prepared(cell.split) / PLAYS)
        values["output_dir"] = str(Path(self.output_dir) / "cells" / cell.name)
        return config_from(values, f"method '{cell.method.name}'")


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment's YAML file; ``overrides`` are ``key=value``, or ``train.key=value`` (shared keys).

    Raises:
        UserError: naming the file and the key that is unknown, missing or wrong, for every method.
    """
    values = read_mapping(path)
    for override in overrides:
        _override(values, override)
    experiment = _checked(values, path)
    for cell in experiment.cells():
        experiment.config(cell)
    return experiment


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"override '{override}': expected key=value")
    group, dot, inner = key.partition(".")
    if dot and group != "train":
        raise UserError(f"override '{override}': expected key=value or train.key=value")
    target = values.setdefault("train", {}) if dot else values
    target[inner or group] = override_value(override, value)


def _checked(values: dict[str, Any], path: Path) -> Experiment:
    known = [field.name for field in fields(Experiment)]
    for key in values:
        if key not in known:
            raise unknown_key(key, known, str(path))
    for key in ("output_dir", "train", "methods"):
        if key not in values:
            raise UserError(f"{path}: key '{key}' is missing")
    if not isinstance(values["output_dir"], str):
        raise UserError(f"{path}: key 'output_dir': got {values['output_dir']!r}, expected a path")
    for key in ("train", "methods"):
        if not isinstance(values[key], dict) or not values[key]:
            raise UserError(f"{path}: key '{key}': got {values[key]!r}, expected a mapping")
    for key in ("generated", "max_new_tokens", "min_dialogues"):
        if type(values.get(key, 1)) is not int or values.get(key, 1) < 1:
            raise UserError(f"{path}: key '{key}': got {values[key]!r}, expected a whole number above 0")
    methods = tuple(_method(name, changes, path) for name, changes in values["methods"].items())
    people = {key: _names(key, values.get(key, ()), path) for key in ("responders", "queriers")}
    pairs = tuple(_pair(pair, values["methods"], path) for pair in values.get("pairs", Experiment.pairs))
    draws = {key: _draws(key, values.get(key, getattr(Experiment, key)), path) for key in ("seeds", "splits")}
    if draws["splits"] != Experiment.splits and not people["responders"]:
        raise UserError(
            f"{path}: key 'splits': got {values['splits']!r}, but only 'responders' are split anew"
        )
    return Experiment(**{**values, "methods": methods, "pairs": pairs, **people, **draws})


def _draws(key: str, value: Any, path: Path) -> tuple[int, ...]:
    is_list = isinstance(value, list | tuple) and value and all(type(draw) is int for draw in value)
    if not is_list or min(value) < 0 or len(set(value)) < len(value):
        raise UserError(
            f"{path}: key '{key}': got {value!r}, expected a list of different whole numbers from 0"
        )
    return tuple(value)


def _names(key: str, value: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: key '{key}': got {value!r}, expected a list of names")
    return tuple(value)


def _pair(pair: Any, methods: dict[str, Any], path: Path) -> tuple[str, str]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise UserError(f"{path}: key 'pairs': got {pair!r}, expected two methods")
    for name in pair:
        if name not in methods:
            raise UserError(f"{path}: key 'pairs': '{name}' is none of the methods ({', '.join(methods)})")
    return pair[0], pair[1]


def _method(name: str, changes: Any, path: Path) -> Method:
    changes = {} if changes is None else changes
    if "_vs_" in str(name):
        raise UserError(f"{path}: method '{name}': '_vs_' joins two methods' names in the results")
    if not isinstance(changes, dict):
        raise UserError(f"{path}: method '{name}': got {changes!r}, expected a mapping of keys to values")
    changes = dict(changes)
    trained = changes.pop("trained", True)
    if not isinstance(trained, bool):
        raise UserError(f"{path}: method '{name}': trained is {trained!r}, expected true or false")
    for key in ("seed", "output_dir"):
        if key in changes:
            raise UserError(f"{path}: method '{name}': '{key}' is set for each cell, not by a method")
    return Method(str(name), trained, changes)
