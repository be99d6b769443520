"""What a fault stops and what to do about it, and how long a fault of this machine may last."""

from __future__ import annotations

import errno
import socket
import sqlite3

import pytest
import torch
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


def test_a_fault_of_the_machine_ends_the_process_after_five_minutes_unless_it_ends_before() -> None:
    """By a named code."""
    clock = Clock()
    faults = Faults(clock)
    full = StagingFull("no space left")
    faults.watch("staging", full)
    clock.now_s += MACHINE_FAULT_S - 1
    faults.watch("staging", full)
    faults.watch("staging", None)
    clock.now_s += 2
    faults.watch("staging", full)
    clock.now_s += MACHINE_FAULT_S
    with pytest.raises(WorkerFault, match="staging at fault for 300 s: no space left") as caught:
        faults.watch("staging", full)
    assert caught.value.exit_code is ExitCode.MACHINE_FAULT
