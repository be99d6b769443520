"""Forms batches of staged images, admits them to the arena, and has them decoded ahead of the GPU.

Only this thread ever waits for memory; whoever asks for a batch waits for a ready one and for nothing else.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch

from adc_worker.errors import ImageError, ImageTooLarge
from adc_worker.ingest.arena import Arena, Region
from adc_worker.ingest.decode import DecodeEngine, DecodeReport
from adc_worker.ingest.header import ImageHeader
from adc_worker.ingest.staged_queue import StagedQueue
from adc_worker.ingest.staging import StagedImage
from adc_worker.tuning.plan import IngestPlan

_Shape = tuple[int, int, int]
_Kind = tuple[_Shape, bool]  # what may share a batch: images of one shape, none of which runs alone


@dataclass(slots=True)
class DecodedBatch:
    """Decoded images of one shape, in the arena. Free it, by `with`, before asking for the next one.

    Attributes:
        images: uint8 [n, height, width, 3], a view of the arena.
        staged: what row i was decoded from.
        reports: what its decode took.
    """

    images: torch.Tensor
    staged: list[StagedImage]
    reports: list[DecodeReport]
    release: Callable[[], None]

    def pin_memory(self) -> DecodedBatch:
        """Return itself: a pinned plan registers the whole arena once, so that no batch is copied to be pinned."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.images = torch.empty(0, dtype=torch.uint8)  # a view that outlived its region would show another batch
        self.release()


@dataclass(slots=True, eq=False)
class _Decoding:
    """A batch between admission and readiness."""

    region: Region
    shape: _Shape
    staged: list[StagedImage]
    left: int  # images
    decodes: list[Future[DecodeReport]] = field(default_factory=list)


class BatchFeeder:
    """Runs the feeder thread. Iterate over it once to get the job's batches."""

    def __init__(
        self,
        plan: IngestPlan,
        source: StagedQueue,
        arena: Arena,
        engine: DecodeEngine,
        on_failure: Callable[[StagedImage, ImageError], None],
        on_admit: Callable[[Sequence[StagedImage]], None],
        isolate: Callable[[], DecodeEngine],
    ) -> None:
        self._plan = plan
        self._source = source
        self._arena = arena
        self._engine = engine
        self._on_failure = on_failure
        self._on_admit = on_admit
        self._isolate = isolate
        self._isolated: DecodeEngine | None = None  # decodes suspects
        self._changed = threading.Condition()
        self._waiting: dict[_Kind, list[StagedImage]] = {}  # each in the order of staging
        self._ready: deque[DecodedBatch] = deque()
        self._decoding: set[_Decoding] = set()
        self._in_arena: set[Region] = set()
        self._source_ended = False
        self._paused = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._ended = False
        self._resized = False  # for an image that runs alone
        self.last_ready = True  # whether the batch taken last did not have to be waited for
        source.listen(self._wake)
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[DecodedBatch]:
        while (batch := self._next_ready()) is not None:
            yield batch
            del batch  # or its region's view would live until the next one is ready

    @property
    def decode_pids(self) -> list[int]:
        return [*self._engine.pids, *(self._isolated.pids if self._isolated is not None else ())]

    def pause(self, paused: bool) -> None:
        """Admit one image at a time and only when nothing else is in the arena, or as the plan says again."""
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    def apply(self, plan: IngestPlan) -> None:
        """Form the next batches by another plan; its arena and decode workers must be those of the first."""
        with self._changed:
            self._plan = plan
            self._changed.notify_all()

    def stop(self) -> None:
        """Admit nothing more; what is admitted still comes out."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, end the thread and the decoders, free what nobody took, and give back what was not admitted."""
        self.stop()
        self._source.listen(None)
        self._thread.join()
        self._engine.close()
        if self._isolated is not None:
            self._isolated.close()
        with self._changed:
            self._ready.clear()
            for region in tuple(self._in_arena):
                self._release(region)
            waiting = sorted((image for images in self._waiting.values() for image in images), key=_staged_at)
            self._waiting.clear()
        self._source.put_back(waiting)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _next_ready(self) -> DecodedBatch | None:
        with self._changed:
            at_once = bool(self._ready)
            while not self._ready and not self._ended and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            if not self._ready:
                return None
            self.last_ready = at_once
            self._changed.notify_all()
            return self._ready.popleft()

    def _run(self) -> None:
        try:
            while (images := self._next_images()) is not None:
                if wanted := [image for image in images if self._source.still_wanted(image)]:
                    self._admit(wanted)
        except BaseException as error:  # noqa: BLE001 (handed to the consumer, who raises it)
            self._fail(error)
        with self._changed:
            while self._failure is None and self._decoding:
                self._changed.wait()
            self._ended = True
            self._changed.notify_all()

    def _next_images(self) -> list[StagedImage] | None:
        """Wait until a batch may close and has a place ahead of the GPU; None when there is nothing more to admit."""
        with self._changed:
            while not self._stopping and self._failure is None:
                self._take_staged()
                if self._source_ended and not self._waiting:
                    return None
                kind = self._closable_kind() if self._may_admit() else None
                if kind is not None:
                    return self._close_batch(kind)
                self._changed.wait(self._seconds_to_next_close())
        return None

    def _may_admit(self) -> bool:
        if self._paused:
            return not self._in_arena
        return len(self._decoding) + len(self._ready) <= self._plan.prefetch_factor

    def _take_staged(self) -> None:
        images, self._source_ended = self._source.take_all()
        for image in images:
            self._put_waiting(image)

    def _put_waiting(self, image: StagedImage) -> None:
        kind = (image.header.shape, self._runs_alone(image))
        insort(self._waiting.setdefault(kind, []), image, key=_staged_at)

    def _closable_kind(self) -> _Kind | None:
        """Return the kind whose oldest image waited longest, among those whose batch may close now."""
        now = time.monotonic()
        idle = sum(batch.left for batch in self._decoding) < self._engine.workers
        closable = [
            (images[0].staged_at, kind)
            for kind, images in self._waiting.items()
            if idle
            or self._source_ended
            or len(images) >= self._images_per_batch(images[0])
            or now - images[0].staged_at >= self._plan.batch_wait_s
        ]
        return min(closable)[1] if closable else None

    def _seconds_to_next_close(self) -> float | None:
        if not self._waiting or not self._may_admit():
            return None
        oldest = min(images[0].staged_at for images in self._waiting.values())
        return max(0.0, oldest + self._plan.batch_wait_s - time.monotonic())

    def _runs_alone(self, image: StagedImage) -> bool:
        header, plan = image.header, self._plan
        return image.suspect or header.pixel_bytes > plan.arena_bytes or header.scratch_bytes > plan.scratch_bytes

    def _images_per_batch(self, image: StagedImage) -> int:
        if self._paused or self._runs_alone(image):
            return 1
        return min(self._plan.batch_size, max(1, self._plan.batch_bytes // image.header.pixel_bytes))

    def _close_batch(self, kind: _Kind) -> list[StagedImage]:
        waiting = self._waiting.pop(kind)
        count = self._images_per_batch(waiting[0])
        if waiting[count:]:
            self._waiting[kind] = waiting[count:]
        return waiting[:count]

    def _admit(self, images: list[StagedImage]) -> None:
        """Allocate the batch's region, waiting for memory if need be, and start its decodes."""
        needed = self._bytes_needed(images[0].header)
        if needed > self._plan.solo_bytes:
            for image in images:
                self._on_failure(
                    image,
                    ImageTooLarge(
                        f"decoding it needs {needed} bytes; this worker has {self._plan.solo_bytes} for one image"
                    ),
                )
            return
        region = self._allocate(images)
        if region is None:
            for image in images:
                self._put_waiting(image)
            return
        image_bytes = images[0].header.pixel_bytes
        batch = _Decoding(region, images[0].header.shape, images, len(images))
        with self._changed:
            self._decoding.add(batch)
        self._on_admit(images)
        engine = self._engine_for(images[0])
        for row, image in enumerate(images):
            target = Region(region.offset + row * image_bytes, image_bytes)
            batch.decodes.append(engine.submit(image.path, image.header, target))
            batch.decodes[-1].add_done_callback(partial(self._on_decoded, batch))

    def _engine_for(self, image: StagedImage) -> DecodeEngine:
        if not image.suspect:
            return self._engine
        self._isolated = self._isolated or self._isolate()
        return self._isolated

    def _bytes_needed(self, header: ImageHeader) -> int:
        """Return what the image needs alone: its pixels, and what its decoder uses beyond the plan's scratch."""
        return header.pixel_bytes + max(0, header.scratch_bytes - self._plan.scratch_bytes)

    def _allocate(self, images: list[StagedImage]) -> Region | None:
        header = images[0].header
        runs_alone = self._runs_alone(images[0])
        with self._changed:
            while not self._stopping:
                region = None if runs_alone else self._arena.allocate(header.pixel_bytes * len(images))
                if region is None and not self._in_arena:
                    region = self._make_room(images, runs_alone=runs_alone)
                if region is not None:
                    self._in_arena.add(region)
                    return region
                self._changed.wait()
        return None

    def _make_room(self, images: list[StagedImage], *, runs_alone: bool) -> Region | None:
        """Nothing is in flight: one image is always admitted, whatever its size.

        One that exceeds the arena, or whose decoder exceeds the plan's scratch, gets an arena of just its size, so that
        the pages of the usual one do not count beside it; a suspect, so that nothing else is admitted beside it.
        """
        for image in images[1:]:
            self._put_waiting(image)
        del images[1:]
        if runs_alone:
            self._arena.resize(images[0].header.pixel_bytes)
            self._resized = True
        return self._arena.allocate(images[0].header.pixel_bytes)

    def _on_decoded(self, batch: _Decoding, decode: Future[DecodeReport]) -> None:
        if decode.cancelled():
            return  # close() frees what is left
        with self._changed:
            batch.left -= 1
            last = batch.left == 0
            self._changed.notify_all()
        if last:
            try:
                self._finish(batch)
            except Exception as error:  # noqa: BLE001 (a future's callback has nobody to raise to)
                self._fail(error)

    def _finish(self, batch: _Decoding) -> None:
        """Move the rows that were decoded together and make the batch ready."""
        rows = self._arena.view(batch.region, (len(batch.staged), *batch.shape))
        decoded: list[tuple[StagedImage, DecodeReport]] = []
        for row, (image, decode) in enumerate(zip(batch.staged, batch.decodes, strict=True)):
            error = decode.exception()
            if error is None:
                if row != len(decoded):
                    rows[len(decoded)] = rows[row]
                decoded.append((image, decode.result()))
            elif isinstance(error, ImageError):
                self._on_failure(image, error)
            else:
                self._fail(error)
        if not decoded:
            with self._changed:
                self._decoding.remove(batch)
            self._release(batch.region)
            return
        ready = DecodedBatch(
            torch.from_numpy(rows[: len(decoded)]),
            [image for image, _report in decoded],
            [report for _image, report in decoded],
            partial(self._release, batch.region),
        )
        with self._changed:
            self._decoding.remove(batch)
            self._ready.append(ready)
            self._changed.notify_all()

    def _fail(self, error: BaseException | None) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _release(self, region: Region) -> None:
        with self._changed:
            if region not in self._in_arena:
                return  # close() was earlier
            self._arena.free(region)
            self._in_arena.remove(region)
            if self._resized and not self._in_arena:
                self._arena.resize(self._plan.arena_bytes)
                self._resized = False
            self._changed.notify_all()


def _staged_at(image: StagedImage) -> float:
    return image.staged_at
