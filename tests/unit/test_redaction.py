"""What of a URL may be shown, and that nothing else of it is, however a text quotes it."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable
from urllib.parse import quote, unquote, urlsplit

import pytest

from adc_worker.antenna.wire import SuccessResult, Task
from adc_worker.errors import AdcError
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.download import ImageClient
from adc_worker.redaction import knowing, public_url, redact
from tests.support.secret_urls import secret_urls

SECRET = "5ec2e7canary5ec2e7"
URLS = secret_urls("images.example.org", SECRET)


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_what_may_be_shown_of_a_url_has_no_secret_and_tells_which_image_it_is(url: str) -> None:
    """Host and path stay, up to where the secrets begin."""
    shown = public_url(url)
    assert SECRET not in shown
    assert "user" not in shown
    assert shown.rpartition("/")[0].partition("//")[2] in url
    result = SuccessResult(Task(image_id="1", image_url=url, reply_subject="x"), "p", [], 1.0, "2026-07-01T23:15:00")
    assert SECRET.encode() not in b"".join(result)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h/a.jpg", "https://h/a.jpg"),
        ("https://user:pa'ss@h:8080/a@2x.jpg?sig=1#b", "https://h:8080/a@2x.jpg"),
        ("https://h:8080/user:name@home/a.jpg", "https://h:8080/user:name@home/a.jpg"),
        ("http://[2001:db8::1]:80/a.jpg?b", "http://[2001:db8::1]:80/a.jpg"),
        ("", ""),
        ("?sig=1", ""),
        ("no url at all", "no url at all"),
    ],
)
def test_a_url_is_parsed_and_not_searched(url: str, shown: str) -> None:
    """An @ or a colon in a path is no password."""
    assert public_url(url) == shown


QUOTATIONS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "by Python": repr,
    "by Python in ASCII": ascii,
    "in a tuple": lambda url: repr((url, 1)),
    "in a message in an exception": lambda url: repr(ValueError(f"cannot parse {url!r}")),
    "by JSON": json.dumps,
    "by HTML": html.escape,
    "in apostrophes": lambda url: f"'{url}'",
    "percent-encoded": lambda url: quote(url, safe="!#$%&'()*+,/:;=?@[]~"),
    "percent-encoded whole": lambda url: quote(url, safe=""),
    "percent-decoded": unquote,
    "without its host": lambda url: "/" + url.partition("//")[2].partition("/")[2],
    "without line ends": lambda url: url.replace("\n", "").replace("\r", ""),
    "its query alone": lambda url: url.partition("?")[2],
}


@pytest.mark.parametrize("quotation", QUOTATIONS.values(), ids=QUOTATIONS)
@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_a_known_url_is_cut_out_however_a_text_quotes_it(url: str, quotation: Callable[[str], str]) -> None:
    """And what stands around it is kept."""
    with knowing(url):
        written = redact(f"it failed: {quotation(url)} was refused")
    assert SECRET not in written
    assert written.startswith("it failed: ")
    assert written.endswith("was refused")


def test_a_url_is_known_for_as_long_as_it_is_at_hand() -> None:
    """Inside another one's time, too; redirects add theirs."""
    with knowing("http://h/a?one=first-secret") as urls:
        urls.append("http://h/b?two=second-secret")
        with knowing("http://h/c?three=third-secret"):
            assert redact("first-secret second-secret third-secret") == "<redacted> <redacted> <redacted>"
        assert redact("first-secret third-secret") == "<redacted> third-secret"
    assert redact("first-secret second-secret") == "first-secret second-secret"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("https://h/a.jpg?x='1'&sig=5ec2e7canary", "https://h/a.jpg?<redacted>"),
        ("('https://h/o'hara.jpg?x='1'&sig=5ec2e7canary', 1)", "('https://h/o'hara.jpg?<redacted>', 1)"),
        ("nats://user:pa/ss@h:4222 refused", "nats://<redacted>@h:4222 refused"),
        ("nats://user:pa'ss@h:4222", "nats://<redacted>@h:4222"),
        ("http://h:8080/a@2x.jpg is gone", "http://h:8080/a@2x.jpg is gone"),
        ("a b.jpg?X-Amz-Signature=5ec2e7", "a b.jpg?<redacted>"),
        ('filename="x y.jpg"&X-Amz-Signature=5ec2e7', 'filename="x y.jpg"&X-Amz-Signature=<redacted>'),
        ("what now?", "what now?"),
        ("is it /this? or that", "is it /this?<redacted> or that"),
    ],
)
def test_a_text_of_others_is_searched_for_what_looks_like_a_url(text: str, written: str) -> None:
    """Rather too much is cut than too little: nobody knows there what URL it was."""
    assert redact(text) == written


@pytest.mark.parametrize("name", ["impossible port", "port beyond all ports", "unclosed address", "another scheme",
                                  "no scheme", "password with a slash"])  # fmt: skip
def test_a_url_that_cannot_be_used_is_refused_without_its_secret(name: str) -> None:
    """By what the libraries say of it; nothing is asked for."""
    url = URLS[name]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        with ImageClient(10**6, AddressPolicy("8.8.8.8")) as client, pytest.raises(AdcError) as raised:
            client.download(url, sink, lambda: False)
    finally:
        os.close(sink)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("filler", ["/", "a?", "x/?(", "a-", "a://", "a://b:", "a=", "secret", "'"])
@pytest.mark.timeout(20)
def test_a_long_text_takes_no_time_worth_mentioning(filler: str) -> None:
    """A page of somebody else's may be in an error: a pattern that goes back and forth in it would stop the worker."""
    redact(filler * 100_000)


def test_the_host_of_a_url_is_named_without_what_stands_before_it() -> None:
    """As where an image host is said to be at fault."""
    assert urlsplit(public_url("http://user:it's@h:80/a?b")).netloc == "h:80"
