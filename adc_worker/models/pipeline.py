"""What a pipeline is: a detector, an optional binary filter, an optional classifier, and how they compose.

Says nothing about where images come from or where results go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from adc_worker.antenna import wire
from adc_worker.antenna.wire import Classification, Detection
from adc_worker.errors import DeviceMemoryShort, ImageError
from adc_worker.models.calls import DeviceClock, DeviceNeighbours, ModelAndShape, Upload, in_chunks

Box = tuple[int, int, int, int]
Algorithm = wire.Algorithm
Failure = ImageError | DeviceMemoryShort


@dataclass(frozen=True, slots=True)
class Detections:
    """What a detector found on one image.

    Attributes:
        boxes_px: int32 [n, 4] as x1, y1, x2, y2, inside the image, x1 < x2 and y1 < y2, on the CPU.
        scores: float32 [n], on the CPU.
    """

    boxes_px: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Scores:
    """What a classifier says of n crops: float32 [n, classes] each, on the CPU; scores are softmax, logits raw."""

    scores: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


class Detector(Protocol):
    @property
    def algorithm(self) -> Algorithm: ...

    def detect(self, images: torch.Tensor) -> list[Detections]:
        """Find insects on uint8 [n, 3, H, W] (any strides, on the device): one entry per image."""
        ...


class Classifier(Protocol):
    @property
    def algorithm(self) -> Algorithm: ...

    def classify(self, crops: Sequence[torch.Tensor]) -> Scores:
        """Score crops, each uint8 [3, h, w] of its own size, on the device."""
        ...


@dataclass(frozen=True, slots=True)
class CallSizes:
    """Most images per detector call and crops per classifier call, and what turned out to be too many."""

    images: int = 8
    crops: int = 20
    learnt: dict[ModelAndShape, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A loaded pipeline. Detections that the filter calls negative are returned with its classification alone."""

    slug: str
    detector: Detector
    device: torch.device
    binary_filter: Classifier | None = None
    positive_label: str = ""
    classifier: Classifier | None = None
    sizes: CallSizes = field(default_factory=CallSizes)
    # When memory is short: frees what others hold; False if there is nothing.
    relieve: Callable[[], bool] = lambda: False
    clock: DeviceClock = field(default_factory=DeviceClock)
    neighbours_on: Callable[[torch.device], DeviceNeighbours] = DeviceNeighbours.on

    def infer(self, images: torch.Tensor) -> Iterator[list[Detection] | Failure]:
        """Yield for each image of uint8 [n, H, W, 3], in order, its detections, or why there are none.

        The images cross to the device as they are, a few at a time.
        """
        of = (self.detector.algorithm.key, tuple(images.shape[1:]))
        neighbours = self.neighbours_on(self.device)
        with torch.inference_mode(), Upload(images, self.device) as upload:

            def detect(start: int, stop: int) -> list[tuple[torch.Tensor, Detections]]:
                with self.clock.running(self.device):
                    on_device = upload.take(start, stop)
                    return list(zip(on_device, self.detector.detect(on_device), strict=True))

            sizes = self.sizes
            for found in in_chunks(detect, len(images), sizes.images, sizes.learnt, of, self.relieve, neighbours):
                yield found if isinstance(found, Failure) else self._classified(*found, neighbours)
                del found  # an image on the device keeps those of its call

    def _classified(
        self, image: torch.Tensor, found: Detections, neighbours: DeviceNeighbours
    ) -> list[Detection] | Failure:
        boxes = [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in found.boxes_px]
        answers: list[list[Classification]] = [[] for _ in boxes]
        chosen = list(range(len(boxes)))
        for classifier in (self.binary_filter, self.classifier):
            if classifier is None:
                continue
            terminal = classifier is self.classifier or self.classifier is None
            answered = self._classify(classifier, image, boxes, chosen, terminal, neighbours)
            for index, given in zip(chosen, answered, strict=True):
                if isinstance(given, Failure):
                    return given
                answers[index].append(given)
            if classifier is self.binary_filter:
                chosen = [index for index in chosen if answers[index][0].label == self.positive_label]
        source = self.detector.algorithm
        return [Detection(box, source, tuple(given)) for box, given in zip(boxes, answers, strict=True)]

    def _classify(
        self,
        classifier: Classifier,
        image: torch.Tensor,
        boxes: Sequence[Box],
        chosen: Sequence[int],
        terminal: bool,
        neighbours: DeviceNeighbours,
    ) -> Iterator[Classification | Failure]:
        algorithm = classifier.algorithm

        def classify(start: int, stop: int) -> list[Classification]:
            with self.clock.running(self.device):
                crops = [image[:, y1:y2, x1:x2] for x1, y1, x2, y2 in (boxes[index] for index in chosen[start:stop])]
                given = classifier.classify(crops)
            return [
                Classification(algorithm.labels[int(scores.argmax())], scores, logits, algorithm, terminal)
                for scores, logits in zip(given.scores, given.logits, strict=True)
            ]

        of = (algorithm.key, ())  # crops are all resized to one shape
        sizes = self.sizes
        return in_chunks(classify, len(chosen), sizes.crops, sizes.learnt, of, self.relieve, neighbours)
