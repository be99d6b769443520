"""Waiting for conditions, so that no test sleeps for luck."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

POLL_S = 0.01


def wait_until(predicate: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Return as soon as `predicate()` is true.

    Raises:
        TimeoutError: it was not for `timeout_s` seconds.
    """
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline_s:
            name = getattr(predicate, "__qualname__", repr(predicate))
            raise TimeoutError(f"not true within {timeout_s} s: {name}")
        time.sleep(POLL_S)
