"""Fewer windows that teach the same replies.

One window per reply, as the paper cuts them, repeats most of a dialogue in every window that goes back over
it. Where every reply of a window is learnt, a cover is enough: windows, from the last one backwards, such
that each reply is in one of them.
"""

from collections import defaultdict
from collections.abc import Sequence

from train.data.layout import Example


def covering(examples: Sequence[Example]) -> list[Example]:
    """The windows among ``examples`` that hold every reply, few of them twice; in the given order.

    The windows of one dialogue must come in the order of its replies, as the data has them.
    """
    dialogues: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        dialogues[example.querier_id, example.dialogue].append(index)
    kept: set[int] = set()
    for indices in dialogues.values():
        position = len(indices) - 1
        while position >= 0:
            kept.add(indices[position])
            position -= _num_replies(examples[indices[position]])
    return [example for index, example in enumerate(examples) if index in kept]


def _num_replies(example: Example) -> int:
    return sum(turn.speaker == example.responder for turn in example.turns)
