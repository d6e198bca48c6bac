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

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from qar_kernels.triton.runner import Recorded

# Shared memory in KiB, of one block and of a multiprocessor (a block takes one more than it asks for), and
# threads of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities".
_LIMITS = {
    "sm_80": (163, 164, 2048),
    "sm_86": (99, 100, 1536),
    "sm_89": (99, 100, 1536),
    "sm_90": (227, 228, 2048),
    "sm_100": (227, 228, 2048),
    "sm_120": (99, 100, 1536),
}
SHARED_LIMIT = {arch: 1024 * block for arch, (block, _, _) in _LIMITS.items()}
ARCHITECTURES = {arch: int(arch.removeprefix("sm_")) for arch in _LIMITS}
# Registers are handed out to warps, 256 at a time.
_REGISTERS, _BLOCKS, _WARP = 65536, 32, 32  # blocks: 16 to 32, never the limit


@dataclass(frozen=True)
class MachineCode:
    """What a kernel was compiled to.

    Attributes:
        registers: per thread.
        shared_bytes: of one block.
        resident: blocks that a multiprocessor holds at a time.
        mma: matrix instructions with their shapes: HGMMA (sm_90), HMMA (sm_80), UTCHMMA (sm_100).
        tma_loads: bulk copies from global to shared memory.
        spills: loads from and stores to local memory.
        serialised: whether every HGMMA is waited for at once, which ptxas does where code touches the
            registers of one that is under way.
    """

    registers: int
    shared_bytes: int
    resident: int
    mma: list[str]
    tma_loads: int
    spills: int
    serialised: bool


def specialisation(recorded: Recorded) -> tuple:
    """Everything the compiled code depends on: launches with equal ones share a kernel."""
    return recorded.kernel.__name__, *map(_kind, recorded.args), *recorded.meta.items()


def compile_launch(recorded: Recorded, arch: str) -> triton.compiler.CompiledKernel:
    """The kernel as a launch on that chip would compile it, and then find it in Triton's cache."""
    before = driver._active  # reset_active() would look for a card
    driver._active = _Chip(ARCHITECTURES[arch])
    try:
        return recorded.kernel.warmup(*recorded.args, grid=recorded.grid, **recorded.meta)
    finally:
        driver._active = before


@dataclass(frozen=True)
class _Chip:
    """What Triton's just-in-time compiler asks a driver for; each architecture is a device of its own."""

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, warp_size=32)

    def get_current_device(self) -> int:
        return -self.arch  # no card's index: Triton keeps compiled kernels by it

    def get_current_stream(self, _device: int) -> int:
        return 0


def read(compiled: triton.compiler.CompiledKernel) -> MachineCode:
    """Count what matters in the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [_disassembler(), "-sass", "-res-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    registers = int(re.search(r"REG:(\d+)", text).group(1))
    metadata = compiled.metadata
    return MachineCode(
        registers=registers,
        shared_bytes=metadata.shared,
        resident=resident(f"sm_{metadata.target.arch}", registers, metadata.num_warps, metadata.shared),
        mma=sorted(set(re.findall(r"\b(?:HG|H|UTC\w*)MMA(?:\.\d\w*)?", text))),
        tma_loads=len(re.findall(r"\bUTMALDG\b", text)),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", text)),
        serialised=is_serialised(text),
    )


def resident(arch: str, registers: int, warps: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at a time; 0 where not even one fits."""
    of_a_warp = -(-registers * _WARP // 256) * 256
    _, shared_kib, threads = _LIMITS[arch]
    return min(
        _BLOCKS,
        threads // (_WARP * warps),
        _REGISTERS // (of_a_warp * warps),
        shared_kib * 1024 // (shared_bytes + 1024),
    )


def is_serialised(sass: str) -> bool:
    """Whether there is a full wait for every HGMMA; one or two may have theirs behind a short loop."""
    products = len(re.findall(r"\bHGMMA\b", sass))
    waits = len(re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", sass))
    return waits >= products > 2


@cache
def _disassembler() -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _kind(arg: object) -> tuple:
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, *arg.block_shape
    return (arg.dtype if isinstance(arg, Tensor) else type(arg),)
