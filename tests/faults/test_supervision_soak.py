"""Many faults in a row. `make soak` runs them all; SOAK_SHARE=0.2 takes a fifth of the repetitions.

What came of it goes into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import psutil
import pytest

from adc_worker.desk.job import Job
from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from adc_worker.errors import ExitCode
from benchmarks.support.cgroup import enclose
from benchmarks.support.report import commit, machine, table, write_section
from tests.support.faulty_pipeline import EAT, HANG, photograph
from tests.support.gate import Gate
from tests.support.process_tree import alive, family
from tests.support.waiting import wait_until
from tests.support.workers import REPOSITORY, WorkerProcess, environment, run_to_end, worker

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

SHARE = float(os.environ.get("SOAK_SHARE", "1"))
KILLS, STARTS = max(3, int(20 * SHARE)), max(5, int(50 * SHARE))
SIMULATED, BLOBS = ("--pipeline", "simulated"), ("--pipeline", "light_sheet_blobs")
FAULTY = {"AMI_EXTRA_PIPELINES": "tests.support.faulty_pipeline:pipelines"}
GONE_S = 3.0
PATIENCE_S = 120.0
ALL_FAULTS = 8
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")  # Debian's package libfaketime
STAGES = ("child_started", "journal_open", "worker_ready", "plan", "batch")

Record = Callable[[str, str, Job], None]


@pytest.fixture(scope="module")
def record() -> Iterator[Record]:
    """Collect what came of each fault, and put it into RESULTS.md at the end."""
    rows: list[tuple[object, ...]] = []

    def add(fault: str, happened: str, job: Job) -> None:
        again = sum(count - 1 for count in job.deliveries.values())
        rows.append((fault, happened, f"{len(job.results)} of {len(job.image_ids)}", len(job.errors), again))

    yield add
    head = ("fault", "what happened", "results saved", "images blamed", "delivered again")
    text = (
        f"## Faults (`tests/faults/test_supervision_soak.py`)\n\n{machine()}, commit {commit()},"
        f" {SHARE:.0%} of the repetitions. One run.\n\n{table(head, rows)}"
    )
    if len(rows) == ALL_FAULTS:  # a choice of them leaves the table alone
        write_section("faults", text)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DevServer]:
    with DevServer(save_delay_s=0.005, keep_streams=True, image_dir=tmp_path) as running:
        yield running


@pytest.fixture
def sheets(tmp_path: Path) -> list[Path]:
    return write_sheets(tmp_path / "sheets", 4, seed=3, sizes=((640, 480), (480, 640)))


def finished(server: DevServer, job_id: int, died: Collection[str] = ()) -> Job:
    """Return the job when every image has its outcome, from one delivery each.

    Those whose task `died` on its way to a worker that was killed come again after their lease of 300 s.
    """
    wait_until(lambda: server.job(job_id).status == "SUCCESS", PATIENCE_S + (300.0 if died else 0.0))
    job = server.job(job_id)
    assert set(job.results) | set(job.errors) == set(job.image_ids)
    assert {image_id for image_id, count in job.deliveries.items() if count > 1} <= set(died)
    return job


def _cut_off(running: WorkerProcess, chance: random.Random) -> tuple[str, list[psutil.Process]]:
    """Kill the child, the parent, or both at once, at any stage of a start or of the work."""
    running.wait_for("child_started")
    if chance.random() < 0.75:
        batches = len(running.events("batch"))
        running.wait_for("batch", count=batches + 1, timeout_s=PATIENCE_S)
    later = time.monotonic() + chance.uniform(0, 1.5)
    wait_until(lambda: time.monotonic() > later)
    parent = psutil.Process(running.process.pid)
    children = parent.children()
    who = chance.choice(["child", "parent", "both"]) if children else "parent"
    doomed = [process for child in children for process in family(child.pid)]
    if who != "child":
        doomed.append(parent)
    for process in [*children] if who == "child" else [parent] if who == "parent" else [parent, *children]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return who, doomed


def test_kills_at_random_moments_lose_and_blame_nothing(
    server: DevServer, sheets: list[Path], tmp_path: Path, record: Record
) -> None:
    """One job of 200 images, kill -9 of child, parent or both, seeded; three seconds later nothing of it is left."""
    chance = random.Random(7)  # noqa: S311 (no secret)
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(200)])
    kills: Counter[str] = Counter()
    died: set[str] = set()
    with Gate(server.api_url) as gate:
        extra = {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.3", "AMI_ANTENNA_API_BASE_URL": gate.api_url}
        env = environment(server, tmp_path / "data", extra)
        while kills.total() < KILLS and server.job(job_id).status != "SUCCESS":
            with worker(env, *SIMULATED) as running:
                who = "child"
                while who == "child" and kills.total() < KILLS:
                    who, doomed = _cut_off(running, chance)
                    kills[who] += 1
                    wait_until(lambda doomed=doomed: not alive(doomed), GONE_S)  # type: ignore[misc]
                    processed = server.job(job_id).processed_ids
                    died |= gate.died_on_the_way(tmp_path / "data" / "adc_journal.db", processed)
        with worker(env, *SIMULATED):
            job = finished(server, job_id, died)
    assert not job.errors
    happened = ", ".join(f"{n} {who}" for who, n in kills.items())
    record(f"{kills.total()} random kills of one job", f"{happened}; {len(died)} tasks died on their way", job)


def test_starts_and_stops_leave_nothing_behind(
    server: DevServer, sheets: list[Path], tmp_path: Path, record: Record
) -> None:
    """SIGTERM at each stage of a start, to the process and to its group in turn: exit 0 and no process."""
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(20 * STARTS)])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.02"})
    for number in range(STARTS):
        with worker(env, *SIMULATED) as running:
            running.wait_for(STAGES[number % len(STAGES)], timeout_s=PATIENCE_S)
            everybody = family(running.process.pid)
            (os.killpg if number // len(STAGES) % 2 else os.kill)(running.process.pid, signal.SIGTERM)
            assert running.wait() == ExitCode.OK, running.lines
            assert not alive(everybody)
        assert all(event["suspects"] == 0 for event in running.events("journal_open"))
    code, _log = run_to_end(env, *SIMULATED, "--exit-when-idle")
    assert code == ExitCode.OK
    job = finished(server, job_id)
    assert not job.errors
    record(f"{STARTS} starts and stops", "by process and by group, at 5 stages; exit 0 each time", job)


def test_a_terminal_that_is_closed_is_a_drain(
    server: DevServer, sheets: list[Path], tmp_path: Path, record: Record
) -> None:
    """With the live view, whose every line fails from then on: that ends nothing early."""
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(60)])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.05"})
    terminal, end = os.openpty()
    running = subprocess.Popen(
        ["env", "--default-signal=HUP", sys.executable, "-m", "adc_worker", "worker", *SIMULATED],
        env={name: value for name, value in env.items() if name != "AMI_LOG_FORMAT"},
        stdin=end, stdout=end, stderr=end, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 (no other thread)
    )  # fmt: skip
    os.close(end)
    shown = b""
    while server.job(job_id).processed < 10:
        shown += os.read(terminal, 1 << 16)
    assert b"Antenna worker" in shown
    everybody = family(running.pid)
    os.close(terminal)
    assert running.wait(PATIENCE_S) == ExitCode.OK
    assert not alive(everybody)
    code, log = run_to_end(env, *SIMULATED, "--exit-when-idle")
    assert code == ExitCode.OK
    assert log.events("journal_open")[0]["suspects"] == 0
    job = finished(server, job_id)
    assert not job.errors
    record("a terminal that is closed", "SIGHUP, and no output any more: a drain, exit 0", job)


class Supervisord:
    """supervisord with docs/deploy/supervisord.conf, its paths put into a folder."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        text = (REPOSITORY / "docs/deploy/supervisord.conf").read_text()
        command = f"{sys.executable} -m adc_worker worker --pipeline simulated"
        for old, new in (
            ("/opt/adc-worker/bin/ami worker", command),
            ("/etc/adc-worker", str(folder)),
            ("/run/adc-worker", str(folder)),
            ("/var/log/adc-worker", str(folder)),
            ("/var/lib/adc-worker", str(folder / "data")),
            ("minfds = 65536", "minfds = 1024"),
        ):
            assert old in text, f"the file in docs/deploy has no {old}"
            text = text.replace(old, new)
        self._conf = folder / "supervisord.conf"
        self._conf.write_text(text)
        self._env, self._log = dict(env), folder / "worker.log"

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command("supervisord", "--nodaemon"), env=self._env)
        wait_until(lambda: "RUNNING" in self.control("status"), PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def control(self, *arguments: str) -> str:
        command = self._command("supervisorctl", *arguments)
        return subprocess.run(command, env=self._env, capture_output=True, text=True, check=False).stdout

    def pid(self) -> int:
        return int(self.control("pid", "adc-worker"))

    def count(self, event: str) -> int:
        return self._log.read_text().count(f'"event": "{event}"') if self._log.exists() else 0

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"supervisor.{program}", "-c", str(self._conf), *arguments]


def test_under_supervisord_stops_and_kills_leave_nothing_behind(
    server: DevServer, sheets: list[Path], tmp_path: Path, record: Record
) -> None:
    """With the file from docs/deploy: a stop at each stage is a drain, a killed worker comes back."""
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(200)])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.05"})
    stops = 0
    with Gate(server.api_url) as gate, Supervisord(tmp_path, env | {"AMI_ANTENNA_API_BASE_URL": gate.api_url}) as desk:
        for stage in STAGES:
            before = desk.count(stage)
            desk.control("start", "adc-worker")
            wait_until(lambda stage=stage, before=before: desk.count(stage) > before, PATIENCE_S)  # type: ignore[misc]
            everybody = family(desk.pid())
            assert "stopped" in desk.control("stop", "adc-worker")
            wait_until(lambda everybody=everybody: not alive(everybody), GONE_S)  # type: ignore[misc]
            stops += 1
        before = desk.count("batch")
        desk.control("start", "adc-worker")
        wait_until(lambda: desk.count("batch") > before, PATIENCE_S)
        everybody = family(desk.pid())
        os.kill(everybody[0].pid, signal.SIGKILL)
        wait_until(lambda: not alive(everybody), GONE_S)
        died = gate.died_on_the_way(tmp_path / "data" / "adc_journal.db", server.job(job_id).processed_ids)
        wait_until(lambda: "RUNNING" in desk.control("status"), PATIENCE_S)
        job = finished(server, job_id, died)
        desk.control("stop", "adc-worker")
    assert not job.errors
    log = (tmp_path / "supervisord.log").read_text()
    assert log.count("exit status 0") + log.count("stopped: adc-worker (exit status 0)") >= stops
    record("supervisord", f"{stops} stops, one at each stage, and a kill -9 of the parent", job)


def test_64_descriptors_are_enough(server: DevServer, sheets: list[Path], tmp_path: Path, record: Record) -> None:
    """A limit that cannot be raised makes nothing fail and blames no image."""
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(100)])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.01"})
    command = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", sys.executable, "-m", "adc_worker", "worker", *SIMULATED]
    with _started([*command, "--exit-when-idle"], env) as running:
        assert running.wait() == ExitCode.OK, "\n".join(running.lines)
    job = finished(server, job_id)
    assert not job.errors
    ends = Counter(event["exit"] for event in running.events("child_ended"))
    record("64 descriptors (EMFILE)", f"child ended {dict(ends)}" if ends else "child never ended", job)


@contextmanager
def _started(command: list[str], env: Mapping[str, str]) -> Iterator[WorkerProcess]:
    process = subprocess.Popen(command, env=dict(env), stderr=subprocess.PIPE, text=True, start_new_session=True)
    running = WorkerProcess(process)
    try:
        yield running
    finally:
        for member in family(process.pid) if process.poll() is None else []:
            member.kill()
        running.wait()


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs Debian's libfaketime")
def test_a_clock_that_jumps_loses_nothing(
    server: DevServer, sheets: list[Path], tmp_path: Path, record: Record
) -> None:
    """A day ahead, then two days back, in the middle of a job: durations are measured on another clock.

    libfaketime breaks time.sleep, which is all that `simulated` does.
    """
    job_id = server.add_job("light_sheet_blobs", [sheets[index % 4] for index in range(120)])
    clock = tmp_path / "clock"

    def set_clock(offset: timedelta) -> None:
        fresh = clock.with_suffix(".new")
        fresh.write_text(f"{offset.total_seconds():+.0f}")
        fresh.replace(clock)

    set_clock(timedelta())
    faked = {"FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    extra = {"LD_PRELOAD": str(FAKETIME), **faked}
    with worker(environment(server, tmp_path / "data", extra), *BLOBS, "--exit-when-idle") as running:
        running.wait_for("batch")
        set_clock(timedelta(days=1))
        running.wait_for("batch", count=4)
        ahead = datetime.fromisoformat(running.events("batch")[-1]["timestamp"])
        set_clock(timedelta(days=-2))
        assert running.wait() == ExitCode.OK
    assert ahead - datetime.now(UTC) > timedelta(hours=23), "the jump was seen"
    job = finished(server, job_id)
    assert not job.errors
    assert not running.events("child_ended")
    record("clock jumps", "+1 day, then -2 days, within one job", job)


def test_an_image_that_eats_all_memory_costs_itself_only(server: DevServer, tmp_path: Path, record: Record) -> None:
    """The kernel kills the child three times, counts it, and the image that was alone then is named."""
    files = [photograph(tmp_path / f"{number}.png") for number in range(8)]
    files.insert(4, photograph(tmp_path / "eat.png", EAT))
    job_id = server.add_job("faulty", files)
    env = environment(server, tmp_path / "data", FAULTY)
    with enclose(1_500_000_000) as enclosure:
        if enclosure.oom_kills() is None:
            pytest.skip("no memory cgroup can be made here")
        command = [sys.executable, "-m", "adc_worker", "worker", "--exit-when-idle"]
        running = WorkerProcess(enclosure.spawn(command, env))
        assert running.wait() == ExitCode.OK
        kills = enclosure.oom_kills()
        assert running.process.stdin is not None
        running.process.stdin.close()
    job = finished(server, job_id)
    assert list(job.errors.values()) == [
        "processing it alone ended the worker 2 times (out of memory, out of memory)"
    ], "\n".join(running.lines)
    record("a model that eats all memory at one image", f"{kills} kernel OOM kills, the parent lived", job)


def test_an_image_that_hangs_the_model_costs_itself_only(tmp_path: Path, record: Record) -> None:
    """Ended once among others and twice alone, after which it is named.

    A hang is seen after half a lease: those that wait behind three of them are delivered again.
    """
    files = [photograph(tmp_path / f"{number}.png") for number in range(8)]
    files.insert(4, photograph(tmp_path / "hang.png", HANG))
    env = FAULTY | {"AMI_ANTENNA_ACK_WAIT_SECONDS": "24"}
    with DevServer(save_delay_s=0.005, keep_streams=True, image_dir=tmp_path, ack_wait_s=24.0) as server:
        job_id = server.add_job("faulty", files)
        with worker(environment(server, tmp_path / "data", env), "--exit-when-idle") as running:
            assert running.process.wait(3 * PATIENCE_S) == ExitCode.OK
        job = finished(server, job_id, server.job(job_id).image_ids)
    assert list(job.errors.values()) == ["processing it alone ended the worker 2 times (HUNG, HUNG)"]
    assert max(job.deliveries.values()) <= 2
    ends = Counter(event["exit"] for event in running.events("child_ended"))
    record("a model that hangs at one image", f"child ended {dict(ends)}", job)
