"""What a damaged journal keeps beside its rows: who it is, and which run of a job its results are of."""

from __future__ import annotations

import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from adc_worker.antenna.wire import Task
from adc_worker.journal.journal import Journal, LockPatience
from tests.support.fakes import result, task
from tests.unit.test_journal_identity import VERSION_1

JOB = 7
PAGE_BYTES = 4096
HOUR_S = 3600.0
ALL = 1 << 40
SIGNED = "?signature=0123"
Opened = Callable[[], Journal]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "adc_journal.db"


@pytest.fixture
def opened(path: Path, clock: Clock) -> Iterator[Opened]:
    """Return what opens the journal as a process that starts does; the one before has ended in good order."""
    journals: list[Journal] = []

    def start() -> Journal:
        if journals:
            journals[-1].close()
        journals.append(Journal(path, now=clock))
        return journals[-1]

    yield start
    if journals:
        journals[-1].close()


def damaged_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.damaged-*.db"))


def damage_page(path: Path, table_or_index: str) -> None:
    """Overwrite the page that a table or an index begins with, behind the back of whoever has the file open."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table_or_index,)).fetchone()
    with path.open("r+b") as file:
        file.seek((root - 1) * PAGE_BYTES)
        file.write(b"\xa5" * PAGE_BYTES)


def change(path: Path, statement: str, *arguments: object) -> None:
    """Change what is in the file as a disk does that returns wrong bytes: no checksum is made for it."""
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement, arguments)
        db.commit()


def no_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(b"holiday photographs " * 1000)


def subject(seq: int, published_ns: int) -> str:
    return f"$JS.ACK.job_{JOB}.job-{JOB}-consumer.1.{seq}.{seq}.{published_ns}.0"


def task_of(number: int, seq: int, published_ns: int) -> Task:
    return task(number).model_copy(update={"reply_subject": subject(seq, published_ns)})


def keep_result(journal: Journal, number: int, incarnation: str, asked_at: float) -> int:
    """Fetch a task in a run of its job and keep its result; return the task's number in the journal."""
    journal.note_served(JOB, incarnation, asked_at)
    (held,) = journal.record(JOB, [task(number)], asked_at)
    journal.keep([(held.id, [result(number)])])
    return held.id


def live(journal: Journal) -> list[bool]:
    return [journal.is_live(kept) for kept in journal.unposted([], 100, ALL)]


# Who the journal is


@pytest.mark.parametrize("spoil", [no_database, partial(damage_page, table_or_index="adc_meta"), Path.unlink])
def test_a_journal_whose_file_is_lost_while_its_worker_runs_stays_who_it_is(
    opened: Opened, path: Path, spoil: Callable[[Path], None]
) -> None:
    """Its staged files lie in a folder of that name, also after the next start."""
    journal = opened()
    (held,) = journal.record(JOB, [task(1)])
    name = journal.staging_name
    spoil(path)
    # More than a connection keeps in memory, so that the file is read again.
    journal.keep([(held.id, [os.urandom(9_000_000)])])
    assert journal.staging_name == name
    assert opened().staging_name == name


@pytest.mark.parametrize("page", ["adc_task_image", "adc_task", "adc_meta"])
def test_a_journal_that_is_found_damaged_at_a_start_stays_who_it_is(opened: Opened, path: Path, page: str) -> None:
    """What it staged before is used, and no file of it is left behind."""
    journal = opened()
    journal.record(JOB, [task(1)])
    name = journal.staging_name
    damage_page(path, page)
    assert opened().staging_name == name
    assert len(damaged_files(path)) == 1


@pytest.mark.parametrize("moved", [False, True])
def test_a_damaged_file_that_is_opened_later_is_a_copy(opened: Opened, path: Path, tmp_path: Path, moved: bool) -> None:
    """The file in its place has its identity: in one folder each would remove the other's images."""
    journal = opened()
    journal.record(JOB, [task(1)])
    name = journal.staging_name
    damage_page(path, "adc_task_image")
    journal = opened()
    (aside,) = damaged_files(path)
    if moved:
        aside = Path(shutil.move(aside, tmp_path / "aside.db"))
    with closing(Journal(aside)) as other:
        assert other.staging_name != name
    assert opened().staging_name == name


def test_an_identity_that_is_not_what_was_written_is_damage(opened: Opened, path: Path) -> None:
    """It may name the folder of another journal."""
    name = opened().staging_name
    change(path, "UPDATE adc_meta SET value = 'another' WHERE name = 'identity'")
    assert opened().staging_name not in {name, "journal-another"}
    assert len(damaged_files(path)) == 1


@pytest.mark.parametrize("beside", [True, False])
def test_a_damaged_journal_of_the_version_before_still_finds_what_it_staged(
    path: Path, tmp_path: Path, beside: bool
) -> None:
    """A folder that does not lie beside the file was named by the inode of the one that was set aside."""
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
        db.execute(
            "INSERT INTO adc_task (slot, job_id, image_id, image_url, reply_subject, fetched_at)"
            " VALUES (0, 7, '1', 'https://images.example.org/1.jpg', 'subject', 1.0)"
        )
        db.commit()
    damage_page(path, "adc_task_slot")
    folder = (path.parent if beside else tmp_path) / "staging"
    earlier = folder if beside else folder / f"journal-{zlib.crc32(bytes(path)):08x}-{path.stat().st_ino:x}"
    earlier.mkdir(parents=True)
    with closing(Journal(path)) as journal:
        assert len(damaged_files(path)) == 1
        assert list(journal.unfinished_tasks()) == [1]
        assert journal.own_earlier_staging(folder) == earlier


# Which run its results are of


@pytest.mark.parametrize("spoil", [no_database, partial(damage_page, table_or_index="adc_task"), Path.unlink])
def test_what_was_seen_of_a_stream_outlives_damage_to_the_file(
    opened: Opened, path: Path, spoil: Callable[[Path], None]
) -> None:
    """What the worker remembers of its tasks goes with what it knows of their stream."""
    journal = opened()
    first = keep_result(journal, 1, "created/run 1", 1000.0)
    (held,) = journal.record(JOB, [task(2)], 1000.0)
    spoil(path)
    journal.keep([(held.id, [os.urandom(9_000_000)])])
    assert [journal.is_live(kept) for kept in journal.unposted([], 9, ALL) if kept.id == held.id] == [True]
    found = journal.held(first)
    assert found is not None
    assert journal.is_live(found)


def test_results_read_from_a_damaged_file_are_proved_by_their_run_and_by_no_other(
    opened: Opened, path: Path, clock: Clock
) -> None:
    """A worker that starts with a damaged file holds back what is of an earlier run."""
    keep_result(opened(), 1, "created/run 1", clock())
    clock.now_s += HOUR_S
    for incarnation, expected in (("created/run 2", [False]), ("created/run 1", [True])):
        damage_page(path, "adc_task_image")
        journal = opened()
        assert live(journal) == [False]
        journal.note_served(JOB, incarnation, clock())
        assert live(journal) == expected
    assert len(damaged_files(path)) == 2


def test_the_run_of_a_task_is_sealed(opened: Opened, path: Path, clock: Clock) -> None:
    """A wrong one would prove the subject of an earlier run."""
    keep_result(opened(), 1, "created/run 1", clock())
    change(path, "UPDATE adc_task SET incarnation = 'created/run 2'")
    journal = opened()
    journal.note_served(JOB, "created/run 2", clock())
    assert journal.unposted([], 9, ALL) == []
    assert len(damaged_files(path)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        "incarnation = 'created/run 2'",
        "published_ns = 1",
        "reply_subject = replace(reply_subject, 'consumer.1.1.1', 'consumer.1.8.8')",
        "image_url = 'https://images.example.org/8.jpg'",
    ],
)
def test_what_is_said_of_an_accepted_result_is_sealed(opened: Opened, path: Path, clock: Clock, wrong: str) -> None:
    """It is neither posted again, nor does it prove a stream or answer another image."""
    journal = opened()
    number = keep_result(journal, 1, "created/run 1", clock())
    journal.settle([number])
    change(path, f"UPDATE adc_finished SET {wrong}")  # noqa: S608 (a literal)
    journal = opened()
    for incarnation in ("created/run 1", "created/run 2"):
        journal.note_served(JOB, incarnation, clock())
        assert journal.newest_accepted(JOB) is None
    other = task_of(1, 2, 1_760_000_000_000_000_001)
    other = other.model_copy(update={"image_url": "https://images.example.org/8.jpg"})
    journal.record(JOB, [other], clock())
    assert journal.unposted([], 9, ALL) == []
    assert len(damaged_files(path)) == 1


def test_a_wrong_run_of_an_accepted_result_proves_no_other_subject(opened: Opened, path: Path, clock: Clock) -> None:
    """What was published later is taken to be in the same stream."""
    journal = opened()
    number = keep_result(journal, 1, "created/run 1", clock())
    journal.settle([number])
    (held,) = journal.record(JOB, [task_of(2, 2, 1_760_000_000_000_000_001)], clock())
    journal.keep([(held.id, [result(2)])])
    change(path, "UPDATE adc_finished SET incarnation = 'created/run 2'")
    journal = opened()
    journal.note_served(JOB, "created/run 2", clock())
    assert live(journal) == [False]
    assert len(damaged_files(path)) == 1


def test_an_accepted_result_whose_subject_is_retired_is_no_damage(opened: Opened, path: Path, clock: Clock) -> None:
    """Its image may come again in the next run, and is answered from here."""
    journal = opened()
    number = keep_result(journal, 1, "created/run 1", clock())
    journal.settle([number])
    journal.bury(JOB)
    damage_page(path, "adc_task_image")
    journal = opened()
    journal.note_served(JOB, "created/run 2", clock())
    again = task_of(1, 3, 1_770_000_000_000_000_000)
    journal.record(JOB, [again], clock())
    (kept,) = journal.unposted([], 9, ALL)
    assert kept.task == again
    assert b"".join(journal.parts(kept.id)) == result(1)
    assert len(damaged_files(path)) == 1


def test_damage_to_an_accepted_result_stays_damage_when_its_subject_is_retired(
    opened: Opened, path: Path, clock: Clock
) -> None:
    """The new checksum of the row must not make its bytes right."""
    journal = opened()
    number = keep_result(journal, 1, "created/run 1", clock())
    journal.settle([number])
    change(path, "UPDATE adc_finished SET body = ?", zlib.compress(result(2)))
    journal.bury(JOB)
    journal.note_served(JOB, "created/run 2", clock())
    (held,) = journal.record(JOB, [task_of(1, 3, 1_770_000_000_000_000_000)], clock())
    assert held.result_bytes is None
    assert len(damaged_files(path)) == 1


def test_a_record_that_met_damage_is_repeated_as_if_for_the_first_time(
    opened: Opened, path: Path, clock: Clock
) -> None:
    """The clock of NATS was set back. What the undone transaction noted would have the tasks for late ones."""
    journal = opened()
    accepted = task_of(1, 5, 1000)
    (held,) = journal.record(JOB, [accepted], clock())
    journal.keep([(held.id, [result(1)])])
    journal.settle([held.id])
    journal.record(JOB, [task_of(2, 6, 1001)], clock())
    change(path, "UPDATE adc_finished SET body = (SELECT zeroblob(length(body)) FROM adc_finished)")
    asked_at = clock() + 10
    clock.now_s += 20
    came = [task_of(1, 7, 500), task_of(3, 8, 501)]
    assert [held.task for held in journal.record(JOB, came, asked_at)] == came
    assert len(damaged_files(path)) == 1


# What else the one needs of the other


def test_a_task_whose_result_was_lost_asks_for_no_image_without_what_opens_it(opened: Opened, path: Path) -> None:
    """The host would refuse that, and the refusal would count against the image."""
    journal = opened()
    signed = task(1).model_copy(update={"image_url": task(1).image_url + SIGNED})
    held = journal.record(JOB, [signed, task(2)])
    journal.keep([(one.id, [os.urandom(3_000_000)]) for one in held])
    no_database(path)
    journal.forget([])
    for one in held:
        list(journal.parts(one.id))
    lost = {one.task.image_id: one.url_erased for one in journal.unfinished(JOB)}
    assert lost == {"1": True, "2": False}, "what opens without a signature is downloaded again"


def test_what_a_dead_process_worked_on_is_read_of_a_damaged_file(opened: Opened, path: Path, tmp_path: Path) -> None:
    """Names of processes are text in a column that was made for numbers."""
    journal = opened()
    first, _second = journal.record(JOB, [task(1), task(2)])
    journal.begin([first.id], 0, alone=True)
    damaged = tmp_path / "died" / "adc_journal.db"
    damaged.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM INTO ?", (str(damaged),))
    damage_page(damaged, "adc_task_image")
    with closing(Journal(damaged)) as after:
        assert len(damaged_files(damaged)) == 1
        assert after.accuse((os.getpid(), "SIGSEGV"), 0) == 1
        assert [held.strikes for held in after.unfinished(JOB)] == [None, ("SIGSEGV",)]


def test_a_result_of_another_image_is_refused_also_while_the_file_takes_nothing(path: Path) -> None:
    """It would wait in memory, and be posted from there."""
    with closing(Journal(path, LockPatience(wait_s=0.02))) as journal:
        (held,) = journal.record(JOB, [task(1)])
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Exception, match=r"is of image 1, and the result for it of image 2"):
                journal.keep([(held.id, [result(2)])], {held.id: "2"})
        assert journal.unposted([], 9, ALL) == []
