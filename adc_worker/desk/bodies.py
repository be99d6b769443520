"""What requests say: bodies and queries as models; what is wrong with one is the body of the 400 that refuses it."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adc_worker.antenna.registration import DETECTOR_TYPES

_B = TypeVar("_B", bound=BaseModel)

Mode = Literal["internal", "sync_api", "async_api"]
Box = Annotated[dict[Literal["x1", "y1", "x2", "y2"], float], Field(min_length=4)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)


class Algorithm(_Body):
    name: str
    key: str
    task_type: str | None = None


class Classification(_Body):
    classification: str
    labels: list[str] | None = None
    scores: list[float]
    logits: list[float] | None = None
    algorithm: Algorithm
    terminal: bool
    timestamp: datetime


class Detection(_Body):
    source_image_id: str
    bbox: Box | None = None
    algorithm: Algorithm
    timestamp: datetime
    classifications: list[Classification]


class SourceImage(_Body):
    id: str
    url: str


class Success(_Body):
    pipeline: str
    total_time: float
    source_images: list[SourceImage]
    detections: list[Detection]

    @property
    def image_ids(self) -> list[str]:
        return [image.id for image in self.source_images]


class Failure(_Body):
    error: str
    image_id: str | None = None

    @property
    def image_ids(self) -> list[str]:
        return [] if self.image_id is None else [self.image_id]


class Pipeline(_Body):
    """One without algorithms takes results of any algorithm; one that has some insists on them."""

    name: str
    slug: str
    version: int
    algorithms: list[Algorithm] = Field(default_factory=list)

    def accepts(self, result: Success) -> bool:
        """Whether a result can be saved: one detector there, every algorithm known, no scores empty."""
        classifications = [c for detection in result.detections for c in detection.classifications]
        if result.pipeline != self.slug or any(not c.scores for c in classifications):
            return False
        used = {d.algorithm.key for d in result.detections} | {c.algorithm.key for c in classifications}
        n_detectors = sum(a.task_type in DETECTOR_TYPES for a in self.algorithms)
        return not self.algorithms or (n_detectors == 1 and used <= {a.key for a in self.algorithms})


class Entry(_Body):
    reply_subject: str
    result: Annotated[Success | Failure, Field(union_mode="left_to_right")]


class Results(_Body):
    results: list[Entry]


class Fetch(_Body):
    batch_size: Annotated[int, Field(strict=True, ge=1)]


class Registration(_Body):
    processing_service_name: str
    pipelines: list[Pipeline]


class Query(BaseModel):
    limit: int | None = None
    offset: int = 0
    pipeline__slug__in: str | None = None
    ids_only: bool = False
    incomplete_only: bool = False
    dispatch_mode: Mode | None = None
    status: str | None = None
    project: int | None = None


class CaptureQuery(Query):
    project_id: int
    collections: int | None = None


async def read(request: web.Request, kind: type[_B]) -> _B:
    raw = await request.read()
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text=f'Unsupported media type "{request.content_type}" in request.')
    try:
        return kind.model_validate(orjson.loads(raw))
    except orjson.JSONDecodeError as error:  # NaN is one, too
        raise web.HTTPBadRequest(text=f"JSON parse error - {error}") from None


def problems(error: ValidationError) -> dict[str, list[Any]]:
    """Each problem under its field; inside a list, its `loc` begins with the index of the invalid entry."""
    found = defaultdict(list)
    for problem in error.errors():
        field, *inside = problem["loc"] or ("non_field_errors",)
        row = {"loc": ["__root__", *map(str, inside)], "msg": problem["msg"], "type": problem["type"]}
        found[str(field)].append(row if inside else problem["msg"])
    return found
