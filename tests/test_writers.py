"""The wire, outwards: answers whole and in chunks, without a server."""

import json
import random

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nanollm.chat import Piece
from nanollm.llm import Delta
from nanollm.sampling import TokenLogprobs
from nanollm.serve.writers import (
    ChatWriter,
    CompletionWriter,
    TextOffsets,
    chat_logprobs,
    completion_logprobs,
    to_json,
    token_bytes,
    usage_of,
)
from nanollm.text import TextStream, byte_tokenizer, encode, load_tokenizer

TOKENIZER = byte_tokenizer()


def sentencepiece():
    "A tokenizer whose decoder drops the space at the beginning of a text, as Llama 2's does."
    words = [
        "<unk>",
        "<s>",
        "▁The",
        "▁model",
        "▁token",
        "token",
        "▁",
        "<0xE2>",
        "<0x82>",
        "<0xAC>",
    ]
    backend = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def report(token_id, logprob=-1.0, top=()):
    return TokenLogprobs(token_id, logprob, 1, tuple(top))


def delta(index, text="", logprobs=(), reason=None, token_ids=()):
    return Delta(
        "r", index, list(token_ids), list(logprobs), reason, None, None, 3, 1, None, text=text
    )


# -- text of objects and tokens


def test_lines_are_lines_for_everybody():
    chunk = ChatCompletionChunk(
        id="a\u2028b\u2029c\x85d\\\u2028",
        choices=[],
        created=1,
        model="é\n",
        object="chat.completion.chunk",
    )
    for one in (chunk, chunk.to_dict(), [chunk.to_dict()], "a\u2028"):
        text = to_json(one)
        assert len(text.splitlines()) == 1
        plain = one.to_dict() if one is chunk else one
        assert json.loads(text) == plain


def test_only_what_is_set_is_written():
    writer = ChatWriter(TOKENIZER, "m", "chatcmpl-1")
    whole = writer.whole([delta(0, "a", reason="stop")], usage_of(1, 1, 0))
    completion = CompletionWriter(TOKENIZER, "m", "cmpl-1").whole([])
    chunk, *_ = ChatWriter(TOKENIZER, "m", "chatcmpl-1").chunks(delta(0, "a"))
    for one in (whole, completion, chunk):
        assert "system_fingerprint" not in json.loads(to_json(one))


@pytest.mark.parametrize("text", ["plain", "ünï", "日本語", "🦉 and more", "a\nb\t"])
def test_token_bytes_join_to_the_text(text):
    for tokenizer in (TOKENIZER, load_tokenizer()):
        ids = encode(tokenizer, text)
        assert b"".join(token_bytes(tokenizer, i) for i in ids).decode() == text
    assert token_bytes(TOKENIZER, 300) == b"", "an id that the tokenizer has not"


def test_tokens_keep_their_spaces():
    tokenizer = sentencepiece()
    ids = [3, 4, 5, 6, 7, 8, 9]
    stream = TextStream(tokenizer, prompt_ids=[1, 2])
    content = "".join(map(stream.push, ids)) + stream.finish()
    assert content == " model tokentoken €"
    entries = chat_logprobs(tokenizer, map(report, ids))
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == content
    assert [entry.token for entry in entries][:3] == [" model", " token", "token"]


# -- logprobs


def test_logprobs_of_chats():
    first, second = chat_logprobs(TOKENIZER, [report(97, -0.5, [(99, -0.25)]), report(98)])
    assert (first.token, first.bytes, first.logprob) == ("a", [97], -0.5)
    assert [entry.token for entry in first.top_logprobs] == ["c"] and not second.top_logprobs


def test_logprobs_of_completions():
    reports = [None, report(98, -0.5, [(99, -0.25), (98, -0.5)])]
    found = completion_logprobs(TextOffsets(TOKENIZER), [97, 98], reports)
    assert found.tokens == ["a", "b"] and found.text_offset == [0, 1]
    assert found.token_logprobs == [None, -0.5]
    assert found.top_logprobs == [None, {"b": -0.5, "c": -0.25}]


def test_rivals_of_equal_text_stay_apart():
    owl = list("🦉".encode())
    found = completion_logprobs(
        TextOffsets(TOKENIZER),
        [owl[0]],
        [report(owl[0], -0.5, [(owl[0], -0.5), (owl[1], -1.0), (owl[2], -2.0)])],
    )
    [best] = found.top_logprobs
    assert best == {r"bytes:\xf0": -0.5, r"bytes:\x9f": -1.0, r"bytes:\xa6": -2.0}
    assert found.tokens[0] in best, "harnesses look for the token among its rivals"
    tokenizer = sentencepiece()
    [best] = completion_logprobs(
        TextOffsets(tokenizer), [4], [report(4, -1.0, [(5, -2.0)])]
    ).top_logprobs
    assert best == {" token": -1.0, "token": -2.0}
    [best] = completion_logprobs(  # two ids that the tokenizer does not know, both without text
        TextOffsets(TOKENIZER), [300], [report(300, -1.0, [(301, -2.0)])]
    ).top_logprobs
    assert best == {"": -1.0, "token_id:301": -2.0}


def test_offsets_are_those_of_characters():
    for tokenizer in (TOKENIZER, load_tokenizer()):
        text = "An owl 🦉, 日本, naïve."
        ids = encode(tokenizer, text, add_special_tokens=False)
        offsets = completion_logprobs(
            TextOffsets(tokenizer), ids, [None] * len(ids)
        ).text_offset
        assert offsets[-1] < len(text) and offsets == sorted(offsets)
        for i, start in enumerate(offsets):
            before = tokenizer.decode(ids[:i]).removesuffix("\ufffd")
            assert text[:start] == before.rstrip("\ufffd")


def test_offsets_leave_out_what_the_text_leaves_out():
    im_start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    ids, reports = [im_start, 97, im_start, 98], [None] * 4
    hidden = completion_logprobs(TextOffsets(TOKENIZER), ids, reports)
    assert hidden.text_offset == [0, 0, 1, 1]
    visible = completion_logprobs(TextOffsets(TOKENIZER, False), ids, reports)
    assert visible.text_offset == [0, 12, 13, 25]


def test_offsets_of_an_echo_begin_without_a_space():
    tokenizer, ids = sentencepiece(), [1, 2, 3, 4]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = completion_logprobs(TextOffsets(tokenizer, starts_text=True), ids, [None] * 4)
    assert text == "The model token" and found.text_offset == [0, 0, 3, 9]


def test_streamed_offsets_are_the_whole_ones():
    "However the text is cut and held back: offsets depend on the tokens alone."
    ids = encode(TOKENIZER, "a 🦉 b 日本 c")
    reports = [report(i) for i in ids]
    whole = CompletionWriter(TOKENIZER, "m", "x").choice(0, "all", ids, reports, "stop")
    rng = random.Random(0)
    for _ in range(20):
        writer, found, start = CompletionWriter(TOKENIZER, "m", "x"), [], 0
        while start < len(ids):
            end = start + rng.randint(1, 4)
            part = writer.choice(0, "", ids[start:end], reports[start:end], None)
            found += part.logprobs.text_offset
            start = end
        assert found == whole.logprobs.text_offset


# -- chats


def test_chat_chunks_of_two_answers():
    writer = ChatWriter(TOKENIZER, "m", "chatcmpl-1", logprobs=True)
    deltas = [
        delta(1, "b"),
        delta(0),
        delta(0, "", [report(97)], "stop"),
        delta(1, reason="length"),
    ]
    chunks = [chunk for one in deltas for chunk in writer.chunks(one)]
    chunks.append(writer.usage_chunk(usage_of(3, 2, 1)))
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(to_json(chunk), strict=True)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    roles = [(c.index, c.delta.role) for c in choices if c.delta.role]
    assert roles == [(1, "assistant"), (0, "assistant")]
    ends = [(c.index, c.finish_reason) for c in choices if c.finish_reason]
    assert ends == [(0, "stop"), (1, "length")] and not chunks[-1].choices
    assert sum(bool(c.logprobs and c.logprobs.content) for c in choices) == 1
    usage = chunks[-1].usage
    assert (usage.prompt_tokens_details.cached_tokens, usage.total_tokens) == (1, 5)
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


class Halves:
    "A parser that takes everything up to a bar for reasoning, and keeps the last character."

    def __init__(self):
        self.num_reasoning_tokens, self._held, self._kind = 0, "", "reasoning"

    def push(self, text, token_ids=()):
        self.num_reasoning_tokens += len(token_ids) if self._kind == "reasoning" else 0
        text, self._held = (self._held + text)[:-1], (self._held + text)[-1:]
        if self._kind == "reasoning" and "|" in text:
            before, _, after = text.partition("|")
            self._kind = "text"
            return [p for p in (Piece("reasoning", before), Piece("text", after)) if p.text]
        return [Piece(self._kind, text)] if text else []

    def finish(self):
        return [Piece(self._kind, self._held)] if self._held else []


def test_reasoning_in_chunks_and_whole():
    writer = ChatWriter(TOKENIZER, "m", "x", parser=Halves)
    deltas = [
        delta(0, "thin", token_ids=[1, 2]),
        delta(0, "k|an", token_ids=[3]),
        delta(0, "swer", reason="stop", token_ids=[4]),
    ]
    found = {"content": "", "reasoning": ""}
    for one in deltas:
        for chunk in writer.chunks(one):
            new = json.loads(to_json(chunk))["choices"][0]["delta"]
            assert set(new) - {"role"} <= set(found)
            for name in set(new) & set(found):
                found[name] += new[name]
    assert found == {"content": "answer", "reasoning": "think"}
    assert writer.num_reasoning_tokens == 3
    usage = writer.usage_chunk(usage_of(9, 4, 0)).usage
    assert usage.completion_tokens_details.reasoning_tokens == 3

    answers = [delta(i, "think|answer", reason="stop", token_ids=[1, 2, 3]) for i in (0, 1)]
    whole = ChatWriter(TOKENIZER, "m", "x", parser=Halves).whole(answers, usage_of(9, 6, 0))
    again = ChatCompletion.model_validate_json(to_json(whole), strict=True)
    assert again.usage.completion_tokens_details.reasoning_tokens == 6, "of both answers"
    for choice in again.choices:
        assert (choice.message.content, choice.message.reasoning) == ("answer", "think")


class Scripted:
    "A parser whose pieces are given in advance, a list for each push; `#` ends a call."

    def __init__(self, *pushes):
        self.pushes, self.num_calls, self.num_reasoning_tokens = list(pushes), 0, 0

    def push(self, text, token_ids=()):
        pieces = self.pushes.pop(0)
        self.num_calls += sum(piece == "#" for piece in pieces)
        return [piece for piece in pieces if piece != "#"]

    def finish(self):
        return []


def head(index, name):
    return Piece("call", "", index, f"call_{index}", name)


def part(index, text):
    return Piece("call", text, index, f"call_{index}")


CALLS = [
    [Piece("text", "Let me see."), head(0, "f")],
    [part(0, '{"a":')],
    [part(0, " 1}"), "#", head(1, "g"), part(1, "{}"), "#"],
]
TWO = [
    {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
    {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
]


def test_calls_in_chunks():
    writer = ChatWriter(TOKENIZER, "m", "chatcmpl-1", parser=lambda: Scripted(*CALLS))
    chunks = [
        chunk
        for reason in (None, None, "stop")
        for chunk in writer.chunks(delta(0, "x", reason=reason))
    ]
    chunks = [ChatCompletionChunk.model_validate_json(to_json(c), strict=True) for c in chunks]
    found = [c.choices[0].delta.to_dict() for c in chunks]
    assert found == [
        {"role": "assistant", "content": ""},
        {"content": "Let me see."},
        {"tool_calls": [{"index": 0} | TWO[0] | {"function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]},
        {"tool_calls": [{"index": 1} | TWO[1] | {"function": {"name": "g", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons == [None] * 7 + ["tool_calls"]


def whole_of(*pushes, reason="stop", **options):
    parser = lambda: Scripted([piece for push in pushes for piece in push])  # noqa: E731
    writer = ChatWriter(TOKENIZER, "m", "chatcmpl-1", parser=parser, **options)
    whole = writer.whole([delta(0, "x", reason=reason)], usage_of(1, 2, 0))
    [choice] = ChatCompletion.model_validate_json(to_json(whole), strict=True).choices
    return json.loads(to_json(whole))["choices"][0]["message"], choice.finish_reason


def test_calls_whole():
    message, reason = whole_of(*CALLS)
    assert message == {
        "role": "assistant",
        "content": "Let me see.",
        "refusal": None,
        "tool_calls": TWO,
    }
    assert reason == "tool_calls"
    message, _ = whole_of(CALLS[0][1:], *CALLS[1:])
    assert message["content"] is None and message["tool_calls"] == TWO


def test_why_an_answer_with_calls_has_ended():
    cut = CALLS[0], CALLS[1]  # in the midst of a call
    assert whole_of(*CALLS, reason="length")[1] == "length"
    assert whole_of(*cut, reason="length")[1] == "length"
    assert whole_of(*cut)[1] == "stop", "a stop string has cut it: there is no call to make"
    assert whole_of(*CALLS, ends_with_calls=False)[1] == "stop"
    assert whole_of([Piece("text", "no")])[1] == "stop"
    assert "tool_calls" not in whole_of([Piece("text", "no")])[0]
    message, reason = whole_of(*cut, reason="length")
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a":'


def test_logprobs_go_with_calls():
    parser = lambda: Scripted([], [head(0, "f"), part(0, "{}"), "#"])  # noqa: E731
    writer = ChatWriter(TOKENIZER, "m", "x", logprobs=True, parser=parser)
    chunks = [
        *writer.chunks(delta(0, "a", [report(97)])),
        *writer.chunks(delta(0, "b", [report(98), report(99)], "stop")),
    ]
    found = [c.choices[0].logprobs for c in chunks]
    tokens = [[entry.token for entry in one.content] if one else [] for one in found]
    assert tokens == [[], ["a"], ["b", "c"], [], []]


def test_content_is_null_beside_reasoning_alone():
    writer = ChatWriter(TOKENIZER, "m", "x", parser=Halves)
    thought, silent = delta(0, "thinking", reason="length"), delta(1, "", reason="length")
    first, second = writer.whole([thought, silent], usage_of(1, 1, 0)).choices
    assert first.message.content is None and first.message.reasoning == "thinking"
    assert second.message.content == "" and not hasattr(second.message, "reasoning")


def test_logprobs_of_held_back_text_are_not_lost():
    writer = ChatWriter(TOKENIZER, "m", "x", logprobs=True, parser=Halves)
    chunks = writer.chunks(delta(0, "a", [report(97)])) + writer.chunks(
        delta(0, "b", [report(98)], "stop")
    )
    tokens = [
        entry.token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert tokens == ["a", "b"]


# -- completions


def test_a_chunk_of_a_completion_has_no_reason_yet():
    writer = CompletionWriter(TOKENIZER, "m", "cmpl-1")
    first = writer.choice(0, "ab", [97, 98], [report(97), report(98)], None)
    second = writer.choice(0, "c", [99], [report(99)], "stop")
    assert first.logprobs.text_offset == [0, 1] and second.logprobs.text_offset == [2]
    whole = writer.whole([second], usage=usage_of(1, 3, 0))
    Completion.model_validate_json(to_json(whole), strict=True)
    assert json.loads(to_json(writer.whole([first])))["choices"][0]["finish_reason"] is None
