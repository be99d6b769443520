"""Calls of a model: as many items as the device holds, the next ones copied meanwhile, and the time it takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Self, TypeVar

import torch

from adc_worker.errors import ImageTooLarge
from adc_worker.log import get_logger

_log = get_logger(__name__)
_T = TypeVar("_T")

ModelAndShape = tuple[str, tuple[int, ...]]  # an algorithm's key and the shape of one item


def in_chunks(
    call: Callable[[int, int], Sequence[_T]],
    count: int,
    most: int,
    learnt: dict[ModelAndShape, int],
    of: ModelAndShape,
    relieve: Callable[[], bool],
) -> Iterator[_T | ImageTooLarge]:
    """Yield an answer for each of `count` items from calls with (start, stop) of at most `most` items.

    Out of memory, `relieve` may free what others hold; when it has nothing, the call is halved and both halves are
    done again. `learnt` remembers the size that went well. One item that is too much alone is answered with an error.
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
        else:
            yield ImageTooLarge(f"{of[0]} runs out of memory on this image even alone: {complaint}")
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
