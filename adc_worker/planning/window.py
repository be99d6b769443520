"""The batches since the last change took effect: what rates and readiness are taken from."""

from __future__ import annotations

from collections import deque
from statistics import fmean

from adc_worker.planning.measurements import ImageProbe
from adc_worker.planning.observation import Observation

WINDOW_BATCHES = 20  # chosen, with SETTLE_S: over these rates and readiness are compared
# Before anything grows its last change is this old: a worker that starts beside this one takes
# memory for its libraries first, and for a job some seconds later (RESULTS.md, "The governor").
SETTLE_S = 5.0


class BatchWindow:
    """Observations over at least WINDOW_BATCHES batches and SETTLE_S seconds, as far as there are.

    Quick batches of one image differ too much for few of them to tell, so both bounds count.
    """

    def __init__(self) -> None:
        self._batches: deque[Observation] = deque()
        self._seconds = 0.0

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, seen: Observation) -> None:
        self._batches.append(seen)
        self._seconds += seen.batch_s
        while len(self._batches) > WINDOW_BATCHES:
            seconds_without_oldest = self._seconds - self._batches[0].batch_s
            if seconds_without_oldest < SETTLE_S:
                return
            self._batches.popleft()
            self._seconds = seconds_without_oldest

    def clear(self) -> None:
        self._batches.clear()
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """The time that the batches cover."""
        return self._seconds

    @property
    def newest(self) -> Observation:
        return self._batches[-1]

    @property
    def images(self) -> list[ImageProbe]:
        """The mean image of each batch."""
        return [batch.image for batch in self._batches]

    @property
    def readiness(self) -> float:
        """Share of the batches that were ready when asked for; 1 when there is none."""
        if not self._batches:
            return 1.0
        return fmean(batch.ready for batch in self._batches)

    @property
    def images_per_s(self) -> float:
        """The rate over all batches of the window."""
        images = sum(batch.images for batch in self._batches)
        seconds = sum(batch.batch_s for batch in self._batches)
        return images / seconds
