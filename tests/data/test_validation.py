import dataclasses

import pytest

from train.data.planted import planted
from train.data.validation import split_validation
from train.errors import UserError


def dialogues(examples):
    return {(example.querier_id, example.dialogue) for example in examples}


def test_whole_dialogues_move_and_the_test_split_stays():
    data = planted()
    rest, valid = split_validation(data, 0.2)
    assert sorted(e.id for e in [*rest.train, *valid]) == sorted(e.id for e in data.train)
    assert not dialogues(rest.train) & dialogues(valid)
    assert rest.dev == data.dev
    owned, taken = (
        [sum(querier_id == q for querier_id, _ in dialogues(examples)) for q in range(len(data.queriers))]
        for examples in (data.train, valid)
    )
    assert taken == [max(1, round(0.2 * count)) for count in owned]
    turned = dataclasses.replace(data, train=data.train[::-1])
    assert dialogues(split_validation(turned, 0.2)[1]) == dialogues(valid)


def test_a_querier_keeps_a_dialogue_and_nonsense_is_refused():
    data = planted()
    lonely = dataclasses.replace(data, train=data.train[:1])
    with pytest.raises(UserError, match="no querier has two training dialogues"):
        split_validation(lonely, 0.5)
    first, second = (dataclasses.replace(data.train[0], id=name) for name in ("a_part0", "b_part0"))
    rest, valid = split_validation(dataclasses.replace(data, train=[first, second]), 0.9)
    assert len(rest.train) == len(valid) == 1
    with pytest.raises(UserError, match="validation: got 1"):
        split_validation(data, 1.5)


def test_what_validates_one_responder_is_not_trained_on_for_another():
    data = planted()
    dialogue = [dataclasses.replace(e, id=f"{index}_part0") for index, e in enumerate(data.train[:10])]
    turned = [
        dataclasses.replace(e, id=f"turned{e.id}", responder=e.turns[0].speaker, querier_id=1)
        for e in dialogue
    ]
    rest, valid = split_validation(dataclasses.replace(data, train=dialogue + turned), 0.3)
    seen = {exchange for example in rest.train for exchange in example.exchanges}
    assert seen and not any(seen & example.exchanges for example in valid)
