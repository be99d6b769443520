"""Stand-ins for what lies outside: an Antenna that takes results, and values to build reports and hosts from."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from adc_worker.antenna.wire import JobState, PostEntry, Task, error_result
from adc_worker.host.budget import HostBudget
from adc_worker.journal.journal import Journal
from adc_worker.planning.measurements import PROBE_DOWNLOADS, ImageProbe, ProbeReport

MB = 1_000_000
GB = 1000 * MB


def task(number: int = 1) -> Task:
    """Return a task as Antenna's first fetch of a job would bring it."""
    return Task(
        image_id=str(number),
        image_url=f"https://images.example.org/{number}.jpg",
        reply_subject=f"$JS.ACK.job_7.job-7-consumer.1.{number}.{number}.1760000000000000000.0",
    )


def result(number: int, size_bytes: int = 40) -> bytes:
    """Return a serialised result of exactly `size_bytes` that names its image."""
    start = b'{"pipeline":"%d","pad":"' % number
    return start + b"x" * (size_bytes - len(start) - 2) + b'"}'


class Receiver:
    """Takes posts like Antenna does; `fault` is asked first and may raise in its place."""

    def __init__(self, fault: Callable[[int, Sequence[tuple[str, bytes]]], object] | None = None) -> None:
        self._fault = fault
        self._lock = threading.Lock()
        self.posts: list[tuple[int, list[tuple[str, bytes]]]] = []
        self.attempts = 0
        self.status = "STARTED"
        self.tasks: list[Task] = []

    def post_results(self, job_id: int, entries: Sequence[PostEntry]) -> frozenset[str]:
        self._post(job_id, [(entry.reply_subject, b"".join(entry.parts())) for entry in entries])
        return frozenset(entry.reply_subject for entry in entries)

    def _post(self, job_id: int, entries: Sequence[tuple[str, bytes]]) -> None:
        with self._lock:
            self.attempts += 1
        if self._fault is not None:
            self._fault(job_id, entries)
        with self._lock:
            self.posts.append((job_id, list(entries)))

    def job(self, job_id: int) -> JobState:
        return JobState(id=job_id, status=self.status)

    def fetch_tasks(self, _job_id: int, count: int) -> list[Task]:
        with self._lock:
            fetched, self.tasks = self.tasks[:count], self.tasks[count:]
            return fetched

    @property
    def bodies(self) -> Counter[bytes]:
        """Every accepted result, and how often."""
        with self._lock:
            return Counter(body for _job_id, entries in self.posts for _subject, body in entries)


def recorded(journal: Journal) -> set[int]:
    """Return every task in a journal's file."""
    return set(journal._column("SELECT id FROM adc_task"))


def is_error(body: bytes) -> bool:
    return body.startswith(error_result("1", "")[:9])


def image_probe(
    *,
    width_px: int = 4096,
    height_px: int = 2160,
    compressed_bytes: int = 1_500_000,
    decode_scratch_bytes: int = 4 * MB,
    download_s: float = 0.2,
    decode_s: float = 0.05,
    inference_s: float = 0.2,
    keep_s: float = 0.0,
) -> ImageProbe:
    """Return a probe of a usual light-trap photograph on a usual link, unless told otherwise."""
    return ImageProbe(
        compressed_bytes=compressed_bytes,
        width_px=width_px,
        height_px=height_px,
        decode_scratch_bytes=decode_scratch_bytes,
        first_byte_s=download_s / 2,
        download_s=download_s,
        decode_s=decode_s,
        inference_s=inference_s,
        keep_s=keep_s,
    )


def report(probe: ImageProbe, *, base_bytes: int = 1 * GB, inference_peak_bytes: int = 100 * MB) -> ProbeReport:
    return ProbeReport((probe, probe), base_bytes, inference_peak_bytes, downloads=PROBE_DOWNLOADS)


def host(
    *,
    limit_bytes: int = 16 * GB,
    available_bytes: int = 15 * GB,
    cores: int = 8,
    staging_bytes: int = 50 * GB,
    gpu: bool = False,
) -> HostBudget:
    return HostBudget(limit_bytes, "MemTotal", available_bytes, 1 * GB, cores, staging_bytes, 1024, gpu)
