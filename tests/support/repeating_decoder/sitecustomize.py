"""Put on PYTHONPATH, it makes a decode process send every answer twice: the second one comes late."""

from __future__ import annotations

import socket
import sys
from typing import Any


class RepeatingSocket(socket.socket):
    """Sends what it is to send, and then the same once more."""

    def send(self, data: Any, *flags: int) -> int:
        super().send(data, *flags)
        return super().send(data, *flags)


if "adc_worker.ingest.decode_worker" in sys.orig_argv:
    socket.socket = RepeatingSocket  # type: ignore[misc]
