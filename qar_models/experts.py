"""The low-rank experts of one decoder layer.

H hidden, R expert rank, E experts in the bank (one per querier, or one for all).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from qar_kernels import Segments, dual_mlp, expert_mlp, fused_mlp
from qar_models.config import QARConfig


class Experts(nn.Module):
    """A bank of low-rank SwiGLU experts, stacked: ``gate``/``up`` (E, R, H), ``down`` (E, H, R).

    With ``experts="shared+per_querier"`` one more expert, ``shared_*``, serves every row.
    """

    def __init__(self, qar: QARConfig, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.qar = qar
        experts, rank = qar.num_experts, qar.expert_rank
        self.gate = nn.Parameter(torch.empty(experts, rank, hidden_size, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.empty(experts, rank, hidden_size, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, rank, dtype=dtype, device=device))
        if qar.experts == "shared+per_querier":
            self.shared_gate = nn.Parameter(torch.empty(rank, hidden_size, dtype=dtype, device=device))
            self.shared_up = nn.Parameter(torch.empty(rank, hidden_size, dtype=dtype, device=device))
            self.shared_down = nn.Parameter(torch.empty(hidden_size, rank, dtype=dtype, device=device))

    def reset_parameters(self, std: float) -> None:
        """N(0, std); the residual tower's ``down`` starts at zero, so that the model starts as its base."""
        for name, parameter in self.named_parameters(recurse=False):
            if self.qar.tower == "residual" and name.endswith("down"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def forward(
        self, mlp: nn.Module, x: Tensor, segments: Segments, x_specific: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Residual tower: ``mlp(x) + scale * expert(x)``. Replace tower: ``(mlp(x), expert(x_specific))``.

        Args:
            mlp: the layer's base MLP (its ``gate_proj``, ``up_proj`` and ``down_proj`` may be adapters).
            x: ``(..., H)`` rows of the base MLP.
            segments: the expert of each row of ``x``, or of ``x_specific`` where that is given.
            x_specific: ``(..., H)`` rows of the specific tower.
        """
        if x_specific is None:
            return self._residual(mlp, x, segments)
        return self._replace(mlp, x, x_specific, segments)

    def _residual(self, mlp: nn.Module, x: Tensor, segments: Segments) -> Tensor:
        scale, bank = self.qar.expert_scale, (self.gate, self.up, self.down)
        base = _plain_weights(mlp)
        if base is not None:
            y = fused_mlp(x, *base, *bank, segments, scale, self.qar.backend)
        else:
            y = torch.add(mlp(x), expert_mlp(x, *bank, segments, self.qar.backend), alpha=scale)
        extra = self._common(x, segments)
        return y if extra is None else torch.add(y, extra, alpha=scale)

    def _replace(
        self, mlp: nn.Module, x: Tensor, x_specific: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        bank, base = (self.gate, self.up, self.down), _plain_weights(mlp)
        if base is not None:
            general, specific = dual_mlp(x, x_specific, *base, *bank, segments, self.qar.backend)
        else:
            general, specific = mlp(x), expert_mlp(x_specific, *bank, segments, self.qar.backend)
        extra = self._common(x_specific, segments)
        return general, specific if extra is None else specific + extra

    def _common(self, x: Tensor, segments: Segments) -> Tensor | None:
        """What does not depend on the querier: the shared expert, and the mean expert of unknown ones."""
        extra = None
        if self.qar.experts == "shared+per_querier":
            extra = _swiglu(x, self.shared_gate, self.shared_up, self.shared_down)
        if self.qar.unknown_querier == "mean":
            unknown = (segments.row_expert < 0).view(*x.shape[:-1], 1)
            mean = _swiglu(x, self.gate.mean(0), self.up.mean(0), self.down.mean(0)) * unknown
            extra = mean if extra is None else extra + mean
        return extra

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        experts, rank, hidden = self.gate.shape
        return f"{experts} experts, rank {rank}, hidden {hidden}, {self.qar.experts}, tower={self.qar.tower}"


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _plain_weights(mlp: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
    """The three base weights, or None where only calling the modules is right.

    That is where a projection is wrapped (LoRA), quantised, has a bias, hooks of its own (offloading),
    or holds a shard of its weight (ZeRO-3), and where the activation is not SiLU.
    """
    projections = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        return None
    if all(_is_plain(projection) for projection in projections) and not mlp._forward_pre_hooks:
        return tuple(projection.weight for projection in projections)
    return None


def _is_plain(projection: nn.Module) -> bool:
    return (
        type(projection) is nn.Linear
        and projection.bias is None
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and not hasattr(projection, "_hf_hook")
        and projection.weight.shape == (projection.out_features, projection.in_features)
    )
