"""The README as a new operator follows it: every command in its order, and what it prints is what stands below it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from adc_worker.desk.sheets import write_sheets
from tests.support.readme import README
from tests.support.waiting import wait_until

BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Run elsewhere: the first two are `tests/integration/test_demo.py` and this suite; packages are installed by a network.
NOT_HERE = ("make ", "pip install ")
STATUS_PORT = "9100"


@dataclass(frozen=True)
class Command:
    text: str
    output: tuple[str, ...]


def commands() -> list[Command]:
    """Return every `$ command` of the console blocks, with the lines below it."""
    found = []
    for block in BLOCK.findall(README.read_text(encoding="utf-8")):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            text, *output = part.rstrip("\n").split("\n")
            found.append(Command(text.partition("  #")[0].strip(), tuple(output)))
    return [command for command in found if not command.text.startswith(NOT_HERE)]


class Shell:
    """A bash that lives for the whole session, so that `&`, `%2` and .env mean what they mean to a reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        (programs / "ami").write_text(f'#!/bin/sh\nexec {sys.executable} -m adc_worker "$@"\n', encoding="utf-8")
        (programs / "ami").chmod(0o755)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AMI_")}
        self._bash = subprocess.Popen(
            ["bash", "-m"],
            cwd=folder,
            env={**inherited, "PATH": f"{programs}:{inherited['PATH']}", "XDG_DATA_HOME": str(folder / "data"),
                 "PYTHONPATH": str(README.parent), "COLUMNS": "100"},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, text: str, timeout_s: float = 90.0) -> tuple[int, str]:
        """Run a command line; one that goes on in the background has no output yet."""
        output, code = self.folder / "output", self.folder / "code"
        code.unlink(missing_ok=True)
        assert self._bash.stdin is not None
        if text.endswith("&"):
            self._bash.stdin.write(f"{text}\necho 0 > code.part; mv code.part code\n")
        else:
            self._bash.stdin.write(f"{{ {text}\n}} > output 2>&1\necho $? > code.part; mv code.part code\n")
        self._bash.stdin.flush()
        wait_until(code.exists, timeout_s)
        return int(code.read_text()), "" if text.endswith("&") else output.read_text(encoding="utf-8")

    def close(self) -> None:
        family = psutil.Process(self._bash.pid).children(recursive=True)
        for member in family:
            with suppress(psutil.NoSuchProcess):  # it died with its parent
                member.kill()
        self._bash.kill()
        self._bash.communicate()
        psutil.wait_procs(family, 10)


@pytest.fixture
def shell() -> Iterator[Shell]:
    with tempfile.TemporaryDirectory() as folder:  # a short path: it stands in the output
        running = Shell(Path(folder))
        try:
            yield running
        finally:
            running.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ready(shell: Shell, text: str, status_port: str) -> bool:
    """Whether what was started in the background is there: a reader waits for that without being told."""
    if "devserver" in text:
        written = shell.folder / ".env"  # made by the background job, which may not have begun
        return written.exists() and "AUTH_TOKEN=" in written.read_text(encoding="utf-8")
    return shell.run(f"curl --fail --silent localhost:{status_port}/readyz")[0] == 0


@pytest.mark.timeout(400)
def test_the_commands_of_the_readme_do_what_it_says(shell: Shell) -> None:
    """From the first to the last; each line of output in the README begins as one of the real ones does."""
    write_sheets(shell.folder / "photographs", 6, seed=3, sizes=((1280, 960),))
    (shell.folder / "photographs" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0no photograph")
    status_port = str(free_port())
    assert len(commands()) >= 8
    for command in commands():
        text = command.text.replace("devserver", "devserver --port 0").replace(STATUS_PORT, status_port)
        code, output = shell.run(text)
        assert code == 0, f"$ {text}\n{output}"
        if text.endswith("&"):
            wait_until(lambda text=text: ready(shell, text, status_port), timeout_s=120)  # type: ignore[misc]
        begins = {line.split()[0] for line in output.splitlines() if line.split()}
        shown = {line.split()[0] for line in command.output if line.split()}
        if "--exit-when-idle" not in text:  # drawn on a terminal: tests/integration/test_status.py
            assert shown <= begins, f"$ {text}\n{output}"
