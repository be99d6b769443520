"""The status page: one HTML file that carries its data."""

from __future__ import annotations

from importlib.resources import files

_DATA_ELEMENT = b'<script type="application/json" id="data">'


def rendered_page(data: bytes) -> bytes:
    """Return the page with its data inside; it needs no other file."""
    page = files("adc_worker.status").joinpath("page.html").read_bytes()
    # Without a "<" neither </script> nor a comment can begin inside a script element.
    harmless = data.replace(b"<", b"\\u003c")
    return page.replace(_DATA_ELEMENT, _DATA_ELEMENT + harmless)
