"""Choosing among replicas: edges, balance, and a map that stays true and small."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.routing import POLICIES, LeastLoaded, PrefixAware, RoundRobin, prefix_digests

POLICY = pytest.mark.parametrize("name", sorted(POLICIES))


# -- names of beginnings


@given(st.text(max_size=400), st.text(max_size=400), st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_equal_names_are_equal_beginnings(a, b, size):
    for i, (one, other) in enumerate(zip(prefix_digests(a, size=size),
                                         prefix_digests(b, size=size)), 1):
        assert (one == other) == (a[:i * size] == b[:i * size])


def test_only_full_chunks_have_names_and_only_so_many():
    assert prefix_digests("") == prefix_digests("x" * 63) == []
    assert len(prefix_digests("x" * 64)) == len(prefix_digests("x" * 127)) == 1
    assert len(prefix_digests("x" * 10**6)) == 256
    assert len(prefix_digests("x" * 100, size=10, most=3)) == 3
    assert len(set(prefix_digests("x" * 1000))) == 15, "equal chunks at other places differ"


def test_root_keeps_tenants_apart():
    text = "x" * 640
    assert prefix_digests(text, "a") == prefix_digests(text, "a")
    assert not set(prefix_digests(text, "a")) & set(prefix_digests(text, "b"))
    assert not set(prefix_digests(text, "a")) & set(prefix_digests(text))


def test_half_of_a_surrogate_pair_is_text_too():
    text = "\ud800" * 64
    assert len(prefix_digests(text, "\udfff")) == 1
    assert prefix_digests(text) != prefix_digests("\ud801" * 64)


# -- all policies


@POLICY
def test_nobody_to_choose(name):
    with pytest.raises(ValueError, match="no replica"):
        POLICIES[name]().choose({}, [b"x"])


@POLICY
def test_only_those_with_a_load_are_chosen(name):
    policy = POLICIES[name]()
    digests = prefix_digests("x" * 640)
    for gone in "ABCD":
        policy.note(gone, digests)
        loads = {replica: 0 for replica in "ABCD" if replica != gone}
        assert all(policy.choose(loads, digests) in loads for _ in range(20))


@POLICY
def test_same_seed_same_choices(name):
    def choices(seed):
        policy, loads = POLICIES[name](seed=seed), Counter(A=0, B=0, C=0)
        for i in range(100):
            replica = policy.choose(loads, digests := prefix_digests(f"{i % 7}" * 100))
            policy.note(replica, digests)
            loads[replica] += 1
            yield replica
    assert list(choices(1)) == list(choices(1))


@POLICY
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9), st.booleans()),
                max_size=60))
@settings(max_examples=50, deadline=None)
def test_any_history_leads_to_a_replica_that_is_there(name, history):
    policy, loads = POLICIES[name](), dict.fromkeys("ABC", 0.0)
    for text, number, dies in history:
        replica = policy.choose(loads, digests := prefix_digests(text * 64 * number))
        assert replica in loads
        policy.note(replica, digests)
        loads[replica] += 1
        if dies and len(loads) > 1:
            policy.forget(replica)
            del loads[replica]
            loads[replica + "'"] = 0


# -- in turn


def test_round_robin_is_fair_while_replicas_come_and_go():
    policy = RoundRobin()
    assert "".join(policy.choose(dict.fromkeys("BAC", 9), ()) for _ in range(4)) == "ABCA"
    assert policy.choose({"B": 0, "D": 0}, ()) == "B"
    assert policy.choose({"A": 0, "D": 0}, ()) == "D"
    assert policy.choose({"A": 0, "D": 0}, ()) == "A"
    assert policy.choose({"A": 0}, ()) == "A"


# -- by load


def test_least_loaded_draws_among_equals():
    found = Counter(LeastLoaded(seed).choose(dict(A=1, B=0, C=0, D=0.5), ())
                    for seed in range(300))
    assert set(found) == {"B", "C"} and min(found.values()) > 100


def test_least_loaded_evens_out():
    policy, loads = LeastLoaded(), Counter(A=0, B=5, C=2)
    for _ in range(20):
        loads[policy.choose(loads, ())] += 1
    assert set(loads.values()) == {9}


# -- by prefix


def read(policy, **texts):
    for replica, text in texts.items():
        policy.note(replica, prefix_digests(text))


def test_longest_beginning_wins():
    policy = PrefixAware()
    read(policy, A="s" * 640, B="s" * 64 + "t" * 320)
    loads = dict(A=5, B=5, C=0)
    assert policy.choose(loads, prefix_digests("s" * 1000)) == "A"
    assert policy.choose(loads, prefix_digests("s" * 64 + "t" * 64)) == "B"


def test_of_those_who_have_read_most_the_least_loaded_is_chosen():
    policy, digests = PrefixAware(), prefix_digests("s" * 64 + "u" * 640)
    read(policy, A="s" * 640, B="s" * 64 + "t" * 320)
    assert policy.choose(dict(A=5, B=4, C=0), digests) == "B"
    assert policy.choose(dict(A=4, B=5, C=0), digests) == "A"
    found = Counter(policy.choose(dict(A=4, B=4, C=0), digests) for _ in range(200))
    assert set(found) == {"A", "B"} and min(found.values()) > 50
    assert policy.choose(dict(A=40, B=8, C=0), digests) == "B", "the guard looks at the best"


@pytest.mark.parametrize("text", ["", "short", "u" * 640])
def test_unknown_goes_to_the_least_loaded(text):
    policy = PrefixAware()
    read(policy, A="s" * 640)
    assert policy.choose(dict(A=0, B=0, C=-1), prefix_digests(text)) == "C"


@pytest.mark.parametrize("load, least, stays", [
    (8, 0, True), (9, 0, False),  # 8 more, and any number of times
    (24, 16, True), (25, 16, False),  # 8 more is half as much again
    (150, 100, True), (151, 100, False),  # half as much again
    (108, 100, True), (20, 11, False)])
def test_guard(load, least, stays):
    policy = PrefixAware()
    read(policy, A="s" * 640)
    chosen = policy.choose(dict(A=load, B=least, C=least + 1), prefix_digests("s" * 640))
    assert chosen == ("A" if stays else "B")


def test_guard_can_be_set():
    policy = PrefixAware(slack=0, factor=1)
    read(policy, A="s" * 640)
    assert policy.choose(dict(A=1, B=0), prefix_digests("s" * 640)) == "B"
    policy = PrefixAware(slack=float("inf"))
    read(policy, A="s" * 640)
    assert policy.choose(dict(A=10**6, B=0), prefix_digests("s" * 640)) == "A"


def test_one_prefix_for_all_is_spread_by_the_guard():
    policy, loads = PrefixAware(), Counter(dict.fromkeys("ABCD", 0))
    digests = prefix_digests("s" * 640)
    for _ in range(400):
        replica = policy.choose(loads, digests)
        policy.note(replica, digests)
        loads[replica] += 1
    assert max(loads.values()) <= max(min(loads.values()) + 9, 1.5 * min(loads.values()) + 1)


def test_who_takes_it_over_has_read_it_too():
    policy = PrefixAware()
    digests = prefix_digests("s" * 640)
    policy.note("A", digests)
    policy.note(policy.choose(dict(A=50, B=0, C=0.5), digests), digests)
    assert policy.choose(dict(A=7, B=6, C=0), digests) == "B"
    assert policy.choose(dict(A=6, B=7, C=0), digests) == "A"


def test_forgetting_a_replica_leaves_what_others_have_read():
    policy = PrefixAware()
    read(policy, A="s" * 640, B="s" * 64)
    policy.forget("A")
    policy.forget("nobody")
    assert policy.choose(dict(A=0, B=7), prefix_digests("s" * 640)) == "B"
    policy.forget("B")
    assert not policy._readers


def test_the_map_is_bounded_and_forgets_the_oldest_and_longest():
    policy = PrefixAware(max_digests=10)
    read(policy, A="a" * 64 * 8)
    read(policy, B="b" * 64 * 6)
    assert len(policy._readers) == 10
    known = [digest in policy._readers for digest in prefix_digests("a" * 64 * 8)]
    assert known == [True] * 4 + [False] * 4
    read(policy, A="a" * 64 * 4)  # used again: now the other one is older
    read(policy, C="c" * 64 * 2)
    known = [digest in policy._readers for digest in prefix_digests("b" * 64 * 6)]
    assert known == [True] * 4 + [False] * 2
    read(policy, C="d" * 64 * 30)
    assert len(policy._readers) == 10
