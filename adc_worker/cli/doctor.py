"""`ami doctor`: what this host gives a worker and what Antenna lets it do; each finding with the line that fixes it.

It takes no task: a fetch of zero tasks is refused as wrong by an Antenna that would let us fetch, and spends nothing.
"""

from __future__ import annotations

import email.utils
import json
import os
import resource
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import click
import httpx
from rich.console import Console
from rich.text import Text

from adc_worker.antenna import answers
from adc_worker.antenna.answers import Answer
from adc_worker.antenna.wire import JobRef, parse_jobs
from adc_worker.errors import (
    AntennaError,
    AntennaRefused,
    AntennaRejected,
    ConfigurationError,
    ExitCode,
    WorkerFault,
)
from adc_worker.host import budget, memory
from adc_worker.ingest.disk_budget import is_memory
from adc_worker.settings import Settings

if TYPE_CHECKING:
    from adc_worker.models.weights import WeightStore  # imports torch

TIMEOUT_S = 10.0
CLOCK_TOLERANCE_S = (
    60.0  # a presigned URL lives days, a lease minutes; log lines of two hosts are compared by the minute
)
DISK_MIN_BYTES = 2_000_000_000  # what staging leaves free whatever happens (ingest/disk_budget.py)
# 370 MB for torch (docs/measurements.md), as much for a detector, and one large image with its batch.
MEMORY_MIN_BYTES = 1_500_000_000
DESCRIPTORS_MIN = 4096  # today's worker needed about 1000 at work; sockets, staged files and GPU drivers add theirs
NATS_PORT = 4222

ModelFiles = Iterable[tuple[str, str, "WeightStore"]]  # the pipelines a file is of, its URL, its store


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked; `fix` is what to do about it."""

    state: Literal["ok", "note", "problem"]
    check: str
    found: str
    fix: str = ""


def _finding(check: str, found: str, *, problem: str = "", note: str = "") -> Finding:
    """Return a finding whose state follows from what is to be done about it, if anything."""
    return Finding("problem" if problem else "note" if note else "ok", check, found, problem or note)


def findings(config: Settings, model_files: ModelFiles) -> Iterator[Finding]:
    """Check everything, slowest last."""
    yield _memory(config)
    yield _disk(config)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = "set LimitNOFILE=65536 in its systemd unit, minfds=65536 in supervisord.conf, or --ulimit nofile=65536"
    text = f"{hard} ({soft} now; the worker raises that itself)"
    yield _finding("open files", text, problem=fix if hard < DESCRIPTORS_MIN else "")
    yield _gpus()
    proxies = [f"{scheme} via {url.rpartition('@')[2]}" for scheme, url in getproxies().items() if scheme != "no"]
    yield _finding("proxy", ", ".join(proxies) or "none")
    yield _finding("CA certificates", _authorities())
    yield _models(config, model_files)
    if config.antenna_nats_url is not None:
        yield _nats(config.antenna_nats_url.get_secret_value())
    yield from _antenna(config)


def _memory(config: Settings) -> Finding:
    found = memory.memory_limit()
    limit, source = min(
        (found.limit_bytes, found.source), (int(config.memory_limit_bytes or 1 << 62), "AMI_MEMORY_LIMIT_BYTES")
    )
    text = f"{limit / 1e9:.1f} GB ({source}), {found.available_bytes / 1e9:.1f} GB available"
    fix = f"give this worker {MEMORY_MIN_BYTES / 1e9:.1f} GB: models take most of that before the first image"
    short = min(limit, found.available_bytes) < MEMORY_MIN_BYTES
    return _finding(
        "memory", f"{text}; plans with {config.memory_soft_cap:.0%} of the limit", problem=fix if short else ""
    )


def _disk(config: Settings) -> Finding:
    folder = config.effective_staging_path.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    elsewhere = "set AMI_USER_DATA_PATH (or AMI_STAGING_PATH) to a folder on a local disk"
    if not os.access(existing, os.W_OK | os.X_OK):  # also on a disk that is mounted to be read
        return _finding("disk", f"{existing} cannot be written", problem=elsewhere)
    if is_memory(existing):
        return _finding("disk", f"{folder} is memory (tmpfs): images are staged in a small buffer", note=elsewhere)
    more = f"free {(DISK_MIN_BYTES - free) / 1e9:.1f} GB, or {elsewhere}" if free < DISK_MIN_BYTES else ""
    return _finding("disk", f"{free / 1e9:.1f} GB free at {folder}", problem=more)


def _gpus() -> Finding:
    driver = shutil.which("nvidia-smi")
    if driver is None or not budget.visible_gpus():
        return _finding(
            "GPU", "none found: inference runs on the CPU", note="install the NVIDIA driver if there is one"
        )
    command = [driver, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    told = "; ".join(listed.stdout.strip().splitlines())
    return _finding("GPU", told, problem="restart the driver or the host" if listed.returncode else "")


def _authorities() -> str:
    paths = ssl.get_default_verify_paths()
    usual = {paths.openssl_cafile, paths.openssl_capath, None}
    found = next((path for path in (paths.cafile, paths.capath) if path not in usual), None)
    return found or f"Antenna: certifi's; images: {paths.cafile or paths.capath} (SSL_CERT_FILE replaces both)"


def _models(config: Settings, model_files: ModelFiles) -> Finding:
    try:
        here = [store.find(url) is not None for _slugs, url, store in model_files]
    except (ConfigurationError, WorkerFault) as error:
        return Finding("problem", "models", str(error))  # says what to do
    text = f"{sum(here)} of {len(here)} files of Antenna's pipelines are here ({config.models_path})"
    fix = "nothing, a worker fetches what a job needs; before the first job: `ami models fetch [SLUG]...`"
    return _finding("models", text, note="" if all(here) else fix)


def _nats(url: str) -> Finding:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or NATS_PORT
    try:
        with socket.create_connection((host, port), TIMEOUT_S) as connection:
            greeting = connection.recv(5).decode(errors="replace")
    except OSError as error:
        greeting = str(error)
    if greeting == "INFO ":
        return _finding("NATS", f"answers at {host}:{port}")
    fix = "correct AMI_ANTENNA_NATS_URL, or remove it: a worker does without"
    return _finding("NATS", f"{host}:{port}: {greeting}", problem=fix)


def _antenna(config: Settings) -> Iterator[Finding]:
    url, headers = config.antenna_api_base_url, {}
    try:
        headers = {"Authorization": f"Token {config.token}"}
    except ConfigurationError as error:
        yield _finding("token", str(error), problem="AMI_ANTENNA_API_AUTH_TOKEN=<the token of the worker's user>")
    with httpx.Client(base_url=url, headers=headers | answers.IDENTITY, timeout=TIMEOUT_S) as client:
        params = {"dispatch_mode": "async_api", "ids_only": "1", "limit": "1"}
        started = time.monotonic()
        try:
            answer = _ask(client, "GET", "/jobs/", params=params)
            jobs = _read_jobs(answer)
        except AntennaRefused as error:
            fix = "copy the token again from the page of the worker's user in Antenna"
            yield _finding("token", f"Antenna refuses it: {error}", problem=fix)
            return
        except (httpx.HTTPError, AntennaError) as error:
            fix = "AMI_ANTENNA_API_BASE_URL=https://<host>/api/v2, as far as this host may reach it"
            found = f"{url} gives no list of jobs: {str(error).partition(chr(10))[0]}"
            yield _finding("Antenna", found, problem=fix)
            return
        yield _finding("Antenna", f"{url} answers in {time.monotonic() - started:.2f} s")
        if "date" in answer.headers:
            yield _clock(answer.headers["date"])
        if "Authorization" in headers:
            yield _permission(client, jobs)


def _clock(date: str) -> Finding:
    """Compare this host's clock to the date that an answer of Antenna's carries."""
    try:
        theirs = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return _finding("clock", f"Antenna's answer is dated {date[:40]!r}, which is no date")
    ahead_s = time.time() - theirs.timestamp()
    off = abs(ahead_s) > CLOCK_TOLERANCE_S
    text = f"{ahead_s:+.0f} s off Antenna's" if off else "agrees with Antenna's"
    return _finding("clock", text, problem="timedatectl set-ntp true" if off else "")


def _ask(client: httpx.Client, method: str, path: str, **arguments: Any) -> Answer:
    """Return an answer that is a success; raises what any other one means, or httpx.HTTPError without one."""
    with client.stream(method, path, **arguments) as response:
        answer = answers.receive(response, f"{method} {path}")
    if not answer.is_success:
        raise answers.error_for(answer)
    return answer


def _read_jobs(answer: Answer) -> list[JobRef]:
    try:
        return parse_jobs(answer.body)
    except ValueError as error:
        raise answers.not_antenna(answer, "which is no list of jobs") from error


def _permission(client: httpx.Client, jobs: list[JobRef]) -> Finding:
    """A poll works without any token; only a fetch tells what the token may do."""
    if not jobs:
        fix = "run this again when Antenna has a job; until then nothing can be proven"
        return _finding("token", "not refused; whether it may fetch tasks shows only with a job", note=fix)
    job_id = jobs[0].id
    try:
        answer = _ask(client, "POST", f"/jobs/{job_id}/tasks/", json={"batch_size": 0})
    except AntennaRefused as error:
        fix = "use a superuser's token: Antenna grants fetching to no role today"
        return _finding("token", f"a fetch of no tasks: {error}", problem=fix)
    except AntennaRejected as error:
        if error.status == httpx.codes.BAD_REQUEST:
            return _finding("token", f"may fetch tasks (job {job_id} was asked for none)")
        return _finding("token", f"a fetch of no tasks: {error}", problem="look at Antenna's log")
    except (httpx.HTTPError, AntennaError) as error:
        return _finding("token", f"a fetch of no tasks: {type(error).__name__}: {error}", problem="try again")
    found = f"a fetch of no tasks answered {answer.status}, which Antenna does not"
    return _finding("token", found, problem="look at what stands between this host and Antenna")


def doctor_command(config: Settings, warnings: list[str], model_files: ModelFiles, *, as_json: bool) -> ExitCode:
    """Print every finding as it is made; OK when none is a problem."""
    found = []
    console = Console(quiet=as_json)
    with console.status("looking"):
        settings = (_finding("settings", sentence, note="remove the line") for sentence in warnings)
        for one in chain(settings, findings(config, model_files)):
            found.append(one)
            _show(console, one)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
    return ExitCode.FAILED if any(one.state == "problem" for one in found) else ExitCode.OK


def _show(console: Console, one: Finding) -> None:
    sign, style = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "red bold")}[one.state]
    console.print(Text.assemble((f"{sign:8}", style), (f"{one.check:16}", "bold"), one.found), soft_wrap=True)
    if one.fix:
        console.print(Text.assemble(" " * 24, ("-> ", style), one.fix), soft_wrap=True)
