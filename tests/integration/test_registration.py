"""`ami worker register` and `ami models` as operators call them: a real process, real HTTP."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import trustme
from PIL import Image

from adc_worker.desk.server import DevServer
from adc_worker.errors import ExitCode
from adc_worker.models.catalogue import DETECTOR, DETECTOR_WEIGHTS, MOTH_FILTER, PIPELINES
from tests.support.workers import environment, run_to_end, worker

EXTRA = {"AMI_EXTRA_PIPELINES": "tests.support.extra_pipeline:pipelines"}
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def server() -> Iterator[DevServer]:
    with DevServer(projects=45) as running:
        yield running


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Labels of all ten pipelines, and no weights."""
    folder = tmp_path / "models"
    folder.mkdir()
    for card in PIPELINES.values():
        names = ["nonmoth", "moth"] if card is MOTH_FILTER else ["Noctua pronuba", "Biston betularia"]
        (folder / Path(card.labels).name).write_text(json.dumps({name: i for i, name in enumerate(names)}))
    return tmp_path


def ami(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adc_worker", *arguments]
    return subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False, timeout=240)


def test_all_projects_of_all_pages_learn_of_all_ten_pipelines(server: DevServer, data: Path) -> None:
    """45 projects at 40 a page; labels suffice, no weights are there. A second time nothing is new."""
    env = environment(server, data)
    first = ami(env, "worker", "register", "Traps")
    assert first.returncode == ExitCode.OK, first.stderr
    assert server.services()[f"Traps ({HOST})"] == set(range(1, 46))
    for slug, card in PIPELINES.items():
        pipeline = server.pipeline(slug)
        keys = [DETECTOR.key, *([MOTH_FILTER.key] if card.filtered else []), card.key]
        assert [one["key"] for one in pipeline["algorithms"]] == keys
        last = pipeline["algorithms"][-1]
        assert (last["name"], last["uri"]) == (card.name, card.weights)
        rows = [(row["index"], row["label"]) for row in last["category_map"]["data"]]
        assert rows == list(enumerate(last["category_map"]["labels"]))
        assert len(rows) == 2
    second = ami(env, "worker", "register", "Traps", "--project", "7")
    assert second.stdout.splitlines() == [f"project 7: Traps ({HOST}) serves 10 pipelines; new: nothing"]


def test_the_name_comes_from_the_settings_and_takes_the_host_where_it_is_wanted(server: DevServer, data: Path) -> None:
    """Containers have names that say nothing: {hostname} can be put anywhere, or be left to the end."""
    env = environment(server, data, EXTRA | {"AMI_ANTENNA_SERVICE_NAME": "{hostname} in the valley"})
    done = ami(env, "worker", "register", "--project", "2", "--project", "3", "--pipeline", "corners")
    assert done.returncode == ExitCode.OK, done.stderr
    assert server.services()[f"{HOST} in the valley"] == {2, 3}
    assert [one["key"] for one in server.pipeline("corners")["algorithms"]] == ["corners", "filter", "species"]


def test_a_second_detector_is_refused_with_the_reason(server: DevServer, data: Path) -> None:
    """It would stop Antenna from saving any result of that pipeline, of any worker."""
    server.add_job("simulated", [], algorithms=[("Other", "other_detector", "detection")])
    done = ami(environment(server, data), "worker", "register", "--project", "1", "--pipeline", "simulated")
    assert done.returncode == ExitCode.CONFIGURATION
    (line,) = done.stderr.splitlines()
    for word in ("project 1", "simulated", "other_detector", "simulated_detector", "saves no result"):
        assert word in line
    assert [one["key"] for one in server.pipeline("simulated")["algorithms"]] == ["other_detector"]


def test_a_refused_token_and_an_unknown_project_are_one_line(server: DevServer, data: Path) -> None:
    for extra, project, says in (
        ({}, "999", "project 999"),
        ({"AMI_ANTENNA_API_AUTH_TOKEN": server.outsider_token}, "1", "permission"),
        ({"AMI_ANTENNA_API_BASE_URL": "http://127.0.0.1:9/api/v2"}, "1", "http://127.0.0.1:9/api/v2"),
    ):
        env = environment(server, data, extra)
        done = ami(env, "worker", "register", "--project", project, "--pipeline", "light_sheet_blobs")
        assert done.returncode == ExitCode.CONFIGURATION
        (line,) = done.stderr.splitlines()
        assert says in line


def test_the_files_of_the_models_are_listed_with_what_is_missing(server: DevServer, data: Path) -> None:
    done = ami(environment(server, data), "models", "list")
    assert done.returncode == ExitCode.OK, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 2 * len(PIPELINES)  # the detector's, and of each classifier weights and labels
    assert sum("missing" in line for line in lines) == 1 + len(PIPELINES)
    assert any(Path(DETECTOR_WEIGHTS).name in line and "(10 pipelines)" in line for line in lines)


@pytest.mark.parametrize("arguments", [("--pipeline", "moth_binary"), ()])
def test_a_job_whose_weights_cannot_be_fetched_waits_with_the_reason(
    server: DevServer, data: Path, arguments: tuple[str, ...]
) -> None:
    """The store may be back at any time, whether the pipeline is named or not; a batch job is tried again."""
    picture = data / "sheet.png"
    Image.new("RGB", (64, 64), "white").save(picture)
    job_id = server.add_job("moth_binary", [picture])
    proxy = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    env = environment(server, data, proxy | {"AMI_ANTENNA_ACK_WAIT_SECONDS": "2"})
    code, log = run_to_end(env, *arguments, "--exit-when-idle")
    assert code == ExitCode.MACHINE_FAULT
    for line in log.events("pipeline_unavailable"):
        assert DETECTOR_WEIGHTS in line["error"]
        assert str(data / "models" / Path(DETECTOR_WEIGHTS).name) in line["error"]
    assert log.events("pipeline_unavailable")
    assert not server.job(job_id).deliveries, "no task is fetched for a model that is not there"
    server.cancel(job_id)


def test_a_named_pipeline_whose_checkpoint_is_of_another_network_ends_the_worker(server: DevServer, data: Path) -> None:
    """Exit code 3: it is what the operator wants, and no restart makes it fit."""
    picture = data / "sheet.png"
    Image.new("RGB", (64, 64), "white").save(picture)
    for url in (DETECTOR_WEIGHTS, MOTH_FILTER.weights):
        torch.save({"weight": torch.zeros(3)}, data / "models" / Path(url).name)
    job_id = server.add_job("moth_binary", [picture])
    code, log = run_to_end(environment(server, data), "--pipeline", "moth_binary", "--exit-when-idle")
    assert code == ExitCode.MODEL_UNAVAILABLE
    (fault,) = log.events("worker_fault")
    assert str(data / "models" / Path(DETECTOR_WEIGHTS).name) in fault["error"]
    assert not server.job(job_id).deliveries
    server.cancel(job_id)


class _Endless(BaseHTTPRequestHandler):
    """A proxy that is the store itself, and sends without end."""

    context: ssl.SSLContext
    pause = threading.Event()

    def do_CONNECT(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError), self.context.wrap_socket(self.connection, server_side=True) as store:
            store.recv(1 << 16)
            store.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
            while not self.pause.wait(0.01):
                store.sendall(bytes(1 << 16))

    def log_message(self, *_: object) -> None:
        pass


def test_a_drain_does_not_wait_for_gigabytes_of_weights(server: DevServer, data: Path) -> None:
    """The fetch breaks off, the worker ends by itself, and what has come is there for the next start."""
    authority, _Endless.context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(str(urlsplit(DETECTOR_WEIGHTS).hostname)).configure_cert(_Endless.context)
    authority.cert_pem.write_to_path(str(data / "ca.pem"))
    picture = data / "sheet.png"
    Image.new("RGB", (64, 64), "white").save(picture)
    job_id = server.add_job("moth_binary", [picture])
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        proxy_url = f"http://127.0.0.1:{proxy.server_address[1]}"
        extra = {"HTTPS_PROXY": proxy_url, "https_proxy": proxy_url, "SSL_CERT_FILE": str(data / "ca.pem")}
        with worker(environment(server, data, extra), "--pipeline", "moth_binary") as running:
            running.wait_for("weights_fetch")
            running.process.send_signal(signal.SIGTERM)
            assert running.wait() == ExitCode.OK, "\n".join(running.lines)
        proxy.shutdown()
        thread.join()
    server.cancel(job_id)
    assert not running.events("child_killed")
    assert list((data / "models").glob("*.part"))
