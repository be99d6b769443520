"""Calls of a model: as many items as the device holds, the next ones copied meanwhile, and the time it takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Self, TypeVar

import torch

from adc_worker.errors import DeviceMemoryShort, ImageTooLarge
from adc_worker.log import get_logger

_log = get_logger(__name__)
_T = TypeVar("_T")

ModelAndShape = tuple[str, tuple[int, ...]]  # an algorithm's key and the shape of one item


# Chosen: so long a batch waits for memory of the GPU that other programs hold. It is short, because the images behind
# it wait as long; an image that finds no memory is tried again later.
PATIENCE_S = 2.0
_LOOK_S = 1.0
# What this process takes of a GPU beside torch's allocator: CUDA's context and the libraries' workspaces. Chosen.
_OWN_CONTEXT_BYTES = 1 << 30


@dataclass(slots=True)
class DeviceNeighbours:
    """Other programs on a device, for whose memory one batch waits; `held_bytes` tells how much that is."""

    held_bytes: Callable[[], int]
    pause: Callable[[float], None] = time.sleep
    left_s: float = field(default=PATIENCE_S)

    @classmethod
    def on(cls, device: torch.device) -> Self:
        return cls(partial(_held_by_others, device))

    def wait(self) -> bool:
        """Let a moment pass; False when the batch has waited long enough."""
        if self.left_s <= 0:
            return False
        if self.left_s == PATIENCE_S:
            held_mb = self.held_bytes() / 1e6
            note = (
                f"other programs hold {held_mb:.0f} MB of this GPU: the batch waits {PATIENCE_S:.0f} s for it, then"
                " its image is tried again later and others go on; stop them, or give this worker a GPU of its own"
            )
            _log.warning("waiting_for_gpu_memory", note=note)
        self.left_s -= _LOOK_S
        self.pause(_LOOK_S)
        return True


def _held_by_others(device: torch.device) -> int:
    """Return the memory of a GPU that other processes hold; 0 elsewhere. Written, not run."""
    if device.type != "cuda":
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    ours_bytes = torch.cuda.memory_reserved(device) + _OWN_CONTEXT_BYTES
    return max(0, total_bytes - free_bytes - ours_bytes)


def in_chunks(
    call: Callable[[int, int], Sequence[_T]],
    count: int,
    most: int,
    learnt: dict[ModelAndShape, int],
    of: ModelAndShape,
    relieve: Callable[[], bool],
    neighbours: DeviceNeighbours,
) -> Iterator[_T | ImageTooLarge | DeviceMemoryShort]:
    """Yield an answer for each of `count` items from calls with (start, stop) of at most `most` items.

    Out of memory, `relieve` may free what others hold; when it has nothing, the call is halved and both halves are
    done again. `learnt` remembers the size that went well. One item that is too much alone waits for what other
    programs hold of the device, and is answered with an error: its own only where nobody else held any.
    """
    start = 0
    while start < count:
        stop = min(count, start + min(most, learnt.get(of, most)))
        answers, complaint = _attempt(call, start, stop)
        if answers is not None:
            yield from answers
            answers, start = None, stop  # the next call needs the memory
            continue
        freed = relieve()
        _free_cached_memory()
        if freed:
            continue
        if stop - start > 1:
            learnt[of] = (stop - start) // 2
            _log.warning("out_of_memory", model=of[0], shape=of[1], items=stop - start, now=learnt[of], error=complaint)
        elif neighbours.held_bytes() == 0:
            yield ImageTooLarge(f"{of[0]} runs out of memory on this image even alone: {complaint}")
            start = stop
        elif not neighbours.wait():
            yield DeviceMemoryShort(f"{of[0]} runs out of memory that other programs on this GPU hold: {complaint}")
            start = stop


def _attempt(
    call: Callable[[int, int], Sequence[_T]], start: int, stop: int
) -> tuple[Sequence[_T], None] | tuple[None, str]:
    """Return the answers, or what torch says of its lack of memory.

    The handler is left before anything is freed: inside it the error's traceback keeps every tensor of the call alive.
    """
    try:
        return call(start, stop), None
    except torch.OutOfMemoryError as error:
        return None, str(error).partition(". GPU")[0][:200]


def _free_cached_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


class DeviceClock:
    """Seconds that calls kept a device busy: by CUDA events there (written, not run), by the wall elsewhere."""

    def __init__(self) -> None:
        self.total_s = 0.0

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what happens inside; it ends with its answers on the CPU."""
        if device.type != "cuda":
            started = time.perf_counter()
            yield
            self.total_s += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        end.synchronize()
        self.total_s += begin.elapsed_time(end) / 1000


class PeakVram:
    """Measures how far the memory that tensors take on a GPU rises; 0 elsewhere. Written, not run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start_bytes = torch.cuda.memory_allocated(self._device)

    def growth_bytes(self) -> int:
        if self._device is None:
            return 0
        return max(0, torch.cuda.max_memory_allocated(self._device) - self._start_bytes)


_Copy = tuple[tuple[int, int], torch.Tensor, torch.cuda.Event]  # which images, on the device, and when they are there


class Upload:
    """Hands out a batch, uint8 [n, H, W, 3], on the device, as uint8 [k, 3, H, W]; the permutation is a view.

    From page-locked memory CUDA copies the next chunk on a stream of its own while this one is inferred; a copy from
    other memory would hold up its caller. At the end of `with` no copy reads the batch any more. Written, not run.
    """

    def __init__(self, images: torch.Tensor, device: torch.device) -> None:
        self._images = images
        self._device = device
        self._copies = _copy_stream(device) if device.type == "cuda" and images.is_pinned() else None
        self._ahead: _Copy | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._copies is not None:
            self._copies.synchronize()

    def take(self, start: int, stop: int) -> torch.Tensor:
        if self._copies is None:
            return self._images[start:stop].to(self._device).permute(0, 3, 1, 2)
        if self._ahead is None or self._ahead[0] != (start, stop):
            self._ahead = None  # it was halved since: its memory goes first
            self._ahead = self._copy(start, stop, self._copies)
        (_, images, arrived), self._ahead = self._ahead, None
        inference = torch.cuda.current_stream(self._device)
        inference.wait_event(arrived)
        images.record_stream(inference)  # the allocator must not reuse it before inference is done with it
        if stop - start > 1 and stop < len(self._images):  # not ahead of single images: memory may be short
            self._ahead = self._copy(stop, min(len(self._images), 2 * stop - start), self._copies)
        return images.permute(0, 3, 1, 2)

    def _copy(self, start: int, stop: int, stream: torch.cuda.Stream) -> _Copy:
        with torch.cuda.stream(stream):
            images = self._images[start:stop].to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(stream)
        return (start, stop), images, arrived


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the same stream for every batch: torch keeps the freed memory of each stream for that stream alone."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
