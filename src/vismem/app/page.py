"""The web page: lays out gradio's components and connects their events to `handlers.py`.

Its style is `static/page.css`; `web.py` is the application around it.
"""

from __future__ import annotations

import gradio as gr

from vismem.app import rendering
from vismem.app.chat import Chat
from vismem.app.guards import Blocks
from vismem.app.handlers import Components, Handlers
from vismem.app.session import MAX_TOKENS

UPLOAD_LIFETIME = 3600  # seconds
CHOICES = [
    ("Model decides", "learned"),
    ("Off", "off"),
    ("◆ Short only", "short"),
    ("● Long only", "long"),
    ("Schedule", "schedule"),
    ("Random", "random"),
]


def build(chat: Chat) -> gr.Blocks:
    """The page for a chat."""
    quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    with Blocks(
        analytics_enabled=False, title="VisMem", fill_width=True, delete_cache=(UPLOAD_LIFETIME, UPLOAD_LIFETIME)
    ) as page:
        parts = layout(chat)
        handlers, outputs = Handlers(chat, parts), parts.outputs
        questions = [parts.composer.submit(handlers.submit, [parts.composer, *parts.switches], outputs, **quiet)]
        parts.composer.stop(handlers.stop, None, None, **quiet)
        for turns in (parts.past, parts.live):
            questions.append(turns.example(handlers.pick, parts.switches, outputs, **quiet))
            questions.append(turns.follow(handlers.follow, parts.switches, outputs, **quiet))
        for each in questions:
            each.then(handlers.inspect_latest, None, outputs, **quiet)
        for source in (parts.past, parts.live, parts.inspector):
            source.inspect(handlers.inspect, None, outputs, trigger_mode="multiple", **quiet)
        parts.inspector.closing(handlers.close, None, outputs, **quiet)
        parts.notice.dismiss(lambda: "", None, parts.notice, **quiet)
        parts.bar.renew(handlers.renew, None, outputs, **quiet)
        page.unload(handlers.leave)
    return page


def html(value: str, name: str, script: str) -> gr.HTML:
    """A component that `rendering.py` fills, with the script that reports clicks in it."""
    return gr.HTML(value, elem_id=name, js_on_load=rendering.static(script), apply_default_css=False)


def layout(chat: Chat) -> Components:
    """Creates all components.

    All exist from the start, and `page.css` hides those that do not apply: gradio resets a component added later a
    moment after it appears, which would lose what was typed into it.
    """
    bar = html(rendering.bar(chat, None), "ui-bar", "bar.js")
    with gr.Row(elem_id="ui-main"):
        with gr.Column(elem_id="ui-left"):
            past = html("", "ui-past", "talk.js")
            live = html(rendering.welcome(chat), "ui-live", "talk.js")
            with gr.Column(elem_id="ui-dock"):
                notice = html("", "ui-note", "talk.js")
                composer = gr.MultimodalTextbox(
                    file_count="multiple",
                    file_types=["image"],
                    placeholder="Ask about your images…",
                    show_label=False,
                    label="Question and images",
                    container=False,
                    max_lines=8,
                    max_plain_text_length=200_000,
                    elem_id="ui-composer",
                )
                with gr.Row(elem_id="ui-switches"):
                    compare = gr.Checkbox(label="Compare", elem_id="ui-compare", container=False)
                    invocation = gr.Radio(
                        CHOICES,
                        value="learned",
                        label="Who invokes memory",
                        elem_id="ui-invocation",
                        container=False,
                    )
                with gr.Column(elem_id="ui-settings"):
                    with gr.Row(elem_id="ui-schedule"):
                        schedule = gr.Textbox(
                            "short@0,long@12",
                            label="Schedule: kind@token, separated by commas",
                            max_lines=1,
                            elem_id="ui-plan",
                        )
                    with gr.Row(elem_id="ui-random"):
                        rate = gr.Slider(0, 1, 0.2, step=0.05, label="Probability at each place")
                        where = gr.Radio(
                            [("after each phrase", "delimiter"), ("before any token", "anywhere")],
                            value="delimiter",
                            label="Places",
                            elem_id="ui-places",
                        )
                    html(rendering.advanced(), "ui-more", "more.js")
                    with gr.Row(elem_id="ui-advanced"):
                        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy")
                        seed = gr.Number(0, precision=0, label="Seed", info="of sampling and random invocations")
                        max_tokens = gr.Slider(1, MAX_TOKENS, 256, step=1, label="Max tokens", info="per answer")
        inspector = html("", "ui-right", "inspector.js")
    return Components(
        bar=bar,
        past=past,
        live=live,
        notice=notice,
        composer=composer,
        inspector=inspector,
        switches=[compare, invocation, schedule, rate, where, temperature, seed, max_tokens],
    )
