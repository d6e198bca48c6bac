"""What a training step costs for experts that are owned but absent from the batch.

``python -m benchmarks.owned [--hidden 512] [--rank 16] [--present 32] [--rows-each 32] [--json]``. One layer:
a frozen base MLP (I = 4 H) and E owned experts of which a fixed number is present. A step is zero_grad,
forward, backward and the optimizer's step. ``MB written`` counts the bytes that all operators write, whatever
else the machine does; ``ms`` is the median of rounds in turns, processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.clocks import clock_of
from benchmarks.runner import interleave
from qar_kernels import Segments
from qar_models import QARConfig, RowSparseAdamW
from qar_models.base_mlp import fusable
from qar_models.experts import Experts
from qar_models.towers import TowerBatch

OWNED = (32, 100, 1000)
OPTIMIZERS = {"dense": torch.optim.AdamW, "sparse": RowSparseAdamW}


class WrittenBytes(TorchDispatchMode):
    """Counts the bytes that operators write: new tensors, and what in-place operators change."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operator and count."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::index_put_", "aten::_index_put_impl_", "aten::index_copy_"):
            self.total += _bytes(args[-1] if name == "aten::index_copy_" else args[2])
        else:
            written = (
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            )
            fresh = () if any(r.alias_info is not None for r in func._schema.returns) else (result,)
            self.total += sum(_bytes(tensor) for tensor in tree_leaves([list(written), fresh]))
        return result


def _bytes(tensor: Any) -> int:
    if not isinstance(tensor, Tensor):
        return 0
    if tensor.layout == torch.sparse_coo:  # made of tensors that were counted when they were written
        return 0
    return tensor.numel() * tensor.element_size()


def training_step(
    owned: int, present: int, rows_each: int, hidden: int, rank: int, layout: str
) -> Callable[[], None]:
    """A step of one layer as a function without arguments."""
    torch.manual_seed(0)
    qar = QARConfig(num_queriers=owned, expert_rank=rank, expert_gradients=layout)
    experts = Experts(qar, hidden, torch.float32, torch.device("cpu"))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=4 * hidden)).requires_grad_(False)
    optimizer = OPTIMIZERS[layout](experts.parameters(), lr=1e-3, weight_decay=0.1)
    ids = torch.randperm(owned)[:present].repeat_interleave(rows_each)
    x = torch.randn(len(ids), hidden).requires_grad_()

    def step() -> None:
        optimizer.zero_grad()
        towers = TowerBatch(Segments.from_ids(ids), present)
        experts(fusable(mlp), x, towers).square().mean().backward()
        optimizer.step()

    return step


def base_step(rows: int, hidden: int) -> Callable[[], None]:
    """Forward and backward of the frozen base MLP alone, on as many rows."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=4 * hidden)).requires_grad_(False)
    x = torch.randn(rows, hidden).requires_grad_()
    return lambda: mlp(x).square().mean().backward()


def written_bytes(step: Callable[[], None]) -> int:
    """Bytes that a step writes, after a first one that makes the optimizer's state."""
    step()
    with WrittenBytes() as counter:
        step()
    return counter.total


def cells(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result per layout and number of owned experts, the base MLP first."""
    clock = clock_of("cpu")
    steps = {"base MLP 0": base_step(args.present * args.rows_each, args.hidden)}
    for layout, owned in product(OPTIMIZERS, OWNED):
        present = min(args.present, owned)
        step = training_step(owned, present, args.rows_each, args.hidden, args.rank, layout)
        steps[f"{layout} {owned}"] = step
    written = {name: written_bytes(step) / 1e6 for name, step in steps.items()}
    for name, timing in interleave(steps, clock, args.seconds).items():
        layout, _, owned = name.rpartition(" ")
        yield {"gradients": layout, "owned": int(owned), "MB": written[name], "ms": timing.p50}


def main(argv: list[str] | None = None) -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.owned", description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--present", type=int, default=32)
    parser.add_argument("--rows-each", type=int, default=32, help="rows of every expert present")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rounds, at least 5")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    results = list(cells(args))
    if args.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return 0
    sys.stdout.write(f"{'gradients':>10} {'owned':>6} {'MB written':>11} {'ms':>9}\n")
    for cell in results:
        sys.stdout.write(
            f"{cell['gradients']:>10} {cell['owned']:>6} {cell['MB']:>11.1f} {cell['ms']:>9.2f}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
