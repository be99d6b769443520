"""Memory of a run over time against its limit, and the images that came out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.support.session import Samples

INK, MUTED, HELD, LIMIT, PREDICTED, OUT = "#222222", "#888888", "#2a6f97", "#c1121f", "#b07d00", "#4a7c59"
RATE_WINDOW_S = 3.0


def draw_run(
    file: Path,
    title: str,
    samples: Samples,
    limit_bytes: int,
    batches: Sequence[Mapping[str, Any]],
    plans: Sequence[Mapping[str, Any]],
    roofline: float | None,
) -> None:
    """Draw memory above, images per second below."""
    held = samples.held
    if not held:
        return
    start_s = held[0][0]
    plt.rcParams.update({"font.size": 10, "axes.edgecolor": MUTED, "text.color": INK, "axes.labelcolor": INK})
    figure, (memory, rate) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 2), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    times = [at_s - start_s for at_s, _held in held]
    memory.fill_between(times, [size / 1e9 for _at_s, size in held], color=HELD, alpha=0.2, lw=0)
    memory.plot(times, [size / 1e9 for _at_s, size in held], color=HELD, lw=1.2)
    memory.plot(
        [at_s - start_s for at_s, _size in samples.charged],
        [size / 1e9 for _at_s, size in samples.charged],
        color=MUTED,
        lw=0.8,
        label="with page cache",
    )
    memory.axhline(limit_bytes / 1e9, color=LIMIT, lw=1.5)
    _label(memory, limit_bytes / 1e9, f"limit {limit_bytes / 1e9:.2f} GB", LIMIT)
    end_s = times[-1]
    for number, plan in enumerate(plans):
        from_s = plan["at_s"] - start_s
        to_s = plans[number + 1]["at_s"] - start_s if number + 1 < len(plans) else end_s
        memory.hlines(plan["peak_bytes"] / 1e9, from_s, to_s, color=PREDICTED, lw=1.2, ls="--")
    if plans:
        peak_gb = plans[-1]["peak_bytes"] / 1e9
        _label(memory, peak_gb, f"predicted peak {peak_gb:.2f} GB", PREDICTED)
    peak_at_s, peak = max(held, key=lambda sample: sample[1])
    memory.annotate(
        f"peak {peak / 1e9:.2f} GB",
        (peak_at_s - start_s, peak / 1e9),
        xytext=(0, -8),
        textcoords="offset points",
        color=HELD,
        ha="left" if peak_at_s - start_s < end_s / 2 else "right",
        va="top",
        fontsize=9,
    )
    memory.set_ylim(0, max(limit_bytes, peak) / 1e9 * 1.12)
    memory.set_ylabel("anonymous + shared, GB")
    if samples.charged:
        memory.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=MUTED)
    _draw_rate(rate, batches, start_s, roofline)
    rate.set_xlabel("seconds since the start of the worker")
    for axes in (memory, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, end_s)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_governed(
    file: Path,
    title: str,
    samples: Samples,
    limit_bytes: int,
    workers: Sequence[Sequence[Mapping[str, Any]]],
    disturbed: tuple[float, float],
) -> None:
    """Draw memory of the enclosure, each worker's budget, use and decisions over it, and images per second below."""
    start_s = samples.held[0][0]
    figure, (memory, rate) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 2), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    memory.plot(*_series(samples.held, start_s), color=HELD, lw=1.2, label="all under the limit")
    memory.axhline(limit_bytes / 1e9, color=LIMIT, lw=1.5, label="limit")
    for number, batches in enumerate(workers):
        for name, color in (("budget_bytes", PREDICTED), ("memory_bytes", OUT)):
            points = [(batch["at_s"], batch[name]) for batch in batches]
            label = {"budget_bytes": "each worker's budget", "memory_bytes": "its use, measured"}[name]
            memory.plot(*_series(points, start_s), color=color, lw=1.2, label=label if number == 0 else None)
        for batch in batches:
            if batch["action"] != "hold":
                at_s = batch["at_s"] - start_s
                memory.axvline(at_s, color=MUTED, lw=0.8, ls=":")
                memory.text(
                    at_s, limit_bytes / 1e9, batch["action"], rotation=90, fontsize=8, ha="right", va="top", color=INK
                )
    memory.set_ylabel("GB")
    memory.set_ylim(0, limit_bytes / 1e9 * 1.05)
    memory.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=8, borderaxespad=0.2)
    _draw_rate(rate, workers[0], start_s, None)
    rate.set_xlabel("seconds since the start of the first worker")
    for axes in (memory, rate):
        axes.axvspan(disturbed[0] - start_s, disturbed[1] - start_s, color=MUTED, alpha=0.12, lw=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, samples.held[-1][0] - start_s)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _series(points: Sequence[tuple[float, int]], start_s: float) -> tuple[list[float], list[float]]:
    return [at_s - start_s for at_s, _size in points], [size / 1e9 for _at_s, size in points]


def _draw_rate(axes: Any, batches: Sequence[Mapping[str, Any]], start_s: float, roofline: float | None) -> None:
    """Draw images per second over the last seconds, and a tick per batch."""
    times = [batch["at_s"] - start_s for batch in batches]
    rates = []
    for now in times:
        recent = [
            batch["images"] for at_s, batch in zip(times, batches, strict=True) if now - RATE_WINDOW_S < at_s <= now
        ]
        rates.append(sum(recent) / min(RATE_WINDOW_S, max(0.5, now - times[0])))
    axes.plot(times[1:], rates[1:], color=OUT, lw=1.2)
    axes.plot(times, [0] * len(times), "|", color=OUT, ms=8, mew=0.6, clip_on=False)
    if roofline is not None:
        axes.axhline(roofline, color=MUTED, lw=1.2, ls="--")
        _label(axes, roofline, f"roofline {roofline:.1f}", MUTED)
    axes.set_ylim(0, max([roofline or 0.0, *rates[1:], 1.0]) * 1.2)
    axes.set_ylabel(f"images/s, last {RATE_WINDOW_S:.0f} s")


def _label(axes: Any, height: float, text: str, color: str) -> None:
    axes.annotate(
        text,
        (0, height),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color=color,
        fontsize=9,
    )
