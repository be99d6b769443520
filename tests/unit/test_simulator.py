"""The simulator of the benchmarks: a world of its own, in which a few things can be worked out by hand."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from adc_worker.antenna.leases import ArrivalWatch, LeaseTerms
from benchmarks.support import simulator
from benchmarks.support.simulator import Feed, Photo, World, probe, simulate, simulate_loaders

PHOTO = Photo(4000, 2000, 2_000_000)  # 24 MB of pixels, 31 ms to decode
WORLD = World((PHOTO,) * 100, 1e9, 0.01, 0.0, 0.1, 4, 4_000_000_000, 300.0)
FEED = Feed(4, 100_000_000, 2, 2, 400_000_000, 1 << 40, 8, 40, 20, 1000, 0.4)


def test_the_simulator_knows_nothing_of_the_policy() -> None:
    """It imports nothing of the package: its figures are evidence."""
    tree = ast.parse(Path(simulator.__file__).read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert imported
    assert not [name for name in imported if name.startswith(("adc_worker", "benchmarks"))]


@pytest.mark.parametrize(
    ("change", "images_per_s"),
    [
        ({}, 1 / (0.1 + 0.004 + 0.0018)),  # inference, 24 MB to the device, keeping the result
        ({"link_bytes_per_s": 4e6}, 2.0),
        ({"inference_s": 0.0, "cores": 1}, 1 / (2.1e-9 * 8e6 + 7e-9 * 2e6 + 2e-3 + 2e-3)),
    ],
    ids=["inference", "link", "decode"],
)
def test_the_slowest_stage_sets_the_rate(change: dict[str, float], images_per_s: float) -> None:
    """Whichever it is, within what batches and a start cost."""
    world = replace(WORLD, **change)  # type: ignore[arg-type]
    assert simulate(world, FEED).steady_per_s == pytest.approx(images_per_s, rel=0.1)
    assert world.roofline == pytest.approx(images_per_s, rel=0.02)


def test_every_image_comes_out_whatever_the_link_does() -> None:
    """Failures are tried again, and the same seed gives the same run."""
    reliable = replace(WORLD, latency_s=0.5, inference_s=0.01)
    world = replace(reliable, failure_share=0.3)
    first, again = simulate(world, FEED), simulate(world, FEED)
    assert first.images == 100
    assert first.wall_s == again.wall_s > simulate(reliable, FEED).wall_s


def test_memory_is_what_the_arena_holds() -> None:
    """Four batches of four at most; a machine without room for them runs out."""
    peak = simulate(WORLD, FEED).peak_bytes
    assert peak < WORLD.base_bytes + 400_000_000 + 200_000_000
    assert simulate(replace(WORLD, memory_bytes=peak - 1), FEED).out_of_memory
    assert not simulate(replace(WORLD, memory_bytes=peak), FEED).out_of_memory


def test_memory_that_is_written_to_first_costs_once() -> None:
    """Where one core does everything, the arena's size times that; a longer job pays no more."""
    plain = replace(WORLD, cores=1, inference_s=0.0)
    longer = replace(plain, photos=3 * plain.photos)
    for world in (plain, longer):
        more_s = simulate(replace(world, touch_s_per_byte=1e-9), FEED).wall_s - simulate(world, FEED).wall_s
        assert more_s == pytest.approx(0.4, rel=0.1)


def test_work_that_nothing_waits_for_takes_cores_from_decoding() -> None:
    """It slows a job where decoding binds, and none where inference does."""
    beside = {"image_cpu_s": 0.01, "batch_cpu_s": 0.04}
    decoding = replace(WORLD, cores=1, inference_s=0.0)
    slowed = simulate(replace(decoding, **beside), FEED)  # type: ignore[arg-type]
    assert 1 / slowed.steady_per_s - 1 / simulate(decoding, FEED).steady_per_s == pytest.approx(0.02, rel=0.2)
    assert simulate(replace(WORLD, **beside), FEED).wall_s == pytest.approx(simulate(WORLD, FEED).wall_s, rel=0.02)  # type: ignore[arg-type]


def test_cores_that_are_threads_of_one_bring_less_together() -> None:
    """Two of them 1.3 times what one brings, which is what a decoder gets that runs alone."""
    threads = replace(WORLD, cores=2, cores_together=1.3)
    assert [threads.core_speed(jobs) for jobs in (1, 2, 4)] == pytest.approx([1.0, 0.65, 0.325])
    assert WORLD.core_speed(4) == 1.0
    decoding, one = replace(threads, inference_s=0.0), replace(FEED, decode_workers=1)
    gained = simulate(decoding, FEED).steady_per_s / simulate(decoding, one).steady_per_s
    assert 1.1 < gained < 1.4


def test_holding_more_than_the_lease_allows_expires() -> None:
    """Forty in hand at 10 images/s wait 4 s; a lease of 2 s allows a few."""
    short = replace(WORLD, ack_wait_s=2.0)
    assert simulate(short, FEED).expired > 0
    assert simulate(short, replace(FEED, in_hand=5, fetch_size=5)).expired == 0


def test_small_images_do_not_pull_large_ones_into_expired_leases() -> None:
    """On a narrow link they overtake: what is held follows what came in the order of the tasks."""
    mixed = replace(WORLD, photos=(Photo(400, 200, 20_000), PHOTO) * 50, link_bytes_per_s=1e6, ack_wait_s=40.0)
    generous = replace(FEED, downloads=32, in_hand=100)
    assert simulate(mixed, generous).expired > 0
    assert simulate(mixed, generous, arrivals=ArrivalWatch(LeaseTerms(40.0))).expired == 0


def test_a_probe_measures_two_images_and_sights_what_arrived_meanwhile() -> None:
    """The first downloads pay for their connections, the later ones do not."""
    seen, downloads = probe(replace(WORLD, warm_up_s=2.0), 10)
    assert [one.images for one in seen] == [1, 1]
    assert seen[0].inference_s > 2.0 > seen[1].inference_s
    assert 2 < len(downloads) <= 10
    assert downloads[-1].download_s < downloads[0].download_s == seen[0].download_s


def test_an_ingest_of_constants_takes_the_memory_that_was_measured() -> None:
    """RESULTS.md: 4096 x 2160, batches of 4, 2 loaders: 7.0 images/s with 3.0 GB; 24 and 4 loaders: 16 GB and more."""
    photo = Photo(4096, 2160, 1_600_000)
    world = World((photo,) * 96, 60e9, 0.05, 0.0, 0.04, 2, 20_000_000_000, 300.0, connection_bytes_per_s=60e6)
    small = simulate_loaders(world, 4, 4, 2, pinned=False)
    assert small.images_per_s == pytest.approx(7.0, rel=0.25)
    assert small.peak_bytes == pytest.approx(3.0e9, rel=0.25)
    assert simulate_loaders(world, 24, 4, 4, pinned=False).peak_bytes > 14e9
