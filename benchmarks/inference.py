"""What our part of inference costs: Antenna's ten pipelines beside the same networks called plainly in a loop.

Ours is what a job does with a decoded photograph: `infer_and_keep`, down to the result in a journal on this disk.
Plain is the straightforward loop: float image, torchvision's call, crops of the float image in calls of the same
size, no results written. Each way has a process of its own; all load the same files and draw the same photographs.
They take turns image by image, in changing order, so that a machine that slows down slows all. Plain runs twice: with
the system's memory allocator as it is, and as a worker's child has it, which gives large blocks back at once, so that
memory stays what was planned. `overhead` is what our code costs, `with allocator` what we cost in all: seconds of ours
over those of the one plain and the other, - 1. Memory is how far the resident memory rose above the loaded models;
page faults, in thousands per photograph, are what most of the allocator's cost consists of.

Weights are random, and shifted: the detector finds some tens of boxes, and the filter lets some of them through.

`flips` counts boxes that depend on what else is in a detector's call: calls of 3 and 8 images against calls of 1, in
whole pixels; every proposal counts, without score threshold or suppression of overlaps, for the sake of many boxes.
`network` is torchvision's batch, `ours` the pipeline with that AMI_LOCALIZATION_BATCH_SIZE. A flipped box is one that
the other side has not.

Not shown: real weights (they find fewer boxes), decoding and posting, and a GPU unless one is there (`--device cuda`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchvision.transforms import functional as transforms

sys.path.insert(0, str(Path(__file__).parents[1]))

from adc_worker import log
from adc_worker.desk.sheets import draw_sheet
from adc_worker.host.memory import PeakResidentMemory
from adc_worker.ingest.decode import DecodeReport
from adc_worker.journal.journal import Journal
from adc_worker.models import registry
from adc_worker.models.catalogue import DETECTOR_WEIGHTS, MOTH_FILTER, PIPELINES, SCORE_THRESHOLD, ClassifierCard
from adc_worker.models.pipeline import CallSizes
from adc_worker.runtime.inference import infer_and_keep
from adc_worker.runtime.outcomes import ImageResult
from adc_worker.runtime.supervisor import CHILD_ENVIRONMENT
from adc_worker.settings import Settings
from benchmarks.support import report
from benchmarks.support.hardware import caption
from tests.support import checkpoints
from tests.support.checkpoints import Box, Pixels
from tests.support.images import header, staged, task

CLASSES = {MOTH_FILTER.key: 2, PIPELINES["global_moths_2024"].key: 29_176}
DEFAULT_CLASSES = 1000
SIZE_PX = (4096, 2160)
WARM_UP_PX = (1320, 160)  # quick: Faster R-CNN enlarges to 800 px unless the other side reaches 1333
BOXES = 60  # proposals above the threshold, before overlapping ones are dropped
THRESHOLD_LOGIT = 1.3863  # of a softmax over two classes at 0.8
FLIP_SIZE_PX = (1365, 720)


class Way(Protocol):
    """A way of inference; `run` returns how many classifications each box got, in the order of the boxes."""

    def load(self, slug: str) -> None: ...

    def run(self, image: Pixels) -> list[int]: ...


class Ours:
    """As a job does it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._specs = registry.available(Settings(user_data_path=folder))
        self._journal = Journal(folder / "journal.db")
        self._device = device
        self._found: list[int] = []

    def load(self, slug: str) -> None:
        self._pipeline = registry.load(self._specs[slug], self._device, CallSizes())

    def run(self, image: Pixels) -> list[int]:
        (held,) = self._journal.record(1, [task(time.monotonic_ns())])
        one = staged(held.id, Path("unread"), header(*SIZE_PX))
        pixels, outcomes = torch.from_numpy(image)[None], self
        infer_and_keep(self._pipeline, pixels, [one], [DecodeReport(0.0, truncated=False)], outcomes)  # type: ignore[arg-type]
        return self._found

    def succeed(self, results: Sequence[ImageResult]) -> None:
        self._found = [len(one.classifications) for result in results for one in result.parts.detections]  # type: ignore[attr-defined]
        self._journal.keep([(result.task_id, result.parts) for result in results])


class Plain:
    """Straightforward calls, as in a notebook."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder / "models", device
        self._detector = self._loaded(checkpoints.detector(), DETECTOR_WEIGHTS)
        self._filter = self._loaded_classifier(MOTH_FILTER)

    def _loaded(self, network: nn.Module, url: str) -> nn.Module:
        network.load_state_dict(torch.load(self._folder / url.rpartition("/")[2], weights_only=True))
        return network.to(self._device).eval()

    def _loaded_classifier(self, card: ClassifierCard) -> nn.Module:
        return self._loaded(checkpoints.BUILD[card.architecture](classes_of(card)), card.weights)

    def load(self, slug: str) -> None:
        card = PIPELINES[slug]
        self._last = (card, self._loaded_classifier(card))
        self._first = (MOTH_FILTER, self._filter) if card.filtered else None

    @torch.inference_mode()
    def run(self, image: Pixels) -> list[int]:
        pixels = transforms.to_tensor(image).to(self._device)
        (found,) = self._detector([pixels])
        boxes = found["boxes"][found["scores"] > SCORE_THRESHOLD].int().tolist()
        boxes = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
        counts = [1] * len(boxes)
        if self._first is not None:
            moths = (self._scores(*self._first, pixels, boxes).argmax(1) == 1).tolist()
            boxes = [box for box, is_moth in zip(boxes, moths, strict=True) if is_moth]
            counts = [1 + is_moth for is_moth in moths]
        self._scores(*self._last, pixels, boxes)
        return counts

    def _scores(
        self, card: ClassifierCard, network: nn.Module, pixels: torch.Tensor, boxes: Sequence[Box]
    ) -> torch.Tensor:
        size, (mean, std), most = [card.crop_px] * 2, card.statistics, CallSizes().crops
        scores = [torch.zeros(0, classes_of(card))]
        for start in range(0, len(boxes), most):
            crops = [pixels[:, y1:y2, x1:x2] for x1, y1, x2, y2 in boxes[start : start + most]]
            squares = [transforms.resize(crop, size, antialias=True) for crop in crops]
            scores.append(network(transforms.normalize(torch.stack(squares), list(mean), list(std))).softmax(1).cpu())
        return torch.cat(scores)


WAYS: dict[str, Callable[[Path, torch.device], Way]] = {"plain": Plain, "plain, child's": Plain, "ours": Ours}


def classes_of(card: ClassifierCard) -> int:
    return CLASSES.get(card.key, DEFAULT_CLASSES)


def serve(name: str, folder: Path, device: torch.device) -> None:
    """Answer each line, a slug and a photograph's seed, with seconds, bytes, page faults and boxes."""
    log.configure("json", "warning")
    way, slug = WAYS[name](folder, device), ""
    for line in sys.stdin:
        wanted, seed = json.loads(line)
        if wanted != slug:
            slug = wanted
            way.load(slug)
            way.run(draw_sheet(WARM_UP_PX, 0).image)
        image, memory, faults = draw_sheet(SIZE_PX, seed).image, PeakResidentMemory(), _page_faults()
        started = time.perf_counter()
        found = way.run(image)
        spent_s, faults = time.perf_counter() - started, _page_faults() - faults
        print(json.dumps([spent_s, memory.growth_bytes(), faults, found]), flush=True)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Server:
    """One way, in a process of its own."""

    def __init__(self, name: str, folder: Path, device: str, environment: Mapping[str, str]) -> None:
        command = [sys.executable, __file__, "--serve", name, "--folder", str(folder), "--device", device]
        self._process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, slug: str, seed: int) -> tuple[float, int, int, list[int]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([slug, seed]), file=self._process.stdin, flush=True)
        spent_s, peak_bytes, faults, found = json.loads(self._process.stdout.readline())
        return spent_s, peak_bytes, faults, found

    def close(self) -> None:
        self._process.communicate()


def write_models(folder: Path, slugs: Sequence[str]) -> None:
    image = draw_sheet(SIZE_PX, 0).image
    detector = checkpoints.detector()
    shift(detector, image)
    checkpoints.save(detector, folder, DETECTOR_WEIGHTS)
    for card in {card.key: card for card in (MOTH_FILTER, *(PIPELINES[slug] for slug in slugs))}.values():
        network = checkpoints.classifier(card, classes_of(card))
        if card is MOTH_FILTER:
            checkpoints.let_half_through(network, card, image, checkpoints.plain_boxes(detector, image))
        labels = ["nonmoth", "moth"] if card is MOTH_FILTER else [f"Species {n}" for n in range(classes_of(card))]
        checkpoints.save(network, folder, card.weights)
        checkpoints.save_labels(folder, card, labels)


def shift(detector: nn.Module, image: Pixels) -> None:
    """Move the head's bias so that `BOXES` proposals of `image` score above the threshold."""
    head: Any = detector.roi_heads.box_predictor  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _module, _given, answers: seen.append(answers[0]))
    checkpoints.plain_boxes(detector, image)
    hook.remove()
    logits = (seen[0][:, 1] - seen[0][:, 0]).sort(descending=True).values
    with torch.no_grad():
        head.cls_score.bias[1] += THRESHOLD_LOGIT - float(logits[BOXES])


def overheads(folder: Path, device: str, slugs: Sequence[str], images: int) -> str:
    rows, total_s = [], np.zeros(len(WAYS))
    environments = dict.fromkeys(WAYS, os.environ | CHILD_ENVIRONMENT) | {"plain": dict(os.environ)}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(closing(Server(name, folder, device, environments[name]))) for name in WAYS
        }
        for server in servers.values():  # the first call of all is slower
            server.run(slugs[0], 0)
        for slug in slugs:
            runs = {}
            for seed in range(images):
                for name in list(WAYS)[:: -1 if seed % 2 else 1]:
                    runs[name, seed] = servers[name].run(slug, seed)
            found = [runs["ours", seed][3] for seed in range(images)]
            assert all(runs[name, seed][3] == found[seed] for name, seed in runs), "the same boxes"
            spent_s = np.array([sum(runs[name, seed][0] for seed in range(images)) for name in WAYS])
            peaks = [report.mb(max(runs[name, seed][1] for seed in range(images))) for name in WAYS]
            faults = [sum(runs[name, seed][2] for seed in range(images)) / images for name in WAYS]
            crops, faulted = f"{sum(map(sum, found)) / images:.0f}", " / ".join(f"{one / 1e3:.0f}" for one in faults)
            boxes = f"{sum(map(len, found)) / images:.0f}"
            rows.append((slug, boxes, crops, *_compared(spent_s, images), *peaks, faulted))
            total_s += spent_s
            print(*rows[-1], flush=True)
    rows.append(("all", "", "", *_compared(total_s, len(slugs) * images), "", "", "", ""))
    speeds, peaks = ([f"{name} {of}" for name in WAYS] for of in ("images/s", "peak"))
    head = ("pipeline", "boxes", "crops scored", *speeds, "overhead", "with allocator", *peaks, "1000 page faults")
    return (
        f"{images} photographs of {SIZE_PX[0]}x{SIZE_PX[1]} a row; boxes and scored crops are means per photograph."
        " Single rows scatter by a tenth and more; `all` sums up.\n\n" + report.table(head, rows)
    )


def _compared(spent_s: npt.NDArray[np.float64], images: int) -> list[str]:
    plain_s, childs_s, ours_s = spent_s
    speeds = [f"{images / one_s:.3f}" for one_s in spent_s]
    return [*speeds, f"{ours_s / childs_s - 1:+.1%}", f"{ours_s / plain_s - 1:+.1%}"]


def flips(folder: Path, device: torch.device, slug: str, images: int) -> str:
    """Count boxes of calls of 3 and 8 that calls of 1 have not."""
    loaded = registry.available(Settings(user_data_path=folder))[slug].load(device, CallSizes())
    pipeline = replace(loaded, binary_filter=None, classifier=None)
    detector: Any = pipeline.detector
    heads, detector._threshold = detector.network.roi_heads, 0.0  # noqa: SLF001
    heads.score_thresh, heads.nms_thresh, heads.detections_per_img = 0.0, 1.0, 1000
    sheets = torch.from_numpy(np.stack([draw_sheet(FLIP_SIZE_PX, seed).image for seed in range(images)]))

    def network(size: int) -> Counter[tuple[int, ...]]:
        pixels = sheets.to(device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            found = [one.boxes_px for chunk in torch.split(pixels, size) for one in detector._detect(chunk)]  # noqa: SLF001
        return Counter((number, *map(int, box)) for number, boxes in enumerate(found) for box in boxes)

    def ours(size: int) -> Counter[tuple[int, ...]]:
        found = replace(pipeline, sizes=CallSizes(images=size)).infer(sheets)
        return Counter((number, *one.box_px) for number, boxes in enumerate(found) for one in boxes)  # type: ignore[union-attr]

    alone, rows = ours(1), []
    for way in (network, ours):
        for size in (3, 8):
            flipped = (alone - way(size)).total()
            rows.append((way.__name__, size, alone.total(), flipped, f"{1e6 * flipped / alone.total():.0f}"))
            print(*rows[-1], flush=True)
    return f"{images} photographs of {FLIP_SIZE_PX[0]}x{FLIP_SIZE_PX[1]}.\n\n" + report.table(
        ("way", "images a call", "boxes", "flipped", "per million"), rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="photographs per pipeline")
    parser.add_argument("--flip-images", type=int, default=20)
    parser.add_argument("--pipeline", action="append", choices=PIPELINES, help="repeatable; all ten by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("inference", "flips"), help="one section of the two")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, torch.device(options.device))
        return
    slugs, told = options.pipeline or list(PIPELINES), caption()
    sections: dict[str, tuple[str, Callable[[Path], str]]] = {
        "inference": ("Inference", lambda folder: overheads(folder, options.device, slugs, options.images)),
        "flips": (
            "Boxes that change with the size of a detector's call",
            lambda folder: flips(folder, torch.device(options.device), slugs[0], options.flip_images),
        ),
    }
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # on a disk: the journal is written to it
        write_models(Path(folder) / "models", slugs)
        for name, (title, measure) in sections.items():
            if options.only in {None, name}:
                on = f"{told} {torch.get_num_threads()} threads on {options.device}."
                text = f"## {title} (`benchmarks/inference.py`)\n\n{on}\n\n{measure(Path(folder))}"
                print(text)
                report.write_section(name, text)


if __name__ == "__main__":
    main()
