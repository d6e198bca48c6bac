"""Reads an experiment's YAML file and checks it before anything runs."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

from train.config import TrainConfig
from train.errors import UserError
from train.experiment.plan import Experiment, Method
from train.files import read_mapping
from train.settings import TEXTS, config_from, parse_override


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment's YAML file; ``overrides`` are ``key=value``, or ``train.key=value`` (shared keys).

    Raises:
        UserError: naming the file and the key that is unknown, missing or wrong, for every method.
    """
    values = read_mapping(path)
    for override in overrides:
        _override(values, override)
    if "methods" in values:
        values["methods"] = _methods(values["methods"], path)
    experiment = config_from(Experiment, values, str(path))
    names = [method.name for method in experiment.methods]
    for name in chain(*experiment.pairs):
        if name not in names:
            raise UserError(f"{path}: key 'pairs': '{name}' is not one of the methods ({', '.join(names)})")
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


def _methods(value: Any, path: Path) -> list[Method]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: key 'methods': got {value!r}, expected a mapping")
    return [_method(str(name), changes, f"{path}: method '{name}'") for name, changes in value.items()]


def _method(name: str, changes: Any, origin: str) -> Method:
    if not isinstance(changes, dict | None):
        raise UserError(f"{origin}: got {changes!r}, expected a mapping of keys to values")
    changes = dict(changes or {})
    values = {"name": name, "trained": changes.pop("trained", True), "changes": changes}
    return config_from(Method, values, origin)
