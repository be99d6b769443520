"""What a task's `reply_subject` tells about its lease, and the terms all leases share."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FIELDS = 9  # $JS.ACK.<stream>.<consumer>.<delivered>.<stream_seq>.<consumer_seq>.<timestamp_ns>.<pending>

# Share of ack_wait that held tasks may fill: the other half covers a batch that takes twice as long as measured
# and the server's own queue (design, "Leases").
HORIZON_SHARE = 0.5


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
    parts = subject.split(".")
    if len(parts) != _FIELDS or parts[:2] != ["$JS", "ACK"]:
        return None
    try:
        count, stream_seq, _consumer_seq, timestamp_ns, pending = map(int, parts[4:])
    except ValueError:
        return None
    return Delivery(count, stream_seq, timestamp_ns, pending)


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How long a fetched task is ours, and how often it is handed out."""

    ack_wait_s: float = 300.0
    max_deliver: int = 2

    def __post_init__(self) -> None:
        if self.ack_wait_s <= 0 or self.max_deliver < 1:
            raise ValueError(f"a lease needs ack_wait_s > 0 and max_deliver >= 1, not {self}")

    def held_limit(self, images_per_s: float) -> int:
        """Return how many tasks may be held at `images_per_s`: rate x 0.5 x ack_wait, at least one."""
        return max(1, int(images_per_s * HORIZON_SHARE * self.ack_wait_s))
