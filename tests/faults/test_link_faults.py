"""DNS that dies, a CA that is missing, a refused network: no image gets an error, and the job goes on by itself."""

from __future__ import annotations

import itertools
import ssl
import subprocess
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from adc_worker.planning.policy import DOWNLOADS_MAX
from tests.faults.conftest import Desk
from tests.support.counting_pipeline import numbered
from tests.support.image_server import ImageServer, Reply
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess, worker

NAME = "images.test"  # never a real host (RFC 6761)
_WITH_OWN_NAMES = 'mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf && shift 2 && exec "$@"'


def _line_about(running: WorkerProcess, host: str) -> str:
    """Wait for the line that says that a host is at fault, and what to do."""

    def about() -> list[str]:
        return [
            f"{line['error']}; {line['do']}" for line in running.events("image_host_at_fault") if line["host"] == host
        ]

    wait_until(about, timeout_s=60)
    return about()[0]


def _went_on(desk: Desk, job_id: int, *logs: WorkerProcess) -> None:
    """See that a job gets done with one delivery of each image, and that one line spoke of each host at fault."""
    assert set(desk.done(job_id).deliveries.values()) == {1}
    for log in logs:
        hosts = [line["host"] for line in log.events("image_host_at_fault")]
        assert len(hosts) == len(set(hosts))
        assert not log.events("child_ended")


def test_dns_that_dies_in_the_middle_of_a_job_costs_no_image_and_the_job_goes_on_when_it_is_back(
    desk: Desk, tmp_path: Path
) -> None:
    hosts, resolver = tmp_path / "hosts", tmp_path / "resolv.conf"
    known = f"127.0.0.1 localhost {NAME}\n"
    hosts.write_text(known)
    resolver.write_text("nameserver 127.0.0.1\n")  # where nobody answers
    within = ["unshare", "--mount", "sh", "-c", _WITH_OWN_NAMES, "sh", str(hosts), str(resolver)]
    try:
        subprocess.run([*within, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no names of one's own without root and mount namespaces: {error}")
    requests = itertools.count(1)
    images = 5 + 2 * DOWNLOADS_MAX  # more than can be on their way when their host's name is lost

    def image(number: int) -> Reply:
        if next(requests) == 5:
            hosts.write_text("127.0.0.1 localhost\n")
        return Reply(numbered(number), headers={"Connection": "close"})  # so that each is looked up

    desk.images.replies |= {f"/{number}.png": partial(image, number) for number in range(images)}
    job_id = desk.add_job(images, hostname=NAME)
    with worker(desk.environment(), within=within) as running:
        assert "check the DNS" in _line_about(running, urlsplit(desk.images.url("", NAME)).netloc)
        desk.done(desk.add_job(8, first=100))
        assert desk.antenna.job(job_id).processed < images
        hosts.write_text(known)
        _went_on(desk, job_id, running)
        running.wait_for("image_host_back")


def test_a_missing_ca_and_a_refused_network_are_named_and_their_jobs_are_done_once_they_are_set_right(
    desk: Desk, tmp_path: Path
) -> None:
    """Antenna is at a public address behind a proxy, images are next door; a CA that comes needs no restart."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trusted = tmp_path / "trusted.pem"
    trustme.CA().cert_pem.write_to_path(str(trusted))  # another one
    env = desk.environment(
        {
            "AMI_ANTENNA_API_BASE_URL": desk.gate.api_url.replace(desk.gate.address, "8.8.8.8"),
            "AMI_IMAGE_ALLOWED_HOSTS": "localhost",
            "SSL_CERT_FILE": str(trusted),
            "http_proxy": f"http://{desk.gate.address}",
            "no_proxy": "127.0.0.1,localhost",
        }
    )
    with ImageServer(context) as secure, ImageServer() as refused:
        over_tls = desk.add_job(8, host=secure, hostname="localhost")
        next_door = desk.add_job(8, first=100, host=refused)
        other = desk.add_job(8, first=200, hostname="localhost")
        with worker(env) as first:
            assert "SSL_CERT_FILE" in _line_about(first, f"localhost:{secure.port}")
            assert "AMI_IMAGE_ALLOWED_NETWORKS" in _line_about(first, f"127.0.0.1:{refused.port}")
            desk.done(other)
            assert not secure.requests
            authority.cert_pem.write_to_path(str(trusted))
            _went_on(desk, over_tls, first)
            first.wait_for("image_host_back")
            assert not refused.requests
            assert not desk.antenna.job(next_door).processed
        with worker(env | {"AMI_IMAGE_ALLOWED_NETWORKS": "127.0.0.0/8"}) as second:
            _went_on(desk, next_door, first, second)
