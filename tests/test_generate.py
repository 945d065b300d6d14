"The oracle: against transformers, at its edges, and lazily."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.generate import check_prompt, generate, greedy
from nanollm.model import load_model, max_context

NAMES = ("tiny-llama", "tiny-qwen3")
MODELS = {
    name: load_model(name, load_format="dummy", device="cpu", dtype="float32", progress=False)
    for name in NAMES
}
VOCAB = 320

prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(prompt=prompts, num=st.integers(1, 12))
def test_same_tokens_as_transformers(name, prompt, num):
    model = MODELS[name]
    input_ids = torch.tensor([prompt])
    reference = model.generate(input_ids, attention_mask=torch.ones_like(input_ids),
                               do_sample=False, max_new_tokens=num, eos_token_id=None,
                               pad_token_id=0)
    assert list(generate(model, prompt, num)) == reference[0, len(prompt):].tolist()


@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_greedy_takes_the_first_of_the_best(rows):
    best = [row.index(max(row)) for row in rows]
    assert greedy(torch.tensor(rows).float(), [[] for _ in rows]) == best


def test_stop_token_is_yielded_and_ends_the_loop():
    tokens = list(generate(MODELS["tiny-llama"], [1, 2, 3], 20))
    stop = tokens[7]
    stopped = list(generate(MODELS["tiny-llama"], [1, 2, 3], 20, [stop]))
    assert stopped == tokens[:tokens.index(stop) + 1]


def test_sample_sees_logits_and_outputs_so_far():
    seen = []

    def second_best(logits, output_ids):
        assert logits.shape == (1, VOCAB)
        seen.append(list(output_ids[0]))
        return logits.topk(2).indices[:, 1].tolist()

    tokens = list(generate(MODELS["tiny-qwen3"], [5], 6, sample=second_best))
    assert seen == [tokens[:i] for i in range(6)]


def test_work_is_done_as_tokens_are_pulled():
    calls = []

    def counted(logits, output_ids):
        calls.append(1)
        return greedy(logits, output_ids)

    tokens = generate(MODELS["tiny-llama"], [1], 5, sample=counted)
    assert not calls
    next(tokens)
    assert len(calls) == 1
    tokens.close()
    assert len(calls) == 1 and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("prompt, num, message", [
    ([], 1, "prompt is empty"),
    ([VOCAB], 1, f"id {VOCAB} is outside the vocabulary of {VOCAB}"),
    ([3, -1], 1, "id -1 is outside"),
    ([10**30], 1, "outside the vocabulary"),
    ([1], 0, "max_new_tokens must be at least 1, got 0"),
    ([1] * 2048, 1, "2048 prompt tokens and 1 new ones exceed the context of 2048"),
])
def test_bad_prompts_fail_at_the_call_with_the_numbers(prompt, num, message):
    for function in (check_prompt, generate):
        with pytest.raises(ValueError, match=message):
            function(MODELS["tiny-llama"], prompt, num)


def test_the_context_can_be_filled_to_its_end():
    model = MODELS["tiny-llama"]
    assert len(list(generate(model, [1] * (max_context(model) - 2), 2))) == 2
