"""`ami worker tune` against a real Antenna of the desk: from listed photographs, or from two tasks."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from adc_worker.errors import ConfigurationError, ExitCode, WorkerFault
from adc_worker.journal.journal import Journal
from adc_worker.runtime.tune import Tuning, tune
from adc_worker.settings import Settings
from tests.support.counting_pipeline import SLUG, numbered
from tests.support.gate import Gate
from tests.support.image_server import ImageServer, Reply
from tests.support.waiting import wait_until
from tests.support.workers import environment, worker

NOBODY = "http://127.0.0.1:1/sheet.jpg"
SLOW = {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.3"}  # far from what a busy machine takes to decode


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DevServer]:
    with DevServer(image_dir=tmp_path, save_delay_s=0.0) as running:
        yield running


@pytest.fixture
def sheets(tmp_path: Path) -> list[Path]:
    return write_sheets(tmp_path / "sheets", 5, seed=3, sizes=((640, 480),))


def ami(server: DevServer, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `ami worker tune`, started with few open files."""
    env = environment(server, folder / "data", SLOW)
    command = ["sh", "-c", 'ulimit -S -n 300; exec "$@"', "sh", sys.executable, "-m", "adc_worker", "worker", "tune"]
    return subprocess.run([*command, *arguments], env=env, cwd=folder, capture_output=True, text=True, check=False)


def tuned(antenna: DevServer | Gate, token: str, folder: Path, target: str = "simulated", **settings: Any) -> Tuning:
    values: dict[str, Any] = {
        "antenna_api_base_url": antenna.api_url,
        "antenna_api_auth_token": token,
        "user_data_path": folder,
    }
    return tune(Settings(**values | {"simulated_seconds_per_image": 0.01} | settings), target)


def test_tuning_from_listed_photographs_spends_no_delivery(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """And says what the worker would do, and what binds; no file is left."""
    server.add_job("simulated", sheets)
    done = ami(server, tmp_path, "simulated", "--json", "--write", str(tmp_path / "new.env"))
    assert done.returncode == ExitCode.OK, done.stderr
    told = json.loads(done.stdout)
    assert "POST tasks" not in server.requests
    assert told["source"] == "2 of 5 photographs that Antenna lists; no task was taken"
    assert told["plan"]["binds"] == "inference"
    assert "more RAM" in told["verdict"]
    assert set(told["why"]) <= set(told["plan"])
    assert [(image["width_px"], image["height_px"]) for image in told["sample"]["images"]] == [(640, 480)] * 2
    assert told["machine"]["descriptors"] == resource.getrlimit(resource.RLIMIT_NOFILE)[1], "as many as a child has"
    written = (tmp_path / "new.env").read_text()
    assert f"AMI_ANTENNA_API_DATALOADER_PREFETCH_FACTOR={told['plan']['prefetch_factor']}\n" in written
    assert {entry.name for entry in (tmp_path / "data").rglob("*") if entry.is_file()} == {"0"}, "the memory's slot"


def test_what_was_written_does_not_bind_the_next_that_is_written(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """Run again in the same folder, the values would only fall."""
    server.add_job("simulated", sheets)
    names = ("API_BATCH_SIZE", "API_DATALOADER_DOWNLOAD_THREADS", "API_DATALOADER_NUM_WORKERS")
    (tmp_path / ".env").write_text("".join(f"AMI_ANTENNA_{name}=1\n" for name in names))
    bound = json.loads(ami(server, tmp_path, "simulated", "--json").stdout)
    assert bound["plan"]["fetch_size"] == 1
    assert bound["limits"] == {f"AMI_ANTENNA_{name}": 1 for name in names}
    done = ami(server, tmp_path, "simulated", "--write", ".env")
    assert "limits   none set" in done.stdout
    assert "AMI_ANTENNA_API_BATCH_SIZE=7\n" in (tmp_path / ".env").read_text(), "2 s of 1 / 0.3 s"


def test_a_project_is_a_target_too(server: DevServer, sheets: list[Path], tmp_path: Path) -> None:
    """Its first job is measured, whichever pipeline that is for."""
    job_id = server.add_job("light_sheet_blobs", sheets)
    told = tuned(server, server.token, tmp_path, str(server.project_id))
    assert (told.job_id, told.pipeline) == (job_id, "light_sheet_blobs")


@pytest.mark.parametrize(
    ("target", "says"), [("moths", "neither a project's number nor a pipeline"), ("4711", "no job with tasks for it")]
)
def test_a_target_without_a_job_is_said(server: DevServer, tmp_path: Path, target: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        tuned(server, server.token, tmp_path, target)


def test_a_photograph_that_cannot_be_had_is_replaced_by_another(
    server: DevServer, sheets: list[Path], tmp_path: Path
) -> None:
    """What was wrong is said without what signs its URL, and costs nothing."""
    job_id = server.add_job("simulated", [f"{NOBODY}?X-Amz-Signature=canary", *sheets])
    told = tuned(server, server.token, tmp_path)
    assert len(told.report.images) == 2
    assert "; 1 failed: cannot reach the image host" in told.source
    assert "canary" not in told.source
    assert server.job(job_id).errors == {}


def no_list(route: str) -> int | None:
    return 500 if route == "GET captures" else None


def test_tuning_from_tasks_posts_their_results(server: DevServer, sheets: list[Path], tmp_path: Path) -> None:
    """Where Antenna lists nothing: exactly two tasks are taken, and both are saved."""
    job_id = server.add_job("simulated", sheets)
    with Gate(server.api_url) as gate:
        gate.fault = no_list
        told = tuned(gate, server.token, tmp_path)
    wait_until(lambda: len(server.job(job_id).results) == 2)
    assert server.requests["POST tasks"] == 1
    assert told.source.startswith("2 of 2 tasks, 2 posted; Antenna did not list its photographs: ")
    assert "500" in told.source


def test_a_link_that_brings_no_photograph_costs_no_task(server: DevServer, tmp_path: Path) -> None:
    """It is said in one line with what to do: a task would go the same way."""
    server.add_job("simulated", [NOBODY] * 3)
    done = ami(server, tmp_path, "simulated")
    (line,) = done.stderr.splitlines()
    assert done.returncode == ExitCode.CONFIGURATION
    assert "no image of job" in line
    assert "network and firewall" in line
    assert line.endswith("no task was taken")
    assert "POST tasks" not in server.requests


@pytest.mark.parametrize(
    ("image", "settings", "says"),
    [(NOBODY, {}, "cannot reach the image host"), ("sheets/sheet-3-000.jpg", {"image_max_pixels": 1000}, "pixels")],
    ids=["link", "too_large"],
)
def test_no_tuning_ends_in_an_error_of_an_image(
    server: DevServer, sheets: list[Path], tmp_path: Path, image: str, settings: dict[str, Any], says: str
) -> None:
    """A task that cannot be worked off stays on record: the next worker here takes it up, and judges."""
    assert sheets
    job_id = server.add_job("simulated", [image] * 3)
    with Gate(server.api_url) as gate:
        gate.fault = no_list
        with pytest.raises(ConfigurationError, match=f"{says}.* of 2 tasks 0 posted, 2 left on record here"):
            tuned(gate, server.token, tmp_path, **settings)
    assert server.job(job_id).errors == {}
    journal = Journal(tmp_path / "adc_journal.db")
    try:
        assert len(journal.unfinished(job_id)) == 2
    finally:
        journal.close()


def test_a_gpu_that_fails_is_named_with_what_to_do(
    server: DevServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of a traceback; the image is not to blame."""
    monkeypatch.setenv("COUNTING_FOLDER", str(tmp_path))
    (tmp_path / "broken").touch()
    (tmp_path / "image.png").write_bytes(numbered(1))
    server.add_job(SLUG, [tmp_path / "image.png"])
    with pytest.raises(WorkerFault, match=r"CUDA error: .*; check the GPU with nvidia-smi"):
        tuned(server, server.token, tmp_path, SLUG, extra_pipelines=("tests.support.counting_pipeline:pipelines",))


@pytest.mark.parametrize(("download_s", "binds"), [(1.5, "link"), (0.05, "inference")])
def test_a_worker_comes_to_the_plan_that_tuning_told(
    server: DevServer, sheets: list[Path], tmp_path: Path, download_s: float, binds: str
) -> None:
    """On an image host that sets the pace."""
    body = sheets[0].read_bytes()
    with ImageServer() as host:
        names = [f"/{number}.jpg" for number in range(12)]
        host.replies = {name: Reply(body, bytes_per_s=len(body) / download_s) for name in names}
        server.add_job("simulated", [host.url(name) for name in names])
        told = json.loads(ami(server, tmp_path, "simulated", "--json").stdout)
        with worker(environment(server, tmp_path / "data", SLOW), "--pipeline", "simulated") as running:
            plan = running.wait_for("plan")
    assert told["plan"]["binds"] == plan["binds"] == binds
    assert told["plan"]["images_per_s"] == pytest.approx(plan["images_per_s"], rel=0.3)
    for name in ("batch_size", "decode_workers", "prefetch_factor", "pin_memory"):
        assert told["plan"][name] == plan[name]
    for name in ("limit_bytes", "cores", "descriptors", "staging_in_memory"):
        assert told["machine"][name] == plan["inputs"]["host"][name]
