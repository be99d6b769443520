"""The JSON that goes between worker and Antenna, and nothing of how it travels.

Unknown fields are ignored. A task without a usable image URL ends as an error of its image, like one with a wrong URL;
one that cannot be answered, for want of an image id or a reply subject, is logged and left to its lease.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from adc_worker.log import get_logger
from adc_worker.redaction import public_url

_log = get_logger(__name__)
_Entry = TypeVar("_Entry", bound=BaseModel)

SERVED_STATES = frozenset({"STARTED", "RETRY"})
FINAL_STATES = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
# All that Antenna gives a job (docs/antenna.md). Another word is no evidence of anything, least of all of a job's end.
STATES = SERVED_STATES | FINAL_STATES | {"CREATED", "PENDING", "CANCELING", "RECEIVED", "UNKNOWN"}
DELETED = "DELETED"  # ours, for a job that Antenna says it does not know
_DIGITS_MAX = 20  # what a 64-bit number has at most


_Text = Annotated[str, Field(min_length=1)]  # by its length pydantic also sees half a surrogate pair, and refuses that


def _url(value: Any) -> str:
    return value if isinstance(value, str) and value == value.encode(errors="ignore").decode() else ""


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


_Moment = Annotated[str | None, BeforeValidator(_text_or_none)]


class _Wire(BaseModel):
    # An error must not quote what it refuses: a shortened quotation of a URL no longer looks like one to redaction.
    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True, hide_input_in_errors=True)


class Task(_Wire):
    """One image to process. `reply_subject` is the lease it came with."""

    image_id: _Text
    image_url: Annotated[str, BeforeValidator(_url)] = ""
    reply_subject: _Text


class JobRef(_Wire):
    """A row of the job list."""

    id: int = Field(ge=0, lt=1 << 63)  # what the journal can store
    pipeline_slug: _Text


class _Counter(_Wire):
    key: str
    value: Any = None


class _Stage(_Wire):
    key: str
    params: list[_Counter] = Field(default_factory=list)


def _inside(*path: str) -> Any:
    return Field(default=None, validation_alias=AliasPath(*path))


class JobState(_Wire):
    """What the worker reads of a job's detail."""

    id: int
    status: str
    dispatch_mode: str = "async_api"
    pipeline_slug: str | None = _inside("pipeline", "slug")
    project_id: int | None = _inside("project", "id")
    collection_id: int | None = _inside("source_image_collection", "id")
    stages: list[_Stage] | None = _inside("progress", "stages")
    created_at: _Moment = None
    started_at: _Moment = None

    @property
    def incarnation(self) -> str | None:
        """What tells this run of the job from every other one; None unless it runs and Antenna says since when.

        A retry sets `started_at` anew before it publishes tasks, so the same value proves the same stream. It is only
        ever compared for equality: it has no time zone, and its clock is not the one of NATS. While the state is RETRY
        the value may still be that of the run before. A database that was set up anew gives another `created_at`. What
        stands before the slash says for which results: those of the job's pipeline.
        """
        if self.status != "STARTED" or not self.started_at:
            return None
        return f"{self.created_at or ''} {self.pipeline_slug or ''}/{self.started_at}"

    @property
    def is_served(self) -> bool:
        return self.status in SERVED_STATES

    @property
    def is_lost(self) -> bool:
        """Whether nothing may be posted to it any more: final, cancelled, or not a job for workers that pull."""
        over = self.status in FINAL_STATES or self.status in {"CANCELING", DELETED}
        return over or self.dispatch_mode != "async_api"

    @property
    def total(self) -> int | None:
        """Images of the job; None while Antenna has not counted them."""
        return self._counter("collect", "total_images")

    @property
    def saved(self) -> int:
        """Images whose outcome is in Antenna's database."""
        return (self._counter("results", "captures") or 0) + (self._counter("process", "failed") or 0)

    def _counter(self, stage: str, key: str) -> int | None:
        for one in self.stages or ():
            for counter in one.params if one.key == stage else ():
                if counter.key == key and isinstance(counter.value, int):  # "" before the first count
                    return counter.value
        return None


class Capture(_Wire):
    """A photograph as Antenna lists it; how large it is may not be known there."""

    id: str
    url: str = Field(min_length=1)
    width: int | None = None
    height: int | None = None
    size: int | None = None


class ProjectRow(_Wire):
    """A row of the list of projects."""

    id: int


class RegisteredAlgorithm(_Wire):
    """An algorithm of a pipeline, as Antenna lists it."""

    key: str
    task_type: str | None = None


class PipelineRow(_Wire):
    """A pipeline that a project has."""

    slug: str
    algorithms: list[RegisteredAlgorithm] = Field(default_factory=list)


class _TaskList(_Wire):
    tasks: list[Any]


class _Page(_Wire):
    """One page of any of Antenna's lists."""

    results: list[Any]
    count: int = 0
    next: str | None = None


class _Receipt(_Wire):
    reply_subject: str
    status: str


class _Accepted(_Wire):
    status: Literal["accepted"]
    job_id: int
    tasks: list[Any]


class Registered(_Wire):
    """Antenna's account of a registration."""

    success: bool
    error: Any = None
    pipelines: list[PipelineRow]
    pipelines_created: list[str]
    algorithms_created: list[str]


def parse_tasks(body: bytes) -> list[Task]:
    """Read the answer to a fetch; a malformed entry is logged and left to its lease, a repeated one is taken once.

    Raises:
        ValueError: it is no answer to a fetch. Only a list without any entry means that there are no tasks for us.
    """
    return list(dict.fromkeys(_entries(Task, _TaskList.model_validate(load_json(body)).tasks)))


def parse_jobs(body: bytes) -> list[JobRef]:
    """Read the job list; a malformed row is logged and skipped. Raises ValueError where it is none."""
    return _entries(JobRef, _Page.model_validate(load_json(body)).results)


def parse_job(body: bytes) -> JobState:
    """Read a job's detail; raises ValueError where it is none, or has a status that no job has."""
    state = JobState.model_validate(load_json(body))
    if state.status not in STATES:
        raise ValueError("the job's status is none of Antenna's")
    return state


def parse_accepted(body: bytes, job_id: int) -> frozenset[str]:
    """Read the answer to a post: the reply subjects whose results Antenna has queued.

    Raises:
        ValueError: it does not accept a post of this job.
    """
    answer = _Accepted.model_validate(load_json(body))
    if answer.job_id != job_id:
        raise ValueError("it accepts results of another job")
    receipts = _entries(_Receipt, answer.tasks)
    return frozenset(receipt.reply_subject for receipt in receipts if receipt.status == "queued")


def parse_page(kind: type[_Entry], body: bytes) -> tuple[list[_Entry], str]:
    """Read a page of a list, and the address of the next one, empty at the end.

    Raises:
        ValueError: it is no page, or a row of it cannot be read: what is decided from a list takes all of it.
    """
    page = _Page.model_validate(load_json(body))
    return [kind.model_validate(row) for row in page.results], page.next or ""


def parse_registered(body: bytes) -> Registered:
    """Read the answer to a registration; raises ValueError where it is none."""
    return Registered.model_validate(load_json(body))


def parse_captures(body: bytes) -> tuple[int, list[Capture]]:
    """Read a page of captures, and how many there are in all; a malformed row is logged and skipped.

    Raises:
        ValueError: it is no such page.
    """
    page = _Page.model_validate(load_json(body))
    return page.count, _entries(Capture, page.results)


def load_json(body: bytes) -> Any:
    """Read JSON so that bytes which are no text, and numbers without end, cost only the entry that has them."""
    try:
        return json.loads(
            body.decode(errors="surrogateescape"),
            parse_int=lambda digits: int(digits) if len(digits) <= _DIGITS_MAX else digits,
        )
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _entries(kind: type[_Entry], entries: Sequence[Any]) -> list[_Entry]:
    """Read the entries of a list, one by one; raises ValueError where there are some and none can be read."""
    read: list[_Entry] = []
    for entry in entries:
        try:
            read.append(kind.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            _log.warning("antenna_entry_malformed", problem=first["msg"], field=first["loc"])
    if entries and not read:
        raise ValueError(f"none of its {len(entries)} entries can be read")
    return read


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


@dataclass(frozen=True, slots=True)
class Classification:
    """One classifier's answer for one detection; arrays are float32 [classes]."""

    label: str
    scores: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    algorithm: Algorithm
    terminal: bool


@dataclass(frozen=True, slots=True)
class Detection:
    """One box in whole pixels of the image as stored, x1 < x2 and y1 < y2."""

    box_px: tuple[int, int, int, int]
    algorithm: Algorithm
    classifications: Sequence[Classification] = ()


@dataclass(frozen=True, slots=True)
class SuccessResult:
    """One image's result, serialised detection by detection: a large classifier's reaches 200 MB.

    Arrays go straight from float32 to text, never through Python floats. They are finite: who makes a result has
    checked that, because JSON has no other numbers. The URL goes back without its query: Antenna finds the image by its
    id, and what signs the URL must not come to rest in results.
    """

    task: Task
    pipeline_slug: str
    detections: Sequence[Detection]
    total_time_s: float
    timestamp: str

    def __iter__(self) -> Iterator[bytes]:
        start = {
            "pipeline": self.pipeline_slug,
            "total_time": self.total_time_s,
            "source_images": [{"id": self.task.image_id, "url": public_url(self.task.image_url)}],
        }
        yield orjson.dumps(start)[:-1] + b',"detections":['
        for index, detection in enumerate(self.detections):
            body = orjson.dumps(_detection(self.task, detection, self.timestamp), option=orjson.OPT_SERIALIZE_NUMPY)
            yield b"," + body if index else body
        yield b"]}"


def error_result(image_id: str, text: str) -> bytes:
    """Serialise a final failure. Without its image id Antenna could never finish the job."""
    if not image_id:
        raise ValueError("an error result needs an image id")
    return orjson.dumps({"error": text, "image_id": image_id})


def is_error_result(body: bytes) -> bool:
    """Whether a serialised result, or its start, is an error."""
    return body.startswith(b'{"error":')


@dataclass(frozen=True, slots=True)
class PostEntry:
    """A serialised result on its way to Antenna; `parts` can be asked for anew when a post is repeated."""

    reply_subject: str
    size_bytes: int
    parts: Callable[[], Iterable[bytes]]


def result_post(entries: Sequence[PostEntry], fields: Mapping[str, Any] | None = None) -> tuple[int, Iterator[bytes]]:
    """Return the body of one post: its size in bytes, and its parts, none of them larger than a result's own.

    `fields` stand beside the results.
    """
    heads = [b'{"reply_subject":' + orjson.dumps(entry.reply_subject) + b',"result":' for entry in entries]
    start, separator, end = orjson.dumps({**(fields or {}), "results": []})[:-2], b",", b"]}"
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


def _algorithm(one: Algorithm) -> dict[str, str]:
    """How a result names the algorithm that produced it; must equal what was registered."""
    return {"name": one.name, "key": one.key}


def _scores(scores: npt.NDArray[np.float32]) -> orjson.Fragment:
    """Write scores with as few digits as tell a float32, and the top one, wherever it occurs, with those of a double.

    Antenna takes the largest of them as the classification's score, and finds the classification that it already has
    by exactly that number. The worker of before posted doubles: 0.10000000149011612 where a float32 is told by 0.1.
    Doubles for all scores would make a result 1.7 times as large.
    """
    top = scores.max()
    others = scores.copy()
    others[scores == top] = np.nan  # written as `null`, which no other score is
    written = orjson.dumps(others, option=orjson.OPT_SERIALIZE_NUMPY)
    return orjson.Fragment(written.replace(b"null", orjson.dumps(float(top))))


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
                "scores": _scores(one.scores),
                "logits": one.logits,
                "algorithm": _algorithm(one.algorithm),
                "terminal": one.terminal,
                "timestamp": timestamp,
            }
            for one in detection.classifications
        ],
    }
