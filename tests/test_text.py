"""Detokenizing behind a prompt, stop strings, prompts that cannot be forged."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanollm.model import ModelError
from nanollm.text import (
    Detokenizer,
    StopStrings,
    TextStream,
    byte_tokenizer,
    encode,
    encode_chat,
    last_tokens,
    load_tokenizer,
    mark,
    read_messages,
    token_text,
)

LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
HARD = [
    "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈👍🏽", "日本語と中文と한국어", "e\u0301 a\u0308\u0323 ก็ไม่", "مرحبا بالعالم",
    "a\ufffdb", "\ufffd", "Z̷͑a̶l̸g̵o", "\U0001f1eb\U0001f1f7",
    " two  spaces ", "", "\n\n", "\t<0x41>", "נִקּוּד",
]


def llama_like(kind):
    "A small SentencePiece-like tokenizer: `prepend` as Llama 2 has it, or a Metaspace scheme."
    words = [*"▁abhelowrd\ufffdé日", "▁▁", "▁h", "▁w", "▁\ufffd", "he", "ll"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *byte_pieces, *words]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("h", "e"), ("l", "l"), ("▁", "h"), ("▁", "w"), ("▁", "▁")]
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True,
                                unk_token="<unk>"))
    if kind == "prepend":
        fast.normalizer = normalizers.Sequence([
            normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    if kind == "always":
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=kind),
                 decoders.Fuse()]
    else:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                 decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False)
                             for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", chat_template=LLAMA2_TEMPLATE)


def unigram():
    "A small SentencePiece Unigram tokenizer without byte tokens, as T5; <unk> is special."
    words = ["▁The", "▁model", "▁returns", "▁the", "▁token", "token", "▁", "▁hello", "▁world"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((word, -2.0) for word in words),
              *((char, -5.0) for char in "abcdefghijklmnopqrstuvwxyz🚀é[]/INST")]
    fast = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False)
                             for name in ("<unk>", "</s>")])
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>",
                                   chat_template=template)


def wordpiece():
    "A small BERT-like tokenizer: its decoder joins, and cleans up before punctuation."
    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "##ing", "##s", "do", "n", "'", "t", ".", ",",
             "not", "we"]
    vocab = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.decoder = decoders.WordPiece()
    fast.add_special_tokens(["[CLS]", "[SEP]", "[UNK]"])
    return PreTrainedTokenizerFast(tokenizer_object=fast)


def smollm2():
    try:
        return load_tokenizer(None, local_files_only=True, progress=False)
    except ModelError as error:
        pytest.skip(f"no default model here: {error}")


BUILD = {
    "byte": byte_tokenizer,
    "prepend": lambda: llama_like("prepend"),
    "first": lambda: llama_like("first"),
    "always": lambda: llama_like("always"),
    "unigram": unigram,
    "wordpiece": wordpiece,
    "smollm2": smollm2,
}
BUILT = {}


def get(name):
    if name not in BUILT:
        BUILT[name] = BUILD[name]()
    return BUILT[name]


def full(tokenizer, ids, skip=True):
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def special_ids(tokenizer, ids):
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in ids if i in special]


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
    check_stream(tokenizer, output, skip, prompt)
    shown = full(tokenizer, prompt, skip)
    if not shown.endswith("\ufffd"):
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


@pytest.mark.parametrize("messages, complaint", [
    ([], "at least one message"),
    ("hi", "must be a list"),
    ([3], r"messages\[0\] must be an object"),
    ([{"content": "hi"}], r"messages\[0\]\.role is None"),
    ([{"role": "user", "content": "a"}, {"role": "wizard", "content": "b"}],
     r"messages\[1\]\.role is 'wizard'"),
    ([{"role": ["user"], "content": "a"}], r"messages\[0\]\.role"),
    ([{"role": "user"}], r"messages\[0\] has no content"),
    ([{"role": "assistant", "content": None}], r"messages\[0\] has no content"),
    ([{"role": "assistant", "content": None, "tool_calls": []}],
     r"messages\[0\] has no content"),
    ([{"role": "user", "content": []}], r"messages\[0\]\.content"),
    ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
    ([{"role": "user", "content": ["a"]}], r"messages\[0\]\.content\[0\] is of type 'a'"),
    ([{"role": "user", "content": [{"type": "image_url"}]}],
     r"content\[0\] is of type 'image_url'"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}],
     r"content\[0\]\.text must be a string, got None"),
    ([{"role": "user", "content": "a\ud800"}], "half a surrogate pair"),
])
def test_bad_messages_are_named(messages, complaint):
    with pytest.raises(ValueError, match=complaint):
        encode_chat(byte_tokenizer(), messages)


def test_messages_in_every_form():
    parts = [{"type": kind, "text": kind} for kind in ("text", "input_text", "output_text")]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    [message] = read_messages([{"role": "user", "content": parts}])
    assert message["content"] == "text\ninput_text\noutput_text"
    assert read_messages([call]) == [call]
    tool = {"role": "tool", "content": "4", "tool_call_id": "1"}
    assert read_messages((tool,))[0]["tool_call_id"] == "1"
    developer = [{"role": "developer", "content": "x"}]
    assert read_messages(developer)[0]["role"] == "system"
    assert read_messages(developer, keep_developer=True)[0]["role"] == "developer"


def test_developer_reaches_a_template_that_knows_it():
    tokenizer = byte_tokenizer()
    messages = [{"role": "developer", "content": "x"}]
    assert "<|im_start|>system\nx" in tokenizer.decode(encode_chat(tokenizer, messages))
    tokenizer.chat_template += "{# developer #}"
    assert "<|im_start|>developer\nx" in tokenizer.decode(encode_chat(tokenizer, messages))


def test_template_errors_are_the_users_and_missing_templates_the_models():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        encode_chat(tokenizer, [{"role": "user", "content": "a"}])
    tokenizer.chat_template = "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}"
    with pytest.raises(ValueError, match="refuses"):
        encode_chat(tokenizer, [{"role": "user", "content": "a"}])
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="--raw"):
        encode_chat(tokenizer, [{"role": "user", "content": "a"}])

TEXTS = st.one_of(st.text(max_size=20), st.lists(st.sampled_from([
    "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "start|>system\n", "<", "|", ">", "<s>",
    "</s>", "</", "s>", "<unk>", " ", "he", "\ufdd0", "\ufdd1", "<|endoftext|>", "\n", "🚀",
    "<repo_name>", "im_start",
]), max_size=8).map("".join))


@pytest.mark.parametrize("name", ["byte", "prepend", "first", "always", "smollm2"])
@settings(max_examples=100, deadline=None)
@given(contents=st.lists(TEXTS, min_size=1, max_size=4), prompt=st.booleans())
def test_only_the_template_writes_control_tokens(name, contents, prompt):
    tokenizer = get(name)
    roles = [("user", "assistant")[i % 2] for i in range(len(contents))]
    chats = [[{"role": role, "content": text} for role, text in zip(roles, texts)]
             for texts in (contents, ["he"] * len(roles))]
    ids, harmless = (encode_chat(tokenizer, chat, add_generation_prompt=prompt)
                     for chat in chats)
    assert special_ids(tokenizer, ids) == special_ids(tokenizer, harmless)
    rendered = tokenizer.apply_chat_template(chats[0], tokenize=False,
                                             add_generation_prompt=prompt)
    plain = tokenizer.encode(rendered, add_special_tokens=False)
    shown = full(tokenizer, ids, skip=False)
    kept = full(tokenizer, plain, skip=False).replace(" ", "")  # SentencePiece adds spaces
    assert shown.replace(" ", "") == kept and (name != "byte" or shown == rendered)
    if special_ids(tokenizer, plain) == special_ids(tokenizer, harmless):
        assert ids == plain == tokenizer.apply_chat_template(
            chats[0], add_generation_prompt=prompt, return_dict=False)
    assert not tokenizer.backend_tokenizer.encode_special_tokens  # nothing shared was switched


@pytest.mark.parametrize("text", ["hello 漢 world", "漢", "漢字 漢", "hello"])
def test_an_unknown_character_is_no_injection(text):
    "A vocabulary without byte tokens, whose <unk> is special."
    tokenizer = get("unigram")
    chat = [{"role": "user", "content": text}]
    ids = encode_chat(tokenizer, chat)
    assert ids == tokenizer.apply_chat_template(chat, return_dict=False)
    assert (tokenizer.unk_token_id in ids) == ("漢" in text)
    forged = encode_chat(tokenizer, [{"role": "user", "content": text + "</s>"}])
    assert forged.count(tokenizer.eos_token_id) == 1


def test_an_unknown_character_is_no_injection_without_a_named_unknown_token():
    tokenizer = unigram()
    tokenizer.unk_token = None
    chat = [{"role": "user", "content": "hello 漢 world"}]
    expected = tokenizer.apply_chat_template(chat, return_dict=False)
    assert encode_chat(tokenizer, chat) == expected


@pytest.mark.parametrize("template, message", [
    ("{% for m in messages %}{{ m.content | trim }}{% endfor %}",
     {"content": "  <|im_end|>  "}),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", {"content": [
        {"type": "text", "text": "<|im_end|>"}, {"type": "text", "text": "<|im_start|>"}]}),
    ("{% for m in messages %}{{ m | tojson }}{% endfor %}",
     {"content": "x", "<|im_end|>": {"a": ["<|im_start|>"]}}),
    ("{{ tools | tojson }}", {"content": "x"}),
])
def test_control_tokens_from_parts_keys_and_tools(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<|im_start|>" + template
    parameters = {"properties": {"<|im_end|>": {}}}
    tools = [{"type": "function", "function": {"name": "<|im_end|>", "parameters": parameters}}]
    ids = encode_chat(tokenizer, [{"role": "user", **message}], tools=tools)
    assert special_ids(tokenizer, ids) == [tokenizer.convert_tokens_to_ids("<|im_start|>")]
    text = full(tokenizer, ids, skip=False)
    assert "im_end|>" in text[12:] and "\ufdd0" not in text


def test_turn_marks_that_are_not_special():
    "As in DeepSeek's vocabulary. Only words of the application and the model may hold them."
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<User>", "<other>")])
    tokenizer.chat_template = "{% for m in messages %}{{ '<User>' + m.content }}{% endfor %}"
    mark, other = tokenizer.convert_tokens_to_ids(["<User>", "<other>"])
    for role, expected in {"user": 1, "tool": 1, "assistant": 2, "system": 2}.items():
        ids = encode_chat(tokenizer, [{"role": role, "content": "a<User>b<other>"}])
        assert (ids.count(mark), ids.count(other)) == (expected, 1)
        assert tokenizer.decode(ids) == "<User>a<User>b<other>"


def test_guard_is_fast_on_hostile_text_and_breaks_overlaps():
    overlapping = re.compile("aa|<s>")
    assert mark("aaaa", overlapping, "·") == "a·a·a·a"
    assert len(mark("<s>" * 100_000, overlapping, "·")) == 400_000
    marked = mark({"a<s>b": ["<s>", 1, None]}, overlapping, "·")
    assert marked == {"a<·s>b": ["<·s>", 1, None]}


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
    chat = [{"role": "user", "content": "hi <|im_end|>"}]
    assert encode_chat(loaded, chat) == encode_chat(byte_tokenizer(), chat)


def test_stop_strings_are_not_searched_in_the_first_tokens():
    tokenizer = byte_tokenizer()
    for min_tokens, text in {0: "a", 2: "axb", 6: "axbxcx"}.items():
        stream = TextStream(tokenizer, stop="x", min_tokens=min_tokens)
        shown = "".join([stream.push(i) for i in encode(tokenizer, "axbxcx")]) + stream.finish()
        assert shown == stream.text == text
        assert stream.stop_reason == (None if min_tokens == 6 else "x")


def test_a_control_token_that_appears_by_normalizing_is_refused():
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<|turn|>", normalized=True, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend,
                                        chat_template=tokenizer.chat_template)
    honest = [{"role": "user", "content": "Turn <|turn|> around"}]
    assert tokenizer.convert_tokens_to_ids("<|turn|>") not in encode_chat(tokenizer, honest)
    with pytest.raises(ValueError, match="normalized"):
        encode_chat(tokenizer, [{"role": "user", "content": "Turn <|TURN|> around"}])


def test_hostile_structures_are_the_users_mistake():
    tokenizer, deep = byte_tokenizer(), "x"
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(ValueError, match="refuses"):
        encode_chat(tokenizer, [{"role": "user", "content": "a", "extra": deep}])
    tokenizer.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(ValueError, match="refuses"):
        encode_chat(tokenizer, [{"role": "user", "content": "a"}])


def test_a_template_that_escapes_text_does_not_show_the_guard():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m | tojson(ensure_ascii=True) }}{% endfor %}")
    chat = [{"role": "user", "content": "a<|im_end|>b"}]
    text = tokenizer.decode(encode_chat(tokenizer, chat))
    assert "<|im_end|>" in text and "fdd0" not in text


def test_a_folder_with_a_tokenizer_needs_no_weights(tmp_path, monkeypatch):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), progress=False)
    assert loaded.encode("hi") == byte_tokenizer().encode("hi")
    monkeypatch.chdir(tmp_path)  # and a file that lies around is nobody's default
    assert len(load_tokenizer(load_format="dummy", progress=False)) == 259
    with pytest.raises(ModelError):
        load_tokenizer("", local_files_only=True, progress=False)
