"Attention over blocks equals full forwards; its batches, groups and refusals; what a broken request leaves behind."

import math
import random
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from nanollm import paged_attention as module
from nanollm.generate import generate
from nanollm.model import ModelError, dummy_model, kv_bytes_per_token, load_model
from nanollm.paged_attention import (
    NAME,
    PagedBatch,
    PagedKVCache,
    attend_grouped,
    attend_reference,
    attend_varlen,
    attention_of,
    check_call,
    check_paged,
    choose_attend,
    forward_paged,
    group_requests,
    make_groups,
    num_blocks_in,
    unsupported,
)

torch.set_num_threads(1)
SHAPE = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=512, eos_token_id=2, bos_token_id=1)
FULL = dict(layer_types=["full_attention"] * 2, sliding_window=None)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
              n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1,
              num_key_value_heads=4)
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0] * 8)


def build(kind, **changes):
    "A random model of a family, as small as tiny-llama, loaded without a hub."
    return dummy_model(AutoConfig.for_model(kind, **SHAPE | changes), torch.device("cpu"), torch.float32).eval()


MODELS = {name: load_model(name, load_format="dummy", device="cpu", dtype="float32", progress=False)
          for name in ("tiny-llama", "tiny-qwen3")} | {"qwen2": build("qwen2")}
LLAMA = MODELS["tiny-llama"]
by_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
by_attend = pytest.mark.parametrize("attend", [attend_reference, attend_grouped])


def full_logits(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def run_steps(model, rng, block_size, attend, lens, num_steps):
    "Compute requests in random chunks over several steps; compare every logit with a full forward of each alone."
    ids = [[rng.randrange(3, 320) for _ in range(n)] for n in lens]
    wanted = [full_logits(model, row) for row in ids]
    needed = [math.ceil(n / block_size) for n in lens]
    cache = PagedKVCache(model.config, sum(needed) + 2, block_size)
    pool = rng.sample(range(cache.num_blocks), sum(needed))
    tables = [[pool.pop() for _ in range(n)] for n in needed]
    cuts = [sorted(rng.choices(range(n + 1), k=num_steps - 1)) + [n] for n in lens]
    done = [0] * len(lens)
    for step in range(num_steps):
        now = [i for i in rng.sample(range(len(lens)), len(lens)) if cuts[i][step] > done[i]]
        if not now:
            continue
        ends = [cuts[i][step] for i in now]
        batch = PagedBatch(cache, [tables[i] for i in now], ends, [end - done[i] for i, end in zip(now, ends)])
        flat = [token for i, end in zip(now, ends) for token in ids[i][done[i]:end]]
        rows = sorted(rng.sample(range(len(flat)), rng.randint(0, len(flat))))
        logits = forward_paged(model, flat, batch, rows, attend)
        expected = torch.cat([wanted[i][done[i]:end] for i, end in zip(now, ends)])
        assert logits.shape == (len(rows), 320)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(logits, expected[rows], rtol=0, atol=1e-5 * scale)
        for i, end in zip(now, ends):
            done[i] = end


@by_model
@by_attend
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), block_size=st.integers(1, 20), num_steps=st.integers(1, 4),
       lens=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_ragged_batches_equal_full_forwards(model, attend, seed, block_size, lens, num_steps):
    run_steps(model, random.Random(seed), block_size, attend, lens, num_steps)


WORKING = {"mistral": dict(sliding_window=None), "phi3": dict(pad_token_id=0), "granite": {}, "olmo2": {}, "gemma": {},
           "starcoder2": dict(sliding_window=None), "gpt2": dict(num_key_value_heads=None), "phi": {}, "cohere": {},
           "gpt_neox": dict(num_key_value_heads=None), "qwen3_moe": EXPERTS,
           "mixtral": EXPERTS | dict(sliding_window=None),
           "qwen2": dict(use_sliding_window=False, sliding_window=16)}


@pytest.mark.parametrize("kind", WORKING)
def test_families_that_simply_work(kind):
    model = build(kind, **WORKING[kind])
    check_paged(model)
    for attend in (attend_reference, attend_grouped):
        run_steps(model, random.Random(3), 4, attend, [33, 9, 20, 1], 3)


WINDOWS = dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)
LOOKS_AHEAD = FULL | dict(sliding_window=16, use_bidirectional_attention=True)
LONG = dict(pad_token_id=0, original_max_position_embeddings=64, rope_parameters=LONGROPE)
REFUSED = {
    "mistral with a window": ("mistral", dict(sliding_window=16), "a sliding window of 16 tokens"),
    "phi3 with a window": ("phi3", dict(sliding_window=16, pad_token_id=0), "a sliding window of 16 tokens"),
    "qwen2 with windows": ("qwen2", WINDOWS, "layers of sliding_attention"),
    "qwen3 with windows": ("qwen3", WINDOWS, "layers of sliding_attention"),
    "gemma2": ("gemma2", {}, "layers of sliding_attention"),
    "gemma2, full layers": ("gemma2", FULL, "soft-capped scores"),
    "gemma3": ("gemma3_text", {}, "layers of sliding_attention"),
    "gemma3 that looks ahead": ("gemma3_text", LOOKS_AHEAD, "attention to later tokens"),
    "gpt_oss": ("gpt_oss", EXPERTS | ROPE, "layers of sliding_attention"),
    "gpt_oss, full layers": ("gpt_oss", EXPERTS | FULL | ROPE, "attention sinks"),
    "qwen3_next": ("qwen3_next", EXPERTS, "layers of linear_attention"),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"]), "layers of conv"),
    "llama4": ("llama4_text", EXPERTS, "layers of chunked_attention"),
    "deepseek_v2": ("deepseek_v2", LATENT | dict(topk_method="greedy"), "multi-head latent attention"),
    "deepseek_v3": ("deepseek_v3", LATENT, "multi-head latent attention"),
    "phi3 with longrope": ("phi3", LONG, "longrope"),
    "doge": ("doge", {}, "a mask of its own"),
    "diffllama": ("diffllama", {}, "4 times in 2 layers"),
    "nemotron": ("nemotron", {}, "without a cache"),
    "persimmon": ("persimmon", {}, "keys of 4 x 16 and values of 4 x 16 .* the config says 2 x 16"),
    "bloom": ("bloom", {}, "attention code of its own"),
    "stablelm": ("stablelm", {}, "attention code of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused_by_name(name):
    kind, changes, reason = REFUSED[name]
    with pytest.raises(ModelError, match=reason) as caught:
        check_paged(build(kind, **deepcopy(changes)))
    assert "\n" not in str(caught.value) and "tensor" not in str(caught.value)


def test_longrope_within_its_short_range_is_fine():
    config = AutoConfig.for_model("phi3", **SHAPE | deepcopy(LONG) | dict(original_max_position_embeddings=512))
    assert unsupported(config) is None


def test_a_failing_attention_is_reported_as_a_model_error():
    def broken(query, layer, batch, scaling):
        raise RuntimeError("no such kernel")
    with pytest.raises(ModelError, match="LlamaForCausalLM does not run on paged attention: no such kernel"):
        check_paged(LLAMA, broken)


def test_check_call():
    key, layer = torch.zeros(1, 2, 3, 16), torch.nn.Identity()
    accepted = dict(attention_mask=None, dropout=0.0, use_cache=False, sliding_window=None, position_ids=torch.ones(3))
    check_call(layer, accepted, key, key, torch.Size([2, 16]))
    wishes = dict(attention_mask=(torch.zeros(1), "a mask of its own"), softcap=(30.0, "soft-capped"), news=(1, "news"),
                  s_aux=(torch.zeros(4), "sinks"), sliding_window=(7, "a sliding window"), look_ahead=(True, "later"))
    for wish, (value, name) in wishes.items():
        with pytest.raises(ModelError, match=f"Identity asks for .*{name}"):
            check_call(layer, accepted | {wish: value}, key, key, torch.Size([2, 16]))
    with pytest.raises(ModelError, match="keys of 2 x 16 and values of 2 x 8 .* the config says 2 x 16"):
        check_call(layer, {}, key, key[..., :8], torch.Size([2, 16]))


def test_the_loaded_model_is_left_as_it_was():
    before = LLAMA.config._attn_implementation
    ids = [5, 6, 7]
    wanted = full_logits(LLAMA, ids)
    forward_paged(LLAMA, ids, PagedBatch(PagedKVCache(LLAMA.config, 2, 4), [[1]], [3], [3]), [2])
    assert LLAMA.config._attn_implementation == before and torch.equal(full_logits(LLAMA, ids), wanted)
    with pytest.raises(ZeroDivisionError), attention_of(LLAMA, NAME):
        assert LLAMA.config._attn_implementation == NAME
        raise ZeroDivisionError
    assert LLAMA.config._attn_implementation == before


def test_a_forgotten_batch_is_an_error():
    with attention_of(LLAMA, NAME), pytest.raises(RuntimeError, match="without a cache"):
        LLAMA(torch.tensor([[1, 2]]))


def test_greedy_tokens_equal_generate():
    prompt, cache = [9, 8, 7, 6, 5], PagedKVCache(LLAMA.config, 8, 3)
    table, ids, computed = [6, 0, 7, 2, 5], list(prompt), 0
    for _ in range(9):
        batch = PagedBatch(cache, [table], [len(ids)], [len(ids) - computed])
        logits = forward_paged(LLAMA, ids[computed:], batch, [len(ids) - computed - 1])
        computed = len(ids)
        ids.append(int(logits.argmax()))
    assert ids[5:] == list(generate(LLAMA, prompt, 9))


def test_slots_and_positions():
    cache = PagedKVCache(LLAMA.config, 8, 4)
    batch = PagedBatch(cache, [[5, 2], [0, 7, 3], [6, 1]], [6, 10, 7], [6, 1, 3])
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 9, 4, 5, 6]
    assert batch.slots.tolist() == [20, 21, 22, 23, 8, 9, 13, 4, 5, 6]


def test_write_touches_its_slots_only():
    cache = PagedKVCache(LLAMA.config, 3, 4)
    key, value = torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    cache.write(1, torch.tensor([11, 4]), key, value)
    flat = cache.layers[1].flatten(0, 1)
    assert torch.equal(flat[11, 0], key[0]) and torch.equal(flat[4, 1], value[1])
    assert not cache.layers[0].any() and flat.count_nonzero() == 2 * 2 * 2 * 16


def test_cache_bytes_and_fallbacks_of_the_config():
    cache = PagedKVCache(LLAMA.config, 3, 4, torch.bfloat16)
    assert cache.nbytes == 12 * kv_bytes_per_token(LLAMA.config, torch.bfloat16)
    gpt2 = AutoConfig.for_model("gpt2", n_embd=64, n_head=4, n_layer=3)
    assert [tuple(layer.shape) for layer in PagedKVCache(gpt2, 1, 2).layers] == [(1, 2, 2, 4, 16)] * 3


def test_num_blocks_in():
    per_block = kv_bytes_per_token(LLAMA.config, torch.float32) * 16
    assert num_blocks_in(per_block * 7 + per_block - 1, LLAMA.config, 16, torch.float32) == 7
    with pytest.raises(ValueError, match=f"{per_block - 1} bytes holds no block of 16 tokens, which takes {per_block}"):
        num_blocks_in(per_block - 1, LLAMA.config, 16, torch.float32)


@by_attend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_heirs_do_not_notice_a_broken_owner(attend, bad):
    def logits(cache):
        batch = PagedBatch(cache, [[1, 0], [2, 3, 5]], [5, 9], [5, 9])
        return forward_paged(LLAMA, list(range(3, 17)), batch, range(14), attend)

    dirty, broken = PagedKVCache(LLAMA.config, 6, 4), torch.full((24, 2, 16), bad)
    for layer in range(2):
        dirty.write(layer, torch.arange(24), broken.clone(), broken.clone())
        assert dirty.layers[layer].isfinite().all()
    assert torch.equal(logits(PagedKVCache(LLAMA.config, 6, 4)), logits(dirty))


@by_attend
def test_a_broken_request_does_not_touch_its_neighbours(attend):
    key, query = torch.randn(6, 2, 16), torch.randn(6, 4, 16)
    results = []
    for damage in (0.0, torch.nan):
        cache = PagedKVCache(LLAMA.config, 4, 2)
        new, q = key.clone(), query.clone()
        new[:3] += damage
        q[:3] += damage
        batch = PagedBatch(cache, [[3, 1], [0, 2]], [3, 3], [3, 3])
        cache.write(0, batch.slots, new, new)
        results.append(attend(q, 0, batch, 0.25)[3:])
    assert torch.equal(*results) and results[0].isfinite().all()


def test_block_ids_are_only_names():
    rng, ids, results = random.Random(1), list(range(3, 40)), []
    for _ in range(4):
        pool = rng.sample(range(20), 11)
        cache = PagedKVCache(LLAMA.config, 20, 4)
        batch = PagedBatch(cache, [pool[:7], pool[7:]], [25, 12], [25, 12])
        results.append(forward_paged(LLAMA, ids, batch, range(37)))
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(requests=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), min_size=1, max_size=20),
       limit=st.one_of(st.just(math.inf), st.integers(1, 200)))
def test_groups_are_a_partition_within_their_limits(requests, limit):
    news, blocks = [n for n, _ in requests], [m for _, m in requests]
    groups = group_requests(news, blocks, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(requests)))
    for group in groups:
        assert len({news[i] for i in group}) == 1
        assert blocks[group[0]] == max(blocks[i] for i in group) <= 2 * min(blocks[i] for i in group)
        assert len(group) == 1 or len(group) * blocks[group[0]] <= limit


def test_equal_decodes_are_one_group_in_order():
    cache = PagedKVCache(LLAMA.config, 12, 4)
    batch = PagedBatch(cache, [[0, 1], [2, 3], [4, 5]], [8, 7, 5], [1, 1, 1])
    [group] = make_groups(batch, torch.float32, 2)
    assert group.rows is None and group.bias.shape == (3, 1, 1, 8)
    assert group.block_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert (group.bias[:, 0, 0] == 0).sum(-1).tolist() == [8, 7, 5]


@pytest.mark.parametrize("limit", [1, 4096, 2**40])
def test_the_limit_of_a_gather_changes_groups_and_not_results(monkeypatch, limit):
    monkeypatch.setattr(module, "GATHER_BYTES", limit)
    run_steps(LLAMA, random.Random(5), 4, attend_grouped, [30, 31, 12, 50, 7], 3)


def half_model(device):
    return SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16, config=LLAMA.config)


def test_a_cpu_or_32_bits_get_the_grouped_attention():
    cache = PagedKVCache(LLAMA.config, 4, 4)
    assert choose_attend(LLAMA, cache) is attend_grouped
    assert choose_attend(half_model("cpu"), cache) is attend_grouped


def disagrees(query, layer, batch, scaling):
    return attend_reference(query, layer, batch, scaling) + 0.5


def is_missing(query, layer, batch, scaling):
    raise TypeError("unexpected keyword argument 'block_table'")


@pytest.mark.parametrize("num_blocks, block_size", [(1, 1), (1, 16), (2, 1), (9, 16)])
@pytest.mark.parametrize("kernel", [attend_grouped, disagrees, is_missing])
def test_the_trial_decides_on_a_gpu(monkeypatch, kernel, num_blocks, block_size):
    def varlen(*args):
        calls.append(args)
        return kernel(*args)
    calls, cache = [], PagedKVCache(LLAMA.config, num_blocks, block_size, torch.bfloat16)
    monkeypatch.setattr(module, "attend_varlen", varlen)
    assert choose_attend(half_model("cuda"), cache) is (varlen if kernel is attend_grouped else attend_grouped)
    assert len(calls) == 1 and not cache.layers[0].any()


def test_varlen_gets_what_its_documentation_says(monkeypatch):
    seen = {}

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
        seen.update(locals())
        return query
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    batch = PagedBatch(PagedKVCache(LLAMA.config, 8, 4), [[5, 2], [0, 7, 3], [6, 1]], [6, 10, 7], [6, 1, 3])
    attend_varlen(torch.zeros(10, 4, 16), 0, batch, 0.25)
    assert seen["cu_seq_q"].tolist() == [0, 6, 7, 10] and seen["seqused_k"].tolist() == [6, 10, 7]
    assert seen["block_table"].tolist() == [[5, 2, 0], [0, 7, 3], [6, 1, 0]] and seen["cu_seq_k"] is None
    assert {seen[name].dtype for name in ("cu_seq_q", "seqused_k", "block_table")} == {torch.int32}
    assert seen["key"].shape == seen["value"].shape == (8, 4, 2, 16) and (seen["max_q"], seen["max_k"]) == (6, 10)
    assert seen["window_size"] == (-1, 0) and seen["num_splits"] == 1 and seen["enable_gqa"] and seen["scale"] == 0.25


def test_an_older_pytorch_is_named(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k: query)
    batch = PagedBatch(PagedKVCache(LLAMA.config, 1, 4), [[0]], [2], [2])
    with pytest.raises(RuntimeError, match="takes no block_table: 2.12 or later is needed"):
        attend_varlen(torch.zeros(2, 4, 16), 0, batch, 0.25)
