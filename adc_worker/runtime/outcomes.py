"""Where every task of a job ends: a kept result, a kept error, or a lease that was given up knowingly."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from adc_worker.antenna.leases import LeaseTerms, lease_clock
from adc_worker.antenna.wire import SuccessResult, Task, error_result
from adc_worker.errors import DeviceMemoryShort, ImageError, StagedFileLost, WorkerFault
from adc_worker.host.memory import oom_kills
from adc_worker.ingest.staging import StagedImage, StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.journal.poster import Poster
from adc_worker.log import get_logger
from adc_worker.redaction import knowing, public_url, redact

_log = get_logger(__name__)

_TakeBack = Callable[[StagedImage, DeviceMemoryShort | StagedFileLost], None]

STRUCK_OUT_MAX = 3  # images in a row that end the worker alike, none between them succeeding, point to the machine


@dataclass(frozen=True, slots=True)
class ImageResult:
    """One image's serialised result on its way into the journal."""

    task_id: int
    parts: Iterable[bytes]
    detections: int
    truncated: bool
    damaged: bool = False


class Outcomes(Protocol):
    """What the probe and a batch tell of their images."""

    def begin(self, images: Sequence[StagedImage], *, alone: bool = False) -> None: ...
    def succeed(self, results: Sequence[ImageResult]) -> None: ...
    def fail_staged(self, image: StagedImage, error: ImageError) -> None: ...
    def leave_staged(self, image: StagedImage, error: DeviceMemoryShort | StagedFileLost) -> None: ...


class JobOutcomes:
    """Records outcomes durably, removes the staged file, and counts; safe to use from several threads.

    `struck_out` are images that ended the worker twice while nothing else ran: they get their error when another image
    has shown that this machine and the model work, and wait until then.

    Raises:
        WorkerFault: they are so many that this machine or the model is at fault.
    """

    def __init__(self, job_id: int, journal: Journal, staging: StagingArea, poster: Poster) -> None:
        self._job_id = job_id
        self._log = _log.bind(job_id=job_id)
        self._journal = journal
        self._staging = staging
        self._poster = poster
        self._lock = threading.Lock()
        self._on_settled: Callable[[], None] | None = None
        self._judge: Callable[[StagedImage, ImageError], None] | None = None
        self._try_again_later: _TakeBack | None = None
        self.done = 0
        self.detections = 0
        self.truncated = 0
        self.damaged = 0
        self.failed: Counter[str] = Counter()
        self.given_up = 0
        self.struck_out = [held for held in journal.unfinished(job_id) if held.struck_out]
        if len(self.struck_out) >= STRUCK_OUT_MAX:
            journal.pardon(held.id for held in self.struck_out)
            raise WorkerFault(
                f"{len(self.struck_out)} images in a row ended the worker twice each, none between them succeeded (the"
                f" last: {', '.join(self.struck_out[-1].strikes or ())}): this machine or the model is at fault, not"
                " the images"
            )

    @property
    def settled(self) -> int:
        """Tasks that have an outcome."""
        return self.done + self.failed.total() + self.given_up

    def listen(
        self,
        on_settled: Callable[[], None] | None,
        judge: Callable[[StagedImage, ImageError], None] | None = None,
        try_again_later: _TakeBack | None = None,
    ) -> None:
        """Call `on_settled` after every outcome; `judge` says whose fault it is that a staged image fails.

        `try_again_later` takes back a staged image that cannot be inferred now.
        """
        self._on_settled = on_settled
        self._judge = judge
        self._try_again_later = try_again_later

    def may_take_more(self) -> bool:
        """Whether what is fetched now can be recorded and posted: the journal is writable, the job not refused."""
        return self._journal.check_writable() and not self.is_refused()

    def is_refused(self) -> bool:
        """Whether Antenna refuses this job's results, or the token altogether."""
        return self._poster.refuses(self._job_id)

    def begin(self, images: Sequence[StagedImage], *, alone: bool = False) -> None:
        """Put on record what is about to be decoded and inferred; `alone` when nothing else is."""
        alone = alone or any(image.suspect for image in images)
        self._journal.begin([image.id for image in images], oom_kills(), alone=alone)

    def succeed(self, results: Sequence[ImageResult]) -> None:
        """Keep results: they survive a crash from here on, and their staged files are gone."""
        images = {
            result.task_id: result.parts.task.image_id for result in results if isinstance(result.parts, SuccessResult)
        }
        self._journal.keep([(result.task_id, result.parts) for result in results], images)
        with self._lock:
            self.done += len(results)
            self.detections += sum(result.detections for result in results)
            self.truncated += sum(result.truncated for result in results)
            self.damaged += sum(result.damaged for result in results)
        self._settle([result.task_id for result in results])

    def fail(self, task_id: int, task: Task, error: ImageError) -> None:
        """Keep an error result: the evidence is in the image."""
        with knowing(task.image_url):  # what a library says of a failed download may quote it
            text = redact(str(error))
        self._journal.keep([(task_id, [error_result(task.image_id, text)])], {task_id: task.image_id})
        with self._lock:
            self.failed[type(error).__name__] += 1
        self._log.warning("image_failed", image_id=task.image_id, url=public_url(task.image_url), error=text)
        self._settle([task_id])

    def fail_staged(self, image: StagedImage, error: ImageError) -> None:
        """An image cannot be decoded or inferred."""
        if self._judge is not None:
            self._judge(image, error)
        else:
            self.fail(image.id, image.task, error)

    def leave_staged(self, image: StagedImage, error: DeviceMemoryShort | StagedFileLost) -> None:
        """An image cannot be inferred now, for a reason that lies in this machine: that is no outcome.

        Other programs hold the GPU's memory, or its staged file is gone. Its task stays on record, and its file where
        it is, for another attempt in this turn or in the job's next.
        """
        self._log.warning("image_tried_again_later", image_id=image.task.image_id, error=str(error))
        if self._try_again_later is not None:
            self._try_again_later(image, error)

    def fail_struck_out(self) -> None:
        """Make errors of the images that ended the worker twice."""
        while self.struck_out:
            held = self.struck_out.pop()
            how = ", ".join(held.strikes or ())
            message = f"processing it alone ended the worker {len(held.strikes or ())} times ({how})"
            self.fail(held.id, held.task, ImageError(message))

    def job_has_succeeded(self) -> bool:
        """Whether another image of this job has a result on record: this machine could infer it."""
        return self._journal.has_success(self._job_id)

    def give_up_struck_out(self, lease: LeaseTerms) -> None:
        """Leave images that ended the worker twice to their leases, once those are over and nobody brought new ones.

        Until then they wait for an image that succeeds: without one this machine or the model may be at fault.
        """
        for held in list(self.struck_out):
            left_s = lease.left_s(held.fetched_at, lease_clock())
            if left_s < -lease.ack_wait_s:
                self.struck_out.remove(held)
                how = ", ".join(held.strikes or ())
                self.give_up(held.id, held.task, f"it ended the worker ({how}), and no image has succeeded here since")
        if self.struck_out:
            self._log.error(
                "images_that_ended_the_worker_wait",
                images=len(self.struck_out),
                note="no image has succeeded here, so this machine or the model may be at fault: they get no error"
                " result before one does",
                do="check the stacks in the log above, the GPU, its driver, and that this CPU can run torch",
            )

    def give_up(self, task_id: int, task: Task, reason: str) -> None:
        """Leave a task to its lease: Antenna hands it out again."""
        self._journal.give_up(task_id, task.reply_subject)
        with self._lock:
            self.given_up += 1
        self._log.warning("task_left_to_its_lease", image_id=task.image_id, reason=reason)
        self._settle([task_id])

    def _settle(self, task_ids: Sequence[int]) -> None:
        for task_id in task_ids:
            self._staging.discard(task_id)
        self._poster.wake()
        if self._on_settled is not None:
            self._on_settled()
