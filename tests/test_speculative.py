"""Speculation: who drafts, how much, that nobody's tokens change, and that it costs no time."""

import copy
import gc
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nanollm.args import EngineArgs
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.llm import PromptEngine, make_engine
from nanollm.model import load_model
from nanollm.paged_attention import GroupedAttention, PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import Request, RequestEvent, StepRecord, Work
from nanollm.sampling import (
    SamplingParams,
    SamplingRow,
    draw,
    gumbel,
    noise_keys,
    sample,
)
from nanollm.scheduler import Scheduler
from nanollm.speculative import (
    MAX_INDEXED,
    AdaptiveDrafts,
    DraftModel,
    FirstProposer,
    NgramIndex,
    NgramProposer,
    SpeculativeConfig,
    StepCost,
    SuffixAutomaton,
    SuffixProposer,
    check_vocab,
    make_proposer,
)
from nanollm.text import byte_tokenizer
from nanollm.transformer import Decoder

torch.set_num_threads(1)
MODEL = load_model("tiny-llama", load_format="dummy", device="cpu", dtype="float32",
                   progress=False)
OTHER = load_model("tiny-qwen3", load_format="dummy", device="cpu", dtype="float32",
                   progress=False)
VOCAB = MODEL.config.vocab_size
GREEDY = SamplingParams(temperature=0, max_tokens=24)
WARM = SamplingParams(temperature=0.8, seed=3, max_tokens=24)


def request(prompt_ids=(1, 2, 3), output_ids=(), **params):
    one = Request("r", list(prompt_ids), SamplingParams(**{"max_tokens": 99} | params))
    for token_id in output_ids:
        one.append(token_id, 0.0)
    return one


def variant(model=MODEL, **changes):
    "A random model like another one, with some of its shape changed."
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def runner_of(model, num_blocks, size=4):
    cache = PagedKVCache(model.config, num_blocks, size)
    attention = GroupedAttention(cache, model.config.num_attention_heads)
    return ModelRunner(Decoder(model), attention)


def draft_model(model=MODEL, num_blocks=64, size=4, **options):
    cache = PrefixCachingBlockManager(num_blocks, size)
    return DraftModel(runner_of(model, num_blocks, size), cache, VOCAB, **options)


def engine_of(proposer=None, num_drafts=5, num_blocks=64, budget=64, listeners=(), size=4,
              manager=PrefixCachingBlockManager, max_num_seqs=8, model=MODEL):
    scheduler = Scheduler(manager(num_blocks, size), ChunkedPrefill(), max_num_seqs, budget)
    listeners = [*([proposer] if callable(proposer) else []), *listeners]
    return Engine(runner_of(model, num_blocks, size), scheduler, proposer=proposer,
                  num_drafts=num_drafts, listeners=listeners, self_check=True)


def run(engine, *loads):
    "The tokens of each request; a load is a prompt with its parameters."
    ids = [engine.add_request(prompt, params) for prompt, params in loads]
    found = {name: [] for name in ids}
    while engine.has_unfinished:
        for out in engine.step():
            assert out.error is None
            found[out.request_id] += out.token_ids
    return [found[name] for name in ids]


class Log(list):
    "A listener that keeps the work of all steps."

    def __call__(self, event):
        self.extend(getattr(event, "works", ()))

    @property
    def accepted(self):
        return sum(max(0, work.num_made - 1) for work in self)

    @property
    def drafts(self):
        return sum(work.num_drafts for work in self)


# looking up


def earlier(text, size):
    "The ends of earlier places of a text's last tokens."
    last = text[len(text) - size:]
    return [end for end in range(size, len(text)) if text[end - size:end] == last]


def texts(seed):
    "Texts that repeat themselves a lot, a little, and not at all."
    draw = random.Random(seed)
    for letters in (1, 2, 3, 8, 1000):
        yield [draw.randrange(letters) for _ in range(draw.randint(1, 60))]
    part = [draw.randrange(50) for _ in range(9)]
    yield part * 4 + part[:4]


@pytest.mark.parametrize("seed", range(20))
def test_the_suffix_automaton_finds_the_longest_repeat(seed):
    for text in texts(seed):
        index = SuffixAutomaton()
        for i, token_id in enumerate(text):
            index.extend([token_id])
            now = text[:i + 1]
            longest = max((n for n in range(1, len(now)) if earlier(now, n)), default=0)
            place, most = index.find()
            assert most == longest
            assert not most or place in earlier(now, most)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 4), (3, 3), (5, 5)])
def test_ngrams_find_the_last_place_of_the_longest_run(sizes):
    low, high = sizes
    for text in texts(sum(sizes)):
        index = NgramIndex(low, high)
        for i, token_id in enumerate(text):
            index.extend([token_id])
            now = text[:i + 1]
            sizes = [n for n in range(low, high + 1) if n < len(now) and earlier(now, n)]
            place, most = index.find()
            assert bool(most) == bool(sizes)
            assert not sizes or place == earlier(now, sizes[-1])[-1]


@pytest.mark.parametrize("make", [SuffixAutomaton, lambda: NgramIndex(2, 3)])
def test_an_index_may_be_read_in_parts(make):
    for text in texts(3):
        whole, parts = make(), make()
        whole.extend(text)
        for start in range(0, len(text), 7):
            parts.extend(text[start:start + 7])
        assert whole.find() == parts.find() and whole.token_ids == parts.token_ids == text


def test_a_repeat_may_go_on_beyond_the_end_of_the_text():
    one = request([7, 8, 9] * 3)
    assert NgramProposer(2, 2).propose([one], [7]) == [[7, 8, 9, 7, 8, 9, 7]]
    assert SuffixProposer().propose([one], [7]) == [[7, 8, 9, 7, 8, 9]] # as many as match


def test_what_never_was_there_is_not_guessed():
    for proposer in (NgramProposer(1, 3), SuffixProposer()):
        assert proposer.propose([request(range(30))], [5]) == [[]]
        assert proposer.propose([], []) == []


@pytest.mark.parametrize("make", [NgramProposer, SuffixProposer])
def test_a_token_is_read_once_and_long_prompts_over_several_steps(make, monkeypatch):
    proposer, read = make(), []
    long, short = request([*range(1, 3000)] * 2), request([1, 2, 3, 4, 5, 6] * 2)
    kind = SuffixAutomaton if make is SuffixProposer else NgramIndex
    honest = kind.extend
    monkeypatch.setattr(kind, "extend",
                        lambda self, ids: (read.append(len(ids)), honest(self, ids))[1])
    num_calls = 0
    while not proposer.propose([long, short], [3, 3])[0]:
        num_calls += 1
        assert sum(read) <= (num_calls + 1) * MAX_INDEXED
    assert num_calls == 2 and max(read) <= MAX_INDEXED
    assert sum(read) == long.num_tokens + short.num_tokens
    del read[:]
    for token_id in range(9):
        long.append(token_id, 0.0)
        proposer.propose([long, short], [3, 3])
    assert sum(read) == 9
    proposer.propose([request([5] * 50)], [0])
    assert sum(read) == 9 # nobody wants drafts of it


@pytest.mark.parametrize("proposer", [NgramProposer(), SuffixProposer(),
                                      AdaptiveDrafts(SuffixProposer(), 4)])
def test_what_is_kept_of_a_request_goes_with_it(proposer):
    one = request([1, 2, 3] * 9)
    assert proposer.propose([one], [3])[0]
    if callable(proposer):
        work = Work(one, 26, 4, 3, 2, ())
        proposer(StepRecord(0, 0.0, 1.0, (work,), 0, 1, 0.0))
        del work
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert not getattr(proposer, "proposer", proposer)._indices


# several proposers


class Fixed:
    "A proposer that always says the same; it notes for whom it was asked, and how much."

    def __init__(self, token_ids):
        self.token_ids, self.asked, self.events = token_ids, [], []

    def propose(self, requests, max_tokens):
        self.asked.append((list(requests), list(max_tokens)))
        return [list(self.token_ids) for _ in requests]

    def __call__(self, event):
        self.events.append(event)


def test_a_request_takes_the_first_guess_that_it_gets():
    a, b, c = (request([9] * 9), request(), request())
    first, second = NgramProposer(2, 2), Fixed([1, 2, 3, 4])
    proposer = FirstProposer((first, 9), (second, 2))
    assert proposer.propose([a, b, c], [3, 5, 0]) == [[9, 9, 9], [1, 2], []]
    assert second.asked == [([b], [2])]
    assert FirstProposer((first, 2)).propose([a], [3]) == [[9, 9]] # each has its own limit
    assert proposer.propose([], []) == [] and len(second.asked) == 1
    proposer("event")
    assert second.events == ["event"]


# how many


def step(works, seconds, start_s=0.0):
    return StepRecord(0, start_s, start_s + seconds, tuple(works), 0, len(works), 0.5)


def work(one, num_drafts, num_made, num_new=None):
    num_new = num_drafts + 1 if num_new is None else num_new
    return Work(one, 5, num_new, num_drafts, num_made, ())


def learned(proposer, cases, seconds=lambda num, drafts: 0.02 + 0.001 * (num + drafts)):
    "Show an adaptive proposer steps: for each (drafts, right ones) of a request of its own."
    for drafts, right in cases:
        one = request()
        proposer._asked = {one}
        proposer(step([work(one, drafts, right + 1)], seconds(1, drafts)))
    return proposer


def test_acceptance_is_learned_from_what_was_judged():
    right = learned(AdaptiveDrafts(Fixed([1]), 5), [(5, 5)] * 60)
    wrong = learned(AdaptiveDrafts(Fixed([1]), 5), [(5, 0)] * 300)
    half = learned(AdaptiveDrafts(Fixed([1]), 5), [(5, 1), (1, 1), (1, 0)] * 100)
    assert right.acceptance > 0.97 and wrong.acceptance < 0.03
    assert 0.3 < half.acceptance < 0.7
    assert right.choose([right.acceptance], [5]) == [5]
    assert wrong.choose([wrong.acceptance], [5]) == [0]


def test_only_its_own_drafts_are_judged():
    "Jump-forward's are nearly always right, and say nothing of those of a model."
    proposer, one = AdaptiveDrafts(Fixed([1, 2]), 2), request()
    before = proposer.acceptance
    proposer(step([work(one, 5, 6)], 0.02)) # somebody else's
    assert proposer.acceptance == before
    proposer.propose([one], [2])
    proposer(step([work(one, 2, 1)], 0.02))
    after = proposer.acceptance
    assert after < before
    proposer(step([work(one, 5, 6)], 0.02)) # it was not asked in this step
    assert proposer.acceptance == after
    proposer.propose([one], [2])
    proposer(step([work(one, 2, 0)], 0.02)) # the step has failed: nothing is judged
    assert proposer.acceptance == after


def test_an_end_is_no_wrong_draft():
    proposer, one = AdaptiveDrafts(Fixed([1] * 5), 5), request(max_tokens=2)
    proposer.propose([one], [5])
    before = proposer.acceptance
    one.finish("length", 0.0)
    proposer(step([work(one, 5, 2)], 0.02))
    assert proposer.acceptance > before


def test_each_request_gets_drafts_by_its_own_acceptance():
    proposer = learned(AdaptiveDrafts(Fixed([1] * 8), 8), [(0, 0), (8, 8)] * 20)
    copies, tells, fresh = request(), request(), request()
    for _ in range(40):
        proposer._asked = {copies, tells}
        proposer(step([work(copies, 8, 9), work(tells, 1, 1)], 0.03))
    proposer._waited = 0
    drafts = proposer.propose([copies, tells, fresh], [8, 8, 8])
    assert len(drafts[0]) == 8 and drafts[1] == [] and len(drafts[2]) >= 1


def test_limits_hold():
    proposer = learned(AdaptiveDrafts(Fixed([1] * 9), 4), [(0, 0), (4, 4)] * 20)
    drafts = proposer.propose([request(), request(), request()], [9, 2, 0])
    assert [len(draft) for draft in drafts] == [4, 2, 0]


def test_the_cost_is_learned_in_spite_of_slow_steps_and_prompts():
    draw, cost = random.Random(0), StepCost()
    for i in range(300):
        num, drafts = draw.choice([1, 2, 8]), draw.randint(0, 20)
        seconds = 0.02 + 0.001 * num + 0.0004 * drafts
        slow = 30 if i < 4 else 8 if i % 25 == 0 else 1
        cost.add(num, drafts, seconds * slow * draw.uniform(0.97, 1.03))
    assert cost.seconds(4, 0, 0) == pytest.approx(0.024, rel=0.1)
    assert cost.parts[2] == pytest.approx(0.0004, rel=0.4)
    proposer, one = AdaptiveDrafts(Fixed([1]), 4), request()
    before = proposer.cost.parts
    for _ in range(20):
        proposer(step([work(one, 0, 1), work(one, 0, 0, num_new=500)], 3.0))
    assert proposer.cost.parts == before # steps with prompts are not looked at


def test_costs_are_least_squares_that_fade():
    draw, cost, prior = random.Random(1), StepCost(), np.array([1, 0.05, 0.05])
    xx, xy, parts = np.zeros((3, 3)), np.zeros(3), prior
    for i in range(200):
        x = np.array([1, draw.choice([1, 4, 64]), draw.randint(0, 300)])
        seconds = draw.uniform(0.5, 1.5) * (0.02 + 1e-3 * x[1] - 1e-5 * x[2])
        cost.add(*x[1:].tolist(), seconds)
        if i >= 12:
            seconds = min(seconds, 2 * parts @ x)
        if i >= 4:
            xx, xy = 0.98 * xx + np.outer(x, x), 0.98 * xy + x * seconds
            usual = prior * (xy[0] / (xx[0] @ prior))
            parts = np.linalg.solve(xx + 0.5 * np.eye(3), xy + 0.5 * usual)
            parts = parts.clip(1e-3 * usual)
        np.testing.assert_allclose(cost.parts, parts, rtol=1e-6)


def test_steps_of_one_size_teach_the_rest_by_probes():
    "At k = 0 all steps look alike; the probes among them say what a draft costs."
    cost = StepCost()
    for i in range(400):
        probes = 16 if i % 16 == 0 else 0
        cost.add(16, probes, 0.03 + 0.0015 * probes)
    assert cost.parts[2] == pytest.approx(0.0015, rel=0.2)


class Load:
    "A server of so many requests in which time is counted, and not measured."

    def __init__(self, num, acceptance, request_cost, draft_cost, guesses=1.0, life=60,
                 depth_cost=0.0, seed=0):
        self.draw, self.life, self.guesses = random.Random(seed), life, guesses
        self.noise = random.Random(seed) # the same in every load
        self.cost = request_cost, draft_cost, depth_cost
        self.acceptance = acceptance if callable(acceptance) else lambda draw: acceptance
        self.rows = [self.new(self.draw.randint(2, life)) for _ in range(num)]
        self.clock = self.total = 0

    def new(self, left):
        one = request(max_tokens=1000)
        return SimpleNamespace(request=one, left=left, rate=self.acceptance(self.draw))

    def propose(self, requests, max_tokens):
        return [[0] * k if self.draw.random() < self.guesses else [] for k in max_tokens]

    def step(self, proposer, first=False):
        requests = [row.request for row in self.rows]
        drafts = proposer.propose(requests, [min(8, row.left - 1) for row in self.rows])
        works = []
        for row, draft in zip(self.rows, drafts):
            right = 0
            while right < len(draft) and self.draw.random() < row.rate:
                right += 1
            row.left -= right + 1
            self.total += right + 1
            if not row.left:
                row.request.finish("length", 0.0)
            works.append(work(row.request, len(draft), right + 1))
        per_request, per_draft, per_depth = self.cost
        depth = max(map(len, drafts))
        seconds = 1 + per_request * len(works) + per_draft * sum(map(len, drafts))
        seconds *= 1 + abs(self.noise.gauss(0, 0.05))
        seconds += 10 if first else 3 if self.noise.random() < 0.01 else 0
        if isinstance(proposer, AdaptiveDrafts):
            proposer._spent_s = depth * per_depth
            if depth:
                proposer.cost.depth_s[-1] = per_depth
        self.clock += seconds + depth * per_depth
        proposer(step(works, seconds + depth * per_depth))
        self.rows = [row if row.left else self.new(self.life) for row in self.rows]

    @classmethod
    def speed(cls, num_drafts, num_steps, *args, **options):
        "Tokens per second with a fixed number of drafts, or as many as pay (None)."
        load = cls(*args, **options)
        proposer = AdaptiveDrafts(load, 8) if num_drafts is None else FirstProposer(
            (load, num_drafts))
        proposer = proposer if num_drafts is None else Quiet(proposer)
        for i in range(num_steps):
            load.step(proposer, first=not i)
        return load.total / load.clock


class Quiet:
    "A proposer without ears."

    def __init__(self, proposer):
        self.propose = proposer.propose

    def __call__(self, event):
        pass


LOADS = [(1, 0.04, 0.01), (1, 0.1, 0.12), (4, 0.04, 0.03), (16, 0.04, 0.008), (16, 0.04, 0.05)]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3])
def test_drafts_that_are_wrong_cost_three_percent_at_most(load, acceptance):
    num, per_request, per_draft = load
    args = 1000, num, acceptance, per_request, per_draft
    assert Load.speed(None, *args) > 0.97 * Load.speed(0, *args)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("acceptance", [0.6, 0.9, 0.98])
def test_the_rule_is_about_as_good_as_the_best_fixed_number(load, acceptance):
    num, per_request, per_draft = load
    args = 400, num, acceptance, per_request, per_draft
    best = max(Load.speed(k, *args) for k in (0, 1, 2, 4, 8))
    assert Load.speed(None, *args) > 0.9 * best


def test_a_mixed_load_is_better_off_than_with_any_fixed_number():
    args = 400, 16, lambda draw: draw.choice([0.02, 0.95]), 0.04, 0.02
    best = max(Load.speed(k, *args) for k in (0, 1, 2, 4, 8))
    assert Load.speed(None, *args) > best


def test_a_dear_draft_model_is_given_up_and_a_cheap_one_used():
    for depth_cost, low, high in ((0.9, 0.97, 1.05), (0.1, 1.3, 3)):
        args, cost = (600, 4, 0.7, 0.04, 0.01), {"depth_cost": depth_cost}
        assert low < Load.speed(None, *args, **cost) / Load.speed(0, *args, **cost) < high


def test_after_bad_times_good_drafts_are_found_again():
    load = Load(4, 0.0, 0.04, 0.03)
    proposer = AdaptiveDrafts(load, 8)
    for rate, low, high in ((0.0, 0, 1), (1.0, 8, 8), (0.0, 0, 1)):
        load.acceptance = lambda draw, rate=rate: rate
        for row in load.rows:
            row.rate = rate
        for _ in range(400):
            load.step(proposer)
        assert low <= proposer.choose([proposer.acceptance], [8])[0] <= high


# a draft model


def test_a_model_that_drafts_for_itself_is_always_right():
    for params in (GREEDY, WARM, WARM.model_copy(update={"top_p": 0.7, "min_p": 0.02})):
        log, draft = Log(), draft_model()
        plain = run(engine_of(), (range(9), params), ([5] * 6, params))
        assert run(engine_of(draft, 5, listeners=[log]),
                   (range(9), params), ([5] * 6, params)) == plain
        assert log.accepted == log.drafts > 30
        assert not draft.shadows and draft.cache.usage == 0


def test_acceptance_does_not_suffer_from_prefix_hits():
    "vLLM #47930; and of a hit the draft model computes as little as its target does."
    draft, log, seen = draft_model(), Log(), []
    engine = engine_of(draft, 5, listeners=[log])
    honest = draft.runner.forward
    draft.runner.forward = lambda batch: (seen.append(len(batch.token_ids)), honest(batch))[1]
    prompt = list(range(40))
    first = run(engine, (prompt, WARM))
    cold, computed = log.accepted / log.drafts, sum(seen)
    del log[:], seen[:]
    again = run(engine, (prompt, WARM), (prompt[:30], WARM))
    assert again[0] == first[0] and engine.scheduler.cache.usage == 0
    assert log.accepted == log.drafts and cold == 1
    assert sum(seen) < 2 * computed - 60
    draft.cache.check([])


@pytest.mark.parametrize("params", [GREEDY, WARM])
@pytest.mark.parametrize("model", [OTHER, variant(vocab_size=250), variant(vocab_size=400),
                                   variant(max_position_embeddings=20)],
                         ids=["other", "fewer tokens", "more tokens", "short context"])
def test_any_draft_model_leaves_the_tokens_alone(model, params):
    "One with other tokens, or fewer, or a context too short for the text (vLLM #42533)."
    loads = [(range(300, 309), params), ([5] * 6, params)]
    log, draft = Log(), draft_model(model)
    assert run(engine_of(draft, 4, listeners=[log]), *loads) == run(engine_of(), *loads)
    assert log.drafts > 8 and not draft.shadows and draft.cache.usage == 0


def test_a_prompt_is_caught_up_with_in_parts():
    draft, seen = draft_model(num_blocks=128, max_num_tokens=16), []
    honest = draft.runner.forward
    draft.runner.forward = lambda batch: (seen.append(len(batch.token_ids)), honest(batch))[1]
    loads = [(range(90), GREEDY), ([3] * 50, GREEDY)]
    assert run(engine_of(draft, 3, num_blocks=128), *loads) == run(engine_of(), *loads)
    assert max(seen) == 16 and seen[:3] == [16] * 3


def test_drafts_are_drawn_with_the_parameters_of_the_request_and_no_reports(monkeypatch):
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=20, logprobs=3, min_tokens=8,
                            prompt_logprobs=1, frequency_penalty=1.5, repetition_penalty=1.2)
    rows = []
    monkeypatch.setattr("nanollm.speculative.sample", lambda logits, some, processors: (
        rows.extend(some), sample(logits, some, processors))[1])
    log = Log()
    engine = engine_of(draft_model(), 5, listeners=[log])
    assert run(engine, (range(9), params)) == run(engine_of(), (range(9), params))
    assert log.accepted == log.drafts > 10
    assert rows and all(row.params.logprobs is None for row in rows)
    assert {row.params.frequency_penalty for row in rows} == {1.5}


def test_the_pool_of_a_draft_model_may_be_too_small():
    "Then it drafts for some, or for none, and nobody is preempted for it."
    loads = [([i] * 20, WARM) for i in range(4)]
    for num_blocks in (1, 8, 13):
        log, draft = Log(), draft_model(num_blocks=num_blocks)
        events = []
        engine = engine_of(draft, 4, listeners=[log, events.append])
        assert run(engine, *loads) == run(engine_of(), *loads)
        assert (log.drafts > 0) == (num_blocks > 1)
        assert "preempted" not in [getattr(event, "kind", None) for event in events]
        assert not draft.shadows and draft.cache.usage == 0


def test_shadows_go_with_preempted_and_aborted_requests():
    draft, kinds = draft_model(), []

    def watch(event):
        if isinstance(event, RequestEvent):
            kinds.append(event.kind)
            assert event.kind not in ("preempted", "finished") or (
                event.request not in draft.shadows)

    engine = engine_of(draft, 4, num_blocks=14, listeners=[watch])
    names = [engine.add_request([i] * 9, WARM) for i in range(3)]
    while engine.has_unfinished:
        engine.step()
        draft.cache.check(draft.shadows.values())
        if len(kinds) > 8:
            engine.abort(names[2])
    assert "preempted" in kinds and not draft.shadows and draft.cache.usage == 0


def test_a_draft_model_that_fails_costs_its_drafts():
    draft, log, loads = draft_model(), Log(), [(range(9), WARM), ([5] * 6, WARM)]
    honest, num_calls = draft.runner.forward, iter(range(1000))

    def forward(batch):
        out = honest(batch)
        if next(num_calls) % 5 == 3:
            raise RuntimeError("on purpose")
        return out

    draft.runner.forward = forward
    assert run(engine_of(draft, 4, listeners=[log]), *loads) == run(engine_of(), *loads)
    assert log.accepted == log.drafts > 10 and not draft.shadows and draft.cache.usage == 0
    draft.runner.forward = lambda batch: (honest(batch)[0] * torch.nan, None)
    assert run(engine_of(draft, 4, listeners=[log]), *loads) == run(engine_of(), *loads)


def test_a_request_that_was_not_served_is_drafted_for_again():
    draft, one = draft_model(), request(range(7), [3])
    first = draft.propose([one], [4])
    assert len(first[0]) == 4 and draft.propose([one], [4]) == first
    one.append(first[0][0], 0.0)
    one.append(first[0][1] + 1, 0.0)
    again = draft.propose([one], [2])
    fresh = draft_model()
    assert fresh.propose([one], [2]) == again
    draft(RequestEvent("finished", 0.0, one))
    assert draft.cache.usage == 0


def test_only_what_was_verified_is_shared():
    "A block named after a wrong guess would give everybody a wrong prefix."
    draft, one = draft_model(size=2), request(range(3), [8], seed=1)
    guess = draft.propose([one], [5])[0]
    named = set(draft.cache._block_of)
    for token_id in [guess[0], (guess[1] + 1) % VOCAB, 9, 9]:
        one.append(token_id, 0.0)
    draft.propose([one], [1])
    shadow = draft.shadows[one]
    assert len(named) == 2
    assert set(draft.cache._block_of) == set(shadow.block_hashes[:one.num_tokens // 2])
    fresh = request(one.token_ids, [7])
    assert draft.propose([fresh], [3]) == draft_model(size=2).propose([fresh], [3])


def test_tokenizers_have_to_be_equal():
    "SGLang #23838."
    words = {"a": 0, "b": 1, "c": 2}
    check_vocab(words, dict(words))
    with pytest.raises(ValueError, match="the token 'b' is 2 to one and 1 to the other"):
        check_vocab(words, {"a": 0, "b": 2, "c": 1})
    with pytest.raises(ValueError, match="the token 'c' is unknown to one and 2"):
        check_vocab(words, {"a": 0, "b": 1})


# the tokens


PROMPTS = [[7, 8, 9, 10] * 5, [1, 2] * 4, list(range(30))]


def proposers():
    yield NgramProposer(1, 3)
    yield SuffixProposer()
    yield draft_model(OTHER)
    for inner in (NgramProposer(2, 2), draft_model(), Fixed([-1, 3]), Fixed([VOCAB]),
                  Fixed([5] * 40)):
        yield AdaptiveDrafts(inner, 8)
    yield FirstProposer((NgramProposer(3, 3), 4), (AdaptiveDrafts(draft_model(), 3), 3))


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("num_drafts", [1, 7, 32])
def test_the_tokens_are_those_of_the_naive_loop(number, num_drafts):
    for params in (GREEDY, WARM.model_copy(update={"max_tokens": 40})):
        plain = run(engine_of(), *((prompt, params) for prompt in PROMPTS))
        proposer = list(proposers())[number]
        engine = engine_of(proposer, num_drafts, num_blocks=24)
        assert run(engine, *((prompt, params) for prompt in PROMPTS)) == plain
    if params is GREEDY:
        assert plain[0] == list(generate(MODEL, PROMPTS[0], 24, ()))


def texts_of(proposer, prompts, **params):
    "Texts, tokens, reports and reasons of prompts, with a small model of bytes."
    args = EngineArgs(num_kv_blocks=64, block_size=4)
    engine = make_engine(args, MODEL, proposer=proposer, num_drafts=16)
    if callable(proposer):
        engine.listeners.append(proposer)
    texts = PromptEngine(engine, byte_tokenizer())
    last = {}
    for i, answer, _ in texts.stream(prompts, SamplingParams(**params)):
        last[i] = answer
    return [(a.text, a.token_ids, [(one.token_id, round(one.logprob, 3)) for one in a.logprobs],
             a.finish_reason, a.stop_reason) for _, a in sorted(last.items())]


class Right:
    "Drafts the right tokens, as many as it may."

    def __init__(self, answers):
        self.answers = answers

    def propose(self, requests, max_tokens):
        for request, k in zip(requests, max_tokens):
            done = len(request.output_ids)
            yield self.answers[tuple(request.prompt_ids)][done:done + k]


def test_stop_strings_in_long_accepted_runs():
    """vLLM #47616 and SGLang #31599, #23802: nothing comes after a stop string, and the reason
    is the stop, though the run that was accepted with it goes on to max_tokens."""
    prompts, options = [[5, 6, 7], [9, 8]], dict(temperature=0.9, seed=2, logprobs=2)
    free = texts_of(None, prompts, max_tokens=30, **options)
    right = Right({tuple(p): one[1] for p, one in zip(prompts, free)})
    for start, size in ((2, 1), (5, 3), (9, 8), (1, 12)):
        stops = [free[0][0][start:start + size], free[1][0][start:start + size]]
        stops = [stop for stop in stops if stop and "\ufffd" not in stop] or ["zz"]
        for more in ({}, {"include_stop_str_in_output": True}, {"min_tokens": 7}):
            asked = dict(max_tokens=30, stop=stops, **options, **more)
            plain = texts_of(None, prompts, **asked)
            assert texts_of(right, prompts, **asked) == plain
            assert all(len(ids) == len(reports) for _, ids, reports, *_ in plain)


# statistics


def pairs(num, vocab_size, seed=0):
    "Logits of a target and of a draft model that resembles it."
    torch.manual_seed(seed)
    x = torch.randn(num, vocab_size) * 2
    return x, x + torch.randn(num, vocab_size)


def drawn(logits, num, seed=0):
    "Draw many times from one row, with the noise of as many positions."
    params = [SamplingParams(temperature=1.0)] * num
    keys = noise_keys([seed] * num, range(num))
    return draw(logits.expand(num, -1), params, keys)[0]


def test_with_shared_noise_the_output_is_the_targets():
    "A draw is that of the target whatever was drafted, and its frequencies are right."
    (x,), (y,) = pairs(1, 12)
    num = 40_000
    target, draft = drawn(x, num), drawn(y, num)
    out = torch.where(draft == target, draft, target) # accepted, or replaced
    assert torch.equal(out, target)
    p, counts = x.softmax(-1), torch.bincount(out, minlength=12)
    chi2 = ((counts - num * p) ** 2 / (num * p)).sum()
    assert chi2 < 31.3 # of 11 degrees of freedom, exceeded once in a thousand


def test_the_usual_rule_is_biased_with_shared_noise():
    """Accept with u < p/q, else draw from what is left of p (vLLM #47386): right if drafts have
    noise of their own, wrong if they were drawn with the noise that decides."""
    p, q = torch.tensor([0.1, 0.6, 0.3]), torch.tensor([0.7, 0.25, 0.05])
    num = 40_000
    draft, u = drawn(q.log(), num), torch.rand(num, generator=torch.Generator().manual_seed(3))
    left = (p - q).clamp(min=0)
    for seed, is_right in ((1, True), (0, False)): # of the noise with which `left` is drawn
        again = (left.log() + gumbel(noise_keys([seed] * num, range(num)),
                                     torch.arange(3))).argmax(-1)
        out = torch.where(u < (p / q)[draft], draft, again)
        share = torch.bincount(out, minlength=3) / num
        assert torch.allclose(share, p, atol=0.01) == is_right


def test_acceptance_lies_between_its_bounds():
    targets, drafts = pairs(40, 50)
    for x, y in zip(targets, drafts):
        p, q = x.softmax(-1), y.softmax(-1)
        most = torch.minimum(p, q).sum().item() # 1 - TV
        least = most / (2 - most) # (1 - TV) / (1 + TV)
        share = (drawn(x, 4000) == drawn(y, 4000)).float().mean().item()
        assert least - 0.03 < share < most + 0.03


def test_noise_depends_on_the_request_and_the_position_alone():
    "So a draft model and its target, in batches of any kind, draw with the same."
    params = SamplingParams(temperature=1.0)
    rows = [SamplingRow(params, [1], [4, 5], 7),
            SamplingRow(params, [1], [4], 7, draft_ids=[5])]
    logits = torch.randn(1, 30).expand(2, -1)
    ids = sample(logits, rows, ()).token_ids
    assert ids[0] == ids[1]


# the configuration


def test_the_configuration_has_vllms_names_and_defaults():
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=5)
    assert (config.prompt_lookup_min, config.prompt_lookup_max, config.adaptive) == (5, 5, True)
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=5, prompt_lookup_max=4)
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == (4, 4)
    config = SpeculativeConfig(model="small", num_speculative_tokens=1)
    assert config.method == "draft_model"


@pytest.mark.parametrize("fields, message", [
    ({}, "num_speculative_tokens: Field required"),
    (dict(num_speculative_tokens=5), "method must be ngram, suffix, or draft_model"),
    (dict(num_speculative_tokens=5, method="draft_model"), "draft_model with a model"),
    (dict(num_speculative_tokens=5, method="ngram", model="x"), "got method='ngram' and model"),
    (dict(num_speculative_tokens=0, method="ngram"), "greater than or equal to 1, got 0"),
    (dict(num_speculative_tokens=33, method="ngram"), "less than or equal to 32, got 33"),
    (dict(num_speculative_tokens=True, method="ngram"), "num_speculative_tokens: .* got True"),
    (dict(num_speculative_tokens=5, method="eagle"), "method: .* got 'eagle'"),
    (dict(num_speculative_tokens=5, method="suffix", prompt_lookup_max=3), "are for method"),
    (dict(num_speculative_tokens=5, method="ngram", prompt_lookup_min=4, prompt_lookup_max=3),
     "prompt_lookup_min must be at most prompt_lookup_max=3, got 4"),
    (dict(num_speculative_tokens=5, method="ngram", prompt_lookup_min=0), "got 0"),
    (dict(num_speculative_tokens=5, method="ngram", draft_tensor_parallel_size=1),
     "draft_tensor_parallel_size: "),
    (dict(num_speculative_tokens=5, method="ngram", adaptive=1), "adaptive: "),
])
def test_a_bad_configuration_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        SpeculativeConfig(**fields)
    assert "\n" not in str(error.value)


def test_proposers_are_made_from_the_configuration():
    def make(**fields):
        return make_proposer(SpeculativeConfig(num_speculative_tokens=5, **fields),
                             lambda config: ("model", config.model))

    assert isinstance(make(method="ngram", adaptive=False), NgramProposer)
    adaptive = make(method="suffix")
    assert isinstance(adaptive, AdaptiveDrafts) and adaptive.num_drafts == 5
    assert isinstance(adaptive.proposer, SuffixProposer)
    assert make(model="small").proposer == ("model", "small")
    assert make(model="small", adaptive=False) == ("model", "small")
