"""A worker child with a policy of the benchmark's own. Its parent is a shell instead of `ami worker`.

    bench_worker.py                decode in processes
    bench_worker.py CHANGES.json   plan each job as usual, but with the fields that this file holds at that moment
    bench_worker.py CHANGES.json GIVEN   the same; while the file GIVEN exists, jobs plan with the last job's probe

Its tree's base is therefore smaller than a real worker's by that parent, some 50 MB.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from adc_worker import log, settings
from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.antenna.wire import Capture
from adc_worker.host.budget import HostBudget
from adc_worker.planning.ceilings import Ceilings
from adc_worker.planning.measurements import ProbeReport
from adc_worker.planning.memory_cost import BATCHES_IN_ARENA, PAGE_BYTES
from adc_worker.planning.plan import IngestPlan
from adc_worker.planning.policy import IngestPolicy
from adc_worker.runtime import job, probe, worker
from adc_worker.settings import WorkerOptions


class DecodeInProcesses(IngestPolicy):
    """The usual plan, decoded in processes."""

    def plan(self, report: ProbeReport, host: HostBudget, lease: LeaseTerms) -> IngestPlan:
        return replace(super().plan(report, host, lease), decode_engine="processes")


class Changed(IngestPolicy):
    """The usual plan with the fields of a file, so that no step changes them; the usual one where it is {}."""

    def __init__(self, usual: Ceilings, file: Path) -> None:
        super().__init__(usual)
        self._file = file

    def plan(self, report: ProbeReport, host: HostBudget, lease: LeaseTerms) -> IngestPlan:
        made, changes = super().plan(report, host, lease), self._changes()
        if not changes:
            return made
        place = -(-report.tensor_bytes_per_image // PAGE_BYTES) * PAGE_BYTES
        batch_bytes = changes["batch_size"] * place
        scratch_bytes = changes["decode_workers"] * (report.decode_scratch_bytes + report.compressed_bytes)
        arena_bytes = (changes["prefetch_factor"] + BATCHES_IN_ARENA - 1) * batch_bytes
        return replace(made, **changes, batch_bytes=batch_bytes, arena_bytes=arena_bytes, scratch_bytes=scratch_bytes)  # type: ignore[arg-type]

    def _changes(self) -> dict[str, int]:
        changes: dict[str, int] = json.loads(self._file.read_text())
        return changes


def remember_probe(given: Path) -> None:
    """Let jobs take over what the job before measured, in place of a probe, as long as the file `given` exists."""
    reports: list[ProbeReport] = []

    def remembered(*arguments: Any) -> ProbeReport | None:
        if given.exists():
            return reports[-1]
        report = probe.probe(*arguments)
        reports.extend([report] if report else [])
        return report

    def listed(client: AntennaClient, job_id: int) -> list[Capture]:
        return [] if given.exists() else probe.listed(client, job_id)

    vars(job).update(probe=remembered, listed=listed)


def main() -> None:
    """Work until idle, or until the process is ended where a file says what to do."""
    config = settings.load(None)
    log.configure("json", config.log_level)
    usual, file = job.ceilings(config), Path(sys.argv[1]) if len(sys.argv) > 1 else None
    policy = Changed(usual, file) if file else DecodeInProcesses(usual)
    if len(sys.argv) > 2:
        remember_probe(Path(sys.argv[2]))
    options = WorkerOptions(pipelines=("simulated",), exit_when_idle=file is None)
    worker.run(options, config, worker.Stop(), policy)


if __name__ == "__main__":
    main()
