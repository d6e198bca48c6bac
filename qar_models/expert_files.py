"""Experts on disk: one safetensors file per querier, and ``index.json``, with names and the base model.

Files are named by their content, and the index is replaced last, in one step: a crash at any point leaves
the previous index and the files it names. Writers take turns (``.lock``); readers do not wait for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor, nn
from transformers.utils import logging

from qar_models.base_identity import Base
from qar_models.config import few

INDEX, LOCK = "index.json", ".lock"
_PATIENCE = 10, 600  # seconds until the wait for a lock is logged, and until it ends
logger = logging.get_logger(__name__)
_EXPERT = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.\d+)?")  # also half written


def rows(model: nn.Module, index: int) -> dict[str, Tensor]:
    """The weights of one querier's expert in every layer, as views: name -> ``(R, H)`` or ``(H, R)``."""
    return {
        f"layers.{number}.{name}": getattr(layer.experts, name).detach()[index]
        for number, layer in enumerate(model.model.layers)
        if layer.experts is not None
        for name in ("gate", "up", "down")
    }


class _MissingError(ValueError):
    """An expert's file is not there."""


def save(model: nn.Module, folder: str | os.PathLike[str], queriers: Mapping[str, int]) -> None:
    """Write the experts of these queriers (name -> id) into ``folder``, beside those it has.

    If that fails, as on a full disk, the folder holds the files that it held before.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # with the latest values in train_only; not the model's, which bitsandbytes' weights do not bear
    states = {
        number: layer.experts.state_dict()
        for number, layer in enumerate(model.model.layers)
        if layer.experts is not None
    }
    with _changing(folder) as index:
        if index:
            _check_base(folder, index, model)
        index["base"] = Base.of(model).to_json()
        files = index.setdefault("queriers", {})
        for name, row in queriers.items():
            tensors = {
                f"layers.{number}.{part}": state[part][row].contiguous().cpu()
                for number, state in states.items()
                for part in ("gate", "up", "down")
            }
            content = serialize(tensors)
            files[name] = f"{hashlib.sha256(content).hexdigest()}.safetensors"
            _write(folder / files[name], content)


@contextmanager
def _changing(folder: Path) -> Iterator[dict[str, Any]]:
    """Wait for one's turn. The index may be changed, and the files that it does not name go."""
    with _locked(folder):
        index = _read_index(folder) if (folder / INDEX).exists() else {}
        try:
            yield index
            _write(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False).encode())
        finally:
            _remove_unnamed(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Whoever may write into the folder may lock it."""
    path = folder / LOCK
    lock = FileLock(path, mode=folder.stat().st_mode & 0o666)
    until_logged, until_given_up = _PATIENCE
    try:
        try:
            lock.acquire(timeout=until_logged)
        except Timeout:
            logger.warning(f"{path}: waiting for another process that is saving experts")
            lock.acquire(timeout=until_given_up)
    except Timeout as error:
        raise TimeoutError(
            f"{path}: still locked after {sum(_PATIENCE)} s; delete it if no process is saving experts"
        ) from error
    try:
        yield
    finally:
        lock.release()


def delete_experts(folder: str | os.PathLike[str], queriers: str | Sequence[str]) -> None:
    """Delete the experts of these queriers from a folder that ``save_experts`` wrote, files and names.

    Args:
        folder: what ``save_experts`` was given.
        queriers: one name or several.

    Raises:
        ValueError: if ``folder`` is no such folder or lacks a name; it is then unchanged.
    """
    folder, names = Path(folder), [queriers] if isinstance(queriers, str) else list(queriers)
    _check_folder(folder)
    with _changing(folder) as index:
        _check_known(names, index["queriers"])
        for name in set(names):
            del index["queriers"][name]


def _remove_unnamed(folder: Path) -> None:
    """After a change that succeeded: the experts that were replaced; after one that failed: the new ones."""
    index = folder / INDEX
    named = set(json.loads(index.read_text("utf-8"))["queriers"].values()) if index.exists() else ()
    for path in folder.iterdir():
        if _EXPERT.fullmatch(path.name) and path.name not in named:
            path.unlink()


def load(
    model: nn.Module, folder: str | os.PathLike[str], names: list[str] | None, check_base: bool
) -> dict[str, dict[str, Tensor]]:
    """The checked experts of these queriers (default: all), name -> tensors as :func:`rows` names them."""
    folder = Path(folder)
    _check_folder(folder)
    index = _read_index(folder)
    _check_base(folder, index, model, check_base)
    expected = {key: tensor.shape for key, tensor in rows(model, 0).items()}
    while True:
        try:
            return _read_all(folder, index["queriers"], names, expected)
        except _MissingError:
            latest = _read_index(folder)
            if latest == index:
                raise
            index = latest  # somebody has replaced an expert meanwhile


def _read_all(
    folder: Path, files: Mapping[str, str], names: list[str] | None, expected: Mapping[str, torch.Size]
) -> dict[str, dict[str, Tensor]]:
    names = list(files) if names is None else names
    _check_known(names, files)
    return {name: _read(folder / files[name], name, expected) for name in names}


def _check_known(names: list[str], files: Mapping[str, str]) -> None:
    unknown = [name for name in names if name not in files]
    if unknown or not names:
        raise ValueError(f"queriers: got {few(unknown)}, expected names of {few(sorted(files))}")


def _check_folder(folder: Path) -> None:
    if not (folder / INDEX).is_file():
        raise ValueError(f"folder: got {folder}, expected a folder with {INDEX}, written by save_experts")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        Base.from_json(index["base"])
        if not all(isinstance(file, str) for file in dict(index["queriers"]).values()):
            raise TypeError("queriers: expected names of files")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}), expected an index that save_experts wrote") from error
    return index


def _check_base(folder: Path, index: dict[str, Any], model: nn.Module, check_weights: bool = True) -> None:
    difference = Base.of(model).difference(Base.from_json(index["base"]), check_weights)
    if difference is not None:
        raise ValueError(
            f"{folder / INDEX}: got experts of a base model with {difference}, expected this one's; experts "
            "fit only the base model, tower, scale and adapters they were trained with. If this is that "
            "model, merged or quantised, load_experts(..., check_base=False) takes them"
        )


def _read(path: Path, name: str, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _MissingError(f"{path}: missing, expected the whole expert of {name!r}; damaged") from None
    if f"{hashlib.sha256(content).hexdigest()}.safetensors" != path.name:
        raise ValueError(f"{path}: got {len(content)} bytes, expected the whole expert of {name!r}; damaged")
    tensors = parse(content)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    if shapes != expected:
        wrong = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        raise ValueError(
            f"{path}: got {wrong[0]} {tuple(shapes.get(wrong[0], ()))}, "
            f"expected {tuple(expected.get(wrong[0], ()))}, in the expert of {name!r}"
        )
    return tensors


def _write(path: Path, content: bytes) -> None:
    """Write the whole file or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
