"""Loaded models, shared by pipelines: most of Antenna's have detector and filter in common."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adc_worker.host import memory
from adc_worker.log import get_logger

_log = get_logger(__name__)

# Of the memory that is free now, the part that models may take: the rest is for photographs and activations. All of
# Antenna's models are 1.3 GB, so that 5 GB keep them all.
SHARE_OF_FREE = 0.25


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model by name, its bytes in memory, and how to load it."""

    name: str
    size_bytes: int
    load: Callable[[], Any]


@dataclass(slots=True)
class ModelCache:
    """Holds models until others need the memory; `free_bytes` says what a device has left."""

    free_bytes: Callable[[torch.device], int]
    after_loading: Callable[[], None] = lambda: None
    _held: dict[str, tuple[Wanted, Any]] = field(default_factory=dict)  # the least recently used first
    _in_use: frozenset[str] = frozenset()

    def hold(self, wanted: Sequence[Wanted], device: torch.device) -> list[Any]:
        """Return these models, loading what is not here; others leave, least recently used first, until all fit."""
        self._in_use = frozenset(one.name for one in wanted)
        new = [one for one in wanted if one.name not in self._held]
        needed = sum(one.size_bytes for one in new)
        room = SHARE_OF_FREE * (self.free_bytes(device) + self.size_bytes) - self.size_bytes
        for name in [name for name in self._held if name not in self._in_use]:
            if needed <= room:
                break
            room += self._drop(name)
        models = []
        for one in wanted:
            model = self._held.pop(one.name)[1] if one.name in self._held else self._load(one)
            self._held[one.name] = (one, model)  # at the end: the most recently used
            models.append(model)
        if new:
            self.after_loading()
        return models

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one, _ in self._held.values())

    def release_idle(self) -> bool:
        """Drop all but the models that were asked for last; False when there was nothing to drop."""
        idle = self._held.keys() - self._in_use
        for name in idle:
            self._drop(name)
        return bool(idle)

    def _load(self, one: Wanted) -> Any:
        started = time.monotonic()
        model = one.load()
        _log.info(
            "model_loaded", model=one.name, size_bytes=one.size_bytes, load_s=round(time.monotonic() - started, 3)
        )
        return model

    def _drop(self, name: str) -> int:
        one, _ = self._held.pop(name)
        _log.info("model_evicted", model=name, size_bytes=one.size_bytes)
        return one.size_bytes


def free_bytes(device: torch.device, limit_bytes: int | None) -> int:
    """Return the bytes a device has left; on a CPU under `limit_bytes`, which is AMI_MEMORY_LIMIT_BYTES, too."""
    if device.type == "cuda":  # written, not run
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found = memory.memory_limit()
    limit = min(found.limit_bytes, limit_bytes or found.limit_bytes)
    return max(0, min(limit - memory.anonymous_bytes([os.getpid()]), found.available_bytes))
