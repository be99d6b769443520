"""`DevServer`: an Antenna for the desk, run in a thread of its own, driven by plain calls from any other thread."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import threading
from collections import deque
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote

from aiohttp import web

from adc_worker.devserver.app import LOSE_ANSWER, MEMBER, OUTSIDER, SUPERUSER, Api
from adc_worker.devserver.broker import Broker, ConsumerState, NatsServer
from adc_worker.devserver.images import ImageFault, ImageHost
from adc_worker.devserver.lifecycle import Lifecycle
from adc_worker.devserver.state import Capture, Desk, JobView, Project

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

T = TypeVar("T")

CALL_TIMEOUT_S = 60.0
HANDLER_GRACE_S = 0.5  # for requests in flight when the server stops


def _new_token() -> str:
    return secrets.token_hex(20)


@dataclass(kw_only=True, slots=True, repr=False)
class DevServer:
    """`with DevServer() as server:` gives a worker everything it needs; afterwards nothing of it is left.

    Attributes:
        token: the superuser's; `member_token` may only register pipelines, `outsider_token` may only read.
        ack_wait_s, max_deliver: terms of every job's consumer.
        save_delay_s: how long saving one result takes; results are saved one after the other.
        nats_timeout_s: how long a fetch waits for a lost NATS before it answers 503.
        keep_streams: keep the streams of finished jobs, for a look at their consumers.
        race_at_end: finished jobs stay STARTED until one of their results is posted again.
        image_dir: where image files given by relative path are.
        image_latency_s, image_bytes_per_s: before each image, and of each connection.
        host: loopback addresses only.
        port: 0 lets the system choose.

    Raises:
        ValueError: `host` is not a loopback address.
        FileNotFoundError: nats-server is not installed.
    """

    token: str = field(default_factory=_new_token)
    member_token: str = field(default_factory=_new_token)
    outsider_token: str = field(default_factory=_new_token)
    ack_wait_s: float = 300.0
    max_deliver: int = 2
    save_delay_s: float = 0.3
    nats_timeout_s: float = 120.0
    keep_streams: bool = False
    race_at_end: bool = False
    image_dir: Path = field(default_factory=Path.cwd)
    image_latency_s: float = 0.0
    image_bytes_per_s: float | None = None
    max_body_bytes: int = 100_000_000
    host: str = "127.0.0.1"
    port: int = 0
    project_id: int = field(init=False)  # the public project that jobs belong to unless told otherwise
    _desk: Desk = field(init=False, default_factory=Desk)
    _api: Api = field(init=False)
    _broker: Broker = field(init=False)
    _lifecycle: Lifecycle = field(init=False)
    _nats: NatsServer = field(init=False)
    _loop: asyncio.AbstractEventLoop = field(init=False)
    _stop: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _thread: threading.Thread = field(init=False)
    _ready: Future[None] = field(init=False, default_factory=Future)
    _ended: Future[None] = field(init=False, default_factory=Future)

    def __post_init__(self) -> None:
        if not IPv4Address(self.host).is_loopback:
            raise ValueError(f"the desk server has no security to speak of: {self.host} is not a loopback address")
        self.project_id = self._desk.add_project("Desk").id
        self._thread = threading.Thread(target=self._run, name="devserver", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self._shut_down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._shut_down()
        self._ended.result()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.url}/api/v2"

    @property
    def nats_url(self) -> str:
        return self._nats.url

    @property
    def requests(self) -> dict[str, int]:
        """Requests so far by method and route, such as "GET jobs", "POST tasks", "POST result", "GET images"."""
        return dict(self._api.requests)

    def add_project(self, name: str, *, draft: bool = False) -> int:
        """Another project; drafts and their jobs show to the superuser only."""
        return self._call(lambda: self._desk.add_project(name, draft=draft).id)

    def add_job(
        self,
        pipeline_slug: str,
        images: Iterable[Path | str],
        *,
        dispatch_mode: str = "async_api",
        algorithms: Sequence[tuple[str, str, str]] = (),
        project_id: int | None = None,
        width_px: int | None = None,
        height_px: int | None = None,
    ) -> int:
        """Publish a job of these images, in this order, and start it.

        Images are files, served from here (one that does not exist answers 404), or http addresses, handed out as they
        are. Algorithms, each a name, key and task type, are registered on the pipeline; one on which nobody registered
        any takes results of any algorithm.
        """

        async def add() -> int:
            project = self._desk.projects[project_id or self.project_id]
            pipeline = self._desk.pipeline(pipeline_slug)
            for name, key, task_type in algorithms:
                pipeline.algorithms[key] = {"name": name, "key": key, "task_type": task_type}
            collection_id = self._desk.new_id()
            captures = [self._add_capture(image, project, collection_id, width_px, height_px) for image in images]
            job = self._desk.add_job(f"desk {pipeline_slug}", project, pipeline, captures, dispatch_mode)
            await self._lifecycle.start(job)
            return job.id

        return self._wait_for(add())

    def job(self, job_id: int) -> JobView:
        return self._call(self._desk.jobs[job_id].view)

    def consumer_info(self, job_id: int) -> ConsumerState | None:
        """None when the job has no stream: finished (see `keep_streams`), cancelled or not started."""
        return self._wait_for(self._broker.state(job_id))

    def cancel(self, job_id: int) -> None:
        self._wait_for(self._lifecycle.cancel(self._desk.jobs[job_id]))

    def retry(self, job_id: int) -> None:
        """Start the job again, from nothing: a new stream of the old name."""
        self._wait_for(self._lifecycle.retry(self._desk.jobs[job_id]))

    def fail_next(self, route: str, status: int, *, times: int = 1) -> None:
        """Answer the next requests for a route, such as "POST tasks", with an HTML page of this status."""
        faults = self._api.faults.setdefault(route, deque())
        self._call(lambda: faults.extend([status] * times))

    def lose_next_answer(self, route: str, *, times: int = 1) -> None:
        """Do what the next requests ask, then close their connections without an answer."""
        self.fail_next(route, LOSE_ANSWER, times=times)

    def fail_image(self, file_name: str, fault: ImageFault) -> None:
        self._call(lambda: self._api.images.faults.update({file_name: fault}))

    def kill_nats(self) -> None:
        """As kill -9 does; the store stays."""
        self._call(self._nats.kill)

    def start_nats(self) -> None:
        """After `kill_nats`: the same port, the same store."""
        self._call(self._nats.start)
        self._wait_for(self._broker.connected())

    def _add_capture(
        self, image: Path | str, project: Project, collection_id: int, width_px: int | None, height_px: int | None
    ) -> Capture:
        number = self._desk.new_id()
        file, url, size_bytes = None, str(image), None
        if not url.startswith(("http://", "https://")):
            file = self.image_dir / image
            url = f"{self.url}/images/{number}/{quote(file.name)}"
            size_bytes = file.stat().st_size if file.is_file() else None
        capture = Capture(number, project.id, collection_id, url, file, width_px, height_px, size_bytes)
        self._desk.captures[number] = capture
        return capture

    def _call(self, function: Callable[[], T]) -> T:
        """Run `function` in the server's thread."""

        async def call() -> T:
            return function()

        return self._wait_for(call())

    def _wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_TIMEOUT_S)

    def _shut_down(self) -> None:
        wait([self._ready])  # an interrupt during the start must not leave a server that nobody stops
        with suppress(RuntimeError):  # its loop is closed already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for this thread
            if not self._ready.done():
                self._ready.set_exception(error)
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._broker = Broker(ack_wait_s=self.ack_wait_s, max_deliver=self.max_deliver, timeout_s=self.nats_timeout_s)
        self._lifecycle = Lifecycle(self._broker, self.save_delay_s, self.keep_streams, self.race_at_end)
        with tempfile.TemporaryDirectory(prefix="adc-devserver-") as folder:
            self._nats = NatsServer(Path(folder))
            try:
                self._nats.start()
                await self._broker.connect(self._nats.url)
                await self._serve_http()
            finally:
                await self._broker.close()
                self._nats.kill()

    async def _serve_http(self) -> None:
        roles = {self.token: SUPERUSER, self.member_token: MEMBER, self.outsider_token: OUTSIDER}
        images = ImageHost(self.image_latency_s, self.image_bytes_per_s)
        self._api = Api(self._desk, self._lifecycle, images, roles)
        app = self._api.build(self.max_body_bytes)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=HANDLER_GRACE_S)
        await runner.setup()
        saver = asyncio.create_task(self._lifecycle.save_for_ever())
        try:
            await web.TCPSite(runner, self.host, self.port).start()
            self.port = runner.addresses[0][1]
            self._ready.set_result(None)
            stopped = asyncio.create_task(self._stop.wait())
            await asyncio.wait({saver, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await runner.cleanup()
        if not stopped.done():
            stopped.cancel()
            saver.result()  # raises what ended it
        saver.cancel()
