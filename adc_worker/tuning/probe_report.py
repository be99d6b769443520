"""What two tasks told about a job. Every figure was measured, none is guessed from a file size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

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
class ProbeReport:
    """The measurements of a job's first images, and of the process that took them.

    Attributes:
        images: one or two probes, in the order they were inferred; the last is the warmest.
        base_bytes: memory of the process tree after the models were loaded.
        inference_peak_bytes: growth of the process's memory while inferring one image.
        vram_peak_bytes: the same of the GPU's memory; 0 on the CPU.
    """

    images: tuple[ImageProbe, ...]
    base_bytes: int
    inference_peak_bytes: int
    vram_peak_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("a probe report needs at least one image")

    def for_images_like(self, seen: ImageProbe) -> ProbeReport:
        """Return the report of a job whose images look like `seen`; the pipeline's memory is scaled by pixels."""
        scale = seen.tensor_bytes / self.tensor_bytes_per_image
        inference_peak_bytes, vram_peak_bytes = (
            int(self.inference_peak_bytes * scale),
            int(self.vram_peak_bytes * scale),
        )
        return ProbeReport((seen,), self.base_bytes, inference_peak_bytes, vram_peak_bytes)

    def for_link_like(self, seen: ImageProbe) -> ProbeReport:
        """Return the report of a job whose downloads take what `seen` took."""
        images = (replace(one, download_s=seen.download_s, first_byte_s=seen.first_byte_s) for one in self.images)
        return replace(self, images=tuple(images))

    def slower(self, factor: float) -> ProbeReport:
        """Return the report of a job whose downloads and decodes take `factor` times as long."""
        images = (
            replace(one, download_s=factor * one.download_s, decode_s=factor * one.decode_s) for one in self.images
        )
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
        """Seconds per download; as long as an inference where both images were still on disk from an earlier run."""
        measured = [image.download_s for image in self.images if image.download_s > 0]
        return fmean(measured) if measured else self.inference_s

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
