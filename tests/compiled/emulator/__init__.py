"""Compiled kernels without a card: PTX, instruction by instruction, in NumPy.

Triton's interpreter cannot show whether the code that the *compiler* makes is right: layouts, swizzled shared
memory, matrix instructions and their descriptors, bulk copies, barriers, software pipelines. This runs that
code. A thread block, or a warp after the other, is one vector of threads that goes through the program
together; threads that branch apart wait for each other at the earliest instruction. Times mean nothing here.

Source of every semantics: NVIDIA, "PTX ISA", section of the instruction's name.
"""

from emulator.launch import emulate
from emulator.memory import EmulationError

__all__ = ["EmulationError", "emulate"]
