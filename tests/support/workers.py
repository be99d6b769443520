"""Real `ami worker` processes for tests, and what they log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from adc_worker.desk.server import DevServer
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
EXIT_TIMEOUT_S = 180.0


class WorkerProcess:
    """A running `ami worker` and the JSON lines it has written so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, name="worker-log")
        self._reader.start()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return what was logged under an event's name."""
        parsed = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [event for event in parsed if event["event"] == name]

    def wait_for(self, name: str, count: int = 1, timeout_s: float = 120.0) -> dict[str, Any]:
        """Wait until an event was logged `count` times and return the last of them."""
        wait_until(lambda: len(self.events(name)) >= count or self.process.poll() is not None, timeout_s)
        found = self.events(name)
        assert len(found) >= count, f"{name} was not logged; the log is:\n" + "\n".join(self.lines)
        return found[-1]

    def wait(self) -> int:
        """Wait for the end and return the exit code; nothing of the process tree may be left then."""
        code = self.process.wait(EXIT_TIMEOUT_S)
        self._reader.join(EXIT_TIMEOUT_S)
        return code

    def child_pid(self) -> int:
        """Return the pid of the one child that has torch."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line.rstrip("\n"))


def environment(server: DevServer, data: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a worker for `server` that keeps its files in `data`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AMI_")}
    return inherited | {
        "AMI_ANTENNA_API_BASE_URL": server.api_url,
        "AMI_ANTENNA_API_AUTH_TOKEN": server.token,
        "AMI_USER_DATA_PATH": str(data),
        "AMI_ANTENNA_IDLE_SLEEP_SECONDS": "0.2",
        "AMI_SHUTDOWN_GRACE_SECONDS": "20",
        "AMI_LOG_FORMAT": "json",
        "PYTHONPATH": str(REPOSITORY),
        **(extra or {}),
    }


@contextmanager
def worker(
    env: Mapping[str, str], *arguments: str, cwd: Path | None = None, within: Sequence[str] = ()
) -> Iterator[WorkerProcess]:
    """Run `ami worker` with `arguments`, by the command `within`; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        [*within, sys.executable, "-m", "adc_worker", "worker", *arguments],
        env=dict(env),
        cwd=cwd or REPOSITORY / "tests",
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    running = WorkerProcess(process)
    try:
        yield running
    except BaseException:
        sys.stdout.write("\n".join(running.lines))  # pytest shows it where the test fails
        raise
    finally:
        family = _family(process.pid)
        for member in family:
            with suppress(psutil.NoSuchProcess):  # a child dies with its parent
                member.kill()
        psutil.wait_procs(family, EXIT_TIMEOUT_S)
        running.wait()


def run_to_end(env: Mapping[str, str], *arguments: str, cwd: Path | None = None) -> tuple[int, WorkerProcess]:
    """Run `ami worker` until it ends by itself."""
    with worker(env, *arguments, cwd=cwd) as running:
        return running.wait(), running


def _family(pid: int) -> Sequence[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
