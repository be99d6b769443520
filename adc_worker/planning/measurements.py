"""What the first tasks of a job told, and the sizes of its other images.

Nothing is guessed from a file size: sizes come from headers, times from clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, median_low

PROBE_IMAGES = 2
PROBE_DOWNLOADS = 4
PIXEL_BYTES = 3  # uint8 RGB, the form in which images wait and travel
# Images stand for each other whose pixels differ by no larger factor, and whose inference by no
# larger one (chosen).
ALIKE = 1.5
ALIKE_S = 2.0
# Memory of inference grows with the pixels, but a model has some that does not. Beyond so many times
# the pixels that were measured, each further pixel counts as an image does at least: as float32
# twice, and as uint8 twice.
PROPORTIONAL_UP_TO = 16
INFERENCE_BYTES_PER_PX = 30
# Smallest divisors: a stage that was measured as nothing takes at least this.
_SHORTEST_S = 1e-6
_SHORTEST_INFERENCE_S = 1e-4
_SHORTEST_S_PER_BYTE = 1e-12


@dataclass(frozen=True, slots=True)
class ImageProbe:
    """The measurements of one image, or of a batch's mean image; seconds, bytes and pixels.

    Attributes:
        first_byte_s: until the first byte came; 0 where the image was still on disk.
        download_s: of the whole download; 0 where the image was still on disk.
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

    @property
    def was_downloaded(self) -> bool:
        return self.download_s > 0

    @property
    def transfer_s(self) -> float:
        """Seconds from the first byte to the last."""
        return self.download_s - self.first_byte_s

    def decoded_like(self, other: ImageProbe) -> ImageProbe:
        """Return the same image with the decode seconds of another, in proportion to its pixels."""
        decode_s = other.decode_s * self.tensor_bytes / other.tensor_bytes
        return replace(self, decode_s=decode_s)


@dataclass(frozen=True, slots=True)
class Sighting:
    """An image of the job that was not decoded: staged behind the probe, or listed by Antenna.

    What is 0 is not known.
    """

    width_px: int
    height_px: int
    compressed_bytes: int = 0
    decode_scratch_bytes: int = 0
    first_byte_s: float = 0.0
    download_s: float = 0.0


def spread(sightings: Iterable[Sighting], count: int = 10) -> list[Sighting]:
    """Return `count` sightings that stand for many, from the smallest twentieth to the largest.

    None of them is a single stray image.
    """
    ordered = sorted(sightings, key=lambda one: one.width_px * one.height_px)
    if not ordered:
        return []
    # The middles of `count` equal parts.
    places = [(2 * number + 1) * len(ordered) // (2 * count) for number in range(count)]
    return [ordered[place] for place in places]


def at_once(transfers: Iterable[tuple[float, float]]) -> float:
    """Return how many transfers ran at once on average while any did; at least one.

    Each transfer is given as its end and its length, in seconds.
    """
    spans = sorted((end - seconds, end) for end, seconds in transfers)
    total_s = 0.0
    busy_s = 0.0
    busy_until = -math.inf
    for start, end in spans:
        total_s += end - start
        busy_s += max(0.0, end - max(start, busy_until))
        busy_until = max(busy_until, end)
    if busy_s <= 0:
        return 1.0
    return total_s / busy_s


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

    # --- how reports are made

    @classmethod
    def of(cls, measured: ProbeReport, staged: Sequence[Sighting], listed: Sequence[Sighting]) -> ProbeReport:
        """Return what was measured with what was sighted, and whether both together stand for the job.

        They do not in any of these cases:
        one image alone was measured, or none was downloaded;
        the image that sets the pace was slower than the other;
        sizes differ, of the two while nothing else is known, or of the largest known and the larger of the two.
        """
        sizes = [image.tensor_bytes for image in measured.images]
        whole = measured.with_sighted([*staged, *listed])
        fastest_s = min(image.inference_s for image in measured.images)
        nothing_downloaded = not any(image.was_downloaded for image in measured.images)
        pace_is_doubtful = measured.inference_s > ALIKE_S * fastest_s
        two_sizes_only = max(sizes) > ALIKE * min(sizes) and not listed
        larger_ones_known = whole.tensor_bytes_per_image > ALIKE * max(sizes)
        uncertain = (
            len(sizes) < PROBE_IMAGES or nothing_downloaded or pace_is_doubtful or two_sizes_only or larger_ones_known
        )
        return replace(whole, uncertain=uncertain)

    def with_sighted(self, sightings: Iterable[Sighting]) -> ProbeReport:
        """Return the report of a job that has these images, too.

        What was not measured of them goes by their pixels.
        """
        sighted = list(self.sighted)
        sighted.extend(_reckoned(seen, self._largest) for seen in sightings)
        return replace(self, sighted=tuple(sighted))

    def measured_by(self, batches: Sequence[ImageProbe], downloads: float) -> ProbeReport:
        """Return the report with what batches took, each given as its mean image.

        The sizes of before stay known.
        """
        inference_s = median(batch.inference_s for batch in batches)
        # To keep a batch of one, or of more.
        keep_s = min(self.keep_s, median(batch.keep_s for batch in batches))
        images = tuple(replace(batch, inference_s=inference_s, keep_s=keep_s) for batch in batches)
        largest = max(images, key=lambda image: image.tensor_bytes)
        known = tuple(image.decoded_like(largest) for image in self._all)
        if any(image.was_downloaded for image in images):
            # Those came over open connections; a download that paid for a new one is forgotten.
            known = tuple(replace(image, first_byte_s=0.0, download_s=0.0) for image in known)
        uncertain = not any(image.was_downloaded for image in images + known)
        report = self._of_images(images, downloads)
        return replace(report, sighted=known, uncertain=uncertain)

    def for_images_like(self, seen: ImageProbe, downloads: float) -> ProbeReport:
        """Return the report of a job whose images look like `seen`."""
        image = replace(seen, keep_s=min(self.keep_s, seen.keep_s))
        return self._of_images((image,), downloads)

    def _of_images(self, images: tuple[ImageProbe, ...], downloads: float) -> ProbeReport:
        return replace(
            self,
            images=images,
            sighted=(),
            uncertain=False,
            downloads=downloads,
            peak_tensor_bytes=self._peak_bytes_at,
        )

    def for_link(self, slower: float, downloads: float) -> ProbeReport:
        """Return the report of a job whose downloads, so many at once, take `slower` times as long."""

        def over_other_link(image: ImageProbe) -> ImageProbe:
            first_byte_s = slower * image.first_byte_s
            return replace(image, download_s=slower * image.download_s, first_byte_s=first_byte_s)

        return self._with_each(over_other_link, downloads)

    def slower(self, factor: float) -> ProbeReport:
        """Return the report of a job whose decodes and downloads take `factor` times as long.

        Downloads do by a later first byte.
        """

        def slowed(image: ImageProbe) -> ImageProbe:
            more_s = (factor - 1) * image.download_s
            return replace(
                image,
                decode_s=factor * image.decode_s,
                first_byte_s=image.first_byte_s + more_s,
                download_s=image.download_s + more_s,
            )

        return self._with_each(slowed, self.downloads)

    def _with_each(self, change: Callable[[ImageProbe], ImageProbe], downloads: float) -> ProbeReport:
        images = tuple(change(image) for image in self.images)
        sighted = tuple(change(image) for image in self.sighted)
        return replace(self, images=images, sighted=sighted, downloads=downloads)

    # --- the link

    def link_per_s(self, connections: int) -> float:
        """Return the images/s that the link brings over so many connections.

        No more than the downloads brought that were measured: they may have shared it, and only trying more tells.
        """
        by_connections = connections / self.download_s
        by_sharing = self.downloads / max(self.transfer_s, _SHORTEST_S)
        return min(by_connections, by_sharing)

    @property
    def link_bytes_per_s(self) -> float:
        """What the downloads that were measured brought together."""
        return self.downloads / max(self._transfer_s_per_byte, _SHORTEST_S_PER_BYTE)

    @property
    def _downloaded(self) -> list[ImageProbe]:
        return [image for image in self._all if image.was_downloaded]

    @property
    def _transfer_s_per_byte(self) -> float:
        size_bytes = sum(image.compressed_bytes for image in self._downloaded)
        transfer_s = sum(image.transfer_s for image in self._downloaded)
        return transfer_s / max(1, size_bytes)

    def link_slower(self, seen: ImageProbe) -> float:
        """Return how many times as long a download took as was to be expected of its bytes.

        1 where nothing was downloaded.
        """
        downloaded = self._downloaded
        if not downloaded or not seen.was_downloaded:
            return 1.0
        waiting_s = median(image.first_byte_s for image in downloaded)
        expected_s = waiting_s + self._transfer_s_per_byte * seen.compressed_bytes
        return seen.download_s / max(_SHORTEST_S, expected_s)

    # --- memory of inference

    def inference_bytes(self, tensor_bytes: int) -> int:
        """Return the memory that inference of an image of so many bytes takes."""
        return self._scaled(self.inference_peak_bytes, tensor_bytes)

    @property
    def vram_bytes(self) -> int:
        """The memory of the GPU that inference of the largest image takes."""
        return self._scaled(self.vram_peak_bytes, self.tensor_bytes_per_image)

    def _scaled(self, peak_bytes: int, tensor_bytes: int) -> int:
        more_bytes = tensor_bytes - self._peak_bytes_at
        scale = tensor_bytes / self._peak_bytes_at
        proportional = int(scale * peak_bytes)
        by_pixels = peak_bytes + INFERENCE_BYTES_PER_PX * more_bytes // PIXEL_BYTES
        if scale > PROPORTIONAL_UP_TO:
            # Never less than what an image at the end of the proportional part takes.
            return max(PROPORTIONAL_UP_TO * peak_bytes, min(by_pixels, proportional))
        if more_bytes < 0:
            return max(by_pixels, proportional)
        return proportional

    @property
    def _peak_bytes_at(self) -> int:
        return self.peak_tensor_bytes or self._largest.tensor_bytes

    # --- the images of the job

    @property
    def _largest(self) -> ImageProbe:
        return max(self.images, key=lambda image: image.tensor_bytes)

    @property
    def _all(self) -> tuple[ImageProbe, ...]:
        return self.images + self.sighted

    @property
    def tensor_bytes_per_image(self) -> int:
        """Bytes of one decoded image; the largest seen, since memory is planned with it."""
        return max(image.tensor_bytes for image in self._all)

    @property
    def known_tensor_bytes(self) -> frozenset[int]:
        """The sizes in bytes of all decoded images that are known of the job."""
        return frozenset(image.tensor_bytes for image in self._all)

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
        if not self._downloaded:
            return self.inference_s
        return median(image.download_s for image in self._downloaded)

    @property
    def transfer_s(self) -> float:
        """Seconds that the mean download takes after its first byte: large images make a link's rate."""
        mean_bytes = fmean(image.compressed_bytes for image in self._all)
        return self._transfer_s_per_byte * mean_bytes

    @property
    def decode_s(self) -> float:
        return fmean(image.decode_s for image in self._all)

    @property
    def inference_s(self) -> float:
        """Seconds per image of the last one that is not small: the first call of a model pays for its set-up."""
        largest_bytes = self._largest.tensor_bytes
        usual = [image for image in self.images if ALIKE * image.tensor_bytes >= largest_bytes]
        return max(usual[-1].inference_s, _SHORTEST_INFERENCE_S)

    @property
    def keep_s(self) -> float:
        """Seconds to keep the results of a batch."""
        return min(image.keep_s for image in self.images)

    @property
    def compressed_bytes(self) -> int:
        return max(image.compressed_bytes for image in self._all)

    @property
    def decode_scratch_bytes(self) -> int:
        return max(image.decode_scratch_bytes for image in self._all)


def _reckoned(seen: Sighting, measured: ImageProbe) -> ImageProbe:
    """Return a sighted image with the measurements of another one, in proportion to its pixels."""
    scale = PIXEL_BYTES * seen.width_px * seen.height_px / measured.tensor_bytes
    compressed_bytes = seen.compressed_bytes or int(scale * measured.compressed_bytes)
    scratch_bytes = seen.decode_scratch_bytes or int(scale * measured.decode_scratch_bytes)
    image = replace(
        measured,
        width_px=seen.width_px,
        height_px=seen.height_px,
        compressed_bytes=compressed_bytes,
        decode_scratch_bytes=scratch_bytes,
        first_byte_s=seen.first_byte_s,
        download_s=seen.download_s,
    )
    return image.decoded_like(measured)
