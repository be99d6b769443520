"""A pipeline that takes more memory than any limit has, once: the kernel ends its process."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from adc_worker.models.pipeline import CallSizes, Detections, Pipeline
from adc_worker.models.registry import PipelineSpec, Simulated

MARKER = "GREEDY_MARKER"  # names the file that says it has happened
BYTES = 4_000_000_000


class Greedy(Simulated):
    """`simulated`, but for the first image of all."""

    def detect(self, images: torch.Tensor) -> list[Detections]:
        marker = Path(os.environ[MARKER])
        if not marker.exists():
            marker.touch()
            bytearray(b"x") * BYTES
        return super().detect(images)


def pipelines() -> list[PipelineSpec]:
    def load(device: torch.device, sizes: CallSizes) -> Pipeline:
        return Pipeline("greedy", Greedy(0.0), device, sizes=sizes)

    return [PipelineSpec("greedy", "Greedy", (Simulated.algorithm,), load)]
