"""What is asked of Antenna and what it answers, restated as data: the table that the desk server is held to.

A shape is a type, a tuple of allowed types, a list of one shape (a list of those), or a dict from key to shape. A dict
may have more keys than its shape names. `Exactly` holds a value for the places where the wording matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOTHING = type(None)
TEXT_OR_NULL = (str, NOTHING)
NUMBER = (int, float)

DETECTOR = {"name": "Sheet detector", "key": "sheet_detector"}
CLASSIFIER = {"name": "Sheet classifier", "key": "sheet_classifier"}
SLUG = "contract_moths"
WHEN = "2026-07-01T23:15:00"


@dataclass(frozen=True, slots=True)
class Exactly:
    """The very value, where the wording is part of the contract."""

    value: Any


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer.

    Attributes:
        path: below the API's base; `{job}`, `{sync_job}`, `{project}`, `{pipeline}` and `{subject}` are filled in, also
            in `body`.
        recorded: names of the recordings that show the same answer.
        role: whose token is sent: superuser, member, outsider, wrong (a token of nobody) or none.
        body: sent as JSON; bytes are sent as they are.
        job: what was done to `{job}` before: it is fresh, drained or cancelled.
    """

    name: str
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


JOB_ROW = {"id": int, "pipeline_slug": str, "user_permissions": [str]}
TASK = {"id": str, "image_id": str, "image_url": str, "reply_subject": str}
PARAMETER = {"key": str, "name": str, "value": (int, float, str)}
STAGE = {"key": str, "name": str, "status": str, "progress": NUMBER, "params": [PARAMETER]}
JOB = {
    "id": int,
    "name": str,
    "status": str,
    "dispatch_mode": str,
    "project": {"id": int, "name": str},
    "pipeline": {"id": int, "slug": str, "name": str, "version": int},
    "source_image_collection": {"id": int, "name": str},
    "created_at": str,
    "updated_at": str,
    "started_at": TEXT_OR_NULL,
    "finished_at": TEXT_OR_NULL,
    "progress": {"summary": {"status": str, "progress": NUMBER}, "stages": [STAGE]},
    "user_permissions": [str],
}
CAPTURE = {
    "id": int,
    "url": str,
    "path": str,
    "project": int,
    "timestamp": TEXT_OR_NULL,
    "width": (int, NOTHING),
    "height": (int, NOTHING),
    "size": (int, NOTHING),
    "deployment": (dict, NOTHING),
    "event": (dict, NOTHING),
    "detections_count": int,
}
RECEIPT = {"reply_subject": str, "status": Exactly("queued"), "task_id": str}
ACCEPTED = {"status": Exactly("accepted"), "job_id": int, "results_queued": int, "tasks": [RECEIPT]}
PROBLEM = {"loc": [str], "msg": str, "type": str}
REGISTERED = {
    "timestamp": str,
    "success": Exactly(value=True),
    "error": NOTHING,
    "pipelines": [{"name": str, "slug": str, "version": int}],
    "pipelines_created": [str],
    "algorithms_created": [str],
}


def page(row: Any) -> dict[str, Any]:
    return {"count": int, "next": TEXT_OR_NULL, "previous": TEXT_OR_NULL, "results": [row], "user_permissions": [str]}


def detail(text: str) -> dict[str, Any]:
    return {"detail": Exactly(text)}


def field_error(name: str, text: str) -> dict[str, Any]:
    return {name: Exactly([text])}


def problem(*loc: str, msg: str, kind: str) -> dict[str, Any]:
    return {"loc": ["__root__", *loc], "msg": msg, "type": kind}


def missing(*loc: str) -> dict[str, Any]:
    return problem(*loc, msg="field required", kind="value_error.missing")


def classification(**changes: Any) -> dict[str, Any]:
    scores = {"scores": [0.2, 0.7, 0.1], "logits": [0.5, 2.0, -0.3]}
    return {"classification": "Moth", "algorithm": CLASSIFIER, "terminal": True, "timestamp": WHEN, **scores, **changes}


def detection(image_id: str, **changes: Any) -> dict[str, Any]:
    box = {"x1": 10.0, "y1": 12.0, "x2": 48.0, "y2": 51.0}
    made = {"algorithm": DETECTOR, "timestamp": WHEN, "classifications": [classification()]}
    return {"source_image_id": image_id, "bbox": box, **made, **changes}


def success(image_id: str, url: str = "http://images.test/a.jpg", **changes: Any) -> dict[str, Any]:
    """R of an image with one detection, as a worker posts it."""
    images = [{"id": image_id, "url": url}]
    detections = [detection(image_id)]
    return {"pipeline": SLUG, "total_time": 0.4, "source_images": images, "detections": detections, **changes}


def post(*results: Any, subject: str | None = "{subject}") -> dict[str, Any]:
    return {"results": [{"reply_subject": subject, "result": result} for result in results]}


REQUIRED = "This field is required."
NO_TOKEN = detail("Authentication credentials were not provided.")
WRONG_TOKEN = detail("Invalid token.")
FORBIDDEN = detail("You do not have permission to perform this action.")
NOT_FOUND = detail("Not found.")
ERROR_R = {"error": "image is truncated", "image_id": "1"}
POLL = f"jobs/?pipeline__slug__in={SLUG}&ids_only=1&incomplete_only=1&dispatch_mode=async_api"
TASKS = "jobs/{job}/tasks/"
RESULT = "jobs/{job}/result/"
REGISTER = "projects/{project}/pipelines/"
LABELS = {"data": [{"index": 0, "label": "Moth"}], "labels": ["Moth"], "uri": None}
PIPELINE = {
    "name": "Registered in the table",
    "slug": "registered_moths",
    "version": 1,
    "description": "",
    "algorithms": [
        {"name": "D", "key": "d", "task_type": "detection", "version": 1, "category_map": None},
        {"name": "C", "key": "c", "task_type": "classification", "version": 1, "category_map": LABELS},
    ],
    "stages": [],
}
SERVICE = {"processing_service_name": "desk", "pipelines": [PIPELINE]}


def _polling() -> list[Exchange]:
    bad_mode = field_error("dispatch_mode", "Select a valid choice. bogus is not one of the available choices.")
    moved = ("jobs-02-poll-idle-no-slash",)
    answers = page(JOB_ROW)
    return [
        Exchange("poll", "GET", POLL, 200, answers, ("jobs-07-poll-one", "jobs-09-poll-in-progress")),
        Exchange("poll with limit", "GET", POLL + "&limit=10", 200, answers, ("jobs-12-poll-two-jobs-limit",)),
        Exchange("poll as member", "GET", POLL, 200, answers, ("jobs-01-poll-idle",), role="member"),
        Exchange("poll as outsider", "GET", POLL, 200, answers, ("jobs-08-poll-outsider",), role="outsider"),
        Exchange("poll without token", "GET", POLL, 200, answers, ("jobs-03-poll-no-token",), role="none"),
        Exchange("poll with wrong token", "GET", POLL, 401, WRONG_TOKEN, ("jobs-04-poll-bad-token",), role="wrong"),
        Exchange(
            "poll other mode", "GET", POLL.replace("async_api", "bogus"), 400, bad_mode, ("jobs-06-poll-bad-dispatch",)
        ),
        Exchange("poll without slash", "GET", POLL.replace("/?", "?"), 301, Exactly(""), moved),
        Exchange("all jobs", "GET", "jobs/?incomplete_only=1", 200, page(JOB), ("jobs-13-full-list",)),
        Exchange("job", "GET", "jobs/{job}/", 200, JOB, ("job-detail-01-started", "job-detail-02-success")),
        Exchange("unknown job", "GET", "jobs/999999/", 404, NOT_FOUND),
    ]


def _fetching() -> list[Exchange]:
    integer = field_error("batch_size", "A valid integer is required.")
    small = field_error("batch_size", "Ensure this value is greater than or equal to 1.")
    null = field_error("batch_size", "This field may not be null.")
    absent = field_error("batch_size", REQUIRED)
    bodies: list[tuple[str, Any, dict[str, Any], str]] = [
        ("zero", 0, small, "tasks-bad-zero"),
        ("negative", -3, small, "tasks-bad-negative"),
        ("fraction", 2.5, integer, "tasks-bad-float"),
        ("text", "many", integer, "tasks-bad-string"),
        ("null", None, null, "tasks-bad-null"),
    ]
    one = {"batch_size": 1}
    broken = detail("JSON parse error - Expecting ',' delimiter: line 1 column 17 (char 16)")
    media = detail('Unsupported media type "text/plain" in request.')
    not_get = detail('Method "GET" not allowed.')
    tasks = {"tasks": [TASK]}
    return [
        Exchange("fetch", "POST", TASKS, 200, tasks, ("tasks-01-two", "ttr-03-tasks-redelivered"), body=one),
        Exchange("fetch very many", "POST", TASKS, 200, tasks, ("tasks-huge",), body={"batch_size": 100_000}),
        Exchange(
            "fetch drained", "POST", TASKS, 200, {"tasks": Exactly([])}, ("tasks-03-drained",), body=one, job="drained"
        ),
        *(
            Exchange(f"fetch {name}", "POST", TASKS, 400, answer, (recording,), body={"batch_size": value})
            for name, value, answer, recording in bodies
        ),
        Exchange("fetch missing", "POST", TASKS, 400, absent, ("tasks-bad-missing",), body={}),
        Exchange("fetch by old key", "POST", TASKS, 400, absent, ("tasks-bad-legacy-batch-key",), body={"batch": 2}),
        Exchange("fetch broken JSON", "POST", TASKS, 400, broken, ("tasks-bad-json",), body=b'{"batch_size": 1'),
        Exchange(
            "fetch plain text",
            "POST",
            TASKS,
            415,
            media,
            ("tasks-bad-content-type",),
            body=b"1",
            content_type="text/plain",
        ),
        Exchange("fetch of sync job", "POST", "jobs/{sync_job}/tasks/", 400, [str], body=one),
        Exchange("fetch unknown job", "POST", "jobs/999999/tasks/", 404, NOT_FOUND, ("tasks-unknown-job",), body=one),
        Exchange("fetch job by name", "POST", "jobs/abc/tasks/", 404, NOT_FOUND, ("tasks-nonint-job",), body=one),
        Exchange("fetch by GET", "GET", TASKS, 405, not_get, ("tasks-get-405", "tasks-no-slash-followed-as-get")),
        Exchange("fetch without slash", "POST", TASKS[:-1], 301, Exactly(""), ("tasks-no-slash",), body=one),
        *_who_may("fetch", TASKS, "tasks", one),
    ]


def _who_may(what: str, path: str, recording: str, body: Any) -> list[Exchange]:
    def ask(role: str, status: int, answer: Any, suffix: str, scheme: str = "Token") -> Exchange:
        names = (f"perm-{recording}-{suffix}",) if suffix else ()
        return Exchange(f"{what} as {role} ({scheme})", "POST", path, status, answer, names, role, body, scheme=scheme)

    return [
        ask("none", 401, NO_TOKEN, "noauth"),
        ask("wrong", 401, WRONG_TOKEN, "badtoken"),
        ask("member", 403, FORBIDDEN, "worker"),
        ask("outsider", 403, FORBIDDEN, "outsider"),
        ask("superuser", 401, NO_TOKEN, "bearer-scheme" if recording == "tasks" else "", scheme="Bearer"),
    ]


def _posting() -> list[Exchange]:
    listed = field_error("non_field_errors", "Invalid data. Expected a dictionary, but got list.")
    null_subject = problem("0", "reply_subject", msg="none is not an allowed value", kind="type_error.none.not_allowed")
    no_list = problem("1", "result", "source_images", msg="value is not a valid list", kind="type_error.list")
    neither = [missing("1", "result", "total_time"), no_list]
    neither += [missing("1", "result", "detections"), missing("1", "result", "error")]
    no_subject = {"results": [{"result": success("1")}]}
    nan = detail("JSON parse error - Out of range float values are not JSON compliant: 'NaN'")
    half = {"pipeline": SLUG, "source_images": "nope"}
    not_get = detail('Method "GET" not allowed.')
    none_queued = {**ACCEPTED, "results_queued": Exactly(0), "tasks": Exactly([])}

    def refused(*problems: dict[str, Any]) -> dict[str, Any]:
        return {"results": Exactly(list(problems))}

    return [
        Exchange("post nothing", "POST", RESULT, 200, none_queued, ("result-empty-list",), body={"results": []}),
        Exchange("post success", "POST", RESULT, 200, ACCEPTED, ("result-01-two-success",), body=post(success("1"))),
        Exchange("post error", "POST", RESULT, 200, ACCEPTED, ("result-02-error",), body=post(ERROR_R)),
        Exchange("post null box", "POST", RESULT, 200, ACCEPTED, ("payload-01-bbox-null",), body=post(_no_box())),
        Exchange("post list", "POST", RESULT, 400, listed, ("result-bare-list",), body=[]),
        Exchange(
            "post no key", "POST", RESULT, 400, field_error("results", REQUIRED), ("result-missing-key",), body={}
        ),
        Exchange(
            "post null subject",
            "POST",
            RESULT,
            400,
            refused(null_subject),
            ("result-null-reply-subject",),
            body=post(ERROR_R, subject=None),
        ),
        Exchange(
            "post no subject",
            "POST",
            RESULT,
            400,
            refused(missing("0", "reply_subject")),
            ("payload-11-no-reply-subject-key",),
            body=no_subject,
        ),
        Exchange(
            "post one of two invalid",
            "POST",
            RESULT,
            400,
            refused(*neither),
            ("result-mixed-one-invalid",),
            body=post(success("1"), half),
        ),
        Exchange("post NaN", "POST", RESULT, 400, nan, ("payload-16-nan-score",), body=b'{"results": [NaN]}'),
        Exchange(
            "post to unknown job",
            "POST",
            "jobs/999999/result/",
            404,
            NOT_FOUND,
            ("result-unknown-job",),
            body={"results": []},
        ),
        Exchange("result by GET", "GET", RESULT, 405, not_get, ("result-get-405",)),
        Exchange(
            "post without slash", "POST", RESULT[:-1], 301, Exactly(""), ("result-no-slash",), body={"results": []}
        ),
        *_who_may("post", RESULT, "result", {"results": []}),
    ]


def _no_box() -> dict[str, Any]:
    return success("1", detections=[detection("1", bbox=None)])


def _registering() -> list[Exchange]:
    no_slug = {"processing_service_name": "desk", "pipelines": [{"name": "no slug"}]}
    problems = {"pipelines": Exactly([missing("0", "slug"), missing("0", "version")])}
    no_name = field_error("processing_service_name", REQUIRED)
    nameless = {"pipelines": [PIPELINE]}
    empty = {"processing_service_name": "desk", "pipelines": []}

    def ask(name: str, status: int, answer: Any, recording: str, body: Any = SERVICE, role: str = "member") -> Exchange:
        return Exchange(f"register {name}", "POST", REGISTER, status, answer, (recording,), role, body)

    unknown = "projects/999999/pipelines/"
    return [
        ask("first", 201, REGISTERED, "register-01-first"),
        ask("again", 201, REGISTERED, "register-02-again"),
        ask("nothing", 201, REGISTERED, "register-03-empty-pipelines", empty),
        ask("nameless", 400, no_name, "register-04-missing-name", nameless),
        ask("incomplete", 400, problems, "register-05-bad-pipelines", no_slug),
        ask("as outsider", 403, FORBIDDEN, "register-06-outsider", role="outsider"),
        ask("without token", 401, NO_TOKEN, "register-07-no-token", role="none"),
        Exchange(
            "register for unknown project",
            "POST",
            unknown,
            404,
            NOT_FOUND,
            ("register-08-unknown-project",),
            "member",
            SERVICE,
        ),
        Exchange(
            "register without slash",
            "POST",
            REGISTER[:-1],
            301,
            Exactly(""),
            ("register-09-no-trailing-slash",),
            "member",
            SERVICE,
        ),
    ]


def _browsing() -> list[Exchange]:
    project = {"id": int, "name": str, "draft": bool, "description": str, "user_permissions": [str]}
    collection = {"id": int, "name": str, "project": int, "source_images_count": int}
    no_project = field_error("project_id", REQUIRED)
    captures = "captures/?project_id={project}&limit=2"
    collections = "captures/collections/?project_id={project}&limit=2"
    pipeline = {"id": int, "slug": str, "name": str, "description": str, "algorithms": [{"name": str, "key": str}]}
    names = ("captures-01-collection-worker", "captures-02-project-admin", "captures-05-noauth", "captures-15-page2")
    return [
        Exchange("projects", "GET", "projects/", 200, page(project), ("projects-01-list-worker",)),
        Exchange(
            "projects without token", "GET", "projects/", 200, page(project), ("projects-03-list-noauth",), "none"
        ),
        Exchange(
            "projects, wrong token", "GET", "projects/", 401, WRONG_TOKEN, ("projects-04-list-badtoken",), "wrong"
        ),
        Exchange("captures", "GET", captures, 200, page(CAPTURE), names),
        Exchange(
            "captures without project", "GET", "captures/?limit=1", 400, no_project, ("captures-03-no-project-400",)
        ),
        Exchange("collections", "GET", collections, 200, page(collection), ("collections-01-list",)),
        Exchange(
            "pipelines", "GET", REGISTER, 200, {"count": int, "results": [pipeline]}, ("pipelines-01-project-list",)
        ),
    ]


def _changing_jobs() -> list[Exchange]:
    create = {"name": "made in the table", "project_id": "{project}", "pipeline_id": "{pipeline}", "delay": 0}
    start = "jobs/?start_now=1"
    pending = {**JOB, "source_image_collection": (dict, NOTHING), "status": Exactly("PENDING")}
    revoked = {**JOB, "status": Exactly("REVOKED"), "finished_at": str}
    recorded = ("create-job-happy", "natsdown-04-create-job")
    late = ("cancel-06-late-result", "cancel-07-late-error")
    none, one = {"tasks": Exactly([])}, {"batch_size": 1}
    return [
        Exchange("create", "POST", start, 201, pending, recorded, body=create),
        Exchange("create as outsider", "POST", start, 403, FORBIDDEN, ("create-00-no-start",), "outsider", create),
        Exchange("cancel", "POST", "jobs/{job}/cancel/", 200, revoked, ("cancel-03-cancel",)),
        Exchange("fetch cancelled", "POST", TASKS, 200, none, ("cancel-05-tasks",), body=one, job="cancelled"),
        Exchange("post cancelled", "POST", RESULT, 200, ACCEPTED, late, body=post(ERROR_R), job="cancelled"),
        Exchange("retry", "POST", "jobs/{job}/retry/", 200, JOB, job="cancelled"),
    ]


EXCHANGES = [
    *_polling(),
    *_fetching(),
    *_posting(),
    *_registering(),
    *_browsing(),
    *_changing_jobs(),
]


def differences(value: Any, shape: Any, where: str = "answer") -> list[str]:
    """In which places `value` is not of that shape; empty when it is."""
    if isinstance(shape, Exactly):
        return [] if value == shape.value else [f"{where} is {value!r}, not {shape.value!r}"]
    if isinstance(shape, dict) and isinstance(value, dict):
        absent = [f"{where}.{key} is missing" for key in shape if key not in value]
        return absent + [
            d for key in shape.keys() & value for d in differences(value[key], shape[key], f"{where}.{key}")
        ]
    if isinstance(shape, list) and isinstance(value, list):
        return [d for index, item in enumerate(value) for d in differences(item, shape[0], f"{where}[{index}]")]
    kinds = shape if isinstance(shape, type | tuple) else type(shape)
    return [] if isinstance(value, kinds) else [f"{where} is {type(value).__name__}, not {kinds}"]
