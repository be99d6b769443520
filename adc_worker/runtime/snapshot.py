"""What one worker process tells about itself, and the thread that tells it.

Terminal, status, page and metrics show nothing else.
Snapshots go to the parent as JSON lines over a Unix socket beside the journal; without a parent nobody listens.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from adc_worker.log import Cause, get_logger, recent_causes

_log = get_logger(__name__)

TICK_S = 1.0
RATE_WINDOW_S = 30.0  # images a second are counted over this time: about ten batches of today's pipelines


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """One stage of the path: seconds it takes for an image, and images at once; the quotient is what it could do."""

    name: str
    s_per_image: float
    parallel: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """One moment of a pass over a job. Times are Unix seconds.

    Attributes:
        in_hand: tasks fetched and without an outcome.
        pending: tasks Antenna had not handed out to anybody at the last fetch.
        failed: error results by cause.
        truncated: of those done, images whose file ended early.
        damaged: of those done, images in whose file the decoder found damage elsewhere than at its end.
        images_per_s: outcomes over the last seconds, while it runs; over the whole pass once it ended.
        memory_bytes: of the process tree after the last batch, decoded pixels included.
        stages: download, decode and inference, as the last batch went.
        plan, why: the plan in force, field by field, and its arithmetic.
        decision: what was changed last, and why.
    """

    id: int
    pipeline: str
    started_at: float
    ended_at: float | None = None
    tasks: int = 0
    done: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    left_to_lease: int = 0
    detections: int = 0
    truncated: int = 0
    damaged: int = 0
    in_hand: int = 0
    pending: int = 0
    images_per_s: float = 0.0
    readiness: float = 0.0
    inference_s: float = 0.0
    memory_bytes: int = 0
    peak_bytes: int = 0
    stages: tuple[StageView, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    decision: str = ""

    @property
    def settled(self) -> int:
        """Tasks that have an outcome."""
        return self.done + sum(self.failed.values()) + self.left_to_lease

    @property
    def eta_s(self) -> float | None:
        """Seconds until nothing is left for anybody, at the present rate; None while that is unknown."""
        left = self.in_hand + self.pending
        return left / self.images_per_s if self.images_per_s > 0 and self.ended_at is None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of a worker process. Times are Unix seconds; `*_total` count since the process started."""

    at: float
    slot: int
    pid: int
    device: str
    stopping: bool
    memory_bytes: int
    budget_bytes: int
    limit_bytes: int
    limit_source: str
    unposted: int
    staged_bytes: int
    moved_at: float = 0.0  # when a task last got an outcome, or a result was last accepted
    totals: Mapping[str, float] = field(default_factory=dict)
    job: JobView | None = None
    causes: tuple[Cause, ...] = ()

    @property
    def holds_tasks(self) -> bool:
        """Whether somebody waits for this process."""
        return self.unposted > 0 or (self.job is not None and self.job.in_hand > 0)

    def to_json(self) -> bytes:
        return _SNAPSHOT.dump_json(self)

    @classmethod
    def from_json(cls, line: bytes) -> Snapshot:
        return _SNAPSHOT.validate_json(line)


_SNAPSHOT = TypeAdapter(Snapshot)


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Return an address of a Unix socket: those take 107 bytes, and through its folder's descriptor any path fits."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def socket_path(folder: Path, pid: int) -> Path:
    """Return where the parent `pid` listens; the host is in the name, since a folder may be on several."""
    return folder / f"worker-{socket.gethostname()}-{pid}.sock"


class Reporter:
    """Sends a snapshot at every tick and at the start and end of a job; a job's thread is never waited for."""

    def __init__(self, listener: Path | None, measure: Callable[[JobView | None], Snapshot]) -> None:
        self._measure = measure
        self._view: Callable[[], JobView] | None = None
        self._totals: Counter[str] = Counter()
        self._settled: deque[tuple[float, int]] = deque()
        self._moved = ((0.0, 0), time.time())
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = listener
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    @contextmanager
    def job(self, view: Callable[[], JobView]) -> Iterator[None]:
        """Report on a job while the body runs, and once more at its end."""
        with self._lock:
            self._view = view
            self._settled.clear()
        self._send()
        try:
            yield
        finally:
            with self._lock:
                last = view()
                self._view = None
                self._totals.update(_totals(last))
            seconds = max(time.time() - last.started_at, 1e-3)
            if last.tasks:
                self._send(replace(last, ended_at=time.time(), images_per_s=last.settled / seconds))

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._send()
        if self._socket is not None:
            self._socket.close()

    def _connect(self) -> None:
        if self._listener is None or not self._listener.exists():
            return
        connection = socket.socket(socket.AF_UNIX)
        try:
            with socket_address(self._listener) as address:
                connection.connect(address)
        except OSError as error:
            connection.close()
            _log.debug("nobody_listens", error=str(error))
            return
        connection.settimeout(TICK_S)  # a parent that does not read costs a tick, never a job
        self._socket = connection

    def _run(self) -> None:
        while not self._closed.wait(TICK_S):
            self._send()

    def _send(self, ended: JobView | None = None) -> None:
        with self._lock:
            if self._socket is None:  # the first time, or after the parent was too busy to listen
                self._connect()
            if self._socket is None:
                return
            try:
                self._socket.sendall(self._snapshot(ended).to_json() + b"\n")
            except OSError as error:
                _log.warning("status_not_told", error=str(error))
                self._socket.close()
                self._socket = None

    def _snapshot(self, ended: JobView | None) -> Snapshot:
        view = self._with_rate(self._view()) if ended is None and self._view is not None else ended
        measured = replace(self._measure(view), job=view)
        totals = self._totals + Counter(_totals(view)) if view and not ended else self._totals
        moved = (totals["done"] + totals["failed"] + totals["left_to_lease"], measured.unposted)
        if moved != self._moved[0] or not measured.holds_tasks:
            self._moved = (moved, measured.at)
        return replace(measured, moved_at=self._moved[1], totals=dict(totals), causes=recent_causes())

    def _with_rate(self, view: JobView) -> JobView:
        now = time.monotonic()
        self._settled.append((now, view.settled))
        while len(self._settled) > 2 and self._settled[1][0] < now - RATE_WINDOW_S:  # noqa: PLR2004 (a rate takes two)
            self._settled.popleft()
        (_then, before), span_s = self._settled[0], now - self._settled[0][0]
        return replace(view, images_per_s=(view.settled - before) / span_s if span_s > 0 else 0.0)


def _totals(view: JobView) -> dict[str, float]:
    return {
        "done": view.done,
        "failed": sum(view.failed.values()),
        "left_to_lease": view.left_to_lease,
        "detections": view.detections,
        "truncated": view.truncated,
        "damaged": view.damaged,
        "inference_s": view.inference_s,
    }
