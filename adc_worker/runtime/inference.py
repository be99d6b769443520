"""One batch through the pipeline: infer, serialise image by image, keep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean

import numpy as np
import torch

from adc_worker.antenna.wire import SuccessResult
from adc_worker.errors import DeviceMemoryShort, ImageError
from adc_worker.ingest.decode import DecodeReport
from adc_worker.ingest.staging import StagedImage
from adc_worker.log import get_logger
from adc_worker.models.pipeline import Pipeline
from adc_worker.planning.measurements import ImageProbe
from adc_worker.redaction import public_url
from adc_worker.runtime.outcomes import ImageResult, Outcomes

_log = get_logger(__name__)

# Scores and logits of 29 176 classes x 200 detections are 47 MB as float32: such results go to the journal image by
# image, ordinary ones with their batch.
KEEP_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class InferenceStats:
    """What one batch took and gave."""

    inference_s: float
    keep_s: float
    detections: int
    device_s: float  # of inference_s, what the models took


def infer_and_keep(
    pipeline: Pipeline,
    images: torch.Tensor,
    staged: Sequence[StagedImage],
    reports: Sequence[DecodeReport],
    outcomes: Outcomes,
) -> InferenceStats:
    """Infer uint8 [n, H, W, 3] and keep each image's result; `staged` and `reports` say what row i is."""
    started, device_s = time.perf_counter(), pipeline.clock.total_s
    keep_s, detections, arrays_bytes = 0.0, 0, 0
    waiting: list[ImageResult] = []
    for image, report, found in zip(staged, reports, pipeline.infer(images), strict=True):
        if isinstance(found, ImageError):
            outcomes.fail_staged(image, found)
            continue
        if isinstance(found, DeviceMemoryShort):
            outcomes.leave_staged(image, found)
            continue
        if not all(np.isfinite((one.scores, one.logits)).all() for box in found for one in box.classifications):
            outcomes.fail_staged(image, ImageError(f"{pipeline.slug} gave scores for it that are not finite numbers"))
            continue
        now = datetime.now(UTC).isoformat()
        # The share of the batch so far, and its own decode: what one image cost.
        total_s = report.decode_s + (time.perf_counter() - started - keep_s) / (1 + staged.index(image))
        parts = SuccessResult(image.task, pipeline.slug, found, total_s, now)
        if report.truncated or report.damaged:
            _log_damage(image, report)
        waiting.append(ImageResult(image.id, parts, len(found), report.truncated, report.damaged))
        detections += len(found)
        arrays_bytes += sum(one.scores.nbytes + one.logits.nbytes for box in found for one in box.classifications)
        if arrays_bytes >= KEEP_BYTES:
            keeping = time.perf_counter()
            outcomes.succeed(waiting)
            waiting, arrays_bytes = [], 0
            keep_s += time.perf_counter() - keeping
        del found, parts  # or the last image's arrays would live as long as the next one's inference
    keeping = time.perf_counter()
    outcomes.succeed(waiting)
    keep_s += time.perf_counter() - keeping
    inference_s, device_s = time.perf_counter() - started - keep_s, pipeline.clock.total_s - device_s
    return InferenceStats(inference_s, keep_s, detections, device_s)


def _log_damage(image: StagedImage, report: DecodeReport) -> None:
    """Name a file of which a part is missing or made up: its result is of what the decoder could show."""
    _log.warning(
        "image_file_damaged",
        image_id=image.task.image_id,
        url=public_url(image.task.image_url),
        truncated=report.truncated,
        damaged=report.damaged,
        decoder=report.complaint,
    )


def measured_image(staged: Sequence[StagedImage], reports: Sequence[DecodeReport], stats: InferenceStats) -> ImageProbe:
    """Return what an image of a batch cost: sizes are the largest, times the mean."""
    header = staged[0].header
    return ImageProbe(
        compressed_bytes=max(image.header.compressed_bytes for image in staged),
        width_px=header.width_px,
        height_px=header.height_px,
        decode_scratch_bytes=max(image.header.scratch_bytes for image in staged),
        first_byte_s=fmean(image.download.first_byte_s for image in staged),
        download_s=fmean(image.download.total_s for image in staged),
        decode_s=fmean(report.decode_s for report in reports),
        inference_s=stats.inference_s / len(staged),
        keep_s=stats.keep_s,
    )
