"""The dashboard's page in a real browser: headless Chromium, as a person would use it.

What holds for every test: nothing is asked of any other server than the page's own, nothing is
asked outside the folder, and the browser reports no error, which a breach of the
Content-Security-Policy would be.
"""

import contextlib
import dataclasses
import functools
import http.server
import math
import os
import pathlib
import re
import shutil
import threading
import time

import dashboard_folder
import hand_built
import numpy as np
import pytest

from sae_jax.evaluate.sources import ModelRows
from sae_jax.interpret import dashboard
from sae_jax.interpret.collect import collect
from sae_jax.interpret.explain import records
from sae_jax.interpret.explain.records import Explanation, Score
from sae_jax.sae import ReLU, ReLUConfig, resolve

playwright = pytest.importorskip("playwright.sync_api", reason="needs the [test-page] extra")
expect = playwright.expect
expect.set_options(timeout=60_000)  # where others compute, too, a first ablation takes seconds
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
UNDER = "some/path/dashboard"  # a static host has the folder under any path
LATENTS = 2_000
MANY = 100_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]


@dataclasses.dataclass
class Folder:
    address: str
    path: pathlib.Path | None = None
    columns: dict[str, np.ndarray] | None = None


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(root):
    """A server of files, as `python -m http.server` is one."""
    handler = functools.partial(_Quiet, directory=root)
    return serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))


@contextlib.contextmanager
def written(root, **options):
    """A folder that a static host has under some path."""
    path = root / UNDER
    path.parent.mkdir(parents=True)
    columns = dashboard_folder.write(path, **options)
    with files_of(root) as address:
        yield Folder(f"{address}{UNDER}/", path, columns)


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    with written(tmp_path_factory.mktemp("host"), d_sae=LATENTS) as folder:
        yield folder


# A model that says B after A, four to one against all other words, and an SAE with a latent for
# each word, by the word's number, and one more that fires on all words.
SITE, STRENGTH = "resid_post.0", 3.0
A, X, Y, B, Z, ANY = 1, 2, 3, 4, 5, 6
TEXTS = ("x A B y", "A B A B", "y z x z", "z A B x", "x x y z", "B z A B")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """(latents, model)"""
    directory = tmp_path_factory.mktemp("words")
    model = hand_built.make_model(directory / "model", 1, hand_built.bigram(STRENGTH))
    rows = np.zeros((hand_built.V + 1, hand_built.D), np.float32)
    for word in range(hand_built.V):
        rows[[word, ANY], hand_built.CURRENT + word] = 1
    parameters = {
        "w_enc": rows.T, "b_enc": np.zeros(len(rows), np.float32),
        "w_dec": rows / np.linalg.norm(rows, axis=1, keepdims=True),
        "b_dec": np.zeros(hand_built.D, np.float32),
    }  # fmt: skip
    sae = ReLU.from_parameters(resolve(ReLUConfig(d_sae=len(rows)), hand_built.D), parameters)
    tokens = np.stack([hand_built.ids(text) for text in TEXTS])
    source = ModelRows(model, SITE, tokens, what="texts", excluded_positions=(0,))
    found = collect(sae, source, directory / "collection", top=5, before=4, after=4)
    labels = dashboard.Labels({A: "the word A", ANY: "any word"}, {A: 0.8})
    yield (
        dashboard.Latents(found, sae, model.tokenizer, model, written_site=SITE, labels=labels),
        model,
    )


@pytest.fixture(scope="module")
def live(words):
    """The real server of a real model."""
    latents, model = words
    answers = dashboard.Live(latents, model, (SITE,))
    known = dashboard.about(latents, title="Words", shard=dashboard.SHARD, can=answers.can)
    server, _ = dashboard.open_server(latents, known, answers, 0)
    with serving(server) as address:
        yield Folder(address)


@pytest.fixture(scope="module")
def browser():
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def profile(browser):
    with browser.new_context() as context:
        yield context


@pytest.fixture
def opened(browser, profile):
    """Opens addresses, with options in windows of their own; afterwards looks at what was asked of
    servers and what the browser reported."""
    opened, asked, errors = [], [], []

    def open_page(folder, hash="", **options):
        page = browser.new_page(**options) if options else profile.new_page()
        page.set_default_timeout(60_000)
        opened.append(page)
        page.on("request", lambda request: asked.append((folder.address, request.url)))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: m.type in ("error", "warning") and errors.append(m.text))
        page.goto(folder.address + hash)
        return page

    open_page.errors = errors
    yield open_page
    for page in opened:
        page.close()
    outside = [url for own, url in asked if not url.startswith((own, "data:"))]
    assert asked and not outside
    assert not errors


def numbers(page) -> list[int]:
    """The latents of the rows that are seen, in the order of the list."""
    return page.evaluate(
        """[...document.querySelectorAll(".window .row:not([hidden])")]
          .sort((a, b) => a.ariaRowIndex - b.ariaRowIndex)
          .map((row) => Number(row.querySelector("a").textContent))"""
    )


def test_a_hundred_thousand_latents_are_usable_within_three_seconds(tmp_path, opened):
    with written(tmp_path, d_sae=MANY, shards=()) as folder:
        strongest = str(folder.columns["max"].argmax())
        seconds = []
        while not seconds or (min(seconds) > 3 and len(seconds) < 4):  # others compute here, too
            began = time.perf_counter()
            page = opened(folder, locale="en-GB")  # in a window of its own, with nothing cached
            page.wait_for_selector(".window .row")
            page.click(".head .max button")
            expect(page.locator(".window .row[aria-rowindex='2'] a")).to_have_text(strongest)
            seconds.append(time.perf_counter() - began)
        print(f"{MANY:,} latents are there and sorted by a click after {min(seconds):.2f} s")
        assert min(seconds) < 3


def between(column, low, high):
    return (column >= np.float32(low)) & (column <= np.float32(high))


def expected(columns, wanted, key=None, descending=True):
    chosen = np.flatnonzero(wanted)
    if key is not None:
        values = columns[key][chosen].astype(np.float64)
        values = np.where(np.isnan(values), np.inf, -values if descending else values)
        chosen = chosen[np.argsort(values, kind="stable")]
    return chosen


LISTS = {
    "#/": lambda c, i: expected(c, c["density"] > 0),
    "#/?dead=1": lambda c, i: i,
    "#/?sort=-density": lambda c, i: expected(c, c["density"] > 0, "density"),
    "#/?sort=mean": lambda c, i: expected(c, c["density"] > 0, "mean", descending=False),
    "#/?sort=-score": lambda c, i: expected(c, c["density"] > 0, "score"),
    "#/?density=0.1..1&max=10..&sort=-max": lambda c, i: expected(
        c, between(c["density"], 0.001, 0.01) & between(c["max"], 10, np.inf), "max"
    ),
    "#/?score=0.9..": lambda c, i: expected(c, between(c["score"], 0.9, 1) & (c["density"] > 0)),
    "#/?q=KIND 96, number 1&dead=1": lambda c, i: i[
        (i % 97 == 96) & (i % 2 == 0) & [str(n)[0] == "1" for n in i]
    ],
    "#/?q=zebra&in=examples": lambda c, i: np.array([3]),
    "#/?q=עולם&in=examples&dead=1": lambda c, i: np.arange(0, 256, 5),
}


def test_a_link_to_a_list_shows_that_list(static, opened):
    page = opened(static)
    for hash, choose in LISTS.items():
        page.goto(static.address + hash)
        wanted = choose(static.columns, np.arange(LATENTS))
        expect(page.locator("#shown")).to_have_text(f"{len(wanted):,} of {LATENTS:,} latents")
        first = page.locator(".window .row[aria-rowindex='2'] a")
        expect(first).to_have_text(str(wanted[0]))
        rows = numbers(page)
        assert rows == wanted[: len(rows)].tolist() and rows, hash


def test_controls_make_the_link_and_the_label_of_a_row_is_its_own(static, opened):
    page = opened(static)
    page.fill("#search", "number 4")
    page.wait_for_url(re.compile("q=number"))
    page.click(".more summary")
    page.fill("#max-low", "5")
    page.keyboard.press("Tab")
    page.wait_for_url(re.compile("max=5"))
    page.keyboard.press("Escape")
    expect(page.locator(".ranges")).to_be_hidden()
    first = page.locator(".window .row[aria-rowindex='2']")
    latent = numbers(page)[0]
    expect(first.locator(".label")).to_have_text(f"things of kind {latent % 97}, number {latent}")
    link = page.url
    again = opened(static, link.removeprefix(static.address))
    expect(again.locator("#shown")).to_have_text(page.locator("#shown").text_content())
    assert numbers(again) == numbers(page)
    assert again.input_value("#search") == "number 4"
    again.fill("#search", "no such label")
    expect(again.locator(".list .message")).to_contain_text("No label has “no such label”")
    again.click("text=Show all latents")
    expect(again.locator(".window .row").first).to_be_visible()


def test_a_shuffle_is_of_all_latents_and_its_link_repeats_it(static, opened):
    page = opened(static, "#/?sort=random&seed=5&dead=1")
    page.wait_for_selector(".window .row")
    first = numbers(page)
    assert len(set(first)) == len(first) and first != sorted(first)
    assert min(first) < LATENTS / 3 and max(first) > LATENTS * 2 / 3
    again = opened(static, "#/?sort=random&seed=5&dead=1")
    again.wait_for_selector(".window .row")
    assert numbers(again) == first
    page.click("#shuffle")
    page.wait_for_url(re.compile("seed=(?!5&)"))
    assert numbers(page) != first


def test_every_row_can_be_reached_where_the_scroll_bar_is_scaled(tmp_path, opened):
    latents = 250_000  # 10 million pixels: more than browsers lay out
    with written(tmp_path, d_sae=latents, shards=(), labelled=False) as own:
        page = opened(own, "#/?dead=1")
        page.wait_for_selector(".window .row")
        page.focus(".scroller")
        page.keyboard.press("End")
        expect(page.locator(":focus")).to_have_text(str(latents - 1))
        expect(page.locator(":focus")).to_be_in_viewport()
        for _ in range(30):
            page.keyboard.press("ArrowUp")
        expect(page.locator(":focus")).to_have_text(str(latents - 31))
        expect(page.locator(":focus")).to_be_in_viewport()
        page.evaluate("document.querySelector('.scroller').scrollTop = 4e6")
        page.wait_for_timeout(50)
        middle = numbers(page)
        assert middle == list(range(middle[0], middle[0] + len(middle)))
        assert abs(middle[0] - latents / 2) < 100


def test_hostile_text_is_text(static, opened):
    page = opened(static, "#/latent/3")
    label = page.locator(".heading .label")
    expect(label).to_have_text(dashboard_folder.HOSTILE)
    piece = page.locator(".piece.peak", has_text=dashboard_folder.HOSTILE)
    expect(piece).to_have_text(dashboard_folder.HOSTILE)
    piece.hover()
    expect(page.locator("#tip")).to_contain_text(dashboard_folder.HOSTILE)
    page.click("#to-list")
    expect(page.locator(".window .row[aria-rowindex='5'] .label")).to_have_text(
        dashboard_folder.HOSTILE
    )
    assert page.evaluate("[window.hurt, document.images.length]") == [None, 0]


def test_a_latent_has_all_its_parts(static, opened):
    page = opened(static, "#/latent/4")
    expect(page.locator("h1")).to_have_text("Latent 4")
    assert page.title() == "Latent 4 · Planted latents"
    facts = page.locator(".facts").text_content()
    assert "1 % of tokens, 1 in 100" in facts and "maximum9" in facts and "score0.9" in facts
    expect(page.locator("aside .histogram svg").first.locator(".bin")).to_have_count(50)
    bars = page.locator(".diverging li")
    expect(bars).to_have_count(20)
    expect(bars.first).to_have_text(" the+2.5", use_inner_text=False)
    middle = bars.first.locator(".track").bounding_box()
    middle = middle["x"] + middle["width"] / 2
    assert bars.first.locator(".bar").bounding_box()["x"] == pytest.approx(middle, abs=1)
    less = bars.last.locator(".bar").bounding_box()
    assert less["x"] + less["width"] == pytest.approx(middle, abs=1)
    expect(page.locator("details.interval")).to_have_count(12)
    expect(page.locator("details.interval").first).to_contain_text("92-100% of the maximum")
    assert page.locator("details.interval .example").first.is_hidden()
    page.click("text=open all")
    expect(page.locator("details.interval .example").first).to_be_visible()
    neighbour = page.locator(".links a").nth(1)
    expect(neighbour).to_have_text(re.compile("^6things of kind 6, number 6"))
    neighbour.click()
    expect(page.locator("h1")).to_have_text("Latent 6")
    assert not page.locator("button:text-is('ablate')").count()  # no server that could
    assert page.locator("#to-live").is_hidden()


def test_tokens_are_shaded_by_the_maximum_and_a_character_has_each_tokens_value(static, opened):
    page = opened(static, "#/latent/5")
    face = page.locator(".example .piece.peak").first
    expect(face).to_have_text(" 🙂")
    assert float(face.evaluate("e => e.style.getPropertyValue('--share')")) == 1
    face.hover()
    rows = page.locator("#tip tr")
    assert rows.all_text_contents() == ["ĠðŁ2.25", "ĻĤ9"]
    second = page.locator(".example").nth(1).locator(".piece")
    assert second.nth(8).text_content() == ".↵"
    assert float(second.nth(8).evaluate("e => e.style.getPropertyValue('--share')")) == 0.3


def test_deep_links_open_the_example_and_a_latent_that_is_not_there_says_so(static, opened):
    page = opened(static, "#/latent/4/example/6/1?sort=-max")
    pointed = page.locator(".pointed")
    expect(pointed).to_be_in_viewport()
    assert pointed.get_attribute("data-example") == "6/1"
    assert page.locator(".beside a").first.get_attribute("href") == (
        "#/latent/4/example/0/0?sort=-max"
    )
    page.goto(static.address + "#/latent/123456789")
    expect(page.locator(".message")).to_contain_text("There is no latent 123456789")
    page.goto(static.address + "#/latent/nine")
    expect(page.locator(".message")).to_contain_text("There is no latent nine")
    page.go_back()
    page.go_back()
    expect(page.locator("h1")).to_have_text("Latent 4")


def test_by_keyboard_alone(static, opened):
    page = opened(static, "#/about")
    page.wait_for_selector("table")
    press = page.keyboard.press
    press("?")
    expect(page.locator("#keys")).to_be_visible()
    press("Escape")
    press("/")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("4")
    press("Enter")
    expect(page.locator("h1")).to_have_text("Latent 4")
    press("ArrowRight")
    expect(page.locator("h1")).to_have_text("Latent 5")
    press("ArrowLeft")
    press("ArrowLeft")
    expect(page.locator("h1")).to_have_text("Latent 3")
    page.locator(".example .text").first.focus()
    for _ in range(2):
        press("ArrowRight")
    expect(page.locator("h1")).to_have_text("Latent 3")  # the arrows went along the text
    expect(page.locator("#tip")).to_contain_text("zebra")
    press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    press("u")
    page.wait_for_selector(".scroller")
    page.focus(".scroller")
    for _ in range(3):
        press("ArrowDown")
    latent = page.locator(":focus").text_content()
    press("Enter")
    expect(page.locator("h1")).to_have_text(f"Latent {latent}")
    page.goto(static.address + "#/latent/4?q=zebra&in=examples")
    expect(page.locator("h1")).to_have_text("Latent 4")
    press("r")  # of the list, which has one
    expect(page.locator("h1")).to_have_text("Latent 3")


def contrast(page, element) -> float:
    """The contrast of an element's text with what lies behind it, as WCAG 2 reckons it."""
    return page.locator(element).first.evaluate(
        """(element) => {
          const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
          const bright = (colours) => {
            for (const colour of colours) {
              context.fillStyle = colour;
              context.fillRect(0, 0, 1, 1);
            }
            const linear = [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)]
              .map((v) => v / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
          };
          const grounds = [];
          for (let e = element; e; e = e.parentElement) {
            grounds.unshift(getComputedStyle(e).backgroundColor);
          }
          const [low, high] = [bright([...grounds, getComputedStyle(element).color]),
            bright(grounds)].sort((a, b) => a - b);
          return (high + 0.05) / (low + 0.05);
        }"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_as_the_system_or_the_button_has_it(static, opened, scheme):
    page = opened(static, "#/latent/5", color_scheme=scheme)
    page.wait_for_selector(".piece.peak")
    for element in (".piece.peak", ".soft", ".facts dt", ".links a .number", ".axis", "nav a"):
        assert contrast(page, element) >= 4.5, element
    ground = "getComputedStyle(document.body).backgroundColor"
    system = page.evaluate(ground)
    red = int(re.findall(r"\d+", system)[0])
    assert red > 200 if scheme == "light" else red < 60
    while page.evaluate(ground) == system:
        page.click("#theme")
    other = page.evaluate(ground)
    page.reload()
    page.wait_for_selector(".piece.peak")
    assert page.evaluate(ground) == other  # this browser remembers


@pytest.mark.parametrize("hash", ["#/", "#/latent/5", "#/live?t=x+A&not=z&clamp=3:5", "#/about"])
def test_on_a_phone_nothing_is_cut_and_everything_can_be_tapped(live, opened, hash):
    page = opened(
        live, hash, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    page.wait_for_selector(".window .row, .example, .active li, .pairs")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.evaluate(
        """[...document.querySelectorAll("a, button, input, select, summary, textarea")]
          .filter((e) => e.checkVisibility() && !e.closest("p, .skip, .window"))
          .map((e) => (e.type === "checkbox" ? e.parentElement : e))
          .map((e) => [e.outerHTML.slice(0, 80), e.getBoundingClientRect()])
          .filter(([, r]) => r.height < 39.5 || r.width < 39.5 || r.right > 390)
          .filter(([html]) => !html.includes("skip")).map(([html]) => html)"""
    )
    assert not small
    if "latent" in hash:
        page.locator(".piece.peak").first.tap()
        expect(page.locator("#tip")).to_contain_text("1")


def test_what_cannot_be_read_is_named_and_can_be_tried_again(static, opened):
    page = opened(static, "#/latent/300")
    shard = static.path / "data/latents/00001.json.gz"
    expect(page.locator(".failed")).to_contain_text("Could not read data/latents/00001.json.gz: ")
    expect(page.locator(".failed")).to_contain_text("404")
    shard.write_bytes(b"\x1f\x8b damaged")
    page.click("text=Try again")
    expect(page.locator(".failed")).to_contain_text("data/latents/00001.json.gz is damaged")
    table = static.columns
    found = [dashboard_folder.latent(i, table, None, [["a", "b"]]) for i in range(256, 512)]
    dashboard_folder.write_gzip(shard, found)
    page.click("text=Try again")
    expect(page.locator("h1")).to_have_text("Latent 300")
    shard.unlink()
    errors = [error for error in opened.errors if "404" not in error]
    assert not errors
    opened.errors.clear()  # the browser reports what is missing, too


def test_an_index_of_another_dictionary_is_not_shown(tmp_path, opened):
    with written(tmp_path, d_sae=64) as folder:
        (folder.path / "data/index.bin").write_bytes(b"short")
        page = opened(folder)
        expect(page.locator(".failed")).to_contain_text("has 5 bytes, not the 1024 of 64 latents")


def test_opened_as_a_file_it_says_how_to_serve_it(static, browser):
    page = browser.new_page()
    page.goto((static.path / "index.html").as_uri())
    expect(page.locator("#waiting")).to_contain_text("python -m http.server")
    expect(page.locator(".late")).to_be_visible()
    page.close()


# With the real server, and the model of words.


def show(page, *texts, negatives=()):
    page.locator("textarea[aria-label='text']").first.fill(texts[0])
    for text in texts[1:]:
        page.click("text=+ another text")
        page.locator("textarea[aria-label='text']").last.fill(text)
    for text in negatives:
        page.click("text=+ a text without it")
        page.locator("textarea[aria-label='negative text']").last.fill(text)
    page.click("text=Show latents")
    expect(page.locator(".primary").first).to_have_text("Show latents")  # and not "reading …"


def listed(page, under=".result > .active") -> set[int]:
    found = page.locator(f"{under} li")
    return set(found.evaluate_all("items => items.map(item => Number(item.dataset.latent))"))


def test_a_typed_sentence_shows_the_planted_latent_on_its_token(live, opened):
    page = opened(live)
    page.click("#to-live")
    show(page, "x A y")
    assert listed(page) == {X, A, Y, ANY}
    assert page.locator(".texts .piece").all_text_contents() == [" x", " A", " y"]
    on = page.locator(".texts .piece.on")
    for latent, word in ((A, " A"), (Y, " y")):
        page.locator(f".result > .active [data-latent='{latent}']").hover()
        assert on.all_text_contents() == [word]
        assert float(on.evaluate("e => e.style.getPropertyValue('--share')")) == 1
    piece = page.locator(".texts .piece", has_text="A")
    piece.hover()
    assert set(page.locator("#tip th").all_text_contents()) == {str(A), str(ANY)}
    expect(page.locator("#tip")).to_contain_text("the word A")
    piece.click()
    assert listed(page, ".token") == {A, ANY}
    page.locator(".token a", has_text=str(A)).click()
    expect(page.locator("h1")).to_have_text(f"Latent {A}")
    expect(page.locator(".heading .label")).to_have_text("the word A")


def test_negative_texts_take_latents_away_and_more_texts_ask_for_all(live, opened):
    page = opened(live, "#/live")
    show(page, "x A y", "z A")
    assert listed(page) == {A, ANY}
    show(page, "x A y", negatives=["B z"])
    assert listed(page) == {A}
    again = opened(live, page.url.removeprefix(live.address))
    again.wait_for_selector(".active li")
    assert listed(again) == {A}
    assert again.locator(".box").count() == 3
    show(again, "x A y", negatives=["A"])
    expect(again.locator(".result").first).to_contain_text("No latent fires in all of the texts")


def test_clamping_changes_the_continuation(live, opened):
    page = opened(live, "#/live")
    show(page, "A")
    page.locator(f"button[aria-label='Clamp latent {A}']").first.click()
    page.locator("input[type=range]").fill("2.5")
    page.fill("#prompt", "x z")
    page.fill("#new-tokens", "3")
    page.click("#continue")
    expect(page.locator("#steered")).to_contain_text("B B B")
    expect(page.locator("#clean")).not_to_contain_text("B")
    again = opened(live, page.url.removeprefix(live.address))
    assert again.input_value("input[type=range]") == "2.5"
    assert again.input_value("#prompt") == "x z"
    again.fill("#prompt", "x " * 20)
    again.click("#continue")
    expect(again.locator(".failed")).to_contain_text("the model's context of 8; shorten it")
    assert all("400" in error for error in opened.errors)
    opened.errors.clear()


def test_an_ablation_underlines_the_token_predicted(live, opened):
    page = opened(live, f"#/latent/{A}")
    item = page.locator(".example", has_text="x A B y")
    expect(item.locator(".piece.peak")).to_have_text("A")
    item.locator("text=ablate").click()
    # Without A all words are alike.
    with_a = math.exp(STRENGTH) / (math.exp(STRENGTH) + hand_built.V - 1)
    effect = f"{math.log(with_a * hand_built.V):.3g}"
    expect(item.locator(".effect")).to_contain_text(
        f"“ B”: it raises its log-probability by {effect} nats"
    )
    assert item.locator(".helped").all_text_contents() == [" B"]
    assert item.locator(".hurt").count() == 0
    expect(page.locator(".legend")).to_be_visible()
    item.locator(".helped").hover()
    expect(page.locator("#tip")).to_contain_text(f"+{effect}")
    promoted = page.locator(".diverging li").first
    expect(promoted).to_have_text(re.compile(r"^ ?B\+"))


def test_a_live_search_asks_the_server_for_texts_of_several_words(live, opened):
    page = opened(live, "#/?q=Z x&in=examples&dead=1")
    expect(page.locator("#shown")).to_have_text("4 of 7 latents")
    assert numbers(page) == [X, Y, Z, ANY]


def test_the_exported_folder_has_all_but_what_needs_the_model(words, tmp_path, opened):
    latents, _ = words
    out = tmp_path / UNDER
    dashboard.export(out, latents, dashboard.about(latents, title="Words"))
    with files_of(tmp_path) as address:
        page = opened(Folder(f"{address}{UNDER}/"), "#/?dead=1")
        expect(page.locator("#shown")).to_have_text("7 of 7 latents")
        page.click(f".window a:text-is('{A}')")
        expect(page.locator(".example").first.locator(".piece.peak")).to_have_text("A")
        expect(page.locator(".links a").first).to_be_visible()
        assert page.locator("#to-live").is_hidden()
        assert not page.locator("button:text-is('ablate')").count()


def test_explanations_are_shown_with_their_controls_and_searched(words, tmp_path, opened):
    latents, _ = words
    rules, llm = ("statistics", "rules-1"), ("llm", "delphi-1")
    hostile = f"zebras {dashboard_folder.HOSTILE}"
    records.write(
        tmp_path / "explain",
        [
            Explanation("latents", A, *llm, "the first letter", details={"model": "judge"}),
            Explanation("latents", A, *rules, hostile, "token"),
            Explanation("latents", B, *rules, ""),
        ],
        [
            Score("latents", A, *llm, "detection", "", 0.875, 100, 3),
            Score("latents", A, *llm, "detection", "shuffled", 0.5, 100),
            Score("latents", A, *llm, "detection", "none", None, 100),
        ],
    )
    explained = dashboard.read_explanations(tmp_path / "explain", len(latents.collection.density))
    shown = dashboard.Latents(
        latents.collection, latents.sae, latents.tokenizer, explained=explained
    )
    (tmp_path / "host/some/path").mkdir(parents=True)
    out = tmp_path / "host" / UNDER
    dashboard.export(out, shown, dashboard.about(shown, title="Words"))
    with files_of(tmp_path / "host") as address:
        page = opened(Folder(f"{address}{UNDER}/"), "#/?q=ZEBRAS")
        expect(page.locator("#shown")).to_have_text(
            f"1 of {len(latents.collection.density)} latents"
        )
        row = page.locator(".window .row[aria-rowindex='2']")
        expect(row.locator(".label")).to_have_text("the first letter")
        expect(row.locator(".score")).to_have_text("0.875")
        page.keyboard.press("Escape")
        row.locator("a").click()
        said = page.locator(".explained li")
        expect(said.nth(0)).to_contain_text("the first letterllm · delphi-1 · judge")
        marks = "detection 0.875 (saying nothing –, another's 0.5, 3 unreadable)"
        expect(said.nth(0)).to_contain_text(marks)
        expect(said.nth(1)).to_contain_text(hostile)
        expect(said.nth(1)).to_contain_text("statistics · rules-1 · token")
        assert page.evaluate("window.hurt") is None
        page.goto(f"{address}{UNDER}/#/latent/{B}")
        expect(said).to_have_text("nothing to say: statistics · rules-1")
        page.goto(f"{address}{UNDER}/#/about")
        expect(page.locator(".view")).to_contain_text("highest score by detection")
