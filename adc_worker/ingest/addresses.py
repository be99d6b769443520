"""Where an image may come from: which addresses of its host this worker may connect to.

A URL is somebody else's text, and what it names may lie behind the operator's firewall. Where a proxy is used nothing
is looked up here: the proxy does that, under rules of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from urllib3.util import parse_url

from adc_worker.errors import AddressRefused, HostUnreachable, ImageUrlUnusable
from adc_worker.redaction import redact

# Unspecified, and where clouds give out secrets beside 169.254.169.254: AWS and Google over IPv6, Alibaba, Azure,
# Oracle (each vendor's page on instance metadata).
_NEVER = [
    ip_network(text)
    for text in ("0.0.0.0/8", "::", "fd00:ec2::/32", "fd20:ce::/32", "100.100.100.200", "168.63.129.16", "192.0.0.192")
]
_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052; the last four bytes are an IPv4 address
_TRIED = 4  # addresses of one host, each with a connect timeout of its own
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NAME_CHARACTERS_MAX = 253  # of a host's name (RFC 1035, 2.3.4)


def image_host(url: str) -> str:
    """Return which host an image's URL asks, in one spelling: `name:port`, the port left out where it is 443.

    Raises:
        ImageUrlUnusable: there is no host that could be asked.
    """
    try:
        parts = parse_url(url)
    except ValueError as error:  # urllib3's LocationParseError is one
        raise ImageUrlUnusable(f"not a usable image URL: {redact(str(error))}") from error
    if parts.scheme not in _DEFAULT_PORTS:
        raise ImageUrlUnusable("not a usable image URL: it does not start with http:// or https://")
    if not parts.host:
        raise ImageUrlUnusable("not a usable image URL: it names no host")
    name = parts.host.lower().rstrip(".")
    if not _is_host_name(name):
        raise ImageUrlUnusable("not a usable image URL: its host's name is none")
    port = _DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
    if port == 0:
        raise ImageUrlUnusable("not a usable image URL: port 0 is none")
    return name if port == _DEFAULT_PORTS["https"] else f"{name}:{port}"


def _is_host_name(name: str) -> bool:
    """Whether a name could be looked up: no empty or overlong part."""
    if len(name) > _NAME_CHARACTERS_MAX or any(character.isspace() for character in name):
        return False
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """Public addresses, and private ones that the operator lists or that Antenna itself is at.

    Attributes:
        antenna_host: the host of Antenna's URL; when it is private or loopback, images may be, too.
        networks: AMI_IMAGE_ALLOWED_NETWORKS.
        hosts: AMI_IMAGE_ALLOWED_HOSTS.
    """

    antenna_host: str
    networks: Collection[IPv4Network | IPv6Network] = ()
    hosts: Collection[str] = ()

    def resolve(self, host: str) -> list[str]:
        """Look a host up and return those of its addresses that may be connected to.

        Raises:
            AddressRefused: none of them may.
            HostUnreachable: the name is not known, or the resolver does not answer.
        """
        try:
            found = _look_up(host)
        except OSError as error:
            raise HostUnreachable(f"the image host {host} cannot be looked up: {error.strerror}") from error
        if allowed := [address for address in found if self._allows(host, _innermost(address))]:
            return list(map(str, allowed[:_TRIED]))
        raise AddressRefused(
            f"the image host {host} is {found[0]}, where this worker may not go: if images come from there, add it to"
            " AMI_IMAGE_ALLOWED_NETWORKS or AMI_IMAGE_ALLOWED_HOSTS (link-local, metadata, multicast: never)"
        )

    def _allows(self, host: str, address: IPv4Address | IPv6Address) -> bool:
        if address.is_link_local or address.is_multicast or any(address in network for network in _NEVER):
            return False
        return (
            not _is_private(address)
            or any(address in network for network in self.networks)
            or host.lower().rstrip(".") in {name.lower() for name in self.hosts}
            or self._antenna_is_private()
        )

    def _antenna_is_private(self) -> bool:
        try:
            return all(_is_private(_innermost(address)) for address in _look_up(self.antenna_host))
        except OSError:  # a proxy may know it: then it is not next door
            return False


def _look_up(host: str) -> list[IPv4Address | IPv6Address]:
    return [ip_address(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def _innermost(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_private(address: IPv4Address | IPv6Address) -> bool:
    # Reserved covers "::", site-local what IPv6 called private at first.
    return not address.is_global or address.is_reserved or getattr(address, "is_site_local", False)
