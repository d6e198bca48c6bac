"""The registry of ways to compute ``base(x) + expert_q(x)``, and this project's and the naive ones.

A provider prepares a :class:`Trial` from the shared tensors, outside the clock. What it may know of a batch
is what a server knows: the sequences and who asks in each. ``base`` and ``base_compiled`` leave the
experts out: they are what everything is divided by.

T rows, Q queriers present, H hidden, I intermediate, R expert rank, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import Inputs, base_answer, expert_answer
from benchmarks.shapes import Cell
from qar_kernels import expert_mlp, fused_mlp, torch_backend
from qar_kernels.dispatch import OVERRIDE

_GATHER_BYTES = 16 * 2**30  # gathered weights above this do not leave room for their gradients
Answer = Callable[[Inputs, torch.dtype], dict[str, Tensor]]


@dataclass(frozen=True)
class Trial:
    """A provider at work on given tensors.

    Attributes:
        forward: computes y (T, H).
        experts: for gate, up and down the leaves that get gradients: the stacked tensor, or one leaf for
            every present expert in order, or none where the provider has no experts.
        answer: what it must agree with.
    """

    forward: Callable[[], Tensor]
    experts: list[list[Tensor]] = field(default_factory=list)
    answer: Answer = expert_answer


@dataclass(frozen=True)
class Provider:
    """A way of computing.

    Attributes:
        prepare: from tensors to a trial.
        devices: where it runs.
        trains: whether it has a backward pass (PEFT's mixed batches have none).
        infers: whether it differs from another provider without a backward pass.
        graph: whether a CUDA graph can capture it: nothing is read or looked up on the host.
        no_base: whether it can do without a base MLP.
        adapts: whether its base may have adapters.
        fits: whether a cell is within its means.
    """

    prepare: Callable[[Inputs], Trial]
    devices: tuple[str, ...] = ("cpu", "cuda")
    trains: bool = True
    infers: bool = True
    graph: bool = True
    no_base: bool = False
    adapts: bool = True
    fits: Callable[[Cell], bool] = lambda cell: True

    def applies(self, cell: Cell, device: str, training: bool) -> bool:
        """Whether the provider takes part in a cell."""
        return (
            device in self.devices
            and (self.trains if training else self.infers)
            and (self.no_base or cell.I > 0)
            and (self.adapts or cell.A is None)
            and self.fits(cell)
        )


PROVIDERS: dict[str, Provider] = {}
WITHOUT_EXPERTS = ("base", "base_compiled")


def provider(**limits: object) -> Callable[[Callable[[Inputs], Trial]], Callable[[Inputs], Trial]]:
    """Register a function ``Inputs -> Trial`` under its own name."""

    def register(prepare: Callable[[Inputs], Trial]) -> Callable[[Inputs], Trial]:
        if prepare.__name__ in PROVIDERS:
            raise ValueError(f"provider '{prepare.__name__}': there is one of that name already")
        PROVIDERS[prepare.__name__] = Provider(prepare, **limits)
        return prepare

    return register


def base_mlp(inputs: Inputs) -> Tensor:
    """Two GEMMs, silu and product, one GEMM, and its adapters; zeros where the cell has no base MLP."""
    if inputs.base is None:
        return torch.zeros_like(inputs.x)
    return torch_backend.swiglu_mlp(inputs.x, *inputs.base, inputs.lora)


@provider()
def base(inputs: Inputs) -> Trial:
    """B0, the plain base MLP."""
    return Trial(lambda: base_mlp(inputs), answer=base_answer)


@provider(adapts=False)
def base_compiled(inputs: Inputs) -> Trial:
    """B0 under ``torch.compile``."""
    return Trial(lambda: _compiled(inputs.x, *inputs.base), answer=base_answer)


_compiled = torch.compile(torch_backend.swiglu_mlp, dynamic=False, fullgraph=True)


def _ours(inputs: Inputs, **options: object) -> Trial:
    def forward() -> Tensor:
        if inputs.base is None:
            return expert_mlp(inputs.x, *inputs.experts, inputs.segments, **options)
        weights = *inputs.base, *inputs.experts
        return fused_mlp(inputs.x, *weights, inputs.segments, lora=inputs.lora, **options)

    return Trial(forward, [[weight] for weight in inputs.experts])


@provider(no_base=True)
def ours(inputs: Inputs) -> Trial:
    """What a user gets: ``backend="auto"``."""
    return _ours(inputs)


@provider(no_base=True, infers=False, graph=False)
def ours_sparse(inputs: Inputs) -> Trial:
    """``sparse_gradients=True``: gradients of the rows that the batch holds, for hundreds of experts."""
    return _ours(inputs, sparse_gradients=True)


@provider(no_base=True, devices=("cuda",), graph=False)
def ours_torch(inputs: Inputs) -> Trial:
    """The torch backend on a card; it reads the segment bounds on the host."""
    return _ours(inputs, backend="torch")


@provider(devices=("cuda",))
def ours_fused(inputs: Inputs) -> Trial:
    """Base and experts in the same Triton launches."""
    return _forced(inputs, "fused")


@provider(devices=("cuda",))
def ours_grouped(inputs: Inputs) -> Trial:
    """The vendor library's base, then grouped Triton kernels that add the experts."""
    return _forced(inputs, "grouped")


def _forced(inputs: Inputs, path: str) -> Trial:
    trial = _ours(inputs, backend="triton")

    def forward() -> Tensor:
        with _environment(OVERRIDE, path):
            return trial.forward()

    return Trial(forward, trial.experts)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def separate_experts(inputs: Inputs) -> list[list[Tensor]]:
    """A module for every querier, as naive code has it: no stacked gradients to fill."""
    return [
        [w.detach()[e].clone().requires_grad_(inputs.training) for e in inputs.present]
        for w in inputs.experts
    ]


@provider(no_base=True, graph=False)
def loop(inputs: Inputs) -> Trial:
    """Base, then each present querier's rows picked out, in any order."""
    experts = separate_experts(inputs)

    def forward() -> Tensor:
        y, ids = base_mlp(inputs), inputs.segments.row_expert
        for querier, weights in zip(inputs.present, zip(*experts, strict=True), strict=True):
            rows = (ids == querier).nonzero().squeeze(1)
            y = y.index_add(0, rows, torch_backend.swiglu_mlp(inputs.x[rows], *weights))
        return y

    return Trial(forward, experts)


@provider(no_base=True)
def loop_slices(inputs: Inputs) -> Trial:
    """Base, then sequence after sequence as slices: the bounds are known on the host, nothing is picked."""
    experts = separate_experts(inputs)
    length = inputs.cell.T // inputs.cell.Q

    def forward() -> Tensor:
        parts = [
            torch_backend.swiglu_mlp(x, *weights)
            for x, weights in zip(inputs.x.split(length), zip(*experts, strict=True), strict=True)
        ]
        return base_mlp(inputs) + torch.cat(parts)

    return Trial(forward, experts)


def _gathered_bytes(cell: Cell, copies: int) -> int:
    return 3 * copies * cell.R * cell.H * getattr(torch, cell.dtype).itemsize


@provider(no_base=True, fits=lambda cell: _gathered_bytes(cell, cell.T) <= _GATHER_BYTES)
def gather_bmm(inputs: Inputs) -> Trial:
    """Base, then a copy of its expert's weights for every row, in batched products."""
    return _gather(inputs, inputs.segments.row_expert, rows=1)


@provider(no_base=True, fits=lambda cell: _gathered_bytes(cell, cell.Q) <= _GATHER_BYTES)
def gather_bmm_sequences(inputs: Inputs) -> Trial:
    """Base, then a copy for every sequence. Only for sequences of equal length, as here."""
    ids = torch.tensor(inputs.present, device=inputs.x.device)
    return _gather(inputs, ids, rows=inputs.cell.T // inputs.cell.Q)


def _gather(inputs: Inputs, ids: Tensor, rows: int) -> Trial:
    def forward() -> Tensor:
        x = inputs.x.view(-1, rows, inputs.cell.H)
        gate, up, down = (weight[ids].transpose(1, 2) for weight in inputs.experts)
        hidden = F.silu(torch.bmm(x, gate)) * torch.bmm(x, up)
        return base_mlp(inputs) + torch.bmm(hidden, down).view_as(inputs.x)

    return Trial(forward, [[weight] for weight in inputs.experts])
