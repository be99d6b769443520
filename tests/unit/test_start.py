"""What a worker waits for at its start, and what ends it with a code that keeps supervisors from restarting it."""

from __future__ import annotations

import errno
import sqlite3
import threading

import pytest
from structlog.testing import capture_logs

from adc_worker.errors import ConfigurationError, ExitCode, WorkerFault
from adc_worker.journal.condition import may_pass
from adc_worker.runtime.faults import MACHINE_FAULT_S, Faults
from adc_worker.runtime.worker import StoppedWhileWaiting, wait_for_machine


def sqlite_error(code: int) -> sqlite3.Error:
    """Return an error as SQLite raises it."""
    error = sqlite3.OperationalError("as SQLite says")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENFILE, "Too many open files in system"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.ETIMEDOUT, "Connection timed out"),
        OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
        sqlite_error(sqlite3.SQLITE_BUSY),
        sqlite_error(sqlite3.SQLITE_BUSY_RECOVERY),
        sqlite_error(sqlite3.SQLITE_FULL),
        sqlite_error(sqlite3.SQLITE_IOERR_WRITE),
        sqlite_error(sqlite3.SQLITE_CANTOPEN),
        WorkerFault("the journal cannot be opened: the disk is full", ExitCode.MACHINE_FAULT),
    ],
)
def test_what_may_pass_by_itself_is_waited_for(error: Exception) -> None:
    """No exit code says that a restart is useless while it may help."""
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        PermissionError(errno.EPERM, "Operation not permitted"),
        IsADirectoryError(errno.EISDIR, "Is a directory"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        OSError(errno.ENAMETOOLONG, "File name too long"),
        OSError(errno.ELOOP, "Too many levels of symbolic links"),
        sqlite_error(sqlite3.SQLITE_CORRUPT),
        WorkerFault("written by a newer worker", ExitCode.JOURNAL_UNUSABLE),
        ConfigurationError("AMI_USER_DATA_PATH"),
    ],
)
def test_what_somebody_has_to_change_is_not_waited_for(error: Exception) -> None:
    """A path, the rights on it, a version: it is said at once."""
    assert not may_pass(error)


class Opening:
    """An action of the start that fails some times before it succeeds; a clock goes on meanwhile."""

    def __init__(self, failures: int, error: Exception, step_s: float = 0.0) -> None:
        self.left = failures
        self.error = error
        self.step_s = step_s
        self.now_s = 100.0

    def __call__(self) -> str:
        self.now_s += self.step_s
        if self.left:
            self.left -= 1
            raise self.error
        return "opened"

    def now(self) -> float:
        return self.now_s


class Never(threading.Event):
    """A stop that nobody asks for, and waiting that takes no time."""

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002 (the signature of an event)
        return False


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_start_goes_on_when_what_held_it_up_is_over() -> None:
    """However it ended."""
    opening = Opening(5, FULL)
    assert wait_for_machine("journal", opening, Never(), Faults(opening.now)) == "opened"


def test_a_journal_that_another_program_holds_is_said_once_and_is_no_fault() -> None:
    """Unless that lasts for five minutes, like any fault."""
    fault = WorkerFault("the journal cannot be opened: database is locked", ExitCode.MACHINE_FAULT)
    fault.__cause__ = sqlite_error(sqlite3.SQLITE_BUSY)
    opening = Opening(5, fault, step_s=10.0)
    with capture_logs() as said:
        assert wait_for_machine("journal", opening, Never(), Faults(opening.now)) == "opened"
    assert [one["event"] for one in said] == ["start_waits"]
    assert "end whatever program holds the file" in said[0]["do"]
    opening = Opening(1000, fault, step_s=20.0)
    with pytest.raises(WorkerFault, match=f"journal at fault for {MACHINE_FAULT_S:.0f} s"):
        wait_for_machine("journal", opening, Never(), Faults(opening.now))


def test_a_start_that_the_machine_does_not_allow_for_five_minutes_ends_by_name() -> None:
    """With the code that supervisors restart on."""
    opening = Opening(1000, FULL, step_s=20.0)
    with pytest.raises(WorkerFault, match=f"journal at fault for {MACHINE_FAULT_S:.0f} s") as caught:
        wait_for_machine("journal", opening, Never(), Faults(opening.now))
    assert caught.value.exit_code is ExitCode.MACHINE_FAULT


def test_what_does_not_pass_is_raised_at_once() -> None:
    """As it came."""
    refused = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(PermissionError) as caught:
        wait_for_machine("journal", Opening(1, refused), Never(), Faults())
    assert caught.value is refused


def test_a_stop_ends_the_waiting() -> None:
    """It may come while the disk is full."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedWhileWaiting):
        wait_for_machine("journal", Opening(1, FULL), stop, Faults())
