"Every metric on known schedules, sums that agree with the outputs, and the line in the log."

import logging
import re
import shutil
import subprocess
import time
from functools import lru_cache

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.metrics import (
    COUNTS,
    METRICS,
    SECONDS,
    TOKENS,
    EngineMetrics,
    StepLog,
    prompt_tokens,
)
from nanollm.model import load_model
from nanollm.paged_attention import GroupedAttention, PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import FinishReason, Request, RequestEvent, RequestStatus, StepRecord, Work
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler, WholePrompts
from nanollm.trace import Recorder
from nanollm.transformer import Decoder


@lru_cache
def llama():
    torch.set_num_threads(1)
    return load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32",
                      progress=False)


def params(num_tokens, **more):
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **more)


def engine(listeners, num_blocks=64, budget=64, policy=None, manager=PrefixCachingBlockManager,
           **more):
    "An engine over blocks of 8 tokens."
    policy = policy or ChunkedPrefill()
    sched = Scheduler(manager(num_blocks, 8), policy, min(8, budget), budget)
    cache = PagedKVCache(llama().config, num_blocks, 8)
    attention = GroupedAttention(cache, llama().config.num_attention_heads)
    runner = ModelRunner(Decoder(llama()), attention)
    return Engine(runner, sched, listeners=listeners, self_check=True, **more)


def run(e):
    while e.has_unfinished:
        e.step()


def read(metrics):
    "All samples, without the label of the model."
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = tuple(value for key, value in sample.labels.items() if key != "model_name")
            found[(sample.name.removeprefix("nanollm:"), *labels)] = sample.value
    return lambda *key: found[key]


# a schedule made by hand, whose every number is known

def made_up():
    "Two requests: a of 5 + 3 tokens is preempted once, b is aborted in the queue."
    a = Request("a", [1, 2, 3, 4, 5], params(3), arrival_s=10.0)
    b = Request("b", [1, 2], params(3), arrival_s=10.5)
    yield RequestEvent("queued", 10.0, a)
    a.admitted_s, a.num_cached_tokens = 10.25, 2
    yield RequestEvent("admitted", 10.25, a)
    a.append(7, 11.0)
    yield StepRecord(0, 10.25, 11.0, (Work(a, 2, 3, 0, 1, (0, 1)),), 0, 1, 0.5)
    yield RequestEvent("queued", 10.5, b)
    a.append(8, 11.5)
    yield StepRecord(1, 11.0, 11.5, (Work(a, 5, 1, 0, 1, (0, 1, 2)),), 1, 1, 0.75)
    a.num_preemptions = 1
    yield RequestEvent("preempted", 12.0, a)
    b.finish(FinishReason.ABORT, 12.5)
    yield RequestEvent("finished", 12.5, b)
    yield StepRecord(2, 12.0, 13.0, (), 1, 0, 0.0)
    yield RequestEvent("admitted", 13.0, a)
    yield StepRecord(3, 13.0, 14.0, (Work(a, 0, 4, 0, 0, (4, 5)),), 0, 1, 0.5)
    a.append(9, 15.0)
    yield RequestEvent("finished", 15.0, a)
    yield StepRecord(4, 14.0, 15.0, (Work(a, 4, 3, 0, 1, (4, 5, 3)),), 0, 0, 0.0)


def test_every_metric_on_a_schedule_made_by_hand():
    metrics = EngineMetrics("m")
    for event in made_up():
        metrics(event)
    get = read(metrics)
    expected = {
        "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0,
        "prefix_cache_queries_total": 5, "prefix_cache_hits_total": 2,
        "request_started_total": 2, "num_preemptions_total": 1, "prompt_tokens_total": 5,
        "generation_tokens_total": 3, "spec_decode_num_drafts_total": 0,
        "spec_decode_num_draft_tokens_total": 0, "spec_decode_num_accepted_tokens_total": 0,
    }
    assert {name: get(name) for name in expected} == expected
    histograms = { # count and sum
        "iteration_tokens": (4, (3 + 1) + 1 + 4 + (1 + 1)),
        "time_to_first_token_seconds": (1, 1.0), "inter_token_latency_seconds": (2, 0.5 + 3.5),
        "request_time_per_output_token_seconds": (1, 2.0),
        "e2e_request_latency_seconds": (2, 5.0 + 2.0), "request_queue_time_seconds": (1, 0.25),
        "request_prefill_time_seconds": (1, 0.75), "request_decode_time_seconds": (1, 4.0),
        "request_inference_time_seconds": (1, 4.75), "request_prompt_tokens": (2, 7),
        "request_generation_tokens": (2, 3), "request_max_num_generation_tokens": (2, 3),
        "request_params_max_tokens": (2, 6), "request_params_n": (2, 2),
        "request_num_preemptions": (2, 1),
    }
    for name, count_and_sum in histograms.items():
        assert (get(name + "_count"), get(name + "_sum")) == count_and_sum, name
    names = {name + "_total" * (kind.__name__ == "Counter") for name, kind, _ in METRICS}
    assert set(expected) | set(histograms) == names
    ended = {reason: get("request_success_total", reason) for reason in FinishReason}
    assert ended == dict(stop=0, length=1, abort=1, error=0)
    bounds = "0.25", "0.5", "2.5", "5.0", "+Inf"
    buckets = [get("inter_token_latency_seconds_bucket", bound) for bound in bounds]
    assert buckets == [0, 1, 1, 2, 2], "a bucket's bound belongs to it"
    assert [get("request_num_preemptions_bucket", le) for le in ("0.0", "1.0")] == [1, 2]


def test_gauges_follow_the_last_step():
    metrics, seen = EngineMetrics(), []
    names = "num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"
    for event in made_up():
        metrics(event)
        if isinstance(event, StepRecord):
            get = read(metrics)
            seen.append(tuple(map(get, names)))
            assert get("num_requests_waiting_by_reason", "capacity") == event.num_waiting
            assert get("num_requests_waiting_by_reason", "deferred") == 0
    assert seen == [(0, 1, 0.5), (1, 1, 0.75), (1, 0, 0), (0, 1, 0.5), (0, 0, 0)]


def test_the_page_is_valid_and_says_nothing_twice():
    metrics = EngineMetrics("a \"name\"\nwith \\ in it", ["nanollm:"])
    page = metrics.exposition().decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    names = {"request_success", "num_requests_waiting_by_reason", "cache_config_info",
             "lora_requests_info",
             "spec_decode_num_accepted_tokens_per_pos"}
    names |= {name for name, _, _ in METRICS}
    assert set(families) == {"nanollm:" + name for name in names}
    for name, kind, text in METRICS:
        assert families["nanollm:" + name].type == kind.__name__.lower()
        assert families["nanollm:" + name].documentation == text
    samples = [sample for family in families.values() for sample in family.samples]
    assert {s.labels["model_name"] for s in samples} == {"a \"name\"\nwith \\ in it"}
    assert "_created" not in page
    kept = [sample for family in metrics.registry.collect() for sample in family.samples]
    assert any(sample.name.endswith("_created") for sample in kept), "it changed nothing"
    for bounds in (SECONDS, TOKENS, COUNTS):
        assert list(bounds) == sorted(set(bounds))


def test_no_histogram_is_named_as_if_it_were_a_counter():
    assert not [name for name, kind, _ in METRICS if name.endswith("_total")]


def vllms_page(prefixes):
    metrics = EngineMetrics("m", prefixes)
    for event in made_up():
        metrics(event)
    return metrics.exposition().decode()


def test_the_names_are_vllms_if_asked():
    page = vllms_page(["vllm:"])
    assert 'vllm:iteration_tokens_total_count{model_name="m"} 4.0' in page
    assert "nanollm" not in page
    names = { # of vLLM's dashboard
        "time_to_first_token_seconds", "inter_token_latency_seconds", "num_requests_running",
        "num_requests_waiting", "kv_cache_usage_perc", "request_success", "prompt_tokens",
        "generation_tokens", "request_prompt_tokens", "request_generation_tokens",
        "e2e_request_latency_seconds", "request_queue_time_seconds", "num_preemptions",
        "request_prefill_time_seconds", "request_decode_time_seconds", "cache_config_info",
        "request_max_num_generation_tokens", "num_requests_waiting_by_reason",
        "request_params_n", "request_params_max_tokens", "prefix_cache_queries",
        "prefix_cache_hits", "iteration_tokens_total", "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
        "spec_decode_num_accepted_tokens_per_pos"}
    assert {"vllm:" + name for name in names} <= {
        family.name for family in text_string_to_metric_families(page)}


def test_both_prefixes_show_the_same_numbers():
    both = vllms_page(["nanollm:", "vllm:"])
    assert both == vllms_page(["nanollm:"]) + vllms_page(["vllm:"])
    values = {}
    for family in text_string_to_metric_families(both):
        for sample in family.samples:
            prefix, name = sample.name.split(":")
            name = name.replace("tokens_total_", "tokens_")
            values.setdefault(prefix, {})[name, *sorted(sample.labels.items())] = sample.value
    assert values["nanollm"] == values["vllm"] and len(values["vllm"]) > 300


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_finds_nothing_wrong_with_our_names():
    done = subprocess.run(["promtool", "check", "metrics"], input=vllms_page(["nanollm:"]),
                          capture_output=True, text=True)
    wrong = [line for line in (done.stdout + done.stderr).splitlines()
             if "should not contain ':'" not in line]
    assert not wrong, "besides the colon, which is vLLM's custom"


def test_the_cache_is_described_in_labels():
    metrics = EngineMetrics("m", ["nanollm:"])
    metrics.describe_cache(num_gpu_blocks=22, block_size=8)
    metrics.describe_cache(num_gpu_blocks=23, block_size=8)
    lines = [x for x in metrics.exposition().decode().split("\n") if "cache_config_info{" in x]
    assert lines == [
        'nanollm:cache_config_info{block_size="8",model_name="m",num_gpu_blocks="23"} 1.0']


def test_adapters_are_one_series_that_says_who_runs_and_who_waits():
    metrics = EngineMetrics("m", ["vllm:"])
    assert "vllm:lora_requests_info{" not in metrics.exposition().decode()
    metrics.follow_adapters(4, str.upper)
    requests = [Request(str(i), [1], SamplingParams(), adapter=a) for i, a in enumerate("abab")]
    requests.append(Request("base", [1], SamplingParams()))
    for request in requests:
        metrics(RequestEvent("queued", 0.0, request))

    def labels():
        found = re.findall(r"lora_requests_info\{(.*)\} (.*)", metrics.exposition().decode())
        [(text, value)] = found
        assert abs(float(value) - time.time()) < 60
        return dict(re.findall(r'(\w+)="([^"]*)"', text))

    assert labels() == {"model_name": "m", "max_lora": "4", "running_lora_adapters": "",
                        "waiting_lora_adapters": "A,B"}
    requests[0].status = requests[4].status = RequestStatus.RUNNING
    assert labels()["running_lora_adapters"] == "A"
    assert labels()["waiting_lora_adapters"] == "A,B"
    for request in requests:
        request.finish(FinishReason.STOP, 1.0)
        metrics(RequestEvent("finished", 1.0, request))
    assert labels()["running_lora_adapters"] == labels()["waiting_lora_adapters"] == ""
    assert not metrics._adapted


def test_two_listeners_do_not_share_anything():
    one, two = EngineMetrics("m"), EngineMetrics("m", ["other:"])
    assert isinstance(one.registry, CollectorRegistry) and one.registry is not two.registry
    for event in made_up():
        one(event)
    assert read(one)("generation_tokens_total") == 3
    assert b"other:generation_tokens_total{model_name=\"m\"} 0.0" in two.exposition()


@pytest.mark.parametrize("start, num_new, expected", [
    (0, 3, 3), (3, 4, 2), (0, 9, 5), (5, 1, 0), (7, 1, 0), (4, 1, 1)])
def test_prompt_tokens_of_a_piece_of_work(start, num_new, expected):
    a = Request("a", [1, 2, 3, 4, 5], params(9))
    assert prompt_tokens(Work(a, start, num_new, 0, 0, ())) == expected


def test_a_prompt_counts_once_for_all_answers_to_it():
    metrics = EngineMetrics()
    for i in range(3):
        a = Request(f"a-{i}", [1, 2, 3], params(1, n=3), index=i, arrival_s=0.0)
        a.admitted_s = 0.5
        a.append(7, 1.0)
        metrics(StepRecord(i, 0.5, 1.0, (Work(a, 0, 3, 0, 1, ()),), 0, 1, 0.1))
        metrics(RequestEvent("finished", 1.0, a))
    get = read(metrics)
    assert get("prompt_tokens_total") == 3 and get("generation_tokens_total") == 3
    assert (get("request_params_n_count"), get("request_params_n_sum")) == (1, 3)
    assert get("request_generation_tokens_count") == 3
    assert get("time_to_first_token_seconds_count") == 3


# the engine's own events

@pytest.mark.parametrize("num_blocks, budget, policy", [
    (64, 64, ChunkedPrefill), (8, 8, ChunkedPrefill), (8, 16, WholePrompts)])
def test_sums_agree_with_the_outputs(num_blocks, budget, policy):
    metrics, recorder, found = EngineMetrics(), Recorder(), []
    e = engine([metrics, recorder], num_blocks, budget, policy())
    for i in range(8):
        for index in range(1 + i % 2):
            name = e.add_request([i] * (5 + 4 * i), params(8 + 2 * i, n=1 + i % 2), index=index)
            found.append(e.requests[name])
        e.step()
    e.abort(found[-3].request_id)
    run(e)
    get, begun = read(metrics), [r for r in found if r.output_ids]
    num_tokens = sum(len(r.output_ids) for r in found)
    assert get("generation_tokens_total") == get("request_generation_tokens_sum") == num_tokens
    assert get("inter_token_latency_seconds_count") == num_tokens - len(begun)
    assert get("time_to_first_token_seconds_count") == len(begun)
    assert get("request_decode_time_seconds_count") == len(begun)
    assert get("prompt_tokens_total") == sum(r.num_prompt_tokens for r in begun if r.index == 0)
    assert get("request_started_total") == len(found)
    assert sum(get("request_success_total", reason) for reason in FinishReason) == len(found)
    aborted = [r for r in found if r.finish_reason == "abort"]
    assert get("request_success_total", "abort") == len(aborted) > 0
    assert get("num_preemptions_total") == sum(r.num_preemptions for r in found)
    assert (get("num_preemptions_total") > 0) == (num_blocks == 8)
    works = [work for record in recorder.steps for work in record.works]
    tokens = sum(prompt_tokens(work) for work in works) + num_tokens
    assert get("iteration_tokens_sum") == tokens
    decode_s = sum(r.token_times_s[-1] - r.token_times_s[0] for r in begun)
    assert get("inter_token_latency_seconds_sum") == pytest.approx(decode_s)
    assert get("request_decode_time_seconds_sum") == pytest.approx(decode_s)
    admitted = [r for r in found if r.admitted_s is not None]
    assert get("request_queue_time_seconds_count") == len(admitted)
    gauges = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
    assert [get(name) for name in gauges] == [0, 0, 0]


def test_a_recomputation_in_pieces_adds_no_gaps():
    metrics = EngineMetrics()
    e = engine([metrics], num_blocks=7, budget=8, manager=BlockManager)
    for name in "ab":
        e.add_request([ord(name)] * 20, params(20), request_id=name)
    found = [e.requests[name] for name in "ab"]
    run(e)
    assert found[1].num_preemptions > 0
    get = read(metrics)
    assert get("inter_token_latency_seconds_count") == 38
    assert get("inter_token_latency_seconds_sum") > 0


def test_prefix_hits_are_counted_in_tokens_once_and_only_if_looked_up():
    metrics = EngineMetrics()
    e = engine([metrics])
    prompt_ids = list(range(20))
    for use in (True, True, False):
        e.add_request(prompt_ids, params(2), use_prefix_cache=use)
        run(e)
    get = read(metrics)
    assert (get("prefix_cache_queries_total"), get("prefix_cache_hits_total")) == (40, 16)


def test_resuming_after_a_preemption_is_no_prefix_hit():
    metrics = EngineMetrics()
    e = engine([metrics], num_blocks=7)
    for name in "ab":
        e.add_request([ord(name)] * 20, params(20), request_id=name)
    run(e)
    get = read(metrics)
    assert get("num_preemptions_total") > 0 and get("request_queue_time_seconds_count") == 2
    assert (get("prefix_cache_queries_total"), get("prefix_cache_hits_total")) == (40, 0)


def test_an_abort_in_the_queue_is_an_end_without_a_beginning():
    metrics = EngineMetrics()
    e = engine([metrics], num_blocks=4)
    e.add_request([1] * 20, params(8), request_id="first")
    e.step()
    e.add_request([2] * 20, params(8), request_id="second")
    e.step()
    assert read(metrics)("num_requests_waiting") == 1
    e.abort("second")
    run(e)
    get = read(metrics)
    assert [get("request_success_total", why) for why in ("abort", "length")] == [1, 1]
    for name in ("e2e_request_latency_seconds", "request_generation_tokens"):
        assert get(name + "_count") == 2
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds"):
        assert get(name + "_count") == 1
    assert get("prefix_cache_queries_total") == get("prompt_tokens_total") == 20


class Oracle:
    "Drafts the right tokens, or wrong ones."

    def __init__(self, shift=0):
        self.shift = shift

    def propose(self, requests, max_tokens):
        drafts = []
        for request, k in zip(requests, max_tokens):
            right = list(generate(llama(), request.prompt_ids, request.params.max_tokens))
            done = len(request.output_ids)
            drafts.append([(t + self.shift) % 320 for t in right[done:done + k]])
        return drafts


@pytest.mark.parametrize("shift, num_steps", [(0, 4), (1, 13)])
def test_tokens_of_one_step_are_counted_one_by_one(shift, num_steps):
    metrics, recorder = EngineMetrics(), Recorder()
    e = engine([metrics, recorder], proposer=Oracle(shift), num_drafts=3)
    r = e.requests[e.add_request([5, 6, 7], params(13))]
    run(e)
    get = read(metrics)
    assert len(recorder.steps) == num_steps
    assert get("generation_tokens_total") == 13
    assert get("inter_token_latency_seconds_count") == 12
    decode_s = r.token_times_s[-1] - r.token_times_s[0]
    assert get("inter_token_latency_seconds_sum") == pytest.approx(decode_s)
    zeros = 13 - num_steps # gaps between tokens that came together
    assert get("inter_token_latency_seconds_bucket", "0.001") >= zeros
    works = [work for record in recorder.steps for work in record.works]
    assert [work.num_new - work.num_drafts for work in works] == [3] + [1] * (num_steps - 1)
    assert get("iteration_tokens_sum") == 3 + 13, "rejected drafts are no tokens"
    guessed = [work.num_drafts for work in works if work.num_drafts]
    assert get("spec_decode_num_drafts_total") == len(guessed)
    assert get("spec_decode_num_draft_tokens_total") == sum(guessed)
    assert get("spec_decode_num_accepted_tokens_total") == 13 - num_steps
    places = [get("spec_decode_num_accepted_tokens_per_pos_total", str(i)) for i in range(3)]
    assert places == [(13 - num_steps) / 3] * 3


def test_first_tokens_that_come_several_at_once_have_gaps_too():
    "The last token of a prompt may be a gap of one, and get drafts."
    metrics = EngineMetrics()
    e = engine([metrics], budget=8, proposer=Oracle(), num_drafts=3)
    r = e.requests[e.add_request(list(range(9)), params(8))]
    e.step()
    e.step()
    assert len(r.output_ids) == 4
    get = read(metrics)
    assert get("time_to_first_token_seconds_count") == 1
    assert get("inter_token_latency_seconds_count") == 3


def test_errors_count_as_ends(caplog):
    metrics = EngineMetrics()
    e = engine([metrics])
    e.add_request([1, 2, 3], params(5))
    e.step()
    e.runner.forward = lambda batch: 1 / 0
    run(e)
    get = read(metrics)
    assert get("request_success_total", "error") == 1 and get("generation_tokens_total") == 1
    assert get("inter_token_latency_seconds_count") == 0


# the line in the log

def logged(caplog, interval_s, events):
    log = StepLog(interval_s)
    with caplog.at_level(logging.INFO, "nanollm.metrics"):
        for event in events:
            log(event)
    return [record.getMessage() for record in caplog.records]


def test_a_line_says_what_has_happened_since_the_last(caplog):
    first, second = logged(caplog, 2.0, made_up())
    assert first == ("running 0, waiting 1, KV cache 0.0 %, prompt 1.1 tok/s, "
                     "output 0.7 tok/s, prefix hits 40.0 %")
    assert second == ("running 0, waiting 0, KV cache 0.0 %, prompt 2.5 tok/s, "
                      "output 0.5 tok/s, prefix hits 0.0 %")


def test_the_line_tells_of_drafts_where_there_were_some(caplog):
    a = Request("a", [1], params(20), arrival_s=0.0)
    steps = [StepRecord(i, i, i + 1, (Work(a, 1, 5, 4, num_made, ()),), 0, 1, 0.1)
             for i, num_made in enumerate((4, 1))]
    [line] = logged(caplog, 2.0, steps)
    assert line.endswith("output 2.5 tok/s, prefix hits 0.0 %, drafts accepted 37.5 %")


def test_nothing_is_logged_when_nothing_happens_and_not_too_often(caplog):
    idle = [StepRecord(i, i, i + 1, (), 0, 0, 0.0) for i in range(20)]
    assert logged(caplog, 1.0, idle) == []
    a = Request("a", [1], params(20), arrival_s=0.0)
    works = [StepRecord(i, i, i + 1, (Work(a, i, 1, 0, 1, ()),), 0, 1, 0.1) for i in range(20)]
    assert len(logged(caplog, 5.0, works)) == 4
