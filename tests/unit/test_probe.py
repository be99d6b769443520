"""How the probe waits for memory that others on this host hold."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest

from adc_worker.errors import ImageTooLarge
from adc_worker.runtime.probe import _wait_for_memory
from tests.support.fakes import GB, MB, host
from tests.support.images import header, staged

LARGE = staged(1, Path("large.jpg"), header(8000, 6000))  # 144 MB decoded


def test_an_image_waits_until_the_others_have_made_room() -> None:
    """However often that has to be looked at."""
    left, turns = deque([10, 20, 140, 1000]), deque([True] * 3)
    assert _wait_for_memory(LARGE, lambda: host(available_bytes=left.popleft() * MB), turns.popleft)
    assert (len(left), len(turns)) == (0, 0)


def test_the_wait_ends_with_the_turn() -> None:
    """The image is taken up again when it is the job's turn again."""
    turns = deque([True, True, False])
    assert not _wait_for_memory(LARGE, lambda: host(available_bytes=10 * MB), turns.popleft)
    assert not turns


def test_what_never_fits_is_not_waited_for() -> None:
    """An image that exceeds the worker's part of the limit, whoever else holds what."""
    with pytest.raises(ImageTooLarge, match="this worker has 100000000"):
        _wait_for_memory(LARGE, lambda: host(limit_bytes=1 * GB + 100 * MB), lambda: True)
