"""What fault tests share: one Antenna a module, a gate in front of it, numbered images that note their inference."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adc_worker.desk.job import Job
from adc_worker.desk.server import DevServer
from tests.support import counting_pipeline
from tests.support.counting_pipeline import numbered
from tests.support.gate import Gate
from tests.support.image_server import ImageServer, Reply
from tests.support.waiting import wait_until
from tests.support.workers import environment

ALGORITHMS = [("Counting", "counting", "localization"), ("Colour", "colour", "classification")]


@pytest.fixture(scope="module")
def antenna() -> Iterator[DevServer]:
    """An Antenna with the terms of a real one: a lease of 300 s, two deliveries."""
    with DevServer(save_delay_s=0.001, keep_streams=True) as running:
        yield running


@dataclass
class Desk:
    """One test's surroundings. `folder` holds the notes and switches of the counting pipeline."""

    antenna: DevServer
    gate: Gate
    images: ImageServer
    folder: Path
    jobs: list[int] = field(default_factory=list)
    images_may_come: threading.Event = field(default_factory=threading.Event)

    def add_job(
        self,
        count: int,
        first: int = 0,
        host: ImageServer | None = None,
        size_px: int = 24,
        hostname: str = "127.0.0.1",
    ) -> int:
        """Add a job of numbered images; `host` serves them, or the desk's own image server."""
        images = host or self.images
        for number in range(first, first + count):
            images.replies.setdefault(f"/{number}.png", Reply(numbered(number, size_px, size_px)))
        urls = [images.url(f"/{number}.png", hostname) for number in range(first, first + count)]
        self.jobs.append(self.antenna.add_job(counting_pipeline.SLUG, urls, algorithms=ALGORITHMS))
        return self.jobs[-1]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return environment(self.antenna, self.folder / "data", counting_pipeline.ENVIRONMENT) | {
            "AMI_ANTENNA_API_BASE_URL": self.gate.api_url,
            "COUNTING_FOLDER": str(self.folder),
            **(extra or {}),
        }

    def switch(self, name: str, *, on: bool) -> None:
        """Make inference wait (`hold`) or fail (`broken`), or not any more."""
        (self.folder / name).touch() if on else (self.folder / name).unlink()

    @property
    def inferred(self) -> Counter[int]:
        return counting_pipeline.inferred(self.folder)

    def downloads(self) -> Counter[str]:
        """Count the requests for each image."""
        return Counter(request.target for request in self.images.requests)

    def done(self, job_id: int, timeout_s: float = 120.0) -> Job:
        """Wait for the job's success and return it: one result per image, and no error."""
        wait_until(lambda: self.antenna.job(job_id).status == "SUCCESS", timeout_s)
        job = self.antenna.job(job_id)
        assert job.errors == {}
        assert set(job.results) == set(job.image_ids)
        return job


@pytest.fixture
def desk(antenna: DevServer, tmp_path: Path) -> Iterator[Desk]:
    with Gate(antenna.api_url) as gate, ImageServer() as images:
        made = Desk(antenna, gate, images, tmp_path)
        yield made
        for job_id in made.jobs:
            antenna.cancel(job_id)  # or the next test's worker would find it
