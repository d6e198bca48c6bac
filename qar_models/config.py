"""What makes a model querier-aware: one frozen, checked dataclass, kept in transformers' configurations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

from transformers.modeling_outputs import BaseModelOutputWithPast

from qar_kernels.op import Backend

Tower = Literal["residual", "replace"]
ExpertKind = Literal["per_querier", "shared", "shared+per_querier"]
UnknownPolicy = Literal["none", "error", "mean", "shared"]
ContrastKind = Literal["masked", "reference"]
GradientLayout = Literal["dense", "sparse"]

_OUTPUTS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE = "cache" if "cache" in _OUTPUTS else "past_key_values"
"""What transformers calls the key-value cache in calls and outputs: ``cache`` since 5.24."""

_LOWEST = {
    "num_queriers": 1,
    "expert_rank": 1,
    "memory_size": 1,
    "projection_dim": 1,
    "first_expert_layer": 0,
    "num_clusters": 0,
}


def few(names: Sequence[Any], most: int = 10) -> str:
    """The list, for an error: of thousands only the first."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{list(names[:most])}{more}"


@dataclass(frozen=True)
class QARConfig:
    """Settings of the querier-specific tower (arXiv 2412.11736, section 3).

    ``train.config.TrainConfig`` has defaults of its own for ``experts``, ``expert_rank`` and
    ``contrastive_weight``.

    Attributes:
        num_queriers: number of querier ids, ``0 .. num_queriers - 1``.
        expert_rank: rank R of the low-rank SwiGLU experts.
        tower: ``"residual"`` adds the expert's output to the base MLP's, in one stream of hidden states; an
            untrained model computes exactly what its base does. ``"replace"`` runs a second stream, whose MLP
            is the expert (the paper).
        experts: ``"per_querier"``: one each. ``"shared"``: one for everybody (the paper's code).
            ``"shared+per_querier"``: the sum of both.
        expert_scale: factor on the experts' output in the ``"residual"`` tower.
        first_expert_layer: first decoder layer with experts; the layers below stay plain. If it equals the
            number of layers, there are no experts: the base model under the same interface.
        unknown_querier: what id -1 gets: ``"none"`` (no per-querier expert; ``"residual"`` only), ``"mean"``
            (the mean of all experts, which reads them all), ``"shared"`` (the shared expert alone, with
            ``experts="shared+per_querier"``) or ``"error"`` (a ``ValueError``). Default: ``"none"`` for
            ``"residual"``, ``"error"`` for ``"replace"``.
        querier_names: names in order of id, all different and none empty, saved with the model.
        querier_experts: the expert of each querier, in order of id: those with the same number share one, but
            stay different queriers to the contrastive loss. Numbers from 0 on, none left out. Default: an
            expert each.
        num_clusters: query clusters of the contrastive loss; 0 turns the loss off.
        memory_size: projections remembered per view, cluster and querier (K). Memory is allocated for all
            queriers, :attr:`contrastive_memory_bytes`: 21 GB for 1000 queriers, 10 clusters, K = P = 512.
        projection_dim: width of the two views (P).
        temperature: τ of the contrastive softmax.
        contrastive_weight: λ, the weight of the contrastive loss in the total.
        contrast: the classes of the contrastive softmax: ``"masked"``, only queriers with something in the
            memory, or ``"reference"``, those of the paper's code, see :func:`~qar_models.load_upstream`.
        expert_gradients: layout of the gradients of the per-querier experts ``(E, R, H)``. ``"dense"`` works
            with any optimizer, but every step costs time and memory for all queriers. ``"sparse"`` holds rows
            only for the queriers present and needs :class:`~qar_models.RowSparseAdamW`. Weights and
            checkpoints are the same.
        backend: of the kernels, see :func:`qar_kernels.fused_mlp`. The shared expert beside per-querier ones
            and the mean of all experts do not depend on it: they are ordinary PyTorch operations.

    Raises:
        TypeError, ValueError: naming the attribute, what came and what was expected.
    """

    num_queriers: int
    expert_rank: int = 64
    tower: Tower = "residual"
    experts: ExpertKind = "per_querier"
    expert_scale: float = 1.0
    first_expert_layer: int = 0
    unknown_querier: UnknownPolicy | None = None
    querier_names: tuple[str, ...] | None = None
    querier_experts: tuple[int, ...] | None = None
    num_clusters: int = 0
    memory_size: int = 512
    projection_dim: int = 512
    temperature: float = 0.1
    contrastive_weight: float = 0.5
    contrast: ContrastKind = "masked"
    expert_gradients: GradientLayout = "dense"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choice("tower", Tower)
        self._check_choice("experts", ExpertKind)
        self._check_choice("contrast", ContrastKind)
        self._check_choice("expert_gradients", GradientLayout)
        self._check_choice("backend", Backend)
        if self.unknown_querier is None:
            object.__setattr__(self, "unknown_querier", "none" if self.tower == "residual" else "error")
        self._check_choice("unknown_querier", UnknownPolicy)
        if self.querier_names is not None:
            names = self.querier_names if isinstance(self.querier_names, str) else tuple(self.querier_names)
            # a single string is a sequence of strings too: its letters
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                got = names if isinstance(names, str) else few(names)
                raise TypeError(f"querier_names: got {got!r}, expected a sequence of strings")
            if not all(name.strip() for name in names):
                raise ValueError("querier_names: got an empty name, expected names that can be read")
            object.__setattr__(self, "querier_names", names)
        if self.querier_experts is not None:
            self._check_experts()
        self._check_combinations()

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        if value not in get_args(choices):
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(get_args(choices))}")

    def _check_numbers(self) -> None:
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name}: got {value!r}, expected an integer")
            if value < lowest:
                raise ValueError(f"{name}: got {value}, expected at least {lowest}")
            object.__setattr__(self, name, int(value))  # JSON does not take NumPy's integers
        for name in ("expert_scale", "temperature", "contrastive_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name}: got {value!r}, expected a number")
            if not math.isfinite(value):
                raise ValueError(f"{name}: got {value}, expected a finite number")
            object.__setattr__(self, name, float(value))
        if self.contrastive_weight < 0:
            raise ValueError(f"contrastive_weight: got {self.contrastive_weight}, expected at least 0")
        if self.temperature <= 0:
            raise ValueError(f"temperature: got {self.temperature}, expected a positive number")

    def _check_experts(self) -> None:
        if self.experts == "shared":
            raise ValueError("querier_experts: got some with experts='shared', where all queriers share one")
        experts = tuple(self.querier_experts)
        if not all(isinstance(expert, Integral) and not isinstance(expert, bool) for expert in experts):
            raise TypeError(f"querier_experts: got {few(experts)}, expected integers")
        if len(experts) != self.num_queriers or set(experts) != set(range(len(set(experts)))):
            raise ValueError(
                f"querier_experts: got {few(experts)}, expected {self.num_queriers} numbers, one for each "
                "querier, from 0 on and none left out"
            )
        each = experts == tuple(range(self.num_queriers))
        object.__setattr__(
            self, "querier_experts", None if each else tuple(int(expert) for expert in experts)
        )

    def _check_combinations(self) -> None:
        if self.unknown_querier == "none" and self.tower == "replace":
            raise ValueError(
                "unknown_querier: got 'none' with tower='replace', where a row without an expert has no "
                "MLP; expected 'error', 'mean' or 'shared'"
            )
        if self.unknown_querier == "shared" and self.experts != "shared+per_querier":
            raise ValueError(
                f"unknown_querier: got 'shared' with experts={self.experts!r}, "
                "expected experts='shared+per_querier'"
            )
        if self.expert_gradients == "sparse" and self.experts == "shared":
            raise ValueError(
                "expert_gradients: got 'sparse' with experts='shared', where all rows share one expert; "
                "expected 'dense'"
            )
        names = self.querier_names
        if names is not None and (len(names) != self.num_queriers or len(set(names)) != len(names)):
            raise ValueError(
                f"querier_names: got {len(names)} names ({len(set(names))} different), "
                f"expected {self.num_queriers} different names"
            )

    @property
    def needs_querier_ids(self) -> bool:
        """Whether the forward pass must be told who asks."""
        return self.experts != "shared"

    @cached_property
    def ids_by_name(self) -> dict[str, int]:
        """Querier name -> id; empty if no names were given. Made once, so do not change it."""
        return {name: index for index, name in enumerate(self.querier_names or ())}

    @property
    def contrastive_memory_bytes(self) -> int:
        """Size of the contrastive memory: 2 views, C clusters, Q queriers, K fp32 entries and an fp64 sum."""
        entry = 4 * self.memory_size + 8
        return 2 * self.num_clusters * self.num_queriers * entry * self.projection_dim

    @property
    def num_experts(self) -> int:
        """Experts in each layer's bank (E), without the extra one of ``"shared+per_querier"``."""
        return 1 if self.experts == "shared" else max(self.expert_of_each) + 1

    @cached_property
    def expert_of_each(self) -> tuple[int, ...]:
        """The row in the bank of every querier, in order of id."""
        return self.querier_experts or tuple(range(self.num_queriers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QARConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError, ValueError: for bad values, unknown keys, or without ``num_queriers``.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"QARConfig: got unknown keys {unknown}, expected keys of {sorted(known)}")
        if "num_queriers" not in values:
            raise ValueError(f"QARConfig: got only {sorted(values)}, expected at least num_queriers")
        return cls(**values)


class _AutoMap(dict):
    """A configuration's ``auto_map`` (remote code by Auto class) while it is empty.

    A first ``config.auto_map[key] = value``, as transformers writes it, is kept; other writes are not.
    """

    def __get__(self, config: Any, _: type | None = None) -> _AutoMap:
        empty = _AutoMap()
        empty.config = config
        return empty

    def __setitem__(self, auto_class: str, reference: Any) -> None:
        self.config.auto_map = {auto_class: reference}


class QARConfigMixin:
    """A model configuration whose ``qar`` may be set to a :class:`QARConfig`; it is kept as a dictionary."""

    # TRL reads it where transformers itself has no such model
    auto_map: ClassVar[dict[str, Any]] = _AutoMap()
    # outputs that are not predictions; a list, because transformers' Trainer adds to it
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE, "lm_loss", "contrastive_loss"]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.to_dict() if isinstance(value, QARConfig) else value)
