"Spans that cover every life, pictures that show what happened, timelines and short stories."

import json
import random
import tracemalloc

import matplotlib
import pytest
from matplotlib.colors import to_rgb, to_rgba

from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.measure import COLORS, PALETTE, axes
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import FinishReason, Request, RequestEvent, StepRecord, Work
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler, WholePrompts
from nanollm.trace import (
    DARK,
    LIGHT,
    Recorder,
    RequestTraces,
    block_map,
    chrome_trace,
    gantt,
    is_decode,
    num_filled,
    spans_of,
    write_trace,
)

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt
    plt.close("all")


def make(name, num_prompt, max_tokens, first=0, **more):
    "A request; its prompt begins with `first`, so that prompts can differ from the start."
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return Request(name, [first, *range(1, num_prompt)], params, **more)


def simulate(scheduler, arrivals, listeners):
    "Play a schedule without a model; step i lasts from second i to second i + 1."
    coming, step = sorted(arrivals, key=lambda arrival: arrival[0]), 0

    def tell(event):
        for listener in listeners:
            listener(event)

    while coming or scheduler.waiting or scheduler.running:
        while coming and coming[0][0] <= step:
            request = coming.pop(0)[1]
            request.arrival_s = step
            scheduler.add(request)
            tell(RequestEvent("queued", step, request))
        plan, works = scheduler.schedule(), []
        for kind, requests in ("preempted", plan.preempted), ("admitted", plan.admitted):
            for request in requests:
                tell(RequestEvent(kind, step, request))
        for request, n in plan.batch.items():
            start, made = request.num_computed_tokens, int(n == request.gap)
            request.num_computed_tokens += n
            if made:
                request.append(0, step + 1)
            works.append(Work(request, start, n, 0, made, tuple(request.block_table)))
        for request in [request for request in plan.batch if request.finished]:
            scheduler.finish(request)
            tell(RequestEvent("finished", step + 1, request))
        tell(StepRecord(step, step, step + 1, tuple(works), len(scheduler.waiting),
                        len(scheduler.running), scheduler.cache.usage))
        step += 1


def made_up():
    "Two requests: a of 5 + 3 tokens is preempted once, b is aborted in the queue."
    a, b = make("a", 5, 3, arrival_s=10.0), make("b", 2, 3, arrival_s=10.5)
    yield RequestEvent("queued", 10.0, a)
    a.admitted_s, a.num_cached_tokens, a.num_computed_tokens = 10.25, 2, 2
    yield RequestEvent("admitted", 10.25, a)
    a.append(7, 11.0)
    yield StepRecord(0, 10.25, 11.0, (Work(a, 2, 3, 0, 1, (0, 1)),), 0, 1, 0.5)
    yield RequestEvent("queued", 10.5, b)
    a.append(8, 11.5)
    yield StepRecord(1, 11.0, 11.5, (Work(a, 5, 1, 0, 1, (0, 1, 2)),), 1, 1, 0.75)
    a.num_preemptions, a.num_computed_tokens = 1, 0
    yield RequestEvent("preempted", 12.0, a)
    b.finish(FinishReason.ABORT, 12.5)
    yield RequestEvent("finished", 12.5, b)
    yield StepRecord(2, 12.75, 13.0, (), 1, 0, 0.0)
    yield RequestEvent("admitted", 13.0, a)
    yield StepRecord(3, 13.0, 14.0, (Work(a, 0, 4, 0, 0, (4, 5)),), 0, 1, 0.5)
    a.append(9, 15.0)
    yield RequestEvent("finished", 15.0, a)
    yield StepRecord(4, 14.0, 15.0, (Work(a, 4, 3, 0, 1, (4, 5, 3)),), 0, 0, 0.0)


def told(events, *listeners):
    for event in events:
        for listener in listeners:
            listener(event)
    return listeners[0]


def played(seed, manager=PrefixCachingBlockManager, policy=None, num_blocks=14, listeners=()):
    "A random schedule in a small memory, recorded; returns the recorder and its requests."
    rng, cache = random.Random(seed), manager(num_blocks, 4)
    recorder = Recorder(cache)
    requests = [make(f"r{i}", rng.randint(2, 24), rng.randint(1, 12), first=rng.randint(0, 1))
                for i in range(8)]
    arrivals = [(rng.randint(0, 12), request) for request in requests]
    scheduler = Scheduler(cache, policy or ChunkedPrefill(), 4, 12)
    simulate(scheduler, arrivals, [recorder, *listeners])
    return recorder, requests


def stalled():
    "WholePrompts lets a running request stand still while another prompt is computed."
    recorder = Recorder()
    arrivals = [(0, make("a", 20, 6)), (1, make("b", 30, 2, first=9))]
    simulate(Scheduler(BlockManager(16, 8), WholePrompts(), 4, 64), arrivals, [recorder])
    return recorder


# spans

def test_spans_of_a_schedule_made_by_hand():
    recorder = told(made_up(), Recorder())
    assert list(recorder.rows) == ["a", "b"] and recorder.zero_s == 10.0
    spans = [(s.request.request_id, s.kind, s.first, s.end, s.start_s, s.end_s)
             for s in spans_of(recorder)]
    assert spans == [
        ("a", "waits", 0, 0, 10.0, 10.25), ("a", "works", 0, 1, 10.25, 11.0),
        ("a", "works", 1, 2, 11.0, 11.5), ("b", "waits", 1, 2, 10.5, 12.5),
        ("a", "waits", 2, 3, 12.0, 13.0), ("a", "works", 3, 4, 13.0, 14.0),
        ("a", "works", 4, 5, 14.0, 15.0)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", [ChunkedPrefill, WholePrompts])
def test_spans_cover_every_life_without_holes(seed, policy):
    recorder, requests = played(seed, policy=policy())
    lives = {request: [] for request in requests}
    for span in spans_of(recorder):
        assert (span.work is not None) == (span.kind == "works")
        assert span.kind == "waits" or span.end == span.first + 1
        lives[span.request].append(span)
    for request, spans in lives.items():
        assert all(a.end == b.first and a.end_s <= b.start_s for a, b in zip(spans, spans[1:]))
        assert sum(s.kind == "waits" for s in spans) == 1 + request.num_preemptions
        assert spans[0].kind == "waits" and spans[-1].kind == "works"
    works = [work for record in recorder.steps for work in record.works]
    assert [s.work for s in spans_of(recorder) if s.work] != [] and len(works) == sum(
        s.kind == "works" for s in spans_of(recorder))


def test_random_schedules_preempt():
    assert sum(r.num_preemptions for seed in range(6) for r in played(seed)[1]) > 0


def test_who_has_memory_and_no_work_stands_still():
    still = [(s.request.request_id, s.first) for s in spans_of(stalled())
             if s.kind == "stands still"]
    assert still == [("a", 1)]


def test_who_is_not_done_when_the_recording_ends_is_there_to_its_end():
    recorder = told(list(made_up())[:5], Recorder())
    last = {s.request.request_id: (s.kind, s.end, s.end_s) for s in spans_of(recorder)}
    assert last == {"a": ("works", 2, 11.5), "b": ("waits", 2, 11.5)}
    gantt(recorder)
    gantt(recorder, unit="s")
    block_map(recorder, 4, 2)
    chrome_trace(recorder)


def test_an_abort_between_two_steps_is_no_standing_still():
    a = make("a", 2, 5, arrival_s=0.0)
    events = [RequestEvent("queued", 0.0, a), RequestEvent("admitted", 0.0, a),
              StepRecord(0, 0.0, 1.0, (Work(a, 0, 2, 0, 1, (0,)),), 0, 1, 0.1)]
    a.finish(FinishReason.ABORT, 1.5)
    events += [RequestEvent("finished", 1.5, a), StepRecord(1, 2.0, 3.0, (), 0, 0, 0.0)]
    recorder = told(events, Recorder())
    assert [(s.kind, s.first) for s in spans_of(recorder)] == [("waits", 0), ("works", 0)]
    [mark] = gantt(recorder).lines
    assert (mark.get_xdata()[0], mark.get_marker()) == (1, "|")


@pytest.mark.parametrize("num_new, num_drafts, num_made, decode, filled", [
    (5, 0, 0, False, 15), (5, 0, 1, False, 15), (1, 0, 1, True, 11), (1, 0, 0, False, 11),
    (4, 3, 1, True, 11), (4, 3, 4, True, 14), (6, 3, 2, False, 14)])
def test_what_work_was_good_for(num_new, num_drafts, num_made, decode, filled):
    work = Work(make("a", 10, 9), 10, num_new, num_drafts, num_made, ())
    assert is_decode(work) is decode
    assert num_filled(work) == filled


# the Gantt chart

def boxes(ax, color):
    "Rows and left edges of the boxes of a colour."
    found = []
    for collection in ax.collections:
        if tuple(collection.get_facecolor()[0][:3]) == to_rgb(color):
            found += [(round(p.vertices[:, 1].mean()), round(float(p.vertices[:, 0].min()), 4))
                      for p in collection.get_paths()]
    return sorted(found)


def test_gantt_draws_every_step_in_its_place():
    ax = gantt(told(made_up(), Recorder()))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
    assert boxes(ax, LIGHT) == [(0, 0.0), (0, 3.0), (0, 4.0)]
    strip = 5 / 80
    assert boxes(ax, DARK) == [(0, 1 - strip), (0, 1.0), (0, 5 - strip)]
    assert boxes(ax, COLORS["before"]) == [(0, 2.0), (1, 1.0)]
    marks = [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in ax.lines]
    assert sorted(marks) == [(2, 0, "x"), (2, 1, "|")]
    assert sorted(text.get_text() for text in ax.texts) == ["3", "3", "4"]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {
        "waits", "computes (tokens)", "makes a token", "preempted", "aborted"}
    assert ax.get_xlabel() == "step" and ax.get_xlim() == (0, 5)


def test_gantt_in_seconds():
    ax = gantt(told(made_up(), Recorder()), unit="s")
    assert boxes(ax, LIGHT) == [(0, 0.25), (0, 3.0), (0, 4.0)]
    assert boxes(ax, COLORS["before"]) == [(0, 0.0), (0, 2.0), (1, 0.5)]
    marks = {line.get_marker(): line.get_xdata()[0] for line in ax.lines}
    assert marks == {"x": 2.0, "|": 2.5}
    assert ax.get_xlabel() == "time (s)" and ax.get_xlim() == (0, 5)


def test_a_wait_too_short_to_be_seen_has_no_entry_in_the_legend():
    for waited_s, shown in ((0.0001, []), (0.5, ["waits"])):
        recorder, request = Recorder(), make("a", 2, 2)
        recorder(RequestEvent("queued", 0.0, request))
        recorder(RequestEvent("admitted", waited_s, request))
        work = Work(request, 0, 2, 0, 1, (0,))
        recorder(StepRecord(0, waited_s, waited_s + 1, (work,), 0, 1, 0.0))
        names = gantt(recorder, unit="s").get_legend_handles_labels()[1]
        assert [name for name in names if name == "waits"] == shown


def test_gantt_shows_who_stands_still_and_how_many_tokens_came_at_once():
    recorder = stalled()
    assert boxes(gantt(recorder), "white") == [(0, 1.0)]
    a = make("a", 2, 9, arrival_s=0.0)
    drafts = told([RequestEvent("queued", 0.0, a), RequestEvent("admitted", 0.0, a),
                   StepRecord(0, 0.0, 1.0, (Work(a, 2, 4, 3, 3, (0,)),), 0, 1, 0.1)],
                  Recorder())
    ax = gantt(drafts)
    assert boxes(ax, DARK) == [(0, 0.0)] and not boxes(ax, LIGHT)
    assert boxes(ax, "#C9C9C9") == [(0, 0.75)], "one token of four came to nothing"
    texts = [(t.get_text(), t.get_color()) for t in ax.texts]
    assert texts == [("3", "white"), ("1", "black")]
    assert "drafts rejected" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_an_error_ends_at_the_end_of_its_step():
    a = make("a", 2, 5, arrival_s=0.0)
    a.finish(FinishReason.ERROR, 0.9, "broken")
    recorder = told([RequestEvent("queued", 0.0, a), RequestEvent("admitted", 0.0, a),
                     RequestEvent("finished", 0.9, a),
                     StepRecord(0, 0.0, 1.0, (Work(a, 0, 2, 0, 0, (0,)),), 0, 0, 0.0)],
                    Recorder())
    [mark] = gantt(recorder).lines
    assert (mark.get_xdata()[0], mark.get_marker()) == (1, "|")


@pytest.mark.parametrize("num_steps, expected", [(10, {"128"}), (200, set())])
def test_numbers_are_left_out_where_they_do_not_fit(num_steps, expected):
    recorder, a = Recorder(), make("a", 128 * num_steps, 1, arrival_s=0.0)
    told([RequestEvent("queued", 0.0, a), RequestEvent("admitted", 0.0, a)], recorder)
    for step in range(num_steps):
        work = Work(a, 128 * step, 128, 0, 0, ())
        recorder(StepRecord(step, step, step + 1, (work,), 0, 1, 0.1))
    assert {text.get_text() for text in gantt(recorder).texts} == expected
    assert not gantt(recorder, texts=False).texts


def test_pictures_take_axes_and_empty_recordings():
    _, (left, right) = axes("step", "request", ncols=2)
    recorder, _ = played(0)
    assert gantt(recorder, left, texts=False) is left and left.get_legend() is None
    assert block_map(recorder, 14, 4, right) is right and right.get_legend() is None
    gantt(Recorder())
    gantt(Recorder(), unit="s")
    block_map(Recorder(), 4, 4)


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="must be 'step' or 's', got 'ms'"):
        gantt(Recorder(), unit="ms")


# the block map

def pixels(ax, num_blocks):
    "The colours of a block map, bottom up: [block][step][level]."
    image = ax.images[0].get_array()
    levels = len(image) // num_blocks
    return [[[tuple(round(float(v), 3) for v in image[block * levels + level][step])
              for level in range(levels)] for step in range(image.shape[1])]
            for block in range(num_blocks)]


def colour(name, alpha=1.0):
    return tuple(round(v, 3) for v in to_rgba(name, alpha))


A, EMPTY, FREE = colour(PALETTE[0]), colour(PALETTE[0], 0.28), (0, 0, 0, 0)
KEPT, SHARED = colour("#CFCFCF"), colour("#333333")


def test_block_map_shows_who_holds_a_block_and_how_full_it_is():
    recorder = told(made_up(), Recorder())
    recorder.cached[2] = [0, 1]
    image = pixels(block_map(recorder, 6, 4), 6)
    assert image[0] == [[A] * 4, [A] * 4, [KEPT] * 4, [FREE] * 4, [FREE] * 4]
    assert image[1][0] == [A] + [EMPTY] * 3, "5 tokens fill one of four places"
    assert image[1][1] == [A] * 2 + [EMPTY] * 2
    assert image[2][:3] == [[FREE] * 4, [EMPTY] * 4, [FREE] * 4]
    assert image[4][3:] == [[A] * 4, [A] * 4]
    assert image[5][3:] == [[EMPTY] * 4, [A] * 3 + [EMPTY]]
    assert image[3] == [[FREE] * 4] * 4 + [[EMPTY] * 4]


def test_a_large_block_is_drawn_with_sixteen_levels_rounded_up():
    recorder = told(list(made_up())[:3], Recorder())
    image = pixels(block_map(recorder, 2, 128), 2)
    assert image[0][0] == [A] + [EMPTY] * 15


def test_block_map_keeps_the_blocks_of_who_stands_still():
    image = pixels(block_map(stalled(), 16, 8), 16)
    holder = next(row for row in image if A in row[0])
    assert holder[1] == holder[0]


def test_shared_and_kept_blocks():
    cache = PrefixCachingBlockManager(16, 4)
    recorder = Recorder(cache)
    arrivals = [(0, make("a", 12, 3)), (0, make("b", 12, 3)), (6, make("c", 4, 2, first=9))]
    simulate(Scheduler(cache, ChunkedPrefill(), 4, 64), arrivals, [recorder])
    ax = block_map(recorder, 16, 4)
    image = pixels(ax, 16)
    assert sum(row[0] == [SHARED] * 4 for row in image) == 2
    assert sum(row[5] == [KEPT] * 4 for row in image) == len(recorder.cached[5]) > 0
    names = {text.get_text() for text in ax.get_legend().get_texts()}
    assert {"shared", "kept", "a", "b", "c"} <= names


@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_as_held_is_the_usage_that_the_engine_reports(seed):
    recorder, _ = played(seed)
    image = pixels(block_map(recorder, 14, 4), 14)
    for step, record in enumerate(recorder.steps[:-1]):
        ended = [w.request for w in record.works if w.request.finished
                 and w.request.finished_s == record.end_s]
        if not ended: # the blocks of a request that ends in a step are drawn in it
            held = sum(row[step][0] not in (FREE, KEPT) for row in image)
            assert held / 14 == pytest.approx(record.kv_usage)


def test_a_recorder_without_a_cache_draws_no_kept_blocks():
    recorder, _ = played(1)
    assert any(recorder.cached)
    assert not any(told(made_up(), Recorder()).cached)


# the timeline file

def test_timeline_has_a_row_for_everyone_and_time_runs_forwards(tmp_path):
    recorder, requests = played(3)
    write_trace(recorder, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["displayTimeUnit"] == "ms"
    entries = trace["traceEvents"]
    rows = {e["args"]["name"]: e["tid"] for e in entries if e["ph"] == "M"}
    assert set(rows) == {"engine", *(r.request_id for r in requests)}
    assert len(set(rows.values())) == len(rows)
    assert {e["tid"] for e in entries} == set(rows.values())
    assert {e["pid"] for e in entries} == {1}
    assert all(e["ts"] >= 0 and e.get("dur", 0) >= 0 for e in entries if e["ph"] != "M")
    assert {e["ph"] for e in entries} == {"M", "X", "i"}
    steps = [e for e in entries if e["name"].startswith("step ")]
    assert [e["name"] for e in steps] == [f"step {i}" for i in range(len(recorder.steps))]
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in zip(steps, steps[1:]))
    work = [e for e in entries if e["ph"] == "X" and "num_new" in e["args"]]
    assert len(work) == sum(len(record.works) for record in recorder.steps)
    for e in work:
        step, num_new = steps[e["args"]["step"]], e["args"]["num_new"]
        assert (e["ts"], e["dur"]) == (step["ts"], step["dur"])
        decode = num_new == e["args"]["num_made"] == 1
        assert e["name"] == ("decode" if decode else f"compute {num_new} tokens")
    for kind in ("queued", "admitted", "preempted", "finished"):
        count = sum(event.kind == kind for event, _ in recorder.events)
        assert sum(e["name"] == kind for e in entries) == count
    waits = [e for e in entries if e["name"] == "waits"]
    assert len(waits) == sum(e.kind in ("queued", "preempted") for e, _ in recorder.events)


def test_timeline_in_microseconds_from_the_first_event():
    entries = chrome_trace(told(made_up(), Recorder()))["traceEvents"]
    steps = [(e["ts"], e["dur"]) for e in entries if e["name"].startswith("step ")]
    assert steps[0] == (250_000, 750_000)
    ends = [(e["tid"], e["ts"], e["args"]["finish_reason"]) for e in entries
            if e["name"] == "finished"]
    assert ends == [(3, 2_500_000, "abort"), (2, 5_000_000, "length")]


def test_timeline_of_nothing():
    [entry] = chrome_trace(Recorder())["traceEvents"]
    assert (entry["ph"], entry["args"]) == ("M", {"name": "engine"})


# stories

def test_a_story_made_by_hand():
    traces = told(made_up(), RequestTraces())
    story = traces.get("a")
    assert [entry["event"] for entry in story] == [
        "queued", "admitted", "compute", "decode", "preempted", "admitted", "compute",
        "finished"]
    assert [entry["time_s"] for entry in story] == [0, 0.25, 1.0, 1.5, 2.0, 3.0, 5.0, 5.0]
    assert story[1]["num_cached_tokens"] == 2 and story[5]["num_cached_tokens"] == 0
    assert story[6] == {"event": "compute", "step": 3, "start": 0, "num_steps": 2, "num_new": 7,
                        "num_made": 1, "num_requests": 1, "mean_s": 1.0, "max_s": 1.0,
                        "time_s": 5.0}
    assert story[-1]["finish_reason"] == "length"
    assert [entry["event"] for entry in traces.get("b")] == ["queued", "finished"]
    assert traces.get("b")[-1]["finish_reason"] == "abort"
    assert json.loads(json.dumps(story)) == story
    story[0]["event"] = "changed"
    assert traces.get("a")[0]["event"] == "queued"


def test_a_story_tells_of_drafts_only_where_there_were_some():
    a = make("a", 4, 99, arrival_s=0.0)
    traces = told([RequestEvent("queued", 0.0, a), RequestEvent("admitted", 0.0, a)],
                  RequestTraces())
    for step, (start, num_drafts, num_made) in enumerate([
            (4, 0, 1), (5, 3, 4), (9, 5, 1), (10, 0, 1)]):
        work = Work(a, start, 1 + num_drafts, num_drafts, num_made, (0,))
        traces(StepRecord(step, step, step + 1.0, (work,), 0, 1, 0.1))
    run = traces.get("a")[-1]
    assert (run["event"], run["num_steps"], run["num_made"]) == ("decode", 4, 7)
    assert (run["num_drafts"], run["num_accepted"]) == (8, 3)
    decodes(traces, "plain", 3)
    assert "num_drafts" not in traces.get("plain")[-1]


def decodes(traces, name, num_steps, every=1, first=0):
    a = make(name, 4, 10 * num_steps, arrival_s=0.0)
    told([RequestEvent("queued", 0.0, a), RequestEvent("admitted", 0.0, a)], traces)
    for i in range(num_steps):
        step = first + every * i
        work = Work(a, 4 + i, 1, 0, 1, (0,))
        traces(StepRecord(step, step, step + 0.5 + 0.5 * (i == 3), (work,), 0, 1, 0.1))


def test_decodes_in_a_row_are_one_entry_and_a_pause_begins_another():
    traces = RequestTraces()
    decodes(traces, "a", 1000)
    [run] = traces.get("a")[2:]
    assert (run["event"], run["num_steps"], run["num_made"]) == ("decode", 1000, 1000)
    assert run["max_s"] == 1.0 and run["mean_s"] == pytest.approx(0.5005)
    decodes(traces, "b", 10, every=2)
    assert [entry["num_steps"] for entry in traces.get("b")[2:]] == [1] * 10


def test_stories_are_bounded_in_number_and_in_length():
    traces = RequestTraces(max_requests=3, max_entries=20)
    for i in range(5):
        decodes(traces, str(i), 500, every=2)
    assert [traces.get(str(i)) is not None for i in range(5)] == [False] * 2 + [True] * 3
    assert [len(traces.get(str(i))) for i in (2, 3, 4)] == [21] * 3 and traces.num_entries == 60
    story = traces.get("4")
    assert [entry["event"] for entry in story[:3]] == ["queued", "admitted", "decode"]
    assert story[10] == {"event": "left out", "num_entries": 502 - 20}
    assert [entry["step"] for entry in story[2:10] + story[11:]] == [
        *range(0, 16, 2), *range(980, 1000, 2)], "beginning and end stay"


def test_stories_are_bounded_together_and_the_oldest_go_first():
    traces = RequestTraces(max_total=100, max_entries=40)
    for i in range(5):
        decodes(traces, str(i), 30, every=2)
        assert traces.num_entries <= 100
    assert [traces.get(str(i)) is not None for i in range(5)] == [False] * 2 + [True] * 3
    one = RequestTraces(max_total=10)
    decodes(one, "a", 30, every=2)
    assert one.get("a") is None and one.num_entries == 0


@pytest.mark.parametrize("every", [1, 2])
def test_stories_take_some_mebibytes_at_most(every):
    "256 answers of 8,000 tokens took 1 to 4 GB when each step was an entry."
    tracemalloc.start()
    traces = RequestTraces()
    for i in range(256):
        decodes(traces, str(i), 250, every=every)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 8 * 2**20


@pytest.mark.parametrize("max_entries", [1, 2, 3])
def test_a_story_of_which_only_the_end_is_left_takes_the_step_that_comes_after_it(max_entries):
    traces = told(made_up(), RequestTraces(max_entries=max_entries))
    for name in "ab":
        kept = [e for e in traces.get(name) if e["event"] != "left out"]
        assert 1 <= len(kept) <= max_entries
    assert traces.num_entries == sum(len(s.entries) for s in traces._stories.values())


def test_a_story_is_told_to_its_tenant_only():
    traces = RequestTraces()
    for name, shares in (("a", ("alice", "call 1")), ("b", ("bob",)), ("n", ())):
        traces(RequestEvent("queued", 0.0, make(name, 2, 2, shares=shares)))
    for name, tenants in (("a", "alice"), ("b", "bob"), ("n", "")):
        allowed = [who for who in ("alice", "bob", "") if traces.get(name, who) is not None]
        assert allowed == [tenants] and traces.get(name) is not None


def test_events_of_a_forgotten_or_unknown_request_change_nothing():
    traces = told(list(made_up())[5:], RequestTraces())
    assert traces.get("a") is traces.get("b") is None
    few = told(made_up(), RequestTraces(max_requests=1))
    assert few.get("a") is None and few.get("b") is not None


def test_a_request_id_that_is_used_again_begins_a_new_story():
    traces = RequestTraces(max_requests=2)
    told(made_up(), traces)
    told(list(made_up())[:3], traces)
    assert [entry["event"] for entry in traces.get("a")] == ["queued", "admitted", "compute"]
    traces(RequestEvent("queued", 0.0, make("c", 2, 2)))
    assert traces.get("a") is not None and traces.get("b") is None, "a is the younger one"


@pytest.mark.parametrize("seed", range(4))
def test_stories_add_up_to_the_requests(seed):
    traces = RequestTraces()
    recorder, requests = played(seed, listeners=[traces])
    works = [work for record in recorder.steps for work in record.works]
    for request in requests:
        story = traces.get(request.request_id)
        mine = [work for work in works if work.request is request]
        assert sum(e.get("num_made", 0) for e in story) == len(request.output_ids)
        assert sum(e.get("num_new", 0) for e in story) == sum(work.num_new for work in mine)
        assert sum(e.get("num_steps", 0) for e in story) == len(mine)
        assert [e["time_s"] for e in story] == sorted(e["time_s"] for e in story)
        assert story[-1]["event"] == "finished"
        preempted = sum(e["event"] == "preempted" for e in story)
        assert preempted == request.num_preemptions
