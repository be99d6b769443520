"""The JSON that goes between worker and Antenna, and nothing of how it travels.

Unknown fields are ignored; a task that lacks one it needs is dropped alone.
"""

from __future__ import annotations

from collections.abc import Sequence
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
) -> bytes:
    """Serialise one image's result; arrays go straight from float32 to text, never through Python floats."""
    body = {
        "pipeline": pipeline_slug,
        "total_time": total_time_s,
        "source_images": [{"id": task.image_id, "url": task.image_url}],
        "detections": [_detection(task, detection, timestamp) for detection in detections],
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def error_result(image_id: str, text: str) -> bytes:
    """Serialise a final failure. Without its image id Antenna could never finish the job."""
    if not image_id:
        raise ValueError("an error result needs an image id")
    return orjson.dumps({"error": text, "image_id": image_id})


def result_post(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """Join (reply_subject, serialised result) pairs into the body of one post."""
    joined = b",".join(
        b'{"reply_subject":' + orjson.dumps(subject) + b',"result":' + result + b"}" for subject, result in entries
    )
    return b'{"results":[' + joined + b"]}"


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
