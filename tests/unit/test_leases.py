"""What a reply subject tells about its lease, and how much may be held under one."""

from __future__ import annotations

import pytest

from adc_worker.antenna.leases import ArrivalWatch, Delivery, LeaseTerms, SaveWatch, parse_reply_subject, same_message

MB = 1_000_000

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
        SUBJECT.replace("job_11", "job_12"),  # a stream and the consumer of another
        SUBJECT.replace("job", "*"),
        SUBJECT.replace("job_11.", "job_11.>."),
        f"{SUBJECT} evil 4\r\nPUB x 0",  # a command of NATS's protocol
        f"{SUBJECT}\n",
        SUBJECT.replace(".5.", ".\u0665."),
        SUBJECT.replace(".5.", f".{10**19}."),  # more than a database holds
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


def played(saves_per_s: float, worker_per_s: float, images: int, ack_wait_s: float = 300.0) -> tuple[float, float]:
    """Play a job by tenths of a second: one worker, one server that saves in order.

    Return the longest lease and the time of all.
    """
    lease, watch = LeaseTerms(ack_wait_s), SaveWatch()
    fetched_at: list[float] = []
    accepted, saved, longest_s, now = 0.0, 0.0, 0.0, 0.0
    while saved < images:
        now += 0.1
        accepted = min(len(fetched_at), accepted + worker_per_s * 0.1)
        before, saved = int(saved), min(accepted, saved + saves_per_s * 0.1)
        longest_s = max([longest_s, *(now - fetched_at[number] for number in range(before, int(saved)))])
        held = len(fetched_at) - int(accepted)
        wanted = min(8, lease.held_limit(worker_per_s) - held)
        if watch.is_due(lease, now, held, int(accepted)):
            watch.look(lease, now, int(accepted), int(saved))
        room = watch.room(lease, held, int(accepted))
        fetched_at += [now] * min(images - len(fetched_at), wanted, room)
    return longest_s, now


@pytest.mark.parametrize(
    ("saves_per_s", "worker_per_s"), [(0.5, 20.0), (0.5, 1.0), (1.0, 0.8), (3.0, 2.0), (0.3, 20.0)]
)
def test_results_are_saved_within_their_lease_however_slowly_antenna_saves(
    saves_per_s: float, worker_per_s: float
) -> None:
    """The GPU waits for the saves; nothing is known of their rate at the start."""
    longest_s, _took_s = played(saves_per_s, worker_per_s, images=1000)
    assert longest_s < 300


def test_a_server_that_saves_as_fast_as_the_worker_posts_does_not_hold_it_up() -> None:
    """10 000 images at 20 images/s take 500 s."""
    _longest_s, took_s = played(25.0, 20.0, images=10_000)
    assert took_s < 505


def test_a_short_job_of_a_fast_worker_does_not_wait_for_the_first_look_at_the_saves() -> None:
    """200 images at 40 images/s take 5 s: the rate is known before the 75 tasks of the assumed one are held."""
    _longest_s, took_s = played(50.0, 40.0, images=200)
    assert took_s < 5.5


def test_saves_are_looked_at_though_every_task_was_worked_off() -> None:
    """75 results that were accepted and are not known to be saved leave no room; nothing is held then."""
    lease, watch = LeaseTerms(), SaveWatch()
    assert watch.room(lease, held=0, accepted=75) == 0
    assert watch.is_due(lease, 0.0, held=0, accepted=75)
    assert not SaveWatch().is_due(lease, 0.0, held=0, accepted=0)


def test_looks_become_ever_rarer() -> None:
    """A server that saves nothing is asked every 2 s in the end, not whenever a fetch wants more."""
    lease, watch, looks = LeaseTerms(), SaveWatch(), 0
    for tenth in range(600):
        if watch.is_due(lease, tenth / 10, held=60, accepted=5):
            watch.look(lease, tenth / 10, accepted=5, saved=0)
            looks += 1
    assert 25 <= looks <= 36


def test_results_that_antenna_never_counts_hold_fetching_up_for_one_lease() -> None:
    """Refused there, or posted twice: after ack_wait they are no lease any more."""
    lease, watch = LeaseTerms(100), SaveWatch()
    watch.look(lease, 0.0, accepted=30, saved=0)
    watch.look(lease, 99.0, accepted=30, saved=0)
    assert watch.unsaved(30) == 30
    watch.look(lease, 101.0, accepted=30, saved=0)
    assert watch.unsaved(31) == 1


def test_a_restarted_job_waits_for_nothing_of_before() -> None:
    """Its counters begin at 0 again, and what was accepted of it then is never saved."""
    lease, watch = LeaseTerms(100), SaveWatch(accepted=500)
    assert watch.unsaved(501) == 1
    watch.look(lease, 0.0, accepted=700, saved=180)
    assert watch.unsaved(700) == 20
    watch.look(lease, 10.0, accepted=700, saved=0)
    assert watch.unsaved(700) == 0


def again(subject: str, delivery: int = 2) -> str:
    return subject.replace("consumer.2", f"consumer.{delivery}")


def _fetched(count: int) -> ArrivalWatch:
    watch = ArrivalWatch(LeaseTerms(300))
    for task in range(count):
        watch.fetched(task, 0.0)
    return watch


def test_tasks_that_came_stand_for_as_many_more() -> None:
    """Beside ten; those that overtook the first do not count until it came, nor twice when they are tried again."""
    watch = _fetched(10)
    assert watch.room(1.0) == 0
    for task in range(1, 10):
        watch.tried(task, 1.0)
    assert watch.room(1.0) == 0
    for _ in range(2):
        watch.tried(0, 2.0)
        assert watch.room(2.0) == 20


def test_a_task_that_takes_long_to_come_tells_how_many_like_it_do() -> None:
    """35 MB in 100 s, for one of 25 MB: one in a quarter of the lease. Half a lease later that is forgotten."""
    watch = _fetched(11)
    for task in (0, 1, 2, 3):
        watch.tried(task, 29.0, MB)
    assert watch.room(29.0) == 10 + 2 * 4 - 11
    for task in range(10, 4, -1):
        watch.tried(task, 90.0, MB)
    watch.tried(4, 100.0, 25 * MB)
    assert watch.room(100.0) == watch.room(250.0) == 10 + 1
    assert watch.room(250.1) == 10 + 11


def test_downloads_that_all_take_long_show_their_pace_together() -> None:
    """Forty at once, each of them for 60 s: two in three seconds."""
    watch = _fetched(40)
    for task in range(40):
        watch.tried(task, 60.0, MB)
    assert watch.room(60.0) == 10 + min(40, int(40 / 60 * 300 / 4))
    slower = _fetched(40)
    for task in range(40):
        slower.tried(task, 200.0, MB)
    assert slower.room(200.0) == 10 + int(40 / 200 * 300 / 4)


def test_a_download_that_hangs_tells_nothing() -> None:
    """It ends in vain, or brings little beside what the others brought meanwhile."""
    for size_bytes in (0, MB):
        watch = _fetched(10)
        for task in range(1, 10):
            watch.tried(task, 1.0, MB)
        watch.tried(0, 31.0, size_bytes)
        assert watch.room(31.0) == 20


def test_redeliveries_correct_the_terms() -> None:
    """A third delivery shows max_deliver; two of tasks in hand, after 50 and 60 s, show the true ack_wait."""
    lease = LeaseTerms()
    lease.learn(again(SUBJECT, 3), None, 0.0)
    assert (lease.max_deliver, lease.ack_wait_s) == (3, 300.0)
    lease.learn(SUBJECT, 1000.0, 1050.0)
    assert lease.ack_wait_s == 300.0, "one alone may have been handed back"
    lease.learn(again(SUBJECT, 1), 1000.0, 1001.0)  # a first delivery tells nothing
    lease.learn(SUBJECT, 1000.0, 1060.0)
    assert lease.ack_wait_s == 60.0


def test_a_corrected_ack_wait_is_not_kept_for_ever() -> None:
    """After an hour the configured one is tried again: the correction may have been a mistake."""
    lease = LeaseTerms()
    for now in (1050.0, 1060.0):
        lease.learn(SUBJECT, 1000.0, now)
    lease.learn(again(SUBJECT, 1), None, 1060.0 + 3599.0)
    assert lease.ack_wait_s == 60.0
    lease.learn(again(SUBJECT, 1), None, 1060.0 + 3601.0)
    assert lease.ack_wait_s == 300.0


def test_a_renewal_begins_every_lease_anew() -> None:
    """Those of tasks fetched later begin later."""
    lease = LeaseTerms(renewed_at=500.0)
    assert lease.left_s(fetched_at=100.0, now=600.0) == 200.0
    assert lease.left_s(fetched_at=550.0, now=600.0) == 250.0


def test_deliveries_of_one_message_are_known_as_such() -> None:
    """Another place in the stream, or another incarnation of it, is another message."""
    assert same_message(SUBJECT, SUBJECT.replace("consumer.2", "consumer.1"))
    assert not same_message(SUBJECT, SUBJECT.replace(".5.7.", ".6.7."))
    assert not same_message(SUBJECT, SUBJECT.replace("1784725318713022421", "1784725318713022422"))
    assert same_message(SUBJECT, "opaque")
