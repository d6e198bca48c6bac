"""The same query answered to several queriers, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from train.data.layout import MQDialog
from train.heldout import HeldOut
from train.trained import Trained

ASKED_BY = 4
"""Queriers of each sample: who really asked, and the most frequent others."""


def samples(
    trained: Trained, data: MQDialog, held_out: HeldOut, indices: Sequence[int], max_new_tokens: int
) -> list[dict[str, Any]]:
    """The queries of the windows at ``indices``, each answered to several queriers, all in mixed batches.

    Returns what :func:`train.report.write_report` shows of each.
    """
    frequent = [name for name, _ in Counter(e.querier for e in data.train).most_common(ASKED_BY)]
    examples = [held_out.examples[index] for index in indices]
    askers = [_askers(example.querier, frequent) for example in examples]
    flat = [(index, name) for index, names in zip(indices, askers, strict=True) for name in names]
    ids = [trained.queriers.index(name) for _, name in flat]
    replies = iter(held_out.generate(trained.model, [index for index, _ in flat], ids, max_new_tokens))
    return [
        {
            "history": [{"from": turn.speaker, "value": turn.text} for turn in example.turns[:-2]],
            "query": example.query,
            "reference": example.reply,
            "asked_by": example.querier,
            "answers": {name: next(replies) for name in names},
        }
        for example, names in zip(examples, askers, strict=True)
    ]


def _askers(true: str, frequent: Sequence[str]) -> list[str]:
    return [true, *(name for name in frequent if name != true)][:ASKED_BY]
