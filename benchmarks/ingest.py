"""What ingest costs and whether it stays in its memory: real workers under kernel limits, held against a roofline.

    python benchmarks/ingest.py [scenario …] [--images-scale 0.1]

Writes a section of RESULTS.md, and plots; a scaled run only prints, and leaves its plots in --work.
Prints ratios and verdicts; never fails by seconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adc_worker.runtime.supervisor import CHILD_ENVIRONMENT
from benchmarks.support import costs, report
from benchmarks.support.cgroup import enclose
from benchmarks.support.costs import ImageCosts
from benchmarks.support.image_host import BYTES_PER_S, LATENCY_S, ImageHost
from benchmarks.support.photographs import Photographs
from benchmarks.support.plots import draw_run
from benchmarks.support.report import mb
from benchmarks.support.scenarios import SCENARIOS, Scenario
from benchmarks.support.session import (
    BASELINE,
    DECODING_IN_PROCESSES,
    WORKER,
    CpuUse,
    Flow,
    Session,
    census,
    flow,
    session,
)

GPU_S = SCENARIOS[0].gpu_s  # of all rows but those that say otherwise
SECTION, FLATNESS = "ingest", "many-jobs"
SECONDS_PER_IMAGE_MAX, START_S_MAX = 3.0, 120.0  # a run that takes longer is ended and counts as not done
SMALL_JOBS, SMALL_JOB_IMAGES, FIRST_JOB_IMAGES = 20, 20, 1000
FLATNESS_LIMIT_BYTES = 1_500_000_000
FLAT_BYTES, FLAT_COUNT = 25_000_000, 2  # what a count of a quiet worker may differ by

COMPARED = (("typical", "today-best"), ("quick-gpu", "today-quick-gpu"), ("large", "today-best-large"))

HEAD = (
    "scenario", "limit", "done / lost / failed", "peak anon+shmem", "of limit", "peak with page cache", "OOM kills",
    "images/s", "of roofline", "of what others left", "must reach", "reached",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a scenario."""

    scenario: Scenario
    total: int
    done: int
    failed: int
    exit_code: int | None
    peak_bytes: int
    max_usage_bytes: int | None
    oom_kills: int | None
    flow: Flow
    roofline: float
    new_plan_after: int | None  # batches of the changed images that came before their plan
    cpu: CpuUse | None
    roofline_left: float  # with the cores that others did not take

    @property
    def lost(self) -> int:
        return self.total - self.done - self.failed

    @property
    def roofline_share(self) -> float:
        return self.flow.images_per_s / self.roofline

    @property
    def reached(self) -> bool:
        """Whether the scenario has what it must reach."""
        wanted = self.scenario
        return (
            self.done == self.total
            and self.exit_code == 0
            and not self.oom_kills
            and self.peak_bytes <= (wanted.peak_share or 1.0) * wanted.limit_bytes
            and self.roofline_share >= (wanted.roofline_share or 0.0)
            and (wanted.replan_after is None or (self.new_plan_after is not None and self.new_plan_after <= 2))
        )

    def cells(self) -> list[str]:
        wanted = self.scenario
        verdict = "-" if wanted.program == "baseline" else "yes" if self.reached else "**no**"
        return [
            f"`{wanted.name}`: {wanted.title}",
            mb(wanted.limit_bytes),
            f"{self.done} / {self.lost} / {self.failed}",
            mb(self.peak_bytes),
            f"{self.peak_bytes / wanted.limit_bytes:.0%}",
            "-" if self.max_usage_bytes is None else mb(self.max_usage_bytes),
            "-" if self.oom_kills is None else str(self.oom_kills),
            f"{self.flow.images_per_s:.2f}",
            f"{self.roofline_share:.0%}",
            f"{self.flow.images_per_s / max(self.roofline_left, 1e-9):.0%}",
            wanted.must,
            verdict,
        ]


@dataclass(slots=True)
class Bench:
    """Runs scenarios against one image host and keeps what came of them."""

    photographs: Photographs
    host: ImageHost
    data: Path
    scaled: Callable[[int], int]
    plot_folder: Path
    costs: dict[str, ImageCosts] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    flatness: str | None = None

    def run(self, scenario: Scenario) -> Outcome:
        """Run a scenario to its end, draw it, and keep its outcome."""
        names = scenario.images(self.photographs, self.scaled)
        cost = costs.mean([self._cost(self.photographs.kind(name)) for name in names])
        roofline = cost.roofline(scenario.gpu_s)
        with tempfile.TemporaryDirectory(dir=self.data) as data, session(scenario.limit_bytes, Path(data)) as running:
            job_id = running.server.add_job("simulated", self.host.urls(names))
            running.start(*_command(scenario, running, job_id))
            exit_code = running.wait(START_S_MAX + SECONDS_PER_IMAGE_MAX * len(names))
            view = running.saved(job_id)
            running.finish()
            _keep_log(self.data, scenario.name, running)
            batches, plans = running.events("batch"), running.events("plan")
            window = flow(batches, plans[-1]["prefetch_factor"] + 2 if plans else 0)
            cpu = running.samples.cpu_of(window)
            outcome = Outcome(
                scenario=scenario,
                total=len(names),
                done=len(view.results),
                failed=len(view.errors),
                exit_code=exit_code,
                peak_bytes=running.samples.peak_bytes,
                max_usage_bytes=running.max_usage_bytes,
                oom_kills=running.oom_kills,
                flow=window,
                roofline=roofline,
                new_plan_after=_batches_before_new_plan(scenario, running, len(names)),
                cpu=cpu,
                roofline_left=cost.roofline(scenario.gpu_s, cpu.cores_taken if cpu else 0.0),
            )
            self._draw(scenario.name, scenario.title, running, scenario.limit_bytes, roofline)
        self.outcomes.append(outcome)
        return outcome

    def run_many_jobs(self) -> str:
        """Run a long job and many short ones in one worker; say how its memory, files and threads went."""
        sizes = [self.scaled(FIRST_JOB_IMAGES), *[SMALL_JOB_IMAGES] * SMALL_JOBS]
        counts: list[Counter[str]] = []
        with tempfile.TemporaryDirectory(dir=self.data) as data, session(FLATNESS_LIMIT_BYTES, Path(data)) as running:
            running.start(WORKER, _settings(SCENARIOS[0]))
            for number, size in enumerate(sizes):
                urls = self.host.urls(self.photographs.names("typical", size))
                running.server.add_job("simulated", urls)
                deadline = time.monotonic() + START_S_MAX + SECONDS_PER_IMAGE_MAX * size
                while len(running.events("job_summary")) <= number and time.monotonic() < deadline:
                    time.sleep(0.2)
                time.sleep(1.0)  # the loader's threads and the arena go
                count = census(running.enclosure.pids())
                count["held_bytes"] = running.enclosure.held_bytes()
                counts.append(count)
            summaries = running.events("job_summary")
            assert running.process is not None
            os.killpg(running.process.pid, signal.SIGTERM)
            exit_code = running.wait(START_S_MAX)
            running.finish()
            _keep_log(self.data, FLATNESS, running)
            title = f"{sizes[0]} typical, then {SMALL_JOBS} jobs of {SMALL_JOB_IMAGES}"
            self._draw(FLATNESS, title, running, FLATNESS_LIMIT_BYTES, None)
        third, worst = counts[2], {name: max(count[name] for count in counts[3:]) for name in counts[0]}
        flat = worst["held_bytes"] - third["held_bytes"] <= FLAT_BYTES and all(
            worst[name] - third[name] <= FLAT_COUNT for name in ("files", "threads", "processes")
        )
        done = sum(summary["done"] for summary in summaries)
        rows = [
            [moment, mb(count["held_bytes"]), count["files"], count["threads"], count["processes"]]
            for moment, count in (
                (f"after job 1 ({sizes[0]} images)", counts[0]), ("after job 3", third),
                ("largest of jobs 4 to 21", worst), ("after job 21", counts[-1]),
            )
        ]  # fmt: skip
        self.flatness = (
            report.table(["quiet worker", "anon+shmem", "open files", "threads", "processes"], rows)
            + f"\n\n{done} of {sum(sizes)} images done, exit code {exit_code}. Flat after the third job"
            f" (+{mb(FLAT_BYTES)}, +{FLAT_COUNT}): {'yes' if flat and done == sum(sizes) else '**no**'}."
        )
        return self.flatness

    def _draw(self, name: str, title: str, running: Session, limit_bytes: int, roofline: float | None) -> None:
        file = self.plot_folder / f"{SECTION}-{name}.png"
        draw_run(file, title, running.samples, limit_bytes, running.events("batch"), running.events("plan"), roofline)
        self.plots.append(file.name)

    def _cost(self, kind: str) -> ImageCosts:
        if kind not in self.costs:
            self.costs[kind] = costs.measure(kind, self.photographs, self.host, self.data)
            print(f"# {_cost_sentence(kind, self.costs[kind])}", flush=True)
        return self.costs[kind]

    def against_today(self) -> str:
        """Compare with the ingest of today, from the rows of this run."""
        by_name = {outcome.scenario.name: outcome for outcome in self.outcomes}
        sentences = []
        for ours, todays in (
            ("typical", "today-best"),
            ("quick-gpu", "today-quick-gpu"),
            ("large", "today-best-large"),
        ):
            if ours in by_name and todays in by_name and by_name[todays].done == by_name[todays].total:
                us, them = by_name[ours], by_name[todays]
                faster, share = us.flow.images_per_s / them.flow.images_per_s, us.peak_bytes / them.peak_bytes
                sentences.append(
                    f"* `{ours}` is {faster:.1f} times as fast as `{todays}` with {share:.2f} of its memory"
                    f" (wanted: ≥ 5 times, ≤ 0.20): {'yes' if faster >= 5 and share <= 0.2 else '**no**'}"
                )
        return "\n".join(sentences)


def _settings(scenario: Scenario) -> dict[str, str]:
    return {"AMI_SIMULATED_SECONDS_PER_IMAGE": str(scenario.gpu_s), **scenario.settings}


def _command(scenario: Scenario, running: Session, job_id: int) -> tuple[list[str], Mapping[str, str]]:
    if scenario.program == "baseline":
        job_url = f"{running.server.api_url}/jobs/{job_id}/"
        return [*BASELINE, running.server.token, job_url, "--gpu-s", str(scenario.gpu_s), *scenario.arguments], {}
    if scenario.program == "processes":
        return DECODING_IN_PROCESSES, _settings(scenario) | CHILD_ENVIRONMENT
    return [*WORKER, "--exit-when-idle"], _settings(scenario)


def _batches_before_new_plan(scenario: Scenario, running: Session, total: int) -> int | None:
    """Count the batches of changed images that came out before the first plan made after the change was staged."""
    plans = running.events("plan")
    if scenario.replan_after is None or len(plans) < 2:
        return None
    seen, changed = 2, 0  # the probe's two are in no batch
    for batch in running.events("batch"):
        if batch["at_s"] > plans[1]["at_s"]:
            break
        seen += batch["images"]
        changed += seen > scenario.replan_after * total
    return changed


def _cost_sentence(kind: str, cost: ImageCosts) -> str:
    return (
        f"{kind}: decode {1e3 * cost.decode_s:.0f} ms + download {1e3 * cost.download_s:.0f} ms"
        f" + serve {1e3 * cost.serve_s:.0f} ms CPU an image: roofline {cost.roofline(GPU_S):.2f} images/s"
    )


def _keep_log(folder: Path, name: str, running: Session) -> None:
    (folder / f"{name}.log").write_text("\n".join(running.lines))


def _section(bench: Bench, kind: str) -> str:
    """Return the Markdown of this run."""
    parts = [
        "## Ingest (`benchmarks/ingest.py`)",
        f"{time.strftime('%Y-%m-%d')}, commit {report.commit()}, {report.machine()}. Limits by: {kind}.",
        (
            f"A GPU played by a sleep of {1e3 * GPU_S:.0f} ms an image, but where a row says otherwise;"
            f" images from a host with {1e3 * LATENCY_S:.0f} ms latency and {BYTES_PER_S / 1e6:.0f} MB/s per"
            " connection, outside the limit, on the same cores. Results are saved at once. One run each: figures of"
            " different runs do not compare, those of one do."
        ),
        "\n".join(f"* {_cost_sentence(*entry)}" for entry in bench.costs.items()),
    ]
    if bench.outcomes:
        parts += [report.table(HEAD, [outcome.cells() for outcome in bench.outcomes]), bench.against_today()]
        parts += ["CPU while every stage had work:", "\n".join(_cpu_lines(bench))]
    if bench.flatness:
        parts += [f"### {FIRST_JOB_IMAGES} typical in one worker, then {SMALL_JOBS} jobs", bench.flatness]
    parts += ["\n".join(f"![{plot}](plots/{plot})" for plot in bench.plots), CAVEATS]
    return "\n\n".join(part for part in parts if part)


def _cpu_lines(bench: Bench) -> list[str]:
    return [f"* `{outcome.scenario.name}`: {outcome.cpu}" for outcome in bench.outcomes if outcome.cpu]


CAVEATS = """Caveats:

* Rates run from the first batch out to the last admitted, taken as the batch after which one arena's worth was to come.
  What was downloaded before the first batch is not paid for inside that time: short runs flatter.
* The roofline is CPU time alone. "Of what others left" holds the rate against the roofline of the cores that other
  programs of this machine, writing back to disk included, did not take at that time; the verdict does not use it.
* `processes-…` rows run the child below a shell instead of `ami worker`: their base lacks that parent, some 50 MB.
* Memory is sampled every 50 ms; the peak with page cache is the kernel's own."""


def main() -> None:
    """Run the scenarios that are named, or all."""
    names = [*(scenario.name for scenario in SCENARIOS), FLATNESS]
    parser = argparse.ArgumentParser(description="Ingest under memory limits, against a roofline.")
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=", ".join(names))
    parser.add_argument("--images-scale", type=float, default=1.0, help="shrink the jobs, for trying out")
    parser.add_argument("--work", type=Path, help="keep generated images and logs here instead of removing them")
    arguments = parser.parse_args()
    wanted = arguments.scenarios or names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    for number in (signal.SIGINT, signal.SIGTERM):  # both unwind: no cgroup, process or file may be left
        signal.signal(number, signal.default_int_handler)
    with enclose(1 << 30) as trial:
        kind = trial.kind
    print(f"# {report.machine()}\n# commit {report.commit()}; limits by: {kind}; load {os.getloadavg()[0]:.2f}")
    # /var/tmp: /tmp may be memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="adc-bench-") as folder:
        data = arguments.work or Path(folder)
        photographs = Photographs(data / "photographs")
        with ImageHost(photographs.folder) as host:
            scale = arguments.images_scale
            bench = Bench(
                photographs,
                host,
                data,
                lambda count: max(SMALL_JOB_IMAGES, round(count * scale)),
                report.PLOTS if scale == 1 else data / "plots",
            )
            print(report.row(HEAD), flush=True)
            for scenario in SCENARIOS:
                if scenario.name in wanted:
                    outcome = bench.run(scenario)
                    print(f"{report.row(outcome.cells())}\n# {outcome.cpu}", flush=True)
            if FLATNESS in wanted:
                print(bench.run_many_jobs(), flush=True)
            print(bench.against_today())
            if scale == 1:
                report.write_section(SECTION, _section(bench, kind))


if __name__ == "__main__":
    main()
