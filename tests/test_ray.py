"""Replicas on Ray Serve, for real: one Ray, two tiny replicas, processes that are killed."""

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace

import httpx
import openai
import pytest
from lora_folders import save
from server_fixtures import ORACLE, TOKENIZER, prompt_of, solo_text

from nanollm.args import ServerArgs
from nanollm.generate import generate
from nanollm.serve import cluster, replicas
from nanollm.serve.cluster import (
    running_fleet,
    running_ray,
)
from nanollm.serve.commands import ServeOptions, settings_of
from nanollm.serve.gate import Gate
from nanollm.serve.process import http_server
from nanollm.serve.replicas import Door

if find_spec("ray") is None: # not imported: before that, the token has to be set
    pytest.skip("replicas need nanollmserve[distributed]", allow_module_level=True)

TINY = dict(model="tiny-llama", load_format="dummy", dtype="float32", quiet=True,
            served_model_names=("tiny",), num_kv_blocks=512, threads=1)


def options_of(**more):
    options = ServeOptions(**TINY | more)
    return options, ServerArgs(**settings_of(options, ServerArgs))


@pytest.fixture(scope="session")
def one_ray():
    with running_ray(8):
        yield


@contextlib.contextmanager
def listening(fleet, args):
    "The door on a thread of this process, at a free port."
    app = Door(fleet, args)
    server = http_server(Gate(app, args), args)
    sock, loops = socket.create_server(("127.0.0.1", 0)), []

    async def serve():
        loops.append(asyncio.get_running_loop())
        await server.serve([sock])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        yield Running(url, app, loops[0])
    finally:
        server.should_exit = True
        thread.join()


class Running(SimpleNamespace):
    "A door that runs, and what can be asked of it."

    def __init__(self, url, door, loop):
        super().__init__(url=url, door=door, loop=loop)

    def do(self, coroutine, timeout_s=60):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def post(self, path, body, **options):
        return httpx.post(self.url + path, json=body, timeout=90, **options)

    def get(self, path):
        return httpx.get(self.url + path, timeout=60)

    def status(self):
        return self.do(self.door.fleet.tell("status"))

    def wait(self, good, seconds=90.0):
        "Wait until what the replicas say of themselves is good, and return it."
        end = time.monotonic() + seconds
        while not good(found := self.status()):
            assert time.monotonic() < end, found
            time.sleep(0.2)
        return found

    def idle(self):
        def calm(found):
            return not any(one["server_load"] for one in found.values())

        return self.wait(calm, 20)

    def total(self, name):
        page = self.get("/metrics").text
        return sum(float(value) for value in re.findall(
            rf"(?m)^nanollm:{name}\{{.*\}} (\S+)$", page))

    def stream(self, body, path="/v1/completions"):
        "Text, error and time of the first event of a stream."
        text, error, first_s = "", None, None
        with httpx.stream("POST", self.url + path, json=body | {"stream": True},
                          timeout=90) as answer:
            if answer.status_code != 200:
                return "", answer.read().decode(), None
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return text, error, first_s
                if line.startswith("data: "):
                    first_s = first_s or time.monotonic()
                    event = json.loads(line[6:])
                    error = event.get("error", error)
                    text += "".join(c["text"] for c in event.get("choices", ()))
        return text, "the stream has no end", first_s


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save(folder / "one", seed=1)
    return folder


@pytest.fixture(scope="module")
def server(one_ray, adapters):
    "Two replicas with little room: four answers at a time each."
    options, args = options_of(replicas=2, max_num_seqs=4, enable_lora=True,
                               lora_dir=str(adapters))
    with running_fleet(options, args) as fleet, listening(fleet, args) as running:
        running.wait(lambda found: len(found) == 2)
        yield running


@pytest.fixture
def calm(server):
    "The server with two replicas, before and after a test."
    server.wait(lambda found: sum(one["ok"] for one in found.values()) == 2)
    yield server
    server.idle()
    end = time.monotonic() + 20
    while any(left := open_calls()):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def open_calls():
    "How many calls each router holds for open; Serve keeps its routers to itself."
    return [len(one.chooser.open) for one in gc.get_objects()
            if type(one).__name__ == "PolicyRouter"]


BODY = {"prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0}


def whole_text(prompt, n):
    "What the naive loop writes if nothing stops it."
    ids = list(generate(ORACLE, prompt_of(prompt), n, ()))
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def test_answers_are_those_of_one_engine(calm):
    prompts = [f"{BODY['prompt']} number {i}" for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        found = [*pool.map(lambda prompt: calm.stream(BODY | {"prompt": prompt}), prompts)]
    for prompt, (text, error, _) in zip(prompts, found):
        assert error is None and text == solo_text(prompt, 8)
    bodies = [BODY | {"prompt": prompt} for prompt in prompts]
    answers = [calm.post("/v1/completions", body).json() for body in bodies]
    found = [one["choices"][0]["text"] for one in answers]
    assert found == [solo_text(prompt, 8) for prompt in prompts]
    tags = {re.match(r"cmpl-([0-9a-z]{8})-", one["id"])[1] for one in answers}
    assert tags == {*calm.status()}


def test_the_official_client_is_content(calm):
    client = openai.OpenAI(base_url=calm.url + "/v1", api_key="none", max_retries=0,
                           _strict_response_validation=True)
    turns = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="tiny", messages=turns, max_tokens=6,
                                          temperature=0)
    chunks = client.chat.completions.create(model="tiny", messages=turns, max_tokens=6,
                                            temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == chat.choices[0].message.content == solo_text(turns, 6)
    first = client.responses.create(model="tiny", input="hello", max_output_tokens=6,
                                    temperature=0)
    for _ in range(4):
        assert client.responses.retrieve(first.id).id == first.id
        more = client.responses.create(model="tiny", input="and?", max_output_tokens=4,
                                       previous_response_id=first.id)
        assert more.previous_response_id == first.id
    assert {model.id for model in client.models.list()} == {"tiny"}
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt="x", max_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_abcd1234-00")


def test_clients_that_leave_abort_on_the_replica(calm):
    before = calm.total("request_success_total")
    body = BODY | {"max_tokens": 1500, "ignore_eos": True, "stream": True}

    def leave(i):
        with httpx.stream("POST", f"{calm.url}/v1/completions", json=body,
                          timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    return

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(leave, range(24))]
    calm.idle()
    page = calm.get("/metrics").text
    assert calm.total("request_success_total") == before + 24
    name = r'nanollm:request_success_total\{finished_reason="abort"'
    aborts = re.search(rf"{name}.*\}} (\S+)", page)
    # 1,500 tokens of the tiny model take a second: some answers end before the news comes
    assert float(aborts[1]) > 12 and calm.door.num_unfinished == 0


def test_a_killed_replica_costs_its_streams_and_nothing_else(calm):
    "64 streams: some are in the middle, most still wait. One of two replicas is killed."
    n, body = 60, BODY | {"max_tokens": 60, "ignore_eos": True}
    whole = {prompt: whole_text(prompt, n) for prompt in ("one fish", "two fish", "red fish")}
    jobs = [prompt for _ in range(22) for prompt in whole][:64]
    pids = {tag: one["pid"] for tag, one in calm.status().items()}
    killed = sorted(pids)[0]
    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(calm.stream, body | {"prompt": prompt}) for prompt in jobs]
        end = time.monotonic() + 30
        while sum(one["server_load"] for one in calm.status().values()) < 40:
            assert time.monotonic() < end, "the load does not build up"
        os.kill(pids[killed], signal.SIGKILL)
        results = [future.result(120) for future in futures]
    cut = [(prompt, text) for prompt, (text, error, _) in zip(jobs, results) if error]
    assert len(cut) <= 4 + 4, [error for _, error, _ in results if error]
    for prompt, (text, error, _) in zip(jobs, results):
        if error is None:
            assert text == whole[prompt]
        else:
            assert isinstance(error, dict) and error["code"] == "server_error"
            assert whole[prompt].startswith(text.rstrip("\ufffd"))
    found = calm.wait(lambda found: len(found) == 2 and killed not in found)
    assert pids[killed] not in {one["pid"] for one in found.values()}
    assert calm.get("/health").json() == {"status": "ok", "replicas": 2}
    survivor = calm.do(calm.door.fleet.tell("metrics"))
    page = replicas.joined_metrics({tag: page for tag, page in survivor.items() if tag in pids})
    started = re.search(r"nanollm:request_started_total\{.*\} (\S+)", page)[1]
    ended = re.findall(r"nanollm:request_success_total\{.*\} (\S+)", page)
    assert float(started) == sum(map(float, ended))


def test_a_new_replica_knows_the_adapters(calm):
    load = {"lora_name": "voice", "lora_path": "one"}
    assert calm.post("/v1/load_lora_adapter", load).status_code == 200
    bodies = [BODY | {"model": "voice", "prompt": f"hi {i % 2}"} for i in range(8)]
    answers = [calm.post("/v1/completions", body).json() for body in bodies]
    voices = {one["choices"][0]["text"] for one in answers}
    assert len(voices) <= 2
    tag, one = sorted(calm.status().items())[0]
    stored = calm.post("/v1/responses", {"input": "x", "max_output_tokens": 2}).json()["id"]
    os.kill(one["pid"], signal.SIGKILL)
    calm.wait(lambda found: len(found) == 2 and tag not in found)
    again = [calm.post("/v1/completions", body) for body in bodies]
    assert {one.json()["choices"][0]["text"] for one in again} == voices
    status = calm.get(f"/v1/responses/{stored}").status_code
    assert status == (404 if tag in stored else 200)
    assert calm.post("/v1/unload_lora_adapter", {"lora_name": "voice"}).status_code == 200
    assert {calm.post("/v1/completions", BODY | {"model": "voice"}).status_code
            for _ in range(4)} == {404}


def test_a_replica_that_hangs_is_given_up(calm, monkeypatch):
    monkeypatch.setattr(replicas, "IDLE_S", 4.0)
    tag, one = sorted(calm.status().items())[0]
    with ThreadPoolExecutor(8) as pool:
        os.kill(one["pid"], signal.SIGSTOP)
        try:
            bodies = [BODY | {"prompt": f"fish {i}"} for i in range(8)]
            found = [*pool.map(lambda body: calm.post("/v1/completions", body), bodies)]
        finally:
            os.kill(one["pid"], signal.SIGCONT)
    for body, answer in zip(bodies, found):
        assert answer.json()["choices"][0]["text"] == solo_text(body["prompt"], 8)


def test_load_brings_a_second_replica(one_ray):
    options, args = options_of(max_replicas=2, max_num_seqs=2)
    with running_fleet(options, args, "scaled") as fleet, listening(fleet, args) as running:
        assert len(running.wait(lambda found: len(found) >= 1)) == 1
        body = BODY | {"max_tokens": 1500, "ignore_eos": True}
        with ThreadPoolExecutor(16) as pool:
            stop = threading.Event()

            def keep_busy(i):
                while not stop.is_set():
                    assert running.stream(body | {"max_tokens": 300})[1] is None

            busy = [pool.submit(keep_busy, i) for i in range(16)]
            try:
                running.wait(lambda found: len(found) == 2)
            finally:
                stop.set()
        for one in busy:
            one.result()


def test_replicas_that_cannot_start_are_an_error(one_ray, monkeypatch):
    options, args = options_of(replicas=1, max_model_len=10**6)
    with pytest.raises(cluster.UsageError, match="did not start"):
        with running_fleet(options, args, "broken"):
            pass


def test_the_command_from_start_to_end(tmp_path):
    "A Ray of its own, answers, SIGTERM under a stream, and no process left."
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        env.pop(name, None)
    words = ["--model", "tiny-llama", "--load-format", "dummy", "--dtype", "float32", "--port",
             "0", "--data-parallel-size", "2", "--api-key", "secret", "--num-kv-blocks", "512"]
    code = "from nanollm.serve.cluster import serve_main; serve_main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], env=env, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        log = []
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"on (http://\S+) \(2 replicas", line):
                break
        url, headers = found[1], {"authorization": "Bearer secret"}
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200
        assert httpx.get(f"{url}/v1/models", timeout=30).status_code == 401
        body = BODY | {"max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers,
                          timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [*filter(None, lines)][-1] == "data: [DONE]"
        assert process.wait(60) == 0
        log += process.stderr.readlines()
        text = "".join(log)
        assert "everything promised was delivered" in text
        assert "Traceback" not in text and "raylet" not in text, text
    finally:
        if process.poll() is None:
            process.kill()
    end = time.monotonic() + 30
    while left := members_of(process.pid):
        assert time.monotonic() < end, left
        time.sleep(0.2)


def members_of(session):
    "The processes of a session."
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(open(f"/proc/{name}/cmdline").read().replace("\0", " ")[:80])
    return found
