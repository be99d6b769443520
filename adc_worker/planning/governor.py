"""Compares what each batch showed to the plan in force and decides what to change.

Pure: fed with the same observations, a governor made from the same report decides the same. It never waits, and it
stops nothing but the admission of images: results go on being inferred, kept and posted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from statistics import fmean, median
from typing import Literal

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.planning.plan import IngestPlan
from adc_worker.planning.policy import AIM, IngestPolicy, in_processes
from adc_worker.planning.probe_report import ALIKE, ImageProbe, ProbeReport
from adc_worker.planning.reasoned import Reasoned

# The ladder (design, "The governor"), as parts of the memory that ingest may take: (measured - base) / (budget - base).
GROW_BELOW, STOP_ABOVE, RESUME_BELOW = 0.65, 0.90, 0.65
SHRINK_ABOVE, SHRINK_TO = AIM, 0.60  # a shrink goes far enough that the next one is a step away
# Larger images: one batch may be a stray image, and those a quarter larger stay inside (0.8 x 1.25 = 1). Smaller ones:
# mixed jobs alternate, so only a long stretch is a change. Downloads of one link scatter by a factor of two.
GROWTH, SHRINKAGE, LINK_CHANGE = 1.25, 1 / 1.5, 3.0
# Inference takes as long as there are insects on an image: only a stretch of batches tells.
PACE_CHANGE, PACE_BATCHES = 2.0, 8
LARGER_BATCHES, SMALLER_BATCHES = 2, 20
FIRST_BATCHES = 4  # stand in for a probe that says little about its job
READY_ENOUGH, GAIN = 0.95, 1.03
# A step plans downloads and decodes to be so many times slower, which asks for more of these; the more often that was
# in vain, the slower.
STEP, STEPS = 1.5, ("download_concurrency", "decode_workers", "prefetch_factor", "batch_size")
# A new report is followed where it changes one of these, or sizes.
FOLLOWED = (*STEPS, "batch_bytes", "arena_bytes", "scratch_bytes", "held_limit")
WINDOW_BATCHES = 20  # and SETTLE_S: over which rates and readiness are compared
# Before anything grows its last change is this old: a worker that starts beside this one takes memory for its libraries
# first, and for a job some seconds later (RESULTS.md, "The governor").
SETTLE_S = 5.0
PATIENCE_MAX = 32  # times as long, after changes that were in vain
DISTURBED = 1.25  # inference this much slower than the probe's, which ran without decoders beside it
# Some process waited for memory this share of the time: no growth. At 60 % systemd-oomd begins to kill.
STALLED_PERCENT, STALLED_STOP_PERCENT = 10.0, 60.0
# Memory that fell with each of the last batches is planned to go on falling, for as long as a process takes to load.
FALLING_BATCHES, AHEAD_S = 4, 10.0

Action = Literal["hold", "shrink", "grow", "step", "undo", "replan", "pause", "resume"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What one batch showed.

    Attributes:
        image: its mean image.
        images: how many it had.
        batch_s: seconds since the batch before it.
        ready: whether it was ready when it was asked for.
        host: memory, limit and cores at its end; `used_bytes` with the arena.
        arena_bytes: what of the arena is resident.
        stalled_percent: time in which some process waited for memory.
        in_force: whether the loader already follows the governor's last plan.
    """

    image: ImageProbe
    images: int
    batch_s: float
    ready: bool
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


@dataclass(frozen=True, slots=True)
class _Trial:
    """What was before a step, and has to be beaten."""

    plan: IngestPlan
    slack: float
    images_per_s: float


class Governor:
    """Holds the plan of one job. Feed it every batch."""

    def __init__(self, policy: IngestPolicy, report: ProbeReport, host: HostBudget, lease: LeaseTerms) -> None:
        self.plan = policy.plan(report, host, lease)
        self._policy = policy
        self._report = report
        self._lease = lease
        self._alone_s = report.inference_s  # without decoders beside it
        self._slack = 1.0  # times slower than measured, that downloads and decodes are planned to be
        self._seen: deque[Observation] = deque(maxlen=SMALLER_BATCHES)  # since the last report
        self._recent_s = 0.0
        self._recent: deque[Observation] = deque()  # since the last change took effect, as far as the window goes
        self._available: deque[tuple[float, int]] = deque(maxlen=FALLING_BATCHES)  # (seconds, bytes)
        self._unexplained: deque[int] = deque([0], maxlen=WINDOW_BATCHES)
        self._planned_room_bytes = self._room_bytes(host)
        self._last_change: Action = "hold"
        self._since_change, self._since_change_s = 0, 0.0
        self._patience: dict[Action, int] = {"grow": 1, "step": 1}  # doubles when that was in vain
        self._trial: _Trial | None = None
        self._paused = self._engine_tried = False

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
        self._available.append((seen.batch_s, host.available_bytes))
        pressure = (seen.host.used_bytes - self._base_bytes) / max(1, room_bytes)
        action: Action = "hold"
        reason = "the last change takes effect with the next loader"
        if seen.in_force:
            self._note(seen)
            self._seen.append(seen)
            self._since_change += 1
            self._since_change_s += seen.batch_s
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
            planned_bytes = self.plan.peak_bytes - self.plan.arena_bytes - self.plan.base_bytes
            beside_bytes = seen.host.used_bytes - seen.arena_bytes - self._report.base_bytes
            self._unexplained.append(max(0, beside_bytes - planned_bytes))
        held_bytes = max(0, seen.host.used_bytes - self._base_bytes)
        return replace(seen.host, available_bytes=seen.host.available_bytes + held_bytes)

    def _note(self, seen: Observation) -> None:
        """Keep a window of batches and of seconds: quick batches of one image differ too much for few of them."""
        self._recent.append(seen)
        self._recent_s += seen.batch_s
        while len(self._recent) > WINDOW_BATCHES and self._recent_s - self._recent[0].batch_s >= SETTLE_S:
            self._recent_s -= self._recent.popleft().batch_s

    def _change(self, seen: Observation, host: HostBudget, pressure: float) -> tuple[Action, str]:
        if (report := self._drifted()) is not None:
            alike = report.usual_tensor_bytes == self._report.usual_tensor_bytes
            self._alone_s = min(self._alone_s if alike else math.inf, report.inference_s)
            self._report, self._slack = report, 1.0
            self._seen.clear()
            plan = self._made(host, self._slack)
            # A link that is ten times slower and still fast enough changes nothing.
            if any(getattr(plan, name) != getattr(self.plan, name) for name in FOLLOWED):
                size_mb = report.tensor_bytes_per_image / 1e6
                reason = f"{size_mb:.0f} MB, {report.download_s:.2f} s and {report.inference_s:.3f} s an image now"
                self._planned_room_bytes = self._room_bytes(host)
                return self._take("replan", plan, reason)
        if pressure > SHRINK_ABOVE:
            return self._shrink(host)
        if self._trial is not None:
            return self._judge(self._trial)
        if pressure >= GROW_BELOW:
            return "hold", "in its range"
        if seen.stalled_percent > STALLED_PERCENT:
            return "hold", f"processes waited for memory {seen.stalled_percent:.0f} % of the time"
        return self._grow(replace(host, available_bytes=min(size_bytes for _seconds, size_bytes in self._available)))

    def _drifted(self) -> ProbeReport | None:
        """Return the report to plan with when images, inference or link have changed for good."""
        report, downloads_at_once = self._report, self._downloads_at_once()
        images = [one.image for one in self._seen]
        if report.uncertain and len(images) == FIRST_BATCHES:
            return report.measured_by(images, downloads_at_once)
        if other := self._other_pace():
            return report.measured_by(other, downloads_at_once)
        if _changed([one.tensor_bytes / report.tensor_bytes_per_image for one in images], GROWTH, SHRINKAGE):
            return report.for_images_like(images[-1], downloads_at_once)
        slower = self._link_slower()
        return report.for_link(slower, downloads_at_once) if slower is not None else None

    def _downloads_at_once(self) -> float:
        """Return how many transfers a new report is of: where the GPU waits, what came tells (Little's law)."""
        image, planned = self._recent[-1].image, self.plan.download_concurrency
        if self.readiness >= READY_ENOUGH:
            return planned
        return max(1.0, min(planned, self._images_per_s() * (image.download_s - image.first_byte_s)))

    def _other_pace(self) -> list[ImageProbe]:
        """Return the window's images if inference took another time for all of them; other sizes do by themselves."""
        images, usual_bytes = [one.image for one in self._recent], self._report.usual_tensor_bytes
        if len(images) < PACE_BATCHES or self._recent_s < SETTLE_S:
            return []
        if any(not 1 / ALIKE <= one.tensor_bytes / usual_bytes <= ALIKE for one in images):
            return []
        paces = [one.inference_s / self._report.inference_s for one in images]
        # A GPU may be slower beside decode threads: that is answered with processes first.
        slower = min(paces) > PACE_CHANGE and (self._engine_tried or not self._recent[-1].host.gpu)
        return images if slower or max(paces) < 1 / PACE_CHANGE else []

    def _link_slower(self) -> float | None:
        """Return how many times as long as planned downloads take when the link has changed.

        A slower one matters when the GPU waits for it. They are faster also when fewer of them share it, which is no
        change; and small images take what the large ones leave, so that only the large ones tell.
        """
        seen = [one for one in self._seen if one.image.download_s > 0]
        most_bytes = max((one.image.compressed_bytes for one in seen), default=0)
        seen = [one for one in seen if LINK_CHANGE * one.image.compressed_bytes >= most_bytes]
        each = [self._report.link_slower(one.image) for one in seen]
        slow = list(takewhile(lambda one: one[1] > LINK_CHANGE, zip(reversed(seen), reversed(each), strict=True)))
        if sum(not one.ready for one, _by in slow) >= LARGER_BATCHES:
            return min(by for _one, by in slow[:LARGER_BATCHES])
        more = self.plan.download_concurrency / self._report.downloads
        if self._since_change_s < SETTLE_S or not _changed(
            [max(by, by / more) for by in each], math.inf, 1 / LINK_CHANGE
        ):
            return None
        return max(each)

    def _shrink(self, host: HostBudget) -> tuple[Action, str]:
        if self._trial is not None:
            self._slack = self._trial.slack
        falls = [(before - after) / max(seconds, 1e-6) for (_, before), (seconds, after) in pairwise(self._available)]
        falling = max(0.0, min(falls)) if len(falls) == FALLING_BATCHES - 1 else 0.0  # bytes/s
        room_bytes = max(0, self._room_bytes(host) - int(AHEAD_S * falling))
        smaller = self._made(replace(host, available_bytes=int(SHRINK_TO / AIM * room_bytes)), self._slack)
        if smaller.arena_bytes > 0.95 * self.plan.arena_bytes:
            return "hold", "there is no smaller plan"
        if self._last_change in self._patience and not self._has_settled(self._last_change):
            self._lose_patience(self._last_change)
        self._planned_room_bytes = room_bytes
        return self._take("shrink", smaller, f"above {SHRINK_ABOVE}, to {SHRINK_TO} of {room_bytes / 1e6:.0f} MB")

    def _grow(self, host: HostBudget) -> tuple[Action, str]:
        """Use memory that came back, or else try something beyond the policy's plan."""
        room_bytes = self._room_bytes(host)
        ready = f"{self.readiness:.0%} of the batches were ready"
        hungry = self.readiness < READY_ENOUGH
        plan = self._made(host, self._slack)
        returned = room_bytes > GROWTH * self._planned_room_bytes and plan.arena_bytes > self.plan.arena_bytes
        # Batches that memory keeps small are the GPU's loss, ready or not.
        if returned and (hungry or self.plan.binds == "memory"):
            if not self._has_settled("grow"):
                return "hold", "memory that came back is used when it stays"
            reason = f"{room_bytes / 1e6:.0f} MB for ingest instead of {self._planned_room_bytes / 1e6:.0f} MB"
            self._planned_room_bytes = room_bytes
            return self._take("grow", plan, reason)
        if not self._has_settled("step"):
            return "hold", "the last change settles"
        if self._is_disturbed():
            self._engine_tried = True
            processes = in_processes(self.plan)
            if processes.peak_bytes <= self._base_bytes + AIM * room_bytes:
                return self._try(processes, self._slack, "decode threads slow inference: decode processes")
        if hungry:
            slack = STEP * self._patience["step"] * self._slack
            plan = self._made(host, slack)
            if any(getattr(plan, name) > getattr(self.plan, name) for name in STEPS):
                return self._try(plan, slack, ready)
        return "hold", f"{ready}; nothing to grow with"

    def _has_settled(self, action: Action) -> bool:
        """Tell whether the last change is old enough for one upwards: the gate of every growth."""
        patience = self._patience[action]
        return self._since_change >= patience * WINDOW_BATCHES and self._since_change_s >= patience * SETTLE_S

    def _is_disturbed(self) -> bool:
        """Tell whether a GPU's inference is slower beside decode threads than the probe's was without."""
        if not self._recent[-1].host.gpu or self._engine_tried:
            return False
        return median(one.image.inference_s for one in self._recent) > DISTURBED * self._alone_s

    def _try(self, plan: IngestPlan, slack: float, reason: str) -> tuple[Action, str]:
        """Go beyond what the policy planned; it has to prove itself."""
        trial = _Trial(self.plan, self._slack, self._images_per_s())
        taken = self._take("step", plan, reason)
        self._slack, self._trial = slack, trial
        return taken

    def _judge(self, trial: _Trial) -> tuple[Action, str]:
        if len(self._recent) < WINDOW_BATCHES or self._since_change_s < SETTLE_S:
            return "hold", f"a step is on trial for {WINDOW_BATCHES} batches and {SETTLE_S:.0f} s"
        self._trial = None
        compared = f"{self._images_per_s():.2f} images/s after {trial.images_per_s:.2f}"
        if self._images_per_s() >= GAIN * trial.images_per_s:
            return "hold", f"the step stays: {compared}"
        self._lose_patience("step")
        self._slack = trial.slack
        return self._take("undo", trial.plan, compared)

    def _lose_patience(self, action: Action) -> None:
        self._patience[action] = min(PATIENCE_MAX, 2 * self._patience[action])

    def _images_per_s(self) -> float:
        return sum(one.images for one in self._recent) / sum(one.batch_s for one in self._recent)

    def _made(self, host: HostBudget, slack: float) -> IngestPlan:
        report = replace(self._report, base_bytes=self._base_bytes)
        plan = self._policy.plan(report, host, self._lease)
        if slack > 1:
            slower = self._policy.plan(report.slower(slack), host, self._lease)
            plan = _with_more_asked_for(plan, slower)
        if self.plan.decode_engine == "threads":
            return plan
        return in_processes(plan)

    def _take(self, action: Action, plan: IngestPlan, reason: str) -> tuple[Action, str]:
        self.plan = plan
        self._last_change = action
        self._trial = None
        self._since_change, self._since_change_s = 0, 0.0
        self._recent.clear()
        self._recent_s = 0.0
        return action, reason

    def _pauses(self, pressure: float, stalled_percent: float) -> bool:
        if pressure > STOP_ABOVE or stalled_percent > STALLED_STOP_PERCENT:
            return True
        return self._paused and not (pressure < RESUME_BELOW and stalled_percent < STALLED_PERCENT)


def _changed(ratios: Sequence[float], larger: float, smaller: float) -> bool:
    """Whether values have left the planned one behind: upwards at once, downwards after a long stretch."""
    grown = len(ratios) >= LARGER_BATCHES and min(ratios[-LARGER_BATCHES:]) > larger
    return grown or (len(ratios) == SMALLER_BATCHES and max(ratios) < smaller)


def _with_more_asked_for(plan: IngestPlan, slower: IngestPlan) -> IngestPlan:
    """Return the plan for slower downloads and decodes, with the rates and bounds of the true ones."""
    more_downloads = slower.download_concurrency - plan.download_concurrency
    staged = max(1, min(plan.held_limit, plan.staged_ahead + more_downloads))
    staged_why = f"{plan.staged_ahead} and {more_downloads} downloads more, lease allows {plan.held_limit}: {staged}"
    return slower.with_changes(
        images_per_s=plan.reasoned("images_per_s"),
        held_limit=plan.reasoned("held_limit"),
        fetch_size=plan.reasoned("fetch_size"),
        binds=plan.reasoned("binds"),
        staged_ahead=Reasoned(staged, staged_why),
    )
