"""The DataLoader of a job: torch's, carrying the plan, showing the arena itself, and leaving nothing behind."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.data import DataLoader

from adc_worker.ingest.header import read_header
from adc_worker.ingest.loader import JobDataLoader, build_dataloader
from adc_worker.ingest.staging import StagedQueue
from tests.support.images import by_pillow, jpeg, staged, written
from tests.support.plans import ingest_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adc_worker.errors import ImageError
    from adc_worker.ingest.staging import StagedImage
    from adc_worker.planning.plan import IngestPlan

MAX_PIXELS = 1_000_000


class Job:
    """A loader over real files, and what is known of them."""

    def __init__(self, folder: Path, files: list[bytes], plan: IngestPlan) -> None:
        self.files = files
        self.failures: list[tuple[int, ImageError]] = []
        source = StagedQueue()
        for number, data in enumerate(files):
            path = written(folder / f"{number}.img", data)
            source.put(staged(number, path, read_header(path, MAX_PIXELS), staged_at=1.0 + number))
        source.end()
        self.loader = build_dataloader(plan, source, self._failed)

    def _failed(self, image: StagedImage, error: ImageError) -> None:
        self.failures.append((image.id, error))


@contextmanager
def _job(folder: Path, files: list[bytes], **changes: float) -> Iterator[Job]:
    job = Job(folder, files, ingest_plan(**changes))
    with closing(job.loader):
        yield job


def test_it_is_a_dataloader_that_carries_its_plan(tmp_path: Path) -> None:
    """Torch's own workers and collating are off: the plan's numbers are the loader's."""
    with _job(tmp_path, [], batch_size=3, prefetch_factor=5) as job:
        loader = job.loader
        assert isinstance(loader, DataLoader)
        assert (loader.plan.batch_size, loader.prefetch_factor, loader.pin_memory) == (3, 5, False)
        assert (loader.batch_size, loader.num_workers) == (None, 0)
        assert list(loader) == []


def test_its_batches_are_the_images_as_pillow_sees_them(tmp_path: Path) -> None:
    """Every image once, in batches of at most the plan's size, uint8 [n, H, W, 3]."""
    files = [jpeg(40, 30, seed=seed) for seed in range(7)]
    seen = []
    with _job(tmp_path, files, batch_size=3) as job:
        for batch in job.loader:
            with batch:
                assert batch.images.dtype == torch.uint8
                assert batch.images.shape == (len(batch.staged), 30, 40, 3)
                assert len(batch.staged) <= 3
                for row, image in enumerate(batch.staged):
                    expected = torch.from_numpy(by_pillow(files[image.id]).copy())
                    assert torch.equal(batch.images[row], expected)
                seen += [image.id for image in batch.staged]
    assert sorted(seen) == list(range(7))
    assert not job.failures


def test_torch_hands_out_the_arena_itself(tmp_path: Path) -> None:
    """No batch is copied on its way through the DataLoader."""
    with _job(tmp_path, [jpeg(), jpeg(seed=1)], batch_size=1) as job:
        block = job.loader.arena._mapped()
        for batch in job.loader:
            with batch:
                offset = batch.images.data_ptr() - block.ctypes.data
                assert 0 <= offset < block.nbytes
                batch.images[0, 0, 0, 0] = 77
                assert block[offset] == 77
        del block


def test_a_freed_batch_shows_nothing_and_its_bytes_are_used_again(tmp_path: Path) -> None:
    """With memory for one image, all three are decoded at the same place."""
    files = [jpeg(40, 30, seed=seed) for seed in range(3)]
    places = set()
    with _job(tmp_path, files, arena_bytes=3 * 40 * 30) as job:
        for batch in job.loader:
            with batch:
                places.add(batch.images.data_ptr())
            assert batch.images.numel() == 0
    assert len(places) == 1


@pytest.mark.parametrize("used", [0, 1, 3])
def test_closing_leaves_no_thread_and_no_memory(tmp_path: Path, used: int) -> None:
    """After none, some or all of its batches; a second close is no fault."""
    threads = threading.active_count()
    with _job(tmp_path, [jpeg(seed=seed) for seed in range(3)], batch_size=1) as job:
        batches = iter(job.loader)
        for _batch in range(used):
            with next(batches):
                pass
        job.loader.close()
        assert threading.active_count() == threads
        assert "memfd:adc-arena" not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_consumer_that_fails_in_a_batch_leaves_nothing_either(tmp_path: Path) -> None:
    """Its own exception comes out, not one about memory in use."""

    def use(folder: Path) -> None:
        with _job(folder, [jpeg(), jpeg()], batch_size=1) as job:
            for batch in job.loader:
                with batch:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use(tmp_path)


def test_jobs_without_an_image_end_at_once(tmp_path: Path) -> None:
    """Iterating again is no fault either."""
    with _job(tmp_path, []) as job:
        assert isinstance(job.loader, JobDataLoader)
        assert [list(job.loader), list(job.loader)] == [[], []]
