"""Damaged files in processes whose fresh memory holds different bytes: no pixel comes from memory nobody wrote."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import decode_all
from tests.support.damage import DAMAGES, SAMPLE_FILES
from tests.support.workers import REPOSITORY

# What glibc fills allocated memory with is the inverse of MALLOC_PERTURB_; 0 leaves it as it is.
CONTENTS = ((1, 0x00), (170, 0xFF))


def _run(perturb: int, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MALLOC_PERTURB_": str(perturb)}
    # Python's own allocator would keep small pieces of memory from glibc's.
    environment["PYTHONMALLOC"] = "malloc"
    ended = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def _outcomes(folder: Path, perturb: int, fill: int) -> list[str]:
    return _run(perturb, decode_all.__file__, str(folder), str(fill)).splitlines()


def _write_damaged_files(folder: Path, tries: int, seed: int) -> int:
    dice = random.Random(seed)  # noqa: S311 (no secret)
    count = 0
    for kind, data in SAMPLE_FILES.items():
        for damage, do in DAMAGES.items():
            for number in range(tries):
                name = f"{kind}-{damage}-{number}.img".replace(":", "").replace(" ", "_")
                (folder / name).write_bytes(do(data, dice))
                count += 1
    return count


def _assert_defined(folder: Path, count: int) -> None:
    first, second = (_outcomes(folder, perturb, fill) for perturb, fill in CONTENTS)
    assert len(first) == len(second) == count
    assert [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]] == []


def test_memory_that_nobody_wrote_differs_between_the_processes() -> None:
    """Else the tests below could not fail."""
    unwritten = "import numpy; print(set(numpy.empty(100_000, numpy.uint8).tolist()))"
    first, second = (_run(perturb, "-c", unwritten) for perturb, _fill in CONTENTS)
    assert (first.strip(), second.strip()) == ("{254}", "{85}")


def test_no_pixel_of_a_damaged_file_comes_from_memory_that_nobody_wrote(tmp_path: Path) -> None:
    """Neither from the region nor from what the decoders allocate."""
    count = _write_damaged_files(tmp_path, tries=3, seed=1)
    _assert_defined(tmp_path, count)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 12))
def test_no_pixel_of_many_damaged_files_comes_from_memory_that_nobody_wrote(tmp_path: Path, seed: int) -> None:
    """The same with more files."""
    count = _write_damaged_files(tmp_path, tries=30, seed=seed)
    _assert_defined(tmp_path, count)
