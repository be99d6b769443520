"""The DataLoader of one job: fresh for its plan, fed from the arena, decoding in its own workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch.utils.data import DataLoader

from adc_worker.errors import ImageError, StagedFileLost
from adc_worker.ingest.arena import Arena
from adc_worker.ingest.decode import ThreadEngine
from adc_worker.ingest.decode_processes import ProcessEngine
from adc_worker.ingest.feeder import BatchFeeder, DecodedBatch
from adc_worker.ingest.staging import StagedImage, StagedQueue
from adc_worker.planning.plan import IngestPlan

# What a loader is built around: another arena or other decode workers take another loader.
_FIXED_FIELDS = ("arena_bytes", "decode_workers", "decode_engine", "scratch_bytes", "pin_memory")


class JobDataLoader(DataLoader[DecodedBatch]):
    """A DataLoader whose dataset owns the decode workers: torch's own subprocesses are not used.

    `batch_size` is None towards torch, which would collate otherwise; the plan's is `plan.batch_size`.
    """

    def __init__(self, plan: IngestPlan, feeder: BatchFeeder, arena: Arena) -> None:
        super().__init__(feeder, batch_size=None, num_workers=0, pin_memory=plan.pin_memory)
        self.plan = plan
        self.prefetch_factor = plan.prefetch_factor
        self.feeder = feeder
        self.arena = arena

    def apply(self, plan: IngestPlan) -> bool:
        """Follow another plan from the next batch on; False when that takes a new loader."""
        if any(getattr(plan, name) != getattr(self.plan, name) for name in _FIXED_FIELDS):
            return False
        self.plan = plan
        self.prefetch_factor = plan.prefetch_factor
        self.feeder.apply(plan)
        return True

    def close(self) -> None:
        """End every thread of the loader and give its memory back."""
        self.feeder.close()
        self.arena.close()


def build_dataloader(
    plan: IngestPlan,
    source: StagedQueue,
    on_failure: Callable[[StagedImage, ImageError], None],
    on_admit: Callable[[Sequence[StagedImage]], None] = lambda _images: None,
    has_memory_for: Callable[[JobDataLoader, int], bool] = lambda _loader, _needed_bytes: True,
    on_lost: Callable[[StagedImage, StagedFileLost], None] | None = None,
) -> JobDataLoader:
    """Build the loader of a job; whoever takes it closes it.

    `on_failure` hears of images that cannot be decoded, from a decode thread; `on_admit` of those that are about to be.
    `on_lost` takes back those whose staged file is gone.
    `has_memory_for` says of the loader whether so many bytes can be had now, for an image that exceeds the plan.
    """
    made: Future[JobDataLoader] = Future()  # the feeder's thread starts before its loader is there

    def has_memory(needed_bytes: int) -> bool:
        return has_memory_for(made.result(), needed_bytes)

    arena = Arena(plan.arena_bytes, torch.cuda.cudart() if plan.pin_memory else None)  # type: ignore[no-untyped-call]
    decode_engine = ThreadEngine if plan.decode_engine == "threads" else ProcessEngine
    engine = decode_engine(arena, plan.decode_workers, plan.scratch_bytes)
    feeder = BatchFeeder(
        plan,
        source,
        arena,
        engine,
        on_failure,
        on_admit,
        lambda: ProcessEngine(arena, 1, plan.scratch_bytes),
        has_memory,
        on_lost=on_lost,
    )
    loader = JobDataLoader(plan, feeder, arena)
    made.set_result(loader)
    return loader
