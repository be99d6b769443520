"""An image is found guilty only where the machine is shown to be innocent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from adc_worker.antenna.leases import LeaseTerms, lease_clock
from adc_worker.antenna.wire import error_result
from adc_worker.errors import ImageError, WorkerFault
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.download import ImageClient
from adc_worker.ingest.staging import StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.runtime.outcomes import STRUCK_OUT_MAX, JobOutcomes
from tests.support.fakes import Receiver, result, task
from tests.support.waiting import wait_until

JOB = 7


class Bench:
    """A journal with tasks that are out, and one behind them that is not."""

    def __init__(self, folder: Path, out: int) -> None:
        self.journal = Journal(folder / "journal.db")
        self.receiver = Receiver()
        self.images = ImageClient(1_000_000, AddressPolicy("127.0.0.1"))
        self.poster = Poster(self.journal, self.receiver, PosterLimits(1, 10_000))
        self.staging = StagingArea(folder, self.images, 1_000_000)
        self.held = self.journal.record(JOB, [task(number) for number in range(out + 1)])
        for held in self.held[:-1]:
            for _strike in range(2):
                self.journal.begin([held.id], 0, alone=True)
                self.journal.accuse((os.getpid(), "SIGSEGV"), 0)

    def outcomes(self) -> JobOutcomes:
        return JobOutcomes(JOB, self.journal, self.staging, self.poster)


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[list[Bench]]:
    made = [Bench(tmp_path / str(out), out) for out in (STRUCK_OUT_MAX - 1, STRUCK_OUT_MAX)]
    yield made
    for bench in made:
        bench.poster.close(0)
        bench.images.close()
        bench.journal.close()


def test_an_image_that_is_out_gets_an_error_that_says_how_often_and_how(benches: list[Bench]) -> None:
    """When others have succeeded; until then it waits."""
    bench = benches[0]
    outcomes = bench.outcomes()
    assert (len(outcomes.struck_out), outcomes.settled) == (STRUCK_OUT_MAX - 1, 0)
    outcomes.fail_struck_out()
    assert (len(outcomes.struck_out), outcomes.failed.total()) == (0, STRUCK_OUT_MAX - 1)
    wait_until(lambda: len(bench.receiver.bodies) == STRUCK_OUT_MAX - 1)
    assert all(b"ended the worker 2 times (SIGSEGV, SIGSEGV)" in body for body in bench.receiver.bodies)


def test_several_in_a_row_are_this_machines_fault(benches: list[Bench]) -> None:
    """No error result; their strikes are taken back, and the worker says whom to look at."""
    bench = benches[1]
    with pytest.raises(WorkerFault, match="this machine or the model is at fault"):
        bench.outcomes()
    assert {held.strikes for held in bench.journal.unfinished(JOB)} == {(), None}
    assert bench.outcomes().struck_out == []


def test_images_that_are_out_wait_for_a_success_and_are_left_to_their_leases_without_one(benches: list[Bench]) -> None:
    """Where no image ever succeeded the machine may be at fault, which is never an error of an image."""
    bench = benches[0]
    outcomes = bench.outcomes()
    lease = LeaseTerms()
    assert not outcomes.job_has_succeeded()
    outcomes.give_up_struck_out(lease)
    assert len(outcomes.struck_out) == STRUCK_OUT_MAX - 1, "their leases last"
    lease.ack_wait_s = 1e-6
    wait_until(lambda: lease.left_s(outcomes.struck_out[-1].fetched_at, lease_clock()) < -0.001)
    outcomes.give_up_struck_out(lease)
    assert (outcomes.struck_out, outcomes.given_up, outcomes.failed.total()) == ([], STRUCK_OUT_MAX - 1, 0)


@pytest.mark.parametrize("accepted", [False, True])
def test_a_result_on_record_shows_that_this_machine_works_and_an_error_does_not(
    benches: list[Bench], *, accepted: bool
) -> None:
    """Kept or accepted: images that fail are no proof of a machine that infers."""
    bench = benches[0]
    outcomes = bench.outcomes()
    more = bench.journal.record(JOB, [task(100), task(101)])
    for held, body in zip(more, (error_result("100", "broken"), result(101)), strict=True):
        assert not outcomes.job_has_succeeded()
        bench.journal.keep([(held.id, [body])])
        if accepted:
            bench.journal.settle([held.id])
    assert outcomes.job_has_succeeded()


def test_an_error_is_not_kept_for_a_task_of_another_image(benches: list[Bench]) -> None:
    """Errors are compared with the journal as results are: its file may have been replaced."""
    bench = benches[0]
    held = bench.held[0]
    another = held.task.model_copy(update={"image_id": "another"})
    with pytest.raises(WorkerFault, match="of image another"):
        bench.outcomes().fail(held.id, another, ImageError("no JPEG"))
    assert bench.journal.unposted_count() == 0
