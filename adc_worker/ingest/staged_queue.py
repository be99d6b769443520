"""Staged images on their way from the downloads to whoever decodes next: the probe first, then the feeder."""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Callable
from dataclasses import replace

from adc_worker.ingest.staging import StagedImage


class StagedQueue:
    """Images by their age, with an end; one reader at a time waits for `changed`, which guards them.

    Attributes:
        still_wanted: settles an image whose lease is over, and says so, before it is decoded.
        images: the oldest first; what is taken out is the reader's.
        ended: whether no image will follow.
    """

    def __init__(self, still_wanted: Callable[[StagedImage], bool] | None = None) -> None:
        self.still_wanted = still_wanted or (lambda _image: True)
        self.changed = threading.Condition()
        self.images: list[StagedImage] = []
        self.ended = False

    def put(self, image: StagedImage, *, urgent: bool = False) -> None:
        """Add an image, or give one back; an urgent one (on its last delivery) goes before all others."""
        with self.changed:
            insort(self.images, replace(image, staged_at=0.0) if urgent else image, key=lambda one: one.staged_at)
            self.changed.notify_all()

    def end(self) -> None:
        """Say that no image will follow."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def get(self) -> StagedImage | None:
        """Wait for the next image; None at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.images or self.ended)
            return self.images.pop(0) if self.images else None

    def waiting(self) -> list[StagedImage]:
        """Look at what is there; it stays."""
        with self.changed:
            return list(self.images)
