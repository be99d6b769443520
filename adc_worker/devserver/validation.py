"""Checks posted results and pipelines, and words what is wrong as Antenna's schema library does.

A specification is a type name, a list of one (a list of those), or a dict of fields; "?" after a field's name means
that it may be missing or null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

TYPES = {"text": (str, int, float), "number": (int, float), "bool": (bool,), "any": (object,)}

_ALGORITHM_REF = {"name": "text", "key": "text"}
_CLASSIFICATION = {
    "classification": "text",
    "labels?": ["text"],
    "scores": ["number"],
    "logits?": ["number"],
    "inference_time?": "number",
    "algorithm": _ALGORITHM_REF,
    "terminal": "bool",
    "timestamp": "time",
}
_DETECTION = {
    "source_image_id": "text",
    "bbox?": {"x1": "number", "y1": "number", "x2": "number", "y2": "number"},
    "inference_time?": "number",
    "algorithm": _ALGORITHM_REF,
    "timestamp": "time",
    "crop_image_url?": "text",
    "classifications": [_CLASSIFICATION],
}
_SUCCESS = {
    "pipeline": "text",
    "total_time": "number",
    "source_images": [{"id": "text", "url": "text"}],
    "detections": [_DETECTION],
}
_ERROR = {"error": "text", "image_id?": "text"}
_ALGORITHM = {"name": "text", "key": "text", "task_type?": "text", "version?": "number", "category_map?": "any"}
_PIPELINE = {"name": "text", "slug": "text", "version": "number", "algorithms?": [_ALGORITHM]}

Problem = dict[str, Any]


def result_problems(entries: list[Any]) -> list[Problem]:
    """What is wrong with the `results` of a post; each result must be a success or an error."""
    problems: list[Problem] = []
    for index, entry in enumerate(entries):
        where = ("__root__", str(index))
        problems += _check(entry, {"reply_subject": "text", "result": "any"}, where)
        if isinstance(entry, dict) and entry.get("result") is not None:
            as_success = list(_check(entry["result"], _SUCCESS, (*where, "result")))
            as_error = list(_check(entry["result"], _ERROR, (*where, "result")))
            problems += as_success + as_error if as_success and as_error else []
    return problems


def pipeline_problems(pipelines: list[Any]) -> list[Problem]:
    return list(_check(pipelines, [_PIPELINE], ("__root__",)))


def _check(value: Any, spec: Any, where: tuple[str, ...]) -> Iterator[Problem]:
    if isinstance(spec, dict):
        yield from _check_fields(value, spec, where)
    elif isinstance(spec, list):
        yield from _check_list(value, spec[0], where)
    elif spec == "time":
        with suppress(ValueError, TypeError):
            datetime.fromisoformat(value)
            return
        yield _problem(where, "invalid datetime format", "value_error.datetime")
    elif not isinstance(value, TYPES[spec]):
        message = {"text": "str type expected", "number": "value is not a valid float"}
        yield _problem(where, message.get(spec, "value could not be parsed to a boolean"), f"type_error.{spec}")


def _check_fields(value: Any, fields: Mapping[str, Any], where: tuple[str, ...]) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield _problem(where, "value is not a valid dict", "type_error.dict")
        return
    for field, spec in fields.items():
        name = field.removesuffix("?")
        if value.get(name) is not None:
            yield from _check(value[name], spec, (*where, name))
        elif name not in value and name == field:
            yield _problem((*where, name), "field required", "value_error.missing")
        elif name == field:
            yield _problem((*where, name), "none is not an allowed value", "type_error.none.not_allowed")


def _check_list(value: Any, spec: Any, where: tuple[str, ...]) -> Iterator[Problem]:
    if not isinstance(value, list):
        yield _problem(where, "value is not a valid list", "type_error.list")
    elif spec == "number" and all(type(item) is float for item in value):
        return  # the long lists: one score for every class
    else:
        for index, item in enumerate(value):
            yield from _check(item, spec, (*where, str(index)))


def _problem(where: tuple[str, ...], message: str, kind: str) -> Problem:
    return {"loc": list(where), "msg": message, "type": kind}
