"""Quantized linears against the dense weights that their codes stand for."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import nanollm.quantization as quantization
from nanollm.generate import generate
from nanollm.model import DUMMY_SHAPES, ModelError, dummy_model, weight_bytes
from nanollm.native import FLAGS, NativeError
from nanollm.quantization import (
    FORMATS,
    GROUP,
    CodedLinear,
    Float8Linear,
    Int4Linear,
    Int8Linear,
    choose,
    encode,
    quantize,
)
from nanollm.transformer import Decoder, causal_attention

CPU = torch.device("cpu")
PLAIN = ("-O1", "-fopenmp", "-shared", "-fPIC", "-w")
AVX2 = (*(flag for flag in FLAGS if "native" not in flag), "-mavx2", "-mfma")
HAS_AVX2 = "avx2" in open("/proc/cpuinfo").read()
coded = [partial(CodedLinear, bits=4), partial(CodedLinear, bits=8)]
every = [*coded, Int8Linear, Int4Linear, Float8Linear]
names = ["coded4", "coded8", "int8", "int4", "fp8"]
by_format = pytest.mark.parametrize("make", every, ids=names)
by_bits = pytest.mark.parametrize("make", coded, ids=["4", "8"])
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny(name="tiny-llama", **changes):
    return dummy_model(AutoConfig.for_model(**DUMMY_SHAPES[name] | changes), CPU, torch.float32)


def rounded_rows(x):
    "Activations as the C function sees them, in float32."
    width = x.shape[1]
    groups = F.pad(x.float(), (0, -width % GROUP)).unflatten(1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / step).round() * step).flatten(1)[:, :width]


def dense(module):
    if isinstance(module, Int4Linear):
        pytest.skip("its codes are in torch's own order")
    return module.dequantize()


def error(y, right):
    return float((y.float() - right).norm() / right.norm().clamp(min=1e-20))


SHAPES = [(1, 1), (16, 32), (33, 50), (576, 960), (100, 1536), (7, 31), (48, 4097)]


@by_bits
@by_dtype
@pytest.mark.parametrize("outs, width", SHAPES)
def test_products_equal_those_of_the_dense_weights(make, dtype, outs, width):
    module = make(torch.randn(outs, width).to(dtype), torch.randn(outs).to(dtype))
    weight = dense(module)
    for rows in (1, 2, 3, 7, 8, 9, 17):
        x = torch.randn(rows, width).to(dtype)
        y = module(x)
        assert y.dtype == dtype and y.shape == (rows, outs) and y.is_contiguous()
        right = rounded_rows(x) @ weight.T + module.bias.float()
        assert error(y, right) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@by_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_formats_are_near_the_plain_module(make, dtype, bias):
    weight, x = torch.randn(40, 96).to(dtype), torch.randn(5, 96).to(dtype)
    bias = torch.randn(40).to(dtype) if bias else None
    y = make(weight, bias)(x)
    right = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert y.dtype == dtype and y.shape == (5, 40) and error(y, right) < 0.12


@by_format
@pytest.mark.parametrize("outs, width", [(33, 50), (1, 1), (16, 7)])
def test_odd_sizes(make, outs, width):
    weight = torch.randn(outs, width)
    y = make(weight)(torch.ones(3, width))
    assert y.shape == (3, outs) and error(y, torch.ones(3, width) @ weight.T) < 0.25


@by_format
def test_no_rows_and_leading_dimensions(make):
    module = make(torch.randn(32, 64))
    assert module(torch.randn(0, 64)).shape == (0, 32)
    x = torch.randn(2, 3, 64)
    assert module(x).shape == (2, 3, 32)
    assert torch.allclose(module(x)[1, 2], module(x[1, 2][None])[0], atol=1e-5)
    assert torch.allclose(module(x.transpose(0, 1)).transpose(0, 1), module(x), atol=1e-5)


@by_format
def test_a_row_of_zeros_is_the_bias(make):
    bias = torch.randn(32)
    x = torch.randn(3, 64)
    x[1] = 0
    assert torch.equal(make(torch.randn(32, 64), bias)(x)[1], bias)


@by_format
@by_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_in_its_row(make, dtype, bad):
    module = make(torch.randn(48, 64).to(dtype))
    x = torch.randn(9, 64).to(dtype)
    right = module(x)
    x[4, 33] = bad
    y = module(x)
    assert not y[4].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(y[others], right[others])


@by_bits
def test_tiny_and_huge_activations(make):
    module = make(torch.randn(32, 64))
    x = torch.randn(4, 64)
    right = module(x)
    for by in (1e30, 1e-20):
        assert error(module(x * by) / by, right) < 1e-4
    assert not module(x * 1e-38).any() # below what a scale can say
    spread = torch.cat((x[:, :32] * 1e10, x[:, 32:] * 1e-10), 1) # each group has its own scale
    assert error(module(spread), spread @ module.dequantize().T) < 0.02


@by_bits
@by_dtype
def test_a_row_does_not_depend_on_the_others(make, dtype):
    module = make(torch.randn(80, 100).to(dtype))
    x = torch.randn(40, 100).to(dtype)
    y = module(x)
    for first, last in ((0, 1), (3, 5), (8, 16), (5, 37)):
        assert torch.equal(module(x[first:last]), y[first:last])


@by_bits
def test_many_rows(make):
    module = make(torch.randn(20, 40))
    x = torch.randn(4096, 40)
    assert error(module(x), rounded_rows(x) @ module.dequantize().T) < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outs, width", SHAPES)
def test_codes_in_c_are_those_of_torch(bits, outs, width):
    weight = torch.randn(outs, width)
    codes, scale, low = encode(weight, bits)
    right = (scale.float()[..., None] * codes + low.float()[..., None]).flatten(1)
    assert torch.equal(CodedLinear(weight, bits=bits).dequantize(), right[:outs, :width])
    most = (scale.max() * 0.51 + low.abs().max() * 2**-10).item()
    assert (right[:outs, :width] - weight).abs().max() <= most


def test_weights_in_q4_1_come_back():
    scale, low = (torch.rand(24, 3, 1) / 50).half(), torch.randn(24, 3, 1).half()
    codes = torch.randint(0, 16, (24, 3, 32))
    codes[..., 5], codes[..., 20] = 0, 15
    weight = (scale.float() * codes + low.float()).flatten(1)
    assert (CodedLinear(weight, bits=4).dequantize() - weight).abs().max() <= 1e-6


@by_bits
def test_constant_weights(make):
    assert torch.equal(make(torch.full((16, 64), 0.5)).dequantize(), torch.full((16, 64), 0.5))
    assert not make(torch.zeros(16, 64))(torch.randn(3, 64)).any()


@by_bits
@pytest.mark.parametrize("bad", [1e8, float("nan"), float("inf")])
def test_weights_that_no_scale_can_hold_are_refused(make, bad):
    weight = torch.randn(16, 64)
    weight[3, 3] = bad
    with pytest.raises(ValueError, match="65504"):
        make(weight)


@pytest.mark.parametrize("flags", [PLAIN, pytest.param(AVX2, marks=pytest.mark.skipif(
    not HAS_AVX2, reason="this CPU has no AVX2"))], ids=["plain", "avx2"])
@by_bits
@by_dtype
def test_other_branches(make, flags, dtype, monkeypatch):
    weight, x = torch.randn(33, 70).to(dtype), torch.randn(11, 70).to(dtype)
    right = make(weight)
    monkeypatch.setattr(quantization, "load", partial(quantization.load, flags=flags))
    other = make(weight)
    assert torch.equal(other.codes, right.codes)
    assert error(other(x), right(x).float()) < (1e-2 if dtype == torch.bfloat16 else 1e-3)


@by_format
def test_merging(make):
    sizes = (48, 16, 16)
    biases = [torch.randn(n) for n in sizes]
    modules = [make(torch.randn(n, 64), bias) for n, bias in zip(sizes, biases)]
    x = torch.randn(5, 64)
    apart = torch.cat([module(x) for module in modules], dim=1)
    bytes_before = sum(module.nbytes for module in modules)
    whole = type(modules[0]).merged(modules)
    if isinstance(modules[0], Int4Linear):
        assert whole is None
        return
    assert whole.out_features == 80 and whole.nbytes == bytes_before
    assert torch.allclose(whole(x), apart, atol=1e-4)
    assert torch.allclose(torch.cat([module(x) for module in modules], dim=1), apart, atol=1e-4)
    assert modules[2].codes.untyped_storage().data_ptr() == whole.codes.data_ptr()


def test_what_cannot_be_merged():
    four = CodedLinear(torch.randn(16, 64), bits=4)
    eight = CodedLinear(torch.randn(16, 64), bits=8)
    odd = CodedLinear(torch.randn(17, 64), bits=4)
    biased = CodedLinear(torch.randn(16, 64), torch.randn(16), bits=4)
    wide = CodedLinear(torch.randn(16, 63), bits=4)
    for other in (eight, odd, biased, wide, nn.Linear(64, 16), Int8Linear(torch.randn(16, 64))):
        assert CodedLinear.merged([four, other]) is None


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
def test_models(kind, name):
    model, plain = tiny(name), tiny(name)
    assert quantize(model, kind) is model
    assert type(model.model.embed_tokens) is nn.Embedding
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert weight_bytes(model) < weight_bytes(plain)
    ids = torch.arange(20)[None]
    own, right = model(ids).logits.detach(), plain(ids).logits.detach()
    assert own.shape == right.shape and error(own, right) < 0.5
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)


@pytest.mark.parametrize("kind", ["int4", "int8_dynamic"])
def test_our_forward_makes_the_tokens_of_the_naive_loop(kind):
    model = quantize(tiny(), kind)
    prompt = list(range(3, 23))
    right = list(generate(model, prompt, 8))
    decoder, ids = Decoder(model), list(prompt)
    for token in right:
        T = len(ids)
        logits = decoder(torch.tensor(ids), torch.arange(T), causal_attention,
                         torch.tensor([T - 1]))
        assert int(logits.argmax()) == token
        ids.append(token)


def test_biases_of_qwen2():
    config = dict(model_type="qwen2", vocab_size=64, hidden_size=64, intermediate_size=96,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  tie_word_embeddings=False)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for layer in plain.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    right = plain(torch.arange(9)[None]).logits.detach()
    own = quantize(plain, "int8_dynamic")
    assert own.model.layers[0].self_attn.q_proj.bias is not None
    assert error(own(torch.arange(9)[None]).logits.detach(), right) < 0.05


def test_the_rest_is_cast_and_rope_tables_are_not():
    model = quantize(tiny(), "int4", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model(torch.arange(5)[None]).logits.dtype == torch.bfloat16
    before = model.model.layers[0].mlp.up_proj.dequantize()
    assert torch.equal(model.float().model.layers[0].mlp.up_proj.dequantize(), before)


def test_the_head_has_eight_bits():
    model = quantize(tiny(), "int4", partial(CodedLinear, bits=4))
    assert model.lm_head.out_features == 320 and model.model.layers[0].mlp.up_proj.bits == 4
    model = quantize(tiny(), "int4", Int4Linear)
    assert type(model.lm_head) is Int8Linear


def test_twice():
    model = quantize(tiny(), "int4")
    codes = model.lm_head.codes
    assert quantize(model, "int4").lm_head.codes is codes
    with pytest.raises(ModelError, match="is quantized to int4 and cannot become int8"):
        quantize(model, "int8")


def test_what_cannot_be_quantized():
    with pytest.raises(ModelError, match="unknown quantization 'int3'"):
        quantize(tiny(), "int3")
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    gpt2.lm_head = nn.Identity()
    with pytest.raises(ModelError, match="no linear modules"):
        quantize(gpt2, "int8")
    with pytest.raises(ModelError, match="on meta: use fp8"):
        quantize(tiny().to("meta"), "int4")


def test_without_a_compiler(monkeypatch):
    def fail(*args, **more):
        raise NativeError("no C compiler was found")

    monkeypatch.setattr(quantization, "load", fail)
    assert choose("int4", torch.randn(32, 64), torch.float32) is Int4Linear
    model = quantize(tiny(), "int4")
    assert type(model.model.layers[0].mlp.up_proj) is Int4Linear
    with pytest.raises(ModelError, match="no C compiler was found.*use int8"):
        quantize(tiny(), "int8_dynamic")
