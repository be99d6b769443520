"""How long to wait before something that failed is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Self

# Attempts after which doubling stops to matter; it keeps 2**attempts within a float.
_DOUBLINGS_MAX = 32


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits that double with each failure, up to a limit, and are shortened at random.

    The jitter keeps a fleet from coming back in step after an outage.

    Attributes:
        first_s: the first wait, in seconds.
        most_s: no wait is longer.
        jitter: the part of a wait that chance may take away, from 0 to 1.
        failures: how many failures in a row there were so far.
    """

    first_s: float
    most_s: float
    jitter: float = 0.5
    failures: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.first_s <= self.most_s:
            raise ValueError(f"a back-off needs 0 < first_s <= most_s, not {self}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter lies between 0 and 1, not {self.jitter}")

    def after_failure(self) -> Self:
        """Return the back-off with one failure more."""
        return replace(self, failures=self.failures + 1)

    def after_success(self) -> Self:
        """Return the back-off as it was at first."""
        return replace(self, failures=0)

    @property
    def longest_wait_s(self) -> float:
        """The wait after the failures so far, without jitter; 0 when there was none."""
        if self.failures == 0:
            return 0.0
        doublings = min(self.failures - 1, _DOUBLINGS_MAX)
        doubled_s: float = self.first_s * 2**doublings
        return min(self.most_s, doubled_s)

    def wait_s(self, chance: float | None = None) -> float:
        """Return how long to wait now.

        `chance`, from 0 to 1, is drawn where it is not given.
        """
        drawn = random.random() if chance is None else chance  # noqa: S311 (jitter is no secret)
        return self.longest_wait_s * (1 - self.jitter * drawn)
