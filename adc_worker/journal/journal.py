"""The local database: every task that is held, every result that Antenna has not accepted yet, and those it accepted.

One SQLite file per host. Rows belong to a slot; whoever holds the slot's file lock owns them, so a worker that comes
back finds what the one before it left. While the file cannot be written results are in memory, and posted from there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import sqlite3
import threading
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from adc_worker.antenna.leases import lease_clock, parse_reply_subject, same_message
from adc_worker.antenna.wire import PostEntry, Task, is_error_result
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.host.budget import file_system
from adc_worker.host.process_name import new_process_name, process_name, process_scope
from adc_worker.log import get_logger
from adc_worker.redaction import public_url

_log = get_logger(__name__)


_BUSY_TIMEOUT_S = 30.0
_SLOTS_MAX = 256
# Write-ahead logging needs memory that all readers share, which these cannot give (sqlite.org/wal.html).
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "lustre", "glusterfs", "beegfs"}
)
FILE_MAX_BYTES, FILE_DISK_SHARE = 2_000_000_000, 0.1  # of what is free at start
RESERVE_BYTES = 10_000_000  # free on the disk, or no more tasks: a fetch that cannot be recorded spends its leases
UNPOSTED_RESULTS_MAX = 5000
RETAINED_RESULT_BYTES = 16_000_000  # accepted results above this are computed again when their image comes again

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
    """
CREATE TABLE adc_meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);  -- who this journal is, and where it lay
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
_VERSION_OF_NUMBERED_FILES = 1
_DATABASE_MAGIC = b"SQLite format 3\0"
_IDENTITY = "identity"  # names in adc_meta
_LAY_AT = "lay at"
_PART_BYTES = 1_000_000
STRIKES_MAX = 2  # design, "The journal": two strikes make an error result


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

    def __init__(self, path: Path, now: Callable[[], float] = lease_clock) -> None:
        self._path = path
        self._now = now
        self._name = new_process_name()  # of this process, in the marks of what it works on
        self._lock = threading.RLock()
        self.fault: str | None = None  # why the file cannot be written
        # What the file did not take meanwhile: size and parts of results; None where a task is to be forgotten.
        self._unwritten: dict[int, tuple[int, Iterable[bytes]] | None] = {}
        self._contacts: dict[int, _Stream] = {}
        try:
            # Locks lie beside the file: whoever names it by another way must find the same ones.
            path = self._path = path.resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            self.most_bytes = min(FILE_MAX_BYTES, int(FILE_DISK_SHARE * shutil.disk_usage(path.parent).free))
            self._shared = file_system(path.parent) in NETWORK_FILE_SYSTEMS
            # Locks of other hosts may not show there: each host has slots of its own.
            self._first_slot = zlib.crc32(socket.gethostname().encode()) * _SLOTS_MAX if self._shared else 0
            self.slot, self._slot_fd = self._take_slot()
            try:
                self._db = self._open()
                self._refuse_second_name()
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
                    self._db.execute("UPDATE adc_task SET runner = NULL WHERE runner = ?", (self._name,))
            except sqlite3.Error as error:
                _log.warning("marks_left", error=str(error), effect="the images in hand run one by one at first")
            self._db.close()
            os.close(self._slot_fd)

    def record(self, job_id: int, tasks: Sequence[Task], fetched_at: float | None = None) -> list[HeldTask]:
        """Put fetched tasks on record and return those to work on; on return they survive a power cut.

        An image that is held already keeps its row under the new subject; a finished one is answered from here. Where
        the file takes nothing, the tasks are left to their leases. `fetched_at`: Unix time, now by default.
        """
        sent_at = fetched_at or self._now()
        try:
            with self._writing():
                current = self._of_present_stream(job_id, tasks, sent_at)
                self._show_stream(job_id, current, sent_at)
                for task in current:
                    if not self._rejoin(job_id, task, sent_at):
                        self._insert(job_id, task, sent_at)
        except sqlite3.OperationalError as error:
            _log.warning("tasks_left_to_their_lease", job_id=job_id, tasks=len(tasks), reason=f"journal: {error}")
            return []
        subjects = {task.reply_subject for task in tasks}
        return [held for held in self.unfinished(job_id) if held.task.reply_subject in subjects]

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
            if self._is_of_another_job(job_id, self._column("SELECT incarnation FROM adc_task WHERE id = ?", held.id)):
                continue
            if held.result_bytes is not None and is_error_result(next(iter(self.parts(held.id)), b"")):
                continue
            return held
        return None

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
        """Keep for a task what was computed for the same image of the same job before.

        Numbers alone prove neither: once Antenna's database was set up anew they are those of others.
        """
        same_image = "job_id = ? AND image_id = ? AND image_url = ?"
        arguments = (job_id, task.image_id, public_url(task.image_url))
        told = self._column(f"SELECT incarnation FROM adc_finished WHERE {same_image}", *arguments)  # noqa: S608 (a literal)
        if self._is_of_another_job(job_id, told):
            return
        bodies = self._column(f"SELECT body FROM adc_finished WHERE {same_image}", *arguments)  # noqa: S608 (a literal)
        for body in map(zlib.decompress, bodies):
            if not is_error_result(body):  # what was wrong with the image may have been put right
                _log.info("answered_from_journal", job_id=job_id, image_id=task.image_id)
                self._keep(task_id, [body])

    def _is_of_another_job(self, job_id: int, incarnations: Sequence[str | None]) -> bool:
        """Whether what was recorded in these runs was of an earlier job of the same number, as far as Antenna told."""
        stream = self._contacts.get(job_id)
        if stream is None or stream.incarnation is None:
            return False
        created_at = stream.incarnation.partition("/")[0]
        return any(told is not None and told.partition("/")[0] != created_at for told in incarnations)

    def erase_url(self, held: HeldTask) -> None:
        """Forget what opens a staged image's URL; a power cut may bring it back, so nothing waits for the disk."""
        url = public_url(held.task.image_url)
        if url == held.task.image_url:
            return
        with self._writing_loosely():
            self._db.execute(
                "UPDATE adc_task SET image_url = ?, url_erased = 1 WHERE id = ? AND image_url = ?",
                (url, held.id, held.task.image_url),
            )

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
                of_this_run = f"FROM {table} WHERE job_id = ? AND incarnation = ? AND reply_subject NOT NULL"
                # The first one published shows all of them, where its subject can be read.
                (first_ns,) = self._column(f"SELECT min(published_ns) {of_this_run}", job_id, incarnation)
                if first_ns is not None:
                    stream.show("", first_ns)
                opaque = self._column(
                    f"SELECT reply_subject {of_this_run} AND published_ns IS NULL", job_id, incarnation
                )
                stream.opaque.update(opaque)

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
        self._finish({task_id: self._compressed(task_id) for task_id in dead})
        self._db.execute(f"UPDATE adc_finished SET reply_subject = NULL WHERE {where}", arguments)  # noqa: S608 (literals)
        stream = self._contacts.get(job_id)
        if stream is not None:
            stream.doubt()
            if stream.incarnation in runs:  # it is over, and the present one is to be asked for
                stream.incarnation = None
        if dead:  # of a job that came to its end nothing is left
            _log.warning("subjects_dead", job_id=job_id, tasks=len(dead), reason="the job was stopped or restarted")

    def bury(self, job_id: int, asked_at: float = float("inf")) -> list[int]:
        """The job is served no more: no subject on record may be used; results stay for images that come again.

        That is what Antenna answered to a request sent at `asked_at`. Tasks that came since are newer, and of a new
        stream perhaps: nothing is retired then. Return the tasks whose staged files nobody needs.
        """
        if self._contacts.get(job_id, _Stream()).answered_at > asked_at:
            return []
        unfinished = [held.id for held in self.unfinished(job_id)]
        with self._writing_loosely():
            self._retire(job_id, "true")
        return unfinished

    def begin(self, task_ids: Iterable[int], oom_kills: int, *, alone: bool) -> None:
        """Mark tasks that are about to be decoded and inferred, so that a crash shows which they were.

        The marks need not survive a power cut. `alone` says that nothing else is in work any more.
        """
        with self._writing_loosely():
            if alone:
                self._db.execute("UPDATE adc_task SET runner = NULL WHERE runner = ?", (self._name,))
            self._db.executemany(
                "UPDATE adc_task SET runner = ?, oom_kills = ? WHERE id = ?",
                [(self._name, oom_kills, task_id) for task_id in task_ids],
            )

    def accuse(self, died: tuple[int, str] | None, oom_kills: int) -> int:
        """Make suspects of what dead processes were working on, and return how many tasks that are.

        `died` is the pid and the cause of a death that was the process's own making. A task that was alone in it, or in
        a process that ended while the kernel killed for want of memory, gets a strike. Process ids and the kernel's
        count are compared within one container only: another one has the same ids, and a count of its own.
        """
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

    def pardon(self, task_ids: Iterable[int]) -> None:
        """Take the strikes of suspects back: they died of something else."""
        with self._writing():
            self._db.executemany("UPDATE adc_task SET strikes = '' WHERE id = ?", [(number,) for number in task_ids])

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
        except sqlite3.OperationalError:
            sized = {task_id: (sum(map(len, parts)), parts) for task_id, parts in results}
            with self._lock:
                self._unwritten.update(sized)
            return sum(size_bytes for size_bytes, _parts in sized.values())

    def _check_images(self, images: Mapping[int, str]) -> None:
        for task_id, image_id in images.items():
            for recorded in self._column("SELECT image_id FROM adc_task WHERE id = ?", task_id):
                if recorded != image_id:
                    raise WorkerFault(
                        f"task {task_id} is of image {recorded}, and the result for it of image {image_id}: nothing of"
                        f" this batch is kept; {self._path} was replaced while this worker ran, or this is a bug"
                    )

    def _keep(self, task_id: int, parts: Iterable[bytes]) -> int:
        urls = self._column("SELECT image_url FROM adc_task WHERE id = ?", task_id)
        if not urls:
            return 0  # its job was cancelled meanwhile
        self._db.execute("DELETE FROM adc_part WHERE task_id = ?", (task_id,))
        size_bytes = 0
        for number, part in enumerate(_coalesced(parts)):
            self._db.execute("INSERT INTO adc_part VALUES (?, ?, ?)", (task_id, number, part))
            size_bytes += len(part)
        self._db.execute(
            "UPDATE adc_task SET result_bytes = ?, image_url = ? WHERE id = ?",
            (size_bytes, public_url(urls[0]), task_id),  # nothing is to be downloaded for it any more
        )
        return size_bytes

    def settle(self, task_ids: Collection[int]) -> None:
        """Antenna has accepted these results: keep them compressed, in case their images come again."""
        bodies = {task_id: self._compressed(task_id) for task_id in task_ids}  # beside whoever keeps results
        with self._writing_loosely(task_ids):
            self._finish(bodies)

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
                    " incarnation, image_url, body) SELECT job_id, image_id, reply_subject, seq, published_ns,"
                    " incarnation, ?, ? FROM adc_task WHERE id = ?",
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

    def newest_accepted(self, job_id: int) -> PostEntry | None:
        """Return an accepted result of the job whose subject is known to be good, to be posted again."""
        subjects = self._accepted_live(job_id, 1, CONTACT_S)
        if not subjects:
            return None
        query = "SELECT body FROM adc_finished WHERE job_id = ? AND reply_subject = ?"
        body = zlib.decompress(self._column(query, job_id, subjects[0])[0])
        return PostEntry(subjects[0], len(body), lambda: [body])

    def accepted_subjects(self, job_id: int, count: int) -> list[str]:
        """Return the leases of the job's results that were accepted last, up to `count`, in the stream seen last."""
        return self._accepted_live(job_id, count, float("inf"))

    def _accepted_live(self, job_id: int, count: int, within_s: float) -> list[str]:
        with self._lock:
            stream = self._contacts.get(job_id)
            if stream is None or self._now() - stream.contact_at > within_s:
                return []
            query = "SELECT reply_subject, published_ns FROM adc_finished WHERE job_id = ? AND reply_subject NOT NULL"
            newest_first = self._db.execute(f"{query} ORDER BY id DESC", (job_id,))
            live = (subject for subject, published_ns in newest_first if stream.holds(subject, published_ns))
            return list(islice(live, count))

    def close_job(self, job_id: int) -> None:
        """The job is final: none of its images comes again."""
        with self._writing_loosely():
            self._db.execute("DELETE FROM adc_finished WHERE job_id = ?", (job_id,))

    def parts(self, task_id: int) -> Iterator[bytes]:
        """Return a kept result piece by piece; another may be kept or forgotten meanwhile."""
        with self._lock:
            kept = self._unwritten.get(task_id)
        if kept is not None:
            yield from kept[1]
            return
        number = 0
        while part := self._column("SELECT body FROM adc_part WHERE task_id = ? AND number = ?", task_id, number):
            yield part[0]
            number += 1

    def forget(self, task_ids: Collection[int]) -> None:
        """Remove tasks whose outcome nobody wants."""
        with self._writing_loosely(task_ids):
            self._db.executemany("DELETE FROM adc_task WHERE id = ?", [(task_id,) for task_id in task_ids])

    def give_up(self, task_id: int, reply_subject: str) -> None:
        """Leave a task to its lease, unless it has another one by now."""
        with self._writing_loosely():
            self._db.execute("DELETE FROM adc_task WHERE id = ? AND reply_subject = ?", (task_id, reply_subject))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction; an OperationalError (disk full, read-only, broken) also sets `fault`."""
        with self._lock:
            try:
                with self._db:
                    yield
            except sqlite3.OperationalError as error:
                self.fault = f"the journal {self._path} cannot be written: {error}"
                raise

    @contextmanager
    def _writing_loosely(self, to_forget: Collection[int] = ()) -> Iterator[None]:
        """One transaction that a power cut may undo: what it brings back is looked at, posted or worked on again.

        Where the file takes nothing, `fault` tells; tasks `to_forget` are out of sight, and removed once it does.
        """
        with self._lock:
            self._db.execute("PRAGMA synchronous=NORMAL")
            try:
                with self._writing():
                    yield
            except sqlite3.OperationalError:
                self._unwritten.update(dict.fromkeys(to_forget))
            finally:
                self._db.execute("PRAGMA synchronous=FULL")

    def check_writable(self) -> bool:
        """Whether tasks may be fetched; after a fault, write what is in memory as soon as the file takes it."""
        with self._lock:
            free_bytes = shutil.disk_usage(self._path.parent).free
            if free_bytes < RESERVE_BYTES:
                self.fault = f"the disk of the journal {self._path} has {free_bytes} bytes left"
            elif self.fault is not None:
                try:
                    self._catch_up()
                except sqlite3.OperationalError:
                    return False
                self.fault = None
            return self.fault is None

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
        return len(sizes) > UNPOSTED_RESULTS_MAX or sum(sizes) > self.most_bytes

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
        if self._upgraded_from != _VERSION_OF_NUMBERED_FILES:
            return None
        beside = folder.resolve().parent == self._path.parent
        if beside and any(_is_database(file) for file in self._path.parent.iterdir() if file != self._path):
            return None
        name = f"journal-{zlib.crc32(bytes(self._path)):08x}-{self._path.stat().st_ino:x}"
        earlier = folder if beside else folder / name
        return earlier if earlier.is_dir() else None

    def was_used(self) -> bool:
        """Whether a task was ever on record here, by whatever worker."""
        return bool(self._column("SELECT 1 FROM sqlite_sequence WHERE name = 'adc_task'"))

    def subjects(self) -> list[str]:
        """Return the leases this slot holds in the streams that were seen last; another one would be a stranger's."""
        held = self._rows("true")
        return [one.task.reply_subject for one in held if self.is_live(one, float("inf"))]

    def held_count(self, job_id: int) -> int:
        """Count a job's tasks that Antenna may still be waiting for."""
        query = "SELECT count(*) FROM adc_task WHERE slot = ? AND job_id = ?"
        return int(self._column(query, self.slot, job_id)[0])

    def unfinished(self, job_id: int) -> list[HeldTask]:
        """Return this slot's tasks of a job that have no result yet: oldest first, those with strikes last."""
        waiting = [held for held in self._rows("job_id = ?", job_id) if held.result_bytes is None]
        return sorted(waiting, key=lambda held: len(held.strikes or ()))

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

    def unposted_count(self, excluding: Collection[int] = ()) -> int:
        """Count the kept results that Antenna has not accepted, without those in `excluding`."""
        with self._lock:
            kept = set(self._column("SELECT id FROM adc_task WHERE slot = ? AND result_bytes NOT NULL", self.slot))
            for task_id, result in self._unwritten.items():
                (kept.discard if result is None else kept.add)(task_id)
            return len(kept.difference(excluding))

    def _column(self, query: str, *arguments: object) -> list[Any]:
        """Return the first column of what is asked for; a mapping gives the arguments by name."""
        by_name = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], Mapping) else None
        with self._lock:
            return [row[0] for row in self._db.execute(query, arguments if by_name is None else dict(by_name))]

    def _rows(self, where: str, *arguments: object, limit: int = -1) -> list[HeldTask]:
        """Return this slot's tasks; results and removals that the file did not take are seen, too."""
        query = f"SELECT * FROM adc_task WHERE slot = ? AND {where} ORDER BY id LIMIT ?"  # noqa: S608 (only this file's literals and integers)
        with self._lock:
            cursor = self._db.cursor()
            cursor.row_factory = sqlite3.Row
            rows = cursor.execute(query, (self.slot, *arguments, limit)).fetchall()
            return [self._held(row) for row in rows if self._unwritten.get(row["id"], row) is not None]

    def _held(self, row: sqlite3.Row) -> HeldTask:
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

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        db = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            db.execute(f"PRAGMA journal_mode={'DELETE' if self._shared else 'WAL'}")
            db.execute("PRAGMA synchronous=FULL")  # a result counts as kept only when a power cut cannot take it
            db.execute("PRAGMA foreign_keys=ON")
            # What is erased or forgotten must not stay readable; FAST leaves copies of rows in pages that were freed.
            db.execute("PRAGMA secure_delete=ON")
            self._upgrade(db)
        except BaseException:
            db.close()
            raise
        return db

    def _upgrade(self, db: sqlite3.Connection) -> None:
        with db:
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > len(_SCHEMA):
                raise WorkerFault(
                    f"the journal {self._path} was written by a newer worker (version {version}, this one knows"
                    f" {len(_SCHEMA)}): install that version again, or move the file away once its results are posted",
                    ExitCode.JOURNAL_UNUSABLE,
                )
            self._upgraded_from = version
            for statement in chain.from_iterable(script.split(";") for script in _SCHEMA[version:]):
                db.execute(statement)
            db.execute(f"PRAGMA user_version={len(_SCHEMA)}")
            self._identity = self._identify(db)

    def _identify(self, db: sqlite3.Connection) -> str:
        """Return what tells this journal from every other one, whatever their paths; a copy gets one of its own.

        The file that a journal lay in when it was opened last is looked at: where that is still there and is not this
        one, this one is a copy of it. One that was moved, or put back from a backup, stays who it is.
        """
        known = dict(db.execute("SELECT name, value FROM adc_meta"))
        identity = known.get(_IDENTITY)
        lay_at = Path(known.get(_LAY_AT, self._path))
        if identity is None or (lay_at.exists() and not lay_at.samefile(self._path)):
            if identity is not None:
                _log.warning("journal_copied", path=str(self._path), copy_of=str(lay_at), effect="it stages by itself")
            identity = uuid.uuid4().hex
        told = {_IDENTITY: identity, _LAY_AT: str(self._path)}
        if told != known:
            db.executemany("INSERT OR REPLACE INTO adc_meta VALUES (?, ?)", told.items())
        return identity

    def _refuse_second_name(self) -> None:
        """Raise a WorkerFault where the file has several names: the locks of each lie beside that name."""
        if self._path.stat().st_nlink > 1:
            self._db.close()
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
                with self._lock, self._db:
                    self._db.execute("UPDATE adc_task SET slot = ? WHERE slot = ?", (self.slot, slot))
            finally:
                os.close(fd)


def _is_database(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(_DATABASE_MAGIC)) == _DATABASE_MAGIC


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
