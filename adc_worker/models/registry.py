"""Which pipelines this worker has: the built-in ones, those of installed packages, and those the operator names."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adc_worker.errors import ConfigurationError, ExitCode, ModelsAway, WorkerFault
from adc_worker.models import cache, catalogue
from adc_worker.models.cache import ModelCache, Wanted
from adc_worker.models.catalogue import DETECTOR, DETECTOR_WEIGHTS, ClassifierCard
from adc_worker.models.light_sheet_blobs import LightSheetBlobs
from adc_worker.models.pipeline import Algorithm, CallSizes, Detections, Detector, Pipeline
from adc_worker.models.weights import WeightStore, read_labels
from adc_worker.settings import Settings

ENTRY_POINT_GROUP = "adc_worker.pipelines"


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """A pipeline that can be loaded.

    Attributes:
        slug: how Antenna's jobs name it.
        name: how people name it.
        algorithms: what its results will name, known without loading a model; exactly one of them detects.
        load: builds it on a device with at most these images and crops per call.
        on_request: polled and registered only when named.
        labelled: returns `algorithms` with the labels that lie in files, fetched if need be.
        files: URLs of all the files it loads.
    """

    slug: str
    name: str
    algorithms: tuple[Algorithm, ...]
    load: Callable[[torch.device, CallSizes], Pipeline]
    on_request: bool = False
    labelled: Callable[[], tuple[Algorithm, ...]] | None = None
    files: tuple[str, ...] = ()


def _antennas(slug: str, card: ClassifierCard, store: WeightStore, models: ModelCache) -> PipelineSpec:
    classifiers = (catalogue.MOTH_FILTER, card) if card.filtered else (card,)

    def labels(classifier: ClassifierCard) -> tuple[str, ...]:
        return read_labels(store.ensure(classifier.labels))

    def load(device: torch.device, sizes: CallSizes) -> Pipeline:
        from adc_worker.models.networks import CropClassifier, FasterRcnn  # noqa: PLC0415 (40 MB that others go without)

        def wanted(key: str, url: str, make: Callable[[Path, torch.device], Any]) -> Wanted:
            weights = store.ensure(url)
            return Wanted(key, weights.stat().st_size, partial(make, weights, device))

        parts = [wanted(DETECTOR.key, DETECTOR_WEIGHTS, FasterRcnn)]
        parts += [wanted(one.key, one.weights, partial(CropClassifier, one, labels(one))) for one in classifiers]
        found, *scored = models.hold(parts, device)
        return Pipeline(
            slug,
            found,
            device,
            binary_filter=scored[0] if card.filtered else None,
            positive_label=catalogue.POSITIVE_LABEL,
            classifier=scored[-1],
            sizes=sizes,
            relieve=models.release_idle,
        )

    return PipelineSpec(
        slug,
        card.name,
        (DETECTOR, *(one.algorithm() for one in classifiers)),
        load,
        labelled=lambda: (DETECTOR, *(one.algorithm(labels(one)) for one in classifiers)),
        files=(DETECTOR_WEIGHTS, *(url for one in classifiers for url in (one.weights, one.labels))),
    )


class Simulated:
    """The GPU of the benchmarks: takes `seconds_per_image` and finds nothing."""

    algorithm = Algorithm(
        name="Simulated detector",
        key="simulated_detector",
        task_type="localization",
        description="Sleeps and finds nothing; for benchmarks.",
    )

    def __init__(self, seconds_per_image: float) -> None:
        self._seconds_per_image = seconds_per_image

    def detect(self, images: torch.Tensor) -> list[Detections]:
        time.sleep(self._seconds_per_image * len(images))
        return [Detections(np.empty((0, 4), np.int32), np.empty(0, np.float32))] * len(images)


def _weightless(slug: str, name: str, detector: Detector) -> PipelineSpec:
    def load(device: torch.device, sizes: CallSizes) -> Pipeline:
        return Pipeline(slug, detector, device, sizes=sizes)

    return PipelineSpec(slug, name, (detector.algorithm,), load, on_request=True)


def available(config: Settings, is_stopping: Callable[[], bool] = lambda: False) -> dict[str, PipelineSpec]:
    """Return every pipeline by slug; fetches of their files break off once `is_stopping` says so.

    Raises:
        ConfigurationError: names the culprit.
    """
    models = ModelCache(partial(cache.free_bytes, limit_bytes=config.memory_limit_bytes), _keep_from_collector)
    store = WeightStore(config.models_path, is_stopping)
    antennas = [_antennas(slug, card, store, models) for slug, card in catalogue.PIPELINES.items()]
    specs = [
        _weightless("light_sheet_blobs", "Light sheet blobs", LightSheetBlobs()),
        _weightless("simulated", "Simulated", Simulated(config.simulated_seconds_per_image)),
    ]
    named = [EntryPoint(one, one, "AMI_EXTRA_PIPELINES") for one in config.extra_pipelines]
    for point in (*entry_points(group=ENTRY_POINT_GROUP), *named):
        specs.extend(_specs_from(point))
    by_slug: dict[str, PipelineSpec] = {}
    for spec in (*antennas, *(_held_whole(spec, models) for spec in specs)):
        if spec.slug in by_slug:
            raise ConfigurationError(
                f"two pipelines have the slug {spec.slug!r}: {by_slug[spec.slug].name}, {spec.name}"
            )
        by_slug[spec.slug] = spec
    return by_slug


def _keep_from_collector() -> None:
    gc.unfreeze()  # what an evicted model leaves can go
    gc.collect()
    gc.freeze()  # models and libraries stay: with them a collection after each job takes 0.2 s


def _held_whole(spec: PipelineSpec, models: ModelCache) -> PipelineSpec:
    """Keep a loaded pipeline in the cache, where nobody knows its size: it leaves when memory is short."""

    def load(device: torch.device, sizes: CallSizes) -> Pipeline:
        (pipeline,) = models.hold([Wanted(spec.slug, 0, partial(spec.load, device, sizes))], device)
        assert isinstance(pipeline, Pipeline)
        return pipeline

    return replace(spec, load=load)


def choose(specs: dict[str, PipelineSpec], named: Sequence[str]) -> list[PipelineSpec]:
    """Return the pipelines to poll for: those named, or all that do not wait to be named."""
    unknown = [slug for slug in named if slug not in specs]
    if unknown:
        raise ConfigurationError(f"--pipeline {unknown[0]}: not known here; known are {', '.join(sorted(specs))}")
    return [specs[slug] for slug in named] or [spec for spec in specs.values() if not spec.on_request]


def load(spec: PipelineSpec, device: torch.device, sizes: CallSizes) -> Pipeline:
    """Load a pipeline, or what of it is not in the cache; keep it for no longer than a job.

    Raises:
        ModelsAway: that failed for a reason that may pass, as others that hold the memory.
        WorkerFault: that failed; no image is to blame.
    """
    # TensorFloat-32, torch's default here, has 10 bits: boxes would depend on what is in a call beside the image.
    torch.backends.cudnn.allow_tf32 = False
    try:
        return spec.load(device, sizes)
    except WorkerFault:
        raise
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise ModelsAway(f"pipeline {spec.slug} cannot be loaded now: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise WorkerFault(
            f"pipeline {spec.slug} cannot be loaded: {type(error).__name__}: {error}", ExitCode.MODEL_UNAVAILABLE
        ) from error


def _specs_from(point: EntryPoint) -> Iterator[PipelineSpec]:
    source = f"{point.group}: {point.value}"
    try:
        specs = list(point.load()())
    except Exception as error:
        raise ConfigurationError(
            f"{source} failed, which must be package.module:function: {type(error).__name__}: {error}"
        ) from error
    for spec in specs:
        if not isinstance(spec, PipelineSpec):
            raise ConfigurationError(f"{source} returned {type(spec).__name__} instead of PipelineSpec")
        yield spec
