"""Attention in C equals the reference: shapes, dtypes, drafts, chunks, shared prefixes, NaN.

It has three ways, and each has to be right for every request: the walk block by block, packed
tiles, and the gather in torch.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from nanollm import chunk_attention, streamed_attention
from nanollm.attention_kernel import MAX_ROWS, compile_attention
from nanollm.chunk_attention import (
    ITEM_LINES,
    TILE,
    ChunkAttention,
    compile_chunks,
    plan_rounds,
    tile_names,
)
from nanollm.compatibility import trial_batch
from nanollm.native import FLAGS, NativeError
from nanollm.paged_attention import GroupedAttention, PagedKVCache, ReferenceAttention
from nanollm.quantized_cache import make_kv_cache
from nanollm.streamed_attention import (
    MIN_SHARED,
    MIN_SHARERS,
    StreamedAttention,
    make_plan,
    places,
    plan_requests,
    share,
    streamed,
)

torch.set_num_threads(2)
FP32, BF16 = torch.float32, torch.bfloat16


def make_cache(H, K, D, P, num_blocks, dtype=FP32, kind="auto", num_layers=1):
    config = AutoConfig.for_model(
        "llama", hidden_size=H * 16, num_attention_heads=H, num_key_value_heads=K,
        num_hidden_layers=num_layers, vocab_size=320)
    config.head_dim = D # an odd one, too, which RoPE could not have
    cache = make_kv_cache(config, num_blocks, P, dtype, kind=kind)
    for layer in range(num_layers):
        cache.write(layer, torch.arange(num_blocks * P),
                    *torch.randn(2, num_blocks * P, K, D).to(dtype))
    return cache


def make_batch(rng, P, lens, news, num_shared=0):
    first = list(range(num_shared))
    rest = list(range(num_shared, num_shared + sum(-(-n // P) for n in lens)))
    rng.shuffle(rest)
    tables = [first + [rest.pop() for _ in range(-(-n // P) - num_shared)] for n in lens]
    parts = [(n - new, n) for n, new in zip(lens, news)]
    return trial_batch([[0] * n for n in lens], tables, parts, P)


def use(cache, H, way, flags=FLAGS, few=1):
    "An attention that goes one way for all requests of more than `few` new tokens."
    if way == "tiles":
        return ChunkAttention(cache, H, flags) # decodes, too
    attention = StreamedAttention(cache, H, flags)
    attention.few = {"stream": MAX_ROWS, "mixed": few, "gather": few}[way]
    attention.chunks = None if way == "gather" else attention.chunks
    return attention


def compare(cache, H, batch, way="stream", num_threads=2, flags=FLAGS, few=1):
    "Compare with the reference in float32, over what the cache hands out."
    dtype, D = cache.dtype, cache.read(0, torch.tensor([0])).shape[-1]
    query = torch.randn(len(batch.token_ids), H, D).to(dtype)
    attention = use(cache, H, way, flags, few)
    torch.set_num_threads(num_threads)
    attention.prepare(batch)
    out = attention.attend(query, 0, D ** -0.5)
    torch.set_num_threads(2)

    exact = ReferenceAttention(cache, H)
    exact.prepare(batch)
    cache.read = lambda layer, ids: type(cache).read(cache, layer, ids).float()
    wanted = exact.attend(query.float(), 0, D ** -0.5)
    del cache.read # the method of its class again
    assert out.shape == query.shape and out.is_contiguous() and out.dtype == dtype
    tolerance = 2e-5 if dtype == FP32 else 2e-2
    torch.testing.assert_close(out.float(), wanted, atol=tolerance, rtol=tolerance)


WAYS = ["stream", "tiles", "mixed", "gather"]
SHAPES = [(9, 3, 64, 16), (8, 8, 20, 8), (8, 1, 6, 64), (4, 2, 128, 32), (6, 2, 80, 20),
          (5, 1, 34, 1), (14, 2, 16, 5)]


by_way = pytest.mark.parametrize("way", WAYS)
by_dtype = pytest.mark.parametrize("dtype", [FP32, BF16])


@by_dtype
@pytest.mark.parametrize("H, K, D, P", SHAPES)
def test_ragged_decodes_drafts_and_chunks_equal_the_reference(H, K, D, P, dtype):
    torch.manual_seed(0)
    rng = random.Random(H * D)
    lens = [1, P, P + 1, 3 * P - 1, 130, 201, 77, 64]
    news = [1, 1, min(2, P), 1, 8, 1, 40, 3]
    batch = make_batch(rng, P, lens, news)
    cache = make_cache(H, K, D, P, sum(-(-n // P) for n in lens), dtype)
    for way in WAYS:
        compare(cache, H, batch, way)
        compare(cache, H, batch, way, num_threads=1)


@by_dtype
@pytest.mark.parametrize("G", range(1, 9))
def test_any_number_of_query_heads_shares_a_kv_head(G, dtype):
    torch.manual_seed(G)
    batch = make_batch(random.Random(G), 16, [50, 3, 16, 130], [1, 3, 5, 100])
    for way in WAYS:
        compare(make_cache(2 * G, 2, 32, 16, 15, dtype), 2 * G, batch, way)


@by_dtype
def test_more_heads_than_an_item_has_lines(dtype):
    torch.manual_seed(0)
    H = ITEM_LINES + 5
    batch = make_batch(random.Random(0), 16, [70, 3], [9, 2])
    compare(make_cache(H, 1, 8, 16, 6, dtype), H, batch, "tiles")


@pytest.mark.parametrize("n", range(2, 9))
def test_drafts_see_what_is_before_them_and_nothing_else(n):
    torch.manual_seed(n)
    batch = make_batch(random.Random(n), 8, [n, 40, 8 + n], [n, n, n])
    for way in WAYS:
        compare(make_cache(4, 2, 16, 8, 16), 4, batch, way)


@pytest.mark.parametrize("way", ["tiles", "mixed", "gather"])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 500, 4096])
def test_prompts_of_any_length(length, way):
    torch.manual_seed(0)
    batch = make_batch(random.Random(0), 16, [length, 20], [length, 1])
    compare(make_cache(2, 1, 16, 16, -(-length // 16) + 2), 2, batch, way)


@by_dtype
@pytest.mark.parametrize("D", [1, 2, 17, 31, 66, 256])
def test_odd_sizes_of_heads(D, dtype):
    torch.manual_seed(D)
    batch = make_batch(random.Random(D), 8, [1, 40, 75], [1, 3, 70])
    compare(make_cache(3, 1, D, 8, 16, dtype), 3, batch, "tiles")


@by_dtype
@pytest.mark.parametrize("P", [3, 48, 100])
def test_any_size_of_blocks(P, dtype):
    torch.manual_seed(P)
    lens, news = [P, 2 * P + 1, 150, 64], [P, 2, 120, 64]
    num_blocks = sum(-(-n // P) for n in lens)
    batch = make_batch(random.Random(P), P, lens, news)
    compare(make_cache(4, 2, 16, P, num_blocks, dtype), 4, batch, "tiles")


def test_random_batches():
    rng = random.Random(7)
    cache = make_cache(6, 2, 24, 16, 300)
    for seed in range(25):
        torch.manual_seed(seed)
        lens = [rng.choice([1, 7, 16, 33, 100, 400]) for _ in range(rng.randint(1, 9))]
        news = [rng.randint(1, min(n, rng.choice([1, 1, 8, 60]))) for n in lens]
        compare(cache, 6, make_batch(rng, 16, lens, news), rng.choice(WAYS),
                num_threads=rng.choice([1, 2]), few=rng.choice([1, 4, 32]))


@by_dtype
@pytest.mark.parametrize("count, news", [(8, [1] * 8), (20, [1] * 20), (9, [1, 2, 3] * 3),
                                         (10, [20] * 10)])
def test_a_shared_prefix_is_read_once_and_changes_nothing(count, news, dtype):
    torch.manual_seed(0)
    rng = random.Random(0)
    lens = [96 + rng.randint(new, 60) for new in news]
    batch = make_batch(rng, 16, lens, news, num_shared=6)
    cache = make_cache(6, 2, 32, 16, 200, dtype)
    compare(cache, 6, batch)
    members, used = np.arange(count), sum(-(-n // 16) for n in lens)
    plans = [plan_requests(batch, members, 16, sharers)[0] for sharers in (MIN_SHARERS, 10**9)]
    items = [plan[5:plan[2]].reshape(-1, 5) for plan in plans]
    assert items[1][:, 1].sum() == used
    assert items[0][:, 1].sum() == used - 6 * (count + -sum(news) // MAX_ROWS)


# tiles

def test_names_of_tiles():
    assert list(tile_names([7, 3, 9, 4, 5], 70, 16)) == [(0, 64, 7, 3, 9, 4), (0, 6, 5)]
    assert list(tile_names([7, 3, 9, 4, 5], 64, 16)) == [(0, 64, 7, 3, 9, 4)]
    assert list(tile_names([7, 3, 9, 4], 70, 20)) == [(0, 64, 7, 3, 9, 4), (4, 6, 4)]
    assert list(tile_names([7, 3], 130, 100)) == [(0, 64, 7), (64, 64, 7, 3), (28, 2, 3)]
    assert list(tile_names([7, 3], 1, 100)) == [(0, 1, 7)]


@pytest.mark.parametrize("P, num_shared", [(16, 8), (16, 7), (20, 5), (5, 13), (64, 2)])
def test_what_requests_share_is_packed_once(P, num_shared):
    torch.manual_seed(0)
    lens = [P * num_shared + n for n in (40, 3, 90, 40)]
    batch = make_batch(random.Random(0), P, lens, [40, 3, 90, 2], num_shared)
    [found] = plan_rounds(batch, [0, 1, 2, 3], P, tokens=16, max_tiles=10**9)
    assert len(found.order) == sum(-(-n // TILE) for n in lens)
    assert len(found.tiles) == len(found.order) - 3 * (P * num_shared // TILE)
    num_blocks = num_shared + sum(-(-n // P) for n in lens)
    compare(make_cache(4, 2, 32, P, num_blocks, BF16), 4, batch, "tiles")


def test_rounds_have_a_limit_and_every_token_is_in_one(monkeypatch):
    rng = random.Random(0)
    lens = [700, 30, 30, 200, 65, 1, 300]
    batch = make_batch(rng, 16, lens, [300, 30, 5, 1, 65, 1, 128])
    counts = []
    for max_tiles in (1, 3, 6, 100):
        rounds = plan_rounds(batch, [0, 1, 2, 4, 5, 6], 16, 32, max_tiles)
        counts.append(len(rounds))
        items = [item for each in rounds for item in each.items]
        tokens = sorted(place + i for place, num, *_ in items for i in range(num))
        assert tokens == [i for i in range(sum(batch.query_lens)) if i != 335]
        for each in rounds:
            assert len(each.tiles) <= max(max_tiles, 11) # 11: of the longest alone
            for _, num, seen, first in each.items:
                assert len(each.order) >= first + -(-(seen + num - 1) // TILE)
    assert counts == [6, 4, 3, 1] and plan_rounds(batch, [], 16, 32, 6) == []

    monkeypatch.setattr(chunk_attention, "ROUND_BYTES", 2**16)
    for way in ("tiles", "mixed"):
        compare(make_cache(4, 2, 64, 16, 90), 4, batch, way)
    attention = ChunkAttention(make_cache(4, 2, 64, 16, 90), 4)
    attention.prepare(batch)
    assert len(attention.plans) == 7 and attention.scratch.nbytes == 11 * attention.tile_bytes


def test_the_largest_items_come_first():
    batch = make_batch(random.Random(0), 16, [40, 500], [40, 100])
    [found] = plan_rounds(batch, [0, 1], 16, 32, 10**9)
    plan = found.plan()
    assert plan.dtype == np.int32 and plan[:2].tolist() == [len(found.tiles), 6]
    items = plan[plan[2]:plan[3]].reshape(-1, 4)
    work = (items[:, 1] * items[:, 2]).tolist()
    assert work == sorted(work, reverse=True)


# prefixes that are walked once

def test_who_shares():
    rng = random.Random(0)

    def shared(count, num_shared, equal=True, last=0):
        lens = [num_shared * 16 + 5] * count
        batch = make_batch(rng, 16, lens, [1] * count, num_shared)
        tables = [list(table) for table in batch.block_tables]
        if not equal:
            tables[-1][1] = 99 # in the first block alike, then not
        ids = np.array([i for table in tables for i in table])
        used = np.array([len(table) for table in tables])
        spans = np.stack([np.cumsum(used) - used, used, 0 * used, 0 * used + 1], 1)
        rows = np.stack([np.arange(count), np.array(lens)], 1)
        return len(share(spans, rows, ids, (np.array(lens) - 1) // 16, 16, MIN_SHARERS)[0])

    long = MIN_SHARED // 16
    assert shared(MIN_SHARERS, long) == MIN_SHARERS + 1
    assert shared(MIN_SHARERS - 1, long) == MIN_SHARERS - 1
    assert shared(MIN_SHARERS, long - 1) == MIN_SHARERS
    assert shared(MIN_SHARERS, long, equal=False) == MIN_SHARERS
    assert shared(MAX_ROWS + 3, long) == MAX_ROWS + 3 + 2


def test_plans():
    assert places(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]
    spans, rows = np.array([[0, 7, 0, 2]]), np.array([[4, 100], [5, 101]])
    plan, num_states = make_plan(spans, rows, np.arange(7), 16, 3)
    items = plan[5:plan[2]].reshape(-1, 5)
    assert num_states == 6 and items[:, 1].sum() == 7 and plan.dtype == np.int32
    assert sorted(items[:, 2].tolist()) == [0, 48, 96] and set(items[:, 4]) == {2}
    tokens = plan[plan[3]:plan[3] + 6].reshape(2, 3)
    assert tokens.tolist() == [[4, 0, 3], [5, 3, 3]]


# numbers that are none

@pytest.mark.parametrize("way", ["stream", "tiles"])
@by_dtype
def test_nan_stays_with_its_token_and_head(dtype, way):
    torch.manual_seed(0)
    cache = make_cache(4, 2, 16, 16, 20, dtype)
    batch = make_batch(random.Random(0), 16, [100, 90, 20], [1, 5, 1])
    query = torch.randn(7, 4, 16).to(dtype)
    attention = use(cache, 4, way)
    attention.prepare(batch)
    before = attention.attend(query, 0, 0.25)
    query[0, 1, 3], query[3, 2, 0] = torch.nan, torch.inf
    after = attention.attend(query, 0, 0.25)
    broken = torch.zeros(7, 4, dtype=torch.bool)
    broken[0, 1] = broken[3, 2] = True
    assert bool(after[broken].isnan().all())
    assert torch.equal(after[~broken], before[~broken])


def test_the_engine_sees_keys_that_are_no_numbers():
    cache = make_cache(4, 2, 16, 4, 4)
    attention = StreamedAttention(cache, 4)
    attention.prepare(make_batch(random.Random(0), 4, [5, 3], [1, 2]))
    key = torch.randn(3, 2, 16)
    key[1, 0, 0] = torch.nan
    out = attention(torch.randn(3, 4, 16), key, key, 0, 0.25)
    assert attention.finite.tolist() == [True, False, True] and bool(out.isfinite().all())


def test_large_scores_do_not_overflow():
    cache = make_cache(4, 2, 16, 16, 10)
    batch = make_batch(random.Random(0), 16, [100], [4])
    for scaling in (1e4, -1e4, 0.0):
        query, results = torch.randn(4, 4, 16), []
        for each in (use(cache, 4, "stream"), use(cache, 4, "tiles"),
                     ReferenceAttention(cache, 4)):
            each.prepare(batch)
            results.append(each.attend(query, 0, scaling))
        for found in results[:2]:
            torch.testing.assert_close(found, results[2], atol=1e-3, rtol=1e-3)


# compilers, formats, trials

@by_dtype
@pytest.mark.parametrize("flags", [
    (*FLAGS, "-mno-avx512f"), ("-O1", "-fopenmp", "-shared", "-fPIC", "-w"),
    (*FLAGS, "-mno-avx512bf16")])
def test_other_machines(flags, dtype):
    torch.manual_seed(0)
    batch = make_batch(random.Random(0), 16, [33, 100, 70], [1, 7, 70])
    for kind in ("auto", "int8", "fp8"):
        try:
            for way in ("stream", "tiles"):
                compare(make_cache(6, 2, 40, 16, 15, dtype, kind), 6, batch, way, flags=flags)
        except NativeError as error:
            if "unrecognized" not in str(error):
                raise
            pytest.skip("another kind of CPU")


@by_dtype
@pytest.mark.parametrize("kind", ["fp8", "fp8_e4m3", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("H, K, D, P", [(9, 3, 64, 16), (8, 1, 6, 8), (4, 4, 38, 64)])
def test_quantized_cells_are_read_as_the_cache_hands_them_out(H, K, D, P, kind, dtype):
    torch.manual_seed(0)
    batch = make_batch(random.Random(0), P, [1, 100, 77, 50], [1, 1, 4, 40])
    num_blocks = sum(-(-n // P) for n in (1, 100, 77, 50))
    for way in ("stream", "tiles"):
        compare(make_cache(H, K, D, P, num_blocks, dtype, kind), H, batch, way)


@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("num_blocks, P", [(1, 1), (1, 16), (2, 2), (40, 16)])
def test_a_trial_leaves_the_cache_empty(num_blocks, P, kind):
    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4,
                                  num_key_value_heads=2, num_hidden_layers=2)
    cache = make_kv_cache(config, num_blocks, P, BF16, kind=kind)
    attention = streamed(cache, 4)
    assert attention.cache is cache and 0 <= attention.few <= MAX_ROWS
    assert not any(bool(layer.any()) for layer in cache.layers)


def test_what_cannot_be_compiled_is_a_native_error(monkeypatch):
    with pytest.raises(NativeError, match="float16"):
        streamed(make_cache(4, 2, 16, 4, 4, torch.float16), 4)
    with pytest.raises(NativeError, match="failed"):
        compile_attention(4, 2, 16, 4, FP32, cells="no C at all")
    with pytest.raises(NativeError, match="failed"):
        compile_chunks(4, 2, 16, 4, FP32, cells="no C at all")
    elsewhere = SimpleNamespace(device=torch.device("meta"))
    with pytest.raises(NativeError, match="is on meta"):
        chunk_attention.shapes_of(elsewhere, 4)
    with pytest.raises(NativeError, match="failed"):
        streamed(make_cache(4, 2, 16, 4, 4), 4, (*FLAGS, "-fno-such-option"))


def empty_cache():
    return PagedKVCache(AutoConfig.for_model(
        "llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=1), 40, 4)


@pytest.mark.parametrize("kind", [StreamedAttention, ChunkAttention])
def test_a_kernel_that_is_wrong_is_found(kind, monkeypatch):
    cache, attend = empty_cache(), kind.attend
    monkeypatch.setattr(kind, "attend", lambda *args: attend(*args) * 1.1)
    with pytest.raises(NativeError, match="differs from the reference"):
        streamed(cache, 4)
    assert not bool(cache.layers[0].any())


@pytest.mark.parametrize("stream, tiles, gather, few, chosen", [
    (1, 2, 3, MAX_ROWS, True), (1, 3, 2, MAX_ROWS, False), (3, 2, 9, 0, True),
    (3, 9, 2, 0, False), (1.1, 1, 9, MAX_ROWS, True)])
def test_a_trial_decides_who_computes_what(stream, tiles, gather, few, chosen, monkeypatch):
    "The times are made up: streaming takes as long for any number of tokens."
    seconds, trial = {StreamedAttention: stream, ChunkAttention: tiles,
                      GroupedAttention: gather}, streamed_attention.trial

    def timed(attention, table, query):
        return trial(attention, table, query)[0], seconds.get(type(attention))
    monkeypatch.setattr(streamed_attention, "trial", timed)
    attention = streamed(empty_cache(), 4)
    assert (attention.few, attention.chunks is not None) == (few, chosen)


def test_states_grow_with_the_step():
    cache = make_cache(4, 2, 16, 16, 40)
    attention, exact = use(cache, 4, "mixed"), ReferenceAttention(cache, 4)
    for lens, new in (([5], 1), ([100] * 5, 1), ([20], 1), ([500], 1), ([20], 20), ([500], 30),
                      ([70] * 5, 40), ([3], 2)):
        batch = make_batch(random.Random(0), 16, lens, [new] * len(lens))
        query, results = torch.randn(new * len(lens), 4, 16), []
        for each in (attention, exact):
            each.prepare(batch)
            results.append(each.attend(query, 0, 0.25))
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
