"""A validation part taken from the training dialogues, so that choices never look at the test split."""

import dataclasses
import random
from collections import defaultdict
from collections.abc import Sequence

from train.data.layout import Example, MQDialog
from train.errors import UserError


def split_validation(data: MQDialog, share: float) -> tuple[MQDialog, list[Example]]:
    """``data`` with fewer training windows, and those that were taken out, in whole dialogues.

    From every querier with at least two training dialogues, ``share`` of them are taken, at least one,
    always the same ones. If two responders talk with each other, their data share dialogues; what
    is taken for one is not trained on for the other.

    Raises ``UserError`` unless ``0 < share < 1``, and if nothing can be taken.
    """
    if not 0 < share < 1:
        raise UserError(f"validation: got {share}, expected a share between 0 and 1")
    dialogues: dict[int, dict[str, None]] = defaultdict(dict)
    for example in data.train:
        dialogues[example.querier_id][example.dialogue] = None
    taken = {
        (querier_id, dialogue)
        for querier_id, found in dialogues.items()
        for dialogue in _draw(list(found), share, data.queriers[querier_id])
    }
    if not taken:
        raise UserError("validation: no querier has two training dialogues, so none can be spared")
    valid = [example for example in data.train if (example.querier_id, example.dialogue) in taken]
    train = [example for example in data.train if (example.querier_id, example.dialogue) not in taken]
    return dataclasses.replace(data, train=_unmirrored(train, valid)), valid


def _unmirrored(train: Sequence[Example], valid: Sequence[Example]) -> list[Example]:
    """``train`` without the windows that give an exchange of ``valid`` to another responder."""
    responders = defaultdict(set)
    for example in valid:
        for exchange in example.exchanges:
            responders[exchange].add(example.responder)
    return [
        example
        for example in train
        if all(responders.get(exchange, set()) <= {example.responder} for exchange in example.exchanges)
    ]


def _draw(dialogues: list[str], share: float, querier: str) -> list[str]:
    if len(dialogues) < 2:
        return []
    count = min(len(dialogues) - 1, max(1, round(share * len(dialogues))))
    return random.Random(f"0/{querier}").sample(sorted(dialogues), count)
