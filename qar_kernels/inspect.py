"""Compile launch configurations ahead of time, without a GPU, and read the machine code.

``python -m qar_kernels.inspect --arch sm_90 [--all] [--json]`` prints registers, shared memory, matrix
instructions, bulk-copy loads and spills of every kernel, and fails where one spills, does not fit or
misses the matrix unit; ``--roofline`` prints floor times instead.
H hidden, I intermediate, R expert rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context

from qar_kernels import roofline
from qar_kernels.model_shapes import MODEL_SHAPES
from qar_kernels.triton import shipped
from qar_kernels.triton.machine_code import (
    ARCHITECTURES,
    SHARED_LIMIT,
    MachineCode,
    compile_launch,
    read,
    specialisation,
)
from qar_kernels.triton.runner import Recorded
from qar_kernels.triton.shipped import Case

NO_PRODUCTS = (
    "adamw_rows_kernel", "dropout_mask_kernel", "reduce_kernel", "swiglu_kernel", "swiglu_backward_kernel",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One compiled kernel and the first case that needs it."""

    arch: str
    kernel: str
    case: Case
    code: MachineCode

    def faults(self) -> list[str]:
        """What is wrong with the kernel; empty if nothing is."""
        found = []
        if self.code.spills:
            found.append(f"{self.code.spills} spills")
        if self.code.shared_bytes > SHARED_LIMIT[self.arch]:
            found.append(f"shared memory over {SHARED_LIMIT[self.arch]}")
        if self.kernel in NO_PRODUCTS or self.case.config == "fp32":  # exact products have no matrix unit
            return found
        if not self.code.mma:
            found.append("no matrix instructions")
        if self.code.serialised:
            found.append("a wait for every matrix instruction")
        # Rows of a segment are gathered, so no descriptor serves them.
        dense = self.case.tower != "expert" and self.kernel != "expert_weight_grad_kernel"
        if dense and self.case.config.startswith("sm90") and not self.code.tma_loads:
            found.append("no bulk copies")
        return found

    def as_dict(self) -> dict[str, object]:
        """Flat, for JSON."""
        return {"arch": self.arch, "kernel": self.kernel, **asdict(self.case), **asdict(self.code)}


def table(arch: str, cases: Iterable[Case], complete: bool, jobs: int) -> Iterator[Row]:
    """Compile every distinct kernel of the cases in ``jobs`` processes; rows come as they are ready.

    Args:
        arch: one of ``ARCHITECTURES``.
        cases: configurations at models' shapes.
        complete: every launch of a case, not only those of a training step with the base frozen.
        jobs: processes; each starts its own interpreter, 1 means this one.
    """
    work = list(_distinct(cases, complete))
    if jobs == 1:
        yield from chain.from_iterable(_compile(arch, *item, complete) for item in work)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_compile, arch, *item, complete) for item in work]
        for future in futures:
            yield from future.result()


def _launches(case: Case, complete: bool) -> list[Recorded]:
    return shipped.every_launch(case) if complete else shipped.training_step(case)


def _distinct(cases: Iterable[Case], complete: bool) -> Iterator[tuple[Case, list[int]]]:
    """Each case with the positions of its launches that no earlier case has."""
    seen = set()
    for case in cases:
        new = []
        for position, recorded in enumerate(_launches(case, complete)):
            key = specialisation(recorded)
            if key not in seen:
                seen.add(key)
                new.append(position)
        if new:
            yield case, new


def _compile(arch: str, case: Case, wanted: list[int], complete: bool) -> list[Row]:
    """Recorded launches do not travel between processes, so they are recorded again here."""
    launches = _launches(case, complete)
    rows = []
    for recorded in (launches[position] for position in wanted):
        rows.append(Row(arch, recorded.kernel.__name__, case, read(compile_launch(recorded, arch))))
    return rows


_FORM = "{:26} {:11} {:12} {:6} {:4} {:>4} {:>4} {:>4} {:>7} {:>4} {:24} {:>4} {:>6}  {}"


def _line(row: Row) -> str:
    case, code = row.case, row.code
    return _FORM.format(
        row.kernel, case.shape, case.config, case.tower, case.dtype, case.rank, case.lora_rank,
        code.registers, code.shared_bytes, code.resident, " ".join(code.mma) or "-", code.tma_loads,
        code.spills, "; ".join(row.faults()),
    ).rstrip()  # fmt: skip


def _selected(args: argparse.Namespace) -> tuple[list[Case], bool]:
    """The matrix or the selected part of it, by default the representative cases; and whether complete."""
    options = ("config", "shape", "rank", "dtype", "tower", "lora_rank")
    wanted = {name: getattr(args, name) for name in options}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    complete = args.all or bool(wanted)
    shapes = [args.shape] if args.shape else list(shipped.SHAPES)
    cases = shipped.matrix(args.arch, shapes) if complete else shipped.representative(args.arch)
    kept = [case for case in cases if all(getattr(case, name) == value for name, value in wanted.items())]
    return kept, complete


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qar_kernels.inspect", description=__doc__)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="sm_90")
    parser.add_argument("--all", action="store_true", help="every shipped configuration, shape, rank, dtype")
    parser.add_argument("--config", help="of these only one configuration, such as sm90_decode")
    parser.add_argument("--shape", choices=sorted(MODEL_SHAPES), help="the H and I of a model")
    parser.add_argument("--rank", type=int, choices=shipped.RANKS)
    parser.add_argument("--lora-rank", type=int, choices=(0, *shipped.LORA_RANKS), help="0: no adapters")
    parser.add_argument("--dtype", choices=sorted(shipped.DTYPES))
    parser.add_argument("--tower", choices=shipped.TOWERS)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument(
        "--roofline",
        action="store_true",
        help="floor times instead of compiling; takes --shape, --rank and --json",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 if a kernel has a fault."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.roofline:
        shapes = {args.shape: MODEL_SHAPES[args.shape]} if args.shape else shipped.SHAPES
        sys.stdout.write(roofline.report(shapes, args.rank or 64, args.json) + "\n")
        return 0
    cases, complete = _selected(args)
    if not cases:
        parser.error("no shipped configuration matches all of these options")
    rows = []
    if not args.json:
        head = ("kernel", "shape", "config", "tower", "type", "R", "LoRA", "regs", "shared", "fit", "matrix")
        sys.stdout.write(_FORM.format(*head, "TMA", "spills", "fault").rstrip() + "\n")
    for row in table(args.arch, cases, complete, args.jobs):
        rows.append(row)
        if not args.json:
            sys.stdout.write(_line(row) + "\n")
            sys.stdout.flush()
    if args.json:
        sys.stdout.write(json.dumps([row.as_dict() for row in rows], indent=1) + "\n")
    return int(any(row.faults() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
