"""What a run is made of: optimizers, schedules, seeds."""

import json
from pathlib import Path

import pytest
import torch

from train import setup
from train.base_model import load_base
from train.batches import Windows
from train.data.encode import encode_all
from train.dataset import load_data
from train.finetune import finetune
from train.trained import build


def test_lora_and_experts_have_learning_rates_and_decays_of_their_own(config, tiny_data):
    config = config.replace(
        learning_rate=1e-3,
        weight_decay=0.2,
        expert_learning_rate=4e-3,
        expert_weight_decay=0.3,
        adam_beta2=0.9,
    )
    model, tokenizer = load_base(config.model)
    build(model, config, tuple(tiny_data.queriers), 1)
    windows = Windows(encode_all(tiny_data.train, tokenizer, **config.encoding))
    optimizer = setup.make_trainer(model, tokenizer, windows, config).create_optimizer()
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in found)
        if parameter.requires_grad:
            group = found[id(parameter)]
            expected = (4e-3, 0.3) if ".experts." in name else (1e-3, 0.2)
            assert (group["lr"], group["weight_decay"]) == expected and group["betas"][1] == 0.9


def test_what_is_added_to_the_base_is_drawn_by_the_seed(config):
    def drawn(seed):
        model = setup.prepare(config.replace(seed=seed), load_data(config)).model
        return [p.detach() for p in model.parameters() if p.requires_grad and p.any()]

    first, again, other = map(drawn, (0, 0, 1))
    assert len(first) > 4 and all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


def test_the_log_has_both_learning_rates_which_rise_and_fall(config):
    finetune(config.replace(learning_rate=1e-3, expert_learning_rate=4e-3, warmup_ratio=0.5))
    log = json.loads((Path(config.output_dir) / "log.json").read_text())
    rates = [(row["learning_rate"], row["expert_learning_rate"]) for row in log if "loss" in row]
    assert [general for general, _ in rates] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 7.5e-4, 2.5e-4])
    assert [own for _, own in rates] == pytest.approx([4 * general for general, _ in rates])
