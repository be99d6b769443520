"""Tells systemd, where that started us, that we are ready, how it goes, and that we live (sd_notify(3))."""

from __future__ import annotations

import os
import socket

from adc_worker.log import get_logger

_log = get_logger(__name__)


def notify(*assignments: str) -> None:
    """Send such as "READY=1"; without NOTIFY_SOCKET do nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
        try:
            channel.sendto("\n".join(assignments).encode(), address.replace("@", "\0", 1))
        except OSError as error:
            _log.warning("notify_failed", error=str(error))


def watchdog_period_s() -> float:
    """Return how often to tell systemd that we live: twice per WatchdogSec=, as sd_watchdog_enabled(3) recommends."""
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6 or float("inf")
