"""The HTTP client that carries the token. It talks to one origin and follows no redirect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import parse_qs, urlsplit

import httpx
import orjson

from adc_worker import __version__
from adc_worker.antenna import wire
from adc_worker.antenna.leases import job_of
from adc_worker.errors import AntennaError, AntennaRefused, AntennaRejected, AntennaUnavailable, AntennaUnreachable
from adc_worker.log import get_logger
from adc_worker.redaction import hide

_log = get_logger(__name__)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
# With NATS down Antenna answers /tasks/ after 120 s (contract, "Take tasks"); giving up earlier loses deliveries.
TASKS_READ_TIMEOUT_S = 150.0
JOBS_PER_POLL = 50
# A list of 300 photographs took 3 s (contract); neighbours in it are of one camera: it is looked into at four places.
CAPTURE_PAGES, CAPTURES_PER_PAGE, CAPTURES_TIMEOUT_S = 4, 16, 5.0
_RETRY_STATUS = frozenset({408, 425, 429})
_SHOWN_CHARACTERS = 300
_T = TypeVar("_T")


class AntennaClient:
    """Antenna's endpoints as methods; raises only AntennaError. Safe to use from several threads."""

    def __init__(
        self,
        base_url: str,
        token: str,
        transport: httpx.BaseTransport | None = None,
        client_info: Mapping[str, Any] | None = None,
    ) -> None:
        hide(token)  # Antenna, or a proxy before it, may quote it in an answer
        self._who = {"client_info": client_info} if client_info else {}  # goes with every fetch and every post
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Token {token}", "User-Agent": f"adc-worker/{__version__}"},
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            follow_redirects=False,
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def jobs(self, pipeline_slugs: Sequence[str], project: int | None = None) -> list[wire.JobRef]:
        """List jobs that have tasks for these pipelines; also this worker's heartbeat."""
        params: dict[str, Any] = {
            "pipeline__slug__in": ",".join(pipeline_slugs),
            "ids_only": 1,  # without `limit` the answer would be one random job
            "incomplete_only": 1,
            "dispatch_mode": "async_api",
            "status": "STARTED",
            "limit": JOBS_PER_POLL,
        }
        if project is not None:
            params["project"] = project
        return _read(wire.parse_jobs, self._send("GET", "/jobs/", params=params))

    def job(self, job_id: int) -> wire.JobState:
        """Return a job's detail: the only place where a cancel shows. One that Antenna does not know is over, too."""
        try:
            return _read(wire.parse_job, self._send("GET", f"/jobs/{job_id}/"))
        except AntennaRejected as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise
            return wire.JobState(id=job_id, status="FAILURE")

    def captures(self, job_id: int) -> list[wire.Capture]:
        """List some of a job's photographs, from all over its collection; none where Antenna names no collection.

        What can be had within `CAPTURES_TIMEOUT_S` and one answer more: a plan waits for it.
        """
        until = time.monotonic() + CAPTURES_TIMEOUT_S
        about = self._send("GET", f"/jobs/{job_id}/", timeout=CAPTURES_TIMEOUT_S)
        job = _read(wire.parse_job, about)
        if job.project_id is None or job.collection_id is None:
            return []
        params = {"project_id": job.project_id, "collections": job.collection_id, "limit": CAPTURES_PER_PAGE}
        params["offset"] = 0
        found: list[wire.Capture] = []
        for number in range(1, CAPTURE_PAGES + 1):
            try:
                body = self._send("GET", "/captures/", params=params, timeout=CAPTURES_TIMEOUT_S)
                count, captures = _read(wire.parse_captures, body)
            except AntennaError:
                if found:
                    break
                raise
            found += captures
            params["offset"] = number * max(CAPTURES_PER_PAGE, count // CAPTURE_PAGES)
            if params["offset"] >= count or time.monotonic() > until:
                break
        return found

    def fetch_tasks(self, job_id: int, count: int) -> list[wire.Task]:
        """Take up to `count` tasks; each spends one delivery. An empty list can mean six things.

        Tasks of another job's stream are dropped: saved here, their results would acknowledge images there.
        """
        timeout = httpx.Timeout(TASKS_READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        body = self._send("POST", f"/jobs/{job_id}/tasks/", json={"batch_size": count} | self._who, timeout=timeout)
        tasks = _read(wire.parse_tasks, body)
        ours = [task for task in tasks if job_of(task.reply_subject) in {job_id, None}]
        if len(ours) < len(tasks):
            _log.warning("tasks_of_another_job", job_id=job_id, tasks=len(tasks) - len(ours))
        return ours

    def post_results(self, job_id: int, entries: Sequence[wire.PostEntry]) -> None:
        """Post serialised results, part by part; accepted means queued at Antenna, not saved."""
        size_bytes, parts = wire.result_post(entries, self._who)
        headers = {"Content-Type": "application/json", "Content-Length": str(size_bytes)}
        self._send("POST", f"/jobs/{job_id}/result/", content=parts, headers=headers)

    def pages(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a list, from all its pages."""
        query: dict[str, Any] | None = {}
        while query is not None:
            page = _read(orjson.loads, self._send("GET", path, params=query))
            yield from page["results"]
            # Only the query is taken from `next`: behind a proxy it may name a host that the token must not go to.
            query = parse_qs(urlsplit(page["next"]).query) if page.get("next") else None

    def register(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Register pipelines, and return Antenna's account of what was new."""
        answer: dict[str, Any] = _read(orjson.loads, self._send("POST", path, json=body))
        return answer

    def _send(self, method: str, path: str, **arguments: Any) -> bytes:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            url = f"{str(self._http.base_url).rstrip('/')}{path}"  # the setting that may be wrong
            raise AntennaUnreachable(f"{method} {url}: {type(error).__name__}: {error}") from error
        if response.is_success:
            return response.content
        raise _error_for(response, f"{method} {path}")


def _read(parse: Callable[[bytes], _T], body: bytes) -> _T:
    try:
        return parse(body)
    except ValueError as error:
        raise AntennaUnavailable(f"Antenna's answer is not what its contract says: {str(error)[:200]}") from error


def _error_for(response: httpx.Response, request: str) -> AntennaError:
    status = response.status_code
    message = f"{request} answered {status}: {_detail(response)}"
    if status in {401, 403}:
        return AntennaRefused(message)
    # A 404 that is not Antenna's JSON comes from a proxy or a wrong URL: it says nothing about a job or a result.
    foreign = status == httpx.codes.NOT_FOUND and "json" not in response.headers.get("content-type", "")
    if status >= httpx.codes.INTERNAL_SERVER_ERROR or status in _RETRY_STATUS or foreign:
        return AntennaUnavailable(message)
    if response.is_redirect:
        target = response.headers.get("location", "").partition("?")[0]
        return AntennaRejected(f"{message}; it redirects to {target}: correct AMI_ANTENNA_API_BASE_URL", status)
    return AntennaRejected(message, status)


def _detail(response: httpx.Response) -> str:
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return response.text[:_SHOWN_CHARACTERS]
    detail = body.get("detail") if isinstance(body, dict) else None
    return str(detail or body)[:_SHOWN_CHARACTERS]
