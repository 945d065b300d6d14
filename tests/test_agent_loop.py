"""Agents against the server: a scripted model calls two tools in three turns, in both APIs."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import jsonschema
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from server_fixtures import MODEL
from tiny_tokenizers import family

from nanollm.args import ServerArgs
from nanollm.llm import LLM
from nanollm.serve import responses
from nanollm.serve.async_engine import AsyncEngine
from nanollm.serve.server import Api, make_server
from nanollm.text import encode

pytest.importorskip("llguidance")

PLACES = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
NUMBERS = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": PLACES, "add": NUMBERS}
TOOLS = {
    "get_weather": lambda city: {"degrees": {"Paris": 22, "Rome": 31}[city]},
    "add": lambda a, b: a + b,
}
ASKED = [{"role": "user", "content": "How warm are Paris and Rome together?"}]
TURNS = (  # what the model says; as the template writes it, so that each prompt goes on
    "<think>\nFirst the weather.\n</think>\n\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    "<think>\nNow the sum.\n</think>\n\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": 22, "b": 31}}\n</tool_call>',
    "<think>\nDone.\n</think>\n\n53 degrees together.",
)
RESULTS = ['{"degrees": 22}', '{"degrees": 31}', "53"]


class Script:
    "A model that says what it is told: the next of `turns` for each new request."

    def __init__(self, tokenizer):
        self.tokenizer, self.turns, self.prompts, self._told = tokenizer, [], [], {}

    def __call__(self, logits, rows):
        for i, row in enumerate(rows):
            if row.key not in self._told:
                self._told[row.key] = self.turns.pop(0)
                self.prompts.append(self.tokenizer.decode(row.prompt_ids))
            text = self._told[row.key]
            said = self.tokenizer.decode([*row.output_ids, *row.draft_ids])
            rest = encode(self.tokenizer, text[len(said) :], add_special_tokens=False)
            logits[i] -= 1e4
            logits[i, (rest or [self.tokenizer.eos_token_id])[0]] = 1e4

    def tell(self, *turns):
        self.turns, self.prompts = list(turns), []


@pytest.fixture(scope="module")
def server():
    "A server whose model is scripted, and its script."
    tokenizer = family("qwen3")
    llm = LLM(MODEL, tokenizer=tokenizer, num_kv_blocks=2048, self_check=True, progress=False)
    script = Script(tokenizer)
    llm.engine.processors = (script, *llm.engine.processors)
    engine = AsyncEngine(llm.engine, tokenizer, 64)
    app = make_server(
        Api(engine, ServerArgs(("scripted",)), grammars=llm.grammars), [responses.router]
    )
    app.config.timeout_graceful_shutdown = 2
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=asyncio.run, args=(app.serve([sock]),))
    thread.start()
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(setattr, app, "should_exit", True)
        while not app.started:
            assert thread.is_alive(), "the server has ended before it was there"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1", script


@pytest.fixture
def client(server):
    options = dict(api_key="none", max_retries=0, timeout=30)
    return openai.OpenAI(base_url=server[0], _strict_response_validation=True, **options)


@pytest.fixture
def script(server):
    return server[1]


def tool(name, strict, flat=False):
    function = {"name": name, "parameters": SCHEMAS[name], "strict": strict}
    return {"type": "function"} | (function if flat else {"function": function})


def run(name, arguments):
    return json.dumps(TOOLS[name](**json.loads(arguments)))


# --- the loop, as agents write it


def ask_chat(client, messages, stream, **options):
    found = client.chat.completions.create(
        model="scripted", messages=messages, stream=stream, temperature=0, **options
    )
    if stream:  # put together by the client's own code
        state = ChatCompletionStreamState()
        for chunk in found:
            state.handle_chunk(chunk)
        found = state.current_completion_snapshot
    return found.choices[0], found.usage


def chat_loop(client, stream, strict, choices):
    "Calls made, reasons and the last text."
    messages, calls, reasons = list(ASKED), [], []
    tools = [tool(name, strict) for name in TOOLS]
    for choice in choices:
        options = dict(tools=tools, tool_choice=choice, max_tokens=250)
        found, _ = ask_chat(client, messages, stream, **options)
        messages.append(found.message.model_dump(exclude_none=True, exclude={"parsed"}))
        reasons.append(found.finish_reason)
        for call in found.message.tool_calls or ():
            function = call.function
            calls.append((function.name, function.arguments))
            content = run(function.name, function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return calls, reasons, found.message.content


def ask_responses(client, stream, **options):
    options = {"max_output_tokens": 250, "temperature": 0} | options
    made = client.responses.create(model="scripted", stream=stream, **options)
    if not stream:
        return made
    events = list(made)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added, done, deltas = [], [], {}
    for event in events:
        if event.type == "response.output_item.added":
            assert event.output_index == len(done) == len(added)
            added.append(event.item.id)
        elif event.type == "response.output_item.done":
            assert added[event.output_index] == event.item.id
            done.append(event.item)
        elif hasattr(event, "item_id"):
            assert added[event.output_index] == event.item_id
        if event.type == "response.function_call_arguments.delta":
            deltas.setdefault(event.output_index, []).append(event.delta)
        elif event.type == "response.function_call_arguments.done":
            told = deltas[event.output_index]
            assert "".join(told) == event.arguments and len(told) > 1
    assert done == events[-1].response.output
    return events[-1].response


def responses_loop(client, stream, strict, choices, stored):
    "The same through Responses; `stored`: the server keeps what came before."
    items, more, calls, states = ASKED, {}, [], []
    tools = [tool(name, strict, flat=True) for name in TOOLS]
    for choice in choices:
        options = dict(tools=tools, tool_choice=choice, store=stored)
        found = ask_responses(client, stream, input=items, **options, **more)
        states.append(found.status)
        made = [item for item in found.output if item.type == "function_call"]
        results = [{"type": "function_call_output", "call_id": item.call_id,
                    "output": run(item.name, item.arguments)} for item in made]  # fmt: skip
        calls += [(item.name, item.arguments) for item in made]
        if stored:
            items, more = results, {"previous_response_id": found.id}
        else:
            items = [*items, *found.output, *results]
    return calls, states, found.output_text


CALLS = [
    ("get_weather", '{"city": "Paris"}'),
    ("get_weather", '{"city": "Rome"}'),
    ("add", '{"a": 22, "b": 31}'),
]


def check_prompts(prompts):
    "Each prompt goes on where the model stopped: nothing that was said is told differently."
    assert len(prompts) == 3
    for before, said, after in zip(prompts, TURNS, prompts[1:]):
        assert after.startswith(before + said + "<|im_end|>\n<|im_start|>user\n")
    for result in RESULTS:
        assert f"<tool_response>\n{result}\n</tool_response>" in prompts[2]


WAYS = [
    (False, ("auto",) * 3),  # nothing is enforced
    (True, ("auto",) * 3),  # a grammar lets texts pass and holds calls to their schemas
    (False, ("required", "required", "auto")),
    (True, ("required", "required", "auto")),
]
any_way = pytest.mark.parametrize("strict, choices", WAYS)
streamed_or_not = pytest.mark.parametrize("stream", [False, True])


@streamed_or_not
@any_way
def test_three_turns_of_chat(client, script, strict, choices, stream):
    script.tell(*TURNS)
    calls, reasons, text = chat_loop(client, stream, strict, choices)
    assert calls == CALLS and text == "53 degrees together."
    assert reasons == ["tool_calls", "tool_calls", "stop"]
    check_prompts(script.prompts)


@pytest.mark.parametrize("stored", [False, True])
@streamed_or_not
@any_way
def test_three_turns_of_responses(client, script, strict, choices, stream, stored):
    script.tell(*TURNS)
    calls, states, text = responses_loop(client, stream, strict, choices, stored)
    assert calls == CALLS and text == "53 degrees together."
    assert states == ["completed"] * 3
    check_prompts(script.prompts)


# --- a model that does not do as it should


@streamed_or_not
def test_schema_is_held_against_the_model(client, script, stream):
    "The script asks for a city that the schema does not know."
    script.tell('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Atlantis"}}')
    options = dict(tools=[tool("get_weather", True)], tool_choice="required", max_tokens=200)
    options |= dict(parallel_tool_calls=False)
    found, _ = ask_chat(client, ASKED, stream, **options)
    (call,) = found.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), PLACES)
    assert found.finish_reason == "tool_calls"


@streamed_or_not
@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "get_weather", "arguments": "Paris"\n</tool_call>',
        "<tool_call>\nget_weather(Paris)\n</tool_call>",
        '<tool_call>\n{"nome": "get_weather"}\n</tool_call>',
    ],
)
def test_malformed_call_is_content(client, script, stream, text):
    script.tell("I try. " + text)
    options = dict(tools=[tool("get_weather", False)], max_tokens=200)
    found, _ = ask_chat(client, ASKED, stream, **options)
    assert found.finish_reason == "stop" and not found.message.tool_calls
    assert found.message.content == "I try. " + text


@streamed_or_not
def test_arguments_pass_verbatim(client, script, stream):
    "They are told while they are made, when nobody knows yet whether they will be JSON."
    script.tell('<tool_call>\n{"name": "add", "arguments": {"a": , "b"  :2}}\n</tool_call>')
    options = dict(tools=[tool("add", False)], max_tokens=200)
    found, _ = ask_chat(client, ASKED, stream, **options)
    assert [call.function.arguments for call in found.message.tool_calls] == [
        '{"a": , "b"  :2}'
    ]


@streamed_or_not
def test_cut_call_ends_with_length(client, script, stream):
    script.tell(TURNS[1], TURNS[1])
    begun = encode(script.tokenizer, TURNS[1].partition(', "b"')[0], add_special_tokens=False)
    found, _ = ask_chat(
        client, ASKED, stream, tools=[tool("add", False)], max_tokens=len(begun)
    )
    assert found.finish_reason == "length"
    (call,) = found.message.tool_calls
    assert call.function.arguments == '{"a": 22' and not found.message.content
    options = dict(tools=[tool("add", False, flat=True)], max_output_tokens=len(begun))
    found = ask_responses(client, stream, input=ASKED, **options)
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    *_, item = found.output
    assert (item.type, item.status, item.arguments) == (
        "function_call",
        "incomplete",
        '{"a": 22',
    )


@streamed_or_not
def test_one_call_if_parallel_ones_are_refused(client, script, stream):
    script.tell(TURNS[0])
    options = dict(tools=[tool(name, True) for name in TOOLS], parallel_tool_calls=False)
    options |= dict(tool_choice="required", max_tokens=200)
    found, _ = ask_chat(client, ASKED, stream, **options)
    (call,) = found.message.tool_calls
    assert (call.function.name, call.function.arguments) == CALLS[0]


@streamed_or_not
def test_named_tool_stops(client, script, stream):
    script.tell(TURNS[1])
    named = {"type": "function", "function": {"name": "add"}}
    options = dict(tools=[tool(name, True) for name in TOOLS], tool_choice=named)
    found, _ = ask_chat(client, ASKED, stream, max_tokens=200, **options)
    (call,) = found.message.tool_calls
    assert (call.function.name, call.function.arguments) == CALLS[2]
    assert found.finish_reason == "stop"


@streamed_or_not
def test_answer_or_calls(client, script, stream):
    "With a schema for the answer and tools beside it, both are held."
    answer = {"type": "object", "properties": {"sum": {"type": "integer"}},
              "required": ["sum"], "additionalProperties": False}  # fmt: skip
    shape = {"type": "json_schema",
             "json_schema": {"name": "answer", "schema": answer, "strict": True}}  # fmt: skip
    script.tell(TURNS[1], '<think>\nDone.\n</think>\n\n{"sum": 53}', "no JSON at all")
    options = dict(tools=[tool("add", True)], response_format=shape, max_tokens=200)
    messages = ASKED
    found, _ = ask_chat(client, messages, stream, **options)
    assert [call.function.arguments for call in found.message.tool_calls] == [CALLS[2][1]]
    found, _ = ask_chat(client, messages, stream, **options)
    assert json.loads(found.message.content) == {"sum": 53} and not found.message.tool_calls
    found, _ = ask_chat(client, messages, stream, **options)
    if found.finish_reason == "stop":
        jsonschema.validate(json.loads(found.message.content), answer)
