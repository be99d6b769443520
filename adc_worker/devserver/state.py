"""What the desk's Antenna knows: projects, pipelines, photographs and jobs, in memory, and their JSON.

Decides nothing over time; `lifecycle` moves jobs from state to state.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

DISPATCH_MODES = ("internal", "sync_api", "async_api")
FINAL = ("SUCCESS", "FAILURE", "REVOKED")
SERVED = ("STARTED", "RETRY")  # tasks are handed out in these
STATUSES = (*FINAL, *SERVED, "CREATED", "PENDING", "CANCELING", "RECEIVED", "UNKNOWN")
DETECTOR_TYPES = ("detection", "localization", "segmentation")
MAX_FAILED_SHARE = 0.5


def now() -> str:
    """Antenna writes times without a zone."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat()


@dataclass(frozen=True, slots=True)
class Project:
    id: int
    name: str
    draft: bool  # shown to nobody but the superuser

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.name, "draft": self.draft, "description": "", "user_permissions": []}


@dataclass(frozen=True, slots=True)
class Capture:
    """One photograph."""

    id: int
    project_id: int
    collection_id: int
    url: str
    file: Path | None
    width_px: int | None
    height_px: int | None
    size_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        row = {"id": self.id, "url": self.url, "path": self.url.rsplit("/", 1)[-1], "project": self.project_id}
        sizes = {"width": self.width_px, "height": self.height_px, "size": self.size_bytes}
        return {**row, **sizes, "timestamp": None, "deployment": None, "event": None, "detections_count": 0}


@dataclass(slots=True)
class Pipeline:
    """A pipeline without algorithms takes results of any algorithm; one that has some insists on them."""

    id: int
    slug: str
    name: str
    version: int = 1
    description: str = ""
    algorithms: dict[str, dict[str, Any]] = field(default_factory=dict)  # by key

    def accepts(self, result: Mapping[str, Any]) -> bool:
        """Whether a result can be saved: one detector there, every algorithm known, no scores empty."""
        classifications = [c for detection in result["detections"] for c in detection["classifications"]]
        if result["pipeline"] != self.slug or any(not c["scores"] for c in classifications):
            return False
        used = {entry["algorithm"]["key"] for entry in (*result["detections"], *classifications)}
        detectors = [a for a in self.algorithms.values() if a["task_type"] in DETECTOR_TYPES]
        return not self.algorithms or (len(detectors) == 1 and used <= self.algorithms.keys())

    def to_json(self) -> dict[str, Any]:
        row = {"id": self.id, "name": self.name, "slug": self.slug, "version": self.version}
        return {**row, "description": self.description, "algorithms": list(self.algorithms.values())}


@dataclass(frozen=True, slots=True)
class JobView:
    """One moment of a job. Image ids are strings, as in tasks; seconds are `time.monotonic`."""

    id: int
    status: str
    image_ids: Sequence[str]  # in the order given to `add_job`
    total: int
    processed: int  # failed ones included
    failed: int
    results: Mapping[str, dict[str, Any]]  # what was saved, by image
    errors: Mapping[str, str]  # error text by image
    stray_errors: Sequence[str]  # errors that name no image of the job: acknowledged, never counted
    refused: Sequence[dict[str, Any]]  # results that could not be saved: never acknowledged
    deliveries: Mapping[str, int]  # how often each image was handed out
    posts: Mapping[str, int]  # how often each image was posted
    first_saved_s: float | None
    last_saved_s: float | None


@dataclass(slots=True)
class Job:
    id: int
    name: str
    project: Project
    pipeline: Pipeline
    collection_id: int
    captures: list[Capture]
    dispatch_mode: str = "async_api"
    status: str = "CREATED"
    processed: set[str] = field(default_factory=set)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    stray_errors: list[str] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    deliveries: Counter[str] = field(default_factory=Counter)
    posts: Counter[str] = field(default_factory=Counter)
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)
    started_at: str | None = None
    finished_at: str | None = None
    first_saved_s: float | None = None
    last_saved_s: float | None = None

    @property
    def counted(self) -> int:
        return len(self.results.keys() | self.errors.keys())

    @property
    def mostly_failed(self) -> bool:
        return len(self.errors) > MAX_FAILED_SHARE * len(self.captures)

    def move(self, status: str) -> None:
        self.status = status
        self.updated_at = now()
        if status == "STARTED":
            self.started_at, self.finished_at = self.updated_at, None
        elif status in FINAL:
            self.finished_at = self.updated_at

    def mark_saved(self) -> None:
        self.last_saved_s = time.monotonic()
        self.first_saved_s = self.first_saved_s or self.last_saved_s
        self.updated_at = now()

    def reset(self) -> None:
        """Forget all results. The order changes, as it does on a server that shuffles: old subjects name others."""
        self.captures = self.captures[1:] + self.captures[:1]
        for counted in (self.processed, self.results, self.errors, self.stray_errors, self.refused):
            counted.clear()
        self.first_saved_s = self.last_saved_s = None

    def tasks(self) -> list[dict[str, str]]:
        return [{"id": str(c.id), "image_id": str(c.id), "image_url": c.url} for c in self.captures]

    def view(self) -> JobView:
        return JobView(
            id=self.id,
            status=self.status,
            image_ids=[str(c.id) for c in self.captures],
            total=len(self.captures),
            processed=len(self.processed),
            failed=len(self.errors),
            results=dict(self.results),
            errors=dict(self.errors),
            stray_errors=tuple(self.stray_errors),
            refused=tuple(self.refused),
            deliveries=dict(self.deliveries),
            posts=dict(self.posts),
            first_saved_s=self.first_saved_s,
            last_saved_s=self.last_saved_s,
        )

    def to_json(self, permissions: Sequence[str]) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "status": self.status,
            "dispatch_mode": self.dispatch_mode,
            "project": self.project.to_json(),
            "pipeline": self.pipeline.to_json(),
            "source_image_collection": {"id": self.collection_id, "name": f"collection {self.collection_id}"},
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "progress": {"summary": {"status": self.status, "progress": self._share()}, "stages": self._stages()},
            "user_permissions": list(permissions),
        }

    def _share(self) -> float:
        return self.counted / max(1, len(self.captures))

    def _stages(self) -> list[dict[str, Any]]:
        total, processed = len(self.captures), len(self.processed)
        detections = [d for result in self.results.values() for d in result["detections"]]
        classified = sum(len(d["classifications"]) for d in detections)
        results = {"captures": len(self.results), "detections": len(detections), "classifications": classified}
        counts = {"processed": processed, "remaining": total - processed, "failed": len(self.errors)}
        done = 1.0 if self.started_at else 0.0
        return [
            _stage("collect", done, {"total_images": total}),
            _stage("process", processed / max(1, total), counts),
            _stage("results", self._share(), results),
        ]


@dataclass(slots=True)
class Desk:
    """Everything this Antenna holds, by id."""

    projects: dict[int, Project] = field(default_factory=dict)
    pipelines: dict[str, Pipeline] = field(default_factory=dict)  # by slug
    captures: dict[int, Capture] = field(default_factory=dict)
    jobs: dict[int, Job] = field(default_factory=dict)
    _ids: Iterator[int] = field(default_factory=lambda: count(1))

    def new_id(self) -> int:
        return next(self._ids)

    def add_project(self, name: str, *, draft: bool = False) -> Project:
        project = Project(self.new_id(), name, draft)
        self.projects[project.id] = project
        return project

    def pipeline(self, slug: str, name: str | None = None) -> Pipeline:
        """The pipeline of that slug, made where there is none."""
        if slug not in self.pipelines:
            self.pipelines[slug] = Pipeline(self.new_id(), slug, name or slug)
        return self.pipelines[slug]

    def add_job(self, name: str, project: Project, pipeline: Pipeline, captures: list[Capture], mode: str) -> Job:
        collection_id = captures[0].collection_id if captures else 0
        job = Job(self.new_id(), name, project, pipeline, collection_id, captures, mode)
        self.jobs[job.id] = job
        return job


def _stage(key: str, share: float, counts: Mapping[str, int]) -> dict[str, Any]:
    status = "SUCCESS" if share >= 1 else "STARTED" if share > 0 else "CREATED"
    params = [{"key": name, "name": name.replace("_", " ").title(), "value": value} for name, value in counts.items()]
    return {"key": key, "name": key.title(), "status": status, "progress": share, "params": params}
