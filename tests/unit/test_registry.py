"""Which pipelines a worker has, and what it says when one of them is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from adc_worker.errors import ConfigurationError
from adc_worker.models.registry import available, choose

EXTRA = "tests.support.extra_pipeline:pipelines"


def test_a_pipeline_of_an_installed_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the entry-point group, without any variable."""
    metadata = tmp_path / "corners-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: corners\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[adc_worker.pipelines]\ncorners = {EXTRA}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = available((), 0.0)
    assert [spec.slug for spec in choose(found, ())] == ["corners"]


def test_pipelines_that_wait_to_be_named_run_only_then() -> None:
    found = available((), 0.0)
    with pytest.raises(ConfigurationError, match="name one with --pipeline"):
        choose(found, ())
    assert [spec.slug for spec in choose(found, ("simulated",))] == ["simulated"]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (("nowhere:pipelines",), "AMI_EXTRA_PIPELINES: nowhere:pipelines failed: ModuleNotFoundError"),
        (("no_function",), "write package.module:function"),
        (("builtins:dir",), "returned str instead of PipelineSpec"),
        ((EXTRA, EXTRA), "two pipelines have the slug 'corners'"),
    ],
)
def test_a_wrong_source_is_named(extra: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        available(extra, 0.0)


def test_an_unknown_slug_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="light_sheet_blobs, simulated"):
        choose(available((), 0.0), ("moths",))
