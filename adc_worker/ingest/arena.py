"""The one block of memory that decoded pixels live in. Allocating a region is admission: what does not fit waits.

First fit with coalescing. Backed by a memfd, so that other processes can map it.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import insort
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

PAGE_BYTES = mmap.PAGESIZE
_STAT_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A page-aligned stretch of the arena."""

    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


class PageLocker(Protocol):
    """Page-locks a block of memory, so that a GPU can copy from it by itself."""

    def lock(self, address: int, size_bytes: int) -> None: ...

    def unlock(self, address: int) -> None: ...


class _Block:
    """One mapping of a memfd. Views keep it alive; it goes with the last of them."""

    def __init__(self, size_bytes: int, locker: PageLocker | None) -> None:
        self._locker = locker
        self.descriptor = os.memfd_create("adc-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, size_bytes)
            self.memory: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(self.descriptor, size_bytes), dtype=np.uint8)
            if locker is not None:
                locker.lock(self.memory.ctypes.data, size_bytes)
        except BaseException:
            os.close(self.descriptor)
            raise

    def close(self) -> None:
        if self._locker is not None:
            self._locker.unlock(self.memory.ctypes.data)
        os.close(self.descriptor)  # the mapping holds a descriptor of its own


class Arena:
    """Hands out regions of a fixed number of bytes; safe to use from several threads."""

    def __init__(self, size_bytes: int, locker: PageLocker | None = None) -> None:
        self._locker = locker
        self._lock = threading.Lock()
        self._size_bytes = 0
        self._block: _Block | None = None
        self._free: list[Region] = []
        self._used: set[Region] = set()
        self.generation = 0  # rises when the block is replaced, and its descriptor with it
        self.resize(size_bytes)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def descriptor(self) -> int:
        """The memfd of the current block, for processes that map it, too."""
        return self._mapped().descriptor

    @property
    def resident_bytes(self) -> int:
        """Bytes of the block that exist: pages appear when they are first written."""
        with self._lock:
            return 0 if self._block is None else os.fstat(self._block.descriptor).st_blocks * _STAT_BLOCK_BYTES

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(region.size_bytes for region in self._used)

    def allocate(self, size_bytes: int) -> Region | None:
        """Take the first gap that holds `size_bytes`; None when there is none."""
        needed = _round_up(max(1, size_bytes))
        with self._lock:
            self._mapped()
            for index, gap in enumerate(self._free):
                if gap.size_bytes >= needed:
                    region = Region(gap.offset, needed)
                    rest = Region(gap.offset + needed, gap.size_bytes - needed)
                    self._free[index : index + 1] = [rest] if rest.size_bytes else []
                    self._used.add(region)
                    return region
        return None

    def free(self, region: Region) -> None:
        """Give a region back and merge it with its neighbours; raises ValueError when it is not in use."""
        with self._lock:
            if region not in self._used:
                raise ValueError(f"{region} is not in use")
            self._used.remove(region)
            insort(self._free, region)
            self._free = _coalesced(self._free)

    def view(self, region: Region, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return the region's first bytes as a writable uint8 array of `shape`."""
        block = self._mapped()
        count = int(np.prod(shape))
        if count > region.size_bytes:
            raise ValueError(f"{shape} needs {count} bytes, the region has {region.size_bytes}")
        return block.memory[region.offset : region.offset + count].reshape(shape)

    def resize(self, size_bytes: int) -> None:
        """Replace the block by one of another size; only while nothing is allocated."""
        if size_bytes < 1:
            raise ValueError(f"an arena needs at least one byte, not {size_bytes}")
        with self._lock:
            if self._used:
                raise ValueError(f"{len(self._used)} regions are in use")
            self._unmap()
            self.generation += 1
            self._size_bytes = _round_up(size_bytes)
            self._block = _Block(self._size_bytes, self._locker)
            self._free = [Region(0, self._size_bytes)]

    def close(self) -> None:
        """Give the memory back to the system. Regions still in use lose their arena, so there must be none."""
        with self._lock:
            if self._used:
                raise ValueError(f"{len(self._used)} regions are still in use")
            self._unmap()

    def _unmap(self) -> None:
        if self._block is not None:
            self._block.close()
            self._block = None  # the mapping goes with its last view

    def _mapped(self) -> _Block:
        if self._block is None:
            raise ValueError("the arena is closed")
        return self._block


def _coalesced(gaps: list[Region]) -> list[Region]:
    merged = gaps[:1]
    for gap in gaps[1:]:
        last = merged[-1]
        if last.end == gap.offset:
            merged[-1] = Region(last.offset, last.size_bytes + gap.size_bytes)
        else:
            merged.append(gap)
    return merged
