"""The command line: `ami …`, `adc-worker …` and `python -m adc_worker …`.

What a command needs is imported when it runs: help and version take no time, and no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adc_worker import __version__, log, settings
from adc_worker.cli.demo import demo_command
from adc_worker.cli.devserver import devserver_command
from adc_worker.cli.live_view import live_view
from adc_worker.cli.status import report_command, status_command
from adc_worker.errors import (
    AntennaError,
    AntennaRefused,
    AntennaRejected,
    AntennaUnavailable,
    AntennaUnreachable,
    ConfigurationError,
    ExitCode,
    WorkerFault,
)
from adc_worker.redaction import redact
from adc_worker.settings import WorkerOptions
from adc_worker.status.channel import listening
from adc_worker.status.hub import StatusHub

if TYPE_CHECKING:
    from adc_worker.models.weights import WeightStore

_ENV_FILE = click.option(
    "--env-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read AMI_ variables from this file, too. The environment wins over it, it over ./.env.",
)


class _Program(click.Group):
    """Ends a command that fails with one line that says what is wrong, and with its exit code."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except (ConfigurationError, AntennaError, WorkerFault) as error:
            click.echo(redact(f"ami: {error}"), err=True)
            raise SystemExit(_exit_code(error)) from None


def _exit_code(error: ConfigurationError | AntennaError | WorkerFault) -> ExitCode:
    """Return what a supervisor may make of a command's end: an Antenna that is away may be back at the next try.

    An address where nobody listens counts as a wrong setting, as at a worker's first start.
    """
    if isinstance(error, WorkerFault):
        return error.exit_code
    nobody_there = isinstance(error, AntennaUnreachable) and not error.connected
    if isinstance(error, AntennaUnavailable) and not nobody_there:
        return ExitCode.FAILED
    return ExitCode.CONFIGURATION


class _WorkerGroup(click.Group):
    """`ami worker` is `ami worker run`, with the same options."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if args:
            is_run = args[0].startswith("-") and args[0] not in {"-h", "--help", "--version"}
        else:
            is_run = not context.resilient_parsing  # a shell that completes asks what may follow
        if is_run:
            args = ["run", *args]
        return super().parse_args(context, args)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ami")
def cli() -> None:
    """A worker for Antenna that nobody has to tune.

    Set AMI_ANTENNA_API_BASE_URL and AMI_ANTENNA_API_AUTH_TOKEN, then start `ami worker`. To see it
    work without an Antenna, start `ami demo`.

    \b
      ami doctor            is everything here that a worker needs?
      ami worker            work until Ctrl-C; a second Ctrl-C does not wait
      ami worker status     how is the worker on this host doing?
      ami worker report     the last job as one HTML page
      ami worker tune SLUG  what would it do on a job, and why?

    Completion: eval "$(_AMI_COMPLETE=bash_source ami)" in ~/.bashrc, or zsh_source in ~/.zshrc.
    """  # noqa: D301 (click's mark for "do not rewrap" is the character itself)


@cli.group(cls=_WorkerGroup)
@click.version_option(__version__, prog_name="ami worker")
def worker() -> None:
    """Pull tasks, find insects, post results. Without a subcommand: run.

    Two images of each job are measured, and how the job is fed is computed from them: there is
    nothing to tune. On a terminal it shows what it does; elsewhere it writes one JSON object a line
    (AMI_LOG_FORMAT).

    \b
      ami worker                                Antenna's ten pipelines
      ami worker --pipeline light_sheet_blobs   this one
      ami worker --exit-when-idle               for batch systems: end when no job has tasks left
      AMI_STATUS_PORT=9100 ami worker           status page on http://127.0.0.1:9100/
      ami worker run --help                     all its options
    """  # noqa: D301


@worker.command("run")
@click.option("--pipeline", "pipelines", multiple=True, metavar="SLUG", help="Work for this pipeline; repeatable.")
@click.option("--project", type=int, help="Work for this project only.")
@click.option("--exit-when-idle", is_flag=True, help="End when no job has tasks left; for batch systems.")
@_ENV_FILE
def worker_run(pipelines: tuple[str, ...], project: int | None, exit_when_idle: bool, env_file: Path | None) -> None:
    """Run the worker until it is stopped."""
    from adc_worker.host.budget import visible_gpus  # noqa: PLC0415
    from adc_worker.runtime.supervisor import Supervisor  # noqa: PLC0415

    config = settings.load(env_file)
    _check_token(config, env_file)
    terminal = sys.stderr.isatty()
    watched = terminal and config.log_format is None
    log_format = "json" if watched else config.log_format_on(terminal=terminal)
    log.configure(log_format, config.log_level)
    options = WorkerOptions(
        pipelines=pipelines,
        project=project,
        exit_when_idle=exit_when_idle,
        env_file=env_file,
        log_format=log_format,
    )
    with ExitStack() as stack:
        instances = config.worker_instances or max(1, len(visible_gpus()))
        hub = StatusHub(instances, config.antenna_ack_wait_seconds)
        stack.enter_context(listening(hub, config.user_data_path))
        if watched:
            stack.enter_context(live_view(hub))
        _log_start(config, env_file)
        if config.status_address is not None:
            from adc_worker.status.http import serving  # noqa: PLC0415

            stack.enter_context(serving(hub, config.status_address))
        code = Supervisor(options, config).run()
    sys.exit(code)


def _check_token(config: settings.Settings, env_file: Path | None) -> None:
    """Say that the token is missing or cannot be read before anything starts."""
    try:
        _token = config.token
    except ConfigurationError as error:
        meant = f"did you mean {settings.variable('antenna_api_auth_token')}"
        warnings = settings.warnings_for(config, env_file)
        misspelt = [sentence for sentence in warnings if meant in sentence]
        raise ConfigurationError("; ".join([str(error), *misspelt])) from None


def _log_start(config: settings.Settings, env_file: Path | None) -> None:
    logger = log.get_logger(__name__)
    logger.info(
        "start",
        version=__version__,
        antenna=config.antenna_api_base_url,
        mode=config.ingest_mode,
        limits=settings.limits_set(config),
    )
    for sentence in settings.warnings_for(config, env_file):
        logger.warning("setting", note=sentence)


@worker.command("register")
@click.argument("name", required=False)
@click.option("--project", "projects", type=int, multiple=True, help="Register with this project only; repeatable.")
@click.option("--pipeline", "pipelines", multiple=True, metavar="SLUG", help="Register this pipeline; repeatable.")
@_ENV_FILE
def worker_register(
    name: str | None, projects: tuple[int, ...], pipelines: tuple[str, ...], env_file: Path | None
) -> None:
    """Tell Antenna which pipelines this worker serves, under NAME or AMI_ANTENNA_SERVICE_NAME."""
    from adc_worker.antenna import registration  # noqa: PLC0415
    from adc_worker.antenna.client import AntennaClient  # noqa: PLC0415
    from adc_worker.models import registry  # noqa: PLC0415 (imports torch)

    config = settings.load(env_file)
    service = registration.service_name(name or config.antenna_service_name)
    entries = [
        registration.pipeline_entry(spec.slug, spec.name, spec.labelled() if spec.labelled else spec.algorithms)
        for spec in registry.choose(registry.available(config), pipelines)
    ]
    with AntennaClient(config.antenna_api_base_url, config.token) as client:
        refused = []
        for project in projects or [row.id for row in client.projects()]:
            try:
                new = registration.register(client, project, service, entries)
            except (ConfigurationError, AntennaRefused, AntennaRejected) as error:
                refused.append(f"project {project}: {error}")
                continue
            click.echo(
                f"project {project}: {service} serves {len(entries)} pipelines; new: {', '.join(new) or 'nothing'}"
            )
    if refused:
        raise ConfigurationError("; ".join(refused))


@cli.group()
def models() -> None:
    """Files of the models: weights and labels."""


@models.command("list")
@_ENV_FILE
def models_list(env_file: Path | None) -> None:
    """Show every file, its size, its SHA-256 where it was fetched from here, and its place."""
    for slugs, url, store in _model_files(settings.load(env_file), ()):
        path = store.find(url)
        size = f"{path.stat().st_size / 1e6:.1f} MB" if path else "missing"
        digest = str(store.record(url).get("sha256", "-"))
        place = path or store.destination(url)
        click.echo(f"{size:>10}  {digest[:16]:16}  {place}  ({slugs})")


@models.command("fetch")
@click.argument("pipelines", nargs=-1, metavar="[SLUG]...")
@_ENV_FILE
def models_fetch(pipelines: tuple[str, ...], env_file: Path | None) -> None:
    """Fetch what is not here yet for these pipelines, or for all.

    A fetch that broke off goes on where it was.
    """
    config = settings.load(env_file)
    log.configure(config.log_format_on(terminal=sys.stderr.isatty()), config.log_level)
    for _slugs, url, store in _model_files(config, pipelines):
        click.echo(store.ensure(url))


def _model_files(config: settings.Settings, pipelines: Sequence[str]) -> Iterator[tuple[str, str, WeightStore]]:
    """Yield each file once: the pipelines that use it, its URL, and the store it belongs to."""
    from adc_worker.models import registry  # noqa: PLC0415 (imports torch)
    from adc_worker.models.weights import WeightStore  # noqa: PLC0415

    store = WeightStore(config.models_path)
    specs = registry.choose(registry.available(config), pipelines)
    urls = dict.fromkeys(url for spec in specs for url in spec.files)
    for url in urls:
        slugs = [spec.slug for spec in specs if url in spec.files]
        users = slugs[0] if len(slugs) == 1 else f"{len(slugs)} pipelines"
        yield users, url, store


@worker.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@_ENV_FILE
def worker_status(as_json: bool, env_file: Path | None) -> None:
    """Show the worker that runs on this host.

    Exit code 1 when none does, or when it is not ready.
    """
    sys.exit(status_command(settings.load(env_file), as_json=as_json))


@worker.command("tune")
@click.argument("target", metavar="PIPELINE|PROJECT")
@click.option("--write", "env_out", type=click.Path(path_type=Path, dir_okay=False), help="Set the plan in this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_ENV_FILE
def worker_tune(target: str, env_out: Path | None, as_json: bool, env_file: Path | None) -> None:
    """Show the plan for a job before it runs.

    Measures two photographs of the first job that Antenna lists for a pipeline's slug or a
    project's number, and prints machine, plan and arithmetic. Where Antenna lists the job's
    photographs no task is taken; else two are, and their results are posted. --write sets ceilings:
    nobody needs them.
    """
    from adc_worker.cli.tune import tune_command  # noqa: PLC0415
    from adc_worker.runtime.supervisor import be_like_a_child  # noqa: PLC0415

    config = settings.load(env_file)
    log.configure("console", "warning")
    be_like_a_child()
    tune_command(config, target, env_out, as_json=as_json)


@worker.command("report")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False), default=Path("worker-report.html"))
@_ENV_FILE
def worker_report(output: Path, env_file: Path | None) -> None:
    """Save the last job as one HTML page.

    Plan with reasons, memory over time, errors by cause. It is kept at each job's end, so that no
    worker need run.
    """
    report_command(settings.load(env_file), output)


@cli.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@_ENV_FILE
def doctor(as_json: bool, env_file: Path | None) -> None:
    """Check this host and the way to Antenna.

    Takes no task and changes nothing. Exit code 1 when something has to be fixed.
    """
    from adc_worker.cli.doctor import doctor_command  # noqa: PLC0415

    config = settings.load(env_file)
    warnings = settings.warnings_for(config, env_file)
    sys.exit(doctor_command(config, warnings, _model_files(config, ()), as_json=as_json))


@cli.command("settings")
@click.option("--env-example", is_flag=True, help="Print the text of .env.example.")
@_ENV_FILE
def settings_command(env_example: bool, env_file: Path | None) -> None:
    """Show the settings in force, or every setting there is."""
    if env_example:
        click.echo(settings.env_example(), nl=False)
        return
    config = settings.load(env_file)
    for name in type(config).model_fields:
        click.echo(redact(f"{settings.variable(name)}={getattr(config, name)}"))


cli.add_command(demo_command)
cli.add_command(devserver_command)


def main() -> None:
    """Run the command line on Linux; elsewhere say why it does not run."""
    if sys.platform != "linux":
        reason = "pidfd, memfd and /proc are what its memory bound stands on"
        sys.exit(f"ami: runs on Linux, not on {sys.platform}: {reason}")
    cli()
