"""Compile a recorded launch for a chip that need not be there, and read the machine code.

Triton's wheel carries the assembler and the disassembler, so this works without a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from qar_kernels.triton.runner import Recorded

# Largest shared memory of one block in KiB: CUDA C++ Programming Guide, "Compute Capabilities".
_SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SHARED_LIMIT = {arch: kib * 1024 for arch, kib in _SHARED_KIB.items()}
ARCHITECTURES = {arch: int(arch.removeprefix("sm_")) for arch in _SHARED_KIB}
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class MachineCode:
    """What one kernel became.

    Attributes:
        registers: per thread.
        shared_bytes: of one block.
        mma: matrix instructions with their shapes: HGMMA (sm_90), HMMA (sm_80), UTCHMMA (sm_100).
        tma_loads: bulk copies from global to shared memory.
        spills: loads from and stores to local memory.
        serialised: whether every HGMMA is waited for at once, which ptxas does where code touches the
            registers of one that is under way.
    """

    registers: int
    shared_bytes: int
    mma: list[str]
    tma_loads: int
    spills: int
    serialised: bool


def specialisation(recorded: Recorded) -> tuple:
    """Everything the compiled code depends on: launches with equal ones share a kernel."""
    return recorded.kernel.__name__, *_signature(recorded).items(), *recorded.meta.items()


def compile_launch(recorded: Recorded, arch: str) -> triton.compiler.CompiledKernel:
    """The kernel as the just-in-time compiler would build it for these arguments."""
    meta = dict(recorded.meta)
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
    signature = _signature(recorded) | dict.fromkeys(meta, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, arg in enumerate(recorded.args) if isinstance(arg, Tensor)
    }
    source = ASTSource(recorded.kernel, signature, constexprs=meta, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[arch], 32), options=options)


def read(compiled: triton.compiler.CompiledKernel) -> MachineCode:
    """Count what matters in the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [_disassembler(), "-sass", "-res-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    return MachineCode(
        registers=int(re.search(r"REG:(\d+)", text).group(1)),
        shared_bytes=compiled.metadata.shared,
        mma=sorted(set(re.findall(r"\b(?:HG|H|UTC\w*)MMA(?:\.\d\w*)?", text))),
        tma_loads=len(re.findall(r"\bUTMALDG\b", text)),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", text)),
        serialised=is_serialised(text),
    )


def is_serialised(sass: str) -> bool:
    """Whether there is a full wait for every HGMMA; one or two may have theirs behind a short loop."""
    products = len(re.findall(r"\bHGMMA\b", sass))
    waits = len(re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", sass))
    return waits >= products > 2


@cache
def _disassembler() -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _signature(recorded: Recorded) -> dict[str, str]:
    names = recorded.kernel.arg_names[: len(recorded.args)]
    return dict(zip(names, map(_type_of, recorded.args), strict=True))


def _type_of(arg: object) -> str:
    if isinstance(arg, TensorDescriptor):
        return f"tensordesc<{_TYPES[arg.base.dtype]}{list(arg.block_shape)}>"
    if isinstance(arg, Tensor):
        return "*" + _TYPES[arg.dtype]
    return "fp32" if isinstance(arg, float) else "i32"
