"""The server under fire: hostile requests, vanishing clients, faults, the end of a process."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from faults import Busy
from server_fixtures import GRAMMARS, running, solo_text

from nanollm.serve import api
from nanollm.serve.text_pool import SHORT_TEXT
from nanollm.structured_output import StructuredOutputsParams

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps all day long".split()


def prompts(n, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 20))) for _ in range(n)]


async def read_stream(client, body, path="/v1/completions", stop_after=None):
    "Text and usage of a stream; leave after `stop_after` events, if given."
    text, usage, error, events = "", None, None, 0
    async with client.stream(
        "POST", path, json=body | {"stream": True, "stream_options": {"include_usage": True}}
    ) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            events += 1
            if events == stop_after:
                return None
            if line == "data: [DONE]":
                return text, usage, error
            event = json.loads(line[6:])
            error = event.get("error", error)
            usage = event.get("usage") or usage
            text += "".join(choice["text"] for choice in event.get("choices", ()))
    raise AssertionError("the stream has no end")


def body(prompt, max_tokens, **more):
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}


def gather(url, *jobs):
    "Run coroutines that take a client, all at once."

    async def run():
        async with httpx.AsyncClient(
            base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)
        ) as client:
            return await asyncio.gather(*(job(client) for job in jobs))

    return asyncio.run(run())


DEEP = "[" * 3000 + "]" * 3000
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def function(schema, name="f", **more):
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


HOSTILE = [  # path, body: text or JSON
    *(
        ("/v1/completions", {"prompt": "x", **bad})
        for bad in (
            {"logit_bias": {"999999": 1}},
            {"logit_bias": {"-1": 1}},
            {"logit_bias": {"1": 1e9}},
            {"stop_token_ids": [10**6]},
            {"stop_token_ids": [-1]},
            {"stop_token_ids": [2**63]},
            {"n": 0},
            {"n": 10**9},
            {"n": -1},
            {"logprobs": 6},
            {"logprobs": 10**6},
            {"max_tokens": -1},
            {"max_tokens": 10**9},
            {"max_tokens": 2**70},
            {"temperature": -1},
            {"temperature": 1e308},
            {"top_p": 0},
            {"top_k": -2},
            {"min_p": 2},
            {"seed": 2**64},
            {"stop": ["a"] * 17},
            {"stop": [""]},
            {"stop": ["x" * 10**5]},
            {"repetition_penalty": 0},
            {"presence_penalty": 9},
            {"logit_bias": {str(i): 1 for i in range(2000)}},
            {"model": "no-such-model"},
            {"response_format": {"type": "json_objects"}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            {"structured_outputs": {"regex": "(" * 20000}},
            {"structured_outputs": {"json": {"type": "integer", "not": {}}}},
            {"structured_outputs": {"json": {"$ref": "#"}}},
            {"structured_outputs": {"choice": ["x"] * 10000}},
            {"structured_outputs": {"grammar": "start: start"}},
            {"guided_json": {"type": "object"}},
            {"suffix": "x"},
            {"best_of": 5},
        )
    ),
    ("/v1/completions", {"prompt": [999999]}),
    ("/v1/completions", {"prompt": [-1]}),
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": [[]]}),
    ("/v1/completions", {"prompt": [1.5]}),
    ("/v1/completions", {"prompt": {"a": 1}}),
    ("/v1/completions", {"prompt": ["a"] * 2000}),
    ("/v1/completions", {"prompt": "x" * 3000}),
    ("/v1/completions", {"prompt": [1] * 3000}),
    ("/v1/completions", '{"prompt": "x", "temperature": NaN}'),
    ("/v1/completions", '{"prompt": "\\ud800"}'),
    ("/v1/completions", '{"prompt": ' + DEEP + "}"),
    ("/v1/completions", b"\xff\xfe"),
    ("/v1/completions", ""),
    ("/v1/completions", "[]"),
    ("/v1/completions", '{"prompt": "x", "max_tokens": 1' + "0" * 5000 + "}"),
    *(
        ("/v1/chat/completions", CHAT | bad)
        for bad in (
            {"messages": []},
            {"messages": "x"},
            {"messages": [1]},
            {"messages": [{"role": "x", "content": "x"}]},
            {"messages": [{"role": "user"}]},
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}],
                    }
                ]
            },
            {"top_logprobs": 21, "logprobs": True},
            {"top_logprobs": 2},
            {"tool_choice": "required"},
            {"tools": [function({"not": {}}, strict=True)]},
            {"tools": [function({})] * 2},
            {"tools": [function({})] * 129},
            {"tools": [function({}, name="x" * 65)]},
            {"tools": [function({})], "tool_choice": {"type": "function", "name": "g"}},
            {"chat_template": "{{ 7 * 7 }}"},
            {"tools": [{"type": "x"}]},
            {"stream_options": {"include_usage": True}},
            {"max_tokens": 0},
            {"stream": "yes"},
            {"response_format": {"type": "json_schema"}},
            {"metadata": {"a": {}}},
        )
    ),
    *(
        ("/v1/responses", {"input": "x", **bad})
        for bad in (
            {"input": []},
            {"input": 5},
            {"input": [{"type": "x"}]},
            {"previous_response_id": "resp_x"},
            {"background": True, "store": False},
            {"text": {"format": {"type": "json_objects"}}},
            {"tools": [{"type": "web_search"}]},
            {"max_output_tokens": 0},
            {"n": 2},
        )
    ),
]


def test_hostile_requests_change_nothing_for_healthy_streams():
    texts = prompts(8, seed=1)
    with running(max_body_bytes=2**20) as server:
        before = gather(
            server.url, *(lambda c, p=p: read_stream(c, body(p, 60)) for p in texts)
        )
        assert [text for text, _, _ in before] == [solo_text(p, 60) for p in texts]

        async def hostile(client, path, content):
            content = content if isinstance(content, str | bytes) else json.dumps(content)
            response = await client.post(path, content=content)
            assert 400 <= response.status_code < 500, (
                content[:200],
                response.status_code,
                response.text[:300],
            )
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
            assert len(error["message"]) < 700 and not re.search(
                r"Traceback|/work|\.py\b|0x[0-9a-f]{6}", error["message"]
            )

        healthy = [lambda c, p=p: read_stream(c, body(p, 60)) for p in texts]
        attacks = [
            lambda c, path=path, content=content: hostile(c, path, content)
            for path, content in HOSTILE
        ]
        assert len(attacks) >= 40
        during = gather(server.url, *healthy, *attacks, lambda c: too_large(c))[:8]
        assert [text for text, _, _ in during] == [text for text, _, _ in before]
        server.settled()


async def too_large(client):
    assert (await client.post("/v1/completions", content=b"x" * (2**20 + 1))).status_code == 413


async def vanish_or_read(client, i, gone, text, draw):
    "A client that reads to the end, or leaves: in a stream, or waiting for a whole answer."
    if not gone:
        return await read_stream(client, body(text, 24))
    if i % 2:  # gone in the middle of a stream
        return await read_stream(client, body(text, 400), stop_after=draw.randint(1, 12))
    try:  # gone while waiting for a whole answer
        await client.post(
            "/v1/chat/completions",
            timeout=draw.uniform(0.01, 0.3),
            json={
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 400,
                "n": 2,
                "ignore_eos": True,
            },
        )
    except httpx.TimeoutException:
        pass


def test_half_of_the_clients_vanish():
    draw = random.Random(5)
    with running(engine_options=dict(num_kv_blocks=128, max_num_seqs=16)) as server:
        for round_ in range(5):
            texts = prompts(64, seed=round_)
            lost = set(draw.sample(range(64), 32))

            jobs = [
                lambda c, i=i, gone=i in lost, text=texts[i]: vanish_or_read(
                    c, i, gone, text, draw
                )
                for i in range(64)
            ]
            results = gather(server.url, *jobs)
            for i in set(range(64)) - lost:
                text, usage, error = results[i]
                assert error is None and text == solo_text(texts[i], 24)
                assert usage["prompt_tokens"] == len(texts[i].encode())
            server.settled(2.0)
        reasons = httpx.get(server.url + "/metrics").text
        assert re.search(
            r'request_success_total\{finished_reason="abort",model_name="tiny"\} [1-9]', reasons
        )


def test_counters_are_the_sums_of_usage():
    with running() as server:
        jobs = [
            body(p, 20, n=1 + i % 3, seed=i, temperature=1.0)
            for i, p in enumerate(prompts(12, seed=3))
        ]
        with ThreadPoolExecutor(12) as pool:
            usages = [
                r.json()["usage"]
                for r in pool.map(lambda job: server.post("/v1/completions", job), jobs)
            ]
        server.settled()
        found = server.metrics()
        for name, counter in (
            ("prompt_tokens", "prompt_tokens_total"),
            ("completion_tokens", "generation_tokens_total"),
        ):
            assert found[counter] == sum(usage[name] for usage in usages)
        assert found["request_started_total"] == sum(job["n"] for job in jobs)


def test_forced_preemption_under_streaming_changes_nothing():
    texts = prompts(12, seed=7)
    with running(faults=True, engine_options=dict(num_kv_blocks=256)) as server:
        assert server.post("/debug/faults", {"preempt_every": 3}).status_code == 200
        results = gather(
            server.url, *(lambda c, p=p: read_stream(c, body(p, 40)) for p in texts)
        )
        assert [text for text, _, _ in results] == [solo_text(p, 40) for p in texts]
        assert server.metrics()["num_preemptions_total"] > 10
        assert httpx.get(server.url + "/debug/check").json()["ok"]
        server.settled()


SCHEMA = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"enum": ["ant", "bee", "cat"]}, "maxItems": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["names", "size"],
    "additionalProperties": False,
}
HELD = [
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"regex": "(yes|no)(, (yes|no)){3,12}"}},
    {"structured_outputs": {"choice": ["a long walk", "a longer one"]}},
    {"response_format": {"type": "json_object"}},
]


def test_held_answers_amid_hang_ups_and_preemptions_are_what_they_are_alone():
    jobs = [
        body(text, 60, **HELD[i % 4], temperature=1.0, seed=i)
        for i, text in enumerate(prompts(16, seed=21))
    ]
    free = prompts(8, seed=22)
    with running(faults=True, engine_options=dict(num_kv_blocks=256)) as server:
        alone = [gather(server.url, lambda c, job=job: read_stream(c, job))[0] for job in jobs]
        for (text, _, error), job in zip(alone, jobs):
            assert error is None
            if job.get("structured_outputs", {}).get("regex"):
                assert re.fullmatch(HELD[1]["structured_outputs"]["regex"], text)
        server.post("/debug/faults", {"preempt_every": 3})

        def leaving(job, i):
            return lambda c: read_stream(c, job | {"seed": i}, stop_after=1 + i % 9)

        for round_ in range(3):
            lost = [leaving(job, 100 * round_ + i) for i, job in enumerate(jobs)]
            kept = [lambda c, job=job: read_stream(c, job) for job in jobs]
            plain = [lambda c, p=p: read_stream(c, body(p, 40)) for p in free]
            mixed = [*kept, *lost, *plain]
            order = random.Random(round_).sample(range(len(mixed)), len(mixed))
            results = gather(server.url, *(mixed[i] for i in order))
            found = {i: result for i, result in zip(order, results)}
            assert [found[i][0] for i in range(16)] == [text for text, _, _ in alone]
            assert [found[i][0] for i in range(32, 40)] == [solo_text(p, 40) for p in free]
            server.settled()
        assert server.metrics()["num_preemptions_total"] > 10


class Slow:
    "Grammars that take their time over what they have not seen."

    def __init__(self, grammars):
        self.grammars, self.go_on = grammars, threading.Event()
        self.write, self.known, self.prepare = grammars.write, grammars.known, grammars.prepare

    def make(self, text, field):
        assert self.go_on.wait(20)
        return self.grammars.make(text, field)


def test_who_has_many_grammars_waiting_for_long_is_told_to_come_again(monkeypatch):
    slow = Slow(GRAMMARS)
    with (
        running(grammars=slow, api_keys=("a", "b")) as server,
        ThreadPoolExecutor(12) as pool,
    ):

        def ask(key, text):
            own = {"structured_outputs": {"regex": text}}
            return server.post("/v1/completions", body("x", 9, **own), key=key)

        monkeypatch.setattr(api, "MAX_NEW_S", 60.0)
        texts = [f"new {i}" for i in range(9)]  # a burst is no reason
        waiting = [pool.submit(ask, "a", text) for text in texts]
        while len(server.api.new_grammars) < 9:
            time.sleep(0.01)
        monkeypatch.setattr(api, "MAX_NEW_S", 0.0)
        refused = ask("a", "four")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "new grammars" in refused.json()["error"]["message"]
        other = pool.submit(ask, "b", "four")
        time.sleep(0.1)
        slow.go_on.set()
        found = [one.result().json()["choices"][0]["text"] for one in (*waiting, other)]
        assert found == [*texts, "four"] and not server.api.new_grammars
        assert ask("a", "five").json()["choices"][0]["text"] == "five"
        server.settled()


def test_a_slow_grammar_keeps_nobody_waiting_but_other_new_ones():
    slow = Slow(GRAMMARS)
    known = {"structured_outputs": {"regex": "(yes|no){3}"}}
    GRAMMARS.compile(StructuredOutputsParams(**known["structured_outputs"]))
    with running(grammars=slow) as server, ThreadPoolExecutor(8) as pool:

        def waiting(i):
            new = {"structured_outputs": {"regex": f"new{i}"}}
            return server.post("/v1/completions", body("x", 9, **new)).json()

        new = [pool.submit(waiting, i) for i in range(4)]
        asked = body("x", 9, **known)
        done = gather(server.url, *(lambda c: read_stream(c, asked) for _ in "ab"))
        assert all(re.fullmatch("(yes|no){3}", text) for text, _, _ in done)
        [(text, _, _)] = gather(server.url, lambda c: read_stream(c, body("hello", 9)))
        assert text == solo_text("hello", 9)
        assert not any(one.done() for one in new)
        with pytest.raises(httpx.TimeoutException):  # its job is dropped
            late = body("x", 9, structured_outputs={"regex": "late"})
            httpx.post(server.url + "/v1/completions", json=late, timeout=0.2)
        slow.go_on.set()
        texts = [one.result()["choices"][0]["text"] for one in new]
        assert texts == ["new0", "new1", "new2", "new3"]
        server.settled()


def test_a_request_that_fails_fails_alone():
    with running(faults=True) as server:
        server.post("/debug/faults", {"fail_request": "doomed"})
        texts = prompts(4, seed=9)

        async def doomed(client):
            client.headers["x-request-id"] = "doomed"
            return await client.post("/v1/completions", json=body("x", 5))

        async def alone(client):
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as own:
                return await doomed(own)

        *healthy, failed = gather(
            server.url, *(lambda c, p=p: read_stream(c, body(p, 40)) for p in texts), alone
        )
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "server_error"
        assert failed.headers["x-request-id"] == "doomed"
        assert [text for text, _, _ in healthy] == [solo_text(p, 40) for p in texts]
        server.settled()


def test_a_failed_forward_ends_the_open_streams_and_the_server_goes_on():
    with running(faults=True) as server:
        server.post("/debug/faults", {"step_delay_s": 0.02})

        async def fail(client):
            await asyncio.sleep(0.4)
            await client.post("/debug/faults", json={"fail_forwards": 1})

        *results, _ = gather(
            server.url,
            *(lambda c: read_stream(c, body("hello", 500, ignore_eos=True)) for _ in range(4)),
            fail,
        )
        assert all(
            error["code"] == "server_error" and "purpose" not in error["message"]
            for _, _, error in results
        )
        server.settled()
        assert gather(server.url, lambda c: read_stream(c, body("hello", 5)))[0][
            0
        ] == solo_text("hello", 5)


def test_slow_readers_disturb_nobody():
    with running(send_buffer=2**14) as server:
        host, port = server.url.removeprefix("http://").split(":")
        content = json.dumps(
            body("slow", 600, ignore_eos=True, stream=True, n=4, logprobs=5)
        ).encode()
        sockets = []
        for _ in range(8):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(content), content)
            )
            sockets.append(sock)
        text, _, _ = gather(server.url, lambda c: read_stream(c, body("quick", 40)))[0]
        assert text == solo_text("quick", 40)
        deadline = time.monotonic() + 40
        while server.engine.has_unfinished:  # it computes all, whether or not somebody reads
            assert time.monotonic() < deadline
            time.sleep(0.1)
        held = [stream for stream in server.api.engine.streams.values() if stream._pending]
        assert held and all(len(stream._pending) <= 4 for stream in held), (
            "at most one delta for each answer"
        )
        for sock in sockets:
            sock.close()
        server.settled()


# --- texts


class Occupied:
    "A server whose two threads for texts are kept; what they encode later is noted."

    def __init__(self, server, monkeypatch):
        self.server, self.order, encode = server, [], api.encode

        def note(tokenizer, text, *options):
            self.order.append(text[:2])
            return encode(tokenizer, text, *options)

        monkeypatch.setattr(api, "encode", note)
        self.long, self.short = Busy(), Busy()
        for busy, size in ((self.long, SHORT_TEXT), (self.short, 0)):
            job = server.api.engine.run(busy, tenant="busy", size=size)
            asyncio.run_coroutine_threadsafe(job, server.loop)
            assert busy.begun.wait(30)

    def post(self, name, key, timeout_s=30, size=SHORT_TEXT):
        "Send a text that begins with `name`, and return when the server has read it."
        num = self.num_waiting + 1
        pool = ThreadPoolExecutor(1)
        body, headers = {"prompt": name + "x" * size}, self.server.headers(key)
        url = self.server.url + "/tokenize"
        answer = pool.submit(httpx.post, url, json=body, headers=headers, timeout=timeout_s)
        deadline = time.monotonic() + 30
        while self.num_waiting < num:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return answer

    @property
    def num_waiting(self):
        return len(self.server.api.engine._calls.waiting)

    def release(self):
        self.long.end.set()
        self.short.end.set()


def test_long_texts_of_one_tenant_delay_those_of_another_by_one(monkeypatch):
    with running(api_keys=("key-a", "key-b")) as server:
        occupied = Occupied(server, monkeypatch)
        answers = [occupied.post(f"a{i}", "key-a") for i in range(6)]
        answers += [occupied.post(f"b{i}", "key-b") for i in range(2)]
        quick = occupied.post("q0", "key-a", size=10)
        occupied.short.end.set()  # a short one, of whomever, waits for none of them
        assert quick.result().status_code == 200 and occupied.order == ["q0"]
        occupied.long.end.set()
        assert {answer.result().status_code for answer in answers} == {200}
        assert occupied.order[1:] == "a0 b0 a1 b1 a2 a3 a4 a5".split()
        server.settled()


def test_texts_of_clients_that_hung_up_are_not_encoded(monkeypatch):
    with running() as server:
        occupied = Occupied(server, monkeypatch)
        gone = [occupied.post(f"g{i}", None, timeout_s=4) for i in range(4)]
        late = occupied.post("l0", None)
        for answer in gone:
            with pytest.raises(httpx.TimeoutException):
                answer.result()
        deadline = time.monotonic() + 30
        while occupied.num_waiting > 3:  # the two that are kept, and the late one
            assert time.monotonic() < deadline
            time.sleep(0.005)
        occupied.release()
        assert late.result().status_code == 200 and occupied.order == ["l0"]
        server.settled()


def test_texts_that_cannot_fit_are_refused_before_they_are_encoded(monkeypatch):
    with running() as server:
        occupied = Occupied(server, monkeypatch)  # so that whatever is encoded waits for ever
        most = server.api.engine.max_chars
        for path, body in (
            ("/v1/completions", {"prompt": "x" * (most + 1)}),
            ("/v1/completions", {"prompt": ["x", "x" * (most + 1)]}),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "x" * most + "x"}]},
            ),
            ("/v1/responses", {"input": "x" * (most + 1)}),
            ("/tokenize", {"prompt": "x" * (most + 1)}),
        ):
            answer = server.post(path, body)
            assert answer.status_code == 400, (path, answer.text)
            error = answer.json()["error"]
            assert error["code"] == "context_length_exceeded", (path, error)
            assert str(most) in error["message"]
        assert not occupied.order
        occupied.release()
        server.settled()


# --- the process

SERVE = [
    sys.executable,
    str(Path(__file__).with_name("faults.py")),
    "--model",
    "tiny-llama",
    "--load-format",
    "dummy",
    "--dtype",
    "float32",
    "--port",
    "0",
]


class Process:
    "`nanollm-serve` in a process of its own."

    def __init__(self, *options):
        self.lines, self.process = (
            [],
            subprocess.Popen(
                [*SERVE, *options],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            ),
        )
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"on (http://\S+)", line):
                self.url = found[1]
                break
        self.thread = threading.Thread(
            target=lambda: self.lines.extend(self.process.stderr), daemon=True
        )
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.thread.join()


def streams_with_signals(server, num_streams, num_tokens, *numbers):
    "Send signals once all streams have begun; return what they had, and a late status."
    begun, late = [], []

    async def one(client):
        begun.append(1)
        try:
            return await read_stream(client, body("hello", num_tokens, ignore_eos=True))
        except httpx.HTTPError as error:
            return error

    async def signals(client):
        while len(begun) < num_streams:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        for number in numbers:
            server.process.send_signal(number)
            await asyncio.sleep(0.2)
        try:
            late.append(
                (await client.post("/v1/completions", json=body("late", 1))).status_code
            )
        except httpx.HTTPError:
            late.append("refused")

    *results, _ = gather(server.url, *[one] * num_streams, signals)
    return results, late[0]


def test_sigterm_loses_nothing():
    with Process() as server:
        httpx.post(server.url + "/debug/faults", json={"step_delay_s": 0.02})
        results, late = streams_with_signals(server, 32, 100, signal.SIGTERM)
        assert late in (503, "refused")
        expected = gather_text(results)
        assert len(set(expected)) == 1 and all(
            usage["completion_tokens"] == 100 for _, usage, _ in results
        )
        assert server.process.wait(20) == 0, server.lines
    assert any("everything promised was delivered" in line for line in server.lines)


def gather_text(results):
    assert not [result for result in results if isinstance(result, Exception) or result[2]], (
        results
    )
    return [text for text, _, _ in results]


def test_sigterm_with_too_little_time_says_so():
    with Process("--shutdown-timeout", "0.3") as server:
        httpx.post(server.url + "/debug/faults", json={"step_delay_s": 0.05})
        results, _ = streams_with_signals(server, 8, 1000, signal.SIGTERM)
        assert all(error["code"] == "overloaded" for _, _, error in results)
        assert server.process.wait(20) == 1


def test_second_signal_ends_at_once():
    with Process() as server:
        httpx.post(server.url + "/debug/faults", json={"step_delay_s": 0.05})
        results, late = streams_with_signals(server, 2, 1000, signal.SIGINT, signal.SIGINT)
        assert (
            all(isinstance(result, httpx.HTTPError) for result in results) and late == "refused"
        )
        assert server.process.wait(20) == 128 + signal.SIGINT


def test_three_failed_steps_in_a_row_end_the_process():
    with Process() as server:
        httpx.post(server.url + "/debug/faults", json={"fail_forwards": 100})
        statuses = []
        with pytest.raises(httpx.HTTPError):
            for _ in range(50):
                statuses.append(
                    httpx.post(
                        server.url + "/v1/completions", json=body("x", 3), timeout=20
                    ).status_code
                )
                time.sleep(0.05)
        assert statuses[0] == 500 and set(statuses) <= {500, 503}
        assert server.process.wait(20) == 1, server.lines
    assert any("cannot go on" in line for line in server.lines)
