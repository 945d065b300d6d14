"""Calls of tools: read from answers in any pieces, and held by grammars."""

import json
import random
import string
from dataclasses import replace

import pytest
from chat_templates import CALLERS, FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tiny_tokenizers import family, full
from tokenizers import AddedToken

from nanollm.chat import PlainParser, ReasoningParser, encode_chat, make_parsers
from nanollm.constraints import StructuredOutputsParams
from nanollm.structured_output import Grammars
from nanollm.text import byte_tokenizer
from nanollm.tool_grammars import call_constraint, strict_schemas
from nanollm.tools import (
    STYLES,
    TOOL_PARSERS,
    CallParser,
    Extent,
    as_json,
    call_style,
    type_of,
    typed,
    types_of,
)

STYLE = {style.name: style for style in STYLES}
SCHEMA = {"type": "object", "properties": {
    "a": {"type": "string"}, "n": {"type": "integer"}, "o": {"type": "object"},
    "m": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "any": {}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
         {"type": "function", "function": {"name": "g"}}]


def read(style, stream, inner=PlainParser, tools=TOOLS):
    "What a client makes of the pieces, in their order, and the number of complete calls."
    style = STYLE[style] if isinstance(style, str) else style
    parser, pieces = CallParser(style, inner(), tools), []
    for text in stream:
        pieces += parser.push(text)
    pieces += parser.finish()
    found, calls = [], {}
    for piece in pieces:
        if piece.kind != "call":
            assert piece.text and not (piece.index or piece.call_id or piece.name)
            if not found or found[-1][0] != piece.kind:
                found.append([piece.kind, ""])
            found[-1][1] += piece.text
        elif piece.index not in calls:
            assert piece.index == len(calls) and piece.name and piece.call_id and not piece.text
            calls[piece.index] = ["call", piece.name, "", piece.call_id]
            found.append(calls[piece.index])
        else:
            assert piece.text and not piece.name and piece.index == len(calls) - 1
            assert piece.call_id == calls[piece.index][3]
            calls[piece.index][2] += piece.text
    assert all(call[2] for call in calls.values()), "a call without arguments"
    assert len({call[3] for call in calls.values()}) == len(calls)
    assert [p for p, q in zip(found, found[1:]) if p[0] == q[0] == "text"] == []
    return [tuple(part[:3]) for part in found], parser.num_calls


def call(arguments="{}", name="f"):
    return ("call", name, arguments)


def text(words):
    return ("text", words)


HERMES = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
XML = "<tool_call>\n<function=f>\n%s</function>\n</tool_call>"
P = "<parameter=%s>\n%s\n</parameter>\n"
CASES = {
    "hermes": [
        (HERMES % '{"a": "x"}', [call('{"a": "x"}')], 1),
        ("A.\n" + HERMES % "{}" + "\n" + HERMES % '{"n": 1}' + "\nB. ",
         [text("A."), call(), call('{"n": 1}'), text("\nB. ")], 2),
        (HERMES % '{"a": "}</tool_call>{[", "o": {"x": [{}, "\\"]"]}}',
         [call('{"a": "}</tool_call>{[", "o": {"x": [{}, "\\"]"]}}')], 1),
        (HERMES % '{"a":  "\\u00e9\\ud83d\\ude00 é🚀\\n"  }',
         [call('{"a":  "\\u00e9\\ud83d\\ude00 é🚀\\n"  }')], 1),
        ('<tool_call>{"arguments": {"a": "}"}, "name": "g"}</tool_call>',
         [call('{"a": "}"}', "g")], 1),
        ('<tool_call>{"name": "g"}</tool_call>', [call(name="g")], 1),
        ('<tool_call>{"name": "g", "parameters": null}</tool_call> ', [call(name="g")], 1),
        ('<tool_call>{"name": "none", "arguments": { } , "id": "x"}</tool_call>',
         [call("{ }", "none")], 1),
        (HERMES.replace("}\n", "}}}\n") % "{}", [call()], 1),
        (HERMES.replace("}\n", "\n") % "{}", [call()], 1),
        (HERMES.replace("\n</tool_call>", "") % "{}", [call()], 1),
        (HERMES % "{}" + " \n", [call()], 1),
        ("<tool_call>soon</tool_call>", [text("<tool_call>soon</tool_call>")], 0),
        (HERMES % "{a: 1}", [text(HERMES % "{a: 1}")], 0),
        (HERMES % '"a"', [text(HERMES % '"a"')], 0),
        (HERMES % '[{"a": 1}]', [text(HERMES % '[{"a": 1}]')], 0),
        ("<tool_call>x" + HERMES % "{}", [text("<tool_call>x"), call()], 1),
        (HERMES % '{"a": 1,,}', [call('{"a": 1,,}')], 0),
        (HERMES % '{"a": NaN}', [call('{"a": NaN}')], 0),
        (HERMES % '{"a": "x\ny"}', [call('{"a": "x'), text('\ny"}}\n</tool_call>')], 0),
        (HERMES % '{"a": [1}', [call('{"a": [1'), text("}}\n</tool_call>")], 0),
        (HERMES % '{"a": "x\ny"}' + HERMES % "{}",
         [call('{"a": "x'), text('\ny"}}\n</tool_call>'), call()], 1),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "x', [call('{"a": "x')], 0),
        ('<tool_call>\n{"name": "f", "argu', [text('<tool_call>\n{"name": "f", "argu')], 0),
        ('<tool_call>{"arguments": {"a": 1}, "na',
         [text('<tool_call>{"arguments": {"a": 1}, "na')], 0),
        (HERMES[:-6] % "{}", [call()], 1),
        (HERMES.replace("</tool_call>", "") % "{}" + "B", [call(), text("\nB")], 1),
        ("a < b <tool", [text("a < b <tool")], 0),
        ("  ", [text("  ")], 0), ("", [], 0), ("x \n", [text("x \n")], 0),
        (" " * 300 + HERMES % "{}", [call()], 1),
        (HERMES.replace("\n", "\n" * 300) % "{}",
         [text(HERMES.replace("\n", "\n" * 300) % "{}")], 0),
    ],
    "qwen3_coder": [
        (XML % (P % ("a", 'Paris "x"\nb') + P % ("n", "3")),
         [call('{"a": "Paris \\"x\\"\\nb", "n": 3}')], 1),
        ("A.\n\n" + XML % "" + "\n" + XML % (P % ("n", "-1")) + "\nB.",
         [text("A."), call(), call('{"n": -1}'), text("\nB.")], 2),
        ("<function=g>\n</function> B", [call(name="g"), text(" B")], 1),
        ("<tool_call><function=f><parameter=a>x</parameter></function></tool_call>",
         [call('{"a": "x"}')], 1),
        (XML % (P % ("o", '{"x": "</parameter>", "y": [True, None]}')),
         [call('{"o": {"x": "</parameter>", "y": [true, null]}}')], 1),
        (XML % (P % ("o", '{"x": "</parameter>"}')), [call('{"o": {"x": "</parameter>"}}')], 1),
        (XML % (P % ("m", "null") + P % ("any", "[1]") + P % ("other", "1")),
         [call('{"m": null, "any": [1], "other": "1"}')], 1),
        (XML % (P % ("m", 'it "is') + P % ("any", "it is") + P % ("n", "many")),
         [call('{"m": "it \\"is", "any": "it is", "n": "many"}')], 1),
        (XML % (P % ("a", "") + P % ("m", "a\n\n")), [call('{"a": "", "m": "a\\n\\n"}')], 1),
        (XML % (P % ("a", "<parameter=n>\n1\n</param>é\\u00e9")),
         [call('{"a": "<parameter=n>\\n1\\n</param>é\\\\u00e9"}')], 1),
        (XML % "no", [text(XML % "no")], 0),
        ("<tool_call>\n{}", [text("<tool_call>\n{}")], 0),
        (XML % (P % ("a", "x") + "no"), [call('{"a": "x"'), text(
            "\nno</function>\n</tool_call>")], 0),
        ((XML % (P % ("a", "hello")))[:-38], [call('{"a": "hello')], 0),
        ((XML % (P % ("n", "12345")))[:-40], [call("{")], 0),
        ("<tool_call>\n<func", [text("<tool_call>\n<func")], 0),
    ],
    "llama3_json": [
        ('{"name": "f", "parameters": {"a": "x"}}', [call('{"a": "x"}')], 1),
        ('\n{"name": "f", "arguments": {}}; {"name": "g", "parameters": {"a": ";"}}',
         [call(), call('{"a": ";"}', "g")], 2),
        ('{"name": "f", "parameters": {}}\n{"name": "g"}', [call(), call(name="g")], 2),
        ('<|python_tag|>{"name": "other", "parameters": {}}', [call(name="other")], 1),
        ('Hm. <|python_tag|>{"name": "f", "parameters": {}} B',
         [text("Hm."), call(), text(" B")], 1),
        ('{"name": "Ada", "parameters": {}}', [text('{"name": "Ada", "parameters": {}}')], 0),
        ('{"parameters": {}, "name": "Ada"}', [text('{"parameters": {}, "name": "Ada"}')], 0),
        ('{"parameters": {"a": 1}, "name": "f"}', [call('{"a": 1}')], 1),
        ('{"type": "function", "name": "f"}', [text('{"type": "function", "name": "f"}')], 0),
        ('A {"name": "f", "parameters": {}}', [text('A {"name": "f", "parameters": {}}')], 0),
        ('<|python_tag|>print("hi")', [text('<|python_tag|>print("hi")')], 0),
        ('{"name": "f", "parameters": {}}; {"name": 3}', [call(), text('; {"name": 3}')], 1),
        ('{"name": "f", "parameters": {"a": "x', [call('{"a": "x')], 0),
        ('{"name": "f", "par', [text('{"name": "f", "par')], 0), ("{", [text("{")], 0),
    ],
    "mistral": [
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": ["x]"]}}]',
         [call('{"a": ["x]"]}')], 1),
        ('A.[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefghi"}, '
         '{"name": "g", "arguments": {"a": "[TOOL_CALLS]"}}] B',
         [text("A."), call(), call('{"a": "[TOOL_CALLS]"}', "g"), text(" B")], 2),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}', [call('{"a": 1}')], 1),
        ("[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]other[ARGS]{}",
         [call(), call(name="other")], 2),
        ('[TOOL_CALLS] [{"arguments": {}, "name": "f"}]', [call()], 1),
        ("[TOOL_CALLS] []", [text("[TOOL_CALLS] []")], 0),
        ("[TOOL_CALLS] none", [text("[TOOL_CALLS] none")], 0),
        ("[TOOL_CALLS]f[ARGS]no", [text("[TOOL_CALLS]f[ARGS]no")], 0),
        ("a [1] [TOOL", [text("a [1] [TOOL")], 0),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x', [call('{"a": "x')], 0),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {}}', [call()], 1),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {}}, 3]', [call(), text(", 3]")], 1),
    ],
    "pythonic": [
        ('[f(a="x", n=1)]', [call('{"a": "x", "n": 1}')], 1),
        ("\n[f(), g(a=[1, {'b': None}], c=True)] B",
         [call(), call('{"a": [1, {"b": null}], "c": true}', "g"), text(" B")], 2),
        ("""[f(a="it's, )", b='a "b" ](')]""",
         [call('{"a": "it\'s, )", "b": "a \\"b\\" ]("}')], 1),
        ('[f(a=true, n=null, o={"x": false})]',
         [call('{"a": true, "n": null, "o": {"x": false}}')], 1),
        ('[f(a="\\u00e9\\"é")]', [call('{"a": "\\u00e9\\"é"}')], 1),
        ("[f( a = -1.5 , b = (1, 2) )]", [call('{"a": -1.5, "b": [1, 2]}')], 1),
        ("[f(a=1), other(a=2)]", [call('{"a": 1}'), call('{"a": 2}', "other")], 2),
        ("[h(a=1)]", [text("[h(a=1)]")], 0),
        ("[1, 2]", [text("[1, 2]")], 0), ("[", [text("[")], 0), ("[f]", [text("[f]")], 0),
        ("[f(1)]", [text("[f(1)]")], 0), ("[f(a=g())]", [text("[f(a=g())]")], 0),
        ("[f(a=1, b=g())]", [call('{"a": 1'), text(", b=g())]")], 0),
        ("[f(a=1, 2)]", [call('{"a": 1'), text(", 2)]")], 0),
        ("[f(a='x", [call("{")], 0), ("[f(a=1, b='x", [call('{"a": 1')], 0),
        ("A [f()]", [text("A [f()]")], 0),
    ],
}


ANSWERS = [(style, answer) for style, cases in CASES.items() for answer, *_ in cases]


@pytest.mark.parametrize("style", CASES)
def test_calls_in_every_spelling(style):
    assert len(CASES[style]) >= 11
    for answer, found, num_calls in CASES[style]:
        assert read(style, [answer]) == (found, num_calls), answer


def cut(answer, places):
    "The answer in pieces."
    places = sorted({min(place, len(answer)) for place in places} | {0, len(answer)})
    return [answer[a:b] for a, b in zip(places, places[1:])]


@pytest.mark.parametrize("style", CASES)
def test_any_cut_gives_the_same_calls(style):
    rng = random.Random(style)
    for answer, *expected in CASES[style]:
        assert read(style, answer) == tuple(expected), answer
        for _ in range(60):
            stream = cut(answer, rng.choices(range(len(answer) + 1), k=rng.randint(0, 9)))
            assert read(style, stream) == tuple(expected), stream


MARKS = ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=n>",
         "<parameter=a>", "</parameter>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "f(", ")",
         "a=1", ", ", "[", "]", "{", "}", '"', "\\", "'", ";", '{"name": "f", ',
         '"arguments": ',
         '{"a": ', '"x"', "1", "null", "f", "\n", " ", "é", "<", "True"]


@settings(max_examples=400, deadline=None)
@given(style=st.sampled_from(sorted(CASES)), cuts=st.lists(st.integers(0, 200), max_size=9),
       parts=st.lists(st.sampled_from(MARKS), max_size=24))
def test_nonsense_in_any_cut(style, cuts, parts):
    answer = "".join(parts)
    found, num_calls = read(style, [answer])
    assert read(style, answer) == read(style, cut(answer, cuts)) == (found, num_calls)
    calls = [part for part in found if part[0] == "call"]
    assert num_calls == sum(type_of(arguments) == "object" for _, _, arguments in calls)
    if not calls:  # nothing is lost
        assert "".join(words for _, words in found) == answer


@pytest.mark.parametrize("rest, num_calls", [
    ("}]", 1), (" } ]", 1), ('{"a": 1}}]', 0), ("l", 0)])
def test_null_is_no_arguments_only_if_they_end_with_it(rest, num_calls):
    answer = '[TOOL_CALLS] [{"name": "f", "arguments": null' + rest
    assert read("mistral", [answer]) == read("mistral", answer)
    assert read("mistral", answer)[1] == num_calls


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_begun_calls_in_any_cut(data):
    "A real answer that turns into nonsense somewhere."
    style, answer = data.draw(st.sampled_from(ANSWERS))
    answer = answer[:data.draw(st.integers(0, len(answer)))] + "".join(
        data.draw(st.lists(st.sampled_from(MARKS), max_size=8)))
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=9))
    whole = read(style, [answer])
    assert whole == read(style, answer) == read(style, cut(answer, cuts))


@pytest.mark.parametrize("style, answer", [
    ("hermes", HERMES), ("llama3_json", '{"name": "f", "parameters": %s}'),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": %s}]'),
    ("mistral", "[TOOL_CALLS]f[ARGS]%s")])
@settings(max_examples=100, deadline=None)
@given(value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8),
    ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_json_passes_as_it_is(style, answer, value, ascii_only, indent):
    arguments = json.dumps({"a": value}, ensure_ascii=ascii_only, indent=indent)
    assert read(style, answer % arguments) == ([call(arguments)], 1)


@settings(max_examples=200, deadline=None)
@given(words=st.text(max_size=20), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_strings_of_xml_become_json(words, cuts):
    if "</parameter>" in words:
        return
    answer = XML % (P % ("a", words) + P % ("m", words))
    [(kind, name, arguments)], num_calls = read("qwen3_coder", cut(answer, cuts))
    assert json.loads(arguments)["a"] == words and num_calls == 1


def test_strings_of_xml_come_while_they_are_written():
    parser = CallParser(STYLE["qwen3_coder"], PlainParser(), TOOLS)
    parser.push("<tool_call><function=f><parameter=a>\n")
    told = [piece.text for char in "hello\n</param x" for piece in parser.push(char)]
    assert told == ['{"a": "', "h", "e", "l", "l", "o", "\\n</param", " x"] or told == [
        "h", "e", "l", "l", "o", "\\n</param", " x"]


@pytest.mark.parametrize("style, answer", ANSWERS)
def test_no_more_is_held_than_may_become_a_call(style, answer):
    "While there is no call, text passes but for what may be a marker or its head."
    marks = ("<tool", "<func", "[TOOL", "<|")
    if any(mark in answer for mark in marks) or answer[:1] in "[{\n":
        return
    parser, sent = CallParser(STYLE[style], PlainParser(), TOOLS), ""
    for i, char in enumerate(answer, 1):
        sent += "".join(piece.text for piece in parser.push(char))
        assert answer[:i].rstrip(" \n") == sent


def test_thoughts_come_first_and_are_counted_inside():
    answer = "<think>\nA <tool_call>\n</think>\n\n" + HERMES % "{}"
    expected = [("reasoning", "A <tool_call>"), call()], 1
    assert read("hermes", [answer], ReasoningParser) == expected
    assert read("hermes", answer, ReasoningParser) == expected
    unclosed = "<think>A " + HERMES % "{}"
    assert read("hermes", unclosed, ReasoningParser) == ([("reasoning", unclosed[7:])], 0)
    bare = '<think>A</think>\n{"name": "f", "parameters": {}}'
    assert read("llama3_json", bare, ReasoningParser) == ([("reasoning", "A"), call()], 1)
    tokenizer = family("qwen3")
    parser = CallParser(STYLE["hermes"], make_parsers("auto", tokenizer)([]), TOOLS)
    ids = tokenizer.encode("<think>so</think>x")
    pieces = [*parser.push(tokenizer.decode(ids), ids), *parser.finish()]
    assert [(p.kind, p.text) for p in pieces] == [("reasoning", "so"), ("text", "x")]
    assert (parser.num_reasoning_tokens, parser.num_hidden_tokens) == (2, 4)
    assert parser.thinking == "may"
    assert CallParser(STYLE["hermes"], PlainParser()).thinking == "none"


def test_without_tools_only_markers_tell():
    assert read("pythonic", ["[f()]"], tools=()) == ([text("[f()]")], 0)
    assert read("hermes", [HERMES % "{}"], tools=()) == ([call()], 1)


def test_ids_are_unique_and_as_templates_want_them():
    many = "\n".join([HERMES % "{}"] * 50)
    pieces = CallParser(STYLE["hermes"], PlainParser()).push(many)
    ids = {piece.call_id for piece in pieces}
    assert len(ids) == 50 and all(id.startswith("call_") for id in ids)
    pieces = CallParser(STYLE["mistral"], PlainParser()).push("[TOOL_CALLS]f[ARGS]{}")
    [id] = {piece.call_id for piece in pieces}
    assert len(id) == 9 and set(id) <= set(string.ascii_lowercase + string.digits)


@pytest.mark.parametrize("schema", [
    [], 3, "x", {"properties": []}, {"properties": 3}, {"properties": {"a": 3}},
    {"properties": {"a": {"type": [{}]}}}, {"properties": {"a": {"type": 3}}},
    {"properties": {"a": {"enum": 3}}}, {"properties": {"a": {"anyOf": 3}}},
    {"properties": {"a": {"$ref": 3}}}, {"properties": {"a": {"$ref": "#/properties/a"}}},
    {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 12}}},
    {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 12_000}}},
])
def test_schemas_that_are_none_do_no_harm(schema):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    [found], num_calls = read("qwen3_coder", [XML % (P % ("a", "x"))], tools=tools)
    assert found == call('{"a": "x"}') and num_calls == 1


@pytest.mark.parametrize("value, found", [
    ("12", {"string": '"12"', "integer": "12", "number": "12", "": "12", "null": "12",
            "string null": '"12"', "string integer": "12", "string number": "12"}),
    ("null", {"string": '"null"', "string null": "null", "null": "null", "integer": "null"}),
    ("True", {"boolean": "true", "string boolean": "true", "string": '"True"', "": "true"}),
    ('"a"', {"string": '"\\"a\\""', "": '"\\"a\\""', "string null": '"\\"a\\""'}),
    ("1.0", {"integer": "1.0", "number": "1.0", "string integer": '"1.0"'}),
    ("a", {"integer": '"a"', "": '"a"', "object": '"a"'}),
    (" {'a': 1} ", {"object": '{"a": 1}', "string": '" {\'a\': 1} "', "": '{"a": 1}'}),
])
def test_values_by_their_types(value, found):
    for types, expected in found.items():
        assert typed(value, set(types.split())) == expected, types


def test_types_of_schemas():
    root = {"$defs": {"d": {"enum": [1, 2.5]}, "x": {"anyOf": [{"$ref": "#/$defs/d"}, {}]}}}
    for schema, types in (
            ({"type": "string"}, "string"), ({"type": ["string", "null"]}, "string null"),
            ({"const": None}, "null"), ({"enum": ["a", True, []]}, "string boolean array"),
            ({"$ref": "#/$defs/d"}, "integer number"), ({"$ref": "#/$defs/x"}, ""),
            ({"oneOf": [{"type": "string"}, {"$ref": "#/$defs/d"}]}, "string integer number"),
            ({}, ""), (True, ""), ({"$ref": "#/none"}, ""), ({"$ref": "http://x"}, "")):
        assert types_of(schema, root) == set(types.split()), schema


@pytest.mark.parametrize("value, found", [
    ("1", "1"), (' {"a":1}', ' {"a":1}'), ("'a'", '"a"'), ("(1,)", "[1]"),
    ("{1: 2}", '{"1": 2}'),
    ("None", "null"), ("1j", None), ("{1}", None), ("b'x'", None), ("1e999", "1e999"),
    ("f()", None), ("", None), ("[" * 100_000, None), ("9" * 5000, None),
    ("'\\ud800'", '"\\ud800"'),
    ("'\\x00'", '"\\u0000"'), ("\0", None), ("NaN", None),
    ("[" + "1," * 100_000 + "'a']", None),
])
def test_json_and_literals_of_python(value, found):
    assert as_json(value) == found


def test_an_extent_ends_once():
    extent = Extent()
    assert [extent.find(text) for text in ('{"a"', ": 1} x", "{}")] == [4, 4, 0]
    assert extent.outcome == "done" and extent.find("x") == 0


# -- which style


@pytest.mark.parametrize("name, style", {
    "smollm2": "hermes", "qwen2.5": "hermes", "qwen3": "hermes", "llama3.1": "llama3_json",
    "deepseek": "hermes", "parts": "hermes", "gemma": "hermes", "qwen3_coder": "qwen3_coder",
    "mistral": "mistral", "mistral_new": "mistral", "pythonic": "pythonic"}.items())
def test_the_template_shows_the_style(name, style):
    assert call_style("auto", family(name)).name == style
    assert set(FAMILIES) | set(CALLERS) == {
        "smollm2", "qwen2.5", "qwen3", "llama3.1", "deepseek", "parts", "gemma", "qwen3_coder",
        "mistral", "mistral_new", "pythonic"}


def test_styles_by_name_and_templates_of_others():
    tokenizer = byte_tokenizer()
    assert call_style("none", tokenizer) is None
    for name in TOOL_PARSERS[2:]:
        assert call_style(name, tokenizer).name == name
    with pytest.raises(ValueError, match="tool_call_parser must be auto or .*, got 'gpt'"):
        call_style("gpt", tokenizer)
    tokenizer.chat_template = None
    assert call_style("auto", tokenizer).name == "hermes"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function | tojson }}</call>{% endfor %}{% endfor %}{{ tools | tojson }}")
    assert call_style("auto", tokenizer) is None
    tokenizer.chat_template = {"default": "{{ messages[0].content }}",
                               "tool_use": CALLERS["pythonic"]}
    assert call_style("auto", tokenizer).name == "pythonic"
    tokenizer.chat_template = "{{ messages[0].content }}{{ tools | tojson }} <tool_call>\\n{"
    assert call_style("auto", tokenizer).name == "hermes"


def test_special_tokens_are_kept_for_reading_and_taken_out_again():
    plain, special = family("qwen3"), family("mistral")
    assert not call_style("auto", plain).keeps_special
    style = call_style("auto", special)
    assert style.keeps_special and set(style.hidden.values()) == set(
        token.content for token in special.added_tokens_decoder.values() if token.special
    ) - {"[TOOL_CALLS]", "</s>"}
    llama = family("llama3.1")
    assert not call_style("auto", llama).keeps_special
    llama.add_tokens([AddedToken("<|python_tag|>", special=True)])
    assert call_style("auto", llama).keeps_special
    ids = [*special.encode("<s>a[INST]b "), *b"[INST]",
           *special.encode("[TOOL_CALLS]f[ARGS]{}")]
    for size in (1, 2, 5, 100):
        parser, pieces = CallParser(style, PlainParser(), TOOLS), []
        for i in range(0, len(ids), size):
            pieces += parser.push(full(special, ids[i:i + size], skip=False), ids[i:i + size])
        pieces += parser.finish()
        assert "".join(p.text for p in pieces if p.kind == "text") == "ab [INST]"
        assert parser.num_calls == 1
    late = CallParser(style, PlainParser())  # the text lies behind the tokens
    inst = special.convert_tokens_to_ids("[INST]")
    pieces = [*late.push("a[IN", [97, inst]), *late.push("ST]b", [98]), *late.finish()]
    assert "".join(piece.text for piece in pieces) == "ab"
    shown = CallParser(replace(style, hidden={}), PlainParser())
    assert "".join(p.text for p in shown.push("a[INST]", [97, inst])) == "a[INST]"


CALLS = [{"type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
         for arguments in ({"a": 'x "y"\nz', "n": 3, "o": {"b": [True, None, "é"]}}, {})]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1", "qwen3_coder", "mistral",
                                  "mistral_new", "pythonic", "smollm2", "gemma"])
def test_what_a_template_writes_is_read_back(name):
    tokenizer, user = family(name), {"role": "user", "content": "?"}
    style = call_style("auto", tokenizer)
    both = [CALLS] if name != "llama3.1" else []
    for calls in (CALLS[:1], CALLS[1:], *both):
        calls = [call | {"id": style.new_id()} for call in calls]
        turn = {"role": "assistant", "content": None, "tool_calls": calls}
        ids = encode_chat(tokenizer, [user, turn], TOOLS, add_generation_prompt=False)
        before = encode_chat(tokenizer, [user], TOOLS)
        answer = full(tokenizer, ids[len(before):], skip=False)
        answer = answer.removesuffix("\n").removesuffix("<|im_end|>").removesuffix("</s>")
        answer = answer.removesuffix("<|eot_id|>").removesuffix("<end_of_turn>")
        found, num_calls = read(style, answer)
        assert [part[:2] for part in found] == [("call", "f")] * len(calls), answer
        assert num_calls == len(calls)
        for (_, _, arguments), call_ in zip(found, calls):
            assert json.loads(arguments) == json.loads(call_["function"]["arguments"])
        result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "22 é"}
        text = full(tokenizer, encode_chat(tokenizer, [user, turn, result], TOOLS), skip=False)
        assert "22 é" in text


# -- forced calls


WEATHER = {"type": "object", "properties": {
    "city": {"type": "string"}, "unit": {"$ref": "#/$defs/unit"},
    "days": {"type": "integer", "minimum": 1, "maximum": 9}, "now": {"type": "boolean"},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "list": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 3}},
    "required": ["city", "unit", "now"], "additionalProperties": False,
    "$defs": {"unit": {"type": "string", "enum": ["celsius", "fahren heit"], "title": "Unit"}}}
RULES = Draft202012Validator(WEATHER)
AGENT = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER,
                                           "strict": True}},
         {"type": "function", "function": {"name": "ping"}},
         {"type": "function", "function": {"name": "free", "parameters": SCHEMA}}]
ANSWER = StructuredOutputsParams(json={
    "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
    "additionalProperties": False})
GOOD = {
    "hermes": ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", '
               '"unit": "celsius", "now": true, "list": ["}]"]}}\n</tool_call>'],
    "qwen3_coder": ["<tool_call>\n<function=get_weather>\n<parameter=city>\nParis <b>\n\n"
                    "</parameter>\n<parameter=unit>\nfahren heit\n</parameter>\n"
                    "<parameter=now>\ntrue\n</parameter>\n<parameter=note>\nnull\n"
                    "</parameter>\n</function>\n</tool_call>"],
    "llama3_json": ['{"name": "get_weather", "parameters": {"city": "; {", '
                    '"unit": "celsius", "now": false}}'],
    "mistral": ['[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "P", '
                '"unit": "celsius", "days": 3, "now": true}}]'],
    "mistral_new": ['[TOOL_CALLS]get_weather[ARGS]{"city": "P", "unit": "celsius", '
                    '"now": true}'],
    "pythonic": ['[get_weather(city="Pa, ris)", unit="celsius", now=True, note=None)]'],
}
MANY = {"hermes": "\n", "qwen3_coder": "\n", "llama3_json": "; ", "mistral_new": ""}
FAMILY = {"hermes": "qwen3", "llama3_json": "llama3.1"}


def forcing(name, spelled_out=False):
    "A tokenizer whose template spells calls so, its style, and its grammars."
    tokenizer = family(FAMILY.get(name, name)) if not spelled_out else byte_tokenizer()
    if spelled_out and name == "mistral_new":
        tokenizer.chat_template = CALLERS[name]
    style = call_style(name.removesuffix("_new"), tokenizer)
    return tokenizer, style, Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


def allows(tokenizer, grammar, answer):
    "Whether a grammar allows an answer and its end there."
    matcher, ids = grammar.start(), tokenizer.encode(answer, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("spelled_out", [False, True])
@pytest.mark.parametrize("name", GOOD)
def test_grammars_of_calls(name, spelled_out):
    tokenizer, style, grammars = forcing(name, spelled_out)

    def grammar(choice=None, parallel=True, answer=None, tools=AGENT):
        asked = call_constraint(tokenizer, style, tools, choice, parallel, answer)
        return grammars.compile(asked)

    [good] = GOOD[name]
    two = good + MANY[name] + good if name in MANY else good[:-1] + ", " + good.strip(
        "[]").removeprefix("TOOL_CALLS] [") + "]"
    bad = good.replace("celsius", "kelvin").replace("fahren heit", "kelvin")
    other = good.replace("get_weather", "get_time")
    made = {"auto": grammar(), "required": grammar("required"),
            "one": grammar({"name": "get_weather"}), "single": grammar("required", False),
            "either": grammar(answer=ANSWER)}
    json_is_text = "" if style.bare == "{" else "auto"
    for answer, expected in (
            (good, "auto required one single either"), (two, "auto required either"),
            (good[:-1], ""), (good + "x", ""), (bad, ""), (other, ""),
            ("Hello <b>, [1] {2}", "auto"), ("", "auto"),
            ('{"x": 1}', "either " + json_is_text), ('{"x": 1, "y": 2}', json_is_text),
            ("Hi.\n" + good, "auto"), ("Hi.\n" + bad, "auto" if style.bare else "")):
        found = {key for key, value in made.items() if allows(tokenizer, value, answer)}
        assert found == set(expected.split()), answer


def walk(tokenizer, grammar, rng, limit=600):
    "A random answer that a grammar allows, or None if it does not end."
    matcher, ids, end = grammar.start(), [], tokenizer.eos_token_id
    closing_tag = tokenizer.encode("\n</parameter>\n", add_special_tokens=False)
    while not matcher.is_stopped() and len(ids) < limit:
        bits = matcher.compute_bitmask()
        assert not matcher.is_error(), matcher.get_error()
        allowed = [i for i in range(len(tokenizer)) if bits[i // 8] >> i % 8 & 1 and i != end]
        if bits[end // 8] >> end % 8 & 1 and (not allowed or rng.random() < 0.25):
            break
        if rng.random() < 0.1 and matcher.validate_tokens(closing_tag) == len(closing_tag):
            matcher.consume_tokens(closing_tag)
            ids += closing_tag
            continue
        printed = [i for i in allowed if 32 <= i < 127 or i > 255] or allowed
        closing = [i for i in printed if i > 255 or chr(i) in '"}])<']
        ids.append(rng.choice(closing if closing and rng.random() < 0.3 else printed))
        assert matcher.consume_token(ids[-1])
    return full(tokenizer, ids, skip=False) if len(ids) < limit else None


@pytest.mark.parametrize("choice, parallel, answer", [
    ("required", True, None), ("required", False, None), ({"name": "get_weather"}, True, None),
    (None, True, None), ("auto", False, ANSWER)], ids=str)
@pytest.mark.parametrize("name", GOOD)
def test_what_a_grammar_allows_is_read_as_it_was_asked(name, choice, parallel, answer):
    rng = random.Random(name)
    for spelled_out in (False, True):
        tokenizer, style, grammars = forcing(name, spelled_out)
        asked = call_constraint(tokenizer, style, AGENT, choice, parallel, answer)
        grammar, done = grammars.compile(asked), 0
        for _ in range(8):
            written = walk(tokenizer, grammar, rng)
            if written is None:
                continue
            done += 1
            found, num_calls = read(style, [written], tools=AGENT)
            calls = [part for part in found if part[0] == "call"]
            assert num_calls == len(calls), written
            assert choice in (None, "auto") or (calls and found == calls), written
            assert parallel and not isinstance(choice, dict) or len(calls) <= 1, written
            for _, function, arguments in calls:
                if function == "get_weather":
                    RULES.validate(json.loads(arguments))
                assert function != "ping" or json.loads(arguments) == {}
            if answer is not None and not calls:
                assert isinstance(json.loads(written)["x"], int)
        assert done


def test_nothing_is_held_where_nothing_was_asked():
    tokenizer, style, _ = forcing("hermes")
    loose = AGENT[1:]
    for choice in (None, "auto", "none"):
        assert call_constraint(tokenizer, style, loose, choice) is None
        assert call_constraint(tokenizer, None, loose, choice) is None
    assert call_constraint(tokenizer, style, [], None, False, ANSWER) is ANSWER
    assert call_constraint(tokenizer, style, AGENT, "none", True, ANSWER) is ANSWER
    for asked in (("required",), ({"name": "ping"},), (None, False), (None, True, ANSWER)):
        assert call_constraint(tokenizer, style, loose, *asked).kind == "grammar"
        with pytest.raises(ValueError, match="^tool_choice: .*--tool-call-parser"):
            call_constraint(tokenizer, None, loose, *asked)
    with pytest.raises(ValueError, match="^tool_choice: there is no tool of the name 'x'"):
        call_constraint(tokenizer, style, loose, {"name": "x"})


def test_formats_beside_calls():
    tokenizer, style, grammars = forcing("hermes")

    def allowed(answer, **asked):
        asked = StructuredOutputsParams(**asked)
        made = call_constraint(tokenizer, style, AGENT, None, True, asked)
        good = GOOD["hermes"][0]
        assert allows(tokenizer, grammars.compile(made), good) or asked.disable_any_whitespace
        return allows(tokenizer, grammars.compile(made), answer)

    assert allowed("b/c", choice=("a", "b/c")) and not allowed("b", choice=("a", "b/c"))
    assert allowed("a/1", regex="a/[0-9]") and not allowed("a/b", regex="a/[0-9]")
    assert allowed('{"q": [1]}', json_object=True) and not allowed("[1]", json_object=True)
    compact = {"json": {"type": "object"}, "disable_any_whitespace": True}
    assert allowed('{"q":1}', **compact) and not allowed('{ "q":1}', **compact)
    for kind in ("grammar", "structural_tag"):
        asked = StructuredOutputsParams(**{kind: 'start: "a"' if kind == "grammar" else {
            "type": "structural_tag", "format": {"type": "any_text"}}})
        with pytest.raises(ValueError, match=f"^{kind}: cannot be held beside tools"):
            call_constraint(tokenizer, style, AGENT, None, True, asked)


def strictly(parameters):
    "Two tools, of which the second has these parameters."
    function = {"name": "f", "strict": True, "parameters": parameters}
    return [AGENT[1], {"type": "function", "function": function}]


@pytest.mark.parametrize("name, parameters, complaint", [
    *((name, parameters, complaint) for name in GOOD for parameters, complaint in (
        ({"type": "array"}, "type is 'array', and arguments are an object"),
        ({"type": ["string", "null"]}, "type is"),)),
    *((name, parameters, complaint) for name in ("qwen3_coder", "pythonic")
      for parameters, complaint in (
        ({"minProperties": 1}, "minProperties cannot be held"),
        ({"anyOf": [{"properties": {}}]}, "anyOf cannot be held"),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {}}}, "in calls of .*ref has"),
        ({"properties": {"a b": {}}}, "the argument 'a b' cannot be written"),
        ({"properties": {"a": False}}, "the argument 'a' cannot be written"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "the argument 'a' cannot"),
        ({"properties": []}, ""), ({"required": [[]]}, ""), ({"required": 3}, ""))),
    *(("qwen3_coder", {"properties": {"a": part}}, complaint) for part, complaint in (
        ({"type": "string", "pattern": "^a"}, "pattern cannot be held"),
        ({"type": "string", "format": "date"}, "format cannot be held"),
        ({}, "type cannot be held"), ({"type": ["string", "integer"]}, "type cannot be held"),
        ({"enum": ["1", 1]}, "enum cannot be held"), ({"enum": ["a</parameter>"]}, "enum"),
        ({"const": "null", "type": ["string", "null"]}, "const cannot be held"))),
])
def test_what_cannot_be_held_is_named(name, parameters, complaint):
    tokenizer, style, _ = forcing(name)
    for choice in (None, "required"):
        with pytest.raises(ValueError, match=rf"^tools\[1\]\.function.parameters: {complaint}"):
            call_constraint(tokenizer, style, strictly(parameters), choice)
    loose = [{**tool, "function": {**tool["function"], "strict": False}}
             for tool in strictly(parameters)]
    free = call_constraint(tokenizer, style, loose, "required")
    assert free == call_constraint(tokenizer, style, loose, "required", hold_loose=True)
    call_constraint(tokenizer, style, strictly(parameters), {"name": "ping"})


@pytest.mark.parametrize("name", GOOD)
def test_loose_tools_can_be_held_too(name):
    tokenizer, style, grammars = forcing(name)
    loose = [{**AGENT[0], "function": {**AGENT[0]["function"], "strict": False}}]
    good = GOOD[name][0]
    bad = good.replace("celsius", "kelvin").replace("fahren heit", "kelvin")
    free, held = (grammars.compile(call_constraint(
        tokenizer, style, loose, "required", hold_loose=hold)) for hold in (False, True))
    assert allows(tokenizer, held, good) and not allows(tokenizer, held, bad)
    assert allows(tokenizer, free, bad)
    assert call_constraint(tokenizer, style, loose, None, hold_loose=True) is None


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("parameters", [
    {}, {"type": "object"}, {"type": "object", "properties": {}}, {"title": "x", "properties": {
        "a": {"type": "string", "minLength": 1, "maxLength": 3}, "b": {"type": "null"},
        "c": {"enum": ["x\ny", 'q"', 3, None]}, "d": {"const": True}}},
    {"type": ["object", "null"], "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"properties": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/d"}}}},
     "required": ["a"], "$defs": {"d": {"type": "array", "items": {"type": "string"}}}},
    {"properties": {"a": {"type": ["boolean", "null"]}, "b": {"type": "number"}}}], ids=str)
def test_schemas_of_many_kinds(name, parameters):
    tokenizer, style, grammars = forcing(name)
    tools = strictly(parameters)
    grammar = grammars.compile(call_constraint(tokenizer, style, tools, {"name": "f"}))
    rng, done = random.Random(str(parameters)), 0
    for _ in range(5):
        written = walk(tokenizer, grammar, rng)
        if written is not None:
            [(_, function, arguments)], num_calls = read(style, written, tools=tools)
            Draft202012Validator(parameters).validate(json.loads(arguments))
            assert num_calls == 1 and function == "f"
            done += 1
    assert done


def test_strict_schemas_by_their_places():
    assert strict_schemas(AGENT[1:]) == [] and strict_schemas(AGENT, {"name": "ping"}) == []
    [(i, asked)] = strict_schemas([AGENT[1], AGENT[0]], {"name": "get_weather"})
    assert (i, asked.json) == (1, WEATHER)
    assert [i for i, _ in strict_schemas([AGENT[0], AGENT[1], AGENT[0]])] == [0, 2]


def test_schemas_that_are_too_deep_are_named():
    deep = {}
    for _ in range(80):
        deep = {"properties": {"a": deep}}
    with pytest.raises(ValueError, match=r"^tools\[1\].function.parameters: nested 1\d\d deep"):
        strict_schemas(strictly(deep))


def test_thinking_goes_around_calls():
    tokenizer, style, grammars = forcing("hermes")
    asked = call_constraint(tokenizer, style, AGENT, "required")
    may, opened = grammars.compile(asked, "may"), grammars.compile(asked, "opened")
    good = GOOD["hermes"][0]
    assert allows(tokenizer, may, good) and not allows(tokenizer, opened, good)
    assert allows(tokenizer, may, "<think>\n<b> so</think>\n\n" + good)
    assert allows(tokenizer, opened, "so</think>\n\n" + good)
    assert not allows(tokenizer, may, "<think>so</think>\n\nHi")
