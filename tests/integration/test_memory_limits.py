"""Workers under limits of the kernel: what they find, how they share it, and how they come back from a kill."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from adc_worker.desk.server import DevServer
from adc_worker.errors import ExitCode
from adc_worker.host.share import CAUTION_STEP
from adc_worker.planning.ceilings import Ceilings
from adc_worker.planning.policy import IngestPolicy
from benchmarks.support.cgroup import MemoryCgroup, enclose
from tests.support.fakes import GB, MB
from tests.support.governed import replayed
from tests.support.waiting import wait_until
from tests.support.workers import environment, worker

FEW_FILES = ["sh", "-c", 'ulimit -Sn 64 && ulimit -Hn 132 && exec "$@"', "sh"]
LARGE_PX = (4096, 3072)  # 37.7 MB decoded
FIXED = {"AMI_INGEST_MODE": "fixed", "AMI_ANTENNA_API_BATCH_SIZE": "8", "AMI_SIMULATED_SECONDS_PER_IMAGE": "0.1"}
GREEDY = {"AMI_EXTRA_PIPELINES": "tests.support.greedy_pipeline:pipelines"}
HOG = f"block = bytearray(b'x') * {200 * MB}; print('held', flush=True); input()"
LOOK = "from adc_worker.host.memory import memory_limit as m; f = m(); print(f.limit_bytes, f.available_bytes)"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DevServer]:
    with DevServer(save_delay_s=0.005, keep_streams=True, image_dir=tmp_path) as running:
        yield running


@pytest.fixture
def limited() -> Iterator[Callable[[int], MemoryCgroup]]:
    with ExitStack() as stack:

        def make(limit_bytes: int) -> MemoryCgroup:
            enclosure = enclose(limit_bytes)
            if not isinstance(enclosure, MemoryCgroup):
                pytest.skip("no memory cgroup can be made here: it takes root, or a delegated group")
            return stack.enter_context(enclosure)

        yield make


@pytest.fixture
def large(tmp_path: Path) -> Path:
    file = tmp_path / "large.jpg"
    Image.linear_gradient("L").resize(LARGE_PX).convert("RGB").save(file, quality=80)
    return file


def test_a_real_groups_limit_is_found_and_what_others_in_it_hold(limited: Callable[[int], MemoryCgroup]) -> None:
    """Page cache does not count; a neighbour's memory does."""
    group = limited(1 * GB)
    hog = subprocess.Popen(
        [*group.within, sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with hog:
        assert hog.stdout is not None
        assert hog.stdout.readline() == "held\n"
        told = subprocess.run([*group.within, sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
        hog.communicate("\n")
    limit, available = map(int, told.stdout.split())
    assert limit == pytest.approx(1 * GB, abs=4096)
    assert 700 * MB <= available <= 800 * MB


def test_a_worker_that_arrives_in_the_others_peak_kills_neither(
    server: DevServer, large: Path, tmp_path: Path, limited: Callable[[int], MemoryCgroup]
) -> None:
    """Two workers with 3 GB between them, planning as greedily as they can: two jobs of large images are finished.

    What was logged of every batch is enough to make its decision again.
    """
    group = limited(3 * GB)
    jobs = [server.add_job("simulated", [large] * 120)]
    (tmp_path / "once").touch()
    env = environment(server, tmp_path / "data", FIXED | GREEDY | {"GREEDY_MARKER": str(tmp_path / "once")})
    with (
        worker(env, "--pipeline", "simulated", "--exit-when-idle", within=group.within) as first,
        worker(env, "--pipeline", "greedy", within=group.within) as second,
    ):
        second.wait_for("worker_ready")
        wait_until(lambda: any(one["memory_bytes"] > 1200 * MB for one in first.events("batch")), timeout_s=120)
        jobs.append(server.add_job("greedy", [large] * 40))
        for job_id in jobs:
            wait_until(lambda job_id=job_id: server.job(job_id).status == "SUCCESS", timeout_s=180)  # type: ignore[misc]
        second.process.terminate()
        assert (second.wait(), first.wait()) == (ExitCode.OK, ExitCode.OK)
        assert group.oom_kills() == 0
    for job_id in jobs:
        assert set(server.job(job_id).deliveries.values()) == {1}
    assert "shrink" in {one["action"] for one in first.events("batch")}
    halves = {one["observed"]["host"]["limit_bytes"] for one in second.events("batch")}
    assert min(halves) == pytest.approx(1.5 * GB, rel=0.01)
    policy = IngestPolicy(Ceilings(mode="fixed", tasks_per_fetch=8))
    for log in (first, second):
        for plan in (one for one in log.events("plan") if "inputs" in one):
            batches = [one for one in log.events("batch") if one["job_id"] == plan["job_id"]]
            assert replayed(plan, batches, policy) == []


def test_after_a_kernel_kill_the_next_worker_plans_with_less_until_a_job_went_well(
    server: DevServer, large: Path, tmp_path: Path, limited: Callable[[int], MemoryCgroup]
) -> None:
    """Also when the parent dies with it. The kill costs no image; the second job is planned with everything again.

    The next worker may open few files: it takes all it may, and says who has to allow it more.
    """
    group = limited(1 * GB)
    jobs = [server.add_job("greedy", [large] * 6) for _ in range(2)]
    env = environment(server, tmp_path / "data", GREEDY | {"GREEDY_MARKER": str(tmp_path / "once")})
    with worker(env, "--exit-when-idle", within=group.within) as killed:
        killed.wait_for("child_ended")
        killed.process.kill()  # a second before it would start another child
        killed.wait()
        assert group.oom_kills() == 1
    with worker(env, "--exit-when-idle", within=[*group.within, *FEW_FILES]) as running:
        assert running.wait() == ExitCode.OK
    assert "may open 132 files" in running.events("few_descriptors")[0]["note"]
    assert "LimitNOFILE=" in running.events("few_descriptors")[0]["note"]
    assert running.events("predecessor_killed_for_memory")[0]["plans_with"] == CAUTION_STEP
    first_plans = [plan for plan in running.events("plan") if "inputs" in plan]  # the rest are the governor's
    assert [plan["inputs"]["host"]["caution"] for plan in first_plans] == [CAUTION_STEP, 1.0]
    for job_id in jobs:
        wait_until(lambda job_id=job_id: server.job(job_id).status == "SUCCESS")  # type: ignore[misc]
        assert not server.job(job_id).errors
