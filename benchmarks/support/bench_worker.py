"""A worker child with the other decode engine, for benchmarks. Its parent is a shell instead of `ami worker`.

Its tree's base is therefore smaller than a real worker's by that parent, some 50 MB.
"""

from __future__ import annotations

from dataclasses import replace

from adc_worker import log, settings
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.runtime import worker
from adc_worker.runtime.job import ceilings
from adc_worker.runtime.options import WorkerOptions
from adc_worker.tuning.plan import IngestPlan
from adc_worker.tuning.policy import IngestPolicy
from adc_worker.tuning.probe_report import ProbeReport


class DecodeInProcesses(IngestPolicy):
    """The usual plan, decoded in processes."""

    def plan(self, report: ProbeReport, host: HostBudget, lease: LeaseTerms) -> IngestPlan:
        return replace(super().plan(report, host, lease), decode_engine="processes")


def main() -> None:
    """Work until idle."""
    config = settings.load(None)
    log.configure("json", config.log_level)
    options = WorkerOptions(pipelines=("simulated",), exit_when_idle=True)
    worker.run(options, config, worker.Stop(), DecodeInProcesses(ceilings(config)))


if __name__ == "__main__":
    main()
