"""The command that scores a trained model on its own or other held-out dialogues."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from recast import answered_by

from train import evaluate as command
from train import heldout
from train import trained as modules
from train.cli import run
from train.consolidate import consolidate
from train.data.mqdialog import write_mqdialog
from train.errors import UserError
from train.evaluate import evaluate
from train.finetune import finetune
from train.heldout import held_out_windows
from train.metrics.wording import SUMMARY
from train.onboard import onboard
from train.trained import KEYS, load_trained


@pytest.fixture
def trained(config):
    return finetune(config)


def test_scores_are_those_of_the_held_out_windows(trained, config, tiny_data):
    result = evaluate(trained, generated=3, max_new_tokens=4)
    held_out = held_out_windows(config, tiny_data)
    expected = held_out.nll(load_trained(trained).model, held_out.querier_ids)
    assert [(r["nll_sum"], r["tokens"]) for r in result["records"]] == expected
    assert (result["scores"]["generated"], result["left_out"]) == (3, 0)
    assert set(result["scores"]["per_querier"]) == set(tiny_data.queriers)
    assert result["swap"]["nll_true"] == result["scores"]["nll"] != result["swap"]["nll_swapped"]
    assert result["swap"]["rougeL_true"] == pytest.approx(result["scores"]["rougeL"])


def test_the_base_is_loaded_once_and_in_the_dtype_asked_for(config, monkeypatch):
    trained, loaded = finetune(config.replace(trainable_layers=None)), []
    load = modules.load_base
    monkeypatch.setattr(modules, "load_base", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(heldout, "load_base", modules.load_base)
    narrow = evaluate(trained, generated=1, max_new_tokens=4, dtype="bfloat16")
    assert [args[1] for args in loaded] == [torch.bfloat16]
    wide = evaluate(trained, generated=1, max_new_tokens=4)
    assert narrow["scores"]["nll"] == pytest.approx(wide["scores"]["nll"], rel=0.02)
    assert narrow["scores"]["nll"] != wide["scores"]["nll"]


def test_frozen_layers_states_are_read_in_any_dtype(config):
    trained = finetune(config.replace(trainable_layers=1))
    nll = [evaluate(trained, generated=1, dtype=dtype)["scores"]["nll"] for dtype in ("float32", "bfloat16")]
    assert nll[0] == pytest.approx(nll[1], rel=0.02)


def test_queriers_of_other_data_are_known_by_name(trained, config, tiny_data, tmp_path):
    known = evaluate(trained, generated=1, max_new_tokens=4)
    order = [2, 0, 1]
    turned = dataclasses.replace(tiny_data, queriers=[tiny_data.queriers[index] for index in order])
    for split in ("train", "dev"):
        moved = [
            dataclasses.replace(e, querier_id=order.index(e.querier_id)) for e in getattr(tiny_data, split)
        ]
        turned = dataclasses.replace(turned, **{split: moved})
    write_mqdialog(turned, tmp_path / "turned", "planted")
    again = evaluate(trained, tmp_path / "turned", generated=1, max_new_tokens=4)
    nll = [{r["id"]: r["nll_sum"] for r in result["records"]} for result in (known, again)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-5)


def test_somebody_unknown_is_named(trained, tiny_data, tmp_path):
    names = ["Zoe", *tiny_data.queriers[1:]]
    renamed = [
        dataclasses.replace(e, querier=names[e.querier_id]) for e in (*tiny_data.train, *tiny_data.dev)
    ]
    count = len(tiny_data.train)
    write_mqdialog(
        dataclasses.replace(tiny_data, queriers=names, train=renamed[:count], dev=renamed[count:]),
        tmp_path / "renamed",
        "planted",
    )
    with pytest.raises(UserError, match="querier 'Zoe' is unknown"):
        evaluate(trained, tmp_path / "renamed")


def test_data_of_another_responder_are_refused(trained, tiny_data, tmp_path):
    write_mqdialog(answered_by(tiny_data, "Amy"), tmp_path / "other", "planted")
    with pytest.raises(UserError, match=f"Amy is the responder, expected {tiny_data.responder}"):
        evaluate(trained, tmp_path / "other")


def asked_by(data, kept):
    """``data`` with the queriers ``kept`` alone."""
    halves = {
        half: [
            dataclasses.replace(e, querier_id=kept.index(e.querier))
            for e in getattr(data, half)
            if e.querier in kept
        ]
        for half in ("train", "dev")
    }
    return dataclasses.replace(data, queriers=kept, **halves)


def test_a_model_of_several_responders_takes_the_expert_of_the_pair(config, tiny_data, tmp_path):
    ada, bram, cleo = tiny_data.queriers
    wren, amy = asked_by(tiny_data, [ada, bram]), asked_by(answered_by(tiny_data, "Amy"), [bram, cleo])
    for name, data in (("both/wren", wren), ("both/amy", amy), ("stranger", asked_by(tiny_data, [cleo]))):
        write_mqdialog(data, tmp_path / name, "planted")
    trained = finetune(config.replace(data=str(tmp_path / "both")))
    both, one = (
        {(record["querier"], record["id"].split("/")[-1]): record["nll_sum"] for record in result["records"]}
        for result in (
            evaluate(trained, generated=1, max_new_tokens=4),
            evaluate(trained, tmp_path / "both" / "wren", generated=1, max_new_tokens=4),
        )
    )
    assert {querier for querier, _ in one} == {f"{ada} > Wren", f"{bram} > Wren"}
    assert one == pytest.approx({key: nll for key, nll in both.items() if key in one}, rel=1e-5)
    with pytest.raises(UserError, match=f"querier '{cleo} > Wren' is unknown"):
        evaluate(trained, tmp_path / "stranger")


def test_windows_that_do_not_fit_are_left_out_and_counted(config, tiny_data, trained):
    lengths = [len(e.reply.split()) for e in tiny_data.dev]
    long = max(range(len(lengths)), key=lengths.__getitem__)
    turns = tiny_data.dev[long].turns
    reply = dataclasses.replace(turns[-1], text=" ".join([turns[-1].text] * 200))
    dev = list(tiny_data.dev)
    dev[long] = dataclasses.replace(dev[long], turns=(*turns[:-1], reply))
    held_out = held_out_windows(config, dataclasses.replace(tiny_data, dev=dev))
    assert held_out.left_out == 1
    assert [e.id for e in held_out.examples] == [w.id for w in held_out.windows]
    records = held_out.records(held_out.nll(load_trained(trained).model, held_out.querier_ids), {})
    assert dev[long].id not in {record["id"] for record in records}
    assert len(records) == len(dev) - 1


def test_data_that_were_built_anew_are_refused(trained, config, tiny_data, tmp_path):
    other = dataclasses.replace(tiny_data, train=tiny_data.train[1:])
    shutil.rmtree(config.data)
    write_mqdialog(other, Path(config.data), "planted")
    with pytest.raises(UserError, match="the run was started with training_windows="):
        evaluate(trained, generated=1)
    few = dataclasses.replace(tiny_data, train=tiny_data.train[::8])  # too few to spare a validation part
    write_mqdialog(few, tmp_path / "few", "planted")
    assert evaluate(trained, tmp_path / "few", generated=1, max_new_tokens=4)["records"]


@pytest.mark.parametrize("kept_by", ["copy", "consolidate", "onboard"])
def test_a_model_away_from_its_run_knows_its_windows(
    trained, config, tiny_data, tmp_path, monkeypatch, kept_by
):
    monkeypatch.chdir(tmp_path)
    away = tmp_path / "away"
    if kept_by == "copy":
        shutil.copytree(trained, away)
    elif kept_by == "consolidate":
        consolidate(trained.parent, away)
    else:
        newcomer = [dataclasses.replace(e, querier="Zoe", querier_id=0) for e in tiny_data.train[:2]]
        data = dataclasses.replace(tiny_data, queriers=["Zoe"], train=newcomer, dev=newcomer)
        write_mqdialog(data, tmp_path / "new", "planted")
        onboard(trained, tmp_path / "new", "Zoe", away, epochs=0.5)
    assert evaluate(away, generated=1, max_new_tokens=4)["records"]
    shutil.rmtree(config.data)
    first, rest = tiny_data.train[:2], tiny_data.train[2:]
    turned = dataclasses.replace(tiny_data, train=rest + tiny_data.dev, dev=first)
    write_mqdialog(turned, Path(config.data), "planted")
    with pytest.raises(UserError, match="not what the model was trained on"):
        evaluate(away, generated=1)


def test_scores_are_kept_where_two_models_do_not_compare(trained, config, tiny_data, tmp_path, monkeypatch):
    few = dataclasses.replace(tiny_data, dev=tiny_data.dev[1:])
    write_mqdialog(few, tmp_path / "few", "planted")
    other = finetune(config.replace(data=str(tmp_path / "few"), output_dir=str(tmp_path / "runs" / "other")))
    out = tmp_path / "scores.json"
    options = ["--model", trained, "--against", other, "--generated", 1, "--out", out]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, options)])
    with pytest.raises(UserError, match="the two models cannot be compared"):
        command.main()
    assert len(json.loads(out.read_text())["models"]) == 2


def test_nothing_is_written_beside_a_model_that_is_in_no_run(trained, tmp_path, monkeypatch):
    store = tmp_path / "store"
    shutil.copytree(trained, store / "models" / "alice")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "check_finished", lambda *_: None)
    evaluate(store / "models" / "alice", generated=1, max_new_tokens=4)
    assert [path.name for path in store.rglob("*") if path.is_dir()] == ["models", "alice"]


def test_batch_size_is_that_of_the_passes_and_changes_no_score(trained, monkeypatch):
    together, sizes = evaluate(trained, generated=1, max_new_tokens=4), []
    scored = heldout.reply_nll

    def noted(model, batch):
        sizes.append(len(batch["labels"]))
        return scored(model, batch)

    monkeypatch.setattr(heldout, "reply_nll", noted)
    apart = evaluate(trained, generated=1, max_new_tokens=4, batch_size=2)
    assert set(sizes) == {2}
    nll = [[record["nll_sum"] for record in result["records"]] for result in (together, apart)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-5)


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--against", "nothing", "no trained model there"),
        ("--out", "folder", "is a folder, expected a file"),
        ("--out", "file/scores.json", "file is no folder"),
        ("--out", "/proc/x/scores.json", "/proc takes no files"),
        ("--out", "link/scores.json", "link is no folder"),
    ],
)
def test_what_cannot_end_well_is_refused_before_any_scoring(
    option, name, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "trained.json").write_text(json.dumps(dict.fromkeys(KEYS)))
    monkeypatch.setattr(command, "evaluate", lambda *_: pytest.fail("scored before the refusal"))
    arguments = ["--model", str(tmp_path), option, str(tmp_path / name)]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run(command.main)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_column_is_cut_in_a_pipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    counts = {"examples": 1000, "generated": 1, "empty": 0, "failed": 0}
    scores = {**counts, "perplexity": 1.0, **dict.fromkeys(SUMMARY, 1.0)}
    people = {"Prince Henry the Younger": scores}
    result = {"model": "m", "left_out": 0, "swap": None}
    result["scores"] = {**scores, "macro": scores, "per_querier": people}
    (tmp_path / "trained.json").write_text(json.dumps(dict.fromkeys(KEYS)))
    monkeypatch.setattr(command, "evaluate", lambda *_: result)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(tmp_path)])
    command.main()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.endswith("distinct-2") for line in lines)
    assert "Prince Henry the Younger 1000 1.000 100.0 100.0 100.0 100.0 100.0" in lines


def test_everybody_their_mean_and_those_who_ask_most_come_in_this_order():
    def scores(examples, nll):
        return {"examples": examples, **dict.fromkeys(SUMMARY, 0.5), "nll": nll}

    people = {"Ann": scores(1, 4.0), "Bob": scores(3, 2.0)}
    everybody = scores(4, 2.5) | {"macro": scores(None, 3.0), "per_querier": people}
    table = command.score_table({"model": "runs/[/v1]", "scores": everybody})
    assert str(table.title) == "runs/[/v1]"  # a path, not markup
    names, windows, nll = (list(map(str, column.cells)) for column in table.columns[:3])
    assert names == ["everybody", "mean over queriers", "Bob", "Ann"]
    assert windows == ["4", "", "3", "1"] and nll == ["2.500", "3.000", "2.000", "4.000"]


def test_command_line(config, trained, tmp_path, monkeypatch, capsys):
    ft = finetune(config.replace(method="ft", output_dir=str(tmp_path / "ft")))
    out = tmp_path / "scores.json"
    arguments = ["--model", str(trained), "--against", str(ft), "--generated", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, "--max-new-tokens", "4"])
    run(command.main)
    qar, other = (report := json.loads(out.read_text()))["models"]
    assert other["swap"] is None
    assert qar["swap"] is not None
    expected = qar["scores"]["nll"] - other["scores"]["nll"]
    assert report["differences"]["nll"]["diff"] == pytest.approx(expected)
    shown = capsys.readouterr().out
    assert f"{expected:+.3f}" in shown
    assert f"perplexity {qar['scores']['perplexity']:.2f}" in shown
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="2"):
        run(command.main)
    assert capsys.readouterr().err.count("\n") == 1
