"Every metric on known schedules; sums that agree with the outputs; pictures and traces that show what happened."

import json
from functools import lru_cache

import matplotlib
import pytest
import torch
from matplotlib.colors import to_rgb
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.measure import COLORS, PALETTE
from nanollm.metrics import (
    DARK,
    LIGHT,
    METRICS,
    SECONDS,
    TOKENS,
    EngineMetrics,
    Recorder,
    block_map,
    chrome_trace,
    gantt,
    label,
    write_trace,
)
from nanollm.model import load_model
from nanollm.paged_attention import PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import FinishReason, Request, RequestEvent, StepRecord, Work
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler, WholePrompts

matplotlib.use("Agg")


@lru_cache
def llama():
    torch.set_num_threads(1)
    return load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False)


def params(num_tokens, **more):
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **more)


def engine(listeners, num_blocks=64, budget=64, policy=None, manager=PrefixCachingBlockManager, **more):
    sched = Scheduler(manager(num_blocks, 8), policy or ChunkedPrefill(), min(8, budget), budget)
    runner = ModelRunner(llama(), PagedKVCache(llama().config, num_blocks, 8))
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


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt
    plt.close("all")


# a schedule made by hand, whose every number is known

def made_up():
    "Events of two requests: one of 5 + 3 tokens that is preempted once, and one that is aborted in the queue."
    a = Request("a", [1, 2, 3, 4, 5], params(3), arrival_s=10.0)
    b = Request("b", [1, 2], params(3), arrival_s=10.5)
    yield RequestEvent("queued", 10.0, a)
    a.admitted_s, a.num_cached_tokens = 10.25, 2
    yield RequestEvent("admitted", 10.25, a)
    a.append(7, 11.0)
    yield StepRecord(0, 10.25, 11.0, (Work(a, 2, 3, 1, (0, 1)),), 0, 1, 0.5)
    yield RequestEvent("queued", 10.5, b)
    a.append(8, 11.5)
    yield StepRecord(1, 11.0, 11.5, (Work(a, 5, 1, 1, (0, 1, 2)),), 1, 1, 0.75)
    a.num_preemptions = 1
    yield RequestEvent("preempted", 12.0, a)
    b.finish(FinishReason.ABORT, 12.5)
    yield RequestEvent("finished", 12.5, b)
    yield StepRecord(2, 12.0, 13.0, (), 1, 0, 0.0)
    yield RequestEvent("admitted", 13.0, a)
    yield StepRecord(3, 13.0, 14.0, (Work(a, 0, 4, 0, (4, 5)),), 0, 1, 0.5)
    a.append(9, 15.0)
    yield RequestEvent("finished", 15.0, a)
    yield StepRecord(4, 14.0, 15.0, (Work(a, 4, 3, 1, (4, 5, 3)),), 0, 0, 0.0)


def test_every_metric_on_a_schedule_made_by_hand():
    metrics = EngineMetrics("m")
    for event in made_up():
        metrics(event)
    get = read(metrics)
    expected = {
        "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0,
        "prefix_cache_queries_total": 5, "prefix_cache_hits_total": 2,
        "request_started_total": 2, "num_preemptions_total": 1, "prompt_tokens_total": 5, "generation_tokens_total": 3,
    }
    assert {name: get(name) for name in expected} == expected
    histograms = { # count and sum
        "iteration_tokens_total": (4, 3 + 1 + 4 + 3), "time_to_first_token_seconds": (1, 1.0),
        "inter_token_latency_seconds": (2, 0.5 + 3.5), "request_time_per_output_token_seconds": (1, 2.0),
        "e2e_request_latency_seconds": (2, 5.0 + 2.0), "request_queue_time_seconds": (1, 0.25),
        "request_prefill_time_seconds": (1, 0.75), "request_decode_time_seconds": (1, 4.0),
        "request_inference_time_seconds": (1, 4.75), "request_prompt_tokens": (2, 7),
        "request_generation_tokens": (2, 3),
    }
    assert {name: (get(name + "_count"), get(name + "_sum")) for name in histograms} == histograms
    assert set(expected) | set(histograms) == {n + "_total" * (k.__name__ == "Counter") for n, k, _ in METRICS}
    ended = {reason: get("request_success_total", reason) for reason in FinishReason}
    assert ended == dict(stop=0, length=1, abort=1, error=0)
    assert get("inter_token_latency_seconds_bucket", "0.25") == 0
    assert get("inter_token_latency_seconds_bucket", "0.5") == 1, "a bucket's bound belongs to it"
    assert [get("inter_token_latency_seconds_bucket", le) for le in ("2.5", "5.0", "+Inf")] == [1, 2, 2]


def test_gauges_follow_the_last_step():
    metrics, seen = EngineMetrics(), []
    names = "num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"
    for event in made_up():
        metrics(event)
        if isinstance(event, StepRecord):
            get = read(metrics)
            seen.append(tuple(map(get, names)))
    assert seen == [(0, 1, 0.5), (1, 1, 0.75), (1, 0, 0), (0, 1, 0.5), (0, 0, 0)]


def test_the_page_is_valid_and_says_nothing_twice():
    metrics = EngineMetrics("a \"name\"\nwith \\ in it")
    page = metrics.exposition().decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert set(families) == {"nanollm:" + name for name, _, _ in METRICS} | {"nanollm:request_success"}
    for name, kind, text in METRICS:
        assert families["nanollm:" + name].type == kind.__name__.lower()
        assert families["nanollm:" + name].documentation == text
    assert {s.labels["model_name"] for f in families.values() for s in f.samples} == {"a \"name\"\nwith \\ in it"}
    assert "_created" not in page
    assert any(s.name.endswith("_created") for f in metrics.registry.collect() for s in f.samples), "it changed nothing"
    assert list(SECONDS) == sorted(set(SECONDS)) and list(TOKENS) == sorted(set(TOKENS))


def test_two_listeners_do_not_share_anything():
    one, two = EngineMetrics("m"), EngineMetrics("m", prefix="other:")
    assert isinstance(one.registry, CollectorRegistry) and one.registry is not two.registry
    for event in made_up():
        one(event)
    assert read(one)("generation_tokens_total") == 3
    assert b"other:generation_tokens_total{model_name=\"m\"} 0.0" in two.exposition()


# the engine's own events

@pytest.mark.parametrize("num_blocks, budget, policy", [
    (64, 64, ChunkedPrefill), (8, 8, ChunkedPrefill), (8, 16, WholePrompts)])
def test_sums_agree_with_the_outputs(num_blocks, budget, policy):
    metrics, recorder, found = EngineMetrics(), Recorder(), []
    e = engine([metrics, recorder], num_blocks, budget, policy())
    for i in range(8):
        e.add_request([i] * (5 + 4 * i), params(8 + 2 * i, n=1 + i % 2), request_id=str(i))
        found += e.requests[str(i)]
        e.step()
    e.abort("6")
    run(e)
    get, begun = read(metrics), [r for r in found if r.output_ids]
    num_tokens = sum(len(r.output_ids) for r in found)
    assert get("generation_tokens_total") == get("request_generation_tokens_sum") == num_tokens
    assert get("inter_token_latency_seconds_count") == num_tokens - len(begun)
    assert get("time_to_first_token_seconds_count") == get("request_decode_time_seconds_count") == len(begun)
    assert get("prompt_tokens_total") == sum(r.num_prompt_tokens for r in begun if r.index == 0)
    assert get("request_started_total") == len(found)
    assert sum(get("request_success_total", reason) for reason in FinishReason) == len(found)
    assert get("request_success_total", "abort") == sum(r.finish_reason == "abort" for r in found) > 0
    assert get("num_preemptions_total") == sum(r.num_preemptions for r in found)
    assert (get("num_preemptions_total") > 0) == (num_blocks == 8)
    assert get("iteration_tokens_total_sum") == sum(work.num_new for _, work, _ in recorder.works())
    decode_s = sum(r.token_times_s[-1] - r.token_times_s[0] for r in begun)
    assert get("inter_token_latency_seconds_sum") == get("request_decode_time_seconds_sum") == pytest.approx(decode_s)
    assert get("request_queue_time_seconds_count") == sum(r.admitted_s is not None for r in found)
    assert get("num_requests_running") == get("num_requests_waiting") == get("kv_cache_usage_perc") == 0


def test_a_recomputation_in_pieces_adds_no_gaps():
    metrics = EngineMetrics()
    e = engine([metrics], num_blocks=7, budget=8, manager=BlockManager)
    for name in "ab":
        e.add_request([ord(name)] * 20, params(20), request_id=name)
    found = [e.requests[name][0] for name in "ab"]
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
    assert (get("request_success_total", "abort"), get("request_success_total", "length")) == (1, 1)
    assert get("e2e_request_latency_seconds_count") == get("request_generation_tokens_count") == 2
    assert get("request_queue_time_seconds_count") == get("request_prefill_time_seconds_count") == 1
    assert get("prefix_cache_queries_total") == get("prompt_tokens_total") == 20


class Oracle:
    "Drafts the right tokens, or wrong ones."

    def __init__(self, shift=0):
        self.shift = shift

    def propose(self, requests, max_tokens):
        right = [list(generate(llama(), r.prompt_ids, r.params.max_tokens))[len(r.output_ids):] for r in requests]
        return [[(token_id + self.shift) % 320 for token_id in ids[:k]] for ids, k in zip(right, max_tokens)]


@pytest.mark.parametrize("shift, num_steps", [(0, 4), (1, 13)])
def test_tokens_of_one_step_are_counted_one_by_one(shift, num_steps):
    metrics, recorder = EngineMetrics(), Recorder()
    e = engine([metrics, recorder], proposer=Oracle(shift), num_drafts=3)
    r = e.requests[e.add_request([5, 6, 7], params(13))][0]
    run(e)
    get = read(metrics)
    assert len(recorder.steps) == num_steps
    assert get("generation_tokens_total") == 13 and get("inter_token_latency_seconds_count") == 12
    assert get("inter_token_latency_seconds_sum") == pytest.approx(r.token_times_s[-1] - r.token_times_s[0])
    zeros = 13 - num_steps # gaps between tokens that came together
    assert get("inter_token_latency_seconds_bucket", "0.001") >= zeros
    assert [known for _, _, known in recorder.works()] == [3] + [1] * (num_steps - 1)


def test_first_tokens_that_come_several_at_once_have_gaps_too():
    "The last token of a prompt may be a gap of one, and get drafts."
    metrics = EngineMetrics()
    e = engine([metrics], budget=8, proposer=Oracle(), num_drafts=3)
    r = e.requests[e.add_request(list(range(9)), params(8))][0]
    e.step()
    e.step()
    assert len(r.output_ids) == 4
    get = read(metrics)
    assert get("time_to_first_token_seconds_count") == 1 and get("inter_token_latency_seconds_count") == 3


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


# recordings

def recorded(**more):
    "A run with a cut prompt, an abort in the queue, preemptions and shared blocks."
    recorder = Recorder()
    e = engine([recorder], num_blocks=12, budget=16, **more)
    recorder.cache = e.scheduler.cache
    for i in range(5):
        if i:
            e.step()
        e.add_request(list(range(24)) + [200 + i] * (4 + i), params(16, n=1 + (i == 0)), request_id=f"r{i}")
    e.abort("r4")
    run(e)
    assert any(event.kind == "preempted" for event, _ in recorder.events)
    return recorder


def test_spans_cover_every_life_without_holes():
    recorder = recorded()
    lives = {}
    for request, has_memory, first, end in recorder.spans():
        assert 0 <= first <= end <= len(recorder.steps)
        lives.setdefault(request, []).append((has_memory, first, end))
    assert len(lives) == 6
    for request, spans in lives.items():
        assert [has_memory for has_memory, _, _ in spans] == [i % 2 == 1 for i in range(len(spans))]
        assert all(a[2] == b[1] for a, b in zip(spans, spans[1:]))
        assert len(spans) == (1 if request.request_id == "r4" else 2 * (1 + request.num_preemptions))
    for step, work, _ in recorder.works():
        assert any(has_memory and first <= step < end for has_memory, first, end in lives[work.request])


def test_spans_of_a_schedule_made_by_hand():
    recorder = Recorder()
    for event in made_up():
        recorder(event)
    spans = [(request.request_id, *rest) for request, *rest in recorder.spans()]
    assert spans == [("a", False, 0, 0), ("a", True, 0, 2), ("b", False, 1, 2), ("a", False, 2, 3), ("a", True, 3, 5)]
    assert [(step, known) for step, _, known in recorder.works()] == [(0, 3), (1, 1), (3, 4), (4, 3)]


def test_who_is_not_done_when_the_recording_ends_is_there_to_its_end():
    recorder = Recorder()
    e = engine([recorder], num_blocks=4)
    e.add_request([1] * 20, params(8), request_id="a")
    e.add_request([2] * 20, params(8), request_id="b")
    for _ in range(3):
        e.step()
    spans = [(r.request_id, *rest) for r, *rest in recorder.spans()]
    assert sorted(spans) == [("a", False, 0, 0), ("a", True, 0, 3), ("b", False, 0, 3)]
    gantt(recorder), block_map(recorder, 4), chrome_trace(recorder)


def test_labels_tell_answers_apart():
    one, several = (Request("x", [1], params(1, n=n), index=n - 1) for n in (1, 2))
    assert (label(one), label(several)) == ("x", "x.1")


def boxes(ax, color):
    "Left edges and rows of the boxes of a colour."
    found = []
    for collection in ax.collections:
        if tuple(collection.get_facecolor()[0][:3]) == to_rgb(color):
            found += [(round(p.vertices[:, 1].mean()), float(p.vertices[:, 0].min())) for p in collection.get_paths()]
    return sorted(found)


def test_gantt_draws_every_step_in_its_place():
    recorder = Recorder()
    for event in made_up():
        recorder(event)
    ax = gantt(recorder)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
    assert boxes(ax, LIGHT) == [(0, 0.0), (0, 3.0), (0, 4.0)]
    assert boxes(ax, DARK) == [(0, 0.8), (0, 1.0), (0, 4.8)]
    assert boxes(ax, COLORS["before"]) == [(0, 2.0), (1, 1.0)]
    crosses = [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in ax.lines]
    assert crosses == [(2, 0, "x"), (2, 1, "|")]
    assert sorted(text.get_text() for text in ax.texts) == ["3", "3", "4"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "waits", "computes (tokens)", "makes a token", "preempted", "aborted"]


def test_gantt_shows_who_stands_still_and_how_many_tokens_came_at_once():
    recorder = Recorder()
    e = engine([recorder], policy=WholePrompts(), proposer=Oracle(), num_drafts=2)
    e.add_request([1, 2, 3], params(7), request_id="a")
    e.step()
    e.add_request([9] * 30, params(2), request_id="b")
    run(e)
    ax = gantt(recorder)
    assert boxes(ax, "white") == [(0, 1.0)]
    assert [text.get_text() for text in ax.texts if text.get_color() == "white"] == ["3", "3"]


@pytest.mark.parametrize("num_steps, expected", [(10, {"128"}), (200, set())])
def test_numbers_are_left_out_where_they_do_not_fit(num_steps, expected):
    recorder = Recorder()
    r = Request("a", [1] * 128 * num_steps, params(1), arrival_s=0.0)
    recorder(RequestEvent("queued", 0.0, r))
    recorder(RequestEvent("admitted", 0.0, r))
    for step in range(num_steps):
        recorder(StepRecord(step, step, step + 1, (Work(r, 128 * step, 128, 0, ()),), 0, 1, 0.1))
    assert {text.get_text() for text in gantt(recorder).texts} == expected
    assert not gantt(recorder, texts=False).texts


def test_pictures_take_axes_and_empty_recordings():
    from nanollm.measure import axes
    _, (left, right) = axes("step", "request", ncols=2)
    recorder = recorded()
    assert gantt(recorder, left, texts=False) is left and left.get_legend() is None
    assert block_map(recorder, 12, right) is right and right.get_legend() is None
    gantt(Recorder())


def pixels(ax):
    "The colours of a block map: [block][step]."
    return [[tuple(round(float(v), 3) for v in pixel) for pixel in row] for row in ax.images[0].get_array()]


def colour(name):
    return tuple(round(v, 3) for v in to_rgb(name))


def test_block_map_colours_who_holds_a_block():
    recorder = Recorder()
    for event in made_up():
        recorder(event)
    recorder.cached[2] = [0, 1]
    image, a, kept, free = pixels(block_map(recorder, 6)), colour(PALETTE[0]), colour("#CFCFCF"), colour("white")
    assert image[0] == [a, a, kept, free, free]
    assert image[2] == [free, a, free, free, free]
    assert image[3] == [free, free, free, free, a]
    assert image[4] == image[5] == [free, free, free, a, a]


def test_block_map_keeps_the_blocks_of_who_stands_still_and_marks_shared_ones():
    recorder = Recorder()
    e = engine([recorder], policy=WholePrompts(), num_blocks=16)
    e.add_request(list(range(20)), params(6), request_id="a")
    e.step()
    e.add_request([9] * 30, params(2), request_id="b")
    e.step() # a stands still
    e.add_request(list(range(16)) + [9], params(2), request_id="c")
    e.step()
    image = pixels(block_map(recorder, 16))
    assert image[0][:2] == [colour(PALETTE[0])] * 2
    assert image[0][2] == image[1][2] == colour("#333333") and image[2][2] == colour(PALETTE[0])
    run(e)


def test_trace_has_a_row_for_everyone_and_time_runs_forwards(tmp_path):
    recorder = recorded()
    write_trace(recorder, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["displayTimeUnit"] == "ms"
    entries = trace["traceEvents"]
    rows = {e["args"]["name"]: e["tid"] for e in entries if e["ph"] == "M"}
    assert set(rows) == {"engine", "r0.0", "r0.1", "r1", "r2", "r3", "r4"} and len(set(rows.values())) == 7
    assert {e["tid"] for e in entries} == set(rows.values()) and {e["pid"] for e in entries} == {1}
    assert all(e["ts"] >= 0 and e.get("dur", 0) >= 0 for e in entries if e["ph"] != "M")
    assert {e["ph"] for e in entries} == {"M", "X", "i"}
    steps = [e for e in entries if e["name"].startswith("step ")]
    assert [e["name"] for e in steps] == [f"step {i}" for i in range(len(recorder.steps))]
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in zip(steps, steps[1:]))
    work = [e for e in entries if e["ph"] == "X" and "num_new" in e["args"]]
    assert len(work) == sum(len(record.works) for record in recorder.steps)
    by_step = {e["name"]: e for e in steps}
    for e in work:
        step = by_step[f"step {e['args']['step']}"]
        assert (e["ts"], e["dur"]) == (step["ts"], step["dur"])
        num_new, num_made = e["args"]["num_new"], e["args"]["num_made"]
        assert e["name"] == ("decode" if num_new == num_made == 1 else f"compute {num_new} tokens")
    for kind in ("queued", "admitted", "preempted", "finished"):
        assert sum(e["name"] == kind for e in entries) == sum(event.kind == kind for event, _ in recorder.events)
    reasons = [e["args"]["finish_reason"] for e in entries if e["name"] == "finished"]
    assert sorted(reasons) == ["abort"] + ["length"] * 5
    waits = [e for e in entries if e["name"] == "wait"]
    assert len(waits) == sum(event.kind in ("queued", "preempted") for event, _ in recorder.events)


def test_trace_of_nothing():
    [entry] = chrome_trace(Recorder())["traceEvents"]
    assert (entry["ph"], entry["args"]) == ("M", {"name": "engine"})


def test_a_recorder_without_a_cache_draws_no_kept_blocks():
    recorder = Recorder()
    e = engine([recorder])
    e.add_request([1] * 20, params(2))
    run(e)
    assert recorder.cached == [[], []]
    with_cache = Recorder(e.scheduler.cache)
    e.listeners.append(with_cache)
    e.add_request([1] * 20, params(2))
    run(e)
    assert with_cache.cached[-1] == e.scheduler.cache.cached_blocks != []
