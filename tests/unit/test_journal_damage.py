"""A damaged journal is set aside, what can be read of it is kept, and no row is ever a wrong one."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from adc_worker.antenna.leases import lease_clock
from adc_worker.antenna.wire import Task
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.journal.journal import Journal, LockPatience
from tests.support.fakes import task
from tests.support.waiting import wait_until

PAGE_BYTES = 4096
ALL = 1 << 40
JOB_ID = 7
RUN = "created moths/run 1"
TASKS_PER_PAGE = 30  # at most: a task takes about 150 bytes
ROOTS = 2  # the schema, and the root of the tasks: without them there is no way to the others
HASTY = LockPatience(wait_s=0.02, fault_s=0.2, end_s=0.4)


def noise(seed: int | str, size_bytes: int) -> bytes:
    """Return bytes that look like no others, and the same ones for a seed."""
    return random.Random(seed).randbytes(size_bytes)  # noqa: S311 (no secret)


def body_of(image_id: str) -> bytes:
    """Return an image's result: what it says shows whose it is, and it spreads over several pages."""
    filler = noise(image_id, 4000).hex()  # nothing that a page of another result could hold
    return b'{"image":"%s","filler":"%s"}' % (image_id.encode(), filler.encode())


def fill(path: Path, tasks: int = 100, kept: int = 4, accepted: int = 2) -> list[Task]:
    """Make a journal as an orderly end leaves it; return its tasks, of which the first have a result."""
    journal = Journal(path)
    journal.note_served(JOB_ID, RUN, lease_clock())
    before = journal.record(JOB_ID, [task(number) for number in range(1001, 1001 + accepted)])
    journal.keep([(held.id, [body_of(held.task.image_id)]) for held in before])
    journal.settle([held.id for held in before])
    fetched = [task(number) for number in range(2001, 2001 + tasks)]
    held_tasks = journal.record(JOB_ID, fetched)
    journal.keep([(held.id, [body_of(held.task.image_id)]) for held in held_tasks[:kept]])
    journal.close()
    return fetched


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
    comes_again = [task(number).model_copy(update={"reply_subject": f"again {number}"}) for number in (1001, 1002)]
    journal.note_served(JOB_ID, RUN, lease_clock())
    journal.record(JOB_ID, comes_again)
    for held in journal.unposted([], 1000, ALL):
        if held.task in comes_again:
            assert b"".join(journal.parts(held.id)) in {b"", body_of(held.task.image_id)}
    return len(unfinished) + len(kept)


Damage = Callable[[bytes, bytes], bytes]


def _zeros(page: bytes, _all: bytes) -> bytes:
    return bytes(len(page))


def _noise(page: bytes, _all: bytes) -> bytes:
    return noise(1, len(page))


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


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Task]]:
    """Return the bytes of a journal, and its tasks."""
    path = tmp_path_factory.mktemp("sound") / "adc_journal.db"
    tasks = fill(path)
    return path.read_bytes(), tasks


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: that the disk has everything is tested elsewhere, and takes time."""
    memory = Path("/dev/shm")  # noqa: S108 (a folder with a name of its own is made in it)
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "adc_journal.db"


def left_open(path: Path) -> None:
    """Leave a slot as a power cut does."""
    path.with_name("adc_journal.0.lock").write_bytes(b"open\n")


def left_orderly(path: Path) -> None:
    path.with_name("adc_journal.0.lock").write_bytes(b"clean\n")


def sweep(folder: Path, sound: tuple[bytes, list[Task]], kind: Damage, ended: Callable[[Path], None]) -> int:
    """Damage each page in turn; return of how many the damage was noticed."""
    content, tasks = sound
    noticed = 0
    costly = 0  # pages that cost more tasks than are on a page
    for number in range(len(content) // PAGE_BYTES):
        path = folder / str(number) / "adc_journal.db"
        path.parent.mkdir()
        start = number * PAGE_BYTES
        page = content[start : start + PAGE_BYTES]
        path.write_bytes(content[:start] + kind(page, content) + content[start + PAGE_BYTES :])
        ended(path)
        with capture_logs() as said, closing(Journal(path)) as journal:
            found = assert_nothing_is_wrong(journal, tasks)
            if found < len(tasks) - TASKS_PER_PAGE:
                costly += 1
            (held,) = journal.record(8, [task(9999)])
            journal.keep([(held.id, [b"new"])])
        set_aside = damaged_files(path)
        assert len(set_aside) <= 1, f"page {number}"
        assert [one["event"] for one in said].count("journal_damaged") == len(set_aside)
        with closing(Journal(path)) as journal:
            assert [b"".join(journal.parts(one.id)) for one in journal.unposted([], 1000, ALL)][-1] == b"new"
        assert damaged_files(path) == set_aside, "a second start finds nothing"
        noticed += len(set_aside)
    assert costly <= ROOTS, "of all other pages what is readable was read"
    return noticed


def test_whatever_page_is_damaged_the_journal_works_and_no_row_is_wrong(
    folder: Path, sound: tuple[bytes, list[Task]]
) -> None:
    """Each page in turn, though the last end was orderly: at most one file is set aside, and only once."""
    assert sweep(folder, sound, _zeros, left_orderly) >= 8


@pytest.mark.soak
@pytest.mark.parametrize("ended", [left_open, left_orderly])
@pytest.mark.parametrize("kind", [_zeros, _noise, _torn, _torn_at_its_start, _flipped, _misplaced])
def test_whatever_the_damage_no_row_is_wrong(folder: Path, kind: Damage, ended: Callable[[Path], None]) -> None:
    """The same with more kinds of damage, in a journal of more pages."""
    path = folder / "sound" / "adc_journal.db"
    tasks = fill(path, tasks=200, kept=20)
    assert sweep(folder, (path.read_bytes(), tasks), kind, ended) >= 8


def damage_table(path: Path, table: str, *, checkpoint: bool = True) -> None:
    """Overwrite the page that a table begins with, as a disk does, behind the back of whoever has it open."""
    with closing(sqlite3.connect(path)) as db:
        if checkpoint:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    with path.open("r+b") as file:
        file.seek((root - 1) * PAGE_BYTES)
        file.write(noise(2, PAGE_BYTES))


@pytest.mark.parametrize("table", ["adc_task", "adc_task_image", "adc_task_slot"])
def test_damage_while_the_worker_runs_costs_no_task_and_no_result(path: Path, table: str) -> None:
    """What cannot be read of the file is still known to its worker: every task goes on under its own number."""
    with closing(Journal(path)) as journal:
        held = journal.record(JOB_ID, [task(number) for number in range(1, 31)])
        # More than a connection keeps in memory, so that it reads the damaged page.
        journal.keep([(one.id, [noise(one.id, 900_000)]) for one in held[:5]])
        damage_table(path, table)
        with capture_logs() as said:
            journal.keep([(held[5].id, [b"computed meanwhile"])])
            journal.begin([one.id for one in held[6:8]], 0, alone=False)
            journal.forget([held[9].id])
            found = {one.id for one in journal.unfinished(JOB_ID)}
            kept = {one.id: b"".join(journal.parts(one.id)) for one in journal.unposted([], 100, ALL)}
        assert "journal_damaged" in [one["event"] for one in said]
        assert found == {one.id for one in held[6:]} - {held[9].id}
        assert kept[held[5].id] == b"computed meanwhile"
        assert [kept[one.id] for one in held[:5]] == [noise(one.id, 900_000) for one in held[:5]]
        assert journal.unfinished(JOB_ID)[0].task == held[6].task
        assert journal.check_writable()
        (new,) = journal.record(JOB_ID, [task(99)])
        assert new.id > max(one.id for one in held)
    assert len(damaged_files(path)) == 1


def test_a_result_that_is_lost_with_its_page_is_computed_again(path: Path) -> None:
    """Its task is unfinished again; a result that is whole stays."""
    with closing(Journal(path)) as journal:
        lost, whole = journal.record(JOB_ID, [task(1), task(2)])
        journal.keep([(lost.id, [noise(1, 3_000_000)]), (whole.id, [b"whole"])])
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with path.open("r+b") as file:
            file.seek(1_500_000)
            file.write(bytes(8 * PAGE_BYTES))
        list(journal.parts(lost.id))
        assert [one.id for one in journal.unfinished(JOB_ID)] == [lost.id]
        assert [(one.id, b"".join(journal.parts(one.id))) for one in journal.unposted([], 9, ALL)] == [
            (whole.id, b"whole")
        ]


def test_what_was_forgotten_does_not_come_back_from_a_damaged_file(path: Path) -> None:
    """A lost log brings back rows that were removed: their subjects may acknowledge other images by now."""
    with closing(Journal(path)) as journal:
        forgotten, here = journal.record(JOB_ID, [task(1), task(2)])
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        journal.forget([forgotten.id])
        damage_table(path, "adc_task_image", checkpoint=False)
        os.truncate(f"{path}-wal", 0)
        journal.keep([(here.id, [noise(1, 9_000_000)])])
        assert [one.id for one in journal.unposted([], 9, ALL)] == [here.id]
        assert journal.unfinished(JOB_ID) == []
    assert len(damaged_files(path)) == 1


@pytest.mark.parametrize(("ended", "files"), [(left_open, 1), (left_orderly, 0)])
def test_after_an_unclean_end_all_of_the_file_is_checked(path: Path, ended: Callable[[Path], None], files: int) -> None:
    """Before anything is fetched; after an orderly one only what takes no time, and the rest when it is read."""
    fill(path)
    with closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_adc_part_1'").fetchone()
    with path.open("r+b") as file:
        file.seek((root - 1) * PAGE_BYTES)
        file.write(noise(2, PAGE_BYTES))
    ended(path)
    journal = Journal(path)
    set_aside = len(damaged_files(path))
    journal.close()
    assert set_aside == files


def _noise_throughout(path: Path) -> None:
    """Damage every page of the file that is open."""
    size_bytes = path.stat().st_size
    with path.open("r+b") as file:
        file.write(noise(3, size_bytes))


def _another_file(path: Path) -> None:
    """Put a file that is no journal in the place of the one that is open."""
    other = path.with_name("other")
    other.write_bytes(b"holiday photographs " * 1000)
    other.rename(path)


@pytest.mark.parametrize("spoil", [_noise_throughout, _another_file] * 3)
def test_damage_that_many_threads_meet_is_mended_once(path: Path, spoil: Callable[[Path], None]) -> None:
    """None of them sees a journal without its file, and none sets the fresh file aside."""
    with closing(Journal(path)) as journal:
        held = journal.record(JOB_ID, [task(number) for number in range(1, 41)])
        # Each thread reads a result of its own: all of them are more than a connection keeps in memory.
        journal.keep([(one.id, [noise(one.id, 900_000)]) for one in held[:8]])
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        spoil(path)
        together = threading.Barrier(8)

        def work(number: int) -> None:
            together.wait()
            b"".join(journal.parts(held[number].id))
            for one in held[8 + 4 * number : 12 + 4 * number]:
                journal.keep([(one.id, [noise(one.id, 1000)])])
                journal.unposted([], 100, ALL)
                journal.is_full()

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
        kept = {one.id for one in journal.unposted([], 100, ALL)}
        again = {one.id for one in journal.unfinished(JOB_ID)}
        assert kept >= {one.id for one in held[8:]}
        assert kept | again == {one.id for one in held}
    assert len(damaged_files(path)) == 1


def test_an_exchange_that_fails_is_tried_again_with_all_that_is_remembered(path: Path) -> None:
    """The disk may be full just then."""
    with closing(Journal(path)) as journal:
        held = journal.record(JOB_ID, [task(1), task(2)])
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        obstacle = path.with_name(f"{path.name}.incomplete")
        obstacle.mkdir()
        _another_file(path)
        for _time in range(2):
            with pytest.raises(IsADirectoryError):
                journal.unfinished(JOB_ID)
        obstacle.rmdir()
        assert journal.unfinished(JOB_ID) == held
    assert len(damaged_files(path)) == 1


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _no_database(path: Path) -> None:
    path.write_bytes(b"holiday photographs " * 1000)


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3 // PAGE_BYTES * PAGE_BYTES)


def _truncated_in_a_page(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def _without_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        for table in ("adc_part", "adc_task"):
            db.execute(f"DROP TABLE {table}")


def _another_files_log(path: Path) -> None:
    other = path.with_name("other.db")
    with closing(sqlite3.connect(other)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE x (y)")
        db.executemany("INSERT INTO x VALUES (?)", [(bytes(5000),)] * 20)
        db.commit()
        shutil.copy(f"{other}-wal", f"{path}-wal")


SPOILT = [_empty, _no_database, _truncated, _truncated_in_a_page, _without_tables, _another_files_log]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_file_that_is_no_journal_any_more_is_set_aside_at_the_start(
    path: Path, spoil: Callable[[Path], None]
) -> None:
    """With everything that belongs to it, under a name of its own, and one line that says what to do."""
    tasks = fill(path)
    spoil(path)
    left_open(path)
    content = path.read_bytes()
    with capture_logs() as said, closing(Journal(path)) as journal:
        found = assert_nothing_is_wrong(journal, tasks)
        (line,) = [one for one in said if one["event"] == "journal_damaged"]
        (aside,) = damaged_files(path)
        assert line["log_level"] == "error"
        assert line["tasks_read"] == found
        assert line["set_aside"] == str(aside)
        assert f"sqlite3 {aside} .recover" in line["do"]
        (new,) = journal.record(8, [task(5)])
        assert new.id > len(tasks) + 2, "numbers are names of files, and are not used again"
    if spoil is not _another_files_log:
        assert aside.read_bytes()[:100] == content[:100]


@pytest.mark.parametrize("spoil", [_empty, _no_database, _truncated, Path.unlink])
def test_a_file_that_is_lost_while_the_worker_runs_is_made_anew_from_memory(
    path: Path, spoil: Callable[[Path], None]
) -> None:
    """Also one that somebody removed."""
    with closing(Journal(path)) as journal:
        held = journal.record(JOB_ID, [task(number) for number in range(1, 31)])
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        spoil(path)
        journal.keep([(held[0].id, [noise(1, 3_000_000)])])
        assert {one.id for one in journal.unfinished(JOB_ID)} == {one.id for one in held[1:]}
        assert [one.id for one in journal.unposted([], 9, ALL)] == [held[0].id]
        assert journal.check_writable()
    with closing(Journal(path)) as journal:
        assert len(journal.unfinished(JOB_ID)) == 29


@pytest.mark.parametrize("spoil", [_empty, _no_database, partial(damage_table, table="adc_task"), Path.unlink])
def test_workers_that_share_a_damaged_journal_set_it_aside_once_and_lose_nothing(
    path: Path, spoil: Callable[[Path], None]
) -> None:
    """Whoever finds it first exchanges the file; the others go on with the new one, each with its own tasks."""
    with closing(Journal(path)) as first, closing(Journal(path)) as second, capture_logs() as said:
        mine = first.record(JOB_ID, [task(number) for number in range(1, 11)])
        theirs = second.record(JOB_ID, [task(number) for number in range(11, 21)])
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        spoil(path)
        for journal, held in ((first, mine), (second, theirs), (first, mine)):
            journal.keep([(held[0].id, [noise(held[0].id, 3_000_000)])])
            journal.erase_url(held[1])
        assert {one.id for one in first.unfinished(JOB_ID)} == {one.id for one in mine[1:]}
        assert {one.id for one in second.unfinished(JOB_ID)} == {one.id for one in theirs[1:]}
        assert [one["event"] for one in said].count("journal_damaged") == 1
    with closing(Journal(path)) as third:
        assert len(third.unfinished(JOB_ID)) == 18
        assert {one.id for one in third.unposted([], 9, ALL)} == {mine[0].id, theirs[0].id}
    assert len(damaged_files(path)) <= 1


def test_a_disk_that_damages_the_file_again_and_again_ends_the_worker(path: Path) -> None:
    """With the code that no supervisor restarts on, and what to do; until then every file is set aside by itself."""
    for _time in range(3):
        _no_database(path)
        Journal(path).close()
    assert len(damaged_files(path)) == 3
    _no_database(path)
    with pytest.raises(WorkerFault, match=r"for the 4th time within an hour: check the disk") as caught:
        Journal(path)
    assert caught.value.exit_code is ExitCode.JOURNAL_UNUSABLE


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without rights on the folder")
def test_a_damaged_file_that_cannot_be_set_aside_ends_the_worker(path: Path) -> None:
    """With the code that no supervisor restarts on, and what to do."""
    _no_database(path)
    Journal(path).close()
    _no_database(path)
    path.chmod(0o666)
    for lock in path.parent.glob("*.lock"):
        lock.chmod(0o666)  # the folder alone forbids
    path.parent.chmod(0o755)
    code = (
        "import os, sys; from pathlib import Path; from adc_worker.journal.journal import Journal;"
        "from adc_worker.errors import WorkerFault; os.setuid(65534)\n"
        "try: Journal(Path(sys.argv[1]))\n"
        "except WorkerFault as fault: print(fault.exit_code.name, fault)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("JOURNAL_UNUSABLE"), done.stderr
    assert f"let this user write to {path.parent}" in done.stdout
    assert path.read_bytes().startswith(b"holiday"), "it is left as it is"


def test_an_exchange_that_a_crash_broke_off_is_finished_at_the_next_start(path: Path) -> None:
    """The fresh file is complete before the damaged one is moved."""
    fill(path)
    path.rename(f"{path}.recovered")
    _no_database(path)
    with closing(Journal(path)) as journal:
        assert len(journal.unposted([], 100, ALL)) == 4
    assert len(damaged_files(path)) == 1


# Locked by another program


@contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Hold the write lock, as a backup or a shell does."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield db


def test_while_another_program_holds_the_journal_results_wait_in_memory_and_that_is_no_fault(path: Path) -> None:
    """They are seen and posted from there, nothing is fetched, and the file gets them when it is free."""
    with closing(Journal(path, LockPatience(wait_s=0.02))) as journal, capture_logs() as said:
        first, second = journal.record(JOB_ID, [task(1), task(2)])
        with locked(path):
            journal.keep([(first.id, [b"one"]), (second.id, [b"two"])])
            assert not journal.check_writable()
            assert journal.fault is None
            assert [b"".join(journal.parts(one.id)) for one in journal.unposted([], 9, ALL)] == [b"one", b"two"]
            journal.settle([first.id])
        assert journal.check_writable()
        assert [b"".join(journal.parts(one.id)) for one in journal.unposted([], 9, ALL)] == [b"two"]
    events = [one["event"] for one in said]
    assert events == ["journal_locked", "journal_unlocked"]
    assert "end the program that holds the file" in said[0]["do"]


def test_a_lock_that_lasts_is_a_fault(path: Path) -> None:
    """The GPU pauses then, and five minutes of it end the process."""
    with closing(Journal(path, HASTY)) as journal:
        (held,) = journal.record(JOB_ID, [task(1)])
        with locked(path):
            journal.keep([(held.id, [b"one"])])
            wait_until(lambda: not journal.check_writable() and journal.fault is not None)
            assert "end the program that holds it" in (journal.fault or "")
        assert journal.check_writable()
        assert journal.fault is None


def test_fetched_tasks_wait_for_a_lock_to_end(path: Path) -> None:
    """Or each would spend a delivery."""
    with closing(Journal(path, LockPatience(wait_s=0.02))) as journal:
        with locked(path) as db:
            free_it = threading.Timer(0.1, db.execute, ["ROLLBACK"])
            free_it.start()
            held = journal.record(JOB_ID, [task(1)])
            free_it.join()
        assert [one.task for one in held] == [task(1)]


def test_a_journal_can_be_opened_while_another_program_holds_its_lock(path: Path) -> None:
    """Nothing has to be written for that, unless a worker left something."""
    fill(path)
    with locked(path), closing(Journal(path, HASTY)) as journal:
        assert len(journal.unposted([], 9, ALL)) == 4


def test_a_journal_that_is_locked_when_it_has_to_be_written_at_a_start_is_waited_for(path: Path) -> None:
    """The fault says that waiting helps."""
    path.touch()
    with locked(path), pytest.raises(WorkerFault, match="database is locked") as caught:
        Journal(path, HASTY)
    assert caught.value.exit_code is ExitCode.MACHINE_FAULT


# A disk that is low


def test_below_the_reserve_nothing_is_fetched_and_results_are_kept(path: Path) -> None:
    """To work off what is staged frees the disk; it is said once that it is low, and once that this is over."""
    free = [1 << 40]
    with closing(Journal(path, free_bytes=lambda _folder: free[0])) as journal, capture_logs() as said:
        (held,) = journal.record(JOB_ID, [task(1)])
        free[0] = 1_000_000
        for _time in range(3):
            assert not journal.check_writable()
        assert journal.fault is None
        assert journal.shortage == f"the disk of the journal {path} has 1000000 bytes left"
        journal.keep([(held.id, [b"one"])])
        with closing(Journal(path)) as other:
            assert other.jobs_of_others() == {JOB_ID}
        free[0] = 1 << 40
        assert journal.check_writable()
        assert journal.shortage is None
    assert [one["event"] for one in said] == ["journal_disk_low", "journal_disk_low_over"]


def test_results_in_memory_are_bounded(path: Path) -> None:
    """Where the file takes none, nothing more is computed once they are many."""
    with closing(Journal(path, LockPatience(wait_s=0.02))) as journal:
        first, second = journal.record(JOB_ID, [task(1), task(2)])
        with locked(path):
            journal.keep([(first.id, [bytes(60_000_000)])])
            assert not journal.is_full()
            journal.keep([(second.id, [bytes(60_000_000)])])
            assert journal.is_full()


# A worker of its own process: `keep N` keeps a large result of its task N; each command is answered with what it sees.
_WORKER = """
import sys
from pathlib import Path
from adc_worker.journal.journal import Journal
from tests.support.fakes import task
journal = Journal(Path(sys.argv[1]))
first = int(sys.argv[2])
held = journal.record(7, [task(number) for number in range(first, first + 10)])
print('now', len(journal.unfinished(7)), journal.unposted_count(), flush=True)
for line in sys.stdin:
    journal.keep([(held[int(line.split()[1])].id, [bytes(2_000_000)])])
    print('now', len(journal.unfinished(7)), journal.unposted_count(), flush=True)
journal.close()
"""


@pytest.mark.parametrize("spoil", [_empty, _no_database, partial(damage_table, table="adc_task"), Path.unlink])
def test_processes_that_share_a_damaged_journal_lose_nothing(path: Path, spoil: Callable[[Path], None]) -> None:
    """SQLite removes logs by their name when a file is closed: never that of the file that took its place."""

    def ask(process: subprocess.Popen[str], command: str) -> list[int]:
        assert process.stdin is not None
        assert process.stdout is not None
        if command:
            process.stdin.write(command + "\n")
            process.stdin.flush()
        (line,) = islice((line for line in process.stdout if line.startswith("now ")), 1)  # beside its log
        return [int(count) for count in line.split()[1:]]

    with ExitStack() as running:
        workers = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _WORKER, str(path), str(first)],
                    cwd=Path(__file__).parents[2],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for first in (1, 101)
        ]
        assert [ask(process, "") for process in workers] == [[10, 0], [10, 0]]
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        spoil(path)
        assert [ask(process, "keep 0") for process in workers] == [[9, 1], [9, 1]]
        assert [ask(process, "keep 1") for process in workers] == [[8, 2], [8, 2]]
        assert Path(f"{path}-wal").exists()
        for process in workers:
            process.communicate(timeout=20)
            assert process.returncode == 0
    with closing(Journal(path)) as journal:
        assert len(journal.unfinished(JOB_ID)) == 16
        assert len(journal.unposted([], 9, ALL)) == 4


def test_a_number_that_is_another_workers_in_the_file_in_place_now_stays_with_that_worker(tmp_path: Path) -> None:
    """Somebody put another journal's file in place. What this worker remembers must not overwrite that one's tasks."""
    here = tmp_path / "here" / "journal.db"
    there = tmp_path / "there" / "journal.db"
    with closing(Journal(there)), closing(Journal(there)) as other:
        (theirs,) = other.record(JOB_ID, [task(2)])
        other.keep([(theirs.id, [b"theirs"])])
    with closing(Journal(here)) as journal:
        (mine,) = journal.record(JOB_ID, [task(1)])
        assert mine.id == theirs.id
        for side in ("-wal", "-shm"):
            here.with_name(f"{here.name}{side}").unlink(missing_ok=True)
        there.rename(here)
        with capture_logs() as said:
            assert journal.unfinished(JOB_ID) == []
        journal.keep([(mine.id, [b"mine"])])
        assert [one["event"] for one in said].count("task_numbers_taken") == 1
        (new,) = journal.record(JOB_ID, [task(3)])
        assert new.id != theirs.id
    with closing(sqlite3.connect(here)) as db:
        rows = db.execute("SELECT image_id, body FROM adc_task JOIN adc_part ON id = task_id").fetchall()
    assert rows == [("2", b"theirs")]


def test_a_start_that_is_cut_short_leaves_the_check_to_the_next_one(path: Path) -> None:
    """A worker ended uncleanly in another slot; who came next had not yet checked the file when it ended itself."""
    with closing(Journal(path)), closing(Journal(path)):
        pass
    path.with_name("adc_journal.1.lock").write_bytes(b"open\n")
    with closing(sqlite3.connect(path)) as holder:
        holder.execute("PRAGMA locking_mode=EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(WorkerFault, match="cannot be opened"):
            Journal(path, HASTY)
    said_open = [lock.name for lock in path.parent.glob("adc_journal.[0-9].lock") if lock.read_bytes() == b"open\n"]
    assert sorted(said_open) == ["adc_journal.0.lock", "adc_journal.1.lock"]
    with closing(Journal(path)):
        assert path.with_name("adc_journal.1.lock").read_bytes() == b"clean\n"
