"""Telling Antenna which pipelines this worker serves, project by project. Repeating it changes nothing."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from adc_worker.antenna.client import AntennaClient
from adc_worker.antenna.wire import Algorithm
from adc_worker.errors import ConfigurationError

# With none or two of these on a pipeline, Antenna saves no result of it (docs/antenna.md).
DETECTOR_TYPES = frozenset({"detection", "localization", "segmentation"})


def service_name(name: str) -> str:
    """Return `name` with the host's name where it says {hostname}, or after it."""
    host = socket.gethostname()
    return name.replace("{hostname}", host) if "{hostname}" in name else f"{name} ({host})"


def pipeline_entry(slug: str, name: str, algorithms: Sequence[Algorithm]) -> dict[str, Any]:
    """Return a pipeline as Antenna wants it; raises ConfigurationError when no result of it could be saved."""
    detectors = [one.key for one in algorithms if one.task_type in DETECTOR_TYPES]
    if len(detectors) != 1:
        raise ConfigurationError(
            f"pipeline {slug} has {len(detectors)} detectors ({', '.join(detectors)}): Antenna saves results of"
            " pipelines with exactly one"
        )
    unlabelled = [one.key for one in algorithms if one.task_type == "classification" and not one.labels]
    if unlabelled:
        raise ConfigurationError(f"pipeline {slug}: classifier {unlabelled[0]} has no labels, which Antenna refuses")
    entries = [_algorithm(one) for one in algorithms]
    return {"name": name, "slug": slug, "version": 1, "description": "", "algorithms": entries, "stages": []}


def _algorithm(one: Algorithm) -> dict[str, Any]:
    names = ("name", "key", "task_type", "description", "version", "version_name", "uri")
    rank = {"taxon_rank": one.taxon_rank} if one.taxon_rank else {}
    categories = {
        "data": [{"index": index, "label": label, **rank} for index, label in enumerate(one.labels)],
        "labels": one.labels,
        "version": one.version_name,
        "uri": one.labels_uri,
    }
    return {name: getattr(one, name) for name in names} | {"category_map": categories if one.labels else None}


def register(client: AntennaClient, project: int, service: str, entries: Sequence[dict[str, Any]]) -> list[str]:
    """Register pipelines with a project and return what Antenna calls new.

    Raises:
        ConfigurationError: a slug has another detector there. Algorithms are only ever added, never replaced, so ours
            would be the second, and no result of that pipeline could be saved any more, by whichever worker.
        AntennaError: Antenna refused or did not answer.
    """
    known = {row.slug: row.algorithms for row in client.pipelines(project)}
    for entry in entries:
        (ours,) = (one["key"] for one in entry["algorithms"] if one["task_type"] in DETECTOR_TYPES)
        for other in known.get(entry["slug"], ()):
            if other.task_type in DETECTOR_TYPES and other.key != ours:
                raise ConfigurationError(
                    f"pipeline {entry['slug']} is registered there with the detector {other.key}; adding {ours}"
                    " would make two, and Antenna saves no result of such a pipeline. Leave it out with --pipeline"
                )
    answer = client.register(project, {"processing_service_name": service, "pipelines": entries})
    return [*answer.pipelines_created, *answer.algorithms_created]
