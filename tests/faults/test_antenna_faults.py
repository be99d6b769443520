"""An Antenna that fails at each endpoint and in each way: every image has one outcome, and none is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.wire import error_result
from adc_worker.desk.server import DevServer
from adc_worker.errors import AntennaUnreachable, ExitCode
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from tests.faults.conftest import ALGORITHMS, Desk
from tests.support import counting_pipeline
from tests.support.counting_pipeline import NAN_IMAGE, numbered
from tests.support.gate import Fault, Gate
from tests.support.image_server import ImageServer, Reply
from tests.support.waiting import wait_until
from tests.support.workers import run_to_end, worker

IMAGES = 30
ENDPOINTS = ("GET jobs", "GET job", "POST result")


def test_outages_at_every_endpoint_cost_nothing(desk: Desk) -> None:
    """500, 503, resets and answers that break off; /result/ saves and then cuts the line, and is posted again."""
    faults: dict[str, Iterator[Fault | None]] = {
        route: iter([500, "reset", None, "cut", None, 503]) for route in ENDPOINTS
    }
    faults["POST tasks"] = iter([None, 500, "reset", 503])  # these are refused before a task is spent
    started: list[str] = []

    def fault(route: str) -> Fault | None:
        started.append(route)
        # The first contact is through: at start an Antenna out of reach is a wrong setting.
        return next(faults[route], None) if "POST tasks" in started else None

    desk.gate.fault = fault
    job_id = desk.add_job(IMAGES)
    code, _log = run_to_end(desk.environment(), "--exit-when-idle")
    assert code == ExitCode.OK
    job = desk.done(job_id)
    assert set(job.deliveries.values()) == {1}
    assert set(desk.inferred.values()) == {1}
    assert set(desk.downloads().values()) == {1}
    assert desk.gate.requests["POST result"] > 3


class _Impatient(httpx.HTTPTransport):
    """Waits a moment for an answer that will not come, where the worker waits minutes."""

    def __init__(self, silent: set[str]) -> None:
        super().__init__()
        self._silent = silent

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        patience_s = 0.3 if self._silent else 20.0
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), patience_s)
        return super().handle_request(request)


def test_an_answer_that_never_comes_is_an_outage_at_every_endpoint(desk: Desk) -> None:
    """And results that were saved without an answer are posted again, and counted once."""
    job_id = desk.add_job(2)
    silent: set[str] = set()
    desk.gate.fault = lambda route: "withhold" if route in silent else None
    with AntennaClient(desk.gate.api_url, desk.antenna.token, _Impatient(silent)) as client:
        tasks = client.fetch_tasks(job_id, 2)
        silent.add("POST result")
        journal = Journal(desk.folder / "journal.db")
        journal.keep([(held.id, [error_result(held.task.image_id, "?")]) for held in journal.record(job_id, tasks)])
        poster = Poster(journal, client, PosterLimits(1, 10_000))
        wait_until(lambda: desk.gate.held["POST result"])
        silent |= {"POST tasks", "GET jobs", "GET job"}
        for ask in (
            lambda: client.fetch_tasks(job_id, 1),
            lambda: client.jobs([counting_pipeline.SLUG]),
            lambda: client.job(job_id),
        ):
            with pytest.raises(AntennaUnreachable, match="ReadTimeout"):
                ask()
        silent.clear()
        desk.gate.open()
        assert poster.wait_idle(40)
        poster.close(0)
        journal.close()
    job = desk.antenna.job(job_id)
    assert set(job.errors) == set(job.image_ids)
    assert min(job.posts.values()) > 1
    assert set(job.deliveries.values()) == {1}


def test_a_refused_token_stops_fetching_and_is_named_until_it_is_accepted(desk: Desk) -> None:
    """401 at /result/ while the job runs: nothing more is fetched, nothing is lost, and it resumes by itself."""
    desk.switch("hold", on=True)
    job_id = desk.add_job(200)
    with worker(desk.environment({"AMI_ANTENNA_API_BATCH_SIZE": "8"})) as running:
        wait_until(lambda: desk.gate.requests["POST tasks"] >= 2, timeout_s=90)
        desk.gate.fault = lambda route: 401 if route == "POST result" else None
        desk.switch("hold", on=False)
        said = running.wait_for("post_failed")
        assert "AMI_ANTENNA_API_AUTH_TOKEN" in said["error"]
        fetches = desk.gate.requests["POST tasks"]
        running.wait_for("post_failed", count=4)
        assert desk.gate.requests["POST tasks"] <= fetches + 1, "one may have been under way"
        desk.gate.open()
        job = desk.done(job_id)
    assert set(job.deliveries.values()) == {1}


def test_results_that_antenna_refuses_become_errors_of_their_images_alone(tmp_path: Path) -> None:
    """Scores that are NaN are never posted; a body above 6 kB makes any post 413; the job still ends.

    This Antenna also loses count of a job's last two results: it ends because one of them is posted again.
    """
    with (
        DevServer(save_delay_s=0.001, max_body_bytes=6_000, race_at_end=True) as antenna,
        Gate(antenna.api_url) as gate,
        ImageServer() as images,
    ):
        desk = Desk(antenna, gate, images, tmp_path)
        numbers = [*range(40), NAN_IMAGE, *range(40, 60)]
        long_name = "/" + "x" * 7_000 + ".png"  # its URL is part of its result
        for number in numbers:
            images.replies[f"/{number}.png"] = Reply(numbered(number))
        images.replies[long_name] = Reply(numbered(60))
        urls = [images.url(f"/{number}.png") for number in numbers]
        urls.insert(30, images.url(long_name))
        job_id = antenna.add_job(counting_pipeline.SLUG, urls, algorithms=ALGORITHMS)
        code, log = run_to_end(desk.environment(), "--exit-when-idle")
        assert code == ExitCode.OK
        wait_until(lambda: antenna.job(job_id).status == "SUCCESS", timeout_s=90)
        job = antenna.job(job_id)
    told = dict(zip(job.image_ids, urls, strict=True))
    reasons = {told[image_id]: text for image_id, text in job.errors.items()}
    assert set(reasons) == {images.url(f"/{NAN_IMAGE}.png"), images.url(long_name)}
    assert "not finite numbers" in reasons[images.url(f"/{NAN_IMAGE}.png")]
    assert "bytes as too large (AMI_ANTENNA_MAX_POST_BYTES is 8000000)" in reasons[images.url(long_name)]
    assert len(job.results) == 60
    assert log.events("result_repeated"), "the race was ended by a repeat"
    assert set(Counter(job.deliveries).values()) == {1}


@pytest.mark.soak
def test_a_fetch_whose_answer_is_lost_costs_one_delivery_and_no_image(tmp_path: Path) -> None:
    """Its tasks come again when their lease is over."""
    with (
        DevServer(save_delay_s=0.001, ack_wait_s=2.0, keep_streams=True) as antenna,
        Gate(antenna.api_url) as gate,
        ImageServer() as images,
    ):
        desk = Desk(antenna, gate, images, tmp_path)
        lost: Iterator[Fault | None] = iter([None, "cut"])
        desk.gate.fault = lambda route: next(lost, None) if route == "POST tasks" else None
        job_id = desk.add_job(IMAGES)
        with worker(desk.environment({"AMI_ANTENNA_ACK_WAIT_SECONDS": "2"})):
            wait_until(lambda: 2 in antenna.job(job_id).deliveries.values(), timeout_s=90)
            desk.gate.open()
            job = desk.done(job_id)
    assert max(job.deliveries.values()) == 2
    assert set(desk.inferred.values()) == {1}
