"""`ami devserver`: the desk's Antenna alone in the foreground, to try a worker against."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from types import FrameType

    from adc_worker.devserver.server import DevServer

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"}


@click.command("devserver")
@click.option("--port", default=8000, show_default=True, help="Port on 127.0.0.1; 0 lets the system choose.")
@click.option(
    "--images",
    "image_dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder whose images become one job.",
)
@click.option("--pipeline", "slug", default="light_sheet_blobs", show_default=True, help="Pipeline of that job.")
@click.option("--ack-wait", "ack_wait_s", default=300.0, show_default=True, help="Seconds before a redelivery.")
@click.option("--max-deliver", default=2, show_default=True, help="Deliveries a task has.")
@click.option("--save-delay", "save_delay_s", default=0.3, show_default=True, help="Seconds to save one result.")
@click.option("--token", help="The API token.  [default: a new one]")
def devserver_command(
    port: int,
    image_dir: Path | None,
    slug: str,
    ack_wait_s: float,
    max_deliver: int,
    save_delay_s: float,
    token: str | None,
) -> None:
    """Run an Antenna for the desk until Ctrl-C: its HTTP API in front of a NATS server of its own."""
    try:  # not at the top: `ami --help` must work without the `desk` extra
        from adc_worker.devserver.server import DevServer  # noqa: PLC0415
    except ImportError as error:
        raise click.ClickException(f"{error}: run `pip install 'adc-worker[desk]'`") from error
    server = DevServer(port=port, ack_wait_s=ack_wait_s, max_deliver=max_deliver, save_delay_s=save_delay_s)
    if token:
        server.token = token
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with server:
            _announce(server, slug, image_dir)
            stop.wait()
    except (OSError, RuntimeError) as error:  # the port is taken, or nats-server is missing or does not start
        raise click.ClickException(str(error)) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _announce(server: DevServer, slug: str, image_dir: Path | None) -> None:
    click.echo("# put these two lines into .env, then run `ami worker`")
    click.echo(f"AMI_ANTENNA_API_BASE_URL={server.api_url}")
    click.echo(f"AMI_ANTENNA_API_AUTH_TOKEN={server.token}")
    if image_dir is not None:
        files = sorted(file for file in image_dir.resolve().iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        job_id = server.add_job(slug, files)
        click.echo(f"# job {job_id}: {len(files)} images for {slug}")
