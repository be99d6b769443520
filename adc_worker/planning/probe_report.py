"""What two tasks told about a job, and the sizes of others. Nothing is guessed from a file size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, median_low

PROBE_IMAGES, PROBE_DOWNLOADS = 2, 4
PIXEL_BYTES = 3  # uint8 RGB, the form in which images wait and travel
ALIKE = 1.5  # images stand for each other whose pixels differ by no larger factor
ALIKE_S = 2.0  # and whose inference by no larger one
# Memory of inference grows with the pixels. A model has some that does not: beyond so many times the pixels that were
# measured no more than an image as float32 twice, and as uint8 twice, is reckoned for each pixel more.
PROPORTIONAL_UP_TO, INFERENCE_BYTES_PER_PX = 16, 30


@dataclass(frozen=True, slots=True)
class ImageProbe:
    """The measurements of one image, or of a batch's mean image; seconds, bytes and pixels.

    Attributes:
        first_byte_s, download_s: 0 where the image was still on disk from an earlier run.
        inference_s: with its way to the device.
        keep_s: to keep the results of its batch, however large that is.
    """

    compressed_bytes: int
    width_px: int
    height_px: int
    decode_scratch_bytes: int
    first_byte_s: float
    download_s: float
    decode_s: float
    inference_s: float
    keep_s: float

    @property
    def tensor_bytes(self) -> int:
        return PIXEL_BYTES * self.width_px * self.height_px

    def decoded_like(self, other: ImageProbe) -> ImageProbe:
        """Return the same image with the seconds of a decode in proportion to another's pixels."""
        return replace(self, decode_s=other.decode_s * self.tensor_bytes / other.tensor_bytes)


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
        images: what was decoded and inferred, in that order: one or two, or the mean of the first batches.
        base_bytes: memory of the process tree after the models were loaded.
        inference_peak_bytes: growth of the process's memory while inferring one image, the largest that was measured.
        vram_peak_bytes: the same of the GPU's memory; 0 on the CPU.
        peak_tensor_bytes: pixels of that image; 0: of the largest of `images`.
        uncertain: whether these images may not stand for the job: plans leave a wider margin.
        downloads: how many there were at once on average, so how many may have shared the link.
        sighted: images of the job that were not decoded; their times are reckoned.
    """

    images: tuple[ImageProbe, ...]
    base_bytes: int
    inference_peak_bytes: int
    vram_peak_bytes: int = 0
    uncertain: bool = False
    downloads: float = 1.0
    sighted: tuple[ImageProbe, ...] = ()
    peak_tensor_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("a probe report needs at least one image")

    @classmethod
    def of(cls, measured: ProbeReport, staged: Sequence[Sighting], listed: Sequence[Sighting]) -> ProbeReport:
        """Return what was measured with what was sighted, and whether both together stand for the job.

        They do not when one image alone was measured, or none downloaded; when the one that sets the pace was slower
        than the other; or when sizes differ: of the two while nothing else is known of the job's images, or of the
        largest that is known of and the larger of the two.
        """
        sizes, whole = [one.tensor_bytes for one in measured.images], measured.with_sighted([*staged, *listed])
        uncertain = (
            len(sizes) < PROBE_IMAGES
            or not any(one.download_s > 0 for one in measured.images)
            or measured.inference_s > ALIKE_S * min(one.inference_s for one in measured.images)
            or (max(sizes) > ALIKE * min(sizes) and not listed)
            or whole.tensor_bytes_per_image > ALIKE * max(sizes)
        )
        return replace(whole, uncertain=uncertain)

    def with_sighted(self, sightings: Iterable[Sighting]) -> ProbeReport:
        """Return the report of a job that has these images, too; what was not measured of them goes by their pixels."""
        measured, sighted = self._largest, list(self.sighted)
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
            )
            sighted.append(more.decoded_like(measured))
        return replace(self, sighted=tuple(sighted))

    def measured_by(self, batches: Sequence[ImageProbe], downloads: float) -> ProbeReport:
        """Return the report with what batches, each of them a mean image, took; the sizes of before stay known."""
        inference_s = median(one.inference_s for one in batches)
        keep_s = min(self.keep_s, median(one.keep_s for one in batches))  # of a batch of one, or of more
        images = tuple(replace(one, inference_s=inference_s, keep_s=keep_s) for one in batches)
        largest = max(images, key=lambda one: one.tensor_bytes)
        known = tuple(one.decoded_like(largest) for one in self._all)
        if any(one.download_s > 0 for one in images):  # over connections that are open
            known = tuple(replace(one, first_byte_s=0.0, download_s=0.0) for one in known)
        uncertain = not any(one.download_s > 0 for one in images + known)
        return replace(self._of_images(images, downloads), sighted=known, uncertain=uncertain)

    def for_images_like(self, seen: ImageProbe, downloads: float) -> ProbeReport:
        """Return the report of a job whose images look like `seen`."""
        return self._of_images((replace(seen, keep_s=min(self.keep_s, seen.keep_s)),), downloads)

    def _of_images(self, images: tuple[ImageProbe, ...], downloads: float) -> ProbeReport:
        return replace(
            self, images=images, sighted=(), uncertain=False, downloads=downloads, peak_tensor_bytes=self._peak_bytes_at
        )

    def for_link(self, slower: float, downloads: float) -> ProbeReport:
        """Return the report of a job whose downloads, so many at once, take `slower` times as long."""
        return self._each(
            lambda one: replace(one, download_s=slower * one.download_s, first_byte_s=slower * one.first_byte_s),
            downloads,
        )

    def slower(self, factor: float) -> ProbeReport:
        """Return that of a job whose decodes take `factor` times as long; and downloads, by a later first byte."""

        def slowed(one: ImageProbe) -> ImageProbe:
            more_s = (factor - 1) * one.download_s
            waiting_s, decode_s = one.first_byte_s + more_s, factor * one.decode_s
            return replace(one, decode_s=decode_s, first_byte_s=waiting_s, download_s=one.download_s + more_s)

        return self._each(slowed, self.downloads)

    def _each(self, change: Callable[[ImageProbe], ImageProbe], downloads: float) -> ProbeReport:
        images, sighted = (tuple(map(change, group)) for group in (self.images, self.sighted))
        return replace(self, images=images, sighted=sighted, downloads=downloads)

    def link_per_s(self, connections: int) -> float:
        """Return the images/s that the link brings over so many connections.

        No more than the downloads brought that were measured: they may have shared it, and only trying more tells.
        """
        return min(connections / self.download_s, self.downloads / max(self.transfer_s, 1e-6))

    @property
    def link_bytes_per_s(self) -> float:
        """What the downloads that were measured brought together."""
        return self.downloads / max(self._transfer_s_per_byte, 1e-12)

    @property
    def _transfer_s_per_byte(self) -> float:
        downloads = [one for one in self._all if one.download_s > 0]
        size_bytes = sum(one.compressed_bytes for one in downloads)
        return sum(one.download_s - one.first_byte_s for one in downloads) / max(1, size_bytes)

    def link_slower(self, seen: ImageProbe) -> float:
        """Return how many times as long as was to be expected a download took, given its bytes; 1 where none was."""
        downloads = [one for one in self._all if one.download_s > 0]
        if not downloads or seen.download_s <= 0:
            return 1.0
        waiting_s = median(one.first_byte_s for one in downloads)
        return seen.download_s / max(1e-6, waiting_s + self._transfer_s_per_byte * seen.compressed_bytes)

    def inference_bytes(self, tensor_bytes: int) -> int:
        """Return the memory that inference of an image of so many bytes takes."""
        return self._scaled(self.inference_peak_bytes, tensor_bytes)

    @property
    def vram_bytes(self) -> int:
        """The memory of the GPU that inference of the largest image takes."""
        return self._scaled(self.vram_peak_bytes, self.tensor_bytes_per_image)

    def _scaled(self, peak_bytes: int, tensor_bytes: int) -> int:
        scale, more = tensor_bytes / self._peak_bytes_at, tensor_bytes - self._peak_bytes_at
        flat = peak_bytes + INFERENCE_BYTES_PER_PX * more // PIXEL_BYTES
        if scale > PROPORTIONAL_UP_TO:
            return min(flat, int(scale * peak_bytes))
        return max(flat, int(scale * peak_bytes)) if more < 0 else int(scale * peak_bytes)

    @property
    def _peak_bytes_at(self) -> int:
        return self.peak_tensor_bytes or self._largest.tensor_bytes

    @property
    def _largest(self) -> ImageProbe:
        return max(self.images, key=lambda one: one.tensor_bytes)

    @property
    def _all(self) -> tuple[ImageProbe, ...]:
        return self.images + self.sighted

    @property
    def tensor_bytes_per_image(self) -> int:
        """Bytes of one decoded image; the largest seen, since memory is planned with it."""
        return max(image.tensor_bytes for image in self._all)

    @property
    def usual_tensor_bytes(self) -> int:
        """Bytes of the decoded image in the middle: of mixed sizes, batches hold as many as of this one."""
        return median_low([image.tensor_bytes for image in self._all])

    @property
    def download_inference_ratio(self) -> float:
        """Seconds to download an image over one connection, divided by the seconds to infer it."""
        return self.download_s / self.inference_s

    @property
    def download_s(self) -> float:
        """Seconds of the usual download: the first ones pay for connections and DNS.

        As long as an inference where every image was still on disk from an earlier run.
        """
        measured = [image.download_s for image in self._all if image.download_s > 0]
        return median(measured) if measured else self.inference_s

    @property
    def transfer_s(self) -> float:
        """Seconds that the mean download takes after its first byte: large images make a link's rate."""
        return self._transfer_s_per_byte * fmean(one.compressed_bytes for one in self._all)

    @property
    def decode_s(self) -> float:
        return fmean(image.decode_s for image in self._all)

    @property
    def inference_s(self) -> float:
        """Seconds per image of the last one that is not small: the first call of a model pays for its set-up."""
        usual = [one for one in self.images if ALIKE * one.tensor_bytes >= self._largest.tensor_bytes]
        return max(usual[-1].inference_s, 1e-4)

    @property
    def keep_s(self) -> float:
        """Seconds to keep the results of a batch."""
        return min(one.keep_s for one in self.images)

    @property
    def compressed_bytes(self) -> int:
        return max(image.compressed_bytes for image in self._all)

    @property
    def decode_scratch_bytes(self) -> int:
        return max(image.decode_scratch_bytes for image in self._all)
