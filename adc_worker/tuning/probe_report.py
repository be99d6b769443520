"""What two tasks told about a job, and the sizes of others. Nothing is guessed from a file size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

PROBE_DOWNLOADS = 4
PIXEL_BYTES = 3  # uint8 RGB, the form in which images wait and travel


@dataclass(frozen=True, slots=True)
class ImageProbe:
    """The measurements of one probe image; seconds, bytes and pixels."""

    compressed_bytes: int
    width_px: int
    height_px: int
    decode_scratch_bytes: int
    first_byte_s: float
    download_s: float
    decode_s: float
    inference_s: float
    detections: int
    result_bytes: int

    @property
    def tensor_bytes(self) -> int:
        return PIXEL_BYTES * self.width_px * self.height_px


@dataclass(frozen=True, slots=True)
class Sighting:
    """An image of the job that was not decoded: staged behind the probe, or listed by Antenna; 0 is not known."""

    width_px: int
    height_px: int
    compressed_bytes: int = 0
    decode_scratch_bytes: int = 0
    first_byte_s: float = 0.0
    download_s: float = 0.0


def spread(sightings: Iterable[Sighting], count: int = 10) -> list[Sighting]:
    """Return `count` that stand for many, from the smallest twentieth to the largest: no single stray one."""
    ordered = sorted(sightings, key=lambda one: one.width_px * one.height_px)
    return [ordered[(2 * number + 1) * len(ordered) // (2 * count)] for number in range(count)] if ordered else []


def at_once(transfers: Iterable[tuple[float, float]]) -> float:
    """Return how many transfers, each given as its end and its seconds, ran at once while any did; at least one."""
    total_s = busy_s = 0.0
    until = -math.inf
    for start, end in sorted((end - seconds, end) for end, seconds in transfers):
        total_s += end - start
        busy_s += max(0.0, end - max(start, until))
        until = max(until, end)
    return total_s / busy_s if busy_s > 0 else 1.0


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The measurements of a job's first images, and of the process that took them.

    Attributes:
        images: one or two probes, in the order they were inferred; then what was sighted, with the last one's times.
        base_bytes: memory of the process tree after the models were loaded.
        inference_peak_bytes: growth of the process's memory while inferring one image.
        vram_peak_bytes: the same of the GPU's memory; 0 on the CPU.
        uncertain: whether one image alone, or two that differ, stand for the job: plans leave a wider margin.
        downloads: how many there were at once on average, so how many may have shared the link.
    """

    images: tuple[ImageProbe, ...]
    base_bytes: int
    inference_peak_bytes: int
    vram_peak_bytes: int = 0
    uncertain: bool = False
    downloads: float = 1.0

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("a probe report needs at least one image")

    def with_sighted(self, sightings: Iterable[Sighting]) -> ProbeReport:
        """Return the report of a job that has these images, too; what was not measured of them goes by their pixels."""
        measured, images = self.images[-1], list(self.images)
        for seen in sightings:
            scale = PIXEL_BYTES * seen.width_px * seen.height_px / measured.tensor_bytes
            more = replace(
                measured,
                width_px=seen.width_px,
                height_px=seen.height_px,
                compressed_bytes=seen.compressed_bytes or int(scale * measured.compressed_bytes),
                decode_scratch_bytes=seen.decode_scratch_bytes or int(scale * measured.decode_scratch_bytes),
                first_byte_s=seen.first_byte_s,
                download_s=seen.download_s,
                decode_s=scale * measured.decode_s,
            )
            images.append(more)
        report = replace(self, images=tuple(images))
        larger = report.tensor_bytes_per_image / self.tensor_bytes_per_image
        inference, vram = (int(larger * one) for one in (self.inference_peak_bytes, self.vram_peak_bytes))
        return replace(report, inference_peak_bytes=inference, vram_peak_bytes=vram)

    def measured_by(self, batches: Sequence[ImageProbe], downloads: int) -> ProbeReport:
        """Return the report with the times and the largest size of the first batches, each of them a mean image."""
        largest = max(batches, key=lambda one: one.tensor_bytes)
        linked = [one for one in batches if one.download_s > 0] or self.images
        seen = replace(
            largest,
            decode_s=median(one.decode_s for one in batches),
            inference_s=median(one.inference_s for one in batches),
            download_s=median(one.download_s for one in linked),
            first_byte_s=median(one.first_byte_s for one in linked),
        )
        return self.for_images_like(seen, downloads)

    def for_images_like(self, seen: ImageProbe, downloads: int) -> ProbeReport:
        """Return the report of a job whose images look like `seen`; the pipeline's memory is scaled by pixels."""
        scale = seen.tensor_bytes / self.tensor_bytes_per_image
        inference, vram = (int(scale * one) for one in (self.inference_peak_bytes, self.vram_peak_bytes))
        return ProbeReport((seen,), self.base_bytes, inference, vram, downloads=downloads)

    def for_link_like(self, seen: ImageProbe, downloads: int) -> ProbeReport:
        """Return the report of a job whose downloads, so many at once, take what `seen` took."""
        images = (replace(one, download_s=seen.download_s, first_byte_s=seen.first_byte_s) for one in self.images)
        return replace(self, images=tuple(images), downloads=downloads)

    def slower(self, factor: float) -> ProbeReport:
        """Return that of a job whose decodes take `factor` times as long; and downloads, by a later first byte."""
        images = []
        for one in self.images:
            more_s = (factor - 1) * one.download_s
            waiting_s, decode_s = one.first_byte_s + more_s, factor * one.decode_s
            images.append(replace(one, decode_s=decode_s, first_byte_s=waiting_s, download_s=one.download_s + more_s))
        return replace(self, images=tuple(images))

    @property
    def tensor_bytes_per_image(self) -> int:
        """Bytes of one decoded image; the largest seen, since memory is planned with it."""
        return max(image.tensor_bytes for image in self.images)

    @property
    def download_inference_ratio(self) -> float:
        """Seconds to download an image over one connection, divided by the seconds to infer it."""
        return self.download_s / self.inference_s

    @property
    def download_s(self) -> float:
        """Seconds of the usual download: the first ones pay for connections and DNS.

        As long as an inference where every image was still on disk from an earlier run.
        """
        measured = [image.download_s for image in self.images if image.download_s > 0]
        return median(measured) if measured else self.inference_s

    @property
    def transfer_s(self) -> float:
        """Seconds that the mean download takes after its first byte: large images make a link's rate."""
        return fmean([one.download_s - one.first_byte_s for one in self.images if one.download_s > 0] or [0.0])

    @property
    def decode_s(self) -> float:
        return fmean(image.decode_s for image in self.images)

    @property
    def inference_s(self) -> float:
        """Seconds per image of the warmest probe: the first call of a model pays for its set-up."""
        return max(self.images[-1].inference_s, 1e-4)

    @property
    def compressed_bytes(self) -> int:
        return max(image.compressed_bytes for image in self.images)

    @property
    def decode_scratch_bytes(self) -> int:
        return max(image.decode_scratch_bytes for image in self.images)

    @property
    def result_bytes(self) -> int:
        return max(image.result_bytes for image in self.images)
