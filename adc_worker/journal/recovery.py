"""What happens to a journal whose file is damaged: it is set aside, and a fresh one gets what can still be read.

Covers the check of a file, the reading of a damaged one, and the exchange of two files under a lock that all workers
of a journal heed. When any of this happens is decided in `journal.py`.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

# The check reads the whole file. Measured: 1 GB of results takes 0.5 s from the page cache, 1.6 s from a disk of 700
# MB/s; so 2 GB from a disk of 100 MB/s take about 20 s.
CHECK_MAX_S = 60.0
_CHECK_STEPS = 100_000  # virtual machine instructions between two looks at the clock
SET_ASIDE_MAX = 3
SET_ASIDE_WITHIN_S = 3600.0
_STAMP = "%Y%m%dT%H%M%S.%fZ"
_SIDE_FILES = ("-wal", "-shm", "-journal")
_SINGLE_READS_MAX = 100_000  # row numbers between two damaged pages that are tried one by one
_BUSY_TIMEOUT_S = 5.0

# Every column of a task but those that only say which process works on it: `begin` writes these for each batch.
SEALED_COLUMNS = (
    "id",
    "slot",
    "job_id",
    "image_id",
    "image_url",
    "url_erased",
    "reply_subject",
    "seq",
    "published_ns",
    "incarnation",
    "fetched_at",
    "strikes",
    "result_bytes",
)
# What is said of an accepted result beside its body; those of its checksum, in this order.
SEALED_OF_FINISHED = ("job_id", "image_id", "image_url", "incarnation", "reply_subject", "seq", "published_ns")
# Declared as a number by the first version, when it was a process id; the names of processes since are text.
_PROCESS_COLUMN = "runner"


def checksum_of(*values: object) -> int:
    """Return the checksum of a row's values; SQLite has none of its own, and returns whatever a page holds."""
    return zlib.crc32(repr(values).encode())


def part_checksum(task_id: int, number: int, body: bytes) -> int:
    """Return the checksum of one part of a kept result, which also says of which task it is."""
    return zlib.crc32(body, zlib.crc32(f"{task_id}/{number}".encode()))


def finished_checksum(body: bytes, *described: object) -> int:
    """Return the checksum of an accepted result, with the values of SEALED_OF_FINISHED: of which image it is."""
    return zlib.crc32(body, checksum_of(*described))


def is_as_sealed(row: Mapping[str, Any]) -> bool:
    """Whether an accepted result is what was written, as far as its checksum tells: a version had none."""
    described = [row.get(name) for name in SEALED_OF_FINISHED]
    return row.get("checksum") in {None, finished_checksum(row["body"], *described)}


class FileGuard:
    """Keeps the journal's file from being set aside while a worker writes into it.

    A writer holds the lock shared for one transaction, whoever exchanges the file holds it alone.
    """

    def __init__(self, journal_path: Path) -> None:
        path = journal_path.with_name(f"{journal_path.stem}.recovery.lock")
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let nobody set the file aside meanwhile."""
        with self._held(fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let nobody write into the file meanwhile."""
        with self._held(fcntl.LOCK_EX):
            yield

    @contextmanager
    def _held(self, kind: int) -> Iterator[None]:
        fcntl.flock(self._fd, kind)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._fd)


@dataclass(slots=True)
class Salvaged:
    """What was read of a damaged file."""

    tasks: int = 0
    results: int = 0
    results_lost: int = 0  # of tasks that were read: their results are computed again
    accepted_results: int = 0


def find_damage(db: sqlite3.Connection, longest_s: float = CHECK_MAX_S) -> str | None:
    """Return the first thing that SQLite's integrity check finds; None where it finds nothing within the time.

    Raises:
        TimeoutError: the check took longer, and found nothing so far.
    """
    deadline = time.monotonic() + longest_s
    db.set_progress_handler(lambda: time.monotonic() > deadline, _CHECK_STEPS)
    try:
        (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            raise TimeoutError(f"the integrity check was broken off after {longest_s:.0f} s") from error
        raise
    finally:
        db.set_progress_handler(None, 0)
    return None if found == "ok" else str(found)


def find_wrong_row(db: sqlite3.Connection) -> str | None:
    """Return what the first row is that cannot have been written so; None where there is none.

    Reads no results, only the tasks, their indexes, and what kind of values the other tables have: a torn page is empty
    in places. What an index leads to is compared with a checksum where it is read.
    """
    (found,) = db.execute("PRAGMA integrity_check(adc_task)").fetchone()
    if found != "ok":
        return str(found)
    columns = ", ".join(SEALED_COLUMNS)
    for *values, checksum in db.execute(f"SELECT {columns}, checksum FROM adc_task"):  # noqa: S608 (our own names)
        if checksum != checksum_of(*values):
            return f"the row of task {values[0]} is not what was written"
    for name, value, checksum in db.execute("SELECT name, value, checksum FROM adc_meta NOT INDEXED"):
        if checksum != checksum_of(name, value):
            return f"the row {name} of adc_meta is not what was written"
    kinds = {
        "adc_part": {"task_id": "integer", "number": "integer", "body": "blob"},
        "adc_finished": {"job_id": "integer", "image_id": "text", "body": "blob"},
    }
    for table, kind_of in kinds.items():
        wrong = " OR ".join(f"typeof({name}) != '{kind}'" for name, kind in kind_of.items())
        row = db.execute(f"SELECT rowid FROM {table} NOT INDEXED WHERE {wrong} LIMIT 1").fetchone()  # noqa: S608 (our own names)
        if row is not None:
            return f"row {row[0]} of {table} is not what was written"
    return None


def damaged_files(journal_path: Path) -> list[Path]:
    """Return the damaged files that were set aside, oldest first."""
    prefix = f"{journal_path.stem}.damaged-"
    found = [path for path in journal_path.parent.iterdir() if path.name.startswith(prefix)]
    return sorted(path for path in found if path.suffix == journal_path.suffix)


def set_aside_lately(journal_path: Path) -> int:
    """Count how many damaged files were set aside within the last hour."""
    prefix = f"{journal_path.stem}.damaged-"
    now = datetime.now(UTC)
    count = 0
    for path in damaged_files(journal_path):
        with suppress(ValueError, TypeError):  # an operator renamed it
            at = datetime.fromisoformat(path.stem.removeprefix(prefix))
            age_s = (now - at).total_seconds()
            count += 0 <= age_s < SET_ASIDE_WITHIN_S
    return count


def exchange(
    journal_path: Path,
    create: Callable[[Path], sqlite3.Connection],
    remembered: Iterable[dict[str, Any]] = (),
    meta: Mapping[str, str] | None = None,
) -> tuple[Path, Salvaged]:
    """Set a damaged file aside and put one in its place that holds what could be read of it.

    The caller holds the `FileGuard` alone and has no connection to the file. `create` makes an empty journal.
    `remembered` are rows of tasks, and `meta` those of adc_meta, that the caller knows better than the file. Return
    where the damaged file is now.

    A crash in between loses nothing: the new file gets its final name for the exchange only when it is complete, and
    `finish_exchange` goes on from there.
    """
    incomplete = journal_path.with_name(f"{journal_path.name}.incomplete")
    for leftover in (incomplete, *_side_files(incomplete)):
        leftover.unlink(missing_ok=True)
    with closing(create(incomplete)) as fresh:
        salvaged = _salvage(journal_path, fresh, remembered, meta or {})
    incomplete.rename(_complete_path(journal_path))
    aside = finish_exchange(journal_path)
    assert aside is not None
    return aside, salvaged


def finish_exchange(journal_path: Path) -> Path | None:
    """Do what remains of an exchange of files; return where the damaged file is, None where nothing remained."""
    complete = _complete_path(journal_path)
    if not complete.exists():
        return None
    stamp = datetime.now(UTC).strftime(_STAMP)
    aside = journal_path.with_name(f"{journal_path.stem}.damaged-{stamp}{journal_path.suffix}")
    # SQLite finds the write-ahead log of a file by its name: both keep belonging together.
    for old, new in zip(_side_files(journal_path), _side_files(aside), strict=True):
        with suppress(FileNotFoundError):
            old.rename(new)
    with suppress(FileNotFoundError):
        journal_path.rename(aside)
    complete.rename(journal_path)
    _sync_folder(journal_path.parent)
    return aside


def _complete_path(journal_path: Path) -> Path:
    return journal_path.with_name(f"{journal_path.name}.recovered")


def _side_files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}{suffix}") for suffix in _SIDE_FILES]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _salvage(
    damaged: Path, fresh: sqlite3.Connection, remembered: Iterable[dict[str, Any]], meta: Mapping[str, str]
) -> Salvaged:
    salvaged = Salvaged()
    with closing(_open_damaged(damaged)) as old:
        old.text_factory = bytes  # text that is no UTF-8 is to spoil its own row only
        with suppress(sqlite3.Error):
            old.execute("PRAGMA writable_schema=ON")  # a damaged entry in the schema is to spoil its own table only
        with fresh:
            fresh.execute("BEGIN IMMEDIATE")
            highest = _highest_number(old)
            put_meta(fresh, _readable_meta(old) | dict(meta))
            highest = max(highest, _copy(old, fresh, "adc_task", _is_sound_task))
            for row in remembered:  # before the results, which are only taken over of tasks that are there
                put_task(fresh, row)
                highest = max(highest, row["id"])
            _copy(old, fresh, "adc_part", _is_sound_part)
            salvaged.results_lost = _drop_incomplete_results(fresh)
            # The number of a task is the name of its staged file: one that was used before must not come again.
            # Milliseconds are ahead of every number that was ever given out.
            highest = max(highest, time.time_ns() // 1_000_000)
            fresh.execute("DELETE FROM sqlite_sequence WHERE name = 'adc_task'")
            fresh.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('adc_task', ?)", (highest,))
        try:
            with fresh:
                fresh.execute("BEGIN IMMEDIATE")
                _copy(old, fresh, "adc_finished", _is_sound_finished)
        except sqlite3.OperationalError as error:
            # Antenna has these results. Without them an image that comes again is computed again.
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
    salvaged.tasks = _count(fresh, "SELECT count(*) FROM adc_task")
    salvaged.results = _count(fresh, "SELECT count(*) FROM adc_task WHERE result_bytes NOT NULL")
    salvaged.accepted_results = _count(fresh, "SELECT count(*) FROM adc_finished")
    return salvaged


def _open_damaged(path: Path) -> sqlite3.Connection:
    """Open a damaged file and leave it as it is, with its write-ahead log: it is evidence.

    Only a transaction that a crash interrupted is undone, in the file of a network file system. In place of a file that
    is empty or missing, whose log SQLite would remove, comes an empty database in memory.
    """
    if not path.exists() or path.stat().st_size == 0:
        return sqlite3.connect(":memory:", isolation_level=None)
    interrupted = path.with_name(f"{path.name}-journal")
    mode = "rw" if interrupted.exists() else "ro"
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None
    )


def version_of(path: Path) -> int:
    """Return the version of the journal in a file; 0 where it holds none. The file stays as it is."""
    with closing(_open_damaged(path)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


def put_task(db: sqlite3.Connection, row: dict[str, Any]) -> bool:
    """Write a task's row, whether there is one or not; its result stays.

    False where the number is that of another slot's task: that one stays, and nothing is written.
    """
    names = ", ".join(row)
    marks = ", ".join("?" * len(row))
    changes = ", ".join(f"{name} = excluded.{name}" for name in row)
    same = "adc_task.slot = excluded.slot OR adc_task.reply_subject = excluded.reply_subject"
    insert = f"INSERT INTO adc_task ({names}) VALUES ({marks})"  # noqa: S608 (our own names)
    statement = f"{insert} ON CONFLICT (id) DO UPDATE SET {changes} WHERE {same}"
    return db.execute(statement, tuple(row.values())).rowcount > 0


def put_meta(db: sqlite3.Connection, values: Mapping[str, str]) -> None:
    """Write who a journal is, and where it lies."""
    rows = [(name, value, checksum_of(name, value)) for name, value in values.items()]
    db.executemany("INSERT OR REPLACE INTO adc_meta (name, value, checksum) VALUES (?, ?, ?)", rows)


def _readable_meta(old: sqlite3.Connection) -> dict[str, str]:
    """Return who a journal is, from the table or from the index that has a copy of it on another page."""
    found: dict[str, str] = {}
    for source in ("NOT INDEXED", "INDEXED BY adc_meta_copy"):
        with suppress(sqlite3.Error):  # the page is damaged, or the version has no such table
            for name, value, checksum in old.execute(f"SELECT name, value, checksum FROM adc_meta {source}"):  # noqa: S608 (literals)
                row = _decoded({"name": name, "value": value}, {"name": "TEXT", "value": "TEXT"})
                if row is not None and checksum == checksum_of(row["name"], row["value"]):
                    found[row["name"]] = row["value"]
    return found


def _count(db: sqlite3.Connection, query: str) -> int:
    (count,) = db.execute(query).fetchone()
    return int(count)


def _highest_number(old: sqlite3.Connection) -> int:
    try:
        rows = old.execute("SELECT seq FROM sqlite_sequence WHERE name = 'adc_task'").fetchall()
    except sqlite3.Error:
        return 0
    return max((seq for (seq,) in rows if isinstance(seq, int)), default=0)


def _copy(
    old: sqlite3.Connection, fresh: sqlite3.Connection, table: str, is_sound: Callable[[dict[str, Any]], bool]
) -> int:
    """Copy a table's readable rows that are sound; return the highest row number that was seen."""
    types = {name: kind for _cid, name, kind, *_rest in fresh.execute(f"PRAGMA table_info({table})")}
    try:
        present = {bytes(name).decode() for _cid, name, *_rest in old.execute(f"PRAGMA table_info({table})")}
    except (sqlite3.Error, UnicodeDecodeError):
        present = set()
    columns = [name for name in types if name in present]
    if not columns:
        return 0
    marks = ", ".join("?" * len(columns))
    insert = f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({marks})"  # noqa: S608 (names of our own schema)
    highest = 0
    for rowid, *values in _readable_rows(old, table, columns):
        highest = max(highest, rowid)
        row = _decoded(dict(zip(columns, values, strict=True)), types)
        if row is None or not is_sound(row):
            continue
        with suppress(sqlite3.IntegrityError):  # a value is missing, or the task of a part was not read
            fresh.execute(insert, tuple(row.values()))
    return highest


def _readable_rows(old: sqlite3.Connection, table: str, columns: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    """Yield a table's rows: from the start to the first damaged page, from the end to the last one, and in between."""
    select = f"SELECT rowid, {', '.join(columns)} FROM {table} NOT INDEXED"  # noqa: S608 (names of our own schema)
    last = 0
    try:
        for row in old.execute(f"{select} ORDER BY rowid"):
            if row[0] <= last:
                break  # pages lead in a circle
            last = row[0]
            yield row
        else:
            return
    except (sqlite3.Error, OverflowError):
        pass  # the rest is tried from the end
    first = None
    try:
        for row in old.execute(f"{select} ORDER BY rowid DESC"):
            if row[0] <= last or (first is not None and row[0] >= first):
                break
            first = row[0]
            yield row
    except (sqlite3.Error, OverflowError):
        pass  # what is left is tried row by row
    end = first if first is not None else last + _SINGLE_READS_MAX
    for number in range(last + 1, min(end, last + _SINGLE_READS_MAX)):
        try:
            rows = old.execute(f"{select} WHERE rowid = ?", (number,)).fetchall()
        except (sqlite3.Error, OverflowError):
            continue  # it is on a damaged page
        yield from rows


def _decoded(row: dict[str, Any], types: dict[str, str]) -> dict[str, Any] | None:
    """Return a row with text in place of its bytes; None where a value is not of its column's type."""
    kinds = {"INTEGER": int, "REAL": float, "BLOB": bytes}
    decoded: dict[str, Any] = {}
    for name, value in row.items():
        kind = types[name].upper()
        if name == _PROCESS_COLUMN and isinstance(value, bytes):
            kind = "TEXT"
        if value is None:
            decoded[name] = None
        elif kind == "TEXT" and isinstance(value, bytes):
            try:
                decoded[name] = value.decode()
            except UnicodeDecodeError:
                return None
        elif isinstance(value, kinds.get(kind, object)):
            decoded[name] = value
        else:
            return None
    return decoded


def _is_sound_task(row: dict[str, Any]) -> bool:
    if "checksum" in row:
        return bool(row["checksum"] == checksum_of(*(row.get(name) for name in SEALED_COLUMNS)))
    return True  # the file is of a version that had none


def _is_sound_part(row: dict[str, Any]) -> bool:
    if None in {row["task_id"], row["number"], row["body"]}:
        return False
    return row.get("checksum") in {None, part_checksum(row["task_id"], row["number"], row["body"])}


def _is_sound_finished(row: dict[str, Any]) -> bool:
    if None in {row["job_id"], row["image_id"], row["body"]}:
        return False
    if not is_as_sealed(row):
        return False
    try:
        zlib.decompress(row["body"])
    except zlib.error:
        return False
    return True


def _drop_incomplete_results(fresh: sqlite3.Connection) -> int:
    """Make tasks whose results were not read whole unfinished again; return how many."""
    sizes = (
        "SELECT adc_task.id FROM adc_task LEFT JOIN adc_part ON task_id = adc_task.id WHERE result_bytes NOT NULL"
        " GROUP BY adc_task.id HAVING coalesce(sum(length(body)), 0) != result_bytes"
        " OR coalesce(max(number) + 1, 0) != count(number)"
    )
    incomplete = [task_id for (task_id,) in fresh.execute(sizes).fetchall()]
    numbers = [(task_id,) for task_id in incomplete]
    fresh.executemany("DELETE FROM adc_part WHERE task_id = ?", numbers)
    fresh.executemany("UPDATE adc_task SET result_bytes = NULL WHERE id = ?", numbers)
    return len(incomplete)
