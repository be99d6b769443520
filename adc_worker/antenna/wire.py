"""The JSON that goes between worker and Antenna, and nothing of how it travels.

Unknown fields are ignored; a task that lacks one it needs is dropped alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adc_worker.log import get_logger

_log = get_logger(__name__)
_Entry = TypeVar("_Entry", bound=BaseModel)

SERVED_STATES = frozenset({"STARTED", "RETRY"})
FINAL_STATES = frozenset({"SUCCESS", "FAILURE", "REVOKED"})


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)


class Task(_Wire):
    """One image to process. `reply_subject` is the lease it came with."""

    image_id: str
    image_url: str
    reply_subject: str


class JobRef(_Wire):
    """A row of the job list."""

    id: int
    pipeline_slug: str


class JobState(_Wire):
    """What the worker reads of a job's detail."""

    id: int
    status: str
    dispatch_mode: str = "async_api"
    started_at: str | None = None

    @property
    def is_served(self) -> bool:
        return self.status in SERVED_STATES


class _Page(_Wire):
    results: list[Any] = Field(default_factory=list)


class _Tasks(_Wire):
    tasks: list[Any] = Field(default_factory=list)


def parse_tasks(body: bytes) -> list[Task]:
    """Read the answer to a fetch; a malformed entry is logged and left to its lease."""
    return [task for entry in _Tasks.model_validate_json(body).tasks if (task := _entry(Task, entry)) is not None]


def parse_jobs(body: bytes) -> list[JobRef]:
    """Read the job list; a malformed row is logged and skipped."""
    return [job for entry in _Page.model_validate_json(body).results if (job := _entry(JobRef, entry)) is not None]


def _entry(kind: type[_Entry], entry: Any) -> _Entry | None:
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        _log.warning("antenna_entry_malformed", problem=str(error.errors()[0]["msg"]), field=error.errors()[0]["loc"])
        return None


@dataclass(frozen=True, slots=True)
class AlgorithmRef:
    """How a result names the algorithm that produced it; must equal what was registered."""

    name: str
    key: str


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One algorithm as Antenna registers it; results refer to it by name and key."""

    name: str
    key: str
    task_type: str  # "detection", "localization" or "classification"
    description: str = ""
    version: int = 1
    version_name: str = "v1"
    uri: str | None = None
    labels: tuple[str, ...] = ()  # class order; empty for detectors
    labels_uri: str | None = None
    taxon_rank: str | None = None  # of all labels

    @property
    def ref(self) -> AlgorithmRef:
        return AlgorithmRef(self.name, self.key)


@dataclass(frozen=True, slots=True)
class Classification:
    """One classifier's answer for one detection; arrays are float32 [classes]."""

    label: str
    scores: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    algorithm: AlgorithmRef
    terminal: bool


@dataclass(frozen=True, slots=True)
class Detection:
    """One box in whole pixels of the image as stored, x1 < x2 and y1 < y2."""

    box_px: tuple[int, int, int, int]
    algorithm: AlgorithmRef
    classifications: Sequence[Classification] = ()


def success_result(
    task: Task, pipeline_slug: str, detections: Sequence[Detection], total_time_s: float, timestamp: str
) -> Iterator[bytes]:
    """Serialise one image's result, detection by detection: a large classifier's reaches 200 MB.

    Arrays go straight from float32 to text, never through Python floats.
    """
    start = {
        "pipeline": pipeline_slug,
        "total_time": total_time_s,
        "source_images": [{"id": task.image_id, "url": task.image_url}],
    }
    yield orjson.dumps(start)[:-1] + b',"detections":['
    for index, detection in enumerate(detections):
        body = orjson.dumps(_detection(task, detection, timestamp), option=orjson.OPT_SERIALIZE_NUMPY)
        yield b"," + body if index else body
    yield b"]}"


def error_result(image_id: str, text: str) -> bytes:
    """Serialise a final failure. Without its image id Antenna could never finish the job."""
    if not image_id:
        raise ValueError("an error result needs an image id")
    return orjson.dumps({"error": text, "image_id": image_id})


@dataclass(frozen=True, slots=True)
class PostEntry:
    """A serialised result on its way to Antenna; `parts` can be asked for anew when a post is repeated."""

    reply_subject: str
    size_bytes: int
    parts: Callable[[], Iterable[bytes]]


def result_post(entries: Sequence[PostEntry]) -> tuple[int, Iterator[bytes]]:
    """Return the body of one post: its size in bytes, and its parts, none of them larger than a result's own."""
    heads = [b'{"reply_subject":' + orjson.dumps(entry.reply_subject) + b',"result":' for entry in entries]
    start, separator, end = b'{"results":[', b",", b"]}"
    commas = max(0, len(entries) - 1)
    size_bytes = len(start) + sum(map(len, heads)) + commas + len(entries) + len(end)

    def parts() -> Iterator[bytes]:
        yield start
        for index, (head, entry) in enumerate(zip(heads, entries, strict=True)):
            yield separator + head if index else head
            yield from entry.parts()
            yield b"}"
        yield end

    return size_bytes + sum(entry.size_bytes for entry in entries), parts()


def _algorithm(ref: AlgorithmRef) -> dict[str, str]:
    return {"name": ref.name, "key": ref.key}


def _detection(task: Task, detection: Detection, timestamp: str) -> dict[str, Any]:
    x1, y1, x2, y2 = detection.box_px
    return {
        "source_image_id": task.image_id,
        "bbox": {"x1": x1, "y1": y1, "x2": x2, "y2": y2},
        "algorithm": _algorithm(detection.algorithm),
        "timestamp": timestamp,
        "classifications": [
            {
                "classification": one.label,
                "scores": one.scores,
                "logits": one.logits,
                "algorithm": _algorithm(one.algorithm),
                "terminal": one.terminal,
                "timestamp": timestamp,
            }
            for one in detection.classifications
        ],
    }
