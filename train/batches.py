"""Windows, and the ways of ``batching=`` that put them into batches.

N windows, S tokens of the longest, T tokens of all of them together, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel

from qar_models.packing import PACKED_ATTENTION
from train.data.encode import IGNORE, Encoded

SORTED_BATCHES = 50  # enough to make lengths alike (97 % real tokens), few enough to keep batches random


class Windows(Dataset):
    """Encoded windows, with the hidden states that enter the trained layers if lower ones are frozen."""

    def __init__(self, windows: Sequence[Encoded], states: Sequence[Tensor] | None = None) -> None:
        self.windows = windows
        self.states = states

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every window."""
        return [len(window.labels) for window in self.windows]

    def __getitem__(self, index: int) -> dict[str, Any]:
        window = self.windows[index]
        item = {
            "labels": window.labels,
            "reply_labels": window.reply_labels,
            "response_mask": window.response_mask,
            "querier_ids": window.querier_id,
            "cluster_ids": window.cluster_id,
            "window_ids": window.id,
        }
        if self.states is None:
            return item | {"input_ids": window.input_ids}
        return item | {"inputs_embeds": self.states[index]}


class Collator:
    """Right-padded batches with ``attention_mask``; ``label_key`` chooses all replies or the last one.

    Padding is labelled -100 by position, not by token, so an end-of-turn token keeps its label even if the
    tokenizer pads with it.
    """

    def __init__(self, pad_token_id: int, label_key: str = "labels") -> None:
        self.pad_token_id = pad_token_id
        self.label_key = label_key

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``(N, S)`` tensors, ``(N,)`` ids, and ``inputs_embeds`` (N, S, H) in place of ``input_ids``."""
        text, lengths = text_key(items[0]), _lengths(items)
        return {
            "labels": _pad(items, self.label_key, IGNORE),
            "response_mask": _pad(items, "response_mask", 0),
            **_ids(items),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long(),
            text: _pad(items, text, self.pad_token_id if text == "input_ids" else 0),
        }


class PackingCollator:
    """Puts the windows one behind the other in one row: the padded batch's loss without its padding."""

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``(1, T)`` tensors, or ``inputs_embeds`` (1, T, H); ``(N,)`` ids; the bounds of the windows."""
        text, lengths = text_key(items[0]), _lengths(items)
        return {
            "labels": _join(items, "labels"),
            "response_mask": _join(items, "response_mask"),
            **_ids(items),
            "cu_seq_lens_q": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            # flash attention asks for these too
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
            text: _join(items, text),
        }


def text_key(batch: Container[str]) -> str:
    """What a window's or a batch's text is called: token ids, or the states of frozen layers."""
    return "inputs_embeds" if "inputs_embeds" in batch else "input_ids"


def _lengths(items: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([len(item["labels"]) for item in items])


def _ids(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([item[key] for item in items]) for key in ("querier_ids", "cluster_ids")}


def _rows(items: Sequence[Mapping[str, Any]], key: str) -> list[Tensor]:
    return [torch.as_tensor(item[key]) for item in items]


def _pad(items: Sequence[Mapping[str, Any]], key: str, value: int) -> Tensor:
    return pad_sequence(_rows(items, key), batch_first=True, padding_value=value)


def _join(items: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    return torch.cat(_rows(items, key)).unsqueeze(0)


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
