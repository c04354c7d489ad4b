"""Which web addresses the server may fetch from: their spelling, the allowed hosts, and public IP addresses only."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from fnmatch import fnmatchcase

import httpx
from typing_extensions import override

from vismem.serving.errors import ApiError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Host = tuple[str, str, int]  # scheme, name (with `*.` in front it stands for all subdomains) and port
MAX_LENGTH = 4096  # characters of a web address
PORTS = {"http": 80, "https": 443}
ALLOWED = re.compile(r"(?:(https?)://)?(\[[0-9a-f:.]+\]|(?:\*\.)?[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")

# Networks that `is_global` lets through in some version of Python from 3.10 on, or for good.
NOT_PUBLIC = [
    ipaddress.ip_network(each)
    for each in (
        "168.63.129.16/32",  # looks public, but serves Azure's own machines
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # Teredo and other protocols
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
]
GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # the rest may embed another address: mapped IPv4, NAT64


def is_public(address: Address) -> bool:
    """Whether an IP address is on the public internet and does not embed another address."""
    if any(address in network for network in NOT_PUBLIC if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and (address.version == 4 or address in GLOBAL_V6)


async def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of a name, from the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def read_hosts(texts: Sequence[str]) -> tuple[Host, ...]:
    """Parses the hosts of an option.

    Args:
        texts: `"pictures.example.org"` (https only), `"*.example.org"` for its subdomains, `"example.org:8443"` for
            another port, `"http://example.org"` for plain http.

    Raises:
        ValueError: if one is malformed.
    """
    hosts = []
    for text in texts:
        found = ALLOWED.fullmatch(text.lower())
        if found is None or int(found[3] or 1) not in range(1, 65536):
            raise ValueError(f"{text!r} is not an image host; write it like pictures.example.org:443")
        scheme = found[1] or "https"
        hosts.append((scheme, found[2].strip("[]"), int(found[3] or PORTS[scheme])))
    return tuple(hosts)


def read_url(text: str, hosts: Sequence[Host]) -> httpx.URL:
    """Parses a client's web address and checks that its host is allowed.

    Args:
        text: as the client sent it.
        hosts: from `read_hosts`.

    Raises:
        ApiError: 400 for an address that is malformed, 403 for one that is not allowed.
    """
    if len(text) > MAX_LENGTH:
        raise _wrong(f"it has more than {MAX_LENGTH} characters")
    if not text.isascii() or not text.isprintable() or any(mark in text for mark in ' \\"<>^`{|}'):
        raise _wrong("it has characters that must be percent-encoded")
    try:
        url = httpx.URL(text)
        host, port = url.host.lower(), PORTS.get(url.scheme, 0) if url.port is None else url.port
    except (httpx.InvalidURL, ValueError, UnicodeError):
        raise _wrong("it cannot be read") from None
    if url.scheme not in PORTS:
        raise _wrong("only data:image/...;base64, http and https are accepted")
    if not host:
        raise _wrong("it has no host")
    if url.userinfo or "@" in re.split("[/?#]", text.partition("://")[2])[0]:
        raise _wrong("it contains a user name")
    if not _is_literal(host) and (len(host) > 253 or not NAME.fullmatch(host) or _ends_in_number(host)):
        raise _wrong("its host is neither a name nor a plain IP address")
    if any((url.scheme, port) == (scheme, at) and fnmatchcase(host, name) for scheme, name, at in hosts):
        return url.copy_with(fragment=None)
    raise ApiError(
        403, "this server does not fetch images from there; send a data URI", code="image_url_refused", param="messages"
    )


class PublicTransport(httpx.AsyncHTTPTransport):
    """Connects only to allowed hosts at public addresses, on redirects too.

    A name is resolved once, all its addresses must be public, and the connection goes to one of them: a second lookup
    could differ. No proxies are used.

    Args:
        hosts: from `read_hosts`.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        super().__init__(verify=_tls(), trust_env=False)
        self.hosts = hosts

    @override
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request.

        Raises:
            ApiError: 400 for a malformed URL or a name that does not resolve, 403 for a host not allowed or not public.
        """
        url = read_url(str(request.url), self.hosts)
        try:
            found = [url.host] if _is_literal(url.host) else await resolve(url.host, url.port or PORTS[url.scheme])
            addresses = [ipaddress.ip_address(each.partition("%")[0]) for each in found]
        except (OSError, ValueError, UnicodeError):
            addresses = []
        if not addresses:
            raise ApiError(400, "an image's host name does not resolve", code="image_unavailable", param="messages")
        if not all(is_public(each) for each in addresses):
            message = "an image's host resolves to an address that is not public"
            raise ApiError(403, message, code="image_url_refused", param="messages")
        return await super().handle_async_request(
            httpx.Request(
                request.method,
                url.copy_with(host=str(addresses[0])),
                headers=request.headers,
                extensions={**request.extensions, "sni_hostname": url.host},
            )
        )


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


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
    return ApiError(400, f"an image's URL is not accepted: {why}", code="invalid_image_url", param="messages")
