"""Grammars: compiled and kept, followed through drafts, and masks that hold in any batch."""

import json
import random
import re
import sys
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import tiny_tokenizers
import torch
from jsonschema import Draft202012Validator

from nanollm.sampling import DEFAULT_PROCESSORS, SamplingParams, SamplingRow, sample, stop_ids
from nanollm.structured_output import (
    MAX_FORCED_BYTES,
    Follower,
    Grammar,
    GrammarMask,
    Grammars,
    JumpForward,
    OnceCache,
    StructuredOutputsParams,
    forbid,
    ids_of,
    read_vocab,
)
from nanollm.text import byte_tokenizer
from nanollm.vetting import compile_grammar

llguidance = pytest.importorskip("llguidance")
TOKENIZER = byte_tokenizer()
START, END, VOCAB = 257, 258, 320
EOS = (END, 256)
GRAMMARS = Grammars(TOKENIZER, VOCAB, EOS)
PERSON = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False}


def compiled(thinking="none", **fields):
    return GRAMMARS.compile(StructuredOutputsParams(**fields), thinking)


def allowed_after(grammar, token_ids):
    "The tokens that a fresh matcher allows."
    matcher = grammar.start()
    assert matcher.try_consume_tokens(list(token_ids)) == len(token_ids)
    bits = np.zeros(VOCAB // 32, dtype=np.uint32)
    matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    return ids_of(bits)


def takes(grammar, text):
    "Whether a text is a whole answer."
    ids = TOKENIZER.encode(text)
    matcher = grammar.start()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def row(output=(), key=None, draft=(), **params):
    params = SamplingParams(**params)
    return SamplingRow(params, (), list(output), 0, stop_ids(params, EOS), list(draft), key)


def apply(*rows, mask=None, processors=DEFAULT_PROCESSORS):
    "The logits of rows after all processors."
    x = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1))
    for processor in (*processors, mask or GrammarMask()):
        processor(x, rows)
    return x


def possible(x):
    return [torch.isfinite(one).nonzero().flatten().tolist() for one in x]


class Key:
    "Stands for a request."


# compiling


@pytest.mark.parametrize("fields, good, bad", [
    ({"json": PERSON}, ['{"name":"Jo","age":5}', '{ "name" : "Jo" ,\n"age": -5 }'],
     ['{"name":"Jo"}', '{"age":5,"name":"Jo"}', '{"name":"Johann","age":5}', "[]", "",
      '{' + " " * 9 + '"name":"Jo","age":5}', 'x {"name":"Jo","age":5}']),
    ({"json": PERSON, "disable_any_whitespace": True}, ['{"name":"Jo","age":5}'],
     ['{"name": "Jo","age":5}']),
    ({"json": PERSON, "whitespace_pattern": "_?"}, ['{_"name"_:"Jo","age":5}'],
     ['{ "name":"Jo","age":5}']),
    ({"json": {"type": "integer", "minimum": 1 - 2**53, "maximum": 2**53 - 1}},
     ["9007199254740991", "-9007199254740991"], ["9007199254740992", "-9007199254740992"]),
    ({"json": True}, ["5", '"a"', "null"], ["", "nul"]),
    ({"json": {"$defs": {"x": {"$anchor": "n", "type": "integer"}}, "$ref": "#n"}}, ["5"],
     ["5.5", "null"]),
    ({"json_object": True}, ["{}", '{"a": [1]}'], ["[]", "5"]),
    ({"json": {"type": "array", "uniqueItems": False}}, ["[1, 1]"], ["1"]),
    ({"regex": "[a-z]+/[0-9]{2}"}, ["ab/12"], ["ab/1", "ab/123", "AB/12", "xab/12 "]),
    ({"regex": "^a$"}, ["a"], ["b"]), ({"regex": 'a"\n/\\/\\d'}, ['a"\n//4'], ["a"]),
    ({"choice": [""]}, [""], ["a"]), ({"choice": ["a", "ab"]}, ["a", "ab"], ["", "b", "aba"]),
    ({"choice": ["a", "ab", 'q"\n/', "é漢", ""]}, ["a", "ab", 'q"\n/', "é漢", ""],
     ["b", "abc", "é"]),
    ({"grammar": 'start: "<" w ("," w)* ">"\nw: /[a-z]/ | %json {"type": "boolean"}'},
     ["<a>", "<a,true,b>"], ["<>", "<a,>"]),
])
def test_what_is_asked_for_is_what_is_allowed(fields, good, bad):
    grammar = compiled(**fields)
    assert [text for text in good if not takes(grammar, text)] == []
    assert [text for text in bad if takes(grammar, text)] == []


TAG = {"type": "structural_tag", "triggers": ["<f="], "structures": [
    {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
    {"begin": "<f=b>", "schema": {"type": "boolean"}, "end": "</f>"}]}
CONST = {"type": "const_string", "value": "x"}
WORD = {"type": "tag", "begin": "<w>", "content": {"type": "any_text"}, "end": "</w>"}
MARKED = WORD | {"begin": "<|im_start|>w", "end": "\n<|im_start|>"}


@pytest.mark.parametrize("form, good, bad", [
    (TAG, ["", "hello", "a <f=a>12</f> b <f=b>true</f>", "<f", "<f=a>1</f><f=a>2</f>"],
     ["<f=", "a <f=c>", "<f=a>true</f>", "<f=a>1", "x <f=b>false</f> <f=b>1</f>"]),
    (CONST, ["x"], ["", "xx"]),
    ({"type": "regex", "pattern": "[a/]+"}, ["a/"], ["", "b"]),
    ({"type": "grammar", "grammar": 'start: "a" b\nb: "c"'}, ["ac"], ["a"]),
    ({"type": "any_text"}, ["", "a\nb"], []),
    ({"type": "sequence", "elements": [CONST, WORD, {"type": "any_text"}]},
     ["x<w></w>", "x<w>a<b</w> and </w>"], ["x", "<w></w>", "x<w>a"]),
    ({"type": "or", "elements": [CONST, {"type": "json_schema", "json_schema": {"const": 5}}]},
     ["x", "5"], ["", "x5"]),
    ({"type": "tags_with_separator", "separator": ", ", "tags": [WORD, MARKED]},
     ["", "<w>a</w>", "<w>a</w>, <|im_start|>wb\n<|im_start|>"],
     ["<w>a</w>,", "<w>a</w><w>b</w>", "<|im_start|>wb<|im_start|>"]),
    ({"type": "tags_with_separator", "separator": ",", "tags": [WORD], "at_least_one": True,
      "stop_after_first": True}, ["<w>a</w>"], ["", "<w>a</w>,<w>b</w>"]),
    ({"type": "triggered_tags", "triggers": ["<w", "<|im_start|>"], "tags": [WORD, MARKED]},
     ["", "a <w>b</w> c <|im_start|>wd\n<|im_start|> e"],
     ["<w", "<|im_start|>", "<|im_start|>x"]),
    ({"type": "triggered_tags", "triggers": ["<w"], "tags": [WORD], "at_least_one": True},
     ["a <w>b</w> c", "<w>b</w><w></w>"], ["", "a", "a <w>b"]),
    ({"type": "triggered_tags", "triggers": ["<w"], "tags": [WORD], "stop_after_first": True},
     ["", "a", "a <w>b</w>"], ["a <w>b</w> c"]),
    ({"type": "triggered_tags", "triggers": ["<w"], "tags": [WORD], "at_least_one": True,
      "stop_after_first": True}, ["a <w>b</w>"], ["", "a", "a <w>b</w> c"]),
])
def test_structural_tags(form, good, bad):
    new = {"type": "structural_tag", "format": form}
    grammar = compiled(structural_tag=form if form["type"] == "structural_tag" else new)
    assert [text for text in good if not takes(grammar, text)] == []
    assert [text for text in bad if takes(grammar, text)] == []


def test_a_marker_cannot_be_spelled():
    form = {"type": "triggered_tags", "triggers": ["<|im_start|>"], "tags": [MARKED]}
    grammar = compiled(structural_tag={"type": "structural_tag", "format": form})
    spelled = list(b"a<|im_start|>")
    assert Follower(grammar).follow(spelled) == len(spelled) - 1
    assert Follower(grammar).follow(list(b"a<|im_start|")) == len(spelled) - 1


@pytest.mark.parametrize("fields", [{"json": PERSON}, {"choice": ["yes", "no"]},
                                    {"grammar": 'start: "yes"'}, {"structural_tag": TAG}])
def test_a_thought_may_come_first_and_nowhere_else(fields):
    answer = '{"name":"Jo","age":5}' if "json" in fields else "yes"
    none, may, opened = (compiled(thinking, **fields) for thinking in ("none", "may", "opened"))
    thought = "It is </thin\n k> {"
    assert takes(none, answer) and takes(may, answer)
    for space in ("", "\n\n", " " * 8):
        assert takes(may, f"<think>{thought}</think>{space}{answer}")
        assert takes(opened, f"{thought}</think>{space}{answer}")
    if "structural_tag" not in fields: # which is free text
        assert not takes(none, f"<think>{thought}</think>{answer}")
        assert not takes(may, f"hm <think>{thought}</think>{answer}")
        assert not takes(may, f"<think>{thought}</think>hm {answer}")
        assert not takes(opened, answer) and not takes(may, f"<think>{thought}")


def test_a_thought_has_the_tokens_of_its_markers():
    tokenizer = tiny_tokenizers.byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    think, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<think>", "</think>"))
    own = Grammars(tokenizer, VOCAB, EOS)
    grammar = own.compile(StructuredOutputsParams(regex="a+"), "may")
    assert allowed_after(grammar, []) == [97, think]
    assert Follower(grammar).follow([think, *b"so", end, 97, 97]) == 6
    assert Follower(grammar).follow([think, *b"</think>"]) == len("</think>") # not the last >
    assert end in allowed_after(grammar, [think, *b"so"])


REFUSED = ({"not": {"type": "null"}}, {"if": {}, "then": {}}, {"type": "array", "contains": {}},
           {"type": "array", "uniqueItems": True}, {"type": "object", "propertyNames": {}},
           {"type": "object", "dependentRequired": {"a": ["b"]}}, {"unevaluatedItems": False},
           {"type": "object", "unevaluatedProperties": False}, {"$dynamicRef": "#a"},
           {"type": "array", "minContains": 1}, {"type": "object", "dependencies": {}})


@pytest.mark.parametrize("schema", REFUSED, ids=str)
@pytest.mark.parametrize("where", ["root", "nested", "lark", "tag", "lenient", "lenient lark"])
def test_a_keyword_that_cannot_be_enforced_is_named(schema, where):
    lenient = {"x-guidance": {"lenient": True}}
    nested = {"type": "object", "properties": {"a": schema | lenient}}
    fields = {
        "root": {"json": schema}, "nested": {"json": nested},
        "lark": {"grammar": f"start: %json {json.dumps(nested)}"},
        "tag": {"structural_tag": {"type": "structural_tag", "format": {
            "type": "json_schema", "json_schema": schema | lenient}}},
        "lenient": {"json": schema | lenient},
        "lenient lark": {"grammar": f"start: %json {json.dumps(schema | lenient)}"}}[where]
    asked = StructuredOutputsParams(**fields)
    for _ in range(2): # the second time from the cache
        with pytest.raises(ValueError) as caught:
            GRAMMARS.compile(asked)
        message = str(caught.value)
        assert message.startswith(f"{asked.kind}: ") and "\n" not in message
        assert any(f'"{key}"' in message for key in schema), message


@pytest.mark.parametrize("fields, message", [
    ({"regex": "(?=a)b"}, "regex: "), ({"regex": "("}, "regex: "),
    ({"regex": r"\bfoo"}, "regex: "),
    ({"json": {"type": "string", "format": "nope"}}, "json: Unknown format: nope"),
    ({"json": {"type": "nope"}}, "json: Invalid type: nope"),
    ({"json": {"$ref": "https://example.org/x"}}, 'json: "$ref" to another document'),
    ({"json": {"items": {"$ref": "a.json"}}}, 'json: "$ref" to another document'),
    ({"json": {"type": "string", "format": "hostname"}}, 'json: "format": "hostname"'),
    ({"json": {"type": "integer", "minimum": 1e20}}, 'json: "minimum": 1e+20 is too large'),
    ({"json": {"exclusiveMaximum": 2**53}}, 'json: "exclusiveMaximum": 900719925474099'),
    ({"json": {"minimum": "5"}}, "json: "), ({"json": {"minimum": True}}, "json: "),
    ({"json": {"$ref": "#"}}, 'json: "$ref" leads back to itself'),
    ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
     'json: "$ref" leads'),
    ({"json": {"properties": {"x": {"$ref": "#/$defs/a~1"}}, "required": ["x"], "$defs": {
        "a/": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a~1"}}}}, 'json: "$ref" leads'),
    ({"json": {"$ref": "#/$defs/nowhere"}}, "json: "),
    ({"grammar": "start: <|im_end|>"}, "grammar: "),
    ({"grammar": 'start: "a" <|im_end|>'}, "grammar: "),
    ({"json": {"enum": []}}, "json: "),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "json: "),
    ({"json": {"oneOf": [{"type": "string"}, {"minLength": 1, "type": "string"}]}},
     "json: oneOf"),
    ({"grammar": "begin: /a/"}, "grammar: "), ({"grammar": "start: @other"}, "grammar: "),
    ({"grammar": "start: @g0"}, "grammar: "), ({"grammar": "start: @main"}, "grammar: "),
    ({"grammar": "start: <[999]>"}, "grammar: "), ({"grammar": "start: %json {"}, "grammar: "),
    ({"structural_tag": {}}, "structural_tag: it needs"),
    ({"json": False}, None), ({"json": "false"}, "json: a schema is a JSON object"),
])
def test_what_is_no_grammar_is_an_error_that_names_the_field(fields, message):
    with pytest.raises(ValueError) as caught:
        compiled(**fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert message is None or str(caught.value).startswith(message)


def test_weak_schemas_are_refused_by_their_warning_even_if_no_scanner_finds_them():
    sneaky = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    lark = json.dumps({"grammars": [{"lark_grammar": f"start: %json {json.dumps(sneaky)}"}]})
    with pytest.raises(ValueError, match="uniqueItems"):
        compile_grammar(read_vocab(TOKENIZER, VOCAB, EOS), lark)


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>b", "<|endoftext|><|im_end|>"])
@pytest.mark.parametrize("kind", ["const", "name", "choice", "regex", "grammar", "lark const"])
def test_the_name_of_a_token_in_a_constraint_is_text(text, kind):
    quoted = json.dumps(text)
    fields = {"const": {"json": {"const": text}},
              "name": {"json": {"type": "object", "properties": {text: {"const": 1}},
                                "required": [text], "additionalProperties": False}},
              "choice": {"choice": [text]}, "regex": {"regex": re.escape(text)},
              "grammar": {"grammar": f"start: {quoted}"},
              "lark const": {"grammar": f'start: %json {{"const": {quoted}}}'}}[kind]
    want = {"const": quoted, "name": f"{{{quoted}:1}}", "lark const": quoted}.get(kind, text)
    if "json" in fields:
        fields |= {"disable_any_whitespace": True}
    follower, made = Follower(compiled(**fields)), []
    while not follower.matcher.is_stopped():
        forced = follower.matcher.compute_ff_tokens()
        assert forced and allowed_of(follower) == [forced[0]]
        made += forced
        assert max(made) < 256 and follower.follow(made) == len(made)
    assert bytes(made).decode() == want


def test_a_token_in_a_grammar_is_a_token():
    grammar = compiled(grammar='start: <|im_start|> "<|im_start|>" <[257]>')
    assert takes_ids(grammar, [START, *b"<|im_start|>", START])
    with pytest.raises(ValueError, match="^grammar: .*<nope>") as caught:
        compiled(grammar="start: <nope>")
    assert "available" not in str(caught.value) # a name would not be a secret any more


def takes_ids(grammar, ids):
    matcher = grammar.start()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


BOUNDED = [None, 0, 0.5, -0.5, 1, -1, 0.001, 1.5, -2, 2, 1_000_000, 2**48]
NUMBERS = ("0", "-0", "0.0", "0.1", "-0.1", "0.5", "-0.5", "1", "-1", "2", "-2", "3", "1.0",
           "-1.0", "1.2", "0.001", "1.5", "-1.5", "0.99", "999999", "1000000", "1000001",
           "1000000.5", "281474976710655", "281474976710656", "281474976710657", "1e0", "5e-1")


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize("low", BOUNDED)
def test_no_number_passes_its_bounds(kind, low):
    num_taken = 0
    for high in BOUNDED:
        for excluded in range(4):
            schema = {"type": kind}
            if low is not None:
                schema["exclusiveMinimum" if excluded & 1 else "minimum"] = low
            if high is not None:
                schema["exclusiveMaximum" if excluded & 2 else "maximum"] = high
            try:
                grammar = compiled(json=schema)
            except ValueError:
                continue
            is_valid = Draft202012Validator(schema).is_valid
            for text in NUMBERS:
                taken = takes(grammar, text)
                num_taken += taken
                assert not taken or is_valid(json.loads(text)), (schema, text)
    assert num_taken > 5


@pytest.mark.parametrize("name", ["byte", "prepend", "first"])
def test_tokenizers_that_can_be_read(name):
    tokenizer = tiny_tokenizers.get(name)
    own = Grammars(tokenizer, len(tokenizer) + 5, [tokenizer.eos_token_id])
    grammar = own.compile(StructuredOutputsParams(choice=["hello world", "w"]))
    ids = tokenizer.encode("hello world", add_special_tokens=False)
    text = tokenizer.decode(ids).lstrip()
    assert text == "hello world"
    follower, made = Follower(grammar), []
    while not follower.matcher.is_stopped():
        made += follower.matcher.compute_ff_tokens() or list(
            follower.matcher.compute_ff_bytes()[:1] and []) or [allowed_of(follower)[0]]
        assert follower.follow(made) == len(made)
    assert tokenizer.decode(made).strip() in ("hello world", "w")


def allowed_of(follower):
    bits = np.zeros(-(-follower.grammar.vocab_size // 32), dtype=np.uint32)
    follower.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    return ids_of(bits)


@pytest.mark.parametrize("name", ["unigram", "wordpiece", "always"])
def test_a_tokenizer_that_would_be_read_wrongly_is_an_error(name):
    tokenizer = tiny_tokenizers.get(name)
    own = Grammars(tokenizer, len(tokenizer), [1])
    with pytest.raises(ValueError, match="^regex: "):
        own.compile(StructuredOutputsParams(regex="a"))


def test_a_model_without_end_or_with_too_few_logits_is_an_error():
    with pytest.raises(ValueError, match="regex: this model has no end token"):
        Grammars(TOKENIZER, VOCAB, ()).compile(StructuredOutputsParams(regex="a"))
    with pytest.raises(ValueError, match="regex: vocab size too small"):
        Grammars(TOKENIZER, 200, EOS).compile(StructuredOutputsParams(regex="a"))


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    own = Grammars(TOKENIZER, VOCAB, EOS)
    with pytest.raises(ValueError, match=r'json: this needs .*"nanollmserve\[structured\]"'):
        own.compile(StructuredOutputsParams(json={}))
    monkeypatch.undo()
    assert isinstance(own.compile(StructuredOutputsParams(json={})), Grammar)


def test_deep_grammars_need_the_large_stack_and_can_be_used_without():
    chain = {"$ref": "#/$defs/a0", "$defs": {
        f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(2000)} | {"a2000": {"const": 5}}}
    own = Grammars(TOKENIZER, VOCAB, EOS)
    grammar = own.compile(StructuredOutputsParams(json=chain))
    assert takes(grammar, "5") # and the matchers end on this thread


# keeping


def test_grammars_are_kept_by_what_they_say():
    own, checked = Grammars(TOKENIZER, VOCAB, EOS), []
    own.check = lambda text: checked.append(text)
    first = own.compile(StructuredOutputsParams(json=PERSON))
    assert own.compile(StructuredOutputsParams(json=json.dumps(PERSON, indent=2))) is first
    assert own.known(own.write(StructuredOutputsParams(json=PERSON))) is first
    assert own.known(own.write(StructuredOutputsParams(json=PERSON), "may")) is None
    turned = PERSON | {"properties": dict(reversed(PERSON["properties"].items()))}
    assert own.compile(StructuredOutputsParams(json=turned)) is not first # another order
    assert own.compile(StructuredOutputsParams(json=PERSON), "may") is not first
    assert len(checked) == 3 and all("grammars" in json.loads(text) for text in checked)


def test_the_first_grammar_is_made_in_advance():
    checked = []
    own = Grammars(TOKENIZER, VOCAB, EOS, checked.append)
    own.prepare()
    assert len(checked) == 1 and own.known(own.write(StructuredOutputsParams(json_object=True)))
    for error in (ValueError("no library"), RuntimeError("closed"), OSError("no process")):
        def fails(text, error=error):
            raise error
        Grammars(TOKENIZER, VOCAB, EOS, fails).prepare() # says nothing
    Grammars(TOKENIZER, VOCAB, ()).prepare() # no end token


def test_end_tokens_by_id_are_refused_and_left_out():
    for ids in (EOS[0], f"0-{VOCAB - 1}"):
        with pytest.raises(ValueError, match="^grammar: .* names a token that ends the answer"):
            compiled(grammar=f'start: "a" <[{ids}]> "b"')
    allowed = allowed_after(compiled(grammar='start: "a" <[*]> "b"'), TOKENIZER.encode("a"))
    assert allowed and not set(EOS) & set(allowed)


def test_a_refusal_is_kept_and_an_accident_is_not():
    calls, answers = [], iter(["no good", RuntimeError("no child"), None])

    def check(text):
        calls.append(text)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    own = Grammars(TOKENIZER, VOCAB, EOS, check)
    for _ in range(3):
        with pytest.raises(ValueError, match="^regex: no good$"):
            own.compile(StructuredOutputsParams(regex="a"))
    assert len(calls) == 1 and own.known(own.write(StructuredOutputsParams(regex="a"))) is None
    with pytest.raises(RuntimeError, match="no child"):
        own.compile(StructuredOutputsParams(regex="b"))
    assert isinstance(own.compile(StructuredOutputsParams(regex="b")), Grammar)
    assert len(calls) == 3


def thing(num_bytes):
    return types.SimpleNamespace(num_bytes=num_bytes)


def test_what_was_not_used_for_the_longest_time_goes_first():
    cache, made = OnceCache(max_bytes=30), []

    def get(key, num_bytes=10):
        return cache.get(key, lambda: made.append(key) or thing(num_bytes))

    for key in (b"a", b"b", b"c", b"a", b"d"): # d pushes b out
        get(key)
    assert made == [b"a", b"b", b"c", b"d"] and cache.num_bytes == 30
    assert cache.find(b"b") is None and cache.find(b"a") is not None
    get(b"large", 1000) # has the room for itself
    assert cache.num_bytes == 1000 and cache.find(b"a") is None
    get(b"e")
    assert cache.num_bytes == 10 and cache.find(b"large") is None


def test_many_threads_compile_once_and_all_get_it():
    begun, release, made = threading.Event(), threading.Event(), []

    def make():
        made.append(1)
        begun.set()
        assert release.wait(20)
        return thing(1)

    cache = OnceCache(100)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(cache.get, b"a", make)
        assert begun.wait(20)
        assert cache.find(b"a") is None # and it does not wait
        others = [pool.submit(cache.get, b"a", make) for _ in range(7)]
        assert cache.get(b"b", lambda: thing(2)).num_bytes == 2 # others do not wait, either
        release.set()
        results = {id(one.result(20)) for one in (first, *others)}
    assert len(results) == len(made) == 1


def test_whoever_waits_for_what_fails_hears_of_it_and_the_next_one_tries_again():
    begun, release, cache = threading.Event(), threading.Event(), OnceCache(100)

    def fail():
        begun.set()
        assert release.wait(20)
        raise MemoryError("on purpose")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, b"a", fail)
        assert begun.wait(20)
        second = pool.submit(cache.get, b"a", fail)
        time.sleep(0.05) # so that it waits
        release.set()
        for one in (first, second):
            with pytest.raises(MemoryError):
                one.result(20)
    assert cache.num_bytes == 0 and cache.get(b"a", lambda: thing(3)).num_bytes == 3


def test_who_looks_gets_no_error_of_who_makes():
    "While somebody looks, making may fail: then there is nothing, and no error."
    begun, release, cache = threading.Event(), threading.Event(), OnceCache(100)

    def fail():
        begun.set()
        assert release.wait(20)
        raise MemoryError("on purpose")

    with ThreadPoolExecutor(1) as pool:
        maker = pool.submit(cache.get, "a", fail)
        assert begun.wait(20)
        future = cache._futures["a"]

        def is_done():
            release.set()
            wait([maker], 0.5) # it ends here, unless whoever looks holds the lock
            return type(future).done(future)

        future.done = is_done
        assert cache.find("a") is None
        assert isinstance(maker.exception(20), MemoryError)
    assert cache.find("a") is None and cache.num_bytes == 0


def test_real_grammars_from_many_threads():
    own = Grammars(TOKENIZER, VOCAB, EOS)
    asked = [StructuredOutputsParams(regex=f"a{{{i % 5 + 1}}}") for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(own.compile, asked))
    assert len(set(found)) == 5
    assert own.cache.num_bytes == sum(grammar.num_bytes for grammar in set(found))


# following


def walk(grammar, draw, most=25):
    "A random answer, as a fresh matcher allows it."
    made = []
    while len(made) < most:
        able = [i for i in allowed_after(grammar, made) if i not in EOS]
        if not able:
            break
        made.append(draw.choice(able))
    return made


@pytest.mark.parametrize("fields", [{"json": PERSON}, {"regex": "(ab|[a-f]{3})+"},
                                    {"choice": ["yes", "yesterday", "no"]},
                                    {"structural_tag": TAG}], ids=str)
@pytest.mark.parametrize("thinking", ["none", "may"])
def test_a_follower_is_where_a_fresh_matcher_would_be(fields, thinking):
    grammar, draw = compiled(thinking, **fields), random.Random(3)
    wrong = right = 0
    for _ in range(12):
        answer, follower, done = walk(grammar, draw), Follower(grammar), 0
        while done < len(answer):
            guess = list(answer[done:done + draw.randrange(5)])
            if guess and draw.random() < 0.5: # a wrong draft, or an end token
                guess[draw.randrange(len(guess))] = draw.choice([*range(VOCAB), *EOS])
            for k in range(len(guess) + 1): # the rows of a step
                num = follower.follow(answer[:done], guess[:k])
                legal = fresh_count(grammar, [*answer[:done], *guess[:k]])
                assert num == legal
                if num == done + k:
                    assert allowed_of(follower) == allowed_after(
                        grammar, [*answer[:done], *guess[:k]])
                    right += k > 0
                else:
                    wrong += 1
            done += draw.randint(1, 3)
        assert follower.follow(answer) == len(answer) and not follower.matcher.is_error()
    assert wrong > 5 and right > 20


def fresh_count(grammar, token_ids):
    "How many tokens a fresh matcher takes, and no end token."
    ends = [i for i, token_id in enumerate(token_ids) if token_id in EOS]
    return grammar.start().try_consume_tokens(token_ids[:ends[0]] if ends else token_ids)


def test_an_end_token_is_never_fed():
    grammar = compiled(regex="ab?")
    follower = Follower(grammar)
    assert follower.follow([97], [END]) == 1 and follower.follow([97], [98, END]) == 2
    assert follower.follow([97], [END, 98]) == 1 and follower.follow([97, END]) == 1
    assert follower.follow([97], [98]) == 2 and follower.matcher.is_stopped()


def test_a_long_answer_is_compared_once():
    class Counted(list):
        num_read = 0

        def __getitem__(self, key):
            found = super().__getitem__(key)
            Counted.num_read += len(found) if isinstance(key, slice) else 1
            return found

    follower, answer = Follower(compiled(regex="a+")), Counted()
    for _ in range(500):
        answer.append(97)
        assert follower.follow(answer, [97, 97]) == len(answer) + 2
    assert Counted.num_read == 500


# masks


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 320, 1000])
@pytest.mark.parametrize("num_rows, num_masked", [(1, 1), (5, 5), (5, 2), (150, 130), (70, 70)])
def test_masks_are_a_plain_masked_fill(vocab_size, num_rows, num_masked):
    generator = np.random.default_rng(vocab_size + num_masked)
    x = torch.from_numpy(generator.standard_normal((num_rows, vocab_size), dtype=np.float32))
    x[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    places = sorted(generator.choice(num_rows, num_masked, replace=False).tolist())
    bits = generator.integers(0, 2**32, (num_masked, -(-vocab_size // 32)), dtype=np.uint32)
    want = x.clone()
    for i, one in zip(places, bits):
        keep = torch.zeros(vocab_size, dtype=torch.bool)
        keep[[token_id for token_id in ids_of(one) if token_id < vocab_size]] = True
        want[i] = want[i].masked_fill(~keep & ~want[i].isnan(), -torch.inf)
    forbid(x, places, bits)
    assert torch.equal(x.isnan(), want.isnan())
    assert torch.equal(x.nan_to_num(7), want.nan_to_num(7))


def test_a_row_gets_what_its_grammar_allows_and_others_stay():
    grammar = compiled(json=PERSON)
    rows = [row(), row(structured_outputs=grammar), row(),
            row(list(b'{"name"'), structured_outputs=grammar)]
    x, plain = apply(*rows), apply(*[row()] * 4)
    assert torch.equal(x[[0, 2]], plain[[0, 2]])
    assert possible(x)[1] == [ord("{")] and possible(x)[3] == sorted(b" \n:")
    assert torch.equal(x[3, possible(x)[3]], plain[3, possible(x)[3]]) # unchanged


def test_a_batch_without_grammars_costs_nothing():
    x = torch.zeros(2, VOCAB)
    x.copy_ = None
    GrammarMask()(x, [row(), row()])
    assert not GrammarMask()._followers


def test_the_mask_has_the_last_word():
    grammar = compiled(choice=["yes", "no"])
    bias = {ord("y"): -100, ord("a"): 100}
    out = sample(torch.zeros(1, VOCAB), [row(temperature=0, logit_bias=bias, logprobs=2,
                                             structured_outputs=grammar)],
                 (*DEFAULT_PROCESSORS, GrammarMask()))
    assert out.token_ids == [ord("n")]
    assert out.logprobs[0].logprob == pytest.approx(-np.log(VOCAB)) # raw


@pytest.mark.parametrize("params", [{}, {"min_tokens": 9}, {"ignore_eos": True},
                                    {"min_tokens": 9, "stop_token_ids": [97]}], ids=str)
def test_a_complete_answer_can_only_end(params):
    done = row(list(b"yes"), structured_outputs=compiled(choice=["yes", "no"]), **params)
    assert END in done.stop_ids
    x = apply(done)
    assert possible(x) == [[END]] and x[0, END] == 0


def test_an_answer_that_may_go_on_goes_on_until_min_tokens():
    grammar = compiled(regex="a+")
    assert possible(apply(row([97], structured_outputs=grammar)))[0] == [97, 256, END]
    assert possible(apply(row([97], structured_outputs=grammar, min_tokens=3)))[0] == [97]


def test_the_grammar_wins_where_min_tokens_leaves_nothing():
    grammar = compiled(regex="a{5}")
    x = apply(row([97], structured_outputs=grammar, stop_token_ids=[97], min_tokens=4))
    assert possible(x) == [[97]] and x[0, 97] == 0
    either = compiled(regex="[ab]{5}")
    x = apply(row([97], structured_outputs=either, stop_token_ids=[97], min_tokens=4))
    assert possible(x) == [[98]]


def test_rows_after_a_wrong_draft_are_not_masked():
    grammar, key = compiled(choice=["yes", "no"]), Key()
    drafts = list(b"yxs")
    rows = [row([], key, drafts[:i], structured_outputs=grammar) for i in range(4)]
    mask = GrammarMask()
    x, plain = apply(*rows, mask=mask), apply(*[row()] * 4)
    assert possible(x)[:2] == [sorted(b"ny"), [ord("e")]]
    assert torch.equal(x[2:], plain[2:])
    next_row = row(b"y", key, structured_outputs=grammar)
    assert possible(apply(next_row, mask=mask)) == [[ord("e")]]
    after_end = row(list(b"yes"), key, [END], structured_outputs=grammar)
    assert len(possible(apply(after_end, mask=mask))[0]) == VOCAB


@pytest.mark.parametrize("wrong", [
    StructuredOutputsParams(regex="a"), {"json": {}}, "a", 0,
    Grammar(None, 0, VOCAB + 1, EOS)], ids=lambda one: type(one).__name__)
def test_what_was_not_compiled_for_this_model_gets_no_token(wrong):
    good = row(structured_outputs=compiled(regex="a+"))
    out = sample(torch.zeros(3, VOCAB), [row(), row(structured_outputs=wrong), good],
                 (*DEFAULT_PROCESSORS, GrammarMask()))
    assert out.failed == (1,) and out.token_ids[2] == 97


class Broken:
    "A matcher whose grammar has become too large: it allows the end token, and nothing else."
    def deep_copy(self): return self
    def is_error(self): return True
    def is_stopped(self): return True
    def is_accepting(self): return True
    def get_error(self): return "too many states"
    def try_consume_tokens(self, token_ids): return 0
    def rollback(self, num): return False

    def unsafe_compute_mask_ptr(self, pointer, size):
        import ctypes
        ctypes.memset(pointer, 0, size)
        ctypes.c_uint32.from_address(pointer + END // 32 * 4).value = 1 << END % 32


def test_a_matcher_in_error_ends_its_request_and_no_other(caplog):
    broken = Grammar(Broken(), 0, VOCAB, EOS)
    rows = [row(structured_outputs=broken), row(structured_outputs=compiled(regex="a+"))]
    assert possible(apply(*rows)) == [[], [97]]
    assert "too many states" in caplog.text


def test_real_limits_make_errors_and_no_broken_answers():
    "A grammar that runs into a limit on its way: its row is empty, and never the end token."
    from llguidance import LLMatcher, LLParserLimits
    limits = LLParserLimits(max_lexer_states=60, verbose_errors=False)
    text = json.dumps({"grammars": [{"lark_grammar": "start: /(a|b)*a(a|b){12}c/"}]})
    root = LLMatcher(read_vocab(TOKENIZER, VOCAB, EOS), text, log_level=0, limits=limits)
    assert not root.is_error()
    grammar, draw, output = Grammar(root, 0, VOCAB, EOS), random.Random(1), []
    mask, key = GrammarMask(), Key()
    for _ in range(200):
        [able] = possible(apply(row(output, key, structured_outputs=grammar), mask=mask))
        if not able:
            break
        assert END not in able
        output.append(draw.choice([i for i in able if i in b"ab"]))
    assert not able, "the limit was never met"


class Slow(Broken):
    "A matcher that allows byte 97 and takes its time."
    def is_error(self): return False
    def is_stopped(self): return False
    def get_error(self): return ""
    def try_consume_tokens(self, token_ids): return len(token_ids)

    def unsafe_compute_mask_ptr(self, pointer, size):
        import ctypes
        end_s = time.thread_time() + 0.02
        while time.thread_time() < end_s:
            pass
        ctypes.c_uint32.from_address(pointer + 97 // 32 * 4).value = 1 << 97 % 32


def test_a_grammar_that_takes_too_long_ends_its_request(caplog):
    "What counts is this thread's processor time, for the length of the answer."
    mask, key, output = GrammarMask(), Key(), []
    slow = Grammar(Slow(), 0, VOCAB, EOS)
    time.sleep(0.1)
    for _ in range(20):
        [able] = possible(apply(row(output, key, structured_outputs=slow), mask=mask))
        if not able:
            break
        output.append(97)
    assert 1 <= len(output) <= 18 and "too slow" in caplog.text and not slow.is_spent


def test_one_slow_step_harms_nobody():
    "A machine that was busy elsewhere may have counted its time here."
    follower = Follower(Grammar(Slow(), 0, VOCAB, EOS))
    with follower.metered():
        end_s = time.thread_time() + 0.3
        while time.thread_time() < end_s:
            pass
    assert not follower.is_slow


def test_a_grammar_that_has_met_its_limits_is_compiled_anew():
    own = Grammars(TOKENIZER, VOCAB, EOS)
    asked = StructuredOutputsParams(regex="a+")
    first = own.compile(asked)
    first.root = Broken()
    assert possible(apply(row(structured_outputs=first))) == [[]] and first.is_spent
    assert own.known(own.write(asked)) is None
    second = own.compile(asked)
    assert second is not first and own.known(own.write(asked)) is second is own.compile(asked)
    assert own.cache.num_bytes == second.num_bytes


def test_a_follower_goes_with_its_request():
    mask, key, grammar = GrammarMask(), Key(), compiled(regex="a+")
    apply(row([], key, structured_outputs=grammar), mask=mask)
    gone = weakref.ref(key)
    assert len(mask._followers) == 1
    del key
    assert gone() is None and len(mask._followers) == 0


# drafts


def request(output, grammar):
    own = Key()
    own.params, own.output_ids = SamplingParams(structured_outputs=grammar), list(output)
    return own


def test_forced_tokens_are_drafted():
    grammar = compiled(json=PERSON, disable_any_whitespace=True)
    forward = JumpForward(GrammarMask())
    asked = [request([], grammar), request([], None), request(b'{"name":"Jo"', grammar),
             request([], StructuredOutputsParams(json=PERSON)), request([], grammar)]
    drafts = forward.propose(asked, [16, 16, 4, 16, 0])
    assert [bytes(one) for one in drafts] == [b'{"name":"', b"", b',"ag', b"", b""]
    done = request(b'{"name":"Jo","age":5}', grammar)
    assert forward.propose([done], [16]) == [[]]


def test_a_long_constant_is_not_tokenized_in_every_step():
    short, long = "a" * (MAX_FORCED_BYTES - 2), "a" * MAX_FORCED_BYTES
    forward = JumpForward(GrammarMask())
    for text, num in ((short, 16), (long, 0)):
        own = request([], compiled(json={"const": text}, disable_any_whitespace=True))
        assert [len(one) for one in forward.propose([own], [16])] == [num]


def test_drafts_follow_an_answer_that_went_another_way():
    grammar = compiled(regex="(abc|abd)x+y")
    forward, own = JumpForward(GrammarMask()), request([], grammar)
    assert forward.propose([own], [16]) == [[97, 98]]
    own.output_ids += [97]
    assert forward.propose([own], [16]) == [[98]]
    own.output_ids += [98, 100]
    assert forward.propose([own], [16]) == [[120]]


# answers


SERVED = [
    {"type": "array", "items": {"type": "integer", "multipleOf": 3}, "minItems": 1,
     "maxItems": 3},
    {"type": "object", "patternProperties": {"^a$": {"type": "null"}, "^b$": {"const": 1}},
     "additionalProperties": False, "minProperties": 1, "maxProperties": 2},
    {"type": "string", "format": "date"}, {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"oneOf": [{"type": "integer", "minimum": 3, "maximum": 9}, {"type": "null"}]},
    {"allOf": [{"type": "integer"}, {"minimum": 5}, {"exclusiveMaximum": 12}]},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "minLength": 2, "maxLength": 3}]},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["a", 5]}], "items": False},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {
        "type": "object", "properties": {"left": {"anyOf": [{"$ref": "#/$defs/tree"},
                                                            {"type": "null"}]}},
        "required": ["left"], "additionalProperties": False}}}]


@pytest.mark.parametrize("schema", SERVED, ids=str)
def test_every_complete_answer_is_valid(schema):
    grammar = compiled(json=schema)
    validator = Draft202012Validator(
        schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    draw, num_complete = random.Random(5), 0
    for _ in range(30):
        made = walk(grammar, draw, most=60)
        text = bytes(made).decode(errors="replace")
        if takes(grammar, text):
            num_complete += 1
            validator.validate(json.loads(text))
    assert num_complete >= 5


def test_answers_to_a_regex_match_it():
    draw, grammar = random.Random(2), compiled(regex="(ab|[a-f]{3}){2}-[0-9]{2}")
    for _ in range(20):
        assert re.fullmatch("(ab|[a-f]{3}){2}-[0-9]{2}", bytes(walk(grammar, draw)).decode())
