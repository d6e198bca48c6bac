"""AdamW for models with row-sparse expert gradients.

E experts, n experts present in the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qar_models.row_sparse import rows_of


class RowSparseAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) that leaves absent rows alone.

    Of a parameter with a row-sparse gradient only the rows present in it are touched: weights, moments, weight
    decay and the step count of the bias correction, which every row has of its own. A querier is thus
    trained as by AdamW on the steps in which they occur. Dense gradients are treated as PyTorch does.

    State of such a parameter ``(E, ...)``: ``step`` (E,) float32, ``exp_avg`` and ``exp_avg_sq`` ``(E, ...)``
    float32, and ``master``, the float32 weights, where the parameter is of 16 bits.

    Args:
        params: parameters or groups, dense ones too.
        lr, betas, eps, weight_decay: as :class:`torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    # AdamW.step calls this once per group, with gradients off, and refuses sparse gradients in it
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        dense = []
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.is_sparse:
                self._step_rows(parameter, group)
            else:
                dense.append(parameter)
        return super()._init_group({**group, "params": dense}, *lists)

    def _step_rows(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_new_state(parameter))
        ids, gradient = rows_of(parameter.grad)
        gradient = gradient.to(state["exp_avg"].dtype)
        weights = state.get("master", parameter)
        rows, mean, square, step = (
            tensor[ids] for tensor in (weights, state["exp_avg"], state["exp_avg_sq"], state["step"])
        )
        beta1, beta2 = group["betas"]
        step += 1
        each_row = (-1, *[1] * (parameter.dim() - 1))
        step_size = (group["lr"] / (1 - beta1**step)).view(each_row)
        root_correction = (1 - beta2**step).sqrt().view(each_row)

        rows.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = square.sqrt().div_(root_correction).add_(group["eps"])
        rows.sub_(torch.div(mean, denominator, out=denominator).mul_(step_size))

        state["exp_avg"][ids], state["exp_avg_sq"][ids], state["step"][ids] = mean, square, step
        weights[ids] = rows
        if weights is not parameter:
            parameter[ids] = rows.to(parameter.dtype)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class, which would round the float32 state of 16-bit parameters to 16 bits."""
        super().load_state_dict(state_dict)
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        own = (parameter for group in self.param_groups for parameter in group["params"])
        for index, parameter in zip(saved, own, strict=True):
            values = state_dict["state"].get(index, {})
            if "master" in values:
                self.state[parameter] = {name: value.to(parameter.device) for name, value in values.items()}


def _new_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    state = {
        "step": torch.zeros(parameter.shape[0], device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
    }
    if parameter.dtype in (torch.bfloat16, torch.float16):
        state["master"] = parameter.detach().float()
    return state
