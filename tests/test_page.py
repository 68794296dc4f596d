"""The server's page by a user's path: real Chromium, real server, the starter."""

import re
import shutil
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest

import blockdiff
from blockdiff.api import continuation
from blockdiff.sampling.generate import generate_tokens, stream_tokens
from blockdiff.sampling.options import SamplingOptions

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
sync_api = pytest.importorskip("playwright.sync_api")

from blockdiff.serving.app import make_app  # noqa: E402
from blockdiff.serving.limits import Limits  # noqa: E402
from blockdiff.serving.port import listen  # noqa: E402
from blockdiff.serving.served import Served  # noqa: E402
from blockdiff.serving.worker import Worker  # noqa: E402

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
expect = sync_api.expect
PROMPT = "The people of the United States"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@contextmanager
def server(models, **limits):
    """The address of a server that runs until the block ends."""
    with listen("127.0.0.1", 0) as taken:
        config = uvicorn.Config(
            make_app(models, Limits(**limits)), log_level="error", lifespan="off"
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}/"
        finally:
            running.should_exit = running.force_exit = True
            thread.join()


@pytest.fixture(scope="module")
def starter():
    return blockdiff.load("starter")


@pytest.fixture(scope="module")
def served(starter):
    worker = Worker(starter[0], rows=8)
    worker.start()
    yield {"starter": Served("starter", *starter, worker)}
    worker.drain(0)


@pytest.fixture(scope="module")
def address(served):
    with server(served) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    """Opens a page at an address; afterwards it must have kept to it, without a complaint."""
    contexts, told, asked, home = [], [], [], []

    def opened(address, width=1280, refused=False, **more):
        context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        context.set_default_timeout(20_000)
        contexts.append(context)
        home.append(address)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("console", lambda said: told.append(said.text))
        page.goto(address)
        if not refused:
            expect(page.locator("#orders li")).to_have_count(1)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert all(url.startswith(tuple(home)) or url.startswith("data:") for url in asked)
    # A browser tells by itself of answers that are errors.
    assert [text for text in told if "Failed to load resource" not in text] == []


def write(page, prompt=PROMPT, tokens=12, seed=1):
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Write").click()


def choose(page, number, sampler, **settings):
    order = page.get_by_role("group", name=f"Order {number}" if number else "Order")
    order.get_by_role("combobox", name="Sampler").select_option(sampler)
    for name, value in settings.items():
        order.get_by_role("spinbutton", name=name).fill(value)


def done(page):
    expect(page.get_by_role("status")).to_contain_text("Done", timeout=20_000)


def masked(page, column=0):
    return page.locator(".column").nth(column).locator(".token.masked")


def wait(until, seconds=10.0):
    limit = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)


def options(**more):
    return SamplingOptions(**{"max_new_tokens": 12, "temperature": 0.7, "seed": 1, **more})


def test_write_and_replay(visit, address, starter, served):
    """What the page shows at each evaluation is what the engine did by then."""
    model, tokenizer = starter
    ids = served["starter"].encode(PROMPT)
    steps = list(stream_tokens(model, [ids], options()))
    text = continuation(tokenizer, ids, steps[-1].tokens[0, len(ids) :].tolist())
    page = visit(address)
    said = page.evaluate_handle(
        """() => { const said = [];
           const status = document.getElementById("status");
           new MutationObserver(() => said.push(status.textContent)).observe(status,
             { childList: true, characterData: true, subtree: true });
           return said; }"""
    )
    write(page)
    done(page)
    expect(page.get_by_role("button", name="Cancel")).to_be_disabled()
    assert page.locator(".whole").text_content() == text
    assert page.locator(".block").all_text_contents() and masked(page).count() == 0
    assert "".join(page.locator(".block").all_text_contents()) == text
    assert said.json_value() == [
        "Writing.",
        f"Done. first_hitting: 12 tokens in {int(steps[-1].nfe[0])} evaluations.",
    ]

    slider = page.get_by_role("slider", name="Evaluation")
    slider.focus()
    page.keyboard.press("Home")
    expect(page.locator("#place")).to_have_text(f"evaluation 0 of {int(steps[-1].nfe[0])}")
    expect(masked(page)).to_have_count(-len(ids) % 4 or 4)
    for step in steps:
        page.keyboard.press("ArrowRight")
        nfe = int(step.nfe[0])
        expect(page.locator("#place")).to_contain_text(f"evaluation {nfe} of")
        fresh = [p - len(ids) for p in step.fixed[0].nonzero().flatten().tolist()]
        shown = page.locator(".token").evaluate_all(
            "all => all.flatMap((e, i) => e.classList.contains('fresh') ? [i] : [])"
        )
        assert shown == fresh
        fixed = int((step.tokens[0, len(ids) :] != model.config.mask_token_id).sum())
        expect(slider).to_have_attribute("aria-valuetext", re.compile(f"{fixed} tokens fixed"))
        expect(page.locator('[data-name="tokens"]')).to_have_text(f"{fixed} of 12")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").wait_for()
    expect(page.locator("#place")).to_contain_text("evaluation 2 of")
    page.keyboard.press("Space")  # on the button
    page.get_by_role("button", name="Play").wait_for()


def test_two_orders_side_by_side(visit, address, starter, served):
    model, _ = starter
    ids = served["starter"].encode(PROMPT)
    page = visit(address)
    choose(page, None, "verified")
    page.get_by_role("button", name="Compare with another order").click()
    choose(page, 2, "threshold", Threshold="0.2")
    page.get_by_role("group", name="Order 2").get_by_label("Block size").select_option("8")
    write(page, tokens=24)
    done(page)
    orders = [{"sampler": "verified"}, {"threshold": 0.2, "block_size": 8}]
    for column, order in enumerate(orders):
        reference = generate_tokens(model, [ids], options(max_new_tokens=24, **order))
        new, nfe = len(reference.tokens[0]), reference.nfe[0]
        facts = page.locator(".column").nth(column)
        expect(facts.locator('[data-name="nfe"]')).to_have_text(f"{nfe} of {nfe}")
        expect(facts.locator('[data-name="rate"]')).to_have_text(f"{new / nfe:.2f}")
        assert float(facts.locator('[data-name="speed"]').inner_text()) > 0
    names = page.locator(".column h2").all_inner_texts()
    assert names == ["verified", "threshold 0.2, block size 8"]
    # What was chosen is there again the next time.
    page.reload()
    expect(page.locator("#orders li")).to_have_count(2)
    assert page.get_by_role("spinbutton", name="Threshold").input_value() == "0.2"
    page.get_by_role("button", name="Remove order 2").click()
    expect(page.locator("#orders li")).to_have_count(1)


@pytest.mark.parametrize("how", ["button", "key", "away"])
def test_watch_and_cancel(visit, address, served, how):
    """Masks turn into text; whoever has seen enough frees the row, and writes another text."""
    worker = served["starter"].worker
    before = worker.stats()
    page = visit(address)
    write(page, tokens=4000)
    masked(page).first.wait_for()
    wait(lambda: worker.stats().rows == 1)
    fixed = page.locator(".token:not(.masked, .hidden)")
    wait(lambda: fixed.count() >= 9 and masked(page).count() > 0)
    if how == "button":
        page.get_by_role("button", name="Cancel").click()
    elif how == "key":
        page.keyboard.press("Escape")
    else:
        page.goto("about:blank")
    wait(lambda: worker.stats().rows == 0)
    assert worker.stats().cancelled == before.cancelled + 1
    assert worker.stats().finished == before.finished
    if how != "away":
        expect(page.locator(".state")).to_have_text("cancelled")
        assert masked(page).count() > 0
        write(page, tokens=4)  # and another is written in its place
        done(page)


def test_what_is_wrong_is_said_where_it_is(visit, address):
    page = visit(address)
    choose(page, None, "threshold", Threshold="5")
    write(page)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("“Threshold”")
    threshold = page.get_by_role("spinbutton", name="Threshold")
    expect(threshold).to_have_attribute("aria-invalid", "true")
    expect(threshold).to_have_attribute("aria-describedby", "error")
    expect(page.get_by_role("status")).to_contain_text("failed")
    threshold.fill("0.5")
    write(page, tokens=4)
    done(page)
    expect(alert).to_be_empty()
    assert page.locator("[aria-invalid]").count() == 0


def test_server_that_goes_away(visit, served):
    with server(served) as short:
        page = visit(short)
        write(page, tokens=4000)
        masked(page).first.wait_for()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(re.compile("stop|lost|ended|interrupted"))
    write(page)
    expect(alert).to_have_text("The server does not answer. Is it still running?")
    wait(lambda: served["starter"].worker.stats().rows == 0)


def test_key_is_asked_for(visit, served):
    with server(served, api_key="open") as guarded:
        page = visit(guarded, refused=True)
        alert = page.get_by_role("alert")
        expect(alert).to_have_text("This server asks for an API key.")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(alert).to_have_text("The server does not take this API key.")
        page.get_by_label("API key").fill("open")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_label("API key")).to_be_hidden()
        write(page, tokens=4)
        done(page)


def test_model_that_is_being_loaded(visit, served):
    models = {}
    with server(models) as early:
        page = visit(early, refused=True)
        expect(page.get_by_role("alert")).to_contain_text("being loaded")
        models.update(served)
        expect(page.locator("#orders li")).to_have_count(1)
        expect(page.get_by_role("alert")).to_be_empty()


def test_chat(visit, starter, served):
    """Enter sends; what was said before goes with it, and a new conversation forgets it."""
    worker = served["starter"].worker
    talker = Served("talker", *starter, worker, template=TEMPLATE)
    with server({"talker": talker}) as chatty:
        page = visit(chatty)
        page.get_by_label("Chat").check()
        page.get_by_label("The system says").fill("Be brief.")
        page.get_by_label("Most tokens").fill("8")
        message = page.get_by_label("Message")
        bodies = []
        page.on("request", lambda one: one.method == "POST" and bodies.append(one.post_data_json))
        for number, text in enumerate(["How is the whale?", "And the ship?"], 1):
            message.fill(text)
            message.press("Enter")
            expect(message).to_have_value("")
            assert len(bodies) == number
        answer = page.locator("#talk .assistant p").text_content()
        assert [one["content"] for one in bodies[1]["messages"]] == [
            "Be brief.", "How is the whale?", answer, "And the ship?",
        ]  # fmt: skip
        expect(page.locator("#asked")).to_have_text("And the ship?")
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator(".column")).to_have_count(0)
        message.fill("Hello")
        message.press("Enter")
        expect(message).to_have_value("")
        assert [one["role"] for one in bodies[2]["messages"]] == ["system", "user"]


def test_text_is_never_markup(visit, address):
    """Edits, characters of several tokens, and what looks like HTML: as a run brings them."""
    page = visit(address)
    hostile = '<img src="x" onerror="document.title = 1">'
    shown = page.evaluate(
        """(hostile) => {
          const run = new Run({}, hostile);
          run.take("start", { prompt_tokens: 2, block_size: 4, max_tokens: 4, seed: 1 });
          const step = (nfe, at, text, edited = []) =>
            run.take("step", { nfe, at, text, edited, tokens: at, final: 0, seconds: nfe });
          step(1, [1, 0], ["\\ufffd", hostile]);
          step(3, [1, 2], ["no", "!"], [1]);
          step(4, [3], ["<|end|>"]);
          run.take("done", { text: hostile + "né!", pieces: [hostile, "né", "!", "<|end|>"],
            finish_reason: "stop", seconds: 4, tokens_per_second: 1,
            usage: { completion_tokens: 4, evaluations: 5 } });
          const column = new Column(run, hostile);
          byId("columns").replaceChildren(column.root);
          const found = [];
          for (const nfe of [0, 1, 2, 3, 5]) {
            column.draw(nfe, false, 5);
            found.push([...column.root.querySelectorAll(".token")].map((e) => e.className));
          }
          return { found, text: column.text.textContent, images: document.images.length };
        }""",
        hostile,
    )
    names = [[set(name.split()) - {"token", "special"} for name in row] for row in shown["found"]]
    masks, fresh, edited = {"masked"}, {"fresh"}, {"fresh", "edited"}
    assert names == [
        [masks, masks, {"hidden"}, {"hidden"}],
        [fresh, fresh, masks, masks],
        [set(), set(), masks, masks],
        [set(), edited, fresh, masks],
        [set(), {"edited"}, set(), set()],
    ]
    assert [("special" in name) for name in shown["found"][-1]] == [False, False, False, True]
    assert shown["text"] == f"{hostile}{hostile}né!<|end|>" and shown["images"] == 0
    write(page, prompt=hostile, tokens=4)
    done(page)
    assert page.locator(".column .text .prompt").text_content() == hostile
    assert page.evaluate("document.images.length") == 0
    assert page.title() == "blockdiff"


COLOURS = """() => {
  const parts = (colour) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    let [r, g, b, rest] = [0, 0, 0, 1];
    for (let one = element; one; one = one.parentElement) {
      const [x, y, z, a] = parts(getComputedStyle(one).backgroundColor);
      const share = (rest * a) / 255;
      [r, g, b, rest] = [r + share * x, g + share * y, b + share * z, rest - share];
    }
    return [r, g, b];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest(".masked, .unseen-text, :disabled, option, script, style")) continue;
    const [x, y] = [light(parts(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
    found[walker.currentNode.textContent.trim().slice(0, 40)] = ratio;
  }
  return found;
}"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 380), ("dark", 380), ("dark", 1280)])
def test_colours_and_widths(visit, address, scheme, width):
    page = visit(address, width, color_scheme=scheme, reduced_motion="reduce")
    if width < 860:
        page.get_by_text("Options", exact=True).click()  # out of the way at first
    page.get_by_role("button", name="Compare with another order").click()
    write(page, prompt="Constitution" * 12, tokens=10)
    done(page)
    page.get_by_role("slider", name="Evaluation").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".fresh").nth(2)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [one.bounding_box() for one in page.locator(".column").all()]
    assert (boxes[0]["x"] == boxes[1]["x"]) == (width == 380)  # beside or below each other
    contrast = page.evaluate(COLOURS)
    assert len(contrast) > 40
    assert {text: ratio for text, ratio in contrast.items() if ratio < 4.5} == {}
    dark = "getComputedStyle(document.body).backgroundColor === 'rgb(17, 19, 23)'"
    assert page.evaluate(dark) == (scheme == "dark")
    other = "light" if scheme == "dark" else "dark"
    page.get_by_label("Colours").select_option(other)
    assert page.evaluate(dark) == (other == "dark")
    page.reload()
    assert page.evaluate(dark) == (other == "dark")


def test_keyboard_and_names(visit, address):
    """Every control has a name, is reached in the order it is read, and shows that it is."""
    page = visit(address)
    page.get_by_role("button", name="Compare with another order").click()
    write(page, tokens=4)
    done(page)
    devtools = page.context.new_cdp_session(page)
    nodes = devtools.send("Accessibility.getFullAXTree")["nodes"]
    kinds = {"button", "textbox", "combobox", "slider", "spinbutton", "checkbox", "group"}
    controls = [node for node in nodes if node.get("role", {}).get("value") in kinds]
    names = [node["name"]["value"] for node in controls if not node["ignored"]]
    assert len(names) > 20 and all(names)
    page.locator("body").click(position={"x": 2, "y": 2})
    reached, outlined = [], []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => { const e = document.activeElement;
                 return [e.id || e.name || e.dataset.name || e.className || e.tagName,
                         getComputedStyle(e).outlineStyle]; }"""
        )
        if name == "BODY":
            break
        reached.append(name)
        outlined.append(outline)
    order = ["theme", "prompt", "write", "SUMMARY", "model", "sampler", "block_size", "add",
             "alone", "max_tokens", "seed", "temperature", "top_p", "stop", "copy", "play",
             "slider", "speed"]  # fmt: skip
    assert [name for name in dict.fromkeys(reached) if name in order] == order
    assert set(outlined) <= {"solid", "auto"}


def test_headers_and_one_document(address):
    with urllib.request.urlopen(address) as answer:
        text, headers = answer.read().decode(), answer.headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"(?:src|href)=\"(?!data:)|https?://|@import|url\(|innerHTML", text)
    assert "{{" not in text
