"""From Antenna's queue to staged images: how many tasks to take and when, and their downloads.

Decides nothing about memory or batches; what it stages goes to a queue that has an end.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import ArrivalWatch, LeaseTerms, SaveWatch, lease_clock, parse_reply_subject
from adc_worker.antenna.wire import JobState, Task
from adc_worker.errors import (
    AntennaError,
    DeviceMemoryShort,
    ImageError,
    ImageUrlUnusable,
    LinkError,
    StagedFileLost,
    StagingFull,
)
from adc_worker.ingest.addresses import image_host
from adc_worker.ingest.disk_budget import PAUSE_S
from adc_worker.ingest.staging import StagedImage, StagedQueue, StagingArea
from adc_worker.journal.journal import CONTACT_S, HeldTask, Journal
from adc_worker.journal.poster import Poster
from adc_worker.log import get_logger
from adc_worker.planning.ceilings import Ceilings
from adc_worker.planning.measurements import PROBE_DOWNLOADS
from adc_worker.planning.memory_cost import BATCHES_IN_ARENA
from adc_worker.planning.plan import IngestPlan
from adc_worker.runtime import verdicts
from adc_worker.runtime.evidence import Evidence
from adc_worker.runtime.faults import Faults, advice
from adc_worker.runtime.outcomes import JobOutcomes
from adc_worker.runtime.signs_of_life import TASKS_LEASES, SignsOfLife
from adc_worker.runtime.slices import Turn
from adc_worker.runtime.verdicts import Failure, LeaseView, Seen, Verdict

_log = get_logger(__name__)

STOP_CHECK_S = 0.5
SAVES_CHECK_S = 0.1  # between two attempts to fetch while the saves allow no more
# A turn in which nothing is left but images to be tried again later ends, unless one of them is due so soon.
WAIT_IN_TURN_S = 2.0
# Chosen: of a lease, the time until an image for which other programs left no memory of the GPU is tried again.
GPU_MEMORY_RETRY_SHARE = 1 / 15
RETRY_JITTER = (0.75, 1.0)  # of the time until another attempt: images that failed together are not all due at once
EMPTY_RETRY_FIRST_S, EMPTY_RETRY_MAX_S = 2.0, 60.0  # an empty answer takes Antenna 0.6 s and may mean six things
WIND_DOWN_MAX_S = 60.0  # a turn that is over finishes what is in hand; an image host that fails must not prolong it
FETCH_GRACE_S = 10.0  # a worker that stops waits so long for a fetch under way: its tasks would be lost


_success_numbers = itertools.count()  # of this process: one of another turn or job is another image


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """How far intake may run ahead: downloads at once, tasks without an outcome, tasks a fetch, tasks leased."""

    downloads: int
    in_hand: int
    fetch_size: int
    held: int

    @classmethod
    def for_probe(cls, ceilings: Ceilings, lease: LeaseTerms) -> IntakeLimits:
        """Two tasks to measure, and a few behind them so that the link does not rest meanwhile."""
        held, downloads = lease.unproven_limit, min(PROBE_DOWNLOADS, ceilings.downloads or PROBE_DOWNLOADS)
        return cls(downloads=downloads, in_hand=held, fetch_size=min(8, ceilings.tasks_per_fetch or 8), held=held)

    @classmethod
    def of(cls, plan: IngestPlan) -> IntakeLimits:
        # What the arena holds is ahead of the GPU, too, but no longer ahead of the decoder.
        in_arena = plan.batch_size * (plan.prefetch_factor + BATCHES_IN_ARENA - 1)
        return cls(plan.download_concurrency, plan.staged_ahead + in_arena, plan.fetch_size, plan.held_limit)


class TaskFetch:
    """One job's fetches. With NATS down Antenna answers after 120 s: nobody waits for it here. What comes is on record.

    `has_news`: there may be tasks on record that nobody has taken up.
    """

    def __init__(self, job_id: int, client: AntennaClient, journal: Journal, poster: Poster, lease: LeaseTerms) -> None:
        self.job_id = job_id
        self.error: AntennaError | None = None  # what Antenna said to the last one, if that failed
        self.is_open = self.has_news = False
        self.empty_answers = 0  # in a row, in this turn
        self.next_at = 0.0  # monotonic seconds
        self.pending = 0  # tasks of the job that nobody had at the last fetch
        self._client = client
        self._journal = journal
        self._poster = poster
        self._lease = lease
        self._saves = SaveWatch(poster.accepted[job_id])
        self._looking = threading.Lock()
        self._listener: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def begin_turn(self, listener: Callable[[], None]) -> None:
        """Begin anew; `listener` hears of every answer, also of one to a fetch of the turn before."""
        self._listener, self.has_news, self.empty_answers, self.next_at = listener, True, 0, 0.0

    def end_turn(self, timeout_s: float) -> None:
        """Wait for a fetch that is open."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._listener = None

    def start(self, count: int) -> None:
        """Ask for up to `count` tasks. None may be open."""
        self.is_open = True
        self._thread = threading.Thread(target=self._run, args=(count,), name=f"fetch {self.job_id}", daemon=True)
        self._thread.start()

    def unsaved(self) -> list[str]:
        """Look at the job, and return the leases of results that were accepted and not saved, as far as known."""
        if self._unsaved() > 0:
            self._look()
        return self._journal.accepted_subjects(self.job_id, self._unsaved())

    def _run(self, count: int) -> None:
        try:
            self._ask(count)
        finally:
            self.is_open = False
        listener = self._listener
        if listener is not None:
            listener()

    def _ask(self, count: int) -> None:
        tasks: list[Task] = []
        try:
            if (count := self._within_saves(count)) < 1:
                self.next_at = time.monotonic() + SAVES_CHECK_S
                return
            self._learn_incarnation()
            sent_at = lease_clock()
            # After an answer that was lost, or none: ask for one, or each attempt would spend deliveries of many.
            tasks = self._client.fetch_tasks(self.job_id, count if self.error is None else 1)
            self.error = None
        except AntennaError as error:
            _log.warning("fetch_failed", job_id=self.job_id, error=str(error), do=advice(error))
            self.error = error
        if not tasks:
            pause_s = min(EMPTY_RETRY_MAX_S, EMPTY_RETRY_FIRST_S * 2**self.empty_answers)
            self.next_at = time.monotonic() + pause_s * random.uniform(0.8, 1.2)  # noqa: S311 (jitter)
            self.empty_answers += 1
            return
        for task in tasks:
            before = self._journal.find(self.job_id, task)
            self._lease.learn(task.reply_subject, before.fetched_at if before else None, lease_clock())
        self._journal.record(self.job_id, tasks, sent_at)
        found = [parse_reply_subject(task.reply_subject) for task in tasks]
        self.pending = min((delivery.pending for delivery in found if delivery), default=self.pending)
        self.empty_answers, self.has_news = 0, True
        self._poster.wake()  # some may have been answered from the journal

    def _within_saves(self, count: int) -> int:
        """Return how many of `count` tasks Antenna could save within their leases, at the rate it saves now."""
        held = self._journal.held_count(self.job_id)
        room = self._saves.room(self._lease, held, self._poster.accepted[self.job_id])
        if self._saves.is_due(self._lease, time.monotonic(), held, self._poster.accepted[self.job_id]):
            try:
                self._look()
            except AntennaError:
                if room < 1:
                    raise
            room = self._saves.room(self._lease, held, self._poster.accepted[self.job_id])
        return min(count, room)

    def _learn_incarnation(self) -> None:
        """Ask in which run the job is, unless that was told just now: what is fetched next is of that run."""
        if self._journal.incarnation_age_s(self.job_id) < CONTACT_S:
            return
        try:
            self._ask_for_job()
        except AntennaError as error:
            # The fetch says what is wrong. Without the run, results wait for another proof after a long silence.
            _log.debug("incarnation_unknown", job_id=self.job_id, error=str(error))

    def _ask_for_job(self) -> JobState:
        asked_at = lease_clock()
        state = self._client.job(self.job_id)
        self._journal.note_served(self.job_id, state.incarnation, asked_at)
        return state

    def _look(self) -> None:
        with self._looking:  # fetching and the extension of leases both come here
            accepted, saved = self._poster.accepted[self.job_id], self._ask_for_job().saved
            self._saves.look(self._lease, time.monotonic(), accepted, saved)

    def _unsaved(self) -> int:
        return self._saves.unsaved(self._poster.accepted[self.job_id])


class Intake:
    """Fetches and downloads one job's tasks in the background until the job has none for now, or its turn is over."""

    def __init__(
        self,
        fetch: TaskFetch,
        journal: Journal,
        staging: StagingArea,
        outcomes: JobOutcomes,
        lease: LeaseTerms,
        limits: IntakeLimits,
        turn: Turn,
        *,
        faults: Faults,
        evidence: Evidence,
        life: SignsOfLife,
    ) -> None:
        self.staged = StagedQueue(self._still_wanted)
        self.ended_empty = False
        self._fetch = fetch
        self._job_id = fetch.job_id
        self._journal = journal
        self._staging = staging
        self._outcomes = outcomes
        self._lease = lease
        self._limits = limits
        self._turn = turn
        self._faults = faults
        self._evidence = evidence
        self._here = f"the decoder and the model of this worker ({turn.entry.pipeline_slug})"  # in a host's place
        self._life = life
        self._images_per_s = 0.0  # measured; 0 until it is
        self._done_before = 0
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._stopped = threading.Event()
        self._to_download: deque[HeldTask] = deque()
        self._waiting: list[tuple[float, int, HeldTask]] = []  # a heap: when each is due, on the evidence's clock
        self._parked: dict[int, tuple[str, HeldTask]] = {}  # left on record, with the host each waits for
        self._held: dict[int, HeldTask | None] = {}  # every task taken up, under its newest lease until a batch has it
        self._staged_ids: set[int] = set()
        self._arrivals = ArrivalWatch(lease)
        self._downloading = 0
        self._probing = True
        self._over_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def start(self) -> None:
        self._outcomes.listen(self.wake, self._judge, self._try_again_later)
        # A job that was restarted meanwhile leaves files that no task needs; their room on the disk goes with them.
        self._staging.discard_forgotten(self._journal.unfinished_ids)
        self._thread.start()

    @property
    def parked(self) -> int:
        """Tasks that wait for a host at fault, or to be tried again when the job has another turn."""
        return len(self._parked)

    @property
    def due_in_s(self) -> float:
        """Return the seconds until the first of the parked tasks may be tried; infinite where there is none."""
        with self._lock:
            parked = list(self._parked.values())
        due_at = [
            max(self._evidence.trial_at(host), self._evidence.own_retry_at(host, held.task.image_id))
            for host, held in parked
        ]
        return max(0.0, min(due_at, default=math.inf) - self._evidence.now())

    @property
    def worker_is_proven(self) -> bool:
        """Whether this process has decoded and inferred an image with the job's pipeline."""
        self._note_success()
        return self._evidence.has_served(self._here)

    @property
    def has_no_more(self) -> bool:
        """Whether no other image of the job is left here that could show whether decoder and model are well."""
        return self.ended_empty and self.parked == 0

    def apply(self, limits: IntakeLimits) -> None:
        self._limits, self._probing = limits, False
        self.wake()

    def pace(self, images_per_s: float) -> None:
        """Say how fast a batch went: what is held must be done within its leases at that rate."""
        self._images_per_s = images_per_s
        self._note_success()

    def moved(self) -> None:
        """Say that something happened to the tasks in hand, or to what they wait for."""
        self._life.tasks(TASKS_LEASES * self._lease.ack_wait_s if self._in_hand > 0 else float("inf"))

    def wake(self) -> None:
        self.moved()
        self._woken.set()

    def stop(self) -> None:
        """Fetch nothing more and break off downloads; what is on record stays there."""
        self._stopped.set()
        self.wake()

    def close(self) -> None:
        self.stop()
        self._outcomes.listen(None)
        if self._thread.is_alive():
            self._thread.join()
        self._life.tasks(float("inf"))

    @property
    def fetched(self) -> int:
        return len(self._held)

    @property
    def pending(self) -> int:
        return self._fetch.pending

    @property
    def _in_hand(self) -> int:
        return self.fetched - self._outcomes.settled - self.parked - len(self._outcomes.struck_out)

    def _run(self) -> None:
        try:
            self._fetch.begin_turn(self.wake)
            while not self._finished():
                self._watch_journal()
                self._heed_turn()
                due_in_s = self._take_due()
                self._start_downloads()
                if (count := self._wanted_tasks()) > 0:
                    self._fetch.start(count)
                self._woken.wait(min(STOP_CHECK_S, due_in_s))
                self._woken.clear()
        finally:
            self.staged.end()
            self._fetch.end_turn(FETCH_GRACE_S)

    def _watch_journal(self) -> None:
        """Say how the journal is; a disk that is low is no fault while work in hand may free it."""
        fault = self._journal.fault
        self._faults.watch("journal", OSError(fault) if fault else None)
        shortage = self._journal.shortage
        idle_for_want_of_space = shortage is not None and self._in_hand == 0
        self._faults.watch("disk of the journal", StagingFull(shortage) if idle_for_want_of_space else None)

    def _heed_turn(self) -> None:
        over_s = time.monotonic() - self._over_since if self._over_since is not None else 0.0
        if self._turn.is_stopping() or over_s > WIND_DOWN_MAX_S:
            self._stopped.set()
        elif self._over_since is None and self._turn.fetches_no_more(self._in_hand / (self._images_per_s or 1.0)):
            self._over_since = time.monotonic()

    def _finished(self) -> bool:
        if self._stopped.is_set():
            return self._downloading == 0
        is_open = self._fetch.is_open  # asked first: its answer is on record once it is not
        if self._fetch.has_news or not (self._in_hand or self._over_since):  # the poster fetches, too, for a subject
            self._take_up()
        if self._only_waits(is_open):
            self._park_waiting()
        if self._in_hand or is_open:
            return False
        nothing_comes = self._fetch.empty_answers > 0 or self.parked > 0 or self._outcomes.is_refused()
        self.ended_empty = self._over_since is None and nothing_comes
        return self.ended_empty or self._over_since is not None

    def _take_up(self) -> None:
        """Take up what is on record; a task that is in hand may have a newer lease.

        Tasks on their last delivery go first, and then those that failed less often: where a host is at fault, another
        image may show that it is well again.
        """
        self._fetch.has_news = False
        new: list[HeldTask] = []
        for held in self._journal.unfinished(self._job_id):
            if held.id not in self._held and not held.struck_out:
                self._arrivals.fetched(held.id, time.monotonic())
                new.append(held)
            if self._held.get(held.id, held) is not None:
                self._held[held.id] = held
            if held.id in self._staged_ids:
                self._journal.erase_url(held)  # a further delivery brought what opens it again
        new.sort(key=self._tries)
        with self._lock:
            for held in new:
                last = self._lease.is_last(held.task.reply_subject)
                (self._to_download.appendleft if last else self._to_download.append)(held)
        self.moved()

    def _tries(self, held: HeldTask) -> int:
        try:
            return self._evidence.tries(image_host(held.task.image_url), held.task.image_id)
        except ImageUrlUnusable:
            return 0

    def _only_waits(self, fetch_is_open: bool) -> bool:
        """Whether nothing is left to do in this turn but to wait for images that are to be tried again later."""
        with self._lock:
            if not self._waiting or self._to_download or len(self._waiting) < self._in_hand:
                return False
            due_in_s = self._waiting[0][0] - self._evidence.now()
        no_more_come = self._over_since is not None or self._fetch.empty_answers > 0 or self.parked > 0
        return no_more_come and not fetch_is_open and due_in_s > WAIT_IN_TURN_S

    def _park_waiting(self) -> None:
        with self._lock:
            for _due_at, _id, held in self._waiting:
                self._parked[held.id] = (self._asked(held), held)
            self._waiting.clear()

    def _take_due(self) -> float:
        """Queue the images that are to be tried again now; return the seconds until the next is.

        Of those that wait for a host at fault it is the one that was parked first.
        """
        now = self._evidence.now()
        with self._lock:
            while self._waiting and self._waiting[0][0] <= now:
                _due_at, _id, held = heapq.heappop(self._waiting)
                self._to_download.append(held)
            first_of_host = dict(reversed(self._parked.values()))
            trials = {held.id: self._evidence.trial_at(host) for host, held in first_of_host.items()}
            for held in first_of_host.values():
                if trials[held.id] <= now:
                    del self._parked[held.id]
                    self._to_download.append(held)
            due_at = [self._waiting[0][0]] if self._waiting else []
            due_at += [at for at in trials.values() if at > now]
        return min(due_at, default=math.inf) - now

    def _unpark(self, host: str) -> None:
        """Try the images again that waited for a host which has served one now."""
        with self._lock:
            back = [held for waits_for, held in self._parked.values() if waits_for == host]
            for held in back:
                del self._parked[held.id]
            self._to_download.extend(back)
        if back:
            self._woken.set()

    def _wanted_tasks(self) -> int:
        """Return how many tasks to ask for now: within what may be in hand, and within the lease horizon."""
        if self._stopped.is_set() or self._over_since is not None or self._fetch.is_open or self.parked:
            return 0
        room = min(self._limits.fetch_size, self._limits.in_hand - self._in_hand)
        if room < 1 or time.monotonic() < self._fetch.next_at or not self._outcomes.may_take_more():
            return 0
        # The first two tasks are the probe's: asked for alone, they come without waiting for the others.
        room = min(room, 2) if self._probing and self.fetched == 0 else room
        room = min(room, self._arrivals.room(time.monotonic()))
        held = self._journal.held_count(self._job_id)
        if self._images_per_s:
            room = min(room, self._lease.held_limit(self._images_per_s) - held)
        return min(room, self._limits.held - held)

    def _still_wanted(self, image: StagedImage) -> bool:
        """Whether to decode an image: not when Antenna hands its task to somebody else by now."""
        held, self._held[image.id] = self._held.get(image.id), None
        return held is None or self._is_ours(held)

    def _is_ours(self, held: HeldTask) -> bool:
        """Whether to go on with a task: its lease lasts, or nobody gets it after us, and a late result still counts."""
        late_s = -self._lease.left_s(held.fetched_at, lease_clock())
        if late_s <= 0 or self._lease.is_last(held.task.reply_subject):
            return True
        self._outcomes.give_up(held.id, held.task, f"its lease ended {late_s:.1f} s before it was started")
        return False

    def _start_downloads(self) -> None:
        with self._lock:
            while self._downloading < self._limits.downloads and not self._stopped.is_set():
                held = self._next_with_room()
                if held is None:
                    return
                self._to_download.remove(held)
                self._start_download(held)

    def _next_with_room(self) -> HeldTask | None:
        """Return the first task that the disk has room for; one whose file is there already needs none."""
        if self._to_download and self._staging.disk.has_room():
            return self._to_download[0]
        return next((held for held in self._to_download if self._staging.is_staged(held.id, held.task)), None)

    def _start_download(self, held: HeldTask) -> None:
        self._downloading += 1
        self._staging.disk.reserve(held.id)  # here, or all that start at once would find the same room
        try:
            threading.Thread(target=self._download, args=(held,), name="download", daemon=True).start()
        except BaseException:
            self._staging.disk.unreserve(held.id)
            self._downloading -= 1
            raise

    def _download(self, held: HeldTask) -> None:
        """Try once, in a thread of its own: an image that is to be tried again waits without one, and without room."""
        try:
            if not self._stopped.is_set():
                self._try_to_stage(self._newest(held))
        finally:
            self._staging.disk.unreserve(held.id)
            self._arrivals.tried(held.id, time.monotonic())
            with self._lock:
                self._downloading -= 1
            self.wake()  # to the next attempt: a dead link is no hang
        self._start_downloads()  # this thread is free now; the intake thread may be waiting for Antenna

    def _try_to_stage(self, held: HeldTask) -> None:
        if not self._is_ours(held):
            return
        try:
            host = self._asked(held)
        except ImageUrlUnusable as error:  # its own fault, and no host's
            self._apply("", held, verdicts.judge_url(error))
            return
        if self._may_try(host, held):
            self._stage(host, held)

    def _asked(self, held: HeldTask) -> str:
        """Return the host that an image comes from; this worker for one whose file is here."""
        return self._here if self._staging.is_staged(held.id, held.task) else image_host(held.task.image_url)

    def _may_try(self, host: str, held: HeldTask) -> bool:
        """Whether to try an image now; one that must wait for its host, or for its own time, waits."""
        image_id = held.task.image_id
        lease = self._lease_view(held)
        if lease.is_last and lease.lapses_soon:  # nobody gets it after us
            return True
        due_at = self._evidence.own_retry_at(host, image_id)
        if due_at > self._evidence.now() and not lease.lapses_soon:
            self._wait(held, due_at)
            return False
        fault = self._evidence.may_try(host)
        if fault is not None:
            self._apply(host, held, verdicts.judge_untried(fault, lease))
        return fault is None

    def _stage(self, host: str, held: HeldTask) -> None:
        begun_at = self._evidence.now()
        try:
            image = self._staging.stage(held.id, held.task, self._cancelled, url_erased=held.url_erased)
        except StagedFileLost as error:
            self._outcomes.give_up(held.id, held.task, str(error))
        except StagingFull as error:
            self._faults.watch("staging", error)
            with self._lock:
                self._to_download.appendleft(held)  # its place in the queue is kept; the disk says when
        except (ImageError, LinkError) as error:
            if not self._stopped.is_set():
                self._decide(host, held, verdicts.download_failure(error))
        except (OSError, MemoryError) as error:
            self._faults.watch("staging", error)
            self._wait(held, self._evidence.now() + PAUSE_S)
        else:
            self._staged_ids.add(held.id)
            self._journal.erase_url(held)
            downloaded_bytes = image.download.size_bytes if image.download.total_s > 0 else 0
            self._arrivals.tried(held.id, time.monotonic(), downloaded_bytes)
            self._faults.watch("staging", None)
            if host != self._here:
                self._evidence.came(host, held.task.image_id, held.task.image_url, begun_at)
                self._unpark(host)
            is_last = self._lease.is_last(held.task.reply_subject)
            self.staged.put(replace(image, suspect=held.strikes is not None, urgent=is_last))

    def _cancelled(self) -> bool:
        self.moved()  # a download has a deadline of its own
        return self._stopped.is_set()

    def _newest(self, held: HeldTask) -> HeldTask:
        """Return a task as its last delivery brought it."""
        return self._held.get(held.id) or held

    def _lease_view(self, held: HeldTask) -> LeaseView:
        newest = self._newest(held)
        return LeaseView(
            is_last=self._lease.is_last(newest.task.reply_subject),
            left_s=self._lease.left_s(newest.fetched_at, lease_clock()),
            ack_wait_s=self._lease.ack_wait_s,
            max_deliver=self._lease.max_deliver,
        )

    def _judge(self, image: StagedImage, error: ImageError) -> None:
        """A staged image cannot be decoded or inferred."""
        self._note_success()
        held = self._journal.held(image.id)
        if held is not None:
            self._held[held.id] = held  # it may be tried again
            self._decide(self._here, held, verdicts.staged_failure(error))
        else:  # the job was restarted meanwhile
            self._outcomes.fail(image.id, image.task, error)

    def _try_again_later(self, image: StagedImage, error: DeviceMemoryShort | StagedFileLost) -> None:
        """A staged image cannot be inferred now, for no reason of its own; other images go on meanwhile.

        Without memory of the GPU it waits, and its file stays. Without its file it is downloaded again at once.
        When its lease is over the task is given up, unless this is its last delivery.
        """
        held = self._journal.held(image.id)
        if held is None:  # the job was restarted or cancelled meanwhile
            self._outcomes.give_up(image.id, image.task, "its task is no longer on record")
            return
        self._held[held.id] = held
        if not self._is_ours(held):
            return
        due_at = self._evidence.now()
        if isinstance(error, DeviceMemoryShort):
            due_at += GPU_MEMORY_RETRY_SHARE * self._lease.ack_wait_s
            self._evidence.postpone(self._here, held.task.image_id, due_at)
        self._wait(held, due_at)
        self.wake()

    def _decide(self, host: str, held: HeldTask, failure: Failure) -> None:
        seen = self._evidence.failed(host, held.task.image_id, failure)
        verdict = verdicts.judge(failure, self._lease_view(held), seen)
        if isinstance(verdict, verdicts.RetryAt) and seen.tries == 1:
            _log.info(
                "image_to_be_tried_again",
                job_id=self._job_id,
                image_id=held.task.image_id,
                error=str(failure.error),
                do=advice(failure.error),
            )
        verdict = self._heed_others(host, held, failure, verdict, seen)
        self._apply(host, held, verdict)

    def _heed_others(self, host: str, held: HeldTask, failure: Failure, verdict: Verdict, seen: Seen) -> Verdict:
        """Ask for images that came before, where the verdict depends on whether their host is well; return the verdict.

        Where fewer came before, they could not show enough, and the last delivery decides.
        """
        wanted = verdicts.controls_wanted(failure, self._lease_view(held), seen)
        controls = self._evidence.controls(host, wanted)
        if wanted == 0 or len(controls) < wanted or isinstance(verdict, verdicts.Fail | verdicts.GiveUp):
            return verdict
        if not self._all_come(host, held, controls):
            return verdict
        if isinstance(verdict, verdicts.RetryAt):
            for image_id, url in controls:
                self._evidence.came(host, image_id, url)
            return verdict
        self._evidence.vouched_for(host)
        self._unpark(host)
        return verdicts.RetryAt(self._evidence.now() + verdicts.RETRY_FIRST_S)

    def _all_come(self, host: str, held: HeldTask, controls: Sequence[tuple[str, str]]) -> bool:
        """Whether a host still serves images that came before, by id and URL: this one may be the last of its job.

        All of them count, or none: one that does not come now shows that the host's answers change.
        """
        try:
            all_come = all(self._staging.serves(held.id, url, self._cancelled) for _image_id, url in controls)
        except (LinkError, OSError, MemoryError) as error:  # nothing is shown by that, and the next attempt meets it
            _log.info("others_not_asked", job_id=self._job_id, host=host, error=str(error))
            return False
        if not all_come:
            self._evidence.doubt(host)
        return all_come

    def _apply(self, host: str, held: HeldTask, verdict: Verdict) -> None:
        image_id = held.task.image_id
        match verdict:
            case verdicts.RetryAt(at_s):
                wait_s = (at_s - self._evidence.now()) * random.uniform(*RETRY_JITTER)  # noqa: S311 (no secret)
                due_at = self._evidence.now() + wait_s
                self._evidence.postpone(host, image_id, due_at)
                self._wait(held, due_at)
            case verdicts.Park():
                with self._lock:
                    self._parked[held.id] = (host, held)
            case verdicts.Fail(error):
                self._evidence.forget(host, image_id)
                self._outcomes.fail(held.id, held.task, error)
            case verdicts.GiveUp(reason):
                self._evidence.forget(host, image_id)
                self._outcomes.give_up(held.id, held.task, reason)
        self._woken.set()

    def _wait(self, held: HeldTask, due_at: float) -> None:
        with self._lock:
            heapq.heappush(self._waiting, (due_at, held.id, held))

    def _note_success(self) -> None:
        """Tell of images that were inferred since this was last asked; each is another one.

        The threads that decode and the one that infers come here.
        """
        with self._lock:
            done = self._outcomes.done
            new = done - self._done_before
            self._done_before = done
        for _image in range(new):
            self._evidence.came(self._here, f"success {next(_success_numbers)}")
        if new > 0:
            self._unpark(self._here)
