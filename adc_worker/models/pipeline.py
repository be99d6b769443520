"""What a pipeline is: a detector, an optional binary filter, an optional classifier, and how they compose.

Says nothing about where images come from or where results go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from adc_worker.antenna.wire import AlgorithmRef, Classification, Detection

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One algorithm as Antenna registers it; results refer to it by name and key."""

    name: str
    key: str
    task_type: str  # "detection", "localization" or "classification"
    description: str = ""
    version: int = 1
    version_name: str = "v1"
    uri: str | None = None
    labels: tuple[str, ...] = ()  # class order; empty for detectors

    @property
    def ref(self) -> AlgorithmRef:
        return AlgorithmRef(self.name, self.key)


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
    """Most images per detector call and crops per classifier call."""

    images: int = 8
    crops: int = 20


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A loaded pipeline. Detections that the filter calls negative are returned with its classification alone."""

    slug: str
    detector: Detector
    device: torch.device
    binary_filter: Classifier | None = None
    positive_label: str = ""
    classifier: Classifier | None = None
    sizes: CallSizes = CallSizes()

    def infer(self, images: torch.Tensor) -> Iterator[list[Detection]]:
        """Yield the detections of each image of uint8 [n, H, W, 3], in order.

        The images cross to the device as they are, a few at a time; the permutation is a view.
        """
        with torch.inference_mode():
            for chunk in torch.split(images, self.sizes.images):
                on_device = chunk.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                for image, found in zip(on_device, self.detector.detect(on_device), strict=True):
                    yield self._classified(image, found)

    def _classified(self, image: torch.Tensor, found: Detections) -> list[Detection]:
        boxes = [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in found.boxes_px]
        answers: list[list[Classification]] = [[] for _ in boxes]
        chosen = list(range(len(boxes)))
        if self.binary_filter is not None:
            self._classify(self.binary_filter, image, boxes, chosen, answers, terminal=self.classifier is None)
            chosen = [index for index in chosen if answers[index][0].label == self.positive_label]
        if self.classifier is not None:
            self._classify(self.classifier, image, boxes, chosen, answers, terminal=True)
        source = self.detector.algorithm.ref
        return [Detection(box, source, tuple(given)) for box, given in zip(boxes, answers, strict=True)]

    def _classify(
        self,
        classifier: Classifier,
        image: torch.Tensor,
        boxes: Sequence[Box],
        chosen: Sequence[int],
        answers: Sequence[list[Classification]],
        *,
        terminal: bool,
    ) -> None:
        algorithm = classifier.algorithm
        for start in range(0, len(chosen), self.sizes.crops):
            indices = chosen[start : start + self.sizes.crops]
            crops = [image[:, y1:y2, x1:x2] for x1, y1, x2, y2 in (boxes[index] for index in indices)]
            given = classifier.classify(crops)
            for index, scores, logits in zip(indices, given.scores, given.logits, strict=True):
                label = algorithm.labels[int(scores.argmax())]
                answers[index].append(Classification(label, scores, logits, algorithm.ref, terminal))
