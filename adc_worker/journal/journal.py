"""The local database: every task that is held, every result that Antenna has not accepted yet, and those it accepted.

One SQLite file per host. Rows belong to a slot; whoever holds the slot's file lock owns them, so a worker that comes
back finds what the one before it left. While the file cannot be written results are in memory, and posted from there.
A damaged file is set aside while the worker runs: a fresh one gets what can be read of it (`recovery.py`), and what
this process remembers of its own tasks.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import sqlite3
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from adc_worker.antenna.leases import lease_clock, parse_reply_subject, same_message
from adc_worker.antenna.wire import PostEntry, Task, is_error_result
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.host.budget import file_system
from adc_worker.journal import recovery
from adc_worker.journal.condition import Condition, DamageFound, condition_after, may_pass
from adc_worker.journal.recovery import SEALED_COLUMNS, checksum_of, finished_checksum, part_checksum
from adc_worker.log import get_logger
from adc_worker.redaction import public_url

_log = get_logger(__name__)


_SLOTS_MAX = 256
# Write-ahead logging needs memory that all readers share, which these cannot give (sqlite.org/wal.html).
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "lustre", "glusterfs", "beegfs"}
)
FILE_MAX_BYTES, FILE_DISK_SHARE = 2_000_000_000, 0.1  # of what is free at start
RESERVE_BYTES = 10_000_000  # free on the disk, or no more tasks: a fetch that cannot be recorded spends its leases
UNPOSTED_RESULTS_MAX = 5000
RETAINED_RESULT_BYTES = 16_000_000  # accepted results above this are computed again when their image comes again
# Results in memory, for want of a file that takes them, above which nothing more is computed; a batch may come on top.
UNWRITTEN_MAX_BYTES = 64_000_000
_KNOWN_LOCKED_TIMEOUT_S = 0.1  # for a lock that was waited for before: others need this journal, too
_RETRY_S = 1.0

# One entry per version; a file of an older one gets those that it lacks.
_SCHEMA = (
    """
CREATE TABLE adc_task (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- also the name of the staged file, so it must never be used twice
    slot INTEGER NOT NULL,
    job_id INTEGER NOT NULL,
    image_id TEXT NOT NULL,
    image_url TEXT NOT NULL,
    url_erased INTEGER NOT NULL DEFAULT 0,  -- what opens it is gone
    reply_subject TEXT NOT NULL,
    seq INTEGER,  -- of reply_subject, and the next one, NULL in an unknown form
    published_ns INTEGER,
    fetched_at REAL NOT NULL,
    runner INTEGER,  -- pid of the process that decodes or infers it
    oom_kills INTEGER,  -- what the kernel had counted when that began
    strikes TEXT,  -- NULL unless a suspect, else how the processes died that it was alone in
    result_bytes INTEGER  -- NULL until it has a result
);
CREATE INDEX adc_task_slot ON adc_task (slot, job_id);
CREATE INDEX adc_task_image ON adc_task (job_id, image_id);
CREATE TABLE adc_part (  -- a serialised result in pieces of about a megabyte: no whole one is ever in memory
    task_id INTEGER NOT NULL REFERENCES adc_task (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (task_id, number)
);
CREATE TABLE adc_finished (  -- results that need no post any more, compressed, to answer images that come again
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id INTEGER NOT NULL,
    image_id TEXT NOT NULL,
    reply_subject TEXT,  -- NULL where it would acknowledge another image by now
    seq INTEGER,
    published_ns INTEGER,
    body BLOB NOT NULL,
    UNIQUE (job_id, image_id)
)
""",
    # A task's is of SEALED_COLUMNS; parts and accepted results of an earlier version have none.
    """
ALTER TABLE adc_task ADD COLUMN checksum INTEGER;
ALTER TABLE adc_part ADD COLUMN checksum INTEGER;
ALTER TABLE adc_finished ADD COLUMN checksum INTEGER
""",
)
_PART_BYTES = 1_000_000
_PART_START_BYTES = 64  # enough to tell an error result
_SUCCESSES_LOOKED_AT = 100
STRIKES_MAX = 2  # design, "The journal": two strikes make an error result
_SLOT_OPEN, _SLOT_CLOSED = b"open\n", b"clean\n"  # what the file of a slot's lock says; nothing, and nobody knows


@dataclass(frozen=True, slots=True)
class LockPatience:
    """How long another program, such as a backup or an SQLite shell, may hold the journal's file. In seconds.

    Attributes:
        wait_s: what a call waits before it leaves what is to be written in memory.
        fault_s: after this the lock counts as a fault of this machine, and the GPU pauses.
        end_s: what a call waits that cannot go on without the file; then the process ends.
    """

    wait_s: float = 5.0
    fault_s: float = 60.0
    end_s: float = 300.0


class _NotTaken(sqlite3.OperationalError):
    """The file took nothing of a transaction, for a reason that may pass."""


class _FileReplaced(Exception):
    """Another worker has set the file aside: this one has to open the one that took its place."""


P = ParamSpec("P")
T = TypeVar("T")


def _resilient(
    method: Callable[Concatenate[Journal, P], T],
) -> Callable[Concatenate[Journal, P], T]:
    """Repeat a method after the file was damaged and replaced, and while another program holds it."""

    @wraps(method)
    def repeated(journal: Journal, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return journal.repeat(partial(method, journal, *args, **kwargs))

    return repeated


@dataclass(frozen=True, slots=True)
class HeldTask:
    """A task on record. `id` is unique on this host for ever; `fetched_at` is Unix seconds.

    `strikes` names the deaths of processes that worked on this task alone; None when none ever died working on it.
    `result_bytes` is the size of its kept result, None until there is one. `url_erased`: its image was staged once, and
    cannot be downloaded again.
    """

    id: int
    job_id: int
    task: Task
    fetched_at: float
    strikes: tuple[str, ...] | None = None
    result_bytes: int | None = None
    url_erased: bool = False

    @property
    def struck_out(self) -> bool:
        return len(self.strikes or ()) >= STRIKES_MAX


class Journal:
    """The journal of one worker process; safe to use from several threads."""

    def __init__(
        self,
        path: Path,
        patience: LockPatience | None = None,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._path = path
        self._free_bytes = free_bytes
        self._patience = patience or LockPatience()
        self._lock = threading.RLock()
        self._calls = threading.local()  # whether this thread is in a method that is repeated
        self.fault: str | None = None  # why the file cannot be written
        self.shortage: str | None = None  # why nothing may be fetched although results can be kept
        self._locked_since: float | None = None  # monotonic seconds; another program holds the file
        # What the file did not take meanwhile: size and parts of results; None where a task is to be forgotten.
        self._unwritten: dict[int, tuple[int, Iterable[bytes]] | None] = {}
        self._contacts: dict[int, float] = {}
        self._remembered: dict[int, dict[str, Any]] = {}  # this slot's tasks as they were last written
        self._remembers = False  # not before they were read once
        self._changed: set[int] = set()  # tasks that the transaction under way inserts, changes or removes
        self._file_id = (0, 0)  # device and inode of the file that is open
        self._connection: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.most_bytes = min(FILE_MAX_BYTES, int(FILE_DISK_SHARE * free_bytes(path.parent)))
            self._shared = file_system(path.parent) in NETWORK_FILE_SYSTEMS
            # Locks of other hosts may not show there: each host has slots of its own.
            self._first_slot = zlib.crc32(socket.gethostname().encode()) * _SLOTS_MAX if self._shared else 0
            self._guard = recovery.FileGuard(path)
            try:
                self.slot, self._slot_fd = self._take_slot()
                try:
                    self._begin_to_use()
                except BaseException:
                    self._close_file()
                    os.close(self._slot_fd)
                    raise
            except BaseException:
                self._guard.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise self._cannot_open(error) from error

    def close(self) -> None:
        with self._lock:
            clean = self._connection is not None
            try:
                # An orderly end accuses nobody.
                self._db.execute("UPDATE adc_task SET runner = NULL WHERE runner = ?", (os.getpid(),))
            except (sqlite3.Error, WorkerFault) as error:
                clean = clean and condition_after(error) in {Condition.LOCKED, Condition.UNWRITABLE}
                _log.warning("marks_left", error=str(error), effect="the images in hand run one by one at first")
            self._close_file()
            if clean:
                _write_slot(self._slot_fd, _SLOT_CLOSED)
            os.close(self._slot_fd)
            self._guard.close()

    @_resilient
    def record(self, job_id: int, tasks: Sequence[Task], fetched_at: float | None = None) -> list[HeldTask]:
        """Put fetched tasks on record and return those to work on; on return they survive a power cut.

        An image that is held already keeps its row under the new subject; a finished one is answered from here. Where
        the file takes nothing, the tasks are left to their leases. `fetched_at`: Unix time, now by default.
        """
        now = fetched_at or lease_clock()
        self._contacts[job_id] = time.monotonic()
        wait_until = time.monotonic() + self._patience.fault_s
        while True:
            try:
                self._write_fetched(job_id, tasks, now)
                break
            except _NotTaken as error:
                if condition_after(error) is Condition.LOCKED and time.monotonic() < wait_until:
                    self._pause()  # or these tasks would spend a delivery each
                    continue
                _log.warning("tasks_left_to_their_lease", job_id=job_id, tasks=len(tasks), reason=f"journal: {error}")
                return []
        subjects = {task.reply_subject for task in tasks}
        return [held for held in self.unfinished(job_id) if held.task.reply_subject in subjects]

    def _write_fetched(self, job_id: int, tasks: Sequence[Task], now: float) -> None:
        with self._writing():
            self._bury_earlier_streams(job_id, tasks)
            for task in tasks:
                if not self._rejoin(job_id, task, now):
                    self._insert(job_id, task, now)

    def find(self, job_id: int, task: Task) -> HeldTask | None:
        """Return the task that this is another delivery of; None when we do not hold it."""
        rows = self._rows("job_id = ? AND image_id = ?", job_id, task.image_id)
        return next((held for held in rows if same_message(held.task.reply_subject, task.reply_subject)), None)

    def _rejoin(self, job_id: int, task: Task, now: float) -> bool:
        held = self.find(job_id, task)
        if held is None:
            return False
        self._db.execute(
            "UPDATE adc_task SET reply_subject = ?, fetched_at = ?, image_url = iif(url_erased, image_url, ?)"
            " WHERE id = ?",
            (task.reply_subject, now, task.image_url, held.id),
        )
        _log.info("delivery_joined", job_id=job_id, image_id=task.image_id)
        return True

    def _insert(self, job_id: int, task: Task, now: float) -> None:
        delivery = parse_reply_subject(task.reply_subject)
        message = (delivery.stream_seq, delivery.timestamp_ns) if delivery else (None, None)
        cursor = self._db.execute(
            "INSERT INTO adc_task (slot, job_id, image_id, image_url, reply_subject, fetched_at, seq, published_ns)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self.slot, job_id, task.image_id, task.image_url, task.reply_subject, now, *message),
        )
        query = "SELECT body, checksum FROM adc_finished WHERE job_id = ? AND image_id = ?"
        for packed, checksum in self._db.execute(query, (job_id, task.image_id)).fetchall():
            if checksum not in {None, finished_checksum(job_id, task.image_id, packed)}:
                raise DamageFound(f"the accepted result of image {task.image_id} is not what was written")
            body = zlib.decompress(packed)
            if not is_error_result(body):  # what was wrong with the image may have been put right
                _log.info("answered_from_journal", job_id=job_id, image_id=task.image_id)
                self._keep(int(cursor.lastrowid or 0), [body])

    @_resilient
    def erase_url(self, held: HeldTask) -> None:
        """Forget what opens a staged image's URL; a power cut may bring it back, so nothing waits for the disk."""
        url = public_url(held.task.image_url)
        if url == held.task.image_url:
            return
        erase = "UPDATE adc_task SET image_url = ?, url_erased = 1 WHERE id = ?"
        self._write_loosely(lambda: self._db.execute(erase, (url, held.id)))

    def _bury_earlier_streams(self, job_id: int, tasks: Sequence[Task]) -> None:
        """Within one stream sequence and time rise together: a lower sequence published later proves another stream."""
        found = [delivery for task in tasks if (delivery := parse_reply_subject(task.reply_subject))]
        if not found:
            return
        first = min(found, key=lambda delivery: delivery.stream_seq)
        (dead_until,) = self._db.execute(
            "SELECT max(published_ns) FROM (SELECT seq, published_ns FROM adc_task WHERE job_id = :job"
            " UNION ALL SELECT seq, published_ns FROM adc_finished WHERE job_id = :job AND reply_subject NOT NULL)"
            " WHERE seq >= :seq AND published_ns < :ns",
            {"job": job_id, "seq": first.stream_seq, "ns": first.timestamp_ns},
        ).fetchone()
        if dead_until is not None:
            self._bury(job_id, dead_until)

    def _bury(self, job_id: int, published_until_ns: int) -> None:
        where = "job_id = ? AND coalesce(published_ns, 0) <= ?"
        arguments = (job_id, published_until_ns)
        dead = self._column(f"SELECT id FROM adc_task WHERE {where}", *arguments)  # noqa: S608 (literals)
        self._finish({task_id: self._compressed(task_id) for task_id in dead})
        self._db.execute(f"UPDATE adc_finished SET reply_subject = NULL WHERE {where}", arguments)  # noqa: S608
        if dead:  # of a job that came to its end nothing is left
            _log.warning("subjects_dead", job_id=job_id, tasks=len(dead), reason="the job was stopped or restarted")

    @_resilient
    def bury(self, job_id: int) -> list[int]:
        """The job is served no more: no subject of it may be used; results stay for images that come again.

        Return the tasks whose staged files nobody needs.
        """
        unfinished = [held.id for held in self.unfinished(job_id)]
        of_the_job = self._column("SELECT id FROM adc_task WHERE slot = ? AND job_id = ?", self.slot, job_id)
        self._write_loosely(lambda: self._bury(job_id, time.time_ns()), of_the_job)
        return unfinished

    @_resilient
    def begin(self, task_ids: Iterable[int], oom_kills: int, *, alone: bool) -> None:
        """Mark tasks that are about to be decoded and inferred, so that a crash shows which they were.

        The marks need not survive a power cut. `alone` says that nothing else is in work any more.
        """
        pid = os.getpid()
        marks = [(pid, oom_kills, task_id) for task_id in task_ids]

        def mark() -> None:
            if alone:
                self._db.execute("UPDATE adc_task SET runner = NULL WHERE runner = ?", (pid,))
            self._db.executemany("UPDATE adc_task SET runner = ?, oom_kills = ? WHERE id = ?", marks)

        self._write_loosely(mark)

    @_resilient
    def accuse(self, died: tuple[int, str] | None, oom_kills: int) -> int:
        """Make suspects of what dead processes were working on, and return how many tasks that are.

        `died` is the pid and the cause of a death that was the process's own making. A task that was alone in it, or in
        a process that ended while the kernel killed for want of memory, gets a strike.
        """
        if not self._column("SELECT 1 FROM adc_task WHERE slot = ? AND runner NOT NULL LIMIT 1", self.slot):
            return 0  # nothing to write, so that a program that holds the file does not hold up the start
        with self._writing():
            where = "slot = ? AND runner NOT NULL AND result_bytes IS NULL"
            query = f"SELECT id, runner, oom_kills FROM adc_task WHERE {where}"  # noqa: S608 (a literal)
            in_work = self._db.execute(query, (self.slot,)).fetchall()
            together = Counter(runner for _task_id, runner, _oom_kills in in_work)
            for task_id, runner, oom_kills_before in in_work:
                cause = "out of memory" if oom_kills > oom_kills_before else ""
                if died is not None and died[0] == runner:
                    cause = died[1]
                self._db.execute(
                    "UPDATE adc_task SET strikes = coalesce(strikes || ',', '') || ? WHERE id = ?",
                    (cause if together[runner] == 1 else "", task_id),
                )
            self._db.execute("UPDATE adc_task SET runner = NULL WHERE slot = ?", (self.slot,))
        return len(in_work)

    @_resilient
    def pardon(self, task_ids: Iterable[int]) -> None:
        """Take the strikes of suspects back: they died of something else."""
        with self._writing():
            self._db.executemany("UPDATE adc_task SET strikes = '' WHERE id = ?", [(number,) for number in task_ids])

    @_resilient
    def keep(self, results: Collection[tuple[int, Iterable[bytes]]]) -> int:
        """Keep (task id, parts of a serialised result) pairs in one transaction; return the bytes kept.

        On return they survive a power cut, unless `fault` is set: then they are in memory. Parts are taken one by one,
        so that they may be made on the way, and must give the same again when they are asked again.
        """
        try:
            with self._writing():
                return sum(self._keep(task_id, parts) for task_id, parts in results)
        except _NotTaken:
            sized = {task_id: (sum(map(len, parts)), parts) for task_id, parts in results}
            with self._lock:
                self._unwritten.update(sized)
            return sum(size_bytes for size_bytes, _parts in sized.values())

    def _keep(self, task_id: int, parts: Iterable[bytes]) -> int:
        if not self._column("SELECT id FROM adc_task WHERE id = ?", task_id):
            return 0  # its job was cancelled meanwhile
        self._db.execute("DELETE FROM adc_part WHERE task_id = ?", (task_id,))
        size_bytes = 0
        for number, part in enumerate(_coalesced(parts)):
            self._db.execute(
                "INSERT INTO adc_part (task_id, number, body, checksum) VALUES (?, ?, ?, ?)",
                (task_id, number, part, part_checksum(task_id, number, part)),
            )
            size_bytes += len(part)
        self._db.execute("UPDATE adc_task SET result_bytes = ? WHERE id = ?", (size_bytes, task_id))
        return size_bytes

    @_resilient
    def settle(self, task_ids: Collection[int]) -> None:
        """Antenna has accepted these results: keep them compressed, in case their images come again."""
        bodies = {task_id: self._compressed(task_id) for task_id in task_ids}  # beside whoever keeps results
        self._write_loosely(lambda: self._finish(bodies), task_ids)

    def _compressed(self, task_id: int) -> bytes | None:
        """Return a result that is on disk, unless it is too large to be retained."""
        sizes = self._column("SELECT result_bytes FROM adc_task WHERE id = ? AND result_bytes NOT NULL", task_id)
        small = bool(sizes) and sizes[0] <= RETAINED_RESULT_BYTES
        return zlib.compress(b"".join(self.parts(task_id)), 1) if small else None

    def _finish(self, bodies: dict[int, bytes | None]) -> None:
        for task_id, body in bodies.items():
            if body is not None:
                self._db.execute(
                    "INSERT OR REPLACE INTO adc_finished"
                    " (job_id, image_id, reply_subject, seq, published_ns, body, checksum)"
                    " SELECT job_id, image_id, reply_subject, seq, published_ns, ?1,"
                    " adc_finished_checksum(job_id, image_id, ?1) FROM adc_task WHERE id = ?2",
                    (body, task_id),
                )
            self._db.execute("DELETE FROM adc_task WHERE id = ?", (task_id,))
        while self._used_bytes() > self.most_bytes:
            oldest = "DELETE FROM adc_finished WHERE id IN (SELECT id FROM adc_finished ORDER BY id LIMIT 10)"
            if not self._db.execute(oldest).rowcount:
                break

    def _used_bytes(self) -> int:
        pages, free, size_bytes = (
            self._column(f"PRAGMA {name}")[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size_bytes)

    def finished_jobs(self) -> list[int]:
        return self._column("SELECT DISTINCT job_id FROM adc_finished")

    @_resilient
    def newest_accepted(self, job_id: int) -> PostEntry | None:
        """Return an accepted result of the job, to be posted again."""
        columns = "image_id, reply_subject, body, checksum"
        query = f"SELECT {columns} FROM adc_finished WHERE job_id = ? AND reply_subject NOT NULL"  # noqa: S608 (a literal)
        with self._lock:
            row = self._db.execute(f"{query} ORDER BY id DESC LIMIT 1", (job_id,)).fetchone()
        if row is None:
            return None
        image_id, reply_subject, packed, checksum = row
        if checksum not in {None, finished_checksum(job_id, image_id, packed)}:
            raise DamageFound(f"the accepted result of image {image_id} is not what was written")
        body = zlib.decompress(packed)
        return PostEntry(reply_subject, len(body), lambda: [body])

    def has_success(self, job_id: int) -> bool:
        """Whether an image of the job has a result on record, kept or accepted, that is no error."""
        kept = self._column(
            "SELECT body FROM adc_part JOIN adc_task ON id = task_id WHERE job_id = ? AND number = 0 LIMIT ?",
            job_id,
            _SUCCESSES_LOOKED_AT,
        )
        accepted = self._column(
            "SELECT body FROM adc_finished WHERE job_id = ? ORDER BY id DESC LIMIT ?", job_id, _SUCCESSES_LOOKED_AT
        )
        starts = chain(kept, (zlib.decompressobj().decompress(body, _PART_START_BYTES) for body in accepted))
        return any(not is_error_result(start) for start in starts)

    def accepted_subjects(self, job_id: int, count: int) -> list[str]:
        """Return the leases of the job's results that were accepted last, up to `count`."""
        query = "SELECT reply_subject FROM adc_finished WHERE job_id = ? AND reply_subject NOT NULL"
        return self._column(f"{query} ORDER BY id DESC LIMIT ?", job_id, count)

    @_resilient
    def close_job(self, job_id: int) -> None:
        """The job is final: none of its images comes again."""
        delete = "DELETE FROM adc_finished WHERE job_id = ?"
        self._write_loosely(lambda: self._db.execute(delete, (job_id,)))

    def contact_age_s(self, job_id: int) -> float:
        """Return how long ago Antenna last answered a fetch of this job's tasks."""
        return time.monotonic() - self._contacts.get(job_id, float("-inf"))

    def parts(self, task_id: int) -> Iterator[bytes]:
        """Return a kept result piece by piece; another may be kept or forgotten meanwhile."""
        with self._lock:
            kept = self._unwritten.get(task_id)
        if kept is not None:
            yield from kept[1]
            return
        expected_bytes = self._result_bytes(task_id)
        size_bytes = 0
        number = 0
        while (part := self._part(task_id, number)) is not None:
            size_bytes += len(part)
            yield part
            number += 1
        if size_bytes != expected_bytes:
            self._note_missing_part(task_id, expected_bytes)

    def _result_bytes(self, task_id: int) -> int | None:
        sizes = self._column("SELECT result_bytes FROM adc_task WHERE id = ?", task_id)
        return sizes[0] if sizes else None

    @_resilient
    def _note_missing_part(self, task_id: int, expected_bytes: int | None) -> None:
        """A result came to its end too early: the file is damaged, unless the result was replaced or removed."""
        with self._lock:
            sizes = self._column("SELECT length(body) FROM adc_part WHERE task_id = ?", task_id)
            was_replaced = self._result_bytes(task_id) != expected_bytes
        if expected_bytes is not None and not was_replaced and sum(sizes) != expected_bytes:
            raise DamageFound(f"a part of the result of task {task_id} is missing")

    @_resilient
    def _part(self, task_id: int, number: int) -> bytes | None:
        query = "SELECT body, checksum FROM adc_part WHERE task_id = ? AND number = ?"
        with self._lock:
            row = self._db.execute(query, (task_id, number)).fetchone()
        if row is None:
            return None
        body, checksum = row
        if not isinstance(body, bytes) or checksum not in {None, part_checksum(task_id, number, body)}:
            raise DamageFound(f"part {number} of the result of task {task_id} is not what was written")
        return body

    @_resilient
    def forget(self, task_ids: Collection[int]) -> None:
        """Remove tasks whose outcome nobody wants."""
        numbers = [(task_id,) for task_id in task_ids]
        delete = "DELETE FROM adc_task WHERE id = ?"
        self._write_loosely(lambda: self._db.executemany(delete, numbers), task_ids)

    @_resilient
    def give_up(self, task_id: int, reply_subject: str) -> None:
        """Leave a task to its lease, unless it has another one by now."""
        where = "id = ? AND reply_subject = ?"
        found = self._column(f"SELECT id FROM adc_task WHERE {where}", task_id, reply_subject)  # noqa: S608 (a literal)
        delete = f"DELETE FROM adc_task WHERE {where}"  # noqa: S608 (a literal)
        self._write_loosely(lambda: self._db.execute(delete, (task_id, reply_subject)), found)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction.

        Raises:
            _NotTaken: the file took nothing, for a reason that may pass; `fault` tells, or another program holds it.
        """
        with self._lock:
            try:
                with self._guard.shared():
                    if self._is_replaced():
                        raise _FileReplaced
                    with self._transaction():
                        yield
            except sqlite3.Error as error:
                condition = condition_after(error)
                if condition not in {Condition.LOCKED, Condition.UNWRITABLE}:
                    raise
                self._note_trouble(error, condition)
                not_taken = _NotTaken(str(error))
                not_taken.sqlite_errorcode = error.sqlite_errorcode
                raise not_taken from error
            if self._locked_since is not None:
                _log.info("journal_unlocked", path=str(self._path), lasted_s=round(self._locked_s(), 1))
                self._locked_since = None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        timeout_s = self._patience.wait_s
        if self._locked_since is not None:
            timeout_s = min(timeout_s, _KNOWN_LOCKED_TIMEOUT_S)
        self._db.execute(f"PRAGMA busy_timeout={int(1000 * timeout_s)}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            rows = {task_id: self._row_of(task_id) for task_id in self._changed}
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite has rolled back by itself, or the error that is raised says why not
                self._db.rollback()
            raise
        finally:
            self._changed.clear()
        for task_id, row in rows.items():
            if row is not None and row["slot"] == self.slot:
                self._remembered[task_id] = row
            else:
                self._remembered.pop(task_id, None)

    def _note_trouble(self, error: sqlite3.Error, condition: Condition) -> None:
        text = f"the journal {self._path} cannot be written: {error}"
        if condition is Condition.UNWRITABLE:
            self.fault = text
        elif self._locked_since is None:
            self._locked_since = time.monotonic()
            _log.warning(
                "journal_locked",
                path=str(self._path),
                error=str(error),
                effect="nothing is fetched, results are kept in memory and posted from there until it is free",
                do="end the program that holds the file, such as a backup or an SQLite shell; `fuser` names it",
            )
        elif self._locked_s() >= self._patience.fault_s:
            self.fault = f"{text}, for {self._locked_s():.0f} s: end the program that holds it; `fuser` names it"

    def _locked_s(self) -> float:
        since = self._locked_since
        return 0.0 if since is None else time.monotonic() - since

    def _write_loosely(self, operation: Callable[[], object], to_forget: Collection[int] = ()) -> None:
        """One transaction that a power cut may undo: what it brings back is looked at, posted or worked on again.

        Where the file takes nothing, `fault` tells; tasks `to_forget` are out of sight, and removed once it does.
        """
        with self._lock:
            self._db.execute("PRAGMA synchronous=NORMAL")
            try:
                with self._writing():
                    operation()
            except _NotTaken:
                self._unwritten.update(dict.fromkeys(to_forget))
            finally:
                self._db.execute("PRAGMA synchronous=FULL")

    @_resilient
    def check_writable(self) -> bool:
        """Whether tasks may be fetched; after a fault, write what is in memory as soon as the file takes it."""
        with self._lock:
            if self.fault is not None or self._locked_since is not None or self._unwritten:
                try:
                    self._catch_up()
                except _NotTaken:
                    return False
                self.fault = None
            return self._disk_allows_fetching()

    def _disk_allows_fetching(self) -> bool:
        """Whether the disk has its reserve: below that results are kept still, which frees what their images take."""
        free_bytes = self._free_bytes(self._path.parent)
        if free_bytes >= RESERVE_BYTES:
            if self.shortage is not None:
                _log.info("journal_disk_low_over", free_bytes=free_bytes)
            self.shortage = None
            return True
        if self.shortage is None:
            _log.warning(
                "journal_disk_low",
                path=str(self._path),
                free_bytes=free_bytes,
                effect="nothing is fetched; what is staged is worked off, which frees space",
                do=f"free some space: fetching goes on at {RESERVE_BYTES} bytes",
            )
        self.shortage = f"the disk of the journal {self._path} has {free_bytes} bytes left"
        return False

    def _catch_up(self) -> None:
        with self._writing():
            self._db.execute(f"PRAGMA user_version={len(_SCHEMA)}")  # or there may be nothing to write
            for task_id, kept in self._unwritten.items():
                if kept is not None:
                    self._keep(task_id, kept[1])
                else:
                    self._db.execute("DELETE FROM adc_task WHERE id = ?", (task_id,))
        self._unwritten.clear()

    def is_full(self) -> bool:
        """Whether so much waits for Antenna that nothing should be computed meanwhile."""
        sizes = self._column("SELECT result_bytes FROM adc_task WHERE slot = ? AND result_bytes NOT NULL", self.slot)
        return (
            len(sizes) > UNPOSTED_RESULTS_MAX
            or sum(sizes) > self.most_bytes
            or self._unwritten_bytes() > UNWRITTEN_MAX_BYTES
        )

    def _unwritten_bytes(self) -> int:
        with self._lock:
            return sum(kept[0] for kept in self._unwritten.values() if kept is not None)

    def job_ids(self) -> set[int]:
        """Return the jobs this slot holds tasks or results of."""
        return set(self._column("SELECT DISTINCT job_id FROM adc_task WHERE slot = ?", self.slot))

    def jobs_of_others(self) -> set[int]:
        """Return the jobs that other slots hold tasks or results of."""
        return set(self._column("SELECT DISTINCT job_id FROM adc_task WHERE slot != ?", self.slot))

    def owner_in(self, folder: Path) -> str:
        """Return the name of this journal's part of a folder; none where that lies beside the file, and is its own."""
        path = self._path.resolve()
        beside = folder.resolve().parent == path.parent
        return "" if beside else f"journal-{zlib.crc32(bytes(path)):08x}-{path.stat().st_ino:x}"

    def was_used(self) -> bool:
        """Whether a task was ever on record here, by whatever worker."""
        return bool(self._column("SELECT 1 FROM sqlite_sequence WHERE name = 'adc_task'"))

    def subjects(self) -> list[str]:
        """Return the leases this slot holds."""
        return self._column("SELECT reply_subject FROM adc_task WHERE slot = ?", self.slot)

    def held_count(self, job_id: int) -> int:
        """Count a job's tasks that Antenna may still be waiting for."""
        query = "SELECT count(*) FROM adc_task WHERE slot = ? AND job_id = ?"
        return int(self._column(query, self.slot, job_id)[0])

    def unfinished(self, job_id: int) -> list[HeldTask]:
        """Return this slot's tasks of a job that have no result yet: oldest first, those with strikes last."""
        waiting = [held for held in self._rows("job_id = ?", job_id) if held.result_bytes is None]
        return sorted(waiting, key=lambda held: len(held.strikes or ()))

    def unfinished_ids(self) -> set[int]:
        """Return the tasks of every slot without a result: a kill may come between a result and its file's removal."""
        return set(self._column("SELECT id FROM adc_task WHERE result_bytes IS NULL"))

    def unposted(
        self, excluding: Collection[int], limit: int, most_bytes: int, excluding_jobs: Iterable[int] = ()
    ) -> list[HeldTask]:
        """Return tasks with kept results, oldest first, without those in `excluding`: up to `limit` and `most_bytes`.

        A result that exceeds `most_bytes` comes by itself.
        """
        chosen: list[HeldTask] = []
        with self._lock:
            unwritten, jobs = (",".join(map(str, ids)) for ids in (self._unwritten, excluding_jobs))
            waiting = self._rows(
                f"(result_bytes NOT NULL OR id IN ({unwritten})) AND job_id NOT IN ({jobs})",
                limit=limit + len(excluding) + len(self._unwritten),
            )
        for held in waiting:
            if held.id not in excluding:
                most_bytes -= held.result_bytes or 0
                if len(chosen) == limit or (most_bytes < 0 and chosen):
                    break
                chosen.append(held)
        return chosen

    def unposted_count(self) -> int:
        with self._lock:
            kept = set(self._column("SELECT id FROM adc_task WHERE slot = ? AND result_bytes NOT NULL", self.slot))
            for task_id, result in self._unwritten.items():
                (kept.discard if result is None else kept.add)(task_id)
            return len(kept)

    @_resilient
    def _column(self, query: str, *arguments: object) -> list[Any]:
        """Return the first column of what is asked for."""
        with self._lock:
            return [row[0] for row in self._db.execute(query, arguments)]

    @_resilient
    def _rows(self, where: str, *arguments: object, limit: int = -1) -> list[HeldTask]:
        """Return this slot's tasks; results and removals that the file did not take are seen, too."""
        query = f"SELECT * FROM adc_task WHERE slot = ? AND {where} ORDER BY id LIMIT ?"  # noqa: S608 (only this file's literals and integers)
        with self._lock:
            cursor = self._db.cursor()
            cursor.row_factory = sqlite3.Row
            rows = cursor.execute(query, (self.slot, *arguments, limit)).fetchall()
            return [self._held(row) for row in rows if self._unwritten.get(row["id"], row) is not None]

    def _held(self, row: sqlite3.Row) -> HeldTask:
        if row["checksum"] != checksum_of(*(row[name] for name in SEALED_COLUMNS)):
            raise DamageFound(f"the row of task {row['id']} is not what was written")
        result_bytes, _parts = self._unwritten.get(row["id"]) or (row["result_bytes"], ())
        return HeldTask(
            id=row["id"],
            job_id=row["job_id"],
            task=Task(image_id=row["image_id"], image_url=row["image_url"], reply_subject=row["reply_subject"]),
            fetched_at=row["fetched_at"],
            strikes=None if row["strikes"] is None else tuple(filter(None, row["strikes"].split(","))),
            result_bytes=result_bytes,
            url_erased=bool(row["url_erased"]),
        )

    # The file: opened, checked, exchanged

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:  # its damaged file could not be exchanged: the next start tries that again
            raise WorkerFault(f"the journal {self._path} is not open any more")
        return self._connection

    def _cannot_open(self, error: OSError | sqlite3.Error) -> WorkerFault:
        """Return the fault: only what does not pass by itself may have the code that no supervisor restarts on."""
        passes = may_pass(error) and (os.access(self._path.parent, os.W_OK) or not isinstance(error, sqlite3.Error))
        message = f"the journal {self._path} cannot be opened: {error}"
        if passes:
            return WorkerFault(message, ExitCode.MACHINE_FAULT)
        return WorkerFault(
            f"{message}; let this user read and write the file and its folder, or name another with"
            " AMI_USER_DATA_PATH or AMI_DATABASE_URL",
            ExitCode.JOURNAL_UNUSABLE,
        )

    def _begin_to_use(self) -> None:
        """Open the file, check it unless its last end was an orderly one, and adopt what nobody owns any more.

        A damaged file is replaced. The check reads all of it: 0.1 s for 50 MB, some 20 s for 2 GB on a slow disk.
        """
        with self._guard.alone():
            recovery.finish_exchange(self._path)
        ended_orderly, left_open = self._how_the_last_ones_ended()
        self._calls.inside = True  # no repeating here: whoever opens a journal decides how long to wait
        try:
            try:
                self._open_checked(check=not ended_orderly)
            except (sqlite3.Error, zlib.error) as error:
                if condition_after(error) not in {Condition.DAMAGED, Condition.SUSPECT}:
                    raise
                self._exchange(error)
                self._adopt_orphans()
        finally:
            self._calls.inside = False
            for fd in left_open:
                os.close(fd)
        _write_slot(self._slot_fd, _SLOT_OPEN)

    def _open_checked(self, *, check: bool) -> None:
        with self._guard.alone():  # nor is another worker about to make it
            is_new = not self._path.exists()
            if not is_new and self._was_written_before():
                self._file_id = _identity(self._path)
                if recovery.version_of(self._path) == 0:
                    raise DamageFound("what was written to it is gone")
            self._open_own()
        if check and not is_new:
            try:
                problem = recovery.find_damage(self._db)
            except TimeoutError as error:
                _log.warning("journal_check_broken_off", path=str(self._path), reason=str(error))
                problem = None
            if problem is not None:
                raise DamageFound(problem)
        self._check_rows()
        self._remember_rows()
        self._adopt_orphans()

    def _check_rows(self) -> None:
        """Check what takes no time to check: every start does."""
        problem = recovery.find_wrong_row(self._db)
        if problem is not None:
            raise DamageFound(problem)

    def _was_written_before(self) -> bool:
        """Whether the file was a journal before: a slot says so, or a write-ahead log is there."""
        log = self._path.with_name(f"{self._path.name}-wal")
        if log.exists() and log.stat().st_size > 0:
            return True
        return any(path.stat().st_size > 0 for path in self._slot_files())

    def _slot_files(self) -> list[Path]:
        found = self._path.parent.glob(f"{self._path.stem}.*.lock")
        return [path for path in found if path.name.split(".")[-2].isdecimal()]

    def _how_the_last_ones_ended(self) -> tuple[bool, list[int]]:
        """Return whether those before us ended orderly, and the locks of others' slots that were left open.

        The locks are held until the file is in use: what it says of these slots is our business now.
        """
        own = os.pread(self._slot_fd, len(_SLOT_OPEN) + len(_SLOT_CLOSED), 0)
        orderly = own == _SLOT_CLOSED
        left_open: list[int] = []
        for path in self._slot_files():
            slot = int(path.name.split(".")[-2])
            of_this_host = slot // _SLOTS_MAX == self._first_slot // _SLOTS_MAX
            if slot == self.slot or not of_this_host or path.read_bytes() != _SLOT_OPEN:
                continue
            fd = self._try_lock(slot)
            if fd is not None:
                orderly = False
                _write_slot(fd, _SLOT_CLOSED)
                left_open.append(fd)
        return orderly, left_open

    def _open(self, path: Path) -> sqlite3.Connection:
        _create(path)
        # Transactions are begun by `_transaction` alone.
        db = sqlite3.connect(path, timeout=self._patience.wait_s, check_same_thread=False, isolation_level=None)
        try:
            alone = self._shared or path != self._path
            db.execute(f"PRAGMA journal_mode={'DELETE' if alone else 'WAL'}")
            db.execute("PRAGMA synchronous=FULL")  # a result counts as kept only when a power cut cannot take it
            db.execute("PRAGMA foreign_keys=ON")
            db.execute("PRAGMA temp_store=MEMORY")
            # What is erased or forgotten must not stay readable; FAST leaves copies of rows in pages that were freed.
            db.execute("PRAGMA secure_delete=ON")
            db.create_function("adc_checksum", -1, checksum_of, deterministic=True)
            db.create_function("adc_finished_checksum", 3, finished_checksum, deterministic=True)
            db.create_function("adc_note", 1, self._changed.add)
            self._upgrade(db)
            self._seal_rows(db)
        except BaseException:
            db.close()
            raise
        return db

    def _upgrade(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > len(_SCHEMA):
            raise WorkerFault(
                f"the journal {self._path} was written by a newer worker (version {version}, this one knows"
                f" {len(_SCHEMA)}): install that version again, or move the file away once its results are posted",
                ExitCode.JOURNAL_UNUSABLE,
            )
        if version < len(_SCHEMA):
            with db:
                db.execute("BEGIN IMMEDIATE")
                (version,) = db.execute("PRAGMA user_version").fetchone()  # another worker may have been faster
                for statement in chain.from_iterable(script.split(";") for script in _SCHEMA[version:]):
                    db.execute(statement)
                # All of them: a newer version may have other columns, and a row without a checksum is a damaged one.
                db.execute(f"UPDATE adc_task SET checksum = adc_checksum({', '.join(SEALED_COLUMNS)})")  # noqa: S608 (our own names)
                db.execute(f"PRAGMA user_version={len(_SCHEMA)}")
        missing = _tables_of_the_schema() - _tables_in(db)
        if missing:
            raise DamageFound(f"it has no table {', '.join(sorted(missing))}")

    def _seal_rows(self, db: sqlite3.Connection) -> None:
        """Give every task that this connection writes its checksum, and note which tasks a transaction changes.

        By triggers of this connection, so that no statement can forget it, and other programs can read the file.
        """
        sealed = ", ".join(SEALED_COLUMNS)
        seal = f"UPDATE adc_task SET checksum = adc_checksum({sealed}) WHERE id = NEW.id;"  # noqa: S608 (our own names)
        for name, when in (("inserted", "INSERT"), ("changed", f"UPDATE OF {sealed}")):
            db.execute(
                f"CREATE TEMP TRIGGER adc_task_{name} AFTER {when} ON main.adc_task"
                f" BEGIN {seal} SELECT adc_note(NEW.id); END"
            )
        db.execute(
            "CREATE TEMP TRIGGER adc_task_removed AFTER DELETE ON main.adc_task BEGIN SELECT adc_note(OLD.id); END"
        )

    def _row_of(self, task_id: int) -> dict[str, Any] | None:
        rows = self._selected("SELECT * FROM adc_task WHERE id = ?", task_id)
        return rows[0] if rows else None

    def _selected(self, query: str, *arguments: object) -> list[dict[str, Any]]:
        cursor = self._db.cursor()
        cursor.row_factory = sqlite3.Row
        return [dict(row) for row in cursor.execute(query, arguments)]

    def _remember_rows(self) -> None:
        rows = self._selected("SELECT * FROM adc_task WHERE slot = ?", self.slot)
        self._remembered = {row["id"]: row for row in rows}
        self._remembers = True

    def repeat(self, operation: Callable[[], T]) -> T:
        """Return what an operation returns; repeat it where the file was damaged and replaced, or is held by others.

        Raises:
            WorkerFault: the file is damaged again and again, or cannot be read for minutes.
        """
        if getattr(self._calls, "inside", False):
            return operation()
        give_up_at = time.monotonic() + self._patience.end_s
        self._calls.inside = True
        try:
            while True:
                try:
                    self._follow_file()
                    return operation()
                except _FileReplaced:
                    continue
                except (sqlite3.Error, zlib.error, TypeError, ValueError) as error:
                    # The last two come of values that no row of ours has, or of what the caller brought.
                    self._mend(error, give_up_at)
        finally:
            self._calls.inside = False

    def _mend(self, error: Exception, give_up_at: float) -> None:
        """Do what makes it worthwhile to repeat an operation after an error; raise the error where nothing does."""
        condition = condition_after(error)
        if isinstance(error, _NotTaken):
            raise error
        if condition is Condition.SUSPECT and not self._is_damaged():
            raise error
        if condition in {Condition.DAMAGED, Condition.SUSPECT}:
            self._exchange(error)
        elif time.monotonic() < give_up_at:
            _log.warning("journal_unreadable", path=str(self._path), error=str(error), effect="this is tried again")
            self._pause()
        else:
            raise WorkerFault(
                f"the journal {self._path} cannot be read for {self._patience.end_s:.0f} s: {error};"
                " check its disk, and end whatever program holds it",
                ExitCode.MACHINE_FAULT,
            ) from error

    def _pause(self) -> None:
        time.sleep(min(_RETRY_S, self._patience.wait_s))

    def _is_damaged(self) -> bool:
        with self._lock:
            try:
                if _tables_of_the_schema() - _tables_in(self._db):
                    return True
                if recovery.find_wrong_row(self._db) is not None:
                    return True
                return recovery.find_damage(self._db) is not None
            except (sqlite3.DatabaseError, TimeoutError) as error:
                _log.warning("journal_check_failed", path=str(self._path), error=str(error))
                return isinstance(error, sqlite3.Error) and condition_after(error) is Condition.DAMAGED

    def _is_replaced(self) -> bool:
        """Whether the file's name leads to another file than the one that is open, or to none."""
        try:
            return _identity(self._path) != self._file_id
        except FileNotFoundError:
            return True

    def _follow_file(self) -> None:
        with self._lock:
            if not self._is_replaced():
                return
            if not self._path.exists():
                self._exchange(FileNotFoundError(f"{self._path} was removed"))
                return
            with self._guard.shared():
                self._reopen()
            self._restore_rows()

    def _reopen(self) -> None:
        self._close_file()
        self._open_own()

    def _open_own(self) -> None:
        _create(self._path)
        self._file_id = _identity(self._path)  # before it is read: what fails then is to be exchanged
        self._connection = self._open(self._path)

    def _close_file(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):  # of a damaged file: it has nothing to lose here
                self._connection.close()
            self._connection = None

    def _exchange(self, error: Exception) -> None:
        """Set the damaged file aside, and go on with one that has what could be read of it and what is remembered.

        Raises:
            WorkerFault: it cannot be set aside, or was too often.
        """
        with self._lock:
            with self._guard.alone():
                self._close_file()
                if not self._is_replaced() or not self._path.exists():
                    self._set_aside(error)
                self._reopen()
            if self._remembers:
                self._restore_rows()
            else:  # at the start: what was read of the damaged file is all there is
                self._remember_rows()

    def _set_aside(self, error: Exception) -> None:
        lately = recovery.set_aside_lately(self._path)
        if lately >= recovery.SET_ASIDE_MAX:
            raise WorkerFault(
                f"the journal {self._path} is damaged ({error}), for the {lately + 1}th time within an hour: check the"
                " disk (kernel log, smartctl), or set AMI_USER_DATA_PATH to another one, and start the worker again",
                ExitCode.JOURNAL_UNUSABLE,
            ) from error
        try:
            aside, salvaged = recovery.exchange(self._path, self._open, list(self._remembered.values()))
        except PermissionError as refused:
            raise WorkerFault(
                f"the journal {self._path} is damaged ({error}), and cannot be set aside: {refused}; let this user"
                f" write to {self._path.parent}, or move the file away yourself, and start the worker again",
                ExitCode.JOURNAL_UNUSABLE,
            ) from error
        _log.error(
            "journal_damaged",
            path=str(self._path),
            reason=str(error),
            set_aside=str(aside),
            tasks_read=salvaged.tasks,
            results_read=salvaged.results,
            results_lost=salvaged.results_lost,
            accepted_results_read=salvaged.accepted_results,
            effect="the worker goes on with a fresh file that has what could be read of the old one; tasks that could"
            " not be read come again when their leases end, unless this was their last delivery",
            do=f"check the disk (kernel log, smartctl); to look for more results: sqlite3 {aside} .recover; then remove"
            " the file",
        )

    def _restore_rows(self) -> None:
        """Make this slot's tasks in the file those that are remembered: a damaged file was read as far as possible."""
        restored = 0
        to_compute_again = 0
        with self._writing():
            present = {row["id"]: row for row in self._selected("SELECT * FROM adc_task WHERE slot = ?", self.slot)}
            forgotten = [(task_id,) for task_id in present if task_id not in self._remembered]
            self._db.executemany("DELETE FROM adc_task WHERE id = ?", forgotten)
            for task_id, row in list(self._remembered.items()):
                found = present.get(task_id)
                restored += found is None
                has_result = found is not None and found["result_bytes"] == row["result_bytes"]
                if not has_result:
                    to_compute_again += row["result_bytes"] is not None
                    self._db.execute("DELETE FROM adc_part WHERE task_id = ?", (task_id,))
                recovery.put_task(self._db, row if has_result else row | {"result_bytes": None})
        if restored or to_compute_again:
            _log.warning("tasks_restored", from_memory=restored, results_to_compute_again=to_compute_again)

    def _try_lock(self, slot: int) -> int | None:
        fd = os.open(self._path.with_name(f"{self._path.stem}.{slot}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def _take_slot(self) -> tuple[int, int]:
        for slot in range(self._first_slot, self._first_slot + _SLOTS_MAX):
            fd = self._try_lock(slot)
            if fd is not None:
                return slot, fd
        raise WorkerFault(f"{_SLOTS_MAX} workers already use the journal {self._path}", ExitCode.JOURNAL_UNUSABLE)

    def _adopt_orphans(self) -> None:
        """Take over the rows of slots whose worker is gone."""
        for slot in self._column("SELECT DISTINCT slot FROM adc_task"):
            of_this_host = slot // _SLOTS_MAX == self._first_slot // _SLOTS_MAX
            fd = self._try_lock(slot) if of_this_host and slot != self.slot else None
            if fd is None:
                continue
            try:
                with self._writing():
                    self._db.execute("UPDATE adc_task SET slot = ? WHERE slot = ?", (self.slot, slot))
            finally:
                os.close(fd)


def _create(path: Path) -> None:
    """Make a file that only its owner may read, unless it is there; SQLite gives its side files the same mode."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _identity(path: Path) -> tuple[int, int]:
    """Return device and inode: a file's name may lead to another one at any time."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _write_slot(fd: int, how: bytes) -> None:
    """Say in the file of a slot's lock whether a worker is at it or has ended orderly; a power cut leaves it so."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, how, 0)
    os.fsync(fd)


def _tables_in(db: sqlite3.Connection) -> set[str]:
    return {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _tables_of_the_schema() -> set[str]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        for statement in chain.from_iterable(script.split(";") for script in _SCHEMA):
            db.execute(statement)
        return _tables_in(db)


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
