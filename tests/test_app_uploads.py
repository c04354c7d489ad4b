"""Nobody makes the viewer read a file that was not dropped into it, over HTTP and without a browser."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading

import httpx
import pytest

pytest.importorskip("gradio", reason="the viewer's extra is not installed")

from vismem.app.examples import examples
from vismem.app.studio import Studio
from vismem.app.web import uploads, web
from vismem.loading import load_model
from vismem.serving.running import Server, address_of, config_of, listening_socket

BOUND = 60  # seconds after which a test gives up


@pytest.fixture(scope="module")
def client():
    """What speaks to a viewer on the pocket model."""
    with uploads():
        studio, bound = Studio(load_model(device="cpu"), batch_size=2), listening_socket("127.0.0.1", 0)
        server = Server(config_of(web(studio, "127.0.0.1"), grace=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        with httpx.Client(base_url=address_of(bound), timeout=BOUND) as made:
            yield made
        server.should_exit = True
        thread.join(BOUND)
        bound.close()
        studio.close()


def submitted(client, files, schedule="long@0", session="a"):
    """All that the page is told when a question with these files is put."""
    event = next(each for each in client.get("/config").json()["dependencies"] if each["targets"][0][1:] == ["submit"])
    question = {"text": "Read row 1.", "files": files}
    data = [question, False, "schedule", schedule, 0.2, "delimiter", 0, 0, 8]
    asked = {"data": data, "fn_index": event["id"], "session_hash": session}
    assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
    told = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
        for line in lines.iter_lines():
            if line.startswith("data:"):
                told.append(json.loads(line[5:]))
                if told[-1]["msg"] == "process_completed":
                    return told
    raise AssertionError(told)


def file(path, **more):
    return {"path": path, "mime_type": "image/png", "meta": {"_type": "gradio.FileData"}, **more}


def uploaded(client):
    content = io.BytesIO()
    examples()[0].open()[0].save(content, "png")
    return client.post("/gradio_api/upload", files={"files": ("shelf.png", content.getvalue())}).json()[0]


def test_what_was_dropped_in_is_asked_about(client):
    told = submitted(client, [file(uploaded(client))])
    assert told[-1]["success"] and "ui-pictures" in json.dumps(told)


def test_no_other_file_is_read(client, tmp_path):
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
        told = submitted(client, given)
        assert not told[-1]["success"] and "ui-pictures" not in json.dumps(told), given


def test_no_other_field_takes_a_file(client, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("what nobody is to read")
    told = submitted(client, [], schedule=file(str(secret)))
    assert told[-1]["output"]["error"].startswith("That file was not dropped into this page")
    assert not [name for _, _, names in os.walk(os.environ["GRADIO_TEMP_DIR"]) for name in names if "secret" in name]
