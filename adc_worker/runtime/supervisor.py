"""The parent: starts a child per GPU, ends one that hangs, restarts it, passes stop signals on. Imports no torch."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from adc_worker.errors import ExitCode
from adc_worker.host.budget import raise_descriptor_limit, visible_gpus
from adc_worker.log import get_logger
from adc_worker.runtime.signs_of_life import READY, STATUS, UNTIL
from adc_worker.settings import Settings, WorkerOptions

_log = get_logger(__name__)

DRAIN, FLUSH, ABORT = b"drain\n", b"flush\n", b"abort\n"
# A terminal and a supervisor signal the whole group and forward it, too: within a second it is the same signal.
SAME_SIGNAL_S = 1.0
RESTART_FIRST_S, RESTART_MAX_S = 1.0, 60.0
FLUSH_S = 10.0  # after the second signal: what is under way may end in this time
# Until a child is ready: importing torch takes 4 to 8 s (docs/measurements.md), from a cold network disk minutes.
START_S = 600.0
HUNG_CHECK_S = 2.0  # a deadline may have passed because the whole host was paused: look again before ending the child
ABORT_S = 5.0  # to write the stacks, first on command, then on SIGABRT; then SIGKILL
ORPHANS_S = 10.0  # for killed processes to be gone; longer only on a dead disk or in a GPU driver
OOM_SCORE_STEP = 100  # the kernel takes the child before the parent
STEADY_S = 300.0  # a child that lived this long starts its back-off anew
# glibc's threshold adapts upwards to 32 MiB, after which 20-30 MB blocks fragment the heap: 3.05 GB instead of 1.0
# (docs/measurements.md). Fixed at 16 MiB, photographs and decoders' blocks for them are mapped and given back
# whole, while most tensors between a network's layers stay in the heap, whose free end is kept up to 128 MiB: fresh
# pages for each slow inference on a CPU down (benchmarks/inference.py, page faults). torch's variable makes the pages
# of large tensors huge ones.
CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "THP_MEM_ALLOC_ENABLE": "1",
}
_KILLED = 3
_HUNG = 2  # times overdue
# What supervisors, terminals and batch systems send, and a terminal that is closed.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_SIGNS_BYTES = 1 << 16
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LIBC = ctypes.CDLL(None, use_errno=True)  # here: the loader's lock may be held by a thread when a child is forked
# Deaths of a process's own making: evidence against an image that was alone in it.
_OWN_DEATHS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE})
_NO_RESTART = frozenset(
    {
        ExitCode.OK,
        ExitCode.CONFIGURATION,
        ExitCode.MODEL_UNAVAILABLE,
        ExitCode.JOURNAL_UNUSABLE,
        ExitCode.MACHINE_FAULT,
    }
)


@dataclass(slots=True)
class _Child:
    gpu: str | None  # as CUDA_VISIBLE_DEVICES names it
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    started_at: float = 0.0
    backoff_s: float = RESTART_FIRST_S
    restart_at: float = 0.0
    exit_code: ExitCode | None = None  # final: it is not started again
    commands: int = -1  # the pipe to it; also a lifeline, which closes when this process is gone
    signs: int = -1  # the pipe on which it says until when it will have moved on
    silent_until: float = float("inf")  # monotonic seconds; past that it hangs
    overdue: int = 0  # how often that was found
    died: tuple[int, str] | None = None  # the process before, if its death was of its own making


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
        gpus = visible_gpus()
        instances = settings.worker_instances or max(1, len(gpus))
        self._children = [_Child(gpu=gpus[index % len(gpus)] if gpus else None) for index in range(instances)]
        self._stop = _Stop()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._strangers = {process.pid for process in psutil.Process().children()}  # of whoever became us by exec
        self._ping_s, self._ping_at = watchdog_period_s(), 0.0

    def run(self) -> ExitCode:
        """Return when every child is done: OK, or the first code that says a restart is useless."""
        raise_descriptor_limit()
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heeded = [number for number in _STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]
        previous = {number: signal.signal(number, self._on_signal) for number in heeded}
        wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            while any(child.exit_code is None for child in self._children):
                self._start_due()
                self._wait()
                self._reap()
                self._end_hung()
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
        patience_s = self._grace_s if self._stop.level == 1 else min(self._grace_s, FLUSH_S)
        self._stop.deadline = min(self._stop.deadline, now + patience_s)
        notify("STOPPING=1")
        _log.info("stopping", signal=signal.Signals(number).name, how="drain" if self._stop.level == 1 else "flush")
        self._tell_children()

    def _tell_children(self) -> None:
        for child, _process in self._running():
            with suppress(BrokenPipeError):  # it is gone already
                os.write(child.commands, DRAIN if self._stop.level == 1 else FLUSH)

    def _running(self) -> list[tuple[_Child, subprocess.Popen[bytes]]]:
        return [(child, child.process) for child in self._children if child.process is not None]

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
            environment["CUDA_VISIBLE_DEVICES"] = child.gpu
        commands, child.commands = os.pipe2(os.O_CLOEXEC)
        child.signs, signs_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(signs_write, True)
        arguments = [self._options.model_dump_json(), str(signs_write), json.dumps(child.died)]
        child.process = subprocess.Popen(
            [sys.executable, "-m", "adc_worker.runtime.worker", *arguments],
            stdin=commands,
            start_new_session=True,
            env=environment,
            pass_fds=[signs_write],
            preexec_fn=_become_child,  # noqa: PLW1509 (it takes no lock that a thread may hold; exec keeps what it sets)
        )
        os.close(signs_write)
        os.close(commands)
        child.pidfd = os.pidfd_open(child.process.pid)
        child.silent_until, child.overdue = time.monotonic() + START_S, 0
        child.started_at = time.monotonic()
        _log.info("child_started", pid=child.process.pid, gpu=child.gpu)
        if self._stop.level:  # a signal came just now, when there was nobody to tell yet
            self._tell_children()

    def _wait(self) -> None:
        """Sleep until a child ends, a signal comes, or something is due."""
        if (now := time.monotonic()) >= self._ping_at:
            notify("WATCHDOG=1")
            self._ping_at = now + self._ping_s
        due = [child.restart_at for child in self._children if child.process is None and child.exit_code is None]
        due += [child.silent_until for child, _process in self._running()]
        timeout = min([*due, self._ping_at, self._stop.deadline]) - now
        readable, _, _ = select.select(
            [self._wake_read, *(end for child, _process in self._running() for end in (child.pidfd, child.signs))],
            [],
            [],
            None if timeout == float("inf") else max(0.0, timeout),
        )
        if self._wake_read in readable:
            os.read(self._wake_read, 512)
        for child, _process in self._running():
            if child.signs in readable:
                self._hear(child)

    def _hear(self, child: _Child) -> None:
        """Take what a child says; see `SignsOfLife`."""
        for line in os.read(child.signs, _SIGNS_BYTES).splitlines():
            word, _, rest = line.partition(b" ")
            if word == READY:
                child.silent_until = float("inf")
                notify("READY=1", "STATUS=waiting for jobs")
            elif word == STATUS:
                notify(f"STATUS={rest.decode()}")
            elif word == UNTIL:
                child.silent_until, child.overdue = float(rest), 0

    def _end_hung(self) -> None:
        """Abort children whose deadline passed, which writes their stacks; kill those that cannot even do that.

        On command first: the thread that writes them holds the GIL then. A signal's handler does not, and running
        threads change under its eyes, which has ended it in a segmentation fault. Where the command is not heard, the
        GIL is held by the code that hangs, and nothing changes.
        """
        for child, process in self._running():
            if time.monotonic() < child.silent_until:
                continue
            child.overdue += 1
            child.silent_until = time.monotonic() + (HUNG_CHECK_S if child.overdue == 1 else ABORT_S)
            if child.overdue == _HUNG:
                _log.error("child_hung", pid=process.pid, next="stacks of all its threads, and a restart")
                with suppress(BrokenPipeError):
                    os.write(child.commands, ABORT)
            elif child.overdue > _HUNG:
                process.send_signal(signal.SIGABRT if child.overdue == _HUNG + 1 else signal.SIGKILL)

    def _reap(self) -> None:
        for child, process in self._running():
            if process.poll() is None:
                continue
            os.close(child.pidfd)
            os.close(child.signs)
            os.close(child.commands)
            child.process = None
            self._clear_orphans()
            self._decide(child, process)

    def _clear_orphans(self) -> None:
        """Kill and reap what a dead child left; its memory and its GPU must be free before the next one starts."""
        deadline = time.monotonic() + ORPHANS_S
        known = self._strangers | {process.pid for _child, process in self._running()}
        while orphans := [process for process in psutil.Process().children() if process.pid not in known]:
            for orphan in orphans:
                with suppress(psutil.NoSuchProcess):
                    orphan.kill()
            _gone, alive = psutil.wait_procs(orphans, max(0.0, deadline - time.monotonic()))
            if alive:
                _log.error("orphans_left", pids=[orphan.pid for orphan in alive], reason="SIGKILL does not end them")
                return

    def _decide(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        """Start it again, at once or later, unless that is useless or we are stopping."""
        code = ExitCode.HUNG if child.overdue >= _HUNG else process.returncode
        child.died = (process.pid, _name(code)) if code == ExitCode.HUNG or -code in _OWN_DEATHS else None
        if code in _NO_RESTART:
            child.exit_code = ExitCode(code)
        elif self._stop.level:
            # Killed at the end of the grace period is the stop that was asked for: what is kept is in the journal.
            asked_for = self._stop.level == _KILLED or code == ExitCode.RECYCLE
            child.exit_code = ExitCode.OK if asked_for else ExitCode.FAILED
        elif code == ExitCode.RECYCLE:
            child.restart_at = time.monotonic()
        else:
            if time.monotonic() - child.started_at > STEADY_S:
                child.backoff_s = RESTART_FIRST_S
            child.restart_at = time.monotonic() + child.backoff_s
            _log.error("child_ended", pid=process.pid, exit=_name(code), restart_in_s=child.backoff_s)
            child.backoff_s = min(2 * child.backoff_s, RESTART_MAX_S)

    def _enforce_deadline(self) -> None:
        if time.monotonic() < self._stop.deadline:
            return
        self._stop.level, self._stop.deadline = _KILLED, float("inf")
        for _child, process in self._running():
            _log.warning("child_killed", pid=process.pid, reason="AMI_SHUTDOWN_GRACE_SECONDS are over")
            process.kill()


def be_like_a_child() -> None:
    """Give this process, which has computed nothing yet, what a child has: its open files and its allocator."""
    raise_descriptor_limit()
    os.environ.update(CHILD_ENVIRONMENT)
    for option, name in (_M_MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_"), (_M_TRIM_THRESHOLD, "MALLOC_TRIM_THRESHOLD_"):
        _LIBC.mallopt(option, int(CHILD_ENVIRONMENT[name]))  # glibc read its variables when this process started


def notify(*assignments: str) -> None:
    """Tell systemd, where that started us, such as "READY=1" (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
        try:
            channel.sendto("\n".join(assignments).encode(), address.replace("@", "\0", 1))
        except OSError as error:
            _log.warning("notify_failed", error=str(error))


def watchdog_period_s() -> float:
    """Return how often to tell systemd that we live: twice per WatchdogSec=, as sd_watchdog_enabled(3) recommends."""
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6 or float("inf")


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _become_child() -> None:
    """Between fork and exec: die with the parent, and leave its signals to it, though they be sent to whole groups."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):  # some containers mount /proc read-only: then the kernel goes by size, which is the child
        score.write_text(str(min(1000, int(score.read_text()) + OOM_SCORE_STEP)))


def _name(code: int) -> str:
    if code < 0:
        return signal.Signals(-code).name
    return ExitCode(code).name if code in set(ExitCode) else str(code)
