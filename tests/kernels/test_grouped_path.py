"""The path that leaves the base MLP's products to the vendor library, against float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import NAMES, Case, assert_close, check

from qar_kernels import LoRA, Segments, fused_mlp
from qar_kernels.triton import base_mlp


@pytest.fixture(autouse=True)
def grouped(monkeypatch):
    monkeypatch.setenv("QAR_KERNELS_PATH", "grouped")


def draw(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tower", ["fused", "dual"])
@pytest.mark.parametrize("ids", [[0, 3, 3, -1, 1, 0, 2, 3, 3], [-1, -1], [1] * 37])
def test_against_float64(tower, ids, dtype):
    check(Case(ids), tower, "triton", dtype)


@pytest.mark.parametrize("rows", [1, 3, 300])  # 48 columns: less than a block, and blocks with a rest
def test_the_swiglu_and_its_gradients(rows):
    def outcome(mlp, *tensors):
        y = mlp(*tensors)
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    tensors = [draw(rows, 32), draw(48, 32, seed=1), draw(48, 32, seed=2), draw(32, 48, seed=3)]
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def plain(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    ours = outcome(lambda *t: base_mlp.swiglu_mlp(*t, LoRA()), *tensors)
    eager, truth = outcome(plain, *tensors), outcome(plain, *exact)
    for name, got, wanted, measure in zip(("y", "x", "gate", "up", "down"), ours, truth, eager, strict=True):
        assert_close(name, got, wanted, measure)


@pytest.mark.parametrize("trained", [("x",), NAMES])
def test_of_the_base_only_pre_activations_are_saved(trained):
    case = Case([0, 1, 1, -1] * 5, H=64, I=256)
    leaves = case.leaves(torch.float32, requires_grad=False)
    for name in trained:
        leaves[name].requires_grad_()
    held = {}

    def keep(tensor):
        held[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_mlp(*(leaves[name] for name in NAMES), Segments.from_ids(case.ids), backend="triton")
    wide = [tensor for tensor in held.values() if tensor.shape == (len(case.ids), case.I)]
    assert len(wide) == 2


def test_a_frozen_layer_saves_nothing():
    leaves = Case([0, 1]).leaves(torch.float32, requires_grad=False)
    assert fused_mlp(*(leaves[n] for n in NAMES), Segments.from_ids([0, 1]), backend="triton").grad_fn is None


def test_gradients_of_gradients_are_refused():
    case = Case([0, 1, 1])
    leaves = case.leaves(torch.float32)
    y = fused_mlp(*(leaves[n] for n in NAMES), Segments.from_ids(case.ids), backend="triton")
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)
