"The token budget: who gets how much of it in a step, that nobody starves, and that cutting changes no token."

import random
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.metrics import Recorder
from nanollm.model import load_model
from nanollm.paged_attention import PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import Request
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler, WholePrompts


@lru_cache
def llama():
    torch.set_num_threads(1)
    return load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False)


def params(num_tokens, **more):
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **more)


def request(name, num_prompt, num_tokens=4, arrival_s=None, **more):
    prompt_ids = [(3 * i + 1) % 256 for i in range(num_prompt)]
    arrival_s = float(name) if arrival_s is None else arrival_s
    return Request(name, prompt_ids, params(num_tokens), arrival_s=arrival_s, **more)


def scheduler(budget, num_blocks=100, max_num_seqs=8, order="fcfs", manager=BlockManager, block_size=4):
    cache = manager(num_blocks, block_size)
    return Scheduler(cache, ChunkedPrefill(), min(max_num_seqs, budget), budget, order)


def compute(s, plan, token_id=7):
    "Carry out a plan without a model: every request that has caught up gets a token."
    for r, n in plan.batch.items():
        start, caught_up = r.num_computed_tokens, n == r.gap
        r.num_computed_tokens += n
        if caught_up:
            r.draft_ids = []
            r.num_computed_tokens = r.num_tokens
            r.append(token_id, 0.0)
        s.cache.rewind(r)
        s.cache.commit(r, start)
    for r in [r for r in plan.batch if r.finished]:
        s.finish(r)
    return plan


def advance(s):
    return compute(s, s.schedule())


def shares(plan):
    return {r.request_id: n for r, n in plan.batch.items()}


def engine(budget, listeners=(), policy=None, num_blocks=64, proposer=None, num_drafts=0):
    sched = Scheduler(BlockManager(num_blocks, 8), policy or ChunkedPrefill(), min(8, budget), budget)
    runner = ModelRunner(llama(), PagedKVCache(llama().config, num_blocks, 8))
    return Engine(runner, sched, listeners=listeners, proposer=proposer, num_drafts=num_drafts, self_check=True)


def test_a_prompt_is_cut_by_the_budget_and_samples_at_its_end():
    s = scheduler(8)
    s.add(request("0", 19, 2))
    assert [shares(advance(s)) for _ in range(4)] == [{"0": 8}, {"0": 8}, {"0": 3}, {"0": 1}]
    assert not s.running and not s.waiting and s.cache.usage == 0


@pytest.mark.parametrize("num_prompt, made", [(1, [1]), (7, [1]), (8, [1]), (9, [0, 1]), (16, [0, 1]), (17, [0, 0, 1])])
def test_a_chunk_that_ends_with_the_prompt_makes_a_token(num_prompt, made):
    s, r = scheduler(8), request("0", num_prompt, 9)
    s.add(r)
    for i, total in enumerate(made):
        advance(s)
        assert len(r.output_ids) == sum(made[:i + 1]), total


def test_decodes_come_before_a_prompt_and_the_prompt_gets_the_rest():
    s = scheduler(8)
    for name in "012":
        s.add(request(name, 2))
    assert shares(advance(s)) == {"0": 2, "1": 2, "2": 2}
    s.add(request("3", 20))
    assert shares(advance(s)) == {"0": 1, "1": 1, "2": 1, "3": 5}
    assert shares(advance(s)) == {"0": 1, "1": 1, "2": 1, "3": 5}


def test_the_rest_of_the_budget_admits_the_next_prompts():
    s = scheduler(16)
    s.add(request("0", 10))
    s.add(request("1", 4))
    s.add(request("2", 30))
    s.add(request("3", 1))
    assert shares(advance(s)) == {"0": 10, "1": 4, "2": 2}
    assert [r.request_id for r in s.waiting] == ["3"]
    assert shares(advance(s)) == {"0": 1, "1": 1, "2": 14}
    assert shares(advance(s)) == {"0": 1, "1": 1, "2": 14}
    assert [r.request_id for r in s.waiting] == ["3"], "nothing was left for it"


def test_an_old_long_prompt_does_not_take_the_budget_of_newer_decodes():
    s = scheduler(8, order="priority")
    for name in "123":
        s.add(request(name, 2, 9, priority=1))
    advance(s)
    s.add(request("9", 40, priority=0))
    for _ in range(4):
        plan = advance(s)
        assert s.running[0].request_id == "9", "it ranks first"
        assert shares(plan) == {"1": 1, "2": 1, "3": 1, "9": 5}


def test_memory_for_the_whole_prompt_is_reserved_when_it_is_admitted():
    s = scheduler(8, num_blocks=10)
    long, other = request("0", 33), request("1", 8)
    s.add(long)
    s.add(other)
    advance(s)
    assert long.num_computed_tokens == 8 and len(long.block_table) == 9
    while len(long.output_ids) < 1:
        advance(s)
        assert not other.block_table and other in s.waiting
    assert long.num_preemptions == 0


def test_the_prompt_takes_its_whole_room_or_waits():
    s = scheduler(64, num_blocks=10)
    s.add(request("0", 20, 1))
    s.add(request("1", 24, 1))
    assert shares(advance(s)) == {"0": 20}
    assert shares(advance(s)) == {"1": 24}


def test_a_cached_prefix_shortens_the_gap_before_it_is_cut():
    s = scheduler(8, manager=PrefixCachingBlockManager)
    s.add(request("0", 16, 1))
    advance(s), advance(s)
    again = request("1", 18, 1)
    s.add(again)
    assert shares(advance(s)) == {"1": 2}
    assert again.num_cached_tokens == 16 and again.finished


def test_drafts_count_against_the_budget():
    s = scheduler(8)
    a, b = request("0", 2, 20), request("1", 2, 20)
    s.add(a)
    s.add(b)
    advance(s)
    a.draft_ids, b.draft_ids = [1, 2, 3], [1]
    s.add(request("2", 30))
    plan = s.schedule()
    assert shares(plan) == {"1": 2, "0": 4, "2": 2}


def test_drafts_that_the_budget_cuts_are_dropped():
    s = scheduler(4)
    a, b = request("0", 1, 20), request("1", 1, 20)
    s.add(a)
    s.add(b)
    advance(s)
    a.draft_ids, b.draft_ids = [1, 2, 3], [1]
    assert shares(s.schedule()) == {"1": 2, "0": 2}
    assert a.draft_ids == [1] and a.gap == 2


@pytest.mark.parametrize("budget, seqs", [(3, 4), (7, 8), (32, 64)])
def test_a_budget_without_a_token_for_everyone_is_refused(budget, seqs):
    with pytest.raises(ValueError, match=f"max_num_batched_tokens={budget}, .* got {seqs}"):
        Scheduler(BlockManager(10, 4), ChunkedPrefill(), seqs, budget)


def test_the_budget_may_be_as_small_as_the_number_of_requests():
    s = scheduler(3, max_num_seqs=3)
    for name in "012":
        s.add(request(name, 5, 3))
    steps = 0
    while s.running or s.waiting:
        assert sum(advance(s).batch.values()) <= 3
        steps += 1
    assert steps >= 21 / 3


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("order", ["fcfs", "priority"])
def test_every_running_request_advances_in_every_step(seed, order):
    "At most one prompt is incomplete, the budget is kept and used, and nothing is left at the end."
    rng = random.Random(seed)
    budget, block_size = rng.choice([4, 8, 13, 32]), rng.choice([1, 4, 16])
    manager = rng.choice([BlockManager, PrefixCachingBlockManager])
    s = scheduler(budget, 80 // block_size + rng.randrange(8), rng.randrange(1, 9), order, manager, block_size)
    todo = [request(str(i), rng.randrange(1, 50), rng.randrange(1, 12), priority=rng.randrange(3)) for i in range(12)]
    pending, step = list(todo), 0
    while pending or s.running or s.waiting:
        if pending and rng.random() < 0.3:
            s.add(pending.pop(0))
        elif s.running and rng.random() < 0.03:
            victim = rng.choice(s.running + s.waiting)
            victim.finish("abort", 0.0)
            s.finish(victim)
        room = budget // max(1, len(s.running)) - 1
        for r in s.running:
            if r.gap == 1 and r.tokens_left > 1:
                r.draft_ids = [1] * rng.randrange(min(4, room, r.tokens_left - 1) + 1)
        before, waiting = list(s.running), len(s.waiting)
        plan = s.schedule()
        assert sum(plan.batch.values()) <= budget and plan.budget == budget - sum(plan.batch.values())
        for r in before:
            assert plan.batch.get(r, 0) >= 1 or r in plan.preempted, "a running request starves"
        behind = [r for r, n in plan.batch.items() if n < r.gap]
        assert len(behind) <= 1 and (not behind or plan.budget == 0 or plan.preempted)
        if plan.budget and waiting and not plan.preempted and not plan.admitted:
            r = s.waiting[0]
            full = len(s.running) == s.max_num_seqs
            assert full or not s.cache.allocate(r, r.num_tokens), "it could have been admitted"
        compute(s, plan)
        s.cache.check()
        step += 1
        assert step < 2000, "no progress"
    assert all(r.finished for r in todo) and s.cache.usage == 0


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lens=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 6)), min_size=1, max_size=6),
       budget=st.sampled_from([8, 9, 17, 40]))
def test_whole_and_chunked_give_the_same_tokens(lens, budget):
    prompts = [[(11 * i + 5 * j) % 256 for j in range(num)] for i, (num, _) in enumerate(lens)]
    outputs = []
    for policy in (ChunkedPrefill(), WholePrompts()):
        e = engine(budget, policy=policy)
        found = [e.requests[e.add_request(ids, params(n))][0] for ids, (_, n) in zip(prompts, lens)]
        while e.has_unfinished:
            e.step()
        outputs.append([r.output_ids for r in found])
    assert outputs[0] == outputs[1] == [list(generate(llama(), ids, n)) for ids, (_, n) in zip(prompts, lens)]


def test_every_decode_makes_a_token_in_every_step_of_a_prefill():
    recorder = Recorder()
    e = engine(16, [recorder])
    for i in range(3):
        e.add_request([i + 1, 2, 3], params(30), request_id=f"d{i}")
    e.step()
    e.add_request(list(range(200)), params(2), request_id="long")
    long = e.requests["long"][0]
    while not long.output_ids:
        made = {output.request_id for output in e.step()}
        assert {"d0", "d1", "d2"} <= made
    assert [work.num_new for _, work, _ in recorder.works() if work.request is long] == [13] * 15 + [5]
    while e.has_unfinished:
        e.step()


def test_abort_in_the_middle_of_a_prompt_gives_everything_back():
    e = engine(8)
    e.add_request(list(range(100)), params(4), request_id="long")
    e.step(), e.step()
    assert e.requests["long"][0].num_computed_tokens == 16
    e.abort("long")
    [output] = e.step()
    assert (output.token_ids, output.finish_reason) == ([], "abort")
    e.check()
    assert e.scheduler.cache.usage == 0 and not e.has_unfinished


def test_prompt_logprobs_are_collected_over_chunks():
    prompt_ids = [(17 * i) % 256 for i in range(30)]
    reports = []
    for budget in (8, 64):
        e = engine(budget)
        r = e.requests[e.add_request(prompt_ids, params(2, prompt_logprobs=1))][0]
        while e.has_unfinished:
            e.step()
        reports.append(r.prompt_logprobs)
    assert list(reports[0]) == list(reports[1]) == list(range(1, 30))
    for position in reports[0]:
        assert reports[0][position].logprob == pytest.approx(reports[1][position].logprob, abs=1e-4)
