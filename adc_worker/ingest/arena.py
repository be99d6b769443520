"""The one block of memory that decoded pixels live in. Allocating a region is admission: what does not fit waits.

First fit. Backed by a memfd, so that other processes can map it.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import insort
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adc_worker.errors import WorkerFault

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


class Arena:
    """Hands out regions of a fixed number of bytes; safe to use from several threads.

    With `cuda`, torch's CUDA runtime, the block is page-locked: a GPU copies from it by itself. Written, not run.
    """

    def __init__(self, size_bytes: int, cuda: Any = None) -> None:
        self._cuda = cuda
        self._lock = threading.Lock()
        self._used: list[Region] = []  # in order; what lies between them is free
        self._memory: npt.NDArray[np.uint8] | None = None
        self.size_bytes = 0
        self.generation = 0  # rises when the block is replaced, and its descriptor with it
        self.resize(size_bytes)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the block that exist: pages appear when they are first written."""
        with self._lock:
            return 0 if self._memory is None else os.fstat(self.descriptor).st_blocks * _STAT_BLOCK_BYTES

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(region.size_bytes for region in self._used)

    def allocate(self, size_bytes: int) -> Region | None:
        """Take the first gap that holds `size_bytes`; None when there is none."""
        needed, start = _round_up(max(1, size_bytes)), 0
        with self._lock:
            self._mapped()
            for region in (*self._used, Region(self.size_bytes, 0)):
                if region.offset - start >= needed:
                    taken = Region(start, needed)
                    insort(self._used, taken)
                    return taken
                start = region.end
        return None

    def free(self, region: Region) -> None:
        """Give a region back; raises ValueError when it is not in use."""
        with self._lock:
            if region not in self._used:
                raise ValueError(f"{region} is not in use")
            self._used.remove(region)

    def view(self, region: Region, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return the region's first bytes as a writable uint8 array of `shape`."""
        memory = self._mapped()
        count = int(np.prod(shape))
        if count > region.size_bytes:
            raise ValueError(f"{shape} needs {count} bytes, the region has {region.size_bytes}")
        return memory[region.offset : region.offset + count].reshape(shape)

    def resize(self, size_bytes: int) -> None:
        """Replace the block, unless it has that size; only while nothing is allocated."""
        if size_bytes < 1:
            raise ValueError(f"an arena needs at least one byte, not {size_bytes}")
        if self._memory is not None and self.size_bytes == _round_up(size_bytes):
            return
        self.close()
        with self._lock:
            self.generation += 1
            self.size_bytes = _round_up(size_bytes)
            self.descriptor = os.memfd_create("adc-arena", os.MFD_CLOEXEC)  # other processes map it by this
            try:
                os.ftruncate(self.descriptor, self.size_bytes)
                memory = np.frombuffer(mmap.mmap(self.descriptor, self.size_bytes), dtype=np.uint8)
                self._page_lock(memory)
            except BaseException:
                os.close(self.descriptor)
                raise
            self._memory = memory

    def close(self) -> None:
        """Give the memory back to the system. Regions still in use lose their arena, so there must be none."""
        with self._lock:
            if self._used:
                raise ValueError(f"{len(self._used)} regions are still in use")
            if self._memory is not None:
                if self._cuda is not None:
                    self._cuda.cudaHostUnregister(self._memory.ctypes.data)
                os.close(self.descriptor)  # the mapping holds a descriptor of its own
                self._memory = None  # the mapping goes with its last view

    def _page_lock(self, memory: npt.NDArray[np.uint8]) -> None:
        code = int(self._cuda.cudaHostRegister(memory.ctypes.data, memory.size, 0)) if self._cuda is not None else 0
        if code:
            note = "set AMI_ANTENNA_API_DATALOADER_PIN_MEMORY=false"
            raise WorkerFault(f"CUDA cannot page-lock {memory.size} bytes (error {code}): {note}")

    def _mapped(self) -> npt.NDArray[np.uint8]:
        if self._memory is None:
            raise ValueError("the arena is closed")
        return self._memory
