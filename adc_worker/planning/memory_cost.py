"""What batches, decoders and inference of a job take from memory. Sizes are bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adc_worker.planning.measurements import ProbeReport

PAGE_BYTES = 4096  # the arena's regions start and end at pages
# One batch is inferred and one is being decoded, beside those that wait (docs/tuning.md).
BATCHES_IN_ARENA = 3


@dataclass(frozen=True, slots=True)
class MemoryCost:
    """The memory arithmetic of one job.

    Attributes:
        report: the job's measurements.
        images_per_call: most images of one call of the detector.
    """

    report: ProbeReport
    images_per_call: int

    @property
    def largest_image_bytes(self) -> int:
        """The largest image's place in the arena."""
        return whole_pages(self.report.tensor_bytes_per_image)

    @property
    def decode_bytes(self) -> int:
        """What a running decode takes beside its image: the decoder's own memory, and the file."""
        return self.report.decode_scratch_bytes + self.report.compressed_bytes

    def batch_bytes(self, batch: int) -> int:
        """Return the place of `batch` usual images in the arena, or that of the largest one."""
        usual_images_bytes = batch * whole_pages(self.report.usual_tensor_bytes)
        return max(self.largest_image_bytes, usual_images_bytes)

    def largest_images_in(self, batch: int) -> int:
        """Return how many of the largest images fit into a batch's bytes."""
        return max(1, self.batch_bytes(batch) // self.largest_image_bytes)

    def batches_ahead(self, batch: int, workers: int) -> int:
        """Return how many batches must wait ahead so that every decode worker is busy.

        That many batches and one more are decoded or ready at a time.
        """
        batches_in_work = math.ceil(workers / self.largest_images_in(batch))
        return max(1, batches_in_work - 1)

    def working_set_bytes(self, batch: int) -> int:
        """Return what one call takes at most: of the images known of the job, and of as large ones as it can have.

        Of each size a call has as many images as the batch's bytes hold, up to `images_per_call`.
        """
        images_at_once = min(self.images_per_call, batch)
        batch_bytes = self.batch_bytes(batch)
        share_of_call_bytes = min(self.report.tensor_bytes_per_image, batch_bytes // images_at_once)
        needed_bytes = images_at_once * self.report.inference_bytes(share_of_call_bytes)
        for image_bytes in self.report.known_tensor_bytes:
            images = min(images_at_once, max(1, batch_bytes // image_bytes))
            needed_bytes = max(needed_bytes, images * self.report.inference_bytes(image_bytes))
        return needed_bytes

    def needed_bytes(self, batch: int, workers: int) -> int:
        """Return the memory of batches of `batch` images, enough of them to keep `workers` busy."""
        batches = self.batches_ahead(batch, workers) + BATCHES_IN_ARENA - 1
        arena = batches * self.batch_bytes(batch)
        decoders = workers * self.decode_bytes
        return arena + decoders + self.working_set_bytes(batch)


def whole_pages(size_bytes: int) -> int:
    """Round a size up to whole pages."""
    pages = -(-size_bytes // PAGE_BYTES)
    return pages * PAGE_BYTES
