"""The torch backend's experts on a CPU against the two naive ways, inference and training.

``python -m benchmarks.cpu_experts [--hidden 512] [--rank 16] [--json]``. T rows, H hidden, R expert
rank, E experts, Q experts present. Processor time of one thread (other work on the machine does not
count), the three ways taking turns, the best of the rounds; each way is checked before it is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qar_kernels import Segments, reference, torch_backend

ROWS = (8, 64, 256, 1024)
EXPERTS = (1, 8, 64, 1000)
Way = Callable[..., Tensor]


def segmented(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, segments: Segments) -> Tensor:
    """This project's way."""
    return torch_backend.expert_mlp(x, gate, up, down, segments)


def loop(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, segments: Segments) -> Tensor:
    """Loop over the queriers that are present: the reference backend."""
    return reference.expert_mlp(x, gate, up, down, segments)


def gather(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, segments: Segments) -> Tensor:
    """Gather every row's weights, then batched products."""
    ids = segments.row_expert.clamp(min=0)
    hidden = F.silu(torch.bmm(gate[ids], x.unsqueeze(2))) * torch.bmm(up[ids], x.unsqueeze(2))
    y = torch.bmm(down[ids], hidden).squeeze(2)
    return torch.where((segments.row_expert >= 0)[:, None], y, 0)


WAYS: dict[str, Way] = {"segmented": segmented, "loop": loop, "gather": gather}


def cells(hidden: int, rank: int, budget_s: float) -> Iterator[dict]:
    """One result per T, E, arrangement of the rows and pass."""
    for rows in ROWS:
        for experts in EXPERTS:
            for arrangement, ids in _arrangements(rows, experts).items():
                tensors = _tensors(rows, experts, hidden, rank)
                segments = Segments.from_ids(ids)
                _verify(tensors, segments)
                for training in (False, True):
                    ms = _interleaved(tensors, segments, training, budget_s)
                    yield {
                        "pass": "training" if training else "inference",
                        "T": rows,
                        "E": experts,
                        "Q": ids.unique().numel(),
                        "rows": arrangement,
                        "H": hidden,
                        "R": rank,
                        "ms": ms,
                        "better_naive_over_segmented": min(ms["loop"], ms["gather"]) / ms["segmented"],
                    }


def _arrangements(rows: int, experts: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows * experts)
    blocks = torch.randint(experts, (-(-rows // 32),), generator=draw)
    return {
        "one id per row": torch.randint(experts, (rows,), generator=draw),
        "32 rows per id": blocks.repeat_interleave(32)[:rows],
    }


def _tensors(rows: int, experts: int, hidden: int, rank: int) -> list[Tensor]:
    shapes = [(rows, hidden), (experts, rank, hidden), (experts, rank, hidden), (experts, hidden, rank)]
    return [torch.randn(shape).div_(shape[-1] ** 0.5).requires_grad_() for shape in shapes]


def _verify(tensors: list[Tensor], segments: Segments) -> None:
    x, *weights = (t.detach() for t in tensors)
    expected = reference.expert_mlp(x.double(), *(w.double() for w in weights), segments)
    for name, way in WAYS.items():
        error = (way(x, *weights, segments).double() - expected).norm() / expected.norm()
        if not error < 1e-5:
            raise RuntimeError(f"{name}: relative error {error:.1e}, expected below 1e-5")


def _interleaved(
    tensors: list[Tensor], segments: Segments, training: bool, budget_s: float
) -> dict[str, float]:
    def once(way: Way) -> float:
        start = time.process_time()
        if training:
            torch.autograd.grad(way(*tensors, segments).sum(), tensors)
        else:
            with torch.no_grad():
                way(*tensors, segments)
        return time.process_time() - start

    spent = {name: [once(way) + once(way)] for name, way in WAYS.items()}
    rounds = int(min(100, max(5, budget_s / sum(t[0] / 2 for t in spent.values()))))
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    names = list(WAYS)
    for i in range(rounds):
        # Who comes first finds the allocator as the last one left it: take turns.
        for name in names[i % 3 :] + names[: i % 3]:
            times[name].append(once(WAYS[name]))
    return {name: min(t) * 1e3 for name, t in times.items()}


def main(argv: list[str] | None = None) -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_experts", description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per cell")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    form = "{:>5} {:>5} {:>5} {:15} {:10} {:>10} {:>10} {:>10} {:>7}\n"
    if not args.json:
        sys.stdout.write(form.format("T", "E", "Q", "rows", "pass", "segmented", "loop", "gather", "naive/"))
    for cell in cells(args.hidden, args.rank, args.budget):
        results.append(cell)
        if not args.json:
            ms = [f"{cell['ms'][name]:.3f}" for name in WAYS]
            ratio = f"{cell['better_naive_over_segmented']:.2f}"
            sys.stdout.write(
                form.format(cell["T"], cell["E"], cell["Q"], cell["rows"], cell["pass"], *ms, ratio)
            )
            sys.stdout.flush()
    if args.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
