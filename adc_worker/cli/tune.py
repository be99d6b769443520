"""`ami worker tune`: prints the plan for a job with its arithmetic, and what the old constants would have done."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from adc_worker.cli.status_view import plan_table, size
from adc_worker.errors import ConfigurationError
from adc_worker.runtime.tune import Tuning, tune
from adc_worker.settings import Settings, limits_set, variable
from adc_worker.tuning.plan import IngestPlan
from adc_worker.tuning.policy import FIXED_PREFETCH

BINDS = {
    "link": "link-bound: more RAM, more cores or a faster GPU would not help",
    "decode": "decode-bound: more cores would help, more RAM would not",
    "inference": "inference-bound: a faster GPU would help, more RAM or a faster link would not",
    "memory": "memory-bound: more RAM would allow larger batches or more decoders",
    "vram": "GPU-memory-bound: more free memory of the GPU would allow larger batches",
    "lease": "lease-bound: a longer lease (AMI_ANTENNA_ACK_WAIT_SECONDS, as Antenna has it) would allow larger batches",
    "ceiling": "held down by a setting, or by the open files allowed: with more the job would be faster",
}
# What --write sets, and the part of a plan it takes. Whether to pin memory is no ceiling: false would forbid it where
# it may be found to help.
WRITTEN = {
    "antenna_api_batch_size": "fetch_size",
    "antenna_api_dataloader_prefetch_factor": "prefetch_factor",
    "antenna_api_dataloader_download_threads": "download_concurrency",
    "antenna_api_dataloader_num_workers": "decode_workers",
}


def tune_command(config: Settings, target: str, env_out: Path | None, *, as_json: bool) -> None:
    """Tune, print, and write where that was asked for."""
    planned = config
    if env_out is not None:
        read_env(env_out)  # what is wrong with it is said before minutes of measuring
        # Not within what an earlier one wrote, or each would bring the values further down.
        planned = config.model_copy(update={"ingest_mode": "auto", **dict.fromkeys(WRITTEN)})
    with Console(stderr=True).status(f"measuring a job of {target}"):  # drawn on a terminal only
        tuning = tune(planned, target)
    limits = {name: value for name, value in limits_set(planned).items() if value is not None}
    if as_json:
        click.echo(json.dumps(tuning.to_json() | {"limits": limits, "verdict": BINDS[tuning.plan.binds]}))
    else:
        show(tuning, limits, Console(highlight=False, markup=False))  # what a host answered is no markup
    if env_out is not None:
        write_env(env_out, recommended(tuning.plan, config))
        click.echo(f"wrote {env_out}: ceilings for every job; without them each job has a plan of its own", err=True)


def show(tuning: Tuning, limits: dict[str, Any], console: Console) -> None:
    host, report, plan, old, lease = tuning.host, tuning.report, tuning.plan, tuning.old, tuning.lease
    gpu = f"a GPU with {size(host.vram_free_bytes)} free" if host.gpu else "no GPU"
    staged = "memory" if host.staging_in_memory else "disk"
    rows = Table.grid(padding=(0, 2))
    rows.add_row("job", f"{tuning.job_id}, {tuning.pipeline}")
    rows.add_row(
        "machine",
        f"{size(host.limit_bytes)} of memory ({host.limit_source}), {size(host.available_bytes)} available,"
        f" {host.cores} cores, {gpu}, {size(host.staging_bytes)} of {staged} for staged images,"
        f" {host.descriptors} open files",
    )
    rows.add_row("lease", f"{lease.ack_wait_s:.0f} s, {lease.max_deliver} deliveries")
    rows.add_row("limits", ", ".join(f"{name}={value}" for name, value in limits.items()) or "none set")
    rows.add_row("sample", tuning.source)
    for one in report.images:
        rows.add_row(
            "",
            f"{one.width_px} x {one.height_px} px, {size(one.compressed_bytes)}: download {one.download_s:.2f} s,"
            f" decode {one.decode_s:.3f} s, inference {one.inference_s:.3f} s",
        )
    if report.sighted:
        rows.add_row("", f"and the sizes of {len(report.sighted)} more, listed or downloaded meanwhile")
    doubt = "; uncertain, so the margin is wider until the first batches are measured" if report.uncertain else ""
    sizes = f"{size(report.usual_tensor_bytes)} of pixels an image, {size(report.tensor_bytes_per_image)} the largest"
    rows.add_row("", f"planned with {sizes}; download:inference {report.download_inference_ratio:.2f}{doubt}")
    console.print(rows, "", plan_table(plan.log_fields(), plan.why), "", sep="\n")
    rows = Table.grid(padding=(0, 2))
    rows.add_row("binds", BINDS[plan.binds])
    rows.add_row("this plan", f"{plan.images_per_s:.2f} images/s, {size(plan.peak_bytes)} at most")
    rate, needs = f"{old.images_per_s:.2f} images/s", f"{size(old.peak_bytes)} of {size(old.room_bytes)}"
    killed = f"killed for memory ({needs}); would be {rate} with enough of it"
    rows.add_row("old constants", killed if old.out_of_memory else f"{rate}, up to {needs}")
    rows.add_row("", f"{old.batch_size} tasks a batch, prefetch {FIXED_PREFETCH}, {old.loaders} loaders")
    console.print(rows)


def recommended(plan: IngestPlan, config: Settings) -> dict[str, str]:
    """Return the variables that hold a plan; in fixed mode a batch is as large as a fetch, and memory is pinned."""
    values = {variable(name): str(getattr(plan, part)) for name, part in WRITTEN.items()}
    if config.ingest_mode == "fixed":
        values["AMI_ANTENNA_API_BATCH_SIZE"] = str(plan.batch_size)
        values["AMI_ANTENNA_API_DATALOADER_PIN_MEMORY"] = str(plan.pin_memory).lower()
    return values


def read_env(file: Path) -> str:
    """Return the text of an env file, none where there is no file yet.

    Raises:
        ConfigurationError: it cannot be read as text, or not be written.
    """
    try:
        text = file.read_bytes().decode() if file.exists() else ""
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"--write {file}: it cannot be read: {error}") from error
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigurationError(f"--write {file}: it cannot be written by this user: name another file")
    return text


def write_env(file: Path, values: dict[str, str]) -> None:
    """Set variables in an env file: in their places, or at its end; every other character stays as it is.

    The file is written over, not replaced: it keeps its owner and mode, and may be a link or mounted into a container.
    """
    text = read_env(file)
    end = "\r\n" if "\r\n" in text else "\n"
    for name, value in values.items():
        # As python-dotenv reads it, on one line: a value ends at a comment, which begins with a space; in any case.
        assignment = rf"^([ \t]*(?:export[ \t]+)?{name}[ \t]*=(?:[ \t]*(?=[^\s#]))?).*?(?=[ \t]*(?:[ \t]#.*)?\r?$)"
        text, found = re.subn(assignment, rf"\g<1>{value}", text, flags=re.MULTILINE | re.IGNORECASE)
        if not found:
            text += ("" if not text or text.endswith("\n") else end) + f"{name}={value}{end}"
    try:
        file.touch(mode=0o600)  # a token may be in it
        with file.open("r+b") as stream:
            stream.write(text.encode())
            stream.truncate()
    except OSError as error:
        raise ConfigurationError(f"--write {file}: {error.strerror}") from error
