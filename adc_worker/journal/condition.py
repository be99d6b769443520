"""What an error of SQLite says about the journal's file, and what therefore has to be done."""

from __future__ import annotations

import sqlite3
import zlib
from enum import Enum

from adc_worker.errors import ExitCode, WorkerFault, os_error_may_pass

_PRIMARY_CODE = 0xFF  # an extended error code carries its primary one in the low byte (sqlite.org/rescode.html)
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# A page that the file should have and does not, and a file system that finds its own checksums wrong.
_DAMAGE_EXTENDED = frozenset({sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS})
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
# A quota that is used up is an I/O error to SQLite; files that run out are one that cannot be opened.
_UNWRITABLE = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
    }
)


class DamageFound(sqlite3.DatabaseError):
    """SQLite noticed nothing, and yet the file is damaged: a checksum, or a table that is missing, shows it."""


class Condition(Enum):
    """What to do about the file after an error."""

    DAMAGED = "set the file aside and go on with what can be read of it"
    LOCKED = "wait: another program holds the file"
    UNWRITABLE = "keep what is to be written in memory, and try again"
    SUSPECT = "check the file: either it is damaged, or the statement is wrong"


def condition_after(error: Exception) -> Condition:
    """Return what an error of SQLite, or of the decompression of a kept result, says about the file."""
    if isinstance(error, DamageFound | zlib.error):
        return Condition.DAMAGED
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # raised by Python itself, for example about text that is not UTF-8, or None for a number
        return Condition.SUSPECT
    primary = code & _PRIMARY_CODE
    if primary in _DAMAGE or code in _DAMAGE_EXTENDED:
        return Condition.DAMAGED
    if primary in _LOCKED:
        return Condition.LOCKED
    if primary in _UNWRITABLE:
        return Condition.UNWRITABLE
    return Condition.SUSPECT


def is_locked(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that another program holds the file."""
    while error is not None:
        if isinstance(error, sqlite3.Error) and condition_after(error) is Condition.LOCKED:
            return True
        error = error.__cause__
    return False


def may_pass(error: Exception) -> bool:
    """Whether an error at the start may be over by itself, so that it is worth waiting for."""
    if isinstance(error, WorkerFault):
        return error.exit_code is ExitCode.MACHINE_FAULT
    if isinstance(error, OSError):
        return os_error_may_pass(error)
    if isinstance(error, sqlite3.Error):
        return condition_after(error) in {Condition.LOCKED, Condition.UNWRITABLE}
    return False
