"""The GPU of the benchmarks: takes a chosen time per image and finds nothing."""

from __future__ import annotations

import time

import numpy as np
import torch

from adc_worker.models.pipeline import Algorithm, Detections

ALGORITHM = Algorithm(
    name="Simulated detector",
    key="simulated_detector",
    task_type="localization",
    description="Sleeps and finds nothing; for benchmarks.",
)


class Simulated:
    """A detector that sleeps `seconds_per_image`."""

    algorithm = ALGORITHM

    def __init__(self, seconds_per_image: float) -> None:
        self._seconds_per_image = seconds_per_image

    def detect(self, images: torch.Tensor) -> list[Detections]:
        time.sleep(self._seconds_per_image * len(images))
        nothing = Detections(np.empty((0, 4), np.int32), np.empty(0, np.float32))
        return [nothing] * len(images)
