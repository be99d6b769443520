"""Each fault once: whatever ends, hangs or signals a worker, it comes back, loses nothing, blames no innocent image."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest

from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from adc_worker.errors import ExitCode
from adc_worker.runtime.supervisor import SAME_SIGNAL_S
from tests.support import faulty_pipeline
from tests.support.faulty_pipeline import CRASH, HANG, HANG_WITH_GIL, HELPER, photograph
from tests.support.image_server import ImageServer, Reply
from tests.support.images import jpeg
from tests.support.process_tree import alive, anonymous_peak_bytes, decoders, family, ignores
from tests.support.waiting import wait_until
from tests.support.workers import REPOSITORY, environment, run_to_end, worker

SIMULATED = ("--pipeline", "simulated")
FAULTY = {"AMI_EXTRA_PIPELINES": "tests.support.faulty_pipeline:pipelines"}
PARENT_BYTES = 60_000_000  # numpy and the command line, without torch
GONE_S = 3.0  # the same
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENCE_S = 180.0  # for five starts on a busy machine
DRAINED = 120  # images: six seconds, so that a drain finds some to do though this process is slow to ask for it


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DevServer]:
    with DevServer(save_delay_s=0.005, keep_streams=True, image_dir=tmp_path) as running:
        yield running


@pytest.fixture
def sheets(tmp_path: Path) -> list[Path]:
    return write_sheets(tmp_path / "sheets", 4, seed=3, sizes=((640, 480), (480, 640)))


def assert_complete(server: DevServer, job_id: int) -> None:
    """Every image has its result, from one delivery, and none is blamed."""
    wait_until(lambda: server.job(job_id).status == "SUCCESS")
    job = server.job(job_id)
    assert set(job.results) == set(job.image_ids)
    assert not job.errors
    assert set(job.deliveries.values()) == {1}


def test_no_process_is_left_whichever_of_them_is_killed(server: DevServer, sheets: list[Path], tmp_path: Path) -> None:
    """Child, then parent, in the middle of a job with decode processes; the next start finishes it without a loss."""
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(40)])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.1"})
    with worker(env, *SIMULATED) as running:
        running.wait_for("batch", count=2)
        parent, child = running.process.pid, running.child_pid()
        assert anonymous_peak_bytes(parent) < PARENT_BYTES
        assert os.getsid(child) == child
        assert all(ignores(child, number) for number in STOP_SIGNALS)
        scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (parent, child)]
        assert scores[0] < scores[1]
        below = family(child)
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: not alive(below), GONE_S)
        # What it was at is suspect now, and decoded in processes.
        wait_until(lambda: decoders(parent), 120)
        assert running.events("journal_open")[-1]["suspects"] > 0
        everybody = family(parent)
        assert len(everybody) >= 3  # a second decode process may be just starting
        running.process.kill()
        wait_until(lambda: not alive(everybody), GONE_S)
    code, _log = run_to_end(env, *SIMULATED, "--exit-when-idle")
    assert code == ExitCode.OK
    assert_complete(server, job_id)
    assert server.requests["GET images"] <= 40 + 2 * 32, "downloads that were under way are asked for again, no others"


class Manager:
    """Listens on NOTIFY_SOCKET, as systemd does."""

    def __init__(self, address: Path) -> None:
        self.address = str(address)
        self.told: list[str] = []

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._thread = threading.Thread(target=self._listen, name="manager")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.sendto(b"", self.address)
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while message := self._socket.recv(4096):
            self.told += message.decode().splitlines()


def test_a_group_signal_and_a_forwarded_one_count_once(server: DevServer, sheets: list[Path], tmp_path: Path) -> None:
    """Its manager hears that the worker is ready, lives, works and stops; the drain finishes what is admitted."""
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(DRAINED)])
    with Manager(tmp_path / "notify") as manager:
        extra = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "400000", "AMI_SIMULATED_SECONDS_PER_IMAGE": "0.05"}
        env = environment(server, tmp_path / "data", extra)
        with worker(env, *SIMULATED) as running:
            running.wait_for("batch", count=2)
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
                os.killpg(running.process.pid, number)
            assert running.wait() == ExitCode.OK
    told = manager.told
    assert [event["how"] for event in running.events("stopping")] == ["drain"]
    (summary,) = running.events("job_summary")
    assert summary["done"] == 2 + sum(event["images"] for event in running.events("batch"))
    assert 0 < summary["done"] < DRAINED
    working = [line.startswith(f"STATUS=job {job_id}: ") for line in told].index(True)
    assert told.index("READY=1") < working < told.index("STOPPING=1")
    assert told.count("WATCHDOG=1") > 5
    assert told.count("STOPPING=1") == 1


def test_a_second_signal_leaves_what_is_admitted_to_the_next_start(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """It goes after the batch in hand; nothing is inferred, downloaded or delivered twice."""
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(12)])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "1"})
    with worker(env, *SIMULATED) as running:
        running.wait_for("plan")
        wait_until(lambda: server.requests["GET images"] == 12)
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("stopping")
        later = time.monotonic() + SAME_SIGNAL_S
        wait_until(lambda: time.monotonic() > later)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == ExitCode.OK
    assert [event["how"] for event in running.events("stopping")] == ["drain", "flush"]
    done = running.events("job_summary")[0]["done"]
    assert done < 12
    code, after = run_to_end(env | {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.01"}, *SIMULATED, "--exit-when-idle")
    assert code == ExitCode.OK
    assert after.events("job_summary")[0]["done"] == 12 - done
    assert after.events("journal_open")[0]["suspects"] == 0
    assert_complete(server, job_id)


@pytest.mark.timeout(2 * PATIENCE_S)
def test_an_image_that_crashes_the_decoder_or_the_model_costs_itself_only(server: DevServer, tmp_path: Path) -> None:
    """Real SIGSEGVs, among images of the same batches: two errors that name them, one result for each of the others."""
    good = [
        photograph(tmp_path / f"{number}.png") for number in range(8)
    ]  # ten tasks in all: none is being fetched at a crash, and waits for its lease
    crashing = photograph(tmp_path / "crash.png", CRASH)
    undecodable = tmp_path / "crash.jpg"
    undecodable.write_bytes(jpeg(64, 48)[:2] + b"\xff\xfe\x00\x13crash the decoder" + jpeg(64, 48)[2:])
    job_id = server.add_job("faulty", [*good[:4], crashing, *good[4:7], undecodable, *good[7:]])
    paths = f"{REPOSITORY}:{Path(faulty_pipeline.__file__).parent / 'crashing_decoder'}"
    leaving = {"AMI_EXTRA_PIPELINES": "tests.support.faulty_pipeline:leaving_processes", "PYTHONPATH": paths}
    env = environment(server, tmp_path / "data", leaving)
    with worker(env, "--exit-when-idle", cwd=tmp_path) as log:
        assert log.process.wait(PATIENCE_S) == ExitCode.OK
    wait_until(lambda: server.job(job_id).processed == 10)
    job = server.job(job_id)
    told = dict(zip(job.image_ids, range(10), strict=True))
    assert {told[image_id]: reason for image_id, reason in job.errors.items()} == {
        4: "processing it alone ended the worker 2 times (SIGSEGV, SIGSEGV)",
        8: "decoding it crashed the decoder 2 times (SIGSEGV)",
    }
    assert len(job.results) == 8
    assert set(job.deliveries.values()) == {1}  # a post that was under way at a crash is made again, and counted once
    ends = log.events("child_ended")
    assert {event["exit"] for event in ends} == {"SIGSEGV"}
    assert len(ends) <= 5, "one death and two strikes of the model's, one death of the decoder's, and one to spare"
    assert any("faulty_pipeline.py" in line and "in detect" in line for line in log.lines), "where, for who mends it"
    helpers = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == list(HELPER)]
    ours = [process.pid for process in alive(helpers) if process.cwd() == str(tmp_path)]
    assert not ours, "what a dead child started is gone, too"


def test_a_thread_that_dies_ends_its_child_by_name(server: DevServer, tmp_path: Path) -> None:
    """Whichever it is, with what it died of; another child starts."""
    ill = {"AMI_EXTRA_PIPELINES": "tests.support.faulty_pipeline:with_a_thread_that_dies"}
    with worker(environment(server, tmp_path / "data", ill)) as running:
        assert running.wait_for("child_ended")["exit"] == ExitCode.BACKGROUND_TASK_DIED.name
        assert running.events("worker_fault")[0]["error"] == "ill died: IndexError('pop from empty list')"
        running.wait_for("child_started", count=2)


@pytest.mark.parametrize("hang", [HANG, HANG_WITH_GIL])
def test_a_hang_ends_with_the_stacks_of_all_threads_and_a_restart(
    server: DevServer, tmp_path: Path, hang: tuple[int, int, int]
) -> None:
    """What hangs is suspect then, and the child that follows begins with something else."""
    files = [photograph(tmp_path / f"{number}.png") for number in range(6)]
    files.insert(3, photograph(tmp_path / "hang.png", hang))
    server.add_job("faulty", files)
    env = environment(server, tmp_path / "data", FAULTY | {"AMI_ANTENNA_ACK_WAIT_SECONDS": "6"})
    with worker(env) as running:
        running.wait_for("child_hung")
        assert running.wait_for("child_ended")["exit"] == ExitCode.HUNG.name
        assert running.wait_for("journal_open", count=2)["suspects"] > 0
        stacks = "\n".join(line for line in running.lines if not line.startswith("{"))
        assert "faulty_pipeline.py" in stacks
        assert stacks.count("Thread 0x") + stacks.count("Current thread 0x") > 4


def test_a_slow_link_is_no_hang(tmp_path: Path) -> None:
    """No image comes within its lease, for longer than the worker may be silent: that is the link's fault."""
    lease_s = 1.0
    image = jpeg(900, 700)
    with DevServer(save_delay_s=0.005, ack_wait_s=lease_s, keep_streams=True) as server, ImageServer() as images:
        for path in ("/0.jpg", "/1.jpg"):
            images.replies[path] = Reply(image, bytes_per_s=len(image) / (3 * lease_s))
        job_id = server.add_job("simulated", map(images.url, images.replies))
        extra = {"AMI_ANTENNA_ACK_WAIT_SECONDS": str(lease_s)}
        with worker(environment(server, tmp_path / "data", extra), *SIMULATED) as running:
            wait_until(lambda: server.job(job_id).failed == 2, 120)
        assert not running.events("child_hung")
        assert not running.events("child_ended")
        assert all("not downloadable in 2 deliveries" in text for text in server.job(job_id).errors.values())


@pytest.mark.parametrize(
    "bound", ["AMI_WORKER_MAX_RSS_MB", pytest.param("AMI_WORKER_MAX_JOBS", marks=pytest.mark.soak)]
)
def test_a_child_is_replaced_between_jobs(server: DevServer, sheets: list[Path], tmp_path: Path, bound: str) -> None:
    """After one job, or when it has more than a megabyte: at once, by name, and the next job is the next child's."""
    env = environment(server, tmp_path / "data", {bound: "1", "AMI_SIMULATED_SECONDS_PER_IMAGE": "0"})
    jobs = [server.add_job("simulated", sheets) for _ in range(2)]
    with worker(env, *SIMULATED) as running:
        wait_until(lambda: all(server.job(job_id).status == "SUCCESS" for job_id in jobs), 120)
        running.wait_for("recycled", count=2)
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == ExitCode.OK
    assert not running.events("child_ended")
    assert len({event["pid"] for event in running.events("job_summary")}) == 2


def test_five_starts_and_stops_leave_nothing_behind(server: DevServer, sheets: list[Path], tmp_path: Path) -> None:
    """At five stages, by each signal, to process and group in turn: exit 0, no process, no suspect; the job ends."""
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(DRAINED)])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.05"})
    for number, stage in enumerate(("child_started", "journal_open", "worker_ready", "plan", "batch")):
        with worker(env, *SIMULATED, within=("env", "--default-signal=HUP")) as running:  # these tests may run by nohup
            running.wait_for(stage)
            everybody = family(running.process.pid)
            (os.killpg if number % 2 else os.kill)(running.process.pid, STOP_SIGNALS[number % 4])
            assert running.wait() == ExitCode.OK
            assert not alive(everybody)
        assert all(event["suspects"] == 0 for event in running.events("journal_open"))
    code, _log = run_to_end(env | {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.01"}, *SIMULATED, "--exit-when-idle")
    assert code == ExitCode.OK
    assert_complete(server, job_id)


def test_images_that_end_the_worker_get_no_error_where_none_ever_succeeded(server: DevServer, tmp_path: Path) -> None:
    """A CPU that torch cannot run on, a broken driver: the machine says what is wrong, and the images wait."""
    images = [photograph(tmp_path / f"{number}.png", CRASH) for number in range(2)]
    job_id = server.add_job("faulty", images, algorithms=[("Faulty", "faulty", "localization")])
    with worker(environment(server, tmp_path / "data", FAULTY)) as running:
        line = running.wait_for("images_that_ended_the_worker_wait")
        assert line["images"] == 2
        assert {event["exit"] for event in running.events("child_ended")} == {"SIGSEGV"}
        assert server.job(job_id).errors == {}
        assert server.job(job_id).results == {}
    server.cancel(job_id)
