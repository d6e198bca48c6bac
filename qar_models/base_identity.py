"""What an expert was trained beside, and whether a model has the same: stored with experts on disk."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SAMPLES = 16  # of each weight
_VOCABULARY = re.compile(r"(^|\.)(embed_tokens|lm_head)\.(.*\.)?weight$")


def _vocabulary_sample(weight: Tensor) -> Tensor:
    """A value out of each row 0, 1, 2, 4, 8, ...: tokens that are added only append some."""
    rows, columns = weight.shape
    at = torch.tensor([0, *(1 << power for power in range(max(rows - 1, 0).bit_length()))])
    return weight[at, at % columns].cpu().float()


def weight_sample(weight: Tensor) -> Tensor:
    """Up to 16 evenly spaced values of a tensor, by which it is recognised later: float32, on the CPU."""
    values = _values(weight).reshape(-1)
    return values[:: max(1, len(values) // _SAMPLES)][:_SAMPLES].cpu().float()


@dataclass(frozen=True)
class Base:
    """What a querier's expert depends on: every other parameter that takes part in answers.

    Attributes:
        settings: ``tower`` and ``expert_scale``.
        dtype: the coarsest floating-point dtype of the weights, such as ``"bfloat16"``.
        weights: name -> what it is, such as ``"64x160"`` or ``"64x160 Int8Params"``, and its sample.
    """

    settings: dict[str, Any]
    dtype: str
    weights: dict[str, tuple[str, Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> Base:
        """The base of ``model``'s experts, whatever dtype and device it is loaded in."""
        parameters = _parameters(model)
        settings = {"tower": model.qar.tower, "expert_scale": model.qar.expert_scale}
        weights = {name: _recognised(name, parameter) for name, parameter in parameters.items()}
        return cls(settings, _coarsest(parameters), weights)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Base:
        """The inverse of :meth:`to_json`."""
        settings = {key: values[key] for key in ("tower", "expert_scale")}
        parts = {name: text.rpartition(" ") for name, text in values["weights"].items()}
        weights = {name: (kind, _decoded(sample)) for name, (kind, _, sample) in parts.items()}
        return cls(settings, _known(values["dtype"]), weights)

    def to_json(self) -> dict[str, Any]:
        """As it is stored in the index."""
        weights = {name: f"{kind} {_encoded(sample)}" for name, (kind, sample) in self.weights.items()}
        return {**self.settings, "dtype": self.dtype, "weights": weights}

    def difference(self, saved: Base, check_weights: bool = True) -> str | None:
        """What ``saved`` has that this base has not, if more than rounding to the coarser dtype differs."""
        for key, value in saved.settings.items():
            if value != self.settings[key]:
                return f"{key}={value!r}"
        if not check_weights:
            return None
        for name in sorted(saved.weights.keys() ^ self.weights.keys()):
            return f"{'a' if name in saved.weights else 'no'} weight {name}"
        for name, (kind, _) in saved.weights.items():
            if kind != self.weights[name][0]:
                return f"{name} of {kind}, not {self.weights[name][0]}"
        for name, (kind, sample) in saved.weights.items():
            own = self.weights[name][1]
            if kind.startswith("*"):  # of the tokens that both have
                sample, own = sample[: len(own)], own[: len(sample)]
            if not _close(sample, own, saved.dtype, self.dtype):
                return f"other values in {name}"
        return None


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """All that answers depend on, except each querier's own expert."""
    own = (".experts.gate", ".experts.up", ".experts.down")
    return {
        name: parameter
        for name, parameter in sorted(model.named_parameters())
        if not (name.endswith(own) or ".experts.trained." in name or name.startswith("contrast."))
    }


def _recognised(name: str, weight: Tensor) -> tuple[str, Tensor]:
    kind = "" if _is_plain(weight) else f" {type(weight).__name__}"
    if hasattr(weight, "quant_state"):  # bitsandbytes packs 4-bit weights anew when they are first used
        return _product(weight.quant_state.shape) + kind, torch.empty(0)
    if _VOCABULARY.search(name):  # tokens may be added
        return _product(("*", *weight.shape[1:])) + kind, _vocabulary_sample(_values(weight))
    return _product(weight.shape) + kind, weight_sample(weight)


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def _values(weight: Tensor) -> Tensor:
    """Without a graph; of torchao's quantised weights, which have no views, what they stand for."""
    return weight.detach() if _is_plain(weight) else weight.detach().dequantize()


def _product(shape: tuple[int | str, ...]) -> str:
    return "x".join(map(str, shape))


def _coarsest(parameters: dict[str, Tensor]) -> str:
    # quantised weights are integers, which are exact
    floating = {parameter.dtype for parameter in parameters.values() if parameter.is_floating_point()}
    return str(max(floating, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")


def _known(dtype: str) -> str:
    torch.finfo(getattr(torch, dtype))
    return dtype


def _close(sample: Tensor, other: Tensor, *dtypes: str) -> bool:
    eps = max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)
    # the steps between float16's numbers stop shrinking below the smallest normal one
    return sample.shape == other.shape and torch.allclose(sample, other, rtol=eps, atol=2**-24)


def _encoded(sample: Tensor) -> str:
    return base64.b64encode(sample.numpy().astype("<f4").tobytes()).decode()


def _decoded(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())
