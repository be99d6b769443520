"""A worker as people see it in a terminal: the live view of `ami worker`, `ami worker status`, `ami worker report`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from adc_worker import settings
from adc_worker.errors import ExitCode
from adc_worker.log import Lasting
from adc_worker.runtime import board as boards
from adc_worker.runtime.board import Board

MB, GB = 1e6, 1e9
REFRESH_PER_S = 2
BAR_COLUMNS = 40
# Of the log lines that would scroll by, these stay to be read above the live view, with all warnings and errors.
NOTABLE = frozenset({"start", "worker_ready", "status_page", "job_summary", "stopping", "idle"})
_SENTENCES = frozenset({"why", "what it said", "pipeline"})  # columns that may take several lines
_STAGES = {"download": "link", "decode": "decode", "inference": "inference"}


def size(value: float) -> str:
    return f"{value / GB:.2f} GB" if value >= GB else f"{value / MB:.0f} MB"


def _clock(at: float) -> str:
    return time.strftime("%d %b %H:%M", time.localtime(at))


def _bar(value: float, total: float, text: str) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=max(total, 1e-9), completed=value, width=BAR_COLUMNS), text)
    return row


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table(*(Column(name, no_wrap=name not in _SENTENCES) for name in names), box=None)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _worker(one: dict[str, Any]) -> Table:
    snapshot, job = one["snapshot"], one["snapshot"]["job"]
    memory = f"{size(snapshot['memory_bytes'])} of {size(snapshot['budget_bytes'])}"
    rows: list[tuple[str, RenderableType]] = []
    if job is None or job["ended_at"] is not None:
        rows.append(("job", "none" if not snapshot["stopping"] else "stopping"))
    else:
        settled = job["done"] + sum(job["failed"].values()) + job["left_to_lease"]
        total, plan = settled + job["in_hand"] + job["pending"], job["plan"]
        rate = f"{job['images_per_s']:.2f} images/s" if job["images_per_s"] else "measuring"
        rows.append(("job", Text.assemble((str(job["id"]), "bold"), f"  {job['pipeline']}")))
        left = timedelta(seconds=round(one["eta_s"])) if one["eta_s"] is not None else "unknown time"
        rows.append(("progress", _bar(settled, total, f"{settled} of {total}, {left} left")))
        if plan:
            rate += f", {plan['images_per_s']:.2f} planned; {plan['binds']} binds"
            memory += f", {size(plan['peak_bytes'])} predicted"
            feeding = f"batches of {plan['batch_size']}, {plan['prefetch_factor']} ahead; "
            feeding += f"{plan['download_concurrency']} downloads, {plan['decode_workers']} decoding; "
            rows.append(("plan", feeding + f"{size(plan['arena_bytes'])} for pixels"))
        rows.append(("rate", rate))
        for stage in job["stages"]:
            able = stage["parallel"] / stage["s_per_image"] if stage["s_per_image"] else 0.0
            binds = "  binds" if plan and plan["binds"] == _STAGES[stage["name"]] else ""
            takes = f"{1000 * stage['s_per_image']:>6.0f} ms x {stage['parallel']:<2}"
            rows.append((f"  {stage['name']}", f"{takes} up to {able:.1f} images/s{binds}"))
        if job["decision"]:
            rows.append(("changed", job["decision"]))
    rows.append(("memory", _bar(snapshot["memory_bytes"], snapshot["budget_bytes"], memory)))
    rows.append(("waiting", f"{snapshot['unposted']} results for Antenna, {size(snapshot['staged_bytes'])} on disk"))
    grid = Table.grid(Column(style="dim", no_wrap=True), "", padding=(0, 2))
    for row in rows:
        grid.add_row(*row)
    return grid


def _job_row(job: dict[str, Any]) -> Sequence[Any]:
    rate, peak, binds = f"{job['images_per_s']:.2f}", size(job["peak_bytes"]), job["plan"].get("binds", "")
    failed, ended = sum(job["failed"].values()), _clock(job["ended_at"])
    return job["id"], job["pipeline"], job["done"], failed, rate, peak, binds, ended


def plan_table(plan: Mapping[str, Any], why: Mapping[str, str]) -> Table:
    def shown(name: str, value: Any) -> str:
        return size(value) if name.endswith("_bytes") else f"{value:.2f}" if isinstance(value, float) else str(value)

    return _table(("plan", "value", "why"), ((name, shown(name, plan.get(name)), why[name]) for name in why))


def rendered(state: dict[str, Any], *, details: bool) -> Group:
    """Draw a board's state; `details` adds the plan's reasons, the last jobs and what went wrong."""
    ready = "; ".join(state["unready"]) or "ready"
    title = Text.assemble(("Antenna worker", "bold"), f" {state['version']} on {state['host']}, pid {state['pid']}: ")
    parts: list[RenderableType] = [title.append(ready, style="red" if state["unready"] else "green")]
    causes = list(state["causes"])
    for one in state["workers"]:
        parts.append(_worker(one))
        causes += one["snapshot"]["causes"]
        if details and one["snapshot"]["job"] and one["snapshot"]["job"]["why"]:
            parts += ["", plan_table(one["snapshot"]["job"]["plan"], one["snapshot"]["job"]["why"])]
    if details and state["jobs"]:
        names = ("job", "pipeline", "done", "failed", "images/s", "peak", "binds", "ended")
        parts += ["", _table(names, map(_job_row, state["jobs"]))]
    if details and causes:
        causes.sort(key=lambda cause: -float(cause["last_at"]))
        rows = ((cause["event"], cause["text"], cause["count"], _clock(cause["last_at"])) for cause in causes)
        parts += ["", _table(("warnings and errors", "what it said", "times", "last"), rows)]
    return Group(*parts)


@contextmanager
def live_view(board: Board) -> Iterator[None]:
    """Draw the board on the terminal while the body runs; what this process and its children log goes above it."""
    terminal = os.dup(sys.stderr.fileno())
    read, write = os.pipe()
    os.dup2(write, sys.stderr.fileno())  # children inherit it
    os.close(write)
    with os.fdopen(terminal, "w") as screen:
        console = Console(file=Lasting(screen))  # type: ignore[arg-type]
        reader = threading.Thread(target=_show_lines, args=(read, console), name="log-lines", daemon=True)
        reader.start()
        try:
            with Live(
                get_renderable=lambda: rendered(json.loads(board.to_json()), details=False),
                console=console,
                refresh_per_second=REFRESH_PER_S,
                redirect_stdout=False,
                redirect_stderr=False,
            ):
                yield
        finally:
            os.dup2(terminal, sys.stderr.fileno())  # the pipe's last writer is gone: the reader ends
            reader.join()


def _show_lines(read: int, console: Console) -> None:
    with os.fdopen(read, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                console.print(line.rstrip(), markup=False, highlight=False)
                continue
            if event.get("event") in NOTABLE or event.get("level") not in {"debug", "info"}:
                console.print(_log_line(event))


def _log_line(event: dict[str, Any]) -> Text:
    level, name = event.pop("level", "info"), event.pop("event", "")
    at, trace = event.pop("timestamp", "")[11:19], event.pop("exception", "")
    event.pop("module", None)
    told = {key: value for key, value in event.items() if value not in (None, "", {}, [])}
    fields = "  ".join(f"{key}={size(value) if key.endswith('_bytes') else value}" for key, value in told.items())
    style = {"info": "", "warning": "yellow"}.get(level, "red")
    return Text.assemble((f"{at} ", "dim"), (name, style), f"  {fields}", f"\n{trace}" if trace else "")


def status_command(config: settings.Settings, *, as_json: bool) -> ExitCode:
    """Print the workers that run with this data folder; OK when all of them are ready."""
    states = boards.running(config.user_data_path)
    if as_json:
        click.echo(json.dumps(states, indent=1))
    console = Console()
    for state in () if as_json else states:
        console.print(rendered(state, details=True))
    if not states:
        click.echo(
            f"ami: no worker runs on this host with AMI_USER_DATA_PATH={config.user_data_path};"
            " start one with `ami worker`, or go to the folder whose .env it uses",
            err=True,
        )
    return ExitCode.OK if states and not any(state["unready"] for state in states) else ExitCode.FAILED


def report_command(config: settings.Settings, output: Path) -> None:
    """Write the page of the last job, as the worker left it at that job's end."""
    from adc_worker.runtime.status_server import rendered_page  # noqa: PLC0415 (status needs no HTTP server)

    kept = boards.report_path(config.user_data_path)
    if not kept.is_file():
        raise click.ClickException(f"no job has ended yet with AMI_USER_DATA_PATH={config.user_data_path}")
    try:
        latest = json.loads(kept.read_bytes())
        job_id = latest["jobs"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise click.ClickException(f"{kept} is damaged: remove it; the next job's end writes it anew") from error
    try:
        output.write_bytes(rendered_page(json.dumps({**latest, "saved": True}).encode()))
    except OSError as error:
        raise click.ClickException(f"cannot write {output}: {error.strerror}") from error
    click.echo(f"job {job_id}: {output}")
