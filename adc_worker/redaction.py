"""Removes secrets from text that leaves the process: tokens, passwords in URLs, everything after a URL's question mark.

Apart from log.py so that decode processes, which never log, need not import structlog.
"""

from __future__ import annotations

import re

# Also without scheme and host: urllib3 logs bare paths. A fragment may stand before what looks like a query.
_URL_QUERY = re.compile(r"""((?:https?:/)?/[^\s?"'<>]+)\?[^\s"'<>]*""", re.IGNORECASE)
_USERINFO = re.compile(r"""(\w://)[^\s/?#"'<>]*@""")
_TOKEN = re.compile(r"\b(Token|Bearer)\s+\S+", re.IGNORECASE)
_SHORTEST_BYTES = 8  # hiding a shorter one everywhere would cut holes into ordinary words
_hidden: set[str] = set()


def hide(secret: str) -> None:
    """Cut `secret` out of every text from now on, whatever stands around it."""
    if len(secret) >= _SHORTEST_BYTES:
        _hidden.add(secret)


def redact(text: str) -> str:
    """Cut URL queries (presigned URLs sign there), passwords and authorization values out of `text`."""
    for secret in _hidden:
        text = text.replace(secret, "<redacted>")
    text = _USERINFO.sub(r"\1<redacted>@", _URL_QUERY.sub(r"\1?<redacted>", text))
    return _TOKEN.sub(r"\1 <redacted>", text)


def public_url(url: str) -> str:
    """Return `url` without what may open it: query, fragment, user and password."""
    return _USERINFO.sub(r"\1", re.split(r"[?#]", url, maxsplit=1)[0])
