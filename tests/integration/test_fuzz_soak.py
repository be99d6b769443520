"""Random damage to image files: benchmarks/fuzz.py for a moment, and for longer than `make test` has time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import fuzz
from tests.support.images import jpeg, written


@pytest.mark.soak
def test_damaged_files_end_as_answers() -> None:
    """Ten minutes from a seed of the day: no other exception, no death, no memory or time out of proportion."""
    outcomes, found = fuzz.run(600.0, seed=int(time.time()))
    assert outcomes.total() > 10_000
    assert not found


def test_a_few_damaged_files_of_every_format_end_as_answers() -> None:
    """Always the same ones, as far as the machine's speed takes them."""
    outcomes, found = fuzz.run(3.0, seed=1)
    assert not found
    assert {outcome.split()[0] for outcome in outcomes} == {"JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"}
    assert {"JPEG decoded", "JPEG damaged", "TIFF unreadable"} <= set(outcomes)


@pytest.mark.parametrize("file", sorted(fuzz.SEEDS.glob("*.img")), ids=lambda file: file.stem)
def test_what_was_found_once_stays_mended(file: Path) -> None:
    """Each of these once came out of the fuzzer as a finding."""
    assert fuzz.finding(file)[1] is None


def test_the_fuzzer_tells_a_fault_from_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception, a slow answer and memory that nothing explains are findings; an image and a broken one are not."""
    good, broken = written(tmp_path / "1.img", jpeg()), written(tmp_path / "2.img", b"\xff\xd8\xffnothing")
    assert fuzz.finding(good) == ("decoded", None)
    assert fuzz.finding(broken) == ("unreadable", None)
    outcome, wrong = fuzz.finding(tmp_path / "gone.img")
    assert outcome == "exception"
    assert "FileNotFoundError" in str(wrong)
    monkeypatch.setattr(fuzz, "SLOW_S", 0.0)
    assert "took" in str(fuzz.finding(good)[1])
    monkeypatch.setattr(fuzz, "SLOW_S", 100.0)
    monkeypatch.setattr(fuzz, "SLACK_BYTES", -(1 << 40))
    assert "are explained" in str(fuzz.finding(good)[1])
