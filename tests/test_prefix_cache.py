"Who finds which tokens, what is forgotten first, what is never shared; blocks and names stay consistent."

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.block_manager import BlockManager
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.model import load_model
from nanollm.paged_attention import PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager, block_hash, root_hash
from nanollm.request import Request
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler, WholePrompts


def make(ids, **options):
    return Request("r", list(ids), SamplingParams(), arrival_s=0.0, **options)


def compute(manager, request):
    "Pretend to compute all that the request knows."
    start, request.num_computed_tokens = request.num_computed_tokens, request.num_tokens
    manager.commit(request, start)


def arrive(manager, ids, **options):
    "Let a request in and pretend to compute it; None if there is no room."
    request = make(ids, **options)
    request.num_cached_tokens = request.num_computed_tokens = manager.match(request)
    if not manager.allocate(request, request.num_tokens):
        manager.free(request)
        return None
    compute(manager, request)
    manager.check()
    return request


def visit(manager, ids, **options):
    "Arrive, compute and leave; return how many tokens were found."
    request = arrive(manager, ids, **options)
    manager.free(request)
    manager.check()
    return request.num_cached_tokens


def found(manager, ids, **options):
    "How many tokens would be found; nothing changes but the order of the free list."
    request = make(ids, **options)
    num_tokens = manager.match(request)
    assert len(request.block_table) * manager.block_size == num_tokens
    manager.free(request)
    return num_tokens


def test_names_depend_on_all_that_comes_before():
    root = root_hash(None, "")
    name = block_hash(root, [1, 2, 3, 4])
    assert name == block_hash(root, (1, 2, 3, 4)) and len(name) == 32
    others = [block_hash(root, [1, 2, 3, 5]), block_hash(root, [4, 3, 2, 1]), block_hash(name, [1, 2, 3, 4]),
              block_hash(root_hash("a", ""), [1, 2, 3, 4]), block_hash(root_hash(None, "a"), [1, 2, 3, 4])]
    assert len({name, *others}) == 6
    assert block_hash(root, [1, 23]) != block_hash(root, [12, 3])


def test_roots_do_not_run_into_each_other():
    pairs = [(None, ""), ("", ""), ("None", ""), (None, "None"), ("a", "b"), ("ab", ""), (None, "ab"), ("a', 'b", ""),
             ("a", "', 'b")]
    assert len({root_hash(*pair) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("length, expected", [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 8), (40, 8)])
def test_only_full_blocks_and_never_the_last_token(length, expected):
    manager = PrefixCachingBlockManager(16, 4)
    visit(manager, range(11)) # two full blocks, and three tokens
    assert found(manager, range(length)) == expected


def test_the_chain_ends_at_the_first_difference():
    manager = PrefixCachingBlockManager(16, 4)
    visit(manager, range(16))
    assert found(manager, [*range(5), 99, *range(6, 16), 0]) == 4
    assert found(manager, [99, *range(1, 16), 0]) == 0
    assert found(manager, [*range(4, 16), 0]) == 0


def test_nothing_is_found_before_it_is_computed():
    manager, first = PrefixCachingBlockManager(16, 4), make(range(12))
    manager.match(first), manager.allocate(first, 12)
    assert found(manager, range(13)) == 0
    for end, expected in ((3, 0), (4, 4), (7, 4), (8, 8), (12, 12)): # a prompt in pieces
        start, first.num_computed_tokens = first.num_computed_tokens, end
        manager.commit(first, start)
        assert found(manager, range(13)) == expected
        manager.check()


def test_running_requests_share_and_count():
    manager = PrefixCachingBlockManager(16, 4)
    first, second = arrive(manager, range(9)), arrive(manager, range(9))
    assert second.block_table[:2] == first.block_table[:2] and second.block_table[2] != first.block_table[2]
    assert [manager.ref_counts[block] for block in first.block_table] == [2, 2, 1]
    manager.free(first)
    assert manager.cached_blocks == [] and manager.num_free == 13
    manager.free(second)
    assert manager.num_free == 16 and len(manager.cached_blocks) == 2


def test_generated_tokens_are_found_by_the_next_turn():
    manager = PrefixCachingBlockManager(16, 4)
    request = arrive(manager, range(6))
    for token_id in range(6, 13):
        request.append(token_id, 0.0)
        manager.allocate(request, request.num_tokens)
        start, request.num_computed_tokens = request.num_computed_tokens, request.num_tokens - 1
        manager.commit(request, start)
    manager.free(request)
    assert found(manager, range(30)) == 12


def test_drafts_are_never_named():
    manager = PrefixCachingBlockManager(16, 4)
    request = arrive(manager, range(6))
    request.append(6, 0.0)
    request.draft_ids = [97, 98, 99]
    manager.allocate(request, request.num_tokens + 3)
    request.num_computed_tokens, request.draft_ids = 7, [] # computed to 10, and none of the drafts was right
    manager.rewind(request)
    manager.commit(request, 6)
    assert found(manager, [*range(7), 97, 98]) == 4
    assert len(manager._hash_of) == 1


def test_the_longest_unused_is_forgotten_first_and_its_tail_before_its_head():
    manager = PrefixCachingBlockManager(6, 4)
    visit(manager, range(0, 8))
    visit(manager, range(100, 108))
    visit(manager, range(200, 208))
    assert visit(manager, range(0, 8)) == 4 # its last block is computed again
    assert visit(manager, range(300, 304)) == 0 # needs one block
    assert [found(manager, [*range(start, start + 8), 0]) for start in (0, 100, 200, 300)] == [8, 4, 8, 4]


def test_blocks_without_names_are_used_first():
    manager = PrefixCachingBlockManager(8, 4)
    visit(manager, range(10))
    free = list(manager._free)
    assert free[0] == 2 and free[-2:] == [1, 0] # partly filled; then those never used; then tail, head
    visit(manager, range(50, 70))
    assert found(manager, range(20)) == 8


def test_two_that_compute_the_same_leave_one_name():
    manager = PrefixCachingBlockManager(8, 4)
    requests = [make(range(9)) for _ in range(2)]
    for request in requests:
        assert manager.match(request) == 0 and manager.allocate(request, 9)
    for request in requests:
        compute(manager, request)
        manager.check()
    assert len(manager._block_of) == 2
    manager.free(requests[0])
    assert found(manager, range(9)) == 8
    manager.free(requests[1])
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
    for token_id in (7, 8, 9):
        request.append(token_id, 0.0)
    manager.allocate(request, 10)
    request.num_computed_tokens = 9
    manager.commit(request, 7)
    manager.free(request)
    assert manager.match(request) == 8 and request.block_table == [0, 1]


def test_adapter_and_salt_keep_apart():
    manager = PrefixCachingBlockManager(64, 4)
    keys = [{}, {"adapter": "a"}, {"cache_salt": "a"}, {"adapter": "a", "cache_salt": "a"}, {"adapter": "b"}]
    assert [visit(manager, range(9), **key) for key in keys] == [0] * 5
    assert [visit(manager, range(9), **key) for key in keys] == [8] * 5


def test_who_opts_out_finds_nothing_and_leaves_something():
    manager = PrefixCachingBlockManager(16, 4)
    assert visit(manager, range(9), use_prefix_cache=False) == 0
    assert visit(manager, range(9), use_prefix_cache=False) == 0
    assert found(manager, range(9)) == 8


def test_who_opts_out_still_shares_with_its_leader():
    manager = PrefixCachingBlockManager(16, 4)
    leader = arrive(manager, range(9), use_prefix_cache=False)
    assert arrive(manager, range(9), use_prefix_cache=False, index=1, leader=leader).num_cached_tokens == 8


def test_hashes_are_computed_once(monkeypatch):
    calls = []

    def spy(parent, token_ids):
        calls.append(parent)
        return block_hash(parent, token_ids)

    monkeypatch.setattr("nanollm.prefix_cache.block_hash", spy)
    manager = PrefixCachingBlockManager(16, 4)
    request = arrive(manager, range(17))
    for _ in range(3):
        manager.free(request)
        request.num_computed_tokens = manager.match(request)
        manager.allocate(request, 17)
        compute(manager, request)
    assert len(calls) == len(set(calls)) == 4


def test_reset_forgets_and_refuses_while_somebody_runs():
    manager = PrefixCachingBlockManager(16, 4)
    request = arrive(manager, range(9))
    with pytest.raises(RuntimeError, match="3 blocks are held by requests"):
        manager.reset()
    assert found(manager, range(9)) == 8
    manager.free(request)
    manager.reset()
    manager.check()
    assert found(manager, range(9)) == 0 and manager.cached_blocks == []
    assert visit(manager, range(9)) == 0 and visit(manager, range(9)) == 8


@pytest.mark.parametrize("damage", [
    lambda manager: manager._block_of.popitem(),
    lambda manager: manager._hash_of.update({5: b"x"}),
    lambda manager: manager._hash_of.update({0: b"x"}),
])
def test_check_notices_contradictions(damage):
    manager = PrefixCachingBlockManager(8, 4)
    visit(manager, range(9))
    damage(manager)
    with pytest.raises(RuntimeError, match="contradict each other"):
        manager.check()


def beginnings(manager, contents):
    "Every name leads to a block that holds just the tokens of which it is the name."
    for digest, block in manager._block_of.items():
        parent = root_hash(None, "")
        ids = contents[block]
        for i in range(0, len(ids), manager.block_size):
            parent = block_hash(parent, ids[i:i + manager.block_size])
        assert parent == digest


KINDS = ["arrive", "arrive", "step", "step", "step", "free", "leave"]
EVENTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 50), st.integers(0, 2**16)), max_size=80)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(4, 24), st.integers(1, 5), EVENTS)
def test_what_is_found_is_what_was_written(num_blocks, size, events):
    "A shadow of the memory: for every block the tokens up to its end, written as a forward pass would."
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
                manager.free(request)
        elif event == "step" and request.block_table and manager.allocate(request, request.num_tokens):
            start = request.num_computed_tokens
            request.num_computed_tokens = rng.randint(start, request.num_tokens)
            for i in range(start, request.num_computed_tokens):
                block = request.block_table[i // size]
                assert manager.ref_counts[block] == 1, "a shared block is written"
                contents[block] = request.token_ids[:i + 1]
            manager.commit(request, start)
            if request.gap == 0:
                request.append(rng.choice((1, 1, 2)), 0.0)
        elif event in ("free", "leave"):
            manager.free(request)
            request.num_computed_tokens = 0
            if event == "leave":
                alive.remove(request)
        manager.check()
        beginnings(manager, contents)
        tables = [block for other in alive for block in other.block_table]
        assert manager.ref_counts == [tables.count(block) for block in range(num_blocks)]
    for request in alive:
        manager.free(request)
    assert manager.num_free == num_blocks and manager.usage == 0


def engine(manager):
    model = load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False)
    cache = PagedKVCache(model.config, manager.num_blocks, manager.block_size)
    return Engine(ModelRunner(model, cache), Scheduler(manager, WholePrompts(), 8), self_check=True)


def run(engine, prompt, max_tokens=6, **options):
    "Serve one request alone."
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    [request] = engine.requests[engine.add_request(prompt, params, **options)]
    while engine.has_unfinished:
        engine.step()
    return request


def test_a_conversation_finds_its_history_and_gets_the_right_tokens():
    e, history, rng = engine(PrefixCachingBlockManager(32, 4)), [], random.Random(5)
    for _ in range(4):
        known = len(history)
        history += [rng.randrange(256) for _ in range(7)]
        request = run(e, history)
        assert request.num_cached_tokens == max(0, known - 1) // 4 * 4
        assert request.output_ids == list(generate(e.model, history, 6))
        history = list(request.token_ids)


def test_a_cache_full_of_old_contents_holds_any_new_request():
    e, rng = engine(PrefixCachingBlockManager(8, 4)), random.Random(6)
    for _ in range(12):
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 27))]
        assert run(e, prompt).output_ids == list(generate(e.model, prompt, 6))
    assert len(e.scheduler.cache.cached_blocks) > 4 and e.scheduler.cache.usage == 0


def test_manager_without_cache_keeps_nothing():
    e = engine(BlockManager(32, 4))
    assert [run(e, range(20)).num_cached_tokens for _ in range(2)] == [0, 0]
