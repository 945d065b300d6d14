"The cached loop equals the naive one, whatever the prompt, the gaps and the choice."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from nanollm.generate import generate
from nanollm.kv_cache import forward_new, generate_cached
from nanollm.model import kv_bytes_per_token, load_model, max_context
from nanollm.sampling import Sampler, SamplingParams

OPTIONS = {"load_format": "dummy", "device": "cpu", "dtype": "float32", "progress": False}
MODELS = {name: load_model(name, **OPTIONS) for name in ("tiny-llama", "tiny-qwen3")}
LLAMA = MODELS["tiny-llama"]
VOCAB = LLAMA.config.vocab_size
tokens = st.integers(0, VOCAB - 1)
prompts = st.lists(tokens, min_size=1, max_size=24)
by_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@by_model
@settings(max_examples=15, deadline=None)
@given(prompt=prompts, max_new_tokens=st.integers(1, 12), stop=st.sets(tokens, max_size=40))
def test_equals_the_oracle(model, prompt, max_new_tokens, stop):
    expected = list(generate(model, prompt, max_new_tokens, stop))
    assert list(generate_cached(model, prompt, max_new_tokens, stop)) == expected


@by_model
@settings(max_examples=8, deadline=None)
@given(prompt=prompts, seed=st.integers(0, 2**32))
def test_seeded_sampling_equals_the_oracle(model, prompt, seed):
    params = SamplingParams(temperature=0.8, top_k=50, presence_penalty=0.5,
                            repetition_penalty=1.1, seed=seed)
    out = [list(loop(model, prompt, 10, sample=Sampler([params], [prompt])))
           for loop in (generate, generate_cached)]
    assert out[0] == out[1]


@by_model
@settings(max_examples=15, deadline=None)
@given(prompt=prompts, data=st.data())
def test_gaps_do_not_change_the_logits(model, prompt, data):
    whole = forward_new(model, DynamicCache(config=model.config), prompt, 0)
    cache = DynamicCache()
    computed = 0
    while computed < len(prompt):
        gap = data.draw(st.integers(1, len(prompt) - computed))
        logits = forward_new(model, cache, prompt[computed:computed + gap], computed)
        computed += gap
        assert cache.get_seq_length() == computed
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)


@by_model
def test_the_position_of_a_token_matters(model):
    "A guard of the test above: with wrong positions the logits differ visibly."
    logits = []
    for position in (3, 300):
        cache = DynamicCache(config=model.config)
        forward_new(model, cache, [5, 6, 7], 0)
        logits.append(forward_new(model, cache, [9, 8], position))
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_cache_holds_the_predicted_bytes():
    cache = DynamicCache(config=LLAMA.config)
    forward_new(LLAMA, cache, list(range(10)), 0)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 10 * kv_bytes_per_token(LLAMA.config, LLAMA.dtype)


def test_every_token_is_computed_once(monkeypatch):
    seen, forward = [], LLAMA.forward

    def spy(input_ids, **kwargs):
        seen.append(input_ids[0].tolist())
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(LLAMA, "forward", spy)
    out = list(generate_cached(LLAMA, [1, 2, 3], 5))
    assert seen == [[1, 2, 3]] + [[token] for token in out[:-1]]


def test_fills_the_context_exactly():
    prompt = [5] * (max_context(LLAMA) - 2)
    assert list(generate_cached(LLAMA, prompt, 2)) == list(generate(LLAMA, prompt, 2))
    with pytest.raises(ValueError, match="exceed the context of 2048 tokens"):
        generate_cached(LLAMA, prompt, 3)


@pytest.mark.parametrize("prompt, max_new_tokens, message", [
    ([], 1, "prompt is empty"),
    ([VOCAB], 1, f"token id {VOCAB} is outside"),
    ([-1], 1, "token id -1 is outside"),
    ([1], 0, "max_new_tokens must be at least 1, got 0"),
])
def test_refuses_at_the_call(prompt, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate_cached(LLAMA, prompt, max_new_tokens)


def test_stops_after_the_stop_token_and_yields_it():
    out = list(generate(LLAMA, [1, 2, 3], 8))
    first = out.index(out[4])
    stopped = list(generate_cached(LLAMA, [1, 2, 3], 8, stop_token_ids=[out[4]]))
    assert stopped == out[:first + 1]


def test_is_lazy_and_leaves_the_prompt_alone():
    prompt, calls = [1, 2, 3], []

    def counting(logits, output_ids):
        calls.append([len(ids) for ids in output_ids])
        return logits.argmax(-1).tolist()

    answer = generate_cached(LLAMA, prompt, 50, sample=counting)
    assert calls == []
    next(answer)
    next(answer)
    answer.close()
    assert calls == [[0], [1]] and prompt == [1, 2, 3]


def test_two_runs_side_by_side_do_not_mix():
    left = generate_cached(LLAMA, [1, 2], 6)
    right = generate_cached(LLAMA, [3, 4, 5], 6)
    pairs = list(zip(left, right))
    assert [a for a, _ in pairs] == list(generate(LLAMA, [1, 2], 6))
    assert [b for _, b in pairs] == list(generate(LLAMA, [3, 4, 5], 6))
    assert not torch.is_inference_mode_enabled()
