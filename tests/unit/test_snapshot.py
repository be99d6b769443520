"""What the parent makes of its children's snapshots."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from adc_worker import log
from adc_worker.errors import WorkerFault
from adc_worker.status.channel import listening, running
from adc_worker.status.http import serving
from adc_worker.status.hub import HISTORY_POINTS, SILENT_S, StatusHub
from adc_worker.status.page import rendered_page
from adc_worker.status.paths import report_path, socket_address, socket_path
from adc_worker.status.reporter import Reporter
from adc_worker.status.snapshot import JobView, Snapshot, StageView
from adc_worker.status.worker_status import WorkerStatus
from tests.support.waiting import wait_until

LEASE_S = 300.0


def job(**fields: Any) -> JobView:
    return JobView(**{"id": 7, "pipeline": "moths", "started_at": time.time() - 10, "tasks": 30, **fields})


def snapshot(**fields: Any) -> Snapshot:
    usual: dict[str, Any] = {
        "at": time.time(),
        "slot": 0,
        "pid": 4711,
        "device": "cpu",
        "stopping": False,
        "memory_bytes": 500_000_000,
        "budget_bytes": 700_000_000,
        "limit_bytes": 1_000_000_000,
        "limit_source": "MemTotal",
        "unposted": 0,
        "staged_bytes": 0,
        "moved_at": time.time(),
    }
    return Snapshot(**{**usual, **fields})


def test_a_snapshot_survives_the_way_to_the_parent() -> None:
    """Every field, nested ones too."""
    stages = (StageView(name="decode", s_per_image=0.05, parallel=2),)
    told = snapshot(
        job=job(stages=stages, failed={"ImageMissing": 2}, plan={"batch_size": 3}, why={"batch_size": "memory"}),
        causes=(log.Cause("fetch_failed", "503", 3, 1.5),),
    )
    assert Snapshot.from_json(told.to_json()) == told


def test_the_time_left_counts_what_nobody_has_yet() -> None:
    """In hand here, and not handed out to anybody: the others' share is theirs to finish."""
    assert job(in_hand=10, pending=90, images_per_s=2.0).eta_s == 50
    assert job(in_hand=10, images_per_s=0.0).eta_s is None
    assert job(in_hand=10, images_per_s=2.0, ended_at=time.time()).eta_s is None


def test_a_worker_is_ready_when_every_process_reports() -> None:
    """Two were to be started: the one that is missing is named."""
    hub = StatusHub(2, LEASE_S)
    hub.add(snapshot())
    assert hub.unready() == ["1 of 2 processes have not started yet"]
    hub.add(snapshot(slot=1))
    assert hub.unready() == []


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (lambda now: snapshot(at=now - SILENT_S - 1), "has told nothing"),
        (lambda now: snapshot(job=job(in_hand=3), moved_at=now - LEASE_S / 2 - 1), "holds tasks and made no progress"),
        (lambda now: snapshot(unposted=3, moved_at=now - LEASE_S / 2 - 1), "holds tasks and made no progress"),
    ],
)
def test_a_worker_is_not_ready_when_a_process_is_silent_or_holds_tasks_and_does_nothing(
    told: Callable[[float], Snapshot], reason: str
) -> None:
    """Half a lease without an outcome: what is held was planned to be done by then."""
    hub = StatusHub(1, LEASE_S)
    hub.add(told(time.time()))
    (said,) = hub.unready()
    assert reason in said


def test_a_process_is_heard_again_after_its_connection_broke(tmp_path: Path) -> None:
    """The reporter connects anew at its next tick."""
    path = socket_path(tmp_path, 4711)
    with socket.socket(socket.AF_UNIX) as parent, socket_address(path) as address:
        parent.settimeout(10.0)
        parent.bind(address)
        parent.listen()
        with closing(Reporter(path, lambda view: snapshot(job=view))):
            for _connection in range(2):
                connection, _ = parent.accept()
                with connection, connection.makefile("rb") as lines:
                    assert Snapshot.from_json(lines.readline()).pid == 4711


def test_a_process_is_heard_after_its_report_could_not_be_written(tmp_path: Path) -> None:
    """A full disk at the end of a job costs the report and not the connection."""
    hub = StatusHub(1, LEASE_S)
    report_path(tmp_path).mkdir()  # as good as a full disk
    path = socket_path(tmp_path, os.getpid())
    with listening(hub, tmp_path), socket.socket(socket.AF_UNIX) as process, socket_address(path) as address:
        process.connect(address)
        for told in (snapshot(job=job(ended_at=time.time())), snapshot(slot=1)):
            process.sendall(told.to_json() + b"\n")
        wait_until(lambda: len(hub.snapshots()) == 2)


def test_a_status_survives_the_way_to_who_asked() -> None:
    """`ami worker status` and `ami demo` read what the parent wrote."""
    hub = StatusHub(2, LEASE_S)
    hub.add(snapshot(job=job(done=3, plan={"peak_bytes": 5, "binds": "link"}, ended_at=time.time())))
    told = hub.status()
    assert WorkerStatus.from_json(told.to_json()) == told


def test_a_worker_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """One that was stopped, or whose disk is gone, still takes connections."""
    path = socket_path(tmp_path, 4711)
    with socket.socket(socket.AF_UNIX) as mute, socket_address(path) as address:
        mute.bind(address)
        mute.listen()
        with pytest.raises(WorkerFault, match=r"4711\.sock does not answer: timed out"):
            running(tmp_path, answer_timeout_s=0.1)


def test_readers_that_go_away_and_strange_hosts_leave_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    """Between log lines that programs read."""
    reset = struct.pack("ii", 1, 0)
    with serving(StatusHub(1, LEASE_S), ("127.0.0.1", 0)):
        mine = psutil.Process().net_connections("tcp4")
        (port,) = [one.laddr.port for one in mine if one.status == psutil.CONN_LISTEN]
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as reader:
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                reader.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with socket.create_connection(("127.0.0.1", port)) as reader:
            reader.sendall(b"GET / HTTP/1.1\r\nHost: [\r\n\r\n")
            assert b" 421 " in reader.recv(100)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_idle_worker_stays_ready_for_ever() -> None:
    """Without tasks nothing has to move."""
    hub = StatusHub(1, LEASE_S)
    hub.add(snapshot(moved_at=0.0))
    assert hub.unready() == []


def test_memory_over_time_covers_the_whole_run_in_bounded_space() -> None:
    """A week at a snapshot a second: the first and the last are there, evenly spread, in a page's width of points."""
    hub, start = StatusHub(1, LEASE_S), 1_000_000.0
    for second in range(0, 7 * 24 * 3600, 7):
        hub.add(snapshot(at=start + second))
    (worker,) = hub.status().workers
    times = [point.at for point in worker.history]
    assert HISTORY_POINTS / 3 < len(times) <= HISTORY_POINTS
    assert times[0] == start
    assert times[-1] > start + 7 * 24 * 3600 * 0.99
    steps = [later - earlier for earlier, later in pairwise(times)]
    assert max(steps) < 3 * min(steps)


def test_a_job_in_several_turns_is_one_job() -> None:
    """Counts add up, the peak is the largest, the rate is over all of it."""
    hub = StatusHub(1, LEASE_S)
    first = job(done=10, damaged=2, failed={"ImageMissing": 1}, peak_bytes=5, started_at=100.0, ended_at=110.0)
    assert hub.add(snapshot(job=first))
    assert not hub.add(snapshot(job=job(done=3)))
    second = replace(first, done=20, failed={"ImageMissing": 2}, peak_bytes=3, started_at=120.0, ended_at=133.0)
    assert hub.add(snapshot(job=second))
    (ended,) = hub.status().jobs
    assert (ended.done, ended.failed, ended.peak_bytes) == (30, {"ImageMissing": 3}, 5)
    assert (ended.damaged, ended.truncated) == (4, 0)
    assert ended.images_per_s == pytest.approx(1.0)


def test_nothing_that_was_logged_can_leave_its_place_in_the_page() -> None:
    """An error text comes from outside: it may not end the script element it is carried in."""
    evil = "</script><script>alert(1)</script><!--"
    page = rendered_page(json.dumps({"text": evil}).encode()).decode()
    start = page.index('id="data">') + len('id="data">')
    inside = page[start : page.index("</script>", start)]
    assert json.loads(inside) == {"text": evil}
