"""The live view of `ami worker` on a terminal: the status below, what is logged above it."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from adc_worker.cli.status_view import rendered, size
from adc_worker.log import Lasting
from adc_worker.status.hub import StatusHub

REFRESH_PER_S = 2
# These log lines are shown above the view, with all warnings and errors. Others are not shown.
NOTABLE = frozenset({"start", "worker_ready", "status_page", "job_summary", "stopping", "idle"})
_QUIET_LEVELS = frozenset({"debug", "info"})
_NOT_FIELDS = frozenset({"level", "event", "timestamp", "exception", "module"})
_EMPTY: tuple[Any, ...] = (None, "", {}, [])
_TIME_OF_DAY = slice(11, 19)  # of an ISO timestamp


@contextmanager
def live_view(hub: StatusHub) -> Iterator[None]:
    """Draw the status on the terminal while the body runs.

    What this process and its children write to stderr goes through a pipe and above the view.
    """
    terminal = os.dup(sys.stderr.fileno())
    read, write = os.pipe()
    os.dup2(write, sys.stderr.fileno())  # children inherit it
    os.close(write)
    with os.fdopen(terminal, "w") as screen:
        console = Console(file=Lasting(screen))  # type: ignore[arg-type]
        reader = threading.Thread(
            target=_show_lines,
            args=(read, console),
            name="log-lines",
            daemon=True,
        )
        reader.start()
        view = Live(
            get_renderable=lambda: rendered(hub.status(), details=False),
            console=console,
            refresh_per_second=REFRESH_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        try:
            with view:
                yield
        finally:
            os.dup2(terminal, sys.stderr.fileno())  # closes the pipe's last writer: the reader ends
            reader.join()


def _show_lines(read: int, console: Console) -> None:
    with os.fdopen(read, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                console.print(line.rstrip(), markup=False, highlight=False)
                continue
            is_quiet = event.get("level") in _QUIET_LEVELS
            if not is_quiet or event.get("event") in NOTABLE:
                console.print(_log_line(event))


def _log_line(event: dict[str, Any]) -> Text:
    fields = []
    for key, value in event.items():
        if key not in _NOT_FIELDS and value not in _EMPTY:
            shown = size(value) if key.endswith("_bytes") else value
            fields.append(f"{key}={shown}")
    time_of_day = event.get("timestamp", "")[_TIME_OF_DAY]
    trace = event.get("exception", "")
    return Text.assemble(
        (f"{time_of_day} ", "dim"),
        (event.get("event", ""), _style(event.get("level", "info"))),
        f"  {'  '.join(fields)}",
        f"\n{trace}" if trace else "",
    )


def _style(level: str) -> str:
    if level == "info":
        return ""
    return "yellow" if level == "warning" else "red"
