"""The parent's side of status: the latest snapshot of every child, memory over time, the last jobs, and who may read.

One Unix socket, readable by this user alone, takes snapshots from children and answers `ami worker status`. The last
jobs are also written to a file, so that `ami worker report` works when the worker has ended.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from adc_worker import __version__
from adc_worker.antenna.leases import HORIZON_SHARE
from adc_worker.errors import ConfigurationError, ExitCode, WorkerFault, os_error_may_pass
from adc_worker.log import get_logger, recent_causes
from adc_worker.runtime.snapshot import JobView, Snapshot, socket_address, socket_path

_log = get_logger(__name__)

ASK = b"status\n"
HISTORY_POINTS = 600  # a curve of a page's width; every second point goes when they are used up
JOBS_KEPT = 20
SILENT_S = 30.0  # a child tells every second; one that starts needs 4-8 s to import torch (measurements, "Other costs")
ANSWER_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Child:
    snapshot: Snapshot
    interval_s: float = 1.0
    history: deque[tuple[float, int, int]] = field(default_factory=deque)  # Unix seconds, bytes in use, bytes predicted

    def add(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        if self.history and snapshot.at - self.history[-1][0] < self.interval_s:
            return
        plan = snapshot.job.plan if snapshot.job else {}
        self.history.append((snapshot.at, snapshot.memory_bytes, plan.get("peak_bytes", 0)))
        if len(self.history) > HISTORY_POINTS:
            self.interval_s = 2 * (snapshot.at - self.history[0][0]) / HISTORY_POINTS
            self.history = deque(list(self.history)[::2])


class Board:
    """What the children told; safe to use from several threads."""

    def __init__(self, instances: int, ack_wait_s: float) -> None:
        self._instances = instances
        # What is held is planned to be done within half a lease (antenna/leases.py): nothing in all that time is wrong.
        self._stuck_s = HORIZON_SHARE * ack_wait_s
        self._started_at = time.time()
        self._lock = threading.Lock()
        self._children: dict[int, _Child] = {}  # by slot
        self._jobs: dict[int, JobView] = {}  # by job: a job that comes in slices is one

    def add(self, snapshot: Snapshot) -> bool:
        """Take what a child told; True when a job ended with it."""
        with self._lock:
            if snapshot.slot not in self._children:
                self._children[snapshot.slot] = _Child(snapshot)
            self._children[snapshot.slot].add(snapshot)
            job = snapshot.job
            if job is None or job.ended_at is None:
                return False
            before = self._jobs.pop(job.id, None)
            self._jobs[job.id] = _continued(before, job) if before else job
            if len(self._jobs) > JOBS_KEPT:
                del self._jobs[next(iter(self._jobs))]
            return True

    def unready(self) -> list[str]:
        """Return why this worker is not to be counted on; nothing when it is."""
        now = time.time()
        with self._lock:
            children = list(self._children.values())
        reasons = [
            f"process {one.snapshot.pid} has told nothing for {now - one.snapshot.at:.0f} s"
            for one in children
            if now - one.snapshot.at > SILENT_S
        ]
        reasons += [
            f"process {one.snapshot.pid} holds tasks and made no progress for {now - one.snapshot.moved_at:.0f} s"
            for one in children
            if one.snapshot.holds_tasks and now - one.snapshot.moved_at > self._stuck_s
        ]
        if len(children) < self._instances:
            reasons.append(f"{self._instances - len(children)} of {self._instances} processes have not started yet")
        return reasons

    def snapshots(self) -> list[Snapshot]:
        with self._lock:
            return [one.snapshot for one in self._children.values()]

    def state(self) -> dict[str, Any]:
        """Return everything there is to see, ready to be written as JSON."""
        with self._lock:
            workers = [
                {
                    "snapshot": one.snapshot,
                    "eta_s": one.snapshot.job.eta_s if one.snapshot.job else None,
                    "history": list(one.history),
                }
                for _slot, one in sorted(self._children.items())
            ]
            jobs = list(reversed(self._jobs.values()))
        return {
            "version": __version__,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "now": time.time(),
            "unready": self.unready(),
            "workers": workers,
            "jobs": jobs,
            "causes": recent_causes(),
        }

    def to_json(self) -> bytes:
        return orjson.dumps(self.state())


def _continued(before: JobView, job: JobView) -> JobView:
    """Add up the passes over a job."""
    failed = dict(Counter(before.failed) + Counter(job.failed))
    names = ("tasks", "done", "left_to_lease", "detections", "inference_s")
    sums = {name: getattr(before, name) + getattr(job, name) for name in names}
    joined = replace(job, **sums, failed=failed, started_at=before.started_at)
    rate = joined.settled / max(1e-3, (job.ended_at or 0.0) - joined.started_at)
    return replace(joined, peak_bytes=max(before.peak_bytes, job.peak_bytes), images_per_s=rate)


@contextmanager
def listening(board: Board, folder: Path) -> Iterator[None]:
    """Take snapshots for `board` and answer who asks, over a socket in `folder`, while the body runs."""
    path = socket_path(folder, os.getpid())
    server = socket.socket(socket.AF_UNIX)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with socket_address(path) as address:
            server.bind(address)
        path.chmod(0o600)
    except OSError as error:
        server.close()
        problem = f"AMI_USER_DATA_PATH: cannot create {path}: {error.strerror}"
        if os_error_may_pass(error):
            raise WorkerFault(problem, ExitCode.MACHINE_FAULT) from error
        raise ConfigurationError(problem) from error
    server.listen()
    thread = threading.Thread(target=_accept, args=(server, board, folder), name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(OSError):  # on some systems nobody is connected, and that is an error
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        path.unlink(missing_ok=True)


def _accept(server: socket.socket, board: Board, folder: Path) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # closed: the worker ends
        threading.Thread(target=_serve, args=(connection, board, folder), name="status-reader", daemon=True).start()


def _serve(connection: socket.socket, board: Board, folder: Path) -> None:
    with connection, connection.makefile("rb") as lines, suppress(OSError):  # who asked may be gone
        for line in lines:
            if line == ASK:
                connection.sendall(board.to_json())
                return
            if line.endswith(b"\n") and board.add(Snapshot.from_json(line)):  # or its child died in the middle of it
                _keep_report(board, folder)


def _keep_report(board: Board, folder: Path) -> None:
    partial = folder / f".last-job.{os.getpid()}.{threading.get_ident()}"  # jobs of two children may end at once
    try:
        partial.touch(mode=0o600)
        partial.write_bytes(board.to_json())
        partial.replace(report_path(folder))
    except OSError as error:  # a full disk: the child goes on telling
        _log.warning("report_not_kept", error=str(error))


def report_path(folder: Path) -> Path:
    """Return where the state at the end of the last job is kept."""
    return folder / "last-job.json"


def running(folder: Path) -> list[dict[str, Any]]:
    """Ask every worker of this host that keeps its data in `folder`."""
    states = []
    for path in sorted(folder.glob(socket_path(folder, 0).name.replace("-0.sock", "-*.sock"))):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            try:
                with socket_address(path) as address:
                    connection.connect(address)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)  # its worker was killed
                continue
            try:
                connection.sendall(ASK)
                answer = b"".join(iter(lambda connection=connection: connection.recv(1 << 16), b""))  # type: ignore[misc]
            except OSError as error:
                raise WorkerFault(f"the worker that listens at {path} does not answer: {error}") from error
            states.append(orjson.loads(answer))
    return states
