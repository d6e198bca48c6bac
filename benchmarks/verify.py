"""A wrong way has no speed: outputs and gradients against float64, before any clock starts."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.providers import Answer, Trial


class WrongResult(RuntimeError):
    """A provider's output or gradient is not what the reference says."""


class Reference:
    """The expected results of one cell's inputs, and what eager PyTorch misses them by; computed once."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._known: dict[Answer, dict[str, tuple[Tensor, tuple[float, float]]]] = {}

    def check(self, trial: Trial) -> None:
        """Raise unless every result is as near as :func:`check_close` asks.

        Raises:
            WrongResult: naming the result and both errors.
        """
        expected = self._expected(trial.answer)
        for name, got in results(trial, self.inputs).items():
            check_close(name, got, *expected[name])

    def _expected(self, answer: Answer) -> dict[str, tuple[Tensor, tuple[float, float]]]:
        if answer not in self._known:
            with torch.set_grad_enabled(self.inputs.training):
                truth = answer(self.inputs, torch.float64)
                eager = answer(self.inputs, self.inputs.x.dtype)
            self._known[answer] = {n: (t, relative_errors(eager[n], t)) for n, t in truth.items()}
        return self._known[answer]


def run_pass(trial: Trial, inputs: Inputs) -> tuple[Tensor, ...]:
    """What is timed: y and, in training, the gradients of x, of the adapters and of the experts' leaves."""
    if not inputs.training:
        with torch.no_grad():
            return (trial.forward(),)
    y = trial.forward()
    leaves = [leaf for weight in trial.experts for leaf in weight]
    return y, *torch.autograd.grad(y, [inputs.x, *inputs.lora.factors, *leaves], inputs.d_y)


def results(trial: Trial, inputs: Inputs) -> dict[str, Tensor]:
    """``y`` and, in training, gradients of x, the adapters and the present experts ``(Q, ...)``."""
    y, *grads = run_pass(trial, inputs)
    found = {"y": y.detach()}
    if not inputs.training:
        return found
    found["d_x"], *rest = grads
    for index in range(len(inputs.lora.factors)):
        found[f"d_lora_{index}"], *rest = rest
    for name, leaves in zip(("gate", "up", "down"), trial.experts, strict=False):
        mine, rest = rest[: len(leaves)], rest[len(leaves) :]
        stacked = leaves[0].dim() == 3
        found[f"d_expert_{name}"] = _dense(mine[0])[inputs.present] if stacked else torch.stack(mine)
    return found


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def relative_errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """``‖got - truth‖ / ‖truth‖`` in float64, and the worst row's error over the root mean square of rows."""
    wrong = (got.double() - truth).reshape(-1, truth.shape[-1])
    whole = truth.norm()
    worst_row = wrong.norm(dim=-1).max() * wrong.shape[0] ** 0.5
    return (wrong.norm() / whole).item(), (worst_row / whole).item()


def check_close(name: str, got: Tensor, truth: Tensor, eager: tuple[float, float]) -> None:
    """Raise ``WrongResult`` where ``got`` misses ``truth`` by more than twice what ``eager`` does.

    One unit in the last place is granted on top: a few elements say little about eager's error. The worst row
    is looked at by itself, since one among thousands does not show in the whole; four times eager's worst.
    """
    grant = torch.finfo(got.dtype).eps
    kinds = zip(("", " of a row"), (2, 4), relative_errors(got, truth), eager, strict=True)
    for what, times, error, known in kinds:
        limit = times * known + grant
        if not error <= limit:
            raise WrongResult(f"{name}: relative error{what} {error:.1e}, expected at most {limit:.1e}")
