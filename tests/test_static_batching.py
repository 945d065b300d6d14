"A padded batch equals solo runs row by row; its counts, edges and errors."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm.generate import generate
from nanollm.model import load_model, max_context
from nanollm.sampling import Sampler, SamplingParams
from nanollm.static_batching import Slots, collect, count_slots, generate_batch, pad_left

OPTIONS = {"load_format": "dummy", "device": "cpu", "dtype": "float32", "progress": False}
MODELS = {name: load_model(name, **OPTIONS) for name in ("tiny-llama", "tiny-qwen3")}
LLAMA = MODELS["tiny-llama"]
VOCAB = LLAMA.config.vocab_size
tokens = st.integers(0, VOCAB - 1)
prompts = st.lists(tokens, min_size=1, max_size=20)
batches = st.lists(st.tuples(prompts, st.integers(1, 10)), min_size=1, max_size=5)
by_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@by_model
@settings(max_examples=12, deadline=None)
@given(batch=batches, stop=st.sets(tokens, max_size=40))
def test_every_row_equals_its_solo_run(model, batch, stop):
    rows, limits = [ids for ids, _ in batch], [limit for _, limit in batch]
    expected = [list(generate(model, ids, limit, stop)) for ids, limit in batch]
    steps = list(generate_batch(model, rows, limits, stop))
    assert collect(steps) == expected
    assert len(steps) == max(map(len, expected))
    for row, output in enumerate(expected):
        ended = [step[row] is None for step in steps]
        assert ended == [i >= len(output) for i in range(len(steps))]


@by_model
@settings(max_examples=6, deadline=None)
@given(batch=batches, seed=st.integers(0, 2**32))
def test_seeded_sampling_equals_solo_runs(model, batch, seed):
    rows, limits = [ids for ids, _ in batch], [limit for _, limit in batch]
    params = [SamplingParams(temperature=0.6 + i / 5, top_p=0.9, frequency_penalty=i / 5,
                             seed=seed + i) for i in range(len(rows))]
    solo = [list(generate(model, ids, limit, sample=Sampler([p], [ids])))
            for (ids, limit), p in zip(batch, params)]
    steps = generate_batch(model, rows, limits, sample=Sampler(params, rows))
    assert collect(steps) == solo


def test_long_padding_leaves_no_trace():
    rows = [[7], list(range(300)), [1, 2]]
    alone = [list(generate(LLAMA, ids, 6)) for ids in rows]
    assert collect(generate_batch(LLAMA, rows, 6)) == alone


def test_padding_and_order_of_rows_do_not_matter(monkeypatch):
    rows = [[5, 6], [9] * 12, [3]]
    expected = collect(generate_batch(LLAMA, rows, 5))
    assert collect(generate_batch(LLAMA, rows[::-1], 5)) == expected[::-1]
    monkeypatch.setattr("nanollm.static_batching.PAD", 123)
    assert collect(generate_batch(LLAMA, rows, 5)) == expected


def test_pad_left():
    ids, mask, positions = pad_left([[11, 12], [21, 22, 23, 24]])
    assert ids.tolist() == [[0, 0, 11, 12], [21, 22, 23, 24]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert {t.dtype for t in (ids, mask, positions)} == {torch.int64}


def test_one_limit_for_all_and_one_row_each():
    rows = [[1, 2], [3]]
    each = collect(generate_batch(LLAMA, rows, [4, 4]))
    assert collect(generate_batch(LLAMA, rows, 4)) == each
    alone = [[token] for token in generate(LLAMA, rows[0], 3)]
    assert list(generate_batch(LLAMA, rows[:1], 3)) == alone
    assert len(list(generate_batch(LLAMA, rows, [1, 1]))) == 1


def test_rows_that_ended_are_offered_but_not_used():
    seen = []

    def spy(logits, output_ids):
        seen.append([len(ids) for ids in output_ids])
        choice = logits.argmax(-1).tolist()
        return [-7 if len(output_ids[0]) == 1 else choice[0], *choice[1:]]

    steps = list(generate_batch(LLAMA, [[1, 2], [3, 4]], [1, 4], sample=spy))
    assert seen == [[0, 0], [1, 1], [1, 2], [1, 3]]
    assert [step[0] is None for step in steps] == [False, True, True, True]
    assert collect(steps)[1] == list(generate(LLAMA, [3, 4], 4))


def test_positions_stay_inside_the_context(monkeypatch):
    "A row that ended does not move on, though the batch becomes wider than the context."
    seen, forward, limit = [], LLAMA.forward, max_context(LLAMA)

    def spy(input_ids, position_ids, **kwargs):
        seen.append(position_ids[:, -1].tolist())
        return forward(input_ids, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(LLAMA, "forward", spy)
    rows = [[5] * (limit - 1), [5]]
    outputs = collect(generate_batch(LLAMA, rows, [1, 5]))
    assert seen == [[limit - 2, i] for i in range(5)]
    monkeypatch.undo()
    assert outputs == [list(generate(LLAMA, rows[0], 1)), list(generate(LLAMA, rows[1], 5))]


@pytest.mark.parametrize("batch, max_new_tokens, message", [
    ([], 4, "batch is empty"),
    ([[1], []], 4, "prompt 1 of the batch: the prompt is empty"),
    ([[1], [2], [VOCAB]], 4, f"prompt 2 of the batch: prompt token id {VOCAB}"),
    ([[1], [2]], [4], "max_new_tokens has 1 entries for 2 prompts"),
    ([[1], [2]], [4, 0], "prompt 1 of the batch: max_new_tokens must be at least 1, got 0"),
    ([[1], [2]], 3000, "prompt 0 of the batch: 1 prompt tokens and 3000 new ones exceed the "
                       "context of 2048"),
])
def test_refuses_at_the_call(batch, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate_batch(LLAMA, batch, max_new_tokens)


def test_stopping_early_stops_the_work():
    calls = []

    def counting(logits, output_ids):
        calls.append(1)
        return logits.argmax(-1).tolist()

    steps = generate_batch(LLAMA, [[1], [2, 3]], 50, sample=counting)
    assert calls == []
    next(steps)
    next(steps)
    steps.close()
    assert len(calls) == 2 and not torch.is_inference_mode_enabled()


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=9))
def test_slots_add_up_to_the_rectangle(lens):
    prompt_lens, output_lens = [s for s, _ in lens], [n for _, n in lens]
    slots = count_slots(prompt_lens, output_lens)
    assert slots.total == len(lens) * (max(prompt_lens) + max(output_lens) - 1)
    assert slots.useful == sum(s + n - 1 for s, n in lens)
    assert 0 <= slots.wasted < 1
    assert (slots.wasted == 0) == (len(set(prompt_lens)) == len(set(output_lens)) == 1)


def test_slots_of_a_worked_example():
    assert count_slots([2, 4], [3, 1]) == Slots(useful=8, padding=2, finished=2)
    assert Slots(useful=8, padding=2, finished=2).wasted == pytest.approx(1 / 3)
