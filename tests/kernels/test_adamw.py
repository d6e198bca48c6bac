"""The optimizer's kernel in the interpreter, against PyTorch's AdamW of every row by itself."""

from functools import partial

import pytest
import torch

from qar_models import RowSparseAdamW, optim

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.999), "weight_decay": 0.1, "eps": 1e-8}
sparse = partial(torch.sparse_coo_tensor, check_invariants=True)
ASKING = [(2, 0), (1, 3, 0), (0,), (), (3, 2, 0)]


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    monkeypatch.setattr(optim, "has_kernels", lambda device: True)


def rows_of_step(step, shape):
    draw = torch.Generator().manual_seed(step)
    return torch.randn(len(ASKING[step]), *shape, generator=draw)


def train(bank, **options):
    optimizer = RowSparseAdamW([bank], **SETTINGS, **options)
    for step, asking in enumerate(ASKING):
        rows = rows_of_step(step, bank.shape[1:]).to(bank.dtype)
        bank.grad = sparse(torch.tensor([asking], dtype=torch.int64), rows, bank.shape)
        optimizer.step()
    return optimizer


def trained_alone(bank, row):
    """The row as a parameter of its own, in float64."""
    alone = torch.nn.Parameter(bank.detach()[row].double().clone())
    optimizer = torch.optim.AdamW([alone], **SETTINGS)
    for step, asking in enumerate(ASKING):
        if row in asking:
            alone.grad = rows_of_step(step, bank.shape[1:]).to(bank.dtype)[asking.index(row)].double()
            optimizer.step()
    return alone.detach()


@pytest.mark.parametrize("shape", [(3, 5), (2, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_row_trains_as_by_adamw_on_its_own_steps(shape, dtype):
    bank = torch.nn.Parameter(torch.randn(5, *shape).to(dtype))
    before = bank.detach().clone()
    state = train(bank).state[bank]
    for row in range(4):
        expected = trained_alone(before, row)
        torch.testing.assert_close(state.get("master", bank)[row].double(), expected, rtol=2e-6, atol=1e-7)
    assert state["step"].tolist() == [4, 1, 2, 2, 0]
    assert torch.equal(bank[4], before[4])
    if dtype == torch.float16:
        assert torch.equal(bank, state["master"].half())


def test_a_constant_gradient_moves_a_row_by_the_learning_rate_in_every_step():
    """The bias corrections to the last digits, which a small learning rate hides."""
    bank = torch.nn.Parameter(torch.zeros(1, 4))
    optimizer = RowSparseAdamW([bank], lr=1.0, weight_decay=0.0)
    for step in range(1, 9):
        bank.grad = sparse(torch.tensor([[0]]), torch.ones(1, 4), bank.shape)
        optimizer.step()
        torch.testing.assert_close(bank.detach(), torch.full((1, 4), -float(step)), rtol=3e-6, atol=0)


def test_as_the_form_without_a_kernel(monkeypatch):
    banks = [torch.nn.Parameter(torch.linspace(-1, 1, 60).view(5, 3, 4)) for _ in range(2)]
    train(banks[0], maximize=True)
    monkeypatch.setattr(optim, "has_kernels", lambda device: False)
    train(banks[1], maximize=True)
    torch.testing.assert_close(banks[0], banks[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])  # it is a sum over devices
def test_a_gradient_scaler(found_inf):
    bank = torch.nn.Parameter(torch.randn(4, 3))
    before = bank.detach().clone()
    optimizer = RowSparseAdamW([bank], **SETTINGS)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([8.0]), torch.tensor([found_inf])
    rows = torch.randn(2, 3)
    bank.grad = sparse(torch.tensor([[1, 2]]), 8 * rows, bank.shape)
    optimizer.step()
    skipped = torch.equal(bank, before) and not optimizer.state[bank]["step"].any()
    assert skipped == bool(found_inf)
    if not found_inf:
        torch.testing.assert_close(optimizer.state[bank]["exp_avg"][1:3], 0.1 * rows)


def test_small_scaled_gradients_of_16_bits_are_not_lost():
    bank = torch.nn.Parameter(torch.zeros(2, 4, dtype=torch.float16))
    optimizer = RowSparseAdamW([bank], **SETTINGS)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([65536.0]), torch.tensor([0.0])
    bank.grad = sparse(torch.tensor([[1]]), torch.full((1, 4), 1e-4, dtype=torch.float16), bank.shape)
    optimizer.step()
    assert (optimizer.state[bank]["exp_avg"][1] > 0).all()


def test_gradients_in_another_order_of_memory():
    banks = [torch.nn.Parameter(torch.zeros(3, 2, 4)) for _ in range(2)]
    rows = torch.randn(2, 4, 2).transpose(1, 2)
    for bank, values in zip(banks, (rows, rows.contiguous()), strict=True):
        bank.grad = sparse(torch.tensor([[0, 2]]), values, bank.shape)
        RowSparseAdamW([bank], **SETTINGS, maximize=True).step()
    assert torch.equal(*banks)
