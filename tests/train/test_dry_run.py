from pathlib import Path

import pytest
from processes import log_of

from qar_models import sparse_parameters
from train.dataset import load_data
from train.dry_run import dry_run, memory, num_steps
from train.errors import UserError
from train.finetune import finetune
from train.setup import prepare


def test_dry_run_prints_the_plan_and_keeps_nothing(config, capsys):
    dry_run(config.replace(trainable_layers=None))
    text = capsys.readouterr().out
    for part in ("windows", "queriers", "LoRA", "contrastive heads", "optimizer", "first 4 steps"):
        assert part in text
    assert not Path(config.output_dir).exists()


def test_a_run_under_deepspeed_is_planned_without_a_launcher(config, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    dry_run(config.replace(deepspeed="train/ds/zero2.json", dtype="bfloat16"))
    text = " ".join(capsys.readouterr().out.split())
    assert "train/ds/zero2.json │ no launcher: steps ran without │" in text
    assert "first 4 steps" in text
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        dry_run(config.replace(deepspeed="absent.json", model="not loaded"))


def test_plan_counts_steps_as_the_trainer_does(config):
    for batch_size, accumulation in ((5, 1), (5, 2)):
        changes = {"batch_size": batch_size, "gradient_accumulation": accumulation}
        changed = config.replace(output_dir=f"{config.output_dir}_{accumulation}", **changes)
        finetune(changed)
        assert num_steps(changed, 24) == log_of(changed)[-1]["step"]


def test_sparse_experts_are_whole_on_every_rank(config, monkeypatch):
    """What the optimizer holds, against the plan of a rank of two."""
    sparse = config.replace(expert_gradients="sparse", deepspeed="train/ds/zero2.json", dtype="bfloat16")
    prepared = prepare(sparse, load_data(sparse))
    monkeypatch.setattr("train.ranks.world_size", lambda: 2)
    experts = sum(parameter.numel() for parameter in sparse_parameters(prepared.model).values())
    others = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad) - experts
    found = memory(prepared, sparse)
    assert found["optimizer"] == 12 * (experts + others / 2)
    asked = sparse.batch_size / len(prepared.model.qar.querier_names)
    assert found["gradients"] == 2 * (experts * min(1, asked) + others / 2)
