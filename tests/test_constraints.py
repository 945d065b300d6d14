"""What an answer may look like: forms that are checked, and grammars written from them."""

import json

import pytest

from nanollm.constraints import (
    MAX_BYTES,
    MAX_CHOICES,
    MAX_LITERAL,
    StructuredOutputsParams,
    TagWriter,
    clean,
    guided_lark,
    marker,
    read_tag,
    refuse_cycles,
    resolve,
    write_grammar,
)
from nanollm.text import byte_tokenizer

TOKENIZER = byte_tokenizer()
LOOP = []
LOOP.append(LOOP)
LONG = "la " * 3000
WORD = {"begin": "<w>", "schema": {"type": "integer"}, "end": "</w>"}


def old_tag(**changes):
    return {"type": "structural_tag", "structures": [WORD], "triggers": ["<w"]} | changes


@pytest.mark.parametrize("fields, message", [
    ({}, "exactly one of json, regex, choice, grammar, json_object, structural_tag"),
    ({"json_object": False}, "got none"),
    ({"json": {}, "regex": "a"}, "got json and regex"),
    ({"json": {}, "json_object": True}, "got json and json_object"),
    ({"guided_json": {}}, "guided_json: Extra inputs are not permitted"),
    ({"json": 5}, "json: Input should be a valid"),
    ({"json": "{"}, "json: Expecting property name"),
    ({"json": ""}, "json: Expecting value"),
    ({"json": '{"a": NaN}'}, "json: this is no JSON"),
    ({"json": {"maximum": float("inf")}}, "json: Out of range float"),
    ({"json": {"enum": [{1}]}}, "json: this is no JSON"),
    ({"json": {"enum": LOOP}}, "json: Circular reference"),
    ({"json": "[" * 100_000}, "json: nested 100000 deep, and 64 is the limit"),
    ({"json": "{}" + " " * MAX_BYTES}, f"json: {MAX_BYTES + 2} bytes"),
    ({"json": '"\ud800"'}, "json: 'utf-8' codec can't encode"),
    ({"regex": ""}, "regex: String should have at least 1 character"),
    ({"regex": "a" * (MAX_BYTES + 1)}, "regex: String should have at most"),
    ({"regex": "é" * (MAX_BYTES // 2)}, "regex: "),
    ({"regex": b"a"}, "regex: Input should be a valid string"),
    ({"choice": []}, "choice: Tuple should have at least 1 item"),
    ({"choice": "abc"}, "choice: Input should be a valid tuple"),
    ({"choice": ["a", 1]}, "choice[1]: Input should be a valid string"),
    ({"choice": ["a"] * (MAX_CHOICES + 1)}, "choice: Tuple should have at most"),
    ({"choice": ["\ud800"]}, "choice[0]: "),
    ({"structural_tag": "{"}, "structural_tag: Expecting property name"),
    ({"json_object": 1}, "json_object: Input should be a valid boolean"),
    ({"json": {}, "whitespace_pattern": ""}, "whitespace_pattern: String should have"),
    ({"json": {}, "disable_any_whitespace": "yes"}, "disable_any_whitespace: Input should be"),
])
def test_wrong_forms_are_one_line_that_names_the_field(fields, message):
    with pytest.raises(ValueError) as caught:
        StructuredOutputsParams(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("fields, kind", [
    ({"json": {}}, "json"), ({"json": "{}"}, "json"), ({"json": True}, "json"),
    ({"regex": "a"}, "regex"), ({"choice": ("", "a")}, "choice"),
    ({"grammar": "start: "}, "grammar"), ({"json_object": True}, "json_object"),
    ({"json": {}, "json_object": False}, "json"), ({"structural_tag": {}}, "structural_tag"),
])
def test_one_of_six_is_asked(fields, kind):
    assert StructuredOutputsParams(**fields).kind == kind
    with pytest.raises(ValueError):
        StructuredOutputsParams(**fields).regex = "b"


def test_cleaning_knows_keywords_from_names_and_values():
    keyword = {"uniqueItems": False, "x-guidance": {"lenient": True}}
    assert clean({"items": keyword, "anyOf": [keyword]}) == {"items": {}, "anyOf": [{}]}
    for kept in ({"$defs": {"uniqueItems": False, "x-guidance": {"a": 1}}},
                 {"const": keyword}, {"enum": [keyword]},
                 {"uniqueItems": True}, {"uniqueItems": 0},
                 {"$defs": {"properties": {"const": keyword}}}):
        assert clean(kept) == kept
    assert clean({"default": keyword, "title": "a", "description": "b"}) == {}
    named = {"properties": {"title": {"title": "a", "type": "null"}}, "const": {"title": "b"}}
    assert clean(named)["properties"] == {"title": {"type": "null"}}
    assert clean(named)["const"] == {"title": "b"}
    assert clean({"$defs": {"const": keyword}}) == {"$defs": {"const": {}}}
    own = {"items": {"exclusiveMinimum": 0, "x-guidance": {}}}
    assert clean(own) != own and own == {"items": {"exclusiveMinimum": 0, "x-guidance": {}}}


NAMED = {"type": "object", "properties": {"a": {"type": "null"}}}
CLOSED = NAMED | {"additionalProperties": False}


@pytest.mark.parametrize("schema, want", [
    (NAMED, CLOSED), (NAMED | {"required": ["a"]}, CLOSED | {"required": ["a"]}),
    ({"type": "array", "items": NAMED}, {"type": "array", "items": CLOSED}),
    ({"anyOf": [NAMED, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
    ({"properties": {"b": {"$ref": "#/$defs/x"}}, "$defs": {"x": NAMED}},
     {"properties": {"b": {"$ref": "#/$defs/x"}}, "$defs": {"x": CLOSED},
      "additionalProperties": False}),
    *((one, one) for one in (
        NAMED | {"additionalProperties": True}, NAMED | {"additionalProperties": {}},
        NAMED | {"patternProperties": {"b": {}}}, NAMED | {"minProperties": 2},
        NAMED | {"required": ["b"]}, {"type": "object"}, {"type": "object", "properties": {}},
        {"allOf": [NAMED, {"properties": {"b": {}}}]}, {"oneOf": [NAMED, {"type": "null"}]},
        NAMED | {"anyOf": [{"properties": {"b": {}}}]}, NAMED | {"$ref": "#/$defs/x"},
        {"anyOf": [NAMED], "required": ["b"]}, NAMED | {"required": "a"},
        {"const": NAMED}, {"properties": 5})),
])
def test_objects_with_named_properties_are_closed(schema, want):
    assert clean(schema) == want


def schemas_in(fields):
    "The schemas in the grammars of a form."
    text = json.loads(write_grammar(StructuredOutputsParams(**fields), TOKENIZER, "may"))
    own = [g["json_schema"] for g in text["grammars"] if "json_schema" in g]
    larks = [g["lark_grammar"] for g in text["grammars"] if "lark_grammar" in g]
    found = [json.JSONDecoder().raw_decode(rest)[0]
             for lark in larks for rest in lark.split("%json ")[1:]]
    return own + found


@pytest.mark.parametrize("fields", [
    {"json": {"x-guidance": {"lenient": True}}}, {"json": '{"x\\u002dguidance": {}}'},
    {"json": True}, {"json_object": True},
    {"grammar": 'start: %json {"x-guidance": {"lenient": true, "coerce_one_of": true}}'},
    {"grammar": 'start: %json {"x\\u002dguidance": {"lenient": true}}'},
    {"grammar": "start: a // it's\na: %json {}"},
    {"structural_tag": old_tag(structures=[WORD | {"schema": {"x-guidance": {}}}])},
])
def test_options_of_the_compiler_are_ours(fields):
    schemas = schemas_in(fields)
    assert len(schemas) == 1
    assert schemas[0]["x-guidance"] == {
        "lenient": False, "coerce_one_of": False, "whitespace_pattern": r"[ \n]{1,8}"}


def test_white_space_is_the_clients_choice():
    [schema] = schemas_in({"json": {}, "whitespace_pattern": " ?"})
    assert schema["x-guidance"]["whitespace_pattern"] == " ?"
    [schema] = schemas_in({"json": {}, "disable_any_whitespace": True})
    assert schema["x-guidance"]["whitespace_flexible"] is False


@pytest.mark.parametrize("lark", [
    'start: "%json {"', 'start: /%json \\{/', "start: a // %json {\na: /b/",
    'start: "\\"%json {" # %json [\n', 'start: /\\/%json {/', "start: a\na: /b/ // c"])
def test_what_only_looks_like_a_schema_stays(lark):
    assert guided_lark(lark, StructuredOutputsParams(json_object=True)) == lark


def test_names_of_tokens_in_lark_are_written_by_their_ids():
    lark = 'start: <think> "<think>" /<think>/ <[5]> <other> // <think>'
    found = guided_lark(lark, StructuredOutputsParams(json_object=True), {"<think>": 9})
    assert found == 'start: <[9]> "<think>" /<think>/ <[5]> <other> // <think>'


@pytest.mark.parametrize("ids, want", [
    ("<[5]>", "<[5]>"), ("<[5-7,9]>", "<[5-7,9]>"), ("<[^5]>", "<[^5,2,8]>"),
    ("<[*]>", "<[^2,8]>"), ("<[^5-7,9]>", "<[^5-7,9,2,8]>"), ("<[x]>", "<[x]>"),
    ("<[2]>", None), ("<[1-3]>", None), ("<[5,6-8]>", None), ("<[ 5, 8 ]>", None)])
def test_a_grammar_cannot_name_end_tokens_by_their_ids(ids, want):
    asked = StructuredOutputsParams(json_object=True)
    if want is None:
        with pytest.raises(ValueError, match="names a token that ends the answer"):
            guided_lark(f"start: {ids}", asked, end_ids=(2, 8))
    else:
        assert guided_lark(f'start: {ids} "<[2]>"', asked, end_ids=(2, 8)) == (
            f'start: {want} "<[2]>"')


@pytest.mark.parametrize("fields", [
    {"json": {"const": LONG}}, {"json": {"enum": ["a", [LONG]]}}, {"regex": LONG},
    {"json": {"properties": {LONG: {"type": "null"}}}}, {"json": {"pattern": LONG}},
    {"choice": ["a", LONG]}, {"grammar": f'start: "{LONG}"'}, {"grammar": f"start: /{LONG}/"},
    {"grammar": 'start: %json {"const": "' + LONG + '"}'},
    {"structural_tag": old_tag(structures=[WORD | {"end": LONG}])}])
def test_what_takes_long_to_follow_is_refused(fields):
    "A mask within a text of 200 kB took 65 ms, in every step of everybody."
    with pytest.raises(ValueError, match=f"characters, and {MAX_LITERAL} are the limit"):
        write_grammar(StructuredOutputsParams(**fields), TOKENIZER)


def test_long_notes_are_no_literals():
    asked = StructuredOutputsParams(json={"description": LONG, "type": "null"})
    assert LONG not in write_grammar(asked, TOKENIZER)
    write_grammar(StructuredOutputsParams(choice=["a" * (MAX_LITERAL - 9)] * 9), TOKENIZER)


def test_anchors_are_followed():
    assert resolve({"a": 1}, "#a") is None and resolve({"a": 1}, "#/a") == 1
    here = {"$anchor": "a", "type": "object"}
    tree = here | {"properties": {"b": {"$ref": "#a"}}}
    for fine in ({"$defs": {"x": here}, "$ref": "#a"}, tree, {"$ref": "#nowhere"}):
        refuse_cycles(fine)
    with pytest.raises(ValueError, match="leads back to itself"):
        refuse_cycles({"$defs": {"x": {"$anchor": "a", "$ref": "#/$defs/y"},
                                 "y": {"$ref": "#a"}}})


@pytest.mark.parametrize("schema, want", [
    ({"exclusiveMinimum": 0}, {"minimum": 1e-9}),
    ({"exclusiveMaximum": 0}, {"maximum": -1e-9}),
    ({"exclusiveMinimum": 1, "minimum": 5}, {"minimum": 5}),
    ({"exclusiveMaximum": 1, "maximum": 5}, {"maximum": 1 - 1e-9}),
    ({"exclusiveMinimum": 2**40}, {"minimum": 2**40 + 0.5}),
    ({"exclusiveMinimum": 0.5}, {"exclusiveMinimum": 0.5}),
    ({"exclusiveMinimum": True, "minimum": 3}, {"exclusiveMinimum": True, "minimum": 3}),
    ({"exclusiveMinimum": 0, "minimum": "x"}, {"exclusiveMinimum": 0, "minimum": "x"}),
    ({"maximum": 2**53 - 1}, {"maximum": 2**53 - 1}),
    ({"$defs": {"minimum": {"exclusiveMinimum": 0}}},
     {"$defs": {"minimum": {"minimum": 1e-9}}}),
])
def test_bounds_are_written_so_that_they_hold(schema, want):
    assert clean(schema) == want


@pytest.mark.parametrize("lark", ["start: %json {", "start: %json", "start: %json 5"])
def test_a_broken_schema_in_lark_is_an_error(lark):
    with pytest.raises(ValueError):
        guided_lark(lark, StructuredOutputsParams(json_object=True))


@pytest.mark.parametrize("schema", [False, 5, [], "text"])
def test_a_schema_is_an_object(schema):
    asked = StructuredOutputsParams(json=json.dumps(schema))
    with pytest.raises(ValueError, match="a schema is a JSON object"):
        write_grammar(asked, TOKENIZER)


def test_markers_are_tokens_where_the_vocabulary_has_them():
    assert marker(TOKENIZER, "<|im_start|>") == "<[257]>"
    assert marker(TOKENIZER, 'a"<|im_end|>\n') == r'"a\"" <[258]> "\n"'
    assert marker(TOKENIZER, "") == '""'
    assert marker(TOKENIZER, "é\x01") == r'"é\u0001"'


FORM = {"type": "const_string", "value": "a"}
TAG = {"type": "tag", "begin": "<w>", "content": FORM, "end": "</w>"}
TEXT = {"type": "any_text"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<w"], "tags": [TAG]}


@pytest.mark.parametrize("tag, message", [
    ({}, 'it needs "type": "structural_tag"'), ([], "it needs"), ("5", "it needs"),
    ({"type": "structural_tag"}, "it needs a format, or structures and triggers"),
    ({"type": "structural_tag", "format": FORM, "more": 1}, "it needs a format"),
    (old_tag(more=1), "it needs a format"), (old_tag(structures=5), "it needs a format"),
    (old_tag(triggers=5), "this form cannot stand here"),
    (old_tag(structures=[]), "this form cannot stand here"),
    (old_tag(structures=[WORD, 5]), "a structure has begin, schema and end"),
    (old_tag(structures=[WORD | {"more": 1}]), "a structure has begin, schema and end"),
    (old_tag(triggers=["<x"]), "no trigger begins the tag"),
    (old_tag(triggers=[]), "no trigger begins the tag"),
    (old_tag(triggers=[""]), "no trigger begins the tag"),
    (old_tag(triggers=[5]), "no trigger begins the tag"),
    (old_tag(structures=[{"begin": "<w>"}]), "a structure has begin, schema and end"),
    (old_tag(structures=[WORD | {"end": 5}]), "a tag has begin, content and end"),
    (old_tag(structures=[WORD | {"schema": None}]), "a schema is a JSON object"),
])
def test_wrong_structural_tags_are_refused(tag, message):
    asked = StructuredOutputsParams(structural_tag=json.dumps(tag))
    with pytest.raises(ValueError, match=message):
        write_grammar(asked, TOKENIZER)


@pytest.mark.parametrize("form, message", [
    (5, "this form is not served: 5"), ({"type": "plural"}, "this form is not served"),
    ({"type": ["tag"]}, "this form is not served"),
    (FORM | {"more": 1}, "this form is not served"),
    ({"type": "qwen_xml_parameter", "json_schema": {}}, "this form is not served"),
    ({"type": "json_schema", "json_schema": {}, "style": "xml"}, "this form is not served"),
    (TEXT | {"excludes": ["a"]}, "this form is not served"),
    ({"type": "const_string"}, "lacks something"), (FORM | {"value": 5}, "lacks something"),
    ({"type": "sequence", "elements": []}, "lacks something"),
    ({"type": "or", "elements": []}, "lacks something"),
    ({"type": "sequence", "elements": [TEXT, FORM]}, "this form cannot stand here"),
    ({"type": "sequence", "elements": [TRIGGERED, FORM]}, "this form cannot stand here"),
    (TAG | {"content": TRIGGERED}, "this form cannot stand here"),
    (TAG | {"content": TEXT, "end": ""}, "free text needs a text that ends it"),
    (TAG | {"end": ["</w>"]}, "a tag has begin, content and end"),
    (TRIGGERED | {"tags": [FORM]}, "no trigger begins the tag"),
    ({"type": "tags_with_separator", "separator": ",", "tags": [FORM]}, "a tag has begin"),
])
def test_forms_that_are_not_served_are_refused(form, message):
    writer = TagWriter(StructuredOutputsParams(json_object=True), TOKENIZER)
    with pytest.raises(ValueError, match=message):
        writer.form(form, is_last=True)


def test_the_old_spelling_is_a_case_of_the_new_one():
    tag = {"type": "tag", "begin": "<w>", "end": "</w>",
           "content": {"type": "json_schema", "json_schema": WORD["schema"]}}
    form = {"type": "triggered_tags", "triggers": ["<w"], "tags": [tag]}
    assert read_tag(old_tag()) == form == read_tag({"type": "structural_tag", "format": form})


def test_long_chains_of_references_are_followed_once(monkeypatch):
    calls, links = [], {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(2000)}
    schema = {"$defs": links | {"d2000": {"type": "integer"}}, "$ref": "#/$defs/d0"}
    monkeypatch.setattr("nanollm.constraints.resolve",
                        lambda *args: calls.append(args) or resolve(*args))
    refuse_cycles(schema)
    assert len(calls) <= 2001
    links["d1999"] = {"$ref": "#/$defs/d7"}
    with pytest.raises(ValueError, match="leads back to itself"):
        refuse_cycles(schema | {"$defs": links})
