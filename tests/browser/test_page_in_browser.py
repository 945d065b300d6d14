"""The page in a real browser: Debian's chromium, driven by playwright, and a server that runs.

Screenshots of every test lie in the folder that NANOLLM_SCREENSHOTS names, for those who look.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import faults
import httpx
import pytest
from server_fixtures import running, solo, solo_text

from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import Request
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler
from nanollm.trace import Recorder, simulate, write_trace

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
expect = playwright.expect

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server():
    with running(faults=True) as found:
        yield found


@pytest.fixture
def slow(server):
    "The server, while each of its steps takes a while."
    server.post("/debug/faults", {"step_delay_s": 0.03})
    yield server
    server.post("/debug/faults", {})
    server.settled()


class Tab:
    "A page, what its console said, and shortcuts."

    def __init__(self, page, url):
        self.page, self.errors = page, []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)

    def __getitem__(self, selector):
        return self.page.locator(selector)

    def connected(self):
        expect(self["#live-status"]).to_have_text("connected", timeout=15_000)
        return self

    def leave(self):
        "Go to an empty page, so that the server may end."
        errors = [*self.errors]
        self.page.goto("about:blank")
        assert not errors

    def options(self, **values):
        self["#options"].evaluate("one => { one.open = true }")
        for name, value in values.items():
            self[f"#{name}"].fill(str(value))
        self["#options"].evaluate("one => { one.open = false }")

    def ask(self, text, **options):
        self.options(**options)
        self["#question"].fill(text)
        self["#question"].press("Enter")

    def answered(self):
        "Wait for the end of the last answer, and return its text."
        expect(self[".assistant .foot"].last).to_contain_text("·", timeout=30_000)
        return self[".assistant .answer > .text"].last.inner_text()


@pytest.fixture
def tab(browser, request):
    "Open tabs; in the end there must be nothing in their consoles, and pictures are kept."
    tabs, folder = [], os.environ.get("NANOLLM_SCREENSHOTS")

    def open_tab(url, console=True, viewport=WIDE, **options):
        page = browser.new_context(viewport=viewport, **options).new_page()
        tabs.append((Tab(page, url), console))
        return tabs[-1][0]

    yield open_tab
    for i, (one, console) in enumerate(tabs):
        if folder:
            name = re.sub(r"\W+", "-", request.node.name).strip("-")
            Path(folder).mkdir(parents=True, exist_ok=True)
            one.page.screenshot(path=f"{folder}/{name}-{i}.png", full_page=True)
        one.page.context.close()
        assert not (console and one.errors), one.errors


def eventually(holds, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.05)


# -- the playground


def test_send_and_stream(tab, slow):
    one = tab(slow.url).connected()
    text = "Tell me something"
    one.ask(text, max_tokens=40, temperature=0)
    body = one[".assistant .answer > .text"]
    eventually(lambda: body.count() and body.inner_text())
    part = body.inner_text()
    expect(one["#send"]).to_be_disabled()
    whole = one.answered()
    assert whole.startswith(part.rstrip()) and len(whole) > len(part)
    expected = solo_text([{"role": "user", "content": text}], 40)
    assert whole.split() == expected.split()
    expect(one["#send"]).to_be_enabled()
    expect(one["#talk-status"]).to_contain_text("its limit of tokens")
    expect(one[".foot"]).to_contain_text("40 tokens")
    one.ask("And then?", max_tokens=3)
    one.answered()
    assert one["article"].count() == 4


def test_stop_keeps_what_is_there_and_frees_the_engine(tab, slow):
    one, endless = tab(slow.url).connected(), "Go on for ever, 0"
    assert len(solo([{"role": "user", "content": endless}], 200)) == 200
    for how in ("click", "Escape"):
        one["#clear"].click()
        one.ask(endless, max_tokens=800, temperature=0)
        eventually(lambda: one[".assistant .answer > .text"].last.inner_text())
        assert slow.engine.has_unfinished
        if how == "click":
            one["#stop"].click()
        else:
            one.page.keyboard.press(how)
        expect(one[".foot"].last).to_contain_text("stopped")
        eventually(lambda: not slow.engine.has_unfinished)
        assert one[".assistant .answer > .text"].last.inner_text()
    expect(one["#talk-error"]).to_be_empty()


def test_two_tabs_at_once(tab, slow):
    first, second = tab(slow.url).connected(), tab(slow.url).connected()
    first.ask("The first", max_tokens=60, temperature=0)
    second.ask("The second", max_tokens=60, temperature=0)
    eventually(lambda: len(slow.engine.scheduler.running) == 2)
    for one, text in ((first, "The first"), (second, "The second")):
        expected = solo_text([{"role": "user", "content": text}], 60)
        assert one.answered().split() == expected.split()
        assert one["#requests tr"].count() >= 2, "each of them sees both at work"


def test_several_answers_a_schema_and_probabilities(tab, server):
    one = tab(server.url).connected()
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}
    one["#options"].evaluate("one => { one.open = true }")
    one["#logprobs"].check()
    one.ask("Yes or no?", n=3, seed=7, max_tokens=60, schema=json.dumps(schema))
    one.answered()
    assert one[".answer"].count() == 3
    tokens = one[".answer"].first.locator(".tok")
    assert tokens.count() > 2
    tokens.nth(1).hover()
    expect(one[".token:visible"]).to_contain_text("most probable")
    said = "".join(tokens.all_inner_texts())
    assert set(json.loads(re.search(r"\{.*\}", said, re.S).group(0))) == {"a"}


def test_thoughts_and_calls(tab, server):
    one = tab(server.url).connected()
    one.page.evaluate("""async () => {
      const { Answer } = await import("/static/answer.js");
      const answer = new Answer("");
      document.querySelector("#turns").replaceChildren(answer.element);
      const call = (index, fields) => ({ delta: { tool_calls: [{ index, ...fields }] } });
      answer.add({ delta: { reasoning: "Let me " } });
      answer.add({ delta: { reasoning: "think." } });
      answer.add({ delta: { content: "<b>I look.</b>" } });
      answer.add(call(0, { id: "call_1", function: { name: "weather", arguments: "" } }));
      answer.add(call(0, { function: { arguments: '{"city": ' } }));
      answer.add({ ...call(0, { function: { arguments: '"Rome"}' } }), finish_reason: "stop" });
      window.answer = answer;
    }""")
    expect(one[".thoughts"]).not_to_have_attribute("open", "")
    one[".thoughts summary"].click()
    expect(one[".thoughts .text"]).to_have_text("Let me think.")
    expect(one[".answer > .text"]).to_have_text("<b>I look.</b>")
    expect(one[".calls pre"]).to_have_text('weather({"city": "Rome"})')
    message = one.page.evaluate("window.answer.message")
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'


def test_tokens_are_whole_characters_and_the_end_is_no_text(tab, server):
    one = tab(server.url).connected()
    one.page.evaluate("""async () => {
      const { Answer } = await import("/static/answer.js");
      const answer = new Answer("");
      document.querySelector("#turns").replaceChildren(answer.element);
      const report = (token, bytes) => ({ token, bytes, logprob: -0.1, top_logprobs: [] });
      const add = (content, ...content_) => answer.add(
        { delta: { content }, logprobs: { content: content_ } });
      add("An", report("An", [65, 110]));
      add(undefined, report(" \ufffd", [32, 240, 159]), report("\ufffd", [166]));
      add(" 🦉", report("\ufffd", [137]));
      add(undefined, report("<|im_end|>", [...new TextEncoder().encode("<|im_end|>")]));
      answer.add({ delta: {}, finish_reason: "stop" });
    }""")
    assert "".join(one[".tok:not(.control)"].all_text_contents()) == "An 🦉"
    expect(one[".tok.control"]).to_have_text("<|im_end|>")


def test_the_story_counts_right_and_large_caches_are_not_all_drawn(tab, server):
    one = tab(server.url).connected()
    one.ask("Hello", max_tokens=9)
    one.answered()
    one["#requests button"].first.click()
    expect(one["#story-lines"]).to_contain_text("for this request alone")
    expect(one["#blocks-text"]).to_contain_text("The first 512 are drawn; the others are free.")
    height = one["#blocks"].evaluate("one => one.clientHeight")
    drawn = one.page.evaluate("""async () => {
      const { drawBlocks } = await import("/static/draw.js");
      const engine = { requests: new Map(), numBlocks: 5000, blockSize: 16,
        left: new Set([0, 700]) };
      return drawBlocks(document.querySelector("#blocks"), engine, null);
    }""")
    assert drawn == {"held": 0, "shared": 0, "all": 5000, "drawn": 1024} and height


def test_the_word_on_the_main_button_can_be_read_under_the_pointer(tab, server):
    one = tab(server.url).connected()
    one["#send"].hover()
    colors = one["#send"].evaluate("""one => {
      const { color, backgroundColor } = getComputedStyle(one);
      return [color, backgroundColor];
    }""")
    lights = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors]
    assert abs(lights[0] - lights[1]) > 300


def test_errors_are_shown_as_the_server_said_them(tab, server):
    one = tab(server.url, console=False).connected()
    one.ask("Hello", temperature=9)
    told = server.post("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Hello"}], "temperature": 9}).json()
    expect(one["#talk-error"]).to_have_text(told["error"]["message"])
    expect(one["#question"]).to_have_value("Hello") # to be sent again
    assert not one["article"].count()
    one.ask("Hello", temperature=1, schema="{")
    expect(one["#talk-error"]).to_contain_text("The schema is no JSON")
    one.ask("Hello", schema="", max_tokens=2)
    one.answered()
    expect(one["#talk-error"]).to_be_empty()


def test_copied_commands_run(tab, server):
    one = tab(server.url, permissions=["clipboard-read", "clipboard-write"]).connected()
    one.options(max_tokens=8, temperature=0, top_k=5, stop_strings="it's\nnever")
    one["#question"].fill("What's \"this\"?")
    found = {}
    for name, words in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
        one[f"#copy-{name}"].click()
        expect(one["#talk-status"]).to_contain_text("clipboard")
        text = one.page.evaluate("navigator.clipboard.readText()")
        done = subprocess.run([*words, text], capture_output=True, text=True, timeout=60)
        assert not done.returncode, done.stderr
        found[name] = done.stdout
    said = json.loads(found["curl"])["choices"][0]["message"]["content"]
    assert found["python"].removesuffix("\n") == said


# -- the key, the connection


def test_a_key_is_wanted(tab):
    with running(api_keys=("secret",)) as found:
        one = tab(found.url, console=False)
        expect(one["#key"]).to_be_focused()
        expect(one["#talk-error"]).to_contain_text("Incorrect API key")
        one["#key"].fill("wrong")
        one["#key"].press("Enter")
        expect(one["#key-form"]).to_be_visible()
        expect(one["#talk-error"]).to_contain_text("Incorrect API key")
        one["#key"].fill("secret")
        one["#key"].press("Enter")
        one.connected()
        expect(one["#key-form"]).to_be_hidden()
        expect(one["#talk-error"]).to_be_empty()
        one.ask("Hello", max_tokens=3)
        one.answered()
        assert "secret" not in one.page.content()


@contextmanager
def process(port):
    "A server that is a process of its own, and is killed in the end if it has not ended."
    words = ["tiny-llama", "--load-format", "dummy", "--quiet", "--port", str(port)]
    found = subprocess.Popen([sys.executable, faults.__file__, *words])
    try:
        eventually(lambda: reaches(port), 120)
        yield found
    finally:
        found.kill()
        found.wait()


def reaches(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_the_server_is_killed_restarted_and_ended(tab):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with process(port):
        one = tab(f"http://127.0.0.1:{port}", console=False).connected()
        one.ask("Hello", max_tokens=3)
        one.answered()
        httpx.post(f"http://127.0.0.1:{port}/debug/faults", json={"step_delay_s": 0.1})
        one.ask("This will not end", max_tokens=1900)
        eventually(lambda: one[".assistant .answer > .text"].last.inner_text())
    expect(one["#talk-error"]).to_contain_text("connection was lost", timeout=15_000)
    expect(one["#live-status"]).to_contain_text("connecting again", timeout=15_000)
    expect(one["#live-error"]).not_to_be_empty()
    with process(port) as found:
        expect(one["#live-status"]).to_have_text("connected", timeout=30_000)
        expect(one["#live-error"]).to_be_empty()
        one.ask("Hello again", max_tokens=3)
        one.answered()
        expect(one["#requests tr"]).to_have_count(1) # of the new engine
        found.terminate()
        start = time.monotonic()
        assert found.wait(20) == 0, "who only watches does not keep the server"
        assert time.monotonic() - start < 15
        expect(one["#live-status"]).to_contain_text("connecting again", timeout=15_000)


def test_behind_a_root_path(tab):
    with running(root_path="/llm") as found:
        for path in ("/llm", "/llm/"):
            one = tab(found.url + path).connected()
            one.ask("Hello", max_tokens=3)
            one.answered()
            one.leave()


# -- the live view


@contextmanager
def streams(server, number, max_tokens):
    "Let so many requests with one beginning run."
    begin = "The same beginning for all of them, long enough for some blocks. " * 4
    bodies = [{"messages": [{"role": "user", "content": f"{begin}{i}"}], "ignore_eos": True,
               "max_tokens": max_tokens} for i in range(number)]
    threads = [threading.Thread(target=server.post, args=("/v1/chat/completions", body))
               for body in bodies]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()


INK = """canvas => {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const colors = new Set();
  for (let i = 0; i < pixels.length; i += 4) {
    colors.add(pixels[i] + "," + pixels[i + 1] + "," + pixels[i + 2]);
  }
  return colors.size;
}"""


@pytest.mark.parametrize("viewport, scheme", [
    (WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")],
    ids=["wide-light", "wide-dark", "phone-light", "phone-dark"])
def test_live_view_of_16_streams(tab, slow, viewport, scheme):
    one = tab(slow.url, viewport=viewport, color_scheme=scheme).connected()
    if viewport is PHONE:
        expect(one["#engine"]).to_be_hidden()
        one["#show-engine"].click()
        expect(one["#talk"]).to_be_hidden()
    with streams(slow, 16, 70):
        expect(one["#requests tr"]).to_have_count(16, timeout=15_000)
        eventually(lambda: one["#requests td:nth-child(2)"].all_inner_texts().count("running")
                   == 16)
        expect(one["#numbers"]).to_contain_text("Tokens made/s")
        eventually(lambda: re.search(r"(\d+) of them by several",
                                     one["#blocks-text"].inner_text()).group(1) > "0")
        assert one["#gantt"].evaluate(INK) > 5 and one["#blocks"].evaluate(INK) > 5
        one["#gantt"].click(position={"x": 100, "y": 40}) # the third row
        expect(one["#story"]).to_be_visible()
        expect(one["#story-title"]).to_contain_text("#")
    eventually(lambda: set(one["#requests td:nth-child(5)"].all_inner_texts()) == {"70"})
    button = one["#requests button"].first
    button.focus()
    button.press("Enter")
    for words in ("Waited", "in the prefix cache", "First token", "Ended by its limit"):
        expect(one["#story-lines"]).to_contain_text(words)
    sizes = one.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1], "nothing is wider than the screen"


def test_the_story_of_my_answer(tab, server):
    one = tab(server.url).connected()
    one.ask("Hello", max_tokens=9)
    one.answered()
    one[".foot button"].click()
    expect(one["#story"]).to_be_focused()
    expect(one["#story-lines"]).to_contain_text("9 tokens")


def test_what_the_page_knows_is_what_the_engine_has(tab, slow):
    one = tab(slow.url).connected()
    with streams(slow, 5, 60):
        eventually(lambda: len(slow.engine.scheduler.running) == 5)
        later = tab(slow.url).connected() # in the middle
        time.sleep(0.5)
    for each in (one, later):
        eventually(lambda e=each: e["#requests td:nth-child(2)"].all_inner_texts()[:5]
                   == ["length"] * 5)
        expect(each["#blocks-text"]).to_contain_text(re.compile(r"^0 of 2048 blocks are held"))
        assert each["#requests td:nth-child(5)"].all_inner_texts()[:5] == ["60"] * 5


def test_pause_and_window(tab, slow):
    one = tab(slow.url).connected()
    with streams(slow, 2, 60):
        expect(one["#requests tr"]).to_have_count(2)
        one["#pause"].click()
        expect(one["#pause"]).to_have_attribute("aria-pressed", "true")
        one["#window"].select_option("2")
        one["#pause"].click()
        expect(one["#pause"]).to_have_text("Pause")


def recording(path):
    cache = PrefixCachingBlockManager(16, 4)
    recorder = Recorder(cache)
    arrivals = [(i, Request(f"r{i}", [*range(5 + 4 * i)], SamplingParams(
        max_tokens=6, temperature=0, ignore_eos=True))) for i in range(4)]
    simulate(Scheduler(cache, ChunkedPrefill(), 4, 8), arrivals, [recorder])
    write_trace(recorder, path)


def test_a_recording_is_shown_and_left(tab, server, tmp_path):
    one = tab(server.url).connected()
    recording(tmp_path / "trace.json")
    one["#recording"].set_input_files(tmp_path / "trace.json")
    expect(one["#live-status"]).to_have_text("the recording trace.json")
    expect(one["#requests tr"]).to_have_count(4)
    assert one["#requests td:nth-child(5)"].all_inner_texts() == ["6"] * 4
    assert one["#requests td:nth-child(3)"].all_inner_texts() == ["17", "13", "9", "5"]
    assert one["#requests td:nth-child(4)"].all_inner_texts() == ["12", "8", "4", "0"]
    assert one["#requests th button"].all_inner_texts() == ["r3", "r2", "r1", "r0"]
    expect(one["#blocks-text"]).to_contain_text("0 of 16 blocks are held")
    one["#requests button"].first.click()
    expect(one["#story-lines"]).to_contain_text("Ended by its limit of tokens")
    one["#until"].fill("400")
    expect(one["#blocks-text"]).to_contain_text(re.compile("^[1-9]+ of 16 blocks are held"))
    assert "running" in one["#requests td:nth-child(2)"].all_inner_texts()
    one["#go-live"].click()
    expect(one["#scrub"]).to_be_hidden()
    expect(one["#live-status"]).to_have_text("connected")
    (tmp_path / "other.json").write_text("[1, 2]")
    one["#recording"].set_input_files(tmp_path / "other.json")
    expect(one["#live-error"]).to_have_text("This file is no recording of an engine.")


@pytest.mark.parametrize("chapter", ["12_block_manager", "15_prefix_cache", "31_page"])
def test_the_book_plays_its_recordings(browser, chapter):
    cells = json.loads((ROOT / f"nbs/{chapter}.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    [html] = ["".join(output["data"]["text/html"]) for output in outputs
              if "nanollm-replay" in str(output.get("data", {}).get("text/html"))]
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route("**/nbs/page.html", lambda route: route.fulfill(
        content_type="text/html", body=f"<!doctype html><body>{html}"))
    page.route("**/static/*", lambda route: route.fulfill(
        path=ROOT / "nanollm/serve/static" / route.request.url.rsplit("/", 1)[1]))
    page.goto("http://book.example/nbs/page.html")
    replay = page.locator(".nanollm-replay")
    expect(replay.locator("canvas").first).to_be_visible()
    assert replay.locator("canvas").first.evaluate(INK) > 4
    colors = {}
    for moment in ("0", "700"):
        replay.locator("input").fill(moment)
        colors[moment] = replay.locator("canvas").nth(1).evaluate(INK)
    assert colors["700"] > colors["0"], "blocks are held in between"
    replay.locator("canvas").first.click(position={"x": 100, "y": 30})
    expect(replay.locator("li").first).to_contain_text("Waited")
    replay.locator("button").click()
    expect(replay.locator("button")).to_have_text("Stop")
    if folder := os.environ.get("NANOLLM_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/book-{chapter}.png", full_page=True)
    page.close()
    assert not errors


# -- for everybody


NAMES = """() => [...document.querySelectorAll(
    "button, input, select, textarea, canvas, summary")]
  .filter(one => !(one.textContent.trim() || one.getAttribute("aria-label")
    || one.labels?.length)).map(one => one.id)"""


def test_keyboard_names_and_reduced_motion(tab, server):
    one = tab(server.url, reduced_motion="reduce").connected()
    assert one.page.evaluate(NAMES) == [], "everything that can be used has a name"
    one.page.keyboard.press("Tab")
    expect(one[".skip"]).to_be_focused()
    one.page.keyboard.press("Enter")
    expect(one["#question"]).to_be_focused()
    one.page.keyboard.type("Hello")
    one.page.keyboard.press("Shift+Enter")
    one.page.keyboard.type("there")
    expect(one["#question"]).to_have_value("Hello\nthere")
    one.page.keyboard.press("Enter")
    expect(one[".user .text"]).to_have_text("Hello\nthere")
    expect(one["#stop"]).to_be_disabled(timeout=30_000)
    reached = set()
    for _ in range(40):
        one.page.keyboard.press("Tab")
        reached.add(one.page.evaluate("document.activeElement.id"))
    wanted = {"send", "clear", "copy-curl", "copy-python", "window", "pause", "recording"}
    assert wanted <= reached
