"""One batch through the pipeline: infer, serialise image by image, keep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from adc_worker.antenna.wire import success_result
from adc_worker.ingest.decode import DecodeReport
from adc_worker.ingest.staging import StagedImage
from adc_worker.models.pipeline import Pipeline
from adc_worker.runtime.outcomes import ImageResult, JobOutcomes

# Serialised results of large classifiers reach 100 MB an image (measurements): they go to the journal as they come.
KEEP_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class InferenceStats:
    """What one batch took and gave."""

    inference_s: float
    keep_s: float
    detections: int
    result_bytes: int


def infer_and_keep(
    pipeline: Pipeline,
    images: torch.Tensor,
    staged: Sequence[StagedImage],
    reports: Sequence[DecodeReport],
    outcomes: JobOutcomes,
) -> InferenceStats:
    """Infer uint8 [n, H, W, 3] and keep each image's result; `staged` and `reports` say what row i is."""
    started = time.perf_counter()
    keep_s, detections, result_bytes = 0.0, 0, 0
    waiting: list[ImageResult] = []
    for image, report, found in zip(staged, reports, pipeline.infer(images), strict=True):
        elapsed_s = (time.perf_counter() - started - keep_s) / (1 + staged.index(image))
        body = success_result(
            image.task, pipeline.slug, found, report.decode_s + elapsed_s, datetime.now(UTC).isoformat()
        )
        waiting.append(ImageResult(image.id, body, len(found), report.truncated))
        detections += len(found)
        result_bytes += len(body)
        if sum(len(result.body) for result in waiting) >= KEEP_BYTES:
            keep_s += _keep(waiting, outcomes)
    inference_s = time.perf_counter() - started - keep_s
    keep_s += _keep(waiting, outcomes)
    return InferenceStats(inference_s, keep_s, detections, result_bytes)


def _keep(waiting: list[ImageResult], outcomes: JobOutcomes) -> float:
    started = time.perf_counter()
    outcomes.succeed(waiting)
    waiting.clear()
    return time.perf_counter() - started
