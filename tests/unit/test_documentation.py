"""What the documentation says about settings, metrics and pages is what the code has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from adc_worker.settings import Settings, variable
from adc_worker.status.hub import StatusHub
from adc_worker.status.metrics import Collector
from tests.support.readme import README, with_settings
from tests.unit.test_snapshot import snapshot

DOCS = README.parent / "docs"
VARIABLES = {variable(name) for name in Settings.model_fields}


def _metrics() -> set[str]:
    hub = StatusHub(1, 300.0)
    hub.add(snapshot(totals={"done": 3}))
    return {sample.name for family in Collector(hub).collect() for sample in family.samples}


def test_the_settings_table_of_the_readme_is_made_from_the_settings() -> None:
    """After a change: `python -m tests.support.readme`."""
    text = README.read_text(encoding="utf-8")
    assert with_settings(text) == text


@pytest.mark.parametrize("file", [README, *sorted(DOCS.rglob("*.md"))], ids=lambda file: file.name)
def test_every_variable_that_is_written_about_exists(file: Path) -> None:
    """A variable that was renamed is renamed in the texts, too."""
    named = set(re.findall(r"\bAMI_[A-Z_]+[A-Z]\b", file.read_text(encoding="utf-8")))
    assert named <= VARIABLES | {"AMI_COMPLETE"}


@pytest.mark.parametrize("file", [README, *sorted(DOCS.rglob("*.md"))], ids=lambda file: file.name)
def test_every_link_and_picture_leads_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), target


def test_every_test_behind_a_promise_exists() -> None:
    """The README's promises name tests; a test that was renamed is renamed there."""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", README.read_text(encoding="utf-8")):
        assert f"def {name}" in (README.parent / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_dashboard_and_alerts_ask_for_metrics_that_are_served() -> None:
    """And the three alerts are there; every metric of ours carries its unit or counts."""
    served = _metrics()
    alerts = (DOCS / "grafana" / "alerts.yml").read_text(encoding="utf-8")
    dashboard = json.loads((DOCS / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set(re.findall(r"adc_worker_\w+", alerts + " ".join(asked))) <= served
    assert alerts.count("- alert:") == 3
    assert len(asked) >= 10
    units = ("_bytes", "_seconds", "_ratio", "_total", "_ready", "_waiting", "_in_hand", "_per_second")
    assert [name for name in served if not name.endswith(units)] == []
