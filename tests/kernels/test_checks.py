"""Every bad argument is named, with what came and what was expected, before anything runs."""

from dataclasses import replace

import pytest
import torch
from helpers import Case
from triton.runtime.errors import OutOfResources

from qar_kernels import Adapter, LoRA, Segments, dual_mlp, expert_mlp, fused_mlp
from qar_kernels.triton.runner import run_kernel

NAMES = ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")
BASE = NAMES[1:4]


def arguments(**changed):
    case = Case([0, 1, 2, -1, 3, 3])
    leaves = {name: case.tensors[name].float() for name in NAMES}
    leaves["seg"] = Segments.from_ids(case.ids)
    return leaves | changed


@pytest.mark.parametrize("op", [fused_mlp, dual_mlp, expert_mlp])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["type", "shape", "dtype", "device", "dimensions"])
def test_bad_tensors(op, name, fault):
    if op is expert_mlp and name in BASE:
        pytest.skip("no base in this operation")
    change = {
        "type": lambda t: t.numpy(),
        "shape": lambda t: t[..., :-1],
        "dtype": lambda t: t.int() if name == "x" else t.double(),
        "device": lambda t: t.to("meta"),
        "dimensions": lambda t: t.reshape(-1)[: t.shape[-1] - 1],
    }[fault]
    given = arguments()
    given[name] = change(given[name])
    with pytest.raises((ValueError, TypeError), match=r"\w+: got .*, expected") as raised:
        call(op, given)
    if name != "x":
        assert str(raised.value).split(":")[0] in (name, *NAMES)


@pytest.mark.parametrize(
    ("rows", "experts"), [("float32", "float16"), ("float32", "float64"), ("bfloat16", "float64")]
)
def test_experts_are_of_their_rows_dtype_or_fp32_over_16_bits(rows, experts):
    given = {name: t.to(getattr(torch, rows)) for name, t in arguments().items() if name != "seg"}
    given |= {name: given[name].to(getattr(torch, experts)) for name in NAMES[4:]}
    with pytest.raises(
        TypeError, match=rf"expert_gate: got dtype torch\.{experts}, expected torch\.{rows} like x"
    ):
        call(fused_mlp, given | {"seg": arguments()["seg"]})


def call(op, given, **options):
    values = [given[name] for name in NAMES]
    if op is expert_mlp:
        return op(values[0], *values[4:], given["seg"], **options)
    if op is dual_mlp:
        return op(values[0], values[0], *values[1:], given["seg"], **options)
    return op(*values, given["seg"], **options)


@pytest.mark.parametrize("op", [fused_mlp, dual_mlp, expert_mlp])
@pytest.mark.parametrize(
    ("seg", "error", "message"),
    [
        ([0] * 6, TypeError, "seg: got list"),
        (Segments.from_ids([0]), ValueError, "seg: got 1 rows, expected 6"),
        (Segments.from_ids([0, 1, 2, 3, 4, 9]), ValueError, "seg: got expert id 9, expected ids below 4"),
    ],
)
def test_bad_segments(op, seg, error, message):
    with pytest.raises(error, match=message):
        call(op, arguments(seg=seg))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(4, 47)}, ValueError, r"lora\.down\.a: got shape \(4, 47\), expected \(4, 80\)"),
        ({"b": torch.zeros(48, 5)}, ValueError, r"lora\.down\.b: got shape \(48, 5\), expected \(48, 4\)"),
        ({"b": torch.zeros(48, 4).half()}, TypeError, r"lora\.down\.b: got dtype torch\.float16, expected"),
        ({"a": torch.zeros(4, 80).int()}, TypeError, r"lora\.down\.a: got dtype torch\.int32"),
        ({"a": torch.zeros(4, 80, device="meta")}, ValueError, r"lora\.down\.b: got device cpu"),
        ({"b": None}, TypeError, r"lora\.down\.b: got NoneType, expected a tensor"),
        ({"scale": "a"}, TypeError, r"lora\.down\.scale: got str, expected a number"),
        ({"dropout": 1.0}, ValueError, r"lora\.down\.dropout: got 1\.0, expected at least 0 and below 1"),
    ],
)
@pytest.mark.parametrize("op", [fused_mlp, dual_mlp])
def test_bad_adapters(op, change, error, message):
    adapter = replace(Adapter(torch.zeros(4, 80), torch.zeros(48, 4)), **change)
    with pytest.raises(error, match=message):
        call(op, arguments(), lora=LoRA(down=adapter))
    with pytest.raises(TypeError, match="lora: got dict, expected LoRA"):
        call(op, arguments(), lora={"down": adapter})
    with pytest.raises(TypeError, match=r"lora\.up: got int, expected Adapter or None"):
        call(op, arguments(), lora=LoRA(up=3))


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x: x.half(),
            TypeError,
            r"x_specific: got dtype torch\.float16, expected torch\.float32 like x_g",
        ),
        (lambda x: x[:, :32], ValueError, r"x_specific: got shape \(\d+, 32\), expected \(\d+, 48\)"),
        (lambda x: x.to("meta"), ValueError, "x_specific: got device meta, expected cpu like x_general"),
    ],
)
def test_the_towers_rows_are_alike(change, error, message, backend):
    """Although the specific rows and the experts fit each other."""
    given = arguments()
    x = given.pop("x")
    for name in ("expert_gate", "expert_up", "expert_down"):
        given[name] = change(given[name].flatten(0, 1)).unflatten(0, given[name].shape[:2])
    with pytest.raises(error, match=message):
        dual_mlp(x, change(x), **given, backend=backend)


@pytest.mark.parametrize("op", [fused_mlp, expert_mlp])
@pytest.mark.parametrize("scale", [None, "2", True, torch.tensor(2.0)])
def test_bad_scale(op, scale):
    with pytest.raises(TypeError, match=r"expert_scale: got \w+, expected a number"):
        call(op, arguments(), expert_scale=scale)


def test_only_the_arguments_that_every_call_has_in_one_order_are_positional():
    """``expert_mlp`` once took its backend where ``fused_mlp`` takes the scale."""
    x, *weights, seg = arguments().values()
    assert fused_mlp(x, *weights, seg, 0.5, "torch").shape == x.shape
    assert len(dual_mlp(x, x, *weights, seg, "torch")) == 2
    for call in (
        lambda: fused_mlp(x, *weights, seg, 0.5, "torch", True),
        lambda: dual_mlp(x, x, *weights, seg, "torch", True),
        lambda: expert_mlp(x, *weights[3:], seg, 0.5),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            call()


@pytest.mark.parametrize("op", [fused_mlp, dual_mlp, expert_mlp])
def test_bad_backend(op):
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of auto, triton"):
        call(op, arguments(), backend="cuda")


def test_bad_path(monkeypatch):
    monkeypatch.setenv("QAR_KERNELS_PATH", "fastest")
    with pytest.raises(ValueError, match="QAR_KERNELS_PATH: got 'fastest'"):
        call(fused_mlp, arguments(), backend="triton")


def test_float64_is_not_for_triton():
    given = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in arguments().items()}
    with pytest.raises(TypeError, match=r"x: got dtype torch\.float64, expected bfloat16"):
        call(fused_mlp, given, backend="triton")


def test_cpu_tensors_outside_the_interpreter(monkeypatch):
    from qar_kernels.triton import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend: got 'triton' with tensors on the CPU"):
        call(fused_mlp, arguments(), backend="triton")


def test_triton_missing(monkeypatch):
    from qar_kernels import op

    monkeypatch.setattr(op, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        call(fused_mlp, arguments(), backend="triton")


class Failing:
    """Stands for a kernel."""

    __name__ = "some_kernel"

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("PassManager::run failed"), OutOfResources(300, 99, "shared")]
)
def test_a_chip_that_the_kernels_do_not_fit(monkeypatch, error):
    with pytest.raises(RuntimeError, match=r'some_kernel: .*backend="torch".*QAR_KERNELS_PATH') as raised:
        run_kernel(Failing(error), (1,))
    assert str(error) in str(raised.value)
    assert raised.value.__cause__ is error


def test_an_error_of_the_device_is_not_blamed_on_the_kernel():
    late = RuntimeError("Triton Error [CUDA]: device-side assert triggered")
    with pytest.raises(RuntimeError) as raised:
        run_kernel(Failing(late), (1,))
    assert raised.value is late


def test_a_rank_that_no_tile_holds():
    weights = torch.zeros(1, 160, 16), torch.zeros(1, 160, 16), torch.zeros(1, 16, 160)
    with pytest.raises(ValueError, match="got rank 160, expected at most 128"):
        expert_mlp(torch.zeros(2, 16), *weights, Segments.from_ids([0, 0]), backend="triton")
    assert expert_mlp(torch.zeros(2, 16), *weights, Segments.from_ids([0, 0])).shape == (2, 16)
    none = torch.zeros(1, 0, 16), torch.zeros(1, 0, 16), torch.zeros(1, 16, 0)
    with pytest.raises(ValueError, match=r"expert_gate: got shape \(1, 0, 16\)"):
        expert_mlp(torch.zeros(2, 16), *none, Segments.from_ids([0, 0]))
