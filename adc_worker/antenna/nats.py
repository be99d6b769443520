"""Extends leases and hands tasks back over NATS, where it can be reached. Without it the lease horizon alone holds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from nats.aio.client import Client
from nats.errors import Error as NatsError

from adc_worker.antenna.leases import LeaseTerms, lease_clock, parse_reply_subject
from adc_worker.log import get_logger

_log = get_logger(__name__)

IN_PROGRESS, HAND_BACK = b"+WPI", b"-NAK"
RENEWALS_PER_LEASE = 3  # two may fail before a lease is over
RECONNECT_S = 2
FLUSH_TIMEOUT_S = 5
CLOSE_TIMEOUT_S = 10.0


class LeaseKeeper:
    """A thread with an event loop of its own that extends every lease held, for as long as NATS can be reached.

    A lease is held until Antenna has saved the result: its acknowledgement comes last. `held` returns the leases of
    tasks without an accepted result that are known to be good; `held_count` counts these tasks with those whose leases
    are not known to be. `unsaved` looks at Antenna for those accepted and not saved, and may take long.

    The terms say that all leases began anew only when all of them were extended. Else one that was not would be
    believed to last, and its next delivery would show a wrong ack_wait.
    """

    def __init__(
        self,
        url: str,
        lease: LeaseTerms,
        held: Callable[[], Sequence[str]],
        unsaved: Callable[[], Sequence[str]],
        held_count: Callable[[], int],
    ) -> None:
        parts = urlsplit(url)
        self._url = url
        self._shown = f"{parts.hostname}:{parts.port or 4222}"  # the URL may carry a password
        self._lease = lease
        self._held = held
        self._unsaved = unsaved
        self._held_count = held_count
        self._nats = Client()
        self._warned = False
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    def hand_back(self, subjects: Sequence[str]) -> bool:
        """Give tasks back, so that Antenna hands them out at once; False when NATS cannot be reached."""
        if not self._thread.is_alive():
            return False
        done: Future[bool] = asyncio.run_coroutine_threadsafe(self._publish(subjects, HAND_BACK), self._loop)
        return done.result(CLOSE_TIMEOUT_S)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._keep())
        finally:
            self._loop.close()

    async def _keep(self) -> None:
        connecting = asyncio.create_task(self._connect())
        closing = asyncio.create_task(self._closing.wait())
        try:
            while not closing.done():
                pause_s, started = self._lease.ack_wait_s / RENEWALS_PER_LEASE, lease_clock()
                held = await asyncio.to_thread(self._held)
                held_count = await asyncio.to_thread(self._held_count)
                if not held:  # leases from before a restart are named once it is known that they are good
                    pause_s = min(RECONNECT_S, pause_s)
                if await self._publish(held, IN_PROGRESS):
                    extended = [subject for subject in held if parse_reply_subject(subject)]
                    if extended and len(extended) == held_count:
                        self._lease.renewed_at = started
                    await self._publish(await asyncio.to_thread(self._unsaved), IN_PROGRESS)
                else:
                    pause_s = min(RECONNECT_S, pause_s)
                await asyncio.wait({closing, connecting} if not connecting.done() else {closing}, timeout=pause_s)
                if connecting.done():
                    connecting.result()
        finally:
            connecting.cancel()
            closing.cancel()
            await self._nats.close()

    async def _connect(self) -> None:
        await self._nats.connect(
            self._url,
            max_reconnect_attempts=-1,  # for ever, the first attempt included
            reconnect_time_wait=RECONNECT_S,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_connected,
        )
        await self._on_connected()

    async def _publish(self, subjects: Sequence[str], what: bytes) -> bool:
        """Publish to every subject that is an acknowledgement's; only what is flushed has reached the server.

        A subject is Antenna's word: one of another form could lead anywhere, or break the protocol.
        """
        if not self._nats.is_connected:
            return False
        try:
            for subject in filter(parse_reply_subject, subjects):
                await self._nats.publish(subject, what)
            await self._nats.flush(FLUSH_TIMEOUT_S)
        except (NatsError, OSError) as error:
            await self._on_error(error)
            return False
        _log.debug("leases_renewed" if what == IN_PROGRESS else "tasks_handed_back", tasks=len(subjects))
        return True

    async def _on_error(self, error: Exception) -> None:
        if not self._nats.is_connected and not self._warned:
            self._warned = True
            _log.error(
                "nats_unreachable",
                server=self._shown,
                error=f"{type(error).__name__}: {error}".replace(self._url, self._shown),
                note="check AMI_ANTENNA_NATS_URL; until it can be reached leases are not extended, and tasks must end"
                " within ack_wait",
            )

    async def _on_disconnected(self) -> None:
        if not self._closing.is_set():
            await self._on_error(ConnectionError("the connection was lost"))

    async def _on_connected(self, *_: Any) -> None:
        self._warned = False
        _log.info("nats_connected", server=self._shown)
