"The engine's door, its errors, its events, and what a step leaves behind."

import contextlib
import logging
from functools import cache
from unittest.mock import patch

import pytest
import torch

from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import NO_NUMBERS, NO_TOKEN, Engine, ModelRunner, accept, num_rows, propose_drafts, sample_batch
from nanollm.generate import generate
from nanollm.model import load_model
from nanollm.paged_attention import PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import FinishReason, Request, RequestEvent, RequestStatus, StepRecord
from nanollm.sampling import Sampler, SamplingParams, row_seed
from nanollm.scheduler import Scheduler, WholePrompts

MODEL = load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False)
VOCAB = MODEL.config.vocab_size
POISON = 77  # a token that no other prompt holds
GREEDY = dict(temperature=0, ignore_eos=True)
MANAGERS = (BlockManager, PrefixCachingBlockManager)
POLICIES = (WholePrompts, ChunkedPrefill)


def make_engine(num_blocks=64, block_size=4, manager=PrefixCachingBlockManager, policy=ChunkedPrefill, max_num_seqs=8,
                budget=64, eos=(), **options):
    "An engine that checks its memory whenever it is idle."
    scheduler = Scheduler(manager(num_blocks, block_size), policy(), max_num_seqs, budget)
    runner = ModelRunner(MODEL, PagedKVCache(MODEL.config, num_blocks, block_size))
    return Engine(runner, scheduler, eos, self_check=True, **options)


def params(**options):
    return SamplingParams(**GREEDY | options)


def run(engine, max_steps=300):
    "Step until nothing is left; return tokens and last output by request id and index."
    tokens, last = {}, {}
    while engine.has_unfinished:
        for out in engine.step():
            key = out.request_id, out.index
            assert not (key in last and last[key].finish_reason), "an output after the end"
            tokens[key], last[key] = tokens.get(key, []) + out.token_ids, out
        engine.scheduler.cache.check()
        max_steps -= 1
        assert max_steps, "no progress"
    engine.check()
    return tokens, last


def naive(prompt_ids, p, index=0, stop=()):
    return list(_naive(tuple(prompt_ids), p.model_dump_json(), index, stop))


@cache
def _naive(prompt_ids, fields, index, stop):
    p = SamplingParams.model_validate_json(fields)
    sampler = Sampler([p], [prompt_ids], stop, seeds=[row_seed(p, index)])
    return list(generate(MODEL, prompt_ids, p.max_tokens, {*p.stop_token_ids, *stop}, sampler))


def prompt(length, start=0):
    "Token ids that are not POISON."
    return [(start + 5 * i) % 70 for i in range(length)]


@contextlib.contextmanager
def poisoned(scale=torch.nan):
    "Let the embedding of POISON be no numbers, and the last matrix whole."
    def spoil(module, args, out):
        return out.masked_fill((args[0] == POISON)[..., None], scale)

    handle = MODEL.get_input_embeddings().register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(autouse=True)
def no_tracebacks():
    "The failures are ours."
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# the door

@pytest.mark.parametrize("ids, options, message", [
    ([], {}, "the prompt is empty"),
    ([1, VOCAB], {}, f"prompt token id {VOCAB} is outside the vocabulary of {VOCAB} tokens"),
    ([-1], {}, "prompt token id -1 is outside"),
    (prompt(41), dict(max_tokens=20), "41 prompt tokens and 20 new ones exceed the context of 60 tokens"),
    (prompt(20), dict(max_tokens=14), "20 prompt tokens and 14 new ones need a KV cache of 33 tokens.*has room for 32"),
    (prompt(60), dict(max_tokens=None), "60 prompt tokens and 1 new ones exceed the context of 60 tokens"),
    (prompt(40), dict(max_tokens=None), "40 prompt tokens and 1 new ones need a KV cache of 40 tokens.*for 32"),
    ([1], dict(stop_token_ids=[VOCAB]), f"stop_token_ids: token ids go from 0 to {VOCAB - 1}, got {VOCAB}"),
    ([1], dict(logit_bias={400: 1.0}), "logit_bias: token ids go from 0 to"),
])
def test_the_door_refuses_with_numbers_and_changes_nothing(ids, options, message):
    events = []
    engine = make_engine(8, 4, max_model_len=60, listeners=[events.append])
    with pytest.raises(ValueError, match=message):
        engine.add_request(ids, params(**options), request_id="x")
    assert not engine.requests and not engine.scheduler.waiting and not engine._held and not events
    assert not engine.has_unfinished and engine.step() == []
    engine.add_request([1], params(max_tokens=1), request_id="x")
    assert len(run(engine)[0]["x", 0]) == 1


@pytest.mark.parametrize("limit", [0, -1, 2049])
def test_max_model_len_is_checked(limit):
    with pytest.raises(ValueError, match=rf"max_model_len must be from 1 to the model's 2048 tokens, got {limit}"):
        make_engine(max_model_len=limit)


@pytest.mark.parametrize("num_blocks, max_model_len, expected", [(8, None, 28), (8, 20, 15), (600, None, 2043)])
def test_without_max_tokens_as_many_are_granted_as_fit(num_blocks, max_model_len, expected):
    engine = make_engine(num_blocks, 4, max_model_len=max_model_len)
    engine.add_request(prompt(5), params(max_tokens=None), request_id="x")
    assert engine.requests["x"][0].params.max_tokens == expected
    if expected < 100:
        assert len(run(engine)[0]["x", 0]) == expected


def test_an_id_is_in_use_until_its_last_output_is_delivered():
    engine = make_engine()
    engine.add_request([1, 2], params(), request_id="x")
    with pytest.raises(ValueError, match="request id 'x' is in use"):
        engine.add_request([3], params(), request_id="x")
    engine.abort("x")
    with pytest.raises(ValueError, match="in use"):
        engine.add_request([3], params(), request_id="x")
    assert engine.has_unfinished
    assert [(out.request_id, out.finish_reason) for out in engine.step()] == [("x", "abort")]
    engine.add_request([3], params(max_tokens=2), request_id="x")
    assert run(engine)[1]["x", 0].finish_reason == "length"


def test_names_that_the_engine_finds_avoid_those_in_use():
    engine = make_engine()
    engine.add_request([1], params(), request_id="request-1")
    assert [engine.add_request([1], params()) for _ in range(3)] == ["request-0", "request-2", "request-3"]


# how a request ends

def test_stop_ids_and_min_tokens():
    plain = naive(prompt(6), params(max_tokens=12))
    stop = plain[3]
    first = plain.index(stop)
    engine = make_engine(eos=(stop,))
    engine.add_request(prompt(6), SamplingParams(temperature=0, max_tokens=12), request_id="eos")
    engine.add_request(prompt(6), params(max_tokens=12), request_id="ignored")
    engine.add_request(prompt(6), params(max_tokens=12, stop_token_ids=[stop]), request_id="own")
    engine.add_request(prompt(6), SamplingParams(temperature=0, max_tokens=12, min_tokens=first + 2), request_id="min")
    groups = {name: group[0] for name, group in engine.requests.items()}
    tokens, last = run(engine)
    assert tokens["eos", 0] == tokens["own", 0] == plain[:first + 1]
    assert last["eos", 0].finish_reason is last["own", 0].finish_reason is FinishReason.STOP
    assert groups["eos"].stop_reason is None and groups["own"].stop_reason == stop
    assert tokens["ignored", 0] == plain and last["ignored", 0].finish_reason is FinishReason.LENGTH
    expected = naive(prompt(6), SamplingParams(temperature=0, max_tokens=12, min_tokens=first + 2), stop=(stop,))
    assert tokens["min", 0] == expected and len(expected) >= first + 2


def test_an_engine_without_work_may_step():
    records = []
    engine = make_engine(listeners=[records.append])
    assert engine.step() == engine.step() == []
    assert [record.step for record in records] == [0, 1] and not any(record.works for record in records)


# n > 1

@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("use_prefix_cache", [True, False])
def test_siblings_share_the_full_blocks_of_the_prompt(manager, use_prefix_cache):
    engine, p = make_engine(manager=manager, policy=WholePrompts), params(temperature=1.0, seed=3, max_tokens=6, n=3)
    engine.add_request(prompt(14), p, request_id="x", use_prefix_cache=use_prefix_cache)
    leader, *others = engine.requests["x"]
    outputs = engine.step()
    assert [(out.index, len(out.token_ids)) for out in outputs] == [(0, 1)]
    assert all(request.status is RequestStatus.WAITING and not request.block_table for request in others)
    outputs += engine.step()
    tables = [request.block_table for request in engine.requests["x"]]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3] # 12 of 14 tokens
    assert len({table[3] for table in tables}) == 3
    assert [engine.scheduler.cache.ref_counts[block] for block in tables[0]] == [3, 3, 3, 1]
    assert [request.num_cached_tokens for request in (leader, *others)] == [0, 12, 12]
    tokens = run(engine)[0]
    for index in range(3):
        first = [token for out in outputs if out.index == index for token in out.token_ids]
        assert first + tokens["x", index] == naive(prompt(14), p, index)


def test_siblings_of_a_leader_that_fails_go_on_by_themselves():
    engine, p = make_engine(policy=WholePrompts), params(temperature=1.0, seed=3, max_tokens=4, n=3)
    engine.add_request(prompt(9), p, request_id="x")
    with patch.object(engine.runner, "forward", side_effect=OSError("once")):
        [out] = engine.step()
    assert (out.index, out.finish_reason, out.error) == (0, "error", "OSError: once")
    tokens, last = run(engine)
    assert tokens == {("x", index): naive(prompt(9), p, index) for index in (1, 2)}


# logprobs

def full_logprobs(ids):
    "Logprobs of every token after the first, by a forward of the whole sequence."
    with torch.inference_mode():
        rows = MODEL(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return rows, [rows[i, token].item() for i, token in enumerate(ids[1:])]


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("num_blocks, budget, preempted", [(64, 64, False), (64, 8, False), (13, 8, True)])
def test_logprobs_equal_those_of_a_full_forward(manager, num_blocks, budget, preempted):
    engine = make_engine(num_blocks, 4, manager, budget=budget, max_num_seqs=5)
    asked = {"a": (prompt(21), params(logprobs=2, prompt_logprobs=3, max_tokens=9, n=2, temperature=1.0, seed=5)),
             "b": (prompt(15, 1), params(logprobs=0, prompt_logprobs=0, max_tokens=10)),
             "c": (prompt(21), params(logprobs=2, prompt_logprobs=1, max_tokens=8))}
    for name, (ids, p) in asked.items():
        engine.add_request(ids, p, request_id=name)
    everybody = [request for group in engine.requests.values() for request in group]
    run(engine)
    assert preempted == any(request.num_preemptions for request in everybody)
    for request in everybody:
        ids, p = asked[request.request_id]
        rows, expected = full_logprobs(request.token_ids)
        assert request.output_ids == naive(ids, p, request.index)
        reports = request.logprobs
        if request.index == 0:
            assert sorted(request.prompt_logprobs) == list(range(1, len(ids)))
            assert {len(report.top) for report in request.prompt_logprobs.values()} == {p.prompt_logprobs}
            reports = [request.prompt_logprobs[i] for i in range(1, len(ids))] + reports
        else: # the leader has reported the prompt for all
            assert not request.prompt_logprobs
            rows, expected = rows[len(ids) - 1:], expected[len(ids) - 1:]
        assert [report.token_id for report in reports] == request.token_ids[-len(expected):]
        assert [report.logprob for report in reports] == pytest.approx(expected, abs=1e-4)
        for report, row in zip(reports, rows):
            best = row.topk(len(report.top)).values.tolist()
            assert [logprob for _, logprob in report.top] == pytest.approx(best, abs=1e-4)
            assert report.rank == 1 + int((row > row[report.token_id]).sum())


def test_outputs_carry_the_logprobs_of_their_tokens():
    engine = make_engine()
    engine.add_request(prompt(5), params(logprobs=1, max_tokens=4), request_id="a")
    engine.add_request(prompt(5), params(max_tokens=4), request_id="b")
    while engine.has_unfinished:
        for out in engine.step():
            assert [report.token_id for report in out.logprobs] == (out.token_ids if out.request_id == "a" else [])


# errors that end one request, or one step

@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("budget", [64, 8])
@pytest.mark.parametrize("place", [0, 12, 19])
def test_a_broken_token_ends_its_request_alone(value, manager, budget, place):
    ids = prompt(20)
    ids[place] = POISON
    engine = make_engine(manager=manager, budget=budget)
    others = {str(i): prompt(11 + i, i) for i in range(3)}
    engine.add_request(others["0"], params(max_tokens=9), request_id="0")
    engine.add_request(ids, params(max_tokens=9, n=2), request_id="x")
    engine.add_request(others["1"], params(max_tokens=9), request_id="1")
    engine.add_request(others["2"], params(max_tokens=9), request_id="2")
    with poisoned(value):
        tokens, last = run(engine)
    for index in range(2):
        assert last["x", index].finish_reason is FinishReason.ERROR and tokens["x", index] == []
        assert last["x", index].error in (NO_NUMBERS, NO_TOKEN)
    for name, own in others.items():
        assert tokens[name, 0] == naive(own, params(max_tokens=9))
    engine.add_request(ids, params(max_tokens=4), request_id="heir") # what the broken one had computed is not found
    assert run(engine)[0]["heir", 0] == naive(ids, params(max_tokens=4))


def test_a_broken_token_among_the_output():
    "The second token of the answer cannot be read; the first is delivered."
    engine = make_engine()
    engine.add_request(prompt(6), params(max_tokens=9, logit_bias={POISON: 100.0}), request_id="x")
    engine.add_request(prompt(7), params(max_tokens=9), request_id="y")
    with poisoned():
        tokens, last = run(engine)
    assert tokens["x", 0] == [POISON] and last["x", 0].finish_reason is FinishReason.ERROR
    assert tokens["y", 0] == naive(prompt(7), params(max_tokens=9))


class Fixed:
    "A proposer that always says the same."

    def __init__(self, drafts):
        self.drafts, self.asked = drafts, []

    def propose(self, requests, max_tokens):
        self.asked.append(list(max_tokens))
        return [self.drafts for _ in requests]


def test_a_broken_draft_ends_nobody():
    plain = naive(prompt(6), params(max_tokens=8))
    assert POISON not in plain
    engine = make_engine(proposer=Fixed([POISON, 1, 2]), num_drafts=3)
    engine.add_request(prompt(6), params(max_tokens=8), request_id="x")
    with poisoned():
        assert run(engine)[0]["x", 0] == plain


def test_a_forbidden_vocabulary_is_an_error_of_its_request_alone():
    def nothing(logits, rows):
        for i, row in enumerate(rows):
            if len(row.prompt_ids) == 3 and len(row.output_ids) == 2:
                logits[i] = -torch.inf

    engine = make_engine(processors=[nothing])
    engine.add_request(prompt(3), params(max_tokens=9), request_id="x")
    engine.add_request(prompt(4), params(max_tokens=9), request_id="y")
    tokens, last = run(engine)
    assert len(tokens["x", 0]) == 2 and last["x", 0].error == NO_TOKEN
    assert tokens["y", 0] == naive(prompt(4), params(max_tokens=9))


@pytest.mark.parametrize("where", ["forward", "processor", "cache"])
@pytest.mark.parametrize("failing", range(5))
def test_a_step_that_fails_ends_its_requests_and_nothing_else(where, failing):
    calls = []

    def processor(logits, rows):
        calls.append(len(rows))
        if where == "processor" and len(calls) == failing + 1:
            raise RuntimeError("no luck")

    engine = make_engine(policy=WholePrompts, processors=[processor])
    engine.add_request(prompt(9), params(max_tokens=4), request_id="a")
    engine.add_request(prompt(9, 1), params(max_tokens=4, n=2), request_id="b")
    ended = {}
    while engine.has_unfinished:
        target, name = (engine.runner, "forward") if where == "forward" else (engine.scheduler.cache, "rewind")
        breaks = where != "processor" and engine.num_steps == failing
        before = {id(request) for request in engine.scheduler.running}
        with patch.object(target, name, side_effect=RuntimeError("no luck")) if breaks else contextlib.nullcontext():
            outputs = engine.step()
        for out in outputs:
            if out.finish_reason:
                ended[out.request_id, out.index] = out
        assert before or engine.scheduler.running or outputs
        engine.scheduler.cache.check()
    engine.check()
    failed = [out for out in ended.values() if out.finish_reason == "error"]
    assert len(ended) == 3 and failed and {out.error for out in failed} == {"RuntimeError: no luck"}
    engine.add_request(prompt(9), params(max_tokens=4), request_id="a")
    assert run(engine)[0]["a", 0] == naive(prompt(9), params(max_tokens=4))


def test_a_failed_forward_leaves_nothing_in_the_prefix_cache():
    engine = make_engine()
    cache = engine.scheduler.cache
    engine.add_request(prompt(20), params(max_tokens=4), request_id="a")
    forward = engine.runner.forward

    def half(batch):
        forward(batch) # the blocks are written, and nobody knows how well
        raise OSError("unplugged")

    with patch.object(engine.runner, "forward", half):
        [out] = engine.step()
    assert out.error == "OSError: unplugged" and not engine.has_unfinished
    assert cache.cached_blocks == [] and cache.num_free == cache.num_blocks
    engine.add_request(prompt(20), params(max_tokens=4), request_id="b")
    [request] = engine.requests["b"]
    assert run(engine)[0]["b", 0] == naive(prompt(20), params(max_tokens=4)) and request.num_cached_tokens == 0


# drafts

def test_limits_of_drafts():
    scheduler = Scheduler(BlockManager(64, 4), ChunkedPrefill(), 8, 12)
    lives = [(5, 5), (1, 9), (3, 9), (9, 9)] # gap, tokens left
    for i, (gap, left) in enumerate(lives):
        request = Request(str(i), prompt(9), params(max_tokens=left))
        request.num_computed_tokens, request.status = 9 - gap, RequestStatus.RUNNING
        scheduler.running.append(request)
    proposer = Fixed([1, 2, 3, 4, 5])
    propose_drafts(proposer, scheduler, 4)
    assert proposer.asked == [[2]] # 12 tokens for 4 requests: two drafts each
    assert [len(request.draft_ids) for request in scheduler.running] == [0, 2, 0, 0]
    scheduler.running[:] = [request for request in scheduler.running if request.gap == 3]
    scheduler.running[0].draft_ids, scheduler.running[0].params = [], params(max_tokens=3)
    propose_drafts(proposer, scheduler, 9)
    assert proposer.asked[-1] == [2] and scheduler.running[0].draft_ids == [1, 2] # one token is left to the bonus
    scheduler.running.clear()
    propose_drafts(proposer, scheduler, 9)
    assert proposer.asked[-1] == []


def test_a_lone_request_with_drafts_never_outgrows_the_cache():
    "The cache is exactly as large as the door demands."
    plain = naive(prompt(9), params(max_tokens=8))
    for drafts in ([0] * 9, plain):
        engine = make_engine(16, 1, BlockManager, proposer=Fixed(drafts), num_drafts=9)
        engine.add_request(prompt(9), params(max_tokens=8), request_id="x")
        [request] = engine.requests["x"]
        assert run(engine)[0]["x", 0] == plain and not request.num_preemptions


def test_right_drafts_save_steps():
    plain, steps = naive(prompt(6), params(max_tokens=12)), {}

    class Oracle:
        def propose(self, requests, max_tokens):
            return [plain[len(r.output_ids):][:k] for r, k in zip(requests, max_tokens)]

    for k in (0, 2, 3):
        engine = make_engine(proposer=Oracle(), num_drafts=k)
        engine.add_request(prompt(6), params(max_tokens=12), request_id="x")
        assert run(engine)[0]["x", 0] == plain
        steps[k] = engine.num_steps
    assert steps == {0: 12, 2: 1 + 4, 3: 1 + 3} # one for the prompt, then k + 1 tokens each


def drafted(drafts, **options):
    request = Request("r", [1, 2], params(max_tokens=9, **options))
    request.draft_ids, request.num_computed_tokens = list(drafts), 2 + len(drafts)
    return request


@pytest.mark.parametrize("drafts, drawn, taken", [
    ([], [5], [5]), ([5], [5, 6], [5, 6]), ([4], [5, 6], [5]), ([5, 6, 7], [5, 6, 9, 2], [5, 6, 9]),
    ([5, 6], [5], [5]), ([5, 6], [5, 6], [5, 6]), ([8, 9], [8, 9, 3], [8]), ([5, 6], [], []),
])
def test_accept(drafts, drawn, taken):
    request = drafted(drafts, stop_token_ids=[8])
    assert accept(request, [(token_id, None) for token_id in drawn], 1.5) == len(taken)
    assert request.output_ids == taken and request.draft_ids == [] and request.token_times_s == [1.5] * len(taken)
    assert request.num_computed_tokens == (request.num_tokens - 1 if drawn else 2 + len(drafts))


def test_num_rows():
    request = Request("r", prompt(8), params(max_tokens=9))
    assert [num_rows(request, n) for n in (3, 7, 8)] == [0, 0, 1]
    request.num_computed_tokens, request.draft_ids = 7, [1, 2]
    assert [num_rows(request, n) for n in (1, 3)] == [0, 3]
    asks = Request("r", prompt(8), params(max_tokens=9, prompt_logprobs=0))
    assert [num_rows(asks, n) for n in (3, 8)] == [3, 8]
    asks.append(5, 0.0)
    asks.num_computed_tokens = 8
    assert num_rows(asks, 1) == 1


def test_sample_batch_leaves_out_who_has_not_caught_up():
    late, there = Request("a", prompt(8), params()), Request("b", prompt(3), params())
    logits = {late: torch.zeros(0, VOCAB), there: torch.zeros(1, VOCAB)}
    logits[there][0, 9] = 1
    assert sample_batch({late: 4, there: 3}, logits, ()) == {there: [(9, None)]}
    assert sample_batch({late: 4}, logits, ()) == {} and not late.finished
    assert sample_batch({late: 4}, {}, ()) == {} and late.error == NO_NUMBERS


# streams

def test_streams_advance_each_other():
    engine = make_engine()
    asked = {"a": (prompt(9), params(max_tokens=6)), "b": (prompt(4, 1), params(max_tokens=3)),
             "c": (prompt(30, 2), params(max_tokens=7, n=2, temperature=1.0, seed=1))}
    streams = {name: engine.stream(ids, p, request_id=name) for name, (ids, p) in asked.items()}
    assert not engine.requests # nothing happens before the first pull
    got = {}
    while streams:
        for name, stream in list(streams.items()):
            out = next(stream, None)
            if out is None:
                del streams[name]
            else:
                assert out.request_id == name
                got[name, out.index] = got.get((name, out.index), []) + out.token_ids
    assert got == {(name, i): naive(ids, p, i) for name, (ids, p) in asked.items() for i in range(p.n)}
    assert not engine.has_unfinished and not engine.inboxes and engine.num_steps < 20


def test_a_stream_closed_early_aborts_its_request():
    engine = make_engine()
    engine.add_request(prompt(5), params(max_tokens=9), request_id="other")
    stream = engine.stream(prompt(9), params(max_tokens=20, n=3), request_id="x")
    first = next(stream)
    assert first.token_ids == naive(prompt(9), params(max_tokens=1))
    stream.close()
    assert list(engine.requests) == ["other"] and not engine.inboxes and not engine._held
    assert len(list(engine.stream(prompt(3), params(max_tokens=2), request_id="x"))) == 2 # the id is free again
    tokens, last = run(engine)
    assert list(tokens) == [("other", 0)] and last["other", 0].finish_reason == "length"


def test_a_stream_that_is_aborted_from_outside_says_so():
    engine = make_engine()
    stream = engine.stream(prompt(9), params(max_tokens=20), request_id="x")
    next(stream)
    engine.abort("x")
    assert [(out.token_ids, out.finish_reason) for out in stream] == [([], "abort")]
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(engine.stream([]))
    engine.check()


# aborts

@pytest.mark.parametrize("manager, policy, index", [
    *((manager, policy, None) for manager in MANAGERS for policy in POLICIES),
    (BlockManager, ChunkedPrefill, 0), (PrefixCachingBlockManager, ChunkedPrefill, 0), (BlockManager, WholePrompts, 2)])
def test_abort_at_every_step_of_a_life(manager, policy, index):
    asked = {"a": (prompt(13), params(max_tokens=6)),
             "x": (prompt(14), params(max_tokens=7, n=3, temperature=1.0, seed=2)),
             "b": (prompt(9, 1), params(max_tokens=8))}
    for step in range(20):
        engine = make_engine(10, 4, manager, policy, budget=8, max_num_seqs=4)
        for name, (ids, p) in asked.items():
            engine.add_request(ids, p, request_id=name)
        got, reasons = {}, {}
        while engine.has_unfinished:
            if engine.num_steps == step:
                engine.abort("x", index)
                queues = engine.scheduler.waiting, engine.scheduler.running, *engine._held.values()
                gone = [r for queue in queues for r in queue if r.finished]
                assert not gone
            for out in engine.step():
                assert (out.request_id, out.index) not in reasons
                got[out.request_id, out.index] = got.get((out.request_id, out.index), []) + out.token_ids
                if out.finish_reason:
                    reasons[out.request_id, out.index] = out.finish_reason
            engine.scheduler.cache.check()
        engine.check()
        assert len(reasons) == 5
        for (name, i), reason in reasons.items():
            right = naive(*asked[name], i)
            if reason == "abort":
                assert name == "x" and index in (None, i)
                right = right[:len(got[name, i])]
            assert got[name, i] == right
        if step == 0:
            assert [reasons["x", i] == "abort" for i in range(3)] == [index in (None, i) for i in range(3)]


def test_abort_of_nobody_and_abort_with_a_reason():
    engine = make_engine()
    engine.abort("nobody")
    assert not engine.has_unfinished
    engine.add_request(prompt(4), params(n=2), request_id="x")
    engine.abort("x", 7)
    assert len(engine.requests["x"]) == 2 and not engine._outputs
    engine.abort("x", 1, FinishReason.STOP)
    engine.abort("x", 1)
    assert [(out.index, out.finish_reason) for out in engine._outputs] == [(1, "stop")]
    run(engine)
    engine.abort("x")
    assert not engine.has_unfinished


# memory and events

def test_self_check_raises_when_a_block_leaks():
    engine = make_engine()
    engine.add_request(prompt(6), params(max_tokens=3))
    engine.step()
    stranger = Request("stranger", prompt(4), params())
    engine.scheduler.cache.allocate(stranger, 4)
    with pytest.raises(RuntimeError, match=r"no request is left, and 1.6% of the blocks are held"):
        run(engine)
    engine.scheduler.cache.free(stranger)
    engine.check()
    engine.scheduler.cache.ref_counts[3] += 1
    with pytest.raises(RuntimeError, match="do not add up"):
        engine.step()


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_events_tell_every_life_once_and_in_order(manager, policy):
    events = []
    engine = make_engine(12, 4, manager, policy, budget=16, max_num_seqs=4, listeners=[events.append])
    engine.add_request(prompt(12), params(max_tokens=9, n=3), request_id="a")
    engine.add_request(prompt(15, 1), params(max_tokens=9), request_id="b")
    engine.add_request(prompt(20, 2), params(max_tokens=9), request_id="c")
    engine.add_request(prompt(9, 3), params(max_tokens=9), request_id="d")
    engine.abort("d")
    run(engine)
    lives, preemptions = {}, 0
    for event in events:
        if isinstance(event, RequestEvent):
            lives.setdefault((event.request.request_id, event.request.index), []).append(event)
    assert len(lives) == 6
    for (name, _), life in lives.items():
        kinds, request = [event.kind for event in life], life[0].request
        assert [event.time_s for event in life] == sorted(event.time_s for event in life)
        assert kinds[0] == "queued" and kinds[-1] == "finished"
        assert kinds.count("queued") == kinds.count("finished") == 1
        between = kinds[1:-1]
        if name == "d":
            assert between == [] and request.admitted_s is None
        else:
            assert between == ["admitted", "preempted"] * request.num_preemptions + ["admitted"]
            assert request.admitted_s == life[1].time_s <= request.token_times_s[0]
        preemptions += request.num_preemptions
    assert preemptions
    records = [event for event in events if isinstance(event, StepRecord)]
    assert [record.step for record in records] == list(range(engine.num_steps))
    assert records[-1].num_waiting == records[-1].num_running == records[-1].kv_usage == 0
    for request in {event.request for life in lives.values() for event in life}:
        works = [work for record in records for work in record.works if work.request is request]
        assert sum(work.num_made for work in works) == len(request.output_ids)


@pytest.mark.parametrize("prompt_ids, options, message", [
    ([1.0, 2.0], {}, "whole numbers"), (["a"], {}, "whole numbers"), ([None], {}, "whole numbers"),
    ([1, 2], {"priority": None}, "whole number"), ([1, 2], {"priority": 0.5}, "whole number"),
    ([1, 2], {"request_id": 7}, "a request id is a text, got 7"),
])
def test_what_is_no_number_or_no_name_is_refused_at_the_door(prompt_ids, options, message):
    engine = make_engine()
    engine.add_request([1, 2, 3], params(max_tokens=4), request_id="good")
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt_ids, params(max_tokens=4), **options)
    assert list(engine.requests) == ["good"] and len(run(engine)[0]["good", 0]) == 4


def test_numbers_of_other_libraries_become_ints():
    engine = make_engine()
    [request] = engine.requests[engine.add_request(torch.tensor([5, 6, 7]), params(max_tokens=3))]
    assert request.prompt_ids == (5, 6, 7) and all(type(i) is int for i in request.prompt_ids)
    run(engine)


def test_a_stream_owns_its_name_until_it_is_closed():
    engine = make_engine()
    stream = engine.stream([1, 2, 3], params(max_tokens=1), request_id="x")
    assert next(stream).finish_reason == "length"
    with pytest.raises(ValueError, match="in use"):
        engine.add_request([4], params(max_tokens=1), request_id="x")
    assert list(stream) == [] and not engine.has_unfinished
    engine.add_request([4], params(max_tokens=2), request_id="x")
    assert len(run(engine)[0]["x", 0]) == 2


def test_a_listener_that_fails_stops_nothing():
    def broken(event):
        raise OSError("disk full")

    engine = make_engine(listeners=[broken])
    for name in "ab":
        engine.add_request([1, 2, 3], params(max_tokens=3), request_id=name)
    assert [len(tokens) for tokens in run(engine)[0].values()] == [3, 3]
    assert not engine.requests
