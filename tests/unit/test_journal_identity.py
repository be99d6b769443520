"""Who a journal is, whatever its path, and who works on what, whatever the process ids."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from adc_worker.antenna.wire import Task
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.download import ImageClient
from adc_worker.ingest.staging import StagingArea
from adc_worker.journal.journal import Journal
from tests.support.fakes import task
from tests.support.images import jpeg, written

# The tables as the version before made them.
VERSION_1 = """
CREATE TABLE adc_task (id INTEGER PRIMARY KEY AUTOINCREMENT, slot INTEGER NOT NULL, job_id INTEGER NOT NULL,
    image_id TEXT NOT NULL, image_url TEXT NOT NULL, url_erased INTEGER NOT NULL DEFAULT 0,
    reply_subject TEXT NOT NULL, seq INTEGER, published_ns INTEGER, fetched_at REAL NOT NULL, runner INTEGER,
    oom_kills INTEGER, strikes TEXT, result_bytes INTEGER);
CREATE INDEX adc_task_slot ON adc_task (slot, job_id);
CREATE INDEX adc_task_image ON adc_task (job_id, image_id);
CREATE TABLE adc_part (task_id INTEGER NOT NULL REFERENCES adc_task (id) ON DELETE CASCADE, number INTEGER NOT NULL,
    body BLOB NOT NULL, PRIMARY KEY (task_id, number));
CREATE TABLE adc_finished (id INTEGER PRIMARY KEY AUTOINCREMENT, job_id INTEGER NOT NULL, image_id TEXT NOT NULL,
    reply_subject TEXT, seq INTEGER, published_ns INTEGER, body BLOB NOT NULL, UNIQUE (job_id, image_id));
PRAGMA user_version = 1;
"""


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _open(opened: ExitStack, path: Path) -> Journal:
    return opened.enter_context(closing(Journal(path)))


def _version_1(path: Path, *rows: tuple[int, Task, int | None]) -> None:
    """Write a journal of the version before: number, task and size of the result of each row."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
        for number, one, result_bytes in rows:
            db.execute(
                "INSERT INTO adc_task (id, slot, job_id, image_id, image_url, url_erased, reply_subject, seq,"
                " published_ns, fetched_at, runner, oom_kills, result_bytes) VALUES (?, 0, 7, ?, ?, 1, ?, ?,"
                " 1760000000000000000, 1.0, ?, 0, ?)",
                (number, one.image_id, one.image_url, one.reply_subject, int(one.image_id), os.getpid(), result_bytes),
            )
        db.commit()


def test_journals_in_one_directory_stage_apart(tmp_path: Path, opened: ExitStack) -> None:
    """Both number their tasks alike: in one folder each would take the other's images for its own."""
    first, second = _open(opened, tmp_path / "a.db"), _open(opened, tmp_path / "b.db")
    assert first.staging_name != second.staging_name
    again = _open(opened, tmp_path / "a.db")
    assert again.staging_name == first.staging_name


@pytest.mark.parametrize("spelling", ["symlink", "symlinked folder", "dots", "relative", "moved"])
def test_a_journal_is_the_same_under_every_name(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """Workers that spell its path differently are told apart by their slots, and stage in one folder."""
    folder = tmp_path / "data"
    path = folder / "a.db"
    with ExitStack() as first:
        name = _open(first, path).staging_name
        if spelling != "moved":
            opened.push(first.pop_all())
    (tmp_path / "link.db").symlink_to(path)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    spelt = {
        "symlink": tmp_path / "link.db",
        "symlinked folder": tmp_path / "link" / "a.db",
        "dots": folder / ".." / "data" / "a.db",
        "relative": Path("data/a.db"),
        "moved": tmp_path / "moved.db",
    }[spelling]
    if spelling == "moved":
        path.rename(spelt)
    other = _open(opened, spelt)
    assert other.staging_name == name
    assert other.slot == (0 if spelling == "moved" else 1)


def test_a_copy_of_a_journal_stages_by_itself(tmp_path: Path, opened: ExitStack) -> None:
    """Both go on with the same numbers. The one that lies where it lay stays who it is."""
    original, copy = tmp_path / "a.db", tmp_path / "b.db"
    with closing(Journal(original)) as journal:
        journal.record(7, [task(1)])
        name = journal.staging_name
    shutil.copy(original, copy)
    names = [_open(opened, path).staging_name for path in (copy, original, copy)]
    assert names[0] == names[2] != name
    assert names[1] == name


def test_a_journal_with_two_names_of_its_own_is_refused(tmp_path: Path) -> None:
    """The locks of SQLite and ours lie beside a name: two workers would destroy the file."""
    Journal(tmp_path / "a.db").close()
    os.link(tmp_path / "a.db", tmp_path / "b.db")
    with pytest.raises(WorkerFault, match="has another name") as caught:
        Journal(tmp_path / "b.db")
    assert caught.value.exit_code is ExitCode.JOURNAL_UNUSABLE


def test_a_journal_put_back_from_a_backup_takes_no_staged_file_for_another_tasks(
    tmp_path: Path, opened: ExitStack
) -> None:
    """The numbers after the backup come again, and name files of images that had them before."""
    path, backup, folder = tmp_path / "a.db", tmp_path / "backup", tmp_path / "staging"
    images = opened.enter_context(ImageClient(1_000_000, AddressPolicy("127.0.0.1")))
    with closing(Journal(path)) as journal:
        journal.record(7, [task(1)])
    shutil.copy(path, backup)
    with closing(Journal(path)) as journal:
        (held,) = journal.record(7, [task(2)])
        area = StagingArea(folder, images, 1_000_000, owner=journal.staging_name)
        written(tmp_path / f"{held.id}.img", jpeg(30, 20))
        area.adopt(tmp_path, {held.id: held.task})
        assert area.stage(held.id, held.task, bool, url_erased=True).header.shape == (20, 30, 3)
    shutil.copy(backup, path)
    journal = _open(opened, path)
    (other,) = journal.record(7, [task(3)])
    area = StagingArea(folder, images, 1_000_000, owner=journal.staging_name)
    assert other.id == held.id
    with pytest.raises(Exception, match="its URL opens no more"):
        area.stage(other.id, other.task, bool, url_erased=True)


def test_a_journal_of_the_version_before_keeps_its_tasks_and_nothing_it_could_misread(
    tmp_path: Path, opened: ExitStack
) -> None:
    """Results wait for a proof of their run, marks of bare process ids strike nobody, images stay staged."""
    path, folder = tmp_path / "a.db", tmp_path / "staging"
    folder.mkdir()
    _version_1(path, (1, task(1), None), (2, task(2), 3))
    written(folder / "1.img", jpeg(30, 20))
    written(folder / "9.img", jpeg(10, 10))
    journal = _open(opened, path)
    (unfinished,) = journal.unfinished(7)
    (kept,) = journal.unposted([], 10, 1000)
    assert (unfinished.task, kept.task) == (task(1), task(2))
    assert not journal.is_live(kept)
    assert journal.accuse((os.getpid(), "SIGSEGV"), 5) == 1
    assert journal.unfinished(7)[0].strikes == ()
    earlier = journal.own_earlier_staging(folder)
    assert earlier == folder
    images = opened.enter_context(ImageClient(1_000_000, AddressPolicy("127.0.0.1")))
    area = StagingArea(folder, images, 1_000_000, owner=journal.staging_name)
    assert area.adopt(earlier, journal.unfinished_tasks()) == 1
    assert area.stage(1, unfinished.task, bool, url_erased=True).header.shape == (20, 30, 3)
    again = _open(opened, path)
    assert again.own_earlier_staging(folder) is None, "an upgrade happens once"


@pytest.mark.parametrize("upgraded", [True, False])
def test_what_two_journals_staged_in_one_folder_is_adopted_by_neither(
    tmp_path: Path, opened: ExitStack, *, upgraded: bool
) -> None:
    """The version before put both beside the files, by numbers alone: whose image is in a file is not known."""
    for name in ("a.db", "b.db"):
        _version_1(tmp_path / name, (1, task(1), None))
    (tmp_path / "staging").mkdir()
    journals = [_open(opened, tmp_path / name) for name in ("a.db", "b.db")] if upgraded else []
    journals = journals or [_open(opened, tmp_path / "a.db")]
    assert [one.own_earlier_staging(tmp_path / "staging") for one in journals] == [None] * len(journals)


# The second process has the process id of this one, as children of two containers have.
_OTHER_CONTAINER = """
import os, sys
from pathlib import Path
from adc_worker.journal.journal import Journal
from tests.support.fakes import task
same_pid = int(sys.argv[2])
os.getpid = lambda: same_pid
journal = Journal(Path(sys.argv[1]))
(held,) = journal.record(8, [task(2)])
journal.begin([held.id], 0, alone=True)
print(journal.slot)
journal.close()
"""


def test_a_process_of_another_container_with_the_same_id_leaves_the_marks_of_this_one(tmp_path: Path) -> None:
    """It begins alone, and ends in good order; what this one was at is still suspect when it has died."""
    path = tmp_path / "a.db"
    journal = Journal(path)
    (held,) = journal.record(7, [task(1)])
    journal.begin([held.id], 0, alone=True)
    command = [sys.executable, "-c", _OTHER_CONTAINER, str(path), str(os.getpid())]
    other = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert other.stdout == "1\n"
    assert journal.accuse((os.getpid(), "SIGSEGV"), 0) == 1
    assert journal.unfinished(7)[0].strikes == ("SIGSEGV",)
    journal.close()


def test_neither_a_death_nor_a_count_of_another_container_is_evidence(tmp_path: Path) -> None:
    """Its process ids and its kernel's count of kills are others: whoever takes its tasks over strikes nobody."""
    path = tmp_path / "a.db"
    journal = Journal(path)
    (held,) = journal.record(7, [task(1)])
    journal.begin([held.id], 0, alone=True)
    with closing(sqlite3.connect(path)) as db:  # as a process of another container would have marked it
        ((mark,),) = db.execute("SELECT runner FROM adc_task").fetchall()
        boot_id, _namespace, rest = mark.split("/", 2)
        db.execute("UPDATE adc_task SET runner = ?", (f"{boot_id}/pid:[1]/{rest}",))
        db.commit()
    assert journal.accuse((os.getpid(), "SIGSEGV"), 9) == 1
    assert journal.unfinished(7)[0].strikes == ()
    journal.close()
