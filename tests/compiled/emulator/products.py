"""Matrix instructions: ``mma`` of a warp, ``wgmma`` of four. 16-bit factors, fp32 sums."""

import re
from functools import partial

import numpy as np

from emulator.access import check_converged
from emulator.arithmetic import float_of
from emulator.asynchronous import swizzled
from emulator.machine import WARP, Machine, Step, instruction
from emulator.memory import EmulationError
from emulator.program import Instruction

_GROUP = 4 * WARP
_STEP = 16  # depth of a product


def _fragments(registers: list[np.ndarray], kind: str) -> list[np.ndarray]:
    """(warps, 8, 8) of each register: thread i holds elements (i / 4, 2 (i % 4)) and the next."""
    return [float_of(register.view(np.uint16), kind).reshape(-1, 8, 8) for register in registers]


def _left_factor(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """(warps, 16, 16), from four registers: rows first, then columns."""
    top_left, bottom_left, top_right, bottom_right = _fragments(registers, kind)
    return np.block([[top_left, top_right], [bottom_left, bottom_right]])


@instruction("mma.sync.aligned.m16n8k16.row.col.f32")
def warp_product(machine: Machine, op: Instruction) -> Step:
    """``d = a · b + c``: a (16, 16), b (16, 8)."""
    kind = op.opcode.split(".")[-2]
    d, a, b, c = op.operands
    left, right = ([machine.read(name, np.uint32) for name in machine.vector(text)] for text in (a, b))
    sums = [machine.read(name, np.float32) for name in machine.vector(c)]
    results = [machine.write(name, np.float32) for name in machine.vector(d)]

    def step(mask: np.ndarray) -> None:
        check_converged(mask)
        product = _left_factor(left, kind) @ np.concatenate(_fragments(right, kind), axis=2).swapaxes(1, 2)
        # rows (half, r), columns (lane, side) -> (half, side) registers of (warp, r, lane) threads
        parts = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        values = [part + total for part, total in zip(parts, sums, strict=True)]
        for result, value in zip(results, values, strict=True):
            np.copyto(result, value, where=mask)

    return step


@instruction("wgmma.mma_async.sync.aligned")
def group_product(machine: Machine, op: Instruction) -> Step:
    """``d = a · b (+ d)``: a (64, 16) in registers or shared memory, b (16, N) in shared memory."""
    columns, kind = re.search(r"m64n(\d+)k16\.f32\.(b?f16)", op.opcode).groups()
    columns, d, a, b, adds = int(columns), *op.operands[:4]
    a_in_registers = a.startswith("{")
    signs, transposed = op.operands[4:6], [text == "1" for text in op.operands[6:]]
    if signs != ("1", "1"):
        raise EmulationError("negated factors")
    results = [machine.write(name, np.float32) for name in machine.vector(d)]
    left = [machine.read(name, np.uint32 if a_in_registers else np.uint64) for name in machine.vector(a)]
    right, accumulates = machine.read(b, np.uint64), machine.read(adds, np.bool_)

    def step(mask: np.ndarray) -> None:
        check_converged(mask)
        # descriptors are read when the product is issued, the factors when it runs
        for first in np.flatnonzero(mask[::_GROUP]) * _GROUP:
            threads = slice(first, first + _GROUP)
            descriptors = [_uniform(value[threads]) for value in (left[0], right, accumulates)]
            machine.walk.queues["wgmma"].issue(partial(multiply, threads, *descriptors))

    def multiply(threads: slice, a_at: int, b_at: int, adds: bool) -> None:
        if a_in_registers:
            rows = _left_factor([register[threads] for register in left], kind).reshape(64, _STEP)
        else:
            rows = _matrix(machine, a_at, 64, transposed[0], kind)
        product = rows @ _matrix(machine, b_at, columns, transposed[-1], kind).T
        # rows (warp, half, r), columns (tile, lane, side) -> (tile, half, side) registers
        parts = product.reshape(4, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(-1, _GROUP)
        for result, part in zip(results, parts, strict=True):
            result[threads] = result[threads] + part if adds else part

    return step


def _uniform(values: np.ndarray) -> int:
    """Of all threads of a group: the one value, or of registers anything."""
    if values.dtype != np.uint32 and (values != values[0]).any():
        raise EmulationError("threads of a group that disagree about a product")
    return int(values[0])


def _matrix(machine: Machine, descriptor: int, size: int, transposed: bool, kind: str) -> np.ndarray:
    """(size, 16) elements of shared memory, as a matrix descriptor says.

    ``size`` runs over rows of a or columns of b. Along the contiguous side lie ``width`` bytes, the other
    side in groups of eight; ``leading`` and ``stride`` are the bytes between those (PTX ISA, "Strides").
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]
    width = 16 << swizzle
    outer, depth = np.arange(size)[:, None], np.arange(_STEP)[None, :]
    if not transposed:
        chunks = depth * 2 if swizzle else depth // 8 * leading + depth % 8 * 2
        addresses = start + outer // 8 * stride + outer % 8 * width + chunks
    elif swizzle:
        span = width // 2
        addresses = (
            start + outer // span * leading + outer % span * 2 + depth // 8 * stride + depth % 8 * width
        )
    else:
        addresses = start + outer // 8 * stride + outer % 8 * 2 + depth // 8 * leading + depth % 8 * 16
    at = machine.shared.index(swizzled(addresses, swizzle), 2)
    return float_of(machine.shared.bytes[at].view(np.uint16)[..., 0], kind)
