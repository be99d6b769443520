"""When a job's images have changed for good, and when they only vary."""

from __future__ import annotations

import pytest

from adc_worker.tuning.drift import GROWTH, LARGER_BATCHES, SMALLER_BATCHES, DriftWatch
from adc_worker.tuning.probe_report import ImageProbe, ProbeReport
from tests.support.fakes import GB, MB, image_probe, report

WIDTH_PX = 4000


def _images(size: float) -> ImageProbe:
    """Return what a batch of images of that many times the first ones' pixels showed."""
    return image_probe(width_px=int(WIDTH_PX * size), height_px=2000)


def _watch(**memory: int) -> DriftWatch:
    return DriftWatch(report(_images(1), **memory))


def _observed(watch: DriftWatch, *sizes: float) -> list[ProbeReport]:
    """Return the reports that batches of these sizes led to."""
    seen = [watch.observe(_images(size)) for size in sizes]
    return [changed for changed in seen if changed is not None]


def test_images_like_the_first_ones_are_no_change() -> None:
    """However many."""
    assert _observed(_watch(), *[1.0] * 100) == []


def test_one_stray_large_batch_is_no_change() -> None:
    """Nor is another one later."""
    assert _observed(_watch(), 1, 1, 4, 1, 4, 1) == []


def test_two_large_batches_in_a_row_are_a_change() -> None:
    """At the second one, whatever came before."""
    watch = _watch()
    assert _observed(watch, *[1.0] * 50, 2) == []
    (changed,) = _observed(watch, 3)
    assert changed.tensor_bytes_per_image == _images(3).tensor_bytes


def test_the_first_two_batches_can_be_the_change() -> None:
    """The probe's images may have been the stray ones."""
    assert len(_observed(_watch(), 2, 2)) == 1


def test_a_little_larger_stays_within_the_plans_reserve() -> None:
    """A quarter more does not cross the limit."""
    assert _observed(_watch(), *[GROWTH] * 30) == []
    assert len(_observed(_watch(), *[GROWTH + 0.01] * LARGER_BATCHES)) == 1


def test_a_long_stretch_of_small_images_is_a_change() -> None:
    """At the last batch of the stretch and not before."""
    watch = _watch()
    assert _observed(watch, *[0.5] * (SMALLER_BATCHES - 1)) == []
    assert len(_observed(watch, 0.5)) == 1


@pytest.mark.parametrize("sizes", [[0.2, 1.0], [0.5] * (SMALLER_BATCHES - 1) + [1.0], [0.2, 0.9, 0.4]])
def test_mixed_sizes_are_no_change(sizes: list[float]) -> None:
    """As long as some are as large as planned, memory is planned for them."""
    assert _observed(_watch(), *sizes * 10) == []


def test_after_a_change_the_new_size_is_the_measure() -> None:
    """More of the new size is no change; what was usual before is one, after its long stretch."""
    watch = _watch()
    assert len(_observed(watch, 2, 2)) == 1
    assert _observed(watch, *[2.0] * 50) == []
    assert _observed(watch, *[1.0] * (SMALLER_BATCHES - 1)) == []
    assert len(_observed(watch, 1.0)) == 1


def test_images_that_keep_growing_are_followed_step_by_step() -> None:
    """Each step needs its own two batches."""
    assert len(_observed(_watch(), 2, 2, 4, 4, 8, 8)) == 3


def test_the_pipelines_memory_is_scaled_by_pixels_and_the_rest_is_not() -> None:
    """What the models take does not depend on the image; times are those of the batch seen."""
    watch = _watch(base_bytes=2 * GB, inference_peak_bytes=100 * MB)
    (changed,) = _observed(watch, 3, 3)
    assert (changed.base_bytes, changed.inference_peak_bytes) == (2 * GB, 300 * MB)
    assert changed.images == (_images(3),)
    (again,) = _observed(watch, 6, 6)
    assert again.inference_peak_bytes == 600 * MB


def test_a_report_scales_with_the_largest_of_its_images() -> None:
    """Its memory was measured with that one."""
    first = ProbeReport((_images(1), _images(2)), 1 * GB, 100 * MB)
    assert first.for_images_like(_images(1)).inference_peak_bytes == 50 * MB
