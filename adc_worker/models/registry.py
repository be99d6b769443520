"""Which pipelines this worker has: the built-in ones, those of installed packages, and those the operator names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points

import torch

from adc_worker.errors import ConfigurationError, ExitCode, WorkerFault
from adc_worker.models import light_sheet_blobs, simulated
from adc_worker.models.pipeline import Algorithm, CallSizes, Pipeline

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
    """

    slug: str
    name: str
    algorithms: tuple[Algorithm, ...]
    load: Callable[[torch.device, CallSizes], Pipeline]
    on_request: bool = False


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


def available(extra: Sequence[str], simulated_seconds_per_image: float) -> dict[str, PipelineSpec]:
    """Return every pipeline by slug; `extra` is AMI_EXTRA_PIPELINES. Raises ConfigurationError naming the culprit."""
    specs = built_in(simulated_seconds_per_image)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        specs.extend(_specs_from(point.load, f"the entry point {point.name} ({point.value})"))
    for reference in extra:
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
