"Our forward against the unmodified model: architectures, RoPE kinds, and what is refused."

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanollm.model import ModelError
from nanollm.transformer import Decoder, causal_attention

SHAPE = dict(
    vocab_size=130, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    initializer_range=0.2, rms_norm_eps=1e-5, tie_word_embeddings=False, pad_token_id=None,
)


def make(kind, dtype=torch.float32, **changes):
    "A tiny random model whose norms and biases are random, too."
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SHAPE | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            weight.normal_(0, 0.3)
    return model


def ours(model, ids, positions=None, rows=None):
    positions = torch.arange(len(ids)) if positions is None else positions
    rows = torch.arange(len(ids)) if rows is None else rows
    return Decoder(model)(ids, positions, causal_attention, rows)


def theirs(model, ids, positions=None):
    positions = torch.arange(len(ids)) if positions is None else positions
    return model(ids[None], position_ids=positions[None], use_cache=False).logits[0]


def some_ids(num, vocab=130):
    return torch.randint(0, vocab, (num,), generator=torch.Generator().manual_seed(num))


def assert_same(model, ids, positions=None):
    expected = theirs(model, ids, positions)
    found = ours(model, ids, positions)
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


KINDS = ("llama", "mistral", "qwen2", "qwen3", "seed_oss")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_equal_to_the_unmodified_model(kind, tied):
    extra = {"sliding_window": None} if kind == "mistral" else {}
    model = make(kind, tie_word_embeddings=tied, **extra)
    for num in (1, 2, 33):
        assert_same(model, some_ids(num))
    assert_same(model, some_ids(9), torch.arange(9) + 400)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_refused(kind):
    model = make("llama")
    model.config.rope_parameters["rope_type"] = kind
    with pytest.raises(ModelError, match=kind):
        Decoder(model)
