"""Where the snapshots of all processes of a worker meet, in its parent."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from dataclasses import replace

from adc_worker import __version__
from adc_worker.antenna.leases import HORIZON_SHARE
from adc_worker.log import recent_causes
from adc_worker.status.snapshot import JobView, Snapshot
from adc_worker.status.worker_status import MemoryPoint, ProcessStatus, WorkerStatus

HISTORY_POINTS = 600  # chosen: a curve of a page's width
JOBS_KEPT = 20  # chosen: a page shows no more
# Chosen: a process tells every second, and a fresh one needs 4 to 8 s to import torch on two cores.
SILENT_S = 30.0
SHORTEST_JOB_S = 1e-3  # against a division by zero


class StatusHub:
    """Takes snapshots and tells the worker's status; safe to use from several threads."""

    def __init__(self, instances: int, ack_wait_s: float) -> None:
        self._instances = instances
        # A worker plans to be done with what it holds within this share of a lease. Without any
        # outcome in that time something is wrong.
        self._stuck_s = HORIZON_SHARE * ack_wait_s
        self._started_at = time.time()
        self._lock = threading.Lock()
        self._latest: dict[int, Snapshot] = {}  # by slot
        self._histories: dict[int, _MemoryHistory] = {}  # by slot
        self._ended_jobs: dict[int, JobView] = {}  # by job, the last one last

    def add(self, snapshot: Snapshot) -> bool:
        """Take what a process told; True when a job ended with it."""
        with self._lock:
            self._latest[snapshot.slot] = snapshot
            history = self._histories.setdefault(snapshot.slot, _MemoryHistory())
            history.add(snapshot)
            if snapshot.job is None or snapshot.job.ended_at is None:
                return False
            self._add_ended(snapshot.job)
            return True

    def unready(self) -> list[str]:
        """Return why this worker is not to be counted on; nothing when it is."""
        now = time.time()
        snapshots = self.snapshots()
        reasons = []
        for one in snapshots:
            silent_s = now - one.at
            if silent_s > SILENT_S:
                reasons.append(f"process {one.pid} has told nothing for {silent_s:.0f} s")
        for one in snapshots:
            still_s = now - one.moved_at
            if one.holds_tasks and still_s > self._stuck_s:
                reasons.append(f"process {one.pid} holds tasks and made no progress for {still_s:.0f} s")
        missing = self._instances - len(snapshots)
        if missing > 0:
            reasons.append(f"{missing} of {self._instances} processes have not started yet")
        return reasons

    def snapshots(self) -> list[Snapshot]:
        with self._lock:
            return list(self._latest.values())

    def status(self) -> WorkerStatus:
        """Return everything there is to see."""
        with self._lock:
            processes = [self._process(slot) for slot in sorted(self._latest)]
            jobs = list(self._ended_jobs.values())
        return WorkerStatus(
            version=__version__,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=self._started_at,
            now=time.time(),
            unready=tuple(self.unready()),
            workers=tuple(processes),
            jobs=tuple(reversed(jobs)),
            causes=recent_causes(),
        )

    def _process(self, slot: int) -> ProcessStatus:
        snapshot = self._latest[slot]
        return ProcessStatus(
            snapshot=snapshot,
            eta_s=snapshot.job.eta_s if snapshot.job else None,
            history=tuple(self._histories[slot].points),
        )

    def _add_ended(self, job: JobView) -> None:
        """Keep a job's end; one that was worked on in several passes stays one job."""
        before = self._ended_jobs.pop(job.id, None)
        if before is not None:
            job = _joined(before, job)
        self._ended_jobs[job.id] = job
        if len(self._ended_jobs) > JOBS_KEPT:
            oldest = next(iter(self._ended_jobs))
            del self._ended_jobs[oldest]


class _MemoryHistory:
    """Memory over a process's whole life in a bounded number of points, evenly spread."""

    def __init__(self) -> None:
        self.points: list[MemoryPoint] = []
        self._interval_s = 1.0

    def add(self, snapshot: Snapshot) -> None:
        if self.points and snapshot.at - self.points[-1].at < self._interval_s:
            return
        plan = snapshot.job.plan if snapshot.job else {}
        point = MemoryPoint(snapshot.at, snapshot.memory_bytes, plan.get("peak_bytes", 0))
        self.points.append(point)
        if len(self.points) > HISTORY_POINTS:
            span_s = snapshot.at - self.points[0].at
            self._interval_s = 2 * span_s / HISTORY_POINTS
            self.points = self.points[::2]


def _joined(before: JobView, job: JobView) -> JobView:
    """Add up two passes over a job."""
    failed = Counter(before.failed) + Counter(job.failed)
    joined = replace(
        job,
        started_at=before.started_at,
        tasks=before.tasks + job.tasks,
        done=before.done + job.done,
        failed=dict(failed),
        left_to_lease=before.left_to_lease + job.left_to_lease,
        detections=before.detections + job.detections,
        truncated=before.truncated + job.truncated,
        damaged=before.damaged + job.damaged,
        inference_s=before.inference_s + job.inference_s,
        peak_bytes=max(before.peak_bytes, job.peak_bytes),
    )
    seconds = (job.ended_at or 0.0) - joined.started_at
    rate = joined.settled / max(seconds, SHORTEST_JOB_S)
    return replace(joined, images_per_s=rate)
