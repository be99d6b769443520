"""A worker's status as people see it in a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from adc_worker.log import Cause
from adc_worker.status.snapshot import JobView, Snapshot, StageView
from adc_worker.status.worker_status import WorkerStatus

MB = 1e6
GB = 1e9
BAR_COLUMNS = 40
EMPTY_BAR_TOTAL = 1e-9  # against a division by zero
_SEVERAL_LINES = frozenset({"why", "what it said", "pipeline"})  # columns whose texts may be wrapped
_BINDS_OF_STAGE = {"download": "link", "decode": "decode", "inference": "inference"}

Row = tuple[str, RenderableType]


def size(value: float) -> str:
    return f"{value / GB:.2f} GB" if value >= GB else f"{value / MB:.0f} MB"


def rendered(status: WorkerStatus, *, details: bool) -> Group:
    """Draw a worker's status.

    Args:
        status: what is drawn.
        details: also draw the plan's reasons, the last jobs and what went wrong.
    """
    parts: list[RenderableType] = [_title(status)]
    for process in status.workers:
        parts.append(_process(process.snapshot, process.eta_s))
        job = process.snapshot.job
        if details and job and job.why:
            parts += ["", plan_table(job.plan, job.why)]
    if details and status.jobs:
        parts += ["", _job_table(status.jobs)]
    causes = _causes(status)
    if details and causes:
        parts += ["", _cause_table(causes)]
    return Group(*parts)


def plan_table(plan: Mapping[str, Any], why: Mapping[str, str]) -> Table:
    rows = []
    for name, reason in why.items():
        rows.append((name, _plan_value(name, plan.get(name)), reason))
    return _table(("plan", "value", "why"), rows)


def _plan_value(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return size(value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _title(status: WorkerStatus) -> Text:
    title = Text.assemble(
        ("Antenna worker", "bold"),
        f" {status.version} on {status.host}, pid {status.pid}: ",
    )
    if status.unready:
        return title.append("; ".join(status.unready), style="red")
    return title.append("ready", style="green")


def _process(snapshot: Snapshot, eta_s: float | None) -> Table:
    job = snapshot.running_job
    rows: list[Row] = []
    if job is not None:
        rows += _job_rows(job, eta_s)
    else:
        rows.append(("job", "stopping" if snapshot.stopping else "none"))
    rows.append(("memory", _memory(snapshot)))
    staged = size(snapshot.staged_bytes)
    rows.append(("waiting", f"{snapshot.unposted} results for Antenna, {staged} on disk"))
    grid = Table.grid(Column(style="dim", no_wrap=True), "", padding=(0, 2))
    for row in rows:
        grid.add_row(*row)
    return grid


def _job_rows(job: JobView, eta_s: float | None) -> list[Row]:
    binds = job.plan.get("binds")
    rows: list[Row] = [
        ("job", Text.assemble((str(job.id), "bold"), f"  {job.pipeline}")),
        ("progress", _progress(job, eta_s)),
    ]
    if job.plan:
        rows.append(("plan", _feeding(job.plan)))
    rows.append(("rate", _rate(job)))
    rows += [(f"  {stage.name}", _stage(stage, binds)) for stage in job.stages]
    if job.damaged or job.truncated:
        rows.append(("files", f"{job.damaged} with damage, {job.truncated} cut short"))
    if job.decision:
        rows.append(("changed", job.decision))
    return rows


def _progress(job: JobView, eta_s: float | None) -> Table:
    total = job.settled + job.in_hand + job.pending
    left = "unknown time"
    if eta_s is not None:
        left = str(timedelta(seconds=round(eta_s)))
    return _bar(job.settled, total, f"{job.settled} of {total}, {left} left")


def _feeding(plan: Mapping[str, Any]) -> str:
    return (
        f"batches of {plan['batch_size']}, {plan['prefetch_factor']} ahead;"
        f" {plan['download_concurrency']} downloads, {plan['decode_workers']} decoding;"
        f" {size(plan['arena_bytes'])} for pixels"
    )


def _rate(job: JobView) -> str:
    rate = "measuring"
    if job.images_per_s:
        rate = f"{job.images_per_s:.2f} images/s"
    if job.plan:
        rate += f", {job.plan['images_per_s']:.2f} planned; {job.plan['binds']} binds"
    return rate


def _stage(stage: StageView, binds: str | None) -> str:
    milliseconds = 1000 * stage.s_per_image
    text = f"{milliseconds:>6.0f} ms x {stage.parallel:<2} up to {stage.images_per_s:.1f} images/s"
    return f"{text}  binds" if _BINDS_OF_STAGE[stage.name] == binds else text


def _memory(snapshot: Snapshot) -> Table:
    text = f"{size(snapshot.memory_bytes)} of {size(snapshot.budget_bytes)}"
    job = snapshot.running_job
    if job is not None and job.plan:
        text += f", {size(job.plan['peak_bytes'])} predicted"
    return _bar(snapshot.memory_bytes, snapshot.budget_bytes, text)


def _bar(value: float, total: float, text: str) -> Table:
    bar = ProgressBar(
        total=max(total, EMPTY_BAR_TOTAL),
        completed=value,
        width=BAR_COLUMNS,
    )
    row = Table.grid(padding=(0, 2))
    row.add_row(bar, text)
    return row


def _job_table(jobs: Iterable[JobView]) -> Table:
    names = ("job", "pipeline", "done", "failed", "images/s", "peak", "binds", "ended")
    return _table(names, map(_job_cells, jobs))


def _job_cells(job: JobView) -> Sequence[Any]:
    return (
        job.id,
        job.pipeline,
        job.done,
        job.n_failed,
        f"{job.images_per_s:.2f}",
        size(job.peak_bytes),
        job.plan.get("binds", ""),
        _clock(job.ended_at or 0.0),
    )


def _causes(status: WorkerStatus) -> list[Cause]:
    """Return what the parent and its processes logged as warnings and errors, the latest first."""
    causes = list(status.causes)
    for process in status.workers:
        causes += process.snapshot.causes
    return sorted(causes, key=lambda cause: cause.last_at, reverse=True)


def _cause_table(causes: Iterable[Cause]) -> Table:
    names = ("warnings and errors", "what it said", "times", "last")
    rows = [(one.event, one.text, one.count, _clock(one.last_at)) for one in causes]
    return _table(names, rows)


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    columns = [Column(name, no_wrap=name not in _SEVERAL_LINES) for name in names]
    table = Table(*columns, box=None)
    for row in rows:
        cells = [Text(str(cell)) for cell in row]
        table.add_row(*cells)
    return table


def _clock(at: float) -> str:
    return time.strftime("%d %b %H:%M", time.localtime(at))
