"""Whatever answers in Antenna's place is told from Antenna, at every endpoint: only its own words are acted upon."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.wire import DELETED, PostEntry
from adc_worker.errors import (
    AntennaBodyTooLarge,
    AntennaError,
    AntennaRefused,
    AntennaRejected,
    AntennaUnavailable,
    NotAntenna,
)

BODY = b'{"error":"e","image_id":"1"}'
SUBJECT = "$JS.ACK.job_7.job-7-consumer.1.1.1.1760000000000000000.0"
TASK = {"id": "5", "image_id": "5", "image_url": "https://h/5.jpg", "reply_subject": SUBJECT}
RECEIPT = {"reply_subject": SUBJECT, "status": "queued", "task_id": "c8ad49a8"}
ACCEPTED = {"status": "accepted", "job_id": 7, "results_queued": 1, "tasks": [RECEIPT]}
PIPELINES = {"processing_service_name": "traps", "pipelines": [{"slug": "moths"}]}
REGISTERED = {
    "timestamp": "2026-07-01T23:15:00",
    "success": True,
    "error": None,
    "pipelines": [{"slug": "moths"}],
    "pipelines_created": ["moths"],
    "algorithms_created": [],
}
PAGE = "<html><head><title>Back soon</title></head></html>"


@dataclass(frozen=True)
class Endpoint:
    """What is asked, and an answer of Antenna's to it."""

    ask: Callable[[AntennaClient], Any]
    good: Any
    status: int = 200


JOB_ROW = {"id": 7, "pipeline_slug": "moths"}
PIPELINE_ROW = {"slug": "moths", "algorithms": [{"key": "d", "task_type": "detection"}]}
ENDPOINTS = {
    "jobs": Endpoint(
        lambda asked: asked.jobs(["moths"]), {"count": 1, "results": [{"id": 7, "pipeline_slug": "moths"}]}
    ),
    "job": Endpoint(lambda asked: asked.job(7), {"id": 7, "status": "STARTED"}),
    "tasks": Endpoint(lambda asked: asked.fetch_tasks(7, 1), {"tasks": [TASK]}),
    "result": Endpoint(lambda asked: asked.post_results(7, [PostEntry(SUBJECT, len(BODY), lambda: [BODY])]), ACCEPTED),
    "projects": Endpoint(lambda asked: list(asked.projects()), {"count": 1, "next": None, "results": [{"id": 3}]}),
    "pipelines": Endpoint(
        lambda asked: list(asked.pipelines(3)),
        {
            "count": 1,
            "next": None,
            "results": [{"slug": "moths", "algorithms": [{"key": "d", "task_type": "detection"}]}],
        },
    ),
    "register": Endpoint(lambda asked: asked.register(3, PIPELINES), REGISTERED, 201),
}
every_endpoint = pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=ENDPOINTS.keys())


def answered(response: httpx.Response, endpoint: Endpoint) -> Any:
    """Ask an Antenna that gives this answer."""
    transport = httpx.MockTransport(lambda request: (request.read(), response)[1])
    with AntennaClient("http://antenna.test/api/v2", "0" * 40, transport=transport) as asked:
        return endpoint.ask(asked)


def error_of(response: httpx.Response, endpoint: Endpoint) -> AntennaError:
    with pytest.raises(AntennaError) as caught:
        answered(response, endpoint)
    return caught.value


@every_endpoint
@pytest.mark.parametrize("content_type", ["application/json", "text/html", "text/plain; charset=utf-8", ""])
def test_an_answer_is_known_by_its_content_whatever_its_header_says(endpoint: Endpoint, content_type: str) -> None:
    """A proxy that changes the header changes nothing of what Antenna said; fields of a later Antenna are ignored."""
    body = json.dumps(endpoint.good | {"added_later": [1, {"a": None}]}).encode()
    headers = {"content-type": content_type} if content_type else {}
    answered(httpx.Response(endpoint.status, content=body, headers=headers), endpoint)


FOREIGN = {
    "a page": PAGE.encode(),
    "a page called JSON": PAGE.encode(),
    "nothing": b"",
    "an object of nothing": b"{}",
    "null": b"null",
    "a list": b"[]",
    "a list of rows": b'[{"id": 7, "status": "STARTED", "slug": "moths"}]',
    "a detail": b'{"detail": "Service is under maintenance"}',
    "a health check": b'{"id": 1, "status": "ok", "success": 1, "results": null, "tasks": 3}',
    "text": b'"accepted"',
    "half a surrogate pair": b'{"tasks": "\\ud800", "results": "\\ud800", "id": "\\ud800", "status": "\\ud800"}',
    "deep": b'{"tasks": ' + b"[" * 100_000,
}


@every_endpoint
@pytest.mark.parametrize("status", [200, 201, 202, 203, 204])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_success_that_is_none_of_antennas_is_an_outage(endpoint: Endpoint, status: int, name: str) -> None:
    """A maintenance page, a sign-in, another server: nothing is accepted by it, and it does not mean 'no tasks'."""
    content_type = "text/html" if name == "a page" else "application/json"
    body = b"" if status == 204 else FOREIGN[name]
    error = error_of(httpx.Response(status, content=body, headers={"content-type": content_type}), endpoint)
    assert type(error) is NotAntenna
    assert "http://antenna.test/api/v2/" in str(error)
    assert f"answered {status} with {content_type}" in str(error)
    assert "proxy" in str(error)


@every_endpoint
def test_an_answer_that_is_cut_is_an_outage(endpoint: Endpoint) -> None:
    """Wherever it ends; none of what it may hold of signed URLs is quoted."""
    body = json.dumps(endpoint.good).encode()
    for length in range(len(body)):
        error = error_of(httpx.Response(endpoint.status, content=body[:length]), endpoint)
        assert type(error) is NotAntenna
        assert "5.jpg" not in str(error)


class Endless(httpx.SyncByteStream):
    """A body without an end, of which is counted what was taken."""

    def __init__(self) -> None:
        self.taken_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.taken_bytes += 1 << 20
            yield b" " * (1 << 20)


@every_endpoint
@pytest.mark.parametrize("status", [200, 201, 400, 401, 404])
def test_a_body_without_an_end_is_read_up_to_a_bound(endpoint: Endpoint, status: int) -> None:
    """It fills neither the memory nor the time."""
    body = Endless()
    error = error_of(httpx.Response(status, stream=body), endpoint)
    assert type(error) is NotAntenna
    assert body.taken_bytes < 20_000_000


@every_endpoint
def test_a_body_that_is_compressed_unasked_is_not_unpacked(endpoint: Endpoint) -> None:
    """A thousand times its size may come of it, and again a thousand times where it is compressed twice."""
    packed = gzip.compress(gzip.compress(json.dumps(endpoint.good).encode()))
    headers = {"content-encoding": "gzip, gzip", "content-type": "application/json"}
    response = httpx.Response(endpoint.status, stream=httpx.ByteStream(packed), headers=headers)
    error = error_of(response, endpoint)
    assert type(error) is NotAntenna
    assert "compressed" in str(error)


FOREIGN_REFUSALS = {
    "a page": (PAGE.encode(), {"content-type": "text/html"}),
    "nothing": (b"", {}),
    "a gateway": (b'{"message": "no Route matched with those values"}', {"content-type": "application/json"}),
    "another framework": (b'{"detail": "Not Found"}', {"content-type": "application/json"}),
    "problem details": (b'{"type": "about:blank", "status": 400, "errors": []}', {"content-type": "application/json"}),
    "a sign-in": (b'{"detail": "Sign in first."}', {"www-authenticate": 'Basic realm="proxy"'}),
}
OF_OTHERS = {
    400: ["a page", "nothing", "a gateway", "problem details"],
    401: ["a page", "nothing", "a gateway", "problem details", "a sign-in"],
    403: ["a page", "nothing", "a gateway", "problem details"],
    404: list(FOREIGN_REFUSALS),
    405: ["a page", "nothing", "a gateway", "problem details"],
    410: list(FOREIGN_REFUSALS),
    415: ["a page", "nothing", "a gateway", "problem details"],
    422: list(FOREIGN_REFUSALS),
    302: list(FOREIGN_REFUSALS),
}


@every_endpoint
@pytest.mark.parametrize(("status", "name"), [(status, name) for status, names in OF_OTHERS.items() for name in names])
def test_a_refusal_that_is_none_of_antennas_says_nothing(endpoint: Endpoint, status: int, name: str) -> None:
    """No token is refused by it, no job unknown, no result invalid: something is in the way."""
    content, headers = FOREIGN_REFUSALS[name]
    error = error_of(httpx.Response(status, content=content, headers=headers), endpoint)
    assert type(error) is NotAntenna


OWN_REFUSALS = [
    (401, {"detail": "Invalid token."}, AntennaRefused),
    (403, {"detail": "You do not have permission to perform this action."}, AntennaRefused),
    (400, {"batch_size": ["A valid integer is required."]}, AntennaRejected),
    (400, {"non_field_errors": ["Invalid data. Expected a dictionary, but got list."]}, AntennaRejected),
    (400, ["Job is not async_api"], AntennaRejected),
    (400, {"detail": "JSON parse error - Expecting value: line 1 column 1 (char 0)"}, AntennaRejected),
    (405, {"detail": 'Method "GET" not allowed.'}, AntennaRejected),
    (415, {"detail": 'Unsupported media type "text/plain" in request.'}, AntennaRejected),
    (503, {"error": "Task queue temporarily unavailable"}, AntennaUnavailable),
    (429, {"detail": "Request was throttled."}, AntennaUnavailable),
    (413, PAGE, AntennaBodyTooLarge),
    (413, {"detail": "too large"}, AntennaBodyTooLarge),
]


@every_endpoint
@pytest.mark.parametrize(("status", "body", "kind"), OWN_REFUSALS)
def test_antennas_own_refusals_are_heard(endpoint: Endpoint, status: int, body: Any, kind: type[AntennaError]) -> None:
    """Each as what it asks of the caller."""
    error = error_of(httpx.Response(status, content=json.dumps(body).encode()), endpoint)
    assert type(error) is kind
    assert getattr(error, "status", status) == status
    assert f"answered {status}" in str(error)


@pytest.mark.parametrize("words", ["Not found.", "No Job matches the given query."])
@pytest.mark.parametrize("name", [name for name in ENDPOINTS if name != "job"])
def test_what_antenna_does_not_know_is_told_in_its_words(name: str, words: str) -> None:
    """They changed with a version of its framework."""
    error = error_of(httpx.Response(404, json={"detail": words}), ENDPOINTS[name])
    assert type(error) is AntennaRejected


@pytest.mark.parametrize("words", ["Not found.", "No Job matches the given query."])
def test_a_job_that_antenna_does_not_know_is_deleted(words: str) -> None:
    """In its own words only: a router's 404 deletes nothing."""
    assert answered(httpx.Response(404, json={"detail": words}), ENDPOINTS["job"]).status == DELETED


def test_a_token_is_told_from_a_single_right() -> None:
    """401 concerns everything asked with it, 403 what was asked."""
    told = {
        status: error_of(httpx.Response(status, json={"detail": "no"}), ENDPOINTS["tasks"]) for status in (401, 403)
    }
    assert [isinstance(error, AntennaRefused) and error.concerns_token for error in told.values()] == [True, False]


@pytest.mark.parametrize(
    ("body", "entries", "blames_result"),
    [
        ({"results": [{"loc": ["__root__", "1", "result", "detections"], "msg": "m", "type": "t"}]}, {1}, True),
        ({"results": [{"loc": ["results", 0, "result"]}, {"loc": ["__root__", "12"]}]}, {0, 12}, True),
        ({"detail": "JSON parse error - Out of range float values are not JSON compliant: 'NaN'"}, set(), True),
        ({"detail": "JSON parse error - Unterminated string"}, set(), False),
        ({"results": ["This field is required."]}, set(), False),
        ({"results": [{"loc": ["__root__", "one"]}, {"loc": 1}, {"msg": "no place"}]}, set(), False),
        ({"non_field_errors": ["Expected a dictionary"]}, set(), False),
    ],
)
def test_a_400_tells_which_results_it_is_about(body: Any, entries: set[int], blames_result: bool) -> None:
    """Many are about the request as a whole, which something on the way may have damaged."""
    error = error_of(httpx.Response(400, json=body), ENDPOINTS["result"])
    assert isinstance(error, AntennaRejected)
    assert error.entries == entries
    assert error.blames_result is blames_result


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({}, {SUBJECT}),
        ({"job_id": "7"}, {SUBJECT}),
        ({"tasks": []}, set()),
        ({"tasks": [RECEIPT | {"status": "failed"}]}, set()),
        ({"tasks": [RECEIPT, {"reply_subject": "another", "status": "queued"}, "noise"]}, {SUBJECT, "another"}),
    ],
)
def test_accepted_is_what_the_answer_names_as_queued(change: dict[str, Any], accepted: set[str]) -> None:
    """And nothing else that it says."""
    assert answered(httpx.Response(200, json=ACCEPTED | change), ENDPOINTS["result"]) == accepted


@pytest.mark.parametrize(
    "change",
    [{"job_id": 8}, {"job_id": None}, {"status": "error"}, {"status": None}, {"tasks": None}, {"tasks": ["x"]}],
)
def test_an_answer_that_does_not_accept_a_post_of_this_job_accepts_nothing(change: dict[str, Any]) -> None:
    """Another job's, or another word."""
    assert type(error_of(httpx.Response(200, json=ACCEPTED | change), ENDPOINTS["result"])) is NotAntenna


def test_another_jobs_detail_is_not_this_jobs() -> None:
    """A cache that mixes answers up must end no job."""
    response = httpx.Response(200, json={"id": 8, "status": "REVOKED"})
    assert type(error_of(response, ENDPOINTS["job"])) is NotAntenna


@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({}, 200, NotAntenna),
        ({"pipelines": []}, 201, NotAntenna),
        ({"success": False, "error": "two detectors"}, 201, AntennaRejected),
    ],
)
def test_a_registration_counts_only_with_antennas_account_of_it(
    change: dict[str, Any], status: int, kind: type[AntennaError]
) -> None:
    """201, and it names every pipeline; what it says went wrong is told."""
    error = error_of(httpx.Response(status, json=REGISTERED | change), ENDPOINTS["register"])
    assert type(error) is kind
    assert change.get("error", "") in str(error)


def test_pages_that_lead_back_to_themselves_end() -> None:
    """Or `register` would list projects for ever."""
    body = {"count": 1, "next": "http://antenna.test/api/v2/projects/?offset=40", "results": [{"id": 3}]}
    error = error_of(httpx.Response(200, json=body), ENDPOINTS["projects"])
    assert type(error) is NotAntenna
