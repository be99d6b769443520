"""From a job's measurements to its plan. Pure: numbers in, a plan out; opens nothing, sleeps never."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from adc_worker.antenna.leases import HORIZON_SHARE, LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.tuning.plan import IngestPlan, descriptors
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
# Part of a batch's inference that keeping its results may take: half of what the slowest stage may rest (promise 3).
KEEP_SHARE = 0.05
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


class IngestPolicy:
    """Plans how a job is fed. The same inputs always give the same plan."""

    def __init__(self, ceilings: Ceilings | None = None) -> None:
        self._ceilings = ceilings or Ceilings()

    def budget_bytes(self, base_bytes: int, host: HostBudget) -> int:
        """Return the memory of which plans leave a fifth of ingest's part: so they reach the soft cap and no more."""
        soft = self._ceilings.soft_cap * host.caution * host.limit_bytes
        return min(int(base_bytes + (soft - base_bytes) / AIM), base_bytes + host.available_bytes)

    def plan(self, report: ProbeReport, host: HostBudget, lease: LeaseTerms) -> IngestPlan:
        """Return the plan for a job that looks like `report` on a machine like `host`."""
        room_bytes = AIM * (self.budget_bytes(report.base_bytes, host) - report.base_bytes)
        return _Arithmetic(self._ceilings, report, host, lease, int(room_bytes)).plan()


@dataclass(slots=True)
class _Arithmetic:
    """That of one plan: what fixes a field says why."""

    ceilings: Ceilings
    report: ProbeReport
    host: HostBudget
    lease: LeaseTerms
    room_bytes: int  # what a plan may take beside the base
    why: dict[str, str] = field(default_factory=dict)

    def plan(self) -> IngestPlan:
        report = self.report
        reserve = self._reserve()
        room = self.room_bytes - reserve
        wanted_batch, wanted_workers = self._wanted_batch(), self._wanted_workers()
        batch, workers, cut = self._fitting(room, wanted_batch, wanted_workers)
        connections = self._connections()
        rates, busy = self._rates(connections, batch, workers)
        slowest = min(rates, key=lambda stage: rates[stage])
        rate = rates[slowest]
        held, batch, cut = self._leased(rate, batch, cut)
        scratch = self._scratch(workers)
        pixels = room - scratch - self._working_set(batch)
        prefetch = self._prefetch(pixels, batch, workers)
        arena = self._arena(pixels, batch, prefetch)
        downloads = self._downloads(rate, min(rates["decode"], rates["inference"]), connections)
        staged = self._staged_ahead(rate, downloads, batch, held)
        binds, says = self._binds(slowest, busy, connections, cut, short=workers < wanted_workers)
        return IngestPlan(
            batch_size=batch,
            batch_bytes=self._batch_bytes(batch),
            prefetch_factor=prefetch,
            decode_workers=workers,
            decode_engine="threads",
            arena_bytes=arena,
            scratch_bytes=scratch,
            solo_bytes=self._solo(arena, scratch),
            pin_memory=self._pin_memory(),
            download_concurrency=downloads,
            staged_ahead=staged,
            fetch_size=self._fetch_size(rate, staged),
            held_limit=held,
            batch_wait_s=self._batch_wait_s(batch),
            base_bytes=report.base_bytes,
            peak_bytes=self._peak(arena, scratch, batch, reserve),
            images_per_s=rate,
            binds=binds,
            why=self.why
            | {
                "base_bytes": f"measured after the models were loaded: {_mb(report.base_bytes)}",
                "batch_bytes": f"{batch} usual images, or the largest one: {_mb(self._batch_bytes(batch))}",
                "binds": says,
                "decode_engine": "threads are faster; processes where threads slow a GPU's inference",
            },
        )

    @property
    def _fixed(self) -> bool:
        return self.ceilings.mode == "fixed"

    def _operators(self, computed: int, ceiling: int | None, old_default: int) -> tuple[int, str]:
        """Return the computed value within the operator's ceiling, and a word on that; in fixed mode the operator's."""
        if self._fixed:
            value = ceiling or old_default
            return value, f", in fixed mode {value}"
        value = _at_most(computed, ceiling)
        return value, f", of which the settings allow {value}" if value < computed else ""

    @property
    def _staged_bytes(self) -> int:
        """Return the memory that staged images take where their folder is in memory."""
        return max(self.host.staging_bytes, self.report.compressed_bytes) if self.host.staging_in_memory else 0

    @property
    def _doubt_bytes(self) -> int:
        return RESERVE_BYTES if self.report.uncertain else 0

    def _reserve(self) -> int:
        return RESERVE_BYTES + self._doubt_bytes + self._staged_bytes

    def _rates(self, connections: int, batch: int, workers: int) -> tuple[dict[str, float], int]:
        """Return the images/s of each stage, and how many decoders are busy: no more than batches may wait."""
        report = self.report
        depth = self._operators(max(PREFETCH_MAX, workers), self.ceilings.prefetch_factor, FIXED_PREFETCH)[0]
        busy = min(workers, (depth + 1) * self._largest_in(batch))
        rates: dict[str, float] = {
            "link": report.link_per_s(connections),
            "decode": busy / max(report.decode_s, 1e-6),
            "inference": 1 / (report.inference_s + report.keep_s / batch),
        }
        self.why["images_per_s"] = (
            f"link {rates['link']:.1f} ({connections} downloads of {report.download_s:.2f} s, "
            f"{report.downloads:.1f} of {report.transfer_s:.2f} s may share it), "
            f"decode {rates['decode']:.1f} ({busy} x {report.decode_s:.3f} s), "
            f"inference {rates['inference']:.1f} ({report.inference_s:.3f} s with the copy to the device, "
            f"{report.keep_s:.3f} s a batch to keep results): {min(rates.values()):.2f}"
        )
        return rates, busy

    def _leased(self, rate: float, batch: int, cut: str) -> tuple[int, int, str]:
        """Return the tasks that may be held, and the batch that leaves half of them to wait, with what cut it."""
        held = self.lease.held_limit(rate)
        allowed = max(1, held // 2)
        self.why["held_limit"] = (
            f"{rate:.2f} images/s x {HORIZON_SHARE} x {self.lease.ack_wait_s:.0f} s of lease = {held}"
        )
        self.why["batch_size"] += f"; half of {held} leased {allowed}: {min(batch, allowed)}"
        return held, min(batch, allowed), "lease" if allowed < batch else cut

    def _wanted_workers(self) -> int:
        report, cores = self.report, self.host.cores
        if self._fixed:
            workers = _at_most(self.ceilings.fixed_decode_workers, self.ceilings.decode_workers)
            self.why["decode_workers"] = f"AMI_NUM_WORKERS or its old default: {workers}"
            return workers
        needed = max(1, math.ceil(DECODE_HEADROOM * report.decode_s / report.inference_s))
        workers, allowed = self._operators(min(needed, cores), self.ceilings.decode_workers, 0)
        self.why["decode_workers"] = (
            f"{DECODE_HEADROOM} x decode {report.decode_s:.3f} s / inference {report.inference_s:.3f} s = {needed}, "
            f"{cores} cores: {min(needed, cores)}{allowed}"
        )
        return workers

    def _wanted_batch(self) -> int:
        report, image_bytes = self.report, self.report.usual_tensor_bytes
        if self._fixed:
            wanted = self.ceilings.tasks_per_fetch or BATCH_SIZE_MAX
            self.why["batch_size"] = f"AMI_ANTENNA_API_BATCH_SIZE or its old default: {wanted}"
            return wanted
        ratio = report.download_inference_ratio
        kept = math.ceil(report.keep_s / (KEEP_SHARE * report.inference_s))
        asked = min(BATCH_SIZE_MAX, max(BATCH_SIZE_MIN, math.ceil(BATCH_SIZE_MIN * ratio), kept))
        holds = max(1, BATCH_BYTES_CAP // image_bytes)
        self.why["batch_size"] = (
            f"download:inference {ratio:.2f} and {1e3 * report.keep_s:.1f} ms to keep a batch ask for {asked}; "
            f"{_mb(image_bytes)} an image: {_mb(BATCH_BYTES_CAP)} a batch holds {holds}"
        )
        return min(asked, holds)

    def _fitting(self, room: int, wanted_batch: int, wanted_workers: int) -> tuple[int, int, str]:
        """Return the largest batch that fits with all decode workers, else one image and the workers that fit, too.

        A decoder that stands still is the greater loss; and so no more memory ever takes either away. The third is what
        cut them.
        """
        fits = max((n for n in range(1, wanted_batch + 1) if self._needs(n, wanted_workers) <= room), default=0)
        batch, workers = max(1, fits), wanted_workers
        if not fits:
            workers = max((n for n in range(1, wanted_workers + 1) if self._needs(1, n) <= room), default=1)
        cut = "memory" if fits < wanted_batch else ""
        self.why["batch_size"] += f"; {_mb(max(0, room))} with {wanted_workers} decoding {fits}"
        self.why["decode_workers"] += f"; {_mb(max(0, room))} with batches of {batch}: {workers}"
        per_image, free = self.report.vram_bytes, self.host.vram_free_bytes
        if per_image and free < per_image * self.ceilings.images_per_call:  # else calls bound it
            holds = max(1, free // per_image)
            self.why["batch_size"] += f"; the GPU's {_mb(free)}, {_mb(per_image)} each, {holds}"
            if holds < batch:
                batch, cut = holds, "vram"
        return batch, workers, cut

    def _needs(self, batch: int, workers: int) -> int:
        """Return the memory of batches of `batch` images, as many of them as keep `workers` decoders busy."""
        batches = self._busy(batch, workers) + BATCHES_IN_ARENA - 1
        return batches * self._batch_bytes(batch) + workers * self._decode_bytes + self._working_set(batch)

    def _busy(self, batch: int, workers: int) -> int:
        """Return the batches ahead that keep every worker busy: that many and one are decoded or ready at a time."""
        return max(1, math.ceil(workers / self._largest_in(batch)) - 1)

    def _largest_in(self, batch: int) -> int:
        """Return how many of the largest images are in a batch of usual ones' bytes."""
        return max(1, self._batch_bytes(batch) // self._place)

    @property
    def _place(self) -> int:
        """An image's bytes in the arena."""
        return _whole_pages(self.report.tensor_bytes_per_image)

    def _batch_bytes(self, batch: int) -> int:
        """Return the bytes of so many usual images in the arena, or of the largest one."""
        return max(self._place, batch * _whole_pages(self.report.usual_tensor_bytes))

    @property
    def _decode_bytes(self) -> int:
        """What a running decode takes beside its image: the decoder's own memory, and the file."""
        return self.report.decode_scratch_bytes + self.report.compressed_bytes

    def _working_set(self, batch: int) -> int:
        """Return the memory of one call: of the largest image, or of as large ones as it can have at once."""
        report, at_once = self.report, min(self.ceilings.images_per_call, batch)
        largest = report.tensor_bytes_per_image
        size = min(largest, self._batch_bytes(batch) // at_once)
        return max(report.inference_bytes(largest), at_once * report.inference_bytes(size))

    def _binds(self, slowest: str, workers: int, connections: int, cut: str, *, short: bool) -> tuple[str, str]:
        """Return what holds the plan back, and why."""
        ceilings, report = self.ceilings, self.report
        if slowest == "decode" and short:
            return "memory", f"decoding is slowest, and memory holds no more than {workers} decoders"
        held_down = self._fixed or workers == ceilings.decode_workers or ceilings.prefetch_factor is not None
        if slowest == "decode" and workers < self.host.cores and held_down:
            return "ceiling", f"decoding is slowest, and the settings allow no more than {workers} decoders"
        if slowest == "link" and report.link_per_s(connections) < report.link_per_s(DOWNLOADS_MAX):
            return "ceiling", f"the link is slowest, and settings or open files allow {connections} downloads"
        if cut:
            return cut, f"it keeps batches small; the slowest stage is {slowest}"
        return slowest, "the slowest stage"

    def _connections(self) -> int:
        """Return how many downloads there may be at once: by descriptors, and by the operator's setting."""
        files = (self.host.descriptors - descriptors(0, self.host.cores)) // 2
        return max(1, min(files, self._operators(DOWNLOADS_MAX, self.ceilings.downloads, FIXED_DOWNLOADS)[0]))

    def _prefetch(self, pixels_bytes: int, batch: int, workers: int) -> int:
        """Return the batches decoded ahead."""
        ratio, busy, batch_bytes = (
            self.report.download_inference_ratio,
            self._busy(batch, workers),
            self._batch_bytes(batch),
        )
        computed = max(busy, min(PREFETCH_MAX, math.ceil(ratio)))
        wanted, allowed = self._operators(computed, self.ceilings.prefetch_factor, FIXED_PREFETCH)
        needed = (busy + BATCHES_IN_ARENA - 1) * batch_bytes if busy > 1 else 0
        cap = pixels_bytes if self._fixed else min(max(ARENA_BYTES_CAP, needed), pixels_bytes)
        fits = max(1, cap // batch_bytes - (BATCHES_IN_ARENA - 1))
        self.why["prefetch_factor"] = (
            f"download:inference {ratio:.2f} and {workers} decode workers ask for {computed}{allowed}; "
            f"{_mb(max(0, cap))} holds {fits}: {min(wanted, fits)}"
        )
        return min(wanted, fits)

    def _arena(self, pixels_bytes: int, batch: int, prefetch: int) -> int:
        batch_bytes = self._batch_bytes(batch)
        wanted = (prefetch + BATCHES_IN_ARENA - 1) * batch_bytes
        arena = max(self._place, min(wanted, pixels_bytes))
        self.why["arena_bytes"] = (
            f"({prefetch} ready + 1 inferred + 1 decoding) x {_mb(batch_bytes)} = {_mb(wanted)}, "
            f"{_mb(max(0, pixels_bytes))} left for it: {_mb(arena)}"
        )
        return arena

    def _downloads(self, rate: float, wanted_per_s: float, connections: int) -> int:
        """Return the downloads that bring the planned rate.

        Where they mostly wait for their first byte they hardly share the link: then as many as the other stages want.
        """
        report = self.report
        if report.transfer_s < report.download_s / 2:
            rate = min(wanted_per_s, connections / report.download_s)
        busy = DOWNLOAD_HEADROOM * rate * report.download_s
        # Should they share it, all of the largest are to come within half of the time that a task is held for.
        lease = int(HORIZON_SHARE / 2 * self.lease.ack_wait_s * report.link_bytes_per_s / report.compressed_bytes)
        downloads = connections if self._fixed else min(connections, max(DOWNLOADS_MIN, min(lease, math.ceil(busy))))
        mode = (
            "in fixed mode" if self._fixed else f"lease allows {lease}, at least {DOWNLOADS_MIN}, at most {connections}"
        )
        self.why["download_concurrency"] = (
            f"{rate:.2f} images/s x {self.report.download_s:.2f} s x {DOWNLOAD_HEADROOM} = {busy:.1f}, "
            f"{mode}: {downloads}"
        )
        return downloads

    def _staged_ahead(self, rate: float, downloads: int, batch: int, held: int) -> int:
        wanted = downloads + 2 * batch + math.ceil(rate * FETCH_COVER_S)
        fits = max(1, self.host.staging_bytes // self.report.compressed_bytes)
        staged = max(1, min(wanted, held, fits))
        self.why["staged_ahead"] = (
            f"{downloads} downloading + 2 batches of {batch} + {FETCH_COVER_S:.0f} s of fetching = {wanted}; "
            f"lease allows {held}, {'memory' if self.host.staging_in_memory else 'disk'} {fits}: {staged}"
        )
        return staged

    def _fetch_size(self, rate: float, staged: int) -> int:
        needed = max(1, math.ceil(rate * FETCH_COVER_S))
        computed = min(TASKS_PER_FETCH_MAX, needed)
        wanted, allowed = self._operators(computed, self.ceilings.tasks_per_fetch, BATCH_SIZE_MAX)
        self.why["fetch_size"] = (
            f"{FETCH_COVER_S:.0f} s of {rate:.2f} images/s = {needed}, at most {TASKS_PER_FETCH_MAX}{allowed}; "
            f"{staged} staged: {min(wanted, staged)}"
        )
        return min(wanted, staged)

    def _scratch(self, workers: int) -> int:
        report, scratch = self.report, workers * self._decode_bytes
        self.why["scratch_bytes"] = (
            f"{workers} x ({_mb(report.decode_scratch_bytes)} of a decoder + "
            f"{_mb(report.compressed_bytes)} of its file) = {_mb(scratch)}"
        )
        return scratch

    def _solo(self, arena: int, scratch: int) -> int:
        """Return what an image alone could ever take in place of the arena.

        An image that is refused is refused for good. So this is the whole limit less what the worker itself always
        needs, and nothing that passes is taken off: other workers, other programs, staged images, doubt.
        """
        limit = self.host.whole_limit_bytes
        solo = max(arena, limit - self.report.base_bytes - RESERVE_BYTES - scratch - self._working_set(1))
        self.why["solo_bytes"] = (
            f"the whole limit of {_mb(limit)} less base, reserve, decode scratch and inference;"
            f" at least the arena: {_mb(solo)}"
        )
        return solo

    def _peak(self, arena: int, scratch: int, batch: int, reserve: int) -> int:
        base, working_set = self.report.base_bytes, self._working_set(batch)
        peak = base + arena + scratch + working_set + reserve
        said = f"reserve {_mb(RESERVE_BYTES)}"
        said += f" + {_mb(self._doubt_bytes)} of doubt" if self._doubt_bytes else ""
        said += f" + staged images {_mb(self._staged_bytes)}" if self._staged_bytes else ""
        self.why["peak_bytes"] = (
            f"base {_mb(base)} + arena {_mb(arena)} + decode scratch {_mb(scratch)}"
            f" + inference {_mb(working_set)} + {said} = {_mb(peak)}"
        )
        return peak

    def _batch_wait_s(self, batch: int) -> float:
        wait_s = batch * self.report.inference_s
        self.why["batch_wait_s"] = f"{batch} x {self.report.inference_s:.3f} s of inference = {wait_s:.3f} s"
        return wait_s

    def _pin_memory(self) -> bool:
        allowed = self.ceilings.pin_memory
        permitted = allowed is not False if self._fixed else bool(allowed)
        reason = "permitted" if permitted else "off until a measurement on a GPU says otherwise"
        self.why["pin_memory"] = reason if self.host.gpu else "no GPU"
        return self.host.gpu and permitted


def in_processes(plan: IngestPlan) -> IngestPlan:
    """Return the plan with decode processes, of which one more waits, in place of decode threads."""
    count = plan.decode_workers + 1
    extra_bytes = DECODE_PROCESS_BYTES * count
    peak = plan.peak_bytes + extra_bytes
    why = {
        **plan.why,
        "decode_engine": "decode threads slowed the GPU's inference: processes",
        "peak_bytes": f"{plan.why['peak_bytes']}; + {count} decode processes {_mb(extra_bytes)} = {_mb(peak)}",
    }
    return replace(plan, decode_engine="processes", peak_bytes=peak, why=why)


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def _at_most(value: int, ceiling: int | None) -> int:
    return value if ceiling is None else min(value, ceiling)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / _MB:.0f} MB"
