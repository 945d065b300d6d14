"""The official OpenAI client, checking every answer against its types, on every endpoint."""

import asyncio
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import openai
import pytest
from chat_templates import QWEN3
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter
from server_fixtures import EOS, MODEL, TOKENIZER, encode_chat, running, solo, solo_text
from tokenizers import AddedToken

from nanollm.structured_output import Grammars
from nanollm.text import load_tokenizer


class Closed(BaseModel, extra="forbid"):
    "Nothing else."


class Answer(Closed):
    "What random weights can finish: nothing in it has no end."

    colour: Literal["red", "green"]
    number: int = Field(ge=0, le=99)
    words: list[Literal["a", "b"]] = Field(max_length=2)


class Weather(Closed):
    "How it is somewhere."

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=3)


class Clock(Closed):
    "What time it is."

    zone: Literal["UTC", "CET"]


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Clock)]
LOOSE = [  # without `strict`
    one | {"function": {k: v for k, v in one["function"].items() if k != "strict"}}
    for one in TOOLS
]
ENOUGH = dict(model="tiny", max_tokens=300)
MESSAGES = [{"role": "user", "content": "Hello there"}]
GREEDY = dict(model="tiny", temperature=0, max_tokens=8)
EXTRA = {"extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server():
    with running(names=("tiny", "an/alias"), max_stored_responses=8) as found:
        yield found
        found.settled()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def lenient(server):
    "The client as it comes. Its strict types lack the nulls of completions."
    return server.client(strict=False)


def expected(max_tokens=8):
    return solo_text(MESSAGES, max_tokens)


# --- chat completions


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize(
    "stream, usage", [(False, False), (True, False), (True, True)]
)  # a whole answer has it always
def test_chat(client, stream, usage, logprobs, n):
    options = {} if logprobs is None else dict(logprobs=True, top_logprobs=logprobs)
    options |= {"stream_options": {"include_usage": True}} if usage else {}
    found = client.chat.completions.create(
        messages=MESSAGES, n=n, stream=stream, **GREEDY, **EXTRA, **options
    )
    texts, tokens, ends = [""] * n, [[] for _ in range(n)], [[] for _ in range(n)]
    if stream:
        chunks = list(found)
        assert (
            len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
        )
        first = {}
        for chunk in chunks:
            for choice in chunk.choices:
                first.setdefault(choice.index, choice.delta)
                texts[choice.index] += choice.delta.content or ""
                tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
                ends[choice.index] += [choice.finish_reason] if choice.finish_reason else []
        assert all(
            delta.role == "assistant" and delta.content == "" for delta in first.values()
        )
        assert ends == [["length"]] * n
        if usage:
            assert all(chunk.usage is None for chunk in chunks[:-1]) and not chunks[-1].choices
        counted = chunks[-1].usage
        assert (counted is not None) == usage
    else:
        assert found.object == "chat.completion" and found.id.startswith("chatcmpl-")
        assert [choice.index for choice in found.choices] == list(range(n))
        texts = [choice.message.content for choice in found.choices]
        tokens = [
            choice.logprobs.content if choice.logprobs else [] for choice in found.choices
        ]
        assert {choice.finish_reason for choice in found.choices} == {"length"}
        counted = found.usage
    assert texts == [expected()] * n
    if counted:
        assert (
            counted.prompt_tokens == len(encode_chat(TOKENIZER, MESSAGES))
            and counted.completion_tokens == 8 * n
        )
    for entries in tokens:
        assert len(entries) == (0 if logprobs is None else 8)
        assert all(
            len(entry.top_logprobs) == logprobs and -9999 <= entry.logprob <= 0
            for entry in entries
        )
        joined = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
        assert not entries or joined == expected()


def ask(client, endpoint, stream, max_tokens, **options):
    "Text and reason of one answer to the same conversation, from any endpoint."
    more = dict(model="tiny", stream=stream) | {"temperature": 0} | options
    if endpoint == "responses":
        names = {"temperature", "top_p", "stream", "model"}
        extra = {name: more.pop(name) for name in more.keys() - names}
        made = client.responses.create(
            input="Hello there",
            max_output_tokens=max_tokens,
            extra_body=extra | extra.pop("extra_body", {}),
            **more,
        )
        final = list(made)[-1].response if stream else made
        return final.output_text, {"completed": "stop", "incomplete": "length"}[final.status]
    if endpoint == "chat":
        made = client.chat.completions.create(messages=MESSAGES, max_tokens=max_tokens, **more)
    else:
        made = client.completions.create(
            prompt=encode_chat(TOKENIZER, MESSAGES), max_tokens=max_tokens, **more
        )
    choices = [choice for part in (made if stream else [made]) for choice in part.choices]
    if endpoint == "completions":
        texts = [choice.text for choice in choices]
    else:
        texts = [
            (choice.delta if stream else choice.message).content or "" for choice in choices
        ]
    return "".join(texts), choices[-1].finish_reason


def any_way(test):
    test = pytest.mark.parametrize("stream", [False, True])(test)
    return pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])(test)


@any_way
def test_stop_strings(lenient, endpoint, stream):
    whole = expected(30)
    stop = whole[3:5]
    for given in (stop, ["never", stop]):
        assert ask(lenient, endpoint, stream, 30, stop=given) == (
            whole[: whole.index(stop)],
            "stop",
        )
    kept = {"include_stop_str_in_output": True}
    text, reason = ask(lenient, endpoint, stream, 30, stop=stop, extra_body=kept)
    assert text == whole[: whole.index(stop) + len(stop)] and reason == "stop"
    assert ask(lenient, endpoint, stream, 8) == (expected(), "length")


@any_way
def test_stop_tokens(lenient, endpoint, stream):
    ids = solo(MESSAGES, 30)
    text, reason = ask(lenient, endpoint, stream, 30, extra_body={"stop_token_ids": [ids[5]]})
    assert reason == "stop" and expected(30).startswith(text) and len(text) < len(expected(30))


@any_way
def test_seeds(lenient, endpoint, stream):
    def text(seed):
        return ask(
            lenient,
            endpoint,
            stream,
            16,
            seed=seed,
            temperature=1.3,
            extra_body={"ignore_eos": True},
        )[0]

    assert text(5) == text(5) != text(6)


@any_way
def test_penalties(lenient, endpoint, stream):
    def text(**options):
        return ask(lenient, endpoint, stream, 8, **options)[0]

    assert (
        expected()
        == text()
        == text(presence_penalty=0, frequency_penalty=0, logit_bias={"65": 0})
    )
    assert (
        expected()
        == text(temperature=1, extra_body={"top_k": 1})
        == text(temperature=1, top_p=0.001)
    )
    again = {str(ord("f")): 3.8}  # as much as makes the tiny model say one thing only
    assert text(logit_bias=again) == "ffffffff"
    for penalty in (
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 9.0}},
    ):
        assert "ff" not in text(logit_bias=again, **penalty), penalty
    assert text(logit_bias={str(solo(MESSAGES, 1)[0]): -100}) != expected()


def test_chat_reads_every_form_of_message(client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Ho", "name": "x"},
        {"role": "user", "content": "Go on"},
    ]
    assert (
        client.chat.completions.create(messages=messages, **GREEDY).usage.completion_tokens == 8
    )
    nulls = dict(
        stop=None,
        seed=None,
        n=None,
        logprobs=None,
        tools=None,
        response_format=None,
        user=None,
        stream_options=None,
    )
    assert (
        client.chat.completions.create(
            messages=MESSAGES, **GREEDY, extra_body=nulls | {"unknown": 1}
        )
        .choices[0]
        .message.content
        == expected()
    )


def test_chat_tools_are_shown_and_not_forced(client):
    sizes = []
    for choice in ("auto", "none"):
        found = client.chat.completions.create(
            messages=MESSAGES, tools=TOOLS, tool_choice=choice, **GREEDY
        )
        assert found.choices[0].message.tool_calls is None
        sizes.append(found.usage.prompt_tokens)
    assert sizes[0] > sizes[1] == len(encode_chat(TOKENIZER, MESSAGES))


def test_chat_stream_helper(client):
    stop = expected(30)[6:9]
    with client.chat.completions.stream(
        messages=MESSAGES, stop=stop, **GREEDY | {"max_tokens": 30}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds[0] == "chunk" and "content.delta" in kinds and "content.done" in kinds
    assert (
        final.choices[0].message.content == expected(30).split(stop)[0]
        and final.choices[0].finish_reason == "stop"
    )


# -- answers that are held to something


@pytest.mark.parametrize("n", [1, 3])
def test_chat_parse(client, n):
    found = client.chat.completions.parse(
        messages=MESSAGES, response_format=Answer, n=n, seed=7, **ENOUGH
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop" and choice.message.refusal is None
        assert choice.message.parsed == Answer.model_validate_json(choice.message.content)
    assert len({choice.message.content for choice in found.choices}) == n, "each its own"
    again = client.chat.completions.parse(
        messages=MESSAGES, response_format=Answer, n=n, seed=7, **ENOUGH
    )
    assert [c.message.content for c in again.choices] == [
        c.message.content for c in found.choices
    ]


def test_chat_parse_of_a_cut_answer(client):
    with pytest.raises(openai.LengthFinishReasonError) as error:
        client.chat.completions.parse(
            messages=MESSAGES, response_format=Answer, model="tiny", max_tokens=5
        )
    [choice] = error.value.completion.choices
    assert choice.finish_reason == "length" and len(choice.message.content) == 5


def test_chat_stream_of_a_format(client):
    with client.chat.completions.stream(
        messages=MESSAGES,
        response_format=Answer,
        stream_options={"include_usage": True},
        **ENOUGH,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event for event in events if event.type == "content.delta"]
    [done] = [event for event in events if event.type == "content.done"]
    content = final.choices[0].message.content
    assert "".join(event.delta for event in deltas) == content == done.content
    assert done.parsed == final.choices[0].message.parsed == Answer.model_validate_json(content)
    assert isinstance(deltas[-2].parsed, dict), "the client sees the object grow"
    assert final.usage.completion_tokens >= len(content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "own, pattern",
    [
        ({"choice": ["yes", "no", "per\"haps"]}, 'yes|no|per"haps'),
        ({"regex": "[0-9]{3}-[a-f]{2,4}"}, "[0-9]{3}-[a-f]{2,4}"),
        ({"grammar": 'start: "(" inner ")"\ninner: /[xy]{1,3}/'}, r"\([xy]{1,3}\)"),
        ({"json": {"enum": ["a", 5]}}, '"a"|5'),
        (
            {"json": Answer.model_json_schema(), "disable_any_whitespace": True},
            r'\{"colour":"(red|green)","number":\d+,"words":\[("[ab]"(,"[ab]")?)?\]\}',
        ),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_structured_outputs(client, lenient, endpoint, own, pattern, stream):
    asked = dict(stream=stream, extra_body={"structured_outputs": own}, **ENOUGH)
    if endpoint == "chat":
        found = client.chat.completions.create(messages=MESSAGES, **asked)
    else:
        found = lenient.completions.create(prompt="Hello there", **asked)
    chunks = list(found) if stream else [found]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    if endpoint == "completions":
        texts = [choice.text for choice in choices]
    else:
        texts = [(c.delta if stream else c.message).content or "" for c in choices]
    assert re.fullmatch(pattern, "".join(texts))
    assert choices[-1].finish_reason == "stop"


def test_completions_with_a_format_and_several_prompts(lenient):
    form = {"type": "json_schema", "json_schema": {"schema": Answer.model_json_schema()}}
    found = lenient.completions.create(
        prompt=["a", "b"],
        n=2,
        echo=True,
        logprobs=1,
        extra_body={"response_format": form},
        **ENOUGH,
    )
    assert len(found.choices) == 4
    for choice in found.choices:
        Answer.model_validate_json(choice.text[1:])
        assert choice.text[0] == "aabb"[choice.index]
        raw = choice.logprobs
        assert len(raw.tokens) == len(raw.token_logprobs) and min(raw.token_logprobs[1:]) < -3


def test_a_stop_string_cuts_what_a_grammar_makes(client):
    found = client.chat.completions.create(
        messages=MESSAGES, response_format={"type": "json_object"}, stop='"', **ENOUGH
    )
    assert found.choices[0].finish_reason in ("stop", "length")
    assert '"' not in found.choices[0].message.content
    found = client.chat.completions.create(
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice="required",
        stop='"arguments"',
        **ENOUGH,
    )
    [choice] = found.choices
    assert choice.finish_reason == "stop", "there is no whole call"


def test_json_of_logprobs_is_raw(client):
    found = client.chat.completions.create(
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=2,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
        **ENOUGH,
    )
    [choice] = found.choices
    tokens = choice.logprobs.content
    assert "".join(entry.token for entry in tokens[:-1]) == choice.message.content
    best = {entry.token for entry in tokens[0].top_logprobs}
    assert best - {"y", "n"}, "what the model would have liked, not what it may"


# -- calls


def calls_of(found, stream):
    "Calls, content and reason, of a whole answer or of a stream put together by hand."
    if not stream:
        [choice] = found.choices
        calls = [
            (call.id, call.function.name, call.function.arguments)
            for call in choice.message.tool_calls or ()
        ]
        return calls, choice.message.content or "", choice.finish_reason
    calls, content, reasons = {}, "", []
    for chunk in found:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert call.type == "function" and call.function.arguments == ""
                    assert call.index == len(calls), "each begins once, in order"
                    calls[call.index] = [call.id, call.function.name, ""]
                else:
                    assert call.function.name is None and call.type is None
                    calls[call.index][2] += call.function.arguments
    [reason] = reasons
    return [tuple(call) for call in calls.values()], content, reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tools", [TOOLS, LOOSE], ids=["strict", "loose"])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_named_function_is_called(client, tools, parallel, stream):
    found = client.chat.completions.create(
        messages=MESSAGES,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "Clock"}},
        parallel_tool_calls=parallel,
        stream=stream,
        model="tiny",
        max_tokens=300,
    )
    calls, content, reason = calls_of(found, stream)
    [(call_id, name, arguments)] = calls
    assert name == "Clock" and not content and call_id
    assert reason == "stop", "as OpenAI has it for a function that the client has named"
    Clock.model_validate_json(arguments)  # also if it is not strict, since it can be held


@pytest.mark.parametrize("stream", [False, True])
def test_some_function_must_be_called(client, stream):
    for seed in range(4):
        found = client.chat.completions.create(
            messages=MESSAGES,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            stream=stream,
            seed=seed,
            **ENOUGH,
        )
        [(_, name, arguments)], content, reason = calls_of(found, stream)
        {"Weather": Weather, "Clock": Clock}[name].model_validate_json(arguments)
        assert not content and reason == "tool_calls"


def test_several_calls_have_ids_of_their_own(client):
    end = TOKENIZER.eos_token_id
    found = client.chat.completions.create(
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice="required",
        logit_bias={end: -20},
        seed=1,
        **ENOUGH,
    )
    calls, content, reason = calls_of(found, stream=False)
    assert len(calls) > 1 and len({call_id for call_id, _, _ in calls}) == len(calls)
    for _, name, arguments in calls[:-1]:
        {"Weather": Weather, "Clock": Clock}[name].model_validate_json(arguments)
    assert not content.strip() and reason == "length"


def test_chat_parse_of_calls(client):
    found = client.chat.completions.parse(
        messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
        **ENOUGH,
    )
    message = found.choices[0].message
    [call] = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather | Clock)
    assert message.content is None and message.parsed is None
    assert found.choices[0].finish_reason == "tool_calls"


def test_chat_stream_of_calls(client):
    with client.chat.completions.stream(
        messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
        **ENOUGH,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kind = "tool_calls.function.arguments"
    deltas = [event for event in events if event.type == f"{kind}.delta"]
    [done] = [event for event in events if event.type == f"{kind}.done"]
    [call] = final.choices[0].message.tool_calls
    told = "".join(event.arguments_delta for event in deltas)
    assert told == done.arguments == call.function.arguments
    assert done.parsed_arguments == call.function.parsed_arguments
    assert done.name == call.function.name and done.index == 0


def test_strict_functions_and_a_format_with_a_free_choice(client):
    "Whatever random weights choose: it is the format, or calls that fit their schemas."
    for seed in range(6):
        found = client.chat.completions.create(
            messages=MESSAGES,
            tools=TOOLS,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": Answer.model_json_schema()},
            },
            seed=seed,
            parallel_tool_calls=False,
            **ENOUGH,
        )
        calls, content, reason = calls_of(found, stream=False)
        if calls:
            [(_, name, arguments)] = calls
            {"Weather": Weather, "Clock": Clock}[name].model_validate_json(arguments)
            assert reason == "tool_calls"
        else:
            Answer.model_validate_json(content)
            assert reason == "stop"


def test_a_cut_call_ends_with_length(client):
    for stream in (False, True):
        found = client.chat.completions.create(
            messages=MESSAGES,
            tools=TOOLS,
            tool_choice="required",
            stream=stream,
            temperature=0,
            model="tiny",
            max_tokens=45,
        )
        calls, content, reason = calls_of(found, stream)
        assert reason == "length" and len(calls) <= 1
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            messages=MESSAGES, tools=TOOLS, tool_choice="required", model="tiny", max_tokens=45
        )


def test_a_conversation_with_calls_and_results(client):
    first = client.chat.completions.create(
        messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
        **ENOUGH,
    )
    message = first.choices[0].message
    [call] = message.tool_calls
    messages = [
        *MESSAGES,
        message.model_dump(exclude_unset=True),
        {"role": "tool", "tool_call_id": call.id, "content": "22"},
    ]
    second = client.chat.completions.create(
        messages=messages, tools=TOOLS, **GREEDY | {"max_tokens": 1}
    )
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + len(call.function.arguments)


# -- thoughts before what is held


@pytest.fixture(scope="module")
def thinker():
    "A client of a model that may think aloud, with the template of Qwen3, and its tokenizer."
    tokenizer = load_tokenizer("tiny-llama", load_format="dummy")
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.chat_template = QWEN3
    grammars = Grammars(tokenizer, MODEL.config.vocab_size, EOS)
    with running(tokenizer=tokenizer, grammars=grammars) as server:
        yield server.client(), tokenizer.get_added_vocab()
        server.settled()


def biased(ids, **by_name):
    "A request in which random weights like to think, for a while."
    bias = {"<think>": 100, "</think>": 4} | by_name
    return dict(model="tiny", logit_bias={ids[name]: bias[name] for name in bias})


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_come_first_and_are_free(thinker, stream):
    client, ids = thinker
    for seed in range(3):
        asked = dict(messages=MESSAGES, response_format=Answer, seed=seed, max_tokens=900)
        if stream:
            with client.chat.completions.stream(**asked, **biased(ids)) as events:
                found = events.get_final_completion()
        else:
            found = client.chat.completions.parse(**asked, **biased(ids))
        [choice] = found.choices
        assert choice.finish_reason == "stop" and choice.message.reasoning
        assert choice.message.parsed == Answer.model_validate_json(choice.message.content)
        assert stream or found.usage.completion_tokens_details.reasoning_tokens > 0


def test_calls_after_thoughts(thinker):
    client, ids = thinker
    for seed in range(3):
        found = client.chat.completions.parse(
            messages=MESSAGES,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            seed=seed,
            max_tokens=900,
            **biased(ids),
        )
        message = found.choices[0].message
        assert message.reasoning and not message.content
        assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather | Clock)
        assert found.choices[0].finish_reason == "tool_calls"


def test_a_model_that_skips_its_thoughts_is_held_all_the_same(thinker):
    client, ids = thinker
    none = biased(ids) | {"logit_bias": {ids["<think>"]: -100}}
    closed = biased(ids) | {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    for options in (none, closed):
        found = client.chat.completions.parse(
            messages=MESSAGES, response_format=Answer, max_tokens=300, **options
        )
        message = found.choices[0].message
        assert message.parsed and not hasattr(message, "reasoning")


def test_a_cut_thought_is_no_answer(thinker):
    client, ids = thinker
    found = client.chat.completions.create(
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice="required",
        max_tokens=20,
        **biased(ids, **{"</think>": -100}),
    )
    [choice] = found.choices
    assert choice.finish_reason == "length" and choice.message.reasoning
    assert choice.message.content is None and choice.message.tool_calls is None
    assert found.usage.completion_tokens_details.reasoning_tokens >= 19


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BAD = {"type": "object", "properties": {"a": {"not": {"type": "integer"}}}}


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def function(schema, **more):
    return {"type": "function", "function": {"name": "f", "parameters": schema, **more}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields, param, words",
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": BAD},
                }
            },
            "response_format.json_schema.schema",
            "not",
        ),
        ({"structured_outputs": {"json": BAD}}, "structured_outputs.json", "not"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "regex"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", ""),
        (
            {"tools": [*TOOLS, function(BAD, strict=True)], "tool_choice": "required"},
            "tools[2].function.parameters",
            "not",
        ),
        ({"tools": [function(BAD, strict=True)]}, "tools[0].function.parameters", "not"),
        (
            {"tools": [*TOOLS, function(nested(70), strict=True)]},
            "tools[2].function.parameters",
            "64",
        ),
        (
            {
                "tools": [function(SCHEMA, strict=True)],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": BAD},
                },
            },
            "response_format.json_schema.schema",
            "not",
        ),
        ({"guided_json": SCHEMA}, "guided_json", "structured_outputs.json"),
    ],
)
def test_what_cannot_be_held_is_refused_before_the_stream(client, fields, param, words, stream):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            messages=MESSAGES, stream=stream, extra_body=fields, **GREEDY
        )
    assert error.value.param == param and words in error.value.body["message"]
    assert error.value.type == "invalid_request_error"


@pytest.mark.parametrize("schema", [BAD, nested(70), {"$ref": "#/nowhere"}])
def test_a_loose_function_may_have_any_schema(client, schema):
    found = client.chat.completions.create(
        messages=MESSAGES,
        tools=[function(schema)],
        tool_choice="required",
        **GREEDY | {"max_tokens": 60},
    )
    assert found.choices[0].message.tool_calls[0].function.name == "f"


def test_a_server_without_grammars_constrains_nothing_and_says_so():
    with running(grammars=None) as server:
        client = server.client()
        for fields in (
            {"structured_outputs": {"regex": "a"}},
            {"response_format": {"type": "json_object"}},
            {"tools": TOOLS, "tool_choice": "required"},
            {"tools": TOOLS},
        ):
            with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
                client.chat.completions.create(
                    messages=MESSAGES, extra_body=fields, **GREEDY
                )
        client.chat.completions.create(messages=MESSAGES, tools=LOOSE, **GREEDY)


def test_constraints_with_priorities():
    options = dict(scheduling_policy="priority", max_num_seqs=2)
    with running(engine_options=options) as server, ThreadPoolExecutor(6) as pool:
        client = server.client()

        def one(priority):
            return client.chat.completions.parse(
                messages=MESSAGES,
                response_format=Answer,
                seed=priority,
                extra_body={"priority": priority},
                **ENOUGH,
            ).choices[0].message

        found = list(pool.map(one, range(6)))
        assert all(isinstance(message.parsed, Answer) for message in found)
        server.settled()


def test_typed_parsing_of_plain_text(client):
    stop = expected(30)[6:9]
    found = client.chat.completions.parse(
        messages=MESSAGES, stop=stop, **GREEDY | {"max_tokens": 30}
    )
    assert (
        found.choices[0].message.content == expected(30).split(stop)[0]
        and found.choices[0].message.parsed is None
    )
    with pytest.raises(openai.LengthFinishReasonError) as error:
        client.chat.completions.parse(messages=MESSAGES, **GREEDY)
    assert error.value.completion.choices[0].message.content == expected()
    found = client.responses.parse(
        model="tiny", input="Hello there", temperature=0, max_output_tokens=8
    )
    assert found.output_text == expected() and found.output_parsed is None


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_told_apart(server, client, monkeypatch, stream):
    from nanollm.chat import ReasoningParser

    whole = expected(30)
    cut = whole[5]

    monkeypatch.setattr("nanollm.chat.END", cut)
    monkeypatch.setattr(
        server.api, "parsers", lambda prompt_ids: ReasoningParser(True, False, (None, None))
    )
    options = GREEDY | {"max_tokens": 30}
    made = client.chat.completions.create(messages=MESSAGES, stream=stream, **options)
    parts = list(made) if stream else [made]
    texts = {"reasoning": "", "content": ""}
    for part in parts:
        for choice in part.choices:
            found = choice.delta if stream else choice.message
            for name in texts:
                texts[name] += getattr(found, name, None) or ""
    before, _, after = whole.partition(cut)
    assert texts == {"reasoning": before.lstrip(), "content": after.lstrip()}


def test_a_message_of_null_with_a_call_is_read(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for content in ({"content": None}, {}, {"content": ""}, {"content": []}):
        messages = [
            *MESSAGES,
            {"role": "assistant", "tool_calls": [call]} | content,
            {"role": "tool", "tool_call_id": "call_1", "content": "22"},
        ]
        found = client.chat.completions.create(messages=messages, **GREEDY)
        assert found.usage.completion_tokens == 8


def test_max_completion_tokens_wins(client):
    found = client.chat.completions.create(
        messages=MESSAGES, model="tiny", temperature=0, max_tokens=9, max_completion_tokens=3
    )
    assert found.usage.completion_tokens == 3


def test_async_client(server):
    async def run():
        options = dict(
            base_url=server.url + "/v1",
            api_key="x",
            max_retries=0,
            _strict_response_validation=True,
        )
        async with openai.AsyncOpenAI(**options) as client:

            async def chat():
                stream = await client.chat.completions.create(
                    messages=MESSAGES, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def completion():
                made = await client.completions.create(
                    prompt=encode_chat(TOKENIZER, MESSAGES), **GREEDY
                )
                return made.choices[0].text

            async def response():
                asked = dict(
                    model="tiny", input="Hello there", temperature=0, max_output_tokens=8
                )
                async with client.responses.stream(**asked) as stream:
                    return [event async for event in stream][-1].response.output_text

            async def left():
                stream = await client.chat.completions.create(
                    messages=MESSAGES, stream=True, model="tiny", **EXTRA
                )
                await anext(aiter(stream))
                await stream.close()

            return await asyncio.gather(
                *(one() for one in (chat, completion, response) * 3), left()
            )

    assert asyncio.run(run()) == [expected()] * 9 + [None]


def test_request_ids_come_back(client):
    raw = client.chat.completions.with_raw_response.create(
        messages=MESSAGES, **GREEDY, extra_headers={"X-Request-Id": "mine"}
    )
    assert (
        raw.headers["x-request-id"] == raw.parse()._request_id == "mine"
        and "mine" in raw.parse().id
    )
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(messages=[], model="tiny")
    assert error.value.request_id


def test_cached_tokens_are_reported(client):
    messages = [
        {"role": "user", "content": "a long and shared beginning of a conversation " * 4}
    ]
    used = [
        client.chat.completions.create(
            messages=messages, **GREEDY
        ).usage.prompt_tokens_details.cached_tokens
        for _ in range(2)
    ]
    assert used[0] < used[1] and used[1] >= 160


# --- completions


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "prompt", ["Hello", ["Hello", "World"], [72, 105], [[72, 105], [72, 111]]]
)
def test_completions(client, lenient, prompt, stream):
    many = isinstance(prompt[0], list) or (
        isinstance(prompt, list) and isinstance(prompt[0], str)
    )
    prompts = prompt if many else [prompt]
    n = 2
    found = (lenient if stream else client).completions.create(
        prompt=prompt, n=n, stream=stream, **GREEDY
    )
    texts = [""] * (n * len(prompts))
    for part in found if stream else [found]:
        assert part.object == "text_completion"
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [solo_text(one, 8) for one in prompts for _ in range(n)]


def test_completions_echo_and_logprobs_score_a_prompt(lenient):
    found = lenient.completions.create(
        prompt="Hello", echo=True, logprobs=2, model="tiny", temperature=0, max_tokens=0
    )
    raw = json.loads(found.model_dump_json())
    [choice] = raw["choices"]
    assert choice["text"] == "Hello" and raw["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("Hello") and logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:]) and all(
        len(top) >= 2 for top in logprobs["top_logprobs"][1:]
    )
    longer = lenient.completions.create(
        prompt="Hello", echo=True, logprobs=0, model="tiny", temperature=0, max_tokens=2
    )
    assert longer.choices[0].logprobs.token_logprobs[1:5] == pytest.approx(
        logprobs["token_logprobs"][1:], abs=1e-4
    )
    assert len(longer.choices[0].logprobs.tokens) == 7 and longer.choices[0].text.startswith(
        "Hello"
    )


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("logprobs", [None, 0, 5])
@pytest.mark.parametrize("echo", [False, True])
def test_completion_streams_are_what_the_whole_answer_is(lenient, echo, logprobs, n):
    asked = dict(
        prompt=["Hello", "World"],
        echo=echo,
        logprobs=logprobs,
        n=n,
        seed=7,
        **GREEDY | {"temperature": 1},
    )
    asked["logit_bias"] = {
        str(i): -100 for i in range(128, 320)
    }  # ASCII only: a character is a token
    whole = lenient.completions.create(**asked, **EXTRA)
    texts, reports = [""] * (2 * n), [{} for _ in range(2 * n)]
    for part in lenient.completions.create(**asked, **EXTRA, stream=True):
        for choice in part.choices:
            texts[choice.index] += choice.text
            for name, values in choice.logprobs.to_dict().items() if choice.logprobs else ():
                reports[choice.index].setdefault(name, []).extend(values)
    assert [choice.index for choice in whole.choices] == list(range(2 * n))
    assert texts == [choice.text for choice in whole.choices]
    for choice, report in zip(whole.choices, reports, strict=True):
        assert choice.text.startswith("HelloWorld"[5 * (choice.index // n) :][:5]) or not echo
        if logprobs is None:
            assert choice.logprobs is None and not report
            continue
        expected = choice.logprobs.to_dict()
        assert report["tokens"] == expected["tokens"] and len(report["tokens"]) == 8 + 5 * echo
        assert (
            report["text_offset"]
            == expected["text_offset"]
            == list(range(len(report["tokens"])))
        )
        for got, wanted in zip(
            report["token_logprobs"][echo:], expected["token_logprobs"][echo:], strict=True
        ):
            assert got == pytest.approx(wanted, abs=1e-4)


def test_completions_usage_chunk(lenient):
    *chunks, last = lenient.completions.create(
        prompt="Hi", stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert (
        not last.choices
        and last.usage.total_tokens == 10
        and all(chunk.usage is None for chunk in chunks)
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


# --- responses


def test_response(client):
    found = client.responses.create(
        model="tiny", input="Hello there", temperature=0, max_output_tokens=8
    )
    assert (
        found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    )
    assert found.output_text == expected() and found.output[0].status == "incomplete"
    assert (
        found.usage.output_tokens == 8
        and found.usage.total_tokens == found.usage.input_tokens + 8
    )
    assert found.id.startswith("resp_") and found.error is None and found.metadata == {}


@pytest.mark.parametrize("end", ["completed", "incomplete"])
def test_response_stream(client, end):
    text = expected() if end == "incomplete" else expected(30)[:6]
    more = {} if end == "incomplete" else {"extra_body": {"stop": expected(30)[6:9]}}
    with client.responses.stream(
        model="tiny",
        input="Hello there",
        temperature=0,
        max_output_tokens=8 if not more else 30,
        **more,
    ) as stream:
        events = list(stream)
        final = stream.get_final_response() if end == "completed" else events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{end}",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert (
        "".join(event.delta for event in events[4:-4]) == text == final.output_text
        and final.status == end
    )
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1


def test_a_response_says_what_was_asked(client):
    tool = {
        "type": "function",
        "name": "f",
        "description": "x",
        "parameters": {"type": "object"},
        "strict": True,
    }
    found = client.responses.create(
        model="tiny",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        instructions="Be kind.",
        metadata={"a": "b"},
        temperature=0.5,
        top_p=0.5,
        max_output_tokens=4,
        tools=[tool],
        tool_choice="none",
        top_logprobs=2,
        include=["message.output_text.logprobs"],
        parallel_tool_calls=False,
        user="me",
        store=False,
        extra_body=EXTRA["extra_body"],
    )
    assert (
        found.instructions == "Be kind." and found.metadata == {"a": "b"} and found.user == "me"
    )
    assert (found.temperature, found.top_p, found.max_output_tokens, found.top_logprobs) == (
        0.5,
        0.5,
        4,
        2,
    )
    assert (
        found.tools[0].name == "f"
        and found.tool_choice == "none"
        and found.parallel_tool_calls is False
    )
    logprobs = found.output[0].content[0].logprobs
    assert len(logprobs) == 4 and all(len(one.top_logprobs) == 2 for one in logprobs)
    with pytest.raises(openai.NotFoundError):  # it was not to be stored
        client.responses.retrieve(found.id)


def test_response_conversation(client):
    first = client.responses.create(
        model="tiny",
        input="Hello there",
        instructions="Be kind.",
        temperature=0,
        max_output_tokens=8,
    )
    second = client.responses.create(
        model="tiny",
        input="And?",
        previous_response_id=first.id,
        temperature=0,
        max_output_tokens=4,
    )
    turns = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And?"},
    ]
    assert second.usage.input_tokens == len(encode_chat(TOKENIZER, turns)), (
        "instructions are not inherited"
    )
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(second.id).output_text == second.output_text
    items = client.responses.input_items.list(second.id, order="asc")
    assert [item.role for item in items.data] == ["user", "assistant", "user"]
    page = client.responses.input_items.list(second.id, order="asc", limit=1)
    assert [item.role for item in page] == ["user", "assistant", "user"], (
        "the client pages through"
    )
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_response_in_the_background(client):
    found = client.responses.create(
        model="tiny", input="Hi", background=True, temperature=0, max_output_tokens=8
    )
    assert found.status in ("queued", "in_progress") and found.usage is None
    while found.status in ("queued", "in_progress"):
        time.sleep(0.01)
        found = client.responses.retrieve(found.id)
    assert found.status == "incomplete" and found.usage.output_tokens == 8


def test_response_cancelled(client):
    found = client.responses.create(
        model="tiny", input="Hi", background=True, max_output_tokens=1500, **EXTRA
    )
    assert (
        client.responses.cancel(found.id).status
        == "cancelled"
        == client.responses.retrieve(found.id).status
    )
    assert client.responses.cancel(found.id).status == "cancelled", "once more changes nothing"
    client.responses.delete(found.id)
    running = client.responses.create(
        model="tiny", input="Hi", background=True, max_output_tokens=1500, **EXTRA
    )
    client.responses.delete(running.id)
    for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            call(running.id)
    done = client.responses.create(model="tiny", input="Hi", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(done.id)


def test_response_stream_is_resumed(client):
    stream = client.responses.create(
        model="tiny",
        input="Hi",
        background=True,
        stream=True,
        temperature=0,
        max_output_tokens=30,
        **EXTRA,
    )
    seen = []
    for event in stream:
        seen.append(event)
        if len(seen) == 7:
            break  # the connection is lost
    stream.close()
    rest = list(
        client.responses.retrieve(
            seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
        )
    )
    assert [event.sequence_number for event in [*seen, *rest]] == list(
        range(len(seen) + len(rest))
    )
    assert rest[-1].type == "response.incomplete"
    deltas = [
        event.delta for event in [*seen, *rest] if event.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == rest[-1].response.output_text
    with client.responses.stream(response_id=seen[0].response.id, starting_after=1) as stream:
        assert [event.sequence_number for event in stream] == list(
            range(2, len(seen) + len(rest))
        )
    with pytest.raises(openai.BadRequestError, match="stream"):
        whole = client.responses.create(
            model="tiny", input="Hi", background=True, max_output_tokens=1
        )
        client.responses.retrieve(whole.id, stream=True)


def test_response_events_are_what_the_client_knows(server):
    adapter = TypeAdapter(ResponseStreamEvent)
    body = {
        "input": "Hi",
        "stream": True,
        "max_output_tokens": 4,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }
    with httpx.stream("POST", server.url + "/v1/responses", json=body, timeout=30) as response:
        lines = [line for line in response.iter_lines() if line]
    assert not any("[DONE]" in line for line in lines)
    for kind, payload in zip(lines[::2], lines[1::2], strict=True):
        event = adapter.validate_json(payload.removeprefix("data: "))
        assert kind == f"event: {event.type}" and event.sequence_number == lines[1::2].index(
            payload
        )
        if event.type == "response.output_text.delta":
            assert len(event.logprobs[0].top_logprobs) == 2


def test_response_input_tokens(client):
    counted = client.responses.input_tokens.count(model="tiny", input="Hello there")
    assert (
        counted.input_tokens == len(encode_chat(TOKENIZER, MESSAGES))
        and counted.object == "response.input_tokens"
    )


def test_response_items_of_a_tool_call(client):
    items = [
        {"role": "user", "content": "Weather?"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    found = client.responses.create(
        model="tiny", input=items, temperature=0, max_output_tokens=4
    )
    assert found.usage.output_tokens == 4


# --- models, errors


def test_models(client):
    models = list(client.models.list())
    assert [model.id for model in models] == ["tiny", "an/alias"]
    assert {model.root for model in models} == {"an/alias"}, "the name on the hub"
    assert client.models.retrieve("an/alias").max_model_len == 2048
    for name in ("tiny", "an/alias"):
        found = client.chat.completions.create(messages=MESSAGES, **GREEDY | {"model": name})
        assert found.model == name
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nope")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "kind, code, endpoint, fields",
    [
        (openai.NotFoundError, "model_not_found", "chat", {"model": "nope"}),
        (openai.NotFoundError, "model_not_found", "completions", {"model": "nope"}),
        (openai.NotFoundError, "model_not_found", "responses", {"model": "nope"}),
        (
            openai.NotFoundError,
            "response_not_found",
            "responses",
            {"previous_response_id": "resp_none"},
        ),
        (openai.BadRequestError, "context_length_exceeded", "chat", {"max_tokens": 2048}),
        (
            openai.BadRequestError,
            "context_length_exceeded",
            "completions",
            {"prompt": "x" * 3000},
        ),
        (openai.BadRequestError, "context_length_exceeded", "responses", {"input": "x" * 3000}),
        (openai.BadRequestError, None, "chat", {"messages": []}),
        (openai.BadRequestError, None, "chat", {"temperature": -1}),
        (openai.BadRequestError, None, "chat", {"top_logprobs": 30, "logprobs": True}),
        (openai.BadRequestError, None, "completions", {"prompt": [10**6]}),
        (openai.BadRequestError, None, "completions", {"stop": ["a"] * 17}),
        (openai.BadRequestError, None, "responses", {"input": []}),
        (openai.BadRequestError, "unsupported_parameter", "responses", {"truncation": "auto"}),
        (openai.BadRequestError, "unsupported_parameter", "completions", {"best_of": 3}),
    ],
)
def test_errors_come_before_the_stream(client, kind, code, endpoint, fields, stream):
    asked = {
        "chat": {"messages": MESSAGES},
        "completions": {"prompt": "x"},
        "responses": {"input": "x"},
    }[endpoint]
    create = (
        client.chat.completions.create
        if endpoint == "chat"
        else getattr(client, endpoint).create
    )
    with pytest.raises(kind) as error:
        create(**{"model": "tiny", "stream": stream} | asked | fields)
    assert error.value.code == code and error.value.body["message"]
    assert error.value.param in {**asked, **fields}
    assert error.value.type == "invalid_request_error"


def test_keys():
    with running(api_keys=("one", "zwei-ü")) as server:
        for key in ("one", "zwei-ü"):
            auth = {"Authorization": b"Bearer " + key.encode()}
            assert httpx.get(server.url + "/v1/models", headers=auth).status_code == 200
        with pytest.raises(openai.AuthenticationError) as error:
            server.client(api_key="wrong").models.list()
        assert error.value.code == "invalid_api_key"
        for path in (
            "/v1/models",
            "/metrics",
            "/openapi.json",
            "/nothing",
            "/version",
            "/v1/responses/x",
            "//health",
            "/ping",
        ):
            assert httpx.get(server.url + path).status_code == 401, path
        assert httpx.get(server.url + "/health").status_code == 200
        client = server.client(api_key="one")
        mine = client.responses.create(model="tiny", input="Hi", max_output_tokens=2)
        other = httpx.get(
            f"{server.url}/v1/responses/{mine.id}",
            headers={"Authorization": "Bearer zwei-ü".encode()},
        )
        assert other.status_code == 404, "responses belong to the key that made them"


def test_full_queue():
    with running(
        engine_options=dict(max_num_seqs=1), max_queued_requests=0, faults=True
    ) as server:
        server.post("/debug/faults", {"step_delay_s": 0.02})
        client = server.client()
        stream = client.chat.completions.create(
            messages=MESSAGES, model="tiny", max_tokens=200, stream=True, **EXTRA
        )
        next(iter(stream))
        with pytest.raises(openai.InternalServerError) as error:
            client.chat.completions.create(messages=MESSAGES, **GREEDY)
        assert (
            error.value.status_code == 503
            and error.value.code == "overloaded"
            and error.value.response.headers["retry-after"] == "1"
        )
        stream.close()
        assert (
            client.with_options(max_retries=5)
            .chat.completions.create(messages=MESSAGES, **GREEDY)
            .usage.completion_tokens
            == 8
        )


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
def test_error_inside_a_stream(endpoint):
    with running(faults=True) as server:
        server.post("/debug/faults", {"step_delay_s": 0.02})
        client = server.client(strict=endpoint != "completions")
        create, asked = {
            "chat": (client.chat.completions.create, {"messages": MESSAGES, "max_tokens": 100}),
            "completions": (client.completions.create, {"prompt": "x", "max_tokens": 100}),
            "responses": (client.responses.create, {"input": "x", "max_output_tokens": 100}),
        }[endpoint]
        stream = create(model="tiny", stream=True, **asked, **EXTRA)
        next(iter(stream))
        server.post("/debug/faults", {"fail_forwards": 1})
        if endpoint == "responses":  # its streams have an event for it, and no exception
            last = list(stream)[-1]
            assert last.type == "response.failed" and last.response.status == "failed"
            assert (
                last.response.error.code == "server_error"
                and "could not finish" in last.response.error.message
            )
        else:
            with pytest.raises(openai.APIError, match="could not finish"):
                list(stream)
        server.post("/debug/faults", {"fail_forwards": 1})
        with pytest.raises(openai.InternalServerError, match="could not finish") as error:
            create(model="tiny", **asked, **EXTRA)
        assert error.value.status_code == 500 and error.value.code == "server_error"
        assert create(model="tiny", **asked), "the server goes on"
        server.settled()


@pytest.mark.parametrize("field, wrong", [
    ("structured_outputs", {}), ("structured_outputs", {"regex": 5}), ("structured_outputs", 5),
    ("response_format", {}), ("response_format", {"type": "x"}), ("response_format", []),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": []}})])
def test_a_wrong_constraint_is_never_an_answer_without_one(lenient, field, wrong):
    "Constraints are read off the loop, after the rest of the form: also the empty ones."
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            lenient.chat.completions.create(
                messages=MESSAGES, stream=stream, extra_body={field: wrong}, **ENOUGH)
        assert caught.value.param.startswith(field)
