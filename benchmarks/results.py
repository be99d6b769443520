"""Results are memory, too: 200 detections an image over 29 176 classes, scores and logits, under a limit of 1.5 GB.

Shown: every result arrives, and the peak of anonymous + shared memory of the worker. Not shown: speed (the desk server
parses each post of some 200 MB on the same cores).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from benchmarks.support import report
from benchmarks.support.cgroup import enclose
from benchmarks.support.large_results import CLASSES, DETECTIONS
from benchmarks.support.session import Session

LIMIT_BYTES = 1_500_000_000
TIMEOUT_S = 1500.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=40)
    count = parser.parse_args().images
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as folder,  # a disk: /tmp may be memory
        DevServer(save_delay_s=0.0, max_body_bytes=1_000_000_000) as server,
        enclose(LIMIT_BYTES) as enclosure,
    ):
        files = write_sheets(Path(folder), 4, seed=1, sizes=((4096, 2160),))
        job_id = server.add_job("large_results", [files[index % 4] for index in range(count)])
        session = Session(server, enclosure, Path(folder) / "data")
        started = time.monotonic()
        extra = {
            "AMI_EXTRA_PIPELINES": "benchmarks.support.large_results:pipelines",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        session.start([sys.executable, "-m", "adc_worker", "worker", "--exit-when-idle"], extra)
        code = session.wait(TIMEOUT_S)
        wall_s, job = time.monotonic() - started, session.saved(job_id)
        session.finish()
        found = [len(result["detections"]) for result in job.results.values()]
    head = ("images", "limit", "exit", "saved", "detections each", "failed", "peak anon+shmem", "OOM kills", "wall")
    peak = report.mb(session.samples.peak_bytes)
    cells = (
        count, report.mb(LIMIT_BYTES), code, len(found), f"{min(found, default=0)}-{max(found, default=0)}",
        job.failed, peak, session.oom_kills, f"{wall_s:.0f} s",
    )  # fmt: skip
    text = (
        f"## Large results (`benchmarks/results.py`)\n\n{report.machine()}, commit {report.commit()}.\n\n"
        f"{DETECTIONS} detections an image, {CLASSES} classes, scores and logits each. One run.\n\n"
        + report.table(head, [cells])
    )
    print(text)
    report.write_section("results", text)
    if len(found) != count:
        print("\n".join(session.lines[-20:]))


if __name__ == "__main__":
    main()
