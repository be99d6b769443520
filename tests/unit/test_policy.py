"""The policy: a few plans checked by hand, three sentences about them, and what holds for every plan."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.host.budget import HostBudget
from adc_worker.planning.ceilings import Ceilings
from adc_worker.planning.measurements import PROBE_DOWNLOADS, ProbeReport, Sighting
from adc_worker.planning.memory_cost import PAGE_BYTES
from adc_worker.planning.plan import IngestPlan, descriptors
from adc_worker.planning.policy import (
    AIM,
    ARENA_BYTES_CAP,
    BATCH_BYTES_CAP,
    BATCH_SIZE_MAX,
    DOWNLOADS_MAX,
    PREFETCH_MAX,
    RESERVE_BYTES,
    TASKS_PER_FETCH_MAX,
    IngestPolicy,
)
from tests.support.fakes import GB, MB, host, image_probe, report


def plan(
    measured: ProbeReport, machine: HostBudget, ceilings: Ceilings | None = None, lease: LeaseTerms | None = None
) -> IngestPlan:
    return IngestPolicy(ceilings).plan(measured, machine, lease or LeaseTerms())


# --- plans checked by hand


def test_a_usual_job_on_a_usual_machine() -> None:
    """26.5 MB an image, download and inference 0.2 s: 5 images/s; 120 MB hold 4, three batches 318.5 MB."""
    page = 26_542_080  # 4096 x 2160 x 3, 6480 pages
    made = plan(report(image_probe()), host())
    assert made.images_per_s == 5.0
    assert (made.batch_size, made.prefetch_factor) == (4, 1)
    assert made.arena_bytes == 3 * 4 * page
    assert made.batch_bytes == 4 * page
    assert made.decode_workers == 1  # 1.5 x 0.05 / 0.2, rounded up
    assert made.scratch_bytes == 5_500_000
    assert made.download_concurrency == 2  # 1.5 x 5 x 0.2 = 1.5 busy connections, two at least
    assert made.held_limit == 750  # 5 x 0.5 x 300
    assert made.staged_ahead == 2 + 2 * 4 + 10
    assert made.fetch_size == 10
    assert made.batch_wait_s == pytest.approx(0.8)
    assert made.peak_bytes == 1 * GB + 3 * 4 * page + 5_500_000 + 4 * 100 * MB + RESERVE_BYTES
    assert made.binds == "inference"
    assert not made.pin_memory


def test_the_photographs_of_the_incident() -> None:
    """4096 x 3072 photographs on 0.9 GB over the models: 37.7 MB each, and memory decides."""
    place = 4096 * 3072 * 3  # whole pages
    measured = report(
        image_probe(
            width_px=4096, height_px=3072, compressed_bytes=24 * MB, decode_scratch_bytes=5 * MB, decode_s=0.15
        ),
        inference_peak_bytes=50 * MB,
    )
    # 0.7 x 2.5 GB - 1 GB - 64 MB = 686 MB; a decode takes 29 MB, an image 3 x 37.7 + 50 = 163.2 MB.
    made = plan(measured, host(limit_bytes=2_500 * MB))
    assert made.decode_workers == 2
    assert made.batch_size == 3  # 120 MB hold 3; (686 - 58) / 163.2 = 3.8
    assert made.arena_bytes == 3 * 3 * place
    assert made.peak_bytes < 0.7 * 2_500 * MB
    assert plan(measured, host(limit_bytes=2_000 * MB)).batch_size == 1  # 336 - 58 MB hold 1.7
    assert plan(measured, host(limit_bytes=2_000 * MB)).binds == "memory"


def test_a_slow_gpu_holds_few_tasks() -> None:
    """At 20 s an image half a lease of 300 s is 7 tasks, and a batch half of them."""
    made = plan(report(image_probe(inference_s=20, width_px=100, height_px=100)), host())
    assert made.held_limit == 7
    assert made.batch_size == 3
    assert made.staged_ahead <= 7
    assert made.binds == "lease"


def test_an_image_that_fits_nowhere_is_still_planned_for_alone() -> None:
    """The plan is the smallest there is; what exceeds `solo_bytes` is refused image by image."""
    made = plan(report(image_probe(width_px=20_000, height_px=20_000)), host(limit_bytes=1_500 * MB))
    assert (made.batch_size, made.prefetch_factor, made.decode_workers) == (1, 1, 1)
    assert made.arena_bytes == pytest.approx(1200 * MB, abs=PAGE_BYTES)


def test_one_image_may_use_memory_up_to_the_hard_limit() -> None:
    """1.5 GB less base, reserve, one decode's scratch and inference; the soft cap does not bind it."""
    made = plan(report(image_probe()), host(limit_bytes=1_500 * MB))
    assert made.solo_bytes == 500 * MB - RESERVE_BYTES - 5_500_000 - 100 * MB
    assert made.solo_bytes > made.arena_bytes


def test_memory_that_others_took_is_not_planned_with() -> None:
    """A limit of 64 GB is worth nothing where the host has 200 MB left."""
    made = plan(
        report(image_probe(), inference_peak_bytes=10 * MB), host(limit_bytes=64 * GB, available_bytes=200 * MB)
    )
    assert made.batch_size == 1
    assert made.peak_bytes <= 1 * GB + 200 * MB


# --- the three sentences


def test_tiny_images_on_a_slow_link_get_large_batches_and_much_prefetch() -> None:
    """And many tasks staged: over as many connections as there may be, or by some more than may share the link."""
    tiny = image_probe(width_px=640, height_px=480, download_s=2.0, decode_s=0.004, inference_s=0.05)
    far, narrow = (plan(report(replace(tiny, first_byte_s=wait_s)), host()) for wait_s in (1.9, 1.0))
    for made in (far, narrow):
        assert made.batch_size == BATCH_SIZE_MAX
        assert made.prefetch_factor == PREFETCH_MAX
        assert made.binds == "link"
    assert far.download_concurrency == DOWNLOADS_MAX > narrow.download_concurrency > PROBE_DOWNLOADS
    assert far.staged_ahead >= 100
    assert far.staged_ahead / far.images_per_s > 5, "seconds of work"
    assert far.staged_ahead > narrow.staged_ahead > 2 * BATCH_SIZE_MAX


def test_a_link_that_the_probes_downloads_may_have_shared_is_not_hoped_to_be_wider() -> None:
    """Four downloads of 2 s each after their first byte: 2 images/s, or tasks would wait for it past their leases.

    And all of them are to come within a quarter of the lease. Downloads that wait for their first byte share nothing.
    """
    large = replace(image_probe(download_s=2.1, compressed_bytes=20 * MB), first_byte_s=0.1)
    made = plan(report(large), host())
    assert made.images_per_s == pytest.approx(2.0)
    assert made.held_limit == 300
    assert made.download_concurrency == 7  # 1.5 x 2 x 2.1
    assert plan(report(large), host(), lease=LeaseTerms(10)).download_concurrency == 5  # 40 MB/s x 2.5 s / 20 MB
    waiting = plan(report(replace(large, first_byte_s=1.6)), host())  # 8 images/s over the link, 5 to infer
    assert waiting.download_concurrency == 16  # 1.5 x 5 x 2.1


def test_decoders_are_kept_before_batches_where_memory_is_scarce() -> None:
    """Six would be wanted: five with an image of 18 MB each, one more inferred, and not three batches of two."""
    slow = image_probe(width_px=2880, height_px=2048, decode_s=0.08, inference_s=0.02)
    made = plan(report(slow, inference_peak_bytes=10 * MB), host(limit_bytes=1_750 * MB))
    assert (made.batch_size, made.decode_workers, made.prefetch_factor) == (1, 5, 4)
    assert made.binds == "memory"


def test_mixed_sizes_get_batches_of_the_usual_one_in_the_memory_of_the_largest() -> None:
    """One image of 75 Mpx in the list does not bring all others down to batches of one."""
    small, huge = image_probe(width_px=640, height_px=480, download_s=2.0), Sighting(10_000, 7_500, 20 * MB, 30 * MB)
    known = [Sighting(640, 480, MB)] * 9
    alike, mixed = (
        plan(report(small, inference_peak_bytes=MB).with_sighted(sizes), host()) for sizes in (known, [*known, huge])
    )
    assert mixed.batch_size == alike.batch_size > 1
    assert mixed.batch_bytes == pytest.approx(225 * MB, rel=0.01)


def test_keeping_a_batch_on_a_slow_disk_is_shared_by_more_images() -> None:
    """50 ms a commit beside 50 ms of inference an image: a twentieth of a batch's inference."""
    quick = image_probe(width_px=640, height_px=480, download_s=0.02, inference_s=0.05)
    assert plan(report(quick), host()).batch_size == 4
    slow_disk = plan(report(replace(quick, keep_s=0.05)), host())
    assert slow_disk.batch_size == 20
    assert slow_disk.images_per_s == pytest.approx(1 / (0.05 + 0.05 / 20))


def test_few_descriptors_allow_few_downloads() -> None:
    """1024 allow all; of 200 most are for libraries and decoders."""
    far = replace(image_probe(download_s=2.0, inference_s=0.05), first_byte_s=1.9)
    few = plan(report(far), replace(host(), descriptors=200))
    assert descriptors(few.download_concurrency, few.decode_workers) <= 200
    assert few.download_concurrency < plan(report(far), host()).download_concurrency == DOWNLOADS_MAX


@pytest.mark.parametrize(
    ("changes", "limits", "ceilings", "binds"),
    [
        ({"download_s": 30.0}, {}, {}, "link"),
        ({"download_s": 30.0}, {}, {"downloads": 4}, "ceiling"),
        ({"decode_s": 9.0}, {}, {}, "decode"),
        ({"decode_s": 9.0}, {}, {"decode_workers": 2}, "ceiling"),
        ({"decode_s": 9.0}, {"limit_bytes": 1_800 * MB}, {}, "memory"),
        ({}, {"limit_bytes": 1_800 * MB}, {}, "memory"),
        ({}, {}, {}, "inference"),
    ],
)
def test_more_of_what_binds_is_faster_or_allows_larger_batches(
    changes: dict[str, float], limits: dict[str, int], ceilings: dict[str, int], binds: str
) -> None:
    """Ten times as much of it, and the verdict of `ami worker tune` is none that an operator acts upon in vain."""
    one = image_probe(**changes)  # type: ignore[arg-type]
    if "download_s" in changes:
        one = replace(one, first_byte_s=29.0)
    machine = host(**limits)  # type: ignore[arg-type]
    made = plan(report(one), machine, Ceilings(**ceilings))  # type: ignore[arg-type]
    assert made.binds == binds
    better = {
        "link": lambda: plan(report(replace(one, download_s=3.0, first_byte_s=2.9)), machine),
        "decode": lambda: plan(report(one), replace(machine, cores=80)),
        "ceiling": lambda: plan(report(one), machine),
        "memory": lambda: plan(report(one), host()),
        "inference": lambda: plan(report(replace(one, inference_s=one.inference_s / 10)), machine),
    }[binds]()
    assert (better.images_per_s, better.batch_size) > (made.images_per_s, made.batch_size)


def test_huge_images_get_small_batches_and_no_prefetch() -> None:
    """Whatever the link."""
    huge = image_probe(width_px=8000, height_px=6000, download_s=2.0, decode_s=0.5, inference_s=0.5)
    made = plan(report(huge), host())
    assert made.batch_size == 1
    assert made.prefetch_factor == 1
    assert made.staged_ahead == 6 + 2 * 1 + 4  # six downloads bring 2 images/s, 4 cover two seconds of fetching


def test_a_fast_link_and_fast_inference_get_small_batches_and_no_prefetch() -> None:
    """There is nothing to hide, and few tasks are staged."""
    quick = image_probe(width_px=1280, height_px=720, download_s=0.02, decode_s=0.004, inference_s=0.02)
    made = plan(report(quick), host())
    assert made.batch_size == 4
    assert made.prefetch_factor == 1
    slow_link = plan(report(replace(quick, download_s=2.0)), host())
    assert made.download_concurrency == 2 < slow_link.download_concurrency
    # 2 s of fetching are 100 images at 50 images/s: all but ten of them cover the latency of fetches alone.
    assert made.staged_ahead == 2 + 2 * 4 + 100
    assert made.staged_ahead / made.images_per_s < 2.5, "seconds of work"


def test_a_gpu_is_pinned_for_only_where_the_operator_permits_it() -> None:
    """`false` forbids, `true` permits, and the CPU needs none."""
    usual = report(image_probe())
    assert not plan(usual, host(gpu=True)).pin_memory
    assert plan(usual, host(gpu=True), Ceilings(pin_memory=True)).pin_memory
    assert not plan(usual, host(gpu=False), Ceilings(pin_memory=True)).pin_memory
    assert plan(usual, host(gpu=True), Ceilings(mode="fixed")).pin_memory
    assert not plan(usual, host(gpu=True), Ceilings(mode="fixed", pin_memory=False)).pin_memory


def test_a_gpu_that_cannot_hold_a_call_gets_batches_that_it_holds() -> None:
    """2 GB of its memory an image, 5 GB free: two. Where a whole call of eight fits, the call bounds it."""
    hungry = replace(report(image_probe()), vram_peak_bytes=2 * GB)
    assert plan(hungry, replace(host(gpu=True), vram_free_bytes=5 * GB)).batch_size == 2
    assert plan(hungry, replace(host(gpu=True), vram_free_bytes=1 * GB)).batch_size == 1
    assert plan(hungry, replace(host(gpu=True), vram_free_bytes=16 * GB)).batch_size == 4


# --- fixed mode


def test_fixed_mode_takes_the_old_defaults() -> None:
    """24 tasks per fetch and batch, prefetch 4, 8 downloads, 4 decode workers."""
    tiny = report(image_probe(width_px=640, height_px=480))
    made = plan(tiny, host(), Ceilings(mode="fixed"))
    assert (made.batch_size, made.fetch_size, made.prefetch_factor) == (24, 24, 4)
    assert (made.download_concurrency, made.decode_workers) == (8, 4)


def test_fixed_mode_takes_the_operators_values_as_they_are() -> None:
    """Also above the old defaults: they are no ceilings here."""
    tiny = report(image_probe(width_px=640, height_px=480))
    wanted = Ceilings(mode="fixed", tasks_per_fetch=48, prefetch_factor=6, downloads=20, fixed_decode_workers=7)
    made = plan(tiny, host(), wanted)
    assert (made.batch_size, made.fetch_size, made.prefetch_factor) == (48, 48, 6)
    assert (made.download_concurrency, made.decode_workers) == (20, 7)


def test_fixed_mode_takes_batches_that_auto_would_not() -> None:
    """24 images of 26.5 MB and four batches ahead are 3.8 GB: with memory for it, as it was asked for."""
    made = plan(report(image_probe()), host(limit_bytes=64 * GB, available_bytes=60 * GB), Ceilings(mode="fixed"))
    assert made.arena_bytes == 6 * 24 * 26_542_080 > ARENA_BYTES_CAP
    assert made.batch_bytes >= 24 * 26_542_080 > BATCH_BYTES_CAP


# --- what holds for every plan

probes = st.builds(
    image_probe,
    width_px=st.integers(64, 2_000) | st.integers(64, 12_000),
    height_px=st.integers(64, 2_000) | st.integers(64, 9_000),
    compressed_bytes=st.integers(5_000, 60 * MB),
    decode_scratch_bytes=st.integers(10_000, 5 * MB) | st.integers(10_000, 400 * MB),
    download_s=st.floats(0.001, 60),
    decode_s=st.floats(0, 5),
    inference_s=st.floats(0, 1) | st.floats(0, 60),
    keep_s=st.floats(0, 0.01) | st.floats(0, 1),
)
reports = st.builds(
    report,
    probes,
    base_bytes=st.integers(300 * MB, 6 * GB),
    inference_peak_bytes=st.integers(0, 10 * MB) | st.integers(0, 2 * GB),
)
sightings = st.builds(
    Sighting,
    width_px=st.integers(64, 2_000) | st.integers(64, 12_000),
    height_px=st.integers(64, 2_000) | st.integers(64, 9_000),
    compressed_bytes=st.integers(5_000, 60 * MB),
    decode_scratch_bytes=st.integers(10_000, 400 * MB),
)
mixed = st.builds(ProbeReport.with_sighted, reports, st.lists(sightings, max_size=4))
leases = st.builds(LeaseTerms, ack_wait_s=st.floats(1, 3600))
ceiling = st.none() | st.integers(1, 40)
all_ceilings = st.builds(
    Ceilings,
    soft_cap=st.floats(0.1, 0.95),
    mode=st.sampled_from(["auto", "fixed"]),
    tasks_per_fetch=ceiling,
    prefetch_factor=ceiling,
    downloads=ceiling,
    decode_workers=ceiling,
    fixed_decode_workers=st.integers(1, 16),
    pin_memory=st.none() | st.booleans(),
    images_per_call=st.integers(1, 32),
)
often = settings(max_examples=200, deadline=None)


def place(measured: ProbeReport) -> int:
    """Whole pages: what an image takes in the arena."""
    return -(-measured.tensor_bytes_per_image // PAGE_BYTES) * PAGE_BYTES


def smallest_peak(measured: ProbeReport) -> int:
    """What one image at a time needs: itself, one decode, one inference."""
    one_decode = measured.decode_scratch_bytes + measured.compressed_bytes
    inference = measured.inference_bytes(measured.tensor_bytes_per_image)
    return measured.base_bytes + RESERVE_BYTES + place(measured) + one_decode + inference


@dataclass(frozen=True)
class Case:
    """One call of the policy."""

    measured: ProbeReport
    machine: HostBudget
    lease: LeaseTerms
    ceilings: Ceilings

    def plan(self) -> IngestPlan:
        return plan(self.measured, self.machine, self.ceilings, self.lease)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw machines with room for less than one image up to twenty, where the arithmetic is, or for any number."""
    measured, ceilings = draw(reports | mixed), draw(all_ceilings)
    needed, one = smallest_peak(measured), smallest_peak(measured) - measured.base_bytes - RESERVE_BYTES
    room = needed + int(draw(st.floats(-1, 20) | st.floats(-1, 1000)) * one)
    machine = host(
        limit_bytes=max(1, int(room / ceilings.soft_cap)),
        available_bytes=max(0, int(room - measured.base_bytes + draw(st.floats(-1, 20)) * one)),
        cores=draw(st.integers(1, 64)),
        staging_bytes=draw(st.integers(1, 500 * GB)),
        gpu=draw(st.booleans()),
    )
    return Case(measured, machine, draw(leases), ceilings)


@often
@given(cases())
def test_the_same_inputs_always_give_the_same_plan(case: Case) -> None:
    """Also from another policy object, and after other plans."""
    policy = IngestPolicy(case.ceilings)
    first = policy.plan(case.measured, case.machine, case.lease)
    policy.plan(report(image_probe()), host(), LeaseTerms())
    assert policy.plan(case.measured, case.machine, case.lease) == first == case.plan()


@often
@given(cases())
def test_the_predicted_peak_stays_below_what_may_be_used(case: Case) -> None:
    """Whenever one image at a time does; also in fixed mode, whatever the operator asks for."""
    made = case.plan()
    usable = min(
        int(case.ceilings.soft_cap * case.machine.limit_bytes),
        case.measured.base_bytes + int(AIM * case.machine.available_bytes),
    )
    assert made.peak_bytes <= max(usable, smallest_peak(case.measured))
    assert made.peak_bytes >= smallest_peak(case.measured)


@often
@given(cases())
def test_an_image_alone_stays_below_the_hard_limit(case: Case) -> None:
    """`solo_bytes` in place of the arena, whenever that is more than the arena.

    What others hold at the moment does not count: an image that is refused is refused for good.
    """
    made = case.plan()
    hard = case.machine.limit_bytes
    others = (
        smallest_peak(case.measured)
        - place(case.measured)
        - case.measured.decode_scratch_bytes
        - case.measured.compressed_bytes
    )
    assert made.solo_bytes >= made.arena_bytes
    assert made.solo_bytes == made.arena_bytes or others + made.scratch_bytes + made.solo_bytes <= hard


@often
@given(cases())
def test_a_call_of_any_known_size_takes_no_more_than_was_planned(case: Case) -> None:
    """However many of that size a batch may have, and a call take at once."""
    made, measured = case.plan(), case.measured
    planned = made.peak_bytes - made.base_bytes - made.arena_bytes - made.scratch_bytes - RESERVE_BYTES
    for image in (*measured.images, *measured.sighted):
        at_once = min(case.ceilings.images_per_call, made.batch_size, max(1, made.batch_bytes // image.tensor_bytes))
        assert at_once * measured.inference_bytes(image.tensor_bytes) <= planned


@often
@given(cases(), st.integers(0, 4000), st.integers(0, 4000))
def test_larger_images_never_get_a_larger_batch(case: Case, wider: int, higher: int) -> None:
    """All else being equal."""
    image, alike = case.measured.images[0], replace(case.measured, sighted=())
    larger = replace(image, width_px=image.width_px + wider, height_px=image.height_px + higher)
    many = replace(case, measured=alike).plan().batch_size
    assert replace(case, measured=replace(alike, images=(larger, larger))).plan().batch_size <= many


@often
@given(cases(), st.floats(0, 8), st.floats(0, 8))
def test_more_memory_never_lowers_anything(case: Case, limit: float, available: float) -> None:
    """A larger machine is never slower."""
    one = smallest_peak(case.measured) - case.measured.base_bytes
    more = replace(
        case.machine,
        limit_bytes=case.machine.limit_bytes + int(limit * one),
        available_bytes=case.machine.available_bytes + int(available * one),
    )
    small, large = case.plan(), replace(case, machine=more).plan()
    assert large.batch_size >= small.batch_size
    assert large.decode_workers >= small.decode_workers
    assert large.images_per_s >= small.images_per_s


@often
@given(cases())
def test_no_ceiling_is_exceeded(case: Case) -> None:
    """Neither the operator's nor the lease's, nor those of measurements in auto mode."""
    made = case.plan()
    assert made.fetch_size <= (case.ceilings.tasks_per_fetch or TASKS_PER_FETCH_MAX)
    assert made.prefetch_factor <= (case.ceilings.prefetch_factor or max(PREFETCH_MAX, made.decode_workers))
    assert made.download_concurrency <= (case.ceilings.downloads or DOWNLOADS_MAX)
    assert made.decode_workers <= (case.ceilings.decode_workers or 64)
    assert made.staged_ahead <= max(1, case.machine.staging_bytes // case.measured.compressed_bytes)
    assert made.fetch_size <= made.staged_ahead <= made.held_limit
    assert made.held_limit <= max(1, made.images_per_s * case.lease.ack_wait_s / 2)
    assert made.batch_size <= max(1, made.held_limit // 2)
    assert not (made.pin_memory and case.ceilings.pin_memory is False)
    if case.ceilings.mode == "auto":
        assert made.decode_workers <= case.machine.cores
        assert made.batch_size <= BATCH_SIZE_MAX
        assert made.batch_size == 1 or made.batch_size * case.measured.usual_tensor_bytes <= BATCH_BYTES_CAP
        largest_in_a_batch = max(1, made.batch_bytes // place(case.measured))
        keeps_decoders_busy = made.prefetch_factor * largest_in_a_batch < made.decode_workers
        assert made.prefetch_factor == 1 or keeps_decoders_busy or made.arena_bytes <= ARENA_BYTES_CAP


@often
@given(cases())
def test_the_arena_holds_its_batches(case: Case) -> None:
    """Each in whole pages: those ready, one inferred, one being decoded; an image alone at the least."""
    made = case.plan()
    assert made.arena_bytes >= place(case.measured)
    assert made.batch_bytes >= case.measured.tensor_bytes_per_image
    if made.batch_size > 1:
        assert made.arena_bytes >= (made.prefetch_factor + 2) * made.batch_bytes
        assert made.batch_bytes >= made.batch_size * case.measured.usual_tensor_bytes


@often
@given(cases())
def test_every_tuned_field_has_its_line_of_arithmetic(case: Case) -> None:
    """Which is what `ami worker tune` prints; a line about a number ends with that number, in its unit."""
    made = case.plan()
    assert set(made.why) == {field.name for field in fields(made)} - {"why"}
    for name, value in made.log_fields().items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            last = re.findall(r"[\d.]+", made.why[name])[-1].rstrip(".")
            said = f"{value / MB:.0f}" if name.endswith("_bytes") else f"{value:.{len(last.partition('.')[2])}f}"
            assert last == said, made.why[name]


@often
@given(cases())
def test_what_is_said_to_bind_does(case: Case) -> None:
    """Ten times more of it is never slower, and the rate is that of the slowest stage."""
    made = case.plan()
    assert made.images_per_s <= 1 / case.measured.inference_s
    assert made.images_per_s <= made.decode_workers / max(case.measured.decode_s, 1e-6)
    in_the_arena = (made.prefetch_factor + 1) * max(1, made.batch_bytes // place(case.measured))
    decoding = min(made.decode_workers, max(in_the_arena, 1))
    if made.binds == "inference":
        assert made.images_per_s >= 1 / (case.measured.inference_s + case.measured.keep_s)
    if made.binds == "decode":
        assert made.images_per_s == pytest.approx(decoding / max(case.measured.decode_s, 1e-6))


SWEPT = [
    report(image_probe(width_px=1000, height_px=1000, download_s=1.0), inference_peak_bytes=MB),
    report(
        image_probe(width_px=2000, height_px=1500, download_s=0.6, decode_s=0.6, decode_scratch_bytes=30 * MB),
        inference_peak_bytes=20 * MB,
    ),
    report(image_probe(width_px=500, height_px=500, decode_s=1.0), inference_peak_bytes=20 * MB),
]


@pytest.mark.parametrize("mode", ["auto", "fixed"])
@pytest.mark.parametrize("measured", SWEPT, ids=["slow link", "costly decode", "large results"])
def test_along_a_growing_machine_every_step_is_up_or_level(
    measured: ProbeReport, mode: Literal["auto", "fixed"]
) -> None:
    """From room for no image to room for all that is wanted, in steps smaller than an image."""
    needed = smallest_peak(measured)
    made = [
        plan(measured, host(limit_bytes=needed + step * 300_000, available_bytes=64 * GB), Ceilings(0.95, mode))
        for step in range(-100, 2500, 3)
    ]
    for field in ("batch_size", "decode_workers", "images_per_s"):
        values = [getattr(one, field) for one in made]
        assert values == sorted(values), field
    assert made[-1].batch_size > made[0].batch_size


@pytest.mark.parametrize("measured", SWEPT, ids=["slow link", "costly decode", "large results"])
def test_along_growing_images_every_step_is_down_or_level(measured: ProbeReport) -> None:
    """On a machine with 300 MB to spare, from thumbnails to 60 Mpx."""
    machine = host(limit_bytes=2 * GB, available_bytes=64 * GB)
    images = [replace(measured.images[0], width_px=100 + 40 * step, height_px=75 + 30 * step) for step in range(220)]
    sizes = [plan(replace(measured, images=(image, image)), machine).batch_size for image in images]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 1
