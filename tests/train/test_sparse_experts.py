"""Runs with row-sparse expert gradients: one rank, two ranks, and the experts' own optimizer under ZeRO."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest
import torch
from processes import completed, log_of, start
from safetensors.torch import load_file

from train import finetune as module
from train.callbacks import StopOnInterrupt
from train.errors import UserError
from train.expert_optimizer import FILE, ExpertOptimizer
from train.finetune import finetune
from train.trained import EXPERTS, load_trained
from train.trainer import QARTrainer

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.fixture
def config(config):
    return config.replace(expert_gradients="sparse", expert_weight_decay=0.1, lora_dropout=0.0)


def experts_of(config):
    return load_file(Path(config.output_dir) / "trained" / EXPERTS)


class InterruptAtThree(StopOnInterrupt):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        super().on_step_end(args, state, control, **kwargs)


def interrupt_at_three(_rank):
    module.StopOnInterrupt = InterruptAtThree


def test_learns_and_resumes(config, monkeypatch):
    trained = load_trained(finetune(config))
    assert trained.model.qar.expert_gradients == "sparse"
    found = [row["loss"] for row in log_of(config)]
    assert sum(found[-2:]) < sum(found[:2])
    broken = config.replace(output_dir=config.output_dir + "_broken")
    monkeypatch.setattr(module, "StopOnInterrupt", InterruptAtThree)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken)
    monkeypatch.undo()
    finetune(broken, resume=True)
    for name, tensor in experts_of(config).items():
        assert torch.equal(tensor, experts_of(broken)[name]), name


@pytest.mark.parametrize("stage", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_ranks(config, stage):
    """Under DeepSpeed the experts are clipped by a norm of their own, so the losses agree less closely."""
    deepspeed = None if stage == "ddp" else f"train/ds/{stage}.json"
    two = config.replace(batch_size=4, deepspeed=deepspeed, output_dir=f"{config.output_dir}_{stage}")
    completed(config)
    completed(two, ranks=2)
    assert [row["loss"] for row in log_of(two)] == pytest.approx(
        [row["loss"] for row in log_of(config)], rel=1e-2 if deepspeed else 1e-4
    )
    if deepspeed:
        assert (Path(two.output_dir) / "checkpoint-6" / FILE).is_file()
        broken = two.replace(output_dir=f"{two.output_dir}_broken")
        assert all(code != 0 for code in start(broken, 2, before=interrupt_at_three).wait())
        completed(broken, ranks=2, resume=True)
        for name, tensor in experts_of(two).items():
            assert torch.equal(tensor, experts_of(broken)[name]), name


def unclipped(_rank):
    """transformers then asks for the gradients' norm alone, and nothing of ours has to clip."""
    init = QARTrainer.__init__

    def without_clipping(self, model, arguments, **kwargs):
        arguments.max_grad_norm = 0.0
        init(self, model, arguments, **kwargs)

    QARTrainer.__init__ = without_clipping


def test_two_ranks_train_the_same_experts_without_clipping(config):
    two = config.replace(batch_size=2, gradient_accumulation=2, output_dir=f"{config.output_dir}_two")
    completed(config, before=unclipped)
    completed(two, ranks=2, before=unclipped)
    one, other = ([(row["loss"], row["grad_norm"]) for row in log_of(run)] for run in (config, two))
    torch.testing.assert_close(torch.tensor(other), torch.tensor(one), rtol=1e-3, atol=1e-4)
    for name, tensor in experts_of(config).items():
        torch.testing.assert_close(experts_of(two)[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_what_does_not_fit_is_refused(config):
    bank = [torch.nn.Parameter(torch.zeros(2, 3, 4))]
    for stage, dtype in ((3, "float32"), (2, "float16")):
        with pytest.raises(UserError, match=f"expert_gradients: got 'sparse' with ZeRO-{stage} and {dtype}"):
            ExpertOptimizer(bank, {"lr": 1e-3}, stage, dtype)
    with pytest.raises(UserError, match="expert_gradients: got 'sparse' with experts='shared'"):
        config.replace(experts="shared")
