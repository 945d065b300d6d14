"""The engine's door, its errors, its events, and what a step leaves behind."""

import contextlib
import json
import logging
from copy import deepcopy
from dataclasses import FrozenInstanceError, asdict, fields
from functools import cache
from unittest.mock import patch

import pytest
import torch
from no_waiting import NoWaiting

from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import (
    NO_NUMBERS,
    NO_TOKEN,
    Engine,
    EngineLost,
    ModelRunner,
    accept,
    num_rows,
    propose_drafts,
    sample_batch,
)
from nanollm.generate import generate
from nanollm.model import load_model
from nanollm.paged_attention import (
    FlatBatch,
    GroupedAttention,
    PagedKVCache,
    ReferenceAttention,
)
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import FinishReason, Request, RequestEvent, RequestStatus, StepRecord
from nanollm.sampling import Sampler, SamplingParams, draw, row_seed
from nanollm.scheduler import Scheduler, WholePrompts
from nanollm.transformer import Decoder

torch.set_num_threads(1)
MODEL = load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32",
                   progress=False)
VOCAB = MODEL.config.vocab_size
POISON = 77 # a token that no other prompt holds
GREEDY = dict(temperature=0, ignore_eos=True)
MANAGERS = (BlockManager, PrefixCachingBlockManager)
POLICIES = (WholePrompts, ChunkedPrefill)


def make_runner(num_blocks=64, block_size=4, attention=GroupedAttention):
    tensors = PagedKVCache(MODEL.config, num_blocks, block_size)
    return ModelRunner(Decoder(MODEL), attention(tensors, MODEL.config.num_attention_heads))


def make_engine(num_blocks=64, block_size=4, manager=PrefixCachingBlockManager,
                policy=ChunkedPrefill, max_num_seqs=8, budget=64, eos=(), runner=None,
                **options):
    "An engine that checks its memory whenever it is idle."
    scheduler = Scheduler(manager(num_blocks, block_size), policy(), max_num_seqs, budget)
    runner = runner or make_runner(num_blocks, block_size)
    return Engine(runner, scheduler, eos, self_check=True, **options)


def params(**options):
    return SamplingParams(**GREEDY | options)


def fan_out(engine, ids, p, name, **options):
    "Add `n` requests, one per answer, as whoever wants several answers does; return them."
    names = [engine.add_request(ids, p, request_id=f"{name}.{i}", index=i, **options)
             for i in range(p.n)]
    return [engine.requests[request_id] for request_id in names]


def run(engine, max_steps=300):
    "Step until nothing is left; return tokens and last output by request id."
    tokens, last = {}, {}
    while engine.has_unfinished:
        for out in engine.step():
            key = out.request_id
            assert not (key in last and last[key].finish_reason), "an output after the end"
            tokens[key], last[key] = tokens.get(key, []) + out.token_ids, out
        engine.check()
        max_steps -= 1
        assert max_steps, "no progress"
    assert engine.scheduler.cache.usage == 0
    return tokens, last


def naive(prompt_ids, p, index=0, stop=()):
    return list(_naive(tuple(prompt_ids), p.model_dump_json(), index, stop))


@cache
def _naive(prompt_ids, form, index, stop):
    p = SamplingParams.model_validate_json(form)
    sampler = Sampler([p], [prompt_ids], stop, seeds=[row_seed(p, index)])
    ends = {*p.stop_token_ids, *stop}
    return list(generate(MODEL, prompt_ids, p.max_tokens, ends, sampler))


def prompt(length, start=0):
    "Token ids that are not POISON."
    return [(start + 5 * i) % 70 for i in range(length)]


def whole_memory(engine):
    "All keys and values."
    return torch.cat([layer.flatten() for layer in engine.runner.attention.cache.layers])


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
    ([1, VOCAB], {}, f"token id {VOCAB} is outside the vocabulary of {VOCAB} tokens"),
    ([-1], {}, "prompt token id -1 is outside"),
    (prompt(41), dict(max_tokens=20), "41 .* and 20 new ones exceed the context of 60"),
    (prompt(20), dict(max_tokens=14),
     "20 prompt tokens and 14 new ones need a KV cache of 33 tokens.*has room for 32"),
    (prompt(60), dict(max_tokens=None), "60 .* and 1 new ones exceed the context of 60"),
    (prompt(40), dict(max_tokens=None),
     "40 prompt tokens and 1 new ones need a KV cache of 40 tokens.*for 32"),
    ([1], dict(stop_token_ids=[VOCAB]), f"token ids go from 0 to {VOCAB - 1}, got {VOCAB}"),
    ([1], dict(logit_bias={400: 1.0}), "logit_bias: token ids go from 0 to"),
])
def test_the_door_refuses_with_numbers_and_changes_nothing(ids, options, message):
    events = []
    engine = make_engine(8, 4, max_model_len=60, listeners=[events.append])
    with pytest.raises(ValueError, match=message):
        engine.add_request(ids, params(**options), request_id="x")
    assert not engine.requests and not engine.scheduler.waiting and not events
    assert not engine.has_unfinished and engine.step() == []
    engine.add_request([1], params(max_tokens=1), request_id="x")
    assert len(run(engine)[0]["x"]) == 1


@pytest.mark.parametrize("prompt_ids, options, message", [
    ([1.0, 2.0], {}, "whole numbers"), (["a"], {}, "whole numbers"),
    ([None], {}, "whole numbers"), (None, {}, "whole numbers"),
    ([1, 2], {"priority": None}, "whole number"), ([1, 2], {"priority": 0.5}, "whole number"),
    ([1, 2], {"request_id": 7}, "a request id is a text, got 7"),
])
def test_what_is_no_number_or_no_name_is_refused_at_the_door(prompt_ids, options, message):
    engine = make_engine()
    engine.add_request([1, 2, 3], params(max_tokens=4), request_id="good")
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt_ids, params(max_tokens=4), **options)
    assert list(engine.requests) == ["good"] and len(run(engine)[0]["good"]) == 4


def test_numbers_of_other_libraries_become_ints():
    engine = make_engine()
    name = engine.add_request(torch.tensor([5, 6, 7]), params(max_tokens=3))
    request = engine.requests[name]
    assert list(request.prompt_ids) == [5, 6, 7]
    assert all(type(i) is int for i in request.prompt_ids)
    run(engine)


@pytest.mark.parametrize("limit", [0, -1, 2049])
def test_max_model_len_is_checked(limit):
    with pytest.raises(ValueError, match=f"from 1 to 2048, the model's own limit, got {limit}"):
        make_engine(max_model_len=limit)


@pytest.mark.parametrize("num_blocks, max_model_len, expected", [
    (8, None, 28), (8, 20, 15), (600, None, 2043)])
def test_without_max_tokens_as_many_are_granted_as_fit(num_blocks, max_model_len, expected):
    engine = make_engine(num_blocks, 4, max_model_len=max_model_len)
    engine.add_request(prompt(5), params(max_tokens=None), request_id="x")
    assert engine.requests["x"].params.max_tokens == expected
    if expected < 100:
        assert len(run(engine)[0]["x"]) == expected


def test_check_request_is_the_door_without_the_queue():
    engine = make_engine(8, 4)
    ids, p = engine.check_request(torch.tensor([5, 6]), params(max_tokens=None))
    assert ids == [5, 6] and type(ids[0]) is int and p.max_tokens == 31
    assert engine.check_request([5])[1] == SamplingParams()
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.check_request([])
    assert not engine.requests and not engine.scheduler.waiting


def test_an_id_is_in_use_until_its_request_has_ended():
    engine = make_engine()
    engine.add_request([1, 2], params(), request_id="x")
    with pytest.raises(ValueError, match="request id 'x' is in use"):
        engine.add_request([3], params(), request_id="x")
    engine.abort("x")
    engine.add_request([3], params(max_tokens=2), request_id="x")
    tokens, last = run(engine)
    assert last["x"].finish_reason == "length" and len(tokens["x"]) == 2
    engine.add_request([3], params(max_tokens=1), request_id="x")
    assert len(run(engine)[0]["x"]) == 1


def test_names_that_the_engine_finds_avoid_those_in_use():
    engine = make_engine()
    engine.add_request([1], params(), request_id="1")
    assert [engine.add_request([1], params()) for _ in range(3)] == ["0", "2", "3"]
    run(engine)
    assert engine.add_request([1], params()) == "4"


# how a request ends

def test_stop_ids_and_min_tokens():
    plain = naive(prompt(6), params(max_tokens=12))
    stop = plain[3]
    first = plain.index(stop)
    least = SamplingParams(temperature=0, max_tokens=12, min_tokens=first + 2)
    engine = make_engine(eos=(stop,))
    asked = {"eos": SamplingParams(temperature=0, max_tokens=12),
             "ignored": params(max_tokens=12),
             "own": params(max_tokens=12, stop_token_ids=[stop]), "min": least}
    for name, p in asked.items():
        engine.add_request(prompt(6), p, request_id=name)
    tokens, last = run(engine)
    assert tokens["eos"] == tokens["own"] == plain[:first + 1]
    assert last["eos"].finish_reason is last["own"].finish_reason is FinishReason.STOP
    assert last["eos"].stop_reason is None and last["own"].stop_reason == stop
    assert tokens["ignored"] == plain
    assert last["ignored"].finish_reason is FinishReason.LENGTH
    expected = naive(prompt(6), least, stop=(stop,))
    assert tokens["min"] == expected and len(expected) >= first + 2


def test_an_engine_without_work_may_step():
    records = []
    engine = make_engine(listeners=[records.append])
    assert engine.step() == engine.step() == []
    assert [record.step for record in records] == [0, 1]
    assert not any(record.works for record in records)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.ABORT])
def test_finish_and_abort_return_the_last_output(steps, reason):
    engine = make_engine()
    request_id = engine.add_request(prompt(9), params(max_tokens=9, logprobs=0), request_id="x")
    engine.add_request(prompt(5), params(max_tokens=6), request_id="y")
    request = engine.requests[request_id]
    made = [token for _ in range(steps) for out in engine.step() if out.request_id == "x"
            for token in out.token_ids]
    out = engine.abort("x") if reason == "abort" else engine.finish("x", reason)
    assert (out.request_id, out.token_ids, out.logprobs) == ("x", [], [])
    assert out.finish_reason is request.finish_reason is reason
    assert out.error is None and out.stop_reason is None and out.num_prompt_tokens == 9
    assert made == naive(prompt(9), params(max_tokens=9))[:steps]
    assert not request.block_table and "x" not in engine.requests
    assert engine.abort("x") is engine.finish("x") is None
    tokens, last = run(engine)
    assert "x" not in tokens and last["y"].finish_reason == "length"


def test_nobody_can_be_aborted():
    engine = make_engine()
    assert engine.abort("nobody") is None and engine.finish("nobody") is None
    assert not engine.has_unfinished and engine.num_steps == 0


# several answers, and one prefix for many

def computed_tokens(records):
    return sum(work.num_new for record in records for work in getattr(record, "works", ()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("length, shared", [(14, 12), (12, 8), (13, 12), (3, 0)])
def test_answers_share_the_full_blocks_of_the_prompt_in_their_first_step(
        policy, length, shared):
    events = []
    engine = make_engine(policy=policy, listeners=[events.append])
    p = params(temperature=1.0, seed=3, max_tokens=6, n=3)
    requests = fan_out(engine, prompt(length), p, "x")
    outputs = engine.step()
    assert [(out.index, len(out.token_ids)) for out in outputs] == [(0, 1), (1, 1), (2, 1)]
    tables = [request.block_table for request in requests]
    num = shared // 4
    assert tables[0][:num] == tables[1][:num] == tables[2][:num]
    own = {block for table in tables for block in table[num:]}
    assert len(own) == 3 * (len(tables[0]) - num)
    counts = [engine.scheduler.cache.ref_counts[block] for block in tables[0]]
    assert counts == [3] * num + [1] * (len(tables[0]) - num)
    assert [out.num_cached_tokens for out in outputs] == [0, shared, shared]
    assert computed_tokens(events) == length + 2 * (length - shared)
    run(engine)
    for request in requests:
        assert request.output_ids == naive(prompt(length), p, request.index)


def test_answers_without_a_prefix_cache_are_right_and_share_nothing():
    for manager, use in (BlockManager, True), (PrefixCachingBlockManager, False):
        engine = make_engine(manager=manager)
        p = params(temperature=1.0, seed=3, max_tokens=6, n=3)
        requests = fan_out(engine, prompt(14), p, "x", use_prefix_cache=use)
        engine.step()
        assert len({block for request in requests for block in request.block_table}) == 12
        tokens = run(engine)[0]
        assert all(tokens[request.request_id] == request.output_ids[1:] for request in requests)
        for request in requests:
            assert request.output_ids == naive(prompt(14), p, request.index)


@pytest.mark.parametrize("attention", [GroupedAttention, ReferenceAttention])
def test_many_prompts_with_one_prefix_compute_it_once_in_one_step(attention):
    prefix, events = [(7 * i + i // 70) % 256 for i in range(256)], []
    engine = make_engine(40, 16, budget=4096, listeners=[events.append],
                         runner=make_runner(40, 16, attention))
    asked = {str(i): prefix + prompt(3 + i, i) for i in range(8)}
    for name, ids in asked.items():
        engine.add_request(ids, params(max_tokens=3), request_id=name)
    outputs = engine.step()
    own = sum(3 + i for i in range(8))
    assert computed_tokens(events) == 256 + own and len(outputs) == 8
    assert [out.num_cached_tokens for out in outputs] == [0] + [256] * 7
    tables = [tuple(request.block_table[:16]) for request in engine.requests.values()]
    assert len(set(tables)) == 1
    assert [engine.scheduler.cache.ref_counts[block] for block in tables[0]] == [8] * 16
    run(engine)
    assert computed_tokens(events) == 256 + own + 8 * 2
    tokens = {}
    for event in events:
        if isinstance(event, RequestEvent):
            tokens[event.request.request_id] = event.request.output_ids
    assert tokens == {name: naive(ids, params(max_tokens=3)) for name, ids in asked.items()}


def test_a_prefix_in_pieces_is_shared_as_far_as_it_has_come():
    "The budget cuts the first prompt; the second comes in a later step and finds all of it."
    events = []
    engine = make_engine(budget=16, max_num_seqs=2, listeners=[events.append])
    for i in range(2):
        engine.add_request(prompt(40) + [i], params(max_tokens=3), request_id=str(i))
    run(engine)
    assert computed_tokens(events) == 41 + 1 + 2 * 2


# what the runner gets

class Spy:
    "A runner that keeps all batches it gets, and what it made of them."

    def __init__(self, **options):
        self.inner, self.seen = make_runner(**options), []
        self.model, self.block_size = self.inner.model, self.inner.block_size
        self.attention = self.inner.attention

    def forward(self, *args):
        [batch] = args
        logits, finite = self.inner.forward(batch)
        self.seen.append((batch, deepcopy(batch), logits.clone(), finite.clone()))
        return logits, finite


def spied(**options):
    "Serve a mixed load with a spy."
    spy = Spy(num_blocks=24)
    engine = make_engine(24, budget=16, runner=spy, **options)
    fan_out(engine, prompt(14), params(max_tokens=5, n=2), "a", adapter="style")
    engine.add_request(prompt(30, 1), params(max_tokens=6, prompt_logprobs=0))
    engine.add_request(prompt(9, 2), params(max_tokens=7))
    run(engine)
    return spy


def test_the_runner_gets_one_flat_batch_of_plain_lists_and_nothing_else():
    spy = spied(proposer=Fixed([1, 2, 3]), num_drafts=2)
    assert len(spy.seen) > 5
    for batch, copy, logits, finite in spy.seen:
        assert type(batch) is FlatBatch and batch == copy, "it changed after the step"
        assert FlatBatch(**json.loads(json.dumps(asdict(batch)))) == batch
        lists = [getattr(batch, field.name) for field in fields(batch)]
        assert all(type(values) is list for values in lists)
        T = len(batch.token_ids)
        assert len(batch.positions) == len(batch.slots) == sum(batch.query_lens) == T
        assert len(set(batch.slots)) == T, "two tokens in one slot"
        assert len(batch.context_lens) == len(batch.block_tables) == len(batch.query_lens)
        assert len(logits) == len(batch.rows) and len(finite) == T and bool(finite.all())
        with pytest.raises(FrozenInstanceError):
            batch.rows = []
    adapters = [adapter for batch, *_ in spy.seen for adapter in batch.adapters]
    assert {*adapters} == {"style", None}


def test_a_batch_that_is_replayed_gives_the_same_logits():
    spy, fresh = spied(), make_runner(24)
    for batch, _, logits, _ in spy.seen:
        for _ in range(2):
            again, finite = fresh.forward(batch)
            assert torch.equal(again, logits) and bool(finite.all())


def test_flat_rows_say_where_every_token_goes():
    "Three prompts in one step, one of them beginning in the middle, with drafts after it."
    spy = Spy()
    engine = make_engine(runner=spy, proposer=Fixed([1, 2, 3]), num_drafts=3)
    engine.add_request(prompt(6), params(max_tokens=9), request_id="a")
    engine.step()
    engine.add_request(prompt(5, 1), params(max_tokens=9), request_id="b")
    engine.add_request(prompt(3, 2), params(max_tokens=9, prompt_logprobs=0), request_id="c")
    engine.step()
    batch = spy.seen[-1][1]
    tables = batch.block_tables
    assert batch.query_lens == [4, 5, 3] and batch.context_lens == [10, 5, 3]
    assert batch.token_ids[1:] == [1, 2, 3, *prompt(5, 1), *prompt(3, 2)]
    assert batch.positions == [6, 7, 8, 9, *range(5), *range(3)]
    places = [(tables[0], i) for i in range(6, 10)] + [(tables[1], i) for i in range(5)]
    places += [(tables[2], i) for i in range(3)]
    assert batch.slots == [table[i // 4] * 4 + i % 4 for table, i in places]
    assert batch.rows == [0, 1, 2, 3, 8, 9, 10, 11]


# logprobs

def full_logprobs(ids):
    "Logprobs of every token after the first, by a forward of the whole sequence."
    with torch.inference_mode():
        logits = MODEL(torch.tensor([ids]), use_cache=False).logits[0]
    rows = logits.float().log_softmax(-1)
    return rows, [rows[i, token].item() for i, token in enumerate(ids[1:])]


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("num_blocks, budget, preempted", [
    (64, 64, False), (64, 8, False), (13, 8, True)])
def test_logprobs_equal_those_of_a_full_forward(manager, num_blocks, budget, preempted):
    engine = make_engine(num_blocks, 4, manager, budget=budget, max_num_seqs=5)
    asked = [(prompt(21), params(logprobs=2, prompt_logprobs=3, max_tokens=9, n=2,
                                 temperature=1.0, seed=5)),
             (prompt(15, 1), params(logprobs=0, prompt_logprobs=0, max_tokens=10)),
             (prompt(21), params(logprobs=2, prompt_logprobs=1, max_tokens=8))]
    everybody = [request for i, (ids, p) in enumerate(asked)
                 for request in fan_out(engine, ids, p, i)]
    outputs = {}
    while engine.has_unfinished:
        for out in engine.step():
            if out.prompt_logprobs is not None:
                assert out.request_id not in outputs, "they come once, with the first tokens"
                outputs[out.request_id] = out.prompt_logprobs
        engine.check()
    assert preempted == any(request.num_preemptions for request in everybody)
    for request in everybody:
        ids, p = request.prompt_ids, request.params
        rows, expected = full_logprobs(request.token_ids)
        assert request.output_ids == naive(ids, p, request.index)
        first = {i: report.token_id for i, report in outputs[request.request_id].items()}
        assert first == {i: report.token_id for i, report in request.prompt_logprobs.items()}
        assert sorted(request.prompt_logprobs) == list(range(1, len(ids)))
        num_top = {len(report.top) for report in request.prompt_logprobs.values()}
        assert num_top == {p.prompt_logprobs}
        reports = [request.prompt_logprobs[i] for i in range(1, len(ids))] + request.logprobs
        assert [report.token_id for report in reports] == request.token_ids[1:]
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
            reported = [report.token_id for report in out.logprobs]
            assert reported == (out.token_ids if out.request_id == "a" else [])


def test_outputs_carry_what_was_asked_and_found():
    engine = make_engine()
    for name, cached in ("a", 0), ("b", 8):
        engine.add_request(prompt(11), params(max_tokens=3), request_id=name)
        for _ in range(3):
            [out] = engine.step()
            assert (out.num_prompt_tokens, out.num_cached_tokens, out.index) == (11, cached, 0)
            assert out.prompt_logprobs is None
            with pytest.raises(FrozenInstanceError):
                out.index = 1


def test_prompt_logprobs_compute_every_token_though_the_prompt_is_cached():
    engine, p = make_engine(), params(max_tokens=2, prompt_logprobs=0)
    for i in range(2):
        engine.add_request(prompt(11), p, request_id=f"{i}")
        first = next(out for _ in range(9) for out in engine.step())
        assert first.num_cached_tokens == 0
        assert sorted(first.prompt_logprobs) == list(range(1, 11))
        run(engine)


def test_prompts_with_logprobs_take_an_eighth_of_the_budget():
    "Their rows are as wide as the vocabulary, and the others of the step wait for them."
    engine, batches = make_engine(num_blocks=256, budget=64), []
    engine.listeners.append(lambda event: batches.append(
        {work.request.request_id: work.num_new for work in getattr(event, "works", ())}))
    for i, name in enumerate("abcd"):
        scored = 2 if name in "ab" else None
        engine.add_request(prompt(40, i), params(max_tokens=2, prompt_logprobs=scored),
                           request_id=name)
    run(engine)
    batches = [batch for batch in batches if batch]
    assert batches[0] == {"a": 8, "b": 1, "c": 40, "d": 15}
    for batch in batches:
        num_scored = sum(batch.get(name, 0) for name in "ab")
        assert num_scored <= 8 + 1  # the budget's eighth, and one for whoever comes too late


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
    fan_out(engine, ids, params(max_tokens=9, n=2), "x")
    engine.add_request(others["1"], params(max_tokens=9), request_id="1")
    engine.add_request(others["2"], params(max_tokens=9), request_id="2")
    with poisoned(value):
        tokens, last = run(engine)
    for name in "x.0", "x.1":
        assert last[name].finish_reason is FinishReason.ERROR and tokens[name] == []
        assert last[name].error in (NO_NUMBERS, NO_TOKEN)
    for name, own in others.items():
        assert tokens[name] == naive(own, params(max_tokens=9))
    assert bool(whole_memory(engine).isfinite().all())
    engine.add_request(ids, params(max_tokens=4), request_id="heir") # the broken is not found
    assert run(engine)[0]["heir"] == naive(ids, params(max_tokens=4))


@pytest.mark.parametrize("place", [8, 11, 12, 13])
def test_what_a_broken_request_has_computed_is_not_found(place):
    "The pieces of before are; whoever shares the sound part in the same step goes on."
    sound, ids = prompt(17), prompt(20)
    ids[place] = POISON
    engine, p = make_engine(budget=64), params(max_tokens=4)
    cache = engine.scheduler.cache
    engine.add_request(ids, p, request_id="x")
    engine.add_request(sound, p, request_id="y")
    with poisoned():
        tokens, last = run(engine)
        assert last["x"].error in (NO_NUMBERS, NO_TOKEN)
        assert tokens["y"] == naive(sound, p)
        assert last["y"].num_cached_tokens == place // 4 * 4
        engine.add_request(ids, p, request_id="again") # finds what y has computed, and breaks
        assert run(engine)[1]["again"].num_cached_tokens < place
    assert len(cache._block_of) == len(cache._hash_of)
    engine.add_request(sound, p, request_id="heir")
    assert run(engine)[0]["heir"] == naive(sound, p)


def test_who_shares_a_broken_token_in_its_first_step_ends_with_it():
    "Zeros stand in the cache for it, and whoever reads them would be wrong and not notice."
    ids, sound = prompt(20), prompt(21)
    ids[9] = POISON
    engine, p = make_engine(), params(max_tokens=4)
    for name, own in ("x", ids), ("y", [*ids, 1]), ("z", sound):
        engine.add_request(own, p, request_id=name)
    with poisoned():
        outputs = {out.request_id: out for out in engine.step()}
        assert outputs["y"].num_cached_tokens == 20 and outputs["z"].num_cached_tokens == 8
        assert outputs["x"].error == outputs["y"].error == NO_NUMBERS
        assert outputs["z"].token_ids + run(engine)[0]["z"] == naive(sound, p)


@pytest.mark.parametrize("attention", [GroupedAttention, ReferenceAttention])
@pytest.mark.parametrize("manager", MANAGERS)
def test_a_later_owner_of_a_broken_block_is_bit_equal(manager, attention):
    logits = []
    for ids in prompt(29, 1), [POISON, *prompt(28, 1)]:
        spy = Spy(num_blocks=8, attention=attention)
        engine = make_engine(8, 4, manager, runner=spy)
        engine.add_request(ids, params(max_tokens=2), request_id="x")
        with poisoned():
            run(engine)
        assert bool(whole_memory(engine).isfinite().all())
        spy.seen.clear()
        engine.add_request(prompt(18, 2), params(max_tokens=9), request_id="heir")
        assert run(engine)[0]["heir"] == naive(prompt(18, 2), params(max_tokens=9))
        logits.append(torch.cat([seen[2] for seen in spy.seen]))
    assert torch.equal(*logits)


def test_a_broken_token_among_the_output():
    "The second token of the answer cannot be read; the first is delivered."
    engine = make_engine()
    p = params(max_tokens=9, logit_bias={POISON: 100.0})
    engine.add_request(prompt(6), p, request_id="x")
    engine.add_request(prompt(7), params(max_tokens=9), request_id="y")
    with poisoned():
        tokens, last = run(engine)
    assert tokens["x"] == [POISON] and last["x"].finish_reason is FinishReason.ERROR
    assert tokens["y"] == naive(prompt(7), params(max_tokens=9))


def test_a_forbidden_vocabulary_is_an_error_of_its_request_alone():
    def nothing(logits, rows):
        for i, row in enumerate(rows):
            if len(row.prompt_ids) == 3 and len(row.output_ids) == 2:
                logits[i] = -torch.inf

    engine = make_engine(processors=[nothing])
    engine.add_request(prompt(3), params(max_tokens=9), request_id="x")
    engine.add_request(prompt(4), params(max_tokens=9), request_id="y")
    tokens, last = run(engine)
    assert len(tokens["x"]) == 2 and last["x"].error == NO_TOKEN
    assert tokens["y"] == naive(prompt(4), params(max_tokens=9))


@pytest.mark.parametrize("where", ["forward", "processor", "cache"])
@pytest.mark.parametrize("failing", range(5))
def test_a_step_that_fails_ends_its_requests_and_nothing_else(where, failing):
    calls = []

    def processor(logits, rows):
        calls.append(len(rows))
        if where == "processor" and len(calls) == failing + 1:
            raise RuntimeError("no luck")

    engine = make_engine(policy=WholePrompts, max_num_seqs=3, processors=[processor])
    engine.add_request(prompt(9), params(max_tokens=4), request_id="a")
    fan_out(engine, prompt(9, 1), params(max_tokens=4, n=3), "b")
    ended = {}
    target = (engine.runner, "forward") if where == "forward" else (
        engine.scheduler.cache, "rewind")
    while engine.has_unfinished:
        breaks = where != "processor" and engine.num_steps == failing
        failure = patch.object(*target, side_effect=RuntimeError("no luck"))
        with failure if breaks else contextlib.nullcontext():
            outputs = engine.step()
        for out in outputs:
            if out.finish_reason:
                assert out.request_id not in ended
                ended[out.request_id] = out
        engine.check()
    assert engine.scheduler.cache.usage == 0 and len(ended) == 4
    failed = [out for out in ended.values() if out.finish_reason == "error"]
    assert failed and {out.error for out in failed} == {"RuntimeError: no luck"}
    expected = 3 if failing < 4 else 1
    if (where, failing) == ("cache", 3): # it fails after the first of them has ended
        expected = 2
    assert len(failed) == expected
    engine.add_request(prompt(9), params(max_tokens=4), request_id="a")
    assert run(engine)[0]["a"] == naive(prompt(9), params(max_tokens=4))


def test_a_lost_model_ends_the_engine_and_not_only_a_step():
    engine = make_engine()
    engine.add_request(prompt(9), params(max_tokens=4), request_id="a")
    failure = EngineLost("rank 1 has ended")
    with patch.object(engine.runner, "forward", side_effect=failure):
        for _ in range(2):
            with pytest.raises(EngineLost, match="rank 1 has ended"):
                engine.step()
    assert engine.abort("a").finish_reason == "abort" and not engine.has_unfinished
    engine.check()


def fail_afterwards(engine):
    "Let the next forward do its work, of which nobody knows how well, and raise."
    forward = engine.runner.forward

    def half(batch):
        forward(batch)
        raise OSError("unplugged")

    return patch.object(engine.runner, "forward", half)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_failed_forward_leaves_nothing_in_the_prefix_cache(policy):
    engine = make_engine(policy=policy)
    cache = engine.scheduler.cache
    fan_out(engine, prompt(20), params(max_tokens=4, n=2), "a")
    with fail_afterwards(engine):
        outputs = engine.step()
    assert [out.error for out in outputs] == ["OSError: unplugged"] * 2
    assert not engine.has_unfinished and cache.cached_blocks == []
    assert cache.num_free == cache.num_blocks
    engine.add_request(prompt(20), params(max_tokens=4), request_id="b")
    tokens, last = run(engine)
    assert tokens["b"] == naive(prompt(20), params(max_tokens=4))
    assert last["b"].num_cached_tokens == 0


def test_a_failed_step_in_the_middle_keeps_what_was_computed_before():
    engine = make_engine(budget=8)
    engine.add_request(prompt(30), params(max_tokens=4), request_id="a")
    engine.step()
    engine.step()
    with fail_afterwards(engine):
        [out] = engine.step()
    assert out.finish_reason == "error" and len(engine.scheduler.cache.cached_blocks) == 4
    engine.add_request(prompt(30), params(max_tokens=4), request_id="b")
    tokens, last = run(engine)
    assert tokens["b"] == naive(prompt(30), params(max_tokens=4))
    assert last["b"].num_cached_tokens == 16


@pytest.mark.parametrize("where", ["forward", "processor", "commit"])
def test_a_failed_step_leaves_no_nan_to_the_next_owner(where):
    "The forward has written what is no number, and nobody came to look."
    fails = []

    def processor(logits, rows):
        if where == "processor" and fails:
            raise OSError("unplugged")

    engine = make_engine(8, 4, BlockManager, processors=[processor])
    engine.add_request([POISON, *prompt(20)], params(max_tokens=2), request_id="x")
    engine.add_request(prompt(5), params(max_tokens=2), request_id="y")
    fails.append(True)
    failure = {"forward": fail_afterwards(engine), "processor": contextlib.nullcontext(),
               "commit": patch.object(engine.scheduler.cache, "rewind", side_effect=OSError)}
    with poisoned(), failure[where]:
        outputs = engine.step()
    assert {out.finish_reason for out in outputs} == {FinishReason.ERROR}
    fails.clear()
    assert bool(whole_memory(engine).isfinite().all())
    engine.add_request(prompt(18, 2), params(max_tokens=9), request_id="heir")
    assert run(engine)[0]["heir"] == naive(prompt(18, 2), params(max_tokens=9))


def test_what_a_step_that_failed_late_has_committed_is_right():
    "The first request is committed, then the step fails."
    engine = make_engine(budget=64)
    rewind, calls = engine.scheduler.cache.rewind, []

    def second_fails(request):
        calls.append(request)
        if len(calls) == 2:
            raise OSError("unplugged")
        rewind(request)

    engine.add_request(prompt(13), params(max_tokens=4), request_id="a")
    engine.add_request(prompt(13, 1), params(max_tokens=4), request_id="b")
    with patch.object(engine.scheduler.cache, "rewind", second_fails):
        outputs = engine.step()
    assert [out.error for out in outputs] == ["OSError: unplugged"] * 2
    for name, start in ("a", 0), ("b", 1):
        engine.add_request(prompt(13, start), params(max_tokens=4), request_id=name)
        tokens, last = run(engine)
        assert last[name].num_cached_tokens in (0, 12)
        assert tokens[name] == naive(prompt(13, start), params(max_tokens=4))


# drafts

class Fixed:
    "A proposer that always says the same."

    def __init__(self, drafts):
        self.drafts, self.asked = drafts, []

    def propose(self, requests, max_tokens):
        self.asked.append(list(max_tokens))
        return [self.drafts for _ in requests]


class Oracle:
    "A proposer that knows the answers."

    def __init__(self, answers): self.answers = answers

    def propose(self, requests, max_tokens):
        return [self.answers[r.request_id][len(r.output_ids):][:k]
                for r, k in zip(requests, max_tokens)]


def test_a_broken_draft_ends_nobody():
    plain = naive(prompt(6), params(max_tokens=8))
    assert POISON not in plain
    engine = make_engine(proposer=Fixed([POISON, 1, 2]), num_drafts=3)
    engine.add_request(prompt(6), params(max_tokens=8), request_id="x")
    with poisoned():
        assert run(engine)[0]["x"] == plain
    assert bool(whole_memory(engine).isfinite().all())


class Garbage:
    "A proposer that raises, or says what is no list of drafts for every request."

    def __init__(self, answer): self.answer = answer

    def propose(self, requests, max_tokens):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer(requests)


@pytest.mark.parametrize("answer", [
    RuntimeError("no idea"), lambda rs: None, lambda rs: [], lambda rs: [[1]] * (len(rs) + 1),
    lambda rs: [[1]] + [None] * (len(rs) - 1), lambda rs: [[1.5]] * len(rs),
    lambda rs: [["a"]] * len(rs), lambda rs: [[VOCAB]] * len(rs), lambda rs: [[-1]] * len(rs),
    lambda rs: [[3, 2**70]] * len(rs), lambda rs: 7, lambda rs: [iter(int, 1)] * len(rs),
    lambda rs: [torch.tensor([3, 4])] * len(rs), lambda rs: [[True]] * len(rs),
], ids=range(14))
def test_a_proposer_of_garbage_costs_its_drafts_and_nothing_else(answer):
    engine = make_engine(proposer=Garbage(answer), num_drafts=3)
    asked = {name: prompt(5 + i, i) for i, name in enumerate("ab")}
    for name, ids in asked.items():
        engine.add_request(ids, params(max_tokens=6), request_id=name)
    tokens, last = run(engine)
    assert tokens == {name: naive(ids, params(max_tokens=6)) for name, ids in asked.items()}
    assert {out.finish_reason for out in last.values()} == {"length"}


def test_limits_of_drafts():
    scheduler = Scheduler(BlockManager(64, 4), ChunkedPrefill(), 8, 12)
    lives = [(5, 5), (1, 9), (3, 9), (9, 9)] # gap, tokens left
    for i, (gap, left) in enumerate(lives):
        request = Request(str(i), prompt(9), params(max_tokens=left))
        request.num_computed_tokens, request.status = 9 - gap, RequestStatus.RUNNING
        scheduler.running.append(request)
    proposer = Fixed([1, 2, 3, 4, 5])
    propose_drafts(proposer, scheduler, 4, VOCAB)
    assert proposer.asked == [[2]] # 12 tokens for 4 requests: two drafts each
    assert [len(request.draft_ids) for request in scheduler.running] == [0, 2, 0, 0]
    last = scheduler.running[2]
    scheduler.running[:] = [last]
    last.params, last.num_computed_tokens = params(max_tokens=3), 8
    propose_drafts(proposer, scheduler, 9, VOCAB)
    assert proposer.asked[-1] == [2] and last.draft_ids == [1, 2] # one is left to the bonus
    scheduler.running.clear()
    propose_drafts(proposer, scheduler, 9, VOCAB)
    assert proposer.asked[-1] == []


def test_a_guess_ends_before_what_is_no_token():
    scheduler = Scheduler(BlockManager(64, 4), ChunkedPrefill(), 8, 12)
    request = Request("r", prompt(9), params(max_tokens=9))
    request.num_computed_tokens, request.status = 8, RequestStatus.RUNNING
    scheduler.running.append(request)
    for guess, kept in ([5, VOCAB, 6], [5]), ([-1, 5], []), ([VOCAB - 1, 0], [VOCAB - 1, 0]):
        request.draft_ids = []
        propose_drafts(Fixed(guess), scheduler, 4, VOCAB)
        assert request.draft_ids == kept


def test_a_lone_request_with_drafts_never_outgrows_the_cache():
    "The cache is exactly as large as the door demands."
    plain = naive(prompt(9), params(max_tokens=8))
    for proposer in Fixed([0] * 9), Oracle({"x": plain}):
        engine = make_engine(16, 1, BlockManager, proposer=proposer, num_drafts=9)
        engine.add_request(prompt(9), params(max_tokens=8), request_id="x")
        request = engine.requests["x"]
        assert run(engine)[0]["x"] == plain and not request.num_preemptions


def test_right_drafts_save_steps():
    plain, steps = naive(prompt(6), params(max_tokens=12)), {}
    for k in (0, 2, 3):
        engine = make_engine(proposer=Oracle({"x": plain}), num_drafts=k)
        engine.add_request(prompt(6), params(max_tokens=12), request_id="x")
        assert run(engine)[0]["x"] == plain
        steps[k] = engine.num_steps
    assert steps == {0: 12, 2: 1 + 4, 3: 1 + 3} # one for the prompt, then k + 1 tokens each


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
def test_the_next_turn_finds_an_answer_whether_it_was_drafted_or_not(k):
    answer = naive(prompt(6), params(max_tokens=12))
    engine = make_engine(proposer=Oracle({"x": answer}), num_drafts=k)
    engine.add_request(prompt(6), params(max_tokens=12), request_id="x")
    run(engine)
    engine.add_request([*prompt(6), *answer, 1, 2], params(max_tokens=1), request_id="y")
    found = run(engine)[1]["y"].num_cached_tokens
    assert found >= 12 and (k or found == 16) # 17 of its tokens have been computed


def drafted(drafts, **options):
    request = Request("r", [1, 2], params(max_tokens=9, **options))
    request.draft_ids, request.num_computed_tokens = list(drafts), 2 + len(drafts)
    return request


@pytest.mark.parametrize("drafts, drawn, taken", [
    ([], [5], [5]), ([5], [5, 6], [5, 6]), ([4], [5, 6], [5]),
    ([5, 6, 7], [5, 6, 9, 2], [5, 6, 9]), ([5, 6], [5], [5]), ([5, 6], [5, 6], [5, 6]),
    ([8, 9], [8, 9, 3], [8]), ([5, 6], [], []),
])
def test_accept(drafts, drawn, taken):
    request = drafted(drafts, stop_token_ids=[8])
    accept(request, [(token_id, None) for token_id in drawn], 1.5)
    assert request.output_ids == taken and request.draft_ids == []
    assert request.token_times_s == [1.5] * len(taken)
    computed = request.num_tokens - 1 if drawn else 2 + len(drafts)
    assert request.num_computed_tokens == computed


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


def test_a_step_waits_for_the_device_once(monkeypatch):
    "Prompts, chunks, decodes, greedy and drawn, with logprobs: one transfer back a step."
    seen = []

    def read(*tensors):
        seen.append(len(tensors))
        values = [torch.ones(t.shape, dtype=t.dtype) for t in tensors]
        values[1].zero_()  # no row is open
        return [value.tolist() for value in values]

    monkeypatch.setattr("nanollm.sampling.read", read)
    far = load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32",
                     progress=False).to("meta")
    cache = PagedKVCache(far.config, 64, 8, device="meta")
    attention = GroupedAttention(cache, far.config.num_attention_heads)
    forward = Decoder(far)
    engine = Engine(ModelRunner(forward, attention),
                    Scheduler(PrefixCachingBlockManager(64, 8), ChunkedPrefill(), 8, 32))
    for i in range(4):
        engine.add_request(range(3, 13 + 10 * i), SamplingParams(
            max_tokens=5, temperature=0.8 * (i % 2), top_p=0.9, logprobs=i % 2 or None))
    there = [*far.parameters(), *far.buffers(), *cache.layers]
    there += [t for t in vars(forward).values() if isinstance(t, torch.Tensor)]
    while engine.has_unfinished:
        before = len(seen)
        with NoWaiting(*there):
            outputs = engine.step()
        assert len(seen) == before + 1 and not any(out.error for out in outputs)
    assert len(seen) == 6


def test_blocks_filled_by_right_drafts_in_the_last_step_are_found_again():
    prompt, params = list(range(3, 9)), SamplingParams(max_tokens=11, temperature=0)
    right = list(generate(MODEL, prompt, 11))

    class Right:
        def propose(self, requests, max_tokens):
            done = [len(request.output_ids) for request in requests]
            return [right[n:n + k] for n, k in zip(done, max_tokens)]

    cache = PrefixCachingBlockManager(32, 4)
    tensors = PagedKVCache(MODEL.config, 32, 4)
    runner = ModelRunner(Decoder(MODEL),
                         GroupedAttention(tensors, MODEL.config.num_attention_heads))
    engine = Engine(runner, Scheduler(cache, ChunkedPrefill(), 4, 64), proposer=Right(),
                    num_drafts=10, self_check=True)
    made = []
    for token_ids in (prompt, prompt + right):
        engine.add_request(token_ids, params)
        while engine.has_unfinished:
            [out] = engine.step()
            made.append((out.num_cached_tokens, out.token_ids))
    assert [token_id for _, ids in made[:2] for token_id in ids] == right
    assert made[-1][0] == 16, "all of the four blocks that 16 computed tokens fill"


def test_the_draw_is_an_argument():
    wishes = [{}, {"top_p": 0.8}, {"temperature": 0}, {"top_k": 5, "temperature": 0.5}]
    made, rows = [], []

    def watched(logits, params, keys, whole=False):
        rows.append(len(params))
        return draw(logits, params, keys, whole)

    for how in (draw, watched):
        engine = make_engine(draw=how)
        for i, wish in enumerate(wishes):
            fields = {"temperature": 1, "max_tokens": 4, "seed": i, "ignore_eos": True} | wish
            engine.add_request(prompt(5), SamplingParams(**fields), request_id=str(i))
        tokens = {str(i): [] for i in range(len(wishes))}
        while engine.has_unfinished:
            for out in engine.step():
                tokens[out.request_id] += out.token_ids
        made.append(tokens)
    assert made[0] == made[1] and max(rows) == 3


def drawn_of(batch, logits):
    finite = torch.tensor([True, False])
    drawn, read_along = sample_batch(batch, logits, (), finite)
    assert read_along == [True, False]
    return drawn


def test_sample_batch_leaves_out_who_has_not_caught_up():
    late, there = Request("a", prompt(8), params()), Request("b", prompt(3), params())
    logits = torch.zeros(1, VOCAB)
    logits[0, 9] = 1
    assert drawn_of({late: 4, there: 3}, logits) == {there: [(9, None)]}
    assert drawn_of({late: 4}, logits[:0]) == {} and not late.finished
    assert drawn_of({there: 3}, logits * torch.nan) == {there: []}
    assert there.error == NO_TOKEN and there.finish_reason == "error"


def test_sample_batch_draws_nothing_after_a_row_that_failed():
    request = drafted([5, 6])
    request.num_computed_tokens = 1
    logits = torch.zeros(3, VOCAB)
    logits[0, 5] = logits[2, 7] = 1
    logits[1] = torch.nan
    assert drawn_of({request: 3}, logits) == {request: [(5, None)]}
    assert not request.finished


# aborts

@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("gone", ["012", "0", "2"])
def test_abort_at_every_step_of_a_life(manager, policy, gone):
    asked = {"a": (prompt(13), params(max_tokens=6)),
             "x": (prompt(14), params(max_tokens=7, n=3, temperature=1.0, seed=2)),
             "b": (prompt(9, 1), params(max_tokens=8))}
    for step in range(0, 20, 1 if manager is PrefixCachingBlockManager else 3):
        engine = make_engine(10, 4, manager, policy, budget=16, max_num_seqs=4)
        for name, (ids, p) in asked.items():
            fan_out(engine, ids, p, name)
        got, reasons = {}, {}

        def take(out, got=got, reasons=reasons):
            assert out.request_id not in reasons, "an output after the end"
            got[out.request_id] = got.get(out.request_id, []) + out.token_ids
            if out.finish_reason:
                reasons[out.request_id] = out.finish_reason

        while engine.has_unfinished:
            if engine.num_steps == step:
                for i in gone:
                    out = engine.abort(f"x.{i}")
                    if out is not None:
                        take(out)
                engine.check()
            for out in engine.step():
                take(out)
            engine.check()
        assert len(reasons) == 5 and engine.scheduler.cache.usage == 0
        for name, reason in reasons.items():
            family, index = name.split(".")
            right = naive(*asked[family], int(index))
            if reason == "abort":
                assert family == "x" and index in gone
                right = right[:len(got[name])]
            assert got[name] == right
        if step == 0:
            assert all((reasons[f"x.{i}"] == "abort") == (i in gone) for i in "012")


# memory and events

def test_self_check_raises_when_a_block_leaks():
    engine = make_engine()
    engine.add_request(prompt(6), params(max_tokens=3))
    engine.step()
    stranger = Request("stranger", prompt(4), params())
    engine.scheduler.cache.allocate(stranger, 4)
    with pytest.raises(RuntimeError, match="is counted 1 times, stands in 0 block tables"):
        run(engine)
    engine.scheduler.cache.free(stranger)
    engine.check()
    engine.scheduler.cache.ref_counts[3] += 1
    with pytest.raises(RuntimeError, match="block 3 is counted 1 times"):
        engine.step()


def test_check_finds_a_forgotten_free():
    engine = make_engine()
    for i in range(3):
        engine.add_request(prompt(6, i), params(max_tokens=4), request_id=str(i))
    engine.step()
    engine.check()
    with patch.object(engine.scheduler.cache, "free"):
        engine.abort("1")
    with pytest.raises(RuntimeError, match="is counted 1 times, stands in 0 block tables"):
        engine.check()


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_events_and_records_add_up(manager, policy, num_drafts):
    events = []
    asked = {"a": (prompt(12), params(max_tokens=9, n=3)),
             "b": (prompt(15, 1), params(max_tokens=9)),
             "c": (prompt(20, 2), params(max_tokens=9)), "d": (prompt(9, 3), params())}
    answers = {f"{name}.{i}": naive(ids, p, i)[:5] + [1] * 9
               for name, (ids, p) in asked.items() for i in range(p.n)}
    engine = make_engine(12, 4, manager, policy, budget=16, max_num_seqs=4,
                         listeners=[events.append], proposer=Oracle(answers),
                         num_drafts=num_drafts)
    for name, (ids, p) in asked.items():
        fan_out(engine, ids, p, name)
    engine.abort("d.0")
    run(engine)
    lives, preemptions = {}, 0
    for event in events:
        if isinstance(event, RequestEvent):
            lives.setdefault(event.request, []).append(event)
    assert len(lives) == 6
    for request, life in lives.items():
        kinds = [event.kind for event in life]
        assert [event.time_s for event in life] == sorted(event.time_s for event in life)
        assert kinds[0] == "queued" and kinds[-1] == "finished"
        between = kinds[1:-1]
        if request.request_id == "d.0":
            assert between == [] and request.admitted_s is None
        else:
            assert between == ["admitted", "preempted"] * request.num_preemptions + ["admitted"]
            assert request.admitted_s == life[1].time_s <= request.token_times_s[0]
            assert request.finished_s == life[-1].time_s
        preemptions += request.num_preemptions
    assert preemptions
    records = [event for event in events if isinstance(event, StepRecord)]
    assert [record.step for record in records] == list(range(engine.num_steps))
    assert all(record.start_s <= record.end_s for record in records)
    last = records[-1]
    assert last.num_waiting == last.num_running == last.kv_usage == 0
    for request in lives:
        works = [work for record in records for work in record.works if work.request is request]
        assert sum(work.num_made for work in works) == len(request.output_ids)
        starts, ends = [work.start for work in works], []
        for work in works:
            wrong = work.num_drafts - (work.num_made - 1) if work.num_drafts else 0
            ends.append(work.start + work.num_new - wrong)
            assert len(work.blocks) * 4 >= ends[-1]
        breaks = sum(start != end for start, end in zip(starts[1:], ends))
        assert breaks <= request.num_preemptions
        if works:
            assert starts[0] == request.num_cached_tokens and ends[-1] == request.num_tokens - 1


def test_without_preemption_every_token_is_computed_once():
    records = []
    engine = make_engine(listeners=[records.append], budget=16)
    p = params(max_tokens=5)
    requests = [engine.requests[engine.add_request(prompt(9 + i, i), p)] for i in range(5)]
    run(engine)
    needed = sum(request.num_tokens - 1 for request in requests)
    assert computed_tokens(records) == needed
    assert not any(request.num_preemptions for request in requests)


def test_a_listener_that_fails_stops_nothing():
    seen = []

    def broken(event):
        raise OSError("disk full")

    engine = make_engine(listeners=[broken, seen.append])
    for name in "ab":
        engine.add_request([1, 2, 3], params(max_tokens=3), request_id=name)
    assert [len(tokens) for tokens in run(engine)[0].values()] == [3, 3]
    assert not engine.requests
    kinds = [event.kind for event in seen if isinstance(event, RequestEvent)]
    assert sorted(kinds) == ["admitted"] * 2 + ["finished"] * 2 + ["queued"] * 2
    assert len(seen) - len(kinds) == engine.num_steps == 3


def test_a_listener_may_add_requests_and_finish_them():
    "As a server does that stops at a text."
    engine = make_engine()

    def listener(event):
        if isinstance(event, RequestEvent) and event.kind == "finished":
            if event.request.request_id == "0":
                engine.add_request(prompt(5), params(max_tokens=2), request_id="1")

    engine.listeners.append(listener)
    engine.add_request(prompt(5), params(max_tokens=2), request_id="0")
    tokens = run(engine)[0]
    assert tokens["0"] == tokens["1"] == naive(prompt(5), params(max_tokens=2))
