"""A recorded launch, compiled for a chip and run here."""

import struct
from collections.abc import Callable

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from emulator import access, products  # noqa: F401  (they register their instructions)
from emulator.asynchronous import TensorMap
from emulator.machine import Machine
from emulator.memory import EmulationError, Global
from emulator.program import Program
from qar_kernels.triton.machine_code import SHARED_LIMIT, compile_launch
from qar_kernels.triton.runner import Recorded


def emulate(
    recorded: Recorded,
    arch: str,
    late: bool = False,
    apart: bool = False,
    edit: Callable[[str], str] | None = None,
) -> Machine:
    """Run it on its tensors; returns the machine, with what it has counted.

    Args:
        recorded: the launch.
        arch: such as ``"sm_90"``.
        late: asynchronous copies and products happen when they are waited for, else when they are issued.
        apart: warps (``wgmma``'s groups of four, where there are such) run one after the other, the last one
            first, each until it must wait for the others; else all threads go in step.
        edit: changes the code first, to see that a fault is seen.

    Raises:
        EmulationError: an address outside the tensors, a misaligned access, a barrier that never opens.
    """
    compiled = compile_launch(recorded, arch)
    if compiled.metadata.shared > SHARED_LIMIT[arch]:
        raise EmulationError(
            f"{compiled.metadata.shared} bytes of shared memory, {arch} has {SHARED_LIMIT[arch]}"
        )
    ptx = compiled.asm["ptx"]
    program = Program.parse(edit(ptx) if edit else ptx)
    team = (128 if "wgmma" in ptx else 32) if apart else program.threads
    boxes = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    arguments, tensors, maps = [], [], []
    for argument in recorded.args:
        if isinstance(argument, TensorDescriptor):
            arguments += [len(maps), *argument.shape, *argument.strides]
            maps.append(_map(argument, next(boxes)))
        elif isinstance(argument, Tensor):
            arguments.append(argument.data_ptr())
            tensors.append(argument)
        elif isinstance(argument, float):
            arguments += struct.unpack("<I", struct.pack("<f", argument))
        else:
            arguments.append(argument)
    arguments += [0] * (len(program.parameters) - len(arguments))  # scratch memory, which nobody uses
    memory = Global()
    memory.add(tensors)
    machine = Machine(program, compiled.metadata.shared, arguments, memory, maps, late, team)
    machine.run(recorded.grid)
    return machine


def _map(descriptor: TensorDescriptor, box: dict) -> TensorMap:
    base = descriptor.base
    elements = base.view(torch.int16 if base.element_size() == 2 else torch.int32).numpy()
    return TensorMap(elements, tuple(box["block_size"]), box["swizzle"])
