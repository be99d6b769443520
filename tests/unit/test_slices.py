"""Jobs that share workers: each saves in time, none starves, and sharing costs little."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.wire import DELETED, JobRef, JobState
from adc_worker.errors import AntennaError, AntennaRefused, AntennaRejected, AntennaUnavailable, AntennaUnreachable
from adc_worker.journal.journal import Journal
from adc_worker.runtime.slices import BUSY_POLL_S, POLL_BACKOFF_MAX_S, JobBoard, JobPoller, Turn
from tests.support.fakes import task
from tests.support.waiting import wait_until

RULE_S = 600.0  # a job that saves nothing for so long is failed (docs/antenna.md)


def refs(*job_ids: int) -> list[JobRef]:
    return [JobRef(id=job_id, pipeline_slug="simulated") for job_id in job_ids]


def never() -> bool:
    return False


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def a_board(*job_ids: int, longest_s: float = 120.0) -> tuple[JobBoard, Clock]:
    clock = Clock()
    board = JobBoard(longest_s, 5.0, clock, seed=1)
    board.add(refs(*job_ids))
    return board, clock


def take(board: JobBoard) -> Turn:
    turn = board.next_turn(never)
    assert turn is not None
    return turn


class Simulation:
    """Workers, each with a board of its own, and jobs that count down; time jumps from event to event."""

    def __init__(self, images: Mapping[int, int], workers: int, image_s: float, switch_s: float) -> None:
        self.left = dict(images)
        self.saved_at: dict[int, list[float]] = defaultdict(list)
        self._image_s, self._switch_s = image_s, switch_s
        self._clock = Clock()
        self._workers = [
            self._work(JobBoard(120.0, 5.0, self._clock, seed=number)) for number in range(workers)
        ]  # fmt: skip

    def run(self) -> float:
        """Return when the last worker found nothing left."""
        due = [(0.0, number) for number in range(len(self._workers))]
        while due:
            self._clock.now_s, number = heapq.heappop(due)
            pause_s = next(self._workers[number], None)
            if pause_s is not None:
                heapq.heappush(due, (self._clock.now_s + pause_s, number))
        return max(max(times) for times in self.saved_at.values())

    def _work(self, board: JobBoard) -> Iterator[float]:
        while any(self.left.values()):
            listed = refs(*(job_id for job_id, left in self.left.items() if left))
            board.add(listed)
            for job_id in board.job_ids() - {job.id for job in listed}:
                board.drop(job_id)
            turn = board.next_turn(never)
            if turn is None:
                yield 1.0
                continue
            yield self._switch_s
            tasks = 0
            job_id = turn.entry.id
            while self.left[job_id] and not turn.fetches_no_more(0.0):
                self.left[job_id] -= 1
                tasks += 1
                yield self._image_s
                self.saved_at[job_id].append(self._clock.now_s)
            board.end_turn(turn, tasks, ended_empty=not self.left[job_id], switch_s=self._switch_s)


def longest_silence_s(times: list[float]) -> float:
    return max(later - earlier for earlier, later in zip([0.0, *times], times, strict=False))


@pytest.mark.parametrize("image_s", [0.5, 4.0, 15.0])
def test_six_jobs_on_two_workers_all_save_in_time_and_cost_little_more_than_in_series(image_s: float) -> None:
    """2 x 10, 2 x 100 and 2 x 500 images, 2 s for every switch: no silence near ten minutes, within 5 % of serial.

    Silence counts from a job's start to its first result, too, and a job that starves would not have all of its own.
    """
    images = {1: 10, 2: 500, 3: 100, 4: 10, 5: 500, 6: 100}
    simulation = Simulation(images, workers=2, image_s=image_s, switch_s=2.0)
    took_s = simulation.run()
    assert {job_id: len(times) for job_id, times in simulation.saved_at.items()} == images
    assert max(map(longest_silence_s, simulation.saved_at.values())) < 0.9 * RULE_S
    in_series_s = sum(images.values()) * image_s / 2
    assert took_s < 1.05 * in_series_s


def test_one_worker_gives_five_jobs_their_turns_within_ten_minutes() -> None:
    """Without slices the last would wait for an hour."""
    simulation = Simulation(dict.fromkeys(range(1, 6), 300), workers=1, image_s=4.0, switch_s=5.0)
    simulation.run()
    assert max(map(longest_silence_s, simulation.saved_at.values())) < RULE_S


def test_a_job_alone_has_no_slice() -> None:
    board, clock = a_board(1)
    turn = take(board)
    clock.now_s = 1e6
    assert not turn.fetches_no_more(1e6)


@pytest.mark.parametrize(("jobs", "slice_s"), [(2, 120.0), (5, 120.0), (9, 60.0), (49, 10.0)])
def test_a_slice_is_120_s_or_480_s_over_the_waiting(jobs: int, slice_s: float) -> None:
    """What is in hand belongs to it."""
    board, clock = a_board(*range(jobs))
    turn = take(board)
    clock.now_s = slice_s - 3.0
    assert not turn.fetches_no_more(2.9)
    assert turn.fetches_no_more(3.0)


def test_a_slice_lasts_five_times_what_a_switch_costs() -> None:
    """And with more jobs than that allows, some stay unstarted."""
    board, clock = a_board(*range(20))
    seen = []
    for _ in range(40):
        turn = take(board)
        assert not turn.fetches_no_more(0.0)
        while not turn.fetches_no_more(0.0):
            clock.now_s += 10.0
        seen.append((turn.entry.id, clock.now_s - turn.started_at))
        board.end_turn(turn, 5, ended_empty=False, switch_s=20.0)
    assert {round(slice_s) for _job, slice_s in seen[1:]} == {100}
    assert len({job for job, _ in seen}) == 5  # four wait for 400 s; five would for 500 s


def test_small_jobs_go_in_between_and_the_larger_one_goes_on() -> None:
    """Its slice is not started anew: a stream of small jobs cannot keep a third waiting."""
    board, clock = a_board(1)
    board.describe(1, 500)
    large = take(board)
    clock.now_s = 50.0
    board.add(refs(1, 2, 3))
    board.describe(2, 8)
    board.describe(3, 9)
    assert large.breaks_off()
    board.end_turn(large, 40, ended_empty=False)
    small = take(board)
    assert small.entry.id == 2
    assert not small.breaks_off()
    board.end_turn(small, 8, ended_empty=True)
    clock.now_s = 60.0
    again = take(board)
    assert again.entry.id == 1
    assert not again.breaks_off()
    assert not again.fetches_no_more(60.0)
    assert again.fetches_no_more(70.0)
    board.end_turn(again, 40, ended_empty=False)
    assert take(board).entry.id == 3


def test_an_empty_answer_is_asked_again_ever_less_often() -> None:
    """Up to a minute; it may mean that peers hold the rest. A task that comes starts the row anew."""
    board, clock = a_board(1)
    pauses = []
    for tasks in (0, 0, 0, 0, 0, 0, 3):
        turn = take(board)
        board.end_turn(turn, tasks, ended_empty=True)
        left_at = clock.now_s
        while board.next_turn(never) is None:
            clock.now_s += 0.25
        pauses.append(clock.now_s - left_at)
    assert all(0.75 < pause / wanted < 1.3 for pause, wanted in zip(pauses, (5, 10, 20, 40, 60, 60, 5), strict=True))
    assert pauses[5] > 45
    assert pauses[6] < 7


def test_a_lost_job_breaks_off_and_is_forgotten() -> None:
    board, _clock = a_board(1)
    turn = take(board)
    assert not turn.is_stopping()
    board.drop(1)
    assert turn.is_stopping()
    assert turn.breaks_off()
    assert board.next_turn(never) is None


def test_a_drain_ends_a_turn_without_breaking_it_off() -> None:
    """What is admitted is still inferred."""
    board, _clock = a_board(1)
    turn = board.next_turn(lambda: True)
    assert turn is not None
    assert turn.is_stopping()
    assert turn.fetches_no_more(0.0)
    assert not turn.breaks_off()


class Antenna(AntennaClient):
    """A job list of the test's making; every request is counted."""

    def __init__(self) -> None:
        self.listed: list[JobRef] = []
        self.states: dict[int, JobState | AntennaError] = {}
        self.polls = 0
        self.fault: AntennaError | None = None

    def jobs(self, pipeline_slugs: Sequence[str], project: int | None = None) -> list[JobRef]:
        assert (list(pipeline_slugs), project) == (["simulated"], 3)
        self.polls += 1
        if self.fault is not None:
            raise self.fault
        return self.listed

    def job(self, job_id: int) -> JobState:
        told = self.states[job_id]
        if isinstance(told, AntennaError):
            raise told
        return told


def state(job_id: int, **changes: Any) -> JobState:
    fields = {"id": job_id, "status": "STARTED", "pipeline": {"slug": "simulated"}, **changes}
    return JobState.model_validate(fields)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db")
    yield journal
    journal.close()


@contextmanager
def polling(antenna: Antenna, journal: Journal, idle_s: float = 0.01) -> Iterator[tuple[JobPoller, JobBoard]]:
    board = JobBoard(120.0, idle_s)
    poller = JobPoller(board, antenna, journal, ["simulated"], 3)
    poller.start()
    try:
        yield poller, board
    finally:
        poller.close()


@pytest.mark.parametrize(
    "over",
    [{"status": "REVOKED"}, {"status": "CANCELING"}, {"status": "SUCCESS"}, {"dispatch_mode": "sync_api"}],
)
def test_what_is_kept_for_a_job_that_takes_nothing_is_never_posted(journal: Journal, over: dict[str, Any]) -> None:
    """Cancelled, final, or not a job for workers that pull: a post would be useless or do harm."""
    (held,) = journal.record(7, [task(1)])
    journal.keep([(held.id, [b"result"])])
    antenna = Antenna()
    antenna.states = {7: state(7, **over)}
    with polling(antenna, journal) as (poller, _board):
        wait_until(lambda: not journal.unposted_count())
        wait_until(lambda: poller._lost)
    assert poller.take_lost() == [(7, [])], "a computed image has no staged file"


@pytest.mark.parametrize(
    "error",
    [AntennaRefused("answered 403", 403), AntennaUnavailable("answered 500"), AntennaRejected("answered 405", 405)],
)
def test_a_job_that_cannot_be_seen_costs_no_other_its_look(journal: Journal, error: AntennaError) -> None:
    """Its project was made private, or Antenna fails at it: that another is over is noticed, and the poll counts."""
    journal.record(5, [task(1)])
    journal.record(9, [task(2)])
    antenna = Antenna()
    antenna.states = {5: error, 9: state(9, status="REVOKED")}
    with polling(antenna, journal) as (poller, _board):
        wait_until(lambda: journal.job_ids() == {5})
        wait_until(lambda: poller.is_fresh)
        assert poller.failure is None
        assert poller.refused_jobs == ({5} if isinstance(error, AntennaRefused) else set())
        antenna.states[5] = state(5)
        wait_until(lambda: not poller.refused_jobs)


@pytest.mark.parametrize("error", [AntennaUnreachable("reset"), AntennaRefused("answered 401", 401)])
def test_a_poll_fails_where_no_job_can_be_seen_any_more(journal: Journal, error: AntennaError) -> None:
    """The way to Antenna, or the token: each further look would only wait as long again."""
    journal.record(5, [task(1)])
    antenna = Antenna()
    antenna.states = {5: error}
    with polling(antenna, journal) as (poller, _board):
        wait_until(lambda: poller.failure is error)
        assert not poller.is_fresh


def test_a_job_is_deleted_when_antenna_says_so_twice(journal: Journal) -> None:
    """One answer may come from an Antenna that is being set up anew; the second one is of another poll."""
    (held,) = journal.record(7, [task(1)])
    journal.keep([(held.id, [b"result"])])
    antenna = Antenna()
    antenna.states = {7: JobState(id=7, status=DELETED)}
    with polling(antenna, journal, idle_s=600.0) as (poller, _board):
        wait_until(lambda: poller.is_fresh)
        assert journal.unposted_count() == 1
        with poller.busy():
            pass  # its end makes the next poll due
        wait_until(lambda: not journal.unposted_count())


def test_a_job_that_antenna_serves_and_does_not_list_gets_its_turn(journal: Journal) -> None:
    """It is known from the journal of an earlier run."""
    journal.record(7, [task(1)])
    antenna = Antenna()
    antenna.states[7] = state(
        7, progress={"stages": [{"key": "collect", "params": [{"key": "total_images", "value": 9}]}]}
    )
    with polling(antenna, journal) as (_poller, board):
        wait_until(lambda: board.next_turn(never) is not None)
        entry = take(board).entry
        wait_until(lambda: entry.tasks == 9)
    assert (entry.id, entry.pipeline_slug) == (7, "simulated")


def test_a_held_job_of_a_pipeline_that_is_not_worked_on_gets_no_turn(journal: Journal) -> None:
    """Another selection of pipelines left it; it is told apart, so that nobody waits for it. Its run is noted."""
    journal.record(7, [task(1)])
    antenna = Antenna()
    antenna.states[7] = state(7, pipeline={"slug": "beetles"}, started_at="2026-01-01T00:00:00")
    with polling(antenna, journal) as (poller, board):
        wait_until(lambda: poller.jobs_of_other_pipelines == {7})
        assert board.next_turn(never) is None
        assert journal.incarnation_age_s(7) < float("inf")
        journal.forget([held.id for held in journal.unfinished(7)])
        wait_until(lambda: not poller.jobs_of_other_pipelines)


def test_polls_go_on_while_a_job_has_its_turn(journal: Journal) -> None:
    """They are the heartbeat, also while models load; less often than those of an idle worker, never over a minute."""
    antenna = Antenna()
    with polling(antenna, journal) as (poller, _board), poller.busy():
        before = antenna.polls
        wait_until(lambda: antenna.polls > before + 2)
    assert max(BUSY_POLL_S, POLL_BACKOFF_MAX_S) * 1.2 <= 60


def test_polls_get_rarer_the_longer_there_is_no_work() -> None:
    """From 5 s to 30 s in two minutes, at once while busy; a turn with a task starts anew, an empty one does not."""
    board, clock = a_board(1)
    turn = take(board)
    clock.now_s = 20.0
    assert board.poll_pause_s(busy=False) == 5.0
    assert board.poll_pause_s(busy=True) == 30.0
    clock.now_s = 60.0
    board.end_turn(turn, 0, ended_empty=True)
    assert board.poll_pause_s(busy=False) == 15.0
    clock.now_s = 1000.0
    assert board.poll_pause_s(busy=False) == 30.0
    board.end_turn(take(board), 1, ended_empty=True)
    assert board.poll_pause_s(busy=False) == 5.0


def test_an_antenna_that_never_answered_is_told_from_an_outage(journal: Journal) -> None:
    """The first is a setting to correct."""
    antenna = Antenna()
    antenna.fault = AntennaUnreachable("refused")
    with polling(antenna, journal) as (poller, _board):
        wait_until(lambda: poller.failure is antenna.fault)
        antenna.fault = None
        wait_until(lambda: poller.failure is None)
        antenna.fault = AntennaUnreachable("an outage")
        before = antenna.polls
        wait_until(lambda: antenna.polls > before + 1)
        assert poller.failure is None
