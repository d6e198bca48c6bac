"""On the card: every dtype, gradients by name, isolation, graph replay with other ids, compile."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("QAR_REHEARSE") != "1":
    pytest.skip("no CUDA device: nothing was tested", allow_module_level=True)

import adamw_helpers
import lora_helpers
from helpers import TOWERS, Case, check, run

from benchmarks.shapes import MODELS
from qar_kernels import Segments, fused_mlp, reference
from qar_kernels.triton import launch
from qar_models import optim

CARD = os.environ.get("QAR_REHEARSE") != "1"
if CARD and launch.INTERPRETED:
    pytest.skip("kernels run in the interpreter here: use make test-gpu", allow_module_level=True)

DEVICE = "cuda" if CARD else "cpu"
NAMES = ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")
# bf16 products are wrong in the interpreter.
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CARD else (torch.float16,)
HALF = DTYPES[0]
needs_card = pytest.mark.skipif(not CARD, reason="needs a card")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def ids(rows, experts, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-1, experts, (rows,), generator=draw).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("rows", [1, 37, 300] if CARD else [37])
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128] if CARD else [8])
def test_against_float64(monkeypatch, rows, tower, dtype, rank):
    monkeypatch.setenv("QAR_KERNELS_PATH", "fused")  # in fp32 the rule is another
    hidden, inter = (272, 656) if CARD else (48, 80)
    check(Case(ids(rows, 9), H=hidden, I=inter, R=rank, E=9), tower, "triton", dtype, device=DEVICE)


SHAPES = list(MODELS.values()) if CARD else [(64, 96)]


@pytest.mark.parametrize("rows", [7, 513] if CARD else [7])
@pytest.mark.parametrize(("hidden", "inter"), SHAPES)
def test_model_shapes(hidden, inter, rows):
    """At 7 rows the K loops are split."""
    check(Case(ids(rows, 7), H=hidden, I=inter, R=64, E=7), "fused", "triton", HALF, device=DEVICE)


@pytest.mark.parametrize("path", ["fused", "grouped"])
@pytest.mark.parametrize("tower", ["fused", "dual"])
@pytest.mark.parametrize("experts", [1, 1000])
def test_paths(monkeypatch, path, tower, experts):
    monkeypatch.setenv("QAR_KERNELS_PATH", path)
    rows, hidden = (700, 256) if CARD else (20, 32)
    check(Case(ids(rows, experts), H=hidden, I=2 * hidden, E=experts), tower, "triton", HALF, device=DEVICE)


@pytest.mark.parametrize("path", ["fused", "grouped"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("rows", [40, 400] if CARD else [20])
def test_isolation_and_two_runs(monkeypatch, rows, tower, path):
    monkeypatch.setenv("QAR_KERNELS_PATH", path)
    mine = torch.arange(rows) % 3 == 1
    hidden = 256 if CARD else 32
    results = []
    for company in (1, 7, 7):
        others = torch.randint(2, 2 + company, (rows,), generator=torch.Generator().manual_seed(company))
        case = Case(torch.where(mine, 1, others).tolist(), H=hidden, I=2 * hidden, R=64, E=9)
        results.append(run(case, tower, "triton", HALF, device=DEVICE))
    alone, first, second = results
    own = mine.to(DEVICE)
    for name in {"y", "d_x", "y_specific", "d_x_specific"} & alone.keys():
        assert torch.equal(alone[name][own], first[name][own]), name
    for name in ("d_expert_gate", "d_expert_up", "d_expert_down"):
        assert torch.equal(alone[name][1], first[name][1]), name
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tower", TOWERS)
def test_sparse_gradients_are_the_rows_of_the_dense_ones(tower):
    rows, hidden = (300, 256) if CARD else (9, 32)
    case = Case(ids(rows, 9), H=hidden, I=2 * hidden, E=40)
    dense = run(case, tower, "triton", HALF, device=DEVICE)
    sparse = run(case, tower, "triton", HALF, device=DEVICE, sparse_gradients=True)
    for name, expected in dense.items():
        assert sparse[name].is_sparse == name.startswith("d_expert")
        assert torch.equal(sparse[name].to_dense() if sparse[name].is_sparse else sparse[name], expected), (
            name
        )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tower", ["fused", "dual"])
@pytest.mark.parametrize("path", ["fused", "grouped"])
def test_adapters(monkeypatch, path, tower, dropout):
    """The paper's recipe: LoRA with dropout on a base, whose weights here train too."""
    monkeypatch.setenv("QAR_KERNELS_PATH", path)
    rows, hidden, inter = (300, 272, 656) if CARD else (9, 48, 80)
    case = Case(ids(rows, 4), H=hidden, I=inter)
    lora_helpers.check(monkeypatch, case, tower, "triton", HALF, dropout=dropout, device=DEVICE)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputed_pre_activations(monkeypatch, dropout):
    rows, hidden, inter = (300, 272, 656) if CARD else (9, 48, 80)
    case = Case(ids(rows, 4), H=hidden, I=inter)
    lora_helpers.check(
        monkeypatch, case, "fused", "triton", HALF, dropout=dropout, device=DEVICE, recompute=True
    )


def leaves(rows=300, hidden=256, inter=512, requires_grad=False):
    case = Case(ids(rows, 9), H=hidden, I=inter, R=16, E=9)
    tensors = case.leaves(HALF, requires_grad=False)
    return [tensors[name].to(DEVICE).requires_grad_(requires_grad) for name in NAMES]


def device_ids(rows, seed=0):
    return torch.tensor(ids(rows, 9, seed), device=DEVICE)


@needs_card
@pytest.mark.parametrize("rows", [5, 300])
def test_graph_replay_with_other_ids(rows):
    x, *weights = leaves(rows)
    static = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def step():
        return fused_mlp(x, *weights, Segments.from_ids(static), backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for seed in (1, 2):
        static.copy_(device_ids(rows, seed))
        graph.replay()
        assert torch.equal(y, step())


@needs_card
def test_no_host_synchronisation():
    tensors, rows_of = leaves(requires_grad=True), device_ids(300)

    def step():
        fused_mlp(*tensors, Segments.from_ids(rows_of)).sum().backward()

    step()  # compiles the kernels and makes the gradients
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [5, 300] if CARD else [5])
def test_compile(rows):
    tensors = leaves(rows, *(() if CARD else (32, 48)), requires_grad=True)

    def step(rows_of, *tensors):
        return fused_mlp(*tensors, Segments.from_ids(rows_of), backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if CARD else "aot_eager")
    y, expected = compiled(device_ids(rows), *tensors), step(device_ids(rows), *tensors)
    assert torch.equal(y, expected)
    grads, wanted = (torch.autograd.grad(out.sum(), tensors) for out in (y, expected))
    for name, got, want in zip(NAMES, grads, wanted, strict=True):
        assert torch.equal(got, want), name


@needs_card
@pytest.mark.parametrize(
    ("path", "recompute", "limit"),
    [("fused", False, 0.70), ("grouped", False, 0.70), ("fused", True, 0.10)],
)
def test_memory_saved_for_the_backward_pass(monkeypatch, path, recompute, limit):
    """Against eager PyTorch's plain base MLP, x and y left out: both have them."""
    monkeypatch.setenv("QAR_KERNELS_PATH", path)
    x, *weights = leaves(4096, 1024, 3584, requires_grad=True)
    segments = Segments.from_ids(device_ids(4096))

    def held(step):
        step()  # plans and compiled kernels stay
        before = torch.cuda.memory_allocated()
        y = step()
        return torch.cuda.memory_allocated() - before - y.numel() * y.element_size()

    ours = held(lambda: fused_mlp(x, *weights, segments, backend="triton", recompute=recompute))
    assert ours <= limit * held(lambda: reference.swiglu_mlp(x, *weights[:3]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_optimizer_of_rows(monkeypatch, dtype):
    if not CARD:
        monkeypatch.setattr(optim, "has_kernels", lambda device: True)
    adamw_helpers.check(dtype, DEVICE)


SANITIZER = shutil.which("compute-sanitizer")
SCRIPT = [sys.executable, str(Path(__file__).with_name("small_case.py"))]
PROBE = [sys.executable, "-c", "import torch; torch.ones(8, device='cuda').sum().item()"]


def finish(command, seconds):
    """The finished process; a test that takes longer is skipped, for slow is not wrong."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.skip(f"not done after {seconds} s: {' '.join(command)}")


@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    if not CARD and tool == "memcheck":
        subprocess.run([*SCRIPT, "cpu"], check=True)
        return
    if not CARD or SANITIZER is None:
        pytest.skip("compute-sanitizer is not installed" if CARD else "needs a card")
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # PyTorch probes the driver with calls that may fail
    if finish([*command, *PROBE], 60).returncode:
        pytest.skip("compute-sanitizer does not work on this machine")  # some virtual ones let no tool attach
    plain = finish(SCRIPT, 180)  # fills Triton's cache: the compiler's processes are not to be watched
    assert plain.returncode == 0, plain.stdout[-1000:] + plain.stderr[-3000:]
    result = finish([*command, *SCRIPT], 120)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_what_takes_too_long_is_skipped():
    with pytest.raises(pytest.skip.Exception, match="not done after"):
        finish([sys.executable, "-c", "import time; time.sleep(9)"], 0.1)
