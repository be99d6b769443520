"""The desk server answers as Antenna does, and treats results, leases and jobs as Antenna does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adc_worker import settings
from adc_worker.desk.server import DevServer
from tests.support.contract import (
    DETECTOR,
    EXCHANGES,
    FORGED_SUBJECT,
    SLUG,
    Exchange,
    classification,
    detection,
    differences,
    post,
    success,
)
from tests.support.process_tree import alive
from tests.support.waiting import wait_until

ALGORITHMS = [("D", "sheet_detector", "detection"), ("C", "sheet_classifier", "classification")]
IMAGES = ["http://images.test/a.jpg", "http://images.test/b.jpg", "http://images.test/c.jpg"]


@pytest.fixture(scope="module")
def desk() -> Iterator[DevServer]:
    """A server whose tests each make their own job."""
    with DevServer(save_delay_s=0.01, keep_streams=True) as server:
        yield server


class Client:
    """A worker's view of one job, with nothing but HTTP."""

    def __init__(self, server: DevServer, job_id: int) -> None:
        self.server = server
        self.job_id = job_id
        self._headers = {"Authorization": f"Token {server.token}"}

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        url = f"{self.server.api_url}/jobs/{self.job_id}/{path}"
        return httpx.request(method, url, json=body, headers=self._headers, timeout=30)

    def fetch(self, batch_size: int = 10) -> list[dict[str, str]]:
        answer = self.ask("POST", "tasks/", {"batch_size": batch_size})
        assert answer.status_code == 200, answer.text
        tasks: list[dict[str, str]] = answer.json()["tasks"]
        return tasks

    def post(self, task: dict[str, str], result: dict[str, Any] | None = None) -> None:
        body = post(result or success(task["id"]), subject=task["reply_subject"])
        assert self.ask("POST", "result/", body).status_code == 200

    def post_all(self, tasks: list[dict[str, str]], result: dict[str, Any] | None = None) -> None:
        for task in tasks:
            self.post(task, result)

    def wait_for(self, status: str) -> None:
        wait_until(lambda: self.server.job(self.job_id).status == status)


def start_job(server: DevServer, n_images: int = 3) -> Client:
    return Client(server, server.add_job(SLUG, IMAGES[:n_images], algorithms=ALGORITHMS))


def outstanding(client: Client) -> int:
    info = client.server.consumer_info(client.job_id)
    assert info is not None
    return int(info["num_ack_pending"])


@pytest.mark.parametrize("exchange", EXCHANGES, ids=str)
def test_answers_as_the_contract_says(desk: DevServer, exchange: Exchange) -> None:
    """Status and body of every exchange in the table."""
    client = start_job(desk)
    if exchange.job == "drained":
        client.fetch()
    elif exchange.job == "cancelled":
        desk.cancel(client.job_id)
    sync_job = desk.add_job("contract_sync", IMAGES[:1], dispatch_mode="sync_api") if "sync" in exchange.path else 0
    path = exchange.path.format(job=client.job_id, sync_job=sync_job, project=desk.project_id)
    answer = send(desk, exchange, path)
    assert answer.status_code == exchange.status, answer.text
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    assert differences(answer.json() if is_json else answer.text, exchange.answer) == []


def send(desk: DevServer, exchange: Exchange, path: str) -> httpx.Response:
    tokens = {"superuser": desk.token, "member": desk.member_token, "outsider": desk.outsider_token, "wrong": "0" * 40}
    headers = {"Content-Type": exchange.content_type} if exchange.body is not None else {}
    if exchange.role != "none":
        headers["Authorization"] = f"{exchange.scheme} {tokens[exchange.role]}"
    url = f"{desk.api_url}/{path}"
    if isinstance(exchange.body, bytes):
        return httpx.request(exchange.method, url, headers=headers, content=exchange.body)
    return httpx.request(exchange.method, url, headers=headers, json=exchange.body)


def test_lists_have_pages(desk: DevServer) -> None:
    """`next` leads to the rest; captures are those of one collection."""
    client = start_job(desk)
    collection = client.ask("GET", "").json()["source_image_collection"]["id"]
    captures = f"{desk.api_url}/captures/?project_id={desk.project_id}&collections={collection}&limit=2"
    first = httpx.get(captures).json()
    rest = httpx.get(first["next"]).json()
    assert (first["count"], len(first["results"]), rest["next"]) == (3, 2, None)
    assert [row["url"] for row in first["results"] + rest["results"]] == IMAGES


def test_registering_names_what_is_new_and_adds_algorithms_only(desk: DevServer) -> None:
    """The first call lists slug and keys, a repeated one nothing, a grown one the new key."""
    url = f"{desk.api_url}/projects/{desk.project_id}/pipelines/"

    def register(*keys: str) -> list[str]:
        algorithms = [{"name": key, "key": key, "task_type": "detection"} for key in keys]
        pipeline = {"name": "Grows", "slug": "grows", "version": 1, "algorithms": algorithms}
        body = {"processing_service_name": "desk", "pipelines": [pipeline]}
        answer = httpx.post(url, json=body, headers={"Authorization": f"Token {desk.member_token}"})
        created: list[str] = answer.json()["pipelines_created"]
        return created

    assert register("one") == ["grows", "one"]
    assert register("one") == []
    assert register("two") == ["two"]


def test_a_poll_for_ids_answers_with_one_job_unless_a_limit_is_given(desk: DevServer) -> None:
    """Two jobs wait: the answer holds one, and `limit` brings both."""
    ids = {desk.add_job("polled", IMAGES[:1]), desk.add_job("polled", IMAGES[:1])}
    poll = f"{desk.api_url}/jobs/?pipeline__slug__in=other,polled&ids_only=1&incomplete_only=1&status=STARTED"
    assert len(httpx.get(poll).json()["results"]) == 1
    assert {row["id"] for row in httpx.get(f"{poll}&limit=10").json()["results"]} == ids


def test_a_result_is_saved_before_it_is_acknowledged(desk: DevServer) -> None:
    """After the fetch and the post: saved, acknowledged, and the job goes on."""
    client = start_job(desk)
    tasks = client.fetch()
    assert [task["id"] for task in tasks] == [task["image_id"] for task in tasks]
    assert outstanding(client) == 3
    client.post(tasks[0])
    wait_until(lambda: outstanding(client) == 2)
    view = desk.job(client.job_id)
    assert set(view.results) == {tasks[0]["id"]}
    assert (view.status, view.processed, view.failed) == ("STARTED", 1, 0)


def test_a_job_finishes_when_everything_is_counted(desk: DevServer) -> None:
    """Two successes, one of them without detections, and one failure make a success."""
    client = start_job(desk)
    first, second, third = client.fetch()
    client.post(first)
    client.post(second, success(second["id"], detections=[]))
    client.post(third, {"error": "not an image", "image_id": third["id"]})
    client.wait_for("SUCCESS")
    view = desk.job(client.job_id)
    assert view.errors == {third["id"]: "not an image"}
    assert view.results.keys() == {first["id"], second["id"]}
    assert view.first_saved_s is not None
    assert view.last_saved_s is not None
    assert view.first_saved_s < view.last_saved_s


def test_a_job_most_of_which_failed_is_no_longer_listed_and_ends_as_failure(desk: DevServer) -> None:
    """Its last task is served all the same."""
    client = Client(desk, desk.add_job("failing", IMAGES))
    poll = f"{desk.api_url}/jobs/?pipeline__slug__in=failing&ids_only=1&incomplete_only=1"
    for task in client.fetch(2):
        client.post(task, {"error": "gone", "image_id": task["id"]})
    wait_until(lambda: desk.job(client.job_id).failed == 2)
    assert httpx.get(poll).json()["results"] == []
    (last,) = client.fetch()
    client.post(last, success(last["id"], pipeline="failing"))
    client.wait_for("FAILURE")


def test_the_stream_is_gone_before_the_last_acknowledgement() -> None:
    """As on the real server, nobody can look at a finished job's consumer."""
    with DevServer(save_delay_s=0) as server:
        client = start_job(server, 1)
        client.post_all(client.fetch())
        client.wait_for("SUCCESS")
        wait_until(lambda: server.consumer_info(client.job_id) is None)
        assert client.fetch() == []


def test_an_unacknowledged_task_comes_again_and_then_never() -> None:
    """ack_wait brings the second delivery, max_deliver forbids a third; results of any delivery still count."""
    with DevServer(ack_wait_s=0.5, max_deliver=2, save_delay_s=0, keep_streams=True) as server:
        client = start_job(server, 2)
        first = client.fetch()
        second: list[dict[str, str]] = []

        def redelivered() -> bool:
            second.extend(client.fetch())
            return len(second) == 2

        wait_until(redelivered)
        assert [task["id"] for task in first] == [task["id"] for task in second]
        assert [task["reply_subject"].split(".")[4] for task in second] == ["2", "2"]
        client.post(first[0])
        wait_until(lambda: len(server.job(client.job_id).results) == 1)
        assert server.job(client.job_id).deliveries == {first[0]["id"]: 2, first[1]["id"]: 2}
        lapse_s = time.monotonic() + 0.6
        wait_until(lambda: client.fetch() == [] and time.monotonic() > lapse_s)
        assert server.job(client.job_id).deliveries[first[1]["id"]] == 2
        client.post(second[1])
        client.wait_for("SUCCESS")


def test_the_subject_of_an_expired_delivery_acknowledges_the_message() -> None:
    """The acknowledgement belongs to the message, not to the delivery."""
    with DevServer(ack_wait_s=0.5, max_deliver=5, save_delay_s=0, keep_streams=True) as server:
        client = start_job(server, 2)
        first = client.fetch()
        wait_until(lambda: client.fetch() != [])
        client.post(first[0])
        wait_until(
            lambda: (info := server.consumer_info(client.job_id)) is not None and info["ack_floor"]["stream_seq"] == 1
        )


def test_after_cancel_and_retry_an_old_subject_acknowledges_another_image(desk: DevServer) -> None:
    """A new stream has the old name, so what was kept from before hits whatever has that sequence number now."""
    client = start_job(desk)
    old = client.fetch()
    desk.cancel(client.job_id)
    assert client.fetch() == []
    client.post(old[0])
    desk.retry(client.job_id)
    new = client.fetch(1)
    assert new[0]["reply_subject"].split(".")[5] == old[0]["reply_subject"].split(".")[5]
    assert new[0]["id"] != old[0]["id"]
    assert desk.job(client.job_id).results == {}
    client.post(old[0])
    wait_until(lambda: outstanding(client) == 0)
    assert desk.job(client.job_id).results.keys() == {old[0]["id"]}


def test_a_duplicate_is_acknowledged_saved_once_and_counted_once(desk: DevServer) -> None:
    """Reposting is always safe."""
    client = start_job(desk)
    tasks = client.fetch(1)
    client.post_all([*tasks, *tasks])
    client.post_all(client.fetch(1))
    wait_until(lambda: outstanding(client) == 0)
    view = desk.job(client.job_id)
    assert (view.processed, len(view.results), view.posts[tasks[0]["id"]]) == (2, 2, 2)


def test_an_error_without_an_image_is_acknowledged_and_never_counted(desk: DevServer) -> None:
    """The job can then never finish."""
    client = start_job(desk, 1)
    client.post_all(client.fetch(), {"error": "whose?"})
    wait_until(lambda: outstanding(client) == 0)
    view = desk.job(client.job_id)
    assert (view.status, view.processed, view.stray_errors) == ("STARTED", 0, ["whose?"])


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline": "another_pipeline"},
        {"detections": [detection("1", algorithm={"name": "X", "key": "unregistered"})]},
        {"detections": [detection("1", classifications=[classification(algorithm=DETECTOR | {"key": "x"})])]},
        {"detections": [detection("1", classifications=[classification(scores=[])])]},
    ],
    ids=["pipeline", "detector", "classifier", "scores"],
)
def test_a_result_that_cannot_be_saved_is_not_acknowledged(desk: DevServer, changes: dict[str, Any]) -> None:
    """It is half counted: processed, never saved."""
    client = start_job(desk, 1)
    (task,) = client.fetch()
    client.post(task, success(task["id"]) | changes)
    wait_until(lambda: len(desk.job(client.job_id).refused) == 1)
    view = desk.job(client.job_id)
    assert (view.status, view.processed, view.results, outstanding(client)) == ("STARTED", 1, {}, 1)


def test_one_invalid_entry_refuses_the_whole_post(desk: DevServer) -> None:
    """Nothing of it is queued."""
    client = start_job(desk)
    task, _, _ = client.fetch()
    body = post(success(task["id"]), {"pipeline": SLUG}, subject=task["reply_subject"])
    assert client.ask("POST", "result/", body).status_code == 400
    assert desk.job(client.job_id).posts == {}


def test_a_post_above_the_proxy_limit_is_refused() -> None:
    """With 413, before anybody reads it."""
    with DevServer(max_body_bytes=1000) as server:
        body = post({"error": "x" * 1000, "image_id": "1"})
        assert start_job(server).ask("POST", "result/", body).status_code == 413


def test_a_result_posted_to_a_sync_job_fails_the_job(desk: DevServer) -> None:
    """The answer is 200 all the same."""
    client = Client(desk, desk.add_job(SLUG, IMAGES[:1], dispatch_mode="sync_api", algorithms=ALGORITHMS))
    client.post({"id": "1", "reply_subject": FORGED_SUBJECT})
    client.wait_for("FAILURE")


def test_a_job_whose_end_was_lost_in_the_race_finishes_with_a_duplicate() -> None:
    """With everything saved it stays STARTED until one result comes again."""
    with DevServer(save_delay_s=0, race_at_end=True, keep_streams=True) as server:
        client = start_job(server, 2)
        tasks = client.fetch()
        client.post_all(tasks)
        wait_until(lambda: outstanding(client) == 0)
        assert server.job(client.job_id).status == "STARTED"
        client.post(tasks[0])
        client.wait_for("SUCCESS")


def test_fetching_answers_503_while_nats_is_down_and_recovers() -> None:
    """Other endpoints answer meanwhile; the store survives, and so do delivery counts."""
    with DevServer(nats_timeout_s=0.3, save_delay_s=0, keep_streams=True) as server:
        client = start_job(server)
        assert len(client.fetch(1)) == 1
        server.kill_nats()
        answer = client.ask("POST", "tasks/", {"batch_size": 1})
        assert (answer.status_code, answer.json()) == (503, {"error": "Task queue temporarily unavailable"})
        assert client.ask("GET", "").status_code == 200
        server.start_nats()
        assert len(client.fetch()) == 2
        assert outstanding(client) == 3


def test_images_are_served_and_requests_counted(tmp_path: Path) -> None:
    """A file that does not exist is 404."""
    content = bytes(range(256)) * 1000
    (tmp_path / "whole.jpg").write_bytes(content)
    with DevServer(image_dir=tmp_path) as server:
        whole, missing = Client(server, server.add_job("pictures", ["whole.jpg", "missing.jpg"])).fetch(2)
        assert httpx.get(whole["image_url"]).content == content
        assert httpx.get(missing["image_url"]).status_code == 404
        assert server.requests == {"POST tasks": 1, "GET images": 2}


def _belongings() -> tuple[set[str], int, int, set[str]]:
    process = psutil.Process()
    folders = {path.name for path in Path(tempfile.gettempdir()).glob("adc-devserver-*")}  # of this test: see own_tmp
    return {t.name for t in threading.enumerate()}, len(process.children()), process.num_fds(), folders


@pytest.fixture
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test runs on this machine make such folders, too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("own_tmp")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(error: type[BaseException]) -> None:
    """No thread, process, descriptor or folder."""
    with DevServer():  # a first one, for what Python opens once and keeps
        pass
    before = _belongings()

    def fail() -> None:
        with DevServer() as server:
            start_job(server)
            raise error

    with pytest.raises(error):
        fail()
    assert _belongings() == before


@pytest.mark.usefixtures("own_tmp")
def test_a_port_that_is_taken_is_an_error_and_leaves_nothing() -> None:
    """The server says so at once."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        before = _belongings()
        with pytest.raises(OSError, match="address already in use"), DevServer(port=taken.getsockname()[1]):
            pass
        assert _belongings() == before


COMMAND = "from adc_worker.cli.devserver import devserver_command; devserver_command()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_prints_two_settings_and_takes_nats_with_it(number: signal.Signals, tmp_path: Path) -> None:
    """Asked politely it exits with 0; killed, it still leaves no nats-server behind."""
    command = [sys.executable, "-c", COMMAND, "--port", "0", "--images", str(tmp_path), "--token", "t0"]
    (tmp_path / "a.jpg").write_bytes(b"no image, but nobody looks")
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(4)]
        (nats,) = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(30) == (0 if number != signal.SIGKILL else -number)
    assert lines[1].startswith("AMI_ANTENNA_API_BASE_URL=http://127.0.0.1:")
    assert lines[2] == "AMI_ANTENNA_API_AUTH_TOKEN=t0"
    assert "1 images for light_sheet_blobs" in lines[3]
    wait_until(lambda: not alive([nats]))


def run_devserver(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command so that what it wrote can be read after it was stopped."""
    command = [sys.executable, "-c", COMMAND, "--port", "0", "--token", "t0", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)


def test_the_command_writes_a_new_env_file_that_a_worker_can_read(tmp_path: Path) -> None:
    """URL and token, for the owner's eyes only."""
    file = tmp_path / ".env"
    with run_devserver(tmp_path, "--write-env", ".env") as process:
        wait_until(lambda: file.exists() and "t0\n" in file.read_text())
        process.send_signal(signal.SIGINT)
    config = settings.load(file)
    assert config.token == "t0"
    assert config.antenna_api_base_url.startswith("http://127.0.0.1:")
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_command_never_replaces_an_env_file(tmp_path: Path) -> None:
    """It says so before it starts anything."""
    (tmp_path / ".env").write_text("AMI_ANTENNA_API_AUTH_TOKEN=real\n")
    with run_devserver(tmp_path, "--write-env", ".env") as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--write-env .env: the file exists" in output
    assert (tmp_path / ".env").read_text() == "AMI_ANTENNA_API_AUTH_TOKEN=real\n"


def test_the_shape_language_tells_differences() -> None:
    """The table would be worth nothing if everything fitted."""
    shape = {"a": [int], "b": "x", "c": {"d": (str, type(None))}, "e": ["y", ...], "f": []}
    assert differences({"a": [1, 2], "b": "x", "c": {"d": None}, "e": ["y", "z"], "f": [], "more": 1}, shape) == []
    assert len(differences({"a": ["1", 2], "b": "y", "c": {}, "e": [], "f": [1]}, shape)) == 5
