"""Planted habits, clusters, and the whole way from a transcript to a folder."""

import logging
from dataclasses import replace

import pytest

from train.cli import run
from train.data.anybody import ANYBODY, turn_around
from train.data.cluster import cluster_queries
from train.data.dialogue import Thresholds
from train.data.mqdialog import load_mqdialog
from train.data.planted import HABITS, RESPONDER, habit_of, planted
from train.data.prepare import PrepareConfig, prepare
from train.data.transcript import Scene, Turn
from train.errors import UserError

LOW = Thresholds(min_turns=2, min_dialogues=2)


def config_for(path, **changes):
    config = PrepareConfig("inn", "Doc", path.parent / "out", path, thresholds=LOW, num_clusters=3)
    return replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": -1}, "seed: got -1"),
        *(({"show": show}, f"show '{show}': expected a name") for show in ("a/b", "..", ".", "")),
    ],
)
def test_settings_that_cannot_be_built_are_named(transcript, changes, named):
    with pytest.raises(UserError, match=named):
        prepare(config_for(transcript, **changes))


def test_planted_habits_are_recoverable_and_known_only_by_the_asker():
    data = planted()
    assert len(data.queriers) == 8 and len(data.train) == 8 * 24 and len(data.dev) == 8 * 6
    for example in (*data.train, *data.dev):
        assert habit_of(example.reply) == example.querier_id
        assert HABITS[example.querier_id].querier == example.querier
        assert not any(name in turn.text for turn in example.turns for name in (*data.queriers, RESPONDER))
    assert not {e.query for e in data.train} & {e.query for e in data.dev}
    by_querier = [{e.query for e in data.dev if e.querier_id == querier} for querier in range(8)]
    assert all(questions == by_querier[0] for questions in by_querier)
    assert planted(seed=1).dev != data.dev and planted() == data


def test_habit_of_partial_foreign_and_mixed_replies():
    first, second = HABITS[:2]
    assert habit_of(f"  {first.opening.upper()} whatever") == 0
    assert habit_of(f"whatever {second.closing}") == 1
    assert habit_of("Grass is green.") is None
    assert habit_of(f"{first.opening} hm {second.closing}") is None


def test_clusters_follow_the_query_and_reduce_with_a_warning(caplog):
    tea = [f"more tea and cake number {n}" for n in range(10)]
    horse = [f"ride the horse to London {n}" for n in range(10)]
    train, dev = cluster_queries(tea + horse, ["tea and cake", "the horse to London"], 2)
    assert len(set(train[:10])) == 1 and len(set(train[10:])) == 1 and train[0] != train[10]
    assert dev == [train[0], train[10]]
    assert cluster_queries(tea + horse, [], 2) == (train, [])
    with caplog.at_level(logging.WARNING):
        few, _ = cluster_queries(["one thing", "other"], [], 5)
        alike, _ = cluster_queries(["Some tea", " some  TEA ", "rain"], [], 3)
    assert set(few) == {0, 1} and "2 clusters instead of 5" in caplog.text
    assert alike[0] == alike[1] != alike[2] and "2 clusters instead of 3" in caplog.text
    assert cluster_queries(["?", "?"], ["a"], 3) == ([0, 0], [0])


def test_prepare_then_reuse_then_force(transcript):
    config = config_for(transcript)
    folder = prepare(config)
    data = load_mqdialog(folder)
    assert sorted(data.queriers) == ["Ann", "Bob", "Cat"] and data.num_clusters == 3
    train, dev = ({(e.querier, e.id.rpartition("_part")[0]) for e in half} for half in (data.train, data.dev))
    assert train and dev and not train & dev
    stamp = next(folder.rglob("*_train.json")).stat().st_mtime_ns
    assert prepare(config) == folder
    assert next(folder.rglob("*_train.json")).stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="was prepared with other seed; --force rebuilds it"):
        prepare(replace(config, seed=5))
    with pytest.raises(UserError, match="holds the data of 'Doc'"):
        prepare(replace(config, responder="D. oc"))
    said = transcript.read_text()
    transcript.write_text(said.replace("Yes", "No"))
    with pytest.raises(UserError, match="was prepared with other text"):
        prepare(config)
    transcript.write_text(said)
    prepare(replace(config, seed=5, force=True))
    assert load_mqdialog(folder) != data
    assert load_mqdialog(prepare(replace(config, force=True))) == data


@pytest.mark.parametrize(
    "changes",
    [
        {"num_clusters": 2},
        {"encoder": "a-model"},
        {"queriers": ("Ann", "Bob")},
        {"thresholds": Thresholds(min_turns=2, min_dialogues=3)},
    ],
)
def test_a_folder_of_other_settings_is_not_reused(transcript, changes):
    prepare(config_for(transcript))
    with pytest.raises(UserError, match=f"was prepared with other {next(iter(changes))}; --force"):
        prepare(config_for(transcript, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responder": "Dok"}, "responder 'Dok' speaks nowhere.*Doc"),
        ({"queriers": ("Ann", "Zed")}, "querier 'Zed' speaks nowhere"),
        ({"thresholds": Thresholds()}, "nobody has at least 70 turns"),
        ({"transcript": None}, "show 'inn' is unknown"),
        ({"show": "planted"}, "built in"),
        ({"num_clusters": 0}, "expected at least 1"),
        ({"encoder": "no/such/model"}, "sentence-transformers|no/such/model"),
        ({"responder": "!"}, "no letters or digits"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(transcript, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(config_for(transcript, **changes))
    assert not (transcript.parent / "out").exists()


def test_what_else_lies_in_the_folder_stays_there(transcript):
    config = config_for(transcript)
    config.folder.mkdir(parents=True)
    (config.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is there without configs/role_pair_id.json; --force"):
        prepare(config)
    assert (config.folder / "notes.txt").read_text() == "mine"
    assert load_mqdialog(prepare(replace(config, force=True))).train


def test_out_that_is_a_file(transcript):
    with pytest.raises(UserError, match="cannot be written"):
        prepare(config_for(transcript, out=transcript))


def test_interrupt_is_exit_code_130():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        run(interrupted)
    assert exit_info.value.code == 130


def scene_of(speakers: str) -> Scene:
    return Scene("inn", "one", tuple(Turn(name, f"{name}{number}") for number, name in enumerate(speakers)))


def test_turned_around_everybody_else_is_one_responder():
    turned = turn_around([scene_of("AXAXYAB"), scene_of("XYX")], ["A", "B"])
    found = [[(turn.speaker, turn.text) for turn in scene.turns] for scene in turned]
    assert found == [
        [("A", "A0"), (ANYBODY, "X1"), ("A", "A2"), (ANYBODY, "X3")],
        [(ANYBODY, "Y4"), ("A", "A5")],
    ]


def test_turning_around_needs_queriers_and_a_free_name(transcript):
    with pytest.raises(UserError, match="expected their names"):
        prepare(config_for(transcript, responder=ANYBODY))
    with pytest.raises(UserError, match="querier 'Nobody' speaks nowhere"):
        prepare(config_for(transcript, responder=ANYBODY, queriers=("Nobody",)))
    with pytest.raises(UserError, match="'one' has a speaker of that name"):
        turn_around([Scene("inn", "one", (Turn("A", "a"), Turn(ANYBODY, "b")))], ["A"])


def test_turned_around_turns_count_once():
    scenes = [scene_of("ABAC")] * 10
    minimum = Thresholds(min_turns=21, min_dialogues=1)
    config = PrepareConfig("plays", ANYBODY, queriers=("A",), thresholds=minimum)
    with pytest.raises(UserError, match="querier 'A' speaks 20 turns, below the minimum of 21"):
        prepare(config, scenes)
    with pytest.raises(UserError, match="talk with nobody but each other"):
        prepare(replace(config, queriers=("A", "B")), [scene_of("ABAB")])


def test_a_folder_turned_around(transcript):
    data = load_mqdialog(prepare(config_for(transcript, responder=ANYBODY, queriers=("Doc",))))
    assert data.responder == ANYBODY and data.queriers == ["Doc"]
    assert {turn.speaker for example in data.train for turn in example.turns} == {"Doc", ANYBODY}
