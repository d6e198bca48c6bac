"""Providers that other libraries make possible; a library that is not installed takes no part.

T rows, Q queriers present, H hidden, I intermediate, R expert rank, E experts.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.inputs import Inputs
from benchmarks.providers import Trial, base_mlp, provider, separate_experts
from benchmarks.shapes import Cell

_GROUPS = 1000  # on a CPU every group costs, however empty
_ADAPTERS = 64  # PEFT builds every adapter as modules of its own, and looks each name up for each sequence


def lora_rank(cell: Cell) -> int:
    """The LoRA rank with about an expert's parameters.

    An expert has ``3 R H``; LoRA of rank r on gate, up and down has ``3 r (H + I)``.
    """
    return max(1, round(cell.R * cell.H / (cell.H + cell.I)))


@provider(no_base=True, fits=lambda cell: cell.E <= _GROUPS)
def grouped_mm(inputs: Inputs) -> Trial:
    """Base, then ``torch._grouped_mm`` over rows sorted by querier; absent experts are empty groups."""
    segments = inputs.segments
    owned = torch.arange(inputs.cell.E, device=inputs.x.device)
    ends = torch.searchsorted(segments.row_expert[segments.perm], owned, right=True).int()
    return Trial(lambda: _grouped(inputs, inputs.experts, ends), [[weight] for weight in inputs.experts])


@provider(no_base=True)
def grouped_mm_present(inputs: Inputs) -> Trial:
    """The same over copies of the present experts alone."""
    present = torch.tensor(sorted(inputs.present), device=inputs.x.device)
    ends = torch.arange(1, inputs.cell.Q + 1, device=present.device, dtype=torch.int32)
    ends = ends * (inputs.cell.T // inputs.cell.Q)

    def forward() -> Tensor:
        return _grouped(inputs, tuple(weight.index_select(0, present) for weight in inputs.experts), ends)

    return Trial(forward, [[weight] for weight in inputs.experts])


def _grouped(inputs: Inputs, experts: tuple[Tensor, ...], ends: Tensor) -> Tensor:
    rows = inputs.x.index_select(0, inputs.segments.perm)
    gate, up, down = (weight.transpose(1, 2) for weight in experts)
    hidden = F.silu(torch._grouped_mm(rows, gate, ends)) * torch._grouped_mm(rows, up, ends)
    return base_mlp(inputs).index_add(0, inputs.segments.perm, torch._grouped_mm(hidden, down, ends))


if find_spec("liger_kernel"):

    @provider(devices=("cuda",), adapts=False)
    def liger_loop(inputs: Inputs) -> Trial:
        """Liger's SwiGLU (what its ``LigerSwiGLUMLP`` runs) for the base, then for each sequence's expert."""
        from liger_kernel.ops import LigerSiLUMulFunction

        def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return F.linear(LigerSiLUMulFunction.apply(F.linear(x, gate), F.linear(x, up)), down)

        experts = separate_experts(inputs)
        length = inputs.cell.T // inputs.cell.Q

        def forward() -> Tensor:
            sequences = zip(inputs.x.split(length), zip(*experts, strict=True), strict=True)
            return mlp(inputs.x, *inputs.base) + torch.cat([mlp(x, *weights) for x, weights in sequences])

        return Trial(forward, experts)


class _MLP(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), inputs.base, strict=True):
            projection = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            projection.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, projection)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


if find_spec("peft"):

    @provider(trains=False, graph=False, adapts=False, fits=lambda cell: cell.Q <= _ADAPTERS)
    def peft_mixed(inputs: Inputs) -> Trial:
        """PEFT's mixed-adapter batch (inference): a LoRA of :func:`lora_rank` for every querier.

        It is another function than an expert, with about as many parameters, and is checked against its
        own formula: ``W x + (alpha / r) B A x`` in each projection.
        """
        from peft import LoraConfig, PeftModel

        rank = lora_rank(inputs.cell)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            init_lora_weights=False,
            target_modules=["gate_proj", "up_proj", "down_proj"],
        )
        names = [f"querier_{querier}" for querier in inputs.present]
        model = PeftModel(_MLP(inputs), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        model = model.eval().to(inputs.x.device, inputs.x.dtype)
        x = inputs.x.view(inputs.cell.Q, -1, inputs.cell.H)

        def answer(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
            rows = [_lora_mlp(model, name, x[i].to(dtype)) for i, name in enumerate(names)]
            return {"y": torch.cat(rows)}

        return Trial(lambda: model(x, adapter_names=names).view_as(inputs.x), answer=answer)

    def _lora_mlp(model: nn.Module, name: str, x: Tensor) -> Tensor:
        def project(projection: nn.Module, x: Tensor) -> Tensor:
            base, down, up = (
                module.weight.detach().to(x.dtype)
                for module in (projection.base_layer, projection.lora_A[name], projection.lora_B[name])
            )
            return F.linear(x, base) + F.linear(F.linear(x, down), up) * projection.scaling[name]

        mlp = model.get_base_model()
        hidden = F.silu(project(mlp.gate_proj, x)) * project(mlp.up_proj, x)
        return project(mlp.down_proj, hidden)
