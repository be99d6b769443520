"""`ami demo`: a job from end to end on this machine (Antenna, NATS, images, worker), and what came of it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from adc_worker.cli.devserver import FOLDER, images_in
from adc_worker.errors import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from adc_worker.devserver.server import DevServer
    from adc_worker.devserver.state import Job

PIPELINE = "light_sheet_blobs"
SEED = 2026
SAVE_DELAY_S = 0.05  # a real Antenna takes 0.3-0.9 s; nobody wants to watch that
SAVED_WITHIN_S = 60.0  # after the worker has ended, Antenna may still be saving
GRACE_S = 5.0
MB = 1_000_000


@dataclass(slots=True)
class _WorkerNews:
    """What the worker's log has told so far."""

    plan: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read(self, line: str) -> None:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            self.problems.append(line.rstrip())
            return
        name = event.get("event")
        if name == "plan":
            self.plan = event
        elif name == "batch":
            self.last = event
        elif name == "job_summary" and not self.summary:
            self.summary = event
        elif event.get("level") in {"error", "critical"}:
            self.problems.append(f"{name}: {event.get('error') or event.get('exception') or event}")


@click.command("demo")
@click.option(
    "--images",
    "image_dir",
    type=FOLDER,
    help="Use the photographs of this folder instead of generated ones.",
)
@click.option("--count", default=40, show_default=True, help="How many images to generate; two of them are bad.")
@click.option(
    "--output",
    default=Path("demo-output"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the contact sheet goes.",
)
def demo_command(image_dir: Path | None, count: int, output: Path) -> None:
    """Run a whole job on this machine and show what came of it."""
    try:  # not at the top: `ami --help` must work without the `desk` extra
        from rich.console import Console  # noqa: PLC0415

        from adc_worker.devserver.server import DevServer  # noqa: PLC0415
    except ImportError as error:
        raise click.ClickException(f"{error}: run `pip install 'adc-worker[desk]'`") from error
    console = Console()
    with (
        _interruptible(),
        tempfile.TemporaryDirectory(prefix="adc-demo-") as folder,
        DevServer(save_delay_s=SAVE_DELAY_S) as server,
    ):
        files = images_in(image_dir) if image_dir else _generated(Path(folder) / "images", count, console)
        job_id = server.add_job(PIPELINE, files)
        console.print(f"Antenna at {server.url}, job {job_id} with {len(files)} images")
        news = _run_worker(server, job_id, Path(folder), console)
        job = _wait_until_saved(server, job_id)
        sheet = output / "contact-sheet.png"
        _write_contact_sheet(job, files, sheet)
        lost = _report(job, news, sheet, console)
    sys.exit(ExitCode.FAILED if lost or not news.summary else ExitCode.OK)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGTERM into the exception that Ctrl-C is, so that both clean up on their way out."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _generated(folder: Path, count: int, console: Console) -> list[Path]:
    """Write trap-like photographs, one broken file among them, and name one that does not exist."""
    from adc_worker.devserver.sheets import write_sheets  # noqa: PLC0415

    with console.status(f"drawing {count - 2} photographs"), ThreadPoolExecutor(2) as threads:
        half = (count - 2) // 2
        futures = [
            threads.submit(write_sheets, folder / str(seed), number, SEED + seed)
            for seed, number in enumerate((half, count - 2 - half))
        ]
        files = [file for future in futures for file in future.result()]
    broken, missing = folder / "broken.jpg", folder / "missing.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 this was a photograph once")
    middle = len(files) // 2
    return [*files[:middle], broken, missing, *files[middle:]]


def _run_worker(server: DevServer, job_id: int, folder: Path, console: Console) -> _WorkerNews:
    """Run `ami worker` as a process of its own, until it finds nothing more to do."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AMI_")} | {
        "AMI_ANTENNA_API_BASE_URL": server.api_url,
        "AMI_ANTENNA_API_AUTH_TOKEN": server.token,
        "AMI_USER_DATA_PATH": str(folder / "data"),
        "AMI_LOG_FORMAT": "json",
        "AMI_SHUTDOWN_GRACE_SECONDS": str(GRACE_S),
    }
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    news = _WorkerNews()
    with ExitStack() as at_end:
        with _interrupts_come_later():
            process = subprocess.Popen(
                [sys.executable, "-m", "adc_worker", "worker", "--pipeline", PIPELINE, "--exit-when-idle"],
                cwd=folder,  # where no .env is
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops the worker
            )
            reader = threading.Thread(target=_read_lines, args=(process.stderr, lines.put), name="worker-log")
            reader.start()
            at_end.callback(reader.join)
            at_end.callback(_stop, process)
        _show_progress(server, job_id, lines, news, console)
        code = process.wait()
    if code != ExitCode.OK:
        news.problems.append(f"the worker ended with exit code {code}")
    return news


@contextmanager
def _interrupts_come_later() -> Iterator[None]:
    """Hold Ctrl-C back while a process is started: it would run, and nobody would know of it."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
    process.wait()


def _read_lines(stream: IO[str] | None, put: Callable[[str | None], None]) -> None:
    if stream is not None:
        with stream:
            for line in stream:
                put(line)
    put(None)


def _show_progress(
    server: DevServer, job_id: int, lines: queue.SimpleQueue[str | None], news: _WorkerNews, console: Console
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting the worker", total=server.job(job_id).total)
        while True:
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                line = ""
            if line is None:
                return
            if line:
                news.read(line)
            job = server.job(job_id)
            progress.update(bar, completed=job.processed, description=_doing(news))


def _doing(news: _WorkerNews) -> str:
    if news.last:
        return f"working, {news.last['memory_bytes'] / MB:.0f} MB"
    return "probed, planned" if news.plan else "starting the worker"


def _wait_until_saved(server: DevServer, job_id: int) -> Job:
    deadline = time.monotonic() + SAVED_WITHIN_S
    job = server.job(job_id)
    while job.processed < job.total and time.monotonic() < deadline:
        time.sleep(0.1)
        job = server.job(job_id)
    return job


def _write_contact_sheet(job: Job, files: list[Path], path: Path) -> None:
    from adc_worker.cli.contact_sheet import ContactItem, write_contact_sheet  # noqa: PLC0415

    items = []
    for image_id, file in zip(job.image_ids, files, strict=True):
        result = job.results.get(image_id)
        boxes = [_box(found["bbox"]) for found in result["detections"]] if result else []
        items.append(ContactItem(file, file.stem, boxes, job.errors.get(image_id)))
    write_contact_sheet(items, path)


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / MB:.0f} MB"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _box(bbox: dict[str, float]) -> tuple[int, int, int, int]:
    return int(bbox["x1"]), int(bbox["y1"]), int(bbox["x2"]), int(bbox["y2"])


def _report(job: Job, news: _WorkerNews, sheet: Path, console: Console) -> int:
    """Print what came of the job; return how many images were lost."""
    from rich.table import Table  # noqa: PLC0415

    lost = job.total - job.processed
    detections = sum(len(result["detections"]) for result in job.results.values())
    outcome = Table(title="What came of it", title_justify="left", show_header=False)
    outcome.add_row("done", str(len(job.results)))
    outcome.add_row("failed", "\n".join([str(job.failed), *(f"  {text}" for text in job.errors.values())]))
    outcome.add_row("lost", str(lost))
    outcome.add_row("redelivered", str(sum(count - 1 for count in job.deliveries.values())))
    outcome.add_row("detections", str(detections))
    if news.summary and news.plan:  # without one good image there is neither a plan nor a rate
        summary = news.summary
        outcome.add_row("images/s", f"{summary['images_per_s']:.2f}  ({summary['binds']} binds)")
        peak, limit, predicted = (
            summary[name] / MB for name in ("peak_memory_bytes", "memory_limit_bytes", "predicted_peak_bytes")
        )
        outcome.add_row("peak memory", f"{peak:.0f} MB of {limit:.0f} MB (predicted: at most {predicted:.0f} MB)")
    console.print(outcome)
    if news.plan:
        plan = Table("field", "value", "why", title="The plan, from two images", title_justify="left")
        for name, reason in news.plan["why"].items():
            plan.add_row(name, _shown(name, news.plan[name]), reason)
        console.print(plan)
    for problem in news.problems:
        console.print(f"worker: {problem}", style="red", markup=False)
    console.print(f"Boxes drawn on every photograph: {sheet}")
    return lost
