"""What requests say about answers and functions, without a server."""

import pytest

from nanollm.constraints import MAX_BYTES, StructuredOutputsParams
from nanollm.serve.formats import (
    read_answer,
    read_choice,
    read_constraint,
    read_format,
    read_tools,
    shown,
    told,
)
from nanollm.serve.protocol import ApiError, ChatRequest, CompletionRequest, TokenizeRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def refusal(read, *args):
    with pytest.raises(ValueError) as caught:
        read(*args)
    text = str(caught.value)
    assert len(text) < 400 and "\n" not in text
    return text


# -- formats


WHERE = "response_format.json_schema.schema"


@pytest.mark.parametrize("param, form", [
    ("response_format", {"type": "json_schema", "json_schema": {"schema": SCHEMA}}),
    ("response_format", {"type": "json_schema", "json_schema": {
        "name": "x", "schema": SCHEMA, "strict": True, "description": None}}),
    ("text.format", {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": None})])
def test_a_schema_is_found_where_each_endpoint_has_it(param, form):
    assert read_format(form, param) == StructuredOutputsParams(json=SCHEMA)


def test_other_formats():
    tag = {"type": "structural_tag", "format": {"type": "any_text"}}
    assert read_format({"type": "json_object"}, "response_format").json_object
    assert read_format(tag | {"structures": None}, "response_format").structural_tag == tag
    for nothing in (None, {"type": "text"}, {"type": "text", "a": None}):
        assert read_format(nothing, "text.format") is None


@pytest.mark.parametrize("form, field", [
    ({"type": "json"}, "response_format.type"),
    ({}, "response_format.type"),
    ({"type": None}, "response_format.type"),
    (5, "response_format.type"),
    (["json_object"], "response_format.type"),
    ({"json_schema": {"schema": SCHEMA}}, "response_format.type"),
    ({"type": "json_schema"}, WHERE),
    ({"type": "json_schema", "schema": SCHEMA}, WHERE),
    ({"type": "json_schema", "json_schema": 5}, WHERE),
    ({"type": "json_schema", "json_schema": {"schema": "x"}}, WHERE),
    ({"type": "json_schema", "json_schema": {"schema": {"const": "x" * MAX_BYTES}}},
     WHERE)])
def test_a_format_that_is_none_is_refused_by_its_field(form, field):
    text = refusal(read_answer, form, "response_format", None)
    assert text.startswith((f"{field} ", f"{field}: ")), text


@pytest.mark.parametrize("own, field", [
    ({"regex": 5}, "structured_outputs.regex"),
    ({}, "structured_outputs"),
    ({"regex": None}, "structured_outputs"),
    ({"json_object": False}, "structured_outputs"),
    ({"regex": "a", "choice": ["b"]}, "structured_outputs"),
    ({"whitespace_pattern": " "}, "structured_outputs"),
    ({"choice": []}, "structured_outputs.choice"),
    ({"choice": ["a", 5]}, "structured_outputs.choice[1]"),
    ({"choice": ["a"] * 2000}, "structured_outputs.choice"),
    ({"json": "{"}, "structured_outputs.json"),
    ({"json": {"a": [[[[[[[[[[]]]]]]]]]]} | {"b": "x" * 2**20}}, "structured_outputs.json"),
    ({"guided_json": SCHEMA}, "structured_outputs"),
    ({"backend": "x"}, "structured_outputs"),
    (["regex"], "structured_outputs")])
def test_a_constraint_that_is_none_is_refused_by_its_field(own, field):
    text = refusal(read_answer, None, "response_format", own)
    assert text.startswith((f"{field} ", f"{field}: ")), text


def test_nesting_is_bounded_before_anything_follows_it():
    schema = {}
    for _ in range(100):
        schema = {"items": schema}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    text = refusal(read_answer, form, "response_format", None)
    assert "64" in text and text.startswith(f"{WHERE}: ")


def test_one_of_both_fields():
    form = {"type": "json_object"}
    assert list(read_answer(form, "text.format", None)) == ["text.format"]
    assert list(read_answer({"type": "text"}, "text.format", {"regex": "a"})) == [
        "structured_outputs"]
    assert "exclude" in refusal(read_answer, form, "text.format", {"regex": "a"})
    assert read_constraint({"choice": ["a", "b"]}).choice == ("a", "b")


@pytest.mark.parametrize("message, param, expected", [
    ("json: no", "response_format", "response_format.json_schema.schema: no"),
    ("json: no", "text.format", "text.format.schema: no"),
    ("json: no", "tools[3].function.parameters", "tools[3].function.parameters: no"),
    ("json_object: no", "response_format", "response_format: no"),
    ("grammar: no", "tools", "tools: no"),
    ("regex: no", "structured_outputs", "structured_outputs.regex: no"),
    ("choice[2]: no", "structured_outputs", "structured_outputs.choice[2]: no"),
    ("cannot: be", "text.format", "text.format: cannot: be"),
    ("text.format.type is 5", "text.format", "text.format.type is 5")])
def test_messages_name_what_the_client_has_sent(message, param, expected):
    assert told(message, param) == expected


# -- tools


def tool(name, **more):
    return {"type": "function", "function": {"name": name, **more}}


def test_tools_in_both_forms():
    flat = {"type": "function", "name": "f", "strict": None, "parameters": {"default": None}}
    expected = [tool("f", parameters={"default": None})]
    assert read_tools([flat]) == expected
    assert read_tools([{"type": "function", "function": flat, "strict": None}]) == expected


@pytest.mark.parametrize("tools, field", [
    ([5], "tools[0]"),
    ([{"type": "custom"}], "tools[0]"),
    ([tool("f"), {"type": "function"}], "tools[1].name"),
    ([tool("")], "tools[0].function.name"),
    ([tool("a b")], "tools[0].function.name"),
    ([tool("ü")], "tools[0].function.name"),
    ([tool("x" * 65)], "tools[0].function.name"),
    ([{"type": "function", "function": [1]}], "tools[0].function.name"),
    ([tool("f"), tool("f")], "tools[1].function.name"),
    ([tool("f", parameters=[])], "tools[0].function.parameters"),
    ([tool("f", strict="yes")], "tools[0].function.strict"),
    ([{"type": "function", "name": "f", "description": 5}], "tools[0].description")])
def test_wrong_tools_are_refused_by_their_field(tools, field):
    assert refusal(read_tools, tools).startswith(f"{field} ")


TOOLS = read_tools([tool("f"), tool("g"), tool("h")])


@pytest.mark.parametrize("choice, names, expected", [
    (None, "fgh", None), ("auto", "fgh", "auto"), ("none", "", "none"),
    ("required", "fgh", "required"),
    ({"type": "function", "function": {"name": "g"}}, "fgh", {"name": "g"}),
    ({"type": "function", "name": "g"}, "fgh", {"name": "g"}),
    ({"type": "allowed_tools", "allowed_tools": {
        "mode": "required", "tools": [tool("h"), tool("f")]}}, "fh", "required"),
    ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
     "g", "auto")])
def test_choices(choice, names, expected):
    shown_tools, forced = read_choice(choice, TOOLS)
    assert "".join(one["function"]["name"] for one in shown_tools) == names
    assert forced == expected


@pytest.mark.parametrize("choice", [
    "any", 5, [], {}, {"type": "x"}, {"type": ["function"]}, {"type": "function"},
    {"type": "function", "function": {"name": "x"}}, {"type": "function", "name": ["f"]},
    {"type": "allowed_tools"}, {"type": "allowed_tools", "mode": "auto", "tools": []},
    {"type": "allowed_tools", "mode": "auto", "tools": [5]},
    {"type": "allowed_tools", "mode": "auto", "tools": [{}] * 4},
    {"type": "allowed_tools", "allowed_tools": 5},
    {"type": "allowed_tools", "mode": "always", "tools": [{"name": "f"}]}])
def test_wrong_choices_are_refused(choice):
    assert refusal(read_choice, choice, TOOLS).startswith("tool_choice")


def test_a_choice_needs_its_tools():
    assert read_choice("auto", []) == ([], "auto") and read_choice("none", []) == ([], "none")
    for choice in ("required", {"type": "function", "name": "f"}):
        assert refusal(read_choice, choice, []).startswith("tool_choice")


# -- in forms


def error_of(form, **fields):
    base = {"prompt": "x"} if form is CompletionRequest else CHAT
    with pytest.raises(ApiError) as caught:
        made = form.model_validate(base | fields)
        made.check()
        getattr(made, "constraints", dict)()  # the server reads them off the loop
    assert caught.value.status == 400
    return caught.value.body["error"]


@pytest.mark.parametrize("form", [ChatRequest, CompletionRequest])
def test_forms_hand_constraints_on(form):
    base = {"prompt": "x"} if form is CompletionRequest else CHAT
    for fields in ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": SCHEMA}}}, {"structured_outputs": {"json": SCHEMA}}):
        made = form.model_validate(base | fields)
        made.check()
        asked = made.sampling_params().structured_outputs
        assert asked == StructuredOutputsParams(json=SCHEMA)
        assert list(made.constraints()) == list(fields) and not made.unknown()
    assert error_of(form, response_format={"type": "x"})["param"] == "response_format.type"
    wrong = error_of(form, structured_outputs={"regex": 5})
    assert wrong["param"] == "structured_outputs.regex"
    both = dict(response_format={"type": "json_object"}, structured_outputs={"regex": "a"})
    assert error_of(form, **both)["param"] == "structured_outputs"


@pytest.mark.parametrize("name, new", [
    ("guided_json", "structured_outputs.json"), ("guided_choice", "structured_outputs.choice"),
    ("grammar", "structured_outputs.grammar"), ("functions", "tools"),
    ("function_call", "tool_choice"), ("json_schema", "response_format")])
def test_old_names_are_told_the_new_ones(name, new):
    for form in (ChatRequest, CompletionRequest):
        found = error_of(form, **{name: {"type": "object"}})
        assert (found["param"], found["code"]) == (name, "unsupported_parameter")
        assert new in found["message"]


def test_tokenize_shows_tools_and_knows_no_formats():
    form = TokenizeRequest(**CHAT, tools=[tool("f"), tool("g")], tool_choice="required")
    form.check()
    assert form.template_tools() == [tool("f"), tool("g")]
    found = error_of(TokenizeRequest, response_format={"type": "json_object"})
    assert found["param"] == "response_format"


def test_shown_is_short():
    assert len(shown({"a": ["x" * 10**6]})) <= 60
