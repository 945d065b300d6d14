"""What watchers are told is what happened, within bounds; the page and its files are whole."""

import asyncio
import json
import random
import re
import threading
import time
from contextlib import contextmanager

import httpx as http
import pytest
from server_fixtures import running

from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import FinishReason, Request, RequestEvent, StepRecord
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler
from nanollm.serve import page
from nanollm.serve.page import Feed, Snapshot, Told, frame, merge, new_tables, same_prefix
from nanollm.trace import Recorder, chrome_trace, simulate

CHAT = {"messages": [{"role": "user", "content": "Tell me more"}], "ignore_eos": True}


def make(name, num_prompt, max_tokens, first=0, **more):
    "A request; its prompt begins with `first`, so that prompts can differ from the start."
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return Request(name, [first, *range(1, num_prompt)], params, **more)


def data_of(text):
    "The objects in a text of server-sent events."
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


class Watcher:
    "What a client makes of the messages: the same as static/engine.js."

    def __init__(self, feed, tenant=""):
        self.feed, self.tenant, self.known = feed, tenant, None
        self.entries, self.steps = [], []

    def fetch(self):
        "Take what is pending, as `Audience` does."
        entries = []
        for entry in [*self.feed.fetch(), None]:
            if isinstance(entry, Told | dict):
                entries.append(entry)
                continue
            if self.known is not None and entries:
                self.take(frame(entries, self.tenant))
            entries = []
            if isinstance(entry, Snapshot) and entry.viewer in (self, None):
                told = [one.to(self.tenant) for one in entry.requests]
                self.known = {one["request"]: one | {"blocks": [*one["blocks"]]}
                              for one in told}

    def take(self, text):
        [message] = data_of(text)
        for event in message["events"]:
            before = self.known.get(event["request"], {"blocks": []})
            self.known[event["request"]] = before | event
        for step in message["steps"]:
            self.steps.append(step)
            for number, filled, output, *_ in step["works"]:
                self.known[number] |= {"num_computed_tokens": filled, "num_made": output}
        for number, same, blocks in message["tables"]:
            self.known[number]["blocks"][same:] = blocks

    @property
    def open(self):
        return {one["id"]: one for one in self.known.values() if one["status"] != "finished"}


class Reality:
    "A listener that lets watchers come, fetch and compare."

    def __init__(self, seed, scheduler):
        self.random, self.scheduler, self.feed = random.Random(seed), scheduler, Feed()
        self.watchers, self.num_compared = [], 0

    def __call__(self, event):
        self.feed(event)
        if not isinstance(event, StepRecord):
            return
        if self.random.random() < 0.1:
            self.watchers.append(Watcher(self.feed))
            self.feed.snapshot(self.watchers[-1])
        if self.watchers and self.random.random() < 0.3:
            self.compare()

    def compare(self):
        entries = [*self.feed.fetch()]
        for watcher in self.watchers:
            self.feed.pending.extend(entries)
            watcher.fetch()
        running = {r.request_id: r for r in self.scheduler.running}
        waiting = {r.request_id: r for r in self.scheduler.waiting}
        for watcher in self.watchers:
            assert watcher.open.keys() == running.keys() | waiting.keys()
            for name, told in watcher.open.items():
                request = (running | waiting)[name]
                assert told["status"] == request.status
                assert told["num_made"] == len(request.output_ids)
                assert told["blocks"] == request.block_table
                if name in running:
                    assert told["num_computed_tokens"] == request.num_computed_tokens
                self.num_compared += 1


@pytest.mark.parametrize("seed", range(20))
def test_watchers_know_what_is_there_whenever_they_come(seed):
    pick = random.Random(seed)
    cache = PrefixCachingBlockManager(pick.choice([12, 16, 40]), 4)
    scheduler = Scheduler(cache, ChunkedPrefill(), 6, pick.choice([8, 16, 64]))
    arrivals = [(pick.randrange(40), make(f"r{i}", pick.randrange(1, 24), pick.randrange(1, 20),
                                          pick.randrange(2))) for i in range(30)]
    reality = Reality(seed, scheduler)
    simulate(scheduler, arrivals, [reality])
    reality.compare()
    assert reality.num_compared > 10
    for watcher in reality.watchers:
        assert not watcher.open
        assert not any(told["blocks"] for told in watcher.known.values())


def test_nobody_watches_and_nothing_is_kept():
    feed = Feed()
    scheduler = Scheduler(PrefixCachingBlockManager(16, 4), ChunkedPrefill(), 4, 16)
    simulate(scheduler, [(0, make("a", 5, 30)), (3, make("b", 9, 3))], [feed])
    ledger = feed.ledger
    assert not (feed.pending or ledger.numbers or ledger.ended or ledger._tables)


def test_a_queue_that_nobody_fetches_is_bounded_and_ends_in_a_snapshot():
    feed = Feed(max_pending=50)
    scheduler = Scheduler(PrefixCachingBlockManager(64, 4), ChunkedPrefill(), 4, 16)
    watcher, most = Watcher(feed), []
    feed.snapshot(watcher)
    watcher.fetch()
    longest = make("long", 5, 200)

    def measure(event):
        feed(event)
        most.append(len(feed.pending))

    simulate(scheduler, [(0, longest), (2, make("b", 9, 3))], [measure])
    assert max(most) <= 50 and len(most) > 200
    assert any(isinstance(entry, Snapshot) and entry.viewer is None for entry in feed.pending)
    watcher.fetch()
    assert not watcher.open


def test_a_request_that_was_there_before_the_feed_gets_a_number_when_it_works():
    feed, request = Feed(), make("early", 5, 3)
    scheduler = Scheduler(PrefixCachingBlockManager(16, 4), ChunkedPrefill(), 4, 16)
    scheduler.add(request)
    watcher = Watcher(feed)
    feed.snapshot(watcher)
    simulate(scheduler, [], [feed])
    watcher.known = {}
    assert [entry.fields["event"] for entry in feed.pending if isinstance(entry, Told)] == [
        "admitted", "finished"]


def test_a_request_that_fails_leaves_nothing():
    feed, request = Feed(), make("a", 5, 3, shares=("me", "call"))
    feed.snapshot()
    feed(RequestEvent("queued", 0.0, request))
    request.finish(FinishReason.ERROR, 1.0, "no numbers")
    feed(RequestEvent("finished", 1.0, request))
    feed(StepRecord(0, 0.0, 1.0, (), 0, 0, 0.0))
    assert not feed.ledger.numbers and not feed.ledger.ended
    told = [entry for entry in feed.pending if isinstance(entry, Told)]
    assert told[-1].fields["reason"] == "error" and "no numbers" not in str(told[-1])


def step(number, works, start=0.0, tables=()):
    return {"start_ms": start, "end_ms": start + 1, "num_steps": 1, "num_waiting": number,
            "num_running": 1, "kv_usage": 0.5, "works": works, "tables": [*tables]}


@pytest.mark.parametrize("number", [0, 1, 2, 3, 24, 25, 49, 1000])
def test_merged_steps_have_the_same_sums(number):
    pick = random.Random(number)
    steps = []
    for i in range(number):
        works = [[name, i, i + 1, pick.randrange(1, 9), 1, pick.randrange(3), 0]
                 for name in pick.sample(range(5), 3)]
        steps.append(step(i, works, float(i)))
    found = merge(steps)
    assert len(found) <= page.MAX_STEPS and sum(one["num_steps"] for one in found) == number

    def sums(steps):
        all_works = [work for one in steps for work in one["works"]]
        return [[sum(work[i] for work in all_works if work[0] == name) for i in range(3, 7)]
                for name in range(5)]

    assert sums(found) == sums(steps)
    for left, right in zip(found, found[1:]):
        assert left["end_ms"] <= right["start_ms"]
    if steps:
        assert found[-1]["num_waiting"] == number - 1 and found[0]["start_ms"] == 0


@pytest.mark.parametrize("left, right, same", [
    ((), (), 0), ((), (1, 2), 0), ((1, 2), (1, 2, 3), 2), ((1, 2, 3), (1, 2), 2),
    ((1, 2, 3), (1, 5, 3), 1), ((4,), (5,), 0)])
def test_same_prefix(left, right, same):
    assert same_prefix(left, right) == same


def test_tables_are_told_once_for_a_message():
    entries = [step(0, [], tables=[(1, 0, (5, 6)), (2, 3, (9,))]),
               step(0, [], tables=[(1, 2, (7,)), (2, 4, (8,))]),
               step(0, [], tables=[(1, 1, (3,))])]
    assert new_tables(entries) == [(1, 0, (5, 3)), (2, 3, (9, 8))]
    gone = Told("", {"event": "preempted", "request": 1})
    assert new_tables([*entries, gone]) == [(1, 0, ()), (2, 3, (9, 8))]
    assert new_tables([*entries, gone, step(0, [], tables=[(1, 0, (4,))])])[0] == (1, 0, (4,))


def test_ids_are_for_their_owners():
    told = Told("mine", {"event": "queued", "request": 1, "id": "chatcmpl-1"})
    own, other = (data_of(frame([told], tenant))[0]["events"] for tenant in ("mine", "yours"))
    assert own == [told.fields] and other == [told.fields | {"id": None}]


def test_a_recording_tells_blocks_when_they_change():
    cache = PrefixCachingBlockManager(8, 4)
    recorder = Recorder(cache)
    arrivals = [(i, make(f"r{i}", 6, 12, first=i % 2)) for i in range(5)]
    simulate(Scheduler(cache, ChunkedPrefill(), 4, 16), arrivals, [recorder])
    assert any(event.kind == "preempted" for event, _ in recorder.events)
    trace = chrome_trace(recorder)
    assert trace["otherData"] == {"num_blocks": 8, "block_size": 4}
    told, known, num_told = {}, {}, 0
    for entry in trace["traceEvents"]:
        row, args = entry["tid"], entry["args"]
        if "blocks" in args:
            assert args["blocks"] != known.get(row)
            known[row], num_told = args["blocks"], num_told + 1
        if "num_new" in args:
            told[row, args["step"]] = known[row]
        if entry["name"] == "waits":
            known.pop(row, None)
    works = {(recorder.rows[work.request.request_id] + 2, record.step): work.blocks
             for record in recorder.steps for work in record.works}
    assert told == works and num_told < len(works) / 2
    assert chrome_trace(Recorder())["otherData"] == {}


# -- the page and its files


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def locked():
    with running(api_keys=("one", "two")) as found:
        yield found


def test_the_page_is_whole(server):
    answer = http.get(server.url + "/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    names = re.findall(r'"static/([\w.]+)"', answer.text)
    assert len(names) == 3
    seen = set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        found = http.get(f"{server.url}/static/{name}")
        kind = page.KINDS[name.rpartition(".")[2]]
        assert found.status_code == 200 and found.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert found.headers["x-content-type-options"] == "nosniff"
        names += re.findall(r'from "\./([\w.]+)"', found.text)
    for_books = {"replay.js", "replay.css"}
    assert seen | {"index.html"} | for_books == set(page.assets()), "none is left over"


def test_files_of_the_page_do_not_fill_the_log(server, caplog):
    mine = {"x-request-id": "page-files"}
    with caplog.at_level("INFO", "nanollm.serve.gate"):
        for path in ("/", "/static/main.js", "/static/page.css", "/static/missing.js"):
            http.get(server.url + path, headers=mine)
        http.head(server.url + "/static/main.js", headers=mine)
        deadline = time.monotonic() + 10  # a line is written after its answer
        while "missing.js" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = [line for line in caplog.messages if " page-files" in line]
    assert ['"GET /" 200' in lines[0], '"GET /static/missing.js" 404' in lines[1]] == [True] * 2
    assert len(lines) == 2


def test_the_page_needs_nobody_else():
    for name, text in page.assets().items():
        urls = set(re.findall(r"https?://[^\s\"']+", text)) - {"http://www.w3.org/2000/svg"}
        assert not urls, f"{name} asks {urls}"
        assert "innerHTML" not in text and "eval(" not in text, name
    html = page.assets()["index.html"]
    assert not re.search(r"<style|<script(?![^>]*src=)|\sstyle=|\son\w+=", html)
    ids = re.findall(r'\bid="([\w-]+)"', html)
    assert len(ids) == len(set(ids))
    labelled = set(re.findall(r'<label for="([\w-]+)"', html))
    assert labelled == set(re.findall(r'<(?:input|select|textarea) id="([\w-]+)"', html))


def luminance(color):
    "Relative luminance of #RRGGBB, as WCAG defines it."
    parts = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_both_themes_can_be_read():
    light, dark = re.findall(r":root \{([^}]*)\}", page.assets()["page.css"])
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9A-F]{6});", text))
                   for text in (light, dark))
    dark = light | dark
    texts = [("text", "page"), ("text", "panel"), ("text", "chosen"), ("text", "likely"),
             ("text", "doubtful"), ("quiet", "page"), ("quiet", "panel"), ("error", "page"),
             ("on-accent", "accent")]
    shapes = [("edge", "page"), ("accent", "page"), ("waits", "page"), ("makes", "computes")]
    for colors in (light, dark):
        for least, pairs in ((4.5, texts), (3, shapes)):
            for pair in pairs:
                low, high = sorted(luminance(colors[name]) for name in pair)
                assert (high + 0.05) / (low + 0.05) >= least, pair


@pytest.mark.parametrize("name", ["nothing.js", "..", "page.py", "%2e%2e%2fpage.py", "a/b"])
def test_other_files_are_not_there(server, name):
    answer = http.get(f"{server.url}/static/{name}")
    assert answer.status_code in (200, 404)
    assert answer.status_code == 404 or "<!doctype html>" in answer.text # ".." is the page


def test_the_page_knows_its_root_path():
    with running(root_path="/llm/") as found:
        for path in ("/llm", "/llm/", "/"):
            text = http.get(found.url + path).text
            assert 'src="/llm/static/main.js"' in text and '"static/' not in text
        assert http.get(found.url + "/llm/static/main.js").status_code == 200


def test_page_is_open_and_what_it_calls_is_not(locked):
    for path in ("/", "/static/main.js"):
        assert http.get(locked.url + path).status_code == 200
        assert http.head(locked.url + path).status_code == 200
        assert http.post(locked.url + path).status_code == 401
    for path in ("/v1/engine/events", "/static/a/b", "/static", "/v1/models"):
        assert http.get(locked.url + path).status_code == 401
    evil = {"host": "evil.example"}
    with running() as unlocked:
        assert http.get(unlocked.url + "/", headers=evil).status_code == 403


def test_openapi_is_silent_about_it(server):
    paths = http.get(server.url + "/openapi.json").json()["paths"]
    assert "/" not in paths and "/v1/engine/events" not in paths


# -- the stream


class Stream(threading.Thread):
    "Reads the events of a server until it is told to stop."

    def __init__(self, found, key=None):
        super().__init__(daemon=True)
        self.found, self.key, self.messages, self.status = found, key, [], None
        self.stopping = threading.Event()

    def run(self):
        url, headers = f"{self.found.url}/v1/engine/events", self.found.headers(self.key)
        with http.stream("GET", url, headers=headers, timeout=30) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.messages.append(json.loads(line[6:]))
                if self.stopping.is_set():
                    return

    def events(self):
        return [event for message in self.messages if message["type"] == "frame"
                for event in message["events"]]


def eventually(holds, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.02)


@contextmanager
def watching(found, *keys):
    streams = [Stream(found, key) for key in keys or (None,)]
    for stream in streams:
        stream.start()
    eventually(lambda: all(stream.messages for stream in streams))
    try:
        yield streams
    finally:
        for stream in streams:
            stream.stopping.set()
        for key in keys or (None,): # one more event wakes whoever still reads
            found.post("/v1/chat/completions", CHAT | {"max_tokens": 1}, key)
        for stream in streams:
            stream.join(20)
            assert not stream.is_alive()


def audience_of(found):
    return next(drain.__self__ for drain in found.api.drains
                if isinstance(getattr(drain, "__self__", None), page.Audience))


def test_a_request_is_told_from_beginning_to_end(server):
    with watching(server) as [stream]:
        answer = server.post("/v1/chat/completions", CHAT | {"max_tokens": 12, "n": 2}).json()
        eventually(lambda: sum(e["event"] == "finished" for e in stream.events()) == 2)
        first = stream.messages[0]
        assert first["type"] == "snapshot" and first["model"] == "tiny"
        assert first["num_blocks"] == 2048 and first["block_size"] == 16
        kinds = [(event["id"].removeprefix(answer["id"]), event["event"])
                 for event in stream.events()]
        for name in (".0", ".1"):
            assert [kind for other, kind in kinds if other == name] == [
                "queued", "admitted", "finished"]
        last = stream.events()[-1]
        assert last["num_made"] == 12 and last["reason"] == "length"
        assert last["queued_ms"] <= last["admitted_ms"] < last["first_token_ms"]
        assert last["first_token_ms"] < last["last_token_ms"] == last["ended_ms"]
        made = sum(work[4] for message in stream.messages[1:] for one in message["steps"]
                   for work in one["works"])
        assert made == 24
    eventually(lambda: not audience_of(server).viewers)
    assert not audience_of(server).feed.watched
    server.settled()


def test_tenants_see_that_others_work_and_not_who(locked):
    with watching(locked, "one", "two") as [mine, other]:
        answer = locked.post("/v1/chat/completions", CHAT | {"max_tokens": 5}, "one").json()
        for stream in (mine, other):
            eventually(lambda s=stream: any(e["event"] == "finished" for e in s.events()))
        assert {event["id"] for event in mine.events()} == {answer["id"]}
        assert {event["id"] for event in other.events()} == {None}


def test_messages_come_at_a_bounded_pace(server):
    with watching(server) as [stream]:
        start = time.monotonic()
        bodies = [CHAT | {"max_tokens": 1}] * 40 # each of them lets the engine rest
        for body in bodies:
            server.post("/v1/chat/completions", body)
        seconds = time.monotonic() - start
        eventually(lambda: len(stream.events()) == 3 * len(bodies))
        assert len(stream.messages) <= seconds / page.INTERVAL_S + 5
        assert all(len(message["steps"]) <= page.MAX_STEPS for message in stream.messages[1:])


def test_there_is_a_place_for_so_many(locked, monkeypatch):
    monkeypatch.setattr(page, "MAX_OWN", 2)
    with watching(locked, "one", "one"):
        answer = locked.get("/v1/engine/events", key="one")
        assert answer.status_code == 503 and "no place" in answer.json()["error"]["message"]
        with watching(locked, "two"):
            pass


def test_the_server_ends_with_viewers():
    with running() as found:
        stream = Stream(found)
        stream.start()
        eventually(lambda: stream.messages)
        assert found.do(audience_of(found).end())
        stream.join(5)
        assert not stream.is_alive()


class Idle:
    "Stands for an api and its engine."

    def __init__(self):
        self.engine, self.posted, self.dead = self, [], False
        self.args = type("Args", (), {"served_model_names": ("tiny",)})
        self.num_blocks = self.block_size = 16

    def listen(self, *listeners):
        pass

    def post(self, function, *args):
        self.posted.append((function, args))


async def slow_reader():
    api = Idle()
    audience = page.Audience(api)
    feed = audience.feed
    messages = audience.watch("")
    first = asyncio.create_task(anext(messages))
    await asyncio.sleep(0)
    [viewer] = audience.viewers
    feed.snapshot(viewer)
    audience.carry()
    assert data_of(await first)[0]["type"] == "snapshot"
    for i in range(page.MAX_MESSAGES + 30): # nobody reads
        feed(StepRecord(i, i, i + 1, (), 0, 0, 0.0))
        audience.carry()
    assert len(viewer.messages) <= page.MAX_MESSAGES and not viewer.follows
    assert api.posted[-1] == (feed.snapshot, (viewer,)) and len(api.posted) == 3
    feed.snapshot(viewer)
    audience.carry()
    feed(StepRecord(0, 0, 1, (), 3, 0, 0.0))
    audience.carry()
    snapshot, news = data_of(await anext(messages))
    assert snapshot["type"] == "snapshot" and news["steps"][0]["num_waiting"] == 3
    await messages.aclose()
    assert not audience.viewers and not feed.watched
    return audience


def test_a_slow_reader_begins_again():
    asyncio.run(slow_reader())


async def silence():
    audience = page.Audience(Idle())
    messages = audience.watch("")
    text = await anext(messages)
    audience.engine.dead = True
    rest = [text async for text in messages]
    return text, rest


def test_silence_has_a_sign_of_life_and_a_dead_engine_ends_the_stream(monkeypatch):
    monkeypatch.setattr(page, "HEARTBEAT_S", 0.05)
    text, rest = asyncio.run(silence())
    assert text.startswith(":") and not any(data_of(one) for one in rest)
