"""The local database: every task that is held and every result that Antenna has not accepted yet.

One SQLite file per host. Rows belong to a slot; whoever holds the slot's file lock owns them, so a worker that comes
back finds what the one before it left.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adc_worker.antenna.wire import Task
from adc_worker.errors import ExitCode, WorkerFault

_VERSION = 1
_BUSY_TIMEOUT_S = 30.0
_SLOTS_MAX = 256

_SCHEMA = """
CREATE TABLE adc_task (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- also the name of the staged file, so it must never be used twice
    slot INTEGER NOT NULL,
    job_id INTEGER NOT NULL,
    image_id TEXT NOT NULL,
    image_url TEXT NOT NULL,
    reply_subject TEXT NOT NULL,
    fetched_at REAL NOT NULL
);
CREATE TABLE adc_result (
    task_id INTEGER PRIMARY KEY REFERENCES adc_task (id) ON DELETE CASCADE,
    body BLOB NOT NULL,
    kept_at REAL NOT NULL
);
CREATE INDEX adc_task_slot ON adc_task (slot, job_id);
"""


@dataclass(frozen=True, slots=True)
class HeldTask:
    """A task on record. `id` is unique on this host for ever; `fetched_at` is Unix seconds."""

    id: int
    job_id: int
    task: Task
    fetched_at: float


@dataclass(frozen=True, slots=True)
class KeptResult:
    """A result that waits for Antenna to accept it."""

    held: HeldTask
    body: bytes


class Journal:
    """The journal of one worker process; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.slot, self._slot_fd = self._take_slot()
            try:
                self._db = self._open()
                self._adopt_orphans()
            except BaseException:
                os.close(self._slot_fd)
                raise
        except (OSError, sqlite3.Error) as error:
            raise WorkerFault(f"the journal {path} cannot be opened: {error}", ExitCode.JOURNAL_UNUSABLE) from error

    def close(self) -> None:
        with self._lock:
            self._db.close()
            os.close(self._slot_fd)

    def record(self, job_id: int, tasks: Iterable[Task]) -> list[HeldTask]:
        """Put fetched tasks on record; on return they survive a power cut."""
        now = time.time()
        held = []
        with self._lock, self._db:
            for task in tasks:
                cursor = self._db.execute(
                    "INSERT INTO adc_task (slot, job_id, image_id, image_url, reply_subject, fetched_at)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (self.slot, job_id, task.image_id, task.image_url, task.reply_subject, now),
                )
                held.append(HeldTask(int(cursor.lastrowid or 0), job_id, task, now))
        return held

    def keep(self, results: Sequence[tuple[int, bytes]]) -> None:
        """Keep (task id, serialised result) pairs in one transaction; on return they survive a power cut."""
        now = time.time()
        with self._lock, self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO adc_result (task_id, body, kept_at) VALUES (?, ?, ?)",
                [(task_id, body, now) for task_id, body in results],
            )

    def forget(self, task_ids: Iterable[int]) -> None:
        """Remove tasks whose outcome Antenna has accepted, or whose lease was given up."""
        with self._lock, self._db:
            self._db.executemany("DELETE FROM adc_task WHERE id = ?", [(task_id,) for task_id in task_ids])

    def unfinished(self, job_id: int) -> list[HeldTask]:
        """Return this slot's tasks of a job that have no result yet, oldest first."""
        rows = self._rows("t.job_id = ? AND r.task_id IS NULL", (job_id,), "NULL")
        return [held for held, _body in rows]

    def known_ids(self) -> set[int]:
        """Return the tasks of every slot: the ones whose staged files belong to somebody."""
        with self._lock:
            return {int(row[0]) for row in self._db.execute("SELECT id FROM adc_task")}

    def unposted(self, excluding: Iterable[int], limit: int, most_bytes: int) -> list[KeptResult]:
        """Return kept results, oldest first, without those in `excluding`: up to `limit`, `most_bytes` or one."""
        excluded = set(excluding)
        chosen: list[int] = []
        with self._lock:  # sizes first: bodies are megabytes, and a backlog has thousands
            sizes = self._db.execute(
                "SELECT r.task_id, length(r.body) FROM adc_result r JOIN adc_task t ON t.id = r.task_id"
                " WHERE t.slot = ? ORDER BY r.task_id",
                (self.slot,),
            )
            for task_id, size_bytes in sizes:
                most_bytes -= 0 if task_id in excluded else size_bytes
                if len(chosen) == limit or (chosen and most_bytes < 0):
                    break
                if task_id not in excluded:
                    chosen.append(task_id)
            sizes.close()
        rows = self._rows(f"t.id IN ({','.join(map(str, chosen))})", (), "r.body")
        return [KeptResult(held, body) for held, body in rows if body is not None]

    def held_count(self, job_id: int) -> int:
        """Count a job's tasks that Antenna may still be waiting for."""
        with self._lock:
            row = self._db.execute(
                "SELECT count(*) FROM adc_task WHERE slot = ? AND job_id = ?", (self.slot, job_id)
            ).fetchone()
        return int(row[0])

    def unposted_count(self) -> int:
        with self._lock:
            row = self._db.execute(
                "SELECT count(*) FROM adc_result r JOIN adc_task t ON t.id = r.task_id WHERE t.slot = ?", (self.slot,)
            ).fetchone()
        return int(row[0])

    def _rows(self, where: str, arguments: tuple[object, ...], body: str) -> list[tuple[HeldTask, bytes | None]]:
        query = (
            f"SELECT t.id, t.job_id, t.image_id, t.image_url, t.reply_subject, t.fetched_at, {body}"  # noqa: S608 (only this file's literals and integers)
            f" FROM adc_task t LEFT JOIN adc_result r ON r.task_id = t.id WHERE t.slot = ? AND {where}"
            " ORDER BY t.id"
        )
        with self._lock:
            rows = self._db.execute(query, (self.slot, *arguments)).fetchall()
        return [
            (HeldTask(row[0], row[1], Task(image_id=row[2], image_url=row[3], reply_subject=row[4]), row[5]), row[6])
            for row in rows
        ]

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        db = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")  # a result counts as kept only when a power cut cannot take it
            db.execute("PRAGMA foreign_keys=ON")
            self._upgrade(db)
        except BaseException:
            db.close()
            raise
        return db

    def _upgrade(self, db: sqlite3.Connection) -> None:
        with db:
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise WorkerFault(
                    f"the journal {self._path} was written by a newer worker (version {version}, this one knows"
                    f" {_VERSION}): install that version again, or move the file away once its results are posted",
                    ExitCode.JOURNAL_UNUSABLE,
                )
            if version == 0:
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version={_VERSION}")

    def _lock_path(self, slot: int) -> Path:
        return self._path.with_name(f"{self._path.stem}.{slot}.lock")

    def _try_lock(self, slot: int) -> int | None:
        fd = os.open(self._lock_path(slot), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def _take_slot(self) -> tuple[int, int]:
        for slot in range(_SLOTS_MAX):
            fd = self._try_lock(slot)
            if fd is not None:
                return slot, fd
        raise WorkerFault(f"{_SLOTS_MAX} workers already use the journal {self._path}", ExitCode.JOURNAL_UNUSABLE)

    def _adopt_orphans(self) -> None:
        """Take over the rows of slots whose worker is gone."""
        with self._lock:
            slots = [row[0] for row in self._db.execute("SELECT DISTINCT slot FROM adc_task")]
        for slot in slots:
            fd = None if slot == self.slot else self._try_lock(slot)
            if fd is None:
                continue
            try:
                with self._lock, self._db:
                    self._db.execute("UPDATE adc_task SET slot = ? WHERE slot = ?", (self.slot, slot))
            finally:
                with suppress(OSError):
                    os.close(fd)
