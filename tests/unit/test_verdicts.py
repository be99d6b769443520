"""Whose fault a failed image is: the table, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adc_worker.errors import (
    AddressRefused,
    HostUnreachable,
    ImageError,
    ImageMissing,
    ImageRefused,
    ImageTooLarge,
    ImageUnreadable,
    ImageUrlUnusable,
    LinkError,
    NotAnImage,
    UrlExpired,
)
from adc_worker.runtime.verdicts import (
    TABLE,
    Fail,
    Failure,
    GiveUp,
    Kind,
    LeaseView,
    Park,
    RetryAt,
    Seen,
    controls_wanted,
    download_failure,
    judge,
    judge_untried,
    judge_url,
    staged_failure,
)

FRESH = LeaseView(is_last=False, left_s=290.0, ack_wait_s=300.0, max_deliver=2)
ENDING = replace(FRESH, left_s=50.0)
LAST = replace(FRESH, is_last=True)
LAST_ENDING = replace(ENDING, is_last=True)
FIRST = Seen(at_s=1000.0, tries=1, failing_s=0.0, others_served=0, images_failing=1, unanswered=0, has_served=True)
AGAIN = replace(FIRST, tries=4, failing_s=5.0)
LASTING = replace(AGAIN, failing_s=60.0)
OTHERS_SERVED = replace(AGAIN, others_served=5)
HOST_DOWN = replace(LASTING, images_failing=5)
OF_TWO_MINDS = replace(OTHERS_SERVED, failing_s=60.0, recovered_s=20.0)

ERRORS: dict[Kind, ImageError | LinkError] = {
    Kind.MISSING: ImageMissing("404"),
    Kind.BROKEN: ImageUnreadable("broken header"),
    Kind.TOO_LARGE: ImageTooLarge("5 of 4"),
    Kind.PAGE: NotAnImage("a page"),
    Kind.REFUSED: ImageRefused("403"),
    Kind.EXPIRED: UrlExpired("403"),
    Kind.LINK: LinkError("503"),
    Kind.UNREACHABLE: HostUnreachable("no route"),
    Kind.ADDRESS: AddressRefused("10.0.0.1"),
    Kind.UNDECODABLE: ImageUnreadable("cannot be decoded"),
    Kind.UNINFERABLE: ImageError("scores that are not numbers"),
}
OF_THE_IMAGE = {Kind.MISSING, Kind.BROKEN, Kind.TOO_LARGE, Kind.UNDECODABLE}
OF_A_HOST = set(ERRORS) - OF_THE_IMAGE


def failure(kind: Kind) -> Failure:
    return Failure(kind, ERRORS[kind])


def names(verdicts: dict[Kind, object]) -> dict[Kind, str]:
    return {kind: type(verdict).__name__ for kind, verdict in verdicts.items()}


def judged(lease: LeaseView, seen: Seen) -> dict[Kind, str]:
    """Return what follows from each kind of failure."""
    return names({kind: judge(failure(kind), lease, seen) for kind in ERRORS})


def all_but(common: str, **others: str) -> dict[Kind, str]:
    """Return one verdict for every kind, but for those named."""
    return {kind: others.get(kind.name, common) for kind in ERRORS}


def test_the_table_has_a_row_for_every_kind() -> None:
    """And the examples here are all of them but the URL's, which no host is asked for."""
    assert set(TABLE) == set(Kind)
    assert set(ERRORS) == set(Kind) - {Kind.URL}


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind not in {Kind.UNDECODABLE, Kind.UNINFERABLE}])
def test_every_error_of_a_download_has_its_kind(kind: Kind) -> None:
    """By its class, whatever its words."""
    assert download_failure(ERRORS[kind]).kind is kind


def test_every_error_of_a_staged_image_has_its_kind() -> None:
    """Its host has nothing to do with it any more."""
    for kind in (Kind.UNDECODABLE, Kind.UNINFERABLE, Kind.TOO_LARGE):
        assert staged_failure(error).kind is kind if isinstance(error := ERRORS[kind], ImageError) else False


def test_an_unusable_url_is_an_error_at_once() -> None:
    """Of that task alone."""
    error = ImageUrlUnusable("no host")
    assert judge_url(error) == Fail(error)
    assert judge(download_failure(error), FRESH, FIRST) == Fail(error)


@pytest.mark.parametrize("lease", [FRESH, LAST])
def test_no_first_failure_is_final(lease: LeaseView) -> None:
    """It may be the host's, whatever it says."""
    assert judged(lease, FIRST) == all_but("RetryAt")


@pytest.mark.parametrize("lease", [FRESH, LAST])
def test_an_image_that_fails_while_its_host_serves_others_is_at_fault(lease: LeaseView) -> None:
    """A page or a refusal, too; not so what another delivery, or another setting, would change."""
    expected = dict.fromkeys(("LINK", "UNREACHABLE", "ADDRESS", "EXPIRED"), "RetryAt")
    assert judged(lease, OTHERS_SERVED) == all_but("Fail", **expected)


def test_what_is_said_of_the_image_itself_stands_when_it_lasts() -> None:
    """Also for the one image of a small job; a page never says anything of an image."""
    expected = {kind: "Fail" if kind in OF_THE_IMAGE else "RetryAt" for kind in ERRORS}
    assert judged(FRESH, LASTING) == expected
    assert judged(FRESH, AGAIN) == all_but("RetryAt")


def test_of_a_host_that_takes_its_word_back_nothing_is_believed() -> None:
    """Behind a balancer one image comes at the second attempt, another at the tenth: all are tried on."""
    assert judged(FRESH, OF_TWO_MINDS) == all_but("RetryAt")
    long_ago = replace(OF_TWO_MINDS, recovered_s=301.0)
    assert judged(FRESH, long_ago)[Kind.PAGE] == "Fail"


@pytest.mark.parametrize("seen", [HOST_DOWN, replace(AGAIN, unanswered=3), replace(HOST_DOWN, others_served=9)])
def test_an_image_of_a_host_at_fault_is_parked(seen: Seen) -> None:
    """Different images fail and none comes, or nobody answers: no image is blamed."""
    assert judged(FRESH, seen) == all_but("Park")
    assert judged(LAST, seen) == all_but("Park")


def test_many_attempts_of_one_image_are_no_fault_of_its_host() -> None:
    """Only different images are."""
    assert judged(FRESH, replace(FIRST, tries=500)) == all_but("RetryAt")


@pytest.mark.parametrize("seen", [AGAIN, HOST_DOWN, OF_TWO_MINDS])
def test_a_lease_that_lapses_is_left_to_the_next_delivery(seen: Seen) -> None:
    """Nothing is final while somebody else may get the task."""
    assert judged(ENDING, seen) == all_but("GiveUp")


def test_on_the_last_delivery_what_lasts_is_posted_shortly_before_it_lapses() -> None:
    """Except what a setting forbids: that is never an image's fault."""
    assert judged(LAST_ENDING, AGAIN) == all_but("Fail", ADDRESS="GiveUp")
    verdict = judge(failure(Kind.LINK), LAST_ENDING, AGAIN)
    assert isinstance(verdict, Fail)
    assert str(verdict.error) == "not downloadable in 2 deliveries: 503"


def test_a_fault_of_this_machine_is_never_posted() -> None:
    """A model that fails image after image is this machine's, also when a last delivery lapses."""
    assert judged(LAST_ENDING, HOST_DOWN) == all_but("Fail", ADDRESS="GiveUp", UNINFERABLE="GiveUp")


@pytest.mark.parametrize("images_failing", [1, 3])
def test_a_model_that_never_had_a_result_here_makes_no_image_an_error(images_failing: int) -> None:
    """A broken GPU fails at a job of few images, too, however often; a file that cannot be decoded has its error."""
    never_served = replace(LASTING, has_served=False, images_failing=images_failing, tries=9)
    assert judged(FRESH, never_served)[Kind.UNINFERABLE] == "RetryAt"
    assert judged(ENDING, never_served)[Kind.UNINFERABLE] == "GiveUp"
    assert judged(LAST_ENDING, never_served)[Kind.UNINFERABLE] == "GiveUp"
    assert judged(FRESH, never_served)[Kind.UNDECODABLE] == "Fail"
    assert judged(LAST_ENDING, replace(never_served, has_served=True))[Kind.UNINFERABLE] == "Fail"


def test_a_task_whose_host_is_at_fault_waits_or_is_left_to_its_lease_untried() -> None:
    """It has no failure of its own."""
    assert judge_untried(failure(Kind.LINK), FRESH) == Park()
    assert judge_untried(failure(Kind.LINK), ENDING) == GiveUp("503")


def waits_s(error: LinkError, lease: LeaseView = FRESH, seen: Seen = FIRST) -> float:
    verdict = judge(Failure(Kind.LINK, error), lease, seen)
    assert isinstance(verdict, RetryAt)
    return verdict.at_s - seen.at_s


def test_attempts_come_ever_less_often() -> None:
    """From half a second to twenty."""
    waits = [waits_s(LinkError("503"), seen=replace(FIRST, tries=tries)) for tries in range(1, 9)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0]


@pytest.mark.parametrize(
    ("asked_s", "wait_s"),
    [(7.0, 7.0), (31_536_000.0, 145.0), (float("inf"), 0.5), (float("nan"), 0.5), (-5.0, 0.5), (0.0, 0.5)],
)
def test_a_host_is_waited_for_as_it_asks_within_the_lease(asked_s: float, wait_s: float) -> None:
    """A year, an endless time or none do not cost the image its lease."""
    assert waits_s(LinkError("429", asked_s)) == wait_s


def test_the_wait_of_an_image_that_may_be_broken_ends_when_its_failure_counts() -> None:
    """Not later: one broken photograph must not hold a small job up."""
    verdict = judge(failure(Kind.MISSING), FRESH, replace(FIRST, tries=5, failing_s=7.5))
    assert verdict == RetryAt(1002.5)


def test_on_a_short_lease_attempts_still_come_before_it_lapses() -> None:
    """Each waits for half of what is left at most."""
    short = LeaseView(is_last=True, left_s=4.0, ack_wait_s=12.0, max_deliver=2)
    assert waits_s(LinkError("503"), short, replace(FIRST, tries=9)) == 2.0


def test_others_are_asked_for_again_where_an_image_is_the_last_of_its_job() -> None:
    """After it failed six times while fewer than three others came; never where its own word is enough."""
    last = replace(AGAIN, tries=6, others_served=1)
    wanted = {kind: controls_wanted(failure(kind), FRESH, last) for kind in ERRORS}
    asking = {Kind.PAGE, Kind.REFUSED}
    assert wanted == {kind: 3 if kind in asking else 0 for kind in ERRORS}
    page = failure(Kind.PAGE)
    others = [
        replace(last, tries=5), replace(last, tries=7), replace(last, others_served=3), replace(last, images_failing=5)
    ]  # fmt: skip
    assert [controls_wanted(page, FRESH, seen) for seen in others] == [0, 0, 0, 0]


def test_others_are_asked_for_again_where_missing_images_make_their_host_look_at_fault() -> None:
    """At the end of a job nothing but missing and broken images is left; nobody vouches for a sign-in page."""
    wanted = {kind for kind in ERRORS if controls_wanted(failure(kind), FRESH, HOST_DOWN) > 0}
    assert wanted >= {Kind.MISSING, Kind.BROKEN, Kind.TOO_LARGE}
    assert not wanted & {Kind.PAGE, Kind.REFUSED, Kind.EXPIRED, Kind.LINK, Kind.UNREACHABLE, Kind.ADDRESS}
    short = replace(HOST_DOWN, failing_s=20.0)
    assert {controls_wanted(failure(kind), FRESH, short) for kind in ERRORS} == {0}, "such a spell is soon over, mostly"
