"""Which subjects may still be used: after a restart of its job a subject acknowledges another image."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adc_worker.antenna.wire import JobState, PostEntry, Task
from adc_worker.errors import WorkerFault
from adc_worker.journal.journal import HeldTask, Journal
from adc_worker.journal.poster import Poster, PosterLimits
from tests.support.fakes import result
from tests.support.waiting import wait_until

JOB = 7
HOUR_S = 3600.0
OPERATOR_S = 61.0  # a cancel and a retry take longer than a minute
PUBLISHED_NS = 1_760_000_000_000_000_000
ALL = 1 << 40


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Antenna:
    """One job whose tasks lie in a stream; a restart makes a new stream, in another order of images.

    The clock of its NATS has nothing to do with the worker's. Posts are checked: a subject of an earlier stream that
    acknowledges another image is what must never happen.
    """

    images: int = 6
    created_at: str = "at first"
    pipeline: str = "moths"
    status: str = "STARTED"
    run: int = 1
    tells_run: bool = True
    delivered: int = 0
    fetches: int = 0
    looks: int = 0
    before_look: Callable[[], object] = bool
    posts: list[tuple[str, bytes]] = field(default_factory=list)
    wrongly_acknowledged: list[str] = field(default_factory=list)

    def subject(self, seq: int, count: int = 1) -> str:
        published_ns = PUBLISHED_NS + self.run * 1_000_000 + seq
        return f"$JS.ACK.job_{JOB}.job-{JOB}-consumer.{count}.{seq}.{seq}.{published_ns}.0"

    def task(self, seq: int, count: int = 1, query: str = "") -> Task:
        image = (seq + self.run) % self.images  # other images under the same numbers
        url = f"https://images.example.org/{image}.jpg{query}"
        return Task(image_id=str(image), image_url=url, reply_subject=self.subject(seq, count))

    def take(self, count: int = 1) -> list[Task]:
        """Hand out the next tasks, to whomever."""
        first = self.delivered + 1
        last = min(self.images, self.delivered + count)
        self.delivered = max(self.delivered, last)
        return [self.task(seq) for seq in range(first, last + 1)]

    def restart(self) -> None:
        self.run += 1
        self.delivered = 0

    def holds(self, subject: str) -> bool:
        return subject in {self.subject(seq, count) for seq in range(1, self.images + 1) for count in (1, 2)}

    @property
    def incarnation(self) -> str | None:
        return self.job(JOB).incarnation

    def job(self, job_id: int) -> JobState:
        self.before_look()
        self.looks += 1
        started_at = f"run {self.run}" if self.tells_run else None
        times = {"created_at": self.created_at, "started_at": started_at}
        return JobState.model_validate(
            {"id": job_id, "status": self.status, "pipeline": {"slug": self.pipeline}, **times}
        )

    def fetch_tasks(self, _job_id: int, count: int) -> list[Task]:
        self.fetches += 1
        return self.take(count)

    def post_results(self, _job_id: int, entries: Sequence[PostEntry]) -> frozenset[str]:
        for entry in entries:
            if not self.holds(entry.reply_subject):
                self.wrongly_acknowledged.append(entry.reply_subject)
            self.posts.append((entry.reply_subject, b"".join(entry.parts())))
        return frozenset(entry.reply_subject for entry in entries)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journals(tmp_path: Path, clock: Clock) -> Iterator[Callable[[], Journal]]:
    """Return what opens the journal as a process that starts does; the one before has ended."""
    opened: list[Journal] = []

    def start() -> Journal:
        if opened:
            opened[-1].close()
        opened.append(Journal(tmp_path / "journal.db", now=clock))
        return opened[-1]

    yield start
    if opened:
        opened[-1].close()


def fetch(journal: Journal, antenna: Antenna, count: int, clock: Clock, *, look: bool = True) -> list[int]:
    """Fetch as a worker does, which asks first in which run the job is; return the numbers of the tasks."""
    if look:
        journal.note_served(JOB, antenna.incarnation, clock())
    return [held.id for held in journal.record(JOB, antenna.take(count), clock())]


def keep(journal: Journal, numbers: Sequence[int]) -> None:
    journal.keep([(number, [result(number)]) for number in numbers])


@contextmanager
def posting(journal: Journal, antenna: Antenna, pipelines: Sequence[str] | None = None) -> Iterator[Poster]:
    poster = Poster(journal, antenna, PosterLimits(1, 100_000), first_backoff_s=0.0005, pipelines=pipelines)
    try:
        yield poster
    finally:
        poster.close(0)


def live(journal: Journal) -> list[bool]:
    return [journal.is_live(kept) for kept in journal.unposted([], 100, ALL)]


def test_results_of_a_run_that_goes_on_are_posted_after_a_restart_without_a_delivery(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """Antenna says since when the job runs: the same moment proves the same stream, and costs no task."""
    antenna = Antenna()
    journal = journals()
    keep(journal, fetch(journal, antenna, 3, clock))
    clock.now_s += HOUR_S
    journal = journals()
    assert live(journal) == [False, False, False]
    with posting(journal, antenna) as poster:
        wait_until(lambda: len(antenna.posts) == 3)
        assert poster.wait_idle(5)
    assert (antenna.wrongly_acknowledged, antenna.fetches) == ([], 0)


class Asked(threading.Event):
    """Says when somebody asks for it: a poster that closes does, once it drains."""

    def __init__(self) -> None:
        super().__init__()
        self.was_asked = threading.Event()

    def is_set(self) -> bool:
        self.was_asked.set()
        return super().is_set()


def test_a_worker_that_is_stopped_at_once_posts_nothing_without_a_proof(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """Its job was started anew while it was away. A drain fetches nothing, keeps what is kept and does not wait."""
    antenna = Antenna()
    journal = journals()
    keep(journal, fetch(journal, antenna, 3, clock))
    journal = journals()
    antenna.restart()
    draining = Asked()
    antenna.before_look = lambda: draining.was_asked.wait(10)
    poster = Poster(journal, antenna, PosterLimits(1, 100_000))
    poster.close(600, draining)
    assert (antenna.posts, antenna.fetches, journal.unposted_count()) == ([], 0, 3)


def test_a_fault_of_the_journal_lets_no_old_subject_through(journals: Callable[[], Journal], clock: Clock) -> None:
    """Nothing is fetched meanwhile, so nothing but the run that Antenna names proves a subject."""
    antenna = Antenna()
    journal = journals()
    keep(journal, fetch(journal, antenna, 2, clock))
    journal = journals()
    antenna.restart()
    journal._db.execute("PRAGMA query_only=ON")
    (number,) = (kept.id for kept in journal.unposted([], 1, ALL))
    keep(journal, [number])
    assert journal.fault is not None
    with posting(journal, antenna) as poster:
        wait_until(lambda: poster.wait_idle(0))
    assert (antenna.posts, antenna.fetches, journal.unposted_count()) == ([], 0, 2)


def test_a_disk_that_is_low_lets_no_old_subject_through(tmp_path: Path, clock: Clock) -> None:
    """Results can be kept still, but no task is fetched that could prove a subject."""
    antenna = Antenna()
    with closing(Journal(tmp_path / "journal.db", now=clock)) as journal:
        keep(journal, fetch(journal, antenna, 2, clock))
    antenna.restart()
    free = [1 << 40]
    with closing(Journal(tmp_path / "journal.db", free_bytes=lambda _folder: free[0], now=clock)) as journal:
        free[0] = 1000
        with posting(journal, antenna) as poster:
            wait_until(lambda: poster.wait_idle(0))
        assert journal.fault is None
        assert (antenna.posts, antenna.fetches, journal.unposted_count()) == ([], 0, 2)


@pytest.mark.parametrize("left", [0, 1], ids=["peers have every task", "a task with a higher number comes"])
def test_what_a_fetch_does_not_prove_is_not_posted(journals: Callable[[], Journal], clock: Clock, *, left: int) -> None:
    """Peers took the first tasks of the new stream: neither a later task nor none tells it from the old one."""
    antenna = Antenna()
    journal = journals()
    numbers = fetch(journal, antenna, 3, clock)
    keep(journal, numbers)
    antenna.restart()
    antenna.delivered = antenna.images - left
    clock.now_s += HOUR_S
    journal = journals()
    with posting(journal, antenna) as poster:
        wait_until(lambda: antenna.fetches)
        wait_until(lambda: poster.wait_idle(0))
    assert antenna.wrongly_acknowledged == []
    assert len(antenna.posts) == left, "its image was computed before, and goes with the new subject"
    assert journal.unposted_count() == len(numbers) - left


def test_a_result_is_posted_as_soon_as_its_image_comes_again(journals: Callable[[], Journal], clock: Clock) -> None:
    """It does not wait until results that could not be proved are looked at anyway: its lease may be shorter."""
    antenna = Antenna(tells_run=False)
    journal = journals()
    (number,) = fetch(journal, antenna, 1, clock)
    keep(journal, [number])
    antenna.delivered = antenna.images  # peers have the other tasks
    clock.now_s += HOUR_S
    journal = journals()
    with posting(journal, antenna) as poster:
        wait_until(lambda: antenna.fetches)
        wait_until(lambda: poster.wait_idle(0))
        assert antenna.posts == []
        journal.record(JOB, [antenna.task(1, count=2)], clock())
        poster.wake()
        wait_until(lambda: antenna.posts, timeout_s=10)
    assert [subject for subject, _body in antenna.posts] == [antenna.subject(1, count=2)]


def test_a_cancelled_jobs_subjects_are_retired_whatever_the_local_clock_says(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """This host's clock is years behind that of NATS: all that is on record is retired, not what seems old."""
    antenna = Antenna()
    clock.now_s = 0.0
    journal = journals()
    numbers = fetch(journal, antenna, 3, clock)
    keep(journal, numbers[:1])
    assert journal.bury(JOB) == numbers[1:]
    assert (journal.unposted_count(), journal.unfinished(JOB), journal.job_ids()) == (0, [], set())
    antenna.restart()
    antenna.take(3)  # a peer's
    with posting(journal, antenna):
        fetch(journal, antenna, 1, clock)
    assert antenna.posts == []


def test_a_redelivery_with_a_fresh_url_is_downloaded_from_it(journals: Callable[[], Journal], clock: Clock) -> None:
    """The staged file is lost and this is the last delivery: nobody gets the task again. Its number stays."""
    antenna = Antenna()
    journal = journals()
    (held,) = journal.record(JOB, [antenna.task(1, query="?X-Signature=first")])
    journal.erase_url(held)
    (erased,) = journal.unfinished(JOB)
    fresh = antenna.task(1, count=2, query="?X-Signature=second")
    (again,) = journal.record(JOB, [fresh])
    assert (erased.url_erased, again.url_erased) == (True, False)
    assert (again.id, again.task) == (held.id, fresh)
    clock.now_s += 1


def test_a_url_that_was_replaced_meanwhile_is_not_erased_for_the_one_before(
    journals: Callable[[], Journal],
) -> None:
    """And what opens an image is forgotten when its result is kept."""
    antenna = Antenna()
    journal = journals()
    (held,) = journal.record(JOB, [antenna.task(1, query="?X-Signature=first")])
    fresh = antenna.task(1, count=2, query="?X-Signature=second")
    journal.record(JOB, [fresh])
    journal.erase_url(held)
    assert journal.unfinished(JOB)[0].task == fresh
    keep(journal, [held.id])
    (kept,) = journal.unposted([], 10, ALL)
    assert kept.task.image_url == antenna.task(1).image_url


def test_an_image_that_comes_again_after_a_restart_goes_on_where_it_was(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """What was computed is posted with the new subject, what was staged keeps its number; nothing is done twice."""
    antenna = Antenna()
    journal = journals()
    numbers = fetch(journal, antenna, 2, clock)
    images = [held.task.image_id for held in journal.unfinished(JOB)]
    keep(journal, numbers[:1])
    antenna.restart()
    clock.now_s += HOUR_S
    journal = journals()
    again = {antenna.task(seq).image_id: antenna.task(seq) for seq in range(1, 7)}
    peers = antenna.task(1).image_id
    journal.note_served(JOB, antenna.incarnation, clock())
    came = [again[image] for image in images if image != peers]
    journal.record(JOB, came, clock())
    moved = {held.id: held.task for held in (*journal.unposted([], 10, ALL), *journal.unfinished(JOB))}
    assert {task.image_id: task for task in moved.values()}.items() >= {task.image_id: task for task in came}.items()
    assert set(moved) <= set(numbers)


def test_an_image_of_another_url_is_not_answered_with_a_result_of_the_same_number(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """Antenna's database was set up anew: job and image have the numbers of others that were done long ago."""
    antenna = Antenna()
    journal = journals()
    task = antenna.task(1)
    (held,) = journal.record(JOB, [task], clock())
    keep(journal, [held.id])
    journal.settle([held.id])
    antenna.restart()
    again = task.model_copy(update={"reply_subject": antenna.subject(5)})
    other = again.model_copy(update={"image_url": "https://images.example.org/another.jpg"})
    (worked_on,) = journal.record(JOB, [other], clock())
    assert worked_on.task == other
    assert journal.unposted_count() == 0


def test_the_job_of_a_database_that_was_set_up_anew_is_another_one(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """It has the number and the images of one that was done before, and perhaps another pipeline."""
    antenna = Antenna()
    journal = journals()
    numbers = fetch(journal, antenna, 2, clock)
    keep(journal, numbers)
    journal.settle(numbers[:1])
    clock.now_s += HOUR_S
    journal = journals()
    antenna.created_at = "after a new set-up"
    antenna.restart()
    journal.note_served(JOB, antenna.incarnation, clock())
    again = [antenna.task(seq) for seq in range(1, 7)]
    held = journal.record(JOB, again, clock())
    assert [one.task for one in held] == again, "each is worked on, and none answered by what was kept"


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("pipeline", ["moths", "beetles"])
def test_an_image_that_comes_again_is_not_answered_with_another_pipelines_result(
    journals: Callable[[], Journal], clock: Clock, pipeline: str, *, accepted: bool
) -> None:
    """An operator cancels a job, gives it another pipeline, and retries it: Antenna would never save the old result."""
    antenna = Antenna()
    journal = journals()
    (number,) = fetch(journal, antenna, 1, clock)
    image = antenna.task(1).image_id
    keep(journal, [number])
    if accepted:
        journal.settle([number])
    clock.now_s += OPERATOR_S
    antenna.restart()
    antenna.pipeline = pipeline
    journal.note_served(JOB, antenna.incarnation, clock())
    (again,) = (antenna.task(seq) for seq in range(1, 7) if antenna.task(seq).image_id == image)
    worked_on = [held.task for held in journal.record(JOB, [again], clock())]
    assert worked_on == ([] if pipeline == "moths" else [again])


@pytest.mark.parametrize("accepted", [True, False])
def test_an_image_that_comes_again_in_an_unknown_run_is_computed_again(
    journals: Callable[[], Journal], clock: Clock, *, accepted: bool
) -> None:
    """Where Antenna does not say which run that is, it may be one of another pipeline."""
    antenna = Antenna()
    journal = journals()
    (number,) = fetch(journal, antenna, 1, clock)
    image = antenna.task(1).image_id
    keep(journal, [number])
    if accepted:
        journal.settle([number])
    clock.now_s += HOUR_S
    journal = journals()
    antenna.restart()
    (again,) = (antenna.task(seq) for seq in range(1, 7) if antenna.task(seq).image_id == image)
    assert [held.task for held in journal.record(JOB, [again], clock())] == [again]


def test_results_that_nothing_proves_cost_their_job_one_task(journals: Callable[[], Journal], clock: Clock) -> None:
    """However many posts they would fill: each task that is taken as a proof spends its lease."""
    antenna = Antenna(images=200)
    journal = journals()
    keep(journal, fetch(journal, antenna, 120, clock))
    clock.now_s += HOUR_S
    journal = journals()
    antenna.restart()
    antenna.delivered = 190  # what comes next contradicts nothing that is on record
    with posting(journal, antenna) as poster:
        assert poster.wait_idle(20)
    assert (antenna.fetches, antenna.posts, journal.unposted_count()) == (1, [], 120)


def test_no_task_is_taken_as_a_proof_while_tasks_of_the_job_are_worked_on(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """Whoever works on them fetches the next ones, which are as good a proof."""
    antenna = Antenna()
    journal = journals()
    keep(journal, fetch(journal, antenna, 3, clock)[:2])
    clock.now_s += HOUR_S
    journal = journals()
    antenna.restart()
    with posting(journal, antenna) as poster:
        assert poster.wait_idle(5)
    assert (antenna.fetches, antenna.posts, journal.unposted_count()) == (0, [], 2)


class Watched(Journal):
    """Remembers which threads ask for single tasks."""

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self.asking: list[int] = []
        super().__init__(path, now=now)

    def held(self, task_id: int) -> HeldTask | None:
        self.asking.append(threading.get_ident())
        return super().held(task_id)

    def is_live(self, held: HeldTask, within_s: float = 60.0) -> bool:
        self.asking.append(threading.get_ident())
        return super().is_live(held, within_s)


def test_whoever_wakes_the_poster_does_not_look_for_proofs(tmp_path: Path, clock: Clock) -> None:
    """It is the thread that feeds the GPU. The poster's own threads find what was proved, and post it."""
    antenna = Antenna()
    with closing(Watched(tmp_path / "journal.db", clock)) as journal:
        keep(journal, fetch(journal, antenna, 3, clock)[:2])
        clock.now_s += HOUR_S
        run = antenna.incarnation
        antenna.tells_run = False
        with posting(journal, antenna) as poster:
            assert poster.wait_idle(5)
            assert antenna.posts == []
            journal.note_served(JOB, run, clock())
            journal.asking.clear()
            poster.wake()
            assert threading.get_ident() not in journal.asking
            wait_until(lambda: len(antenna.posts) == 2)


def test_news_of_a_jobs_end_does_not_retire_what_came_after_it(journals: Callable[[], Journal], clock: Clock) -> None:
    """The answer took its time; the job was started anew and its tasks are on record by now."""
    antenna = Antenna()
    journal = journals()
    asked_at = clock()
    clock.now_s += OPERATOR_S
    numbers = fetch(journal, antenna, 2, clock)
    assert journal.bury(JOB, asked_at) == []
    assert [held.id for held in journal.unfinished(JOB)] == numbers
    clock.now_s += 1
    assert journal.bury(JOB, clock()) == numbers


def test_a_result_is_not_kept_for_a_task_of_another_image(journals: Callable[[], Journal]) -> None:
    """A number alone does not say whose result it is; nothing of the batch is kept."""
    antenna = Antenna()
    journal = journals()
    first, second = journal.record(JOB, [antenna.task(1), antenna.task(2)])
    images = {first.id: first.task.image_id, second.id: first.task.image_id}
    with pytest.raises(WorkerFault, match=f"is of image {second.task.image_id}"):
        journal.keep([(first.id, [b"one"]), (second.id, [b"two"])], images)
    assert journal.unposted_count() == 0


def test_an_answer_without_a_task_shows_nothing_of_the_stream(journals: Callable[[], Journal], clock: Clock) -> None:
    """A job that was cancelled, or whose tasks all are with others, answers alike."""
    antenna = Antenna()
    journal = journals()
    fetch(journal, antenna, 1, clock)
    clock.now_s += OPERATOR_S / 2
    journal.record(JOB, [], clock())
    (held,) = journal.unfinished(JOB)
    assert journal.is_live(held)
    clock.now_s += OPERATOR_S / 2
    assert not journal.is_live(held)


def test_what_was_fetched_in_another_run_than_the_one_told_is_not_live(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """However little time has passed: a program cancels and retries faster than an operator."""
    antenna = Antenna()
    journal = journals()
    fetch(journal, antenna, 1, clock)
    clock.now_s += 1
    antenna.restart()
    journal.note_served(JOB, antenna.incarnation, clock())
    (held,) = journal.unfinished(JOB)
    assert not journal.is_live(held)


def test_a_late_answer_about_an_earlier_run_proves_nothing(journals: Callable[[], Journal], clock: Clock) -> None:
    """Tasks and a look that were asked for before the job was started anew, and came after that was seen."""
    antenna = Antenna()
    journal = journals()
    fetch(journal, antenna, 1, clock)
    asked_at = clock()
    said = antenna.incarnation
    withheld = antenna.take(2)
    clock.now_s += OPERATOR_S
    antenna.restart()
    journal.note_served(JOB, antenna.incarnation, clock())
    clock.now_s += 1
    journal.note_served(JOB, said, asked_at)
    journal.record(JOB, withheld, asked_at)
    assert len(journal.unfinished(JOB)) == 3
    assert not any(journal.is_live(held) for held in journal.unfinished(JOB))
    journal = journals()
    journal.note_served(JOB, antenna.incarnation, clock())
    assert not any(journal.is_live(held) for held in journal.unfinished(JOB)), "they are not of the run told later"


def test_opaque_subjects_are_one_task_only_where_they_name_one_image(journals: Callable[[], Journal]) -> None:
    """A form that cannot be read proves nothing: the number of an image alone does not either."""
    journal = journals()
    first = Task(image_id="1", image_url="https://h/1.jpg?signed", reply_subject="opaque 1")
    again = first.model_copy(update={"image_url": "https://h/1.jpg", "reply_subject": "opaque 2"})
    other = first.model_copy(update={"image_url": "https://h/other.jpg", "reply_subject": "opaque 3"})
    (held,) = journal.record(JOB, [first])
    assert journal.find(JOB, again) == held
    assert journal.find(JOB, other) is None


def test_the_answer_to_an_early_request_that_comes_late_is_not_worked_on(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """It was withheld while the job was started anew: its tasks are of the stream that is gone."""
    antenna = Antenna()
    journal = journals()
    asked_at = clock()
    withheld = antenna.take(3)
    clock.now_s += OPERATOR_S
    antenna.restart()
    present = journal.record(JOB, antenna.take(1), clock())
    clock.now_s += 1
    assert journal.record(JOB, withheld, asked_at) == []
    assert journal.unfinished(JOB) == present
    assert journal.is_live(present[0])


def test_a_clock_of_nats_that_was_set_back_stops_nothing(journals: Callable[[], Journal], clock: Clock) -> None:
    """What was asked for last is right, whatever it says about when it was published."""
    antenna = Antenna(run=9)
    journal = journals()
    fetch(journal, antenna, 3, clock)
    antenna.run = 2  # a new stream, whose messages seem to be older
    antenna.delivered = 0
    clock.now_s += OPERATOR_S
    numbers = fetch(journal, antenna, 3, clock)
    assert [held.id for held in journal.unfinished(JOB)] == numbers
    assert all(antenna.holds(held.task.reply_subject) for held in journal.unfinished(JOB))


def test_leases_of_an_earlier_stream_are_neither_extended_nor_repeated(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """An extension would be another image's, a repeated result would acknowledge it."""
    antenna = Antenna()
    journal = journals()
    numbers = fetch(journal, antenna, 3, clock)
    keep(journal, numbers[:1])
    journal.settle(numbers[:1])
    assert len(journal.subjects()) == 2
    assert (len(journal.accepted_subjects(JOB, 9)), journal.newest_accepted(JOB) is None) == (1, False)
    journal = journals()
    antenna.restart()
    journal.note_served(JOB, antenna.incarnation, clock())
    assert journal.subjects() == []
    assert (journal.accepted_subjects(JOB, 9), journal.newest_accepted(JOB)) == ([], None)


def test_no_task_is_taken_of_a_job_whose_pipeline_nobody_here_works_on(
    journals: Callable[[], Journal], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another selection of pipelines kept is posted all the same, since its run goes on; the job is seen to."""
    monkeypatch.setattr("adc_worker.journal.poster.LOOK_FIRST_S", 0.002)
    antenna = Antenna()
    journal = journals()
    keep(journal, fetch(journal, antenna, 3, clock)[:2])
    journal = journals()
    with posting(journal, antenna, ["beetles"]) as poster:
        wait_until(lambda: len(antenna.posts) == 2)
        assert poster.wait_idle(5)
        wait_until(lambda: poster.jobs_ended)
    assert (antenna.fetches, antenna.wrongly_acknowledged) == (0, [])
    assert len(journal.unfinished(JOB)) == 1


def test_without_a_proof_nothing_of_another_pipelines_job_is_posted_or_waited_for(
    journals: Callable[[], Journal], clock: Clock
) -> None:
    """The job was started anew: no task is spent on finding out."""
    antenna = Antenna()
    journal = journals()
    keep(journal, fetch(journal, antenna, 3, clock))
    journal = journals()
    antenna.restart()
    with posting(journal, antenna, ["beetles"]) as poster:
        wait_until(lambda: antenna.looks > 1)
        wait_until(lambda: poster.wait_idle(0))
    assert (antenna.fetches, antenna.posts, journal.unposted_count()) == (0, [], 3)


@settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
class Restarts(RuleBasedStateMachine):
    """A worker, its restarts, its peers, late answers, a job that starts anew: no dead subject counts as live."""

    @initialize(offset_s=st.floats(-1e6, 1e6))
    def begin(self, offset_s: float) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock(1e7 + offset_s)
        self.antenna = Antenna(images=8)
        self.journal = Journal(self.folder / "journal.db", now=self.clock)
        self.withheld: list[tuple[list[Task], float]] = []
        self.looks: list[tuple[str | None, float]] = []

    @rule(seconds=st.sampled_from([0.1, 5.0, 59.0, 61.0, 600.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule(count=st.integers(1, 3), seconds=st.sampled_from([0.1, 5.0]))
    def fetch(self, count: int, seconds: float) -> None:
        asked_at = self.clock()
        tasks = self.antenna.take(count)
        self.clock.now_s += seconds
        self.journal.record(JOB, tasks, asked_at)

    @rule(count=st.integers(1, 3))
    def a_peer_fetches(self, count: int) -> None:
        self.antenna.take(count)

    @precondition(lambda self: self.antenna.delivered)
    @rule(data=st.data())
    def a_task_is_delivered_again(self, data: st.DataObject) -> None:
        seq = data.draw(st.integers(1, self.antenna.delivered))
        self.journal.record(JOB, [self.antenna.task(seq, count=2)], self.clock())

    @rule(count=st.integers(1, 2))
    def an_answer_is_withheld(self, count: int) -> None:
        self.withheld.append((self.antenna.take(count), self.clock()))

    @precondition(lambda self: self.withheld)
    @rule()
    def a_withheld_answer_comes(self) -> None:
        tasks, asked_at = self.withheld.pop(0)
        self.clock.now_s += 0.1
        self.journal.record(JOB, tasks, asked_at)

    @rule()
    def look(self) -> None:
        asked_at = self.clock()
        incarnation = self.antenna.incarnation
        self.clock.now_s += 0.1
        self.journal.note_served(JOB, incarnation, asked_at)

    @rule()
    def a_look_is_withheld(self) -> None:
        self.looks.append((self.antenna.incarnation, self.clock()))

    @precondition(lambda self: self.looks)
    @rule()
    def a_withheld_look_comes(self) -> None:
        incarnation, asked_at = self.looks.pop(0)
        self.clock.now_s += 0.1
        self.journal.note_served(JOB, incarnation, asked_at)

    @rule()
    def keep_one(self) -> None:
        for held in self.journal.unfinished(JOB)[:1]:
            keep(self.journal, [held.id])

    @rule()
    def settle_one(self) -> None:
        for kept in self.journal.unposted([], 1, ALL):
            if self.journal.is_live(kept):
                self.journal.settle([kept.id])

    @rule(offset_s=st.floats(-1e6, 1e6))
    def restart_the_worker(self, offset_s: float) -> None:
        """The process after it may find another time on this host's clock; its own answers are lost."""
        self.journal.close()
        self.withheld.clear()
        self.looks.clear()
        self.clock.now_s += offset_s
        self.journal = Journal(self.folder / "journal.db", now=self.clock)

    @rule()
    def the_job_is_started_anew(self) -> None:
        self.clock.now_s += OPERATOR_S
        self.antenna.restart()

    @invariant()
    def no_dead_subject_counts_as_live(self) -> None:
        for held in (*self.journal.unfinished(JOB), *self.journal.unposted([], 100, ALL)):
            if self.journal.is_live(held):
                assert self.antenna.holds(held.task.reply_subject)
        entry = self.journal.newest_accepted(JOB)
        assert entry is None or self.antenna.holds(entry.reply_subject)

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)


TestRestarts = Restarts.TestCase
