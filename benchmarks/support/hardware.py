"""The line above a benchmark's figures: on what, at which commit, and beside how much other work."""

from __future__ import annotations

import os

from benchmarks.support.report import commit, machine


def caption() -> str:
    """Return processor, cores, memory, system, libraries, commit and load as one line."""
    return f"{machine()}; commit {commit()}; load before the start {os.getloadavg()[0]:.1f}."
