"""The feeder: when a batch closes, what may be in memory, and how everything that is admitted ends."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adc_worker.errors import ImageError, ImageTooLarge, ImageUnreadable, WorkerFault
from adc_worker.ingest.feeder import BatchFeeder
from tests.support.feeds import LARGE_SHAPE, LONG_SHAPE, ONE, PAGE_SHAPE, PATIENCE_S, Feed
from tests.support.images import header, staged
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from adc_worker.ingest.staging import StagedImage

    class MakeFeed(Protocol):
        def __call__(
            self,
            *,
            workers: int = ...,
            at_once: bool = ...,
            on_failure: Callable[[StagedImage, ImageError], None] | None = ...,
            has_memory_for: Callable[[int], bool] = ...,
            **changes: float,
        ) -> Feed: ...


@pytest.fixture
def feed() -> Iterator[MakeFeed]:
    """Make feeds that are closed, and found empty, at the end."""
    feeds: list[Feed] = []

    def make(**options: object) -> Feed:
        feeds.append(Feed(**options))  # type: ignore[arg-type]
        return feeds[-1]

    yield make
    while feeds:  # an exception that the feeder keeps would keep its views
        made = feeds.pop()
        made.feeder.stop()
        made.engine.succeed_all()
        made.close()


# When a batch closes


def test_an_idle_decoder_gets_what_there_is(feed: MakeFeed) -> None:
    """Nobody waits for a full batch while a decoder rests."""
    one = feed(workers=1)
    one.put(1)
    one.settle()
    assert one.engine.numbers == [1]


def test_while_decoders_are_busy_a_batch_fills_up_to_its_size(feed: MakeFeed) -> None:
    """Three of four wait for the fourth."""
    one = feed(batch_size=4)
    one.put(1)
    one.settle()
    one.put(2, 3, 4)
    one.settle()
    assert one.engine.numbers == [1]
    one.put(5)
    one.settle()
    assert one.engine.numbers == [1, 2, 3, 4, 5]


def test_a_batch_closes_at_its_bytes(feed: MakeFeed) -> None:
    """Two images fill it, though four would be allowed."""
    one = feed(batch_size=4, batch_bytes=2 * ONE + 1, prefetch_factor=8)
    one.put(1)
    one.settle()
    one.put(2, 3, 4)
    one.settle()
    assert one.engine.numbers == [1, 2, 3]


def test_an_image_above_the_batch_bytes_is_a_batch_of_its_own(feed: MakeFeed) -> None:
    """At least one image is always allowed."""
    one = feed(batch_bytes=1, at_once=True)
    one.put(1, 2)
    one.source.end()
    assert one.drain() == [[1], [2]]


def test_the_end_of_the_source_closes_what_waits(feed: MakeFeed) -> None:
    """No company will come."""
    one = feed(batch_size=4)
    one.put(1)
    one.settle()
    one.put(2, 3)
    one.source.end()
    one.settle()
    assert one.engine.numbers == [1, 2, 3]


def test_an_image_that_has_waited_long_enough_closes_its_batch(feed: MakeFeed) -> None:
    """The wait counts from when it was staged."""
    one = feed(batch_size=4, batch_wait_s=50)
    one.put(1)
    one.settle()
    one.put(2, staged_at=-49)
    one.settle()
    assert one.engine.numbers == [1]
    one.put(3, staged_at=-51)
    one.settle()
    assert one.engine.numbers == [1, 3, 2]


def test_the_wait_ends_by_itself(feed: MakeFeed) -> None:
    """Nothing else has to happen for a batch to close when its time has come."""
    one = feed(batch_size=4, batch_wait_s=0.02)
    one.put(1, staged_at=0)
    one.settle()
    one.put(2, staged_at=0)
    wait_until(lambda: one.engine.numbers == [1, 2])


def test_a_batch_has_one_shape(feed: MakeFeed) -> None:
    """Shapes of equal size do not mix either."""
    one = feed(batch_size=4, at_once=True, prefetch_factor=8)
    with one.source.changed:
        one.put(1, 3)
        one.put(2, 4, shape=LONG_SHAPE)
    one.source.end()
    assert one.drain() == [[1, 3], [2, 4]]


def test_the_shape_that_waited_longest_goes_first(feed: MakeFeed) -> None:
    """A rare shape does not starve behind a frequent one."""
    one = feed(batch_size=2, prefetch_factor=1)
    one.put(1)
    one.settle()
    one.put(3, 4, 5, 6)
    one.put(2, shape=LONG_SHAPE)
    one.settle()
    assert one.engine.numbers == [1, 3, 4]  # a full batch, while the rare shape waits for company
    one.source.end()
    one.engine.succeed_all()
    assert one.use(one.next()) == [1]
    one.settle()
    assert one.engine.numbers == [1, 3, 4, 2]


def test_an_urgent_image_goes_before_all_others(feed: MakeFeed) -> None:
    """The last delivery of a task is not spent waiting, wherever the others wait already."""
    one = feed(batch_size=2)
    one.put(1)
    one.settle()
    one.put(2, shape=LONG_SHAPE)
    one.put(3)
    one.settle()
    one.put_image(replace(staged(4, Path("4.img"), header(*PAGE_SHAPE), staged_at=1e9), urgent=True))
    one.settle()
    assert one.engine.numbers == [1, 4, 3]


# What may be in memory


@pytest.mark.parametrize("prefetch_factor", [1, 2, 5])
def test_as_many_batches_are_ahead_as_the_plan_says_and_one_more(feed: MakeFeed, prefetch_factor: int) -> None:
    """Those that are ready, and the one that is being decoded; each one used makes room for one."""
    one = feed(at_once=True, batch_size=1, prefetch_factor=prefetch_factor)
    one.put(*range(20))
    one.settle()
    assert len(one.engine.decodes) == prefetch_factor + 1
    one.use(one.next())
    one.settle()
    assert len(one.engine.decodes) == prefetch_factor + 2


def test_what_does_not_fit_into_the_arena_waits_until_a_batch_is_freed(feed: MakeFeed) -> None:
    """Handing a batch over is not enough: its bytes are still read."""
    one = feed(at_once=True, batch_size=1, prefetch_factor=8, arena_bytes=2 * ONE)
    one.put(*range(5))
    one.settle()
    assert len(one.engine.decodes) == 2
    batch = one.next()
    one.settle()
    assert len(one.engine.decodes) == 2
    assert one.arena.used_bytes == 2 * ONE
    one.use(batch)
    one.settle()
    assert len(one.engine.decodes) == 3
    one.source.end()
    assert one.drain() == [[1], [2], [3], [4]]


def test_a_pause_admits_one_image_at_a_time_and_only_into_an_empty_arena(feed: MakeFeed) -> None:
    """So a job goes on whatever the pressure; when the pause ends, the plan holds again."""
    one = feed(at_once=True, batch_size=2, prefetch_factor=8, arena_bytes=8 * ONE)
    one.feeder.pause(True)
    one.put(*range(7))
    one.settle()
    assert one.engine.numbers == [0]
    batch = one.next()
    one.settle()
    assert one.engine.numbers == [0]
    one.use(batch)
    one.settle()
    assert one.engine.numbers == [0, 1]
    one.feeder.pause(False)
    one.settle()
    assert one.engine.numbers == list(range(7))
    one.source.end()
    assert [number for batch in one.drain() for number in batch] == list(range(1, 7))


def test_a_paused_job_comes_to_its_end(feed: MakeFeed) -> None:
    """Image by image."""
    one = feed(at_once=True, batch_size=4)
    one.feeder.pause(True)
    one.put(1, 2, 3)
    one.source.end()
    assert one.drain() == [[1], [2], [3]]


def test_an_image_larger_than_the_arena_runs_alone(feed: MakeFeed) -> None:
    """It waits until nothing is in flight, the arena grows for it, and shrinks back behind it."""
    one = feed(workers=8, batch_size=1, prefetch_factor=8, arena_bytes=2 * ONE, solo_bytes=4 * ONE)
    one.put(1)
    one.settle()
    one.put(2, shape=LARGE_SHAPE)
    one.put(3, 4)
    one.settle()
    assert one.engine.numbers == [1]
    one.engine.succeed_all()
    one.settle()
    assert one.engine.numbers == [1]  # ready is still in flight
    one.use(one.next())
    one.settle()
    assert one.engine.numbers == [1, 2]
    assert one.arena.size_bytes == one.arena.used_bytes == 4 * ONE
    one.engine.succeed_all()
    one.use(one.next())
    assert one.arena.size_bytes == 2 * ONE
    one.settle()
    assert one.engine.numbers == [1, 2, 3, 4]


def test_the_arena_shrinks_back_when_the_large_image_fails(feed: MakeFeed) -> None:
    """And the others go on."""
    one = feed(batch_size=1, arena_bytes=2 * ONE, solo_bytes=4 * ONE)
    one.put(1, shape=LARGE_SHAPE)
    one.put(2)
    one.settle()
    one.engine.fail(one.engine.decodes[0], ImageUnreadable("broken"))
    assert one.arena.size_bytes == 2 * ONE
    one.settle()
    assert one.engine.numbers == [1, 2]


def test_a_batch_that_does_not_fit_as_a_whole_goes_image_by_image(feed: MakeFeed) -> None:
    """With nothing in flight one image is always admitted, and none is lost on the way."""
    one = feed(at_once=True, batch_size=4, arena_bytes=ONE)
    with one.source.changed:
        one.put(1, 2, 3)
    one.source.end()
    assert one.drain() == [[1], [2], [3]]


def test_an_image_that_fits_nowhere_is_refused_with_both_numbers(feed: MakeFeed) -> None:
    """All of its shape, and nobody else."""
    needed = 4 * ONE + header(*LARGE_SHAPE).scratch_bytes
    one = feed(at_once=True, arena_bytes=ONE, scratch_bytes=4096, solo_bytes=needed - 4096 - 1)
    one.put(1)
    one.put(2, 3, shape=LARGE_SHAPE)
    one.put(4)
    one.source.end()
    assert sorted(number for batch in one.drain() for number in batch) == [1, 4]
    assert sorted(number for number, _error in one.failures) == [2, 3]
    for _number, error in one.failures:
        assert isinstance(error, ImageTooLarge)
        assert f"needs {needed} bytes" in str(error)
        assert f"has {needed - 1} for one" in str(error)


def test_an_image_that_fits_when_it_is_alone_is_never_refused(feed: MakeFeed) -> None:
    """Memory that the plan sets aside for all decoders is its own then: it needs that of one."""
    needed = 4 * ONE + header(*LARGE_SHAPE).scratch_bytes
    one = feed(at_once=True, arena_bytes=ONE, scratch_bytes=3 * ONE, solo_bytes=needed - 3 * ONE)
    one.put(1, shape=LARGE_SHAPE)
    one.source.end()
    assert one.drain() == [[1]]


def test_an_image_waits_for_memory_that_others_hold_and_smaller_ones_go_on(feed: MakeFeed) -> None:
    """It is no error, however long that takes, and comes when there is room."""
    room = threading.Event()
    asked: list[int] = []

    def has_memory_for(needed_bytes: int) -> bool:
        asked.append(needed_bytes)
        return room.is_set()

    one = feed(at_once=True, batch_size=1, arena_bytes=2 * ONE, solo_bytes=8 * ONE, has_memory_for=has_memory_for)
    one.put(1, shape=LARGE_SHAPE)
    one.put(2, 3)
    one.source.end()
    assert one.use(one.next()) == [2]
    assert one.use(one.next()) == [3]
    wait_until(lambda: len(asked) > 3)
    room.set()
    assert one.drain() == [[1]]
    assert set(asked) == {4 * ONE + header(*LARGE_SHAPE).scratch_bytes}
    assert one.failures == []


def test_a_feeder_that_is_stopped_leaves_what_waits_for_memory_in_the_queue(feed: MakeFeed) -> None:
    """The turn is over: another one takes the image up."""

    def has_memory_for(_needed_bytes: int) -> bool:
        one.feeder.stop()
        return False

    one = feed(at_once=True, arena_bytes=ONE, solo_bytes=8 * ONE, has_memory_for=has_memory_for)
    one.put(1, shape=LARGE_SHAPE)
    assert one.drain() == []
    assert [image.id for image in one.source.images] == [1]
    assert one.failures == []


def test_an_image_whose_lease_ends_while_it_waits_for_memory_is_waited_for_no_more(feed: MakeFeed) -> None:
    """It has its outcome already, and nothing else keeps the job."""
    looks = iter([True, True, False])
    one = feed(at_once=True, arena_bytes=ONE, solo_bytes=8 * ONE, has_memory_for=lambda _needed: False)
    one.source.still_wanted = lambda _image: next(looks)
    one.put(1, shape=LARGE_SHAPE)
    one.source.end()
    assert one.drain() == []
    assert one.source.images == []


def test_a_decoder_that_found_no_memory_gets_another_try_when_there_is_some(feed: MakeFeed) -> None:
    """Others had it: the image is decoded again, alone, also when it was the last one."""
    one = feed(batch_size=2)
    one.put(1, 2)
    one.source.end()
    one.settle()
    one.engine.succeed(one.engine.decodes[1])
    one.engine.fail(one.engine.decodes[0], ImageTooLarge("it takes more memory than there is"))
    assert one.use(one.next()) == [2]
    wait_until(lambda: len(one.engine.decodes) == 3)
    assert one.engine.numbers == [1, 2, 1]
    one.engine.succeed_all()
    assert one.drain() == [[1]]
    assert one.failures == []


def test_a_decoder_that_asks_for_more_than_its_header_says_has_itself_to_blame(feed: MakeFeed) -> None:
    """Alone, with the memory that the header asks for: then more is the image's own fault. Before it is not."""
    room = iter([True, False, True, True])
    one = feed(has_memory_for=lambda _needed: next(room))
    one.put(1)
    one.source.end()
    for tries in (1, 2, 3):
        wait_until(lambda tries=tries: len(one.engine.decodes) == tries)  # type: ignore[misc]
        assert one.failures == []
        one.engine.fail(one.engine.decodes[-1], ImageTooLarge("it takes more memory than there is"))
    assert one.drain() == []
    assert [number for number, _error in one.failures] == [1]


def test_what_its_decoder_needs_counts_against_a_large_image(feed: MakeFeed) -> None:
    """Eight bytes a pixel of scratch, where the plan set aside one page, are no small change."""
    one = feed(at_once=True, arena_bytes=ONE, scratch_bytes=4096, solo_bytes=4 * ONE)
    one.put_image(staged(1, Path("1.img"), header(*LARGE_SHAPE, image_format="PNG")))
    one.source.end()
    assert one.drain() == []
    assert f"needs {3 * 128 * 128 + 8 * 128 * 128} bytes" in str(one.failures[0][1])


def _hungry(number: int, shape: tuple[int, int] = PAGE_SHAPE) -> StagedImage:
    """An image whose decoder needs eight bytes a pixel."""
    return staged(number, Path(f"{number}.img"), header(*shape, image_format="PNG"), staged_at=float(number))


def test_an_image_whose_decoder_exceeds_the_scratch_runs_alone(feed: MakeFeed) -> None:
    """The pages of the usual arena do not count beside it: its own is of exactly its size, and goes with it."""
    one = feed(workers=8, batch_size=1, prefetch_factor=8, arena_bytes=4 * ONE, scratch_bytes=4096)
    one.put(1)
    one.settle()
    one.put_image(_hungry(2))
    one.put(3)
    one.settle()
    assert one.engine.numbers == [1]
    one.engine.succeed_all()
    one.use(one.next())
    one.settle()
    assert one.engine.numbers == [1, 2]
    assert one.arena.size_bytes == one.arena.used_bytes == ONE
    one.engine.succeed_all()
    one.use(one.next())
    assert one.arena.size_bytes == 4 * ONE
    one.settle()
    assert one.engine.numbers == [1, 2, 3]


def test_an_image_that_runs_alone_is_never_a_guest_in_a_batch_of_its_shape(feed: MakeFeed) -> None:
    """Whether it or a modest image is the oldest of its shape, and whether or not a batch of them would close."""
    one = feed(at_once=True, batch_size=8, prefetch_factor=8, scratch_bytes=4096)
    with one.source.changed:
        for number in (2, 3, 6):
            one.put_image(_hungry(number))
        for number in (1, 4, 5):
            one.put_image(staged(number, Path(f"{number}.img"), header(*PAGE_SHAPE), staged_at=float(number)))
    one.source.end()
    assert one.drain() == [[1, 4, 5], [2], [3], [6]]


def test_an_image_that_is_refused_takes_none_of_its_shape_along(feed: MakeFeed) -> None:
    """Another file of as many pixels may need less to be decoded."""
    one = feed(at_once=True, batch_size=8, scratch_bytes=4096, solo_bytes=2 * ONE)
    with one.source.changed:
        one.put_image(_hungry(1))
        one.put(2)
    one.source.end()
    assert one.drain() == [[2]]
    assert [number for number, _error in one.failures] == [1]


# Another plan


def test_another_plan_holds_from_the_next_batch_on(feed: MakeFeed) -> None:
    """Two that waited for company of four are company enough now."""
    one = feed(batch_size=4, prefetch_factor=8)
    one.put(1)
    one.settle()
    one.put(2, 3)
    one.settle()
    assert one.engine.numbers == [1]
    one.feeder.apply(replace(one.plan, batch_size=2))
    one.settle()
    assert one.engine.numbers == [1, 2, 3]
    one.put(4, 5)
    one.settle()
    one.engine.succeed_all()
    assert [one.use(one.next()) for _batch in range(3)] == [[1], [2, 3], [4, 5]]


def test_another_plans_bytes_wait_and_depth_hold_as_well(feed: MakeFeed) -> None:
    """Each of them alone lets a batch go that waited."""
    one = feed(batch_size=4, prefetch_factor=1)
    one.put(1)
    one.settle()
    one.put(2, staged_at=-20)
    one.settle()
    assert one.engine.numbers == [1]
    one.feeder.apply(replace(one.plan, batch_wait_s=10.0))
    one.settle()
    assert one.engine.numbers == [1, 2]
    one.put(3, staged_at=0)
    one.settle()
    assert one.engine.numbers == [1, 2]
    one.feeder.apply(replace(one.plan, batch_bytes=ONE))
    one.settle()
    assert one.engine.numbers == [1, 2]  # two batches are ahead
    one.feeder.apply(replace(one.plan, batch_bytes=ONE, prefetch_factor=2))
    one.settle()
    assert one.engine.numbers == [1, 2, 3]


def test_a_smaller_depth_lets_out_what_is_ahead_already(feed: MakeFeed) -> None:
    """And then keeps to it."""
    one = feed(at_once=True, batch_size=1, prefetch_factor=4)
    one.put(*range(10))
    one.settle()
    assert len(one.engine.decodes) == 5
    one.feeder.apply(replace(one.plan, prefetch_factor=1))
    for _batch in range(3):
        one.use(one.next())
        one.settle()
    assert len(one.engine.decodes) == 5
    one.use(one.next())
    one.settle()
    assert len(one.engine.decodes) == 6


# How what was admitted ends


def test_failed_rows_are_closed_up(feed: MakeFeed) -> None:
    """The survivors' rows follow each other, each with its own image and report."""
    one = feed(batch_size=5, prefetch_factor=2)
    one.put(1)
    one.settle()
    one.put(2, 3, 4, 5, 6)
    one.settle()
    decodes = {decode.number: decode for decode in one.engine.decodes}
    for number in (2, 4, 6):
        one.engine.fail(decodes[number], ImageUnreadable(f"broken {number}"))
    one.engine.succeed_all()
    assert one.use(one.next()) == [1]
    batch = one.next()
    assert batch is not None
    assert batch.images.shape == (2, 64, 64, 3)
    assert len(batch.reports) == 2
    assert one.use(batch) == [3, 5]
    assert [(number, str(error)) for number, error in one.failures] == [(n, f"broken {n}") for n in (2, 4, 6)]


def test_a_batch_whose_images_all_failed_does_not_come_out(feed: MakeFeed) -> None:
    """Its memory and its place go to the next."""
    one = feed(batch_size=1, prefetch_factor=1, arena_bytes=ONE)
    one.put(1)
    one.settle()
    one.put(2)
    one.source.end()
    one.engine.fail(one.engine.decodes[0], ImageUnreadable("broken"))
    one.settle()
    one.engine.succeed_all()
    assert one.drain() == [[2]]


def test_a_dying_decoder_reaches_the_consumer_and_the_first_fault_is_the_one_told(
    feed: MakeFeed, caplog: pytest.LogCaptureFixture
) -> None:
    """The other decodes of the batch may end as they like; closing frees everything."""
    one = feed(workers=4, batch_size=1, prefetch_factor=8)
    one.put(1, 2, 3)
    one.source.end()
    wait_until(lambda: len(one.engine.running) == 3)
    one.engine.fail(one.engine.decodes[1], WorkerFault("decoder died"))
    one.engine.fail(one.engine.decodes[0], WorkerFault("another, too"))
    with pytest.raises(WorkerFault, match="decoder died"):
        one.next()
    with pytest.raises(WorkerFault, match="decoder died"):
        next(iter(one.feeder))
    one.close()  # with the third decode still queued: it is cancelled
    assert one.engine.decodes[2].future.cancelled()
    assert not caplog.records  # futures log what their callbacks raise, and go on
    assert one.arena.used_bytes == 0


def test_an_engine_that_takes_nothing_any_more_reaches_the_consumer(feed: MakeFeed) -> None:
    """The region of the half-submitted batch is freed on closing."""
    one = feed()
    one.engine.submit_error = RuntimeError("can't start new thread")
    one.put(1)
    with pytest.raises(RuntimeError, match="new thread"):
        one.next()
    one.close()


@pytest.mark.parametrize("shape", [PAGE_SHAPE, LARGE_SHAPE])
def test_a_failure_that_cannot_be_recorded_reaches_the_consumer(feed: MakeFeed, shape: tuple[int, int]) -> None:
    """Whether the image was refused or could not be decoded."""

    def full_disk(_image: StagedImage, _error: ImageError) -> None:
        raise OSError(28, "No space left on device")

    one = feed(on_failure=full_disk, arena_bytes=ONE, solo_bytes=ONE)
    one.put(1, shape=shape)
    one.settle()
    for decode in one.engine.running:
        one.engine.fail(decode, ImageUnreadable("broken"))
    with pytest.raises(OSError, match="No space"):
        one.next()
    one.close()


def test_failures_are_told_outside_the_lock(feed: MakeFeed) -> None:
    """Whoever hears of one may use the feeder from another thread."""
    stopped: list[bool] = []

    def stop_elsewhere(_image: StagedImage, _error: ImageError) -> None:
        thread = threading.Thread(target=one.feeder.stop)
        thread.start()
        thread.join(PATIENCE_S)
        stopped.append(not thread.is_alive())

    one = feed(on_failure=stop_elsewhere)
    one.put(1)
    one.settle()
    one.engine.fail(one.engine.decodes[0], ImageUnreadable("broken"))
    assert stopped == [True]


def test_stopping_lets_out_what_was_admitted_and_nothing_else(feed: MakeFeed) -> None:
    """Ready and being decoded come out; waiting for company or for memory stay."""
    one = feed(workers=8, batch_size=1, prefetch_factor=8, arena_bytes=2 * ONE)
    one.put(1, 2, 3, 4)
    one.settle()
    assert one.engine.numbers == [1, 2]
    one.engine.succeed(one.engine.decodes[0])
    one.feeder.stop()
    one.put(5)
    one.engine.succeed(one.engine.decodes[1])
    assert one.drain() == [[1], [2]]
    assert one.engine.numbers == [1, 2]
    assert one.failures == []


# Closing


def test_closing_right_away_ends_everything(feed: MakeFeed) -> None:
    """Also twice."""
    one = feed()
    one.close()
    one.feeder.close()
    assert one.engine.closed
    assert one.next() is None


def test_what_was_not_admitted_stays_queued_in_the_order_of_staging(feed: MakeFeed) -> None:
    """Whatever its shape, urgent ones first, and what waited for memory; what is staged meanwhile comes behind."""
    one = feed(workers=8, batch_size=1, prefetch_factor=1)
    one.put(1, 2)
    one.settle()
    one.put(3, 6, shape=LARGE_SHAPE)
    one.put(4, 7)
    one.put(5, shape=LONG_SHAPE)
    one.put_image(replace(staged(8, Path("8.img"), header(*PAGE_SHAPE), staged_at=1e9), urgent=True))
    one.settle()
    one.feeder.stop()
    one.engine.succeed_all()
    assert one.drain() == [[1], [2]]
    one.feeder.close()
    one.put(9)
    one.feeder.close()
    assert [image.id for image in one.source.images] == [8, 3, 4, 5, 6, 7, 9]


def test_another_feeder_goes_on_where_the_first_one_stopped(feed: MakeFeed) -> None:
    """On the same source; together they bring every image once."""
    one, other = feed(at_once=True, batch_size=2), feed(at_once=True, batch_size=2)
    other.feeder.close()
    one.put(*range(9))
    first = one.use(one.next())
    one.feeder.stop()
    drained = [number for batch in one.drain() for number in batch]
    one.feeder.close()
    one.source.end()
    second = BatchFeeder(
        other.plan, one.source, other.arena, other.engine, other._record, other.admitted.append, other._isolate
    )
    try:
        rest = [number for batch in second for number in other.use(batch)]
    finally:
        second.close()
    assert first + drained + rest == list(range(9))


def test_closing_while_waiting_for_memory_ends_the_wait(feed: MakeFeed) -> None:
    """The consumer holds all memory and gives up: nothing hangs, and its batch may end later."""
    one = feed(at_once=True, batch_size=1, prefetch_factor=4, arena_bytes=ONE)
    one.put(1, 2)
    batch = one.next()
    assert batch is not None
    one.settle()
    one.close()
    with batch:
        assert (batch.images == 1).all()  # its memory is its own until it ends


def test_closing_wakes_a_consumer_in_another_thread(feed: MakeFeed) -> None:
    """It learns that no batch will come."""
    one = feed()
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(one.next)
        wait_until(lambda: len(one.feeder._changed._waiters) == 2)  # type: ignore[attr-defined]
        one.close()
        assert asked.result(PATIENCE_S) is None


# The consumer


def test_a_batch_is_gone_before_the_next_one_is_waited_for(feed: MakeFeed) -> None:
    """With room for one batch, a consumer that frees each gets all of them."""
    one = feed(at_once=True, batch_size=1, arena_bytes=ONE)
    one.put(*range(10))
    one.source.end()
    assert one.drain() == [[number] for number in range(10)]


def test_the_feeder_keeps_no_reference_to_a_batch_in_use(feed: MakeFeed) -> None:
    """Nothing but the consumer decides how long its view lives."""
    one = feed(at_once=True)
    one.put(1)
    batch = one.next()
    assert batch is not None
    images = weakref.ref(batch.images)
    one.use(batch)
    gc.collect()
    assert images() is None
    assert batch.images.numel() == 0  # a freed batch shows nothing


def test_it_is_known_whether_a_batch_was_there_when_it_was_asked_for(feed: MakeFeed) -> None:
    """A fast consumer waits, a slow one does not."""
    one = feed(batch_size=1)
    one.put(1)
    one.settle()
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(one.next)
        wait_until(lambda: len(one.feeder._changed._waiters) == 2)  # type: ignore[attr-defined]
        one.engine.succeed_all()
        one.use(asked.result(PATIENCE_S))
    assert not one.feeder.last_ready
    one.put(2)
    one.settle()
    one.engine.succeed_all()
    one.use(one.next())
    assert one.feeder.last_ready


def test_a_suspect_is_decoded_elsewhere_and_alone(feed: MakeFeed) -> None:
    """What came before is out of the arena when it goes in, and nothing follows before it is out again."""
    one = feed(at_once=True, batch_size=4, prefetch_factor=4)
    one.put(1)
    before = one.next()
    one.put_image(replace(staged(2, Path("2.img"), header(*PAGE_SHAPE), 1.0), suspect=True))
    one.settle()
    one.put(3)
    one.source.end()
    one.settle()
    assert one.isolated is None
    assert one.use(before) == [1]
    suspect = one.next()
    one.settle()
    assert one.isolated is not None
    assert one.isolated.numbers == [2]
    assert one.engine.numbers == [1]
    assert one.use(suspect) == [2]
    assert one.drain() == [[3]]
    assert [[image.id for image in images] for images in one.admitted] == [[1], [2], [3]]


def test_an_image_whose_file_is_gone_is_given_back_and_ends_nothing(feed: MakeFeed) -> None:
    """Another worker of the journal removed it: the others of its batch have their pixels."""
    one = feed(batch_size=3)
    with one.source.changed:
        one.put(1, 2, 3)
    one.settle()
    one.engine.fail(one.engine.decodes[1], FileNotFoundError(2, "No such file or directory"))
    one.engine.succeed_all()
    one.source.end()
    assert one.drain() == [[1, 3]]
    assert (one.lost, one.failures) == ([2], [])
