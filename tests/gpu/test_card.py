"""On the card: every dtype, gradients by name, isolation, graph replay with other ids, compile."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels run in the interpreter here: use make test-gpu", allow_module_level=True)

from helpers import TOWERS, Case, check, run

from qar_kernels import Segments, fused_mlp

NAMES = ("x", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def ids(rows, experts, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-1, experts, (rows,), generator=draw).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("rows", [1, 37, 300])
@pytest.mark.parametrize("rank", [8, 64, 128])
def test_against_float64(rows, tower, dtype, rank):
    check(Case(ids(rows, 9), H=272, I=656, R=rank, E=9), tower, "triton", dtype, device="cuda")


@pytest.mark.parametrize(("hidden", "inter"), [(4096, 14336), (3584, 18944), (896, 4864), (576, 1536)])
def test_model_shapes(hidden, inter):
    check(Case(ids(513, 7), H=hidden, I=inter, R=64, E=7), "fused", "triton", torch.bfloat16, device="cuda")


@pytest.mark.parametrize("path", ["fused", "grouped"])
@pytest.mark.parametrize("experts", [1, 1000])
def test_paths(monkeypatch, path, experts):
    monkeypatch.setenv("QAR_KERNELS_PATH", path)
    case = Case(ids(700, experts), H=256, I=512, R=16, E=experts)
    check(case, "fused", "triton", torch.bfloat16, device="cuda")


@pytest.mark.parametrize("rows", [40, 400])
def test_isolation(rows):
    mine = torch.arange(rows) % 3 == 1
    results = []
    for company in (1, 7):
        others = torch.randint(2, 2 + company, (rows,))
        case = Case(torch.where(mine, 1, others).tolist(), H=256, I=512, R=64, E=9)
        results.append(run(case, "fused", "triton", torch.bfloat16, device="cuda"))
    for name in ("y", "d_x"):
        assert torch.equal(results[0][name][mine.cuda()], results[1][name][mine.cuda()]), name
    for name in ("d_expert_gate", "d_expert_up", "d_expert_down"):
        assert torch.equal(results[0][name][1], results[1][name][1]), name


def leaves(rows=300):
    case = Case(ids(rows, 9), H=256, I=512, R=16, E=9)
    tensors = case.leaves(torch.bfloat16, requires_grad=False)
    return [tensors[name].cuda() for name in NAMES]


@pytest.mark.parametrize("rows", [5, 300])
def test_graph_replay_with_other_ids(rows):
    x, *weights = leaves(rows)
    static = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def step():
        return fused_mlp(x, *weights, Segments.from_ids(static), backend="triton")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for seed in (1, 2):
        static.copy_(torch.tensor(ids(rows, 9, seed)))
        graph.replay()
        assert torch.equal(y, step())


def test_no_host_synchronisation():
    x, *weights = leaves()
    device_ids = torch.tensor(ids(300, 9), device="cuda")
    weights = [w.requires_grad_() for w in weights]
    fused_mlp(x, *weights, Segments.from_ids(device_ids)).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_mlp(x, *weights, Segments.from_ids(device_ids)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile():
    x, *weights = leaves()
    device_ids = torch.tensor(ids(300, 9), device="cuda")

    def step(x, ids):
        return fused_mlp(x, *weights, Segments.from_ids(ids))

    assert torch.equal(torch.compile(step, fullgraph=True)(x, device_ids), step(x, device_ids))
