"""Two ranks with uneven batches against one rank with the concatenated batch."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_contrast import fixed_batch, new_contrast

STEPS = (([0, 1, 1, 2, 3], 3), ([1, 1, 1, 1, 2], 4), ([0, -1, 2, 3, 3], 1))


def batches(rank=None):
    """The batch of every step; with a rank, that rank's part of it."""
    for step, (queriers, first) in enumerate(STEPS):
        whole = fixed_batch(queriers, cluster=step % 2, seed=step)
        rows = slice(None) if rank is None else (slice(0, first), slice(first, None))[rank]
        yield {name: tensor[rows] for name, tensor in whole.items()}


def train_one_rank(rank, rendezvous, folder):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    contrast = new_contrast()
    losses = torch.stack([contrast(**batch).detach() for batch in batches(rank)])
    dist.barrier()
    torch.save({"losses": losses, **dict(contrast.named_buffers())}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_score_and_remember_what_one_rank_does(tmp_path):
    contrast = new_contrast()
    losses = torch.stack([contrast(**batch).detach() for batch in batches()])
    mp.spawn(train_one_rank, args=(tmp_path / "rendezvous", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close((ranks[0]["losses"] + ranks[1]["losses"]) / 2, losses)
    for buffers in ranks:
        assert torch.equal(buffers["writes"], contrast.writes)
        for name in ("memory", "totals"):
            expected = dict(contrast.named_buffers())[name]
            torch.testing.assert_close(buffers[name], expected, rtol=1e-5, atol=1e-6)
