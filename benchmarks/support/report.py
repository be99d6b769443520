"""What every benchmark's report has: the machine, the commit, caveats, a table, and a section of RESULTS.md."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import psutil

FOLDER = Path(__file__).parents[1]
RESULTS = FOLDER / "RESULTS.md"
PLOTS = FOLDER / "plots"
LIBRARIES = ("torch", "simplejpeg", "pillow", "urllib3")


def machine() -> str:
    """Return one sentence: processor, cores in use and there, memory, system, Python, libraries."""
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    cores, memory_gb = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 1e9
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{names[0] if names else platform.machine()}, {cores} of {os.cpu_count()} cores, {memory_gb:.0f} GB,"
        f" Linux {platform.release()}, Python {platform.python_version()}, {libraries}"
    )


def commit() -> str:
    """Return the short commit, and whether the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "no commit"


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    return "\n".join([row(head), row("---" for _name in head), *(row(cells) for cells in rows)])


def write_section(name: str, text: str, file: Path = RESULTS) -> None:
    """Put `text` between the markers of section `name`, in place of what was there; other sections stay."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    before = file.read_text() if file.exists() else "# What the worker costs, measured\n"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    after = pattern.sub(lambda _old: section, before) if pattern.search(before) else f"{before.rstrip()}\n\n{section}\n"
    file.write_text(after)


def mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
