"""No secret leaves: a whole job with a marked token and marked signatures, failures included, then a search.

Searched: log lines, a hung child's stacks, command lines, pages and metrics, what `ami` commands print, posts, and
every file that is left, with its name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from adc_worker.desk.server import DevServer
from adc_worker.desk.sheets import write_sheets
from adc_worker.errors import ExitCode
from tests.support.gate import Gate
from tests.support.image_server import ImageServer, Reply
from tests.support.secret_urls import secret_urls
from tests.support.waiting import wait_until
from tests.support.workers import environment, worker

TOKEN = "c0ffee" * 6 + "c0ff"
SIGNATURE = "5ec2e7canary5ec2e7"
ACK_WAIT_S = 4.0
GOOD = 12


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer(token=TOKEN, save_delay_s=0.005, ack_wait_s=ACK_WAIT_S, keep_streams=True) as running:
        yield running


def signed(images: ImageServer, path: str) -> str:
    return images.url(f"{path}?X-Amz-Date=1&X-Amz-Signature={SIGNATURE}")


def serve(images: ImageServer, path: str, reply: Reply) -> str:
    """Answer a signed URL with `reply`, and return it."""
    url = signed(images, path)
    images.replies[url.removeprefix(images.url(""))] = reply
    return url


def printed(env: dict[str, str], *arguments: str) -> str:
    """Return all that a command writes, whether it likes what it finds or not."""
    done = subprocess.run(
        [sys.executable, "-m", "adc_worker", *arguments],
        env=env, cwd=env["AMI_USER_DATA_PATH"], capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    return done.stdout + done.stderr


def leaks(text: str) -> list[str]:
    return [secret for secret in (TOKEN, SIGNATURE) if secret in text]


@pytest.mark.timeout(400)
def test_no_secret_is_logged_kept_or_posted(server: DevServer, tmp_path: Path) -> None:
    """Good images, each kind of failure, a hung child and an outage of Antenna: nothing of it quotes a secret.

    While an image waits for its download its whole URL is in the journal, which only its owner may read; at the end
    the journal has none.
    """
    (sheet,) = write_sheets(tmp_path / "sheets", 1, seed=5, sizes=((640, 480),))
    data = sheet.read_bytes()
    with ImageServer() as gone:
        nowhere = signed(gone, "/gone.jpg")
    with ImageServer() as images, Gate(server.api_url) as gate:
        bad = {
            "missing": signed(images, "/missing.jpg"),
            "page": serve(images, "/page.jpg", Reply(b"<html>Sign in</html>")),
            "empty": serve(images, "/empty.jpg", Reply(b"")),
            "broken": serve(images, "/broken.jpg", Reply(data[:600])),
            "short": serve(images, "/short.jpg", Reply(data[:-900], length=str(len(data)))),
            "forbidden": serve(images, "/forbidden.jpg", Reply(b"", status=403)),
            "failing": serve(images, "/failing.jpg", Reply(b"", status=500)),
            "no url": f"http://[broken/x.jpg?X-Amz-Signature={SIGNATURE}",
            "no port": images.url("").replace("http://", f"http://user:{SIGNATURE}@") + "0/x.jpg",
            "refused": nowhere,
            "https": nowhere.replace("http://", "https://"),
            "lost": serve(
                images, "/lost.jpg", Reply(status=302, headers={"Location": f"/x?X-Amz-Signature={SIGNATURE}"})
            ),
            "astray": serve(
                images,
                "/astray.jpg",
                Reply(status=302, headers={"Location": f"http://x:8o/o'hara.jpg?a='b'&X-Amz-Signature={SIGNATURE}"}),
            ),
        }
        bad |= secret_urls(images.url("").removeprefix("http://").rstrip("/"), SIGNATURE)
        good = [serve(images, f"/{number}.jpg", Reply(data)) for number in range(GOOD)]
        job_id = server.add_job("simulated", [*good, *bad.values()])
        env = environment(server, tmp_path / "data", {"AMI_LOG_LEVEL": "debug", "AMI_STATUS_PORT": "0"})
        env |= {
            "AMI_ANTENNA_ACK_WAIT_SECONDS": str(ACK_WAIT_S),
            "AMI_SIMULATED_SECONDS_PER_IMAGE": "0.01",
            "AMI_STATUS_PORT": "0",
            "AMI_ANTENNA_API_BASE_URL": gate.api_url,
        }
        faults = iter([500, 500])
        gate.fault = lambda route: next(faults, None) if route == "POST result" else None
        with worker(env, "--pipeline", "simulated") as running:
            running.wait_for("plan")
            child = psutil.Process(running.child_pid())
            shown = json.dumps([child.cmdline(), psutil.Process(running.process.pid).cmdline()])
            os.kill(child.pid, signal.SIGABRT)  # as its parent does when it hangs, for the stacks
            wait_until(lambda: server.job(job_id).processed == GOOD + len(bad), timeout_s=100)
            status_url = running.wait_for("status_page")["url"].rstrip("/")
            wait_until(lambda: "403" in httpx.get(f"{status_url}/snapshot.json").text, timeout_s=60)
            served = [httpx.get(status_url + path).text for path in ("/", "/snapshot.json", "/metrics", "/readyz")]
            told = {
                text: printed(env, *text.split())
                for text in ("worker status", "worker status --json", "doctor", "settings")
            }
            running.process.send_signal(signal.SIGTERM)
            assert running.wait() == ExitCode.OK
    job = server.job(job_id)
    assert len(job.results) == GOOD
    assert len(job.errors) == len(bad)
    told["worker report"] = printed(env, "worker", "report", str(tmp_path / "data" / "report.html"))
    told["token file"] = printed(env | {"AMI_ANTENNA_API_AUTH_TOKEN_FILE": TOKEN}, "worker", "--exit-when-idle")
    assert str(job_id) in told["worker status"]
    assert "AMI_ANTENNA_API_AUTH_TOKEN_FILE" in told["token file"]
    assert not [name for name, text in told.items() if leaks(text)]
    assert not [page for page in served if leaks(page)]
    assert not leaks(shown), "command lines are everybody's to read"
    assert not [line for line in running.lines if leaks(line)]
    assert any(line.startswith("Fatal Python error: Aborted") for line in running.lines)
    assert any("/forbidden.jpg" in line for line in running.lines), "one can still see which image it was"
    assert not leaks(json.dumps([job.results, job.errors]))
    written = [file for file in (tmp_path / "data").rglob("*") if file.is_file()]
    assert {"adc_journal.db", "report.html"} <= {file.name for file in written}
    assert not [file for file in written if leaks(f"{file} {file.read_bytes().decode(errors='replace')}")]


def test_the_desk_server_listens_on_loopback_only(server: DevServer) -> None:
    """It has no security to speak of: neither its API nor its NATS server is for the network."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [one.laddr for each in processes for one in each.net_connections() if one.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {int(url.rpartition(":")[2]) for url in (server.url, server.nats_url)} <= {each.port for each in listening}
