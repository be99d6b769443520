"""What must survive a crash does, and belongs to one worker at a time."""

from __future__ import annotations

import fcntl
import os
import platform
import random
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from adc_worker.antenna.leases import lease_clock
from adc_worker.antenna.wire import Task
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.journal.journal import _SCHEMA, Journal
from tests.support.fakes import recorded, task

ALL = 1 << 40
NEWER = len(_SCHEMA) + 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "adc_journal.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


def tell_run(journal: Journal, run: int = 1) -> None:
    """Let Antenna tell in which run the job is: whether results are of its pipeline is not known without."""
    journal.note_served(7, f"created moths/run {run}", lease_clock())


def keep(journal: Journal, results: list[tuple[int, bytes]]) -> None:
    journal.keep([(task_id, [body]) for task_id, body in results])


def bodies(journal: Journal, excluding: tuple[int, ...] = (), limit: int = 100, most_bytes: int = ALL) -> list[bytes]:
    return [b"".join(journal.parts(kept.id)) for kept in journal.unposted(excluding, limit, most_bytes)]


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


def test_it_is_known_whether_a_task_was_ever_on_record(path: Path, journal: Journal) -> None:
    """Also when all of them are forgotten."""
    assert not journal.was_used()
    (held,) = journal.record(7, [task(1)])
    journal.forget([held.id])
    second = Journal(path)
    assert second.was_used()
    second.close()


def test_results_survive_reopening(path: Path) -> None:
    """A computed result is never computed again."""
    first = Journal(path)
    held = first.record(7, [task(1), task(2)])
    keep(first, [(held[1].id, b"two")])
    first.close()
    second = Journal(path)
    (kept,) = second.unposted([], 100, ALL)
    assert (kept, b"".join(second.parts(kept.id))) == (replace(held[1], result_bytes=3), b"two")
    assert second.unfinished(7) == [held[0]]
    second.close()


def test_what_was_kept_is_on_disk_although_nobody_closed_the_journal(path: Path, journal: Journal) -> None:
    """A second connection sees it at once: nothing waits in an open transaction."""
    held = journal.record(7, [task(1)])
    keep(journal, [(held[0].id, b"one")])
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT count(*) FROM adc_task").fetchone() == (1,)
        assert other.execute("SELECT body FROM adc_part").fetchone() == (b"one",)
    other.close()


def test_forgetting_removes_the_task_and_its_result(path: Path, journal: Journal) -> None:
    """And nothing else."""
    held = journal.record(7, [task(1), task(2), task(3)])
    keep(journal, [(one.id, b"%d" % one.id) for one in held[:2]])
    journal.forget([held[0].id])
    assert bodies(journal) == [b"2"]
    assert journal.unfinished(7) == [held[2]]
    assert recorded(journal) == {held[1].id, held[2].id}
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT task_id FROM adc_part").fetchall() == [(held[1].id,)]
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
    """One transaction: a result that cannot be made spoils the batch, and says so."""
    held = journal.record(7, [task(1), task(2)])

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (it is this test's own)
        journal.keep([(held[0].id, [b"one"]), (held[1].id, broken())])
    assert bodies(journal) == []


def test_a_result_of_a_job_that_was_dropped_is_not_kept(journal: Journal) -> None:
    """Its job was cancelled while it was inferred; the others of its batch are kept."""
    (gone,) = journal.record(7, [task(1)])
    (here,) = journal.record(8, [task(2)])
    with capture_logs() as said:
        assert journal.bury(7) == [gone.id]
        assert journal.bury(7) == []
    assert [one["tasks"] for one in said] == [1], "a job that simply ended is nothing to warn of"
    keep(journal, [(gone.id, b"nobody wants it"), (here.id, b"kept")])
    assert bodies(journal) == [b"kept"]


def test_a_second_delivery_joins_the_task_in_hand(journal: Journal) -> None:
    """The row stays, with the newer lease; another image, or another incarnation of the stream, is another task."""
    (held,) = journal.record(7, [task(1)])
    assert journal.find(7, task(2)) is None
    assert journal.find(7, again(1, 2, later_ns=10)) is None
    assert journal.find(7, again(1, 2)) == held
    (joined,) = journal.record(7, [again(1, 2)], 5.0)
    assert (joined.id, joined.task, joined.fetched_at) == (held.id, again(1, 2), 5.0)
    assert journal.unfinished(7) == [joined]
    journal.give_up(held.id, held.task.reply_subject)
    assert journal.unfinished(7) == [joined], "the lease that was given up is not the one it has now"
    keep(journal, [(held.id, b"done")])
    assert journal.record(7, [again(1, 2)], 6.0) == [], "its result waits already"
    assert journal.subjects() == [again(1, 2).reply_subject]


def test_unposted_results_come_oldest_first_up_to_a_number(journal: Journal) -> None:
    """Those under way are left out, and do not count."""
    held = journal.record(7, [task(number) for number in range(5)])
    keep(journal, [(one.id, b"%d" % one.id) for one in reversed(held)])
    assert bodies(journal) == [b"1", b"2", b"3", b"4", b"5"]
    assert bodies(journal, limit=2) == [b"1", b"2"]
    assert bodies(journal, excluding=(1, 3), limit=2) == [b"2", b"4"]
    assert bodies(journal, excluding=(1, 2, 3, 4, 5)) == []


def test_unposted_results_come_up_to_a_number_of_bytes_but_at_least_one(journal: Journal) -> None:
    """A backlog of thousands of megabyte results is never read into memory at once."""
    held = journal.record(7, [task(number) for number in range(4)])
    keep(journal, [(one.id, b"x" * 100) for one in held])
    assert len(bodies(journal, most_bytes=300)) == 3
    assert len(bodies(journal, most_bytes=299)) == 2
    assert len(bodies(journal, most_bytes=1)) == 1
    assert len(bodies(journal, excluding=(1, 2), most_bytes=200)) == 2


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
    assert recorded(journal) == recorded(other) == {mine.id, theirs.id}
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


# Suspects


PID = os.getpid()
SEGV = (PID, "SIGSEGV")


def crash(journal: Journal) -> Journal:
    """Come back after this process died: without the orderly end that `close` is."""
    with journal._lock:
        journal._db.close()
        os.close(journal._slot_fd)
        journal._guard.close()
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


def test_the_file_of_a_task_that_has_its_result_is_swept(journal: Journal) -> None:
    """A kill may come between keeping a result and removing its file."""
    held = journal.record(7, [task(1), task(2)])
    keep(journal, [(held[0].id, b"done")])
    assert journal.unfinished_ids() == {held[1].id}


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


@pytest.mark.parametrize("spoil", [_folder, _parent_is_a_file])
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
        "adc_journal.recovery.lock",
    ]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_rows_cannot_lose_their_task(journal: Journal) -> None:
    """Write-ahead log, and foreign keys."""
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._db.execute("PRAGMA foreign_keys").fetchone() == (1,)


# From here on this process's fsync and fdatasync answer EIO: a commit that asks for neither would go through.
_WITHOUT_FSYNC = """
import ctypes, struct, sys
from pathlib import Path
from adc_worker.journal.journal import Journal
from tests.support.fakes import recorded, task

SYNCS = {"x86_64": (74, 75), "aarch64": (82, 83)}[sys.argv[2]]
journal = Journal(Path(sys.argv[1]))
(held,) = journal.record(7, [task(1)])
code = [(0x20, 0, 0, 0), *((0x15, len(SYNCS) - 1 - index, 0, number) for index, number in enumerate(SYNCS))]
code[-1] = (0x15, 0, 1, SYNCS[-1])
code += [(0x06, 0, 0, 0x00050000 | 5), (0x06, 0, 0, 0x7FFF0000)]  # return errno 5 (EIO), or allow
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filters, 0, 0):  # no new privileges, then a seccomp filter
    sys.exit(77)
if sys.argv[3] == "normal":
    journal._db.execute("PRAGMA synchronous=NORMAL")
journal.keep([(held.id, [b"one"])])
print(journal.fault, journal.parts(held.id).__next__())
"""


@pytest.mark.skipif(platform.machine() not in {"x86_64", "aarch64"}, reason="system calls have other numbers here")
@pytest.mark.parametrize("synchronous", ["as it is", "normal"])
def test_a_result_counts_as_kept_only_when_the_disk_says_so(path: Path, synchronous: str) -> None:
    """With a disk that refuses to sync, keeping fails and the result stays in memory. NORMAL would not have asked."""
    command = [sys.executable, "-c", _WITHOUT_FSYNC, str(path), platform.machine(), synchronous]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel lets no process filter its own system calls")
    assert done.returncode == 0, done.stderr
    said = "None" if synchronous == "normal" else f"the journal {path} cannot be written: disk I/O error"
    assert done.stdout == f"{said} b'one'\n"


def test_a_journal_of_an_earlier_version_is_upgraded_and_keeps_what_it_holds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets what it lacks, once; its rows, results and numbers stay."""
    older = Journal(path)
    (held,) = older.record(7, [task(1)])
    keep(older, [(held.id, b"one")])
    older.close()
    monkeypatch.setattr("adc_worker.journal.journal._SCHEMA", (*_SCHEMA, "ALTER TABLE adc_task ADD COLUMN more TEXT"))
    for _start in range(2):
        journal = Journal(path)
        assert bodies(journal) == [b"one"]
        assert journal._column("SELECT more FROM adc_task WHERE id = ?", held.id) == [None]
        assert journal._column("PRAGMA user_version") == [NEWER]
        journal.close()


def again(number: int, delivered: int = 1, seq: int | None = None, later_ns: int = 0) -> Task:
    """Return a task's further delivery, or its image under another sequence of a later stream."""
    subject = f"$JS.ACK.job_7.job-7-consumer.{delivered}.{seq or number}.9.{1760000000000000000 + later_ns}.0"
    return Task(image_id=str(number), image_url=f"https://images.example.org/{number}.jpg", reply_subject=subject)


def test_an_accepted_image_that_comes_again_is_answered_from_the_journal(path: Path) -> None:
    """The same boxes under the new subject, and nothing to work on; also after a restart."""
    first = Journal(path)
    tell_run(first)
    held = first.record(7, [task(1), task(2)])
    keep(first, [(held[0].id, b"one" * 1000), (held[1].id, b'{"error":"x"}')])
    first.settle([held[0].id, held[1].id])
    first.close()
    journal = Journal(path)
    assert bodies(journal) == []
    tell_run(journal)
    (worked_on,) = journal.record(7, [again(1, 2), again(2, 2)])
    assert worked_on.task.image_id == "2", "an error is tried again"
    (kept,) = journal.unposted([], 10, ALL)
    assert (kept.task.reply_subject, bodies(journal)) == (again(1, 2).reply_subject, [b"one" * 1000])
    journal.close()


def test_a_lower_sequence_published_later_kills_the_subjects_of_the_earlier_stream(journal: Journal) -> None:
    """Kept results wait for their images; unfinished tasks are nobody's, and what is computed of them is dropped."""
    tell_run(journal)
    old = journal.record(7, [task(3), task(4), task(5)])
    other_job = journal.record(8, [task(4)])
    keep(journal, [(old[0].id, b"three")])
    assert journal.record(7, [again(5, seq=6, later_ns=0)]) != [], "higher and no later: the same stream"
    journal.record(7, [again(9, seq=5, later_ns=10)])
    assert bodies(journal) == []
    keep(journal, [(old[1].id, b"four")])
    assert bodies(journal) == []
    assert {held.task.image_id for held in journal.unfinished(7)} == {"9"}
    assert journal.unfinished(8) == other_job
    assert journal.newest_accepted(7) is None, "a dead subject is not repeated"
    tell_run(journal, 2)
    journal.record(7, [again(3, seq=6, later_ns=11), again(4, seq=7, later_ns=12)])
    assert bodies(journal) == [b"three"]
    assert {held.task.image_id for held in journal.unfinished(7)} == {"9", "4"}


def test_accepted_results_go_oldest_first_when_the_file_reaches_its_bound(path: Path, journal: Journal) -> None:
    """What Antenna has not accepted stays."""
    journal.most_bytes = 1_000_000
    tell_run(journal)
    for number in range(1, 41):
        (held,) = journal.record(7, [task(number)])
        keep(journal, [(held.id, os.urandom(50_000))])
        journal.settle([held.id])
    (waiting,) = journal.record(8, [task(1)])
    keep(journal, [(waiting.id, bytes(1_100_000))])
    assert journal.is_full()
    assert len(journal.record(7, [again(1, 2)])) == 1, "the oldest is gone"
    assert journal.record(7, [again(40, 2)]) == [], "the newest is there"
    assert path.stat().st_size < 4_000_000
    journal.close_job(7)
    assert journal.finished_jobs() == []
    assert len(bodies(journal)) == 2


def test_a_journal_that_cannot_be_written_keeps_in_memory_and_catches_up(path: Path, journal: Journal) -> None:
    """What was posted from there is forgotten afterwards; tasks that cannot be recorded are left to their leases."""
    held = journal.record(7, [task(1), task(2)])
    journal._db.execute("PRAGMA query_only=ON")
    keep(journal, [(held[0].id, b"one"), (held[1].id, b"two")])
    assert journal.fault == f"the journal {path} cannot be written: attempt to write a readonly database"
    assert not journal.check_writable()
    assert bodies(journal) == [b"one", b"two"]
    assert journal.unfinished(7) == []
    assert journal.record(7, [task(3)]) == []
    journal.settle([held[0].id])
    assert bodies(journal) == [b"two"]
    assert journal.unposted_count() == 1
    journal._db.execute("PRAGMA query_only=OFF")
    assert journal.check_writable()
    assert journal.fault is None
    assert (bodies(journal), recorded(journal)) == ([b"two"], {held[1].id})


def test_a_network_file_system_gets_a_rollback_journal_and_slots_of_its_host(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers there share no memory, and locks of other hosts may not show."""
    monkeypatch.setattr("adc_worker.journal.journal.file_system", lambda _folder: "nfs4")
    journal = Journal(path)
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert journal.slot >= 256
    other_hosts = journal.slot + 256
    journal.record(7, [task(1)])
    journal._db.execute("UPDATE adc_task SET slot = ?", (other_hosts,))
    journal._db.commit()
    journal.close()
    again_here = Journal(path)
    assert again_here.unfinished(7) == []
    again_here.close()


def test_what_opens_a_url_is_erased_and_commits_reach_the_disk_again(journal: Journal) -> None:
    """Erasing alone need not: a power cut that brings a signature back brings it back into a private file."""
    public, signed = task(1), task(2).model_copy(update={"image_url": "https://h/2.jpg?X-Signature=canary"})
    for held in journal.record(7, [public, signed]):
        journal.erase_url(held)
    assert [(held.task.image_url, held.url_erased) for held in journal.unfinished(7)] == [
        (public.image_url, False),
        ("https://h/2.jpg", True),
    ]
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)


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


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most memory that was taken meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def noisy(number: int, size_bytes: int) -> bytes:
    """Return a result that cannot be compressed."""
    return b'{"pipeline":"moths",' + random.Random(number).randbytes(size_bytes)  # noqa: S311 (no secret)


def test_whether_a_job_has_succeeded_is_seen_from_the_starts_of_its_results(journal: Journal) -> None:
    """That is asked at the end of every turn, and results may have megabytes each."""
    held = journal.record(7, [task(number) for number in range(1, 21)])
    keep(journal, [(one.id, noisy(one.id, 500_000)) for one in held])
    assert peak_bytes(lambda: journal.has_success(7)) < 400_000
    journal.settle([one.id for one in held])
    assert peak_bytes(lambda: journal.has_success(7)) < 400_000
    assert journal.has_success(7)


def test_errors_alone_are_no_success_of_a_job(journal: Journal) -> None:
    """Neither kept nor accepted ones."""
    held = journal.record(7, [task(1), task(2)])
    keep(journal, [(one.id, b'{"error":"no JPEG"}') for one in held])
    assert not journal.has_success(7)
    journal.settle([held[0].id])
    assert not journal.has_success(7)
    (other,) = journal.record(7, [task(3)])
    keep(journal, [(other.id, noisy(3, 10))])
    assert journal.has_success(7)


def test_a_job_is_retired_without_all_its_results_in_memory(journal: Journal) -> None:
    """A hundred of them are 20 MB here; in a large job they may be gigabytes."""
    held = journal.record(7, [task(number) for number in range(1, 101)])
    keep(journal, [(one.id, noisy(one.id, 200_000)) for one in held])
    assert peak_bytes(lambda: journal.bury(7)) < 15_000_000
    assert journal.unposted([], 100, ALL) == []


def test_results_that_are_left_out_of_a_post_are_not_read(journal: Journal) -> None:
    """Thousands of them may wait for a proof while every post is put together."""
    held = journal.record(7, [task(number) for number in range(1, 1001)])
    keep(journal, [(one.id, b"result") for one in held])
    waiting = {one.id for one in held[:-2]}
    assert peak_bytes(lambda: journal.unposted(waiting, 50, ALL)) < 200_000
    assert [kept.id for kept in journal.unposted(waiting, 50, ALL)] == [held[-2].id, held[-1].id]
    assert journal.held_count(7, waiting) == 2
