"""PTX of every kernel for sm_80 and sm_90, executed, against float64: outputs and every gradient by name."""

import operator
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import TOWERS, Case, check, run

from qar_kernels.triton import backend, configs, launch
from qar_kernels.triton.runner import launching_by

if launch.INTERPRETED:
    pytest.skip(
        "kernels run in the interpreter here: TRITON_INTERPRET=0 compiles them", allow_module_level=True
    )

import adamw_helpers
import lora_helpers
from emulator import EmulationError, arithmetic, emulate

from qar_models import optim

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {"H": 80, "I": 144, "R": 24, "E": 4}  # fills no tile of any kernel


class Chip:
    """Launches go to the emulator; what they were is kept."""

    def __init__(self, arch):
        self.arch, self.options, self.launches = arch, {}, []

    def launch(self, recorded):
        machine = emulate(recorded, self.arch, **self.options)
        self.launches.append((recorded, machine))

    def config(self, device, dtype, *rest):
        """What a card of this architecture would select."""
        capability = divmod(int(self.arch.removeprefix("sm_")), 10)
        with patch.object(configs, "_capability", lambda device: capability):
            return configs.select_config(torch.device("cuda"), dtype, *rest)

    def kernels(self):
        return {recorded.kernel.__name__ for recorded, _ in self.launches}

    def opcodes(self):
        return {each.opcode for _, machine in self.launches for each in machine.program.instructions}


@pytest.fixture(params=["sm_80", "sm_90"])
def chip(request, monkeypatch):
    torch.manual_seed(0)
    chip = Chip(request.param)
    monkeypatch.setattr(launch, "INTERPRETED", True)  # tensors on the CPU are welcome
    monkeypatch.setattr(backend, "select_config", chip.config)
    monkeypatch.setattr(optim, "has_kernels", lambda device: True)
    with launching_by(chip.launch):
        yield chip


def ids(rows, experts=4):
    draw = torch.Generator().manual_seed(rows)
    return torch.randint(-1, experts, (rows,), generator=draw).tolist()


@pytest.mark.parametrize("options", [{}, {"late": True}, {"late": True, "apart": True}], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(("rows", "dtype"), [(37, BF16), (150, FP16)])
def test_towers(chip, rows, dtype, tower, options):
    """Asynchronous work happens at once or when it is waited for; threads go in step, or warp after warp."""
    chip.options = options
    check(Case(ids(rows), **SMALL), tower, "triton", dtype)
    instructions = " ".join(chip.opcodes())
    if tower != "expert":
        assert (
            ("wgmma.mma_async" in instructions)
            == ("cp.async.bulk.tensor" in instructions)
            == (chip.arch == "sm_90")
        )
    assert "mma" in instructions


@pytest.mark.parametrize(("rows", "rank"), [(20, 8), (150, 64), (150, 128)])
def test_ranks(chip, rank, rows):
    chip.options = {"late": True}
    check(Case(ids(rows), **SMALL | {"R": rank}), "fused", "triton", BF16)


@pytest.mark.parametrize("rank", [24, 128])
def test_short_segments(chip, rank):
    chip.options = {"late": True}
    check(Case(ids(70, 12), **SMALL | {"R": rank, "E": 12}), "expert", "triton", BF16)
    rows = {recorded.meta["BLOCK_E"] for recorded, _ in chip.launches if "BLOCK_E" in recorded.meta}
    stages = chip.launches[0][0].meta["num_stages"]
    assert rows == {16} and stages == configs.CONFIGS[f"{chip.arch.replace('_', '')}_short"].gate_up.stages


def test_exact_fp32(chip, monkeypatch):
    monkeypatch.setenv("QAR_KERNELS_PATH", "fused")
    check(Case(ids(37), **SMALL), "fused", "triton", FP32)


@pytest.mark.parametrize("rows", [7, 150])
def test_split_k(chip, monkeypatch, rows):
    """On a chip with so many multiprocessors that few tiles are cut into parts."""
    monkeypatch.setattr(launch, "_INTERPRETER_PROGRAMS", 8)
    check(Case(ids(rows), **SMALL | {"I": 336}), "fused", "triton", BF16)
    assert "reduce_kernel" in chip.kernels()


@pytest.mark.parametrize("path", ["fused", "grouped"])
def test_adapters(chip, monkeypatch, path):
    """LoRA of three ranks with dropout, on a base that trains too."""
    monkeypatch.setenv("QAR_KERNELS_PATH", path)
    lora_helpers.check(monkeypatch, Case(ids(150), **SMALL), "fused", "triton", BF16, dropout=0.1)
    assert chip.kernels() >= {"fused": {"dropout_mask_kernel"}, "grouped": {"swiglu_backward_kernel"}}[path]


@pytest.mark.parametrize("rows", [40, 150])
def test_isolation_and_two_runs(chip, rows):
    mine = torch.arange(rows) % 3 == 1
    results = []
    for company in (1, 3, 3):
        others = torch.randint(2, 2 + company, (rows,), generator=torch.Generator().manual_seed(company))
        case = Case(torch.where(mine, 1, others).tolist(), **SMALL | {"E": 5})
        results.append(run(case, "fused", "triton", BF16))
    alone, first, second = results
    for name in ("y", "d_x"):
        assert torch.equal(alone[name][mine], first[name][mine]), name
    for name in ("d_expert_gate", "d_expert_up", "d_expert_down"):
        assert torch.equal(alone[name][1], first[name][1]), name
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_optimizer_of_rows(chip, dtype):
    adamw_helpers.check(dtype)
    assert len(chip.launches) == 3


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("rows", [64, 256])
def test_no_byte_is_moved_twice_by_an_instruction(chip, rows, tower):
    """Of global memory no more sectors, over the banks no more passes, than an access's bytes need."""
    run(Case([row // 16 for row in range(rows)], H=128, I=256, R=64, E=16), tower, "triton", BF16)
    for recorded, machine in chip.launches:
        tensors, shared = machine.tensors, machine.shared
        for traffic in (tensors.loads, tensors.stores, shared.traffic):
            assert traffic.taken == traffic.needed, (recorded.kernel.__name__, traffic)


def test_an_unknown_form_is_named(chip):
    chip.options = {"edit": lambda ptx: re.sub(r"setp\.ge\.s32", "setp.hi.s32", ptx)}
    with pytest.raises(EmulationError, match=r"gate_up_kernel, line \d+: unknown form setp\.hi\.s32 %p\d+"):
        check(Case(ids(37), **SMALL), "fused", "triton", BF16)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_with_nan(name):
    a, b = np.array([1, 2, 2, np.nan, 1], np.float32), np.array([2, 1, 2, 1, np.nan], np.float32)
    ordered, unordered = (arithmetic.comparing(name + end, True)(a, b).tolist() for end in ("", "u"))
    assert (
        ordered[:3]
        == unordered[:3]
        == [bool(getattr(operator, name)(x, y)) for x, y in ((1, 2), (2, 1), (2, 2))]
    )
    assert not any(ordered[3:]) and all(unordered[3:])


FAULTS = [
    ("sm_80", "a copy nobody waits for", r"cp\.async\.wait_group\s+\d", "cp.async.wait_group 9"),
    ("sm_80", "a matrix read the other way", r"\.x4\.trans", ".x4"),
    ("sm_80", "no barrier between warps", r"bar\.sync\s+0", "bar.warp.sync -1"),
    ("sm_80", "a lost guard", r"@%p\d+ (st\.global)", r"\1"),
    ("sm_90", "a product nobody waits for", r"(wgmma\.wait_group\S*)\s+\d", r"\1 9"),
    ("sm_90", "other bytes than expected", r"(expect_tx\S+ _, \S+) (\d)", r"\1 1\2"),
    ("sm_90", "a barrier nobody ends", r"@%p\d+ mbarrier\.inval[^;]*;", ""),
    ("sm_90", "a lost guard", r"@%p\d+ (st\.global)", r"\1"),
]


@pytest.mark.parametrize(("chip", "fault", "pattern", "by"), FAULTS, indirect=["chip"])
def test_the_emulator_sees_a_fault(chip, fault, pattern, by):
    edits = []

    def edit(ptx):
        edited, count = re.subn(pattern, by, ptx)
        edits.append(count)
        return edited

    chip.options = {"late": True, "apart": "barrier" in fault, "edit": edit}
    with pytest.raises((EmulationError, AssertionError)):
        check(Case(ids(37), **SMALL), "fused", "triton", BF16)
    assert sum(edits) > 0
