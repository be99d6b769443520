"""`DevServer`: an Antenna for the desk.

It runs in a thread of its own and is driven by plain calls from any other thread.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import quote

import anyio
from aiohttp import web
from anyio.from_thread import start_blocking_portal

from adc_worker.desk.app import MEMBER, OUTSIDER, SUPERUSER, Api
from adc_worker.desk.bodies import Algorithm, Mode, Pipeline
from adc_worker.desk.broker import Broker
from adc_worker.desk.job import PROJECT_ID, Capture, Job
from adc_worker.desk.nats_server import NatsServer
from adc_worker.desk.state import Desk

HOST = "127.0.0.1"  # the server is for this machine only: nothing in it is secured
HANDLER_GRACE_S = 0.5  # chosen: for requests that are not answered when the server stops


def new_token() -> str:
    return secrets.token_hex(20)


@dataclass(kw_only=True, repr=False)
class DevServer:
    """An Antenna with all that a worker needs: `with DevServer() as server:`. Nothing of it stays.

    Attributes:
        token: the superuser's.
        member_token: may only register pipelines.
        outsider_token: may only read.
        save_delay_s: what saving one result takes; results are saved one after the other.
        nats_timeout_s: how long a fetch waits for a lost NATS before it answers 503.
        keep_streams: of finished jobs, so that their consumers can be looked at.
        race_at_end: finished jobs stay STARTED until one of their results is posted again.
        image_dir: where image files given by a relative path are.
        port: on 127.0.0.1; with 0 the system chooses one.
    """

    token: str = field(default_factory=new_token)
    member_token: str = field(default_factory=new_token)
    outsider_token: str = field(default_factory=new_token)
    ack_wait_s: float = 300.0
    max_deliver: int = 2
    save_delay_s: float = 0.3
    nats_timeout_s: float = 120.0
    keep_streams: bool = False
    race_at_end: bool = False
    image_dir: Path = field(default_factory=Path.cwd)
    max_body_bytes: int = 100_000_000
    projects: int = 1
    project_id: ClassVar[int] = PROJECT_ID
    port: int = 0

    def __post_init__(self) -> None:
        self._broker = Broker(self.ack_wait_s, self.max_deliver, self.nats_timeout_s)
        self._desk = Desk(
            self._broker,
            self.save_delay_s,
            self.keep_streams,
            self.race_at_end,
            self.projects,
        )
        roles = {
            self.token: SUPERUSER,
            self.member_token: MEMBER,
            self.outsider_token: OUTSIDER,
        }
        self._api = Api(self._desk, roles)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            serving = self._portal.wrap_async_context_manager(self._serving())
            stack.enter_context(serving)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.url}/api/v2"

    @property
    def nats_url(self) -> str:
        return self._nats.url

    @property
    def requests(self) -> dict[str, int]:
        """Requests so far by method and route, such as "GET jobs", "POST tasks" or "GET images"."""
        return dict(self._api.requests)

    def add_job(
        self,
        pipeline_slug: str,
        images: Iterable[Path | str],
        *,
        dispatch_mode: Mode = "async_api",
        algorithms: Sequence[tuple[str, str, str]] = (),
    ) -> int:
        """Publish a job of these images, in this order, and start it.

        Args:
            pipeline_slug: the pipeline's; it is made when it does not exist yet.
            images: files, served from here (one that does not exist answers 404), or HTTP
                addresses, handed out as they are.
            dispatch_mode: only tasks of an async_api job can be fetched.
            algorithms: name, key and task type of each; a pipeline with none takes results of any.
        """
        known = []
        for name, key, task_type in algorithms:
            known.append(Algorithm(name=name, key=key, task_type=task_type))
        pipeline = Pipeline(name=pipeline_slug, slug=pipeline_slug, version=1, algorithms=known)
        collection = next(self._desk.ids)
        captures = [self._capture(collection, image) for image in images]
        return self._portal.call(self._desk.add_job, pipeline, captures, dispatch_mode)

    def job(self, job_id: int) -> Job:
        """Return a job as it is now: a copy that no longer changes."""
        return self._portal.call(self._desk.jobs[job_id].snapshot)

    def consumer_info(self, job_id: int) -> dict[str, Any] | None:
        """Return what JetStream counts, such as `num_ack_pending`; None for a job without a stream.

        A job has none when it is finished (see `keep_streams`), cancelled or not started.
        """
        found: dict[str, Any] | None = self._portal.call(self._broker.state, job_id)
        return found

    def cancel(self, job_id: int) -> None:
        self._portal.call(self._desk.cancel, self._desk.jobs[job_id])

    def retry(self, job_id: int) -> None:
        """Start the job again without its results: a new stream of the old name."""
        self._portal.call(self._desk.retry, self._desk.jobs[job_id])

    def services(self) -> dict[str, set[int]]:
        """Return the names that workers registered under, each with its projects."""
        return self._portal.call(dict, self._desk.services)

    def pipeline(self, slug: str) -> dict[str, Any]:
        """Return what is registered under a slug."""
        return self._portal.call(self._desk.pipelines[slug].model_dump)

    def kill_nats(self, *, wipe: bool = False) -> None:
        """End NATS as kill -9 does; its store stays unless `wipe` is set."""
        self._nats.kill(wipe=wipe)

    def delete_stream(self, job_id: int) -> None:
        self._portal.call(self._broker.delete, job_id)

    def start_nats(self) -> None:
        """Start NATS after `kill_nats`: at the same port, with the same store."""
        self._portal.call(self._nats.start)
        self._portal.call(self._broker.wait_until_connected)

    def _capture(self, collection: int, image: Path | str) -> Capture:
        number = next(self._desk.ids)
        if str(image).startswith(("http://", "https://")):
            return Capture(number, collection, str(image), None)
        file = self.image_dir / image
        url = f"{self.url}/images/{number}/{quote(file.name)}"
        return Capture(number, collection, url, file)

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        http = web.AppRunner(
            self._api.build(self.max_body_bytes),
            access_log=None,
            shutdown_timeout=HANDLER_GRACE_S,
        )
        with tempfile.TemporaryDirectory(prefix="adc-devserver-") as folder:
            self._nats = NatsServer(Path(folder))
            try:
                self._nats.start()
                await self._broker.connect(self._nats.url)
                await http.setup()
                await web.TCPSite(http, HOST, self.port).start()
                self.port = http.addresses[0][1]
                async with anyio.create_task_group() as saving:  # an error of the task ends the body
                    saving.start_soon(self._desk.save_forever)
                    yield
                    saving.cancel_scope.cancel()
            finally:
                with anyio.CancelScope(shield=True):
                    await http.cleanup()
                    await self._broker.close()
                self._nats.kill()
