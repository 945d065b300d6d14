"""The wire, inwards: forms and errors, without a server."""

import json
import tracemalloc

import pytest
from pydantic_core import from_json

from nanollm.chat import encode_chat
from nanollm.generate import ContextLengthError
from nanollm.sampling import SamplingParams
from nanollm.serve.protocol import (
    NOT_SERVED,
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Form,
    TokenizeRequest,
    api_error,
    overloaded,
    server_error,
    shown,
)
from nanollm.text import byte_tokenizer

CHAT = {"messages": [{"role": "user", "content": "x"}]}
TOKENIZER = byte_tokenizer()


def error_of(call, param=None):
    "The error that a call raises, as a client gets it."
    with pytest.raises((ApiError, ValueError)) as caught:
        call()
    return api_error(caught.value, param)


def chat_error(**fields):
    "What a client is told about a chat with these fields."

    def read():
        form = ChatRequest.model_validate(CHAT | fields)
        form.check()
        form.sampling_params()
        encode_chat(TOKENIZER, form.messages, form.template_tools(), **form.template_options())

    error = error_of(read, "messages")
    assert error.status == 400
    return error.body["error"]


# -- errors


def test_every_error_has_the_one_shape():
    plain, long = api_error(ValueError("x"), "prompt"), api_error(ContextLengthError("y"))
    for error in (overloaded("full"), server_error(), plain, long):
        assert set(error.body["error"]) == {"message", "type", "param", "code"}
        assert json.dumps(error.body)
    assert long.body["error"]["code"] == "context_length_exceeded"
    assert overloaded("full").headers["Retry-After"] and overloaded("full").status == 503


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"temperature": 3}, "temperature", ["2", "3"]),
        ({"n": 0}, "n", ["1", "0"]),
        ({"stop": ["a"] * 17}, "stop", ["16", "17"]),
        ({"stop": ["a", 1]}, "stop[1]", ["string", "1"]),
        ({"logit_bias": {"3": 101}}, "logit_bias.3", ["100", "101"]),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1", ["greater than or equal to 0", "-1"]),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", ["integer", '"x"']),
        ({"stop_token_ids": [1, -2]}, "stop_token_ids[1]", ["-2"]),
        ({"messages": []}, "messages", ["1"]),
        ({"messages": "Hi"}, "messages", ['"Hi"']),
        ({"max_tokens": 0}, "max_tokens", ["1", "0"]),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", ["2", "3"]),
        ({"stream": 1}, "stream", ["boolean"]),
        ({"metadata": {"a": 5}}, "metadata.a", ["5"]),
        (
            {"stream_options": {"include_usage": "x"}},
            "stream_options.include_usage",
            ["boolean"],
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream=true"]),
        ({"user": "x" * 513}, "user", ["512"]),
        ({"top_logprobs": 3}, "top_logprobs", ["logprobs"]),
        ({"tools": [5]}, "tools[0]", ["5", "function"]),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", ["web_search", "function"]),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]", ["custom"]),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", ["64"]),
        ({"tools": [{"type": "function", "function": 5}]}, "tools[0].function.name", ["5"]),
        ({"tool_choice": "required"}, "tool_choice", ["required", "tools"]),
        ({"tool_choice": {"type": "function"}}, "tool_choice", ["null", "tools"]),
        ({"response_format": {"type": "yaml"}}, "response_format.type", ["yaml", "text"]),
        ({"response_format": 5}, "response_format.type", ["5"]),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", ["string", "5"]),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", ["tokenize"]),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            ["add_generation_prompt"],
        ),
    ],
)
def test_errors_name_field_limit_and_value(fields, param, words):
    found = chat_error(**fields)
    assert found["param"] == param and len(found["message"]) < 300
    assert all(word in found["message"] for word in words), found


@pytest.mark.parametrize(
    "message, param",
    [
        ("min_tokens must be at most max_tokens=2, got 3", "min_tokens"),
        ("stop_token_ids: token ids go from 0 to 9, got 10", "stop_token_ids"),
        ("logit_bias: token ids go from 0 to 9, got 10", "logit_bias"),
        ("messages[3].content[0].text must be a string", "messages[3].content[0].text"),
        ("messages must be a list", "messages"),
        ("the chat template refuses these messages", "prompt"),
        ("prompt token id 70000 is outside the vocabulary", "prompt"),
    ],
)
def test_errors_from_inside_are_about_their_own_field(message, param):
    assert api_error(ValueError(message), "prompt").body["error"]["param"] == param


def test_a_body_of_any_size_is_shown_in_sixty_characters():
    huge = "x" * 10**6
    for value in (huge, [huge], {huge: huge}, [[huge] * 9], list(range(10**6)), 10**60, None):
        assert len(shown(value)) <= 60
    assert shown({"voice": "alloy"}) == '{"voice": "alloy"}'


# -- hostile bodies: lengths are looked at first, and reading stops at the first fault

MANY = 200_000
HOSTILE = [
    (ChatRequest, "stop", [1] * MANY, ["16", str(MANY)]),
    (ChatRequest, "stop", ["a"] * MANY, ["16", str(MANY)]),
    (ChatRequest, "stop_token_ids", ["x"] * MANY, ["256", str(MANY)]),
    (ChatRequest, "stop_token_ids", [-1] * MANY, ["256", str(MANY)]),
    (ChatRequest, "logit_bias", {f"x{i}": "a" for i in range(MANY)}, ["1024", str(MANY)]),
    (ChatRequest, "messages", [1] * MANY, ["4096", str(MANY)]),
    (ChatRequest, "tools", [1] * MANY, ["128", str(MANY)]),
    (ChatRequest, "metadata", {str(i): 1 for i in range(MANY)}, ["16", str(MANY)]),
    (ChatRequest, "chat_template_kwargs", {str(i): 1 for i in range(MANY)}, ["64"]),
    (ChatRequest, "stream_options", {str(i): 1 for i in range(MANY)}, ["256"]),
    (ChatRequest, "structured_outputs", {"choice": ["a"] * MANY}, ["1024"]),
    (ChatRequest, "structured_outputs", {"choice": [1] * MANY}, ["1024"]),
    (ChatRequest, "structured_outputs", {f"x{i}": 1 for i in range(MANY)}, ["x0", "regex"]),
    (ChatRequest, "response_format", {f"x{i}": 1 for i in range(MANY)}, ["type"]),
    (ChatRequest, "tool_choice", [1] * MANY, ["auto"]),
    (TokenizeRequest, "messages", [1] * MANY, ["4096", str(MANY)]),
    (DetokenizeRequest, "tokens", ["x"] * MANY, ["integer", '"x"']),
    (DetokenizeRequest, "tokens", [-1] * MANY, ["0", "-1"]),
    (DetokenizeRequest, "tokens", [1] * 300_000, ["262144", "300000"]),
]


def peak_bytes(call):
    "The most memory that a call takes at a time."
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form, field, value, words", HOSTILE)
def test_wrong_bodies_are_refused_at_once(form, field, value, words):
    def read():
        made = form.model_validate(CHAT | {field: value})
        made.check()
        getattr(made, "constraints", dict)()  # the server reads them off the loop

    def refuse():
        error = error_of(read)
        found = error.body["error"]
        assert found["param"].startswith(field) and len(found["message"]) < 200
        assert all(word in found["message"] for word in words), found

    assert peak_bytes(refuse) < 2**19, "an error was made for each of many items"


@pytest.mark.parametrize(
    "prompt, param",
    [
        ([-1] * MANY, "prompt[0]"),
        ([1] * MANY + ["x"], f"prompt[{MANY}]"),
        ([[1.5] * MANY], "prompt[0][0]"),
        ([[]] * 1000, "prompt[0]"),
        ([[]] * MANY, "prompt"),
        (["a"] * MANY, "prompt"),
    ],
)
def test_wrong_prompts_are_refused_at_once(prompt, param):
    def refuse():
        found = error_of(CompletionRequest(prompt=prompt).prompts).body["error"]
        assert found["param"] == param and len(found["message"]) < 200

    assert peak_bytes(refuse) < 2**19


def test_a_prompt_of_too_many_ids_is_refused_by_its_length():
    form = CompletionRequest(prompt=[[1], ["never looked at"] * 3000])
    found = error_of(lambda: form.prompts(max_len=2048)).body["error"]
    assert found["code"] == "context_length_exceeded"
    assert "3000" in found["message"] and "2048" in found["message"]


def test_thousands_of_fields_are_too_many():
    found = error_of(lambda: Form.model_validate({str(i): 1 for i in range(1000)}))
    assert "256" in str(found) and "1000" in str(found)


# -- what is absent, unknown, known and not served


def test_nulls_are_absent():
    names = ("stop", "n", "seed", "tools", "logit_bias", "audio", "max_tokens", "grammar")
    form = ChatRequest.model_validate(CHAT | dict.fromkeys(names))
    form.check()
    assert form.sampling_params() == SamplingParams(max_tokens=None) and not form.unknown()


def test_nulls_inside_objects_are_absent():
    function = {"name": "f", "strict": None, "parameters": {"default": None}}
    form = ChatRequest.model_validate(
        CHAT
        | {
            "logit_bias": {"3": 1, "4": None},
            "metadata": {"a": None},
            "stream_options": {"include_usage": None},
            "response_format": {"type": "text", "json_schema": None},
            "chat_template_kwargs": {"enable_thinking": None},
            "tools": [{"type": "function", "function": function, "strict": None}],
        }
    )
    form.check()
    assert form.sampling_params().logit_bias == {3: 1} and form.metadata == {}
    assert "enable_thinking" not in form.template_options()
    bare = {"name": "f", "parameters": {"default": None}}  # a schema may speak of null
    assert form.template_tools() == [{"type": "function", "function": bare}]


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
@pytest.mark.parametrize("form", [ChatRequest, CompletionRequest, TokenizeRequest])
def test_what_would_change_the_answer_is_refused_by_name(form, name):
    if name in form.model_fields:
        return
    for value in ({"a": 1}, "some", [7], 3):
        body = CHAT if form is ChatRequest else {"prompt": "a"}
        body = body | {name: value}
        error = error_of(lambda body=body: form.model_validate(body).check())
        found = error.body["error"]
        assert (error.status, found["param"]) == (400, name)
        assert found["code"] == "unsupported_parameter" and name in found["message"]
    form.model_validate(body | {name: None}).check()


@pytest.mark.parametrize(
    "form, name",
    [
        (ChatRequest, "max_output_tokens"),
        (ChatRequest, "n_predict"),
        (ChatRequest, "extra_body"),
        (CompletionRequest, "max_completion_tokens"),
        (ChatRequest, "truncate_prompt_tokens"),
        (ChatRequest, "return_token_ids"),
        (ChatRequest, "thinking_token_budget"),
        (ChatRequest, "grammar"),
        (ChatRequest, "regex"),
        (ChatRequest, "json_schema"),
        (ChatRequest, "functions"),
        (ChatRequest, "guided_whitespace_pattern"),
        (TokenizeRequest, "response_format"),
        (TokenizeRequest, "structured_outputs"),
        (ChatRequest, "echo"),
    ],
)
def test_known_spellings_are_in_the_table(form, name):
    assert name in form.not_served and name not in form.model_fields


def test_types_count_when_a_value_changes_nothing():
    assert chat_error(prompt_logprobs=0)["param"] == "prompt_logprobs"
    assert chat_error(best_of=True)["param"] == "best_of"
    assert chat_error(guided_json={})["param"] == "guided_json", "any JSON is a constraint"
    assert chat_error(web_search_options={})["param"] == "web_search_options"


def test_values_that_change_nothing_pass():
    ChatRequest.model_validate(
        CHAT
        | {
            "response_format": {"type": "text", "json_schema": None},
            "functions": [],
            "modalities": ["text"],
            "best_of": 1,
            "length_penalty": 1.0,
            "echo": False,
            "tool_choice": "none",
            "store": True,
            "parallel_tool_calls": False,
            "return_token_ids": False,
            "seed": -1,
        }
    ).check()


def test_hints_and_unknown_fields_pass_and_are_named():
    hints = {
        "service_tier": "flex",
        "verbosity": "low",
        "prediction": {"content": "x"},
        "reasoning": {"effort": "low", "summary": None},
        "tempreature": 1,
        "best_of": 1,
    }
    form = ChatRequest.model_validate(CHAT | hints | {"x" * 100: 1, "a\nb": 1})
    form.check()
    expected = {"service_tier", "verbosity", "prediction", "reasoning", "tempreature"}
    assert set(form.unknown()) == expected | {"x" * 80, "a\\nb"}


# -- what the engine and the template get


def test_sampling_params_of_a_chat():
    fields = {
        "max_tokens": 5,
        "max_completion_tokens": 7,
        "logprobs": True,
        "top_logprobs": 3,
        "stop": "a",
        "top_k": 4,
        "logit_bias": {"3": 1},
    }
    expected = SamplingParams(max_tokens=7, logprobs=3, stop="a", top_k=4, logit_bias={3: 1})
    assert ChatRequest.model_validate(CHAT | fields).sampling_params() == expected
    assert ChatRequest.model_validate(CHAT | {"logprobs": True}).sampling_params().logprobs == 0
    assert ChatRequest.model_validate(CHAT | {"seed": -1}).sampling_params().seed is None


def test_the_models_defaults_are_for_what_was_not_sent():
    defaults = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 100}
    params = ChatRequest.model_validate(CHAT | {"top_p": 1.0}).sampling_params(defaults)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.6, 1.0, 100)
    params = ChatRequest.model_validate(CHAT | {"max_tokens": 5}).sampling_params(defaults)
    assert params.max_tokens == 5
    params = CompletionRequest(prompt="a", temperature=0.0).sampling_params(defaults)
    assert (params.temperature, params.top_p, params.max_tokens) == (0, 0.95, 16)


TOOL = {"type": "function", "function": {"name": "f"}}


def test_template_options():
    def options(**fields):
        form = ChatRequest.model_validate(CHAT | fields)
        form.check()
        return form.template_options()

    plain = {"add_generation_prompt": None, "continue_final_message": False}
    assert options() == plain
    assert options(add_generation_prompt=False) == plain | {"add_generation_prompt": False}
    assert options(continue_final_message=True) == plain | {"continue_final_message": True}
    assert options(chat_template_kwargs={"enable_thinking": False})["enable_thinking"] is False
    assert options(reasoning_effort="none")["enable_thinking"] is False
    assert options(reasoning_effort="high") == plain | {"reasoning_effort": "high"}


@pytest.mark.parametrize("form", [ChatRequest, TokenizeRequest])
def test_template_tools(form):
    assert form(**CHAT).template_tools() is None
    assert form(**CHAT, tools=[TOOL]).template_tools() == [TOOL]
    assert form(**CHAT, tools=[TOOL], tool_choice="none").template_tools() is None
    assert (
        error_of(form(**CHAT, tools=[{"type": "x"}]).check).body["error"]["param"] == "tools[0]"
    )


# -- completions


@pytest.mark.parametrize(
    "prompt, found",
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt, found):
    assert CompletionRequest(prompt=prompt).prompts() == found


@pytest.mark.parametrize(
    "prompt, param",
    [
        ("", "prompt"),
        ([], "prompt"),
        ({"a": 1}, "prompt"),
        (5, "prompt"),
        ([[]], "prompt[0]"),
        (["a", ""], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        ([True], "prompt[0]"),
        ([1.0], "prompt[0]"),
        ([1, -1], "prompt[1]"),
        ([[1], "a", None], "prompt[2]"),
        ([["a"]], "prompt[0][0]"),
    ],
)
def test_bad_prompts(prompt, param):
    found = error_of(CompletionRequest(prompt=prompt).prompts).body["error"]
    assert found["param"] == param and found["message"].startswith(param)


def test_too_many_answers():
    error = error_of(lambda: CompletionRequest(prompt=["a"] * 20, n=100).prompts())
    assert "1024" in str(error) and "n=100" in str(error)


def test_a_completion_of_no_tokens_asks_for_one():
    form = CompletionRequest(prompt="a", max_tokens=0, echo=True, logprobs=2)
    params = form.sampling_params()
    assert params.max_tokens == 1 and params.prompt_logprobs == 2
    assert CompletionRequest(prompt="a").sampling_params().max_tokens == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 50},
        {"min_tokens": 50, "max_tokens": 4},
        {"min_tokens": 2, "max_tokens": 0},
    ],
)
def test_min_tokens_are_never_cut(fields):
    error = error_of(CompletionRequest(prompt="a", **fields).sampling_params, "prompt")
    limit = str(fields.get("max_tokens", 16) or 1)
    assert error.body["error"]["param"] == "min_tokens" and limit in str(error)


def test_tokenize_needs_one_thing():
    for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
        assert error_of(lambda body=body: TokenizeRequest(**body).check()).status == 400
    TokenizeRequest(prompt="").check()
    assert DetokenizeRequest(tokens=[1, 2]).tokens == [1, 2]


def test_a_number_of_any_length_is_refused():
    for text in ('{"logit_bias": {"%s": 1}}', '{"seed": %s}', '{"stop_token_ids": [%s]}'):
        body = from_json((text % ("9" * 4000)).encode())
        assert len(chat_error(**body)["message"]) < 200
