import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from train.callbacks import StopOnInterrupt
from train.data.mqdialog import write_mqdialog
from train.data.validation import split_validation
from train.errors import UserError
from train.finetune import finetune
from train.keep_best import BEST, SCORE, KeepBest
from train.trained import EXPERTS
from train.trainer import WEIGHTS


@pytest.fixture
def scores(monkeypatch):
    """The validation scores of the epochs, chosen by the test."""
    chosen: list[float] = []
    monkeypatch.setattr(KeepBest, "_score", lambda self, model: chosen.pop(0))
    return chosen


def experts_of(folder):
    return load_file(Path(folder) / EXPERTS)


def final(config, tmp_path, name, **changes):
    return finetune(config.replace(output_dir=str(tmp_path / "runs" / name), validation=0.2, **changes))


def test_the_best_epoch_is_kept_not_the_last(config, tmp_path, scores):
    scores[:] = [2.0, 1.0, 3.0]
    kept = experts_of(final(config, tmp_path, "best", epochs=3))
    scores[:] = [3.0, 2.0, 1.0]
    last = experts_of(final(config, tmp_path, "last", epochs=3))
    stored = json.loads((tmp_path / "runs" / "best" / BEST / SCORE).read_text())
    assert stored["nll"] == 1.0 and stored["epoch"] == 2.0
    best = load_file(tmp_path / "runs" / "best" / BEST / WEIGHTS)
    moved = [name for name in kept if "down" in name and not torch.equal(kept[name], last[name])]
    assert moved
    for name in moved:  # the trained layers alone are numbered from 0 there
        assert any(torch.equal(kept[name], tensor) for tensor in best.values())


def test_the_best_of_a_run_without_checkpoint_does_not_win(config, tmp_path, scores):
    scores[:] = [1.0]
    final(config, tmp_path, "run", epochs=1)
    for path in [*(tmp_path / "runs" / "run").glob("checkpoint-*"), tmp_path / "runs" / "run" / "trained"]:
        shutil.rmtree(path)  # as if it had been killed before its first checkpoint
    scores[:] = [2.0]
    final(config, tmp_path, "run", epochs=1, seed=1)
    assert json.loads((tmp_path / "runs" / "run" / BEST / SCORE).read_text())["nll"] == 2.0


def test_a_score_that_is_no_number_is_never_the_best(config, tmp_path, scores):
    scores[:] = [float("nan"), 1.0, float("nan"), 2.0]
    final(config, tmp_path, "run", epochs=4)
    assert json.loads((tmp_path / "runs" / "run" / BEST / SCORE).read_text())["nll"] == 1.0
    scores[:] = [float("nan")]
    with pytest.raises(UserError, match="no epoch ended with a finite validation loss"):
        final(config, tmp_path, "none", epochs=1)


def test_validation_windows_must_fit_the_model(config, tmp_path, tiny_data):
    valid = split_validation(tiny_data, 0.2)[1]
    long = " ".join(word for example in tiny_data.train for word in example.reply.split())
    turns = {e.id: (*e.turns[:-1], replace(e.turns[-1], text=long)) for e in valid}
    train = [replace(e, turns=turns.get(e.id, e.turns)) for e in tiny_data.train]
    write_mqdialog(replace(tiny_data, train=train), tmp_path / "long", "planted")
    with pytest.raises(UserError, match="no validation window fits into max_tokens=64"):
        final(config, tmp_path, "run", data=str(tmp_path / "long"), max_tokens=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_score_is_that_of_the_validation_windows(config, tmp_path, dtype):
    final(config, tmp_path, "run", epochs=2, dtype=dtype)
    log = json.loads((tmp_path / "runs" / "run" / "log.json").read_text())
    found = [row["valid_nll"] for row in log if "valid_nll" in row]
    assert len(found) == 2 and found[1] < found[0]
    stored = json.loads((tmp_path / "runs" / "run" / BEST / SCORE).read_text())
    assert stored["nll"] == min(found)


@pytest.mark.parametrize("training", [True, False])
def test_the_score_is_a_mean_over_tokens_without_dropout(monkeypatch, training):
    model, batches = (
        torch.nn.Dropout(0.5).train(training),
        {"short": ([4.0], [2]), "long": ([1.0, 1.0], [1, 4])},
    )

    def reply_nll(model, batch):
        assert not model.training
        return tuple(map(torch.tensor, batches[batch]))

    monkeypatch.setattr("train.keep_best.reply_nll", reply_nll)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext))
    assert KeepBest._score(SimpleNamespace(trainer=trainer, loader=batches), model) == pytest.approx(6 / 7)
    assert model.training == training


def test_an_interrupted_epoch_is_not_scored(config, tmp_path, monkeypatch):
    changes = {"output_dir": str(tmp_path / "runs" / "cut"), "validation": 0.2, "epochs": 2}
    step = StopOnInterrupt.on_step_end

    def stop_at_two(self, args, state, control, **kwargs):
        self.interrupted = state.global_step == 2
        step(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StopOnInterrupt, "on_step_end", stop_at_two)
        finetune(config.replace(**changes))
    assert not (tmp_path / "runs" / "cut" / BEST).exists()
    resumed = experts_of(finetune(config.replace(**changes), resume=True))
    unbroken = experts_of(final(config, tmp_path, "whole", epochs=2))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_an_epoch_whose_scoring_was_cut_short_is_scored_when_resumed(config, tmp_path, monkeypatch):
    changes = {"output_dir": str(tmp_path / "runs" / "cut"), "validation": 0.2, "epochs": 2, "save_steps": 1}
    score, scored = KeepBest._score, []

    def cut(self, model):
        scored.append(model)
        if len(scored) == 2:
            raise KeyboardInterrupt  # as if killed in the last epoch's scoring
        return score(self, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KeepBest, "_score", cut)
        finetune(config.replace(**changes))
    finetune(config.replace(**changes), resume=True)
    final(config, tmp_path, "whole", epochs=2, save_steps=1)
    cut_short, whole = (
        json.loads((tmp_path / "runs" / name / "log.json").read_text()) for name in ("cut", "whole")
    )
    kept = [[row["valid_nll"] for row in log if "valid_nll" in row] for log in (cut_short, whole)]
    assert len(kept[0]) == 2 and kept[0] == kept[1]
