"""A running worker as others see it: over HTTP, from another terminal, on its own, and after its end."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from adc_worker.errors import ExitCode
from tests.support.gate import Gate
from tests.support.waiting import wait_until
from tests.support.workers import environment, run_to_end, worker

SIMULATED = ("--pipeline", "simulated")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DevServer]:
    with DevServer(save_delay_s=0.005, image_dir=tmp_path) as running:
        yield running


@pytest.fixture
def sheets(tmp_path: Path) -> list[Path]:
    return write_sheets(tmp_path / "sheets", 2, seed=3, sizes=((640, 480),))


def get(url: str, **headers: str) -> tuple[int, str, Any]:
    """Return status, body and headers; a refusal is an answer, too."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:  # noqa: S310 (our own)
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def ami(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "adc_worker", *arguments],
        env=env, cwd=env["AMI_USER_DATA_PATH"], capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip


def test_a_running_worker_shows_itself_on_every_way(server: DevServer, sheets: list[Path], tmp_path: Path) -> None:
    """Page, data, metrics, health and `ami worker status` agree; a page of another origin gets nothing."""
    job_id = server.add_job("simulated", sheets * 100 + [tmp_path / "missing.jpg"])
    extra = {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.2", "AMI_STATUS_PORT": "0"}  # the job outlives the test
    env = environment(server, tmp_path / "data", extra)
    with worker(env, *SIMULATED) as running:
        url = running.wait_for("status_page")["url"].rstrip("/")
        assert get(f"{url}/livez")[0] == 200
        wait_until(lambda: "batch_size" in get(f"{url}/snapshot.json")[1], timeout_s=120)
        state = json.loads(get(f"{url}/snapshot.json")[1])
        job = state["workers"][0]["snapshot"]["job"]
        assert job["id"] == job_id
        assert job["plan"].keys() >= job["why"].keys() - {"ratio"}
        assert job["done"] + job["in_hand"] + job["pending"] + sum(job["failed"].values()) <= 201
        status, page, headers = get(f"{url}/")
        assert status == 200
        assert str(job_id) in page
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in headers
        assert "http://" not in page.replace("http://www.w3.org", "").split('id="data">')[0], (
            "nothing comes from outside"
        )
        assert get(f"{url}/", Host="antenna.evil.example")[0] == 421
        assert get(f"{url}/nothing")[0] == 404
        assert get(f"{url}/readyz")[:2] == (200, "ok\n")
        families = {family.name: family for family in text_string_to_metric_families(get(f"{url}/metrics")[1])}
        assert families["adc_worker_memory_bytes"].samples[0].value > 1e8
        assert families["adc_worker_images_done"].type == "counter"
        assert all(set(sample.labels) <= {"worker"} for family in families.values() for sample in family.samples)
        told = ami(env, "worker", "status")
        assert told.returncode == ExitCode.OK, told.stderr
        assert f"{job_id}" in told.stdout
        assert "batch_size" in told.stdout
        (as_json,) = json.loads(ami(env, "worker", "status", "--json").stdout)
        assert as_json["pid"] == running.process.pid


def test_what_a_worker_leaves_is_the_report_of_its_last_job(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """After the end: status says that none runs, and the report is one file with the job in it."""
    job_id = server.add_job("simulated", [*sheets, tmp_path / "missing.jpg"])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.01"})
    assert ami(env | {"AMI_USER_DATA_PATH": str(tmp_path)}, "worker", "report").returncode == 1
    code, _log = run_to_end(env, *SIMULATED, "--exit-when-idle")
    assert code == ExitCode.OK
    told = ami(env, "worker", "status")
    assert told.returncode == ExitCode.FAILED
    assert "no worker runs on this host" in told.stderr
    reported = ami(env, "worker", "report", str(tmp_path / "report.html"))
    assert reported.returncode == 0, reported.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)])
    assert data["saved"]
    assert [(job["id"], job["done"], job["failed"]) for job in data["jobs"]] == [(job_id, 2, {"ImageMissing": 1})]
    assert not list((tmp_path / "data").glob("*.sock"))


def test_a_worker_that_holds_tasks_and_gets_nowhere_is_not_ready(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """An Antenna that takes no results: alive, but red after half a lease."""
    server.add_job("simulated", sheets)
    env = environment(server, tmp_path / "data", {"AMI_STATUS_PORT": "0", "AMI_ANTENNA_ACK_WAIT_SECONDS": "6"})
    with Gate(server.api_url) as gate, worker({**env, "AMI_ANTENNA_API_BASE_URL": gate.api_url}, *SIMULATED) as running:
        gate.fault = lambda route: 503 if route == "POST result" else None
        url = running.wait_for("status_page")["url"].rstrip("/")
        wait_until(lambda: "made no progress" in get(f"{url}/readyz")[1], timeout_s=120)
        assert get(f"{url}/readyz")[0] == 503
        assert get(f"{url}/livez")[0] == 200
        assert ami(env, "worker", "status").returncode == ExitCode.FAILED


def _on_a_terminal(env: dict[str, str], cwd: Path) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    shown = bytearray()
    with subprocess.Popen(
        [sys.executable, "-m", "adc_worker", "worker", *SIMULATED, "--exit-when-idle"],
        env={**env, "TERM": "xterm-256color", "COLUMNS": "110", "LINES": "40"}, cwd=cwd, stderr=theirs,
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            while block := os.read(ours, 1 << 16):
                shown += block
        except OSError:
            pass  # EIO: the other end is closed
        os.close(ours)
        return process.wait(60), shown.decode()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_the_job_is_drawn_and_log_lines_stay_readable(
    server: DevServer, sheets: list[Path], tmp_path: Path, no_color: str
) -> None:
    """Progress, plan and memory; the bad image is named above; NO_COLOR takes the colours away."""
    job_id = server.add_job("simulated", [*sheets * 20, tmp_path / "missing.jpg"])
    env = environment(server, tmp_path / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.1", "NO_COLOR": no_color})
    del env["AMI_LOG_FORMAT"]
    code, shown = _on_a_terminal(env, tmp_path)
    assert code == ExitCode.OK, shown
    for text in (str(job_id), "progress", "batches of", "predicted", "inference", "image_failed", "job_summary"):
        assert text in shown
    assert '{"' not in shown, "no raw JSON line"
    assert ("\x1b[3" in shown) != bool(no_color)
