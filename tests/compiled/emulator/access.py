"""Loads and stores, matrices of shared memory, and what passes between the threads of a warp."""

import numpy as np

from emulator.machine import WARP, Machine, Step, instruction
from emulator.memory import EmulationError, sectors, wavefronts
from emulator.program import Instruction


def _shape(op: Instruction) -> tuple[np.dtype, int]:
    """Element type and number of elements of an access."""
    parts = op.opcode.split(".")
    if parts[-1][0] == "s":
        raise EmulationError(f"{op.opcode}: a sign to extend")
    return np.dtype(f"u{int(parts[-1][1:]) // 8}"), int(parts[-2][1:]) if parts[-2] in ("v2", "v4") else 1


def _check_aligned(addresses: np.ndarray, width: int) -> None:
    if (addresses % addresses.dtype.type(width)).any():
        raise EmulationError(f"an access of {width} bytes that is not aligned")


@instruction("ld.global", "ld.shared")
def load(machine: Machine, op: Instruction) -> Step:
    dtype, count = _shape(op)
    width = count * dtype.itemsize
    is_global = op.opcode.startswith("ld.global")
    base, offset = machine.address(op.operands[1], np.uint64 if is_global else np.uint32)
    # a register may be wider than what is loaded
    targets = [machine.register(name) for name in machine.vector(op.operands[0])]

    def step(mask: np.ndarray) -> None:
        threads = np.flatnonzero(mask)
        if threads.size == 0:
            return
        addresses = np.broadcast_to(base, machine.threads)[threads] + base.dtype.type(offset)
        _check_aligned(addresses, width)
        if is_global:
            machine.tensors.loads.add(*sectors(threads, addresses, width))
            data = machine.tensors.read(addresses, width)
        else:
            machine.shared.traffic.add(*wavefronts(threads, addresses, width))
            data = machine.shared.bytes[machine.shared.index(addresses, width)]
        for register, column in zip(targets, data.view(dtype).T, strict=True):
            register[threads] = column

    return step


@instruction("st.global", "st.shared")
def store(machine: Machine, op: Instruction) -> Step:
    dtype, count = _shape(op)
    width = count * dtype.itemsize
    is_global = op.opcode.startswith("st.global")
    base, offset = machine.address(op.operands[0], np.uint64 if is_global else np.uint32)
    narrow = max(dtype, np.dtype(np.uint16))  # a byte is stored from a register of 16 bits
    sources = [machine.read(name, narrow.type) for name in machine.vector(op.operands[1])]

    def step(mask: np.ndarray) -> None:
        threads = np.flatnonzero(mask)
        if threads.size == 0:
            return
        addresses = np.broadcast_to(base, machine.threads)[threads] + base.dtype.type(offset)
        _check_aligned(addresses, width)
        columns = [np.broadcast_to(source, machine.threads)[threads].astype(dtype) for source in sources]
        data = np.stack(columns, axis=1).view(np.uint8)
        if is_global:
            machine.tensors.stores.add(*sectors(threads, addresses, width))
            machine.tensors.store(addresses, data)
        else:
            machine.shared.traffic.add(*wavefronts(threads, addresses, width))
            machine.shared.bytes[machine.shared.index(addresses, width)] = data

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
    base, offset = machine.address(where, np.uint32)
    rows = 8 * len(registers)

    def step(mask: np.ndarray) -> None:
        check_converged(mask)
        warps = np.flatnonzero(mask[::WARP])
        if warps.size == 0:
            return
        threads = (warps[:, None] * WARP + np.arange(rows)).ravel()
        addresses = base[threads] + np.uint32(offset)
        _check_aligned(addresses, 16)
        machine.shared.traffic.add(*wavefronts(threads, addresses, 16))
        at = machine.shared.index(addresses, 16)
        lanes = warps[:, None] * WARP + np.arange(WARP)
        if loads:
            halves = machine.shared.bytes[at].view(np.uint16).reshape(len(warps), len(registers), 8, 8)
            if transposed:
                halves = np.ascontiguousarray(halves.swapaxes(2, 3))
            words = halves.view(np.uint32).reshape(len(warps), len(registers), WARP)
            for index, register in enumerate(registers):
                register[lanes] = words[:, index]
        else:
            words = np.stack([register[lanes] for register in registers], axis=1)
            halves = words.view(np.uint16).reshape(len(warps), len(registers), 8, 8)
            if transposed:
                halves = halves.swapaxes(2, 3)
            machine.shared.bytes[at] = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 16)

    return step


@instruction("shfl.sync.idx")
def shuffle(machine: Machine, op: Instruction) -> Step:
    """Every thread gets the value of a lane that it names."""
    target, source, lane = (machine.read(name, np.uint32) for name in op.operands[:3])

    def step(mask: np.ndarray) -> None:
        check_converged(mask)
        own = np.arange(machine.threads)
        values = source[own // WARP * WARP + np.broadcast_to(lane, machine.threads) % WARP]
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
