"""The torch backend against float64, gradcheck included, and what both backends promise beside it."""

import functools
from contextlib import nullcontext

import pytest
import torch
import torch._inductor.config
from helpers import NAMES, TOWERS, Case, check, leaves_and_segments
from test_triton import CASES

from qar_kernels import Segments, dual_mlp, expert_mlp, fused_mlp
from qar_kernels.silu import silu, silu_backward


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


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_empty_batch(backend):
    leaves, _ = leaves_and_segments()
    empty = leaves[0][:0]
    assert fused_mlp(empty, *leaves[1:], Segments.from_ids([]), backend=backend).shape == (0, 48)
    call = functools.partial(fused_mlp, backend=backend)
    assert call(empty, *leaves[1:], Segments.from_ids([]), sparse_gradients=True).shape == (0, 48)
    if backend != "reference":  # whose loop reads ids
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert compiled(empty, *leaves[1:], Segments.from_ids([])).shape == (0, 48)


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
    alone = expert_mlp(leaves[0], *leaves[4:], seg, backend=backend, expert_scale=0.3)
    torch.testing.assert_close(alone, expected - base_y)
    with pytest.raises(ValueError, match="base_y: got shape"):
        expert_mlp(leaves[0], *leaves[4:], seg, backend=backend, base_y=base_y[1:])


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(8))
def test_isolation_to_the_bit(seed, dtype, one_thread):
    """The same T and the same rows of one's own: outputs and gradients do not depend on the company.

    Nobody, queriers with as many rows (who share batched products), and companies of one, two or five move
    the rows to other places of the sorted buffers, whose lengths (37 rows of 8 columns) fit no vector
    register. R is 8 because BLAS itself rounds by alignment where rows are not whole multiples of 32 bytes
    (seen at R 9).
    """
    own, rows, case = [0, 1, 11, 12, 36], 37, Case([0] * 37, R=8, E=6, seed=seed)
    leaves = case.leaves(dtype)
    x, d_y = leaves["x"], case.tensors["d_y"].to(dtype)
    weights = [leaves[name] for name in NAMES[4:]]
    draw, results = torch.Generator().manual_seed(3), []
    alone = torch.full((rows,), -1)
    alone[own] = 3
    equally_long = alone.clone()
    equally_long[[2, 3, 20, 21, 22]], equally_long[[4, 5, 6, 7, 8]] = 0, 5
    companies = [alone, equally_long]
    for company in ([2], [4], [-1, 0, 1, 2, 4]):
        ids = torch.tensor(company)[torch.randint(len(company), (rows,), generator=draw)]
        ids[own] = 3
        companies.append(ids)
    for ids in companies:
        y = expert_mlp(x, *weights, Segments.from_ids(ids), backend="torch")
        d_x, *d_weights = torch.autograd.grad(y, [x, *weights], d_y)
        results.append([y[own], d_x[own], *(grad[3] for grad in d_weights)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, results[0], strict=True))


def test_an_activation_has_the_same_bits_wherever_a_buffer_ends():
    x, d_y = torch.randn(2, 2048)
    for first in (lambda size: silu(x[:size]), lambda size: silu_backward(d_y[:size], x[:size])):
        whole = first(len(x))
        assert all(torch.equal(first(size), whole[:size]) for size in range(1, 300))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sparse", [False, True])
def test_segments_of_inference_serve_training(backend, sparse):
    leaves, _ = leaves_and_segments()
    kept = {}
    for mode in (torch.inference_mode, nullcontext):
        with mode():
            segments = kept.setdefault("segments", Segments.from_ids([0, 1, 1, -1, 3, 0, 2]))
            y = fused_mlp(*leaves, segments, backend=backend, sparse_gradients=sparse)
    y.sum().backward()
    assert leaves[-1].grad.is_sparse == sparse
    before = [leaf.grad.to_dense().clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    fresh = Segments.from_ids([0, 1, 1, -1, 3, 0, 2])
    fused_mlp(*leaves, fresh, backend=backend, sparse_gradients=sparse).sum().backward()
    assert all(torch.equal(leaf.grad.to_dense(), grad) for leaf, grad in zip(leaves, before, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [0, -1, 2]])
def test_results_may_be_changed_in_place(backend, ids):
    leaves, _ = leaves_and_segments(ids=(0,) * 6)
    x, experts = leaves[0], leaves[4:]
    y = expert_mlp(x, *experts, Segments.from_sequences(ids, 2), backend=backend)
    expected = y.detach() + 1
    y += 1
    assert torch.equal(y, expected)
    y.sum().backward()


MIXED = [
    ("torch", torch.float16),
    ("torch", torch.bfloat16),
    ("triton", torch.float16),
    ("reference", torch.bfloat16),
]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(("backend", "dtype"), MIXED)
def test_fp32_experts_beside_16_bit_rows(backend, dtype, tower, sparse):
    """The bits are those of experts that were cast beforehand, the gradients the experts' own dtype."""
    leaves, seg = leaves_and_segments(torch.float32, (6, 1, 1, -1, 3, 6, 2), E=9)
    rows, bank = [t.detach().to(dtype).requires_grad_() for t in leaves[:4]], leaves[4:]
    cast = [t.detach().to(dtype).requires_grad_() for t in bank]

    def step(experts):
        options = {"backend": backend, "sparse_gradients": sparse}
        if tower == "fused":
            outputs = (fused_mlp(*rows, *experts, seg, **options),)
        elif tower == "dual":
            outputs = dual_mlp(rows[0], *rows, *experts, seg, **options)
        else:
            outputs = (expert_mlp(rows[0], *experts, seg, **options),)
        grads = torch.autograd.grad(sum(y.float().square().sum() for y in outputs), [rows[0], *experts])
        return outputs, grads

    outputs, grads = step(bank)
    expected, expected_grads = step(cast)
    assert all(map(torch.equal, outputs, expected)) and outputs[0].dtype == dtype
    assert [grad.dtype for grad in grads] == [dtype, *[torch.float32] * 3]
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert got.is_sparse == wanted.is_sparse
        assert torch.equal(got.to_dense(), wanted.to_dense().to(got.dtype))
