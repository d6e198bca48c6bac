"""How windows become batches: padded, padded with windows of like length, or packed without padding.

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
    """The windows one behind the other in one row: exactly the padded batch's loss, without its padding."""

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``(1, T)`` tensors, ``(N,)`` ids, ``inputs_embeds`` (1, T, H) in place of ``input_ids``, bounds."""
        lengths = torch.tensor([len(item["labels"]) for item in items])
        batch = {
            "labels": _join(items, "labels"),
            "response_mask": _join(items, "response_mask"),
            "querier_ids": torch.tensor([item["querier_ids"] for item in items]),
            "cluster_ids": torch.tensor([item["cluster_ids"] for item in items]),
            "cu_seq_lens_q": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            # what flash attention asks for besides
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
    """Attention window by window where packed rows come to a model with "sdpa"; other rows are as before.

    The part above frozen layers has a configuration of its own, and attention modules that hold the whole
    model's, so ``set_attn_implementation`` would reach one of them only.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = PACKED_ATTENTION


class LengthGroupedSampler(Sampler[int]):
    """Random batches of windows of like length, the same for the same seed and epoch.

    Windows are shuffled, sorted within every ``SORTED_BATCHES`` batches, and the batches shuffled again.
    (transformers' sampler draws from the global generator, so a resumed epoch sees another order, and goes
    from long to short.)
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
        # the only short batch stays the last: batches are cut again from the flat order
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        order = [batches[index] for index in torch.randperm(len(batches), generator=draw).tolist()]
        return itertools.chain.from_iterable(order + last)


def _cut(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
