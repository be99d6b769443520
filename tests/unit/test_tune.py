"""`ami worker tune` without a job: env files, and what is printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adc_worker.antenna.leases import LeaseTerms
from adc_worker.cli.tune import BINDS, recommended, show, tune_command, write_env
from adc_worker.errors import ConfigurationError
from adc_worker.host.share import MemoryShare
from adc_worker.planning.measurements import Sighting
from adc_worker.planning.policy import IngestPolicy
from adc_worker.runtime.job import ceilings
from adc_worker.runtime.tune import Tuning, patience, shared
from adc_worker.settings import Settings, load
from tests.support.fakes import GB, host, image_probe, report
from tests.support.plans import ingest_plan

FETCH = "AMI_ANTENNA_API_BATCH_SIZE"
BEFORE = """# ours since May
export AMI_ANTENNA_API_BATCH_SIZE = 24   # too many?
AMI_ANTENNA_API_AUTH_TOKEN="secret # not a comment"

#AMI_NUM_WORKERS=4
AMI_ANTENNA_API_DATALOADER_NUM_WORKERS=
AMI_USER_DATA_PATH=/data
AMI_LOG_FORMAT='json'
"""


def test_an_env_file_keeps_its_comments_and_its_order(tmp_path: Path) -> None:
    """Known lines change in their places, new ones come last, and nobody else may read the file afterwards either."""
    file = tmp_path / ".env"
    file.write_text(BEFORE)
    file.chmod(0o600)
    write_env(file, {FETCH: "7", "AMI_NUM_WORKERS": "2", "AMI_LOG_FORMAT": "console"})
    write_env(file, {"AMI_ANTENNA_API_DATALOADER_NUM_WORKERS": "3"})
    assert file.read_text() == (
        BEFORE.replace(f"export {FETCH} = 24   # too many?", f"{FETCH}=7")
        .replace("NUM_WORKERS=\n", "NUM_WORKERS=3\n")
        .replace("'json'", "console")
        + "AMI_NUM_WORKERS=2\n"
    )
    assert file.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [".env"]


def test_an_env_file_that_is_a_link_stays_one(tmp_path: Path) -> None:
    """The file that it leads to is changed."""
    (tmp_path / "real").write_text(BEFORE)
    (tmp_path / ".env").symlink_to(tmp_path / "real")
    write_env(tmp_path / ".env", {FETCH: "7"})
    assert (tmp_path / ".env").is_symlink()
    assert f"{FETCH}=7\n" in (tmp_path / "real").read_text()


def test_a_new_env_file_is_the_owners_alone(tmp_path: Path) -> None:
    """A token may be put into it later."""
    write_env(tmp_path / ".env", {"AMI_LOG_LEVEL": "debug"})
    assert (tmp_path / ".env").read_text() == "AMI_LOG_LEVEL=debug\n"
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "before",
    [
        f"{FETCH}= # note\n",
        f"{FETCH}=24\r\nA=1\r\n",
        "A=1",
        f"{FETCH}='24' # note\n",
        f"{FETCH.lower()}=24\n",
        f"MY_{FETCH}=24\n",
        f"export {FETCH}=24\n",
    ],
    ids=["note", "crlf", "no_end", "quotes", "lower_case", "other_name", "export"],
)
def test_what_was_written_is_what_the_worker_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """However the file set the variable before."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_bytes(before.encode())
    write_env(Path(".env"), {FETCH: "7"})
    assert load().antenna_api_batch_size == 7
    assert ("A=1\n" in Path(".env").read_text()) == ("A=1" in before)


@pytest.mark.parametrize(
    ("name", "says"), [("latin.env", "cannot be read: .*utf-8"), ("no/new.env", "cannot be written")]
)
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, name: str, says: str
) -> None:
    """No Antenna answers here: it was not asked."""
    (tmp_path / "latin.env").write_bytes(b"A=\xe9\n")
    with pytest.raises(ConfigurationError, match=f"--write .*{name}: it {says}"):
        tune_command(Settings(), "simulated", tmp_path / name, as_json=False)


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = Settings(user_data_path=tmp_path / "file" / "data")
    with pytest.raises(ConfigurationError, match=r"AMI_USER_DATA_PATH: cannot create .*: Not a directory"):
        tune_command(config, "simulated", None, as_json=False)


def test_what_is_written_holds_the_plan() -> None:
    """Unpinned memory is no ceiling: written, it would forbid what may be found to help; fixed mode needs it said."""
    plan = ingest_plan(batch_size=3, fetch_size=9, prefetch_factor=2, download_concurrency=5, decode_workers=4)
    prefix = "AMI_ANTENNA_API_DATALOADER"
    expected = {f"{prefix}_PREFETCH_FACTOR": "2", f"{prefix}_DOWNLOAD_THREADS": "5", f"{prefix}_NUM_WORKERS": "4"}
    assert recommended(plan, Settings()) == {FETCH: "9", **expected}
    fixed = {FETCH: "3", **expected, f"{prefix}_PIN_MEMORY": "false"}
    assert recommended(plan, Settings(ingest_mode="fixed")) == fixed


def tuning(**changes: Any) -> Tuning:
    measured, machine, lease = report(image_probe()), host(), LeaseTerms()
    source = "2 of 12 photographs that Antenna lists; no task was taken"
    made = Tuning(7, "blobs", source, measured, machine, lease, IngestPolicy().plan(measured, machine, lease))
    return replace(made, **changes)


def shown(made: Tuning, limits: dict[str, Any] | None = None) -> str:
    console = Console(width=400)
    with console.capture() as told:
        show(made, limits or {}, console)
    return told.get()


@pytest.mark.parametrize("binds", ["link", "decode", "inference", "memory", "vram", "lease", "ceiling"])
def test_every_verdict_says_what_would_help(binds: str) -> None:
    assert BINDS[binds] in shown(tuning(plan=ingest_plan(binds=binds)))


def test_people_read_what_the_machine_gives_and_what_holds_the_plan_back() -> None:
    """Memory, cores, GPU, disk, open files, lease and the operator's own limits."""
    machine = replace(host(gpu=True), vram_free_bytes=20 * GB)
    told = shown(tuning(host=machine), {"AMI_MEMORY_SOFT_CAP": 0.5})
    for word in ("16.00 GB of memory (MemTotal)", "8 cores", "a GPU with 20.00 GB free", "50.00 GB of disk"):
        assert word in told
    for word in ("1024 open files", "300 s, 2 deliveries", "AMI_MEMORY_SOFT_CAP=0.5", "2 of 12 photographs"):
        assert word in told


def test_sizes_that_are_only_known_are_no_measurements() -> None:
    """They have no times of their own to be shown."""
    seen = report(image_probe()).with_sighted([Sighting(6000, 4000), Sighting(800, 600)])
    told = shown(tuning(report=seen))
    assert told.count("4096 x 2160 px") == 2
    assert "6000 x 4000" not in told
    assert "the sizes of 2 more" in told


def test_no_decode_workers_are_not_the_default_of_four() -> None:
    """In fixed mode the one thread that decodes stands for the old worker's own process."""
    assert [ceilings(Settings(num_workers=count)).fixed_decode_workers for count in (None, 0, 2)] == [4, 1, 2]


def test_workers_that_will_run_beside_it_have_their_part() -> None:
    """Of two on a host each plans with a half: once both of them have a job."""
    half = shared(host(limit_bytes=16 * GB, available_bytes=13 * GB), 2)
    assert (half.limit_bytes, half.available_bytes, half.used_bytes) == (8 * GB, 6 * GB, GB)
    assert half.limit_source == "1/2 of MemTotal: as many workers run here"
    assert shared(host(), 1) == host()


def test_memory_that_others_hold_is_waited_for_a_minute(tmp_path: Path) -> None:
    """Then an operator hears who holds how much."""
    share, other, pauses = MemoryShare(tmp_path), MemoryShare(tmp_path), list[float]()
    try:
        other.claim(12 * GB, busy=True)
        turns = patience(lambda: host(available_bytes=2 * GB), share, pauses.append)
        with pytest.raises(ConfigurationError, match=r"of 16.00 GB .* others hold 13.00 GB, 1 workers .* 12.00 GB"):
            all(turns)
    finally:
        share.close()
        other.close()
    assert pauses == [1.0] * 60
