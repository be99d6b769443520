"""`ami devserver`: the desk's Antenna alone in the foreground, to try a worker against."""

from __future__ import annotations

import secrets
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from adc_worker.devserver.server import DevServer

_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"})
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def images_in(folder: Path) -> list[Path]:
    """Return the photographs of a folder by name; ends the command when there is none."""
    files = sorted(file for file in folder.resolve().iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise click.ClickException(f"{folder} has no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    return files


@click.command("devserver")
@click.option("--port", default=8000, show_default=True, help="Port on 127.0.0.1; 0 lets the system choose.")
@click.option("--images", "image_dir", type=FOLDER, help="Folder whose images become one job.")
@click.option("--pipeline", "slug", default="light_sheet_blobs", show_default=True, help="Pipeline of that job.")
@click.option("--ack-wait", "ack_wait_s", default=300.0, show_default=True, help="Seconds before a redelivery.")
@click.option("--max-deliver", default=2, show_default=True, help="Deliveries a task has.")
@click.option("--save-delay", "save_delay_s", default=0.3, show_default=True, help="Seconds to save one result.")
@click.option("--token", default=lambda: secrets.token_hex(20), show_default="a new one", help="The API token.")
def devserver_command(image_dir: Path | None, slug: str, **options: Any) -> None:
    """Run an Antenna for the desk until Ctrl-C.

    Its HTTP API in front of a NATS server of its own.
    """
    try:  # not at the top: `ami --help` must work without the `desk` extra
        from adc_worker.devserver.server import DevServer  # noqa: PLC0415
    except ImportError as error:
        raise click.ClickException(f"{error}: run `pip install 'adc-worker[desk]'`") from error
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        with DevServer(**options) as server:
            _announce(server, slug, image_dir)
            stop.wait()
    except (OSError, RuntimeError) as error:  # the port is taken, or nats-server is missing or does not start
        raise click.ClickException(str(error)) from error


def _announce(server: DevServer, slug: str, image_dir: Path | None) -> None:
    click.echo(f"# put these two lines into .env, then run `ami worker --pipeline {slug}`")
    click.echo(f"AMI_ANTENNA_API_BASE_URL={server.api_url}")
    click.echo(f"AMI_ANTENNA_API_AUTH_TOKEN={server.token}")
    if image_dir is not None:
        files = images_in(image_dir)
        job_id = server.add_job(slug, files)
        click.echo(f"# job {job_id}: {len(files)} images for {slug}")
