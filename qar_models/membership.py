"""Queriers are named, added, removed, trained on their own, and saved to and loaded from a folder.

E experts in a bank, C clusters, Q queriers, K memory slots, P projection.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from typing import Literal

import torch
from torch import Tensor, nn

from qar_models import expert_files
from qar_models.config import QARConfig, few
from qar_models.distributed import check_not_sharded
from qar_models.experts import Experts, TrainedExperts

Names = str | Sequence[str]


class MembershipMixin:
    """Methods of every querier-aware ``ForCausalLM``.

    Adding and removing create new parameters, so build optimizers afterwards. Everybody else's answers stay
    the same to the bit, except that ``unknown_querier="mean"`` averages over all queriers. The new parameters
    are all made before the first one is used: that takes memory for a second copy of the experts, and leaves
    the model as it was if there is not enough.

    What changes or saves experts raises ``NotImplementedError`` after FSDP2's ``fully_shard``, and
    ``ValueError`` where weights are offloaded.
    """

    @property
    def qar(self) -> QARConfig:
        """The settings. Setting them here updates the decoder, the configuration and every bank of experts.

        What modules are built from (counts, sizes, tower, layers, contrastive softmax) must stay the same.
        On a PEFT model read them as usual, and set those of its ``get_base_model()``.

        Raises:
            TypeError: on setting anything but a QARConfig.
        """
        return self.model.qar

    @qar.setter
    def qar(self, qar: QARConfig) -> None:
        if not isinstance(qar, QARConfig):
            raise TypeError(f"qar: got a {type(qar).__name__}, expected a QARConfig")
        self.model.qar = qar
        self.config.qar = qar.to_dict()
        for module in self.model.modules():  # PEFT may have wrapped a layer's experts
            if isinstance(module, Experts):
                module.qar = qar

    @property
    def queriers(self) -> dict[str, int]:
        """Querier name -> id, a copy; empty if no names were given."""
        return dict(self.qar.ids_by_name)

    def name_queriers(self, names: Sequence[str]) -> None:
        """Give every querier a (new) name, in order of id.

        Raises:
            TypeError: for a single string.
            ValueError: for another number of names than there are queriers, or for duplicates.
        """
        if isinstance(names, str):
            raise TypeError(f"names: got {names!r}, expected a sequence of names")
        if len(names) != self.qar.num_queriers:
            raise ValueError(f"names: got {len(names)} names, expected {self.qar.num_queriers}")
        self.qar = dataclasses.replace(self.qar, querier_names=tuple(names))

    def add_queriers(
        self,
        names: Names,
        init: Literal["zero", "mean"] = "zero",
        like: str | None = None,
        share: str | None = None,
    ) -> None:
        """Append queriers; they get the next ids.

        Args:
            names: one name or several, all new.
            init: ``"zero"`` (the expert gives zeros, but can learn) or ``"mean"`` (the mean of all experts).
            like: start as copies of this querier's expert instead.
            share: no new experts: this querier's is theirs, too (:attr:`QARConfig.querier_experts`).

        Raises:
            TypeError: for names that are no strings.
            ValueError: for names that exist, occur twice or are empty, an unknown ``init``, ``like`` or
                ``share``, a model whose queriers have no names or are fixed (a reference checkpoint's), or
                while ``train_only`` is on.
        """
        names = _as_list(names)
        self._check_idle()
        self._check_named()
        repeated = {name for name, count in Counter(names).items() if count > 1}
        taken = sorted(repeated | (self.qar.ids_by_name.keys() & names))
        if taken or not names:
            raise ValueError(f"names: got {few(taken or names)}, expected new names, each once")
        if init not in ("zero", "mean"):
            raise ValueError(f"init: got {init!r}, expected 'zero' or 'mean'")
        if share is not None:
            self._check_own_experts()
        source, shared = (None if name is None else self._experts([name]) for name in (like, share))
        std, count, owned = self.config.initializer_range, len(names), self.qar.num_experts
        experts_of = shared * count if shared else range(owned, owned + count)
        self._replace_rows(
            (*self.qar.ids_by_name, *names),
            (*self.qar.expert_of_each, *experts_of),
            lambda experts, name: _append(experts, name, 0 if shared else count, std, init, source),
            lambda old, dim: torch.cat((old, _zeros(old, dim, count)), dim),
        )

    def remove_queriers(self, names: Names) -> None:
        """Remove queriers. Later ids move up: look them up in :attr:`queriers` again.

        Experts in folders stay: :func:`~qar_models.delete_experts` deletes them.

        Raises:
            ValueError: for unknown names, if nobody would be left, or while ``train_only`` is on.
        """
        self._check_idle()
        removed = set(self._ids(_as_list(names)))
        kept = [index for index in range(self.qar.num_queriers) if index not in removed]
        if not kept:
            raise ValueError("names: got all queriers, expected at least one to stay")
        names, experts_of = list(self.qar.ids_by_name), self.qar.expert_of_each
        rows = sorted({experts_of[index] for index in kept})  # the experts that somebody still has
        moved = {row: place for place, row in enumerate(rows)}
        self._replace_rows(
            tuple(names[index] for index in kept),
            tuple(moved[experts_of[index]] for index in kept),
            lambda experts, name: _take(getattr(experts, name), 0, rows),
            lambda old, dim: _take(old, dim, kept),
        )

    def train_only(self, names: Names | None) -> None:
        """Train these queriers' experts and nothing else; ``None`` ends it and unfreezes what it froze.

        Whoever shares one of these experts gets what is learnt.

        Until then the trained parameters are ``experts.trained.*``. The model still answers everybody, and
        saved models hold the trained values in the usual place.

        Raises:
            ValueError: for unknown names, or with ``experts="shared"``.
        """
        self._check_own_experts()
        ids = [] if names is None else self._experts(_as_list(names))
        if not self.model.trained_ids:
            self._trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        banks = list(self._banks())
        for experts in banks:
            experts.write_back()
        copies = [TrainedExperts(experts, ids) if ids else None for experts in banks]
        for experts, trained in zip(banks, copies, strict=True):
            experts.trained = trained
        self.model.trained_ids = ids
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".experts.trained." in name if ids else name in self._trainable)

    def save_experts(self, folder: str | PathLike[str], queriers: Names | None = None) -> None:
        """Write experts to ``folder``, one safetensors file per querier and an ``index.json``.

        ``folder`` keeps the experts of other queriers that it has. A crash leaves it as it was. Processes and
        threads that save into one folder take turns, for which its file system must support locks.

        Args:
            folder: created if missing.
            queriers: names; default: all.

        Raises:
            ValueError: for unknown names, or if ``folder`` holds experts of another base model.
        """
        self._check_own_experts()
        names = list(self.queriers) if queriers is None else _as_list(queriers)
        experts = self.qar.expert_of_each
        expert_files.save(self, folder, {n: experts[i] for n, i in zip(names, self._ids(names), strict=True)})

    def load_experts(
        self, folder: str | PathLike[str], queriers: Names | None = None, *, check_base: bool = True
    ) -> None:
        """Read experts that :meth:`save_experts` wrote; new names are added, known ones replaced.

        A new name gets an expert of its own. An expert that several share is replaced if all of them are read
        and have the same.

        Args:
            folder: what :meth:`save_experts` was given.
            queriers: names; default: all that ``folder`` has.
            check_base: whether to refuse experts that were trained beside other weights. Pass False if you
                know that this base model is theirs, with adapters or the shared expert merged, or quantised.

        Raises:
            ValueError: if ``folder`` lacks a name, a file is damaged, the base model is another one, or
                queriers who share an expert would get different ones. The model is then unchanged.
        """
        self._check_own_experts()
        self._check_idle()
        loaded = expert_files.load(self, folder, None if queriers is None else _as_list(queriers), check_base)
        self._check_sharers_agree(loaded)
        new = [name for name in loaded if name not in self.qar.ids_by_name]
        if new:
            self.add_queriers(new)
        experts = self.qar.expert_of_each
        with torch.no_grad():
            for name, tensors in loaded.items():
                for key, row in expert_files.rows(self, experts[self.qar.ids_by_name[name]]).items():
                    row.copy_(tensors[key])

    def _check_sharers_agree(self, loaded: dict[str, dict[str, Tensor]]) -> None:
        """Raise if an expert in ``loaded`` would become that of somebody who does not have it there."""
        if self.qar.querier_experts is None:
            return
        sharers: dict[int, list[str]] = {}
        for name, expert in zip(self.qar.ids_by_name, self.qar.querier_experts, strict=True):
            sharers.setdefault(expert, []).append(name)
        for names in sharers.values():
            read = [loaded[name] for name in names if name in loaded]
            same = all(torch.equal(read[0][key], other[key]) for other in read[1:] for key in other)
            if read and (len(read) < len(names) or not same):
                raise ValueError(
                    f"queriers: got experts for some of {few(names)}, or different ones, expected the same "
                    "for all of them: they share an expert"
                )

    def _experts(self, names: list[str]) -> list[int]:
        """Their experts, each once."""
        return list(dict.fromkeys(self.qar.expert_of_each[index] for index in self._ids(names)))

    def _ids(self, names: list[str]) -> list[int]:
        self._check_named()
        queriers = self.qar.ids_by_name
        unknown = [name for name in names if name not in queriers]
        if unknown or not names or len(set(names)) != len(names):
            raise ValueError(
                f"names: got {few(unknown or names)}, expected distinct names out of {few(list(queriers))}"
            )
        return [queriers[name] for name in names]

    def _banks(self) -> Iterator[Experts]:
        if self.qar.experts != "shared":
            yield from (layer.experts for layer in self.model.layers if layer.experts is not None)

    def _check_named(self) -> None:
        if self.qar.querier_names is None:
            raise ValueError("queriers: have no names yet; name them with name_queriers")

    def _check_own_experts(self) -> None:
        self._check_unwrapped()
        if self.qar.experts == "shared":
            raise ValueError("experts: got 'shared', where no querier has an expert of their own")

    def _check_unwrapped(self) -> None:
        check_not_sharded(self, "queriers")
        if any(weight.is_meta for weight in self.parameters()):
            raise ValueError(
                "model: got offloaded (meta) weights, expected all of them on a device; change queriers and "
                "experts where the model fits, save it, and load the saved folder with the device_map"
            )
        for layer in self.model.layers:
            if not isinstance(layer.experts, Experts | None):
                raise ValueError(
                    f"experts: got a {type(layer.experts).__name__} around them; merge or unload the adapter "
                    "(PEFT's modules_to_save) first"
                )

    def _check_idle(self) -> None:
        self._check_unwrapped()
        if self.model.trained_ids:
            raise ValueError("train_only: still on; end it with train_only(None) first")
        if self.qar.contrast == "reference":
            raise ValueError("contrast: got 'reference', whose queriers are fixed")

    def _replace_rows(
        self,
        names: tuple[str, ...],
        experts_of: tuple[int, ...],
        bank: Callable[[Experts, str], Tensor],
        memory: Callable[[Tensor, int], Tensor],
    ) -> None:
        """Change the banks, the contrastive memory and the names; nothing, if a new tensor cannot be made.

        Args:
            names: of the queriers from then on.
            experts_of: the expert of each of them.
            bank: gives a bank's new ``gate``, ``up`` or ``down``, by name.
            memory: gives a new tensor of the contrastive memory, whose queriers are the given dimension.
        """
        experts_of = None if self.qar.experts == "shared" else experts_of
        qar = dataclasses.replace(
            self.qar, num_queriers=len(names), querier_names=names, querier_experts=experts_of
        )
        new: list[tuple[nn.Module, str, Tensor]] = []
        with torch.no_grad():
            for experts in self._banks():
                for name in ("gate", "up", "down"):
                    old = getattr(experts, name)
                    new.append((experts, name, nn.Parameter(bank(experts, name), old.requires_grad)))
            if self.contrast is not None:
                for name, dim in (("memory", 2), ("totals", 2), ("writes", 1)):
                    new.append((self.contrast, name, memory(getattr(self.contrast, name), dim)))
        for module, name, tensor in new:
            setattr(module, name, tensor)
        if self.contrast is not None:
            self.contrast.num_queriers = len(names)
        self.qar = qar


def _as_list(names: Names) -> list[str]:
    names = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"names: got {wrong[0]!r}, expected strings")
    return names


def _take(old: Tensor, dim: int, kept: list[int]) -> Tensor:
    return old.index_select(dim, torch.tensor(kept, device=old.device))


def _zeros(old: Tensor, dim: int, count: int) -> Tensor:
    shape = list(old.shape)
    shape[dim] = count
    return old.new_zeros(shape)


def _append(
    experts: Experts, name: str, count: int, std: float, init: str, source: list[int] | None
) -> Tensor:
    """The weight ``name`` of a bank with the experts of ``count`` new queriers behind the others."""
    old = getattr(experts, name)
    rows = _zeros(old, 0, count)
    if source is not None:
        rows[:] = old[source]
    elif init == "mean":
        rows[:] = old.mean(0)
    elif name != "down":  # with gate and up at zero too, no gradient would ever arrive
        rows.normal_(0.0, std)
    return torch.cat((old, rows))
