from pathlib import Path

from processes import log_of

from train import plan
from train.finetune import finetune


def test_dry_run_prints_the_plan_and_keeps_nothing(config, capsys):
    plan.dry_run(config.replace(trainable_layers=None))
    text = capsys.readouterr().out
    for part in ("windows", "queriers", "LoRA", "contrastive heads", "optimizer", "first 4 steps"):
        assert part in text
    assert not Path(config.output_dir).exists()


def test_plan_counts_steps_as_the_trainer_does(config):
    for batch_size, accumulation in ((5, 1), (5, 2)):
        changes = {"batch_size": batch_size, "gradient_accumulation": accumulation}
        changed = config.replace(output_dir=f"{config.output_dir}_{accumulation}", **changes)
        finetune(changed)
        assert plan.num_steps(changed, 24) == log_of(changed)[-1]["step"]
