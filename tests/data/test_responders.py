import dataclasses

import pytest

from train.data.mqdialog import write_mqdialog
from train.data.planted import planted
from train.data.responders import load_dialogues, merge
from train.data.transcript import Turn
from train.errors import UserError


def renamed(data, name):
    def swap(example):
        turns = tuple(
            dataclasses.replace(turn, speaker=name) if turn.speaker == data.responder else turn
            for turn in example.turns
        )
        return dataclasses.replace(example, turns=turns, responder=name)

    halves = {half: [swap(example) for example in getattr(data, half)] for half in ("train", "dev")}
    return dataclasses.replace(data, responder=name, **halves)


def test_pairs_are_numbered_through():
    first, second = planted(0, 3), renamed(planted(1, 2), "Rook")
    both = merge([first, second])
    assert both.queriers[0] == f"{first.queriers[0]} > Wren"
    assert both.queriers[len(first.queriers)] == f"{second.queriers[0]} > Rook"
    assert both.num_clusters == first.num_clusters + second.num_clusters
    assert len(both.train) == len(first.train) + len(second.train)
    for example in both.train + both.dev:
        assert example.querier == both.queriers[example.querier_id]
        assert example.querier.endswith(example.responder)
    last = both.train[-1]
    assert last.cluster_id == second.train[-1].cluster_id + first.num_clusters
    assert last.turns == second.train[-1].turns
    assert len({example.id for example in both.dev}) == len(both.dev)


def test_a_responder_twice_is_refused():
    with pytest.raises(UserError, match="same responder: Wren"):
        merge([planted(), planted()])


def test_a_folder_of_one_responder_and_one_of_several(tmp_path):
    first, second = planted(), renamed(planted(), "Rook")
    for data in (first, second):
        write_mqdialog(data, tmp_path / f"diags_two_role_{data.responder.lower()}_clustered", "planted")
    assert load_dialogues(tmp_path / "diags_two_role_rook_clustered").responder == "Rook"
    both = load_dialogues(tmp_path)
    assert both.responder == "Rook, Wren"
    assert len(both.queriers) == len(first.queriers) + len(second.queriers)
    with pytest.raises(UserError, match="no MQDialog data"):
        load_dialogues(tmp_path / "nothing")


def test_what_is_held_out_for_one_responder_is_not_trained_on_for_another():
    first, second = planted(0, 3), renamed(planted(1, 2), "Rook")
    seen, shares, other = second.train[:3]
    held_out = dataclasses.replace(first.dev[0], turns=seen.turns)
    answer = Turn("Rook", "Another ending.")
    shares = dataclasses.replace(shares, turns=(*seen.turns, Turn("Ada", "And then?"), answer))
    same_line = dataclasses.replace(other, turns=(seen.turns[0], answer))
    both = merge(
        [
            dataclasses.replace(first, train=[], dev=[held_out]),
            dataclasses.replace(second, train=[seen, shares, same_line]),
        ]
    )
    assert [example.turns for example in both.train] == [same_line.turns]
