from dataclasses import replace

from train.data.covering import covering
from train.data.layout import Example
from train.data.transcript import Turn


def window(dialogue: str, number: int, first: int, querier_id: int = 0) -> Example:
    """The window of reply ``number``, back to reply ``first``; every reply has a query before it."""
    turns = [
        turn
        for index in range(first, number + 1)
        for turn in (Turn("Ann", f"q{index}"), Turn("Bob", f"r{index}"))
    ]
    return Example(f"{dialogue}_part{number}", tuple(turns), "Bob", "Ann", querier_id, 0)


def replies(examples):
    return [
        (example.querier_id, example.dialogue, turn.text)
        for example in examples
        for turn in example.turns
        if turn.speaker == "Bob"
    ]


def test_every_reply_is_kept_once_where_windows_reach_back_far_enough():
    examples = [window("a", n, 0) for n in range(4)]
    kept = covering(examples)
    assert kept == examples[-1:]
    assert sorted(replies(kept)) == [(0, "a", f"r{n}") for n in range(4)]


def test_windows_of_limited_reach_are_kept_until_they_meet():
    examples = [window("a", n, max(0, n - 1)) for n in range(5)]
    kept = covering(examples)
    assert [example.id for example in kept] == ["a_part0", "a_part2", "a_part4"]
    assert len(replies(kept)) == len(set(replies(kept))) == 5


def test_equal_ids_of_two_queriers_are_two_dialogues():
    examples = [window("a", 0, 0, querier_id=0), window("a", 1, 0, querier_id=1)]
    assert covering(examples) == examples


def test_a_reply_that_windows_begin_with_is_learnt_elsewhere():
    examples = [window("a", n, max(0, n - 2)) for n in range(9)]
    leading = [replace(e, turns=e.turns[1:]) if index > 2 else e for index, e in enumerate(examples)]
    learnt = {reply for e in covering(leading) for reply in (turn.text for turn in e.turns[1:])}
    assert {f"r{n}" for n in range(9)} <= learnt


def test_a_dialogue_may_lack_windows():
    examples = [window("a", n, max(0, n - 1)) for n in range(10)]
    gappy = [*examples[:5], *examples[8:]]
    covered = {reply for _, _, reply in replies(covering(gappy))}
    assert covered == {reply for _, _, reply in replies(gappy)}
