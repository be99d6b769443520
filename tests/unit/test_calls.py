"""A GPU that is never overrun: what does not fit is done in smaller calls, down to one image."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adc_worker.antenna.wire import Detection
from adc_worker.errors import DeviceMemoryShort, ImageError
from adc_worker.ingest.decode import DecodeReport
from adc_worker.models.calls import DeviceNeighbours
from adc_worker.models.pipeline import Algorithm, CallSizes, Detections, Failure, Pipeline, Scores
from adc_worker.runtime.inference import infer_and_keep
from adc_worker.runtime.outcomes import ImageResult
from tests.support.fakes import task

CPU = torch.device("cpu")


class Hungry:
    """A detector, and a classifier, that run out of memory above so many items; one image may be too much alone."""

    def __init__(self, most: int, *, poison: int | None = None) -> None:
        self.algorithm = Algorithm("Hungry", "hungry", "localization", labels=("moth", "nonmoth"))
        self.most, self.poison = most, poison
        self.calls: list[int] = []
        self.taken: list[weakref.ref[torch.Tensor]] = []

    def _take(self, items: Sequence[torch.Tensor]) -> None:
        assert not [one for one in self.taken if one() is not None], "the failed call still holds its memory"
        self.calls.append(len(items))
        scratch = torch.zeros(1000)
        if len(items) > self.most or any(int(item.max()) == self.poison for item in items):
            self.taken.append(weakref.ref(scratch))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB left.")

    def detect(self, images: torch.Tensor) -> list[Detections]:
        self._take(list(images))
        return [Detections(np.array([[0, 0, 2, 2]] * 5, np.int32), np.ones(5, np.float32)) for _ in images]

    def classify(self, crops: Sequence[torch.Tensor]) -> Scores:
        self._take(crops)
        logits = np.stack([[float(crop.max()), 0.5] for crop in crops]).astype(np.float32)
        return Scores(logits, logits)


def images(count: int) -> torch.Tensor:
    """Return black images whose first pixel is their number, from 1."""
    made = torch.zeros(count, 4, 4, 3, dtype=torch.uint8)
    made[:, 0, 0, 0] = torch.arange(1, count + 1)
    return made


def infer(pipeline: Pipeline, count: int) -> list[list[Detection] | Failure]:
    return list(pipeline.infer(images(count)))


@pytest.mark.parametrize(
    ("most", "calls"), [(8, [8, 8, 1]), (4, [8, 4, 4, 4, 4, 1]), (3, [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 1])]
)
def test_a_call_that_does_not_fit_is_halved_until_it_does(most: int, calls: list[int]) -> None:
    """Both halves are done again, every image has its detections, and the size stays as it went well."""
    detector = Hungry(most)
    found = infer(Pipeline("hungry", detector, CPU), 17)
    assert detector.calls == calls
    assert [len(one) for one in found if isinstance(one, list)] == [5] * 17


def test_the_size_is_remembered_per_model_and_shape_also_by_the_next_job() -> None:
    """A pipeline that is put together again for the next job starts with what was learnt; another shape does not."""
    sizes, detector = CallSizes(), Hungry(2)
    infer(Pipeline("hungry", detector, CPU, sizes=sizes), 8)
    detector.calls.clear()
    again = Pipeline("hungry", detector, CPU, sizes=sizes)
    infer(again, 4)
    assert detector.calls == [2, 2]
    detector.calls.clear()
    list(again.infer(torch.zeros(8, 6, 6, 3, dtype=torch.uint8)))
    assert detector.calls == [8, 4, 2, 2, 2, 2]


def test_an_image_that_is_too_much_alone_fails_alone() -> None:
    """Its neighbours have their detections; the error says what torch said."""
    found = infer(Pipeline("hungry", Hungry(8, poison=3), CPU), 5)
    assert [isinstance(one, ImageError) for one in found] == [False, False, True, False, False]
    assert "Tried to allocate 2.00 GiB" in str(found[2])


def test_crops_are_cut_and_halved_a_call_at_a_time() -> None:
    """Five crops, four a call, two fit; a crop that is too much alone fails its image alone."""
    classifier = Hungry(2, poison=2)
    pipeline = Pipeline("hungry", Hungry(8), CPU, classifier=classifier, sizes=CallSizes(8, 4))
    found = infer(pipeline, 3)
    assert classifier.calls[:5] == [4, 2, 2, 1, 2]
    assert max(classifier.calls[1:]) == 2
    assert [isinstance(one, ImageError) for one in found] == [False, True, False]


def test_the_image_that_failed_has_an_error_result_and_the_others_theirs() -> None:
    """As a batch of a job: the error is kept for that image alone."""
    staged: Any = [SimpleNamespace(id=number, task=task(number)) for number in range(1, 4)]
    reports = [DecodeReport(0.1, truncated=False)] * 3
    kept: dict[int, str] = {}

    def succeed(results: Sequence[ImageResult]) -> None:
        kept.update({one.task_id: json.loads(b"".join(one.parts))["source_images"][0]["id"] for one in results})

    outcomes: Any = SimpleNamespace(
        succeed=succeed, fail_staged=lambda image, error: kept.update({image.id: str(error)})
    )
    pipeline = Pipeline("hungry", Hungry(8, poison=2), CPU)
    stats = infer_and_keep(pipeline, images(3), staged, reports, outcomes)
    assert (kept[1], kept[3]) == ("1", "3")
    assert "out of memory" in kept[2]
    assert stats.detections == 10
    assert 0 < stats.device_s <= stats.inference_s


def test_what_others_hold_is_freed_before_a_call_is_made_smaller() -> None:
    """Models of other pipelines go first: the call is repeated whole."""
    detector = Hungry(2)
    idle = [1]

    def relieve() -> bool:
        detector.most = 8
        return bool(idle and idle.pop())

    infer(replace(Pipeline("hungry", detector, CPU), relieve=relieve), 8)
    assert detector.calls == [8, 8]


class Neighbour:
    """Another program on the device, which leaves after so many seconds."""

    def __init__(self, detector: Hungry, leaves_after_s: float) -> None:
        self.detector, self.leaves_after_s, self.waited_s = detector, leaves_after_s, 0.0

    def on(self, _device: torch.device) -> DeviceNeighbours:
        return DeviceNeighbours(lambda: 5_000_000_000 if self.waited_s < self.leaves_after_s else 0, self.pause)

    def pause(self, seconds: float) -> None:
        self.waited_s += seconds
        if self.waited_s >= self.leaves_after_s:
            self.detector.most = 8


def test_an_image_waits_for_memory_of_the_device_that_another_program_holds() -> None:
    """It is no error of the image, and when the other one is gone it has its detections."""
    detector = Hungry(0)
    neighbour = Neighbour(detector, 2)
    found = infer(replace(Pipeline("hungry", detector, CPU), neighbours_on=neighbour.on), 1)
    assert [len(one) for one in found if isinstance(one, list)] == [5]
    assert neighbour.waited_s == 2


def test_images_for_which_another_program_leaves_no_memory_are_no_errors_either() -> None:
    """A batch is held up for a moment only, because others wait behind it: its images are tried again later."""
    detector = Hungry(0)
    neighbour = Neighbour(detector, 1e9)
    found = infer(replace(Pipeline("hungry", detector, CPU), neighbours_on=neighbour.on), 3)
    assert [type(one) for one in found] == [DeviceMemoryShort] * 3
    assert 1 <= neighbour.waited_s <= 2
    assert "other programs on this GPU" in str(found[0])


def test_a_crop_waits_for_the_device_as_an_image_does() -> None:
    """Its image, too, is tried again later, and keeps no half of its answer."""
    classifier = Hungry(0)
    pipeline = Pipeline("hungry", Hungry(8), CPU, classifier=classifier)
    (found,) = infer(replace(pipeline, neighbours_on=Neighbour(classifier, 1e9).on), 1)
    assert isinstance(found, DeviceMemoryShort)


def test_an_image_that_waited_in_vain_is_given_back_without_an_error() -> None:
    """As a batch of a job: no error is kept for it, and its neighbours have their results."""
    staged: Any = [SimpleNamespace(id=number, task=task(number)) for number in (1, 2)]
    reports = [DecodeReport(0.1, truncated=False)] * 2
    ends: dict[int, str] = {}
    outcomes: Any = SimpleNamespace(
        succeed=lambda results: ends.update({one.task_id: "kept" for one in results}),
        leave_staged=lambda image, error: ends.update({image.id: type(error).__name__}),
    )
    detector = Hungry(8, poison=2)
    pipeline = replace(Pipeline("hungry", detector, CPU), neighbours_on=Neighbour(detector, 1e9).on)
    infer_and_keep(pipeline, images(2), staged, reports, outcomes)
    assert ends == {1: "kept", 2: "DeviceMemoryShort"}


def test_the_clock_counts_the_calls_and_not_the_consumer() -> None:
    pipeline = Pipeline("hungry", Hungry(8), CPU)
    waiting = pipeline.infer(images(2))
    assert pipeline.clock.total_s == 0
    next(waiting)
    after_call = pipeline.clock.total_s
    next(waiting)
    assert 0 < after_call == pipeline.clock.total_s


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_that_runs_out_of_memory_is_worked_on_in_smaller_calls() -> None:
    """Written, not run: 256 MB an image under a cap of about 1 GB of the device's memory."""
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(1e9 / total)

    class Large(Hungry):
        def _take(self, items: Sequence[torch.Tensor]) -> None:
            self.calls.append(len(items))
            torch.empty(len(items) * (256 << 20), dtype=torch.uint8, device=device)

    try:
        detector = Large(8)
        found = infer(Pipeline("hungry", detector, device), 8)
        assert len(found) == 8
        assert detector.calls[0] == 8
        assert max(detector.calls[-2:]) <= 3
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()
