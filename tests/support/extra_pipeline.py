"""A pipeline from outside the package: a detector of fixed boxes, a filter, and a classifier by brightness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from adc_worker.models.pipeline import Algorithm, CallSizes, Detections, Pipeline, Scores
from adc_worker.models.registry import PipelineSpec

CALLS: list[int] = []  # crops per classifier call, for tests in this process


class Corners:
    """Finds the top left and the bottom right quarter of every image."""

    algorithm = Algorithm("Corners", "corners", "localization")

    def detect(self, images: torch.Tensor) -> list[Detections]:
        height, width = images.shape[2:]
        boxes = np.array([[0, 0, width // 2, height // 2], [width // 2, height // 2, width, height]], np.int32)
        return [Detections(boxes, np.ones(2, np.float32)) for _ in images]


class Brightness:
    """Calls a crop by whether its mean is below or above the middle."""

    def __init__(self, name: str, labels: tuple[str, str]) -> None:
        self.algorithm = Algorithm(name, name.lower(), "classification", labels=labels)

    def classify(self, crops: Sequence[torch.Tensor]) -> Scores:
        CALLS.append(len(crops))
        bright = np.array([float(crop.float().mean()) / 255 for crop in crops], np.float32)
        scores = np.stack([1 - bright, bright], axis=1)
        return Scores(scores, np.log(scores + 1e-6))


FILTER = Brightness("Filter", ("moth", "nonmoth"))
SPECIES = Brightness("Species", ("Noctua pronuba", "Biston betularia"))


def load(device: torch.device, sizes: CallSizes) -> Pipeline:
    return Pipeline("corners", Corners(), device, FILTER, "moth", SPECIES, sizes)


def pipelines() -> list[PipelineSpec]:
    algorithms = (Corners.algorithm, FILTER.algorithm, SPECIES.algorithm)
    return [PipelineSpec("corners", "Corners", algorithms, load)]
