"""Removes secrets from text that leaves the process: tokens, passwords in URLs, everything after a URL's question mark.

A URL that is known is parsed: `public_url` is what of it may be shown, and inside `knowing(url)` every spelling of the
rest is cut out of a text. Texts of others, which may quote URLs that nobody here knows, are searched for what looks
like one; there it is better to cut too much.

Apart from log.py so that decode processes, which never log, need not import structlog.
"""

from __future__ import annotations

import html
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import quote, unquote

# Each of these patterns takes a time that grows with the text, not with its square: a text of others may be long.
# Also without scheme and host: urllib3 logs bare paths. A fragment may stand before what looks like a query. What
# closes a quotation stays; a quotation mark in the middle belongs to the query. Behind a space in a path there may be
# no slash, but then there is an equals sign.
_END_OF_QUERY = r"""(?=[]"'<>(){},.;:\[]{0,8}(?:\s|$))"""
_URL_QUERY = re.compile(rf"(/[^\s?/]*)\?\S*?{_END_OF_QUERY}|(?<=[^\s?])\?[^\s?=]*=\S*?{_END_OF_QUERY}")
# Up to the last @ before the path; a password may hold a slash, where what follows the colon is no port.
_USERINFO = re.compile(r"(\w://)(?:[^\s/?#]*|[^\s/:?#]{0,256}:(?!\d{1,5}(?:[/?#\s]|$))[^\s?#]{0,256})@")
_TOKEN = re.compile(r"\b(Token|Bearer)\s+\S+", re.IGNORECASE)
# What signs a URL, behind a space that is in its query, or in a query that was cut out of its URL.
_SIGNED = re.compile(
    r"((?:sig|signature|credential|security-token|access[_-]?token|auth[_-]?token|secret|password)=)[^\s&]+",
    re.IGNORECASE,
)
_SHORTEST_BYTES = 8  # hiding a shorter one everywhere would cut holes into ordinary words
_SHORTEST_OF_URL_BYTES = 4  # and beside the URL that it is of
_URL_RESERVED = "!#$%&'()*+,/:;=?@[]~"
_QUERY_STARTS = re.compile(r"[?#]|%(?:25)*3f", re.IGNORECASE)  # also percent-encoded, by somebody's mistake
_BEFORE_AUTHORITY = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:)?[/\\]*", re.IGNORECASE)
_PORT_AT_END = re.compile(r":\d*$")
_REDACTED = "<redacted>"
_hidden: set[str] = set()
_this_thread = threading.local()  # its known URLs


def hide(secret: str) -> None:
    """Cut `secret` out of every text from now on, whatever stands around it."""
    if len(secret) >= _SHORTEST_BYTES:
        _hidden.add(secret)


@contextmanager
def knowing(*urls: str) -> Iterator[list[str]]:
    """Cut what these URLs have beside their public form out of every text that this thread redacts in the body.

    More of them can be added to the list, as redirects lead to them.
    """
    before: list[str] = getattr(_this_thread, "urls", [])
    known = [*before, *urls]
    _this_thread.urls = known
    try:
        yield known
    finally:
        _this_thread.urls = before


def redact(text: str) -> str:
    """Cut URL queries (presigned URLs sign there), passwords and authorization values out of `text`."""
    for url in getattr(_this_thread, "urls", ()):
        for spelling, shown in _spellings_of_url(url):
            text = text.replace(spelling, shown)
    for secret in _hidden:
        text = text.replace(secret, _REDACTED)
    text = _URL_QUERY.sub(lambda found: f"{found[1] or ''}?{_REDACTED}", text)
    text = _USERINFO.sub(rf"\1{_REDACTED}@", text)
    text = _SIGNED.sub(rf"\1{_REDACTED}", text)
    return _TOKEN.sub(rf"\1 {_REDACTED}", text)


def public_url(url: str) -> str:
    """Return `url` without what may open it: query, fragment, user and password; of any text, also of no URL."""
    start, userinfo, rest, _query = _parse(url)
    del userinfo
    return start + rest


def _parse(url: str) -> tuple[str, str, str, str]:
    """Return what comes before a URL's user, the user and password with their @, host and path, and all behind it."""
    query_at = _QUERY_STARTS.search(url)
    end = query_at.start() if query_at else len(url)
    before_authority = _BEFORE_AUTHORITY.match(url, 0, end)
    start = before_authority.end() if before_authority else 0
    path_at = re.search(r"[/\\]", url[start:end])
    authority_end = start + path_at.start() if path_at else end
    at = url.rfind("@", start, authority_end)
    authority = url[start:authority_end]
    if at < 0 and ":" in authority and not _PORT_AT_END.search(authority):
        at = url.rfind("@", start, end)  # a slash in the password: what would be the port is no number
    host_at = at + 1 if at >= 0 else start
    return url[:start], url[start:host_at], url[host_at:end], url[end:]


@lru_cache(maxsize=1024)
def _spellings_of_url(url: str) -> tuple[tuple[str, str], ...]:
    """Return every way in which a text may spell a URL or its secrets, the longest first, and what is shown instead."""
    start, userinfo, rest, query = _parse(url)
    shown_by_spelling: dict[str, str] = {}
    secrets = [query, query[1:], userinfo, userinfo.removesuffix("@"), *re.split(r"[:@/\\]", userinfo)]
    secrets += [parameter.partition("=")[2] for parameter in re.split("[?&;#]", query)]
    secrets += re.split(r"[\s?&;=#,'\"<>\\]+", query)
    for secret in secrets:
        for spelling in _spellings(secret):
            if len(spelling) >= _SHORTEST_OF_URL_BYTES:
                shown_by_spelling[spelling] = _REDACTED
    if query or userinfo:
        path_at = rest.find("/")
        if path_at >= 0:
            for spelling in _spellings(rest[path_at:] + query):
                shown_by_spelling[spelling] = f"{rest[path_at:]}?{_REDACTED}" if query else rest[path_at:]
        for spelling in _spellings(url):
            shown_by_spelling[spelling] = start + rest
    names = {parameter.partition("=")[0] for parameter in re.split("[?&;#]", query) if "=" in parameter}
    return tuple(
        (spelling, shown)
        for spelling, shown in sorted(shown_by_spelling.items(), key=lambda item: -len(item[0]))
        if spelling not in names
    )


def _spellings(text: str) -> set[str]:
    """Return a text as libraries write it: percent-encoded, decoded, without line ends, as Python, JSON or HTML."""
    plain = {text, unquote(text), quote(text, safe=_URL_RESERVED), quote(text, safe=""), re.sub(r"[\t\r\n]", "", text)}
    plain |= {quote(unquote(text), safe=_URL_RESERVED), text.strip()}
    spelt = set(plain)
    for one in plain:
        spelt |= {repr(one)[1:-1], ascii(one)[1:-1], json.dumps(one)[1:-1], html.escape(one)}
        spelt.add(repr(one)[1:-1].replace("'", "\\'"))
    spelt.discard("")
    return spelt
