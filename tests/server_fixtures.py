"""A server on a thread of the test's own process, on a free port, with the tiny model."""

import asyncio
import contextlib
import copy
import socket
import threading
import time
from dataclasses import dataclass
from functools import lru_cache

import httpx
import openai
from faults import Faults, fault_router

from nanollm.args import EngineArgs, ServerArgs
from nanollm.chat import encode_chat
from nanollm.engine import Engine
from nanollm.generate import generate
from nanollm.llm import adapters_of, make_engine
from nanollm.model import eos_token_ids, load_model
from nanollm.serve import page, responses
from nanollm.serve.async_engine import AsyncEngine
from nanollm.serve.server import Api, make_server
from nanollm.structured_output import Grammars
from nanollm.text import encode, load_tokenizer

TINY = dict(load_format="dummy")
MODEL, ORACLE = (
    load_model("tiny-llama", **TINY, dtype="float32", progress=False) for _ in range(2)
)  # the same weights
TOKENIZER = load_tokenizer("tiny-llama", **TINY)
EOS = eos_token_ids(MODEL, TOKENIZER)
GRAMMARS = Grammars(TOKENIZER, MODEL.config.vocab_size, EOS)  # for all servers: it is slow


@dataclass
class Running:
    "A server that runs, and ways to look at it."

    url: str
    api: Api
    engine: Engine  # what the api's engine drives, for tests to look into
    loop: asyncio.AbstractEventLoop

    def do(self, coroutine, timeout_s=30):
        "Let the server's event loop run a coroutine, and return its result."
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def headers(self, key=None):
        "Who asks: the first of the server's keys if none is given."
        key = key or next(iter(self.api.args.api_keys), None)
        return {"authorization": f"Bearer {key}"} if key else {}

    def client(self, strict=True, **options):
        "The official client; a strict one checks every answer against its types."
        key = next(iter(self.api.args.api_keys), "none")
        options = {"api_key": key, "max_retries": 0, "timeout": 30} | options
        return openai.OpenAI(
            base_url=self.url + "/v1", _strict_response_validation=strict, **options
        )

    def post(self, path, body, key=None, **options):
        options["headers"] = self.headers(key) | options.get("headers", {})
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def get(self, path, key=None, **options):
        options["headers"] = self.headers(key) | options.get("headers", {})
        return httpx.get(self.url + path, timeout=30, **options)

    def metrics(self):
        "Name to value, summed over labels."
        found = {}
        for line in self.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0].removeprefix("nanollm:")
                found[name] = found.get(name, 0) + float(value)
        return found

    def settled(self, timeout_s=10.0):
        "Wait until nothing is open, and check that nothing is left over."
        deadline = time.monotonic() + timeout_s
        engine, outside = self.engine, self.api.engine
        while (
            not outside.idle or engine.has_unfinished or self.metrics()["num_requests_running"]
        ):
            assert time.monotonic() < deadline, (outside.streams, engine.requests)
            time.sleep(0.05)
        self.do(outside.check())
        assert not engine.scheduler.cache.usage
        found = self.metrics()
        assert found["request_started_total"] == found["request_success_total"]
        assert found["num_requests_waiting"] == found["kv_cache_usage_perc"] == 0


def prompt_of(given):
    "Token ids of a prompt or of messages."
    if isinstance(given, str):
        return encode(TOKENIZER, given)
    return encode_chat(TOKENIZER, given) if isinstance(given[0], dict) else list(given)


def solo(given, max_tokens):
    "What the naive loop makes of a prompt or of messages: token ids."
    return list(_solo(tuple(prompt_of(given)), max_tokens))


@lru_cache(None)
def _solo(prompt_ids, max_tokens):
    return tuple(generate(ORACLE, prompt_ids, max_tokens, EOS))


def solo_text(given, max_tokens):
    "The same as text."
    return TOKENIZER.decode(solo(given, max_tokens), skip_special_tokens=True)


@contextlib.contextmanager
def running(
    names=("tiny",),
    engine_options=None,
    send_buffer=None,
    faults=False,
    grammars=GRAMMARS,
    tokenizer=TOKENIZER,
    **server_options,
):
    "Serve the tiny model while the block runs."
    own = EngineArgs(**{"num_kv_blocks": 2048, "self_check": True} | (engine_options or {}))
    engine = make_engine(own, copy.deepcopy(MODEL) if own.enable_lora else MODEL, tokenizer)
    args = ServerArgs(names, **server_options)
    outside = AsyncEngine(engine, tokenizer, args.max_queued_requests)
    api = Api(outside, args, grammars=grammars, adapters=adapters_of(engine, own))
    more = [fault_router(Faults(engine))] if faults else []
    server = make_server(api, [responses.router, page.router, *more])
    server.config.timeout_graceful_shutdown = 2
    sock = socket.create_server(("127.0.0.1", 0))
    if (
        send_buffer
    ):  # bytes that the kernel takes from the server for a client that does not read
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    loops = []

    async def serve():
        loops.append(asyncio.get_running_loop())
        await server.serve([sock])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has ended before it was there"
            time.sleep(0.01)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        yield Running(url, api, engine, loops[0])
    finally:
        server.should_exit = True
        thread.join()
