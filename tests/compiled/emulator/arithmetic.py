"""Instructions that compute each thread's result from its own registers."""

from collections.abc import Callable

import numpy as np

from emulator.machine import Machine, Step, instruction
from emulator.program import Instruction

TYPES = {
    "pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32,
    "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers round towards zero."""
    return a / b if a.dtype == np.float32 else (a // b) + ((a % b != 0) & ((a < 0) ^ (b < 0)))


# All operands and the result are of the type that the opcode ends in.
_SAME_TYPE = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "fma": _fma,
    "mad.lo": lambda a, b, c: a * b + c, "neg": np.negative, "abs": np.abs, "min": np.minimum,
    "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "div": _divide, "rem": np.fmod, "ex2": np.exp2, "sqrt": np.sqrt, "rcp": np.reciprocal, "mov": np.copy,
    "cvta.param": np.copy,
}  # fmt: skip
_ROUNDING = {"rn", "approx", "full", "ftz"}  # how exact a result is: here always as NumPy makes it


def _step(machine: Machine, op: Instruction, function: Callable, result: str, *operands: str) -> Step:
    """``result`` and ``operands`` are types."""
    target = machine.write(op.operands[0], TYPES[result])
    sources = [machine.read(name, TYPES[kind]) for name, kind in zip(op.operands[1:], operands, strict=True)]

    def step(mask: np.ndarray) -> None:
        with np.errstate(all="ignore"):
            value = function(*sources)
        np.copyto(target, value, where=mask, casting="unsafe")

    return step


@instruction(*_SAME_TYPE)
def same_type(machine: Machine, op: Instruction) -> Step:
    *name, kind = (part for part in op.opcode.split(".") if part not in _ROUNDING)
    if name == ["mov"] and "{" in "".join(op.operands):
        return _pack(machine, op, kind)
    return _step(machine, op, _SAME_TYPE[".".join(name)], kind, *[kind] * (len(op.operands) - 1))


def _pack(machine: Machine, op: Instruction, kind: str) -> Step:
    """``mov.b32 d, {lo, hi}`` and ``mov.b32 {lo, hi}, a``; the parts lie in memory as in the register."""
    target, source = op.operands
    parts = machine.vector(target if target[0] == "{" else source)
    part = TYPES[f"b{int(kind[1:]) // len(parts)}"]
    if target[0] == "{":
        whole = machine.read(source, TYPES[kind])
        targets = [machine.write(name, part) for name in parts]

        def step(mask: np.ndarray) -> None:
            pieces = np.ascontiguousarray(whole).view(part).reshape(machine.threads, -1)
            for index, register in enumerate(targets):
                np.copyto(register, pieces[:, index], where=mask)

        return step
    register, sources = machine.write(target, TYPES[kind]), [machine.read(name, part) for name in parts]

    def step(mask: np.ndarray) -> None:
        pieces = np.stack(sources, axis=1)
        np.copyto(register, np.ascontiguousarray(pieces).view(TYPES[kind])[:, 0], where=mask)

    return step


@instruction("mul.wide", "mad.wide")
def wide(machine: Machine, op: Instruction) -> Step:
    kind = op.opcode.rpartition(".")[2]
    result = _WIDE[kind]

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray | int = 0) -> np.ndarray:
        return a.astype(TYPES[result]) * b.astype(TYPES[result]) + c

    return _step(machine, op, function, result, kind, kind, *[result] * (len(op.operands) - 3))


@instruction("mul.hi")
def high_half(machine: Machine, op: Instruction) -> Step:
    kind = op.opcode.rpartition(".")[2]
    big = TYPES[_WIDE[kind]]
    return _step(machine, op, lambda a, b: (a.astype(big) * b.astype(big)) >> big(32), kind, kind, kind)


@instruction("shl", "shr")
def shift(machine: Machine, op: Instruction) -> Step:
    name, _, kind = op.opcode.partition(".")
    dtype, most = TYPES[kind], 8 * np.dtype(TYPES[kind]).itemsize - 1
    move = np.left_shift if name == "shl" else np.right_shift

    def function(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        moved = move(a, np.minimum(by, most).astype(dtype))
        return moved if np.issubdtype(dtype, np.signedinteger) else np.where(by > most, dtype(0), moved)

    return _step(machine, op, function, kind, kind, "u32")


@instruction("setp")
def compare(machine: Machine, op: Instruction) -> Step:
    """Of NaN an ordered comparison is false, an unordered one (``ltu``) true; ``nan``: whether one is."""
    _, comparison, kind = (part for part in op.opcode.split(".") if part != "ftz")
    return _step(machine, op, comparing(comparison, TYPES[kind] == np.float32), "pred", kind, kind)


def comparing(comparison: str, floats: bool) -> Callable:
    """NumPy's comparisons of floats are ordered, but for "not equal"."""
    if comparison in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (comparison == "nan")
    if floats and comparison == "ne":
        return lambda a, b: np.not_equal(a, b) & (a == a) & (b == b)
    if comparison in _COMPARE:
        return _COMPARE[comparison]
    opposite = _OPPOSITE[comparison.removesuffix("u")]
    return lambda a, b: ~comparing(opposite, floats)(a, b)


@instruction("selp")
def select(machine: Machine, op: Instruction) -> Step:
    kind = op.opcode.partition(".")[2]
    return _step(machine, op, lambda a, b, p: np.where(p, a, b), kind, kind, kind, "pred")


@instruction("bfe")
def extract_bits(machine: Machine, op: Instruction) -> Step:
    """A field that lies inside the register."""
    kind = op.opcode.partition(".")[2]

    def function(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        up = np.uint32(32) - start - length
        return (a.view(np.uint32) << up).view(TYPES[kind]) >> (start + up).astype(TYPES[kind])

    return _step(machine, op, function, kind, kind, "u32", "u32")


@instruction("bfi.b32")
def insert_bits(machine: Machine, op: Instruction) -> Step:
    def function(a: np.ndarray, into: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        field = ((np.uint32(1) << length) - np.uint32(1)) << start
        return (into & ~field) | ((a << start) & field)

    return _step(machine, op, function, "b32", "b32", "b32", "u32", "u32")


@instruction("prmt.b32")
def permute_bytes(machine: Machine, op: Instruction) -> Step:
    def function(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.uint32(0)
        for index in range(4):
            choice = (selector >> np.uint32(4 * index)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))).astype(np.uint32)
            byte = byte & np.uint32(255)
            byte = np.where(choice & np.uint32(8), np.where(byte & np.uint32(128), 255, 0), byte)
            result = result | (byte.astype(np.uint32) << np.uint32(8 * index))
        return result

    return _step(machine, op, function, "b32", "b32", "b32", "b32")


def float_of(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns as fp32; ``kind`` is ``"f16"`` or ``"bf16"``."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bits_of(value: np.ndarray, kind: str) -> np.ndarray:
    """fp32 as 16-bit patterns, rounded to the nearest, ties to even."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


@instruction("cvt")
def convert(machine: Machine, op: Instruction) -> Step:
    result, source = (part for part in op.opcode.split(".")[1:] if part != "rn")
    if source in ("f16", "bf16"):
        return _step(machine, op, lambda a: float_of(a, source), result, "b16")
    if result in ("f16", "bf16"):
        return _step(machine, op, lambda a: bits_of(a, result), "b16", source)
    if result.endswith("x2"):  # the first operand is the upper half
        kind = result.removesuffix("x2")

        def both(high: np.ndarray, low: np.ndarray) -> np.ndarray:
            return (bits_of(high, kind).astype(np.uint32) << np.uint32(16)) | bits_of(low, kind)

        return _step(machine, op, both, "b32", source, source)
    if source in ("s8", "u8"):  # the low byte of a 16-bit register
        narrow = np.int8 if source == "s8" else np.uint8
        return _step(machine, op, lambda a: a.astype(narrow).astype(TYPES[result]), result, "b16")
    return _step(machine, op, lambda a: a.astype(TYPES[result]), result, source)


@instruction("ld.param")
def parameter(machine: Machine, op: Instruction) -> Step:
    """A signed one fills a wider register with its sign."""
    kind = op.opcode.rpartition(".")[2]
    target, value = machine.register(op.operands[0]), machine.read(op.operands[1][1:-1], TYPES[kind])
    return lambda mask: np.copyto(target, value.astype(target.dtype), where=mask)
