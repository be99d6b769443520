"""The scenarios of the ingest benchmark: what each feeds to a worker, under which limit, and what it must reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from benchmarks.support.photographs import Photographs

GB = 1_000_000_000
Count = Callable[[int], int]  # scales a number of images


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table.

    Attributes:
        images: file names of the job, given the photographs and a function that scales counts.
        program: `ami worker`, its child with the other decode engine, or the ingest to compare with.
        peak_share: most anonymous + shared memory as a share of the limit; None: the limit itself.
        roofline_share: least share of the roofline; None: any speed.
        gpu_s: what the GPU, played by a sleep, takes per image.
        replan_after: images of the job after which others come, and a new plan must within two batches.
    """

    name: str
    title: str
    images: Callable[[Photographs, Count], list[str]]
    limit_bytes: int
    program: Literal["worker", "processes", "baseline"] = "worker"
    arguments: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    peak_share: float | None = None
    roofline_share: float | None = None
    replan_after: float | None = None  # share of the images
    gpu_s: float = 0.040

    @property
    def must(self) -> str:
        """Say in words what it must reach."""
        if self.program == "baseline":
            return "to compare with"
        words = ["all done"]
        if self.replan_after is not None:
            words.append("new plan within 2 batches")
        if self.peak_share is not None:
            words.append(f"≤ {self.peak_share:.0%} of the limit")
        if self.roofline_share is not None:
            words.append(f"≥ {self.roofline_share:.0%} of the roofline")
        return ", ".join(words)


def _only(kind: str, count: int) -> Callable[[Photographs, Count], list[str]]:
    return lambda photographs, scaled: photographs.names(kind, scaled(count))


def _typical_with_a_huge_one(photographs: Photographs, scaled: Count) -> list[str]:
    names = photographs.names("typical", scaled(400))
    return [*names[: len(names) // 2], *photographs.names("huge", 1), *names[len(names) // 2 :]]


def _typical_then_large(photographs: Photographs, scaled: Count) -> list[str]:
    return photographs.names("typical", scaled(96)) + photographs.names("large", scaled(96))


def _mixed(photographs: Photographs, scaled: Count) -> list[str]:
    kinds = ("progressive", "progressive", "png", "progressive", "tiff", "cmyk")
    files = {kind: photographs.names(kind, 8) for kind in set(kinds)}
    return [files[kinds[number % len(kinds)]][number % 8] for number in range(scaled(96))]


FIXED = MappingProxyType({"AMI_INGEST_MODE": "fixed"})

SCENARIOS = (
    Scenario("typical", "400 typical", _only("typical", 400), 1_500_000_000,
             peak_share=0.9, roofline_share=0.9),
    Scenario("typical-tight", "400 typical, tight", _only("typical", 400), 750_000_000),
    Scenario("large", "200 large", _only("large", 200), 2 * GB, peak_share=0.9, roofline_share=0.9),
    Scenario("large-tight", "200 large, tight", _only("large", 200), GB),
    Scenario("huge", "400 typical, one of 75 Mpx among them", _typical_with_a_huge_one, 1_500_000_000),
    Scenario("shift", "96 typical, then 96 large", _typical_then_large, 2 * GB, replan_after=0.5),
    Scenario("mixed", "96: progressive 4:4:4 large, PNG, TIFF, CMYK", _mixed, 2 * GB),
    Scenario("fixed-typical", "400 typical, fixed mode", _only("typical", 400), 1_500_000_000,
             settings=FIXED),
    Scenario("fixed-large", "200 large, fixed mode", _only("large", 200), 2 * GB, settings=FIXED),
    Scenario("processes-typical", "400 typical, decode processes", _only("typical", 400), 1_500_000_000,
             program="processes", peak_share=0.9, roofline_share=0.9),
    Scenario("processes-large", "200 large, decode processes", _only("large", 200), 2 * GB,
             program="processes", peak_share=0.9, roofline_share=0.9),
    Scenario("quick-gpu", "400 typical, a GPU of 5 ms", _only("typical", 400), 900_000_000, gpu_s=0.005),
    Scenario("today-defaults", "today's ingest, 96 typical, its defaults (24, 4 loaders)",
             _only("typical", 96), 16 * GB, program="baseline"),
    Scenario("today-best", "today's ingest, 96 typical, hand-set (4, 2 loaders)",
             _only("typical", 96), 16 * GB, program="baseline", arguments=("--batch-size", "4", "--workers", "2")),
    Scenario("today-quick-gpu", "today's ingest, 96 typical, hand-set (4, 2 loaders), a GPU of 5 ms",
             _only("typical", 96), 16 * GB, program="baseline", arguments=("--batch-size", "4", "--workers", "2"),
             gpu_s=0.005),
    Scenario("today-best-large", "today's ingest, 48 large, hand-set (4, 1 loader)",
             _only("large", 48), 16 * GB, program="baseline", arguments=("--batch-size", "4", "--workers", "1")),
)  # fmt: skip
