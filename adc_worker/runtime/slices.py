"""Which jobs there are, whose turn it is, and for how long.

The board is pure (its clock is given), the poller fills it; neither knows what a turn is spent on.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import lease_clock
from adc_worker.antenna.wire import DELETED, JobRef
from adc_worker.errors import AntennaError, AntennaRefused, AntennaUnreachable
from adc_worker.journal.journal import Journal
from adc_worker.log import get_logger

_log = get_logger(__name__)

SMALL_JOB_TASKS = 8
# Antenna fails the pending images of a job that saved nothing for 600 s (docs/antenna.md). Each has its turn before.
ROUND_S = 480.0
SWITCHES_PER_SLICE = 5  # a slice lasts at least as many times what a switch costs
EMPTY_BACKOFF_MAX_S = 60.0
# A service that shows no sign of life for 60 s counts as offline (docs/antenna.md). Polls are closer, jitter included.
BUSY_POLL_S, POLL_BACKOFF_MAX_S = 30.0, 50.0
BUSY_POLL_FACTOR = 6  # x AMI_ANTENNA_IDLE_SLEEP_SECONDS, up to BUSY_POLL_S; also after a long rest
REST_SHARE = 1 / 4  # of the time without a task: the next poll may be as late again
LOOKS_PER_POLL = 10
CLOSE_TIMEOUT_S = 2.0
_REFUSED_JOB_ADVICE = (
    "its results stay on this host until Antenna shows it again: check what the user of AMI_ANTENNA_API_AUTH_TOKEN may"
    " do in its project"
)
SMALL_JOB_PATIENCE = 3  # doublings: after its turn a small job is probably being saved, and to ask interrupts others


@dataclass(slots=True)
class JobEntry:
    """What is known of a job between its turns; seconds are the board's clock's."""

    id: int
    pipeline_slug: str
    waiting_since: float
    last_task_at: float
    asked_at: float
    tasks: int | None = None
    begun: bool = False
    lost: bool = False
    used_s: float = 0.0  # of a slice that small jobs interrupted
    not_before: float = 0.0
    empty_turns: int = 0

    @property
    def is_small(self) -> bool:
        return self.tasks is not None and self.tasks <= SMALL_JOB_TASKS


class Turn:
    """One job's turn, as the job sees it; safe to ask from several threads."""

    def __init__(self, board: JobBoard, entry: JobEntry, started_at: float, draining: Callable[[], bool]) -> None:
        self.entry = entry
        self.started_at = started_at
        self._board = board
        self._draining = draining

    def fetches_no_more(self, work_left_s: float) -> bool:
        """Whether finishing what is in hand, for `work_left_s`, fills the slice while others wait."""
        return self.is_stopping() or self._board.is_over(self, work_left_s)

    def is_stopping(self) -> bool:
        """Whether to stop: the worker drains, or the turn breaks off."""
        return self._draining() or self.breaks_off()

    def breaks_off(self) -> bool:
        """Whether to stop after the batch in hand: the job is lost, or a small one waits for this larger one."""
        return self.entry.lost or self._board.small_one_waits_for(self.entry)


class JobBoard:
    """The jobs this worker may work on. A poll fills it from its thread, the worker takes turns from its own."""

    def __init__(
        self, longest_slice_s: float, idle_s: float, now: Callable[[], float] = time.monotonic, seed: int | None = None
    ) -> None:
        self._longest_s = longest_slice_s
        self._idle_s = idle_s
        self._now = now
        self._random = random.Random(seed)  # noqa: S311 (jitter, no secret)
        self._lock = threading.RLock()
        self._entries: dict[int, JobEntry] = {}
        self._switch_s = 0.0
        self._worked_at = now()

    def add(self, listed: Sequence[JobRef], held: Collection[int] = ()) -> None:
        """Take in what Antenna lists; new jobs of which tasks are `held` go first, their leases run."""
        now = self._now()
        with self._lock:
            for job in self._random.sample(listed, len(listed)):  # a fleet must not queue at the same job
                since = now - ROUND_S if job.id in held else now
                self._entries.setdefault(job.id, JobEntry(job.id, job.pipeline_slug, since, now, now))

    def to_describe(self) -> list[int]:
        """Return jobs of unknown size, where there is a choice to make."""
        with self._lock:
            return [one.id for one in self._entries.values() if one.tasks is None] if len(self._entries) > 1 else []

    def describe(self, job_id: int, tasks: int | None) -> None:
        with self._lock:
            if job_id in self._entries:
                self._entries[job_id].tasks = tasks

    def job_ids(self) -> set[int]:
        with self._lock:
            return set(self._entries)

    def drop(self, job_id: int) -> None:
        """Forget a job; a turn that it has ends."""
        with self._lock:
            entry = self._entries.pop(job_id, None)
            if entry is not None:
                entry.lost = True

    def next_turn(self, draining: Callable[[], bool]) -> Turn | None:
        """Return the turn of the job that waited longest, small ones first; None while no job may be asked."""
        with self._lock:
            ready = self._waiting(None)
            begun = [one for one in self._entries.values() if one.begun]
            if len(begun) > ROUND_S / max(SWITCHES_PER_SLICE * self._switch_s, 1e-6):  # more would come too late
                ready = [one for one in ready if one.begun or one.is_small] or ready
            if not ready:
                return None
            first = min(ready, key=lambda one: (not one.is_small, one.waiting_since))
            return Turn(self, first, self._now(), draining)

    def end_turn(
        self,
        turn: Turn,
        tasks: int,
        *,
        ended_empty: bool,
        answered: bool = True,
        switch_s: float | None = None,
        due_in_s: float = float("inf"),
    ) -> None:
        """Put a job back in line.

        `tasks`: how many it had for us. `ended_empty`: there were no more for now, or Antenna failed to answer, which
        `answered` tells. `switch_s`: seconds of the turn before its first batch, where there was one. `due_in_s`: until
        a task that it left on record may be tried again.
        """
        entry, now = turn.entry, self._now()
        with self._lock:
            if switch_s is not None:
                self._switch_s = (self._switch_s + switch_s) / 2 if self._switch_s else switch_s
            if not ended_empty and self.small_one_waits_for(entry):  # it goes on where it was, before those behind it
                entry.used_s += now - turn.started_at
            else:
                entry.used_s, entry.waiting_since = 0.0, now
            entry.asked_at = now if answered else entry.asked_at
            if tasks:
                entry.begun, entry.last_task_at, self._worked_at = True, now, now
                entry.empty_turns = SMALL_JOB_PATIENCE if entry.is_small else 0
            if ended_empty:
                pause_s = min(self._idle_s * 2 ** min(entry.empty_turns, 10), EMPTY_BACKOFF_MAX_S)
                pause_s *= self._random.uniform(0.8, 1.2)
                entry.not_before = now + min(pause_s, max(self._idle_s, due_in_s))
                entry.empty_turns += 1

    def is_over(self, turn: Turn, work_left_s: float) -> bool:
        with self._lock:
            used_s = turn.entry.used_s + self._now() - turn.started_at
            return used_s + work_left_s >= self.slice_s(len(self._waiting(turn.entry)))

    def slice_s(self, waiting: int) -> float:
        """Return how long a turn may last while that many other jobs wait."""
        if not waiting:
            return float("inf")
        return max(SWITCHES_PER_SLICE * self._switch_s, min(self._longest_s, ROUND_S / waiting))

    def small_one_waits_for(self, entry: JobEntry) -> bool:
        with self._lock:
            return not entry.is_small and any(one.is_small for one in self._waiting(entry))

    def idle_s(self) -> float:
        """Return for how long every job, when last asked, had had no task for us; infinite when there is no job."""
        with self._lock:
            return min((one.asked_at - one.last_task_at for one in self._entries.values()), default=float("inf"))

    def poll_pause_s(self, *, busy: bool) -> float:
        """Return how long until the next poll: longer while a job has its turn, and the longer none had a task."""
        longest_s = min(BUSY_POLL_S, BUSY_POLL_FACTOR * self._idle_s)
        rested_s = self._now() - self._worked_at
        return max(self._idle_s, longest_s if busy else min(longest_s, REST_SHARE * rested_s))

    def _waiting(self, besides: JobEntry | None) -> list[JobEntry]:
        now = self._now()
        return [one for one in self._entries.values() if one is not besides and now >= one.not_before]


class JobPoller:
    """Polls the job list in the background: finds work, shows that we live, notices jobs that are over or cancelled."""

    def __init__(
        self, board: JobBoard, client: AntennaClient, journal: Journal, slugs: Sequence[str], project: int | None
    ) -> None:
        self.failure: AntennaError | None = None  # of the last poll, where not one succeeded so far
        self.is_fresh = False  # the list was seen since the last turn
        self._board = board
        self._client = client
        self._journal = journal
        self._slugs = slugs
        self._project = project
        self._lost: deque[tuple[int, list[int]]] = deque()
        # Held from an earlier run. Nobody here works on them.
        self.jobs_of_other_pipelines: frozenset[int] = frozenset()
        self._failures = 0
        self._unknown: set[int] = set()  # jobs that Antenna did not know at the last look
        self._refused: frozenset[int] = frozenset()
        self._answered = self._busy = False
        self._due, self._news, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="poller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; one that waits for Antenna is not waited for."""
        self._closed.set()
        self._due.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Poll less often while a job has its turn, and at once when it is over."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = self.is_fresh = False
            self._due.set()

    def wait_for_news(self, timeout_s: float) -> None:
        self._news.wait(timeout_s)
        self._news.clear()

    def take_lost(self) -> list[tuple[int, list[int]]]:
        """Return jobs that take nothing any more and the tasks of them that the journal has forgotten."""
        return [self._lost.popleft() for _ in range(len(self._lost))]

    @property
    def refused_jobs(self) -> frozenset[int]:
        """The jobs whose detail Antenna refused to show at the last poll, such as those of a project made private."""
        return self._refused

    @property
    def has_answered(self) -> bool:
        """Whether one poll succeeded: Antenna is where the settings say."""
        return self._answered

    def _run(self) -> None:
        while not self._closed.is_set():
            self._due.clear()
            self._poll_once()
            pause_s = self._board.poll_pause_s(busy=self._busy) * 2 ** min(self._failures, 10)
            pause_s = min(pause_s, POLL_BACKOFF_MAX_S) * random.uniform(0.8, 1.2)  # noqa: S311 (out of step)
            (self._closed if self._failures else self._due).wait(pause_s)

    def _poll_once(self) -> None:
        try:
            self._poll()
        except AntennaError as error:
            self._failures += 1
            self.failure = None if self._answered else error
            _log.warning("poll_failed", error=str(error), attempt=self._failures)
        else:
            self._failures, self.failure, self._answered = 0, None, True
            self.is_fresh = not self._due.is_set()  # else a turn ended after the list was asked for
        self._news.set()

    def _poll(self) -> None:
        listed = [job for job in self._client.jobs(self._slugs, self._project) if job.pipeline_slug in self._slugs]
        held = self._journal.job_ids()
        self._board.add(listed, held)
        self._news.set()
        self.jobs_of_other_pipelines &= held
        unlisted = (self._board.job_ids() | held) - {job.id for job in listed}
        # Of an earlier process: whether their subjects are still good shows in which run their jobs are.
        of_unknown_run = {
            job_id for job_id in held - unlisted if self._journal.incarnation_age_s(job_id) == float("inf")
        }
        self._look_at([*unlisted, *of_unknown_run, *self._board.to_describe()[:LOOKS_PER_POLL]])

    def _look_at(self, job_ids: Sequence[int]) -> None:
        """Ask for jobs' details. A job that cannot be seen costs none of the others its look.

        Raises:
            AntennaError: the way to Antenna, or the token, is at fault: the next job would fare the same.
        """
        refused: set[int] = set()
        for job_id in job_ids:
            try:
                self._look(job_id)
            except AntennaUnreachable:
                raise
            except AntennaRefused as error:
                if error.concerns_token:
                    raise
                refused.add(job_id)
                if job_id not in self._refused:
                    _log.warning("job_refused", job_id=job_id, error=str(error), do=_REFUSED_JOB_ADVICE)
            except AntennaError as error:
                _log.warning("job_not_seen", job_id=job_id, error=str(error))
        self._refused = frozenset(refused)

    def _look(self, job_id: int) -> None:
        """Ask for a job's detail: it may be over, or served and not listed."""
        asked_at = lease_clock()
        state = self._client.job(job_id)
        self._journal.note_served(job_id, state.incarnation, asked_at)
        is_first_answer = job_id not in self._unknown
        self._unknown.discard(job_id)
        if state.status == DELETED and is_first_answer:
            self._unknown.add(job_id)  # what is kept for it is given up at the second such answer only
        elif state.is_lost:
            self._board.drop(job_id)
            task_ids = self._journal.bury(job_id, asked_at)
            self._lost.append((job_id, task_ids))
            _log.info("job_over", job_id=job_id, status=state.status, dropped=len(task_ids))
        elif state.pipeline_slug in self._slugs:
            if state.is_served:
                self._board.add([JobRef(id=job_id, pipeline_slug=state.pipeline_slug)])
            self._board.describe(job_id, state.total)
        elif state.pipeline_slug is not None:
            self.jobs_of_other_pipelines |= {job_id}
