"""One job: probe two tasks, plan, build a fresh DataLoader, infer, keep. The worker's reason to exist."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.antenna.wire import Capture
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.host import budget
from adc_worker.host.budget import HostBudget
from adc_worker.host.memory import anonymous_bytes, stalled_percent
from adc_worker.host.share import MemoryShare
from adc_worker.ingest.disk_budget import DiskBudget
from adc_worker.ingest.loader import JobDataLoader, build_dataloader
from adc_worker.ingest.staging import StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster
from adc_worker.log import get_logger
from adc_worker.models.cache import free_bytes
from adc_worker.models.pipeline import Pipeline
from adc_worker.planning.ceilings import Ceilings
from adc_worker.planning.governor import Governor
from adc_worker.planning.measurements import ImageProbe
from adc_worker.planning.observation import Observation
from adc_worker.planning.plan import IngestPlan, descriptors
from adc_worker.planning.policy import DOWNLOADS_MAX, IngestPolicy
from adc_worker.runtime.evidence import Evidence
from adc_worker.runtime.faults import Affected, Faults, rule_for
from adc_worker.runtime.inference import InferenceStats, infer_and_keep, measured_image
from adc_worker.runtime.intake import Intake, IntakeLimits, TaskFetch
from adc_worker.runtime.outcomes import JobOutcomes
from adc_worker.runtime.probe import known_sizes, listed, probe
from adc_worker.runtime.signs_of_life import FIRST_INFERENCE_LEASES, INFERENCE_FACTOR, INFERENCE_LEASES, SignsOfLife
from adc_worker.runtime.slices import Turn
from adc_worker.settings import Settings
from adc_worker.status.reporter import Reporter
from adc_worker.status.snapshot import JobView, StageView

_log = get_logger(__name__)

_PAUSE_S = 1.0
DESCRIPTORS = 65_536  # more than any plan takes, and what most units set


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
    flushing: threading.Event
    life: SignsOfLife
    pids: tuple[int, ...]  # the parent and this process; decode processes are known to the loader
    share: MemoryShare
    reporter: Reporter
    faults: Faults = field(default_factory=Faults)
    evidence: Evidence = field(default_factory=Evidence)
    died: list[threading.ExceptHookArgs] = field(default_factory=list)  # threads that must live

    def is_stopping(self) -> bool:
        return self.stopping.is_set() or bool(self.died)

    def check_threads(self) -> None:
        """Raise what ended a thread; it would be missed only much later."""
        for died in self.died:
            if isinstance(died.exc_value, WorkerFault):
                raise died.exc_value
            name = died.thread.name if died.thread else "?"
            raise WorkerFault(f"{name} died: {died.exc_value!r}", ExitCode.BACKGROUND_TASK_DIED) from died.exc_value

    def host(self, pipeline: Pipeline, loader: JobDataLoader | None = None) -> HostBudget:
        """Measure the host, and this worker with the decoders and pixels of a loader."""
        pids, arena_bytes = self.pids, 0
        if loader is not None:
            pids, arena_bytes = (*pids, *loader.feeder.decode_pids), loader.arena.resident_bytes
        used_bytes = anonymous_bytes(pids) + arena_bytes
        return measure_host(self.settings, self.staging.disk, self.share, pipeline.device, used_bytes)


def measure_host(
    settings: Settings, disk: DiskBudget, share: MemoryShare, device: torch.device, used_bytes: int
) -> HostBudget:
    """Measure the host; to `used_bytes`, which this worker's processes hold, come images that are staged in memory."""
    return budget.measure(
        used_bytes + (disk.used_bytes if disk.in_memory else 0),
        share,
        settings.memory_limit_bytes,
        disk.limit_bytes,
        staging_in_memory=disk.in_memory,
        vram_free_bytes=free_bytes(device, None) if device.type == "cuda" else None,
    )


@contextmanager
def naming_gpu_faults() -> Iterator[None]:
    """Raise a WorkerFault that says what to do in place of what CUDA raises in the body."""
    try:
        yield
    except RuntimeError as error:
        rule = rule_for(error)
        if rule is not None and rule.affected is Affected.MACHINE:
            raise WorkerFault(f"{error}; {rule.advice}", ExitCode.GPU_FAULT) from error
        raise


@dataclass(slots=True)
class JobMemory:
    """What a job keeps between its turns: it neither probes nor plans again."""

    fetch: TaskFetch
    governor: Governor | None = None


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What came of one turn of a job.

    Attributes:
        tasks: how many were worked on.
        ended_empty: no more tasks for now, or all that are left wait for an image host at fault.
        switch_s: seconds before its first batch; None where there was none.
        due_in_s: seconds until a task that is left on record may be tried again; infinite where there is none.
    """

    tasks: int
    ended_empty: bool
    switch_s: float | None
    due_in_s: float


def ceilings(settings: Settings) -> Ceilings:
    """Return what the operator's variables forbid to exceed."""
    return Ceilings(
        soft_cap=settings.memory_soft_cap,
        mode=settings.ingest_mode,
        tasks_per_fetch=settings.antenna_api_batch_size,
        prefetch_factor=settings.antenna_api_dataloader_prefetch_factor,
        downloads=settings.antenna_api_dataloader_download_threads,
        decode_workers=settings.antenna_api_dataloader_num_workers,
        fixed_decode_workers=4 if settings.num_workers is None else max(1, settings.num_workers),
        pin_memory=settings.antenna_api_dataloader_pin_memory,
        images_per_call=settings.localization_batch_size,
    )


def _process_job(pipeline: Pipeline, job_id: int, context: WorkerContext, memory: JobMemory, turn: Turn) -> JobSummary:
    """Work on a job until Antenna has no more tasks of it for us, or its turn is over. The models are loaded."""
    outcomes = JobOutcomes(job_id, context.journal, context.staging, context.poster)
    intake = Intake(
        memory.fetch,
        context.journal,
        context.staging,
        outcomes,
        context.lease,
        IntakeLimits.for_probe(ceilings(context.settings), context.lease),
        turn,
        faults=context.faults,
        evidence=context.evidence,
        life=context.life,
    )
    run = _JobRun(job_id, pipeline, context, intake, outcomes, memory, turn)
    with ThreadPoolExecutor(1, thread_name_prefix="captures") as threads, closing(intake):
        if memory.governor is None:  # asked for before any task is
            run.captures = threads.submit(listed, context.client, job_id)
        intake.start()
        try:
            with naming_gpu_faults(), context.reporter.job(run.view):
                run.probe_and_feed()
            if outcomes.done:
                context.share.recover()
        finally:
            context.share.claim(context.host(pipeline).used_bytes, busy=False)
    context.check_threads()
    worked = intake.fetched - intake.parked - len(outcomes.struck_out)
    if worked:
        run.log_summary()
    return JobSummary(worked, intake.ended_empty, run.switch_s, intake.due_in_s)


@dataclass(slots=True)
class _JobRun:
    """One turn of a job, and what people may see of it meanwhile."""

    job_id: int
    pipeline: Pipeline
    context: WorkerContext
    intake: Intake
    outcomes: JobOutcomes
    memory: JobMemory
    turn: Turn
    started: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    captures: Future[list[Capture]] | None = None  # where the job is not planned for yet
    switch_s: float | None = None
    seen: ImageProbe | None = None
    decision: str = ""
    used_bytes: int = 0
    peak_bytes: int = 0
    limit_bytes: int = 0
    inference_s: float = 0.0
    readiness: float = 0.0
    batches: int = 0
    ready: int = 0  # of the batches, those that did not have to be waited for
    short_of_memory: bool = False  # an image waits for memory that others hold, and that has been said

    def view(self) -> JobView:
        """Tell how it goes; from any thread."""
        outcomes, governor, seen = self.outcomes, self.memory.governor, self.seen
        plan = governor.plan if governor is not None else None
        stages: tuple[StageView, ...] = ()
        if plan is not None and seen is not None:
            stages = (
                StageView(name="download", s_per_image=seen.download_s, parallel=plan.download_concurrency),
                StageView(name="decode", s_per_image=seen.decode_s, parallel=plan.decode_workers),
                StageView(name="inference", s_per_image=seen.inference_s, parallel=1),
            )
        return JobView(
            id=self.job_id,
            pipeline=self.pipeline.slug,
            started_at=self.started_at,
            tasks=self.intake.fetched,
            done=outcomes.done,
            failed=dict(outcomes.failed),
            left_to_lease=outcomes.given_up,
            detections=outcomes.detections,
            truncated=outcomes.truncated,
            damaged=outcomes.damaged,
            in_hand=self.intake.fetched - outcomes.settled,
            pending=self.intake.pending,
            readiness=self.readiness,
            inference_s=self.inference_s,
            memory_bytes=self.used_bytes,
            peak_bytes=self.peak_bytes,
            stages=stages,
            plan=plan.log_fields() if plan else {},
            why=dict(plan.why) if plan else {},
            decision=self.decision,
        )

    def probe_and_feed(self) -> None:
        """Measure two tasks, unless an earlier turn did, and follow the plan that comes of it."""
        host, governor = self.context.host(self.pipeline), self.memory.governor
        self.context.share.claim(host.used_bytes, busy=True)  # from here on the others make room
        self.limit_bytes, self.peak_bytes = host.limit_bytes, host.used_bytes
        begun = self.started
        if governor is None:
            governor = self.memory.governor = self._probe()
            begun = time.monotonic()  # a probe is work, and made once
        if governor is not None:
            self.intake.apply(IntakeLimits.of(governor.plan))
            self._follow(governor, begun)
        if not self.turn.is_stopping():
            self._end_struck_out()

    def _end_struck_out(self) -> None:
        """Make errors of images that ended the worker, once another image shows that machine and model are sound.

        This process shows it by other images of the job. Where none is left for that, a result on record of an earlier
        image of the job does, or the job would never end.
        """
        is_shown_before = self.intake.has_no_more and self.outcomes.job_has_succeeded()
        if self.intake.worker_is_proven or is_shown_before:
            self.outcomes.fail_struck_out()
        else:
            self.outcomes.give_up_struck_out(self.context.lease)

    def _probe(self) -> Governor | None:
        """Measure two tasks and plan; None where none could be measured."""
        report = probe(
            self.intake.staged,
            self.pipeline,
            lambda: self.context.host(self.pipeline),
            self.outcomes,
            self.context.life,
            FIRST_INFERENCE_LEASES * self.context.lease.ack_wait_s,
            self._wait_for_memory,
            lambda: known_sizes(self.captures.result()) if self.captures else [],
        )
        if report is None:
            return None
        host, lease = self.context.host(self.pipeline), self.context.lease
        governor = Governor(self.context.policy, report, host, lease)
        downloads = min(DOWNLOADS_MAX, ceilings(self.context.settings).downloads or DOWNLOADS_MAX)
        if host.descriptors < (wanted := descriptors(downloads, host.cores)):
            _log.warning(
                "few_descriptors",
                note=f"this process may open {host.descriptors} files; below {wanted} they keep downloads from growing:"
                f" set LimitNOFILE={DESCRIPTORS} in its systemd unit, or minfds={DESCRIPTORS} in supervisord.conf",
            )
        self._log_plan(governor.plan, inputs={"report": asdict(report), "host": asdict(host), "lease": asdict(lease)})
        return governor

    def _follow(self, governor: Governor, begun: float) -> None:
        """Build a loader for the governor's plan, and another whenever that takes another."""
        loaded = None
        while governor.plan is not loaded and not (loaded and self.turn.is_stopping()):
            loaded = governor.plan
            self.context.share.claim(loaded.peak_bytes, busy=True)
            staged, outcomes = self.intake.staged, self.outcomes
            made = build_dataloader(
                loaded, staged, outcomes.fail_staged, outcomes.begin, self._has_memory_for, outcomes.leave_staged
            )
            with closing(made) as loader:
                loaded = self._feed(loader, governor, begun)

    def _has_memory_for(self, loader: JobDataLoader, needed_bytes: int) -> bool:
        """Whether one image may take so many bytes now; when the turn ends, no image is waited for any more.

        What the loader's arena holds does not count: it is given back before an image runs alone.
        """
        host = self.context.host(self.pipeline, loader)
        if needed_bytes <= host.alone_bytes + loader.arena.resident_bytes:
            self.short_of_memory = False
            return True
        if not self.short_of_memory:
            self.short_of_memory = True
            _log.warning(
                "waiting_for_memory",
                job_id=self.job_id,
                needed_bytes=needed_bytes,
                available_bytes=host.alone_bytes,
                note=f"a large image waits for memory, and smaller ones go on: {host.who_holds_it()}",
            )
        self.intake.moved()  # not by us: other workers or programs are waited for
        if self.turn.fetches_no_more(0.0):
            loader.feeder.stop()
        return False

    def _feed(self, loader: JobDataLoader, governor: Governor, begun: float) -> IngestPlan:
        """Infer what the loader brings; return its last plan, which is not the governor's when that takes another."""
        last_at, context = time.monotonic(), self.context
        for batch in loader:
            if context.flushing.is_set():
                break
            if self.switch_s is None:
                self.switch_s = time.monotonic() - begun
            measured_s = governor.inference_s * len(batch.staged)
            limit_s = max(INFERENCE_LEASES * context.lease.ack_wait_s, INFERENCE_FACTOR * measured_s)
            with batch, context.life.inference(limit_s):
                stats = infer_and_keep(self.pipeline, batch.images, batch.staged, batch.reports, self.outcomes)
                image, images = measured_image(batch.staged, batch.reports, stats), len(batch.staged)
            now = time.monotonic()
            observed = Observation(
                image=image,
                images=images,
                batch_s=now - last_at,
                ready=loader.feeder.last_ready,
                host=context.host(self.pipeline, loader),
                arena_bytes=loader.arena.resident_bytes,
                stalled_percent=stalled_percent(),
                in_force=loader.plan is governor.plan,
            )
            last_at = now
            context.life.status(f"job {self.job_id}: {self.outcomes.done} images done")
            if self.outcomes.done:
                self.outcomes.fail_struck_out()
            self.intake.pace(images / max(stats.inference_s, 1e-6))
            self._govern(loader, governor, observed, stats)
            self.context.check_threads()
            self._wait_for_room()
            if self.turn.is_stopping():
                self.intake.stop()
                loader.feeder.stop()
            if self.turn.breaks_off():  # what is decoded stays on disk, too: no later batch is waited for
                break
        return loader.plan

    def _govern(self, loader: JobDataLoader, governor: Governor, observed: Observation, stats: InferenceStats) -> None:
        """Do what the governor decides, and write all that it was decided from, so that it can be decided again."""
        decision = governor.observe(observed)
        loader.feeder.pause(decision.paused)
        if decision.plan is not loader.plan and observed.in_force:
            self._log_plan(decision.plan)
            if loader.apply(decision.plan):
                self.context.share.claim(decision.plan.peak_bytes, busy=True)
            else:
                loader.feeder.stop()
        self.seen, self.used_bytes, self.readiness = observed.image, observed.host.used_bytes, governor.readiness
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self.inference_s += stats.inference_s
        self.batches += 1
        self.ready += observed.ready
        self.decision = f"{decision.action}: {decision.reason}"
        _log.info(
            "batch",
            job_id=self.job_id,
            pipeline=self.pipeline.slug,
            images=observed.images,
            inference_s=round(stats.inference_s, 4),
            device_s=round(stats.device_s, 4),
            keep_s=round(stats.keep_s, 4),
            detections=stats.detections,
            readiness=round(governor.readiness, 3),
            memory_bytes=self.used_bytes,
            predicted_bytes=loader.plan.peak_bytes,
            plan=loader.plan.log_fields(),
            budget_bytes=decision.budget_bytes,
            pressure=round(decision.pressure, 3),
            action=decision.action,
            reason=decision.reason,
            paused=decision.paused,
            observed=asdict(observed),
        )

    def _log_plan(self, plan: IngestPlan, **more: Any) -> None:
        self.intake.apply(IntakeLimits.of(plan))
        _log.info(
            "plan", job_id=self.job_id, pipeline=self.pipeline.slug, **plan.log_fields(), why=dict(plan.why), **more
        )

    def _wait_for_room(self) -> None:
        """Pause while too many results wait for Antenna, or the next ones could not be kept."""
        while (self.context.journal.fault or self.context.journal.is_full()) and not self.turn.is_stopping():
            self._pause()

    def _wait_for_memory(self) -> bool:
        """Pause while others hold the memory; False when it is another job's turn, or time to stop."""
        self._pause()
        return not self.turn.fetches_no_more(0.0)

    def _pause(self) -> None:
        self.intake.moved()  # not by us: Antenna, the disk or another worker is waited for
        self.context.check_threads()
        self.context.stopping.wait(_PAUSE_S)

    def log_summary(self) -> None:
        outcomes, governor = self.outcomes, self.memory.governor
        plan, wall_s = governor.plan if governor is not None else None, time.monotonic() - self.started
        _log.info(
            "job_summary",
            job_id=self.job_id,
            pipeline=self.pipeline.slug,
            tasks=self.intake.fetched,
            done=outcomes.done,
            failed=dict(outcomes.failed),
            left_to_lease=outcomes.given_up,
            truncated=outcomes.truncated,
            damaged=outcomes.damaged,
            detections=outcomes.detections,
            wall_s=round(wall_s, 3),
            images_per_s=round(outcomes.done / wall_s, 3),
            inference_share=round(self.inference_s / wall_s, 3),
            readiness=round(self.ready / max(1, self.batches), 3),
            peak_memory_bytes=self.peak_bytes,
            memory_limit_bytes=self.limit_bytes,
            predicted_peak_bytes=plan.peak_bytes if plan else None,
            binds=plan.binds if plan else None,
            pid=os.getpid(),
        )
