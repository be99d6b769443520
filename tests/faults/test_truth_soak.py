"""Every result from its own pixels, under kills, damaged files, flapping hosts and portals.

`make soak` runs it with SOAK_TRUTH_IMAGES (600) images and SOAK_SEED (1); from 2 000 images on the table goes to
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adc_worker.desk.server import DevServer
from benchmarks.support import report
from tests.support.gate import Gate
from tests.support.image_server import ImageServer
from tests.support.truth_run import ACK_WAIT_S, ANTENNA_FAULT_SHARE, MAX_DELIVER, Findings, RunOptions, TruthRun

IMAGES = int(os.environ.get("SOAK_TRUTH_IMAGES", "600"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
PUBLISHED_FROM = 2_000


def _run(folder: Path, options: RunOptions) -> Findings:
    with (
        DevServer(save_delay_s=0.0005, keep_streams=True, ack_wait_s=ACK_WAIT_S, max_deliver=MAX_DELIVER) as antenna,
        Gate(antenna.api_url) as gate,
        ImageServer() as first,
        ImageServer() as second,
        ImageServer() as third,
    ):
        run = TruthRun(options, folder, antenna, gate, [first, second, third])
        found = run.go()
        gate.open()
    return found


def _assert_true(found: Findings) -> None:
    assert not found.wrong
    assert not found.destroyed
    assert not found.blamed
    assert not found.without_outcome
    assert not found.ended_by_itself, "nothing that happened here was for an operator to put right"


@pytest.mark.timeout(240)
def test_a_job_in_bad_company_is_right(tmp_path: Path) -> None:
    """A small run: a few kills, some damaged files, a portal now and then."""
    options = RunOptions(images=60, seed=SEED, timeout_s=200.0, life_s=(8.0, 14.0), retries_a_job=False)
    _assert_true(_run(tmp_path, options))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thousands_of_results_are_each_from_their_own_pixels(tmp_path: Path) -> None:
    """Nothing wrong, nothing computed that is lost, no whole photograph with an error; also of a restarted job."""
    found = _run(tmp_path, RunOptions(images=IMAGES, seed=SEED, timeout_s=3000.0, life_s=(6.0, 20.0)))
    head = (
        "images", "of them damaged", "missing", "kills", "false answers of Antenna's", "faults of image hosts",
        "wrong", "destroyed", "blamed", "without outcome", "wall",
    )  # fmt: skip
    cells = (
        found.images, found.damaged, found.missing, found.kills, found.antenna_faults, found.host_faults,
        len(found.wrong), len(found.destroyed), len(found.blamed), len(found.without_outcome), f"{found.wall_s:.0f} s",
    )  # fmt: skip
    text = (
        f"## Every result from its own pixels (`tests/faults/test_truth_soak.py`)\n\n{report.machine()}, commit"
        f" {report.commit()}.\n\nReal workers, killed at random, alone or with their parent, seed {SEED}. Each result"
        f" is the checksum of the pixels that the pipeline was given; it is held against a whole file as Pillow has"
        f" it, and against a damaged one as it is decoded whatever the memory held before."
        f" {ANTENNA_FAULT_SHARE:.0%} of the requests to Antenna, and now and then all of them, meet a portal,"
        f" an error page, another service's JSON or a broken connection, from the first request on. Three image hosts"
        f" have bad spells of 503, 403, sign-in pages with status 200, and cut bodies. One job is cancelled and"
        f" retried. Wrong: a saved result of other pixels. Destroyed: computed, and not saved. Blamed: an error of a"
        f" whole photograph.\n\n" + report.table(head, [cells])
    )
    print(text)  # noqa: T201 (what the soak is run for)
    if found.images >= PUBLISHED_FROM:
        report.write_section("truth-soak", text)
    _assert_true(found)
