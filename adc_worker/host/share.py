"""How the workers of one host divide its memory: each locks a slot and writes into it what it claims.

A lock goes with its process, so a dead worker's part is free at once. Workers under other data folders, and containers,
are seen only by what they take: what is left of the limit is the second bound.
"""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from itertools import count
from pathlib import Path

# What a worker plans with after the kernel has killed it for memory, as a part of what it planned with before.
CAUTION_STEP, CAUTION_MIN = 0.7, 0.1  # whatever it is, one image at a time is always planned


@dataclass(frozen=True, slots=True)
class Claim:
    """What another worker may use now, and whether it works on a job: idle ones take no part in the division."""

    size_bytes: int
    busy: bool


class MemoryShare:
    """This process's slot. `caution` is the part of its memory it plans with."""

    def __init__(self, folder: Path, caution: float = 1.0) -> None:
        self.caution = caution
        # The folder may be on a network and the same for several hosts, which share no memory.
        self._slots = folder / f"memory-{socket.gethostname()}"
        self._slots.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in count():
            self._own = self._slots / str(number)
            self._fd = os.open(self._own, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            if _locks(self._fd, fcntl.LOCK_EX):
                break
            os.close(self._fd)
        self.claim(0, busy=False)

    def claim(self, size_bytes: int, *, busy: bool) -> None:
        """Say how much this worker may use from now on."""
        os.pwrite(self._fd, b"%20d %d" % (size_bytes, busy), 0)

    def others(self) -> list[Claim]:
        """Return the claims of all other workers that are alive."""
        claims = []
        for slot in self._slots.iterdir():
            with slot.open("rb") as file:
                if slot != self._own and not _locks(file.fileno(), fcntl.LOCK_SH):
                    size, busy = file.read().split() or (0, 0)
                    claims.append(Claim(int(size), bool(int(busy))))
        return claims

    def recover(self) -> None:
        """A job went well: plan with more again, up to everything."""
        self.caution = min(1.0, self.caution / CAUTION_STEP)

    def close(self) -> None:
        os.close(self._fd)


def _locks(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
