"""Copies that run beside the program: ``cp.async``, tensor maps (TMA), and the barriers they report to.

Where the machine is ``late`` a copy happens when it is waited for and not when it is issued: a program that
reads too early is then as wrong as one that overwrites too early is otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from emulator.machine import Held, Machine, Step, instruction
from emulator.memory import Barrier, EmulationError, check_aligned
from emulator.program import Instruction


@dataclass(frozen=True)
class TensorMap:
    """What the driver encodes of a row-major matrix: its bytes, and the box that one copy moves.

    Attributes:
        data: (rows, columns) elements.
        box: rows and columns of one copy.
        swizzle: 0 none, 1, 2, 3: chunks of 16 bytes exchanged within 32, 64 or 128 bytes.
    """

    data: np.ndarray
    box: tuple[int, int]
    swizzle: int


@instruction("cp.async.commit_group", "wgmma.commit_group")
def commit(machine: Machine, op: Instruction) -> Step:
    kind = op.opcode.split(".")[0]
    return lambda mask: machine.walk.queues[kind].commit()


@instruction("cp.async.wait_group", "wgmma.wait_group")
def wait(machine: Machine, op: Instruction) -> Step:
    kind, remaining = op.opcode.split(".")[0], int(op.operands[0])
    return lambda mask: machine.walk.queues[kind].wait(remaining)


@instruction("cp.async.ca", "cp.async.cg")
def copy(machine: Machine, op: Instruction) -> Step:
    """``size`` bytes to shared memory, zeros behind the first ``source_size``."""
    into = machine.addresses(op.operands[0], np.uint32)
    source = machine.addresses(op.operands[1], np.uint64)
    size = int(op.operands[2], 0)
    sizes = machine.read((*op.operands, op.operands[2])[3], np.uint32)

    def step(mask: np.ndarray) -> None:
        threads = np.flatnonzero(mask)
        to, at, count = into(threads), source(threads), sizes[threads]
        if not np.isin(count, (0, size)).all():
            raise EmulationError("cp.async of a part")
        check_aligned(to, size)
        whole = count > 0

        def work() -> None:
            data = np.zeros((len(threads), size), np.uint8)
            if whole.any():
                data[whole] = machine.tensors.read(threads[whole], at[whole], size)
            machine.shared.bytes[machine.shared.index(to, size)] = data

        machine.walk.queues["cp"].issue(work)

    return step


def swizzled(addresses: np.ndarray, swizzle: int) -> np.ndarray:
    """Where the byte of an address lies: bits 4 to 6 (or fewer) exchanged by bits 7 to 9."""
    return addresses ^ (addresses >> 3 & {0: 0, 1: 0x10, 2: 0x30, 3: 0x70}[swizzle])


@instruction("cp.async.bulk.tensor.2d")
def copy_box(machine: Machine, op: Instruction) -> Step:
    """One thread copies a box of a matrix; what lies outside of the matrix is zero."""
    into, barrier = (machine.read(op.operands[index][1:-1], np.uint32) for index in (0, 2))
    name, _, rest = op.operands[1][1:-1].partition(",")
    column, row = (machine.read(text.strip(), np.int32) for text in rest.strip(" {}").split(","))
    chosen = machine.read(name.strip(), np.uint64)

    def step(mask: np.ndarray) -> None:
        for thread in np.flatnonzero(mask):
            to, x, y, key, number = (int(value[thread]) for value in (into, column, row, barrier, chosen))
            if to % 128 or key not in machine.shared.barriers:
                raise EmulationError(f"bulk copy to {to} with barrier {key}")
            machine.shared.copies.append((key, partial(_copy, machine, machine.maps[number], to, x, y, key)))
            if not machine.late:
                _complete(machine, key)

    return step


def _copy(machine: Machine, source: TensorMap, to: int, x: int, y: int, key: int) -> None:
    (rows, columns), size = source.box, source.data.itemsize
    box = np.zeros(source.box, source.data.dtype)
    inside = source.data[max(y, 0) : y + rows, max(x, 0) : x + columns]
    box[max(-y, 0) :, max(-x, 0) :][: len(inside), : inside.shape[1]] = inside
    addresses = swizzled(to + np.arange(0, rows * columns * size, 16), source.swizzle)
    machine.shared.bytes[machine.shared.index(addresses, 16)] = box.view(np.uint8).reshape(-1, 16)
    barrier = machine.shared.barriers[key]
    barrier.bytes -= box.nbytes
    barrier.complete()


def _complete(machine: Machine, key: int) -> None:
    """The copies that a barrier waits for."""
    due = [work for barrier, work in machine.shared.copies if barrier == key]
    machine.shared.copies = [each for each in machine.shared.copies if each[0] != key]
    for work in due:
        work()


def _barrier_step(machine: Machine, op: Instruction, function: Callable) -> Step:
    """``function(address, value)`` for each thread."""
    address = machine.read(op.operands[-2 if len(op.operands) > 1 else 0].strip("[]"), np.uint32)
    value = machine.read(op.operands[-1].strip("[]"), np.uint32)

    def step(mask: np.ndarray) -> None:
        for thread in np.flatnonzero(mask):
            function(int(address[thread]), int(value[thread]))

    return step


def _barrier(machine: Machine, key: int) -> Barrier:
    if key not in machine.shared.barriers:
        raise EmulationError(f"no barrier at {key}")
    return machine.shared.barriers[key]


@instruction("mbarrier.init")
def new_barrier(machine: Machine, op: Instruction) -> Step:
    def create(key: int, count: int) -> None:
        if key % 8 or key in machine.shared.barriers:
            raise EmulationError(f"second barrier at {key}, or not aligned")
        machine.shared.barriers[key] = Barrier(count, count)

    return _barrier_step(machine, op, create)


@instruction("mbarrier.inval")
def end_barrier(machine: Machine, op: Instruction) -> Step:
    def end(key: int, _: int) -> None:
        _barrier(machine, key)
        del machine.shared.barriers[key]

    return _barrier_step(machine, op, end)


@instruction("mbarrier.arrive.expect_tx")
def expect_bytes(machine: Machine, op: Instruction) -> Step:
    def arrive(key: int, count: int) -> None:
        barrier = _barrier(machine, key)
        barrier.bytes += count
        barrier.pending -= 1
        barrier.complete()

    return _barrier_step(machine, op, arrive)


@instruction("mbarrier.try_wait.parity")
def wait_for_barrier(machine: Machine, op: Instruction) -> Step:
    """Whether the phase of a parity is over. Where it is not, other teams run before the next question."""
    done = machine.write(op.operands[0], np.bool_)
    answers = []

    def ask(key: int, parity: int) -> None:
        _complete(machine, key)
        answers.append(_barrier(machine, key).phase != parity & 1)

    ask_each = _barrier_step(machine, op, ask)

    def step(mask: np.ndarray) -> None:
        answers.clear()
        ask_each(mask)
        done[mask] = answers
        if not all(answers):
            machine.walk.held = Held.WAITS

    return step
