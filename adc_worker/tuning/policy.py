"""From a job's measurements to its plan. Pure: numbers in, a plan out; opens nothing, sleeps never."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.tuning.plan import IngestPlan
from adc_worker.tuning.probe_report import ProbeReport

_MB = 1_000_000

# More than this in one batch, or decoded in total, did not raise the rate: measurements, "How to structure the
# ingest" (batches of at most 4 images or 120 MB, 400 MB of decoded bytes in flight).
BATCH_BYTES_CAP = 120 * _MB
ARENA_BYTES_CAP = 400 * _MB
# One batch is inferred, one is ready, one is being decoded (design, "The arena and the loader").
BATCHES_IN_ARENA = 3
BATCH_SIZE_MIN, BATCH_SIZE_MAX = 4, 24  # the incident's hand-set value and today's default
PREFETCH_MAX = 8
DOWNLOADS_MIN, DOWNLOADS_MAX = 2, 32
FIXED_DOWNLOADS, FIXED_PREFETCH = 8, 4  # today's constants, for `fixed` mode
# Little's law gives the connections that are busy on average; half as many again cover the spread.
DOWNLOAD_HEADROOM = 1.5
DECODE_HEADROOM = 1.5
FETCH_COVER_S = 2.0  # an empty fetch takes 0.6 s and others up to 0.17 s (contract); staged work covers three of them
TASKS_PER_FETCH_MAX = 64
# Interpreter heaps, connection buffers, 16 MB of results on their way into the journal, a megabyte of each post. The
# results of one image are in what inference was measured to need.
RESERVE_BYTES = 64 * _MB
PAGE_BYTES = 4096  # the arena's regions start and end at pages
# Plans fill this part of the memory that ingest may take (design, "The governor"): images a quarter larger fit, too.
AIM = 0.80
DECODE_PROCESS_BYTES = 14 * _MB  # measurements, "Other costs": numpy and simplejpeg


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the operator's variables and the pipeline forbid to exceed; None is no ceiling."""

    soft_cap: float = 0.7
    mode: Literal["auto", "fixed"] = "auto"
    tasks_per_fetch: int | None = None
    prefetch_factor: int | None = None
    downloads: int | None = None
    decode_workers: int | None = None
    fixed_decode_workers: int = 4
    pin_memory: bool | None = None
    images_per_call: int = 8


@dataclass(frozen=True, slots=True)
class _Rates:
    """Images per second that each stage can reach alone."""

    link: float
    decode: float
    inference: float

    @property
    def slowest(self) -> float:
        return min(self.link, self.decode, self.inference)

    @property
    def binds(self) -> str:
        return min((self.link, "link"), (self.decode, "decode"), (self.inference, "inference"))[1]


@dataclass(frozen=True, slots=True)
class _Room:
    """How memory is shared between running decodes and the images of batches with all they need."""

    decode_workers: int
    scratch_bytes: int
    images_bytes: int
    hard_bytes: int  # the same up to the hard limit, for one image at a time
    staged_bytes: int  # compressed images, where those are in memory


class IngestPolicy:
    """Plans how a job is fed. The same inputs always give the same plan."""

    def __init__(self, ceilings: Ceilings | None = None) -> None:
        self._ceilings = ceilings or Ceilings()

    @property
    def fixed(self) -> bool:
        """Whether the operator's values are taken as they are."""
        return self._ceilings.mode == "fixed"

    def budget_bytes(self, base_bytes: int, host: HostBudget) -> int:
        """Return the memory of which plans leave a fifth of ingest's part: so they reach the soft cap and no more."""
        soft = self._ceilings.soft_cap * host.caution * host.limit_bytes
        return min(int(base_bytes + (soft - base_bytes) / AIM), base_bytes + host.available_bytes)

    def plan(self, report: ProbeReport, host: HostBudget, lease: LeaseTerms) -> IngestPlan:
        """Return the plan for a job that looks like `report` on a machine like `host`."""
        why: dict[str, str] = {}
        room = self._room(report, host, self._wanted_workers(report, host, why), why)
        workers = room.decode_workers
        downloads_most = self._downloads_most()
        rates = _Rates(downloads_most / report.download_s, workers / max(report.decode_s, 1e-6), 1 / report.inference_s)
        rate = rates.slowest
        held = lease.held_limit(rate)
        why["held_limit"] = f"{rate:.2f} images/s x 0.5 x {lease.ack_wait_s:.0f} s of lease = {held}"
        wanted = self._wanted_batch(report, why)
        batch = self._fit_batch(report, room, wanted, max(1, held // 2), why)
        prefetch = self._prefetch(report, room, wanted, why)
        arena = self._arena(report, room, batch, prefetch, why)
        batch_bytes = self._batch_bytes(report, arena, why)
        downloads = self._downloads(report, rate, downloads_most, why)
        staged = self._staged_ahead(report, host, rate, downloads, batch, held, why)
        fetch = self._fetch_size(rate, staged, why)
        working_set = self._working_set(report, batch)
        reserve = _reserve(report) + room.staged_bytes
        peak = report.base_bytes + arena + room.scratch_bytes + working_set + reserve
        why["peak_bytes"] = (
            f"base {_mb(report.base_bytes)} + arena {_mb(arena)} + decode scratch {_mb(room.scratch_bytes)}"
            f" + inference {_mb(working_set)} + reserve {_mb(reserve)} = {_mb(peak)}"
        )
        binds = "memory" if batch < min(wanted, held // 2) else "lease" if batch < wanted else rates.binds
        why["images_per_s"] = (
            f"link {rates.link:.1f} ({downloads_most} downloads of {report.download_s:.2f} s), "
            f"decode {rates.decode:.1f} ({workers} x {report.decode_s:.3f} s), "
            f"inference {rates.inference:.1f} (1 / {report.inference_s:.3f} s): {binds} binds"
        )
        return IngestPlan(
            batch_size=batch,
            batch_bytes=batch_bytes,
            prefetch_factor=prefetch,
            decode_workers=workers,
            decode_engine="threads",
            arena_bytes=arena,
            scratch_bytes=room.scratch_bytes,
            solo_bytes=max(arena, room.hard_bytes),
            pin_memory=self._pin_memory(host, why),
            download_concurrency=downloads,
            staged_ahead=staged,
            fetch_size=fetch,
            held_limit=held,
            batch_wait_s=batch * report.inference_s,
            peak_bytes=peak,
            images_per_s=rate,
            binds=binds,
            why=why,
        )

    def larger(self, plan: IngestPlan, host: HostBudget, *, link_short: bool) -> IngestPlan | None:
        """Return a plan with one step more of what the GPU seems to wait for; None when there is no such step."""
        more: dict[str, int] = {}
        if link_short and plan.download_concurrency < self._downloads_most():
            more["download_concurrency"] = min(2 * plan.download_concurrency, self._downloads_most())
            more["staged_ahead"] = min(plan.held_limit, plan.staged_ahead + plan.download_concurrency)
        elif not link_short and plan.decode_workers < _at_most(host.cores, self._ceilings.decode_workers):
            more["decode_workers"] = plan.decode_workers + 1
            more["scratch_bytes"] = plan.scratch_bytes // plan.decode_workers * more["decode_workers"]
        elif (
            not link_short
            and plan.binds == "inference"
            and plan.prefetch_factor < _at_most(PREFETCH_MAX, self._ceilings.prefetch_factor)
        ):
            more["prefetch_factor"] = plan.prefetch_factor + 1
            more["arena_bytes"] = plan.arena_bytes + plan.batch_bytes
        else:
            return None
        added_bytes = sum(more[name] - getattr(plan, name) for name in more if name.endswith("_bytes"))
        why = {name: f"{value} in place of {getattr(plan, name)}: the GPU waited" for name, value in more.items()}
        return replace(plan, why={**plan.why, **why}, peak_bytes=plan.peak_bytes + added_bytes, **more)  # type: ignore[arg-type]

    def _wanted_workers(self, report: ProbeReport, host: HostBudget, why: dict[str, str]) -> int:
        if self.fixed:
            workers = _at_most(self._ceilings.fixed_decode_workers, self._ceilings.decode_workers)
            why["decode_workers"] = f"AMI_NUM_WORKERS or its old default: {workers}"
            return workers
        needed = math.ceil(DECODE_HEADROOM * report.decode_s / report.inference_s)
        workers = _at_most(max(1, min(needed, host.cores)), self._ceilings.decode_workers)
        why["decode_workers"] = (
            f"{DECODE_HEADROOM} x decode {report.decode_s:.3f} s / inference {report.inference_s:.3f} s = {needed}, "
            f"{host.cores} cores: {workers}"
        )
        return workers

    def _downloads_most(self) -> int:
        if self.fixed:
            return self._ceilings.downloads or FIXED_DOWNLOADS
        return _at_most(DOWNLOADS_MAX, self._ceilings.downloads)

    def _room(self, report: ProbeReport, host: HostBudget, wanted_workers: int, why: dict[str, str]) -> _Room:
        """Share memory between decodes and images; in proportion where it is scarce, so that more takes none away."""
        scratch, image = report.decode_scratch_bytes + report.compressed_bytes, self._bytes_per_image(report)
        staged = max(host.staging_bytes, report.compressed_bytes) if host.staging_in_memory else 0
        taken = report.base_bytes + _reserve(report) + staged
        soft = int(AIM * (self.budget_bytes(report.base_bytes, host) - report.base_bytes)) + report.base_bytes - taken
        hard = host.limit_bytes - taken  # what is available passes; an image that is refused is refused for good
        workers = max(1, min(wanted_workers, soft // (scratch + image)))
        left = min(soft - scratch, max(soft * image // (scratch + image), soft - wanted_workers * scratch))
        why["decode_workers"] += f"; {_mb(max(0, soft))} holds {max(0, soft // (scratch + image))}"
        solo = hard - workers * scratch - self._working_set(report, 1)
        return _Room(workers, workers * scratch, left, solo, staged)

    def _working_set(self, report: ProbeReport, batch: int) -> int:
        return report.inference_peak_bytes * min(self._ceilings.images_per_call, batch)

    def _bytes_per_image(self, report: ProbeReport) -> int:
        """Return what an image more in a batch costs: its place in each batch of the arena, and inference."""
        return BATCHES_IN_ARENA * _place(report) + report.inference_peak_bytes

    def _wanted_batch(self, report: ProbeReport, why: dict[str, str]) -> int:
        if self.fixed:
            why["batch_size"] = "AMI_ANTENNA_API_BATCH_SIZE or its old default"
            return self._ceilings.tasks_per_fetch or BATCH_SIZE_MAX
        ratio = report.download_inference_ratio
        asked = min(BATCH_SIZE_MAX, max(BATCH_SIZE_MIN, math.ceil(BATCH_SIZE_MIN * ratio)))
        holds = max(1, BATCH_BYTES_CAP // report.tensor_bytes_per_image)
        why["batch_size"] = (
            f"download:inference {ratio:.2f} asks for {asked}; {_mb(report.tensor_bytes_per_image)} an image: "
            f"{_mb(BATCH_BYTES_CAP)} a batch holds {holds}"
        )
        return min(asked, holds)

    def _fit_batch(self, report: ProbeReport, room: _Room, wanted: int, lease: int, why: dict[str, str]) -> int:
        fits = max(1, room.images_bytes // self._bytes_per_image(report))
        batch = min(wanted, lease, fits)
        why["batch_size"] += (
            f"; {_mb(max(0, room.images_bytes))} for images, {BATCHES_IN_ARENA} batches and inference holds"
            f" {fits}, half the lease {lease}: {batch}"
        )
        return batch

    def _batch_bytes(self, report: ProbeReport, arena_bytes: int, why: dict[str, str]) -> int:
        value = max(report.tensor_bytes_per_image, arena_bytes // BATCHES_IN_ARENA)
        why["batch_bytes"] = f"a third of the arena, at least one image: {_mb(value)}"
        return value

    def _prefetch(self, report: ProbeReport, room: _Room, wanted_batch: int, why: dict[str, str]) -> int:
        """Return the batches decoded ahead: more than one only where memory holds the batches that were wanted."""
        ratio = report.download_inference_ratio
        wanted = min(PREFETCH_MAX, max(1, math.ceil(ratio)))
        cap = self._pixels(report, room, wanted_batch)
        if self.fixed:
            wanted = self._ceilings.prefetch_factor or FIXED_PREFETCH
        else:
            cap = min(ARENA_BYTES_CAP, cap)
        fits = max(1, cap // (wanted_batch * _place(report)) - (BATCHES_IN_ARENA - 1))
        prefetch = _at_most(min(wanted, fits), self._ceilings.prefetch_factor)
        why["prefetch_factor"] = f"download:inference {ratio:.2f} asks for {wanted}, {_mb(max(0, cap))} holds {fits}"
        return prefetch

    def _arena(self, report: ProbeReport, room: _Room, batch: int, prefetch: int, why: dict[str, str]) -> int:
        batch_bytes = batch * _place(report)
        wanted = (prefetch + BATCHES_IN_ARENA - 1) * batch_bytes
        left = self._pixels(report, room, batch)
        arena = max(_place(report), min(wanted, left))
        why["arena_bytes"] = (
            f"({prefetch} ready + 1 inferred + 1 decoding) x {_mb(batch_bytes)} = {_mb(wanted)}, "
            f"{_mb(max(0, left))} left for it"
        )
        return arena

    def _pixels(self, report: ProbeReport, room: _Room, batch: int) -> int:
        return room.images_bytes - self._working_set(report, batch)

    def _downloads(self, report: ProbeReport, rate: float, most: int, why: dict[str, str]) -> int:
        busy = DOWNLOAD_HEADROOM * rate * report.download_s
        downloads = most if self.fixed else min(most, max(DOWNLOADS_MIN, math.ceil(busy)))
        why["download_concurrency"] = (
            f"{rate:.2f} images/s x {report.download_s:.2f} s x {DOWNLOAD_HEADROOM} = {busy:.1f}, at most {most}"
        )
        return downloads

    def _staged_ahead(
        self, report: ProbeReport, host: HostBudget, rate: float, downloads: int, batch: int, held: int,
        why: dict[str, str],
    ) -> int:  # fmt: skip
        wanted = downloads + 2 * batch + math.ceil(rate * FETCH_COVER_S)
        fits = max(1, host.staging_bytes // report.compressed_bytes)
        staged = max(1, min(wanted, held, fits))
        why["staged_ahead"] = (
            f"{downloads} downloading + 2 batches of {batch} + {FETCH_COVER_S:.0f} s of fetching = {wanted}; "
            f"lease allows {held}, {'memory' if host.staging_in_memory else 'disk'} {fits}"
        )
        return staged

    def _fetch_size(self, rate: float, staged: int, why: dict[str, str]) -> int:
        wanted = min(TASKS_PER_FETCH_MAX, max(1, math.ceil(rate * FETCH_COVER_S)))
        if self.fixed:
            wanted = self._ceilings.tasks_per_fetch or BATCH_SIZE_MAX
        fetch = _at_most(min(wanted, staged), self._ceilings.tasks_per_fetch)
        why["fetch_size"] = f"{FETCH_COVER_S:.0f} s of {rate:.2f} images/s = {wanted}, at most {staged} staged"
        return fetch

    def _pin_memory(self, host: HostBudget, why: dict[str, str]) -> bool:
        permitted = self._ceilings.pin_memory if not self.fixed else self._ceilings.pin_memory is not False
        why["pin_memory"] = (
            "no GPU"
            if not host.gpu
            else "permitted"
            if permitted
            else "off until a measurement on a GPU says otherwise"
        )
        return bool(host.gpu and permitted)


def _place(report: ProbeReport) -> int:
    """Return an image's bytes in the arena: whole pages."""
    return -(-report.tensor_bytes_per_image // PAGE_BYTES) * PAGE_BYTES


def _reserve(report: ProbeReport) -> int:
    """Return what is left unplanned: twice as much where the probe says little about the job."""
    return RESERVE_BYTES * (2 if report.uncertain else 1)


def in_processes(plan: IngestPlan) -> IngestPlan:
    """Return the plan with decode processes, of which one more waits, in place of decode threads."""
    extra_bytes = DECODE_PROCESS_BYTES * (plan.decode_workers + 1)
    return replace(plan, decode_engine="processes", peak_bytes=plan.peak_bytes + extra_bytes)


def _at_most(value: int, ceiling: int | None) -> int:
    return value if ceiling is None else min(value, ceiling)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / _MB:.0f} MB"
