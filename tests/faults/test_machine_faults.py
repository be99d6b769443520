"""What is this machine's or the link's fault never becomes an error on an image, and is over when its cause is."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from adc_worker.errors import ExitCode
from adc_worker.ingest.download import READ_TIMEOUT_S
from tests.faults.conftest import Desk
from tests.support import counting_pipeline
from tests.support.counting_pipeline import numbered
from tests.support.image_server import ImageServer, Reply
from tests.support.waiting import wait_until
from tests.support.workers import run_to_end, worker

DISK_BYTES = 64_000_000


def test_one_image_host_that_is_down_stops_the_tasks_that_need_it_and_no_other_job(desk: Desk) -> None:
    """No errors, one line that says what to do, and when the host is back its job goes on by itself.

    A host that takes connections and says nothing keeps a small job waiting no longer than one that is gone.
    """
    with ImageServer() as host:
        port = host.port
    waiting = desk.add_job(8, host=host)  # whose server is gone
    other = desk.add_job(20, first=100)
    with ExitStack() as after_the_worker, worker(desk.environment()) as running:
        desk.done(other)
        line = running.wait_for("image_host_at_fault")
        assert line["host"] == f"127.0.0.1:{port}"
        assert "network and firewall" in line["do"]
        assert not desk.antenna.job(waiting).errors
        mute = after_the_worker.enter_context(ImageServer())
        over = threading.Event()
        after_the_worker.callback(over.set)
        mute.replies |= {f"/{number}.png": partial(_when, over, number) for number in range(300, 320)}
        desk.add_job(20, first=300, host=mute)
        wait_until(lambda: mute.requests, timeout_s=60)
        later = desk.add_job(8, first=200)
        desk.done(later, timeout_s=0.9 * READ_TIMEOUT_S)  # it does not wait until the mute one is given up
        back = after_the_worker.enter_context(ImageServer(port=port))
        back.replies |= {f"/{number}.png": Reply(numbered(number)) for number in range(8)}
        job = desk.done(waiting)
        running.wait_for("image_host_back")
    assert set(job.deliveries.values()) == {1}
    assert [one["host"] for one in running.events("image_host_at_fault")].count(f"127.0.0.1:{port}") == 1


def _when(over: threading.Event, number: int) -> Reply:
    over.wait()
    return Reply(numbered(number))


@pytest.mark.soak
def test_a_proxy_that_is_down_is_named_and_costs_no_image(desk: Desk) -> None:
    """Antenna is reached without it; images are not."""
    with ImageServer() as proxy:
        port = proxy.port
    url = "http://images.test:81/7.png"
    job_id = desk.antenna.add_job(counting_pipeline.SLUG, [url])
    desk.jobs.append(job_id)
    env = desk.environment({"http_proxy": f"http://127.0.0.1:{port}", "no_proxy": "127.0.0.1"})
    with ExitStack() as after_the_worker, worker(env) as running:
        assert "HTTP_PROXY" in running.wait_for("image_host_at_fault")["do"]
        back = after_the_worker.enter_context(ImageServer(port=port))
        back.replies[url] = Reply(numbered(7))
        desk.done(job_id)


@pytest.mark.soak
def test_many_images_that_fail_alike_are_the_hosts_fault(desk: Desk) -> None:
    """A sign-in page in place of every photograph: a few errors before that is clear, and none after it."""
    for number in range(40):
        desk.images.replies[f"/{number}.png"] = Reply(b"<html>Sign in</html>", headers={"Content-Type": "text/html"})
    job_id = desk.add_job(40)
    with worker(desk.environment()) as running:
        assert "in a browser" in running.wait_for("image_host_at_fault")["do"]
        for number in range(40):
            desk.images.replies[f"/{number}.png"] = Reply(numbered(number))
        wait_until(lambda: desk.antenna.job(job_id).status == "SUCCESS", timeout_s=120)
    job = desk.antenna.job(job_id)
    assert len(job.errors) <= 4
    assert len(job.results) == 40 - len(job.errors)


def test_a_cuda_error_ends_the_process_and_costs_no_image(desk: Desk) -> None:
    """Its exit code has a name; the process that comes after it finishes the job."""
    desk.switch("broken", on=True)
    job_id = desk.add_job(20)
    with worker(desk.environment(), "--exit-when-idle") as running:
        assert running.wait_for("child_ended")["exit"] == ExitCode.GPU_FAULT.name
        desk.switch("broken", on=False)
        assert running.wait() == ExitCode.OK
    job = desk.done(job_id)
    assert set(job.deliveries.values()) == {1}
    assert "nvidia-smi" in running.events("worker_fault")[0]["error"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB of its own."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    commands = (["mkfs.ext4", "-q", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(folder)])
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk of one's own without root and loop devices: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path) -> Path:
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(100_000))
            file.flush()
    assert shutil.disk_usage(folder).free < 100_000
    return filler


def test_a_disk_that_fills_up_under_journal_and_staging_loses_nothing(desk: Desk, small_disk: Path) -> None:
    """Fetching stops, what was computed is posted from memory, no image gets an error, and space lets it go on."""
    desk.switch("hold", on=True)
    job_id = desk.add_job(60)
    env = desk.environment(
        {"AMI_USER_DATA_PATH": str(small_disk / "data"), "AMI_ANTENNA_API_BATCH_SIZE": "8", "COUNTING_SECONDS": "0.01"}
    )
    with worker(env) as running:
        wait_until(lambda: len(list((small_disk / "data" / "staging").rglob("*.img"))) >= 4, timeout_s=90)
        filler = _fill(small_disk)
        fetches = desk.gate.requests["POST tasks"]
        desk.switch("hold", on=False)
        line = running.wait_for("machine_fault")
        assert "free some space" in line["do"] or "disks of this machine" in line["do"]
        assert desk.gate.requests["POST tasks"] <= fetches + 2, (
            "what was under way before the disk was known to be full"
        )
        wait_until(lambda: desk.antenna.job(job_id).processed > 0, timeout_s=90)
        filler.unlink()
        running.wait_for("machine_fault_over")
        job = desk.done(job_id)
        assert running.process.poll() is None
    assert not running.events("child_ended")
    assert set(desk.inferred.values()) == {1}
    assert set(job.deliveries.values()) == {1}


def test_a_worker_that_starts_on_a_full_disk_says_so_and_goes_on_once_there_is_space(
    desk: Desk, small_disk: Path
) -> None:
    """A full disk passes: neither the first start nor a restart of the child ends the worker for good."""
    (small_disk / "data").mkdir()
    job_id = desk.add_job(4)
    env = desk.environment({"AMI_USER_DATA_PATH": str(small_disk / "data")})
    filler = _fill(small_disk)
    with worker(env, "--exit-when-idle") as running:
        line = running.wait_for("machine_fault")
        assert "cannot be opened" in line["error"]
        assert line["do"]
        filler.unlink()
        assert running.wait() == ExitCode.OK
    assert not running.events("child_ended")
    desk.done(job_id)


def test_a_program_that_holds_the_journal_for_a_while_costs_nothing(desk: Desk) -> None:
    """A backup or an SQLite shell: the worker waits and says so, and may also start meanwhile."""
    first = desk.add_job(60)
    env = desk.environment({"COUNTING_SECONDS": "0.05"})
    journal = Path(env["AMI_USER_DATA_PATH"]) / "adc_journal.db"
    with ExitStack() as held, worker(env) as running:
        wait_until(lambda: desk.inferred.total() >= 5, timeout_s=90)
        other = held.enter_context(closing(sqlite3.connect(journal, isolation_level=None)))
        other.execute("BEGIN IMMEDIATE")
        assert "end the program" in running.wait_for("journal_locked")["do"]
        other.execute("ROLLBACK")
        running.wait_for("journal_unlocked")
        job = desk.done(first)
        other.execute("BEGIN IMMEDIATE")
        os.kill(running.child_pid(), signal.SIGKILL)
        # Where the one before left marks, they have to be written; else nothing is waited for.
        wait_until(lambda: running.events("start_waits") or len(running.events("journal_open")) == 2, timeout_s=60)
        other.execute("ROLLBACK")
        running.wait_for("journal_open", count=2)
    assert not running.events("machine_fault")
    assert set(job.deliveries.values()) == {1}
    assert set(desk.inferred.values()) == {1}


def test_a_journal_that_is_damaged_while_the_worker_runs_costs_no_task(desk: Desk) -> None:
    """It is set aside and made anew beside the running job: one line, no restart, no second delivery.

    Only results that were on their way to Antenna, and were lost with the file, are computed again.
    """
    job_id = desk.add_job(60)
    env = desk.environment({"COUNTING_SECONDS": "0.05"})
    journal = Path(env["AMI_USER_DATA_PATH"]) / "adc_journal.db"
    with worker(env) as running:
        wait_until(lambda: desk.inferred.total() >= 5, timeout_s=90)
        os.truncate(journal, 0)
        for side_file in (f"{journal}-wal", f"{journal}-shm"):
            Path(side_file).unlink(missing_ok=True)
        journal.unlink()
        journal.write_bytes(b"holiday photographs " * 1000)
        line = running.wait_for("journal_damaged")
        assert Path(line["set_aside"]).is_file()
        job = desk.done(job_id)
    assert not running.events("child_ended")
    assert set(job.deliveries.values()) == {1}
    lost = sum(line["results_to_compute_again"] for line in running.events("tasks_restored"))
    computed_again = desk.inferred.total() - len(desk.inferred)
    assert computed_again <= lost


def test_a_damaged_journal_is_set_aside_at_the_start(desk: Desk) -> None:
    """Once, and no delivery is spent on it."""
    env = desk.environment()
    journal = Path(env["AMI_USER_DATA_PATH"]) / "adc_journal.db"
    journal.parent.mkdir()
    journal.write_bytes(b"holiday photographs " * 1000)
    job_id = desk.add_job(10)
    with worker(env) as running:
        job = desk.done(job_id)
    assert len(running.events("journal_damaged")) == 1
    assert not running.events("child_ended")
    assert set(job.deliveries.values()) == {1}


def test_below_the_reserve_for_fetching_what_is_staged_is_worked_off(desk: Desk, small_disk: Path) -> None:
    """Which frees the disk: results are kept and posted, and only fetching waits."""
    data = small_disk / "data"
    desk.switch("hold", on=True)
    job_id = desk.add_job(30, size_px=64)
    env = desk.environment({"AMI_USER_DATA_PATH": str(data), "AMI_ANTENNA_API_BATCH_SIZE": "8"})
    with worker(env) as running:
        wait_until(lambda: len(list((data / "staging").rglob("*.img"))) >= 4, timeout_s=90)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 5_000_000))
        running.wait_for("journal_disk_low")
        fetches = desk.gate.requests["POST tasks"]
        staged = len(list((data / "staging").rglob("*.img")))
        desk.switch("hold", on=False)
        wait_until(lambda: desk.antenna.job(job_id).processed >= staged, timeout_s=60)
        assert desk.gate.requests["POST tasks"] <= fetches + 1, "one may have been under way"
        assert running.wait_for("machine_fault")["part"] == "disk of the journal", "nothing is left that could free it"
        filler.unlink()
        job = desk.done(job_id)
    assert not running.events("child_ended")
    assert set(job.deliveries.values()) == {1}


@pytest.mark.soak
def test_a_fault_of_the_machine_that_lasts_ends_the_process_by_name(desk: Desk, small_disk: Path) -> None:
    """With five minutes made two seconds; no restart by its parent, and the next start loses nothing."""
    desk.switch("hold", on=True)
    job_id = desk.add_job(30)
    env = desk.environment({"AMI_USER_DATA_PATH": str(small_disk / "data"), "AMI_ANTENNA_API_BATCH_SIZE": "8"})
    with worker(env | {"COUNTING_MACHINE_FAULT_S": "2"}) as running:
        wait_until(lambda: len(list((small_disk / "data" / "staging").rglob("*.img"))) >= 4, timeout_s=90)
        filler = _fill(small_disk)
        desk.switch("hold", on=False)
        assert running.wait() == ExitCode.MACHINE_FAULT
    assert "at fault for 2 s" in running.events("worker_fault")[0]["error"]
    assert not running.events("child_ended")
    filler.unlink()
    code, _log = run_to_end(env, "--exit-when-idle")
    assert code == ExitCode.OK
    assert set(desk.done(job_id).deliveries.values()) == {1}


def weights() -> bytes:
    """Return a checkpoint as torch writes it."""
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, file)
    return file.getvalue()


@pytest.mark.parametrize("named", [True, False])
def test_a_store_of_weights_that_is_away_for_a_moment_ends_no_worker(desk: Desk, named: bool) -> None:
    """Also where the operator named the pipeline: a supervisor would not start it again. It waits and tries again."""
    away = Reply(b"<html>Sign in</html>", headers={"Content-Type": "text/html"})
    desk.images.replies["/net.pth"] = away
    job_id = desk.add_job(6)
    env = desk.environment({"COUNTING_WEIGHTS": desk.images.url("/net.pth")})
    with worker(env, *(("--pipeline", counting_pipeline.SLUG) if named else ())) as running:
        running.wait_for("pipeline_unavailable", count=2)
        assert not desk.antenna.job(job_id).deliveries, "no task is fetched for a model that is not there"
        desk.images.replies["/net.pth"] = Reply(weights())
        desk.done(job_id)
    assert not running.events("child_ended")


def test_a_batch_worker_ends_with_a_code_that_is_tried_again_where_weights_do_not_come(desk: Desk) -> None:
    """Jobs are left: 0 would say that none is, and 3 that a restart cannot help."""
    desk.images.replies["/net.pth"] = Reply(b"later", status=503)
    job_id = desk.add_job(6)
    env = desk.environment({"COUNTING_WEIGHTS": desk.images.url("/net.pth"), "AMI_ANTENNA_ACK_WAIT_SECONDS": "2"})
    code, log = run_to_end(env, "--exit-when-idle", "--pipeline", counting_pipeline.SLUG)
    assert code == ExitCode.MACHINE_FAULT
    assert log.events("idle_without_models")
    assert not desk.antenna.job(job_id).deliveries
