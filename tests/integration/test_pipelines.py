"""Antenna's pipelines, from files on disk to detections, beside plain inference with the same random weights.

Nothing is fetched: the files are written here, in the layout of the real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as transforms

from adc_worker.antenna.wire import Detection
from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import draw_sheet
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.models import catalogue, registry
from adc_worker.models.catalogue import (
    DETECTOR,
    DETECTOR_WEIGHTS,
    MOTH_FILTER,
    PIPELINES,
    ClassifierCard,
)
from adc_worker.models.networks import ARCHITECTURES, FasterRcnn, detector_network
from adc_worker.models.pipeline import CallSizes, Detections, Pipeline
from adc_worker.models.registry import PipelineSpec
from adc_worker.runtime.supervisor import CHILD_ENVIRONMENT
from adc_worker.settings import Settings
from tests.support import checkpoints
from tests.support.checkpoints import Box, Pixels, plain_boxes, plain_detections, plain_logits
from tests.support.waiting import wait_until
from tests.support.workers import environment, run_to_end

pytestmark = pytest.mark.timeout(900)  # seconds alone; minutes where other work has the cores

SHARED = Path(__file__).parents[3] / "shared"
LISTINGS = SHARED / "checkpoints"
PHOTOGRAPHS = sorted((SHARED / "images").glob("*.jpg"))
CPU = torch.device("cpu")
# One pipeline per architecture: torchvision, timm, Turing's, ConvNeXt.
SLUGS = ("panama_moths_2023", "quebec_vermont_moths_2023", "costa_rica_moths_turing_2024", "insect_orders_2025")
SPECIES = ("Noctua pronuba", "Biston betularia", "Idia aemula", "Udea rubigalis", "Nemoria")
FILTER_LABELS = ("nonmoth", "moth")
CROPS_PER_CALL = 7
STRIP = (1320, 160)  # Faster R-CNN enlarges to 800 px unless the other side reaches 1333: a strip is quick


class Reference:
    """The networks that were saved, and what they say when they are called plainly."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.detector = checkpoints.detector()
        checkpoints.save(self.detector, folder, DETECTOR_WEIGHTS)
        self.networks = {card.key: self._saved(card) for card in (MOTH_FILTER, *(PIPELINES[slug] for slug in SLUGS))}
        self.image = draw_sheet(STRIP, 1).image
        self.boxes = plain_boxes(self.detector, self.image)
        checkpoints.let_half_through(self.networks[MOTH_FILTER.key], MOTH_FILTER, self.image, self.boxes)
        checkpoints.save(self.networks[MOTH_FILTER.key], folder, MOTH_FILTER.weights, wrapped=True)

    def _saved(self, card: ClassifierCard) -> nn.Module:
        labels = FILTER_LABELS if card is MOTH_FILTER else SPECIES
        network = checkpoints.classifier(card, len(labels), seed=len(card.key))
        checkpoints.save(network, self.folder, card.weights, wrapped=card.architecture == "timm_resnet50")
        checkpoints.save_labels(self.folder, card, labels)
        return network

    def logits(self, card: ClassifierCard, image: Pixels, boxes: Sequence[Box]) -> list[npt.NDArray[np.float32]]:
        """Say what a classifier gives for each box, in calls of CROPS_PER_CALL: the last bits depend on that."""
        logits: list[npt.NDArray[np.float32]] = []
        for start in range(0, len(boxes), CROPS_PER_CALL):
            logits += list(plain_logits(self.networks[card.key], card, image, boxes[start : start + CROPS_PER_CALL]))
        return logits


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("data") / "models")


@pytest.fixture(scope="module")
def specs(reference: Reference) -> dict[str, PipelineSpec]:
    return registry.available(Settings(user_data_path=reference.folder.parent))


def infer(pipeline: Pipeline, images: Sequence[Pixels]) -> list[list[Detection]]:
    found = [one for one in pipeline.infer(torch.from_numpy(np.stack(images))) if isinstance(one, list)]
    assert len(found) == len(images)
    return found


class Given:
    """A detector that has been told."""

    algorithm = DETECTOR

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._boxes = np.array(boxes, np.int32)

    def detect(self, images: torch.Tensor) -> list[Detections]:
        return [Detections(self._boxes, np.ones(len(self._boxes), np.float32)) for _ in images]


def detector_alone(specs: dict[str, PipelineSpec], images_per_call: int) -> Pipeline:
    loaded = specs[SLUGS[0]].load(CPU, CallSizes(images=images_per_call))
    return replace(loaded, binary_filter=None, classifier=None)


def expected_classifications(
    reference: Reference, card: ClassifierCard, image: Pixels, boxes: Sequence[Box]
) -> list[list[tuple[ClassifierCard, npt.NDArray[np.float32]]]]:
    """Return for each box the classifiers that see it, with their logits: what the filter rejects goes no further."""
    expected: list[list[tuple[ClassifierCard, npt.NDArray[np.float32]]]] = [[] for _box in boxes]
    chosen = list(range(len(boxes)))
    if card.filtered:
        for index, logits in zip(chosen, reference.logits(MOTH_FILTER, image, boxes), strict=True):
            expected[index].append((MOTH_FILTER, logits))
        chosen = [index for index in chosen if FILTER_LABELS[int(expected[index][0][1].argmax())] == "moth"]
    terminal = reference.logits(card, image, [boxes[index] for index in chosen])
    for index, logits in zip(chosen, terminal, strict=True):
        expected[index].append((card, logits))
    return expected


def check_scores(
    reference: Reference, specs: dict[str, PipelineSpec], slug: str, image: Pixels, boxes: Sequence[Box]
) -> list[Detection]:
    """Labels, softmax and logits are those of plain calls, bit for bit."""
    card = PIPELINES[slug]
    loaded = specs[slug].load(CPU, CallSizes(crops=CROPS_PER_CALL))
    (found,) = infer(replace(loaded, detector=Given(boxes)), [image])
    assert [one.box_px for one in found] == list(boxes)
    for detection, expected in zip(found, expected_classifications(reference, card, image, boxes), strict=True):
        assert detection.algorithm == DETECTOR
        assert [one.algorithm.key for one in detection.classifications] == [one.key for one, _logits in expected]
        for given, (classifier, logits) in zip(detection.classifications, expected, strict=True):
            labels = FILTER_LABELS if classifier is MOTH_FILTER else SPECIES
            assert given.label == labels[int(logits.argmax())]
            assert given.terminal is (classifier is card)
            assert np.array_equal(given.logits, logits)
            assert np.array_equal(given.scores, torch.from_numpy(logits)[None].softmax(1)[0].numpy())
    return found


def test_the_detector_finds_what_it_finds_called_plainly(reference: Reference, specs: dict[str, PipelineSpec]) -> None:
    """The same boxes in the same order, also on a photograph that is enlarged first."""
    small = draw_sheet((1000, 200), 3).image
    for image, expected in ((reference.image, reference.boxes), (small, plain_boxes(reference.detector, small))):
        (found,) = infer(detector_alone(specs, 2), [image])
        assert [one.box_px for one in found] == expected
        assert len(expected) > 10


def test_the_detector_gives_the_very_bits_that_todays_gives(reference: Reference) -> None:
    """Boxes before they are cut to whole pixels, and scores, with batch norms that have learnt something."""
    pixels = transforms.to_tensor(reference.image)
    detector = FasterRcnn(reference.folder / Path(DETECTOR_WEIGHTS).name, CPU)
    with torch.inference_mode():
        (expected,) = reference.detector([pixels])
        (raw,) = detector.network([pixels])
        (found,) = detector.detect(torch.from_numpy(reference.image).permute(2, 0, 1)[None])
    assert torch.equal(raw["boxes"], expected["boxes"])
    assert torch.equal(raw["scores"], expected["scores"])
    plain = plain_detections(reference.detector, reference.image)
    assert len(plain) > 10
    assert found.scores.tolist() == [score for _box, score in plain]


@pytest.mark.parametrize("change", ["one_missing", "one_more"])
def test_nothing_of_a_detectors_checkpoint_is_left_out_but_its_counters(
    reference: Reference, tmp_path: Path, change: str
) -> None:
    """Statistics that are not there, or weights that no layer takes, make another detector."""
    state = checkpoints.as_trained(reference.detector)
    if change == "one_missing":
        del state["backbone.body.bn1.running_mean"]
    else:
        state["backbone.body.bn1.momentum"] = torch.ones(64)
    path = tmp_path / "changed.pt"
    torch.save(state, path)
    with pytest.raises(WorkerFault, match=r"backbone\.body\.bn1"):
        FasterRcnn(path, CPU)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_architecture_scores_crops_as_it_does_called_plainly(
    reference: Reference, specs: dict[str, PipelineSpec], slug: str
) -> None:
    found = check_scores(reference, specs, slug, reference.image, reference.boxes)
    if PIPELINES[slug].filtered:
        assert {len(one.classifications) for one in found} == {1, 2}, "the filter has to say either"
    assert np.ptp([one.classifications[0].logits[0] for one in found]) > 0.1, "a constant answer would prove nothing"


@pytest.mark.parametrize(
    "photograph",
    [pytest.param(path, id=path.stem, marks=() if path.stem == "dslr-1" else pytest.mark.soak) for path in PHOTOGRAPHS],
)
def test_on_real_photographs_it_is_the_same(
    reference: Reference, specs: dict[str, PipelineSpec], photograph: Path
) -> None:
    """Detector and every architecture; skipped where the photographs are not."""
    image = np.array(Image.open(photograph).convert("RGB"))  # a copy: torch warns of arrays that it may not write to
    boxes = plain_boxes(reference.detector, image)
    (found,) = infer(detector_alone(specs, 2), [image])
    assert [one.box_px for one in found] == boxes
    for slug in SLUGS:
        check_scores(reference, specs, slug, image, boxes[:6])


@pytest.mark.parametrize("slug", SLUGS)
def test_an_image_has_the_same_answer_alone_and_among_others(
    reference: Reference, specs: dict[str, PipelineSpec], slug: str
) -> None:
    """Boxes and their order, labels, scores and logits, bit for bit: whatever was inferred beside it or before it."""
    loaded = specs[slug].load(CPU, CallSizes(images=3, crops=CROPS_PER_CALL))
    pipeline = replace(loaded, detector=Given(reference.boxes))
    others = [draw_sheet(STRIP, seed).image for seed in (5, 6)]
    (alone,) = infer(pipeline, [reference.image])
    _first, among, _last = infer(pipeline, [others[0], reference.image, others[1]])
    assert [one.box_px for one in among] == [one.box_px for one in alone]
    for here, there in zip(alone, among, strict=True):
        assert [one.label for one in here.classifications] == [one.label for one in there.classifications]
        for given, again in zip(here.classifications, there.classifications, strict=True):
            assert np.array_equal(given.scores, again.scores)
            assert np.array_equal(given.logits, again.logits)


def test_the_same_image_gives_the_same_boxes_in_chunks_of_1_3_and_8(specs: dict[str, PipelineSpec]) -> None:
    """On a CPU, to the pixel; with less enlargement and fewer proposals than usual, for speed."""
    images = [draw_sheet((320, 96), seed).image for seed in range(8)]
    found = {}
    for most in (1, 3, 8):
        pipeline = detector_alone(specs, most)
        pipeline.detector.network.rpn._post_nms_top_n = {"testing": 300}  # type: ignore[attr-defined]
        pipeline.detector.network.transform.max_size = 400  # type: ignore[attr-defined]
        found[most] = [[one.box_px for one in boxes] for boxes in infer(pipeline, images)]
    assert found[1] == found[3] == found[8]
    assert sum(map(len, found[1])) > 8


def test_a_worker_finishes_a_job_with_the_algorithms_that_are_registered(reference: Reference, tmp_path: Path) -> None:
    """Antenna saves nothing whose algorithm it does not know: from `register` to the last acknowledgement."""
    slug, picture = SLUGS[0], tmp_path / "strip.png"
    Image.fromarray(reference.image).save(picture)
    with DevServer(save_delay_s=0.0) as server:
        env = environment(server, reference.folder.parent)
        register = [sys.executable, "-m", "adc_worker", "worker", "register", "--pipeline", slug]
        subprocess.run(register, env=env, check=True, stdout=subprocess.DEVNULL)
        known = [(one["name"], one["key"], one["task_type"]) for one in server.pipeline(slug)["algorithms"]]
        job_id = server.add_job(slug, [picture], algorithms=known)
        code, log = run_to_end(env, "--pipeline", slug, "--exit-when-idle")
        assert code == ExitCode.OK, "\n".join(log.lines)
        wait_until(lambda: server.job(job_id).status == "SUCCESS")
        (result,) = server.job(job_id).results.values()
    boxes = [tuple(int(one["bbox"][side]) for side in ("x1", "y1", "x2", "y2")) for one in result["detections"]]
    assert boxes == reference.boxes
    given = [
        [(one["algorithm"]["key"], one["terminal"]) for one in box["classifications"]] for box in result["detections"]
    ]
    filtered = [(MOTH_FILTER.key, False)]
    assert all(keys in (filtered, [*filtered, (PIPELINES[slug].key, True)]) for keys in given)
    assert log.events("job_summary")[0]["done"] == 1


JOBS = """
import gc, os, sys, torch
from dataclasses import replace
from adc_worker.host.memory import anonymous_bytes
from adc_worker.models import registry
from adc_worker.models.pipeline import CallSizes
from adc_worker.settings import Settings
from tests.integration.test_pipelines import CPU, Given

sizes, image = CallSizes(), torch.zeros(1, 160, 1320, 3, dtype=torch.uint8)
specs = registry.available(Settings(user_data_path=sys.argv[1], memory_limit_bytes=sys.argv[2]))
for slug in sys.argv[3:]:
    pipeline = registry.load(specs[slug], CPU, sizes)
    list(replace(pipeline, detector=Given([(0, 0, 99, 99)] * 4)).infer(image))
    del pipeline
    gc.collect()
    print(anonymous_bytes([os.getpid()]))
"""


@pytest.mark.parametrize(
    ("limit_bytes", "slugs"),
    [("100MB", ("panama_moths_2023", "quebec_vermont_moths_2023", "panama_moths_2023")), ("64GB", SLUGS[:1] * 3)],
    ids=["short", "plenty"],
)
def test_memory_after_the_third_job_is_memory_after_the_first(
    reference: Reference, limit_bytes: str, slugs: Sequence[str]
) -> None:
    """Where it is short, the classifier of the job before leaves; where it is not, nothing is loaded twice."""
    done = subprocess.run(
        [sys.executable, "-c", JOBS, str(reference.folder.parent), limit_bytes, *slugs],
        env=os.environ | CHILD_ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    used = [int(line) for line in done.stdout.splitlines() if line.isdecimal()]
    assert len(used) == 3
    one_classifier = (reference.folder / Path(PIPELINES[SLUGS[0]].weights).name).stat().st_size
    assert used[2] - used[0] < one_classifier / 4, used


@pytest.mark.parametrize("damage", ["cut", "other_classes", "no_tensors"])
def test_weights_that_do_not_fit_are_named_with_their_path(reference: Reference, tmp_path: Path, damage: str) -> None:
    """Cut short, of another number of classes, or something else altogether: the machine's fault, never the image's."""
    card, folder = PIPELINES[SLUGS[3]], tmp_path / "models"
    folder.mkdir()
    (folder / Path(DETECTOR_WEIGHTS).name).symlink_to(reference.folder / Path(DETECTOR_WEIGHTS).name)
    checkpoints.save_labels(folder, card, SPECIES)
    path = folder / Path(card.weights).name
    if damage == "cut":
        path.write_bytes((reference.folder / path.name).read_bytes()[:1000])
    elif damage == "other_classes":
        checkpoints.save(checkpoints.classifier(card, 3), folder, card.weights)
    else:
        torch.save([1, 2, 3], path)
    spec = registry.available(Settings(user_data_path=tmp_path))[SLUGS[3]]
    with pytest.raises(WorkerFault, match=path.name.replace(".", r"\.")):
        registry.load(spec, CPU, CallSizes())


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "fasterrcnn_resnet50_fpn": detector_network,
    "resnet50_torchvision": partial(ARCHITECTURES["torchvision_resnet50"], 3),
    "resnet50_timm": partial(ARCHITECTURES["timm_resnet50"], 3),
    "resnet50_turing": partial(ARCHITECTURES["turing"], 3),
    "convnext_tiny_in22k": partial(ARCHITECTURES["timm_convnext_tiny"], 3),
}


@pytest.mark.skipif(not LISTINGS.is_dir(), reason=f"no listings of the real checkpoints at {LISTINGS}")
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_the_real_checkpoints(name: str) -> None:
    """Every key, dtype and shape."""
    listing = json.loads((LISTINGS / f"{name}.json").read_text())["state_dict"]
    state = checkpoints.as_trained(LAYOUTS[name]())
    assert {key: [str(one.dtype).removeprefix("torch."), list(one.shape)] for key, one in state.items()} == listing


def test_every_pipeline_is_made_of_a_known_architecture() -> None:
    assert {card.architecture for card in (MOTH_FILTER, *PIPELINES.values())} == ARCHITECTURES.keys()
    assert {PIPELINES[slug].architecture for slug in SLUGS} == ARCHITECTURES.keys()
    assert catalogue.POSITIVE_LABEL in FILTER_LABELS
