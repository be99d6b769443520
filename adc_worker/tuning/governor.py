"""Compares what each batch showed to the plan in force and decides what to change.

Pure: fed with the same observations, a governor made from the same report decides the same. It never waits, and it
stops nothing but the admission of images: results go on being inferred, kept and posted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Literal

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.tuning.plan import IngestPlan
from adc_worker.tuning.policy import AIM, IngestPolicy, in_processes
from adc_worker.tuning.probe_report import ImageProbe, ProbeReport

# The ladder (design, "The governor"), as parts of the memory that ingest may take: (measured - base) / (budget - base).
GROW_BELOW, STOP_ABOVE, RESUME_BELOW = 0.65, 0.90, 0.65
SHRINK_ABOVE, SHRINK_TO = AIM, 0.60  # a shrink goes far enough that the next one is a step away
# Larger images: one batch may be a stray image, and those a quarter larger stay inside (0.8 x 1.25 = 1). Smaller ones:
# mixed jobs alternate, so only a long stretch is a change. Downloads of one link scatter by a factor of two.
GROWTH, SHRINKAGE, LINK_CHANGE = 1.25, 1 / 1.5, 3.0
LARGER_BATCHES, SMALLER_BATCHES = 2, 20
FIRST_BATCHES = 4  # stand in for a probe that says little about its job
READY_ENOUGH, GAIN = 0.95, 1.03
SETTLE_BATCHES = 5  # after a change, before memory that came back is used
WINDOW_BATCHES = 20  # over which rates and readiness are compared
PATIENCE_MAX_BATCHES = 640
DISTURBED = 1.25  # inference this much slower than the probe's, which ran without decoders beside it
# Some process waited for memory this share of the time: no growth. At 60 % systemd-oomd begins to kill.
STALLED_PERCENT, STALLED_STOP_PERCENT = 10.0, 60.0
# While memory goes on falling batch by batch, a shrink plans for what it will be this many batches later.
FALLING_BATCHES, AHEAD_BATCHES = 3, 20

Action = Literal["hold", "shrink", "grow", "step", "undo", "replan", "pause", "resume"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What one batch showed.

    Attributes:
        image: its mean image.
        images: how many it had.
        batch_s: seconds since the batch before it.
        ready: whether it was ready when it was asked for.
        waiting: staged images that wait for admission.
        host: memory, limit and cores at its end; `used_bytes` with the arena.
        arena_bytes: what of the arena is resident.
        stalled_percent: time in which some process waited for memory.
        in_force: whether the loader already follows the governor's last plan.
    """

    image: ImageProbe
    images: int
    batch_s: float
    ready: bool
    waiting: int
    host: HostBudget
    arena_bytes: int
    stalled_percent: float
    in_force: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do after a batch, and why.

    Attributes:
        plan: what to follow from now on.
        paused: whether to admit one image at a time instead.
        pressure: the part of its memory that ingest takes: the figure of the ladder.
        budget_bytes: what the worker may use in all.
    """

    action: Action
    reason: str
    plan: IngestPlan
    paused: bool
    pressure: float
    budget_bytes: int


class Governor:
    """Holds the plan of one job. Feed it every batch."""

    def __init__(self, policy: IngestPolicy, report: ProbeReport, host: HostBudget, lease: LeaseTerms) -> None:
        self._policy = policy
        self._report = report
        self._lease = lease
        self._seen: deque[ImageProbe] = deque(maxlen=SMALLER_BATCHES)
        self._recent: deque[Observation] = deque(maxlen=WINDOW_BATCHES)  # since the last change took effect
        self._unexplained: deque[int] = deque([0], maxlen=WINDOW_BATCHES)
        self._available: deque[int] = deque(maxlen=FALLING_BATCHES + 1)
        self._since_change = 0
        # Batches between a change and the next one upwards; they double when that was in vain.
        self._patience: dict[Action, int] = {"grow": SETTLE_BATCHES, "step": WINDOW_BATCHES}
        self._grew_last = self._paused = self._engine_tried = False
        self._trial: tuple[IngestPlan, float] | None = None  # the plan before a step, and its images per second
        self._follow(policy.plan(report, host, lease), self._room_bytes(host))

    @property
    def readiness(self) -> float:
        """Share of the recent batches that were ready when asked for."""
        return fmean(one.ready for one in self._recent) if self._recent else 1.0

    @property
    def inference_s(self) -> float:
        """Seconds that inference of the slowest image of the report took."""
        return max(image.inference_s for image in self._report.images)

    def observe(self, seen: Observation) -> Decision:
        """Take one batch's observation; return the decision. One change at a time: none before the last is in force."""
        host = self._as_if_idle(seen)
        room_bytes = self._room_bytes(host)
        self._available.append(host.available_bytes)
        pressure = (seen.host.used_bytes - self._base_bytes) / max(1, room_bytes)
        action: Action = "hold"
        reason = "the last change takes effect with the next loader"
        if seen.in_force:
            self._recent.append(seen)
            self._seen.append(seen.image)
            self._since_change += 1
            action, reason = self._change(seen, host, pressure)
            # A smaller plan takes another loader, and the old one admits nothing more: that is the stop above 0.90.
            paused = action != "shrink" and self._pauses(pressure, seen.stalled_percent)
            if action == "hold" and paused != self._paused:
                action = "pause" if paused else "resume"
            self._paused = paused
        return Decision(action, reason, self.plan, self._paused, pressure, self._base_bytes + room_bytes)

    @property
    def _base_bytes(self) -> int:
        """What ingest has no part in: as measured before the job, and what no plan has accounted for since."""
        return self._report.base_bytes + max(self._unexplained)

    def _room_bytes(self, host: HostBudget) -> int:
        return self._policy.budget_bytes(self._base_bytes, host) - self._base_bytes

    def _as_if_idle(self, seen: Observation) -> HostBudget:
        """Note memory that no plan accounts for; return the host with what ingest holds counted as available."""
        if seen.in_force:
            planned_bytes = self.plan.peak_bytes - self.plan.arena_bytes - self._planned_base_bytes
            beside_bytes = seen.host.used_bytes - seen.arena_bytes - self._report.base_bytes
            self._unexplained.append(max(0, beside_bytes - planned_bytes))
        held_bytes = max(0, seen.host.used_bytes - self._base_bytes)
        return replace(seen.host, available_bytes=seen.host.available_bytes + held_bytes)

    def _change(self, seen: Observation, host: HostBudget, pressure: float) -> tuple[Action, str]:
        if (report := self._drifted()) is not None:
            resized = self._report.uncertain or report.tensor_bytes_per_image != self._report.tensor_bytes_per_image
            self._report = report
            self._seen.clear()
            plan = self._made(host)
            # A link that is ten times slower and still fast enough changes nothing.
            if resized or plan.download_concurrency != self.plan.download_concurrency:
                self._follow(plan, self._room_bytes(host))
                size_mb = report.tensor_bytes_per_image / 1e6
                return "replan", f"{size_mb:.0f} MB and {report.download_s:.2f} s an image now"
        if pressure > SHRINK_ABOVE:
            return self._shrink(host)
        if self._trial is not None:
            return self._judge(*self._trial)
        if pressure >= GROW_BELOW:
            return "hold", "in its range"
        if seen.stalled_percent > STALLED_PERCENT:
            return "hold", f"processes waited for memory {seen.stalled_percent:.0f} % of the time"
        return self._grow(host) or self._step(host) or ("hold", "nothing to grow with")

    def _drifted(self) -> ProbeReport | None:
        """Return the report to plan with when images or link have changed for good."""
        report, seen = self._report, self._seen
        if report.uncertain and len(seen) == FIRST_BATCHES:
            return report.measured_by(tuple(seen))
        if _changed([one.tensor_bytes / report.tensor_bytes_per_image for one in seen], GROWTH, SHRINKAGE):
            return report.for_images_like(seen[-1])
        downloads = [one for one in seen if one.download_s > 0]  # the rest were on disk from an earlier run
        if _changed([one.download_s / report.download_s for one in downloads], LINK_CHANGE, 1 / LINK_CHANGE):
            return report.for_link_like(downloads[-1])
        return None

    def _shrink(self, host: HostBudget) -> tuple[Action, str]:
        fall_bytes = min((before - after for before, after in pairwise(self._available)), default=0)
        room_bytes = max(0, self._room_bytes(host) - AHEAD_BATCHES * max(0, fall_bytes))
        target = replace(host, available_bytes=min(host.available_bytes, int(SHRINK_TO / AIM * room_bytes)))
        smaller = self._made(target)
        if smaller.arena_bytes > 0.95 * self.plan.arena_bytes:
            return "hold", "there is no smaller plan"
        if self._grew_last:
            self._lose_patience("grow")
        self._follow(smaller, room_bytes)
        return "shrink", f"above {SHRINK_ABOVE}, to {SHRINK_TO} of {room_bytes / 1e6:.0f} MB"

    def _grow(self, host: HostBudget) -> tuple[Action, str] | None:
        """Use memory that came back since the plan was made, if the GPU waits."""
        planned_bytes = self._planned_room_bytes
        room_bytes = self._room_bytes(host)
        if self._since_change < self._patience["grow"] or room_bytes <= GROWTH * planned_bytes:
            return None
        plan = self._made(host)
        if plan.arena_bytes <= self.plan.arena_bytes or self.readiness >= READY_ENOUGH:
            return None
        self._follow(plan, room_bytes, grew=True)
        return "grow", f"{room_bytes / 1e6:.0f} MB for ingest instead of {planned_bytes / 1e6:.0f} MB"

    def _step(self, host: HostBudget) -> tuple[Action, str] | None:
        """Try something beyond the policy's plan; it has to prove itself."""
        if self._policy.fixed or self._since_change < self._patience["step"]:
            return None
        if self._disturbed():
            self._engine_tried = True
            plan, reason = in_processes(self.plan), "inference is slower beside decode threads: decode processes"
        elif self.readiness < READY_ENOUGH:
            link_short = median(one.waiting for one in self._recent) < self.plan.batch_size
            larger = self._policy.larger(self.plan, host, link_short=link_short)
            plan, reason = larger or self.plan, f"only {self.readiness:.0%} of the batches were ready"
        else:
            return "hold", f"{self.readiness:.0%} of the batches were ready"
        if plan is self.plan or plan.peak_bytes - self._planned_base_bytes > AIM * self._room_bytes(host):
            return None
        trial = (self.plan, self._images_per_s())
        self._take(plan, grew=True)
        self._trial = trial
        return "step", reason

    def _disturbed(self) -> bool:
        """Whether a GPU's inference is slower beside decode threads than the probe's was without."""
        if not self._recent[-1].host.gpu or self._engine_tried or len(self._recent) < WINDOW_BATCHES:
            return False
        return median(one.image.inference_s for one in self._recent) > DISTURBED * self._report.inference_s

    def _judge(self, before: IngestPlan, images_per_s: float) -> tuple[Action, str]:
        if len(self._recent) < WINDOW_BATCHES:
            return "hold", f"a step is on trial for {WINDOW_BATCHES} batches"
        self._trial = None
        compared = f"{self._images_per_s():.2f} images/s after {images_per_s:.2f}"
        if self._images_per_s() >= GAIN * images_per_s:
            return "hold", f"the step stays: {compared}"
        self._lose_patience("step")
        self._take(before)
        return "undo", compared

    def _lose_patience(self, action: Action) -> None:
        self._patience[action] = min(PATIENCE_MAX_BATCHES, 2 * self._patience[action])

    def _images_per_s(self) -> float:
        return sum(one.images for one in self._recent) / sum(one.batch_s for one in self._recent)

    def _made(self, host: HostBudget) -> IngestPlan:
        report = replace(self._report, base_bytes=self._base_bytes)
        plan = self._policy.plan(report, host, self._lease)
        return plan if self.plan.decode_engine == "threads" else in_processes(plan)

    def _follow(self, plan: IngestPlan, room_bytes: int, *, grew: bool = False) -> None:
        """Take a plan of the policy's, made for so much memory for ingest."""
        self._planned_base_bytes = self._base_bytes
        self._planned_room_bytes = room_bytes
        self._take(plan, grew=grew)

    def _take(self, plan: IngestPlan, *, grew: bool = False) -> None:
        self.plan = plan
        self._grew_last = grew
        self._trial = None
        self._since_change = 0
        self._recent.clear()

    def _pauses(self, pressure: float, stalled_percent: float) -> bool:
        if pressure > STOP_ABOVE or stalled_percent > STALLED_STOP_PERCENT:
            return True
        return self._paused and not (pressure < RESUME_BELOW and stalled_percent < STALLED_PERCENT)


def _changed(ratios: Sequence[float], larger: float, smaller: float) -> bool:
    """Whether values have left the planned one behind: upwards at once, downwards after a long stretch."""
    grown = len(ratios) >= LARGER_BATCHES and min(ratios[-LARGER_BATCHES:]) > larger
    return grown or (len(ratios) == SMALLER_BATCHES and max(ratios) < smaller)
