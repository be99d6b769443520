"""Compares what each batch showed to the plan in force and decides what to change.

Pure: fed with the same observations, a governor made from the same report decides the same. It never waits, and it
stops nothing but the admission of images: results go on being inferred, kept and posted.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.planning.drift import GROWTH, READY_ENOUGH, Circumstances, Drift
from adc_worker.planning.measurements import ProbeReport
from adc_worker.planning.observation import Action, Decision, Observation
from adc_worker.planning.plan import IngestPlan
from adc_worker.planning.policy import AIM, IngestPolicy, in_processes
from adc_worker.planning.reasoned import Reasoned
from adc_worker.planning.window import SETTLE_S, WINDOW_BATCHES, BatchWindow

# The ladder (docs/tuning.md), as parts of the memory that ingest may take:
# (measured - base) / (budget - base).
GROW_BELOW = 0.65
SHRINK_ABOVE = AIM
SHRINK_TO = 0.60  # a shrink goes far enough that the next one is a step away
STOP_ABOVE = 0.90
RESUME_BELOW = 0.65
WORTH_A_LOADER = 0.95  # a plan with more of the arena than this is no smaller one
GAIN = 1.03  # a step that raises the rate by less is undone
# A step plans downloads and decodes to be so many times slower, which asks for more of these; the
# more often that was in vain, the slower.
STEP = 1.5
STEPS = ("download_concurrency", "decode_workers", "prefetch_factor", "batch_size")
# A new report is followed where it changes one of these, or sizes.
FOLLOWED = (*STEPS, "batch_bytes", "arena_bytes", "scratch_bytes", "held_limit")
PATIENCE_MAX = 32  # times as long, after changes that were in vain
DISTURBED = 1.25  # inference this much slower than the probe's, which ran without decoders beside it
# Some process waited for memory this share of the time: no growth. At 60 % systemd-oomd begins to kill.
STALLED_PERCENT = 10.0
STALLED_STOP_PERCENT = 60.0
# Memory that fell with each of the last batches is planned to go on falling, for as long as a
# process takes to load.
FALLING_BATCHES = 4
AHEAD_S = 10.0


@dataclass(frozen=True, slots=True)
class _Trial:
    """What was before a step, and has to be beaten."""

    plan: IngestPlan
    slack: float
    images_per_s: float


@dataclass(frozen=True, slots=True)
class _Change:
    """What was decided after a batch, and why."""

    action: Action
    reason: str


class Governor:
    """Holds the plan of one job. Feed it every batch."""

    def __init__(self, policy: IngestPolicy, report: ProbeReport, host: HostBudget, lease: LeaseTerms) -> None:
        self.plan = policy.plan(report, host, lease)
        self._policy = policy
        self._report = report
        self._drift = Drift(report)
        self._lease = lease
        self._inference_alone_s = report.inference_s  # without decoders beside it
        # How many times slower than measured downloads and decodes are planned to be.
        self._slack = 1.0
        self._window = BatchWindow()
        # (seconds of a batch, bytes that were available at its end)
        self._available: deque[tuple[float, int]] = deque(maxlen=FALLING_BATCHES)
        self._unexplained_bytes: deque[int] = deque([0], maxlen=WINDOW_BATCHES)
        self._planned_room_bytes = self._room_bytes(host)
        self._last_change: Action = "hold"
        self._since_change = 0
        self._since_change_s = 0.0
        # How many times longer a growth or a step waits; doubles when one was in vain.
        self._patience: dict[Action, int] = {"grow": 1, "step": 1}
        self._trial: _Trial | None = None
        self._paused = False
        self._engine_tried = False

    @property
    def readiness(self) -> float:
        """Share of the recent batches that were ready when asked for."""
        return self._window.readiness

    @property
    def inference_s(self) -> float:
        """Seconds that inference of the slowest image of the report took."""
        return max(image.inference_s for image in self._report.images)

    def observe(self, seen: Observation) -> Decision:
        """Take one batch's observation and return the decision.

        One change at a time: none before the last one is in force.
        """
        if seen.in_force:
            self._note_unexplained(seen)
        host = self._as_if_idle(seen.host)
        room_bytes = self._room_bytes(host)
        self._available.append((seen.batch_s, host.available_bytes))
        ingest_bytes = seen.host.used_bytes - self._base_bytes
        pressure = ingest_bytes / max(1, room_bytes)
        change = _Change("hold", "the last change takes effect with the next loader")
        if seen.in_force:
            self._window.add(seen)
            self._drift.add(seen)
            self._since_change += 1
            self._since_change_s += seen.batch_s
            change = self._change(seen, host, pressure)
            change = self._with_pause(change, pressure, seen.stalled_percent)
        budget_bytes = self._base_bytes + room_bytes
        return Decision(change.action, change.reason, self.plan, self._paused, pressure, budget_bytes)

    @property
    def _base_bytes(self) -> int:
        """What ingest has no part in: as measured before the job, and what no plan has accounted for since."""
        return self._report.base_bytes + max(self._unexplained_bytes)

    def _room_bytes(self, host: HostBudget) -> int:
        return self._policy.budget_bytes(self._base_bytes, host) - self._base_bytes

    def _note_unexplained(self, seen: Observation) -> None:
        """Note memory that no plan accounts for."""
        planned_bytes = self.plan.peak_bytes - self.plan.arena_bytes - self.plan.base_bytes
        beside_bytes = seen.host.used_bytes - seen.arena_bytes - self._report.base_bytes
        self._unexplained_bytes.append(max(0, beside_bytes - planned_bytes))

    def _as_if_idle(self, host: HostBudget) -> HostBudget:
        """Return the host with what ingest holds counted as available."""
        held_bytes = max(0, host.used_bytes - self._base_bytes)
        return replace(host, available_bytes=host.available_bytes + held_bytes)

    def _change(self, seen: Observation, host: HostBudget, pressure: float) -> _Change:
        replanned = self._replan(host)
        if replanned is not None:
            return replanned
        if pressure > SHRINK_ABOVE:
            return self._shrink(host)
        if self._trial is not None:
            return self._judge(self._trial)
        if pressure >= GROW_BELOW:
            return _Change("hold", "in its range")
        if seen.stalled_percent > STALLED_PERCENT:
            stalled = f"processes waited for memory {seen.stalled_percent:.0f} % of the time"
            return _Change("hold", stalled)
        least_available_bytes = min(size_bytes for _seconds, size_bytes in self._available)
        return self._grow(replace(host, available_bytes=least_available_bytes))

    def _with_pause(self, change: _Change, pressure: float, stalled_percent: float) -> _Change:
        # A smaller plan takes another loader, and the old one admits nothing more: that is a stop by itself.
        paused = change.action != "shrink" and self._must_pause(pressure, stalled_percent)
        has_changed = paused != self._paused
        self._paused = paused
        if change.action != "hold" or not has_changed:
            return change
        return _Change("pause" if paused else "resume", change.reason)

    def _must_pause(self, pressure: float, stalled_percent: float) -> bool:
        if pressure > STOP_ABOVE or stalled_percent > STALLED_STOP_PERCENT:
            return True
        is_relaxed = pressure < RESUME_BELOW and stalled_percent < STALLED_PERCENT
        return self._paused and not is_relaxed

    def _replan(self, host: HostBudget) -> _Change | None:
        """Follow images, inference or a link that have changed for good."""
        now = Circumstances(self.plan, self._window, self._since_change_s, self._engine_tried)
        report = self._drift.changed_report(now)
        if report is None:
            return None
        is_alike = report.usual_tensor_bytes == self._report.usual_tensor_bytes
        alone_before_s = self._inference_alone_s if is_alike else math.inf
        self._inference_alone_s = min(alone_before_s, report.inference_s)
        self._report = report
        self._drift = Drift(report)
        self._slack = 1.0
        plan = self._planned(host, self._slack)
        # A link that is ten times slower and still fast enough changes nothing.
        if not _differs(plan, self.plan, FOLLOWED):
            return None
        size_mb = report.tensor_bytes_per_image / 1e6
        reason = f"{size_mb:.0f} MB, {report.download_s:.2f} s and {report.inference_s:.3f} s an image now"
        self._planned_room_bytes = self._room_bytes(host)
        return self._take("replan", plan, reason)

    def _shrink(self, host: HostBudget) -> _Change:
        if self._trial is not None:
            self._slack = self._trial.slack
        fallen_bytes = int(AHEAD_S * self._falling_bytes_per_s())
        room_bytes = max(0, self._room_bytes(host) - fallen_bytes)
        smaller_host = replace(host, available_bytes=int(SHRINK_TO / AIM * room_bytes))
        smaller = self._planned(smaller_host, self._slack)
        if smaller.arena_bytes > WORTH_A_LOADER * self.plan.arena_bytes:
            return _Change("hold", "there is no smaller plan")
        if self._last_change in self._patience and not self._has_settled(self._last_change):
            self._lose_patience(self._last_change)
        self._planned_room_bytes = room_bytes
        reason = f"above {SHRINK_ABOVE}, to {SHRINK_TO} of {room_bytes / 1e6:.0f} MB"
        return self._take("shrink", smaller, reason)

    def _falling_bytes_per_s(self) -> float:
        """Return how fast memory fell with each of the last batches; 0 when it rose with one."""
        falls = []
        for (_before_s, before_bytes), (batch_s, after_bytes) in pairwise(self._available):
            falls.append((before_bytes - after_bytes) / max(batch_s, 1e-6))
        if len(falls) < FALLING_BATCHES - 1:
            return 0.0
        return max(0.0, min(falls))

    def _grow(self, host: HostBudget) -> _Change:
        """Use memory that came back, or else try something beyond the policy's plan."""
        returned = self._use_returned_memory(host)
        if returned is not None:
            return returned
        if not self._has_settled("step"):
            return _Change("hold", "the last change settles")
        if self._is_disturbed():
            self._engine_tried = True
            processes = in_processes(self.plan)
            if processes.peak_bytes <= self._base_bytes + AIM * self._room_bytes(host):
                reason = "decode threads slow inference: decode processes"
                return self._try(processes, self._slack, reason)
        ready = f"{self.readiness:.0%} of the batches were ready"
        if self.readiness < READY_ENOUGH:
            slack = STEP * self._patience["step"] * self._slack
            plan = self._planned(host, slack)
            if _exceeds(plan, self.plan, STEPS):
                return self._try(plan, slack, ready)
        return _Change("hold", f"{ready}; nothing to grow with")

    def _use_returned_memory(self, host: HostBudget) -> _Change | None:
        # Batches that memory keeps small are the GPU's loss, ready or not.
        if self.readiness >= READY_ENOUGH and self.plan.binds != "memory":
            return None
        room_bytes = self._room_bytes(host)
        plan = self._planned(host, self._slack)
        has_more_room = room_bytes > GROWTH * self._planned_room_bytes
        if not has_more_room or plan.arena_bytes <= self.plan.arena_bytes:
            return None
        if not self._has_settled("grow"):
            return _Change("hold", "memory that came back is used when it stays")
        before_bytes = self._planned_room_bytes
        self._planned_room_bytes = room_bytes
        reason = f"{room_bytes / 1e6:.0f} MB for ingest instead of {before_bytes / 1e6:.0f} MB"
        return self._take("grow", plan, reason)

    def _has_settled(self, action: Action) -> bool:
        """Whether the last change is old enough for one upwards: the gate of every growth."""
        patience = self._patience[action]
        enough_batches = self._since_change >= patience * WINDOW_BATCHES
        return enough_batches and self._since_change_s >= patience * SETTLE_S

    def _is_disturbed(self) -> bool:
        """Whether a GPU's inference is slower beside decode threads than the probe's was without."""
        if self._engine_tried or not self._window.newest.host.gpu:
            return False
        beside_decoders_s = median(image.inference_s for image in self._window.images)
        return beside_decoders_s > DISTURBED * self._inference_alone_s

    def _try(self, plan: IngestPlan, slack: float, reason: str) -> _Change:
        """Go beyond what the policy planned; the step has to prove itself."""
        trial = _Trial(self.plan, self._slack, self._window.images_per_s)
        taken = self._take("step", plan, reason)
        self._slack = slack
        self._trial = trial
        return taken

    def _judge(self, trial: _Trial) -> _Change:
        if len(self._window) < WINDOW_BATCHES or self._since_change_s < SETTLE_S:
            reason = f"a step is on trial for {WINDOW_BATCHES} batches and {SETTLE_S:.0f} s"
            return _Change("hold", reason)
        self._trial = None
        rate = self._window.images_per_s
        compared = f"{rate:.2f} images/s after {trial.images_per_s:.2f}"
        if rate >= GAIN * trial.images_per_s:
            return _Change("hold", f"the step stays: {compared}")
        self._lose_patience("step")
        self._slack = trial.slack
        return self._take("undo", trial.plan, compared)

    def _lose_patience(self, action: Action) -> None:
        self._patience[action] = min(PATIENCE_MAX, 2 * self._patience[action])

    def _planned(self, host: HostBudget, slack: float) -> IngestPlan:
        report = replace(self._report, base_bytes=self._base_bytes)
        plan = self._policy.plan(report, host, self._lease)
        if slack > 1:
            slower = self._policy.plan(report.slower(slack), host, self._lease)
            plan = _with_more_asked_for(plan, slower)
        if self.plan.decode_engine == "threads":
            return plan
        return in_processes(plan)

    def _take(self, action: Action, plan: IngestPlan, reason: str) -> _Change:
        self.plan = plan
        self._last_change = action
        self._trial = None
        self._since_change = 0
        self._since_change_s = 0.0
        self._window.clear()
        return _Change(action, reason)


def _differs(plan: IngestPlan, other: IngestPlan, names: tuple[str, ...]) -> bool:
    return any(getattr(plan, name) != getattr(other, name) for name in names)


def _exceeds(plan: IngestPlan, other: IngestPlan, names: tuple[str, ...]) -> bool:
    return any(getattr(plan, name) > getattr(other, name) for name in names)


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
