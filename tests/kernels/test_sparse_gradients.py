"""``sparse_gradients=True``: the dense gradients' rows for the experts of the batch, on every backend."""

import pytest
import torch
from helpers import NAMES, TOWERS, Case, run

from qar_kernels import Segments, expert_mlp

BANK = ("d_expert_gate", "d_expert_up", "d_expert_down")
BATCHES = {
    "one": [3] * 7,
    "one of a row": [2],
    "in any order": [5, 1, 5, -1, 0, 1, 1],
    "equally long, with gaps": [5, 5, 0, 0, 3, 3],
    "equally long neighbours": [4, 4, 2, 2, 3, 3],
    "everybody": [5, 4, 3, 2, 1, 0],
    "nobody": [-1, -1, -1],
}


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES)
def test_rows_of_the_dense_gradients(ids, tower, backend):
    case = Case(ids, E=6)
    dense = run(case, tower, backend, torch.float32)
    sparse = run(case, tower, backend, torch.float32, sparse_gradients=True)
    for name, expected in dense.items():
        got = sparse[name]
        if name in BANK and not (backend == "reference" and max(ids) < 0):  # which then makes no gradients
            assert got.is_sparse and got._indices().tolist() == [sorted({id for id in ids if id >= 0})]
            got = got.to_dense()
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name}: {m}")


def bank_of(owned, rank):
    draw = torch.Generator().manual_seed(0)
    shapes = (owned, rank, 48), (owned, rank, 48), (owned, 48, rank)
    return [torch.randn(shape, generator=draw).mul_(0.1).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("rank", [8, 400])
def test_large_experts_are_read_in_place_to_the_same_bits(rank):
    """The torch backend copies small experts and not large ones; dense and sparse are one computation."""
    ids = torch.tensor([7, 7, 2, -1, 9, 9, 9, 2, 0])
    x, bank = torch.randn(9, 48, requires_grad=True), bank_of(12, rank)
    results = []
    for sparse in (False, True):
        y = expert_mlp(x, *bank, Segments.from_ids(ids), backend="torch", sparse_gradients=sparse)
        grads = torch.autograd.grad(y.square().sum(), [x, *bank])
        results.append([y, *(grad.to_dense() if grad.is_sparse else grad for grad in grads)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_under_autocast():
    x, bank = torch.randn(4, 48), bank_of(50, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_mlp(x, *bank, Segments.from_ids([40, 3, 40, 3]), sparse_gradients=True)
    y.float().sum().backward()
    for weight in bank:
        assert weight.grad.is_sparse and weight.grad.dtype == torch.float32
        assert weight.grad._indices().tolist() == [[3, 40]] and weight.grad._values().any()


def test_a_frozen_bank_has_none_and_a_model_that_answers_copies_nothing():
    case = Case([1, 0, 1], E=6)
    leaves = case.leaves(torch.float32, requires_grad=False)
    x, bank = leaves["x"].requires_grad_(), [leaves[name] for name in NAMES[4:]]
    expert_mlp(x, *bank, Segments.from_ids(case.ids), sparse_gradients=True).sum().backward()
    assert x.grad is not None and all(weight.grad is None for weight in bank)
    segments = Segments.from_ids(case.ids)
    with torch.no_grad():
        expert_mlp(x, *bank, segments, sparse_gradients=True)
    assert "present" not in segments._memo
