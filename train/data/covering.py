"""Fewer windows that teach the same replies.

With one window per reply, as the paper cuts them, most of a dialogue is repeated in every window that goes
back over it. Since every reply in a window is learnt, a cover is enough: windows, chosen from the last one
backwards, such that each reply is in one of them.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from train.data.layout import Example
from train.data.transcript import Turn


def covering(examples: Sequence[Example]) -> list[Example]:
    """Windows of ``examples`` that together hold every reply, few of them twice; in the given order.

    The windows of one dialogue must come in the order of its replies, as the data has them.
    """
    dialogues: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        dialogues[example.querier_id, example.dialogue].append(index)
    kept: set[int] = set()
    for indices in dialogues.values():
        learnt: set[tuple[Turn, ...]] = set()
        # first the replies that windows were cut for, then those that only occur inside other windows
        for wanted in (_own, _learnt):
            for index in reversed(indices):
                if not wanted(examples[index]) <= learnt:
                    kept.add(index)
                    learnt |= _learnt(examples[index])
    return [example for index, example in enumerate(examples) if index in kept]


def _own(example: Example) -> set[tuple[Turn, ...]]:
    return {example.turns[-2:]}


def _learnt(example: Example) -> set[tuple[Turn, ...]]:
    """Replies, each behind the turn it answers; a reply at the start of a window is not learnt from it."""
    return {pair for pair in pairwise(example.turns) if pair[1].speaker == example.responder}
