"""From fetched tasks to staged images, with a disk that is full or small."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms, lease_clock
from adc_worker.antenna.wire import JobRef, JobState, Task, error_result
from adc_worker.errors import (
    AddressRefused,
    DeviceMemoryShort,
    HostUnreachable,
    ImageError,
    ImageMissing,
    ImageRefused,
    ImageUnreadable,
    LinkError,
    NotAnImage,
    StagedFileLost,
)
from adc_worker.ingest.disk_budget import PAUSE_S
from adc_worker.ingest.download import DownloadStats, ImageClient
from adc_worker.ingest.staging import StagedImage, StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.runtime.evidence import Evidence
from adc_worker.runtime.faults import Faults
from adc_worker.runtime.intake import Intake, IntakeLimits, TaskFetch
from adc_worker.runtime.outcomes import ImageResult, JobOutcomes
from adc_worker.runtime.signs_of_life import SignsOfLife
from adc_worker.runtime.slices import JobBoard
from tests.support.fakes import Receiver, result, task
from tests.support.images import jpeg
from tests.support.waiting import wait_until

JOB = 7
DATA = jpeg()
FULL = OSError(28, "No space left on device")


class Queue(AntennaClient):
    """An Antenna that has these tasks and no others."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = list(tasks)

    def fetch_tasks(self, job_id: int, count: int) -> list[Task]:
        assert job_id == JOB
        fetched, self._tasks = self._tasks[:count], self._tasks[count:]
        return fetched

    def job(self, job_id: int) -> JobState:
        return JobState(id=job_id, status="STARTED", started_at="2026-01-01T00:00:00")


class Images(ImageClient):
    """An image host: nothing arrives before `gate` opens.

    `faults` are raised once each, by address; `lasting` ones every time.
    """

    def __init__(self) -> None:
        self.faults: dict[str, Exception] = {}
        self.lasting: dict[str, Exception] = {}
        self.asked: Counter[str] = Counter()
        self.gate = threading.Event()
        self.gate.set()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def download(self, url: str, fd: int, cancelled: Callable[[], bool]) -> DownloadStats:
        with self._lock:
            self.asked[url] += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            wait_until(lambda: self.gate.is_set() or cancelled())
            if fault := self.faults.pop(url, self.lasting.get(url)):
                raise fault
            os.write(fd, DATA)
            return DownloadStats(0.1, 0.2, len(DATA))
        finally:
            with self._lock:
                self.at_once -= 1


@dataclass
class Job:
    """An intake and what it works with; time moves when the test says so."""

    folder: Path
    most_bytes: int | None = None
    images: Images = field(default_factory=Images)
    now_s: float = 100.0
    closed: bool = False

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder / "journal.db")
        self.receiver = Receiver()
        self.poster = Poster(self.journal, self.receiver, PosterLimits(1, 10_000))
        self.staging = StagingArea(
            self.folder / "staging", self.images, 1_000_000, self.most_bytes, now=lambda: self.now_s
        )
        self.outcomes = JobOutcomes(JOB, self.journal, self.staging, self.poster)
        self.stopping = threading.Event()
        self.faults = Faults(now=lambda: self.now_s)
        self.evidence = Evidence(lambda: 20 * time.monotonic())  # what takes half a minute is over in seconds here

    def start(self, tasks: int, downloads: int) -> Intake:
        return self.start_with([task(number) for number in range(1, tasks + 1)], downloads=downloads)

    def start_with(self, tasks: Sequence[Task], kind: type[Queue] = Queue, *, downloads: int = 1) -> Intake:
        limits = IntakeLimits(downloads=downloads, in_hand=100, fetch_size=100, held=100)
        queue = kind(tasks)
        self.outcomes = JobOutcomes(JOB, self.journal, self.staging, self.poster)  # each turn has its own
        self.lease = LeaseTerms()
        fetch = TaskFetch(JOB, queue, self.journal, self.poster, self.lease)
        board = JobBoard(120.0, 5.0)
        board.add([JobRef(id=JOB, pipeline_slug="simulated")])
        turn = board.next_turn(self.stopping.is_set)
        assert turn is not None
        self.intake = Intake(
            fetch, self.journal, self.staging, self.outcomes, self.lease, limits, turn,
            faults=self.faults, evidence=self.evidence, life=SignsOfLife(),
        )  # fmt: skip
        self.intake.start()
        return self.intake

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.intake.wake()

    def infer(self) -> StagedImage | None:
        """Take the next staged image and keep a result for it."""
        image = self.intake.staged.get()
        if image is not None:
            body = result(int(image.task.image_id))
            self.outcomes.succeed([ImageResult(image.id, [body], detections=0, truncated=False)])
        return image

    def infer_all(self) -> list[str]:
        """Return the images that still come."""
        images = []
        while (image := self.infer()) is not None:
            images.append(image.task.image_id)
        return images

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.images.gate.set()
        self.intake.close()
        self.poster.close(0)
        self.journal.close()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(most_bytes: int | None = None) -> Job:
        made.append(Job(tmp_path, most_bytes))
        return made[-1]

    yield make
    for job in made:
        job.close()


def second_delivery(number: int) -> Task:
    subject = task(number).reply_subject.replace("consumer.1.", "consumer.2.")
    return task(number).model_copy(update={"reply_subject": subject})


def test_an_answer_of_tasks_that_have_their_results_already_is_not_empty(jobs: Callable[..., Job]) -> None:
    """They are answered from the journal, and the next ones are asked for at once."""
    job = jobs()
    job.journal.note_served(JOB, Queue([]).job(JOB).incarnation, lease_clock())
    done = job.journal.record(JOB, [task(1), task(2)])
    job.journal.keep([(held.id, [result(held.id)]) for held in done])
    job.journal.settle([held.id for held in done])
    intake = job.start_with([second_delivery(1), second_delivery(2), task(3)])
    assert job.infer_all() == ["3"]
    assert intake.fetched == 1
    assert job.poster.wait_idle(5)
    subjects = {subject for _job, entries in job.receiver.posts for subject, _body in entries}
    assert subjects == {one.reply_subject for one in (second_delivery(1), second_delivery(2), task(3))}


def test_the_run_of_a_job_is_learnt_before_its_tasks_are_fetched(jobs: Callable[..., Job], tmp_path: Path) -> None:
    """The same run, told after a restart, then proves that their subjects are good."""
    job = jobs()
    job.stopping.set()
    job.start_with([])
    fetch = TaskFetch(JOB, Queue([task(1)]), job.journal, job.poster, job.lease)
    answered = threading.Event()
    fetch.begin_turn(answered.set)
    fetch.start(1)
    assert answered.wait(5)
    job.close()
    journal = Journal(tmp_path / "journal.db")
    journal.note_served(JOB, Queue([]).job(JOB).incarnation, lease_clock())
    (held,) = journal.unfinished(JOB)
    assert journal.is_live(held)
    journal.close()


class DeliveredAgain(Queue):
    """An Antenna that hands out its first task a second time, with a URL that opens, once that is `staged`."""

    staged = threading.Event()

    def fetch_tasks(self, job_id: int, count: int) -> list[Task]:
        first = super().fetch_tasks(job_id, count)
        if first:
            return first
        self.staged.wait(10)
        return [second_delivery(1).model_copy(update={"image_url": f"{task(1).image_url}?X-Signature=second"})]


def test_what_opens_a_staged_image_is_erased_again_when_a_further_delivery_brings_it(
    jobs: Callable[..., Job],
) -> None:
    """It is not needed as long as the file is there."""
    job = jobs()
    intake = job.start_with([task(1)], DeliveredAgain)
    wait_until(lambda: intake.staged.images)
    DeliveredAgain.staged.set()
    wait_until(lambda: job.journal.unfinished(JOB)[0].task == second_delivery(1))
    assert job.journal.unfinished(JOB)[0].url_erased


def _found_full(job: Job) -> bool:
    return not job.images.faults and job.intake._downloading == 0 and not job.staging.disk.has_room()


def test_a_task_that_finds_the_disk_full_is_staged_after_the_pause(jobs: Callable[..., Job]) -> None:
    """Neither failed, nor given up, nor lost: it waits in its place, and so do those behind it."""
    job = jobs()
    job.images.faults = {task(3).image_url: FULL}
    job.start(tasks=6, downloads=1)
    wait_until(lambda: _found_full(job))
    assert [image.task.image_id for image in (job.infer(), job.infer()) if image] == ["1", "2"]
    assert (job.outcomes.settled, job.intake.staged.images) == (2, [])
    assert len(job.journal.unfinished(JOB)) == 4
    job.pass_time(PAUSE_S)
    assert job.infer_all() == ["3", "4", "5", "6"]
    assert (job.outcomes.done, job.outcomes.failed.total(), job.outcomes.given_up) == (6, 0, 0)


def test_many_downloads_that_find_the_disk_full_together_are_all_made_up_for(jobs: Callable[..., Job]) -> None:
    """Also when it is still full after the first pause."""
    job = jobs()
    everything_fails = {task(number).image_url: FULL for number in range(1, 9)}
    job.images.faults = dict(everything_fails)
    job.images.gate.clear()
    job.start(tasks=8, downloads=8)
    wait_until(lambda: job.images.at_once == 8)
    job.images.gate.set()
    wait_until(lambda: not job.images.faults and job.intake._downloading == 0)
    job.images.faults = dict(everything_fails)
    job.pass_time(PAUSE_S)
    wait_until(lambda: len(job.images.faults) == 7 and job.intake._downloading == 0)  # one at a time now
    job.images.faults.clear()
    job.pass_time(PAUSE_S)
    assert sorted(job.infer_all()) == [str(number) for number in range(1, 9)]
    assert (job.outcomes.done, job.outcomes.failed.total(), job.outcomes.given_up) == (8, 0, 0)


def test_a_stop_during_the_pause_leaves_the_tasks_on_record(jobs: Callable[..., Job]) -> None:
    """The next start finds them there."""
    job = jobs()
    job.images.faults = {task(1).image_url: FULL}
    intake = job.start(tasks=3, downloads=1)
    wait_until(lambda: _found_full(job) and len(job.journal.unfinished(JOB)) == 3)  # the third comes by a second fetch
    intake.stop()
    assert job.infer_all() == []
    assert len(job.journal.unfinished(JOB)) == 3


def test_tasks_that_a_fetch_brings_after_the_stop_are_on_record(jobs: Callable[..., Job]) -> None:
    """Their leases are spent: who closes the intake waits for the answer."""
    answer = threading.Event()

    class Slow(Queue):
        def fetch_tasks(self, job_id: int, count: int) -> list[Task]:
            if len(self._tasks) == 1:
                wait_until(answer.is_set)
            return super().fetch_tasks(job_id, count)

    job = jobs()
    job.images.faults = {task(1).image_url: FULL}
    intake = job.start_with([task(1), task(2), task(3)], Slow)
    wait_until(lambda: _found_full(job))
    intake.stop()
    assert job.infer_all() == []
    assert len(job.journal.unfinished(JOB)) == 2
    answer.set()
    intake.close()
    assert len(job.journal.unfinished(JOB)) == 3


def test_downloads_that_start_together_do_not_all_take_the_same_room(jobs: Callable[..., Job]) -> None:
    """Each is charged before the next may start: what is staged stays within the limit."""
    job = jobs(most_bytes=2 * len(DATA))
    job.staging.disk.charge(999, len(DATA))  # how large images are is known by now
    job.staging.disk.release(999)
    job.images.gate.clear()
    job.start(tasks=8, downloads=8)
    wait_until(lambda: job.images.at_once == 2)
    job.intake.wake()
    job.images.gate.set()
    assert sorted(job.infer_all()) == [str(number) for number in range(1, 9)]
    assert job.images.most_at_once <= 2


def test_a_limit_below_one_image_takes_one_after_the_other(jobs: Callable[..., Job]) -> None:
    """The job ends all the same."""
    job = jobs(most_bytes=1)
    job.start(tasks=5, downloads=4)
    assert sorted(job.infer_all()) == [str(number) for number in range(1, 6)]
    assert job.images.most_at_once == 1


def test_an_error_result_carries_no_signature_of_a_url(jobs: Callable[..., Job]) -> None:
    """What a library says of a failed download may quote the whole address."""
    job = jobs()
    unusable = task(1).model_copy(update={"image_url": "http://:canary@[/a.jpg?X-Signature=canary"})
    job.images.lasting[task(2).image_url] = ImageError("gone: https://images.test/a.jpg?X-Signature=canary")
    intake = job.start_with([unusable, task(2)])
    assert intake.staged.get() is None
    assert job.poster.wait_idle(5)
    bodies = list(job.receiver.bodies)
    assert len(bodies) == 2
    assert any(b"https://images.test/a.jpg" in body for body in bodies)
    assert not any(b"canary" in body for body in bodies)


def _in_files(job: Job, text: bytes) -> list[str]:
    return [file.name for file in job.folder.rglob("*") if file.is_file() and text in file.read_bytes()]


def test_what_signs_a_url_is_forgotten_once_the_image_is_staged(jobs: Callable[..., Job]) -> None:
    """The journal needs it for one thing only; its path stays, so that one can tell which image it was."""
    job = jobs()
    signed = task(1).model_copy(update={"image_url": "https://images.test/a.jpg?X-Signature=canary"})
    job.images.gate.clear()
    intake = job.start_with([signed])
    wait_until(lambda: job.images.at_once == 1)
    assert _in_files(job, b"canary"), "the journal is what a restart downloads from"
    job.images.gate.set()
    image = intake.staged.get()
    assert image is not None
    (held,) = job.journal.unfinished(JOB)
    assert held.task.image_url == "https://images.test/a.jpg"
    job.close()
    assert _in_files(job, b"https://images.test/a.jpg")
    assert not _in_files(job, b"canary")


@pytest.mark.parametrize("delivery", [1, 2])
def test_a_staged_file_that_a_power_cut_took_is_left_to_its_lease(jobs: Callable[..., Job], delivery: int) -> None:
    """What signed its URL is erased by then: whatever the host would say to the rest of it is no word on the image."""
    job = jobs()
    subject = task(1).reply_subject.replace("consumer.1.", f"consumer.{delivery}.")
    signed = Task(image_id="1", image_url=f"{task(1).image_url}?X-Signature=canary", reply_subject=subject)
    (held,) = job.journal.record(JOB, [signed])
    job.journal.erase_url(held)
    job.images.faults[task(1).image_url] = ImageMissing("404")
    job.start_with([task(2)])
    assert job.infer_all() == ["2"]
    assert (job.outcomes.failed.total(), job.outcomes.given_up) == (0, 1)
    assert job.images.faults, "nobody was asked"


def _staged(intake: Intake, count: int) -> list[StagedImage]:
    return [image for _ in range(count) if (image := intake.staged.get())]


def test_images_that_came_and_fail_while_none_succeeds_are_not_at_fault_themselves(jobs: Callable[..., Job]) -> None:
    """A broken decoder or model would fail every image of a job, in whatever words: none of them gets an error."""
    job = jobs()
    intake = job.start(tasks=8, downloads=1)
    images = _staged(intake, 8)
    for image in images[:7]:
        job.outcomes.fail_staged(image, ImageError(f"word {'x' * image.id}"))
    assert job.outcomes.failed.total() == 0
    assert intake.parked > 0
    assert len(job.journal.unfinished(JOB)) == 8
    intake.pace(1.0)
    job.outcomes.succeed([ImageResult(images[7].id, [result(1)], detections=0, truncated=False)])
    intake.pace(1.0)
    assert sorted(job.infer_all()) == sorted(one.task.image_id for one in images[:7]), "one success, and all go on"
    assert (job.outcomes.done, job.outcomes.failed.total()) == (8, 0)


def test_an_image_that_cannot_be_decoded_while_others_can_gets_its_error(jobs: Callable[..., Job]) -> None:
    """It fails again and again, and the others between show that decoder and model are well."""
    job = jobs()
    intake = job.start(tasks=6, downloads=1)
    while (image := intake.staged.get()) is not None:
        if image.task.image_id == "1":
            job.outcomes.fail_staged(image, ImageUnreadable("cannot be decoded as JPEG"))
        else:
            job.outcomes.succeed([ImageResult(image.id, [result(image.id)], detections=0, truncated=False)])
            intake.pace(1.0)
    assert (job.outcomes.done, dict(job.outcomes.failed)) == (5, {"ImageUnreadable": 1})
    assert job.images.asked[task(1).image_url] == 1, "its file is here"


@pytest.mark.parametrize("delivery", [1, 2])
def test_an_image_for_which_the_gpu_has_no_memory_is_tried_again_later(jobs: Callable[..., Job], delivery: int) -> None:
    """Its file stays and others go on; that other programs hold the memory is no outcome."""
    job = jobs()
    short = task(1) if delivery == 1 else second_delivery(1)
    intake = job.start_with([short, task(2)])
    (image,) = _staged(intake, 1)
    assert image.task.image_id == "1"
    for _attempt in range(2):
        job.outcomes.leave_staged(image, DeviceMemoryShort("other programs hold the memory"))
        job.infer_all()
        assert image.path.exists()
        assert (job.outcomes.failed.total(), job.outcomes.given_up) == (0, 0)
        assert [held.task.image_id for held in job.journal.unfinished(JOB)] == ["1"]
        assert intake.due_in_s > 0, "it is not tried again at once"
        wait_until(lambda: job.intake.due_in_s == 0)
        job.intake.close()
        intake = job.start_with([])
        (image,) = _staged(intake, 1)
    job.outcomes.succeed([ImageResult(image.id, [result(1)], detections=0, truncated=False)])
    assert job.infer_all() == []
    assert (job.outcomes.done, job.outcomes.failed.total(), job.outcomes.given_up) == (1, 0, 0)
    assert job.images.asked[short.image_url] == 1


def test_an_image_without_memory_of_the_gpu_is_given_up_only_when_another_worker_gets_it(
    jobs: Callable[..., Job],
) -> None:
    """Its lease is over and more deliveries follow; the last delivery is kept."""
    job = jobs()
    intake = job.start_with([task(1), second_delivery(2)])
    images = _staged(intake, 2)
    job.lease.ack_wait_s = 0.001
    leases = job.journal.unfinished(JOB)
    wait_until(lambda: all(job.lease.left_s(one.fetched_at, lease_clock()) < 0 for one in leases))
    for image in images:
        job.outcomes.leave_staged(image, DeviceMemoryShort("other programs hold the memory"))
    assert [held.task.image_id for held in job.journal.unfinished(JOB)] == ["2"]
    assert job.infer_all() == ["2"]
    assert (job.outcomes.failed.total(), job.outcomes.given_up) == (0, 1)


@pytest.mark.parametrize("host_fails", [False, True])
def test_it_is_known_whether_other_images_are_left_that_could_show_that_the_worker_is_well(
    jobs: Callable[..., Job], *, host_fails: bool
) -> None:
    """Those that wait for their host are left; what is on record from before counts only where none is."""
    job = jobs()
    if host_fails:
        job.images.lasting[task(1).image_url] = LinkError("503")
    intake = job.start(tasks=1, downloads=1)
    assert not intake.has_no_more
    job.infer_all()
    assert intake.has_no_more is not host_fails


def test_a_staged_image_whose_file_is_gone_is_downloaded_again(jobs: Callable[..., Job]) -> None:
    """Another worker of the journal, or somebody else, removed it; a task that is on record no more is dropped."""
    job = jobs()
    intake = job.start(tasks=2, downloads=1)
    images = _staged(intake, 2)
    job.journal.forget([images[1].id])
    for image in images:
        image.path.unlink()
        job.outcomes.leave_staged(image, StagedFileLost("the staged file is gone"))
    assert job.infer_all() == ["1"]
    assert job.images.asked[task(1).image_url] == 2
    assert job.outcomes.failed.total() == 0


def test_a_turn_removes_no_file_of_another_worker_of_its_journal(jobs: Callable[..., Job]) -> None:
    """A job that was cancelled is off the record before the other worker hears of it."""
    job = jobs()
    other = StagingArea(job.folder / "staging", job.images, 1_000_000)
    image = other.stage(999, task(999), lambda: False)
    job.start(tasks=1, downloads=1)
    assert job.infer_all() == ["1"]
    assert image.path.exists()


def test_one_image_that_its_host_refuses_is_its_own_fault_and_holds_nothing_up(jobs: Callable[..., Job]) -> None:
    """S3 answers 403 for a key that is gone: three tries of one URL are not three failures of its host."""
    job = jobs()
    job.images.lasting[task(3).image_url] = ImageRefused("the image's host answered 403")
    intake = job.start(tasks=40, downloads=1)
    done = job.infer_all()
    assert len(done) == 39
    assert (dict(job.outcomes.failed), intake.parked) == ({"ImageError": 1}, 0)


@pytest.mark.parametrize("still_serves", [True, False])
def test_the_last_image_of_a_job_is_held_against_others_that_came_before(
    jobs: Callable[..., Job], *, still_serves: bool
) -> None:
    """They are asked for again; while they do not come either, it is tried on."""
    job = jobs()
    bad = task(6).image_url
    job.images.lasting[bad] = NotAnImage("a page")
    job.start(tasks=6, downloads=1)
    assert len(job.infer_all()) == 5
    if not still_serves:
        job.images.lasting |= {task(number).image_url: NotAnImage("a page") for number in range(1, 6)}
    while job.images.asked[bad] < 8 and job.journal.unfinished(JOB):
        wait_until(lambda: job.intake.due_in_s == 0)
        job.intake.close()
        job.start_with([])
        assert job.infer_all() == []
    asked_again = [number for number in range(1, 6) if job.images.asked[task(number).image_url] > 1]
    assert len(asked_again) == (3 if still_serves else 1)
    assert len(job.journal.unfinished(JOB)) == int(not still_serves)
    assert job.outcomes.failed.total() == int(still_serves)
    assert job.staging.disk.used_bytes == 0
    assert list((job.folder / "staging").iterdir()) == []


def _work_off(job: Job, turns: int) -> None:
    """Give a job as many more turns as it needs, each as soon as one of its parked tasks may be tried.

    Of a host at fault the first five take 31 s of the evidence's clock, and each that follows 30 s.
    """
    for _turn in range(turns):
        if not job.journal.unfinished(JOB):
            return
        wait_until(lambda: job.intake.due_in_s == 0)
        job.intake.close()
        job.start_with([])
        job.infer_all()


def test_many_missing_images_at_the_end_of_a_job_do_not_wait_for_their_leases(jobs: Callable[..., Job]) -> None:
    """Nothing else of the job is left that could come; the host serves again what it served, and is not at fault."""
    job = jobs()
    job.evidence = Evidence(lambda: 200 * time.monotonic())
    missing = [task(number).image_url for number in range(11, 24)]
    job.images.lasting = dict.fromkeys(missing, ImageMissing("404"))
    job.start(tasks=23, downloads=4)
    assert len(job.infer_all()) == 10
    _work_off(job, turns=20)
    assert job.journal.unfinished(JOB) == []
    assert max(job.images.asked.values()) < 50
    assert sum(job.images.asked[url] for url in missing) < 10 * len(missing)


def test_a_host_that_answers_404_for_whatever_it_is_asked_blames_no_image(jobs: Callable[..., Job]) -> None:
    """Not even when it had served some before: they do not come again either."""
    job = jobs()
    job.evidence = Evidence(lambda: 200 * time.monotonic())
    job.start(tasks=10, downloads=4)
    assert len(job.infer_all()) == 10
    job.images.lasting = {task(number).image_url: ImageMissing("404") for number in range(1, 24)}
    job.intake.close()
    job.start_with([task(number) for number in range(11, 24)], downloads=4)
    assert job.infer_all() == []
    waiting = {held.id for held in job.journal.unfinished(JOB)}
    assert len(waiting) >= 5
    _work_off(job, turns=11)
    assert {held.id for held in job.journal.unfinished(JOB)} >= waiting


def test_an_image_is_not_held_against_one_other_that_is_asked_for_often(jobs: Callable[..., Job]) -> None:
    """With one image that came before, a refusal waits for the last delivery, however often it is repeated."""
    job = jobs()
    job.evidence = Evidence(lambda: 200 * time.monotonic())  # minutes are over in seconds
    bad = task(2).image_url
    job.images.lasting[bad] = ImageRefused("403")
    job.start(tasks=2, downloads=1)
    assert job.infer_all() == ["1"]
    while job.images.asked[bad] < 13 and job.journal.unfinished(JOB):
        wait_until(lambda: job.intake.due_in_s == 0)
        job.intake.close()
        job.start_with([])
        assert job.infer_all() == []
    assert job.outcomes.failed.total() == 0
    assert [held.task.image_id for held in job.journal.unfinished(JOB)] == ["2"]


@pytest.mark.parametrize("answer", [ImageMissing("404"), NotAnImage("a page"), ImageRefused("403"), LinkError("503")])
def test_a_host_that_serves_no_image_is_at_fault_and_none_of_its_images(
    jobs: Callable[..., Job], answer: Exception
) -> None:
    """A bucket that was renamed, a sign-in page, a proxy: fetching stops, and the tasks stay on record."""
    job = jobs()
    job.images.lasting = {task(number).image_url: answer for number in range(1, 41)}
    intake = job.start(tasks=40, downloads=4)
    assert job.infer_all() == []
    assert intake.ended_empty
    assert job.outcomes.settled == 0
    assert len(job.journal.unfinished(JOB)) == intake.parked
    assert job.staging.disk.used_bytes == 0


def test_a_host_that_was_at_fault_is_tried_with_one_image_and_then_with_all(jobs: Callable[..., Job]) -> None:
    """In the job's next turn, and whatever it answered between."""
    job = jobs()
    answers = [NotAnImage("a page"), LinkError("503"), ImageRefused("403"), ImageMissing("404")]
    job.images.lasting = {task(number).image_url: answers[number % 4] for number in range(1, 11)}
    job.start(tasks=10, downloads=4)
    assert job.infer_all() == []
    job.images.lasting.clear()
    job.images.most_at_once = 0
    wait_until(lambda: job.intake.due_in_s == 0)
    job.intake.close()
    job.start_with([])
    assert sorted(job.infer_all(), key=int) == [str(number) for number in range(1, 11)]
    assert job.outcomes.failed.total() == 0


def test_tasks_without_a_usable_url_are_errors_of_their_own(jobs: Callable[..., Job]) -> None:
    """Each at once, however many they are, and the images of real hosts go on."""
    job = jobs()
    urls = ["http://[nowhere/x.jpg", "http://", "/x.jpg", "", "ftp://h/x", "http://h:99999/x", "http://a..b/x"] * 3
    broken = [task(n).model_copy(update={"image_url": url}) for n, url in enumerate(urls, start=1)]
    intake = job.start_with([*broken, *(task(number) for number in range(100, 110))])
    assert job.infer_all() == [str(number) for number in range(100, 110)]
    assert (dict(job.outcomes.failed), intake.parked) == ({"ImageUrlUnusable": 21}, 0)
    assert not any(job.images.asked[url] for url in urls)


@pytest.mark.parametrize("seed", range(6))
def test_a_reservation_ends_with_the_state_that_made_it(jobs: Callable[..., Job], seed: int) -> None:
    """Whatever becomes of downloads, in whatever order: with no file staged and none on its way not a byte is taken."""
    job = jobs(most_bytes=3 * len(DATA))
    choose = random.Random(seed)  # noqa: S311 (no secret)
    kinds = (None, None, LinkError("reset"), ImageMissing("404"), NotAnImage("a page"), HostUnreachable("no"), FULL)
    tasks = [task(number) for number in range(1, 25)]
    for one in tasks:
        fault = choose.choice(kinds)
        if fault is not None:
            lasts = fault is not FULL and choose.random() < 0.5
            (job.images.lasting if lasts else job.images.faults)[one.image_url] = fault
    job.start_with(tasks, downloads=4)
    ended = threading.Event()
    clock = threading.Thread(target=_pass_pauses, args=(job, ended))
    clock.start()
    try:
        inferred = 0
        while (image := job.infer()) is not None:
            inferred += 1
            if inferred == choose.randrange(3, 20):
                job.intake.stop()  # what is staged then, stays
            del image
    finally:
        ended.set()
        clock.join()
    staged = [file.stat().st_size for file in (job.folder / "staging").glob("*.img")]
    assert job.staging.disk.used_bytes == sum(staged)
    assert list((job.folder / "staging").glob("*.part")) == []


def _pass_pauses(job: Job, ended: threading.Event) -> None:
    """Let the pauses of a full disk pass, though nobody fills one here."""
    while not ended.wait(0.05):
        job.pass_time(PAUSE_S)


def test_parked_tasks_leave_their_room_on_the_disk_to_others(jobs: Callable[..., Job]) -> None:
    """With room for three images and a host that is gone for a while, the job goes on when it is back."""
    job = jobs(most_bytes=3 * len(DATA))
    job.images.lasting = {task(number).image_url: LinkError("503") for number in range(4, 25)}
    job.start(tasks=24, downloads=4)
    assert sorted(job.infer_all()) == ["1", "2", "3"]
    assert job.staging.disk.used_bytes == 0
    job.images.lasting.clear()
    wait_until(lambda: job.intake.due_in_s == 0)
    job.intake.close()
    left = [held.task.image_id for held in job.journal.unfinished(JOB)]
    assert len(left) >= 5
    job.start_with([], downloads=4)
    assert sorted(job.infer_all()) == sorted(left)


def test_what_an_earlier_turn_staged_is_taken_up_on_a_disk_that_is_full_of_it(jobs: Callable[..., Job]) -> None:
    """A file that is there needs no room; to wait for some would be to wait for itself."""
    job = jobs(most_bytes=2 * len(DATA))
    job.start(tasks=6, downloads=2)
    # Two fill it; one more may have begun before the size of an image was known.
    wait_until(lambda: len(job.intake.staged.images) >= 2 and not job.staging.disk.has_room())
    job.intake.close()
    left = [held.task.image_id for held in job.journal.unfinished(JOB)]
    assert len(left) >= 2
    job.start_with([])
    assert sorted(job.infer_all()) == sorted(left)


@pytest.mark.parametrize(("error", "errors"), [(LinkError("no route"), 1), (AddressRefused("10.0.0.1 is private"), 0)])
def test_on_its_last_delivery_a_link_error_is_posted_and_a_refused_address_never(
    jobs: Callable[..., Job], error: LinkError, errors: int
) -> None:
    """Which addresses may be asked is this worker's setting, and says nothing about the image."""
    job = jobs()
    last = second_delivery(1)
    job.images.faults[last.image_url] = error
    job.images.gate.clear()
    job.start_with([last])
    wait_until(lambda: job.images.at_once == 1)
    job.lease.ack_wait_s = 0.01  # it is about to lapse
    job.images.gate.set()
    assert job.infer_all() == []
    assert (job.outcomes.failed.total(), job.outcomes.given_up) == (errors, 1 - errors)


def test_a_url_that_cannot_be_split_is_an_error_of_its_image_alone(jobs: Callable[..., Job]) -> None:
    """Nobody is asked, and no host is held at fault."""
    job = jobs()
    url = "http://[broken/x.jpg"
    job.start_with([task(1), task(2).model_copy(update={"image_url": url})])
    assert job.infer_all() == ["1"]
    assert job.outcomes.failed == {"ImageUrlUnusable": 1}


def test_more_tasks_than_were_asked_for_are_all_done(jobs: Callable[..., Job]) -> None:
    """They are leased to this worker, whoever miscounted."""

    class Generous(Queue):
        def fetch_tasks(self, job_id: int, count: int) -> list[Task]:
            return super().fetch_tasks(job_id, 10 * count)

    job = jobs()
    job.start_with([task(number) for number in range(1, 31)], Generous)
    assert sorted(job.infer_all(), key=int) == [str(number) for number in range(1, 31)]
    assert job.outcomes.done == 30


@pytest.mark.parametrize("odd", ["a/../b", "n\0l", "x" * 10_000, "K\u00e4fer", "5' OR 1=1 --"])
def test_an_image_is_answered_by_the_id_it_came_with(jobs: Callable[..., Job], odd: str) -> None:
    """Through the journal and back."""
    job = jobs()
    intake = job.start_with([Task(image_id=odd, image_url="odd.jpg", reply_subject=odd)])
    assert intake.staged.get() is None
    assert job.poster.wait_idle(5)
    ((_job, entries),) = job.receiver.posts
    (answer,) = entries
    assert answer[0] == odd
    assert answer[1].endswith(error_result(odd, "")[len(b'{"error":""') :])


def test_tasks_whose_disk_never_gets_space_do_not_wait_past_their_lease(jobs: Callable[..., Job]) -> None:
    """They go back to whoever has room; nobody's image is called broken."""
    job = jobs()
    job.images.faults = {task(number).image_url: FULL for number in (1, 2)}
    job.start(tasks=2, downloads=1)
    wait_until(lambda: not job.staging.disk.has_room() and job.intake._downloading == 0)
    job.lease.ack_wait_s = 0.001
    wait_until(lambda: all(job.lease.left_s(one.fetched_at, lease_clock()) < 0 for one in job.journal.unfinished(JOB)))
    job.pass_time(PAUSE_S)
    assert job.infer_all() == []
    assert (job.outcomes.done, job.outcomes.failed.total(), job.outcomes.given_up) == (0, 0, 2)
    assert job.journal.unfinished(JOB) == []


def test_a_task_that_the_poster_fetched_is_worked_off_in_the_same_turn(jobs: Callable[..., Job]) -> None:
    """Also where it fills what may be held, so that nothing else is fetched."""
    job = jobs()
    job.images.gate.clear()
    job.start_with([task(1)])
    wait_until(lambda: job.intake._downloading == 1)
    job.journal.record(JOB, [task(2)])
    job.intake.apply(IntakeLimits(downloads=1, in_hand=100, fetch_size=100, held=1))
    job.images.gate.set()
    assert job.infer_all() == ["1", "2"]


def test_no_more_is_fetched_than_what_came_stands_for(jobs: Callable[..., Job]) -> None:
    """Ten tasks before the first download has ended, and all others in the end."""
    job = jobs()
    job.images.gate.clear()
    intake = job.start(40, downloads=40)
    wait_until(lambda: intake.fetched == job.lease.unproven_limit == 10 and not intake._fetch.is_open)
    assert intake._wanted_tasks() == 0
    job.images.gate.set()
    assert len(job.infer_all()) == 40
    assert intake._arrivals._bytes == 40 * len(DATA), "what came tells how fast it comes"


def test_the_last_delivery_is_worked_off_however_late(jobs: Callable[..., Job]) -> None:
    """Nobody gets it after us, and Antenna takes a late result."""
    job = jobs()
    job.images.faults = {task(1).image_url: FULL}
    job.start_with([second_delivery(1)])
    wait_until(lambda: not job.staging.disk.has_room() and job.intake._downloading == 0)
    job.lease.ack_wait_s = 0.001
    wait_until(lambda: job.lease.left_s(job.journal.unfinished(JOB)[0].fetched_at, lease_clock()) < -0.1)
    job.pass_time(PAUSE_S)
    assert job.infer_all() == ["1"]


def test_a_staged_task_whose_lease_is_over_is_not_decoded_unless_nobody_else_gets_it(jobs: Callable[..., Job]) -> None:
    """A first delivery is left to the next; the last one counts, however late."""
    job = jobs()
    last = second_delivery(2)
    intake = job.start_with([task(1), last], downloads=1)
    images = {image.task.image_id: image for image in (intake.staged.get(), intake.staged.get()) if image}
    job.lease.ack_wait_s = 0.01
    (first, *_others) = job.journal.unfinished(JOB)
    wait_until(lambda: job.lease.left_s(first.fetched_at, time.time()) < 0)
    assert intake.staged.still_wanted(images["2"])
    assert not intake.staged.still_wanted(images["1"])
    assert [held.task.image_id for held in job.journal.unfinished(JOB)] == ["2"]


def test_a_second_delivery_of_a_task_in_hand_joins_it(jobs: Callable[..., Job]) -> None:
    """One download, one result, posted with the newer lease; and it shows how long leases really last."""
    job = jobs()
    job.images.gate.clear()
    again = [second_delivery(number) for number in (1, 2)]
    job.start_with([task(1), task(2), *again], downloads=2)
    wait_until(lambda: job.journal.subjects() == [one.reply_subject for one in again])
    job.images.gate.set()
    assert sorted(job.infer_all()) == ["1", "2"]
    assert job.poster.wait_idle(5)
    subjects = [subject for _job, entries in job.receiver.posts for subject, _body in entries]
    assert sorted(subjects) == [one.reply_subject for one in again]
    assert job.lease.ack_wait_s < 10
