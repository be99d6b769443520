"""From files to results: every result is computed from the pixels of its own image, whatever lies beside it."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from adc_worker.errors import DeviceMemoryShort, ImageError, StagedFileLost
from adc_worker.ingest.decode import decode
from adc_worker.ingest.header import read_header
from adc_worker.ingest.loader import build_dataloader
from adc_worker.ingest.staging import StagedImage, StagedQueue
from adc_worker.models.pipeline import Algorithm, CallSizes, Detections, Pipeline, Scores
from adc_worker.runtime.inference import infer_and_keep
from tests.support.damage import DAMAGES, SAMPLE_FILES
from tests.support.images import staged, written
from tests.support.plans import ingest_plan

if TYPE_CHECKING:
    import numpy.typing as npt

    from adc_worker.runtime.outcomes import ImageResult

MAX_PIXELS = 1_000_000
CHECKSUM_BITS = 24  # what a float32 holds exactly
IMAGES = 150
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def checksum(pixels: npt.NDArray[np.uint8]) -> float:
    return float(zlib.crc32(np.ascontiguousarray(pixels).tobytes()) >> (32 - CHECKSUM_BITS))


def boxes_of(height_px: int, width_px: int) -> list[tuple[int, int, int, int]]:
    """Return boxes that touch every edge and corner of an image: what lies beside it would be in them."""
    middle_x, middle_y = max(1, width_px // 2), max(1, height_px // 2)
    return [
        (0, 0, width_px, height_px),
        (0, 0, middle_x, middle_y),
        (width_px - 1, height_px - 1, width_px, height_px),
        (0, height_px - 1, width_px, height_px),
    ]


class ChecksumDetector:
    """Finds the same boxes on every image."""

    algorithm = Algorithm("Checksums", "checksums", "localization")

    def detect(self, images: torch.Tensor) -> list[Detections]:
        height_px, width_px = images.shape[2:]
        boxes = np.array(boxes_of(height_px, width_px), np.int32)
        return [Detections(boxes, np.ones(len(boxes), np.float32)) for _image in images]


class ChecksumClassifier:
    """Says of a crop what its checksum is."""

    algorithm = Algorithm("Checksums of crops", "crops", "classification", labels=("crop", "none"))

    def classify(self, crops: Sequence[torch.Tensor]) -> Scores:
        rows = [[checksum(crop.cpu().numpy().transpose(1, 2, 0)), 0.0] for crop in crops]
        values = np.array(rows, np.float32)
        return Scores(values, values)


class CollectedOutcomes:
    """Remembers the checksums that were kept for each image, and which images failed."""

    def __init__(self) -> None:
        self.checksums: dict[int, list[float]] = {}
        self.failed: dict[int, str] = {}

    def begin(self, images: Sequence[StagedImage], *, alone: bool = False) -> None:
        """Nothing is put on record."""

    def succeed(self, results: Iterable[ImageResult]) -> None:
        for result in results:
            body = json.loads(b"".join(result.parts))
            found = [detection["classifications"][0]["logits"][0] for detection in body["detections"]]
            assert result.task_id not in self.checksums
            self.checksums[result.task_id] = found

    def fail_staged(self, image: StagedImage, error: ImageError) -> None:
        self.failed[image.id] = str(error)

    def leave_staged(self, image: StagedImage, error: DeviceMemoryShort | StagedFileLost) -> None:
        raise AssertionError(f"no other program holds memory here, yet image {image.id} met {error}")


def expected_checksums(path: Path) -> list[float] | None:
    """Return what must come of a file that is decoded alone, into memory of its own; None for an error."""
    try:
        header = read_header(path, MAX_PIXELS)
        pixels = np.zeros(header.shape, np.uint8)
        decode(path, header, pixels)
    except ImageError:
        return None
    return [checksum(pixels[y1:y2, x1:x2]) for x1, y1, x2, y2 in boxes_of(*header.shape[:2])]


@pytest.mark.parametrize("engine", ["threads", "processes"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_result_is_of_its_own_pixels(tmp_path: Path, engine: str, device: str) -> None:
    """Whole and damaged files of every kind share batches and regions; failures between them move rows."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    dice = random.Random(7)  # noqa: S311 (no secret)
    source = StagedQueue()
    expected: dict[int, list[float] | None] = {}
    for number in range(IMAGES):
        data = dice.choice(list(SAMPLE_FILES.values()))
        if dice.random() < 0.5:
            data = dice.choice(list(DAMAGES.values()))(data, dice)
        path = written(tmp_path / f"{number}.img", data)
        try:
            header = read_header(path, MAX_PIXELS)
        except ImageError:
            continue
        expected[number] = expected_checksums(path)
        source.put(staged(number, path, header, staged_at=1.0 + number))
    source.end()
    outcomes = CollectedOutcomes()
    pipeline = Pipeline(
        "checksums",
        ChecksumDetector(),
        torch.device(device),
        classifier=ChecksumClassifier(),
        sizes=CallSizes(images=2, crops=3),
    )
    plan = ingest_plan(decode_engine=engine, decode_workers=2, batch_size=5, pin_memory=device == "cuda")
    with closing(build_dataloader(plan, source, outcomes.fail_staged)) as loader:
        for batch in loader:
            with batch:
                infer_and_keep(pipeline, batch.images, batch.staged, batch.reports, outcomes)
    assert outcomes.checksums == {number: sums for number, sums in expected.items() if sums is not None}
    assert set(outcomes.failed) == {number for number, sums in expected.items() if sums is None}
    assert len(outcomes.checksums) > IMAGES // 2
    assert len(outcomes.failed) > 5
