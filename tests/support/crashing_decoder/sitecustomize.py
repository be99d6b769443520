"""Put on PYTHONPATH, it gives the JPEG decoder a bug: a real SIGSEGV on files that hold a certain comment."""

from __future__ import annotations

import ctypes
from typing import Any

import simplejpeg

MARK = b"crash the decoder"
_decode_jpeg = simplejpeg.decode_jpeg


def _decode_with_a_bug(data: Any, *arguments: Any, **options: Any) -> Any:
    if MARK in bytes(data):
        ctypes.string_at(0)
    return _decode_jpeg(data, *arguments, **options)


simplejpeg.decode_jpeg = _decode_with_a_bug
