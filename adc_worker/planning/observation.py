"""What the governor is told after each batch, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adc_worker.host.budget import HostBudget
from adc_worker.planning.measurements import ImageProbe
from adc_worker.planning.plan import IngestPlan

Action = Literal["hold", "shrink", "grow", "step", "undo", "replan", "pause", "resume"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What one batch showed.

    Attributes:
        image: its mean image.
        images: how many images it had.
        batch_s: seconds since the batch before it.
        ready: whether it was ready when it was asked for.
        host: memory, limit and cores at its end; `used_bytes` with the arena.
        arena_bytes: what of the arena is resident.
        stalled_percent: share of the time in which some process waited for memory.
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
