"""The page in Chromium. Where there is none, these tests are skipped; `.ci/run` installs one."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cupaged.engine.memory.block_tables import NO_BLOCK
from cupaged.engine.scheduling.block_watch import BlockWatch
from cupaged.engine.server.access import Access

from .conftest import MODEL, Running, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed: the page is not tested", allow_module_level=True)

from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def small(llama_dir):
    """A server whose memory is short, so that blocks move."""
    settings = {"num_gpu_blocks_override": 48, "swap_space": 0.1, "preemption_mode": "swap"}
    with Running(llama_dir, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, small):
    """The page of the server; nothing in it may fail, and nothing come from elsewhere."""
    with opened(browser, small) as page:
        yield page


@contextlib.contextmanager
def opened(browser, server, path="/", **settings):
    faults, hosts = [], set()
    page = browser.new_page(**settings)
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: hosts.add(re.match(r"\w+://[^/]*", request.url)[0]))
    page.goto(server.url + path)
    yield page
    page.close()
    assert not [text for text in faults if "Failed to load resource" not in text]
    assert hosts == {server.url}


@contextlib.contextmanager
def slow_steps(server, seconds: float):
    """Steps that a browser can follow."""
    step = server.engine.step

    def slow():
        time.sleep(seconds)
        return step()

    server.engine.step = slow
    yield
    server.engine.step = step


def set_settings(page: Page, **values) -> None:
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"#settings [name={name}]", str(value))
    page.click("#settings button[value=save]")


def ask(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def answered(page: Page, count: int = 1) -> None:
    expect(page.locator(".message.assistant .stats")).to_have_count(count)
    expect(page.locator("#send")).to_have_text("Send")


def events(*deltas: dict) -> str:
    """A streamed answer."""
    chunks = [{"choices": [{"delta": delta}]} for delta in deltas]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def answer_with(page: Page, body: str, status: int = 200) -> None:
    kind = "text/event-stream" if status == 200 else "application/json"
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=status, body=body, content_type=kind))


RENDERED = """async (texts) => {
    const { render } = await import("./page/markdown.js");
    return texts.map((text) => render(text).textContent);
}"""

# -- chat --------------------------------------------------------------------------------------------------


def test_a_conversation_says_what_the_api_says(page, small):
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    set_settings(page, temperature=0, max_tokens=40, seed=3, system="Be brief.")
    with slow_steps(small, 0.01):  # not all of it comes at once
        ask(page, "Hello")
        answered(page)
    expect(page.locator(".message.assistant .stats")).to_have_text(
        re.compile(r"first token \d\.\d\d s · [\d.]+ tokens/s · \d+ tokens?")
    )
    ask(page, "Go on")
    answered(page, 2)
    first, second = sent
    assert (first["temperature"], first["max_tokens"], first["seed"]) == (0, 40, 3)
    assert "top_p" not in first or first["top_p"] == 0.95
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    body = {**first, "stream": False}
    del body["stream_options"]
    said = httpx.post(f"{small.url}/v1/chat/completions", json=body).json()["choices"][0]["message"][
        "content"
    ]
    assert second["messages"][2:] == [
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Go on"},
    ]


def test_settings_hold_from_when_they_are_typed(page):
    """Send what the fields hold, even when the message follows in the very task that closes the dialog."""
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    page.click("#open-settings")
    page.fill("#settings [name=max_tokens]", "3")
    page.evaluate("""() => {
        document.querySelector("#settings button[value=save]").click();
        document.getElementById("input").value = "Hello";
        document.getElementById("form").requestSubmit();
    }""")
    answered(page)
    page.click("#open-settings")
    page.evaluate("""() => {
        document.getElementById("clear-settings").click();
        document.querySelector("#settings button[value=save]").click();
    }""")
    answer_with(page, events({"content": "Well."}))
    ask(page, "Again")
    answered(page, 2)
    assert [body.get("max_tokens") for body in bodies] == [3, None]


def test_an_answer_can_be_stopped(page, small):
    set_settings(page, max_tokens=200)
    with slow_steps(small, 0.1):
        ask(page, "Talk for long")
        expect(page.locator("#send")).to_have_text("Stop")
        expect(page.locator(".message.assistant .body")).not_to_have_text("")
        page.click("#send")
        answered(page)
        wait_until(lambda: not small.engine.request_ids)
    expect(page.locator(".message.assistant .stats")).to_contain_text("stopped")


def test_regenerate_and_edit_replace_what_follows(page):
    said = iter(["one", "two", "three"])
    sent = []

    def reply(route) -> None:
        sent.append([m["content"] for m in route.request.post_data_json["messages"]])
        route.fulfill(body=events({"content": next(said)}), content_type="text/event-stream")

    page.route("**/v1/chat/completions", reply)
    ask(page, "first")
    answered(page)
    page.get_by_role("button", name="Write another answer").click()
    expect(page.locator(".message.assistant .body")).to_have_text(["two"])
    answered(page)
    page.get_by_role("button", name="Edit the message").click()
    page.get_by_label("Edited message").fill("second")
    page.get_by_label("Edited message").press("Enter")
    expect(page.locator(".message.assistant .body")).to_have_text(["three"])
    expect(page.locator(".message.user .body")).to_have_text(["second"])
    assert sent == [["first"], ["first"], ["second"]]


def test_an_error_is_said_and_the_question_kept(page):
    ask(page, "x" * 400)
    expect(page.locator(".message.error")).to_contain_text("max_model_len")
    expect(page.locator("#input")).to_have_value("x" * 400)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.press("#input", "Enter")
    expect(page.locator(".message.error").last).to_contain_text("The server is away")
    page.unroute("**/v1/chat/completions")
    answer_with(page, "<html>", status=502)  # a proxy's
    page.press("#input", "Enter")
    expect(page.locator(".message.error").last).to_have_text("The server answered with status 502.")
    page.unroute("**/v1/chat/completions")
    failing = events({"content": "a"}).removesuffix("data: [DONE]\n\n")
    answer_with(page, failing + 'data: {"error": {"message": "it broke"}}\n\n')
    page.press("#input", "Enter")
    expect(page.locator(".message.error").last).to_have_text("it broke")
    expect(page.locator(".message.assistant .body")).to_have_text("a")


def test_a_model_without_a_template_is_explained(page):
    card = {"id": "m", "has_chat_template": False, "default_sampling_params": {}}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [card]}))
    page.reload()
    ask(page, "Hello")
    expect(page.locator(".message.error")).to_contain_text("no chat template")


def test_markdown_is_shown_and_never_run(page):
    text = """# Title
Some *soft* and **loud** words, `a*b*c` and 2 * 3 * 4, snake_case_name, <script>window.bad = 1</script>

1. one
2. two
   - nested <img src=x onerror="window.bad = 1">

```python
if a < b: print("**not bold**")
```

| a | b |
|---|---|
| 1 | **2** |

> quoted

[good](https://example.com/a_(b)) [bad](javascript:window.bad=1) ![image](https://example.com/x.png)
https://example.com/x.
"""
    answer_with(
        page, events({"reasoning_content": "hmm"}, *({"content": part} for part in re.split("(?=\n)", text)))
    )
    ask(page, "Show it")
    answered(page)
    body = page.locator(".message.assistant .body")
    expect(body.locator("h3")).to_have_text("Title")
    expect(body.locator("em")).to_have_text("soft")
    expect(body.locator("p > strong")).to_have_text("loud")
    expect(body.locator("p > code")).to_have_text("a*b*c")
    expect(body.locator("ol > li")).to_have_count(2)
    expect(body.locator("ol ul > li")).to_contain_text("nested <img")
    expect(body.locator("pre code")).to_have_text('if a < b: print("**not bold**")')
    expect(body.locator("td")).to_have_text(["1", "2"])
    expect(body.locator("blockquote")).to_have_text("quoted")
    expect(body.locator(".thinking")).to_contain_text("hmm")
    expect(body).to_contain_text("2 * 3 * 4, snake_case_name, <script>window.bad = 1</script>")
    links = body.locator("a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert links == [
        "https://example.com/a_(b)",
        "https://example.com/x.png",
        "https://example.com/x",
    ]
    assert body.locator("img, script").count() == 0
    assert page.evaluate("window.bad") is None


def test_markdown_loses_no_word_of_any_text(page, seed):
    """Markup of any kind, closed or not; only what follows a fence and the targets of links is left out."""
    rng = random.Random(seed)
    words = [
        *"*_`~#>|-+![].:\\ \n\n ",
        "**",
        "__",
        "``",
        "  ",
        "- ",
        "1. ",
        "\n\n",
        "|-|\n",
        "a",
        "bc",
        "d e",
    ]
    texts = ["".join(rng.choices(words, k=rng.randrange(1, 60))) for _ in range(400)]
    texts = [text for text in texts if "```" not in text and "~~~" not in text]
    shown = page.evaluate(RENDERED, texts)
    for text, result in zip(texts, shown):
        assert re.findall("[a-e]", result) == re.findall("[a-e]", text), repr(text)


def test_hostile_markdown_does_not_hang(page):
    repeated = ["**", "*a", "[", "> ", "_a ", "- ", "[a](", "http://", "|", "~~a", "1. ", "\\", "a|b\n"]
    texts = [part * 9000 for part in repeated]
    texts += ["`" * 9999 + " `" * 4000, "# " + " " * 9000 + "a", "|" * 9000 + "\n" + "-|" * 4500]
    for text in texts:
        start = time.monotonic()
        page.evaluate(RENDERED, [text])
        assert time.monotonic() - start < 10, text[:20]


def test_a_key_is_asked_for_and_sent(browser, llama_dir):
    access = Access(api_keys=("secret",))
    with Running(llama_dir, access=access) as locked, opened(browser, locked, "/#pool") as page:
        expect(page.locator("#key-reason")).to_contain_text("this server needs an API key")
        page.fill("#key-input", "wrong")
        page.press("#key-input", "Enter")
        expect(page.locator("#key-reason")).to_contain_text("not one of this server's")
        page.fill("#key-input", "secret")
        page.press("#key-input", "Enter")
        expect(page.locator("#model")).to_have_text(MODEL)
        expect(page.locator("#pool-status")).to_have_text("live")
        expect(page.locator("#pool-error")).to_be_hidden()


# -- the block pool ----------------------------------------------------------------------------------------


def load(server, count: int = 6) -> None:
    """Requests beside each other, of which some share a prefix and some fork."""

    def send(i: int) -> int:
        prompt = {"prompt": "a" * 44 + str(i) * i, "n": (3, 1, 2)[i % 3]}
        body = {"model": MODEL, "max_tokens": 60, "ignore_eos": True, "temperature": 1.0, **prompt}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code

    with ThreadPoolExecutor(count) as pool:
        assert set(pool.map(send, range(count))) == {200}


class Truth:
    """What the block manager held at each report, by the number of the report."""

    def __init__(self, server, monkeypatch) -> None:
        self.states: dict[int, dict] = {}
        self.happened: set[str] = set()
        self._blocks, self._scheduler = server.engine._blocks, server.engine._scheduler
        changes, snapshot = BlockWatch.changes, BlockWatch.snapshot

        def noted_changes(watch):
            report = changes(watch)
            if report is not None:
                self.states[report["number"]] = self.read()
                self.happened |= {event["type"] for event in report["happened"]}
            return report

        def noted_snapshot(watch):
            self.states[watch.number] = self.read()
            return snapshot(watch)

        monkeypatch.setattr(BlockWatch, "changes", noted_changes)
        monkeypatch.setattr(BlockWatch, "snapshot", noted_snapshot)

    def read(self) -> dict:
        pools = {}
        for name, pool in (("GPU", self._blocks.gpu), ("CPU", self._blocks.cpu)):
            keys = [pool.key_of(b) for b in range(pool.num_blocks)]
            pools[name] = {
                str(b): [references, None if keys[b] is None else keys[b][:8].hex()]
                for b, references in enumerate(pool.ref_counts)
                if references or keys[b] is not None
            }
        scheduler = self._scheduler
        requests = {}
        for group in (*scheduler.running, *scheduler.preempted, *scheduler.waiting):
            sequences = []
            for seq in group.live:
                medium, table = self._blocks.place(seq.seq_id)
                table = [None if b == NO_BLOCK else b for b in table]
                sequences.append([seq.seq_id, len(seq.token_ids), seq.num_computed, medium.upper(), table])
            requests[group.request_id] = [group.status.value, sequences]
        return {"pools": pools, "requests": requests}

    def check(self, page: Page) -> int:
        """Compare what the page shows; returns the number of the report."""
        state = page.evaluate("window.blockPool.state()")
        expected = self.states[state["number"]]
        assert {"pools": state["pools"], "requests": state["requests"]} == expected
        return state["number"]


def open_pool(page: Page) -> None:
    page.click("#tab-pool")
    expect(page.locator("#pool-status")).to_have_text("live")


def looks(page: Page) -> dict:
    """Return how cells look in the frame after the next one, which draws what is shown now."""
    return page.evaluate(
        """async () => {
            for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
            return Object.fromEntries(["GPU", "CPU"].map((medium) => [medium,
                [...Array(48).keys()].map((block) => window.blockPool.look(medium, block))]));
        }"""
    )


def pixel(page: Page, medium: str, block: int) -> list[int]:
    """The colour of a cell, above its lower edge."""
    return page.evaluate(
        """([medium, block]) => {
            const [x, y, cell] = window.blockPool.corner(medium, block), scale = devicePixelRatio;
            const context = document.getElementById("grid").getContext("2d");
            return [...context.getImageData((x + cell / 5) * scale, (y + cell * 0.8) * scale, 1, 1).data];
        }""",
        [medium, block],
    )


def test_the_cells_are_the_block_managers(page, small, monkeypatch):
    """While requests fork, write to shared blocks, and are swapped out and in; and of the past as well."""
    truth = Truth(small, monkeypatch)
    open_pool(page)
    numbers = set()
    with slow_steps(small, 0.02), ThreadPoolExecutor() as pool:
        loading = pool.submit(load, small)
        while not loading.done():
            numbers.add(truth.check(page))
        loading.result()
    assert {"fork", "copy_on_write", "swap_out", "swap_in", "prefix_hit"} <= truth.happened
    assert len(numbers) > 5
    expect(page.locator("#requests li")).to_have_count(0)
    wait_until(lambda: truth.check(page) == max(truth.states))

    page.click("#pause")
    expect(page.locator("#pool-status")).to_have_text("paused")
    latest = truth.check(page)
    past = []
    for _ in range(12):
        page.click("#back")
        past.append(truth.check(page))
    assert past == list(range(latest - 1, latest - 13, -1))
    page.click("#forward")
    assert truth.check(page) == past[-2]
    for value in (0, 500, 850):
        page.locator("#scrub").fill(str(value))
        number = truth.check(page)
        state = truth.states[number]
        for medium, cells in looks(page).items():
            for block, look in enumerate(cells):
                references, content = state["pools"][medium].get(str(block), [0, None])
                kind = "used" if references else "free" if content is None else "cached"
                assert (look["kind"], look["references"]) == (kind, references)
                holders = {
                    name
                    for name, (_, sequences) in state["requests"].items()
                    for *_, where, table in sequences
                    if where == medium and block in table
                }
                assert len(look["colors"]) == len(holders)
    page.click("#pause")
    expect(page.locator("#pool-status")).to_have_text("live")
    assert truth.check(page) == max(truth.states)


def test_cells_are_drawn_as_they_look(page, small):
    open_pool(page)
    with slow_steps(small, 0.1), ThreadPoolExecutor() as pool:
        body = {"model": MODEL, "prompt": "b" * 30, "max_tokens": 30, "ignore_eos": True}
        sent = pool.submit(httpx.post, f"{small.url}/v1/completions", json=body, timeout=60)
        expect(page.locator("#requests .state")).to_have_text("running")
        wait_until(lambda: len([c for c in looks(page)["GPU"] if c["kind"] == "used"]) > 5)
        page.wait_for_timeout(1300)  # nothing flashes any more
        page.click("#pause")
        page.wait_for_timeout(200)
        cells = looks(page)["GPU"]
        used = [b for b, cell in enumerate(cells) if cell["kind"] == "used" and cell["filled"] == 8]
        other = [b for b, cell in enumerate(cells) if cell["kind"] != "used"]
        colors = {tuple(pixel(page, "GPU", block)) for block in used[:3]}
        assert len(colors) == 1
        assert tuple(pixel(page, "GPU", other[0])) not in colors
        page.locator("#requests button").click()
        expect(page.locator("#table-panel")).to_be_visible()
        chips = page.locator("#block-table button").all_inner_texts()
        table = next(iter(page.evaluate("window.blockPool.state()")["requests"].values()))[1][0][4]
        assert [int(text.split("×")[0]) for text in chips] == table
        assert sent.result().status_code == 200


def test_a_lost_report_is_noticed(page, small, monkeypatch):
    truth = Truth(small, monkeypatch)
    open_pool(page)
    changes = BlockWatch.changes
    lost = []

    def forgetful(watch):
        report = changes(watch)
        if report is not None and not lost:
            lost.append(report)
            return None
        return report

    monkeypatch.setattr(BlockWatch, "changes", forgetful)
    load(small, 3)
    wait_until(lambda: lost and not small.engine.request_ids)
    expect(page.locator("#pool-status")).to_have_text("live")
    wait_until(lambda: truth.check(page) == max(n for n, s in truth.states.items() if not s["requests"]))


def test_the_past_is_bounded(page):
    """Ten minutes of reports: five are kept, less where they are large, and each state is right."""
    kept = page.evaluate(
        """async () => {
            const { History, PoolModel } = await import("./page/pool_model.js");
            const totals = { num_preemptions: 0, prefix_cache_queries: 0, prefix_cache_hits: 0 };
            const head = { ...totals, cpu: [], requests: [] };
            const first = { ...head, type: "snapshot", number: 0, time: 1000, gpu: [] };
            const model = new PoolModel(), history = new History();
            const small = new History({ maxSize: 20000 });
            const play = (report) => {
                model.apply(report);
                history.add(model, report, 100);
                small.add(model, report, 100);
            };
            play({ ...first, block_size: 4, num_gpu_blocks: 3, num_cpu_blocks: 0 });
            for (let i = 1; i <= 6000; i++)
                play({ ...head, type: "changes", number: i, time: 1000 + i / 10, gpu: [[i % 3, i, null]] });
            const { number, pools } = history.at(1400.05).model;
            const { start, end } = history;
            return [start, end, small.size, small.start, number, [...pools.GPU.references]];
        }"""
    )
    start, end, size, small_start, number, references = kept
    assert end == 1600
    assert 1280 <= start <= 1300
    assert size <= 20000
    assert small_start > 1500
    assert number == 4000
    assert references == [3999, 4000, 3998]


@pytest.mark.matrix
@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [360, 1440])
def test_it_fits_every_width(browser, small, width, scheme):
    settings = {"viewport": {"width": width, "height": 740}, "color_scheme": scheme}
    with opened(browser, small, "/#pool", **settings) as page:
        expect(page.locator("#pool-status")).to_have_text("live")
        fits = "document.documentElement.scrollWidth <= innerWidth"
        assert page.evaluate(fits)
        ground = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(ground)
        page.click("#theme")
        assert page.evaluate(ground) != before
        page.click("#tab-chat")
        assert page.evaluate(fits)
        expect(page.locator("#input")).to_be_in_viewport()


def test_it_is_used_by_keyboard(page):
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pool-status")).to_have_text("live")
    expect(page.locator("#tab-pool")).to_have_attribute("aria-selected", "true")
    page.focus("#grid")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#block-detail")).to_contain_text("Block 0:")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#block-detail")).to_contain_text("Block 1:")
    page.keyboard.press("Escape")
    controls = "button, input, textarea, canvas"
    names = page.evaluate(
        f"[...document.querySelectorAll('{controls}')].filter((e) => e.checkVisibility() && "
        "!(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.ariaHidden)).map((e) => e.id)"
    )
    assert names == []


def test_sample_requests_fill_the_pool(page, small):
    open_pool(page)
    page.locator("#sample, #sample-again").filter(visible=True).first.click()
    wait_until(lambda: small.engine.request_ids or page.locator("#events li").count())
    wait_until(lambda: not small.engine.request_ids)
    expect(page.locator("#events")).to_contain_text("forked")
