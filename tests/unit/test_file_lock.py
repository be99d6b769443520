"""The one lock on files that tells who is alive."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from adc_worker.host.file_lock import FileLock, is_locked


def test_a_lock_is_taken_once(tmp_path: Path) -> None:
    """Whoever comes second gets none until the first lets go."""
    path = tmp_path / "slot"
    first = FileLock.try_take(path)
    assert first is not None
    with closing(first):
        assert FileLock.try_take(path) is None
        assert is_locked(path)
    second = FileLock.try_take(path)
    assert second is not None
    second.close()
    assert not is_locked(path)


def test_to_look_at_a_lock_does_not_take_it(tmp_path: Path) -> None:
    """Two may look at the same time, and a third one takes it afterwards."""
    path = tmp_path / "slot"
    path.touch()
    assert not is_locked(path)
    taken = FileLock.try_take(path)
    assert taken is not None
    taken.close()
