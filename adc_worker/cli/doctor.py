"""`ami doctor`: what this host gives a worker and what Antenna lets it do; each finding with the line that fixes it.

It takes no task: a fetch of zero tasks is refused as wrong by an Antenna that would let us fetch, and spends nothing.
"""

from __future__ import annotations

import email.utils
import json
import resource
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import click
import httpx
from rich.console import Console
from rich.text import Text

from adc_worker.errors import ConfigurationError, ExitCode, WorkerFault
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
# 370 MB for torch (measurements, "Other costs"), as much for a detector, and one large image with its batch.
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


def findings(config: Settings, model_files: ModelFiles) -> Iterator[Finding]:
    """Check everything, slowest last."""
    yield from _memory(config)
    yield from _disk(config)
    yield from _descriptors()
    yield from _gpus()
    yield from _way_out()
    yield from _models(config, model_files)
    yield from _nats(config)
    yield from _antenna(config)


def _memory(config: Settings) -> Iterator[Finding]:
    found = memory.memory_limit()
    limit, source = min(
        (found.limit_bytes, found.source), (int(config.memory_limit_bytes or 1 << 62), "AMI_MEMORY_LIMIT_BYTES")
    )
    text = f"{limit / 1e9:.1f} GB ({source}), {found.available_bytes / 1e9:.1f} GB available"
    if min(limit, found.available_bytes) < MEMORY_MIN_BYTES:
        fix = f"give this worker {MEMORY_MIN_BYTES / 1e9:.1f} GB: models take most of that before the first image"
        yield Finding("problem", "memory", text, fix)
    else:
        yield Finding("ok", "memory", f"{text}; plans with {config.memory_soft_cap:.0%} of the limit")


def _disk(config: Settings) -> Iterator[Finding]:
    folder = config.effective_staging_path.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.1f} GB free at {folder}"
    elsewhere = "set AMI_USER_DATA_PATH (or AMI_STAGING_PATH) to a folder on a local disk"
    probe = existing / f".adc-doctor-{time.time_ns()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Finding("problem", "disk", f"{existing} cannot be written: {error.strerror}", elsewhere)
        return
    if is_memory(existing):
        yield Finding("note", "disk", f"{folder} is memory (tmpfs): images are staged in a small buffer", elsewhere)
    elif free < DISK_MIN_BYTES:
        yield Finding("problem", "disk", text, f"free {(DISK_MIN_BYTES - free) / 1e9:.1f} GB, or {elsewhere}")
    else:
        yield Finding("ok", "disk", text)


def _descriptors() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < DESCRIPTORS_MIN:
        fix = "set LimitNOFILE=65536 in its systemd unit, minfds=65536 in supervisord.conf, or --ulimit nofile=65536"
        yield Finding("problem", "open files", f"at most {hard}", fix)
    else:
        yield Finding("ok", "open files", f"{hard} ({soft} now; the worker raises that itself)")


def _gpus() -> Iterator[Finding]:
    driver = shutil.which("nvidia-smi")
    if driver is None or not budget.visible_gpus():
        yield Finding(
            "note", "GPU", "none found: inference runs on the CPU", "install the NVIDIA driver if there is one"
        )
        return
    listed = subprocess.run(
        [driver, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    if listed.returncode:
        yield Finding("problem", "GPU", f"nvidia-smi: {listed.stdout.strip()}", "restart the driver or the host")
        return
    yield Finding("ok", "GPU", "; ".join(listed.stdout.strip().splitlines()))


def _models(config: Settings, model_files: ModelFiles) -> Iterator[Finding]:
    try:
        here = [store.find(url) is not None for _slugs, url, store in model_files]
    except (ConfigurationError, WorkerFault) as error:  # both say what to do
        yield Finding("problem", "models", str(error))
        return
    text = f"{sum(here)} of {len(here)} files of Antenna's pipelines are here ({config.models_path})"
    fix = "nothing, a worker fetches what a job needs; before the first job: `ami models fetch [SLUG]...`"
    yield Finding("ok", "models", text) if all(here) else Finding("note", "models", text, fix)


def _way_out() -> Iterator[Finding]:
    proxies = ", ".join(
        f"{scheme} via {url.rpartition('@')[2]}" for scheme, url in getproxies().items() if scheme != "no"
    )
    yield Finding("ok", "proxy", proxies or "none")
    paths = ssl.get_default_verify_paths()
    own = next((path for path, usual in ((paths.cafile, paths.openssl_cafile), (paths.capath, paths.openssl_capath))
                if path and path != usual), None)  # fmt: skip
    found = own or f"Antenna: certifi's; images: {paths.cafile or paths.capath} (SSL_CERT_FILE replaces both)"
    yield Finding("ok", "CA certificates", found)


def _nats(config: Settings) -> Iterator[Finding]:
    if config.antenna_nats_url is None:
        return
    parts = urlsplit(config.antenna_nats_url.get_secret_value())
    address = (parts.hostname or "", parts.port or NATS_PORT)
    try:
        with socket.create_connection(address, TIMEOUT_S) as connection:
            greeting = connection.recv(5)
    except OSError as error:
        greeting = str(error).encode()
    if greeting == b"INFO ":
        yield Finding("ok", "NATS", f"answers at {address[0]}:{address[1]}")
    else:
        fix = "correct AMI_ANTENNA_NATS_URL, or remove it: a worker does without"
        yield Finding("problem", "NATS", f"{address[0]}:{address[1]}: {greeting.decode(errors='replace')}", fix)


def _antenna(config: Settings) -> Iterator[Finding]:
    url = config.antenna_api_base_url
    try:
        headers = {"Authorization": f"Token {config.token}"}
    except ConfigurationError as error:
        yield Finding("problem", "token", str(error), "AMI_ANTENNA_API_AUTH_TOKEN=<the token of the worker's user>")
        headers = {}
    with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S) as client:
        try:
            answer = client.get("/jobs/", params={"dispatch_mode": "async_api", "ids_only": "1", "limit": "1"})
        except httpx.HTTPError as error:
            fix = "correct AMI_ANTENNA_API_BASE_URL, or see that this host may reach it"
            yield Finding("problem", "Antenna", f"{url}: {type(error).__name__}: {error}", fix)
            return
        refused = answer.status_code in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}
        try:
            jobs = [] if refused else answer.raise_for_status().json()["results"]
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError):
            fix = "AMI_ANTENNA_API_BASE_URL=https://<host>/api/v2"
            yield Finding("problem", "Antenna", f"{url}/jobs/ answers {answer.status_code}, not a list of jobs", fix)
            return
        yield Finding("ok", "Antenna", f"{url} answers in {answer.elapsed.total_seconds():.2f} s")
        yield from _clock(answer)
        if refused:
            fix = "copy the token again from the page of the worker's user in Antenna"
            yield Finding("problem", "token", f"Antenna answers {answer.status_code}: {answer.text[:100]}", fix)
        elif headers:
            yield from _permission(client, jobs)


def _clock(answer: httpx.Response) -> Iterator[Finding]:
    if "date" not in answer.headers:
        return
    ahead_s = time.time() - email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
    if abs(ahead_s) > CLOCK_TOLERANCE_S:
        yield Finding("problem", "clock", f"{ahead_s:+.0f} s off Antenna's", "timedatectl set-ntp true")
    else:
        yield Finding("ok", "clock", "agrees with Antenna's")


def _permission(client: httpx.Client, jobs: list[dict[str, int]]) -> Iterator[Finding]:
    """A poll works without any token; only a fetch tells what the token may do."""
    if not jobs:
        fix = "run this again when Antenna has a job; until then nothing can be proven"
        yield Finding("note", "token", "not refused; whether it may fetch tasks shows only with a job", fix)
        return
    try:
        answer = client.post(f"/jobs/{jobs[0]['id']}/tasks/", json={"batch_size": 0})
    except httpx.HTTPError as error:
        yield Finding("problem", "token", f"a fetch of no tasks: {type(error).__name__}: {error}", "try again")
        return
    if answer.status_code == httpx.codes.BAD_REQUEST:
        yield Finding("ok", "token", f"may fetch tasks (job {jobs[0]['id']} was asked for none)")
    elif answer.status_code in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
        fix = "use a superuser's token: Antenna grants fetching to no role today"
        yield Finding("problem", "token", f"may not fetch tasks: {answer.status_code} {answer.text[:100]}", fix)
    else:
        fix = "look at Antenna's log"
        yield Finding("problem", "token", f"a fetch of no tasks: {answer.status_code} {answer.text[:100]}", fix)


def doctor_command(config: Settings, warnings: list[str], model_files: ModelFiles, *, as_json: bool) -> ExitCode:
    """Print every finding as it is made; OK when none is a problem."""
    found = [Finding("note", "settings", sentence, "remove the line") for sentence in warnings]
    console = Console()
    for one in found if not as_json else ():
        _show(console, one)
    with console.status("looking") if not as_json else console.capture():
        for one in findings(config, model_files):
            found.append(one)
            if not as_json:
                _show(console, one)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
    return ExitCode.FAILED if any(one.state == "problem" for one in found) else ExitCode.OK


def _show(console: Console, one: Finding) -> None:
    sign, style = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "red bold")}[one.state]
    console.print(Text.assemble((f"{sign:8}", style), (f"{one.check:16}", "bold"), one.found), soft_wrap=True)
    if one.fix:
        console.print(Text.assemble(" " * 24, ("-> ", style), one.fix), soft_wrap=True)
