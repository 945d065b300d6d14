"""Keys and values in eight bits: what is kept, what comes back, what attention makes of it."""

import random

import pytest
import torch

from nanollm.compatibility import trial_batch
from nanollm.model import kv_bytes_per_token, load_model
from nanollm.paged_attention import GroupedAttention, PagedKVCache, ReferenceAttention
from nanollm.quantized_cache import (
    FORMATS,
    QuantizedKVCache,
    kept_as,
    kv_bytes,
    make_kv_cache,
    pack,
    unpack,
)
from nanollm.transformer import Decoder

MODEL = load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32",
                   progress=False)
CONFIG = MODEL.config # 2 layers, 2 kv heads of 16
by_kind = pytest.mark.parametrize("kind", FORMATS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
ERRORS = {"int8": 0.01, "fp8": 0.04, "fp8_e4m3": 0.04, "fp8_e5m2": 0.08}


def test_names():
    assert kept_as("auto", torch.bfloat16) == torch.bfloat16
    assert kept_as("fp8", torch.float32) == kept_as("fp8_e4m3", torch.float32)
    for kind in ("int4", "", "FP8", None):
        with pytest.raises(ValueError, match="known: auto, fp8, fp8_e4m3, fp8_e5m2, int8"):
            kept_as(kind, torch.float32)
        with pytest.raises(ValueError, match="known"):
            make_kv_cache(CONFIG, 2, 4, torch.float32, kind=kind)


@by_dtype
@pytest.mark.parametrize("kind", ["auto", *FORMATS])
def test_bytes_are_counted_as_they_are_taken(kind, dtype):
    cache = make_kv_cache(CONFIG, 5, 8, dtype, kind=kind)
    assert cache.nbytes == 5 * 8 * kv_bytes(CONFIG, dtype, kind)
    assert cache.dtype == dtype and cache.device.type == "cpu"
    assert (type(cache) is PagedKVCache) == (kind == "auto")


def test_auto_is_what_it_was():
    assert kv_bytes(CONFIG, torch.bfloat16) == kv_bytes_per_token(CONFIG, torch.bfloat16)
    assert kv_bytes(CONFIG, torch.bfloat16, "fp8") * 2 == kv_bytes(CONFIG, torch.bfloat16)


@by_dtype
@by_kind
def test_what_goes_in_comes_out(kind, dtype):
    torch.manual_seed(0)
    cache = QuantizedKVCache(CONFIG, 4, 4, dtype, kind=kind)
    key, value = torch.randn(2, 6, 2, 16).to(dtype)
    cache.write(1, torch.tensor([15, 0, 7, 8, 3, 4]), key, value)
    back = cache.read(1, torch.arange(4)).flatten(0, 1) # (16, 2, K, D)
    assert back.dtype == dtype and back.shape == (16, 2, 2, 16)
    for i, slot in enumerate((15, 0, 7, 8, 3, 4)):
        for got, wanted in ((back[slot, 0], key[i]), (back[slot, 1], value[i])):
            assert float((got - wanted).float().norm() / wanted.float().norm()) < ERRORS[kind]
    assert not bool(back[[1, 2, 5, 6, 9, 10, 11, 12, 13, 14]].any())
    assert not bool(cache.read(0, torch.arange(4)).any())
    swapped = cache.read(1, torch.tensor([3, 0, 3]))
    assert torch.equal(swapped.flatten(0, 1)[3], back[15]) and len(swapped) == 3


@by_kind
def test_what_is_no_number_is_stored_as_zero_and_too_large_as_the_largest(kind):
    cache = QuantizedKVCache(CONFIG, 1, 4, torch.float32, kind=kind)
    key = torch.ones(2, 2, 16)
    key[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    key[1, 1, 0] = -1e30
    cache.write(0, torch.tensor([2, 0]), key, key)
    back = cache.read(0, torch.tensor([0]))[0, :, 0]
    assert bool(back.isfinite().all()) and not bool(back[2, 0, :3].any())
    assert float(back[2, 0, 3]) == pytest.approx(1, rel=0.01)
    limit = 1e30 if kind == "int8" else torch.finfo(FORMATS[kind]).max
    assert float(back[0, 1, 0]) == pytest.approx(-limit, rel=0.01)


@pytest.mark.parametrize("scale", [0, 1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_int8_takes_any_size(scale):
    x = torch.randn(5, 7).clamp(-1, 1) * scale
    back = unpack(pack(x, torch.int8), torch.int8, torch.float32)
    assert bool(back.isfinite().all())
    if scale > 1e-30:
        assert float(((back - x) / scale).abs().max()) < 0.01


@by_kind
def test_zero_stays_zero_and_the_sign_stays(kind):
    stored = FORMATS[kind]
    x = torch.tensor([[0.0, 1.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    back = unpack(pack(x, stored), stored, torch.float32)
    torch.testing.assert_close(back, x, atol=0.005, rtol=0.005)
    assert bool((back[1] == 0).all()) and float(back[0, 0]) == 0


@by_kind
@pytest.mark.parametrize("attention", [ReferenceAttention, GroupedAttention])
def test_attention_over_rounded_keys_is_attention_over_what_is_read(attention, kind):
    torch.manual_seed(0)
    lens, news = [30, 9, 17], [1, 9, 4]
    tables, parts = [[4, 0], [3], [1, 2]], [(n - new, n) for n, new in zip(lens, news)]
    batch = trial_batch([[0] * n for n in lens], tables, parts, 16)
    cache, plain = (make_kv_cache(CONFIG, 5, 16, torch.float32, kind=k) for k in (kind, "auto"))
    slots, kv = torch.arange(80), torch.randn(2, 80, 2, 16)
    cache.write(0, slots, *kv)
    plain.layers[0].copy_(cache.read(0, torch.arange(5)))
    query, results = torch.randn(14, 4, 16), []
    for each in (attention(cache, 4), ReferenceAttention(plain, 4)):
        each.prepare(batch)
        results.append(each.attend(query, 0, 0.25))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@by_kind
def test_a_model_decodes_over_it(kind):
    rng = random.Random(0)
    prompt = [rng.randrange(3, 250) for _ in range(20)]
    attention = GroupedAttention(QuantizedKVCache(CONFIG, 8, 4, kind=kind), 4)
    forward, ids, computed, logits = Decoder(MODEL), list(prompt), 0, None
    with torch.inference_mode():
        for _ in range(5):
            batch = trial_batch([ids], [list(range(8))], [(computed, len(ids))], 4)
            attention.prepare(batch)
            computed = len(ids)
            logits = forward(*map(attention.tensor, (batch.token_ids, batch.positions)),
                             attention, torch.tensor([len(batch.rows) - 1]))
            ids.append(int(logits.argmax()))
        right = MODEL(torch.tensor([ids[:-1]]), use_cache=False).logits[0, -1:]
    assert float((logits - right).norm() / right.norm()) < 8 * ERRORS[kind]
