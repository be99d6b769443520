"""Decode processes as they run: real ones, killed and crashed in the middle, and no image pays for it."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from adc_worker.errors import ImageError, ImageTooLarge, ImageUnreadable, WorkerFault
from adc_worker.host.memory import anonymous_bytes
from adc_worker.ingest.arena import Arena, Region
from adc_worker.ingest.decode import DecodeEngine, DecodeReport, ThreadEngine, decode
from adc_worker.ingest.decode_processes import KILLS_MAX, ProcessEngine
from adc_worker.ingest.header import ImageHeader, read_header
from adc_worker.ingest.loader import build_dataloader
from adc_worker.ingest.staging import StagedImage, StagedQueue
from tests.support.damage import DAMAGES, SAMPLE_FILES
from tests.support.images import by_pillow, encoded, header, jpeg, picture, staged, written
from tests.support.plans import ingest_plan
from tests.support.waiting import wait_until
from tests.support.workers import REPOSITORY

MB = 1_000_000
PATIENCE_S = 60.0
WORKERS = 2

FORMATS: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", "RGB", {"subsampling": 2}),
    ("JPEG", "RGB", {"subsampling": 0, "progressive": True}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {}),
    ("PNG", "I;16", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("WEBP", "RGB", {}),
]


class Desk:
    """An arena and the engine that decodes into it."""

    def __init__(self, make_engine: Callable[[Arena, int, int], DecodeEngine], workers: int = WORKERS) -> None:
        self.arena = Arena(4 * MB)
        self.engine = make_engine(self.arena, workers, 1 << 30)

    def submit(self, path: Path, image_header: ImageHeader) -> tuple[Region, Future[DecodeReport]]:
        region = self.arena.allocate(image_header.pixel_bytes)
        assert region is not None
        return region, self.engine.submit(path, image_header, region)

    def decoded(self, path: Path) -> tuple[npt.NDArray[np.uint8], bool]:
        """Return the pixels of a file, and whether it was called truncated."""
        image_header = read_header(path, 1 << 30)
        region, future = self.submit(path, image_header)
        try:
            truncated = future.result(PATIENCE_S).truncated
            return self.arena.view(region, image_header.shape).copy(), truncated
        finally:
            self.arena.free(region)

    def close(self) -> None:
        self.engine.close()
        for region in tuple(self.arena._used):
            self.arena.free(region)
        self.arena.close()


class SlowImage:
    """A PNG that comes through a pipe: whoever decodes it waits until the test lets the bytes go."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        os.mkfifo(path)
        self.path = path
        self.data = encoded(picture(40, 30, seed=seed), "PNG")
        self.header = header(40, 30, image_format="PNG")
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def decoder(self, engine: DecodeEngine) -> int:
        """Wait until a process has the image open, and return its pid."""
        wait_until(lambda: self._readers(engine), PATIENCE_S)
        return self._readers(engine)[0]

    def finish(self) -> None:
        os.write(self._fd, self.data)
        os.close(self._fd)

    def _readers(self, engine: DecodeEngine) -> list[int]:
        return [pid for pid in engine.pids if str(self.path) in _open_files(pid)]


def _open_files(pid: int) -> list[str]:
    with suppress(OSError):
        return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return []


def _gone(pid: int) -> bool:
    """Whether a process has ended; who should reap it may not be us."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk(ProcessEngine)
    yield made
    made.close()


# What they decode


def test_their_pixels_are_those_of_decode_threads(tmp_path: Path, desk: Desk) -> None:
    """Bit for bit, for every kind of file, and a truncated one is called so."""
    files = [encoded(picture(mode=mode), name, **options) for name, mode, options in FORMATS]
    files.append(encoded(picture(400, 300), "JPEG")[:-2000])
    paths = [written(tmp_path / f"{number}.img", data) for number, data in enumerate(files)]
    threads = Desk(ThreadEngine)
    try:
        for path in paths:
            (pixels, truncated), (expected, expected_truncated) = desk.decoded(path), threads.decoded(path)
            np.testing.assert_array_equal(pixels, expected)
            assert truncated == expected_truncated == (path == paths[-1])
    finally:
        threads.close()


def test_an_image_that_cannot_be_decoded_is_told_in_the_decoders_words(tmp_path: Path, desk: Desk) -> None:
    """The process lives on."""
    pids = set(desk.engine.pids)
    broken = written(tmp_path / "broken.img", jpeg()[:200] + bytes(50))
    _region, future = desk.submit(broken, header(97, 61))
    with pytest.raises(ImageUnreadable, match="cannot be decoded as JPEG"):
        future.result(PATIENCE_S)
    assert set(desk.engine.pids) == pids


def test_a_decoder_that_gets_no_memory_is_asked_again_alone_and_lives_on(tmp_path: Path) -> None:
    """Then the image is too large for this host; the next one is decoded by the same process."""
    desk = Desk(ProcessEngine, workers=1)
    desk.arena.resize(20 * MB)
    pids = list(desk.engine.pids)
    try:
        small = written(tmp_path / "small.img", jpeg())
        for _process in pids:
            desk.decoded(small)
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_AS, (psutil.Process(pid).memory_info().vms + 25 * MB, -1))
        # All coefficients of 3 Mpx at 4:4:4: 18 MB more than the pixels, which are mapped by then.
        large = written(tmp_path / "large.img", jpeg(2500, 2400, progressive=True, subsampling=0))
        with pytest.raises(ImageTooLarge, match="cannot be decoded as JPEG: it takes more memory"):
            desk.decoded(large)
        np.testing.assert_array_equal(desk.decoded(small)[0], by_pillow(jpeg()))
        assert desk.engine.pids == pids
    finally:
        desk.close()


def test_a_file_that_is_not_there_is_this_machines_fault(tmp_path: Path, desk: Desk) -> None:
    """As with decode threads: no evidence against the image, and no reason to try for ever."""
    _region, future = desk.submit(tmp_path / "nowhere.img", header(97, 61))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.img"):
        future.result(PATIENCE_S)


def test_an_arena_of_another_size_is_followed(tmp_path: Path, desk: Desk) -> None:
    """Larger, smaller, and back: every process decodes into the block that is there now."""
    for size_px in ((40, 30), (1500, 1000), (10, 10), (40, 30)):
        data = jpeg(*size_px)
        path = written(tmp_path / "1.img", data)
        desk.arena.resize(3 * size_px[0] * size_px[1])
        for _process in range(WORKERS + 1):
            np.testing.assert_array_equal(desk.decoded(path)[0], by_pillow(data))


def test_what_is_wrong_with_a_file_is_told_as_by_decode_threads(tmp_path: Path, desk: Desk) -> None:
    """The report arrives whole, and so do the decoder's words where it gives up: every kind of file and of damage."""
    dice = random.Random(1)  # noqa: S311 (no secret)
    damaged = [(kind, damage(data, dice)) for kind, data in SAMPLE_FILES.items() for damage in DAMAGES.values()]
    compared = 0
    with ThreadPoolExecutor(1) as threads:
        for kind, data in damaged:
            path = written(tmp_path / "1.img", data)
            try:
                image_header = read_header(path, 1_000_000)
            except ImageError:
                continue
            expected = np.zeros(image_header.shape, np.uint8)
            by_thread: Future[DecodeReport] = threads.submit(decode, path, image_header, expected)
            region, by_process = desk.submit(path, image_header)
            assert _told(by_process) == _told(by_thread), kind
            if by_thread.exception() is None:
                np.testing.assert_array_equal(desk.arena.view(region, image_header.shape), expected)
            desk.arena.free(region)
            compared += 1
    assert compared > len(damaged) // 2


def _told(decoding: Future[DecodeReport]) -> DecodeReport | tuple[type[BaseException], str]:
    error = decoding.exception(PATIENCE_S)
    if error is not None:
        return type(error), str(error)
    return replace(decoding.result(), decode_s=0.0)


# Whose answer it is


def test_a_late_answer_is_never_taken_for_that_of_the_next_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names its image, and the process that it came from is replaced: it may still write."""
    repeating = Path(__file__).parents[1] / "support" / "repeating_decoder"
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{repeating}")
    desk = Desk(ProcessEngine, workers=1)
    try:
        good = written(tmp_path / "good.img", jpeg())
        broken = written(tmp_path / "broken.img", jpeg()[:200] + bytes(50))
        pids = list(desk.engine.pids)
        for _process in pids:
            desk.decoded(good)
        _region, future = desk.submit(broken, header(97, 61))
        with pytest.raises(WorkerFault, match=r"asked for .*broken\.img.* and answered .*good\.img"):
            future.result(PATIENCE_S)
        assert len(desk.engine.pids) == len(pids)
        assert pids[0] not in desk.engine.pids
        wait_until(lambda: _gone(pids[0]), PATIENCE_S)
    finally:
        desk.close()


def test_a_region_too_small_for_its_image_is_not_written(tmp_path: Path, desk: Desk) -> None:
    """What lies behind it belongs to another image."""
    path = written(tmp_path / "1.img", jpeg())
    image_header = read_header(path, 1 << 30)
    region = desk.arena.allocate(2 * image_header.pixel_bytes)
    assert region is not None
    both = desk.arena.view(region, (2, *image_header.shape))
    both[:] = 7
    small = Region(region.offset, image_header.pixel_bytes - 1)
    with pytest.raises(WorkerFault):
        desk.engine.submit(path, image_header, small).result(PATIENCE_S)
    assert (both == 7).all()
    del both
    desk.arena.free(region)


# What they are


def test_they_are_small_and_import_no_torch(tmp_path: Path, desk: Desk) -> None:
    """Also after they have decoded every kind of file: torch alone would be ten times as much."""
    paths = [
        written(tmp_path / f"{number}.img", encoded(picture(700, 431, mode=mode), name, **options))
        for number, (name, mode, options) in enumerate(FORMATS)
    ]
    for path in paths:
        for _process in range(WORKERS + 1):
            desk.decoded(path)
    for pid in desk.engine.pids:
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
        assert 1 * MB < anonymous_bytes([pid]) < 40 * MB


def test_closing_leaves_no_process_and_no_descriptor() -> None:
    """Also after deaths; the suite's leak check sees the descriptors."""
    made = Desk(ProcessEngine)
    pids = list(made.engine.pids)
    assert len(pids) == WORKERS + 1
    os.kill(pids[0], signal.SIGKILL)
    made.close()
    assert made.engine.pids == []
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_they_end_by_themselves_when_their_owner_is_killed() -> None:
    """Nobody is left to end them: the end of the socket does."""
    script = (
        "import sys\n"
        "from adc_worker.ingest.arena import Arena\n"
        "from adc_worker.ingest.decode_processes import KILLS_MAX, ProcessEngine\n"
        f"engine = ProcessEngine(Arena(1 << 20), {WORKERS}, 1 << 20)\n"
        "print(*engine.pids, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    ) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == WORKERS + 1
        assert not any(_gone(pid) for pid in pids)
        owner.kill()
        wait_until(lambda: all(_gone(pid) for pid in pids), PATIENCE_S)


# When they die


def test_a_process_killed_in_the_middle_of_many_decodes_loses_and_repeats_nothing(tmp_path: Path, desk: Desk) -> None:
    """The image it held goes to the next process, the others do not notice."""
    slow = SlowImage(tmp_path / "slow.img", seed=7)
    files = [jpeg(40, 30, seed=seed) for seed in range(12)]
    paths = [written(tmp_path / f"{number}.img", data) for number, data in enumerate(files)]
    slow_region, slow_future = desk.submit(slow.path, slow.header)
    others = [desk.submit(path, header(40, 30)) for path in paths]
    for _kill in range(3):  # by another's hand, as often as it may be
        pid = slow.decoder(desk.engine)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda killed=pid: killed not in desk.engine.pids)  # type: ignore[misc]
    slow.decoder(desk.engine)
    slow.finish()
    assert not slow_future.result(PATIENCE_S).truncated
    np.testing.assert_array_equal(desk.arena.view(slow_region, slow.header.shape), by_pillow(slow.data))
    for (region, future), data in zip(others, files, strict=True):
        future.result(PATIENCE_S)
        np.testing.assert_array_equal(desk.arena.view(region, (30, 40, 3)), by_pillow(data))
    assert len(desk.engine.pids) == WORKERS + 1


def test_when_all_of_them_are_killed_others_take_over(tmp_path: Path, desk: Desk) -> None:
    """Those at work and those that waited."""
    slow = [SlowImage(tmp_path / f"slow{seed}.img", seed) for seed in range(WORKERS)]
    submitted = [desk.submit(image.path, image.header) for image in slow]
    killed = {image.decoder(desk.engine) for image in slow} | set(desk.engine.pids)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    for image in slow:
        wait_until(lambda image=image: set(image._readers(desk.engine)) - killed, PATIENCE_S)  # type: ignore[misc]
        image.finish()
    for image, (region, future) in zip(slow, submitted, strict=True):
        future.result(PATIENCE_S)
        np.testing.assert_array_equal(desk.arena.view(region, image.header.shape), by_pillow(image.data))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_an_image_that_crashes_two_decoders_is_unreadable(tmp_path: Path, desk: Desk, number: signal.Signals) -> None:
    """Its error names the signal, and the engine goes on."""
    slow = SlowImage(tmp_path / "slow.img")
    _region, future = desk.submit(slow.path, slow.header)
    for _strike in range(2):
        pid = slow.decoder(desk.engine)
        os.kill(pid, number)
        wait_until(lambda crashed=pid: crashed not in desk.engine.pids)  # type: ignore[misc]
    with pytest.raises(ImageUnreadable, match=rf"crashed the decoder 2 times \({number.name}\)"):
        future.result(PATIENCE_S)
    slow.finish()
    data = jpeg()
    np.testing.assert_array_equal(desk.decoded(written(tmp_path / "1.img", data))[0], by_pillow(data))
    assert len(desk.engine.pids) == WORKERS + 1


def test_one_crash_and_a_kill_from_outside_are_no_evidence(tmp_path: Path, desk: Desk) -> None:
    """A single crash may be this machine's memory; a kill says nothing about the image at all."""
    slow = SlowImage(tmp_path / "slow.img")
    _region, future = desk.submit(slow.path, slow.header)
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL):
        pid = slow.decoder(desk.engine)
        os.kill(pid, number)
        wait_until(lambda ended=pid: ended not in desk.engine.pids)  # type: ignore[misc]
    slow.decoder(desk.engine)
    slow.finish()
    assert not future.result(PATIENCE_S).truncated


def test_what_kills_them_again_and_again_is_this_machines_fault(tmp_path: Path, desk: Desk) -> None:
    """Never an endless loop at one image, and never its error."""
    slow = SlowImage(tmp_path / "slow.img")
    _region, future = desk.submit(slow.path, slow.header)
    for _kill in range(KILLS_MAX):
        pid = slow.decoder(desk.engine)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda killed=pid: killed not in desk.engine.pids)  # type: ignore[misc]
    with pytest.raises(WorkerFault, match=f"killed {KILLS_MAX} times at one image"):
        future.result(PATIENCE_S)
    slow.finish()


def test_signals_of_the_workers_group_do_not_end_them(tmp_path: Path, desk: Desk) -> None:
    """Ctrl-C reaches every process of a terminal; the worker itself decides what is still decoded."""
    slow = SlowImage(tmp_path / "slow.img")
    _region, future = desk.submit(slow.path, slow.header)
    pid = slow.decoder(desk.engine)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    slow.finish()
    assert not future.result(PATIENCE_S).truncated
    assert pid in desk.engine.pids


@pytest.mark.parametrize("seed", [1, 2])
def test_a_job_comes_out_complete_while_its_decoders_are_killed(tmp_path: Path, seed: int) -> None:
    """Through the DataLoader: every image once and whole, whichever processes die meanwhile."""
    chance = random.Random(seed)  # noqa: S311 (no secret)
    files = [jpeg(60, 40, seed=number) for number in range(40)]
    source = StagedQueue()
    for number, data in enumerate(files):
        path = written(tmp_path / f"{number}.img", data)
        source.put(staged(number, path, read_header(path, 1 << 20), staged_at=1.0 + number))
    source.end()
    failures: list[tuple[int, str]] = []

    def on_failure(image: StagedImage, error: ImageError) -> None:
        failures.append((image.id, str(error)))

    plan = ingest_plan(decode_engine="processes", decode_workers=2, batch_size=3)
    seen: list[int] = []
    kills = 0
    with closing(build_dataloader(plan, source, on_failure)) as loader:
        for batch in loader:
            with batch:
                for row, image in zip(batch.images, batch.staged, strict=True):
                    np.testing.assert_array_equal(row.numpy(), by_pillow(files[image.id]))
                    seen.append(image.id)
                del row
            if chance.random() < 0.5:
                with suppress(ProcessLookupError):  # it may have been found dead, and replaced, just now
                    os.kill(chance.choice(loader.feeder.decode_pids), signal.SIGKILL)
                    kills += 1
    assert sorted(seen) == list(range(len(files)))
    assert failures == []
    assert kills > 2
