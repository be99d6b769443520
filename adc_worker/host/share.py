"""How the workers of one host divide its memory: each locks a slot and writes into it what it claims.

A lock goes with its process, so a dead worker's part is free at once; what it wrote stays, and tells whoever takes the
slot next whether the kernel killed it for want of memory, its parent and its container with it or not. Workers under
other data folders, and containers, are seen only by what they take: what is left of the limit is the second bound.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from adc_worker.host.memory import machine_oom_kills

# What a worker plans with after the kernel has killed it for memory, as a part of what it planned with before.
CAUTION_STEP, CAUTION_MIN = 0.7, 0.1  # whatever it is, one image at a time is always planned
_ENDED = -1  # in place of the kernel's count of kills: this worker said goodbye
_SLOT_BYTES, _SLOT_FIELDS = 128, 4  # size, busy, caution, kills


@dataclass(frozen=True, slots=True)
class Claim:
    """What another worker may use now, and whether it works on a job: idle ones take no part in the division."""

    size_bytes: int
    busy: bool


class MemoryShare:
    """This process's slot.

    Attributes:
        caution: the part of its memory this worker plans with.
        after_kill: whether the kernel ended the worker before it: that one said no goodbye, and the count has risen.
    """

    def __init__(self, folder: Path, oom_kills: Callable[[], int] = machine_oom_kills) -> None:
        # The machine's count: that of a control group is gone with its container or unit.
        self._oom_kills = oom_kills
        # The folder may be on a network and the same for several hosts, which share no memory.
        self._slots = folder / f"memory-{socket.gethostname()}"
        self._slots.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in count():
            self._own = self._slots / str(number)
            self._fd = os.open(self._own, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            if _locks(self._fd, fcntl.LOCK_EX):
                break
            os.close(self._fd)
        caution, kills = _left_by_predecessor(os.pread(self._fd, _SLOT_BYTES, 0))
        self.after_kill = kills != _ENDED and self._oom_kills() > kills
        self.caution = max(CAUTION_MIN, caution * CAUTION_STEP) if self.after_kill else caution
        self.claim(0, busy=False)

    def claim(self, size_bytes: int, *, busy: bool) -> None:
        """Say how much this worker may use from now on."""
        self._write(size_bytes, busy, self._oom_kills())

    def _write(self, size_bytes: int, busy: bool, kills: int) -> None:
        os.pwrite(self._fd, b"%20d %d %.4f %20d\n" % (size_bytes, busy, self.caution, kills), 0)

    def others(self) -> list[Claim]:
        """Return the claims of all other workers that are alive."""
        claims = []
        for slot in self._slots.iterdir():
            with slot.open("rb") as file:
                if slot != self._own and not _locks(file.fileno(), fcntl.LOCK_SH):
                    claims.append(_claim_in(file.read(_SLOT_BYTES)))
        return claims

    def recover(self) -> None:
        """A job went well: plan with more again, up to everything."""
        self.caution = min(1.0, self.caution / CAUTION_STEP)

    def close(self) -> None:
        self._write(0, False, _ENDED)
        os.close(self._fd)


def _left_by_predecessor(content: bytes) -> tuple[float, int]:
    """Return the caution and the count of kills in a slot; those of a first start where the slot is damaged."""
    fields = content.partition(b"\n")[0].split()  # behind the line may stand what a damaged slot held
    try:
        caution, kills = float(fields[2]), int(fields[3])
    except (IndexError, ValueError):
        return 1.0, _ENDED
    if len(fields) != _SLOT_FIELDS or not CAUTION_MIN <= caution <= 1.0:
        return 1.0, _ENDED
    return caution, kills


def _claim_in(content: bytes) -> Claim:
    """Return what a worker claims; nothing where its slot is damaged, until it claims anew."""
    fields = content.split()
    try:
        size_bytes, busy = int(fields[0]), bool(int(fields[1]))
    except (IndexError, ValueError):
        return Claim(0, busy=False)
    return Claim(max(0, size_bytes), busy)


def _locks(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
