"""What a governor is fed with, made up or read back from a log, and what it made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.planning.ceilings import Ceilings
from adc_worker.planning.governor import Governor
from adc_worker.planning.measurements import ImageProbe, ProbeReport
from adc_worker.planning.observation import Decision, Observation
from adc_worker.planning.policy import IngestPolicy
from tests.support.fakes import GB, MB, host, image_probe, report

BASE = 1 * GB


class Governed:
    """A governor of usual photographs under a limit, whose worker uses what its plan says unless told otherwise."""

    def __init__(
        self,
        limit_bytes: int = 3 * GB,
        *,
        ceilings: Ceilings | None = None,
        available_bytes: int | None = None,
        gpu: bool = False,
        probe: ImageProbe | None = None,
        uncertain: bool = False,
    ) -> None:
        self.image = probe or image_probe()
        available_bytes = limit_bytes - BASE if available_bytes is None else available_bytes
        self.limit_bytes, self.gpu = limit_bytes, gpu
        machine = host(limit_bytes=limit_bytes, available_bytes=available_bytes, cores=2, gpu=gpu)
        measured = replace(report(self.image, base_bytes=BASE, inference_peak_bytes=10 * MB), uncertain=uncertain)
        self.governor = Governor(IngestPolicy(ceilings), measured, machine, LeaseTerms())

    def observation(self, *, hog_bytes: int = 0, leak_bytes: int = 0, **changes: Any) -> Observation:
        """Return a usual batch: four images in 0.8 s, everything ready, beside others that hold `hog_bytes`."""
        plan = self.governor.plan
        used_bytes = plan.peak_bytes - plan.base_bytes + BASE + leak_bytes
        machine = host(
            limit_bytes=self.limit_bytes,
            available_bytes=max(0, self.limit_bytes - used_bytes - hog_bytes),
            cores=2,
            gpu=self.gpu,
        )
        usual = Observation(
            image=self.image,
            images=4,
            batch_s=0.8,
            ready=True,
            host=replace(machine, used_bytes=used_bytes),
            arena_bytes=plan.arena_bytes,
            stalled_percent=0.0,
            in_force=True,
        )
        return replace(usual, **changes)

    def batches(self, count: int, **changes: Any) -> list[Decision]:
        """Feed `count` batches; return the decisions."""
        return [self.governor.observe(self.observation(**changes)) for _ in range(count)]

    def actions(self, count: int, **changes: Any) -> list[str]:
        """Feed `count` batches; return what was done that is not `hold`."""
        return [decision.action for decision in self.batches(count, **changes) if decision.action != "hold"]


def replayed(plan_line: Mapping[str, Any], batch_lines: Sequence[Mapping[str, Any]], policy: IngestPolicy) -> list[str]:
    """Make the decisions of a job again from its log; return the lines that come out differently."""
    inputs = plan_line["inputs"]
    images, sighted = (tuple(ImageProbe(**one) for one in inputs["report"].pop(name)) for name in ("images", "sighted"))
    governor = Governor(
        policy,
        ProbeReport(images=images, sighted=sighted, **inputs["report"]),
        HostBudget(**inputs["host"]),
        LeaseTerms(**inputs["lease"]),
    )
    different = []
    for line in batch_lines:
        fields = dict(line["observed"])
        decision = governor.observe(
            Observation(image=ImageProbe(**fields.pop("image")), host=HostBudget(**fields.pop("host")), **fields)
        )
        again = (decision.action, decision.reason, decision.paused, decision.budget_bytes)
        if again != (line["action"], line["reason"], line["paused"], line["budget_bytes"]):
            different.append(f"{again} instead of {line}")
    return different
