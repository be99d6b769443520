"""`ami demo` and `ami devserver`: an Antenna for the desk, with a job and a worker, or alone."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from adc_worker.cli.status import plan_table, size
from adc_worker.errors import ExitCode
from adc_worker.status.hub import report_path

if TYPE_CHECKING:
    from adc_worker.desk.job import Job
    from adc_worker.desk.server import DevServer

PIPELINE = "light_sheet_blobs"
SEED = 2026
SIZES = ((4096, 2160), (4096, 3072))
SAVE_DELAY_S = 0.05  # a real Antenna takes 0.3-0.9 s; nobody wants to watch that
SAVED_WITHIN_S = 60.0  # after the worker has ended, Antenna may still be saving
GRACE_S = 5.0
LOOK_S = 0.1
_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"})
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("devserver")
@click.option("--port", default=8000, show_default=True, help="Port on 127.0.0.1; 0 lets the system choose.")
@click.option("--images", "image_dir", type=_FOLDER, help="Folder whose images become one job.")
@click.option("--pipeline", "slug", default=PIPELINE, show_default=True, help="Pipeline of that job.")
@click.option("--ack-wait", "ack_wait_s", default=300.0, show_default=True, help="Seconds before a redelivery.")
@click.option("--max-deliver", default=2, show_default=True, help="Deliveries a task has.")
@click.option("--save-delay", "save_delay_s", default=0.3, show_default=True, help="Seconds to save one result.")
@click.option("--token", default=lambda: secrets.token_hex(20), show_default="a new one", help="The API token.")
def devserver_command(image_dir: Path | None, slug: str, **options: Any) -> None:
    """Run an Antenna for the desk until Ctrl-C.

    Its HTTP API in front of a NATS server of its own.
    """
    with _stop_signals() as stops, _devserver(**options) as server:
        click.echo(f"# put these two lines into .env, then run `ami worker --pipeline {slug}`")
        click.echo(f"AMI_ANTENNA_API_BASE_URL={server.api_url}")
        click.echo(f"AMI_ANTENNA_API_AUTH_TOKEN={server.token}")
        if image_dir is not None:
            files = _images_in(image_dir)
            click.echo(f"# job {server.add_job(slug, files)}: {len(files)} images for {slug}")
        while not stops:
            time.sleep(LOOK_S)


@click.command("demo")
@click.option("--images", "image_dir", type=_FOLDER, help="Use the photographs of this folder, not generated ones.")
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
    console = Console()
    with (
        _stop_signals() as stops,
        tempfile.TemporaryDirectory(prefix="adc-demo-") as folder,
        _devserver(save_delay_s=SAVE_DELAY_S) as server,
    ):
        files = _images_in(image_dir) if image_dir else _generated(Path(folder) / "images", count, console, stops)
        if stops:
            raise click.Abort
        job_id = server.add_job(PIPELINE, files)
        console.print(f"Antenna at {server.url}, job {job_id} with {len(files)} images")
        code = _run_worker(server, Path(folder), stops)
        if stops:
            raise click.Abort
        job = _saved(server, job_id)
        kept = report_path(Path(folder) / "data")
        _report(job, json.loads(kept.read_bytes()) if kept.is_file() else None, console)
        sheet = output / "contact-sheet.png"
        _write_contact_sheet(job, files, sheet)
    console.print(f"Boxes drawn on every photograph: {sheet}")
    if code:
        console.print(f"the worker ended with exit code {code}", style="red")
    sys.exit(ExitCode.FAILED if code or job.processed < job.total else ExitCode.OK)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM: as exceptions they would come at any moment, such as while a process is started."""
    stops: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _frame: stops.append(number)) for number in numbers}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _devserver(**options: Any) -> Iterator[DevServer]:
    with ExitStack() as stack:
        try:  # not at the top: `ami --help` must work without the `desk` extra
            from adc_worker.desk.server import DevServer  # noqa: PLC0415

            server = stack.enter_context(DevServer(**options))
        except ImportError as error:
            raise click.ClickException(f"{error}: run `pip install 'adc-worker[desk]'`") from error
        except (OSError, RuntimeError) as error:  # the port is taken, or nats-server is missing or does not start
            raise click.ClickException(str(error)) from error
        yield server


def _images_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.resolve().iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise click.ClickException(f"{folder} has no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    return files


def _generated(folder: Path, count: int, console: Console, stops: list[int]) -> list[Path]:
    """Write trap-like photographs, one broken file among them, and name one that does not exist."""
    from adc_worker.desk.sheets import write_sheets  # noqa: PLC0415

    def draw(number: int) -> list[Path]:
        return [] if stops else write_sheets(folder, 1, SEED + number, sizes=(SIZES[number % len(SIZES)],))

    folder.mkdir()
    with console.status(f"drawing {count - 2} photographs"), ThreadPoolExecutor(2) as threads:
        files = [file for drawn in threads.map(draw, range(count - 2)) for file in drawn]
    broken, missing = folder / "broken.jpg", folder / "missing.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 this was a photograph once")
    middle = len(files) // 2
    return [*files[:middle], broken, missing, *files[middle:]]


def _run_worker(server: DevServer, folder: Path, stops: list[int]) -> int:
    """Run `ami worker` as a process of its own, which shows what it does, until it finds nothing more to do."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AMI_")} | {
        "AMI_ANTENNA_API_BASE_URL": server.api_url,
        "AMI_ANTENNA_API_AUTH_TOKEN": server.token,
        "AMI_USER_DATA_PATH": str(folder / "data"),
        "AMI_SHUTDOWN_GRACE_SECONDS": str(GRACE_S),
    }
    if not sys.stderr.isatty():
        environment["AMI_LOG_LEVEL"] = "error"
    command = [sys.executable, "-m", "adc_worker", "worker", "--pipeline", PIPELINE, "--exit-when-idle"]
    with subprocess.Popen(command, cwd=folder, env=environment) as process:  # a folder without .env
        while process.poll() is None and not stops:
            time.sleep(LOOK_S)
        process.terminate()
    return process.returncode


def _saved(server: DevServer, job_id: int) -> Job:
    """Return the job when all its results are saved."""
    deadline = time.monotonic() + SAVED_WITHIN_S
    while (job := server.job(job_id)).processed < job.total and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    return job


def _report(job: Job, board: dict[str, Any] | None, console: Console) -> None:
    """Print what came of the job at Antenna, and what the worker's board says of it."""
    detections = sum(len(result["detections"]) for result in job.results.values())
    outcome = Table(title="What came of it", title_justify="left", show_header=False)
    outcome.add_row("done", str(len(job.results)))
    outcome.add_row("failed", "\n".join([str(job.failed), *(f"  {text}" for text in job.errors.values())]))
    outcome.add_row("lost", str(job.total - job.processed))
    outcome.add_row("redelivered", str(sum(count - 1 for count in job.deliveries.values())))
    outcome.add_row("detections", str(detections))
    view = board["jobs"][0] if board else {}
    plan = view.get("plan")
    if board and plan:  # without one good image there is neither a plan nor a rate
        limit = size(board["workers"][0]["snapshot"]["limit_bytes"])
        peak, predicted = size(view["peak_bytes"]), size(plan["peak_bytes"])
        outcome.add_row("images/s", f"{view['images_per_s']:.2f}  ({plan['binds']} binds)")
        outcome.add_row("peak memory", f"{peak} of {limit} (predicted: at most {predicted})")
    console.print(outcome)
    if plan:
        console.print("The plan, from two images", plan_table(plan, view["why"]), sep="\n")


def _write_contact_sheet(job: Job, files: list[Path], path: Path) -> None:
    from adc_worker.desk.contact_sheet import ContactItem, write_contact_sheet  # noqa: PLC0415

    items = []
    for image_id, file in zip(job.image_ids, files, strict=True):
        found = job.results.get(image_id, {"detections": ()})["detections"]
        boxes = [tuple(int(one["bbox"][name]) for name in ("x1", "y1", "x2", "y2")) for one in found]
        items.append(ContactItem(file, boxes, job.errors.get(image_id)))
    write_contact_sheet(items, path)
