"""Antenna's HTTP API over the desk: paths, roles and answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web_middlewares import normalize_path_middleware
from pydantic import ValidationError

from adc_worker.antenna.wire import FINAL_STATES
from adc_worker.desk import bodies
from adc_worker.desk.bodies import CaptureQuery, Query
from adc_worker.desk.job import PROJECT, PROJECT_ID, Job, now
from adc_worker.desk.state import Desk

T = TypeVar("T")

PAGE_SIZE = 40
# What stands in Antenna's place where Antenna does not answer itself: the proxy, or Django without a view.
TOO_LARGE_PAGE = "<html>\r\n<head><title>413 Request Entity Too Large</title></head>\r\n</html>"
NO_SUCH_PAGE = "<!doctype html>\n<html lang='en'>\n<head><title>Not Found</title></head>\n</html>"
SUPERUSER, MEMBER, OUTSIDER, ANONYMOUS = "superuser", "member", "outsider", "anonymous"


@dataclass(slots=True)
class Api:
    """The routes. `roles` says whose token is whose; requests are counted by "METHOD route", as "POST tasks"."""

    desk: Desk
    roles: dict[str, str]
    requests: Counter[str] = field(default_factory=Counter)

    def build(self, max_body_bytes: int) -> web.Application:
        add_slash = normalize_path_middleware(merge_slashes=False, redirect_class=web.HTTPMovedPermanently)
        app = web.Application(client_max_size=max_body_bytes, middlewares=[self._around, add_slash])
        job, project = "/api/v2/jobs/{id:[^/]+}/", "/api/v2/projects/{id:[^/]+}/"
        routes = [
            web.get("/api/v2/jobs/", self._list_jobs, name="jobs"),
            web.get(job, self._show_job, name="job"),
            web.post(f"{job}tasks/", self._fetch_tasks, name="tasks"),
            web.post(f"{job}result/", self._post_results, name="result"),
            web.post(job + "{action:cancel|retry}/", self._change_job, name="change"),
            web.get("/api/v2/projects/", self._list_projects, name="projects"),
            web.get(f"{project}pipelines/", self._list_pipelines, name="pipelines"),
            web.post(f"{project}pipelines/", self._register, name="pipelines"),
            web.get("/api/v2/captures/", self._list_captures, name="captures"),
            web.get(r"/images/{id:\d+}/{name}", self._show_image, name="images"),
        ]
        app.add_routes(routes)
        return app

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Counts the request and words refusals as JSON."""
        resource = request.match_info.route.resource
        self.requests[f"{request.method} {resource.name if resource else 'unknown'}"] += 1
        try:
            self._role(request)  # a wrong token is refused everywhere
            return await handler(request)
        except ValidationError as error:
            return web.json_response(bodies.problems(error), status=400)
        except web.HTTPClientError as error:
            return _refusal(request, error, is_known_path=resource is not None)

    def _role(self, request: web.Request) -> str:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "token":  # another scheme counts as no credentials
            return ANONYMOUS
        if token not in self.roles:
            raise web.HTTPUnauthorized(text="Invalid token.")
        return self.roles[token]

    def _named(self, request: web.Request, things: Mapping[int, T], *roles: str) -> T:
        """What the path names, for these roles or for all: refuses with 401, then 404, then 403, as Antenna does."""
        role, named = self._role(request), request.match_info["id"]
        number = int(named) if named.isdecimal() else None  # no number names nothing
        if roles and role == ANONYMOUS:
            raise web.HTTPUnauthorized(text="Authentication credentials were not provided.")
        if number is None or number not in things:
            raise web.HTTPNotFound(text="Not found.")
        if roles and role not in roles:
            raise web.HTTPForbidden(text="You do not have permission to perform this action.")
        return things[number]

    async def _list_jobs(self, request: web.Request) -> web.StreamResponse:
        query = Query.model_validate(dict(request.query))
        newest_first = reversed(self.desk.jobs.values())
        jobs = [job for job in newest_first if _wanted(job, query)]
        if not query.ids_only:
            return _page(request, [job.to_json() for job in jobs])
        if query.limit is None:  # Antenna then answers with one job, any of them
            random.shuffle(jobs)
        return _page(request, [_job_row(job) for job in jobs], page_size=1)

    async def _show_job(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self._named(request, self.desk.jobs).to_json())

    async def _fetch_tasks(self, request: web.Request) -> web.StreamResponse:
        job = self._named(request, self.desk.jobs, SUPERUSER)
        body = await bodies.read(request, bodies.Fetch)
        if job.dispatch_mode != "async_api":
            problem = "Tasks of this job are not for fetching: it is not async_api."
            return web.json_response([problem], status=400)
        try:
            tasks = await self.desk.fetch(job, body.batch_size)
        except TimeoutError:
            problem = "Task queue temporarily unavailable"
            return web.json_response({"error": problem}, status=503)
        return web.json_response({"tasks": tasks})

    async def _post_results(self, request: web.Request) -> web.StreamResponse:
        job = self._named(request, self.desk.jobs, SUPERUSER)
        entries = (await bodies.read(request, bodies.Results)).results
        for entry in entries:
            self.desk.post(job, entry.reply_subject, entry.result)
        receipts = [{"reply_subject": e.reply_subject, "status": "queued", "task_id": str(uuid4())} for e in entries]
        accepted = {"status": "accepted", "job_id": job.id, "results_queued": len(receipts), "tasks": receipts}
        return web.json_response(accepted)

    async def _change_job(self, request: web.Request) -> web.StreamResponse:
        job = self._named(request, self.desk.jobs, SUPERUSER)
        if request.match_info["action"] == "cancel":
            await self.desk.cancel(job)
        else:
            await self.desk.retry(job)
        return web.json_response(job.to_json())

    async def _list_projects(self, request: web.Request) -> web.StreamResponse:
        return _page(request, list(self._projects().values()))

    def _projects(self) -> dict[int, dict[str, Any]]:
        projects: dict[int, dict[str, Any]] = {PROJECT_ID: PROJECT}
        for number in range(PROJECT_ID + 1, PROJECT_ID + self.desk.projects):
            projects[number] = {"id": number, "name": f"Desk {number}"}
        return projects

    async def _list_pipelines(self, request: web.Request) -> web.StreamResponse:
        pipelines = self.desk.pipelines.values()
        return _page(request, [pipeline.model_dump() for pipeline in pipelines])

    async def _register(self, request: web.Request) -> web.StreamResponse:
        project = self._named(request, self._projects(), SUPERUSER, MEMBER)
        body = await bodies.read(request, bodies.Registration)
        self.desk.services[body.processing_service_name].add(project["id"])
        created = []
        for pipeline in body.pipelines:
            created += self.desk.register(pipeline)
        answer = {
            "timestamp": now(),
            "success": True,
            "error": None,
            "pipelines": [pipeline.model_dump() for pipeline in body.pipelines],
            "pipelines_created": created,
            "algorithms_created": [],
        }
        return web.json_response(answer, status=201)

    async def _list_captures(self, request: web.Request) -> web.StreamResponse:
        query = CaptureQuery.model_validate(dict(request.query))
        captures = self.desk.captures.values() if query.project_id == PROJECT_ID else ()
        wanted = [one for one in captures if query.collections in {None, one.collection}]
        return _page(request, [capture.to_json() for capture in wanted])

    async def _show_image(self, request: web.Request) -> web.StreamResponse:
        capture = self._named(request, self.desk.captures)
        if capture.file is None or capture.size_bytes is None:
            raise web.HTTPNotFound(text="no such image")
        return web.FileResponse(capture.file)


def _refusal(request: web.Request, error: web.HTTPClientError, *, is_known_path: bool) -> web.Response:
    """Word a refusal as Antenna does, or as what stands in its place: the proxy, or Django where there is no view."""
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return web.Response(text=TOO_LARGE_PAGE, content_type="text/html", status=error.status)
    if isinstance(error, web.HTTPNotFound) and not is_known_path:
        return web.Response(text=NO_SUCH_PAGE, content_type="text/html", status=error.status)
    headers = {"WWW-Authenticate": "Token"} if isinstance(error, web.HTTPUnauthorized) else {}
    not_allowed = isinstance(error, web.HTTPMethodNotAllowed)
    detail = f'Method "{request.method}" not allowed.' if not_allowed else error.text
    return web.json_response({"detail": detail}, status=error.status, headers=headers)


def _wanted(job: Job, query: Query) -> bool:
    slugs = (query.pipeline__slug__in or job.pipeline.slug).split(",")
    return (
        job.pipeline.slug in slugs
        and query.dispatch_mode in {None, job.dispatch_mode}
        and query.status in {None, job.status}
        and query.project in {None, PROJECT_ID}
        and not (query.incomplete_only and (job.status in FINAL_STATES or job.mostly_failed))
    )


def _job_row(job: Job) -> dict[str, Any]:
    return {"id": job.id, "pipeline_slug": job.pipeline.slug, "user_permissions": []}


def _page(request: web.Request, rows: Sequence[dict[str, Any]], page_size: int = PAGE_SIZE) -> web.Response:
    query = Query.model_validate(dict(request.query))
    limit = query.limit or page_size
    end = query.offset + limit
    following = request.url.update_query(limit=limit, offset=end)
    body = {
        "count": len(rows),
        "next": str(following) if end < len(rows) else None,
        "previous": None,
        "results": rows[query.offset : end],
        "user_permissions": [],
    }
    return web.json_response(body)
