"""`DevServer`: an Antenna for the desk, run in a thread of its own, driven by plain calls from any other thread."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import quote

from aiohttp import web

from adc_worker.devserver.app import MEMBER, OUTSIDER, SUPERUSER, Api
from adc_worker.devserver.bodies import Algorithm, Mode, Pipeline
from adc_worker.devserver.broker import Broker, NatsServer
from adc_worker.devserver.state import PROJECT_ID, Capture, Desk, Job

T = TypeVar("T")

HOST = "127.0.0.1"  # the server has no security to speak of
new_token = partial(secrets.token_hex, 20)
CALL_TIMEOUT_S = 60.0
HANDLER_GRACE_S = 0.5  # for requests in flight when the server stops


@dataclass(kw_only=True, repr=False)
class DevServer:
    """`with DevServer() as server:` gives a worker everything it needs; afterwards nothing of it is left."""

    token: str = field(default_factory=new_token)  # the superuser's
    member_token: str = field(default_factory=new_token)  # may only register pipelines
    outsider_token: str = field(default_factory=new_token)  # may only read
    ack_wait_s: float = 300.0
    max_deliver: int = 2
    save_delay_s: float = 0.3  # of one result; they are saved one after the other
    nats_timeout_s: float = 120.0  # how long a fetch waits for a lost NATS before it answers 503
    keep_streams: bool = False  # of finished jobs, for a look at their consumers
    race_at_end: bool = False  # finished jobs stay STARTED until one of their results is posted again
    image_dir: Path = field(default_factory=Path.cwd)  # where image files given by relative path are
    max_body_bytes: int = 100_000_000
    projects: int = 1
    project_id: ClassVar[int] = PROJECT_ID
    port: int = 0  # on 127.0.0.1; 0 lets the system choose

    def __post_init__(self) -> None:
        self._broker = Broker(self.ack_wait_s, self.max_deliver, self.nats_timeout_s)
        self._desk = Desk(self._broker, self.save_delay_s, self.keep_streams, self.race_at_end, self.projects)
        roles = {self.token: SUPERUSER, self.member_token: MEMBER, self.outsider_token: OUTSIDER}
        self._api = Api(self._desk, roles)

    def __enter__(self) -> Self:
        # The loop is made here, and told to stop before it is waited for: an interrupt may come at any moment.
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop, self._stop, self._ready = self._runner.get_loop(), asyncio.Event(), Future[None]()
        with ExitStack() as stack:
            thread = stack.enter_context(ThreadPoolExecutor(1, "devserver"))
            stack.callback(self._tell_to_stop)
            self._ended = thread.submit(self._run)
            wait((self._ready, self._ended), return_when=FIRST_COMPLETED)
            if self._ended.done():
                self._ended.result()
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()
        self._ended.result()

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
        """Requests so far by method and route, such as "GET jobs", "POST tasks", "POST result", "GET images"."""
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

        Images are files, served from here (one that does not exist answers 404), or http addresses, handed out as they
        are. Algorithms are names, keys and task types; a pipeline with none takes results of any algorithm.
        """
        known = [Algorithm(name=name, key=key, task_type=task_type) for name, key, task_type in algorithms]
        pipeline = Pipeline(name=pipeline_slug, slug=pipeline_slug, version=1, algorithms=known)
        collection = next(self._desk.ids)
        captures = [self._capture(collection, image) for image in images]
        return self._wait_for(self._desk.add_job(pipeline, captures, dispatch_mode))

    def job(self, job_id: int) -> Job:
        """Return a job as it is at this moment: a copy, of what goes on changing."""
        return self._call(self._desk.jobs[job_id].snapshot)

    def consumer_info(self, job_id: int) -> dict[str, Any] | None:
        """Return what JetStream counts, such as `num_ack_pending`; None for a job without a stream.

        It has none when it is finished (see `keep_streams`), cancelled or not started.
        """
        return self._wait_for(self._broker.state(job_id))

    def cancel(self, job_id: int) -> None:
        self._wait_for(self._desk.cancel(self._desk.jobs[job_id]))

    def retry(self, job_id: int) -> None:
        """Start the job again, from nothing: a new stream of the old name."""
        self._wait_for(self._desk.retry(self._desk.jobs[job_id]))

    def services(self) -> dict[str, set[int]]:
        """Return the names that workers registered under, and with which projects."""
        return self._call(lambda: dict(self._desk.services))

    def pipeline(self, slug: str) -> dict[str, Any]:
        """Return what is registered under a slug."""
        return self._call(self._desk.pipelines[slug].model_dump)

    def kill_nats(self, *, wipe: bool = False) -> None:
        """As kill -9 does; the store stays, unless it is to be wiped."""
        self._nats.kill(wipe=wipe)

    def delete_stream(self, job_id: int) -> None:
        self._wait_for(self._broker.delete(job_id))

    def start_nats(self) -> None:
        """After `kill_nats`: the same port, the same store."""
        self._call(self._nats.start)
        self._wait_for(self._broker.connected())

    def _capture(self, collection: int, image: Path | str) -> Capture:
        number = next(self._desk.ids)
        if str(image).startswith(("http://", "https://")):
            return Capture(number, collection, str(image), None)
        file = self.image_dir / image
        return Capture(number, collection, f"{self.url}/images/{number}/{quote(file.name)}", file)

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self._wait_for(call())

    def _wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_TIMEOUT_S)

    def _tell_to_stop(self) -> None:
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self) -> None:
        with self._runner:
            self._runner.run(self._serve())

    async def _serve(self) -> None:
        http = web.AppRunner(self._api.build(self.max_body_bytes), access_log=None, shutdown_timeout=HANDLER_GRACE_S)
        with tempfile.TemporaryDirectory(prefix="adc-devserver-") as folder:
            self._nats = NatsServer(Path(folder))
            try:
                self._nats.start()
                await self._broker.connect(self._nats.url)
                await http.setup()
                await web.TCPSite(http, HOST, self.port).start()
                self.port = http.addresses[0][1]
                self._ready.set_result(None)
                tasks = [asyncio.create_task(work) for work in (self._stop.wait(), self._desk.save_for_ever())]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await http.cleanup()
                await self._broker.close()
                self._nats.kill()
        for task in done:
            task.result()  # raises what ended the saving, if anything did
