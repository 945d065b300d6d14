"""One model on two processes, through `LLM`, the command and the server."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from lora_folders import save
from test_under_fire import Process, body, streams_with_signals

from nanollm import LLM, SamplingParams, StructuredOutputsParams
from nanollm.lora import LoRARequest
from nanollm.tensor_parallel import WorkerFailed

TINY = dict(model="tiny-llama", load_format="dummy", dtype="float32", num_kv_blocks=96,
            block_size=4, max_num_batched_tokens=24, max_num_seqs=4, progress=False)
TEXTS = ["Paged attention", "Paged attention keeps keys and values in blocks, and more", "x",
         "one two one two one two one two", "Paged attention keeps keys"]


def workers_of(pid):
    return [child for child in psutil.Process(pid).children()
            if any("tensor_parallel" in word for word in child.cmdline())]


def wait_until(condition, seconds=20):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not come true"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return save(tmp_path_factory.mktemp("lora") / "noise", only=names)


@pytest.fixture(scope="module")
def pair(folder):
    "The same model in one process and in two."
    options = dict(TINY, enable_lora=True, speculative_config={
        "method": "ngram", "num_speculative_tokens": 3, "adaptive": False})
    both = [LLM(**options, tensor_parallel_size=size) for size in (1, 2)]
    yield both
    both[1].close()


PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=12),
    "seeded": SamplingParams(temperature=0.9, seed=5, top_p=0.9, max_tokens=12, n=2),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=12),
    "a format": SamplingParams(temperature=0, max_tokens=12, structured_outputs=(
        StructuredOutputsParams(regex="[0-9]{1,4}( cats)?"))),
    "logprobs": SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2)}


@pytest.mark.parametrize("name", PARAMS)
def test_two_processes_make_the_tokens_of_one(pair, name):
    found = [[[answer.token_ids for answer in output.outputs]
              for output in llm.generate(TEXTS, PARAMS[name], use_tqdm=False)] for llm in pair]
    assert found[0] == found[1]
    if name == "logprobs":
        for one, two in zip(*(llm.generate(TEXTS, PARAMS[name], use_tqdm=False)
                              for llm in pair)):
            for a, b in zip(one.outputs[0].logprobs, two.outputs[0].logprobs):
                assert {i: x.logprob for i, x in a.items()} == pytest.approx(
                    {i: x.logprob for i, x in b.items()}, abs=1e-4)


def test_adapters_and_the_base_share_the_steps_of_two_processes(pair, folder):
    noise = LoRARequest("noise", 1, folder)
    wanted = [noise, None, noise, None, None]
    own = [[output.outputs[0].token_ids for output in llm.generate(
        TEXTS, PARAMS["greedy"], use_tqdm=False, lora_request=wanted)] for llm in pair]
    assert own[0] == own[1]
    base = [output.outputs[0].token_ids for output in pair[1].generate(
        TEXTS, PARAMS["greedy"], use_tqdm=False)]
    assert base[0] != own[1][0] and base[1] == own[1][1]


def test_each_process_has_its_part_of_the_heads_and_of_the_memory(pair):
    heads = [llm.engine.runner.attention.cache.layers[0].shape[3] for llm in pair]
    assert heads == [2, 1]
    assert pair[0].engine.scheduler.cache.num_blocks == 96


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_small_weights_on_two_processes(kind):
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0, prompt_logprobs=0)
    seen = []
    for size, quantization in ((1, None), (1, kind), (2, kind)):
        llm = LLM(**TINY, tensor_parallel_size=size, quantization=quantization)
        [output] = llm.generate(TEXTS[1], params, use_tqdm=False)
        seen.append([next(iter(x.values())).logprob for x in output.prompt_logprobs[1:]])
        llm.close()
    exact, *small = seen
    off = [sum(abs(a - b) for a, b in zip(one, exact)) / len(exact) for one in small]
    assert 0 < off[1] < 3 * off[0] # other groups and scales, and as good


def test_a_draft_model_a_cache_of_bytes_and_layers_of_transformers():
    options = dict(TINY, kv_cache_dtype="int8", model_impl="transformers", speculative_config={
        "method": "draft_model", "model": "tiny-llama", "num_speculative_tokens": 3})
    made = []
    for size in (1, 2):
        llm = LLM(**options, tensor_parallel_size=size)
        made.append([output.outputs[0].token_ids
                     for output in llm.generate(TEXTS, PARAMS["greedy"], use_tqdm=False)])
        llm.close()
    assert made[0] == made[1]


def test_what_does_not_divide_is_refused_before_any_process():
    command = ("from nanollm.serve.cli import generate_main; generate_main()", "--model",
               "tiny-llama", "--load-format", "dummy", "--prompt", "Hi",
               "--tensor-parallel-size", "3")
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "among 3 processes: use one of 1, 2, 4" in done.stderr


def test_a_worker_that_dies_ends_an_offline_call_with_a_sentence():
    others = {worker.pid for worker in workers_of(os.getpid())}
    llm = LLM(**TINY, tensor_parallel_size=2)
    [worker] = [one for one in workers_of(os.getpid()) if one.pid not in others]
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    with pytest.raises(WorkerFailed, match="rank 1 was killed by signal 9"):
        for i, (_, _, _) in enumerate(llm.stream("x", params)):
            if i == 3:
                worker.kill()
    with pytest.raises(WorkerFailed, match="rank 1 was killed by signal 9"):
        llm.generate("x", params, use_tqdm=False)
    llm.close()


def test_a_script_needs_no_guard_and_leaves_no_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("\n".join((
        "from nanollm import LLM, SamplingParams",
        f"llm = LLM(**{TINY!r}, tensor_parallel_size=2)",
        "import psutil, os",
        "print(*[c.pid for c in psutil.Process(os.getpid()).children()])",
        "print(len(llm.generate('x', SamplingParams(max_tokens=3), use_tqdm=False)))")))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    pids, count = done.stdout.splitlines()
    assert count == "1" and done.returncode == 0, done.stderr
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids.split()))


def test_the_server_ends_when_a_worker_dies_while_nobody_asks():
    with Process("--tensor-parallel-size", "2") as server:
        assert httpx.post(server.url + "/v1/completions", json=body("x", 3),
                          timeout=60).status_code == 200
        [worker] = workers_of(server.process.pid)
        worker.kill()
        assert server.process.wait(20) == 1
    assert any("rank 1 was killed by signal 9" in line for line in server.lines), server.lines


def test_the_server_lets_open_answers_finish_and_its_workers_end():
    with Process("--tensor-parallel-size", "2") as server:
        workers = workers_of(server.process.pid)
        results, late = streams_with_signals(server, 4, 60, signal.SIGTERM)
        assert late in (503, "refused") and len({text for text, _, _ in results}) == 1
        assert all(error is None for _, _, error in results)
        assert server.process.wait(20) == 0, server.lines
    wait_until(lambda: not any(worker.is_running() for worker in workers))
