"""What a child says about its next sign of life is what its parent may hold it to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from adc_worker.runtime.signs_of_life import SignsOfLife


class Ear:
    """The parent's end."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.life = SignsOfLife(self._write)

    def lines(self) -> list[bytes]:
        try:
            return os.read(self._read, 1 << 16).splitlines()
        except BlockingIOError:
            return []

    def seconds_left(self) -> float:
        word, _, deadline = self.lines()[-1].partition(b" ")
        assert word == b"until"
        return float(deadline) - time.monotonic()

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


@pytest.fixture
def ear() -> Iterator[Ear]:
    made = Ear()
    yield made
    made.close()


def test_a_worker_that_holds_nothing_promises_nothing(ear: Ear) -> None:
    """It may wait for jobs for ever."""
    ear.life.tasks(600)
    assert 599 < ear.seconds_left() < 600
    ear.life.tasks(float("inf"))
    assert ear.seconds_left() == float("inf")


def test_every_move_of_the_tasks_moves_the_deadline(ear: Ear) -> None:
    """A slow link that brings bytes never comes near it; what changes nothing is not told."""
    ear.life.tasks(10)
    ear.lines()
    ear.life.tasks(20)
    assert 19 < ear.seconds_left() < 20
    ear.life.tasks(20.1)
    assert ear.lines() == []


def test_an_inference_is_held_to_its_own_time(ear: Ear) -> None:
    """Downloads that go on do not excuse it, and one that was measured to be long may outlast what else would do."""
    ear.life.tasks(600)
    with ear.life.inference(30):
        assert 29 < ear.seconds_left() < 30
        ear.life.tasks(700)
        assert ear.lines() == []
    assert 699 < ear.seconds_left() < 700
    with ear.life.inference(5000):
        assert 4999 < ear.seconds_left() < 5000


def test_a_status_is_one_line(ear: Ear) -> None:
    """Whatever is in it."""
    ear.life.ready()
    ear.life.status("job 7:\nready")
    assert ear.lines() == [b"ready", b"status job 7: ready"]


def test_without_a_parent_nothing_is_said() -> None:
    """Benchmarks run a child by itself."""
    life = SignsOfLife()
    life.ready()
    with life.inference(1):
        life.tasks(1)
