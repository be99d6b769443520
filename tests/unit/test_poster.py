"""Kept results reach Antenna once they can, in posts of a bounded size, and none is lost on the way."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

from adc_worker.antenna.wire import DELETED, PostEntry, Task
from adc_worker.errors import AntennaBodyTooLarge, AntennaRefused, AntennaRejected, AntennaUnavailable, NotAntenna
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import RESULTS_PER_POST, Poster, PosterLimits
from tests.support.fakes import Receiver, is_error, recorded, result, task
from tests.support.waiting import wait_until

Entries = Sequence[tuple[str, bytes]]
SOON_S = 0.0005
ALL = 1 << 40


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db")
    yield journal
    journal.close()


@contextmanager
def posting(journal: Journal, receiver: Receiver, posts: int = 1, post_bytes: int = 10_000) -> Iterator[Poster]:
    """Run a poster; leaving stops it without a flush."""
    poster = Poster(journal, receiver, PosterLimits(posts, post_bytes), first_backoff_s=SOON_S)
    try:
        yield poster
    finally:
        poster.close(0)


def keep(journal: Journal, numbers: Sequence[int], job_id: int = 7, size_bytes: int = 40) -> list[bytes]:
    """Record and keep results of these images; return their bodies."""
    held = journal.record(job_id, [task(number) for number in numbers])
    kept = [result(number, size_bytes) for number in numbers]
    journal.keep([(one.id, [body]) for one, body in zip(held, kept, strict=True)])
    return kept


def sizes(receiver: Receiver) -> list[int]:
    return [len(entries) for _job_id, entries in receiver.posts]


def bad(*numbers: int, names: bool = True) -> Callable[[int, Entries], None]:
    """Refuse every post that holds a result of these images, as Antenna refuses whole posts, naming them or not."""
    spoilt = {result(number) for number in numbers}

    def fault(_job_id: int, entries: Entries) -> None:
        places = {place for place, (_subject, body) in enumerate(entries) if body in spoilt}
        if places:
            raise AntennaRejected("answered 400: invalid box", 400, places if names else (), blames_result=True)

    return fault


def times(count: int, error: Exception) -> Callable[[int, Entries], None]:
    """Fail that often, then accept."""
    left = [count]

    def fault(_job_id: int, _entries: Entries) -> None:
        if left[0]:
            left[0] -= 1
            raise error

    return fault


def test_a_kept_result_is_posted_with_its_subject_and_forgotten(journal: Journal) -> None:
    """`wake` is all it takes."""
    receiver = Receiver()
    with posting(journal, receiver) as poster:
        (body,) = keep(journal, [1])
        poster.wake()
        assert poster.wait_idle(5)
    assert receiver.posts == [(7, [(task(1).reply_subject, body)])]
    assert recorded(journal) == set()


def test_results_of_an_earlier_run_are_posted_at_start(journal: Journal) -> None:
    """Nobody needs to wake it."""
    kept = keep(journal, [1, 2])
    receiver = Receiver()
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert list(receiver.bodies) == kept


def test_a_post_holds_results_of_one_job(journal: Journal) -> None:
    """The job is in the path."""
    keep(journal, [1, 2], job_id=7)
    keep(journal, [3], job_id=8)
    keep(journal, [4], job_id=7)
    receiver = Receiver()
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert [(job_id, len(entries)) for job_id, entries in receiver.posts] == [(7, 2), (8, 1), (7, 1)]


def test_a_post_holds_no_more_bytes_than_allowed(journal: Journal) -> None:
    """Two of 40 bytes fit into 100, a third would not."""
    keep(journal, range(5))
    receiver = Receiver()
    with posting(journal, receiver, post_bytes=100) as poster:
        assert poster.wait_idle(5)
    assert sizes(receiver) == [2, 2, 1]


def test_a_result_larger_than_a_post_goes_alone(journal: Journal) -> None:
    """It is tried: Antenna's own limit may be another."""
    keep(journal, [1])
    (large,) = keep(journal, [2], size_bytes=500)
    keep(journal, [3])
    receiver = Receiver()
    with posting(journal, receiver, post_bytes=100) as poster:
        assert poster.wait_idle(5)
    assert sizes(receiver) == [1, 1, 1]
    assert receiver.posts[1][1][0][1] == large


def test_a_post_holds_no_more_results_than_allowed(journal: Journal) -> None:
    """Antenna queues each one by itself."""
    keep(journal, range(RESULTS_PER_POST + 1))
    receiver = Receiver()
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert sizes(receiver) == [RESULTS_PER_POST, 1]


@pytest.mark.parametrize(("names", "attempts"), [(True, 4), (False, 8)])
def test_one_bad_result_costs_itself_alone(journal: Journal, names: bool, attempts: int) -> None:
    """Antenna refuses whole posts; its answer names the one, or halving finds it, and it becomes an error."""
    kept = keep(journal, range(8))
    receiver = Receiver(bad(5, names=names))
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    good = [body for body in kept if body != result(5)]
    (error,) = [body for body in receiver.bodies if is_error(body)]
    assert orjson.loads(error) == {"error": "Antenna refused the result: answered 400: invalid box", "image_id": "5"}
    assert receiver.bodies == {**dict.fromkeys(good, 1), error: 1}
    assert receiver.attempts == attempts
    assert recorded(journal) == set()


def test_the_error_of_a_bad_result_is_posted_with_the_subject_of_its_task(journal: Journal) -> None:
    """Or another image's lease would be acknowledged."""
    keep(journal, [1, 2, 3])
    receiver = Receiver(bad(2))
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    (subject,) = [subject for _job, entries in receiver.posts for subject, body in entries if is_error(body)]
    assert subject == task(2).reply_subject


def test_a_post_too_large_for_a_proxy_is_halved(journal: Journal) -> None:
    """Its limit is unknown and often below ours; nothing becomes an error for that."""

    def at_most_two(_job_id: int, entries: Entries) -> None:
        if len(entries) > 2:
            raise AntennaBodyTooLarge("answered 413")

    kept = keep(journal, range(7))
    receiver = Receiver(at_most_two)
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert receiver.bodies == dict.fromkeys(kept, 1)


def test_a_result_too_large_by_itself_stays_kept_and_holds_up_no_other(journal: Journal) -> None:
    """Its limit is the way's, not the image's: once that takes it, it is accepted as it is."""
    limit_bytes = [400]

    def at_most(_job_id: int, entries: Entries) -> None:
        if sum(len(body) for _subject, body in entries) > limit_bytes[0]:
            raise AntennaBodyTooLarge("answered 413")

    (large,) = keep(journal, [1], size_bytes=500)
    others = keep(journal, range(2, 12))
    receiver = Receiver(at_most)
    with posting(journal, receiver, post_bytes=9999) as poster:
        wait_until(lambda: len(receiver.bodies) == len(others))
        assert receiver.bodies == dict.fromkeys(others, 1)
        assert journal.unposted_count() == 1
        limit_bytes[0] = 9999
        assert poster.wait_idle(20)
    assert receiver.bodies == dict.fromkeys([large, *others], 1)


def test_an_error_that_is_refused_itself_is_given_up(journal: Journal) -> None:
    """There is nothing left to say about that image, and the others wait."""
    receiver = Receiver(times(2, AntennaRejected("answered 400", 400, {0})))
    keep(journal, [1])
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert (receiver.attempts, receiver.posts) == (2, [])
    assert recorded(journal) == set()


@pytest.mark.parametrize(
    "error",
    [
        AntennaUnavailable("answered 503"),
        AntennaRefused("answered 403"),
        AntennaRejected("answered 405", 405),
        NotAntenna("answered 400 with text/html"),
    ],
)
def test_what_tells_nothing_about_a_result_costs_none(journal: Journal, error: Exception) -> None:
    """An outage, a revoked token, a maintenance page: the same post is tried until it is accepted."""
    kept = keep(journal, [1, 2])
    receiver = Receiver(times(5, error))
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert receiver.attempts == 6
    assert receiver.bodies == dict.fromkeys(kept, 1)


@pytest.mark.parametrize("reason", ["its fields are required", "the third of one is invalid"])
def test_a_400_that_is_not_about_the_result_costs_none(journal: Journal, reason: str) -> None:
    """A proxy that drops the body, or places that no post of ours has: each result is tried again by itself."""
    error = AntennaRejected(f"answered 400: {reason}", 400, {2} if "third" in reason else ())
    kept = keep(journal, [1, 2])
    receiver = Receiver(times(3, error))
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(20)
    assert receiver.bodies == dict.fromkeys(kept, 1)


def no_job_7(job_id: int, _entries: Entries) -> None:
    if job_id == 7:
        raise AntennaRejected("answered 404", 404)


def test_results_of_a_job_that_is_gone_are_given_up(journal: Journal) -> None:
    """404 at the post, and at the job itself: nobody wants them; other jobs' results go on."""
    keep(journal, [1, 2], job_id=7)
    kept = keep(journal, [3], job_id=8)
    receiver = Receiver(no_job_7)
    receiver.status = DELETED
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert list(receiver.bodies) == kept
    assert recorded(journal) == set()


def test_results_of_a_job_that_antenna_still_shows_are_kept(journal: Journal) -> None:
    """One 404 ends no job: while its detail is there, the post is tried until it is accepted."""
    kept = keep(journal, [1, 2], job_id=7)
    receiver = Receiver(times(4, AntennaRejected("answered 404", 404)))
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert receiver.bodies == dict.fromkeys(kept, 1)


class Refusing(Receiver):
    """Refuses what is posted for some jobs."""

    def __init__(self, jobs: dict[int, AntennaRefused]) -> None:
        super().__init__(self._refuse)
        self.jobs = jobs

    def _refuse(self, job_id: int, _entries: Entries) -> None:
        if job_id in self.jobs:
            raise self.jobs[job_id]


def test_a_job_that_is_refused_stops_itself_alone_until_it_is_accepted_again(journal: Journal) -> None:
    """403: fetching goes on for the others."""
    kept = keep(journal, [1], job_id=7)
    receiver = Refusing({7: AntennaRefused("answered 403", 403)})
    with posting(journal, receiver) as poster:
        wait_until(lambda: poster.refuses(7))
        assert not poster.refuses(8)
        assert poster.refused_jobs() == {7}
        assert poster.is_done(besides=[7])
        assert not poster.is_done()
        receiver.jobs = {}
        assert poster.wait_idle(5)
        wait_until(lambda: not poster.refuses(7))
    assert receiver.bodies == dict.fromkeys(kept, 1)


def test_an_outage_does_not_end_a_refusal(journal: Journal) -> None:
    """Nothing was accepted meanwhile: what is fetched for the job could still not be posted."""
    keep(journal, [1], job_id=7)
    answers: list[Exception] = [AntennaRefused("answered 403", 403)]

    def fault(_job_id: int, _entries: Entries) -> None:
        raise answers[-1]

    receiver = Receiver(fault)
    with posting(journal, receiver) as poster:
        wait_until(lambda: poster.refuses(7))
        answers.append(AntennaUnavailable("answered 503"))
        outage_from = receiver.attempts
        wait_until(lambda: receiver.attempts >= outage_from + 2)
        assert poster.refuses(7)


def test_results_that_nothing_proves_do_not_end_a_refusal(tmp_path: Path) -> None:
    """An hour later their stream may be another one: they are not posted, and so nothing was accepted."""
    now_s = [1000.0]
    journal = Journal(tmp_path / "journal.db", now=lambda: now_s[0])
    held = journal.record(7, [task(1)])
    journal.keep([(held[0].id, [result(1)])])
    receiver = Refusing({7: AntennaRefused("answered 403", 403)})
    try:
        with posting(journal, receiver) as poster:
            wait_until(lambda: poster.refuses(7))
            now_s[0] += 3600
            wait_until(poster.is_done)  # it may not be posted
            assert poster.refuses(7)
    finally:
        journal.close()


def test_a_refused_token_stops_every_job_until_it_is_accepted_for_any(journal: Journal) -> None:
    """401: what is fetched for another job could not be posted either."""
    keep(journal, [1], job_id=7)
    receiver = Refusing({7: AntennaRefused("answered 401", 401), 8: AntennaRefused("answered 401", 401)})
    with posting(journal, receiver, posts=2) as poster:
        wait_until(lambda: poster.refuses(8))
        assert poster.refused_jobs() == set()
        keep(journal, [2], job_id=8)
        receiver.jobs = {7: AntennaRefused("answered 403", 403)}
        poster.wake()
        wait_until(lambda: not poster.refuses(8))
        wait_until(lambda: poster.refused_jobs() == {7})


def test_a_refusal_ends_with_the_last_result_that_it_concerns(journal: Journal) -> None:
    """The job is cancelled meanwhile: nothing is left that could be tried, and fetching goes on."""
    keep(journal, [1], job_id=7)
    receiver = Refusing({7: AntennaRefused("answered 401", 401)})
    with posting(journal, receiver) as poster:
        wait_until(lambda: poster.refuses(8))
        journal.bury(7)
        wait_until(lambda: not poster.refuses(8))


class Forgetful(Receiver):
    """Takes posts, and does not name the results of some reply subjects in its answer."""

    def __init__(self, unnamed: set[str]) -> None:
        super().__init__()
        self.unnamed = unnamed

    def post_results(self, job_id: int, entries: Sequence[PostEntry]) -> frozenset[str]:
        return super().post_results(job_id, entries) - self.unnamed


@pytest.mark.parametrize("unnamed", [{2}, {1, 2, 3}])
def test_only_results_that_the_answer_names_count_as_accepted(journal: Journal, unnamed: set[int]) -> None:
    """The others stay kept and are posted again."""
    kept = keep(journal, [1, 2, 3])
    receiver = Forgetful({task(number).reply_subject for number in unnamed})
    with posting(journal, receiver) as poster:
        wait_until(lambda: receiver.attempts >= 3)
        assert poster.accepted[7] == 3 - len(unnamed)
        assert journal.unposted_count() == len(unnamed)
        receiver.unnamed = set()
        assert poster.wait_idle(20)
        assert poster.accepted[7] == 3
    assert set(receiver.bodies) == set(kept)


def test_no_more_posts_are_under_way_than_allowed_and_no_fewer(journal: Journal) -> None:
    """Three posts that wait for each other, out of nine results."""
    under_way, most, lock = [0], [0], threading.Lock()
    three = threading.Barrier(3)

    def wait_for_two_others(_job_id: int, _entries: Entries) -> None:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        three.wait(5)
        with lock:
            under_way[0] -= 1

    kept = keep(journal, range(9))
    receiver = Receiver(wait_for_two_others)
    with posting(journal, receiver, posts=3, post_bytes=50) as poster:  # one result each
        assert poster.wait_idle(5)
    assert most == [3]
    assert receiver.bodies == dict.fromkeys(kept, 1)


def test_a_post_under_way_is_not_sent_twice(journal: Journal) -> None:
    """New results go beside it, without what it already holds."""
    first_may_end = threading.Event()
    keep(journal, [1])

    def hold_first(_job_id: int, entries: Entries) -> None:
        if entries[0][1] == result(1):
            first_may_end.wait(5)

    receiver = Receiver(hold_first)
    with posting(journal, receiver, posts=2) as poster:
        wait_until(lambda: receiver.attempts == 1)
        keep(journal, [2])
        poster.wake()
        wait_until(lambda: receiver.posts)
        assert list(receiver.bodies) == [result(2)]
        first_may_end.set()
        assert poster.wait_idle(5)
    assert receiver.bodies == {result(1): 1, result(2): 1}


def test_closing_posts_what_is_kept(journal: Journal) -> None:
    """Also what needs a second try."""
    receiver = Receiver(times(1, AntennaUnavailable("answered 503")))
    poster = Poster(journal, receiver, PosterLimits(1, 10_000), first_backoff_s=SOON_S)
    kept = keep(journal, [1, 2])
    poster.wake()
    poster.close(5)
    assert receiver.bodies == dict.fromkeys(kept, 1)


def test_closing_at_once_leaves_the_rest_in_the_journal(journal: Journal) -> None:
    """A back-off of minutes is cut short; the next run posts it."""
    kept = keep(journal, [1, 2])
    receiver = Receiver(times(1, AntennaUnavailable("answered 503")))
    poster = Poster(journal, receiver, PosterLimits(1, 10_000), first_backoff_s=600)
    wait_until(lambda: receiver.attempts == 1)
    poster.close(0)
    assert receiver.attempts == 1
    assert [b"".join(journal.parts(one.id)) for one in journal.unposted([], 10, ALL)] == kept


def test_waiting_for_an_unreachable_antenna_ends_in_time(journal: Journal) -> None:
    """With the news that something is left."""
    keep(journal, [1])
    receiver = Receiver(times(1, AntennaUnavailable("answered 503")))
    poster = Poster(journal, receiver, PosterLimits(1, 10_000), first_backoff_s=600)
    assert not poster.wait_idle(0.01)
    poster.close(0)


@pytest.fixture
def died(monkeypatch: pytest.MonkeyPatch) -> list[threading.ExceptHookArgs]:
    """Return the threads that died, as the worker's loop hears of them."""
    heard: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    return heard


def test_an_unexpected_error_ends_the_poster(journal: Journal, died: list[threading.ExceptHookArgs]) -> None:
    """The result stays, and is not tried in a loop without a pause."""
    error = KeyError("a bug")
    kept = keep(journal, [1])
    receiver = Receiver(times(1000, error))
    with posting(journal, receiver) as poster:
        wait_until(lambda: died)
        assert died[0].exc_value is error
        assert not poster.wait_idle(0.01)
    assert receiver.attempts == 1
    assert [b"".join(journal.parts(one.id)) for one in journal.unposted([], 10, ALL)] == kept


def test_a_journal_that_fails_ends_it_too(tmp_path: Path, died: list[threading.ExceptHookArgs]) -> None:
    """The thread that reads it must not wait on in silence."""
    journal = Journal(tmp_path / "journal.db")
    poster = Poster(journal, Receiver(), PosterLimits(1, 10_000))
    journal.close()
    poster.wake()
    wait_until(lambda: died)


@pytest.mark.parametrize("seed", range(8))
def test_under_random_faults_every_image_has_exactly_one_outcome(journal: Journal, seed: int) -> None:
    """Outages and bad results at random: each image ends with its result, or, if bad, with its error."""
    chance = random.Random(seed)  # noqa: S311 (repeatable)
    spoilt = set(chance.sample(range(60), 6))
    refuse = bad(*spoilt)

    def fault(job_id: int, entries: Entries) -> None:
        if chance.random() < 0.3:
            raise AntennaUnavailable("answered 502")
        refuse(job_id, entries)

    receiver = Receiver(fault)
    receiver.status = "SUCCESS"  # or one would be repeated
    with posting(journal, receiver, posts=3, post_bytes=200) as poster:
        for start in range(0, 60, 6):
            keep(journal, range(start, start + 6), job_id=start % 4)
            poster.wake()
        assert poster.wait_idle(20)
    errors = {orjson.loads(body)["image_id"] for body in receiver.bodies if is_error(body)}
    results = {body for body in receiver.bodies if not is_error(body)}
    assert errors == {str(number) for number in spoilt}
    assert results == {result(number) for number in range(60) if number not in spoilt}
    assert set(receiver.bodies.values()) == {1}
    assert recorded(journal) == set()


def test_a_job_whose_posts_fail_does_not_hold_up_another(journal: Journal) -> None:
    """It waits without a post of its own, however few may be under way."""

    def no_job_7(job_id: int, _entries: Entries) -> None:
        if job_id == 7:
            raise AntennaUnavailable("answered 500")

    keep(journal, range(4), job_id=7)
    kept = keep(journal, range(10, 14), job_id=8)
    receiver = Receiver(no_job_7)
    poster = Poster(journal, receiver, PosterLimits(1, 100), first_backoff_s=600)
    wait_until(lambda: len(receiver.bodies) == 4)
    poster.close(0)
    assert receiver.bodies == dict.fromkeys(kept, 1)
    assert receiver.attempts == 3, "one of job 7, two of job 8"


def later(number: int) -> Task:
    """Return a task as the first one of a job's next stream."""
    subject = "$JS.ACK.job_7.job-7-consumer.1.1.1.1760000000000009999.0"
    return Task(image_id=str(number), image_url="https://images.example.org/9.jpg", reply_subject=subject)


def silent(journal: Journal) -> None:
    """Make it long ago that Antenna was heard of."""
    journal._contacts.clear()


def test_after_a_silence_one_task_is_fetched_before_anything_is_posted(journal: Journal) -> None:
    """It proves another stream here: the results wait for their images."""
    keep(journal, [1, 2, 3])
    silent(journal)
    receiver = Receiver()
    receiver.tasks = [later(9)]
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert receiver.posts == []
    assert [held.task.image_id for held in journal.unfinished(7)] == ["9"]


def test_after_a_silence_the_results_of_a_job_that_goes_on_are_posted(journal: Journal) -> None:
    """No task came, or one of the same stream."""
    kept = keep(journal, [1, 2, 3])
    silent(journal)
    receiver = Receiver()
    receiver.tasks = [task(4)]
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
        assert receiver.bodies == dict.fromkeys(kept, 1)


@pytest.mark.parametrize("status", ["CANCELING", "REVOKED", "SUCCESS", "FAILURE"])
def test_after_a_silence_nothing_is_posted_to_a_job_that_is_over(journal: Journal, status: str) -> None:
    """Nor fetched."""
    keep(journal, [1, 2])
    silent(journal)
    receiver = Receiver()
    receiver.status, receiver.tasks = status, [later(9)]
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    assert (receiver.posts, len(receiver.tasks)) == ([], 1)


def test_a_job_that_stays_open_with_all_results_accepted_gets_one_of_them_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is closed when that has ended it."""
    monkeypatch.setattr("adc_worker.journal.poster.LOOK_FIRST_S", 0.002)
    keep(journal, [1, 2])
    receiver = Receiver()
    with posting(journal, receiver) as poster:
        wait_until(lambda: poster.jobs_ended and len(receiver.posts) == 2, 5)
        assert len(receiver.posts[1][1]) == 1
        assert receiver.posts[1][1][0] in receiver.posts[0][1]
        receiver.status = "SUCCESS"
        poster._endings[7].look_at = 0.0
        wait_until(lambda: journal.finished_jobs() == [], 5)


def test_a_job_that_another_worker_is_at_is_not_ended_by_this_one(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take a task that nobody works off here, and that waits for its lease. The other one ends the job."""
    monkeypatch.setattr("adc_worker.journal.poster.LOOK_FIRST_S", 0.002)
    keep(journal, [1])
    receiver = Receiver()
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(5)
    (left,) = journal.record(7, [task(2)])
    receiver.tasks = [task(3)]
    newcomer = Journal(tmp_path / "journal.db")
    try:
        with posting(newcomer, receiver) as poster:
            wait_until(lambda: poster.jobs_ended, 5)
    finally:
        newcomer.close()
    assert receiver.tasks == [task(3)]
    journal.forget([left.id])
    with posting(journal, receiver):
        wait_until(lambda: not receiver.tasks, 5)


class LosesOne(Receiver):
    """An Antenna during whose first post the journal loses a result: its page is damaged, or its job was dropped."""

    def __init__(self, journal: Journal, task_id: int) -> None:
        super().__init__()
        self._journal = journal
        self._lost = [task_id]

    def post_results(self, job_id: int, entries: Sequence[PostEntry]) -> frozenset[str]:
        if self._lost:
            self._journal.forget([self._lost.pop()])
        return super().post_results(job_id, entries)


def test_a_result_that_is_gone_while_it_is_posted_breaks_off_its_post_and_nothing_else(
    journal: Journal, died: list[threading.ExceptHookArgs]
) -> None:
    """The others are posted again, whole; no thread dies of it, and no half result counts as a post."""
    gone, *others = keep(journal, range(1, 5))
    receiver = LosesOne(journal, 1)
    with posting(journal, receiver) as poster:
        assert poster.wait_idle(20)
    assert receiver.bodies == dict.fromkeys(others, 1)
    assert gone not in receiver.bodies
    assert not died


def test_a_result_that_is_held_back_for_longer_than_the_flush_is_not_waited_for(journal: Journal) -> None:
    """It cannot be posted, and stays kept for a later start; a worker that ends when idle ends without it."""
    keep(journal, [1, 2])
    too_large = result(1)

    def fault(_job_id: int, entries: Entries) -> None:
        if too_large in {body for _subject, body in entries}:
            raise AntennaBodyTooLarge("answered 413")

    receiver = Receiver(fault)
    poster = Poster(journal, receiver, PosterLimits(1, 10_000), first_backoff_s=100.0)
    began_at = time.monotonic()
    try:
        wait_until(lambda: poster.held_back_jobs() == {7})
        wait_until(lambda: poster.is_done(tried_until=time.monotonic()))
        assert poster.jobs_ended
        assert not poster.is_done()
        journal.record(7, [task(3)])
        assert poster.held_back_jobs() == set(), "another task of the job is to be worked on"
    finally:
        poster.close(6)
    assert time.monotonic() - began_at < 5
    assert list(receiver.bodies) == [result(2)]
    assert journal.unposted_count() == 1
