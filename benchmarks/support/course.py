"""Jobs in a row through one ingest, today's or ours, and what it held, opened and finished meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adc_worker.runtime.supervisor import CHILD_ENVIRONMENT
from benchmarks.support.image_host import ImageHost
from benchmarks.support.photographs import Photographs
from benchmarks.support.session import BASELINE, DECODING_IN_PROCESSES, SHARED, WORKER, Session, session

GB = 1_000_000_000
JOB_S_MAX, END_S_MAX, POLL_S, QUIET_S = 300.0, 20.0, 0.25, 1.0
_KINDS = {"socket:": "sockets", "pipe:": "pipes", f"{SHARED}/": "shared memory", "/memfd:": "shared memory"}


@dataclass(frozen=True, slots=True)
class Ingest:
    """Ours, or where `batch` says how many, today's; with a GPU played by a sleep and a limit of the kernel.

    Attributes:
        batch: tasks a fetch and images a batch; 0: ours, which plans for itself.
        stall_s: for so long at most today's GPU stands still in the very first batch: until all waits that may.
        pin: page-lock today's batches; needs a GPU.
        lists: hand today's batches over unstacked.
        profile: where memray writes; `PROFILE.PID` for what is forked.
    """

    batch: int = 0
    prefetch: int = 4
    loaders: int = 1
    gpu_s: float = 0.04
    stall_s: float = 0.0
    limit_bytes: int = 5 * GB
    pin: bool = False
    lists: bool = False
    profile: Path | None = None

    @property
    def title(self) -> str:
        if not self.batch:
            return "ours"
        shape = ", in lists" if self.lists else ""
        return f"today's: {self.batch} a batch, prefetch {self.prefetch}, {self.loaders} loader(s){shape}"

    def command(self, running: Session) -> tuple[list[str], Mapping[str, str]]:
        memray = [sys.executable, "-m", "memray", "run", "-q", "--follow-fork", "-o", str(self.profile)]
        if self.batch:
            command = [*memray, *BASELINE[1:]] if self.profile else BASELINE
            shape = [f"--batch-size={self.batch}", f"--prefetch={self.prefetch}", f"--workers={self.loaders}"]
            gpu = [f"--gpu-s={self.gpu_s}", f"--stall-s={self.stall_s}", "--pin" if self.pin else "--no-pin"]
            return [*command, running.server.token, *shape, *gpu, *(["--lists"] if self.lists else [])], {}
        settings = {"AMI_SIMULATED_SECONDS_PER_IMAGE": str(self.gpu_s)}
        if not self.profile:
            return WORKER, settings
        usual = running.data / "usual.json"
        usual.write_text("{}")
        child = [*DECODING_IN_PROCESSES[:-2], *memray, DECODING_IN_PROCESSES[-1], str(usual)]
        return child, settings | CHILD_ENVIRONMENT


@dataclass(frozen=True, slots=True)
class Feed:
    """A job: so many photographs of a kind, on a link that takes `slower` times as long."""

    kind: str
    images: int
    slower: float = 1.0


@dataclass(slots=True)
class Course:
    """What came of an ingest; times are seconds since its start."""

    ingest: Ingest
    feeds: Sequence[Feed]
    done: int = 0
    peak_bytes: int = 0
    oom_kills: int | None = None
    shared_left_bytes: int = 0
    held: list[tuple[float, int]] = field(default_factory=list)
    files: list[tuple[float, Counter[str], int]] = field(default_factory=list)  # of all, by kind; of the largest
    quiet: list[dict[str, int]] = field(default_factory=list)  # after each job
    batches: list[list[dict[str, Any]]] = field(default_factory=list)  # of each job
    plans: list[dict[str, Any]] = field(default_factory=list)  # the first of each job, of ours
    start_s: float = field(default_factory=time.time)

    @property
    def images(self) -> int:
        return sum(feed.images for feed in self.feeds)

    @property
    def summary(self) -> str:
        return (
            f"{self.done} of {self.images}, peak {self.peak_bytes / 1e9:.2f} GB, {self.oom_kills} kills,"
            f" {self.shared_left_bytes / 1e9:.2f} GB left, {time.time() - self.start_s:.0f} s"
        )

    @property
    def images_per_s(self) -> float:
        """Images per second of the only job, from its first batch on."""
        first, *others = self.batches[0] or [{"at_s": 0.0}]
        return sum(one["images"] for one in others) / (others[-1]["at_s"] - first["at_s"]) if others else 0.0


def run(ingest: Ingest, feeds: Sequence[Feed], photographs: Photographs, host: ImageHost, data: Path) -> Course:
    """Work the jobs off, each when the one before it is done and all is quiet; ends early when the ingest does."""
    course, job_ids = Course(ingest, feeds), []
    with tempfile.TemporaryDirectory(dir=data) as own, session(ingest.limit_bytes, Path(own)) as running:
        running.start(*ingest.command(running))
        for feed in feeds:
            host.change(slower=feed.slower)
            job_ids.append(running.server.add_job("simulated", host.urls(photographs.names(feed.kind, feed.images))))
            if not _work_off(course, running, job_ids[-1]):
                break
        host.change()
        _end(ingest, running)
        course.done = sum(len(running.saved(job_id).results) for job_id in job_ids)
        running.finish()
        course.oom_kills, course.peak_bytes = running.oom_kills, running.samples.peak_bytes
        course.held = [(at_s - course.start_s, held) for at_s, held in running.samples.held]
    course.shared_left_bytes = running.shared_left_bytes
    return course


def _work_off(course: Course, running: Session, job_id: int) -> bool:
    """Wait for a job's end, counting open files; False when the ingest ended instead."""
    process, end = running.process, "job" if course.ingest.batch else "job_summary"
    assert process is not None
    if course.ingest.batch:
        assert process.stdin is not None
        process.stdin.write(f"{running.server.api_url}/jobs/{job_id}/\n")
        process.stdin.flush()
    jobs, until_s = len(course.batches) + 1, time.monotonic() + JOB_S_MAX
    while len(running.events(end)) < jobs and process.poll() is None:
        if time.monotonic() > until_s:
            raise SystemExit(f"{course.ingest.title} was not done within {JOB_S_MAX} s: {running.lines[-3:]}")
        time.sleep(POLL_S)
        course.files.append((time.time() - course.start_s, *open_files(running.enclosure.pids())))
    time.sleep(QUIET_S)
    count, largest = open_files(running.enclosure.pids())
    held = {"held_bytes": running.enclosure.held_bytes(), "files": count.total(), "largest": largest}
    course.quiet.append({"at_s": round(time.time() - course.start_s), **held})
    seen = sum(map(len, course.batches))
    course.batches.append(running.events("batch")[seen:])
    course.plans += [plan for plan in running.events("plan") if plan["job_id"] == job_id][:1]
    return process.poll() is None


def _end(ingest: Ingest, running: Session) -> None:
    assert running.process is not None
    if ingest.batch:
        assert running.process.stdin is not None
        with suppress(BrokenPipeError):
            running.process.stdin.close()
    elif running.process.poll() is None:
        os.killpg(running.process.pid, signal.SIGTERM)
    running.wait(END_S_MAX)


def open_files(pids: Sequence[int]) -> tuple[Counter[str], int]:
    """Count open files by kind over all processes, and those of the process that has most."""
    kinds, largest = Counter[str](), 0
    for pid in pids:
        with suppress(OSError):  # it ended
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            largest = max(largest, len(links))
            kinds.update(
                next((kind for start, kind in _KINDS.items() if link.startswith(start)), "others") for link in links
            )
    return kinds, largest
