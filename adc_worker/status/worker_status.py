"""What a whole worker shows of itself: its processes, memory over time, jobs and errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from adc_worker.log import Cause
from adc_worker.status.snapshot import JobView, Snapshot


class MemoryPoint(NamedTuple):
    at: float  # Unix seconds
    memory_bytes: int
    predicted_bytes: int  # 0 without a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    snapshot: Snapshot
    eta_s: float | None
    history: tuple[MemoryPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One moment of a worker. Times are Unix seconds.

    Attributes:
        unready: why this worker is not to be counted on; empty when it is.
        jobs: those that ended, the last one first.
        causes: warnings and errors that the parent logged.
    """

    version: str
    host: str
    pid: int
    started_at: float
    now: float
    unready: tuple[str, ...]
    workers: tuple[ProcessStatus, ...]
    jobs: tuple[JobView, ...]
    causes: tuple[Cause, ...]

    def to_json(self) -> bytes:
        return _WORKER_STATUS.dump_json(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what `to_json` writes, as plain values."""
        plain: dict[str, Any] = _WORKER_STATUS.dump_python(self, mode="json")
        return plain

    @classmethod
    def from_json(cls, text: bytes) -> WorkerStatus:
        return _WORKER_STATUS.validate_json(text)


_WORKER_STATUS = TypeAdapter(WorkerStatus)
