"""Removes secrets from text that leaves the process: tokens, and everything after a URL's question mark.

Apart from log.py so that decode processes, which never log, need not import structlog.
"""

from __future__ import annotations

import re

# Also without scheme and host: urllib3 logs bare paths.
_URL_QUERY = re.compile(r"""((?:https?:/)?/[^\s?#"'<>]+)\?[^\s"'<>]*""", re.IGNORECASE)
_TOKEN = re.compile(r"\b(Token|Bearer)\s+\S+", re.IGNORECASE)


def redact(text: str) -> str:
    """Cut URL queries (presigned URLs sign there) and authorization values out of `text`."""
    return _TOKEN.sub(r"\1 <redacted>", _URL_QUERY.sub(r"\1?<redacted>", text))
