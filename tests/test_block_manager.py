"""Blocks are conserved, refusals change nothing, and a check finds what is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.block_manager import BlockManager
from nanollm.request import Request, RequestStatus
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler, WholePrompts


def make(num_tokens=6, request_id="r", max_tokens=8):
    params = SamplingParams(max_tokens=max_tokens)
    return Request(request_id, range(num_tokens), params, arrival_s=0.0)


def verify(manager, alive):
    "The counts are those of the tables, and every other block is free, once."
    tables = [block for request in alive for block in request.block_table]
    assert manager.ref_counts == [tables.count(block) for block in range(manager.num_blocks)]
    assert set(manager._free) == set(range(manager.num_blocks)) - set(tables)
    assert manager.num_free == manager.num_blocks - len(set(tables))
    assert manager.usage == pytest.approx(len(set(tables)) / manager.num_blocks)
    manager.check(alive)


KINDS = ["arrive", "grow", "grow", "grow", "draft", "rewind", "free", "leave"]
EVENTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 30), st.integers(1, 40)),
                  max_size=80)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 9), EVENTS)
def test_blocks_are_conserved(num_blocks, block_size, events):
    manager, alive = BlockManager(num_blocks, block_size), []
    for event, which, amount in events:
        request = alive[which % len(alive)] if alive else None
        if event == "arrive" or request is None:
            alive.append(make(amount))
            assert manager.match(alive[-1]) == 0 and alive[-1].block_table == []
        elif event == "grow":
            before = list(request.block_table), manager.num_free
            room = manager.allocate(request, amount)
            lacks = max(0, -(-amount // block_size) - len(before[0]))
            assert room == (lacks <= before[1])
            assert room or before == (request.block_table, manager.num_free)
            if room:
                assert len(request.block_table) == len(before[0]) + lacks
                assert request.block_table[:len(before[0])] == before[0]
                manager.commit(request, min(amount, request.num_tokens))
        elif event == "draft":
            manager.allocate(request, request.num_tokens + amount)
        elif event == "rewind":
            manager.rewind(request)
            assert len(request.block_table) * block_size < request.num_tokens + block_size
        else:
            manager.free(request)
            assert not request.block_table
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
    for num_tokens in 6, 1, 8, 0:
        assert manager.allocate(request, num_tokens) and request.block_table == [0, 1]
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
        manager.check([request])


def test_rewind_gives_back_what_only_drafts_needed():
    manager, request = BlockManager(8, 4), make(6)
    manager.allocate(request, 6 + 8)
    for _ in range(2):
        manager.rewind(request)
        assert request.block_table == [0, 1] and manager.num_free == 6


def test_a_block_of_two_holders_stays_until_the_last_leaves():
    "As a prefix cache shares them."
    manager, first, second = BlockManager(4, 4), make(), make()
    manager.allocate(first, 8)
    for block in first.block_table:
        manager.ref_counts[block] += 1
        second.block_table.append(block)
    manager.allocate(second, 9)
    verify(manager, [first, second])
    assert manager.usage == 0.75
    manager.free(first)
    verify(manager, [second])
    assert manager.num_free == 1
    manager.free(second)
    verify(manager, [])


@pytest.mark.parametrize("num_blocks, block_size", [(0, 4), (4, 0), (-1, 4)])
def test_refuses_a_memory_of_nothing(num_blocks, block_size):
    with pytest.raises(ValueError, match=f"at least 1, got {num_blocks} and {block_size}"):
        BlockManager(num_blocks, block_size)


def forget(manager, requests): requests.pop()
def lose(manager, requests): manager._free.popitem()
def leak(manager, requests): manager.ref_counts[3] += 1
def free_twice(manager, requests): manager.ref_counts[0] -= 1
def hand_out_twice(manager, requests): manager._free[0] = None
def cut(manager, requests): requests[0].block_table.pop()
def share_without_count(manager, requests): requests[0].block_table.append(1)


@pytest.mark.parametrize("damage, message", [
    (forget, "block 1 is counted 1 times, stands in 0 block tables and is not free"),
    (lose, "block 3 is counted 0 times, stands in 0 block tables and is not free"),
    (leak, "block 3 is counted 1 times, stands in 0 block tables and is free"),
    (free_twice, "block 0 is counted 0 times, stands in 1 block tables and is not free"),
    (hand_out_twice, "block 0 is counted 1 times, stands in 1 block tables and is free"),
    (cut, "block 0 is counted 1 times, stands in 0 block tables and is not free"),
    (share_without_count, "block 1 is counted 1 times, stands in 2 block tables"),
])
def test_check_notices(damage, message):
    manager, requests = BlockManager(4, 4), [make(), make()]
    for request in requests:
        manager.allocate(request, 4)
    manager.check(requests)
    damage(manager, requests)
    with pytest.raises(RuntimeError, match=message):
        manager.check(requests)


def play(manager, lens, max_num_seqs=8):
    "Run requests of so many prompt and output tokens without a model; return preemptions."
    scheduler = Scheduler(manager, WholePrompts(), max_num_seqs, 64)
    requests = [make(s, f"{i:02}", n) for i, (s, n) in enumerate(lens)]
    for request in requests:
        scheduler.add(request)
    for _ in range(5000):
        batch = scheduler.schedule().batch
        assert batch, "no progress"
        for request, n in batch.items():
            request.num_computed_tokens += n
            assert len(request.block_table) * manager.block_size >= request.num_computed_tokens
            request.append(0, 0.0)
            manager.rewind(request)
            if request.finished:
                scheduler.finish(request)
        verify(manager, requests)
        if all(request.finished for request in requests):
            break
    assert [len(request.output_ids) for request in requests] == [n for _, n in lens]
    assert manager.num_free == manager.num_blocks
    return sum(request.num_preemptions for request in requests)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 8), st.integers(0, 4),
       st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=10))
def test_every_load_ends_in_a_memory_in_which_its_longest_request_just_fits(
        block_size, extra, lens):
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


def test_who_is_preempted_gives_all_back_and_may_take_it_again():
    manager = BlockManager(6, 4)
    scheduler = Scheduler(manager, WholePrompts(), 2, 64)
    requests = [make(12, "0"), make(12, "1")]
    for request in requests:
        scheduler.add(request)
    batch = scheduler.schedule().batch
    assert [*batch.values()] == [12, 12] and manager.num_free == 0
    for request in requests:
        request.num_computed_tokens = 12
        request.append(0, 0.0)
    plan = scheduler.schedule()
    first, second = requests
    assert plan.batch == {first: 1} and plan.preempted == [second]
    assert second.status is RequestStatus.WAITING and second.num_computed_tokens == 0
    assert second.block_table == [] and len(first.block_table) == 4
    manager.check(requests)
