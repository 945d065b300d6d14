"""The wire: forms, errors and writers, without a server."""

import json

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from nanollm.generate import ContextLengthError
from nanollm.llm import Delta
from nanollm.sampling import SamplingParams, TokenLogprobs
from nanollm.serve.protocol import (
    ApiError,
    ChatRequest,
    ChatWriter,
    CompletionRequest,
    CompletionWriter,
    DetokenizeRequest,
    TokenizeRequest,
    api_error,
    chat_logprobs,
    completion_logprobs,
    overloaded,
    server_error,
    token_bytes,
    usage_of,
)
from nanollm.text import byte_tokenizer, encode, load_tokenizer

CHAT = {"messages": [{"role": "user", "content": "x"}]}
TOKENIZER = byte_tokenizer()


def error_of(call):
    with pytest.raises((ApiError, ValueError)) as caught:
        call()
    error = caught.value
    return error if isinstance(error, ApiError) else api_error(error)


def test_every_error_has_the_one_shape():
    for error in (
        overloaded("full"),
        server_error(),
        api_error(ValueError("x"), "prompt"),
        api_error(ContextLengthError("y")),
    ):
        assert set(error.body["error"]) == {"message", "type", "param", "code"} and json.dumps(error.body)
    assert api_error(ContextLengthError("y")).body["error"]["code"] == "context_length_exceeded"
    assert overloaded("full").headers["Retry-After"] and overloaded("full").status == 503


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({"temperature": 3}, "temperature", ["2", "3"]),
        ({"n": 0}, "n", ["1", "0"]),
        ({"stop": ["a"] * 5}, "stop", ["4", "5"]),
        ({"logit_bias": {"3": 101}}, "logit_bias.3", ["100", "101"]),
        ({"stop_token_ids": [1, -2]}, "stop_token_ids[1]", ["-2"]),
        ({"messages": []}, "messages", ["1"]),
        ({"max_tokens": 0}, "max_tokens", ["1", "0"]),
        ({"stream": 1}, "stream", ["boolean"]),
        ({"metadata": {"a": 5}}, "metadata.a", ["5"]),
        ({"stream_options": {"include_usage": "x"}}, "stream_options.include_usage", ["boolean"]),
        ({"user": "x" * 513}, "user", ["512"]),
    ],
)
def test_errors_name_field_limit_and_value(body, param, words):
    error = error_of(lambda: ChatRequest.model_validate(CHAT | body))
    found = error.body["error"]
    assert error.status == 400 and found["param"] == param and len(found["message"]) < 300
    assert all(word in found["message"] for word in words), found


def test_nulls_are_absent_and_unknown_fields_pass():
    form = ChatRequest.model_validate(
        CHAT | dict.fromkeys(("stop", "n", "seed", "tools", "logit_bias", "audio"), None) | {"what": {}}
    )
    form.check()
    assert form.sampling_params() == SamplingParams(max_tokens=None)


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"tools": [], "tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"functions": [{"name": "f"}]},
        {"structured_outputs": {"regex": "a"}},
        {"guided_json": {}, "guided_regex": "a"},
        {"modalities": ["audio"]},
        {"chat_template": "x"},
        {"reasoning_effort": "high"},
        {"top_logprobs": 3},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {}}]},
        {"stream_options": {}},
    ],
)
def test_what_is_not_served_is_refused(body):
    error = error_of(lambda: ChatRequest.model_validate(CHAT | body).check())
    assert error.status == 400 and error.body["error"]["param"]


def test_values_that_change_nothing_pass():
    harmless = {
        "response_format": {"type": "text"},
        "functions": [],
        "modalities": ["text"],
        "best_of": 1,
        "service_tier": "auto",
    }
    ChatRequest.model_validate(
        CHAT | harmless | {"tool_choice": "none", "store": True, "parallel_tool_calls": False}
    ).check()


def test_sampling_params_of_a_chat():
    form = ChatRequest.model_validate(
        CHAT
        | {
            "max_tokens": 5,
            "max_completion_tokens": 7,
            "logprobs": True,
            "top_logprobs": 3,
            "stop": "a",
            "top_k": 4,
            "seed": -1,
        }
    )
    expected = SamplingParams(max_tokens=7, logprobs=3, stop="a", top_k=4, seed=-1)
    assert form.sampling_params() == expected
    assert ChatRequest.model_validate(CHAT | {"logprobs": True}).sampling_params().logprobs == 0
    with pytest.raises(ValueError, match="min_tokens"):
        ChatRequest.model_validate(CHAT | {"max_tokens": 2, "min_tokens": 3}).sampling_params()


@pytest.mark.parametrize(
    "prompt, found", [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])]
)
def test_prompts(prompt, found):
    assert CompletionRequest(prompt=prompt).prompts() == found


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], ["a", ""], ["a", 1], [1, "a"], [True], [1.0], [[1], "a", None], {"a": 1}, 5, [["a"]]]
)
def test_bad_prompts(prompt):
    assert "prompt" in error_of(lambda: CompletionRequest(prompt=prompt).prompts()).body["error"]["message"]


def test_too_many_answers():
    error = error_of(lambda: CompletionRequest(prompt=["a"] * 20, n=100).prompts())
    assert "1024" in str(error) and "n=100" in str(error)


def test_a_completion_of_no_tokens_asks_for_one():
    params = CompletionRequest(prompt="a", max_tokens=0, echo=True, logprobs=2).sampling_params()
    assert params.max_tokens == 1 and params.prompt_logprobs == 2
    assert CompletionRequest(prompt="a").sampling_params().max_tokens == 16


def test_tokenize_needs_one_thing():
    for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
        assert error_of(lambda body=body: TokenizeRequest(**body).check()).status == 400
    TokenizeRequest(prompt="").check()
    with pytest.raises(ValueError):
        DetokenizeRequest(tokens=[-1])


@pytest.mark.parametrize("text", ["plain", "ünï", "日本語", "🦉 and more", "a\nb\t"])
def test_token_bytes_join_to_the_text(text):
    for tokenizer in (TOKENIZER, load_tokenizer()):
        assert b"".join(token_bytes(tokenizer, i) for i in encode(tokenizer, text)).decode() == text
    assert token_bytes(TOKENIZER, 300) == b"", "an id that the model has and the tokenizer has not"


def report(token_id, logprob=-1.0, top=()):
    return TokenLogprobs(token_id, logprob, 1, tuple(top))


def test_logprobs_in_both_styles():
    ids = [97, 98]
    reports = [report(97, -0.5, [(99, -0.25), (97, -0.5)]), report(98)]
    first, second = chat_logprobs(TOKENIZER, reports)
    assert (first.token, first.bytes, first.logprob) == ("a", [97], -0.5) and second.top_logprobs == []
    assert [entry.token for entry in first.top_logprobs] == ["c", "a"]
    found = completion_logprobs(TOKENIZER, ids, [None, reports[0]], offset=3)
    assert found.tokens == ["a", "b"] and found.text_offset == [3, 4]
    assert found.token_logprobs == [None, -0.5] and found.top_logprobs == [None, {"a": -0.5, "c": -0.25}]


def delta(index, text="", logprobs=(), reason=None):
    return Delta("r", index, [], logprobs, reason, None, None, 3, 1, None, text=text)


def test_chat_chunks_of_two_answers():
    writer = ChatWriter(TOKENIZER, "m", "chatcmpl-1", logprobs=True)
    deltas = [delta(1, "b"), delta(0), delta(0, "", [report(97)], "stop"), delta(1, reason="length")]
    parts = [writer.chunks(one) for one in deltas] + [[writer.usage_chunk(usage_of(3, 2, 1))]]
    chunks = [chunk for part in parts for chunk in part]
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(chunk.model_dump_json(exclude_unset=True), strict=True)
    roles = [(c.choices[0].index, c.choices[0].delta.role) for c in chunks if c.choices and c.choices[0].delta.role]
    assert roles == [(1, "assistant"), (0, "assistant")]
    ends = [
        (c.choices[0].index, c.choices[0].finish_reason) for c in chunks if c.choices and c.choices[0].finish_reason
    ]
    assert ends == [(0, "stop"), (1, "length")] and not chunks[-1].choices
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 1 and chunks[-1].usage.total_tokens == 5
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_completion_chunks_count_characters():
    writer = CompletionWriter(TOKENIZER, "m", "cmpl-1")
    first = writer.choice(0, "ab", [97, 98], [report(97), report(98)], None)
    second = writer.choice(0, "c", [99], [report(99)], "stop")
    assert first.logprobs.text_offset == [0, 1] and second.logprobs.text_offset == [2]
    whole = writer.whole([second], usage=usage_of(1, 3, 0))
    Completion.model_validate_json(whole.model_dump_json(exclude_unset=True), strict=True)
    assert json.loads(writer.whole([first]).model_dump_json(exclude_unset=True))["choices"][0]["finish_reason"] is None
