"""Adapters over HTTP: chosen by name, loaded and unloaded under load, refused with a reason."""

import contextlib
import copy
import gc
import json
import logging
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import httpx
import openai
import pytest
import torch
from faults import Busy
from safetensors.torch import save_file
from server_fixtures import MODEL, ORACLE, TOKENIZER, encode_chat, prompt_of, running

from nanollm.generate import generate
from nanollm.serve.commands import ServeOptions

NAMES = ("tiny", "an/alias")
SEEDS = {"tiny": None, "red": 1, "blue": 2}  # of the weights behind a name
MESSAGES = [{"role": "user", "content": "Hello there"}]
GREEDY = {"temperature": 0, "ignore_eos": True}
TARGETS = ("q_proj", "v_proj")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tensors_of(seed, rank=4, prefix="base_model.model."):
    "An adapter of random weights, strong enough to change what is said."
    noise, found = torch.Generator().manual_seed(seed), {}
    for layer in range(MODEL.config.num_hidden_layers):
        for target in TARGETS:
            linear = getattr(ORACLE.model.layers[layer].self_attn, target)
            name = f"{prefix}model.layers.{layer}.self_attn.{target}.lora_"
            shapes = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
            for part, shape in shapes.items():
                found[f"{name}{part}.weight"] = 0.3 * torch.randn(shape, generator=noise)
    return found


def write_adapter(path, seed=1, tensors=None, rank=4, **config):
    "Write files as peft does; return the path as text."
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors or tensors_of(seed, rank), path / WEIGHTS)
    own = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    own |= {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"} | config
    (path / CONFIG).write_text(json.dumps(own))
    return str(path)


@lru_cache(None)
def merged(seed):
    "The model with the adapter of this seed in its weights; None: the model."
    model = copy.deepcopy(ORACLE)
    tensors = {} if seed is None else tensors_of(seed)
    for name, a in tensors.items():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            model.get_submodule(module).weight.data += 2 * b @ a
    return model


@lru_cache(None)
def _voice(seed, prompt_ids, max_tokens):
    ids = list(generate(merged(seed), list(prompt_ids), max_tokens, ()))
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def voice(seed, given, max_tokens=12):
    "What the naive loop makes with these weights, whatever ends an answer."
    return _voice(seed, tuple(prompt_of(given)), max_tokens)


@contextlib.contextmanager
def serving(path, engine_options=None, **options):
    "A server with adapters `red` and `blue`, that may load more from below `path`."
    modules = [
        f"{name}={write_adapter(path / name, seed)}" for name, seed in SEEDS.items() if seed
    ]
    lora = {"enable_lora": True, "lora_modules": tuple(modules)} | (engine_options or {})
    options = {"lora_dir": str(path)} | options
    with running(NAMES, lora, **options) as server:
        yield server
        server.settled()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def server(place):
    with serving(place) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client(strict=False)


def load(server, name, path, **more):
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more})


def unload(server, name, **more):
    return server.post("/v1/unload_lora_adapter", {"lora_name": name, **more})


def complete(server, model, prompt="x", max_tokens=12, **more):
    "The text of a completion, or the response if it is an error."
    body = GREEDY | {"model": model, "prompt": prompt, "max_tokens": max_tokens, **more}
    found = server.post("/v1/completions", body)
    return found.json()["choices"][0]["text"] if found.status_code == 200 else found


def refused(response, status, param, *words):
    "Check an error, and that it says nothing of where things lie."
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    for word in words:
        assert word in error["message"], error["message"]
    given = json.loads(response.request.content or "{}").get("lora_path") or "nothing"
    assert "/tmp" not in error["message"].replace(given[:70], "")


def wait_for(what, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- by name


def test_each_name_has_a_voice_of_its_own():
    assert len({voice(seed, MESSAGES) for seed in (None, 1, 2, 3)}) == 4


def test_models(server, client):
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert list(cards) == ["tiny", "an/alias", "red", "blue"]
    assert [card["parent"] for card in cards.values()] == [None, None, "tiny", "tiny"]
    assert cards["red"]["root"].endswith("red")
    assert cards["red"]["max_model_len"] == cards["tiny"]["max_model_len"]
    assert client.models.retrieve("red").id == "red"


def test_unknown_names_are_told_what_there_is(server, client):
    known = "tiny, an/alias, red, blue"
    refused(server.get("/v1/models/green"), 404, "model", "'green'", known)
    with pytest.raises(openai.NotFoundError, match=f"has {known}"):
        client.chat.completions.create(model="green", messages=MESSAGES)
    refused(server.post("/tokenize", {"model": "Red", "prompt": "x"}), 404, "model", known)
    refused(server.post("/v1/responses", {"model": "bl", "input": "x"}), 404, "model", known)


@pytest.mark.parametrize("name", ["tiny", "red"])
def test_tokens_are_the_base_models(server, name):
    found = server.post("/tokenize", {"model": name, "messages": MESSAGES}).json()
    assert found["tokens"] == encode_chat(TOKENIZER, MESSAGES)
    back = server.post("/detokenize", {"model": name, "tokens": found["tokens"]})
    assert back.status_code == 200
    counted = server.post("/v1/responses/input_tokens", {"model": name, "input": "Hello there"})
    assert counted.json()["input_tokens"] == len(found["tokens"])


def ask(client, endpoint, model, stream, prompt="Hello there"):
    "The text of an answer to the same conversation, from any endpoint, and who answers."
    messages, own = [{"role": "user", "content": prompt}], {"ignore_eos": True}
    more = dict(model=model, stream=stream, temperature=0, extra_body=own)
    if endpoint == "responses":
        made = client.responses.create(input=prompt, max_output_tokens=12, **more)
        final = list(made)[-1].response if stream else made
        return final.output_text, {final.model}
    if endpoint == "chat":
        made = client.chat.completions.create(messages=messages, max_tokens=12, **more)
    else:
        ids = encode_chat(TOKENIZER, messages)
        made = client.completions.create(prompt=ids, max_tokens=12, **more)
    parts = list(made) if stream else [made]
    choices = [choice for part in parts for choice in part.choices]
    if endpoint == "completions":
        texts = [choice.text for choice in choices]
    else:
        texts = [(one.delta if stream else one.message).content or "" for one in choices]
    return "".join(texts), {part.model for part in parts}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
def test_base_and_adapters_interleaved(client, endpoint, stream):
    jobs = [(name, f"Hello {i}") for i in range(4) for name in SEEDS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: ask(client, endpoint, job[0], stream, job[1]), jobs))
    for (name, prompt), (text, models) in zip(jobs, found):
        assert text == voice(SEEDS[name], [{"role": "user", "content": prompt}])
        assert models == {name}


def test_several_prompts_and_answers(server):
    body = GREEDY | {"model": "red", "prompt": ["a", "b"], "n": 2, "max_tokens": 8}
    choices = server.post("/v1/completions", body).json()["choices"]
    found = [choice["text"] for choice in sorted(choices, key=lambda one: one["index"])]
    assert found == [voice(1, prompt, 8) for prompt in ("a", "a", "b", "b")]


def test_one_prompt_is_cached_for_each_name(server):
    prompt = "the same words " * 8
    for _ in range(2):
        for name, seed in SEEDS.items():
            assert complete(server, name, prompt) == voice(seed, prompt)


def test_formats_and_logprobs(server):
    body = {"model": "red", "prompt": "x", "structured_outputs": {"regex": "[ab]{4}"}}
    choice = server.post("/v1/completions", body | {"logprobs": 1}).json()["choices"][0]
    assert set(choice["text"]) <= {"a", "b"} and len(choice["text"]) == 4
    assert len(choice["logprobs"]["token_logprobs"]) >= 4


def test_a_conversation_goes_on_with_another_voice(server, client):
    own = dict(temperature=0, max_output_tokens=6, extra_body={"ignore_eos": True})
    first = client.responses.create(model="red", input="Hello there", **own)
    second = client.responses.create(
        model="tiny", input="And?", previous_response_id=first.id, **own
    )
    spoken = {"role": "assistant", "content": first.output_text}
    messages = [*MESSAGES, spoken, {"role": "user", "content": "And?"}]
    assert first.output_text == voice(1, MESSAGES, 6)
    assert second.output_text == voice(None, messages, 6)
    kept = [client.responses.retrieve(one.id).model for one in (first, second)]
    assert kept == ["red", "tiny"]


def test_logs_and_metrics(server, client, caplog):
    with caplog.at_level(logging.INFO, logger="nanollm"):
        for endpoint in ("completions", "responses"):
            ask(client, endpoint, "red", False)
        ask(client, "completions", "tiny", False)
        wait_for(lambda: sum(" prompt " in text for text in caplog.messages) == 3)
    lines = [text for text in caplog.messages if " prompt " in text]
    assert ["(red)" in line for line in lines] == [True, True, False]
    page = server.get("/metrics").text
    assert 'model_name="tiny"' in page and 'model_name="red"' not in page
    info = [line for line in page.splitlines() if line.startswith("vllm:lora_requests_info{")]
    labels = 'max_lora="8",model_name="tiny",running_lora_adapters="",waiting_lora_adapters=""'
    [line] = info
    assert labels in line and 0 <= time.time() - float(line.split()[-1]) < 60


# --- loaded and unloaded


def test_load_and_unload(server, client, place):
    write_adapter(place / "more" / "green", 3)
    refused(complete(server, "green"), 404, "model")
    found = load(server, "team/green", "more/green")
    assert (found.status_code, found.text) == (
        200,
        "Success: LoRA adapter 'team/green' added successfully.",
    )
    assert complete(server, "team/green") == voice(3, "x")
    card = client.models.retrieve("team/green")
    assert (card.root, card.parent) == ("more/green", "tiny")
    refused(
        load(server, "team/green", "red"),
        400,
        "lora_name",
        "already been loaded",
        "'load_inplace' to True",
    )
    assert load(server, "team/green", str(place / "red"), load_inplace=True).status_code == 200
    assert complete(server, "team/green") == voice(1, "x")
    found = unload(server, "team/green", lora_int_id=1)
    assert (found.status_code, found.text) == (
        200,
        "Success: LoRA adapter 'team/green' removed successfully.",
    )
    refused(unload(server, "team/green"), 404, "lora_name", "'team/green' cannot be found")
    refused(complete(server, "team/green"), 404, "model", "tiny, an/alias, red, blue")
    assert complete(server, "red") == voice(1, "x")  # whose weights these are as well


def test_names(server):
    for name in ("", " ", "a b", "../x", "a/", "/a", "a//b", "a\nb", "é", "x" * 129, 7, None):
        refused(load(server, name, "red"), 400, "lora_name")
    for name in NAMES:
        refused(load(server, name, "red"), 400, "lora_name", "base model")
        refused(unload(server, name), 404, "lora_name")
    refused(server.post("/v1/load_lora_adapter", {"lora_name": "x"}), 400, "lora_path")
    refused(server.post("/v1/unload_lora_adapter", {}), 400, "lora_name")


@pytest.mark.parametrize("lora", [False, True])
def test_off_unless_asked_for(lora):
    with running(NAMES, {"enable_lora": lora}) as server:
        for found in (load(server, "x", "y"), unload(server, "x")):
            refused(found, 404, None, "--enable-lora", "--lora-dir")
        assert len(server.get("/v1/models").json()["data"]) == len(NAMES)


def test_keys(place):
    with serving(place, api_keys=("ours",)) as server:
        body = {"lora_name": "x", "lora_path": "red"}
        for route in ("load", "unload"):
            found = server.post(f"/v1/{route}_lora_adapter", body, key="theirs")
            assert found.status_code == 401
        assert load(server, "x", "red").status_code == 200
        assert complete(server, "x") == voice(1, "x")


def test_long_lists_are_cut(place, monkeypatch):
    with serving(place, {"max_cpu_loras": 32}) as server:
        for i in range(20):
            assert load(server, f"r{i}", "red").status_code == 200
        refused(complete(server, "no"), 404, "model", "r3 and 16 more")
        monkeypatch.setattr("nanollm.serve.server.MAX_ADAPTERS", 22)
        refused(load(server, "one", "red"), 400, "lora_name", "22")
        assert load(server, "r1", "blue", load_inplace=True).status_code == 200


# --- refused


def test_paths_outside(server, place, tmp_path):
    write_adapter(tmp_path / "there")
    (place / "link").symlink_to(tmp_path / "there")
    (place / "half").mkdir()
    (place / "half" / CONFIG).symlink_to(place / "red" / CONFIG)
    (place / "half" / WEIGHTS).symlink_to(tmp_path / "there" / WEIGHTS)
    up = os.path.relpath(tmp_path / "there", place)
    for path in (up, str(tmp_path / "there"), "/etc", "..", f"red/../{up}", "link", "half"):
        refused(load(server, "x", path), 400, "lora_path", "--lora-dir")
    refused(load(server, "x", "/etc/../" + str(tmp_path) + "/no"), 400, "lora_path")
    for path in ("no", "red/no", "a\0b", "x" * 300, ".", f"red/{WEIGHTS}"):
        assert load(server, "x", path).status_code in (400, 404)
    refused(load(server, "x", "no"), 404, "lora_path", "no adapter")
    (place / "inner").symlink_to(place / "red")  # which is fine
    assert load(server, "x", "inner").status_code == unload(server, "x").status_code == 200


def spoiled(place):
    "Name to files that are no adapter for this model, and a word of the reason."
    good = tensors_of(1)
    [first, second, *_] = good
    pickled = place / "pickled"
    write_adapter(pickled)
    (pickled / WEIGHTS).unlink()
    torch.save(good, pickled / "adapter_model.bin")
    yield "pickled", "pickle"
    write_adapter(place / "nan", tensors=good | {first: good[first] * float("nan")})
    yield "nan", "finite"
    write_adapter(place / "inf", tensors=good | {second: good[second] / 0})
    yield "inf", "finite"
    write_adapter(place / "prefix", tensors=tensors_of(1, prefix="model."))
    yield "prefix", "model.layers.0"
    write_adapter(place / "wide", rank=64)
    yield "wide", "64"
    write_adapter(place / "dora", use_dora=True)
    yield "dora", "dora"
    write_adapter(place / "shape", tensors=good | {first: good[first][:, :-1].contiguous()})
    yield "shape", "shapes"
    write_adapter(place / "fifo")
    (place / "fifo" / WEIGHTS).unlink()
    os.mkfifo(place / "fifo" / WEIGHTS)
    yield "fifo", "regular file"
    write_adapter(place / "huge")
    os.truncate(place / "huge" / WEIGHTS, 2**40)
    yield "huge", "bytes"
    write_adapter(place / "cut")
    os.truncate(place / "cut" / WEIGHTS, 1000)
    yield "cut", WEIGHTS
    write_adapter(place / "text")
    (place / "text" / CONFIG).write_text("{")
    yield "text", CONFIG
    write_adapter(place / "long")
    os.truncate(place / "long" / CONFIG, 2**40)
    yield "long", CONFIG


def test_what_is_no_adapter(server, place):
    before = server.get("/v1/models").json()
    for path, word in spoiled(place):
        found = load(server, path, path)
        refused(found, 400, "lora_path")
        assert word.lower() in found.json()["error"]["message"].lower(), found.text
        refused(load(server, "red", path, load_inplace=True), 400, "lora_path")
    assert server.get("/v1/models").json() == before
    assert complete(server, "red") == voice(1, "x")


# --- under load


class Slow:
    "Makes steps of a server slower, so that there is time to do something in between."

    def __init__(self, server, step_s=0.02):
        self.runner, self.forward, self.step_s = server.engine.runner, None, step_s

    def __enter__(self):
        self.forward = self.runner.forward
        self.runner.forward = self.step
        return self

    def step(self, batch):
        time.sleep(self.step_s)
        return self.forward(batch)

    def __exit__(self, *_):
        self.runner.forward = self.forward


def streaming(server, model, prompt, max_tokens=40):
    "Begin a stream; return it after its first piece, as a function that reads the rest."
    client = server.client(strict=False)
    parts = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    first = next(parts)

    def rest():
        return first.choices[0].text + "".join(part.choices[0].text for part in parts)

    return rest


def held(server):
    "Digests of the adapters that the engine's thread has."
    pool = server.api.adapters.pool
    return server.do(server.api.engine.call(lambda: set(pool.adapters)))


def test_reload_under_load(server, place):
    write_adapter(place / "change", 3)
    assert load(server, "change", "change").status_code == 200
    with Slow(server):
        old = streaming(server, "change", "y")
        other = streaming(server, "blue", "y")
        write_adapter(place / "change", 4)
        assert load(server, "change", "change", load_inplace=True).status_code == 200
        new = streaming(server, "change", "y", 10)
        assert len(held(server)) == 4
        assert new() == voice(4, "y", 10)
        assert old() == voice(3, "y", 40) and other() == voice(2, "y", 40)
    assert complete(server, "change", "y") == voice(4, "y")
    wait_for(lambda: len(held(server)) == 3)
    unload(server, "change")


def test_unload_under_load(server, place):
    write_adapter(place / "leave", 5)
    assert load(server, "leave", "leave").status_code == 200
    with Slow(server):
        going = [streaming(server, "leave", prompt) for prompt in "ab"]
        assert unload(server, "leave").status_code == 200
        refused(complete(server, "leave"), 404, "model")
        assert len(held(server)) == 3
        assert [one() for one in going] == [voice(5, prompt, 40) for prompt in "ab"]
    wait_for(lambda: len(held(server)) == 2)
    assert load(server, "leave", "leave").status_code == 200
    assert complete(server, "leave", "a", 40) == voice(5, "a", 40)
    unload(server, "leave")


def test_unloaded_and_loaded_again_while_a_request_has_it(server, place):
    write_adapter(place / "twice", 6)
    load(server, "twice", "twice")
    with Slow(server):
        going = streaming(server, "twice", "z")
        unload(server, "twice")
        assert load(server, "again", "twice").status_code == 200  # the same bytes
        assert going() == voice(6, "z", 40)
    assert complete(server, "again", "z") == voice(6, "z")
    unload(server, "again")
    wait_for(lambda: len(held(server)) == 2)


def test_unload_frees_the_memory(server, place):
    write_adapter(place / "weigh", 7)
    adapters, kept = server.api.adapters, []
    read = adapters.read

    def watch(path):
        adapter = read(path)
        kept.append(weakref.ref(adapter))
        return adapter

    adapters.read = watch
    try:
        assert load(server, "weigh", "weigh").status_code == 200
    finally:
        adapters.read = read
    complete(server, "weigh")
    assert kept[0]() is not None
    unload(server, "weigh")
    complete(server, "tiny")
    gc.collect()
    assert kept[0]() is None


@pytest.mark.parametrize("then", ["unload", "reload"])
def test_a_name_that_changes_while_a_prompt_is_read(server, place, monkeypatch, then):
    write_adapter(place / "change", 3)
    load(server, "change", "change", load_inplace=True)
    encode, busy = server.api.encode_all, Busy()

    async def slowly(*args):
        await server.api.engine.run(busy)
        return await encode(*args)

    monkeypatch.setattr(server.api, "encode_all", slowly)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete, server, "change", "q")
        assert busy.begun.wait(10)
        if then == "unload":
            unload(server, "change")
        else:
            write_adapter(place / "change", 4)
            load(server, "change", "change", load_inplace=True)
        busy.end.set()
        found = asked.result()
    if then == "unload":
        refused(found, 404, "model")
    else:
        assert found == voice(4, "q")
        unload(server, "change")


def test_two_load_one_name(server, place):
    write_adapter(place / "race", 8)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load(server, "race", "race").status_code, range(4)))
    assert sorted(found) == [200, 400, 400, 400]
    unload(server, "race")


def test_a_client_that_hangs_up_while_loading(server, place, monkeypatch):
    write_adapter(place / "hang", 9)
    busy, read = Busy(), server.api.adapters.read

    def slowly(path):
        busy()
        return read(path)

    monkeypatch.setattr(server.api.adapters, "read", slowly)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            server.url + "/v1/load_lora_adapter",
            timeout=0.3,
            json={"lora_name": "hang", "lora_path": "hang"},
        )
    assert complete(server, "blue") == voice(2, "x")  # meanwhile
    busy.end.set()
    monkeypatch.undo()
    refused(complete(server, "hang"), 404, "model")
    assert load(server, "hang", "hang").status_code == 200
    unload(server, "hang")
    wait_for(lambda: len(held(server)) == 2)


def test_many_comings_and_goings(place):
    "Clients ask while others load, reload and unload; every answer is of one voice."
    for seed in (3, 4):
        write_adapter(place / f"s{seed}", seed)
    with serving(place, {"max_loras": 2, "max_num_seqs": 6, "num_kv_blocks": 40}) as server:
        right = {voice(seed, "m", 16) for seed in (3, 4)}

        def change(_):
            for seed in (3, 4, 3, 4):
                assert load(server, "m", f"s{seed}", load_inplace=True).status_code == 200
                unload(server, "m")

        def talk(i):
            for _ in range(6):
                assert complete(server, "blue", "m", 16) == voice(2, "m", 16)
                found = complete(server, "m", "m", 16)
                assert found in right if isinstance(found, str) else found.status_code == 404

        with ThreadPoolExecutor(7) as pool:
            jobs = [pool.submit(change, 0), *(pool.submit(talk, i) for i in range(6))]
            for job in jobs:
                job.result(60)
        server.settled()
        assert len(held(server)) <= 3


def test_drafts(place):
    "Guesses at what comes next are judged by the voice that asked for them."
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "adaptive": False}
    with serving(place, {"speculative_config": drafts}) as server:
        jobs = [(name, "abab" * i) for i in range(1, 5) for name in SEEDS]
        with ThreadPoolExecutor(len(jobs)) as pool:
            found = list(pool.map(lambda job: complete(server, *job, 40), jobs))
        assert found == [voice(SEEDS[name], prompt, 40) for name, prompt in jobs]


# --- more adapters than memory


def test_adapters_that_were_pushed_out_are_read_again(place, tmp_path):
    with serving(tmp_path, {"max_loras": 1, "max_cpu_loras": 1}) as server:
        for _ in range(2):
            for name in ("red", "blue"):
                assert complete(server, name) == voice(SEEDS[name], "x")
        with ThreadPoolExecutor(6) as pool:
            names = [*SEEDS] * 4
            found = list(pool.map(lambda name: complete(server, name), names))
        assert found == [voice(SEEDS[name], "x") for name in names]
        complete(server, "blue")
        write_adapter(tmp_path / "red", 4)
        found = complete(server, "red")  # not these weights under that name
        refused(found, 400, "model", "not those that were")
        (tmp_path / "red" / WEIGHTS).unlink()
        refused(complete(server, "red"), 400, "model")
        assert complete(server, "blue") == voice(2, "x")
        write_adapter(tmp_path / "red", 4)
        assert load(server, "red", "red", load_inplace=True).status_code == 200
        assert complete(server, "red") == voice(4, "x")


def test_an_adapter_that_was_pushed_out_is_read_once_for_all_who_want_it(place, tmp_path,
                                                                         monkeypatch):
    with serving(tmp_path, {"max_loras": 1, "max_cpu_loras": 1}) as server:
        assert complete(server, "blue") == voice(2, "x")
        adapters, reads, go_on = server.api.adapters, [], threading.Event()
        read = adapters.read

        def slow(path):
            reads.append(path)
            assert go_on.wait(20)
            return read(path)

        waiting, have_weights = [], server.api.have_weights

        async def counted(*args):
            waiting.append(args)
            await have_weights(*args)

        monkeypatch.setattr(adapters, "read", slow)
        monkeypatch.setattr(server.api, "have_weights", counted)
        with ThreadPoolExecutor(6) as pool:
            with pytest.raises(httpx.ReadTimeout):  # who asked first hangs up
                httpx.post(server.url + "/v1/completions", timeout=0.3,
                           json={"model": "red", "prompt": "x"})
            asked = [pool.submit(complete, server, "red") for _ in range(6)]
            wait_for(lambda: len(reads) == 1 and len(waiting) == 7)
            go_on.set()
            assert [one.result() for one in asked] == [voice(1, "x")] * 6
        assert len(reads) == 1 and not server.api._reading
        monkeypatch.setattr(adapters, "read", read)
        complete(server, "blue")
        write_adapter(tmp_path / "red", 4)  # all hear of it, and the next one tries again
        with ThreadPoolExecutor(4) as pool:
            for found in [pool.submit(complete, server, "red") for _ in range(4)]:
                refused(found.result(), 400, "model", "not those that were")
        assert not server.api._reading


# --- the command


def test_a_name_is_the_models_or_an_adapters(tmp_path):
    from nanollm.serve.cli import UsageError, serve

    path = write_adapter(tmp_path / "red")
    options = ServeOptions(
        model="tiny-llama",
        load_format="dummy",
        port=0,
        enable_lora=True,
        served_model_names=("red",),
        lora_modules=(f"red={path}",),
    )
    with pytest.raises(UsageError, match="red"):
        serve(options)
