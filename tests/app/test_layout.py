"""The viewer's layout: low and narrow screens, keyboard, light and dark."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise

import pytest
import viewer
from contrast import contrast
from PIL import Image, ImageColor
from viewer import CHIP, NARROW, PANEL, WIDE, ask, expect, written

from vismem.app import rendering

pytestmark = viewer.MARKS
chat, address, browser, visit = viewer.chat, viewer.address, viewer.browser, viewer.visit  # the fixtures
SIDEWAYS, SMALL = {"width": 844, "height": 390}, {"width": 1024, "height": 600}
ADVANCED, RANDOM = "#ui-settings .ui-more", "#ui-invocation [value=random]"


def answered(page):
    page.locator("[data-example='1']").click()
    written(page)


@pytest.fixture(scope="module")
def crowded(browser, address, request):
    """A page of the requested size with an answer, its panel and all settings open; tests of one size share it."""
    with viewer.visits(browser, address) as opened:
        page = opened(request.param)
        answered(page)
        page.locator(CHIP).first.click()
        expect(page.locator(PANEL)).to_be_visible()
        page.locator(RANDOM).check()
        page.locator(ADVANCED).click()
        expect(page.get_by_label("Seed")).to_be_visible()
        yield page


def sized(*sizes):
    """Runs a test with `crowded` pages of these sizes; pytest reuses an open page by its index."""
    named = ["{width}x{height}".format(**size) for size in sizes]
    return pytest.mark.parametrize("crowded", sizes, ids=named, indirect=True, scope="module")


def covered(page, part):
    """The points of a part - its ends and its middle - that are covered or off the screen."""
    return page.locator(part).first.evaluate(
        """each => {
          const box = each.getBoundingClientRect();
          return [[.5, .04], [.02, .5], [.5, .5], [.98, .5], [.5, .96]].filter(([right, down]) => {
            const top = document.elementFromPoint(box.left + right * box.width, box.top + down * box.height);
            return !top || !each.contains(top);
          });
        }"""
    )


@sized(SIDEWAYS, SMALL, NARROW, WIDE)
def test_question_and_answer_can_be_seen_with_everything_open(crowded):
    page = crowded
    parts = ("#ui-live .vm-answer", "#ui-composer textarea", "#ui-invocation label:has(:checked)", ADVANCED)
    for part in (*parts, "[aria-label=Seed]", '#ui-random input[type="range"]', "#ui-live .vm-answer"):
        page.locator(part).first.evaluate("each => each.scrollIntoView({ block: 'nearest', inline: 'nearest' })")
        assert covered(page, part) == [], part
    page.evaluate("scrollTo(0, 0)")
    room = page.evaluate(
        """Math.min(innerHeight, document.querySelector('#ui-dock').getBoundingClientRect().top)
          - document.querySelector('#ui-bar').getBoundingClientRect().bottom"""
    )
    assert room > 220  # pixels of the conversation
    rows = [page.locator(row).bounding_box() for row in ("#ui-composer", "#ui-switches", "#ui-settings")]
    for above, below in pairwise(rows):
        assert above["y"] + above["height"] <= below["y"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@sized(SIDEWAYS, SMALL)
def test_focus_is_not_hidden_behind_the_settings(crowded):
    page = crowded
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    for number in range(page.locator("#ui-live button").count()):
        page.locator("#ui-live button").nth(number).evaluate("each => each.focus()")
        assert page.evaluate(
            """() => {
              const box = document.activeElement.getBoundingClientRect();
              const [middle, down] = [box.left + box.width / 2, box.top + box.height / 2];
              return document.activeElement.contains(document.elementFromPoint(middle, down));
            }"""
        )


@sized(SIDEWAYS, SMALL, NARROW, WIDE)
def test_settings_stay_within_their_card(crowded):
    page = crowded
    page.get_by_label("number input for Max tokens").fill("4096")
    over = page.locator(":is(#ui-random, #ui-advanced) .block:has(input)").evaluate_all(
        """all => all.flatMap((card) => {
          const right = card.getBoundingClientRect().right - parseFloat(getComputedStyle(card).paddingRight);
          const parts = [...card.querySelectorAll('input, button, span')];
          return parts.filter((each) => each.getBoundingClientRect().right > right + 1).map((each) => each.outerHTML);
        })"""
    )
    assert over == []


@pytest.mark.parametrize("size", [SIDEWAYS, SMALL], ids=["sideways", "small"])
def test_settings_come_into_sight_as_they_are_opened(visit, size):
    page = visit(size)
    answered(page)
    page.locator(RANDOM).check()
    page.locator(ADVANCED).click()
    assert covered(page, "[aria-label=Seed]") == []
    page.locator("#ui-invocation [value=schedule]").check()
    assert covered(page, "#ui-plan :is(input, textarea)") == []


def test_an_answer_is_followed_on_a_low_screen(visit):
    page = visit(SIDEWAYS)
    answered(page)
    page.evaluate("scrollTo(0, 0)")
    page.locator(".ui-pill").first.evaluate("each => each.click()")
    written(page, 2)
    expect(page.locator("#ui-live .ui-facts")).to_be_in_viewport(ratio=1)


def test_a_panel_opens_at_its_top_and_stays_where_it_is(visit, monkeypatch):
    drawn, draw = [], rendering.inspector

    def numbered(*given):
        drawn.append(given)
        return draw(*given).replace("</aside>", f'<i hidden data-drawn="{len(drawn)}"></i></aside>')

    def scroll(pixels):
        """Scrolls the panel."""
        page.locator("#ui-right").evaluate("(each, pixels) => each.scrollTo(0, pixels)", pixels)
        assert place() == pixels

    def place():
        return page.locator("#ui-right").evaluate("each => each.scrollTop")

    def at_top():
        page.wait_for_function("document.querySelector('#ui-right').scrollTop === 0")
        assert covered(page, "#ui-close") == []

    monkeypatch.setattr(rendering, "inspector", numbered)
    page = visit()
    answered(page)
    page.locator(CHIP).first.click()
    expect(page.locator("#ui-right [data-drawn='2']")).to_have_count(1)
    scroll(900)
    page.locator(CHIP).last.click()  # the other one
    expect(page.locator(f"{PANEL}.vm-long")).to_be_visible()
    at_top()
    scroll(900)
    page.keyboard.press("Escape")
    expect(page.locator(PANEL)).to_have_count(0)
    page.locator(CHIP).last.click()  # the same one again
    expect(page.locator("#ui-right [data-drawn='6']")).to_have_count(1)
    at_top()
    scroll(300)
    page.locator("#ui-composer textarea").focus()
    page.locator(".ui-steps button").last.evaluate(
        """each => {
          each.disabled = false;
          each.dataset.index = '1';
          each.click();
        }"""
    )
    expect(page.locator("#ui-right [data-drawn='8']")).to_have_count(1)  # the same one, drawn again
    assert place() == 300
    expect(page.locator("#ui-composer textarea")).to_be_focused()


def test_choices_are_groups_for_the_keyboard(visit):
    page = visit()
    page.locator("[data-example='1']").wait_for()
    who = page.get_by_role("radiogroup", name="Who invokes memory")
    page.locator("#ui-compare input").focus()
    page.keyboard.press("Tab")
    expect(who.locator("[value=learned]")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator(ADVANCED)).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    expect(who.locator("[value=off]")).to_be_checked()
    ask(page, "Read the prices of row 2.")
    written(page)
    expect(page.locator("#ui-live .ui-facts")).to_contain_text("no memory")

    who.locator("[value=off]").focus()
    for chosen in ("short", "long", "schedule", "random"):
        page.keyboard.press("ArrowRight")
        expect(who.locator(f"[value={chosen}]")).to_be_focused()
        expect(who.locator(":checked")).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.get_by_label("number input for Probability at each place")).to_be_focused()
    places = page.get_by_role("radiogroup", name="Places")
    for _ in range(3):  # its button, its slider
        page.keyboard.press("Tab")
    expect(places.locator("[value=delimiter]")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(places.locator("[value=anywhere]")).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.locator(ADVANCED)).to_be_focused()
    ask(page, "Read the prices of row 2.")
    written(page, 2)
    expect(page.locator("#ui-live .ui-facts")).to_contain_text("at random, 0.2 before any token")

    page.locator(RANDOM).focus()
    for _ in range(3):  # as fast as they come
        page.keyboard.press("ArrowLeft")
    expect(who.locator("[value=short]")).to_be_focused()
    expect(who.locator(":checked")).to_have_count(1)
    ask(page, "Read the prices of row 2.")
    written(page, 3)
    expect(page.locator("#ui-live .ui-facts")).to_contain_text("short only")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_sliders_stand_out_from_their_card_where_they_are_filled(visit, scheme):
    page = visit(color_scheme=scheme)
    page.locator(RANDOM).check()
    slider = page.locator('#ui-random input[type="range"]')
    slider.fill("0.5")
    page.mouse.move(0, 0)
    shown = Image.open(BytesIO(slider.screenshot(animations="disabled"))).convert("RGB")
    thumb, filled, rest = (shown.getpixel((round(at * shown.width), shown.height // 2)) for at in (0.5, 0.2, 0.8))
    card = page.locator("#ui-random .form").evaluate("each => getComputedStyle(each).backgroundColor")
    card = ImageColor.getrgb(card)
    assert contrast(thumb, card) >= 3 and contrast(filled, card) >= 3
    assert 1.2 < contrast(rest, card) < 3
