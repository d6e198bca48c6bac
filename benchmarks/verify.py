"""A wrong way has no speed: outputs and gradients against float64, before any clock starts."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.providers import Answer, Trial
from qar_kernels.testing import check_close, relative_errors


class Reference:
    """The expected results of one cell's inputs, and what eager PyTorch misses them by; computed once."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._known: dict[Answer, dict[str, tuple[Tensor, tuple[float, float]]]] = {}

    def check(self, trial: Trial) -> None:
        """Raise unless every result is as near as :func:`qar_kernels.testing.check_close` asks.

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
