"""Experts on disk: one safetensors file per querier, and ``index.json``, which says whose and of what base.

Files are named by their content and the index is replaced last, in one step: a crash at any point leaves
the previous index and the files it names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor, nn

INDEX = "index.json"
_SAMPLES = 64


def rows(model: nn.Module, index: int) -> dict[str, Tensor]:
    """The weights of one querier's expert in every layer, as views: name -> ``(R, H)`` or ``(H, R)``."""
    return {
        f"layers.{number}.{name}": getattr(layer.experts, name).data[index]
        for number, layer in enumerate(model.model.layers)
        if layer.experts is not None
        for name in ("gate", "up", "down")
    }


def fingerprint(model: nn.Module) -> str:
    """What a querier's expert depends on: every other parameter that takes part in answers.

    Hashes names, shapes and a sample of each, rounded to bf16, so that it does not depend on the dtype or
    device a model is loaded in.
    """
    digest = hashlib.sha256(model.qar.tower.encode())
    own = (".experts.gate", ".experts.up", ".experts.down")
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(own) or ".experts.trained." in name or name.startswith("contrast."):
            continue
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, len(values) // _SAMPLES)][:_SAMPLES].bfloat16().float().tolist()
        digest.update(json.dumps([name, list(parameter.shape), sample]).encode())
    return digest.hexdigest()


def save(model: nn.Module, folder: str | os.PathLike[str], queriers: Mapping[str, int]) -> None:
    """Write the experts of these queriers (name -> id) into ``folder``, beside those it has."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = fingerprint(model)
    files = _read_index(folder, base)["queriers"] if (folder / INDEX).exists() else {}
    before = set(files.values())
    state = model.state_dict()  # of a querier that trains alone, too, it has the latest values
    for name, index in queriers.items():
        tensors = {key: state[_bank_key(key)][index].contiguous().cpu() for key in rows(model, index)}
        content = serialize(tensors)
        files[name] = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        _write(folder / files[name], content)
    index = {"base": base, "queriers": files}
    _write(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False).encode())
    for stale in before - set(files.values()):
        (folder / stale).unlink(missing_ok=True)


def load(
    model: nn.Module, folder: str | os.PathLike[str], names: list[str] | None
) -> dict[str, dict[str, Tensor]]:
    """The checked experts of these queriers (default: all), name -> tensors as :func:`rows` names them."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ValueError(f"folder: got {folder}, expected a folder with {INDEX}, written by save_experts")
    files = _read_index(folder, fingerprint(model))["queriers"]
    unknown = [name for name in names or () if name not in files]
    if unknown:
        raise ValueError(f"queriers: got {unknown}, expected names of {sorted(files)}")
    expected = {key: tensor.shape for key, tensor in rows(model, 0).items()}
    return {name: _read(folder / files[name], name, expected) for name in names or files}


def _bank_key(key: str) -> str:
    layer, name = key.rsplit(".", 1)
    return f"model.{layer}.experts.{name}"


def _read_index(folder: Path, base: str) -> dict[str, Any]:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if index["base"] != base:
        raise ValueError(
            f"{folder / INDEX}: got experts of base model {index['base'][:12]}, expected {base[:12]}; "
            "experts fit only the base model, tower and adapters they were trained with"
        )
    return index


def _read(path: Path, name: str, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    content = path.read_bytes() if path.is_file() else b""
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
    """The whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
