"""One job: probe two tasks, plan, build a fresh DataLoader, infer, keep. The worker's reason to exist."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.errors import AntennaError, ExitCode, WorkerFault
from adc_worker.host import budget
from adc_worker.host.budget import HostBudget
from adc_worker.host.memory import anonymous_bytes
from adc_worker.ingest.loader import JobDataLoader, build_dataloader
from adc_worker.ingest.staging import StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster
from adc_worker.log import get_logger
from adc_worker.models.pipeline import Pipeline
from adc_worker.runtime.inference import infer_and_keep, measured_image
from adc_worker.runtime.intake import Intake, IntakeLimits
from adc_worker.runtime.outcomes import JobOutcomes
from adc_worker.runtime.probe import probe
from adc_worker.runtime.snapshot import JobView, Reporter, StageView
from adc_worker.settings import Settings
from adc_worker.tuning.drift import DriftWatch
from adc_worker.tuning.plan import IngestPlan
from adc_worker.tuning.policy import Ceilings, IngestPolicy
from adc_worker.tuning.probe_report import ImageProbe, ProbeReport

_log = get_logger(__name__)

# More results waiting than this, and the GPU pauses: the journal must not grow without bound while Antenna is away.
UNPOSTED_RESULTS_MAX = 5000
_BACKPRESSURE_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What lives longer than a job."""

    settings: Settings
    client: AntennaClient
    journal: Journal
    poster: Poster
    staging: StagingArea
    policy: IngestPolicy
    lease: LeaseTerms
    stopping: threading.Event
    pids: tuple[int, ...]  # the parent and this process; decode processes are known to the loader
    reporter: Reporter

    def host(self, pipeline: Pipeline) -> HostBudget:
        return budget.measure(
            self.pids,
            self.settings.memory_limit_bytes,
            self.staging.disk.limit_bytes,
            staging_in_memory=self.staging.disk.in_memory,
            gpu=pipeline.device.type == "cuda",
        )


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What came of one pass over a job."""

    tasks: int
    error: AntennaError | None


def ceilings(settings: Settings) -> Ceilings:
    """Return what the operator's variables forbid to exceed."""
    return Ceilings(
        soft_cap=settings.memory_soft_cap,
        mode=settings.ingest_mode,
        tasks_per_fetch=settings.antenna_api_batch_size,
        prefetch_factor=settings.antenna_api_dataloader_prefetch_factor,
        downloads=settings.antenna_api_dataloader_download_threads,
        decode_workers=settings.antenna_api_dataloader_num_workers,
        fixed_decode_workers=settings.num_workers or 4,
        pin_memory=settings.antenna_api_dataloader_pin_memory,
        images_per_call=settings.localization_batch_size,
    )


def _process_job(pipeline: Pipeline, job_id: int, context: WorkerContext) -> JobSummary:
    """Work on a job until Antenna has no more tasks of it for us, or the worker stops. The models are loaded."""
    started = time.monotonic()
    outcomes = JobOutcomes(job_id, context.journal, context.staging, context.poster)
    intake = Intake(
        job_id,
        context.client,
        context.journal,
        context.staging,
        outcomes,
        context.lease,
        IntakeLimits.for_probe(context.settings.antenna_api_batch_size),
        context.stopping,
    )
    run = _JobRun(job_id, pipeline, context, intake, outcomes)
    context.poster.listen(intake.wake)
    intake.start()
    try:
        with context.reporter.job(run.view):
            run.probe_and_feed()
    finally:
        context.poster.listen(None)
        intake.close()
    if intake.failure is not None:
        raise WorkerFault(f"intake died: {intake.failure!r}", ExitCode.BACKGROUND_TASK_DIED) from intake.failure
    if intake.fetched:
        run.log_summary(time.monotonic() - started)
    return JobSummary(intake.fetched, intake.error)


class _JobRun:
    """The state of one pass over a job."""

    def __init__(
        self, job_id: int, pipeline: Pipeline, context: WorkerContext, intake: Intake, outcomes: JobOutcomes
    ) -> None:
        self._log = _log.bind(job_id=job_id, pipeline=pipeline.slug)
        self._job_id = job_id
        self._pipeline = pipeline
        self._context = context
        self._intake = intake
        self._outcomes = outcomes
        self._plan: IngestPlan | None = None
        self._used_bytes = self._peak_bytes = 0
        self._limit_bytes = 0
        self._inference_s = 0.0
        self._readiness = 0.0
        self._seen: ImageProbe | None = None
        self._started_at = time.time()

    def view(self) -> JobView:
        """Tell how it goes; from any thread."""
        outcomes, plan, seen = self._outcomes, self._plan, self._seen
        stages: tuple[StageView, ...] = ()
        if plan is not None and seen is not None:
            stages = (
                StageView(name="download", s_per_image=seen.download_s, parallel=plan.download_concurrency),
                StageView(name="decode", s_per_image=seen.decode_s, parallel=plan.decode_workers),
                StageView(name="inference", s_per_image=seen.inference_s, parallel=1),
            )
        return JobView(
            id=self._job_id,
            pipeline=self._pipeline.slug,
            started_at=self._started_at,
            tasks=self._intake.fetched,
            done=outcomes.done,
            failed=dict(outcomes.failed),
            left_to_lease=outcomes.given_up,
            detections=outcomes.detections,
            in_hand=self._intake.fetched - outcomes.settled,
            pending=self._intake.pending,
            readiness=self._readiness,
            inference_s=self._inference_s,
            memory_bytes=self._used_bytes,
            peak_bytes=self._peak_bytes,
            stages=stages,
            plan=plan.log_fields() if plan else {},
            why=dict(plan.why) if plan else {},
        )

    def probe_and_feed(self) -> None:
        host = self._context.host(self._pipeline)
        self._limit_bytes, self._peak_bytes = host.limit_bytes, host.used_bytes
        report = probe(self._intake.staged, self._pipeline, host, self._outcomes)
        if report is None:
            return
        drift = DriftWatch(report)
        plan: IngestPlan | None = self._made_plan(report, host)
        while plan is not None:
            with build_dataloader(plan, self._intake.staged, self._outcomes.fail_staged) as loader:
                plan = self._feed(loader, drift, host)
                self._readiness = loader.readiness

    def _made_plan(self, report: ProbeReport, host: HostBudget) -> IngestPlan:
        self._plan = plan = self._context.policy.plan(report, host, self._context.lease)
        self._intake.apply(IntakeLimits.of(plan))
        self._log.info("plan", **plan.log_fields(), why=dict(plan.why), ratio=round(report.download_inference_ratio, 3))
        return plan

    def _feed(self, loader: JobDataLoader, drift: DriftWatch, host: HostBudget) -> IngestPlan | None:
        """Infer what the loader brings; return a plan when it takes another loader to follow it."""
        next_plan: IngestPlan | None = None
        for batch in loader:
            with batch:
                stats = infer_and_keep(self._pipeline, batch.images, batch.staged, batch.reports, self._outcomes)
                images = len(batch.staged)
            self._seen = seen = measured_image(batch.staged, batch.reports, stats)
            report = drift.observe(seen)
            if report is not None and next_plan is None:
                changed = self._made_plan(report, host)
                if not loader.apply(changed):
                    next_plan = changed
                    loader.stop()
            self._inference_s += stats.inference_s
            self._used_bytes = memory_bytes = self._memory_bytes(loader)
            self._peak_bytes = max(self._peak_bytes, memory_bytes)
            self._readiness = loader.readiness
            self._log.info(
                "batch",
                images=images,
                inference_s=round(stats.inference_s, 4),
                keep_s=round(stats.keep_s, 4),
                detections=stats.detections,
                readiness=round(loader.readiness, 3),
                memory_bytes=memory_bytes,
                predicted_bytes=loader.plan.peak_bytes,
            )
            self._check_background()
            self._wait_for_room()
            if self._context.stopping.is_set():
                self._intake.stop()
                loader.stop()
        return None if self._context.stopping.is_set() else next_plan

    def _memory_bytes(self, loader: JobDataLoader) -> int:
        disk = self._context.staging.disk
        staged = disk.used_bytes if disk.in_memory else 0
        return anonymous_bytes((*self._context.pids, *loader.decode_pids)) + loader.resident_bytes + staged

    def _check_background(self) -> None:
        for name, failure in (("intake", self._intake.failure), ("poster", self._context.poster.failure)):
            if failure is not None:
                raise WorkerFault(f"{name} died: {failure!r}", ExitCode.BACKGROUND_TASK_DIED) from failure

    def _wait_for_room(self) -> None:
        """Pause while too many results wait for Antenna."""
        while (
            self._context.journal.unposted_count() > UNPOSTED_RESULTS_MAX
            and not self._context.stopping.wait(_BACKPRESSURE_POLL_S)
        ):  # fmt: skip
            self._check_background()

    def log_summary(self, wall_s: float) -> None:
        outcomes, plan = self._outcomes, self._plan
        self._log.info(
            "job_summary",
            tasks=self._intake.fetched,
            done=outcomes.done,
            failed=dict(outcomes.failed),
            left_to_lease=outcomes.given_up,
            truncated=outcomes.truncated,
            detections=outcomes.detections,
            wall_s=round(wall_s, 3),
            images_per_s=round(outcomes.done / wall_s, 3),
            inference_share=round(self._inference_s / wall_s, 3),
            readiness=round(self._readiness, 3),
            peak_memory_bytes=self._peak_bytes,
            memory_limit_bytes=self._limit_bytes,
            predicted_peak_bytes=plan.peak_bytes if plan else None,
            binds=plan.binds if plan else None,
            pid=os.getpid(),
        )
