"The compiled draw against torch's, token for token; bad rows, threads, plain C, no compiler."

import logging
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollm import compiled_sampling
from nanollm.compiled_sampling import CompiledDraw, choose_draw
from nanollm.native import NativeError
from nanollm.sampling import SamplingParams, SamplingRow, draw, gumbel, mass, noise_keys, sample

FAST = CompiledDraw()
PLAIN = ("-O1", "-fopenmp", "-shared", "-fPIC")  # no vectors, no fused products


def random_logits(rows, size, seed=0, scale=3.0):
    return scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def is_tie(row, p, key, mine, theirs):
    "Whether two tokens may both win: scores, or shares at the bar, that agree to six digits."
    x = row / torch.tensor(p.temperature)
    scores = x.double() + gumbel(key, torch.arange(len(x)))[0]
    low, high = min(scores[mine], scores[theirs]), max(scores[mine], scores[theirs])
    if high - low <= 2e-6 * max(1, abs(high)):
        return True
    masses = mass(x[None], x.max())[0].double()
    last = max((t for t in (mine, theirs)), key=lambda t: -x[t])
    share = masses[x > x[last]].sum() / masses.sum()
    return p.top_p < 1 and abs(share - p.top_p) < 1e-6


def check(logits, params, positions=0, how=FAST):
    keys = noise_keys(range(len(params)), [positions] * len(params))
    before = logits.clone()
    (mine, is_open), (theirs, _) = how(logits, params, keys), draw(logits, params, keys, True)
    assert mine.dtype == torch.int64 and is_open.dtype == torch.bool and not is_open.any()
    assert mine.shape == is_open.shape == (len(params),)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    for i in (mine != theirs).nonzero()[:, 0].tolist():
        assert is_tie(logits[i], params[i], keys[:, i : i + 1], mine[i], theirs[i]), params[i]
    return int((mine != theirs).sum())


RULES = [
    SamplingParams(temperature=t, top_p=top_p, top_k=top_k, min_p=min_p)
    for t in (0.01, 0.3, 1.0, 20.0)
    for top_p in (1.0, 0.99, 0.3, 1e-9)
    for top_k, min_p in ((0, 0.0), (1, 0.0), (9, 0.0), (300, 0.0), (0, 0.02), (50, 1.0))
]


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 255, 256, 257, 517, 4099])
@pytest.mark.parametrize(
    "kind", ["steep", "flat", "ties", "equal", "forbidden", "signed zeros"]
)
def test_the_same_tokens_as_torch(size, kind):
    x = random_logits(len(RULES), size, seed=size)
    if kind == "flat":
        x *= 0.01
    elif kind == "ties":
        x = (2 * x).round() / 2
    elif kind == "equal":
        x[:] = -7.25
    elif kind == "forbidden":
        x[:, torch.arange(size) % 7 != 3 % size] = -math.inf
    elif kind == "signed zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    assert check(x, RULES, size) <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_random_rules_and_scores(seed):
    dice = random.Random(seed)
    size, num = dice.choice([3, 33, 1000, 5003]), dice.randint(1, 9)
    x = random_logits(num, size, seed, dice.choice([1e-6, 0.1, 1, 10, 1e4]))
    if dice.random() < 0.3:
        x = x.bfloat16().float()
    if dice.random() < 0.3:
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.8] = -math.inf
        x[:, dice.randrange(size)] = 1.5
    params = [
        SamplingParams(
            temperature=dice.choice([0.01, 0.7, 1, 1.3, 100]),
            top_p=dice.choice([1, 0.95, 0.5, dice.uniform(0.001, 1)]),
            top_k=dice.choice([0, 1, size, dice.randint(1, size), 2**63 - 1]),
            min_p=dice.choice([0, 0, 0.1, dice.random()]),
        )
        for _ in range(num)
    ]
    check(x, params, dice.randrange(10**6))


def test_a_real_vocabulary():
    params = [
        SamplingParams(top_p=0.95),
        SamplingParams(temperature=0.7),
        SamplingParams(min_p=0.01),
    ]
    for scale in (0.5, 3):
        assert check(random_logits(3, 49_152, scale=scale), params) == 0


def test_plain_c_draws_the_same():
    plain = CompiledDraw(PLAIN)
    assert check(random_logits(len(RULES), 517), RULES, how=plain) <= 1
    assert check(random_logits(len(RULES), 49_152, scale=0.5)[:8], RULES[24:32], how=plain) <= 1


def test_neighbours_threads_and_strides_do_not_matter():
    params = [SamplingParams(temperature=0.9, top_p=0.9)] * 7
    x, keys = random_logits(7, 1001, scale=0.5), noise_keys(range(7), [3] * 7)
    right = FAST(x, params, keys)[0]
    alone = [FAST(x[i : i + 1], params[:1], keys[:, i : i + 1])[0].item() for i in range(7)]
    assert alone == right.tolist()
    wide = torch.zeros(7, 2002)
    wide[:, ::2] = x
    assert FAST(wide[:, ::2], params, keys)[0].tolist() == alone
    num_threads = torch.get_num_threads()
    try:
        for num in (1, 3, 8):
            torch.set_num_threads(num)
            assert FAST(x, params, keys)[0].tolist() == alone
    finally:
        torch.set_num_threads(num_threads)


def test_rows_without_a_right_token_do_no_harm():
    x = random_logits(6, 300)
    x[0], x[1], x[2, 7], x[3, 9] = math.nan, -math.inf, math.nan, math.inf
    x[4] = 3e38
    for p in (SamplingParams(), SamplingParams(top_p=0.5, min_p=0.1), SamplingParams(top_k=3)):
        params = [p.model_copy(update={"temperature": t}) for t in (1, 1, 1, 1, 0.01, 1)]
        winners, _ = FAST(x, params, noise_keys(range(6), [0] * 6))
        assert all(0 <= token_id < 300 for token_id in winners.tolist())
        assert winners[3] == 9
        rows = [SamplingRow(q, [], [], i) for i, q in enumerate(params)]
        out = sample(x, rows, draw=FAST)
        assert out.failed == (0, 1, 2, 3) and out.token_ids[:4] == [0] * 4
        assert out.token_ids[5] == sample(x, rows).token_ids[5]


def test_no_rows():
    winners, is_open = FAST(torch.empty(0, 300), [], torch.empty(2, 0, 1, dtype=torch.int32))
    assert winners.shape == is_open.shape == (0,)


def test_sample_takes_it_for_some_rows_of_a_batch():
    wishes = [{}, {"temperature": 0.0}, {"top_p": 0.9, "logprobs": 3}, {"top_k": 9}] * 3
    x = random_logits(len(wishes), 700).bfloat16()
    rows = [SamplingRow(SamplingParams(**w), [1], [2, 2], i) for i, w in enumerate(wishes)]
    mine, theirs = sample(x, rows, draw=FAST), sample(x, rows)
    assert mine.token_ids == theirs.token_ids and mine.logprobs == theirs.logprobs


def test_the_draw_of_a_device(monkeypatch, caplog):
    assert isinstance(choose_draw(torch.device("cpu")), CompiledDraw)
    assert choose_draw(torch.device("cuda")) is draw

    def fails(*args, **kwargs):
        raise NativeError("no C compiler was found")

    monkeypatch.setattr(compiled_sampling, "load", fails)
    with caplog.at_level(logging.WARNING):
        assert choose_draw(torch.device("cpu")) is draw
    assert "drawn by torch: no C compiler" in caplog.text
    with pytest.raises(NativeError, match="no C compiler"):
        CompiledDraw()
