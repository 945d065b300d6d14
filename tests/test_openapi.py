"""Requests drawn from our OpenAPI description, well-formed and not: errors look alike."""

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from server_fixtures import running


@pytest.fixture(scope="module")
def server():
    with running(max_output_tokens=16, max_body_bytes=2**16) as found:
        yield found
        found.settled()


@pytest.fixture(scope="module")
def openapi(server):
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


QUICK = dict(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_is_a_server_error(openapi, mode):
    for operation in openapi.get_all_operations():

        @given(operation.ok().as_strategy(generation_mode=mode))
        @settings(max_examples=12, **QUICK)
        def one(case):
            response = case.call(timeout=20)
            assert response.status_code < 500, response.text
            if response.status_code >= 400 and case.method != "HEAD":
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        try:
            one()
        except Unsatisfiable:  # nothing can be wrong with a request that has no parameters
            assert mode is GenerationMode.NEGATIVE and not list(operation.ok().body)


def test_every_route_is_described(openapi):
    paths = {
        (operation.ok().method.upper(), operation.ok().path)
        for operation in openapi.get_all_operations()
    }
    assert {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/{response_id}"),
        ("DELETE", "/v1/responses/{response_id}"),
        ("POST", "/v1/responses/{response_id}/cancel"),
        ("POST", "/v1/responses/input_tokens"),
        ("GET", "/v1/responses/{response_id}/input_items"),
        ("GET", "/v1/models"),
        ("GET", "/health"),
        ("GET", "/version"),
        ("GET", "/metrics"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/tokenizer_info"),
        ("GET", "/ping"),
        ("POST", "/ping"),
        ("GET", "/load"),
        ("GET", "/v1/models/{name}"),
    } <= paths
    assert not any("/debug" in path or "/trace" in path for _, path in paths), "behind flags"


@pytest.fixture(scope="module")
def description():
    "With every route that there is."
    with running(enable_request_traces=True) as found:
        yield found, found.get("/openapi.json").json()


def operations(description):
    return [
        (method, path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_answer_is_described(description):
    for method, path, operation in operations(description[1]):
        where = f"{method} {path}"
        assert operation["summary"] and operation["description"], where
        assert set(operation["responses"]) == {"200", "4XX", "5XX"}, where
        streams = path in ("/v1/chat/completions", "/v1/completions", "/v1/responses")
        streams = (streams and method == "post") or where == "get /v1/responses/{response_id}"
        plain = path == "/metrics" or path.endswith("lora_adapter")
        kinds = {"text/plain" if plain else "application/json"}
        whole = operation["responses"]["200"]["content"]
        assert set(whole) == kinds | ({"text/event-stream"} if streams else set()), where
        for one in whole.values():
            assert one["schema"].get("$ref") or one["schema"].get("type"), where
        for status in ("4XX", "5XX"):
            errors = operation["responses"][status]["content"]
            reference = {"$ref": "#/components/schemas/ErrorBody"}
            assert errors == {"application/json": {"schema": reference}}, where


def test_allow_is_what_is_described(description):
    found, described = description
    for path, methods in described["paths"].items():
        expected = {method.upper() for method in methods} | {"OPTIONS"}
        if path == "/v1/responses/input_tokens":  # could be a response's id, too
            expected |= {"GET", "DELETE"}
        expected |= {"HEAD"} if "GET" in expected else set()
        for method in ("OPTIONS", "PUT"):
            response = httpx.request(method, found.url + path)
            assert response.status_code == (204 if method == "OPTIONS" else 405), path
            assert set(response.headers["allow"].split(", ")) == expected, path


def test_the_answers_are_as_described(description):
    found, described = description
    ask = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    made = found.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).json()["id"]
    answers = {
        ("post", "/v1/chat/completions"): found.post("/v1/chat/completions", ask),
        ("post", "/v1/completions"): found.post("/v1/completions", {"prompt": "x"}),
        ("post", "/tokenize"): found.post("/tokenize", {"prompt": "x"}),
        ("post", "/detokenize"): found.post("/detokenize", {"tokens": [65]}),
        ("get", "/v1/requests/{request_id}/trace"): found.get(f"/v1/requests/{made}/trace"),
        ("get", "/v1/models/{name}"): found.get("/v1/models/tiny"),
    }
    for method, path, operation in operations(described):
        if method == "get" and "{" not in path and path != "/metrics":
            answers[method, path] = found.get(path)
        if (method, path) in answers:
            response = answers[method, path]
            assert response.status_code == 200, (path, response.text)
            [*_, schema] = [operation["responses"]["200"]["content"]["application/json"]]
            whole = {**schema["schema"], "components": described["components"]}
            jsonschema.validate(response.json(), whole)
    errors = described["components"]["schemas"]["ErrorBody"]
    for response in (found.post("/v1/completions", {}), found.get("/nope")):
        whole = {**errors, "components": described["components"]}
        jsonschema.validate(response.json(), whole)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "messages",
        "prompt",
        "input",
        "model",
        "n",
        "stop",
        "logit_bias",
        "logprobs",
        "tools",
        "tool_choice",
        "metadata",
        "response_format",
        "structured_outputs",
        "parallel_tool_calls",
        "stream_options",
        "text",
        "max_tokens",
        "temperature",
        "seed",
        "user",
        "include",
        "reasoning",
    ]
)
BASES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/v1/responses/input_tokens": {"input": "x"},
}


@pytest.mark.parametrize("path", BASES)
def test_any_value_in_any_field(server, path):
    with httpx.Client(base_url=server.url, timeout=20) as client:

        @given(FIELDS, JSON)
        @settings(max_examples=60, **QUICK)
        def one(name, value):
            response = client.post(path, json=BASES[path] | {name: value})
            assert response.status_code < 500, (name, value, response.text)

        one()


@pytest.mark.parametrize(
    "content, status",
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"x"', 400),
        (b"\xff", 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b"[" * 10**5, 413),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
        (b'{"prompt": "x", "temperature": NaN}', 400),
        (b'{"prompt": "x", "a": 1e999}', 200),
        (b"x" * (2**16 + 1), 413),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400),
    ],
)
def test_bodies_that_are_no_requests(server, content, status):
    response = httpx.post(server.url + "/v1/completions", content=content, timeout=20)
    assert response.status_code == status or (status == 200 and response.status_code == 400), (
        response.text[:200]
    )
    if response.status_code >= 400:
        assert response.json()["error"]["message"] and len(response.text) < 1000
