"""A batch's results on their way into the journal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adc_worker.antenna.wire import Algorithm, Classification, Detection
from adc_worker.errors import ImageError
from adc_worker.ingest.decode import DecodeReport
from adc_worker.ingest.staging import StagedImage
from adc_worker.models.calls import DeviceClock
from adc_worker.runtime.inference import infer_and_keep
from adc_worker.runtime.outcomes import ImageResult
from tests.support.images import header, staged

WHO = Algorithm("Moths", "moths", "classification")


class Outcomes:
    """Remembers what came of which image."""

    def __init__(self) -> None:
        self.results: list[ImageResult] = []
        self.kept: dict[int, bytes] = {}
        self.failed: dict[int, str] = {}

    def succeed(self, results: Iterable[ImageResult]) -> None:
        self.results += results
        self.kept |= {result.task_id: b"".join(result.parts) for result in results}

    def fail_staged(self, image: StagedImage, error: ImageError) -> None:
        self.failed[image.id] = str(error)


class Pipeline:
    """Finds one moth in every image, with these scores and logits."""

    slug = "moths"
    clock = DeviceClock()

    def __init__(self, values: Sequence[tuple[float, float]]) -> None:
        self._values = values

    def infer(self, _images: torch.Tensor) -> Iterable[list[Detection]]:
        for score, logit in self._values:
            arrays = np.array([score, 0], np.float32), np.array([logit, 0], np.float32)
            yield [Detection((0, 0, 1, 1), WHO, [Classification("moth", *arrays, WHO, terminal=True)])]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers_fail_their_image_alone(odd: float) -> None:
    """JSON has no word for them, and Antenna refuses the whole post for one."""
    pipeline: Any = Pipeline([(0.5, 1.0), (odd, 1.0), (0.5, odd), (0.9, 2.0)])
    outcomes: Any = Outcomes()
    images = [staged(number, Path(f"{number}.img"), header(4, 4)) for number in range(4)]
    reports = [DecodeReport(0.0, truncated=False)] * 4
    stats = infer_and_keep(pipeline, torch.zeros(4, 4, 4, 3, dtype=torch.uint8), images, reports, outcomes)
    assert set(outcomes.kept) == {0, 3}
    assert outcomes.failed == dict.fromkeys((1, 2), "moths gave scores for it that are not finite numbers")
    assert stats.detections == 2
    assert not [body for body in outcomes.kept.values() if b"null" in body or b"NaN" in body]


def test_what_was_wrong_with_a_file_stands_beside_its_result() -> None:
    """Whole, cut short, damaged inside, or both: each image with its own."""
    pipeline: Any = Pipeline([(0.5, 1.0)] * 4)
    outcomes: Any = Outcomes()
    images = [staged(number, Path(f"{number}.img"), header(4, 4)) for number in range(4)]
    told = [(False, False), (True, False), (False, True), (True, True)]
    reports = [DecodeReport(0.0, truncated, damaged) for truncated, damaged in told]
    infer_and_keep(pipeline, torch.zeros(4, 4, 4, 3, dtype=torch.uint8), images, reports, outcomes)
    assert [(result.truncated, result.damaged) for result in outcomes.results] == told
