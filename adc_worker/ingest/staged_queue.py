"""Staged images on their way from the downloads to whoever decodes next: the probe first, then the feeder."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from adc_worker.ingest.staging import StagedImage


class StagedQueue:
    """A queue that can be waited on by one reader at a time, and that has an end."""

    def __init__(self, still_wanted: Callable[[StagedImage], bool] | None = None) -> None:
        """Make a queue; `still_wanted` settles an image whose lease is over, and says so, before it is decoded."""
        self.still_wanted = still_wanted or (lambda _image: True)
        self._changed = threading.Condition()
        self._images: deque[StagedImage] = deque()
        self._ended = False
        self._listener: Callable[[], None] | None = None

    def put(self, image: StagedImage, *, urgent: bool = False) -> None:
        """Append an image; an urgent one (on its last delivery) goes to the front, here and in the feeder."""
        with self._changed:
            if urgent:
                self._images.appendleft(replace(image, staged_at=0.0))
            else:
                self._images.append(image)
        self._notify()

    def put_back(self, images: Sequence[StagedImage]) -> None:
        """Give images back that were taken and not used; they come out again in this order, before all others."""
        with self._changed:
            self._images.extendleft(reversed(images))
        self._notify()

    def end(self) -> None:
        """Say that no image will follow."""
        with self._changed:
            self._ended = True
        self._notify()

    def get(self) -> StagedImage | None:
        """Wait for the next image; None at the end."""
        with self._changed:
            while not self._images and not self._ended:
                self._changed.wait()
            return self._images.popleft() if self._images else None

    def take_all(self) -> tuple[list[StagedImage], bool]:
        """Take what is there without waiting, and say whether that was the end."""
        with self._changed:
            images = list(self._images)
            self._images.clear()
            return images, self._ended

    def waiting(self) -> list[StagedImage]:
        """Look at what is there; it stays."""
        with self._changed:
            return list(self._images)

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call `listener` after every change, from the thread that made it."""
        with self._changed:
            self._listener = listener

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listener = self._listener
        if listener is not None:
            listener()
