"""float16 and its scaled loss on the CPU, which accelerate and DeepSpeed leave out: the tests turn it on."""

import functools
import math
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import completed, log_of, start
from test_distributed import as_two_ranks, die, needs_deepspeed

from train import setup
from train.checkpoints import last_checkpoint

OVERFLOWS, FITS = 2.0**16, 2.0**8


def scale_on_cpu(rank, scale, victim=None):
    """Let this process scale its loss, at first by ``scale``; ``victim`` dies when step 6 starts."""
    setup._check_machine = lambda config: None
    original = Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type != "DEEPSPEED":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)

    Accelerator.__init__ = with_scaler
    die(rank, victim, step=6)


def scale_with_deepspeed(rank, victim=None):
    """The same under DeepSpeed, whose own scale begins at 2^16."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True
    scale_on_cpu(rank, OVERFLOWS, victim)


@pytest.fixture
def config(config):
    return config.replace(
        dtype="float16",
        contrastive_weight=0.5,
        memory_size=4,
        projection_dim=8,
        lora_dropout=0.0,
        batch_size=4,
        report_to="none",
    )


def losses(config):
    return [row["loss"] for row in log_of(config)]


def test_float16_is_near_float32(config):
    exact = config.replace(dtype="float32", learning_rate=1e-3, output_dir=f"{config.output_dir}_32")
    half = exact.replace(dtype="float16", output_dir=config.output_dir)
    completed(exact)
    completed(half, before=functools.partial(scale_on_cpu, scale=FITS))
    assert losses(half) == pytest.approx(losses(exact), rel=2e-3)
    assert losses(half) != losses(exact)


@pytest.mark.parametrize("experts", ["dense", "sparse"])
def test_an_overflow_skips_a_step_and_a_resumed_run_remembers_the_scale(config, experts):
    whole = config.replace(expert_gradients=experts)
    broken = whole.replace(output_dir=f"{config.output_dir}_broken")
    scaled = functools.partial(scale_on_cpu, scale=OVERFLOWS)
    completed(whole, before=scaled)
    assert math.inf in [row["grad_norm"] for row in log_of(whole)]
    assert all(map(math.isfinite, losses(whole)))
    died = start(broken, before=functools.partial(scaled, victim=0))
    assert died.wait() == [-signal.SIGKILL]
    assert last_checkpoint(Path(broken.output_dir)).name == "checkpoint-4"
    completed(broken, resume=True, before=scaled)
    assert log_of(broken) == log_of(whole)


def test_two_ranks_skip_the_same_steps(config):
    one = config.replace(expert_gradients="sparse")
    two = as_two_ranks(one, "ddp")
    scaled = functools.partial(scale_on_cpu, scale=OVERFLOWS)
    completed(one, before=scaled)
    completed(two, ranks=2, before=scaled)
    assert losses(two)[:3] == pytest.approx(losses(one)[:3], rel=1e-3)
    assert math.inf in [row["grad_norm"] for row in log_of(two)]
    assert losses(two)[-1] < losses(two)[0]


@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_scales_and_resumes(config, stage):
    two, broken = as_two_ranks(config, stage), as_two_ranks(config, stage, "_broken")
    completed(two, ranks=2, before=scale_with_deepspeed)
    assert math.inf in [row["grad_norm"] for row in log_of(two)]
    assert losses(two)[-1] < losses(two)[0]
    died = start(broken, ranks=2, before=functools.partial(scale_with_deepspeed, victim=1))
    assert died.wait() == [2, -signal.SIGKILL]
    assert last_checkpoint(Path(broken.output_dir)).name == "checkpoint-4"
    completed(broken, ranks=2, resume=True, before=scale_with_deepspeed)
    assert log_of(broken) == log_of(two)
