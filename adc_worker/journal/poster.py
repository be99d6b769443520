"""Empties the journal: posts kept results until Antenna has accepted them or they are useless.

Decides how results are grouped and when they are tried again; how a post travels is the client's business.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Protocol

from adc_worker.antenna.wire import PostEntry, error_result
from adc_worker.errors import AntennaError, AntennaRefused, AntennaRejected
from adc_worker.journal.journal import Journal, KeptResult
from adc_worker.log import get_logger

_log = get_logger(__name__)

RESULTS_PER_POST = 50
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30.0
_JOB_UNKNOWN, _TOO_LARGE, _INVALID = 404, 413, 400
_FINAL = frozenset({_JOB_UNKNOWN, _TOO_LARGE, _INVALID})


class ResultReceiver(Protocol):
    def post_results(self, job_id: int, entries: Sequence[PostEntry]) -> None: ...


@dataclass(frozen=True, slots=True)
class PosterLimits:
    """How many posts are under way at once, and how large one may be."""

    pending_posts: int
    post_bytes: int


class Poster:
    """Posts kept results in the background."""

    def __init__(
        self,
        journal: Journal,
        receiver: ResultReceiver,
        limits: PosterLimits,
        first_backoff_s: float = BACKOFF_FIRST_S,
    ) -> None:
        self._journal = journal
        self._receiver = receiver
        self._limits = limits
        self._first_backoff_s = first_backoff_s
        self._listener: Callable[[], None] | None = None
        self._changed = threading.Condition()
        self._posting: set[int] = set()
        self._under_way = 0
        self._oversize = False
        self._closing = False
        self._dropped = threading.Event()  # cuts short every back-off
        self._refused = False
        self.accepted: Counter[int] = Counter()  # results by job
        self.failure: BaseException | None = None
        self._executor = ThreadPoolExecutor(limits.pending_posts, thread_name_prefix="post")
        self._thread = threading.Thread(target=self._run, name="poster", daemon=True)
        self._thread.start()

    @property
    def refused(self) -> bool:
        """Whether Antenna refused the token at the last post."""
        return self._refused

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call `listener`, from a posting thread, whenever results were accepted or found useless."""
        self._listener = listener

    def wake(self) -> None:
        """Tell the poster that results were kept."""
        with self._changed:
            self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until every kept result is accepted; False on time-out or when the poster died."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self.failure is None and (self._under_way or self._journal.unposted_count()):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 1.0))
        return self.failure is None

    def close(self, flush_s: float) -> None:
        """Post what is kept for up to `flush_s` seconds, then stop; the rest stays in the journal."""
        self.wait_idle(flush_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._dropped.set()
        self._thread.join()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self) -> None:
        try:
            while group := self._next_group():
                self._executor.submit(self._post_group, group)
        except Exception as error:  # noqa: BLE001 (recorded: the worker's loop ends the process on it)
            self.failure = error
            self.wake()

    def _next_group(self) -> list[KeptResult]:
        """Wait for results and a free post, and claim one post's worth; empty when closing."""
        with self._changed:
            while not self._closing and self.failure is None:
                if self._under_way < self._limits.pending_posts and not self._oversize:
                    # A post that exceeds the limit takes minutes; nothing beside it makes that longer.
                    alone = self._under_way == 0
                    group = self._group(
                        self._journal.unposted(self._posting, RESULTS_PER_POST, self._limits.post_bytes, alone=alone)
                    )
                    if group:
                        self._oversize = sum(kept.size_bytes for kept in group) > self._limits.post_bytes
                        self._posting.update(kept.held.id for kept in group)
                        self._under_way += 1
                        return group
                self._changed.wait()
        return []

    def _group(self, results: Sequence[KeptResult]) -> list[KeptResult]:
        """Take the leading results of one job; the journal has seen to the post's bytes and count."""
        return list(takewhile(lambda kept: kept.held.job_id == results[0].held.job_id, results))

    def _post_group(self, group: list[KeptResult]) -> None:
        try:
            self._post_until_settled(group)
        except Exception as error:  # noqa: BLE001 (recorded: the worker's loop ends the process on it)
            self.failure = error
        finally:
            with self._changed:
                self._posting.difference_update(kept.held.id for kept in group)
                self._under_way -= 1
                self._oversize = False  # if it was, nothing else is under way
                self._changed.notify_all()

    def _post_until_settled(self, group: Sequence[KeptResult]) -> None:
        backoff_s = self._first_backoff_s
        while group := [kept for kept in group if self._journal.holds(kept.held.id)]:  # less those of cancelled jobs
            try:
                self._receiver.post_results(group[0].held.job_id, [self._entry(kept) for kept in group])
            except AntennaError as error:
                if isinstance(error, AntennaRejected) and error.status in _FINAL:
                    self._settle_rejected(group, error)
                    return
                # Also a redirect or a 405: they tell about the way to Antenna, not about the results.
                self._refused = isinstance(error, AntennaRefused)
                _log.warning("post_failed", error=str(error), results=len(group), retry_in_s=round(backoff_s, 1))
                # Full jitter: after an outage a fleet must not come back in step.
                if self._dropped.wait(backoff_s * random.uniform(0.5, 1.0)):  # noqa: S311 (no secret)
                    return
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
            else:
                self._refused = False
                self.accepted[group[0].held.job_id] += len(group)
                self._done(group)
                return

    def _settle_rejected(self, group: Sequence[KeptResult], error: AntennaRejected) -> None:
        """Halve a refused post until the bad result is alone, then tell Antenna's users what was wrong with it."""
        if error.status == _JOB_UNKNOWN:
            _log.warning("results_useless", job_id=group[0].held.job_id, results=len(group), reason=str(error))
            self._done(group)
        elif len(group) > 1:
            middle = len(group) // 2
            self._post_until_settled(group[:middle])
            self._post_until_settled(group[middle:])
        elif not next(self._journal.parts(group[0].held.id)).startswith(b'{"error":'):
            self._replace_with_error(group[0], error)
        else:
            _log.error("result_rejected", job_id=group[0].held.job_id, error=str(error))
            self._done(group)

    def _replace_with_error(self, kept: KeptResult, error: AntennaRejected) -> None:
        text = (
            f"Antenna refused a result of {kept.size_bytes} bytes as too large"
            f" (AMI_ANTENNA_MAX_POST_BYTES is {self._limits.post_bytes})"
            if error.status == _TOO_LARGE
            else f"Antenna refused the result: {error}"
        )
        _log.error("result_replaced_by_error", job_id=kept.held.job_id, image_id=kept.held.task.image_id, reason=text)
        size_bytes = self._journal.keep([(kept.held.id, [error_result(kept.held.task.image_id, text)])])
        self._post_until_settled([KeptResult(kept.held, size_bytes)])

    def _entry(self, kept: KeptResult) -> PostEntry:
        return PostEntry(kept.held.task.reply_subject, kept.size_bytes, partial(self._journal.parts, kept.held.id))

    def _done(self, group: Sequence[KeptResult]) -> None:
        self._journal.forget(kept.held.id for kept in group)
        listener = self._listener
        if listener is not None:
            listener()
