"""Planted habits, clusters, and the whole way from a transcript to a folder, as function and command."""

import json
import logging
import random
from dataclasses import replace

import pytest

from train.cli import run
from train.data.cluster import cluster_queries
from train.data.dialogue import Thresholds
from train.data.mqdialog import load_mqdialog
from train.data.planted import HABITS, RESPONDER, habit_of, planted
from train.data.prepare import PrepareConfig, main, prepare
from train.errors import UserError

LOW = Thresholds(min_turns=2, min_dialogues=2)


@pytest.fixture
def transcript(tmp_path):
    generator = random.Random(0)
    rows = []
    for scene in range(30):
        querier = ("Ann", "Bob", "Cat")[scene % 3]
        for _ in range(generator.randrange(1, 4)):
            words = [generator.choice(["tea", "cake", "rain", "snow", "horse"]) for _ in range(4)]
            rows += [(scene, querier, " ".join(words) + "?"), (scene, "Doc", f"Yes {scene}.")]
    path = tmp_path / "inn.jsonl"
    path.write_text("\n".join(json.dumps({"scene": str(s), "speaker": w, "text": t}) for s, w, t in rows))
    return path


def config_for(path, **changes):
    config = PrepareConfig("inn", "Doc", path.parent / "out", path, thresholds=LOW, num_clusters=3)
    return replace(config, **changes)


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
    assert set(few) == {0, 1} and "2 clusters instead of 5" in caplog.text
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
    prepare(replace(config, seed=5, force=True))
    assert load_mqdialog(folder) != data
    assert load_mqdialog(prepare(replace(config, force=True))) == data


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


def test_out_that_is_a_file(transcript):
    with pytest.raises(UserError, match="cannot be written"):
        prepare(config_for(transcript, out=transcript))


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
    run(main)


def test_command_line(transcript, monkeypatch, capsys):
    out = transcript.parent / "cli"
    options = ("--transcript", transcript, "--out", out, "--min-turns", 2, "--min-dialogues", 2)
    command(monkeypatch, *options, "--responder", "Doc", "--clusters", 2)
    shown = capsys.readouterr().out
    assert "Doc: 3 queriers, 2 clusters" in shown and "Ann" in shown
    assert (out / "inn" / "diags_two_role_doc_clustered").is_dir()
    command(monkeypatch, "--show", "planted", "--out", out)
    assert "192 / 48" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--responder", "Dcc"], "closest names: Doc"), ([], "--responder is missing")],
)
def test_command_line_mistake_is_one_line_and_exit_code_2(transcript, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, "--transcript", transcript, "--out", transcript.parent / "cli", *options)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_interrupt_is_exit_code_130():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        run(interrupted)
    assert exit_info.value.code == 130
