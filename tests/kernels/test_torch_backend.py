"""The torch backend against float64, gradcheck included, and both backends as citizens of torch."""

import pytest
import torch
from helpers import TOWERS, Case, check
from test_triton import CASES

from qar_kernels import Segments, dual_mlp, expert_mlp, fused_mlp

NAMES = ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")


def leaves_and_segments(dtype=torch.float32, ids=(0, 1, 1, -1, 3, 0, 2), **shape):
    case = Case(list(ids), **shape)
    leaves = case.leaves(dtype)
    return [leaves[name] for name in NAMES], Segments.from_ids(case.ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, tower, dtype):
    check(CASES[name], tower, "torch", dtype)


def test_gradcheck():
    leaves, seg = leaves_and_segments(torch.float64, H=5, I=7, R=3)
    assert torch.autograd.gradcheck(lambda *t: fused_mlp(*t, seg, 0.7, backend="torch"), leaves)
    assert torch.autograd.gradcheck(
        lambda x, *t: expert_mlp(x, *t, seg, backend="torch"), leaves[:1] + leaves[4:]
    )
    assert torch.autograd.gradcheck(lambda *t: dual_mlp(t[0], *t, seg, backend="torch"), leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    leaves, seg = leaves_and_segments(H=16, I=16, R=16)
    if backend == "torch":
        args = (leaves[0], *leaves[4:], seg.perm, seg.offsets, seg.experts)
        torch.library.opcheck(torch.ops.qar.expert_mlp.default, args)
        return
    from qar_kernels.triton.backend import plan_tensors

    plan = plan_tensors(seg.tile_plan(16, 16))
    none = (None, None, None, None)
    for tower, sets in {
        "fused": (*leaves[:4], None, *leaves[4:], None),
        "dual": (*leaves[:4], leaves[0].detach().clone().requires_grad_(), *leaves[4:], None),
        "expert": (*none, leaves[0], *leaves[4:], leaves[0].detach().clone().requires_grad_()),
    }.items():
        args = (tower, *sets, seg.perm, plan, [], 0.7, "tiny", True)
        torch.library.opcheck(
            torch.ops.qar.swiglu_experts.default,
            args,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compile_without_graph_breaks(backend):
    leaves, _ = leaves_and_segments(H=32, I=48)

    def step(ids, *tensors):
        seg = Segments.from_ids(ids)
        x = tensors[0]
        for _ in range(2):
            x = x + fused_mlp(x, *tensors[1:], seg, backend=backend)
        return x

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ids in ([0, 1, 1, -1, 3, 0, 2], [3, 3, 3, 3, 3, -1, -1]):
        ids = torch.tensor(ids)
        expected = torch.autograd.grad(step(ids, *leaves).sum(), leaves)
        got = torch.autograd.grad(compiled(ids, *leaves).sum(), leaves)
        for name, e, g in zip(NAMES, expected, got, strict=True):
            torch.testing.assert_close(g, e, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_export(backend):
    leaves, _ = leaves_and_segments(H=32, I=48)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.nn.Parameter(t.detach()) for t in leaves[1:]])

        def forward(self, x, ids):
            return fused_mlp(x, *self.weights, Segments.from_ids(ids), backend=backend)

    layer, x, ids = Layer(), leaves[0].detach(), torch.tensor([0, 1, 1, -1, 3, 0, 2])
    program = torch.export.export(layer, (x, ids))
    torch.testing.assert_close(program.module()(x, ids), layer(x, ids))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_activation_checkpointing(backend):
    leaves, seg = leaves_and_segments(H=32, I=48)
    plain = torch.autograd.grad(fused_mlp(*leaves, seg, backend=backend).sum(), leaves)
    y = torch.utils.checkpoint.checkpoint(
        lambda *t: fused_mlp(*t, seg, backend=backend), *leaves, use_reentrant=False
    )
    again = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast_casts_like_linear():
    leaves, seg = leaves_and_segments()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_mlp(*leaves, seg, backend="torch")
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_empty_batch(backend):
    leaves, _ = leaves_and_segments()
    empty = leaves[0][:0]
    assert fused_mlp(empty, *leaves[1:], Segments.from_ids([]), backend=backend).shape == (0, 48)


def test_leading_dimensions():
    leaves, _ = leaves_and_segments(ids=[0, 0, 0, 2, 2, 2])
    seg = Segments.from_sequences([0, 2], seq_len=3)
    flat = fused_mlp(*leaves, seg)
    assert torch.equal(fused_mlp(leaves[0].view(2, 3, -1), *leaves[1:], seg), flat.view(2, 3, -1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_experts_added_to_a_base_that_ran_elsewhere(backend):
    leaves, seg = leaves_and_segments()
    base_y = torch.randn_like(leaves[0]).requires_grad_()
    wanted = [leaves[0], base_y, *leaves[4:]]
    y = expert_mlp(leaves[0], *leaves[4:], seg, backend=backend, expert_scale=0.3, base_y=base_y)
    expected = base_y + 0.3 * expert_mlp(leaves[0], *leaves[4:], seg, backend="reference")
    torch.testing.assert_close(y, expected)
    d_y = torch.randn_like(y)
    for got, grad in zip(
        torch.autograd.grad(y, wanted, d_y), torch.autograd.grad(expected, wanted, d_y), strict=True
    ):
        torch.testing.assert_close(got, grad)
    with pytest.raises(ValueError, match="base_y: got shape"):
        expert_mlp(leaves[0], *leaves[4:], seg, backend=backend, base_y=base_y[1:])
