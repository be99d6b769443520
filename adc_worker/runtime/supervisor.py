"""The parent: starts one child per GPU, restarts it with back-off, passes stop signals on. Imports no torch."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from types import FrameType

from adc_worker.errors import ExitCode
from adc_worker.host.budget import count_gpus, raise_descriptor_limit
from adc_worker.host.memory import oom_kills
from adc_worker.host.share import CAUTION_MIN, CAUTION_STEP
from adc_worker.log import get_logger
from adc_worker.runtime.options import WorkerOptions
from adc_worker.settings import Settings

_log = get_logger(__name__)

DRAIN, FLUSH = b"drain\n", b"flush\n"
# A terminal and a supervisor signal the whole group and forward it, too: within a second it is the same signal.
SAME_SIGNAL_S = 1.0
RESTART_FIRST_S, RESTART_MAX_S = 1.0, 60.0
STEADY_S = 300.0  # a child that lived this long starts its back-off anew
# glibc's threshold adapts upwards, after which 20-30 MB blocks fragment the heap: 3.05 GB instead of 1.0
# (measurements, "Other costs"). With a fixed threshold the heap is trimmed at every 128 kB unless told otherwise, which
# cost Pillow's decodes 38 000 page faults each.
CHILD_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "33554432"}
_KILLED = 3
_NO_RESTART = frozenset({ExitCode.OK, ExitCode.CONFIGURATION, ExitCode.MODEL_UNAVAILABLE, ExitCode.JOURNAL_UNUSABLE})


@dataclass(slots=True)
class _Child:
    gpu: int | None
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    started_at: float = 0.0
    backoff_s: float = RESTART_FIRST_S
    restart_at: float = 0.0
    exit_code: ExitCode | None = None  # final: it is not started again
    oom_kills: int = 0  # the kernel's count when it was started
    caution: float = 1.0


@dataclass(slots=True)
class _Stop:
    """How far stopping has gone: 0 running, 1 draining, 2 flushing, 3 killed."""

    level: int = 0
    last_signal_at: float = field(default=-SAME_SIGNAL_S)
    deadline: float = float("inf")


class Supervisor:
    """Runs children until they are done or a signal ends them."""

    def __init__(self, options: WorkerOptions, settings: Settings) -> None:
        self._options = options
        self._grace_s = settings.shutdown_grace_seconds
        gpus = count_gpus()
        instances = settings.worker_instances or max(1, gpus)
        self._children = [_Child(gpu=index % gpus if gpus else None) for index in range(instances)]
        self._stop = _Stop()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> ExitCode:
        """Return when every child is done: OK, or the first code that says a restart is useless."""
        raise_descriptor_limit()
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            while any(child.exit_code is None for child in self._children):
                self._start_due()
                self._wait()
                self._reap()
                self._enforce_deadline()
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(self._wake_read)
            os.close(self._wake_write)
        return max((child.exit_code for child in self._children if child.exit_code is not None), default=ExitCode.OK)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._stop.last_signal_at < SAME_SIGNAL_S:
            return
        self._stop.last_signal_at = now
        self._stop.level = min(self._stop.level + 1, 2)
        self._stop.deadline = min(self._stop.deadline, now + self._grace_s)
        _log.info("stopping", signal=signal.Signals(number).name, how="drain" if self._stop.level == 1 else "flush")
        self._command(DRAIN if self._stop.level == 1 else FLUSH)

    def _command(self, line: bytes) -> None:
        for child in self._running():
            if child.process is not None and child.process.stdin is not None:
                try:
                    child.process.stdin.write(line)
                    child.process.stdin.flush()
                except BrokenPipeError:
                    _log.debug("child_already_gone", pid=child.process.pid)

    def _running(self) -> list[_Child]:
        return [child for child in self._children if child.process is not None]

    def _start_due(self) -> None:
        for child in self._children:
            if child.process is None and child.exit_code is None:
                if self._stop.level:
                    child.exit_code = ExitCode.OK
                elif time.monotonic() >= child.restart_at:
                    self._start(child)

    def _start(self, child: _Child) -> None:
        environment = os.environ | CHILD_ENVIRONMENT
        if child.gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[child.gpu] if visible != [""] else str(child.gpu)
        options, child.oom_kills = replace(self._options, caution=child.caution), oom_kills()
        child.process = subprocess.Popen(
            [sys.executable, "-m", "adc_worker.runtime.worker", options.to_json()],
            stdin=subprocess.PIPE,  # commands, and a lifeline: it closes when this process is gone
            start_new_session=True,
            env=environment,
        )
        child.pidfd = os.pidfd_open(child.process.pid)
        child.started_at = time.monotonic()
        _log.info("child_started", pid=child.process.pid, gpu=child.gpu)

    def _wait(self) -> None:
        """Sleep until a child ends, a signal comes, or something is due."""
        due = [child.restart_at for child in self._children if child.process is None and child.exit_code is None]
        timeout = min([*due, self._stop.deadline]) - time.monotonic()
        readable, _, _ = select.select(
            [self._wake_read, *(child.pidfd for child in self._running())],
            [],
            [],
            None if timeout == float("inf") else max(0.0, timeout),
        )
        if self._wake_read in readable:
            os.read(self._wake_read, 512)

    def _reap(self) -> None:
        for child in self._running():
            process = child.process
            if process is None or process.poll() is None:
                continue
            os.close(child.pidfd)
            if process.stdin is not None:
                process.stdin.close()
            child.process = None
            self._decide(child, process)

    def _decide(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        """Start it again later, unless that is useless or we are stopping."""
        code = process.returncode
        if code in _NO_RESTART:
            child.exit_code = ExitCode(code)
        elif self._stop.level:
            # Killed at the end of the grace period is the stop that was asked for: what is kept is in the journal.
            child.exit_code = ExitCode.OK if self._stop.level == _KILLED else ExitCode.FAILED
        else:
            if code == -signal.SIGKILL and oom_kills() > child.oom_kills:
                child.caution = max(CAUTION_MIN, child.caution * CAUTION_STEP)
                _log.warning("child_killed_for_memory", pid=process.pid, plans_with=round(child.caution, 3))
            if time.monotonic() - child.started_at > STEADY_S:
                child.backoff_s = RESTART_FIRST_S
            child.restart_at = time.monotonic() + child.backoff_s
            _log.error("child_ended", pid=process.pid, exit=_name(code), restart_in_s=child.backoff_s)
            child.backoff_s = min(2 * child.backoff_s, RESTART_MAX_S)

    def _enforce_deadline(self) -> None:
        if time.monotonic() < self._stop.deadline:
            return
        self._stop.level, self._stop.deadline = _KILLED, float("inf")
        for child in self._running():
            if child.process is not None:
                _log.warning("child_killed", pid=child.process.pid, reason="AMI_SHUTDOWN_GRACE_SECONDS are over")
                child.process.kill()


def _name(code: int) -> str:
    if code < 0:
        return signal.Signals(-code).name
    return ExitCode(code).name if code in set(ExitCode) else str(code)


def supervise(options: WorkerOptions, settings: Settings) -> ExitCode:
    return Supervisor(options, settings).run()
