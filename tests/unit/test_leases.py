"""What a reply subject tells about its lease, and how much may be held under one."""

from __future__ import annotations

import pytest

from adc_worker.antenna.leases import Delivery, LeaseTerms, parse_reply_subject

# Recorded on a running Antenna.
SUBJECT = "$JS.ACK.job_11.job-11-consumer.2.5.7.1784725318713022421.3"


def test_a_reply_subject_is_read() -> None:
    """Delivery, position in the stream, time of publishing, and how many are left."""
    assert parse_reply_subject(SUBJECT) == Delivery(count=2, stream_seq=5, timestamp_ns=1784725318713022421, pending=3)


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "job.11.tasks",
        "$JS.ACK.job_11.job-11-consumer.2.5.7.1784725318713022421",  # a field less
        f"{SUBJECT}.1",  # a field more
        "$JS.ACK.hub.ACC.job_11.job-11-consumer.2.5.7.1784725318713022421.3.x",  # with domain and account
        SUBJECT.replace("ACK", "NAK"),
        SUBJECT.replace("$JS", "JS"),
        SUBJECT.replace(".2.", ".two."),
        SUBJECT.replace(".3", "."),
    ],
)
def test_a_reply_subject_of_another_form_stays_opaque(subject: str) -> None:
    """It is still posted back as it came; only nothing is read from it."""
    assert parse_reply_subject(subject) is None


def test_half_the_lease_may_be_filled() -> None:
    """At 2 images/s and 300 s that is 300 images; at 0.5 and 100 s it is 25."""
    assert LeaseTerms().held_limit(2.0) == 300
    assert LeaseTerms(ack_wait_s=100).held_limit(0.5) == 25


def test_one_task_may_always_be_held() -> None:
    """An image that takes longer than half a lease is still worked on."""
    assert LeaseTerms().held_limit(0.0001) == 1


@pytest.mark.parametrize(("ack_wait_s", "max_deliver"), [(0, 2), (-1, 2), (300, 0)])
def test_terms_that_lease_nothing_are_refused(ack_wait_s: float, max_deliver: int) -> None:
    """With the offending value in the message."""
    with pytest.raises(ValueError, match=f"max_deliver={max_deliver}"):
        LeaseTerms(ack_wait_s, max_deliver)
