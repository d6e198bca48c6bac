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
        self._known: dict[Answer, dict[str, tuple[Tensor, float]]] = {}

    def check(self, trial: Trial) -> None:
        """Raise unless every result is within twice eager PyTorch's error, plus one unit in the last place.

        Raises:
            WrongResult: naming the result and both errors.
        """
        expected = self._expected(trial.answer)
        for name, got in results(trial, self.inputs).items():
            check_close(name, got, *expected[name])

    def _expected(self, answer: Answer) -> dict[str, tuple[Tensor, float]]:
        if answer not in self._known:
            with torch.set_grad_enabled(self.inputs.training):
                truth = answer(self.inputs, torch.float64)
                eager = answer(self.inputs, self.inputs.x.dtype)
            self._known[answer] = {n: (t, relative_error(eager[n], t)) for n, t in truth.items()}
        return self._known[answer]


def run_pass(trial: Trial, inputs: Inputs) -> tuple[Tensor, ...]:
    """What is timed: y and, in training, the gradients of x and of every leaf of the experts."""
    if not inputs.training:
        with torch.no_grad():
            return (trial.forward(),)
    y = trial.forward()
    leaves = [leaf for weight in trial.experts for leaf in weight]
    return y, *torch.autograd.grad(y, [inputs.x, *leaves], inputs.d_y)


def results(trial: Trial, inputs: Inputs) -> dict[str, Tensor]:
    """``y`` and, in training, ``d_x`` and the present experts' gradients ``(Q, ...)``."""
    y, *grads = run_pass(trial, inputs)
    found = {"y": y.detach()}
    if not inputs.training:
        return found
    found["d_x"], *rest = grads
    for name, leaves in zip(("gate", "up", "down"), trial.experts, strict=False):
        mine, rest = rest[: len(leaves)], rest[len(leaves) :]
        stacked = leaves[0].dim() == 3
        found[f"d_expert_{name}"] = _dense(mine[0])[inputs.present] if stacked else torch.stack(mine)
    return found


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def relative_error(got: Tensor, truth: Tensor) -> float:
    """``‖got - truth‖ / ‖truth‖`` in float64."""
    return ((got.double() - truth).norm() / truth.norm()).item()


def check_close(name: str, got: Tensor, truth: Tensor, eager: float) -> None:
    """Raise ``WrongResult`` where ``got`` misses ``truth`` by more than twice what ``eager`` does.

    One unit in the last place is granted on top: a few elements say little about eager's error.
    """
    error, limit = relative_error(got, truth), 2 * eager + torch.finfo(got.dtype).eps
    if not error <= limit:
        raise WrongResult(f"{name}: relative error {error:.1e}, expected at most {limit:.1e}")
