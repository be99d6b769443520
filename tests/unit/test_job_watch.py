"""One place asks Antenna about a job, and everybody reads what was seen there."""

from __future__ import annotations

import threading

import pytest

from adc_worker.antenna.job_watch import JobWatch
from adc_worker.antenna.wire import JobState
from adc_worker.errors import AntennaUnavailable


class Antenna:
    """Answers with the state that a test sets, on a clock that a test moves."""

    def __init__(self) -> None:
        self.status = "STARTED"
        self.away = False
        self.asked = 0
        self.now_s = 100.0

    def job(self, job_id: int) -> JobState:
        self.asked += 1
        if self.away:
            raise AntennaUnavailable("503")
        return JobState(id=job_id, status=self.status)

    def now(self) -> float:
        return self.now_s


def test_a_look_asks_unless_the_last_answer_is_young_enough() -> None:
    """An answer of 3 s ago serves who accepts 5 s, and not who accepts 2 s."""
    antenna = Antenna()
    watch = JobWatch(antenna.job, antenna.now)
    watch.look(7)
    antenna.now_s += 3
    antenna.status = "SUCCESS"
    assert watch.look(7, max_age_s=5.0).state.status == "STARTED"
    assert watch.look(7, max_age_s=2.0).state.status == "SUCCESS"
    assert antenna.asked == 2


def test_jobs_are_seen_apart() -> None:
    """What was seen of one says nothing about another."""
    antenna = Antenna()
    watch = JobWatch(antenna.job, antenna.now)
    antenna.status = "REVOKED"
    watch.look(7)
    assert watch.is_lost(7)
    assert not watch.is_lost(8)
    assert watch.last(8) is None


def test_an_antenna_that_does_not_answer_changes_nothing() -> None:
    """What was seen before stays, with its age."""
    antenna = Antenna()
    watch = JobWatch(antenna.job, antenna.now)
    before = watch.look(7)
    antenna.away = True
    with pytest.raises(AntennaUnavailable):
        watch.look(7)
    assert watch.last(7) == before


def test_what_is_forgotten_is_asked_for_anew() -> None:
    """A job that was cancelled may be retried: an old sight must not end it."""
    antenna = Antenna()
    watch = JobWatch(antenna.job, antenna.now)
    antenna.status = "REVOKED"
    watch.look(7)
    watch.forget(7)
    assert not watch.is_lost(7)
    antenna.status = "STARTED"
    assert watch.look(7, max_age_s=60.0).state.status == "STARTED"


def test_who_comes_while_a_request_is_under_way_shares_an_answer_that_is_young_enough() -> None:
    """Ten threads that accept an answer of the last second cost one request."""
    antenna = Antenna()
    may_answer = threading.Event()

    def slow(job_id: int) -> JobState:
        may_answer.wait(10)
        return antenna.job(job_id)

    watch = JobWatch(slow, antenna.now)
    threads = [threading.Thread(target=watch.look, args=(7, 1.0)) for _ in range(10)]
    for thread in threads:
        thread.start()
    may_answer.set()
    for thread in threads:
        thread.join()
    assert antenna.asked == 1
