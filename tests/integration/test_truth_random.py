"""Whatever Antenna, proxies and image hosts answer: results are right, errors have evidence, nothing computed is lost.

Real intake, staging, decoder, journal and poster work against a scripted Antenna and a scripted image host. Not covered
here: batches and the arena (`test_feeder_random.py`), processes and real connections (`tests/faults`).
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.antenna.wire import Algorithm, Detection, JobRef, SuccessResult
from adc_worker.errors import ImageError
from adc_worker.ingest.decode import decode
from adc_worker.ingest.staging import StagedImage, StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.runtime.evidence import Evidence
from adc_worker.runtime.faults import Faults
from adc_worker.runtime.intake import Intake, IntakeLimits, TaskFetch
from adc_worker.runtime.outcomes import ImageResult, JobOutcomes
from adc_worker.runtime.signs_of_life import SignsOfLife
from adc_worker.runtime.slices import JobBoard, JobPoller
from tests.support.readings import box_of, reading
from tests.support.scripted_antenna import (
    BODIES,
    BROKEN,
    CONTENT_TYPES,
    MAX_DELIVER,
    SLUG,
    STATUSES,
    Lie,
    ScriptedAntenna,
    ScriptedJob,
)
from tests.support.scripted_images import (
    FAULTY,
    HEIGHT_PX,
    LINK_FAULTS,
    MAX_PIXELS,
    WHOLE,
    WIDTH_PX,
    Photograph,
    ScriptedImages,
    photograph,
    url_of,
)

FIRST_JOB, SECOND_JOB = 7, 8
JOBS = (FIRST_JOB, SECOND_JOB)
IMAGES_PER_JOB = 9
FAULTY_PER_JOB = 3
BACKOFF_S = 0.001
POSTING_S = 0.1  # for posts that lies may hold up
PATIENCE_S = 20.0
TURN_APART_S = 120.0  # on the clock of hosts at fault: they may be tried again in the next turn
TICK_S = 0.002
TICK_SHOWS_S = 0.5
QUIET_TURNS = 3  # turns in which nothing changes, after which nothing will
ALGORITHM = Algorithm("Scripted", "scripted", "localization")

Computed = tuple[int, int, int]  # job, its restarts, image


class ScriptedWorker:
    """The parts of a worker between Antenna and the GPU, as its main loop puts them together."""

    def __init__(self, folder: Path, antenna: ScriptedAntenna, images: ScriptedImages) -> None:
        self.is_connected = True
        self.given_up = 0
        self.computed: set[Computed] = set()
        self.journal = Journal(folder / "journal.db")
        self._antenna = antenna
        self._clock_s = 0.0
        self._client = AntennaClient(
            "http://antenna.test/api/v2", "token", antenna.transport(lambda: self.is_connected)
        )
        self._staging = StagingArea(folder / "staging", images, MAX_PIXELS, owner=self.journal.staging_name)
        self.journal.accuse(None, 0)
        self._staging.sweep(self.journal.unfinished_ids)
        self.poster = Poster(self.journal, self._client, PosterLimits(1, 2000), first_backoff_s=BACKOFF_S)
        self._lease = LeaseTerms(max_deliver=MAX_DELIVER)
        self._faults = Faults(now=lambda: self._clock_s)
        self._evidence = Evidence(now=lambda: self._clock_s)
        self._fetches = {
            job_id: TaskFetch(job_id, self._client, self.journal, self.poster, self._lease) for job_id in JOBS
        }
        # One buffer for all images, as the arena's memory is used again; at first it holds another image's pixels.
        self._pixels = np.full((HEIGHT_PX, WIDTH_PX, 3), 0x77, np.uint8)

    def take_turn(self, job_id: int, most_images: int | None, *, dies: bool = False) -> None:
        """Work on a job until Antenna has no more tasks, or until that many images were begun."""
        self._clock_s += TURN_APART_S
        outcomes = JobOutcomes(job_id, self.journal, self._staging, self.poster)
        stopping = threading.Event()
        board = JobBoard(120.0, 5.0)
        board.add([JobRef(id=job_id, pipeline_slug=SLUG)])
        turn = board.next_turn(stopping.is_set)
        assert turn is not None
        intake = Intake(
            self._fetches[job_id],
            self.journal,
            self._staging,
            outcomes,
            self._lease,
            IntakeLimits(downloads=1, in_hand=100, fetch_size=4, held=100),
            turn,
            faults=self._faults,
            evidence=self._evidence,
            life=SignsOfLife(),
        )
        with closing(intake), self._time_flies(intake):
            intake.start()
            self._work_off(intake, outcomes, most_images, dies=dies)
        self.given_up += outcomes.given_up

    def poll(self) -> None:
        """Let the poller ask once for the jobs and for those that are not listed, and drop those that are lost."""
        poller = JobPoller(JobBoard(120.0, 5.0), self._client, self.journal, [SLUG], None)
        poller.start()
        poller.wait_for_news(PATIENCE_S)
        poller.close()
        for _job_id, task_ids in poller.take_lost():
            for task_id in task_ids:
                self._staging.discard(task_id)

    def close(self, flush_s: float) -> None:
        self.poster.close(flush_s)
        self.journal.close()
        self._client.close()

    @contextmanager
    def _time_flies(self, intake: Intake) -> Iterator[None]:
        """Let the clock that failed downloads wait by go fast."""
        over = threading.Event()

        def tick() -> None:
            while not over.wait(TICK_S):
                self._clock_s += TICK_SHOWS_S
                intake.wake()

        ticking = threading.Thread(target=tick, name="clock")
        ticking.start()
        try:
            yield
        finally:
            over.set()
            ticking.join()

    def _work_off(self, intake: Intake, outcomes: JobOutcomes, most_images: int | None, *, dies: bool) -> None:
        begun = 0
        while most_images is None or begun < most_images:
            image = intake.staged.get()
            if image is None:
                return
            if not intake.staged.still_wanted(image):
                continue
            outcomes.begin([image])
            begun += 1
            if dies and begun == most_images:
                return
            self._infer(image, outcomes)

    def _infer(self, image: StagedImage, outcomes: JobOutcomes) -> None:
        try:
            report = decode(image.path, image.header, self._region(image))
        except ImageError as error:
            outcomes.fail_staged(image, error)
            return
        box = box_of(reading(self._pixels))
        parts = SuccessResult(image.task, SLUG, [Detection(box, ALGORITHM)], 0.1, "2026-07-01T23:15:00")
        outcomes.succeed([ImageResult(image.id, parts, detections=1, truncated=report.truncated)])
        subject = image.task.reply_subject
        job_id = int(subject.split(".")[2].removeprefix("job_"))
        self.computed.add((job_id, self._antenna.restarts_of(subject), int(image.task.image_id)))

    def _region(self, image: StagedImage) -> npt.NDArray[np.uint8]:
        assert image.header.shape == self._pixels.shape
        return self._pixels


ANY_LIES = st.builds(
    Lie,
    acts=st.booleans(),
    status=st.sampled_from(STATUSES),
    body=st.sampled_from(BODIES),
    content_type=st.sampled_from(CONTENT_TYPES),
    broken=st.just("") | st.sampled_from(BROKEN),
)
IN_FORM = ("true", "half", "detail", "validation", "other_job", "other_subjects")
# What a client is most easily taken in by: an answer that comes, with a status that Antenna uses.
LIKELY_LIES = st.builds(
    Lie,
    acts=st.booleans(),
    status=st.sampled_from((200, 400, 404, 413)),
    body=st.sampled_from(IN_FORM) | st.sampled_from(BODIES),
    content_type=st.sampled_from(CONTENT_TYPES),
)
LIES = ANY_LIES | LIKELY_LIES
KIND_LISTS = st.lists(st.sampled_from((*FAULTY, "missing")), min_size=FAULTY_PER_JOB, max_size=FAULTY_PER_JOB)
MOST_LIES = {"jobs": 1, "job": 2, "tasks": 1, "result": 4}  # by route: many to results, which a lie can destroy
SCRIPTS = st.fixed_dictionaries({route: st.lists(LIES, max_size=most) for route, most in MOST_LIES.items()})
PLACES = st.sets(st.integers(0, IMAGES_PER_JOB - 1), min_size=1)


class TruthMachine(RuleBasedStateMachine):
    """Lies, faults, turns, crashes, ended leases, cancels and restarted jobs in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="truth-"))
        self.photographs: dict[int, Photograph] = {}
        self.image_faults: deque[str] = deque()
        self.antenna = ScriptedAntenna(self._truth, self._may_fail, url_of)
        self.images = ScriptedImages(self.photographs, self.image_faults)
        self.computed: set[Computed] = set()
        self.given_up = 0
        self.worker: ScriptedWorker | None = None

    @initialize(first=KIND_LISTS, second=KIND_LISTS, kinds=st.lists(st.sampled_from(WHOLE), min_size=12, max_size=12))
    def begin(self, first: list[str], second: list[str], kinds: list[str]) -> None:
        whole = iter(kinds)
        number = 1
        for job_id, faulty in ((FIRST_JOB, first), (SECOND_JOB, second)):
            numbers = list(range(number, number + IMAGES_PER_JOB))
            number += IMAGES_PER_JOB
            for place, one in enumerate(numbers):
                kind = faulty[place // 3] if place % 3 == 1 else next(whole)
                self.photographs[one] = photograph(one, kind)
            self.antenna.add_job(job_id, numbers)
        self._open()

    @rule(
        job_id=st.sampled_from(JOBS),
        most_images=st.integers(1, 4) | st.none(),
        lies=SCRIPTS,
        faults=st.lists(st.sampled_from(LINK_FAULTS), max_size=4),
    )
    def take_a_turn(self, job_id: int, most_images: int | None, lies: dict[str, list[Lie]], faults: list[str]) -> None:
        self._script(lies)
        self.image_faults.extend(faults)
        self._worker.take_turn(job_id, most_images)
        self._worker.poster.wait_idle(POSTING_S)

    @rule(lies=SCRIPTS)
    def poll(self, lies: dict[str, list[Lie]]) -> None:
        self._script(lies)
        self._worker.poll()

    @rule(job_id=st.sampled_from(JOBS), places=PLACES)
    def leases_end(self, job_id: int, places: set[int]) -> None:
        self.antenna.end_leases(job_id, places)

    @rule(lies=SCRIPTS)
    def restart(self, lies: dict[str, list[Lie]]) -> None:
        self._script(lies)
        self._close(POSTING_S)
        self._open()

    @rule(job_id=st.sampled_from(JOBS), images_begun=st.none() | st.integers(1, 3))
    def crash(self, job_id: int, images_begun: int | None) -> None:
        if images_begun is not None:
            self._worker.take_turn(job_id, images_begun, dies=True)
        self._crash()
        self._open()
        self.antenna.note_crash(self._worker.journal.subjects())

    @rule(job_id=st.sampled_from(JOBS))
    def job_is_cancelled(self, job_id: int) -> None:
        self.antenna.cancel(job_id)

    @rule(job_id=st.sampled_from(JOBS), crashes=st.booleans())
    def job_is_restarted_while_the_worker_is_away(self, job_id: int, *, crashes: bool) -> None:
        """A cancel and a retry take an operator longer than a worker trusts its last contact."""
        if crashes:
            self._crash()
        else:
            self._close(0.0)
        self.antenna.cancel(job_id)
        self.antenna.retry(job_id)
        self._open()

    @invariant()
    def no_result_is_wrong_and_no_error_without_evidence(self) -> None:
        assert not self.antenna.violations, self.antenna.violations

    @invariant()
    def what_was_computed_is_saved_or_kept(self) -> None:
        if self.worker is None:
            return
        kept = {(held.job_id, int(held.task.image_id)) for held in self.worker.journal.unposted((), 10_000, 1 << 40)}
        for job_id, restarts, image in self.computed | self.worker.computed:
            job = self.antenna.jobs[job_id]
            is_wanted = job.is_live and job.restarts == restarts and image not in job.excused
            if is_wanted and image not in job.saved:
                assert (job_id, image) in kept, f"job {job_id}: the result of image {image} is gone"

    def teardown(self) -> None:
        try:
            if self.worker is not None and not self.antenna.violations:  # else an invariant has failed
                self._heal()
                self._check_outcomes()
        finally:
            if self.worker is not None:
                self._close(0.0)
            self.images.close()
            shutil.rmtree(self.folder)

    @property
    def _worker(self) -> ScriptedWorker:
        assert self.worker is not None
        return self.worker

    def _truth(self, number: int) -> int | None:
        return self.photographs[number].reading

    def _may_fail(self, number: int, _text: str, delivery: int) -> bool:
        """A whole photograph may get an error only where nobody could download it, on its last delivery."""
        if not self.photographs[number].is_whole:
            return True
        return number in self.images.failed and delivery >= MAX_DELIVER

    def _script(self, lies: dict[str, list[Lie]]) -> None:
        for route, of_route in lies.items():
            self.antenna.lies[route].extend(of_route)

    def _open(self) -> None:
        self.worker = ScriptedWorker(self.folder / "data", self.antenna, self.images)

    def _close(self, flush_s: float) -> None:
        worker = self._worker
        self.worker = None
        worker.close(flush_s)
        self.computed |= worker.computed
        self.given_up += worker.given_up

    def _crash(self) -> None:
        """End the worker, and put its files back to what they were while it ran."""
        self._worker.is_connected = False
        with self.antenna.lock:  # no answer is under way
            pass
        data = self.folder / "data"
        image = self.folder / "image"
        image.mkdir()
        if (data / "staging").exists():
            shutil.copytree(data / "staging", image / "staging")
        with (
            closing(sqlite3.connect(data / "journal.db")) as source,
            closing(sqlite3.connect(image / "journal.db")) as target,
        ):
            source.backup(target)
        self._close(0.0)
        shutil.rmtree(data)
        image.rename(data)

    def _heal(self) -> None:
        """End all lies and faults, then work until nothing changes any more."""
        self.antenna.tell_the_truth()
        self.image_faults.clear()
        self._close(POSTING_S)
        self._open()
        quiet_turns = 0
        while quiet_turns < QUIET_TURNS:
            before = self._progress()
            self._worker.poll()
            for job_id in JOBS:
                self.antenna.end_leases(job_id, range(IMAGES_PER_JOB))
                if self.antenna.jobs[job_id].is_live:
                    self._worker.take_turn(job_id, None)
            self._worker.poster.wake()
            assert self._worker.poster.wait_idle(PATIENCE_S), "results are kept and never posted"
            quiet_turns = quiet_turns + 1 if self._progress() == before else 0

    def _progress(self) -> Sequence[object]:
        jobs = self.antenna.jobs.values()
        return [(job.status, len(job.without_outcome), sum(one.deliveries for one in job.messages)) for job in jobs]

    def _check_outcomes(self) -> None:
        """Each image of a live job has an outcome, or its deliveries ended in a way that is known."""
        self.no_result_is_wrong_and_no_error_without_evidence()
        self.what_was_computed_is_saved_or_kept()
        unexplained = [
            f"job {job.id}: image {image} has no outcome; {job.message_for(image)}; held: {self._holds(job, image)}"
            for job in self.antenna.jobs.values()
            if job.is_live
            for image in job.without_outcome
            if not self._is_explained(job, image)
        ]
        assert len(unexplained) <= self.given_up + self._worker.given_up, unexplained

    def _is_explained(self, job: ScriptedJob, image: int) -> bool:
        # The host may be at fault for all one can tell: images of it wait on record, the damaged ones longest.
        is_parked = not self.photographs[image].is_whole and self._holds(job, image)
        return image in job.excused or image in job.answers_lost or is_parked

    def _holds(self, job: ScriptedJob, image: int) -> bool:
        return any(int(held.task.image_id) == image for held in self._worker.journal.unfinished(job.id))


class LongTruthMachine(TruthMachine):
    """The same at length, and another way each time."""


TestTruthMachine = TruthMachine.TestCase
TestTruthMachine.settings = settings(
    max_examples=20,
    stateful_step_count=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLongTruthMachine = pytest.mark.soak(pytest.mark.timeout(3600)(LongTruthMachine.TestCase))
TestLongTruthMachine.settings = settings(
    max_examples=int(os.environ.get("SOAK_EXAMPLES", "500")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
