"""Compile every shipped launch configuration ahead of time, without a GPU, and read the machine code.

``python -m qar_kernels.inspect --arch sm_90 [--json]`` prints registers, shared memory, matrix
instructions, bulk-copy loads and spills of every kernel; ``--roofline`` prints floor times instead.
T rows, H hidden, I intermediate, R expert rank, E experts, Q segments.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from qar_kernels import roofline
from qar_kernels.segments import Segments
from qar_kernels.triton import launch
from qar_kernels.triton.configs import CONFIGS
from qar_kernels.triton.kernels_down import reduce_kernel
from qar_kernels.triton.launch import Call, Hidden, Weights
from qar_kernels.triton.lora import LoraOperands
from qar_kernels.triton.runner import Recorded, recording

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
# Largest shared memory of one block: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
# In exact fp32 the compiler trades a few loop-invariant registers for occupancy (at 80 registers, far from
# the limit); those loops are bound by fp32 arithmetic. Everywhere else: none.
ALLOWED_SPILLS = {"fp32": 8}
SHAPES = {"Llama-3-8B": (4096, 14336), "Qwen2.5-7B": (3584, 18944)}
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One compiled kernel; ``hgmma`` lists its warpgroup matrix shapes, ``mma`` counts the older ones."""

    kernel: str
    shape: str
    config: str
    tower: str
    registers: int
    shared_bytes: int
    hgmma: list[str]
    mma: int
    tma_loads: int
    spills: int


def table(
    arch: str, shapes: dict[str, tuple[int, int]], tower: str = "fused", rank: int = 64, lora_rank: int = 0
) -> list[Row]:
    """Compile the configurations of ``arch`` at the given ``{name: (H, I)}`` and describe each kernel.

    With a ``lora_rank`` only the kernels that adapters change, with dropout on the hidden units.
    """
    rows = []
    for config in CONFIGS:
        if config.startswith(arch.replace("_", "")) or config == "fp32":
            for shape, (hidden, inter) in shapes.items():
                for recorded in launches(config, hidden, inter, rank, tower, lora_rank):
                    rows.append(_describe(recorded, arch, shape, config, tower))
    return rows


def launches(
    config: str, hidden: int, inter: int, rank: int, tower: str, lora_rank: int = 0
) -> list[Recorded]:
    """Every launch of a training step (base frozen), on tensors without storage."""
    rows, experts = 64 if config.endswith("decode") else 512, 4
    segments = Segments.from_ids([0, 1, 2, 3] * (rows // 4))
    blocks = CONFIGS[config]
    plan = segments.tile_plan(blocks.block_rows, blocks.block_expert)

    dtype = torch.float32 if config == "fp32" else torch.bfloat16

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    base = Weights(empty(inter, hidden), empty(inter, hidden), empty(hidden, inter))
    expert = Weights(empty(experts, rank, hidden), empty(experts, rank, hidden), empty(experts, hidden, rank))
    x, low = empty(rows, hidden), empty(rows, lora_rank)
    gate_b, down_a, down_b = empty(inter, lora_rank), empty(lora_rank, inter), empty(hidden, lora_rank)
    mask = torch.empty(rows, inter // 8 if lora_rank else 0, dtype=torch.uint8, device="meta")
    lora = LoraOperands(low, gate_b, low, gate_b, down_a, down_b, mask)
    call = Call(tower, base, expert, segments.perm, plan, 1.0, blocks, lora)
    with recording() as recorded:
        saved, saved_expert = launch.gate_up(call, x, x, save=True)
        launch.down(call, saved.h, saved_expert.h, x, None, low)
        grads = launch.d_hidden(call, x, x, Hidden(*saved), Hidden(*saved_expert), keep_h=False, d_low=low)
        if not lora_rank:
            launch.d_input(call, *grads, x)
            launch.expert_weight_grads(call, x, x, grads[1])
    return [launched for launched in recorded if not lora_rank or launched.kernel is not reduce_kernel]


def compile_launch(recorded: Recorded, arch: str) -> triton.compiler.CompiledKernel:
    """The kernel as the just-in-time compiler would build it for these arguments."""
    kernel, meta = recorded.kernel, dict(recorded.meta)
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
    names = kernel.arg_names[: len(recorded.args)]
    signature = dict(zip(names, map(_type_of, recorded.args), strict=True))
    signature |= dict.fromkeys(meta, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, arg in enumerate(recorded.args) if isinstance(arg, Tensor)
    }
    source = ASTSource(kernel, signature, constexprs=meta, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[arch], 32), options=options)


def _type_of(arg: object) -> str:
    if isinstance(arg, TensorDescriptor):
        return f"tensordesc<{_TYPES[arg.base.dtype]}{list(arg.block_shape)}>"
    if isinstance(arg, Tensor):
        return "*" + _TYPES[arg.dtype]
    return "fp32" if isinstance(arg, float) else "i32"


def _describe(recorded: Recorded, arch: str, shape: str, config: str, tower: str) -> Row:
    compiled = compile_launch(recorded, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = _cuobjdump("-sass", cubin.name)
        usage = _cuobjdump("-res-usage", cubin.name)
    return Row(
        kernel=recorded.kernel.__name__,
        shape=shape,
        config=config,
        tower=tower,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        shared_bytes=compiled.metadata.shared,
        hgmma=sorted(set(re.findall(r"HGMMA\.(\d+x\d+x\d+)", sass))),
        mma=len(re.findall(r"\bHMMA\.", sass)),
        tma_loads=len(re.findall(r"\bUTMALDG\b", sass)),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
    )


def _cuobjdump(option: str, cubin: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout


def _lines(rows: list[Row]) -> Iterator[str]:
    form = "{:26} {:11} {:12} {:6} {:>4} {:>7} {:24} {:>5} {:>4} {:>6}"
    yield form.format(
        "kernel", "shape", "config", "tower", "regs", "shared", "HGMMA", "HMMA", "TMA", "spills"
    )
    for r in rows:
        yield form.format(
            r.kernel, r.shape, r.config, r.tower, r.registers, r.shared_bytes,
            " ".join(r.hgmma) or "-", r.mma, r.tma_loads, r.spills,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 if a kernel spills or needs more shared memory than there is."""
    parser = argparse.ArgumentParser(prog="python -m qar_kernels.inspect", description=__doc__)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="sm_90")
    parser.add_argument("--tower", choices=("fused", "dual", "expert"), default="fused")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lora-rank", type=int, default=0, help="only what adapters change, with dropout")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--roofline", action="store_true", help="floor times instead of compiling")
    args = parser.parse_args(argv)
    if args.roofline:
        sys.stdout.write(roofline.report(SHAPES, args.rank, args.json) + "\n")
        return 0
    rows = table(args.arch, SHAPES, args.tower, args.rank, args.lora_rank)
    text = json.dumps([asdict(row) for row in rows], indent=1) if args.json else "\n".join(_lines(rows))
    sys.stdout.write(text + "\n")
    return int(not all(_fits(row, args.arch) for row in rows))


def _fits(row: Row, arch: str) -> bool:
    return row.spills <= ALLOWED_SPILLS.get(row.config, 0) and row.shared_bytes <= SHARED_LIMIT[arch]


if __name__ == "__main__":
    sys.exit(main())
