"""`ami worker tune` against a real Antenna of the desk: from listed photographs, or from two tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from adc_worker.devserver.server import DevServer
from adc_worker.devserver.sheets import write_sheets
from tests.support.gate import Gate
from tests.support.waiting import wait_until


def tune(antenna: DevServer | Gate, token: str, folder: Path, *arguments: str) -> dict[str, Any]:
    env = os.environ | {
        "AMI_ANTENNA_API_BASE_URL": antenna.api_url,
        "AMI_ANTENNA_API_AUTH_TOKEN": token,
        "AMI_USER_DATA_PATH": str(folder / "data"),
        "AMI_SIMULATED_SECONDS_PER_IMAGE": "0.3",  # far from what a busy machine takes to decode
    }
    command = [sys.executable, "-m", "adc_worker", "worker", "tune", "simulated", "--json", *arguments]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_tuning_from_listed_photographs_spends_no_delivery(tmp_path: Path) -> None:
    """And says what the worker would do, what binds, and what the old constants would have done."""
    with DevServer(image_dir=tmp_path) as server:
        server.add_job("simulated", write_sheets(tmp_path / "sheets", 3, seed=3, sizes=((640, 480),)))
        told = tune(server, server.token, tmp_path, "--write", str(tmp_path / "new.env"))
        assert "POST tasks" not in server.requests
    assert told["plan"]["binds"] == "inference"
    assert "more RAM" in told["verdict"]
    assert told["old_constants"]["peak_bytes"] > told["plan"]["peak_bytes"]
    assert {"batch_size", "prefetch_factor", "staged_ahead", "peak_bytes"} <= set(told["why"])
    assert {(image["width_px"], image["height_px"]) for image in told["sample"]["images"]} == {(640, 480)}
    written = (tmp_path / "new.env").read_text()
    assert f"AMI_ANTENNA_API_DATALOADER_PREFETCH_FACTOR={told['plan']['prefetch_factor']}\n" in written


def test_tuning_from_tasks_posts_their_results(tmp_path: Path) -> None:
    """Where Antenna lists nothing: exactly two tasks are taken, and both are saved."""
    with DevServer(image_dir=tmp_path, save_delay_s=0.0) as server:
        job_id = server.add_job("simulated", write_sheets(tmp_path / "sheets", 5, seed=3, sizes=((640, 480),)))
        with Gate(server.api_url) as gate:
            gate.fault = lambda route: 500 if route == "GET captures" else None
            told = tune(gate, server.token, tmp_path)
        wait_until(lambda: len(server.job(job_id).results) == 2)
        assert server.requests["POST tasks"] == 1
    assert told["source"].startswith("2 tasks, worked off and posted")
