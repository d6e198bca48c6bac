"""Loads and stores, matrices of shared memory, and what passes between the threads of a warp."""

from collections.abc import Callable

import numpy as np

from emulator.machine import WARP, Machine, Step, instruction
from emulator.memory import EmulationError, Global, Shared
from emulator.program import Instruction


def _shape(op: Instruction) -> tuple[np.dtype, int]:
    """Element type and number of elements of an access."""
    parts = op.opcode.split(".")
    if parts[-1][0] == "s":
        raise EmulationError(f"{op.opcode}: a sign to extend")
    return np.dtype(f"u{int(parts[-1][1:]) // 8}"), int(parts[-2][1:]) if parts[-2] in ("v2", "v4") else 1


def _addresses(machine: Machine, operand: str, opcode: str) -> tuple[Global | Shared, Callable]:
    """The memory of an access, and the addresses of given threads."""
    if ".global" in opcode:
        return machine.tensors, machine.addresses(operand, np.uint64)
    return machine.shared, machine.addresses(operand, np.uint32)


@instruction("ld.global", "ld.shared")
def load(machine: Machine, op: Instruction) -> Step:
    """One element or several, neighbours, to a register each, which may be wider."""
    dtype, count = _shape(op)
    memory, addresses = _addresses(machine, op.operands[1], op.opcode)
    targets = [machine.register(name) for name in machine.vector(op.operands[0])]

    def step(mask: np.ndarray) -> None:
        threads = np.flatnonzero(mask)
        if threads.size:
            data = memory.read(threads, addresses(threads), count * dtype.itemsize)
            for register, column in zip(targets, data.view(dtype).T, strict=True):
                register[threads] = column

    return step


@instruction("st.global", "st.shared")
def store(machine: Machine, op: Instruction) -> Step:
    """One element or several, neighbours; a byte comes from a register of 16 bits."""
    dtype, _ = _shape(op)
    memory, addresses = _addresses(machine, op.operands[0], op.opcode)
    narrow = max(dtype, np.dtype(np.uint16)).type
    sources = [machine.read(name, narrow) for name in machine.vector(op.operands[1])]

    def step(mask: np.ndarray) -> None:
        threads = np.flatnonzero(mask)
        if threads.size:
            columns = [source[threads].astype(dtype) for source in sources]
            memory.store(threads, addresses(threads), np.stack(columns, axis=1).view(np.uint8))

    return step


def check_converged(mask: np.ndarray) -> None:
    """Some instructions are a whole warp's."""
    warps = mask.reshape(-1, WARP)
    if not (warps.all(1) | ~warps.any(1)).all():
        raise EmulationError("an instruction of whole warps, met by a part of one")


@instruction("ldmatrix", "stmatrix")
def matrices(machine: Machine, op: Instruction) -> Step:
    """8 x 8 matrices of 16-bit elements: thread i holds elements (i / 4, 2 (i % 4)) and the next.

    Thread 8 j + r has the address of row r of matrix j.
    """
    loads, transposed = op.opcode.startswith("ld"), ".trans" in op.opcode
    registers, where = op.operands if loads else op.operands[::-1]
    registers = [machine.write(name, np.uint32) for name in machine.vector(registers)]
    memory, addresses = _addresses(machine, where, op.opcode)
    rows = 8 * len(registers)

    def step(mask: np.ndarray) -> None:
        check_converged(mask)
        first = np.flatnonzero(mask[::WARP])[:, None] * WARP  # of each warp
        threads, lanes = (first + np.arange(rows)).ravel(), first + np.arange(WARP)
        shape = len(first), len(registers), 8, 8
        if loads:
            halves = memory.read(threads, addresses(threads), 16).view(np.uint16).reshape(shape)
            halves = halves.swapaxes(2, 3) if transposed else halves
            words = np.ascontiguousarray(halves).view(np.uint32).reshape(len(first), len(registers), WARP)
            for index, register in enumerate(registers):
                register[lanes] = words[:, index]
        else:
            halves = np.stack([register[lanes] for register in registers], axis=1)
            halves = halves.view(np.uint16).reshape(shape)
            halves = halves.swapaxes(2, 3) if transposed else halves
            rows_of = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 16)
            memory.store(threads, addresses(threads), rows_of)

    return step


@instruction("shfl.sync.idx")
def shuffle(machine: Machine, op: Instruction) -> Step:
    """Every thread gets the value of a lane that it names."""
    target, source, lane = (machine.read(name, np.uint32) for name in op.operands[:3])

    def step(mask: np.ndarray) -> None:
        check_converged(mask)
        own = np.arange(machine.threads)
        values = source[own // WARP * WARP + lane % WARP]
        np.copyto(target, values, where=mask)

    return step


@instruction("elect.sync")
def elect(machine: Machine, op: Instruction) -> Step:
    """True for one thread of each warp."""
    target = machine.write(op.operands[0].split("|")[1], np.bool_)

    def step(mask: np.ndarray) -> None:
        warps = mask.reshape(-1, WARP)
        chosen = np.zeros_like(warps)
        chosen[np.arange(len(warps)), warps.argmax(1)] = True
        np.copyto(target, chosen.ravel(), where=mask)

    return step


@instruction("bar.warp.sync", "fence", "wgmma.fence")
def nothing(machine: Machine, op: Instruction) -> Step:
    """Order between threads and units: here everything has one order."""
    return lambda mask: None
