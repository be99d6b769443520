"""`ami worker tune`: prints the plan for a job with its arithmetic before the job runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from dotenv import set_key
from rich.console import Console
from rich.table import Table

from adc_worker.cli.status_view import plan_table, size
from adc_worker.errors import ConfigurationError
from adc_worker.host.budget import HostBudget
from adc_worker.planning.measurements import ImageProbe, ProbeReport
from adc_worker.planning.plan import IngestPlan
from adc_worker.runtime.tune import Tuning, tune
from adc_worker.settings import Settings, limits_set, variable

BINDS = {
    "link": "link-bound: more RAM, more cores or a faster GPU would not help",
    "decode": "decode-bound: more cores would help, more RAM would not",
    "inference": "inference-bound: a faster GPU would help, more RAM or a faster link would not",
    "memory": "memory-bound: more RAM would allow larger batches or more decoders",
    "vram": "GPU-memory-bound: more free memory of the GPU would allow larger batches",
    "lease": "lease-bound: a longer lease at Antenna would allow larger batches; then set"
    " AMI_ANTENNA_ACK_WAIT_SECONDS to it here, too",
    "ceiling": "held down by a setting or the open files allowed: with more it would be faster",
}
# The settings that --write sets, and the field of a plan that each of them takes. Whether memory is
# pinned is no ceiling: false would forbid it where it may be found to help.
WRITTEN = {
    "antenna_api_batch_size": "fetch_size",
    "antenna_api_dataloader_prefetch_factor": "prefetch_factor",
    "antenna_api_dataloader_download_threads": "download_concurrency",
    "antenna_api_dataloader_num_workers": "decode_workers",
}


def tune_command(config: Settings, target: str, env_out: Path | None, *, as_json: bool) -> None:
    """Measure a job of `target`, print its plan, and write that to `env_out` where there is one."""
    planned = config
    if env_out is not None:
        check_env(env_out)  # before minutes of measuring
        # What an earlier --write set does not bind the plan, or each one would lower the values.
        unbound = dict.fromkeys(WRITTEN)
        planned = config.model_copy(update={"ingest_mode": "auto", **unbound})
    with Console(stderr=True).status(f"measuring a job of {target}"):  # drawn on a terminal only
        tuning = tune(planned, target)
    limits = {name: value for name, value in limits_set(planned).items() if value is not None}
    if as_json:
        told = tuning.to_json()
        told["limits"] = limits
        told["verdict"] = BINDS[tuning.plan.binds]
        click.echo(json.dumps(told))
    else:
        console = Console(highlight=False, markup=False)  # an answer of a host may look like markup
        show(tuning, limits, console)
    if env_out is not None:
        write_env(env_out, recommended(tuning.plan, config))
        click.echo(
            f"wrote {env_out}: ceilings for every job; without them each job has a plan of its own",
            err=True,
        )


def show(tuning: Tuning, limits: Mapping[str, Any], console: Console) -> None:
    """Print what was measured, the plan, and what holds it down."""
    plan = tuning.plan
    shown_limits = [f"{name}={value}" for name, value in limits.items()]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("job", f"{tuning.job_id}, {tuning.pipeline}")
    facts.add_row("machine", _machine(tuning.host))
    facts.add_row("lease", f"{tuning.lease.ack_wait_s:.0f} s, {tuning.lease.max_deliver} deliveries")
    facts.add_row("limits", ", ".join(shown_limits) or "none set")
    facts.add_row("sample", tuning.source)
    for line in _measured(tuning.report):
        facts.add_row("", line)
    verdict = Table.grid(padding=(0, 2))
    verdict.add_row("binds", BINDS[plan.binds])
    verdict.add_row("this plan", f"{plan.images_per_s:.2f} images/s, {size(plan.peak_bytes)} at most")
    console.print(facts, "", plan_table(plan.log_fields(), plan.why), "", verdict, sep="\n")


def _machine(host: HostBudget) -> str:
    gpu = f"a GPU with {size(host.vram_free_bytes)} free" if host.gpu else "no GPU"
    staging = "memory" if host.staging_in_memory else "disk"
    parts = [
        f"{size(host.limit_bytes)} of memory ({host.limit_source})",
        f"{size(host.available_bytes)} available",
        f"{host.cores} cores",
        gpu,
        f"{size(host.staging_bytes)} of {staging} for staged images",
        f"{host.descriptors} open files",
    ]
    return ", ".join(parts)


def _measured(report: ProbeReport) -> list[str]:
    lines = [_image(one) for one in report.images]
    if report.sighted:
        lines.append(f"and the sizes of {len(report.sighted)} more, listed or downloaded meanwhile")
    planned_with = (
        f"planned with {size(report.usual_tensor_bytes)} of pixels an image,"
        f" {size(report.tensor_bytes_per_image)} the largest;"
        f" download:inference {report.download_inference_ratio:.2f}"
    )
    if report.uncertain:
        planned_with += "; uncertain, so the margin is wider until the first batches are measured"
    return [*lines, planned_with]


def _image(one: ImageProbe) -> str:
    return (
        f"{one.width_px} x {one.height_px} px, {size(one.compressed_bytes)}:"
        f" download {one.download_s:.2f} s, decode {one.decode_s:.3f} s,"
        f" inference {one.inference_s:.3f} s"
    )


def recommended(plan: IngestPlan, config: Settings) -> dict[str, str]:
    """Return the variables that hold a plan.

    In fixed mode a batch is as large as a fetch, and memory is pinned unless that is forbidden.
    """
    values = {variable(name): str(getattr(plan, part)) for name, part in WRITTEN.items()}
    if config.ingest_mode == "fixed":
        values["AMI_ANTENNA_API_BATCH_SIZE"] = str(plan.batch_size)
        values["AMI_ANTENNA_API_DATALOADER_PIN_MEMORY"] = str(plan.pin_memory).lower()
    return values


def check_env(file: Path) -> None:
    """Find out whether an env file can be changed, or made where there is none.

    Raises:
        ConfigurationError: it cannot be read as text, or its folder cannot be written.
    """
    try:
        if file.exists():
            file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"--write {file}: it cannot be read: {error}") from error
    if not os.access(file.resolve().parent, os.W_OK):
        problem = f"--write {file}: it cannot be written by this user: name another file"
        raise ConfigurationError(problem)


def write_env(file: Path, values: Mapping[str, str]) -> None:
    """Set variables in an env file; its other lines stay. A new file is its owner's alone."""
    try:
        for name, value in values.items():
            set_key(file, name, value, quote_mode="never", follow_symlinks=True)
    except OSError as error:
        raise ConfigurationError(f"--write {file}: {error.strerror}") from error
