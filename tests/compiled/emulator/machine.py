"""A thread block: registers, memories, and the walk through a program."""

import re
from collections.abc import Callable
from enum import Enum

import numpy as np

from emulator.memory import EmulationError, Shared
from emulator.program import Instruction, Program

WARP = 32
_PATIENCE = 100  # a copy is done when it is asked for: whoever asks so often asks for one that nobody issues
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
        team: threads that go in step: the block, or a part of it.
        walk: of the team that runs now.
    """

    def __init__(
        self, program: Program, shared_bytes: int, arguments: list, tensors, maps: list, late: bool, team: int
    ):
        self.program, self.threads = program, program.threads
        self.shared, self.tensors, self.maps, self.late = Shared(shared_bytes), tensors, maps, late
        self.arguments = arguments
        self.team = team
        self.registers = {name: np.zeros(self.threads, np.uint32) for name in _SPECIAL}
        self.registers["%tid.x"][:] = np.arange(self.threads)
        self.walk: Walk | None = None
        self.steps = [self._prepare(op) for op in program.instructions]
        self.guards = [op.guard and self.read(op.guard, np.bool_) for op in program.instructions]

    def run(self, grid: tuple[int, ...]) -> None:
        """All blocks of the grid."""
        columns, rows = (*grid, 1)[:2]
        self.registers["%nctaid.x"][:], self.registers["%nctaid.y"][:] = columns, rows
        for block in range(columns * rows):
            self.registers["%ctaid.x"][:], self.registers["%ctaid.y"][:] = block % columns, block // columns
            self.shared.clear()
            self._run_block()
            if self.shared.copies or self.shared.barriers:
                raise EmulationError(f"{self.program.name} ended with bulk copies or barriers alive")

    def read(self, operand: str, dtype: type) -> np.ndarray:
        """What an operand holds, now and at every later step: an element for each thread, as ``dtype``."""
        if operand == "global_smem":
            return np.full(self.threads, self.shared.START, dtype)
        if parameter := re.fullmatch(r"\w+_param_(\d+)", operand):
            return self._constant(self.arguments[int(parameter.group(1))], dtype)
        if operand.startswith("0f"):
            return self._constant(int(operand[2:], 16), dtype)
        if re.fullmatch(r"-?\d\w*", operand):
            return self._constant(int(operand.rstrip("U"), 0), dtype)
        register = self.register(operand)
        # conversions and stores may name a wider register: its low bits
        return register.view(dtype)[:: max(1, register.itemsize // np.dtype(dtype).itemsize)]

    def _constant(self, value: int, dtype: type) -> np.ndarray:
        """The low bits of an integer, read as ``dtype``."""
        size = np.dtype(dtype).itemsize
        bits = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return np.frombuffer(bits * self.threads, dtype)

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

    def addresses(self, operand: str, dtype: type) -> Callable[[np.ndarray], np.ndarray]:
        """Of given threads, what ``[base + offset]`` is."""
        base, _, offset = operand.strip("[] ").partition("+")
        register, offset = self.read(base.strip(), dtype), dtype(int(offset or 0))
        return lambda threads: register[threads] + offset

    def _prepare(self, op: Instruction) -> Step:
        parts = op.opcode.split(".")
        for length in range(len(parts), 0, -1):
            if prepare := HANDLERS.get(".".join(parts[:length])):
                break
        else:
            raise EmulationError(f"{self.program.name}, line {op.line}: unknown instruction {op.opcode}")
        try:
            return prepare(self, op)
        except (KeyError, ValueError, AttributeError) as error:  # a variant that the function does not know
            text = f"{op.opcode} {', '.join(op.operands)}"
            raise EmulationError(f"{self.program.name}, line {op.line}: unknown form {text}") from error

    def _run_block(self) -> None:
        """Teams in turns, each as far as it gets, the last one first."""
        members = np.arange(self.threads) // self.team
        walks = [Walk(members == team, self.late) for team in range(members[-1], -1, -1)]
        waits = 0  # rounds that ended with no team that could go on
        while walks:
            for self.walk in walks:
                self._run_team(self.walk)
            walks = [walk for walk in walks if walk.held != Held.LEFT]
            if all(walk.held == Held.BARRIER for walk in walks):
                for walk in walks:
                    walk.held = None
            waits = waits + 1 if walks and all(walk.held for walk in walks) else 0
            if waits > _PATIENCE:
                raise EmulationError(f"{self.program.name} waits for ever")

    def _run_team(self, walk: "Walk") -> None:
        if walk.held == Held.BARRIER:
            return
        walk.held = None
        try:
            while walk.held is None:
                op, guard = self.program.instructions[walk.at], self.guards[walk.at]
                self.steps[walk.at](walk.active if guard is None else walk.active & (guard ^ op.negated))
                walk.advance()
        except EmulationError as error:
            line = self.program.instructions[walk.at].line
            raise EmulationError(f"{self.program.name}, line {line}: {error}") from error


class Groups:
    """Asynchronous work in the groups that it was committed in."""

    def __init__(self, late: bool):
        self.late, self.open, self.committed = late, [], []

    def issue(self, work: Callable[[], None]) -> None:
        """Now, or when its group is waited for."""
        if self.late:
            self.open.append(work)
        else:
            work()

    def commit(self) -> None:
        """Close the open group."""
        self.committed.append(self.open)
        self.open = []

    def wait(self, remaining: int) -> None:
        """Until at most ``remaining`` groups are under way."""
        while len(self.committed) > remaining:
            for work in self.committed.pop(0):
                work()

    def under_way(self) -> int:
        """Pieces of work that nobody has waited for."""
        return len(self.open) + sum(map(len, self.committed))


class Held(Enum):
    """Why a team does not go on."""

    BARRIER = 1  # until all teams are there
    WAITS = 2  # for bytes: it asks again when it is its turn
    LEFT = 3  # the program


class Walk:
    """Where the threads of a team are. Those at the earliest instruction go on, the others wait.

    Attributes:
        at: the instruction.
        active: the threads that are there.
        parked: threads that are at other instructions.
        held: why none goes on.
        queues: copies and products under way.
    """

    def __init__(self, threads: np.ndarray, late: bool):
        self.at, self.active = 0, threads
        self.parked: dict[int, np.ndarray] = {}
        self.held: Held | None = None
        self.queues = {"cp": Groups(late), "wgmma": Groups(late)}

    def send(self, threads: np.ndarray, target: int | None) -> None:
        """Active threads to another instruction, or (None) out of the program."""
        self.active = self.active & ~threads
        if target is not None and threads.any():
            self.parked[target] = self.parked.get(target, False) | threads

    def advance(self) -> None:
        """To the next instruction where a thread is."""
        self.at += 1
        if self.parked or not self.active.any():
            if self.active.any():
                self.parked[self.at] = self.parked.get(self.at, False) | self.active
            if not self.parked:
                self.leave()
                return
            self.at = min(self.parked)
            self.active = self.parked.pop(self.at)

    def leave(self) -> None:
        """The last thread is gone; nothing may be under way."""
        self.held = Held.LEFT
        if any(queue.under_way() for queue in self.queues.values()):
            self.at -= 1
            raise EmulationError("ended with copies or products under way")


@instruction("bra")
def branch(machine: Machine, op: Instruction) -> Step:
    """To a label."""
    target = machine.program.labels[op.operands[0]]
    return lambda mask: machine.walk.send(mask, target)


@instruction("ret")
def leave(machine: Machine, op: Instruction) -> Step:
    """Out of the program."""
    return lambda mask: machine.walk.send(mask, None)


@instruction("bar.sync")
def barrier(machine: Machine, op: Instruction) -> Step:
    """Until all threads that have not left are here."""

    def step(mask: np.ndarray) -> None:
        if machine.walk.parked:
            raise EmulationError("a barrier that not all threads of a team have reached")
        machine.walk.held = Held.BARRIER

    return step
