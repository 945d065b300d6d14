"""Every answer that ends is valid: 200 schemas, walked at random, checked by `jsonschema`.

No model is needed: random logits go through the mask as a model's would, and whatever the mask
leaves may be drawn. A keyword that is not served has to be refused by its name.
"""

import json
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from nanollm.request import Request  # noqa: E402
from nanollm.sampling import SamplingParams, SamplingRow  # noqa: E402
from nanollm.structured_output import (  # noqa: E402
    GrammarMask,
    Grammars,
    StructuredOutputsParams,
)

END = "<|end|>"


def schemas_of_all_kinds():
    "Schemas by hand, each for one keyword or for two that meet."
    def obj(required=None, **properties):
        names = list(properties) if required is None else required
        return {"type": "object", "properties": properties, "required": names}

    def closed(required=None, **properties):
        return obj(required, **properties) | {"additionalProperties": False}

    text, integer, number = ({"type": kind} for kind in ("string", "integer", "number"))
    boolean, null = {"type": "boolean"}, {"type": "null"}
    node = closed(value=integer, next={"anyOf": [{"$ref": "#/$defs/node"}, null]})
    tree = closed(name={"enum": ["a", "b"]},
                  children={"type": "array", "items": {"$ref": "#"}, "maxItems": 2})
    point = {"type": "array", "prefixItems": [number, number], "items": False, "minItems": 2}
    found = {
        "any": {},
        "types": {"type": ["string", "null", "integer"]},
        "string or array": {"type": ["string", "array"], "maxLength": 3, "items": integer},
        "boolean": boolean, "null": null, "integer": integer, "number": number, "string": text,
        "array": {"type": "array", "maxItems": 3}, "object": {"type": "object"},
        "enum": {"enum": [1, "a", None, True, [1, 2], {"a": 1}, 1.5, -3e2]},
        "enum and type": {"type": "string", "enum": ["a", 1, "b", None]},
        "enum of texts": {"enum": ["", " ", "\"", "\\", "é", "日本", "a\nb", "</s>", "a/b"]},
        "const": {"const": {"a": [1, {"b": None}], "é": "ü"}},
        "const number": {"const": 3.25}, "const false": {"const": False},
        "minLength": {"type": "string", "minLength": 4},
        "maxLength": {"type": "string", "maxLength": 3},
        "length": {"type": "string", "minLength": 2, "maxLength": 2},
        "empty": {"type": "string", "maxLength": 0},
        "pattern": {"type": "string", "pattern": "^[a-z]{2,4}-[0-9]+$"},
        "pattern inside": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 8},
        "pattern at the end": {"type": "string", "pattern": "ab$", "maxLength": 6},
        "pattern of choices": {"type": "string", "pattern": "^(red|green|blue)( dark)?$"},
        "pattern and length": {"type": "string", "pattern": "^[a-f]+$", "minLength": 3,
                               "maxLength": 5},
        "pattern classes": {"type": "string", "pattern": r"^\d+\.\d{2} [A-Z]\w*$"},
        "pattern escapes": {"type": "string", "pattern": r'^["\\/]\[x\]$'},
        "pattern of letters": {"type": "string", "pattern": "^[äöü]+$", "maxLength": 4},
        "bounds": {"type": "integer", "minimum": -5, "maximum": 1234},
        "lower": {"type": "integer", "minimum": 17},
        "upper": {"type": "integer", "maximum": -3},
        "between": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 9},
        "both minima": {"type": "integer", "minimum": 3, "exclusiveMinimum": 7, "maximum": 99},
        "one value": {"type": "integer", "minimum": 42, "maximum": 42},
        "number bounds": {"type": "number", "minimum": -1.5, "maximum": 2.25},
        "number between": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "number lower": {"type": "number", "minimum": 0.125},
        "price": {"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": 0.5},
        "multiple": {"type": "integer", "multipleOf": 7},
        "multiple in bounds": {"type": "integer", "multipleOf": 12, "minimum": 100,
                               "maximum": 500},
        "items": {"type": "array", "items": boolean, "minItems": 2, "maxItems": 4},
        "exactly": {"type": "array", "items": {"enum": ["x"]}, "minItems": 3, "maxItems": 3},
        "no items": {"type": "array", "items": False},
        "pair": point, "line": {"type": "array", "items": point, "maxItems": 3},
        "prefix and rest": {"type": "array", "prefixItems": [{"const": "sum"}, integer],
                            "items": null, "minItems": 1, "maxItems": 4},
        "matrix": {"type": "array", "minItems": 2, "maxItems": 2, "items": {
            "type": "array", "minItems": 2, "maxItems": 2, "items": {"enum": [0, 1]}}},
        "properties": obj(a=integer, b=text), "optional": obj([], a=integer, b=boolean, c=null),
        "closed": closed(["b"], a=integer, b=boolean, c=null), "nothing": closed(),
        "only named": {"type": "object", "required": ["z"]},
        "rest": obj(["a"], a=integer) | {"additionalProperties": boolean},
        "map": {"type": "object", "additionalProperties": integer},
        "map of maps": {"type": "object", "additionalProperties": {
            "type": "object", "additionalProperties": {"enum": [1]}}},
        "names": closed(**{"naïve €": integer, "日本": text, 'a"b\\c\n': null, "": boolean,
                           "a/b~c": null, "$ref": boolean, "🚀": {"const": "🚀"}}),
        "patterned": {"type": "object", "additionalProperties": False, "patternProperties": {
            "^n_": integer, "^b_": boolean}},
        "patterned and named": {
            "type": "object", "properties": {"x": null}, "required": ["x"],
            "patternProperties": {"^n_[a-z]$": integer}, "additionalProperties": text},
        "patterned open": {"type": "object", "patternProperties": {"^n": integer}},
        "count": {"type": "object", "minProperties": 1, "maxProperties": 2,
                  "additionalProperties": integer},
        "anyOf": {"anyOf": [integer, {"type": "string", "maxLength": 2}, null]},
        "anyOf overlaps": {"anyOf": [integer, number, {"minimum": 3}]},
        "anyOf and required": {"type": "object", "properties": {"a": integer, "b": null},
                               "additionalProperties": False,
                               "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        "nullable": closed(a={"anyOf": [text, null]}, b={"type": ["integer", "null"]}),
        "oneOf": {"oneOf": [{"type": "string", "maxLength": 3}, integer, boolean]},
        "tagged": {"oneOf": [closed(kind={"const": "circle"}, r=number),
                             closed(kind={"const": "box"}, w=number, h=number)]},
        "allOf": {"allOf": [integer, {"minimum": 3}, {"maximum": 9}]},
        "allOf objects": {"allOf": [obj(a=integer), obj(b=boolean)]},
        "allOf patterns": {"type": "string", "maxLength": 6,
                           "allOf": [{"pattern": "a"}, {"pattern": "b"}]},
        "allOf and anyOf": {"allOf": [{"anyOf": [integer, text]}, {"anyOf": [text, null]}],
                            "maxLength": 3},
        "allOf lengths": {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
        "$ref": {"$defs": {"n": {"type": "integer", "minimum": 1}}, **closed(
            a={"$ref": "#/$defs/n"}, b={"$ref": "#/$defs/n"})},
        "definitions": {"definitions": {"n": boolean}, "type": "array", "maxItems": 2,
                        "items": {"$ref": "#/definitions/n"}},
        "$ref and more": {"$defs": {"s": text}, "$ref": "#/$defs/s", "minLength": 3},
        "$ref to a property": closed(a=integer, b={"$ref": "#/properties/a"}),
        "$ref with escapes": {"$defs": {"a/b~c d": {"const": 1}},
                              "$ref": "#/$defs/a~1b~0c%20d"},
        "list": {"$defs": {"node": node}, "$ref": "#/$defs/node"}, "tree": tree,
        "both ways": {"$defs": {
            "even": closed(odd={"anyOf": [{"$ref": "#/$defs/odd"}, null]}),
            "odd": closed(even={"anyOf": [{"$ref": "#/$defs/even"}, null]})},
            "$ref": "#/$defs/even"},
        "remarks": {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T",
                    "description": "D", "default": 1, "examples": [2], "$comment": "C",
                    "deprecated": True, "readOnly": True, "writeOnly": False, **integer},
        "no uniqueItems": {"type": "array", "items": boolean, "uniqueItems": False,
                           "maxItems": 3},
        "no type": {"properties": {"a": integer}, "minLength": 2, "minimum": 5},
        "unknown keyword": {"type": "integer", "x-mine": {"not": {}}},
        "lenient": {"type": "string", "maxLength": 2, "x-guidance": {"lenient": True}},
        "texts of tokens": {"enum": ["<think>", END, f"a {END} b", "<think></think>"]},
        "a name of a token": closed(**{"<think>": {"const": END}}),
        "names of keywords": closed(**{"not": integer, "if": null, "contains": boolean}),
    }
    for name in FORMATS:
        found[f"format {name}"] = {"type": "string", "format": name}
    return found


FORMATS = ("date", "time", "date-time", "duration", "email", "ipv4", "ipv6", "uri", "uuid")


class Maker:
    "Draws schemas."

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.names = [*"abcde", "first name", "größe", "id", "x-y", "数", "a.b", "$v"]

    def make(self):
        "A schema, sometimes with definitions that it refers to, and to itself."
        draw = self.draw
        if draw.random() < 0.3:
            self.defs = {f"d{i}": self.leaf() for i in range(2)}
            schema = self.schema(2)
            schema = schema if "$ref" not in schema else {"allOf": [schema]}
            return schema | {"$defs": self.defs}
        self.defs = {}
        return self.schema(3)

    def schema(self, depth):
        kinds = [self.leaf] + [self.object, self.array, self.union] * (depth > 0)
        if self.defs:
            kinds.append(lambda *_: {"$ref": f"#/$defs/{self.draw.choice(list(self.defs))}"})
        make = self.draw.choice(kinds)
        return make() if make == self.leaf else make(depth - 1)

    def leaf(self):
        draw = self.draw
        low = draw.randint(-50, 50)
        text = {"type": "string", "minLength": draw.randint(0, 2),
                "maxLength": draw.randint(2, 5)}
        return draw.choice([
            {"type": "integer"}, {"type": "boolean"}, {"type": "null"}, text,
            {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 99)},
            {"type": "number", "exclusiveMinimum": low / 4, "maximum": low / 4 + 3.5},
            {"type": "integer", "multipleOf": draw.randint(2, 30)},
            {"type": "string", "pattern": draw.choice(
                ["^[A-Z]{3}$", r"^\d{1,3}(\.\d+)?$", "^(a|bc)+$", "^$|^x", "[aeiou]$"])},
            {"type": "string", "format": draw.choice(FORMATS)},
            {"enum": draw.sample([1, 2.5, "a", "b c", None, False, [], {"k": "v"}], 3)},
            {"const": draw.choice(["x", 7, None, [1, "é"], {"a": {}}])},
            {"type": ["integer", "null"], "minimum": low},
            {"allOf": [text, {"pattern": "^[a-z]*$"}]},
        ])

    def object(self, depth):
        draw = self.draw
        names = draw.sample(self.names, draw.randint(0, 4))
        found = {"type": "object", "properties": {name: self.schema(depth) for name in names},
                 "required": [name for name in names if draw.random() < 0.6]}
        rest = draw.choice([False, False, None, self.leaf(), True])
        found |= {} if rest is None else {"additionalProperties": rest}
        if draw.random() < 0.2:
            found["patternProperties"] = {"^p_": self.leaf(), "^q_[0-9]$": self.leaf()}
        return found

    def array(self, depth):
        draw = self.draw
        found = {"type": "array", "items": self.schema(depth), "minItems": draw.randint(0, 2)}
        found["maxItems"] = found["minItems"] + draw.randint(0, 2)
        if draw.random() < 0.3:
            found["prefixItems"] = [self.schema(depth) for _ in range(draw.randint(1, 2))]
        return found

    def union(self, depth):
        draw, one = self.draw, self.schema(depth)
        if draw.random() < 0.5:
            return {"anyOf": [one, self.schema(depth), {"type": "null"}]}
        tagged = [{"type": "object", "properties": {"kind": {"const": kind}, "is": part},
                   "required": ["kind", "is"], "additionalProperties": False}
                  for kind, part in (("left", one), ("right", self.schema(depth)))]
        return {"oneOf": [*tagged, {"type": "boolean"}]}


NUM_SCHEMAS = 200
SERVED = schemas_of_all_kinds()
SERVED |= {f"drawn {seed}": Maker(seed).make() for seed in range(NUM_SCHEMAS - len(SERVED))}


@pytest.fixture(scope="module")
def tokenizer():
    "A byte-level BPE with tokens that span what a grammar keeps apart."
    words = ['{"a": [1, 2], "name": "the value"}', '"}, {"', "null, true, false", "2026-11-26",
             '": "', '"], "', "12.5e10", "naïve größe 日本", "\n  "] * 3
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence([])
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet,
                                  special_tokens=[END, "<think>"], show_progress=False)
    fast.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, len(tokenizer) + 12, [tokenizer.eos_token_id])


# what brings an object to its end, and what brings a text to it
ORDERS = [f"{first}n0123456789tfabcxyzABCXYZ" for first in ('}]",:', '"@}],:')]


@pytest.fixture(scope="module")
def wishes(tokenizer):
    "For each order and each token: how much it brings an answer to its end."
    found = torch.full((len(ORDERS), len(tokenizer) + 12), -1.0)
    for i in range(len(tokenizer)):
        text = tokenizer.decode([i])
        for wish, order in zip(found, ORDERS):
            wish[i] = 1 - order.find(text[0]) / len(order) if text[:1] in order else 0
            wish[i] -= sum(text.count(c) for c in "{[") + text.isspace()
    found[:, tokenizer.eos_token_id] = 2.0
    return found


def walk(grammar, tokenizer, wishes, seed, max_tokens=400):
    "Draw an answer from what the mask leaves; return its text, and whether it ended."
    random_numbers = torch.Generator().manual_seed(seed)
    mask, end = GrammarMask(), tokenizer.eos_token_id
    params = SamplingParams(max_tokens=max_tokens, structured_outputs=grammar)
    request = Request("", [1], params)
    row = SamplingRow(request.params, [1], request.output_ids, 0, frozenset([end]), (), request)
    for i in range(max_tokens):
        logits = 3 * torch.randn(1, wishes.shape[-1], generator=random_numbers)
        order = int(torch.randint(len(ORDERS), (1,), generator=random_numbers))
        logits += wishes[order] * (2 if i < 30 else 40)
        mask(logits, [row])
        assert logits.max() > -math.inf, "nothing is allowed"
        token_id = int(logits[0].argmax())
        if token_id == end:
            return tokenizer.decode(request.output_ids), True
        request.output_ids.append(token_id)
    return tokenizer.decode(request.output_ids), False


def check(schema, text):
    "Raise if a text is no JSON, or not what a schema asks for."
    validator = jsonschema.Draft202012Validator
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))


@pytest.mark.parametrize("name", SERVED)
def test_what_ends_is_valid(name, grammars, tokenizer, wishes):
    schema = SERVED[name]
    grammar = grammars.compile(StructuredOutputsParams(json=schema))
    for seed in range(3):
        text, ended = walk(grammar, tokenizer, wishes, seed)
        assert ended, text
        check(schema, text)


def test_drawn_schemas_differ():
    texts = {json.dumps(schema, sort_keys=True) for schema in SERVED.values()}
    assert len(SERVED) == NUM_SCHEMAS and len(texts) > 0.95 * NUM_SCHEMAS


ACCEPTED = {  # keywords whose answers come in other ways than the first one that one thinks of
    '{"n_1": 1, "b_": true}': "patterned", '{"b": null, "c": null, "a": 1}': None,
    '[-1.5, 2e3]': "pair", '"red dark"': "pattern of choices", '-0.5': "number bounds",
    '{ "kind" : "box" , "w" : 1 , "h" : 2.5 }': "tagged", '"a\\nb"': "enum of texts",
    '{"value": 1, "next": {"value": 2, "next": null}}': "list", '84': "multiple",
}


@pytest.mark.parametrize("text", [text for text, name in ACCEPTED.items() if name])
def test_valid_answers_are_allowed(text, grammars, tokenizer):
    check(SERVED[ACCEPTED[text]], text)
    matcher = grammars.compile(StructuredOutputsParams(json=SERVED[ACCEPTED[text]])).start()
    ids = tokenizer.encode(text)
    assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
REFUSED = {
    "not": {"not": TEXT}, "if": {"if": TEXT, "then": {"minLength": 2}},
    "then": {"then": TEXT}, "else": {"else": TEXT},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": TEXT},
    "minContains": {"type": "array", "minContains": 1},
    "maxContains": {"type": "array", "maxContains": 1},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {"a": {}}},
    "dependencies": {"dependencies": {"a": ["b"]}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "unevaluatedItems": {"unevaluatedItems": False},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "oneOf": {"oneOf": [WHOLE, {"type": "number"}]},
    "patternProperty": {"type": "object", "patternProperties": {"^a": TEXT, "a$": WHOLE}},
    "look-around": TEXT | {"pattern": "(?=a)b"}, "lookaround": TEXT | {"pattern": r"\bfoo\b"},
    "backreferences": TEXT | {"pattern": r"(a)\1"},
    "https://example.com/x.json": {"$ref": "https://example.com/x.json"},
    "hostname": TEXT | {"format": "hostname"},
    "multiple": WHOLE | {"multipleOf": 0}, "strin": {"type": "strin"},
} | {f"format: {name}": TEXT | {"format": name} for name in (
    "idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template",
    "json-pointer", "relative-json-pointer", "regex", "int32", "binary", "made-up")}


UNSATISFIABLE = {
    "minLength": TEXT | {"minLength": 5, "maxLength": 3},
    "minItems": {"type": "array", "minItems": 5, "maxItems": 3},
    "minimum": WHOLE | {"minimum": 5, "maximum": 3}, "anyOf is empty": {"enum": []},
    "'z'": {"type": "object", "required": ["z"], "additionalProperties": False},
    "incompatible types": {"allOf": [TEXT, WHOLE]},
}


@pytest.mark.parametrize("word", UNSATISFIABLE)
def test_what_nothing_satisfies_is_refused(word, grammars):
    with pytest.raises(ValueError, match=f"^json: .*{word}"):
        grammars.compile(StructuredOutputsParams(json=UNSATISFIABLE[word]))


@pytest.mark.parametrize("place", ["root", "property", "definition", "anyOf"])
@pytest.mark.parametrize("word", REFUSED)
def test_what_is_not_served_is_refused_by_its_name(word, place, grammars):
    schema = REFUSED[word]
    schema = {"root": schema, "property": {"type": "object", "properties": {"a": schema}},
              "definition": {"$defs": {"d": schema}, "type": "array",
                             "items": {"$ref": "#/$defs/d"}, "minItems": 1},
              "anyOf": {"anyOf": [WHOLE | {"const": 7}, schema]}}[place]
    with pytest.raises(ValueError, match=r"^json: ") as caught:
        grammars.compile(StructuredOutputsParams(json=schema))
    assert word in str(caught.value), caught.value
