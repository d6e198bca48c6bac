"""The low-rank experts of one decoder layer.

H hidden, R expert rank, E experts in the bank (one per querier, or one for all).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from qar_kernels import dual_mlp, expert_mlp, fused_mlp
from qar_kernels.torch_backend import add_scaled, swiglu_mlp
from qar_models.base_mlp import BaseMLP
from qar_models.config import QARConfig
from qar_models.distributed import is_sharded
from qar_models.towers import TowerBatch


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
        self.trained: TrainedExperts | None = None

    @property
    def bank(self) -> tuple[Tensor, Tensor, Tensor]:
        """``gate``, ``up`` and ``down`` of all experts."""
        return self.gate, self.up, self.down

    @property
    def sparse_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are row-sparse, by name."""
        if self.qar.expert_gradients != "sparse":
            return {}
        named = zip(("gate", "up", "down"), self.bank, strict=True)
        return {name: weight for name, weight in named if weight.requires_grad}

    def reset_parameters(self, std: float) -> None:
        """N(0, std); the residual tower's ``down`` starts at zero, so that the model starts as its base."""
        for name, parameter in self.named_parameters(recurse=False):
            if self.qar.tower == "residual" and name.endswith("down"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def forward(
        self, base: BaseMLP | Tensor, x: Tensor, towers: TowerBatch, x_specific: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Residual tower: ``mlp(x) + scale * expert(x)``. Replace tower: ``(mlp(x), expert(x_specific))``.

        Args:
            base: weights and adapters of the layer's base MLP, or ``mlp(x)`` if its own modules must run.
            x: ``(..., H)`` rows of the base MLP.
            towers: the expert of each row of ``x``, or of ``x_specific`` where that is given.
            x_specific: ``(..., H)`` rows of the specific tower.
        """
        if x_specific is None:
            return self._residual(base, x, towers)
        return self._replace(base, x, x_specific, towers)

    def _residual(self, base: BaseMLP | Tensor, x: Tensor, towers: TowerBatch) -> Tensor:
        scale, options = self.qar.expert_scale, self._options()
        if isinstance(base, BaseMLP):
            weights = *base.weights, *self.bank
            y = fused_mlp(x, *weights, towers.segments, scale, lora=base.lora, **options)
        else:
            base_y = base.to(x.dtype)
            y = expert_mlp(x, *self.bank, towers.segments, expert_scale=scale, base_y=base_y, **options)
        for extra in self._extras(x, towers):
            y = add_scaled(y, extra, scale)
        return y

    def _replace(
        self, base: BaseMLP | Tensor, x: Tensor, x_specific: Tensor, towers: TowerBatch
    ) -> tuple[Tensor, Tensor]:
        options = self._options()
        if isinstance(base, BaseMLP):
            weights = *base.weights, *self.bank
            general, specific = dual_mlp(x, x_specific, *weights, towers.segments, lora=base.lora, **options)
        else:
            general, specific = base, expert_mlp(x_specific, *self.bank, towers.segments, **options)
        for extra in self._extras(x_specific, towers):
            specific = specific + extra
        return general, specific

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of every call of the kernels."""
        return {"backend": self.qar.backend, "sparse_gradients": self.qar.expert_gradients == "sparse"}

    def _extras(self, x: Tensor, towers: TowerBatch) -> Iterator[Tensor]:
        """What comes on top of the bank: experts that train alone, the shared one, the mean of all."""
        if self.trained is not None:
            yield expert_mlp(x, *self.trained.bank, towers.trained, backend=self.qar.backend)
        if self.qar.experts == "shared+per_querier":
            yield _swiglu(x, self.shared_gate, self.shared_up, self.shared_down)
        if self.qar.unknown_querier == "mean" and towers.may_be_unknown:
            unknown = towers.segments.row_expert < 0
            if self.trained is not None:
                unknown = unknown & (towers.trained.row_expert < 0)
            mean = _swiglu(x, *self._mean())
            # not a product: an infinite mean times zero would be everybody's NaN
            yield torch.where(unknown.view(*x.shape[:-1], 1), mean, 0.0)

    def _mean(self) -> tuple[Tensor, ...]:
        """The mean of all experts; those in training count with their latest values, but get no gradient."""
        # a mean's gradient is dense: with sparse gradients, unknown queriers train nobody's expert
        bank = [weight.detach() for weight in self.bank] if self.sparse_parameters else self.bank
        means = tuple(weight.mean(0) for weight in bank)
        if self.trained is None:
            return means
        return tuple(
            mean + (trained.detach() - weight[self.trained.rows]).sum(0) / len(weight)
            for mean, weight, trained in zip(means, bank, self.trained.bank, strict=True)
        )

    def write_back(self) -> None:
        """Put the values of experts that train alone into the bank, too."""
        if self.trained is not None:
            self.trained.write_back(self)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.trained is not None:
            self.trained.read(self)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        experts, rank, hidden = self.gate.shape
        return f"{experts} experts, rank {rank}, hidden {hidden}, {self.qar.experts}, tower={self.qar.tower}"


def _swiglu(x: Tensor, *weights: Tensor) -> Tensor:
    """One expert for all rows, cast to their dtype as the kernels cast a bank: fp32 over a bf16 base."""
    return swiglu_mlp(x, *(weight.to(x.dtype) for weight in weights))


class TrainedExperts(nn.Module):
    """Copies of a few experts of a frozen bank. State dicts hold their values in the bank's own tensors.

    With copies, gradients and optimizer states cover only what is trained, and no optimizer can change
    anybody else's expert, as weight decay would.
    """

    def __init__(self, experts: Experts, rows: list[int]) -> None:
        super().__init__()
        self.rows = rows
        self.gate, self.up, self.down = (nn.Parameter(weight.detach()[rows]) for weight in experts.bank)

    @property
    def bank(self) -> tuple[Tensor, Tensor, Tensor]:
        """``gate``, ``up`` and ``down`` of the trained experts."""
        return self.gate, self.up, self.down

    @torch.no_grad()
    def write_back(self, experts: Experts) -> None:
        """Put the trained rows into the bank."""
        for weight, trained in zip(experts.bank, self.bank, strict=True):
            weight[self.rows] = trained

    @torch.no_grad()
    def read(self, experts: Experts) -> None:
        """Take the rows from the bank: the inverse of :meth:`write_back`."""
        for weight, trained in zip(experts.bank, self.bank, strict=True):
            trained.copy_(_shard_like(trained, _whole(weight)[self.rows]))

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for name, trained in self.named_parameters():
            key = prefix.removesuffix("trained.") + name
            bank = destination[key]
            rows = _whole(bank.detach()).clone()
            rows[self.rows] = _whole(trained.detach())
            destination[key] = _shard_like(bank, rows)

    def _load_from_state_dict(self, *_: Any) -> None:
        """Does nothing: the bank's tensors hold the values, and :class:`Experts` copies them from there."""


def _whole(weight: Tensor) -> Tensor:
    """All rows of a weight that FSDP2 has sharded (every rank must ask), or else the weight itself."""
    return weight.full_tensor() if is_sharded(weight) else weight


def _shard_like(weight: Tensor, whole: Tensor) -> Tensor:
    """``whole``, which every rank has, sharded as ``weight`` is."""
    if not is_sharded(weight):
        return whole
    from torch.distributed.tensor import distribute_tensor  # which PyTorch may be built without

    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
