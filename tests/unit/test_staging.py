"""The staging folder: private, one file per task, whole files only; reused, swept, and not trusted blindly."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from adc_worker.errors import (
    ConfigurationError,
    ImageRefused,
    ImageTooLarge,
    ImageUnreadable,
    LinkError,
    NotAnImage,
    StagingFull,
)
from adc_worker.ingest.disk_budget import PAUSE_S
from adc_worker.ingest.download import DownloadStats, ImageClient
from adc_worker.ingest.staging import StagingArea
from tests.support.images import encoded, jpeg, picture, task, written

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PIXELS = 1_000_000


class FakeClient(ImageClient):
    """Writes what it was given, or raises it; looks at the folder while the file is partial."""

    def __init__(self, folder: Path, *answers: bytes | BaseException) -> None:
        self.answers = list(answers)
        self.tells_end = True
        self.urls: list[str] = []
        self.names_meanwhile: list[str] = []
        self._folder = folder

    def download(self, url: str, fd: int, cancelled: Callable[[], bool]) -> DownloadStats:
        assert not cancelled()
        self.urls.append(url)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            os.write(fd, b"half of it")
            raise answer
        os.write(fd, answer)
        self.names_meanwhile = _names(self._folder)
        return DownloadStats(0.1, 0.2, len(answer), end_told=self.tells_end)


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def _file(folder: Path, number: int = 7, **changes: str) -> Path:
    """Return where a task's image is staged, as an area that stages it says."""
    with tempfile.TemporaryDirectory() as elsewhere:
        area = StagingArea(Path(elsewhere), FakeClient(Path(elsewhere), jpeg()), MAX_PIXELS)
        image = area.stage(number, task(number).model_copy(update=changes), lambda: False)
    return folder / image.path.name


def _stage(folder: Path, client: FakeClient, number: int = 7, max_pixels: int = MAX_PIXELS) -> Any:
    return StagingArea(folder, client, max_pixels).stage(number, task(number), lambda: False)


def test_an_image_is_staged_under_its_tasks_number(tmp_path: Path) -> None:
    """With its header, its task, and what the download took."""
    data = jpeg(30, 20)
    client = FakeClient(tmp_path, data)
    image = _stage(tmp_path, client)
    assert image.path.parent == tmp_path
    assert image.path.name.startswith("7-")
    assert image.path.read_bytes() == data
    assert (image.id, image.task, image.header.shape) == (7, task(7), (20, 30, 3))
    assert image.download == DownloadStats(0.1, 0.2, len(data))
    assert client.urls == [task(7).image_url]


def test_two_owners_of_one_folder_never_see_each_others_files(tmp_path: Path) -> None:
    """Both journals begin with task 1: one worker's image must not become the other's result, nor be swept away."""
    large, small = (
        StagingArea(tmp_path, FakeClient(tmp_path, jpeg(*size)), MAX_PIXELS, owner=f"journal-{size[0]}")
        for size in ((30, 20), (10, 10))
    )
    first = large.stage(1, task(1), lambda: False)
    assert small.sweep(set) == 0
    assert small.stage(1, task(1), lambda: False).header.shape == (10, 10, 3)
    assert first.path.exists()


def _silent_client(folder: Path, *answers: bytes) -> FakeClient:
    """Return the client of a host that does not say how long its images are."""
    client = FakeClient(folder, *answers)
    client.tells_end = False
    return client


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_an_image_that_may_have_been_cut_off_on_the_way_is_asked_for_once_more(tmp_path: Path, kind: str) -> None:
    """What is decoded as far as it goes must be what is stored, and not what came of it."""
    data = encoded(picture(60, 40), kind)
    client = _silent_client(tmp_path, data[:-70], data)
    if kind == "JPEG":  # the second time it is seen to be whole
        assert _stage(tmp_path, client).path.read_bytes() == data
    else:
        with pytest.raises(LinkError, match="ended after"):
            _stage(tmp_path, client)
        assert _names(tmp_path) == []


def test_an_image_that_is_stored_without_its_end_is_taken_when_it_ends_there_twice(tmp_path: Path) -> None:
    """Cameras run out of power; what came before is a picture."""
    data = jpeg(60, 40)[:-70]
    client = _silent_client(tmp_path, data, data)
    assert _stage(tmp_path, client).path.read_bytes() == data
    assert len(client.urls) == 2


def test_a_jpeg_that_has_its_end_is_asked_for_once(tmp_path: Path) -> None:
    """Whether or not its host says how long it is."""
    client = _silent_client(tmp_path, jpeg(60, 40))
    _stage(tmp_path, client)
    assert len(client.urls) == 1


def test_a_partial_file_never_has_the_name_of_a_whole_one(tmp_path: Path) -> None:
    """It is written under another name and renamed."""
    client = FakeClient(tmp_path, jpeg())
    _stage(tmp_path, client)
    (partial,) = client.names_meanwhile
    assert partial.startswith(_file(tmp_path).stem)
    assert partial.endswith(".part")
    assert _names(tmp_path) == [_file(tmp_path).name]


def test_folder_and_files_are_private(tmp_path: Path) -> None:
    """Whatever folder was there before keeps the mode that the operator gave it; the files in it are ours."""
    folder = tmp_path / "deep" / "staging"
    path = _stage(folder, FakeClient(folder, jpeg())).path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    path = _stage(folder, FakeClient(folder, jpeg())).path
    assert folder.stat().st_mode & 0o777 == 0o755
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_anybody_may_write_to_is_refused(tmp_path: Path) -> None:
    """Somebody else's file there would be taken for a downloaded image; /tmp is such a folder."""
    tmp_path.chmod(0o1777)
    with pytest.raises(ConfigurationError, match="AMI_STAGING_PATH: anybody may write to"):
        StagingArea(tmp_path, FakeClient(tmp_path), MAX_PIXELS)


@pytest.mark.parametrize(
    "image_id", ["../../etc/cron.d/x", "/etc/passwd", "a\0b", "x" * 10_000, "..", "CON", "\N{BUG}"]
)
def test_an_image_id_names_no_file(tmp_path: Path, image_id: str) -> None:
    """Files are named by numbers of the journal's own, and by digests."""
    area = StagingArea(tmp_path, FakeClient(tmp_path, jpeg()), MAX_PIXELS)
    image = area.stage(7, task().model_copy(update={"image_id": image_id}), lambda: False)
    assert image.path.parent == tmp_path
    assert re.fullmatch(r"7-[0-9a-f]+\.img", image.path.name)
    assert _names(tmp_path) == [image.path.name]


@pytest.mark.parametrize("error", [LinkError("broke off"), OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_download_that_fails_leaves_no_file(tmp_path: Path, error: BaseException) -> None:
    """Whatever the reason; the error is passed on."""
    with pytest.raises(type(error)):
        _stage(tmp_path, FakeClient(tmp_path, error))
    assert _names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_as_such_and_leaves_neither_file_nor_charge(tmp_path: Path, number: int) -> None:
    """No fault of the image's: a pause is on, and after it the same task is staged."""
    now = [100.0]
    client = FakeClient(tmp_path, OSError(number, "No space left on device"), jpeg())
    area = StagingArea(tmp_path, client, MAX_PIXELS, now=lambda: now[0])
    with pytest.raises(StagingFull):
        area.stage(7, task(7), lambda: False)
    assert _names(tmp_path) == []
    assert area.disk.used_bytes == 0
    assert not area.disk.has_room()
    now[0] += PAUSE_S
    assert area.disk.has_room()
    assert area.stage(7, task(7), lambda: False).path.exists()


def test_the_disk_is_charged_for_a_file_as_long_as_it_is_there(tmp_path: Path) -> None:
    """Downloaded or found there, until it is discarded; what failed is not charged."""
    data = jpeg()
    written(_file(tmp_path, 8), data)
    area = StagingArea(tmp_path, FakeClient(tmp_path, data, b"", LinkError("broke off")), MAX_PIXELS)
    area.stage(7, task(7), lambda: False)
    area.stage(8, task(8), lambda: False)
    for failing in (9, 10):
        with pytest.raises((ImageUnreadable, LinkError)):
            area.stage(failing, task(failing), lambda: False)
    assert area.disk.used_bytes == 2 * len(data)
    area.discard(7)
    area.discard(7)  # a task's end may be told twice
    assert _names(tmp_path) == [_file(tmp_path, 8).name]
    assert area.disk.used_bytes == len(data)


def test_a_staged_file_is_used_without_a_request(tmp_path: Path) -> None:
    """A restart downloads nothing twice."""
    data = jpeg()
    written(_file(tmp_path), data)
    image = _stage(tmp_path, FakeClient(tmp_path))
    assert image.download == DownloadStats(0.0, 0.0, len(data))


@pytest.mark.parametrize("leftover", [b"", bytes(5000)])
def test_a_staged_file_that_a_power_cut_emptied_is_downloaded_again(tmp_path: Path, leftover: bytes) -> None:
    """The image is not blamed for what happened to this disk."""
    written(_file(tmp_path), leftover)
    data = jpeg()
    assert _stage(tmp_path, FakeClient(tmp_path, data)).path.read_bytes() == data


def test_a_partial_file_of_an_earlier_run_is_removed(tmp_path: Path) -> None:
    """None of its bytes remain."""
    written(_file(tmp_path).with_suffix(".0123456789abcdef.part"), bytes(1_000_000))
    data = jpeg()
    image = _stage(tmp_path, FakeClient(tmp_path, data))
    assert image.path.read_bytes() == data
    assert _names(tmp_path) == [image.path.name]


def test_two_that_stage_one_image_at_once_never_write_into_one_file(tmp_path: Path) -> None:
    """A whole file would hold what the other one has not written yet. Copied journals may meet in one folder."""
    partials: set[str] = set()
    for folder in (tmp_path / "first", tmp_path / "second"):
        client = FakeClient(folder, jpeg())
        _stage(folder, client)
        partials.update(client.names_meanwhile)
    assert len(partials) == 2


@pytest.mark.parametrize(
    ("data", "max_pixels", "error"),
    [(b"<html>", MAX_PIXELS, ImageUnreadable), (b"", MAX_PIXELS, ImageUnreadable), (jpeg(20, 10), 199, ImageTooLarge)],
)
def test_a_file_that_cannot_be_used_is_removed(
    tmp_path: Path, data: bytes, max_pixels: int, error: type[Exception]
) -> None:
    """Its task ends with that error."""
    with pytest.raises(error):
        _stage(tmp_path, FakeClient(tmp_path, data), max_pixels=max_pixels)
    assert _names(tmp_path) == []


def test_sweeping_keeps_what_the_journal_knows(tmp_path: Path) -> None:
    """And what is not the staging area's own."""
    names = [_file(tmp_path, number).name for number in (1, 2)]
    strangers = ["notes.txt", "x.img", "2-x.img", "\N{SUPERSCRIPT TWO}.img"]
    for name in (*names, names[1].replace(".img", ".0123456789abcdef.part"), *strangers):
        written(tmp_path / name, b"x")
    assert StagingArea(tmp_path, FakeClient(tmp_path), MAX_PIXELS).sweep(lambda: {1}) == 2
    assert _names(tmp_path) == sorted([names[0], *strangers])


@pytest.mark.parametrize("other", [{"image_id": "8"}, {"image_url": "https://images.example.org/8.jpg"}])
def test_a_file_of_another_image_is_never_taken_for_a_tasks_own(tmp_path: Path, other: dict[str, str]) -> None:
    """Numbers come again where a journal is put back from a backup: the file is that of whoever had the number."""
    written(_file(tmp_path, 7, **other), jpeg(30, 20))
    image = _stage(tmp_path, FakeClient(tmp_path, jpeg(10, 10)))
    assert image.header.shape == (10, 10, 3)
    assert _names(tmp_path) == [image.path.name]


def test_a_new_signature_of_its_url_does_not_make_it_another_image(tmp_path: Path) -> None:
    """Nor does the loss of the signature: what opens a URL is erased once its image is staged."""
    signed = _file(tmp_path, 7, image_url=f"{task(7).image_url}?X-Signature=first")
    assert signed == _file(tmp_path, 7, image_url=f"{task(7).image_url}?X-Signature=second")
    assert signed == _file(tmp_path)


def _old(path: Path) -> Path:
    """Write a file that has not changed for a month."""
    written(path, jpeg(30, 20))
    os.utime(path, (time.time() - 30 * 86_400,) * 2)
    return path


def test_a_file_named_by_its_number_alone_is_never_read(tmp_path: Path) -> None:
    """An earlier version left it, in a folder that others may have shared; it is swept once nobody can want it."""
    written(tmp_path / "7.img", jpeg(30, 20))
    _old(tmp_path / "8.img")
    client = FakeClient(tmp_path, jpeg(10, 10))
    area = StagingArea(tmp_path, client, MAX_PIXELS, owner="journal-1")
    assert area.stage(7, task(7), lambda: False).header.shape == (10, 10, 3)
    assert area.sweep(lambda: {7, 8}) == 1
    assert _names(tmp_path) == ["7.img", "journal-1"]


def test_files_that_are_known_to_be_ones_own_are_adopted_from_an_earlier_version(tmp_path: Path) -> None:
    """Their URLs open no more, so nothing else would bring them back; those of other tasks stay where they are."""
    for number in (7, 8):
        written(tmp_path / f"{number}.img", jpeg(30, 20))
    area = StagingArea(tmp_path, FakeClient(tmp_path), MAX_PIXELS, owner="journal-1")
    assert area.adopt(tmp_path, {7: task(7), 9: task(9)}) == 1
    assert area.stage(7, task(7), lambda: False, url_erased=True).header.shape == (20, 30, 3)
    assert _names(tmp_path) == ["8.img", "journal-1"]


def test_what_a_journal_that_is_gone_has_staged_is_swept_after_days(tmp_path: Path) -> None:
    """Or the disk would fill up; what another journal staged of late is left alone."""
    gone, alive = (tmp_path / f"journal-{name}" for name in ("gone", "alive"))
    for folder in (gone, alive):
        folder.mkdir()
        _old(_file(folder))
        _old(folder / "3.img")
    os.utime(gone, (time.time() - 30 * 86_400,) * 2)
    area = StagingArea(tmp_path, FakeClient(tmp_path), MAX_PIXELS, owner="journal-1")
    assert area.sweep(set) == 2
    assert (_names(gone), len(_names(alive))) == ([], 2)


def test_sweeping_does_not_touch_what_appears_meanwhile(tmp_path: Path) -> None:
    """A task recorded after the question was asked keeps its file."""

    def known() -> set[int]:
        written(_file(tmp_path, 9), b"x")
        return set()

    assert StagingArea(tmp_path, FakeClient(tmp_path), MAX_PIXELS).sweep(known) == 0
    assert _names(tmp_path) == [_file(tmp_path, 9).name]


@pytest.mark.parametrize("below", ["", "below"])
def test_a_folder_that_cannot_be_used_is_a_matter_of_configuration(tmp_path: Path, below: str) -> None:
    """The message names the variable and the folder."""
    file = written(tmp_path / "file", b"")
    with pytest.raises(ConfigurationError, match=rf"AMI_STAGING_PATH .*cannot use {file / below}: \w"):
        StagingArea(file / below, FakeClient(tmp_path), MAX_PIXELS)


PAGES = [
    b"<html>Sign in</html>", b"\xef\xbb\xbf\r\n <!DOCTYPE html>", b'<?xml version="1.0"?><Error/>', b'{"error": 1}',
    b"Please log in", "Bitte melden Sie sich an: gr\u00fcn".encode(), b"\x1f\x8b\x08" + bytes(30),
    b"\x28\xb5\x2f\xfd" + bytes(30),
]  # fmt: skip


@pytest.mark.parametrize("data", PAGES)
def test_a_page_in_an_images_place_is_known_as_such(tmp_path: Path, data: bytes) -> None:
    """It proves nothing about the image: hosts and portals send it for any."""
    with pytest.raises(NotAnImage):
        _stage(tmp_path, FakeClient(tmp_path, data))


@pytest.mark.parametrize("data", [b"", jpeg()[:300], b"\xff\xd8\xff\xe0" + bytes(500), b"\x00\x00\x00\x18ftypheic" * 9])
def test_what_a_camera_may_have_written_is_no_page(tmp_path: Path, data: bytes) -> None:
    """Empty, cut or of another format: that is in the image."""
    with pytest.raises(ImageUnreadable) as caught:
        _stage(tmp_path, FakeClient(tmp_path, data))
    assert not isinstance(caught.value, NotAnImage)


def test_sweeping_gives_back_the_room_of_what_it_removes(tmp_path: Path) -> None:
    """A job that was restarted leaves files that no task needs."""
    area = StagingArea(tmp_path, FakeClient(tmp_path, jpeg()), MAX_PIXELS)
    area.stage(7, task(7), lambda: False)
    assert area.disk.used_bytes > 0
    assert area.sweep(set) == 1
    assert area.disk.used_bytes == 0


def test_only_ones_own_files_are_discarded_when_the_journal_forgot_their_tasks(tmp_path: Path) -> None:
    """Two workers of one journal share a folder: the other one may be decoding its file."""
    ours, theirs = (StagingArea(tmp_path, FakeClient(tmp_path, *[jpeg()] * 2), MAX_PIXELS) for _ in range(2))
    for number in (7, 8):
        ours.stage(number, task(number), lambda: False)
    other = theirs.stage(9, task(9), lambda: False)
    assert ours.discard_forgotten(lambda: {8}) == 1
    assert _names(tmp_path) == sorted([_file(tmp_path, 8).name, other.path.name])
    assert ours.discard_forgotten(set) == 1
    assert ours.disk.used_bytes == 0


def test_workers_that_sweep_at_the_same_time_do_not_end_each_other(tmp_path: Path) -> None:
    """A file that one of them has listed is removed by another before it is looked at."""
    for number in range(200):
        _old(tmp_path / f"{number}.img")
    areas = [StagingArea(tmp_path, FakeClient(tmp_path), MAX_PIXELS, owner=f"journal-{name}") for name in "abcd"]
    with ThreadPoolExecutor(len(areas)) as threads:
        swept = list(threads.map(lambda area: area.sweep(set), areas))
    assert sum(swept) >= 200
    assert not list(tmp_path.glob("*.img"))


def test_whether_an_image_still_comes_is_seen_without_keeping_it(tmp_path: Path) -> None:
    """Whatever comes or is raised, no file is left, and none was ever named as a task's."""
    answers = (jpeg(), b"<html>", ImageRefused("403"), LinkError("reset"), OSError(errno.ENOSPC, "full"))
    client = FakeClient(tmp_path, *answers)
    area = StagingArea(tmp_path, client, MAX_PIXELS)
    seen = [area.serves(7, "https://images.test/a.jpg", lambda: False) for _answer in answers[:3]]
    assert seen == [True, False, False]
    for error in (LinkError, OSError):
        with pytest.raises(error):
            area.serves(7, "https://images.test/a.jpg", lambda: False)
    (partial,) = client.names_meanwhile
    assert partial.endswith(".part")
    assert _names(tmp_path) == []
    assert area.disk.used_bytes == 0
