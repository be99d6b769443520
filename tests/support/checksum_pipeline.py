"""A pipeline whose result is the checksum of the pixels it was given, and which notes each before the result is kept.

A saved result thereby proves which pixels it was computed from.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

from adc_worker.models.pipeline import Algorithm, CallSizes, Detections, Pipeline
from adc_worker.models.registry import PipelineSpec
from tests.support.readings import box_of, reading

SLUG = "checksum"
ENVIRONMENT = {"AMI_EXTRA_PIPELINES": "tests.support.checksum_pipeline:pipelines"}


def inferred(folder: Path) -> set[int]:
    """Return the readings of all images that were ever inferred."""
    notes = folder / "inferred"
    return set(map(int, notes.read_text().split())) if notes.exists() else set()


class Checksum:
    """Finds one box, which is the checksum."""

    algorithm = Algorithm("Checksum", "checksum", "localization")

    def __init__(self) -> None:
        self._notes = Path(os.environ["CHECKSUM_FOLDER"]) / "inferred"
        self._seconds_per_image = float(os.environ.get("CHECKSUM_SECONDS", "0"))

    def detect(self, images: torch.Tensor) -> list[Detections]:
        time.sleep(self._seconds_per_image * len(images))
        readings = [reading(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
        with self._notes.open("a") as notes:
            notes.write("".join(f"{value}\n" for value in readings))
        return [Detections(np.array([box_of(value)], np.int32), np.ones(1, np.float32)) for value in readings]


def pipelines() -> list[PipelineSpec]:
    def load(device: torch.device, sizes: CallSizes) -> Pipeline:
        return Pipeline(SLUG, Checksum(), device, sizes=sizes)

    return [PipelineSpec(SLUG, "Checksum", (Checksum.algorithm,), load)]
