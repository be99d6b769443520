"""Today's `.env` on this worker, and this worker replaced by another one in the middle of a job."""

from __future__ import annotations

import signal
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from adc_worker.errors import ExitCode
from tests.support.waiting import wait_until
from tests.support.workers import REPOSITORY, environment, run_to_end, worker

OLD_ENV = REPOSITORY.parent / "shared" / "existing.env"
SIMULATED = ("--pipeline", "simulated")
NO_EFFECT = ("DATABASE_URL", "IMAGE_BASE_PATH", "SPECIES_CLASSIFICATION_MODEL", "FEATURE_EXTRACTOR",
             "CLASSIFICATION_THRESHOLD", "NUM_WORKERS")  # fmt: skip
LIMITS = {"AMI_ANTENNA_API_BATCH_SIZE": 4, "AMI_LOCALIZATION_BATCH_SIZE": 2, "AMI_CLASSIFICATION_BATCH_SIZE": 20,
          "AMI_NUM_WORKERS": 1}  # fmt: skip


def _s_per_image(batches: list[dict[str, Any]]) -> float:
    """Return the median over batches, which a moment of another program's does not move."""
    ends = [datetime.fromisoformat(batch["timestamp"]).timestamp() for batch in batches]
    images = [int(batch["images"]) for batch in batches]
    return median((end - start) / count for (start, end), count in zip(pairwise(ends), images[1:], strict=True))


@pytest.mark.skipif(not OLD_ENV.is_file(), reason="the operators' file is not beside this checkout")
def test_the_old_env_file_runs_a_job_as_fast_as_none(tmp_path: Path) -> None:
    """As it is but for the address: within 5 %, and every line that limits or does nothing is named."""
    s_per_image = []
    for name, arguments in (("without", ()), ("with", ("--env-file", str(OLD_ENV)))):
        with DevServer(save_delay_s=0.005) as server:
            files = write_sheets(tmp_path / name, 2, seed=3, sizes=((640, 480),))
            server.add_job("simulated", files * 20)
            env = environment(server, tmp_path / name / "data", {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.2"})
            code, log = run_to_end(env, *SIMULATED, "--exit-when-idle", *arguments)
        assert code == ExitCode.OK
        s_per_image.append(_s_per_image(log.events("batch")))
    assert s_per_image[1] < s_per_image[0] / 0.95
    (start,) = log.events("start")
    assert start["limits"].items() >= LIMITS.items()
    notes = " ".join(event["note"] for event in log.events("setting"))
    assert [name for name in NO_EFFECT if f"AMI_{name}" not in notes] == []


def test_swapping_back_in_the_middle_of_a_job_loses_nothing(tmp_path: Path) -> None:
    """Drained, and another worker that knows nothing of the journal ends the job once the leases are over."""
    with DevServer(save_delay_s=0.005, ack_wait_s=6.0) as server:
        files = write_sheets(tmp_path / "sheets", 2, seed=3, sizes=((640, 480),))
        job_id = server.add_job("simulated", files * 40)
        extra = {"AMI_SIMULATED_SECONDS_PER_IMAGE": "0.05", "AMI_ANTENNA_ACK_WAIT_SECONDS": "6"}
        with worker(environment(server, tmp_path / "first", extra), *SIMULATED) as first:
            first.wait_for("batch", count=2)
            first.process.send_signal(signal.SIGTERM)
            assert first.wait() == ExitCode.OK
        done = server.job(job_id).processed
        assert 0 < done < 80
        with worker(environment(server, tmp_path / "second", extra), *SIMULATED):
            wait_until(lambda: server.job(job_id).status == "SUCCESS", timeout_s=120)
        job = server.job(job_id)
        assert set(job.results) == set(job.image_ids)
        assert max(job.deliveries.values()) <= 2
        assert set(job.posts.values()) == {1}
