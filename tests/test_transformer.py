"Our forward against the unmodified model: architectures, shapes, RoPE, and what is refused."

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from nanollm.model import ModelError, swap_modules, weight_bytes
from nanollm.transformer import Decoder, causal_attention, forward_flops, matrix_shapes

SHAPE = dict(
    vocab_size=130, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    initializer_range=0.2, rms_norm_eps=1e-5, tie_word_embeddings=False, pad_token_id=None,
)
KINDS = ("llama", "mistral", "qwen2", "qwen3", "seed_oss")
by_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind="llama", dtype=torch.float32, **changes):
    "A tiny random model whose norms and biases are random, too."
    if kind == "mistral":
        changes.setdefault("sliding_window", None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SHAPE | changes))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            weight.normal_(0, 0.3)
    return model.to(dtype)


def some_ids(num):
    return torch.randint(0, 130, (num,), generator=torch.Generator().manual_seed(num))


def ours(model, ids, positions=None, attention=causal_attention):
    every = torch.arange(len(ids))
    return Decoder(model)(ids, every if positions is None else positions, attention, every)


def theirs(model, ids, positions=None):
    positions = torch.arange(len(ids)) if positions is None else positions
    return model(ids[None], position_ids=positions[None], use_cache=False).logits[0]


def assert_same(model, ids, positions=None):
    expected = theirs(model, ids, positions)
    found = ours(model, ids, positions)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


# equal to the unmodified model

@by_kind
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_equal_to_the_unmodified_model(kind, tied):
    model = make(kind, tie_word_embeddings=tied)
    for num in (1, 2, 33):
        assert_same(model, some_ids(num))
    assert_same(model, some_ids(9), torch.arange(9) + 400)


@by_kind
def test_the_same_greedy_tokens(kind):
    model, ids = make(kind), some_ids(5)
    found = expected = ids
    for _ in range(12):
        found = torch.cat([found, ours(model, found)[-1:].argmax(-1)])
        expected = torch.cat([expected, theirs(model, expected)[-1:].argmax(-1)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (8, 1), (6, 2), (1, 1), (16, 2)])
def test_heads_and_groups(kind, heads, kv_heads):
    width = 48 if heads == 6 else 64
    assert_same(make(kind, hidden_size=width, num_attention_heads=heads, head_dim=8,
                     num_key_value_heads=kv_heads), some_ids(17))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("head_dim", [2, 6, 10, 24, 80])
def test_head_sizes_that_are_not_width_over_heads(kind, head_dim):
    assert_same(make(kind, head_dim=head_dim), some_ids(17))


@pytest.mark.parametrize("kind, biases", [
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
])
def test_biases(kind, biases):
    model = make(kind, **biases)
    assert any(name.endswith("bias") for name, _ in model.named_parameters())
    assert_same(model, some_ids(17))


ROPES = {
    "default": {"rope_type": "default"},
    "slow": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn with its own factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7,
                                 "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_kinds_of_rope(kind, name):
    model = make(kind, rope_parameters={"rope_theta": 1e4} | ROPES[name])
    assert_same(model, some_ids(40))
    assert_same(model, some_ids(9), torch.arange(9) + 480)
    if name != "default":
        plain = make(kind, rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
        assert (ours(model, some_ids(40)) - theirs(plain, some_ids(40))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_to_the_truth_as_the_unmodified_model(kind, dtype):
    exact = theirs(make(kind), some_ids(33))
    model = make(kind, dtype)
    our_error = (ours(model, some_ids(33)).float() - exact).square().mean()
    their_error = (theirs(model, some_ids(33)).float() - exact).square().mean()
    assert our_error < 1.5 * their_error


def test_a_model_whose_frequencies_were_rounded_stays_equal():
    model = make().to(torch.bfloat16).to(torch.float32)
    assert_same(model, some_ids(33), torch.arange(33) + 300)


# what it is given

def test_rows_choose_which_logits_in_which_order():
    model, ids = make("qwen3"), some_ids(9)
    full = ours(model, ids)
    rows = torch.tensor([8, 0, 3, 3])
    found = Decoder(model)(ids, torch.arange(9), causal_attention, rows)
    torch.testing.assert_close(found, full[rows], rtol=0, atol=1e-5)
    assert Decoder(model)(ids, torch.arange(9), causal_attention, rows[:0]).shape == (0, 130)


@pytest.mark.parametrize("kind", KINDS)
def test_several_texts_in_one_row(kind):
    model, texts = make(kind), [some_ids(num) for num in (7, 1, 12)]
    lens = [len(text) for text in texts]

    def by_text(query, key, value, layer, scaling):
        split = zip(query.split(lens), key.split(lens), value.split(lens))
        return torch.cat([causal_attention(*qkv, layer, scaling) for qkv in split])

    positions = torch.cat([torch.arange(num) for num in lens])
    found = ours(model, torch.cat(texts), positions, by_text)
    expected = torch.cat([theirs(model, text) for text in texts])
    assert (found - expected).abs().max() < 1e-4


def test_attention_is_called_once_a_layer_with_heads_apart():
    model, calls = make("qwen3", head_dim=24), []

    def watching(query, key, value, layer, scaling):
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        calls.append((layer, query.shape, key.shape, value.shape, scaling))
        return causal_attention(query, key, value, layer, scaling)

    ours(model, some_ids(5), attention=watching)
    assert calls == [(i, (5, 4, 24), (5, 2, 24), (5, 2, 24), 24 ** -0.5) for i in range(3)]


def test_causal_attention_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 4, 8, generator=generator)
    k, v = torch.randn(2, 6, 2, 8, generator=generator)
    found = causal_attention(q, k, v, 0, 0.3)
    for t in range(6):
        for head in range(4):
            weights = (0.3 * k[:t + 1, head // 2] @ q[t, head]).softmax(0)
            torch.testing.assert_close(found[t, head], weights @ v[:t + 1, head // 2])


# the model's own modules

class Wrapped(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.base, self.calls = linear, 0

    def forward(self, x):
        self.calls += 1
        return self.base(x) + 0.01


@by_kind
def test_exchanged_modules_are_what_runs(kind):
    model = make(kind)
    decoder = Decoder(model)
    swap_modules(model, lambda name, m: Wrapped(m) if isinstance(m, nn.Linear) else None)
    every = torch.arange(9)
    found = decoder(some_ids(9), every, causal_attention, every)
    wrapped = [m for m in model.modules() if isinstance(m, Wrapped)]
    assert len(wrapped) == 3 * 7 + 1 and all(m.calls == 1 for m in wrapped)
    assert (found - theirs(model, some_ids(9))).abs().max() < 1e-4


@by_kind
def test_nothing_is_copied_and_nothing_is_kept(kind):
    model = make(kind)
    where = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    size, decoder, every = weight_bytes(model), Decoder(model), torch.arange(9)
    first = decoder(some_ids(9), every, causal_attention, every)
    assert decoder.model is model and weight_bytes(model) == size
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == where
    assert not any(isinstance(value, torch.Tensor) for value in vars(decoder).values())
    for weight in model.parameters():
        weight.mul_(1.1)
    assert (decoder(some_ids(9), every, causal_attention, every) - first).abs().max() > 1e-2
    assert_same(model, some_ids(9))


def test_no_gradients_are_recorded():
    model = make().requires_grad_(True)
    assert not ours(model, some_ids(3)).requires_grad


# what is refused

def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | settings}


LONG = dict(short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=128)
MIXED = ["full_attention", "sliding_attention", "full_attention"]
WINDOWS = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
REFUSED = [
    ("gemma2", {}, "model type 'gemma2' is none of llama"),
    ("olmo2", {}, "model type 'olmo2'"),
    ("qwen3_moe", {}, "model type 'qwen3_moe'"),
    ("llama", {"hidden_act": "gelu"}, "'gelu' and not by silu"),
    ("mistral", {"sliding_window": 128}, "window of 128 tokens"),
    ("qwen2", WINDOWS, "layers of type 'sliding_attention'"),
    ("qwen3", {"layer_types": MIXED}, "layers of type 'sliding_attention'"),
    ("llama", rope("dynamic"), "RoPE of kind 'dynamic' is none of default"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("qwen2", rope("longrope", **LONG), "'longrope'"),
    ("llama", rope("linear", partial_rotary_factor=0.5), "50% of each head"),
    ("llama", {"is_causal": False}, "looks ahead"),
]


@pytest.mark.parametrize("kind, changes, message", REFUSED)
def test_refused_by_name(kind, changes, message):
    config = AutoConfig.for_model(kind, **(SHAPE | changes))
    assert message in Decoder.unsupported(config)


def test_refused_when_a_model_is_taken():
    with pytest.raises(ModelError, match="window of 128 tokens.*model_impl='transformers'"):
        Decoder(make("mistral", sliding_window=128))


@by_kind
def test_the_family_is_taken(kind):
    assert Decoder.unsupported(make(kind).config) is None
    assert Decoder.unsupported(make(kind, hidden_act="swish").config) is None


def test_a_window_that_no_layer_uses_is_no_reason_to_refuse():
    model = make("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=3)
    assert_same(model, some_ids(17))


# the count

@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_matrix_shapes_are_those_of_the_model(kind):
    model = make(kind, head_dim=24)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    del linears["lm_head"]
    for name, linear in linears.items():
        shape = matrix_shapes(model.config)[name.rsplit(".", 1)[1]]
        assert shape == (linear.in_features, linear.out_features)
    assert len(linears) == 3 * len(matrix_shapes(model.config))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "num_new, context, num_logits", [(1, 1, 1), (1, 30, 1), (7, 7, 7), (5, 21, 2)])
def test_flops(kind, num_new, context, num_logits):
    "Attention is counted by its definition, the rest by PyTorch."
    model = make(kind, head_dim=24)
    with FlopCounterMode(display=False) as counter:
        every = torch.arange(num_new)
        Decoder(model)(some_ids(num_new), every, lambda query, *_: query, every[:num_logits])
    meetings = sum(context - num_new + i + 1 for i in range(num_new))
    expected = counter.get_total_flops() + 3 * 4 * 4 * 24 * meetings
    assert forward_flops(model.config, num_new, context, num_logits) == expected
