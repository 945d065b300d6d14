"The Responses API without HTTP: its events on every path, readers, conversations, bounds."

import asyncio
import contextlib
import inspect
import json
import random

import pytest
from faults import Faults
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter
from server_fixtures import MODEL, TOKENIZER, running, solo_text

from nanollm.args import EngineArgs
from nanollm.chat import encode_chat
from nanollm.llm import make_engine
from nanollm.serve.async_engine import AsyncEngine, Overloaded
from nanollm.serve.items import MAX_ITEMS, ResponsesRequest, new_id, read_items, to_messages
from nanollm.serve.protocol import ApiError, api_error
from nanollm.serve.responses import ResponsesApi, ResponseStore, Run

EVENT = TypeAdapter(ResponseStreamEvent)
LAST = {"response.completed", "response.incomplete", "response.failed"}
LONG = dict(stream=True, background=True, max_output_tokens=1500, ignore_eos=True)


@contextlib.asynccontextmanager
async def served(store=None, max_queued=1024, **engine_options):
    "An interface over the tiny model; at the end nothing may be left over."
    engine = make_engine(
        EngineArgs(**{"num_kv_blocks": 1024, "self_check": True} | engine_options),
        MODEL,
        TOKENIZER,
    )
    forward, plan = engine.runner.forward, engine.scheduler.policy
    api = ResponsesApi(
        AsyncEngine(engine, TOKENIZER, max_queued), ResponseStore() if store is None else store
    )
    api.faults = Faults(engine)
    await api.engine.start()
    try:
        yield api
        async with asyncio.timeout(20):
            while api.engine.streams or engine.has_unfinished or api.engine._thread.owners:
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

    test.__name__, test.__signature__ = (
        function.__name__,
        inspect.signature(function),
    )  # pytest looks for parameters
    return test


test_async.__test__ = False


def form_of(given="Hello", **fields):
    form = ResponsesRequest(
        input=given, **{"temperature": 0, "max_output_tokens": 8, "ignore_eos": True} | fields
    )
    form.check()
    return form


async def create(api, given="Hello", tenant="", **fields):
    return await api.create(
        form_of(given, **fields),
        tenant,
        "tiny",
        new_id("resp"),
        lambda params, num_prompt: params,
    )


async def ended(api, *args, **fields):
    return await (await create(api, *args, **fields)).finished()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


def raw(text):
    head, rest = text.split("\n", 1)
    assert rest.startswith("data: ") and text.endswith("\n\n") and text.count("\n") == 3
    fields = json.loads(rest[6:])
    assert head == f"event: {fields['type']}"
    return fields


def check_response(fields):
    "One response object as it goes over the wire."
    Response.model_validate(fields, strict=True)
    assert (
        type(fields["created_at"]) is int
        and "output_text" not in fields
        and fields["object"] == "response"
    )
    for name in (
        "error",
        "incomplete_details",
        "instructions",
        "metadata",
        "model",
        "output",
        "parallel_tool_calls",
        "temperature",
        "top_p",
        "max_output_tokens",
        "previous_response_id",
        "background",
        "store",
        "text",
        "tools",
        "tool_choice",
        "truncation",
        "top_logprobs",
        "reasoning",
        "service_tier",
        "user",
        "usage",
    ):
        assert name in fields, name
    status, usage = fields["status"], fields["usage"]
    assert status in ("queued", "in_progress", "completed", "incomplete", "failed", "cancelled")
    assert (fields["error"] is not None) == (status == "failed")
    assert fields["incomplete_details"] == (
        {"reason": "max_output_tokens"} if status == "incomplete" else None
    )
    if status in ("queued", "in_progress"):
        assert usage is None and not fields["output"]
    if status in ("completed", "incomplete"):
        assert (
            usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
            and usage["output_tokens"] >= 1
        )
        assert usage["input_tokens_details"].keys() == {"cached_tokens", "cache_write_tokens"}
        assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    for item in fields["output"]:
        assert item["status"] == ("completed" if status == "completed" else "incomplete")


def check_events(run):
    "The contract of a finished stream; returns what the events say."
    fields = [raw(text) for text in run.events]
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
        if one["type"].startswith("response.output_text"):
            assert (
                isinstance(one["logprobs"], list)
                and one["output_index"] == one["content_index"] == 0
            )
    depth = []  # brackets
    for kind in types:
        name, _, what = kind.removeprefix("response.").partition(".")
        if what == "added":
            depth.append(name)
        elif what == "done" and name != "output_text":
            assert depth.pop() == name
        elif name == "output_text":
            assert depth == ["output_item", "content_part"]
    assert not depth
    item_ids = {one["item_id"] for one in fields if "item_id" in one} | {
        one["item"]["id"] for one in fields if "item" in one
    }
    final = fields[-1]["response"]
    assert item_ids == {item["id"] for item in final["output"]} and len(item_ids) <= 1
    if item_ids:
        text = "".join(one["delta"] for one in fields if "delta" in one)
        [part] = final["output"][0]["content"]
        assert (
            text
            == part["text"]
            == next(one["text"] for one in fields if one["type"] == "response.output_text.done")
        )
        reports = [report for one in fields if "delta" in one for report in one["logprobs"]]
        assert reports == part["logprobs"]
        [item] = [one["item"] for one in fields if one["type"] == "response.output_item.done"]
        assert item == final["output"][0]
    state = ResponseStreamState(input_tools=[], text_format=omit)
    heard = [found for event in events for found in state.handle_event(event)]
    assert heard[-1].type == types[-1]
    assert final == json.loads(run.response.model_dump_json(exclude_unset=True))
    return fields


# The endings


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("background", [False, True])
@test_async
async def test_a_response_says_what_the_naive_loop_says(stream, background):
    async with served() as api:
        run = await create(api, stream=stream, background=background, max_output_tokens=12)
        response = await run.finished()
        assert response.output_text == solo_text([{"role": "user", "content": "Hello"}], 12)
        assert response.status == "incomplete" and response.usage.output_tokens == 12
        assert response.usage.input_tokens == len(
            encode_chat(TOKENIZER, [{"role": "user", "content": "Hello"}])
        )
        check_response(json.loads(response.model_dump_json(exclude_unset=True)))
        assert bool(run.events) == stream
        if stream:
            check_events(run)


@test_async
async def test_every_ending_keeps_the_contract():
    async with served() as api:
        text = (await ended(api, max_output_tokens=60)).output_text
        stop = text[len(text) // 2 :][:2]
        done = await create(api, stream=True, max_output_tokens=300, stop=[stop])
        assert (
            await done.finished()
        ).status == "completed" and stop not in done.response.output_text
        short = await create(
            api, stream=True, background=True, max_output_tokens=1, top_logprobs=3
        )
        assert (await short.finished()).status == "incomplete"
        hung = await create(api, **LONG)
        await until(lambda: len(hung.events) > 10)
        await hung.cancel()
        assert hung.response.status == "cancelled" and hung.response.usage.output_tokens >= 1
        for run in (done, short, hung):
            check_events(run)
        assert raw(hung.events[-1])["type"] == "response.incomplete"
        [part] = short.response.output[0].content
        assert len(part.logprobs) == 1 and len(part.logprobs[0].top_logprobs) == 3


@test_async
async def test_order_of_the_first_events():
    async with served() as api:
        for background, names in (
            (False, ["created", "in_progress"]),
            (True, ["created", "queued", "in_progress"]),
        ):
            run = await create(api, stream=True, background=background)
            assert raw(run.events[0])["response"]["status"] == (
                "queued" if background else "in_progress"
            )
            await run.finished()
            types = [raw(text)["type"] for text in run.events]
            assert types[: len(names) + 2] == [
                f"response.{name}"
                for name in (*names, "output_item.added", "content_part.added")
            ]
            assert types[-4:] == [
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
                "response.incomplete",
            ]


@test_async
async def test_a_failure_in_the_middle_and_one_before_the_first_token():
    async with served() as api:
        run, other = (
            await create(api, **LONG),
            await create(api, **LONG | {"max_output_tokens": 40}),
        )
        await until(lambda: len(run.events) > 10)
        api.faults.fail_request = run.id
        with pytest.raises(ApiError, match="forbidden") as caught:
            await run.finished()
        assert caught.value.status == 500 and run.response.error.code == "server_error"
        assert len(run.response.output) == 1 and run.response.usage.output_tokens >= 1
        assert (await other.finished()).status == "incomplete"
        api.faults.fail_request = "resp"
        early = await create(api, stream=True)
        with pytest.raises(ApiError):
            await early.finished()
        assert early.response.output == [] and early.response.usage is None
        assert [raw(text)["type"] for text in early.events] == [
            "response.created",
            "response.in_progress",
            "response.failed",
        ]
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
        engine = api.engine._thread.engine
        add, engine.add_request = engine.add_request, refuse
        run = await create(api, stream=True)
        with pytest.raises(ApiError, match="could not finish"):
            await run.finished()
        api.engine._thread.engine.add_request = add
        assert check_events(run)[-1]["type"] == "response.failed"


@test_async
async def test_the_end_of_the_server_is_an_error_with_its_own_status():
    async with served() as api:
        run = await create(api, **LONG)
        await until(lambda: len(run.events) > 6)
        assert not await api.engine.drain(0.0)
        with pytest.raises(ApiError, match="shutting down") as caught:
            await run.finished()
        assert caught.value.status == 503
        assert check_events(run)[-1]["response"]["error"]["code"] == "server_error"


@test_async
async def test_an_error_of_our_own_is_not_told():
    async with served() as api:
        run = await create(api, **LONG)
        run._begin = lambda: 1 / 0
        with pytest.raises(ApiError) as caught:
            await run.finished()
        assert "division" not in str(caught.value) and "division" not in run.events[-1]


@pytest.mark.parametrize("how", ["task", "cancel", "delete", "twice"])
@test_async
async def test_a_run_that_is_cancelled_before_it_began(how):
    async with served() as api:
        run = await create(api, **LONG)  # its task has not had a turn yet
        if how == "task":  # as the server does when a client hangs up
            run.task.cancel()
            await until(lambda: run.done)
        elif how == "cancel":
            await api.cancel("", run.id)
        elif how == "delete":
            await api.delete("", run.id)
        else:
            await asyncio.gather(run.cancel(), run.cancel())
        assert run.response.status == "cancelled" and not api.engine.streams
        assert [one["type"] for one in check_events(run)] == [
            "response.created",
            "response.queued",
            "response.incomplete",
        ]
        assert run.response.usage is None and run.response.output == []
        assert (await run.finished()).status == "cancelled"


# Readers


@test_async
async def test_readers_from_every_place_at_once():
    async with served() as api:
        run = await create(api, **LONG | {"max_output_tokens": 40})

        async def read(after, delay):
            await asyncio.sleep(delay)
            return [text async for text in run.follow(after)]

        places = [random.Random(0).randrange(-1, 60) for _ in range(40)]
        found = await asyncio.gather(
            *(read(after, i * 0.003) for i, after in enumerate(places))
        )
        assert all(texts == run.events[after + 1 :] for after, texts in zip(places, found))
        assert [text async for text in run.follow(len(run.events) - 2)] == run.events[-1:]
        assert [text async for text in run.follow(10**9)] == []


@test_async
async def test_readers_who_leave_disturb_nobody():
    async with served() as api:
        run = await create(api, **LONG | {"max_output_tokens": 60})

        async def read():
            return [text async for text in run.follow()]

        tasks = [asyncio.create_task(read()) for _ in range(4)]
        await until(lambda: len(run.events) > 8)
        for task in tasks[:2]:
            task.cancel()
        reader = run.follow()
        await anext(reader)
        await reader.aclose()
        assert await tasks[2] == await tasks[3] == run.events
        assert run.response.status == "incomplete" and run.response.usage.output_tokens == 60
        check_events(run)


@test_async
async def test_a_run_that_is_deleted_or_evicted_is_read_to_its_end():
    async with served(ResponseStore(max_responses=1)) as api:
        run = await create(api, **LONG)
        reader = run.follow()
        for _ in range(7):
            await anext(reader)
        assert await api.delete("", run.id) == {
            "id": run.id,
            "object": "response",
            "deleted": True,
        }
        rest = [text async for text in reader]
        assert raw(rest[-1])["response"]["status"] == "cancelled"
        run = await create(api, stream=True, background=True)
        reader = run.follow()
        await anext(reader)
        await run.finished()
        await ended(api, "another")
        with pytest.raises(ApiError):
            api.store.get("", run.id)
        assert len([text async for text in reader]) == len(run.events) - 1


@test_async
async def test_an_object_needs_no_events():
    async with served() as api:
        run = await create(api, background=True)
        assert [text async for text in run.follow()] == [] and run.done


# The interface


@test_async
async def test_cancelling():
    async with served() as api:
        run = await create(api, background=True, max_output_tokens=1500)
        assert (await api.cancel("", run.id)).status == "cancelled"
        assert (await api.cancel("", run.id)).status == "cancelled"
        with pytest.raises(ApiError, match="cancelled and cannot be continued"):
            await create(api, previous_response_id=run.id)
        finished = await ended(api, background=True)
        assert (await api.cancel("", finished.id)).status == "incomplete"
        foreground = await create(api, max_output_tokens=1500)
        with pytest.raises(ApiError, match="only background") as caught:
            await api.cancel("", foreground.id)
        assert caught.value.status == 400
        await api.delete("", foreground.id)
        assert (await foreground.finished()).status == "cancelled"


@test_async
async def test_unknown_ids_other_tenants_and_store_false():
    async with served() as api:
        mine, hidden = await ended(api, tenant="a"), await ended(api, tenant="a", store=False)
        assert hidden.store is False and hidden.id not in [key[1] for key in api.store._runs]
        for tenant, response_id in (
            ("b", mine.id),
            ("", mine.id),
            ("a", "resp_0"),
            ("a", hidden.id),
        ):
            with pytest.raises(ApiError, match=response_id) as caught:
                api.store.get(tenant, response_id)
            assert (
                caught.value.status == 404
                and caught.value.body["error"]["code"] == "response_not_found"
            )
            for call in (api.cancel(tenant, response_id), api.delete(tenant, response_id)):
                with pytest.raises(ApiError, match="no response"):
                    await call
            with pytest.raises(ApiError, match="no response"):
                api.input_items(tenant, response_id, 20, "desc", None)
            with pytest.raises(ApiError, match="no response") as caught:
                await create(api, tenant=tenant, previous_response_id=response_id)
            assert caught.value.body["error"]["param"] == "previous_response_id"
        assert api.store.get("a", mine.id).response.id == mine.id
        await api.delete("a", mine.id)
        with pytest.raises(ApiError):
            await api.delete("a", mine.id)


@test_async
async def test_items_are_inherited_and_instructions_are_not():
    async with served() as api:
        one = await ended(api, "First.", instructions="Be brief.")
        two = await ended(
            api, [{"role": "user", "content": "Second."}], previous_response_id=one.id
        )
        three = await ended(api, "Third.", previous_response_id=two.id, instructions="Be long.")
        assert (one.instructions, two.instructions, three.instructions) == (
            "Be brief.",
            None,
            "Be long.",
        )
        _, prompt_ids = await api.prompt(
            form_of("Third.", previous_response_id=two.id, instructions="Be long."), ""
        )
        assert prompt_ids == encode_chat(
            TOKENIZER,
            [
                {"role": "system", "content": "Be long."},
                {"role": "user", "content": "First."},
                {"role": "assistant", "content": one.output_text},
                {"role": "user", "content": "Second."},
                {"role": "assistant", "content": two.output_text},
                {"role": "user", "content": "Third."},
            ],
        )
        assert (
            three.usage.input_tokens == len(prompt_ids) and three.previous_response_id == two.id
        )
        await api.delete("", one.id)
        four = await ended(api, "Fourth.", previous_response_id=three.id)
        items = api.store.get("", four.id).items
        assert [item["role"] for item in items] == ["user", "assistant"] * 3 + ["user"]
        assert [item["id"] for item in items[1::2]] == [
            response.output[0].id for response in (one, two, three)
        ]
        unfinished = await create(api, **LONG)
        with pytest.raises(ApiError, match="cannot be continued") as caught:
            await create(api, previous_response_id=unfinished.id)
        assert caught.value.status == 400
        await unfinished.cancel()


@test_async
async def test_the_second_turn_finds_the_first_in_the_cache():
    async with served() as api:
        one = await ended(api, "x" * 200)
        two = await ended(api, "And?", previous_response_id=one.id)
        assert (
            two.usage.input_tokens_details.cached_tokens
            >= one.usage.input_tokens // 16 * 16 - 16
        )
    async with served(enable_prefix_caching=False) as api:
        one = await ended(api, "x" * 200)
        assert (
            await ended(api, "And?", previous_response_id=one.id)
        ).usage.input_tokens_details.cached_tokens == 0


@test_async
async def test_pages_of_input_items():
    async with served() as api:
        one = await ended(
            api,
            [{"role": "user", "content": f"Question {i}", "id": "msg_same"} for i in range(5)],
        )
        again = [
            one.output[0].to_dict(),
            {"role": "user", "content": "Go on", "id": one.output[0].id},
        ]  # what clients do
        two = await ended(api, again, previous_response_id=one.id)
        items = api.store.get("", two.id).items
        ids = [item["id"] for item in items]
        assert len(set(ids)) == len(ids) == 8 and "msg_same" not in ids
        for order, expected in (("asc", ids), ("desc", ids[::-1])):
            for limit in (1, 3, 8, 100):
                found, after, more = [], None, True
                while more:
                    page = api.input_items("", two.id, limit, order, after)
                    fields = json.loads(
                        page.model_dump_json(exclude_unset=True, warnings=False)
                    )
                    ResponseItemList.model_validate(fields, strict=True)
                    assert len(fields["data"]) <= limit
                    assert (fields["first_id"], fields["last_id"]) == (
                        fields["data"][0]["id"],
                        fields["data"][-1]["id"],
                    )
                    found += [item["id"] for item in fields["data"]]
                    after, more = fields["last_id"], fields["has_more"]
                    assert len(found) <= 8
                assert found == expected
        end = api.input_items("", two.id, 5, "asc", ids[-1])
        assert not end.data and not end.has_more and end.first_id == end.last_id == ""
        with pytest.raises(ApiError, match="msg_same"):
            api.input_items("", two.id, 5, "asc", "msg_same")


@test_async
async def test_what_the_door_refuses_leaves_nothing_behind():
    async with served(max_queued=0, max_num_seqs=1) as api:
        with pytest.raises(ValueError, match="context"):
            await create(api, "x" * 3000)
        run = await create(api, **LONG)
        with pytest.raises(Overloaded, match="queue is full"):
            await create(api)
        assert len(api.store) == 1
        await run.cancel()
        await ended(api)


# The store


@test_async
async def test_bounds_hold_in_count_and_bytes():
    async with served() as api:
        for store in (ResponseStore(max_responses=3), ResponseStore(max_bytes=30_000)):
            api.store = store
            ids = [
                (
                    await ended(
                        api, f"Question {i}", stream=bool(i % 2), background=bool(i % 3)
                    )
                ).id
                for i in range(12)
            ]
            assert (
                len(store) <= (3 if store.max_responses == 3 else 12)
                and store.num_bytes <= store.max_bytes
            )
            assert [key[1] for key in store._runs] == ids[-len(store) :]  # the oldest have gone


@test_async
async def test_running_ones_stay_and_are_counted():
    async with served(ResponseStore(max_responses=2)) as api:
        runs = [await create(api, f"Run {i}", **LONG) for i in range(5)]
        assert len(api.store) == 5
        before = api.store.num_bytes
        await until(lambda: all(len(run.events) > 20 for run in runs))
        assert api.store.num_bytes > before + 5 * 2000
        await ended(api, "short")
        assert len(api.store) == 5 and {key[1] for key in api.store._runs} == {
            run.id for run in runs
        }
        for run in runs:
            await run.cancel()
        await until(lambda: len(api.store) == 2)
        assert {key[1] for key in api.store._runs} == {run.id for run in runs[-2:]}


@test_async
async def test_one_that_is_larger_than_the_store_does_not_stay():
    async with served(ResponseStore(max_bytes=5000)) as api:
        response = await ended(api, "x" * 1500, max_output_tokens=4)
        assert len(api.store) == 0 and response.status == "incomplete"


@test_async
async def test_a_body_is_not_kept_and_what_is_kept_is_counted():
    async with served() as api:
        run = await create(
            api,
            junk=["x" * 1000] * 1000,
            tools=[{"type": "function", "name": "f", "description": "d" * 500}],
        )
        await run.finished()
        assert not hasattr(run, "form"), "it may be large"
        assert 500 < run.num_bytes < 20_000
        more = await create(api, instructions="i" * 300, metadata={"a": "b" * 400})
        await more.finished()
        assert more.num_bytes > 700


# Items


def test_items_become_messages():
    items = read_items(
        [
            {"role": "developer", "content": "Be brief."},
            {
                "type": None,
                "role": "user",
                "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "1",
                "output": [{"type": "input_text", "text": "x"}],
            },
            {"type": "function_call_output", "call_id": "2", "output": "y"},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "z"}],
            },
            {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
        ]
    )
    messages = to_messages(items, "I")
    assert [message["role"] for message in messages] == [
        "system",
        "developer",
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert (
        messages[2]["content"] == "a\nb"
        and messages[3]["content"] is None
        and messages[6]["content"] == "z"
    )
    assert [
        [call["id"] for call in message.get("tool_calls", [])] for message in messages[3:]
    ] == [
        ["1", "2"],
        [],
        [],
        ["3"],
    ]
    assert [message.get("content") for message in messages[4:6]] == ["x", "y"]
    assert to_messages(read_items("hi"), None) == [{"role": "user", "content": "hi"}]
    fields = {"object": "list", "data": items, "first_id": "", "last_id": "", "has_more": False}
    ResponseItemList.model_validate(fields, strict=True)


@pytest.mark.parametrize(
    "given, words",
    [
        ("", "not empty"),
        ([], "not empty"),
        (None, "None"),
        (5, "5"),
        ({"role": "user"}, "list of items"),
        ([5], r"input\[0\]"),
        (["x"], r"input\[0\]"),
        ([None], r"input\[0\]"),
        ([{"type": []}], r"input\[0\]"),
        ([{"type": {}}], r"input\[0\]"),
        ([{"type": 7}], "7"),
        ([{"type": "item_reference", "id": "x"}], "item_reference"),
        ([{"content": "x"}], r"input\[0\].role"),
        ([{"role": [], "content": "x"}], "role"),
        ([{"role": "tool", "content": "x"}], "tool"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user", "content": []}], "not empty"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}], "no content"),
        ([{"role": "user", "content": {"text": "x"}}], "content"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input_image"),
        ([{"role": "user", "content": [{"type": "input_text", "text": 5}]}], "text"),
        (
            [{"type": "function_call", "call_id": "x", "name": "f", "arguments": {}}],
            "arguments",
        ),
        ([{"type": "function_call_output", "call_id": 5}], "call_id"),
        ([{"type": "function_call_output", "call_id": "x"}], "no content"),
        ([{"role": "user", "content": "x"}] * (MAX_ITEMS + 1), str(MAX_ITEMS)),
    ],
)
def test_items_that_are_refused(given, words):
    with pytest.raises(ApiError, match=words) as caught:
        read_items(given)
    assert caught.value.status == 400 and len(str(caught.value)) < 300
    assert caught.value.body["error"]["param"].startswith("input")


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"background": True, "store": False}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"n": 2}, "n"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
            "text.format",
        ),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": "short"}, "text"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [5]}, "tools[0]"),
        (
            {
                "tools": [
                    {"type": "function", "name": "f"},
                    {"type": "function", "function": {"name": "f"}},
                ]
            },
            "tools[1].name",
        ),
        ({"tools": [{"type": "function", "name": ""}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "f"}] * 129}, "tools"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"instructions": ["x"]}, "instructions"),
        ({"include": "x"}, "include"),
        ({"stream_options": {}}, "stream_options"),
        ({"previous_response_id": 5}, "previous_response_id"),
        ({"store": "yes"}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
    ],
)
def test_forms_that_are_refused(fields, param):
    with pytest.raises((ValueError, ApiError)) as caught:
        ResponsesRequest(input="x", **fields).check()
    error = caught.value if isinstance(caught.value, ApiError) else api_error(caught.value)
    assert error.status == 400 and error.body["error"]["param"].startswith(param), error.body


def test_nulls_and_what_changes_nothing_pass():
    names = (
        "instructions",
        "max_output_tokens",
        "previous_response_id",
        "store",
        "background",
        "text",
        "tools",
        "tool_choice",
        "metadata",
        "truncation",
        "top_logprobs",
        "include",
        "user",
        "temperature",
        "stream",
        "reasoning",
        "service_tier",
    )
    form = ResponsesRequest(
        input="x", **dict.fromkeys(names), prompt_cache_key="k", max_tool_calls=3
    )
    form.check()
    assert form.store and form.tool_choice == "auto" and form.sampling_params().logprobs is None
    ResponsesRequest(
        input="x",
        text={"format": None, "verbosity": None},
        service_tier="auto",
        truncation="disabled",
    ).check()
    ResponsesRequest(input="x", text={"format": {"type": "text"}}, tool_choice="none").check()
    for fields, logprobs in (
        ({"top_logprobs": 2}, 2),
        ({"include": ["message.output_text.logprobs"]}, 0),
    ):
        assert ResponsesRequest(input="x", **fields).sampling_params().logprobs == logprobs


@test_async
async def test_tools_are_shown_to_the_model_and_deep_ones_break_nothing():
    async with served() as api:
        deep = {}
        for _ in range(150):
            deep = {"a": deep}
        tool = {"type": "function", "name": "f", "parameters": deep, "strict": None}
        run = await create(api, tools=[tool], tool_choice="none", stream=True)
        await run.finished()
        assert run.response.tools[0].name == "f"
        assert raw(run.events[0])["response"]["tools"][0]["parameters"] == deep
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
            input="And?", previous_response_id=one.id, max_output_tokens=6, **kwargs
        )
        assert [
            item.content[0].text
            for item in client.responses.input_items.list(two.id, order="asc", limit=2)
        ] == [
            "Hello",
            one.output_text,
            "And?",
        ]
        seen = []
        with client.responses.create(
            input="Hello", background=True, stream=True, max_output_tokens=60, **kwargs
        ) as stream:
            for event in stream:
                seen.append(event)
                if len(seen) == 9:
                    break
        response_id = seen[0].response.id
        seen += client.responses.retrieve(response_id, stream=True, starting_after=8)
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        assert seen[-1].type == "response.incomplete" and seen[
            -1
        ].response == client.responses.retrieve(response_id)
        long = client.responses.create(
            input="Hello", background=True, max_output_tokens=1500, **kwargs
        )
        assert (
            long.status == "queued" and client.responses.cancel(long.id).status == "cancelled"
        )
        client.responses.delete(response_id)
        server.settled()
