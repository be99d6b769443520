"""Measures a job with its first two images. Their results are kept and posted like any other."""

from __future__ import annotations

from contextlib import closing

import torch

from adc_worker.errors import ImageError, ImageTooLarge
from adc_worker.host.budget import HostBudget
from adc_worker.host.memory import PeakResidentMemory
from adc_worker.ingest.arena import Arena
from adc_worker.ingest.decode import decode
from adc_worker.ingest.decode_processes import ProcessEngine
from adc_worker.ingest.staged_queue import StagedQueue
from adc_worker.ingest.staging import StagedImage
from adc_worker.models.pipeline import Pipeline
from adc_worker.runtime.inference import infer_and_keep, measured_image
from adc_worker.runtime.outcomes import JobOutcomes
from adc_worker.runtime.signs_of_life import SignsOfLife
from adc_worker.tuning.probe_report import ImageProbe, ProbeReport

PROBE_IMAGES = 2


def probe(
    source: StagedQueue,
    pipeline: Pipeline,
    host: HostBudget,
    outcomes: JobOutcomes,
    life: SignsOfLife,
    limit_s: float,
) -> ProbeReport | None:
    """Measure up to two images that can be decoded, one at a time and `limit_s` at most; None when the job has none.

    An image that fails has its outcome and another takes its place.
    """
    probes: list[ImageProbe] = []
    inference_peak_bytes = 0
    while len(probes) < PROBE_IMAGES and (image := source.get()) is not None:
        try:
            with life.inference(limit_s):
                measured, peak_bytes = _measure(image, pipeline, host, outcomes)
        except ImageError as error:
            outcomes.fail_staged(image, error)
            continue
        probes.append(measured)
        inference_peak_bytes = max(inference_peak_bytes, peak_bytes)
    if not probes:
        return None
    return ProbeReport(tuple(probes), host.used_bytes, inference_peak_bytes)


def _measure(image: StagedImage, pipeline: Pipeline, host: HostBudget, outcomes: JobOutcomes) -> tuple[ImageProbe, int]:
    header = image.header
    needed = header.pixel_bytes + header.scratch_bytes
    room = min(host.limit_bytes - host.used_bytes, host.available_bytes)
    if needed > room:
        raise ImageTooLarge(f"decoding it needs {needed} bytes of memory; this worker has {room} left")
    arena = Arena(header.pixel_bytes)
    region = arena.allocate(header.pixel_bytes)
    if region is None:
        raise AssertionError("an empty arena holds the image it was made for")
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
        arena.free(region)
        arena.close()
    return measured_image([image], [report], stats), peak_bytes
