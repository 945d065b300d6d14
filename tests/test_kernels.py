"""The fused decoder against the plain one, and the functions in C against torch."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from lora_folders import save, tiny
from test_transformer import KINDS, make, some_ids
from torch import nn

from nanollm import kernels
from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.compatibility import check_model, trial_batch
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.kernels import (
    SOURCE,
    FusedDecoder,
    PackedLinear,
    gain,
    joined,
    merge,
    pack_weight,
    packed_of,
)
from nanollm.lora import AdapterPool, LoRAForward, LoRALinear, read_adapter
from nanollm.model import ModelError, load_model, swap_modules, weight_bytes
from nanollm.native import FLAGS, NativeError, load
from nanollm.paged_attention import GroupedAttention, PagedKVCache, ReferenceAttention
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler
from nanollm.transformer import Decoder, causal_attention, rms_norm, rope_tables, rotate

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.bfloat16)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.03} # relative, of logits
OLDER = (*FLAGS, "-mno-avx512f") # a CPU without AVX-512
PLAIN = ("-O1", "-fopenmp", "-shared", "-fPIC", "-w") # no vectors but those of every CPU
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
by_flags = pytest.mark.parametrize("flags", [FLAGS, OLDER, PLAIN],
                                   ids=["own", "older", "plain"])
by_packing = pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])


@pytest.fixture(autouse=True)
def packs(request, monkeypatch):
    "The trial's result must not depend on what else runs here."
    callspec = getattr(request.node, "callspec", None)
    value = callspec.params.get("packs", True) if callspec else True
    monkeypatch.setattr(kernels, "gain", lambda *shape: 2.0 if value else 0.5)
    return value


def pointers(*tensors):
    return [None if t is None else t.data_ptr() for t in tensors]


def near(found, expected):
    limit = 1e-5 if found.dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def distance(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


# the functions


@by_dtype
@by_flags
@pytest.mark.parametrize("T, E", [(1, 1), (1, 576), (3, 7), (40, 576), (7, 33)])
def test_add_norm(dtype, flags, T, E):
    x, y, out = (torch.randn(T, E).to(dtype) for _ in range(3))
    weight, expected, c = torch.rand(E).to(dtype), x + y, load(SOURCE, dtype, flags)
    near_x = x.clone()
    c.add_norm(*pointers(near_x, None, weight, out), 1e-5, T, E)
    assert torch.equal(near_x, x)
    near(out, rms_norm(x, weight, 1e-5))
    c.add_norm(*pointers(x, y, weight, out), 1e-5, T, E)
    near(x, expected)
    near(out, rms_norm(expected, weight, 1e-5))


@by_dtype
@by_flags
@pytest.mark.parametrize("T, H, K, D, normed", [
    (1, 1, 1, 2, False), (5, 6, 2, 6, True), (9, 8, 1, 10, True), (30, 4, 4, 80, False),
    (3, 3, 3, 256, True)])
def test_rope_write(dtype, flags, T, H, K, D, normed):
    noise = torch.Generator().manual_seed(T)
    qkv = torch.randn(T, (H + 2 * K) * D, generator=noise).to(dtype)
    q, k, v = qkv.view(T, -1, D).split([H, K, K], dim=1)
    norms = [torch.rand(D, generator=noise).add(0.5).to(dtype) for _ in range(2)]
    tables = rope_tables(torch.arange(T) + 50, torch.rand(D // 2, generator=noise), 1.1, dtype)
    layer = torch.full((T + 3, 2, K, D), 7.0, dtype=dtype)
    slots = torch.randperm(T + 3, generator=noise)[:T]
    query, finite = torch.empty(T, H, D, dtype=dtype), torch.zeros(T, dtype=torch.bool)
    load(SOURCE, dtype, flags).rope_write(
        *pointers(q, k, v), qkv.shape[1], qkv.shape[1],
        *pointers(*(norms if normed else (None, None))), 1e-6,
        *pointers(*tables, query, layer, slots, finite), T, H, K, D)
    if normed:
        q, k = rms_norm(q, norms[0], 1e-6), rms_norm(k, norms[1], 1e-6)
    limit = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(query, rotate(q, *tables), rtol=limit, atol=limit)
    torch.testing.assert_close(layer[slots], torch.stack([rotate(k, *tables), v], 1),
                               rtol=limit, atol=limit)
    others = sorted(set(range(T + 3)) - set(slots.tolist()))
    assert (layer[others] == 7).all() and finite.all()


@by_dtype
@by_flags
def test_what_is_no_number_is_written_as_zero_and_noted(dtype, flags):
    T, H, K, D = 4, 2, 1, 4
    q, k, v = torch.ones(T, H, D), torch.ones(T, K, D), torch.ones(T, K, D)
    k[1, 0, 2], v[2, 0, 3] = math.nan, -math.inf
    q, k, v = (x.to(dtype) for x in (q, k, v))
    tables = [torch.ones(T, 1, D, dtype=dtype), torch.zeros(T, 1, D, dtype=dtype)]
    c, query = load(SOURCE, dtype, flags), torch.empty_like(q)
    for slots in (torch.arange(T), None):
        layer, finite = torch.ones(T, 2, K, D, dtype=dtype), torch.zeros(T, dtype=torch.bool)
        c.rope_write(*pointers(q, k, v), H * D, K * D, None, None, 1e-6,
                     *pointers(*tables, query, layer, slots, finite), T, H, K, D)
        assert finite.tolist() == [True, False, False, True]
        assert layer[2, 1, 0, :3].eq(1).all() and layer[0].eq(1).all()
        if slots is None: # for an attention that looks itself
            assert not layer[1, 0].isfinite().all() and layer[2, 1, 0, 3] == -math.inf
        else:
            assert layer.isfinite().all() and layer[2, 1, 0, 3] == 0 and layer[1, 0, 0, 2] == 0


@by_dtype
@by_flags
@pytest.mark.parametrize("T, M", [(1, 1), (1, 1536), (20, 1000), (3, 17)])
def test_silu_mul(dtype, flags, T, M):
    both = (torch.randn(T, 2 * M) * 20).to(dtype)
    gate, up = both.split(M, dim=1)
    out = torch.empty(T, M, dtype=dtype)
    load(SOURCE, dtype, flags).silu_mul(*pointers(gate, up), 2 * M, *pointers(out), T, M)
    torch.testing.assert_close(out.float(), F.silu(gate.float()) * up.float(), rtol=0.01,
                               atol=1e-6 if dtype == torch.float32 else 0.02)


@by_flags
def test_silu_of_large_numbers_and_of_none(flags):
    gate = torch.tensor([[-1e30, -200, -88, 0, 88, 200, 1e30, math.nan]])
    up, out = torch.ones_like(gate), torch.empty_like(gate)
    load(SOURCE, torch.float32, flags).silu_mul(*pointers(gate, up), 8, *pointers(out), 1, 8)
    assert out[0, -1].isnan()
    torch.testing.assert_close(out[0, 1:7], F.silu(gate)[0, 1:7], rtol=1e-5, atol=1e-30)


@by_dtype
@by_flags
@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 33])
@pytest.mark.parametrize("size, out, biased", [
    (2, 1, True), (576, 96, False), (70, 33, True), (34, 31, True), (1536, 64, False)])
def test_linear(dtype, flags, T, size, out, biased):
    x, weight = torch.randn(T, size).to(dtype), torch.randn(out, size).to(dtype)
    bias = torch.randn(out).to(dtype) if biased else None
    y, packed = torch.full((T, out), math.nan, dtype=dtype), pack_weight(weight)
    load(SOURCE, dtype, flags).linear(*pointers(x, packed, bias, y), T, size, out, y.itemsize)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert distance(y.double(), expected) < (1e-6 if dtype == torch.float32 else 4e-3)


@by_dtype
def test_a_row_does_not_depend_on_its_batch(dtype):
    module = PackedLinear.of(nn.Linear(96, 80, dtype=dtype))
    x = torch.randn(37, 96).to(dtype)
    with torch.inference_mode():
        whole = module(x)
        assert torch.equal(torch.cat([module(row[None]) for row in x]), whole)
        assert torch.equal(module(x[:, None])[:, 0], whole)
        assert module(x[:0]).shape == (0, 80)


@by_dtype
def test_no_number_in_a_row_stays_in_it(dtype):
    module, x = PackedLinear.of(nn.Linear(64, 64, dtype=dtype)), torch.ones(9, 64, dtype=dtype)
    x[4, 3] = math.nan
    with torch.inference_mode():
        assert module(x).isfinite().all(1).tolist() == [i != 4 for i in range(9)]


# packing and merging


@by_dtype
@pytest.mark.parametrize("out", [1, 31, 32, 100])
def test_a_packed_module_knows_its_weight(dtype, out):
    linear = nn.Linear(6, out, dtype=dtype)
    module = PackedLinear.of(linear)
    assert torch.equal(module.weight, linear.weight)
    assert (module.in_features, module.out_features) == (6, out)


def test_merged_parts_share_their_memory():
    linears = [nn.Linear(16, out) for out in (64, 32, 5)]
    x = torch.randn(3, 16)
    with torch.inference_mode():
        expected = torch.cat([linear(x) for linear in linears], 1)
        parts = [PackedLinear.of(linear) for linear in linears]
        [whole] = merge(parts)
        near(whole(x), expected)
        near(torch.cat([part(x) for part in parts], 1), expected)
    own = whole.packed.untyped_storage().data_ptr()
    assert all(part.packed.untyped_storage().data_ptr() == own for part in parts)
    assert merge(parts)[0].packed.untyped_storage().data_ptr() == own # nothing is copied twice


def test_a_weight_that_has_changed_is_packed_anew():
    linear = nn.Linear(16, 8).requires_grad_(False)
    first = packed_of(linear)
    assert packed_of(linear) is first
    linear.weight.mul_(2)
    second = packed_of(linear)
    assert second is not first and torch.equal(second.weight, linear.weight)
    del first, second
    gone = weakref.ref(packed_of(linear))
    del linear
    gc.collect()
    assert gone() is None


def test_what_cannot_be_merged():
    plain = [nn.Linear(16, 32, bias=False) for _ in range(2)]
    for modules in (plain, [plain[0], PackedLinear.of(plain[1])]):
        assert merge(modules) is modules
    odd = [PackedLinear.of(nn.Linear(16, out)) for out in (5, 32)]
    assert merge(odd) is odd and len(merge(odd[::-1])) == 1
    mixed = [PackedLinear.of(nn.Linear(16, 32, bias=bias)) for bias in (True, False)]
    assert merge(mixed) is mixed


def test_joined_copies_only_what_lies_apart():
    whole = torch.arange(12.0).view(6, 2)
    assert joined([whole[:2], whole[2:5], whole[5:]]).data_ptr() == whole.data_ptr()
    swapped = joined([whole[2:4], whole[:2]])
    assert torch.equal(swapped, torch.cat([whole[2:4], whole[:2]]))
    assert swapped.data_ptr() != whole.data_ptr()


def test_the_trial_gives_a_number():
    assert 0 < gain(64, 32, torch.float32, 1) < math.inf


def test_only_plain_linears_are_packed():
    model = make("llama")
    class Other(nn.Linear):
        pass
    swap_modules(model, lambda name, m: Other(64, m.out_features)
                 if name.endswith("up_proj") else None)
    FusedDecoder(model).release()
    kinds = {name.split(".")[-1]: type(m) for name, m in model.named_modules()}
    assert kinds["up_proj"] is Other and kinds["down_proj"] is PackedLinear


# the decoder


@by_packing
@by_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_plain_decoder(kind, dtype, packs):
    model = make(kind, dtype)
    plain, expected = Decoder(model), {}
    for T in (1, 2, 9, 40):
        every = torch.arange(T)
        expected[T] = plain(some_ids(T), every + 3, causal_attention, every)
    fused = FusedDecoder(model)
    for T, logits in expected.items():
        every = torch.arange(T)
        found = fused(some_ids(T), every + 3, causal_attention, every)
        assert found.dtype in (dtype, torch.float32) and found.shape == logits.shape
        assert distance(found, logits) < LIMITS[dtype]
    check_model(model, fused)
    check_model(model, Decoder(model))


@pytest.mark.parametrize("kind, changes", [
    *((kind, {"head_dim": D}) for kind in ("llama", "qwen3") for D in (2, 6, 10, 24, 80)),
    *(("qwen3", {"num_attention_heads": H, "num_key_value_heads": K, "hidden_size": 48})
      for H, K in ((1, 1), (8, 1), (6, 2), (4, 4))),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}), ("llama", {"num_hidden_layers": 1}),
    ("llama", {"intermediate_size": 97, "hidden_size": 68}),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                   "original_max_position_embeddings": 128}})], ids=str)
def test_shapes(kind, changes, packs):
    for dtype in DTYPES:
        model, every = make(kind, dtype, **changes), torch.arange(11)
        expected = Decoder(model)(some_ids(11), every, causal_attention, every)
        found = FusedDecoder(model)(some_ids(11), every, causal_attention, every)
        assert distance(found, expected) < LIMITS[dtype]


@by_dtype
@pytest.mark.parametrize("kind", [GroupedAttention, ReferenceAttention])
def test_over_blocks_the_cache_is_the_same(kind, dtype):
    model, results = make("qwen3", dtype), []
    prompts = [some_ids(n).tolist() for n in (13, 5, 9)]
    for forward in (Decoder(model), FusedDecoder(model)):
        cache = PagedKVCache(model.config, 12, 4, dtype)
        attention = kind(cache, 4)
        tables, logits = [[3, 1, 7, 2], [5, 4], [8, 0, 11]], []
        for parts in ([(0, 6), (0, 5), (0, 1)], [(6, 12), (1, 9)], [(12, 13)]):
            keep = {3: (0, 1, 2), 2: (0, 2), 1: (0,)}[len(parts)]
            batch = trial_batch([prompts[i] for i in keep], [tables[i] for i in keep], parts, 4)
            attention.prepare(batch)
            rows = torch.tensor(batch.rows[1::2] or [0])
            logits.append(forward(torch.tensor(batch.token_ids), torch.tensor(batch.positions),
                                  attention, rows))
            assert attention.finite.dtype == torch.bool and attention.finite.all()
        results.append((torch.cat(logits), torch.stack(cache.layers)))
    (expected, blocks), (found, own) = results
    assert distance(found, expected) < LIMITS[dtype] and distance(own, blocks) < LIMITS[dtype]


class OwnWrite(GroupedAttention):
    "Writes keys and values itself."
    calls = 0

    def __call__(self, query, key, value, layer, scaling):
        self.calls += 1
        return super().__call__(query, key, value, layer, scaling)


class OtherCache(PagedKVCache):
    "Keeps keys and values in its own way."
    writes = 0

    def write(self, layer, slots, key, value):
        self.writes += 1
        super().write(layer, slots, key, value)


def test_an_attention_or_a_cache_of_another_kind_is_asked():
    model = make("llama")
    fused, every = FusedDecoder(model), torch.arange(7)
    expected = fused(some_ids(7), every, causal_attention, every)
    batch = trial_batch([some_ids(7).tolist()], [[0, 1]], [(0, 7)], 4)
    for kind, store in ((OwnWrite, PagedKVCache), (GroupedAttention, OtherCache)):
        attention = kind(store(model.config, 2, 4), 4)
        attention.prepare(batch)
        near(fused(some_ids(7), every, attention, every), expected)
        assert attention.finite.all()
        assert getattr(attention, "calls", 0) or attention.cache.writes == 3


def test_one_without_numbers_is_noted_and_hurts_nobody():
    model, results = make("llama"), []
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = math.nan
    for forward in (Decoder(model), FusedDecoder(model)):
        cache = PagedKVCache(model.config, 4, 4)
        attention = GroupedAttention(cache, 4)
        attention.prepare(trial_batch([[1, 2, 3], [4, 5]], [[0], [1]], [(0, 3), (0, 2)], 4))
        logits = forward(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 1, 2, 0, 1]),
                         attention, torch.arange(5))
        results.append(logits)
        assert attention.finite.tolist() == [True] * 4 + [False]
        assert all(layer.isfinite().all() for layer in cache.layers)
    near(results[1][:4], results[0][:4])
    assert results[1][4].isnan().any()


def test_logits_are_not_written_over_by_the_next_step():
    model, every = make("llama"), torch.arange(4)
    fused = FusedDecoder(model)
    first = fused(some_ids(4), every, causal_attention, every)
    kept = first.clone()
    fused(some_ids(4) + 1, every, causal_attention, every)
    assert torch.equal(first, kept)


@by_packing
def test_an_engine_makes_the_tokens_of_generate(packs):
    model = make("qwen3", initializer_range=0.05)
    prompts = [some_ids(n).tolist() for n in (3, 17, 40)]
    expected = [list(generate(model, prompt, 9)) for prompt in prompts]
    runner = ModelRunner(FusedDecoder(model),
                         GroupedAttention(PagedKVCache(model.config, 40, 4), 4))
    engine = Engine(runner, Scheduler(BlockManager(40, 4), ChunkedPrefill(), 4, 16))
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=9))
    requests = list(engine.requests.values())
    while engine.has_unfinished:
        engine.step()
    assert [request.output_ids for request in requests] == expected
    assert [list(generate(model, prompt, 9)) for prompt in prompts] == expected


def test_a_second_decoder_over_the_same_model_copies_nothing():
    model, every = make("qwen2"), torch.arange(5)
    first, second = FusedDecoder(model), FusedDecoder(model)
    places = [[f.layers[0].down.__self__.packed.data_ptr(),
               f.layers[0].qkv[0].__self__.packed.data_ptr()] for f in (first, second)]
    assert places[0][0] == places[1][0] # q, k and v of tiny heads cannot be joined in place
    results = [f(some_ids(5), every, causal_attention, every) for f in (first, second)]
    assert torch.equal(*results)


@by_dtype
def test_the_model_is_left_alone_until_its_weights_are_released(dtype):
    model, every = make("qwen2", dtype), torch.arange(5)
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    fused = FusedDecoder(model)
    expected = fused(some_ids(5), every, causal_attention, every)
    assert before == {name: (type(m), id(m)) for name, m in model.named_modules()}
    plain, size = model(some_ids(5)[None]).logits[0], weight_bytes(model)
    gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    fused.release()
    gc.collect()
    assert gone() is None and type(model.lm_head) is PackedLinear
    assert weight_bytes(model) < 1.3 * size # panels are filled up to 32 outputs
    assert distance(model(some_ids(5)[None]).logits[0], plain) < LIMITS[dtype]
    assert torch.equal(fused(some_ids(5), every, causal_attention, every), expected)
    again = FusedDecoder(model)
    assert torch.equal(again(some_ids(5), every, causal_attention, every), expected)
    again.release()


@by_packing
@pytest.mark.parametrize("order", ["pool first", "fused first"])
def test_adapters(tmp_path, packs, order):
    folder = save(tmp_path / "a", only=("q_proj", "v_proj", "down_proj"))
    batch = trial_batch([[1, 2, 3], [4, 5, 6, 7]], [[0], [1]], [(0, 3), (0, 4)], 4)
    results = []
    for kind in (Decoder, FusedDecoder):
        model = tiny()
        if order == "fused first":
            kind(model)
        pool = AdapterPool(model, 2, 8)
        adapter = read_adapter(folder, model, 8)
        pool.add(adapter)
        forward = LoRAForward(kind(model), pool)
        assert type(model.model.layers[0].self_attn.q_proj) is LoRALinear
        attention = GroupedAttention(PagedKVCache(model.config, 2, 4), 4)
        for names in ([adapter.digest, None], [None, None]):
            batch.adapters[:] = names
            attention.prepare(batch)
            results.append(forward_batch(forward, attention, batch))
    near(results[2], results[0])
    near(results[3], results[1])
    assert (results[0] - results[1])[:3].abs().max() > 0.01


def forward_batch(forward, attention, batch):
    attention.batch = batch
    return forward(torch.tensor(batch.token_ids), torch.tensor(batch.positions), attention,
                   torch.arange(len(batch.token_ids)))


class Doubled(nn.Module):
    "A linear module of another kind, which can be merged."

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape

    def forward(self, x):
        return F.linear(x, self.weight * 2)

    @classmethod
    def merged(cls, modules):
        return cls(torch.cat([module.weight for module in modules]))


def test_modules_of_another_kind():
    model, every = make("llama"), torch.arange(6)
    swap_modules(model, lambda name, m: Doubled(m.weight.data / 2) if "_proj" in name else None)
    expected = Decoder(model)(some_ids(6), every, causal_attention, every)
    fused = FusedDecoder(model)
    assert len(fused.layers[0].qkv) == len(fused.layers[0].gate_up) == 1
    near(fused(some_ids(6), every, causal_attention, every), expected)


# what it refuses


def test_a_dtype_without_kernels():
    with pytest.raises(NativeError, match="float16"):
        FusedDecoder(make("llama", torch.float16))


def test_an_unsupported_model():
    model = make("llama")
    model.config.hidden_act = "gelu"
    with pytest.raises(ModelError, match="gelu"):
        FusedDecoder(model)


def test_a_failed_decoder_leaves_the_model_as_it_was(monkeypatch):
    def fail(*args):
        raise NativeError("no compiler")
    model = make("llama")
    monkeypatch.setattr(kernels, "load", fail)
    with pytest.raises(NativeError, match="no compiler"):
        FusedDecoder(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_a_module_of_another_dtype_is_left_alone():
    model = load_model("tiny-llama", load_format="dummy", device="cpu", dtype="bfloat16",
                       progress=False)
    model.lm_head = nn.Linear(64, 320, bias=False) # float32 in a model of bfloat16
    assert not kernels.packable(model.lm_head, model.dtype)
    FusedDecoder(model).release()
    assert type(model.lm_head) is nn.Linear


def test_logits_are_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    linear = nn.Linear(64, 33, bias=False, dtype=torch.bfloat16)
    x, module = torch.randn(5, 64, dtype=torch.bfloat16), PackedLinear.of(linear)
    narrow, module.wide = module(x), True
    assert module(x).dtype == torch.float32 and torch.equal(module(x).bfloat16(), narrow)
    torch.testing.assert_close(module(x), F.linear(x.float(), linear.weight.float()))
