"""Web addresses that a server may fetch from: how they are spelt, which hosts, and to which IP addresses they may lead.

A name is resolved once, every address it has must be a public one, and the connection goes to one of these very
addresses. Asked again, a name server may say something else.
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

# Not left to `is_global`, whose answer has changed between versions of Python.
NOT_PUBLIC = [
    ipaddress.ip_network(each)
    for each in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by a provider's customers
        "127.0.0.0/8",
        "168.63.129.16/32",  # public by number, but a cloud's own service to its machines
        "169.254.0.0/16",  # link-local, and the metadata of clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "2001::/23",  # Teredo and other protocols
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",
    )
]
GLOBAL_V6 = ipaddress.ip_network(
    "2000::/3"
)  # outside: loopback, mapped IPv4, NAT64, unique local, link-local, multicast


def is_public(address: Address) -> bool:
    """Whether an IP address belongs to the public internet, and carries no other address in it."""
    if any(address in network for network in NOT_PUBLIC if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and (address.version == 4 or address in GLOBAL_V6)


async def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of a name, as the system knows them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


@dataclass(frozen=True)
class Place:
    """A web address that was looked at: `url`, and the IP address to connect to."""

    url: httpx.URL
    address: Address

    @property
    def pinned(self) -> httpx.URL:
        """The same with the IP address in place of the name."""
        return self.url.copy_with(host=str(self.address))


class Host(NamedTuple):
    """A host that images may be fetched from; of a name that begins with `*.`, all below it."""

    scheme: str
    name: str
    port: int

    def takes(self, scheme: str, name: str, port: int) -> bool:
        """Whether an address of these parts lies there."""
        named = name.endswith(self.name[1:]) if self.name.startswith("*.") else name == self.name
        return named and (scheme, port) == (self.scheme, self.port)


def read_hosts(texts: Sequence[str]) -> tuple[Host, ...]:
    """Hosts as they are written in an option.

    Args:
        texts: `"pictures.example.org"`, which is by https alone; `"*.example.org"` for all below one;
            `"example.org:8443"` for another port; `"http://example.org"` where it has to be without protection.

    Raises:
        ValueError: if one is written in another way.
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
    """A web address whose host is one of those allowed.

    Args:
        text: as the client wrote it.
        hosts: of `read_hosts`.

    Raises:
        ApiError: 400 where it is no address that is taken, 403 where it is not allowed.
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
    """Where to connect to for a web address.

    Args:
        url: of `read_url`.
        find: looks a name up.
        permitted: whether an address may be connected to.

    Raises:
        ApiError: 400 where the name has no address, 403 where any of its addresses is not permitted.
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
    """Whether resolvers may take it for an IPv4 address in another spelling: 2130706433, 0x7f.1, 127.1."""
    last = host.rpartition(".")[2]
    return last.isdecimal() or re.fullmatch(r"0x[0-9a-f]*", last) is not None


def _wrong(why: str) -> ApiError:
    return ApiError(400, f"an image's address is not taken: {why}", code="invalid_image_url", param="messages")
