"""`ami worker` as operators run it: a real process, a real NATS server, real HTTP."""

from __future__ import annotations

import http
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from adc_worker.errors import ExitCode
from tests.support.gate import INVALID_TOKEN, Answer, Fault, Gate
from tests.support.images import encoded
from tests.support.waiting import wait_until
from tests.support.workers import REPOSITORY, environment, run_to_end, worker

BLOBS = ("--pipeline", "light_sheet_blobs")
SIMULATED = ("--pipeline", "simulated")
DRAINED = 120  # images: six seconds, so that a drain finds some to do though this process is slow to ask for it


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DevServer]:
    with DevServer(save_delay_s=0.005, keep_streams=True, image_dir=tmp_path) as running:
        yield running


@pytest.fixture
def sheets(tmp_path: Path) -> list[Path]:
    return write_sheets(tmp_path / "sheets", 4, seed=3, sizes=((640, 480), (480, 640)))


def test_every_task_of_a_job_is_acknowledged_exactly_once(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """200 images: nothing pending, nothing outstanding, nothing delivered or posted twice."""
    job_id = server.add_job("light_sheet_blobs", [sheets[index % 4] for index in range(200)])
    code, log = run_to_end(environment(server, tmp_path / "data"), *BLOBS, "--exit-when-idle")
    assert code == ExitCode.OK
    wait_until(lambda: (info := server.consumer_info(job_id)) and not info["num_ack_pending"])  # after the status
    job, consumer = server.job(job_id), server.consumer_info(job_id)
    assert consumer is not None
    assert job.status == "SUCCESS"
    assert [consumer[name] for name in ("num_pending", "num_ack_pending", "num_redelivered")] == [0, 0, 0]
    assert consumer["delivered"]["consumer_seq"] == consumer["ack_floor"]["stream_seq"] == 200
    assert set(job.results) == set(job.image_ids)
    assert all(len(result["detections"]) > 0 for result in job.results.values())
    assert set(job.posts.values()) == {1}
    assert log.events("plan"), "the job was planned"
    assert log.events("job_summary")[0]["done"] == 200
    assert not list((tmp_path / "data" / "staging").rglob("*.*")), "staged files go when their result is kept"


def test_bad_images_become_errors_that_name_the_cause(server: DevServer, sheets: list[Path], tmp_path: Path) -> None:
    """Empty, HTML, missing and broken files are final errors; a damaged photograph is decoded and counted as such."""
    good = sheets[0]
    names = ("empty.jpg", "page.jpg", "cut.jpg", "lost.jpg", "given_up.jpg", "broken.jpg")
    for name in names:
        (tmp_path / name).write_bytes(good.read_bytes())
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[: good.stat().st_size * 2 // 3])
    middle = good.stat().st_size // 2
    (tmp_path / "lost.jpg").write_bytes(good.read_bytes()[:middle] + good.read_bytes()[middle + 4096 :])
    with Image.open(good) as image:
        blank = encoded(Image.new("RGB", image.size, (215, 215, 215)), "JPEG", progressive=True)
    given_up_at = len(blank) * 2 // 3
    (tmp_path / "given_up.jpg").write_bytes(blank[:given_up_at] + blank[:600] + blank[given_up_at:])
    (tmp_path / "page.jpg").write_bytes(b"<html><body>Sign in</body></html>")
    files = [*(tmp_path / name for name in names), tmp_path / "missing.jpg", *sheets, *sheets]
    job_id = server.add_job("light_sheet_blobs", files)
    code, log = run_to_end(environment(server, tmp_path / "data"), *BLOBS, "--exit-when-idle")
    assert code == ExitCode.OK
    wait_until(lambda: server.job(job_id).processed == len(files))
    job = server.job(job_id)
    told = {Path(str(file)).name: job.errors.get(image_id) for image_id, file in zip(job.image_ids, files, strict=True)}
    assert told["empty.jpg"] == "the downloaded file is empty (0 bytes)"
    assert "HTML" in str(told["page.jpg"])
    assert "404" in str(told["missing.jpg"])
    assert "broken" in str(told["broken.jpg"])
    assert "rows cannot be decoded" in str(told["given_up.jpg"])
    assert told["cut.jpg"] is told["lost.jpg"] is None
    assert job.failed == 5
    summary = log.events("job_summary")[0]
    assert (summary["truncated"], summary["damaged"]) == (1, 1)
    damaged = {Path(event["url"]).name: event for event in log.events("image_file_damaged")}
    assert "Corrupt JPEG data" in damaged["lost.jpg"]["decoder"]
    assert damaged["cut.jpg"]["truncated"]


def test_a_pipeline_from_outside_the_package_runs(server: DevServer, tmp_path: Path) -> None:
    """AMI_EXTRA_PIPELINES brings detector, filter and classifier; its slug is polled without being named."""
    picture = tmp_path / "half.png"
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (20, 20, 40, 40))
    image.save(picture)
    algorithms = [("Corners", "corners", "localization"), ("Filter", "filter", "classification")]
    algorithms.append(("Species", "species", "classification"))
    job_id = server.add_job("corners", [picture], algorithms=algorithms)
    env = environment(server, tmp_path / "data", {"AMI_EXTRA_PIPELINES": "tests.support.extra_pipeline:pipelines"})
    code, _log = run_to_end(env, "--exit-when-idle")
    assert code == ExitCode.OK
    wait_until(lambda: server.job(job_id).status == "SUCCESS")
    (result,) = server.job(job_id).results.values()
    dark, bright = result["detections"]
    assert [one["classification"] for one in dark["classifications"]] == ["moth", "Noctua pronuba"]
    assert [one["terminal"] for one in dark["classifications"]] == [False, True]
    assert [one["classification"] for one in bright["classifications"]] == ["nonmoth"]


def test_an_old_env_file_starts_the_worker_as_it_is(server: DevServer, sheets: list[Path], tmp_path: Path) -> None:
    """Settings of today's worker: the ones that limit and the ones without effect are both named."""
    old = tmp_path / "old.env"
    old.write_text(
        "AMI_DATABASE_URL=postgresql://ami@db:5432/ami\nAMI_IMAGE_BASE_PATH=/data/traps/\n"
        'AMI_SPECIES_CLASSIFICATION_MODEL="UK & Denmark Species Classifier"\nAMI_CLASSIFICATION_THRESHOLD=0.6\n'
        "AMI_LOCALIZATION_BATCH_SIZE=2\nAMI_CLASSIFICATION_BATCH_SIZE=20\nAMI_NUM_WORKERS=1\n"
        'AMI_ANTENNA_API_BATCH_SIZE=4\nAMI_ANTENNA_SERVICE_NAME="AMI Data Companion"\n'
    )
    job_id = server.add_job("light_sheet_blobs", sheets)
    env = environment(server, tmp_path / "data")
    code, log = run_to_end(env, *BLOBS, "--exit-when-idle", "--env-file", str(old))
    assert code == ExitCode.OK
    wait_until(lambda: server.job(job_id).status == "SUCCESS")
    (start,) = log.events("start")
    assert start["limits"]["AMI_ANTENNA_API_BATCH_SIZE"] == 4
    notes = " ".join(event["note"] for event in log.events("setting"))
    assert "AMI_DATABASE_URL has no effect" in notes
    assert "AMI_NUM_WORKERS is not used in auto mode" in notes


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("AMI_ANTENNA_API_AUTH_TOKEN", "", "AMI_ANTENNA_API_AUTH_TOKEN is not set"),
        ("AMI_ANTENNA_API_BASE_URL", "antenna.example.org", "AMI_ANTENNA_API_BASE_URL"),
        ("AMI_ANTENNA_API_BASE_URL", "http://127.0.0.1:9/api/v2", "AMI_ANTENNA_API_BASE_URL"),
        ("AMI_ANTENNA_MAX_PENDING_POSTS", "many", "AMI_ANTENNA_MAX_PENDING_POSTS"),
        ("AMI_EXTRA_PIPELINES", "nowhere:pipelines", "AMI_EXTRA_PIPELINES"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    server: DevServer, tmp_path: Path, variable: str, value: str, says: str
) -> None:
    """The line names the variable; there is no traceback."""
    env = environment(server, tmp_path / "data", {variable: value})
    code, log = run_to_end(env, *BLOBS, "--exit-when-idle")
    assert code == ExitCode.CONFIGURATION
    assert sum(says in line for line in log.lines) == 1
    assert "Traceback" not in "\n".join(log.lines)


def test_an_antenna_that_is_away_at_a_later_start_is_waited_for(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """Both may come back from a power cut, the worker first: no supervisor would start it again after exit code 2."""
    with Gate(server.api_url) as gate:
        env = environment(server, tmp_path / "data", {"AMI_ANTENNA_API_BASE_URL": gate.api_url})
        server.add_job("simulated", sheets)
        assert run_to_end(env, *SIMULATED, "--exit-when-idle")[0] == ExitCode.OK
        gate.fault = lambda _route: "reset"
        with worker(env, *SIMULATED) as running:
            running.wait_for("poll_failed", count=2)
            gate.open()
            job_id = server.add_job("simulated", sheets)
            wait_until(lambda: server.job(job_id).status == "SUCCESS", timeout_s=120)
            running.process.send_signal(signal.SIGTERM)
            assert running.wait() == ExitCode.OK
    assert not running.events("child_ended")


PAGE_CALLED_SUCCESS = Answer(200, b"<html>Back soon</html>", "text/html")
FRONT_ENDS: list[list[Fault]] = [[PAGE_CALLED_SUCCESS, 302, 401], [400, 403, 404, 504]]


@pytest.mark.parametrize("first_start", [True, False])
@pytest.mark.parametrize("answers", FRONT_ENDS)
def test_maintenance_at_a_start_is_waited_for(
    server: DevServer, sheets: list[Path], tmp_path: Path, answers: list[Fault], first_start: bool
) -> None:
    """Whatever a front end answers meanwhile proves no wrong setting: no supervisor restarts after exit code 2."""
    with Gate(server.api_url) as gate:
        env = environment(server, tmp_path / "data", {"AMI_ANTENNA_API_BASE_URL": gate.api_url})
        if not first_start:  # without a job: that Antenna answered is kept by itself
            with worker(env, *SIMULATED) as running:
                wait_until(lambda: gate.requests["GET jobs"] > 2)
                running.process.send_signal(signal.SIGTERM)
                assert running.wait() == ExitCode.OK
        left = iter(answers)
        gate.fault = lambda _route: next(left, None)
        with worker(env, *SIMULATED) as running:
            running.wait_for("poll_failed", count=len(answers))
            job_id = server.add_job("simulated", sheets)
            wait_until(lambda: server.job(job_id).status == "SUCCESS", timeout_s=120)
            running.process.send_signal(signal.SIGTERM)
            assert running.wait() == ExitCode.OK
    assert not running.events("child_ended")
    said = [event["error"] for event in running.events("poll_failed")]
    foreign = [fault for fault in answers if fault != http.HTTPStatus.GATEWAY_TIMEOUT]  # that may be Antenna's own
    assert sum("is not Antenna" in error for error in said) == len(foreign)


def test_what_was_right_once_is_no_wrong_setting_later(server: DevServer, tmp_path: Path) -> None:
    """A worker that never had a job starts anew while Antenna refuses its token for the moment."""
    with Gate(server.api_url) as gate:
        env = environment(server, tmp_path / "data", {"AMI_ANTENNA_API_BASE_URL": gate.api_url})
        for _start in range(2):
            with worker(env, *SIMULATED) as running:
                if gate.requests["GET jobs"]:
                    running.wait_for("poll_failed", count=2)
                    gate.open()
                answered = gate.requests["GET jobs"]
                wait_until(lambda answered=answered: gate.requests["GET jobs"] > answered + 2, timeout_s=90)  # type: ignore[misc]
                running.process.send_signal(signal.SIGTERM)
                assert running.wait() == ExitCode.OK
            gate.fault = lambda _route: INVALID_TOKEN


def test_an_antenna_that_is_not_up_yet_is_waited_for_where_it_answered_before(
    server: DevServer, tmp_path: Path
) -> None:
    """Nobody listens there: at the first start that is a wrong address, later an outage. No job was ever needed."""
    with Gate(server.api_url) as gate:
        env = environment(server, tmp_path / "data", {"AMI_ANTENNA_API_BASE_URL": gate.api_url})
        with worker(env, *SIMULATED) as running:
            wait_until(lambda: gate.requests["GET jobs"] > 2, timeout_s=90)
            running.process.send_signal(signal.SIGTERM)
            assert running.wait() == ExitCode.OK
    with worker(env, *SIMULATED) as running:
        running.wait_for("poll_failed", count=3)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == ExitCode.OK


def test_an_address_that_antenna_moved_from_is_a_wrong_setting(server: DevServer, tmp_path: Path) -> None:
    """A permanent redirect of the same path, as from http to https: no restart mends that, and the line says where."""
    moved = Answer(301, b"", "text/html", {"Location": "https://moved.example.org/api/v2/jobs/"})
    with Gate(server.api_url) as gate:
        gate.fault = lambda _route: moved
        env = environment(server, tmp_path / "data", {"AMI_ANTENNA_API_BASE_URL": gate.api_url})
        code, log = run_to_end(env, *SIMULATED)
    assert code == ExitCode.CONFIGURATION
    (line,) = [line for line in log.lines if "AMI_ANTENNA_API_BASE_URL" in line and "moved.example.org" in line]
    assert "https://moved.example.org/api/v2/jobs/" in line


@pytest.mark.parametrize("kind", ["unknown", "member"])
def test_a_token_that_antenna_refuses_is_said_at_once(
    server: DevServer, sheets: list[Path], tmp_path: Path, kind: str
) -> None:
    """One that Antenna does not know, and one that may poll but not fetch: a successful poll proves nothing."""
    server.add_job("light_sheet_blobs", sheets)
    token = {"unknown": "0" * 40, "member": server.member_token}[kind]
    env = environment(server, tmp_path / "data", {"AMI_ANTENNA_API_AUTH_TOKEN": token})
    code, log = run_to_end(env, *BLOBS, "--exit-when-idle")
    assert code == ExitCode.CONFIGURATION
    (line,) = [line for line in log.lines if "AMI_ANTENNA_API_AUTH_TOKEN" in line]
    assert {"unknown": "Invalid token", "member": "superuser"}[kind] in line
    assert token not in "\n".join(log.lines)


def test_sigterm_finishes_what_is_in_hand_and_a_restart_the_rest(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """After a drain the next worker finishes the job: nothing is delivered twice, or downloaded again that had come."""
    job_id = server.add_job("simulated", [sheets[index % 4] for index in range(DRAINED)])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.05"})
    with worker(env, *SIMULATED) as first:
        first.wait_for("batch", count=2)
        os.killpg(first.process.pid, signal.SIGTERM)
        assert first.wait() == ExitCode.OK
    done_first = sum(event["done"] for event in first.events("job_summary"))
    assert 0 < done_first < DRAINED
    staged, asked = len(list((tmp_path / "data" / "staging").rglob("*.img"))), server.requests["GET images"]
    code, _log = run_to_end(env | {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.01"}, *SIMULATED, "--exit-when-idle")
    assert code == ExitCode.OK
    wait_until(lambda: server.job(job_id).status == "SUCCESS")
    job = server.job(job_id)
    assert set(job.deliveries.values()) == {1}
    assert set(job.posts.values()) == {1}
    assert server.requests["GET images"] - asked == DRAINED - done_first - staged


def test_an_idle_worker_polls_and_answers_a_job_that_appears(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """Jobs that come while the worker idles are done without a restart, each with a plan of its own."""
    with worker(environment(server, tmp_path / "data"), *BLOBS) as running:
        running.wait_for("worker_ready")
        for number in (1, 2):
            job_id = server.add_job("light_sheet_blobs", sheets)
            wait_until(lambda job_id=job_id: server.job(job_id).status == "SUCCESS", timeout_s=90)  # type: ignore[misc]
            running.wait_for("job_summary", count=number)
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == ExitCode.OK
    assert len(running.events("plan")) == 2


def test_ctrl_c_while_the_program_is_still_imported_ends_it_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "adc_worker", "worker"]
    ended = subprocess.run(
        ["env", "--default-signal=INT", *command],  # a suite in the background ignores it, and so would its children
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGINT
    assert not ended.stderr
