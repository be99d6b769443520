"""What the desk's Antenna holds in memory, and what happens to a job from its start to its last result."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from nats.errors import Error as NatsError
from PIL import Image

from adc_worker.antenna.wire import FINAL_STATES, SERVED_STATES
from adc_worker.desk.bodies import Failure, Mode, Pipeline, Success
from adc_worker.desk.broker import Broker

MAX_FAILED_SHARE = 0.5
PROJECT_ID = 1  # the only one, and public
PROJECT = {"id": PROJECT_ID, "name": "Desk"}  # others are empty, and share its pipelines


def now() -> str:
    """Antenna writes times without a zone."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat()


@dataclass(frozen=True, slots=True)
class Capture:
    """One photograph; without a file it is somewhere else."""

    id: int
    collection: int
    url: str
    file: Path | None

    @property
    def size_bytes(self) -> int | None:
        return self.file.stat().st_size if self.file is not None and self.file.is_file() else None

    def to_json(self) -> dict[str, Any]:
        row = {"id": self.id, "url": self.url, "path": self.url.rsplit("/", 1)[-1], "project": PROJECT_ID}
        width, height = _pixels(self.file) if self.file is not None else (None, None)
        unknown = dict.fromkeys(("timestamp", "deployment", "event"))
        return {**row, **unknown, "width": width, "height": height, "size": self.size_bytes, "detections_count": 0}


@cache
def _pixels(file: Path) -> tuple[int | None, int | None]:
    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, Image.DecompressionBombError):  # broken or missing photographs are part of the desk
        return None, None


@dataclass(slots=True, kw_only=True)
class Job:
    """Image ids are strings, as in tasks; seconds are `time.monotonic`."""

    id: int
    pipeline: Pipeline
    collection: int
    dispatch_mode: Mode
    status: str = "CREATED"
    image_ids: list[str]  # in the order given to `add_job`
    processed_ids: set[str] = field(default_factory=set)  # counted, or about to be: failed and refused ones included
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # what was saved, by image
    errors: dict[str, str] = field(default_factory=dict)  # error text by image
    stray_errors: list[str] = field(default_factory=list)  # name no image of the job: acknowledged, never counted
    refused: list[dict[str, Any]] = field(default_factory=list)  # could not be saved: never acknowledged
    deliveries: Counter[str] = field(default_factory=Counter)  # how often each image was handed out
    posts: Counter[str] = field(default_factory=Counter)  # how often each image was posted
    first_saved_s: float | None = None
    last_saved_s: float | None = None
    updated_at: str = field(default_factory=now)
    started_at: str | None = None

    @property
    def total(self) -> int:
        return len(self.image_ids)

    @property
    def processed(self) -> int:
        return len(self.processed_ids)

    @property
    def failed(self) -> int:
        return len(self.errors)

    @property
    def counted(self) -> int:
        return len(self.results) + len(self.errors.keys() - self.results)

    @property
    def mostly_failed(self) -> bool:
        return self.failed > MAX_FAILED_SHARE * self.total

    def move(self, status: str) -> None:
        self.status, self.updated_at = status, now()
        if status == "STARTED":
            self.started_at = self.updated_at

    def record(self, image_ids: Sequence[str], result: Success | Failure) -> None:
        """Save a result for those of its images that are of this job; what was saved first stays."""
        new_ids = [image_id for image_id in image_ids if image_id not in self.results]
        if isinstance(result, Success):
            self.results.update(dict.fromkeys(new_ids, result.model_dump(mode="json")))
        elif image_ids:
            self.errors.update(dict.fromkeys(new_ids, result.error))
        else:
            self.stray_errors.append(result.error)
        if image_ids:
            self.last_saved_s, self.updated_at = time.monotonic(), now()
            self.first_saved_s = self.first_saved_s or self.last_saved_s

    def reset(self) -> None:
        """Forget all results. The order changes, as it does on a server that shuffles: old subjects name others."""
        self.image_ids = self.image_ids[1:] + self.image_ids[:1]
        for kept in (self.processed_ids, self.results, self.errors, self.stray_errors, self.refused):
            kept.clear()
        self.first_saved_s = self.last_saved_s = None

    def snapshot(self) -> Job:
        return replace(self, **{one.name: copy(getattr(self, one.name)) for one in fields(self)})

    def to_json(self) -> dict[str, Any]:
        share = self.counted / max(1, self.total)
        return {
            "id": self.id,
            "name": f"desk {self.pipeline.slug}",
            "status": self.status,
            "dispatch_mode": self.dispatch_mode,
            "project": PROJECT,
            "pipeline": self.pipeline.model_dump(),
            "source_image_collection": {"id": self.collection, "name": f"collection {self.collection}"},
            "updated_at": self.updated_at,
            "started_at": self.started_at,
            "progress": {"summary": {"status": self.status, "progress": share}, "stages": self._stages(share)},
            "user_permissions": [],
        }

    def _stages(self, share: float) -> list[dict[str, Any]]:
        counts = {"processed": self.processed, "remaining": self.total - self.processed, "failed": self.failed}
        detections = sum(len(result["detections"]) for result in self.results.values())
        return [
            _stage("collect", 1.0 if self.started_at else 0.0, total_images=self.total),
            _stage("process", self.processed / max(1, self.total), **counts),
            _stage("results", share, captures=len(self.results), detections=detections),
        ]


def _stage(key: str, share: float, **counters: int) -> dict[str, Any]:
    status = "SUCCESS" if share >= 1 else "STARTED" if share > 0 else "CREATED"
    params = [{"key": name, "value": value} for name, value in counters.items()]
    return {"key": key, "status": status, "progress": share, "params": params}


@dataclass(slots=True)
class Desk:
    """Everything this Antenna holds; one task, `save_for_ever`, saves results one after the other."""

    broker: Broker
    save_delay_s: float  # of one result
    keep_streams: bool  # of finished jobs; Antenna deletes them before the last acknowledgement
    race_at_end: bool  # play Antenna's race: a job whose results are all saved ends only with one more duplicate
    projects: int = 1
    pipelines: dict[str, Pipeline] = field(default_factory=dict)  # by slug
    services: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # by name: their projects
    captures: dict[int, Capture] = field(default_factory=dict)
    jobs: dict[int, Job] = field(default_factory=dict)
    ids: Iterator[int] = field(default_factory=lambda: count(1))
    _queue: asyncio.Queue[tuple[Job, str, Success | Failure]] = field(default_factory=asyncio.Queue)

    def register(self, posted: Pipeline) -> list[str]:
        """Algorithms are only ever added. Returns the slug and keys that are new."""
        created = [] if posted.slug in self.pipelines else [posted.slug]
        pipeline = self.pipelines.setdefault(posted.slug, posted.model_copy(update={"algorithms": []}))
        known = {algorithm.key for algorithm in pipeline.algorithms}
        new = [algorithm for algorithm in posted.algorithms if algorithm.key not in known]
        pipeline.algorithms += new
        return created + [algorithm.key for algorithm in new]

    async def add_job(self, pipeline: Pipeline, captures: Sequence[Capture], mode: Mode) -> int:
        self.register(pipeline)
        self.captures.update({capture.id: capture for capture in captures})
        job = Job(
            id=next(self.ids),
            image_ids=[str(capture.id) for capture in captures],
            pipeline=self.pipelines[pipeline.slug],
            collection=captures[0].collection if captures else 0,
            dispatch_mode=mode,
        )
        self.jobs[job.id] = job
        await self.start(job)
        return job.id

    async def start(self, job: Job) -> None:
        """Publish the job's tasks; without a broker the job fails, as on the real server."""
        tasks = [{"id": i, "image_id": i, "image_url": self.captures[int(i)].url} for i in job.image_ids]
        try:
            if job.dispatch_mode == "async_api":
                await self.broker.create(job.id, tasks)
            job.move("STARTED")
        except NatsError:
            job.move("FAILURE")

    async def cancel(self, job: Job) -> None:
        if job.status not in FINAL_STATES:
            job.move("REVOKED")
            await self.broker.delete(job.id)

    async def retry(self, job: Job) -> None:
        job.reset()
        await self.start(job)

    async def fetch(self, job: Job, n_tasks: int) -> list[dict[str, str]]:
        tasks = await self.broker.fetch(job.id, n_tasks) if job.status in SERVED_STATES else []
        job.deliveries.update(task["image_id"] for task in tasks)
        return tasks

    def post(self, job: Job, reply_subject: str, result: Success | Failure) -> None:
        job.posts.update(result.image_ids)
        self._queue.put_nowait((job, reply_subject, result))

    async def save_for_ever(self) -> None:
        while True:
            await self._save(*await self._queue.get())

    async def _save(self, job: Job, reply_subject: str, result: Success | Failure) -> None:
        if job.dispatch_mode != "async_api":
            job.move("FAILURE")
        if job.status in FINAL_STATES:
            return
        in_job = set(job.image_ids)
        image_ids = [image_id for image_id in result.image_ids if image_id in in_job]
        repeated = all(image_id in job.results or image_id in job.errors for image_id in image_ids)
        job.processed_ids.update(image_ids)  # counted before the save: a save that fails leaves the job half counted
        await asyncio.sleep(self.save_delay_s)
        if isinstance(result, Success) and not job.pipeline.accepts(result):
            job.refused.append(result.model_dump(mode="json"))
            return
        job.record(image_ids, result)
        if job.counted == job.total and job.status not in FINAL_STATES and (repeated or not self.race_at_end):
            job.move("FAILURE" if job.mostly_failed else "SUCCESS")
            if not self.keep_streams:
                await self.broker.delete(job.id)
        await self.broker.acknowledge(reply_subject)
