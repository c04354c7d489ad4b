"""Images from the web: addresses that a server must never be talked into fetching, and fetching from the others."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("httpx")

from image_requests import KINDS, fetched, refused, uri

from vismem.serving import addresses as module
from vismem.serving.addresses import is_public, read_hosts, read_url
from vismem.serving.pictures import PictureLimits, Pictures

HOST = "pictures.example.org"


# Addresses.


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "64:ff9b:1::a00:1",
        "100::1",
        "2001::1",
        "2001:0:7f00:1::",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_private_and_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::5"])
def test_global_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url, status",
    [
        ("", 400),
        ("   ", 400),
        ("/etc/passwd", 400),
        ("examples/shelf.png", 400),
        ("file:///etc/passwd", 400),
        ("FILE:///etc/passwd", 400),
        ("ftp://good.example.org/a.png", 400),
        ("gopher://good.example.org/a.png", 400),
        ("javascript:alert(1)", 400),
        ("http:good.example.org", 400),
        ("//good.example.org/a.png", 400),
        ("http://", 400),
        ("http:///a.png", 400),
        ("http://good.example.org:0/", 403),
        ("http://good.example.org:99999/", 403),
        ("http://good.example.org:8080/", 403),
        ("https://good.example.org:80/", 403),
        ("http://user@good.example.org/", 400),
        ("http://user:pw@good.example.org/", 400),
        ("http://@good.example.org/", 400),
        ("http://good.example.org@evil.example.org/", 400),
        ("http://evil.example.org#@good.example.org/", 403),
        ("http://evil.example.org?@good.example.org/", 403),
        ("http://evil.example.org\\@good.example.org/", 400),
        ("http://good.example.org./", 400),
        ("http://good.example.org%00.evil.example.org/", 400),
        ("http://good%2eexample.org/", 400),
        ("http://good.example.org\n/", 400),
        ("http://good.example.org/a b.png", 400),
        ("\thttp://good.example.org/", 400),
        ("http://g\u00f6od.example.org/", 400),
        ("http://\uff47ood.example.org/", 400),
        ("http://good.example.org/" + "a" * 5000, 400),
        ("http://-good.example.org/", 400),
        ("http://good..example.org/", 400),
        ("http://evil.example.org/", 403),
        ("http://good.example.org.evil.example.org/", 403),
        ("http://evilgood.example.org/", 403),
        ("http://all.example.org/", 403),
        ("http://evilall.example.org/", 403),
        ("http://localhost/", 403),
        ("http://127.0.0.1/", 403),
        ("http://[::1]/", 403),
        ("http://[::1%25eth0]/", 400),
        ("http://[::ffff:127.0.0.1]/", 403),
        ("http://2130706433/", 400),
        ("http://0x7f000001/", 400),
        ("http://0x7f.1/", 400),
        ("http://0177.0.0.1/", 400),
        ("http://127.1/", 400),
        ("http://127.0.0.1./", 400),
        ("http://1.2.3.4.5/", 400),
        ("http://0/", 400),
    ],
)
def test_other_urls_are_refused(url: str, status: int) -> None:
    names = ("good.example.org", "*.all.example.org", "other.example.org:8443")
    hosts = tuple(scheme + name for scheme in ("http://", "https://") for name in names)
    with refused(status):
        read_url(url, read_hosts(hosts))
    with refused(status):
        fetched(url, PictureLimits(hosts=hosts))


def test_urls_of_allowed_hosts_are_accepted() -> None:
    hosts = read_hosts(
        ["Good.example.org", "*.all.example.org", "http://other.example.org:8080", "8.8.8.8", "[2606:4700::1]:8443"]
    )
    for url in (
        "https://good.example.org/a.png",
        "HTTPS://GOOD.example.org:443/a.png?x=%20y#z",
        "https://a.b.all.example.org/",
        "http://other.example.org:8080/",
        "https://8.8.8.8/",
        "https://[2606:4700::1]:8443/",
    ):
        assert read_url(url, hosts).fragment == ""
    for url in (
        "http://good.example.org/a.png",
        "http://other.example.org/",
        "https://other.example.org:8080/",
        "https://[2606:4700::1]/",
        "https://8.8.4.4/",
    ):
        with refused(403):
            read_url(url, hosts)
    with refused(403, "send a data URI"):
        read_url("https://good.example.org/a.png", ())


@pytest.mark.parametrize(
    "host", ["", "*", "*.", "a b", "ftp://a.org", "a.org/", "a.org:0", "a.org:x", "a.org:70000", "::1", "b@a.org"]
)
def test_a_malformed_host_is_an_error_at_the_start(host: str) -> None:
    with pytest.raises(ValueError, match="is not an image host"):
        PictureLimits(hosts=("a.example.org", host))


# Fetching from a server on loopback, which the tests allow explicitly.


class Web:
    """A web server, the answers it gives by path, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.slow: threading.Event = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                status, headers, body = web.answers[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)
                    if self.path == "/endless":
                        while not web.slow.is_set():
                            self.wfile.write(b"x" * 4096)
                    if self.path == "/slow":
                        while not web.slow.wait(0.02):
                            self.wfile.write(b"x")

            def log_message(self, *anything: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Web:
        self.thread.start()
        return self

    def __exit__(self, *anything: object) -> None:
        self.slow.set()
        self.server.shutdown()
        self.server.server_close()

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://{HOST}:{self.port}{path}"


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as found:
        yield found


def fetch(web: Web, *paths: str, find=None, found: tuple[str, ...] = ("127.0.0.1",), **settings: object) -> list[bytes]:
    """Fetches from the test's server, whose name leads to 127.0.0.1, which here counts as public."""
    looked_up: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        looked_up.append(host)
        return list(found)

    limits = PictureLimits(
        **{"size": 50_000, "hosts": (f"http://{HOST}:{web.port}", f"{HOST}:{web.port}"), "timeout": 10.0, **settings}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "resolve", find or resolve)
        patch.setattr(module, "is_public", lambda ip: str(ip) == "127.0.0.1")
        files = asyncio.run(Pictures(limits).fetch([path if ":" in path else web.url(path) for path in paths]))
    assert set(looked_up) <= {HOST}
    return files


def test_a_picture_is_fetched_from_an_allowed_host(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    file = KINDS["png"]()
    web.answers["/a.png?x=1"] = (200, {"Content-Type": "text/plain"}, file)
    assert fetch(web, "/a.png?x=1#part") == [file]
    ((path, headers),) = web.asked
    assert path == "/a.png?x=1" and headers["host"] == f"{HOST}:{web.port}"
    assert headers["accept-encoding"] == "identity" and not {"cookie", "authorization", "referer"} & headers.keys()


def test_a_name_is_looked_up_once_and_every_address_must_be_public(web: Web) -> None:
    web.answers["/a"] = (200, {}, b"file")
    for found in (("127.0.0.1", "10.0.0.1"), ("10.0.0.1",), ("::1",), ("fe80::1%lo",), ("169.254.169.254",)):
        with refused(403, "not public") as _:
            fetch(web, "/a", found=found)
    for found in ((), ("no address",)):
        with refused(400, "does not resolve"):
            fetch(web, "/a", found=found)
    assert web.asked == []
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])  # a name server that says something else when it is asked again

    async def find(host: str, port: int) -> list[str]:
        return next(answers)

    assert fetch(web, "/a", find=find) == [b"file"]


def test_private_addresses_are_refused_whatever_is_allowed(web: Web) -> None:
    web.answers["/a"] = (200, {}, b"file")
    hosts = ("localhost", "127.0.0.1", "[::1]", "10.0.0.1", "[::ffff:127.0.0.1]", "169.254.169.254")
    allowed = [f"{scheme}{host}{port}" for scheme in ("http://", "") for host in hosts for port in ("", f":{web.port}")]
    limits = PictureLimits(hosts=tuple(allowed), timeout=5.0)
    for each in allowed:
        with refused(403, "not public"):
            fetched(f"{each if '://' in each else 'https://' + each}/a", limits)
    assert web.asked == []


def test_redirects_are_checked_like_first_addresses(web: Web) -> None:
    web.answers["/file"] = (200, {}, b"file")
    web.answers["/near"] = (302, {"Location": "file"}, b"")
    web.answers["/far"] = (301, {"Location": web.url("/near")}, b"")
    assert fetch(web, "/far") == [b"file"]
    for to, status in (
        ("http://evil.example.org/", 403),
        (f"http://127.0.0.1:{web.port}/file", 403),
        (f"http://localhost:{web.port}/file", 403),
        ("http://169.254.169.254/latest/meta-data/", 403),
        ("file:///etc/passwd", 400),
        ("data:image/png;base64,AAAA", 400),
        (f"http://user@{HOST}:{web.port}/file", 400),
        (f"//evil.example.org:{web.port}/file", 403),
        ("http://[", 400),
        ("http://2130706433/", 400),
    ):
        web.answers["/bad"] = (302, {"Location": to}, b"")
        with refused(status):
            fetch(web, "/bad")
    web.answers["/loop"] = (307, {"Location": "/loop"}, b"")
    web.asked.clear()
    with refused(400, "3 redirects"):
        fetch(web, "/loop")
    assert len(web.asked) == 4


def test_a_redirect_whose_name_leads_inside_is_refused(web: Web) -> None:
    web.answers["/a"] = (302, {"Location": f"http://inner.example.org:{web.port}/b"}, b"")
    web.answers["/b"] = (200, {}, b"secret")

    async def find(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == HOST else ["127.0.0.2"]

    hosts = (f"http://{HOST}:{web.port}", f"http://inner.example.org:{web.port}")
    with refused(403, "not public"):
        fetch(web, "/a", find=find, hosts=hosts)
    assert [path for path, _ in web.asked] == ["/a"]


def test_what_is_too_large_slow_compressed_or_missing_is_refused(web: Web) -> None:
    web.answers["/told"] = (200, {"Content-Length": "50001"}, b"x")
    web.answers["/large"] = (200, {}, b"x" * 50_001)
    web.answers["/endless"] = (200, {}, b"")
    for path in ("/told", "/large", "/endless"):
        with refused(413, "50000 bytes"):
            fetch(web, path)
    web.answers["/slow"] = (200, {}, b"")
    with refused(400, "within 0.5 seconds"):
        fetch(web, "/slow", timeout=0.5)
    web.answers["/gzip"] = (200, {"Content-Encoding": "gzip"}, b"x")
    web.answers["/gone"] = (404, {}, b"secret")
    web.answers["/error"] = (500, {}, b"")
    web.answers["/cut"] = (200, {"Content-Length": "100"}, b"x")
    for path, word in (("/gzip", "compressed"), ("/gone", "404"), ("/error", "500"), ("/cut", "did not send")):
        with refused(400, word):
            fetch(web, path)


def test_a_host_that_does_not_answer_is_an_error() -> None:
    with Web() as web:
        pass
    with refused(400, "did not send"):
        fetch(web, "/a")


def test_a_name_server_that_does_not_answer_is_given_up(web: Web) -> None:
    async def find(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    with refused(400, "within 0.1 seconds"):
        fetch(web, "/a", find=find, timeout=0.1)


def test_a_secure_host_is_held_to_its_name(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography", reason="makes the certificate")
    certificate = self_signed(tmp_path, HOST)
    asked: list[str | None] = []
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate)
    serving.sni_callback = lambda _, name, __: asked.append(name)
    web.server.socket = serving.wrap_socket(web.server.socket, server_side=True)
    web.answers["/a"] = (200, {}, b"file")
    with refused(400, "did not send"):  # signed by nobody known
        fetch(web, web.url("/a", "https"))
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(module, "_tls", lambda: trusting)
    assert fetch(web, web.url("/a", "https")) == [b"file"]
    assert asked[-1] == HOST and web.asked[-1][1]["host"] == f"{HOST}:{web.port}"
    trusting = ssl.create_default_context(cafile=str(self_signed(tmp_path, "other.example.org")))
    trusting.load_verify_locations(cafile=str(certificate))
    serving.load_cert_chain(tmp_path / "other.example.org.pem")
    with refused(400, "did not send"):  # of another name
        fetch(web, web.url("/a", "https"))


def self_signed(folder: Path, name: str) -> Path:
    """A certificate for a name, with its key, in one file."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    place = folder / f"{name}.pem"
    place.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return place


def test_all_files_together_have_a_limit_too(web: Web) -> None:
    web.answers["/a"] = (200, {}, b"x" * 600)
    assert len(fetch(web, "/a", uri(b"y" * 400), size=600, total_size=1000)) == 2
    for second in ("/a", uri(b"y" * 401), "data:image/png;base64," + "%41" * 4000):
        with refused(413, "1000"):
            fetch(web, "/a", second, size=600, total_size=1000)
