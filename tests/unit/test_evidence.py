"""What counts for and against a host: different images since it last served one."""

from __future__ import annotations

import pytest

from adc_worker.errors import HostUnreachable, ImageMissing, ImageRefused, ImageUnreadable, LinkError, NotAnImage
from adc_worker.runtime.evidence import Evidence
from adc_worker.runtime.verdicts import Failure, Seen, download_failure

HOST = "images.test"
PAGE = download_failure(NotAnImage("a page of 5 bytes"))
BUSY = download_failure(LinkError("503"))
GONE = download_failure(ImageMissing("404"))
REFUSED = download_failure(ImageRefused("403"))
NOBODY = download_failure(HostUnreachable("no route"))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def evidence(clock: Clock) -> Evidence:
    return Evidence(clock)


def fail(evidence: Evidence, *failures: Failure, host: str = HOST) -> Seen:
    """Let as many different images fail, and return what is known then."""
    for number, failure in enumerate(failures):
        seen = evidence.failed(host, str(number), failure)
    return seen


def test_different_images_that_fail_are_counted_whatever_the_words(evidence: Evidence) -> None:
    """A sign-in page and a 503 by turns are one fault of one host."""
    assert not fail(evidence, PAGE, BUSY, PAGE, BUSY).host_at_fault
    assert evidence.may_try(HOST) is None
    assert fail(evidence, PAGE, BUSY, PAGE, BUSY, GONE).host_at_fault
    assert evidence.may_try(HOST) is GONE
    assert evidence.may_try("other.test") is None


@pytest.mark.parametrize("failure", [PAGE, BUSY, GONE, REFUSED])
def test_attempts_of_one_image_never_count_against_its_host(evidence: Evidence, failure: Failure) -> None:
    """However many, in whatever words."""
    for _attempt in range(50):
        seen = evidence.failed(HOST, "one", failure)
    assert (seen.tries, seen.images_failing, seen.host_at_fault) == (50, 1, False)
    assert evidence.may_try(HOST) is None


def test_attempts_that_nobody_answered_count_whatever_the_image(evidence: Evidence) -> None:
    """They never came so far as to name one; any answer ends the count."""
    assert not evidence.failed(HOST, "one", NOBODY).host_at_fault
    evidence.failed(HOST, "one", NOBODY)
    evidence.failed(HOST, "one", BUSY)
    evidence.failed(HOST, "one", NOBODY)
    assert not evidence.failed(HOST, "one", NOBODY).host_at_fault
    assert evidence.failed(HOST, "one", NOBODY).host_at_fault


def test_one_image_that_comes_is_heard_whatever_failed_between(evidence: Evidence) -> None:
    """The host is well, and the count begins anew."""
    fail(evidence, PAGE, BUSY, GONE, REFUSED)
    evidence.came(HOST, "good")
    assert fail(evidence, PAGE).images_failing == 1
    fail(evidence, PAGE, BUSY, GONE, REFUSED, PAGE)
    assert evidence.may_try(HOST) is not None
    evidence.came(HOST, "another")
    assert evidence.may_try(HOST) is None


def test_what_others_show_is_counted_from_an_images_first_failure(evidence: Evidence, clock: Clock) -> None:
    """Those that came before it show nothing: the host may have gone bad since."""
    evidence.came(HOST, "before")
    evidence.failed(HOST, "bad", PAGE)
    for number in range(3):
        evidence.came(HOST, f"good {number}")
    clock.now_s += 4.0
    seen = evidence.failed(HOST, "bad", PAGE)
    assert (seen.tries, seen.others_served, seen.failing_s) == (2, 3, 4.0)


def test_an_image_that_comes_again_and_again_shows_no_more_than_once(evidence: Evidence) -> None:
    """Three of a host show that it is well, and not one that is asked for three times."""
    evidence.came(HOST, "only", "https://images.test/only.jpg")
    evidence.failed(HOST, "bad", REFUSED)
    for _attempt in range(5):
        evidence.came(HOST, "only", "https://images.test/only.jpg")
    assert evidence.failed(HOST, "bad", REFUSED).others_served == 1
    evidence.came(HOST, "second")
    evidence.came(HOST, "only")
    evidence.came(HOST, "third")
    assert evidence.failed(HOST, "bad", REFUSED).others_served == 3


@pytest.mark.parametrize(("failure", "recovered"), [(PAGE, True), (GONE, True), (REFUSED, True), (BUSY, False)])
def test_a_host_that_takes_an_answer_back_is_remembered(
    evidence: Evidence, clock: Clock, failure: Failure, *, recovered: bool
) -> None:
    """An image that it served after it had answered otherwise; a failure that names no image is none."""
    evidence.failed(HOST, "late", failure)
    evidence.came(HOST, "late")
    clock.now_s += 3.0
    assert (evidence.failed(HOST, "bad", PAGE).recovered_s == 3.0) is recovered


def test_a_host_at_fault_is_tried_with_one_image_at_a_time_and_ever_less_often(
    evidence: Evidence, clock: Clock
) -> None:
    """After 1, 2, 4 and at most 30 seconds."""
    fail(evidence, PAGE, PAGE, PAGE, PAGE, PAGE)
    pauses = []
    for number in range(8):
        begun = clock.now_s
        while evidence.may_try(HOST) is not None:
            clock.now_s += 0.5
        pauses.append(clock.now_s - begun)
        assert evidence.may_try(HOST) is not None, "and no other beside it"
        evidence.failed(HOST, f"trial {number}", BUSY)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_a_trial_that_is_broken_off_is_followed_by_another(evidence: Evidence, clock: Clock) -> None:
    """A turn may end in the middle of it."""
    fail(evidence, PAGE, PAGE, PAGE, PAGE, PAGE)
    clock.now_s = evidence.trial_at(HOST)
    assert evidence.may_try(HOST) is None
    clock.now_s = evidence.trial_at(HOST)
    assert evidence.may_try(HOST) is None


def test_when_an_image_is_to_be_tried_again_outlives_a_turn(evidence: Evidence) -> None:
    """And is forgotten with its task."""
    evidence.failed(HOST, "one", REFUSED)
    evidence.postpone(HOST, "one", 107.0)
    assert (evidence.own_retry_at(HOST, "one"), evidence.tries(HOST, "one")) == (107.0, 1)
    evidence.forget(HOST, "one")
    assert evidence.own_retry_at(HOST, "one") < 0
    assert evidence.tries(HOST, "one") == 0


def test_failures_that_are_far_apart_are_no_row(evidence: Evidence, clock: Clock) -> None:
    """The same image of another job, an hour later, begins anew."""
    evidence.failed(HOST, "one", download_failure(ImageUnreadable("broken")))
    clock.now_s += 3600.0
    seen = evidence.failed(HOST, "one", download_failure(ImageUnreadable("broken")))
    assert (seen.tries, seen.failing_s) == (1, 0.0)


def test_what_is_remembered_is_bounded(evidence: Evidence) -> None:
    """A job may name any number of hosts and images."""
    for number in range(20_000):
        evidence.failed(f"host-{number}.test", "one", BUSY)
        evidence.failed(HOST, str(number), BUSY)
    assert evidence.tries("host-0.test", "one") == 0
    assert evidence.tries(HOST, "0") == 0
    assert evidence.tries(HOST, "19999") == 1


def test_a_fault_is_said_once_with_what_to_do(evidence: Evidence, capsys: pytest.CaptureFixture[str]) -> None:
    """Until it is over, which is said, too."""
    fail(evidence, *[NOBODY] * 9)
    evidence.came(HOST, "one")
    told = "".join(capsys.readouterr())
    assert told.count("image_host_at_fault") == 1
    assert told.count("image_host_back") == 1
    assert "check the image host" in told


def test_a_fault_that_others_disprove_is_said_once(
    evidence: Evidence, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a thousand missing images every fifth would say it; a fault much later is another one."""
    for _round in range(3):
        fail(evidence, *[GONE] * 5)
        evidence.vouched_for(HOST)
        assert evidence.may_try(HOST) is None
        seen = evidence.failed(HOST, "0", GONE)
        assert (seen.host_at_fault, seen.others_served) == (False, 0), "it shows nothing of those that fail"
    told = "".join(capsys.readouterr())
    assert told.count("image_host_at_fault") == 1
    assert told.count("image_host_back") == 1
    clock.now_s += 3600.0
    fail(evidence, *[GONE] * 5)
    assert "".join(capsys.readouterr()).count("image_host_at_fault") == 1


def test_the_images_that_came_last_can_be_asked_for_again(evidence: Evidence) -> None:
    """Three of each host."""
    for number in range(5):
        evidence.came(HOST, str(number), f"https://{HOST}/{number}.jpg")
    assert evidence.controls(HOST, 2) == [("3", f"https://{HOST}/3.jpg"), ("4", f"https://{HOST}/4.jpg")]
    assert len(evidence.controls(HOST, 9)) == 3
    assert evidence.controls("other.test", 2) == []
    assert evidence.controls(HOST, 0) == []


def test_a_download_that_was_on_its_way_when_its_host_fell_out_does_not_bring_it_back(
    evidence: Evidence, clock: Clock
) -> None:
    """A name that is lost is lost, though a connection from before brings its image to the end."""
    begun_at = clock.now_s
    clock.now_s += 1.0
    fail(evidence, NOBODY, NOBODY, NOBODY)
    evidence.came(HOST, "late", begun_at=begun_at)
    assert evidence.may_try(HOST) is NOBODY
    clock.now_s += 5.0
    evidence.came(HOST, "new", begun_at=clock.now_s)
    assert evidence.may_try(HOST) is None


def test_a_host_that_does_not_serve_what_it_served_is_doubted(evidence: Evidence, clock: Clock) -> None:
    """As one that serves what it refused."""
    evidence.came(HOST, "one")
    evidence.doubt(HOST)
    clock.now_s += 2.0
    assert evidence.failed(HOST, "bad", PAGE).recovered_s == 2.0
