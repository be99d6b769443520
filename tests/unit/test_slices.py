"""Jobs that share workers: each saves in time, none starves, and sharing costs little."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping

import pytest

from adc_worker.antenna.wire import JobRef
from adc_worker.runtime.slices import JobBoard, Turn

RULE_S = 600.0  # a job that saves nothing for so long is failed (contract)


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
            for job_id in board.unlisted(listed):
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


def test_six_jobs_on_two_workers_all_save_in_time_and_cost_little_more_than_in_series() -> None:
    """2 x 10, 2 x 100 and 2 x 500 images of 4 s, 2 s for every switch: no silence near ten minutes, within 5 %."""
    images = {1: 10, 2: 500, 3: 100, 4: 10, 5: 500, 6: 100}
    simulation = Simulation(images, workers=2, image_s=4.0, switch_s=2.0)
    took_s = simulation.run()
    assert {job_id: len(times) for job_id, times in simulation.saved_at.items()} == images
    assert max(map(longest_silence_s, simulation.saved_at.values())) < 0.9 * RULE_S
    in_series_s = sum(images.values()) * 4.0 / 2
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
