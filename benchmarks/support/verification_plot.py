"""One figure with a panel per open question; today's ingest in reds and greys, ours in blue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

from benchmarks.support.plots import HELD, INK, LIMIT, MUTED, PREDICTED

TODAYS = ("#7f1d1d", "#b45309", "#d97706", "#a3a3a3", "#525252")
PHOTOGRAPHS = {"tiny": "#4a7c59", "typical": "#b07d00", "large": "#7f1d1d"}


def draw(file: Path, found: Mapping[int, Mapping[str, Any]]) -> None:
    """Draw what the items found that were run, by their numbers."""
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": MUTED, "text.color": INK, "axes.labelcolor": INK})
    figure, panels = plt.subplots(3, 2, figsize=(12, 13), layout="constrained")
    both = {"courses": [course for number in (1, 2) if number in found for course in found[number]["courses"]]}
    items = {**found, **({2: both} if both["courses"] else {})}
    drawn = zip((_waiting, _peaks, _rates, _jobs, _ratios, _files), panels.flat, range(1, 7), strict=True)
    for panel, axes, number in drawn:
        axes.spines[["top", "right"]].set_visible(False)
        if number in items:
            panel(axes, items[number])
        else:
            axes.set_axis_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _short(title: str) -> str:
    return (
        title.removeprefix("today's: ")
        .replace(" a batch, prefetch ", "/")
        .replace(", ", "/", 1)
        .replace(" loader(s)", "")
    )


def _waiting(axes: Any, found: Mapping[str, Any]) -> None:
    courses = found["courses"]
    for number, course in enumerate(courses):
        color = TODAYS[number] if course["reckoned"] else HELD
        times, sizes = [at_s for at_s, _held in course["held"]], [held / 1e9 for _at_s, held in course["held"]]
        axes.plot(
            times, sizes, color=color, lw=1.6, label=_short(course["title"]) + (", killed" if course["killed"] else "")
        )
        if course["killed"]:
            peak = max(range(len(sizes)), key=sizes.__getitem__)
            axes.plot(times[peak], sizes[peak], "X", color=color, ms=9)
    axes.axhline(courses[0]["limit"] / 1e9, color=LIMIT, lw=1.2, ls="--")
    axes.set_title(
        "1  Large photographs behind a GPU that stands still (batch/prefetch/loaders)", loc="left", fontsize=10
    )
    axes.set(
        xlabel="seconds since the start", ylabel="anonymous + shared, GB", ylim=(0, courses[0]["limit"] / 1e9 * 1.1)
    )
    axes.legend(frameon=False, fontsize=8, loc="center right")


def _peaks(axes: Any, found: Mapping[str, Any]) -> None:
    courses = [course for course in found["courses"] if course["reckoned"]]
    for row, course in enumerate(reversed(courses)):
        marker = "X" if course["killed"] else "o"
        axes.plot([course["peak"] / 1e9, course["reckoned"] / 1e9], [row, row], color=MUTED, lw=0.8)
        axes.plot(course["reckoned"] / 1e9, row, "|", color=PREDICTED, ms=13, mew=2)
        axes.plot(course["peak"] / 1e9, row, marker, color=TODAYS[0], ms=7)
        if course["described"]:
            axes.plot(course["described"] / 1e9, row, "D", mfc="none", color=HELD, ms=7)
    for marker, label, color in (
        ("o", "measured", TODAYS[0]),
        ("X", "killed at its limit", TODAYS[0]),
        ("|", "pixels, reckoned", PREDICTED),
        ("D", "estimate of the description", HELD),
    ):
        axes.plot([], [], marker, color=color, mfc="none" if marker == "D" else color, label=label)
    axes.set_yticks(range(len(courses)), [f"{one['kind']} {_short(one['title'])}" for one in reversed(courses)])
    axes.set(xscale="log", xlabel="GB, logarithmic")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ticks := (0.2, 0.5, 1, 2, 5, 10, 20), [f"{tick:g}" for tick in ticks])
    _title(axes, "1, 2  Peak memory of today's ingest, nothing pinned")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _rates(axes: Any, found: Mapping[str, Any]) -> None:
    titles, rates = zip(*reversed(found["rates"]), strict=True)
    bars = axes.barh(
        [_short(title) for title in titles], rates, color=[HELD if title == "ours" else TODAYS[1] for title in titles]
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("images/s")
    _title(axes, "3  Typical photographs, a GPU of 40 ms (batch/prefetch/loaders)")


def _jobs(axes: Any, found: Mapping[str, Any]) -> None:
    for held, label, color in zip(
        found["held"], ("today's, whole tree", "ours, whole tree"), (TODAYS[0], HELD), strict=True
    ):
        axes.plot(*_series(held, 1e9), color=color, lw=1.2, label=label)
    axes.plot(*_series(found["maxrss"], 1e9), color=PREDICTED, ls="--", label="ru_maxrss of today's main process")
    _title(axes, "4  Memory: 12 large, then jobs of 12 typical")
    axes.set(xlabel="seconds since the start", ylabel="anonymous + shared, GB", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _ratios(axes: Any, found: Mapping[str, Any]) -> None:
    for kind, color in PHOTOGRAPHS.items():
        of_kind = [(1 / link, ours, today) for one, link, ours, today in found["ratios"] if one == kind]
        links, ours, today = zip(*of_kind, strict=True)
        axes.plot(links, ours, "o-", color=color, label=f"{kind}: download")
        axes.plot(links, today, "x:", color=color)
    axes.plot([], [], "x:", color=MUTED, label="today's load_time: download + decode")
    axes.axhline(1, color=MUTED, lw=1)
    axes.set(xscale="log", yscale="log", xlabel="speed of the link", ylabel="times the seconds of inference")
    axes.set_xticks((0.1, 1, 10), ("a tenth", "60 MB/s, 50 ms", "ten times"))
    _title(axes, "5  Download : inference, an image over one connection")
    axes.legend(frameon=False, fontsize=8)


def _files(axes: Any, found: Mapping[str, Any]) -> None:
    for (title, points), color in zip(found["files"], (TODAYS[0], TODAYS[2], HELD), strict=True):
        axes.plot(*_series(points, 1), color=color, lw=1.4, label=_short(title))
    _title(axes, "6  Open files of the whole tree: 440 tiny, then jobs of 48")
    axes.set(xlabel="seconds since the start", ylabel="open files", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def _series(points: Sequence[Sequence[float]], unit: float) -> tuple[list[float], list[float]]:
    return [at for at, _value in points], [value / unit for _at, value in points]


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)
