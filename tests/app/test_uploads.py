"""What the viewer accepts over HTTP: uploaded files only, within size limits, and no malformed events."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading

import httpx
import pytest

pytest.importorskip("gradio", reason="the viewer's extra is not installed")

from loopback import error_of, exchanged, post

from vismem.app import guards
from vismem.app.chat import Chat
from vismem.app.examples import examples
from vismem.app.web import uploads, web
from vismem.loading import load_model
from vismem.serving.lifespan import Server, address_of, config_of, listening_socket

BOUND = 60  # seconds after which a test gives up


@pytest.fixture(scope="module")
def client():
    """An HTTP client of a viewer on the pocket model."""
    with uploads():
        chat, bound = Chat(load_model(device="cpu"), batch_size=2), listening_socket("127.0.0.1", 0)
        server = Server(config_of(web(chat, "127.0.0.1"), grace=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        with httpx.Client(base_url=address_of(bound), timeout=BOUND) as made:
            yield made
        server.should_exit = True
        thread.join(BOUND)
        bound.close()
        chat.close()


def ask(client, files, schedule="long@0", session="a"):
    """All messages to the page when it asks a question with these files."""
    event = next(each for each in client.get("/config").json()["dependencies"] if each["targets"][0][1:] == ["submit"])
    question = {"text": "Read row 1.", "files": files}
    data = [question, False, "schedule", schedule, 0.2, "delimiter", 0, 0, 8]
    asked = {"data": data, "fn_index": event["id"], "session_hash": session}
    assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
    return messages(client, session)


def messages(client, session):
    """All messages to a session until its event completes."""
    received = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
        for line in lines.iter_lines():
            if line.startswith("data:"):
                received.append(json.loads(line[5:]))
                if received[-1]["msg"] == "process_completed":
                    return received
    raise AssertionError(received)


def file(path, **more):
    return {"path": path, "mime_type": "image/png", "meta": {"_type": "gradio.FileData"}, **more}


def uploaded(client):
    content = io.BytesIO()
    examples()[0].open()[0].save(content, "png")
    return client.post("/gradio_api/upload", files={"files": ("shelf.png", content.getvalue())}).json()[0]


def test_uploaded_files_reach_the_model(client):
    received = ask(client, [file(uploaded(client))])
    assert received[-1]["success"] and "ui-pictures" in json.dumps(received)


def test_other_files_are_refused(client, tmp_path):
    secret = tmp_path / "secret.png"
    examples()[0].open()[0].save(secret)
    folder = os.environ["GRADIO_TEMP_DIR"]
    own = uploaded(client)
    for given in (
        [file(str(secret))],
        [file(str(secret), is_stream=True)],
        [file(str(secret), url=own)],
        [{"path": str(secret)}],
        [file(f"{folder}/../{tmp_path.name}/secret.png")],
        [file(f"{folder}{os.path.relpath(secret, '/')}")],
        [file("http://127.0.0.1:9/picture.png")],
        [file("file://" + str(secret))],
        [file(own), file(str(secret))],
        [file(["a"])],
        [file("a\0b")],
    ):
        received = ask(client, given)
        assert not received[-1]["success"] and "ui-pictures" not in json.dumps(received), given


def test_other_fields_accept_no_files(client, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    received = ask(client, [], schedule=file(str(secret)))
    assert received[-1]["output"]["error"].startswith("That file was not uploaded to this page")
    assert not [name for _, _, names in os.walk(os.environ["GRADIO_TEMP_DIR"]) for name in names if "secret" in name]


def test_only_paths_the_page_uses_are_served(client):
    for path in ("/", "/config", "/theme.css", "/gradio_api/info"):
        assert client.get(path).status_code == 200, path
    for path in (
        "/gradio_api/runs",
        "/gradio_api/run-history/buckets",
        "/gradio_api/proxy=http://127.0.0.1:9/",
        "/gradio_api/deep_link",
        "/gradio_api//runs",
        "/gradio_api/queue/../runs",
        "/gradio_api/call/submit",
        "/monitoring",
        "/login",
        "/openapi.json",
        "/docs",
    ):
        for method in ("GET", "POST"):
            answer = client.request(method, path)
            assert answer.status_code == 404 and error_of(answer.content)["message"], path
    assert os.environ["GRADIO_RUN_HISTORY"] == "False"


def test_request_sizes_are_limited(client, monkeypatch):
    port = client.base_url.port
    for body in (b'{"data": ["' + b"x" * 2**20 + b'"]}', b"[" + b"0," * 200_000 + b"0]"):
        assert client.post("/gradio_api/queue/join", content=body).status_code == 413
    code, _, body = exchanged(port, post("/gradio_api/upload", b"", length=guards.MAX_UPLOAD + 1))
    assert code == 413 and "256 MiB at most" in error_of(body)["message"]
    chunked = post("/gradio_api/upload", b"0\r\n\r\n", "Transfer-Encoding: chunked", length="")
    assert exchanged(port, chunked)[0] == 411
    monkeypatch.setattr(guards, "MAX_STORED_UPLOADS", guards.stored_bytes() + 100)
    answer = client.post("/gradio_api/upload", files={"files": ("shelf.png", b"x" * 1000)})
    assert answer.status_code == 503 and "upload storage is full" in error_of(answer.content)["message"]


def test_forged_events_are_refused_in_one_line(client, caplog, capfd):
    dependencies = client.get("/config").json()["dependencies"]
    for name, data, message in (
        ("example", {"example": 99}, "invalid request: reload it"),
        ("example", {"example": -1}, "invalid request: reload it"),
        ("example", {}, "invalid request: reload it"),
        ("follow", {}, "The question is empty"),
        ("inspect", {"turn": "x", "side": "memory", "index": 0}, "invalid request: reload it"),
        ("example", None, "invalid request: reload it"),
        ("example", "x", "invalid request: reload it"),
        ("follow", 7, "The question is empty"),
        ("inspect", None, "invalid request: reload it"),
        ("inspect", 7, "invalid request: reload it"),
        ("inspect", [], "invalid request: reload it"),
        ("inspect", {"turn": 10**30, "side": [], "index": None}, "invalid request: reload it"),
        ("inspect", {"turn": 5, "side": "memory", "index": 0}, "That invocation is gone"),
    ):
        event = next(each for each in dependencies if each["targets"][0][1] == name)
        values = [] if name == "inspect" else [False, "learned", "", 0.2, "delimiter", 0, 0, 8]
        asked = {"data": values, "event_data": data, "fn_index": event["id"], "session_hash": "forged"}
        assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
        assert message in json.dumps(messages(client, "forged")), (name, data)
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_invalid_event_inputs_log_one_line(client, caplog, capfd):
    event = next(each for each in client.get("/config").json()["dependencies"] if each["targets"][0][1:] == ["submit"])
    wanted = len(event["inputs"])
    forms = [[], [None] * wanted, *([value] * wanted for value in (5, "x", {}, [], True, {"a": 1}, 1e308, "\ud800"))]
    for at, data in enumerate(forms):
        asked = {"data": data, "fn_index": event["id"], "session_hash": f"odd {at}"}
        headers = {"Content-Type": "application/json"}  # httpx refuses to encode an unpaired surrogate
        assert client.post("/gradio_api/queue/join", content=json.dumps(asked), headers=headers).status_code == 200
        received = messages(client, f"odd {at}")[-1]
        assert not received["success"] and "\n" not in received["output"]["error"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(forms) and all(line.startswith("invalid event submit: ") for line in lines)
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_requests_that_gradio_fails_on_log_one_line(client, caplog, capfd):
    unknown = {"data": [], "session_hash": "none"}
    for body in ({**unknown, "fn_index": 10**9}, {**unknown, "fn_index": -1}):
        answer = client.post("/gradio_api/queue/join", json=body)
        assert answer.status_code == 500 and answer.headers["x-content-type-options"] == "nosniff"
    infinite = '{"data": [], "fn_index": 1e400, "session_hash": "none"}'
    client.post("/gradio_api/queue/join", content=infinite, headers={"Content-Type": "application/json"})
    client.get("/assets/" + "a" * 5000)
    client.get("/gradio_api/queue/data", params={"session_hash": "never seen"})
    assert len(caplog.records) == 5
    assert all(record.getMessage().startswith("the viewer failed at ") for record in caplog.records)
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_forwarding_headers_do_not_change_the_pages_address(client):
    forwarded = [
        {"X-Forwarded-Host": "evil.example"},
        {"x-forwarded-host": "evil.example, localhost"},
        {"X-Forwarded-Proto": "https"},
        {"X-Gradio-Server": "https://evil.example"},
    ]
    for headers in forwarded:
        assert "evil" not in client.get("/", headers=headers).text
        assert client.get("/config", headers=headers).json()["root"].startswith("http://127.0.0.1:")
