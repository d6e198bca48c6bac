"""A thread block: registers, memories, and the walk through a program."""

import re
from collections.abc import Callable

import numpy as np

from emulator.memory import EmulationError, Shared
from emulator.program import Instruction, Program

WARP = 32
Step = Callable[[np.ndarray], None]  # what an instruction does for the threads of a mask
_CLASSES = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}
_SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y")
HANDLERS: dict[str, Callable[["Machine", Instruction], Step]] = {}


def instruction(*opcodes: str) -> Callable:
    """Register a function that prepares instructions: ``(machine, instruction) -> step(mask)``.

    An opcode is handled by the longest of its dotted beginnings that is registered.
    """

    def register(prepare: Callable) -> Callable:
        HANDLERS.update(dict.fromkeys(opcodes, prepare))
        return prepare

    return register


class Machine:
    """One block after the other, the same registers for all.

    Attributes:
        threads: of a block; a register is an array with an element for each.
        shared: shared memory.
        tensors: global memory, see :class:`emulator.memory.Global`.
        maps: tensor maps of the launch.
        late: whether asynchronous copies and products happen when they are waited for, not when issued.
    """

    def __init__(self, program: Program, shared_bytes: int, arguments: list, tensors, maps: list, late: bool):
        self.program, self.threads = program, program.threads
        self.shared, self.tensors, self.maps, self.late = Shared(shared_bytes), tensors, maps, late
        self.arguments = arguments
        self.registers = {name: np.zeros(self.threads, np.uint32) for name in _SPECIAL}
        self.registers["%tid.x"][:] = np.arange(self.threads)
        self.steps = [self._prepare(each) for each in program.instructions]
        self.guards = [each.guard and self.read(each.guard, np.bool_) for each in program.instructions]

    def run(self, grid: tuple[int, ...]) -> None:
        """All blocks of the grid."""
        columns, rows = (*grid, 1)[:2]
        self.registers["%nctaid.x"][:], self.registers["%nctaid.y"][:] = columns, rows
        for block in range(columns * rows):
            self.registers["%ctaid.x"][:], self.registers["%ctaid.y"][:] = block % columns, block // columns
            self.shared.clear()
            self._run_block()
            self.shared.check_idle()

    def read(self, operand: str, dtype: type) -> np.ndarray | np.generic:
        """What an operand holds now and at every later step, as ``dtype``: a view, or a constant."""
        if operand == "global_smem":
            return dtype(self.shared.START)
        if parameter := re.fullmatch(r"\w+_param_(\d+)", operand):
            return _constant(self.arguments[int(parameter.group(1))], dtype)
        if operand.startswith("0f"):
            return _constant(int(operand[2:], 16), dtype)
        if re.fullmatch(r"-?\d\w*", operand):
            return _constant(int(operand.rstrip("U"), 0), dtype)
        register = self.register(operand)
        # conversions and stores may name a wider register: its low bits
        return register.view(dtype)[:: max(1, register.itemsize // np.dtype(dtype).itemsize)]

    def write(self, name: str, dtype: type) -> np.ndarray:
        """A register as ``dtype``, to be written to; ``_`` is nowhere."""
        if name == "_":
            return np.empty(self.threads, dtype)
        register = self.register(name)
        if register.itemsize != np.dtype(dtype).itemsize:
            raise EmulationError(f"{name}: a register of {register.itemsize} bytes as {np.dtype(dtype)}")
        return register.view(dtype)

    def register(self, name: str) -> np.ndarray:
        """An element for each thread, unsigned; of which size, the first letters say."""
        if name not in self.registers:
            storage = _CLASSES[re.match(r"%(\D+)", name).group(1)] if name[0] == "%" else np.bool_
            self.registers[name] = np.zeros(self.threads, storage)
        return self.registers[name]

    def vector(self, operand: str) -> list[str]:
        """The registers of ``{a, b}``, or the one."""
        return [name.strip() for name in operand.strip("{} ").split(",")]

    def address(self, operand: str, dtype: type) -> tuple[np.ndarray | np.generic, int]:
        """Base and offset of ``[base + offset]``."""
        base, _, offset = operand.strip("[] ").partition("+")
        return self.read(base.strip(), dtype), int(offset or 0)

    def _prepare(self, each: Instruction) -> Step | None:
        if each.opcode.startswith(("bra", "ret", "bar.sync")):
            return None  # the walk's own
        parts = each.opcode.split(".")
        for length in range(len(parts), 0, -1):
            if prepare := HANDLERS.get(".".join(parts[:length])):
                return prepare(self, each)
        raise EmulationError(f"line {each.line}: unknown instruction {each.opcode}")

    def _run_block(self) -> None:
        here, active = 0, np.ones(self.threads, bool)
        parked: dict[int, np.ndarray] = {}  # threads that wait at another instruction
        while True:
            if parked and min(parked) <= here:
                parked[here] = parked.get(here, False) | active
                here = min(parked)
                active = parked.pop(here)
            each = self.program.instructions[here]
            mask = active
            if each.guard:
                mask = active & (self.guards[here] ^ each.negated)
            if self.steps[here] is not None:
                try:
                    self.steps[here](mask)
                except EmulationError as error:
                    raise EmulationError(f"{self.program.name}, line {each.line}: {error}") from error
            elif each.opcode.startswith("bar"):
                if parked:
                    raise EmulationError(f"line {each.line}: a barrier that not all threads have reached")
            else:
                if each.opcode.startswith("bra") and mask.any():
                    target = self.program.labels[each.operands[0]]
                    parked[target] = parked.get(target, False) | mask
                active = active & ~mask
                if not active.any():
                    if not parked:
                        return
                    here = min(parked)
                    active = parked.pop(here)
                    continue
            here += 1


def _constant(value: int, dtype: type) -> np.generic:
    """The low bits of an integer, read as ``dtype``."""
    size = np.dtype(dtype).itemsize
    return np.frombuffer((value & (1 << 8 * size) - 1).to_bytes(size, "little"), dtype)[0]
