"""`ami demo`: a whole job on this machine, with an Antenna of the desk and a real worker."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from adc_worker.cli.desk import FOLDER, LOOK_S, PIPELINE, desk_server, images_in, stop_signals
from adc_worker.cli.status_view import plan_table, size
from adc_worker.errors import ExitCode
from adc_worker.status.paths import report_path
from adc_worker.status.worker_status import WorkerStatus

if TYPE_CHECKING:
    from adc_worker.desk.job import Job
    from adc_worker.desk.server import DevServer

# All of these were chosen.
SEED = 2026
SIZES = ((4096, 2160), (4096, 3072))
DRAWING_THREADS = 2
SAVE_DELAY_S = 0.05  # a real Antenna takes 0.3 to 0.9 s, which nobody wants to watch
SAVED_WITHIN_S = 60.0  # Antenna may still be saving when the worker has ended
GRACE_S = 5.0


@click.command("demo")
@click.option("--images", "image_dir", type=FOLDER, help="Use the photographs of this folder, not generated ones.")
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
    contact_sheet = output / "contact-sheet.png"
    with (
        stop_signals() as stops,
        tempfile.TemporaryDirectory(prefix="adc-demo-") as temporary,
        desk_server(save_delay_s=SAVE_DELAY_S) as server,
    ):
        folder = Path(temporary)
        generated = folder / "images"
        files = images_in(image_dir) if image_dir else _generate(generated, count, console, stops)
        if stops:
            raise click.Abort
        job_id = server.add_job(PIPELINE, files)
        console.print(f"Antenna at {server.url}, job {job_id} with {len(files)} images")
        code = _run_worker(server, folder, stops)
        if stops:
            raise click.Abort
        job = _wait_until_saved(server, job_id)
        _show_outcome(job, _last_status(folder), console)
        _write_contact_sheet(job, files, contact_sheet)
    console.print(f"Boxes drawn on every photograph: {contact_sheet}")
    if code:
        console.print(f"the worker ended with exit code {code}", style="red")
    complete = job.processed == job.total
    sys.exit(ExitCode.OK if complete and code == 0 else ExitCode.FAILED)


def _generate(folder: Path, count: int, console: Console, stops: list[int]) -> list[Path]:
    """Write photographs like those of a light trap.

    Returns:
        Their paths; in the middle one broken file and one that does not exist.
    """
    from adc_worker.desk.sheets import write_sheets  # noqa: PLC0415 (help needs no numpy)

    def draw(number: int) -> list[Path]:
        if stops:
            return []
        size = SIZES[number % len(SIZES)]
        return write_sheets(folder, 1, SEED + number, sizes=(size,))

    folder.mkdir()
    files: list[Path] = []
    good = count - 2
    with console.status(f"drawing {good} photographs"), ThreadPoolExecutor(DRAWING_THREADS) as threads:
        for drawn in threads.map(draw, range(good)):
            files += drawn
    broken = folder / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 this was a photograph once")
    middle = len(files) // 2
    files[middle:middle] = [broken, folder / "missing.jpg"]
    return files


def _run_worker(server: DevServer, folder: Path, stops: list[int]) -> int:
    """Run `ami worker`, which shows what it does, in a process of its own until no task is left.

    Returns:
        Its exit code.
    """
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("AMI_")}
    environment |= {
        "AMI_ANTENNA_API_BASE_URL": server.api_url,
        "AMI_ANTENNA_API_AUTH_TOKEN": server.token,
        "AMI_USER_DATA_PATH": str(_data_folder(folder)),
        "AMI_SHUTDOWN_GRACE_SECONDS": str(GRACE_S),
    }
    if not sys.stderr.isatty():
        environment["AMI_LOG_LEVEL"] = "error"
    program = [sys.executable, "-m", "adc_worker"]
    command = [*program, "worker", "--pipeline", PIPELINE, "--exit-when-idle"]
    with subprocess.Popen(command, cwd=folder, env=environment) as process:  # a folder without .env
        while process.poll() is None and not stops:
            time.sleep(LOOK_S)
        process.terminate()
    return process.returncode


def _data_folder(folder: Path) -> Path:
    return folder / "data"


def _wait_until_saved(server: DevServer, job_id: int) -> Job:
    """Return the job when Antenna has saved all its results, or after a minute."""
    deadline = time.monotonic() + SAVED_WITHIN_S
    while True:
        job = server.job(job_id)
        if job.processed == job.total or time.monotonic() > deadline:
            return job
        time.sleep(LOOK_S)


def _last_status(folder: Path) -> WorkerStatus | None:
    """Return the worker's status at the end of the job; None where no job ended."""
    kept = report_path(_data_folder(folder))
    return WorkerStatus.from_json(kept.read_bytes()) if kept.is_file() else None


def _show_outcome(job: Job, status: WorkerStatus | None, console: Console) -> None:
    """Print what came of the job at Antenna, and what the worker says of it."""
    failed = [str(job.failed)]
    failed += [f"  {text}" for text in job.errors.values()]
    redelivered = sum(count - 1 for count in job.deliveries.values())
    detections = sum(len(result["detections"]) for result in job.results.values())
    outcome = Table(title="What came of it", title_justify="left", show_header=False)
    outcome.add_row("done", str(len(job.results)))
    outcome.add_row("failed", "\n".join(failed))
    outcome.add_row("lost", str(job.total - job.processed))
    outcome.add_row("redelivered", str(redelivered))
    outcome.add_row("detections", str(detections))
    view = status.jobs[0] if status else None
    if status is None or view is None or not view.plan:  # no image was good: there is no rate either
        console.print(outcome)
        return
    limit = size(status.workers[0].snapshot.limit_bytes)
    predicted = size(view.plan["peak_bytes"])
    peak = f"{size(view.peak_bytes)} of {limit} (predicted: at most {predicted})"
    outcome.add_row("images/s", f"{view.images_per_s:.2f}  ({view.plan['binds']} binds)")
    outcome.add_row("peak memory", peak)
    console.print(outcome)
    console.print("The plan, from two images", plan_table(view.plan, view.why), sep="\n")


def _write_contact_sheet(job: Job, files: list[Path], path: Path) -> None:
    from adc_worker.desk.contact_sheet import ContactItem, write_contact_sheet  # noqa: PLC0415 (help needs no PIL)

    items = []
    for image_id, file in zip(job.image_ids, files, strict=True):
        detections = job.results.get(image_id, {}).get("detections", ())
        boxes = [_box(detection) for detection in detections]
        items.append(ContactItem(file, boxes, job.errors.get(image_id)))
    write_contact_sheet(items, path)


def _box(detection: dict[str, dict[str, float]]) -> tuple[int, ...]:
    box = detection["bbox"]
    return tuple(int(box[side]) for side in ("x1", "y1", "x2", "y2"))
