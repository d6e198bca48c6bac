"""Padded batches of windows. B windows, S tokens, H hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from train.data.encode import IGNORE, Encoded


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
        """``(B, S)`` tensors, ``(B,)`` ids, and ``inputs_embeds`` (B, S, H) in place of ``input_ids``."""
        batch = {
            "labels": self._pad(items, self.label_key, IGNORE),
            "response_mask": self._pad(items, "response_mask", 0),
            "querier_ids": torch.tensor([item["querier_ids"] for item in items]),
            "cluster_ids": torch.tensor([item["cluster_ids"] for item in items]),
        }
        lengths = torch.tensor([len(item[self.label_key]) for item in items])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
        if "inputs_embeds" in items[0]:
            rows = [item["inputs_embeds"] for item in items]
            return batch | {"inputs_embeds": pad_sequence(rows, batch_first=True)}
        return batch | {"input_ids": self._pad(items, "input_ids", self.pad_token_id)}

    @staticmethod
    def _pad(items: Sequence[Mapping[str, Any]], key: str, value: int) -> Tensor:
        rows = [torch.tensor(item[key]) for item in items]
        return pad_sequence(rows, batch_first=True, padding_value=value)
