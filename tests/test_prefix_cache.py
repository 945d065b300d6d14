"""Who finds which tokens, who must not, what is forgotten first; blocks and names agree."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.model import load_model
from nanollm.paged_attention import GroupedAttention, PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager, block_hash, root_hash
from nanollm.request import FinishReason, Request
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler, WholePrompts
from nanollm.transformer import Decoder


def make(ids, name="r", max_tokens=16, **options):
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, list(ids), params, arrival_s=0.0, **options)


def grow(manager, request, end):
    "Schedule a request's tokens up to `end`, and pretend to compute them."
    manager.commit(request, end)
    request.num_computed_tokens = end


def release(manager, request):
    "Give back all, as the scheduler does."
    manager.free(request)
    request.num_computed_tokens = 0


def enter(manager, ids, **options):
    "Let a request in and schedule all it has; nothing is computed yet. None without room."
    request = make(ids, **options)
    request.num_cached_tokens = request.num_computed_tokens = manager.match(request)
    if not manager.allocate(request, request.num_tokens):
        release(manager, request)
        return None
    manager.commit(request, request.num_tokens)
    return request


def arrive(manager, ids, **options):
    "Let a request in and pretend to compute it; None if there is no room."
    request = enter(manager, ids, **options)
    if request is not None:
        request.num_computed_tokens = request.num_tokens
    return request


def visit(manager, ids, **options):
    "Arrive, compute and leave; return how many tokens were found."
    request = arrive(manager, ids, **options)
    release(manager, request)
    return request.num_cached_tokens


def found(manager, ids, **options):
    "How many tokens would be found; nothing changes but the order of the free list."
    request = make(ids, **options)
    request.num_computed_tokens = manager.match(request)
    assert len(request.block_table) * manager.block_size == request.num_computed_tokens
    num_tokens = request.num_computed_tokens
    release(manager, request)
    return num_tokens


# names

def test_names_depend_on_all_that_comes_before():
    root = root_hash(None, "")
    name = block_hash(root, [1, 2, 3, 4])
    assert name == block_hash(root, (1, 2, 3, 4)) and len(name) == 32
    others = [block_hash(root, [1, 2, 3, 5]), block_hash(root, [4, 3, 2, 1]),
              block_hash(name, [1, 2, 3, 4]), block_hash(root_hash("a", ""), [1, 2, 3, 4]),
              block_hash(root_hash(None, "a"), [1, 2, 3, 4])]
    assert len({name, *others}) == 6
    assert block_hash(root, [1, 23]) != block_hash(root, [12, 3])


def test_roots_do_not_run_into_each_other():
    pairs = [(None, ""), ("", ""), ("None", ""), (None, "None"), ("a", "b"), ("ab", ""),
             (None, "ab"), ("a', 'b", ""), ("a", "', 'b")]
    assert len({root_hash(*pair) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("length, expected", [
    (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 8), (40, 8)])
def test_only_full_blocks_and_never_the_last_token(length, expected):
    manager = PrefixCachingBlockManager(16, 4)
    visit(manager, range(11)) # two full blocks, and three tokens
    assert found(manager, range(length)) == expected
    manager.check([])


def test_the_chain_ends_at_the_first_difference():
    manager = PrefixCachingBlockManager(16, 4)
    visit(manager, range(16))
    assert found(manager, [*range(5), 99, *range(6, 16), 0]) == 4
    assert found(manager, [99, *range(1, 16), 0]) == 0
    assert found(manager, [*range(4, 16), 0]) == 0


def test_adapter_and_salt_keep_apart():
    manager = PrefixCachingBlockManager(64, 4)
    keys = [{}, {"adapter": "a"}, {"cache_salt": "a"}, {"adapter": "a", "cache_salt": "a"},
            {"adapter": "b"}]
    assert [visit(manager, range(9), **key) for key in keys] == [0] * 5
    assert [visit(manager, range(9), **key) for key in keys] == [8] * 5


def test_who_opts_out_finds_nothing_and_leaves_something():
    manager = PrefixCachingBlockManager(16, 4)
    assert visit(manager, range(9), use_prefix_cache=False) == 0
    assert visit(manager, range(9), use_prefix_cache=False) == 0
    assert found(manager, range(9)) == 8


def test_hashes_are_computed_once(monkeypatch):
    calls = []

    def spy(parent, token_ids):
        calls.append(parent)
        return block_hash(parent, token_ids)

    monkeypatch.setattr("nanollm.prefix_cache.block_hash", spy)
    manager = PrefixCachingBlockManager(16, 4)
    request = arrive(manager, range(17))
    for _ in range(3):
        release(manager, request)
        request.num_computed_tokens = manager.match(request)
        manager.allocate(request, 17)
        grow(manager, request, 17)
    assert len(calls) == len(set(calls)) == 4


# what is named, and when

def test_a_prompt_in_pieces_is_found_as_far_as_it_is_scheduled():
    manager, first = PrefixCachingBlockManager(16, 4), make(range(12))
    manager.match(first)
    manager.allocate(first, 12)
    assert found(manager, range(13)) == 0
    for end, expected in ((3, 0), (4, 4), (7, 4), (8, 8), (12, 12)):
        manager.commit(first, end)
        assert found(manager, range(13)) == expected, "the coming step computes it"
        first.num_computed_tokens = end
        assert found(manager, range(13)) == expected
        manager.check([first])


def test_who_arrives_in_the_same_step_shares_what_it_will_compute():
    manager = PrefixCachingBlockManager(16, 4)
    first, second = enter(manager, range(9)), enter(manager, range(9))
    assert first.num_cached_tokens == 0 and second.num_cached_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert [manager.ref_counts[block] for block in first.block_table] == [2, 2, 1]
    manager.check([first, second])


def test_running_requests_share_and_count():
    manager = PrefixCachingBlockManager(16, 4)
    first, second = arrive(manager, range(9)), arrive(manager, range(9))
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert [manager.ref_counts[block] for block in first.block_table] == [2, 2, 1]
    release(manager, first)
    assert manager.cached_blocks == [] and manager.num_free == 13
    release(manager, second)
    assert manager.num_free == 16 and len(manager.cached_blocks) == 2


def decode(manager, request, token_id, drafts=()):
    "One step: schedule the last token and drafts that are right, and append what comes of it."
    manager.allocate(request, request.num_tokens + len(drafts))
    manager.commit(request, request.num_tokens)
    for new in (*drafts, token_id):
        request.append(new, 0.0)
    request.num_computed_tokens = request.num_tokens - 1
    manager.rewind(request)


def test_generated_tokens_are_found_by_the_next_turn():
    manager = PrefixCachingBlockManager(16, 4)
    request = arrive(manager, range(6))
    request.append(6, 0.0)
    for token_id in range(7, 14):
        decode(manager, request, token_id)
    release(manager, request)
    assert found(manager, range(30)) == 12


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_blocks_that_right_drafts_have_filled_are_found_too(k):
    manager = PrefixCachingBlockManager(16, 4)
    request = arrive(manager, range(6))
    request.append(6, 0.0)
    while request.num_tokens < 22:
        n = request.num_tokens
        decode(manager, request, n + k, range(n, n + k))
        manager.check([request])
    last_start = (request.num_tokens - 1 - k) // 4 * 4 # known when the last step was planned
    assert found(manager, range(40)) >= last_start
    release(manager, request)
    assert found(manager, range(40)) >= last_start


def test_drafts_are_never_named():
    manager = PrefixCachingBlockManager(16, 4)
    request = arrive(manager, range(6))
    request.append(6, 0.0)
    request.draft_ids = [97, 98, 99]
    manager.allocate(request, request.num_tokens + 3)
    manager.commit(request, request.num_tokens)
    assert found(manager, [*range(7), 97, 98, 99]) == 4
    request.num_computed_tokens, request.draft_ids = 7, [] # and none of the drafts was right
    manager.rewind(request)
    assert found(manager, [*range(7), 97, 98]) == 4
    assert len(manager._hash_of) == 1


def test_the_scheduler_commits_no_drafts():
    manager = PrefixCachingBlockManager(16, 4)
    scheduler = Scheduler(manager, ChunkedPrefill(), 4, 64)
    request = make(range(6))
    scheduler.add(request)
    scheduler.schedule()
    request.num_computed_tokens = 6
    request.append(6, 0.0)
    request.draft_ids = [97, 98, 99, 100, 101]
    assert scheduler.schedule().batch == {request: 6} and len(request.block_table) == 3
    assert len(manager._hash_of) == 1 and found(manager, [*range(7), 97, 98]) == 4


# names are withdrawn from what was not computed

def test_who_leaves_before_it_is_computed_takes_its_names_along():
    manager = PrefixCachingBlockManager(16, 4)
    request = make(range(20))
    request.num_computed_tokens = manager.match(request)
    manager.allocate(request, 20)
    grow(manager, request, 9)
    manager.commit(request, 17) # and this step fails
    assert found(manager, range(20)) == 16
    release(manager, request)
    assert found(manager, range(20)) == 8
    assert len(manager._block_of) == len(manager._hash_of) == 2
    manager.check([])


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_a_failed_step_of_two_that_share_leaves_no_name(first_to_go):
    manager = PrefixCachingBlockManager(16, 4)
    pair = [enter(manager, range(9)), enter(manager, range(13))]
    assert pair[1].num_cached_tokens == 8
    release(manager, pair.pop(first_to_go))
    manager.check(pair)
    release(manager, pair.pop())
    assert found(manager, range(20)) == 0 and manager._hash_of == {} and manager.usage == 0
    manager.check([])


def test_who_is_only_matched_takes_no_name_along():
    "It did not fit in: what it had found is still computed by the other."
    manager = PrefixCachingBlockManager(4, 4)
    other = enter(manager, range(9))
    assert enter(manager, range(20)) is None
    assert found(manager, range(9)) == 8
    manager.check([other])


def test_a_broken_request_takes_its_names_from_those_who_share():
    "The other goes on with its blocks; nobody else finds them."
    manager = PrefixCachingBlockManager(16, 4)
    broken, other = enter(manager, range(9)), enter(manager, range(9))
    release(manager, broken)
    assert other.block_table[:2] == [0, 1] and found(manager, range(9)) == 0
    other.num_computed_tokens = 9
    for token_id in range(9, 20):
        other.append(token_id, 0.0)
        manager.allocate(other, other.num_tokens)
        grow(manager, other, other.num_tokens)
        manager.check([other])
    assert found(manager, range(30)) == 0, "the chain has lost its beginning"
    release(manager, other)
    assert visit(manager, range(30)) == 0 and found(manager, range(30)) == 28
    manager.check([])


class InOrder:
    "Extends the running requests in a given order."

    def __init__(self): self.names = []

    def plan(self, plan):
        running = {request.request_id: request for request in plan.running}
        for name in self.names:
            plan.extend(running[name])
        for request in plan.waiting:
            plan.admit(request)


def two_running(num_blocks):
    "Two requests of 7 tokens, and each of them with an eighth that fills its second block."
    manager, policy = PrefixCachingBlockManager(num_blocks, 4), InOrder()
    scheduler = Scheduler(manager, policy, 4, 64)
    requests = [make(range(7), "0", 4), make(range(100, 107), "1", 4)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.schedule().batch == dict.fromkeys(requests, 7)
    for request in requests:
        request.num_computed_tokens = 7
        request.append(request.token_ids[-1] + 1, 0.0)
    return manager, scheduler, policy, requests


def lack(request):
    "Let a request have two more tokens that are not computed."
    for token_id in (50, 51):
        request.append(token_id, 0.0)


def test_who_is_preempted_in_the_plan_loses_the_names_of_this_step():
    manager, scheduler, policy, (old, new) = two_running(4)
    lack(old) # a block that only the new one can give
    policy.names = ["1", "0"]
    plan = scheduler.schedule()
    assert plan.batch == {old: 3} and plan.preempted == [new]
    assert found(manager, range(100, 120)) == 4, "its second block is not computed"
    assert found(manager, range(20)) == 8
    assert new.num_computed_tokens == 0 and new.block_table == []
    manager.check([old, new])


def test_extend_after_an_admission_never_preempts():
    "The newcomer may share what a victim was to compute in this very step."
    manager, scheduler, policy, (old, new) = two_running(5)
    scheduler.add(make([*range(100, 108), 1, 2], "2", 4))
    scheduler.policy = AdmitBetween()
    lack(old)
    plan = scheduler.schedule()
    [guest] = plan.admitted
    assert guest.num_cached_tokens == 8 and guest.block_table[:2] == new.block_table
    assert plan.batch == {new: 1, guest: 2} and plan.preempted == []
    assert old.gap == 3 and len(old.block_table) == 2
    manager.check([old, new, guest])


class AdmitBetween:
    "Extends the newest, admits who waits, then extends the oldest."

    def plan(self, plan):
        old, new = plan.running
        plan.extend(new)
        for request in plan.waiting:
            plan.admit(request)
        plan.extend(old)


def test_after_a_preemption_nobody_is_admitted():
    manager, scheduler, policy, (old, new) = two_running(4)
    policy.names = ["0"]
    lack(old)
    scheduler.add(make([1], "2", 4))
    plan = scheduler.schedule()
    assert plan.preempted == [new] and plan.admitted == [] and len(scheduler.waiting) == 2
    assert [request.request_id for request in scheduler.waiting] == ["1", "2"]


def test_an_abort_between_two_pieces_keeps_what_is_computed_and_no_more():
    manager = PrefixCachingBlockManager(16, 4)
    scheduler = Scheduler(manager, ChunkedPrefill(), 4, 10)
    request = make(range(30))
    scheduler.add(request)
    scheduler.schedule()
    request.num_computed_tokens = 10 # the second step is planned, and then the client goes
    scheduler.schedule()
    assert found(manager, range(40)) == 20
    request.finish(FinishReason.ABORT, 0.0)
    scheduler.finish(request)
    assert found(manager, range(40)) == 8 and manager.usage == 0
    manager.check([])


# what is forgotten

def test_the_longest_unused_is_forgotten_first_and_its_tail_before_its_head():
    manager = PrefixCachingBlockManager(6, 4)
    visit(manager, range(0, 8))
    visit(manager, range(100, 108))
    visit(manager, range(200, 208))
    assert visit(manager, range(0, 8)) == 4 # its last block is computed again
    assert visit(manager, range(300, 304)) == 0 # needs one block
    starts = (0, 100, 200, 300)
    assert [found(manager, [*range(i, i + 8), 0]) for i in starts] == [8, 4, 8, 4]


def test_blocks_without_names_are_used_first():
    manager = PrefixCachingBlockManager(8, 4)
    visit(manager, range(10))
    free = list(manager._free)
    assert free[0] == 2 and free[-2:] == [1, 0] # partly filled; never used; then tail, head
    visit(manager, range(50, 70))
    assert found(manager, range(20)) == 8


def test_two_that_compute_the_same_leave_one_name():
    "They came in when nothing was scheduled yet."
    manager = PrefixCachingBlockManager(8, 4)
    requests = [make(range(9)) for _ in range(2)]
    for request in requests:
        assert manager.match(request) == 0 and manager.allocate(request, 9)
    for request in requests:
        grow(manager, request, 9)
        manager.check(requests)
    assert len(manager._block_of) == 2
    release(manager, requests[0])
    assert found(manager, range(9)) == 8
    release(manager, requests[1])
    assert sorted(manager.cached_blocks) == [0, 1]


def test_a_block_that_is_used_again_answers_to_its_new_name_only():
    manager = PrefixCachingBlockManager(2, 4)
    visit(manager, range(8))
    visit(manager, range(50, 58))
    assert found(manager, range(9)) == 0 and found(manager, [*range(50, 58), 0]) == 8


@pytest.mark.parametrize("num_tokens, fits", [(16, True), (17, False), (20, False)])
def test_hits_on_the_free_list_are_not_counted_twice(num_tokens, fits):
    manager = PrefixCachingBlockManager(4, 4)
    visit(manager, range(9))
    request = arrive(manager, range(num_tokens))
    assert (request is not None) == fits
    if fits:
        assert request.num_cached_tokens == 8
    else:
        assert manager.num_free == 4 and found(manager, range(9)) == 8


def test_a_preempted_request_finds_what_it_computed():
    manager = PrefixCachingBlockManager(8, 4)
    request = arrive(manager, range(7))
    request.append(7, 0.0)
    for token_id in 8, 9:
        decode(manager, request, token_id)
    release(manager, request)
    assert manager.match(request) == 8 and request.block_table == [0, 1]


def test_reset_forgets_and_refuses_while_somebody_runs():
    manager = PrefixCachingBlockManager(16, 4)
    request = arrive(manager, range(9))
    with pytest.raises(RuntimeError, match="3 blocks are held by requests"):
        manager.reset()
    assert found(manager, range(9)) == 8
    release(manager, request)
    manager.reset()
    manager.check([])
    assert found(manager, range(9)) == 0 and manager.cached_blocks == []
    assert visit(manager, range(9)) == 0 and visit(manager, range(9)) == 8


@pytest.mark.parametrize("damage", [
    lambda manager: manager._block_of.popitem(),
    lambda manager: manager._hash_of.update({5: b"x"}),
    lambda manager: manager._hash_of.update({0: b"x"}),
    lambda manager: manager._hash_of.pop(0),
])
def test_check_notices_contradictions(damage):
    manager = PrefixCachingBlockManager(8, 4)
    visit(manager, range(9))
    damage(manager)
    with pytest.raises(RuntimeError, match="contradict each other"):
        manager.check([])


def test_check_counts_blocks_as_well():
    manager = PrefixCachingBlockManager(8, 4)
    pair = [arrive(manager, range(9)), arrive(manager, range(9))]
    manager.check(pair)
    with pytest.raises(RuntimeError, match="block 0 is counted 2 times, stands in 1 block"):
        manager.check(pair[:1])


def name_of(ids, size):
    "The name of the last block of `ids`."
    parent = root_hash(None, "")
    for i in range(0, len(ids), size):
        parent = block_hash(parent, ids[i:i + size])
    return parent


KINDS = ["arrive", "arrive", "step", "step", "step", "fail", "free", "leave"]
EVENTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 50), st.integers(0, 2**16)),
                  max_size=80)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(4, 24), st.integers(1, 5), EVENTS)
def test_what_is_found_is_what_was_written(num_blocks, size, events):
    "A shadow of the memory: for every block the tokens up to its end, as they are computed."
    manager, alive, contents = PrefixCachingBlockManager(num_blocks, size), [], {}
    for event, which, seed in events:
        rng, request = random.Random(seed), alive[which % len(alive)] if alive else None
        if event == "arrive" or request is None:
            request = make([rng.choice((1, 1, 2)) for _ in range(rng.randint(1, 4 * size))])
            request.num_computed_tokens = manager.match(request)
            for i, block in enumerate(request.block_table):
                assert contents[block] == request.token_ids[:(i + 1) * size]
            assert request.num_computed_tokens < request.num_tokens
            if manager.allocate(request, request.num_tokens):
                alive.append(request)
            else:
                release(manager, request)
        elif event in ("step", "fail") and request.block_table:
            drafts = [rng.choice((1, 2)) for _ in range(rng.choice((0, 0, 1, 3)))]
            start, known = request.num_computed_tokens, request.num_tokens
            end = rng.randint(start, known)
            drafts = drafts if end == known else []
            if not manager.allocate(request, known + len(drafts)):
                continue
            manager.commit(request, end)
            tokens = request.token_ids[:end] + drafts
            for i in range(start, len(tokens)):
                block = request.block_table[i // size]
                assert manager.ref_counts[block] == 1, "a shared block is written"
                contents[block] = tokens[:i + 1] if event == "step" else None
            if event == "fail":
                release(manager, request)
                alive.remove(request)
            else:
                request.num_computed_tokens = end
                if end == known:
                    for token_id in [*drafts[:rng.randint(0, len(drafts))], rng.choice((1, 2))]:
                        request.append(token_id, 0.0)
                    request.num_computed_tokens = request.num_tokens - 1
                    for i in range(start, request.num_tokens - 1): # without wrong drafts
                        block = request.block_table[i // size]
                        contents[block] = request.token_ids[:i + 1]
                manager.rewind(request)
        elif event in ("free", "leave"):
            release(manager, request)
            if event == "leave":
                alive.remove(request)
            else: # preempted, and in again if there is room
                request.num_computed_tokens = manager.match(request)
                if not manager.allocate(request, request.num_tokens):
                    release(manager, request)
        manager.check(alive)
        for digest, block in manager._block_of.items():
            assert name_of(contents[block], size) == digest
    for request in alive:
        release(manager, request)
    manager.check([])
    assert manager.num_free == num_blocks and manager.usage == 0


# with a model

MODEL = load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32",
                   progress=False)


def make_engine(manager):
    tensors = PagedKVCache(MODEL.config, manager.num_blocks, manager.block_size)
    attention = GroupedAttention(tensors, MODEL.config.num_attention_heads)
    scheduler = Scheduler(manager, WholePrompts(), 8)
    return Engine(ModelRunner(Decoder(MODEL), attention), scheduler, self_check=True)


def run(engine, prompt, max_tokens=6, **options):
    "Serve one request alone."
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    request = engine.requests[engine.add_request(prompt, params, **options)]
    while engine.has_unfinished:
        engine.step()
    return request


def test_a_conversation_finds_its_history_and_gets_the_right_tokens():
    engine, history = make_engine(PrefixCachingBlockManager(32, 4)), []
    rng = random.Random(5)
    for _ in range(4):
        known = len(history)
        history += [rng.randrange(256) for _ in range(7)]
        request = run(engine, history)
        assert request.num_cached_tokens == max(0, known - 1) // 4 * 4
        assert request.output_ids == list(generate(MODEL, history, 6))
        history = list(request.token_ids)


def test_a_cache_full_of_old_contents_holds_any_new_request():
    engine, rng = make_engine(PrefixCachingBlockManager(8, 4)), random.Random(6)
    for _ in range(12):
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 27))]
        assert run(engine, prompt).output_ids == list(generate(MODEL, prompt, 6))
    cache = engine.scheduler.cache
    assert len(cache.cached_blocks) > 4 and cache.usage == 0


def test_a_manager_without_cache_keeps_nothing():
    engine = make_engine(BlockManager(32, 4))
    assert [run(engine, range(20)).num_cached_tokens for _ in range(2)] == [0, 0]
