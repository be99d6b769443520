"""The probe: two images, each decoded and inferred once, whatever the first ones are like."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adc_worker.antenna.client import CAPTURE_PAGES, CAPTURES_PER_PAGE, AntennaClient
from adc_worker.antenna.wire import Capture
from adc_worker.errors import DeviceMemoryShort, ImageError, ImageTooLarge, StagedFileLost
from adc_worker.host.budget import HostBudget
from adc_worker.ingest.header import read_header
from adc_worker.ingest.staging import StagedImage, StagedQueue
from adc_worker.models.pipeline import Pipeline
from adc_worker.models.registry import Simulated
from adc_worker.planning.measurements import ImageProbe, ProbeReport, Sighting
from adc_worker.runtime.outcomes import ImageResult
from adc_worker.runtime.probe import MemoryWait, known_sizes, listed, probe
from adc_worker.runtime.signs_of_life import SignsOfLife
from tests.support.fakes import GB, MB, host, image_probe
from tests.support.images import bare_jpeg_header, header, jpeg, staged, written


class Sink:
    """Remembers which images came to a result and which to an error."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.failed: list[int] = []
        self.lost: list[int] = []

    def begin(self, images: Sequence[StagedImage], *, alone: bool = False) -> None:
        assert alone
        self.begun = [image.id for image in images]

    def succeed(self, results: Sequence[ImageResult]) -> None:
        self.done += [result.task_id for result in results]

    def fail_staged(self, image: StagedImage, error: ImageError) -> None:
        del error
        self.failed.append(image.id)

    def leave_staged(self, image: StagedImage, error: DeviceMemoryShort | StagedFileLost) -> None:
        assert isinstance(error, StagedFileLost), "no GPU is short of memory here"
        self.lost.append(image.id)


class Probed:
    """What a probe of these files does."""

    def __init__(
        self, folder: Path, files: Sequence[bytes], sizes: Sequence[Sighting] = (), removed: Sequence[int] = ()
    ) -> None:
        self.queue, self.sink = StagedQueue(), Sink()
        for number, data in enumerate(files):
            path = written(folder / f"{number}.img", data)
            self.queue.put(staged(number, path, read_header(path, 1 << 40)))
        self.queue.end()
        for number in removed:
            (folder / f"{number}.img").unlink()
        pipeline = Pipeline("simulated", Simulated(0.0), torch.device("cpu"))
        self.report = probe(self.queue, pipeline, host, self.sink, SignsOfLife(), 60.0, lambda: True, lambda: sizes)

    @property
    def measured(self) -> ProbeReport:
        assert self.report is not None
        return self.report


def test_two_images_are_measured_and_the_rest_waits(tmp_path: Path) -> None:
    """The first one, and the largest of the others; nothing is decoded or inferred twice; what waits tells its size."""
    probed = Probed(tmp_path, [jpeg(), jpeg(), jpeg(200, 150), jpeg(40, 30)])
    assert (probed.sink.done, probed.sink.failed) == ([0, 2], [])
    assert [image.id for image in probed.queue.images] == [1, 3]
    assert probed.measured.tensor_bytes_per_image == 3 * 200 * 150
    assert (len(probed.measured.images), len(probed.measured.sighted)) == (2, 2)


def test_an_image_that_fails_or_fits_nowhere_is_replaced(tmp_path: Path) -> None:
    """Both become errors, and the plan comes from two that are good."""
    broken, huge = bare_jpeg_header(97, 61), bare_jpeg_header(60_000, 60_000)
    probed = Probed(tmp_path, [broken, huge, jpeg(), jpeg()])
    assert probed.sink.failed == [0, 1]
    assert probed.sink.done == [2, 3]
    assert probed.measured.tensor_bytes_per_image == 3 * 97 * 61


def test_an_image_whose_file_is_gone_is_replaced_and_has_no_error(tmp_path: Path) -> None:
    """Another worker of the journal removed it: it is downloaded again."""
    probed = Probed(tmp_path, [jpeg(), jpeg(), jpeg()], removed=[0])
    assert (probed.sink.done, probed.sink.failed, probed.sink.lost) == ([1, 2], [], [0])


USUAL = image_probe(width_px=400, height_px=300)


@pytest.mark.parametrize(
    ("images", "listed", "uncertain"),
    [
        ([USUAL, USUAL], [], False),
        ([USUAL], [], True),
        ([USUAL], [Sighting(400, 300)], True),  # a size tells nothing about a warm-up
        ([USUAL, image_probe(width_px=40, height_px=30)], [], True),
        ([USUAL, image_probe(width_px=40, height_px=30)], [Sighting(400, 300)], False),
        ([USUAL, USUAL], [Sighting(4000, 3000)], True),
        ([replace(USUAL, inference_s=9.0), USUAL], [], False),  # a first call pays for a model's set-up
        ([USUAL, replace(USUAL, inference_s=9.0)], [], True),
        ([replace(USUAL, download_s=0.0)] * 2, [], True),
    ],
)
def test_images_that_may_not_stand_for_their_job_are_little_evidence(
    images: list[ImageProbe], listed: list[Sighting], uncertain: bool
) -> None:
    """One alone, two sizes, a size far beyond the measured ones, a pace of one image, no download."""
    assert ProbeReport.of(ProbeReport(tuple(images), 0, 0), [], listed).uncertain is uncertain


def test_a_job_without_images_has_no_report(tmp_path: Path) -> None:
    """Nothing is guessed."""
    assert Probed(tmp_path, []).report is None
    assert Probed(tmp_path, [bare_jpeg_header(97, 61)]).report is None


def test_a_job_that_was_downloaded_before_is_measured_all_the_same(tmp_path: Path) -> None:
    """After a crash nothing tells about the link, and the rates are still numbers."""
    measured = Probed(tmp_path, [jpeg(), jpeg()]).measured
    assert all(image.download_s == 0 for image in measured.images)
    assert measured.download_inference_ratio == 1.0


def captures(request: httpx.Request) -> httpx.Response:
    if request.url.path.endswith("/jobs/7/"):
        job = {"id": 7, "status": "STARTED", "project": {"id": 3}, "source_image_collection": {"id": 5}}
        return httpx.Response(200, json=job)
    query = request.url.params
    assert (query["project_id"], query["collections"]) == ("3", "5")
    first = int(query["offset"])
    rows = [{"id": number, "url": f"http://x/{number}.jpg", "width": 10 + number, "height": 10, "size": None}
            for number in range(first, first + int(query["limit"]))]  # fmt: skip
    return httpx.Response(200, json={"count": 4000, "results": [*rows, {"id": "no url"}]})


def test_sizes_are_listed_from_all_over_a_collection() -> None:
    """Neighbours are of one camera; a malformed row is skipped."""
    with AntennaClient("http://antenna.test", "t", transport=httpx.MockTransport(captures)) as client:
        found = listed(client, 7)
    assert len(found) == CAPTURE_PAGES * CAPTURES_PER_PAGE
    assert {int(one.id) // 1000 for one in found} == {0, 1, 2, 3}
    widths = [one.width_px for one in known_sizes(found)]
    assert widths[0] < 30
    assert widths[-1] > 3000


@pytest.mark.parametrize("answer", [httpx.Response(500), httpx.Response(200, json={"id": 7, "status": "STARTED"})])
def test_a_list_that_cannot_be_had_is_done_without(answer: httpx.Response) -> None:
    """An error of Antenna's, or a job without a collection."""
    with AntennaClient("http://antenna.test", "t", transport=httpx.MockTransport(lambda _request: answer)) as client:
        assert listed(client, 7) == []


def test_captures_of_unknown_size_tell_nothing() -> None:
    """Width and height may be null."""
    assert known_sizes([Capture(id="1", url="http://x"), Capture(id="2", url="http://x", width=5)]) == []


LARGE = staged(1, Path("large.jpg"), header(8000, 6000))  # 144 MB decoded, and 20 MB for its decoder


def test_an_image_waits_until_the_others_have_made_room() -> None:
    """However often that has to be looked at."""
    left, turns = deque([10, 20, 140, 1000]), deque([True] * 3)
    assert MemoryWait(lambda: host(available_bytes=left.popleft() * MB), turns.popleft).for_image(LARGE)
    assert (len(left), len(turns)) == (0, 0)


def test_the_wait_ends_with_the_turn() -> None:
    """The image is taken up again when it is the job's turn again."""
    turns = deque([True, True, False])
    assert not MemoryWait(lambda: host(available_bytes=10 * MB), turns.popleft).for_image(LARGE)
    assert not turns


def test_what_never_fits_is_not_waited_for() -> None:
    """An image that exceeds the worker's limit less what it uses itself, whoever else holds what."""
    machine = host(limit_bytes=1 * GB + 100 * MB, available_bytes=100 * MB)
    with pytest.raises(ImageTooLarge, match="this worker has 100000000"):
        MemoryWait(lambda: machine, lambda: True).for_image(LARGE)


def test_an_image_is_not_too_large_for_what_this_worker_uses_for_a_moment() -> None:
    """Results that wait for the disk, or images staged in memory: it uses less a second later."""
    used = deque([1000 * MB, 1000 * MB, 200 * MB])

    def measure() -> HostBudget:
        return replace(host(limit_bytes=1100 * MB), used_bytes=used[0], available_bytes=1100 * MB - used.popleft())

    assert MemoryWait(measure, lambda: True).for_image(LARGE)


@given(
    limit=st.integers(300 * MB, 64 * GB),
    used=st.integers(0, 100 * MB),
    siblings=st.integers(0, 64 * GB),
    reserve=st.integers(0, 7 * GB),
    busy=st.integers(0, 4),
)
def test_no_state_of_the_host_makes_an_error_of_an_image_that_the_limit_holds(
    limit: int, used: int, siblings: int, reserve: int, busy: int
) -> None:
    """Other workers' claims, their number, and what is kept for other programs pass: the image waits for its turn."""
    machine = HostBudget(
        limit_bytes=max(1, (limit - siblings) // (1 + busy)),
        limit_source="MemTotal",
        available_bytes=max(0, limit - used - siblings - reserve),
        used_bytes=used,
        cores=1,
        staging_bytes=1,
        descriptors=1024,
        reserve_bytes=max(0, min(reserve, limit - used - siblings)),
        hard_limit_bytes=limit,
        claimed_bytes=siblings,
    )
    looks = deque([True] * 20 + [False])
    fits_now = _needed(LARGE) <= machine.alone_bytes
    assert MemoryWait(lambda: machine, looks.popleft).for_image(LARGE) is fits_now


def _needed(image: StagedImage) -> int:
    return image.header.pixel_bytes + image.header.scratch_bytes
