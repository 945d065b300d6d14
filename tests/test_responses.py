"The Responses API without HTTP: its events on every path, readers, conversations, bounds."

import asyncio
import contextlib
import gc
import inspect
import json
import logging
import random
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import pytest
from faults import Faults
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter
from server_fixtures import GRAMMARS, MODEL, TOKENIZER, running, solo_text

from nanollm.args import EngineArgs, ServerArgs
from nanollm.chat import Piece, PlainParser, ReasoningParser, encode_chat
from nanollm.llm import Delta, make_engine
from nanollm.sampling import TokenLogprobs
from nanollm.serve.async_engine import AsyncEngine, Overloaded
from nanollm.serve.events import (
    EventLog,
    ItemWriter,
    Json,
    Transcript,
    own_fields,
    told_fields,
    write,
    write_event,
    write_object,
    write_response,
)
from nanollm.serve.items import (
    MAX_ITEMS,
    Item,
    ResponsesRequest,
    read_items,
    to_messages,
)
from nanollm.serve.protocol import ApiError, api_error
from nanollm.serve.responses import (
    ResponsesApi,
    ResponseStore,
    Run,
    cancel_response,
    delete_response,
    page_of,
    router,
    wait_until_fetched,
)
from nanollm.serve.server import Api, Call

EVENT = TypeAdapter(ResponseStreamEvent)
LAST = {"response.completed", "response.incomplete", "response.failed"}
LONG = dict(stream=True, background=True, max_output_tokens=1500, ignore_eos=True)
ECHOED = """error incomplete_details instructions metadata model output parallel_tool_calls
    temperature top_p max_output_tokens previous_response_id background store text tools
    tool_choice truncation top_logprobs reasoning service_tier user usage completed_at
    presence_penalty frequency_penalty max_tool_calls safety_identifier prompt_cache_key"""


@contextlib.asynccontextmanager
async def served(store=None, max_queued=1024, parsers=None, **engine_options):
    "An interface over the tiny model; at the end nothing may be left over."
    options = {"num_kv_blocks": 1024, "self_check": True} | engine_options
    engine = make_engine(EngineArgs(**options), MODEL, TOKENIZER)
    forward, plan = engine.runner.forward, engine.scheduler.policy
    outside = AsyncEngine(engine, TOKENIZER, max_queued)
    server = Api(outside, ServerArgs(("tiny",)), grammars=GRAMMARS)
    server.parsers = parsers or server.parsers
    api = ResponsesApi(server, ResponseStore() if store is None else store)
    api.faults, api.engine, api.core = Faults(engine), server.engine, engine
    await api.engine.start()
    try:
        yield api
        async with asyncio.timeout(20):
            while api.engine.num_unfinished or engine.has_unfinished:
                await asyncio.sleep(0.01)
        engine.check()
        assert not engine.scheduler.cache.usage
    finally:
        await api.engine.stop()
        engine.runner.forward, engine.scheduler.policy = forward, plan


def test_async(function):
    "Run an asynchronous test, with a limit so that it fails rather than hangs."

    def test(**arguments):
        async def limited():
            async with asyncio.timeout(60):
                await function(**arguments)

        asyncio.run(limited())

    # pytest looks for parameters
    test.__name__, test.__signature__ = function.__name__, inspect.signature(function)
    return test


test_async.__test__ = False


def form_of(given="Hello", **fields):
    fields = {"temperature": 0, "max_output_tokens": 8, "ignore_eos": True} | fields
    form = ResponsesRequest(input=given, **fields)
    form.check()
    return form


def asked_by(tenant):
    "What a route knows of a request."
    return SimpleNamespace(state=SimpleNamespace(tenant=tenant, own_id="", arrival_s=None))


async def create(api, given="Hello", tenant="", **fields):
    form = form_of(given, **fields)
    return await api.create(Call(api.api, asked_by(tenant), form, "resp_"))


async def cancel(api, tenant, response_id):
    return (await cancel_response(response_id, asked_by(tenant), api)).body


async def delete(api, tenant, response_id):
    return await delete_response(response_id, asked_by(tenant), api)


def read(body):
    "A response as it goes over the wire, as the client's type."
    check_response(json.loads(body))
    return Response.model_validate_json(body)


def seen(run):
    return read(run.body)


async def ended(api, *args, **fields):
    return read(await (await create(api, *args, **fields)).finished())


def ids_in(store):
    return [run.id for run in store.runs.values()]


def size_of(store):
    return [sum(size) for size in zip([0, 0], *store.sizes().values())]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


def raw(event):
    text = event if isinstance(event, str) else event.decode()
    head, rest = text.split("\n", 1)
    assert rest.startswith("data: ") and text.endswith("\n\n") and len(text.splitlines()) == 3
    fields = json.loads(rest[6:])
    assert head == f"event: {fields['type']}"
    return fields


def types_of(events):
    return [raw(event)["type"].removeprefix("response.") for event in events]


def check_response(fields):
    "One response object as it goes over the wire."
    Response.model_validate(fields, strict=True)
    assert type(fields["created_at"]) is int and fields["object"] == "response"
    assert "output_text" not in fields and set(ECHOED.split()) <= set(fields)
    assert all("strict" in tool for tool in fields["tools"])
    status, usage = fields["status"], fields["usage"]
    assert status in ("queued", "in_progress", "completed", "incomplete", "failed", "cancelled")
    assert (fields["error"] is not None) == (status == "failed")
    reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert fields["incomplete_details"] == reason
    assert (type(fields["completed_at"]) is int) == (status == "completed")
    if status in ("queued", "in_progress"):
        assert usage is None and not fields["output"]
    if status in ("completed", "incomplete"):
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["output_tokens"] >= 1
        assert usage["input_tokens_details"].keys() == {"cached_tokens", "cache_write_tokens"}
        assert usage["output_tokens_details"].keys() == {"reasoning_tokens"}
    for i, item in enumerate(fields["output"]):
        whole = status == "completed" or i < len(fields["output"]) - 1
        if item["type"] == "function_call":
            whole = is_json(item["arguments"])
        assert item["status"] == ("completed" if whole else "incomplete")


def is_json(text):
    with contextlib.suppress(ValueError):
        json.loads(text)
        return True
    return False


PARTS = {"output_text": "message", "reasoning_text": "reasoning"}


def check_items(fields, output):
    "Each item of the output: what its events say, in which order, is what it is."
    for index, item in enumerate(output):
        own = [one for one in fields if one.get("output_index") == index]
        kinds = [one["type"].removeprefix("response.") for one in own]
        assert all(one["item_id"] == item["id"] for one in own if "item_id" in one)
        assert all(one["item"]["id"] == item["id"] for one in own if "item" in one)
        text = "".join(one["delta"] for one in own if "delta" in one)
        if item["type"] == "function_call":
            deltas = ["function_call_arguments.delta"] * (len(own) - 3)
            assert kinds == ["output_item.added", *deltas, "function_call_arguments.done",
                             "output_item.done"]
            assert own[0]["item"] == item | {"arguments": "", "status": "in_progress"}
            assert text == item["arguments"] == own[-2]["arguments"]
            assert own[-2]["name"] == item["name"] and own[-1]["item"] == item
            assert not any("content_index" in one or "logprobs" in one for one in own)
            continue
        [name] = [name for name, kind in PARTS.items() if kind == item["type"]]
        deltas = [f"{name}.delta"] * (len(own) - 5)
        assert kinds == ["output_item.added", "content_part.added", *deltas, f"{name}.done",
                         "content_part.done", "output_item.done"]
        assert all(one["content_index"] == 0 for one in own if "content_index" in one)
        [part] = item["content"]
        assert text == part["text"] == own[-3]["text"] and part == own[-2]["part"]
        assert own[-1]["item"] == item and part["type"] == name
        if item["type"] == "message":
            reports = [report for one in own if "delta" in one for report in one["logprobs"]]
            assert reports == part["logprobs"] == own[-3]["logprobs"]
        else:
            assert item["summary"] == []


def check_events(run):
    "The contract of a finished stream; returns what the events say."
    fields = [raw(event) for event in run.log.events]
    events = [EVENT.validate_python(one, strict=True) for one in fields]
    types = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert types[0] == "response.created" and types.count("response.created") == 1
    assert [kind for kind in types if kind in LAST] == types[-1:]
    assert types.count("response.queued") == int(run.background)
    for one in fields:
        if "response" in one:
            check_response(one["response"])
            assert one["response"]["id"] == run.id
    final = fields[-1]["response"]
    check_items(fields, final["output"])
    state = ResponseStreamState(input_tools=[], text_format=omit)
    heard = [found for event in events for found in state.handle_event(event)]
    assert heard[-1].type == types[-1] and final == json.loads(run.body)
    return fields


# The endings


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("background", [False, True])
@test_async
async def test_a_response_says_what_the_naive_loop_says(stream, background):
    async with served() as api:
        run = await create(api, stream=stream, background=background, max_output_tokens=12)
        response = read(await run.finished())
        messages = [{"role": "user", "content": "Hello"}]
        assert response.output_text == solo_text(messages, 12)
        assert response.status == "incomplete" and response.usage.output_tokens == 12
        assert response.usage.input_tokens == len(encode_chat(TOKENIZER, messages))
        assert bool(run.log.events) == stream
        if stream:
            check_events(run)


@test_async
async def test_every_ending_keeps_the_contract():
    async with served() as api:
        text = (await ended(api, max_output_tokens=60)).output_text
        stop = text[len(text) // 2:][:2]
        done = await create(api, stream=True, max_output_tokens=300, stop=[stop])
        response = read(await done.finished())
        assert response.status == "completed" and stop not in response.output_text
        short = await create(api, stream=True, background=True, max_output_tokens=1,
                             top_logprobs=3)
        assert read(await short.finished()).status == "incomplete"
        hung = await create(api, **LONG)
        await until(lambda: len(hung.log.events) > 10)
        await hung.cancel()
        assert seen(hung).status == "cancelled" and seen(hung).usage.output_tokens >= 1
        for run in (done, short, hung):
            check_events(run)
        assert raw(hung.log.events[-1])["type"] == "response.incomplete"
        [part] = seen(short).output[0].content
        assert len(part.logprobs) == 1 and len(part.logprobs[0].top_logprobs) == 3


@test_async
async def test_order_of_the_first_events():
    async with served() as api:
        for background, names in ((False, ["created", "in_progress"]),
                                  (True, ["created", "queued", "in_progress"])):
            run = await create(api, stream=True, background=background)
            status = raw(run.log.events[0])["response"]["status"]
            assert status == ("queued" if background else "in_progress")
            await run.finished()
            types = types_of(run.log.events)
            assert types[:len(names) + 2] == [*names, "output_item.added", "content_part.added"]
            assert types[-4:] == ["output_text.done", "content_part.done", "output_item.done",
                                  "incomplete"]


@test_async
async def test_a_failure_in_the_middle_and_one_before_the_first_token():
    async with served() as api:
        run = await create(api, **LONG)
        other = await create(api, **LONG | {"max_output_tokens": 40})
        await until(lambda: len(run.log.events) > 10)
        api.faults.fail_request = run.id
        with pytest.raises(ApiError, match="forbidden") as caught:
            await run.finished()
        assert caught.value.status == 500 and seen(run).error.code == "server_error"
        assert len(seen(run).output) == 1 and seen(run).usage.output_tokens >= 1
        assert read(await other.finished()).status == "incomplete"
        api.faults.fail_request = "resp"
        early = await create(api, stream=True)
        with pytest.raises(ApiError):
            await early.finished()
        assert seen(early).output == [] and seen(early).usage is None
        assert types_of(early.log.events) == ["created", "in_progress", "failed"]
        api.faults.fail_request = ""
        check_events(run)
        check_events(early)
        for failed in (run, early):
            with pytest.raises(ApiError, match="failed and cannot be continued"):
                await create(api, previous_response_id=failed.id)


@test_async
async def test_a_request_that_the_thread_refuses_fails_and_hangs_nobody():
    async with served() as api:
        refuse = lambda *args, **options: (_ for _ in ()).throw(ValueError("no"))  # noqa: E731
        queue, api.core.queue = api.core.queue, refuse
        run = await create(api, stream=True)
        with pytest.raises(ApiError, match="could not"):
            await run.finished()
        api.core.queue = queue
        assert check_events(run)[-1]["type"] == "response.failed"


@test_async
async def test_the_end_of_the_server_is_an_error_with_its_own_status():
    async with served() as api:
        run = await create(api, **LONG)
        await until(lambda: len(run.log.events) > 6)
        assert not await api.engine.drain(0.0)
        with pytest.raises(ApiError, match="shutting down") as caught:
            await run.finished()
        assert caught.value.status == 503
        assert check_events(run)[-1]["response"]["error"]["code"] == "server_error"


@test_async
async def test_an_error_of_our_own_is_not_told():
    async with served() as api:
        for name in ("push", "finish"):
            run = await create(api, stream=True, background=True)
            setattr(run.transcript, name, lambda *args: 1 / 0)
            with pytest.raises(ApiError) as caught:
                await run.finished()
            assert "division" not in str(caught.value)
            assert b"division" not in run.log.events[-1]
            check_events(run)


@pytest.mark.parametrize("how", ["task", "cancel", "delete", "twice"])
@test_async
async def test_a_run_that_is_cancelled_before_it_began(how):
    async with served() as api:
        run = await create(api, **LONG)  # its task has not had a turn yet
        if how == "task":  # as the server does when a client hangs up
            run.task.cancel()
            await until(lambda: run.log.ended)
        elif how == "cancel":
            await cancel(api, "", run.id)
        elif how == "delete":
            await delete(api, "", run.id)
        else:
            await asyncio.gather(run.cancel(), run.cancel())
        assert seen(run).status == "cancelled" and not api.engine.num_unfinished
        check_events(run)
        assert types_of(run.log.events) == ["created", "queued", "incomplete"]
        assert seen(run).usage is None and seen(run).output == []
        assert read(await run.finished()).status == "cancelled"


# Pieces and items


def told(pieces, cuts, close="completed"):
    "The events and the items of an answer whose pieces are cut at random."
    events = []
    writer = ItemWriter(lambda name, /, **fields: events.append(
        write_event(name, len(events), **fields)))
    for piece in pieces:
        rest = piece.text
        while True:
            size = cuts.randint(0, len(rest)) if rest else 0
            writer.push(replace(piece, text=rest[:size]))
            rest = rest[size:]
            if not rest:
                break
    writer.close(close)
    return events, [item.fields for item in writer.items]


ANSWERS = [
    [Piece("text", "Hello \u2028 world \U0001F680")],
    [Piece("reasoning", "Let me think."), Piece("text", "Four.")],
    [Piece("reasoning", "Endless thoughts")],
    [Piece("reasoning", "a"), Piece("text", "b"), Piece("reasoning", "c"), Piece("text", "d")],
    [Piece("text", "")],
    [Piece("text", "So:"), Piece("call", '{"a": 1}', 0, "c0", "f"),
     Piece("call", "{}", 1, "c1", "g"), Piece("text", "Done.")],
    [Piece("reasoning", "?"), Piece("call", '{"a": "\u00e9', 0, "c0", "f")],
]


def text_of(item):
    return item["arguments"] if "arguments" in item else item["content"][0]["text"]


@pytest.mark.parametrize("pieces", ANSWERS, ids=range(len(ANSWERS)))
def test_pieces_in_any_cuts_give_the_same_items_and_valid_events(pieces):
    expected = None
    for seed in range(20):
        events, items = told(pieces, random.Random(seed), ("completed", "incomplete")[seed % 2])
        fields = [raw(event) for event in events]
        for one in fields:
            EVENT.validate_python(one, strict=True)
        check_items(fields, items)
        assert [text_of(item) for item in items] == [piece.text for piece in pieces]
        assert len({item["id"] for item in items}) == len(pieces)
        for item, piece in zip(items, pieces):
            last = piece is pieces[-1] and seed % 2
            whole = is_json(piece.text) if piece.kind == "call" else not last
            assert item["status"] == ("completed" if whole else "incomplete")
            if piece.kind == "call":
                assert (item["call_id"], item["name"]) == (piece.call_id, piece.name)
        plain = [{**item, "id": "", "status": ""} for item in items]
        expected = expected or plain
        assert plain == expected


def test_events_of_the_last_kinds_need_no_objects():
    "Texts that are JSON already go in as they are; all others are written, line ends escaped."
    fields = write_object(a=Json('{"b":1}'), c="x\u2028\n", d=None, e=[1.5, {"f": True}])
    assert json.loads(fields) == {"a": {"b": 1}, "c": "x\u2028\n", "d": None,
                                  "e": [1.5, {"f": True}]}
    assert "\u2028" not in fields and isinstance(fields, Json) and write(fields) is fields
    assert isinstance(fields, str) and len(write_event("x", 0, a=fields).splitlines()) == 3


THOUGHT = [(300, "<think>"), (97, "a"), (98, "b"), (301, "</think>"), (10, "\n"), (10, "\n"),
           (99, "c"), (100, "d")]


def transcript_of(tokens, rng, parser, lag):
    "Give tokens in random deltas to a transcript; texts come `lag` deltas after their ids."
    events = []
    transcript = Transcript(TOKENIZER, parser, lambda name, /, **fields: events.append(
        write_event(name, len(events), **fields)))
    deltas, texts = [], []
    while tokens:
        size = rng.randint(1, len(tokens))
        reports = [TokenLogprobs(i, -0.5, 1, ((i, -0.5),)) for i, _ in tokens[:size]]
        deltas.append(([i for i, _ in tokens[:size]], reports))
        texts.append("".join(text for _, text in tokens[:size]))
        tokens = tokens[size:]
    texts = [""] * lag + texts
    for i, text in enumerate(texts):
        ids, reports = deltas[i] if i < len(deltas) else ([], [])
        transcript.push(Delta(
            request_id="r", index=0, token_ids=ids, logprobs=reports, finish_reason=None,
            stop_reason=None, error=None, num_prompt_tokens=7, num_cached_tokens=4,
            prompt_logprobs=None, text=text))
    transcript.finish()
    transcript.writer.close("completed")
    return transcript, [item.fields for item in transcript.writer.items], events


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_thoughts_and_their_reports_are_told_apart_in_any_cuts(lag):
    for seed in range(40):
        parser = ReasoningParser(marker_ids=(300, 301))
        transcript, items, events = transcript_of(THOUGHT, random.Random(seed), parser, lag)
        check_items([raw(event) for event in events], items)
        assert [item["type"] for item in items] == ["reasoning", "message"]
        assert [item["content"][0]["text"] for item in items] == ["ab", "cd"]
        reports = items[1]["content"][0]["logprobs"]
        assert [report["bytes"] for report in reports] == [[10], [10], [99], [100]]
        usage = json.loads(transcript.usage())
        assert usage["output_tokens"] == 8 and usage["input_tokens_details"] == {
            "cached_tokens": 4, "cache_write_tokens": 0}
        assert usage["output_tokens_details"] == {"reasoning_tokens": 2}


@pytest.mark.parametrize("tokens, texts", [
    (THOUGHT[:3], ["ab"]), ([(97, ""), (98, "")], [""]), ([(97, "a"), (98, "")], ["a"]),
    ([(97, "<"), (98, "t")], ["<t"])])
def test_answers_that_end_early(tokens, texts):
    for seed in range(10):
        for plain in (True, False):
            parser = PlainParser() if plain else ReasoningParser(marker_ids=(300, 301))
            _, items, events = transcript_of(tokens, random.Random(seed), parser, 0)
            check_items([raw(event) for event in events], items)
            found = [item["content"][0]["text"] for item in items]
            assert found == texts or plain
            num = sum(len(item["content"][0].get("logprobs", [])) for item in items)
            assert num == (0 if items[0]["type"] == "reasoning" else len(tokens))


class FirstWords:
    "A parser for a model of random text: the first characters are thoughts."

    thinking = "none"

    def __init__(self, prompt_ids, limit=5):
        self.num_reasoning_tokens = self.num_hidden_tokens = 0
        self._left = limit

    def push(self, text, token_ids=()):
        if self._left:
            self.num_reasoning_tokens += len(token_ids)
            self.num_hidden_tokens += len(token_ids)
        thought, rest = text[:self._left], text[self._left:]
        self._left -= len(thought)
        pieces = [Piece("reasoning", thought), Piece("text", rest)]
        return [piece for piece in pieces if piece.text]

    def finish(self):
        return []


@test_async
async def test_a_response_that_thinks_streamed_and_whole():
    async with served(parsers=FirstWords) as api:
        text = solo_text([{"role": "user", "content": "Hello"}], 40)
        stream = await create(api, stream=True, max_output_tokens=40)
        whole = await create(api, max_output_tokens=40)
        for run in (stream, whole):
            response = read(await run.finished())
            thought, message = response.output
            assert (thought.type, message.type) == ("reasoning", "message")
            assert thought.content[0].text == text[:5] and response.output_text == text[5:]
            assert thought.status == "completed" and message.status == "incomplete"
            assert 0 < response.usage.output_tokens_details.reasoning_tokens < 40
        check_events(stream)
        again = await create(api, "And?", previous_response_id=stream.id, stream=True)
        await again.finished()
        types = [item.fields["type"] for item in again.items]
        assert types == ["message", "reasoning", "message", "message"]
        messages = to_messages(item.fields for item in again.items)
        assert messages[1] == {"role": "assistant", "content": text[5:], "reasoning": text[:5]}
        short = await create(api, max_output_tokens=1)
        assert [item.type for item in read(await short.finished()).output][0] == "reasoning"


# Readers


@test_async
async def test_readers_from_every_place_at_once():
    async with served() as api:
        run = await create(api, **LONG | {"max_output_tokens": 40})

        async def follow(after, delay):
            await asyncio.sleep(delay)
            return [event.encode() async for event in run.log.follow(after)]

        places = [random.Random(0).randrange(-1, 60) for _ in range(40)]
        found = await asyncio.gather(
            *(follow(after, i * 0.003) for i, after in enumerate(places)))
        events = run.log.events
        assert all(texts == events[after + 1:] for after, texts in zip(places, found))
        last = [event.encode() async for event in run.log.follow(len(events) - 2)]
        assert last == events[-1:]
        assert [event async for event in run.log.follow(10**9)] == []


@test_async
async def test_readers_who_leave_disturb_nobody():
    async with served() as api:
        run = await create(api, **LONG | {"max_output_tokens": 60})

        async def follow():
            return [event.encode() async for event in run.log.follow()]

        tasks = [asyncio.create_task(follow()) for _ in range(4)]
        await until(lambda: len(run.log.events) > 8)
        for task in tasks[:2]:
            task.cancel()
        reader = run.log.follow()
        await anext(reader)
        await reader.aclose()
        assert await tasks[2] == await tasks[3] == run.log.events
        assert seen(run).status == "incomplete" and seen(run).usage.output_tokens == 60
        check_events(run)


@test_async
async def test_a_run_that_is_deleted_or_evicted_is_read_to_its_end():
    async with served(ResponseStore(max_responses=1)) as api:
        run = await create(api, **LONG)
        reader = run.log.follow()
        for _ in range(7):
            await anext(reader)
        gone = await delete(api, "", run.id)
        assert gone == {"id": run.id, "object": "response", "deleted": True}
        rest = [event async for event in reader]
        assert raw(rest[-1])["response"]["status"] == "cancelled"
        run = await create(api, stream=True, background=True)
        reader = run.log.follow()
        await anext(reader)
        await run.finished()
        await ended(api, "another")
        with pytest.raises(ApiError):
            api.store.get("", run.id)
        assert len([event async for event in reader]) == len(run.log.events) - 1


@test_async
async def test_an_object_needs_no_events_and_a_foreground_reader_leaves_none():
    async with served() as api:
        run = await create(api, background=True)
        assert [event async for event in run.log.follow()] == [] and run.log.ended
        run = await create(api, stream=True)
        events = [event async for event in run.log.follow()]
        assert len(events) > 5 and set(run.log.events) == {b""} and run.log.num_bytes == 0


# The interface


@test_async
async def test_cancelling():
    async with served() as api:
        run = await create(api, background=True, max_output_tokens=1500)
        for _ in range(2):
            assert read(await cancel(api, "", run.id)).status == "cancelled"
        with pytest.raises(ApiError, match="cancelled and cannot be continued"):
            await create(api, previous_response_id=run.id)
        finished = await ended(api, background=True)
        assert read(await cancel(api, "", finished.id)).status == "incomplete"
        foreground = await create(api, max_output_tokens=1500)
        with pytest.raises(ApiError, match="only background") as caught:
            await cancel(api, "", foreground.id)
        assert caught.value.status == 400
        await delete(api, "", foreground.id)
        assert read(await foreground.finished()).status == "cancelled"


@test_async
async def test_unknown_ids_other_tenants_and_store_false():
    async with served() as api:
        mine = await ended(api, tenant="a")
        hidden = await ended(api, tenant="a", store=False)
        assert hidden.store is False and ids_in(api.store) == [mine.id]
        for tenant, response_id in (("b", mine.id), ("", mine.id), ("a", "resp_0"),
                                    ("a", hidden.id)):
            with pytest.raises(ApiError, match=response_id) as caught:
                api.store.get(tenant, response_id)
            assert caught.value.status == 404
            assert caught.value.body["error"]["code"] == "response_not_found"
            for call in (cancel(api, tenant, response_id), delete(api, tenant, response_id)):
                with pytest.raises(ApiError, match="no response"):
                    await call
            with pytest.raises(ApiError, match="no response") as caught:
                await create(api, tenant=tenant, previous_response_id=response_id)
            assert caught.value.body["error"]["param"] == "previous_response_id"
        assert api.store.get("a", mine.id).id == mine.id
        await delete(api, "a", mine.id)
        with pytest.raises(ApiError):
            await delete(api, "a", mine.id)
        assert not api.store.runs


@test_async
async def test_items_are_inherited_and_instructions_are_not():
    async with served() as api:
        one = await ended(api, "First.", instructions="Be brief.")
        second = [{"role": "user", "content": "Second."}]
        two = await ended(api, second, previous_response_id=one.id)
        three = await ended(api, "Third.", previous_response_id=two.id, instructions="Be long.")
        told = (one.instructions, two.instructions, three.instructions)
        assert told == ("Be brief.", None, "Be long.")
        form = form_of("Third.", previous_response_id=two.id, instructions="Be long.")
        _, prompt_ids, _ = await api.prompt(form, "")
        assert prompt_ids == encode_chat(TOKENIZER, [
            {"role": "system", "content": "Be long."},
            {"role": "user", "content": "First."},
            {"role": "assistant", "content": one.output_text},
            {"role": "user", "content": "Second."},
            {"role": "assistant", "content": two.output_text},
            {"role": "user", "content": "Third."}])
        assert three.usage.input_tokens == len(prompt_ids)
        assert three.previous_response_id == two.id
        await delete(api, "", one.id)
        four = await ended(api, "Fourth.", previous_response_id=three.id)
        items = [item.fields for item in api.store.get("", four.id).items]
        assert [item["role"] for item in items] == ["user", "assistant"] * 3 + ["user"]
        outputs = [response.output[0].id for response in (one, two, three)]
        assert [item["id"] for item in items[1::2]] == outputs
        unfinished = await create(api, **LONG)
        with pytest.raises(ApiError, match="cannot be continued") as caught:
            await create(api, previous_response_id=unfinished.id)
        assert caught.value.status == 400
        await unfinished.cancel()


@test_async
async def test_the_second_turn_finds_the_first_in_the_cache():
    for caching in (True, False):
        async with served(enable_prefix_caching=caching) as api:
            one = await ended(api, "x" * 200)
            two = await ended(api, "And?", previous_response_id=one.id)
            cached = two.usage.input_tokens_details.cached_tokens
            least = one.usage.input_tokens // 16 * 16 - 16
            assert cached >= least if caching else cached == 0


@test_async
async def test_the_second_turn_of_the_ai_sdk():
    "Items that we stored come back as references, of the same tenant only."
    async with served(parsers=FirstWords) as api:
        one = await ended(api, [{"role": "user", "content": [
            {"type": "input_text", "text": "Hello"}]}], tenant="a")
        again = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
                 *({"type": "item_reference", "id": item.id} for item in one.output),
                 {"role": "user", "content": [{"type": "input_text", "text": "And?"}]}]
        run = await create(api, again, tenant="a")
        await run.finished()
        assert list(run.items[1:3]) == list(api.store.get("a", one.id).output)
        assert run.items[1] is api.store.get("a", one.id).output[0], "held once"
        continued = await create(api, "And?", tenant="a", previous_response_id=one.id)
        whole = [item.to_dict() for item in one.output]
        sent = await create(api, ["Hello", *whole][1:], tenant="a")
        assert [item.id for item in sent.items] == [item.id for item in one.output]
        usages = [read(await one.finished()).usage.input_tokens for one in (run, continued)]
        assert usages[0] == usages[1], "the same prompt"
        for tenant in ("", "b"):
            with pytest.raises(ApiError, match=one.output[0].id) as caught:
                await create(api, again, tenant=tenant)
            assert caught.value.status == 404
            assert caught.value.body["error"]["param"] == "input[1].id"
            assert caught.value.body["error"]["code"] == "item_not_found"
        await sent.finished()
        for response_id in ids_in(api.store):
            await delete(api, "a", response_id)
        del run, continued, sent
        gc.collect()
        with pytest.raises(ApiError, match="no item"):
            await create(api, again, tenant="a")


@test_async
async def test_items_outlive_the_response_that_made_them():
    async with served() as api:
        one = await ended(api)
        two = await ended(api, "Go on", previous_response_id=one.id)
        await delete(api, "", one.id)
        gc.collect()
        named = one.output[0].id
        item = api.store.known("", [{"id": named}])[named]
        assert item is api.store.get("", two.id).items[1]
        hidden = await ended(api, store=False)
        own = hidden.output[0].id
        assert api.store.known("", [{"id": own}, {"id": 5}, 7]) == {own: None}


@test_async
async def test_pages_of_input_items():
    async with served() as api:
        given = [{"role": "user", "content": f"Question {i}", "id": "msg_same"}
                 for i in range(5)]
        one = await ended(api, given)
        own = one.output[0].to_dict()
        again = [own, {"role": "user", "content": "Go on", "id": own["id"]}] # clients do that
        two = await ended(api, again, previous_response_id=one.id)
        items = api.store.get("", two.id).items
        ids = [item.id for item in items]
        assert len(set(ids)) == len(ids) == 8, "two items of one name would be a loop"
        assert ids[0] == "msg_same" and ids[5] == own["id"], "an id is kept where it can be"
        for order, expected in (("asc", ids), ("desc", ids[::-1])):
            for limit in (1, 3, 8, 100):
                found, after, more = [], None, True
                while more:
                    fields = json.loads(page_of(items, limit, order, after))
                    ResponseItemList.model_validate(fields, strict=True)
                    assert len(fields["data"]) <= limit
                    ends = [fields["data"][0]["id"], fields["data"][-1]["id"]]
                    assert [fields["first_id"], fields["last_id"]] == ends
                    found += [item["id"] for item in fields["data"]]
                    after, more = fields["last_id"], fields["has_more"]
                    assert len(found) <= 8
                assert found == expected
        end = json.loads(page_of(items, 5, "asc", ids[-1]))
        assert not end["data"] and not end["has_more"]
        assert end["first_id"] == end["last_id"] == ""
        with pytest.raises(ApiError, match="msg_other"):
            page_of(items, 5, "asc", "msg_other")


@test_async
async def test_what_the_door_refuses_leaves_nothing_behind():
    async with served(max_queued=0, max_num_seqs=1) as api:
        with pytest.raises(ValueError, match="context"):
            await create(api, "x" * 3000)
        run = await create(api, **LONG)
        with pytest.raises(Overloaded, match="queue is full"):
            await create(api)
        assert ids_in(api.store) == [run.id]
        await run.cancel()
        await ended(api)


# The store


@test_async
async def test_bounds_hold_in_count_and_bytes():
    async with served() as api:
        for store in (ResponseStore(max_responses=3), ResponseStore(max_bytes=60_000)):
            api.store = store
            ids = [(await ended(api, f"Question {i}", stream=bool(i % 2),
                                background=bool(i % 3))).id for i in range(12)]
            num, num_bytes = size_of(store)
            assert 0 < num < 12 and num <= store.bounds[0] and num_bytes <= store.bounds[1]
            assert ids_in(store) == ids[-num:], "the oldest have gone"


@test_async
async def test_running_ones_stay_and_are_counted():
    async with served(ResponseStore(max_responses=2)) as api:
        runs = [await create(api, f"Run {i}", **LONG) for i in range(5)]
        ids = [run.id for run in runs]
        assert ids_in(api.store) == ids
        before = size_of(api.store)[1]
        await until(lambda: all(len(run.log.events) > 20 for run in runs))
        assert size_of(api.store)[1] > before + 5 * 2000
        await ended(api, "short")
        assert ids_in(api.store) == ids
        for run in runs:
            await run.cancel()
        await until(lambda: size_of(api.store)[0] == 2)
        assert ids_in(api.store) == ids[-2:]


@test_async
async def test_one_that_is_larger_than_the_store_does_not_stay():
    async with served(ResponseStore(max_bytes=5000)) as api:
        response = await ended(api, "x" * 1500, max_output_tokens=4)
        assert not api.store.runs and response.status == "incomplete"


class Ended:
    "A run that has ended, as far as the store looks at it."
    items = output = ()

    def __init__(self, name, num_bytes):
        self.id, self.num_bytes, self.task = name, num_bytes, self
        self.log = EventLog(True, True)

    def add_done_callback(self, function):
        self.note = function

    def end(self):
        self.log.end()
        self.note(None)


def kept(store, tenant, *names, num_bytes=100):
    for name in names:
        run = Ended(name, num_bytes)
        store.put(tenant, run)
        run.end()
    return ids_in(store)


@pytest.mark.parametrize("bounds", [(10, 10**9), (10**9, 1000)])
def test_nobody_pushes_out_what_belongs_to_another(bounds):
    store = ResponseStore(*bounds)
    kept(store, "a", *(f"a{i}" for i in range(5)))
    found = kept(store, "b", *(f"b{i}" for i in range(100)))
    assert found == [*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(95, 100))]
    assert kept(store, "c", "c0") == [*(f"a{i}" for i in range(1, 5)),
                                      *(f"b{i}" for i in range(95, 100)), "c0"]
    for i in range(100):
        kept(store, "c", f"c{i + 1}")
    for tenant, least in (("a", 3), ("b", 3), ("c", 3)):
        assert sum(name.startswith(tenant) for name in ids_in(store)) >= least
    for name in [name for name in ids_in(store) if name[0] != "a"]:
        store.delete(name[0], name)
    kept(store, "a", *(f"z{i}" for i in range(20)))
    assert size_of(store)[0] == 10, "what others do not need may be used"


def test_what_runs_is_bounded_by_the_share_of_its_tenant():
    store = ResponseStore(max_bytes=1000)
    large = Ended("a0", 900)
    store.check_room("a")
    store.put("a", large)
    kept(store, "b", "b0", "b1", "b2", "b3", "b4", "b5")
    assert ids_in(store) == ["a0", "b1", "b2", "b3", "b4", "b5"], "never below b's half"
    with pytest.raises(Overloaded, match="900 bytes"):
        store.check_room("a")
    store.check_room("b")
    large.end()
    store.check_room("a")
    assert size_of(store)[1] <= 1000


@pytest.mark.parametrize("fields", [
    {}, {"top_logprobs": 20}, {"stream": True, "background": True},
    {"stream": True, "background": True, "top_logprobs": 20}, {"instructions": "i" * 500}],
    ids=lambda fields: "+".join(fields) or "plain")
@test_async
async def test_the_store_counts_what_is_really_held(fields):
    "Half a gigabyte was held under a bound of 64 MiB by log-probabilities as objects."
    async with served(num_kv_blocks=64) as api:
        tracemalloc.start()
        try:
            for i in range(12):
                run = await create(api, f"Question {i} \u00e9", max_output_tokens=40, **fields)
                await run.finished()
            del run
            counted, sizes = size_of(api.store)[1], []
            for _ in range(2):
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
                for response_id in ids_in(api.store):
                    await delete(api, "", response_id)
            really = sizes[0] - sizes[1]
        finally:
            tracemalloc.stop()
        print(fields.keys(), really, counted)
        assert counted / 2 <= really <= 2 * counted, (really, counted)


@test_async
async def test_what_a_client_sends_is_kept_only_where_it_is_told_back():
    async with served() as api:
        tool = {"type": "function", "name": "f", "description": "d" * 500}
        run = await create(api, junk=["x" * 1000] * 1000, tools=[tool])
        await run.finished()
        assert 500 < run.num_bytes < 20_000
        plain = await create(api)
        await plain.finished()
        more = await create(api, instructions="i" * 300, metadata={"a": "b" * 400})
        await more.finished()
        assert more.num_bytes > plain.num_bytes + 700


@test_async
async def test_a_run_that_has_ended_holds_bytes_only():
    async with served() as api:
        run = await create(api, top_logprobs=5)
        await run.finished()
        await asyncio.sleep(0)
        kinds = {name: type(value) for name, value in vars(run).items()}
        assert kinds["_body"] is bytes
        for name in ("transcript", "stream", "task", "_fixed"):
            assert kinds[name] is type(None), name


# The end of the server


@test_async
async def test_background_answers_wait_to_be_fetched():
    async with served() as api:
        quiet = await create(api, background=True)
        streamed = await create(api, background=True, stream=True)
        thrown = await create(api, background=True)
        await ended(api)
        await asyncio.gather(*(run.finished() for run in (quiet, streamed, thrown)))
        assert not await wait_until_fetched(api.store, 0.0)
        waiting = asyncio.create_task(wait_until_fetched(api.store, 30.0))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        async for _ in streamed.log.follow():
            pass
        await delete(api, "", thrown.id)
        await asyncio.sleep(0.1)
        assert not waiting.done()
        quiet.fetch()
        assert await waiting


def test_lost_answers_are_named(caplog):
    store = ResponseStore()
    for i in range(25):
        kept(store, "a", f"resp_{i}")
    for run in store.runs.values():
        run.background, run.log.read = True, run.id == "resp_7"
    with caplog.at_level(logging.ERROR):
        assert not asyncio.run(wait_until_fetched(store, 0.0))
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("24 background responses were never fetched and are lost: ")
    assert "resp_0, resp_1" in message and "resp_7" not in message and "and 4 more" in message


def test_a_store_without_promises_ends_at_once():
    assert asyncio.run(wait_until_fetched(ResponseStore(), 100.0))


# Items


def messages_of(given, instructions=None):
    return to_messages((item.fields for item in read_items(given)), instructions)


def test_items_become_messages():
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    given = [
        {"role": "developer", "content": "Be brief."},
        {"type": None, "role": "user", "content": [
            {"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]},
        call | {"call_id": "1"}, call | {"call_id": "2", "name": "g", "status": None},
        {"type": "function_call_output", "call_id": "1",
         "output": [{"type": "input_text", "text": "x"}]},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
        {"type": "message", "role": "assistant", "content": [
            {"type": "output_text", "text": "z", "annotations": [], "logprobs": None}]},
        call | {"call_id": "3"}]
    items = [item.fields for item in read_items(given)]
    messages = to_messages(items, "I")
    assert [message["role"] for message in messages] == [
        "system", "developer", "user", "assistant", "tool", "tool", "assistant"]
    assert messages[2]["content"] == [{"type": "text", "text": "a"},
                                      {"type": "text", "text": "b"}]
    assert messages[3]["content"] is None and messages[6]["content"] == "z"
    calls = [[call["id"] for call in one.get("tool_calls", [])] for one in messages[3:]]
    assert calls == [["1", "2"], [], [], ["3"]]
    assert [message.get("content") for message in messages[4:6]] == ["x", "y"]
    assert messages_of("hi") == [{"role": "user", "content": "hi"}]
    fields = {"object": "list", "data": items, "first_id": "", "last_id": "", "has_more": False}
    ResponseItemList.model_validate(fields, strict=True)
    assert encode_chat(TOKENIZER, messages), "the whole loop reaches the model"


def reasoning(text, **more):
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "summary": [], "content": content} | more


@pytest.mark.parametrize("given, expected", [
    ([reasoning("t"), {"role": "assistant", "content": "a"}],
     [{"role": "assistant", "content": "a", "reasoning": "t"}]),
    ([reasoning("t", content=None, summary=[{"type": "summary_text", "text": "s"}]),
      {"role": "assistant", "content": "a"}],
     [{"role": "assistant", "content": "a", "reasoning": "s"}]),
    ([{"type": "reasoning", "encrypted_content": "x", "summary": []},
      {"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "a"}]),
    ([reasoning("t"), {"role": "user", "content": "u"}],
     [{"role": "assistant", "content": "", "reasoning": "t"},
      {"role": "user", "content": "u"}]),
    ([reasoning("t"), reasoning("u"), {"role": "assistant", "content": "a"}],
     [{"role": "assistant", "content": "a", "reasoning": "t\nu"}]),
    ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
     [{"role": "assistant", "content": "No."}]),
    ([{"role": "assistant", "content": None}], [{"role": "assistant", "content": ""}]),
    ([{"role": "assistant", "content": []}], [{"role": "assistant", "content": ""}]),
    ([{"role": "assistant", "content": ""}], [{"role": "assistant", "content": ""}]),
    ([{"role": "assistant", "content": [{"type": "text", "text": "a"}], "phase": "x"}],
     [{"role": "assistant", "content": "a"}])])
def test_what_an_assistant_thought_and_refused(given, expected):
    assert messages_of(given) == expected
    items = [item.fields for item in read_items(given)]
    fields = {"object": "list", "data": items, "first_id": "", "last_id": "", "has_more": False}
    ResponseItemList.model_validate(fields, strict=True)
    assert messages_of(items) == expected, "the long form is read as it is written"


def test_a_call_after_a_thought():
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    [message] = messages_of([reasoning("t"), call])
    assert message["reasoning"] == "t" and message["content"] is None
    first, second = messages_of([{"role": "assistant", "content": "a"}, reasoning("t"), call])
    assert "tool_calls" not in first and second["reasoning"] == "t"
    first, _, third = messages_of([call, {"type": "function_call_output", "call_id": "c",
                                          "output": ""}, reasoning("t")] + [
                                              {"role": "assistant", "content": "b"}])
    assert first["tool_calls"] and third["reasoning"] == "t"


def test_ids_and_statuses_are_kept_where_they_make_sense():
    given = [{"role": "user", "content": "x", "id": "msg_1", "status": "incomplete"},
             {"role": "user", "content": "y", "id": None, "status": "odd"}]
    one, two = [item.fields for item in read_items(given)]
    assert (one["id"], one["status"]) == ("msg_1", "incomplete")
    assert two["id"].startswith("msg_") and two["status"] == "completed"
    assert read_items(given, taken=["msg_1"])[0].id != "msg_1"
    known = {"msg_1": Item.of(one)}
    assert read_items(given, known.get)[0] is known["msg_1"]
    changed = read_items([{**given[0], "content": "z"}], known.get)[0]
    assert changed.id == "msg_1" and changed != known["msg_1"]
    reference = [{"id": "msg_1"}, {"type": "item_reference", "id": "msg_1"}]
    first, second = read_items(reference, known.get)
    assert first is known["msg_1"] and second.id != "msg_1"


@pytest.mark.parametrize("given, words", [
    ("", "not empty"),
    ([], "not empty"),
    (None, "null"),
    (5, "5"),
    ({"role": "user"}, "list of items"),
    ([5], r"input\[0\]"),
    (["x"], r"input\[0\]"),
    ([None], r"input\[0\]"),
    ([{"type": []}], r"input\[0\]"),
    ([{"type": {"a": 1}}], r"input\[0\]"),
    ([{"type": 7}], "7"),
    ([{"type": "web_search_call", "id": "ws_1"}], "web_search_call"),
    ([{"type": "custom_tool_call"}], "custom_tool_call"),
    ([{"type": "item_reference"}], r"input\[0\].id"),
    ([{"type": "item_reference", "id": 5}], r"input\[0\].id"),
    ([{"role": "user", "content": "x", "id": 5}], r"input\[0\].id"),
    ([{"type": "message", "content": "x"}], r"input\[0\].role"),
    ([{"role": [], "content": "x"}], "role"),
    ([{"role": "tool", "content": "x"}], "function_call_output"),
    ([{"role": "user"}], "null"),
    ([{"role": "user", "content": None}], "null"),
    ([{"role": "user", "content": []}], "not empty"),
    ([{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}], "tool_calls"),
    ([{"role": "user", "content": {"text": "x"}}], "content"),
    ([{"role": "user", "content": ["input_text"]}], r"content\[0\]"),
    ([{"role": "user", "content": [{"type": []}]}], r"content\[0\]"),
    ([{"role": "user", "content": [{"type": "input_image"}]}], "input_image"),
    ([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "refusal"),
    ([{"role": "user", "content": [{"type": "input_text", "text": 5}]}], "text"),
    ([{"role": "assistant", "content": [{"type": "refusal", "text": "x"}]}], "refusal"),
    ([{"type": "reasoning", "content": [{"type": "summary_text", "text": "x"}]}], "content"),
    ([{"type": "function_call", "call_id": "x", "name": "f", "arguments": {}}], "arguments"),
    ([{"type": "function_call_output", "call_id": 5, "output": "x"}], "call_id"),
    ([{"type": "function_call_output", "call_id": "x"}], "output"),
    ([{"role": "user", "content": "x"}] * (MAX_ITEMS + 1), str(MAX_ITEMS)),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}] * 600}] * 7, str(MAX_ITEMS)),
])
def test_items_that_are_refused(given, words):
    with pytest.raises(ApiError, match=words) as caught:
        read_items(given)
    assert caught.value.status == 400 and len(str(caught.value)) < 300
    assert caught.value.body["error"]["param"].startswith("input")


@pytest.mark.parametrize("fields, param", [
    ({"background": True, "store": False}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"n": 2}, "n"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"reasoning": "high"}, "reasoning"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "structural_tag", "format": {}}}}, "text.format"),
    ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
     "structured_outputs"),
    ({"structured_outputs": {"guided_json": {}}}, "structured_outputs"),
    ({"text": {"format": "json"}}, "text.format"),
    ({"text": "short"}, "text"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0]"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "function", "name": "f"},
                {"type": "function", "function": {"name": "f"}}]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "name": ""}]}, "tools[0]"),
    ({"tools": [{"type": "function", "name": "f", "strict": "yes"}]}, "tools[0].strict"),
    ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools[0].parameters"),
    ({"tools": [{"type": "function", "name": "f"}] * 129}, "tools"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"metadata": {"a": 5}}, "metadata"),
    ({"instructions": ["x"]}, "instructions"),
    ({"include": "x"}, "include"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"previous_response_id": 5}, "previous_response_id"),
    ({"store": "yes"}, "store"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
])
def test_forms_that_are_refused(fields, param):
    with pytest.raises((ValueError, ApiError)) as caught:
        form = ResponsesRequest(input="x", **fields)
        form.check()
        form.constraints()  # the server reads them off the loop
    error = caught.value if isinstance(caught.value, ApiError) else api_error(caught.value)
    assert error.status == 400 and error.body["error"]["param"].startswith(param), error.body


def test_refusals_name_what_helps():
    for fields, words in (({"max_tokens": 5}, "max_output_tokens"),
                          ({"response_format": {"type": "text"}}, "text.format"),
                          ({"tools": [{"type": "web_search"}]}, "web_search"),
                          ({"tools": [{"type": "custom", "name": "f"}]}, "custom"),
                          ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\]")):
        with pytest.raises(ApiError, match=words):
            ResponsesRequest(input="x", **fields).check()


NAMES = """instructions max_output_tokens previous_response_id store background text tools
    tool_choice metadata truncation top_logprobs include user temperature stream reasoning
    service_tier max_tokens response_format conversation prompt_cache_key safety_identifier
    max_tool_calls chat_template_kwargs"""


def test_nulls_and_what_changes_nothing_pass():
    form = form_of("x", **dict.fromkeys(NAMES.split()))
    assert form.store and form.tool_choice == "auto" and form.sampling_params().logprobs is None
    assert form.sampling_params().max_tokens is None and form.unknown() == []
    assert form.sampling_params({"max_tokens": 7, "top_k": 3}).max_tokens == 7
    assert form_of("x", max_output_tokens=9).sampling_params({"max_tokens": 7}).max_tokens == 9
    for fields, unknown in (
        ({"text": {"format": None, "verbosity": None}, "truncation": "disabled"}, []),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, ["text.verbosity"]),
        ({"reasoning": {"effort": None, "summary": None}, "tool_choice": "none"}, []),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, ["reasoning.effort"]),
        ({"service_tier": "flex", "prompt_cache_retention": "24h"},
         ["prompt_cache_retention", "service_tier"]),
        ({"prompt_cache_key": "k", "safety_identifier": "s", "max_tool_calls": 3}, []),
        ({"include": ["reasoning.encrypted_content"]}, []),
    ):
        assert form_of("x", **fields).unknown() == unknown
    for fields, logprobs in (({"top_logprobs": 2}, 2),
                             ({"include": ["message.output_text.logprobs"]}, 0)):
        assert form_of("x", **fields).sampling_params().logprobs == logprobs


def test_effort_reaches_the_template():
    options = form_of("x", reasoning={"effort": "none"}).template_options()
    assert options["enable_thinking"] is False and options["reasoning_effort"] == "none"
    options = form_of("x", reasoning={"effort": "low"}).template_options()
    assert options["reasoning_effort"] == "low" and "enable_thinking" not in options
    options = form_of("x", chat_template_kwargs={"enable_thinking": False}).template_options()
    assert options["enable_thinking"] is False
    tool = {"type": "function", "name": "f", "description": None, "strict": None}
    form = form_of("x", tools=[tool])
    assert form.template_tools() == [{"type": "function", "function": {"name": "f"}}]
    assert form_of("x", tools=[tool], tool_choice="none").template_tools() is None


def test_what_was_asked_is_told_back():
    asked = dict(
        prompt_cache_key="k", safety_identifier="s", max_tool_calls=3, presence_penalty=0.5,
        frequency_penalty=0.25, user="u", metadata={"a": "b"}, reasoning={"effort": "low"},
        tools=[{"type": "function", "name": "f"}], temperature=None)
    form = form_of("x", **asked)
    params = form.sampling_params({"temperature": 0.5, "top_p": 0.9})
    fields = json.loads(write_response(
        told_fields(form) | own_fields(params, "tiny", "resp_1"), "queued"))
    check_response(fields)
    told_back = {name: fields[name] for name in asked}
    assert told_back == asked | {
        "temperature": 0.5, "reasoning": {"effort": "low", "summary": None},
        "tools": [{"type": "function", "name": "f", "description": None, "parameters": None,
                   "strict": None}]}
    assert fields["top_p"] == 0.9


@test_async
async def test_tools_are_shown_to_the_model_and_deep_ones_break_nothing():
    async with served() as api:
        deep = {}
        for _ in range(150):
            deep = {"a": deep}
        tool = {"type": "function", "name": "f", "parameters": deep, "strict": None}
        run = await create(api, tools=[tool], tool_choice="none", stream=True)
        await run.finished()
        assert seen(run).tools[0].name == "f"
        assert raw(run.log.events[0])["response"]["tools"][0]["parameters"] == deep
        assert isinstance(run, Run)


# The official client, through the server


def test_the_official_client():
    with running() as server:
        client = server.client()
        kwargs = dict(model="tiny", temperature=0, extra_body={"ignore_eos": True})
        with client.responses.stream(input="Hello", max_output_tokens=10, **kwargs) as stream:
            types = [event.type for event in stream]
        assert types[0] == "response.created" and types[-1] == "response.incomplete"
        one = client.responses.create(input="Hello", max_output_tokens=6, **kwargs)
        assert one.output_text == solo_text([{"role": "user", "content": "Hello"}], 6)
        two = client.responses.create(
            input="And?", previous_response_id=one.id, max_output_tokens=6, **kwargs)
        items = client.responses.input_items.list(two.id, order="asc", limit=2)
        texts = [item.content[0].text for item in items]
        assert texts == ["Hello", one.output_text, "And?"]
        seen = []
        with client.responses.create(input="Hello", background=True, stream=True,
                                     max_output_tokens=60, **kwargs) as stream:
            for event in stream:
                seen.append(event)
                if len(seen) == 9:
                    break
        response_id = seen[0].response.id
        seen += client.responses.retrieve(response_id, stream=True, starting_after=8)
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        assert seen[-1].type == "response.incomplete"
        assert seen[-1].response == client.responses.retrieve(response_id)
        long = client.responses.create(
            input="Hello", background=True, max_output_tokens=1500, **kwargs)
        assert long.status == "queued"
        assert client.responses.cancel(long.id).status == "cancelled"
        client.responses.delete(response_id)
        server.settled()


def test_output_goes_back_as_input_in_every_form():
    with running() as server:
        client = server.client()
        kwargs = dict(model="tiny", temperature=0, max_output_tokens=6)
        question = {"role": "user", "content": "Hello"}
        one = client.responses.create(input=[question], **kwargs)
        again = {"role": "user", "content": "And?"}
        output = [item.to_dict() for item in one.output]
        nulls = [{**item, "phase": None, "caller": None} for item in output]
        references = [{"type": "item_reference", "id": item.id} for item in one.output]
        plain = [{"role": "assistant", "content": one.output_text}]
        counts = {client.responses.create(input=[question, *form, again], **kwargs)
                  .usage.input_tokens
                  for form in (output, one.output, nulls, references, plain)}
        continued = client.responses.create(
            input="And?", previous_response_id=one.id, reasoning=one.reasoning,
            text=one.text, tools=one.tools, metadata=one.metadata, **kwargs)
        assert counts == {continued.usage.input_tokens}
        loop = [question, {"type": "function_call", "call_id": "c", "name": "f",
                           "arguments": '{"a": 1}', "id": "fc_1", "status": "completed"},
                {"type": "function_call_output", "call_id": "c", "output": "22"}]
        tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
        final = client.responses.create(input=loop, tools=tools, **kwargs)
        assert final.tools[0].strict is None and final.status == "incomplete"
        counted = client.responses.input_tokens.count(input=loop, tools=tools, model="tiny")
        assert counted.input_tokens == final.usage.input_tokens
        server.settled()


def test_routes_and_their_errors():
    with running() as server:
        body = {"input": "Hello", "max_output_tokens": 4}
        found = server.post("/v1/responses/compact", body)
        assert found.status_code == 404 and "compact" in found.json()["error"]["message"]
        found = server.post("/v1/responses", body | {"max_tokens": 4})
        assert found.status_code == 400 and found.json()["error"]["param"] == "max_tokens"
        found = server.post("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]})
        assert found.status_code == 404 and found.json()["error"]["param"] == "input[0].id"
        found = server.post("/v1/responses", body | {"background": True})
        assert found.headers["content-type"] == "application/json"
        check_response(found.json())
        server.settled()
        *_, drain = server.api.drains  # the page has one, too
        assert not asyncio.run(drain(0.0)), "made, and not fetched"
        client = server.client()
        assert client.responses.retrieve(found.json()["id"]).status == "incomplete"
        assert asyncio.run(drain(0.0))
    assert {"/v1/responses", "/v1/responses/{response_id}"} <= {r.path for r in router.routes}
