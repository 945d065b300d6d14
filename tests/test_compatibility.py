"""Which models run over blocks, which are refused by name, and which attention reads them."""

import random
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from nanollm.compatibility import (
    TRIAL_NAME,
    VarlenAttention,
    check_model,
    choose_attention,
    trial_attention,
    trial_batch,
    unsupported,
)
from nanollm.model import ModelError, dummy_model, load_model
from nanollm.paged_attention import (
    FlatBatch,
    GroupedAttention,
    PagedKVCache,
    ReferenceAttention,
    TransformersModel,
)
from nanollm.transformer import Decoder

torch.set_num_threads(1)
SHAPE = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             max_position_embeddings=512, eos_token_id=2, bos_token_id=1)
FULL = dict(layer_types=["full_attention"] * 2, sliding_window=None)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=32)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
              v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
              moe_intermediate_size=32, n_group=1, topk_group=1, num_key_value_heads=4)
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8,
                long_factor=[4.0] * 8)


def build(kind, dtype=torch.float32, **changes):
    "A random model of a family, as small as tiny-llama, loaded without a hub."
    config = AutoConfig.for_model(kind, **SHAPE | deepcopy(changes))
    return dummy_model(config, torch.device("cpu"), dtype).eval()


LLAMA = load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32",
                   progress=False)
HEADS = LLAMA.config.num_attention_heads
ONE_EXPERT = EXPERTS | dict(num_shared_experts=1, num_dense_layers=1)
LLAMA4 = EXPERTS | FULL | dict(num_experts_per_tok=1, intermediate_size_mlp=128,
                               no_rope_layers=[1, 0])
WORKING = {
    "llama": ("llama", {}),
    "mistral without a window": ("mistral", dict(sliding_window=None)),
    "phi3": ("phi3", dict(pad_token_id=0)), "granite": ("granite", {}),
    "olmo2": ("olmo2", {}), "gemma": ("gemma", {}), "phi": ("phi", {}),
    "cohere": ("cohere", {}), "starcoder2": ("starcoder2", dict(sliding_window=None)),
    "gpt2": ("gpt2", dict(num_key_value_heads=None)),
    "gpt_neox": ("gpt_neox", dict(num_key_value_heads=None)),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "mixtral": ("mixtral", EXPERTS | dict(sliding_window=None)),
    "qwen2 that does not use its window": (
        "qwen2", dict(use_sliding_window=False, sliding_window=16)),
    "gemma3, full layers": ("gemma3_text", FULL | dict(sliding_window=16)),
    "afmoe, full layers": ( # it views what attention returns
        "afmoe", ONE_EXPERT | FULL | dict(sliding_window=16)),
    "llama4, without its tuning": ("llama4_text", LLAMA4 | dict(attn_temperature_tuning=False)),
}


def pieces(model, kind, lens=(33, 9, 20, 1), size=4):
    "The logits of requests computed in two steps, of which the first ends in their middle."
    rng = random.Random(3)
    ids = [[rng.randrange(3, 320) for _ in range(n)] for n in lens]
    needed = [-(-n // size) for n in lens]
    pool = rng.sample(range(sum(needed)), sum(needed))
    tables = [[pool.pop() for _ in range(n)] for n in needed]
    config = model.config
    cache = PagedKVCache(config, sum(needed), size, model.dtype)
    attention, forward = kind(cache, config.num_attention_heads), TransformersModel(model)
    parts = [[] for _ in lens]
    for step in [(0, n // 2) for n in lens], [(n // 2, n) for n in lens]:
        now = [i for i, (start, end) in enumerate(step) if end > start]
        batch = trial_batch([ids[i] for i in now], [tables[i] for i in now],
                            [step[i] for i in now], size)
        attention.prepare(batch)
        tensors = map(attention.tensor, (batch.token_ids, batch.positions, batch.rows))
        token_ids, positions, rows = tensors
        with torch.inference_mode():
            logits = forward(token_ids, positions, attention, rows)
        for i, part in zip(now, logits.split(batch.query_lens)):
            parts[i].append(part)
    return ids, [torch.cat(part) for part in parts]


@pytest.mark.parametrize("name", WORKING)
def test_families_that_simply_work(name):
    kind, changes = WORKING[name]
    model = build(kind, **changes)
    check_model(model)
    for attention in ReferenceAttention, GroupedAttention:
        for ids, logits in zip(*pieces(model, attention)):
            with torch.inference_mode():
                right = model(torch.tensor([ids]), use_cache=False).logits[0]
            scale = max(1.0, float(right.abs().max()))
            torch.testing.assert_close(logits, right, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gpt2", "qwen3_moe"])
def test_16_bit_models_pass(kind, dtype):
    changes = EXPERTS if kind == "qwen3_moe" else {}
    changes = dict(num_key_value_heads=None) if kind == "gpt2" else changes
    model = build(kind, dtype, **changes)
    check_model(model)
    if kind in ("llama", "qwen3"):
        check_model(model, Decoder(model))


WINDOWS = dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)
LOOKS_AHEAD = FULL | dict(sliding_window=16, use_bidirectional_attention=True)
LONG = dict(pad_token_id=0, original_max_position_embeddings=64, rope_parameters=LONGROPE)
REFUSED = {
    "mistral with a window": ("mistral", dict(sliding_window=16), "a sliding window of 16"),
    "phi3 with a window": ("phi3", dict(sliding_window=16, pad_token_id=0),
                           "a sliding window of 16 tokens"),
    "qwen2 with windows": ("qwen2", WINDOWS, "layers of sliding_attention"),
    "qwen3 with windows": ("qwen3", WINDOWS, "layers of sliding_attention"),
    "gemma2": ("gemma2", {}, "layers of sliding_attention"),
    "gemma2, full layers": ("gemma2", FULL, "soft-capped scores"),
    "gemma3": ("gemma3_text", {}, "layers of sliding_attention"),
    "gemma3 that looks ahead": ("gemma3_text", LOOKS_AHEAD, "attention to later tokens"),
    "afmoe": ("afmoe", ONE_EXPERT, "layers of sliding_attention"),
    "gpt_oss": ("gpt_oss", EXPERTS | ROPE, "layers of sliding_attention"),
    "gpt_oss, full layers": ("gpt_oss", EXPERTS | FULL | ROPE, "attention sinks"),
    "qwen3_next": ("qwen3_next", EXPERTS, "layers of linear_attention"),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"]), "layers of conv"),
    "llama4": ("llama4_text", EXPERTS, "layers of chunked_attention"),
    "llama4, full layers": ("llama4_text", LLAMA4 | dict(attn_temperature_tuning=True),
                            "depend on the position .attn_temperature_tuning"),
    "deepseek_v2": ("deepseek_v2", LATENT | dict(topk_method="greedy"),
                    "multi-head latent attention"),
    "deepseek_v3": ("deepseek_v3", LATENT, "multi-head latent attention"),
    "phi3 with longrope": ("phi3", LONG, "longrope"),
    "doge": ("doge", {}, "a mask of its own"),
    "diffllama": ("diffllama", {}, "8 times in two steps of 2 layers"),
    "nemotron": ("nemotron", {}, "NemotronAttention was called without a cache"),
    "persimmon": ("persimmon", {},
                  "keys of 4 x 16 and values of 4 x 16 .* the config says 2 x 16"),
    "bloom": ("bloom", {}, "attention code of its own"),
    "stablelm": ("stablelm", {}, "attention code of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused_by_name(name):
    kind, changes, reason = REFUSED[name]
    with pytest.raises(ModelError, match=reason) as caught:
        check_model(build(kind, **changes))
    assert "\n" not in str(caught.value) and "tensor" not in str(caught.value)


def test_longrope_within_its_short_range_is_fine():
    changes = deepcopy(LONG) | dict(original_max_position_embeddings=512)
    assert unsupported(AutoConfig.for_model("phi3", **SHAPE | changes)) is None
    assert unsupported(LLAMA.config) is None


# a forward of one's own

def test_our_own_forward_passes():
    check_model(LLAMA, Decoder(LLAMA))
    check_model(LLAMA, TransformersModel(LLAMA))


def counts_for_itself(token_ids, positions, attention, rows):
    "As models do that make their positions from the length of the row."
    own = torch.arange(len(token_ids))
    return Decoder(LLAMA)(token_ids, own, attention, rows)


def mixes_requests(token_ids, positions, attention, rows):
    logits = Decoder(LLAMA)(token_ids, positions, attention, rows)
    return logits - logits.mean(0)


def is_no_number(token_ids, positions, attention, rows):
    return Decoder(LLAMA)(token_ids, positions, attention, rows) * torch.nan


def forgets_to_store(token_ids, positions, attention, rows):
    def attend(query, key, value, layer, scaling):
        out = attention(query, key, value, layer, scaling)
        for own in attention.cache.layers:
            own.flatten(0, 1)[attention.batch.slots] = 0
        return out
    return Decoder(LLAMA)(token_ids, positions, attend, rows)


@pytest.mark.parametrize("forward", [
    counts_for_itself, mixes_requests, is_no_number, forgets_to_store])
def test_a_forward_that_computes_something_else_is_refused(forward):
    with pytest.raises(ModelError, match="other logits over blocks .* 0.001 is the limit"):
        check_model(LLAMA, forward)


def test_a_model_that_counts_its_own_positions_is_refused(monkeypatch):
    inner = LLAMA.model.forward

    def forward(*args, position_ids=None, **kwargs):
        return inner(*args, **kwargs)

    monkeypatch.setattr(LLAMA.model, "forward", forward)
    with pytest.raises(ModelError, match="LlamaForCausalLM gives other logits over blocks"):
        check_model(LLAMA)


def test_a_forward_that_fails_is_reported_as_a_model_error():
    def broken(token_ids, positions, attention, rows):
        raise RuntimeError("no such kernel")
    with pytest.raises(ModelError, match="LlamaForCausalLM does not run on paged .*: no such"):
        check_model(LLAMA, broken)


def test_the_model_is_left_as_it_was():
    before = LLAMA.config._attn_implementation
    check_model(LLAMA)
    assert LLAMA.config._attn_implementation == before
    model = build("gemma2", **FULL)
    before = model.config._attn_implementation
    with pytest.raises(ModelError):
        check_model(model)
    assert model.config._attn_implementation == before != TRIAL_NAME


# what a layer may ask for

class Layer(torch.nn.Identity):
    layer_idx = 0


def call(layer=None, key_dim=16, value_dim=16, **extras):
    "One call of the attention function, as a layer of transformers makes it."
    attention = ReferenceAttention(PagedKVCache(LLAMA.config, 1, 4), HEADS)
    attention.layers_seen = []
    attention.prepare(trial_batch([[5, 6, 7]], [[0]], [(0, 3)], 4))
    options = dict(attention_mask=None, dropout=0.0) | extras
    query, key = torch.randn(1, HEADS, 3, 16), torch.randn(1, 2, 3, key_dim)
    value = torch.randn(1, 2, 3, value_dim)
    return trial_attention(layer or Layer(), query, key, value, **options, paged=attention)


def test_harmless_options_are_accepted():
    out, weights = call(use_cache=False, sliding_window=None, position_ids=torch.ones(3),
                        cache_position=torch.ones(3), scaling=0.25, is_causal=True)
    assert out.shape == (1, 3, HEADS, 16) and weights is None


@pytest.mark.parametrize("extras, name", [
    (dict(attention_mask=torch.zeros(1)), "a mask of its own"),
    (dict(softcap=30.0), "soft-capped scores"), (dict(news=1), "news"),
    (dict(s_aux=torch.zeros(4)), "attention sinks"),
    (dict(sliding_window=7), "a sliding window"), (dict(dropout=0.5), "dropout"),
    (dict(is_causal=False), "attention to later tokens"),
])
def test_wishes_are_refused_by_name(extras, name):
    with pytest.raises(ModelError, match=f"Layer asks for {name}, which paged"):
        call(**extras)


def test_a_layer_that_looks_ahead_is_refused():
    layer = Layer()
    layer.is_causal = False
    with pytest.raises(ModelError, match="Layer asks for attention to later tokens"):
        call(layer)
    call(layer, is_causal=True) # the call decides


@pytest.mark.parametrize("dims, told", [
    ((16, 8), "keys of 2 x 16 and values of 2 x 8"), ((8, 8), "keys of 2 x 8 and values of 2"),
    ((8, 16), "keys of 2 x 8 and values of 2 x 16")])
def test_shapes_that_the_config_does_not_promise_are_refused(dims, told):
    with pytest.raises(ModelError, match=f"{told}.*the config says 2 x 16"):
        call(None, *dims)


def test_a_trial_batch():
    batch = trial_batch([[1, 2, 3, 4, 5, 6], [7, 8, 9]], [[5, 2], [3]], [(3, 6), (0, 2)], 4)
    assert batch == FlatBatch([4, 5, 6, 7, 8], [3, 4, 5, 0, 1], [23, 8, 9, 12, 13], [3, 2],
                              [6, 2], [[5, 2], [3]], [0, 1, 2, 3, 4], [None, None])


# which attention

class Cuda(str):
    "A CPU that says it is a GPU."
    type = "cuda"


def half_model(device, dtype=torch.bfloat16):
    return SimpleNamespace(device=device, dtype=dtype, config=LLAMA.config)


def test_a_cpu_or_32_bits_get_the_grouped_attention():
    cache = PagedKVCache(LLAMA.config, 4, 4)
    models = (LLAMA, half_model(torch.device("cpu")), half_model(Cuda("cpu"), torch.float32))
    for model in models:
        attention = choose_attention(model, cache)
        assert type(attention) is GroupedAttention
        assert attention.cache is cache and attention.num_heads == HEADS


def agrees(self, query, layer, scaling):
    return ReferenceAttention.attend(self, query, layer, scaling)


def disagrees(self, query, layer, scaling):
    return agrees(self, query, layer, scaling) + 0.5


def is_missing(self, query, layer, scaling):
    raise TypeError("unexpected keyword argument 'block_table'")


@pytest.mark.parametrize("num_blocks, block_size", [(1, 1), (1, 16), (2, 1), (9, 16)])
@pytest.mark.parametrize("kernel", [agrees, disagrees, is_missing])
def test_the_trial_decides_on_a_gpu(monkeypatch, kernel, num_blocks, block_size):
    calls = []

    def attend(self, query, layer, scaling):
        calls.append(self.batch.query_lens)
        return kernel(self, query, layer, scaling)

    cache = PagedKVCache(LLAMA.config, num_blocks, block_size, torch.bfloat16)
    monkeypatch.setattr(VarlenAttention, "attend", attend)
    chosen = choose_attention(half_model(Cuda("cpu")), cache)
    assert type(chosen) is (VarlenAttention if kernel is agrees else GroupedAttention)
    assert chosen.cache is cache and not any(bool(layer.any()) for layer in cache.layers)
    n = min(2, num_blocks) * block_size
    everything = [[n - 1], [1]] if n > 1 else [[1]]
    assert calls == (everything if kernel is agrees else everything[:1])


def varlen(cache):
    "The attention before a step with a prompt, a decode, and a piece."
    attention = VarlenAttention(cache, HEADS)
    prompts = [range(6), range(10), range(7)]
    tables = [[5, 2], [0, 7, 3], [6, 1]]
    attention.prepare(trial_batch(prompts, tables, [(0, 6), (9, 10), (4, 7)], 4))
    return attention


def test_varlen_gets_what_its_documentation_says(monkeypatch):
    seen = {}

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
                    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
                    num_splits=None):
        seen.update(locals())
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    attention = varlen(PagedKVCache(LLAMA.config, 8, 4))
    attention.attend(torch.zeros(10, HEADS, 16), 0, 0.25)
    assert seen["cu_seq_q"].tolist() == [0, 6, 7, 10] and seen["cu_seq_k"] is None
    assert seen["seqused_k"].tolist() == [6, 10, 7]
    assert seen["block_table"].tolist() == [[5, 2, 0], [0, 7, 3], [6, 1, 0]]
    integers = {seen[name].dtype for name in ("cu_seq_q", "seqused_k", "block_table")}
    assert integers == {torch.int32}
    assert seen["key"].shape == seen["value"].shape == (8, 4, 2, 16)
    assert (seen["max_q"], seen["max_k"], seen["scale"]) == (6, 10, 0.25)
    assert seen["window_size"] == (-1, 0) and seen["num_splits"] == 1 and seen["enable_gqa"]


def test_an_older_pytorch_is_named(monkeypatch):
    def older(query, key, value, cu_seq_q, cu_seq_k): return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    attention = varlen(PagedKVCache(LLAMA.config, 8, 4))
    with pytest.raises(RuntimeError, match="takes no block_table: 2.12 or later is needed"):
        attention.attend(torch.zeros(10, HEADS, 16), 0, 0.25)
