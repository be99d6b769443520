"""The table in `tests/support/contract.py` agrees with what was recorded on a running Antenna.

Skipped where the recordings are not at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.contract import EXCHANGES, Exchange, differences

RECORDINGS = Path(__file__).resolve().parents[3] / "shared" / "antenna" / "transcripts"

pytestmark = pytest.mark.skipif(not RECORDINGS.is_dir(), reason=f"no recordings of Antenna at {RECORDINGS}")

CASES = [pytest.param(exchange, name, id=name) for exchange in EXCHANGES for name in exchange.recorded]


@pytest.mark.parametrize(("exchange", "name"), CASES)
def test_the_recorded_answer_has_the_restated_status_and_shape(exchange: Exchange, name: str) -> None:
    """Also the method, and the path's last word."""
    recording: dict[str, Any] = json.loads((RECORDINGS / f"{name}.json").read_text())
    request, response = recording["request"], recording["response"]
    assert request["method"] == exchange.method
    assert _last_word(request["path"]) == _last_word(exchange.path) or exchange.path.endswith("}/")
    assert response["status"] == exchange.status
    assert differences(response["body"], exchange.answer) == []


def _last_word(path: str) -> str:
    return path.split("?", maxsplit=1)[0].rstrip("/").rsplit("/", maxsplit=1)[-1]
