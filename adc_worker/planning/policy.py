"""From a job's measurements to its plan.

Pure: numbers in, a plan out. It opens nothing and never sleeps. docs/tuning.md has the same arithmetic in words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from adc_worker.antenna.leases import HORIZON_SHARE, LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.planning.ceilings import Ceilings
from adc_worker.planning.measurements import ProbeReport
from adc_worker.planning.memory_cost import BATCHES_IN_ARENA, MemoryCost
from adc_worker.planning.plan import IngestPlan, descriptors
from adc_worker.planning.reasoned import Reasoned, megabytes

_MB = 1_000_000

# More than this in one batch, or decoded in total, did not raise the rate
# (benchmarks/RESULTS.md, "Verification").
BATCH_BYTES_CAP = 120 * _MB
ARENA_BYTES_CAP = 400 * _MB
# 4 is what operators set by hand after the out-of-memory incident; 24 is today's worker's default.
BATCH_SIZE_MIN = 4
BATCH_SIZE_MAX = 24
PREFETCH_MAX = 8  # chosen: beyond it more batches only take memory
DOWNLOADS_MIN = 2
DOWNLOADS_MAX = 32  # chosen: as many connections as an image host takes from one client
# Today's constants, for `fixed` mode.
FIXED_DOWNLOADS = 8
FIXED_PREFETCH = 4
# Little's law gives the workers that are busy on average; half as many again cover the spread (chosen).
DOWNLOAD_HEADROOM = 1.5
DECODE_HEADROOM = 1.5
# An empty fetch takes 0.6 s and others up to 0.17 s (docs/antenna.md); staged work covers three of them.
FETCH_COVER_S = 2.0
TASKS_PER_FETCH_MAX = 64
# Part of a batch's inference that keeping its results may take: half of what the GPU may rest.
KEEP_SHARE = 0.05
# Interpreter heaps, connection buffers, 16 MB of results on their way into the journal, a megabyte
# of each post. The results of one image are in what inference was measured to need.
RESERVE_BYTES = 64 * _MB
# Plans fill this part of the memory that ingest may take: images a quarter larger fit, too.
AIM = 0.80
# numpy and simplejpeg in a process of their own (benchmarks/RESULTS.md, "Decode").
DECODE_PROCESS_BYTES = 14 * _MB
# A rate is a quotient; a stage that was measured as nothing takes at least this.
_SHORTEST_S = 1e-6


class IngestPolicy:
    """Plans how a job is fed. The same inputs always give the same plan."""

    def __init__(self, ceilings: Ceilings | None = None) -> None:
        self._ceilings = ceilings or Ceilings()

    def budget_bytes(self, base_bytes: int, host: HostBudget) -> int:
        """Return the memory of which plans leave a fifth of ingest's part.

        So plans reach the soft cap and no more.
        """
        soft_limit = self._ceilings.soft_cap * host.caution * host.limit_bytes
        by_soft_cap = int(base_bytes + (soft_limit - base_bytes) / AIM)
        by_availability = base_bytes + host.available_bytes
        return min(by_soft_cap, by_availability)

    def plan(self, report: ProbeReport, host: HostBudget, lease: LeaseTerms) -> IngestPlan:
        """Return the plan for a job that looks like `report` on a machine like `host`."""
        ingest_bytes = self.budget_bytes(report.base_bytes, host) - report.base_bytes
        room_bytes = int(AIM * ingest_bytes)
        cost = MemoryCost(report, self._ceilings.images_per_call)
        arithmetic = _Arithmetic(self._ceilings, report, host, lease, room_bytes, cost)
        return arithmetic.plan()


@dataclass(frozen=True, slots=True)
class _Fit:
    """Batch and decode workers that fit into memory; `cut` names what made the batch smaller."""

    batch: Reasoned[int]
    workers: Reasoned[int]
    cut: str


@dataclass(frozen=True, slots=True)
class _Rates:
    """Images/s of each stage, and how many decoders can be busy."""

    link: float
    decode: float
    inference: float
    busy_decoders: int
    why: str

    @property
    def slowest(self) -> str:
        by_stage = {"link": self.link, "decode": self.decode, "inference": self.inference}
        return min(by_stage, key=lambda stage: by_stage[stage])

    @property
    def images_per_s(self) -> float:
        return min(self.link, self.decode, self.inference)


@dataclass(frozen=True, slots=True)
class _Arithmetic:
    """The arithmetic of one plan: each method returns a field's value with its reason.

    Attributes:
        room_bytes: what a plan may take beside the base.
    """

    ceilings: Ceilings
    report: ProbeReport
    host: HostBudget
    lease: LeaseTerms
    room_bytes: int
    cost: MemoryCost

    def plan(self) -> IngestPlan:
        report = self.report
        room = self.room_bytes - self._reserve_bytes
        wanted_workers = self._wanted_workers()
        fit = self._fit(room, self._wanted_batch(), wanted_workers)
        workers = fit.workers.value
        connections = self._connections()
        rates = self._rates(connections, fit.batch.value, workers)
        rate = rates.images_per_s
        held = self._held(rate)
        fit = self._within_lease(fit, held.value)
        batch = fit.batch.value
        scratch = self._scratch(workers)
        pixels = room - scratch.value - self.cost.working_set_bytes(batch)
        prefetch = self._prefetch(pixels, batch, workers)
        arena = self._arena(pixels, batch, prefetch.value)
        downloads = self._downloads(rates, connections)
        staged = self._staged_ahead(rate, downloads.value, batch, held.value)
        return IngestPlan.of(
            batch_size=fit.batch,
            batch_bytes=self._batch_bytes(batch),
            prefetch_factor=prefetch,
            decode_workers=fit.workers,
            decode_engine=Reasoned("threads", "threads are faster; processes where threads slow a GPU's inference"),
            arena_bytes=arena,
            scratch_bytes=scratch,
            solo_bytes=self._solo(arena.value, scratch.value),
            pin_memory=self._pin_memory(),
            download_concurrency=downloads,
            staged_ahead=staged,
            fetch_size=self._fetch_size(rate, staged.value),
            held_limit=held,
            batch_wait_s=self._batch_wait(batch),
            base_bytes=Reasoned(
                report.base_bytes,
                f"measured after the models were loaded: {megabytes(report.base_bytes)}",
            ),
            peak_bytes=self._peak(arena.value, scratch.value, batch),
            images_per_s=Reasoned(rate, rates.why),
            binds=self._binds(rates, connections, fit, wanted_workers.value),
        )

    @property
    def _staged_bytes(self) -> int:
        """The memory that staged images take where their folder is in memory."""
        if not self.host.staging_in_memory:
            return 0
        return max(self.host.staging_bytes, self.report.compressed_bytes)

    @property
    def _doubt_bytes(self) -> int:
        return RESERVE_BYTES if self.report.uncertain else 0

    @property
    def _reserve_bytes(self) -> int:
        return RESERVE_BYTES + self._doubt_bytes + self._staged_bytes

    def _wanted_workers(self) -> Reasoned[int]:
        ceilings = self.ceilings
        if ceilings.is_fixed:
            workers = ceilings.fixed_decode_workers
            if ceilings.decode_workers is not None:
                workers = min(workers, ceilings.decode_workers)
            return Reasoned(workers, f"AMI_NUM_WORKERS or its old default: {workers}")
        decode_s = self.report.decode_s
        inference_s = self.report.inference_s
        cores = self.host.cores
        needed = max(1, math.ceil(DECODE_HEADROOM * decode_s / inference_s))
        computed = min(needed, cores)
        limited = ceilings.limit(computed, ceilings.decode_workers, 0)
        return Reasoned(
            limited.value,
            f"{DECODE_HEADROOM} x decode {decode_s:.3f} s / inference {inference_s:.3f} s"
            f" = {needed}, {cores} cores: {computed}{limited.note}",
        )

    def _wanted_batch(self) -> Reasoned[int]:
        report = self.report
        if self.ceilings.is_fixed:
            wanted = self.ceilings.tasks_per_fetch or BATCH_SIZE_MAX
            return Reasoned(wanted, f"AMI_ANTENNA_API_BATCH_SIZE or its old default: {wanted}")
        image_bytes = report.usual_tensor_bytes
        ratio = report.download_inference_ratio
        for_the_link = math.ceil(BATCH_SIZE_MIN * ratio)
        for_keeping = math.ceil(report.keep_s / (KEEP_SHARE * report.inference_s))
        asked = max(BATCH_SIZE_MIN, for_the_link, for_keeping)
        asked = min(BATCH_SIZE_MAX, asked)
        holds = max(1, BATCH_BYTES_CAP // image_bytes)
        return Reasoned(
            min(asked, holds),
            f"download:inference {ratio:.2f} and {1e3 * report.keep_s:.1f} ms to keep a batch ask"
            f" for {asked}; {megabytes(image_bytes)} an image:"
            f" {megabytes(BATCH_BYTES_CAP)} a batch holds {holds}",
        )

    def _fit(self, room: int, wanted_batch: Reasoned[int], wanted_workers: Reasoned[int]) -> _Fit:
        """Return the largest batch that fits with all decode workers.

        Where not even one image fits with all of them: one image, and the workers that fit. A decoder that stands
        still is the greater loss; and so no more memory ever takes either away.
        """
        batches = range(1, wanted_batch.value + 1)
        fitting = [n for n in batches if self.cost.needed_bytes(n, wanted_workers.value) <= room]
        fits = max(fitting, default=0)
        batch = max(1, fits)
        workers = wanted_workers.value
        if not fits:
            workers = self._fitting_workers(room, wanted_workers.value)
        cut = "memory" if fits < wanted_batch.value else ""
        left = megabytes(max(0, room))
        batch_why = f"{wanted_batch.why}; {left} with {wanted_workers.value} decoding {fits}"
        workers_why = f"{wanted_workers.why}; {left} with batches of {batch}: {workers}"
        fit = _Fit(Reasoned(batch, batch_why), Reasoned(workers, workers_why), cut)
        return self._within_vram(fit)

    def _fitting_workers(self, room: int, wanted: int) -> int:
        fitting = [n for n in range(1, wanted + 1) if self.cost.needed_bytes(1, n) <= room]
        return max(fitting, default=1)

    def _within_vram(self, fit: _Fit) -> _Fit:
        image_bytes = self.report.vram_bytes
        free_bytes = self.host.vram_free_bytes
        # Where the GPU holds a whole call, the size of calls is the bound, not that of batches.
        if not image_bytes or free_bytes >= image_bytes * self.ceilings.images_per_call:
            return fit
        holds = max(1, free_bytes // image_bytes)
        why = f"{fit.batch.why}; the GPU's {megabytes(free_bytes)}, {megabytes(image_bytes)} each, {holds}"
        if holds < fit.batch.value:
            return replace(fit, batch=Reasoned(holds, why), cut="vram")
        return replace(fit, batch=Reasoned(fit.batch.value, why))

    def _connections(self) -> int:
        """Return how many downloads there may be: by open files, and by the operator's setting."""
        files = self.host.descriptors - descriptors(0, self.host.cores)
        limited = self.ceilings.limit(DOWNLOADS_MAX, self.ceilings.downloads, FIXED_DOWNLOADS)
        return max(1, min(files // 2, limited.value))

    def _rates(self, connections: int, batch: int, workers: int) -> _Rates:
        """Return the rate of each stage. No more decoders are busy than batches may wait."""
        report = self.report
        depth = self.ceilings.limit(max(PREFETCH_MAX, workers), self.ceilings.prefetch_factor, FIXED_PREFETCH)
        busy = min(workers, (depth.value + 1) * self.cost.largest_images_in(batch))
        link = report.link_per_s(connections)
        decode = busy / max(report.decode_s, _SHORTEST_S)
        inference = 1 / (report.inference_s + report.keep_s / batch)
        why = (
            f"link {link:.1f} ({connections} downloads of {report.download_s:.2f} s,"
            f" {report.downloads:.1f} of {report.transfer_s:.2f} s may share it),"
            f" decode {decode:.1f} ({busy} x {report.decode_s:.3f} s),"
            f" inference {inference:.1f} ({report.inference_s:.3f} s with the copy to the device,"
            f" {report.keep_s:.3f} s a batch to keep results): {min(link, decode, inference):.2f}"
        )
        return _Rates(link, decode, inference, busy, why)

    def _held(self, rate: float) -> Reasoned[int]:
        """Return the tasks that may be leased at once."""
        held = self.lease.held_limit(rate)
        return Reasoned(
            held,
            f"{rate:.2f} images/s x {HORIZON_SHARE} x {self.lease.ack_wait_s:.0f} s of lease = {held}",
        )

    def _within_lease(self, fit: _Fit, held: int) -> _Fit:
        """Leave half of what is held to wait, so that no batch waits for its own leases."""
        allowed = max(1, held // 2)
        batch = min(fit.batch.value, allowed)
        cut = "lease" if allowed < fit.batch.value else fit.cut
        why = f"{fit.batch.why}; half of {held} leased {allowed}: {batch}"
        return replace(fit, batch=Reasoned(batch, why), cut=cut)

    def _batch_bytes(self, batch: int) -> Reasoned[int]:
        size_bytes = self.cost.batch_bytes(batch)
        why = f"{batch} usual images, or the largest one: {megabytes(size_bytes)}"
        return Reasoned(size_bytes, why)

    def _scratch(self, workers: int) -> Reasoned[int]:
        report = self.report
        scratch = workers * self.cost.decode_bytes
        return Reasoned(
            scratch,
            f"{workers} x ({megabytes(report.decode_scratch_bytes)} of a decoder +"
            f" {megabytes(report.compressed_bytes)} of its file) = {megabytes(scratch)}",
        )

    def _prefetch(self, pixels_bytes: int, batch: int, workers: int) -> Reasoned[int]:
        """Return the batches decoded ahead."""
        ratio = self.report.download_inference_ratio
        batch_bytes = self.cost.batch_bytes(batch)
        busy = self.cost.batches_ahead(batch, workers)
        computed = max(busy, min(PREFETCH_MAX, math.ceil(ratio)))
        wanted = self.ceilings.limit(computed, self.ceilings.prefetch_factor, FIXED_PREFETCH)
        cap = pixels_bytes
        if not self.ceilings.is_fixed:
            needed = (busy + BATCHES_IN_ARENA - 1) * batch_bytes if busy > 1 else 0
            cap = min(max(ARENA_BYTES_CAP, needed), pixels_bytes)
        fits = max(1, cap // batch_bytes - (BATCHES_IN_ARENA - 1))
        prefetch = min(wanted.value, fits)
        return Reasoned(
            prefetch,
            f"download:inference {ratio:.2f} and {workers} decode workers ask for"
            f" {computed}{wanted.note}; {megabytes(max(0, cap))} holds {fits}: {prefetch}",
        )

    def _arena(self, pixels_bytes: int, batch: int, prefetch: int) -> Reasoned[int]:
        batch_bytes = self.cost.batch_bytes(batch)
        wanted = (prefetch + BATCHES_IN_ARENA - 1) * batch_bytes
        arena = max(self.cost.largest_image_bytes, min(wanted, pixels_bytes))
        return Reasoned(
            arena,
            f"({prefetch} ready + 1 inferred + 1 decoding) x {megabytes(batch_bytes)}"
            f" = {megabytes(wanted)}, {megabytes(max(0, pixels_bytes))} left for it:"
            f" {megabytes(arena)}",
        )

    def _downloads(self, rates: _Rates, connections: int) -> Reasoned[int]:
        """Return the downloads that bring the planned rate.

        Downloads that mostly wait for their first byte hardly share the link: then as many as the other stages want.
        """
        report = self.report
        rate = rates.images_per_s
        if report.transfer_s < report.download_s / 2:
            rate = min(rates.decode, rates.inference, connections / report.download_s)
        busy = DOWNLOAD_HEADROOM * rate * report.download_s
        why = f"{rate:.2f} images/s x {report.download_s:.2f} s x {DOWNLOAD_HEADROOM} = {busy:.1f}"
        if self.ceilings.is_fixed:
            return Reasoned(connections, f"{why}, in fixed mode: {connections}")
        # Should they share it, all of the largest come within half of the time that a task is held for.
        time_s = HORIZON_SHARE / 2 * self.lease.ack_wait_s
        by_lease = int(time_s * report.link_bytes_per_s / report.compressed_bytes)
        computed = max(DOWNLOADS_MIN, min(by_lease, math.ceil(busy)))
        downloads = min(connections, computed)
        return Reasoned(
            downloads,
            f"{why}, lease allows {by_lease}, at least {DOWNLOADS_MIN}, at most {connections}: {downloads}",
        )

    def _staged_ahead(self, rate: float, downloads: int, batch: int, held: int) -> Reasoned[int]:
        wanted = downloads + 2 * batch + math.ceil(rate * FETCH_COVER_S)
        fits = max(1, self.host.staging_bytes // self.report.compressed_bytes)
        staged = max(1, min(wanted, held, fits))
        place = "memory" if self.host.staging_in_memory else "disk"
        return Reasoned(
            staged,
            f"{downloads} downloading + 2 batches of {batch} + {FETCH_COVER_S:.0f} s of fetching"
            f" = {wanted}; lease allows {held}, {place} {fits}: {staged}",
        )

    def _fetch_size(self, rate: float, staged: int) -> Reasoned[int]:
        needed = max(1, math.ceil(rate * FETCH_COVER_S))
        computed = min(TASKS_PER_FETCH_MAX, needed)
        wanted = self.ceilings.limit(computed, self.ceilings.tasks_per_fetch, BATCH_SIZE_MAX)
        fetch_size = min(wanted.value, staged)
        return Reasoned(
            fetch_size,
            f"{FETCH_COVER_S:.0f} s of {rate:.2f} images/s = {needed},"
            f" at most {TASKS_PER_FETCH_MAX}{wanted.note}; {staged} staged: {fetch_size}",
        )

    def _solo(self, arena: int, scratch: int) -> Reasoned[int]:
        """Return what an image alone could ever take in place of the arena.

        An image that is refused is refused for good. So this is the whole limit less what the worker itself always
        needs, and nothing that passes is taken off: other workers, other programs, staged images, doubt.
        """
        limit = self.host.whole_limit_bytes
        always_needed = self.report.base_bytes + RESERVE_BYTES + scratch
        alone = limit - always_needed - self.cost.working_set_bytes(1)
        solo = max(arena, alone)
        why = (
            f"the whole limit of {megabytes(limit)} less base, reserve, decode scratch and inference;"
            f" at least the arena: {megabytes(solo)}"
        )
        return Reasoned(solo, why)

    def _peak(self, arena: int, scratch: int, batch: int) -> Reasoned[int]:
        base = self.report.base_bytes
        working_set = self.cost.working_set_bytes(batch)
        peak = base + arena + scratch + working_set + self._reserve_bytes
        reserve = f"reserve {megabytes(RESERVE_BYTES)}"
        if self._doubt_bytes:
            reserve += f" + {megabytes(self._doubt_bytes)} of doubt"
        if self._staged_bytes:
            reserve += f" + staged images {megabytes(self._staged_bytes)}"
        return Reasoned(
            peak,
            f"base {megabytes(base)} + arena {megabytes(arena)} + decode scratch"
            f" {megabytes(scratch)} + inference {megabytes(working_set)} + {reserve}"
            f" = {megabytes(peak)}",
        )

    def _batch_wait(self, batch: int) -> Reasoned[float]:
        wait_s = batch * self.report.inference_s
        why = f"{batch} x {self.report.inference_s:.3f} s of inference = {wait_s:.3f} s"
        return Reasoned(wait_s, why)

    def _pin_memory(self) -> Reasoned[bool]:
        if not self.host.gpu:
            return Reasoned(value=False, why="no GPU")
        allowed = self.ceilings.pin_memory
        permitted = allowed is not False if self.ceilings.is_fixed else bool(allowed)
        reason = "permitted" if permitted else "off until a measurement on a GPU says otherwise"
        return Reasoned(permitted, reason)

    def _binds(self, rates: _Rates, connections: int, fit: _Fit, wanted_workers: int) -> Reasoned[str]:
        """Return what holds the plan back."""
        slowest = rates.slowest
        if slowest == "decode":
            if fit.workers.value < wanted_workers:
                why = f"decoding is slowest, and memory holds no more than {rates.busy_decoders} decoders"
                return Reasoned("memory", why)
            if self._setting_holds_decoders(rates.busy_decoders):
                why = f"decoding is slowest, and the settings allow no more than {rates.busy_decoders} decoders"
                return Reasoned("ceiling", why)
        if slowest == "link":
            with_most = self.report.link_per_s(DOWNLOADS_MAX)
            if self.report.link_per_s(connections) < with_most:
                why = f"the link is slowest, and settings or open files allow {connections} downloads"
                return Reasoned("ceiling", why)
        if fit.cut:
            return Reasoned(fit.cut, f"it keeps batches small; the slowest stage is {slowest}")
        return Reasoned(slowest, "the slowest stage")

    def _setting_holds_decoders(self, busy: int) -> bool:
        ceilings = self.ceilings
        if busy >= self.host.cores:
            return False
        at_the_ceiling = busy == ceilings.decode_workers
        return ceilings.is_fixed or at_the_ceiling or ceilings.prefetch_factor is not None


def in_processes(plan: IngestPlan) -> IngestPlan:
    """Return the plan with decode processes in place of decode threads. One more process waits."""
    count = plan.decode_workers + 1
    extra_bytes = DECODE_PROCESS_BYTES * count
    peak_bytes = plan.peak_bytes + extra_bytes
    engine_why = "decode threads slowed the GPU's inference: processes"
    peak_why = (
        f"{plan.why['peak_bytes']}; + {count} decode processes {megabytes(extra_bytes)} = {megabytes(peak_bytes)}"
    )
    return plan.with_changes(
        decode_engine=Reasoned("processes", engine_why),
        peak_bytes=Reasoned(peak_bytes, peak_why),
    )
