"""What an operator's settings forbid a plan to exceed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Limited:
    """A value within the operator's ceiling, and a note where the ceiling changed it."""

    value: int
    note: str


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Ceilings from the operator's variables and the pipeline. None is no ceiling.

    In `fixed` mode the ceilings are not limits: they are the values themselves.
    """

    soft_cap: float = 0.7
    mode: Literal["auto", "fixed"] = "auto"
    tasks_per_fetch: int | None = None
    prefetch_factor: int | None = None
    downloads: int | None = None
    decode_workers: int | None = None
    fixed_decode_workers: int = 4
    pin_memory: bool | None = None
    images_per_call: int = 8

    @property
    def is_fixed(self) -> bool:
        return self.mode == "fixed"

    def limit(self, computed: int, ceiling: int | None, old_default: int) -> Limited:
        """Return the computed value within `ceiling`; in fixed mode `ceiling` or the old default."""
        if self.is_fixed:
            value = ceiling or old_default
            return Limited(value, f", in fixed mode {value}")
        if ceiling is None or computed <= ceiling:
            return Limited(computed, "")
        return Limited(ceiling, f", of which the settings allow {ceiling}")
