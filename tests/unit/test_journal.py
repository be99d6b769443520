"""What must survive a crash does, and belongs to one worker at a time."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.journal.journal import _SCHEMA, _VERSION, TASK_LIFE_S, Journal
from tests.support.fakes import task

ALL = 1 << 40
NEWER = _VERSION + 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "adc_journal.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


def keep(journal: Journal, results: list[tuple[int, bytes]]) -> None:
    journal.keep((task_id, [body]) for task_id, body in results)


def bodies(journal: Journal, excluding: tuple[int, ...] = (), limit: int = 100, most_bytes: int = ALL) -> list[bytes]:
    return [b"".join(journal.parts(kept.held.id)) for kept in journal.unposted(excluding, limit, most_bytes)]


def test_tasks_survive_reopening(path: Path) -> None:
    """With all they came with, in the order they came in."""
    first = Journal(path)
    held = first.record(7, [task(1), task(2)])
    first.close()
    second = Journal(path)
    assert second.unfinished(7) == held
    assert [one.task for one in held] == [task(1), task(2)]
    assert second.unfinished(8) == []
    second.close()


def test_results_survive_reopening(path: Path) -> None:
    """A computed result is never computed again."""
    first = Journal(path)
    held = first.record(7, [task(1), task(2)])
    keep(first, [(held[1].id, b"two")])
    first.close()
    second = Journal(path)
    (kept,) = second.unposted([], 100, ALL)
    assert (kept.held, b"".join(second.parts(kept.held.id))) == (held[1], b"two")
    assert second.unfinished(7) == [held[0]]
    second.close()


def test_what_was_kept_is_on_disk_although_nobody_closed_the_journal(path: Path, journal: Journal) -> None:
    """A second connection sees it at once: nothing waits in an open transaction."""
    held = journal.record(7, [task(1)])
    keep(journal, [(held[0].id, b"one")])
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT count(*) FROM adc_task").fetchone() == (1,)
        assert other.execute("SELECT body FROM adc_result_part").fetchone() == (b"one",)
    other.close()


def test_forgetting_removes_the_task_and_its_result(path: Path, journal: Journal) -> None:
    """And nothing else."""
    held = journal.record(7, [task(1), task(2), task(3)])
    keep(journal, [(one.id, b"%d" % one.id) for one in held[:2]])
    journal.forget(iter([held[0].id]))
    assert bodies(journal) == [b"2"]
    assert journal.unfinished(7) == [held[2]]
    assert journal.known_ids() == {held[1].id, held[2].id}
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT task_id FROM adc_result").fetchall() == [(held[1].id,)]
    other.close()


def test_a_number_is_never_used_twice(path: Path) -> None:
    """It is the name of the staged file, which may outlive its task."""
    first = Journal(path)
    numbers = [held.id for held in first.record(7, [task(1), task(2)])]
    first.forget(numbers)
    first.close()
    second = Journal(path)
    assert second.record(7, [task(3)])[0].id > max(numbers)
    second.close()


def test_a_result_kept_twice_is_the_later_one(journal: Journal) -> None:
    """A refused result becomes an error result."""
    held = journal.record(7, [task(1)])
    keep(journal, [(held[0].id, b"result")])
    keep(journal, [(held[0].id, b"error")])
    assert bodies(journal) == [b"error"]
    assert journal.unposted_count() == 1


def test_results_are_kept_all_or_none(journal: Journal) -> None:
    """One transaction: a number without a task spoils the batch, and says so."""
    held = journal.record(7, [task(1)])
    with pytest.raises(sqlite3.IntegrityError):
        keep(journal, [(held[0].id, b"one"), (999, b"nobody's")])
    assert bodies(journal) == []


def test_unposted_results_come_oldest_first_up_to_a_number(journal: Journal) -> None:
    """Those under way are left out, and do not count."""
    held = journal.record(7, [task(number) for number in range(5)])
    keep(journal, [(one.id, b"%d" % one.id) for one in reversed(held)])
    assert bodies(journal) == [b"1", b"2", b"3", b"4", b"5"]
    assert bodies(journal, limit=2) == [b"1", b"2"]
    assert bodies(journal, excluding=(1, 3), limit=2) == [b"2", b"4"]
    assert bodies(journal, excluding=(1, 2, 3, 4, 5)) == []


def test_an_oversize_result_comes_only_to_a_caller_that_is_alone(journal: Journal) -> None:
    """One that does not fit waits until nothing else is under way, and nothing younger overtakes it."""
    large, small = journal.record(1, [task(1), task(2)])
    keep(journal, [(large.id, b"x" * 100), (small.id, b"y")])
    assert journal.unposted([], 10, 50, alone=False) == []
    assert [kept.held.id for kept in journal.unposted([], 10, 50)] == [large.id]
    assert [kept.held.id for kept in journal.unposted([large.id], 10, 50, alone=False)] == [small.id]


def test_unposted_results_come_up_to_a_number_of_bytes_but_at_least_one(journal: Journal) -> None:
    """A backlog of thousands of megabyte results is never read into memory at once."""
    held = journal.record(7, [task(number) for number in range(4)])
    keep(journal, [(one.id, b"x" * 100) for one in held])
    assert len(bodies(journal, most_bytes=300)) == 3
    assert len(bodies(journal, most_bytes=299)) == 2
    assert len(bodies(journal, most_bytes=1)) == 1
    assert len(bodies(journal, excluding=(1, 2), most_bytes=200)) == 2


def test_unfinished_tasks_older_than_their_stream_are_dropped(path: Path, journal: Journal) -> None:
    """A result that was computed stays, however old."""
    old, done, young = journal.record(7, [task(1), task(2), task(3)])
    keep(journal, [(done.id, b"one")])
    with sqlite3.connect(path) as other:
        other.execute("UPDATE adc_task SET fetched_at = fetched_at - ? WHERE id != ?", (TASK_LIFE_S + 1, young.id))
    other.close()
    assert journal.drop_expired() == 1
    assert [held.id for held in journal.unfinished(7)] == [young.id]
    assert bodies(journal) == [b"one"]
    assert old.id not in journal.known_ids()


def test_held_tasks_are_counted_by_job_with_or_without_a_result(journal: Journal) -> None:
    """Antenna waits for both."""
    held = journal.record(7, [task(1), task(2)])
    journal.record(8, [task(3)])
    keep(journal, [(held[0].id, b"one")])
    assert (journal.held_count(7), journal.held_count(8), journal.held_count(9)) == (2, 1, 0)
    assert journal.unposted_count() == 1


def test_two_workers_on_one_file_have_their_own_rows(path: Path, journal: Journal) -> None:
    """Neither sees, posts or counts what the other holds; only whose files are staged is common knowledge."""
    other = Journal(path)
    assert other.slot != journal.slot
    (mine,), (theirs,) = journal.record(7, [task(1)]), other.record(7, [task(2)])
    keep(journal, [(mine.id, b"mine")])
    keep(other, [(theirs.id, b"theirs")])
    assert (bodies(journal), bodies(other)) == ([b"mine"], [b"theirs"])
    assert (journal.unposted_count(), other.unposted_count()) == (1, 1)
    assert (journal.held_count(7), other.held_count(7)) == (1, 1)
    assert journal.known_ids() == other.known_ids() == {mine.id, theirs.id}
    other.close()


def test_a_live_workers_rows_are_not_adopted(path: Path, journal: Journal) -> None:
    """However many come and go."""
    journal.record(7, [task(1)])
    for _ in range(2):
        other = Journal(path)
        assert other.unfinished(7) == []
        other.close()
    assert len(journal.unfinished(7)) == 1


def test_the_rows_of_a_worker_that_is_gone_are_adopted_by_the_next(path: Path) -> None:
    """Also by one that got another slot."""
    first, second = Journal(path), Journal(path)
    held = second.record(7, [task(1), task(2)])
    keep(second, [(held[0].id, b"one")])
    gone = second.slot
    second.close()
    first.close()
    third = Journal(path)
    assert third.slot != gone
    assert third.unfinished(7) == [held[1]]
    assert bodies(third) == [b"one"]
    third.close()


def test_an_adopted_slot_can_be_taken_again(path: Path, journal: Journal) -> None:
    """Adopting holds its lock for a moment only."""
    second = Journal(path)
    second.record(7, [task(1)])
    gone = second.slot
    second.close()
    third = Journal(path)
    assert third.slot == gone
    fourth = Journal(path)
    assert len({journal.slot, third.slot, fourth.slot}) == 3
    for one in (third, fourth):
        one.close()


def test_a_slot_is_a_lock_that_the_kernel_takes_back(path: Path, journal: Journal) -> None:
    """A kill -9 leaves no stale owner, which a number in a file would."""
    lock = path.with_name(f"adc_journal.{journal.slot}.lock")
    fd = os.open(lock, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


def test_the_journal_of_a_newer_worker_is_refused_and_left_alone(path: Path) -> None:
    """With what to do about it, and an exit code that says a restart is useless."""
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version={NEWER}")
    db.close()
    with pytest.raises(WorkerFault) as caught:
        Journal(path)
    assert caught.value.exit_code is ExitCode.JOURNAL_UNUSABLE
    assert str(caught.value) == (
        f"the journal {path} was written by a newer worker (version {NEWER}, this one knows {NEWER - 1}):"
        " install that version again, or move the file away once its results are posted"
    )
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (NEWER,)
    db.close()


def test_the_journal_of_the_first_version_is_taken_over(path: Path) -> None:
    """Whatever it holds: an upgrade costs no task and no result."""
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.executescript(f"{_SCHEMA}; PRAGMA user_version=1")
        db.execute("INSERT INTO adc_task VALUES (1, 0, 7, '1', 'https://x/1.jpg', '$JS', 5.0)")
    db.close()
    journal = Journal(path)
    (held,) = journal.unfinished(7)
    assert (held.id, held.fetched_at, held.strikes) == (1, 5.0, None)
    journal.close()


# Suspects


PID = os.getpid()
SEGV = (PID, "SIGSEGV")


def crash(journal: Journal) -> Journal:
    """Come back after this process died: without the orderly end that `close` is."""
    with journal._lock:
        journal._db.close()
        os.close(journal._slot_fd)
    return Journal(journal._path)


def strikes(journal: Journal) -> dict[str, tuple[str, ...] | None]:
    return {held.task.image_id: held.strikes for held in journal.unfinished(7)}


def test_what_a_dead_process_worked_on_is_suspect(path: Path) -> None:
    """Not what it merely held, nor what has its result; several at once share the suspicion and get no strike."""
    journal = Journal(path)
    held = journal.record(7, [task(number) for number in range(1, 5)])
    journal.begin([one.id for one in held[:3]], 0, alone=False)
    keep(journal, [(held[0].id, b"done")])
    journal = crash(journal)
    assert journal.accuse(SEGV, 0) == 2
    assert strikes(journal) == {"2": (), "3": (), "4": None}
    journal.close()


def test_an_orderly_end_makes_no_suspects(path: Path) -> None:
    """Nor does an error that the process could still report."""
    journal = Journal(path)
    (held,) = journal.record(7, [task(1)])
    journal.begin([held.id], 0, alone=True)
    journal.close()
    journal = Journal(path)
    assert journal.accuse(SEGV, 5) == 0
    assert strikes(journal) == {"1": None}
    journal.close()


@pytest.mark.parametrize(
    ("died", "oom_kills", "expected"),
    [
        (SEGV, 3, ("SIGSEGV",)),
        ((PID, "HUNG"), 3, ("HUNG",)),
        ((PID + 1, "SIGSEGV"), 3, ()),  # the death of another worker's process
        (None, 3, ()),  # a kill from outside, or nobody saw it: parent and child died together
        (None, 4, ("out of memory",)),
        (None, 0, ()),  # the counter began anew: the host was restarted, or its cgroup was
    ],
)
def test_a_task_that_was_alone_gets_a_strike_for_a_death_of_the_processs_own_making(
    path: Path, died: tuple[int, str] | None, oom_kills: int, expected: tuple[str, ...]
) -> None:
    """And for one that the kernel counted; a kill from outside is no evidence."""
    journal = Journal(path)
    first, second = journal.record(7, [task(1), task(2)])
    journal.begin([first.id], 3, alone=False)
    journal.begin([second.id], 3, alone=True)
    journal = crash(journal)
    assert journal.accuse(died, oom_kills) == 1
    assert strikes(journal) == {"1": None, "2": expected}
    journal.close()


def test_two_strikes_are_out_and_come_last_until_pardoned(path: Path) -> None:
    """The others go first: one that succeeds shows that this machine works."""
    journal = Journal(path)
    held = journal.record(7, [task(1), task(2)])
    for _death in range(2):
        journal.begin([held[0].id], 0, alone=True)
        journal = crash(journal)
        journal.accuse(SEGV, 0)
    assert list(strikes(journal).items()) == [("2", None), ("1", ("SIGSEGV", "SIGSEGV"))]
    assert [one.struck_out for one in journal.unfinished(7)] == [False, True]
    journal.pardon([held[0].id])
    assert strikes(journal) == {"1": (), "2": None}
    journal.close()


def _folder(path: Path) -> None:
    path.mkdir(parents=True)


def _parent_is_a_file(path: Path) -> None:
    path.parent.write_text("")


def _not_a_database(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"holiday photographs " * 100)


@pytest.mark.parametrize("spoil", [_folder, _parent_is_a_file, _not_a_database])
def test_a_journal_that_cannot_be_opened_ends_the_worker_with_its_own_code(path: Path, spoil: object) -> None:
    """The message names the file and the reason."""
    assert callable(spoil)
    spoil(path)
    with pytest.raises(WorkerFault, match=f"the journal {path} cannot be opened: ") as caught:
        Journal(path)
    assert caught.value.exit_code is ExitCode.JOURNAL_UNUSABLE


def test_only_its_owner_may_read_the_journal(path: Path, journal: Journal) -> None:
    """It holds presigned URLs; SQLite gives its side files the same mode."""
    journal.record(7, [task(1)])
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == [
        "adc_journal.0.lock",
        "adc_journal.db",
        "adc_journal.db-shm",
        "adc_journal.db-wal",
    ]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_every_commit_reaches_the_disk(journal: Journal) -> None:
    """Write-ahead log, synchronous=FULL (2), and results that cannot lose their task."""
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert journal._db.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_many_threads_may_use_one_journal(journal: Journal) -> None:
    """Each task is recorded, kept and forgotten once, whatever happens beside it."""
    together = threading.Barrier(4)

    def work(job_id: int) -> None:
        together.wait()
        for number in range(10):
            first, second = journal.record(job_id, [task(number), task(100 + number)])
            keep(journal, [(first.id, b"%d" % job_id), (second.id, b"x")])
            journal.forget([second.id])
            journal.unposted([first.id], 10, ALL)

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(work, range(4)))
    assert sorted(bodies(journal)) == sorted(b"%d" % job_id for job_id in range(4) for _ in range(10))
    assert [journal.held_count(job_id) for job_id in range(4)] == [10] * 4
