"""The wheel in clean environments of every Python that it is declared for. Needs a package index."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adc_worker import __version__
from tests.support.workers import REPOSITORY

PYTHONS = ("python3.11", "python3.12", "python3.13")


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("python", PYTHONS)
def test_the_wheel_installs_and_a_whole_job_runs(tmp_path: Path, python: str) -> None:
    """Built here, installed there with its dependencies: both console scripts, completion, the demo."""
    found = shutil.which(python)
    if found is None or subprocess.run([found, "--version"], check=False, capture_output=True).returncode:
        pytest.skip(f"{python} is not installed")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, REPOSITORY, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run(found, "-m", "venv", tmp_path / "clean", cwd=tmp_path)
    programs = tmp_path / "clean" / "bin"
    run(programs / "pip", "install", "--quiet", f"{wheel}[desk]", cwd=tmp_path)
    for program in ("ami", "adc-worker"):
        assert __version__ in run(programs / program, "--version", cwd=tmp_path)
    assert "lost        │ 0" in run(programs / "ami", "demo", "--count", "4", cwd=tmp_path)
