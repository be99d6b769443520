"""A planned value together with the arithmetic that it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reasoned(Generic[T]):
    """A value and one line that says where it comes from, which ends with the value where it is a number."""

    value: T
    why: str


def megabytes(size_bytes: int) -> str:
    """Return a size as people read it, in whole megabytes (10^6 bytes)."""
    return f"{size_bytes / 1_000_000:.0f} MB"
