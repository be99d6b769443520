"""The two values between measuring and feeding."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.planning.measurements import ProbeReport, Sighting
from adc_worker.planning.plan import descriptors
from adc_worker.planning.policy import IngestPolicy
from tests.support.fakes import GB, MB, host, image_probe, report

PLAN = IngestPolicy().plan(report(image_probe()), host(), LeaseTerms())


def test_memory_is_planned_with_the_largest_and_time_with_the_mean() -> None:
    """Two images that do not represent each other."""
    small = image_probe(width_px=100, height_px=100, compressed_bytes=10, decode_scratch_bytes=40)
    large = image_probe(width_px=200, height_px=100, compressed_bytes=30, decode_scratch_bytes=20)
    measured = ProbeReport((replace(large, download_s=1, decode_s=1), replace(small, download_s=3, decode_s=2)), 0, 0)
    assert measured.tensor_bytes_per_image == 60_000
    assert (measured.compressed_bytes, measured.decode_scratch_bytes) == (30, 40)
    assert (measured.download_s, measured.decode_s) == (2, 1.5)


def test_inference_is_timed_by_the_last_image() -> None:
    """The first call of a model pays for its set-up."""
    measured = ProbeReport((image_probe(inference_s=9), image_probe(inference_s=0.5, download_s=1)), 0, 0)
    assert measured.inference_s == 0.5
    assert measured.download_inference_ratio == pytest.approx(0.6 / 0.5)


def test_an_image_that_an_earlier_run_downloaded_tells_nothing_about_the_link() -> None:
    """After a crash both may be on disk already, and that must not stop the worker a second time."""
    on_disk = image_probe(download_s=0)
    assert ProbeReport((on_disk, image_probe(download_s=3)), 0, 0).download_s == 3
    assert IngestPolicy().plan(report(on_disk), host(), LeaseTerms()).images_per_s > 0


def test_an_inference_that_takes_no_time_at_all_is_no_division_by_zero() -> None:
    """A clock may be coarse."""
    assert IngestPolicy().plan(report(image_probe(inference_s=0, decode_s=0)), host(), LeaseTerms()).batch_size >= 1


def test_a_report_needs_an_image() -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="at least one image"):
        ProbeReport((), 0, 0)


@pytest.mark.parametrize(
    "field",
    [
        "batch_size",
        "batch_bytes",
        "prefetch_factor",
        "decode_workers",
        "arena_bytes",
        "download_concurrency",
        "staged_ahead",
        "fetch_size",
        "held_limit",
    ],
)
def test_a_plan_that_would_stand_still_is_refused(field: str) -> None:
    """With the offending value."""
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
        replace(PLAN, **{field: 0})  # type: ignore[arg-type]


def test_a_plans_reasons_cannot_be_changed() -> None:
    """Neither through the plan nor through the dict they came in."""
    reasons = {"batch_size": "because"}
    made = replace(PLAN, why=reasons)
    reasons["batch_size"] = "not"
    assert made.why["batch_size"] == "because"
    with pytest.raises(TypeError):
        made.why["batch_size"] = "not"  # type: ignore[index]


def test_a_plans_log_fields_are_flat() -> None:
    """The reasons go into a field of their own."""
    logged = PLAN.log_fields()
    assert logged["batch_size"] == 4
    assert "why" not in logged
    assert all(isinstance(value, int | float | str) for value in logged.values())


def test_a_host_without_memory_or_cores_is_a_measuring_error() -> None:
    """Not something to plan with."""
    with pytest.raises(ValueError, match="limit_bytes=0"):
        host(limit_bytes=0)
    with pytest.raises(ValueError, match="cores=0"):
        HostBudget(GB, "MemTotal", GB, 0, 0, GB, 1024)


def test_a_plan_knows_how_many_files_it_may_open() -> None:
    """A socket and a file for each download, two for each decode."""
    assert descriptors(32, 2) - descriptors(1, 1) == 2 * 31 + 2
    assert descriptors(32, 64) < 1024  # the usual soft limit


def test_a_report_follows_the_link_and_keeps_its_images() -> None:
    """Only its downloads take longer."""
    usual = report(image_probe(download_s=0.1))
    changed = usual.for_link(20.0, 8)
    assert changed.download_s == pytest.approx(2.0)
    assert changed.downloads == 8
    assert changed.decode_s == usual.decode_s


def test_a_large_image_that_takes_longer_says_nothing_about_the_link() -> None:
    """Its first byte comes as soon, and the rest by its size; four times as long all in all is a slower link."""
    usual = report(image_probe(download_s=0.2, compressed_bytes=1 * MB))  # half of it until the first byte
    assert usual.link_slower(image_probe(download_s=1.1, compressed_bytes=10 * MB)) == pytest.approx(1.0)
    assert usual.link_slower(image_probe(download_s=4.4, compressed_bytes=10 * MB)) == pytest.approx(4.0)
    assert usual.link_slower(image_probe(download_s=0.0)) == 1.0, "it was on disk"


def test_memory_of_inference_that_does_not_grow_with_the_image_is_not_scaled_beyond_reason() -> None:
    """20 MB for 64 x 48 pixels are a library's first call, and not 58 GB for a photograph."""
    small = image_probe(width_px=64, height_px=48, compressed_bytes=2_000, decode_scratch_bytes=1_200)
    tiny = report(small, inference_peak_bytes=20 * MB)
    seen = tiny.with_sighted([Sighting(4096, 2160)])
    # Sixteen times as much, or 30 bytes for each further pixel.
    assert 20 * MB < seen.inference_bytes(3 * 4096 * 2160) <= 20 * MB * 16
    made = IngestPolicy().plan(seen, host(), LeaseTerms())
    assert made.peak_bytes < host().limit_bytes
    assert made.solo_bytes > 10 * GB, "larger images are not refused"


@given(st.integers(1, 10**9), st.integers(0, 10**10), st.integers(0, 10**10))
def test_a_larger_image_never_takes_less_memory_to_infer(peak_bytes: int, some_bytes: int, more_bytes: int) -> None:
    """However far both are from the image that was measured: plans reckon with the largest image."""
    measured = report(image_probe(width_px=64, height_px=64), inference_peak_bytes=peak_bytes)
    smaller = measured.inference_bytes(some_bytes)
    assert smaller <= measured.inference_bytes(some_bytes + more_bytes)


def test_what_was_measured_again_keeps_the_sizes_that_are_known() -> None:
    """Four batches of small images do not make the large ones unheard of, and a cold download is forgotten."""
    large = Sighting(8192, 4320, download_s=9.0)
    seen = report(image_probe(download_s=5.0)).with_sighted([large])
    batches = [image_probe(inference_s=time_s, download_s=0.2, decode_s=0.05) for time_s in (0.1, 0.1, 0.1, 3.0)]
    again = seen.measured_by(batches, 4)
    assert again.tensor_bytes_per_image == 8192 * 4320 * 3
    assert (again.inference_s, again.download_s) == (0.1, 0.2)
    assert again.decode_s == pytest.approx((6 * 0.05 + 4 * 0.05) / 7), "in proportion to pixels"
