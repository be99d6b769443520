"""How much of a disk may be staged on, and what a full one costs: a pause, and never a task."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from adc_worker.ingest.disk_budget import DISK_SHARE, PAUSE_S, RAM_BUFFER_BYTES, DiskBudget, is_memory

SHM = Path("/dev/shm")  # noqa: S108 (no file name is guessed in it)
LIMIT = 1000


@dataclass
class Clock:
    """A clock that the test moves."""

    now_s: float = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def disk(tmp_path: Path, clock: Clock) -> DiskBudget:
    return DiskBudget(tmp_path, LIMIT, clock)


def _staged(disk: DiskBudget, *sizes: int) -> None:
    for task_id, size_bytes in enumerate(sizes):
        disk.charge(task_id, size_bytes)


# Room


def test_there_is_room_until_the_limit_is_reached(disk: DiskBudget) -> None:
    """And again as soon as a file has gone."""
    _staged(disk, 600, LIMIT - 601)
    assert disk.has_room()
    disk.charge(2, 1)
    assert not disk.has_room()
    disk.release(2)
    assert disk.has_room()


def test_half_of_what_is_free_is_taken_at_most(tmp_path: Path) -> None:
    """The host has other uses for its disk."""
    free_bytes = shutil.disk_usage(tmp_path).free
    if is_memory(tmp_path):
        pytest.skip("the temporary folder is memory")
    assert DiskBudget(tmp_path).limit_bytes == pytest.approx(DISK_SHARE * free_bytes, rel=0.05)


def test_the_operators_number_lowers_the_limit_and_cannot_raise_it(tmp_path: Path) -> None:
    """AMI_STAGING_MAX_BYTES is a ceiling."""
    assert DiskBudget(tmp_path, 12_345).limit_bytes == 12_345
    assert DiskBudget(tmp_path, 1 << 60).limit_bytes < shutil.disk_usage(tmp_path).free


def test_a_limit_below_one_image_still_stages_one_after_the_other(tmp_path: Path) -> None:
    """With nothing staged one download always may start: no setting stops a worker for good."""
    disk = DiskBudget(tmp_path, 1)
    assert disk.has_room()
    disk.charge(1, 5_000_000)
    assert not disk.has_room()
    disk.release(1)
    assert disk.has_room()


def test_the_floor_stays_free_except_for_one_image(tmp_path: Path) -> None:
    """Beneath it nothing is added to what is staged."""
    disk = DiskBudget(tmp_path)
    disk._floor_bytes = 1 << 62
    assert disk.has_room()
    disk.charge(1, 10)
    assert not disk.has_room()


def test_a_download_that_begins_is_charged_with_the_largest_file_so_far(disk: DiskBudget) -> None:
    """Its own size is not known yet; when it is, that counts."""
    _staged(disk, 100, 400, 200)
    disk.reserve(3)
    assert disk.used_bytes == 700 + 400
    assert not disk.has_room()
    disk.charge(3, 50)
    assert disk.used_bytes == 750
    assert disk.has_room()


def test_a_download_that_fails_gives_its_reservation_back(disk: DiskBudget) -> None:
    """Also when that is said twice."""
    _staged(disk, 400)
    disk.reserve(1)
    disk.unreserve(1)
    disk.unreserve(1)
    assert disk.used_bytes == 400
    with suppress(OSError), disk.reserving(2):
        assert disk.used_bytes == 800
        raise OSError
    assert disk.used_bytes == 400


def test_a_task_whose_file_is_there_needs_no_room_to_be_taken_up_again(disk: DiskBudget) -> None:
    """Its file is charged, once, whatever is begun and ended on it."""
    _staged(disk, 400, 300)
    with disk.reserving(1):
        assert disk.used_bytes == 700
    assert disk.used_bytes == 700


# A full disk


def test_a_full_disk_pauses_downloads_and_the_pause_ends_by_itself(disk: DiskBudget, clock: Clock) -> None:
    """Also with nothing staged: nothing would have space."""
    disk.reserve(1)
    disk.disk_full(1)
    assert not disk.has_room()
    clock.now_s += PAUSE_S - 0.001
    assert not disk.has_room()
    clock.now_s += 0.001
    assert disk.has_room()


def test_a_full_disk_halves_what_may_be_staged(disk: DiskBudget, clock: Clock) -> None:
    """Of what was staged when it happened; the download that failed does not count."""
    _staged(disk, 200, 200, 200)
    disk.reserve(3)
    disk.disk_full(3)
    clock.now_s += PAUSE_S
    assert disk.limit_bytes == 300
    assert disk.used_bytes == 600
    assert not disk.has_room()


def test_downloads_that_fail_together_do_not_raise_the_limit_again(disk: DiskBudget) -> None:
    """Several find the disk full at once, and staging says of each that its file is gone."""
    _staged(disk, 200, 200)
    for task_id in (2, 3, 4):
        disk.reserve(task_id)
    for task_id in (2, 3, 4):
        disk.disk_full(task_id)
        disk.release(task_id)
    assert disk.limit_bytes <= 400 // 2 + 2 * 200 // 2


def test_the_limit_grows_back_with_every_file_that_went_its_way(disk: DiskBudget) -> None:
    """Up to where it was, and no further."""
    _staged(disk, 200, 200, 200)
    disk.disk_full(3)
    limits = []
    for task_id in range(10):
        disk.charge(task_id, 200)
        disk.release(task_id)
        limits.append(disk.limit_bytes)
    assert limits[:3] == [500, 700, 900]
    assert set(limits[3:]) == {LIMIT}


def test_a_full_disk_with_nothing_staged_leaves_one_image_at_a_time(disk: DiskBudget, clock: Clock) -> None:
    """Somebody else filled it."""
    disk.disk_full(1)
    clock.now_s += PAUSE_S
    assert disk.has_room()
    disk.reserve(1)
    disk.charge(1, 10)
    assert not disk.has_room()


def test_a_full_disk_is_said_with_what_to_do(disk: DiskBudget, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the variable."""
    disk.disk_full(1)
    told = capsys.readouterr()
    assert (told.out + told.err).count("disk_full") == 1
    assert "AMI_STAGING_PATH" in told.out + told.err


# Memory instead of a disk


@pytest.mark.skipif(not is_memory(SHM), reason="no tmpfs at /dev/shm")
def test_a_folder_in_memory_is_known_as_such_and_holds_a_short_buffer() -> None:
    """What is staged there counts as memory, also in a folder below or behind a link."""
    with TemporaryDirectory(dir=SHM) as folder:
        disk = DiskBudget(Path(folder))
        assert disk.in_memory
        assert disk.limit_bytes == min(RAM_BUFFER_BYTES, int(DISK_SHARE * shutil.disk_usage(folder).free))
        assert DiskBudget(Path(folder), 1000).limit_bytes == 1000
        link = Path("linked")  # in the test's own folder, on the usual disk
        link.symlink_to(folder)
        assert is_memory(link)


def test_a_folder_on_a_disk_is_not_memory() -> None:
    """The package's own is on one wherever tests run from a checkout."""
    assert not is_memory(Path(__file__).parent)
