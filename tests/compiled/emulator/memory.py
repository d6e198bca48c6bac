"""Global and shared memory: which bytes exist, and how many transactions a warp's access takes."""

import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch

_WARP = 32
_SECTOR = 32  # bytes that global memory moves at least
_BANKS = 32  # of shared memory, 4 bytes wide


@dataclass
class Traffic:
    """Transactions that a warp's accesses took, and the least that their bytes need."""

    taken: int = 0
    needed: int = 0

    def add(self, taken: int, needed: int) -> None:
        """One instruction's."""
        self.taken += taken
        self.needed += needed


class EmulationError(Exception):
    """The program did what a card would not survive, or what is not known here."""


@dataclass
class Global:
    """The bytes of a launch's tensors, by their own addresses; nothing else exists."""

    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    arrays: list[np.ndarray] = field(default_factory=list)

    def add(self, tensors: list[torch.Tensor]) -> None:
        """Make memory of tensors; those that overlap are one piece."""
        ends: dict[int, int] = {}
        for start, end in sorted((t.data_ptr(), _end(t)) for t in tensors if t.numel()):
            previous = next(reversed(ends), None)
            if previous is not None and start < ends[previous]:
                ends[previous] = max(end, ends[previous])
            else:
                ends[start] = end
        self.starts = np.array(list(ends), np.uint64)
        self.arrays = [
            np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
            for start, end in ends.items()
        ]

    def where(self, addresses: np.ndarray, width: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each tensor that is met: its bytes, which of ``addresses``, and their (n, width) indices."""
        owners = np.searchsorted(self.starts, addresses, side="right") - 1
        found = []
        for owner in np.unique(owners):
            mine = np.flatnonzero(owners == owner)
            first = (addresses[mine] - self.starts[max(owner, 0)]).astype(np.int64)
            if owner < 0 or first.max() + width > self.arrays[owner].size:
                raise EmulationError(f"global address {int(addresses[mine][-1]):#x} is in no tensor")
            found.append((self.arrays[owner], mine, first[:, None] + np.arange(width)))
        return found

    def read(self, threads: np.ndarray, addresses: np.ndarray, width: int) -> np.ndarray:
        """(n, width) bytes, an aligned access of each thread."""
        check_aligned(addresses, width)
        self.loads.add(*sectors(threads, addresses, width))
        result = np.empty((len(addresses), width), np.uint8)
        for bytes_, mine, index in self.where(addresses, width):
            result[mine] = bytes_[index]
        return result

    def store(self, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """``values`` (n, width) bytes, an aligned access of each thread."""
        width = values.shape[1]
        check_aligned(addresses, width)
        self.stores.add(*sectors(threads, addresses, width))
        for bytes_, mine, index in self.where(addresses, width):
            bytes_[index] = values[mine]


def _end(tensor: torch.Tensor) -> int:
    """The address behind a tensor's last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


class Shared:
    """Shared memory of a block, what lies in it before it is written being all ones (NaN)."""

    START = 1024  # the driver keeps the first KiB on sm_90; swizzles need an aligned start

    def __init__(self, size: int):
        self.bytes = np.empty(size, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.copies: list = []  # asynchronous copies that have not happened yet
        self.traffic = Traffic()

    def clear(self) -> None:
        """As a new block finds it."""
        self.bytes.fill(0xFF)

    def read(self, threads: np.ndarray, addresses: np.ndarray, width: int) -> np.ndarray:
        """(n, width) bytes, an aligned access of each thread."""
        check_aligned(addresses, width)
        self.traffic.add(*wavefronts(threads, addresses, width))
        return self.bytes[self.index(addresses, width)]

    def store(self, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """``values`` (n, width) bytes, an aligned access of each thread."""
        check_aligned(addresses, values.shape[1])
        self.traffic.add(*wavefronts(threads, addresses, values.shape[1]))
        self.bytes[self.index(addresses, values.shape[1])] = values

    def index(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """(n, width) positions of ``width`` bytes from each address."""
        first = addresses.astype(np.int64) - self.START
        if first.size and (first.min() < 0 or first.max() + width > self.bytes.size):
            raise EmulationError(f"shared address {int(addresses.max())} beyond {self.bytes.size} bytes")
        return first[..., None] + np.arange(width)


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def complete(self) -> None:
        """Begin the next phase where nothing is waited for."""
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = 1 - self.phase, self.count


def check_aligned(addresses: np.ndarray, width: int) -> None:
    """An access of ``width`` bytes starts at a multiple of it."""
    if (addresses % addresses.dtype.type(width)).any():
        raise EmulationError(f"an access of {width} bytes that is not aligned")


def sectors(threads: np.ndarray, addresses: np.ndarray, width: int) -> tuple[int, int]:
    """Sectors that an aligned access touches, and the least for its bytes, summed over its warps."""
    warps = (threads // _WARP).astype(np.uint64) << np.uint64(56)
    different = np.unique(warps | addresses)
    per_warp = np.bincount((different >> np.uint64(56)).astype(np.int64))
    return len(np.unique(different // np.uint64(_SECTOR))), int(np.sum(-(-per_warp * width // _SECTOR)))


def wavefronts(threads: np.ndarray, addresses: np.ndarray, width: int) -> tuple[int, int]:
    """Passes over the banks that an access takes, and the least for its bytes, summed over its warps.

    Wide accesses go in phases of as many threads as 128 bytes are for.
    """
    words = max(1, width // 4)
    phases = (threads // (_BANKS // words)).astype(np.int64) << 32
    different = np.unique((phases | addresses // 4)[:, None] + np.arange(words))
    place = (different >> 32) * _BANKS + different % _BANKS
    per_bank = np.bincount(place, minlength=(int(different[-1] >> 32) + 1) * _BANKS).reshape(-1, _BANKS)
    return int(per_bank.max(1).sum()), int(np.sum(-(-per_bank.sum(1) // _BANKS)))
