"""A pipeline whose detector does what an image's first pixel tells it: crash, hang, or eat memory."""

from __future__ import annotations

import ctypes
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adc_worker.models.pipeline import Algorithm, CallSizes, Detections, Pipeline
from adc_worker.models.registry import PipelineSpec

CRASH, HANG, EAT, HANG_WITH_GIL = (1, 0, 7), (2, 0, 7), (3, 0, 7), (4, 0, 7)
SECONDS_PER_IMAGE = 0.02
HELPER = ("sleep", "98765.4321")
_MEAL_BYTES = 64 << 20


class Faulty:
    """Finds nothing."""

    algorithm = Algorithm("Faulty", "faulty", "localization")

    def detect(self, images: torch.Tensor) -> list[Detections]:
        for image in images:
            time.sleep(SECONDS_PER_IMAGE)
            pixel = tuple(image[:, 0, 0].tolist())
            if pixel == CRASH:
                ctypes.string_at(0)  # a real SIGSEGV
            if pixel == HANG:
                time.sleep(1e6)
            if pixel == HANG_WITH_GIL:
                ctypes.PyDLL(None).sleep(1_000_000)
            meals = []
            while pixel == EAT:
                meals.append(np.ones(_MEAL_BYTES, np.uint8))
        return [Detections(np.empty((0, 4), np.int32), np.empty(0, np.float32)) for _ in images]


def pipelines() -> list[PipelineSpec]:
    def load(device: torch.device, sizes: CallSizes) -> Pipeline:
        return Pipeline("faulty", Faulty(), device, sizes=sizes)

    return [PipelineSpec("faulty", "Faulty", (Faulty.algorithm,), load)]


def leaving_processes() -> list[PipelineSpec]:
    """Return the same, but each load leaves a process behind, in a session of its own."""
    subprocess.Popen(HELPER, start_new_session=True, stderr=subprocess.DEVNULL)
    return pipelines()


def photograph(path: Path, pixel: tuple[int, int, int] = (0, 0, 0)) -> Path:
    """Write a lossless image whose first pixel is `pixel`; all have one shape, so that they share batches."""
    image = Image.new("RGB", (64, 48), "white")
    image.putpixel((0, 0), pixel)
    image.save(path, "PNG")
    return path


def with_a_thread_that_dies() -> list[PipelineSpec]:
    """Return the same, from a process one of whose threads dies."""
    threading.Thread(target=[].pop, name="ill").start()
    return pipelines()
