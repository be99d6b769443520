"""One measured run: an Antenna for the desk outside, a worker inside a memory limit, samples of both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from adc_worker.desk.job import Job
from adc_worker.desk.server import DevServer
from adc_worker.runtime.supervisor import CHILD_ENVIRONMENT
from benchmarks.support.cgroup import Enclosure, enclose

SAMPLE_S = 0.05
CPU_SAMPLE_S = 0.5
SAVED_TIMEOUT_S = 20.0
SHARED = Path("/dev/shm")  # noqa: S108 (where torch makes its files)
_STAT_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system
_HERE = Path(__file__).parent
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

WORKER = [sys.executable, "-m", "adc_worker", "worker", "--pipeline", "simulated"]
# A child measures the tree of its parent: the shell stays, by having something left to do.
DECODING_IN_PROCESSES = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, str(_HERE / "bench_worker.py")]
BASELINE = [sys.executable, str(_HERE / "baseline.py")]


@dataclass(frozen=True, slots=True)
class CpuSample:
    """CPU seconds so far at a wall-clock time: of the whole machine, of the worker's tree, of server and benchmark."""

    at_s: float
    machine_s: float
    worker_s: float
    serving_s: float


@dataclass(frozen=True, slots=True)
class Flow:
    """The stretch of a run in which every stage had work, and what it brought."""

    start_s: float
    end_s: float
    images: int

    @property
    def images_per_s(self) -> float:
        return self.images / (self.end_s - self.start_s) if self.end_s > self.start_s else 0.0


@dataclass(frozen=True, slots=True)
class CpuUse:
    """Where the CPU went while every stage had work: seconds per image, and cores that others took or nobody used."""

    worker_s_per_image: float
    serving_s_per_image: float
    cores_taken: float
    cores_idle: float

    def __str__(self) -> str:
        return (
            f"worker {1e3 * self.worker_s_per_image:.0f} ms, serving {1e3 * self.serving_s_per_image:.0f} ms CPU"
            f" an image; others took {self.cores_taken:.2f} cores, {self.cores_idle:.2f} were idle"
        )


@dataclass(slots=True)
class Samples:
    """Memory and CPU of a run over wall-clock time."""

    held: list[tuple[float, int]] = field(default_factory=list)  # seconds, bytes of anonymous + shared memory
    charged: list[tuple[float, int]] = field(default_factory=list)  # the same, page cache included
    cpu: list[CpuSample] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        return max((held for _at_s, held in self.held), default=0)

    def cpu_of(self, window: Flow) -> CpuUse | None:
        """Account for the samples inside `window`; None when there are fewer than two."""
        inside = [sample for sample in self.cpu if window.start_s <= sample.at_s <= window.end_s]
        if len(inside) < 2 or not window.images:
            return None
        first, last = inside[0], inside[-1]
        wall_s = last.at_s - first.at_s
        images = window.images_per_s * wall_s
        worker_s, serving_s = last.worker_s - first.worker_s, last.serving_s - first.serving_s
        machine_s = last.machine_s - first.machine_s
        return CpuUse(
            worker_s_per_image=worker_s / images,
            serving_s_per_image=serving_s / images,
            cores_taken=max(0.0, (machine_s - worker_s - serving_s) / wall_s),
            cores_idle=max(0.0, len(os.sched_getaffinity(0)) - machine_s / wall_s),
        )


@dataclass(slots=True)
class Companion:
    """Another worker beside the first, and its log."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Session:
    """A worker that runs, and what is known of it."""

    server: DevServer
    enclosure: Enclosure
    data: Path
    samples: Samples = field(default_factory=Samples)
    lines: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    max_usage_bytes: int | None = None
    oom_kills: int | None = None
    worker_pids: set[int] = field(default_factory=set)  # all there ever were: a zombie has left the cgroup
    shared_left_bytes: int = 0  # shared memory that outlived them
    _sampling: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, command: Sequence[str], extra: Mapping[str, str]) -> None:
        """Start a worker, whose JSON log goes to `lines`."""
        self.process = self.enclosure.spawn(command, self._environment(extra))
        self._run_thread(self._read, self.process, self.lines)
        self._run_thread(self._sample)

    def also_start(self, command: Sequence[str], extra: Mapping[str, str]) -> Companion:
        """Start another worker in the same enclosure, with the same files."""
        other = Companion(self.enclosure.spawn(command, self._environment(extra)))
        self._run_thread(self._read, other.process, other.lines)
        return other

    def _environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AMI_")}
        return inherited | {
            "AMI_ANTENNA_API_BASE_URL": self.server.api_url,
            "AMI_ANTENNA_API_AUTH_TOKEN": self.server.token,
            "AMI_USER_DATA_PATH": str(self.data),
            "AMI_ANTENNA_IDLE_SLEEP_SECONDS": "0.5",
            "AMI_LOG_FORMAT": "json",
            **extra,
        }

    def _run_thread(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name=target.__name__, daemon=True)
        thread.start()
        self._threads.append(thread)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the worker's end; None when it did not end in time."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def work_off(self, urls: list[str], timeout_s: float) -> int:
        """Give the worker a job, wait until every image of it is done, and return the job's number."""
        job_id, until_s = self.server.add_job("simulated", urls), time.monotonic() + timeout_s
        while sum(summary["done"] for summary in self.events("job_summary", job_id=job_id)) < len(urls):
            if time.monotonic() > until_s:
                raise SystemExit(f"job {job_id} did not end within {timeout_s:.0f} s: {self.lines[-3:]}")
            time.sleep(0.1)
        return job_id

    def saved(self, job_id: int) -> Job:
        """Return the job once the server has saved what was posted."""
        deadline, last = time.monotonic() + SAVED_TIMEOUT_S, -1
        while (view := self.server.job(job_id)).processed != last and time.monotonic() < deadline:
            last = view.processed
            time.sleep(0.3)
        return view

    def events(self, name: str, lines: Sequence[str] | None = None, job_id: int | None = None) -> list[dict[str, Any]]:
        """Return the log lines of an event, of the first worker unless told otherwise; `at_s` is the wall clock."""
        found = []
        for line in list(self.lines if lines is None else lines):
            if f'"{name}"' not in line:
                continue
            with suppress(json.JSONDecodeError):
                event = json.loads(line)
                if event["event"] == name and job_id in (None, event.get("job_id")):
                    found.append(event | {"at_s": datetime.fromisoformat(event["timestamp"]).timestamp()})
        return found

    def finish(self) -> None:
        self.max_usage_bytes, self.oom_kills = self.enclosure.max_usage_bytes(), self.enclosure.oom_kills()
        self._sampling.set()

    def _read(self, process: subprocess.Popen[str], lines: list[str]) -> None:
        assert process.stderr is not None
        with process.stderr as stream:
            for line in stream:
                lines.append(line.rstrip("\n"))  # noqa: PERF401 (others read meanwhile)

    def _sample(self) -> None:
        cpu_due = 0.0
        while not self._sampling.wait(SAMPLE_S):
            now = time.time()
            try:
                self.samples.held.append((now, self.enclosure.held_bytes()))
                if (charged := self.enclosure.usage_bytes()) is not None:
                    self.samples.charged.append((now, charged))
                if now >= cpu_due:
                    cpu_due = now + CPU_SAMPLE_S
                    self.worker_pids.update(self.enclosure.pids())
                    self.samples.cpu.append(_cpu_sample(now, self.worker_pids))
            except FileNotFoundError:
                return  # the cgroup is gone


@contextmanager
def session(limit_bytes: int, data: Path) -> Iterator[Session]:
    """Bring a server and an enclosure up; at the end nothing of either is left."""
    with DevServer(save_delay_s=0.0) as server, ExitStack() as stack:
        enclosure = stack.enter_context(enclose(limit_bytes))
        running = Session(server, enclosure, data)
        try:
            yield running
        finally:
            running.finish()
            stack.close()
            running.shared_left_bytes = remove_shared(frozenset(running.worker_pids))


@contextmanager
def simulated_worker(limit_bytes: int, gpu_s: float, folder: Path, *files: str) -> Iterator[tuple[Session, list[Path]]]:
    """Yield a worker whose GPU is a sleep, and the files of these names by which `bench_worker.py` is told what to do.

    The first of them, which holds fields of plans, is there; whatever else is in its folder goes with the worker.
    """
    with tempfile.TemporaryDirectory(dir=folder) as data, session(limit_bytes, Path(data)) as running:
        paths = [Path(data) / name for name in files]
        paths[0].write_text("{}")
        settings = {"AMI_SIMULATED_SECONDS_PER_IMAGE": str(gpu_s)} | CHILD_ENVIRONMENT
        running.start([*DECODING_IN_PROCESSES, *map(str, paths)], settings)
        try:
            yield running, paths
        finally:
            assert running.process is not None
            os.killpg(running.process.pid, signal.SIGKILL)


def flow(batches: Sequence[Mapping[str, Any]], depth: int) -> Flow:
    """Return the flow from the first batch out to the last one admitted: that is when `depth` were still to come."""
    inside = batches[: max(2, len(batches) - depth)]
    if len(inside) < 2:
        return Flow(0.0, 0.0, 0)
    return Flow(inside[0]["at_s"], inside[-1]["at_s"], sum(batch["images"] for batch in inside[1:]))


def remove_shared(pids: AbstractSet[int], folder: Path = SHARED) -> int:
    """Remove what these ended processes left of torch's shared memory, else memory until a reboot; return its bytes."""
    left = [file for pid in pids for file in folder.glob(f"torch_{pid}_*")]
    size_bytes = sum(file.stat().st_blocks * _STAT_BLOCK_BYTES for file in left)
    for file in left:
        file.unlink()
    return size_bytes


def census(pids: Sequence[int]) -> Counter[str]:
    """Count processes, threads and open files."""
    found: Counter[str] = Counter()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found.update(processes=1, threads=process.num_threads(), files=process.num_fds())
    return found


def _cpu_sample(now: float, worker_pids: AbstractSet[int]) -> CpuSample:
    machine = psutil.cpu_times()
    busy_s = sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
    own = psutil.Process()
    serving = {own.pid, *(child.pid for child in own.children(recursive=True))} - worker_pids
    return CpuSample(now, busy_s, sum(map(_cpu_s, worker_pids)), sum(map(_cpu_s, serving)))


def _cpu_s(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return 0.0
