"""Reads an experiment's YAML file and checks it before anything runs."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from train.config import TEXTS, TrainConfig, parse_override
from train.data.transcript import KEYS
from train.errors import UserError
from train.experiment.plan import Experiment, Method
from train.files import read_mapping, unknown_key


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
    name, _, setting = override.partition("=")[0].partition(".")
    hint = get_type_hints(TrainConfig).get(setting) if setting else get_type_hints(Experiment).get(name)
    key, value = parse_override(override, hint in TEXTS)
    group, dot, inner = key.partition(".")
    if dot and group != "train":
        raise UserError(f"override '{override}': expected key=value or train.key=value")
    target = values.setdefault("train", {}) if dot else values
    target[inner or group] = value


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
    source = {"transcript": _transcript(values, path), "columns": _columns(values.get("columns", {}), path)}
    pairs = tuple(_pair(pair, values["methods"], path) for pair in values.get("pairs", Experiment.pairs))
    draws = {key: _draws(key, values.get(key, getattr(Experiment, key)), path) for key in ("seeds", "splits")}
    for key, value in {**source, "splits": draws["splits"]}.items():
        if value != getattr(Experiment, key) and not people["responders"]:
            raise UserError(f"{path}: key '{key}': got {values[key]!r}, but no 'responders' to prepare")
    return Experiment(**{**values, "methods": methods, "pairs": pairs, **people, **source, **draws})


def _draws(key: str, value: Any, path: Path) -> tuple[int, ...]:
    is_list = isinstance(value, list | tuple) and value and all(type(draw) is int for draw in value)
    if not is_list or min(value) < 0 or len(set(value)) < len(value):
        raise UserError(
            f"{path}: key '{key}': got {value!r}, expected a list of distinct whole numbers, 0 or above"
        )
    return tuple(value)


def _transcript(values: dict[str, Any], path: Path) -> Path | None:
    value = values.get("transcript")
    if not isinstance(value, str | None):
        raise UserError(f"{path}: key 'transcript': got {value!r}, expected the path of a file")
    return Path(value) if value else None


def _columns(value: Any, path: Path) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise UserError(f"{path}: key 'columns': got {value!r}, expected a mapping to a CSV file's columns")
    for key in value:
        if key not in KEYS:
            raise unknown_key(key, KEYS, f"{path}: columns")
    return tuple(value.items())


def _names(key: str, value: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: key '{key}': got {value!r}, expected a list of names")
    return tuple(value)


def _pair(pair: Any, methods: dict[str, Any], path: Path) -> tuple[str, str]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise UserError(f"{path}: key 'pairs': got {pair!r}, expected two methods")
    for name in pair:
        if name not in methods:
            raise UserError(f"{path}: key 'pairs': '{name}' is not one of the methods ({', '.join(methods)})")
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
