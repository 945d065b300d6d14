"""The oracle: in any schedule all get the tokens of the naive loop, and no block is lost."""

from collections import Counter
from functools import cache

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.model import load_model
from nanollm.paged_attention import (
    GroupedAttention,
    PagedKVCache,
    ReferenceAttention,
    TransformersModel,
)
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import RequestEvent
from nanollm.sampling import Sampler, SamplingParams, row_seed
from nanollm.scheduler import RANKS, Scheduler, WholePrompts
from nanollm.transformer import Decoder

SHAPES = ("tiny-llama", "tiny-qwen3")
EOS = tuple(range(18, 320, 40))
PREFIX = [(7 * i + 3) % 256 for i in range(40)]
SEEN = Counter()  # what the schedules have met, over all examples
LAST = {}  # when a request last went from one place to another, by kind
MUST_BE_SEEN = (
    "preempted", "hits after preemption", "prefix hits", "accepted drafts", "chunks",
    "steps with decodes and chunks", "blocks shared within their first step", "ended by stop",
    "ended by length", "aborts after admission", "aborts before admission", "failed forwards",
    "failed proposals", "Decoder", "TransformersModel", "seats given to another share")


@cache
def model(shape):
    torch.set_num_threads(1)
    return load_model(shape, load_format="dummy", device="cpu", dtype="float32", progress=False)


@cache
def naive(shape, prompt_ids, params, index):
    "What the naive loop says."
    sampler = Sampler([params], [prompt_ids], EOS, seeds=[row_seed(params, index)])
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
    return list(generate(model(shape), prompt_ids, params.max_tokens, stops, sampler))


class Guesser:
    "Drafts of which some are right: the naive loop's next tokens, spoilt here and there."

    def __init__(self, shape, spoil, fail_every):
        self.shape, self.spoil, self.fail_every, self.num_calls = shape, spoil, fail_every, 0

    def propose(self, requests, max_tokens):
        self.num_calls += 1
        if self.num_calls % self.fail_every == 0:
            SEEN["failed proposals"] += 1
            raise RuntimeError("this proposal fails on purpose")
        drafts = []
        for request, k in zip(requests, max_tokens):
            done = len(request.output_ids)
            prompt_ids, params = tuple(request.prompt_ids), request.params
            right = naive(self.shape, prompt_ids, params, request.index)[done:done + k]
            drafts.append([(token_id + 1) % 320 if (done + i) % self.spoil == 0 else token_id
                           for i, token_id in enumerate(right)])
        return drafts


class Watcher(ModelRunner):
    "A runner that counts what the steps are made of, and fails once if it is told to."

    fail_at = None

    def forward(self, batch):
        written, size = set(batch.slots), self.block_size
        SEEN["steps with decodes and chunks"] += len({n > 1 for n in batch.query_lens}) == 2
        for n, end, table in zip(batch.query_lens, batch.context_lens, batch.block_tables):
            before = {table[i // size] * size + i % size for i in range(end - n)}
            SEEN["blocks shared within their first step"] += bool(before & written)
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at == 0:
                SEEN["failed forwards"] += 1
                raise RuntimeError("this forward fails on purpose")
        return super().forward(batch)


def count(event):
    "A listener that counts what happens to requests."
    if isinstance(event, RequestEvent):
        SEEN[event.kind] += 1
        request, LAST[event.kind] = event.request, event.time_s
        if event.kind == "admitted":
            hit = request.num_computed_tokens > 0
            SEEN["prefix hits"] += hit
            SEEN["hits after preemption"] += hit and request.num_preemptions > 0
            SEEN["seats given to another share"] += LAST.get("preempted") == event.time_s
        if event.kind == "finished":
            SEEN[f"ended by {request.finish_reason}"] += 1
            if request.finish_reason == "abort":
                when = "after" if request.admitted_s else "before"
                SEEN[f"aborts {when} admission"] += 1
    else:
        for work in event.works:
            SEEN["chunks"] += work.start + work.num_new < work.request.num_prompt_tokens
            SEEN["drafts"] += work.num_drafts
            SEEN["accepted drafts"] += max(0, work.num_made - 1)


@st.composite
def requests(draw):
    shared = draw(st.sampled_from([0, 5, 16, 24, 31, 32, 40]))
    own = draw(st.lists(st.integers(0, 255), min_size=0 if shared else 1, max_size=30))
    max_tokens = draw(st.integers(1, 12))
    params = dict(
        max_tokens=max_tokens, n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        logprobs=draw(st.sampled_from([None, 1])), min_tokens=draw(st.integers(0, max_tokens)))
    if draw(st.booleans()):
        params |= dict(
            temperature=draw(st.sampled_from([0.7, 1.5])), seed=draw(st.integers(0, 3)),
            top_k=draw(st.sampled_from([0, 20])), top_p=draw(st.sampled_from([1.0, 0.9])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.5])))
    else:
        penalty = draw(st.sampled_from([1.0, 1.3]))
        params |= dict(temperature=0.0, repetition_penalty=penalty)
    return dict(
        prompt_ids=tuple(PREFIX[:shared] + own), params=SamplingParams(**params),
        arrival=draw(st.integers(0, 12)),
        abort=draw(st.sampled_from([None] * 6 + [1, 2, 4, 7, 12])),
        shares=draw(st.sampled_from([("a", "1")] * 3 + [("a", "2"), ("b", "3"), ()])),
        priority=draw(st.integers(0, 2)), cache_salt=draw(st.sampled_from(["", "", "", "b"])),
        use_prefix_cache=draw(st.sampled_from([True, True, True, False])))


@st.composite
def schedules(draw):
    arrivals = draw(st.lists(requests(), min_size=2, max_size=8))
    block_size = draw(st.sampled_from([*range(1, 9), 16, 32]))
    longest = max(len(r["prompt_ids"]) + r["params"].max_tokens - 1 for r in arrivals)
    spare = draw(st.sampled_from([0, 1, 12, 30, 80]))
    return dict(
        arrivals=arrivals, shape=draw(st.sampled_from(SHAPES)), block_size=block_size,
        num_blocks=-(-longest // block_size) - (-spare // block_size),
        max_num_batched_tokens=draw(st.sampled_from([8, 9, 16, 33, 512])),
        max_num_seqs=draw(st.sampled_from([1, 2, 2, 3, 3, 4, 6, 8])),
        manager=draw(st.sampled_from([BlockManager, PrefixCachingBlockManager])),
        policy=draw(st.sampled_from([WholePrompts, ChunkedPrefill])),
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        attention=draw(st.sampled_from([GroupedAttention] * 2 + [ReferenceAttention])),
        forward=draw(st.sampled_from([Decoder, Decoder, TransformersModel])),
        limit=draw(st.sampled_from([None, None, 1, 5])),
        shared=draw(st.sampled_from([True, True, False])),
        fail_at=draw(st.sampled_from([None] * 5 + [1, 3, 6])),
        num_drafts=draw(st.sampled_from([0, 0, 1, 3])), spoil=draw(st.integers(1, 4)),
        fail_every=draw(st.sampled_from([2, 5, 1000])))


def build(plan):
    "The engine of a schedule."
    cache = plan["manager"](plan["num_blocks"], plan["block_size"])
    own = model(plan["shape"])
    tensors = PagedKVCache(own.config, plan["num_blocks"], plan["block_size"])
    chunked = plan["policy"] is ChunkedPrefill
    policy = ChunkedPrefill(plan["limit"]) if chunked else plan["policy"]()
    scheduler = Scheduler(cache, policy, plan["max_num_seqs"], plan["max_num_batched_tokens"],
                          RANKS[plan["scheduling_policy"]])
    if not plan["shared"]:
        for request in plan["arrivals"]:
            request["shares"] = ()
    guesser = Guesser(plan["shape"], plan["spoil"], plan["fail_every"])
    SEEN[plan["forward"].__name__] += 1
    attention = plan["attention"](tensors, own.config.num_attention_heads)
    runner = Watcher(plan["forward"](own), attention)
    runner.fail_at = plan["fail_at"]
    return Engine(runner, scheduler, EOS, proposer=guesser if plan["num_drafts"] else None,
                  num_drafts=plan["num_drafts"], listeners=[count], self_check=True)


def play(plan):
    "Run a schedule to its end; return the engine, and each answer with how it ended."
    engine, answers, step = build(plan), {}, 0

    def take(out):
        empty = dict(token_ids=[], logprobs=[], prompt_logprobs=None, reason=None)
        answer = answers.setdefault(out.request_id, empty)
        assert answer["reason"] is None, "an output after the end"
        answer["token_ids"] += out.token_ids
        answer["logprobs"] += out.logprobs
        if out.prompt_logprobs is not None:
            answer["prompt_logprobs"] = out.prompt_logprobs
        answer["reason"], answer["error"] = out.finish_reason, out.error

    while step < 13 or engine.has_unfinished:
        for i, r in enumerate(plan["arrivals"]):
            for index in range(r["params"].n):
                if r["arrival"] == step:
                    options = {name: r[name] for name in r if name not in ("arrival", "abort")}
                    engine.add_request(**options, request_id=f"{i}.{index}", index=index)
                if r["abort"] is not None and r["arrival"] + r["abort"] == step:
                    out = engine.abort(f"{i}.{index}")
                    if out is not None:
                        take(out)
        for out in engine.step():
            take(out)
        engine.check()
        step += 1
        assert step < 3000, "no progress"
    return engine, answers


def verify(plan, answers):
    "Compare every answer with the naive loop; one that was cut must have a prefix of it."
    for i, r in enumerate(plan["arrivals"]):
        for index in range(r["params"].n):
            answer = answers[f"{i}.{index}"]
            right = naive(plan["shape"], r["prompt_ids"], r["params"], index)
            assert answer["reason"] in ("stop", "length", "abort", "error")
            if answer["reason"] in ("abort", "error"):
                assert r["abort"] is not None or "on purpose" in answer["error"]
                right = right[:len(answer["token_ids"])]
            assert answer["token_ids"] == right
            if r["params"].logprobs is not None:
                assert [report.token_id for report in answer["logprobs"]] == right
            if r["params"].prompt_logprobs is not None and answer["token_ids"]:
                assert sorted(answer["prompt_logprobs"]) == list(range(1, len(r["prompt_ids"])))


@settings(max_examples=300, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(schedules())
def test_every_schedule_gives_the_tokens_of_the_naive_loop(plan):
    SEEN["schedules"] += 1
    engine, answers = play(plan)
    verify(plan, answers)
    assert not engine.requests and engine.scheduler.cache.usage == 0


def test_the_schedules_have_met_what_they_are_for():
    "Runs last: a random test that never meets a preemption proves nothing about preemption."
    assert SEEN["schedules"] >= 300, "runs with the test above it"
    assert SEEN["queued"] == SEEN["finished"] and SEEN["admitted"] > SEEN["preempted"]
    for what in MUST_BE_SEEN:
        assert SEEN[what] >= 20, f"{what}: {SEEN[what]} times only, {dict(SEEN)}"
    assert SEEN["drafts"] - SEEN["accepted drafts"] >= 20, "no draft was wrong"
