"""What the benchmark of the open questions reckons and removes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.support.course import Ingest
from benchmarks.support.session import remove_shared
from benchmarks.verification import reckoned_bytes

TYPICAL_FLOAT_BYTES = 4096 * 2160 * 3 * 4


def test_what_may_wait_is_a_queue_and_a_list_per_loader_and_one_batch_in_hand() -> None:
    """One loader at today's defaults: four batches that wait, one more as a list, one being inferred."""
    assert reckoned_bytes(Ingest(24, 4, 1), "typical") == 6 * 24 * TYPICAL_FLOAT_BYTES
    assert reckoned_bytes(Ingest(4, 1, 2), "typical") == 5 * 4 * TYPICAL_FLOAT_BYTES


def test_only_what_the_measured_processes_left_is_removed(tmp_path: Path) -> None:
    """Other programs of the machine keep their shared memory, of processes with longer numbers, too."""
    for name in ("torch_12_345_0", "torch_123_45_0", "torch_1_2", "sem.torch_12_1", "torch_12"):
        (tmp_path / name).write_bytes(bytes(1 << 16))
    assert remove_shared({12}, tmp_path) == 1 << 16
    assert {file.name for file in tmp_path.iterdir()} == {"torch_123_45_0", "torch_1_2", "sem.torch_12_1", "torch_12"}
