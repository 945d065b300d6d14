"Parameters, processors against transformers, draws against their definition, seeds."

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_waiting import NoWaiting
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanollm.generate import generate
from nanollm.model import load_model
from nanollm.sampling import (
    DEFAULT_PROCESSORS,
    MAX_GUMBEL,
    MAX_LOGPROBS,
    MIN_TEMPERATURE,
    NUM_BEST,
    LogitBias,
    LogitsError,
    MinTokens,
    Penalties,
    Sampler,
    SamplingParams,
    SamplingRow,
    crossing,
    draw,
    find_bars,
    gumbel,
    hash64,
    measure_logprobs,
    noise,
    noise_keys,
    read,
    row_seed,
    sample,
    stop_ids,
    token_logprobs,
)
from nanollm.static_batching import collect, generate_batch

V = 517  # a multiple of nothing, so that no kernel's vector width divides a row


def row(seed=0, prompt=(), output=(), eos=(), drafts=(), key=None, **params):
    params = SamplingParams(**params)
    return SamplingRow(params, prompt, output, seed, stop_ids(params, eos), drafts, key)


def random_logits(rows, size=V, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def filter_logits(logits, rows):
    "What the rows draw from: logits over temperature, tokens below the bar at -inf."
    x = logits / torch.tensor([[row.params.temperature] for row in rows])
    return x.masked_fill(x < bars_of(x, [row.params for row in rows]), -math.inf)


def bars_of(x, params):
    "Bars from the best tokens, and from all where those may be wrong."
    best = x.topk(min(NUM_BEST, x.shape[-1])).values
    bars, is_open = find_bars(x, best, params)
    is_open |= best[:, -1:] >= bars
    return torch.where(is_open, find_bars(x, best, params, whole=True)[0], bars)


def drawn_by(x, params, keys):
    "Tokens from the best, and from all where those may be wrong; how often that was."
    (tokens, is_open), (right, never) = draw(x, params, keys), draw(x, params, keys, True)
    assert not never.any() and torch.equal(tokens[~is_open], right[~is_open])
    return right.tolist(), int(is_open.sum())


def uniform(seeds, positions, vocab_size, device="cpu"):
    return noise(noise_keys(seeds, positions, device), torch.arange(vocab_size, device=device))


def p_value(counts, expected):
    "Chi-square test of counts under expected counts, rare cells put together."
    counts, expected = counts.double(), expected.double()
    common = expected >= 5
    if not common.all():
        counts = torch.cat([counts[common], counts[~common].sum()[None]])
        expected = torch.cat([expected[common], expected[~common].sum()[None]])
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) == 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(
        torch.tensor((len(counts) - 1) / 2).double(), statistic / 2
    ).item()


def test_defaults_are_vllms():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_k, p.top_p, p.min_p, p.max_tokens, p.min_tokens) == (
        1,
        1.0,
        0,
        1.0,
        0.0,
        16,
        0,
    )
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)
    assert p.seed is p.logprobs is p.prompt_logprobs is p.logit_bias is None
    assert p.stop == p.stop_token_ids == () and not p.ignore_eos and p.skip_special_tokens


NUMBERS = {  # field: (values that pass, values that do not)
    "n": ([1, 128], [0, -1, 129]),
    "temperature": ([0, 0.0, 1, 2.0, 100], [-0.1, 101, 1e39]),
    "top_k": ([-1, 0, 1, 10**9, 2**63 - 1], [-2, 2**63]),
    "top_p": ([1e-9, 0.5, 1, 1.0], [0, 0.0, -0.1, 1.1]),
    "min_p": ([0, 0.5, 1], [-0.1, 1.1]),
    "presence_penalty": ([-2, 0, 2.0], [-2.1, 2.1]),
    "frequency_penalty": ([-2, 0, 2.0], [-2.1, 2.1]),
    "repetition_penalty": ([0.01, 1, 2.5], [0, -1, 1000]),
    "max_tokens": ([1, 10**6, None], [0, -1]),
    "min_tokens": ([0, 16], [-1, 17]),
    "seed": ([0, -1, -(2**63), 2**63 - 1, None], [2**63, -(2**63) - 1]),
    "logprobs": ([0, MAX_LOGPROBS, None, True, False], [-1, MAX_LOGPROBS + 1]),
    "top_logprobs": ([0, MAX_LOGPROBS, None], [-1, MAX_LOGPROBS + 1]),
    "prompt_logprobs": ([0, MAX_LOGPROBS, None], [-1, MAX_LOGPROBS + 1]),
}
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
WRONG = [math.nan, math.inf, -math.inf, "1", "", [1], {}, 1j, object(), b"1"]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_checked_and_errors_name_the_field(name):
    good, bad = NUMBERS[name]
    for value in good:
        SamplingParams(**{name: value})
    wrong = list(WRONG)
    if None not in good:
        wrong.append(None)
    if name != "logprobs":
        wrong += [True, False]
    if name not in FLOATS:
        wrong.append(1.5)
    for value in bad + wrong:
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})


def test_an_error_names_value_and_limits():
    with pytest.raises(
        ValueError,
        match=r"^presence_penalty: Input should be less than or equal to 2, got 2.5$",
    ):
        SamplingParams(presence_penalty=2.5)
    with pytest.raises(ValueError, match="unknown_field"):
        SamplingParams(unknown_field=1)
    with pytest.raises(ValueError, match=r"^min_tokens must be at most max_tokens=3, got 4$"):
        SamplingParams(min_tokens=4, max_tokens=3)
    with pytest.raises(ValueError, match=r"greater than or equal to 0, got -1$"):
        SamplingParams(logit_bias={"-1": 1.0})
    with pytest.raises(ValueError) as error:
        SamplingParams(temperature="x" * 10**6)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "name", ["ignore_eos", "skip_special_tokens", "include_stop_str_in_output"]
)
@pytest.mark.parametrize("value", [0, 1, None, "true", 1.0])
def test_flags_are_bools(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", b"a"),
        ("stop", 0),
        ("stop", {"a": 1}),
        ("stop", False),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", 5),
        ("stop_token_ids", 0),
        ("stop_token_ids", [2**63]),
        ("stop_token_ids", [None]),
        ("logit_bias", [1, 2]),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"x": 0.0}),
        ("logit_bias", {"-1": 0.0}),
        ("logit_bias", {1.5: 0.0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: "5"}),
        ("logit_bias", {1: None}),
        ("logit_bias", {"9" * 5000: 1.0}),
        ("logit_bias", 7),
    ],
)
def test_lists_and_maps_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_what_is_equal_becomes_equal():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert (
        SamplingParams(stop="ab") == SamplingParams(stop=["ab"]) == SamplingParams(stop=("ab",))
    )
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    assert SamplingParams(logit_bias={"42": -100, 7: 1}).logit_bias == {42: -100.0, 7: 1.0}
    assert SamplingParams(temperature=1e-9).temperature == MIN_TEMPERATURE
    assert type(SamplingParams(temperature=1).temperature) is float


@pytest.mark.parametrize(
    "logprobs, top, inside",
    [
        (None, None, None),
        (False, None, None),
        (False, 0, None),
        (True, None, 0),
        (0, None, 0),
        (5, None, 5),
        (True, 5, 5),
        (None, 5, 5),
        (None, 0, 0),
        (5, 5, 5),
        (True, 0, 0),
    ],
)
def test_two_spellings_of_logprobs(logprobs, top, inside):
    params = SamplingParams(logprobs=logprobs, top_logprobs=top)
    assert (
        params.logprobs == inside
        and params.logprobs is not True
        and params.top_logprobs is None
    )
    assert SamplingParams(**params.model_dump() | {"seed": 1}).logprobs == inside


@pytest.mark.parametrize("logprobs, top", [(False, 1), (False, 5), (3, 5), (0, 5), (5, 0)])
def test_contradicting_logprobs(logprobs, top):
    with pytest.raises(ValueError, match="top_logprobs"):
        SamplingParams(logprobs=logprobs, top_logprobs=top)


def test_token_ids_are_checked_against_the_model():
    SamplingParams(logit_bias={0: 1, V - 1: 1}, stop_token_ids=[0, V - 1]).check_vocab(V)
    with pytest.raises(ValueError, match=f"logit_bias.*from 0 to {V - 1}, got {V}"):
        SamplingParams(logit_bias={V: 1}).check_vocab(V)
    with pytest.raises(ValueError, match="stop_token_ids"):
        SamplingParams(stop_token_ids=[10**12]).check_vocab(V)


def test_stop_ids():
    assert stop_ids(SamplingParams(stop_token_ids=[1]), (2, 3)) == {1, 2, 3}
    assert stop_ids(SamplingParams(stop_token_ids=[1], ignore_eos=True), (2, 3)) == {1}
    held = SamplingParams(stop_token_ids=[1], ignore_eos=True, structured_outputs=object())
    assert stop_ids(held, (2, 3)) == {1, 2, 3} # a grammar has to be able to end


def test_params_are_frozen():
    with pytest.raises(ValueError):
        SamplingParams().n = 2


@pytest.mark.parametrize(
    "theirs, params",
    [
        (TemperatureLogitsWarper(0.3), dict(temperature=0.3)),
        (TemperatureLogitsWarper(3.0), dict(temperature=3.0)),
        (TopKLogitsWarper(1), dict(top_k=1)),
        (TopKLogitsWarper(40), dict(top_k=40)),
        (TopKLogitsWarper(10**6), dict(top_k=10**6)),
        (TopPLogitsWarper(0.001), dict(top_p=0.001)),
        (TopPLogitsWarper(0.5), dict(top_p=0.5)),
        (TopPLogitsWarper(0.99), dict(top_p=0.99)),
        (MinPLogitsWarper(0.01), dict(min_p=0.01)),
        (MinPLogitsWarper(1.0), dict(min_p=1.0)),
    ],
)
def test_filters_equal_transformers(theirs, params):
    for seed, size in enumerate((7, V, 6000)):
        logits = random_logits(4, size, seed)
        ours = filter_logits(logits, [row(**params)] * 4)
        torch.testing.assert_close(ours, theirs(None, logits.clone()))


def test_filters_in_order_equal_transformers():
    logits = random_logits(8, 6000)
    expected = logits
    for theirs in (
        TemperatureLogitsWarper(1.3),
        MinPLogitsWarper(0.003),
        TopKLogitsWarper(300),
        TopPLogitsWarper(0.9),
    ):
        expected = theirs(None, expected)
    ours = filter_logits(logits, [row(temperature=1.3, min_p=0.003, top_k=300, top_p=0.9)] * 8)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
def test_nucleus_is_wide_enough_for_flat_logits(top_p):
    "5,000 nearly equal tokens: the first 256 are not enough, nor are the first 4,096."
    logits = random_logits(2, 5000) * 0.01
    torch.testing.assert_close(
        filter_logits(logits, [row(top_p=top_p)] * 2), TopPLogitsWarper(top_p)(None, logits)
    )


@pytest.mark.parametrize("penalty", [0.5, 1.2, 10.0])
def test_repetition_penalty_equals_transformers(penalty):
    prompt, output, logits = [1, 2, 2, 5], [5, 9, 9], random_logits(1)
    ours = logits.clone()
    Penalties()(ours, [row(prompt=prompt, output=output, repetition_penalty=penalty)])
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits)
    assert torch.equal(ours, theirs)


def test_min_tokens_equals_transformers():
    for num_output in range(5):
        logits = random_logits(1)
        ours = logits.clone()
        MinTokens()(ours, [row(output=[7] * num_output, eos=(3, 4), min_tokens=3)])
        theirs = MinNewTokensLengthLogitsProcessor(2, 3, [3, 4])
        assert torch.equal(
            ours, theirs(torch.zeros(1, 2 + num_output, dtype=torch.long), logits)
        )


def test_logit_bias_equals_transformers():
    logits, bias = random_logits(1), {1: 5.0, 100: -100.0, V - 1: 0.3}
    ours = logits.clone()
    LogitBias()(ours, [row(logit_bias=bias)])
    theirs = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    assert torch.equal(ours, theirs(torch.zeros(1, 1, dtype=torch.long), logits))


def test_presence_and_frequency_count_the_output_only():
    logits = torch.zeros(1, 6)
    Penalties()(
        logits,
        [row(prompt=[1, 2], output=[2, 3, 3, 3], presence_penalty=0.5, frequency_penalty=0.25)],
    )
    assert logits.tolist() == [[0, 0, -0.75, -1.25, 0, 0]]


def test_min_tokens_forbids_stop_tokens_and_respects_ignore_eos():
    logits = torch.zeros(2, 6)
    MinTokens()(
        logits,
        [
            row(eos=[1], stop_token_ids=[2], min_tokens=1),
            row(eos=[1], stop_token_ids=[2], min_tokens=1, ignore_eos=True),
        ],
    )
    assert logits.isinf().nonzero().tolist() == [[0, 1], [0, 2], [1, 2]]


def test_processors_leave_other_rows_and_forbidden_tokens_alone():
    logits = random_logits(3)
    logits[:, 10] = -math.inf
    edited = logits.clone()
    busy = dict(
        prompt=[10, 11],
        output=[12],
        eos=[13],
        logit_bias={10: 50.0},
        min_tokens=9,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=0.5,
    )
    for processor in DEFAULT_PROCESSORS:
        processor(edited, [row(), row(**busy), row()])
    assert (
        torch.equal(edited[[0, 2]], logits[[0, 2]])
        and edited[1, 10] == -math.inf
        and not edited.isnan().any()
    )
    assert set((edited[1] != logits[1]).nonzero()[:, 0].tolist()) == {11, 12, 13}


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        assert filter_logits(logits, [row(top_p=top_p)]).isfinite().sum() == kept


def test_ties_stay_together():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    for params in (dict(top_k=1), dict(top_p=0.1), dict(min_p=1.0)):
        assert filter_logits(logits, [row(**params)]).isfinite().tolist() == [
            [False, True, True, True, False]
        ]


def test_greedy_takes_the_first_of_ties_as_argmax_does():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    greedy = row(temperature=0, top_k=3, top_p=0.5, min_p=0.9)
    assert sample(logits, [greedy]).token_ids == [1]


def test_greedy_obeys_bias_and_penalties():
    logits = torch.tensor([[3.0, 2.9, 0.0]])
    assert sample(logits, [row(temperature=0, logit_bias={2: 10})]).token_ids == [2]
    assert sample(logits, [row(temperature=0, output=[0], presence_penalty=0.5)]).token_ids == [
        1
    ]


def test_sample_does_not_change_its_input():
    logits = random_logits(2)
    before = logits.clone()
    sample(
        logits, [row(logit_bias={1: 5}, temperature=0.5), row(output=[1], presence_penalty=2)]
    )
    assert torch.equal(logits, before)


def reference_noise(seed, position, token):
    "The definition, in Python's own integers."

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    key = hash64(seed, position)
    factor, offset = (
        ((key >> 32) - 2**31 | 1) & 0xFFFFFFFF,
        ((key & 0xFFFFFFFF) - 2**31) & 0xFFFFFFFF,
    )
    bits = mix(mix(token) * factor + offset & 0xFFFFFFFF) & 0x7FFFFFFF
    return min(
        (np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-31), np.float32(1 - 2.0**-24)
    )


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SEEDS = (0, 1, -1, 42, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64 - 1)


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_the_definition_bit_for_bit(device):
    u = uniform(SEEDS, range(len(SEEDS)), 300, device).cpu()
    for i, seed in enumerate(SEEDS):
        assert u[i].tolist() == [float(reference_noise(seed, i, token)) for token in range(300)]


def test_noise_stays_inside():
    u = uniform([3] * 400, range(400), 50_000)
    assert 0 < u.min() < 1e-6 and 1 - 1e-6 < u.max() < 1
    assert (-(-u).log1p()).log().isfinite().all()


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_uniform_and_independent_of_its_neighbours(seed):
    u = uniform([seed] * 100, range(100), 10_000)
    other = uniform([seed + 1] * 100, range(100), 10_000)
    assert p_value(torch.histc(u, 1000, 0, 1), torch.full((1000,), u.numel() / 1000)) > 1e-4
    for a, b in (
        (u[:-1], u[1:]),
        (u[:, :-1], u[:, 1:]),
        (u[:, :-64], u[:, 64:]),
        (u, other),
    ):  # position, token, seed
        cells = (a * 16).long() * 16 + (b * 16).long()
        assert (
            p_value(
                torch.bincount(cells.flatten(), minlength=256),
                torch.full((256,), cells.numel() / 256),
            )
            > 1e-4
        )
        assert (
            abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
            < 5 / a.numel() ** 0.5
        )


def test_noise_has_the_right_tails():
    u = uniform(range(300), [0] * 300, 50_000)
    for share in (2.0**-10, 2.0**-16, 2.0**-20):
        expected = share * u.numel()
        for count in ((u < share).sum().item(), (u > 1 - share).sum().item()):
            assert abs(count - expected) < 5 * expected**0.5


def test_noise_of_many_seeds_and_positions_is_distinct():
    u = uniform(
        [s for s in range(100) for _ in range(100)],
        [p for _ in range(100) for p in range(100)],
        4,
    )
    assert len(torch.unique(u, dim=0)) == 10_000


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, V - 1), max_size=9),
    st.lists(st.integers(0, V - 1), max_size=5),
    st.integers(0, 9),
)
def test_drafts_count_as_output(output, drafts, min_tokens):
    wish = dict(
        prompt=[1, 2],
        eos=[3],
        min_tokens=min_tokens,
        frequency_penalty=0.5,
        presence_penalty=0.3,
        repetition_penalty=1.3,
        seed=5,
    )
    guessed, known = (
        row(output=output, drafts=drafts, **wish),
        row(output=output + drafts, **wish),
    )
    assert guessed.position == known.position == len(output) + len(drafts)
    logits = random_logits(2)
    logits[1] = logits[0]
    a, b = sample(logits, [guessed, known]).token_ids
    assert a == b


def test_seed_minus_one_is_no_seed():
    params = SamplingParams(seed=-1)
    assert params.seed is None and params == SamplingParams()
    assert row_seed(params) != row_seed(params)


def test_row_seed():
    params = SamplingParams(seed=7, n=3)
    seeds = [row_seed(params, i) for i in range(3)]
    assert len(set(seeds)) == 3 and seeds == [row_seed(params, i) for i in range(3)]
    assert row_seed(SamplingParams(seed=8)) not in seeds
    assert row_seed(SamplingParams()) != row_seed(SamplingParams())


def draw_many(logits, count, **params):
    "Draw `count` positions of one request from the same logits, (V,)."
    wishes = SamplingParams(**params)
    rows = [SamplingRow(wishes, (), range(i), 11) for i in range(count)]
    ids = []
    for start in range(0, count, 1000):
        ids += sample(
            logits.expand(len(rows[start : start + 1000]), -1), rows[start : start + 1000]
        ).token_ids
    return torch.bincount(torch.tensor(ids), minlength=len(logits))


@pytest.mark.parametrize(
    "params",
    [
        {},
        dict(temperature=0.5),
        dict(temperature=2.0),
        dict(top_k=7),
        dict(top_p=0.7),
        dict(min_p=0.1),
        dict(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01),
        dict(logit_bias={3: 2.0, 5: -100.0}),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(params):
    logits = random_logits(1, 100)[0]
    counts = draw_many(logits, 20_000, **params)
    processed = logits[None].clone()
    LogitBias()(processed, [row(**params)])
    p = filter_logits(processed, [row(**params)])[0].softmax(-1)
    assert p_value(counts, p * 20_000) > 1e-4


def test_two_neighbouring_positions_are_independent():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    rows = [row(seed=5, output=range(i)) for i in range(20_001)]
    ids = torch.tensor(sample(logits.expand(20_001, 4), rows).token_ids)
    p = logits.exp()
    counts = torch.bincount(ids[:-1] * 4 + ids[1:], minlength=16)
    assert p_value(counts, (p[:, None] * p).flatten() * 20_000) > 1e-4


def test_a_rare_token_comes_at_its_rate():
    p = torch.full((3,), (1 - 1e-4) / 2)
    p[2] = 1e-4
    counts = draw_many(p.log(), 200_000)
    assert abs(counts[2].item() - 20) < 5 * 20**0.5


def params_strategy():
    number = st.floats
    return st.fixed_dictionaries(
        {},
        optional=dict(
            temperature=st.sampled_from([0, 0.3, 1.0, 1.7]),
            top_k=st.sampled_from([0, 1, 5, 300, 10**6]),
            top_p=st.sampled_from([0.05, 0.5, 0.95, 0.9999, 1.0]),
            min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
            presence_penalty=number(-2, 2),
            frequency_penalty=number(-2, 2),
            repetition_penalty=number(0.5, 2),
            logit_bias=st.dictionaries(st.integers(0, V - 1), number(-100, 100), max_size=3),
            min_tokens=st.integers(0, 9),
            stop_token_ids=st.lists(st.integers(0, V - 1), max_size=3),
            logprobs=st.integers(0, MAX_LOGPROBS),
        ),
    )


ids_strategy = st.lists(st.integers(0, V - 1), max_size=12)
rows_strategy = st.lists(
    st.tuples(params_strategy(), ids_strategy, ids_strategy, st.integers(-(2**63), 2**63 - 1)),
    min_size=1,
    max_size=9,
)


@settings(deadline=None, max_examples=80)
@given(
    rows_strategy,
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.randoms(),
)
def test_a_batch_equals_its_rows_alone(drawn, seed, dtype, order):
    rows = [row(s, prompt, output, (0, 1), **p) for p, prompt, output, s in drawn]
    logits = random_logits(len(rows), V, seed).to(dtype)
    batch = sample(logits, rows)
    for i, one in enumerate(rows):
        alone = sample(logits[i : i + 1], [one])
        assert (alone.token_ids[0], alone.logprobs[0]) == (
            batch.token_ids[i],
            batch.logprobs[i],
        )
    shuffled = order.sample(range(len(rows)), len(rows))
    again = sample(logits[shuffled], [rows[i] for i in shuffled])
    assert again.token_ids == [batch.token_ids[i] for i in shuffled]
    assert again.logprobs == [batch.logprobs[i] for i in shuffled]
    x = logits.float()
    rows = [
        replace(one, params=SamplingParams(**p | {"temperature": p.get("temperature") or 1.0}))
        for one, (p, *_) in zip(rows, drawn)
    ]
    one_by_one = [filter_logits(x[i : i + 1], [one]) for i, one in enumerate(rows)]
    assert torch.equal(filter_logits(x, rows), torch.cat(one_by_one))


def test_a_step_without_wishes_does_no_more_than_argmax(monkeypatch):
    logits = random_logits(4)
    expected = logits.argmax(-1).tolist()
    for name in ("topk", "sort", "log_softmax", "softmax"):
        monkeypatch.setattr(torch.Tensor, name, None)
    monkeypatch.setattr("nanollm.sampling.noise", None)
    assert sample(logits, [row(temperature=0)] * 4).token_ids == expected


def numbers_asked(monkeypatch, logits, rows):
    "Random numbers that `sample` computes."
    asked = []

    def counted(keys, token_ids):
        asked.append(keys.shape[1] * token_ids.shape[-1])
        return gumbel(keys, token_ids)

    monkeypatch.setattr("nanollm.sampling.gumbel", counted)
    sample(logits, rows)
    return sum(asked)


@pytest.mark.parametrize(
    "params, whole",
    [
        (dict(top_k=7), False),
        (dict(min_p=0.1), False),
        (dict(temperature=0.2), False),
        (dict(top_p=0.5), False),
        (dict(), True),
        (dict(top_k=4000), True),
        (dict(temperature=9.0, top_p=0.99), True),
    ],
    ids=str,
)
def test_noise_is_for_tokens_that_can_win(monkeypatch, params, whole):
    "The same work per row whatever the batch; only the best tokens where they settle it."
    logits = (random_logits(1, 5000) * 2).expand(64, -1)
    for count in (1, 16, 64):
        rows = [row(seed=i, **params) for i in range(count)]
        asked = numbers_asked(monkeypatch, logits[:count], rows)
        assert asked == count * (NUM_BEST + 5000 * whole)


def test_the_vocabulary_is_never_sorted(monkeypatch):
    seen, topk = [], torch.Tensor.topk

    def counted(self, k):
        seen.append(k)
        return topk(self, k)

    monkeypatch.setattr(torch.Tensor, "topk", counted)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    wishes = [
        dict(),
        dict(top_k=7),
        dict(top_k=4000),
        dict(top_p=0.9999),
        dict(min_p=0.1, top_p=0.5),
    ]
    sample(random_logits(5, 5000) * 0.01, [row(**wish) for wish in wishes])
    assert seen == [NUM_BEST, 1], "all rows, then those that were not settled"
    sample(random_logits(2), [row(temperature=0, logprobs=0)] * 2)
    assert seen == [NUM_BEST, 1, 0]


def plain_bar(x, params):
    "The definition of the three filters in Python's numbers: the lowest value that is in."
    values, best = x.tolist(), x.max()
    order = sorted(range(len(values)), key=lambda i: -values[i])
    bar = (best + (torch.tensor(params.min_p).log() if params.min_p else -math.inf)).item()
    if 0 < params.top_k < len(values):
        bar = max(bar, values[order[params.top_k - 1]])
    if params.top_p < 1:
        masses = ((x - best).exp() * 2.0**40).long().tolist()
        masses = [m if value >= bar else 0 for m, value in zip(masses, values)]
        target = max(1, int(torch.tensor(sum(masses)) * torch.tensor(params.top_p)))
        up_to = 0
        for i in order:
            up_to += masses[i]
            if up_to >= target:
                bar = max(bar, values[i])
                break
    return bar


def plain_token(logits, row):
    "The definition of the draw: noise for every token of the row, (V,)."
    x = logits / torch.tensor(row.params.temperature)
    keys = noise_keys([row.seed], [row.position])
    score = x + gumbel(keys, torch.arange(len(x)))[0]
    return int(score.masked_fill(x < plain_bar(x, row.params), -math.inf).argmax())


def random_case(chance, num_rows):
    "Logits of some kind and rows with any parameters."
    size = chance.choice([1, 2, 3, 50, 255, 256, 257, 300, 700, 2000])
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    x = torch.randn(num_rows, size, generator=generator)
    x *= chance.choice([0, 1e-3, 0.01, 0.3, 1, 3, 10, 1e4, 1e-30])
    x = chance.choice([lambda x: x, torch.Tensor.bfloat16, lambda x: (x * 2).round() / 2])(
        x
    ).float()
    if chance.random() < 0.3:
        x[
            torch.rand(x.shape, generator=generator) < chance.choice([0.1, 0.9, 0.999])
        ] = -math.inf
        x[:, chance.randrange(size)] = chance.choice([0.0, -0.0, 5.0, -5.0])

    def wish():
        return dict(
            temperature=chance.choice([0.01, 0.3, 0.8, 1, 1.5, 100]),
            top_k=chance.choice([0, 0, 1, 5, 50, 255, 256, 257, 299, 1000, 10**6]),
            top_p=chance.choice(
                [1, 1, 1e-15, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.99, 0.9999, 1 - 1e-7]
            ),
            min_p=chance.choice([0, 0, 0, 1e-9, 0.01, 0.5, 1]),
        )

    return x, [row(chance.randrange(2**63), output=range(i), **wish()) for i in range(num_rows)]


@pytest.mark.parametrize("start", range(4))
def test_a_draw_is_the_definitions(start):
    "Thousands of rows: flat and steep, ties, masks, tiny vocabularies, any parameters."
    whole = 0
    for seed in range(start * 160, start * 160 + 160):
        x, rows = random_case(random.Random(seed), 6)
        keys = noise_keys([one.seed for one in rows], [one.position for one in rows])
        params = [one.params for one in rows]
        tokens, num_open = drawn_by(x, params, keys)
        assert tokens == [plain_token(a, one) for a, one in zip(x, rows)], seed
        whole += num_open
    assert whole > 20


@pytest.mark.parametrize("start", range(4))
def test_bars_are_the_definitions(start):
    for seed in range(start * 160, start * 160 + 160):
        x, rows = random_case(random.Random(seed + 10_000), 4)
        x = x / torch.tensor([[one.params.temperature] for one in rows])
        bars = bars_of(x, [one.params for one in rows])
        expected = torch.tensor([plain_bar(a, one.params) for a, one in zip(x, rows)])
        assert torch.equal(
            (x >= bars), x >= expected.clamp(min=torch.finfo(torch.float32).min)[:, None]
        ), seed


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.data())
def test_crossing_finds_every_float(values, data):
    x = torch.tensor([values])
    weight = torch.tensor(
        [data.draw(st.lists(st.integers(0, 2**40), min_size=len(values), max_size=len(values)))]
    )
    total = int(weight.sum())
    if total:
        target = data.draw(st.integers(1, total))
        found = crossing(x, weight, torch.tensor([[target]])).item()
        above = sum(w for v, w in zip(values, weight[0].tolist()) if v > found)
        here = sum(w for v, w in zip(values, weight[0].tolist()) if v >= found)
        assert above < target <= here


def test_a_large_vocabulary_and_scores_that_tie():
    "Qwen's vocabulary; scores that are equal up to rounding are won by the lowest token id."
    x = random_logits(2, 151_936) * 0.01
    rows = [row(seed=1, top_p=0.99), row(seed=2, top_k=100_000, top_p=0.999)]
    assert sample(x, rows).token_ids == [plain_token(a, one) for a, one in zip(x, rows)]
    x = torch.full((500, 300), 2.0**26)  # the noise is rounded away
    rows = [row(seed=i) for i in range(500)]
    assert sample(x, rows).token_ids == [plain_token(a, one) for a, one in zip(x, rows)]


def test_no_noise_exceeds_the_bound():
    smallest = torch.tensor([0.5 * 2.0**-31])
    luckiest = -(-(-smallest).log1p()).log()
    assert MAX_GUMBEL - 0.1 < luckiest < MAX_GUMBEL
    assert gumbel(noise_keys(range(200), [0] * 200), torch.arange(50_000)).max() < MAX_GUMBEL


def test_failed_rows_do_not_disturb_their_neighbours():
    x = random_logits(6, 3000)
    x[1], x[3], x[4] = math.nan, -math.inf, math.inf
    rows = [row(seed=i, top_p=0.9, top_k=1000 * (i % 2)) for i in range(6)]
    out = sample(x, rows)
    assert out.failed == (1, 3, 4)
    for i in (0, 2, 5):
        assert out.token_ids[i] == plain_token(x[i], rows[i])


def test_penalties_remember_by_key_and_equal_a_fresh_count():
    chance, processor = random.Random(0), Penalties()
    outputs = {key: [] for key in "abcd"}
    prompts = {key: [chance.randrange(V) for _ in range(9)] for key in outputs}
    for step in range(60):
        keys = chance.sample("abcd", chance.randrange(1, 5))
        drafts = {
            key: [chance.randrange(9) for _ in range(chance.randrange(3))] for key in keys
        }
        rows = [
            row(
                prompt=prompts[key],
                output=outputs[key],
                drafts=drafts[key],
                key=key,
                frequency_penalty=0.3,
                presence_penalty=0.2,
                repetition_penalty=1.3,
            )
            for key in keys
            for _ in range(2)
        ]
        remembered, fresh = (
            random_logits(len(rows), seed=step),
            random_logits(len(rows), seed=step),
        )
        processor(remembered, rows)
        Penalties()(fresh, [replace(one, key=None) for one in rows])
        assert torch.equal(remembered, fresh)
        for key in keys:
            outputs[key] += [chance.randrange(9) for _ in range(chance.randrange(3))]
    processor(random_logits(1), [row()])
    assert not processor._known


def test_logprobs_come_from_the_raw_logits():
    logits = random_logits(1)
    wish = row(
        temperature=0.3,
        logit_bias={5: 100},
        logprobs=4,
        output=[1, 2],
        presence_penalty=1,
        top_k=3,
    )
    out = sample(logits, [wish])
    expected = logits[0].log_softmax(-1)
    report = out.logprobs[0]
    assert out.token_ids == [5] and report.token_id == 5
    assert report.logprob == pytest.approx(expected[5].item(), abs=1e-6)
    assert report.rank == (expected > expected[5]).sum() + 1
    best = expected.topk(4)
    assert [token for token, _ in report.top] == best.indices.tolist()
    assert [logprob for _, logprob in report.top] == pytest.approx(
        best.values.tolist(), abs=1e-6
    )


def test_logprobs_only_for_rows_that_ask():
    out = sample(
        random_logits(4),
        [row(), row(logprobs=0), row(logprobs=2), row(temperature=0, logprobs=20)],
    )
    assert out.logprobs[0] is None
    assert [len(report.top) for report in out.logprobs[1:]] == [0, 2, 20]
    assert out.logprobs[3].rank == 1 and out.logprobs[3].top[0][0] == out.token_ids[3]


def reports_of(logits, token_ids, nums):
    table = read(*measure_logprobs(logits, torch.tensor(token_ids), nums))
    return token_logprobs(token_ids, nums, *table)


def test_logprobs_in_a_batch_equal_those_alone():
    logits, nums = random_logits(4).bfloat16(), [0, 3, 20, 0]
    batch = reports_of(logits, [1, 2, 3, 4], nums)
    alone = [reports_of(logits[i : i + 1], [i + 1], nums[i : i + 1]) for i in range(4)]
    assert batch == [report for [report] in alone]


def test_logprobs_are_finite_and_vocabularies_may_be_small():
    logits = torch.tensor([[1.0, -math.inf, 0.0]])
    report = sample(logits, [row(temperature=0, logprobs=20)]).logprobs[0]
    assert len(report.top) == 3 and report.top[-1] == (1, -9999.0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_unusable_rows_are_named(temperature):
    logits = random_logits(5)
    logits[1, 3], logits[2], logits[4, 0] = math.nan, -math.inf, math.inf
    rows = [row(temperature=temperature, top_p=0.9, top_k=5, logprobs=1) for _ in range(5)]
    out, healthy = sample(logits, rows), sample(logits[[0, 3]], [rows[0], rows[3]])
    assert out.failed == (1, 2, 4) and healthy.failed == ()
    assert out.token_ids == [healthy.token_ids[0], 0, 0, healthy.token_ids[1], 0]
    assert out.logprobs == [healthy.logprobs[0], None, None, healthy.logprobs[1], None]


def test_a_mask_of_everything_is_an_error_of_that_row():
    def forbid_all_of_row_1(logits, rows):
        logits[1] = -math.inf

    processors = (forbid_all_of_row_1, *DEFAULT_PROCESSORS)
    assert sample(random_logits(3), [row()] * 3, processors).failed == (1,)
    sampler = Sampler([SamplingParams()] * 3, [PROMPT] * 3, processors=processors)
    with pytest.raises(LogitsError, match=r"rows \[1\]") as error:
        sampler(random_logits(3), [[]] * 3)
    assert error.value.rows == (1,) and isinstance(error.value, ValueError)


def test_a_mask_leaves_one_token():
    def only_token_9(logits, rows):
        keep = logits[:, 9].clone()
        logits.fill_(-math.inf)
        logits[:, 9] = keep

    rows = [row(seed=i, output=range(i)) for i in range(500)]
    assert (
        sample(random_logits(500), rows, (only_token_9, *DEFAULT_PROCESSORS)).token_ids
        == [9] * 500
    )


def test_shapes_at_the_edge():
    assert sample(torch.zeros(0, V), []).token_ids == []
    assert sample(
        torch.zeros(2, 1), [row(top_p=0.5, top_k=3, logprobs=2), row(temperature=0)]
    ).token_ids == [0, 0]
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        sample(torch.zeros(2, V), [row()])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("temperature", [1e-12, 0.01, 1.0, 100.0])
def test_extreme_scales_stay_finite(scale, temperature):
    logits = random_logits(3) * scale
    out = sample(
        logits,
        [
            row(temperature=temperature),
            row(temperature=temperature, top_p=0.5, logprobs=3),
            row(temperature=temperature, min_p=0.5, top_k=3),
        ],
    )
    assert all(0 <= token < V for token in out.token_ids) and math.isfinite(
        out.logprobs[1].logprob
    )


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen3"])
def model(request):
    return load_model(
        request.param, load_format="dummy", device="cpu", dtype="float32", progress=False
    )


PROMPT = [5, 6, 7, 8]


def test_temperature_zero_is_greedy(model):
    sampler = Sampler([SamplingParams(temperature=0, logprobs=1)], [PROMPT])
    out = list(generate(model, PROMPT, 10, sample=sampler))
    assert out == list(generate(model, PROMPT, 10))
    assert [report.token_id for report in sampler.logprobs[0]] == out
    assert all(report.rank == 1 for report in sampler.logprobs[0])


def test_a_seed_repeats_and_choices_differ(model):
    params = SamplingParams(seed=3, n=3)
    outs = [
        list(
            generate(
                model,
                PROMPT,
                10,
                sample=Sampler([params], [PROMPT], seeds=[row_seed(params, i)]),
            )
        )
        for i in (0, 1, 2, 0)
    ]
    assert outs[0] == outs[3] and len({tuple(out) for out in outs}) == 3
    assert outs[0] == list(generate(model, PROMPT, 10, sample=Sampler([params], [PROMPT])))


def test_min_tokens_and_stop_tokens_in_the_loop(model):
    banned = stop_ids(SamplingParams(stop_token_ids=range(0, 200)), ())
    params = SamplingParams(seed=0, min_tokens=6, stop_token_ids=list(banned))
    out = list(generate(model, PROMPT, 12, banned, Sampler([params], [PROMPT])))
    assert len(out) > 6 and not banned & set(out[:6])


def test_the_adapter_serves_a_batch_and_survives_going_back():
    params = [SamplingParams(seed=1, logprobs=0), SamplingParams(temperature=0)]
    sampler, logits = Sampler(params, [PROMPT, PROMPT]), random_logits(2)
    outputs = [[], []]
    first = sampler(logits, outputs)
    for row, token_id in zip(outputs, first):
        row.append(token_id)
    second = sampler(logits, outputs)
    assert sampler(logits, outputs) == second
    outputs[0].append(second[0])
    assert [report.token_id for report in sampler.logprobs[0]] == [
        first[0],
        second[0],
    ] and sampler.logprobs[1] == []
    with pytest.raises(ValueError):
        sampler(logits, [[]])


def test_the_adapter_checks_token_ids():
    sampler = Sampler([SamplingParams(logit_bias={V: 1.0})], [PROMPT])
    with pytest.raises(ValueError, match="logit_bias"):
        sampler(random_logits(1), [[]])


def test_logprobs_of_rows_that_ended_early():
    model = load_model(
        "tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False
    )
    sampler = Sampler([SamplingParams(temperature=0, logprobs=0)] * 2, [[1, 2], [3]])
    outputs = collect(generate_batch(model, [[1, 2], [3]], [1, 4], sample=sampler))
    assert [[report.token_id for report in row] for row in sampler.logprobs] == outputs


@pytest.mark.parametrize("key", ["1_0", "-1", " 5", True, 1.0, "9" * 30])
def test_logit_bias_keys_are_plain_integers(key):
    with pytest.raises(ValueError, match="logit_bias"):
        SamplingParams(logit_bias={key: 1.0})


# waiting for the device

@pytest.mark.parametrize("wait", [
    lambda x: x[[0, 1]], lambda x: x.nonzero(), lambda x: x[0, 0].item(), lambda x: x[x > 0],
    lambda x: x.__setitem__([0], 1.0), lambda x: torch.tensor([1, 2]).to(x.device),
    lambda x: torch.zeros(2).to("meta", torch.float64), lambda x: x.copy_(torch.zeros(3, 3)),
    lambda x: torch.tensor([1, 2], device=x.device) + 1])
def test_waiting_is_seen(wait):
    x = torch.empty(3, 3, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWaiting(x):
        wait(x)


def reads(monkeypatch, rows, is_open=False):
    "Shapes of the tensors in each transfer that `sample` makes for rows on a device."
    seen = []

    def read(*tensors):
        seen.append([tuple(t.shape) for t in tensors])
        values = [torch.ones(t.shape, dtype=t.dtype) for t in tensors]
        values[1].fill_(is_open and len(seen) == 1)
        return [value.tolist() for value in values]

    monkeypatch.setattr("nanollm.sampling.read", read)
    logits = torch.empty(len(rows), 5000, device="meta", dtype=torch.bfloat16)
    flags = torch.ones(9, device="meta", dtype=torch.bool)
    with NoWaiting(logits, flags):
        sample(logits, rows, others=[flags])
    return seen


COMMON = {
    "greedy": [dict(temperature=0)],
    "temperature": [dict(temperature=1.0)],
    "nucleus": [dict(temperature=0.8, top_p=0.95)],
    "Qwen3's": [dict(temperature=0.6, top_p=0.95, top_k=20)],
    "all filters": [dict(top_k=4000, top_p=0.5, min_p=0.1)],
    "logprobs": [dict(temperature=0, logprobs=0), dict(logprobs=20)],
    "edits": [dict(logit_bias={3: 1.0}, min_tokens=4, stop_token_ids=[7]),
              dict(frequency_penalty=0.5, presence_penalty=0.1, repetition_penalty=1.2)],
}
COMMON["a mix"] = [wish for wishes in COMMON.values() for wish in wishes]
COMMON["no row, as in a step with pieces of prompts alone"] = []


@pytest.mark.parametrize("wishes", COMMON.values(), ids=COMMON)
def test_the_device_is_waited_for_once(monkeypatch, wishes):
    rows = [row(seed=i, output=[1, 2], **wish) for i, wish in enumerate(wishes)]
    [shapes] = reads(monkeypatch, rows)
    assert shapes[:2] == [(len(rows),)] * 2 and (9,) in shapes, "and others' flags come along"


def test_rows_that_are_not_settled_cost_one_wait_more(monkeypatch):
    rows = [row(seed=i, top_p=0.99, logprobs=1) for i in range(3)]
    first, second = reads(monkeypatch, rows, is_open=True)
    assert (9,) in first and (9,) not in second and second[0] == (3,)
