"""Antenna's networks: Faster R-CNN on whole photographs, and four kinds of classifiers on the crops it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F  # noqa: N812 -- the name all torch code uses
from torch import nn
from torchvision.models import resnet50
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from adc_worker.models.catalogue import BOXES_PER_IMAGE, DETECTOR, SCORE_THRESHOLD, ClassifierCard
from adc_worker.models.pipeline import Detections, Scores
from adc_worker.models.weights import load_weights

_CLASSES = 2  # of the detector: background, object
_FEATURES = 2048  # of a ResNet-50's last block


class InPlaceFrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    """torchvision's FrozenBatchNorm2d, bit for bit, written over its input: only for inference.

    The same operations in the same order, a product and then a sum, so that the answers are those of a network that is
    built with the original. The input of each of these layers is the output of a convolution, which nothing else
    reads. Measured on two CPU cores, 720 x 1333 px, in turns, best of six: the backbone takes 1.85 s with BatchNorm2d,
    2.07 s with the original, which takes new memory for each product and each sum, and 1.61 s with this.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise float32 [n, channels, h, w], and return the same tensor."""
        per_channel = (1, -1, 1, 1)
        deviation = (self.running_var.reshape(per_channel) + self.eps).rsqrt()
        scale = self.weight.reshape(per_channel) * deviation
        shift = self.bias.reshape(per_channel) - self.running_mean.reshape(per_channel) * scale
        return x.mul_(scale).add_(shift)


def detector_network() -> FasterRCNN:
    """Build the detector as today's worker does: with batch norm that is frozen.

    BatchNorm2d computes the same in another order, which moves boxes by up to 7e-4 px; a box that moves over the edge
    of a pixel is a second detection at Antenna. A frozen layer leaves out `num_batches_tracked`, which the checkpoint
    has and inference does not use; every other key has to fit.
    """
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=InPlaceFrozenBatchNorm)
    return FasterRCNN(backbone, num_classes=_CLASSES, box_detections_per_img=BOXES_PER_IMAGE)


class FasterRcnn:
    """Boxes above the threshold, in whole pixels: cut off, clamped, empty ones dropped."""

    algorithm = DETECTOR

    def __init__(self, weights: Path, device: torch.device) -> None:
        self.network = detector_network()
        load_weights(self.network, weights)
        self.network.to(device).eval()
        self._threshold = SCORE_THRESHOLD

    def detect(self, images: torch.Tensor) -> list[Detections]:
        # On a CPU a batch of 3 or 8 moved boxes by up to 0.003 px against one image alone (torch 2.15, random weights),
        # and a box that differs by a pixel is a second detection at Antenna: there each image is its own call. How
        # often that would happen is counted by benchmarks/inference.py.
        calls = torch.split(images, 1 if images.device.type == "cpu" else len(images))
        return [found for call in calls for found in self._detect(call)]

    def _detect(self, images: torch.Tensor) -> list[Detections]:
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        height, width = images.shape[2:]
        limits = torch.tensor([width, height, width, height], dtype=torch.int32)
        detections = []
        for found in self.network(list(pixels)):
            scores = found["scores"].cpu()
            boxes = torch.minimum(found["boxes"].cpu().to(torch.int32).clamp_(min=0), limits)
            keep = (scores > self._threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            detections.append(Detections(boxes[keep].numpy(), scores[keep].numpy()))
        return detections


class TuringResNet50(nn.Module):
    """ResNet-50 up to its last block, the mean over all places, and a linear layer without bias."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(resnet50().children())[:-2])
        self.classifier = nn.Linear(_FEATURES, classes, bias=False)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """Score float32 [n, 3, h, w]: logits [n, classes]."""
        logits: torch.Tensor = self.classifier(self.backbone(crops).mean((2, 3)))
        return logits


ARCHITECTURES: Mapping[str, Callable[[int], nn.Module]] = {
    "torchvision_resnet50": lambda classes: resnet50(num_classes=classes),
    "timm_resnet50": lambda classes: timm.create_model("resnet50", num_classes=classes),
    "timm_convnext_tiny": lambda classes: timm.create_model("convnext_tiny", num_classes=classes),
    "turing": TuringResNet50,
}


class CropClassifier:
    """Softmax and raw logits of crops of any size, in the order of the card's labels."""

    def __init__(self, card: ClassifierCard, labels: tuple[str, ...], weights: Path, device: torch.device) -> None:
        self.algorithm = card.algorithm(labels)
        self.network = ARCHITECTURES[card.architecture](len(labels))
        load_weights(self.network, weights)
        self.network.to(device).eval()
        self._size = (card.crop_px, card.crop_px)
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in card.statistics)

    def classify(self, crops: Sequence[torch.Tensor]) -> Scores:
        squares = torch.cat([self._square(crop) for crop in crops])
        logits = self.network(squares.sub_(self._mean).div_(self._std)).cpu()
        return Scores(logits.softmax(1).numpy(), logits.numpy())

    def _square(self, crop: torch.Tensor) -> torch.Tensor:
        pixels = crop.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return F.interpolate(pixels[None], self._size, mode="bilinear", antialias=True)
