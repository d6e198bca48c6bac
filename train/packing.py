"""Batches with less padding: windows packed into one row, or windows of similar length.

N windows, T tokens of all of them together, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel

from qar_models.packing import PACKED_ATTENTION

SORTED_BATCHES = 50  # enough to make lengths alike (97 % real tokens), few enough to keep batches random


class PackingCollator:
    """Puts the windows one behind the other in one row: the padded batch's loss without its padding."""

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``(1, T)`` tensors, or ``inputs_embeds`` (1, T, H); ``(N,)`` ids; the bounds of the windows."""
        lengths = torch.tensor([len(item["labels"]) for item in items])
        batch = {
            "labels": _join(items, "labels"),
            "response_mask": _join(items, "response_mask"),
            "querier_ids": torch.tensor([item["querier_ids"] for item in items]),
            "cluster_ids": torch.tensor([item["cluster_ids"] for item in items]),
            "cu_seq_lens_q": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            # flash attention asks for these too
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
        }
        if "inputs_embeds" in items[0]:
            return batch | {
                "inputs_embeds": torch.cat([item["inputs_embeds"] for item in items]).unsqueeze(0)
            }
        return batch | {"input_ids": _join(items, "input_ids")}


def _join(items: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(item[key] for item in items))).unsqueeze(0)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let a model with "sdpa" attend window by window in packed rows; other rows are computed as before.

    The part above frozen layers has a configuration of its own, but its attention modules hold the whole
    model's, so ``set_attn_implementation`` would reach only one of the two.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = PACKED_ATTENTION


class LengthGroupedSampler(Sampler[int]):
    """Random batches of windows of similar length, the same for the same seed and epoch.

    Windows are shuffled, sorted within every ``SORTED_BATCHES`` batches, and the batches shuffled again.
    (transformers' sampler draws from the global generator, so a resumed epoch would see another order, and
    it goes from long to short.)
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=draw).tolist()
        batches: list[Sequence[int]] = []
        for chunk in _cut(shuffled, SORTED_BATCHES * self.batch_size):
            batches += _cut(sorted(chunk, key=self.lengths.__getitem__), self.batch_size)
        # an incomplete batch must stay last, since the loader cuts the flat order into batches again
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        order = [batches[index] for index in torch.randperm(len(batches), generator=draw).tolist()]
        return itertools.chain.from_iterable(order + last)


def _cut(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
