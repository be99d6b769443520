"""Bodies and queries of requests as models.

What is wrong with a body or query becomes the body of the 400 that refuses it.
"""

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

    @property
    def classifications(self) -> list[Classification]:
        return [one for detection in self.detections for one in detection.classifications]

    @property
    def algorithm_keys(self) -> set[str]:
        detectors = {one.algorithm.key for one in self.detections}
        classifiers = {one.algorithm.key for one in self.classifications}
        return detectors | classifiers


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
        """Whether a result can be saved.

        It needs scores in each classification, exactly one detector in the pipeline, and known
        algorithms.
        """
        if result.pipeline != self.slug:
            return False
        if not all(one.scores for one in result.classifications):
            return False
        if not self.algorithms:
            return True
        detectors = [one for one in self.algorithms if one.task_type in DETECTOR_TYPES]
        known_keys = {one.key for one in self.algorithms}
        return len(detectors) == 1 and result.algorithm_keys <= known_keys


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
    """Read a request's body as a model; raises what becomes the answer that refuses it."""
    raw = await request.read()
    if request.content_type != "application/json":
        problem = f'Unsupported media type "{request.content_type}" in request.'
        raise web.HTTPUnsupportedMediaType(text=problem)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:  # a NaN is one, too
        raise web.HTTPBadRequest(text=f"JSON parse error - {error}") from None
    return kind.model_validate(body)


def problems(error: ValidationError) -> dict[str, list[Any]]:
    """Return each problem under its field, in Antenna's form.

    Inside a list a problem's `loc` begins with the index of the invalid entry.
    """
    found = defaultdict(list)
    for problem in error.errors():
        field, *inside = problem["loc"] or ("non_field_errors",)
        told: Any = problem["msg"]
        if inside:
            path = ["__root__", *map(str, inside)]
            told = {"loc": path, "msg": problem["msg"], "type": problem["type"]}
        found[str(field)].append(told)
    return found
