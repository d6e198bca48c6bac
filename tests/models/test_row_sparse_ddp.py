"""Row-sparse expert gradients under DistributedDataParallel, beside ``average_row_gradients``."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from tiny_models import aware_model, batch_of
from torch.nn.parallel import DistributedDataParallel

from qar_models import (
    RowSparseAdamW,
    average_row_gradients,
    clip_grad_norm_,
    exclude_from_ddp,
    sparse_parameters,
)

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


class LossOf(torch.nn.Module):
    """Computes the loss of the model inside, as LightningModules do."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **batch):
        return self.inner(**batch)


def with_lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        with_lora,
        torch.compile,
        lambda model: torch.compile(with_lora(model)),
        lambda model: exclude_from_ddp(LossOf(model)),
        lambda model: exclude_from_ddp(LossOf(torch.compile(with_lora(model)))),
        lambda model: exclude_from_ddp(torch.compile(LossOf(model))),
        exclude_from_ddp,
    ],
)
def test_ddp_ignores_them_in_every_wrapper(wrap):
    module = wrap(aware_model(expert_gradients="sparse"))
    ignored = set(module._ddp_params_and_buffers_to_ignore)
    sparse = {
        name
        for name, p in module.named_parameters()
        if name.endswith(("gate", "up", "down")) and p.requires_grad
    }
    assert len(sparse) == 6 and ignored & dict(module.named_parameters()).keys() == sparse


def test_what_ddp_ignores_otherwise_stays_ignored():
    module = LossOf(aware_model(expert_gradients="sparse"))
    module._ddp_params_and_buffers_to_ignore = ["inner.lm_head.weight"]
    assert exclude_from_ddp(module)._ddp_params_and_buffers_to_ignore[0] == "inner.lm_head.weight"
    assert not any(name.endswith("to_ignore") for name in module.state_dict())


WRAPPERS = {"bare": lambda model: model, "loss": lambda model: exclude_from_ddp(LossOf(model))}


def train_one_rank(rank, rendezvous, folder):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for name, wrap in WRAPPERS.items():
        train_in(wrap, rank, os.path.join(folder, f"{name} {rank}.pt"))
    dist.destroy_process_group()


def train_in(wrap, rank, path):
    model = aware_model(expert_gradients="sparse").train()
    optimizer = RowSparseAdamW(model.parameters(), **SETTINGS)
    parallel = DistributedDataParallel(wrap(model), broadcast_buffers=False)
    for asking in RANKS:
        optimizer.zero_grad()
        parallel(**batch_of(*asking[rank], seed=rank), use_cache=False).loss.backward()
        average_row_gradients(sparse_parameters(model).values())
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.save(model.state_dict(), path)


RANKS = [((3, 0, 3), (2, 1, 0)), ((-1, -1, -1), (4, 4, 4)), ((2, 2, 2), (0, 0, 0))]


def test_two_ranks_train_as_one(tmp_path):
    mp.spawn(train_one_rank, args=(tmp_path / "rendezvous", tmp_path), nprocs=2)
    model = aware_model(expert_gradients="sparse").train()
    optimizer = RowSparseAdamW(model.parameters(), **SETTINGS)
    for asking in RANKS:
        optimizer.zero_grad()
        for rank, queriers in enumerate(asking):
            (model(**batch_of(*queriers, seed=rank), use_cache=False).loss / 2).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for wrapper in WRAPPERS:
        first, second = (torch.load(tmp_path / f"{wrapper} {rank}.pt") for rank in (0, 1))
        for name, parameter in model.state_dict().items():
            assert torch.equal(first[name], second[name]), (wrapper, name)
            torch.testing.assert_close(first[name], parameter, rtol=1e-3, atol=2e-4)
