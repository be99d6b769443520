"""The child: polls Antenna, loads pipelines, runs `_process_job`. One per GPU, commanded by the parent over stdin."""

from __future__ import annotations

import errno
import faulthandler
import gc
import json
import os
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from urllib.parse import urlsplit

import torch

from adc_worker import __version__, log, settings
from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms, parse_reply_subject
from adc_worker.antenna.nats import LeaseKeeper
from adc_worker.errors import (
    AntennaError,
    AntennaRefused,
    AntennaRejected,
    AntennaUnreachable,
    ConfigurationError,
    ExitCode,
    ModelsAway,
    NotAntenna,
    WorkerFault,
    os_error_may_pass,
)
from adc_worker.host.memory import anonymous_bytes, memory_limit, oom_kills
from adc_worker.host.share import MemoryShare
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.download import ImageClient
from adc_worker.ingest.staging import StagingArea
from adc_worker.journal.condition import is_locked, may_pass
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.models import registry
from adc_worker.models.pipeline import CallSizes, Pipeline
from adc_worker.models.registry import PipelineSpec
from adc_worker.planning.policy import IngestPolicy
from adc_worker.runtime.faults import Faults, advice
from adc_worker.runtime.intake import TaskFetch
from adc_worker.runtime.job import JobMemory, WorkerContext, _process_job, ceilings
from adc_worker.runtime.known_antenna import KnownAntenna
from adc_worker.runtime.signs_of_life import TASKS_LEASES, SignsOfLife
from adc_worker.runtime.slices import JobBoard, JobPoller, Turn
from adc_worker.settings import Settings, WorkerOptions
from adc_worker.status.paths import socket_path
from adc_worker.status.reporter import Reporter
from adc_worker.status.snapshot import JobView, Snapshot

_log = log.get_logger(__name__)

_COMMAND_BYTES = 4096
IDLE_CHECK_S = 0.5
START_RETRY_FIRST_S, START_RETRY_MAX_S = 0.5, 20.0

T = TypeVar("T")


@dataclass(slots=True)
class Stop:
    """What the parent has asked for."""

    draining: threading.Event = field(default_factory=threading.Event)
    flushing: threading.Event = field(default_factory=threading.Event)

    def listen(self) -> None:
        """Read commands from stdin; its end means that the parent is gone."""
        # Not sys.stdin: a thread that waits in its buffer aborts the interpreter when the process ends.
        while commands := os.read(0, _COMMAND_BYTES):
            if b"abort" in commands:
                faulthandler.dump_traceback()
                faulthandler.disable()  # SIGABRT would write them again
                os.abort()
            self.draining.set()
            if b"flush" in commands:
                self.flushing.set()
        # The parent is gone. Usually the kernel has ended us by now; the journal has everything.
        os._exit(ExitCode.FAILED)


class StoppedWhileWaiting(Exception):
    """The parent asked to stop while the machine was not ready for a start."""


def wait_for_machine(part: str, action: Callable[[], T], stopping: threading.Event, faults: Faults) -> T:
    """Return what an action of the start returns; where this machine does not allow it now, try again and again.

    Raises:
        WorkerFault: it did not for five minutes, or what is wrong does not pass by itself.
        StoppedWhileWaiting: that was asked for meanwhile.
    """
    pause_s = START_RETRY_FIRST_S
    locked = False
    while True:
        try:
            result = action()
        except (OSError, sqlite3.Error, WorkerFault) as error:
            if not may_pass(error):
                raise
            was_locked = locked
            locked = is_locked(error)
            if locked and not was_locked:  # no fault of the machine, unless it lasts
                _log.warning("start_waits", part=part, error=str(error), do=advice(error))
            faults.watch(part, error, is_said=locked)
        else:
            faults.watch(part, None, is_said=locked)
            return result
        if stopping.wait(pause_s):
            raise StoppedWhileWaiting(part)
        pause_s = min(2 * pause_s, START_RETRY_MAX_S)


class WorkerLoop:
    """Gives jobs their turns; a thread of its own polls Antenna meanwhile, which is also the heartbeat."""

    def __init__(self, options: WorkerOptions, context: WorkerContext, specs: Sequence[PipelineSpec]) -> None:
        self._options = options
        self._context = context
        config = context.settings
        self._specs = {spec.slug: spec for spec in specs}
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Whether a fetch was ever answered here: the token is right, or was. A poll proves nothing about that.
        self._fetched = context.journal.was_used()
        self._known = KnownAntenna(config.user_data_path, config.antenna_api_base_url)
        self._refused_fetches: set[int] = set()  # jobs of which Antenna refused to hand out tasks
        self._models_away: dict[str, ModelsAway] = {}  # by pipeline
        self._board = JobBoard(config.antenna_job_slice_seconds, config.antenna_idle_sleep_seconds)
        self._memories: dict[int, JobMemory] = {}
        self._poller = JobPoller(self._board, context.client, context.journal, list(self._specs), options.project)
        self._jobs_done = 0
        url = config.antenna_nats_url
        self._keeper = self._keep_leases(url.get_secret_value()) if url else None
        self._sizes = CallSizes(config.localization_batch_size, config.classification_batch_size)

    def run(self) -> ExitCode:
        """Return OK when draining, or when idle and that was asked for; RECYCLE when the process had its day."""
        _log.info(
            "worker_ready", device=str(self._device), pipelines=sorted(self._specs), threads=torch.get_num_threads()
        )
        self._context.life.ready()
        self._poller.start()
        try:
            while not self._context.stopping.is_set():
                self._context.check_threads()
                self._heed_polls()
                self._discard_lost()
                if self._had_its_day():
                    _log.info("recycled", jobs=self._jobs_done, anonymous_bytes=anonymous_bytes([os.getpid()]))
                    return ExitCode.RECYCLE
                turn = self._board.next_turn(self._context.is_stopping)
                if turn is not None:
                    self._take_turn(turn)
                elif self._is_idle():
                    return self._idle_exit()
                else:
                    self._poller.wait_for_news(IDLE_CHECK_S)
        finally:
            self._poller.close()
        self._hand_back()
        return ExitCode.OK

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()

    def _unsaved(self) -> list[str]:
        """Return the leases of results that Antenna accepted and has not saved."""
        subjects: list[str] = []
        for memory in tuple(self._memories.values()):
            try:
                subjects += memory.fetch.unsaved()
            except AntennaError as error:
                _log.warning("saves_unknown", error=str(error), effect="leases of accepted results are not extended")
        return subjects

    def _take_turn(self, turn: Turn) -> None:
        job_id, context = turn.entry.id, self._context
        memory = self._memories.setdefault(
            job_id, JobMemory(TaskFetch(job_id, context.client, context.journal, context.poster, context.lease))
        )
        with self._poller.busy():
            pipeline = self._pipeline(turn.entry.pipeline_slug)
            if pipeline is None:  # no task was spent on it; the job waits, like one without tasks
                self._board.end_turn(turn, 0, ended_empty=True)
                return
            summary = _process_job(pipeline, job_id, context, memory, turn)
        del pipeline  # the cache alone decides how long its models live
        gc.collect()  # a job's arena must not wait for the collector's mood before the next one is built
        error = memory.fetch.error
        self._heed_fetch(job_id, error)
        self._jobs_done += summary.tasks > 0 and (summary.ended_empty or turn.entry.lost)
        answered = error is None or isinstance(error, AntennaRefused)  # a job that is refused is not waited for
        self._board.end_turn(
            turn,
            summary.tasks,
            ended_empty=summary.ended_empty,
            answered=answered,
            switch_s=summary.switch_s,
            due_in_s=summary.due_in_s,
        )

    def _is_idle(self) -> bool:
        """Whether to end: a peer's tasks may come to us until their leases are over.

        Jobs that Antenna refuses to show or to take results of are not waited for, nor are results that are held back
        because they cannot be posted: what is kept of these stays on record for a later start.
        """
        poster = self._context.poster
        left = self._jobs_left()
        return (
            self._options.exit_when_idle
            and self._poller.is_fresh
            and self._board.idle_s() > self._context.lease.ack_wait_s
            and poster.is_done(left, tried_until=time.monotonic())
            and poster.jobs_ended
            # Some may wait for an image host.
            and self._context.journal.job_ids() - left <= self._poller.jobs_of_other_pipelines
        )

    def _jobs_left(self) -> frozenset[int]:
        poster = self._context.poster
        return self._poller.refused_jobs | poster.refused_jobs() | poster.held_back_jobs()

    def _idle_exit(self) -> ExitCode:
        """Say why there is nothing to do, and return the exit code."""
        left = self._jobs_left() & self._context.journal.job_ids()
        if left:
            _log.warning(
                "idle_with_results_left",
                jobs=sorted(left),
                reason="Antenna refuses these jobs, or their results cannot be posted: what is kept for them is posted"
                " by a later start, once it may be",
            )
        if self._models_away:
            errors = {slug: str(error) for slug, error in self._models_away.items()}
            _log.error(
                "idle_without_models",
                errors=errors,
                hint="jobs are left whose models did not come in the time of a lease: put that right, and start again",
            )
            return ExitCode.MACHINE_FAULT
        _log.info("idle", reason="no job has tasks for this worker, and every result was accepted")
        return ExitCode.OK

    def _keep_leases(self, nats_url: str) -> LeaseKeeper:
        journal = self._context.journal

        def held_count() -> int:
            return sum(journal.held_count(job_id) for job_id in journal.job_ids())

        return LeaseKeeper(nats_url, self._context.lease, journal.subjects, self._unsaved, held_count)

    def _discard_lost(self) -> None:
        """Remove what is staged of jobs that were cancelled or are over; the journal has forgotten it."""
        for job_id, task_ids in self._poller.take_lost():
            self._memories.pop(job_id, None)
            for task_id in task_ids:
                self._context.staging.discard(task_id)

    def _hand_back(self) -> None:
        """On drain, give tasks that were not started back, unless this was their last delivery: those stay ours."""
        journal, keeper = self._context.journal, self._keeper
        if keeper is None:
            return
        held = [one for job_id in journal.job_ids() for one in journal.unfinished(job_id)]
        back = [
            one
            for one in held
            if parse_reply_subject(one.task.reply_subject)
            and not self._context.lease.is_last(one.task.reply_subject)
            and journal.is_live(one)  # or a stranger's task would be given back
        ]
        if back and keeper.hand_back([one.task.reply_subject for one in back]):
            journal.forget([one.id for one in back])
            for one in back:
                self._context.staging.discard(one.id)
            _log.info("tasks_handed_back", tasks=len(back), kept=len(held) - len(back))

    def _had_its_day(self) -> bool:
        """Whether AMI_WORKER_MAX_JOBS or AMI_WORKER_MAX_RSS_MB ends this process between two jobs."""
        config = self._context.settings
        most_jobs, most_mb = config.worker_max_jobs, config.worker_max_rss_mb
        if not self._jobs_done:  # what it needs to start with is no reason to start again
            return False
        too_many = most_jobs is not None and self._jobs_done >= most_jobs
        return too_many or (most_mb is not None and anonymous_bytes([os.getpid()]) >= most_mb * 1_000_000)

    def _pipeline(self, slug: str) -> Pipeline | None:
        """Return a pipeline with its models loaded; None, said in the log, when that fails for now.

        Raises:
            WorkerFault: a pipeline that the operator named can never be loaded as it is.
        """
        try:
            pipeline = registry.load(self._specs[slug], self._device, self._sizes)
        except WorkerFault as error:
            if self._context.stopping.is_set():
                return None  # a fetch was broken off
            if isinstance(error, ModelsAway):
                self._models_away[slug] = error
            elif slug in self._options.pipelines:
                raise
            _log.error("pipeline_unavailable", pipeline=slug, error=str(error), hint="its jobs wait; it is tried again")
            return None
        self._models_away.pop(slug, None)
        return pipeline

    def _heed_polls(self) -> None:
        """Note that Antenna answered; where it never did, end if that is a setting to correct.

        Raises:
            ConfigurationError: at the very first start here, Antenna refuses the token, or no Antenna can be where
                AMI_ANTENNA_API_BASE_URL says. What may pass, as maintenance, and everything at a later start, is
                waited for: the poller says what it is, and tries again.
        """
        if self._poller.has_answered:
            self._known.note()
        error = self._poller.failure
        if error is None or self._fetched or self._known.is_known():
            return
        if isinstance(error, AntennaRefused):
            raise ConfigurationError(f"AMI_ANTENNA_API_AUTH_TOKEN: {error}") from error
        if isinstance(error, NotAntenna) and error.moved_to:
            raise ConfigurationError(f"{self._url_setting()}: it moved to {error.moved_to}: {error}") from error
        nobody_there = isinstance(error, AntennaUnreachable) and not error.connected
        if nobody_there or isinstance(error, AntennaRejected):
            raise ConfigurationError(f"{self._url_setting()}: {error}") from error

    def _url_setting(self) -> str:
        return f"AMI_ANTENNA_API_BASE_URL {self._context.settings.antenna_api_base_url}"

    def _heed_fetch(self, job_id: int, error: AntennaError | None) -> None:
        """Take note of what became of a job's fetches.

        Raises:
            ConfigurationError: no fetch was ever answered here, and Antenna refuses those of all jobs there are.
        """
        if not isinstance(error, AntennaRefused):
            self._refused_fetches.discard(job_id)
            self._fetched |= error is None
            return
        self._refused_fetches.add(job_id)
        jobs = self._board.job_ids()
        self._fetched |= self._context.journal.was_used()  # the refusal came after tasks did
        if jobs and jobs <= self._refused_fetches and not self._fetched:
            hint = " (fetching tasks takes a superuser's token)"
            raise ConfigurationError(f"AMI_ANTENNA_API_AUTH_TOKEN: {error}{hint}") from error


def make_data_folder(config: Settings) -> None:
    """Make AMI_USER_DATA_PATH unless it is there.

    Raises:
        ConfigurationError: a setting or the rights on the folder have to be changed.
        OSError: nothing can be kept there now, and that may pass.
    """
    folder = config.user_data_path
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if os_error_may_pass(error):
            raise
        raise ConfigurationError(f"AMI_USER_DATA_PATH: cannot create {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        if is_read_only and config.journal_path.exists():  # it was written once: the kernel gives a failing disk up so
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        raise ConfigurationError(
            f"AMI_USER_DATA_PATH: this user cannot write to {folder}: change its owner, or name another"
        )


def image_client(config: Settings) -> ImageClient:
    """Return the client that downloads photographs, from where the settings allow."""
    antenna_host = urlsplit(config.antenna_api_base_url).hostname or ""
    addresses = AddressPolicy(antenna_host, config.image_allowed_networks, config.image_allowed_hosts)
    return ImageClient(config.image_max_bytes, addresses, config.antenna_ack_wait_seconds / 2)


def run(
    options: WorkerOptions,
    config: Settings,
    stop: Stop,
    policy: IngestPolicy | None = None,
    life: SignsOfLife | None = None,
    died: tuple[int, str] | None = None,
) -> ExitCode:
    """Build what outlives a job, work until stopped, and flush; benchmarks bring a policy of their own.

    `died` is the process before this one, where its death was of its own making: its pid, and how.
    """
    with collecting_dead_threads() as dead_threads:
        return _run(options, config, stop, policy, life, died, dead_threads)


@contextmanager
def collecting_dead_threads() -> Iterator[list[threading.ExceptHookArgs]]:
    """Collect what ends a thread, from before the first of ours or of a plug-in starts; it is logged at the end."""
    dead_threads: list[threading.ExceptHookArgs] = []
    hook_before = threading.excepthook
    threading.excepthook = dead_threads.append
    try:
        yield dead_threads
    finally:
        threading.excepthook = hook_before
        for one in dead_threads:
            name = one.thread.name if one.thread else "?"
            _log.error("thread_died", thread=name, error=repr(one.exc_value))


def _run(
    options: WorkerOptions,
    config: Settings,
    stop: Stop,
    policy: IngestPolicy | None,
    life: SignsOfLife | None,
    died: tuple[int, str] | None,
    dead_threads: list[threading.ExceptHookArgs],
) -> ExitCode:
    faults = Faults()

    def open_journal() -> Journal:
        make_data_folder(config)
        return Journal(config.journal_path)

    try:
        wait_for_machine("journal", partial(make_data_folder, config), stop.draining, faults)
        specs = registry.choose(registry.available(config, stop.draining.is_set), options.pipelines)
        journal = wait_for_machine("journal", open_journal, stop.draining, faults)
        accuse = partial(journal.accuse, died, oom_kills())
        suspects = wait_for_machine("journal", accuse, stop.draining, faults)
    except StoppedWhileWaiting:
        return ExitCode.OK
    with (
        image_client(config) as images,
        AntennaClient(config.antenna_api_base_url, config.token, client_info=_client_info(journal.slot)) as client,
        closing(MemoryShare(config.user_data_path)) as share,
    ):
        if share.after_kill:
            _log.warning("predecessor_killed_for_memory", plans_with=share.caution)
        folder = config.effective_staging_path
        staging = StagingArea(
            folder, images, config.image_max_pixels, config.staging_max_bytes, owner=journal.staging_name
        )
        earlier = journal.own_earlier_staging(folder)
        if earlier is not None:
            adopted = staging.adopt(earlier, journal.unfinished_tasks())
            _log.info("staged_files_adopted", files=adopted, reason="an earlier version named them otherwise")
        swept = staging.sweep(journal.unfinished_ids)
        _log.info(
            "journal_open",
            path=str(config.journal_path),
            slot=journal.slot,
            suspects=suspects,
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
        poster = Poster(
            journal,
            client,
            PosterLimits(config.antenna_max_pending_posts, config.antenna_max_post_bytes),
            pipelines={spec.slug for spec in specs},
        )
        lease = LeaseTerms(config.antenna_ack_wait_seconds, config.antenna_max_deliver)
        context = WorkerContext(
            settings=config,
            client=client,
            journal=journal,
            poster=poster,
            staging=staging,
            policy=policy or IngestPolicy(ceilings(config)),
            lease=lease,
            stopping=stop.draining,
            flushing=stop.flushing,
            life=life or SignsOfLife(),
            pids=pids,
            reporter=reporter,
            share=share,
            faults=faults,
            died=dead_threads,
        )
        try:
            with closing(WorkerLoop(options, context, specs)) as loop:
                return loop.run()
        finally:
            context.life.tasks(TASKS_LEASES * config.antenna_ack_wait_seconds)  # to end is something to be held to, too
            poster.close(config.shutdown_grace_seconds / 2, stop.flushing)
            reporter.close()
            journal.close()


def _client_info(instance: int) -> dict[str, str | int | None]:
    """Return who we are, for Antenna's list of workers."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    name = {"hostname": socket.gethostname(), "software": "adc-worker", "version": __version__}
    return {**name, "gpu": gpu, "instance": instance}


def main() -> int:
    """Run as a child; the exit code tells the parent whether a restart can help."""
    faulthandler.enable()  # the stacks are the evidence of a crash, and of a hang that holds the GIL
    options = WorkerOptions.model_validate_json(sys.argv[1])
    life, died = SignsOfLife(int(sys.argv[2])), json.loads(sys.argv[3])
    config = settings.load(options.env_file)
    log.configure(options.log_format, config.log_level)
    stop = Stop()
    threading.Thread(target=stop.listen, name="commands", daemon=True).start()
    try:
        return run(options, config, stop, life=life, died=died)
    except ConfigurationError as error:
        _log.error("configuration", error=str(error))
        return ExitCode.CONFIGURATION
    except WorkerFault as error:
        _log.exception("worker_fault", error=str(error))
        return error.exit_code
    except Exception as error:  # noqa: BLE001 (logged with its traceback; the parent restarts us)
        _log.exception("failed", error=str(error))
        return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
