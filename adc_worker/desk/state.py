"""What the desk's Antenna holds in memory, and what happens to a job until its last result."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from nats.errors import Error as NatsError

from adc_worker.antenna.wire import FINAL_STATES, SERVED_STATES
from adc_worker.desk.bodies import Failure, Mode, Pipeline, Success
from adc_worker.desk.broker import Broker
from adc_worker.desk.job import Capture, Job


@dataclass(slots=True)
class _Post:
    """A result that was posted and waits to be saved."""

    job: Job
    reply_subject: str
    result: Success | Failure


@dataclass(slots=True)
class Desk:
    """One task, `save_forever`, saves the posted results one after the other.

    Attributes:
        save_delay_s: what saving one result takes.
        keep_streams: of finished jobs; Antenna deletes them before the last acknowledgement.
        race_at_end: play Antenna's race, in which a job whose results are all saved does not end
            before one of them is posted again.
        projects: how many there are; all but the first are empty and share its pipelines.
        pipelines: by slug.
        services: the projects that each worker's name is registered with.
    """

    broker: Broker
    save_delay_s: float
    keep_streams: bool
    race_at_end: bool
    projects: int = 1
    pipelines: dict[str, Pipeline] = field(default_factory=dict)
    services: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    captures: dict[int, Capture] = field(default_factory=dict)
    jobs: dict[int, Job] = field(default_factory=dict)
    ids: Iterator[int] = field(default_factory=lambda: count(1))
    _queue: asyncio.Queue[_Post] = field(default_factory=asyncio.Queue)

    def register(self, posted: Pipeline) -> list[str]:
        """Add a pipeline, or algorithms to a known one; returns the slug and keys that are new.

        As on the real server, no algorithm is ever removed.
        """
        created = []
        if posted.slug not in self.pipelines:
            created.append(posted.slug)
            self.pipelines[posted.slug] = posted.model_copy(update={"algorithms": []})
        pipeline = self.pipelines[posted.slug]
        known_keys = {algorithm.key for algorithm in pipeline.algorithms}
        for algorithm in posted.algorithms:
            if algorithm.key not in known_keys:
                pipeline.algorithms.append(algorithm)
                created.append(algorithm.key)
        return created

    async def add_job(self, pipeline: Pipeline, captures: Sequence[Capture], mode: Mode) -> int:
        self.register(pipeline)
        for capture in captures:
            self.captures[capture.id] = capture
        job = Job(
            id=next(self.ids),
            image_ids=[str(capture.id) for capture in captures],
            pipeline=self.pipelines[pipeline.slug],
            collection=captures[0].collection if captures else 0,
            dispatch_mode=mode,
        )
        self.jobs[job.id] = job
        await self._start(job)
        return job.id

    async def cancel(self, job: Job) -> None:
        if job.status not in FINAL_STATES:
            job.move_to("REVOKED")
            await self.broker.delete(job.id)

    async def retry(self, job: Job) -> None:
        job.reset()
        await self._start(job)

    async def fetch(self, job: Job, n_tasks: int) -> list[dict[str, str]]:
        if job.status not in SERVED_STATES:
            return []
        tasks = await self.broker.fetch(job.id, n_tasks)
        job.deliveries.update(task["image_id"] for task in tasks)
        return tasks

    def post(self, job: Job, reply_subject: str, result: Success | Failure) -> None:
        job.posts.update(result.image_ids)
        self._queue.put_nowait(_Post(job, reply_subject, result))

    async def save_forever(self) -> None:
        while True:
            post = await self._queue.get()
            await self._save(post)

    async def _start(self, job: Job) -> None:
        """Publish the job's tasks; without NATS the job fails, as on the real server."""
        try:
            if job.dispatch_mode == "async_api":
                await self.broker.create(job.id, self._tasks(job))
            job.move_to("STARTED")
        except NatsError:
            job.move_to("FAILURE")

    def _tasks(self, job: Job) -> list[dict[str, str]]:
        tasks = []
        for image_id in job.image_ids:
            url = self.captures[int(image_id)].url
            tasks.append({"id": image_id, "image_id": image_id, "image_url": url})
        return tasks

    async def _save(self, post: _Post) -> None:
        job = post.job
        if job.dispatch_mode != "async_api":
            job.move_to("FAILURE")
        if job.status in FINAL_STATES:
            return
        known_ids = set(job.image_ids)
        image_ids = [image_id for image_id in post.result.image_ids if image_id in known_ids]
        is_repeated = all(job.has_outcome(image_id) for image_id in image_ids)
        # Antenna counts before it saves: a save that fails leaves the job half counted.
        job.processed_ids.update(image_ids)
        await asyncio.sleep(self.save_delay_s)
        if isinstance(post.result, Success) and not job.pipeline.accepts(post.result):
            job.refused.append(post.result.model_dump(mode="json"))
            return
        job.record(image_ids, post.result)
        if is_repeated or not self.race_at_end:
            await self._end_if_counted(job)
        await self.broker.acknowledge(post.reply_subject)

    async def _end_if_counted(self, job: Job) -> None:
        if job.counted < job.total or job.status in FINAL_STATES:
            return
        job.move_to("FAILURE" if job.mostly_failed else "SUCCESS")
        if not self.keep_streams:
            await self.broker.delete(job.id)
