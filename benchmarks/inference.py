"""What our part of inference costs: Antenna's pipelines beside the same networks called plainly in a loop.

Ours: `Pipeline.infer`, and the result as JSON. Plain: float image, torchvision's call, crops of the float image in
calls of the same size, no JSON. Both in this process, in turn, on the same photographs, with random weights whose
detector is shifted to some tens of boxes; `overhead` is the median over rounds of ours / plain. Memory is how far the
resident memory rose during a round, above the loaded models.

Flips: the same photographs in detector calls of 3 and 8 against calls of 1, boxes in whole pixels, all scores above
0.05; `network` is torchvision's batch, `ours` what the worker does. A flipped box is one that the other side has not.

Not shown: real weights (they find fewer boxes), decoding and posting, and a GPU unless one is there (`--device cuda`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.transforms import functional as transforms

sys.path.insert(0, str(Path(__file__).parents[1]))

from adc_worker.antenna.wire import SuccessResult, Task
from adc_worker.devserver.sheets import draw_sheet
from adc_worker.host.memory import PeakResidentMemory
from adc_worker.models import registry
from adc_worker.models.catalogue import DETECTOR, MOTH_FILTER, PIPELINES
from adc_worker.models.networks import CropClassifier
from adc_worker.models.pipeline import CallSizes, Pipeline
from adc_worker.settings import Settings
from benchmarks.support import report
from benchmarks.support.hardware import caption
from tests.support import checkpoints

# One for each set of networks; the others differ from these in their weights alone.
SLUGS = ("moth_binary", "panama_moths_2023", "global_moths_2024", "costa_rica_moths_turing_2024", "insect_orders_2025")
CLASSES = {"global_moths_2024": 29_176}
DEFAULT_CLASSES = 1000
BOXES = 60  # proposals above the threshold, before overlapping ones are dropped
THRESHOLD_LOGIT = 1.3863  # of a softmax over two classes at 0.8
FLIP_SCORE = 0.05


def write_models(folder: Path, image: checkpoints.Pixels, slugs: Sequence[str]) -> None:
    detector = checkpoints.detector()
    shift(detector, image)
    checkpoints.save(detector, folder, DETECTOR.weights)
    cards = {card.slug: card.classifier for card in PIPELINES}
    for slug in {"moth_binary", *slugs}:  # the filter is moth_binary's classifier
        labels = ["nonmoth", "moth"] if slug == "moth_binary" else _labels(CLASSES.get(slug, DEFAULT_CLASSES))
        checkpoints.save(checkpoints.classifier(cards[slug], len(labels)), folder, cards[slug].weights)
        checkpoints.save_labels(folder, cards[slug], labels)


def _labels(count: int) -> list[str]:
    return [f"Species {number}" for number in range(count)]


def shift(detector: nn.Module, image: checkpoints.Pixels) -> None:
    """Move the head's bias so that `BOXES` proposals of `image` score above the threshold."""
    head: Any = detector.roi_heads.box_predictor  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _module, _given, answers: seen.append(answers[0]))
    checkpoints.plain_boxes(detector, image)
    hook.remove()
    logits = (seen[0][:, 1] - seen[0][:, 0]).sort(descending=True).values
    with torch.no_grad():
        head.cls_score.bias[1] += THRESHOLD_LOGIT - float(logits[BOXES])


def ours(pipeline: Pipeline, images: torch.Tensor) -> int:
    task, boxes = Task(image_id="1", image_url="http://127.0.0.1/1.jpg", reply_subject="1"), 0
    for found in pipeline.infer(images):
        assert isinstance(found, list)
        boxes += len(found)
        for _part in SuccessResult(task, pipeline.slug, found, 1.0, "2026-01-01T00:00:00"):
            pass
    return boxes


def plain(pipeline: Pipeline, images: torch.Tensor) -> int:
    """Do what today's worker does for an image: straightforward torchvision calls."""
    network, total = pipeline.detector.network, 0  # type: ignore[attr-defined]
    with torch.inference_mode():
        for image in images.numpy():
            pixels = transforms.to_tensor(image).to(pipeline.device)
            (found,) = network([pixels])
            boxes = found["boxes"][found["scores"] > DETECTOR.score_threshold].int().tolist()
            boxes = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
            total += len(boxes)
            for classifier in (pipeline.binary_filter, pipeline.classifier):
                if isinstance(classifier, CropClassifier):
                    keep = _plain_scores(pipeline, classifier, pixels, boxes).argmax(1) == 1
                    boxes = [box for box, kept in zip(boxes, keep.tolist(), strict=True) if kept]
    return total


def _plain_scores(
    pipeline: Pipeline, classifier: CropClassifier, pixels: torch.Tensor, boxes: list[list[int]]
) -> torch.Tensor:
    card = next(
        card for card in (MOTH_FILTER, *(c.classifier for c in PIPELINES)) if card.key == classifier.algorithm.key
    )
    size, (mean, std), scores = [card.crop_px] * 2, card.statistics, [torch.zeros(0, len(classifier.algorithm.labels))]
    for start in range(0, len(boxes), pipeline.sizes.crops):
        crops = [pixels[:, y1:y2, x1:x2] for x1, y1, x2, y2 in boxes[start : start + pipeline.sizes.crops]]
        squares = [transforms.resize(crop, size, antialias=True) for crop in crops]
        batch = transforms.normalize(torch.stack(squares), list(mean), list(std))
        scores.append(classifier.network(batch).softmax(1).cpu())
    return torch.cat(scores)


def timed(
    way: Callable[[Pipeline, torch.Tensor], int], pipeline: Pipeline, images: torch.Tensor
) -> tuple[float, int, int]:
    """Return seconds, peak memory growth in bytes, boxes."""
    memory, started = PeakResidentMemory(), time.perf_counter()
    boxes = way(pipeline, images)
    return time.perf_counter() - started, memory.growth_bytes(), boxes


def measure(pipeline: Pipeline, images: torch.Tensor, rounds: int) -> tuple[object, ...]:
    for way in (plain, ours):
        way(pipeline, images[:1])
    runs = [(timed(plain, pipeline, images), timed(ours, pipeline, images)) for _ in range(rounds)]
    assert all(a[2] == b[2] for a, b in runs), "both ways find as many boxes"
    overhead = statistics.median(b[0] / a[0] for a, b in runs) - 1
    speeds = [len(images) / statistics.median(run[side][0] for run in runs) for side in (0, 1)]
    peaks = [report.mb(max(run[side][1] for run in runs)) for side in (0, 1)]
    boxes = runs[0][0][2] / len(images)
    return (pipeline.slug, f"{boxes:.0f}", *(f"{one:.3f}" for one in speeds), f"{overhead:+.1%}", *peaks)


def flips(pipeline: Pipeline, images: torch.Tensor) -> list[tuple[object, ...]]:
    """Count boxes of calls of 3 and 8 that calls of 1 have not."""
    detector: Any = pipeline.detector
    detector._threshold = FLIP_SCORE  # noqa: SLF001 (as many boxes as there are)
    pixels = images.to(pipeline.device).permute(0, 3, 1, 2)
    rows: list[tuple[object, ...]] = []
    with torch.inference_mode():
        for name, detect in (("network", detector._detect), ("ours", detector.detect)):  # noqa: SLF001
            alone = _boxes(detect, pixels, 1)
            for size in (3, 8):
                flipped = alone.total() - (alone & _boxes(detect, pixels, size)).total()
                rows.append((name, size, alone.total(), flipped, f"{1e6 * flipped / max(1, alone.total()):.0f}"))
    return rows


def _boxes(detect: Callable[[torch.Tensor], Any], pixels: torch.Tensor, size: int) -> Counter[tuple[int, ...]]:
    found = [one for chunk in torch.split(pixels, size) for one in detect(chunk)]
    return Counter((number, *map(int, box)) for number, one in enumerate(found) for box in one.boxes_px)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=3, help="photographs of 4096x2160 per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flip-images", type=int, default=16)
    parser.add_argument("--pipeline", action="append", help=f"one of {', '.join(SLUGS)}; repeatable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    slugs = options.pipeline or SLUGS
    device, told = torch.device(options.device), caption()
    images = torch.from_numpy(np.stack([draw_sheet((4096, 2160), seed).image for seed in range(options.images)]))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        write_models(Path(folder) / "models", images[0].numpy(), slugs)
        specs = registry.available(Settings(user_data_path=Path(folder)))
        rows = []
        for slug in slugs:
            rows.append(measure(specs[slug].load(device, CallSizes()), images, options.rounds))
            print(*rows[-1])
        sheets = torch.from_numpy(
            np.stack([draw_sheet((1365, 720), seed).image for seed in range(options.flip_images)])
        )
        flipped = flips(replace(specs[slugs[0]].load(device, CallSizes()), classifier=None), sheets)
    head = ("pipeline", "boxes an image", "plain images/s", "ours", "overhead", "plain peak", "ours")
    text = (
        f"## Inference (`benchmarks/inference.py`)\n\n{told} {torch.get_num_threads()} threads on {device}.\n\n"
        f"{options.images} photographs of 4096x2160, {options.rounds} rounds, random weights.\n\n"
        + report.table(head, rows)
        + f"\n\nBoxes that change with the size of a detector call, {options.flip_images} photographs of 1365x720:\n\n"
        + report.table(("way", "images a call", "boxes", "flipped", "per million"), flipped)
    )
    print(text)
    report.write_section("inference", text)


if __name__ == "__main__":
    main()
