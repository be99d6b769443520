"""What a task's `reply_subject` tells about its lease, and the terms all leases share."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from dataclasses import dataclass

from adc_worker.log import get_logger

_log = get_logger(__name__)

# $JS.ACK.<stream>.<consumer>.<delivered>.<stream_seq>.<consumer_seq>.<timestamp_ns>.<pending>, named as Antenna does
# (docs/antenna.md, "Taking tasks"). Strict, because what matches is also published to; numbers are such as SQLite can
# store.
_SUBJECT = re.compile(
    r"\$JS\.ACK\.job_(\d{1,18})\.job-\1-consumer\.(\d{1,18})\.(\d{1,18})\.\d{1,18}\.([1-8]?\d{1,18})\.(\d{1,18})",
    re.ASCII,
)

# Share of ack_wait that held tasks may fill: the other half covers a batch that takes twice as long as measured
# and the server's own queue.
HORIZON_SHARE = 0.5
ACK_WAIT_MIN_S = 1.0  # the smallest that AMI_ANTENNA_ACK_WAIT_SECONDS takes, too
# A shorter ack_wait, learnt from redeliveries, is in force for an hour at 300 s and then put to the test again: a true
# one costs a few second deliveries an hour, a mistake does not last as long as the process.
CORRECTION_LEASES = 12
ASSUMED_SAVES_PER_S = 0.5  # until the job's counters tell: half the slowest saving observed
# Shares of ack_wait: most between two looks at a job whose saves may hold fetching up, the window that the rate is
# taken from, and how long a result may wait to be saved before the server counts as the slower one.
LOOK_SHARE, SAVE_WINDOW_SHARE, SAVE_LAG_SHARE = 1 / 150, 1 / 5, 1 / 10
# Shares of ack_wait: a task that took longer to come shows how fast tasks come, is heeded for so long, and beside the
# unproven ones no more may wait than come in so long at that pace. In benchmarks/policy_regret.py no lease ends with
# these; without, those of 4 of its 194 jobs, on links of 0.6 to 2.1 MB/s.
SLOW_SHARE, HEED_SHARE, AHEAD_SHARE = 0.1, 0.5, 0.25
EVIDENCE_RESULTS, GROWTH = 5, 1.5  # saves that a rate is taken from; what a server that keeps up is tried with next


_EPOCH_S = time.time() - time.monotonic()


def lease_clock() -> float:
    """Return Unix seconds as of this process's start: a clock that is set meanwhile neither ends nor extends leases."""
    return _EPOCH_S + time.monotonic()


@dataclass(frozen=True, slots=True)
class Delivery:
    """What JetStream wrote into a reply subject.

    Attributes:
        count: 1 for the first delivery of the task.
        stream_seq: position of the task in the job's stream; rises with `timestamp_ns` within one incarnation.
        timestamp_ns: when the task was published, Unix nanoseconds.
        pending: tasks of the job that were not delivered yet.
    """

    count: int
    stream_seq: int
    timestamp_ns: int
    pending: int


def job_of(subject: str) -> int | None:
    """Return the job in whose stream a reply subject acknowledges; None for a form we do not know."""
    named = re.match(r"\$JS\.ACK\.job_(\d{1,18})\.", subject, re.ASCII)
    return int(named[1]) if named else None


def parse_reply_subject(subject: str) -> Delivery | None:
    """Read a reply subject; None for a form we do not know, which stays opaque."""
    found = _SUBJECT.fullmatch(subject)
    return Delivery(*map(int, found.groups()[1:])) if found else None


def same_message(subject: str, other: str) -> bool:
    """Whether two subjects are deliveries of one message: the same place in the same incarnation of a stream.

    Forms that cannot be read are taken for the same: their image is.
    """
    first, second = parse_reply_subject(subject), parse_reply_subject(other)
    if first is None or second is None:
        return True
    return (first.stream_seq, first.timestamp_ns) == (second.stream_seq, second.timestamp_ns)


@dataclass(slots=True)
class LeaseTerms:
    """How long a fetched task is ours, and how often it is handed out: as configured, then as redeliveries show.

    Attributes:
        renewed_at: Unix seconds at which all leases held then last began anew together; 0 where they never did.
        configured_s: the ack_wait to go back to.
        corrected_at: Unix seconds of the last correction of ack_wait; 0 when none is in force.
        early_s: age of the last lease that ended before ack_wait; 0 when there was none.
    """

    ack_wait_s: float = 300.0
    max_deliver: int = 2
    renewed_at: float = 0.0
    configured_s: float = 0.0
    corrected_at: float = 0.0
    early_s: float = 0.0

    def __post_init__(self) -> None:
        if self.ack_wait_s <= 0 or self.max_deliver < 1:
            raise ValueError(f"a lease needs ack_wait_s > 0 and max_deliver >= 1, not {self}")
        self.configured_s = self.configured_s or self.ack_wait_s

    def held_limit(self, images_per_s: float) -> int:
        """Return how many tasks may be held at `images_per_s`: rate x 0.5 x ack_wait, at least one."""
        return max(1, int(images_per_s * HORIZON_SHARE * self.ack_wait_s))

    @property
    def unproven_limit(self) -> int:
        """How many tasks may be held before any was worked off: ten keep within half of 300 s at up to 15 s an image.

        At least two, the probe's: today's worker needs 2 s an image.
        """
        return max(2, min(10, int(self.ack_wait_s / 30)))

    def left_s(self, fetched_at: float, now: float) -> float:
        """Return the seconds (negative: since when) that a task fetched at Unix time `fetched_at` is still ours."""
        return max(fetched_at, self.renewed_at) + self.ack_wait_s - now

    def is_last(self, subject: str) -> bool:
        """Whether nobody gets the task again once this lease is over."""
        delivery = parse_reply_subject(subject)
        return delivery is not None and delivery.count >= self.max_deliver

    def learn(self, subject: str, held_since: float | None, now: float) -> None:
        """Take in a delivery at `now`; `held_since`: we hold the task by the delivery before it, fetched then."""
        if self.corrected_at and now - self.corrected_at > CORRECTION_LEASES * self.configured_s:
            _log.info("ack_wait_restored", was_s=self.ack_wait_s, now_s=self.configured_s)
            self.ack_wait_s, self.corrected_at, self.early_s = self.configured_s, 0.0, 0.0
        delivery = parse_reply_subject(subject)
        if delivery is None or delivery.count == 1:
            return
        if delivery.count > self.max_deliver:
            _log.warning("max_deliver_corrected", was=self.max_deliver, seen=delivery.count)
            self.max_deliver = delivery.count
        if held_since is not None:
            self._learn_from_age(now - max(held_since, self.renewed_at), now)

    def _learn_from_age(self, age_s: float, now: float) -> None:
        """Correct ack_wait when two leases ended early, to the longer: one alone may have been handed back."""
        if age_s >= self.ack_wait_s:
            return
        seen_s, proven = max(ACK_WAIT_MIN_S, age_s, self.early_s), self.early_s > 0
        self.early_s = max(ACK_WAIT_MIN_S, age_s)
        if proven and seen_s < self.ack_wait_s:
            _log.warning("ack_wait_corrected", was_s=self.ack_wait_s, seen_s=round(seen_s, 3))
            self.ack_wait_s, self.corrected_at = seen_s, now


class ArrivalWatch:
    """How many tasks may be fetched ahead of those before them, which are still to come: to be tried, in that order.

    Those that came stand for as many more, until the first in that order takes long. What was downloaded meanwhile then
    tells how many of its size come in a while, however many small images overtook it.
    """

    def __init__(self, lease: LeaseTerms) -> None:
        self._lease = lease
        self._fetched = self._bytes = 0
        # Those that are still to come: how many were fetched before, and the time and the bytes downloaded then.
        self._waiting: dict[int, tuple[int, float, int]] = {}
        self._slow: deque[tuple[float, float, int]] = deque()  # (monotonic seconds, bytes/s until then, its bytes)
        self._lock = threading.Lock()

    def fetched(self, task: int, now: float) -> None:
        """Take note of a task, at `now` in monotonic seconds."""
        with self._lock:
            self._waiting[task] = (self._fetched, now, self._bytes)
            self._fetched += 1

    def tried(self, task: int, now: float, size_bytes: int = 0) -> None:
        """Take note that a download of it has ended, the first or another: of `size_bytes`, or in vain."""
        with self._lock:
            came = self._came
            self._bytes += size_bytes
            before, since, bytes_before = self._waiting.pop(task, (-1, now, 0))
            if size_bytes and before == came and now - since > SLOW_SHARE * self._lease.ack_wait_s:
                self._slow.append((now, (self._bytes - bytes_before) / (now - since), size_bytes))

    def room(self, now: float) -> int:
        """Return how many more tasks may be fetched."""
        with self._lock:
            while self._slow and now - self._slow[0][0] > HEED_SHARE * self._lease.ack_wait_s:
                self._slow.popleft()
            came = ahead = self._came
            if self._slow:
                largest, (_at, bytes_per_s, _size) = max(size for _at, _rate, size in self._slow), self._slow[-1]
                ahead = min(came, int(AHEAD_SHARE * self._lease.ack_wait_s * bytes_per_s / largest))
            return self._lease.unproven_limit + came + ahead - self._fetched

    @property
    def _came(self) -> int:
        return next((before for before, _since, _bytes in self._waiting.values()), self._fetched)


class SaveWatch:
    """How fast Antenna saves what this worker posts, from a job's counters.

    Accepted is not saved (docs/antenna.md, "Returning results").

    The counters are those of the job: what peers post is counted, too, so that the rate of a job that several workers
    share is known as a whole, and what waits of ours is known as too little.
    """

    def __init__(self, accepted: int = 0) -> None:
        self.per_s = ASSUMED_SAVES_PER_S
        self._first_at = 0.0
        self._at: float | None = None  # of the last look
        self._moved_at = 0.0  # when the counters were last seen to rise
        self._accepted, self._saved, self._unsaved = accepted, 0, 0
        self._since = (0.0, 0)  # when the stretch began that the rate comes from, and what was saved by then

    def unsaved(self, accepted: int) -> int:
        """Return how many results wait to be saved, as far as known, when `accepted` were taken so far."""
        return max(0, self._unsaved + accepted - self._accepted)

    def room(self, lease: LeaseTerms, held: int, accepted: int) -> int:
        """Return how many tasks, beside those held, Antenna would save within their leases at the rate it saves now."""
        return lease.held_limit(self.per_s) - held - self.unsaved(accepted)

    def is_due(self, lease: LeaseTerms, now: float, held: int, accepted: int) -> bool:
        """Whether to look: once tasks are held, and then from half of what the saves allow on, so before they bind.

        Soon after the first look, then ever less often.
        """
        if self._at is None:
            return held + self.unsaved(accepted) > 0
        pause_s = min(LOOK_SHARE * lease.ack_wait_s, self._at - self._first_at)
        return now - self._at >= pause_s and 2 * self.room(lease, held, accepted) < lease.held_limit(self.per_s)

    def look(self, lease: LeaseTerms, now: float, accepted: int, saved: int) -> None:
        """Take in how many of our results were `accepted` so far, and how many of the job are `saved` by `now`."""
        self._unsaved = max(0, self.unsaved(accepted) - (saved - self._saved))
        if self._at is None:
            self._since, self._moved_at, self._first_at = (now, saved), now, now
        elif saved > self._saved:
            self._moved_at = now
        elif saved < self._saved or now - self._moved_at > lease.ack_wait_s:
            self._unsaved = 0  # the job was restarted; or lost at Antenna, and delivered again by now
        self._at, self._accepted, self._saved = now, accepted, saved
        span_s, count = now - self._since[0], saved - self._since[1]
        if span_s <= 0 or (count < EVIDENCE_RESULTS and span_s < SAVE_WINDOW_SHARE * lease.ack_wait_s):
            return
        rate, self._since = max(0, count) / span_s, (now, saved)
        keeps_up = self._unsaved <= SAVE_LAG_SHARE * lease.ack_wait_s * rate  # what it could do is not known then
        self.per_s = max(self.per_s, GROWTH * rate) if keeps_up else rate
