"""The governor's ladder, its gate, and what it takes for a change of the job."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.planning.ceilings import Ceilings
from adc_worker.planning.drift import FIRST_BATCHES, GROWTH, LARGER_BATCHES, SMALLER_BATCHES
from adc_worker.planning.governor import AHEAD_S, FALLING_BATCHES, Governor
from adc_worker.planning.measurements import ImageProbe, Sighting
from adc_worker.planning.plan import IngestPlan
from adc_worker.planning.policy import IngestPolicy
from adc_worker.planning.window import SETTLE_S, WINDOW_BATCHES
from tests.support.fakes import GB, MB, image_probe, report
from tests.support.governed import BASE, Governed, replayed

FIXED = Ceilings(mode="fixed", tasks_per_fetch=24, fixed_decode_workers=2)  # fills what memory it gets
FEW = Ceilings(mode="fixed", tasks_per_fetch=4, fixed_decode_workers=2)  # fills it with batches that stay as large


def _of_size(size: float) -> ImageProbe:
    return image_probe(width_px=int(4096 * size))


# --- the ladder


def test_a_plan_that_holds_is_left_alone() -> None:
    """As long as measured memory is what was predicted, nothing is changed and nothing is paused."""
    assert Governed().actions(200) == []
    assert Governed(ceilings=FIXED).actions(200) == []


def test_a_plan_reaches_four_fifths_of_its_memory_and_no_more() -> None:
    """That is the soft cap: 0.7 of the limit."""
    job = Governed(ceilings=FIXED)
    (decision,) = job.batches(1)
    assert decision.pressure <= 0.80
    assert job.governor.plan.peak_bytes == pytest.approx(0.7 * 3 * GB, rel=0.04)


def test_memory_that_others_take_shrinks_the_plan_once() -> None:
    """The new plan lies below the range in which nothing is changed."""
    job = Governed(ceilings=FIXED)
    before = job.governor.plan.arena_bytes
    assert job.actions(50, hog_bytes=1200 * MB) == ["shrink"]
    assert 0 < job.governor.plan.arena_bytes < before
    assert job.batches(1, hog_bytes=1200 * MB)[0].pressure <= 0.80


def test_memory_that_goes_on_falling_is_planned_for_at_once() -> None:
    """One change on the way down, however long it takes, and one up to what is left in the end."""
    job = Governed(ceilings=FIXED)
    ramp = [step * 80 * MB for step in range(int(AHEAD_S / 0.5))]
    actions = [action for hog_bytes in ramp for action in job.actions(1, hog_bytes=hog_bytes, batch_s=0.5)]
    assert actions == ["shrink"]
    assert job.actions(WINDOW_BATCHES, hog_bytes=ramp[-1]) in ([], ["grow"])


def test_memory_that_comes_back_is_used_again() -> None:
    """In one change, once the shrink has settled, and to the plan from before."""
    job = Governed(ceilings=FIXED)
    before = job.governor.plan
    job.batches(20, hog_bytes=1200 * MB)
    assert job.actions(100, ready=False) == ["grow"]
    assert job.governor.plan.arena_bytes == before.arena_bytes


def test_memory_that_comes_back_is_left_alone_while_the_gpu_does_not_wait() -> None:
    """No growth beyond a readiness of 0.95."""
    job = Governed(ceilings=FEW)
    job.batches(20, hog_bytes=1200 * MB)
    assert job.governor.plan.batch_size == FEW.tasks_per_fetch
    assert job.actions(100, ready=True) == []
    assert job.actions(20, ready=False)[:1] == ["grow"]


def test_batches_that_memory_kept_small_grow_with_it_though_they_are_always_ready() -> None:
    """Once, after the memory has been there for a while, and to the plan from before."""
    job = Governed(2 * GB)
    before = job.governor.plan
    assert job.actions(20, hog_bytes=650 * MB) == ["shrink"]
    assert job.governor.plan.batch_size < before.batch_size
    assert job.actions(FALLING_BATCHES - 1, batch_s=SETTLE_S) == []
    assert job.actions(100) == ["grow"]
    assert job.governor.plan.arena_bytes == before.arena_bytes


def test_memory_that_comes_and_goes_changes_nothing() -> None:
    """A shrunk plan waits for what stays."""
    job = Governed(ceilings=FIXED)
    job.batches(50, hog_bytes=1600 * MB)
    assert [job.actions(1, hog_bytes=gone * MB) for gone in [0, 1600] * 50] == [[]] * 100


def test_growth_that_was_in_vain_is_tried_ever_less_often() -> None:
    """A hog that comes back as soon as there is room costs a change twice as seldom each time."""
    job = Governed(ceilings=FIXED)
    job.batches(1, hog_bytes=1200 * MB)
    waits = []
    for _ in range(4):
        waited = 1
        while job.actions(1, ready=False) != ["grow"]:
            waited += 1
        waits.append(waited)
        assert job.actions(1, hog_bytes=1200 * MB) == ["shrink"]
    assert waits[1:] == sorted(waits[1:])
    assert waits[-1] >= 4 * waits[0]


def test_growth_that_lasted_was_not_in_vain() -> None:
    """A hog that comes every few minutes is made room for, and its memory used again as soon as after the first."""
    job = Governed(ceilings=FIXED)
    for _ in range(4):
        assert job.actions(50, hog_bytes=1200 * MB) == ["shrink"]
        assert job.actions(FALLING_BATCHES, ready=False) == ["grow"]
        assert job.actions(50) == []


def test_a_base_that_grows_takes_from_ingest_and_is_not_taken_for_it() -> None:
    """What no plan accounts for counts as base: the ladder stays a measure of ingest alone."""
    job = Governed(ceilings=FIXED)
    before = job.batches(1)[0].pressure
    decisions = [job.batches(1, leak_bytes=step * 20 * MB)[0] for step in range(40)]
    shrinks = [one for one in decisions if one.action == "shrink"]
    assert 1 <= len(shrinks) <= 2
    assert decisions[-1].plan.peak_bytes <= 0.7 * 3 * GB
    assert before <= 0.8


def test_above_nine_tenths_admission_stops_until_there_is_room() -> None:
    """By a smaller plan, and with the smallest there is by one image at a time, until below 0.65."""
    job = Governed(2 * GB)
    decisions = [
        job.batches(1, hog_bytes=job.limit_bytes - job.governor.plan.peak_bytes - 1 * MB)[0] for _ in range(10)
    ]
    assert {one.action for one in decisions[:-3]} <= {"shrink", "pause", "hold"}
    assert [one.paused for one in decisions[-3:]] == [True] * 3
    assert job.governor.plan.batch_size == 1
    after = job.batches(3)
    assert (after[0].action, after[0].paused) == ("resume", False)


def test_a_budget_below_the_base_still_admits_one_image() -> None:
    """Whatever was taken away: there is always a plan, and it is the smallest."""
    job = Governed(2 * GB)
    decisions = job.batches(5, hog_bytes=10 * GB)
    assert decisions[-1].paused
    assert job.governor.plan.batch_size == 1


def test_waiting_for_memory_lowers_admission_and_raises_nothing() -> None:
    """PSI above a tenth forbids growth; where systemd-oomd would kill, images are admitted one at a time."""
    job = Governed(ceilings=FIXED)
    job.batches(20, hog_bytes=1200 * MB)
    assert job.actions(50, ready=False, stalled_percent=20.0) == []
    assert job.actions(5, ready=False, stalled_percent=70.0) == ["pause"]
    assert not job.batches(1, stalled_percent=0.0)[-1].paused


def test_nothing_is_changed_before_the_last_change_is_in_force() -> None:
    """While the old loader drains, its memory says nothing about the new plan."""
    job = Governed(ceilings=FIXED)
    assert job.actions(1, hog_bytes=1200 * MB) == ["shrink"]
    assert job.actions(50, hog_bytes=1900 * MB, in_force=False) == []


# --- steps beyond the plan


def test_a_step_that_does_not_help_is_undone_and_tried_half_as_often() -> None:
    """Less than 3 % faster: the plan from before comes back."""
    job = Governed()
    before = job.governor.plan
    assert job.actions(2 * WINDOW_BATCHES, ready=False) == ["step", "undo"]
    assert job.governor.plan is before
    assert job.actions(2 * WINDOW_BATCHES - 1, ready=False) == []
    assert job.actions(1, ready=False) == ["step"]


def test_a_step_after_one_in_vain_goes_further() -> None:
    """The third asks for a decode worker more, where the first asked for a download more."""
    job = Governed()
    before = job.governor.plan
    plans: list[IngestPlan] = []
    while len(plans) < 3:
        (decision,) = job.batches(1, ready=False)
        plans += [decision.plan] if decision.action == "step" else []
    assert [plan.decode_workers - before.decode_workers for plan in plans] == [0, 1, 1]
    assert plans[0].download_concurrency > before.download_concurrency


def test_a_step_that_helps_stays() -> None:
    """Half as fast again, and the next one goes on from there."""
    job = Governed(probe=replace(image_probe(), decode_s=0.10))
    before = job.governor.plan
    assert job.actions(WINDOW_BATCHES + 1, ready=False) == ["step"]
    stepped = job.governor.plan
    assert stepped.decode_workers == before.decode_workers + 1
    assert job.actions(WINDOW_BATCHES + 1, ready=True, batch_s=0.5) == []
    assert job.governor.plan is stepped


def test_a_short_link_gets_more_downloads() -> None:
    """Measured faster than it is."""
    job = Governed(probe=image_probe(download_s=1.0))
    before = job.governor.plan
    assert job.actions(WINDOW_BATCHES, ready=False) == ["step"]
    assert job.governor.plan.download_concurrency == pytest.approx(1.5 * before.download_concurrency, abs=1)


def test_the_operators_ceilings_bind_steps_too() -> None:
    """And in fixed mode there are none."""
    ceilings = Ceilings(decode_workers=1, prefetch_factor=1, downloads=2)
    assert Governed(ceilings=ceilings).actions(100, ready=False) == []
    assert Governed(ceilings=FIXED).actions(100, ready=False) == []


def test_inference_that_decode_threads_disturb_gets_decode_processes() -> None:
    """Tried once, kept when it is faster; on the CPU, where processes take the same cores, not at all."""
    slower = replace(image_probe(), inference_s=0.3)
    job = Governed(gpu=True)
    assert job.actions(WINDOW_BATCHES + 1, image=slower, batch_s=1.2) == ["step"]
    assert job.governor.plan.decode_engine == "processes"
    assert job.actions(100, batch_s=0.8) == []
    other = Governed(gpu=True)
    assert other.actions(200, image=slower, batch_s=1.2) == ["step", "undo"]
    assert other.governor.plan.decode_engine == "threads"
    assert Governed().actions(100, image=slower, batch_s=1.2) == []


# --- images and links that change


def test_inference_that_stays_slower_is_planned_with() -> None:
    """More insects after midnight, in a whole window of batches; one that is slow by itself changes nothing."""
    slower = replace(image_probe(), inference_s=0.9)
    job = Governed(16 * GB)
    assert [job.actions(1, image=image) for image in [slower, image_probe()] * 20] == [[]] * 40
    assert job.actions(WINDOW_BATCHES, image=slower) == ["replan"]
    assert job.governor.plan.images_per_s == pytest.approx(1 / 0.9)
    assert job.actions(100, image=slower) == []


def test_a_warm_up_that_one_image_measured_is_corrected_though_sizes_are_listed() -> None:
    """9 s for the first call, 0.05 s from then on."""
    job = Governed(16 * GB, probe=image_probe(inference_s=9.0), uncertain=True)
    assert job.actions(FIRST_BATCHES, image=image_probe(inference_s=0.05)) == ["replan"]
    assert job.governor.inference_s == 0.05


def test_downloads_that_take_longer_and_are_ready_in_time_are_no_slower_link() -> None:
    """More of them share it; and small ones beside large ones take any time."""
    usual = image_probe(download_s=1.0)
    job = Governed(probe=usual)
    assert "replan" not in job.actions(100, image=replace(usual, download_s=4.0, first_byte_s=2.0))
    mixed = [usual, replace(usual, compressed_bytes=10, download_s=9.0)]
    assert [job.actions(1, image=image, ready=False).count("replan") for image in mixed * 9] == [0] * 18


def test_a_link_ten_times_slower_is_seen_in_a_job_of_mixed_sizes_and_where_many_downloads_were_planned() -> None:
    """The large images tell; and it does not matter how many downloads there were meant to be."""
    usual, small = image_probe(download_s=0.2), image_probe(download_s=2.0, compressed_bytes=300_000)
    job = Governed(probe=usual)
    assert job.actions(1, image=small, ready=False) == []
    assert job.actions(LARGER_BATCHES, image=image_probe(download_s=2.0), ready=False) == ["replan"]
    waiting = replace(image_probe(download_s=2.0), first_byte_s=1.9)
    many = Governed(probe=waiting)
    before = many.governor.plan
    slow = replace(waiting, download_s=20.0, first_byte_s=19.0)
    assert many.actions(LARGER_BATCHES, image=slow, ready=False) == ["replan"]
    assert many.governor.plan.held_limit < before.held_limit


def test_downloads_that_come_three_at_a_time_hide_no_slower_link() -> None:
    """The GPU waits for the first of them only."""
    job = Governed(probe=image_probe(download_s=0.1))
    job.batches(WINDOW_BATCHES)
    for ready in (False, True, True, False):
        last = job.actions(1, image=image_probe(download_s=1.0), ready=ready)
    assert last == ["replan"]


def test_a_gpu_that_waited_once_does_not_make_downloads_slower() -> None:
    """For its first batch, and all others are ready."""
    usual = image_probe(download_s=1.0)
    job, slow = Governed(probe=usual), replace(usual, download_s=4.0, first_byte_s=2.0)
    assert job.actions(1, image=slow, ready=False) == []
    assert "replan" not in job.actions(SMALLER_BATCHES, image=slow)


def test_a_slower_link_is_seen_in_two_batches_however_quick_they_were() -> None:
    """Also where hundreds of them fit into the seconds over which readiness is taken."""
    job = Governed(probe=image_probe(download_s=0.1))
    job.batches(400, batch_s=0.02)
    assert job.actions(LARGER_BATCHES, image=image_probe(download_s=1.0), ready=False) == ["replan"]


def test_a_slower_link_is_taken_for_what_it_brought() -> None:
    """Four images in 40 s, and not what seven downloads would bring that did not share it."""
    usual = replace(image_probe(download_s=2.1), first_byte_s=0.1)
    job = Governed(probe=usual)
    assert job.governor.plan.download_concurrency > 4
    slow = replace(usual, download_s=21.0, first_byte_s=1.0)
    assert job.actions(LARGER_BATCHES, image=slow, ready=False, batch_s=40.0) == ["replan"]
    assert job.governor.plan.images_per_s == pytest.approx(4 / 40.0)


def test_a_job_whose_first_images_were_on_disk_hears_of_its_link_later() -> None:
    """After a crash: until one was downloaded what is known of the link is doubtful."""
    job = Governed(probe=image_probe(download_s=0.0), uncertain=True)
    job.actions(FIRST_BATCHES, image=image_probe(download_s=0.0))
    assert job.actions(FIRST_BATCHES, image=image_probe(download_s=30.0)) == ["replan"]
    assert job.governor.plan.images_per_s < 1.0


def test_a_slower_link_lowers_what_is_leased_though_downloads_cannot_grow() -> None:
    """Forty times slower behind a ceiling of two downloads: tasks would wait for it past their leases."""
    job = Governed(ceilings=Ceilings(downloads=2))
    before = job.governor.plan
    slow = replace(image_probe(), download_s=8.0, first_byte_s=4.0)
    assert job.actions(LARGER_BATCHES, image=slow, ready=False) == ["replan"]
    assert job.governor.plan.held_limit < before.held_limit / 5


def _replans(job: Governed, *sizes: float) -> int:
    return sum(job.actions(1, image=_of_size(size)).count("replan") for size in sizes)


def test_one_stray_large_batch_is_no_change() -> None:
    """Nor is another one later."""
    assert _replans(Governed(16 * GB), 1, 1, 4, 1, 4, 1) == 0


def test_two_large_batches_in_a_row_are_a_change() -> None:
    """At the second one, whatever came before; the images of the last one are planned for."""
    job = Governed(16 * GB)
    assert _replans(job, *[1.0] * 50, 2) == 0
    assert _replans(job, 3) == 1
    assert job.governor.plan.batch_bytes >= _of_size(3).tensor_bytes


def test_what_one_image_told_is_measured_anew_in_the_first_batches() -> None:
    """Its times were those of a warm-up; the margin that was wider goes with them."""
    job = Governed(16 * GB, probe=image_probe(inference_s=4.0, download_s=5.0), uncertain=True)
    before = job.governor.plan
    assert job.actions(FIRST_BATCHES + 5, image=image_probe(inference_s=0.1, download_s=0.2)) == ["replan"]
    assert job.governor.plan.images_per_s == 10.0 > before.images_per_s
    assert job.governor.inference_s == 0.1
    assert "64 MB of doubt" in before.why["peak_bytes"]
    assert "doubt" not in job.governor.plan.why["peak_bytes"]


def test_a_little_larger_stays_within_the_plans_reserve() -> None:
    """A quarter more does not cross the limit."""
    assert _replans(Governed(16 * GB), *[GROWTH] * 30) == 0
    assert _replans(Governed(16 * GB), *[GROWTH + 0.01] * LARGER_BATCHES) == 1


@pytest.mark.parametrize("sizes", [[0.2, 1.0], [0.5] * (SMALLER_BATCHES - 1) + [1.0], [0.2, 0.9, 0.4]])
def test_mixed_sizes_are_no_change(sizes: list[float]) -> None:
    """As long as some are as large as planned, memory is planned for them."""
    assert _replans(Governed(16 * GB), *sizes * 10) == 0


def test_after_a_change_the_new_size_is_the_measure() -> None:
    """More of the new size is no change; what was usual before is one, after its long stretch."""
    job = Governed(16 * GB)
    assert _replans(job, 2, 2) == 1
    assert _replans(job, *[2.0] * 50, *[1.0] * (SMALLER_BATCHES - 1)) == 0
    assert _replans(job, 1.0) == 1


def test_images_that_keep_growing_are_followed_step_by_step() -> None:
    """Each step needs its own two batches."""
    assert _replans(Governed(16 * GB), 2, 2, 4, 4, 8, 8) == 3


def test_a_link_ten_times_slower_gets_a_new_plan_within_two_batches() -> None:
    """With more downloads at once; back again after a long stretch."""
    usual, slow = image_probe(download_s=0.1), image_probe(download_s=1.0)
    job = Governed(probe=usual)
    before = job.governor.plan
    assert job.actions(1, image=slow, ready=False) == []
    assert job.actions(1, image=slow, ready=False) == ["replan"]
    assert job.governor.plan.download_concurrency > before.download_concurrency
    assert job.actions(SMALLER_BATCHES - 1, image=usual) == []
    assert job.actions(1, image=usual) == ["replan"]
    assert job.governor.plan.download_concurrency == before.download_concurrency


def test_a_slower_link_that_is_still_fast_enough_changes_nothing() -> None:
    """Ten milliseconds in place of one, beside an inference of 200: the plan's two downloads cover both."""
    job = Governed(probe=image_probe(download_s=0.001))
    assert job.actions(50, image=image_probe(download_s=0.010)) == []


def test_images_that_were_on_disk_already_say_nothing_about_the_link() -> None:
    """They took no time."""
    assert Governed().actions(100, image=image_probe(download_s=0.0)) == []


def test_the_pipelines_memory_is_scaled_by_pixels_and_the_base_is_not() -> None:
    """What the models take does not depend on the image."""
    job = Governed(16 * GB)
    _replans(job, 3, 3)
    report = job.governor._report
    assert report.base_bytes == BASE
    assert report.inference_bytes(report.tensor_bytes_per_image) == 30 * MB
    _replans(job, *[1.0] * (WINDOW_BATCHES + 1), 3, 3)
    assert job.governor._report.inference_bytes(report.tensor_bytes_per_image) == 30 * MB, "as it was measured"


def test_decisions_can_be_made_again_from_what_the_log_has() -> None:
    """Observations and the plan's inputs as JSON, sighted images among them; a decision that differs is found."""
    job = Governed(16 * GB)
    seen = [job.observation(image=_of_size(size)) for size in (1, 3, 3, 1)]
    measured = report(image_probe(), base_bytes=BASE, inference_peak_bytes=10 * MB).with_sighted([Sighting(500, 400)])
    inputs = {"report": asdict(measured), "host": asdict(seen[0].host), "lease": asdict(LeaseTerms())}
    governor = Governor(IngestPolicy(), measured, seen[0].host, LeaseTerms())
    names = ("action", "reason", "paused", "budget_bytes")
    lines = []
    for one in seen:
        decision = governor.observe(one)
        lines.append({"observed": asdict(one)} | {name: getattr(decision, name) for name in names})
    logged = json.loads(json.dumps({"plan": {"inputs": inputs}, "batches": lines}))
    again = json.loads(json.dumps(logged))
    assert replayed(logged["plan"], logged["batches"], IngestPolicy()) == []
    again["batches"][-1]["paused"] = True
    assert len(replayed(again["plan"], again["batches"], IngestPolicy())) == 1
