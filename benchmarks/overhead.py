"""What the probe costs a job, and how soon a job runs at its best rate: at its start, and on a link that changes.

    python benchmarks/overhead.py [--images 100] [--seconds 20]

A worker works off the same job with its probe and given the plan. Another one works while its link becomes
ten times slower, and recovers. Writes a section of RESULTS.md; other numbers only print.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.support import report
from benchmarks.support.image_host import BYTES_PER_S, LATENCY_S, ImageHost
from benchmarks.support.photographs import Photographs
from benchmarks.support.session import Session, simulated_worker

SECTION, LIMIT_BYTES, IMAGES, SECONDS = "overhead", 3_000_000_000, 100, 20.0
LONG_S, OVERHEAD_MAX = 60.0, 0.02
JOBS = (("typical", 0.6, "inference binds"), ("large", 0.02, "decoding binds"))
PACED_GPU_S, PACED_IMAGES, SLOWER = 0.04, 4000, 10.0
WARM_UP_IMAGES, JOB_S_MAX = 16, 180.0
FILES = ("plan.json", "given")
RATE_S, BEST_S = 3.0, 9.0  # over which a rate is taken, and the best one
KNOBS = ("batch_size", "prefetch_factor", "decode_workers", "download_concurrency")


def _wall_s(running: Session, urls: list[str]) -> float:
    """Work a job off; return the seconds from its first fetch to its last result kept."""
    job_id = running.work_off(urls, JOB_S_MAX)
    return sum(float(summary["wall_s"]) for summary in running.events("job_summary", job_id=job_id))


def _cost(kind: str, gpu_s: float, binds: str, images: int, photographs: Photographs, host: ImageHost) -> list[str]:
    """Return a row of the table: the job with its probe, and given the plan."""
    walls_s = []
    urls = host.urls(photographs.names(kind, images))
    with simulated_worker(LIMIT_BYTES, gpu_s, photographs.folder.parent, *FILES) as (running, (_plan, given)):
        _wall_s(running, urls[:WARM_UP_IMAGES])
        walls_s.append(_wall_s(running, urls))
        given.touch()
        walls_s.append(_wall_s(running, urls))
    probed_s, given_s = walls_s
    share = probed_s / given_s - 1
    reached = "-" if given_s < LONG_S else "yes" if share <= OVERHEAD_MAX else "**no**"
    both = (f"{wall_s:.2f}" for wall_s in walls_s)
    return [f"{kind}, {gpu_s} s of inference: {binds}", *both, f"{probed_s - given_s:.2f}", f"{share:.1%}", reached]


def _rate(batches: Sequence[Mapping[str, Any]], first: int, seconds: float) -> float:
    """Return images/s from the end of one batch on, over `seconds`; 0 where there are not so many."""
    images, start_s = 0, batches[first]["at_s"]
    for batch in batches[first + 1 :]:
        images += batch["images"]
        if batch["at_s"] >= start_s + seconds:
            return float(images / (batch["at_s"] - start_s))
    return 0.0


def _phases(running: Session, marks_s: Sequence[float]) -> list[list[str]]:
    """Return a row per stretch between marks: its best rate, how soon that was reached, what the plan did."""
    batches, rows = running.events("batch"), []
    plans = [plan for plan in running.events("plan") if plan["at_s"] >= marks_s[0]]
    names = ("from its start", f"link {SLOWER:.0f} times slower", "link as before")
    for name, (from_s, to_s) in zip(names, pairwise(marks_s), strict=True):
        inside = [batch for batch in batches if from_s <= batch["at_s"] < to_s]
        best = max((_rate(inside, number, BEST_S) for number in range(len(inside))), default=0.0)
        rates = [(_rate(inside, number, RATE_S), one["at_s"]) for number, one in enumerate(inside)]
        _lowest, lowest_s = min(rate for rate in rates if rate[1] < (from_s + to_s) / 2)
        reached_s = next((at_s for rate, at_s in rates if at_s >= lowest_s and rate >= 0.95 * best), to_s)
        lost_s = to_s - from_s - sum(batch["images"] for batch in inside) / best
        changed = [(old, new) for old, new in pairwise(plans) if from_s <= new["at_s"] < to_s]
        up, down = (sum(any(a[knob] * way < b[knob] * way for knob in KNOBS) for a, b in changed) for way in (1, -1))
        (*_earlier, last) = [plan for plan in plans if plan["at_s"] < to_s]
        knobs = "/".join(str(last[knob]) for knob in KNOBS)
        actions = ", ".join(batch["action"] for batch in inside if batch["action"] != "hold") or "none"
        times = f"{reached_s - from_s:.1f}", f"{lost_s:.1f}"
        rows.append([name, f"{best:.1f}", *times, f"{up} / {down}", actions, knobs])
    return rows


def _pace(seconds: float, photographs: Photographs, host: ImageHost) -> list[list[str]]:
    urls = host.urls(photographs.names("typical", PACED_IMAGES))
    with simulated_worker(LIMIT_BYTES, PACED_GPU_S, photographs.folder.parent, *FILES) as (running, _files):
        _wall_s(running, urls[:WARM_UP_IMAGES])
        marks_s = [time.time()]
        running.server.add_job("simulated", urls)
        for slower in (SLOWER, 1.0, 1.0):
            time.sleep(seconds)
            marks_s.append(time.time())
            host.change(slower=slower)
        return _phases(running, marks_s)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description="What the probe costs, and how soon a job runs at its best rate.")
    parser.add_argument("--images", type=int, default=IMAGES, help="of a job")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each stretch of the changing link")
    arguments = parser.parse_args()
    if arguments.seconds < 2 * BEST_S:
        parser.error(
            f"--seconds: the best rate of a stretch is taken over {BEST_S:.0f} s; give it {2 * BEST_S:.0f} or more"
        )
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="adc-overhead-") as folder:
        photographs = Photographs(Path(folder) / "photographs")
        with ImageHost(photographs.folder) as host:
            costs = [_cost(*job, arguments.images, photographs, host) for job in JOBS]
            phases = _pace(arguments.seconds, photographs, host)
    head = ("job", "with its probe, s", "given the plan, s", "difference, s", "overhead", f"≤ {OVERHEAD_MAX:.0%}")
    paced = (
        "stretch",
        "best images/s",
        "seconds to 95 % of it",
        "plans larger / smaller",
        "decisions",
        "plan at its end",
    )
    text = f"""## Overhead of the probe, and convergence (`benchmarks/overhead.py`)

{time.strftime("%Y-%m-%d")}, commit {report.commit()}, {report.machine()}.

Jobs of {arguments.images} photographs from a host with {1e3 * LATENCY_S:.0f} ms and {BYTES_PER_S / 1e6:.0f} MB/s per
connection; seconds from a job's first fetch to its last result. One run each. Jobs of {LONG_S:.0f} s and
more are held to {OVERHEAD_MAX:.0%}.

{report.table(head, costs)}

A job of typical photographs with {PACED_GPU_S} s of inference on a link that is as above, {SLOWER:.0f} times slower
and as before, for {arguments.seconds:.0f} s each. The best rate is that over {BEST_S:.0f} s of a stretch, reached when,
after the worst ones, the next {RATE_S:.0f} s bring 95 % of it. Times count from the job's publication, or the link's
change; seconds lost would have brought what lacks to the best rate. Plans: batch/prefetch/decode workers/downloads.

{report.table(paced, phases)}"""
    print(text)
    if (arguments.images, arguments.seconds) == (IMAGES, SECONDS):
        report.write_section(SECTION, text)


if __name__ == "__main__":
    main()
