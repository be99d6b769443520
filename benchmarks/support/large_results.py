"""A pipeline whose results are as large as they get: 200 detections an image, 29 176 classes each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from adc_worker.models.pipeline import Algorithm, CallSizes, Detections, Pipeline, Scores
from adc_worker.models.registry import PipelineSpec

DETECTIONS, CLASSES = 200, 29_176


class ManyBoxes:
    algorithm = Algorithm("Many boxes", "many_boxes", "localization")

    def detect(self, images: torch.Tensor) -> list[Detections]:
        left = np.arange(DETECTIONS, dtype=np.int32)
        boxes = np.stack([left, left, left + 10, left + 10], axis=1)
        return [Detections(boxes, np.ones(DETECTIONS, np.float32)) for _ in images]


class ManyClasses:
    algorithm = Algorithm("Many classes", "many_classes", "classification", labels=tuple(map(str, range(CLASSES))))

    def classify(self, crops: Sequence[torch.Tensor]) -> Scores:
        logits = torch.randn(len(crops), CLASSES, generator=torch.Generator().manual_seed(1))
        return Scores(logits.softmax(1).numpy(), logits.numpy())


def pipelines() -> list[PipelineSpec]:
    def load(device: torch.device, sizes: CallSizes) -> Pipeline:
        return Pipeline("large_results", ManyBoxes(), device, classifier=ManyClasses(), sizes=sizes)

    return [PipelineSpec("large_results", "Large results", (ManyBoxes.algorithm, ManyClasses.algorithm), load)]
