"Queues, ranks, memory and preemption, without a model: nobody is lost, and all come to an end."

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.request import FinishReason, Request, RequestStatus
from nanollm.sampling import SamplingParams
from nanollm.scheduler import RANKS, Plan, Scheduler, WholePrompts, by_arrival, by_priority


class Pool:
    "Memory that is lent by the token; it refuses to be misused."

    def __init__(self, num_tokens, cached=0):
        self.max_tokens, self.cached = num_tokens, cached
        self.held, self.log, self.named = {}, [], {}

    @property
    def usage(self): return sum(self.held.values()) / self.max_tokens

    def match(self, request):
        assert request not in self.held, "matched while it holds memory"
        num_free = self.max_tokens - sum(self.held.values())
        hit = min(self.cached, request.num_tokens - 1, num_free)
        if hit:
            self.held[request] = hit
        return hit

    def allocate(self, request, num_tokens):
        self.log.append((request.request_id, num_tokens))
        others = sum(self.held.values()) - self.held.get(request, 0)
        if others + num_tokens > self.max_tokens:
            return False
        self.held[request] = max(num_tokens, self.held.get(request, 0))
        return True

    def commit(self, request, num_tokens):
        assert num_tokens <= min(self.held[request], request.num_tokens), "never drafts"
        self.named[request] = num_tokens

    def rewind(self, request):
        self.held[request] = min(self.held[request], request.num_tokens)

    def free(self, request):
        self.held.pop(request, None)
        self.named.pop(request, None)

    def check(self, requests):
        assert set(self.held) <= set(requests) and sum(self.held.values()) <= self.max_tokens


class DecodesFirst:
    "Everybody who runs goes on; prompts come in beside them, whole or in pieces."

    def __init__(self, whole, limit=None): self.whole, self.limit = whole, limit

    def plan(self, plan):
        for request in plan.running:
            plan.extend(request, self.limit)
        for request in plan.waiting:
            if not plan.admit(request, self.limit, self.whole):
                break


def make(name="r", num_prompt=4, max_tokens=3, arrival=0.0, **options):
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, range(num_prompt), params, arrival_s=arrival, **options)


def scheduler_of(num_tokens=100, policy=None, cached=0, **options):
    return Scheduler(Pool(num_tokens, cached), policy or WholePrompts(), **options)


def compute(scheduler, plan):
    "Do what the engine does with a plan, in logical time."
    for request, n in plan.batch.items():
        end = request.num_computed_tokens + n
        assert 1 <= n <= request.gap and end <= scheduler.cache.held[request]
        assert scheduler.cache.named[request] == min(end, request.num_tokens)
        closes = n == request.gap
        request.num_computed_tokens += n
        if closes:
            request.append(len(request.output_ids), 0.0)
        if request.finished:
            scheduler.finish(request)


def sizes(plan):
    "Tokens to compute, by request id."
    return {request.request_id: n for request, n in plan.batch.items()}


def two_running(num_tokens, **options):
    "A scheduler with requests a and b, of 5 computed tokens each and one made since."
    scheduler = scheduler_of(num_tokens, **options)
    a, b = make("a", 5, 6), make("b", 5, 6, arrival=1)
    for request in (a, b):
        scheduler.add(request)
    compute(scheduler, scheduler.schedule())
    return scheduler, a, b


def names(requests):
    return [request.request_id for request in requests]


@pytest.mark.parametrize("options, message", [
    (dict(max_num_seqs=0), "max_num_seqs must be from 1 to max_num_batched_tokens=512.*got 0"),
    (dict(max_num_seqs=9, max_num_batched_tokens=8), "max_num_batched_tokens=8.*got 9"),
])
def test_refuses_limits_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        scheduler_of(**options)


def test_refuses_at_the_door_what_can_never_fit():
    scheduler = scheduler_of(10)
    scheduler.add(make("fits", 5, 6)) # 5 + 6 - 1 = 10: the last token is never computed
    message = "5 prompt tokens and 7 new ones need a KV cache of 11 tokens, and .* room for 10"
    with pytest.raises(ValueError, match=message):
        scheduler.add(make("too large", 5, 7))
    assert names(scheduler.waiting) == ["fits"]


def test_ranks():
    requests = [make("b", arrival=1.0), make("a", arrival=1.0),
                make("late", arrival=2.0, priority=-1), make("first", arrival=0.5, priority=2)]
    assert names(sorted(requests, key=by_arrival)) == ["first", "a", "b", "late"]
    assert names(sorted(requests, key=by_priority)) == ["late", "a", "b", "first"]
    assert RANKS == {"fcfs": by_arrival, "priority": by_priority}


def test_the_queue_is_kept_in_rank_order_whatever_the_order_of_arrival():
    scheduler = scheduler_of(rank=by_priority)
    for request in (make("c", arrival=3), make("a", arrival=1),
                    make("urgent", arrival=4, priority=-1), make("b", arrival=2)):
        scheduler.add(request)
    assert names(scheduler.waiting) == ["urgent", "a", "b", "c"]


def test_whole_prompts_come_first_and_nobody_decodes_meanwhile():
    scheduler = scheduler_of()
    scheduler.add(make("a", 4))
    compute(scheduler, scheduler.schedule())
    scheduler.add(make("b", 7, arrival=1))
    plan = scheduler.schedule()
    assert sizes(plan) == {"b": 7} and names(plan.admitted) == ["b"]
    compute(scheduler, plan)
    assert sizes(scheduler.schedule()) == {"a": 1, "b": 1}


def test_a_prompt_longer_than_the_budget_is_computed_alone():
    scheduler = scheduler_of(max_num_seqs=4, max_num_batched_tokens=8)
    for i, length in enumerate((3, 20, 3, 3)):
        scheduler.add(make(str(i), length, arrival=i))
    steps = []
    for _ in range(3):
        plan = scheduler.schedule()
        steps.append(sizes(plan))
        compute(scheduler, plan)
    assert steps == [{"0": 3}, {"1": 20}, {"2": 3, "3": 3}]


def test_limits_of_a_step():
    scheduler = scheduler_of(max_num_seqs=3, max_num_batched_tokens=10)
    for i in range(5):
        scheduler.add(make(str(i), 4, arrival=i))
    plan = scheduler.schedule()
    assert sum(plan.batch.values()) <= 10 and names(plan.admitted) == ["0", "1"]
    compute(scheduler, plan)
    plan = scheduler.schedule()
    assert names(plan.admitted) == ["2"] and len(scheduler.running) == 3


def test_chunks_follow_the_budget():
    scheduler = scheduler_of(policy=DecodesFirst(whole=False), max_num_seqs=4,
                             max_num_batched_tokens=6)
    scheduler.add(make("a", 4, 4))
    scheduler.add(make("b", 9, 4, arrival=1))
    steps = []
    for _ in range(4):
        plan = scheduler.schedule()
        steps.append(sizes(plan))
        compute(scheduler, plan)
    assert steps == [{"a": 4, "b": 2}, {"a": 1, "b": 5}, {"a": 1, "b": 2}, {"a": 1, "b": 1}]
    assert scheduler.cache.log[1] == ("b", 9), "all known tokens must fit, not only two"


def test_a_limit_leaves_budget_to_others():
    scheduler = scheduler_of(policy=DecodesFirst(False, limit=3), max_num_seqs=4,
                             max_num_batched_tokens=8)
    for i, length in enumerate((9, 2, 7)):
        scheduler.add(make(str(i), length, 2, arrival=i))
    steps = []
    for _ in range(3):
        plan = scheduler.schedule()
        steps.append(sizes(plan))
        compute(scheduler, plan)
    assert steps == [{"0": 3, "1": 2, "2": 3}, {"0": 3, "1": 1, "2": 3}, {"0": 3, "2": 1}]


def test_a_limit_of_nothing_plans_nothing():
    scheduler, a, b = two_running(20)
    plan = Plan(scheduler)
    plan.extend(a, 0)
    assert not plan.batch and not plan.preempted


def test_a_policy_may_let_others_than_the_first_in():
    scheduler = scheduler_of(12)
    large, small = make("large", 8, 2), make("small", 1, 2, arrival=1)
    for request in (large, small):
        scheduler.add(request)
    plan = Plan(scheduler)
    assert list(plan.waiting) == [large, small] and plan.admit(small)
    assert list(plan.waiting) == [large] and plan.admit(large)
    assert scheduler.running == [large, small], "in rank order, whoever came in first"


def test_nobody_passes_the_first_in_the_queue():
    scheduler = scheduler_of(12)
    scheduler.add(make("a", 6, 4))
    compute(scheduler, scheduler.schedule())
    scheduler.add(make("large", 8, 2, arrival=1))
    scheduler.add(make("small", 1, 2, arrival=2))
    assert not scheduler.schedule().admitted and names(scheduler.waiting) == ["large", "small"]
    assert scheduler.waiting[0].num_computed_tokens == 0


def test_who_is_not_admitted_gives_its_cached_prefix_back():
    scheduler = scheduler_of(12, cached=3)
    scheduler.add(make("a", 8, 4))
    compute(scheduler, scheduler.schedule())
    scheduler.add(make("b", 6, 2, arrival=1))
    plan = scheduler.schedule()
    b = scheduler.waiting[0]
    assert not plan.admitted and b not in scheduler.cache.held
    assert b.num_computed_tokens == b.num_cached_tokens == 0
    assert b.status is RequestStatus.WAITING


def test_a_cached_prefix_makes_the_gap_smaller():
    scheduler = scheduler_of(cached=3)
    request = make("a", 8)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert plan.batch == {request: 5}
    assert request.num_computed_tokens == request.num_cached_tokens == 3


def test_preempts_the_newest_which_keeps_its_output_and_comes_back_first():
    scheduler = scheduler_of(10)
    a, b, c = make("a", 4, 7), make("b", 4, 4, arrival=1), make("c", 3, 2, arrival=2)
    for request in (a, b, c):
        scheduler.add(request)
    for _ in range(2):
        compute(scheduler, scheduler.schedule()) # a and b hold all; c waits
    plan = scheduler.schedule()
    assert names(plan.preempted) == ["b"] and plan.batch == {a: 1}
    assert names(scheduler.waiting) == ["b", "c"] and names(scheduler.running) == ["a"]
    assert b.status is RequestStatus.WAITING and b.output_ids == [0, 1]
    assert b.num_computed_tokens == 0 and b.num_preemptions == 1
    assert b not in scheduler.cache.held
    assert not plan.admit(c), "nobody comes in after a preemption"
    while not a.finished:
        compute(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert plan.batch == {b: 6, c: 3}, "prompt and output in one long gap"
    assert b.num_cached_tokens == 0 and b.arrival_s == 1


def test_by_priority_the_least_important_goes_though_it_is_the_oldest():
    scheduler = scheduler_of(8, rank=by_priority)
    old, urgent = make("old", 4, 4, priority=1), make("urgent", 4, 4, arrival=1)
    scheduler.add(old)
    compute(scheduler, scheduler.schedule())
    scheduler.add(urgent)
    compute(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert plan.preempted == [old] and plan.batch == {urgent: 1}


def test_who_was_planned_and_is_preempted_returns_its_budget():
    scheduler, a, b = two_running(10)
    scheduler.cache.max_tokens = 11
    plan = Plan(scheduler)
    plan.extend(b)
    assert plan.batch == {b: 1} and plan.budget == 511
    plan.extend(a)
    assert plan.batch == {a: 1} and plan.budget == 511 and plan.preempted == [b]


def test_the_newest_preempts_itself():
    scheduler, a, b = two_running(10)
    plan = Plan(scheduler)
    plan.extend(b)
    assert plan.preempted == [b] and not plan.batch and scheduler.running == [a]
    plan.extend(b)
    assert not plan.batch, "whoever waits is not extended"


def test_nobody_is_preempted_for_the_sake_of_others_once_somebody_was_admitted():
    "The newcomer may share blocks that the victim was to compute in this step."
    scheduler, a, b = two_running(12)
    late = make("late", 2, 2, arrival=2)
    scheduler.add(late)
    plan = Plan(scheduler)
    assert plan.admit(late)
    for request in (a, b):
        plan.extend(request)
    assert plan.batch == {late: 2} and not plan.preempted
    compute(scheduler, plan)
    plan = Plan(scheduler)
    for request in plan.running:
        plan.extend(request)
    assert plan.batch == {a: 1, b: 1} and plan.preempted == [late]


def test_drafts_are_cut_to_the_budget():
    scheduler = scheduler_of(max_num_seqs=2, max_num_batched_tokens=4)
    request = make("a", 3, 9)
    scheduler.add(request)
    compute(scheduler, scheduler.schedule())
    request.draft_ids = [7, 8, 9, 10, 11]
    assert scheduler.schedule().batch == {request: 4}
    assert request.draft_ids == [7, 8, 9] and request.gap == 4
    assert scheduler.cache.named[request] == 4, "drafts are never named"


def test_drafts_are_cut_by_a_limit():
    scheduler, a, b = two_running(40)
    a.draft_ids = [7, 8, 9]
    plan = Plan(scheduler)
    plan.extend(a, limit=2)
    assert plan.batch == {a: 2} and a.draft_ids == [7]


def test_drafts_give_way_before_another_request():
    scheduler, a, b = two_running(12)
    a.draft_ids = [7, 8, 9]
    plan = scheduler.schedule()
    assert plan.batch == {a: 1, b: 1} and not plan.preempted and a.draft_ids == []


def test_drafts_are_forgotten_by_a_preemption():
    scheduler, a, b = two_running(10)
    b.draft_ids = [1, 2]
    assert scheduler.schedule().preempted == [b] and b.draft_ids == [] and b.gap == 6


def test_finish_takes_memory_wherever_the_request_is():
    scheduler = scheduler_of(max_num_seqs=1)
    running, waiting, stranger = make("a"), make("b", arrival=1), make("c")
    for request in (running, waiting):
        scheduler.add(request)
    scheduler.schedule()
    for request in (running, waiting, running, stranger):
        request.finish(FinishReason.ABORT, 0.0)
        scheduler.finish(request)
    assert not scheduler.running and not scheduler.waiting and not scheduler.cache.held


def test_an_empty_scheduler_plans_nothing():
    plan = scheduler_of().schedule()
    assert not (plan.batch or plan.admitted or plan.preempted or list(plan.waiting))


def crowd(num, num_new, *shares, arrival=0.0, **options):
    "So many requests with the same shares."
    return [make(f"{'/'.join(shares)} {i:02}", 4, num_new, arrival + i / 100, shares=shares,
                 **options) for i in range(num)]


def play(scheduler, comers, num_steps=1000):
    "Steps until each request has its first token, by request; nobody may wait for ever."
    first, coming = {}, sorted(comers, key=lambda request: request.arrival_s)
    for step in range(num_steps):
        while coming and coming[0].arrival_s < step + 1:
            scheduler.add(coming.pop(0))
        plan = scheduler.schedule()
        compute(scheduler, plan)
        for request in plan.batch:
            if request.output_ids and request not in first:
                first[request] = step - int(request.arrival_s)
        if not (coming or scheduler.waiting or scheduler.running):
            return first
    raise AssertionError("no end")


POLICIES = [WholePrompts, lambda: DecodesFirst(True), lambda: DecodesFirst(False, 3)]


def test_without_shares_the_queue_is_in_rank_order():
    scheduler = scheduler_of(max_num_seqs=2)
    for request in crowd(4, 3):
        scheduler.add(request)
    assert list(Plan(scheduler).waiting) == scheduler.waiting


def test_the_fewest_running_answers_come_in_next():
    scheduler = scheduler_of(max_num_seqs=3)
    for request in (*crowd(5, 3, "a", "1"), *crowd(2, 3, "a", "2", arrival=1),
                    *crowd(3, 3, "b", "3", arrival=2), *crowd(1, 3, arrival=3)):
        scheduler.add(request)
    assert names(Plan(scheduler).waiting) == [
        "a/1 00", "b/3 00", " 00", "a/2 00", "b/3 01", "a/1 01", "b/3 02", "a/2 01",
        "a/1 02", "a/1 03", "a/1 04"]
    compute(scheduler, scheduler.schedule())
    assert names(scheduler.running) == ["a/1 00", "b/3 00", " 00"]
    assert names(Plan(scheduler).waiting)[:3] == ["a/2 00", "b/3 01", "a/1 01"]


@pytest.mark.parametrize("policy", POLICIES)
def test_one_call_of_many_answers_does_not_keep_others_waiting(policy):
    scheduler = scheduler_of(10**6, policy(), max_num_seqs=64, max_num_batched_tokens=128)
    many = crowd(64, 200, "a", "big")
    others = [make(f"o{i}", 4, 30, 40 + i / 10, shares=(f"t{i % 3}", f"call {i}"))
              for i in range(5)]
    first = play(scheduler, [*many, *others])
    assert max(first[request] for request in others) < 3
    assert sum(request.num_preemptions for request in [*many, *others]) == 5
    assert not any(request.num_preemptions for request in others)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_shares_they_wait_to_the_end(policy):
    scheduler = scheduler_of(10**6, policy(), max_num_seqs=8, max_num_batched_tokens=64)
    others = [make(f"o{i}", 4, 3, 40) for i in range(2)]
    first = play(scheduler, [*(make(f"{i}", 4, 100) for i in range(8)), *others])
    assert min(first[request] for request in others) > 50


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_is_shared_as_seats_are(policy):
    "Seats are free for all, and memory is what is lacking."
    scheduler = scheduler_of(400, policy(), max_num_seqs=64, max_num_batched_tokens=128)
    many = crowd(40, 60, "a", "big")
    others = [make(f"o{i}", 30, 10, 20 + i, shares=(f"t{i}", "c")) for i in range(3)]
    first = play(scheduler, [*many, *others])
    assert max(first[request] for request in others) < 20 # without shares: 126 at least
    assert not any(request.num_preemptions for request in others)


def test_an_answer_is_preempted_only_where_its_share_stays_the_richer():
    for num_rich, num_poor, swapped in ((3, 1, True), (2, 1, False), (2, 0, True)):
        scheduler = scheduler_of(max_num_seqs=num_rich + num_poor)
        poor = crowd(num_poor + 1, 9, "b", "2")
        for request in (*crowd(num_rich, 9, "a", "1"), *poor[:num_poor]):
            scheduler.add(request)
        compute(scheduler, scheduler.schedule())
        scheduler.add(poor[num_poor])
        plan = scheduler.schedule()
        assert names(plan.preempted) == [f"a/1 {num_rich - 1:02}"] * swapped, "the newest"
        assert plan.admitted == [poor[num_poor]] * swapped


def test_calls_of_one_tenant_are_compared_as_calls():
    scheduler = scheduler_of(max_num_seqs=4)
    for request in (*crowd(2, 9, "a", "1"), *crowd(2, 9, "b", "2")):
        scheduler.add(request)
    compute(scheduler, scheduler.schedule())
    scheduler.add(make("c", shares=("b", "3"), arrival=2))
    plan = scheduler.schedule()
    assert names(plan.preempted) == ["b/2 01"] and names(plan.admitted) == ["c"]


def test_nobody_goes_for_one_of_lower_priority():
    scheduler = scheduler_of(rank=by_priority, max_num_seqs=4)
    for request in crowd(4, 9, "a", "1", priority=1):
        scheduler.add(request)
    compute(scheduler, scheduler.schedule())
    later = make("later", shares=("b", "2"), priority=2)
    scheduler.add(later)
    assert not scheduler.schedule().preempted
    scheduler.finish(later)
    scheduler.add(make("equal", shares=("b", "2"), priority=1, arrival=5))
    assert names(scheduler.schedule().admitted) == ["equal"]


def test_priority_goes_before_shares():
    scheduler = scheduler_of(rank=by_priority)
    for request in (*crowd(2, 3, "a", "1"), *crowd(2, 3, "b", "2", priority=-1)):
        scheduler.add(request)
    assert names(Plan(scheduler).waiting) == ["b/2 00", "b/2 01", "a/1 00", "a/1 01"]


def test_when_memory_lacks_the_rich_give_it():
    "Not the newest of all: it would come in by its share again, and go again."
    scheduler = scheduler_of(20, DecodesFirst(True))
    for request in (*crowd(3, 9, "a", "1"), *crowd(1, 9, "b", "2", arrival=1)):
        scheduler.add(request)
    compute(scheduler, scheduler.schedule())
    compute(scheduler, scheduler.schedule())
    assert names(scheduler.schedule().preempted) == ["a/1 02"]


def test_memory_that_has_come_free_is_tried_before_anybody_goes():
    scheduler = scheduler_of(17, DecodesFirst(True))
    first, second, third = crowd(3, 9, "a", "1")
    for request in (first, second, third):
        scheduler.add(request)
    compute(scheduler, scheduler.schedule())
    scheduler.add(make("b", 4, 2, arrival=1, shares=("b", "2")))
    compute(scheduler, scheduler.schedule())
    assert scheduler.short_of_memory
    first.finish(FinishReason.ABORT, 0.0)
    scheduler.finish(first)
    plan = scheduler.schedule()
    assert names(plan.admitted) == ["b"] and not plan.preempted


SHARES = [(), ("a", "1"), ("a", "2"), ("b", "3"), ("c",)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from(["whole prompts", "together", "pieces", "limit"]),
       st.sampled_from(list(RANKS.values())), st.booleans())
def test_random_loads_end_and_leave_nothing_behind(seed, kind, rank, shared):
    rng = random.Random(seed)
    requests = [make(f"{i:02}", rng.randint(1, 12), rng.randint(1, 8), rng.randint(0, 12),
                     priority=rng.randint(0, 2), shares=rng.choice(SHARES) if shared else ())
                for i in range(10)]
    aborts = {request: request.arrival_s + rng.randint(0, 9)
              for request in requests if rng.random() < 0.2}
    policy = {"whole prompts": WholePrompts(), "together": DecodesFirst(True),
              "pieces": DecodesFirst(False), "limit": DecodesFirst(False, limit=2)}[kind]
    rows = rng.randint(1, 8)
    scheduler = scheduler_of(rng.randint(19, 60), policy, rng.choice([0, 0, 2]), rank=rank,
                             max_num_seqs=rows, max_num_batched_tokens=rng.randint(rows, 24))
    for step in range(500):
        for request in requests:
            if request.arrival_s == step:
                scheduler.add(request)
            if aborts.get(request) == step and not request.finished:
                request.finish(FinishReason.ABORT, 0.0)
                scheduler.finish(request)
        before = sum(len(request.output_ids) for request in requests)
        plan = scheduler.schedule()
        check(scheduler, plan, kind)
        compute(scheduler, plan)
        made = sum(len(request.output_ids) for request in requests) - before
        assert made or plan.batch or not scheduler.running, "somebody runs, nobody gets a token"
        if step > 12 and not scheduler.waiting and not scheduler.running:
            break
    assert all(request.finished for request in requests) and not scheduler.cache.held
    assert all(r.finish_reason == "length" or r in aborts for r in requests)


def check(scheduler, plan, kind):
    "What holds of every plan."
    scheduler.cache.check(scheduler.running)
    assert set(plan.batch) <= set(scheduler.running)
    assert not set(scheduler.running) & set(scheduler.waiting)
    assert len(scheduler.running) <= scheduler.max_num_seqs
    for queue in (scheduler.waiting, scheduler.running):
        assert queue == sorted(queue, key=scheduler.rank)
    assert all(r.status is RequestStatus.RUNNING for r in scheduler.running)
    for request in scheduler.waiting:
        assert request.status is RequestStatus.WAITING
        assert not request.num_computed_tokens and request not in scheduler.cache.held
    if not scheduler.num_levels: # else it may have given a seat to another share
        assert not (plan.admitted and plan.preempted)
    if sum(plan.batch.values()) > scheduler.max_num_batched_tokens:
        alone = kind in ("whole prompts", "together") and len(plan.batch) == 1
        assert alone, "over the budget, and not a long prompt alone"
    if kind == "limit":
        assert max(plan.batch.values(), default=0) <= 2
    if scheduler.running and not (plan.admitted and kind == "whole prompts"):
        in_pieces = kind in ("pieces", "limit")
        assert in_pieces or scheduler.running[0] in plan.batch, "the first in rank has no token"
