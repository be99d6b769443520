"""The error tree, split by what the caller must do, and the exit codes.

AdcError
├── ConfigurationError     exit with CONFIGURATION; the message names the variable
├── ImageError             what came is no usable image; runtime/verdicts.py decides when that is the image's fault
│   ├── ImageUrlUnusable   the URL names nothing that could be asked: an error of that task alone
│   ├── ImageMissing       404 or 410
│   ├── ImageUnreadable    empty, not an image, broken beyond decoding
│   │   └── NotAnImage     a page or text in an image's place: proves nothing about the image by itself
│   └── ImageTooLarge      exceeds a stated limit of this host
├── LinkError              retry inside the lease, then leave the task to its lease
│   ├── ImageRefused       the image's host answers, and does not serve this image: 401, 403, 400
│   │   └── UrlExpired     its URL was signed for a time that is over; another delivery may bring a fresh one
│   └── HostUnreachable    no answer of the image's host: name, connection, TLS, proxy
│       └── AddressRefused where this worker may not go: a setting, so pause the job; the message names it
├── AntennaError
│   ├── AntennaUnavailable retry with back-off
│   │   ├── AntennaUnreachable no answer at all; at the first start a wrong URL
│   │   └── NotAntenna     something else answered in Antenna's place: it says nothing about tasks and results
│   ├── AntennaRefused     401 or 403 in Antenna's own words: stop fetching what it concerns, and try again
│   └── AntennaRejected    the request is wrong, in Antenna's own words: 400, 404, 405, 415
│       └── AntennaBodyTooLarge 413, from whatever stands on the way: send less at once
├── StagingFull            the disk is full: pause, then try again
├── DeviceMemoryShort      other programs hold the GPU's memory: try the image again later
├── ResultGone             a kept result is not there any more while it is posted: break that post off
├── StagedFileLost         a staged file is gone: download the image again, or leave the task to its lease
└── WorkerFault            this machine's fault: exit with the code it carries, never an error result
    └── ModelsAway         a store, a disk or a GPU's memory that may come back: the jobs of that pipeline wait
"""

from __future__ import annotations

import errno
from collections.abc import Collection
from enum import IntEnum

_UNAUTHORIZED = 401
_BODY_TOO_LARGE = 413

# What the operating system says about a path that stays so until somebody changes a setting, a name or the rights on
# it. Everything else may pass by itself or with the machine's repair: a full disk or quota, a network file system that
# is away (ESTALE), a disk that fails or was mounted read-only for that (EIO, EROFS), files or memory that ran out.
_LASTING_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
    }
)


def os_error_may_pass(error: OSError) -> bool:
    """Whether waiting may help, so that no exit code may be used which keeps a supervisor from restarting."""
    return error.errno is not None and error.errno not in _LASTING_ERRNOS


class ExitCode(IntEnum):
    """What the end of the process means to whoever supervises it."""

    OK = 0  # drained, or nothing left to do with --exit-when-idle
    FAILED = 1  # an unexpected error; restart
    CONFIGURATION = 2  # a setting is missing or wrong; a restart does not help
    MODEL_UNAVAILABLE = 3  # a pipeline named on the command line can never be loaded as it is
    JOURNAL_UNUSABLE = 4  # the journal is from a newer version, may not be opened or set aside, or breaks repeatedly
    BACKGROUND_TASK_DIED = 5  # a thread that must live died; restart
    MACHINE_FAULT = 6  # a fault of this machine (disk, journal) lasted five minutes; restart, best once it is put right
    GPU_FAULT = 7  # CUDA failed, and with it this process; restart
    HUNG = 8  # it held tasks and gave no sign of life; its parent ended and restarts it
    RECYCLE = 9  # AMI_WORKER_MAX_JOBS or AMI_WORKER_MAX_RSS_MB is reached; its parent starts another at once


class AdcError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(AdcError):
    """A setting is missing or wrong; the message names the variable and what to write."""


class ImageError(AdcError):
    """The image itself cannot be processed; the message is what Antenna's users read."""


class ImageUrlUnusable(ImageError):
    """The URL is none that could be asked: no http or https, no host, a port that is none."""


class ImageMissing(ImageError):
    """The image's host says it does not exist (404 or 410)."""


class ImageUnreadable(ImageError):
    """What was downloaded is empty, is not an image, or cannot be decoded."""


class NotAnImage(ImageUnreadable):
    """A page, text or a compressed stream came in the image's place; hosts and portals send that for any image."""


class ImageTooLarge(ImageError):
    """The image exceeds a limit; the message carries both numbers."""


class LinkError(AdcError):
    """The download failed for a reason that is not in the image: try again, then leave the task to its lease."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # what the host asked for; 0 where it did not say


class ImageRefused(LinkError):
    """The image's host answers, and its answer is neither this image nor that it does not exist."""


class UrlExpired(ImageRefused):
    """What signed the image's URL is no longer valid: that says nothing about the image."""


class HostUnreachable(LinkError):
    """No answer of the image's host came, so this says nothing about the image that was to be asked for."""


class AddressRefused(HostUnreachable):
    """The image's host has an address that this worker may not ask; the message names the variable that changes it."""


class StagingFull(AdcError):
    """The disk that images are staged on has no space left."""


class DeviceMemoryShort(AdcError):
    """An image needs memory of the GPU that other programs hold; it is not the image that is too large."""


class ResultGone(AdcError):
    """A kept result ended too early while it was posted: its job was dropped, or the journal was damaged."""


class StagedFileLost(AdcError):
    """An image was staged and its file is lost: it is downloaded again, or comes with another delivery."""


class AntennaError(AdcError):
    """Antenna did not do what was asked."""


class AntennaUnavailable(AntennaError):
    """Antenna cannot be reached or is failing (5xx, 429, time-out, reset): try again later."""


class AntennaUnreachable(AntennaUnavailable):
    """No HTTP answer came: DNS, connection, TLS, proxy, time-out."""

    def __init__(self, message: str, *, connected: bool = False) -> None:
        super().__init__(message)
        self.connected = connected  # somebody listens at the address, and did not answer


class NotAntenna(AntennaUnavailable):
    """The answer is none that Antenna's contract gives: a proxy, a sign-in page or maintenance is in the way."""

    def __init__(self, message: str, moved_to: str = "") -> None:
        super().__init__(message)
        self.moved_to = moved_to  # the same path at another address, where the answer calls that permanent


class AntennaRefused(AntennaError):
    """Antenna refuses the token (401) or what was asked with it (403): try again later."""

    def __init__(self, message: str, status: int = 403) -> None:
        super().__init__(message)
        self.status = status

    @property
    def concerns_token(self) -> bool:
        """Whether the token is refused whatever is asked with it; else this request alone is refused."""
        return self.status == _UNAUTHORIZED


class AntennaRejected(AntennaError):
    """Antenna calls the request wrong; repeating it unchanged is useless.

    `entries` are the places of the results in a post that Antenna names as invalid. `blames_result` is whether the
    words are about a result at all, and not about the request as a whole.
    """

    def __init__(
        self, message: str, status: int, entries: Collection[int] = (), *, blames_result: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.entries = frozenset(entries)
        self.blames_result = blames_result or bool(entries)


class AntennaBodyTooLarge(AntennaRejected):
    """A proxy, or Antenna, takes no request of that size (413): it says nothing else about the request."""

    def __init__(self, message: str) -> None:
        super().__init__(message, _BODY_TOO_LARGE)


class WorkerFault(AdcError):
    """This machine cannot go on; the process ends with `exit_code`."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ModelsAway(WorkerFault):
    """A model's files cannot be had or loaded at the moment, for a reason that may pass: try again."""
