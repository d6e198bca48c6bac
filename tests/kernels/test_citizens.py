"""Both backends as citizens of torch: compiled, exported, checkpointed, under autocast, with fake tensors."""

import functools
import shutil
from contextlib import nullcontext

import pytest
import torch
import torch._inductor.config
from helpers import NAMES, TOWERS, leaves_and_segments
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qar_kernels import Segments, expert_mlp, fused_mlp
from qar_kernels.tile_plan import tile_plan
from qar_kernels.triton import backend as triton_backend


def test_opcheck_of_the_torch_backend():
    leaves, seg = leaves_and_segments(H=16, I=16, R=16)
    args = (leaves[0], *leaves[4:], seg.row_expert)
    torch.library.opcheck(torch.ops.qar.expert_mlp.default, args)


@pytest.mark.parametrize("tower", TOWERS)
def test_opcheck_of_the_kernels(tower):
    # Every row has an expert: the operator also returns the saved pre-activations, in which rows without
    # one are never written nor read, and opcheck compares all of what two runs return.
    leaves, seg = leaves_and_segments(ids=(0, 1, 1, 2, 3, 0, 2), H=16, I=16, R=16)
    plan = triton_backend.plan_tensors(tile_plan(seg, 16, 16))
    other = leaves[0].detach().clone().requires_grad_()
    sets = {
        "fused": (leaves[0], leaves[1:4], None, leaves[4:], None),
        "dual": (leaves[0], leaves[1:4], other, leaves[4:], None),
        "expert": (None, [], leaves[0], leaves[4:], other),
    }[tower]
    args = (*sets, seg.perm, plan, [], tower, 0.7, "tiny", True)
    torch.library.opcheck(torch.ops.qar.swiglu_experts.default, args)


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


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@torch._inductor.config.patch(force_disable_caches=True)
def test_inductor_computes_what_eager_does():
    """It fuses matrix products and sums by patterns of its own, which have lost a factor."""
    torch._dynamo.reset()
    leaves, seg = leaves_and_segments(H=32, I=48)

    def step(*tensors):
        y = fused_mlp(*tensors, seg, 0.5, backend="torch")
        base_y = tensors[0] @ tensors[0].T @ tensors[0]
        return y + expert_mlp(tensors[0], *tensors[4:], seg, expert_scale=0.3, base_y=base_y, backend="torch")

    expected, got = step(*leaves), torch.compile(step, fullgraph=True)(*leaves)
    torch.testing.assert_close(got, expected)
    grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (expected, got))
    for name, eager, compiled in zip(NAMES, *grads, strict=True):
        torch.testing.assert_close(compiled, eager, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@torch._inductor.config.patch(force_disable_caches=True)
def test_inductor_is_told_the_strides_that_results_have():
    torch._dynamo.reset()
    leaves, seg = leaves_and_segments(H=32, I=48)
    leaves = [t.detach().mT.contiguous().mT.requires_grad_() for t in leaves]  # columns first
    step = functools.partial(fused_mlp, seg=seg, backend="torch")
    expected = torch.autograd.grad(step(*leaves).square().sum(), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves).square().sum(), leaves)
    for name, eager, compiled in zip(NAMES, expected, got, strict=True):
        torch.testing.assert_close(compiled, eager, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ids_that_a_compiled_function_gets_are_checked(backend):
    torch._dynamo.reset()
    leaves, _ = leaves_and_segments(H=32, I=48)
    step = torch.compile(
        lambda ids: fused_mlp(*leaves, Segments.from_ids(ids), backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    ids = torch.tensor([0, 1, 1, -1, 3, 0, 2])
    torch.testing.assert_close(step(ids), fused_mlp(*leaves, Segments.from_ids(ids)))
    for wrong in (-2, 4):
        ids[3] = wrong
        with pytest.raises(RuntimeError, match="seg: expert id out of range"):
            step(ids)


def test_export_for_any_number_of_rows():
    leaves, _ = leaves_and_segments(H=32, I=48)
    weights = [leaf.detach() for leaf in leaves[1:]]

    class Layer(torch.nn.Module):
        def forward(self, x, ids):
            return fused_mlp(x, *weights, Segments.from_ids(ids), backend="torch")

    rows, ids = torch.export.Dim("rows"), torch.tensor([0, 1, 1, -1, 3, 0, 2])
    shapes = {"x": {0: rows}, "ids": {0: rows}}
    program = torch.export.export(Layer(), (leaves[0].detach(), ids), dynamic_shapes=shapes).module()
    for count in (2, 3, 50):
        x, some = torch.randn(count, 32), torch.arange(count) % 5 - 1
        torch.testing.assert_close(program(x, some), Layer()(x, some))


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


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("ids", [(0, 1, 1, -1, 3, 0, 2), (0, 1, 2, 3), (2, 2, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_pass_under_autocast(ids, backend, compiled):
    """Of a forward pass that did not run under it, or in a part where it was off."""
    torch._dynamo.reset()
    leaves, seg = leaves_and_segments(ids=ids)
    step = functools.partial(fused_mlp, *leaves, seg, backend=backend)
    expected = torch.autograd.grad(step().sum(), leaves)
    if compiled:
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = step().sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, leaves)
    for name, grad, wanted in zip(NAMES, got, expected, strict=True):
        exact = name.startswith("expert") and not compiled  # of the base PyTorch decides
        torch.testing.assert_close(grad, wanted, rtol=1e-5 if exact else 0.05, atol=1e-5 if exact else 0.05)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_of_gradients_are_refused(backend):
    leaves, seg = leaves_and_segments()
    with pytest.raises(RuntimeError, match=r"gradients of gradients .* are not implemented"):
        (d_x,) = torch.autograd.grad(
            fused_mlp(*leaves, seg, backend=backend).sum(), leaves[0], create_graph=True
        )
        torch.autograd.grad(d_x.square().sum(), leaves[0])


class LargestCast(TorchDispatchMode):
    """Notes the largest tensor that is cast."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.size = max(self.size, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_experts_of_the_batch_only(compiled):
    leaves, _ = leaves_and_segments()
    x, base, bank = leaves[0], leaves[1:4], [torch.randn(1000, *w.shape[1:]) * 0.1 for w in leaves[4:]]
    ids = torch.tensor([997, 4, -1, 4, 31, 997, 31])
    seg = Segments.from_ids(ids)
    for weight in bank:
        weight.requires_grad_()
    call, watch = functools.partial(fused_mlp, backend="torch"), LargestCast()
    if compiled:  # where no mode may watch
        call, watch = torch.compile(call, fullgraph=True, backend="eager"), nullcontext(LargestCast())
    with torch.autocast("cpu", torch.bfloat16), watch as cast:
        y = call(x, *base, *bank, seg)
    assert cast.size <= max(weight.numel() for weight in (x, *base, bank[0][: len(ids)]))
    few = [w.detach()[[4, 31, 997]].bfloat16().requires_grad_() for w in bank]
    same = Segments.from_ids([{997: 2, 4: 0, 31: 1, -1: -1}[i] for i in ids.tolist()])
    alone = fused_mlp(x.bfloat16(), *(w.bfloat16() for w in base), *few, same, backend="torch")
    assert torch.equal(y, alone)
    y.float().square().sum().backward()
    alone.float().square().sum().backward()
    for weight, lone in zip(bank, few, strict=True):
        assert torch.equal(weight.grad[[4, 31, 997]], lone.grad.float())
        assert weight.grad.count_nonzero() == lone.grad.count_nonzero()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fake_tensors_have_shapes(dtype, backend):
    """Nothing can read which experts are present, autocast neither."""
    leaves, _ = leaves_and_segments()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.autocast("cpu", dtype, enabled=dtype is not None):
        fakes = [mode.from_tensor(leaf) for leaf in leaves]
        segments = Segments.from_ids(mode.from_tensor(torch.tensor([0, 1, 1, -1, 3, 0, 2])))
        y = fused_mlp(*fakes, segments, backend=backend)
    assert isinstance(y, FakeTensor) and y.shape == leaves[0].shape and y.dtype == (dtype or torch.float32)


def test_autocast_leaves_float64_alone_like_linear():
    leaves, seg = leaves_and_segments(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_mlp(*leaves, seg, backend="torch").dtype == torch.float64


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fp32_experts_compile_without_graph_breaks(backend):
    torch._dynamo.reset()
    leaves, seg = leaves_and_segments(torch.float32, H=32, I=48, E=12)
    leaves = [t.detach().half().requires_grad_() for t in leaves[:4]] + leaves[4:]
    step = functools.partial(fused_mlp, backend=backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*leaves, seg).float().sum(), leaves)
    for got, wanted in zip(
        torch.autograd.grad(compiled(*leaves, seg).float().sum(), leaves), expected, strict=True
    ):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_only_the_experts_of_the_batch_are_cast():
    bank = [torch.randn(shape) for shape in ((500, 8, 48), (500, 8, 48), (500, 48, 8))]
    with LargestCast() as cast:
        expert_mlp(torch.randn(3, 48).half(), *bank, Segments.from_ids([400, 7, 400]), backend="torch")
    assert 0 < cast.size <= 2 * 8 * 48
