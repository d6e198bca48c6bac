"""Experts on disk: one safetensors file per querier, and ``index.json``, with names and the base model.

Files are named by their content, and the index is replaced last, in one step: a crash at any point leaves
the previous index and the files it names. Writers take turns (``.lock``); readers do not wait for them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor, nn

INDEX, LOCK = "index.json", ".lock"
_EXPERT = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.\d+)?")  # also half written
_SAMPLES = 16  # of each weight


def rows(model: nn.Module, index: int) -> dict[str, Tensor]:
    """The weights of one querier's expert in every layer, as views: name -> ``(R, H)`` or ``(H, R)``."""
    return {
        f"layers.{number}.{name}": getattr(layer.experts, name).detach()[index]
        for number, layer in enumerate(model.model.layers)
        if layer.experts is not None
        for name in ("gate", "up", "down")
    }


def weight_sample(weight: Tensor) -> Tensor:
    """Up to 16 evenly spaced values of a tensor, by which it is recognised later: float32, on the CPU."""
    values = weight.detach().reshape(-1)
    return values[:: max(1, len(values) // _SAMPLES)][:_SAMPLES].cpu().float()


class _MissingError(ValueError):
    """An expert's file is not there."""


@dataclass(frozen=True)
class Base:
    """What a querier's expert depends on: every other parameter that takes part in answers.

    Attributes:
        names: hash of the tower, the experts' scale, and the parameters' names and shapes.
        dtype: the coarsest floating-point dtype among them, such as ``"bfloat16"``.
        sample: the :func:`weight_sample` of each, one after the other.
    """

    names: str
    dtype: str
    sample: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> Base:
        """The base of ``model``'s experts, whatever dtype and device it is loaded in."""
        own = (".experts.gate", ".experts.up", ".experts.down")
        parameters = [
            (name, parameter.detach())
            for name, parameter in sorted(model.named_parameters())
            if not (name.endswith(own) or ".experts.trained." in name or name.startswith("contrast."))
        ]
        shapes = [[name, list(parameter.shape)] for name, parameter in parameters]
        names = hashlib.sha256(
            json.dumps([model.qar.tower, model.qar.expert_scale, shapes]).encode()
        ).hexdigest()
        floating = {parameter.dtype for _, parameter in parameters if parameter.is_floating_point()}
        # quantised weights are integers, which are exact
        coarsest = max(floating, key=lambda d: torch.finfo(d).eps)
        samples = [weight_sample(parameter) for _, parameter in parameters]
        return cls(names, str(coarsest).removeprefix("torch."), torch.cat(samples))

    @classmethod
    def from_json(cls, values: dict[str, str]) -> Base:
        """The inverse of :meth:`to_json`."""
        sample = np.frombuffer(base64.b64decode(values["sample"]), dtype="<f4")
        return cls(values["names"], values["dtype"], torch.from_numpy(sample.copy()))

    def to_json(self) -> dict[str, str]:
        """As it is stored in the index."""
        sample = base64.b64encode(self.sample.numpy().astype("<f4").tobytes()).decode()
        return {"names": self.names, "dtype": self.dtype, "sample": sample}

    def fits(self, other: Base) -> bool:
        """Whether both are equal up to the rounding of the coarser dtype."""
        if self.names != other.names:
            return False
        eps = max(torch.finfo(getattr(torch, dtype)).eps for dtype in (self.dtype, other.dtype))
        # the steps between float16's numbers stop shrinking below the smallest normal one
        return torch.allclose(self.sample, other.sample, rtol=eps, atol=2**-24)


def save(model: nn.Module, folder: str | os.PathLike[str], queriers: Mapping[str, int]) -> None:
    """Write the experts of these queriers (name -> id) into ``folder``, beside those it has.

    If that fails, as on a full disk, the folder holds the files that it held before.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = Base.of(model)
    state = model.state_dict()  # with the latest values of queriers in train_only, too
    with _changing(folder, base) as files:
        for name, index in queriers.items():
            tensors = {key: state[_bank_key(key)][index].contiguous().cpu() for key in rows(model, index)}
            content = serialize(tensors)
            files[name] = f"{hashlib.sha256(content).hexdigest()}.safetensors"
            _write(folder / files[name], content)


@contextmanager
def _changing(folder: Path, base: Base) -> Iterator[dict[str, str]]:
    """Wait for one's turn. The files of the index may be changed, and those that it does not name go."""
    with FileLock(folder / LOCK):
        files = _read_index(folder, base)["queriers"] if (folder / INDEX).exists() else {}
        try:
            yield files
            index = {"base": base.to_json(), "queriers": files}
            _write(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False).encode())
        finally:
            _remove_unnamed(folder)


def _remove_unnamed(folder: Path) -> None:
    """After a change that succeeded: the experts that were replaced; after one that failed: the new ones."""
    index = folder / INDEX
    named = set(json.loads(index.read_text("utf-8"))["queriers"].values()) if index.exists() else ()
    for path in folder.iterdir():
        if _EXPERT.fullmatch(path.name) and path.name not in named:
            path.unlink()


def load(
    model: nn.Module, folder: str | os.PathLike[str], names: list[str] | None
) -> dict[str, dict[str, Tensor]]:
    """The checked experts of these queriers (default: all), name -> tensors as :func:`rows` names them."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ValueError(f"folder: got {folder}, expected a folder with {INDEX}, written by save_experts")
    base = Base.of(model)
    expected = {key: tensor.shape for key, tensor in rows(model, 0).items()}
    files = _read_index(folder, base)["queriers"]
    while True:
        try:
            return _read_all(folder, files, names, expected)
        except _MissingError:
            latest = _read_index(folder, base)["queriers"]
            if latest == files:
                raise
            files = latest  # somebody has replaced an expert meanwhile


def _read_all(
    folder: Path, files: Mapping[str, str], names: list[str] | None, expected: Mapping[str, torch.Size]
) -> dict[str, dict[str, Tensor]]:
    names = list(files) if names is None else names
    unknown = [name for name in names if name not in files]
    if unknown or not names:
        raise ValueError(f"queriers: got {unknown}, expected names of {sorted(files)}")
    return {name: _read(folder / files[name], name, expected) for name in names}


def _bank_key(key: str) -> str:
    layer, name = key.rsplit(".", 1)
    return f"model.{layer}.experts.{name}"


def _read_index(folder: Path, base: Base) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = Base.from_json(index["base"])
        torch.finfo(getattr(torch, found.dtype))
        if not all(isinstance(file, str) for file in dict(index["queriers"]).values()):
            raise TypeError("queriers: expected names of files")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}), expected an index that save_experts wrote") from error
    if not found.fits(base):
        kind = (
            "other values" if found.names == base.names else "another architecture, tower, scale or adapters"
        )
        raise ValueError(
            f"{path}: got experts of a base model with {kind}, expected this one's; experts fit only the "
            "base model, tower, scale and adapters they were trained with"
        )
    return index


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
