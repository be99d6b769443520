"""`ami devserver`: an Antenna for the desk, until it is stopped."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import click

from adc_worker.cli.desk import FOLDER, LOOK_S, PIPELINE, desk_server, images_in, stop_signals


@click.command("devserver")
@click.option("--port", default=8000, show_default=True, help="Port on 127.0.0.1; 0 lets the system choose.")
@click.option("--images", "image_dir", type=FOLDER, help="Folder whose images become one job.")
@click.option("--pipeline", "slug", default=PIPELINE, show_default=True, help="Pipeline of that job.")
@click.option("--ack-wait", "ack_wait_s", default=300.0, show_default=True, help="Seconds before a redelivery.")
@click.option("--max-deliver", default=2, show_default=True, help="Deliveries a task has.")
@click.option("--save-delay", "save_delay_s", default=0.3, show_default=True, help="Seconds to save one result.")
@click.option("--token", default=lambda: secrets.token_hex(20), show_default="a new one", help="The API token.")
def devserver_command(image_dir: Path | None, slug: str, **options: Any) -> None:
    """Run an Antenna for the desk until Ctrl-C.

    Its HTTP API in front of a NATS server of its own.
    """
    with stop_signals() as stops, desk_server(**options) as server:
        click.echo(f"# put these two lines into .env, then run `ami worker --pipeline {slug}`")
        click.echo(f"AMI_ANTENNA_API_BASE_URL={server.api_url}")
        click.echo(f"AMI_ANTENNA_API_AUTH_TOKEN={server.token}")
        if image_dir is not None:
            files = images_in(image_dir)
            job_id = server.add_job(slug, files)
            click.echo(f"# job {job_id}: {len(files)} images for {slug}")
        while not stops:
            time.sleep(LOOK_S)
