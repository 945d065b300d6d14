"""Conversations to prompts that cannot be forged, and answers to their pieces."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import full, get, special_ids, unigram
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from nanollm.chat import TemplateTraits, encode_chat, mark, read_messages
from nanollm.model import ModelError
from nanollm.text import byte_tokenizer


@pytest.mark.parametrize("messages, complaint", [
    ([], "at least one message"),
    ("hi", "must be a list"),
    ([3], r"messages\[0\] must be an object"),
    ([{"content": "hi"}], r"messages\[0\]\.role is None"),
    ([{"role": "user", "content": "a"}, {"role": "wizard", "content": "b"}],
     r"messages\[1\]\.role is 'wizard'"),
    ([{"role": ["user"], "content": "a"}], r"messages\[0\]\.role"),
    ([{"role": "user"}], r"messages\[0\]\.content must be .*, got None"),
    ([{"role": "system", "content": None}], r"messages\[0\]\.content"),
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
    [message] = read_messages([{"role": "user", "content": parts}])
    assert message["content"] == "text\ninput_text\noutput_text"
    tool = {"role": "tool", "content": "4", "tool_call_id": "1"}
    assert read_messages((tool,))[0]["tool_call_id"] == "1"
    developer = [{"role": "developer", "content": "x"}]
    assert read_messages(developer)[0]["role"] == "system"
    traits = TemplateTraits(developer=True)
    assert read_messages(developer, traits)[0]["role"] == "developer"


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
