"""What the worker would do on a job, worked out before it runs, from a sample that spends no delivery where it can."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import torch

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.leases import LeaseTerms
from adc_worker.antenna.wire import Capture, Task
from adc_worker.errors import ConfigurationError, ImageError, LinkError, StagingFull
from adc_worker.host import budget
from adc_worker.host.budget import HostBudget
from adc_worker.host.memory import anonymous_bytes
from adc_worker.host.share import MemoryShare
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.download import ImageClient
from adc_worker.ingest.staging import StagedImage, StagedQueue, StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster, PosterLimits
from adc_worker.log import get_logger
from adc_worker.models import registry
from adc_worker.models.pipeline import CallSizes
from adc_worker.runtime.job import ceilings
from adc_worker.runtime.outcomes import ImageResult, JobOutcomes, Outcomes
from adc_worker.runtime.probe import known_sizes, listed, probe
from adc_worker.runtime.signs_of_life import SignsOfLife
from adc_worker.settings import Settings
from adc_worker.tuning.plan import IngestPlan
from adc_worker.tuning.policy import BATCH_SIZE_MAX, FIXED_DOWNLOADS, FIXED_PREFETCH, IngestPolicy
from adc_worker.tuning.probe_report import PIXEL_BYTES, PROBE_IMAGES, ProbeReport

_log = get_logger(__name__)

POST_TIMEOUT_S = 60.0
ATTEMPTS = 3  # at each place of the list, where photographs cannot be had
# An ingest of today's constants, worked out as it was measured (RESULTS.md, rows `today-…`): float32 pixels, Pillow and
# ToTensor in place of our decoder, 400 MB a loader process (measurements, "Other costs").
OLD_LOADERS, OLD_LOADER_BYTES, OLD_BYTES_PER_PX = 4, 400_000_000, 12
OLD_DECODE_FACTOR, OLD_S_PER_PX, FETCH_S = 1.8, 20e-9, 0.12


@dataclass(frozen=True, slots=True)
class OldConstants:
    """What today's constants do on a job: arithmetic, not a run."""

    batch_size: int
    loaders: int
    peak_bytes: int  # where loading keeps up, so that every queue fills
    out_of_memory: bool
    images_per_s: float

    @classmethod
    def on(cls, report: ProbeReport, host: HostBudget, batch: int, loaders: int) -> OldConstants:
        """Work it out: each loader has its queue full and makes a batch, as a list and its stack; one is inferred."""
        px = report.tensor_bytes_per_image / PIXEL_BYTES
        batches = loaders * (FIXED_PREFETCH + 2) + 1 + host.gpu  # a GPU's batch is pinned, too
        peak = report.base_bytes + loaders * OLD_LOADER_BYTES + int(batches * batch * OLD_BYTES_PER_PX * px)
        decode_s = OLD_DECODE_FACTOR * report.decode_s + OLD_S_PER_PX * px
        loading_s = FETCH_S + batch * (report.download_s / min(batch, FIXED_DOWNLOADS) + decode_s)
        rate = min(loaders * batch / loading_s, host.cores / decode_s, 1 / report.inference_s)
        return cls(batch, loaders, peak, peak > host.limit_bytes, rate)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured of a job, and what follows."""

    job_id: int
    pipeline: str
    source: str
    report: ProbeReport
    host: HostBudget
    plan: IngestPlan
    old: OldConstants

    def to_json(self) -> dict[str, Any]:
        return {
            "job_id": self.job_id,
            "pipeline": self.pipeline,
            "source": self.source,
            "machine": asdict(self.host),
            "sample": asdict(self.report),
            "plan": self.plan.log_fields(),
            "why": dict(self.plan.why),
            "old_constants": asdict(self.old),
        }


class _Unposted:
    """Takes the results of photographs that no task was spent on."""

    def begin(self, images: Sequence[StagedImage], *, alone: bool = False) -> None:
        pass

    def succeed(self, results: Sequence[ImageResult]) -> None:
        pass

    def fail_staged(self, image: StagedImage, error: ImageError) -> None:
        _log.warning("photograph_left_out", image_id=image.task.image_id, error=str(error))


def tune(config: Settings, target: str) -> Tuning:
    """Find a job of a pipeline's slug or a project's number, measure two of its images, and plan.

    Where Antenna lists the job's photographs no task is taken; else two are, and what they come to is posted.
    """
    specs, project = registry.available(config), int(target) if target.isdecimal() else None
    if project is None and target not in specs:
        raise ConfigurationError(f"{target}: neither a project's number nor a pipeline ({', '.join(sorted(specs))})")
    config.user_data_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    addresses = AddressPolicy(
        urlsplit(config.antenna_api_base_url).hostname or "", config.image_allowed_networks, config.image_allowed_hosts
    )
    with (
        AntennaClient(config.antenna_api_base_url, config.token) as client,
        ImageClient(config.image_max_bytes, addresses, config.antenna_ack_wait_seconds / 2) as images,
        TemporaryDirectory(dir=config.user_data_path, prefix="tune-") as folder,
        closing(MemoryShare(config.user_data_path)) as share,
        ExitStack() as stack,
    ):
        job = next(iter(client.jobs(list(specs) if project is not None else [target], project)), None)
        if job is None:
            raise ConfigurationError(f"{target}: Antenna lists no job with tasks for it; start one, or name another")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = CallSizes(config.localization_batch_size, config.classification_batch_size)
        pipeline = registry.load(specs[job.pipeline_slug], device, sizes)
        staging = StagingArea(Path(folder), images, config.image_max_pixels, config.staging_max_bytes)
        captures, queue = listed(client, job.id), StagedQueue()
        sink: Outcomes = _Unposted()

        def measure() -> HostBudget:
            return budget.measure(
                anonymous_bytes((os.getpid(),)),
                share,
                config.memory_limit_bytes,
                staging.disk.limit_bytes,
                staging_in_memory=staging.disk.in_memory,
                vram_free_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
            )

        host = measure()
        _stage_listed(captures, staging, queue)
        source = f"{len(queue.images)} of {len(captures)} photographs that Antenna listed; no task was taken"
        if not queue.images:
            sink = stack.enter_context(_tasks(client, images, config, job.id, queue))
            source = f"{len(queue.images)} tasks, worked off and posted: Antenna lists no photograph to be had"
        queue.end()
        known, limit_s = known_sizes(captures), config.antenna_ack_wait_seconds
        report = probe(queue, pipeline, measure, sink, SignsOfLife(), limit_s, lambda: True, lambda: known)
    if report is None:
        raise ConfigurationError(f"{target}: no image of job {job.id} could be measured; try another job")
    lease = LeaseTerms(config.antenna_ack_wait_seconds, config.antenna_max_deliver)
    plan = IngestPolicy(ceilings(config)).plan(report, host, lease)
    batch = config.antenna_api_batch_size or BATCH_SIZE_MAX
    old = OldConstants.on(report, host, batch, config.num_workers or OLD_LOADERS)
    return Tuning(job.id, job.pipeline_slug, source, report, host, plan, old)


def _stage_listed(captures: Sequence[Capture], staging: StagingArea, queue: StagedQueue) -> None:
    """Download photographs from far apart in the list until two are here; a few may be broken."""
    apart = max(1, len(captures) // PROBE_IMAGES)
    candidates = [one for first in range(min(apart, ATTEMPTS)) for one in captures[first::apart]]
    for number, one in enumerate(candidates):
        if len(queue.images) == PROBE_IMAGES:
            return
        with suppress(ImageError, LinkError, StagingFull):
            task = Task(image_id=one.id, image_url=one.url, reply_subject="none")
            queue.put(staging.stage(number, task, lambda: False))


@contextmanager
def _tasks(
    client: AntennaClient, images: ImageClient, config: Settings, job_id: int, queue: StagedQueue
) -> Iterator[Outcomes]:
    """Take two tasks and stage them; what they come to is kept in the journal, and posted in the end."""
    with closing(Journal(config.journal_path)) as journal:
        poster = Poster(journal, client, PosterLimits(config.antenna_max_pending_posts, config.antenna_max_post_bytes))
        folder = config.effective_staging_path
        owner = journal.owner_in(folder)
        staging = StagingArea(folder, images, config.image_max_pixels, config.staging_max_bytes, owner=owner)
        outcomes = JobOutcomes(job_id, journal, staging, poster)
        try:
            for held in journal.record(job_id, client.fetch_tasks(job_id, PROBE_IMAGES)):
                try:
                    queue.put(staging.stage(held.id, held.task, lambda: False))
                except ImageError as error:
                    outcomes.fail(held.id, held.task, error)
                except (LinkError, StagingFull) as error:
                    outcomes.give_up(held.id, held.task, str(error))
            yield outcomes
        finally:
            poster.close(POST_TIMEOUT_S)  # what could not be posted by then, the next worker here posts
