"""From a posted result to a finished job: one task saves results one after the other, as slowly as Antenna does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nats.errors import Error as NatsError

from adc_worker.devserver.state import FINAL, SERVED, Job

if TYPE_CHECKING:
    from adc_worker.devserver.broker import Broker


@dataclass(slots=True)
class Lifecycle:
    """Starts, feeds, counts and ends jobs.

    Attributes:
        save_delay_s: how long saving one result takes.
        keep_streams: leave a finished job's stream in place; Antenna deletes it before the last acknowledgement.
        race_at_end: play Antenna's race: a job whose results are all saved ends only with one more duplicate.
    """

    broker: Broker
    save_delay_s: float
    keep_streams: bool
    race_at_end: bool
    _queue: asyncio.Queue[tuple[Job, str, dict[str, Any]]] = field(default_factory=asyncio.Queue)

    async def start(self, job: Job) -> None:
        """Publish the job's tasks; without a broker the job fails, as on the real server."""
        try:
            if job.dispatch_mode == "async_api":
                await self.broker.create(job.id, job.tasks())
            job.move("STARTED")
        except NatsError:
            job.move("FAILURE")

    async def cancel(self, job: Job) -> None:
        if job.status not in FINAL:
            job.move("REVOKED")
            await self.broker.delete(job.id)

    async def retry(self, job: Job) -> None:
        job.reset()
        await self.start(job)

    async def fetch(self, job: Job, n_tasks: int) -> list[dict[str, str]]:
        tasks = await self.broker.fetch(job.id, n_tasks) if job.status in SERVED else []
        job.deliveries.update(task["image_id"] for task in tasks)
        return tasks

    def post(self, job: Job, reply_subject: str, result: dict[str, Any]) -> None:
        job.posts.update(_image_ids(result))
        self._queue.put_nowait((job, reply_subject, result))

    async def save_for_ever(self) -> None:
        while True:
            await self._save(*await self._queue.get())

    async def _save(self, job: Job, reply_subject: str, result: dict[str, Any]) -> None:
        if job.dispatch_mode != "async_api":
            job.move("FAILURE")
        if job.status in FINAL:
            return
        in_job = {str(capture.id) for capture in job.captures}
        image_ids = [image_id for image_id in _image_ids(result) if image_id in in_job]
        repeated = all(image_id in job.results or image_id in job.errors for image_id in image_ids)
        job.processed.update(image_ids)  # counted before the save: a save that fails leaves the job half counted
        await asyncio.sleep(self.save_delay_s)
        if "detections" in result and not job.pipeline.accepts(result):
            job.refused.append(result)
            return
        _record(job, image_ids, result)
        await self._finish(job, after_repeat=repeated)
        await self.broker.acknowledge(reply_subject)

    async def _finish(self, job: Job, *, after_repeat: bool) -> None:
        complete = job.counted == len(job.captures)
        if job.status in FINAL or not complete or (self.race_at_end and not after_repeat):
            return
        job.move("FAILURE" if job.mostly_failed else "SUCCESS")
        if not self.keep_streams:
            await self.broker.delete(job.id)


def _record(job: Job, image_ids: list[str], result: dict[str, Any]) -> None:
    if "detections" in result:
        for image_id in image_ids:
            job.results.setdefault(image_id, result)
    elif not image_ids:
        job.stray_errors.append(str(result["error"]))
    else:
        for image_id in image_ids:
            if image_id not in job.results:
                job.errors.setdefault(image_id, str(result["error"]))
    if image_ids:
        job.mark_saved()


def _image_ids(result: dict[str, Any]) -> list[str]:
    if "detections" in result:
        return [str(image["id"]) for image in result["source_images"]]
    return [] if result.get("image_id") is None else [str(result["image_id"])]
