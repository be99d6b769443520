"""200 workers at one desk server: requests and tasks per second while they share jobs, and while there is none.

Each worker is the real poller, board, fetches, journal and poster, in threads; its GPU is a pause per image, nothing
is downloaded or decoded. All start at the same moment, as after an outage, so that one sees whether they stay in step.
Not measured: Antenna itself, whose answers take longer, and a network.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from adc_worker import log
from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.antenna.wire import JobRef, PostEntry, SuccessResult, Task
from adc_worker.desk.server import DevServer
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.runtime.intake import TaskFetch
from adc_worker.runtime.slices import JobBoard, JobPoller
from benchmarks.support import report

SLUG = "simulated"
SAMPLE_S = 0.25
IDLE_S = 5.0  # AMI_ANTENNA_IDLE_SLEEP_SECONDS by default
FETCH_TASKS = 8
ROUTES = ("GET jobs", "GET job", "POST tasks", "POST result")


class Heart(AntennaClient):
    """A client that notes its longest silence: Antenna calls a service offline after 60 s without these requests."""

    longest_silence_s = 0.0
    _last_at: float | None = None

    def jobs(self, pipeline_slugs: Sequence[str], project: int | None = None) -> list[JobRef]:
        self._beat()
        return super().jobs(pipeline_slugs, project)

    def fetch_tasks(self, job_id: int, count: int) -> list[Task]:
        self._beat()
        return super().fetch_tasks(job_id, count)

    def post_results(self, job_id: int, entries: Sequence[PostEntry]) -> frozenset[str]:
        self._beat()
        return super().post_results(job_id, entries)

    def _beat(self) -> None:
        now = time.monotonic()
        self.longest_silence_s = max(self.longest_silence_s, now - (self._last_at or now))
        self._last_at = now


class LightWorker:
    """A worker without images: takes turns, fetches, waits as long as a GPU would, keeps and posts."""

    def __init__(self, server: tuple[str, str], folder: Path, image_s: float, stopping: Event) -> None:
        self._image_s = image_s
        self._stopping = stopping
        self._client = self.heart = Heart(*server)
        self._journal = Journal(folder / "journal.db")
        self._poster = Poster(self._journal, self._client, PosterLimits(5, 8_000_000))
        self._board = JobBoard(120.0, IDLE_S)
        self._poller = JobPoller(self._board, self._client, self._journal, [SLUG], None)
        self._fetches: dict[int, TaskFetch] = {}

    def run(self) -> None:
        self._poller.start()
        while not self._stopping.is_set():
            turn = self._board.next_turn(self._stopping.is_set)
            if turn is None:
                self._poller.wait_for_news(0.5)
                continue
            with self._poller.busy():
                tasks, empty = 0, False
                while not empty and not turn.fetches_no_more(0.0):
                    done = self._work_on(turn.entry.id)
                    tasks, empty = tasks + done, done == 0
            self._board.end_turn(turn, tasks, ended_empty=empty)
        self._poller.close()
        self._poster.close(0.0)
        self._journal.close()
        self._client.close()

    def _work_on(self, job_id: int) -> int:
        answered = threading.Event()
        fetch = self._fetches.setdefault(
            job_id, TaskFetch(job_id, self._client, self._journal, self._poster, LeaseTerms())
        )
        fetch.begin_turn(answered.set)
        fetch.start(FETCH_TASKS)
        answered.wait()
        held = self._journal.unfinished(job_id)
        self._stopping.wait(self._image_s * len(held))
        self._journal.keep([(one.id, SuccessResult(one.task, SLUG, [], self._image_s, _now())) for one in held])
        self._poster.wake()
        return len(held)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def run_workers(
    server: tuple[str, str], folder: Path, count: int, image_s: float, stopping: Event, silences: SimpleQueue[float]
) -> None:
    """Run that many workers in threads of this process, and tell each one's longest silence."""
    log.configure("json", "error")
    name = multiprocessing.current_process().name
    workers = [LightWorker(server, folder / f"{name}-{number}", image_s, stopping) for number in range(count)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in workers:
        silences.put(worker.heart.longest_silence_s)


class Window:
    """Requests by route and saved results of so many seconds, or until every job is over."""

    def __init__(self, server: DevServer, seconds: float, jobs: list[int]) -> None:
        before, saved = Counter(server.requests), sum(server.job(job).processed for job in jobs)
        started, totals = time.monotonic(), [before.total()]
        while time.monotonic() - started < seconds and (not jobs or any(map(self._goes_on(server), jobs))):
            time.sleep(SAMPLE_S)
            totals.append(sum(server.requests.values()))
        self.took_s = time.monotonic() - started
        self.tasks = sum(server.job(job).processed for job in jobs) - saved
        self.requests = Counter(server.requests) - before
        second = round(1 / SAMPLE_S)
        self.most_in_a_second = max(later - earlier for earlier, later in zip(totals, totals[second:], strict=False))

    @staticmethod
    def _goes_on(server: DevServer) -> Callable[[int], bool]:
        return lambda job: server.job(job).status == "STARTED"

    def row(self, phase: str, workers: int, redelivered: int) -> tuple[object, ...]:
        total_per_s = sum(self.requests[route] for route in ROUTES) / self.took_s
        rates = [f"{self.requests[route] / self.took_s:.1f}" for route in ROUTES]
        a_minute, tasks_per_s = 60 * total_per_s / workers, self.tasks / self.took_s
        return (
            phase, f"{self.took_s:.0f} s", *rates, f"{total_per_s:.1f}", self.most_in_a_second, f"{a_minute:.1f}",
            f"{tasks_per_s:.1f}", redelivered,
        )  # fmt: skip


HEAD = (
    "phase", "time", *(f"{route}/s" for route in ROUTES), "requests/s", "most in a second", "requests/min of a worker",
    "tasks/s", "delivered again",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=5)
    parser.add_argument("--images", type=int, default=3000, help="of each job")
    parser.add_argument("--image-s", type=float, default=2.0)
    parser.add_argument("--rest", type=float, default=150.0, help="seconds without a job between the two idle phases")
    parser.add_argument("--seconds", type=float, default=60.0, help="of an idle phase; jobs take up to twice as long")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, DevServer(save_delay_s=0.0) as server:
        context = multiprocessing.get_context("spawn")
        stopping, silences = context.Event(), context.SimpleQueue()
        share = options.workers // options.processes
        workers = share * options.processes
        arguments = ((server.api_url, server.token), Path(folder), share, options.image_s, stopping, silences)
        processes = [context.Process(target=run_workers, args=arguments) for _ in range(options.processes)]
        for process in processes:
            process.start()
        while sum(server.requests.values()) < workers:
            time.sleep(SAMPLE_S)
        rows.append(Window(server, options.seconds, []).row("no job, started together", workers, 0))
        time.sleep(options.rest)
        rows.append(Window(server, options.seconds, []).row("no job for minutes", workers, 0))
        images = [f"{number}.jpg" for number in range(options.images)]
        jobs = [server.add_job(SLUG, images) for _ in range(options.jobs)]
        window = Window(server, 2 * options.seconds, jobs)
        again = sum(sum(count > 1 for count in server.job(job).deliveries.values()) for job in jobs)
        rows.append(window.row(f"{options.jobs} jobs of {options.images} images", workers, again))
        stopping.set()
        silence_s = max(silences.get() for _ in range(workers))
        for process in processes:
            process.join(30)
            process.kill()
    text = (
        f"## A fleet (`benchmarks/fleet.py`)\n\n{report.machine()}, commit {report.commit()}.\n\n"
        f"{workers} workers in {options.processes} processes, {options.image_s} s an image: at most"
        f" {workers / options.image_s:.0f} images/s. One run. Idle workers poll every {IDLE_S:.0f} s at first. The"
        f" longest silence of any worker: {silence_s:.0f} s (Antenna calls it offline after 60 s).\n\n"
        + report.table(HEAD, rows)
        + "\n\nCaveats: server and workers share this machine's cores; the server saves at once, and takes nothing to"
        " answer but its own computing.\n"
    )
    print(text)
    report.write_section("fleet", text)


if __name__ == "__main__":
    main()
