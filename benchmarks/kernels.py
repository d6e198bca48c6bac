"""The MLP suites: the T x Q x R x model matrix, the experts alone, and what owning many experts costs.

T rows, Q queriers present, E experts owned, R expert rank, H hidden, I intermediate. Segments are made
outside the clock: a model makes them once per forward pass for all its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product

import torch

from benchmarks import libraries  # noqa: F401 - registers its providers
from benchmarks.inputs import Inputs
from benchmarks.providers import PROVIDERS
from benchmarks.runner import Step
from benchmarks.session import Job, Refuse, attempt
from benchmarks.shapes import MODELS, QUERIERS, RANKS, Cell, matrix
from benchmarks.verify import Reference, run_pass

_MAIN_MODEL, _MAIN_RANK = "Llama-3-8B", 64
_CPU_MODELS, _CPU_RANKS = ("SmolLM2-135M", "Qwen2.5-0.5B"), (8, 64)
GRAPH_ROWS = 256  # up to here decoding is the use, and servers replay graphs
# A T x Q subset for the other ranks and models while there is time for no more.
_SAMPLE = {(1, 1), (16, 16), (256, 64), (4096, 64), (16384, 256)}
# With adapters on the base, as fine-tuning has them: where the paths may change places.
_ADAPTED, _ADAPTER_RANK = ((4096, 8), (256, 8), (1024, 8), (16384, 64), (4096, 256)), 16


def mlp_job(rank: int, op: str, cell: Cell, device: str, training: bool, budget_s: float = 0.3) -> Job:
    """All providers that take part in a cell."""
    return Job(rank, op, training, cell, partial(_build, cell, device, training), budget_s)


def _build(cell: Cell, device: str, training: bool, refuse: Refuse) -> dict[str, Step]:
    inputs = Inputs.draw(cell, device, training)
    reference = Reference(inputs)
    steps: dict[str, Step] = {}
    for name, provider in PROVIDERS.items():
        if provider.applies(cell, device, training):
            graph = provider.graph and device == "cuda" and cell.T <= GRAPH_ROWS
            steps |= attempt(name, refuse, partial(_checked_step, name, inputs, reference, graph))
    return steps


def _checked_step(name: str, inputs: Inputs, reference: Reference, graph: bool) -> Step:
    trial = PROVIDERS[name].prepare(inputs)
    reference.check(trial)
    return Step(partial(run_pass, trial, inputs), graph)


def _gpu_budget_s(cell: Cell) -> float:
    """Long calls need time for more than the five rounds at least: 0.99 and 1.00 are to be told apart."""
    return 0.3 if cell.T >= 4096 else 0.06


def gpu_jobs() -> Iterator[Job]:
    """The whole matrix in order of importance: the main model's forward, its training, then the others."""
    for model in MODELS:
        for expert_rank in RANKS:
            main = (model, expert_rank) == (_MAIN_MODEL, _MAIN_RANK)
            for cell in matrix(model, expert_rank):
                for training in (False, True):
                    early = 10 + training if main else 30 if (cell.T, cell.Q) in _SAMPLE else 40
                    yield mlp_job(early, "fused_mlp", cell, "cuda", training, _gpu_budget_s(cell))
    for rows, queriers in _ADAPTED:
        cell = Cell(rows, queriers, max(QUERIERS), _MAIN_RANK, *MODELS[_MAIN_MODEL], A=_ADAPTER_RANK)
        yield mlp_job(12, "fused_mlp", cell, "cuda", True, _gpu_budget_s(cell))


def cpu_jobs() -> Iterator[Job]:
    """A small model's MLP; the experts alone, few and many of them present; with time left, other shapes."""
    hidden, inter = MODELS["SmolLM2-135M"]
    for rows, queriers in ((1, 1), (16, 1), (16, 16), (256, 1), (256, 8), (256, 64), (512, 8), (512, 256)):
        for training in (False, True):
            cell = Cell(rows, queriers, 256, 16, hidden, inter, "float32")
            yield mlp_job(10, "fused_mlp", cell, "cpu", training, 0.5)
    for rows, queriers in ((8, 1), (8, 8), (64, 64), (256, 8), (256, 256), (1024, 256)):
        for training in (False, True):
            yield mlp_job(
                20, "expert_mlp", Cell(rows, queriers, 1000, 16, 512, 0, "float32"), "cpu", training
            )
    for model, rank in product(_CPU_MODELS, _CPU_RANKS):
        for rows, queriers in ((16, 16), (256, 8), (256, 64)):
            for training in (False, True):
                cell = Cell(rows, queriers, 128, rank, *MODELS[model], "float32")
                yield mlp_job(50, "fused_mlp", cell, "cpu", training, 0.5)


def owned_jobs(device: str) -> Iterator[Job]:
    """256 rows, Q present of E owned: the forward cost must follow Q. Training also fills E gradients."""
    hidden, rank, dtype = (128, 8, "float32") if device == "cpu" else (1024, 16, "bfloat16")
    wanted = [(8, owned) for owned in (8, 100, 1000, 10_000)]
    wanted += [(present, 10_000) for present in (1, 64, 256)]
    for present, owned in wanted:
        for training in (False, True):
            cell = Cell(256, present, owned, rank, hidden, 0, dtype)
            yield mlp_job(26 if training else 19, "expert_mlp", cell, device, training, 0.2)


def quick_jobs(device: str) -> Iterator[Job]:
    """One small cell of everything, to see that it works."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    for op, cell in (
        ("fused_mlp", Cell(32, 4, 6, 16, 64, 128, dtype)),
        ("fused_mlp", Cell(32, 4, 6, 16, 64, 128, dtype, A=8)),
        ("expert_mlp", Cell(32, 4, 50, 16, 64, 0, dtype)),
    ):
        for training in (False, True):
            yield mlp_job(10, op, cell, device, training, 0.05)


def jobs(device: str, quick: bool) -> Iterable[Job]:
    """The suite of a device."""
    # One compiled program for each T, model and pass; past the limit torch would run eager without a word.
    torch._dynamo.config.recompile_limit = 4 * len(MODELS) * len(QUERIERS)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if quick:
        yield from quick_jobs(device)
        return
    yield from gpu_jobs() if device == "cuda" else cpu_jobs()
    yield from owned_jobs(device)
