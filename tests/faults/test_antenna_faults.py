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
from tests.support.gate import FORBIDDEN, INVALID_TOKEN, Answer, Fault, Gate
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
        desk.gate.fault = lambda route: INVALID_TOKEN if route == "POST result" else None
        desk.switch("hold", on=False)
        said = running.wait_for("post_failed")
        assert "AMI_ANTENNA_API_AUTH_TOKEN" in said["error"]
        fetches = desk.gate.requests["POST tasks"]
        running.wait_for("post_failed", count=4)
        assert desk.gate.requests["POST tasks"] <= fetches + 1, "one may have been under way"
        desk.gate.open()
        job = desk.done(job_id)
    assert set(job.deliveries.values()) == {1}


PAGE = b"<html><head><title>Back soon</title></head></html>"
IN_THE_WAY = {
    "200 page": Answer(200, PAGE, "text/html"),
    "200 object": Answer(200, b"{}"),
    "200 detail": Answer(200, b'{"detail": "maintenance"}'),
    "200 accepted, of nothing": Answer(200, b'{"status":"accepted","job_id":0,"results_queued":9,"tasks":[]}'),
    "204": Answer(204, b""),
    "400 page": Answer(400, PAGE, "text/html"),
    "400 gateway": Answer(400, b'{"message": "Bad request"}'),
    "403 page": Answer(403, PAGE, "text/html"),
    "404 page": Answer(404, PAGE, "text/html"),
    "404 gateway": Answer(404, b'{"message": "no Route matched with those values"}'),
    "404 of another job": Answer(404, b'{"detail": "Not found."}'),
    "413 page": Answer(413, PAGE, "text/html"),
    "422": Answer(422, b'{"detail": [{"loc": ["body", "results", 0], "msg": "field required"}]}'),
}


def test_whatever_answers_in_antennas_place_costs_no_result(tmp_path: Path) -> None:
    """Each answer to some posts, while the images have one delivery each: every result is accepted in the end.

    Four jobs share the answers, since each job's posts are tried again ever more slowly.
    """
    with (
        DevServer(save_delay_s=0.001, keep_streams=True, max_deliver=1) as antenna,
        Gate(antenna.api_url) as gate,
        ImageServer() as images,
    ):
        desk = Desk(antenna, gate, images, tmp_path)
        jobs = [desk.add_job(4, first=10 * number) for number in range(4)]
        every = list(IN_THE_WAY.values())
        answers = {job_id: iter(every[place :: len(jobs)]) for place, job_id in enumerate(jobs)}

        def fault(route: str, job_id: int | None) -> Fault | None:
            return next(answers[job_id], None) if route == "POST result" and job_id in answers else None

        desk.gate.job_fault = fault
        with worker(desk.environment({"AMI_ANTENNA_MAX_DELIVER": "1"})) as running:
            done = [desk.done(job_id) for job_id in jobs]
        assert all(next(left, None) is None for left in answers.values()), "every answer was given"
    assert all(set(job.deliveries.values()) == {1} for job in done)
    assert set(desk.inferred.values()) == {1}
    assert not running.events("result_replaced_by_error")


@pytest.mark.parametrize("status", [200, 204, 400, 404, 422])
def test_a_page_at_every_endpoint_is_an_outage(desk: Desk, status: int) -> None:
    """A fetch that it answers does not mean that there are no tasks, and a job's detail not that the job is gone."""
    job_id = desk.add_job(IMAGES)
    pages = {route: iter([None, status, status]) for route in ("GET jobs", "GET job", "POST tasks", "POST result")}
    desk.gate.fault = lambda route: next(pages[route], None)
    with worker(desk.environment()) as running:
        job = desk.done(job_id)
        assert not running.events("results_useless")
    assert set(job.deliveries.values()) == {1}


def test_a_job_that_is_refused_holds_up_no_other_job(desk: Desk) -> None:
    """403 at its posts: nothing more of it is fetched; another is done meanwhile; it goes on once it is allowed."""
    refused = desk.add_job(60)
    desk.gate.job_fault = lambda route, job_id: FORBIDDEN if (route, job_id) == ("POST result", refused) else None
    with worker(desk.environment({"AMI_ANTENNA_API_BATCH_SIZE": "4"})) as running:
        running.wait_for("post_failed")
        other = desk.add_job(IMAGES, first=100)
        desk.done(other)
        assert len(desk.antenna.job(refused).deliveries) < 60
        assert desk.antenna.job(refused).results == {}
        desk.gate.open()
        job = desk.done(refused)
    assert set(job.deliveries.values()) == {1}
    assert set(desk.inferred.values()) == {1}


def test_a_token_that_is_restored_is_noticed_without_a_new_job(desk: Desk) -> None:
    """The job whose posts were refused is cancelled meanwhile: the refusal ends with it, and the next job is done."""
    cancelled = desk.add_job(12)
    desk.gate.fault = lambda route: INVALID_TOKEN if route == "POST result" else None
    with worker(desk.environment()) as running:
        running.wait_for("post_failed", count=2)
        waiting = desk.add_job(12, first=100)
        desk.antenna.cancel(cancelled)
        running.wait_for("job_over")
        desk.gate.open()
        desk.done(waiting)


def test_a_job_that_was_made_private_keeps_no_batch_worker_from_ending(desk: Desk) -> None:
    """Its results stay on record, and are posted by a later start, once Antenna takes them."""
    private = desk.add_job(12)

    def fault(route: str, job_id: int) -> Fault | None:
        """The project is made private once its first tasks were handed out: in which run they are is known."""
        is_private = desk.gate.requests["POST tasks"] > 0 and route != "POST tasks"
        return FORBIDDEN if job_id == private and is_private else None

    desk.gate.job_fault = fault
    env = desk.environment({"AMI_ANTENNA_ACK_WAIT_SECONDS": "2"})
    code, log = run_to_end(env, "--exit-when-idle")
    assert code == ExitCode.OK
    (left,) = log.events("idle_with_results_left")
    assert left["jobs"] == [private]
    assert desk.antenna.job(private).results == {}
    desk.gate.open()
    inferred = desk.inferred
    code, _log = run_to_end(env, "--exit-when-idle")
    assert code == ExitCode.OK
    job = desk.done(private)
    assert all(desk.inferred[number] == 1 for number in inferred), "what was kept is not computed again"
    assert set(job.errors) == set()


def test_results_that_antenna_refuses_become_errors_of_their_images_alone(tmp_path: Path) -> None:
    """Scores that are NaN are never posted; a result that only the way does not take waits; the others are saved.

    A body above 6 kB makes any post 413. Once the proxy takes it, the large result is accepted as it is. This Antenna
    also loses count of a job's last two results: it ends because one of them is posted again.
    """
    with (
        DevServer(save_delay_s=0.001, race_at_end=True) as antenna,
        Gate(antenna.api_url) as gate,
        ImageServer() as images,
    ):
        desk = Desk(antenna, gate, images, tmp_path)
        gate.max_body_bytes = 6_000
        numbers = [*range(40), NAN_IMAGE, *range(40, 60)]
        long_name = "/" + "x" * 7_000 + ".png"  # its URL is part of its result
        for number in numbers:
            images.replies[f"/{number}.png"] = Reply(numbered(number))
        images.replies[long_name] = Reply(numbered(60))
        urls = [images.url(f"/{number}.png") for number in numbers]
        urls.insert(30, images.url(long_name))
        job_id = antenna.add_job(counting_pipeline.SLUG, urls, algorithms=ALGORITHMS)
        with worker(desk.environment(), "--exit-when-idle") as running:
            wait_until(lambda: antenna.job(job_id).processed == len(urls) - 1, timeout_s=120)
            held_back = running.wait_for("result_held_back", count=2)
            assert "client_max_body_size" in held_back["do"]
            assert antenna.job(job_id).status == "STARTED"
            gate.max_body_bytes = None
            wait_until(lambda: antenna.job(job_id).status == "SUCCESS", timeout_s=90)
            assert running.wait() == ExitCode.OK
        job = antenna.job(job_id)
    told = dict(zip(job.image_ids, urls, strict=True))
    reasons = {told[image_id]: text for image_id, text in job.errors.items()}
    assert set(reasons) == {images.url(f"/{NAN_IMAGE}.png")}
    assert "not finite numbers" in reasons[images.url(f"/{NAN_IMAGE}.png")]
    assert len(job.results) == 61
    assert running.events("result_repeated"), "the race was ended by a repeat"
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
