"""`make soak`: many images, kills and faults at random; the table goes to benchmarks/RESULTS.md.

SOAK_IMAGES (10 000) and SOAK_SEED (1) change the run. Twenty minutes on two cores.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from adc_worker.devserver.server import DevServer
from benchmarks.support import report
from tests.faults.conftest import ALGORITHMS, Desk
from tests.support import counting_pipeline
from tests.support.counting_pipeline import NAN_IMAGE, numbered
from tests.support.gate import Fault, Gate
from tests.support.image_server import ImageServer, Reply
from tests.support.workers import worker

IMAGES = int(os.environ.get("SOAK_IMAGES", "10000"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
JOBS = 4
FAULT_SHARE = 0.05  # of the requests to Antenna; none that spends a delivery and loses the answer
FAULTS: tuple[Fault, ...] = (500, 502, 503, 429, "reset", "cut")
FETCH_SIZE = 16
CHILD_ALONE = 0.3  # of the kills
LIFE_S = (4.0, 20.0)  # of a worker between two kills; it takes 3 s to start
TIMEOUT_S = 3000.0
POLL_S = 0.05


@dataclass
class _Kills:
    """Kills workers at random moments until the jobs are done."""

    desk: Desk
    chance: random.Random
    jobs: list[int]
    count: int = 0
    batches: list[int] = field(default_factory=list)

    def finished(self) -> bool:
        return all(self.desk.antenna.job(job_id).processed == IMAGES // JOBS for job_id in self.jobs)

    def run(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self.finished() and time.monotonic() < deadline:
            with worker(
                self.desk.environment({"COUNTING_SECONDS": "0.002", "AMI_ANTENNA_API_BATCH_SIZE": str(FETCH_SIZE)})
            ) as running:
                while self._wait_for_moment(deadline) and self._kill(running.process.pid):
                    """The child is dead, and its parent starts another."""
            self.batches += [event["images"] for event in running.events("batch")]

    def _wait_for_moment(self, deadline: float) -> bool:
        moment = min(deadline, time.monotonic() + self.chance.uniform(*LIFE_S))
        while time.monotonic() < moment and not self.finished():
            time.sleep(POLL_S)
        return time.monotonic() < deadline and not self.finished()

    def _kill(self, parent: int) -> bool:
        """Kill the child, or parent and child together; return whether the parent is left."""
        self.count += 1
        children = psutil.Process(parent).children()
        if self.chance.random() < CHILD_ALONE and children:
            children[0].kill()
            return True
        os.killpg(parent, signal.SIGKILL)
        return False


def _usual(numbers: int) -> list[int]:
    """Return image numbers whose colour makes no NaN."""
    found = (number for number in range(2 * numbers) if number % 256 != NAN_IMAGE)
    return [next(found) for _ in range(numbers)]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thousands_of_images_with_kills_and_faults_at_random_have_one_outcome_each(tmp_path: Path) -> None:
    """Nothing lost, no false error; a kill repeats at most one fetch, one batch, and the downloads under way."""
    chance = random.Random(SEED)  # noqa: S311 (repeatable)

    def fault(route: str) -> Fault | None:
        if not posted or chance.random() > FAULT_SHARE:
            posted.update([route] if route == "POST result" else [])
            return None
        found = chance.choice(FAULTS)
        return 503 if route == "POST tasks" and found == "cut" else found

    posted: set[str] = set()  # nothing fails before the first post: a first contact that fails is a wrong setting
    with (
        DevServer(save_delay_s=0.0005, keep_streams=True) as antenna,
        Gate(antenna.api_url) as gate,
        ImageServer() as images,
    ):
        desk = Desk(antenna, gate, images, tmp_path)
        numbers = _usual(IMAGES)
        images.replies |= {f"/{number}.png": Reply(numbered(number)) for number in numbers}
        urls = [images.url(f"/{number}.png") for number in numbers]
        jobs = [
            antenna.add_job(counting_pipeline.SLUG, urls[index::JOBS], algorithms=ALGORITHMS) for index in range(JOBS)
        ]
        gate.fault = fault
        kills = _Kills(desk, chance, jobs)
        started = time.monotonic()
        kills.run()
        wall_s = time.monotonic() - started
        views = [antenna.job(job_id) for job_id in jobs]
        inferred, downloads = desk.inferred, desk.downloads()
    errors = sum(job.failed for job in views)
    deliveries = sum((job.deliveries for job in views), Counter[str]())
    lost = IMAGES - sum(len(job.results) for job in views) - errors
    inferred_twice = sum(inferred.values()) - len(inferred)
    downloaded_twice = sum(downloads.values()) - len(downloads)
    delivered_twice = sum(deliveries.values()) - len(deliveries)
    head = (
        "images", "kills", "inferred twice", "largest batch", "requested twice", "second deliveries", "false errors",
        "lost", "wall",
    )  # fmt: skip
    cells = (
        IMAGES, kills.count, inferred_twice, max(kills.batches, default=0), downloaded_twice, delivered_twice, errors,
        lost, f"{wall_s:.0f} s",
    )  # fmt: skip
    text = (
        f"## Kills and faults (`tests/faults/test_soak.py`)\n\n{report.machine()}, commit {report.commit()}.\n\n"
        f"{FAULT_SHARE:.0%} of the requests to Antenna fail, seed {SEED}. Requested twice: downloads under way when a"
        f" kill came are asked for again. Second deliveries: of a fetch whose answer died with the worker, or of"
        f" a lease that ran out; they are not told apart.\n\n" + report.table(head, [cells])
    )
    print(text)  # noqa: T201 (what the soak is run for)
    if IMAGES >= 2_000:
        report.write_section("soak", text)
    assert (lost, errors) == (0, 0)
    assert delivered_twice <= kills.count * FETCH_SIZE, "a fetch whose answer dies with the worker has spent its tasks"
    assert inferred_twice <= kills.count * max(kills.batches)
    assert downloaded_twice <= kills.count * 32, "as many as are under way at once"
