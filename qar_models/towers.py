"""How the two towers share one batch and one cache.

B sequences, S tokens. In the ``replace`` tower a batch runs as 2B rows, *interleaved*: row ``2b`` is
sequence ``b`` in the general tower, row ``2b + 1`` the same sequence in the specific tower. Interleaving
(instead of stacking) makes ``(2B, heads, ...)`` and ``(B, 2 * heads, ...)`` the same memory, so that the
key-value cache can hold both towers as two groups of heads of B rows, and every cache operation
(beam reordering, cropping, repeating) keeps working on B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from qar_kernels import Segments


@dataclass(frozen=True, eq=False)
class TowerBatch:
    """Which expert each of the batch's rows goes through: made once per forward pass, for all layers.

    Attributes:
        segments: the expert of each of the B * S rows.
        batch_size: B, sequences as the caller sees them.
        trained: rows of the queriers whose experts train alone (:class:`TrainedExperts`), by their place
            among the trained; ``segments`` leaves them out.
        may_be_unknown: False where the host knows that no row's querier is -1 (unknown).
    """

    segments: Segments
    batch_size: int
    trained: Segments | None = None
    may_be_unknown: bool = True
    _elsewhere: dict[torch.device, TowerBatch] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> TowerBatch:
        """The same on another device, made once: the layers of a model may be on several."""
        device = torch.device(device)
        if device == self.segments.device:
            return self
        if device not in self._elsewhere:
            trained = None if self.trained is None else self.trained.to(device)
            self._elsewhere[device] = replace(self, segments=self.segments.to(device), trained=trained)
        return self._elsewhere[device]


def interleave(general: Tensor, specific: Tensor) -> Tensor:
    """Two ``(B, ...)`` towers -> ``(2B, ...)`` rows."""
    return torch.stack((general, specific), dim=1).flatten(0, 1)


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(2B, ...)`` rows -> the general and the specific tower, ``(B, ...)`` views."""
    return rows[0::2], rows[1::2]


def repeat_rows(value: Any, batch_size: int) -> Any:
    """Give both towers the same per-sequence input: ``(B, ...)`` tensors, or dictionaries of them."""
    if isinstance(value, dict):
        return {key: repeat_rows(item, batch_size) for key, item in value.items()}
    if value is None or (isinstance(value, Tensor) and (value.shape[0] != batch_size or value.dim() < 2)):
        return value
    if not isinstance(value, Tensor):
        raise TypeError(f"attention_mask: got {type(value).__name__}, which tower='replace' cannot repeat")
    return value.repeat_interleave(2, dim=0)


def general_rows(value: Any, batch_size: int) -> Any:
    """The inverse of :func:`repeat_rows`, also for the tuple of position embeddings; views, no copies."""
    if isinstance(value, tuple):
        return tuple(general_rows(item, batch_size) for item in value)
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == 2 * batch_size:
        return value[0::2]
    if value is not None and not isinstance(value, Tensor):  # flex attention's BlockMask
        raise TypeError(
            f"attention_mask: got {type(value).__name__}, which tower='replace' cannot share; expected "
            "attn_implementation 'sdpa', 'eager', 'packed_sdpa' or flash attention, not 'flex_attention'"
        )
    return value


class TowerCache:
    """A view of a cache of B rows, through which 2B interleaved rows are read and written.

    Layers below the first expert run on B rows, because the towers still coincide there; their keys and
    values pass through as they are.
    """

    def __init__(self, cache: Cache, batch_size: int) -> None:
        self.cache = cache
        self.batch_size = batch_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`transformers.Cache.update`, with both towers as two groups of heads.

        Raises:
            ValueError: if the cache holds keys and values of one tower only.
        """
        if keys.shape[0] == self.batch_size:
            return self.cache.update(keys, values, layer_idx, *args, **kwargs)
        paired = (self._pair(keys), self._pair(values))
        self._check_heads(layer_idx, paired[0].shape[1])
        stored = self.cache.update(*paired, layer_idx, *args, **kwargs)
        return tuple(state.reshape(2 * self.batch_size, -1, *state.shape[2:]) for state in stored)

    def _pair(self, states: Tensor) -> Tensor:
        return states.reshape(self.batch_size, -1, *states.shape[2:])

    def _check_heads(self, layer_idx: int, expected: int) -> None:
        layers = self.cache.layers
        held = layers[layer_idx].keys if layer_idx < len(layers) else None
        # the keys of an empty layer have one dimension
        if held is not None and held.dim() == 4 and held.shape[1] != expected:
            raise ValueError(
                f"cache: got {held.shape[1]} heads in layer {layer_idx}, expected {expected}, those of both "
                "towers; tower='replace' takes no keys and values from elsewhere (prefix tuning)"
            )
