"""What a fault stops and what to do about it, and how long a fault of this machine may last."""

from __future__ import annotations

import errno
import socket
import sqlite3

import pytest
import torch
from structlog.testing import capture_logs
from urllib3.connection import HTTPConnection
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ProxyError, SSLError

from adc_worker.errors import (
    AntennaRefused,
    ExitCode,
    ImageMissing,
    LinkError,
    StagingFull,
    WorkerFault,
)
from adc_worker.runtime.faults import (
    MACHINE_FAULT_S,
    Affected,
    Faults,
    rule_for,
)

HOST = "images.test"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def link(cause: BaseException) -> LinkError:
    """Return a link error as the image client raises it."""
    error = LinkError(f"cannot reach the image host: {cause}")
    error.__cause__ = cause
    return error


def connection() -> HTTPConnection:
    return HTTPConnection(HOST)


REFUSED = NewConnectionError(connection(), "refused")
UNKNOWN_NAME = socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize(
    ("error", "affected", "advice"),
    [
        (link(UNKNOWN_NAME), Affected.HOST, "DNS"),
        (link(REFUSED), Affected.HOST, "firewall"),
        (link(ProxyError("cannot connect to proxy", REFUSED)), Affected.HOST, "NO_PROXY"),
        (link(SSLError("certificate verify failed: unable to get local issuer certificate")), Affected.HOST, "CA"),
        (link(ConnectTimeoutError("timed out")), Affected.HOST, "check the image host"),
        (LinkError("the image's host answered 403"), Affected.HOST, "check the image host"),
        (StagingFull("no space"), Affected.MACHINE, "free some space"),
        (OSError(errno.ENOSPC, "No space left on device"), Affected.MACHINE, "free some space"),
        (OSError(errno.EIO, "Input/output error"), Affected.MACHINE, "check the disks"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Affected.MACHINE, "free some space"),
        (sqlite3.OperationalError("database is locked"), Affected.MACHINE, "end whatever program holds the file"),
        (RuntimeError("CUDA error: unspecified launch failure"), Affected.MACHINE, "nvidia-smi"),
        (AntennaRefused("answered 403"), Affected.ANTENNA, "superuser"),
        (ImageMissing("404"), Affected.IMAGE, ""),
    ],
)
def test_every_cause_has_its_row(error: BaseException, affected: Affected, advice: str) -> None:
    """Only what is in the image affects the image; every other row says what to do."""
    rule = rule_for(error)
    assert rule is not None
    assert rule.affected is affected
    assert advice in rule.advice


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("a bug"), sqlite3.Error("?")])
def test_what_is_nobodys_fault_but_ours_has_no_row(error: BaseException) -> None:
    """Running out of GPU memory is the plan's business, a bug the developer's."""
    assert rule_for(error) is None


def see_for(faults: Faults, clock: Clock, seconds: float, error: OSError | StagingFull) -> None:
    """See a fault of the machine as whoever tries again sees it."""
    end_s = clock.now_s + seconds
    faults.watch("staging", error)
    while clock.now_s < end_s:
        clock.now_s = min(end_s, clock.now_s + 20)
        faults.watch("staging", error)


def test_two_moments_of_a_full_disk_are_no_lasting_fault() -> None:
    """What nobody saw in between was over, also where nobody was there to say so; it is logged anew."""
    clock = Clock()
    faults = Faults(clock)
    full = StagingFull("no space left")
    with capture_logs() as said:
        for _time in range(3):
            see_for(faults, clock, 100, full)
            clock.now_s += 2 * 3600
        see_for(faults, clock, 100, full)
    assert [one["event"] for one in said] == ["machine_fault"] * 4


def test_a_fault_of_the_machine_ends_the_process_after_five_minutes_unless_it_ends_before() -> None:
    """By a named code."""
    clock = Clock()
    faults = Faults(clock)
    full = StagingFull("no space left")
    faults.watch("staging", full)
    see_for(faults, clock, MACHINE_FAULT_S - 1, full)
    faults.watch("staging", None)
    clock.now_s += 2
    see_for(faults, clock, MACHINE_FAULT_S - 1, full)
    clock.now_s += 1
    with pytest.raises(WorkerFault, match="staging at fault for 300 s: no space left") as caught:
        faults.watch("staging", full)
    assert caught.value.exit_code is ExitCode.MACHINE_FAULT
