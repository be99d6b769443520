"""From Antenna's queue to staged images: how many tasks to take and when, and their downloads.

Decides nothing about memory or batches; what it stages goes to a queue that has an end.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import ArrivalWatch, LeaseTerms, SaveWatch, lease_clock, parse_reply_subject
from adc_worker.antenna.wire import Task
from adc_worker.errors import AddressRefused, AntennaError, ImageError, LinkError, StagedFileLost, StagingFull
from adc_worker.ingest.disk_budget import PAUSE_S
from adc_worker.ingest.staging import StagedImage, StagedQueue, StagingArea
from adc_worker.journal.journal import HeldTask, Journal
from adc_worker.journal.poster import Poster
from adc_worker.log import get_logger
from adc_worker.runtime.faults import DECODER_AND_MODEL, Faults, advice
from adc_worker.runtime.outcomes import JobOutcomes
from adc_worker.runtime.signs_of_life import TASKS_LEASES, SignsOfLife
from adc_worker.runtime.slices import Turn
from adc_worker.tuning.plan import IngestPlan
from adc_worker.tuning.policy import BATCHES_IN_ARENA, Ceilings
from adc_worker.tuning.probe_report import PROBE_DOWNLOADS

_log = get_logger(__name__)

STOP_CHECK_S = 0.5
SAVES_CHECK_S = 0.1  # between two attempts to fetch while the saves allow no more
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 20.0
# A link error on the last delivery is posted while the lease still has this share left, to be saved in time.
LAST_CHANCE_SHARE = 0.2
EMPTY_RETRY_FIRST_S, EMPTY_RETRY_MAX_S = 2.0, 60.0  # an empty answer takes Antenna 0.6 s and may mean six things
WIND_DOWN_MAX_S = 60.0  # a turn that is over finishes what is in hand; an image host that fails must not prolong it
FETCH_GRACE_S = 10.0  # a worker that stops waits so long for a fetch under way: its tasks would be lost


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

    def _look(self) -> None:
        with self._looking:  # fetching and the extension of leases both come here
            accepted, saved = self._poster.accepted[self.job_id], self._client.job(self.job_id).saved
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
        life: SignsOfLife,
    ) -> None:
        self.staged = StagedQueue(self._still_wanted)
        self.parked = 0  # left on record: not their images are at fault
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
        self._life = life
        self._images_per_s = 0.0  # measured; 0 until it is
        self._done_before = 0
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._stopped = threading.Event()
        self._to_download: deque[HeldTask] = deque()
        self._held: dict[int, HeldTask | None] = {}  # every task taken up, under its newest lease until a batch has it
        self._arrivals = ArrivalWatch(lease)
        self._downloading = 0
        self._probing = True
        self._over_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def start(self) -> None:
        self._outcomes.listen(self.wake, self._judge)
        self._thread.start()

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
                journal_fault = self._journal.fault
                self._faults.watch("journal", OSError(journal_fault) if journal_fault else None)
                self._heed_turn()
                self._start_downloads()
                if (count := self._wanted_tasks()) > 0:
                    self._fetch.start(count)
                self._woken.wait(STOP_CHECK_S)
                self._woken.clear()
        finally:
            self.staged.end()
            self._fetch.end_turn(FETCH_GRACE_S)

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
        if self._in_hand or is_open:
            return False
        nothing_comes = self._fetch.empty_answers > 0 or self.parked > 0 or self._outcomes.is_refused()
        self.ended_empty = self._over_since is None and nothing_comes
        return self.ended_empty or self._over_since is not None

    def _take_up(self) -> None:
        """Take up what is on record, tasks on their last delivery first; one that is in hand may have a newer lease."""
        self._fetch.has_news = False
        for held in self._journal.unfinished(self._job_id):
            if held.id not in self._held and not held.struck_out:
                self._arrivals.fetched(held.id, time.monotonic())
                last = self._lease.is_last(held.task.reply_subject)
                (self._to_download.appendleft if last else self._to_download.append)(held)
            if self._held.get(held.id, held) is not None:
                self._held[held.id] = held
        self.moved()

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
            while self._to_download and self._downloading < self._limits.downloads and self._staging.disk.has_room():
                if self._stopped.is_set():
                    return
                self._downloading += 1
                held = self._to_download.popleft()
                self._staging.disk.reserve(held.id)  # here, or all that start at once would find the same room
                threading.Thread(target=self._download, args=(held,), name="download", daemon=True).start()

    def _download(self, held: HeldTask) -> None:
        try:
            self._stage_until_settled(held)
        finally:
            with self._lock:
                self._downloading -= 1
            self._woken.set()
        self._start_downloads()  # this thread is free now; the intake thread may be waiting for Antenna

    def _stage_until_settled(self, held: HeldTask) -> None:
        backoff_s = RETRY_FIRST_S
        while not self._stopped.is_set():
            wait_s = self._try_to_stage(held)
            self._arrivals.tried(held.id, time.monotonic())
            if wait_s is None:
                return
            self._stopped.wait(max(wait_s, backoff_s * random.uniform(0.5, 1.0)))  # noqa: S311 (no secret)
            backoff_s = min(2 * backoff_s, RETRY_MAX_S)
            self.moved()  # to the next attempt: a dead link is no hang

    def _try_to_stage(self, held: HeldTask) -> float | None:
        """Return the seconds until another attempt may be made; None when none is needed now."""
        held = self._newest(held)
        if not self._is_ours(held):
            return None
        last, host = self._lease.is_last(held.task.reply_subject), _host(held.task.image_url)
        fault = self._faults.blocks(host, held.task.image_id)
        if fault is not None and not (last and self._lapses_soon(held)):  # nobody gets that one after us
            self._park_or_settle(held, fault)
            return None
        try:
            image = self._staging.stage(held.id, held.task, self._cancelled, url_erased=held.url_erased)
        except StagedFileLost as error:
            self._outcomes.give_up(held.id, held.task, str(error))
        except StagingFull as error:
            self._faults.watch("staging", error)
            with self._lock:
                self._to_download.appendleft(held)  # its place in the queue is kept; the disk says when
        except (ImageError, LinkError) as error:
            return None if self._stopped.is_set() else self._blame(host, held, error)
        except (OSError, MemoryError) as error:
            self._faults.watch("staging", error)
            return PAUSE_S
        else:
            self._journal.erase_url(held)
            downloaded_bytes = image.download.size_bytes if image.download.total_s > 0 else 0
            self._arrivals.tried(held.id, time.monotonic(), downloaded_bytes)
            self._faults.image_came(host)
            self._faults.watch("staging", None)
            self.staged.put(replace(image, suspect=held.strikes is not None, urgent=last))
        return None

    def _cancelled(self) -> bool:
        self.moved()  # a download has a deadline of its own
        return self._stopped.is_set()

    def _newest(self, held: HeldTask) -> HeldTask:
        """Return a task as its last delivery brought it."""
        return self._held.get(held.id) or held

    def _lease_left_s(self, held: HeldTask) -> float:
        return self._lease.left_s(self._newest(held).fetched_at, lease_clock())

    def _lapses_soon(self, held: HeldTask) -> bool:
        return self._lease_left_s(held) < LAST_CHANCE_SHARE * self._lease.ack_wait_s

    def _judge(self, image: StagedImage, error: ImageError) -> None:
        """A staged image cannot be decoded or inferred."""
        self._note_success()
        held = self._journal.find(self._job_id, image.task)
        if held is not None:
            self._blame(DECODER_AND_MODEL, held, error)
        else:  # the job was restarted meanwhile
            self._outcomes.fail(image.id, image.task, error)

    def _blame(self, host: str, held: HeldTask, error: ImageError | LinkError) -> float | None:
        """Park a task whose host is at fault, or make an image's error its outcome; else say when to try again."""
        host_at_fault = self._faults.image_failed(host, held.task.image_id, error)
        if host_at_fault or (isinstance(error, LinkError) and self._lapses_soon(held)):
            self._park_or_settle(held, error)
        elif isinstance(error, LinkError):
            return min(error.retry_after_s, self._lease_left_s(held) / 2)
        else:
            self._outcomes.fail(held.id, held.task, error)
        return None

    def _note_success(self) -> None:
        if self._outcomes.done > self._done_before:
            self._done_before = self._outcomes.done
            self._faults.image_came(DECODER_AND_MODEL)

    def _park_or_settle(self, held: HeldTask, error: ImageError | LinkError) -> None:
        """Leave a task on record for a later pass over the job, unless its lease is about to lapse.

        An address that the settings forbid is never an image's fault: its operator is to be asked again.
        """
        if not self._lapses_soon(held):
            with self._lock:
                self.parked += 1
        elif self._lease.is_last(held.task.reply_subject) and not isinstance(error, AddressRefused):
            what = "downloadable" if isinstance(error, LinkError) else "readable"
            reason = f"not {what} in {self._lease.max_deliver} deliveries: {error}"
            self._outcomes.fail(held.id, held.task, ImageError(reason))
        else:
            self._outcomes.give_up(held.id, held.task, str(error))


def _host(url: str) -> str:
    """Return host and port; nothing for what is no URL, whose download says so."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return ""
