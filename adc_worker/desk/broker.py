"""The streams in the desk's NATS: one for each job, laid out as Antenna lays them out.

It knows nothing of jobs beyond their number. What a result does to a job is in `state`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import nats
import orjson
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import ConsumerConfig

RECONNECT_S = 0.1  # chosen: tests wait for it
# These three are Antenna's.
EMPTY_FETCH_S = 0.5  # how long it looks for tasks before it answers with none
TASK_LIFETIME_S = 24 * 3600
MAX_ACK_PENDING = 1000
PUBLISH_CHUNK = 200  # chosen: messages under way at once


class _Names(NamedTuple):
    stream: str
    consumer: str
    subject: str


def _names(job_id: int) -> _Names:
    return _Names(f"job_{job_id}", f"job-{job_id}-consumer", f"job.{job_id}.tasks")


@dataclass(slots=True)
class Broker:
    """One NATS connection, used inside one event loop.

    Attributes:
        ack_wait_s, max_deliver: the terms of every job's consumer.
        timeout_s: how long a fetch waits for a lost connection.
    """

    ack_wait_s: float
    max_deliver: int
    timeout_s: float
    _nats: Client = field(init=False, default_factory=Client)

    async def connect(self, url: str) -> None:
        self._nats = await nats.connect(
            url,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_S,
            error_cb=_ignore,
        )

    async def wait_until_connected(self) -> None:
        while not self._nats.is_connected:  # noqa: ASYNC110 - nats-py has no event for it
            await asyncio.sleep(RECONNECT_S / 2)

    async def close(self) -> None:
        await self._nats.close()

    async def create(self, job_id: int, tasks: Sequence[dict[str, str]]) -> None:
        """Make the job's stream and consumer anew and publish `tasks` in order.

        Raises:
            NatsError: NATS is lost.
        """
        if not self._nats.is_connected:
            raise NatsTimeoutError
        await self.delete(job_id)
        names = _names(job_id)
        jetstream = self._nats.jetstream()
        await jetstream.add_stream(
            name=names.stream,
            subjects=[names.subject],
            max_age=TASK_LIFETIME_S,
        )
        # Explicit acknowledgements, delivery of all and instant replay are the defaults.
        terms = ConsumerConfig(
            ack_wait=self.ack_wait_s,
            max_deliver=self.max_deliver,
            max_ack_pending=MAX_ACK_PENDING,
        )
        await jetstream.add_consumer(names.stream, terms, durable_name=names.consumer)
        for start in range(0, len(tasks), PUBLISH_CHUNK):
            chunk = tasks[start : start + PUBLISH_CHUNK]
            published = [jetstream.publish(names.subject, orjson.dumps(task)) for task in chunk]
            await asyncio.gather(*published)

    async def fetch(self, job_id: int, n_tasks: int) -> list[dict[str, str]]:
        """Return up to `n_tasks` tasks, none where the stream is gone.

        Raises:
            TimeoutError: NATS stays out of reach.
        """
        async with asyncio.timeout(self.timeout_s):
            while True:
                # A pull sent while disconnected would wait in the client's buffer and spend
                # deliveries later.
                await self.wait_until_connected()
                with suppress(NatsTimeoutError):  # the connection was lost during the pull
                    return await self._pull(job_id, n_tasks)

    async def acknowledge(self, reply_subject: str) -> None:
        """Send +ACK.

        A wrong subject or a lost connection leaves the task unacknowledged, as on the real server.
        """
        is_subject = reply_subject.startswith("$JS.ACK.") and len(reply_subject.split()) == 1
        if is_subject and self._nats.is_connected:
            with suppress(NatsError):
                await self._nats.publish(reply_subject, b"+ACK")
                await self._nats.flush()

    async def state(self, job_id: int) -> dict[str, Any] | None:
        """Return what JetStream says of a job's consumer; None where there is none."""
        names = _names(job_id)
        reply = await self._nats.request(f"$JS.API.CONSUMER.INFO.{names.stream}.{names.consumer}")
        info: dict[str, Any] = orjson.loads(reply.data)
        return None if "error" in info else info

    async def delete(self, job_id: int) -> None:
        """Remove the job's stream and with it its consumer.

        That there is none, or a lost connection, is no error.
        """
        if self._nats.is_connected:
            with suppress(NatsError):
                await self._nats.jetstream().delete_stream(_names(job_id).stream)

    async def _pull(self, job_id: int, n_tasks: int) -> list[dict[str, str]]:
        names = _names(job_id)
        inbox = self._nats.new_inbox()
        # With `no_wait` what is there comes at once. With `expires`, too, a pull that finds nothing
        # waits until then.
        pull = {"batch": n_tasks, "no_wait": True, "expires": int(EMPTY_FETCH_S * 1e9)}
        tasks: list[dict[str, str]] = []
        subscription = await self._nats.subscribe(inbox)
        try:
            await self._nats.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{names.stream}.{names.consumer}",
                orjson.dumps(pull),
                reply=inbox,
            )
            while len(tasks) < n_tasks:
                message = await subscription.next_msg(timeout=2 * EMPTY_FETCH_S)
                if "Status" in (message.headers or {}):  # no more, expired, or no such consumer
                    break
                task = orjson.loads(message.data)
                task["reply_subject"] = message.reply
                tasks.append(task)
        finally:
            await subscription.unsubscribe()
        return tasks


async def _ignore(_error: Exception) -> None:
    """Do nothing: a lost connection shows in what then fails.

    By default nats-py logs each error with its stack.
    """
