"""`ami worker tune`: prints the plan for a job with its arithmetic, and what the old constants would have done."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from adc_worker.cli.status import plan_table, size
from adc_worker.runtime.tune import Tuning, tune
from adc_worker.settings import Settings
from adc_worker.tuning.plan import IngestPlan
from adc_worker.tuning.policy import FIXED_PREFETCH

BINDS = {
    "link": "link-bound: more RAM, more cores or a faster GPU would not help",
    "decode": "decode-bound: more cores would help, more RAM would not",
    "inference": "inference-bound: a faster GPU would help, more RAM or a faster link would not",
    "memory": "memory-bound: more RAM would allow larger batches",
    "lease": "lease-bound: a longer lease (AMI_ANTENNA_ACK_WAIT_SECONDS, as Antenna has it) would allow larger batches",
}


def tune_command(config: Settings, target: str, env_out: Path | None, *, as_json: bool) -> None:
    """Tune, print, and write where that was asked for."""
    with Console(stderr=True).status(f"measuring a job of {target}"):  # drawn on a terminal only
        tuning = tune(config, target)
    if as_json:
        click.echo(json.dumps(tuning.to_json() | {"verdict": BINDS[tuning.plan.binds]}))
    else:
        show(tuning, Console(highlight=False))
    if env_out is not None:
        write_env(env_out, recommended(tuning.plan, config))
        click.echo(f"wrote {env_out}: ceilings for every job; without them each job has a plan of its own", err=True)


def show(tuning: Tuning, console: Console) -> None:
    host, report, plan, old = tuning.host, tuning.report, tuning.plan, tuning.old
    rows = Table.grid(padding=(0, 2))
    rows.add_row("job", f"{tuning.job_id}, {tuning.pipeline}")
    rows.add_row(
        "machine",
        f"{size(host.limit_bytes)} of memory ({host.limit_source}), {size(host.available_bytes)} available,"
        f" {host.cores} cores, {'a GPU' if host.gpu else 'no GPU'}, {size(host.staging_bytes)} for staged images",
    )
    rows.add_row("sample", tuning.source)
    for one in report.images:
        rows.add_row(
            "",
            f"{one.width_px} x {one.height_px} px, {size(one.compressed_bytes)}: download {one.download_s:.2f} s,"
            f" decode {one.decode_s:.3f} s, inference {one.inference_s:.3f} s",
        )
    doubt = "; uncertain, so the margin is wider until the first batches are measured" if report.uncertain else ""
    largest = f"planned with {size(report.tensor_bytes_per_image)} of pixels an image"
    rows.add_row("", f"{largest}, download:inference {report.download_inference_ratio:.2f}{doubt}")
    console.print(rows, "", plan_table(plan.log_fields(), plan.why), "", sep="\n")
    rows = Table.grid(padding=(0, 2))
    rows.add_row("binds", BINDS[plan.binds])
    rows.add_row("this plan", f"{plan.images_per_s:.2f} images/s, {size(plan.peak_bytes)} at most")
    rows.add_row(
        "old constants",
        f"{old.images_per_s:.2f} images/s, up to {size(old.peak_bytes)} of {size(host.limit_bytes)}"
        f"{': out of memory' if old.out_of_memory else ''}"
        f" ({old.batch_size} tasks, prefetch {FIXED_PREFETCH}, {old.loaders} loaders)",
    )
    console.print(rows)


def recommended(plan: IngestPlan, config: Settings) -> dict[str, str]:
    """Return the variables that hold a plan; in fixed mode the batch is as large as a fetch."""
    return {
        "AMI_ANTENNA_API_BATCH_SIZE": str(plan.batch_size if config.ingest_mode == "fixed" else plan.fetch_size),
        "AMI_ANTENNA_API_DATALOADER_PREFETCH_FACTOR": str(plan.prefetch_factor),
        "AMI_ANTENNA_API_DATALOADER_DOWNLOAD_THREADS": str(plan.download_concurrency),
        "AMI_ANTENNA_API_DATALOADER_NUM_WORKERS": str(plan.decode_workers),
        "AMI_ANTENNA_API_DATALOADER_PIN_MEMORY": str(plan.pin_memory).lower(),
    }


def write_env(file: Path, values: dict[str, str]) -> None:
    """Set variables in an env file: in their places, or at its end; every other character stays as it is."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for name, value in values.items():
        assignment = re.compile(
            rf"^([ \t]*(?:export[ \t]+)?{name}[ \t]*=[ \t]*)(\"[^\"]*\"|'[^']*'|[^\s#]*)", re.MULTILINE
        )
        text, found = assignment.subn(rf"\g<1>{value}", text)
        if not found:
            text += ("" if not text or text.endswith("\n") else "\n") + f"{name}={value}\n"
    partial = file.resolve().with_name(f".{file.name}.{os.getpid()}")
    partial.touch(mode=file.stat().st_mode & 0o777 if file.exists() else 0o600)  # a token may be in it
    partial.write_text(text, encoding="utf-8")
    partial.replace(file.resolve())
