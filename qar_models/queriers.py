"""From the ids of those who ask to the kernels' segments. B sequences, S tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qar_kernels import Segments
from qar_models.config import QARConfig
from qar_models.towers import TowerBatch


def make_towers(
    qar: QARConfig,
    querier_ids: Tensor | None,
    batch_size: int,
    seq_len: int,
    device: torch.device,
    trained_ids: Sequence[int] = (),
) -> TowerBatch:
    """The expert of each of the ``batch_size * seq_len`` rows, built once per forward pass.

    Args:
        querier_ids: ``(B,)`` or ``(B, S)`` integers, -1 for unknown; may be None with shared experts.
        trained_ids: queriers whose experts train alone, outside the bank.

    Raises:
        ValueError, TypeError: naming ``querier_ids``, what came and what was expected.
    """
    if not qar.needs_querier_ids:
        ids = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return TowerBatch(_segments(ids, seq_len), batch_size)
    ids = _checked_ids(querier_ids, qar, [(batch_size,), (batch_size, seq_len)]).to(device)
    if not trained_ids:
        return TowerBatch(_segments(ids, seq_len), batch_size)
    matches = ids.unsqueeze(-1) == torch.tensor(trained_ids, device=device)
    trained = matches.any(-1)
    position = torch.where(trained, matches.int().argmax(-1), -1)
    others = torch.where(trained, -1, ids)
    return TowerBatch(_segments(others, seq_len), batch_size, _segments(position, seq_len))


def _segments(ids: Tensor, seq_len: int) -> Segments:
    return Segments.from_ids(ids.flatten()) if ids.dim() == 2 else Segments.from_sequences(ids, seq_len)


def check_prompt_ids(querier_ids: Tensor | None, qar: QARConfig, batch_size: int) -> None:
    """Raise what a forward pass would; in generation a prompt has one querier, so ``(B,)`` only."""
    if qar.needs_querier_ids:
        _checked_ids(querier_ids, qar, [(batch_size,)])


def _checked_ids(querier_ids: Tensor | None, qar: QARConfig, shapes: list[tuple[int, ...]]) -> Tensor:
    """Shape and dtype are checked always; the values too where reading them costs no device sync."""
    if querier_ids is None:
        raise ValueError(
            f"querier_ids: missing, but the model has experts={qar.experts!r}; pass querier_ids, an integer "
            f"tensor of shape {shapes[0]} with ids 0..{qar.num_queriers - 1} or -1 (unknown)"
        )
    ids = torch.as_tensor(querier_ids)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"querier_ids: got dtype {ids.dtype}, expected integers")
    if ids.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"querier_ids: got shape {tuple(ids.shape)}, expected {expected}")
    _check_values(ids, qar)
    return ids


def _check_values(ids: Tensor, qar: QARConfig) -> None:
    if torch.compiler.is_compiling() or not ids.numel():
        return
    lowest = 0 if qar.unknown_querier == "error" else -1
    if ids.device.type != "cpu":
        torch._assert_async(((ids >= lowest) & (ids < qar.num_queriers)).all(), "querier_ids out of range")
        return
    wrong = ids[(ids < lowest) | (ids >= qar.num_queriers)]
    if wrong.numel():
        hint = "" if lowest else " (this model has no answer for unknown queriers: unknown_querier='error')"
        raise ValueError(
            f"querier_ids: got {int(wrong[0])}, expected ids from {lowest} to {qar.num_queriers - 1}{hint}"
        )
