"""How long a job waits for its first result: at process start, and with a worker that idles with its models loaded.

Measured from outside, against the desk server (saving takes no time there), one image of 4096x2160. Not measured: a
GPU's start, real weights, a real network.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from benchmarks.support import report
from benchmarks.support.hardware import caption
from tests.support.waiting import wait_until
from tests.support.workers import environment, worker

RUNS = 5
ARGUMENTS = ("--pipeline", "light_sheet_blobs")


def import_torch_s() -> float:
    """Wall seconds of a process that imports torch and ends."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - started


def first_result_s(server: DevServer, image: Path, data: Path) -> tuple[float, float]:
    """Seconds from process start to the first saved result, and from a later job's publication to its own."""
    job_id = server.add_job("light_sheet_blobs", [image])
    started = time.monotonic()
    with worker(environment(server, data), *ARGUMENTS) as running:
        wait_until(lambda: server.job(job_id).processed, timeout_s=60)
        cold_s = (server.job(job_id).first_saved_s or 0.0) - started
        running.wait_for("job_summary")
        published = time.monotonic()
        second = server.add_job("light_sheet_blobs", [image])
        wait_until(lambda: server.job(second).processed, timeout_s=60)
        warm_s = (server.job(second).first_saved_s or 0.0) - published
        running.process.terminate()
        running.wait()
    return cold_s, warm_s


def main() -> None:
    told, rows = caption(), []
    with tempfile.TemporaryDirectory() as folder, DevServer(save_delay_s=0.0) as server:
        (image,) = write_sheets(Path(folder), 1, seed=1, sizes=((4096, 2160),))
        for run in range(RUNS):
            torch_s = import_torch_s()
            rows.append((torch_s, *first_result_s(server, image, Path(folder) / f"data{run}")))
    torch_s, cold_s, warm_s = (statistics.median(column) for column in zip(*rows, strict=True))
    extra_s = statistics.median(cold - torch for torch, cold, _warm in rows)
    table = report.table(
        (f"median of {RUNS}", "seconds", "at most"),
        [
            ("import torch, alone", f"{torch_s:.2f}", ""),
            ("process start to first result", f"{cold_s:.2f}", ""),
            ("… minus the import in the same run", f"{extra_s:.2f}", "3"),
            ("job published to its result, worker idle", f"{warm_s:.2f}", "2"),
        ],
    )
    text = f"## The first result of a job (`benchmarks/latency.py`)\n\n{told}\n\nOne image of 4096x2160.\n\n{table}"
    print(text)
    report.write_section("latency", text)


if __name__ == "__main__":
    main()
