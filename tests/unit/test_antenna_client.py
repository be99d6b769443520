"""The client asks as the contract says, and turns every answer into a value or into what must be done about it."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
import orjson
import pytest

from adc_worker.antenna.client import TASKS_READ_TIMEOUT_S, AntennaClient
from adc_worker.antenna.wire import JobRef, PostEntry
from adc_worker.errors import (
    AntennaBodyTooLarge,
    AntennaError,
    AntennaRefused,
    AntennaRejected,
    AntennaUnavailable,
    AntennaUnreachable,
    NotAntenna,
)
from adc_worker.redaction import redact

TOKEN = "0123456789abcdef0123456789abcdef01234567"
EMPTY = {"tasks": [], "results": [], "id": 7, "status": "STARTED"}
ACCEPTED = {"status": "accepted", "job_id": 7, "results_queued": 0, "tasks": []}


def empty_answer(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=ACCEPTED if request.url.path.endswith("/result/") else EMPTY)


class Antenna(httpx.MockTransport):
    """Answers every request with one answer and remembers what was asked."""

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response] | httpx.Response | None = None) -> None:
        super().__init__(self._respond)
        self._answer = answer or empty_answer
        self.requests: list[httpx.Request] = []

    def _respond(self, request: httpx.Request) -> httpx.Response:
        request.read()  # a streamed body is there once it was read
        self.requests.append(request)
        return self._answer if isinstance(self._answer, httpx.Response) else self._answer(request)


def client(antenna: Antenna) -> AntennaClient:
    return AntennaClient("http://antenna.test/api/v2", TOKEN, transport=antenna)


def error_of(response: httpx.Response) -> AntennaError:
    with client(Antenna(response)) as asked, pytest.raises(AntennaError) as caught:
        asked.fetch_tasks(7, 2)
    return caught.value


def test_every_request_goes_to_a_path_that_ends_in_a_slash_with_the_token() -> None:
    """Without the slash Antenna redirects a POST into a GET."""
    antenna = Antenna()
    with client(antenna) as asked:
        asked.jobs(["moths"])
        asked.job(7)
        asked.fetch_tasks(7, 2)
        asked.post_results(7, [])
    assert [(request.method, request.url.path) for request in antenna.requests] == [
        ("GET", "/api/v2/jobs/"),
        ("GET", "/api/v2/jobs/7/"),
        ("POST", "/api/v2/jobs/7/tasks/"),
        ("POST", "/api/v2/jobs/7/result/"),
    ]
    assert {request.headers["authorization"] for request in antenna.requests} == {f"Token {TOKEN}"}
    assert all(request.headers["user-agent"].startswith("adc-worker/") for request in antenna.requests)


def test_jobs_are_asked_for_in_the_one_way_that_lists_them_all() -> None:
    """ids_only without a limit answers with one random job; without a status with jobs that have no tasks."""
    antenna = Antenna()
    with client(antenna) as asked:
        asked.jobs(["moths", "blobs"])
    assert dict(antenna.requests[0].url.params) == {
        "pipeline__slug__in": "moths,blobs",
        "ids_only": "1",
        "incomplete_only": "1",
        "dispatch_mode": "async_api",
        "status": "STARTED",
        "limit": "50",
    }


def test_jobs_of_one_project_only_are_asked_for_when_that_is_wanted() -> None:
    """`--project` reaches Antenna."""
    antenna = Antenna()
    with client(antenna) as asked:
        asked.jobs(["moths"], project=3)
    assert antenna.requests[0].url.params["project"] == "3"


def test_the_listed_jobs_are_returned() -> None:
    """As values."""
    answer = httpx.Response(200, json={"count": 1, "results": [{"id": 12, "pipeline_slug": "moths"}]})
    with client(Antenna(answer)) as asked:
        assert asked.jobs(["moths"]) == [JobRef(id=12, pipeline_slug="moths")]


def test_a_fetch_says_how_many_and_waits_longer_than_antenna_does() -> None:
    """With NATS down the answer comes after 120 s; a fetch that is given up has still spent its deliveries."""
    antenna = Antenna()
    with client(antenna) as asked:
        asked.fetch_tasks(7, 24)
    (request,) = antenna.requests
    assert orjson.loads(request.content) == {"batch_size": 24}
    assert request.headers["content-type"] == "application/json"
    assert request.extensions["timeout"]["read"] == TASKS_READ_TIMEOUT_S > 120


ERROR = b'{"error":"e","image_id":"1"}'


def test_fetches_and_posts_say_who_asks() -> None:
    """Which of an operator's machines holds a task shows at Antenna."""
    antenna, who = Antenna(), {"hostname": "trap-7", "software": "adc-worker", "instance": 1, "gpu": None}
    with AntennaClient("http://antenna.test/api/v2", TOKEN, transport=antenna, client_info=who) as asked:
        asked.fetch_tasks(7, 1)
        asked.post_results(
            7, [PostEntry("s1", len(ERROR), lambda: [ERROR]), PostEntry("s2", len(ERROR), lambda: [ERROR])]
        )
    fetch, post = antenna.requests
    assert orjson.loads(fetch.content) == {"batch_size": 1, "client_info": who}
    body = orjson.loads(post.content)
    assert body["client_info"] == who
    assert [entry["reply_subject"] for entry in body["results"]] == ["s1", "s2"]
    assert int(post.headers["content-length"]) == len(post.content)


def test_results_are_posted_as_json() -> None:
    """Anything else is answered with 415."""
    antenna = Antenna()
    with client(antenna) as asked:
        asked.post_results(7, [PostEntry("subject", len(ERROR), lambda: [ERROR[:5], ERROR[5:]])])
    (request,) = antenna.requests
    assert request.headers["content-length"] == str(len(request.content))
    assert "transfer-encoding" not in request.headers
    assert request.headers["content-type"] == "application/json"
    assert orjson.loads(request.content) == {
        "results": [{"reply_subject": "subject", "result": {"error": "e", "image_id": "1"}}]
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AntennaRefused),
        (403, AntennaRefused),
        (408, AntennaUnavailable),
        (425, AntennaUnavailable),
        (429, AntennaUnavailable),
        (500, AntennaUnavailable),
        (502, AntennaUnavailable),
        (503, AntennaUnavailable),
        (504, AntennaUnavailable),
        (400, AntennaRejected),
        (405, AntennaRejected),
        (413, AntennaBodyTooLarge),
        (415, AntennaRejected),
    ],
)
def test_a_status_decides_what_is_to_be_done(status: int, kind: type[AntennaError]) -> None:
    """Exactly that class: a refusal is no reason to retry, an outage none to drop a result."""
    error = error_of(httpx.Response(status, json={"detail": "because of this"}))
    assert type(error) is kind
    assert str(error) == f"POST /jobs/7/tasks/ answered {status}: because of this"
    assert getattr(error, "status", status) == status


def test_a_job_that_antenna_does_not_know_is_over() -> None:
    """Deleted: what is kept for it is useless."""
    with client(Antenna(httpx.Response(404, json={"detail": "Not found."}))) as asked:
        assert asked.job(7).is_lost


def test_a_task_of_another_job_is_left_to_its_lease() -> None:
    """Its result would be saved at this job and acknowledge an image of that one; unknown subjects are opaque."""
    subjects = ["$JS.ACK.job_7.job-7-consumer.1.1.1.1.0", "$JS.ACK.job_8.job-8-consumer.1.2.2.1.0", "$JS.ACK.new.form"]
    tasks = [{"image_id": "1", "image_url": "https://h/1.jpg", "reply_subject": subject} for subject in subjects]
    with client(Antenna(httpx.Response(200, json={"tasks": tasks}))) as asked:
        assert [task.reply_subject for task in asked.fetch_tasks(7, 1)] == [subjects[0], subjects[2]]


def test_a_token_that_antenna_quotes_does_not_reach_a_log() -> None:
    """Whatever stands around it; the client has told redaction what to look for."""
    error = error_of(httpx.Response(401, json={"detail": f"no user has {TOKEN}"}))
    assert redact(str(error)) == "POST /jobs/7/tasks/ answered 401: no user has <redacted>"


def test_a_list_of_problems_is_shown() -> None:
    """Antenna says which result of a post was invalid."""
    assert "not async_api" in str(error_of(httpx.Response(400, json=["Job is not async_api"])))


def test_a_page_of_a_proxy_is_shown_in_part() -> None:
    """HTML is no answer of Antenna's."""
    message = str(error_of(httpx.Response(502, html=f"<html>Bad Gateway{'!' * 5000}</html>")))
    assert "<html>Bad Gateway" in message
    assert len(message) < 400


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_but_explained(status: int) -> None:
    """A token must not travel to another host. Only a permanent one to the same path says where Antenna moved to."""
    headers = {"location": "https://elsewhere.test/api/v2/jobs/7/tasks/?next=secret"}
    antenna = Antenna(httpx.Response(status, headers=headers))
    with client(antenna) as asked, pytest.raises(NotAntenna, match="AMI_ANTENNA_API_BASE_URL") as caught:
        asked.fetch_tasks(7, 2)
    assert len(antenna.requests) == 1
    assert "secret" not in str(caught.value)
    moved_to = "https://elsewhere.test/api/v2/jobs/7/tasks/"
    assert caught.value.moved_to == (moved_to if status in {301, 308} else "")


@pytest.mark.parametrize("target", ["", "http://[broken", "/maintenance/", "/api/v2/jobs/7/tasks/"])
def test_a_redirect_to_nowhere_or_to_another_page_is_no_move(target: str) -> None:
    """It says nothing about the address of Antenna, and the client raises nothing but its own errors."""
    error = error_of(httpx.Response(301, headers={"location": target} if target else {}))
    assert isinstance(error, NotAntenna)
    assert error.moved_to == ""


@pytest.mark.parametrize(
    "kind", [httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadTimeout, httpx.RemoteProtocolError, httpx.WriteError]
)
def test_without_an_answer_antenna_is_unreachable(kind: type[httpx.TransportError]) -> None:
    """Whatever broke on the way; the cause is kept."""

    def break_off(request: httpx.Request) -> httpx.Response:
        raise kind("no way", request=request)

    with client(Antenna(break_off)) as asked, pytest.raises(AntennaUnreachable) as caught:
        asked.job(7)
    assert re.fullmatch(rf"GET https?://.+/jobs/7/: {kind.__name__}: no way", str(caught.value))
    assert caught.value.connected is not kind.__name__.startswith("Connect")
