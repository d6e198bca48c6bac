"""FSDP2 on two ranks: what trains as one process does, and what is refused before any work."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import NAMES, TOWERS, aware_model, training_batch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

from qar_models import average_row_gradients, remove_qar, sparse_parameters

WHOLE = StateDictOptions(full_state_dict=True)
RUNS = {
    **{f"{tower}, everything": (tower, None) for tower in TOWERS},
    "residual, two": ("residual", ("Amy", "a/b")),
    "replace, one": ("replace", "Howard"),
}


def model_of(tower, **settings):
    return aware_model(tower=tower, querier_names=NAMES, **settings).train()


def shard(model, **options):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batches():
    """Of both ranks: as many labels in each, and everybody asks."""
    for queriers in ([0, 1, 4], [2, 0, 3]):
        yield training_batch() | {"querier_ids": torch.tensor(queriers)}


def step(model, batches, lr=0.5):
    trained = [p for p in model.parameters() if p.requires_grad]
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    average_row_gradients(sparse_parameters(model).values())
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None:
                parameter.sub_(
                    lr * (parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad)
                )


def on_one_rank(rank, rendezvous, folder):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mine = [list(batches())[rank]]
    for run, (tower, names) in RUNS.items():
        model = model_of(tower)
        model.train_only(names)
        step(shard(model), mine)
        state = get_model_state_dict(model, options=WHOLE)
        resumed = model_of(tower)
        resumed.train_only(names)
        shard(resumed)
        set_model_state_dict(resumed, get_model_state_dict(model))
        assert_same_shards(resumed, model)
        if rank == 0:
            torch.save(state, folder / f"{run}.pt")
    check_refusals(folder)
    check_sparse(mine, rank, folder)
    dist.destroy_process_group()


def assert_same_shards(model, expected):
    state = get_model_state_dict(model)
    for name, value in get_model_state_dict(expected).items():
        assert torch.equal(state[name].to_local(), value.to_local()), name


def check_refusals(folder):
    model = shard(model_of("residual", experts="shared+per_querier"))
    for call in (
        lambda: model.train_only("Amy"),
        lambda: model.save_experts(folder / "experts"),
        lambda: model.add_queriers("Raj"),
        lambda: model.remove_queriers("Amy"),
        lambda: remove_qar(model),
    ):
        with pytest.raises(NotImplementedError, match=r"got sharded parameters .*, expected whole"):
            call()
    assert not (folder / "experts").exists()


def check_sparse(mine, rank, folder):
    model = shard(model_of("residual", expert_gradients="sparse"))
    with pytest.raises(NotImplementedError, match=r"expert_gradients: got 'sparse' .* ignored_params"):
        model(**mine[0])
    model = model_of("residual", expert_gradients="sparse")
    step(shard(model, ignored_params=set(sparse_parameters(model).values())), mine)
    state = get_model_state_dict(model, options=WHOLE)
    if rank == 0:
        torch.save(state, folder / "sparse.pt")


def test_two_ranks_train_as_one(tmp_path):
    mp.spawn(on_one_rank, args=(tmp_path / "rendezvous", tmp_path), nprocs=2)
    for run, (tower, names) in {**RUNS, "sparse": ("residual", None)}.items():
        model = model_of(tower)
        model.train_only(names)
        step(model, list(batches()))
        got = torch.load(tmp_path / f"{run}.pt")
        expected = model.state_dict()
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=f"{run}: {name}")
