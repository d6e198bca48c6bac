"""Cases and runs of all kernel tests.

T rows, H hidden, I intermediate, R expert rank, E experts.
"""

from dataclasses import dataclass, field

import torch

from qar_kernels import Segments, dual_mlp, expert_mlp, fused_mlp
from qar_kernels.testing import check_close, relative_errors

TOWERS = ("fused", "dual", "expert")
NAMES = ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")


def assert_close(name, got, ref64, eager):
    """As near to float64 as :func:`check_close` asks, by what eager PyTorch misses it in the same dtype."""
    check_close(name, got, ref64, relative_errors(eager, ref64) if ref64.any() else (0.0, 0.0))


@dataclass
class Case:
    """Shapes and the expert of every row."""

    ids: list[int]
    H: int = 48
    I: int = 80  # noqa: E741
    R: int = 16
    E: int = 4
    scale: float = 0.7
    seed: int = 0
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self):
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape, fan_in):
            return torch.randn(*shape, generator=draw, dtype=torch.float64) / fan_in**0.5

        H, inter, R, E, T = self.H, self.I, self.R, self.E, len(self.ids)
        self.tensors = {
            "x": normal(T, H, fan_in=1),
            "x_specific": normal(T, H, fan_in=1),
            "gate": normal(inter, H, fan_in=H),
            "up": normal(inter, H, fan_in=H),
            "down": normal(H, inter, fan_in=inter),
            "expert_gate": normal(E, R, H, fan_in=H),
            "expert_up": normal(E, R, H, fan_in=H),
            "expert_down": normal(E, H, R, fan_in=R),
            "d_y": normal(T, H, fan_in=1),
            "d_y_specific": normal(T, H, fan_in=1),
        }

    def leaves(self, dtype, requires_grad=True):
        """Fresh leaves in ``dtype`` whose values every backend shares: rounded once, from float64."""
        leaves = {name: t.to(dtype) for name, t in self.tensors.items()}
        for name, t in leaves.items():
            t.requires_grad_(requires_grad and not name.startswith("d_y"))
        return leaves


def run(case, tower, backend, dtype, rounded=None, device="cpu", **options):
    """Outputs and every gradient by name. ``rounded``: dtype the inputs are rounded to first."""
    leaves = case.leaves(rounded or dtype, requires_grad=False)
    leaves = {n: t.to(device, dtype).requires_grad_(not n.startswith("d_y")) for n, t in leaves.items()}
    weights = [leaves[name] for name in NAMES[1:]]
    seg = Segments.from_ids(torch.tensor(case.ids, device=device))
    if tower == "fused":
        outputs = {"y": fused_mlp(leaves["x"], *weights, seg, case.scale, backend=backend, **options)}
        used = NAMES
    elif tower == "dual":
        y, specific = dual_mlp(leaves["x"], leaves["x_specific"], *weights, seg, backend=backend, **options)
        outputs, used = {"y": y, "y_specific": specific}, (*NAMES, "x_specific")
    else:
        y = expert_mlp(leaves["x"], *weights[3:], seg, backend=backend, **options)
        outputs, used = {"y": y}, ("x", *NAMES[4:])
    loss = sum((y * leaves[f"d_{name}"]).sum() for name, y in outputs.items())
    loss = loss + 0 * leaves["x"].sum()  # the reference of a batch without experts has no graph
    grads = torch.autograd.grad(loss, [leaves[name] for name in used], materialize_grads=True)
    return {n: y.detach() for n, y in outputs.items()} | {
        f"d_{name}": g for name, g in zip(used, grads, strict=True)
    }


def check(case, tower, backend, dtype, device="cpu", **options):
    """Every output and gradient of ``backend`` against float64, with eager PyTorch's error as measure."""
    truth = run(case, tower, "reference", torch.float64, rounded=dtype, device=device)
    eager = run(case, tower, "reference", dtype, device=device)
    got = run(case, tower, backend, dtype, device=device, **options)
    for name, ref64 in truth.items():
        assert got[name].dtype == dtype
        assert_close(name, got[name], ref64, eager[name])


def leaves_and_segments(dtype=torch.float32, ids=(0, 1, 1, -1, 3, 0, 2), **shape):
    """The operands of ``fused_mlp`` for a small batch."""
    case = Case(list(ids), **shape)
    leaves = case.leaves(dtype)
    return [leaves[name] for name in NAMES], Segments.from_ids(case.ids)
