"""A pipeline that notes every image it infers, and waits or fails as files in COUNTING_FOLDER tell it.

Image n is the PNG of `numbered`: its colour is its number. `hold` makes inference wait, `broken` makes CUDA fail, and
image NAN_IMAGE gets a score that no JSON can carry.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adc_worker.models.pipeline import Algorithm, CallSizes, Detections, Pipeline, Scores
from adc_worker.models.registry import PipelineSpec
from adc_worker.models.weights import WeightStore
from adc_worker.runtime import faults
from tests.support.images import encoded

SLUG = "counting"
NAN_IMAGE = 255
POLL_S = 0.02
ENVIRONMENT = {"AMI_EXTRA_PIPELINES": "tests.support.counting_pipeline:pipelines"}


def numbered(number: int, width_px: int = 24, height_px: int = 16) -> bytes:
    """Return image `number`."""
    return encoded(Image.new("RGB", (width_px, height_px), (number % 256, number // 256, 77)), "PNG")


def inferred(folder: Path) -> Counter[int]:
    """Return how often each image was inferred to its end."""
    notes = folder / "inferred"
    return Counter(map(int, notes.read_text().split())) if notes.exists() else Counter()


class Counting:
    """Finds the whole image, once."""

    algorithm = Algorithm("Counting", "counting", "localization")

    def __init__(self) -> None:
        self._folder = Path(os.environ["COUNTING_FOLDER"])
        self._seconds_per_image = float(os.environ.get("COUNTING_SECONDS", "0"))

    def detect(self, images: torch.Tensor) -> list[Detections]:
        while (self._folder / "hold").exists():
            time.sleep(POLL_S)
        if (self._folder / "broken").exists():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        time.sleep(self._seconds_per_image * len(images))
        height, width = images.shape[2:]
        with (self._folder / "inferred").open("a") as notes:
            notes.write("".join(f"{int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])}\n" for image in images))
        return [Detections(np.array([[0, 0, width, height]], np.int32), np.ones(1, np.float32)) for _ in images]


class Colour:
    """Scores a crop by its colour."""

    algorithm = Algorithm("Colour", "colour", "classification", labels=("dull", "bright"))

    def classify(self, crops: Sequence[torch.Tensor]) -> Scores:
        red = np.array([float(crop[0, 0, 0]) for crop in crops], np.float32)
        scores = np.stack([255 - red, red], axis=1) / np.float32(255)
        scores[red == NAN_IMAGE] = np.nan
        return Scores(scores, scores)


def load(device: torch.device, sizes: CallSizes) -> Pipeline:
    """Load it; COUNTING_WEIGHTS is the URL of a file that it needs, and has no use for."""
    if url := os.environ.get("COUNTING_WEIGHTS"):
        WeightStore(Path(os.environ["COUNTING_FOLDER"]) / "models").ensure(url)
    return Pipeline(SLUG, Counting(), device, classifier=Colour(), sizes=sizes)


def pipelines() -> list[PipelineSpec]:
    """Return it; COUNTING_MACHINE_FAULT_S shortens how long a fault of the machine may last."""
    faults.MACHINE_FAULT_S = float(os.environ.get("COUNTING_MACHINE_FAULT_S", faults.MACHINE_FAULT_S))
    return [PipelineSpec(SLUG, "Counting", (Counting.algorithm, Colour.algorithm), load)]
