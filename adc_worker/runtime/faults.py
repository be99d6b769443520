"""What a fault stops and what an operator can do about it: one table by what was raised; and faults of this machine.

Whether a failed image is at fault itself is judged in runtime/verdicts.py.
"""

from __future__ import annotations

import errno
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from urllib3.exceptions import HTTPError, NewConnectionError, ProxyError, SSLError

from adc_worker.errors import AntennaRefused, ExitCode, ImageError, LinkError, StagingFull, WorkerFault
from adc_worker.log import get_logger

_log = get_logger(__name__)

MACHINE_FAULT_S = 300.0
# Whoever finds a part of the machine at fault tries it again within 20 s; what was not seen for longer than this was
# over in between, also where nobody was there to say so.
MACHINE_FAULT_SEEN_AGAIN_S = 60.0


class Affected(Enum):
    """What an error stops."""

    IMAGE = "image"  # nothing else: it becomes the image's error result
    HOST = "image host"
    MACHINE = "machine"
    ANTENNA = "antenna"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: what is looked for among an error and its causes, what it stops, and what to do about it."""

    matches: Callable[[BaseException], bool]
    affected: Affected
    advice: str


def _is(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kinds)


def _is_device_error(error: BaseException) -> bool:
    """Whether it is one of CUDA's, after which a process computes nothing more; running out of memory is not."""
    kind = getattr(torch, "AcceleratorError", ())
    found = isinstance(error, kind) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
    return found and not isinstance(error, torch.OutOfMemoryError)


_FULL = {errno.ENOSPC, errno.EDQUOT}

RULES = (  # the first that matches counts
    Rule(_is(AntennaRefused), Affected.ANTENNA, "check the token: fetching takes a superuser's"),
    Rule(_is_device_error, Affected.MACHINE, "check the GPU with nvidia-smi and the kernel log; the process restarts"),
    Rule(_is(ImageError), Affected.IMAGE, "look at one of these URLs in a browser: several images fail alike"),
    Rule(_is(ProxyError), Affected.HOST, "check the proxy in HTTP_PROXY and HTTPS_PROXY, or list the host in NO_PROXY"),
    Rule(_is(SSLError), Affected.HOST, "install the CA of the image host here (ca-certificates, SSL_CERT_FILE)"),
    Rule(_is(socket.gaierror), Affected.HOST, "check the DNS of this machine, and the host's name"),
    Rule(
        _is(NewConnectionError), Affected.HOST, "check that this machine's network and firewall let it reach the host"
    ),
    Rule(_is(LinkError, HTTPError), Affected.HOST, "check the image host, and what this machine may reach"),
    Rule(
        lambda error: isinstance(error, StagingFull) or (isinstance(error, OSError) and error.errno in _FULL),
        Affected.MACHINE,
        "free some space, or set AMI_STAGING_PATH or AMI_USER_DATA_PATH to another disk",
    ),
    Rule(
        _is(sqlite3.OperationalError),
        Affected.MACHINE,
        "check the disk of the journal, and end whatever program holds the file (`fuser` names it)",
    ),
    Rule(_is(MemoryError), Affected.MACHINE, "find out what else takes the memory of this machine"),
    Rule(_is(OSError), Affected.MACHINE, "check the disks of this machine, and the rights on its folders"),
)


def rule_for(error: BaseException) -> Rule | None:
    """Return the row for an error; None for what no row names, which is a bug and ends the process."""
    causes = list(_causes(error))
    return next((rule for rule in RULES if any(map(rule.matches, causes))), None)


def advice(error: BaseException) -> str:
    rule = rule_for(error)
    return rule.advice if rule else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


class Faults:
    """Which parts of this machine are at fault now; safe to use from several threads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._machine_since: dict[str, float] = {}
        self._machine_seen_at: dict[str, float] = {}

    def watch(self, part: str, error: BaseException | None, *, is_said: bool = False) -> None:
        """Say how a part of the machine is; `is_said`: the log has a line about it already.

        Raises:
            WorkerFault: it has been at fault for five minutes, and was seen to be all the time.
        """
        with self._lock:
            if error is None:
                was_at_fault = self._machine_since.pop(part, None) is not None
                if was_at_fault and not is_said:
                    _log.info("machine_fault_over", part=part)
                return
            now = self._now()
            seen_at = self._machine_seen_at.get(part, now)
            if now - seen_at > MACHINE_FAULT_SEEN_AGAIN_S:
                self._machine_since.pop(part, None)
            self._machine_seen_at[part] = now
            new = part not in self._machine_since
            lasted_s = now - self._machine_since.setdefault(part, now)
        if new and not is_said:
            _log.error("machine_fault", part=part, error=str(error), do=advice(error))
        if lasted_s >= MACHINE_FAULT_S:
            raise WorkerFault(f"{part} at fault for {MACHINE_FAULT_S:.0f} s: {error}", ExitCode.MACHINE_FAULT)
