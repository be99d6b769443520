"""Images that the probe did not decode: staged behind it, or listed by Antenna."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.planning.measurements import ProbeReport, Sighting, at_once, spread
from adc_worker.planning.policy import RESERVE_BYTES, IngestPolicy
from tests.support.fakes import GB, MB, host, image_probe, report

USUAL = report(image_probe(decode_s=0.05, download_s=0.2))
LARGE = Sighting(8192, 4320, 20 * MB, 15 * MB, 0.1, 0.9)  # four times the pixels


def test_what_is_staged_behind_the_probe_is_planned_with_by_its_size() -> None:
    """Memory by the largest, decode and inference memory in proportion to the pixels, downloads as measured."""
    seen = USUAL.with_sighted([LARGE])
    assert seen.tensor_bytes_per_image == 4 * USUAL.tensor_bytes_per_image
    assert (seen.compressed_bytes, seen.decode_scratch_bytes) == (20 * MB, 15 * MB)
    assert seen.decode_s == pytest.approx((0.05 + 0.05 + 0.2) / 3)
    assert seen.inference_bytes(seen.tensor_bytes_per_image) == 4 * USUAL.inference_peak_bytes
    assert seen.inference_s == USUAL.inference_s


def test_a_listed_size_without_bytes_is_filled_in_by_its_pixels() -> None:
    """Antenna may know width and height alone, and nothing was downloaded."""
    seen = USUAL.with_sighted([Sighting(8192, 4320)])
    assert seen.compressed_bytes == 4 * USUAL.compressed_bytes
    assert seen.download_s == USUAL.download_s


def test_connection_set_up_and_cold_dns_do_not_pass_for_the_link() -> None:
    """The first two downloads took 5 s each; those behind them 0.2 s."""
    cold = report(image_probe(download_s=5.0))
    assert cold.with_sighted([Sighting(4096, 2160, download_s=0.2)] * 4).download_s == 0.2


@pytest.mark.parametrize("first", [image_probe(inference_s=9.0), image_probe(width_px=64, height_px=48)])
def test_a_first_inference_that_warms_up_or_a_tiny_first_image_does_not_set_the_pace(first: object) -> None:
    """The later probe does, and memory goes by the larger one."""
    made = ProbeReport((first, image_probe()), GB, 100 * MB)  # type: ignore[arg-type]
    assert made.inference_s == image_probe().inference_s
    assert made.tensor_bytes_per_image == image_probe().tensor_bytes


def test_downloads_that_shared_a_link_are_counted_while_any_ran() -> None:
    """Two of 4 s side by side, and after a pause one alone: 10 s of transfers in 6 s."""
    assert at_once([(4.0, 4.0), (4.0, 4.0), (12.0, 2.0)]) == pytest.approx(10 / 6)
    assert at_once([(5.0, 0.0)]) == at_once([]) == 1.0


def test_little_evidence_widens_the_margin() -> None:
    """One probe alone, or two that differ: twice the reserve, so the same machine holds less."""
    policy, lease = IngestPolicy(), LeaseTerms()
    machines = [host(limit_bytes=limit_mb * MB) for limit_mb in range(1_900, 2_600, 50)]
    sure = [policy.plan(USUAL, machine, lease) for machine in machines]
    unsure = [policy.plan(replace(USUAL, uncertain=True), machine, lease) for machine in machines]
    assert f"+ {RESERVE_BYTES / MB:.0f} MB of doubt" in unsure[0].why["peak_bytes"]
    sizes = [(one.arena_bytes, other.arena_bytes) for one, other in zip(sure, unsure, strict=True)]
    assert all(certain >= uncertain for certain, uncertain in sizes)
    assert any(certain > uncertain for certain, uncertain in sizes)


def test_a_few_stand_for_many_sizes() -> None:
    """From the smallest twentieth to the largest: one stray photograph in a hundred is not planned for."""
    many = [Sighting(100 + number, 100) for number in range(99)] + [Sighting(50_000, 50_000)]
    chosen = spread(many)
    assert len(chosen) == 10
    assert chosen[0].width_px < 110
    assert 190 < chosen[-1].width_px < 200
    assert spread([]) == []
