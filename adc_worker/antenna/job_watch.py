"""Asks Antenna about jobs, for everybody in this process. Decides nothing.

Poller, save rate, lease extension, end of a job and "may this be posted" all read what was seen here.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from adc_worker.antenna.wire import JobState


@dataclass(frozen=True, slots=True)
class JobSight:
    """What Antenna said of a job.

    Attributes:
        state: its answer.
        asked_at: when it was asked, in seconds of the watch's clock: the answer is no older than this.
    """

    state: JobState
    asked_at: float


class JobWatch:
    """The last answer about each job; safe to use from several threads."""

    def __init__(self, ask: Callable[[int], JobState], now: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._now = now
        self._lock = threading.Lock()
        self._sights: dict[int, JobSight] = {}
        # One request about a job at a time: who comes meanwhile may share its answer.
        self._asking: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)

    def look(self, job_id: int, max_age_s: float = 0.0) -> JobSight:
        """Return what Antenna says of a job, from an answer that was asked for at most `max_age_s` ago.

        Raises:
            AntennaError: it does not say. What was seen before stays.
        """
        oldest = self._now() - max_age_s
        with self._lock:
            asking = self._asking[job_id]
        with asking:
            seen = self.last(job_id)
            if seen is not None and seen.asked_at > oldest:
                return seen
            asked_at = self._now()
            sight = JobSight(self._ask(job_id), asked_at)
            with self._lock:
                self._sights[job_id] = sight
            return sight

    def last(self, job_id: int) -> JobSight | None:
        """Return what was seen last of a job; None when nobody looked yet."""
        with self._lock:
            return self._sights.get(job_id)

    def is_lost(self, job_id: int) -> bool:
        """Whether the job was seen to be over, cancelled, or not for workers that pull.

        Nothing of such a job is inferred or posted any more.
        """
        seen = self.last(job_id)
        return seen is not None and seen.state.is_lost

    def forget(self, job_id: int) -> None:
        """Forget what was seen of a job, because nobody here works on it any more."""
        with self._lock:
            self._sights.pop(job_id, None)
            self._asking.pop(job_id, None)
