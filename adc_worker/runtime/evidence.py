"""What hosts did with images in this process's lifetime, as verdicts need it: different images, not attempts of one.

The decoder with the model counts as a host, too: it is what images that came may fail at.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from adc_worker.log import get_logger
from adc_worker.runtime.faults import advice
from adc_worker.runtime.verdicts import ANSWERED, SHOWN_SERVED, Failure, Kind, Seen

_log = get_logger(__name__)

TRIAL_FIRST_S = 1.0  # between two trials of a host at fault, at first and at most
TRIAL_MAX_S = 30.0
CONTROLS = SHOWN_SERVED  # images of a host that can be asked for again
QUIET_S = 60.0  # after others of a host came when asked for: that it seems to be at fault again is not said again
IN_A_ROW_S = 600.0  # failures of an image that are further apart have nothing to do with each other
# Bounds for what is remembered, so that no job's URLs can fill the memory.
HOSTS_MAX = 1000
IMAGES_MAX = 10_000


@dataclass(slots=True)
class _Image:
    """An image that failed last, or that waits for another attempt."""

    first_failed_at: float
    last_failed_at: float
    served_before: int  # images that its host had served when it failed first
    tries: int = 0
    kind: Kind = Kind.LINK
    retry_at: float = -math.inf


@dataclass(slots=True)
class _Host:
    served: int = 0
    served_last: OrderedDict[str, int] = field(default_factory=OrderedDict)  # the last different images: what number
    failing: set[str] = field(default_factory=set)  # since it last served an image
    unanswered: int = 0
    recovered_at: float = -math.inf  # when it was last seen to answer differently for one image
    images: OrderedDict[str, _Image] = field(default_factory=OrderedDict)
    controls: OrderedDict[str, str] = field(default_factory=OrderedDict)  # URLs of the images that came last
    at_fault: Failure | None = None  # the last failure, while it is held at fault
    at_fault_since: float = -math.inf
    is_told: bool = False  # that it is at fault
    quiet_until: float = -math.inf
    trial_at: float = -math.inf
    trial_pause_s: float = TRIAL_FIRST_S

    def clear(self) -> bool:
        """Hold it at fault no more; return whether it was said to be."""
        was_told = self.is_told
        self.at_fault = None
        self.is_told = False
        self.failing.clear()
        self.unanswered = 0
        self.trial_pause_s = TRIAL_FIRST_S
        return was_told


class Evidence:
    """What is known of hosts; safe to use from several threads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._lock = threading.Lock()
        self._hosts: OrderedDict[str, _Host] = OrderedDict()

    def failed(self, host: str, image_id: str, failure: Failure) -> Seen:
        """Take in a failure, and return what is known then; the host may be at fault from here on."""
        now = self.now()
        with self._lock:
            known = self._host(host)
            image = self._image(known, image_id, now)
            image.tries += 1
            image.last_failed_at = now
            image.kind = failure.kind
            if len(known.failing) < IMAGES_MAX:
                known.failing.add(image_id)
            known.unanswered = known.unanswered + 1 if failure.kind is Kind.UNREACHABLE else 0
            seen = Seen(
                at_s=now,
                tries=image.tries,
                failing_s=now - image.first_failed_at,
                others_served=sum(number > image.served_before for number in known.served_last.values()),
                images_failing=len(known.failing),
                unanswered=known.unanswered,
                has_served=known.served > 0,
                recovered_s=now - known.recovered_at,
            )
            newly_at_fault = seen.host_at_fault and known.at_fault is None
            is_to_be_told = newly_at_fault and now >= known.quiet_until
            if newly_at_fault:
                known.at_fault_since = now
                known.is_told = is_to_be_told
            if seen.host_at_fault or known.at_fault is not None:
                known.at_fault = failure
                known.trial_at = now + known.trial_pause_s
                known.trial_pause_s = min(2 * known.trial_pause_s, TRIAL_MAX_S)
        if is_to_be_told:
            error = failure.error
            images = seen.images_failing
            _log.error("image_host_at_fault", host=host, images=images, error=str(error), do=advice(error))
        return seen

    def came(self, host: str, image_id: str, url: str = "", begun_at: float = math.inf) -> None:
        """Take in that a host served an image: it is at fault no more, whatever failed before and between.

        `url`: where it may be asked for again. `begun_at`: when its download began; one that was on its way when the
        host was found to be at fault shows nothing of the host since then.
        """
        with self._lock:
            known = self._host(host)
            known.served += 1
            known.served_last[image_id] = known.served
            known.served_last.move_to_end(image_id)
            while len(known.served_last) > SHOWN_SERVED:  # more than that show nothing more
                known.served_last.popitem(last=False)
            if url:
                known.controls[image_id] = url
                known.controls.move_to_end(image_id)
                while len(known.controls) > CONTROLS:
                    known.controls.popitem(last=False)
            image = known.images.pop(image_id, None)
            if image is not None and image.kind in ANSWERED:
                known.recovered_at = self.now()
            if known.at_fault is not None and begun_at < known.at_fault_since:
                return
            was_told = known.clear()
        if was_told:
            _log.info("image_host_back", host=host)

    def vouched_for(self, host: str) -> None:
        """Take in that a host still serves what it served before, while many other images fail: it is well.

        It shows nothing more of those that fail.
        """
        with self._lock:
            known = self._host(host)
            known.quiet_until = self.now() + QUIET_S
            was_told = known.clear()
        if was_told:
            _log.info("image_host_back", host=host)

    def doubt(self, host: str) -> None:
        """Take in that an image which a host had served does not come any more: its answers change."""
        with self._lock:
            self._host(host).recovered_at = self.now()

    def controls(self, host: str, count: int) -> list[tuple[str, str]]:
        """Return id and URL of images that a host served last, up to `count`."""
        with self._lock:
            known = self._hosts.get(host)
            return list(known.controls.items())[-count:] if known is not None and count > 0 else []

    def may_try(self, host: str) -> Failure | None:
        """Return the failure of a host at fault; None when an image of it may be tried.

        A host at fault is tried with one image at a time, less and less often.
        """
        with self._lock:
            known = self._hosts.get(host)
            if known is None or known.at_fault is None:
                return None
            now = self.now()
            if now < known.trial_at:
                return known.at_fault
            # Nobody else until the outcome of this trial is known, or it was broken off without one.
            known.trial_at = now + TRIAL_MAX_S
            return None

    def postpone(self, host: str, image_id: str, at_s: float) -> None:
        """Remember when an image is to be tried again, also one that has not failed: the job may have another turn."""
        with self._lock:
            known = self._host(host)
            image = known.images.get(image_id)
            if image is None:
                image = self._image(known, image_id, self.now())
            image.retry_at = at_s

    def own_retry_at(self, host: str, image_id: str) -> float:
        """Return when an image is to be tried again, whatever the state of its host."""
        with self._lock:
            known = self._hosts.get(host)
            image = known.images.get(image_id) if known is not None else None
            return image.retry_at if image is not None else -math.inf

    def trial_at(self, host: str) -> float:
        """Return when a host at fault may be tried with another image; a time gone by for one that is not."""
        with self._lock:
            known = self._hosts.get(host)
            return known.trial_at if known is not None and known.at_fault is not None else -math.inf

    def tries(self, host: str, image_id: str) -> int:
        """Return how often an image failed since it last came."""
        with self._lock:
            known = self._hosts.get(host)
            image = known.images.get(image_id) if known is not None else None
            return image.tries if image is not None else 0

    def forget(self, host: str, image_id: str) -> None:
        """An image's task has ended; what it showed of its host stays."""
        with self._lock:
            known = self._hosts.get(host)
            if known is not None:
                known.images.pop(image_id, None)

    def has_served(self, host: str) -> bool:
        """Whether a host ever served an image."""
        with self._lock:
            known = self._hosts.get(host)
            return known is not None and known.served > 0

    @staticmethod
    def _image(known: _Host, image_id: str, now: float) -> _Image:
        """Return what is known of an image, anew where its last failure is long ago: it may have come since."""
        image = known.images.get(image_id)
        has_failed = image is not None and image.tries > 0
        if image is None or not has_failed or now - image.last_failed_at > IN_A_ROW_S:
            image = _Image(now, now, known.served)
            known.images[image_id] = image
        known.images.move_to_end(image_id)
        while len(known.images) > IMAGES_MAX:
            known.images.popitem(last=False)
        return image

    def _host(self, host: str) -> _Host:
        known = self._hosts.setdefault(host, _Host())
        self._hosts.move_to_end(host)
        while len(self._hosts) > HOSTS_MAX:
            self._hosts.popitem(last=False)
        return known
