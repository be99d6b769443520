"""What Antenna and image hosts may write, made up by hypothesis: URLs, JSON, file names, text around secrets."""

from __future__ import annotations

import json
import os
import re
import socket
import string
import tempfile
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from adc_worker.antenna.leases import job_of, parse_reply_subject
from adc_worker.antenna.wire import SuccessResult, Task, parse_jobs, parse_tasks
from adc_worker.errors import ImageError, LinkError
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.download import ImageClient, _redirected
from adc_worker.ingest.staging import StagingArea
from adc_worker.journal.journal import Journal
from adc_worker.redaction import public_url, redact

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SECRET = "5ec2e7canary"
WHEN = "2026-07-01T23:15:00"
GOOD = {"image_id": "good", "image_url": "https://h/5.jpg", "reply_subject": "$JS.ACK.good"}

any_text = st.text(st.characters())  # halves of surrogate pairs, too, which JSON can name and UTF-8 cannot write
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("id", "image_id", "image_url", "reply_subject", "pipeline_slug", "status", "extra"), json_values | any_text
    ),
)
hosts = st.sampled_from(
    ["h", "h.test", "1.2.3.4", "[::1]", "[::1", "", ".", "..", "h:0", "h:99999", "h:x", "\u212a", "ß"]
)
urls = any_text | st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["http://", "https://", "HTTP://", "ftp://", "file://", "//", "http:", "http:///", "\thttp://"]),
    st.sampled_from(["", "user@", "user:pw@", "@", ":@", "a@b@"]),
    hosts | st.text(max_size=20),
    st.text(max_size=40).map(lambda text: f"/{text}") | st.just(""),
)


@pytest.fixture(autouse=True)
def _nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is known and no address answers: nothing leaves this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)


@QUICK
@given(urls)
def test_any_url_ends_as_an_error_of_the_image_or_the_link(url: str) -> None:
    """No text makes the client raise anything else."""
    with ImageClient(1000, AddressPolicy("8.8.8.8")) as client, pytest.raises((ImageError, LinkError)):
        client.download(url, -1, lambda: False)


@QUICK
@given(urls, urls)
def test_any_redirect_ends_as_a_url_or_an_error_of_the_link(url: str, location: str) -> None:
    """And never leads from encryption to none."""
    try:
        target = _redirected(url, location)
    except (LinkError, ValueError):
        return
    assert not (url.lower().startswith("https://") and target.lower().startswith("http://"))


@QUICK
@given(st.lists(entries | json_values, max_size=5))
@example([GOOD | {"image_url": "another"}])  # found: the journal takes both for one
def test_any_entry_is_read_or_refused_and_costs_no_other(listed: list[Any]) -> None:
    """What is read can be stored, told apart by its lease, and answered."""
    jobs = parse_jobs(json.dumps({"results": [*listed, {"id": 7, "pipeline_slug": "moths"}]}).encode())
    tasks = parse_tasks(json.dumps({"tasks": [*listed, GOOD]}).encode())
    assert jobs[-1].id == 7
    assert Task(**GOOD) in tasks
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.db")
        try:
            for job_id in [1, *(job.id for job in jobs)]:
                held = journal.record(job_id, tasks)
                assert [kept.task for kept in journal.unfinished(job_id)] == [one.task for one in held]
                # Two tasks of one image and one lease, with two URLs, are one.
                assert {one.task.image_id for one in held} == {one.image_id for one in tasks}
        finally:
            journal.close()
        for task in tasks:
            job_of(task.reply_subject)
            parse_reply_subject(task.reply_subject)
            result = orjson.loads(b"".join(SuccessResult(task, "moths", [], 1.0, WHEN)))
            assert result["source_images"][0]["id"] == task.image_id


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """Also those that are no JSON, or no text."""
    for parse in (parse_jobs, parse_tasks):
        try:
            assert isinstance(parse(body), list)
        except ValueError:
            continue


@QUICK
@given(
    st.lists(
        st.text(string.printable, min_size=1, max_size=30)
        | st.from_regex(r"\d{1,30}(-[0-9a-f]{32})?(\.img|\.[0-9a-f]{16}\.part)", fullmatch=True)
    )
)
def test_any_file_name_in_the_staging_folder_is_left_or_swept(names: list[str]) -> None:
    """Only numbers of tasks with a digest are ours, however long; a stranger's file is never touched."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in names if "/" not in name and name not in {".", ".."}]
        for file in files:
            file.touch()
        with ImageClient(1000, AddressPolicy("8.8.8.8")) as client:
            StagingArea(Path(folder), client, 1000).sweep(set)
        for file in files:
            ours = re.fullmatch(r"[0-9]+-[0-9a-f]{32}(\.img|\.[0-9a-f]{16}\.part)", file.name) is not None
            assert file.exists() != ours


words = st.text(max_size=30)
url_parts = st.text(string.ascii_letters + string.digits + "-._~%:@!$&()*+,;=/", max_size=30)


@QUICK
@given(words, url_parts, url_parts, words)
def test_whatever_stands_around_a_signed_url_its_signature_is_cut_out(
    before: str, path: str, behind: str, after: str
) -> None:
    """The path stays; logs and results would be of no use without it."""
    url = f"https://user:{SECRET}@h/p{path}?a={behind}&X-Amz-Signature={SECRET}{behind}"
    assert SECRET not in redact(f"{before} {url} {after}")
    assert SECRET not in redact(f"{before}'{url}'{after}")
    assert SECRET not in redact(repr(ValueError(before, url)))
    assert SECRET not in public_url(url)
    assert public_url(url) == f"https://h/p{path}"
    task = Task(image_id="1", image_url=url, reply_subject="x")
    assert SECRET.encode() not in b"".join(SuccessResult(task, "moths", [], 1.0, WHEN))
