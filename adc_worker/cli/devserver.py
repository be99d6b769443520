"""`ami devserver`: an Antenna for the desk, until it is stopped."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

import click

from adc_worker.cli.desk import FOLDER, LOOK_S, PIPELINE, desk_server, images_in, stop_signals

ENV_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("devserver")
@click.option("--port", default=8000, show_default=True, help="Port on 127.0.0.1; 0 lets the system choose.")
@click.option("--images", "image_dir", type=FOLDER, help="Folder whose images become one job.")
@click.option("--pipeline", "slug", default=PIPELINE, show_default=True, help="Pipeline of that job.")
@click.option("--ack-wait", "ack_wait_s", default=300.0, show_default=True, help="Seconds before a redelivery.")
@click.option("--max-deliver", default=2, show_default=True, help="Deliveries a task has.")
@click.option("--save-delay", "save_delay_s", default=0.3, show_default=True, help="Seconds to save one result.")
@click.option(
    "--write-env", "env_file", type=ENV_FILE, help="Write URL and token to this new file, as a worker's .env."
)
@click.option("--token", default=lambda: secrets.token_hex(20), show_default="a new one", help="The API token.")
def devserver_command(image_dir: Path | None, slug: str, env_file: Path | None, **options: Any) -> None:
    """Run an Antenna for the desk until Ctrl-C.

    Its HTTP API in front of a NATS server of its own.
    """
    if env_file is not None:
        _refuse_existing(env_file)
    with stop_signals() as stops, desk_server(**options) as server:
        lines = [
            f"AMI_ANTENNA_API_BASE_URL={server.api_url}",
            f"AMI_ANTENNA_API_AUTH_TOKEN={server.token}",
        ]
        click.echo(f"# put these two lines into .env, then run `ami worker --pipeline {slug}`")
        click.echo("\n".join(lines))
        if image_dir is not None:
            files = images_in(image_dir)
            job_id = server.add_job(slug, files)
            click.echo(f"# job {job_id}: {len(files)} images for {slug}")
        if env_file is not None:
            _write_new(env_file, lines)
            click.echo(f"# wrote them to {env_file}")
        while not stops:
            time.sleep(LOOK_S)


def _refuse_existing(file: Path) -> None:
    if file.exists():
        problem = f"--write-env {file}: the file exists and may hold other settings: name a new one"
        raise click.ClickException(problem)


def _write_new(file: Path, lines: list[str]) -> None:
    """Write a file that only its owner can read: a token is in it."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise click.ClickException(f"--write-env {file}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as stream:
        stream.writelines(f"{line}\n" for line in lines)
