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
    """A detector whose random head is spread and shifted so that some tens of boxes score above the threshold."""
    torch.manual_seed(seed)
    network: nn.Module = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=2, box_detections_per_img=500
    ).eval()
    head: Any = network.roi_heads.box_predictor  # type: ignore[union-attr]
    with torch.no_grad():
        head.cls_score.weight.mul_(1.2)
        head.cls_score.bias.copy_(torch.tensor([0.0, -0.3]))
        head.bbox_pred.weight.mul_(3)
    return network


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
    state = network.state_dict()
    torch.save({"model_state_dict": state, "epoch": 3} if wrapped else state, path)
    return path


def save_labels(folder: Path, card: ClassifierCard, labels: Sequence[str]) -> None:
    """Save labels as a JSON object that is not in class order."""
    numbered = {name: index for index, name in reversed(list(enumerate(labels)))}
    (folder / card.labels.rsplit("/", 1)[-1]).write_text(json.dumps(numbered))


def plain_boxes(network: nn.Module, image: Pixels) -> list[Box]:
    """One float image, one call; then threshold, int, clamp, drop empty ones."""
    height, width = image.shape[:2]
    with torch.inference_mode():
        (found,) = network([transforms.to_tensor(image)])
    boxes = []
    for box, score in zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True):
        x1, y1, x2, y2 = (max(0, int(side)) for side in box)
        x1, x2, y1, y2 = min(x1, width), min(x2, width), min(y1, height), min(y2, height)
        if score > SCORE_THRESHOLD and x2 > x1 and y2 > y1:
            boxes.append((x1, y1, x2, y2))
    return boxes


def plain_logits(network: nn.Module, card: ClassifierCard, image: Pixels, box: Box) -> npt.NDArray[np.float32]:
    """One crop, one call: logits [classes]."""
    x1, y1, x2, y2 = box
    crop = transforms.to_tensor(image)[:, y1:y2, x1:x2]
    mean, std = card.statistics
    square = transforms.normalize(transforms.resize(crop, [card.crop_px] * 2, antialias=True), list(mean), list(std))
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = network(square[None])[0].numpy()
    return logits


def let_half_through(binary_filter: nn.Module, card: ClassifierCard, image: Pixels, boxes: Sequence[Box]) -> None:
    """Shift a random filter, which says the same of every crop, to its median."""
    differences = [plain_logits(binary_filter, card, image, box) @ (1, -1) for box in boxes]
    middle = np.sort(differences)[[len(differences) // 2, len(differences) // 2 - 1]].mean()
    with torch.no_grad():
        binary_filter.get_parameter("fc.bias")[1] += float(middle)
