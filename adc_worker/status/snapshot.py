"""What one worker process tells of itself at one moment. Terminal, page and metrics show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from adc_worker.log import Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """One stage of an image's path: the seconds it takes for one, and how many at once."""

    name: str
    s_per_image: float
    parallel: int

    @property
    def images_per_s(self) -> float:
        """The rate that the stage could have; 0 while it is unknown."""
        return self.parallel / self.s_per_image if self.s_per_image else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """One moment of a pass over a job. Times are Unix seconds.

    Attributes:
        failed: error results by cause.
        truncated: of those done, images whose file ended early.
        damaged: of those done, images in whose file the decoder found damage elsewhere than at its end.
        left_to_lease: tasks given up knowingly.
        in_hand: tasks fetched and without an outcome.
        pending: tasks that Antenna had not handed out to anybody at the last fetch.
        images_per_s: outcomes over the last seconds, or over the whole pass once it ended.
        readiness: share of the batches that were ready when they were asked for.
        memory_bytes: of the process tree after the last batch, decoded pixels included.
        stages: download, decode and inference, as the last batch went.
        plan: the plan in force, field by field.
        why: the arithmetic of the plan, field by field.
        decision: what was changed last, and why.
    """

    id: int
    pipeline: str
    started_at: float
    ended_at: float | None = None
    tasks: int = 0
    done: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    left_to_lease: int = 0
    detections: int = 0
    truncated: int = 0
    damaged: int = 0
    in_hand: int = 0
    pending: int = 0
    images_per_s: float = 0.0
    readiness: float = 0.0
    inference_s: float = 0.0
    memory_bytes: int = 0
    peak_bytes: int = 0
    stages: tuple[StageView, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    decision: str = ""

    @property
    def n_failed(self) -> int:
        return sum(self.failed.values())

    @property
    def settled(self) -> int:
        """Tasks that have an outcome."""
        return self.done + self.n_failed + self.left_to_lease

    @property
    def eta_s(self) -> float | None:
        """Seconds until nothing is left for anybody, at the present rate; None while unknown."""
        if self.images_per_s <= 0 or self.ended_at is not None:
            return None
        return (self.in_hand + self.pending) / self.images_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of a worker process. Times are Unix seconds.

    Attributes:
        slot: the process's number among those of its worker.
        unposted: results that Antenna has not accepted yet.
        moved_at: when a task last got an outcome, or a result was last accepted.
        totals: counts since the process started.
        causes: warnings and errors that the process logged.
    """

    at: float
    slot: int
    pid: int
    device: str
    stopping: bool
    memory_bytes: int
    budget_bytes: int
    limit_bytes: int
    limit_source: str
    unposted: int
    staged_bytes: int
    moved_at: float = 0.0
    totals: Mapping[str, float] = field(default_factory=dict)
    job: JobView | None = None
    causes: tuple[Cause, ...] = ()

    @property
    def running_job(self) -> JobView | None:
        """The job in hand; None between jobs."""
        if self.job is None or self.job.ended_at is not None:
            return None
        return self.job

    @property
    def holds_tasks(self) -> bool:
        """Whether somebody waits for this process."""
        return self.unposted > 0 or (self.job is not None and self.job.in_hand > 0)

    def to_json(self) -> bytes:
        return _SNAPSHOT.dump_json(self)

    @classmethod
    def from_json(cls, line: bytes) -> Snapshot:
        return _SNAPSHOT.validate_json(line)


_SNAPSHOT = TypeAdapter(Snapshot)
