"""Detokenizing behind a prompt, stop strings, and tokenizers from files."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BUILD, full, get, llama_like

from nanollm.model import ModelError
from nanollm.text import (
    Detokenizer,
    StopStrings,
    TextStream,
    any_of,
    byte_tokenizer,
    encode,
    last_tokens,
    load_tokenizer,
    token_text,
)

HARD = [
    "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈👍🏽", "日本語と中文と한국어", "e\u0301 a\u0308\u0323 ก็ไม่", "مرحبا بالعالم",
    "a\ufffdb", "\ufffd", "Z̷͑a̶l̸g̵o", "\U0001f1eb\U0001f1f7",
    " two  spaces ", "", "\n\n", "\t<0x41>", "נִקּוּד",
]


def added(tokenizer, prompt, ids, skip=True):
    "What the definition says: the text that `ids` add to that of the prompt."
    return full(tokenizer, prompt + ids, skip)[len(full(tokenizer, prompt, skip)):]


def check_stream(tokenizer, ids, skip=True, prompt=()):
    prompt = list(prompt)
    stream = Detokenizer(tokenizer, skip, prompt)
    whole = added(tokenizer, prompt, ids, skip)
    sent = ""
    for token_id in ids:
        sent += stream.push(token_id)
        assert whole.startswith(sent)  # no half characters, no U+FFFD of its own
    assert sent + stream.flush() == whole
    assert stream.flush() == ""


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("text", HARD)
def test_hard_texts_stream_whole(name, text):
    tokenizer = get(name)
    check_stream(tokenizer, tokenizer.encode(text))
    if name in ("byte", "smollm2"):
        assert full(tokenizer, tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_ids_stream_as_the_full_decode(name, data):
    tokenizer = get(name)
    numbers = st.integers(0, len(tokenizer) + 2)  # the last ones are no tokens at all
    lists = st.lists(numbers, max_size=40)
    check_stream(tokenizer, data.draw(lists), data.draw(st.booleans()), data.draw(lists))


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), seed=st.integers(0, 1000))
def test_broken_text_streams_as_the_full_decode(name, text, seed):
    tokenizer, rng = get(name), random.Random(seed)
    ids = [i for i in tokenizer.encode(text) if rng.random() < 0.8]
    check_stream(tokenizer, ids + tokenizer.encode(text))


@pytest.mark.parametrize("name", ["byte", "prepend", "smollm2"])
def test_long_junk_is_sent_and_not_hoarded(name):
    tokenizer = get(name)
    mark = tokenizer.convert_tokens_to_ids("\ufffd")
    pool = {"byte": range(200, 256), "prepend": [mark], "smollm2": range(160, 200)}[name]
    rng = random.Random(0)
    stream = Detokenizer(tokenizer)
    ids = [rng.choice(pool) for _ in range(3000)]
    sent = ""
    for token_id in ids:
        sent += stream.push(token_id)
        assert len(stream._held) + len(stream._context) < 64
    assert len(sent) > 2000
    assert sent + stream.flush() == full(tokenizer, ids)


def test_half_a_character_is_held_and_flushed():
    stream = Detokenizer(byte_tokenizer())
    assert [stream.push(i) for i in "🚀".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert [stream.push(i) for i in b"ok"] == ["o", "k"]  # a flushed stream starts afresh


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), cut=st.integers(0, 40), skip=st.booleans())
def test_a_text_cut_anywhere_joins(name, text, cut, skip):
    "Prompt text and output text, as `echo` joins them, are the whole text."
    tokenizer = get(name)
    ids = tokenizer.encode(text)
    prompt, output = ids[:cut], ids[cut:]
    shown = full(tokenizer, prompt, skip)
    if not shown.endswith("\ufffd"):  # else its last characters are not those of the whole text
        check_stream(tokenizer, output, skip, prompt)
        stream = Detokenizer(tokenizer, skip, prompt)
        answer = "".join([stream.push(i) for i in output]) + stream.flush()
        assert shown + answer == full(tokenizer, ids, skip)


@pytest.mark.parametrize("name", ["unigram", "first", "prepend", "always"])
def test_the_space_between_prompt_and_answer(name):
    tokenizer = get(name)
    words = {"unigram": ("The model returns the", " token")}.get(name, ("hello", " world"))
    ids = tokenizer.encode("".join(words))
    size = len(tokenizer.encode(words[0]))
    prompt, output = ids[:size], ids[size:]
    assert full(tokenizer, prompt) == words[0]
    stream = TextStream(tokenizer, prompt_ids=prompt)
    assert "".join([stream.push(i) for i in output]) + stream.finish() == words[1]
    stopped = TextStream(tokenizer, words[1][:2], prompt_ids=prompt)
    stopped.push(output[0])
    assert stopped.stop_reason == words[1][:2] and stopped.text == ""
    afresh = TextStream(tokenizer)
    assert "".join([afresh.push(i) for i in output]) + afresh.finish() == words[1][1:]


@pytest.mark.parametrize("name", ["byte", "unigram", "first", "smollm2"])
def test_the_end_of_a_prompt_decides(name):
    tokenizer = get(name)
    prompt = tokenizer.encode("hello world " * 10_000, add_special_tokens=False)
    backend = CountingBackend(tokenizer.backend_tokenizer)
    assert 1 <= len(last_tokens(backend, prompt, True)) <= 16
    assert backend.num_tokens < 64
    hidden = prompt[:100] + [tokenizer.eos_token_id] * 50
    check_stream(tokenizer, prompt[:9], True, hidden)
    sun = list("日".encode()) if name == "byte" else tokenizer.encode("日本語")
    run = prompt[:9] + sun * 90
    for cut in (1, 2, 3, 40):
        check_stream(tokenizer, run[-cut:] + prompt[:9], True, run[:-cut])


class CountingBackend:
    "Counts the tokens that are decoded."

    def __init__(self, backend):
        self._backend = backend
        self.num_tokens = 0

    def decode(self, ids, skip_special_tokens=True):
        self.num_tokens += len(ids)
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id):
        return self._backend.id_to_token(token_id)


def test_the_text_of_a_token_in_context():
    for name in ("unigram", "first"):
        tokenizer = get(name)
        with_space, without = (
            ("▁token", "token") if name == "unigram" else ("▁h", "h"))
        ids = tokenizer.convert_tokens_to_ids([with_space, without])
        context = tokenizer.encode("hello")
        for before in ((), context):
            texts = [token_text(tokenizer, i, before) for i in ids]
            assert texts == [with_space.replace("▁", " "), without]
        assert token_text(tokenizer, tokenizer.convert_tokens_to_ids("▁"), context) == " "
        assert token_text(tokenizer, tokenizer.eos_token_id, context) == "</s>"


def test_the_text_of_pieces_of_characters_and_of_no_token():
    byte, first = get("byte"), get("first")
    rocket = list("🚀".encode())
    texts = [token_text(byte, i, [65, *rocket[:k]]) for k, i in enumerate(rocket)]
    assert texts == ["\ufffd"] * 4
    assert token_text(byte, 66, [65, *rocket[:2]]) == "B"
    run = first.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xFF>", "<0x41>"])
    texts = [token_text(first, i, run[:k]) for k, i in enumerate(run)]
    assert texts == ["\ufffd"] * 3 + ["A"]
    assert token_text(byte, 258, [65]) == "<|im_end|>" and token_text(byte, 300, [65]) == ""


@pytest.mark.parametrize("name", ["unigram", "first", "always", "wordpiece", "smollm2"])
def test_texts_of_tokens_join_to_the_text(name):
    tokenizer = get(name)
    ids = tokenizer.encode("hello world. hello", add_special_tokens=False)
    unknown = tokenizer.unk_token_id
    texts = [token_text(tokenizer, i, ids[:k]) for k, i in enumerate(ids) if k and i != unknown]
    assert full(tokenizer, ids[:1]) + "".join(texts) == full(tokenizer, ids)


def test_special_tokens_are_skipped_or_shown():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a<|im_end|>b")
    for skip, text in ((True, "ab"), (False, "a<|im_end|>b")):
        check_stream(tokenizer, ids, skip)
        assert full(tokenizer, ids, skip) == text


def cut_at_stop(text, stop, include=False):
    "What the definition says: the first to be complete wins, the longest that ends there."
    for end in range(len(text) + 1):
        for start in range(end):
            if text[start:end] in stop:
                return text[:end if include else start], text[start:end]
    return text, None


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("ab\n🚀", max_size=4), max_size=12), include=st.booleans(),
       stop=st.lists(st.text("ab\n🚀", min_size=1, max_size=4), max_size=3))
def test_stop_strings_for_any_split(pieces, include, stop):
    stops = StopStrings(stop, include)
    text = sent = ""
    expected, winner = cut_at_stop("".join(pieces), stop, include)
    for piece in pieces:
        text += piece
        sent += stops.push(piece)
        if stops.stopped is None:
            held = text[len(sent):]
            assert text.startswith(sent)
            assert held == "" or any(s.startswith(held) and s != held for s in stop)
            longest = max((k for s in stop for k in range(1, len(s)) if text.endswith(s[:k])),
                          default=0)
            assert len(held) == longest  # never more and never less than needed
    assert (sent + stops.flush(), stops.stopped) == (expected, winner)
    assert stops.push("more") == "" or winner is None


def test_nothing_follows_a_stop():
    stops = StopStrings("END")
    assert stops.push("a END b") == "a " and stops.stopped == "END"
    assert stops.push("c") == stops.flush() == ""


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [3], [None]])
def test_bad_stop_strings_are_refused(stop):
    with pytest.raises(ValueError, match=r"stop\[\d\]"):
        StopStrings(stop)


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_stream_is_the_full_text_cut_at_the_stop(name, data):
    tokenizer = get(name)
    words = st.sampled_from(["a", "he", "🚀", "llo", " ", "日", "e\u0301"])
    text = "".join(data.draw(st.lists(words, max_size=12)))
    stop = data.draw(st.lists(st.text("ahe🚀 ", min_size=1, max_size=3), max_size=3))
    ids = tokenizer.encode(text)
    include = data.draw(st.booleans())
    cut = data.draw(st.integers(0, len(ids)))
    prompt, ids = ids[:cut], ids[cut:]
    stream = TextStream(tokenizer, stop, include_stop=include, prompt_ids=prompt)
    sent = "".join([stream.push(i) for i in ids]) + stream.finish()
    whole = added(tokenizer, prompt, ids)
    assert (sent, stream.stop_reason) == cut_at_stop(whole, stop, include)
    assert stream.text == sent
    if stream.stop_reason is not None:
        assert stream.push(ids[0]) == stream.finish() == "" and stream.text == sent


def test_a_stop_string_of_replacement_characters_is_found_at_the_end():
    stream = TextStream(byte_tokenizer(), "\ufffd")
    assert stream.push(0xF0) == "" and stream.stop_reason is None
    assert stream.finish() == "" and stream.stop_reason == "\ufffd"


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.text("ab<|.", min_size=1, max_size=4), max_size=6),
       text=st.text("ab<|.", max_size=20))
def test_any_of_finds_a_token_where_there_is_one(tokens, text):
    starts = [i for i in range(len(text)) if text.startswith(tuple(tokens), i)]
    found = any_of(tuple(tokens)).search(text)
    assert (found and found.start()) == (starts[0] if starts else None)
    assert not found or found[0] in tokens


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_ids_are_those_of_the_slow_way(name, data):
    tokenizer = get(name)
    words = st.sampled_from([*tokenizer.all_special_tokens, *HARD, " ", "  ", "hello", "\n"])
    pieces = st.one_of(st.text(max_size=30), words)
    text, special = "".join(data.draw(st.lists(pieces, max_size=8))), data.draw(st.booleans())
    slow = tokenizer.encode(text, add_special_tokens=special)
    assert encode(tokenizer, text, special) == slow


@pytest.mark.parametrize("name", BUILD)
def test_ids_of_a_long_text_and_after_somebody_has_cut_one(name):
    tokenizer = get(name)
    text = "".join([*HARD, *tokenizer.all_special_tokens]) * 400
    whole = tokenizer.encode(text)
    assert encode(tokenizer, text) == whole
    assert len(tokenizer.encode(text, truncation=True, max_length=2)) <= 2
    assert tokenizer.backend_tokenizer.truncation is not None
    tokenizer.backend_tokenizer.enable_padding(length=10 * len(whole))
    assert encode(tokenizer, text) == whole


def test_raw_prompts_parse_control_tokens_and_get_the_default_ones():
    assert encode(byte_tokenizer(), "a<|im_end|>") == [97, 258]
    assert encode(llama_like("first"), "</s>")[0] == 2
    for bad in (None, 3, ["a"], "\ud800"):
        with pytest.raises(ValueError):
            encode(byte_tokenizer(), bad)


def test_byte_tokenizer_writes_every_byte():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 259 and tokenizer.eos_token_id == 258
    assert tokenizer.encode("é") == list("é".encode())
    every = "".join(map(chr, range(0x300))) + "🚀"
    assert tokenizer.decode(tokenizer.encode(every)) == every


def test_dummy_shapes_have_the_byte_tokenizer():
    assert len(load_tokenizer("tiny-llama", load_format="dummy")) == 259
    assert len(load_tokenizer(None, load_format="dummy")) == 259


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_model_without_a_tokenizer_says_so(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_a_saved_tokenizer_comes_back(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode("hi <|im_end|>") == byte_tokenizer().encode("hi <|im_end|>")
    assert loaded.chat_template == byte_tokenizer().chat_template


def test_stop_strings_are_not_searched_in_the_first_tokens():
    tokenizer = byte_tokenizer()
    for min_tokens, text in {0: "a", 2: "axb", 6: "axbxcx"}.items():
        stream = TextStream(tokenizer, stop="x", min_tokens=min_tokens)
        shown = "".join([stream.push(i) for i in encode(tokenizer, "axbxcx")]) + stream.finish()
        assert shown == stream.text == text
        assert stream.stop_reason == (None if min_tokens == 6 else "x")


def test_a_folder_with_a_tokenizer_needs_no_weights(tmp_path, monkeypatch):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), progress=False)
    assert loaded.encode("hi") == byte_tokenizer().encode("hi")
    monkeypatch.chdir(tmp_path)  # and a file that lies around is nobody's default
    assert len(load_tokenizer(load_format="dummy", progress=False)) == 259
    with pytest.raises(ModelError):
        load_tokenizer("", local_files_only=True, progress=False)
