"""Who asks in a batch: checks ``querier_ids`` and turns them into segments, once per forward pass.

B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from qar_kernels import Segments
from qar_kernels.host import is_capturing, is_readable
from qar_models.config import QARConfig
from qar_models.towers import TowerBatch


def make_towers(
    qar: QARConfig,
    querier_ids: Tensor | None,
    batch_size: int,
    seq_len: int,
    device: torch.device,
    trained_ids: Sequence[int] = (),
    cu_seq_lens: Tensor | None = None,
) -> TowerBatch:
    """The expert of each of the ``batch_size * seq_len`` rows, built once per forward pass.

    Args:
        querier_ids: ``(B,)`` or ``(B, S)`` integers, -1 for unknown; may be None with shared experts.
        trained_ids: the experts that train alone, outside the bank.
        cu_seq_lens: ``(N + 1,)`` bounds of N packed windows, B being 1; ``querier_ids`` is then ``(N,)`` or
            ``(1, S)``.

    Raises:
        ValueError, TypeError: naming ``querier_ids``, what came and what was expected.
    """
    sequences = batch_size if cu_seq_lens is None else len(cu_seq_lens) - 1
    shapes = [(sequences,), (batch_size, seq_len)]
    if not qar.needs_querier_ids:
        if querier_ids is not None:
            _check_kind(as_ids(querier_ids), shapes)
        ids = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return TowerBatch(_segments(ids, seq_len), batch_size)
    ids = _checked_ids(querier_ids, qar, shapes)
    if ids.is_meta and device.type != "meta":
        raise ValueError(f"querier_ids: got device meta, which has no values, expected {device}")
    may_be_unknown = not _are_known(ids)
    ids = _experts_of(ids.to(device), qar)
    if not trained_ids:
        return TowerBatch(_segments(ids, seq_len, cu_seq_lens), batch_size, may_be_unknown=may_be_unknown)
    matches = ids.unsqueeze(-1) == torch.tensor(trained_ids, device=device)
    trained = matches.any(-1)
    position = torch.where(trained, matches.int().argmax(-1), -1)
    others = torch.where(trained, -1, ids)
    segments, own = (_segments(found, seq_len, cu_seq_lens) for found in (others, position))
    return TowerBatch(segments, batch_size, own, may_be_unknown)


def _experts_of(querier_ids: Tensor, qar: QARConfig) -> Tensor:
    """The expert of each querier, -1 for an unknown one."""
    if qar.querier_experts is None:
        return querier_ids
    return torch.tensor((*qar.querier_experts, -1), device=querier_ids.device)[querier_ids]  # -1 is the last


# identifies the block of assume_ids_unchanged that is active, if one is
_promise: ContextVar[object | None] = ContextVar("assume_ids_unchanged", default=None)


@contextmanager
def assume_ids_unchanged() -> Iterator[None]:
    """Within this block, such as a call of ``generate``, no tensor of ids is modified in place."""
    token = _promise.set(object())
    try:
        yield
    finally:
        _promise.reset(token)


class TowerMemo:
    """Reuses the towers of the last forward pass: generation repeats the same ids for every token.

    Ids on the host are compared by value. On an accelerator, where that would wait for the device, the
    tensor must be the same object, within :func:`assume_ids_unchanged`.
    """

    def __init__(self) -> None:
        # one attribute, so that threads cannot mix entries; the ids are held, so that their id() stays theirs
        self._last: tuple[tuple | None, Tensor | None, TowerBatch | None] = None, None, None

    def __reduce__(self) -> tuple[type[TowerMemo], tuple]:
        """A copy or a pickle starts empty: it need not carry the last batch."""
        return TowerMemo, ()

    def __call__(self, qar: QARConfig, querier_ids: Tensor | None, *where: Any) -> TowerBatch:
        """As :func:`make_towers`."""
        if torch.compiler.is_compiling() or not isinstance(querier_ids, Tensor):
            return make_towers(qar, querier_ids, *where)
        *shape_and_device, trained_ids, cu_seq_lens = where
        content = _content(querier_ids)
        if cu_seq_lens is not None or content is None or is_capturing():
            return make_towers(qar, querier_ids, *where)
        # no backward pass can save tensors that were made in inference mode
        mode = torch.is_inference_mode_enabled()
        key = (qar, mode, querier_ids.dtype, content, *shape_and_device, list(trained_ids))
        last_key, _, towers = self._last
        if key != last_key:
            towers = make_towers(qar, querier_ids, *where)
            self._last = key, querier_ids, towers
        return towers


def _content(ids: Tensor) -> list | tuple[object, int] | None:
    """A key that is equal only for equal ids, made without waiting for a device; None if there is none."""
    if is_readable(ids):
        return ids.tolist()
    promise = _promise.get()
    return None if promise is None else (promise, id(ids))


def _are_known(ids: Tensor) -> bool:
    """Whether the host can tell, without waiting for a device, that no id is -1."""
    if not is_readable(ids):
        return False
    return not bool((ids < 0).any())


def _segments(ids: Tensor, seq_len: int, cu_seq_lens: Tensor | None = None) -> Segments:
    if ids.dim() == 2:
        return Segments.from_ids(ids.flatten())
    if cu_seq_lens is not None:
        return Segments.from_cu_seqlens(ids, cu_seq_lens, num_rows=seq_len)
    return Segments.from_sequences(ids, seq_len)


def check_prompt_ids(querier_ids: Tensor | None, qar: QARConfig, batch_size: int) -> None:
    """Raise what a forward pass would. A prompt has one querier, so only ``(B,)`` will do.

    Values are read from an accelerator too, once per call: a failed assertion there would end the process.
    """
    if qar.needs_querier_ids:
        _checked_ids(querier_ids if querier_ids is None else querier_ids.cpu(), qar, [(batch_size,)])
    elif querier_ids is not None:
        _check_kind(querier_ids, [(batch_size,)])


def check_assistant(assistant: Any, querier_ids: Tensor | None, batch_size: int) -> None:
    """Raise for a draft model of speculative decoding that cannot be asked by these queriers."""
    qar = getattr(assistant, "qar", None)
    if assistant is None or (qar is None and querier_ids is None):
        return
    if qar is None:
        raise ValueError(
            f"assistant_model: got a {type(assistant).__name__}, which takes no querier_ids, expected a "
            "querier-aware one: apply_qar(draft, QARConfig(num_queriers=n, first_expert_layer="
            "draft.config.num_hidden_layers)) makes it one without experts"
        )
    try:
        check_prompt_ids(querier_ids, qar, batch_size)
    except ValueError as error:
        raise ValueError(f"assistant_model: {error}") from error


def as_ids(querier_ids: Tensor | Sequence[int] | None) -> Tensor | None:
    """``querier_ids`` as a tensor.

    Raises:
        TypeError: if they are not integers.
    """
    if querier_ids is None or isinstance(querier_ids, Tensor):
        return querier_ids
    try:
        return torch.as_tensor(querier_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"querier_ids: got {querier_ids!r}, expected integers") from error


def _checked_ids(querier_ids: Tensor | None, qar: QARConfig, shapes: list[tuple[int, ...]]) -> Tensor:
    """Always checks shape and dtype, and the values where reading them costs no device sync."""
    if querier_ids is None:
        raise ValueError(
            f"querier_ids: missing, but the model has experts={qar.experts!r}; pass querier_ids, an integer "
            f"tensor of shape {shapes[0]} with ids 0..{qar.num_queriers - 1} or -1 (unknown)"
        )
    ids = as_ids(querier_ids)
    _check_kind(ids, shapes)
    ids = ids.long()  # comparisons with -1 or a count beyond a short type's range would wrap around
    _check_values(ids, qar)
    return ids


def _check_kind(ids: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"querier_ids: got dtype {ids.dtype}, expected integers")
    # size by size: dynamo takes a shape that it knows for different from one with symbols
    if not any(_has_shape(ids, shape) for shape in shapes):
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"querier_ids: got shape {tuple(ids.shape)}, expected {expected}")


def _has_shape(ids: Tensor, shape: tuple[int, ...]) -> bool:
    return ids.dim() == len(shape) and all(
        size == wanted for size, wanted in zip(ids.shape, shape, strict=True)
    )


def _check_values(ids: Tensor, qar: QARConfig) -> None:
    if not ids.numel():
        return
    lowest = 0 if qar.unknown_querier == "error" else -1
    if not is_readable(ids):
        allowed = (ids >= lowest) & (ids < qar.num_queriers)
        expected = f"querier_ids: expected ids from {lowest} to {qar.num_queriers - 1}"
        torch._assert_async(allowed.all(), expected)
        return
    wrong = ids[(ids < lowest) | (ids >= qar.num_queriers)]
    if wrong.numel():
        hint = "" if lowest else " (this model has no answer for unknown queriers: unknown_querier='error')"
        raise ValueError(
            f"querier_ids: got {int(wrong[0])}, expected ids from {lowest} to {qar.num_queriers - 1}{hint}"
        )
