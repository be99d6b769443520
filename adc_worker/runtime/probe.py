"""Measures a job with its first two images. Their results are kept and posted like any other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.wire import Capture
from adc_worker.errors import AntennaError, ImageError, ImageTooLarge, StagedFileLost
from adc_worker.host.budget import HostBudget
from adc_worker.host.memory import PeakResidentMemory
from adc_worker.ingest.arena import Arena, Region
from adc_worker.ingest.decode import decode
from adc_worker.ingest.decode_processes import ProcessEngine
from adc_worker.ingest.staging import StagedImage, StagedQueue
from adc_worker.log import get_logger
from adc_worker.models.calls import PeakVram
from adc_worker.models.pipeline import Pipeline
from adc_worker.planning.measurements import PROBE_IMAGES, ImageProbe, ProbeReport, Sighting, at_once, spread
from adc_worker.runtime.inference import infer_and_keep, measured_image
from adc_worker.runtime.outcomes import Outcomes
from adc_worker.runtime.signs_of_life import SignsOfLife

_log = get_logger(__name__)

LOOKS_MIN = 5  # chosen: so often, a second apart, this worker's own memory is looked at before an image is too large


def listed(client: AntennaClient, job_id: int) -> list[Capture]:
    """Return some of a job's photographs as Antenna lists them, which spends no delivery; none where it does not."""
    try:
        return client.captures(job_id)
    except AntennaError as error:
        _log.info("captures_not_listed", job_id=job_id, error=str(error))
        return []


def known_sizes(captures: Iterable[Capture]) -> list[Sighting]:
    """Return sizes that stand for those of all captures, as far as Antenna knows them."""
    return spread(Sighting(one.width, one.height, one.size or 0) for one in captures if one.width and one.height)


def probe(
    source: StagedQueue,
    pipeline: Pipeline,
    measure: Callable[[], HostBudget],
    outcomes: Outcomes,
    life: SignsOfLife,
    limit_s: float,
    wait: Callable[[], bool],
    sizes: Callable[[], Sequence[Sighting]],
) -> ProbeReport | None:
    """Measure up to two images that can be decoded, one at a time and `limit_s` at most; None when the job has none.

    The second is the largest of those that are there: memory is planned with it. An image that fails, or whose lease is
    over, has its outcome and another takes its place. One for which others on this host leave no memory waits for it,
    as long as `wait`, which lets a moment pass, says so. What is staged by then tells its size and how long a download
    takes over open connections; `sizes` returns those that Antenna lists.
    """
    base_bytes = measure().used_bytes
    memory_wait = MemoryWait(measure, wait)
    probes: list[ImageProbe] = []
    downloaded: list[StagedImage] = []
    inference_peak_bytes = vram_peak_bytes = 0
    while len(probes) < PROBE_IMAGES and (image := source.get(largest=bool(probes))) is not None:
        try:
            if not memory_wait.for_image(image):
                source.put(image)
                return None
            if not source.still_wanted(image):
                continue
            with life.inference(limit_s):
                vram = PeakVram(pipeline.device)
                measured, peak_bytes = _measure(image, pipeline, outcomes)
        except ImageTooLarge as error:
            if memory_wait.may_pass(image):  # the decoder found no memory, which others had
                source.put(image)
                if not wait():
                    return None
            else:
                outcomes.fail_staged(image, error)
            continue
        except ImageError as error:
            outcomes.fail_staged(image, error)
            continue
        except FileNotFoundError as error:
            outcomes.leave_staged(image, StagedFileLost(str(error)))
            continue
        probes.append(measured)
        downloaded.append(image)
        inference_peak_bytes = max(inference_peak_bytes, peak_bytes)
        vram_peak_bytes = max(vram_peak_bytes, vram.growth_bytes())
    if not probes:
        return None
    listed, waiting = sizes(), list(source.images)
    transfers = [(one.staged_at, one.download.total_s - one.download.first_byte_s) for one in downloaded + waiting]
    report = ProbeReport(tuple(probes), base_bytes, inference_peak_bytes, vram_peak_bytes, downloads=at_once(transfers))
    return ProbeReport.of(report, list(map(_sighting, waiting)), listed)


def _sighting(image: StagedImage) -> Sighting:
    """Return what is known of an image that was staged; a new connection's set-up is paid once."""
    header, download = image.header, image.download
    return Sighting(
        header.width_px,
        header.height_px,
        header.compressed_bytes,
        header.scratch_bytes,
        download.first_byte_s - download.set_up_s,
        download.total_s - download.set_up_s,
    )


class MemoryWait:
    """Waits until an image fits beside what others hold; only what the whole limit could never hold is too large.

    What this worker uses itself may fall, too: results on their way to the disk, images that are staged in memory. So
    the least that it was seen to use counts, once it was looked at often enough.
    """

    def __init__(self, measure: Callable[[], HostBudget], wait: Callable[[], bool]) -> None:
        self._measure = measure
        self._wait = wait
        self._looks = 0
        self._least_used_bytes = sys.maxsize

    def for_image(self, image: StagedImage) -> bool:
        """Wait for an image's memory; False when that is not to be waited for any more.

        Raises:
            ImageTooLarge: the whole limit less what this worker always uses does not hold it.
        """
        needed = _bytes_alone(image)
        told = False
        while True:
            host = self._look()
            if needed <= host.alone_bytes:
                return True
            self._check_possible(needed, host)
            if not told:
                _log.warning(
                    "waiting_for_memory",
                    needed_bytes=needed,
                    available_bytes=host.alone_bytes,
                    note=f"the job waits until its next image fits: {host.who_holds_it()}",
                )
                told = True
            if not self._wait():
                return False

    def may_pass(self, image: StagedImage) -> bool:
        """Whether an image whose decoder found no memory would now find less than its header says that it needs."""
        return _bytes_alone(image) > self._look().alone_bytes

    def _look(self) -> HostBudget:
        host = self._measure()
        self._looks += 1
        self._least_used_bytes = min(self._least_used_bytes, host.used_bytes)
        return host

    def _check_possible(self, needed: int, host: HostBudget) -> None:
        most = max(0, host.whole_limit_bytes - self._least_used_bytes)
        exceeds_all = needed > host.whole_limit_bytes or (needed > most and self._looks >= LOOKS_MIN)
        if exceeds_all:
            raise ImageTooLarge(f"decoding it needs {needed} bytes of memory; this worker has {most} for one image")


def _bytes_alone(image: StagedImage) -> int:
    return image.header.pixel_bytes + image.header.scratch_bytes


def _measure(image: StagedImage, pipeline: Pipeline, outcomes: Outcomes) -> tuple[ImageProbe, int]:
    header = image.header
    arena, region = Arena(header.pixel_bytes), Region(0, header.pixel_bytes)
    try:
        rows = arena.view(region, header.shape)
        outcomes.begin([image], alone=True)
        if image.suspect:
            with closing(ProcessEngine(arena, 1, header.scratch_bytes)) as engine:
                report = engine.submit(image.path, header, region).result()
        else:
            report = decode(image.path, header, rows)
        memory = PeakResidentMemory()
        stats = infer_and_keep(pipeline, torch.from_numpy(rows).unsqueeze(0), [image], [report], outcomes)
        peak_bytes = memory.growth_bytes()
    finally:
        arena.close()
    seen = _sighting(image)
    measured = measured_image([image], [report], stats)
    return replace(measured, first_byte_s=seen.first_byte_s, download_s=seen.download_s), peak_bytes
