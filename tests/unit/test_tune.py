"""`ami worker tune` without a job: env files, what is printed, and what is said of the old constants."""

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
from adc_worker.planning.measurements import ProbeReport, Sighting
from adc_worker.planning.policy import IngestPolicy
from adc_worker.runtime.job import ceilings
from adc_worker.runtime.tune import OldConstants, Tuning, patience, shared
from adc_worker.settings import Settings
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
        BEFORE.replace("= 24 ", "= 7 ").replace("NUM_WORKERS=\n", "NUM_WORKERS=3\n").replace("'json'", "console")
        + "AMI_NUM_WORKERS=2\n"
    )
    assert file.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [".env"]


def test_an_env_file_is_written_over_where_it_is(tmp_path: Path) -> None:
    """It may be a link, somebody else's, or mounted into a container by itself."""
    (tmp_path / "real").write_text(BEFORE)
    (tmp_path / ".env").symlink_to(tmp_path / "real")
    number = (tmp_path / "real").stat().st_ino
    write_env(tmp_path / ".env", {FETCH: "7"})
    assert (tmp_path / ".env").is_symlink()
    assert (tmp_path / "real").stat().st_ino == number
    assert "= 7 " in (tmp_path / "real").read_text()


def test_a_new_env_file_is_the_owners_alone(tmp_path: Path) -> None:
    """A token may be put into it later."""
    write_env(tmp_path / ".env", {"AMI_LOG_LEVEL": "debug"})
    assert (tmp_path / ".env").read_text() == "AMI_LOG_LEVEL=debug\n"
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"{FETCH}= # note\n", f"{FETCH}=7 # note\n"),
        (f"{FETCH}=24\r\nA=1\r\n", f"{FETCH}=7\r\nA=1\r\n"),
        ("A=1\r\n", f"A=1\r\n{FETCH}=7\r\n"),
        ("A=1", f"A=1\n{FETCH}=7\n"),
        (f'{FETCH}="24\nA="1"\n', f'{FETCH}=7\nA="1"\n'),
        (f"{FETCH}='24' # note\n", f"{FETCH}=7 # note\n"),
        (f"{FETCH.lower()}=24\n", f"{FETCH.lower()}=7\n"),
        (f"MY_{FETCH}=24\n", f"MY_{FETCH}=24\n{FETCH}=7\n"),
    ],
    ids=["note", "crlf", "crlf_new", "no_end", "open_quote", "quotes", "lower_case", "other_name"],
)
def test_a_value_changes_and_nothing_beside_it(tmp_path: Path, before: str, after: str) -> None:
    file = tmp_path / ".env"
    file.write_bytes(before.encode())
    write_env(file, {FETCH: "7"})
    assert file.read_bytes().decode() == after


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
    old = OldConstants.on(measured, machine, 24, 4)
    source = "2 of 12 photographs that Antenna lists; no task was taken"
    made = Tuning(7, "blobs", source, measured, machine, lease, IngestPolicy().plan(measured, machine, lease), old)
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


def test_a_rate_that_memory_forbids_is_no_promise() -> None:
    """Beside a plan that works, it would read like the better one."""
    assert "killed for memory (66.30 GB of 16.00 GB); would be" in shown(tuning())
    small = OldConstants.on(report(image_probe()), host(limit_bytes=100 * GB, available_bytes=99 * GB), 24, 4)
    assert "killed" not in shown(tuning(old=small))


@pytest.mark.parametrize(
    ("batch", "loaders", "cores", "images_per_s", "at_most_gb", "at_least_gb"),
    [(4, 2, 2, 7.0, 8.5, 3.0), (24, 4, 2, 7.0, 70.0, 16.0), (24, 1, 2, 4.0, 21.0, 15.7)],
)
def test_the_old_constants_are_told_as_they_were_measured(
    batch: int, loaders: int, cores: int, images_per_s: float, at_most_gb: float, at_least_gb: float
) -> None:
    """4096 x 2160 photographs: 7.0 images/s by hand-set values; 16 GB did not suffice for the defaults (RESULTS.md)."""
    measured = report(image_probe(decode_s=0.03, inference_s=0.04, download_s=0.08), base_bytes=GB // 3)
    old = OldConstants.on(measured, host(cores=cores), batch, loaders)
    assert old.images_per_s == pytest.approx(images_per_s, rel=0.25)
    assert at_least_gb * GB <= old.peak_bytes <= at_most_gb * GB
    assert old.out_of_memory == (old.peak_bytes > 16 * GB)


def narrow_link() -> ProbeReport:
    """Four downloads share a link that brings four images a second."""
    return report(image_probe(download_s=1.0, inference_s=0.01, decode_s=0.01))


def test_the_old_constants_have_no_link_of_their_own() -> None:
    """32 downloads bring no more than the link does, for them as for the plan."""
    plan = IngestPolicy().plan(narrow_link(), host(), LeaseTerms())
    old = OldConstants.on(narrow_link(), host(), 24, 4)
    assert plan.binds == "link"
    assert old.images_per_s <= plan.images_per_s


def test_old_constants_without_loaders_load_between_two_inferences() -> None:
    """AMI_NUM_WORKERS=0 of today's worker: nothing is made ahead."""
    measured = report(image_probe(inference_s=0.5))
    none, one = (OldConstants.on(measured, host(), 4, loaders) for loaders in (0, 1))
    assert none.loaders == 0
    assert none.images_per_s < one.images_per_s
    assert none.peak_bytes < one.peak_bytes


def test_no_decode_workers_are_not_the_default_of_four() -> None:
    """In fixed mode the one thread that decodes stands for the old worker's own process."""
    assert [ceilings(Settings(num_workers=count)).fixed_decode_workers for count in (None, 0, 2)] == [4, 1, 2]


def test_old_constants_get_what_memory_there_is() -> None:
    """What others hold kills as well as a limit does; what is kept back for them could be taken."""
    measured = report(image_probe(), base_bytes=GB)
    beside = replace(host(available_bytes=2 * GB), reserve_bytes=GB)
    old = OldConstants.on(measured, beside, 4, 2)
    assert old.room_bytes == 4 * GB
    assert old.out_of_memory
    assert not OldConstants.on(measured, host(), 4, 2).out_of_memory


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
