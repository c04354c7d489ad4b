"""The page in the browser: gradio's components, laid out and wired to what `handlers.py` does when they are used.

The looks are `static/page.css`; the web application around the page is `web.py`'s.
"""

from __future__ import annotations

import gradio as gr

from vismem.app import rendering
from vismem.app.chat import Studio
from vismem.app.handlers import Handlers, Parts
from vismem.app.session import MOST_TOKENS
from vismem.app.uploads import Blocks

KEPT = 3600  # seconds that uploads are kept
CHOICES = [
    ("Model decides", "learned"),
    ("Off", "off"),
    ("◆ Short only", "short"),
    ("● Long only", "long"),
    ("Schedule", "schedule"),
    ("Random", "random"),
]


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    with Blocks(analytics_enabled=False, title="VisMem", fill_width=True, delete_cache=(KEPT, KEPT)) as page:
        parts = layout(studio)
        do, outputs = Handlers(studio, parts), parts.outputs
        asked = [parts.composer.submit(do.submit, [parts.composer, *parts.switches], outputs, **quiet)]
        parts.composer.stop(do.stop, None, None, **quiet)
        for talk in (parts.past, parts.live):
            asked.append(talk.example(do.pick, parts.switches, outputs, **quiet))
            asked.append(talk.follow(do.follow, parts.switches, outputs, **quiet))
        for each in asked:
            each.then(do.deepen, None, outputs, **quiet)
        for source in (parts.past, parts.live, parts.inspector):
            source.inspect(do.inspect, None, outputs, trigger_mode="multiple", **quiet)
        parts.inspector.closing(do.close, None, outputs, **quiet)
        parts.notice.dismiss(lambda: "", None, parts.notice, **quiet)
        parts.bar.renew(do.renew, None, outputs, **quiet)
        page.unload(do.leave)
    return page


def html(value: str, name: str, script: str) -> gr.HTML:
    """A part that `rendering.py` fills, with the script that tells what is clicked in it."""
    return gr.HTML(value, elem_id=name, js_on_load=rendering.static(script), apply_default_css=False)


def layout(studio: Studio) -> Parts:
    """All components, in their places.

    All of them are in the page from the start, and `page.css` hides what does not apply: what gradio adds later starts
    over a moment after it is seen, and what was typed into it till then would be lost.
    """
    bar = html(rendering.bar(studio, None), "ui-bar", "bar.js")
    with gr.Row(elem_id="ui-main"):
        with gr.Column(elem_id="ui-left"):
            past = html("", "ui-past", "talk.js")
            live = html(rendering.welcome(studio), "ui-live", "talk.js")
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
                            label="Schedule: kind@token, comma between",
                            max_lines=1,
                            elem_id="ui-plan",
                        )
                    with gr.Row(elem_id="ui-random"):
                        rate = gr.Slider(0, 1, 0.2, step=0.05, label="Chance at each place")
                        where = gr.Radio(
                            [("after each phrase", "delimiter"), ("before any token", "anywhere")],
                            value="delimiter",
                            label="Places",
                            elem_id="ui-places",
                        )
                    html(rendering.advanced(), "ui-more", "more.js")
                    with gr.Row(elem_id="ui-advanced"):
                        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: no sampling")
                        seed = gr.Number(0, precision=0, label="Seed", info="of sampling and of chance")
                        most = gr.Slider(1, MOST_TOKENS, 256, step=1, label="Most tokens", info="of an answer")
        inspector = html("", "ui-right", "inspector.js")
    return Parts(
        bar=bar,
        past=past,
        live=live,
        notice=notice,
        composer=composer,
        inspector=inspector,
        switches=[compare, invocation, schedule, rate, where, temperature, seed, most],
    )
