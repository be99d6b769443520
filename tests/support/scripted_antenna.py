"""An Antenna in memory that a test scripts: it keeps streams, deliveries and results, and its answers may be lies.

A lie is drawn before the requests it meets: the server does what was asked, or not, and the client sees what a proxy,
a sign-in portal, another service or a broken connection makes of the answer. What the server truly did is known here,
so that a test can ask what became of each image.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.readings import reading_of

MAX_DELIVER = 2
FIRST_STREAM_NS = 1_760_000_000_000_000_000
STREAM_AGE_NS = 3_600_000_000_000
FINAL = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
SLUG = "scripted"
_JSON = "application/json"
_HTML = "text/html; charset=utf-8"

PORTAL = b"<!DOCTYPE html><html><body><h1>Sign in to continue</h1></body></html>"
DEBUG_PAGE = b"<!DOCTYPE html><html><head><title>KeyError at /api/v2/jobs/</title></head><body>Traceback</body></html>"
# What stands in for the body of an answer. `true`: what the server answered. `half`: the first half of its bytes.
# `other_job`: the true answer in form, about another job. `other_subjects`: the true answer in form, naming others.
BODIES = (
    "true", "half", "portal", "debug_page", "empty", "null", "list", "object", "text", "other_service", "gateway",
    "problem", "detail", "validation", "other_job", "other_subjects",
)  # fmt: skip
_FOREIGN = {
    "portal": PORTAL,
    "debug_page": DEBUG_PAGE,
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "text": b'"accepted"',
    "other_service": b'{"status": "ok", "data": [], "tasks": null, "results": []}',
    "gateway": b'{"message": "no Route matched with those values"}',
    "problem": b'{"type": "about:blank", "title": "Bad Request", "status": 400}',
    "detail": b'{"detail": "Not found."}',
    "validation": b'{"results": [{"loc": ["__root__", "0", "result"], "msg": "field required", "type": "missing"}]}',
}
STATUSES = (
    200, 201, 202, 204, 206, 301, 302, 307, 400, 401, 403, 404, 405, 408, 409, 413, 422, 429, 500, 502, 503, 504,
)  # fmt: skip
CONTENT_TYPES = (_JSON, _HTML, "text/plain", "")
BROKEN = ("", "timeout", "reset", "cut")


@dataclass(frozen=True, slots=True)
class Lie:
    """What one request meets in place of an honest server.

    Attributes:
        acts: whether the server does what it is asked, before the answer is replaced.
        broken: how the connection breaks in place of an answer; "" when an answer comes.
    """

    acts: bool
    status: int = 200
    body: str = "portal"
    content_type: str = _HTML
    broken: str = ""

    @property
    def is_antennas_own(self) -> bool:
        """Whether nobody could tell the answer from a refusal of Antenna's own: what follows from it is excused.

        A type of content is what proxies change most easily: the words decide.
        """
        own_refusals = {(404, "detail"), (400, "validation"), (400, "detail")}
        return not self.broken and (self.status, self.body) in own_refusals


@dataclass(slots=True)
class Message:
    """One task in a stream."""

    image: int
    deliveries: int = 0
    subject: str = ""  # of its last delivery
    is_outstanding: bool = False
    is_acknowledged: bool = False


@dataclass(slots=True)
class ScriptedJob:
    """A job, its stream, and what is saved of it. `restarts` counts the streams before this one."""

    id: int
    images: list[int]
    status: str = "STARTED"
    restarts: int = 0
    messages: list[Message] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)  # by image: what its result says of its pixels
    failed: dict[int, str] = field(default_factory=dict)  # by image: the text of its error
    answers_lost: set[int] = field(default_factory=set)  # images of deliveries that never reached the worker
    excused: set[int] = field(default_factory=set)  # images whose result Antenna itself seemed to refuse
    consumer_seq: int = 0

    @property
    def is_live(self) -> bool:
        return self.status not in FINAL

    @property
    def published_ns(self) -> int:
        return FIRST_STREAM_NS + self.restarts * STREAM_AGE_NS

    @property
    def without_outcome(self) -> list[int]:
        return [image for image in self.images if image not in self.saved and image not in self.failed]

    def publish(self) -> None:
        self.messages = [Message(image) for image in self.images]
        self.consumer_seq = 0

    def deliver(self, place: int) -> Message:
        """Hand out the message at `place` once more, under a subject of its own."""
        message = self.messages[place]
        message.deliveries += 1
        message.is_outstanding = True
        self.consumer_seq += 1
        pending = sum(1 for one in self.messages if one.deliveries == 0)
        published_ns = self.published_ns + place
        message.subject = (
            f"$JS.ACK.job_{self.id}.job-{self.id}-consumer"
            f".{message.deliveries}.{place + 1}.{self.consumer_seq}.{published_ns}.{pending}"
        )
        return message

    def message_for(self, image: int) -> Message | None:
        return next((message for message in self.messages if message.image == image), None)

    def message_of(self, subject: str) -> Message | None:
        """Return the message that a subject acknowledges now, whichever stream the subject comes from."""
        found = re.fullmatch(rf"\$JS\.ACK\.job_{self.id}\.job-{self.id}-consumer\.\d+\.(\d+)\.\d+\.\d+\.\d+", subject)
        place = int(found[1]) - 1 if found else -1
        return self.messages[place] if 0 <= place < len(self.messages) else None


class ScriptedAntenna:
    """Serves jobs to `AntennaClient`s through their transports; safe to use from several threads.

    Attributes:
        lies: what the next requests meet, by route: "jobs", "job", "tasks", "result".
        truth: what a right result of an image says of its pixels; none where no result of it can be right.
        may_fail: whether an error of an image has its evidence; asked with the image, the text, and the delivery's
            number.
        violations: what must never happen, in words.
    """

    def __init__(
        self, truth: Callable[[int], int | None], may_fail: Callable[[int, str, int], bool], url: Callable[[int], str]
    ) -> None:
        self.jobs: dict[int, ScriptedJob] = {}
        self.lies: defaultdict[str, deque[Lie]] = defaultdict(deque)
        self.violations: list[str] = []
        self.requests: Counter[str] = Counter()
        self.lock = threading.RLock()
        self._truth = truth
        self._may_fail = may_fail
        self._url = url
        self._last_fetch: list[tuple[int, Message]] = []  # with its job, each task of the last answer to a fetch

    def add_job(self, job_id: int, images: Sequence[int]) -> None:
        job = ScriptedJob(job_id, list(images))
        job.publish()
        self.jobs[job_id] = job

    def end_leases(self, job_id: int, places: Iterable[int]) -> None:
        """End the leases of outstanding messages: the next fetch brings them again, unless that was the last."""
        with self.lock:
            messages = self.jobs[job_id].messages
            for place in places:
                if place < len(messages):
                    messages[place].is_outstanding = False

    def cancel(self, job_id: int) -> None:
        with self.lock:
            job = self.jobs[job_id]
            if job.is_live:
                job.status = "REVOKED"
                job.messages = []

    def retry(self, job_id: int) -> None:
        """Start a job anew: a stream of the old name, its images in another order, everything published later."""
        with self.lock:
            job = self.jobs[job_id]
            job.restarts += 1
            job.images = job.images[1:] + job.images[:1]
            for kept in (job.saved, job.failed, job.answers_lost, job.excused):
                kept.clear()
            job.status = "STARTED"
            job.publish()

    @staticmethod
    def restarts_of(subject: str) -> int:
        """Return which of its job's streams a subject is of, counted from 0."""
        published_ns = int(subject.split(".")[-2])
        return (published_ns - FIRST_STREAM_NS) // STREAM_AGE_NS

    def tell_the_truth(self) -> None:
        """Answer honestly from now on."""
        with self.lock:
            self.lies.clear()

    def note_crash(self, subjects_on_record: Sequence[str]) -> None:
        """The worker died: tasks of the last fetch that it has no record of went with the answer."""
        with self.lock:
            for job_id, message in self._last_fetch:
                if message.subject not in subjects_on_record:
                    self.jobs[job_id].answers_lost.add(message.image)

    def transport(self, is_connected: Callable[[], bool]) -> httpx.MockTransport:
        """Return a transport for one client; nothing reaches the server once it is not connected any more."""

        def handle(request: httpx.Request) -> httpx.Response:
            with self.lock:
                if not is_connected():
                    raise httpx.ConnectError("the process is gone", request=request)
                return self._serve(request)

        return httpx.MockTransport(handle)

    def _serve(self, request: httpx.Request) -> httpx.Response:
        words = request.url.path.strip("/").split("/")
        route = words[-1] if words[-1] in {"tasks", "result", "jobs"} else "job"
        named = words[-1] if route == "job" else words[-2]
        job = next(iter(self.jobs.values())) if route == "jobs" else self.jobs[int(named)]
        body = json.loads(request.content) if request.content else {}
        self.requests[route] += 1
        lie = self.lies[route].popleft() if self.lies[route] else None
        if lie is None:
            return httpx.Response(200, json=self._act(route, job, body), request=request)
        true_answer = self._act(route, job, body) if lie.acts else {}
        self._excuse(lie, route, job, body, true_answer)
        return self._tell(lie, route, job, body, true_answer, request)

    def _act(self, route: str, job: ScriptedJob, body: dict[str, Any]) -> dict[str, Any]:
        if route == "jobs":
            return self._list()
        if route == "tasks":
            return self._hand_out(job, int(body["batch_size"]))
        if route == "result":
            return self._take_results(job, body["results"])
        return _detail(job)

    def _list(self) -> dict[str, Any]:
        rows = [{"id": job.id, "pipeline_slug": SLUG} for job in self.jobs.values() if job.is_live]
        return {"count": len(rows), "next": None, "previous": None, "results": rows}

    def _hand_out(self, job: ScriptedJob, count: int) -> dict[str, Any]:
        tasks: list[dict[str, str]] = []
        self._last_fetch = []
        for place, message in enumerate(job.messages if job.is_live else []):
            is_free = not message.is_outstanding and not message.is_acknowledged and message.deliveries < MAX_DELIVER
            if not is_free or len(tasks) == count:
                continue
            job.deliver(place)
            image_id = str(message.image)
            tasks.append(
                {
                    "id": image_id,
                    "image_id": image_id,
                    "image_url": self._url(message.image),
                    "reply_subject": message.subject,
                }
            )
            self._last_fetch.append((job.id, message))
        return {"tasks": tasks}

    def _take_results(self, job: ScriptedJob, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for entry in entries:
            if job.is_live:
                self._save(job, entry["reply_subject"], entry["result"])
        return _accepted(job.id, [entry["reply_subject"] for entry in entries])

    def _save(self, job: ScriptedJob, subject: str, result: dict[str, Any]) -> None:
        is_error = "error" in result
        image = int(result["image_id"] if is_error else result["source_images"][0]["id"])
        message = job.message_of(subject)
        if image not in job.images:
            self.violations.append(f"job {job.id}: a result of image {image}, which is not of this job")
            return
        if message is not None and message.image != image:
            self.violations.append(
                f"job {job.id}: a result of image {image} acknowledges image {message.image} by {subject}"
            )
        if is_error:
            self._save_error(job, subject, image, result["error"])
        else:
            self._save_success(job, image, result["detections"])
        if message is not None:
            message.is_acknowledged = True
        if not job.without_outcome:
            is_failure = len(job.failed.keys() - job.saved) > len(job.images) / 2
            job.status = "FAILURE" if is_failure else "SUCCESS"

    def _save_error(self, job: ScriptedJob, subject: str, image: int, text: str) -> None:
        delivery = int(subject.split(".")[4])
        if image not in job.excused and not self._may_fail(image, text, delivery):
            self.violations.append(f"job {job.id}: image {image} is blamed without evidence: {text}")
        job.failed.setdefault(image, text)

    def _save_success(self, job: ScriptedJob, image: int, detections: Sequence[dict[str, Any]]) -> None:
        said = reading_of(detections)
        right = self._truth(image)
        if said != right:
            self.violations.append(f"job {job.id}: the result of image {image} says {said}, its pixels say {right}")
        job.saved.setdefault(image, said)

    def _excuse(
        self, lie: Lie, route: str, job: ScriptedJob, body: dict[str, Any], true_answer: dict[str, Any]
    ) -> None:
        """Note what no worker could have known better."""
        if route == "tasks":
            job.answers_lost.update(int(task["image_id"]) for task in true_answer.get("tasks", []))
        if lie.is_antennas_own and route == "job":
            job.excused.update(job.images)
        if lie.is_antennas_own and route == "result":
            job.excused.update(_image_of(entry["result"]) for entry in body["results"])

    def _tell(
        self,
        lie: Lie,
        route: str,
        job: ScriptedJob,
        body: dict[str, Any],
        true_answer: dict[str, Any],
        request: httpx.Request,
    ) -> httpx.Response:
        if lie.broken == "timeout":
            raise httpx.ReadTimeout("no answer", request=request)
        if lie.broken == "reset":
            raise httpx.ReadError("connection reset by peer", request=request)
        if lie.broken == "cut":
            raise httpx.RemoteProtocolError("peer closed connection without sending complete body", request=request)
        # A lie never claims in Antenna's form what the server did not do: nobody could tell such a lie from the truth.
        content = json.dumps(true_answer if lie.acts else {}).encode()
        if lie.body == "half":
            content = content[: len(content) // 2]
        elif lie.body in {"other_job", "other_subjects"}:
            content = json.dumps(_about_others(lie.body, route, job, body)).encode()
        elif lie.body != "true":
            content = _FOREIGN[lie.body]
        headers = {"content-type": lie.content_type} if lie.content_type else {}
        if lie.status in {301, 302, 307}:
            headers["location"] = "https://portal.test/sign-in?next=/"
        return httpx.Response(lie.status, content=content, headers=headers, request=request)


def _image_of(result: dict[str, Any]) -> int:
    return int(result["image_id"] if "error" in result else result["source_images"][0]["id"])


def _accepted(job_id: int, subjects: Sequence[str]) -> dict[str, Any]:
    receipts = [
        {"reply_subject": subject, "status": "queued", "task_id": f"t{n}"} for n, subject in enumerate(subjects)
    ]
    return {"status": "accepted", "job_id": job_id, "results_queued": len(receipts), "tasks": receipts}


def _detail(job: ScriptedJob) -> dict[str, Any]:
    stages = [
        {"key": "collect", "params": [{"key": "total_images", "value": len(job.images)}]},
        {"key": "process", "params": [{"key": "failed", "value": len(job.failed)}]},
        {"key": "results", "params": [{"key": "captures", "value": len(job.saved)}]},
    ]
    return {
        "id": job.id,
        "status": job.status,
        "created_at": "2026-07-01T20:00:00",
        "started_at": f"2026-07-02T{job.restarts:02d}:00:00",
        "dispatch_mode": "async_api",
        "pipeline": {"slug": SLUG},
        "project": {"id": 1},
        "source_image_collection": {"id": 1},
        "progress": {"stages": stages},
    }


def _about_others(kind: str, route: str, job: ScriptedJob, body: dict[str, Any]) -> dict[str, Any]:
    """Return an answer in Antenna's form that is about something else, as a mixed-up proxy would give."""
    other_id = job.id + 1000
    if route == "jobs":
        rows = [{"id": other_id, "pipeline_slug": "other"}]
        return {"count": 1, "next": None, "previous": None, "results": rows}
    if route == "job":
        return _detail(ScriptedJob(other_id, [], status="REVOKED"))
    if route == "result":
        subjects = [
            f"$JS.ACK.job_{other_id}.job-{other_id}-consumer.1.{n}.{n}.1.0" for n in range(len(body["results"]))
        ]
        return _accepted(other_id if kind == "other_job" else job.id, subjects)
    subject = f"$JS.ACK.job_{other_id}.job-{other_id}-consumer.1.1.1.1.0"
    url = "https://images.test/other.jpg"
    return {"tasks": [{"id": "999", "image_id": "999", "image_url": url, "reply_subject": subject}]}
