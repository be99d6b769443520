"""The thread that sends snapshots of a worker process to its parent: JSON lines over a socket."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from adc_worker.log import get_logger, recent_causes
from adc_worker.status.paths import socket_address
from adc_worker.status.snapshot import JobView, Snapshot

_log = get_logger(__name__)

TICK_S = 1.0  # chosen: how often people and the parent hear of a process
RATE_WINDOW_S = 30.0  # chosen: about ten batches of Antenna's pipelines on a GPU
POINTS_OF_A_RATE = 2
SHORTEST_PASS_S = 1e-3  # against a division by zero


class Reporter:
    """Sends a snapshot at every tick, and at the start and end of a job.

    Without a parent that listens it sends nothing. A parent that does not read costs a tick.
    """

    def __init__(
        self,
        listener: Path | None,
        measure: Callable[[JobView | None], Snapshot],
    ) -> None:
        self._listener = listener
        self._measure = measure
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._view: Callable[[], JobView] | None = None  # of the job that runs
        self._rate = _RateWindow()
        self._totals_before: Counter[str] = Counter()  # of the passes that ended
        self._progress = (0.0, 0)
        self._moved_at = time.time()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    @contextmanager
    def job(self, view: Callable[[], JobView]) -> Iterator[None]:
        """Report on a job while the body runs, and once more at its end."""
        with self._lock:
            self._view = view
            self._rate = _RateWindow()
        self._send()
        try:
            yield
        finally:
            with self._lock:
                last = view()
                self._view = None
                self._totals_before.update(_totals(last))
            if last.tasks:
                self._send(_ended(last))

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._send()
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> None:
        while not self._closed.wait(TICK_S):
            self._send()

    def _send(self, ended: JobView | None = None) -> None:
        with self._lock:
            if self._socket is None:  # the first time, or after the connection was lost
                self._socket = self._connect()
            if self._socket is None:
                return
            snapshot = self._at_end(ended) if ended else self._now()
            try:
                self._socket.sendall(snapshot.to_json() + b"\n")
            except OSError as error:
                _log.warning("status_not_told", error=str(error))
                self._socket.close()
                self._socket = None

    def _connect(self) -> socket.socket | None:
        if self._listener is None or not self._listener.exists():
            return None
        connection = socket.socket(socket.AF_UNIX)
        try:
            with socket_address(self._listener) as address:
                connection.connect(address)
        except OSError as error:
            connection.close()
            _log.debug("nobody_listens", error=str(error))
            return None
        connection.settimeout(TICK_S)
        return connection

    def _now(self) -> Snapshot:
        if self._view is None:
            return self._completed(None, self._totals_before)
        view = self._view()
        rate = self._rate.add(time.monotonic(), view.settled)
        view = replace(view, images_per_s=rate)
        totals = self._totals_before + Counter(_totals(view))
        return self._completed(view, totals)

    def _at_end(self, ended: JobView) -> Snapshot:
        return self._completed(ended, self._totals_before)

    def _completed(self, view: JobView | None, totals: Counter[str]) -> Snapshot:
        """Measure, and add what only the reporter knows."""
        measured = replace(self._measure(view), job=view)
        outcomes = totals["done"] + totals["failed"] + totals["left_to_lease"]
        progress = (outcomes, measured.unposted)
        if progress != self._progress or not measured.holds_tasks:
            self._progress = progress
            self._moved_at = measured.at
        return replace(
            measured,
            moved_at=self._moved_at,
            totals=dict(totals),
            causes=recent_causes(),
        )


class _RateWindow:
    """Counts outcomes a second over the last RATE_WINDOW_S."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()  # seconds, outcomes so far

    def add(self, now_s: float, outcomes: int) -> float:
        """Return images a second with this point; 0 with a single one."""
        self._points.append((now_s, outcomes))
        while len(self._points) > POINTS_OF_A_RATE and self._points[1][0] < now_s - RATE_WINDOW_S:
            self._points.popleft()
        first_s, first_outcomes = self._points[0]
        span_s = now_s - first_s
        return (outcomes - first_outcomes) / span_s if span_s > 0 else 0.0


def _ended(view: JobView) -> JobView:
    now = time.time()
    seconds = max(now - view.started_at, SHORTEST_PASS_S)
    return replace(view, ended_at=now, images_per_s=view.settled / seconds)


def _totals(view: JobView) -> dict[str, float]:
    return {
        "done": view.done,
        "failed": view.n_failed,
        "left_to_lease": view.left_to_lease,
        "detections": view.detections,
        "truncated": view.truncated,
        "damaged": view.damaged,
        "inference_s": view.inference_s,
    }
