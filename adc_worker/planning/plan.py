"""The decision of the policy: one frozen value that says how a job's images are fed to the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self

from adc_worker.planning.reasoned import Reasoned

_OTHER_DESCRIPTORS = 128  # 20 in a quiet worker on the CPU (RESULTS.md); posts, models, GPU drivers add theirs


def descriptors(downloads: int, decodes: int) -> int:
    """Return the open files it may take: two a download, two a decode, and what libraries and journal hold."""
    return 2 * downloads + 2 * decodes + _OTHER_DESCRIPTORS


@dataclass(frozen=True, slots=True)
class IngestPlan:
    """How one job is ingested.

    Attributes:
        batch_size: most images in a batch.
        batch_bytes: most decoded bytes in a batch; the smaller of both closes it.
        prefetch_factor: decoded batches that wait ahead of the GPU.
        decode_workers: images decoded at once.
        decode_engine: "threads" or "processes".
        arena_bytes: memory for decoded pixels.
        scratch_bytes: memory for the decoders' own use, over all running decodes.
        solo_bytes: largest decoded image that could ever run alone, in place of the arena; what exceeds it is refused.
        pin_memory: whether the arena is page-locked.
        download_concurrency: downloads at once.
        staged_ahead: tasks downloaded or downloading ahead of the decoder.
        fetch_size: most tasks per fetch.
        held_limit: most tasks leased at once.
        batch_wait_s: how long the oldest image of a batch waits for company.
        base_bytes: memory of the process tree that ingest has no part in.
        peak_bytes: predicted peak memory of the whole process tree.
        images_per_s: predicted rate.
        binds: what holds it back: the slowest stage ("link", "decode" or "inference"), or else what keeps that stage or
            the batches from what they should be: "memory", "vram", "lease", or "ceiling", an operator's setting.
        why: one line of arithmetic per field.
    """

    batch_size: int
    batch_bytes: int
    prefetch_factor: int
    decode_workers: int
    decode_engine: str
    arena_bytes: int
    scratch_bytes: int
    solo_bytes: int
    pin_memory: bool
    download_concurrency: int
    staged_ahead: int
    fetch_size: int
    held_limit: int
    batch_wait_s: float
    base_bytes: int
    peak_bytes: int
    images_per_s: float
    binds: str
    why: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_bytes", "prefetch_factor", "decode_workers", "arena_bytes",
                     "download_concurrency", "staged_ahead", "fetch_size", "held_limit"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        object.__setattr__(self, "why", MappingProxyType(dict(self.why)))

    @classmethod
    def of(cls, **fields: Reasoned[Any]) -> Self:
        """Build a plan from its fields, each a value with its reason."""
        values = {name: field.value for name, field in fields.items()}
        reasons = {name: field.why for name, field in fields.items()}
        return cls(**values, why=reasons)

    def reasoned(self, name: str) -> Reasoned[Any]:
        """Return a field's value with its reason."""
        return Reasoned(getattr(self, name), self.why[name])

    def with_changes(self, **changes: Reasoned[Any]) -> Self:
        """Return the plan with other values of some fields, and the reasons of these."""
        values = {name: change.value for name, change in changes.items()}
        reasons = {name: change.why for name, change in changes.items()}
        return replace(self, **values, why={**self.why, **reasons})

    def log_fields(self) -> dict[str, Any]:
        """Return the plan as flat fields for a log line, without the reasons."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "why"}
