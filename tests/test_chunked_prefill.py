"""The token budget: who gets how much of it, that nobody starves, that cuts change no token."""

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
from nanollm.model import load_model
from nanollm.paged_attention import GroupedAttention, PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import FinishReason, Request, StepRecord
from nanollm.sampling import SamplingParams
from nanollm.scheduler import RANKS, Scheduler, WholePrompts
from nanollm.transformer import Decoder


@lru_cache
def llama():
    torch.set_num_threads(1)
    return load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32",
                      progress=False)


def params(num_tokens, **more):
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **more)


def request(name, num_prompt, num_tokens=4, arrival_s=None, **more):
    prompt_ids = [(3 * i + 1) % 256 for i in range(num_prompt)]
    arrival_s = float(name) if arrival_s is None else arrival_s
    return Request(name, prompt_ids, params(num_tokens), arrival_s=arrival_s, **more)


def scheduler(budget, num_blocks=100, max_num_seqs=8, order="fcfs", manager=BlockManager,
              block_size=4, limit=None):
    return Scheduler(manager(num_blocks, block_size), ChunkedPrefill(limit),
                     min(max_num_seqs, budget), budget, RANKS[order])


def compute(s, plan, token_id=7):
    "Carry out a plan without a model: every request that has caught up gets a token."
    for r, n in plan.batch.items():
        caught_up = n == r.gap
        r.num_computed_tokens += n
        if caught_up:
            r.draft_ids = []
            r.num_computed_tokens = r.num_tokens
            r.append(token_id, 0.0)
        s.cache.rewind(r)
    for r in [r for r in plan.batch if r.finished]:
        s.finish(r)
    return plan


def advance(s):
    return compute(s, s.schedule())


def shares(plan):
    return {r.request_id: n for r, n in plan.batch.items()}


def make_engine(budget, listeners=(), policy=None, num_blocks=64):
    sched = Scheduler(BlockManager(num_blocks, 8), policy or ChunkedPrefill(), min(8, budget),
                      budget)
    tensors = PagedKVCache(llama().config, num_blocks, 8)
    attention = GroupedAttention(tensors, llama().config.num_attention_heads)
    runner = ModelRunner(Decoder(llama()), attention)
    return Engine(runner, sched, listeners=listeners, self_check=True)


def test_a_prompt_is_cut_by_the_budget_and_samples_at_its_end():
    s = scheduler(8)
    s.add(request("0", 19, 2))
    assert [shares(advance(s)) for _ in range(4)] == [{"0": 8}, {"0": 8}, {"0": 3}, {"0": 1}]
    assert not s.running and not s.waiting and s.cache.usage == 0


@pytest.mark.parametrize("num_prompt, made", [
    (1, [1]), (7, [1]), (8, [1]), (9, [0, 1]), (16, [0, 1]), (17, [0, 0, 1])])
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
    advance(s)
    advance(s)
    again = request("1", 18, 1)
    s.add(again)
    assert shares(advance(s)) == {"1": 2}
    assert again.num_cached_tokens == 16 and again.finished


def test_equal_prompts_of_one_step_leave_budget_to_each_other():
    s = scheduler(32, manager=PrefixCachingBlockManager)
    for name in "0123":
        s.add(request(name, 18, 1))
    assert shares(advance(s)) == {"0": 18, "1": 2, "2": 2, "3": 2}


def test_an_equal_prompt_shares_a_piece_no_further_than_it_goes():
    s = scheduler(11, manager=PrefixCachingBlockManager, limit=9)
    for name in "01":
        s.add(request(name, 18, 1))
    assert shares(advance(s)) == {"0": 9, "1": 2} # 8 of the 9 are full blocks
    assert [r.num_computed_tokens for r in s.running] == [9, 10]


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_a_limit_holds_for_new_and_running_requests_alike(limit):
    s = scheduler(16, limit=limit)
    first, second = request("0", 7, 2), request("1", 5, 2)
    s.add(first)
    s.add(second)
    steps = []
    while s.running or s.waiting:
        plan = advance(s)
        assert max(plan.batch.values()) <= limit and plan.budget > 0
        steps.append(shares(plan))
    assert steps[0] == {"0": limit, "1": limit}
    assert sum(step.get("0", 0) for step in steps) == 8
    assert len(steps) == -(-7 // limit) + 1


def test_drafts_count_against_the_budget():
    s = scheduler(8)
    a, b = request("0", 2, 20), request("1", 2, 20)
    s.add(a)
    s.add(b)
    advance(s)
    a.draft_ids, b.draft_ids = [1, 2, 3], [1]
    s.add(request("2", 30))
    assert shares(s.schedule()) == {"1": 2, "0": 4, "2": 2}


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


@pytest.mark.parametrize("order", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(40))
def test_every_running_request_advances_in_every_step(seed, order):
    "At most one prompt is incomplete, the budget is kept and used, and nothing is left."
    rng = random.Random(seed)
    budget, block_size = rng.choice([4, 8, 13, 32]), rng.choice([1, 4, 16])
    manager = rng.choice([BlockManager, PrefixCachingBlockManager])
    num_blocks = 80 // block_size + rng.randrange(8)
    s = scheduler(budget, num_blocks, rng.randrange(1, 9), order, manager, block_size)
    todo = [request(str(i), rng.randrange(1, 50), rng.randrange(1, 12),
                    priority=rng.randrange(3)) for i in range(12)]
    pending, step = list(todo), 0
    while pending or s.running or s.waiting:
        if pending and rng.random() < 0.3:
            s.add(pending.pop(0))
        elif s.running and rng.random() < 0.03:
            victim = rng.choice(s.running + s.waiting)
            victim.finish(FinishReason.ABORT, 0.0)
            s.finish(victim)
        room = budget // max(1, len(s.running)) - 1
        for r in s.running:
            if r.gap == 1 and r.tokens_left > 1:
                most = min(4, room, r.tokens_left - 1)
                r.draft_ids = [1] * rng.randrange(most + 1)
        before, waiting = list(s.running), len(s.waiting)
        plan = s.schedule()
        spent = sum(plan.batch.values())
        assert spent <= budget and plan.budget == budget - spent
        for r in before:
            advances = plan.batch.get(r, 0) >= 1 or r in plan.preempted
            assert advances, "a running request starves"
        behind = [r for r, n in plan.batch.items() if n < r.gap]
        assert len(behind) <= 1 and (not behind or plan.budget == 0 or plan.preempted)
        if plan.budget and waiting and not plan.preempted and not plan.admitted:
            r = s.waiting[0]
            full = len(s.running) == s.max_num_seqs
            assert full or not s.cache.allocate(r, r.num_tokens), "it could have come in"
        compute(s, plan)
        s.cache.check(s.running)
        step += 1
        assert step < 2000, "no progress"
    assert all(r.finished for r in todo) and s.cache.usage == 0


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(lens=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 6)), min_size=1, max_size=6),
       budget=st.sampled_from([8, 9, 17, 40]))
def test_whole_and_chunked_give_the_same_tokens(lens, budget):
    prompts = [[(11 * i + 5 * j) % 256 for j in range(n)] for i, (n, _) in enumerate(lens)]
    outputs = []
    for policy in ChunkedPrefill(), ChunkedPrefill(5), WholePrompts():
        engine = make_engine(budget, policy=policy)
        requests = [engine.requests[engine.add_request(ids, params(n))]
                    for ids, (_, n) in zip(prompts, lens)]
        while engine.has_unfinished:
            engine.step()
        outputs.append([r.output_ids for r in requests])
    right = [list(generate(llama(), ids, n)) for ids, (_, n) in zip(prompts, lens)]
    assert outputs == [right] * 3


def test_every_decode_makes_a_token_in_every_step_of_a_prefill():
    records = []
    engine = make_engine(16, [records.append])
    for i in range(3):
        engine.add_request([i + 1, 2, 3], params(30), request_id=f"d{i}")
    engine.step()
    engine.add_request(list(range(200)), params(2), request_id="long")
    long = engine.requests["long"]
    while not long.output_ids:
        made = {output.request_id for output in engine.step()}
        assert {"d0", "d1", "d2"} <= made
    works = [work for record in records if isinstance(record, StepRecord)
             for work in record.works if work.request is long]
    assert [work.num_new for work in works] == [13] * 15 + [5]
    assert [work.num_made for work in works] == [0] * 15 + [1]
    while engine.has_unfinished:
        engine.step()


def test_abort_in_the_middle_of_a_prompt_gives_everything_back():
    engine = make_engine(8)
    engine.add_request(list(range(100)), params(4), request_id="long")
    engine.step()
    engine.step()
    assert engine.requests["long"].num_computed_tokens == 16
    output = engine.abort("long")
    assert (output.token_ids, output.finish_reason) == ([], "abort")
    engine.check()
    assert engine.scheduler.cache.usage == 0 and not engine.has_unfinished
    assert engine.step() == []


def test_prompt_logprobs_are_collected_over_chunks():
    prompt_ids = [(17 * i) % 256 for i in range(30)]
    reports = []
    for budget in 8, 64:
        engine = make_engine(budget)
        p = params(2, prompt_logprobs=1)
        r = engine.requests[engine.add_request(prompt_ids, p)]
        while engine.has_unfinished:
            engine.step()
        reports.append(r.prompt_logprobs)
    assert list(reports[0]) == list(reports[1]) == list(range(1, 30))
    for position in reports[0]:
        expected = pytest.approx(reports[1][position].logprob, abs=1e-4)
        assert reports[0][position].logprob == expected


def test_a_limit_of_no_tokens_is_refused():
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, got {limit}"):
            ChunkedPrefill(limit)
