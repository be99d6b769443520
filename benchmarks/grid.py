"""Our plan against a dozen others, for real on this box, and whether the simulation ranks them as reality does.

    python benchmarks/grid.py [scenario …] [--images-scale 0.3] [--again]

One worker per scenario works off a job per plan, so that no plan pays for a start, and that some times over: of each
plan the quickest job counts, since whatever else a machine does slows one. What the jobs of a plan differ by is noise:
only plans can be ranked of which each job of the one was quicker than each of the other. What was measured goes to
`grid.json`; --again ranks it by a simulation that changed since. Writes a section of RESULTS.md, in which scenarios
that are not named stay as they were measured last; a scaled run only prints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, permutations, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.support import costs, report
from benchmarks.support.image_host import BYTES_PER_S, LATENCY_S, ImageHost
from benchmarks.support.photographs import KINDS, Photographs
from benchmarks.support.session import Flow, Session, simulated_worker
from benchmarks.support.simulator import Feed, Photo, World, simulate

SECTION, LIMIT_BYTES, RUN_S_MAX = "grid", 4_000_000_000, 80.0
MEASURED = Path(__file__).with_suffix(".json")
STAGED_AHEAD, FETCH_SIZE = 64, 32  # what no plan of the grid is short of
BATCH_S = 0.001  # where no batch was ready
TIE = 0.001  # of simulated rates: what a batch more or less in the measured stretch makes
ALIKE = 0.02  # plans are alike whose quickest jobs differ by less
# What 12 plans differ in: images a batch, batches ahead, decode workers and downloads at once.
PLANS = [
    {"batch_size": batch, "prefetch_factor": prefetch, "decode_workers": workers, "download_concurrency": downloads}
    for batch, prefetch, (workers, downloads) in product((1, 4, 12), (1, 4), ((1, 2), (2, 8)))
]
OURS: dict[str, int] = {}
HEAD = (
    "scenario", "jobs a plan", "ours", "images/s (lowest)", "best of 12", "images/s", "ours / best", "noise",
    "peak of ours", "Kendall tau (pairs)", "taken by others, cores", "reached",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """A job on a link, with a GPU played by a sleep; `rounds`: how often each plan works it off."""

    name: str
    kind: str
    images: int
    gpu_s: float
    slower: float = 1.0
    rounds: int = 2


SCENARIOS = (
    Scenario("typical-fast", "typical", 140, 0.02),
    Scenario("typical-slow", "typical", 32, 0.02, slower=10.0),
    Scenario("large", "large", 64, 0.04, rounds=4),
    Scenario("tiny", "tiny", 400, 0.003),
)


@dataclass(frozen=True, slots=True)
class Run:
    """What one job brought, from its plan to its last batch: no stretch of it is the same for all plans.

    Attributes:
        batch_images: mean of a batch.
        written_bytes: memory that was written to for the first time.
        cpu_s: CPU seconds per image, of worker and servers; None in runs too short to tell.
        batch_s: seconds between batches that were ready, beside their inference and keeping; None where none was.
        keep_s: seconds to keep an image's result.
    """

    plan: Mapping[str, int]
    images_per_s: float
    peak_bytes: int
    cores_taken: float
    batch_images: float
    written_bytes: int
    cpu_s: float | None
    batch_s: float | None
    keep_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What one scenario was measured to be.

    Attributes:
        where: when, and at which commit.
        decode_s: CPU seconds of a decode, on one thread.
        cores_together: what decodes on all cores bring, compared to one alone.
        runs: ours and those of the twelve plans, round by round.
    """

    scenario: Scenario
    where: str
    compressed_bytes: int
    decode_s: float
    cores_together: float
    touch_s_per_byte: float
    runs: Sequence[Run]

    @property
    def by_plan(self) -> list[list[Run]]:
        """The runs of each plan, ours first; the slowest first."""
        each = 1 + len(PLANS)
        return [sorted(self.runs[number::each], key=lambda run: run.images_per_s) for number in range(each)]

    @property
    def ours(self) -> list[Run]:
        return self.by_plan[0]

    @property
    def rates(self) -> list[float]:
        """Images/s of the twelve plans."""
        return [runs[-1].images_per_s for runs in self.by_plan[1:]]

    @property
    def noise(self) -> float:
        """By how much the second of a plan's runs is usually slower than the quickest."""
        return median(1 - runs[-2].images_per_s / runs[-1].images_per_s for runs in self.by_plan)

    @property
    def simulated(self) -> list[float]:
        world = _world(self)
        return [simulate(world, _feed(plan, world)).images_per_s for plan in PLANS]

    @property
    def tau(self) -> tuple[float, int]:
        jobs = [[run.images_per_s for run in runs] for runs in self.by_plan[1:]]
        return kendall_tau(jobs, self.simulated)


def main() -> None:
    """Run the scenarios that are named, or all."""
    parser = argparse.ArgumentParser(description="Our plan against twelve others, for real.")
    parser.add_argument("scenarios", nargs="*", help=", ".join(scenario.name for scenario in SCENARIOS))
    parser.add_argument("--images-scale", type=float, default=1.0)
    parser.add_argument("--again", action="store_true", help="only simulate again what was measured last")
    arguments = parser.parse_args()
    chosen = [one for one in SCENARIOS if not arguments.scenarios or one.name in arguments.scenarios]
    measured = [] if arguments.again else _measure(chosen, arguments.images_scale)
    if arguments.images_scale != 1:
        print(_section(measured))
        return
    names, new = [one.name for one in SCENARIOS], {one.scenario.name for one in measured}
    kept = [one for one in (load() if MEASURED.exists() else []) if one.scenario.name not in new]
    measured = sorted([*measured, *kept], key=lambda one: names.index(one.scenario.name))
    text = json.dumps([asdict(one) for one in measured])
    MEASURED.write_text(text.replace('{"plan"', '\n{"plan"').replace('{"scenario"', '\n{"scenario"') + "\n")
    text = _section(measured)
    print(text)
    report.write_section(SECTION, text)


def load() -> list[Measured]:
    """Return what was measured last of each scenario."""
    return [
        Measured(**one | {"scenario": Scenario(**one["scenario"]), "runs": [Run(**run) for run in one["runs"]]})
        for one in json.loads(MEASURED.read_text())
    ]


def ranking() -> str:
    """Say how the simulation ranks the plans that were measured last."""
    if not MEASURED.exists():
        return "Whether the simulation ranks plans as reality does is not known: `benchmarks/grid.py` has not been run."
    each = ", ".join(f"{one.scenario.name} {one.tau[0]:.2f}" for one in load())
    return f"Kendall's tau between its ranking of the plans of `benchmarks/grid.py` and reality: {each}."


def _section(measured: Sequence[Measured]) -> str:
    where = " and ".join(dict.fromkeys(one.where for one in measured))
    return f"""## Our plan against twelve others (`benchmarks/grid.py`)

{where}, {report.machine()}. Simulated at commit {report.commit()}.

Limit {report.mb(LIMIT_BYTES)}; images from a host with {1e3 * LATENCY_S:.0f} ms and {BYTES_PER_S / 1e6:.0f} MB/s per
connection (typical-slow: a tenth of that), on the same cores as worker and server; the GPU is a sleep. Images/s from a
job's plan to its last batch, of a plan's quickest job; noise is by how much the next one is usually slower. Kendall's
tau between reality and simulation is over the pairs of plans of which each job of the one was quicker than each of the
other, the quickest by {ALIKE:.0%}; there are {len(PLANS) * (len(PLANS) - 1) // 2} pairs in all. Decodes on all cores
bring {measured[0].cores_together:.2f} times what one brings alone. Plans are written as images a batch/batches
ahead/decode workers/downloads at once.

{report.table(HEAD, map(_row, measured))}

{chr(10).join(map(_detail, measured))}"""


def _row(measured: Measured) -> list[str]:
    ours, rates, (tau, pairs) = measured.ours, measured.rates, measured.tau
    lowest, rate = ours[0].images_per_s, ours[-1].images_per_s
    best = max(range(len(PLANS)), key=rates.__getitem__)
    share, peak = rate / rates[best], max(run.peak_bytes for run in ours)
    reached = share >= 0.95 and peak <= LIMIT_BYTES and tau >= 0.8 and pairs > 0
    return [
        measured.scenario.name, str(len(ours)), " or ".join(dict.fromkeys(_short(run.plan) for run in ours)),
        f"{rate:.2f} ({lowest:.2f})", _short(PLANS[best]), f"{rates[best]:.2f}", f"{share:.0%}",
        f"{measured.noise:.0%}", report.mb(peak), f"{tau:.2f} ({pairs})",
        f"{max(run.cores_taken for run in measured.runs):.2f}", "yes" if reached else "**no**",
    ]  # fmt: skip


def _detail(measured: Measured) -> str:
    rates = zip(PLANS, measured.rates, measured.simulated, strict=True)
    each = ", ".join(f"{_short(plan)}: {one:.1f} ({other:.1f})" for plan, one, other in rates)
    return f"* `{measured.scenario.name}`, images/s (simulated): {each}"


def _measure(scenarios: Sequence[Scenario], images_scale: float) -> list[Measured]:
    found = []
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="adc-grid-") as folder:
        photographs = Photographs(Path(folder) / "photographs")
        with ImageHost(photographs.folder) as host:
            for each in scenarios:
                scenario = replace(each, images=max(16, round(images_scale * each.images)))
                files = [photographs.path(name) for name in photographs.names(scenario.kind, 8)]
                compressed_bytes = sum(file.stat().st_size for file in files) // len(files)
                decode_s, touch_s_per_byte = costs.decode_cpu_s(files), costs.touch_s_per_byte()
                together = costs.cores_together(files)
                host.change(slower=scenario.slower)
                runs = _runs(scenario, photographs, host, Path(folder))
                host.change()
                where = f"{time.strftime('%Y-%m-%d')}, commit {report.commit()}"
                found.append(Measured(scenario, where, compressed_bytes, decode_s, together, touch_s_per_byte, runs))
                print(report.row(_row(found[-1])), _detail(found[-1]), sep="\n", flush=True)
    return found


def _short(plan: Mapping[str, int]) -> str:
    return "/".join(map(str, plan.values()))


def _runs(scenario: Scenario, photographs: Photographs, host: ImageHost, folder: Path) -> list[Run]:
    urls, runs = host.urls(photographs.names(scenario.kind, scenario.images)), []
    with simulated_worker(LIMIT_BYTES, scenario.gpu_s, folder, "plan.json") as (running, (changes,)):
        for plan in (OURS, *scenario.rounds * (OURS, *PLANS)):
            runs.append(_run(running, changes, plan, urls))
            print(f"# {scenario.name} {plan or 'ours'}: {runs[-1]}", file=sys.stderr, flush=True)
    return runs[1:]  # the first one warms the process up


def _run(running: Session, changes: Path, plan: Mapping[str, int], urls: list[str]) -> Run:
    """Work a job off by one plan, or by ours where that says nothing."""
    wanted = {**plan, "staged_ahead": STAGED_AHEAD, "fetch_size": FETCH_SIZE} if plan else {}
    changes.write_text(json.dumps(wanted))
    job_id = running.work_off(urls, RUN_S_MAX)
    batches, plans = running.events("batch", job_id=job_id), running.events("plan", job_id=job_id)
    images = sum(batch["images"] for batch in batches)
    whole = Flow(plans[0]["at_s"], batches[-1]["at_s"], images)
    cpu = running.samples.cpu_of(whole)
    peak = max(held for at_s, held in running.samples.held if plans[0]["at_s"] <= at_s <= batches[-1]["at_s"])
    return Run(
        plan={name: plans[-1][name] for name in PLANS[0]},
        images_per_s=whole.images_per_s,
        peak_bytes=peak,
        cores_taken=cpu.cores_taken if cpu else 0.0,
        batch_images=images / len(batches),
        written_bytes=max(0, peak - plans[0]["base_bytes"]),
        cpu_s=cpu.worker_s_per_image + cpu.serving_s_per_image if cpu else None,
        batch_s=_batch_s(batches),
        keep_s=sum(batch["keep_s"] for batch in batches) / images,
    )


def _batch_s(batches: Sequence[Mapping[str, Any]]) -> float | None:
    beside = [
        later["at_s"] - earlier["at_s"] - later["inference_s"] - later["keep_s"]
        for earlier, later in pairwise(batches)
        if later["observed"]["ready"]
    ]
    return median(beside) if len(beside) > 2 else None


def _world(measured: Measured) -> World:
    """Return the scenario as the simulator sees it: CPU for pixels was measured alone, the rest in quickest runs."""
    scenario, touch_s_per_byte, together = measured.scenario, measured.touch_s_per_byte, measured.cores_together
    runs = [by_plan[-1] for by_plan in measured.by_plan]
    (width, height), *_ = KINDS[scenario.kind]
    plain = Photo(width, height, measured.compressed_bytes)
    photo = replace(plain, cost=measured.decode_s / plain.decode_s)
    told = [(run, _work_s(run.cpu_s, run.images_per_s, together)) for run in runs if run.cpu_s is not None]
    pixels_s = [measured.decode_s + touch_s_per_byte * run.written_bytes / scenario.images for run, _work in told]
    beside_s = [work_s - one_s for (_run, work_s), one_s in zip(told, pixels_s, strict=True)]
    batch_cpu_s, image_cpu_s = np.polyfit([1 / run.batch_images for run, _work in told], beside_s, 1)
    return World(
        photos=(photo,) * scenario.images,
        link_bytes_per_s=1e12,
        connection_bytes_per_s=BYTES_PER_S / scenario.slower,
        latency_s=scenario.slower * LATENCY_S,
        failure_share=0.0,
        inference_s=scenario.gpu_s,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=LIMIT_BYTES,
        ack_wait_s=300.0,
        batch_s=median([run.batch_s for run in runs if run.batch_s is not None] or [BATCH_S]),
        keep_s=median(run.keep_s for run in runs),
        download_cpu_s=0.0,
        image_cpu_s=max(0.0, float(image_cpu_s)),
        batch_cpu_s=max(0.0, float(batch_cpu_s)),
        bytes_per_s_to_device=float("inf"),
        handshake_round_trips=0.0,
        touch_s_per_byte=touch_s_per_byte,
        cores_together=together,
    )


def _work_s(cpu_s: float, images_per_s: float, together: float) -> float:
    """Return the CPU seconds of an image on a core alone: each that is busy beside one adds what all bring together."""
    busy, cores = cpu_s * images_per_s, len(os.sched_getaffinity(0))
    return (min(busy, 1.0) + max(0.0, busy - 1.0) * (together - 1) / max(1, cores - 1)) / images_per_s


def _feed(plan: Mapping[str, int], world: World) -> Feed:
    place = world.photos[0].pixel_bytes
    batch, prefetch = plan["batch_size"], plan["prefetch_factor"]
    arena_bytes = batch * (prefetch + 2) * place
    return Feed(
        batch_size=batch, batch_bytes=batch * place, prefetch=prefetch, decode_workers=plan["decode_workers"],
        arena_bytes=arena_bytes, scratch_bytes=1 << 50, downloads=plan["download_concurrency"],
        in_hand=STAGED_AHEAD + batch * (prefetch + 2), fetch_size=FETCH_SIZE, held_limit=1000,
        batch_wait_s=batch * world.inference_s,
    )  # fmt: skip


def kendall_tau(jobs: Sequence[Sequence[float]], simulated: Sequence[float]) -> tuple[float, int]:
    """Return Kendall's tau over the pairs of plans whose rates do not overlap, and how many those are.

    `jobs` has each plan's rates, lowest first. A pair that is tied in the simulation counts as neither concordant nor
    discordant, as in Kendall's tau-a.
    """
    told = [
        (slower, quicker)
        for slower, quicker in permutations(range(len(jobs)), 2)
        if jobs[slower][-1] < min(jobs[quicker][0], (1 - ALIKE) * jobs[quicker][-1])
    ]
    agree = sum(_order(simulated[slower], simulated[quicker]) for slower, quicker in told)
    return (agree / len(told) if told else 1.0), len(told)


def _order(slower: float, quicker: float) -> int:
    """Return 1 where two values rise as they should, -1 where they fall, 0 where they are tied."""
    return 0 if abs(quicker - slower) <= TIE * max(slower, quicker) else 1 if quicker > slower else -1


if __name__ == "__main__":
    main()
