"Blocks are conserved whatever happens; refusals change nothing; answers share full prompt blocks and no others."

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.block_manager import BlockManager
from nanollm.request import FinishReason, Request
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler, WholePrompts


def make(num_tokens=6, request_id="r", **options):
    options = {"params": SamplingParams(max_tokens=8), "arrival_s": 0.0} | options
    return Request(request_id, range(num_tokens), **options)


def computed(manager, request):
    "Give a request room for all its tokens and pretend to compute them."
    request.num_computed_tokens = manager.match(request)
    assert manager.allocate(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    return request


def verify(manager, alive):
    "The counts are those of the tables, and every other block is free, once."
    tables = [block for request in alive for block in request.block_table]
    assert manager.ref_counts == [tables.count(block) for block in range(manager.num_blocks)]
    assert set(manager._free) == set(range(manager.num_blocks)) - set(tables)
    assert manager.num_free == manager.num_blocks - len(set(tables))
    assert manager.usage == pytest.approx(len(set(tables)) / manager.num_blocks)
    manager.check()


KINDS = ["arrive", "grow", "grow", "grow", "answer", "draft", "rewind", "free", "leave"]
EVENTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 30), st.integers(1, 40)), max_size=80)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 9), EVENTS)
def test_blocks_are_conserved(num_blocks, block_size, events):
    manager, alive = BlockManager(num_blocks, block_size), []
    for event, which, amount in events:
        request = alive[which % len(alive)] if alive else None
        if event == "arrive" or request is None:
            alive.append(make(amount))
        elif event == "grow":
            before = list(request.block_table), manager.num_free
            room = manager.allocate(request, amount)
            assert room == (max(0, -(-amount // block_size) - len(before[0])) <= before[1])
            assert room or before == (request.block_table, manager.num_free)
            if room:
                assert len(request.block_table) == max(len(before[0]), -(-amount // block_size))
                request.num_computed_tokens = max(request.num_computed_tokens, min(amount, request.num_tokens))
        elif event == "answer":
            other = make(request.num_prompt_tokens, index=1, leader=request)
            shared = manager.match(other)
            assert shared % block_size == 0 and shared < request.num_prompt_tokens
            assert shared <= request.num_computed_tokens
            assert other.block_table == request.block_table[:shared // block_size]
            alive.append(other)
        elif event == "draft":
            manager.allocate(request, request.num_tokens + amount)
        elif event == "rewind":
            manager.rewind(request)
            assert len(request.block_table) * block_size < request.num_tokens + block_size
        else:
            manager.free(request)
            assert not request.block_table
            request.num_computed_tokens = 0
            if event == "leave":
                alive.remove(request)
        verify(manager, alive)
    for request in alive:
        manager.free(request)
    verify(manager, [])
    assert manager.num_free == num_blocks and manager.usage == 0


def test_room_for_fewer_tokens_is_room():
    manager, request = BlockManager(4, 4), make()
    assert manager.allocate(request, 6) and request.block_table == [0, 1]
    assert manager.allocate(request, 6) and manager.allocate(request, 1) and manager.allocate(request, 8)
    assert request.block_table == [0, 1]
    assert manager.allocate(request, 9) and request.block_table == [0, 1, 2]


def test_refusal_changes_nothing():
    manager, first, second = BlockManager(4, 4), make(), make(5)
    assert manager.allocate(first, 12) and manager.allocate(second, 4)
    assert not manager.allocate(second, 5)
    assert second.block_table == [3] and manager.num_free == 0 and manager.usage == 1
    manager.free(first)
    assert manager.allocate(second, 5)
    verify(manager, [second])


def test_blocks_come_back_tail_first_and_are_used_in_the_order_they_came_back():
    manager, first, second = BlockManager(6, 2), make(), make()
    manager.allocate(first, 6)
    manager.allocate(second, 4)
    manager.free(first)
    manager.free(second)
    assert list(manager._free) == [5, 2, 1, 0, 4, 3]
    third = make()
    manager.allocate(third, 8)
    assert third.block_table == [5, 2, 1, 0]


def test_freeing_twice_is_harmless():
    manager, request = BlockManager(4, 4), make()
    manager.allocate(request, 8)
    for _ in range(2):
        manager.free(request)
        assert manager.num_free == 4
        manager.check()


def test_rewind_gives_back_what_only_drafts_needed():
    manager, request = BlockManager(8, 4), make(6)
    manager.allocate(request, 6 + 8)
    manager.rewind(request)
    assert request.block_table == [0, 1] and manager.num_free == 6
    manager.rewind(request)
    assert request.block_table == [0, 1]


@pytest.mark.parametrize("prompt, num_computed, shared", [
    (10, 10, 8), # the third block is partly filled, and the leader will write into it
    (8, 8, 4), # one token is left to be computed
    (9, 9, 8),
    (10, 7, 4), # the leader has not come further
    (10, 0, 0), # it was preempted, or is not admitted yet
    (3, 3, 0),
])
def test_answers_share_the_full_prompt_blocks_that_are_computed(prompt, num_computed, shared):
    manager, leader = BlockManager(12, 4), make(prompt)
    manager.allocate(leader, prompt)
    leader.num_computed_tokens = num_computed
    other = make(prompt, index=1, leader=leader)
    assert manager.match(other) == shared
    assert other.block_table == leader.block_table[:shared // 4]
    assert manager.allocate(other, prompt)
    assert not set(other.block_table[shared // 4:]) & set(leader.block_table)
    verify(manager, [leader, other])


def test_an_answer_never_shares_what_the_leader_made_itself():
    manager, leader = BlockManager(12, 2), make(4)
    computed(manager, leader)
    for token_id in (7, 8, 9):
        leader.append(token_id, 0.0)
    manager.allocate(leader, 7)
    leader.num_computed_tokens = 6
    other = make(4, index=1, leader=leader)
    other.append(5, 0.0) # preempted after an output token of its own
    assert manager.match(other) == 2


def test_shared_blocks_stay_until_the_last_holder_leaves():
    manager = BlockManager(12, 4)
    leader = computed(manager, make(10))
    others = [computed(manager, make(10, index=i, leader=leader)) for i in (1, 2)]
    assert manager.ref_counts[:5] == [3, 3, 1, 1, 1]
    free = []
    for request in (others[0], leader, others[1]):
        manager.free(request)
        free.append(manager.num_free)
        manager.check()
    assert free == [8, 9, 12]


def test_a_leader_that_has_left_shares_nothing():
    manager = BlockManager(12, 4)
    leader = computed(manager, make(10))
    leader.finish(FinishReason.LENGTH, 0.0)
    manager.free(leader)
    leader.num_computed_tokens = 0 # as the scheduler does
    assert manager.match(make(10, index=1, leader=leader)) == 0


def test_without_a_leader_nothing_matches():
    manager = BlockManager(12, 4)
    computed(manager, make(10))
    other = make(10)
    assert manager.match(other) == 0 and other.block_table == []


@pytest.mark.parametrize("num_blocks, block_size", [(0, 4), (4, 0), (-1, 4)])
def test_refuses_a_memory_of_nothing(num_blocks, block_size):
    with pytest.raises(ValueError, match=f"must be at least 1, got {num_blocks} and {block_size}"):
        BlockManager(num_blocks, block_size)


def lose(manager): manager._free.popitem()
def leak(manager): manager.ref_counts[manager.num_blocks - 1] += 1
def free_twice(manager): manager.ref_counts[0] -= 1


@pytest.mark.parametrize("damage", [lose, leak, free_twice])
def test_check_notices(damage):
    manager = BlockManager(4, 4)
    manager.allocate(make(), 4)
    manager.free(request := make()) or manager.allocate(request, 4)
    manager.check()
    damage(manager)
    with pytest.raises(RuntimeError, match="they do not add up"):
        manager.check()


def play(manager, lens, max_num_seqs=8):
    "Run requests of so many prompt and output tokens with a forward that only counts; return preemptions."
    scheduler = Scheduler(manager, WholePrompts(), max_num_seqs, 64)
    requests = [make(s, f"{i:02}", params=SamplingParams(max_tokens=n)) for i, (s, n) in enumerate(lens)]
    for request in requests:
        scheduler.add(request)
    for _ in range(5000):
        plan = scheduler.schedule()
        for request, n in plan.batch.items():
            start, request.num_computed_tokens = request.num_computed_tokens, request.num_computed_tokens + n
            assert len(request.block_table) * manager.block_size >= request.num_computed_tokens
            request.append(0, 0.0)
            manager.rewind(request)
            manager.commit(request, start)
        for request in [r for r in plan.batch if r.finished]:
            scheduler.finish(request)
        verify(manager, requests)
        if all(request.finished for request in requests):
            break
    assert [len(request.output_ids) for request in requests] == [n for _, n in lens]
    assert manager.num_free == manager.num_blocks
    return sum(request.num_preemptions for request in requests)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(0, 4),
       st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=10))
def test_every_load_ends_in_a_memory_in_which_its_longest_request_just_fits(block_size, extra, lens):
    longest = max(s + n - 1 for s, n in lens)
    play(BlockManager(-(-longest // block_size) + extra, block_size), lens)


def test_growing_requests_preempt_and_slots_do_not():
    lens = [(10, 12)] * 8
    assert play(BlockManager(16, 4), lens) > 0
    assert play(BlockManager(3, 21), lens) == 0


def test_a_slot_per_request_is_one_block_each():
    manager = BlockManager(3, 64)
    requests = [make(n) for n in (1, 33, 64)]
    assert manager.max_tokens == 192
    assert all(manager.allocate(request, request.num_tokens) for request in requests)
    assert [request.block_table for request in requests] == [[0], [1], [2]]
    assert all(manager.allocate(request, 64) for request in requests)
    assert not manager.allocate(make(), 1)
