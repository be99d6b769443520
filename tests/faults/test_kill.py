"""Kill -9 at every stage: one outcome per image, no second delivery, no second download, one batch inferred twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from adc_worker.errors import ExitCode
from tests.faults.conftest import Desk
from tests.support.counting_pipeline import numbered
from tests.support.gate import Fault
from tests.support.image_server import Reply
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess, run_to_end, worker

IMAGES = 24
SOME = 8  # of them, on record when the worker is killed
LARGE_PX = 3000  # a PNG of this size decodes for a good part of a second


@dataclass(frozen=True)
class Stage:
    """Where a task is when its worker dies: how to bring it there and hold it, how to see that it is, what lets go."""

    hold: Callable[[Desk], object]
    reached: Callable[[Desk, WorkerProcess], object]
    let_go: Callable[[Desk], object]
    size_px: int = 24


def _journal(desk: Desk, query: str) -> list[tuple[Any, ...]]:
    path = desk.folder / "data" / "adc_journal.db"
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        tables = db.execute("SELECT name FROM sqlite_master WHERE name = 'adc_finished'").fetchall()
        return db.execute(query).fetchall() if tables else []


def _recorded(desk: Desk) -> int:
    return len(_journal(desk, "SELECT 1 FROM adc_task UNION ALL SELECT 1 FROM adc_finished"))


def _kept(desk: Desk) -> int:
    return len(_journal(desk, "SELECT 1 FROM adc_task WHERE result_bytes NOT NULL"))


def _no_fetch_is_open(desk: Desk) -> bool:
    """Or its answer would die with the worker, and its tasks come again after 300 s."""
    processed = desk.antenna.job(desk.jobs[-1]).processed_ids
    journal = desk.folder / "data" / "adc_journal.db"
    return not desk.gate.under_way["POST tasks"] and not desk.gate.died_on_the_way(journal, processed)


def _cut_off(desk: Desk) -> set[str]:
    """Return the images whose downloads the kill broke off: held, without a staged file and without a result."""
    staged = {int(file.stem.partition("-")[0]) for file in (desk.folder / "data" / "staging").rglob("*.img")}
    tasks = _journal(desk, "SELECT id, image_url FROM adc_task WHERE result_bytes IS NULL")
    return {urlsplit(url).path for task_id, url in tasks if task_id not in staged}


def _downloaded_twice(desk: Desk, cut_off: set[str]) -> set[str]:
    return {target for target, count in desk.downloads().items() if count > 1} - cut_off


def _hold_fetches(desk: Desk) -> None:
    """Hand out no more once some tasks are on record: no answer is on its way when the worker is killed."""
    desk.gate.fault = lambda route: 503 if route == "POST tasks" and _recorded(desk) >= SOME else None


def _staged(desk: Desk) -> int:
    return len(list((desk.folder / "data" / "staging").rglob("*.img")))


def _hold_images(desk: Desk) -> None:
    def held(number: int) -> Reply:
        desk.images_may_come.wait()
        return Reply(numbered(number))

    for number in range(IMAGES):
        desk.images.replies[f"/{number}.png"] = partial(held, number)


def _post(fault: Fault) -> Callable[[Desk], None]:
    def hold(desk: Desk) -> None:
        desk.gate.fault = lambda route: fault if route == "POST result" else None

    return hold


STAGES = {
    "fetched": Stage(
        _hold_images,
        lambda desk, _log: _recorded(desk) and desk.images.requests,
        lambda desk: desk.images_may_come.set(),
    ),
    "staged": Stage(
        lambda desk: desk.switch("hold", on=True),
        lambda desk, _log: _staged(desk) >= 5,
        lambda desk: desk.switch("hold", on=False),
    ),
    "decoding": Stage(
        _hold_fetches,
        lambda desk, log: log.events("plan") and _recorded(desk) >= SOME,
        lambda desk: desk.gate.open(),
        LARGE_PX,
    ),
    "inferring": Stage(
        _hold_fetches,
        lambda desk, _log: sum(desk.inferred.values()) >= 4 and _recorded(desk) >= SOME,
        lambda desk: desk.gate.open(),
    ),
    "kept": Stage(_post(503), lambda desk, _log: _kept(desk) >= 4, lambda desk: desk.gate.open()),
    "posting": Stage(
        _post("hold"), lambda desk, _log: desk.gate.held["POST result"], lambda desk: desk.gate.open()
    ),
    "posted": Stage(
        _post("withhold"), lambda desk, _log: desk.gate.held["POST result"], lambda desk: desk.gate.open()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_a_worker_killed_at_any_stage_loses_nothing_and_repeats_at_most_one_batch(desk: Desk, name: str) -> None:
    """The whole group dies, parent and child together; the next start finishes from its own disk."""
    stage = STAGES[name]
    stage.hold(desk)
    job_id = desk.add_job(IMAGES, size_px=stage.size_px)
    env = desk.environment({"COUNTING_SECONDS": "0.05"})
    started = time.monotonic()
    with worker(env) as first:
        first.wait_for("worker_ready")
        start_s = time.monotonic() - started
        wait_until(lambda: stage.reached(desk, first) and _no_fetch_is_open(desk), timeout_s=90)
        os.killpg(first.process.pid, signal.SIGKILL)
        wait_until(lambda: first.process.poll() is not None)
    cut_off = _cut_off(desk)
    stage.let_go(desk)
    killed = time.monotonic()
    code, second = run_to_end(env, "--exit-when-idle")
    assert code == ExitCode.OK
    job = desk.done(job_id)
    assert job.last_saved_s is not None
    # One process start, the images that were left, and what a busy machine adds to both.
    assert job.last_saved_s - killed < 2 * start_s + 0.3 * IMAGES + 5
    assert set(job.deliveries.values()) == {1}
    assert not _downloaded_twice(desk, cut_off)
    batches = [event["images"] for log in (first, second) for event in log.events("batch")]
    repeated = sum(desk.inferred.values()) - len(desk.inferred)
    assert repeated <= max([2, *batches])
    assert not list((desk.folder / "data" / "staging").rglob("*.*"))


def test_two_workers_on_one_data_folder_share_a_job_and_one_that_dies_leaves_its_part_to_the_next(
    desk: Desk, tmp_path: Path
) -> None:
    """Neither touches what the other holds; what a dead one held is adopted by the next that starts."""
    desk.switch("hold", on=True)
    env = desk.environment({"AMI_ANTENNA_API_BATCH_SIZE": "4"})
    job_id = desk.add_job(IMAGES)
    with worker(env) as first, worker(env) as second:
        first.wait_for("journal_open")
        second.wait_for("journal_open")
        slots = [log.events("journal_open")[0]["slot"] for log in (first, second)]
        assert sorted(slots) == [0, 1]
        wait_until(lambda: _staged(desk) == 20, timeout_s=90)  # each has ten: no fetch is open whose answer could die
        os.killpg(second.process.pid, signal.SIGKILL)
        wait_until(lambda: second.process.poll() is not None)
        cut_off = _cut_off(desk)
        desk.switch("hold", on=False)
        wait_until(lambda: first.events("job_summary"), timeout_s=90)
        code, _third = run_to_end(env, "--exit-when-idle")
        assert code == ExitCode.OK
        job = desk.done(job_id)
    assert set(job.deliveries.values()) == {1}
    assert not _downloaded_twice(desk, cut_off)
    assert set(desk.inferred.values()) == {1}
    wait_until(lambda: not list((tmp_path / "data" / "staging").rglob("*.*")))
