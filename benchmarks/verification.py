"""Six questions that were open about today's ingest, answered by runs of it, as it is described, and of ours.

    python benchmarks/verification.py [1 … 6] [--images-scale 0.3]

Each item keeps its figures in --keep; what is there becomes a section of RESULTS.md, worded by support/verification.md,
and a plot. A scaled run only prints. Pins no memory where there is no GPU. Never fails by seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import memray
import numpy as np
import torch

from benchmarks.support import report
from benchmarks.support.course import Course, Feed, Ingest, run
from benchmarks.support.image_host import BYTES_PER_S, LATENCY_S, ImageHost
from benchmarks.support.photographs import KINDS, Photographs
from benchmarks.support.report import mb
from benchmarks.support.verification_plot import draw

SECTION, TEXT = "verification", Path(__file__).parent / "support" / "verification.md"
STALL_S = 200.0  # at most; a GPU that stands still until all waits that may
SMALL_JOBS, QUIET_FROM, ROUNDS = 7, 2, 3
OURS, TODAY = Ingest(), Ingest(24, 4, 1)
# The rows of the description's tables, without that of the pinned copy.
DESCRIBED_BYTES = {("large", 24): 18.4e9, ("large", 4): 2.9e9, ("typical", 24): 1.7e9, ("typical", 4): 0.18e9}
HEAD = ("ingest", "images", "limit", "done", "OOM kills", "peak", "reckoned", "described", "images/s")

Found = dict[str, Any]  # figures of the text by name, and what is drawn


@dataclass(frozen=True, slots=True)
class Bench:
    """Runs ingests on photographs."""

    photographs: Photographs
    host: ImageHost
    data: Path
    scale: float

    def run(self, ingest: Ingest, *feeds: Feed) -> Course:
        scaled = [replace(feed, images=max(8, round(self.scale * feed.images))) for feed in feeds]
        course = run(ingest, scaled, self.photographs, self.host, self.data)
        print(f"# {feeds[0].kind}, {ingest.title}: {course.summary}", flush=True)
        return course


def float_bytes(kind: str) -> int:
    (width, height), *_ = KINDS[kind]
    return 3 * 4 * width * height


def reckoned_bytes(ingest: Ingest, kind: str) -> int:
    """Return the pixels of all that may wait in today's, of a list in each loader, and of a batch in hand."""
    batches = ingest.loaders * (ingest.prefetch + 1) + 1
    return batches * ingest.batch * float_bytes(kind)


def _described_bytes(course: Course) -> float | None:
    ingest = course.ingest
    reckoned = (ingest.prefetch, ingest.loaders) == (4, 1)
    return DESCRIBED_BYTES.get((course.feeds[0].kind, ingest.batch)) if reckoned else None


def _row(course: Course) -> list[str]:
    ingest, kind, described = course.ingest, course.feeds[0].kind, _described_bytes(course)
    return [
        ingest.title,
        f"{course.images} {kind}" + (", slow link" if course.feeds[0].slower > 1 else ""),
        mb(ingest.limit_bytes),
        str(course.done),
        str(course.oom_kills),
        mb(course.peak_bytes),
        mb(reckoned_bytes(ingest, kind)) if ingest.batch else "-",
        mb(described) if described else "-",
        f"{course.images_per_s:.1f}" if course.images_per_s else "-",
    ]


def batch_size_only(bench: Bench) -> Found:
    """Item 1."""
    shapes = {(24, 4, 1): 48, (24, 1, 1): 48, (4, 4, 1): 32, (1, 4, 4): 32, (4, 4, 4): 64}  # images, to fill the queue
    courses = [bench.run(Ingest(*shape, stall_s=STALL_S), Feed("large", images)) for shape, images in shapes.items()]
    courses.append(bench.run(replace(OURS, gpu_s=0.5), Feed("large", 48)))
    alone, four_loaders, ours = courses[2], courses[4], courses[5]
    return {
        "table_1": report.table(HEAD, map(_row, courses)),
        "large_mb": float_bytes("large") / 1e6,
        "base_mb": alone.quiet[0]["held_bytes"] / 1e6,
        "alone": _done(alone),
        "four_loaders": _done(four_loaders),
        "reckoned_24_gb": reckoned_bytes(Ingest(24, 4, 4), "large") / 1e9,
        "reckoned_4_gb": reckoned_bytes(Ingest(4, 4, 4), "large") / 1e9,
        "left_mb": max(course.shared_left_bytes for course in courses) / 1e6,
        "ours_mb": ours.peak_bytes / 1e6,
        "courses": [_drawn(course) for course in courses],
    }


def _done(course: Course) -> str:
    return "yes" if course.done == course.images else f"no, killed at {mb(course.ingest.limit_bytes)}"


def middle_ground(bench: Bench) -> Found:
    """Item 2."""
    pins = (False, True) if torch.cuda.is_available() else (False,)
    cases = [(Feed("large", 48), TODAY), (Feed("typical", 48), TODAY), (Feed("typical", 32), replace(TODAY, batch=4))]
    courses = [bench.run(replace(ingest, pin=pin), feed) for feed, ingest in cases for pin in pins]
    killed = [course.feeds[0].kind for course in courses if course.oom_kills]
    with_24 = f"{' and '.join(killed)} photographs are killed at {mb(TODAY.limit_bytes)}, though nothing is pinned"
    return {
        "table_2": report.table(HEAD, map(_row, courses)),
        "pinned": "Of two rows, the second is pinned."
        if len(pins) > 1
        else "Pinned rows are *written, not run*: pinning takes a GPU, and there is none here.",
        "middle_ground": f"no; with a batch of 24 {with_24}" if killed else "yes",
        "courses": [_drawn(course) for course in courses],
        **{f"float_{batch}_mb": batch * float_bytes("typical") / 1e6 for batch in (4, 24)},
        **{f"pinned_{batch}_mb": _power_of_two(batch * float_bytes("typical")) / 1e6 for batch in (4, 24)},
    }


def _power_of_two(size_bytes: int) -> int:
    return 1 << (size_bytes - 1).bit_length()


def small_images(bench: Bench) -> Found:
    """Item 3: each case some times over, in turns; its quickest run counts."""
    shapes = [Ingest(*shape) for shape in ((4, 4, 1), (4, 1, 1), (4, 4, 2), (4, 1, 2))]
    cases = [
        *((ingest, Feed("small", 120)) for ingest in (TODAY, shapes[0])),
        *((ingest, Feed("typical", 48)) for ingest in shapes),
        (OURS, Feed("typical", 120)),
        *((ingest, Feed("typical", 32, 10.0)) for ingest in (*shapes[:2], OURS)),
    ]
    rounds = [[bench.run(*case) for case in cases] for _round in range(ROUNDS)]
    runs = [sorted(courses, key=lambda course: course.images_per_s) for courses in zip(*rounds, strict=True)]
    courses = [_of_all(each) for each in runs]
    rates = [course.images_per_s for course in courses]
    small, usual, slow = rates[:2], rates[2:7], rates[7:]
    return {
        "table_3": report.table(HEAD, map(_row, courses)),
        "rounds": ROUNDS,
        "apart": median(1 - each[-2].images_per_s / each[-1].images_per_s for each in runs),
        "rate_4_24": small[1] / small[0],
        "memory_4_24": courses[1].peak_bytes / courses[0].peak_bytes,
        "depth_1": usual[0] / usual[1],
        "depth_2": usual[2] / usual[3],
        "depth_slow": slow[0] / slow[1],
        "loaders": usual[2] / usual[0],
        "ours_best": usual[4] / max(usual[:4]),
        "ours_slow": slow[2] / max(slow[:2]),
        "rates": [[ingest.title, rate] for (ingest, _feed), rate in zip(cases[2:7], usual, strict=True)],
    }


def _of_all(runs: Sequence[Course]) -> Course:
    """Return the quickest of some runs, with the highest peak, the fewest done and the kills of all."""
    kills = sum(one.oom_kills or 0 for one in runs)
    return replace(
        runs[-1], peak_bytes=max(one.peak_bytes for one in runs), done=min(one.done for one in runs), oom_kills=kills
    )


def memory_profile(bench: Bench) -> Found:
    """Item 4."""
    rows, peaks = [], []
    for name, ingest in (("today's", Ingest(4, 4, 1, stall_s=STALL_S)), ("ours", replace(OURS, gpu_s=0.2))):
        with tempfile.TemporaryDirectory(dir=bench.data) as folder:
            course = bench.run(replace(ingest, profile=Path(folder) / "profile"), Feed("large", 32))
            for file in sorted(Path(folder).glob("profile*")):
                process = "loader" if "." in file.name else "that infers"
                rows += [[name, process, where, mb(size)] for where, size in _allocations(file)]
            peaks.append(course.peak_bytes / 1e6)
    feeds = [Feed("large", 12), *[Feed("typical", 12)] * SMALL_JOBS]
    today, ours = (bench.run(ingest, *feeds) for ingest in (Ingest(4, 4, 1), OURS))
    maxrss = [(batch["at_s"] - today.start_s, batch["maxrss_bytes"]) for batches in today.batches for batch in batches]
    return {
        "table_4": report.table(("ingest", "process", "allocated in", "at its peak"), rows),
        "small_jobs": SMALL_JOBS,
        "batch_float_mb": 4 * float_bytes("large") / 1e6,
        "batch_uint8_mb": float_bytes("large") / 1e6,
        "kernel_today_mb": peaks[0],
        "kernel_ours_mb": peaks[1],
        "quiet_today": _quiet(today),
        "quiet_ours": _quiet(ours),
        "slope_today": _slope(today),
        "slope_ours": _slope(ours),
        "maxrss_first_mb": maxrss[0][1] / 1e6,
        "maxrss_large_mb": today.batches[0][-1]["maxrss_bytes"] / 1e6,
        "maxrss_last_mb": maxrss[-1][1] / 1e6,
        "quiet_last_mb": today.quiet[-1]["held_bytes"] / 1e6,
        "peak_today_mb": today.peak_bytes / 1e6,
        "held": [_thinned(course.held) for course in (today, ours)],
        "maxrss": maxrss,
    }


def _allocations(file: Path) -> list[tuple[str, int]]:
    """Return where a process had allocated most at its peak, by the innermost Python function."""
    sizes: Counter[str] = Counter()
    with memray.FileReader(file) as reader:
        for record in reader.get_high_watermark_allocation_records(merge_threads=True):
            stack = record.stack_trace()
            function, path, _line = stack[0] if stack else ("?", "?", 0)
            sizes[f"`{function}` in {'/'.join(Path(path).parts[-2:])}"] += record.size
    return [(where, size) for where, size in sizes.most_common(6) if size >= 20e6]


def _quiet(course: Course) -> str:
    held = [one["held_bytes"] / 1e6 for one in course.quiet[QUIET_FROM:]]
    return f"{min(held):.0f} to {max(held):.0f} MB"


def _slope(course: Course) -> str:
    """Say by how much quiet memory rises a job, with twice the standard error."""
    held = [one["held_bytes"] / 1e6 for one in course.quiet[QUIET_FROM:]]
    fit, covariance = np.polyfit(range(len(held)), held, 1, cov=True)
    return f"{fit[0]:+.1f} ± {2 * covariance[0, 0] ** 0.5:.1f} MB a job"


def ratios(bench: Bench) -> Found:
    """Item 5."""
    cases = [Feed(kind, 12, slower) for slower in (0.1, 1.0, 10.0) for kind in ("tiny", "typical", "large")]
    ours, today = bench.run(OURS, *cases), bench.run(Ingest(4, 4, 1), *cases)
    rows, drawn, decoding = [], [], {}
    for feed, plan, our_batches, batches in zip(cases, ours.plans, ours.batches, today.batches, strict=True):
        images = [batch["observed"]["image"] for batch in our_batches]
        stages = ("download_s", "decode_s", "inference_s")
        ours_s, todays_s = ([_median(measured, name) for name in stages] for measured in (images, batches))
        ratio, load_s = ours_s[0] / ours_s[2], todays_s[0] + todays_s[1]
        decoding[feed.kind, feed.slower] = todays_s[1] / load_s
        drawn.append((feed.kind, feed.slower, ratio, load_s / todays_s[2]))
        rows.append((
            feed.kind,
            f"{1e3 * feed.slower * LATENCY_S:.0f} ms, {BYTES_PER_S / feed.slower / 1e6:.0f} MB/s",
            " / ".join(f"{1e3 * seconds:.0f}" for seconds in ours_s) + " ms",
            f"**{ratio:.2f}**",
            f"{plan['prefetch_factor']}, {plan['staged_ahead']}, {plan['download_concurrency']}",
            " / ".join(f"{seconds:.2f}" for seconds in todays_s) + " s",
            f"{_median(batches, 'load_s'):.2f} s",
        ))  # fmt: skip
    head = (
        "photographs", "link", "ours: download / decode / inference", "download : inference",
        "our prefetch, tasks staged, downloads", "today's: download / decode / inference", "waited for it",
    )  # fmt: skip
    return {
        "table_5": report.table(head, rows),
        "ratio_images": cases[0].images,
        "ratio_least": min(ratio for _kind, _slower, ratio, _load in drawn),
        "ratio_most": max(ratio for _kind, _slower, ratio, _load in drawn),
        "decode_typical": decoding["typical", 1.0],
        "decode_large": decoding["large", 1.0],
        "ratios": drawn,
    }


def _median(measured: Sequence[dict[str, float]], name: str) -> float:
    return median(one[name] for one in measured)


def descriptors(bench: Bench) -> Found:
    """Item 6."""
    default = Ingest(24, 4, 4, stall_s=STALL_S)
    feeds = [Feed("tiny", 440), *[Feed("tiny", 48)] * 3]
    courses = [bench.run(ingest, *feeds) for ingest in (default, replace(default, lists=True), OURS)]
    rows = []
    for course in courses:
        _at_s, kinds, _largest = max(course.files, key=lambda one: one[1].total())
        by_kind = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        quiet = ", ".join(str(one["files"]) for one in course.quiet)
        rows.append([course.ingest.title, course.done, _most_files(course), f"{kinds.total()}: {by_kind}", quiet])
    head = ("ingest", "done", "most in one process", "most in the whole tree", "whole tree when quiet, after each job")
    return {
        "table_6": report.table(head, rows),
        "long_images": feeds[0].images,
        **{f"files_{name}": _most_files(one) for name, one in zip(("stacked", "lists", "ours"), courses, strict=True)},
        "files": [[course.ingest.title, [(at_s, kinds.total()) for at_s, kinds, _most in course.files]]
                  for course in courses],
    }  # fmt: skip


def _most_files(course: Course) -> int:
    return max(most for _at_s, _kinds, most in course.files)


def _drawn(course: Course) -> Found:
    ingest, kind = course.ingest, course.feeds[0].kind
    return {
        "title": ingest.title,
        "kind": kind,
        "limit": ingest.limit_bytes,
        "killed": bool(course.oom_kills),
        "peak": course.peak_bytes,
        "reckoned": reckoned_bytes(ingest, kind),
        "described": _described_bytes(course),
        "held": _thinned(course.held),
    }


def _thinned(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Keep the largest of each half second."""
    kept: dict[int, tuple[float, int]] = {}
    for at_s, size in points:
        if size >= kept.get(int(2 * at_s), (0.0, -1))[1]:
            kept[int(2 * at_s)] = (at_s, size)
    return list(kept.values())


ITEMS: dict[int, Callable[[Bench], Found]] = {
    1: batch_size_only, 2: middle_ground, 3: small_images, 4: memory_profile, 5: ratios, 6: descriptors,
}  # fmt: skip


def main() -> None:
    """Run the items that are named, or all; publish what is known by then."""
    parser = argparse.ArgumentParser(description="Six open questions about today's ingest.")
    parser.add_argument("items", nargs="*", type=int, metavar="item", help="1 … 6")
    parser.add_argument("--images-scale", type=float, default=1.0, help="shrink the jobs, for trying out")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / SECTION, help="folder for figures")
    arguments = parser.parse_args()
    if unknown := set(arguments.items) - set(ITEMS):
        parser.error(f"there is no item {min(unknown)}, only 1 to {len(ITEMS)}")
    for ended in (signal.SIGINT, signal.SIGTERM):  # both unwind: no cgroup, process or file may be left
        signal.signal(ended, signal.default_int_handler)
    keep, commit = arguments.keep, report.commit()
    keep.mkdir(parents=True, exist_ok=True)
    # /var/tmp: /tmp may be memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="adc-bench-") as folder:
        photographs = Photographs(Path(folder) / "photographs")
        with ImageHost(photographs.folder) as host:
            bench = Bench(photographs, host, Path(folder), arguments.images_scale)
            for number in arguments.items or ITEMS:
                started_s = time.monotonic()
                others = os.getloadavg()[0]
                found = ITEMS[number](bench) | {"commit": commit, "load": others}
                (keep / f"{number}.json").write_text(json.dumps(found))
                print(found[f"table_{number}"], f"# {time.monotonic() - started_s:.0f} s", sep="\n", flush=True)
    if arguments.images_scale == 1:
        files = {number: keep / f"{number}.json" for number in ITEMS}
        _publish({number: json.loads(file.read_text()) for number, file in files.items() if file.exists()})


def _publish(found: Mapping[int, Found]) -> None:
    """Write what is known by now; an item without figures says so."""
    draw(report.PLOTS / f"{SECTION}.png", found)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "commits": "commit " + ", ".join(sorted({one["commit"] for one in found.values()})),
        "machine": report.machine(),
        "loads": ", ".join(f"{one['load']:.1f} ({number})" for number, one in found.items()),
        "latency_ms": 1e3 * LATENCY_S,
        "link_mb_per_s": BYTES_PER_S / 1e6,
    }
    gpu = {"gpu_ms": 1e3 * OURS.gpu_s, "gpu_rate": 1 / OURS.gpu_s}
    head, *parts = TEXT.read_text().split("\n### ")
    text = [head.format(**about)]
    for number, part in enumerate(parts, 1):
        title = part.partition("\n")[0]
        text.append(part.format(**gpu, **found[number]) if number in found else f"{title}\n\nNot run yet.\n")
    report.write_section(SECTION, "\n### ".join(text))


if __name__ == "__main__":
    main()
