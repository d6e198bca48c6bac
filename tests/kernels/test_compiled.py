"""Shipped launch configurations compile ahead of time, without spills, within the chip's memory.

Runs outside the interpreter, so in another process, once per architecture. A representative set;
all of it, about a thousand kernels per architecture: ``python -m qar_kernels.inspect --arch sm_90 --all``.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest

from qar_kernels.inspect import NO_PRODUCTS
from qar_kernels.triton import shipped, tiles
from qar_kernels.triton.configs import CONFIGS, FAMILIES
from qar_kernels.triton.machine_code import ARCHITECTURES, is_serialised, resident, specialisation

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
ARCHS = sorted(SHARED_LIMIT)


@cache
def inspected(arch):
    """The exit status of the command, and its rows."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qar_kernels.inspect", "--json", "--arch", arch]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr[-2000:]  # 1: there is a fault, which a test below names
    return result.returncode, json.loads(result.stdout)


def rows(arch):
    return inspected(arch)[1]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_command_finds_no_fault(arch):
    status, found = inspected(arch)
    assert status == 0, [row for row in found if row["spills"] or not row["mma"]]


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_and_shared_memory_fits(arch):
    for row in rows(arch):
        assert row["spills"] == 0, row
        assert row["shared_bytes"] <= SHARED_LIMIT[arch], row


def test_hopper_uses_warpgroup_matrices_and_bulk_copies():
    for row in rows("sm_90"):
        if row["kernel"] in NO_PRODUCTS or row["config"] == "fp32":  # exact fp32 has no matrix unit
            continue
        # Tiles of 16 rows of one segment are too low for a warpgroup, so they may have HMMA instead.
        assert any("HGMMA" in name for name in row["mma"]) or row["tower"] == "expert", row
        assert row["mma"], row
        if row["tower"] != "expert" and row["kernel"] != "expert_weight_grad_kernel":
            assert row["tma_loads"] > 0, row  # gathered rows have none: no descriptor serves them


def test_ampere_uses_tensor_cores_and_no_bulk_copies():
    for row in rows("sm_80"):
        if row["kernel"] not in NO_PRODUCTS and row["config"] != "fp32":
            assert any(name.startswith("HMMA") for name in row["mma"]), row
        assert row["tma_loads"] == 0, row


@pytest.mark.parametrize(("products_a_wait", "expected"), [(1, True), (4, False)])
def test_a_wait_for_every_matrix_instruction_is_a_fault(products_a_wait, expected):
    group = "HGMMA.64x128x16.F32.BF16 R88 ;\n" * products_a_wait + "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    assert is_serialised(group * 4) is expected
    assert not any(row["serialised"] for row in rows("sm_90"))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_representative_set_meets_everything(arch):
    cases = list(shipped.representative(arch))
    configs = {name for name in CONFIGS if name.startswith(arch.replace("_", ""))} | {"fp32"}
    assert {case.config for case in cases} == configs
    assert {case.tower for case in cases} == set(shipped.TOWERS)
    assert {case.shape for case in cases} == set(shipped.SHAPES)
    assert {case.dtype for case in cases} == set(shipped.DTYPES)
    assert {8, 32, 64, 128} <= {case.rank for case in cases}
    assert {row["kernel"] for row in rows(arch)} == {
        launch.kernel.__name__ for case in shipped.matrix(arch) for launch in shipped.every_launch(case)
    }


def test_a_new_configuration_is_compiled_like_the_others(monkeypatch):
    monkeypatch.setitem(CONFIGS, "sm90_new", CONFIGS["sm90_large"])
    assert "sm90_new" in {case.config for case in shipped.matrix("sm_90")}


def test_launches_of_one_step_split_and_do_not_split():
    """The rows were chosen so that 1, 2, 4 and 8 parts of K are all compiled."""
    case = shipped.Case("sm90_large", "Llama-3-8B", 64, "bf16", "fused")
    launches = shipped.every_launch(case)
    assert {launch.meta["SPLITS"] for launch in launches if "SPLITS" in launch.meta} == {1, 2, 4, 8}
    # What does not depend on the number of rows or on the type of tower is compiled once.
    assert len({specialisation(launch) for launch in launches}) < len(launches)


@pytest.mark.parametrize("arch", ARCHS)
def test_adapters_are_compiled_too(arch):
    """Low-rank steps and dropout make kernels of their own, held to the same demands."""
    for config in ("large", "decode"):
        found = {row["kernel"] for row in rows(arch) if row["lora_rank"] and row["config"].endswith(config)}
        assert {"gate_up_kernel", "down_kernel", "d_hidden_kernel"} <= found
    assert "dropout_mask_kernel" in {row["kernel"] for row in rows(arch)}


def test_adapters_meet_a_split_and_an_undivided_k_loop():
    cases = [case for case in shipped.representative("sm_90") if case.lora_rank]
    launches = [launch for case in cases for launch in shipped.training_step(case)]
    assert {launch.meta["SPLITS"] for launch in launches if launch.kernel.__name__ == "down_kernel"} == {1, 2}


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [(80, 8, 73728, 3), (150, 4, 24576, 3), (32, 1, 0, 32), (255, 8, 0, 1), (64, 8, 240_000, 0)],
)
def test_blocks_that_a_multiprocessor_holds(registers, warps, shared, expected):
    assert resident("sm_90", registers, warps, shared) == expected


def test_every_card_that_takes_the_kernels_can_be_compiled_for():
    assert {f"sm_{major}{minor}" for major, minor in FAMILIES} == set(ARCHITECTURES)


def test_hoppers_blocks_go_where_their_shared_memory_is():
    for (major, minor), family in FAMILIES.items():
        fits = resident(f"sm_{major}{minor}", registers=32, warps=8, shared_bytes=192 * 1024) > 0
        assert family == ("sm90" if fits else "sm80")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rank", shipped.RANKS)
def test_stages_of_segments_fit_beside_each_other(config, rank):
    """Half as many tiles as stages are there at a time, of one projection in down, of two in d_x."""
    bits = 32 if config == "fp32" else 16
    for gemm, projections in ((CONFIGS[config].down, 1), (CONFIGS[config].d_x, 2)):
        stages = tiles.segment_stages(max(16, rank), gemm.block_n, bits, projections)
        assert projections * stages // 2 * max(16, rank) * gemm.block_n * bits // 8 <= 64 * 1024


@pytest.mark.parametrize(("lora_rank", "stages"), [(0, 4), (16, 4), (17, 3), (64, 3)])
def test_a_large_adapter_takes_a_stage_of_its_own_kernels_alone(lora_rank, stages):
    case = shipped.Case("sm90_large", "Llama-3-8B", 64, "bf16", "fused", lora_rank)
    found = {launch.kernel.__name__: launch.meta["num_stages"] for launch in shipped.training_step(case)}
    assert found["gate_up_kernel"] == found["down_kernel"] == stages
    assert found["d_hidden_kernel"] == found["d_x_kernel"] == 4


@pytest.mark.parametrize("without", ["gate", "up"])
def test_a_large_adapter_of_one_projection_takes_a_stage_too(without, monkeypatch):
    adapters, names = shipped._adapters, (f"{without}_low", f"{without}_b")

    def one_less(*sizes):
        found = adapters(*sizes)
        return found._replace(**{name: getattr(found, name)[:, :0] for name in names})

    monkeypatch.setattr(shipped, "_adapters", one_less)
    case = shipped.Case("sm90_large", "Llama-3-8B", 64, "bf16", "fused", lora_rank=64)
    found = {launch.kernel.__name__: launch.meta["num_stages"] for launch in shipped.training_step(case)}
    assert found["gate_up_kernel"] == 3


@pytest.mark.parametrize(("rank", "stages"), [(64, 4), (128, 3)])
def test_a_large_expert_takes_a_stage_of_the_input_gradient(rank, stages):
    case = shipped.Case("sm90_large", "Llama-3-8B", rank, "bf16", "dual")
    found = {launch.kernel.__name__: launch.meta["num_stages"] for launch in shipped.training_step(case)}
    assert found["d_x_kernel"] == stages and found["down_kernel"] == 4


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_fits_on_a_multiprocessor(arch):
    assert all(row["resident"] >= 1 for row in rows(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_programs_that_share_a_multiprocessor_fit_on_it(arch):
    """And K is split by multiprocessors: how many programs each has changes no sum."""
    for row in rows(arch):
        gemm = getattr(CONFIGS[row["config"]], row["kernel"].removesuffix("_kernel"), None)
        if gemm is not None and row["tower"] != "expert":  # which has as many as fit, see above
            assert row["resident"] >= gemm.programs, row
    case = shipped.Case(f"{arch.replace('_', '')}_decode", "Llama-3-8B", 64, "bf16", "fused")
    launches = {launch.kernel.__name__: launch for launch in shipped.training_step(case)}
    assert launches["gate_up_kernel"].grid == launches["d_hidden_kernel"].grid == (4 + 4 + 1 + 224,)
    assert launches["down_kernel"].grid == (3 * 64,) and launches["down_kernel"].meta["SPLITS"] == 2


def test_tiles_of_segments_have_many_programs_but_not_one_a_tile():
    """Many tiles share a program, and no program is started for segments that four experts cannot fill."""
    case = shipped.Case("sm90_experts", "Llama-3-8B", 64, "bf16", "expert")
    grids = {launch.kernel.__name__: launch.grid[0] for launch in shipped.training_step(case)}
    for name in ("down_kernel", "d_x_kernel", "expert_weight_grad_kernel"):
        assert 132 < grids[name] <= 32 * 132
    assert grids["gate_up_kernel"] == grids["d_hidden_kernel"] == 1024 // 64 + 4 + 1
    assert grids["expert_weight_grad_kernel"] == 2 * (4 + 1) * 4096 // 64
    fused = replace(case, config="sm90_large", tower="fused")
    assert max(launch.grid[0] for launch in shipped.training_step(fused)[:2]) == 132


def test_roofline():
    command = [sys.executable, "-m", "qar_kernels.inspect", "--roofline", "--json"]
    cells = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    one_row = next(c for c in cells if (c["chip"], c["shape"], c["T"]) == ("H200", "Llama-3-8B", 1))
    assert one_row["bound_by"] == "bytes"
    assert one_row["bytes"] == pytest.approx(6 * 4096 * (14336 + 64), rel=1e-2)
    small = subprocess.run([*command, "--shape", "SmolLM2-135M"], capture_output=True, text=True, check=True)
    assert {cell["shape"] for cell in json.loads(small.stdout)} == {"SmolLM2-135M"}
