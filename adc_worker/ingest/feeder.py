"""Forms batches of staged images, admits them to the arena, and has them decoded ahead of the GPU.

Only this thread ever waits for memory; whoever asks for a batch waits for a ready one and for nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import islice
from typing import Self

import torch
from torch.utils.data import IterableDataset

from adc_worker.errors import ImageError, ImageTooLarge, StagedFileLost
from adc_worker.ingest.arena import Arena, Region
from adc_worker.ingest.decode import DecodeEngine, DecodeReport
from adc_worker.ingest.header import ImageHeader
from adc_worker.ingest.staging import StagedImage, StagedQueue
from adc_worker.planning.plan import IngestPlan

_Shape = tuple[int, int, int]
_Kind = tuple[_Shape, bool]  # what may share a batch: images of one shape, none of which runs alone
MEMORY_LOOK_S = 1.0  # between looks for the memory of an image that waits for it


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
class _Batch:
    """A batch between admission and the GPU."""

    region: Region
    staged: list[StagedImage]
    left: int  # images to decode
    decodes: list[Future[DecodeReport]] = field(default_factory=list)
    ready: DecodedBatch | None = None


class _Next(Enum):
    """What is to be done with the images that are next."""

    DECODE = "decode"
    REFUSE = "refuse"  # there never will be a place for them
    LOOK_FOR_MEMORY = "look for memory"  # they are still queued, and may have to wait there


@dataclass(frozen=True, slots=True)
class _Step:
    """One thing that the feeder's thread does without the lock."""

    what: _Next
    images: list[StagedImage]
    region: Region | None = None


class BatchFeeder(IterableDataset[DecodedBatch]):
    """Runs the feeder thread. Iterate over it once to get the job's batches.

    An image that needs more memory than the plan holds runs alone, and only once `has_memory_for` says that so many
    bytes can be had at the moment; until then it waits in the queue, and the others go on.

    `on_lost` takes back an image whose staged file is gone; without it that ends the feeder.
    """

    def __init__(
        self,
        plan: IngestPlan,
        source: StagedQueue,
        arena: Arena,
        engine: DecodeEngine,
        on_failure: Callable[[StagedImage, ImageError], None],
        on_admit: Callable[[Sequence[StagedImage]], None],
        isolate: Callable[[], DecodeEngine],
        has_memory_for: Callable[[int], bool] = lambda _needed_bytes: True,
        *,
        on_lost: Callable[[StagedImage, StagedFileLost], None] | None = None,
        memory_look_s: float = MEMORY_LOOK_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._source = source
        self._arena = arena
        self._engines = [engine]  # and, once there was one, that of suspects
        self._on_failure = on_failure
        self._on_admit = on_admit
        self._isolate = isolate
        self._has_memory_for = has_memory_for
        self._on_lost = on_lost
        self._memory_look_s = memory_look_s
        self._now = now  # the clock of `StagedImage.staged_at`
        self._look_again_at: dict[int, float] = {}  # monotonic seconds, by image: those that wait for memory
        self._granted: int | None = None  # the image for which there was memory when it was looked for
        self._short_of_memory: set[int] = set()  # images whose decoder found none: they run alone next time
        self._changed = source.changed
        self._ahead: list[_Batch] = []  # admitted and not taken yet
        self._in_arena: set[Region] = set()
        self._paused = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._ended = False
        self.last_ready = True  # whether the batch taken last did not have to be waited for
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[DecodedBatch]:
        while (batch := self._next_ready()) is not None:
            yield batch
            del batch  # or its region's view would live until the next one is ready

    @property
    def decode_pids(self) -> list[int]:
        return [pid for engine in self._engines for pid in engine.pids]

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
        """Stop, end the thread and the decoders, and free what nobody took; what was not admitted stays queued."""
        self.stop()
        self._thread.join()
        for engine in self._engines:
            engine.close()
        with self._changed:
            self._ahead.clear()
            for region in tuple(self._in_arena):
                self._release(region)

    def _next_ready(self) -> DecodedBatch | None:
        self.last_ready = True
        with self._changed:
            while self._failure is None:
                for batch in self._ahead:
                    if batch.ready is not None:
                        self._ahead.remove(batch)
                        self._changed.notify_all()
                        return batch.ready
                if self._ended and not self._ahead:
                    return None
                self.last_ready = False
                self._changed.wait()
            raise self._failure

    def _run(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                wanted = [image for image in step.images if self._source.still_wanted(image)]
                if step.what is _Next.LOOK_FOR_MEMORY:
                    self._look_for_memory(step.images[0], wanted=bool(wanted))
                elif step.region is None:
                    self._refuse(wanted)
                elif wanted:
                    self._decode(step.region, wanted)
                else:
                    self._release(step.region)
        except BaseException as error:  # noqa: BLE001 (handed to the consumer, who raises it)
            self._fail(error)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _next_step(self) -> _Step | None:
        """Wait until a batch may close and has a place in the arena, or something else is to be done; None at the end.

        An image for which there never will be a place is refused.
        """
        with self._changed:
            while not self._stopping and self._failure is None:
                if self._source.ended and not self._source.images and not self._is_decoding():
                    return None
                images = self._closable() if self._may_admit() else []
                if images and self._exceeds_all(images[0].header):
                    self._take_out(images)
                    return _Step(_Next.REFUSE, images)
                if images and self._needs_a_look(images[0]):
                    return _Step(_Next.LOOK_FOR_MEMORY, images[:1])
                region = self._allocate(images) if images else None
                if region is not None:
                    self._take_out(images)
                    return _Step(_Next.DECODE, images, region)
                self._changed.wait(None if images else self._seconds_to_next_close())
        return None

    def _is_decoding(self) -> bool:
        """Whether an image may still come back that its decoder found no memory for."""
        return any(batch.ready is None for batch in self._ahead)

    def _take_out(self, images: list[StagedImage]) -> None:
        for image in images:
            self._source.images.remove(image)
            self._look_again_at.pop(image.id, None)

    def _needs_a_look(self, image: StagedImage) -> bool:
        """Whether an image needs memory that the plan has not set aside, and nobody has looked for it yet."""
        return self._exceeds_plan(image) and image.id != self._granted

    def _look_for_memory(self, image: StagedImage, *, wanted: bool) -> None:
        """Let an image that exceeds the plan go on, or wait; one whose lease is over is no longer queued."""
        fits = wanted and self._has_memory_for(self._bytes_alone(image.header))
        with self._changed:
            if not wanted:
                self._take_out([image])
            elif fits:
                self._granted = image.id
            else:
                self._look_again_at[image.id] = self._now() + self._memory_look_s

    def _candidates(self) -> list[StagedImage]:
        """Return the queued images but for those that wait for memory."""
        now = self._now()
        return [image for image in self._source.images if self._look_again_at.get(image.id, now) <= now]

    def _may_admit(self) -> bool:
        if self._paused:
            return not self._in_arena
        return len(self._ahead) <= self._plan.prefetch_factor

    def _closable(self) -> list[StagedImage]:
        """Return the images of a batch that may close now: of the oldest, or of the first that is full."""
        images = self._candidates()
        idle = sum(batch.left for batch in self._ahead) < self._engines[0].workers
        if images and (idle or self._source.ended or self._seconds_to_next_close() == 0):
            of_the_oldest = (image for image in images if self._kind(image) == self._kind(images[0]))
            return list(islice(of_the_oldest, self._images_per_batch(images[0])))
        waiting: defaultdict[_Kind, list[StagedImage]] = defaultdict(list)
        for image in images:
            alike = waiting[self._kind(image)]
            alike.append(image)
            if len(alike) >= self._images_per_batch(image):
                return alike
        return []

    def _seconds_to_next_close(self) -> float | None:
        if not self._source.images or not self._may_admit():
            return None
        now = self._now()
        images = self._candidates()
        times_s = [at - now for at in self._look_again_at.values() if at > now]
        if images:
            times_s.append(0.0 if images[0].urgent else images[0].staged_at + self._plan.batch_wait_s - now)
        return max(0.0, min(times_s)) if times_s else 0.0

    def _kind(self, image: StagedImage) -> _Kind:
        return image.header.shape, self._runs_alone(image)

    def _runs_alone(self, image: StagedImage) -> bool:
        return image.suspect or self._exceeds_plan(image)

    def _exceeds_plan(self, image: StagedImage) -> bool:
        """Whether an image needs more memory than the plan has set aside, or had too little in it."""
        header = image.header
        exceeds_arena = header.pixel_bytes > self._plan.arena_bytes
        exceeds_scratch = header.scratch_bytes > self._plan.scratch_bytes
        return exceeds_arena or exceeds_scratch or image.id in self._short_of_memory

    def _images_per_batch(self, image: StagedImage) -> int:
        if self._paused or self._runs_alone(image):
            return 1
        return min(self._plan.batch_size, max(1, self._plan.batch_bytes // image.header.pixel_bytes))

    def _bytes_alone(self, header: ImageHeader) -> int:
        """Return what the image needs alone, when nothing else is decoded: its pixels and its decoder's memory."""
        return header.pixel_bytes + header.scratch_bytes

    @property
    def _most_bytes_alone(self) -> int:
        """Return what one image could ever have: instead of the arena and of the memory of all decoders."""
        return self._plan.solo_bytes + self._plan.scratch_bytes

    def _exceeds_all(self, header: ImageHeader) -> bool:
        return self._bytes_alone(header) > self._most_bytes_alone

    def _allocate(self, images: list[StagedImage]) -> Region | None:
        """Find room for these images, or for the first of them alone when nothing is in flight: one always goes in.

        One that exceeds the arena, or whose decoder exceeds the plan's scratch, gets an arena of just its size, so that
        the pages of the usual one do not count beside it; a suspect, so that nothing else is admitted beside it.
        """
        image_bytes, alone = images[0].header.pixel_bytes, self._runs_alone(images[0])
        region = None if alone else self._arena.allocate(image_bytes * len(images))
        if region is None and not self._in_arena:
            del images[1:]
            if alone:
                self._arena.resize(image_bytes)
            region = self._arena.allocate(image_bytes)
        if region is not None:
            self._in_arena.add(region)
        return region

    def _refuse(self, images: list[StagedImage]) -> None:
        for image in images:
            needed = self._bytes_alone(image.header)
            message = f"decoding it needs {needed} bytes; this worker has {self._most_bytes_alone} for one image"
            self._on_failure(image, ImageTooLarge(message))

    def _decode(self, region: Region, images: list[StagedImage]) -> None:
        batch, image_bytes = _Batch(region, images, len(images)), images[0].header.pixel_bytes
        with self._changed:
            self._ahead.append(batch)
        self._on_admit(images)
        engine = self._engine_for(images[0])
        for row, image in enumerate(images):
            target = Region(region.offset + row * image_bytes, image_bytes)
            batch.decodes.append(engine.submit(image.path, image.header, target))
            batch.decodes[-1].add_done_callback(partial(self._on_decoded, batch))

    def _engine_for(self, image: StagedImage) -> DecodeEngine:
        if image.suspect and len(self._engines) == 1:
            self._engines.append(self._isolate())
        return self._engines[-1 if image.suspect else 0]

    def _on_decoded(self, batch: _Batch, decode: Future[DecodeReport]) -> None:
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

    def _finish(self, batch: _Batch) -> None:
        """Move the rows that were decoded together and make the batch ready."""
        rows = self._arena.view(batch.region, (len(batch.staged), *batch.staged[0].header.shape))
        staged: list[StagedImage] = []
        reports: list[DecodeReport] = []
        for row, (image, decode) in enumerate(zip(batch.staged, batch.decodes, strict=True)):
            error = decode.exception()
            if isinstance(error, ImageTooLarge) and not self._had_its_memory(image):
                self._put_back(image)
            elif isinstance(error, ImageError):
                self._on_failure(image, error)
            elif isinstance(error, FileNotFoundError) and self._on_lost is not None:
                self._on_lost(image, StagedFileLost(str(error)))
            elif error is not None:
                self._fail(error)
            else:
                if row != len(staged):
                    rows[len(staged)] = rows[row]
                staged.append(image)
                reports.append(decode.result())
        batch.decodes.clear()  # their callbacks hold the batch: its view would wait for the garbage collector
        images = torch.from_numpy(rows[: len(staged)])
        with self._changed:
            if staged:
                batch.ready = DecodedBatch(images, staged, reports, partial(self._release, batch.region))
            else:
                self._ahead.remove(batch)
                self._release(batch.region)
            self._changed.notify_all()

    def _had_its_memory(self, image: StagedImage) -> bool:
        """Whether a decoder that found no memory asks for more than its image's header says.

        That is the image's own fault, and takes a decode alone, with as much to be had as the header asks for. Else
        others had the memory.
        """
        return image.id in self._short_of_memory and self._has_memory_for(self._bytes_alone(image.header))

    def _put_back(self, image: StagedImage) -> None:
        """Decode an image again later, alone and when there is memory for it."""
        with self._changed:
            self._short_of_memory.add(image.id)
            self._granted = None
            self._look_again_at[image.id] = self._now() + self._memory_look_s
        self._source.put(image)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _release(self, region: Region) -> None:
        with self._changed:
            if region not in self._in_arena:
                return  # close() was earlier
            self._arena.free(region)
            self._in_arena.remove(region)
            if not self._in_arena:
                self._arena.resize(self._plan.arena_bytes)  # it may have been another's for an image that ran alone
            self._changed.notify_all()
