"""Whose fault a failed image is, and what follows: one table from failure, lease and evidence to a verdict.

Pure: it asks nothing and keeps nothing. What is known of hosts and images comes as a value from runtime/evidence.py;
the owner of the task applies the verdict. What the machine itself does (full disk, CUDA) is in runtime/faults.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

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

# All of these were chosen, not measured.
HOST_IMAGES = 5  # different images of a host that failed since it served one: the host is at fault
HOST_UNANSWERED = 3  # attempts in a row that brought no answer: they say nothing about the image that they were for
SHOWN_TRIES = 3  # an image is at fault by what others show when it failed as often
SHOWN_SERVED = 3  # and its host served as many others since its first failure
CONTROL_TRIES = 6  # so often an image fails before others are asked for again, where none came by itself
CONFIRM_S = 10.0  # a host's word that one image is missing or broken stands when it says the same for so long
CONFIRM_SHARE = 0.1  # or for this share of a lease, where that is shorter
VOUCH_S = 30.0  # so long a host is held at fault for what it says of many images, before others may show it to be well
VOUCH_SHARE = 0.1  # or this share of a lease
LAST_CHANCE_SHARE = 0.2  # of a lease: what still fails then is decided, so that it can be saved in time
RETRY_FIRST_S = 0.5
RETRY_MAX_S = 20.0


class Kind(Enum):
    """What a failure is, however it is worded."""

    URL = "the URL names nothing that could be asked"
    MISSING = "the host says that the image does not exist"
    BROKEN = "what came is no image, or one that is broken"
    TOO_LARGE = "the image exceeds a limit"
    PAGE = "a page came in the image's place"
    REFUSED = "the host answers, and does not serve the image"
    EXPIRED = "what signed the URL has expired"
    LINK = "the host fails, or the download broke off"
    UNREACHABLE = "no answer came"
    ADDRESS = "a setting forbids the host's address"
    UNDECODABLE = "the image came and cannot be decoded"
    UNINFERABLE = "the model has no result for the image"


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt."""

    kind: Kind
    error: ImageError | LinkError


@dataclass(frozen=True, slots=True)
class LeaseView:
    """A task's lease at the moment of the verdict.

    Attributes:
        is_last: nobody gets the task again once this lease is over.
        left_s: seconds until it is over; negative: since when it is.
    """

    is_last: bool
    left_s: float
    ack_wait_s: float
    max_deliver: int

    @property
    def lapses_soon(self) -> bool:
        return self.left_s < LAST_CHANCE_SHARE * self.ack_wait_s


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of an image and its host after a failure, which is counted in it.

    Attributes:
        at_s: when that was, on the evidence's clock.
        tries: failures of this image in a row.
        failing_s: seconds since the first of them.
        others_served: different images that the host served since then, counted up to SHOWN_SERVED.
        images_failing: different images that failed since the host last served one.
        unanswered: attempts in a row, of whatever image, that brought no answer of the host.
        has_served: whether the host ever served an image to this process; of decoder and model, whether one succeeded.
        recovered_s: seconds since an image came that the host had answered otherwise before; infinite when none did.
    """

    at_s: float
    tries: int
    failing_s: float
    others_served: int
    images_failing: int
    unanswered: int
    has_served: bool
    recovered_s: float = math.inf

    @property
    def host_at_fault(self) -> bool:
        """Whether the host, and not any of its images, is at fault."""
        return self.images_failing >= HOST_IMAGES or self.unanswered >= HOST_UNANSWERED


@dataclass(frozen=True, slots=True)
class RetryAt:
    """Try the image again at this time of the evidence's clock."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Park:
    """Leave the task on record until its host serves an image, or it is this image's turn to be tried."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Post this error: it is the image's own."""

    error: ImageError


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave the task to its lease."""

    reason: str


Verdict = RetryAt | Park | Fail | GiveUp


@dataclass(frozen=True, slots=True)
class Row:
    """What may make an error of one kind final.

    Attributes:
        at_once: the failure itself: it is about the task and about no host.
        by_others: that the host served others meanwhile, and this image failed again and again.
        by_repetition: that it lasts, while few images of the host fail: the host's word is about the image.
        at_the_end: that it lasts until shortly before the last delivery lapses.
        of_this_machine: the "host" is this machine: at the end, too, it takes evidence that it is well.
    """

    at_once: bool = False
    by_others: bool = False
    by_repetition: bool = False
    at_the_end: bool = True
    of_this_machine: bool = False


TABLE = {
    Kind.URL: Row(at_once=True),
    Kind.MISSING: Row(by_others=True, by_repetition=True),
    Kind.BROKEN: Row(by_others=True, by_repetition=True),
    Kind.TOO_LARGE: Row(by_others=True, by_repetition=True),
    Kind.UNDECODABLE: Row(by_others=True, by_repetition=True),
    # A broken GPU fails at the one image of a small job, too, and for as long as that is repeated. Only what else was
    # inferred here tells them apart. A decode runs on the CPU and gives the same each time: its repetition is evidence.
    Kind.UNINFERABLE: Row(by_others=True, of_this_machine=True),
    Kind.PAGE: Row(by_others=True),
    Kind.REFUSED: Row(by_others=True),  # S3 answers 403 for a key that is gone, unless the bucket may be listed
    Kind.EXPIRED: Row(),  # another delivery may bring a fresh URL
    Kind.LINK: Row(),
    Kind.UNREACHABLE: Row(),
    Kind.ADDRESS: Row(at_the_end=False),  # what may be asked is this worker's setting
}

# Kinds in which a host answered for an image and did not send it. One that then sends it all the same is of two minds.
ANSWERED = frozenset({Kind.MISSING, Kind.BROKEN, Kind.PAGE, Kind.REFUSED})

_OF_DOWNLOADS: tuple[tuple[type[Exception], Kind], ...] = (  # the first that fits counts
    (ImageUrlUnusable, Kind.URL),
    (ImageMissing, Kind.MISSING),
    (ImageTooLarge, Kind.TOO_LARGE),
    (NotAnImage, Kind.PAGE),
    (ImageError, Kind.BROKEN),
    (UrlExpired, Kind.EXPIRED),
    (ImageRefused, Kind.REFUSED),
    (AddressRefused, Kind.ADDRESS),
    (HostUnreachable, Kind.UNREACHABLE),
    (LinkError, Kind.LINK),
)
_OF_STAGED: tuple[tuple[type[Exception], Kind], ...] = (
    (ImageTooLarge, Kind.TOO_LARGE),
    (ImageUnreadable, Kind.UNDECODABLE),
    (ImageError, Kind.UNINFERABLE),
)


def download_failure(error: ImageError | LinkError) -> Failure:
    """Return what a failed download is."""
    return Failure(_kind(error, _OF_DOWNLOADS), error)


def staged_failure(error: ImageError) -> Failure:
    """Return what it is that a staged image cannot be decoded or inferred."""
    return Failure(_kind(error, _OF_STAGED), error)


def _kind(error: Exception, kinds: tuple[tuple[type[Exception], Kind], ...]) -> Kind:
    return next(kind for error_class, kind in kinds if isinstance(error, error_class))


def judge(failure: Failure, lease: LeaseView, seen: Seen) -> Verdict:
    """Return what follows from a failure."""
    row = TABLE[failure.kind]
    if row.at_once or _is_shown_by_others(row, lease, seen) or _is_shown_by_repetition(row, lease, seen):
        return Fail(_as_image_error(failure.error))
    if lease.lapses_soon:
        return _at_the_end(row, failure, lease, seen)
    if seen.host_at_fault:
        return Park()
    return RetryAt(seen.at_s + _wait_s(row, failure, lease, seen))


def controls_wanted(failure: Failure, lease: LeaseView, seen: Seen) -> int:
    """Return how many images that came before should be asked for again, to see whether their host still serves any.

    The last images of a job have no others behind them that could show that they alone are at fault. Several of them
    that the host says are missing or broken look like a fault of the host. Such a fault would soon be over, mostly, and
    then one of them comes; when it lasts, others show whether the host is well. All of those that came before are asked
    for: one that came since the first failure already counts once, however often it comes.
    """
    row = TABLE[failure.kind]
    if row.of_this_machine:
        return 0
    if seen.host_at_fault:
        is_word_about_image = row.by_others and row.by_repetition
        is_time = seen.failing_s >= min(VOUCH_S, VOUCH_SHARE * lease.ack_wait_s)
        return SHOWN_SERVED if is_word_about_image and is_time else 0
    is_open = row.by_others and not row.by_repetition
    is_time = seen.tries >= CONTROL_TRIES and seen.tries % SHOWN_TRIES == 0
    is_needed = seen.others_served < SHOWN_SERVED
    return SHOWN_SERVED if is_open and is_time and is_needed else 0


def judge_url(error: ImageUrlUnusable) -> Verdict:
    """Return what follows for a task whose URL names no host: there is nobody else whom that could be held against."""
    assert TABLE[Kind.URL].at_once
    return Fail(error)


def judge_untried(failure: Failure, lease: LeaseView) -> Verdict:
    """Return what follows for a task that was not tried because its host is at fault, by `failure`."""
    if lease.lapses_soon:
        return GiveUp(str(failure.error))
    return Park()


def _is_shown_by_others(row: Row, lease: LeaseView, seen: Seen) -> bool:
    enough = seen.tries >= SHOWN_TRIES and seen.others_served >= SHOWN_SERVED
    return row.by_others and enough and _is_reliable(lease, seen)


def _is_shown_by_repetition(row: Row, lease: LeaseView, seen: Seen) -> bool:
    enough = seen.tries >= SHOWN_TRIES and seen.failing_s >= _confirm_s(lease)
    return row.by_repetition and enough and _is_reliable(lease, seen)


def _is_reliable(lease: LeaseView, seen: Seen) -> bool:
    """Whether what the host says of an image may be believed: it serves others, and did not take back such a word."""
    return not seen.host_at_fault and seen.recovered_s > lease.ack_wait_s


def _confirm_s(lease: LeaseView) -> float:
    return min(CONFIRM_S, CONFIRM_SHARE * lease.ack_wait_s)


def _at_the_end(row: Row, failure: Failure, lease: LeaseView, seen: Seen) -> Verdict:
    """Return what follows when another attempt would come too late."""
    error = failure.error
    is_well = seen.has_served and not seen.host_at_fault
    is_postable = row.at_the_end and (is_well or not row.of_this_machine)
    if not lease.is_last or not is_postable:
        return GiveUp(str(error))
    what = "downloadable" if isinstance(error, LinkError) else "readable"
    return Fail(ImageError(f"not {what} in {lease.max_deliver} deliveries: {error}"))


def _wait_s(row: Row, failure: Failure, lease: LeaseView, seen: Seen) -> float:
    """Return the seconds until another attempt: ever longer, as the host asks, and well within the lease."""
    wait_s = min(RETRY_FIRST_S * 2.0 ** min(seen.tries - 1, 16), RETRY_MAX_S)
    if row.by_repetition:
        until_confirmed_s = _confirm_s(lease) - seen.failing_s
        wait_s = min(wait_s, max(RETRY_FIRST_S, until_confirmed_s))
    asked_s = failure.error.retry_after_s if isinstance(failure.error, LinkError) else 0.0
    if math.isfinite(asked_s):
        wait_s = max(wait_s, asked_s)
    return min(wait_s, lease.left_s / 2)


def _as_image_error(error: ImageError | LinkError) -> ImageError:
    if isinstance(error, ImageError):
        return error
    return ImageError(f"{error}, again and again, while its host served other images")
