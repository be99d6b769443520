"""Which pipelines this worker has: the built-in ones, those of installed packages, and those the operator names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch

from adc_worker.errors import ConfigurationError, ExitCode, WorkerFault
from adc_worker.models import cache, catalogue, light_sheet_blobs, simulated
from adc_worker.models.cache import ModelCache, Wanted
from adc_worker.models.catalogue import ClassifierCard, DetectorCard, PipelineCard
from adc_worker.models.pipeline import Algorithm, CallSizes, Pipeline
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
        cached: its models are in a cache that others share: ask for it anew before every job, and keep it no longer.
    """

    slug: str
    name: str
    algorithms: tuple[Algorithm, ...]
    load: Callable[[torch.device, CallSizes], Pipeline]
    on_request: bool = False
    labelled: Callable[[], tuple[Algorithm, ...]] | None = None
    files: tuple[str, ...] = ()
    cached: bool = False


def antennas(store: WeightStore, models: ModelCache) -> list[PipelineSpec]:
    """Return Antenna's ten pipelines, which share `models` and have their files in `store`."""
    return [_antennas(card, store, models) for card in catalogue.PIPELINES]


def _antennas(card: PipelineCard, store: WeightStore, models: ModelCache) -> PipelineSpec:
    classifiers = (catalogue.MOTH_FILTER, card.classifier) if card.filtered else (card.classifier,)

    def labels(classifier: ClassifierCard) -> tuple[str, ...]:
        return read_labels(store.ensure(classifier.labels))

    def load(device: torch.device, sizes: CallSizes) -> Pipeline:
        from adc_worker.models.networks import CropClassifier, FasterRcnn  # noqa: PLC0415 (40 MB that others go without)

        def wanted(card: DetectorCard | ClassifierCard, make: Callable[..., Any], *more: Any) -> Wanted:
            weights = store.ensure(card.weights)
            return Wanted(card.key, weights.stat().st_size, partial(make, card, weights, device, *more))

        parts = [wanted(catalogue.DETECTOR, FasterRcnn)]
        parts += [wanted(one, CropClassifier, labels(one)) for one in classifiers]
        found, *scored = models.hold(parts, device)
        return Pipeline(
            card.slug,
            found,
            device,
            binary_filter=scored[0] if card.filtered else None,
            positive_label=catalogue.POSITIVE_LABEL,
            classifier=scored[-1],
            sizes=sizes,
            relieve=models.release_idle,
        )

    return PipelineSpec(
        card.slug,
        card.classifier.name,
        (catalogue.DETECTOR.algorithm, *(one.algorithm() for one in classifiers)),
        load,
        labelled=lambda: (catalogue.DETECTOR.algorithm, *(one.algorithm(labels(one)) for one in classifiers)),
        files=(catalogue.DETECTOR.weights, *(url for one in classifiers for url in (one.weights, one.labels))),
        cached=True,
    )


def built_in(simulated_seconds_per_image: float) -> list[PipelineSpec]:
    """Return the pipelines that need no weights: for the demo and for benchmarks."""

    def load_blobs(device: torch.device, sizes: CallSizes) -> Pipeline:
        return Pipeline("light_sheet_blobs", light_sheet_blobs.LightSheetBlobs(), device, sizes=sizes)

    def load_simulated(device: torch.device, sizes: CallSizes) -> Pipeline:
        return Pipeline("simulated", simulated.Simulated(simulated_seconds_per_image), device, sizes=sizes)

    return [
        PipelineSpec(
            "light_sheet_blobs", "Light sheet blobs", (light_sheet_blobs.ALGORITHM,), load_blobs, on_request=True
        ),
        PipelineSpec("simulated", "Simulated", (simulated.ALGORITHM,), load_simulated, on_request=True),
    ]


def available(config: Settings) -> dict[str, PipelineSpec]:
    """Return every pipeline by slug. Raises ConfigurationError naming the culprit."""
    models = ModelCache(partial(cache.free_bytes, limit_bytes=config.memory_limit_bytes))
    specs = antennas(WeightStore(config.models_path), models) + built_in(config.simulated_seconds_per_image)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        specs.extend(_specs_from(point.load, f"the entry point {point.name} ({point.value})"))
    for reference in config.extra_pipelines:
        specs.extend(_specs_from(partial(_resolve, reference), f"AMI_EXTRA_PIPELINES: {reference}"))
    by_slug: dict[str, PipelineSpec] = {}
    for spec in specs:
        if spec.slug in by_slug:
            raise ConfigurationError(
                f"two pipelines have the slug {spec.slug!r}: {by_slug[spec.slug].name}, {spec.name}"
            )
        by_slug[spec.slug] = spec
    return by_slug


def choose(specs: dict[str, PipelineSpec], named: Sequence[str]) -> list[PipelineSpec]:
    """Return the pipelines to poll for: those named, or all that do not wait to be named."""
    unknown = [slug for slug in named if slug not in specs]
    if unknown:
        raise ConfigurationError(f"--pipeline {unknown[0]}: not known here; known are {', '.join(sorted(specs))}")
    chosen = [specs[slug] for slug in named] or [spec for spec in specs.values() if not spec.on_request]
    if not chosen:
        raise ConfigurationError(
            f"no pipeline to work for: name one with --pipeline ({', '.join(sorted(specs))}) or set AMI_EXTRA_PIPELINES"
        )
    return chosen


def load(spec: PipelineSpec, device: torch.device, sizes: CallSizes) -> Pipeline:
    """Load a pipeline; raises WorkerFault when that fails, since no image is to blame."""
    try:
        return spec.load(device, sizes)
    except WorkerFault:
        raise
    except Exception as error:
        raise WorkerFault(
            f"pipeline {spec.slug} cannot be loaded: {type(error).__name__}: {error}", ExitCode.MODEL_UNAVAILABLE
        ) from error


def _specs_from(resolve: Callable[[], Callable[[], Iterable[PipelineSpec]]], source: str) -> Iterator[PipelineSpec]:
    try:
        specs = list(resolve()())
    except Exception as error:
        raise ConfigurationError(f"{source} failed: {type(error).__name__}: {error}") from error
    for spec in specs:
        if not isinstance(spec, PipelineSpec):
            raise ConfigurationError(f"{source} returned {type(spec).__name__} instead of PipelineSpec")
        yield spec


def _resolve(reference: str) -> Callable[[], Iterable[PipelineSpec]]:
    module, separator, function = reference.partition(":")
    if not separator:
        raise ValueError("write package.module:function")
    resolved: Callable[[], Iterable[PipelineSpec]] = getattr(import_module(module), function)
    return resolved
