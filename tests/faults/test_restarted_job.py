"""Cancel + retry: what was kept from before is never posted with an old subject, and is not computed again either."""

from __future__ import annotations

import os
import signal

import pytest

from adc_worker.errors import ExitCode
from tests.faults.conftest import Desk
from tests.support.waiting import wait_until
from tests.support.workers import run_to_end, worker

IMAGES = 8  # fewer than a probe holds, so that it goes on fetching


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param(True, id="worker is away meanwhile"),
        pytest.param(False, id="worker holds results meanwhile", marks=pytest.mark.soak),
    ],
)
def test_kept_results_are_posted_into_the_new_stream_of_a_restarted_job_only_with_its_subjects(
    desk: Desk, *, killed: bool
) -> None:
    """An old subject would acknowledge another image: the devserver deals the images in another order."""
    desk.gate.fault = lambda route: 503 if route == "POST result" else None
    job_id = desk.add_job(IMAGES)
    env = desk.environment()
    with worker(env) as running:
        wait_until(lambda: sum(desk.inferred.values()) == IMAGES, timeout_s=90)
        running.wait_for("post_failed")
        if killed:
            os.killpg(running.process.pid, signal.SIGKILL)
            wait_until(lambda: running.process.poll() is not None)
        desk.antenna.cancel(job_id)
        desk.antenna.retry(job_id)
        if not killed:
            running.wait_for("subjects_dead", timeout_s=90)
        desk.gate.open()
        if killed:
            code, _log = run_to_end(env, "--exit-when-idle")
            assert code == ExitCode.OK
        job = desk.done(job_id)
    consumer = desk.antenna.consumer_info(job_id)
    assert consumer is not None
    assert consumer["ack_floor"]["stream_seq"] == IMAGES, "each message of the new stream was acknowledged"
    assert consumer["num_redelivered"] == 0
    assert set(job.posts.values()) == {1}, "nothing was posted before its subject was good"
    assert set(desk.inferred.values()) == {1}, "images that come again are answered from the journal"


def test_nothing_is_posted_to_a_job_that_was_cancelled_while_the_worker_was_away(desk: Desk) -> None:
    """Before it posts what it kept, a worker that comes back looks at the job."""
    desk.gate.fault = lambda route: 503 if route == "POST result" else None
    job_id = desk.add_job(IMAGES)
    env = desk.environment()
    with worker(env) as running:
        running.wait_for("post_failed")
        os.killpg(running.process.pid, signal.SIGKILL)
        wait_until(lambda: running.process.poll() is not None)
    desk.antenna.cancel(job_id)
    desk.gate.open()
    before = desk.gate.requests["POST result"]
    code, log = run_to_end(env, "--exit-when-idle")
    assert code == ExitCode.OK
    assert desk.gate.requests["POST result"] == before
    assert "REVOKED" in log.wait_for("post_failed")["error"]


def test_a_worker_of_another_pipeline_posts_what_was_kept_takes_no_task_and_ends(desk: Desk) -> None:
    """It holds tasks that nobody here works on: they wait for whoever does, and keep nobody from ending."""
    desk.gate.fault = lambda route: 503 if route == "POST result" else None
    desk.switch("hold", on=True)
    job_id = desk.add_job(40)
    env = desk.environment({"AMI_SHUTDOWN_GRACE_SECONDS": "3"})
    with worker(env) as running:
        wait_until(lambda: desk.gate.requests["POST tasks"] >= 2, timeout_s=90)
        desk.switch("hold", on=False)
        running.wait_for("post_failed")
        os.killpg(running.process.pid, signal.SIGTERM)
        assert running.wait() == ExitCode.OK
    desk.gate.open()
    before = desk.antenna.job(job_id)
    fetches = desk.gate.requests["POST tasks"]
    short_lease = {"AMI_ANTENNA_ACK_WAIT_SECONDS": "2"}
    code, _log = run_to_end(env | short_lease, "--pipeline", "simulated", "--exit-when-idle")
    assert code == ExitCode.OK
    after = desk.antenna.job(job_id)
    assert (after.deliveries, desk.gate.requests["POST tasks"]) == (before.deliveries, fetches)
    assert before.posts.total() == 0
    assert after.posts.total() > 0
    assert set(after.posts.values()) == {1}
