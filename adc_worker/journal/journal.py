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
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from itertools import chain, islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from adc_worker.antenna.leases import lease_clock, parse_reply_subject, same_message
from adc_worker.antenna.wire import PostEntry, Task, is_error_result
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.host.budget import file_system
from adc_worker.host.process_name import new_process_name, process_name, process_scope
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

# An operator needs longer than this to cancel and retry a job. What was seen of a job's stream counts for so long.
CONTACT_S = 60.0

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
    """
CREATE TABLE adc_meta (  -- who this journal is, and where it lay
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE INDEX adc_meta_copy ON adc_meta (name, value, checksum);  -- the same on another page, should that be damaged
ALTER TABLE adc_task ADD COLUMN incarnation TEXT;  -- the run of the job that Antenna told of before the fetch, or NULL
ALTER TABLE adc_finished ADD COLUMN incarnation TEXT;
ALTER TABLE adc_finished ADD COLUMN image_url TEXT;  -- without what opens it. Only the same one is answered from here
-- All that is asked about streams, without a look at the bodies
CREATE INDEX adc_finished_stream ON adc_finished (job_id, incarnation, published_ns, seq, reply_subject)
""",
)
# Subjects that may still be posted, with the time at which their tasks were asked for. An accepted one may be repeated.
_SUBJECTS_IN_USE = (
    "SELECT seq, published_ns, fetched_at AS sent_at FROM adc_task WHERE job_id = :job"
    " UNION ALL SELECT seq, published_ns, 0.0 FROM adc_finished"
    " WHERE job_id = :job AND reply_subject NOT NULL"
)
# A checksum that was wrong stays wrong: the row is found to be damaged when it is read.
_RETIRE_FINISHED = (
    "UPDATE adc_finished SET reply_subject = NULL, checksum = iif(checksum ="
    " adc_finished_checksum(body, job_id, image_id, image_url, incarnation, reply_subject, seq, published_ns),"
    " adc_finished_checksum(body, job_id, image_id, image_url, incarnation, NULL, seq, published_ns), checksum)"
    " WHERE reply_subject NOT NULL"
)
_NOT_EXCLUDED = "id NOT IN (SELECT value FROM json_each(?))"
_VERSION_OF_NUMBERED_FILES = 1
_DATABASE_MAGIC = b"SQLite format 3\0"
_IDENTITY = "identity"  # names in adc_meta
_LAY_AT = "lay at"
_PART_BYTES = 1_000_000
_PART_START_BYTES = 64  # enough to tell an error result
_PACKED_START_BYTES = 4096  # of a compressed result, with its table of codes: enough to unpack these
_SUCCESSES_LOOKED_AT = 100
_FINISHED_AT_ONCE = 50  # results that are compressed before the file takes them
STRIKES_MAX = 2  # an image that was alone in the deaths of two processes gets an error result
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


@dataclass(slots=True)
class _Stream:
    """What this process has seen of a job's present stream; times are those of the journal's clock.

    Attributes:
        contact_at: when the newest request was sent whose answer showed the stream.
        answered_at: when tasks of it were last put on record.
        live_from_ns: a message published then was seen in the stream. Streams follow one another, so whatever is on
            record and was published no earlier is in the same one.
        opaque: subjects in unknown forms that were seen in the stream.
        incarnation: the run of the job that Antenna told of last.
        told_at: when Antenna had told of it.
    """

    contact_at: float = float("-inf")
    answered_at: float = float("-inf")
    live_from_ns: int | None = None
    opaque: set[str] = field(default_factory=set)
    incarnation: str | None = None
    told_at: float = float("-inf")

    def copied(self) -> _Stream:
        return replace(self, opaque=set(self.opaque))

    def has_newer_news(self, asked_at: float) -> bool:
        """Whether so much later requests were answered that the job may have been started anew since this one."""
        return self.contact_at - asked_at > CONTACT_S

    def doubt(self) -> None:
        """Another stream may have taken the place of this one: nothing on record is known to be in the present one."""
        self.live_from_ns = None
        self.opaque.clear()

    def show(self, subject: str, published_ns: int | None) -> None:
        """Take in that a message is in the present stream."""
        if published_ns is None:
            self.opaque.add(subject)
        elif self.live_from_ns is None or published_ns < self.live_from_ns:
            self.live_from_ns = published_ns

    def holds(self, subject: str, published_ns: int | None) -> bool:
        """Whether a message on record is in the stream, as far as was seen at the last contact."""
        if published_ns is None:
            return subject in self.opaque
        return self.live_from_ns is not None and published_ns >= self.live_from_ns


class Journal:
    """The journal of one worker process; safe to use from several threads."""

    def __init__(
        self,
        path: Path,
        patience: LockPatience | None = None,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
        now: Callable[[], float] = lease_clock,
    ) -> None:
        self._path = path
        self._free_bytes = free_bytes
        self._patience = patience or LockPatience()
        self._now = now
        self._name = new_process_name()  # of this process, in the marks of what it works on
        self._lock = threading.RLock()
        self._calls = threading.local()  # whether this thread is in a method that is repeated
        self.fault: str | None = None  # why the file cannot be written
        self.shortage: str | None = None  # why nothing may be fetched although results can be kept
        self._locked_since: float | None = None  # monotonic seconds; another program holds the file
        # What the file did not take meanwhile: size and parts of results; None where a task is to be forgotten.
        self._unwritten: dict[int, tuple[int, Iterable[bytes]] | None] = {}
        self._contacts: dict[int, _Stream] = {}
        self._remembered: dict[int, dict[str, Any]] = {}  # this slot's tasks as they were last written
        self._remembers = False  # not before they were read once
        self._to_restore = False  # the file was exchanged, and has not got yet what is remembered
        self._closed = False
        self._changed: set[int] = set()  # tasks that the transaction under way inserts, changes or removes
        self._file_id = (0, 0)  # device and inode of the file that is open
        self._identity: str | None = None  # None until the file was read once
        # As the file was found: the version it was of, and its inode. An exchange of a damaged file changes neither.
        self._found_version: int | None = None
        self._found_inode: int | None = None
        self._opened = 0  # how often a file was opened: what failed may be over when a thread gets to mend it
        self._connection: sqlite3.Connection | None = None
        try:
            # Locks lie beside the file: whoever names it by another way must find the same ones.
            path = self._path = path.resolve()
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
            self._closed = True
            clean = self._connection is not None
            try:
                # An orderly end accuses nobody.
                self._db.execute("UPDATE adc_task SET runner = NULL WHERE runner = ?", (self._name,))
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
        sent_at = fetched_at or self._now()
        wait_until = time.monotonic() + self._patience.fault_s
        while True:
            try:
                self._write_fetched(job_id, tasks, sent_at)
                break
            except _NotTaken as error:
                if condition_after(error) is Condition.LOCKED and time.monotonic() < wait_until:
                    self._pause()  # or these tasks would spend a delivery each
                    continue
                _log.warning("tasks_left_to_their_lease", job_id=job_id, tasks=len(tasks), reason=f"journal: {error}")
                return []
        subjects = {task.reply_subject for task in tasks}
        return [held for held in self.unfinished(job_id) if held.task.reply_subject in subjects]

    def _write_fetched(self, job_id: int, tasks: Sequence[Task], sent_at: float) -> None:
        with self._lock:
            known = self._contacts.get(job_id)
            before = None if known is None else known.copied()
            try:
                with self._writing():
                    current = self._of_present_stream(job_id, tasks, sent_at)
                    self._show_stream(job_id, current, sent_at)
                    for task in current:
                        if not self._rejoin(job_id, task, sent_at):
                            self._insert(job_id, task, sent_at)
            except BaseException:
                self._restore_contact(job_id, before)
                raise

    def _restore_contact(self, job_id: int, before: _Stream | None) -> None:
        """Forget what an undone transaction showed of a job's stream: the same tasks may be recorded once more."""
        if before is None:
            self._contacts.pop(job_id, None)
        else:
            self._contacts[job_id] = before

    def find(self, job_id: int, task: Task) -> HeldTask | None:
        """Return the task that this is another delivery of; None when we do not hold it."""
        rows = self._rows("job_id = ? AND image_id = ?", job_id, task.image_id)
        return next((held for held in rows if _is_same_delivery(held.task, task)), None)

    def held(self, task_id: int) -> HeldTask | None:
        """Return a task that is on record here, as its newest delivery brought it."""
        return next(iter(self._rows("id = ?", task_id)), None)

    def _rejoin(self, job_id: int, task: Task, now: float) -> bool:
        """Let the row that has this image already go on under the new subject; False when there is none."""
        held = self.find(job_id, task)
        event = "delivery_joined"
        if held is None:
            held = self._left_by_earlier_run(job_id, task)
            event = "task_moved_to_new_run"
        if held is None:
            return False
        seq, published_ns = _message(task.reply_subject)
        # A URL that may still open the image replaces one of which only the public part is left.
        self._db.execute(
            "UPDATE adc_task SET reply_subject = ?, fetched_at = ?, seq = ?, published_ns = ?, incarnation = ?,"
            " image_url = ?, url_erased = 0 WHERE id = ?",
            (task.reply_subject, now, seq, published_ns, self._incarnation(job_id, now), task.image_url, held.id),
        )
        _log.info(event, job_id=job_id, image_id=task.image_id)
        return True

    def _left_by_earlier_run(self, job_id: int, task: Task) -> HeldTask | None:
        """Return the task of the same image under another message, unless that is known to be in the present stream.

        A run of a job gives each image one message. What was staged or computed for the image is as good for this one.
        A kept error is not: what was wrong with the image may have been put right.
        """
        for held in self._rows("job_id = ? AND image_id = ?", job_id, task.image_id):
            if public_url(held.task.image_url) != public_url(task.image_url) or self.is_live(held):
                continue
            incarnations = self._column("SELECT incarnation FROM adc_task WHERE id = ?", held.id)
            if self._is_of_another_job(job_id, incarnations):
                continue
            if held.result_bytes is not None and not self._may_answer_again(job_id, held.id, incarnations):
                continue
            return held
        return None

    def _may_answer_again(self, job_id: int, task_id: int, incarnations: Sequence[str | None]) -> bool:
        if not self._is_of_same_job_and_pipeline(job_id, incarnations):
            return False
        start = next(iter(self.parts(task_id)), b"")
        return not is_error_result(start)

    def _insert(self, job_id: int, task: Task, now: float) -> None:
        seq, published_ns = _message(task.reply_subject)
        cursor = self._db.execute(
            "INSERT INTO adc_task (slot, job_id, image_id, image_url, reply_subject, fetched_at, seq, published_ns,"
            " incarnation) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.slot,
                job_id,
                task.image_id,
                task.image_url,
                task.reply_subject,
                now,
                seq,
                published_ns,
                self._incarnation(job_id, now),
            ),
        )
        self._answer_from_finished(int(cursor.lastrowid or 0), job_id, task)

    def _answer_from_finished(self, task_id: int, job_id: int, task: Task) -> None:
        """Keep for a task what the same pipeline computed for the same image of the same job before.

        Numbers alone prove neither: once Antenna's database was set up anew they are those of others.
        """
        same_image = "job_id = ? AND image_id = ? AND image_url = ?"
        query = f"SELECT * FROM adc_finished WHERE {same_image}"  # noqa: S608 (a literal)
        found = self._selected(query, job_id, task.image_id, public_url(task.image_url))
        bodies = [_checked_body(row) for row in found]
        if not self._is_of_same_job_and_pipeline(job_id, [row["incarnation"] for row in found]):
            return
        for body in bodies:
            if not is_error_result(body):  # what was wrong with the image may have been put right
                _log.info("answered_from_journal", job_id=job_id, image_id=task.image_id)
                self._keep(task_id, [body])

    def _is_of_another_job(self, job_id: int, incarnations: Sequence[str | None]) -> bool:
        """Whether what was recorded in these runs was of an earlier job of the same number, as far as Antenna told."""
        stream = self._contacts.get(job_id)
        if stream is None or stream.incarnation is None:
            return False
        present = _job_and_pipeline(stream.incarnation)
        return any(told is not None and _job_and_pipeline(told) != present for told in incarnations)

    def _is_of_same_job_and_pipeline(self, job_id: int, incarnations: Sequence[str | None]) -> bool:
        """Whether results that were computed in these runs are known to be of the pipeline that the job has now.

        A job may be given another pipeline before it is retried, and Antenna saves no result of the earlier one. Where
        a run is not known the image is computed again.
        """
        stream = self._contacts.get(job_id)
        if stream is None or stream.incarnation is None:
            return False
        present = _job_and_pipeline(stream.incarnation)
        return all(told is not None and _job_and_pipeline(told) == present for told in incarnations)

    @_resilient
    def erase_url(self, held: HeldTask) -> None:
        """Forget what opens a staged image's URL; a power cut may bring it back, so nothing waits for the disk."""
        url = public_url(held.task.image_url)
        if url == held.task.image_url:
            return
        erase = "UPDATE adc_task SET image_url = ?, url_erased = 1 WHERE id = ? AND image_url = ?"
        self._write_loosely(lambda: self._db.execute(erase, (url, held.id, held.task.image_url)))

    def _of_present_stream(self, job_id: int, tasks: Sequence[Task], sent_at: float) -> Sequence[Task]:
        """Return the tasks if they are of the job's present stream, and retire the subjects of earlier streams.

        Within one stream sequence and time rise together. Two messages that contradict this are of two streams. The
        tasks of one answer are of one stream, so its first and its last message show as much as all of them.
        """
        messages = [message for task in tasks if (message := _message(task.reply_subject)) != (None, None)]
        if not messages:
            return tasks
        if self._is_of_earlier_stream(job_id, max(messages), sent_at):
            reason = "their stream is gone: the job was started anew since they were asked for"
            _log.warning("tasks_left_to_their_lease", job_id=job_id, tasks=len(tasks), reason=reason)
            return []
        seq, published_ns = min(messages)
        retired_until = self._column(
            f"SELECT max(published_ns) FROM ({_SUBJECTS_IN_USE}) WHERE seq >= :seq AND published_ns < :ns",  # noqa: S608 (a literal)
            {"job": job_id, "seq": seq, "ns": published_ns},
        )[0]
        if retired_until is not None:
            self._retire(job_id, "coalesce(published_ns, 0) <= ?", retired_until)
        return tasks

    def _is_of_earlier_stream(self, job_id: int, message: tuple[int | None, int | None], sent_at: float) -> bool:
        """Whether a fetched message is of a stream before the one that is on record: its answer came late.

        When it was asked for after everything on record had come, the clock of NATS was set back instead, and what is
        on record is retired: the order of what is on record tells nothing any more.
        """
        seq, published_ns = message
        contradicting = self._column(
            f"SELECT sent_at FROM ({_SUBJECTS_IN_USE}) WHERE seq <= :seq AND published_ns > :ns",  # noqa: S608 (a literal)
            {"job": job_id, "seq": seq, "ns": published_ns},
        )
        if not contradicting:
            return False
        answered_at = self._contacts.get(job_id, _Stream()).answered_at
        if sent_at < max(answered_at, *contradicting):
            return True
        self._retire(job_id, "true")
        return False

    def _show_stream(self, job_id: int, tasks: Sequence[Task], sent_at: float) -> None:
        """Take in that these tasks were in the job's stream when they were asked for; no task shows nothing."""
        if not tasks:
            return
        stream = self._contact(job_id, sent_at)
        stream.answered_at = self._now()
        if stream.has_newer_news(sent_at):
            return
        for task in tasks:
            _seq, published_ns = _message(task.reply_subject)
            stream.show(task.reply_subject, published_ns)

    def _contact(self, job_id: int, asked_at: float) -> _Stream:
        stream = self._contacts.setdefault(job_id, _Stream())
        if asked_at - stream.contact_at > CONTACT_S:
            stream.doubt()
        stream.contact_at = max(stream.contact_at, asked_at)
        return stream

    @_resilient
    def note_served(self, job_id: int, incarnation: str | None, asked_at: float) -> None:
        """Take in that Antenna serves the job, as it answered to a request sent at `asked_at`, and in which run.

        What was fetched in the same run is in the present stream, however long ago that was and whatever the clocks
        say. Nothing is taken in where Antenna names no run.
        """
        if incarnation is None:
            return
        with self._lock:
            stream = self._contact(job_id, asked_at)
            if stream.has_newer_news(asked_at):
                return
            if stream.incarnation not in {None, incarnation}:
                stream.doubt()
            stream.incarnation = incarnation
            stream.told_at = self._now()
            for table in ("adc_task", "adc_finished"):
                for subject, published_ns in self._first_of_run(table, job_id, incarnation):
                    stream.show(subject, published_ns)

    def _first_of_run(self, table: str, job_id: int, incarnation: str) -> list[tuple[str, int | None]]:
        """Return the subjects in a table, with their time, that show every one of a run to be in the stream.

        That is the first one published, and each whose subject cannot be read. They prove what may be posted, so their
        rows are compared with their checksums.
        """
        of_this_run = f"SELECT * FROM {table} WHERE job_id = ? AND incarnation = ? AND reply_subject NOT NULL"  # noqa: S608 (our own names)
        first = f"{of_this_run} AND published_ns NOT NULL ORDER BY published_ns LIMIT 1"
        rows = self._selected(first, job_id, incarnation)
        rows += self._selected(f"{of_this_run} AND published_ns IS NULL", job_id, incarnation)
        for row in rows:
            if table == "adc_task":
                _check_task(row)
            else:
                _check_finished(row)
        return [(row["reply_subject"], row["published_ns"]) for row in rows]

    def incarnation_age_s(self, job_id: int) -> float:
        """Return how long ago Antenna told in which run the job is; infinite when that is not known."""
        with self._lock:
            stream = self._contacts.get(job_id)
            known = stream is not None and stream.incarnation is not None
            return self._now() - stream.told_at if stream is not None and known else float("inf")

    def _incarnation(self, job_id: int, sent_at: float) -> str | None:
        """Return the run of what is fetched by a request sent at `sent_at`, if it was told before that.

        A run that was told later might be the one after it.
        """
        stream = self._contacts.get(job_id)
        return stream.incarnation if stream is not None and stream.told_at <= sent_at else None

    def is_live(self, held: HeldTask, within_s: float = CONTACT_S) -> bool:
        """Whether a task's subject is known to acknowledge its own image now.

        After a restart of its job the same subject acknowledges another image. The proof is what was seen of the stream
        within the last `within_s` seconds.
        """
        with self._lock:
            stream = self._contacts.get(held.job_id)
            if stream is None or self._now() - stream.contact_at > within_s:
                return False
            return stream.holds(held.task.reply_subject, _message(held.task.reply_subject)[1])

    def _retire(self, job_id: int, where: str, *arguments: object) -> None:
        """Never use these subjects of a job again; results stay for images that come again, tasks are dropped."""
        where = f"job_id = ? AND {where}"
        arguments = (job_id, *arguments)
        dead = self._column(f"SELECT id FROM adc_task WHERE {where}", *arguments)  # noqa: S608 (literals)
        runs = set(self._column(f"SELECT incarnation FROM adc_task WHERE {where}", *arguments))  # noqa: S608 (literals)
        for first in range(0, len(dead), _FINISHED_AT_ONCE):  # a job's results may be more than fit into memory
            some = dead[first : first + _FINISHED_AT_ONCE]
            self._finish({task_id: self._compressed(task_id) for task_id in some})
        self._db.execute(f"{_RETIRE_FINISHED} AND {where}", arguments)
        stream = self._contacts.get(job_id)
        if stream is not None:
            stream.doubt()
            if stream.incarnation in runs:  # it is over, and the present one is to be asked for
                stream.incarnation = None
        if dead:  # of a job that came to its end nothing is left
            _log.warning("subjects_dead", job_id=job_id, tasks=len(dead), reason="the job was stopped or restarted")

    @_resilient
    def bury(self, job_id: int, asked_at: float = float("inf")) -> list[int]:
        """The job is served no more: no subject on record may be used; results stay for images that come again.

        That is what Antenna answered to a request sent at `asked_at`. Tasks that came since are newer, and of a new
        stream perhaps: nothing is retired then. Return the tasks whose staged files nobody needs.
        """
        if self._contacts.get(job_id, _Stream()).answered_at > asked_at:
            return []
        unfinished = [held.id for held in self.unfinished(job_id)]
        of_the_job = self._column("SELECT id FROM adc_task WHERE slot = ? AND job_id = ?", self.slot, job_id)
        self._write_loosely(lambda: self._retire(job_id, "true"), of_the_job)
        stream = self._contacts.get(job_id)
        if stream is not None:
            stream.incarnation = None  # that run is over, and the next one may be of another pipeline
        return unfinished

    @_resilient
    def begin(self, task_ids: Iterable[int], oom_kills: int, *, alone: bool) -> None:
        """Mark tasks that are about to be decoded and inferred, so that a crash shows which they were.

        The marks need not survive a power cut. `alone` says that nothing else is in work any more.
        """
        marks = [(self._name, oom_kills, task_id) for task_id in task_ids]

        def mark() -> None:
            if alone:
                self._db.execute("UPDATE adc_task SET runner = NULL WHERE runner = ?", (self._name,))
            self._db.executemany("UPDATE adc_task SET runner = ?, oom_kills = ? WHERE id = ?", marks)

        self._write_loosely(mark)

    @_resilient
    def accuse(self, died: tuple[int, str] | None, oom_kills: int) -> int:
        """Make suspects of what dead processes were working on, and return how many tasks that are.

        `died` is the pid and the cause of a death that was the process's own making. A task that was alone in it, or in
        a process that ended while the kernel killed for want of memory, gets a strike. Process ids and the kernel's
        count are compared within one container only: another one has the same ids, and a count of its own.
        """
        if not self._column("SELECT 1 FROM adc_task WHERE slot = ? AND runner NOT NULL LIMIT 1", self.slot):
            return 0  # nothing to write, so that a program that holds the file does not hold up the start
        dead = None if died is None else process_name(died[0])
        scope = process_scope()
        with self._writing():
            where = "slot = ? AND runner NOT NULL AND result_bytes IS NULL"
            query = f"SELECT id, runner, oom_kills FROM adc_task WHERE {where}"  # noqa: S608 (a literal)
            in_work = self._db.execute(query, (self.slot,)).fetchall()
            together = Counter(runner for _task_id, runner, _oom_kills in in_work)
            for task_id, runner, oom_kills_before in in_work:
                name = str(runner)  # of an earlier version: a bare process id, which proves nothing
                counted_here = name.startswith(scope)
                cause = "out of memory" if counted_here and oom_kills > oom_kills_before else ""
                if died is not None and dead is not None and name.startswith(dead):
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
    def keep(self, results: Collection[tuple[int, Iterable[bytes]]], images: Mapping[int, str] | None = None) -> int:
        """Keep (task id, parts of a serialised result) pairs in one transaction; return the bytes kept.

        On return they survive a power cut, unless `fault` is set: then they are in memory. Parts are taken one by one,
        so that they may be made on the way, and must give the same again when they are asked again. `images` says by
        task of which image the results are.

        Raises:
            WorkerFault: a task is one of another image.
        """
        try:
            with self._writing():
                self._check_images(images or {})
                return sum(self._keep(task_id, parts) for task_id, parts in results)
        except _NotTaken:
            self._check_remembered_images(images or {})
            sized = {task_id: (sum(map(len, parts)), parts) for task_id, parts in results}
            with self._lock:
                self._unwritten.update(sized)
            return sum(size_bytes for size_bytes, _parts in sized.values())

    def _check_images(self, images: Mapping[int, str]) -> None:
        for task_id, image_id in images.items():
            for recorded in self._column("SELECT image_id FROM adc_task WHERE id = ?", task_id):
                self._check_image(task_id, image_id, recorded)

    def _check_remembered_images(self, images: Mapping[int, str]) -> None:
        """Check the same without the file, which takes nothing and perhaps cannot be read."""
        for task_id, image_id in images.items():
            row = self._remembered.get(task_id)
            if row is not None:
                self._check_image(task_id, image_id, row["image_id"])

    def _check_image(self, task_id: int, image_id: str, recorded: str) -> None:
        if recorded != image_id:
            raise WorkerFault(
                f"task {task_id} is of image {recorded}, and the result for it of image {image_id}: nothing of this"
                f" batch is kept; {self._path} was replaced while this worker ran, or this is a bug"
            )

    def _keep(self, task_id: int, parts: Iterable[bytes]) -> int:
        urls = self._column("SELECT image_url FROM adc_task WHERE id = ? AND slot = ?", task_id, self.slot)
        if not urls:
            return 0  # its job was cancelled meanwhile, or another worker has a task of this number in a replaced file
        url = public_url(urls[0])
        self._db.execute("DELETE FROM adc_part WHERE task_id = ?", (task_id,))
        size_bytes = 0
        for number, part in enumerate(_coalesced(parts)):
            self._db.execute(
                "INSERT INTO adc_part (task_id, number, body, checksum) VALUES (?, ?, ?, ?)",
                (task_id, number, part, part_checksum(task_id, number, part)),
            )
            size_bytes += len(part)
        self._db.execute(
            # Nothing is to be downloaded for it any more. Should the result be lost to damage, a URL without what opens
            # it must not be asked for: the answer would count against the image.
            "UPDATE adc_task SET result_bytes = ?, image_url = ?, url_erased = url_erased OR ? WHERE id = ?",
            (size_bytes, url, url != urls[0], task_id),
        )
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
            urls = self._column("SELECT image_url FROM adc_task WHERE id = ?", task_id)
            if body is not None and urls:
                self._db.execute(
                    "INSERT OR REPLACE INTO adc_finished (job_id, image_id, reply_subject, seq, published_ns,"
                    " incarnation, image_url, body, checksum)"
                    " SELECT job_id, image_id, reply_subject, seq, published_ns, incarnation, ?1, ?2,"
                    " adc_finished_checksum(?2, job_id, image_id, ?1, incarnation, reply_subject, seq, published_ns)"
                    " FROM adc_task WHERE id = ?3",
                    (public_url(urls[0]), body, task_id),
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
        """Return an accepted result of the job whose subject is known to be good, to be posted again."""
        query = "SELECT * FROM adc_finished WHERE job_id = ? AND reply_subject = ?"
        subjects = self._accepted_live(job_id, 1, CONTACT_S)
        found = [row for subject in subjects for row in self._selected(query, job_id, subject)]
        if not found:
            return None
        row = found[0]
        body = _checked_body(row)
        return PostEntry(row["reply_subject"], len(body), lambda: [body])

    @_resilient
    def has_success(self, job_id: int) -> bool:
        """Whether an image of the job has a result on record, kept or accepted, that is no error."""
        with self._lock:
            return any(not is_error_result(start) for start in self._starts_of_results(job_id))

    def _starts_of_results(self, job_id: int) -> Iterator[bytes]:
        """Yield how the newest results of a job begin, one by one: whoever has seen enough reads no more of them."""
        kept = (
            "SELECT substr(body, 1, ?) FROM adc_part JOIN adc_task ON id = task_id"
            " WHERE job_id = ? AND number = 0 LIMIT ?"
        )
        for (start,) in self._db.execute(kept, (_PART_START_BYTES, job_id, _SUCCESSES_LOOKED_AT)):
            yield start
        accepted = "SELECT substr(body, 1, ?) FROM adc_finished WHERE job_id = ? ORDER BY id DESC LIMIT ?"
        for (packed,) in self._db.execute(accepted, (_PACKED_START_BYTES, job_id, _SUCCESSES_LOOKED_AT)):
            yield zlib.decompressobj().decompress(packed, _PART_START_BYTES)

    def accepted_subjects(self, job_id: int, count: int) -> list[str]:
        """Return the leases of the job's results that were accepted last, up to `count`, in the stream seen last."""
        return self._accepted_live(job_id, count, float("inf"))

    @_resilient
    def _accepted_live(self, job_id: int, count: int, within_s: float) -> list[str]:
        with self._lock:
            stream = self._contacts.get(job_id)
            if stream is None or self._now() - stream.contact_at > within_s:
                return []
            query = "SELECT reply_subject, published_ns FROM adc_finished WHERE job_id = ? AND reply_subject NOT NULL"
            newest_first = self._db.execute(f"{query} ORDER BY id DESC", (job_id,))
            live = (subject for subject, published_ns in newest_first if stream.holds(subject, published_ns))
            return list(islice(live, count))

    @_resilient
    def close_job(self, job_id: int) -> None:
        """The job is final: none of its images comes again."""
        delete = "DELETE FROM adc_finished WHERE job_id = ?"
        self._write_loosely(lambda: self._db.execute(delete, (job_id,)))

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

    @property
    def staging_name(self) -> str:
        """The name of this journal's folder of staged files, wherever it lies: no other journal has the same."""
        return f"journal-{self._identity}"

    def own_earlier_staging(self, folder: Path) -> Path | None:
        """Return where the version before staged for this journal, if it was upgraded just now; `folder` is configured.

        That version named files by numbers alone, and journals in one directory shared a folder beside them. None where
        another journal may have done so: what is in a file is not known then.
        """
        if self._found_version != _VERSION_OF_NUMBERED_FILES:
            return None
        beside = folder.resolve().parent == self._path.parent
        own_files = {self._path, *recovery.damaged_files(self._path)}
        if beside and any(_is_database(file) for file in self._path.parent.iterdir() if file not in own_files):
            return None
        name = f"journal-{zlib.crc32(bytes(self._path)):08x}-{self._found_inode or 0:x}"
        earlier = folder if beside else folder / name
        return earlier if earlier.is_dir() else None

    def was_used(self) -> bool:
        """Whether a task was ever on record here, by whatever worker."""
        return bool(self._column("SELECT 1 FROM sqlite_sequence WHERE name = 'adc_task'"))

    def subjects(self) -> list[str]:
        """Return the leases this slot holds in the streams that were seen last; another one would be a stranger's."""
        held = self._rows("true")
        return [one.task.reply_subject for one in held if self.is_live(one, float("inf"))]

    def held_count(self, job_id: int, excluding: Iterable[int] = ()) -> int:
        """Count a job's tasks that Antenna may still be waiting for, without those in `excluding`."""
        query = f"SELECT count(*) FROM adc_task WHERE slot = ? AND job_id = ? AND {_NOT_EXCLUDED}"  # noqa: S608 (a literal)
        return int(self._column(query, self.slot, job_id, _as_json(excluding))[0])

    def unfinished(self, job_id: int) -> list[HeldTask]:
        """Return this slot's tasks of a job that have no result yet: oldest first, those with strikes last."""
        waiting = [held for held in self._rows("job_id = ?", job_id) if held.result_bytes is None]
        return sorted(waiting, key=lambda held: len(held.strikes or ()))

    @_resilient
    def unfinished_tasks(self) -> dict[int, Task]:
        """Return the tasks of every slot without a result, by number."""
        query = "SELECT id, image_id, image_url, reply_subject FROM adc_task WHERE result_bytes IS NULL"
        with self._lock:
            rows = self._db.execute(query).fetchall()
        return {
            task_id: Task(image_id=image_id, image_url=image_url, reply_subject=reply_subject)
            for task_id, image_id, image_url, reply_subject in rows
        }

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
                f"(result_bytes NOT NULL OR id IN ({unwritten})) AND job_id NOT IN ({jobs}) AND {_NOT_EXCLUDED}",
                _as_json(excluding),
                limit=limit + len(self._unwritten),
            )
        for held in waiting:
            most_bytes -= held.result_bytes or 0
            if len(chosen) == limit or (most_bytes < 0 and chosen):
                break
            chosen.append(held)
        return chosen

    @_resilient
    def live_ids(self, job_id: int) -> list[int]:
        """Return the tasks of a job whose subjects are known to acknowledge their own images now.

        No row is compared with its checksum: whoever posts one asks `is_live` for it.
        """
        with self._lock:
            stream = self._contacts.get(job_id)
            if stream is None or self._now() - stream.contact_at > CONTACT_S:
                return []
            query = "SELECT id, reply_subject, published_ns FROM adc_task WHERE slot = ? AND job_id = ?"
            rows = self._db.execute(query, (self.slot, job_id))
            return [task_id for task_id, subject, published_ns in rows if stream.holds(subject, published_ns)]

    def unposted_count(self, excluding: Collection[int] = ()) -> int:
        """Count the kept results that Antenna has not accepted, without those in `excluding`."""
        with self._lock:
            kept = set(self._column("SELECT id FROM adc_task WHERE slot = ? AND result_bytes NOT NULL", self.slot))
            for task_id, result in self._unwritten.items():
                (kept.discard if result is None else kept.add)(task_id)
            return len(kept.difference(excluding))

    @_resilient
    def _column(self, query: str, *arguments: object) -> list[Any]:
        """Return the first column of what is asked for; a mapping gives the arguments by name."""
        by_name = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], Mapping) else None
        with self._lock:
            return [row[0] for row in self._db.execute(query, arguments if by_name is None else dict(by_name))]

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
        _check_task(row)
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
        if self._connection is None:
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
            self._refuse_second_name()
        ended_orderly, left_open = self._how_the_last_ones_ended()
        if self._was_written_before():
            # Before anything is written to it: a start that is cut short is no orderly end.
            _write_slot(self._slot_fd, _SLOT_OPEN)
        self._calls.inside = True  # no repeating here: whoever opens a journal decides how long to wait
        try:
            try:
                self._open_checked(check=not ended_orderly)
            except (sqlite3.Error, zlib.error) as error:
                if condition_after(error) not in {Condition.DAMAGED, Condition.SUSPECT}:
                    raise
                self._exchange(error)
                self._adopt_orphans()
            _write_slot(self._slot_fd, _SLOT_OPEN)
            for fd in left_open:  # not before the check: what it would find is to be looked for until it was done
                _write_slot(fd, _SLOT_CLOSED)
        finally:
            self._calls.inside = False
            for fd in left_open:
                os.close(fd)

    def _open_checked(self, *, check: bool) -> None:
        with self._guard.alone():  # nor is another worker about to make it
            is_new = not self._path.exists()
            if not is_new and self._was_written_before():
                self._file_id = _device_and_inode(self._path)
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
            db.create_function("adc_finished_checksum", -1, finished_checksum, deterministic=True)
            db.create_function("adc_note", 1, self._changed.add)
            self._upgrade(db)
            self._seal_rows(db)
        except BaseException:
            db.close()
            raise
        return db

    def _upgrade(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if self._found_version is None:
            self._found_version = version
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
                self._follow_file()
                opened = self._opened
                try:
                    return operation()
                except _FileReplaced:
                    continue
                except (sqlite3.Error, zlib.error, TypeError, ValueError) as error:
                    # The last two come of values that no row of ours has, or of what the caller brought.
                    with self._lock:
                        if self._opened == opened:  # else another thread has exchanged the file meanwhile
                            self._mend(error)
                    if condition_after(error) in {Condition.LOCKED, Condition.UNWRITABLE}:
                        self._wait_to_read(error, give_up_at)
        finally:
            self._calls.inside = False

    def _mend(self, error: Exception) -> None:
        """Do what makes it worthwhile to repeat an operation after an error; raise the error where nothing does."""
        condition = condition_after(error)
        if isinstance(error, _NotTaken):
            raise error
        if condition is Condition.SUSPECT and not self._is_damaged():
            raise error
        if condition in {Condition.DAMAGED, Condition.SUSPECT}:
            self._exchange(error)

    def _wait_to_read(self, error: Exception, give_up_at: float) -> None:
        """Wait before a file that could not be read is read again; other threads may try meanwhile."""
        if time.monotonic() < give_up_at:
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
            return _device_and_inode(self._path) != self._file_id
        except FileNotFoundError:
            return True

    def _follow_file(self) -> None:
        """Open the file that has taken the place of the one that was open; where an exchange failed, go on with it.

        Under one lock: no other thread sees the journal without its file, or without what is remembered.
        """
        with self._lock:
            if self._closed:
                return
            try:
                if self._connection is None or self._is_replaced():
                    self._follow_replaced_file()
                if self._to_restore:
                    self._restore_rows()
            except sqlite3.Error as error:
                if condition_after(error) is not Condition.DAMAGED:
                    raise
                self._exchange(error)

    def _follow_replaced_file(self) -> None:
        if not self._path.exists():
            self._exchange(FileNotFoundError(f"{self._path} was removed"))
            return
        with self._guard.shared():
            self._reopen()

    def _reopen(self) -> None:
        self._close_file()
        self._to_restore = self._remembers
        self._open_own()

    def _open_own(self) -> None:
        _create(self._path)
        self._opened += 1
        self._file_id = _device_and_inode(self._path)  # before it is read: what fails then is to be exchanged
        if self._found_inode is None:
            self._found_inode = self._path.stat().st_ino
        self._connection = self._open(self._path)
        self._identity = self._identify(self._db)

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
            if self._to_restore:
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
            aside, salvaged = recovery.exchange(self._path, self._open, list(self._remembered.values()), self._meta())
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

    def _meta(self) -> dict[str, str]:
        """Return who this journal is, as far as that is known: staged files lie in a folder of that name."""
        return {} if self._identity is None else {_IDENTITY: self._identity, _LAY_AT: str(self._path)}

    def _restore_rows(self) -> None:
        """Make this slot's tasks in the file those that are remembered: a damaged file was read as far as possible."""
        restored = 0
        to_compute_again = 0
        taken: list[int] = []
        with self._writing():
            present = {row["id"]: row for row in self._selected("SELECT * FROM adc_task WHERE slot = ?", self.slot)}
            forgotten = [(task_id,) for task_id in present if task_id not in self._remembered]
            self._db.executemany("DELETE FROM adc_task WHERE id = ?", forgotten)
            for task_id, row in list(self._remembered.items()):
                found = present.get(task_id)
                has_result = found is not None and found["result_bytes"] == row["result_bytes"]
                if not recovery.put_task(self._db, row if has_result else row | {"result_bytes": None}):
                    taken.append(task_id)
                    continue
                restored += found is None
                if not has_result:
                    to_compute_again += row["result_bytes"] is not None
                    self._db.execute("DELETE FROM adc_part WHERE task_id = ?", (task_id,))
        for task_id in taken:
            self._remembered.pop(task_id, None)
        if taken:
            _log.warning(
                "task_numbers_taken",
                tasks=taken,
                reason="the file that is in place now has tasks of another worker under these numbers",
                effect="this worker's tasks of these numbers are left to their leases",
            )
        self._to_restore = False
        if restored or to_compute_again:
            _log.warning("tasks_restored", from_memory=restored, results_to_compute_again=to_compute_again)

    def _identify(self, db: sqlite3.Connection) -> str:
        """Return what tells this journal from every other one, whatever their paths; a copy gets one of its own.

        The file that a journal lay in when it was opened last is looked at: where that is still there and is not this
        one, this one is a copy of it. One that was moved, or put back from a backup, stays who it is. A damaged file
        that was set aside is a copy, too, should somebody open it: the one in its place has its identity.
        """
        known = _meta_in(db)
        if known.get(_LAY_AT) == str(self._path) and _IDENTITY in known:
            return known[_IDENTITY]
        with db:
            db.execute("BEGIN IMMEDIATE")
            known = _meta_in(db)  # another worker may have been faster
            identity = self._identity_after(known)
            recovery.put_meta(db, {_IDENTITY: identity, _LAY_AT: str(self._path)})
        return identity

    def _identity_after(self, known: Mapping[str, str]) -> str:
        identity = known.get(_IDENTITY)
        lay_at = Path(known.get(_LAY_AT, self._path))
        if identity is None:
            return uuid.uuid4().hex
        if lay_at.exists() and not lay_at.samefile(self._path):
            _log.warning("journal_copied", path=str(self._path), copy_of=str(lay_at), effect="it stages by itself")
            return uuid.uuid4().hex
        return identity

    def _refuse_second_name(self) -> None:
        """Raise a WorkerFault where the file has several names: the locks of each lie beside that name."""
        if self._path.is_file() and self._path.stat().st_nlink > 1:
            raise WorkerFault(
                f"the journal {self._path} has another name (a hard link), and workers that use different names of one"
                " file destroy it: remove the other name, or make a copy in its place",
                ExitCode.JOURNAL_UNUSABLE,
            )

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


def _device_and_inode(path: Path) -> tuple[int, int]:
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


def _meta_in(db: sqlite3.Connection) -> dict[str, str]:
    known: dict[str, str] = {}
    for name, value, checksum in db.execute("SELECT name, value, checksum FROM adc_meta NOT INDEXED"):
        if checksum != checksum_of(name, value):
            raise DamageFound("what tells this journal from others is not what was written")
        known[name] = value
    return known


def _check_task(row: Mapping[str, Any] | sqlite3.Row) -> None:
    if row["checksum"] != checksum_of(*(row[name] for name in SEALED_COLUMNS)):
        raise DamageFound(f"the row of task {row['id']} is not what was written")


def _check_finished(row: Mapping[str, Any]) -> None:
    if not recovery.is_as_sealed(row):
        raise DamageFound(f"the accepted result of image {row['image_id']} is not what was written")


def _checked_body(row: Mapping[str, Any]) -> bytes:
    _check_finished(row)
    return zlib.decompress(row["body"])


def _is_database(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(_DATABASE_MAGIC)) == _DATABASE_MAGIC


def _as_json(numbers: Iterable[int]) -> str:
    """Return numbers as one argument of a statement, however many they are."""
    return f"[{','.join(map(str, numbers))}]"


def _job_and_pipeline(incarnation: str) -> str:
    """Return the part of a run's name that a retry leaves as it is, unless the job was given another pipeline."""
    return incarnation.partition("/")[0]


def _message(subject: str) -> tuple[int, int] | tuple[None, None]:
    """Return sequence and publication time of a subject's message; None in a form that we cannot read."""
    delivery = parse_reply_subject(subject)
    return (delivery.stream_seq, delivery.timestamp_ns) if delivery is not None else (None, None)


def _is_same_delivery(held: Task, fetched: Task) -> bool:
    """Whether two tasks of one job's image are deliveries of one message.

    Where a subject cannot be read the image decides. Its number alone does not: after Antenna's database was set up
    anew it is that of another photograph.
    """
    if held.reply_subject == fetched.reply_subject:
        return True
    readable = None not in {_message(held.reply_subject)[0], _message(fetched.reply_subject)[0]}
    same_image = readable or public_url(held.image_url) == public_url(fetched.image_url)
    return same_image and same_message(held.reply_subject, fetched.reply_subject)


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
