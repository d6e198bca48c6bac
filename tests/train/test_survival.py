"""Runs that are killed, that run out of disk or of numbers, and checkpoints that are damaged."""

import dataclasses
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from processes import completed, log_of, start
from safetensors.torch import load_file

from train import checkpoints, run_file
from train import finetune as module
from train.checkpoints import BUILDING, SEAL, damage, last_checkpoint, make_room, seal
from train.consolidate import consolidate
from train.dataset import RunData
from train.errors import UserError
from train.finetune import finetune
from train.keep_best import KeepBest
from train.onboard import onboard
from train.run_file import RUN, check_continues
from train.trained import EXPERTS
from train.trainer import WEIGHTS, QARTrainer


@pytest.fixture
def config(config):
    """With dropout and a memory, so that a resumed run has every kind of state to restore."""
    return config.replace(
        contrastive_weight=0.5, memory_size=4, projection_dim=8, lora_dropout=0.2, report_to="none"
    )


def broken(config):
    return config.replace(output_dir=f"{config.output_dir}_broken")


def kill(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(rank, step, name, deed):
    """Replace a method of the trainer by ``deed`` from that step on."""
    original = getattr(QARTrainer, name)

    def method(self, *args, **kwargs):
        if self.state.global_step >= step:
            return deed(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(QARTrainer, name, method)


def die_while_saving(rank, moment):
    """Kill the process in the second save (of step 4), at that moment of it."""

    def deed(original, self, *args):
        target, name = {
            "weights written": (torch, "save"),
            "all written": (checkpoints, "seal"),
            "sealed": (os, "replace"),
        }[moment]
        setattr(target, name, kill)
        return original(self, *args)

    at_step(rank, 4, "_save_checkpoint", deed)


STEP = random.Random().randrange(1, 6)


@pytest.mark.parametrize(
    ("last", "before"),
    [
        (STEP - STEP % 2, functools.partial(at_step, step=STEP, name="training_step", deed=kill)),
        *(
            (2, functools.partial(die_while_saving, moment=moment))
            for moment in ("weights written", "all written", "sealed")
        ),
    ],
    ids=["at a random step", "weights written", "all written", "sealed"],
)
def test_killed_run_resumes_to_the_same_curve_and_weights(config, last, before):
    completed(config)
    killed = broken(config)
    assert start(killed, before=before).wait() == [-signal.SIGKILL]
    kept = last_checkpoint(Path(killed.output_dir))
    assert (kept.name if kept else "checkpoint-0") == f"checkpoint-{last}", f"killed in step {STEP + 1}"
    completed(killed, resume=True)
    assert log_of(killed) == log_of(config)
    for part in (f"trained/{EXPERTS}", f"checkpoint-6/{WEIGHTS}"):
        expected, got = (load_file(Path(run.output_dir) / part) for run in (config, killed))
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert not (Path(killed.output_dir) / BUILDING).exists()


def die_while_keeping_the_best(rank):
    KeepBest._write = kill


def die_while_writing_the_result(rank):
    module.save_trained = functools.partial(_half_written, module.save_trained)


def _half_written(save, peft, *args):
    peft.save_pretrained = kill
    save(peft, *args)


@pytest.mark.parametrize(
    ("before", "left"), [(die_while_keeping_the_best, "best"), (die_while_writing_the_result, "trained")]
)
def test_what_a_killed_run_was_building_is_removed(config, before, left):
    config = config.replace(validation=0.2)
    assert start(config, before=before).wait() == [-signal.SIGKILL]
    output = Path(config.output_dir)
    assert [path.name.split(".")[1] for path in output.glob(".*")] == [left]
    completed(config, resume=True)
    assert not list(output.glob(".*"))


def limit_files():
    """No file of this process may exceed 16 KiB from now on: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))


def no_room(rank):
    def deed(original, self, *args):
        limit_files()
        return original(self, *args)

    at_step(rank, 4, "_save_checkpoint", deed)


def test_full_disk_ends_with_one_line_and_the_checkpoint_before(config):
    run = start(config, before=no_room)
    assert run.wait() == [2]
    errors = [line for line in run.text().splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert "the checkpoint of step 4 cannot be written" in errors[0]
    assert re.search(r"\((File too large|a file could not be written to its end); .* MiB free\)", errors[0])
    assert "checkpoint-2 is intact" in errors[0]
    assert errors[0].startswith("error: ")  # on a line of its own, not behind the progress bar
    assert last_checkpoint(Path(config.output_dir)).name == "checkpoint-2"
    assert not (Path(config.output_dir) / BUILDING).exists()


def test_torchs_account_of_a_full_disk_is_not_shown(tmp_path):
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises((OSError, RuntimeError)) as hidden:
        torch.save(torch.zeros(2**15), full)
    with pytest.raises(RuntimeError) as silent:
        torch.save(torch.zeros(2**15), "/dev/full")
    for error, reason in (
        (hidden.value, "No space left on device"),
        (silent.value, "a file could not be written to its end"),
    ):
        message = str(checkpoints.write_failure(tmp_path, 3, error))
        assert f"the checkpoint of step 3 cannot be written ({reason}; " in message


def no_room_for_states(rank):
    limit_files()


def no_room_for_results(rank):
    save_trained = module.save_trained

    def limited(*args):
        limit_files()
        save_trained(*args)

    module.save_trained = limited


def test_full_disk_outside_checkpoints_names_the_place(config):
    run = start(config.replace(expert_rank=32), before=no_room_for_results)
    assert run.wait() == [2]
    (error,) = [line for line in run.text().splitlines() if "error" in line.lower()]
    assert "qar/trained cannot be written: File too large" in error
    assert not any(Path(config.output_dir).glob(".trained*"))
    completed(config.replace(expert_rank=32), resume=True)


def test_states_of_frozen_layers_are_not_missed(config):
    """They only save time; the full disk ends the run at what it cannot do without."""
    run = start(config.replace(expert_rank=32), before=no_room_for_states)
    assert run.wait() == [2]
    assert re.search(r"states/\w+\.safetensors: .* are not kept \(File too large\)", run.text())
    (error,) = [line for line in run.text().splitlines() if "error:" in line]
    assert "the checkpoint of step 2 cannot be written" in error
    assert not any(Path(config.output_dir).parent.glob("states/.*"))
    completed(config.replace(expert_rank=32), resume=True)


def no_number(rank):
    compute_loss = QARTrainer.compute_loss
    QARTrainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) * float("nan")


def test_an_error_is_the_last_line(config):
    run = start(config, before=no_number)
    assert run.wait() == [2]
    last = run.text().splitlines()[-1]
    assert last.startswith("error: step 1: the loss is nan")
    assert run.text().endswith(f"{last}\n")


def test_loss_that_is_no_number_stops_and_names_step_and_windows(config, monkeypatch, tiny_data):
    compute_loss = QARTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        return loss * (float("nan") if self.state.global_step == 2 else 1)

    monkeypatch.setattr(QARTrainer, "compute_loss", poisoned)
    with pytest.raises(UserError, match="step 3: the loss is nan on the windows") as raised:
        finetune(config)
    assert sum(example.id in str(raised.value) for example in tiny_data.train) >= config.batch_size
    assert last_checkpoint(Path(config.output_dir)).name == "checkpoint-2"


def test_weights_that_are_no_numbers_are_never_saved(config, monkeypatch):
    training_step = QARTrainer.training_step

    def poisoned(self, model, *args, **kwargs):
        loss = training_step(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(QARTrainer, "training_step", poisoned)
    with pytest.raises(UserError, match=r"step 4: 'model.*' is not finite"):
        finetune(config)
    assert [path.name for path in checkpoints.all_checkpoints(Path(config.output_dir))] == ["checkpoint-2"]


@pytest.fixture
def finished(config):
    finetune(config)
    return config


def test_any_damaged_file_makes_resume_fall_back(finished, caplog):
    run = Path(finished.output_dir)
    expected = log_of(finished)
    newest = run / "checkpoint-6"
    names = sorted(path.name for path in newest.iterdir())
    assert {WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        whole = (newest / name).read_bytes()
        middle = len(whole) // 2
        (newest / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert last_checkpoint(run).name == "checkpoint-4", name
        assert f"({name} is damaged)" in caplog.text or name == SEAL
        (newest / name).write_bytes(whole)
        assert damage(newest) is None
    (newest / "optimizer.pt").unlink()
    assert damage(newest) == "optimizer.pt is missing"
    shutil.rmtree(run / "trained")
    finetune(finished, resume=True)
    assert log_of(finished) == expected
    assert damage(newest) is None


def test_disk_use_is_bounded_and_leftovers_go(finished):
    run = Path(finished.output_dir)
    assert [path.name for path in checkpoints.all_checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
    (run / BUILDING).mkdir()
    (run / "checkpoint-5").mkdir()
    (run / "checkpoint-5" / SEAL).touch()
    make_room(run, run / "checkpoint-4")
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-4"]
    assert not (run / BUILDING).exists()
    with pytest.raises(UserError, match="save_total_limit: got 0"):
        finished.replace(save_total_limit=0)


def test_a_finished_run_leaves_its_curves(finished):
    run = Path(finished.output_dir)
    page = (run / "report.html").read_text()
    for caption in ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "Settings"):
        assert caption in page
    row = json.loads((run / "log.json").read_text())[2]
    wanted = {"lm_loss", "contrastive_loss", "grad_norm", "learning_rate", "expert_learning_rate"}
    assert wanted | {"tokens_per_second"} <= row.keys()
    assert row["loss"] == pytest.approx(row["lm_loss"] + 0.5 * row["contrastive_loss"], rel=1e-5)


def test_a_finished_run_is_not_taken_for_one_on_other_data(config, tiny_data, monkeypatch):
    folder = finetune(config)
    monkeypatch.setattr(run_file.ranks, "world_size", lambda: 2)  # of them any number may ask
    assert finetune(config) == folder
    changed = dataclasses.replace(tiny_data, train=tiny_data.train[1:])
    monkeypatch.setattr(module, "load_data", lambda config: RunData(changed, []))
    with pytest.raises(UserError, match="started with training_windows="):
        finetune(config)
    (Path(config.output_dir) / RUN).unlink()
    assert finetune(config) == folder


def test_resume_refuses_another_run(config, tiny_data, monkeypatch):
    finetune(config)
    shutil.rmtree(Path(config.output_dir) / "trained")
    with pytest.raises(UserError, match=r"run\.json: the run was started with expert_rank=4, got 8"):
        finetune(config.replace(expert_rank=8), resume=True)
    for key, value in {"learning_rate": 0.5, "batch_size": 3, "seed": 7, "max_tokens": 99}.items():
        with pytest.raises(UserError, match=f"started with {key}="):
            check_continues(config.replace(**{key: value}), tiny_data)
    other = dataclasses.replace(tiny_data, queriers=tiny_data.queriers[::-1])
    with pytest.raises(UserError, match="started with queriers="):
        check_continues(config, other)
    changed = dataclasses.replace(tiny_data, train=tiny_data.train[1:])
    with pytest.raises(UserError, match="started with training_windows="):
        check_continues(config, changed)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="started with ranks=1, got 2"):
        patch.setattr(run_file.ranks, "world_size", lambda: 2)
        check_continues(config, tiny_data)
    moved = config.replace(data=f"{config.data}/.", save_steps=5, save_total_limit=1)
    assert finetune(moved, resume=True).is_dir()
    (Path(config.output_dir) / RUN).write_text("{}")
    with pytest.raises(UserError, match=r"run\.json: damaged, 'config' is missing"):
        check_continues(config, tiny_data)


def test_consolidate_refuses_what_is_no_run(finished, tmp_path):
    run = Path(finished.output_dir)
    folders = consolidate(run, tmp_path / "out"), run / "trained"
    for name in (EXPERTS, SAFETENSORS_WEIGHTS_NAME):
        found, trained = (load_file(folder / name) for folder in folders)
        assert found.keys() == trained.keys() and all(
            torch.equal(found[key], trained[key]) for key in trained
        )
    with pytest.raises(UserError, match="no run there"):
        consolidate(tmp_path, tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    for deed in (consolidate, functools.partial(onboard, data=tmp_path, querier="Newcomer")):
        with pytest.raises(UserError, match="thesis: is there and holds no trained model"):
            deed(run, out=tmp_path / "thesis")
    for path in checkpoints.all_checkpoints(run):
        (path / SEAL).unlink()
    with pytest.raises(UserError, match="no intact checkpoint"):
        consolidate(run, tmp_path / "out")


def test_checkpoints_of_others_are_never_deleted(config):
    run = Path(config.output_dir)
    for step in (1, 700):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "model.bin").write_bytes(b"months of work")
    with pytest.raises(UserError, match="holds checkpoint-700"):
        finetune(config)
    assert len(checkpoints.all_checkpoints(run)) == 2
    finetune(config, resume=True)
    kept = sorted(path.parent.name.rsplit("-", 1)[0] for path in run.glob("*/model.bin"))
    assert kept == ["unsealed-checkpoint-1", "unsealed-checkpoint-700"]


def test_files_reach_the_disk_before_the_seal_is_there(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, (tmp_path / SEAL).exists()))
    )
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"whole")
    seal(tmp_path)
    assert synced == [((tmp_path / name).stat().st_ino, False) for name in ("one", "two")]


def test_the_newest_checkpoint_is_that_of_the_most_steps(tmp_path):
    for step in (10, 8, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "part").write_bytes(b"whole")
        seal(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    make_room(tmp_path, tmp_path / "checkpoint-9")
    kept = [path.name for path in checkpoints.all_checkpoints(tmp_path)]
    assert kept == ["checkpoint-8", "checkpoint-9"]


def test_seal_tells_an_added_byte(tmp_path):
    (tmp_path / "part").write_bytes(b"whole")
    seal(tmp_path)
    assert damage(tmp_path) is None
    (tmp_path / "part").write_bytes(b"whole!")
    assert damage(tmp_path) == "part is damaged"
