"""The one tolerance of tests and benchmarks: an error is measured by what eager PyTorch loses."""

from __future__ import annotations

import torch
from torch import Tensor


class WrongResult(AssertionError):
    """An output or gradient is not what the reference says."""


def relative_errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """``‖got - truth‖ / ‖truth‖`` in float64, and the worst row's error over the root mean square of rows."""
    wrong = (got.double() - truth).reshape(-1, truth.shape[-1])
    whole = truth.norm()
    worst_row = wrong.norm(dim=-1).max() * wrong.shape[0] ** 0.5
    return (wrong.norm() / whole).item(), (worst_row / whole).item()


def check_close(name: str, got: Tensor, truth: Tensor, eager: tuple[float, float]) -> None:
    """Raise unless ``got`` is within twice eager PyTorch's error, and its worst row within four times.

    The worst row is checked by itself, because one among thousands does not show in the whole. A unit in the
    last place (of the largest row) is granted on top, because a few elements say little about eager's error,
    and eight in fp32, where sums in another order differ by as much.

    Args:
        name: what it is, for the message.
        got: of the dtype under test.
        truth: float64, of the same shape; where it is all zero, so must ``got`` be.
        eager: :func:`relative_errors` of eager PyTorch in the dtype of ``got``.

    Raises:
        WrongResult: naming the result, its error and the limit.
    """
    if got.shape != truth.shape:
        raise WrongResult(f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    if not truth.any():
        if got.any():
            raise WrongResult(f"{name}: got other values than zero, expected exact zeros")
        return
    unit = torch.finfo(got.dtype).eps * (8 if got.dtype == torch.float32 else 1)
    rows = truth.reshape(-1, truth.shape[-1]).norm(dim=-1)
    grants = unit, unit * (rows.max() / rows.square().mean().sqrt()).item()
    kinds = zip(("", " of a row"), (2, 4), relative_errors(got, truth), eager, grants, strict=True)
    for what, times, error, known, grant in kinds:
        limit = times * known + grant
        if not error <= limit:  # not a number is no error below a limit
            raise WrongResult(f"{name}: relative error{what} {error:.1e}, expected at most {limit:.1e}")
