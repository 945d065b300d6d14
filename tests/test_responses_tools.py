"Calls of functions and held answers in the Responses API, without HTTP and with the client."

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Literal

import openai
import pytest
from jsonschema import validate
from openai.types.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from server_fixtures import TOKENIZER, running
from test_responses import (
    EVENT,
    check_events,
    check_items,
    create,
    delete,
    form_of,
    ids_in,
    is_json,
    raw,
    read,
    seen,
    served,
    test_async,
    text_of,
    transcript_of,
    until,
)

from nanollm.chat import PlainParser, ReasoningParser, encode_chat
from nanollm.serve.events import told_fields
from nanollm.serve.items import read_items, to_messages
from nanollm.serve.protocol import ApiError
from nanollm.tools import CallParser, call_style


def function(name, **properties):
    schema = {"type": "object", "properties": properties, "required": [*properties],
              "additionalProperties": False}
    return {"type": "function", "name": name, "strict": True, "parameters": schema}


CITY = {"enum": ["Oslo", "Rome", "Paris"]}
TOOLS = [function("get_weather", city=CITY, days={"type": "integer", "minimum": 1,
                                                  "maximum": 9}),
         function("book", city=CITY, first_class={"type": "boolean"})]
BOOK = {"type": "function", "name": "book"}
FORCED = dict(tools=TOOLS, tool_choice=BOOK, max_output_tokens=300, ignore_eos=False)


def calls_of(response):
    return [item for item in response.output if item.type == "function_call"]


def check_call(call):
    [tool] = [tool for tool in TOOLS if tool["name"] == call.name]
    validate(json.loads(call.arguments), tool["parameters"])


async def forced(api, given="Hello", **fields):
    run = await create(api, given, **FORCED | fields)
    return run, read(await run.finished())


# Calls


@pytest.mark.parametrize("choice", ["required", BOOK], ids=["required", "named"])
@pytest.mark.parametrize("parallel", [True, False])
@test_async
async def test_a_call_that_is_forced_streamed_and_whole(choice, parallel):
    async with served() as api:
        found = []
        for stream in (True, False):
            run, response = await forced(api, tool_choice=choice, stream=stream,
                                         parallel_tool_calls=parallel)
            if stream:
                check_events(run)
            calls = calls_of(response)
            assert calls == response.output and calls
            assert len({(call.id, call.call_id) for call in calls}) == len(calls)
            for call in calls:
                if call.status == "completed":
                    check_call(call)
            if choice == BOOK or not parallel:
                assert len(calls) == 1 and response.status == "completed"
            assert response.parallel_tool_calls is parallel
            if choice == BOOK:
                assert calls[0].name == "book" and response.tool_choice.name == "book"
            found.append([(call.name, call.arguments, call.status) for call in calls])
        assert found[0] == found[1]


@test_async
async def test_an_answer_is_cut_anywhere():
    async with served() as api:
        _, whole = await forced(api)
        [call] = calls_of(whole)
        kinds = set()
        for limit in range(1, whole.usage.output_tokens):
            run, response = await forced(api, stream=True, max_output_tokens=limit)
            check_events(run)
            assert response.status == "incomplete"
            [item] = response.output
            kinds.add(item.type)
            if item.type == "function_call":
                assert item.name == "book" and call.arguments.startswith(item.arguments)
                assert (item.status == "completed") == is_json(item.arguments)
            else:
                assert item.status == "incomplete"
        assert kinds == {"message", "function_call"}


@test_async
async def test_a_stop_string_in_the_arguments_leaves_an_incomplete_call():
    async with served() as api:
        run, response = await forced(api, stop=["first"], stream=True)
        check_events(run)
        [item] = response.output
        assert item.type == "function_call" and item.status == "incomplete"
        assert "first" not in item.arguments and response.status == "completed"


@test_async
async def test_calls_in_the_background_are_read_from_any_number():
    async with served() as api:
        run = await create(api, **FORCED, background=True, stream=True)
        readers = [asyncio.create_task(follow(run, after)) for after in range(-1, 12)]
        await run.finished()
        events = [event.decode() for event in run.log.events]
        for after, reader in enumerate(readers, -1):
            assert await reader == events[after + 1:]
        check_events(run)
        [call] = calls_of(read(run.fetch()))
        check_call(call)


async def follow(run, after):
    return [event async for event in run.log.follow(after)]


@test_async
async def test_a_call_that_is_cancelled_is_incomplete():
    async with served() as api:
        tool = function("tell", text={"type": "string", "minLength": 500})
        run = await create(api, **FORCED | dict(tools=[tool], tool_choice="required"),
                           background=True, stream=True)
        await until(lambda: len(run.log.events) > 8)
        await run.cancel()
        check_events(run)
        [call] = calls_of(seen(run))
        assert call.name == "tell" and call.status == "incomplete"


@test_async
async def test_auto_and_none_leave_the_text_alone():
    async with served() as api:
        plain = [{name: value for name, value in tool.items() if name != "strict"}
                 for tool in TOOLS]
        texts = {}
        for choice in ("auto", "none", None):
            run = await create(api, tools=plain, tool_choice=choice, stream=True)
            response = read(await run.finished())
            check_events(run)
            assert [item.type for item in response.output] == ["message"]
            assert response.tool_choice == (choice or "auto")
            texts[choice] = response.usage.input_tokens, response.output_text
        assert texts["auto"] == texts[None] != texts["none"]
        assert texts["none"] == await plain_text(api)


async def plain_text(api):
    response = read(await (await create(api)).finished())
    return response.usage.input_tokens, response.output_text


# What the parser says becomes items


def script(*parts, ids=None):
    "Tokens of one character each, special ones with an id of their own."
    ids = ids or {}
    return [(ids.get(part, ord(char)), char) if part not in ids else (ids[part], part)
            for part in parts for char in ([part] if part in ids else part)]


ONE_BY_ONE = SimpleNamespace(randint=lambda low, high: 1)
CALL = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("parts, expected", [
    (("Hi ", CALL % '{"a": 1}'), [("message", "Hi"), ("function_call", '{"a": 1}')]),
    ((CALL % "{}", "\n", CALL % '{"b": [1, 2]}'),
     [("function_call", "{}"), ("function_call", '{"b": [1, 2]}')]),
    (("<think>", "Hm.", "</think>", CALL % "{}"),
     [("reasoning", "Hm."), ("function_call", "{}")]),
    (("<think>", "Hm.", "</think>", "So: ", CALL % "{}"),
     [("reasoning", "Hm."), ("message", "So:"), ("function_call", "{}")]),
])
def test_thoughts_text_and_calls_in_any_cuts(parts, expected, lag):
    style = call_style("hermes", TOKENIZER)
    tools = [{"type": "function", "function": {"name": "f"}}]
    tokens = script(*parts, ids={"<think>": 300, "</think>": 301})
    for seed in range(-1, 30):
        cuts = random.Random(seed) if seed >= 0 else ONE_BY_ONE
        inner = ReasoningParser(marker_ids=(300, 301)) if 300 in dict(tokens) else PlainParser()
        parser = CallParser(style, inner, tools)
        _, items, events = transcript_of(tokens, cuts, parser, lag)
        fields = [raw(event) for event in events]
        for one in fields:
            EVENT.validate_python(one, strict=True)
        check_items(fields, items)
        found = [(item["type"], text_of(item).rstrip()) for item in items]
        assert found == expected
        names = {item["call_id"] for item in items if item["type"] == "function_call"}
        assert len(names) == sum(kind == "function_call" for kind, _ in expected)
        for item in items if seed < 0 else ():
            if item["type"] == "message": # its own, and nothing of the calls
                told = bytes(b for one in item["content"][0]["logprobs"] for b in one["bytes"])
                assert told.decode().startswith(text_of(item)) and b"name" not in told


# Histories


CALLS = [{"type": "function_call", "call_id": f"c{i}", "name": "get_weather",
          "arguments": json.dumps({"city": city, "days": 1})}
         for i, city in enumerate(("Oslo", "Rome", "Paris"))]
RESULTS = [{"type": "function_call_output", "call_id": f"c{i}", "output": text}
           for i, text in enumerate(("rain", "sun", "snow"))]


def messages_of(items):
    return to_messages(item.fields for item in read_items(items))


def test_results_in_any_order_follow_their_calls():
    question = {"role": "user", "content": "And?"}
    expected = messages_of([question, *CALLS, *RESULTS])
    assert [one.get("tool_call_id") for one in expected] == [None, None, "c0", "c1", "c2"]
    for seed in range(10):
        mixed = random.Random(seed).sample(RESULTS, 3)
        assert messages_of([question, *CALLS, *mixed]) == expected
    twice = [question, CALLS[1], RESULTS[1], CALLS[0], RESULTS[0]] # in turns: as they were
    assert [one.get("tool_call_id") for one in messages_of(twice)] == [
        None, None, "c1", None, "c0"]


@pytest.mark.parametrize("given", [
    [RESULTS[0]], [*CALLS[1:], RESULTS[0]], [RESULTS[0], CALLS[0]]])
def test_a_result_without_a_call_is_named(given):
    with pytest.raises(ApiError, match="No tool call found .* call_id \"c0\"") as caught:
        messages_of(given)
    assert caught.value.status == 400 and caught.value.body["error"]["param"] == "input"


@test_async
async def test_calls_and_results_in_every_form_are_one_prompt():
    async with served() as api:
        _, one = await forced(api, "Book a train", parallel_tool_calls=False)
        [call] = calls_of(one)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
        question = {"role": "user", "content": "Book a train"}
        whole = call.to_dict()
        plain = {name: whole[name] for name in ("type", "call_id", "name", "arguments")}
        reference = {"type": "item_reference", "id": call.id}
        forms = [form_of([result], previous_response_id=one.id),
                 *(form_of([question, item, result]) for item in (whole, plain, reference))]
        prompts = {tuple((await api.prompt(form, ""))[1]) for form in forms}
        assert prompts == {tuple(encode_chat(TOKENIZER, [
            {"role": "user", "content": "Book a train"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": call.call_id, "type": "function",
                 "function": {"name": "book", "arguments": call.arguments}}]},
            {"role": "tool", "tool_call_id": call.call_id, "content": "done"}]))}
        two = read(await (await create(api, [result], previous_response_id=one.id)).finished())
        items = [item.fields for item in api.store.get("", two.id).items]
        assert [item["type"] for item in items] == [
            "message", "function_call", "function_call_output"]
        assert items[1] == whole
        with pytest.raises(ApiError, match="No tool call found"):
            await create(api, [result | {"call_id": "c9"}], previous_response_id=one.id)
        assert set(ids_in(api.store)) == {one.id, two.id}
        await delete(api, "", one.id)
        _, ids, _ = await api.prompt(forms[3], "") # the second response has the call, too
        assert tuple(ids) in prompts


@test_async
async def test_a_conversation_goes_on_after_a_call_that_was_cut():
    async with served() as api:
        _, cut = await forced(api, stop=["first"])
        [call] = calls_of(cut)
        assert call.status == "incomplete" and not is_json(call.arguments)
        for given in ("Go on", [{"type": "function_call_output", "call_id": call.call_id,
                                 "output": "no JSON"}]):
            run = await create(api, given, previous_response_id=cut.id, tools=TOOLS)
            assert read(await run.finished()).status in ("completed", "incomplete")
            assert [item.fields["type"] for item in run.items][:2] == ["message",
                                                                      "function_call"]


# Formats


PERSON = {"type": "object", "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {
    "type": "integer", "minimum": 0, "maximum": 120}}, "required": ["name", "age"],
    "additionalProperties": False}
AS_PERSON = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}


@test_async
async def test_formats_are_held_and_told_back():
    async with served() as api:
        for stream in (True, False):
            run = await create(api, text={"format": AS_PERSON}, stream=stream,
                               max_output_tokens=200, top_logprobs=1)
            response = read(await run.finished())
            validate(json.loads(response.output_text), PERSON)
            assert response.status == "completed"
            told = json.loads(run.body)["text"]["format"]
            assert told == AS_PERSON and response.text.format.name == "person"
            assert len(response.output[0].content[0].logprobs) >= 1
            if stream:
                check_events(run)
        for fields, texts in (({"choice": ["yes", "no"]}, ("yes", "no")),
                              ({"regex": "[ab]{3}c"}, None)):
            run = await create(api, structured_outputs=fields, max_output_tokens=50)
            response = read(await run.finished())
            assert response.status == "completed" and response.text.format.type == "text"
            assert texts is None or response.output_text in texts
            assert texts or response.output_text[3:] == "c"


@test_async
async def test_an_answer_or_calls():
    "A format and tools: the answer is one or the other."
    async with served() as api:
        run, response = await forced(api, text={"format": AS_PERSON}, tool_choice="auto",
                                     stream=True)
        check_events(run)
        if response.status == "completed" and not calls_of(response):
            validate(json.loads(response.output_text), PERSON)
        for call in calls_of(response):
            if call.status == "completed":
                check_call(call)


@pytest.mark.parametrize("fields, param, word", [
    ({"text": {"format": AS_PERSON | {"schema": {"not": {}}}}}, "text.format", "not"),
    ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look"),
    ({"tools": [TOOLS[0], TOOLS[1] | {"parameters": {
        "type": "object", "properties": {"a": {"uniqueItems": True}}}}],
      "tool_choice": "required"}, "tools[1].parameters", "uniqueItems"),
])
@test_async
async def test_what_cannot_be_held_is_refused_before_the_queue(fields, param, word):
    async with served() as api:
        for background in (True, False):
            with pytest.raises(ApiError, match=word) as caught:
                await create(api, background=background, stream=True, **fields)
            error = caught.value.body["error"]
            assert caught.value.status == 400 and error["param"].startswith(param)
        assert not api.store.runs and not api.engine.num_unfinished


def test_choices_are_told_back_flat():
    for asked, told in (
        (None, "auto"), ("required", "required"), (BOOK, BOOK),
        ({"type": "function", "function": {"name": "book"}}, BOOK),
    ):
        form = form_of("x", tools=TOOLS, tool_choice=asked)
        assert json.loads(told_fields(form)["tool_choice"]) == told
    nested = [{"type": "function", "function": {"name": "f", "strict": None}}]
    [tool] = json.loads(told_fields(form_of("x", tools=nested))["tools"])
    assert tool == {"type": "function", "name": "f", "description": None, "parameters": None,
                    "strict": None}


# The official client


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada", "Bob"]
    age: int = Field(ge=0, le=120)


class Weather(BaseModel):
    "Say how the weather is."
    city: Literal["Oslo", "Rome"]


class Book(BaseModel):
    "Book a train."
    city: Literal["Oslo", "Rome"]
    seats: int = Field(ge=1, le=4)


def test_parse_with_a_model_and_with_tools():
    with running() as server:
        client = server.client()
        kwargs = dict(model="tiny", temperature=0, max_output_tokens=300)
        parsed = client.responses.parse(input="Who?", text_format=Person, **kwargs)
        assert isinstance(parsed.output_parsed, Person) and parsed.status == "completed"
        tools = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Book)]
        parsed = client.responses.parse(input="Go", tools=tools, parallel_tool_calls=False,
                                        tool_choice={"type": "function", "name": "Book"},
                                        **kwargs)
        [call] = parsed.output
        assert isinstance(call.parsed_arguments, Book) and call.name == "Book"
        with client.responses.stream(input="Who?", text_format=Person, **kwargs) as stream:
            events = list(stream)
        done = [event for event in events if event.type == "response.output_text.done"]
        assert isinstance(done[0].parsed, Person)
        assert events[-1].response.output_parsed == done[0].parsed
        with client.responses.stream(input="Go", tools=tools, tool_choice="required",
                                     parallel_tool_calls=False, **kwargs) as stream:
            snapshots = [event.snapshot for event in stream
                         if event.type == "response.function_call_arguments.delta"]
            final = stream.get_final_response()
        [call] = final.output
        assert snapshots[-1] == call.arguments and isinstance(call.parsed_arguments, BaseModel)
        assert all(b.startswith(a) for a, b in zip(snapshots, snapshots[1:]))
        with pytest.raises(openai.BadRequestError, match="text.format") as caught:
            client.responses.create(input="x", text={"format": {
                "type": "json_schema", "name": "n", "schema": {"not": {}}}}, **kwargs)
        assert caught.value.param.startswith("text.format")
        server.settled()


@pytest.mark.parametrize("how", ["previous", "items", "background"])
def test_an_agent_of_three_turns(how):
    "Two tools; each turn is forced, and its events are read by the client's strict types."
    run = {"get_weather": lambda city, days: f"{days} days of sun in {city}",
           "book": lambda city, first_class: f"a seat to {city}"}
    with running() as server:
        client = server.client()
        history, given, previous, called = [], "Plan a trip", None, []
        for choice in ({"type": "function", "name": "get_weather"}, BOOK, "none"):
            options = dict(model="tiny", temperature=0, max_output_tokens=300, tools=TOOLS,
                           tool_choice=choice, stream=True, store=how != "items",
                           background=how == "background")
            if how == "items":
                new = given if isinstance(given, list) else [{"role": "user", "content": given}]
                history += new
                stream = client.responses.create(input=history, **options)
            else:
                stream = client.responses.create(
                    input=given, previous_response_id=previous, **options)
            events = list(stream)
            for event in events:
                EVENT.validate_python(event.to_dict(), strict=True)
            assert [event.sequence_number for event in events] == list(range(len(events)))
            final = events[-1].response
            check_items([event.to_dict() for event in events], final.to_dict()["output"])
            previous, given = final.id, []
            history += [item.to_dict() for item in final.output]
            for call in calls_of(final):
                called.append(call.name)
                given.append({"type": "function_call_output", "call_id": call.call_id,
                              "output": run[call.name](**json.loads(call.arguments))})
            if how != "items":
                assert client.responses.retrieve(final.id) == final
        assert called == ["get_weather", "book"] and not given
        assert isinstance(final, Response)
        assert [item.type for item in final.output] == ["message"]
        server.settled()
