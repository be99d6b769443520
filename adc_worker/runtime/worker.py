"""The child: polls Antenna, loads pipelines, runs `_process_job`. One per GPU, commanded by the parent over stdin."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

import torch

from adc_worker import log, settings
from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.errors import (
    AntennaError,
    AntennaRefused,
    AntennaRejected,
    AntennaUnreachable,
    ConfigurationError,
    ExitCode,
    WorkerFault,
)
from adc_worker.host.memory import anonymous_bytes, memory_limit
from adc_worker.ingest.download import ImageClient
from adc_worker.ingest.staging import StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.models import registry
from adc_worker.models.pipeline import CallSizes, Pipeline
from adc_worker.runtime.job import WorkerContext, _process_job, ceilings
from adc_worker.runtime.options import WorkerOptions
from adc_worker.runtime.snapshot import JobView, Reporter, Snapshot, socket_path
from adc_worker.settings import Settings
from adc_worker.tuning.policy import IngestPolicy

_log = log.get_logger(__name__)

LIFELINE_EXIT_S = 2.0  # with the parent gone nobody would reap us: leave within this time, the journal has everything
_COMMAND_BYTES = 4096
POLL_BACKOFF_MAX_S = 60.0  # also the longest silence after which Antenna calls a service offline (contract)


@dataclass(slots=True)
class Stop:
    """What the parent has asked for."""

    draining: threading.Event = field(default_factory=threading.Event)
    flushing: threading.Event = field(default_factory=threading.Event)

    def listen(self) -> None:
        """Read commands from stdin; its end means that the parent is gone."""
        # Not sys.stdin: a thread that waits in its buffer aborts the interpreter when the process ends.
        while commands := os.read(0, _COMMAND_BYTES):
            self.draining.set()
            if b"flush" in commands:
                self.flushing.set()
        self.draining.set()
        self.flushing.set()
        _log.warning("parent_gone", exit_in_s=LIFELINE_EXIT_S)
        time.sleep(LIFELINE_EXIT_S)
        os._exit(ExitCode.FAILED)


class WorkerLoop:
    """Polls for jobs and processes them one after the other."""

    def __init__(self, options: WorkerOptions, config: Settings, context: WorkerContext) -> None:
        self._options = options
        self._config = config
        self._context = context
        specs = registry.available(config.extra_pipelines, config.simulated_seconds_per_image)
        self._specs = {spec.slug: spec for spec in registry.choose(specs, options.pipelines)}
        self._loaded: dict[str, Pipeline] = {}
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._contacted = False

    def run(self) -> None:
        """Return when draining, or when idle and that was asked for."""
        _log.info(
            "worker_ready", device=str(self._device), pipelines=sorted(self._specs), threads=torch.get_num_threads()
        )
        failures = 0
        while not self._context.stopping.is_set():
            try:
                worked = self._pass()
                failures = 0
            except AntennaError as error:
                self._first_contact_failed(error)
                failures += 1
                worked = False
                _log.warning("poll_failed", error=str(error), attempt=failures)
            if worked:
                continue
            if self._options.exit_when_idle and failures == 0 and self._context.poster.wait_idle(0):
                _log.info("idle", reason="no job has tasks for this worker, and every result was accepted")
                return
            self._sleep(failures)

    def _pass(self) -> bool:
        """Poll once and work on what is listed; True when any task was taken."""
        jobs = self._context.client.jobs(list(self._specs), self._options.project)
        random.shuffle(jobs)  # a fleet that polls together must not queue at the same job
        tasks, error = 0, None
        for job in jobs:
            if job.pipeline_slug in self._specs and not self._context.stopping.is_set():
                summary = _process_job(self._pipeline(job.pipeline_slug), job.id, self._context)
                gc.collect()  # a job's arena must not wait for the collector's mood before the next one is built
                tasks += summary.tasks
                error = error or summary.error
        if error is not None and not tasks:
            raise error
        self._contacted = True
        return tasks > 0

    def _pipeline(self, slug: str) -> Pipeline:
        if slug not in self._loaded:
            started = time.monotonic()
            sizes = CallSizes(self._config.localization_batch_size, self._config.classification_batch_size)
            self._loaded[slug] = registry.load(self._specs[slug], self._device, sizes)
            gc.collect()
            gc.freeze()  # models and libraries stay: without this a collection after each job takes 0.1 s
            _log.info("pipeline_loaded", pipeline=slug, load_s=round(time.monotonic() - started, 3))
        return self._loaded[slug]

    def _first_contact_failed(self, error: AntennaError) -> None:
        """At start an unreachable or refusing Antenna is a setting to correct; later it is an outage to wait out."""
        if self._contacted:
            return
        if isinstance(error, AntennaRefused):
            hint = " (fetching tasks takes a superuser's token)" if "/tasks/" in str(error) else ""
            raise ConfigurationError(f"AMI_ANTENNA_API_AUTH_TOKEN: {error}{hint}") from error
        if isinstance(error, AntennaUnreachable | AntennaRejected):
            raise ConfigurationError(
                f"AMI_ANTENNA_API_BASE_URL {self._config.antenna_api_base_url}: {error}"
            ) from error

    def _sleep(self, failures: int) -> None:
        pause_s = min(self._config.antenna_idle_sleep_seconds * 2**failures, POLL_BACKOFF_MAX_S)
        self._context.stopping.wait(pause_s * random.uniform(0.8, 1.2))  # noqa: S311 (jitter, no secret)


def run(options: WorkerOptions, config: Settings, stop: Stop, policy: IngestPolicy | None = None) -> None:
    """Build what outlives a job, work until stopped, and flush; benchmarks bring a policy of their own."""
    for folder in (config.user_data_path, config.effective_staging_path):
        _make_folder(folder)
    journal = Journal(config.journal_path)
    with (
        AntennaClient(config.antenna_api_base_url, config.token) as client,
        ImageClient(config.image_max_bytes) as images,
    ):
        staging = StagingArea(config.effective_staging_path, images, config.image_max_pixels, config.staging_max_bytes)
        expired, swept = journal.drop_expired(), staging.sweep(journal.known_ids)
        _log.info(
            "journal_open",
            path=str(config.journal_path),
            slot=journal.slot,
            expired_tasks=expired,
            swept_files=swept,
        )
        limit = memory_limit()
        limit_bytes = min(limit.limit_bytes, config.memory_limit_bytes or limit.limit_bytes)
        pids = (os.getppid(), os.getpid())

        def measure(view: JobView | None) -> Snapshot:
            return Snapshot(
                at=time.time(),
                slot=journal.slot,
                pid=os.getpid(),
                device="cuda" if torch.cuda.is_available() else "cpu",
                stopping=stop.draining.is_set(),
                memory_bytes=max(anonymous_bytes(pids), view.memory_bytes if view else 0),
                budget_bytes=int(config.memory_soft_cap * limit_bytes),
                limit_bytes=limit_bytes,
                limit_source=limit.source if limit_bytes == limit.limit_bytes else "AMI_MEMORY_LIMIT_BYTES",
                unposted=journal.unposted_count(),
                staged_bytes=staging.disk.used_bytes,
            )

        reporter = Reporter(socket_path(config.user_data_path, os.getppid()), measure)
        poster = Poster(journal, client, PosterLimits(config.antenna_max_pending_posts, config.antenna_max_post_bytes))
        context = WorkerContext(
            settings=config,
            client=client,
            journal=journal,
            poster=poster,
            staging=staging,
            policy=policy or IngestPolicy(ceilings(config)),
            lease=LeaseTerms(config.antenna_ack_wait_seconds, config.antenna_max_deliver),
            stopping=stop.draining,
            pids=pids,
            reporter=reporter,
        )
        try:
            WorkerLoop(options, config, context).run()
        finally:
            poster.close(0.0 if stop.flushing.is_set() else config.shutdown_grace_seconds / 2)
            reporter.close()
            journal.close()


def _make_folder(folder: os.PathLike[str]) -> None:
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)  # noqa: PTH103 (mode for the leaf, parents by umask)
    except OSError as error:
        raise ConfigurationError(f"AMI_USER_DATA_PATH: cannot create {folder}: {error.strerror}") from error


def main() -> int:
    """Run as a child; the exit code tells the parent whether a restart can help."""
    # Terminals and supervisors signal whole groups; only the parent decides what a signal means.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    options = WorkerOptions.from_json(sys.argv[1])
    config = settings.load(options.env_path)
    log.configure(options.log_format, config.log_level)
    stop = Stop()
    threading.Thread(target=stop.listen, name="commands", daemon=True).start()
    try:
        run(options, config, stop)
    except ConfigurationError as error:
        _log.error("configuration", error=str(error))
        return ExitCode.CONFIGURATION
    except WorkerFault as error:
        _log.exception("worker_fault", error=str(error))
        return error.exit_code
    except Exception as error:  # noqa: BLE001 (logged with its traceback; the parent restarts us)
        _log.exception("failed", error=str(error))
        return ExitCode.FAILED
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
