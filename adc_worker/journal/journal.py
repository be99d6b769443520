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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adc_worker.antenna.wire import Task
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.log import get_logger

_log = get_logger(__name__)

TASK_LIFE_S = 24 * 3600.0  # max_age of a job's stream (contract, "NATS")
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
    size_bytes INTEGER NOT NULL,
    kept_at REAL NOT NULL
);
CREATE TABLE adc_result_part (  -- a serialised result in pieces of about a megabyte: no whole one is ever in memory
    task_id INTEGER NOT NULL REFERENCES adc_result (task_id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (task_id, number)
);
CREATE INDEX adc_task_slot ON adc_task (slot, job_id);
"""
# runner: pid of the process that is decoding or inferring it; oom_kills: what the kernel had counted when that began;
# strikes: NULL unless a suspect, else how the processes died that it was alone in.
_SUSPECTS = """
ALTER TABLE adc_task ADD COLUMN runner INTEGER;
ALTER TABLE adc_task ADD COLUMN oom_kills INTEGER;
ALTER TABLE adc_task ADD COLUMN strikes TEXT;
"""
_STEPS = (_SCHEMA, _SUSPECTS)  # each takes the journal to its next version
_VERSION = len(_STEPS)
_PART_BYTES = 1_000_000
STRIKES_MAX = 2  # design, "The journal": two strikes make an error result


@dataclass(frozen=True, slots=True)
class HeldTask:
    """A task on record. `id` is unique on this host for ever; `fetched_at` is Unix seconds.

    `strikes` names the deaths of processes that worked on this task alone; None when none ever died working on it.
    """

    id: int
    job_id: int
    task: Task
    fetched_at: float
    strikes: tuple[str, ...] | None = None

    @property
    def struck_out(self) -> bool:
        return len(self.strikes or ()) >= STRIKES_MAX


@dataclass(frozen=True, slots=True)
class KeptResult:
    """A result that waits for Antenna to accept it."""

    held: HeldTask
    size_bytes: int


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
            try:
                with self._db:  # an orderly end accuses nobody
                    self._db.execute("UPDATE adc_task SET runner = NULL WHERE runner = ?", (os.getpid(),))
            except sqlite3.Error as error:
                _log.warning("marks_left", error=str(error), effect="the images in hand run one by one at first")
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

    def begin(self, task_ids: Iterable[int], oom_kills: int, *, alone: bool) -> None:
        """Mark tasks that are about to be decoded and inferred, so that a crash shows which they were.

        The marks need not survive a power cut. `alone` says that nothing else is in work any more.
        """
        pid = os.getpid()
        with self._lock:
            self._db.execute("PRAGMA synchronous=NORMAL")
            try:
                with self._db:
                    if alone:
                        self._db.execute("UPDATE adc_task SET runner = NULL WHERE runner = ?", (pid,))
                    self._db.executemany(
                        "UPDATE adc_task SET runner = ?, oom_kills = ? WHERE id = ?",
                        [(pid, oom_kills, task_id) for task_id in task_ids],
                    )
            finally:
                self._db.execute("PRAGMA synchronous=FULL")

    def accuse(self, died: tuple[int, str] | None, oom_kills: int) -> int:
        """Make suspects of what dead processes were working on, and return how many tasks that are.

        `died` is the pid and the cause of a death that was the process's own making. A task that was alone in it, or in
        a process that ended while the kernel killed for want of memory, gets a strike.
        """
        in_work = "slot = ? AND runner IS NOT NULL AND id NOT IN (SELECT task_id FROM adc_result)"
        with self._lock, self._db:
            groups = self._db.execute(
                f"SELECT runner, count(*), min(id), min(oom_kills) FROM adc_task WHERE {in_work} GROUP BY runner",  # noqa: S608
                (self.slot,),
            ).fetchall()
            for runner, count, task_id, oom_kills_before in groups:
                cause = died[1] if died is not None and died[0] == runner else None
                if cause is None and oom_kills > oom_kills_before:
                    cause = "out of memory"
                if count == 1 and cause is not None:
                    self._db.execute(
                        "UPDATE adc_task SET strikes = coalesce(strikes || ',', '') || ? WHERE id = ?", (cause, task_id)
                    )
            self._db.execute(
                f"UPDATE adc_task SET strikes = coalesce(strikes, '') WHERE {in_work}",  # noqa: S608
                (self.slot,),
            )
            self._db.execute("UPDATE adc_task SET runner = NULL WHERE slot = ?", (self.slot,))
        return sum(count for _runner, count, _task_id, _oom_kills in groups)

    def pardon(self, task_ids: Iterable[int]) -> None:
        """Take the strikes of suspects back: they died of something else."""
        with self._lock, self._db:
            self._db.executemany("UPDATE adc_task SET strikes = '' WHERE id = ?", [(number,) for number in task_ids])

    def keep(self, results: Iterable[tuple[int, Iterable[bytes]]]) -> int:
        """Keep (task id, parts of a serialised result) pairs in one transaction; return the bytes kept.

        On return they survive a power cut. Parts are taken one by one, so that they may be made on the way.
        """
        with self._lock, self._db:
            return sum(self._keep(task_id, parts) for task_id, parts in results)

    def _keep(self, task_id: int, parts: Iterable[bytes]) -> int:
        self._db.execute("DELETE FROM adc_result WHERE task_id = ?", (task_id,))
        self._db.execute("INSERT INTO adc_result VALUES (?, 0, ?)", (task_id, time.time()))
        size_bytes = 0
        for number, part in enumerate(_coalesced(parts)):
            self._db.execute("INSERT INTO adc_result_part VALUES (?, ?, ?)", (task_id, number, part))
            size_bytes += len(part)
        self._db.execute("UPDATE adc_result SET size_bytes = ? WHERE task_id = ?", (size_bytes, task_id))
        return size_bytes

    def parts(self, task_id: int) -> Iterator[bytes]:
        """Return a kept result piece by piece; another may be kept or forgotten meanwhile."""
        number = 0
        while True:
            with self._lock:
                row = self._db.execute(
                    "SELECT body FROM adc_result_part WHERE task_id = ? AND number = ?", (task_id, number)
                ).fetchone()
            if row is None:
                return
            yield row[0]
            number += 1

    def forget(self, task_ids: Iterable[int]) -> None:
        """Remove tasks whose outcome Antenna has accepted, or whose lease was given up."""
        with self._lock, self._db:
            self._db.executemany("DELETE FROM adc_task WHERE id = ?", [(task_id,) for task_id in task_ids])

    def unfinished(self, job_id: int) -> list[HeldTask]:
        """Return this slot's tasks of a job that have no result yet: oldest first, those with strikes last."""
        rows = self._rows("t.job_id = ? AND r.task_id IS NULL", (job_id,))
        return sorted((held for held, _size_bytes in rows), key=lambda held: len(held.strikes or ()))

    def known_ids(self) -> set[int]:
        """Return the tasks of every slot: the ones whose staged files belong to somebody."""
        with self._lock:
            return {int(row[0]) for row in self._db.execute("SELECT id FROM adc_task")}

    def unposted(
        self, excluding: Iterable[int], limit: int, most_bytes: int, *, alone: bool = True
    ) -> list[KeptResult]:
        """Return kept results, oldest first, without those in `excluding`: up to `limit` and `most_bytes`.

        A result that exceeds `most_bytes` comes by itself, and only to a caller that says it is `alone`.
        """
        excluded = set(excluding)
        chosen: list[int] = []
        with self._lock:
            sizes = self._db.execute(
                "SELECT r.task_id, r.size_bytes FROM adc_result r JOIN adc_task t ON t.id = r.task_id"
                " WHERE t.slot = ? ORDER BY r.task_id",
                (self.slot,),
            )
            for task_id, size_bytes in sizes:
                most_bytes -= 0 if task_id in excluded else size_bytes
                if len(chosen) == limit or (most_bytes < 0 and (chosen or not alone)):
                    break
                if task_id not in excluded:
                    chosen.append(task_id)
            sizes.close()
        rows = self._rows(f"t.id IN ({','.join(map(str, chosen))})", ())
        return [KeptResult(held, size_bytes) for held, size_bytes in rows]

    def drop_expired(self) -> int:
        """Remove unfinished tasks that no stream holds any more, and say how many."""
        with self._lock, self._db:
            cursor = self._db.execute(
                "DELETE FROM adc_task WHERE slot = ? AND fetched_at < ? AND id NOT IN (SELECT task_id FROM adc_result)",
                (self.slot, time.time() - TASK_LIFE_S),
            )
        return cursor.rowcount

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

    def _rows(self, where: str, arguments: tuple[object, ...]) -> list[tuple[HeldTask, int]]:
        query = (
            "SELECT t.id, t.job_id, t.image_id, t.image_url, t.reply_subject, t.fetched_at, t.strikes,"  # noqa: S608 (only this file's literals and integers)
            " coalesce(r.size_bytes, 0)"
            f" FROM adc_task t LEFT JOIN adc_result r ON r.task_id = t.id WHERE t.slot = ? AND {where}"
            " ORDER BY t.id"
        )
        with self._lock:
            rows = self._db.execute(query, (self.slot, *arguments)).fetchall()
        return [(_held(row), row[7]) for row in rows]

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
            for step in _STEPS[version:]:
                for statement in step.split(";\n"):
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
                os.close(fd)


def _held(row: Sequence[Any]) -> HeldTask:
    strikes = None if row[6] is None else tuple(filter(None, row[6].split(",")))
    task = Task(image_id=row[2], image_url=row[3], reply_subject=row[4])
    return HeldTask(row[0], row[1], task, row[5], strikes)


def _coalesced(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Join small parts, so that an ordinary result is one row."""
    waiting: list[bytes] = []
    size_bytes = 0
    for part in parts:
        waiting.append(part)
        size_bytes += len(part)
        if size_bytes >= _PART_BYTES:
            yield b"".join(waiting)
            waiting, size_bytes = [], 0
    if waiting:
        yield b"".join(waiting)
