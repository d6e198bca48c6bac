"""Two ranks on the CPU against one rank with the same global batch."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from processes import ENVIRONMENT, completed, free_port, log_of, start
from safetensors.torch import load_file

from train import finetune as finetune_module
from train.callbacks import StopOnInterrupt
from train.checkpoints import last_checkpoint
from train.consolidate import consolidate
from train.errors import UserError
from train.finetune import finetune
from train.trained import EXPERTS, load_trained
from train.trainer import WEIGHTS, QARTrainer

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
STAGES = ["ddp", *(pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (2, 3))]
OTHERS = [pytest.param(name, marks=needs_deepspeed) for name in ("zero1", "zero2_offload", "zero3_offload")]


@pytest.fixture
def config(config):
    """Everything that ranks share is in play: both losses, recomputed activations, gradient accumulation."""
    return config.replace(
        contrastive_weight=0.5,
        memory_size=4,
        projection_dim=8,
        lora_dropout=0.0,
        gradient_checkpointing=True,
        batch_size=4,
        gradient_accumulation=2,
        report_to="none",
    )


def as_two_ranks(config, stage, suffix=""):
    """The same global batch, in the same order, on two ranks."""
    path = None if stage == "ddp" else f"train/ds/{stage}.json"
    return config.replace(batch_size=2, deepspeed=path, output_dir=f"{config.output_dir}_{stage}{suffix}")


def assert_same_curve(got, expected, tolerance=2e-5):
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for name in ("loss", "lm_loss", "contrastive_loss", "grad_norm", "learning_rate"):
        found, wanted = ([row[name] for row in rows] for rows in (got, expected))
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance), name


def assert_same_tensors(got, expected, atol=2e-5):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def die(rank, victim, step):
    """Kill the process ``victim`` when that step starts."""
    original = QARTrainer.training_step

    def training_step(self, *args, **kwargs):
        if rank == victim and self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    QARTrainer.training_step = training_step


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one_and_survive_the_death_of_one(config, stage):
    two, broken = as_two_ranks(config, stage), as_two_ranks(config, stage, "_broken")
    completed(config)
    completed(two, ranks=2)
    assert_same_curve(log_of(two), log_of(config))
    folder = Path(two.output_dir)
    experts = load_file(folder / "trained" / EXPERTS)
    assert_same_tensors(experts, load_file(Path(config.output_dir) / "trained" / EXPERTS))
    parts = load_file(folder / "checkpoint-6" / WEIGHTS)
    assert any(name.endswith("contrast.memory") for name in parts)
    assert not any("base_layer" in name or "embed_tokens" in name for name in parts)
    size = sum(path.stat().st_size for path in (folder / "checkpoint-6").rglob("*.pt"))
    assert size < 12 * sum(tensor.nbytes for tensor in parts.values())  # moments and metadata, no base
    assert_same_tensors(load_file(consolidate(folder, folder / "plain") / EXPERTS), experts, atol=0)
    assert load_trained(folder / "plain").responder

    died = start(broken, ranks=2, before=functools.partial(die, victim=1, step=4))
    assert died.wait() == [2, -signal.SIGKILL]
    assert "error (rank 0): another rank was lost" in died.text(0)
    assert last_checkpoint(Path(broken.output_dir)).name == "checkpoint-2"
    completed(broken, ranks=2, resume=True)
    assert log_of(broken) == log_of(two)
    assert_same_tensors(load_file(Path(broken.output_dir) / "trained" / EXPERTS), experts, atol=0)


class Interrupting(StopOnInterrupt):
    """SIGTERM to this process in step 3."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupt(rank, victim):
    if rank == victim:
        finetune_module.StopOnInterrupt = Interrupting


def test_ranks_stop_together_where_one_is_interrupted(config):
    two = as_two_ranks(config, "ddp")
    stopped = start(two, ranks=2, before=functools.partial(interrupt, victim=1))
    assert stopped.wait() == [130, 130], stopped.text()
    assert last_checkpoint(Path(two.output_dir)).name == "checkpoint-3"
    completed(two, ranks=2, resume=True)
    assert len(log_of(two)) == 6


@pytest.mark.parametrize("stage", OTHERS)
def test_other_stages_equal_one_rank(config, stage):
    two = as_two_ranks(config, stage)
    completed(config)
    completed(two, ranks=2)
    assert_same_curve(log_of(two), log_of(config))


def command_line(config, launcher, tmp_path, root):
    """Run by a launcher, as users do."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config.to_dict(), "lora_targets": list(config.lora_targets)}))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "--config", str(path)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, **ENVIRONMENT},
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_torchrun(config, tmp_path, request):
    two = as_two_ranks(config, "ddp")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "train.finetune"]
    code, text = command_line(two, launcher, tmp_path, request.config.rootpath)
    assert code == 0, text
    assert len(log_of(two)) == 6


@needs_deepspeed
def test_two_nodes(config, tmp_path, request):
    """A launcher each, as on two machines that share a file system."""
    two = as_two_ranks(config, "zero2")
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=run1"]
    launcher = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting, "-m", "train.finetune"]
    with ThreadPoolExecutor() as nodes:
        started = [
            nodes.submit(command_line, two, launcher, tmp_path, request.config.rootpath) for _ in range(2)
        ]
        for node in started:
            code, text = node.result()
            assert code == 0, text
    completed(config)
    assert_same_curve(log_of(two), log_of(config))


@needs_deepspeed
@pytest.mark.parametrize("script", [["train/finetune.py"], ["--module", "train.finetune"]])
def test_deepspeed_launcher(config, tmp_path, request, script):
    two = as_two_ranks(config, "zero2")
    port = f"--master_port={free_port()}"
    launcher = ["deepspeed.launcher.runner", "--num_accelerators=2", port, *script]
    code, text = command_line(two, launcher, tmp_path, request.config.rootpath)
    assert code == 0, text
    assert len(log_of(two)) == 6


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_epoch_of_several_ranks(config, stage):
    one = config.replace(validation=0.5, gradient_accumulation=1)  # batches that two ranks divide
    two = as_two_ranks(one, stage)
    completed(one)
    completed(two, ranks=2)
    best, expected = (load_file(Path(run.output_dir) / "trained" / EXPERTS) for run in (two, one))
    assert_same_tensors(best, expected)


def test_a_mistake_ends_every_rank_with_one_line(config):
    two = as_two_ranks(config, "ddp").replace(model="./absent")
    ended = start(two, ranks=2)
    assert ended.wait() == [2, 2]
    assert "model './absent': no such folder" in ended.text(0)
    assert "Traceback" not in ended.text(0) + ended.text(1)


@needs_deepspeed
@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_file_does_not_choose_the_optimizer(config, tmp_path, section):
    settings = json.loads(Path("train/ds/zero2.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps({**settings, section: {"type": "AdamW"}}))
    with pytest.raises(UserError, match=rf"own\.json: remove the section '{section}'"):
        finetune(config.replace(deepspeed=str(tmp_path / "own.json")))


@needs_deepspeed
def test_a_deepspeed_file_that_cannot_be_read_is_named(config, tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        finetune(config.replace(deepspeed=str(tmp_path / "absent.json")))
    (tmp_path / "cut.json").write_text('{"zero_optimization": ')
    with pytest.raises(UserError, match=r"cut\.json:1: damaged JSON"):
        finetune(config.replace(deepspeed=str(tmp_path / "cut.json")))


@needs_deepspeed
def test_deepspeed_without_a_launcher_is_refused(config):
    with pytest.raises(UserError, match="deepspeed: there is no launcher; start with torchrun"):
        finetune(as_two_ranks(config, "zero2"))
