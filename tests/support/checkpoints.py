"""Random weights of Antenna's architectures, in the files and the layout of the real ones, and plain inference.

The architectures are built here a second time, by the letter of the reference: nothing is taken from the package but
names and addresses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms import functional as transforms

from adc_worker.desk.sheets import draw_sheet
from adc_worker.models.catalogue import SCORE_THRESHOLD, ClassifierCard

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]


class TuringReference(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(torchvision.models.resnet50().children())[:-2])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(2048, classes, bias=False)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(torch.flatten(self.pool(self.backbone(crops)), 1))
        return logits


def _resnet50(classes: int) -> nn.Module:
    network: nn.Module = torchvision.models.resnet50(weights=None)
    network.fc = nn.Linear(2048, classes)
    return network


BUILD = {
    "torchvision_resnet50": _resnet50,
    "timm_resnet50": lambda classes: timm.create_model("resnet50", num_classes=classes),
    "timm_convnext_tiny": lambda classes: timm.create_model("convnext_tiny", num_classes=classes),
    "turing": TuringReference,
}


def detector(seed: int = 0) -> nn.Module:
    """A detector as today's worker builds it, with batch norm that is frozen and has learnt something.

    Its random head is spread and shifted so that some tens of boxes score above the threshold.
    """
    torch.manual_seed(seed)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    network: nn.Module = FasterRCNN(backbone, 2, box_detections_per_img=500).eval()
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            _learn(module)
    head: Any = network.roi_heads.box_predictor  # type: ignore[union-attr]
    with torch.no_grad():
        head.cls_score.weight.mul_(1.2)
        head.cls_score.bias.copy_(torch.tensor([0.0, -0.3]))
        head.bbox_pred.weight.mul_(3)
    return network


def _learn(norm: FrozenBatchNorm2d) -> None:
    """Give a layer statistics and factors of its own: with those of a new one every kind of batch norm does nothing."""
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_(0, 0.1)


def as_trained(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict as training leaves it: there each batch norm counts its batches, which a frozen one does not."""
    state = network.state_dict()
    counters = [key.replace("running_var", "num_batches_tracked") for key in state if key.endswith("running_var")]
    for counter in counters:
        state.setdefault(counter, torch.tensor(7))
    return state


def classifier(card: ClassifierCard, labels: int, seed: int = 0) -> nn.Module:
    """A classifier whose random logits differ from crop to crop: its statistics are those of crops of a sheet."""
    torch.manual_seed(seed)
    network: nn.Module = BUILD[card.architecture](labels)
    for name, values in network.named_parameters():
        if name.endswith("gamma"):  # ConvNeXt's blocks start at almost nothing
            nn.init.ones_(values)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of what it sees in training
    sheet = torch.from_numpy(draw_sheet((192, 192), seed).image).permute(2, 0, 1) / 255
    crops = sheet.unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).flatten(0, 1)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        network.train()(crops - crops.mean())
        factor = 3 / network.eval()(crops - crops.mean()).abs().max()
        for values in last.parameters():
            values.mul_(factor)
    return network


def save(network: nn.Module, folder: Path, url: str, *, wrapped: bool = False) -> Path:
    """Save a state dict under the last part of its URL; `wrapped` as training scripts leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / url.rsplit("/", 1)[-1]
    state = as_trained(network)
    torch.save({"model_state_dict": state, "epoch": 3} if wrapped else state, path)
    return path


def save_labels(folder: Path, card: ClassifierCard, labels: Sequence[str]) -> None:
    """Save labels as a JSON object that is not in class order."""
    numbered = {name: index for index, name in reversed(list(enumerate(labels)))}
    (folder / card.labels.rsplit("/", 1)[-1]).write_text(json.dumps(numbered))


def plain_detections(network: nn.Module, image: Pixels) -> list[tuple[Box, float]]:
    """One float image, one call; then threshold, int, clamp, drop empty ones: each box with its score."""
    height, width = image.shape[:2]
    with torch.inference_mode():
        (found,) = network([transforms.to_tensor(image)])
    kept = []
    for box, score in zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True):
        x1, y1, x2, y2 = (max(0, int(side)) for side in box)
        x1, x2, y1, y2 = min(x1, width), min(x2, width), min(y1, height), min(y2, height)
        if score > SCORE_THRESHOLD and x2 > x1 and y2 > y1:
            kept.append(((x1, y1, x2, y2), score))
    return kept


def plain_boxes(network: nn.Module, image: Pixels) -> list[Box]:
    """The boxes of `plain_detections`, in that order."""
    return [box for box, _score in plain_detections(network, image)]


def plain_logits(
    network: nn.Module, card: ClassifierCard, image: Pixels, boxes: Sequence[Box]
) -> npt.NDArray[np.float32]:
    """All crops in one call: logits [n, classes]."""
    pixels = transforms.to_tensor(image)
    mean, std = card.statistics
    squares = []
    for x1, y1, x2, y2 in boxes:
        square = transforms.resize(pixels[:, y1:y2, x1:x2], [card.crop_px] * 2, antialias=True)
        squares.append(transforms.normalize(square, list(mean), list(std)))
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = network(torch.stack(squares)).numpy()
    return logits


def let_half_through(binary_filter: nn.Module, card: ClassifierCard, image: Pixels, boxes: Sequence[Box]) -> None:
    """Shift a random filter, which says the same of every crop, to its median."""
    differences = plain_logits(binary_filter, card, image, boxes) @ (1, -1)
    middle = np.sort(differences)[[len(differences) // 2, len(differences) // 2 - 1]].mean()
    with torch.no_grad():
        binary_filter.get_parameter("fc.bias")[1] += float(middle)
