"""The verdict on images that ended the worker twice while nothing else ran: their fault, or this machine's?"""

from __future__ import annotations

from adc_worker.errors import ImageError, WorkerFault
from adc_worker.journal.journal import Journal
from adc_worker.runtime.outcomes import JobOutcomes

SEVERAL = 3  # images in a row that fail alike, none between them succeeding, point to the machine


class StruckOut:
    """One job's images that are not tried again, until another image has shown that this machine works."""

    def __init__(self, job_id: int, journal: Journal, outcomes: JobOutcomes) -> None:
        self._outcomes = outcomes
        self._held = [held for held in journal.unfinished(job_id) if held.struck_out]
        if len(self._held) >= SEVERAL:
            journal.pardon(held.id for held in self._held)
            raise WorkerFault(
                f"{len(self._held)} images in a row ended the worker twice each, none between them succeeded (the last:"
                f" {', '.join(self._held[-1].strikes or ())}): this machine or the model is at fault, not the images"
            )

    @property
    def waiting(self) -> int:
        """How many have no verdict yet."""
        return len(self._held)

    def fail_once_others_succeed(self) -> None:
        if self._outcomes.done:
            self.fail()

    def fail(self) -> None:
        while self._held:
            held = self._held.pop()
            how = ", ".join(held.strikes or ())
            message = f"processing it alone ended the worker {len(held.strikes or ())} times ({how})"
            self._outcomes.fail(held.id, held.task, ImageError(message))
