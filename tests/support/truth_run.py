"""A run of real workers in bad company: kills, damaged files, hosts that flap, and portals in front of Antenna.

Each result carries the checksum of the pixels it was computed from: what is saved can be held against the files.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from subprocess import Popen

import psutil

from adc_worker.desk.job import Job
from adc_worker.desk.server import DevServer
from tests.support import checksum_pipeline
from tests.support.gate import Answer, Fault, Gate
from tests.support.image_server import ImageServer, Reply
from tests.support.readings import reading_of
from tests.support.scripted_antenna import DEBUG_PAGE, PORTAL
from tests.support.scripted_images import FAULTY, WHOLE, Photograph, photograph
from tests.support.workers import WorkerProcess, environment, worker

JOBS = 3
HOSTS = 3
SIZES_PX = ((64, 48), (97, 61), (160, 120), (240, 180), (320, 240))
# A stored page cannot be told from a portal's before its last delivery, which is far away here.
DAMAGED = tuple(kind for kind in FAULTY if kind != "page")
DAMAGED_SHARE = 0.12  # far from the half at which Antenna fails a job
MISSING_SHARE = 0.03
ACK_WAIT_S = 20.0
MAX_DELIVER = 20  # a fault of the link never comes to the last delivery, where it would be posted as an error
ANTENNA_FAULT_SHARE = 0.06  # of the requests to Antenna
PORTAL_EVERY_S = (6.0, 14.0)  # between two spells in which everything asked of Antenna meets a portal
PORTAL_LASTS_S = (0.5, 2.0)
HOST_FAULT_SHARE = 0.02  # of the downloads, beside the spells
HOST_BAD_EVERY_S = (3.0, 9.0)
HOST_BAD_LASTS_S = (0.3, 1.5)
CHILD_ALONE = 0.4  # of the kills
POLL_S = 0.05
PATIENCE_S = 10.0  # for a killed process to be gone
RETRY_AT = 0.4  # share of the first job's images that have an outcome when it is cancelled and retried

_HTML = "text/html"
_PORTAL = Answer(200, PORTAL, _HTML)
# None of these is an answer that Antenna's contract gives to these requests.
ANTENNA_FAULTS: tuple[Fault, ...] = (
    _PORTAL, Answer(200, PORTAL, _HTML, forwards=True), Answer(200, b"", _HTML), Answer(204, b"", _HTML),
    Answer(200, b"{}"), Answer(200, b'{"status": "ok"}'), Answer(200, b"[]"), Answer(200, PORTAL),
    Answer(400, DEBUG_PAGE, _HTML), Answer(400, b'{"message": "bad request"}'), Answer(404, PORTAL, _HTML),
    Answer(404, b'{"message": "no Route matched with those values"}'), Answer(413, PORTAL, _HTML),
    Answer(422, b'{"error": "unprocessable"}'), Answer(403, PORTAL, _HTML), Answer(401, PORTAL, _HTML),
    Answer(500, DEBUG_PAGE, _HTML, forwards=True), 302, 405, 429, 500, 502, 503, "reset", "cut",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How large a run is. `life_s`: how long a worker lives between two kills, at least and at most."""

    images: int
    seed: int
    timeout_s: float
    life_s: tuple[float, float]
    retries_a_job: bool = True
    seconds_per_image: float = 0.003


@dataclass
class Findings:
    """What became of all images; counts unless a name says otherwise."""

    images: int
    damaged: int
    missing: int
    kills: int
    antenna_faults: int
    host_faults: int
    wrong: list[str]
    destroyed: list[str]
    blamed: list[str]
    without_outcome: list[str]
    ended_by_itself: list[int]
    wall_s: float


class _Spells:
    """Good and bad spells in turn, as a clock tells; safe to use from several threads."""

    def __init__(self, seed: int, apart_s: tuple[float, float], lasts_s: tuple[float, float]) -> None:
        self._chance = random.Random(seed)  # noqa: S311 (repeatable)
        self._apart_s = apart_s
        self._lasts_s = lasts_s
        self._lock = threading.Lock()
        self._begins_s = time.monotonic() + self._chance.uniform(*apart_s)
        self._ends_s = self._begins_s + self._chance.uniform(*lasts_s)
        self._number = 0

    def number(self) -> int | None:
        """Return which bad spell it is now; None in a good one."""
        now_s = time.monotonic()
        with self._lock:
            if now_s > self._ends_s:
                self._begins_s = now_s + self._chance.uniform(*self._apart_s)
                self._ends_s = self._begins_s + self._chance.uniform(*self._lasts_s)
                self._number += 1
            return self._number if now_s >= self._begins_s else None


class FlappingHost:
    """Serves photographs, and in bad spells something else in place of all of them."""

    def __init__(self, server: ImageServer, seed: int) -> None:
        self.faults = 0
        self._server = server
        self._chance = random.Random(seed)  # noqa: S311 (repeatable)
        self._spells = _Spells(seed, HOST_BAD_EVERY_S, HOST_BAD_LASTS_S)

    def add(self, one: Photograph) -> str:
        """Serve a photograph and return its address."""
        path = f"/{one.number}.jpg"
        self._server.replies[path] = lambda: self._reply(one)
        return self._server.url(path)

    def _reply(self, one: Photograph) -> Reply:
        spell = self._spells.number()
        if spell is None and self._chance.random() > HOST_FAULT_SHARE:
            is_missing = one.kind == "missing"
            return Reply(b"no such key", status=404) if is_missing else Reply(one.data)
        self.faults += 1
        faults = (
            Reply(b"busy", status=503),
            Reply(PORTAL, headers={"Content-Type": "text/html"}),
            Reply(b"denied", status=403),
            Reply(one.data[: len(one.data) // 2], length=str(len(one.data) + 1)),
        )
        return faults[spell % len(faults)] if spell is not None else self._chance.choice(faults)


def _is_ready(running: WorkerProcess, lives: int) -> bool:
    return len(running.events("worker_ready")) >= lives


def _is_past(moment_s: float) -> bool:
    return time.monotonic() >= moment_s


@dataclass
class TruthRun:
    """One run: made, then `go`."""

    options: RunOptions
    folder: Path
    antenna: DevServer
    gate: Gate
    servers: list[ImageServer]
    photographs: dict[str, Photograph] = field(default_factory=dict)  # by image id
    jobs: list[int] = field(default_factory=list)
    kills: int = 0
    ended_by_itself: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        seed = self.options.seed
        self._chance = random.Random(seed)  # noqa: S311 (repeatable)
        self._gate_chance = random.Random(seed + 1)  # noqa: S311 (repeatable)
        self._gate_lock = threading.Lock()
        self._portal = _Spells(seed + 2, PORTAL_EVERY_S, PORTAL_LASTS_S)
        self._hosts = [FlappingHost(server, seed + 10 + index) for index, server in enumerate(self.servers)]
        self._retried = not self.options.retries_a_job
        self._antenna_faults = 0
        made = [self._photograph(number) for number in range(self.options.images)]
        for index in range(JOBS):
            self._add_job(made[index::JOBS])

    def go(self) -> Findings:
        """Work until every image has an outcome or the time is over."""
        self.gate.fault = self._fault
        started_s = time.monotonic()
        deadline_s = started_s + self.options.timeout_s
        log_number = 0
        while not self._is_finished() and time.monotonic() < deadline_s:
            with worker(self._environment()) as running:
                self._let_live(running, deadline_s)
            (self.folder / f"worker-{log_number}.log").write_text("\n".join(running.lines))
            log_number += 1
            self._retry_once()
        return self._findings(time.monotonic() - started_s)

    def _photograph(self, number: int) -> Photograph:
        share = self._chance.random()
        size_px = self._chance.choice(SIZES_PX)
        if share < MISSING_SHARE:
            return photograph(number, "missing", size_px)
        kinds = DAMAGED if share < MISSING_SHARE + DAMAGED_SHARE else WHOLE
        return photograph(number, self._chance.choice(kinds), size_px)

    def _add_job(self, photographs: list[Photograph]) -> None:
        urls = [self._chance.choice(self._hosts).add(one) for one in photographs]
        algorithms = [("Checksum", "checksum", "localization")]
        job_id = self.antenna.add_job(checksum_pipeline.SLUG, urls, algorithms=algorithms)
        self.jobs.append(job_id)
        self.photographs.update(zip(self.antenna.job(job_id).image_ids, photographs, strict=True))

    def _environment(self) -> dict[str, str]:
        return environment(self.antenna, self.folder / "data", checksum_pipeline.ENVIRONMENT) | {
            "AMI_ANTENNA_API_BASE_URL": self.gate.api_url,
            "AMI_ANTENNA_ACK_WAIT_SECONDS": str(ACK_WAIT_S),
            "AMI_ANTENNA_MAX_DELIVER": str(MAX_DELIVER),
            "CHECKSUM_FOLDER": str(self.folder),
            "CHECKSUM_SECONDS": str(self.options.seconds_per_image),
        }

    def _fault(self, _route: str) -> Fault | None:
        with self._gate_lock:
            is_portal = self._portal.number() is not None
            if not is_portal and self._gate_chance.random() > ANTENNA_FAULT_SHARE:
                return None
            self._antenna_faults += 1
            return _PORTAL if is_portal else self._gate_chance.choice(ANTENNA_FAULTS)

    def _let_live(self, running: WorkerProcess, deadline_s: float) -> None:
        """Let a worker live, killing its child now and then, until it is killed itself or the run is over."""
        parent = running.process
        for lives in count(1):
            # A start takes longer on a busy machine: what is to be killed is a worker at work.
            self._wait(partial(_is_ready, running, lives), parent, deadline_s)
            moment_s = time.monotonic() + self._chance.uniform(*self.options.life_s)
            self._wait(partial(_is_past, moment_s), parent, deadline_s)
            if parent.poll() is not None:
                self.ended_by_itself.append(parent.returncode)
                return
            if self._is_finished() or time.monotonic() >= deadline_s or not self._kill(parent.pid):
                return

    def _wait(self, condition: Callable[[], bool], parent: Popen[str], deadline_s: float) -> None:
        """Wait until a condition holds, or there is nothing to wait for any more."""
        while not condition() and parent.poll() is None:
            if self._is_finished() or time.monotonic() >= deadline_s:
                return
            time.sleep(POLL_S)

    def _kill(self, parent: int) -> bool:
        """Kill the child, or parent and child together; return whether the parent is left."""
        self.kills += 1
        children = psutil.Process(parent).children()
        if children and self._chance.random() < CHILD_ALONE:
            children[0].kill()
            psutil.wait_procs(children[:1], PATIENCE_S)
            return True
        os.killpg(parent, signal.SIGKILL)
        psutil.wait_procs(children, PATIENCE_S)
        return False

    def _retry_once(self) -> None:
        """Cancel and retry the first job once, while no worker runs, when it is half done."""
        job = self.antenna.job(self.jobs[0])
        if self._retried or job.counted < RETRY_AT * job.total:
            return
        self._retried = True
        self.antenna.cancel(job.id)
        self.antenna.retry(job.id)

    def _views(self) -> list[Job]:
        return [self.antenna.job(job_id) for job_id in self.jobs]

    def _is_finished(self) -> bool:
        return self._retried and all(job.counted == job.total for job in self._views())

    def _findings(self, wall_s: float) -> Findings:
        views = self._views()
        inferred = checksum_pipeline.inferred(self.folder)
        saved = {image_id: result for job in views for image_id, result in job.results.items()}
        errors = {image_id: text for job in views for image_id, text in job.errors.items()}
        found = Findings(
            images=len(self.photographs),
            damaged=sum(one.kind in DAMAGED for one in self.photographs.values()),
            missing=sum(one.kind == "missing" for one in self.photographs.values()),
            kills=self.kills,
            antenna_faults=self._antenna_faults,
            host_faults=sum(host.faults for host in self._hosts),
            wrong=[],
            destroyed=[],
            blamed=[],
            without_outcome=[],
            ended_by_itself=self.ended_by_itself,
            wall_s=wall_s,
        )
        for image_id, one in self.photographs.items():
            name = f"image {image_id} ({one.kind} {one.number})"
            was_inferred = one.reading in inferred
            if image_id in saved:
                said = reading_of(saved[image_id]["detections"])
                if said != one.reading:
                    found.wrong.append(f"{name} says {said}, its pixels say {one.reading}")
                continue
            if one.is_whole and image_id in errors:
                found.blamed.append(f"{name}: {errors[image_id]}")
            if was_inferred:
                found.destroyed.append(f"{name}: {errors.get(image_id, 'no outcome')}")
            if image_id not in errors:
                found.without_outcome.append(name)
        return found
