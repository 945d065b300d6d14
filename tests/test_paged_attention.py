"""Attention over blocks equals full forwards; its batches and groups; nobody sees another."""

import math
import random
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from nanollm import paged_attention as module
from nanollm.generate import generate
from nanollm.model import dummy_model, kv_bytes_per_token, load_model
from nanollm.paged_attention import (
    NAME,
    FlatBatch,
    GroupedAttention,
    PagedAttention,
    PagedKVCache,
    ReferenceAttention,
    TransformersModel,
    group_requests,
    zeros,
)
from nanollm.transformer import Decoder

torch.set_num_threads(1)
QWEN2 = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             eos_token_id=2, bos_token_id=1)
MODELS = {name: load_model(name, load_format="dummy", device="cpu", dtype="float32",
                           progress=False) for name in ("tiny-llama", "tiny-qwen3")}
MODELS["qwen2"] = dummy_model(AutoConfig.for_model("qwen2", **QWEN2), torch.device("cpu"),
                              torch.float32).eval()
LLAMA = MODELS["tiny-llama"]
HEADS = LLAMA.config.num_attention_heads
by_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
by_forward = pytest.mark.parametrize("forward", [Decoder, TransformersModel])
by_attention = pytest.mark.parametrize("attention", [ReferenceAttention, GroupedAttention])


def flat(size, ids, tables, ends, news, rows=None):
    "A flat batch: the last `news[i]` of the first `ends[i]` tokens of each request."
    places = [range(end - n, end) for end, n in zip(ends, news)]
    token_ids = [row[i] for row, own in zip(ids, places) for i in own]
    return FlatBatch(
        token_ids=token_ids, positions=[i for own in places for i in own],
        slots=[table[i // size] * size + i % size
               for table, own in zip(tables, places) for i in own],
        query_lens=list(news), context_lens=list(ends), block_tables=list(tables),
        rows=list(range(len(token_ids)) if rows is None else rows),
        adapters=[None] * len(news))


def compute(forward, attention, batch):
    "What a model runner does."
    attention.prepare(batch)
    tensors = map(attention.tensor, (batch.token_ids, batch.positions, batch.rows))
    token_ids, positions, rows = tensors
    with torch.inference_mode():
        return forward(token_ids, positions, attention, rows)


def full_logits(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def run_steps(model, forward, kind, rng, block_size, lens, num_steps):
    "Compute requests in random pieces; compare every logit with a full forward of each alone."
    ids = [[rng.randrange(3, 320) for _ in range(n)] for n in lens]
    wanted = [full_logits(model, row) for row in ids]
    needed = [math.ceil(n / block_size) for n in lens]
    cache = PagedKVCache(model.config, sum(needed) + 2, block_size)
    attention = kind(cache, model.config.num_attention_heads)
    pool = rng.sample(range(cache.num_blocks), sum(needed))
    tables = [[pool.pop() for _ in range(n)] for n in needed]
    cuts = [sorted(rng.choices(range(n + 1), k=num_steps - 1)) + [n] for n in lens]
    done = [0] * len(lens)
    for step in range(num_steps):
        order = rng.sample(range(len(lens)), len(lens))
        now = [i for i in order if cuts[i][step] > done[i]]
        if not now:
            continue
        ends, starts = [cuts[i][step] for i in now], [done[i] for i in now]
        news = [end - start for start, end in zip(starts, ends)]
        rows = sorted(rng.sample(range(sum(news)), rng.randint(0, sum(news))))
        batch = flat(block_size, [ids[i] for i in now], [tables[i] for i in now], ends, news,
                     rows)
        logits = compute(forward, attention, batch)
        expected = torch.cat([wanted[i][start:end] for i, start, end in zip(now, starts, ends)])
        assert logits.shape == (len(rows), 320)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(logits, expected[rows], rtol=0, atol=1e-5 * scale)
        assert attention.finite.shape == (sum(news),) and bool(attention.finite.all())
        for i, end in zip(now, ends):
            done[i] = end


@by_model
@by_attention
@by_forward
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), block_size=st.integers(1, 20), num_steps=st.integers(1, 4),
       lens=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_ragged_batches_equal_full_forwards(
        model, attention, forward, seed, block_size, num_steps, lens):
    rng = random.Random(seed)
    run_steps(model, forward(model), attention, rng, block_size, lens, num_steps)


@by_attention
def test_what_comes_back_is_contiguous_and_flat(attention):
    cache = PagedKVCache(LLAMA.config, 8, 4)
    paged = attention(cache, HEADS)
    paged.prepare(flat(4, [range(9)] * 2, [[0, 1, 2], [3, 4, 5]], [9, 5], [3, 5]))
    query, key = torch.randn(8, HEADS, 16), torch.randn(8, 2, 16)
    out = paged(query, key, key, 0, 0.25)
    assert out.shape == (8, HEADS, 16) and out.is_contiguous()


def test_the_base_class_stores_and_leaves_attention_to_others():
    paged = PagedAttention(PagedKVCache(LLAMA.config, 2, 4), HEADS)
    paged.prepare(flat(4, [range(3)], [[1]], [3], [3]))
    key = torch.randn(3, 2, 16)
    with pytest.raises(NotImplementedError):
        paged(torch.randn(3, HEADS, 16), key, -key, 1, 0.25)
    assert torch.equal(paged.cache.layers[1][1, :3, 0], key)
    assert torch.equal(paged.cache.layers[1][1, :3, 1], -key)


# the model is left as it was

def test_the_loaded_model_is_left_as_it_was():
    before, ids = LLAMA.config._attn_implementation, [5, 6, 7]
    wanted = full_logits(LLAMA, ids)
    attention = GroupedAttention(PagedKVCache(LLAMA.config, 2, 4), HEADS)
    compute(TransformersModel(LLAMA), attention, flat(4, [ids], [[1]], [3], [3]))
    assert LLAMA.config._attn_implementation == before
    assert torch.equal(full_logits(LLAMA, ids), wanted)
    with pytest.raises(IndexError): # in the middle of the forward
        compute(TransformersModel(LLAMA), attention, flat(4, [[5, 320]], [[1]], [2], [2]))
    assert LLAMA.config._attn_implementation == before


def test_a_forgotten_cache_is_an_error():
    before = LLAMA.config._attn_implementation
    LLAMA.config._attn_implementation = NAME
    try:
        with pytest.raises(RuntimeError, match="without a cache"):
            LLAMA(torch.tensor([[1, 2]]))
    finally:
        LLAMA.config._attn_implementation = before


@by_forward
def test_greedy_tokens_equal_generate(forward):
    attention = GroupedAttention(PagedKVCache(LLAMA.config, 8, 3), HEADS)
    prompt = [9, 8, 7, 6, 5]
    table, ids, computed = [6, 0, 7, 2, 5], list(prompt), 0
    for _ in range(9):
        n = len(ids) - computed
        batch = flat(3, [ids], [table], [len(ids)], [n], [n - 1])
        logits = compute(forward(LLAMA), attention, batch)
        computed = len(ids)
        ids.append(int(logits.argmax()))
    assert ids[5:] == list(generate(LLAMA, prompt, 9))


@by_attention
def test_the_same_batch_twice_gives_the_same_logits(attention):
    paged = attention(PagedKVCache(LLAMA.config, 8, 4), HEADS)
    first = flat(4, [range(3, 20), range(5, 20)], [[5, 2], [0, 7, 3]], [5, 9], [5, 9])
    then = flat(4, [range(3, 20), range(5, 20)], [[5, 2], [0, 7, 3]], [8, 10], [3, 1])
    for batch in first, then:
        logits = [compute(Decoder(LLAMA), paged, batch) for _ in range(3)]
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_a_flat_batch_is_frozen_and_comparable():
    batch = flat(4, [[5, 6, 7]], [[1]], [3], [3])
    assert batch == flat(4, [[5, 6, 7]], [[1]], [3], [3]) != replace(batch, rows=[0])
    with pytest.raises(FrozenInstanceError):
        batch.rows = [0]


# the cache

def test_write_touches_its_slots_only():
    cache = PagedKVCache(LLAMA.config, 3, 4)
    key, value = torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    cache.write(1, torch.tensor([11, 4]), key, value)
    slots = cache.layers[1].flatten(0, 1)
    assert torch.equal(slots[11, 0], key[0]) and torch.equal(slots[4, 1], value[1])
    assert not cache.layers[0].any() and slots.count_nonzero() == 2 * 2 * 2 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros(dtype):
    x = zeros((3, 4, 2), dtype, "cpu")
    assert x.shape == (3, 4, 2) and x.dtype == dtype and not x.any() and x.is_contiguous()
    x[1, 2] = 5
    assert x.sum() == 10


def test_cache_bytes_and_fallbacks_of_the_config():
    cache = PagedKVCache(LLAMA.config, 3, 4, torch.bfloat16)
    assert cache.nbytes == 12 * kv_bytes_per_token(LLAMA.config, torch.bfloat16)
    assert (cache.num_blocks, cache.block_size, cache.device.type) == (3, 4, "cpu")
    gpt2 = AutoConfig.for_model("gpt2", n_embd=64, n_head=4, n_layer=3)
    shapes = [tuple(layer.shape) for layer in PagedKVCache(gpt2, 1, 2).layers]
    assert shapes == [(1, 2, 2, 4, 16)] * 3


# what is no number

def dirty_cache(value):
    "A cache whose every slot was written by a broken request."
    cache = PagedKVCache(LLAMA.config, 6, 4)
    broken = torch.full((24, 2, 16), value)
    broken[:, :, 0] = 3
    for layer in range(2):
        cache.write(layer, torch.arange(24), broken, -broken)
        assert not cache.layers[layer][..., 1:].any()
        assert bool((cache.layers[layer][..., 0].abs() == 3).all())
    return cache


@by_attention
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_heirs_of_broken_requests_are_bit_equal(attention, bad):
    batch = flat(4, [range(3, 8), range(8, 17)], [[1, 0], [2, 3, 5]], [5, 9], [5, 9])
    logits = [compute(Decoder(LLAMA), attention(cache, HEADS), batch)
              for cache in (PagedKVCache(LLAMA.config, 6, 4), dirty_cache(bad))]
    assert torch.equal(*logits)


@by_attention
def test_a_broken_request_does_not_touch_its_neighbours(attention):
    key, query = torch.randn(6, 2, 16), torch.randn(6, HEADS, 16)
    results = []
    for damage in 0.0, torch.nan:
        paged = attention(PagedKVCache(LLAMA.config, 4, 2), HEADS)
        new, q = key.clone(), query.clone()
        new[:3] += damage
        q[:3] += damage
        paged.prepare(flat(2, [range(3)] * 2, [[3, 1], [0, 2]], [3, 3], [3, 3]))
        results.append(paged(q, new, new, 0, 0.25)[3:])
    assert torch.equal(*results) and bool(results[0].isfinite().all())


@by_attention
@by_forward
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_finite_says_whose_numbers_are_none(attention, forward, value):
    "It is the broken token alone: those after it read zeros, and the engine ends them all."
    paged = attention(PagedKVCache(LLAMA.config, 6, 4), HEADS)
    batch = flat(4, [range(3, 9), range(10, 14)], [[1, 0], [2]], [6, 4], [6, 4])

    def spoil(layer, args, out):
        return out.masked_fill((args[0] == 5)[..., None], value)

    handle = LLAMA.get_input_embeddings().register_forward_hook(spoil)
    try:
        compute(forward(LLAMA), paged, batch)
    finally:
        handle.remove()
    assert paged.finite.tolist() == [True] * 2 + [False] + [True] * 7
    assert all(bool(layer.isfinite().all()) for layer in paged.cache.layers)
    compute(forward(LLAMA), paged, batch)
    assert bool(paged.finite.all())


def test_block_ids_are_only_names():
    rng, results = random.Random(1), []
    for _ in range(4):
        pool = rng.sample(range(20), 11)
        attention = GroupedAttention(PagedKVCache(LLAMA.config, 20, 4), HEADS)
        ids = range(3, 28), range(28, 40)
        batch = flat(4, ids, [pool[:7], pool[7:]], [25, 12], [25, 12])
        results.append(compute(Decoder(LLAMA), attention, batch))
    assert all(torch.equal(result, results[0]) for result in results)


@by_attention
def test_a_block_table_may_be_longer_than_the_context(attention):
    "Its room is taken before it is filled."
    logits = []
    for table in [3, 1], [3, 1, 0, 5]:
        paged = attention(PagedKVCache(LLAMA.config, 6, 4), HEADS)
        batch = flat(4, [range(3, 10)], [table], [7], [7])
        logits.append(compute(Decoder(LLAMA), paged, batch))
    assert torch.equal(*logits)


# groups

@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(requests=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), min_size=1,
                         max_size=20),
       limit=st.one_of(st.just(math.inf), st.integers(1, 200)))
def test_groups_are_a_partition_within_their_limits(requests, limit):
    news, blocks = [n for n, _ in requests], [m for _, m in requests]
    groups = group_requests(news, blocks, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(requests)))
    for group in groups:
        assert len({news[i] for i in group}) == 1
        longest = max(blocks[i] for i in group)
        assert blocks[group[0]] == longest <= 2 * min(blocks[i] for i in group)
        assert len(group) == 1 or len(group) * longest <= limit


def test_equal_decodes_are_one_group_in_order():
    attention = GroupedAttention(PagedKVCache(LLAMA.config, 12, 4), HEADS)
    ids = [range(9)] * 3
    attention.prepare(flat(4, ids, [[0, 1], [2, 3], [4, 5]], [8, 7, 5], [1, 1, 1]))
    [group] = attention.groups
    assert group.rows is None and group.bias.shape == (3, 1, 1, 8)
    assert group.block_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert (group.bias[:, 0, 0] == 0).sum(-1).tolist() == [8, 7, 5]


def test_a_padded_request_gathers_a_block_of_its_own_again():
    "Another's block may hold what is no number."
    attention = GroupedAttention(PagedKVCache(LLAMA.config, 12, 4), HEADS)
    attention.prepare(flat(4, [range(16)] * 2, [[7, 3], [2, 9, 5, 8]], [5, 16], [1, 1]))
    [group] = attention.groups
    assert group.rows.tolist() == [1, 0]
    assert group.block_ids.view(2, 4).tolist() == [[2, 9, 5, 8], [7, 3, 7, 7]]


@pytest.mark.parametrize("limit", [1, 4096, 2**40])
def test_the_limit_of_a_gather_changes_groups_and_not_results(monkeypatch, limit):
    monkeypatch.setattr(module, "GATHER_BYTES", limit)
    lens = [30, 31, 12, 50, 7]
    run_steps(LLAMA, Decoder(LLAMA), GroupedAttention, random.Random(5), 4, lens, 3)
