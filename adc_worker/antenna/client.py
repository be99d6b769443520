"""The HTTP client that carries the token. It talks to one origin and follows no redirect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import parse_qs, urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from adc_worker import __version__
from adc_worker.antenna import answers, wire
from adc_worker.antenna.answers import Answer
from adc_worker.antenna.leases import job_of
from adc_worker.errors import AntennaError, AntennaRejected, AntennaUnreachable
from adc_worker.log import get_logger
from adc_worker.redaction import hide

_log = get_logger(__name__)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
# With NATS down Antenna answers /tasks/ after 120 s (docs/antenna.md); giving up earlier loses deliveries.
TASKS_READ_TIMEOUT_S = 150.0
JOBS_PER_POLL = 50
# A list of 300 photographs took 3 s once; neighbours in it are of one camera: it is looked into at four places.
CAPTURE_PAGES, CAPTURES_PER_PAGE, CAPTURES_TIMEOUT_S = 4, 16, 5.0
# Nobody took the connection: the address is wrong, or who should listen there is not up.
_NO_CONNECTION = (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)
_T = TypeVar("_T")
_Row = TypeVar("_Row", bound=BaseModel)


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
            headers={
                "Authorization": f"Token {token}",
                "User-Agent": f"adc-worker/{__version__}",
                **answers.IDENTITY,
            },
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
        """Return a job's detail: the only place where a cancel shows. One that Antenna does not know is DELETED."""
        try:
            answer = self._send("GET", f"/jobs/{job_id}/")
        except AntennaRejected as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise
            return wire.JobState(id=job_id, status=wire.DELETED)
        return _job(answer, job_id)

    def captures(self, job_id: int) -> list[wire.Capture]:
        """List some of a job's photographs, from all over its collection; none where Antenna names no collection.

        What can be had within `CAPTURES_TIMEOUT_S` and one answer more: a plan waits for it.
        """
        until = time.monotonic() + CAPTURES_TIMEOUT_S
        job = _job(self._send("GET", f"/jobs/{job_id}/", timeout=CAPTURES_TIMEOUT_S), job_id)
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

    def post_results(self, job_id: int, entries: Sequence[wire.PostEntry]) -> frozenset[str]:
        """Post serialised results, part by part, and return the reply subjects of those that Antenna accepted.

        Accepted means queued at Antenna, not saved, and named as that in its answer.
        """
        size_bytes, parts = wire.result_post(entries, self._who)
        headers = {"Content-Type": "application/json", "Content-Length": str(size_bytes)}
        answer = self._send("POST", f"/jobs/{job_id}/result/", content=parts, headers=headers)
        return _read(partial(wire.parse_accepted, job_id=job_id), answer)

    def projects(self) -> Iterator[wire.ProjectRow]:
        """Yield all projects that the token's user may see."""
        return self._pages("/projects/", wire.ProjectRow)

    def pipelines(self, project: int) -> Iterator[wire.PipelineRow]:
        """Yield the pipelines that a project has."""
        return self._pages(f"/projects/{project}/pipelines/", wire.PipelineRow)

    def register(self, project: int, body: Mapping[str, Any]) -> wire.Registered:
        """Register pipelines with a project, and return Antenna's account of what was new.

        Raises:
            AntennaRejected: Antenna says that it failed.
            NotAntenna: the answer is no account of these pipelines. A list of pipelines, with which Antenna answers a
                request that lost its method on the way, is none.
        """
        answer = self._send("POST", f"/projects/{project}/pipelines/", json=body)
        registered = _read(wire.parse_registered, answer)
        if not registered.success:
            reason = registered.error or "Antenna says that it failed"
            raise AntennaRejected(f"{answer.request}: {reason}", answer.status)
        told = {pipeline.slug for pipeline in registered.pipelines}
        missing = [one["slug"] for one in body["pipelines"] if one["slug"] not in told]
        if missing or answer.status != httpx.codes.CREATED:
            raise answers.not_antenna(answer, f"it does not tell of {', '.join(missing) or 'anything created'}")
        return registered

    def _pages(self, path: str, kind: type[_Row]) -> Iterator[_Row]:
        """Yield the rows of a list, from all its pages."""
        query: dict[str, Any] | None = {}
        seen: list[dict[str, Any]] = []
        while query is not None:
            answer = self._send("GET", path, params=query)
            if query in seen:
                raise answers.not_antenna(answer, "its pages lead back to one of them")
            seen.append(query)
            rows, following = _read(partial(wire.parse_page, kind), answer)
            yield from rows
            # Only the query is taken from `next`: behind a proxy it may name a host that the token must not go to.
            query = parse_qs(urlsplit(following).query) if following else None

    def _send(self, method: str, path: str, **arguments: Any) -> Answer:
        request = f"{method} {path}"
        try:
            with self._http.stream(method, path, **arguments) as response:
                answer = answers.receive(response, request)
        except httpx.HTTPError as error:
            url = f"{str(self._http.base_url).rstrip('/')}{path}"  # the setting that may be wrong
            message = f"{method} {url}: {type(error).__name__}: {error}"
            raise AntennaUnreachable(message, connected=not isinstance(error, _NO_CONNECTION)) from error
        if answer.is_success:
            return answer
        raise answers.error_for(answer)


def _job(answer: Answer, job_id: int) -> wire.JobState:
    state = _read(wire.parse_job, answer)
    if state.id != job_id:
        raise answers.not_antenna(answer, "it is the detail of another job")
    return state


def _read(parse: Callable[[bytes], _T], answer: Answer) -> _T:
    """Read an answer; raises NotAntenna where its content is not what the contract says."""
    if answer.complaint:
        raise answers.not_antenna(answer)
    try:
        return parse(answer.body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        problem = f"{field}: {first['msg']}" if field else str(first["msg"])
        raise answers.not_antenna(answer, f"which is not what its contract says: {problem}") from error
    except ValueError as error:
        raise answers.not_antenna(answer, f"which is not what its contract says: {str(error)[:200]}") from error
