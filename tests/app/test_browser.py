"""The viewer on the pocket model, used in a real browser as a visitor would."""

from __future__ import annotations

import base64
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import viewer
from loopback import error_of, exchanged, get
from PIL import Image
from viewer import BOUND, CHIP, NARROW, PANEL, ask, expect, served, written

from vismem.app.examples import examples
from vismem.app.web import web

pytestmark = viewer.MARKS
chat, address, browser, visit = viewer.chat, viewer.address, viewer.browser, viewer.visit  # the fixtures


def test_a_visitor_asks_an_example_and_opens_its_panels(visit, tmp_path):
    page = visit()
    expect(page.locator("h1")).to_contain_text("remember")
    page.locator("[data-example='1']").click()
    written(page)
    expect(page.locator(CHIP)).to_have_text([re.compile("short"), re.compile("long")])
    expect(page.locator(".vm-answer")).to_contain_text("So 27.")
    expect(page.locator(".vm-timeline .vm-mark")).to_have_count(2)

    page.locator(CHIP).first.click()
    expect(page.locator(f"{PANEL}.vm-short")).to_be_visible()
    heat = page.locator(f"{PANEL} img").first
    expect(heat).to_be_visible()
    assert heat.evaluate("each => each.complete && each.naturalWidth > 1")
    assert heat.bounding_box()["width"] > 100 and heat.bounding_box()["x"] > page.viewport_size["width"] / 3  # beside
    expect(page.locator(CHIP).first).to_have_attribute("aria-expanded", "true")
    page.locator(CHIP).last.click()
    expect(page.locator(f"{PANEL}.vm-long")).to_contain_text("The next word, with this memory and without")
    page.locator(CHIP).last.click()  # a second click closes it
    expect(page.locator(PANEL)).to_have_count(0)

    page.locator(".ui-pill").first.click()
    written(page, 2)
    ask(page, "What is at row 3, column 4?")
    written(page, 3)
    expect(page.locator(".vm-answer").last).to_contain_text("blue cross 7.")
    expect(page.locator("#ui-composer textarea")).to_have_value("")
    page.locator("#ui-past .vm-timeline .vm-mark").first.click()  # an earlier turn's, in its timeline
    expect(page.locator(f"{PANEL}.vm-short")).to_be_visible()

    with page.expect_download() as download:
        page.locator("#ui-export").click()
    download.value.save_as(tmp_path / "conversation.html")
    kept = (tmp_path / "conversation.html").read_text(encoding="utf-8")
    assert download.value.suggested_filename == "vismem-conversation.html"
    assert "What is at row 3, column 4?" in kept and kept.count('<section class="vm vm-panel') == 4

    page.locator("#ui-renew").click()
    expect(page.locator(".ui-card").first).to_be_visible()
    expect(page.locator(PANEL)).to_have_count(0)


def test_compare_shows_both_answers_and_policies_apply(visit):
    page = visit()
    page.locator("#ui-compare input").check()
    page.locator("[data-example='1']").click()
    written(page)
    expect(page.locator(".ui-pair .ui-side")).to_have_text(["Without memory", re.compile("With memory")])
    expect(page.locator(".ui-vanilla .vm-chip")).to_have_count(0)
    expect(page.locator(".ui-memory .vm-answer .vm-chip")).to_have_count(2)
    expect(page.locator(".ui-differ")).to_have_text("The answers differ.")
    left, right = (page.locator(f".ui-{side}").bounding_box() for side in ("vanilla", "memory"))
    assert abs(left["y"] - right["y"]) < 2 and left["x"] < right["x"]  # side by side

    page.locator("#ui-compare input").uncheck()
    page.get_by_label("Schedule", exact=True).check()
    page.locator("#ui-plan :is(input, textarea)").fill("long@0, short@1")
    ask(page, "Read the prices of row 2.")
    written(page, 2)
    expect(page.locator(f"#ui-live {CHIP}")).to_have_text([re.compile("long"), re.compile("short")])
    expect(page.locator("#ui-live .ui-facts")).to_contain_text("long@0, short@1")
    page.locator(f"#ui-live {CHIP}").first.click()
    expect(page.locator(PANEL)).to_contain_text("inserted by the policy")

    page.get_by_label("Off", exact=True).check()
    expect(page.locator("#ui-plan")).to_be_hidden()
    ask(page, "Read the prices of row 2.")
    written(page, 3)
    expect(page.locator("#ui-live .vm-chip")).to_have_count(0)


def test_good_uploads_are_asked_about_and_bad_ones_refused(visit, tmp_path):
    for number in (1, 2):
        examples()[0].open()[0].save(tmp_path / f"shelf {number}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "shelf 1.png").read_bytes()[:200])
    page = visit()
    page.locator("#ui-composer input[type=file]").set_input_files(tmp_path / "broken.png")
    expect(page.locator("#ui-composer .thumbnail-item")).to_have_count(1)
    ask(page, "What is this?")
    expect(page.locator(".ui-notice")).to_contain_text("Image broken.png cannot be used: the file is truncated")
    expect(page.locator(".ui-turn")).to_have_count(0)
    page.locator(".ui-notice button").click()
    expect(page.locator(".ui-notice")).to_have_count(0)
    page.locator("#ui-composer .thumbnail-item button, #ui-composer .delete-button").first.click()
    page.locator("#ui-composer input[type=file]").set_input_files([tmp_path / "shelf 1.png", tmp_path / "shelf 2.png"])
    expect(page.locator("#ui-composer .thumbnail-item")).to_have_count(2)
    assert len(list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("shelf*.png"))) == 2  # in the temporary folder
    ask(page, "Which shelf is dearer at row 1 column 1?")
    written(page)
    expect(page.locator(".ui-pictures img")).to_have_count(2)
    expect(page.locator("#ui-composer .thumbnail-item")).to_have_count(0)


def test_errors_are_one_line(visit, chat, monkeypatch):
    page = visit()
    ask(page, "   ")
    expect(page.locator(".ui-notice")).to_contain_text("The question is empty")
    page.get_by_label("Schedule", exact=True).check()
    ask(page, "Hello.")
    expect(page.locator(".ui-notice")).to_contain_text("short@0 needs an image, and there is none")
    expect(page.locator("#ui-composer textarea")).to_have_value("Hello.")  # it is not lost

    def failing(groups):
        raise RuntimeError("no luck")

    page.get_by_label("Model decides", exact=True).check()
    with monkeypatch.context() as patch:
        patch.setattr(chat.worker.queue, "admit", failing)
        ask(page, "Hello.")
        expect(page.locator(".ui-trouble")).to_contain_text("The model failed while writing this (no luck)")
    expect(page.locator(".ui-notice")).to_have_count(0)
    ask(page, "Hello.")
    written(page, 2)
    assert "Traceback" not in page.content()

    page.locator("#ui-renew").click()
    with monkeypatch.context() as patch:
        patch.setattr("vismem.app.chat.inspect_answer", lambda *given: 1 / 0)
        page.locator("[data-example='1']").click()
        written(page)
        page.locator(CHIP).first.click()
        expect(page.locator(".ui-inspector .ui-trouble")).to_have_text("Cannot inspect this answer: division by zero")


def test_invalid_settings_show_the_same_notice(visit, capfd):
    page = visit()
    for closed in ("#ui-advanced", "#ui-schedule", "#ui-random"):
        expect(page.locator(closed)).to_be_hidden()
    more = page.get_by_role("button", name="Advanced")
    more.click()
    more.click()
    expect(page.locator("#ui-advanced")).to_be_hidden()
    more.click()
    expect(more).to_have_attribute("aria-expanded", "true")
    seed = page.get_by_label("Seed")
    seed.fill("-3")
    seed.blur()
    ask(page, "Hello.")
    expect(page.locator(".ui-notice")).to_contain_text("The seed must be a whole number, 0 or more, not -3.")
    page.get_by_label("Random", exact=True).check()
    dots = page.locator("#ui-random input[type=radio]")
    expect(dots).to_have_count(2)
    widths = dots.evaluate_all("all => all.map((each) => parseFloat(getComputedStyle(each).borderWidth))")
    assert widths[0] > 3 > widths[1]  # the checked one stands out
    dots.last.check()
    assert dots.last.evaluate("each => parseFloat(getComputedStyle(each).borderWidth)") > 3
    assert "Traceback" not in capfd.readouterr().err


def test_a_setting_typed_at_once_is_kept(visit):
    page = visit()
    page.evaluate(
        """async () => {
          document.querySelector('.ui-more').click();
          let seed = null;
          while (!seed?.offsetParent) {
            await new Promise((soon) => setTimeout(soon, 0));
            seed = document.querySelector('[aria-label="Seed"]');
          }
          seed.value = '-7';
          seed.dispatchEvent(new Event('input', { bubbles: true }));
        }"""
    )
    ask(page, "Hello.")
    expect(page.locator(".ui-notice")).to_contain_text("not -7.")


def test_the_page_works_in_high_contrast_and_in_print(visit):
    page = visit(forced_colors="active")
    page.locator("[data-example='1']").click()
    written(page)
    for part in ("#ui-dock", ".ui-bar"):  # opaque over what scrolls below
        assert page.locator(part).evaluate("each => getComputedStyle(each).backgroundColor") == "rgb(255, 255, 255)"
    page.locator(CHIP).first.click()
    expect(page.locator(PANEL)).to_be_visible()
    page.emulate_media(media="print", forced_colors="none")
    assert page.locator("#ui-dock").is_hidden() and page.locator(".ui-tools").is_hidden()
    panel, frame = page.locator(PANEL).bounding_box(), page.locator("#ui-right").bounding_box()
    assert panel["height"] > page.viewport_size["height"] and frame["height"] > panel["height"]  # all of it


def test_tall_pictures_and_long_names_fit(visit, chat, tmp_path, monkeypatch):
    Image.new("RGB", (40, 400), "red").save(tmp_path / "tall.png")
    long = replace(chat.loaded, base="somebody/a-model-with-a-very-long-name-7b-instruct")
    monkeypatch.setattr(chat, "loaded", long)
    page = visit(NARROW)
    page.locator("#ui-composer input[type=file]").set_input_files(tmp_path / "tall.png")
    expect(page.locator("#ui-composer .thumbnail-item")).to_have_count(1)
    ask(page, "Read row 1.")
    written(page)
    name, tools = page.locator(".ui-name").bounding_box(), page.locator(".ui-tools").bounding_box()
    assert name["x"] + name["width"] <= tools["x"]
    assert page.locator(".ui-name").evaluate("each => getComputedStyle(each).textOverflow") == "ellipsis"
    page.locator(CHIP).first.click()
    large = page.locator(f"{PANEL} .vm-figure .vm-map").first
    assert large.bounding_box()["height"] < 500
    assert abs(large.bounding_box()["height"] / large.bounding_box()["width"] - 10) < 0.5


def test_the_page_works_by_keyboard_alone(visit):
    page = visit()
    page.keyboard.press("Tab")
    expect(page.locator(".ui-skip")).to_be_focused()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.example === '1'"):
            break
    page.keyboard.press("Enter")
    written(page)
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.vm-answer .vm-chip')"):
            break
    expect(page.locator(CHIP).first).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Space")
    expect(page.locator(f"{PANEL}.vm-short")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(PANEL)).to_have_count(0)
    expect(page.locator(CHIP).first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator(CHIP).last).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(f"{PANEL}.vm-long")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_narrow_screens(visit, scheme):
    page = visit(NARROW, color_scheme=scheme)

    def fits():
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    assert fits() and page.locator("h1").bounding_box()["y"] < 200  # what it is comes first
    page.locator("#ui-compare input").check()
    page.locator("[data-example='3']").click()
    written(page)
    above, below = (page.locator(f".ui-{side}").bounding_box() for side in ("vanilla", "memory"))
    assert fits() and above["y"] + above["height"] <= below["y"]
    page.locator(CHIP).first.click()
    expect(page.locator(f"{PANEL} img").first).to_be_in_viewport()
    assert fits() and page.locator(PANEL).bounding_box()["width"] <= NARROW["width"]


def test_the_theme_is_remembered(visit):
    page = visit(color_scheme="light")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#ui-theme").click()
    assert page.evaluate("document.body.classList.contains('dark')")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    page.reload()
    expect(page.locator(".ui-card").first).to_be_visible()
    page.wait_for_function("document.body.classList.contains('dark')")


def test_stop_ends_only_the_visitors_own_answer(visit, chat, held):
    one, two = visit(), visit()
    one.locator("[data-example='0']").click()
    two.locator("[data-example='1']").click()
    expect(one.locator(".ui-turn [aria-busy]")).to_have_count(1)
    expect(two.locator(".ui-turn [aria-busy]")).to_have_count(1)
    one.locator("#ui-composer .stop-button").click()
    held.set()
    written(one)
    written(two)
    expect(one.locator(".ui-facts")).to_contain_text("stopped")
    expect(two.locator(".vm-answer")).to_contain_text("So 27.")
    one.locator("#ui-renew").click()
    expect(one.locator(".ui-turn")).to_have_count(0)
    expect(two.locator(".ui-turn")).to_have_count(1)


def test_a_new_conversation_drops_the_running_answer(visit, chat):
    page = visit()
    page.locator("[data-example='1']").click()
    written(page)
    gate = threading.Event()
    chat.worker.call(gate.wait, BOUND)
    page.locator(".ui-pill").first.click()
    expect(page.locator(".ui-turn [aria-busy]")).to_have_count(1)
    (left,) = [conversation for conversation in chat.visitors.values() if conversation.busy]
    page.locator("#ui-renew").click()
    expect(page.locator(".ui-card").first).to_be_visible()
    gate.set()
    assert left.turns[1].main.over.wait(BOUND) and left.turns[1].main.finish == "cancelled"
    page.wait_for_timeout(300)  # updates of the old one are dropped
    expect(page.locator(".ui-turn")).to_have_count(0)
    page.locator("[data-example='0']").click()
    written(page)


def test_closing_the_page_stops_its_answer(visit, chat, held):
    page, other = visit(), visit()
    for each in (page, other):
        each.locator("[data-example='1']").click()
        expect(each.locator(".ui-turn [aria-busy]")).to_have_count(1)
    stays, leaves = [conversation for conversation in chat.visitors.values() if conversation.busy]
    other.close()
    for _ in range(BOUND * 10):
        if leaves not in chat.visitors.values():
            break
        page.wait_for_timeout(100)
    held.set()
    assert leaves.turns[0].main.over.wait(BOUND) and leaves.turns[0].main.finish == "cancelled"
    assert stays.turns[0].main.over.wait(BOUND) and stays.turns[0].main.finish == "stop"
    written(page)


def test_a_password_is_required_if_set(browser, address, chat):
    with served(web(chat, "127.0.0.1", "let mé in: now")) as place:
        context = browser.new_context(http_credentials={"username": "anybody", "password": "let mé in: now"})
        page = context.new_page()
        page.set_default_timeout(BOUND * 1000)
        page.goto(place)
        page.locator("[data-example='1']").click()
        written(page)
        expect(page.locator(".vm-answer")).to_contain_text("So 27.")
        context.close()
        almost = "Basic " + base64.b64encode("anybody:let mé in: no".encode()).decode()
        for wrong in (almost, "Basic", "Basic %%%", "Basic bGV0", "Bearer let mé in: now", "Basic OmxldA== x"):
            code, headers, body = exchanged(int(place.rpartition(":")[2]), get("/config", f"Authorization: {wrong}"))
            assert code == 401 and headers["www-authenticate"].startswith("basic realm=")
            assert "needs a password" in error_of(body)["message"]


def test_the_page_cannot_load_from_other_hosts(browser, address):
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    error = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'fetched', (error) => String(error))")
    assert error == "TypeError: Failed to fetch"
    refused = page.evaluate(
        """new Promise((done) => {
          document.addEventListener('securitypolicyviolation', (event) => done(event.blockedURI));
          const image = new Image();
          image.src = 'http://127.0.0.1:9/picture.png';
        })"""
    )
    assert refused.startswith("http://127.0.0.1:9/")
    context.close()
