"""Where an image may come from: every way to write an address that must not be asked, and the settings that allow more.

Addresses are looked up by the real resolver, which needs no network for numbers; names are answered by the test.
"""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from adc_worker.errors import AddressRefused, ImageUrlUnusable, LinkError
from adc_worker.ingest.addresses import AddressPolicy, image_host

PUBLIC = AddressPolicy("8.8.8.8")
ANYTHING = AddressPolicy("127.0.0.1", [ip_network("0.0.0.0/0"), ip_network("::/0")], ["images.test"])


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names and their addresses; others are unknown."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **options: Any) -> list[Any]:
        if host not in known:
            return real(host, *arguments, **options | {"flags": socket.AI_NUMERICHOST})
        return [entry for address in known[host] for entry in real(address, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.170.2",
        "2852039166",
        "0xa9.0xfe.0xa9.0xfe",
        "0251.0376.0251.0376",
        "169.254.43518",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "fe80::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "100.100.100.200",
        "168.63.129.16",
        "0.0.0.0",  # noqa: S104 (to be refused)
        "0",
        "0.1.2.3",
        "::",
        "224.0.0.1",
        "ff02::1",
    ],
)
def test_some_addresses_are_never_asked(host: str) -> None:
    """Link-local, cloud metadata, unspecified and multicast, however written and whatever is allowed."""
    with pytest.raises(AddressRefused, match="where this worker may not go"):
        ANYTHING.resolve(host)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "198.18.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "fd12::1",
        "fec0::1",
        "::7f00:1",
    ],
)
def test_a_private_address_is_asked_only_where_antenna_is_private_or_it_is_listed(host: str) -> None:
    """The refusal names both variables."""
    with pytest.raises(AddressRefused, match="AMI_IMAGE_ALLOWED_NETWORKS or AMI_IMAGE_ALLOWED_HOSTS"):
        PUBLIC.resolve(host)
    for antenna in ("127.0.0.1", "10.0.0.5", "::1", "fd12::5"):
        assert AddressPolicy(antenna).resolve(host)
    assert ANYTHING.resolve(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_a_public_address_is_asked_as_it_is(host: str) -> None:
    """Also through NAT64, whose address is the one that leads anywhere."""
    assert PUBLIC.resolve(host) == [host]


def test_a_listed_network_allows_its_own_addresses_only() -> None:
    """The one next to it stays refused."""
    policy = AddressPolicy("8.8.8.8", [ip_network("10.1.0.0/16"), ip_network("fd12::/16")])
    assert policy.resolve("10.1.2.3") == ["10.1.2.3"]
    assert list(map(ip_address, policy.resolve("::ffff:10.1.2.3"))) == [ip_address("::ffff:10.1.2.3")]
    assert policy.resolve("fd12::3") == ["fd12::3"]
    with pytest.raises(AddressRefused):
        policy.resolve("10.2.0.1")


def test_a_listed_host_is_allowed_by_its_name(names: dict[str, list[str]]) -> None:
    """However it is written; a host that has it as its end is another one."""
    names |= {name: ["10.1.2.3"] for name in ("minio", "MinIO", "minio.", "evil-minio", "minio.evil.test")}
    policy = AddressPolicy("8.8.8.8", hosts=["minio"])
    for host in ("minio", "MinIO", "minio."):
        assert policy.resolve(host) == ["10.1.2.3"]
    for host in ("evil-minio", "minio.evil.test"):
        with pytest.raises(AddressRefused):
            policy.resolve(host)


def test_of_several_addresses_only_the_allowed_are_given(names: dict[str, list[str]]) -> None:
    """At most four, each of which may take a connect timeout."""
    names["images.test"] = ["127.0.0.1", "8.8.8.8", "169.254.169.254", "2606:4700::1111"]
    names["many.test"] = [f"8.8.8.{number}" for number in range(50)]
    assert PUBLIC.resolve("images.test") == ["8.8.8.8", "2606:4700::1111"]
    assert len(PUBLIC.resolve("many.test")) == 4


def test_antenna_is_private_only_with_all_its_addresses(names: dict[str, list[str]]) -> None:
    """One that cannot be looked up is behind a proxy, and not next door."""
    names |= {"antenna.test": ["10.0.0.5", "8.8.8.8"], "near.test": ["10.0.0.5", "127.0.0.1"]}
    for antenna in ("antenna.test", "unknown.test"):
        with pytest.raises(AddressRefused):
            AddressPolicy(antenna).resolve("10.1.2.3")
    assert AddressPolicy("near.test").resolve("10.1.2.3")


@pytest.mark.usefixtures("names")
def test_a_name_that_nobody_knows_is_the_links_fault() -> None:
    """The resolver may know it later."""
    with pytest.raises(LinkError, match="cannot be looked up") as caught:
        PUBLIC.resolve("unknown.test")
    assert not isinstance(caught.value, AddressRefused)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://images.test/a.jpg", "images.test"),
        ("https://images.test:443/a.jpg", "images.test"),
        ("HTTPS://user:secret@IMAGES.Test.:443/a.jpg?x=1#y", "images.test"),
        ("http://images.test/a.jpg", "images.test:80"),
        ("http://images.test:80/a.jpg", "images.test:80"),
        ("http://images.test:/a.jpg", "images.test:80"),
        ("https://images.test:8443", "images.test:8443"),
        ("http://[::1]:9000/a.jpg", "[::1]:9000"),
        ("https://K\u00e4fer.test/a.jpg", "xn--kfer-loa.test"),
        ("https://xn--kfer-loa.test/a.jpg", "xn--kfer-loa.test"),
    ],
)
def test_a_host_has_one_name_however_it_is_spelt(url: str, host: str) -> None:
    """What counts against it counts once."""
    assert image_host(url) == host


@pytest.mark.parametrize(
    "url",
    [
        "", " ", "a.jpg", "/a.jpg", "//images.test/a.jpg", "s3://bucket/key", "file:///a.jpg", "http:", "http://",
        "http:///a.jpg", "http:a.jpg", "http://[nowhere/a.jpg", "http://h:0/", "http://h:65536/", "http://h:port/",
        "http://a..b/", "http://.b/", f"http://{'a' * 64}.test/", f"http://{'a.' * 130}test/", "http://a b/",
        "http://a\nb/", "http://\0/", "http://@/",
    ],
)  # fmt: skip
def test_a_url_without_a_host_to_ask_is_said_to_be_none(url: str) -> None:
    """And nothing else is raised."""
    with pytest.raises(ImageUrlUnusable, match="not a usable image URL"):
        image_host(url)
