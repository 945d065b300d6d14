import asyncio
import contextlib
import gzip
import hashlib
import json
import logging
import socket
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from server_fixtures import TOKENIZER, running, solo_text
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from nanollm.args import ServerArgs
from nanollm.serve import api as api_module
from nanollm.serve import gate as gate_module
from nanollm.serve.api import root_of
from nanollm.serve.gate import (
    BYTES_PER_S,
    LARGE_BODY,
    MAX_VALUES,
    EventStream,
    Gate,
    Pace,
    check_key,
    check_values,
    data,
    decode_body,
    is_address,
    plain_scope,
    read_body,
    with_errors,
)
from nanollm.serve.protocol import ApiError
from nanollm.serve.server import Choices

http = httpx.Client(timeout=30)  # making one takes longer than most requests
LONG = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server():
    with running(
        names=("tiny", "team/tiny"),
        enable_request_traces=True,
        allowed_origins=("https://a.page",),
    ) as found:
        yield found
        found.settled()


@pytest.fixture(scope="module")
def locked():
    with running(api_keys=("one", "zwei-ü"), max_output_tokens=8, max_body_bytes=1000) as found:
        yield found
        assert not found.api.engine.streams and not found.engine.has_unfinished
        found.engine.check()


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def raw(server, content):
    "Send bytes as they are; return what comes until the server closes, perhaps early."
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        found = b""
        with contextlib.suppress(ConnectionError):
            sock.sendall(content)
            while piece := sock.recv(65536):
                found += piece
    return found


# --- keys


@pytest.mark.parametrize("given", [b"Bearer one", b"bearer one", "Bearer zwei-ü".encode()])
def test_keys_that_open(given):
    headers = Headers(raw=[(b"authorization", given)])
    assert (
        check_key(headers, ("one", "zwei-ü"))
        == hashlib.sha256(given.split(b" ")[1]).hexdigest()
    )


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"one",
        b"Bearer",
        b"Bearer ",
        b"Bearer two",
        b"Basic one",
        b"Bearer  one",
        b"Bearer one ",
        b"\xff\xfe",
        "Bearer zwei-ü".encode("latin-1"),
    ],
)
@pytest.mark.parametrize("keys", [("one", "zwei-ü"), ("",)])
def test_keys_that_do_not(given, keys):
    with pytest.raises(ApiError) as error:
        check_key(Headers(raw=[(b"authorization", given)]), keys)
    assert error.value.status == 401 and error.value.body["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "OPTIONS", "HEAD"])
@pytest.mark.parametrize(
    "path",
    [
        "/static",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/metrics",
        "/v1/models",
        "/v1/completions",
        "/nothing",
        "//health",
        "/health%2fx",
        "/healthz",
        "/HEALTH",
        "/ping",
    ],
)
def test_everything_is_closed(locked, method, path):
    response = http.request(method, locked.url + path)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert response.headers["connection"] == "close", "a body may follow that nobody reads"


@pytest.mark.parametrize("path", ["/health", "/health/", "/health%2f"])
def test_health_is_open(locked, path):
    headers = {"host": "a.page", "origin": "https://a.page"}
    assert http.get(locked.url + path, headers=headers).json() == {"status": "ok"}


def test_tenants_share_neither_prefixes_nor_responses(locked):
    def ask(key, **more):
        body = {"input": "the same words over and over " * 4, "max_output_tokens": 2} | more
        return locked.post("/v1/responses", body, headers=auth(key)).json()

    def auth(key):
        return {"authorization": b"Bearer " + key.encode()}

    first, again, other = ask("one"), ask("one"), ask("zwei-ü")
    cached = [
        r["usage"]["input_tokens_details"]["cached_tokens"] for r in (first, again, other)
    ]
    assert cached[0] == cached[2] == 0 < cached[1]
    assert ask("one", cache_salt="mine")["usage"]["input_tokens_details"]["cached_tokens"] == 0
    path = f"{locked.url}/v1/responses/{first['id']}"
    for method, more in (
        ("GET", ""),
        ("GET", "/input_items"),
        ("GET", "?stream=true"),
        ("POST", "/cancel"),
        ("DELETE", ""),
    ):
        assert (
            error_of(http.request(method, path + more, headers=auth("zwei-ü")), 404)["code"]
            == "response_not_found"
        )
    follow = {"previous_response_id": first["id"]}
    assert ask("zwei-ü", **follow)["error"]["code"] == "response_not_found"
    assert http.get(path, headers=auth("one")).json()["id"] == first["id"]


# --- bodies


def receiver(*messages):
    left = list(messages)

    async def receive():
        return left.pop(0)

    return receive, left


def piece(body, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_in_pieces():
    receive, _ = receiver(
        piece(b"12", True), piece(b"", True), {"type": "http.request", "body": b"345"}
    )
    assert asyncio.run(read_body(receive, "", 5)) == b"12345"
    receive, _ = receiver({"type": "http.request"})
    assert asyncio.run(read_body(receive, "0", 5)) == b""


@pytest.mark.parametrize("length", ["", "-1", "abc", "1e9", "٣", "5"])
def test_a_length_that_says_nothing_is_not_believed(length):
    receive, _ = receiver(piece(b"123456"))
    with pytest.raises(ApiError, match="larger than 5 bytes") as error:
        asyncio.run(read_body(receive, length, 5))
    assert error.value.status == 413


def test_how_much_of_a_large_body_is_read():
    receive, left = receiver(*(piece(b"12345678", True) for _ in range(9)), piece(b""))
    with pytest.raises(ApiError):
        asyncio.run(read_body(receive, "", 10))
    assert not left, "a little too large: to its end"
    receive, left = receiver(*(piece(b"1" * 30, True) for _ in range(9)))
    with pytest.raises(ApiError):
        asyncio.run(read_body(receive, "", 10))
    assert len(left) == 6, "far too large: until that is known"
    receive, left = receiver(piece(b"1"))
    with pytest.raises(ApiError):
        asyncio.run(read_body(receive, "9" * 5000, 10))
    assert len(left) == 1, "not at all"


def test_large_bodies_are_read_at_one_pace_and_small_ones_at_once():
    ended = []

    async def one(name, pace, num_pieces):
        pieces = [piece(b"0" * 2**16, i < num_pieces - 1) for i in range(num_pieces)]
        body = await read_body(receiver(*pieces)[0], "", 2**22, pace)
        ended.append((name, len(body)))

    async def main():
        pace, start_s = Pace(), time.monotonic()
        large = [asyncio.create_task(one("large", pace, 16)) for _ in range(8)]
        await asyncio.sleep(0)
        await one("small", pace, LARGE_BODY // 2**16)
        await asyncio.gather(*large)
        return time.monotonic() - start_s

    seconds = asyncio.run(main())
    assert ended == [("small", LARGE_BODY), *[("large", 2**20)] * 8]
    slow = 8 * (2**20 - LARGE_BODY) - 2**16  # the last piece is not waited for
    assert seconds > 0.99 * slow / BYTES_PER_S


def test_a_client_that_hangs_up_while_it_sends():
    receive, _ = receiver(piece(b"1", True), {"type": "http.disconnect"})
    with pytest.raises(ApiError) as error:
        asyncio.run(read_body(receive, "", 10))
    assert error.value.status == 499


def test_sizes_over_http(locked):
    headers = {"authorization": "Bearer one"}
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    exact = body + " " * (1000 - len(body))
    assert (
        http.post(locked.url + "/v1/completions", content=exact, headers=headers).status_code
        == 200
    )
    assert (
        "1000 bytes"
        in error_of(
            http.post(locked.url + "/v1/completions", content=exact + " ", headers=headers), 413
        )["message"]
    )
    chunks = (exact[i : i + 100].encode() for i in range(0, 1000, 100))
    assert (
        http.post(locked.url + "/v1/completions", content=chunks, headers=headers).status_code
        == 200
    )
    chunks = (b" " * 500 for _ in range(5))
    error_of(http.post(locked.url + "/v1/completions", content=chunks, headers=headers), 413)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer one\r\n"
    found = raw(locked, head + b"content-length: 9999999\r\n\r\nx")
    assert found.startswith(b"HTTP/1.1 413") and b"connection: close" in found.lower()


@pytest.mark.parametrize("length", [b"-5", b"abc", b"1, 2", b"0x10", b"9" * 30])
def test_bad_lengths_over_http(server, length):
    found = raw(
        server,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: "
        + length
        + b"\r\n\r\n{}",
    )
    assert found.split(b" ")[1] in (b"400", b"413") and b"Traceback" not in found


def test_header_limits(server):
    head = b"GET /version HTTP/1.1\r\nhost: localhost\r\nx-large: "
    for size in (10**5, 10**6):  # at once or in pieces: it is ours or uvicorn that says no
        assert b" 200 " not in raw(
            server, head + b"a" * size + b"\r\nconnection: close\r\n\r\n"
        )
    error_of(
        http.get(server.url + "/version", headers={f"x-{i}": "a" * 1000 for i in range(70)}),
        431,
    )
    assert (
        http.get(server.url + "/version", headers={"x-odd": b"\xff\x80\xc3\xbc"}).status_code
        == 200
    )
    assert (
        http.get(server.url + "/version", headers={"x-request-id": b"\xff\xfe"})
        .headers["x-request-id"]
        .isalnum()
    )


def test_slow_bodies_and_who_they_are_from(server, monkeypatch):
    monkeypatch.setattr(gate_module, "BODY_TIMEOUT_S", 0.2)
    found = raw(
        server,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{",
    )
    assert (
        found.startswith(b"HTTP/1.1 408")
        and b"within 0.2 s" in found
        and b"connection: close" in found.lower()
    )


# --- compressed bodies, and large ones


RAW = json.dumps(CHAT).encode()


@pytest.mark.parametrize(
    "encoding, content",
    [
        ("gzip", gzip.compress(RAW, mtime=0)),
        ("x-gzip", gzip.compress(RAW, mtime=0)),
        ("GZIP", gzip.compress(RAW, mtime=0)),
        ("deflate", zlib.compress(RAW)),
        ("identity", RAW),
        ("", RAW),
    ],
)
def test_compressed_bodies(server, encoding, content):
    response = http.post(
        server.url + "/v1/chat/completions",
        content=content,
        headers={"content-encoding": encoding},
    )
    assert response.json()["choices"][0]["message"]["content"] == solo_text(CHAT["messages"], 4)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "x" * 1000])
def test_unknown_compressions_are_named(server, encoding):
    response = http.post(
        server.url + "/v1/chat/completions", content=RAW, headers={"content-encoding": encoding}
    )
    message = error_of(response, 415)["message"]
    assert encoding[:20] in message and "gzip" in message and len(message) < 200
    assert response.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    "content",
    [
        RAW,
        b"",
        gzip.compress(RAW, mtime=0)[:-9],
        gzip.compress(RAW, mtime=0) + b"x",
        gzip.compress(RAW, mtime=0) * 2,
        b"\x1f\x8b" + b"x" * 50,
    ],
)
def test_what_is_no_gzip(server, content):
    response = http.post(
        server.url + "/v1/chat/completions",
        content=content,
        headers={"content-encoding": "gzip"},
    )
    assert "gzip" in error_of(response, 400)["message"]


def test_zip_bombs_stop_at_the_limit():
    exact = gzip.compress(b" " * 10**6, mtime=0)
    assert len(decode_body(exact, "gzip", 10**6)) == 10**6
    tracemalloc.start()
    for size in (10**6 + 1, 2**28):
        bomb = zlib.compress(b" " * size)
        tracemalloc.reset_peak()
        with pytest.raises(ApiError) as error:
            decode_body(bomb, "deflate", 10**6)
        assert error.value.status == 413 and tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_the_limit_holds_after_unpacking(locked):
    headers = {"authorization": "Bearer one", "content-encoding": "gzip"}
    body = json.dumps({"prompt": "x", "max_tokens": 1}).ljust(1000)
    for text, status in ((body, 200), (body + " ", 413)):
        response = http.post(
            locked.url + "/v1/completions",
            content=gzip.compress(text.encode(), mtime=0),
            headers=headers,
        )
        assert response.status_code == status, response.text


def test_a_byte_order_mark(server):
    for content in (b"\xef\xbb\xbf" + RAW, gzip.compress(b"\xef\xbb\xbf" + RAW, mtime=0)):
        encoding = {"content-encoding": "gzip"} if content[:1] == b"\x1f" else {}
        response = http.post(
            server.url + "/v1/chat/completions", content=content, headers=encoding
        )
        assert response.status_code == 200, response.text


HALF = MAX_VALUES // 2


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"1," * MAX_VALUES + b"1]",
        b"[" + b"{}," * HALF + b"1]",
        b"[" + b"[]," * HALF + b"1]",
        b"[" * 200 + b"1," * MAX_VALUES,
        b'{"messages":[' + b'{"role":"user"},' * HALF,
        b",".join([b"[" * 190 + b"]" * 190] * (HALF // 190 + 1)),
    ],
)
def test_bodies_of_too_many_values_are_not_parsed(server, body):
    with pytest.raises(ApiError) as error:
        check_values(body)
    assert error.value.status == 413 and str(MAX_VALUES) in str(error.value)
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/completions", "/detokenize"):
        error_of(http.post(server.url + path, content=body), 413)


def test_honest_bodies_are_not_too_many_values():
    for body in (
        json.dumps({"prompt": [[7] * 2000] * 100}),
        json.dumps({"prompt": "a, b: " * 9000}),
        json.dumps({"prompt": "x" * 2**22}),
    ):
        check_values(body.encode())


# --- the gate


def gate(
    app=None,
    messages=({"type": "http.request"},),
    headers=(),
    path="/x",
    server=("10.0.0.1", 8000),
    **options,
):
    "Send one request through a gate; return what came out, and the application's scope."
    sent, seen = [], {}

    async def inner(scope, receive, send):
        seen.update(scope)
        await (app or JSONResponse({}))(scope, receive, send)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": list(headers),
        "client": ("10.0.0.9", 1),
        "server": server,
    }
    asyncio.run(
        Gate(inner, ServerArgs(("tiny",), **options))(scope, receiver(*messages)[0], send)
    )
    return sent, seen


def test_one_key_does_not_get_all_places():
    async def check(keys, tenants):
        ends, heard = asyncio.Event(), []

        async def app(scope, receive, send):
            await ends.wait()
            await JSONResponse({})(scope, receive, send)

        gate = Gate(app, ServerArgs(("x",), api_keys=keys), max_open=2)

        async def ask(key, path="/x", hang_up=False):
            headers = [(b"authorization", b"Bearer " + key.encode())]
            scope = {"type": "http", "method": "POST", "path": path, "headers": headers,
                     "client": ("10.0.0.9", 1), "server": ("10.0.0.1", 8000)}

            async def receive():
                if hang_up:
                    raise ConnectionError("gone")
                return {"type": "http.request"}

            async def send(message):
                if "status" in message:
                    heard.append((key, message["status"], dict(message["headers"])))

            await gate(scope, receive, send)

        for _ in range(3):  # who fails on the way in keeps no place
            with contextlib.suppress(ConnectionError):
                await ask("a", hang_up=True)
        tasks = [asyncio.create_task(ask(key)) for key in tenants]
        tasks += [asyncio.create_task(ask("a", "/health")) for _ in range(4)]
        await asyncio.sleep(0.02)
        refused = list(heard)
        ends.set()
        await asyncio.gather(*tasks)
        assert len(heard) == len(tasks) and not any(gate.open.values())
        return [(key, status) for key, status, _ in refused], [h for *_, h in refused]

    refused, [headers] = asyncio.run(check(("a", "b"), "aaabb"))
    assert refused == [("a", 503)]
    assert headers[b"connection"] == b"close" and headers[b"retry-after"] == b"1"
    assert asyncio.run(check(("a",), "aaaa")) == ([], [])  # nobody else needs a place


def test_request_ids():
    for given in (b"", b"a b", b"x" * 65, b"a\nb", "ü".encode(), b"<b>"):
        sent, seen = gate(headers=[(b"x-request-id", given)])
        name = Headers(raw=sent[0]["headers"])["x-request-id"]
        assert (
            len(name) == 32
            and name == seen["state"]["request_id"]
            and seen["state"]["own_id"] == ""
        )
    sent, seen = gate(headers=[(b"x-request-id", b"job.7:a-B_c")])
    assert (
        Headers(raw=sent[0]["headers"])["x-request-id"]
        == seen["state"]["own_id"]
        == "job.7:a-B_c"
    )


def test_request_ids_of_errors_and_streams(server, locked):
    headers = {"x-request-id": "mine"}
    assert http.get(locked.url + "/x", headers=headers).headers["x-request-id"] == "mine"
    assert server.post("/v1/completions", {}, headers=headers).headers["x-request-id"] == "mine"
    answer = server.post("/v1/chat/completions", CHAT | {"stream": True}, headers=headers)
    assert answer.headers["x-request-id"] == "mine"
    assert json.loads(answer.text.split("\n")[0][6:])["id"].startswith("chatcmpl-mine-")


def test_log_lines(caplog):
    with caplog.at_level(logging.INFO, "nanollm.serve.gate"):
        gate(
            path="/a\nb\x1b[31m",
            headers=[(b"authorization", b"Bearer sesame")],
            api_keys=("sesame",),
        )
        gate(path="/health")
        gate(path="/metrics")
        gate(path="/static/main.js")
        gate(path="/q", log_requests=False)
        gate(path="/gone", messages=[{"type": "http.disconnect"}])
    # not those of other tests' servers, which may end late
    lines = [line for line in caplog.messages if line.startswith("10.0.0.9")]
    assert (
        len(lines) == 2
        and '10.0.0.9 "POST /a\\nb\\x1b[31m" 200 ' in lines[0]
        and '"POST /gone" 499' in lines[1]
    )
    assert not any("sesame" in line for line in lines)


def test_log_line_of_an_answer(server, caplog):
    with caplog.at_level(logging.INFO, "nanollm.serve.gate"):
        mine = {"x-request-id": "log-line"}  # not those of other tests, which may end late
        server.post("/v1/chat/completions", CHAT, headers=mine)
        body = {"input": "x", "background": True, "max_output_tokens": 2}
        server.post("/v1/responses", body, headers=mine)
        server.settled()
    [chat, background] = [line for line in caplog.messages if " log-line" in line]
    assert "chatcmpl-" in chat and "output 4 length" in chat and "prompt 2" in chat
    assert "resp_" in background and "in the background" in background


def test_errors_of_the_gate_pass_no_application():
    sent, seen = gate(api_keys=("k",))
    assert sent[0]["status"] == 401 and not seen


def test_an_application_that_times_out_is_not_a_slow_body():
    async def app(scope, receive, send):
        raise TimeoutError

    with pytest.raises(TimeoutError):
        gate(app)


def test_web_pages_must_say_json(server):
    body, origin = json.dumps(CHAT), {"origin": "https://a.page"}
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error_of(
            http.post(
                server.url + "/v1/chat/completions",
                content=body,
                headers=origin | {"content-type": kind},
            ),
            415,
        )
    kind = {"content-type": "application/json; charset=utf-8"}
    assert (
        http.post(
            server.url + "/v1/chat/completions", content=body, headers=origin | kind
        ).status_code
        == 200
    )
    assert http.get(server.url + "/v1/models", headers=origin).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        "application/x-www-form-urlencoded",
        "text/plain",
        "multipart/form-data",
        "application/json",
        "x",
    ],
)
def test_any_content_type_is_json(server, kind):
    response = http.post(
        server.url + "/v1/chat/completions",
        content=json.dumps(CHAT),
        headers={"content-type": kind},
    )
    assert response.json()["choices"][0]["message"]["content"] == solo_text(CHAT["messages"], 4)


def test_lifespan_passes_untouched():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(
        Gate(app, ServerArgs(("x",), api_keys=("k",)))({"type": "lifespan"}, None, None)
    )
    assert seen == ["lifespan"]


# --- pages


def page(path="/v1/models", host="localhost:8000", origin=None, address="127.0.0.1", **options):
    "The status and the message of a request that arrives at an address."
    headers = [(b"host", host.encode())] if host else []
    headers += [(b"origin", origin.encode())] if origin is not None else []
    sent, _ = gate(headers=headers, path=path, server=(address, 8000), **options)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body.decode()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST:1",
        "app.localhost",
        "127.0.0.1:8000",
        "[::1]:8000",
        "127.1.2.3",
        "192.168.0.7:8000",
        "[fe80::1]",
        "",
        "localhost.",
    ],
)
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_hosts_that_are_let_in(host, address):
    assert page(host=host, address=address)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "xn--nxasmq6b",
        "localhost:8000@evil.example",
        "[::1",
        "2130706433",
        "a b",
    ],
)
def test_dns_rebinding_is_refused(host):
    status, text = page(host=host)
    assert status == 403 and "--allowed-hosts" in text and "--api-key" in text
    assert page(host=host, path="/health")[0] == 200
    assert page(host=host, api_keys=("k",))[0] == 401, "a key is what keeps pages out"
    assert page(host=host, address="10.0.0.7")[0] == 200, "who listens there has been warned"
    assert page(host=host, address="/run/a.socket")[0] == 200, "no page gets there"
    assert page(host=host, allowed_hosts=("*",))[0] == 200


def test_more_hosts():
    for given in ("box.example", "box.example:8000", "BOX.example"):
        assert page(host=given, allowed_hosts=("box.example",))[0] == 200
        assert page(host="x" + given, allowed_hosts=("box.example",))[0] == 403


@pytest.mark.parametrize(
    "origin, status",
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8000", 200),
        ("http://[::1]", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("file://", 403),
        ("http://192.168.0.9", 403),
        ("http://localhost.evil.example", 403),
        ("chrome-extension://abc", 403),
        ("", 200),
    ],
)
def test_origins(origin, status):
    found, text = page(origin=origin)
    assert found == status and ("--allowed-origins" in text) == (status == 403)
    if origin:
        assert page(origin=origin, allowed_origins=("*",))[0] == 200
        assert page(origin=origin, allowed_origins=(origin,))[0] == 200
    assert page(origin=origin, address="10.0.0.7")[0] == 200
    own = {"host": "box.example:8000", "allowed_hosts": ("box.example",)}
    assert page(origin="http://box.example:8000", **own)[0] == 200, "a page of this server"


def test_a_page_that_is_refused_is_in_the_log(caplog):
    with caplog.at_level(logging.INFO, "nanollm.serve.gate"):
        page(origin="https://evil.example", path="/who")
    [line] = [line for line in caplog.messages if "/who" in line]
    assert " 403 " in line and "--allowed-origins" in line and "evil.example" in line


def test_addresses():
    for name in ("127.0.0.1", "::1", "localhost", "a.localhost", "::ffff:127.0.0.1"):
        assert is_address(name)
    for name in (
        "",
        "10.0.0.1",
        "example.org",
        "localhost.org",
        "127.0.0.1:80",
        "::ffff:10.0.0.1",
    ):
        assert not is_address(name)


@pytest.mark.parametrize("keys", [(), ("k",)])
def test_cors(keys):
    with running(api_keys=keys, allowed_origins=("https://a.page",)) as found:
        mine, other = {"origin": "https://a.page"}, {"origin": "https://b.page"}
        ask = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-os",
        }
        url = found.url + "/v1/chat/completions"
        allowed = http.options(url, headers=mine | ask)
        assert allowed.status_code == 200, "without a key, which a browser would not send"
        assert allowed.headers["access-control-allow-origin"] == "https://a.page"
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        refused = http.options(url, headers=other | ask)
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        key = {"authorization": "Bearer k"} if keys else {}
        answer = found.post("/v1/chat/completions", CHAT, headers=mine | key)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.page"
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        wrong = http.get(
            found.url + "/v1/nope", headers=mine | {"authorization": "Bearer wrong"}
        )
        assert wrong.status_code == (401 if keys else 404)
        assert wrong.headers["access-control-allow-origin"] == "https://a.page", "errors, too"


def test_nothing_is_open_to_pages_by_default(locked):
    with running() as found:
        for url, status in ((found.url, 403), (locked.url, 401)):
            response = http.options(
                url + "/v1/chat/completions",
                headers={"origin": "https://a.page", "access-control-request-method": "POST"},
            )
            assert response.status_code == status
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_cors_for_all():
    with running(allowed_origins=("*",), allow_credentials=True) as found:
        answer = http.get(found.url + "/v1/models", headers={"origin": "null"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-credentials"] == "true"


# --- paths


@pytest.mark.parametrize(
    "root, path, expected",
    [
        ("", "/v1/models", "/v1/models"),
        ("", "/v1/models/", "/v1/models"),
        ("", "/", "/"),
        ("", "//", "/"),
        ("/llm", "/llm/v1/models", "/v1/models"),
        ("/llm/", "/llm", "/"),
        ("/llm", "/llm/", "/"),
        ("/llm", "/v1/models", "/v1/models"),
        ("/llm", "/llmx", "/llmx"),
        ("/a/b", "/a/b/health", "/health"),
        ("/llm", "//llm/health", "//llm/health"),
    ],
)
def test_plain_paths(root, path, expected):
    scope = plain_scope({"path": path, "method": "HEAD"}, root, {"a": 1})
    assert (scope["path"], scope["method"], scope["state"]) == (expected, "GET", {"a": 1})


def test_root_path():
    with running(root_path="/llm", api_keys=("k",)) as found:
        for prefix in ("", "/llm"):
            assert http.get(found.url + prefix + "/health").status_code == 200
            assert http.get(found.url + prefix + "/v1/models").status_code == 401
            assert found.get(prefix + "/v1/models").json()["data"][0]["id"] == "tiny"
            assert found.post(prefix + "/v1/chat/completions", CHAT).status_code == 200
            description = found.get(prefix + "/openapi.json").json()
            assert description["servers"] == [{"url": "/llm"}]
            assert "/v1/models" in description["paths"]
        error_of(found.get("/llm/llm/v1/models"), 404)


# --- JSON


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"NaN",
        b'{"a": NaN}',
        b'{"prompt": "\\ud800"}',
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"[" * 10**5,
        b'{"a":' * 10**4,
        b"9" * 10**5,
        b"{}{}",
        b"'x'",
        "{}".encode("utf-16"),
    ],
    ids=lambda content: content[:12],
)
def test_what_is_no_json(server, content):
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    ):
        error = error_of(http.post(server.url + path, content=content), 400)
        assert len(error["message"]) < 200 and ".py" not in error["message"]


@pytest.mark.parametrize("content", ["[]", "null", "1", '"x"', "true", "1e400"])
def test_json_that_is_no_object(server, content):
    error = error_of(http.post(server.url + "/v1/completions", content=content), 400)
    assert "object" in error["message"] and "Request" not in error["message"]


def test_names_of_our_own_as_fields(server):
    body = {"prompt": "x", "max_tokens": 1}
    for name in (
        "check",
        "model_fields_set",
        "model_extra",
        "__class__",
        "not_served",
        "prompts",
        "sampling_params",
        "self",
    ):
        assert server.post("/v1/completions", body | {name: 1}).status_code == 200, name


# --- event streams


def test_event_stream_closes_whatever_happens():
    async def main(receive, fails=False):
        closed, sent = [], []

        async def events():
            try:
                yield "one"
                if fails:
                    raise RuntimeError("no")
                await asyncio.Event().wait()
            finally:
                closed.append("events")

        async def send(message):
            sent.append(message)

        stream = EventStream(events(), lambda: closed.append("close"))
        try:
            await stream({}, receive, send)
        except RuntimeError:
            closed.append("raised")
        return closed, [m.get("body") for m in sent]

    async def at_once():
        return {"type": "http.disconnect"}

    async def later():
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def never():
        await asyncio.Event().wait()

    assert asyncio.run(main(later)) == (["events", "close"], [None, b"one"])
    assert asyncio.run(main(at_once))[0][-1] == "close"
    closed, bodies = asyncio.run(main(never, fails=True))
    assert set(closed) == {"events", "close", "raised"} and bodies == [None, b"one"]


def test_event_stream_of_a_cancelled_server():
    async def main():
        closed = []

        async def events():
            yield "one"
            await asyncio.Event().wait()

        async def receive():
            await asyncio.Event().wait()

        async def send(message):
            pass

        task = asyncio.create_task(
            EventStream(events(), lambda: closed.append(1))({}, receive, send)
        )
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return closed

    assert asyncio.run(main()) == [1]


@pytest.mark.parametrize("error", [ApiError(503, "full"), KeyError("/secret/path.py")])
def test_errors_in_streams(error):
    async def events():
        yield data({"a": 1})
        raise error

    async def main():
        return [text async for text in with_errors(events())]

    first, second, last = asyncio.run(main())
    assert first == 'data: {"a":1}\n\n' and last == "data: [DONE]\n\n"
    assert set(json.loads(second[6:])) == {"error"} and "secret" not in second


# --- routes


def test_routes_that_do_not_exist(server):
    for path in (
        "/static",
        "/docs",
        "/v1",
        "/v1/nope",
        "/v1/embeddings",
        "/chat/completions",
        "/debug/check",
        "/v1//models",
        "/" + "x" * 5000,
    ):
        for method in ("GET", "POST", "OPTIONS"):
            error = error_of(http.request(method, server.url + path), 404)
            assert error["type"] == "invalid_request_error" and len(error["message"]) < 500
            assert "makes text" in error["message"]
            assert "/v1/chat/completions, /v1/completions, /v1/engine" in error["message"]
            assert "/debug" not in error["message"].replace(path, "")
    assert http.post(server.url + "/debug/faults", json={}).status_code == 404


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("GET", "/v1/completions", "OPTIONS, POST"),
        ("HEAD", "/v1/completions", "OPTIONS, POST"),
        ("GET", "/v1/chat/completions/", "OPTIONS, POST"),
        ("PUT", "/v1/models", "GET, HEAD, OPTIONS"),
        ("POST", "/health", "GET, HEAD, OPTIONS"),
        ("PATCH", "/metrics", "GET, HEAD, OPTIONS"),
        ("DELETE", "/ping", "GET, HEAD, OPTIONS, POST"),
        ("PATCH", "/v1/responses/resp_1", "DELETE, GET, HEAD, OPTIONS"),
    ],
)
def test_methods_that_are_not_allowed(server, method, path, allowed):
    response = http.request(method, server.url + path)
    assert response.status_code == 405 and response.headers["allow"] == allowed
    if method != "HEAD":
        assert allowed in error_of(response, 405)["message"]
    asked = http.options(server.url + path)
    assert asked.status_code == 204 and asked.headers["allow"] == allowed and not asked.content


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny", "/version"])
def test_heads_and_slashes(server, path):
    whole = http.get(server.url + path)
    for one in (http.get(server.url + path + "/"), http.head(server.url + path)):
        assert one.status_code == whole.status_code == 200
        for name in ("content-type", "content-length"):
            assert one.headers[name] == whole.headers[name]
    assert http.get(server.url + path + "/").json() == whole.json()
    assert http.head(server.url + path).content == b""


def test_slashes_at_the_end_of_a_post(server):
    expected = solo_text(CHAT["messages"], 4)
    answer = server.post("/v1/chat/completions/", CHAT).json()
    assert answer["choices"][0]["message"]["content"] == expected


def test_models(server):
    listed = http.get(server.url + "/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["tiny", "team/tiny"] and listed[
        "object"
    ] == "list"
    assert listed["data"][0]["max_model_len"] == 2048
    for path in ("team/tiny", "team%2Ftiny"):
        assert http.get(f"{server.url}/v1/models/{path}").json() == listed["data"][1]
    card = listed["data"][0]
    assert card["root"] == "team/tiny" and card["parent"] is None, "the name on the hub"
    [permission] = card["permission"]
    assert permission["object"] == "model_permission" and permission["id"] == "modelperm-tiny"
    assert set(card) == {
        "id",
        "object",
        "created",
        "owned_by",
        "root",
        "parent",
        "max_model_len",
        "permission",
    }
    for path in ("team", "../tiny", "x" * 5000):
        error = error_of(http.get(f"{server.url}/v1/models/{path}"), 404)
        assert len(error["message"]) < 500
    for name in ("tiny", "team/tiny", None):
        assert server.post("/v1/chat/completions", CHAT | {"model": name}).json()["model"] == (
            name or "tiny"
        )
    assert (
        "team/tiny"
        in error_of(server.post("/v1/chat/completions", CHAT | {"model": "gpt"}), 404)[
            "message"
        ]
    )
    error_of(server.post("/v1/chat/completions", CHAT | {"model": ""}), 404)


def test_tokenize_and_back(server):
    found = server.post("/tokenize", {"prompt": "Hé", "return_token_strs": True}).json()
    assert found["tokens"] == TOKENIZER.encode("Hé") and found["count"] == 3 == len(
        found["token_strs"]
    )
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "Hé"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    messages = {"messages": CHAT["messages"]}
    count = server.post("/tokenize", messages).json()["count"]
    assert count == server.post("/v1/chat/completions", CHAT).json()["usage"]["prompt_tokens"]
    for body in ({}, {"prompt": "x"} | messages, {"prompt": 1}, {"messages": [{"role": "x"}]}):
        error_of(server.post("/tokenize", body), 400)
    for tokens in ([-1], [len(TOKENIZER)], [2**70], ["1"], [1.5], "x"):
        error_of(server.post("/detokenize", {"tokens": tokens}), 400)


TOOL = {"type": "function", "function": {"name": "weather", "description": "How it is."}}


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"add_generation_prompt": False},
        {"messages": [*CHAT["messages"], {"role": "assistant", "content": "So"}]},
        {"messages": [{"role": "assistant", "content": "So"}], "continue_final_message": True},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]},
    ],
)
def test_tokens_are_counted_as_a_chat_is_read(server, more):
    asked = CHAT | more
    count = server.post(
        "/tokenize",
        {k: v for k, v in asked.items() if k in more} | {"messages": asked["messages"]},
    ).json()["count"]
    usage = server.post("/v1/chat/completions", asked).json()["usage"]
    assert count == usage["prompt_tokens"]
    assert "tools" not in more or (count > 60) == ("tool_choice" not in more)


def test_what_tokenize_refuses(server):
    long = {"prompt": "x" * 2**20}
    assert error_of(server.post("/tokenize", long), 400)["code"] == "context_length_exceeded"
    chat = {"messages": [{"role": "user", "content": "x" * 2**20}]}
    for path in ("/tokenize", "/v1/chat/completions"):
        error = error_of(server.post(path, chat), 400)
        assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    tools = CHAT | {
        "tools": [{"type": "function", "function": {"name": "f", "description": "x" * 2**20}}]
    }
    assert error_of(server.post("/v1/chat/completions", tools), 400)["code"] == (
        "context_length_exceeded"
    )
    error_of(server.post("/tokenize", {"prompt": "x", "chat_template": "{{ x }}"}), 400)
    most = 2**16
    assert server.post("/detokenize", {"tokens": [65] * most}).status_code == 200
    assert (
        str(most)
        in error_of(server.post("/detokenize", {"tokens": [65] * (most + 1)}), 400)["message"]
    )


def test_special_tokens_around_a_chat(server, monkeypatch):
    plain = server.post("/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    monkeypatch.setattr(api_module, "encode", lambda tokenizer, text, special: [1] * special)
    for given in (True, False):
        found = server.post(
            "/tokenize", {"messages": CHAT["messages"], "add_special_tokens": given}
        ).json()["tokens"]
        assert found == [1] * given + plain


def test_small_endpoints(server):
    assert http.get(server.url + "/load").json() == {"server_load": 0}
    for ping in (http.get, http.post):
        assert ping(server.url + "/ping").json() == {"status": "ok"}
    info = http.get(server.url + "/tokenizer_info").json()
    assert info["tokenizer_class"] == type(TOKENIZER).__name__
    assert info["chat_template"] == TOKENIZER.chat_template
    assert info["eos_token"] == TOKENIZER.eos_token
    assert not any(
        "/" in value
        for name, value in info.items()
        if isinstance(value, str) and name != "chat_template"
    ), "no paths"


def test_load_counts_open_answers():
    with running(engine_options=dict(max_num_seqs=1), faults=True) as found:
        found.post("/debug/faults", {"step_delay_s": 0.02})
        body = LONG | {"stream": True, "n": 3}
        with httpx.stream("POST", found.url + "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert http.get(found.url + "/load").json() == {"server_load": 3}
        found.settled()


@pytest.mark.parametrize(
    "prefix, names",
    [("both", {"nanollm", "vllm"}), ("nanollm", {"nanollm"}), ("vllm", {"vllm"})],
)
def test_names_of_the_metrics(prefix, names):
    with running(metrics_prefix=prefix) as found:
        found.post("/v1/completions", {"prompt": "x", "max_tokens": 2})
        lines = [line for line in found.get("/metrics").text.splitlines() if line[:1] != "#"]
        assert {line.split(":")[0] for line in lines} == names
        assert all(
            f'{name}:generation_tokens_total{{model_name="tiny"}} 2.0' in lines
            for name in names
        )


def test_roots():
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert root_of(("SmolLM2", hub), "/home/me/.cache/nanollm") == hub
    assert root_of(("mine",), "Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert root_of(("mine",), "/models/a") == root_of(("mine",), "") == "mine"
    assert root_of(("mine",), "nanollm/serve") == "mine", "a folder, not a name on the hub"


def test_unknown_fields_are_logged_once():
    with running() as found:
        records = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        logger = logging.getLogger("nanollm.serve.api")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            for path, body in (
                ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
                ("/v1/chat/completions", CHAT),
                ("/tokenize", {"prompt": "x"}),
            ):
                for _ in range(2):
                    more = {"x_mine": 1, "a\nb": 2}
                    assert found.post(path, body | more).status_code == 200
            for i in range(4):
                more = {f"f{i}_{k}": 1 for k in range(200)}
                found.post("/tokenize", {"prompt": "x"} | more)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        assert len(records) == len(set(records)) == api_module.MAX_NAMES
        assert sum("'x_mine'" in text for text in records) == 1
        assert all("\n" not in text and len(text) < 200 for text in records)


def test_defaults_of_the_model():
    with running() as found:
        found.api.sampling_defaults |= {"temperature": 0.0, "max_tokens": 5}
        ask = {"messages": CHAT["messages"], "ignore_eos": True}
        answer = found.post("/v1/chat/completions", ask).json()
        assert answer["usage"]["completion_tokens"] == 5
        text = answer["choices"][0]["message"]["content"]
        assert (
            text
            == found.post("/v1/chat/completions", ask).json()["choices"][0]["message"][
                "content"
            ]
        ), "greedy, since nobody said otherwise"
        own = found.post("/v1/chat/completions", ask | {"max_tokens": 3}).json()
        assert own["usage"]["completion_tokens"] == 3


def test_what_the_engine_is_told(locked, monkeypatch):
    seen, submit = [], locked.api.engine.submit

    def spy(prompt_ids, params, request_id, **options):
        seen.append((request_id, time.perf_counter(), options))
        return submit(prompt_ids, params, request_id, **options)

    monkeypatch.setattr(locked.api.engine, "submit", spy)
    before = time.perf_counter()
    body = {"prompt": ["x", "y"], "max_tokens": 1, "cache_salt": "salt"}
    name = locked.post("/v1/completions", body, key="one").json()["id"]
    tenant = hashlib.sha256(b"one").hexdigest()
    assert [request_id for request_id, _, _ in seen] == [f"{name}-0", f"{name}-1"]
    for _, submitted_s, options in seen:
        assert options["shares"] == (tenant, name) and options["priority"] == 0
        assert options["cache_salt"] == f"{tenant}/salt"
        assert before < options["arrival_s"] < submitted_s, "when the gate saw it"


@pytest.mark.parametrize("stream", [False, True])
def test_long_reports_are_written_beside_the_loop(server, monkeypatch, stream):
    threads, write = [], Choices.__call__

    def spy(self, i, new):
        threads.append(threading.current_thread().name)
        return write(self, i, new)

    monkeypatch.setattr(Choices, "__call__", spy)
    for length, aside in ((10, False), (500, True)):
        threads.clear()
        server.post(
            "/v1/completions",
            {
                "prompt": [65] * length,
                "echo": True,
                "logprobs": 1,
                "max_tokens": 1,
                "stream": stream,
            },
        )
        assert threads and threads[0].startswith("asyncio_") == aside


def test_input_tokens_are_those_that_are_read(server):
    body = {"input": "count me", "instructions": "Be brief."}
    count = server.post("/v1/responses/input_tokens", body).json()
    used = server.post("/v1/responses", body | {"max_output_tokens": 1}).json()["usage"]
    assert count == {"object": "response.input_tokens", "input_tokens": used["input_tokens"]}


def story(found, name, key=None):
    return found.get(f"/v1/requests/{name}/trace", key=key)


def test_traces(server):
    body = {"prompt": ["a", "b"], "max_tokens": 3, "ignore_eos": True}
    made = server.post("/v1/completions", body).json()
    for i in range(2):
        events = story(server, f"{made['id']}-{i}").json()["events"]
        kinds = [event["event"] for event in events]
        assert kinds[:2] == ["queued", "admitted"] and kinds[-1] == "finished"
        assert events[-1]["finish_reason"] == "length"
        assert sum(event.get("num_made", 0) for event in events) == 3
    several = server.post("/v1/completions", body | {"prompt": "a", "n": 3}).json()
    told = story(server, several["id"]).json()
    assert told["request_id"] == several["id"]
    assert [e["index"] for e in told["events"] if e["event"] == "finished"] == [0, 1, 2]
    error_of(story(server, "none"), 404)


def test_traces_are_for_their_own_tenant():
    with running(api_keys=("one", "two"), enable_request_traces=True) as found:
        for n in (1, 2):
            body = {"prompt": "secret", "max_tokens": 1, "n": n}
            name = found.post("/v1/completions", body, key="one").json()["id"]
            assert story(found, name, key="one").json()["events"]
            error_of(story(found, name, key="two"), 404)
            error_of(story(found, f"{name}.0", key="two"), 404)


def test_faults_are_checked():
    with running(engine_options=dict(self_check=False), faults=True) as found:
        for body in (
            {"step_delay_s": 61},
            {"step_delay_s": -1},
            {"fail_forwards": -1},
            {"preempt_every": "x"},
        ):
            error_of(found.post("/debug/faults", body), 400)
        assert found.post("/debug/faults", {"step_delay_s": 0.01}).status_code == 200
        assert http.get(found.url + "/debug/check").json() == {"ok": True}
        found.engine.check = lambda: 1 / 0
        error = error_of(http.get(found.url + "/debug/check"), 500)
        del found.engine.check
        assert "zero" not in error["message"]


# --- answers


def test_limit_of_the_server(locked):
    def ask(path, body):
        return locked.post(path, body, headers={"authorization": "Bearer one"})

    for path, body, name in (
        ("/v1/completions", {"prompt": "x"}, "max_tokens"),
        ("/v1/chat/completions", {"messages": CHAT["messages"]}, "max_tokens"),
        ("/v1/chat/completions", {"messages": CHAT["messages"]}, "max_completion_tokens"),
        ("/v1/responses", {"input": "x"}, "max_output_tokens"),
    ):
        usage = ask(path, body | {"ignore_eos": True}).json()["usage"]
        assert usage.get("completion_tokens", usage.get("output_tokens")) == 8, (
            "what nobody asked for is no error"
        )
        assert ask(path, body | {name: 8}).status_code == 200
        error = error_of(ask(path, body | {name: 9}), 400)
        assert (
            error["param"] == name
            and "at most 8" in error["message"]
            and "9" in error["message"]
        )
    error = error_of(ask("/v1/responses", {"input": "x", "max_tokens": 99}), 400)
    assert error["param"] == "max_tokens", "no field of this form"
    error = error_of(ask("/v1/completions", {"prompt": "x", "min_tokens": 9}), 400)
    assert error["param"] == "min_tokens" and "at most 8" in error["message"]
    assert ask("/v1/completions", {"prompt": "x", "min_tokens": 8}).status_code == 200


def test_context_length(server):
    body = {"prompt": [65] * 2047, "max_tokens": 1}
    assert server.post("/v1/completions", body).json()["usage"]["prompt_tokens"] == 2047
    for bad in ({"max_tokens": 2}, {"prompt": [65] * 2048}):
        error = error_of(server.post("/v1/completions", body | bad), 400)
        assert error["code"] == "context_length_exceeded" and "2048" in error["message"]
    error_of(server.post("/v1/responses", {"input": "x" * 3000}), 400)


def test_several_prompts_are_one_batch_or_none(server):
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 5, "temperature": 0}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert [c["text"] for c in choices] == [
        solo_text(text, 5) for text in ("one", "one", "two", "two")
    ]
    started = server.metrics()["request_started_total"]
    error_of(server.post("/v1/completions", body | {"prompt": [[65], [66], [10**6]]}), 400)
    server.settled()
    assert server.metrics()["request_started_total"] - started == 4, (
        "the good ones were begun and dropped"
    )
    assert [bool(s) for s in server.api.engine.streams.values()] == []


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_nothing_new(server, stream):
    body = {
        "prompt": ["ab", [67, 68]],
        "n": 2,
        "max_tokens": 0,
        "echo": True,
        "logprobs": 1,
        "stream": stream,
    }
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    response = server.post("/v1/completions", body)
    if stream:
        events = [
            json.loads(text[6:])
            for text in response.text.split("\n\n")
            if text.startswith("data: {")
        ]
        choices, usage = (
            sorted((c for e in events for c in e["choices"]), key=lambda c: c["index"]),
            events[-1]["usage"],
        )
        assert all("usage" in event for event in events)
    else:
        choices, usage = response.json()["choices"], response.json()["usage"]
    assert [c["text"] for c in choices] == ["ab", "ab", "CD", "CD"]
    assert [c["finish_reason"] for c in choices] == ["length"] * 4
    for choice in choices:
        reports = choice["logprobs"]
        assert (
            reports["token_logprobs"][0] is None
            and reports["token_logprobs"][1] < 0
            and reports["text_offset"] == [0, 1]
        )
    assert usage["completion_tokens"] == 0 and usage["prompt_tokens"] == 4


def test_echo_in_front_of_the_first_event_only(server):
    body = {
        "prompt": "ab",
        "max_tokens": 6,
        "echo": True,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
    }
    events = [
        json.loads(text[6:])
        for text in server.post("/v1/completions", body).text.split("\n\n")
        if text.startswith("data: {")
    ]
    text = "".join(e["choices"][0]["text"] for e in events)
    assert text.startswith("ab") and text.count("ab") == 1
    assert all(e["choices"][0]["text"] or e["choices"][0]["finish_reason"] for e in events), (
        "no empty events"
    )


def test_priority():
    for policy, status in (("fcfs", 400), ("priority", 200)):
        with running(engine_options=dict(scheduling_policy=policy)) as found:
            for path, body in (
                ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
                ("/v1/chat/completions", CHAT),
                ("/v1/responses", {"input": "x", "max_output_tokens": 1}),
            ):
                response = found.post(path, body | {"priority": -1})
                assert response.status_code == status
                if status == 400:
                    assert error_of(response, 400)["param"] == "priority"
                assert found.post(path, body | {"priority": 0}).status_code == 200


def test_full_queue_and_draining():
    with running(
        engine_options=dict(max_num_seqs=1), max_queued_requests=1, faults=True
    ) as found:
        found.post("/debug/faults", {"step_delay_s": 0.02})
        with httpx.stream(
            "POST", found.url + "/v1/completions", json=LONG | {"stream": True}, timeout=20
        ) as response:
            lines = response.iter_lines()
            next(lines)
            refused = found.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1})
            assert (
                refused.headers["retry-after"] == "1"
                and error_of(refused, 503)["code"] == "overloaded"
            )
            assert len(found.api.engine.streams) == 1, "the first of the two was taken back"
        found.settled()
        found.api.engine.draining = True
        error_of(http.get(found.url + "/health"), 503)
        error_of(found.post("/v1/chat/completions", CHAT), 503)
        found.api.engine.draining = False
        assert http.get(found.url + "/health").status_code == 200


# --- clients that leave


@pytest.fixture(scope="module")
def slow():
    with running(engine_options=dict(max_num_seqs=1), faults=True) as found:
        found.post("/debug/faults", {"step_delay_s": 0.01})
        yield found
        found.settled()


def leave(server, path, body, timeout_s=0.3):
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url + path, json=body, timeout=timeout_s)


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", LONG),
        ("/v1/completions", LONG | {"prompt": ["a", "b", "c"], "n": 2}),
        ("/v1/chat/completions", CHAT | {"max_tokens": 1500, "ignore_eos": True}),
        ("/v1/responses", {"input": "x", "ignore_eos": True}),
        ("/v1/responses", {"input": "x", "ignore_eos": True, "store": False}),
    ],
)
def test_a_client_leaves_while_it_waits(slow, path, body):
    leave(slow, path, body)
    slow.settled(5.0)
    with httpx.stream(
        "POST", slow.url + path, json=body | {"stream": True}, timeout=20
    ) as response:
        for _ in zip(response.iter_lines(), range(8)):
            pass
    slow.settled(5.0)


def test_a_client_leaves_the_queue(slow):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.post, "/v1/completions", LONG | {"max_tokens": 60})
        time.sleep(0.1)
        leave(slow, "/v1/completions", LONG, 0.2)
        assert first.result().json()["usage"]["completion_tokens"] == 60
    slow.settled(5.0)


def test_a_client_leaves_while_its_prompt_is_tokenized(slow, monkeypatch):
    begun = []

    def crawl(*args, **options):
        begun.append(1)
        time.sleep(0.5)
        return [65]

    started = slow.metrics()["request_started_total"]
    for name, path, body in (
        ("encode", "/v1/completions", LONG),
        ("encode_chat", "/v1/chat/completions", CHAT),
    ):
        monkeypatch.setattr(api_module, name, crawl)
        leave(slow, path, body, 0.2)
    time.sleep(0.6)
    assert len(begun) == 2 and slow.metrics()["request_started_total"] == started
    slow.settled(5.0)


def test_a_background_response_stays(slow):
    made = slow.post(
        "/v1/responses",
        {"input": "x", "background": True, "max_output_tokens": 5, "ignore_eos": True},
    ).json()
    assert made["status"] == "queued"
    slow.settled()
    assert (
        http.get(f"{slow.url}/v1/responses/{made['id']}").json()["usage"]["output_tokens"] == 5
    )


def test_an_unexpected_error_says_nothing(monkeypatch, caplog):
    with running() as found:

        def broken(*args, **options):
            raise RuntimeError("/secret/path.py went wrong")

        monkeypatch.setattr(api_module, "encode_chat", broken)
        error = error_of(found.post("/v1/chat/completions", CHAT), 500)
        assert error["code"] == "server_error" and "secret" not in error["message"]
        monkeypatch.undo()
        assert found.post("/v1/chat/completions", CHAT).status_code == 200


def test_the_description(server):
    paths = http.get(server.url + "/openapi.json").json()["paths"]
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/health",
        "/metrics",
        "/v1/models/{name}",
    } <= set(paths)
    assert "/debug/faults" not in paths and "/v1/requests/{request_id}/trace" in paths
