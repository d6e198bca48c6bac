"""AdamW for models with row-sparse expert gradients.

E experts, n experts present in the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qar_kernels.row_sparse import row_sparse
from qar_kernels.triton.configs import has_kernels
from qar_models.row_sparse import rows_of


class RowSparseAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) that leaves absent rows alone.

    A row-sparse gradient updates only its own rows: their weights (decay included), their moments, and their
    step counts for the bias correction. Each querier is thus trained as by AdamW on the steps in which they
    occur. Dense gradients are handled as in PyTorch.

    State of such a parameter ``(E, ...)``: ``step`` (E,) float32; ``exp_avg`` and ``exp_avg_sq``
    ``(E, ...)``, at least float32; and for a 16-bit parameter ``master``, its weights in float32. Weights
    loaded between two steps are picked up, unless they were written through ``.data``.

    Args:
        params: parameters or groups; dense ones may be among them.
        options: as for :class:`torch.optim.AdamW`, except ``amsgrad``. ``fused`` is on by default (but not
            with ``foreach``); on a CUDA device one Triton kernel then updates all rows of a parameter.

    Raises:
        ValueError: for ``amsgrad=True``, and as the base class does.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        if options.get("amsgrad"):
            raise ValueError("amsgrad: got True, expected False: row-sparse gradients do not support it")
        super().__init__(params, **{"fused": not options.get("foreach"), **options})
        self._watch_steps()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_rounded" not in self.__dict__:  # a copy, which has no hooks
            self._watch_steps()

    def _watch_steps(self) -> None:
        self._rounded: list[tuple[nn.Parameter, Tensor]] = []
        self._versions: dict[nn.Parameter, int] = {}  # of weights, as this optimizer left them
        self.register_step_post_hook(RowSparseAdamW._round_masters)

    # AdamW.step calls this once per group and then updates what is in the lists. The base class refuses
    # sparse gradients; here their rows join the lists as views, so that one fused kernel runs for everything.
    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> bool:
        lists = (params_with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        sparse = [p for p in group["params"] if self._has_rows(p)]
        others = [p for p in group["params"] if not self._has_rows(p)]
        has_complex = super()._init_group({**group, "params": others}, *lists)
        for parameter in sparse:
            ids, d_rows = rows_of(parameter.grad if parameter.grad.is_sparse else _all_rows(parameter.grad))
            state = self._state_of(parameter, group)
            if "master" in state and self._versions.get(parameter) != parameter._version:
                _take_over(parameter, state["master"])
            if group["fused"] and has_kernels(parameter.device) and parameter.dtype != torch.float64:
                self._launch(parameter, ids, d_rows, state, group)
                self._versions[parameter] = parameter._version
                continue
            weights = state.get("master", parameter)
            if weights is not parameter:
                self._rounded.append((parameter, ids))
            for d_row, row in zip(d_rows.to(weights.dtype), ids.tolist(), strict=True):
                params_with_grad.append(weights[row])
                grads.append(d_row)
                exp_avgs.append(state["exp_avg"][row])
                exp_avg_sqs.append(state["exp_avg_sq"][row])
                state_steps.append(state["step"][row])
        return has_complex

    def _has_rows(self, parameter: nn.Parameter) -> bool:
        """Whether steps are counted per row: the gradient is sparse, or the state is of sparse gradients."""
        if parameter.grad is None:
            return False
        step = self.state.get(parameter, {}).get("step")
        return parameter.grad.is_sparse or (isinstance(step, Tensor) and step.dim() == 1)

    def _launch(
        self,
        parameter: nn.Parameter,
        ids: Tensor,
        d_rows: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
    ) -> None:
        """One launch for all rows: on a CUDA device a view of each row costs more than its update."""
        from qar_kernels.triton.adamw import adamw_rows

        # set by GradScaler, maybe on another device
        scale, found_inf = (
            None if value is None else value.to(parameter.device, non_blocking=True)
            for value in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        if scale is not None:
            d_rows = d_rows.float() / scale  # in 16 bits, small gradients would be lost
        adamw_rows(
            state.get("master", parameter),
            parameter if "master" in state else None,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            ids,
            (-d_rows if group["maximize"] else d_rows).contiguous(),
            float(group["lr"]),
            group["betas"],
            group["eps"],
            group["weight_decay"],
            found_inf,
        )

    def _state_of(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[parameter]
        if "step" not in state or state["step"].dim() == 0:
            # no state yet, or that of dense gradients, with one count for all rows
            weights = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            device = parameter.device if group["fused"] or group["capturable"] else "cpu"
            step = state.get("step", torch.zeros(())).to(device, torch.float32)
            state["step"] = step.expand(len(parameter)).clone()
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(weights.dtype) if name in state else torch.zeros_like(weights)
            if weights.dtype != parameter.dtype:
                state["master"] = weights
        return state

    @torch.no_grad()
    def _round_masters(self, *_: Any) -> None:
        for parameter, ids in self._rounded:
            parameter[ids] = self.state[parameter]["master"][ids].to(parameter.dtype)
            self._versions[parameter] = parameter._version
        self._rounded.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class, but without rounding the float32 state of 16-bit parameters to 16 bits."""
        super().load_state_dict(state_dict)
        self._versions.clear()  # the masters are replaced
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        own = (parameter for group in self.param_groups for parameter in group["params"])
        for index, parameter in zip(saved, own, strict=True):
            values = state_dict["state"].get(index, {})
            if "master" in values:
                self.state[parameter] = {name: value.to(parameter.device) for name, value in values.items()}


@torch.no_grad()
def _take_over(parameter: nn.Parameter, master: Tensor) -> None:
    """Update the master where it no longer rounds to the weights: somebody wrote them (loaded experts)."""
    same = master.to(parameter.dtype) == parameter
    master.copy_(torch.where(same, master, parameter.to(master.dtype)))


def _all_rows(gradient: Tensor) -> Tensor:
    """A dense gradient as a row-sparse one with every row."""
    return row_sparse(torch.arange(len(gradient), device=gradient.device), gradient, gradient.shape)
