"""Leases, empty answers and jobs that share the worker, on a real NATS server with leases of seconds."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from nats import connect

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.antenna.nats import LeaseKeeper
from adc_worker.antenna.wire import SuccessResult
from adc_worker.desk.job import Job
from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from adc_worker.errors import ExitCode
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.runtime.intake import TaskFetch
from tests.support.gate import Fault, Gate
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess, environment, run_to_end, worker

SIMULATED = ("--pipeline", "simulated")
IDLE = "--exit-when-idle"
Serve = Callable[..., DevServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start desk servers that end with the test."""
    running: list[AbstractContextManager[DevServer]] = []

    def start(**options: Any) -> DevServer:
        server = DevServer(**{"save_delay_s": 0.005, "image_dir": tmp_path, **options})
        running.append(server)
        return server.__enter__()

    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sheets(tmp_path_factory.mktemp("sheets"), 1, seed=3, sizes=((320, 240),))[0]


def terms(ack_wait_s: float, image_s: float, **more: str) -> dict[str, str]:
    return {
        "AMI_ANTENNA_ACK_WAIT_SECONDS": str(ack_wait_s),
        "AMI_SIMULATED_SECONDS_PER_IMAGE": str(image_s),
        **more,
    }


def succeeded(server: DevServer, job_id: int, timeout_s: float = 120.0) -> Job:
    wait_until(lambda: server.job(job_id).status == "SUCCESS", timeout_s)
    job = server.job(job_id)
    assert set(job.results) == set(job.image_ids)
    assert not job.errors
    return job


def stop(running: WorkerProcess) -> None:
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == ExitCode.OK


def test_no_task_is_delivered_twice_with_leases_of_ten_images(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """ack_wait 5 s, 0.5 s an image: what is held is done in time, from the first task on."""
    server = serve(ack_wait_s=5.0)
    job_id = server.add_job("simulated", [sheet] * 24)
    code, _log = run_to_end(environment(server, tmp_path / "data", terms(5, 0.5)), *SIMULATED, IDLE)
    assert code == ExitCode.OK
    assert set(succeeded(server, job_id).deliveries.values()) == {1}


def test_a_gpu_that_suddenly_takes_ten_times_longer_loses_nothing(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """What was held at the old rate is left to its lease in time to be delivered again, and no image a third time."""
    server = serve(ack_wait_s=3.0)
    job_id = server.add_job("slowing", [sheet] * 40)
    slowing = {"AMI_EXTRA_PIPELINES": "tests.support.slowing_pipeline:pipelines"}
    env = environment(server, tmp_path / "data", terms(3, 0, **slowing))
    code, _log = run_to_end(env, "--pipeline", "slowing", IDLE)
    assert code == ExitCode.OK
    assert max(succeeded(server, job_id).deliveries.values()) <= 2


def test_over_nats_leases_last_as_long_as_the_work(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """An image that takes longer than ack_wait is not delivered again."""
    server = serve(ack_wait_s=3.0)
    job_id = server.add_job("simulated", [sheet] * 2)
    env = environment(server, tmp_path / "data", terms(3, 4, AMI_ANTENNA_NATS_URL=server.nats_url))
    code, _log = run_to_end(env, *SIMULATED, IDLE)
    assert code == ExitCode.OK
    assert set(succeeded(server, job_id).deliveries.values()) == {1}


@pytest.mark.parametrize("extended", [True, False])
def test_over_nats_a_lease_lasts_until_its_result_is_saved(
    serve: Serve, sheet: Path, tmp_path: Path, *, extended: bool
) -> None:
    """Accepted is not saved: the server takes 4.5 s under leases of 3 s, and a peer asks all the time."""
    server = serve(ack_wait_s=3.0, save_delay_s=4.5)
    job_id = server.add_job("simulated", [sheet])
    lease, answered = LeaseTerms(3.0), threading.Event()
    with ExitStack() as stack:
        client = stack.enter_context(AntennaClient(server.api_url, server.token))
        journal = stack.enter_context(closing(Journal(tmp_path / "journal.db")))
        poster = Poster(journal, client, PosterLimits(1, 10_000))
        stack.callback(poster.close, 0.0)
        fetch = TaskFetch(job_id, client, journal, poster, lease)
        if extended:
            stack.enter_context(
                closing(
                    LeaseKeeper(
                        server.nats_url, lease, journal.subjects, fetch.unsaved, lambda: journal.held_count(job_id)
                    )
                )
            )
        fetch.begin_turn(answered.set)
        fetch.start(1)
        assert answered.wait(10)
        (held,) = journal.unfinished(job_id)
        journal.keep([(held.id, SuccessResult(held.task, "simulated", [], 0.1, "2026-01-01T00:00:00"))])
        poster.wake()
        while server.job(job_id).status != "SUCCESS":
            client.fetch_tasks(job_id, 1)  # each takes half a second to find nothing
    assert set(server.job(job_id).deliveries.values()) == {1 if extended else 2}


def test_nothing_is_published_but_to_subjects_of_acknowledgements(serve: Serve) -> None:
    """A task names its subject, and could name any."""
    server, heard = serve(), []

    async def listen(ready: threading.Event, enough: threading.Event) -> None:
        nats = await connect(server.nats_url)
        inbox = await nats.subscribe(">")
        await nats.flush()
        ready.set()
        await asyncio.to_thread(enough.wait, 10)
        await nats.flush()
        while inbox.pending_msgs:
            heard.append((await inbox.next_msg()).subject)
        await nats.close()

    ready, enough = threading.Event(), threading.Event()
    listener = threading.Thread(target=lambda: asyncio.run(listen(ready, enough)))
    listener.start()
    assert ready.wait(10)
    good = "$JS.ACK.job_1.job-1-consumer.1.1.1.1760000000000000000.0"
    with closing(LeaseKeeper(server.nats_url, LeaseTerms(), list, list, lambda: 0)) as keeper:
        wait_until(lambda: keeper.hand_back(["orders", f"{good} job.2.tasks 4\r\nPUB orders 0", "$JS.ACK.>", good]))
    enough.set()
    listener.join()
    assert [subject for subject in heard if not subject.startswith(("_INBOX", "$SYS"))] == [good]


def test_leases_count_as_extended_only_when_all_of_them_were(serve: Serve) -> None:
    """One of a stream that was not seen since a restart is not extended, and must not be believed to last."""
    server = serve()
    lease = LeaseTerms(1.0)
    good = "$JS.ACK.job_1.job-1-consumer.1.1.1.1760000000000000000.0"
    held_count = 2  # one more than is known to be good
    rounds = 0

    def look() -> list[str]:
        nonlocal rounds
        rounds += 1
        return [good]

    with closing(LeaseKeeper(server.nats_url, lease, look, list, lambda: held_count)):
        wait_until(lambda: rounds >= 6)
        assert lease.renewed_at == 0
        held_count = 1
        wait_until(lambda: lease.renewed_at > 0)


def test_over_nats_a_drain_hands_back_what_was_not_started(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """Another worker gets it at once, where it would wait for the end of the leases otherwise."""
    server = serve()
    job_id = server.add_job("simulated", [sheet] * 40)
    env = environment(server, tmp_path / "data", terms(300, 0.3, AMI_ANTENNA_NATS_URL=server.nats_url))
    with worker(env, *SIMULATED) as running:
        running.wait_for("nats_connected")
        running.wait_for("batch", count=1)
        stop(running)
    (back,) = running.events("tasks_handed_back")
    assert back["tasks"] > 0
    assert back["kept"] == 0
    code, _log = run_to_end(environment(server, tmp_path / "other", terms(300, 0.02)), *SIMULATED, IDLE)
    assert code == ExitCode.OK
    assert sum(succeeded(server, job_id).deliveries.values()) == 40 + back["tasks"]


def test_nats_that_cannot_be_reached_is_said_once_and_no_password_with_it(
    serve: Serve, sheet: Path, tmp_path: Path
) -> None:
    """The horizon alone holds then."""
    server = serve()
    job_id = server.add_job("simulated", [sheet] * 4)
    url = "nats://worker:hunter2@127.0.0.1:9"
    code, log = run_to_end(
        environment(server, tmp_path / "data", terms(300, 0.05, AMI_ANTENNA_NATS_URL=url)), *SIMULATED, IDLE
    )
    assert code == ExitCode.OK
    succeeded(server, job_id)
    (said,) = log.events("nats_unreachable")
    assert said["server"] == "127.0.0.1:9"
    assert "hunter2" not in "\n".join(log.lines)


def test_tasks_of_a_peer_that_dies_come_to_those_who_wait(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """Empty is not done: the worker asks again until the dead peer's leases are over, and ends only then."""
    server = serve(ack_wait_s=10.0)
    with Gate(server.api_url) as gate:
        gate.fault = lambda route: 503 if route == "GET jobs" else None
        env = environment(server, tmp_path / "data", terms(10, 0.05, AMI_ANTENNA_API_BASE_URL=gate.api_url))
        with worker(env, *SIMULATED, IDLE) as running:
            running.wait_for("worker_ready")  # its start may take longer than a lease
            job_id = server.add_job("simulated", [sheet] * 6)
            with AntennaClient(server.api_url, server.token) as peer:
                assert len(peer.fetch_tasks(job_id, 4)) == 4
            gate.open()
            assert running.wait() == ExitCode.OK
    assert sorted(succeeded(server, job_id).deliveries.values()) == [1, 1, 2, 2, 2, 2]
    assert len(running.events("job_summary")) > 1


def test_a_job_that_is_not_listed_any_more_is_still_drained(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """More than half of its images failed, so Antenna hides it, and still waits for the others."""
    server = serve(ack_wait_s=2.0)
    job_id = server.add_job("simulated", [*(f"gone-{number}.jpg" for number in range(7)), *[sheet] * 5])
    with AntennaClient(server.api_url, server.token) as peer:
        held = {task.image_id for task in peer.fetch_tasks(job_id, 12)[-3:]}  # these three come when all has failed
    with worker(environment(server, tmp_path / "data", terms(2, 0.05)), *SIMULATED) as running:
        wait_until(lambda: held <= set(server.job(job_id).results) and server.job(job_id).failed == 7, timeout_s=120)
        stop(running)


def test_a_cancelled_job_is_dropped_and_nothing_of_it_posted(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """Staged images go, the batch in hand is thrown away, and the next job is done."""
    server = serve()
    job_id = server.add_job("simulated", [sheet] * 200)
    data = tmp_path / "data"
    with worker(environment(server, data, terms(300, 0.1)), *SIMULATED) as running:
        running.wait_for("batch", count=2)
        server.cancel(job_id)
        (over,) = [running.wait_for("job_over")]
        assert over["status"] == "REVOKED"
        assert over["dropped"] > 0
        posted = server.job(job_id).posts.total()
        succeeded(server, server.add_job("simulated", [sheet] * 3))
        assert server.job(job_id).posts.total() <= posted + 4  # one post may have been under way: Antenna drops it
        wait_until(lambda: not list((data / "staging").rglob("*.img")))
        stop(running)
    assert "Traceback" not in "\n".join(running.lines)


def test_a_fetch_that_fails_backs_off_and_bursts_at_nothing(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """503 and lost answers: few requests, and one task asked for until one answer arrives."""
    server = serve(ack_wait_s=6.0)
    job_id = server.add_job("simulated", [sheet] * 12)
    faults: Iterator[Fault] = iter([503, 503, "cut"])
    with Gate(server.api_url) as gate:
        gate.fault = lambda route: next(faults, None) if route == "POST tasks" else None
        env = environment(server, tmp_path / "data", terms(6, 0.05, AMI_ANTENNA_API_BASE_URL=gate.api_url))
        with worker(env, *SIMULATED) as running:
            job = succeeded(server, job_id)
            stop(running)
    assert len(running.events("fetch_failed")) == 3
    assert sorted(job.deliveries.values())[-2:] == [1, 2]


def test_nats_may_be_killed_and_restarted_mid_job(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """Fetches answer 503 meanwhile; what is staged is worked on, and all comes to its end."""
    server = serve(nats_timeout_s=1.0, ack_wait_s=20.0)
    job_id = server.add_job("simulated", [sheet] * 60)
    env = environment(server, tmp_path / "data", terms(20, 0.05, AMI_ANTENNA_NATS_URL=server.nats_url))
    with worker(env, *SIMULATED) as running:
        running.wait_for("batch", count=2)
        server.kill_nats()
        running.wait_for("fetch_failed")
        running.wait_for("nats_unreachable")
        server.start_nats()
        running.wait_for("nats_connected", count=2)
        succeeded(server, job_id)
        stop(running)


@pytest.mark.soak
@pytest.mark.parametrize("how", ["stream", "store"])
def test_a_stream_that_vanishes_ends_neither_worker_nor_staged_work(
    serve: Serve, sheet: Path, tmp_path: Path, how: str
) -> None:
    """What was fetched is posted, the job is asked ever less often, and another job is done."""
    server = serve(nats_timeout_s=1.0)
    job_id = server.add_job("simulated", [sheet] * 100)
    with worker(environment(server, tmp_path / "data", terms(300, 0.1)), *SIMULATED) as running:
        running.wait_for("batch", count=2)
        if how == "stream":
            server.delete_stream(job_id)
        else:
            server.kill_nats(wipe=True)
            server.start_nats()
        fetched = server.job(job_id).deliveries.total()
        assert fetched < 100
        wait_until(lambda: server.job(job_id).processed == fetched, timeout_s=90)
        succeeded(server, server.add_job("simulated", [sheet] * 3))
        stop(running)


@pytest.mark.soak
def test_a_server_that_saves_slowly_is_not_overrun(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """0.5 results/s, 50 images that take 100 s under leases of 60 s: the GPU waits, and nothing is delivered twice."""
    server = serve(save_delay_s=2.0, ack_wait_s=60.0)
    job_id = server.add_job("simulated", [sheet] * 50)
    with worker(environment(server, tmp_path / "data", terms(60, 0.02)), *SIMULATED) as running:
        assert set(succeeded(server, job_id, timeout_s=150).deliveries.values()) == {1}
        stop(running)


def test_a_one_image_job_waits_for_the_batch_in_hand_only(serve: Serve, sheet: Path, tmp_path: Path) -> None:
    """It is done while a job of 500 images goes on, which neither probes nor plans anew."""
    server = serve()
    large = server.add_job("simulated", [sheet] * 500)
    with worker(environment(server, tmp_path / "data", terms(300, 0.1)), *SIMULATED) as running:
        running.wait_for("batch", count=2)
        asked_at = time.monotonic()
        small = succeeded(server, server.add_job("simulated", [sheet]))
        assert small.first_saved_s is not None
        assert small.first_saved_s - asked_at < 20  # a poll every 1.2 s, a batch of 0.4 s; the other job takes 50 s
        batches = len(running.events("batch"))
        running.wait_for("batch", count=batches + 3)
        assert len([plan for plan in running.events("plan") if plan["job_id"] == large]) == 1
        assert set(server.job(large).deliveries.values()) == {1}
        os.kill(running.child_pid(), signal.SIGKILL)


@pytest.mark.soak
def test_six_jobs_share_two_workers(
    serve: Serve, sheet: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """2 x 10, 2 x 100 and 2 x 500 images of 0.5 s, all clocks at half: five minutes stand for Antenna's ten.

    Each job saves something at least every five minutes, none is delivered twice, and from the first result to the last
    it takes at most 5 % longer than two workers take for the images one after the other.
    """
    server, image_s, rule_s = serve(), 0.5, 300.0
    images = (500, 10, 100, 10, 500, 100)
    jobs = [server.add_job("simulated", [sheet] * count) for count in images]
    more = terms(300, image_s, AMI_ANTENNA_JOB_SLICE_SECONDS=str(480 / 5 / 2))
    saved: dict[int, list[tuple[float, int]]] = {job_id: [(time.monotonic(), 0)] for job_id in jobs}

    def all_saved() -> bool:
        for job_id, seen in saved.items():
            if (processed := server.job(job_id).processed) > seen[-1][1]:
                seen.append((time.monotonic(), processed))
        return all(seen[-1][1] == count for seen, count in zip(saved.values(), images, strict=True))

    with (
        worker(environment(server, tmp_path / "a", more), *SIMULATED, IDLE) as first,
        worker(environment(server, tmp_path / "b", more), *SIMULATED, IDLE) as second,
    ):
        wait_until(all_saved, timeout_s=2 * rule_s)
        views = [succeeded(server, job_id) for job_id in jobs]
        for running in (first, second):
            stop(running)
    silence_s = max(later - at for seen in saved.values() for (at, _), (later, _) in itertools.pairwise(seen))
    took_s = max(view.last_saved_s or 0.0 for view in views) - min(view.first_saved_s or 0.0 for view in views)
    cost = took_s / (sum(images) * image_s / 2)
    record_property("longest_silence_s", silence_s)
    record_property("of_serial", cost)
    assert silence_s < rule_s
    assert cost < 1.05
    assert {count for view in views for count in view.deliveries.values()} == {1}
