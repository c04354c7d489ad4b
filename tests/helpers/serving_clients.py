"""A served pocket model, its clients, and answers written without the server."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import tiny
from PIL import Image

from vismem.decoding.policies import read_policy
from vismem.serving.lifespan import Server, address_of, config_of, listening_socket, serve

SHELF = Image.open(Path(__file__).parents[2] / "examples" / "shelf.png").convert("RGB")


QUESTION = "What does row 1 cost with its promotion?"


BOUND = 60  # seconds after which a test gives up


@contextmanager
def running(app, grace: float = 5) -> Iterator[str]:
    """The application on a loopback port; its address."""
    bound = listening_socket("127.0.0.1", 0)
    server = Server(config_of(app, grace))
    thread = threading.Thread(target=serve, args=(server, bound))
    thread.start()
    try:
        yield address_of(bound)
    finally:
        server.should_exit = True
        thread.join(BOUND)
        assert not thread.is_alive()


def client_of(address: str, **more) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=BOUND, **more)


def uri(picture: Image.Image) -> str:
    held = io.BytesIO()
    picture.save(held, format="png")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def user(text: str, *pictures: Image.Image) -> dict:
    shown = [{"type": "image_url", "image_url": {"url": uri(picture)}} for picture in pictures]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def ask(client: openai.OpenAI, *turns: dict, **settings):
    return client.chat.completions.create(
        model=settings.pop("model", "pocket"), messages=list(turns) or [user(QUESTION, SHELF)], **settings
    )


def own(model, *turns: dict, pictures=(SHELF,), invocation="learned", seed=0, **settings) -> tuple[str, list]:
    """What the model writes by itself, and its invocations."""
    content = [{"type": "image", "image": picture} for picture in pictures]
    messages = list(turns) or [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    inputs = tiny.prompts(model.processor, [messages])
    out = model.generate(
        **inputs,
        **{"max_new_tokens": 200, **settings},
        invocation=read_policy(invocation, seed),
        seed=[seed],
        return_dict_in_generate=True,
    )
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    return model.processor.decode(new, skip_special_tokens=True), out.invocations[0]


JSON = {"Content-Type": "application/json"}


def wait_for(condition) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
