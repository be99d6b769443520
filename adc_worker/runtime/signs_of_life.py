"""The child's side of the watchdog: until when it will have moved on. Past that the parent takes it for hung.

The parent watches, not a thread of the child: one that hangs in native code holds the GIL, or waits for a dead disk.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

READY, STATUS, UNTIL = b"ready", b"status", b"until"

# Shares of the lease, after which Antenna gives our tasks to others. Inference is timed once it was measured; loading
# kernels at the first call may take minutes. In between anything may be what moves: bytes, answers, outcomes.
INFERENCE_LEASES, FIRST_INFERENCE_LEASES, TASKS_LEASES = 0.5, 1.0, 2.0
INFERENCE_FACTOR = 20.0  # times what the probe measured: a GPU that others use, too, is slower by far
_RESOLUTION_S = 0.5  # a deadline that moved by less is not told
_NEVER = float("inf")


class SignsOfLife:
    """Tells the parent when this process is to be heard of again; safe to use from several threads."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._tasks = self._inference = self._told = _NEVER  # monotonic seconds

    def ready(self) -> None:
        self._tell(READY)

    def status(self, text: str) -> None:
        """Say in a few words what is being done; people read it in `systemctl status`."""
        self._tell(STATUS + b" " + text.encode())

    def tasks(self, within_s: float) -> None:
        """Promise that something moves the tasks in hand within a time, from now on; `inf` when there are none."""
        with self._lock:
            self._tasks = time.monotonic() + within_s
            self._tell_deadline()

    @contextmanager
    def inference(self, within_s: float) -> Iterator[None]:
        """Promise that the body ends within a time. What else may move the tasks does not count meanwhile."""
        with self._lock:
            self._inference = time.monotonic() + within_s
            self._tell_deadline()
        try:
            yield
        finally:
            with self._lock:
                self._inference = _NEVER
                self._tell_deadline()

    def _tell_deadline(self) -> None:
        deadline = self._tasks if self._inference == _NEVER else self._inference
        if deadline < self._told or deadline > self._told + _RESOLUTION_S:
            self._told = deadline
            self._tell(UNTIL + b" %a" % deadline)

    def _tell(self, line: bytes) -> None:
        if self._descriptor is not None:
            os.write(self._descriptor, line.replace(b"\n", b" ") + b"\n")
