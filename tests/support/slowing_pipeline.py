"""A GPU that suddenly takes ten times longer: its first images take 0.05 s, all after them 0.5 s."""

from __future__ import annotations

import torch

from adc_worker.models.pipeline import CallSizes, Detections, Pipeline
from adc_worker.models.registry import PipelineSpec, Simulated

FAST_IMAGES, FAST_S, SLOW_S = 24, 0.05, 0.5


class Slowing(Simulated):
    def __init__(self) -> None:
        super().__init__(FAST_S)
        self._images = 0

    def detect(self, images: torch.Tensor) -> list[Detections]:
        self._images += len(images)
        self._seconds_per_image = FAST_S if self._images <= FAST_IMAGES else SLOW_S
        return super().detect(images)


def load(device: torch.device, sizes: CallSizes) -> Pipeline:
    return Pipeline("slowing", Slowing(), device, sizes=sizes)


def pipelines() -> list[PipelineSpec]:
    return [PipelineSpec("slowing", "Slowing", (Simulated.algorithm,), load)]
