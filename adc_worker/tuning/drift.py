"""Notices when a job's images stop looking like those its plan was made from."""

from __future__ import annotations

from collections import deque

from adc_worker.tuning.probe_report import ImageProbe, ProbeReport

# A plan aims at 0.7 of the limit; images a quarter larger still stay inside it (0.7 x 1.25 < 0.9).
GROWTH = 1.25
SHRINKAGE = 1 / 1.5
LARGER_BATCHES = 2  # one batch may be a stray image; design, "The governor": a new plan within two batches
SMALLER_BATCHES = 20  # mixed jobs alternate: only a long stretch of small images is a change


class DriftWatch:
    """Compares each batch's images to the report in force."""

    def __init__(self, report: ProbeReport) -> None:
        self._report = report
        self._recent: deque[float] = deque(maxlen=SMALLER_BATCHES)

    def observe(self, seen: ImageProbe) -> ProbeReport | None:
        """Take one batch's mean image; return the report to plan with when the images have changed for good."""
        self._recent.append(seen.tensor_bytes / self._report.tensor_bytes_per_image)
        larger = list(self._recent)[-LARGER_BATCHES:]
        grown = len(larger) == LARGER_BATCHES and min(larger) > GROWTH
        shrunk = len(self._recent) == SMALLER_BATCHES and max(self._recent) < SHRINKAGE
        if not grown and not shrunk:
            return None
        self._report = self._report.for_images_like(seen)
        self._recent.clear()
        return self._report
