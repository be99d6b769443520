"""A job and its photographs, as the desk's Antenna holds them in memory and shows them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from adc_worker.desk.bodies import Failure, Mode, Pipeline, Success

MAX_FAILED_SHARE = 0.5  # as on the real server: a job with more failed images ends as a failure
PROJECT_ID = 1  # the project that all jobs belong to
PROJECT = {"id": PROJECT_ID, "name": "Desk"}


def now() -> str:
    """Return the time as Antenna writes it: without a zone."""
    utc = datetime.now(UTC)
    return utc.replace(tzinfo=None).isoformat()


@dataclass(frozen=True, slots=True)
class Capture:
    """One photograph; one without a file is on another host."""

    id: int
    collection: int
    url: str
    file: Path | None

    @property
    def size_bytes(self) -> int | None:
        if self.file is None or not self.file.is_file():
            return None
        return self.file.stat().st_size

    def to_json(self) -> dict[str, Any]:
        width = height = None
        if self.file is not None:
            width, height = _image_size(self.file)
        return {
            "id": self.id,
            "url": self.url,
            "path": self.url.rsplit("/", 1)[-1],
            "project": PROJECT_ID,
            "timestamp": None,
            "deployment": None,
            "event": None,
            "width": width,
            "height": height,
            "size": self.size_bytes,
            "detections_count": 0,
        }


@cache
def _image_size(file: Path) -> tuple[int | None, int | None]:
    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, Image.DecompressionBombError):  # broken and missing files are part of the tests
        return None, None


@dataclass(slots=True, kw_only=True)
class Job:
    """One job. Image ids are strings, as in tasks; seconds are those of `time.monotonic`.

    Attributes:
        image_ids: in the order given to `add_job`.
        processed_ids: images counted or about to be counted, with the failed and the refused ones.
        results: what was saved, by image.
        errors: error texts, by image.
        stray_errors: errors that name no image of the job: acknowledged and never counted.
        refused: results that could not be saved: never acknowledged.
        deliveries: how often each image was handed out.
        posts: how often each image was posted.
    """

    id: int
    pipeline: Pipeline
    collection: int
    dispatch_mode: Mode
    image_ids: list[str]
    status: str = "CREATED"
    processed_ids: set[str] = field(default_factory=set)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    stray_errors: list[str] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    deliveries: Counter[str] = field(default_factory=Counter)
    posts: Counter[str] = field(default_factory=Counter)
    first_saved_s: float | None = None
    last_saved_s: float | None = None
    updated_at: str = field(default_factory=now)
    started_at: str | None = None

    @property
    def total(self) -> int:
        return len(self.image_ids)

    @property
    def processed(self) -> int:
        return len(self.processed_ids)

    @property
    def failed(self) -> int:
        return len(self.errors)

    @property
    def counted(self) -> int:
        """Images with a result, an error, or both."""
        return len(self.results.keys() | self.errors.keys())

    @property
    def mostly_failed(self) -> bool:
        return self.failed > MAX_FAILED_SHARE * self.total

    def move_to(self, status: str) -> None:
        self.status = status
        self.updated_at = now()
        if status == "STARTED":
            self.started_at = self.updated_at

    def has_outcome(self, image_id: str) -> bool:
        return image_id in self.results or image_id in self.errors

    def record(self, image_ids: Sequence[str], result: Success | Failure) -> None:
        """Save a result for these of its images; what was saved first stays."""
        if not image_ids:
            if isinstance(result, Failure):
                self.stray_errors.append(result.error)
            return
        new_ids = [image_id for image_id in image_ids if image_id not in self.results]
        if isinstance(result, Success):
            body = result.model_dump(mode="json")
            self.results.update(dict.fromkeys(new_ids, body))
        else:
            self.errors.update(dict.fromkeys(new_ids, result.error))
        self.updated_at = now()
        self.last_saved_s = time.monotonic()
        if self.first_saved_s is None:
            self.first_saved_s = self.last_saved_s

    def reset(self) -> None:
        """Forget all results.

        The order of the images changes, as on a server that shuffles them. The subjects of the
        former stream then name other images.
        """
        self.image_ids = self.image_ids[1:] + self.image_ids[:1]
        self.processed_ids.clear()
        self.results.clear()
        self.errors.clear()
        self.stray_errors.clear()
        self.refused.clear()
        self.first_saved_s = None
        self.last_saved_s = None

    def snapshot(self) -> Job:
        """Return a copy that no longer changes."""
        copies = {one.name: copy(getattr(self, one.name)) for one in fields(self)}
        return Job(**copies)

    def to_json(self) -> dict[str, Any]:
        saved_share = self.counted / max(1, self.total)
        return {
            "id": self.id,
            "name": f"desk {self.pipeline.slug}",
            "status": self.status,
            "dispatch_mode": self.dispatch_mode,
            "project": PROJECT,
            "pipeline": self.pipeline.model_dump(),
            "source_image_collection": {
                "id": self.collection,
                "name": f"collection {self.collection}",
            },
            "updated_at": self.updated_at,
            "started_at": self.started_at,
            "progress": {
                "summary": {"status": self.status, "progress": saved_share},
                "stages": [
                    self._collect_stage(),
                    self._process_stage(),
                    self._results_stage(saved_share),
                ],
            },
            "user_permissions": [],
        }

    def _collect_stage(self) -> dict[str, Any]:
        share = 1.0 if self.started_at else 0.0
        return _stage("collect", share, total_images=self.total)

    def _process_stage(self) -> dict[str, Any]:
        return _stage(
            "process",
            self.processed / max(1, self.total),
            processed=self.processed,
            remaining=self.total - self.processed,
            failed=self.failed,
        )

    def _results_stage(self, saved_share: float) -> dict[str, Any]:
        detections = sum(len(result["detections"]) for result in self.results.values())
        return _stage(
            "results",
            saved_share,
            captures=len(self.results),
            detections=detections,
        )


def _stage(key: str, share: float, **counters: int) -> dict[str, Any]:
    status = "CREATED"
    if share > 0:
        status = "STARTED"
    if share >= 1:
        status = "SUCCESS"
    params = [{"key": name, "value": value} for name, value in counters.items()]
    return {"key": key, "status": status, "progress": share, "params": params}
