"""Every shipped launch configuration compiles ahead of time, without spills, within the chip's memory.

Runs outside the interpreter, so in another process, once per architecture.
"""

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from qar_kernels.triton.configs import CONFIGS

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
SHAPES = {"Llama-3-8B", "Qwen2.5-7B"}
LORA_CASES = [("sm_80", "fused"), ("sm_90", "fused")]
# The other towers of sm_80 are a command away: python -m qar_kernels.inspect --arch sm_80 --tower dual
CASES = [("sm_80", "fused"), ("sm_90", "fused"), ("sm_90", "dual"), ("sm_90", "expert")]


@cache
def rows(arch, tower, lora_rank=0):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qar_kernels.inspect", "--json", "--arch", arch, "--tower", tower]
    command += ["--lora-rank", str(lora_rank)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:] or result.stdout[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(("arch", "tower"), CASES)
def test_no_spills_and_shared_memory_fits(arch, tower):
    table = rows(arch, tower)
    configs = {name for name in CONFIGS if name.startswith(arch.replace("_", ""))} | {"fp32"}
    assert {(row["shape"], row["config"]) for row in table} == {(s, c) for s in SHAPES for c in configs}
    for row in table:
        assert row["spills"] <= (8 if row["config"] == "fp32" else 0), row
        assert row["shared_bytes"] <= SHARED_LIMIT[arch], row


@pytest.mark.parametrize("tower", ["fused", "dual"])
def test_hopper_uses_warpgroup_matrices_and_bulk_copies(tower):
    for row in rows("sm_90", tower):
        if row["kernel"] == "reduce_kernel" or row["config"] == "fp32":  # exact fp32 has no matrix unit
            continue
        assert row["hgmma"], row
        if row["kernel"] != "expert_weight_grad_kernel":  # its rows are gathered: no descriptor can
            assert row["tma_loads"] > 0, row


@pytest.mark.parametrize(("arch", "tower"), LORA_CASES)
def test_adapters_with_dropout_cost_no_spills(arch, tower):
    table = rows(arch, tower, lora_rank=16)
    assert {row["kernel"] for row in table} == {"gate_up_kernel", "down_kernel", "d_hidden_kernel"}
    for row in table:
        assert row["spills"] == 0, row
        assert row["shared_bytes"] <= SHARED_LIMIT[arch], row
        if arch == "sm_90" and row["config"] != "fp32":
            assert row["hgmma"] and row["tma_loads"] > 0, row


def test_ampere_uses_tensor_cores():
    assert all(
        r["mma"] > 0
        for r in rows("sm_80", "fused")
        if r["kernel"] != "reduce_kernel" and r["config"] != "fp32"
    )


def test_roofline():
    command = [sys.executable, "-m", "qar_kernels.inspect", "--roofline", "--json"]
    cells = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    one_row = next(c for c in cells if (c["chip"], c["shape"], c["T"]) == ("H200", "Llama-3-8B", 1))
    assert one_row["bound_by"] == "bytes"
    assert one_row["bytes"] == pytest.approx(6 * 4096 * (14336 + 64), rel=1e-2)
