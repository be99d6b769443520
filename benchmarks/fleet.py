"""200 workers at one desk server: requests and tasks per second while they share jobs, and while there is none.

Each worker is the real poller, board, fetches, journal and poster, in threads; its GPU is a pause per image, nothing
is downloaded or decoded. Not measured: Antenna itself, whose answers take longer, and a network.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.synchronize import Event
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from adc_worker import log
from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.antenna.wire import SuccessResult
from adc_worker.devserver.server import DevServer
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.runtime.intake import TaskFetch
from adc_worker.runtime.slices import JobBoard, JobPoller
from benchmarks.support import report

SLUG = "simulated"
IDLE_S = 5.0  # AMI_ANTENNA_IDLE_SLEEP_SECONDS by default
FETCH_TASKS = 8
ROUTES = ("GET jobs", "GET job", "POST tasks", "POST result")


class LightWorker:
    """A worker without images: takes turns, fetches, waits as long as a GPU would, keeps and posts."""

    def __init__(self, server: tuple[str, str], folder: Path, image_s: float, stopping: Event) -> None:
        self._image_s = image_s
        self._stopping = stopping
        self._client = AntennaClient(*server)
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
        fetch.start(FETCH_TASKS, answered.set)
        answered.wait()
        held = fetch.take_answer() or []
        self._stopping.wait(self._image_s * len(held))
        self._journal.keep([(one.id, SuccessResult(one.task, SLUG, [], self._image_s, _now())) for one in held])
        self._poster.wake()
        return len(held)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def run_workers(server: tuple[str, str], folder: Path, count: int, image_s: float, stopping: Event) -> None:
    """Run that many workers in threads of this process."""
    log.configure("json", "error")
    threads = []
    for number in range(count):
        own = folder / f"{multiprocessing.current_process().name}-{number}"
        threads.append(threading.Thread(target=LightWorker(server, own, image_s, stopping).run))
        threads[-1].start()
        stopping.wait(IDLE_S / count)  # they start over the time of one poll
    for thread in threads:
        thread.join()


def window(server: DevServer, seconds: float, jobs: list[int]) -> tuple[Counter[str], int, float]:
    """Count requests by route and saved results of so many seconds, or until every job is over."""
    before, saved, started = Counter(server.requests), sum(server.job(job).processed for job in jobs), time.monotonic()
    while time.monotonic() - started < seconds and (not jobs or any(server.job(j).status == "STARTED" for j in jobs)):
        time.sleep(0.25)
    took_s = time.monotonic() - started
    done = sum(server.job(job).processed for job in jobs) - saved
    return Counter(server.requests) - before, done, took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=5)
    parser.add_argument("--images", type=int, default=6000, help="of each job")
    parser.add_argument("--image-s", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=120.0, help="longest time of each phase")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, DevServer(save_delay_s=0.0) as server:
        context = multiprocessing.get_context("spawn")
        stopping = context.Event()
        share = options.workers // options.processes
        processes = [
            context.Process(
                target=run_workers,
                args=((server.api_url, server.token), Path(folder), share, options.image_s, stopping),
            )
            for _ in range(options.processes)
        ]
        for process in processes:
            process.start()
        time.sleep(2 * IDLE_S)
        for phase in ("no job", f"{options.jobs} jobs of {options.images} images"):
            jobs = []
            if phase != "no job":
                images = [f"{number}.jpg" for number in range(options.images)]
                jobs = [server.add_job(SLUG, images) for _ in range(options.jobs)]
            requests, done, took_s = window(server, options.seconds, jobs)
            again = sum(sum(count > 1 for count in server.job(job).deliveries.values()) for job in jobs)
            rates = [f"{requests[route] / took_s:.1f}" for route in ROUTES]
            total = sum(requests[route] for route in ROUTES) / took_s
            rows.append((phase, f"{took_s:.0f} s", *rates, f"{total:.1f}", f"{done / took_s:.1f}", again))
        stopping.set()
        for process in processes:
            process.join(30)
            process.kill()
    head = ("phase", "time", *(f"{route}/s" for route in ROUTES), "requests/s", "tasks/s", "delivered again")
    workers = share * options.processes
    text = (
        f"## A fleet (`benchmarks/fleet.py`)\n\n{report.machine()}, commit {report.commit()}.\n\n"
        f"{workers} workers in {options.processes} processes, {options.image_s} s an image: at most"
        f" {workers / options.image_s:.0f} images/s. One run.\n\n"
        + report.table(head, rows)
        + "\n\nCaveats: server and workers share this machine's cores; the server saves at once, and takes nothing to"
        " answer but its own computing.\n"
    )
    print(text)
    report.write_section("fleet", text)


if __name__ == "__main__":
    main()
