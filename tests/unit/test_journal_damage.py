"""A damaged journal is set aside, what can be read of it is kept, and no row is ever a wrong one."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from adc_worker.antenna.wire import Task
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.journal.journal import Journal, LockPatience
from tests.support.fakes import task

PAGE_BYTES = 4096
ALL = 1 << 40
JOB_ID = 7
TASKS = 60
KEPT = 20  # of the tasks, those that have a result
ACCEPTED = range(1001, 1011)  # images whose results are accepted
HASTY = LockPatience(wait_s=0.05, fault_s=0.3, end_s=0.6)


def body_of(image_id: str) -> bytes:
    """Return an image's result: what it says shows whose it is, and it spreads over several pages."""
    noise = random.Random(image_id).randbytes(5000).hex()  # nothing that a page of another result could hold
    return b'{"image":"%s","noise":"%s"}' % (image_id.encode(), noise.encode())


def fill(path: Path) -> list[Task]:
    """Make a journal as an orderly end leaves it; return its unaccepted tasks."""
    journal = Journal(path)
    for number in ACCEPTED:
        (held,) = journal.record(JOB_ID, [task(number)])
        journal.keep([(held.id, [body_of(held.task.image_id)])])
        journal.settle([held.id])
    tasks = [task(number) for number in range(2001, 2001 + TASKS)]
    held_tasks = journal.record(JOB_ID, tasks)
    journal.keep([(held.id, [body_of(held.task.image_id)]) for held in held_tasks[:KEPT]])
    journal.close()
    return tasks


def damaged_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.damaged-*.db"))


def assert_nothing_is_wrong(journal: Journal, tasks: list[Task]) -> int:
    """Compare every row with what was written; return how many tasks are there."""
    known = {one.reply_subject: one for one in tasks}
    unfinished = journal.unfinished(JOB_ID)
    kept = journal.unposted([], 1000, ALL)
    for held in [*unfinished, *kept]:
        assert known[held.task.reply_subject] == held.task
        assert held.job_id == JOB_ID
    for held in kept:
        body = b"".join(journal.parts(held.id))
        if body != body_of(held.task.image_id):
            # The damage was found just now. A post that has begun lacks bytes that its head announced, and is broken.
            assert len(body) < (held.result_bytes or 0)
            assert b"".join(journal.parts(held.id)) in {b"", body_of(held.task.image_id)}
    # An image that comes again is answered with its own result, or worked on.
    comes_again = [task(number).model_copy(update={"reply_subject": f"again {number}"}) for number in ACCEPTED]
    journal.record(JOB_ID, comes_again)
    for held in journal.unposted([], 1000, ALL):
        if held.task in comes_again:
            assert b"".join(journal.parts(held.id)) in {b"", body_of(held.task.image_id)}
    return len(unfinished) + len(kept)


def _zeros(page: bytes, _all: bytes) -> bytes:
    return bytes(len(page))


def _noise(page: bytes, _all: bytes) -> bytes:
    return random.Random(1).randbytes(len(page))


def _torn(page: bytes, _all: bytes) -> bytes:
    """Only half of the page reached the disk."""
    return page[: len(page) // 2] + bytes(len(page) // 2)


def _torn_at_its_start(page: bytes, _all: bytes) -> bytes:
    return bytes(512) + page[512:]


def _flipped(page: bytes, _all: bytes) -> bytes:
    """Some bits changed on the disk."""
    changed = bytearray(page)
    for offset in range(100, len(page), 50):
        changed[offset] ^= 4
    return bytes(changed)


def _misplaced(_page: bytes, everything: bytes) -> bytes:
    """Another page was written in its place."""
    return everything[2 * PAGE_BYTES : 3 * PAGE_BYTES]


KINDS = (_zeros, _noise, _torn, _torn_at_its_start, _flipped, _misplaced)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Task]]:
    """Return the bytes of a journal, and its tasks."""
    path = tmp_path_factory.mktemp("sound") / "adc_journal.db"
    tasks = fill(path)
    return path.read_bytes(), tasks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adc_journal.db"


def left_open(path: Path) -> None:
    """Leave a slot as a power cut does."""
    path.with_name("adc_journal.0.lock").write_bytes(b"open\n")


def left_orderly(path: Path) -> None:
    path.with_name("adc_journal.0.lock").write_bytes(b"clean\n")


@pytest.mark.parametrize("ended", [left_open, left_orderly])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_page_is_damaged_the_journal_works_and_no_row_is_wrong(
    tmp_path: Path,
    sound: tuple[bytes, list[Task]],
    kind: Callable[[bytes, bytes], bytes],
    ended: Callable[[Path], None],
) -> None:
    """Each page in turn: a sound journal again, at most one file set aside, and a second start that finds nothing."""
    content, tasks = sound
    for number in range(len(content) // PAGE_BYTES):
        path = tmp_path / str(number) / "adc_journal.db"
        path.parent.mkdir()
        start = number * PAGE_BYTES
        page = content[start : start + PAGE_BYTES]
        path.write_bytes(content[:start] + kind(page, content) + content[start + PAGE_BYTES :])
        ended(path)
        with capture_logs() as said, closing(Journal(path)) as journal:
            assert_nothing_is_wrong(journal, tasks)
            (held,) = journal.record(8, [task(9999)])
            journal.keep([(held.id, [b"new"])])
        set_aside = damaged_files(path)
        assert len(set_aside) <= 1, f"page {number}"
        assert [one["event"] for one in said].count("journal_damaged") == len(set_aside)
        with closing(Journal(path)) as journal:
            assert [b"".join(journal.parts(one.id)) for one in journal.unposted([], 1000, ALL)][-1] == b"new"
        assert damaged_files(path) == set_aside
        shutil.rmtree(path.parent)
