"""`ami worker status` and `ami worker report`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from adc_worker import settings
from adc_worker.cli.status_view import rendered
from adc_worker.errors import ExitCode
from adc_worker.status.channel import running
from adc_worker.status.page import rendered_page
from adc_worker.status.paths import report_path


def status_command(config: settings.Settings, *, as_json: bool) -> ExitCode:
    """Print the workers that run with this data folder; OK when all of them are ready."""
    workers = running(config.user_data_path)
    if as_json:
        click.echo(json.dumps([one.to_dict() for one in workers], indent=1))
    else:
        console = Console()
        for one in workers:
            console.print(rendered(one, details=True))
    if not workers:
        click.echo(
            f"ami: no worker runs on this host with AMI_USER_DATA_PATH={config.user_data_path};"
            " start one with `ami worker`, or go to the folder whose .env it uses",
            err=True,
        )
        return ExitCode.FAILED
    return ExitCode.FAILED if any(one.unready for one in workers) else ExitCode.OK


def report_command(config: settings.Settings, output: Path) -> None:
    """Write the page of the last job, as the worker left it at that job's end."""
    kept = report_path(config.user_data_path)
    if not kept.is_file():
        problem = f"no job has ended yet with AMI_USER_DATA_PATH={config.user_data_path}"
        raise click.ClickException(problem)
    try:
        status = json.loads(kept.read_bytes())
        job_id = status["jobs"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        problem = f"{kept} is damaged: remove it; the next job's end writes it anew"
        raise click.ClickException(problem) from error
    status["saved"] = True  # tells the page that nothing will change
    page = rendered_page(json.dumps(status).encode())
    try:
        output.write_bytes(page)
    except OSError as error:
        raise click.ClickException(f"cannot write {output}: {error.strerror}") from error
    click.echo(f"job {job_id}: {output}")
