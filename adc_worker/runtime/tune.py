"""What the worker would do on a job, worked out before it runs, from a sample that spends no delivery where it can."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms, lease_clock
from adc_worker.antenna.wire import Capture, JobState, PostEntry, Task
from adc_worker.errors import AdcError, AntennaError, ConfigurationError, ImageError, ImageMissing
from adc_worker.host.budget import HostBudget, visible_gpus
from adc_worker.host.memory import anonymous_bytes
from adc_worker.host.share import MemoryShare
from adc_worker.ingest.download import ImageClient
from adc_worker.ingest.staging import StagedQueue, StagingArea
from adc_worker.journal.journal import HeldTask, Journal
from adc_worker.journal.poster import Poster, PosterLimits, ResultReceiver
from adc_worker.models import registry
from adc_worker.models.pipeline import CallSizes, Pipeline
from adc_worker.planning.measurements import PROBE_IMAGES, ProbeReport
from adc_worker.planning.plan import IngestPlan
from adc_worker.planning.policy import IngestPolicy
from adc_worker.redaction import redact
from adc_worker.runtime.faults import advice
from adc_worker.runtime.intake import IntakeLimits
from adc_worker.runtime.job import ceilings, measure_host, naming_gpu_faults
from adc_worker.runtime.outcomes import JobOutcomes, Outcomes
from adc_worker.runtime.probe import known_sizes, probe
from adc_worker.runtime.signs_of_life import FIRST_INFERENCE_LEASES, SignsOfLife
from adc_worker.runtime.worker import image_client, make_data_folder
from adc_worker.settings import Settings

POST_TIMEOUT_S = 60.0
PATIENCE_S = 60  # with others that hold the memory


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured of a job, and what follows."""

    job_id: int
    pipeline: str
    source: str
    report: ProbeReport
    host: HostBudget
    lease: LeaseTerms
    plan: IngestPlan

    def to_json(self) -> dict[str, Any]:
        return {
            "job_id": self.job_id,
            "pipeline": self.pipeline,
            "source": self.source,
            "machine": asdict(self.host),
            "lease": asdict(self.lease),
            "sample": asdict(self.report),
            "plan": self.plan.log_fields(),
            "why": dict(self.plan.why),
        }


class _Nowhere:
    """Takes the results of photographs that no task was spent on."""

    def post_results(self, _job_id: int, entries: Sequence[PostEntry]) -> frozenset[str]:
        return frozenset(entry.reply_subject for entry in entries)

    def job(self, job_id: int) -> JobState:
        return JobState(id=job_id, status="STARTED", started_at="once")

    def fetch_tasks(self, _job_id: int, _count: int) -> list[Task]:
        return []


def tune(config: Settings, target: str) -> Tuning:
    """Find a job of a pipeline's slug or a project's number, measure two of its images, and plan.

    Where Antenna lists the job's photographs no task is taken; else two are, and what they come to is posted.

    Raises:
        ConfigurationError: there is no such job, or nothing of it can be measured here.
    """
    specs, project = registry.available(config), int(target) if target.isdecimal() else None
    if project is None and target not in specs:
        raise ConfigurationError(f"{target}: neither a project's number nor a pipeline ({', '.join(sorted(specs))})")
    make_data_folder(config)
    with (
        AntennaClient(config.antenna_api_base_url, config.token) as client,
        image_client(config) as images,
        closing(MemoryShare(config.user_data_path)) as share,
        naming_gpu_faults(),
    ):
        job = next(iter(client.jobs(list(specs) if project is not None else [target], project)), None)
        if job is None:
            raise ConfigurationError(f"{target}: Antenna lists no job with tasks for it; start one, or name another")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = CallSizes(config.localization_batch_size, config.classification_batch_size)
        pipeline = registry.load(specs[job.pipeline_slug], device, sizes)
        lease = LeaseTerms(config.antenna_ack_wait_seconds, config.antenna_max_deliver)
        report, host, source = _Sample(config, client, images, share, pipeline, lease, job.id).take()
        instances = config.worker_instances or max(1, len(visible_gpus()))
        host = shared(host, instances - len(share.others()))
    plan = IngestPolicy(ceilings(config)).plan(report, host, lease)
    return Tuning(job.id, job.pipeline_slug, redact(source), report, host, lease, plan)  # it may quote a URL


def shared(host: HostBudget, workers: int) -> HostBudget:
    """Return what one of so many workers has of a host's memory when all of them have a job."""
    if workers <= 1:
        return host
    room_bytes = (host.used_bytes + host.available_bytes) // workers
    source = f"1/{workers} of {host.limit_source}: as many workers run here"
    available_bytes = max(0, room_bytes - host.used_bytes)
    return replace(host, limit_bytes=host.limit_bytes // workers, limit_source=source, available_bytes=available_bytes)


def patience(
    measure: Callable[[], HostBudget], share: MemoryShare, pause: Callable[[float], None] = time.sleep
) -> Iterator[bool]:
    """Let others finish who hold the memory, a second a turn.

    Raises:
        ConfigurationError: after a minute; it says who holds how much.
    """
    for _second in range(PATIENCE_S):
        pause(1.0)
        yield True
    host, claims = measure(), share.others()
    held_gb = (host.limit_bytes - host.used_bytes - host.available_bytes) / 1e9
    raise ConfigurationError(
        f"waited {PATIENCE_S} s for memory: of {host.limit_bytes / 1e9:.2f} GB ({host.limit_source}) others hold"
        f" {held_gb:.2f} GB, {len(claims)} workers on this host {sum(one.size_bytes for one in claims) / 1e9:.2f} GB:"
        " stop one of them, or tune when its job is over"
    )


@dataclass(slots=True)
class _Sample:
    """Measures two images of a job, in all as a worker would; notes what is wrong with others, and settles none."""

    config: Settings
    client: AntennaClient
    images: ImageClient
    share: MemoryShare
    pipeline: Pipeline
    lease: LeaseTerms
    job_id: int
    captures: list[Capture] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    taken: int = 0  # tasks
    posted: int = 0

    def take(self) -> tuple[ProbeReport, HostBudget, str]:
        """Return the measurements, the host with the models loaded, and in words where the images came from."""
        reason = "Antenna lists no photograph of the job"
        try:
            self.captures = self.client.captures(self.job_id)
        except AntennaError as error:
            reason = f"Antenna did not list its photographs: {error}"
        if self.captures:
            if (found := self._of_photographs()) is not None:
                failed = f"; {len(self.errors)} failed: {self.errors[0]}" if self.errors else ""
                measured = f"{len(found[0].images)} of {len(self.captures)} photographs that Antenna lists"
                return *found, f"{measured}; no task was taken{failed}"
            if not all(isinstance(error, ImageMissing) for error in self.errors):
                raise self._useless("no task was taken")  # it would be spent on what fails here
            reason, self.errors = f"the photographs that Antenna lists are gone: {self.errors[0]}", []
        return self._of_tasks(reason)

    def _of_photographs(self) -> tuple[ProbeReport, HostBudget] | None:
        """Measure photographs from all over the list, as many as a worker would have in hand."""
        most, name = self.lease.unproven_limit, f"tune-{os.getpid()}"
        chosen = self.captures[:: max(1, len(self.captures) // most)][:most]
        tasks = [Task(image_id=one.id, image_url=one.url, reply_subject="none") for one in chosen]
        journal = self.config.journal_path.parent / name / "journal.db"
        try:
            return self._measure(journal, _Nowhere(), lambda: tasks, name)
        finally:
            for folder in (journal.parent, self.config.effective_staging_path / name):
                shutil.rmtree(folder, ignore_errors=True)

    def _of_tasks(self, reason: str) -> tuple[ProbeReport, HostBudget, str]:
        job_id, client = self.job_id, self.client
        found = self._measure(self.config.journal_path, client, lambda: client.fetch_tasks(job_id, PROBE_IMAGES))
        if not self.taken:
            raise ConfigurationError(f"no task of job {job_id} is to be had now; {reason}")
        left = self.taken - self.posted
        said = f"{self.posted} posted" + (f", {left} left on record here for the next worker" if left else "")
        if found is None:
            raise self._useless(f"of {self.taken} tasks {said}")
        return *found, f"{len(found[0].images)} of {self.taken} tasks, {said}; {reason}"

    def _measure(
        self, path: Path, receiver: ResultReceiver, tasks: Callable[[], Sequence[Task]], owner: str = ""
    ) -> tuple[ProbeReport, HostBudget] | None:
        """Measure two of these tasks, with a journal at `path`; None where not one of them can be."""
        config, job_id = self.config, self.job_id
        with closing(Journal(path)) as journal:
            folder = config.effective_staging_path
            owner = owner or journal.staging_name
            staging = StagingArea(folder, self.images, config.image_max_pixels, config.staging_max_bytes, owner=owner)
            limits = PosterLimits(config.antenna_max_pending_posts, config.antenna_max_post_bytes)
            poster = Poster(journal, receiver, limits)
            try:
                outcomes = JobOutcomes(job_id, journal, staging, poster)
                # What fails stays on record: no tuning ends in an error of an image.
                outcomes.listen(None, lambda _image, error: self.errors.append(error))
                asked_at = lease_clock()
                incarnation = receiver.job(job_id).incarnation
                journal.note_served(job_id, incarnation, asked_at)  # what is fetched next can be proved to be of it
                sent_at = lease_clock()
                held = journal.record(job_id, tasks(), sent_at)
                self.taken = len(held)
                return self._probe(held, staging, outcomes)
            finally:
                poster.close(POST_TIMEOUT_S)
                self.posted = min(self.taken, poster.accepted[job_id])

    def _probe(
        self, tasks: Sequence[HeldTask], staging: StagingArea, outcomes: Outcomes
    ) -> tuple[ProbeReport, HostBudget] | None:
        """Probe while more are staged, and then no more."""
        queue, enough = StagedQueue(), threading.Event()

        def stage(held: HeldTask) -> None:
            try:
                if not enough.is_set():
                    queue.put(staging.stage(held.id, held.task, enough.is_set))
            except (AdcError, OSError) as error:
                if not enough.is_set():
                    self.errors.append(error)

        def stage_all() -> None:
            try:
                most = IntakeLimits.for_probe(ceilings(self.config), self.lease).downloads
                with ThreadPoolExecutor(most) as downloads:
                    list(downloads.map(stage, tasks))
            finally:
                queue.end()

        def host() -> HostBudget:
            used_bytes = anonymous_bytes((os.getpid(),))
            return measure_host(self.config, staging.disk, self.share, self.pipeline.device, used_bytes)

        with ThreadPoolExecutor(1) as threads:
            staged = threads.submit(stage_all)
            try:
                report = probe(
                    queue,
                    self.pipeline,
                    host,
                    outcomes,
                    SignsOfLife(),
                    FIRST_INFERENCE_LEASES * self.lease.ack_wait_s,
                    partial(next, patience(host, self.share)),
                    lambda: known_sizes(self.captures),
                )
            finally:
                enough.set()
        staged.result()
        return (report, host()) if report is not None else None

    def _useless(self, so: str) -> ConfigurationError:
        cause = min(self.errors, key=lambda error: isinstance(error, ImageError))
        do = "" if isinstance(cause, ImageError) else f"; {advice(cause)}"
        return ConfigurationError(f"no image of job {self.job_id} can be measured here: {cause}{do}; {so}")
