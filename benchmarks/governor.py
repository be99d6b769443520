"""What the governor does when reality leaves the plan: disturbances beside real workers under kernel limits.

    python benchmarks/governor.py [scenario …] [--seconds 12]

Each scenario has a stretch before its disturbance, one with it and one after it, of --seconds each. Writes a section of
RESULTS.md and plots; another number of seconds, or a choice of scenarios, only prints and leaves its plots in --work.
Prints verdicts; never fails by seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.support import report
from benchmarks.support.image_host import ImageHost
from benchmarks.support.photographs import DISTINCT, Photographs
from benchmarks.support.plots import draw_governed
from benchmarks.support.report import mb
from benchmarks.support.session import WORKER, Companion, Session, session

SECTION, SECONDS = "governor", 12.0
GB = 1_000_000_000
IMAGES = 6000  # more than any scenario comes to: each is ended by a signal
SETTLE_S, START_S_MAX = 3.0, 60.0
BACK_S = 8.0  # until the rate must be back: memory that returns is used after 5 s (`SETTLE_S` of the governor)
RATE_BACK = 0.97
HOG = [sys.executable, str(Path(__file__).parent / "support" / "hog.py")]
LEAKY = {"AMI_EXTRA_PIPELINES": "benchmarks.support.leaky:pipelines", "PYTHONPATH": str(Path(__file__).parents[1])}
FIXED = {"AMI_INGEST_MODE": "fixed", "AMI_ANTENNA_API_BATCH_SIZE": "8"}
ACTIONS = ("grow", "shrink", "replan", "step", "undo", "pause", "resume")
HEAD = (
    "scenario", "limit", "OOM kills", "ended", "done, lost", "peak anon+shmem", "changes with it", "changes after it",
    "images/s before, with, after", "as it must",
)  # fmt: skip


@dataclass(slots=True)
class Stage:
    """What a disturbance can lay hands on."""

    running: Session
    host: ImageHost
    settings: Mapping[str, str]
    companions: list[Companion] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row. `disturb` returns what ends the disturbance; with `rate_back` the rate must be what it was before.

    `disturbances` says how many come at once, and go: each worker that arrives takes its part of the memory.
    """

    name: str
    title: str
    limit_bytes: int
    disturb: Callable[[Stage], Callable[[], None]]
    kind: str = "typical"
    pipeline: str = "simulated"
    settings: Mapping[str, str] = field(default_factory=dict)
    rate_back: bool = True
    new_plans: int = 0
    disturbances: int = 1


def _hog(size_bytes: int, ramp_s: float) -> Callable[[Stage], Callable[[], None]]:
    def disturb(stage: Stage) -> Callable[[], None]:
        hog = stage.running.enclosure.spawn([*HOG, str(size_bytes), str(ramp_s)], dict(os.environ))

        def end() -> None:
            hog.communicate()  # the end of its stdin is what it waits for

        return end

    return disturb


def _slow_link(stage: Stage) -> Callable[[], None]:
    stage.host.change(slower=10)
    return stage.host.change


def _larger(stage: Stage) -> Callable[[], None]:
    stage.host.change(kind="typical")
    return stage.host.change


def _workers(count: int) -> Callable[[Stage], Callable[[], None]]:
    def disturb(stage: Stage) -> Callable[[], None]:
        for _ in range(count):
            stage.companions.append(stage.running.also_start(WORKER, stage.settings))

        def end() -> None:
            for companion in stage.companions:
                companion.process.send_signal(signal.SIGTERM)
            for companion in stage.companions:
                companion.process.wait(START_S_MAX)

        return end

    return disturb


def _nothing(_stage: Stage) -> Callable[[], None]:
    return lambda: None


SCENARIOS = (
    Scenario("hog", "a hog takes 1 GB and frees it", 3 * GB, _hog(GB, 2.0)),
    Scenario("hog-tight", "a hog takes what leaves room for a few images", 1_500_000_000, _hog(800_000_000, 4.0)),
    Scenario("hog-fixed", "a hog takes 1 GB beside fixed mode, which fills its memory", 3 * GB, _hog(GB, 4.0),
             settings=FIXED),
    Scenario("base", "the pipeline keeps 5 MB of every image, 500 MB in all", 1_500_000_000, _nothing, pipeline="leaky",
             settings=LEAKY, rate_back=False),
    Scenario("larger", "images ten times larger and back", 3 * GB, _larger, kind="small", new_plans=2),
    Scenario("link", "a link ten times slower and back", 3 * GB, _slow_link, new_plans=2),
    Scenario("two-workers", "a second worker comes and goes", 3 * GB, _workers(1), settings=FIXED),
    Scenario("four-workers", "three more workers come and go", 3 * GB, _workers(3), settings=FIXED, disturbances=3),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a scenario."""

    scenario: Scenario
    oom_kills: int | None
    exit_codes: list[int | None]
    done: int
    lost: int
    peak_bytes: int
    actions: tuple[list[str], list[str]]  # with the disturbance, after it
    rates: tuple[float, float, float]

    @property
    def as_it_must(self) -> bool:
        """No kill, nothing lost, at most one change per direction and disturbance, and the rate is back."""
        most = self.scenario.disturbances
        calm = all(actions.count(name) <= most for actions in self.actions for name in ("grow", "shrink"))
        plans = sum(actions.count("replan") for actions in self.actions)
        back = not self.scenario.rate_back or self.rates[2] >= RATE_BACK * self.rates[0]
        fine = not self.oom_kills and not self.lost and set(self.exit_codes) == {0}
        return calm and back and fine and plans <= self.scenario.new_plans

    def cells(self) -> list[str]:
        def changes(actions: Sequence[str]) -> str:
            return ", ".join(f"{count} {name}" for name in ACTIONS if (count := actions.count(name))) or "none"

        return [
            f"`{self.scenario.name}`: {self.scenario.title}",
            mb(self.scenario.limit_bytes),
            "-" if self.oom_kills is None else str(self.oom_kills),
            "/".join(map(str, self.exit_codes)),
            f"{self.done}, {self.lost}",
            mb(self.peak_bytes),
            *map(changes, self.actions),
            ", ".join(f"{rate:.1f}" for rate in self.rates),
            "yes" if self.as_it_must else "**no**",
        ]


def run(scenario: Scenario, photographs: Photographs, host: ImageHost, work: Path, seconds: float) -> Outcome:
    """Run a scenario, draw it to `work`/plots, and keep the logs there."""
    photographs.names("typical", DISTINCT)  # drawn before the clock runs
    with tempfile.TemporaryDirectory(dir=work) as data, session(scenario.limit_bytes, Path(data)) as running:
        stage = Stage(running, host, scenario.settings)
        job_id = running.server.add_job(scenario.pipeline, host.urls(photographs.names(scenario.kind, IMAGES)))
        command = [*WORKER[:-1], scenario.pipeline]
        running.start(command, scenario.settings)
        deadline = time.monotonic() + START_S_MAX
        while len(running.events("batch")) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(SETTLE_S)
        start_s = time.time()
        time.sleep(seconds)
        disturbed_s = time.time()
        end = scenario.disturb(stage)
        time.sleep(seconds)
        end()
        ended_s = time.time()
        time.sleep(BACK_S + seconds)
        over_s = time.time()
        assert running.process is not None
        os.killpg(running.process.pid, signal.SIGTERM)
        exit_code = running.wait(START_S_MAX)
        saved = len(running.saved(job_id).results)
        running.finish()
        batches = running.events("batch")
        logs = [running.lines, *(companion.lines for companion in stage.companions)]
        for number, lines in enumerate(logs):
            (work / f"{scenario.name}-{number}.log").write_text("\n".join(lines))
        summaries = [summary for lines in logs for summary in running.events("job_summary", lines)]
        plot = work / "plots" / f"{SECTION}-{scenario.name}.png"
        every = [running.events("batch", lines) for lines in logs]
        draw_governed(plot, scenario.title, running.samples, scenario.limit_bytes, every, (disturbed_s, ended_s))
        return Outcome(
            scenario,
            running.oom_kills,
            [exit_code, *(companion.process.returncode for companion in stage.companions)],
            saved,
            sum(summary["done"] for summary in summaries) - saved,
            running.samples.peak_bytes,
            (_actions(batches, disturbed_s, ended_s), _actions(batches, ended_s, over_s)),
            (
                _rate(batches, start_s, disturbed_s),
                _rate(batches, disturbed_s, ended_s),
                _rate(batches, over_s - seconds, over_s),
            ),
        )


def _actions(batches: Sequence[Mapping[str, Any]], from_s: float, to_s: float) -> list[str]:
    return [batch["action"] for batch in batches if from_s <= batch["at_s"] < to_s and batch["action"] != "hold"]


def _rate(batches: Sequence[Mapping[str, Any]], from_s: float, to_s: float) -> float:
    inside = [batch for batch in batches if from_s <= batch["at_s"] < to_s]
    if len(inside) < 2:
        return 0.0
    images = sum(int(batch["images"]) for batch in inside[1:])
    return images / (float(inside[-1]["at_s"]) - float(inside[0]["at_s"]))


def _section(outcomes: Sequence[Outcome], seconds: float) -> str:
    intro = (
        f"Each run: {seconds:.0f} s undisturbed, as long disturbed, as long after it."
        " A GPU played by a sleep of 40 ms an image, images from a host with 50 ms latency and 60 MB/s per connection."
        " At most one `grow` and one `shrink` for each disturbance that begins or ends (three workers are three), no"
        f" kill, nothing lost; from {BACK_S:.0f} s after its end the rate is held to {RATE_BACK:.0%} of the one before."
        " A `step` goes beyond the plan when the GPU waits, and is undone when it does not help."
    )
    parts = [
        "## The governor (`benchmarks/governor.py`)",
        f"{time.strftime('%Y-%m-%d')}, commit {report.commit()}, {report.machine()}.",
        intro,
        report.table(HEAD, [outcome.cells() for outcome in outcomes]),
        "\n".join(f"![{one.scenario.title}](plots/{SECTION}-{one.scenario.name}.png)" for one in outcomes),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Run the scenarios that are named, or all."""
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(description="Disturbances beside a worker, and what its governor makes of them.")
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each stretch")
    parser.add_argument("--work", type=Path, help="keep generated images, logs and plots here instead of removing them")
    arguments = parser.parse_args()
    if unknown := set(arguments.scenarios) - set(names):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    for number in (signal.SIGINT, signal.SIGTERM):  # both unwind: no cgroup, process or file may be left
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="adc-bench-") as folder:
        work = arguments.work or Path(folder)
        photographs = Photographs(work / "photographs")
        outcomes = []
        print(report.row(HEAD), flush=True)
        with ImageHost(photographs.folder) as host:
            for scenario in SCENARIOS:
                if scenario.name in (arguments.scenarios or names):
                    host.change()
                    outcomes.append(run(scenario, photographs, host, work, arguments.seconds))
                    print(report.row(outcomes[-1].cells()), flush=True)
        if not arguments.scenarios and arguments.seconds == SECONDS:
            for outcome in outcomes:
                name = f"{SECTION}-{outcome.scenario.name}.png"
                shutil.copy(work / "plots" / name, report.PLOTS / name)
            report.write_section(SECTION, _section(outcomes, arguments.seconds))


if __name__ == "__main__":
    main()
