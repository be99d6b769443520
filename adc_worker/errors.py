"""The error tree, split by what the caller must do, and the exit codes.

AdcError
├── ConfigurationError     exit with CONFIGURATION; the message names the variable
├── ImageError             post an error result: the evidence is in the image
│   ├── ImageMissing       404 or 410
│   ├── ImageUnreadable    empty, not an image, broken beyond decoding
│   └── ImageTooLarge      exceeds a stated limit of this host
├── LinkError              retry inside the lease, then leave the task to its lease
│   └── AddressRefused     where this worker may not go: a setting, so pause the job; the message names it
├── AntennaError
│   ├── AntennaUnavailable retry with back-off
│   │   └── AntennaUnreachable no answer at all; at start a wrong URL
│   ├── AntennaRefused     401 or 403: stop fetching, say so
│   └── AntennaRejected    the request is wrong: 400, 404, 413, …
├── StagingFull            the disk is full: pause, then try again
├── DeviceMemoryShort      other programs hold the GPU's memory: leave the task to its lease
├── StagedFileLost         a staged file is gone, and with it the way to get it again: leave the task to its lease
└── WorkerFault            this machine's fault: exit with the code it carries, never an error result
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the end of the process means to whoever supervises it."""

    OK = 0  # drained, or nothing left to do with --exit-when-idle
    FAILED = 1  # an unexpected error; restart
    CONFIGURATION = 2  # a setting is missing or wrong; a restart does not help
    MODEL_UNAVAILABLE = 3  # a pipeline named on the command line could not be loaded
    JOURNAL_UNUSABLE = 4  # the journal is from a newer version, or cannot be opened
    BACKGROUND_TASK_DIED = 5  # a thread that must live died; restart
    MACHINE_FAULT = 6  # a fault of this machine (disk, journal) lasted five minutes; put it right first
    GPU_FAULT = 7  # CUDA failed, and with it this process; restart
    HUNG = 8  # it held tasks and gave no sign of life; its parent ended and restarts it
    RECYCLE = 9  # AMI_WORKER_MAX_JOBS or AMI_WORKER_MAX_RSS_MB is reached; its parent starts another at once


class AdcError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(AdcError):
    """A setting is missing or wrong; the message names the variable and what to write."""


class ImageError(AdcError):
    """The image itself cannot be processed; the message is what Antenna's users read."""


class ImageMissing(ImageError):
    """The image's host says it does not exist (404 or 410)."""


class ImageUnreadable(ImageError):
    """What was downloaded is empty, is not an image, or cannot be decoded."""


class ImageTooLarge(ImageError):
    """The image exceeds a limit; the message carries both numbers."""


class LinkError(AdcError):
    """The download failed for a reason that is not in the image: try again, then leave the task to its lease."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # what the host asked for; 0 where it did not say


class AddressRefused(LinkError):
    """The image's host has an address that this worker may not ask; the message names the variable that changes it."""


class StagingFull(AdcError):
    """The disk that images are staged on has no space left."""


class DeviceMemoryShort(AdcError):
    """An image needs memory of the GPU that other programs hold; it is not the image that is too large."""


class StagedFileLost(AdcError):
    """An image was staged, its file is lost, and what opened its URL was erased then: another delivery brings it."""


class AntennaError(AdcError):
    """Antenna did not do what was asked."""


class AntennaUnavailable(AntennaError):
    """Antenna cannot be reached or is failing (5xx, 429, time-out, reset): try again later."""


class AntennaUnreachable(AntennaUnavailable):
    """No HTTP answer came: DNS, connection, TLS, proxy, time-out."""


class AntennaRefused(AntennaError):
    """Antenna refuses this token (401, 403): stop fetching until it is accepted again."""


class AntennaRejected(AntennaError):
    """Antenna calls the request wrong; repeating it unchanged is useless."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WorkerFault(AdcError):
    """This machine cannot go on; the process ends with `exit_code`."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code
