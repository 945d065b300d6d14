"""The door in front of replicas: fakes that die on cue, and two tiny engines beside it."""

import asyncio
import contextlib
import copy
import json
import re
import time
from types import SimpleNamespace

import pytest
from lora_folders import save
from server_fixtures import GRAMMARS, MODEL, ORACLE, TOKENIZER, prompt_of, solo_text

from nanollm.args import EngineArgs, ServerArgs
from nanollm.generate import generate
from nanollm.llm import adapters_of, make_engine
from nanollm.serve import replicas, responses
from nanollm.serve.api import Api
from nanollm.serve.async_engine import AsyncEngine
from nanollm.serve.gate import Gate
from nanollm.serve.replicas import (
    Chooser,
    Door,
    End,
    Forwarded,
    Head,
    Replica,
    ReplicaLost,
    error_events,
    forwarded,
    joined_metrics,
    prompt_text,
    run_app,
)

ARGS = ServerArgs(("tiny",))
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]


class Client:
    "Talks ASGI to an application, can hang up, and knows when each piece came."

    def __init__(self, app):
        self.app = app

    async def __call__(self, method, path, body=None, leave_after=None, headers=()):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
        path, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1",
            "method": method, "scheme": "http", "path": path, "raw_path": path.encode(),
            "query_string": query.encode(), "root_path": "", "client": ("127.0.0.1", 1),
            "headers": [(b"content-length", str(len(raw)).encode()), *headers],
            "server": ("127.0.0.1", 8000)}
        asked = [{"type": "http.request", "body": raw, "more_body": False}]
        gone = asyncio.Event()
        got = SimpleNamespace(status=None, headers={}, body=b"", pieces=[], ended=False)

        async def receive():
            if asked:
                return asked.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                assert got.status is None, "two heads"
                got.status = message["status"]
                got.headers = {k.decode(): v.decode() for k, v in message["headers"]}
                return
            assert not got.ended and got.status is not None
            got.body += message.get("body", b"")
            got.pieces.append((time.monotonic(), message.get("body", b"")))
            got.ended = not message.get("more_body", False)
            if leave_after is not None and len(got.pieces) >= leave_after:
                gone.set()

        await self.app(scope, receive, send)
        return got


class Fakes:
    "Replicas that follow a script: a list of messages, or errors to raise, for each call."

    def __init__(self, *scripts, told=None):
        self.scripts, self.calls, self.closed, self.told = list(scripts), [], 0, told or {}
        self.tells = []

    async def call(self, request):
        self.calls.append(request)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            for one in script:
                if isinstance(one, Exception):
                    raise one
                if isinstance(one, float):
                    await asyncio.sleep(one)
                    continue
                yield one if isinstance(one, list) else [one]
        finally:
            self.closed += 1

    async def tell(self, method, *args, timeout_s=5.0):
        self.tells.append((method, *args))
        return self.told.get(method, {})


def ask(fleet, method="POST", path="/v1/completions", body=None, **options):
    "One request through gate and door."
    client = Client(Gate(Door(fleet, ARGS), ARGS))
    body = {"prompt": "x"} if body is None and method == "POST" else body
    return asyncio.run(client(method, path, body, **options))


WHOLE = [Head(200, JSON), b'{"a":', b"1}", End(" note")]
LOST = ReplicaLost("it died")


def test_an_answer_passes_through():
    fleet = Fakes(WHOLE)
    got = ask(fleet, headers=[(b"x-request-id", b"mine")])
    assert (got.status, got.body, got.ended) == (200, b'{"a":1}', True)
    assert got.headers["x-request-id"] == "mine" and len(got.pieces) == 1
    [call] = fleet.calls
    assert (call.own_id, call.body, call.scope["path"]) == ("mine", b'{"prompt": "x"}',
                                                            "/v1/completions")
    assert fleet.closed == 1 and 0 <= call.waited_s < 5


def test_streams_are_not_held_back():
    gap = 0.05
    got = ask(Fakes([Head(200, SSE), b"data: 1\n\n", gap, b"data: 2\n\n", End("")]))
    assert [piece for _, piece in got.pieces] == [b"data: 1\n\n", b"data: 2\n\n", b""]
    assert got.pieces[1][0] - got.pieces[0][0] >= gap / 2


@pytest.mark.parametrize("begin", [
    [],
    [Head(200, SSE)],
    [Head(200, JSON), b'{"a":'],  # of a whole answer the client has nothing yet
    [b"", b""],
])
def test_a_lost_answer_is_tried_again(begin):
    fleet = Fakes([*begin, LOST], WHOLE)
    got = ask(fleet)
    assert (got.status, got.body) == (200, b'{"a":1}')
    assert len(fleet.calls) == 2 and fleet.calls[0].tried is fleet.calls[1].tried
    assert fleet.closed == 2


def test_an_answer_without_an_end_is_lost():
    assert ask(Fakes([Head(200, JSON), b"{"], WHOLE)).body == b'{"a":1}'
    assert ask(Fakes([b"", End("")], WHOLE)).body == b'{"a":1}'


def test_a_stream_that_has_begun_ends_with_an_error():
    fleet = Fakes([Head(200, SSE), b"data: 1\n\n", LOST], WHOLE)
    got = ask(fleet)
    events = [line[6:] for line in got.body.decode().split("\n\n") if line]
    assert events[0] == "1" and events[2] == "[DONE]" and got.ended
    assert json.loads(events[1])["error"]["code"] == "server_error"
    assert len(fleet.calls) == 1, "it was tried again after a token was sent"


def test_the_responses_api_has_an_event_for_it():
    last = b'data: {"sequence_number":4}\n\ndata: {"sequence_number":5}\n\n'
    text = error_events("/v1/responses", last).decode()
    name, payload = text.strip().split("\n")
    event = json.loads(payload.removeprefix("data: "))
    assert name == "event: error" and event["type"] == "error"
    assert event["sequence_number"] == 6 and event["message"]
    assert b'"sequence_number":0' in error_events("/v1/responses", b"")


def test_three_tries_and_no_more(monkeypatch):
    monkeypatch.setattr(replicas, "PAUSES_S", (0, 0, 0))
    fleet = Fakes([LOST], [LOST], [LOST], WHOLE)
    got = ask(fleet)
    assert got.status == 503 and json.loads(got.body)["error"]["code"] == "overloaded"
    assert got.headers["retry-after"] == "1"
    assert len(fleet.calls) == 3 and fleet.calls[0].tried is fleet.calls[2].tried


def test_a_silent_replica_is_lost(monkeypatch):
    monkeypatch.setattr(replicas, "IDLE_S", 0.05)
    fleet = Fakes([5.0, End("")], WHOLE)
    start = time.monotonic()
    assert ask(fleet).body == b'{"a":1}' and time.monotonic() - start < 4
    got = ask(Fakes([Head(200, SSE), b"data: 1\n\n", 5.0]))
    assert got.body.endswith(b"data: [DONE]\n\n") and b"error" in got.body


def test_signs_of_life_keep_a_slow_answer(monkeypatch):
    monkeypatch.setattr(replicas, "IDLE_S", 0.3)
    script = [*[0.1, b""] * 6, *WHOLE]
    assert ask(Fakes(script)).status == 200


@pytest.mark.parametrize("kind", [SSE, JSON])
def test_a_client_that_hangs_up_closes_the_call(kind):
    begun = Head(200, kind)
    fleet = Fakes([begun, b"data: 1\n\n", b"data: 2\n\n", 60.0, End("")])
    client = Client(Door(fleet, ARGS))

    async def run():
        scope = {"type": "http", "method": "POST", "path": "/v1/completions",
                 "query_string": b"", "headers": [],
                 "state": {"tenant": "", "own_id": "", "body": b"{}", "note": "",
                           "arrival_s": time.perf_counter()}}
        left = asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        task = asyncio.create_task(client.app(scope, receive, send))
        await asyncio.sleep(0.1)
        assert client.app.num_unfinished == 1 and not fleet.closed
        left.set()
        await asyncio.wait_for(task, 5)
        assert client.app.num_unfinished == 0 and fleet.closed == 1

    asyncio.run(run())


def test_errors_of_replicas_are_answers():
    bad = [Head(400, JSON), b'{"error":{}}', End("")]
    fleet = Fakes(bad)
    assert ask(fleet).status == 400 and len(fleet.calls) == 1


def read(path="/v1/chat/completions", tenant="", **form):
    scope = {"path": path, "method": "POST", "server": object(), "extensions": {},
             "state": {"tenant": tenant, "own_id": "", "arrival_s": time.perf_counter(),
                       "body": json.dumps(form).encode() if form else b""}}
    return forwarded(scope, ("tiny", "alias"))


LONG = "word " * 100
TURNS = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "yes"},
         {"role": "user", "content": LONG[::-1]}]


def test_prompts_that_begin_alike_have_digests_that_do():
    first, second = read(messages=TURNS[:1]), read(messages=TURNS, stream=True, temperature=1)
    assert len(first.digests) == len(second.digests[:len(first.digests)]) >= 7
    shared = sum(a == b for a, b in zip(first.digests, second.digests))
    assert shared >= len(first.digests) - 1
    assert read(messages=TURNS[2:]).digests[0] != first.digests[0]
    tools = [{"type": "function", "function": {"name": "f", "description": LONG}}]
    assert read(messages=TURNS[:1], tools=tools).digests[0] != first.digests[0]


def test_tenants_salts_and_adapters_do_not_share():
    found = [read(prompt=LONG, **more).digests for more in (
        {}, {"tenant": "t"}, {"cache_salt": "s"}, {"model": "adapter"})]
    assert len({digests[0] for digests in found}) == 4
    assert read(prompt=LONG, model="alias").digests == read(prompt=LONG, model="tiny").digests


@pytest.mark.parametrize("form", [
    {"prompt": [1, 2, 3] * 100}, {"prompt": ["a" * 100, "b"]}, {"messages": 5},
    {"input": "x" * 100}, {"prompt": "é" * 100}, {}])
def test_any_form_has_a_text(form):
    assert isinstance(prompt_text(form), str)
    assert read(**form).digests or len(prompt_text(form)) < 64


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"5", b'"x"', b"\xff", b"[" * 5000,
                                 b'{"prompt": "\\ud800"}'])
def test_what_is_no_form_is_the_replicas_to_refuse(raw):
    fleet = Fakes([Head(400, JSON), b"{}", End("")])
    assert ask(fleet, body=raw).status == 400
    assert not fleet.calls[0].digests and fleet.calls[0].body == raw


@pytest.mark.parametrize(("path", "form", "pinned"), [
    ("/v1/responses/resp_abcd1234-00ff", {}, "abcd1234"),
    ("/v1/responses/resp_abcd1234-mine-00ff/cancel", {}, "abcd1234"),
    ("/v1/requests/chatcmpl-abcd1234-00ff/trace", {}, "abcd1234"),
    ("/v1/requests/cmpl-abcd1234-00ff/trace", {}, "abcd1234"),
    ("/v1/responses", {"previous_response_id": "resp_abcd1234-00ff"}, "abcd1234"),
    ("/v1/responses", {"previous_response_id": ["resp_abcd1234-00ff"]}, ""),
    ("/v1/responses/resp_00ff", {}, ""),
    ("/v1/completions", {"prompt": "resp_abcd1234-00ff"}, "")])
def test_what_is_stored_is_looked_for_where_it_is(path, form, pinned):
    assert read(path, **form).pinned == pinned


def test_the_chooser_counts_what_is_open():
    chooser, names = Chooser("least_loaded"), ["a", "b", "c"]
    first = [chooser.choose(f"call{i}", Forwarded({}, b""), names) for i in range(3)]
    assert sorted(first) == names
    chooser.done("call1")
    assert chooser.choose("call3", Forwarded({}, b""), names) == first[1]
    chooser.choose("call3", Forwarded({}, b""), names)  # it did not arrive: counted once
    assert len(chooser.open) == 3
    chooser.done("unknown")


def test_the_chooser_pins_and_avoids():
    chooser = Chooser("round_robin")
    assert chooser.choose("1", Forwarded({}, b"", pinned="b"), ["a", "b"]) == "b"
    assert chooser.choose("2", Forwarded({}, b"", pinned="gone"), ["a", "b"]) in "ab"
    again = Forwarded({}, b"")
    names = ["a", "b", "c"]
    assert {chooser.choose(f"x{i}", again, names) for i in range(3)} == {*names}
    assert sorted(again.tried) == names
    assert chooser.choose("3", again, ["a"]) == "a"  # better than nobody
    with pytest.raises(ValueError, match="no replica"):
        chooser.choose("4", again, [])


def test_the_chooser_remembers_who_read_what():
    chooser = Chooser("prefix")

    def choose(call_id, *names):
        return chooser.choose(call_id, Forwarded({}, b"", digests=(b"1", b"2")), names)

    name = choose("first", "a", "b")
    assert {choose(f"call{i}", "a", "b") for i in range(6)} == {name}
    for i in range(20):
        choose(f"more{i}", "a", "b")
    assert len(set(chooser.open.values())) == 2, "the guard let one replica drown"
    other = ({"a", "b"} - {name}).pop()
    assert choose("gone", other) == other


PAGE = '''# HELP n:requests_total Ended.
# TYPE n:requests_total counter
n:requests_total{model_name="m"} 2.0
# HELP n:kv_cache_usage_perc Share.
# TYPE n:kv_cache_usage_perc gauge
n:kv_cache_usage_perc{model_name="m"} 0.5
# HELP n:seconds Time.
# TYPE n:seconds histogram
n:seconds_bucket{le="0.1",model_name="m"} 1.0
n:seconds_bucket{le="+Inf",model_name="m"} 4.0
# HELP n:cache_config_info Always 1.
# TYPE n:cache_config_info gauge
n:cache_config_info{block_size="16"} 1.0
# HELP n:plain Without labels.
# TYPE n:plain gauge
n:plain 3.0
'''


def test_metrics_are_summed_averaged_or_told_once():
    other = PAGE.replace(" 2.0", " 5.0").replace(" 0.5", " 0.1") + 'n:plain{a="b c"} 1.0\n'
    page = joined_metrics({"a": PAGE, "b": other})
    assert 'n:requests_total{model_name="m"} 7.0' in page
    assert 'n:kv_cache_usage_perc{model_name="m"} 0.3' in page
    assert 'n:seconds_bucket{le="+Inf",model_name="m"} 8.0' in page
    assert 'n:cache_config_info{block_size="16"} 1.0' in page
    assert "n:plain 6.0" in page and 'n:plain{a="b c"} 1.0' in page
    assert page.count("# TYPE") == PAGE.count("# TYPE")
    assert joined_metrics({"a": PAGE}) == PAGE and joined_metrics({}) == "\n"


def test_metrics_by_replica_keep_every_line():
    page = joined_metrics({"a": PAGE, "b": PAGE}, by_replica=True)
    assert 'n:requests_total{model_name="m",replica="a"} 2.0' in page
    assert 'n:requests_total{model_name="m",replica="b"} 2.0' in page
    assert 'n:plain{replica="b"} 3.0' in page and page.count("# TYPE") == PAGE.count("# TYPE")


def test_health_is_that_of_the_best_replica():
    def told(*oks):
        return {"status": {str(i): {"ok": ok, "server_load": 2} for i, ok in enumerate(oks)}}

    assert ask(Fakes([], told=told(False, True)), "GET", "/health").status == 200
    assert ask(Fakes([], told=told(False)), "GET", "/health").status == 503
    assert ask(Fakes([], told=told()), "GET", "/health").status == 503
    got = ask(Fakes([], told=told(True, True)), "GET", "/load")
    assert json.loads(got.body) == {"server_load": 4}


def test_many_who_ask_for_the_health_cost_one_question():
    fleet = Fakes([], told={"status": {"a": {"ok": True, "server_load": 0}}})
    app = Gate(Door(fleet, ARGS), ARGS)

    async def run():
        return await asyncio.gather(*(Client(app)("GET", "/health") for _ in range(20)))

    assert {got.status for got in asyncio.run(run())} == {200} and len(fleet.tells) == 1


def test_the_end_is_told_to_all():
    fleet = Fakes(WHOLE, told={"drain": {"a": True, "b": True}})

    async def run():
        one = Door(fleet, ARGS)
        assert await one.drain(0.1)
        got = await Client(Gate(one, ARGS))("GET", "/health")
        assert got.status == 503 and b"shutting down" in got.body
        fleet.told["drain"]["b"] = False
        return await one.drain(0.1)

    assert asyncio.run(run()) is False and ("drain", 0.1) in fleet.tells


def test_a_replica_that_dies_while_it_drains_has_not_delivered():
    two = {tag: {"ok": True, "server_load": 0} for tag in ("a", "b")}
    fleet = Fakes(WHOLE, told={"status": two, "drain": {"a": True}})
    assert asyncio.run(Door(fleet, ARGS).drain(0.1)) is False
    fleet.told["drain"]["b"] = True
    assert asyncio.run(Door(fleet, ARGS).drain(0.1)) is True


def test_an_application_that_raises_still_ends():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})
        raise RuntimeError("on purpose")

    async def run():
        return [one async for many in run_app(app, {}, {"note": "n"}) for one in many]

    assert asyncio.run(run()) == [Head(500, []), b"no", End("n")]


def test_pieces_are_joined_but_the_first_and_the_last_do_not_wait(monkeypatch):
    monkeypatch.setattr(replicas, "GATHER_S", 30.0)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(9):
            await send({"type": "http.response.body", "body": b"%d" % i, "more_body": True})
            await asyncio.sleep(0.01)

    async def run():
        return [many async for many in run_app(app, {}, {"note": ""})]

    start = time.monotonic()
    found = asyncio.run(run())
    assert found == [[Head(200, []), b"0"], [b"12345678", End("")]]
    assert time.monotonic() - start < 10


def test_silence_has_signs_of_life_and_closing_is_a_disconnect(monkeypatch):
    monkeypatch.setattr(replicas, "BEAT_S", 0.01)
    heard = []

    async def app(scope, receive, send):
        heard.append(await receive())

    async def run():
        async with contextlib.aclosing(run_app(app, {}, {"note": ""})) as answer:
            for _ in range(3):
                assert await anext(answer) == [b""]
            assert not heard
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert heard == [{"type": "http.disconnect"}]


def test_an_application_that_does_not_listen_is_cancelled(monkeypatch):
    monkeypatch.setattr(replicas, "GRACE_S", 0.05)
    monkeypatch.setattr(replicas, "BEAT_S", 0.01)
    ends = []

    async def app(scope, receive, send):
        try:
            await asyncio.sleep(60)
        finally:
            ends.append(True)

    async def run():
        async with contextlib.aclosing(run_app(app, {}, {"note": ""})) as answer:
            await anext(answer)
        await asyncio.sleep(0.3)

    asyncio.run(run())
    assert ends


class Local:
    "Replicas in this process, each with an engine, that can be killed."

    def __init__(self, num=2, policy="prefix", engine_options=None, **server_options):
        self.options = EngineArgs(**{"num_kv_blocks": 512, "self_check": True}
                                  | (engine_options or {}))
        self.args = ServerArgs(("tiny",), **server_options)
        self.chooser, self.replicas, self.dead = Chooser(policy), {}, set()
        self.num, self.calls = num, 0

    def add(self):
        tag = f"replica{len(self.replicas)}"
        model = copy.deepcopy(MODEL) if self.options.enable_lora else MODEL
        engine = make_engine(self.options, model, TOKENIZER)
        outside = AsyncEngine(engine, TOKENIZER, self.args.max_queued_requests)
        api = Api(outside, self.args, grammars=GRAMMARS,
                  adapters=adapters_of(engine, self.options))
        self.replicas[tag] = Replica(api, [responses.router], tag)
        return self.replicas[tag].start()

    async def __aenter__(self):
        for _ in range(self.num):
            await self.add()
        self.door = Door(self, self.args)
        return Client(Gate(self.door, self.args))

    async def __aexit__(self, *error):
        for tag, replica in self.replicas.items():
            engine = replica.api.engine
            for _ in range(200):
                if engine.idle:
                    break
                await asyncio.sleep(0.02)
            assert engine.idle, (tag, engine.streams)
            await engine.check()
            await replica.stop()

    async def call(self, request):
        self.calls += 1
        name = f"call{self.calls}"
        tag = self.chooser.choose(name, request, self.replicas.keys() - self.dead)
        try:
            async with contextlib.aclosing(self.replicas[tag].answer(request)) as answer:
                async for messages in answer:
                    if tag in self.dead:
                        raise ReplicaLost("killed")
                    yield messages
        finally:
            self.chooser.done(name)

    async def tell(self, method, *args, timeout_s=5.0):
        alive = {tag: replica for tag, replica in self.replicas.items() if tag not in self.dead}
        told = await asyncio.gather(*(one.tell(method, *args) for one in alive.values()))
        return dict(zip(alive, told))  # all at once, as a broadcast does


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0}


def texts(got):
    "The text of a stream, its error, whether it has an end."
    events = re.findall(r"data: (.*)\n\n", got.body.decode())
    assert events[-1] == "[DONE]", events
    found = [json.loads(one) for one in events[:-1]]
    errors = [one["error"] for one in found if "error" in one]
    return "".join(c["text"] for one in found for c in one.get("choices", ())), errors


@pytest.mark.parametrize("policy", ["prefix", "least_loaded", "round_robin"])
def test_engines_behind_a_door_answer_as_alone(policy):
    async def run():
        async with Local(policy=policy) as ask:
            prompts = [f"{BODY['prompt']} {i}" for i in range(8)]
            got = await asyncio.gather(*(
                ask("POST", COMPLETIONS, BODY | {"prompt": prompt, "stream": i % 2 == 0})
                for i, prompt in enumerate(prompts)))
            for i, (one, prompt) in enumerate(zip(got, prompts)):
                whole = i % 2 and json.loads(one.body)["choices"][0]["text"]
                assert (whole or texts(one)[0]) == solo_text(prompt, 8)
            return [*map(str, got)]

    answers = asyncio.run(run())
    used = {tag for tag in ("replica0", "replica1") for one in answers if f"cmpl-{tag}-" in one}
    assert len(used) == 2


def test_a_stored_response_is_found_from_everywhere():
    async def run():
        async with Local(policy="round_robin") as ask:
            form = {"input": "hello", "max_output_tokens": 4, "temperature": 0}
            ids = [json.loads((await ask("POST", "/v1/responses", form)).body)["id"]
                   for _ in range(4)]
            assert {re.match(r"resp_(\w+)-", one)[1] for one in ids} == {"replica0", "replica1"}
            for one in ids:
                for path in (f"/v1/responses/{one}", f"/v1/responses/{one}/input_items"):
                    assert (await ask("GET", path)).status == 200
                more = form | {"previous_response_id": one}
                assert (await ask("POST", "/v1/responses", more)).status == 200
            gone = ids[0].split("_")[1].split("-")[0]
            ask.app.app.fleet.dead.add(gone)
            for one in ids:
                status = 404 if gone in one else 200
                assert (await ask("GET", f"/v1/responses/{one}")).status == status
                more = form | {"previous_response_id": one}
                assert (await ask("POST", "/v1/responses", more)).status == status
            assert (await ask("DELETE", f"/v1/responses/{ids[1]}")).status == 200
            assert (await ask("GET", f"/v1/responses/{ids[1]}")).status == 404

    asyncio.run(run())


def test_a_client_that_leaves_aborts_in_the_engine():
    async def run():
        async with Local(num=1) as ask:
            body = BODY | {"max_tokens": 400, "ignore_eos": True, "stream": True}
            got = await ask("POST", COMPLETIONS, body, leave_after=2)
            engine = ask.app.app.fleet.replicas["replica0"].api.engine
            for _ in range(100):
                if engine.idle:
                    break
                await asyncio.sleep(0.02)
            page = (await ask("GET", "/metrics")).body.decode()
            assert 'request_success_total{finished_reason="abort"' in page
            tokens = re.search(r"nanollm:generation_tokens_total\{.*\} (.*)", page)[1]
            assert float(tokens) < 390, "it ran on"
            return got

    assert not asyncio.run(run()).ended


def test_a_replica_killed_under_streams_costs_only_its_own():
    async def run():
        async with Local(policy="round_robin") as ask:
            fleet = ask.app.app.fleet
            body = BODY | {"max_tokens": 120, "ignore_eos": True, "stream": True}
            jobs = [asyncio.create_task(ask("POST", COMPLETIONS, body)) for _ in range(8)]
            while sum(len(r.api.engine.streams) for r in fleet.replicas.values()) < 8:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            fleet.dead.add("replica0")
            results = [texts(one) for one in await asyncio.gather(*jobs)]
            fleet.dead.clear()  # its engine has aborted; the check at the end looks at it
            return results

    results = asyncio.run(run())
    ids = list(generate(ORACLE, prompt_of(BODY["prompt"]), 120, ()))
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    cut = [text for text, errors in results if errors]
    fine = [text for text, errors in results if not errors]
    assert len(cut) <= 4 and len(fine) >= 4
    assert all(text == whole for text in fine)
    assert all(whole.startswith(text.rstrip("\ufffd")) for text in cut)


def test_adapters_go_to_all_and_to_those_that_come_later(tmp_path):
    save(tmp_path / "one", seed=1)
    save(tmp_path / "two", seed=2)
    options = {"enable_lora": True}

    async def run():
        async with Local(policy="round_robin", engine_options=options,
                         lora_dir=str(tmp_path)) as ask:
            load = {"lora_name": "voice", "lora_path": "one"}
            assert (await ask("POST", "/v1/load_lora_adapter", load)).status == 200
            assert (await ask("POST", "/v1/load_lora_adapter", load)).status == 400
            bad = load | {"lora_name": "x", "lora_path": "none"}
            assert (await ask("POST", "/v1/load_lora_adapter", bad)).status == 404

            async def answers(name):
                got = [await ask("POST", COMPLETIONS, BODY | {"model": name}) for _ in range(6)]
                return {one.status for one in got}, {
                    json.loads(one.body)["choices"][0]["text"]
                    for one in got if one.status == 200}

            statuses, first = await answers("voice")
            assert statuses == {200} and len(first) == 1
            await ask.app.app.fleet.add()
            assert await answers("voice") == ({200}, first)
            models = [await ask("GET", "/v1/models") for _ in range(6)]
            assert all(b"voice" in one.body for one in models)
            again = load | {"lora_path": "two", "load_inplace": True}
            assert (await ask("POST", "/v1/load_lora_adapter", again)).status == 200
            statuses, second = await answers("voice")
            assert statuses == {200} and len(second) == 1 and second != first
            gone = await ask("POST", "/v1/unload_lora_adapter", {"lora_name": "voice"})
            assert gone.status == 200
            assert await answers("voice") == ({404}, set())

    asyncio.run(run())


def test_metrics_add_up_over_engines():
    async def run():
        async with Local(policy="round_robin") as ask:
            for _ in range(6):
                await ask("POST", COMPLETIONS, BODY)
            await asyncio.sleep(0.2)
            return [(await ask("GET", path)).body.decode()
                    for path in ("/metrics", "/metrics?by=replica")]

    total, apart = asyncio.run(run())
    name = 'nanollm:request_success_total{finished_reason="length",model_name="tiny"'
    assert f"{name}}} 6.0" in total
    assert apart.count(name) == 2 and f'{name},replica="replica0"}} 3.0' in apart


def test_drain_lets_open_answers_end_and_takes_no_new_ones():
    async def run():
        async with Local() as ask:
            body = BODY | {"max_tokens": 60, "ignore_eos": True, "stream": True}
            open_one = asyncio.create_task(ask("POST", COMPLETIONS, body))
            fleet = ask.app.app.fleet
            while not any(r.api.engine.streams for r in fleet.replicas.values()):
                await asyncio.sleep(0.005)
            draining = asyncio.create_task(ask.app.app.drain(20.0))
            await asyncio.sleep(0.02)
            assert (await ask("POST", COMPLETIONS, BODY)).status == 503
            text, errors = texts(await open_one)
            assert await draining and not errors and text

    asyncio.run(run())
