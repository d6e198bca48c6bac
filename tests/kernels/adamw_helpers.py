"""The optimizer of rows against PyTorch's AdamW in float64, a parameter for each row."""

import torch

from qar_models import RowSparseAdamW


def check(dtype, device="cpu"):
    """Three steps of other experts each; expert 3 is never asked for."""
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    bank = torch.nn.Parameter(torch.randn(5, 7, 300).to(device, dtype))
    before = bank.detach().clone()
    alone = [torch.nn.Parameter(row.double()) for row in before]
    optimizer, others = RowSparseAdamW([bank], **settings), torch.optim.AdamW(alone, **settings)
    for present in ([4, 0, 1], [1], [2, 4]):
        rows = torch.randn(len(present), 7, 300).to(device, dtype)
        ids = torch.tensor([present], device=device)
        bank.grad = torch.sparse_coo_tensor(ids, rows, bank.shape, check_invariants=True)
        others.zero_grad()
        for index, row in zip(present, rows, strict=True):
            alone[index].grad = row.double()
        optimizer.step()
        others.step()
    trained = optimizer.state[bank].get("master", bank)
    torch.testing.assert_close(trained[:3].double(), torch.stack(alone)[:3], rtol=1e-5, atol=1e-6)
    assert torch.equal(bank[3], before[3]) and torch.equal(bank, trained.to(dtype))
