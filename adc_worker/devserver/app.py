"""Antenna's HTTP API over the desk's state: paths, roles and answers."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.web_middlewares import normalize_path_middleware

from adc_worker.devserver.refusal import (
    REQUIRED,
    RefusedError,
    forbidden,
    integer,
    list_field,
    not_found,
    positive_integer,
    read_body,
)
from adc_worker.devserver.state import DISPATCH_MODES, FINAL, STATUSES, Capture, Desk, Job, Project, now
from adc_worker.devserver.validation import pipeline_problems, result_problems

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp.typedefs import Handler

    from adc_worker.devserver.images import ImageHost
    from adc_worker.devserver.lifecycle import Lifecycle

PAGE_SIZE = 40
SUPERUSER, MEMBER, OUTSIDER, ANONYMOUS = "superuser", "member", "outsider", "anonymous"
LOSE_ANSWER = 0  # in place of a status: do what was asked, then close the connection without an answer


@dataclass(slots=True)
class Api:
    """The routes. `roles` says whose token is whose; requests and faults go by "METHOD route", as "POST tasks"."""

    desk: Desk
    lifecycle: Lifecycle
    images: ImageHost
    roles: dict[str, str]
    requests: Counter[str] = field(default_factory=Counter)
    faults: dict[str, deque[int]] = field(default_factory=dict)

    def build(self, max_body_bytes: int) -> web.Application:
        add_slash = normalize_path_middleware(
            append_slash=True, merge_slashes=False, redirect_class=web.HTTPMovedPermanently
        )
        app = web.Application(
            client_max_size=max_body_bytes, middlewares=[self._answer_refusals, self._count, add_slash]
        )
        jobs, job, project = "/api/v2/jobs/", "/api/v2/jobs/{job_id}/", "/api/v2/projects/{project_id}/"
        app.add_routes(
            [
                web.get(jobs, self._list_jobs, name="jobs"),
                web.post(jobs, self._create_job, name="jobs"),
                web.get(job, self._show_job, name="job"),
                web.post(f"{job}tasks/", self._fetch_tasks, name="tasks"),
                web.post(f"{job}result/", self._post_results, name="result"),
                web.post(f"{job}cancel/", self._cancel_job, name="cancel"),
                web.post(f"{job}retry/", self._retry_job, name="retry"),
                web.get("/api/v2/projects/", self._list_projects, name="projects"),
                web.get(f"{project}pipelines/", self._list_pipelines, name="pipelines"),
                web.post(f"{project}pipelines/", self._register, name="pipelines"),
                web.get("/api/v2/captures/collections/", self._list_collections, name="collections"),
                web.get("/api/v2/captures/", self._list_captures, name="captures"),
                web.get("/images/{capture_id}/{name}", self._show_image, name="images"),
            ]
        )
        return app

    @web.middleware
    async def _answer_refusals(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RefusedError as error:
            headers = {"WWW-Authenticate": "Token"} if error.status == web.HTTPUnauthorized.status_code else None
            return web.json_response(error.body, status=error.status, headers=headers)
        except web.HTTPMovedPermanently as moved:
            return web.Response(
                status=moved.status, headers={"Location": str(moved.location)}, content_type="text/html"
            )
        except web.HTTPMethodNotAllowed as error:
            return web.json_response({"detail": f'Method "{error.method}" not allowed.'}, status=error.status)
        except web.HTTPNotFound:
            return web.json_response({"detail": "Not found."}, status=404)

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        name = f"{request.method} {resource.name if resource else 'unknown'}"
        self.requests[name] += 1
        planned = self.faults.get(name)
        fault = planned.popleft() if planned else None
        if fault:
            return web.Response(status=fault, text="<html>fault of the desk</html>", content_type="text/html")
        response = await handler(request)
        if fault == LOSE_ANSWER and request.transport is not None:
            request.transport.abort()
        return response

    async def _list_jobs(self, request: web.Request) -> web.StreamResponse:
        role, query = self._role(request), request.query
        _check_choice(query, "dispatch_mode", DISPATCH_MODES)
        _check_choice(query, "status", STATUSES)
        jobs = sorted((job for job in self.desk.jobs.values() if _matches(job, request, role)), key=lambda job: -job.id)
        if "ids_only" not in query:
            rows = [job.to_json(_permissions(role)) for job in jobs]
            return self._page(request, rows, role)
        if "limit" not in query:
            random.shuffle(jobs)
        permissions = list(_permissions(role))
        rows = [{"id": job.id, "pipeline_slug": job.pipeline.slug, "user_permissions": permissions} for job in jobs]
        return self._page(request, rows, role, page_size=1)

    async def _show_job(self, request: web.Request) -> web.StreamResponse:
        role = self._role(request)
        job = self._job(request)
        if not _visible(job.project, role):
            not_found()
        return web.json_response(job.to_json(_permissions(role)))

    async def _create_job(self, request: web.Request) -> web.StreamResponse:
        self._require(request, SUPERUSER)
        body = await read_body(request)
        for name in ("name", "project_id", "pipeline_id"):
            if name not in body:
                raise RefusedError(400, {name: [REQUIRED]})
        project = self.desk.projects.get(body["project_id"])
        pipeline = next((p for p in self.desk.pipelines.values() if p.id == body["pipeline_id"]), None)
        if project is None or pipeline is None:
            raise RefusedError(400, {"non_field_errors": ["No such project or pipeline."]})
        collection_id = body.get("source_image_collection_id")
        captures = [c for c in self.desk.captures.values() if c.collection_id == collection_id]
        mode = body.get("dispatch_mode", "async_api")
        job = self.desk.add_job(body["name"], project, pipeline, captures, mode)
        job.move("PENDING" if "start_now" in request.query else "CREATED")
        answer = web.json_response(job.to_json(_permissions(SUPERUSER)), status=201)
        if "start_now" in request.query:
            await self.lifecycle.start(job)
        return answer

    async def _fetch_tasks(self, request: web.Request) -> web.StreamResponse:
        job = self._job_for_superuser(request)
        batch_size = positive_integer(await read_body(request), "batch_size")
        if job.dispatch_mode != "async_api":
            raise RefusedError(400, ["Tasks of this job are not for fetching: it is not async_api."])
        try:
            tasks = await self.lifecycle.fetch(job, batch_size)
        except TimeoutError:
            raise RefusedError(503, {"error": "Task queue temporarily unavailable"}) from None
        return web.json_response({"tasks": tasks})

    async def _post_results(self, request: web.Request) -> web.StreamResponse:
        job = self._job_for_superuser(request)
        entries = list_field(await read_body(request), "results")
        if problems := result_problems(entries):
            raise RefusedError(400, {"results": problems})
        receipts = []
        for entry in entries:
            self.lifecycle.post(job, entry["reply_subject"], entry["result"])
            task_id = f"desk-{self.desk.new_id()}"
            receipts.append({"reply_subject": entry["reply_subject"], "status": "queued", "task_id": task_id})
        accepted = {"status": "accepted", "job_id": job.id, "results_queued": len(receipts), "tasks": receipts}
        return web.json_response(accepted)

    async def _cancel_job(self, request: web.Request) -> web.StreamResponse:
        job = self._job_for_superuser(request)
        await self.lifecycle.cancel(job)
        return web.json_response(job.to_json(_permissions(SUPERUSER)))

    async def _retry_job(self, request: web.Request) -> web.StreamResponse:
        job = self._job_for_superuser(request)
        await self.lifecycle.retry(job)
        return web.json_response(job.to_json(_permissions(SUPERUSER)))

    async def _list_projects(self, request: web.Request) -> web.StreamResponse:
        role = self._role(request)
        return self._page(request, [p.to_json() for p in self.desk.projects.values() if _visible(p, role)], role)

    async def _list_pipelines(self, request: web.Request) -> web.StreamResponse:
        role = self._role(request)
        return self._page(request, [pipeline.to_json() for pipeline in self.desk.pipelines.values()], role)

    async def _register(self, request: web.Request) -> web.StreamResponse:
        role = self._require(request, SUPERUSER, MEMBER, OUTSIDER)
        if integer(request.match_info["project_id"]) not in self.desk.projects:
            not_found()
        if role == OUTSIDER:
            forbidden()
        body = await read_body(request)
        if "processing_service_name" not in body:
            raise RefusedError(400, {"processing_service_name": [REQUIRED]})
        pipelines = list_field(body, "pipelines")
        if problems := pipeline_problems(pipelines):
            raise RefusedError(400, {"pipelines": problems})
        created = [key for pipeline in pipelines for key in self._add_pipeline(pipeline)]
        answer = {"timestamp": now(), "success": True, "error": None, "pipelines": pipelines}
        return web.json_response({**answer, "pipelines_created": created, "algorithms_created": []}, status=201)

    def _add_pipeline(self, posted: dict[str, Any]) -> list[str]:
        """Algorithms are only ever added. Returns the slug and keys that are new."""
        created = [] if posted["slug"] in self.desk.pipelines else [posted["slug"]]
        pipeline = self.desk.pipeline(posted["slug"], posted["name"])
        for algorithm in posted.get("algorithms") or []:
            if algorithm["key"] not in pipeline.algorithms:
                pipeline.algorithms[algorithm["key"]] = algorithm
                created.append(algorithm["key"])
        return created

    async def _list_captures(self, request: web.Request) -> web.StreamResponse:
        role, project_id = self._role(request), _required_project(request)
        captures = [c for c in self.desk.captures.values() if c.project_id == project_id]
        if "collections" in request.query:
            collection_id = integer(request.query["collections"])
            captures = [c for c in captures if c.collection_id == collection_id]
        return self._page(request, [capture.to_json() for capture in captures], role)

    async def _list_collections(self, request: web.Request) -> web.StreamResponse:
        role, project_id = self._role(request), _required_project(request)
        sizes = Counter(c.collection_id for c in self.desk.captures.values() if c.project_id == project_id)
        names = {number: f"collection {number}" for number in sizes}
        rows = [{"id": n, "name": names[n], "project": project_id, "source_images_count": sizes[n]} for n in sizes]
        return self._page(request, rows, role)

    async def _show_image(self, request: web.Request) -> web.StreamResponse:
        capture: Capture | None = self.desk.captures.get(integer(request.match_info["capture_id"]) or 0)
        return await self.images.serve(request, capture)

    def _role(self, request: web.Request) -> str:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "token":  # another scheme counts as no credentials
            return ANONYMOUS
        if token not in self.roles:
            raise RefusedError(401, {"detail": "Invalid token."})
        return self.roles[token]

    def _require(self, request: web.Request, *roles: str) -> str:
        role = self._role(request)
        if role == ANONYMOUS:
            raise RefusedError(401, {"detail": "Authentication credentials were not provided."})
        if role not in roles:
            forbidden()
        return role

    def _job(self, request: web.Request) -> Job:
        job = self.desk.jobs.get(integer(request.match_info["job_id"]) or 0)
        return job if job is not None else not_found()

    def _job_for_superuser(self, request: web.Request) -> Job:
        """Who asks, then whether there is such a job, then whether they may: the order that Antenna has."""
        self._require(request, SUPERUSER, MEMBER, OUTSIDER)
        job = self._job(request)
        self._require(request, SUPERUSER)
        return job

    def _page(
        self, request: web.Request, rows: Sequence[dict[str, Any]], role: str, page_size: int = PAGE_SIZE
    ) -> web.Response:
        limit = integer(request.query.get("limit", "")) or page_size
        offset = integer(request.query.get("offset", "")) or 0
        more = str(request.url.update_query(limit=limit, offset=offset + limit)) if offset + limit < len(rows) else None
        back = str(request.url.update_query(limit=limit, offset=max(0, offset - limit))) if offset else None
        body = {"count": len(rows), "next": more, "previous": back, "results": rows[offset : offset + limit]}
        return web.json_response({**body, "user_permissions": ["create"] if role == SUPERUSER else []})


def _matches(job: Job, request: web.Request, role: str) -> bool:
    query = request.query
    slugs = query.get("pipeline__slug__in", "").split(",")
    return (
        _visible(job.project, role)
        and (slugs == [""] or job.pipeline.slug in slugs)
        and job.dispatch_mode == query.get("dispatch_mode", job.dispatch_mode)
        and job.status == query.get("status", job.status)
        and str(job.project.id) == query.get("project", str(job.project.id))
        and ("incomplete_only" not in query or not (job.status in FINAL or job.mostly_failed))
    )


def _visible(project: Project, role: str) -> bool:
    return role == SUPERUSER or not project.draft


def _permissions(role: str) -> tuple[str, ...]:
    return {SUPERUSER: ("run", "update", "delete"), MEMBER: ("run", "update")}.get(role, ())


def _check_choice(query: Any, name: str, choices: Sequence[str]) -> None:
    value = query.get(name)
    if value is not None and value not in choices:
        words = f"Select a valid choice. {value} is not one of the available choices."
        raise RefusedError(400, {name: [words]})


def _required_project(request: web.Request) -> int | None:
    if "project_id" not in request.query:
        raise RefusedError(400, {"project_id": [REQUIRED]})
    return integer(request.query["project_id"])
