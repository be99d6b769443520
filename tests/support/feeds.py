"""A feeder with a decoder that does what the test says, when it says so."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adc_worker.ingest.arena import Arena, Region
from adc_worker.ingest.decode import DecodeReport
from adc_worker.ingest.feeder import BatchFeeder, DecodedBatch
from adc_worker.ingest.staging import StagedQueue
from tests.support.images import header, staged
from tests.support.plans import ingest_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adc_worker.errors import ImageError
    from adc_worker.ingest.header import ImageHeader
    from adc_worker.ingest.staging import StagedImage

PATIENCE_S = 20.0
REPORT = DecodeReport(0.001, truncated=False)

# Two shapes of one size, three pages each; and one four times as large.
PAGE_SHAPE, LONG_SHAPE, LARGE_SHAPE = (64, 64), (128, 32), (128, 128)
ONE = 3 * 64 * 64


@dataclass(frozen=True, slots=True, eq=False)
class Decode:
    """A decode that was asked for. The number of the image is its file's stem, and what success paints."""

    number: int
    header: ImageHeader
    target: Region
    future: Future[DecodeReport]


class FakeEngine:
    """Collects decodes; with `at_once` they succeed as they are submitted, else the test finishes them."""

    def __init__(self, arena: Arena, workers: int, *, at_once: bool) -> None:
        self.workers = workers
        self.pids: list[int] = []
        self.decodes: list[Decode] = []  # all that were ever submitted
        self.submit_error: Exception | None = None
        self.closed = False
        self._arena = arena
        self._at_once = at_once

    @property
    def running(self) -> list[Decode]:
        return [decode for decode in self.decodes if not decode.future.done()]

    @property
    def numbers(self) -> list[int]:
        """The images submitted, in order."""
        return [decode.number for decode in self.decodes]

    def submit(self, path: Path, header: ImageHeader, target: Region) -> Future[DecodeReport]:
        if self.submit_error is not None:
            raise self.submit_error
        decode = Decode(int(path.stem), header, target, Future())
        self.decodes.append(decode)
        if self._at_once:
            self.succeed(decode)
        return decode.future

    def succeed(self, decode: Decode) -> None:
        self._arena.view(decode.target, decode.header.shape)[:] = decode.number % 251
        decode.future.set_result(REPORT)

    def succeed_all(self) -> None:
        for decode in self.running:
            self.succeed(decode)

    def fail(self, decode: Decode, error: BaseException) -> None:
        decode.future.set_exception(error)

    def close(self) -> None:
        """Cancel what has not begun, as an executor does."""
        self.closed = True
        for decode in self.running:
            decode.future.cancel()


class Feed:
    """Source, arena, engine and feeder of one test."""

    def __init__(
        self,
        *,
        workers: int = 1,
        at_once: bool = False,
        on_failure: Callable[[StagedImage, ImageError], None] | None = None,
        has_memory_for: Callable[[int], bool] = lambda _needed_bytes: True,
        now: Callable[[], float] = time.monotonic,
        memory_look_s: float = 0.001,
        **changes: Any,
    ) -> None:
        self.plan = ingest_plan(**changes)
        self.source = StagedQueue()
        self.arena = Arena(self.plan.arena_bytes)
        self.engine = FakeEngine(self.arena, workers, at_once=at_once)
        self.isolated: FakeEngine | None = None
        self.admitted: list[Sequence[StagedImage]] = []
        self.failures: list[tuple[int, ImageError]] = []
        self.lost: list[int] = []
        self.feeder = BatchFeeder(
            self.plan,
            self.source,
            self.arena,
            self.engine,
            on_failure or self._record,
            self.admitted.append,
            self._isolate,
            has_memory_for,
            on_lost=lambda image, _error: self.lost.append(image.id),
            memory_look_s=memory_look_s,
            now=now,
        )
        self._batches = iter(self.feeder)

    def put(self, *numbers: int, shape: tuple[int, int] = PAGE_SHAPE, staged_at: float | None = None) -> None:
        """Stage images whose ids are also their age, unless `staged_at` says otherwise."""
        for number in numbers:
            age = float(number) if staged_at is None else staged_at
            self.put_image(staged(number, Path(f"{number}.img"), header(*shape), time.monotonic() + age))

    def put_image(self, image: StagedImage) -> None:
        self.source.put(image)

    def settle(self) -> None:
        """Return when the feeder's thread has seen all that happened and waits for more, or has ended."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not self._waits():
            if time.monotonic() > deadline_s:
                raise TimeoutError("the feeder does not come to rest")
            time.sleep(0.0002)

    @property
    def ready(self) -> list[DecodedBatch]:
        """What is decoded and not taken."""
        return [batch.ready for batch in self.feeder._ahead if batch.ready is not None]

    def next(self) -> DecodedBatch | None:
        return next(self._batches, None)

    def use(self, batch: DecodedBatch | None) -> list[int]:
        """Check a batch's pixels, free it, and return its images' numbers."""
        assert batch is not None
        numbers = [image.id for image in batch.staged]
        with batch:
            assert [row.unique().tolist() for row in batch.images] == [[number % 251] for number in numbers]
        return numbers

    def drain(self) -> list[list[int]]:
        """Use every batch that still comes."""
        batches = []
        while (batch := self.next()) is not None:
            batches.append(self.use(batch))
        return batches

    def close(self) -> None:
        self.feeder.close()
        assert self.arena.used_bytes == 0
        self.arena.close()

    def _isolate(self) -> FakeEngine:
        self.isolated = FakeEngine(self.arena, 1, at_once=True)
        return self.isolated

    def _waits(self) -> bool:
        changed: Any = self.feeder._changed
        with changed:
            return bool(changed._waiters) or not self.feeder._thread.is_alive()

    def _record(self, image: StagedImage, error: ImageError) -> None:
        self.failures.append((image.id, error))
