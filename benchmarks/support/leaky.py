"""A pipeline like `simulated` that keeps some memory of every image for itself, up to a bound."""

from __future__ import annotations

import torch

from adc_worker.models.pipeline import CallSizes, Detections, Pipeline
from adc_worker.models.registry import PipelineSpec, Simulated

SECONDS_PER_IMAGE = 0.04
BYTES_PER_IMAGE, BYTES_MAX = 5_000_000, 500_000_000


class _Leaky(Simulated):
    def __init__(self) -> None:
        super().__init__(SECONDS_PER_IMAGE)
        self._kept: list[bytes] = []

    def detect(self, images: torch.Tensor) -> list[Detections]:
        for _image in range(len(images)):
            if len(self._kept) * BYTES_PER_IMAGE < BYTES_MAX:
                self._kept.append(b"x" * BYTES_PER_IMAGE)
        return super().detect(images)


def pipelines() -> list[PipelineSpec]:
    def load(device: torch.device, sizes: CallSizes) -> Pipeline:
        return Pipeline("leaky", _Leaky(), device, sizes=sizes)

    return [PipelineSpec("leaky", "Leaky", (Simulated.algorithm,), load)]
