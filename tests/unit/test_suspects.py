"""An image is found guilty only where the machine is shown to be innocent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from adc_worker.errors import WorkerFault
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.download import ImageClient
from adc_worker.ingest.staging import StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.runtime.outcomes import ImageResult, JobOutcomes
from adc_worker.runtime.suspects import SEVERAL, StruckOut
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
        self.outcomes = JobOutcomes(JOB, self.journal, StagingArea(folder, self.images, 1_000_000), self.poster)
        self.held = self.journal.record(JOB, [task(number) for number in range(out + 1)])
        for held in self.held[:-1]:
            for _strike in range(2):
                self.journal.begin([held.id], 0, alone=True)
                self.journal.accuse((os.getpid(), "SIGSEGV"), 0)

    def succeed_with_the_last(self) -> None:
        body = result(len(self.held) - 1)
        self.outcomes.succeed([ImageResult(self.held[-1].id, [body], detections=0, truncated=False)])


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[list[Bench]]:
    made = [Bench(tmp_path / str(out), out) for out in (SEVERAL - 1, SEVERAL)]
    yield made
    for bench in made:
        bench.poster.close(0)
        bench.images.close()
        bench.journal.close()


def test_the_verdict_waits_until_another_image_succeeds(benches: list[Bench]) -> None:
    """Its error names how often and how the worker ended."""
    bench = benches[0]
    struck_out = StruckOut(JOB, bench.journal, bench.outcomes)
    struck_out.fail_once_others_succeed()
    assert bench.outcomes.settled == 0
    bench.succeed_with_the_last()
    struck_out.fail_once_others_succeed()
    assert bench.outcomes.failed.total() == SEVERAL - 1
    wait_until(lambda: len(bench.receiver.bodies) == SEVERAL)
    assert any(b"ended the worker 2 times (SIGSEGV, SIGSEGV)" in body for body in bench.receiver.bodies)


def test_several_in_a_row_are_this_machines_fault(benches: list[Bench]) -> None:
    """No error result; their strikes are taken back, and the worker says whom to look at."""
    bench = benches[1]
    with pytest.raises(WorkerFault, match="this machine or the model is at fault"):
        StruckOut(JOB, bench.journal, bench.outcomes)
    assert bench.outcomes.settled == 0
    assert {held.strikes for held in bench.journal.unfinished(JOB)} == {(), None}
    StruckOut(JOB, bench.journal, bench.outcomes).fail()
    assert bench.outcomes.settled == 0
