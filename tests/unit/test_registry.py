"""Which pipelines a worker has, and what it says when one of them is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adc_worker.errors import ConfigurationError
from adc_worker.models.catalogue import (
    BOXES_PER_IMAGE,
    DETECTOR,
    DETECTOR_WEIGHTS,
    MOTH_FILTER,
    PIPELINES,
    SCORE_THRESHOLD,
    ClassifierCard,
)
from adc_worker.models.pipeline import CallSizes
from adc_worker.models.registry import available, choose, load
from adc_worker.settings import Settings

REFERENCE = Path(__file__).parents[3] / "shared" / "pipelines.json"
EXTRA = "tests.support.extra_pipeline:pipelines"


def test_a_pipeline_of_an_installed_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the entry-point group, without any variable."""
    metadata = tmp_path / "corners-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: corners\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[adc_worker.pipelines]\ncorners = {EXTRA}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "corners" in [spec.slug for spec in choose(available(Settings()), ())]


def test_pipelines_that_wait_to_be_named_run_only_then() -> None:
    """By default a worker works for Antenna's ten."""
    found = available(Settings())
    assert [spec.slug for spec in choose(found, ())] == list(PIPELINES)
    assert [spec.slug for spec in choose(found, ("simulated",))] == ["simulated"]


def test_whoever_loads_a_pipeline_gets_boxes_of_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker, tuning and benchmarks alike: with TensorFloat-32 they would depend on what is in a call beside."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    load(available(Settings())["simulated"], torch.device("cpu"), CallSizes())
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (("nowhere:pipelines",), "AMI_EXTRA_PIPELINES: nowhere:pipelines failed, .*: ModuleNotFoundError"),
        (("json",), "json failed, which must be package.module:function"),
        (("builtins:dir",), "returned str instead of PipelineSpec"),
        ((EXTRA, EXTRA), "two pipelines have the slug 'corners'"),
    ],
)
def test_a_wrong_source_is_named(extra: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        available(Settings(extra_pipelines=extra))


def test_an_unknown_slug_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"light_sheet_blobs, .*simulated"):
        choose(available(Settings()), ("moths",))


def _facts(card: ClassifierCard) -> dict[str, Any]:
    mean, std = (",".join(map(str, values)) for values in card.statistics)
    return {
        "name": card.name,
        "key": card.key,
        "task_type": "classification",
        "weights": card.weights,
        "labels": card.labels,
        "input_size_px": card.crop_px,
        "taxon_rank": card.taxon_rank,
        "normalize": f"normalize mean {mean} std {std}",
    }


def _recorded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _facts(MOTH_FILTER) if name != "normalize"} | {
        "normalize": row["preprocess"].rpartition("→ ")[2]
    }


@pytest.mark.skipif(not REFERENCE.is_file(), reason=f"no reference of Antenna's pipelines at {REFERENCE}")
def test_the_ten_pipelines_are_those_that_projects_have_registered() -> None:
    """Slugs, names, keys, addresses and preparation of crops, to the letter."""
    reference = json.loads(REFERENCE.read_text())
    ours = {slug: {"binary_filter": card.filtered} | _facts(card) for slug, card in PIPELINES.items()}
    assert ours == {
        slug: {"binary_filter": row["binary_filter"]} | _recorded(row) for slug, row in reference["pipelines"].items()
    }
    assert _facts(MOTH_FILTER) == _recorded({"task_type": "classification"} | reference["binary_filter"])
    words = {"torchvision_resnet50": "torchvision resnet50;", "timm_resnet50": "timm resnet50,"}
    words |= {"turing": "resnet50 trunk", "timm_convnext_tiny": "timm convnext_tiny_in22k,"}
    for slug, card in PIPELINES.items():
        assert reference["pipelines"][slug]["architecture"].startswith(words[card.architecture])
    row = reference["detector"]
    expected = (row["name"], row["key"], row["task_type"], row["weights"])
    assert (DETECTOR.name, DETECTOR.key, DETECTOR.task_type, DETECTOR.uri) == expected
    assert (row["score_threshold"], row["box_detections_per_img"]) == (SCORE_THRESHOLD, BOXES_PER_IMAGE)


def test_every_pipeline_has_one_detector_and_names_its_files() -> None:
    """And filter and detector are the same files for all."""
    specs = available(Settings())
    for slug, card in PIPELINES.items():
        spec = specs[slug]
        assert [one.task_type for one in spec.algorithms].count("localization") == 1
        assert DETECTOR_WEIGHTS in spec.files
        assert (MOTH_FILTER.weights in spec.files) is (card.filtered or card is MOTH_FILTER)
