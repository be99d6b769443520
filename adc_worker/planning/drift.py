"""Whether a job's images, its inference or its link have changed for good since they were measured."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from adc_worker.planning.measurements import ALIKE, ImageProbe, ProbeReport
from adc_worker.planning.observation import Observation
from adc_worker.planning.plan import IngestPlan
from adc_worker.planning.window import SETTLE_S, BatchWindow

# Larger images: one batch may be a stray image, and those a quarter larger stay inside a plan
# (0.8 x 1.25 = 1). Smaller ones: mixed jobs alternate, so only a long stretch is a change.
GROWTH = 1.25
SHRINKAGE = 1 / 1.5
LARGER_BATCHES = 2
SMALLER_BATCHES = 20
# Downloads of one link scatter by a factor of two.
LINK_CHANGE = 3.0
# Inference takes as long as there are insects on an image: only a stretch of batches tells.
PACE_CHANGE = 2.0
PACE_BATCHES = 8
# So many batches stand in for a probe that says little about its job.
FIRST_BATCHES = 4
# From this share of ready batches on, the GPU does not wait.
READY_ENOUGH = 0.95


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a drift is judged with beside the batches.

    Attributes:
        plan: the plan in force.
        window: the batches since it took effect.
        since_change_s: seconds since then.
        engine_tried: whether decode processes were tried in place of threads.
    """

    plan: IngestPlan
    window: BatchWindow
    since_change_s: float
    engine_tried: bool


class Drift:
    """The batches since the report in force was made, and what they say of it."""

    def __init__(self, report: ProbeReport) -> None:
        self._report = report
        self._seen: deque[Observation] = deque(maxlen=SMALLER_BATCHES)

    def add(self, seen: Observation) -> None:
        self._seen.append(seen)

    def changed_report(self, now: Circumstances) -> ProbeReport | None:
        """Return the report to plan with from now on; None while the one in force holds."""
        report = self._report
        downloads = self._downloads_at_once(now)
        images = [seen.image for seen in self._seen]
        if report.uncertain and len(images) == FIRST_BATCHES:
            return report.measured_by(images, downloads)
        images_at_other_pace = self._images_at_other_pace(now)
        if images_at_other_pace:
            return report.measured_by(images_at_other_pace, downloads)
        growths = [image.tensor_bytes / report.tensor_bytes_per_image for image in images]
        if _has_changed(growths, GROWTH, SHRINKAGE):
            return report.for_images_like(images[-1], downloads)
        slower = self._slower_link(now)
        if slower is None:
            return None
        return report.for_link(slower, downloads)

    def _downloads_at_once(self, now: Circumstances) -> float:
        """Return how many transfers a new report is of.

        Where the GPU waits, what came tells (Little's law); else all that were planned.
        """
        planned = now.plan.download_concurrency
        if now.window.readiness >= READY_ENOUGH:
            return planned
        image = now.window.newest.image
        transfer_s = image.download_s - image.first_byte_s
        busy = now.window.images_per_s * transfer_s
        return max(1.0, min(planned, busy))

    def _images_at_other_pace(self, now: Circumstances) -> list[ImageProbe]:
        """Return the window's images if inference took another time for all of them.

        Images of another size take another time by themselves: they do not count.
        """
        images = now.window.images
        if len(images) < PACE_BATCHES or now.window.seconds < SETTLE_S:
            return []
        usual_bytes = self._report.usual_tensor_bytes
        sizes = [image.tensor_bytes / usual_bytes for image in images]
        if not all(1 / ALIKE <= size <= ALIKE for size in sizes):
            return []
        paces = [image.inference_s / self._report.inference_s for image in images]
        # A GPU may be slower beside decode threads: that is answered with processes first.
        may_be_slower = now.engine_tried or not now.window.newest.host.gpu
        is_slower = may_be_slower and min(paces) > PACE_CHANGE
        is_faster = max(paces) < 1 / PACE_CHANGE
        return images if is_slower or is_faster else []

    def _slower_link(self, now: Circumstances) -> float | None:
        """Return how many times as long as planned downloads take, when the link has changed.

        A slower link matters when the GPU waits for it. Downloads are faster also when fewer of them share the link,
        which is no change. Small images take what the large ones leave, so only the large ones tell.
        """
        downloaded = self._large_downloads()
        factors = [self._report.link_slower(seen.image) for seen in downloaded]
        slow_factors, waits = _latest_slow(downloaded, factors)
        if waits >= LARGER_BATCHES:
            return min(slow_factors[:LARGER_BATCHES])
        if now.since_change_s < SETTLE_S:
            return None
        more_at_once = now.plan.download_concurrency / self._report.downloads
        not_by_sharing = [max(factor, factor / more_at_once) for factor in factors]
        if _has_changed(not_by_sharing, math.inf, 1 / LINK_CHANGE):
            return max(factors)
        return None

    def _large_downloads(self) -> list[Observation]:
        downloaded = [seen for seen in self._seen if seen.image.download_s > 0]
        most_bytes = max((seen.image.compressed_bytes for seen in downloaded), default=0)
        return [seen for seen in downloaded if LINK_CHANGE * seen.image.compressed_bytes >= most_bytes]


def _latest_slow(seen: Sequence[Observation], factors: Sequence[float]) -> tuple[list[float], int]:
    """Return the factors of the slow downloads at the end, newest first, and for how many the GPU waited."""
    slow_factors: list[float] = []
    waits = 0
    for batch, factor in zip(reversed(seen), reversed(factors), strict=True):
        if factor <= LINK_CHANGE:
            break
        slow_factors.append(factor)
        waits += not batch.ready
    return slow_factors, waits


def _has_changed(ratios: Sequence[float], larger: float, smaller: float) -> bool:
    """Whether values have left the planned one behind: upwards at once, downwards after a long stretch."""
    latest = ratios[-LARGER_BATCHES:]
    has_grown = len(latest) == LARGER_BATCHES and min(latest) > larger
    has_shrunk = len(ratios) == SMALLER_BATCHES and max(ratios) < smaller
    return has_grown or has_shrunk
