"""How far our plans are from the best ones, over hundreds of made-up machines, links and jobs.

    python benchmarks/policy_regret.py [--scenarios 200] [--first 20000] [--images 6000] [--worst 0]

Simulated by `support/simulator.py`, which knows nothing of the policy. Writes a section of RESULTS.md; other scenarios
only print: whoever changes the policy looks at those from 0 on, and the published ones stay unseen.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

from adc_worker.antenna.leases import ArrivalWatch, LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.planning.ceilings import Ceilings
from adc_worker.planning.governor import Governor
from adc_worker.planning.measurements import ImageProbe, ProbeReport, Sighting, at_once
from adc_worker.planning.observation import Observation
from adc_worker.planning.plan import IngestPlan
from adc_worker.planning.policy import IngestPolicy
from adc_worker.runtime.intake import IntakeLimits
from benchmarks.grid import ranking
from benchmarks.support import report
from benchmarks.support.simulator import (
    Feed,
    Outcome,
    Photo,
    Seen,
    World,
    probe,
    simulate,
    simulate_loaders,
)

SECTION = "policy-regret"
SCENARIOS, FIRST, IMAGES, SHORT_IMAGES = 200, 20_000, 6000, 150
JOB_S = (
    60.0  # a job has images for as long, between these numbers; the grid is run on short ones, its best on the whole
)
FINALISTS = 6
OLD_BATCH, OLD_PREFETCH, OLD_LOADERS, SMALL_BATCH = 24, 4, 4, 4
WAYS = ("plan after the probe", "plan after adaptation", "old constants (24, prefetch 4, 4 loaders, pinned)",
        "batch 4, prefetch 4, 1 loader, unpinned")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one scenario: the best of the grid, and of every way images/s, out of memory, expired leases."""

    number: int
    world: World
    best: float
    best_feed: Feed
    ways: dict[str, tuple[float, bool, int]]

    def regret(self, way: str) -> float:
        rate, out_of_memory, _expired = self.ways[way]
        return 1.0 if out_of_memory else max(0.0, 1.0 - rate / self.best)


def _log_uniform(draw: random.Random, low: float, high: float) -> float:
    return math.exp(draw.uniform(math.log(low), math.log(high)))


def _photo(draw: random.Random) -> Photo:
    px = _log_uniform(draw, 0.1e6, 100e6)
    width = int(math.sqrt(px * draw.choice((4 / 3, 16 / 9))))
    # 0.19 bytes a pixel are a dark trap photograph's, 2.2 those of the incident; a progressive one costs three decodes.
    size = int(px * _log_uniform(draw, 0.1, 2.3))
    return Photo(width, int(px / width), size, draw.choice((1.0, 1.0, 1.0, 3.0)))


def world_of(number: int, images: int) -> World:
    """Return scenario `number`: one that some plan can work off within memory and lease, drawn from its number."""
    draw = random.Random(number)  # noqa: S311 (a seed, no secret)
    while True:
        kinds = [_photo(draw) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        world = World(
            photos=tuple(draw.choice(kinds) for _ in range(images)),
            link_bytes_per_s=_log_uniform(draw, 0.5e6, 1000e6),
            latency_s=_log_uniform(draw, 0.001, 0.5),
            failure_share=draw.choice((0.0, draw.uniform(0, 0.05))),
            inference_s=_log_uniform(draw, 0.002, 2.0),
            cores=round(_log_uniform(draw, 1, 64)),
            memory_bytes=int(_log_uniform(draw, 1e9, 128e9)),
            ack_wait_s=draw.uniform(30, 600),
            seed=number,
            warm_up_s=draw.uniform(0, 3),
            inference_bytes_per_px=draw.uniform(0, 6),
            batch_s=draw.uniform(0.0005, 0.003),
        )
        largest = max(kinds, key=lambda photo: photo.px)
        alone = simulate(replace(world, photos=(largest,)), _feed(world, (1, 1, 1, 1), 1))
        if not alone.out_of_memory and alone.wall_s < world.ack_wait_s / 4:
            wanted = min(images, max(SHORT_IMAGES, round(JOB_S * world.roofline)))
            return replace(world, photos=world.photos[:wanted])


def _feed(world: World, knobs: tuple[int, int, int, int], ahead: int) -> Feed:
    """Return a point of the grid; what is not on it is given generously."""
    batch, prefetch, workers, downloads = knobs
    place = max(photo.pixel_bytes for photo in world.photos)
    in_hand = max(1, ahead + batch * (prefetch + 2) if ahead > 1 else 1)
    return Feed(
        batch_size=batch,
        batch_bytes=batch * place,
        prefetch=prefetch,
        decode_workers=workers,
        arena_bytes=batch * (prefetch + 2) * place,
        scratch_bytes=1 << 50,
        downloads=downloads,
        in_hand=in_hand,
        fetch_size=min(64, in_hand),
        held_limit=10_000,
        batch_wait_s=batch * world.inference_s,
    )


def grid(world: World) -> Iterator[Feed]:
    """Yield every plan that ours are held against."""
    workers = sorted({1, max(1, world.cores // 2), world.cores})
    for batch, prefetch, decoders, downloads, ahead in product((1, 4, 24), (1, 4), workers, (4, 32), (4, 32, 96)):
        yield _feed(world, (batch, prefetch, decoders, downloads), ahead)


def feed_of(plan: IngestPlan) -> Feed:
    limits = IntakeLimits.of(plan)
    return Feed(
        batch_size=plan.batch_size,
        batch_bytes=plan.batch_bytes,
        prefetch=plan.prefetch_factor,
        decode_workers=plan.decode_workers,
        arena_bytes=plan.arena_bytes,
        scratch_bytes=plan.scratch_bytes,
        downloads=limits.downloads,
        in_hand=limits.in_hand,
        fetch_size=limits.fetch_size,
        held_limit=limits.held,
        batch_wait_s=plan.batch_wait_s,
    )


def probed(seen: Seen) -> ImageProbe:
    photo = seen.photo
    return ImageProbe(
        compressed_bytes=photo.compressed_bytes,
        width_px=photo.width_px,
        height_px=photo.height_px,
        decode_scratch_bytes=photo.scratch_bytes,
        first_byte_s=seen.first_byte_s,
        download_s=seen.download_s,
        decode_s=seen.decode_s,
        inference_s=seen.inference_s,
        keep_s=seen.keep_s,
    )


def host_of(world: World) -> HostBudget:
    return HostBudget(
        world.memory_bytes, "simulated", world.memory_bytes - world.base_bytes, world.base_bytes, world.cores,
        100_000_000_000, 65_536,
    )  # fmt: skip


def plan_for(world: World, lease: LeaseTerms) -> tuple[IngestPlan, ProbeReport]:
    seen, downloads = probe(world, IntakeLimits.for_probe(Ceilings(), lease).in_hand)
    sightings = [
        Sighting(one.photo.width_px, one.photo.height_px, one.photo.compressed_bytes, one.photo.scratch_bytes,
                 one.first_byte_s - one.set_up_s, one.download_s - one.set_up_s) for one in downloads
    ]  # fmt: skip
    measured = ProbeReport(
        tuple(
            replace(probed(one), first_byte_s=sighting.first_byte_s, download_s=sighting.download_s)
            for one, sighting in zip(seen, sightings[: len(seen)], strict=True)
        ),
        world.base_bytes,
        max(world.inference_bytes([one.photo]) for one in seen),
        downloads=at_once((one.staged_s, one.download_s - one.first_byte_s) for one in downloads),
    )
    measured = ProbeReport.of(measured, sightings[len(seen) :], [])
    return IngestPolicy().plan(measured, host_of(world), lease), measured


def best_of(world: World) -> tuple[float, Feed] | None:
    """Return images/s of the best plan of the grid, and the plan; None where none is allowed.

    Allowed is what keeps its leases and the part of the memory that plans may take: the rest is for what comes.
    """

    def kept(outcome: Outcome) -> bool:
        return outcome.peak_bytes <= Ceilings().soft_cap * world.memory_bytes and not outcome.expired

    short = replace(world, photos=world.photos[:SHORT_IMAGES])
    tried = [(outcome, feed) for feed in grid(world) if kept(outcome := simulate(short, feed))]
    by_whole = sorted(tried, key=lambda one: -one[0].images_per_s)
    by_steady = sorted(tried, key=lambda one: -one[0].steady_per_s)
    ranked = [feed for pair in zip(by_whole, by_steady, strict=True) for _outcome, feed in pair]
    best: tuple[float, Feed] | None = None
    for number, feed in enumerate(dict.fromkeys(ranked)):
        if number >= FINALISTS and best is not None:
            break
        outcome = simulate(world, feed)
        if kept(outcome) and (best is None or outcome.images_per_s > best[0]):
            best = outcome.images_per_s, feed
    return best


def adapting(world: World, governor: Governor, lease: LeaseTerms) -> Outcome:
    """Work a job off as the governor says."""
    host = host_of(world)

    def control(seen: Seen) -> Feed:
        now = replace(host, used_bytes=seen.memory_bytes, available_bytes=world.memory_bytes - seen.memory_bytes)
        shown = Observation(
            probed(seen), seen.images, seen.elapsed_s, seen.ready, now, seen.arena_bytes, 0.0,
            in_force=True,
        )  # fmt: skip
        return feed_of(governor.observe(shown).plan)

    return simulate(world, feed_of(governor.plan), control, ArrivalWatch(lease))


def run(number: int, images: int) -> Result | None:
    """Run one scenario in every way; None where the grid has no plan that is allowed."""
    world = world_of(number, images)
    best = best_of(world)
    if best is None:
        return None
    lease = LeaseTerms(world.ack_wait_s)
    plan, measured = plan_for(world, lease)
    governor = Governor(IngestPolicy(), measured, host_of(world), lease)
    outcomes = (
        simulate(world, feed_of(plan), arrivals=ArrivalWatch(lease)),
        adapting(world, governor, lease),
        simulate_loaders(world, OLD_BATCH, OLD_PREFETCH, OLD_LOADERS, pinned=True),
        simulate_loaders(world, SMALL_BATCH, OLD_PREFETCH, 1, pinned=False),
    )
    ways = {way: (one.images_per_s, one.out_of_memory, one.expired) for way, one in zip(WAYS, outcomes, strict=True)}
    return Result(number, world, best[0], best[1], ways)


def section(results: Sequence[Result], infeasible: int) -> str:
    """Return the Markdown of a run."""
    rows = []
    for way in WAYS:
        regrets = sorted(result.regret(way) for result in results)
        rows.append([
            way, f"{statistics.median(regrets):.1%}", f"{regrets[int(0.95 * len(regrets))]:.1%}", f"{regrets[-1]:.1%}",
            sum(result.ways[way][1] for result in results), sum(result.ways[way][2] > 0 for result in results),
        ])  # fmt: skip
    worst = max(results, key=lambda result: result.regret(WAYS[1]))
    return f"""## Regret of our plans, simulated (`benchmarks/policy_regret.py`)

Commit {report.commit()}, {report.machine()}.

Scenarios {min(result.number for result in results)} to {max(result.number for result in results)}, of which
{len(results)} are possible: image size 0.1-100 Mpx and mixes, link 0.5-1000 MB/s and 1-500 ms, 0-5 % failing
downloads, inference 2 ms-2 s, memory 1-128 GB, 1-64 cores, leases of 30-600 s ({infeasible} more have no plan in the
grid that keeps memory and leases). Regret: what a whole job's images/s, its start included, lack to those of the best
plan of a grid that was chosen with every image known. An ingest that runs out of memory has a regret of 100 %.
{ranking()}

{report.table(("way", "median", "p95", "worst", "out of memory", "jobs with an expired lease"), rows)}

The worst after adaptation is scenario {worst.number}: {worst.ways[WAYS[1]][0]:.2f} images/s of {worst.best:.2f};
{_described(worst.world)}."""


def _described(world: World) -> str:
    sizes = sorted({round(photo.px / 1e6, 1) for photo in world.photos})
    return (
        f"{sizes} Mpx, link {world.link_bytes_per_s / 1e6:.1f} MB/s and {1e3 * world.latency_s:.0f} ms, inference"
        f" {1e3 * world.inference_s:.0f} ms, {world.cores} cores, {world.memory_bytes / 1e9:.1f} GB,"
        f" lease {world.ack_wait_s:.0f} s, {len(world.photos)} images"
    )


def main() -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description="Regret of our plans against a grid, simulated.")
    parser.add_argument("--scenarios", type=int, default=SCENARIOS)
    parser.add_argument("--first", type=int, default=FIRST, help="number of the first scenario")
    parser.add_argument("--images", type=int, default=IMAGES, help="most images of a job")
    parser.add_argument("--worst", type=int, default=0, help="print so many of the worst scenarios")
    arguments = parser.parse_args()
    started = time.monotonic()
    numbers = range(arguments.first, arguments.first + arguments.scenarios)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        found = list(workers.map(run, numbers, [arguments.images] * len(numbers)))
    results = [result for result in found if result is not None]
    text = section(results, len(found) - len(results))
    for result in sorted(results, key=lambda one: -one.regret(WAYS[1]))[: arguments.worst]:
        print(result.number, [f"{result.regret(way):.3f}" for way in WAYS], _described(result.world), result.best_feed)
    for result in results if arguments.worst else ():
        if result.ways[WAYS[1]][2]:
            print(f"{result.number} has {result.ways[WAYS[1]][2]} expired leases; {_described(result.world)}")
    print(f"{text}\n# {time.monotonic() - started:.0f} s")
    if (arguments.scenarios, arguments.first, arguments.images) == (SCENARIOS, FIRST, IMAGES):
        report.write_section(SECTION, text)


if __name__ == "__main__":
    main()
