"""The page at ``/`` in a real browser: what it shows, what a keyboard reaches, and what it never runs or asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="the page needs playwright to be tried in a browser")

from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from softprompt.inspection.nearest import WAYWARD
from softprompt.serving.jobs import Limits
from softprompt.soft_prompts.store import Store
from tests.servers import Running, fill, make_lm, serving, slowed, soft_prompt

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXT = "a stirring , funny film"
PATIENCE = 30_000  # milliseconds; a busy machine is no failure
HTML = '<img src=x onerror="window.hacked=1">'
ODD_TEMPLATE = "{soft_prompt}<script>window.hacked=1</script>{input}<b>\n{target}"
SOURCE = (files("softprompt.serving") / "playground.html").read_text(encoding="utf-8")

# The controls that a keyboard can reach; and the one that has the focus, with its outline and area.
NAME = "const name = (one) => one.id || one.getAttribute('aria-label') || one.textContent;"
REACHABLE = f"""() => {{
    {NAME}
    return [...document.querySelectorAll("a, button, input, textarea, summary")]
        .filter((one) => !one.disabled && one.checkVisibility()).map(name);
}}"""
FOCUSED = f"""() => {{
    {NAME}
    const one = document.activeElement, style = getComputedStyle(one), box = one.getBoundingClientRect();
    if (one === document.body) return null;
    return [name(one), style.outlineStyle, parseFloat(style.outlineWidth), box.width * box.height];
}}"""
# The least contrast of text with what is behind it, by WCAG 2.2 §1.4.3, and the text.
CONTRAST = """() => {
    const parts = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const [r, g, b] = parts(color).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (one) => {
        const color = getComputedStyle(one).backgroundColor;
        return (parts(color)[3] ?? 1) === 0 ? ground(one.parentElement) : color;
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const one = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !one.checkVisibility() || one.closest("script")) continue;
        const pair = [light(getComputedStyle(one).color), light(ground(one))];
        found.push([(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), walker.currentNode.data.trim()]);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store, lm = Store(tmp_path_factory.mktemp("store")), make_lm()
    fill(store, lm)
    labels = {HTML: ("very",), "plain": ("no",)}
    metric = {"split": "validation", "metric": "<u>f1</u>", "value": "high", "n": 7}
    store.save(soft_prompt(lm, "odd", ODD_TEMPLATE, labels, metrics=(metric,)))
    with serving(store.home, allow_loading=True) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed to try the page in")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options, timeout=2 * PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A blank page; whatever a test does with it, it asks one origin only, and nothing fails or is blocked."""
    expect.set_options(timeout=PATIENCE)
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        asked: list[str] = []
        troubles: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text))
        yield page
        origins = {re.sub(r"(?<=\d)/.*", "", url) for url in asked if not url.startswith("data:")}
        assert origins == {re.sub(r"(?<=\d)/.*", "", page.url)}
        assert [trouble for trouble in troubles if not trouble.startswith("Failed to load resource")] == []


def visit(page: Page, server: Running, *names: str) -> None:
    """Opens the page and chooses soft prompts."""
    page.goto(server.url)
    expect(page.locator("#models li")).to_have_count(len(server.catalog.entries()))
    for box in page.locator("#models input").all():
        name = page.locator(f"label[for={box.get_attribute('id')}]").inner_text()
        box.set_checked(name in names)


def run(page: Page, **texts: str) -> None:
    """Fills in the fields, asks, and waits for the end."""
    for name, text in texts.items():
        page.get_by_role("textbox", name=re.compile(f"^{name}")).fill(text)
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#state")).to_have_text(re.compile(r"^\d+ answers? in [\d.]+ m?s\.$"))


def pane(page: Page, name: str, title: str) -> Locator:
    article = page.locator("article").filter(has=page.get_by_role("heading", name=name, exact=True))
    return article.locator(".pane").filter(has=page.get_by_role("heading", name=title, exact=True))


def rows(pane: Locator) -> dict[str, str]:
    """What a pane shows: label → number."""
    return {
        row.locator("th").text_content() or "": row.locator(".number").inner_text() for row in pane.locator("tr").all()
    }


def contents(place: Locator) -> str:
    return place.text_content() or ""


# --- answers -----------------------------------------------------------------------------------------------------


def test_the_labels_are_those_of_classify(page: Page, server: Running) -> None:
    """Of three soft prompts with two templates, one of several fields, and of the base model under each."""
    texts = {"input": TEXT, "premise": "it rains", "hypothesis": "it is wet"}
    visit(page, server, "sst2", "nli", "film")
    run(page, **texts)
    assert page.locator("#state").inner_text().startswith("6 answers")
    assert page.locator("article h3").all_inner_texts() == ["film", "nli", "sst2"]
    for name in ("film", "nli", "sst2"):
        fields = {field: texts[field] for field in server.catalog.get(name).card["fields"]}
        for title, base_only in (("With the soft prompt", False), ("Base model alone", True)):
            (found,) = server.post("/v1/classify", {"model": name, "fields": fields, "base_only": base_only})["data"]
            shown = pane(page, name, title)
            numbers = {label: float(number) for label, number in rows(shown).items()}
            assert numbers == pytest.approx(found["probabilities"], abs=0.0005 + 1e-6)
            assert contents(shown.locator(".best th")) == found["label"]
            for row in shown.locator("tr").all():
                bar, track = row.locator(".bar").bounding_box(), row.locator(".track").bounding_box()
                assert bar is not None
                assert track is not None
                share = found["probabilities"][contents(row.locator("th"))]
                assert bar["width"] / track["width"] == pytest.approx(share, abs=0.02)
            assert re.fullmatch(r"[\d.]+ m?s in the server", shown.locator(".facts").inner_text())
            said = f"{title}: {found['label']} {found['probabilities'][found['label']]:.3f}."
            assert said in page.locator("#said p", has_text=f"{name}.").all_inner_texts()[0]


def test_the_base_model_alone_is_left_out_if_not_wanted(page: Page, server: Running) -> None:
    visit(page, server, "sst2")
    page.get_by_label("Also ask the base model alone").uncheck()
    run(page, input=TEXT)
    assert page.locator("#state").inner_text().startswith("1 answer ")
    assert page.locator(".pane h4").all_inner_texts() == ["With the soft prompt"]


def test_text_streams_in_and_is_that_of_completions(page: Page, server: Running) -> None:
    body: dict[str, Any] = {"model": "write", "prompt": TEXT, "max_tokens": 12}
    whole = server.post("/v1/completions", body)["choices"][0]["text"]
    visit(page, server, "write", "tiny")
    page.get_by_label("At most tokens").fill("12")
    page.get_by_role("textbox", name="input").fill(TEXT)
    written = pane(page, "write", "With the soft prompt").locator(".text")
    with slowed(server.engine.lm, 0.1):
        page.get_by_role("button", name="Run").click()
        seen = set()
        while page.locator("#stop").is_enabled():
            if written.count():
                seen.add(contents(written))
    assert len(seen) > 3
    assert all(whole.startswith(part) for part in seen)
    assert contents(written) == whole
    alone = pane(page, "write", "Base model alone").locator(".text")
    assert contents(alone) == server.post("/v1/completions", {**body, "base_only": True})["choices"][0]["text"]
    raw = pane(page, "tiny", "Continued as it is")
    assert (
        contents(raw.locator(".text"))
        == server.post("/v1/completions", {**body, "model": "tiny"})["choices"][0]["text"]
    )
    note = raw.locator(".facts").inner_text()
    assert re.fullmatch(
        r"first token after [\d.]+ m?s · 12 tokens in [\d.]+ m?s · (ended by itself|cut at the token limit)", note
    )


def test_stopping_frees_the_server(page: Page, server: Running) -> None:
    visit(page, server, "write")
    page.get_by_role("textbox", name="input").fill(TEXT)
    with slowed(server.engine.lm, 0.1):
        page.keyboard.press("Control+Enter")
        expect(pane(page, "write", "With the soft prompt").locator(".text")).not_to_be_empty()
        page.locator("#stop").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("Stopped.")
        server.settle()
    assert page.locator(".pane .quiet").all_inner_texts() == ["Stopped.", "Stopped."]
    expect(page.locator("#run")).to_be_focused()
    assert page.locator("#stop").is_disabled()


def test_a_second_run_takes_the_place_of_the_first(page: Page, server: Running) -> None:
    visit(page, server, "write")
    page.get_by_role("textbox", name="input").fill(TEXT)
    with slowed(server.engine.lm, 0.1):
        page.keyboard.press("Control+Enter")
        expect(pane(page, "write", "With the soft prompt").locator(".text")).not_to_be_empty()
        page.get_by_label("At most tokens").fill("5")
        run(page, input="dull")
    assert page.locator("article").count() == 1
    assert page.locator("#said p").count() == 1
    whole = server.post("/v1/completions", {"model": "write", "prompt": "dull", "max_tokens": 5})["choices"][0]["text"]
    assert contents(pane(page, "write", "With the soft prompt").locator(".text")) == whole


# --- what is served ----------------------------------------------------------------------------------------------


def test_each_soft_prompt_is_described(page: Page, server: Running) -> None:
    visit(page, server, "sst2")
    item = page.locator("#models li").filter(has=page.get_by_label("sst2", exact=True))
    bytes = server.catalog.store.path("sst2").stat().st_size
    assert item.locator(".facts").inner_text() == (
        f"2 labels: positive, negative · 7 virtual tokens · {bytes / 1000:.1f} kB · "
        "validation accuracy 0.9\xa0±\xa00.03, n\xa0=\xa0100"
    )
    assert not item.locator("pre").is_visible()
    item.locator("summary").click()
    assert item.locator("pre").text_content() == "{soft_prompt}{input}\nAnswer: {target}"
    assert item.locator("pre").is_visible()
    assert page.locator("#base").inner_text() == "Base model tiny, loaded once, with a window of 128 tokens"
    assert page.locator("#count").inner_text() == "1 of 6 chosen."


def test_what_the_server_says_is_text_and_never_html(page: Page, server: Running) -> None:
    visit(page, server, "odd")
    run(page, input=TEXT)
    item = page.locator("#models li").filter(has=page.get_by_label("odd", exact=True))
    item.locator("summary").click()
    assert item.locator("pre").text_content() == ODD_TEMPLATE
    assert f"2 labels: {HTML}, plain" in item.locator(".facts").inner_text()
    assert item.locator(".facts").inner_text().endswith("validation <u>f1</u> unknown, n\xa0=\xa07")
    assert list(rows(pane(page, "odd", "With the soft prompt"))) == [HTML, "plain"]
    assert page.locator("img, b, u").count() == 0
    assert page.locator("script").count() == 1
    assert page.evaluate("window.hacked") is None


def test_soft_prompts_are_unloaded_and_loaded(page: Page, server: Running) -> None:
    visit(page, server, "sst2", "film")
    count = len(server.catalog.entries())
    page.get_by_role("button", name="Unload film").click()
    expect(page.locator("#changed")).to_have_text("film is unloaded.")
    expect(page.locator("#listed")).to_be_focused()
    assert page.locator("#models li").count() == count - 1
    assert "film" not in {entry.name for entry in server.catalog.entries()}
    page.get_by_text("Load a soft prompt").click()
    page.get_by_label("Name", exact=True).fill("film")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.locator("#changed")).to_have_text("film is loaded.")
    assert page.get_by_label("film", exact=True).is_checked()
    page.get_by_label("Name", exact=True).fill("second")
    page.get_by_label("File on the server").fill(str(server.catalog.store.path("sst2")))
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.locator("#changed")).to_have_text("second is loaded.")
    page.get_by_role("button", name="Unload second").click()
    expect(page.locator("#changed")).to_have_text("second is unloaded.")
    assert [entry.name for entry in server.catalog.entries()] == ["tiny", "film", "nli", "odd", "sst2", "write"]


def test_many_soft_prompts_are_searched_and_many_labels_folded(page: Page, server: Running) -> None:
    store = server.catalog.store
    labels = {f"label {number}": (word,) for number, word in enumerate("abcdefghijk")}
    path = store.home / "many.bin"
    store.save(soft_prompt(server.lm, "many", "{soft_prompt}{input} {target}", labels))
    store.path("many").rename(path)
    names = [f"many-{number}" for number in range(5)]
    try:
        for name in names:
            server.catalog.load(name, path)
        visit(page, server, "many-3", "many-4")
        page.get_by_label("Show names with").fill("MANY-4")
        assert page.locator("#models label").all_inner_texts() == ["many-4"]
        page.get_by_label("many-4", exact=True).uncheck()
        page.get_by_label("Show names with").fill("")
        assert page.locator("#models li").count() == len(server.catalog.entries())
        assert page.get_by_label("many-3", exact=True).is_checked()
        assert not page.get_by_label("many-4", exact=True).is_checked()
        run(page, input=TEXT)
        shown = pane(page, "many-3", "With the soft prompt")
        (found,) = server.post("/v1/classify", {"model": "many-3", "input": TEXT})["data"]
        sorted_labels = sorted(labels, key=found["probabilities"].__getitem__, reverse=True)
        assert shown.locator("tr:visible th").all_inner_texts() == sorted_labels[:8]
        shown.get_by_text("3 labels more").click()
        assert shown.locator("tr:visible th").all_inner_texts() == sorted_labels
    finally:
        for name in names:
            server.catalog.unload(name)
        path.unlink()


# --- inside a soft prompt ----------------------------------------------------------------------------------------


def test_inside_a_soft_prompt_is_what_the_server_says(page: Page, server: Running) -> None:
    """Planted words are read back; the norms' bars and the map are those of the answer."""
    lm = server.lm
    planted = soft_prompt(lm, "planted", "{soft_prompt}{input} {target}", {"a": ("very",), "b": ("no",)}, length=3)
    tokens = lm.tokenizer(" great film", add_special_tokens=False).input_ids[:2]
    planted.vectors[:2] = 3 * lm.embedding[tokens].detach()
    path = server.catalog.store.home / "planted.bin"
    planted.save(path)
    server.catalog.load("planted", path)
    try:
        visit(page, server, "sst2")
        page.get_by_role("button", name="Look inside planted").click()
        expect(page.locator("#looked")).to_be_focused()
        expect(page.locator("#rows tr")).to_have_count(3)
        found = server.http.get("/v1/soft_prompts/planted/inspection").json()
        assert page.locator("#looked").inner_text() == "Inside planted"
        assert page.locator("#looking").inner_text() == found["warning"] == WAYWARD
        assert page.locator("#sayings h4").all_inner_texts() == [each["question"] for each in found["answers"]]
        assert page.locator("#sayings p").all_inner_texts() == [each["answer"] for each in found["answers"]]
        norms = found["norms"]["norms"]
        most = max(*norms, found["norms"]["table"]["0.95"])
        for i, row in enumerate(page.locator("#rows tr").all()):
            reading = found["nearest"]["readings"][i]
            near, chance, norm = row.locator("td").all()
            texts = [json.loads(text.replace("\xa0", " ")) for text in near.locator("code").all_inner_texts()]
            assert texts == [each["text"] for each in reading["cosine"][:3]]
            assert near.locator(".facts").inner_text() == (
                f"cosine {reading['cosine'][0]['value']:.2f}, random {reading['random']['cosine']:.2f}"
            )
            assert chance.inner_text().startswith("yes: " if reading["significant"] else "no")
            assert chance.locator(".facts").inner_text() == f"{reading['stands_out']['value']:.1f} σ"
            assert norm.inner_text().strip() == f"{norms[i]:.2f}"
            bar, track = norm.locator(".bar").bounding_box(), norm.locator(".track").bounding_box()
            assert bar is not None
            assert track is not None
            assert bar["width"] / track["width"] == pytest.approx(norms[i] / most, abs=0.02)
        significant = [i for i, each in enumerate(found["nearest"]["readings"]) if each["significant"]]
        assert {0, 1} <= set(significant)
        assert [each["cosine"][0]["token"] for each in found["nearest"]["readings"][:2]] == tokens
        assert [each for each in page.locator("#numbers text").all_text_contents() if each] == [*map(str, significant)]
        path_of = "(name) => document.querySelector('#map .' + name).getAttribute('d').split('M').slice(1)"
        for name, points in (("token", "vocabulary"), ("virtual", "virtual"), ("cross", "random"), ("way", "start")):
            assert len(page.evaluate(path_of, name)) == len(found["map"][points])
        x, y = page.evaluate(path_of, "virtual")[1].removesuffix("h0").split(" ")
        assert [float(x), -float(y)] == pytest.approx(found["map"]["virtual"][1])

        page.get_by_role("button", name="Look inside sst2").click()  # another takes its place
        expect(page.locator("#rows tr")).to_have_count(7)
        page.get_by_role("button", name="Close").focus()
        page.keyboard.press("Enter")
        assert not page.locator("#inside").is_visible()
        expect(page.locator("#listed")).to_be_focused()
    finally:
        server.catalog.unload("planted")
        path.unlink()


def test_why_there_is_nothing_to_see_inside_is_told(page: Page, server: Running) -> None:
    visit(page, server, "sst2")
    page.route("**/v1/soft_prompts/sst2/inspection", lambda route: route.abort())
    page.get_by_role("button", name="Look inside sst2").click()
    expect(page.locator("#looking")).to_have_text("No answer came from the server; see whether it still runs.")
    assert not page.locator("#views").is_visible()


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_the_servers_sentences_are_shown(page: Page, server: Running) -> None:
    visit(page, server, "sst2", "write")
    run(page, input="the film " * 100)
    for name in ("sst2", "write"):
        body = {"model": name, "fields": {"input": "the film " * 100}}
        path = "/v1/classify" if name == "sst2" else "/v1/completions"
        sentence = server.post(path, body, 400)["error"]["message"]
        assert sentence.startswith("Expected an input of at most")
        shown = pane(page, name, "With the soft prompt")
        assert shown.locator(".wrong").inner_text() == sentence
        assert sentence in page.locator("#said p", has_text=f"{name}.").inner_text()
    page.get_by_label("Cut the end of input text").check()
    run(page)
    assert page.locator(".pane .wrong").count() == 0
    for note in page.locator(".pane .facts").all_inner_texts():
        assert note.endswith(" · the end of the input text was cut")

    page.get_by_text("Load a soft prompt").click()
    page.get_by_label("Name", exact=True).fill("nothing")
    page.get_by_role("button", name="Load", exact=True).click()
    sentence = server.post("/v1/load_soft_prompt", {"name": "nothing"}, 404)["error"]["message"]
    expect(page.locator("#changed")).to_have_text(sentence)
    page.get_by_label("Name", exact=True).fill("sst2")
    page.keyboard.press("Enter")
    sentence = server.post("/v1/load_soft_prompt", {"name": "sst2"}, 400)["error"]["message"]
    expect(page.locator("#changed")).to_have_text(sentence)

    for box in page.locator("#models input").all():
        box.uncheck()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#state")).to_have_text("Choose at least one soft prompt, or the base model.")
    assert page.locator("article").count() == 0


def test_a_key_is_asked_for_and_kept_in_memory(page: Page, tmp_path: Path) -> None:
    """A server that wants a key, and whose clients may not load: nothing of loading is shown."""
    with serving(tmp_path, api_key="sesame") as server:
        page.goto(server.url)
        sentence = "Expected a valid API key as Bearer token, found none or another; send it."
        expect(page.get_by_role("alert")).to_have_text(sentence)
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_have_value("")
        assert page.locator("#models li").count() == 0
        page.keyboard.type("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#models li")).to_have_count(5)
        expect(page.locator("#listed")).to_be_focused()
        assert not page.locator("#door").is_visible()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert not page.locator("#loader").is_visible()
        assert page.get_by_role("button", name="Unload").count() == 0
        run(page, input=TEXT)
        assert page.locator(".pane table").count() == 2


def test_what_was_asked_with_an_earlier_key_is_asked_again(page: Page, tmp_path: Path) -> None:
    held: list[Route] = []
    with serving(tmp_path, api_key="sesame") as server:
        page.goto(server.url)
        expect(page.locator("#key")).to_be_focused()
        page.route("**/v1/models", lambda route: held.append(route), times=1)
        for key in ("wrong", "sesame"):
            page.keyboard.type(key)
            page.keyboard.press("Enter")
        expect(page.locator("#listed")).to_be_focused()
        with page.expect_response(lambda response: response.ok):
            held[0].continue_()  # refused only now
        expect(page.locator("#listed")).to_be_focused()
        assert not page.locator("#door").is_visible()
        expect(page.locator("#changed")).to_have_text("")


def test_a_server_that_has_gone_is_told(page: Page, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        visit(page, server, "film")
    page.get_by_role("textbox", name="input").fill(TEXT)
    page.keyboard.press("Control+Enter")
    gone = "No answer came from the server; see whether it still runs."
    expect(page.locator(".pane .wrong")).to_have_text([gone, gone])
    page.get_by_role("button", name="Refresh").click()
    expect(page.locator("#changed")).to_have_text(gone)


def test_a_stream_that_fails_shows_what_came_and_why_it_ended(page: Page, tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(seconds=1.5)) as server:
        visit(page, server, "write")
        page.get_by_label("Also ask the base model alone").uncheck()
        with slowed(server.engine.lm, 0.1):
            run(page, input=TEXT)
            sentence = server.stream("/v1/completions", {"model": "write", "prompt": TEXT})[-1]["error"]["message"]
        shown = pane(page, "write", "With the soft prompt")
        assert contents(shown.locator(".text")) != ""
        assert shown.locator(".wrong").inner_text() == sentence

        begun = 'data: {"choices": [{"text": "half an ans", "finish_reason": null}], "truncated": false}\n\ndata: {"cho'
        page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body=begun))
        run(page, input=TEXT)
        assert contents(shown.locator(".text")) == "half an ans"
        assert shown.locator(".wrong").inner_text() == "The answer broke off; see whether the server still runs."


# --- keyboard, colours, sizes ------------------------------------------------------------------------------------


def test_the_keyboard_alone_is_enough(page: Page, server: Running) -> None:
    """Tab reaches every control, in the order of the page, and each shows that it has the focus."""
    page.goto(server.url)
    expect(page.locator("#models li")).to_have_count(6)
    page.locator("#loader").evaluate("(one) => { one.open = true }")
    reachable = page.evaluate(REACHABLE)
    reached = []
    for _ in reachable:
        page.keyboard.press("Tab")
        name, outline, width, area = page.evaluate(FOCUSED)
        assert (outline, width) == ("solid", 3), name
        assert area > 100, name
        reached.append(name)
    assert reached == reachable
    assert {
        "Skip to the input text",
        "refresh",
        "model-0",
        "Unload sst2",
        "Look inside sst2",
        "Load a soft prompt",
        "name",
        "path",
        "inplace",
        "field-0",
        "compare",
        "run",
    } <= set(reached)

    page.goto(server.url)
    expect(page.locator("#models li")).to_have_count(6)
    while page.evaluate(FOCUSED) is None or page.evaluate(FOCUSED)[0] != "model-1":
        page.keyboard.press("Tab")
    page.keyboard.press("Space")  # film was chosen: now nothing is
    page.keyboard.press("Space")
    assert page.locator("#count").inner_text() == "1 of 6 chosen."
    while page.evaluate(FOCUSED)[0] != "field-0":
        page.keyboard.press("Tab")
    page.keyboard.type(TEXT)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#state")).to_have_text(re.compile("^2 answers in "))
    (found,) = server.post("/v1/classify", {"model": "film", "input": TEXT})["data"]
    assert contents(pane(page, "film", "With the soft prompt").locator(".best th")) == found["label"]
    assert page.evaluate(FOCUSED)[0] == "field-0"
    assert page.locator("textarea").input_value() == TEXT


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Page, server: Running, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    visit(page, server, "sst2", "write", "nli")
    page.locator("summary").first.click()
    page.get_by_role("button", name="Look inside sst2").click()
    expect(page.locator("#rows tr")).to_have_count(7)
    page.get_by_label("At most tokens").fill("4")
    run(page, input=TEXT)  # nli's fields are empty: an error is shown
    assert page.locator(".pane .wrong").count() == 2
    found = page.evaluate(CONTRAST)
    assert len(found) > 50
    least, text = min(found)
    assert least >= 4.5, text
    lightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(lightness) > 128) == (scheme == "light")


def test_a_narrow_screen_is_not_scrolled_sideways(page: Page, server: Running) -> None:
    page.set_viewport_size({"width": 320, "height": 700})
    visit(page, server, "odd", "nli", "write")
    page.locator("summary").first.click()
    page.get_by_role("button", name="Look inside sst2").click()
    expect(page.locator("#rows tr")).to_have_count(7)
    page.get_by_label("At most tokens").fill("60")
    run(page, input="x" * 40, premise="a", hypothesis="b")
    assert page.evaluate("document.documentElement.scrollWidth") == 320


# --- the file itself ---------------------------------------------------------------------------------------------


def test_the_policy_allows_the_page_itself_and_nothing_else() -> None:
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', SOURCE)
    hashes = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", SOURCE, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def test_nothing_in_the_file_comes_from_elsewhere_or_makes_html_of_text() -> None:
    assert (
        re.findall(r"https?:|//\w+\.|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|\son\w+=", SOURCE)
        == []
    )
    assert len(SOURCE.splitlines()) < 600
