"""Whose answer it is: Antenna's own, in a form that its contract gives, or that of something in Antenna's place.

A status code proves nothing by itself: proxies, sign-in pages and maintenance answer with any of them. Recognises
answers by their content, which is JSON whatever the header says; what an accepted answer means is read in `wire`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from adc_worker.antenna import wire
from adc_worker.errors import (
    AntennaBodyTooLarge,
    AntennaError,
    AntennaRefused,
    AntennaRejected,
    AntennaUnavailable,
    NotAntenna,
)

# A thousand tasks, which is all that may be outstanding, with signed URLs of 2 kB are 2 MB; a registration that comes
# back with the labels of all pipelines is the largest.
ANSWER_MAX_BYTES = 16_000_000
ANSWER_MAX_S = 120.0  # from the first byte of an answer to the last; chosen
IDENTITY = {"Accept-Encoding": "identity"}  # compressed, a small answer could fill the memory
_RETRY_STATUS = frozenset({408, 425, 429})
_PERMANENT_REDIRECTS = frozenset({301, 308})
_SHOWN_CHARACTERS = 300
_SHOWN_OF_A_PAGE = 80
# What Django REST framework says of an unknown row. Other frameworks' words differ: theirs are another server's.
_UNKNOWN = re.compile(r"Not found\.|No \w+ matches the given query\.")
_NOT_FINITE = re.compile(r"JSON parse error - Out of range float values")
# Antenna's challenge is `Token`. These are of a proxy or a sign-in in front of it.
_OTHER_CHALLENGES = ("basic", "digest", "negotiate", "ntlm")
_IN_THE_WAY = "a proxy, a sign-in page or maintenance is in the way, or AMI_ANTENNA_API_BASE_URL is wrong"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that came over HTTP.

    Attributes:
        request: what was asked, as "GET /jobs/".
        url: where, without a query.
        body: all of it; what came of it where `complaint` says why it was not read to its end.
    """

    request: str
    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    complaint: str = ""

    @property
    def is_success(self) -> bool:
        return httpx.codes.is_success(self.status)


def receive(response: httpx.Response, request: str) -> Answer:
    """Read an answer as it comes, up to a bound in bytes and in time; raises httpx.HTTPError where it breaks off."""
    url = str(response.request.url.copy_with(query=None))
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        complaint = f"it is compressed with {encoding[:20]}, which was not asked for"
        return Answer(request, url, response.status_code, response.headers, b"", complaint)
    complaint = ""
    parts: list[bytes] = []
    size_bytes = 0
    deadline = time.monotonic() + ANSWER_MAX_S
    for part in response.iter_bytes():
        parts.append(part)
        size_bytes += len(part)
        if size_bytes > ANSWER_MAX_BYTES:
            complaint = f"it is longer than {ANSWER_MAX_BYTES} bytes"
            break
        if time.monotonic() > deadline:
            complaint = f"it did not end within {ANSWER_MAX_S:.0f} s"
            break
    body = b"" if complaint else b"".join(parts)
    return Answer(request, url, response.status_code, response.headers, body, complaint)


def not_antenna(answer: Answer, problem: str = "") -> NotAntenna:
    """Return the error that says what came in place of an answer of Antenna's."""
    kind = answer.headers.get("content-type", "").partition(";")[0] or "no content type"
    problem = answer.complaint or problem
    because = f", {problem}" if problem else ""
    return NotAntenna(
        f"what answers at {answer.url} is not Antenna: {answer.request} answered {answer.status} with {kind}"
        f"{_start_of_page(answer.body)}{because}; {_IN_THE_WAY}",
        _moved_to(answer),
    )


def error_for(answer: Answer) -> AntennaError:
    """Return what an answer that is no success means, as far as it is Antenna's."""
    status = answer.status
    message = f"{answer.request} answered {status}: {_shown(answer)}"
    if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
        return AntennaBodyTooLarge(message)
    if status >= httpx.codes.INTERNAL_SERVER_ERROR or status in _RETRY_STATUS:
        return AntennaUnavailable(message)
    document = _document(answer)
    if status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
        is_own = _detail(document) is not None and not _has_other_challenge(answer)
        return AntennaRefused(message, status) if is_own else not_antenna(answer)
    if not _is_own_rejection(status, document):
        return not_antenna(answer)
    entries = refused_entries(document)
    not_finite = _NOT_FINITE.match(_detail(document) or "") is not None
    return AntennaRejected(message, status, entries, blames_result=not_finite)


def refused_entries(document: Any) -> frozenset[int]:
    """Return the places of the results that a 400 to a post names, by the `loc` of each problem."""
    problems = document.get("results") if isinstance(document, dict) else None
    if not isinstance(problems, list):
        return frozenset()
    places = (_place(problem) for problem in problems)
    return frozenset(place for place in places if place is not None)


def _place(problem: Any) -> int | None:
    location = problem.get("loc") if isinstance(problem, dict) else None
    if not isinstance(location, list):
        return None
    inside = [str(step) for step in location if step not in {"__root__", "results"}]
    first = inside[0] if inside else ""
    return int(first) if first.isascii() and first.isdigit() else None


def _is_own_rejection(status: int, document: Any) -> bool:
    """Whether it is one of the forms in which Antenna calls a request wrong."""
    detail = _detail(document)
    if status == httpx.codes.NOT_FOUND:
        return detail is not None and _UNKNOWN.fullmatch(detail) is not None
    if status == httpx.codes.BAD_REQUEST:
        return detail is not None or _is_validation(document)
    return status in {httpx.codes.METHOD_NOT_ALLOWED, httpx.codes.UNSUPPORTED_MEDIA_TYPE} and detail is not None


def _detail(document: Any) -> str | None:
    """Return the words of `{"detail": "…"}`, as Django REST framework refuses a request."""
    detail = document.get("detail") if isinstance(document, dict) else None
    return detail if isinstance(detail, str) else None


def _is_validation(document: Any) -> bool:
    """Whether it lists problems: by field, or of the request as a whole."""
    if isinstance(document, list):
        return bool(document) and all(isinstance(problem, str) for problem in document)
    if not isinstance(document, dict) or not document:
        return False
    return all(isinstance(problems, list) and problems for problems in document.values())


def _has_other_challenge(answer: Answer) -> bool:
    challenge = answer.headers.get("www-authenticate", "").lower()
    return challenge.startswith(_OTHER_CHALLENGES)


def _document(answer: Answer) -> Any:
    """Return the JSON of an answer; None where it is none."""
    try:
        return wire.load_json(answer.body)
    except ValueError:
        return None


def _moved_to(answer: Answer) -> str:
    """Return the address that a permanent redirect gives for the same path, such as with https; else nothing."""
    location = answer.headers.get("location", "")
    if answer.status not in _PERMANENT_REDIRECTS or not location:
        return ""
    try:
        asked = urlsplit(answer.url)
        target = urlsplit(urljoin(answer.url, location))
    except ValueError:
        return ""
    elsewhere = (asked.scheme, asked.netloc) != (target.scheme, target.netloc)
    return target._replace(query="", fragment="").geturl() if elsewhere and asked.path == target.path else ""


def _start_of_page(body: bytes) -> str:
    """Quote where a page begins. Nothing else of a foreign answer is quoted: it may hold half a signed URL."""
    text = " ".join(body[: 4 * _SHOWN_OF_A_PAGE].decode(errors="replace").split())
    return f" ({text[:_SHOWN_OF_A_PAGE]!r})" if text.startswith("<") else ""


def _shown(answer: Answer) -> str:
    document = _document(answer)
    if document is None:
        return answer.complaint or answer.body[:_SHOWN_CHARACTERS].decode(errors="replace")
    return str(_detail(document) or document)[:_SHOWN_CHARACTERS]
