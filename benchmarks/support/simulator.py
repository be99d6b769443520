"""A discrete-event model of a worker: what a way to feed it brings on a given link, machine and job.

Its model of the world is its own: it imports nothing of the package. Link and cores are shared equally by what runs on
them; a download pays latency, connection set-up and a window per round trip; batches are formed, admitted and freed as
`ingest/feeder.py` does it. Seconds, bytes and pixels throughout.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Protocol

PIXEL_BYTES = 3
# RESULTS.md, "Decoders" (30 ms for 8.8 Mpx in 1.6 MB, 222 ms for 12.6 Mpx in 28 MB) and "Download" (CPU).
DECODE_S_PER_PX, DECODE_S_PER_BYTE, SCRATCH_BYTES_PER_PX = 2.1e-9, 7e-9, 0.4
DOWNLOAD_CPU_S, DOWNLOAD_CPU_S_PER_BYTE = 2e-3, 1e-9
WINDOW_BYTES = 4_000_000.0  # a connection has this much under way at most (Linux: tcp_wmem)
FIRST_WINDOW_BYTES = 14_600.0  # ten segments, doubled with every round trip (RFC 6928)
HANDSHAKE_ROUND_TRIPS = 3  # TCP and TLS
JITTER = 0.2  # of a round trip
FETCH_S, EMPTY_FETCH_S = 0.12, 0.6  # Antenna's answers to a fetch
POST_S, SAVE_S = 0.2, 0.9  # until a result is accepted, and saved
RETRY_S, RETRY_MAX_S = 0.5, 20.0
BYTES_PER_S_TO_DEVICE = 6e9
KEEP_S = 1.8e-3  # per image, beside inference: RESULTS.md, "Ingest", 40 ms of GPU at 23.8 and 23.9 images/s
PROBE_DOWNLOADS = 4  # what runs while the first images are measured
# An ingest as `baseline.py`: float32 tensors made by Pillow and ToTensor, in loader processes.
TENSOR_BYTES_PER_PX = 12
PILLOW_FACTOR, TENSOR_S_PER_PX = 1.8, 20e-9  # RESULTS.md, "Decoders": large; ToTensor and collate, per pixel
LOADER_BYTES, LOADER_DOWNLOADS = 400_000_000, 8  # a process with torch; its download threads
_SLACK_S = 1e-9


@dataclass(frozen=True, slots=True)
class Photo:
    """One image of a job."""

    width_px: int
    height_px: int
    compressed_bytes: int
    cost: float = 1.0  # of its decode, compared to a baseline JPEG

    @property
    def px(self) -> int:
        return self.width_px * self.height_px

    @property
    def pixel_bytes(self) -> int:
        return PIXEL_BYTES * self.px

    @property
    def decode_s(self) -> float:
        return self.cost * (DECODE_S_PER_PX * self.px + DECODE_S_PER_BYTE * self.compressed_bytes)

    @property
    def scratch_bytes(self) -> int:
        return int(SCRATCH_BYTES_PER_PX * self.px)


@dataclass(frozen=True, slots=True)
class World:
    """A job, and what there is to work it off with.

    Attributes:
        photos: the job's images in the order of their tasks.
        link_bytes_per_s: all connections together.
        connection_bytes_per_s: one connection, at most; where a server limits it.
        latency_s: one round trip, with what the server takes to answer.
        failure_share: downloads that fail and are tried again.
        inference_s: per image, beside its way to the device.
        batch_s: per batch, however large: keep results, log.
        image_cpu_s, batch_cpu_s: what the cores do for an image, and for a batch, that nothing waits for.
        touch_s_per_byte: CPU seconds to write to memory of the arena for the first time; 0 in jobs so long that it does
            not count.
        warm_up_s: what the first inference takes on top.
        inference_bytes_per_px: host memory of inference.
        cores_together: what all cores do at once, compared to one alone; less than their number where two of them are
            threads of one. None: their number.
        base_bytes: the process with its models.
    """

    photos: tuple[Photo, ...]
    link_bytes_per_s: float
    latency_s: float
    failure_share: float
    inference_s: float
    cores: int
    memory_bytes: int
    ack_wait_s: float
    seed: int = 0
    connection_bytes_per_s: float = math.inf
    batch_s: float = 0.001
    warm_up_s: float = 0.0
    inference_bytes_per_px: float = 3.0
    images_per_call: int = 8
    base_bytes: int = 600_000_000
    fetch_s: float = FETCH_S
    bytes_per_s_to_device: float = BYTES_PER_S_TO_DEVICE
    handshake_round_trips: float = HANDSHAKE_ROUND_TRIPS
    download_cpu_s: float | None = None  # of a download, its server included, where that was measured
    keep_s: float = KEEP_S
    image_cpu_s: float = 0.0
    batch_cpu_s: float = 0.0
    touch_s_per_byte: float = 0.0
    cores_together: float | None = None

    def core_speed(self, jobs: int) -> float:
        """Return how fast each of so many jobs runs, compared to one alone."""
        loss = 1 - (self.cores_together or self.cores) / self.cores  # of each core's speed, when all are busy
        busy = min(jobs, self.cores)
        return (1 - loss * (busy - 1) / max(1, self.cores - 1)) * busy / jobs

    def inference_bytes(self, images: Iterable[Photo]) -> int:
        return int(self.inference_bytes_per_px * sum(photo.px for photo in list(images)[: self.images_per_call]))

    @property
    def roofline(self) -> float:
        """Images per second that link, cores and GPU could each reach alone: the least of them."""
        number = len(self.photos)
        size_bytes = sum(photo.compressed_bytes for photo in self.photos)
        cpu_s = sum(photo.decode_s + self.cpu_s(photo) for photo in self.photos)
        gpu_s = sum(self.gpu_s(photo) + self.keep_s for photo in self.photos)
        return number / max(size_bytes / self.link_bytes_per_s, cpu_s / (self.cores_together or self.cores), gpu_s)

    def cpu_s(self, photo: Photo) -> float:
        """CPU seconds of a download."""
        if self.download_cpu_s is not None:
            return self.download_cpu_s
        return DOWNLOAD_CPU_S + DOWNLOAD_CPU_S_PER_BYTE * photo.compressed_bytes

    def gpu_s(self, photo: Photo) -> float:
        return self.inference_s + photo.pixel_bytes / self.bytes_per_s_to_device


@dataclass(frozen=True, slots=True)
class Feed:
    """A way to feed a worker; the counterpart of a plan."""

    batch_size: int
    batch_bytes: int
    prefetch: int
    decode_workers: int
    arena_bytes: int
    scratch_bytes: int
    downloads: int
    in_hand: int
    fetch_size: int
    held_limit: int
    batch_wait_s: float


class Arrivals(Protocol):
    """How far fetching may run ahead of the downloads; the worker's `ArrivalWatch` can be given."""

    def fetched(self, task: int, now: float) -> None: ...
    def tried(self, task: int, now: float, size_bytes: int = 0) -> None: ...
    def room(self, now: float) -> int: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What one batch showed; times are means per image."""

    photo: Photo  # the largest
    images: int
    first_byte_s: float
    download_s: float
    decode_s: float
    inference_s: float
    keep_s: float  # of the batch
    elapsed_s: float  # since the batch before
    ready: bool
    waiting: int
    memory_bytes: int
    arena_bytes: int
    at_s: float
    staged_per_s: float  # downloads that ended, per second since the batch before


@dataclass(slots=True)
class Outcome:
    """How a job went."""

    wall_s: float = 0.0
    images: int = 0
    peak_bytes: int = 0
    expired: int = 0
    batches: list[Seen] = field(default_factory=list)
    out_of_memory: bool = False

    @property
    def images_per_s(self) -> float:
        return self.images / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def steady_per_s(self) -> float:
        """Images per second between the batches that complete the first and the third quarter."""
        out, first = 0, None
        for batch in self.batches:
            out += batch.images
            if first is None and 4 * out >= self.images:
                first = batch.at_s, out
            elif first is not None and 4 * out >= 3 * self.images:
                return (out - first[1]) / (batch.at_s - first[0])
        return self.images_per_s


class _Events:
    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._number), action))

    def run(self) -> None:
        while self._heap:
            self.now, _number, action = heapq.heappop(self._heap)
            action()


class _Shared:
    """What several jobs use at once: each of n of them gets `rate(n)`."""

    def __init__(self, events: _Events, rate: Callable[[int], float]) -> None:
        self._events = events
        self._rate_of = rate
        self._served = self._at_s = 0.0  # what a job present all along has got, until when
        self._jobs: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._version = 0

    def add(self, work: float, action: Callable[[], None]) -> None:
        self._advance()
        heapq.heappush(self._jobs, (self._served + work, next(self._number), action))
        self._schedule()

    def _rate(self) -> float:
        return self._rate_of(len(self._jobs))

    def _advance(self) -> None:
        if self._jobs:
            self._served += (self._events.now - self._at_s) * self._rate()
        self._at_s = self._events.now

    def _schedule(self) -> None:
        self._version += 1
        if self._jobs:
            left = max(0.0, self._jobs[0][0] - self._served)
            self._events.after(left / self._rate(), partial(self._fire, self._version))

    def _fire(self, version: int) -> None:
        if version == self._version:
            self._advance()
            _end, _number, action = heapq.heappop(self._jobs)
            self._schedule()
            action()


@dataclass(slots=True, eq=False)
class _Image:
    photo: Photo
    fetched_s: float
    started_s: float = 0.0
    set_up_s: float = 0.0  # of its connection
    first_byte_s: float = 0.0
    staged_s: float = 0.0
    decode_started_s: float = 0.0
    decoded_s: float = 0.0
    retry_s: float = RETRY_S
    number: int = 0


class _Link:
    """Downloads: a connection that is new pays its set-up and a slow start. `tried` hears of each attempt."""

    def __init__(self, world: World, events: _Events, cores: _Shared, tried: Callable[[_Image, int], None]) -> None:
        self._world, self._events, self._cores, self._tried = world, events, cores, tried
        window = WINDOW_BYTES / max(world.latency_s, 1e-6)
        most = min(window, world.connection_bytes_per_s)
        self.shared = _Shared(events, lambda downloads: min(most, world.link_bytes_per_s / downloads))
        self._random = random.Random(world.seed)  # noqa: S311 (a seed, no secret)
        self._idle = 0

    def download(self, image: _Image, done: Callable[[_Image], None]) -> None:
        image.set_up_s = 0.0
        image.started_s = self._events.now  # of the attempt that succeeds: the worker measures that one, too
        round_trips = 1.0
        if self._idle:
            self._idle -= 1
        else:
            window = min(WINDOW_BYTES, image.photo.compressed_bytes)
            if self._world.handshake_round_trips:  # else the round trip is a server's pause, not the network's
                slow_start = math.log2(max(1.0, window / FIRST_WINDOW_BYTES))
                round_trips += self._world.handshake_round_trips + slow_start
                image.set_up_s = self._world.handshake_round_trips * self._world.latency_s
        jitter = self._random.uniform(
            1 - JITTER, 1 + JITTER
        )  # else downloads that begin together stay in step for ever
        self._events.after(jitter * round_trips * self._world.latency_s, partial(self._answered, image, done))

    def _answered(self, image: _Image, done: Callable[[_Image], None]) -> None:
        if self._random.random() < self._world.failure_share:
            self._tried(image, 0)
            self._events.after(image.retry_s * self._random.uniform(0.5, 1.0), partial(self.download, image, done))
            image.retry_s = min(2 * image.retry_s, RETRY_MAX_S)
            return
        image.first_byte_s = self._events.now - image.started_s
        self.shared.add(image.photo.compressed_bytes, partial(self._received, image, done))

    def _received(self, image: _Image, done: Callable[[_Image], None]) -> None:
        self._idle += 1
        self._cores.add(self._world.cpu_s(image.photo), partial(self._staged, image, done))

    def _staged(self, image: _Image, done: Callable[[_Image], None]) -> None:
        image.staged_s = self._events.now
        self._tried(image, image.photo.compressed_bytes)
        done(image)


@dataclass(slots=True, eq=False)
class _Batch:
    images: list[_Image]
    size_bytes: int
    left: int = 0
    touch_s: float = 0.0  # per image


class _Ingest:
    """One job on its way through link, arena, decoders and GPU."""

    def __init__(
        self,
        world: World,
        feed: Feed,
        control: Callable[[Seen], Feed | None] | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        self._world, self._feed, self._control, self._arrivals = world, feed, control, arrivals
        self._events = _Events()
        self._cores = _Shared(self._events, world.core_speed)
        self._link = _Link(world, self._events, self._cores, self._tried)
        self._photos = deque(world.photos)
        self._to_download: deque[_Image] = deque()
        self._downloading = self._in_hand = self._held = 0
        self._fetching = self._drained = False
        self._waiting: dict[tuple[int, int], deque[_Image]] = {}
        self._admitting: _Batch | None = None
        self._in_arena: set[_Batch] = set()
        self._arena_bytes = self._arena_peak = self._scratch_bytes = self._inference_bytes = 0
        self._ready: deque[_Batch] = deque()
        self._ahead = 0
        self._decode_queue: deque[tuple[_Batch, _Image]] = deque()
        self._decoding = self._busy_decoders = 0
        self._gpu_busy = False
        self._idle_since_s = self._last_out_s = 0.0
        self._downloaded = 0
        self.images: list[_Image] = []
        self.outcome = Outcome()

    def run(self) -> Outcome:
        self._intake()
        self._events.run()
        self.outcome.out_of_memory = self.outcome.peak_bytes > self._world.memory_bytes
        return self.outcome

    # --- from Antenna to the disk

    def _intake(self) -> None:
        while self._to_download and self._downloading < self._feed.downloads:
            self._downloading += 1
            self._link.download(self._to_download.popleft(), self._staged)
        room = min(
            self._feed.in_hand - self._in_hand,
            self._feed.held_limit - self._held,
            self._arrivals.room(self._events.now) if self._arrivals else self._feed.in_hand,
        )
        if not self._fetching and not self._drained and room >= 1:
            self._fetching = True
            wanted = min(self._feed.fetch_size, room)
            delay_s = self._world.fetch_s if self._photos else EMPTY_FETCH_S
            self._events.after(delay_s, partial(self._fetched, wanted, self._events.now))

    def _fetched(self, wanted: int, sent_s: float) -> None:
        self._fetching = False
        images = [_Image(self._photos.popleft(), sent_s) for _ in range(min(wanted, len(self._photos)))]
        for image in images:
            image.number = len(self.images)
            self.images.append(image)
            if self._arrivals:
                self._arrivals.fetched(image.number, self._events.now)
        self._drained = not images
        self._in_hand += len(images)
        self._held += len(images)
        self._to_download.extend(images)
        self._intake()
        self._feed_decoders()

    def _tried(self, image: _Image, size_bytes: int) -> None:
        if self._arrivals:
            self._arrivals.tried(image.number, self._events.now, size_bytes)

    def _staged(self, image: _Image) -> None:
        self._downloading -= 1
        self._downloaded += 1
        shape = (image.photo.width_px, image.photo.height_px)
        self._waiting.setdefault(shape, deque()).append(image)
        self._intake()
        self._feed_decoders()
        if self._feed.batch_wait_s < math.inf:
            self._events.after(self._feed.batch_wait_s + _SLACK_S, self._feed_decoders)

    # --- from the disk to a batch

    def _ended(self) -> bool:
        return self._drained and not self._to_download and not self._downloading

    def _feed_decoders(self) -> None:
        while True:
            if self._admitting is None:
                self._admitting = self._close_batch()
            if self._admitting is None or not self._admit(self._admitting):
                return
            self._admitting = None

    def _per_batch(self, photo: Photo) -> int:
        if self._alone(photo):
            return 1
        return min(self._feed.batch_size, max(1, self._feed.batch_bytes // photo.pixel_bytes))

    def _alone(self, photo: Photo) -> bool:
        return photo.pixel_bytes > self._feed.arena_bytes or photo.scratch_bytes > self._feed.scratch_bytes

    def _close_batch(self) -> _Batch | None:
        if self._ahead > self._feed.prefetch:
            return None
        now = self._events.now
        idle = self._decoding < self._feed.decode_workers
        closable = [
            (images[0].staged_s, shape)
            for shape, images in self._waiting.items()
            if idle or self._ended() or len(images) >= self._per_batch(images[0].photo)
            or now - images[0].staged_s >= self._feed.batch_wait_s
        ]  # fmt: skip
        if not closable:
            return None
        shape = min(closable)[1]
        waiting = self._waiting[shape]
        images = [waiting.popleft() for _ in range(min(len(waiting), self._per_batch(waiting[0].photo)))]
        if not waiting:
            del self._waiting[shape]
        return _Batch(images, sum(image.photo.pixel_bytes for image in images), len(images))

    def _admit(self, batch: _Batch) -> bool:
        if self._in_arena and (
            self._alone(batch.images[0].photo) or self._arena_bytes + batch.size_bytes > self._feed.arena_bytes
        ):
            return False
        if not self._in_arena and batch.size_bytes > self._feed.arena_bytes and len(batch.images) > 1:
            shape = (batch.images[0].photo.width_px, batch.images[0].photo.height_px)
            self._waiting.setdefault(shape, deque()).extendleft(reversed(batch.images[1:]))
            del batch.images[1:]
            batch.size_bytes, batch.left = batch.images[0].photo.pixel_bytes, 1
        self._in_arena.add(batch)
        self._ahead += 1
        self._arena_bytes += batch.size_bytes
        untouched_bytes = max(0, self._arena_bytes - self._arena_peak)
        batch.touch_s = self._world.touch_s_per_byte * untouched_bytes / len(batch.images)
        self._arena_peak += untouched_bytes
        self._decoding += len(batch.images)
        self._decode_queue.extend((batch, image) for image in batch.images)
        self._decode()
        return True

    def _decode(self) -> None:
        while self._decode_queue and self._busy_decoders < self._feed.decode_workers:
            self._busy_decoders += 1
            batch, image = self._decode_queue.popleft()
            image.decode_started_s = self._events.now
            self._scratch_bytes += image.photo.scratch_bytes + image.photo.compressed_bytes
            self._note_memory()
            self._cores.add(image.photo.decode_s + batch.touch_s, partial(self._decoded, batch, image))

    def _decoded(self, batch: _Batch, image: _Image) -> None:
        self._busy_decoders -= 1
        self._decoding -= 1
        self._scratch_bytes -= image.photo.scratch_bytes + image.photo.compressed_bytes
        image.decoded_s = self._events.now
        batch.left -= 1
        if not batch.left:
            self._ready.append(batch)
            self._infer()
        self._decode()
        self._feed_decoders()

    def _note_memory(self) -> None:
        held = self._world.base_bytes + self._arena_peak + self._scratch_bytes + self._inference_bytes
        self.outcome.peak_bytes = max(self.outcome.peak_bytes, held)

    # --- from a batch to its results

    def _infer(self) -> None:
        if self._gpu_busy or not self._ready:
            return
        batch = self._ready.popleft()
        self._ahead -= 1
        self._gpu_busy = True
        photos = [image.photo for image in batch.images]
        self._inference_bytes = self._world.inference_bytes(photos)
        self._note_memory()
        waited_s = self._events.now - self._idle_since_s
        gpu_s = sum(map(self._world.gpu_s, photos))
        if not self.outcome.batches:
            gpu_s += self._world.warm_up_s
        busy_s = gpu_s + self._world.batch_s + self._world.keep_s * len(photos)
        self._events.after(busy_s, partial(self._inferred, batch, gpu_s, waited_s < _SLACK_S))
        self._feed_decoders()

    def _inferred(self, batch: _Batch, gpu_s: float, ready: bool) -> None:
        now, number = self._events.now, len(batch.images)
        self._gpu_busy = False
        self._idle_since_s = now
        self._in_hand -= number
        self._events.after(POST_S, partial(self._posted, batch.images))
        if (beside_s := self._world.batch_cpu_s + number * self._world.image_cpu_s) > 0:
            self._cores.add(beside_s, self._feed_decoders)
        self._inference_bytes = 0
        self._in_arena.remove(batch)
        self._arena_bytes -= batch.size_bytes
        outcome = self.outcome
        outcome.images += number
        outcome.wall_s = now
        outcome.expired += sum(now + SAVE_S - image.fetched_s > self._world.ack_wait_s for image in batch.images)
        seen = self._seen(batch, gpu_s, ready=ready)
        outcome.batches.append(seen)
        self._last_out_s, self._downloaded = now, 0
        if self._control is not None and (feed := self._control(seen)) is not None:
            self._feed = feed
        self._intake()
        self._infer()
        self._feed_decoders()

    def _posted(self, images: list[_Image]) -> None:
        self._held -= len(images)
        self._intake()

    def _seen(self, batch: _Batch, gpu_s: float, *, ready: bool) -> Seen:
        images, number = batch.images, len(batch.images)
        elapsed_s = self._events.now - self._last_out_s
        return Seen(
            photo=max((image.photo for image in images), key=lambda photo: photo.px),
            images=number,
            first_byte_s=sum(image.first_byte_s for image in images) / number,
            download_s=sum(image.staged_s - image.started_s for image in images) / number,
            decode_s=sum(image.decoded_s - image.decode_started_s for image in images) / number,
            inference_s=gpu_s / number,
            keep_s=self._world.batch_s + self._world.keep_s * number,
            elapsed_s=elapsed_s,
            ready=ready,
            waiting=sum(map(len, self._waiting.values())),
            memory_bytes=self._world.base_bytes + self._arena_peak + self._scratch_bytes,
            arena_bytes=self._arena_peak,
            at_s=self._events.now,
            staged_per_s=self._downloaded / max(elapsed_s, 1e-9),
        )


def simulate(
    world: World,
    feed: Feed,
    control: Callable[[Seen], Feed | None] | None = None,
    arrivals: Arrivals | None = None,
) -> Outcome:
    """Work a job off; `control` sees every batch and may change the feed, `arrivals` bounds what is fetched."""
    return _Ingest(world, feed, control, arrivals).run()


@dataclass(frozen=True, slots=True)
class Downloaded:
    """An image that was there when the first two had been inferred."""

    photo: Photo
    first_byte_s: float
    download_s: float
    staged_s: float
    set_up_s: float


def probe(world: World, in_hand: int) -> tuple[list[Seen], list[Downloaded]]:
    """Return what two images show that are measured one at a time, and all downloads until then, theirs first.

    The second is the largest of those that are there when the first is done.
    """
    photos = world.photos[:in_hand]
    largest = max(photo.pixel_bytes for photo in photos)
    feed = Feed(1, largest, 1, 1, 2 * largest, 1 << 50, PROBE_DOWNLOADS, in_hand, 2, in_hand, 0.0)
    ingest = _Ingest(replace(world, photos=photos), feed)
    first = ingest.run().batches[0]
    came = sorted(ingest.images, key=lambda image: image.staged_s)
    measured, others = came[:1], came[1:]
    seen, at_s = [first], first.at_s
    if others:
        there = [image for image in others if image.staged_s <= at_s] or others[:1]
        second = max(there, key=lambda image: image.photo.px)
        gpu_s = world.gpu_s(second.photo)
        at_s = max(at_s, second.staged_s) + second.photo.decode_s + gpu_s + first.keep_s
        seen.append(
            replace(
                first, photo=second.photo, first_byte_s=second.first_byte_s, decode_s=second.photo.decode_s,
                download_s=second.staged_s - second.started_s, inference_s=gpu_s, at_s=at_s,
            )
        )  # fmt: skip
        measured.append(second)
        others.remove(second)
    return seen, [
        Downloaded(image.photo, image.first_byte_s, image.staged_s - image.started_s, image.staged_s, image.set_up_s)
        for image in (*measured, *(image for image in others if image.staged_s <= at_s))
    ]


class _Loaders:
    """An ingest of DataLoader processes: each takes tasks, downloads them all, decodes one after the other, stacks."""

    def __init__(self, world: World, batch_size: int, prefetch: int, loaders: int, *, pinned: bool) -> None:
        self._world, self._batch, self._prefetch, self._loaders = world, batch_size, prefetch, loaders
        self._pinned = pinned
        self._events = _Events()
        self._cores = _Shared(self._events, world.core_speed)
        self._links = [_Link(world, self._events, self._cores, lambda _image, _bytes: None) for _ in range(loaders)]
        shared = self._links[0].shared
        for link in self._links:
            link.shared = shared
        self._photos = deque(world.photos)
        self._outstanding = [0] * loaders
        self._making = [False] * loaders
        self._ended = [False] * loaders
        self._queues: list[deque[list[_Image]]] = [deque() for _ in range(loaders)]
        self._turn = 0
        self._gpu_busy = False
        self._base = world.base_bytes + loaders * LOADER_BYTES
        self._held = 0
        self.outcome = Outcome()

    def run(self) -> Outcome:
        for number in range(self._loaders):
            self._start(number)
        self._events.run()
        self.outcome.out_of_memory = self.outcome.peak_bytes > self._world.memory_bytes
        return self.outcome

    def _hold(self, size_bytes: int) -> None:
        self._held += size_bytes
        self.outcome.peak_bytes = max(self.outcome.peak_bytes, self._base + self._held)

    def _start(self, number: int) -> None:
        """Begin a batch unless enough of them wait."""
        if self._making[number] or self._ended[number] or self._outstanding[number] >= self._prefetch:
            return
        self._making[number] = True
        self._events.after(self._world.fetch_s, partial(self._fetched, number, self._events.now))

    def _fetched(self, number: int, sent_s: float) -> None:
        images = [_Image(self._photos.popleft(), sent_s) for _ in range(min(self._batch, len(self._photos)))]
        if not images:
            self._ended[number], self._making[number] = True, False
            self._infer()
            return
        self._outstanding[number] += 1
        waiting, left = deque(images), [len(images)]

        def downloaded(image: _Image) -> None:
            self._hold(image.photo.compressed_bytes)
            left[0] -= 1
            if waiting:
                self._links[number].download(waiting.popleft(), downloaded)
            elif not left[0]:
                self._decode(number, images, 0)

        for _ in range(min(LOADER_DOWNLOADS, len(waiting))):
            self._links[number].download(waiting.popleft(), downloaded)

    def _decode(self, number: int, images: list[_Image], index: int) -> None:
        if index == len(images):
            size_bytes = TENSOR_BYTES_PER_PX * sum(image.photo.px for image in images)
            self._hold(size_bytes)  # stacked beside the list it is made of
            self._hold(-size_bytes - sum(image.photo.compressed_bytes for image in images))
            self._queues[number].append(images)
            self._making[number] = False
            self._start(number)
            self._infer()
            return
        photo = images[index].photo
        self._hold(TENSOR_BYTES_PER_PX * photo.px)
        cpu_s = PILLOW_FACTOR * photo.decode_s + TENSOR_S_PER_PX * photo.px
        self._cores.add(cpu_s, partial(self._decode, number, images, index + 1))

    def _infer(self) -> None:
        """Take batches in turn, as a DataLoader does."""
        if self._gpu_busy:
            return
        for _ in range(self._loaders):
            if self._queues[self._turn] or not self._ended[self._turn] or self._making[self._turn]:
                break
            self._turn = (self._turn + 1) % self._loaders
        if not self._queues[self._turn]:
            return
        number, images = self._turn, self._queues[self._turn].popleft()
        self._turn = (self._turn + 1) % self._loaders
        self._outstanding[number] -= 1
        self._gpu_busy = True
        if self._pinned:
            self._hold(TENSOR_BYTES_PER_PX * sum(image.photo.px for image in images))
        self._start(number)
        gpu_s = sum(self._world.gpu_s(image.photo) + self._world.keep_s for image in images) + self._world.batch_s
        self._events.after(gpu_s, partial(self._inferred, images))

    def _inferred(self, images: list[_Image]) -> None:
        now = self._events.now
        self._gpu_busy = False
        self._hold(-(1 + self._pinned) * TENSOR_BYTES_PER_PX * sum(image.photo.px for image in images))
        self.outcome.images += len(images)
        self.outcome.wall_s = now
        self.outcome.expired += sum(now + SAVE_S - image.fetched_s > self._world.ack_wait_s for image in images)
        self._infer()


def simulate_loaders(world: World, batch_size: int, prefetch: int, loaders: int, *, pinned: bool) -> Outcome:
    """Work a job off with the ingest of constants."""
    return _Loaders(world, batch_size, prefetch, loaders, pinned=pinned).run()
