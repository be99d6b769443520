"""`ami demo` as a newcomer runs it, and as one who stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from adc_worker.errors import ExitCode
from tests.support.images import jpeg
from tests.support.waiting import wait_until


def start_demo(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    temporary = folder / "tmp"
    temporary.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "adc_worker", "demo", *arguments],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(temporary), "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_behind(folder: Path, family: list[psutil.Process]) -> list[str]:
    running = [f"process {member.pid}" for member in family if member.is_running()]
    return running + [str(file) for file in (folder / "tmp").iterdir()]


def test_the_demo_shows_a_whole_job_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Six images, one broken and one missing: a table, a contact sheet, and no process or temporary file."""
    with start_demo(tmp_path, "--count", "6") as demo:
        output, _ = demo.communicate(timeout=240)
    assert demo.returncode == ExitCode.OK, output
    told = [line.strip("│ ").split("│") for line in output.splitlines() if line.startswith("│")]
    table = {cells[0].strip(): cells[1].strip() for cells in told if len(cells) > 1}
    assert table["done"] == "4"
    assert table["failed"] == "2"
    assert table["lost"] == "0"
    assert table["redelivered"] == "0"
    assert int(table["detections"]) > 40
    assert "MB of" in table["peak memory"]
    assert "404" in output
    assert "batch_size" in output, "the plan is shown"
    with Image.open(tmp_path / "demo-output" / "contact-sheet.png") as sheet:
        assert sheet.width > 1000
    assert left_behind(tmp_path, []) == []


def test_a_demo_of_nothing_but_bad_images_still_reports(tmp_path: Path) -> None:
    """Without one good image there is no plan, and nothing is lost."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "broken.jpg").write_bytes(jpeg()[:40])
    with start_demo(tmp_path, "--images", str(bad)) as demo:
        output, _ = demo.communicate(timeout=240)
    assert demo.returncode == ExitCode.OK, output
    assert "broken" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("when", ["Antenna at", "planned"])
def test_a_demo_that_is_stopped_leaves_nothing_behind(tmp_path: Path, when: str) -> None:
    """Ctrl-C while the worker starts, or in the middle of the job."""
    with start_demo(tmp_path, "--count", "12") as demo:
        assert demo.stdout is not None
        if when == "Antenna at":
            next(line for line in demo.stdout if when in line)
        else:
            wait_until(lambda: list((tmp_path / "tmp").glob("adc-demo-*/data/staging/*/*.img")), timeout_s=120)
        family = psutil.Process(demo.pid).children(recursive=True)
        assert family, "a NATS server and a worker were running"
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=120)
    wait_until(lambda: not left_behind(tmp_path, family), timeout_s=30)
