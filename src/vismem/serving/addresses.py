"""Which web addresses the server may fetch from: their spelling, the allowed hosts, and public IP addresses only.

A name is resolved once, all its addresses must be public, and the connection goes to one of them: a second lookup could
give others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import httpx

from vismem.serving.errors import ApiError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
MOST_CHARACTERS = 4096  # of a web address
PORTS = {"http": 80, "https": 443}
ALLOWED = re.compile(r"(?:(https?)://)?(\[[0-9a-f:.]+\]|(?:\*\.)?[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")

# Networks that `is_global` lets through in some version of Python from 3.10 on, or for good.
NOT_PUBLIC = [
    ipaddress.ip_network(each)
    for each in (
        "168.63.129.16/32",  # public by number, but a service of Azure to its own machines
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # Teredo and other protocols
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
]
GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # the rest may hold another address: mapped IPv4, NAT64


def is_public(address: Address) -> bool:
    """Whether an IP address is on the public internet and does not hold another address."""
    if any(address in network for network in NOT_PUBLIC if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and (address.version == 4 or address in GLOBAL_V6)


async def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of a name, from the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


@dataclass(frozen=True)
class Place:
    """A checked web address: `url`, and the IP address to connect to."""

    url: httpx.URL
    address: Address

    @property
    def pinned(self) -> httpx.URL:
        """The url with the IP address in place of the name."""
        return self.url.copy_with(host=str(self.address))


class Host(NamedTuple):
    """A host that images may be fetched from; `*.` at the start of its name stands for all subdomains."""

    scheme: str
    name: str
    port: int

    def takes(self, scheme: str, name: str, port: int) -> bool:
        """Whether an address with these parts is on this host."""
        named = name.endswith(self.name[1:]) if self.name.startswith("*.") else name == self.name
        return named and (scheme, port) == (self.scheme, self.port)


def read_hosts(texts: Sequence[str]) -> tuple[Host, ...]:
    """Parses the hosts of an option.

    Args:
        texts: `"pictures.example.org"` (https only), `"*.example.org"` for its subdomains, `"example.org:8443"` for
            another port, `"http://example.org"` for plain http.

    Raises:
        ValueError: if one has another form.
    """
    hosts = []
    for text in texts:
        found = ALLOWED.fullmatch(text.lower())
        if found is None or int(found[3] or 1) not in range(1, 65536):
            raise ValueError(f"{text!r} is no host to fetch images from; write it as in pictures.example.org:443")
        scheme = found[1] or "https"
        hosts.append(Host(scheme, found[2].strip("[]"), int(found[3] or PORTS[scheme])))
    return tuple(hosts)


def read_url(text: str, hosts: Sequence[Host]) -> httpx.URL:
    """Parses a client's web address and checks that its host is allowed.

    Args:
        text: as the client sent it.
        hosts: from `read_hosts`.

    Raises:
        ApiError: 400 for an address that is malformed, 403 for one that is not allowed.
    """
    if len(text) > MOST_CHARACTERS:
        raise _wrong(f"it has more than {MOST_CHARACTERS} characters")
    if not text.isascii() or not text.isprintable() or any(mark in text for mark in ' \\"<>^`{|}'):
        raise _wrong("it has characters that must be percent-encoded")
    try:
        url = httpx.URL(text)
        host, port = url.host.lower(), PORTS.get(url.scheme, 0) if url.port is None else url.port
    except (httpx.InvalidURL, ValueError, UnicodeError):
        raise _wrong("it cannot be read") from None
    if url.scheme not in PORTS:
        raise _wrong("only data:image/...;base64, http and https are taken")
    if not host:
        raise _wrong("it has no host")
    if url.userinfo or "@" in re.split("[/?#]", text.partition("://")[2])[0]:
        raise _wrong("it has a user in it")
    if not _is_literal(host) and (len(host) > 253 or not NAME.fullmatch(host) or _ends_in_number(host)):
        raise _wrong("its host is neither a name nor a plain IP address")
    if any(each.takes(url.scheme, host, port) for each in hosts):
        return url.copy_with(fragment=None)
    raise ApiError(
        403, "this server does not fetch images from there; send a data URI", code="image_url_refused", param="messages"
    )


async def place_of(url: httpx.URL, find: Resolve, permitted: Callable[[Address], bool]) -> Place:
    """Resolves a web address.

    Args:
        url: from `read_url`.
        find: resolves a name.
        permitted: whether an IP address may be connected to.

    Raises:
        ApiError: 400 if the name has no address, 403 if any of its addresses is not permitted.
    """
    try:
        found = [url.host] if _is_literal(url.host) else await find(url.host, url.port or PORTS[url.scheme])
        addresses = [ipaddress.ip_address(each.partition("%")[0]) for each in found]
    except (OSError, ValueError, UnicodeError):
        addresses = []
    if not addresses:
        raise ApiError(400, "an image's host has no address", code="image_unavailable", param="messages")
    if not all(permitted(each) for each in addresses):
        raise ApiError(
            403, "an image's host leads to an address that is not public", code="image_url_refused", param="messages"
        )
    return Place(url, addresses[0])


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def _ends_in_number(host: str) -> bool:
    """Whether a resolver may read it as an IPv4 address in another spelling: 2130706433, 0x7f.1, 127.1."""
    last = host.rpartition(".")[2]
    return last.isdecimal() or re.fullmatch(r"0x[0-9a-f]*", last) is not None


def _wrong(why: str) -> ApiError:
    return ApiError(400, f"an image's address is not taken: {why}", code="invalid_image_url", param="messages")
