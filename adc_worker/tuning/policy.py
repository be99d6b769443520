"""From a job's measurements to its plan. Pure: numbers in, a plan out; opens nothing, sleeps never."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
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
        report, host, why = self.report, self.host, self.why
        staged_bytes = max(host.staging_bytes, report.compressed_bytes) if host.staging_in_memory else 0
        reserve = RESERVE_BYTES * (2 if report.uncertain else 1) + staged_bytes
        workers, scratch, images_bytes = self._share_memory(self._wanted_workers(), self.room_bytes - reserve)
        downloads_most = self._operators(DOWNLOADS_MAX, self.ceilings.downloads, FIXED_DOWNLOADS)
        rates = {
            # What the probe's downloads brought: they may have shared the link, and only trying more of them tells.
            "link": min(downloads_most / report.download_s, report.downloads / max(report.transfer_s, 1e-6)),
            "decode": workers / max(report.decode_s, 1e-6),
            "inference": 1 / report.inference_s,
        }
        slowest = min(rates, key=lambda stage: rates[stage])
        rate = rates[slowest]
        held = self.lease.held_limit(rate)
        why["held_limit"] = f"{rate:.2f} images/s x 0.5 x {self.lease.ack_wait_s:.0f} s of lease = {held}"
        wanted = self._wanted_batch()
        batch = self._batch(images_bytes, wanted, max(1, held // 2))
        prefetch = self._prefetch(images_bytes - self._working_set(wanted), wanted, workers)
        arena = self._arena(images_bytes - self._working_set(batch), batch, prefetch)
        batch_bytes = max(report.tensor_bytes_per_image, arena // BATCHES_IN_ARENA)
        why["batch_bytes"] = f"a third of the arena, at least one image: {_mb(batch_bytes)}"
        downloads = self._downloads(rate, downloads_most)
        staged = self._staged_ahead(rate, downloads, batch, held)
        working_set = self._working_set(batch)
        peak = report.base_bytes + arena + scratch + working_set + reserve
        why["peak_bytes"] = (
            f"base {_mb(report.base_bytes)} + arena {_mb(arena)} + decode scratch {_mb(scratch)}"
            f" + inference {_mb(working_set)} + reserve {_mb(reserve)} = {_mb(peak)}"
        )
        binds = "memory" if batch < min(wanted, held // 2) else "lease" if batch < wanted else slowest
        why["images_per_s"] = (
            f"link {rates['link']:.1f} ({downloads_most} downloads of {report.download_s:.2f} s, "
            f"{report.downloads:.1f} of {report.transfer_s:.2f} s may share it), "
            f"decode {rates['decode']:.1f} ({workers} x {report.decode_s:.3f} s), "
            f"inference {rates['inference']:.1f} (1 / {report.inference_s:.3f} s): {binds} binds"
        )
        # Up to the hard limit; what others hold passes, and an image that is refused is refused for good.
        solo = host.limit_bytes - report.base_bytes - reserve - scratch - self._working_set(1)
        return IngestPlan(
            batch_size=batch,
            batch_bytes=batch_bytes,
            prefetch_factor=prefetch,
            decode_workers=workers,
            decode_engine="threads",
            arena_bytes=arena,
            scratch_bytes=scratch,
            solo_bytes=max(arena, solo),
            pin_memory=self._pin_memory(),
            download_concurrency=downloads,
            staged_ahead=staged,
            fetch_size=self._fetch_size(rate, staged),
            held_limit=held,
            batch_wait_s=batch * report.inference_s,
            base_bytes=report.base_bytes,
            peak_bytes=peak,
            images_per_s=rate,
            binds=binds,
            why=why,
        )

    @property
    def _fixed(self) -> bool:
        return self.ceilings.mode == "fixed"

    def _operators(self, computed: int, ceiling: int | None, old_default: int) -> int:
        """Return the computed value within the operator's ceiling; in fixed mode that itself, or its old default."""
        return (ceiling or old_default) if self._fixed else _at_most(computed, ceiling)

    def _wanted_workers(self) -> int:
        report, cores = self.report, self.host.cores
        if self._fixed:
            workers = _at_most(self.ceilings.fixed_decode_workers, self.ceilings.decode_workers)
            self.why["decode_workers"] = f"AMI_NUM_WORKERS or its old default: {workers}"
            return workers
        needed = math.ceil(DECODE_HEADROOM * report.decode_s / report.inference_s)
        workers = _at_most(max(1, min(needed, cores)), self.ceilings.decode_workers)
        self.why["decode_workers"] = (
            f"{DECODE_HEADROOM} x decode {report.decode_s:.3f} s / inference {report.inference_s:.3f} s = {needed}, "
            f"{cores} cores: {workers}"
        )
        return workers

    def _share_memory(self, wanted_workers: int, left: int) -> tuple[int, int, int]:
        """Return decode workers, their scratch, and what is left for the images of batches with all they need.

        In proportion where memory is scarce, so that more takes none away.
        """
        one, image = self.report.decode_scratch_bytes + self.report.compressed_bytes, self._bytes_per_image
        workers = max(1, min(wanted_workers, left // (one + image)))
        self.why["decode_workers"] += f"; {_mb(max(0, left))} holds {max(0, left // (one + image))}"
        return workers, workers * one, min(left - one, max(left * image // (one + image), left - wanted_workers * one))

    @property
    def _place(self) -> int:
        """An image's bytes in the arena: whole pages."""
        return -(-self.report.tensor_bytes_per_image // PAGE_BYTES) * PAGE_BYTES

    @property
    def _bytes_per_image(self) -> int:
        """What an image more in a batch costs: its place in each batch of the arena, and inference."""
        return BATCHES_IN_ARENA * self._place + self.report.inference_peak_bytes

    def _working_set(self, batch: int) -> int:
        return self.report.inference_peak_bytes * min(self.ceilings.images_per_call, batch)

    def _wanted_batch(self) -> int:
        if self._fixed:
            self.why["batch_size"] = "AMI_ANTENNA_API_BATCH_SIZE or its old default"
            return self.ceilings.tasks_per_fetch or BATCH_SIZE_MAX
        ratio, image_bytes = self.report.download_inference_ratio, self.report.tensor_bytes_per_image
        asked = min(BATCH_SIZE_MAX, max(BATCH_SIZE_MIN, math.ceil(BATCH_SIZE_MIN * ratio)))
        holds = max(1, BATCH_BYTES_CAP // image_bytes)
        self.why["batch_size"] = (
            f"download:inference {ratio:.2f} asks for {asked}; {_mb(image_bytes)} an image: "
            f"{_mb(BATCH_BYTES_CAP)} a batch holds {holds}"
        )
        return min(asked, holds)

    def _batch(self, images_bytes: int, wanted: int, lease: int) -> int:
        fits = max(1, images_bytes // self._bytes_per_image)
        gpu, per_image = "", self.report.vram_peak_bytes
        if per_image and self.host.vram_free_bytes < per_image * self.ceilings.images_per_call:  # else calls bound it
            fits = min(fits, max(1, self.host.vram_free_bytes // per_image))
            gpu = f" with {_mb(per_image)} of the GPU's {_mb(self.host.vram_free_bytes)} each"
        batch = min(wanted, lease, fits)
        self.why["batch_size"] += (
            f"; {_mb(max(0, images_bytes))} for images, {BATCHES_IN_ARENA} batches and inference holds"
            f" {fits}{gpu}, half the lease {lease}: {batch}"
        )
        return batch

    def _prefetch(self, pixels_bytes: int, wanted_batch: int, workers: int) -> int:
        """Return the batches decoded ahead: more than one only where memory holds the batches that were wanted."""
        ratio = self.report.download_inference_ratio
        # That many and one are decoded or ready at a time: every worker needs an image.
        busy = max(1, min(PREFETCH_MAX, math.ceil(workers / wanted_batch) - 1))
        computed = max(busy, min(PREFETCH_MAX, math.ceil(ratio)))
        wanted = self._operators(computed, self.ceilings.prefetch_factor, FIXED_PREFETCH)
        needed = (busy + BATCHES_IN_ARENA - 1) * wanted_batch * self._place if busy > 1 else 0
        cap = pixels_bytes if self._fixed else min(max(ARENA_BYTES_CAP, needed), pixels_bytes)
        fits = max(1, cap // (wanted_batch * self._place) - (BATCHES_IN_ARENA - 1))
        self.why["prefetch_factor"] = (
            f"download:inference {ratio:.2f} and {workers} decode workers ask for {wanted}, "
            f"{_mb(max(0, cap))} holds {fits}"
        )
        return min(wanted, fits)

    def _arena(self, pixels_bytes: int, batch: int, prefetch: int) -> int:
        batch_bytes = batch * self._place
        wanted = (prefetch + BATCHES_IN_ARENA - 1) * batch_bytes
        self.why["arena_bytes"] = (
            f"({prefetch} ready + 1 inferred + 1 decoding) x {_mb(batch_bytes)} = {_mb(wanted)}, "
            f"{_mb(max(0, pixels_bytes))} left for it"
        )
        return max(self._place, min(wanted, pixels_bytes))

    def _downloads(self, rate: float, most: int) -> int:
        busy = DOWNLOAD_HEADROOM * rate * self.report.download_s
        self.why["download_concurrency"] = (
            f"{rate:.2f} images/s x {self.report.download_s:.2f} s x {DOWNLOAD_HEADROOM} = {busy:.1f}, at most {most}"
        )
        return most if self._fixed else min(most, max(DOWNLOADS_MIN, math.ceil(busy)))

    def _staged_ahead(self, rate: float, downloads: int, batch: int, held: int) -> int:
        wanted = downloads + 2 * batch + math.ceil(rate * FETCH_COVER_S)
        fits = max(1, self.host.staging_bytes // self.report.compressed_bytes)
        self.why["staged_ahead"] = (
            f"{downloads} downloading + 2 batches of {batch} + {FETCH_COVER_S:.0f} s of fetching = {wanted}; "
            f"lease allows {held}, {'memory' if self.host.staging_in_memory else 'disk'} {fits}"
        )
        return max(1, min(wanted, held, fits))

    def _fetch_size(self, rate: float, staged: int) -> int:
        computed = min(TASKS_PER_FETCH_MAX, max(1, math.ceil(rate * FETCH_COVER_S)))
        wanted = self._operators(computed, self.ceilings.tasks_per_fetch, BATCH_SIZE_MAX)
        self.why["fetch_size"] = f"{FETCH_COVER_S:.0f} s of {rate:.2f} images/s = {wanted}, at most {staged} staged"
        return min(wanted, staged)

    def _pin_memory(self) -> bool:
        allowed = self.ceilings.pin_memory
        permitted = allowed is not False if self._fixed else bool(allowed)
        reason = "permitted" if permitted else "off until a measurement on a GPU says otherwise"
        self.why["pin_memory"] = reason if self.host.gpu else "no GPU"
        return self.host.gpu and permitted


def in_processes(plan: IngestPlan) -> IngestPlan:
    """Return the plan with decode processes, of which one more waits, in place of decode threads."""
    extra_bytes = DECODE_PROCESS_BYTES * (plan.decode_workers + 1)
    return replace(plan, decode_engine="processes", peak_bytes=plan.peak_bytes + extra_bytes)


def _at_most(value: int, ceiling: int | None) -> int:
    return value if ceiling is None else min(value, ceiling)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / _MB:.0f} MB"
