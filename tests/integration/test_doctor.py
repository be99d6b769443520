"""`ami doctor` against an Antenna that lets it fetch, one that does not, and none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from adc_worker.cli.main import cli
from adc_worker.desk.server import DevServer
from adc_worker.errors import ExitCode
from adc_worker.models.catalogue import DETECTOR_WEIGHTS
from tests.support.gate import Gate

JOB = 3  # the number that the first job of a desk with one image gets


@pytest.fixture(scope="module")
def server() -> Iterator[DevServer]:
    with DevServer() as running:
        assert running.add_job("simulated", ["http://127.0.0.1:9/1.jpg"]) == JOB
        yield running


def doctor(url: str, token: str, data: Path, **more: str) -> tuple[Result, dict[str, dict[str, str]]]:
    env = {
        "AMI_ANTENNA_API_BASE_URL": url,
        "AMI_ANTENNA_API_AUTH_TOKEN": token,
        "AMI_USER_DATA_PATH": str(data),
        **more,
    }
    done = CliRunner().invoke(cli, ["doctor", "--json"], env=env)
    return done, {one["check"]: one for one in json.loads(done.output)}


def test_a_sound_host_and_a_superusers_token_pass(server: DevServer, tmp_path: Path) -> None:
    """Exit code 0, and not one task was taken for it."""
    done, found = doctor(server.api_url, server.token, tmp_path)
    assert done.exit_code == ExitCode.OK, done.output
    assert {"memory", "disk", "open files", "GPU", "proxy", "CA certificates", "models", "Antenna"} <= set(found)
    assert {"clock", "token"} <= set(found)
    assert "may fetch tasks" in found["token"]["found"]
    assert not server.job(JOB).deliveries
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(("kind", "says"), [("unknown", "Invalid token"), ("member", "superuser"), ("none", "not set")])
def test_a_token_that_will_not_do_is_a_problem(server: DevServer, tmp_path: Path, kind: str, says: str) -> None:
    """One Antenna does not know, one that may poll but not fetch, and none at all: each with what to do."""
    token = {"unknown": "0" * 40, "member": server.member_token, "none": ""}[kind]
    done, found = doctor(server.api_url, token, tmp_path)
    assert done.exit_code == ExitCode.FAILED
    assert found["token"]["state"] == "problem"
    assert says in found["token"]["found"] + found["token"]["fix"]


def test_a_url_where_no_antenna_is_is_a_problem(server: DevServer, tmp_path: Path) -> None:
    """A closed port, and a web server that is no Antenna."""
    for url in ("http://127.0.0.1:9/api/v2", f"{server.url}/elsewhere"):
        done, found = doctor(url, server.token, tmp_path)
        assert done.exit_code == ExitCode.FAILED
        assert "AMI_ANTENNA_API_BASE_URL" in found["Antenna"]["fix"]


def test_what_this_host_lacks_comes_with_the_line_that_gives_it(server: DevServer, tmp_path: Path) -> None:
    """Too little memory, a NATS that is not there, a setting that means nothing."""
    more = {"AMI_MEMORY_LIMIT_BYTES": "200MB", "AMI_ANTENNA_NATS_URL": "nats://127.0.0.1:9", "AMI_NUM_WORKER": "3"}
    done, found = doctor(server.api_url, server.token, tmp_path, **more)
    assert done.exit_code == ExitCode.FAILED
    assert found["memory"]["state"] == found["NATS"]["state"] == "problem"
    assert "AMI_MEMORY_LIMIT_BYTES" in found["memory"]["found"]
    assert "AMI_ANTENNA_NATS_URL" in found["NATS"]["fix"]
    assert "did you mean AMI_NUM_WORKERS" in found["settings"]["found"]


def test_files_of_models_are_counted_where_a_worker_looks_for_them(server: DevServer, tmp_path: Path) -> None:
    """What is missing is no problem: a worker fetches it."""
    _done, found = doctor(server.api_url, server.token, tmp_path)
    assert found["models"]["state"] == "note"
    assert found["models"]["found"].startswith("0 of ")
    (tmp_path / "models").mkdir()
    weights = tmp_path / "models" / DETECTOR_WEIGHTS.rpartition("/")[2]
    weights.write_bytes(b"<html>Sign in</html>")
    _done, found = doctor(server.api_url, server.token, tmp_path)
    assert found["models"]["found"].startswith("0 of "), "a page is no model"
    torch.save({"weight": torch.zeros(1)}, weights)
    _done, found = doctor(server.api_url, server.token, tmp_path)
    assert found["models"]["found"].startswith("1 of ")


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404])
def test_what_stands_in_antennas_way_is_not_taken_for_antenna(server: DevServer, tmp_path: Path, status: int) -> None:
    """A sign-in page refuses no token and gives no list of jobs; at the fetch, its 400 proves no right to fetch."""
    with Gate(server.api_url) as gate:
        gate.fault = lambda _route: status
        done, found = doctor(gate.api_url, server.token, tmp_path)
        assert done.exit_code == ExitCode.FAILED
        assert "is not Antenna" in found["Antenna"]["found"]
        assert "token" not in found
        gate.fault = lambda route: status if route == "POST tasks" else None
        done, found = doctor(gate.api_url, server.token, tmp_path)
        assert done.exit_code == ExitCode.FAILED
        assert found["token"]["state"] == "problem"
        assert "may fetch" not in found["token"]["found"]
