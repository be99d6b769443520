"""`ami worker tune` without a job: env files, and what is said of the old constants."""

from __future__ import annotations

from pathlib import Path

import pytest

from adc_worker.cli.tune import write_env
from adc_worker.runtime.tune import OldConstants
from tests.support.fakes import GB, host, image_probe, report

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
    write_env(file, {"AMI_ANTENNA_API_BATCH_SIZE": "7", "AMI_NUM_WORKERS": "2", "AMI_LOG_FORMAT": "console"})
    write_env(file, {"AMI_ANTENNA_API_DATALOADER_NUM_WORKERS": "3"})
    assert file.read_text() == (
        BEFORE.replace("= 24 ", "= 7 ").replace("NUM_WORKERS=\n", "NUM_WORKERS=3\n").replace("'json'", "console")
        + "AMI_NUM_WORKERS=2\n"
    )
    assert file.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [".env"]


def test_a_new_env_file_is_the_owners_alone(tmp_path: Path) -> None:
    """A token may be put into it later."""
    write_env(tmp_path / ".env", {"AMI_LOG_LEVEL": "debug"})
    assert (tmp_path / ".env").read_text() == "AMI_LOG_LEVEL=debug\n"
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


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
