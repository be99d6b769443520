"""From Antenna's queue to staged images: how many tasks to take, and their downloads.

Decides nothing about memory or batches; what it stages goes to a queue that has an end.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms, parse_reply_subject
from adc_worker.errors import AntennaError, ImageError, LinkError, StagingFull
from adc_worker.ingest.staged_queue import StagedQueue
from adc_worker.ingest.staging import StagingArea
from adc_worker.journal.journal import HeldTask, Journal
from adc_worker.log import get_logger
from adc_worker.runtime.outcomes import JobOutcomes
from adc_worker.tuning.plan import IngestPlan
from adc_worker.tuning.policy import BATCHES_IN_ARENA, DOWNLOADS_MAX

_log = get_logger(__name__)

STOP_CHECK_S = 0.5
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 20.0
# A link error on the last delivery is posted while the lease still has this share left, to be saved in time.
LAST_CHANCE_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """How far intake may run ahead: downloads at once, tasks without an outcome, tasks a fetch, tasks leased."""

    downloads: int
    in_hand: int
    fetch_size: int
    held: int

    @classmethod
    def for_probe(cls, fetch_ceiling: int | None) -> IntakeLimits:
        """Two tasks to measure, and a few behind them so that the link does not rest meanwhile.

        Ten tasks keep within half a 300 s lease at up to 15 s an image; today's worker needs 2 (measurements).
        """
        return cls(downloads=4, in_hand=10, fetch_size=min(8, fetch_ceiling or 8), held=10)

    @classmethod
    def of(cls, plan: IngestPlan) -> IntakeLimits:
        # What the arena holds is ahead of the GPU, too, but no longer ahead of the decoder.
        in_arena = plan.batch_size * (plan.prefetch_factor + BATCHES_IN_ARENA - 1)
        return cls(plan.download_concurrency, plan.staged_ahead + in_arena, plan.fetch_size, plan.held_limit)


class Intake:
    """Fetches and downloads one job's tasks in the background until the job has none, or until stopped."""

    def __init__(
        self,
        job_id: int,
        client: AntennaClient,
        journal: Journal,
        staging: StagingArea,
        outcomes: JobOutcomes,
        lease: LeaseTerms,
        limits: IntakeLimits,
        stopping: threading.Event,
    ) -> None:
        self.staged = StagedQueue()
        self.error: AntennaError | None = None
        self.failure: BaseException | None = None
        self.fetched = 0
        self.pending = 0  # tasks of the job that nobody had at the last fetch
        self._job_id = job_id
        self._client = client
        self._journal = journal
        self._staging = staging
        self._outcomes = outcomes
        self._lease = lease
        self._limits = limits
        self._stopping = stopping
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._to_download: deque[HeldTask] = deque()
        self._downloading = 0
        self._drained = False
        self._executor = ThreadPoolExecutor(DOWNLOADS_MAX, thread_name_prefix="download")
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def start(self) -> None:
        self._outcomes.listen(self.wake)
        self._thread.start()

    def apply(self, limits: IntakeLimits) -> None:
        with self._changed:
            self._limits = limits
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Fetch nothing more and break off downloads; what is on record stays there."""
        self._stopped.set()
        self.wake()

    def close(self) -> None:
        self.stop()
        self._outcomes.listen(None)
        if self._thread.is_alive():
            self._thread.join()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self) -> None:
        try:
            self._take(self._journal.unfinished(self._job_id))
            while not self._finished():
                if self._stopping.is_set():
                    self._stopped.set()
                self._start_downloads()
                if self._wants_tasks():
                    self._fetch()
                else:
                    self._wait()
        except Exception as error:  # noqa: BLE001 (recorded: the job raises it)
            self.failure = error
        finally:
            self.staged.end()

    def _finished(self) -> bool:
        with self._changed:
            if self._stopped.is_set():
                return self._downloading == 0
            return self._drained and not self._to_download and self._downloading == 0

    def _take(self, tasks: list[HeldTask]) -> None:
        with self._changed:
            self.fetched += len(tasks)
            self._to_download.extend(tasks)

    def _wants_tasks(self) -> bool:
        with self._changed:
            room = self._limits.in_hand - (self.fetched - self._outcomes.settled)
            if self._drained or self._stopped.is_set() or room < 1:
                return False
        return self._journal.held_count(self._job_id) < self._limits.held

    def _fetch(self) -> None:
        first = self.fetched == 0
        with self._changed:
            room = self._limits.in_hand - (self.fetched - self._outcomes.settled)
            # The first two tasks are the probe's: asked for alone, they come without waiting for the others.
            count = 2 if first else min(self._limits.fetch_size, room)
        try:
            tasks = self._client.fetch_tasks(self._job_id, count)
        except AntennaError as error:
            _log.warning("fetch_failed", job_id=self._job_id, error=str(error))
            self.error = error
            tasks = []
        self._take(self._journal.record(self._job_id, tasks))
        deliveries = [parse_reply_subject(task.reply_subject) for task in tasks]
        self.pending = min((delivery.pending for delivery in deliveries if delivery), default=0)
        if not tasks:
            self._drained = True

    def _wait(self) -> None:
        with self._changed:
            if not self._can_start_download():
                self._changed.wait(STOP_CHECK_S)

    def _can_start_download(self) -> bool:
        if self._stopped.is_set():
            return self._downloading == 0
        return self._may_download()

    def _may_download(self) -> bool:
        busy = self._downloading >= self._limits.downloads
        return bool(self._to_download) and not busy and self._staging.disk.has_room()

    def _start_downloads(self) -> None:
        with self._changed:
            while not self._stopped.is_set() and self._may_download():
                self._downloading += 1
                held = self._to_download.popleft()
                self._staging.disk.reserve(held.id)  # here, or all that start at once would find the same room
                self._executor.submit(self._download, held)

    def _download(self, held: HeldTask) -> None:
        try:
            self._stage_until_settled(held)
        except Exception as error:  # noqa: BLE001 (recorded: the job raises it)
            self.failure = error
            self._stopped.set()
        finally:
            with self._changed:
                self._downloading -= 1
                self._changed.notify_all()
        self._start_downloads()  # this thread is free now; the intake thread may be waiting for Antenna

    def _stage_until_settled(self, held: HeldTask) -> None:
        delivery = parse_reply_subject(held.task.reply_subject)
        last = delivery is not None and delivery.count >= self._lease.max_deliver
        backoff_s = RETRY_FIRST_S
        while not self._stopped.is_set():
            try:
                image = self._staging.stage(held.id, held.task, self._stopped.is_set)
            except StagingFull:
                with self._changed:
                    self._to_download.appendleft(held)  # its place in the queue is kept; the disk says when
                return
            except ImageError as error:
                self._outcomes.fail(held.id, held.task, error)
                return
            except LinkError as error:
                if self._stopped.is_set():
                    return
                if self._lease_left_s(held) < LAST_CHANCE_SHARE * self._lease.ack_wait_s:
                    self._settle_link_error(held, error, last=last)
                    return
                self._stopped.wait(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 (no secret)
                backoff_s = min(2 * backoff_s, RETRY_MAX_S)
            else:
                self.staged.put(image, urgent=last)
                return

    def _lease_left_s(self, held: HeldTask) -> float:
        return held.fetched_at + self._lease.ack_wait_s - time.time()

    def _settle_link_error(self, held: HeldTask, error: LinkError, *, last: bool) -> None:
        if last:
            reason = f"not downloadable in {self._lease.max_deliver} deliveries: {error}"
            self._outcomes.fail(held.id, held.task, ImageError(reason))
        else:
            self._outcomes.give_up(held.id, held.task, str(error))
