"""The feeder under random mixes: bounded memory, no shared byte, no starvation, one end for every image, no leak."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adc_worker.errors import ImageError, ImageTooLarge, ImageUnreadable, WorkerFault
from adc_worker.ingest.arena import PAGE_BYTES, Arena
from adc_worker.ingest.decode import ThreadEngine
from adc_worker.ingest.feeder import BatchFeeder, DecodedBatch
from adc_worker.ingest.header import read_header
from adc_worker.ingest.loader import build_dataloader
from adc_worker.ingest.staging import StagedQueue
from tests.support.feeds import LARGE_SHAPE, LONG_SHAPE, ONE, PAGE_SHAPE, Feed
from tests.support.images import by_pillow, encoded, header, jpeg, picture, staged, written
from tests.support.plans import ingest_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from adc_worker.ingest.header import ImageHeader
    from adc_worker.ingest.staging import StagedImage
    from adc_worker.planning.plan import IngestPlan

SHAPES = [PAGE_SHAPE, LONG_SHAPE, LARGE_SHAPE, (256, 128)]
BATCH_SIZES = st.integers(1, 4)
LOOK_S = 100.0


class FeederMachine(RuleBasedStateMachine):
    """Stage, decode, fail, take, free, stop in any order; after each step the feeder comes to rest and is inspected."""

    def __init__(self) -> None:
        super().__init__()
        self.feed: Feed | None = None
        self.staged: list[int] = []
        self.held: list[DecodedBatch] = []
        self.used: list[int] = []
        self.ended = self.stopped = self.died = self.memory_is_short = False
        self.now_s = 1000.0  # moves when a rule says so: what happens must not depend on how fast this machine is
        self.plans: list[IngestPlan] = []  # all that ever held; what is held may come from any of them

    @initialize(
        workers=st.integers(1, 4),
        batch_size=BATCH_SIZES,
        images_per_batch=BATCH_SIZES,
        images_in_arena=st.integers(1, 8),
        solo=st.sampled_from([1, 4, 8]),
        prefetch_factor=st.integers(1, 4),
        patient=st.booleans(),
        scratch_bytes=st.sampled_from([ONE, 1 << 20]),
    )
    def build(
        self,
        *,
        workers: int,
        batch_size: int,
        images_per_batch: int,
        images_in_arena: int,
        solo: int,
        prefetch_factor: int,
        patient: bool,
        scratch_bytes: int,
    ) -> None:
        self.feed = Feed(
            workers=workers,
            batch_size=batch_size,
            batch_bytes=images_per_batch * ONE,
            arena_bytes=images_in_arena * ONE,
            solo_bytes=max(solo, images_in_arena) * ONE,
            prefetch_factor=prefetch_factor,
            batch_wait_s=1e6 if patient else 0,
            scratch_bytes=scratch_bytes,
            has_memory_for=lambda _needed_bytes: not self.memory_is_short,
            now=lambda: self.now_s,
            memory_look_s=LOOK_S,
        )
        self.plans.append(self.feed.plan)

    @rule(
        batch_size=BATCH_SIZES,
        images_per_batch=BATCH_SIZES,
        prefetch_factor=st.integers(1, 4),
        patient=st.booleans(),
    )
    def change_plan(self, *, batch_size: int, images_per_batch: int, prefetch_factor: int, patient: bool) -> None:
        feed = self._feed()
        feed.plan = replace(
            feed.plan,
            batch_size=batch_size,
            batch_bytes=images_per_batch * ONE,
            prefetch_factor=prefetch_factor,
            batch_wait_s=1e6 if patient else 0,
        )
        self.plans.append(feed.plan)
        feed.feeder.apply(feed.plan)

    def _feed(self) -> Feed:
        assert self.feed is not None
        return self.feed

    @precondition(lambda self: not self.ended)
    @rule(shape=st.sampled_from(SHAPES), count=st.integers(1, 5), image_format=st.sampled_from(["JPEG", "PNG"]))
    def stage(self, shape: tuple[int, int], count: int, image_format: str) -> None:
        with self._feed().source.changed:  # all at once, or which of them share a batch would be chance
            for _image in range(count):
                self._stage_one(header(*shape, image_format=image_format))

    def _stage_one(self, image_header: ImageHeader) -> None:
        """Stage an image; a PNG's decoder may need more than is set aside."""
        number = len(self.staged)
        self.staged.append(number)
        image = staged(number, Path(f"{number}.img"), image_header, self.now_s + number)
        self._feed().put_image(image)

    @rule()
    def time_passes(self) -> None:
        """Images that wait for memory are looked at again."""
        self.now_s += 2 * LOOK_S
        self._wake()

    def _wake(self) -> None:
        feed = self._feed()
        feed.feeder.apply(feed.plan)

    @rule(short=st.booleans())
    def others_take_or_leave_memory(self, *, short: bool) -> None:
        self.memory_is_short = short

    @precondition(lambda self: self._feed().engine.running)
    @rule(data=st.data())
    def a_decoder_finds_no_memory(self, data: st.DataObject) -> None:
        decode = data.draw(st.sampled_from(self._feed().engine.running))
        before = len(self._feed().failures)
        again = self._feed().engine.numbers.count(decode.number) > 1
        self._feed().engine.fail(decode, ImageTooLarge("the decoder found no memory"))
        if self.memory_is_short or not again:
            # The batch may be complete with it, so that the failures of others are told now.
            failed = [number for number, _error in self._feed().failures[before:]]
            assert decode.number not in failed, "a shortage that may pass is no outcome"

    @precondition(lambda self: self._feed().engine.running)
    @rule(data=st.data(), outcome=st.sampled_from(["pixels", "pixels", "pixels", "error", "late death"]))
    def finish_a_decode(self, data: st.DataObject, outcome: str) -> None:
        engine = self._feed().engine
        decode = data.draw(st.sampled_from(engine.running))
        if outcome == "pixels":
            engine.succeed(decode)
        elif outcome == "error" or len(self.staged) < 12:  # a worker that dies at once ends every run early
            engine.fail(decode, ImageUnreadable("broken"))
        else:
            engine.fail(decode, WorkerFault("a decode worker died"))
            self.died = True

    @precondition(lambda self: self._feed().ready and not self.died)
    @rule()
    def take(self) -> None:
        batch = self._feed().next()
        assert batch is not None
        numbers = [image.id for image in batch.staged]
        assert [row.unique().tolist() for row in batch.images] == [[number % 251] for number in numbers]
        self.held.append(batch)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.used += self._feed().use(self.held.pop(index))

    @rule()
    def end_of_source(self) -> None:
        self.ended = True
        self._feed().source.end()

    @precondition(lambda self: len(self.staged) > 8)
    @rule()
    def stop(self) -> None:
        self.stopped = True
        self._feed().feeder.stop()

    @invariant()
    def all_is_well_at_rest(self) -> None:
        if self.feed is None:
            return
        self.feed.settle()
        self._memory_is_bounded()
        self._no_byte_belongs_to_two()
        self._batches_are_whole()
        self._nothing_starves()
        self._everything_is_somewhere_exactly_once()

    def _memory_is_bounded(self) -> None:
        feed = self._feed()
        assert feed.arena.used_bytes <= feed.arena.size_bytes
        if feed.arena.size_bytes != feed.plan.arena_bytes:
            running_scratch_bytes = sum(decode.header.scratch_bytes for decode in feed.engine.running)
            most_bytes = feed.plan.solo_bytes + feed.plan.scratch_bytes
            assert feed.arena.size_bytes + running_scratch_bytes <= most_bytes
        assert len(feed.feeder._ahead) <= max(plan.prefetch_factor for plan in self.plans) + 1
        hungry = any(decode.header.scratch_bytes > feed.plan.scratch_bytes for decode in feed.engine.running)
        if feed.arena.size_bytes != feed.plan.arena_bytes or hungry:
            assert feed.arena.size_bytes == feed.arena.used_bytes
            assert len(feed.feeder._in_arena) == 1

    def _no_byte_belongs_to_two(self) -> None:
        regions = sorted(self._feed().feeder._in_arena)
        assert all(left.end <= right.offset for left, right in pairwise(regions))
        targets = sorted(decode.target for decode in self._feed().engine.running)
        assert all(left.end <= right.offset for left, right in pairwise(targets))
        assert all(any(r.offset <= t.offset and t.end <= r.end for r in regions) for t in targets)

    def _batches_are_whole(self) -> None:
        for batch in self.held:
            assert 1 <= len(batch.staged) <= max(plan.batch_size for plan in self.plans)
            assert len(batch.staged) == 1 or batch.images.numel() <= max(plan.batch_bytes for plan in self.plans)
            assert {image.header.shape for image in batch.staged} == {tuple(batch.images.shape[1:])}
            assert len(batch.reports) == len(batch.staged)

    def _nothing_starves(self) -> None:
        if self.stopped or self.died:
            return
        feed = self._feed()
        assert feed.feeder._in_arena or self.held or not feed.source.images or self.memory_is_short or self._looks()

    def _looks(self) -> bool:
        """Whether an image waits for the feeder's next look for memory."""
        return bool(self._feed().feeder._look_again_at)

    def _everything_is_somewhere_exactly_once(self) -> None:
        if self.stopped or self.died:
            return
        feed = self._feed()
        waiting = [image.id for image in feed.source.images]
        out = [image.id for batch in (*feed.ready, *self.held) for image in batch.staged]
        known = [*waiting, *out, *self.used, *(number for number, _error in feed.failures)]
        assert len(known) == len(set(known))
        assert set(known) <= set(self.staged)
        assert set(self.staged) - set(known) <= set(feed.engine.numbers)  # the rest is being decoded

    def teardown(self) -> None:
        if self.feed is None:
            return
        feed = self.feed
        self.memory_is_short = False
        feed.source.end()
        for batch in self.held:
            self.used += feed.use(batch)
        if not self.died:
            self._run_dry()
        feed.close()
        self._check_ends()

    def _run_dry(self) -> None:
        feed = self._feed()
        while True:
            self.now_s += 2 * LOOK_S
            self._wake()
            feed.settle()
            feed.engine.succeed_all()
            feed.settle()
            if not feed.ready:
                if feed.engine.running or (feed.source.images and not self.stopped):
                    continue
                break
            self.used += feed.use(feed.next())
        assert feed.next() is None

    def _check_ends(self) -> None:
        feed = self._feed()
        failed = [number for number, _error in feed.failures]
        assert len(self.used + failed) == len(set(self.used + failed))
        if self.died:
            return
        refused = {number for number, error in feed.failures if isinstance(error, ImageTooLarge)}
        if self.stopped:
            waiting = {image.id for image in feed.source.images}  # some of them for another decode
            assert set(self.used + failed) | waiting >= set(feed.engine.numbers) | refused
            assert set(self.used + failed) <= set(feed.engine.numbers) | refused
        else:
            assert set(self.used + failed) == set(self.staged)


TestFeederMachine = FeederMachine.TestCase
TestFeederMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class Library:
    """Small files of several shapes, good and bad, with the pixels that Pillow sees."""

    def __init__(self, folder: Path) -> None:
        files = [
            jpeg(40, 30),
            jpeg(40, 30, seed=1, progressive=True),
            jpeg(30, 40, seed=2),
            encoded(picture(40, 30, seed=3), "PNG"),
            jpeg(200, 150, seed=4),
            jpeg(40, 30)[:-200],
        ]
        self.paths = [written(folder / f"{index}.img", data) for index, data in enumerate(files)]
        self.headers = [read_header(path, 10_000_000) for path in self.paths]
        self.pixels: list[npt.NDArray[np.uint8] | None] = [by_pillow(data) for data in files[:-1]]
        self.pixels.append(None)  # the truncated one: decoded, but compared with nothing
        broken = written(folder / "broken.img", jpeg(40, 30)[:200] + bytes(50))
        self.paths.append(broken)
        self.headers.append(self.headers[0])
        self.pixels.append(None)

    @property
    def broken(self) -> int:
        return len(self.paths) - 1

    def __len__(self) -> int:
        return len(self.paths)

    @contextmanager
    def staging(self, kinds: list[int]) -> Iterator[StagedQueue]:
        """Stage images of these kinds from another thread, some of them urgent."""
        source = StagedQueue()

        def produce() -> None:
            for number, kind in enumerate(kinds):
                source.put(replace(staged(number, self.paths[kind], self.headers[kind]), urgent=number % 7 == 3))
            source.end()

        producer = threading.Thread(target=produce)
        producer.start()
        try:
            yield source
        finally:
            producer.join()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("library"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_with_real_decoders_every_image_ends_once_and_memory_stays_bounded(
    library: Library, data: st.DataObject
) -> None:
    """Whatever the mix, the plan, the pace, and the moment of stopping."""
    kinds = data.draw(st.lists(st.integers(0, len(library) - 1), max_size=40), label="kinds")
    plan = ingest_plan(
        batch_size=data.draw(st.integers(1, 6), label="batch size"),
        batch_bytes=data.draw(st.integers(1, 100_000), label="batch bytes"),
        arena_bytes=data.draw(st.integers(1, 30), label="arena pages") * PAGE_BYTES,
        solo_bytes=10_000_000,
        prefetch_factor=data.draw(st.integers(1, 4), label="prefetch"),
        scratch_bytes=data.draw(st.sampled_from([1, 20_000, 10_000_000]), label="scratch"),
        batch_wait_s=data.draw(st.sampled_from([0.0, 0.001, 1e6]), label="wait"),
    )
    stop_after = data.draw(st.none() | st.integers(0, 10), label="stop after batches")
    close_after = data.draw(st.none() | st.integers(0, 10), label="close after batches")
    workers = data.draw(st.integers(1, 4), label="workers")
    failures: list[int] = []
    arena = Arena(plan.arena_bytes)
    engine = ThreadEngine(arena, workers, plan.scratch_bytes)

    def on_failure(image: StagedImage, _error: ImageError) -> None:
        failures.append(image.id)

    used: list[int] = []
    admitted: list[int] = []

    def on_admit(images: Sequence[StagedImage]) -> None:
        admitted.extend(image.id for image in images)

    def isolate() -> ThreadEngine:
        raise AssertionError("no image is suspect here")

    with (
        library.staging(kinds) as source,
        closing(BatchFeeder(plan, source, arena, engine, on_failure, on_admit, isolate)) as feeder,
    ):
        for count, batch in enumerate(feeder):
            with batch:
                assert arena.used_bytes <= arena.size_bytes
                assert 1 <= len(batch.staged) <= plan.batch_size
                assert len(batch.staged) == 1 or batch.images.numel() <= plan.batch_bytes
                used += [image.id for image in batch.staged]
                for row, image in zip(batch.images, batch.staged, strict=True):
                    expected = library.pixels[kinds[image.id]]
                    assert expected is None or np.array_equal(row.numpy(), expected)
                del row
            if count == stop_after:
                feeder.stop()
            if count == close_after:
                break
    assert arena.used_bytes == 0
    assert arena.size_bytes == plan.arena_bytes  # whole pages; shrunk back behind a large image
    arena.close()
    assert len(used + failures) == len(set(used + failures))
    assert all(kinds[number] == library.broken for number in failures)
    assert set(used) <= set(admitted)
    assert len(admitted) == len(set(admitted))
    if stop_after is None and close_after is None:
        assert sorted(used + failures) == list(range(len(kinds)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_loaders_that_are_rebuilt_in_the_middle_bring_every_image_exactly_once(
    library: Library, data: st.DataObject
) -> None:
    """Stop, drain, close, and another loader on the same source, as often and with whatever plan."""
    kinds = data.draw(st.lists(st.integers(0, len(library) - 1), max_size=40), label="kinds")
    rebuilds = data.draw(st.lists(st.integers(0, 4), max_size=6), label="batches before each rebuild")
    used: list[int] = []
    failed: list[int] = []

    def on_failure(image: StagedImage, _error: ImageError) -> None:
        failed.append(image.id)

    with library.staging(kinds) as source:
        for batches in (*rebuilds, None):
            plan = ingest_plan(
                batch_size=data.draw(st.integers(1, 6), label="batch size"),
                arena_bytes=data.draw(st.integers(1, 30), label="arena pages") * PAGE_BYTES,
                solo_bytes=10_000_000,
                scratch_bytes=data.draw(st.sampled_from([1, 10_000_000]), label="scratch"),
                decode_workers=data.draw(st.integers(1, 3), label="workers"),
                batch_wait_s=data.draw(st.sampled_from([0.0, 1e6]), label="wait"),
            )
            with closing(build_dataloader(plan, source, on_failure)) as loader:
                if batches == 0:
                    loader.feeder.stop()
                for count, batch in enumerate(loader, start=1):
                    with batch:
                        used += [image.id for image in batch.staged]
                    if count == batches:
                        loader.feeder.stop()
    assert sorted(used + failed) == list(range(len(kinds)))
    assert all(kinds[number] == library.broken for number in failed)
