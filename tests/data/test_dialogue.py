"""Runs of two speakers, windows within bounds, and a split in which no dialogue is on both sides."""

import random
from itertools import pairwise

import pytest

from train.data.dialogue import (
    MAX_CHARACTERS,
    Thresholds,
    split_queriers,
    two_speaker_runs,
    windows,
    without_leading_reply,
)
from train.data.transcript import Scene, Turn
from train.errors import UserError

LOW = Thresholds(min_turns=1, min_dialogues=1)


def turns(speakers, text="x"):
    return tuple(Turn(speaker, f"{text}{index}") for index, speaker in enumerate(speakers))


def names(runs):
    return ["".join(turn.speaker for turn in run) for run in runs]


@pytest.mark.parametrize(
    ("speakers", "runs"),
    [
        ("ABAB", ["ABAB"]),
        ("ABACAC", ["ABA", "ACAC"]),
        ("ABC", ["AB", "BC"]),
        ("ABABCBA", ["ABAB", "BCB", "BA"]),
        ("A", []),
        ("", []),
    ],
)
def test_maximal_runs_with_the_last_of_the_scene(speakers, runs):
    assert names(two_speaker_runs(turns(speakers))) == runs


def test_runs_are_maximal_on_random_scenes():
    generator = random.Random(0)
    for _ in range(200):
        scene = [Turn("A", "0")]
        for number in range(generator.randrange(12)):
            others = [name for name in "ABCD" if name != scene[-1].speaker]
            scene.append(Turn(generator.choice(others), str(number)))
        found = two_speaker_runs(scene)
        for before, after in pairwise(scene):
            assert sum((before, after) in pairwise(run) for run in found) == 1
        for run in found:
            start = scene.index(run[0])
            around = scene[max(0, start - 1) : start] + scene[start + len(run) : start + len(run) + 1]
            assert all(turn.speaker not in {t.speaker for t in run} for turn in around)


def test_one_window_per_reply_oldest_turns_dropped():
    dialogue = [Turn("Q", "q" * 100), Turn("R", "r" * 100), Turn("Q", "p" * 100), Turn("R", "s" * 100)]
    assert windows(dialogue, "R") == [tuple(dialogue[:2]), tuple(dialogue)]
    assert windows(dialogue, "R", 350) == [tuple(dialogue[:2]), tuple(dialogue[1:])]
    assert windows(dialogue, "R", 207) == [tuple(dialogue[:2]), tuple(dialogue[2:])]
    assert windows(dialogue, "R", 206 - 2) == []


def test_window_bound_counts_names_and_is_strict():
    dialogue = [Turn("Q", "q" * 10), Turn("R", "r" * 10)]
    assert windows(dialogue, "R", 25) == [tuple(dialogue)]
    assert windows(dialogue, "R", 24) == []


def test_without_leading_reply():
    window = turns("RQR")
    assert without_leading_reply(window, "R") == window[1:]
    assert without_leading_reply(window[1:], "R") == window[1:]


def many_scenes(count=40):
    generator = random.Random(1)
    return [
        Scene("show", str(number), turns(generator.choice(["QRQR", "RPRPR", "QRPRQR", "XR"]), f"{number} "))
        for number in range(count)
    ]


def test_split_is_by_dialogue_and_seeded():
    scenes = many_scenes()
    splits = split_queriers(scenes, "R", LOW)
    assert {split.querier for split in splits} == {"Q", "P", "X"}
    for split in splits:
        train, dev = ({w.id.rpartition("_part")[0] for w in half} for half in (split.train, split.dev))
        assert train and dev and not train & dev
        assert len(train) + len(dev) == split.dialogues
        assert len(dev) == max(1, round(0.2 * split.dialogues))
        replies = [{w.turns[-1] for w in half} for half in (split.train, split.dev)]
        assert not replies[0] & replies[1]
        assert all(w.turns[-1].speaker == "R" and w.turns[0].speaker != "R" for w in split.train)
        assert all(w.turns[-1].speaker == "R" for w in split.dev)
    assert split_queriers(scenes, "R", LOW) == splits
    assert split_queriers(scenes, "R", LOW, seed=1) != splits
    sizes = [split.dialogues for split in splits]
    assert sizes == sorted(sizes, reverse=True)


def test_windows_of_a_split_are_within_the_bound():
    scenes = [
        Scene("show", "1", tuple(Turn("QR"[i % 2], text * 15) for i in range(40)))
        for text in ("word ", "more ")
    ]
    (split,) = split_queriers(scenes, "R", LOW)
    found = [*split.train, *split.dev]
    assert len(found) == 40
    assert max(sum(len(t.speaker) + 1 + len(t.text) for t in w.turns) for w in found) in range(
        400, MAX_CHARACTERS
    )


def test_a_repeated_dialogue_counts_once(caplog):
    once = many_scenes()
    twice = split_queriers(once + once, "R", LOW)
    assert "R: left out 50 dialogues that repeat another one" in caplog.text
    for split, alone in zip(twice, split_queriers(once, "R", LOW), strict=True):
        assert (split.querier, split.dialogues) == (alone.querier, alone.dialogues)
        train, dev = ([w.turns for w in half] for half in (split.train, split.dev))
        assert len(set(train)) == len(train) and len(set(dev)) == len(dev)
        learnt = {turn for turns in train for turn in turns if turn.speaker == "R"}
        assert dev and not learnt & {turns[-1] for turns in dev}
        assert {turns[-1] for turns in train + dev} == {w.turns[-1] for w in alone.train + alone.dev}
    with pytest.raises(UserError, match="querier 'X' has 14 dialogues with R, below the minimum of 15"):
        split_queriers(once + once, "R", Thresholds(1, 15), queriers=["X"])
    assert split_queriers([once[0], once[0]], "R", LOW)[0].dev == ()


def test_a_single_dialogue_goes_to_train():
    (split,) = split_queriers([Scene("show", "1", turns("QR"))], "R", LOW)
    assert len(split.train) == 1 and split.dev == ()


def test_too_little_data_names_who_and_how_much():
    scenes = many_scenes()
    enough = Thresholds(min_turns=1, min_dialogues=1000)
    with pytest.raises(UserError, match=r"querier 'X' has \d+ dialogues with R, below the minimum of 1000"):
        split_queriers(scenes, "R", enough, queriers=["X"])
    with pytest.raises(UserError, match=r"querier 'X' speaks \d+ turns, below the minimum of 900"):
        split_queriers(scenes, "R", Thresholds(min_turns=900), queriers=["X"])
    with pytest.raises(UserError, match="responder 'R': nobody has at least 70 turns"):
        split_queriers(scenes, "R", Thresholds())
    assert [split.querier for split in split_queriers(scenes, "R", LOW, queriers=["X"])] == ["X"]


def test_unknown_names_come_with_the_closest():
    scenes = [Scene("show", "1", (Turn("Falstaff", "a"), Turn("Pistol", "b")))]
    with pytest.raises(UserError, match=r"responder 'falstaf' speaks nowhere.*closest names: Falstaff"):
        split_queriers(scenes, "falstaf", LOW)
    with pytest.raises(UserError, match=r"querier 'Pistl' speaks nowhere.*Pistol"):
        split_queriers(scenes, "Falstaff", LOW, queriers=["Pistl"])
