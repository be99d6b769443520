"""Ingest plans for tests: one image of page size fits everywhere unless a test says otherwise."""

from __future__ import annotations

from typing import Any

from adc_worker.planning.plan import IngestPlan

_PLAN: dict[str, Any] = {
    "batch_size": 4,
    "batch_bytes": 1 << 20,
    "prefetch_factor": 1,
    "decode_workers": 2,
    "decode_engine": "threads",
    "arena_bytes": 1 << 20,
    "scratch_bytes": 1 << 20,
    "solo_bytes": 1 << 22,
    "pin_memory": False,
    "download_concurrency": 1,
    "staged_ahead": 1,
    "fetch_size": 1,
    "held_limit": 1,
    "batch_wait_s": 1e6,
    "base_bytes": 0,
    "peak_bytes": 0,
    "images_per_s": 1.0,
    "binds": "decode",
    "why": {},
}


def ingest_plan(**changes: Any) -> IngestPlan:
    return IngestPlan(**_PLAN | changes)
