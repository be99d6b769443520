"""What is asked of Antenna and what it answers, restated as data: the table that the desk server is held to.

A shape is a type, a tuple of allowed types, a list of one shape (any number of those), a list that ends in `...` (it
begins so), or a dict from key to shape, which may have more keys than named. Anything else is the very value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TEXT_OR_NULL = (str, type(None))
SIZE = (int, type(None))
NUMBER = (int, float)

DETECTOR = {"name": "Sheet detector", "key": "sheet_detector"}
CLASSIFIER = {"name": "Sheet classifier", "key": "sheet_classifier"}
SLUG = "contract_moths"
WHEN = "2026-07-01T23:15:00"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer.

    Attributes:
        path: below the API's base; `{job}`, `{sync_job}` and `{project}` are filled in.
        recorded: names of the recordings that show the same answer.
        role: whose token is sent: superuser, member, outsider, wrong (a token of nobody) or none.
        body: sent as JSON; bytes are sent as they are.
        job: what was done to `{job}` before: it is fresh, drained or cancelled.
    """

    method: str
    path: str
    status: int
    answer: Any
    recorded: tuple[str, ...] = ()
    role: str = "superuser"
    body: Any = None
    content_type: str = "application/json"
    scheme: str = "Token"
    job: str = "fresh"

    def __str__(self) -> str:
        return self.recorded[0] if self.recorded else f"{self.method}-{self.path}-{self.scheme}".replace("/", "-")


def _get(path: str, status: int, answer: Any, *recorded: str, role: str = "superuser") -> Exchange:
    return Exchange("GET", path, status, answer, recorded, role)


def _post(path: str, status: int, answer: Any, *recorded: str, body: Any = None, **more: str) -> Exchange:
    return Exchange("POST", path, status, answer, recorded, body=body, **more)


def page(row: Any) -> dict[str, Any]:
    return {"count": int, "next": TEXT_OR_NULL, "previous": TEXT_OR_NULL, "results": [row], "user_permissions": [str]}


JOB_ROW = {"id": int, "pipeline_slug": str, "user_permissions": [str]}
TASK = {"id": str, "image_id": str, "image_url": str, "reply_subject": str}
STAGE = {"key": str, "status": str, "progress": NUMBER, "params": [{"key": str, "value": (int, float, str)}]}
JOB = {
    "id": int,
    "status": str,
    "dispatch_mode": str,
    "project": {"id": int, "name": str},
    "pipeline": {"slug": str, "name": str, "version": int},
    "source_image_collection": {"id": int, "name": str},
    "updated_at": str,
    "started_at": TEXT_OR_NULL,
    "progress": {"summary": {"status": str, "progress": NUMBER}, "stages": [STAGE]},
}
CAPTURE = {"id": int, "url": str, "path": str, "timestamp": TEXT_OR_NULL, "width": SIZE, "height": SIZE, "size": SIZE}
CAPTURE |= {"deployment": (dict, type(None)), "event": (dict, type(None)), "detections_count": int}
PIPELINE_ROW = {"slug": str, "name": str, "algorithms": [{"name": str, "key": str}]}
RECEIPT = {"reply_subject": str, "status": "queued", "task_id": str}
ACCEPTED = {"status": "accepted", "job_id": int, "results_queued": int, "tasks": [RECEIPT]}
REGISTERED = {
    "timestamp": str,
    "success": True,
    "error": None,
    "pipelines": [{"name": str, "slug": str, "version": int}],
    "pipelines_created": [str],
    "algorithms_created": [str],
}
DETAIL = {"detail": str}


def invalid(field: str, index: int) -> dict[str, Any]:
    """A refusal that names the entry at fault."""
    return {field: [{"loc": ["__root__", str(index), ...], "msg": str, "type": str}]}


def classification(**changes: Any) -> dict[str, Any]:
    scores = {"scores": [0.2, 0.7, 0.1], "logits": [0.5, 2.0, -0.3]}
    return {"classification": "Moth", "algorithm": CLASSIFIER, "terminal": True, "timestamp": WHEN, **scores, **changes}


def detection(image_id: str, **changes: Any) -> dict[str, Any]:
    box = {"x1": 10.0, "y1": 12.0, "x2": 48.0, "y2": 51.0}
    made = {"algorithm": DETECTOR, "timestamp": WHEN, "classifications": [classification()]}
    return {"source_image_id": image_id, "bbox": box, **made, **changes}


def success(image_id: str, **changes: Any) -> dict[str, Any]:
    """R of an image with one detection, as a worker posts it."""
    images = [{"id": image_id, "url": "http://images.test/a.jpg"}]
    detections = [detection(image_id)]
    return {"pipeline": SLUG, "total_time": 0.4, "source_images": images, "detections": detections, **changes}


FORGED_SUBJECT = "$JS.ACK.job_0.job-0-consumer.1.1.1.1.0"


def post(*results: Any, subject: str | None = FORGED_SUBJECT) -> dict[str, Any]:
    return {"results": [{"reply_subject": subject, "result": result} for result in results]}


ERROR_R = {"error": "image is truncated", "image_id": "1"}
NO_BOX = success("1", detections=[detection("1", bbox=None)])
HALF = {"pipeline": SLUG, "source_images": "nope"}
PIPELINE = {
    "name": "Registered in the table",
    "slug": "registered_moths",
    "version": 1,
    "description": "",
    "algorithms": [
        {"name": "D", "key": "d", "task_type": "detection", "version": 1, "category_map": None},
        {"name": "C", "key": "c", "task_type": "classification", "version": 1, "category_map": {"labels": ["Moth"]}},
    ],
    "stages": [],
}
SERVICE = {"processing_service_name": "desk", "pipelines": [PIPELINE]}
NO_SLUG = {"processing_service_name": "desk", "pipelines": [{"name": "no slug"}]}
ONE: dict[str, Any] = {"batch_size": 1}

POLL = f"jobs/?pipeline__slug__in={SLUG}&ids_only=1&incomplete_only=1&dispatch_mode=async_api"
TASKS = "jobs/{job}/tasks/"
RESULT = "jobs/{job}/result/"
REGISTER = "projects/{project}/pipelines/"
CAPTURES = "captures/?project_id={project}&limit=2"

POLLING = [
    _get(POLL, 200, page(JOB_ROW), "jobs-07-poll-one", "jobs-09-poll-in-progress"),
    _get(POLL + "&limit=10", 200, page(JOB_ROW), "jobs-12-poll-two-jobs-limit"),
    _get(POLL, 200, page(JOB_ROW), "jobs-01-poll-idle", role="member"),
    _get(POLL, 200, page(JOB_ROW), "jobs-08-poll-outsider", role="outsider"),
    _get(POLL, 200, page(JOB_ROW), "jobs-03-poll-no-token", role="none"),
    _get(POLL, 401, DETAIL, "jobs-04-poll-bad-token", role="wrong"),
    _get(POLL.replace("async_api", "bogus"), 400, {"dispatch_mode": [str]}, "jobs-06-poll-bad-dispatch"),
    _get(POLL.replace("/?", "?"), 301, str, "jobs-02-poll-idle-no-slash"),
    _get("jobs/?incomplete_only=1", 200, page(JOB), "jobs-13-full-list"),
    _get("jobs/{job}/", 200, JOB, "job-detail-01-started", "job-detail-02-success"),
    _get("jobs/999999/", 404, DETAIL),
]
BATCH_SIZES = {"zero": 0, "negative": -3, "float": 2.5, "string": "many", "null": None}
FETCHING = [
    _post(TASKS, 200, {"tasks": [TASK]}, "tasks-01-two", "ttr-03-tasks-redelivered", body=ONE),
    _post(TASKS, 200, {"tasks": [TASK]}, "tasks-huge", body={"batch_size": 100_000}),
    _post(TASKS, 200, {"tasks": []}, "tasks-03-drained", body=ONE, job="drained"),
    *(
        _post(TASKS, 400, {"batch_size": [str]}, f"tasks-bad-{name}", body={"batch_size": value})
        for name, value in BATCH_SIZES.items()
    ),
    _post(TASKS, 400, {"batch_size": [str]}, "tasks-bad-missing", body={}),
    _post(TASKS, 400, {"batch_size": [str]}, "tasks-bad-legacy-batch-key", body={"batch": 2}),
    _post(TASKS, 400, DETAIL, "tasks-bad-json", body=b'{"batch_size": 1'),
    _post(TASKS, 415, DETAIL, "tasks-bad-content-type", body=b"1", content_type="text/plain"),
    _post("jobs/{sync_job}/tasks/", 400, [str], body=ONE),
    _post("jobs/999999/tasks/", 404, DETAIL, "tasks-unknown-job", body=ONE),
    _post("jobs/abc/tasks/", 404, DETAIL, "tasks-nonint-job", body=ONE),
    _get(TASKS, 405, DETAIL, "tasks-get-405", "tasks-no-slash-followed-as-get"),
    _post(TASKS[:-1], 301, str, "tasks-no-slash", body=ONE),
    _post(TASKS, 401, DETAIL, "perm-tasks-noauth", body=ONE, role="none"),
    _post(TASKS, 401, DETAIL, "perm-tasks-badtoken", body=ONE, role="wrong"),
    _post(TASKS, 403, DETAIL, "perm-tasks-worker", body=ONE, role="member"),
    _post(TASKS, 403, DETAIL, "perm-tasks-outsider", body=ONE, role="outsider"),
    _post(TASKS, 401, DETAIL, "perm-tasks-bearer-scheme", body=ONE, scheme="Bearer"),
]
POSTING = [
    _post(RESULT, 200, ACCEPTED | {"results_queued": 0, "tasks": []}, "result-empty-list", body=post()),
    _post(RESULT, 200, ACCEPTED, "result-01-two-success", body=post(success("1"))),
    _post(RESULT, 200, ACCEPTED, "result-02-error", body=post(ERROR_R)),
    _post(RESULT, 200, ACCEPTED, "payload-01-bbox-null", body=post(NO_BOX)),
    _post(RESULT, 200, ACCEPTED, "payload-19-both-error-and-success", body=post(success("1") | ERROR_R)),
    _post(RESULT, 400, {"non_field_errors": [str]}, "result-bare-list", body=[]),
    _post(RESULT, 400, {"results": [str]}, "result-missing-key", body={}),
    _post(RESULT, 400, invalid("results", 0), "result-null-reply-subject", body=post(ERROR_R, subject=None)),
    _post(
        RESULT, 400, invalid("results", 0), "payload-11-no-reply-subject-key", body={"results": [{"result": NO_BOX}]}
    ),
    _post(RESULT, 400, invalid("results", 1), "result-mixed-one-invalid", body=post(success("1"), HALF)),
    _post(RESULT, 400, DETAIL, "payload-16-nan-score", body=b'{"results": [NaN]}'),
    _post("jobs/999999/result/", 404, DETAIL, "result-unknown-job", body=post()),
    _get(RESULT, 405, DETAIL, "result-get-405"),
    _post(RESULT[:-1], 301, str, "result-no-slash", body=post()),
    _post(RESULT, 401, DETAIL, "perm-result-noauth", body=post(), role="none"),
    _post(RESULT, 401, DETAIL, "perm-result-badtoken", body=post(), role="wrong"),
    _post(RESULT, 403, DETAIL, "perm-result-worker", body=post(), role="member"),
    _post(RESULT, 403, DETAIL, "perm-result-outsider", body=post(), role="outsider"),
]
NAMELESS = {"pipelines": [PIPELINE]}
EMPTY = SERVICE | {"pipelines": []}
REGISTERING = [
    _post(REGISTER, 201, REGISTERED, "register-01-first", body=SERVICE, role="member"),
    _post(REGISTER, 201, REGISTERED, "register-02-again", body=SERVICE, role="member"),
    _post(REGISTER, 201, REGISTERED, "register-03-empty-pipelines", body=EMPTY, role="member"),
    _post(REGISTER, 400, {"processing_service_name": [str]}, "register-04-missing-name", body=NAMELESS, role="member"),
    _post(REGISTER, 400, invalid("pipelines", 0), "register-05-bad-pipelines", body=NO_SLUG, role="member"),
    _post(REGISTER, 403, DETAIL, "register-06-outsider", body=SERVICE, role="outsider"),
    _post(REGISTER, 401, DETAIL, "register-07-no-token", body=SERVICE, role="none"),
    _post("projects/999999/pipelines/", 404, DETAIL, "register-08-unknown-project", body=SERVICE, role="member"),
    _post(REGISTER[:-1], 301, str, "register-09-no-trailing-slash", body=SERVICE, role="member"),
    _get(REGISTER, 200, page(PIPELINE_ROW), "pipelines-01-project-list"),
]
BROWSING = [
    _get("projects/", 200, page({"id": int, "name": str}), "projects-01-list-worker", "projects-03-list-noauth"),
    _get("projects/", 401, DETAIL, "projects-04-list-badtoken", role="wrong"),
    _get(CAPTURES, 200, page(CAPTURE), "captures-01-collection-worker", "captures-02-project-admin"),
    _get(CAPTURES, 200, page(CAPTURE), "captures-05-noauth", "captures-15-page2", role="none"),
    _get("captures/?limit=1", 400, {"project_id": [str]}, "captures-03-no-project-400"),
]
LATE = ("cancel-06-late-result", "cancel-07-late-error")
CHANGING_JOBS = [
    _post("jobs/{job}/cancel/", 200, JOB | {"status": "REVOKED"}, "cancel-03-cancel"),
    _post(TASKS, 200, {"tasks": []}, "cancel-05-tasks", body=ONE, job="cancelled"),
    _post(RESULT, 200, ACCEPTED, *LATE, body=post(ERROR_R), job="cancelled"),
    _post("jobs/{job}/retry/", 200, JOB | {"status": "STARTED"}, job="cancelled"),
]
EXCHANGES = [*POLLING, *FETCHING, *POSTING, *REGISTERING, *BROWSING, *CHANGING_JOBS]


def differences(value: Any, shape: Any, where: str = "answer") -> list[str]:
    """In which places `value` is not of that shape; empty when it is."""
    if isinstance(shape, dict) and isinstance(value, dict):
        absent = [f"{where}.{key} is missing" for key in shape.keys() - value]
        return absent + [
            d for key in shape.keys() & value for d in differences(value[key], shape[key], f"{where}.{key}")
        ]
    if isinstance(shape, list) and isinstance(value, list):
        shapes: Sequence[Any] = shape[:-1] if shape[-1:] == [...] else shape * len(value)
        amount = [f"{where} has {len(value)} entries"] if len(value) < len(shapes) or (value and not shape) else []
        pairs = enumerate(zip(value, shapes, strict=False))
        return amount + [d for n, (item, one) in pairs for d in differences(item, one, f"{where}[{n}]")]
    fits = isinstance(value, shape) if isinstance(shape, type | tuple) else value == shape
    return [] if fits else [f"{where} is {value!r}, not {shape!r}"]
