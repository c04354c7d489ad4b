"""API keys: which are accepted, and that none is logged."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from guarded_site import AUTH, KEY, Site
from loopback import error_of, exchanged, get, post

from vismem.serving.guards import read_keys


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Authorization:"],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        ["Authorization: Bearer wrong"],
        [f"Authorization: {KEY}"],
        [f"Authorization: Basic {KEY}"],
        [f"Authorization: Bearer {KEY}x"],
        [f"Authorization: Bearer {KEY[:-1]}"],
        [f"Authorization: Bearer {KEY} {KEY}"],
        [f"Authorization: Bearer {KEY.upper()}"],
        [AUTH, AUTH],
        ["Authorization: Bearer \xff\xfe"],
        [f"X-Api-Key: {KEY}"],
        [f"Cookie: key={KEY}"],
    ],
)
def test_requests_without_a_valid_key_are_refused(site: Site, port: int, headers: list[str]) -> None:
    seen = len(site.bodies)
    for request in (get("/v1/models", *headers), post("/v1/echo", b"{}", *headers), get("/nowhere", *headers)):
        status, answered, body = exchanged(port, request)
        found = error_of(body)
        assert (status, found["code"], found["type"]) == (401, "invalid_api_key", "authentication_error")
        assert answered["www-authenticate"] == "bearer" and KEY.encode() not in body
    assert len(site.bodies) == seen


def test_every_key_is_accepted_and_health_needs_none(port: int) -> None:
    for key in (KEY, "sk-the-other-key"):
        assert exchanged(port, get("/v1/models", f"authorization: bearer  {key}"))[0] == 200
    assert exchanged(port, get("/health"))[0] == 200
    for path in (
        "/health/",
        "//health",
        "/health/../v1/models",
        "/health%2f..%2fv1/models",
        "/HEALTH",
        "/v1/models?/health",
    ):
        assert exchanged(port, get(path))[0] == 401, path


def test_keys_come_from_options_file_and_environment(tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the lab\n\n sk-three \nsk-four\nsk-one\n")
    found = read_keys(["sk-one"], file, {"VISMEM_API_KEY": "sk-two, sk-one"})
    assert found == ["sk-one", "sk-two", "sk-three", "sk-four"]
    assert read_keys() == [] and read_keys((), None, {"OTHER": "x"}) == []


@pytest.mark.parametrize("key", ["", " ", "two words", "schl\u00fcssel", "a\tb", "a\x7fb", "secret,\n"])
def test_invalid_keys_are_refused_without_revealing_them(tmp_path, key: str) -> None:
    if "," in key:
        with pytest.raises(ValueError, match="VISMEM_API_KEY") as caught:
            read_keys((), None, {"VISMEM_API_KEY": key})
    else:
        with pytest.raises(ValueError, match="command line") as caught:
            read_keys([key])
    assert not key.strip() or key.strip() not in str(caught.value)
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(ValueError, match="no API key in"):
        read_keys((), tmp_path / "empty")
    with pytest.raises(ValueError, match="cannot read API keys"):
        read_keys((), tmp_path / "none")


def test_keys_are_never_logged(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        exchanged(port, get("/v1/models", AUTH))
        exchanged(port, get("/v1/models", f"Authorization: Bearer {KEY}x"))
        exchanged(port, b"GET / HTTP/1.1\r\n" + AUTH.encode() + b"\r\n\r\n")
    assert KEY not in caplog.text
