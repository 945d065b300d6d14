"""A model on several processes: the same tokens, and what happens when one of them does not."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import psutil
import pytest
import shard_entry
import torch
from lora_folders import save
from shard_entry import part_of, runner_of, whole_model

from nanollm.adapters import Adapter, adaptable
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import NO_NUMBERS, Engine, EngineLost, ModelRunner
from nanollm.generate import generate
from nanollm.lora import AdapterAdmission, AdapterPool, Adapters, LoRAForward
from nanollm.paged_attention import FlatBatch, GroupedAttention, PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.sampling import DEFAULT_PROCESSORS, SamplingParams
from nanollm.scheduler import Scheduler
from nanollm.sharding import AllReduced
from nanollm.speculative import NgramProposer
from nanollm.structured_output import GrammarMask, Grammars, StructuredOutputsParams
from nanollm.tensor_parallel import (
    WorkerFailed,
    Workers,
    decode,
    encode,
    pack_adapter,
    perform,
    start,
    unpack_adapter,
)
from nanollm.text import byte_tokenizer
from nanollm.transformer import Decoder

BATCH = FlatBatch([5, 6, 7], [0, 1, 2], [0, 1, 2], [3], [3], [[0]], [0, 2], [None])
BATCHES = [
    BATCH,
    FlatBatch([1, 2, 3], [4, 9, 10], [4, 17, 18], [1, 2], [5, 11], [[0], [1, 2]], [],
              ["x", None]),
    FlatBatch([319], [2**20], [2**40], [1], [2**20 + 1], [list(range(999))], [0], ["ü" * 64]),
    FlatBatch([1, 2], [0, 0], [0, 8], [1, 1], [1, 1], [[0], []], [0, 1], ["a", "a"])]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_comes_back_as_it_was(batch):
    assert decode(encode(batch)) == batch


def test_a_message_is_one_row_of_numbers_and_the_names():
    data = encode(BATCHES[1])
    T, B, R, names = 3, 2, 0, b'["x", null]'
    assert data.endswith(names)
    assert len(data) == 8 * (9 + 3 * T + 4 * B + R + 3) + len(names)


def test_an_adapter_comes_back_as_it_was():
    pairs = {"layers.0.q_proj": (torch.rand(2, 5), torch.rand(2, 3)),
             "B layers.1.o_proj.base": (torch.rand(4, 5), torch.rand(4, 3))}
    found = unpack_adapter(pack_adapter(Adapter("f" * 64, 4, pairs)))
    assert (found.digest, found.rank) == ("f" * 64, 4) and found.weights.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert all(map(torch.equal, pair, found.weights[name]))


def test_what_no_worker_could_run_is_refused():
    with pytest.raises(ValueError, match="module that can be imported"):
        start(lambda settings, group: None, {}, 2)
    if torch.cuda.device_count() < 99:
        with pytest.raises(ValueError, match="99 processes need as many GPUs"):
            start(shard_entry.join, {}, 99, "cuda")


def test_nobody_is_blamed_twice():
    workers, told = Workers("/nonexistent"), []
    workers.watch(told.append)
    assert workers.stop("the first") and not workers.stop("the second")
    with pytest.raises(WorkerFailed, match="the first"), workers.in_step():
        raise AssertionError("this is not reached")
    workers.watch(told.append)
    assert [str(error) for error in told] == ["the first"]  # who comes late hears it, too


def test_what_fails_in_a_step_ends_the_group():
    workers = Workers("/nonexistent")
    with pytest.raises(WorkerFailed, match="rank 0 failed: KeyError: 'x'"), workers.in_step():
        raise KeyError("x")
    workers = Workers("/nonexistent")
    with pytest.raises(KeyboardInterrupt), workers.in_step():
        raise KeyboardInterrupt
    assert "interrupted" in workers.reason


# What one process and several do with the same requests

PREFIX = [(7 * i + 3) % 256 for i in range(40)]
EOS = (258,)


@cache
def grammar():
    asked = StructuredOutputsParams(regex="[a-f]{3,9}")
    return Grammars(byte_tokenizer(), 320, EOS).compile(asked)


def jobs(adapters=(None,)):
    "Prompts with their parameters and adapters."
    forms = [
        dict(temperature=0), dict(temperature=0, logprobs=3, prompt_logprobs=2),
        dict(temperature=1.0, seed=7, top_p=0.9), dict(temperature=0.8, seed=3, top_k=20),
        dict(temperature=0, repetition_penalty=1.3),
        dict(temperature=0, structured_outputs=grammar()),
        dict(temperature=1.0, seed=1, structured_outputs=grammar())]
    return [(PREFIX[:16 * (i % 3)] + list(range(9 + i, 20 + 3 * i)),
             SamplingParams(max_tokens=12, **form), adapters[i % len(adapters)])
            for i, form in enumerate(forms + forms[:3])]


class Counted(NgramProposer):
    "Guesses, and counts them."
    num_drafts = 0

    def propose(self, requests, max_tokens):
        drafts = super().propose(requests, max_tokens)
        self.num_drafts += sum(map(len, drafts))
        return drafts


def make_engine(runner, pool=None, **more):
    "A small engine: prompts come in chunks."
    cache = PrefixCachingBlockManager(shard_entry.NUM_BLOCKS, shard_entry.BLOCK_SIZE)
    admission = {"admission": AdapterAdmission(shard_entry.MAX_LORAS)} if pool else {}
    scheduler = Scheduler(cache, ChunkedPrefill(), 6, 24, **admission)
    return Engine(runner, scheduler, EOS, processors=(*DEFAULT_PROCESSORS, GrammarMask()),
                  listeners=[pool] if pool else [], self_check=True, **more)


def run(engine, requests):
    "Serve them all, and return them as they have ended."
    ids = [engine.add_request(prompt, params, adapter=adapter)
           for prompt, params, adapter in requests]
    done = [engine.requests[i] for i in ids]
    while engine.has_unfinished:
        engine.step()
    return done


def alone(model, requests=None, adapters=None, **more):
    "What one process makes of the same requests."
    pool = AdapterPool(model, shard_entry.MAX_LORAS, shard_entry.MAX_RANK) if adapters else None
    tensors = PagedKVCache(model.config, shard_entry.NUM_BLOCKS, shard_entry.BLOCK_SIZE)
    forward = LoRAForward(Decoder(model), pool) if pool else Decoder(model)
    attention = GroupedAttention(tensors, model.config.num_attention_heads)
    engine = make_engine(ModelRunner(forward, attention), pool, **more)
    digests = load_all(pool, adapters) if adapters else (None,)
    return run(engine, requests or jobs(digests))


def load_all(pool, folders):
    adapters = Adapters(pool)
    return (None, *(adapters.load(folder, folder) for folder in folders))


def assert_equal(found, expected):
    for ours, right in zip(found, expected, strict=True):
        assert ours.finish_reason == right.finish_reason, ours.error
        assert ours.output_ids == right.output_ids
        for own, other in zip(ours.logprobs, right.logprobs, strict=True):
            assert own.token_id == other.token_id
            assert own.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert ours.prompt_logprobs.keys() == right.prompt_logprobs.keys()
    assert any(request.num_cached_tokens for request in found)


class Lonely:
    "A place in a group of which nobody else is there."

    def __init__(self, rank, size):
        self.rank, self.size, self.all_reduce = rank, size, None


class Together:
    "A group and the driver's runner."

    def __init__(self, size, timeout_s=15.0, entry=shard_entry.join, **settings):
        torch.set_num_threads(2)
        self.group = start(entry, settings, size, timeout_s=timeout_s)
        self.runner, self.pool = runner_of(settings, self.group)
        self.told, self.heard = [], threading.Event()
        self.runner.watch(self._note)

    def _note(self, error):
        self.told.append(error)
        self.heard.set()

    @property
    def pids(self):
        return [process.pid for process in self.group.workers.processes]

    def engine(self, **more):
        return make_engine(self.runner, self.pool, **more)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.group.close()
        assert not any(map(psutil.pid_exists, self.pids))


@pytest.fixture(scope="module")
def llama():
    "Two processes with a tiny Llama, which take adapters."
    with Together(2, shape="tiny-llama", lora=True) as together:
        yield together


def test_the_same_tokens_as_one_process(llama):
    found = run(llama.engine(), jobs())
    model = whole_model("tiny-llama")
    assert_equal(found, alone(model))
    prompt, params, _ = jobs()[0]
    assert found[0].output_ids == list(generate(model, prompt, 12, EOS))


def test_the_same_tokens_with_drafts(llama):
    proposer = Counted(1, 3)
    prompts = [([5, 6, 7, 8] * 6, SamplingParams(max_tokens=24, temperature=t, seed=2), None)
               for t in (0.0, 0.0, 0.7)] + jobs()
    found = run(llama.engine(proposer=proposer, num_drafts=3), prompts)
    assert_equal(found, alone(whole_model("tiny-llama"), prompts))
    assert proposer.num_drafts > 10


def test_the_same_tokens_with_adapters(llama, tmp_path):
    everything = tuple(f"{kind}_proj" for kind in "q k v o gate up down".split())
    folders = [save(tmp_path / name, seed=i, only=only, r=i + 2)
               for i, (name, only) in enumerate((("a", everything), ("b", ("v_proj", "o_proj")),
                                                 ("c", ("q_proj", "down_proj"))))]
    digests = load_all(llama.pool, folders)
    found = run(llama.engine(), jobs(digests))
    assert_equal(found, alone(whole_model("tiny-llama"), adapters=folders))
    base = alone(whole_model("tiny-llama"))
    assert [r.output_ids for r in found] != [r.output_ids for r in base]
    for digest in digests[1:]:
        llama.pool.discard(digest)
    assert not llama.pool.adapters
    assert_equal(run(llama.engine(), jobs()), base)


def test_an_adapter_that_does_not_fit_the_whole_model_is_refused(llama, tmp_path):
    folder = save(tmp_path / "wide", shape="tiny-qwen3")
    with pytest.raises(ValueError, match="shapes"):
        llama.pool.read(folder)


def test_the_smallest_cache_counts(llama):
    assert llama.runner.attention.cache.num_blocks == shard_entry.NUM_BLOCKS


def test_numbers_that_are_none_in_another_process_fail_one_request(llama):
    requests = [([9, shard_entry.SPOILT, 5], SamplingParams(max_tokens=4), None), *jobs()]
    bad, *others = run(llama.engine(), requests)
    assert (bad.finish_reason, bad.error) == ("error", NO_NUMBERS)
    assert_equal(others, alone(whole_model("tiny-llama")))


def test_signals_for_all_end_no_worker(llama):
    for pid in llama.pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert llama.runner.forward(BATCH)[0].shape == (2, 320)


def test_nothing_listens_beyond_this_machine(llama):
    for pid in (os.getpid(), *llama.pids):
        listening = [c for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
        assert listening and {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_two_groups_in_one_process(llama):
    with Together(2, shape="tiny-qwen3", forward="fused") as qwen:
        engines = qwen.engine(), llama.engine()
        found = [[engine.requests[engine.add_request(prompt, params)]
                  for prompt, params, _ in jobs()] for engine in engines]
        while any(engine.has_unfinished for engine in engines):
            for engine in engines:
                engine.step()
        for shape, requests in zip(("tiny-qwen3", "tiny-llama"), found):
            assert_equal(requests, alone(whole_model(shape)))
        # and a worker that dies between two steps is noticed
        os.kill(qwen.pids[0], signal.SIGKILL)
        assert qwen.heard.wait(10)
        assert str(qwen.told[0]) == "rank 1 was killed by signal 9"
        with pytest.raises(EngineLost, match="rank 1 was killed by signal 9"):
            qwen.runner.forward(BATCH)
    assert llama.runner.forward(BATCH)[0].shape == (2, 320)


def test_kv_heads_that_two_processes_share_and_one_that_stops():
    with Together(4, 10, shape="tiny-llama", forward="transformers") as together:
        assert together.runner.attention.cache.layers[0].shape[3] == 1
        found = run(together.engine(), jobs())
        assert_equal(found, alone(whole_model("tiny-llama")))
        os.kill(together.pids[1], signal.SIGSTOP)
        engine = together.engine()
        engine.add_request([1, 2, 3])
        with pytest.raises(WorkerFailed, match="^rank 2 has not answered in time$"):
            engine.step()


def quantized_in_parts(shape, size=2):
    "The whole model with the numbers that its parts have: each part has scales of its own."
    whole = whole_model(shape)
    parts = [part_of(Lonely(rank, size), shape, True) for rank in range(size)]
    for name, module in [*adaptable(whole).items(), ("lm_head", whole.lm_head)]:
        pieces, dim = [part.get_submodule(name) for part in parts], 0
        if isinstance(pieces[0], AllReduced):
            pieces, dim = [piece.base for piece in pieces], 1
        weight = torch.cat([piece.dequantize() for piece in pieces], dim)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return whole


def test_weights_in_int8_and_a_worker_that_raises():
    with Together(2, shape="tiny-llama", quantized=True, forward="fused") as together:
        found = run(together.engine(), jobs())
        assert_equal(found, alone(quantized_in_parts("tiny-llama")))
        engine = together.engine()
        engine.add_request([1, 2, shard_entry.RAISES])
        for _ in range(2):
            with pytest.raises(WorkerFailed, match="rank 1 failed: ArithmeticError: this rank"):
                engine.step()
        assert together.heard.wait(10)


def test_a_worker_that_is_killed_in_a_step():
    with Together(2, shape="tiny-qwen3") as together:
        engine = together.engine()
        engine.add_request([1, 2, shard_entry.DIES])
        with pytest.raises(WorkerFailed, match="rank 1 was killed by signal 9"):
            engine.step()
        together.group.close()
        together.group.close()


@pytest.mark.parametrize("entry, said", [
    (shard_entry.refuse, "rank 1 failed: ValueError: there is no such model"),
    (shard_entry.forget, "rank 1 has ended with status 3")])
def test_a_worker_that_cannot_load(entry, said):
    group = start(entry, {}, 2)
    with pytest.raises(WorkerFailed, match=said):
        group.ready()
    [process] = group.workers.processes
    assert process.wait(10) is not None


@pytest.mark.parametrize("entry, kind, text", [
    ("leave", "failed", "has returned from leave before its time"),
    ("refuse", "failed", "failed: ValueError: there is no such model"),
    ("miss", "lost", "nobody is there"), ("unknown", "failed", "failed: AttributeError: .*")])
def test_a_worker_says_why_it_has_ended(entry, kind, text):
    place = dict(rank=1, size=2, kind="cpu", folder="", timeout_s=1.0)
    said = perform(None, ["shard_entry", entry], {}, torch.get_num_threads(), **place)
    assert said[0] == kind and re.fullmatch(text, said[1])


DRIVER = """
import json, sys, time
import torch
import shard_entry
from nanollm.tensor_parallel import start
group = start(getattr(shard_entry, sys.argv[1]), dict(shape="tiny-llama"), 2)
if sys.argv[1] == "join":
    runner, _ = shard_entry.runner_of(dict(shape="tiny-llama"), group)
print(json.dumps([process.pid for process in group.workers.processes]), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("entry", ["join", "doze"])  # it waits for a step, or loads for ever
def test_workers_go_with_their_driver(entry):
    path = os.pathsep.join(filter(None, sys.path))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, entry], stdout=subprocess.PIPE,
                              env=os.environ | {"PYTHONPATH": path})
    [pid] = json.loads(driver.stdout.readline())
    worker = psutil.Process(pid)
    driver.kill()
    driver.wait()
    worker.wait(20)
    driver.stdout.close()


def test_a_group_that_nobody_has_ends():
    group = start(shard_entry.doze, {}, 2)
    [process] = group.workers.processes
    folder = Path(group.folder)
    assert folder.exists()
    del group
    assert process.wait(10) == -signal.SIGKILL and not folder.exists()
