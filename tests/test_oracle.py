"""The oracle: in any schedule all get the tokens of the naive loop, and no block is lost."""

import json
import re
import tempfile
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from lora_folders import by_peft, save
from oracle_group import BLOCK_SIZE, MAX_LORAS, lead
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanollm import sampling
from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.compiled_sampling import choose_draw
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.kernels import FusedDecoder
from nanollm.lora import AdapterAdmission, AdapterPool, Adapters, LoRAForward
from nanollm.model import load_model
from nanollm.paged_attention import (
    GroupedAttention,
    PagedKVCache,
    ReferenceAttention,
    TransformersModel,
)
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.quantization import quantize
from nanollm.request import RequestEvent
from nanollm.sampling import DEFAULT_PROCESSORS, Sampler, SamplingParams, row_seed, stop_ids
from nanollm.scheduler import RANKS, Scheduler, WholePrompts
from nanollm.speculative import (
    AdaptiveDrafts,
    DraftModel,
    FirstProposer,
    NgramProposer,
    SuffixProposer,
)
from nanollm.streamed_attention import streamed
from nanollm.structured_output import (
    Grammar,
    GrammarMask,
    Grammars,
    JumpForward,
    StructuredOutputsParams,
)
from nanollm.text import byte_tokenizer
from nanollm.transformer import Decoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda": # what is compiled is for CPUs, and so is int8
    streamed, FusedDecoder, QUANTIZED = GroupedAttention, Decoder, "tiny-llama in "
COMPILED_DRAW = choose_draw(torch.device(DEVICE))
QUANTIZED = "tiny-llama in int8"  # weights only: codes of activations flip with the last bit
SHAPES = ("tiny-llama", "tiny-qwen3", "tiny-llama", "tiny-qwen3", QUANTIZED)
EOS = tuple(range(18, 320, 40))
WORDS = ('"c":true,"', '"d":"c/d"}', "c/d", "yes", "acadc", "no", "-12", '{"c"', "fals", "ue",
         "cdcd", "dcda")
FORMS = (
    {"regex": "[acd]{1,9}"}, {"regex": "[0-9](acadc|cdcd)(fals|true)(ue|dcda)?"},
    {"choice": ("yes", "no", "acadc-12")},
    {"grammar": 'start: "<" /[a-f]+/ ("," %json {"enum": [1, "c"]}){0,3} ">"'},
    {"json": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
    {"json": {"type": "object", "properties": {"c": {"type": "boolean"}, "d": {"const": "c/d"}},
              "required": ["c", "d"], "additionalProperties": False},
     "disable_any_whitespace": True},
    {"json": {"type": "object", "properties": {"c": {"const": True}, "d": {"enum": ["c/d"]}},
              "required": ["c", "d"], "additionalProperties": False},
     "disable_any_whitespace": True})
PREFIX = [(7 * i + 3) % 256 for i in range(40)]
SEEN = Counter()  # what the schedules have met, over all examples
OWN = {"arrival", "abort", "number", "voice"}  # of a drawn request: what is not the engine's
LAST = {}  # when a request last went from one place to another, by kind
MUST_BE_SEEN = (
    "preempted", "hits after preemption", "prefix hits", "accepted drafts", "chunks",
    "steps with decodes and chunks", "blocks shared within their first step", "ended by stop",
    "ended by length", "aborts after admission", "aborts before admission", "failed forwards",
    "failed proposals", "Decoder", "TransformersModel", FusedDecoder.__name__,
    streamed.__name__, "ReferenceAttention", "compiled draws", "quantized models",
    "seats given to another share", "steps of two processes", "adapters on two processes",
    "steps with masks and without", "complete answers", "grammars over min_tokens",
    "masks after preemption", "masks after prefix hits", "masks of many answers",
    "masks in chunks", "forced drafts", "rejected forced drafts", "masks with other drafts",
    "masks with a seed", "masks with penalties", "masks with logprobs", "masks cut by length",
    "wrong ngram drafts", "wrong suffix drafts",
    "right drafts of the same model", "wrong drafts of another model", "adaptive schedules",
    "right drafts in a grammar", "right drafts at random",
    "no room for a shadow", "answers of adapters", "steps with the base and an adapter",
    "steps with two adapters", "adapters after preemption", "adapters with prefix hits",
    "adapters with right drafts", "adapters in a grammar", "adapters at random",
    "adapters over a reload", "passed over for want of a place")
DRAFTERS = ("guesser", "ngram", "model", "suffix", "ngram", "model")
RARE = ("right ngram drafts", "right suffix drafts", "right drafts after preemption",
        "right drafts with prefix hits", "right drafts of another model")


def word_tokenizer():
    "A tokenizer of 256 bytes, 40 beginnings of words and three special tokens; 298 ends."
    model, pieces = json.loads(byte_tokenizer().backend_tokenizer.to_str())["model"], []
    for word in WORDS:
        pieces += [(word[:i], word[i]) for i in range(1, len(word)) if word[:i + 1] not in
                   [a + b for a, b in pieces]]
    vocab = model["vocab"] | {a + b: 256 + i for i, (a, b) in enumerate(pieces[:40])}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=pieces[:40]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>")


TOKENIZER = word_tokenizer()
GRAMMARS = Grammars(TOKENIZER, 320, EOS[-1:])  # the other ends can be part of an answer


@cache
def model(shape):
    torch.set_num_threads(1)
    name, _, kind = shape.partition(" in ")
    own = load_model(name, load_format="dummy", device=DEVICE, dtype="float32",
                     progress=False)
    return quantize(own, kind) if kind else own


VOICES = 4  # adapters; the last one comes in the middle, under the name of the first
FOLDERS = tempfile.TemporaryDirectory()
VOICE_OF = {}  # a digest to the number of an adapter


@cache
def folder_of(shape, number):
    "An adapter's folder: on all linear modules, on few, of several ranks."
    everything = tuple(f"{kind}_proj" for kind in "q k v o gate up down".split())
    only = everything, ("q_proj", "up_proj"), ("v_proj", "layers.1.mlp.down_proj"), everything
    return save(Path(FOLDERS.name) / f"{shape}-{number}", shape=shape, seed=number,
                only=only[number], r=number + 1, lora_alpha=2 * number + 3)


@cache
def voice_of(shape, number):
    "The base, or peft's own model with an adapter."
    if number is None:
        return model(shape)
    return by_peft(folder_of(shape, number), shape).to(DEVICE)


@cache
def pool_of(shape, max_loras):
    "A pool over a model of its own, which schedules use one after the other."
    return AdapterPool(model.__wrapped__(shape), max_loras, VOICES)


@cache
def group_of(shape):
    "A runner and a pool over two processes, which schedules use one after the other."
    return lead(shape)


@cache
def naive(shape, prompt_ids, params, index, voice=None):
    "What the naive loop says."
    sampler = Sampler([params], [prompt_ids], EOS, seeds=[row_seed(params, index)],
                      processors=(*DEFAULT_PROCESSORS, GrammarMask()))
    stops = stop_ids(params, EOS)
    return list(generate(voice_of(shape, voice), prompt_ids, params.max_tokens, stops,
                         sampler))


@cache
def grammar(number):
    return GRAMMARS.compile(StructuredOutputsParams(**FORMS[number]))


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
            right = naive(self.shape, prompt_ids, params, request.index,
                          VOICE_OF.get(request.adapter))[done:done + k]
            drafts.append([(token_id + 1) % 320 if (done + i) % self.spoil == 0 else token_id
                           for i, token_id in enumerate(right)])
        return drafts


class Forward(JumpForward):
    "Jump-forward that counts, and sometimes leaves the drafts to somebody who may be wrong."

    def __init__(self, mask, other, share):
        super().__init__(mask)
        self.other, self.share, self.num_calls = other, share, 0

    def propose(self, requests, max_tokens):
        self.num_calls += 1
        if self.num_calls % self.share == 0:
            return self.other.propose(requests, max_tokens)
        drafts = super().propose(requests, max_tokens)
        SEEN["forced drafts"] += sum(map(bool, drafts))
        for request, draft in zip(requests, drafts):
            FORCED[request] = len(request.output_ids), draft
        return drafts


FORCED = {}  # what jump-forward has drafted last


class Shadowed(DraftModel):
    "A draft model that checks its memory, and that nothing is left in it."

    def __init__(self, plan, mask):
        own, size = model(plan["draft_shape"]), plan["draft_block_size"]
        num_blocks = plan["num_blocks"] * plan["block_size"] * plan["draft_share"] // size + 1
        tensors = PagedKVCache(own.config, num_blocks, size, device=DEVICE)
        attention = plan["attention"](tensors, own.config.num_attention_heads)
        runner = ModelRunner(plan["forward"](own), attention)
        super().__init__(runner, plan["draft_manager"](num_blocks, size), 320,
                         (*DEFAULT_PROCESSORS, mask), plan["draft_tokens"])

    def propose(self, requests, max_tokens):
        with noting_faults():
            drafts = super().propose(requests, max_tokens)
            self.cache.check(self.shadows.values())
        SEEN["no room for a shadow"] += any(k > 0 and not draft
                                            for k, draft in zip(max_tokens, drafts))
        return drafts

    def __call__(self, event):
        with noting_faults():
            super().__call__(event)
            self.cache.check(self.shadows.values())
            running = isinstance(event, RequestEvent) or event.num_running
            assert running or not self.shadows and self.cache.usage == 0


FAULTS = []  # of proposers and listeners, which the engine survives


@contextmanager
def noting_faults():
    try:
        yield
    except Exception as error:
        FAULTS.append(repr(error))
        raise


class Noted:
    "A proposer whose drafts are known by its name."

    def __init__(self, proposer, name):
        self.proposer, self.name = proposer, name
        self.drafted = set()

    def propose(self, requests, max_tokens):
        with noting_faults():
            drafts = self.proposer.propose(requests, max_tokens)
            assert all(len(draft) <= k for k, draft in zip(max_tokens, drafts, strict=True))
        self.drafted = {request for request, draft in zip(requests, drafts) if draft}
        return drafts

    def __call__(self, event):
        if callable(self.proposer):
            self.proposer(event)
        for work in getattr(event, "works", ()):
            if work.request in self.drafted and work.num_drafts and work.num_made:
                count_draft(self.name, work)
        if not isinstance(event, RequestEvent):
            self.drafted = set()


def count_draft(name, work):
    "Count what a draft was good for."
    request, right = work.request, work.num_made > 1
    SEEN[f"{'right' if right else 'wrong'} {name}"] += 1
    if right:
        SEEN["right drafts in a grammar"] += request.params.structured_outputs is not None
        SEEN["right drafts after preemption"] += request.num_preemptions > 0
        SEEN["right drafts with prefix hits"] += request.num_cached_tokens > 0
        SEEN["right drafts at random"] += request.params.temperature > 0


def make_drafts(plan, mask):
    "The proposer of a schedule, with its name."
    kind, shape = plan["drafts"], plan["shape"]
    if kind == "ngram":
        return Noted(NgramProposer(1, 3), "ngram drafts")
    if kind == "suffix":
        return Noted(SuffixProposer(), "suffix drafts")
    same = "the same" if plan["draft_shape"] == shape else "another"
    return Noted(Shadowed(plan, mask), f"drafts of {same} model")


def make_proposer(plan, mask):
    "Jump-forward, and behind it whoever drafts in a schedule."
    guesser = Guesser(plan["shape"], plan["spoil"], plan["fail_every"])
    if not plan["num_drafts"]:
        return None
    if plan["drafts"] == "guesser":
        return Forward(mask, guesser, plan["share"])
    drafts = make_drafts(plan, mask)
    if plan["adaptive"] and plan["drafts"] == "model": # it goes by the clock
        SEEN["adaptive schedules"] += 1
        drafts = AdaptiveDrafts(drafts, plan["num_drafts"])
    return FirstProposer((Forward(mask, guesser, 1000), 3), (drafts, 4))


class Watcher:
    "Counts what the steps of a runner are made of, and fails once if it is told to."

    def __init__(self, runner, fail_at):
        self.runner, self.fail_at = runner, fail_at
        self.model, self.block_size = runner.model, runner.block_size
        self.two = type(runner) is not ModelRunner

    def forward(self, batch):
        SEEN["steps of two processes"] += self.two
        SEEN["adapters on two processes"] += self.two and any(batch.adapters)
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
        return self.runner.forward(batch)


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
            if isinstance(request.params.structured_outputs, Grammar):
                count_masked(request)
            if request.adapter is not None:
                count_adapted(request)
            if request.finish_reason == "abort":
                when = "after" if request.admitted_s else "before"
                SEEN[f"aborts {when} admission"] += 1
    else:
        masked = {work.request.params.structured_outputs is not None for work in event.works}
        SEEN["steps with masks and without"] += len(masked) == 2
        used = {work.request.adapter for work in event.works}
        SEEN["steps with the base and an adapter"] += None in used and len(used) > 1
        SEEN["steps with two adapters"] += len(used - {None}) > 1
        for work in event.works:
            if work.request.params.structured_outputs is not None and work.num_drafts:
                start, forced = FORCED.pop(work.request, (None, ()))
                SEEN["masks with other drafts"] += not forced
                wrong = work.num_made <= work.num_drafts
                SEEN["rejected forced drafts"] += wrong and bool(forced)
            SEEN["chunks"] += work.start + work.num_new < work.request.num_prompt_tokens
            SEEN["drafts"] += work.num_drafts
            adapted = work.request.adapter is not None
            SEEN["adapters with right drafts"] += adapted and work.num_made > 1
            SEEN["accepted drafts"] += max(0, work.num_made - 1)


def count_adapted(request):
    "Count what a request with an adapter has been through."
    SEEN["answers of adapters"] += request.finish_reason in ("stop", "length")
    SEEN["adapters after preemption"] += request.num_preemptions > 0
    SEEN["adapters with prefix hits"] += request.num_cached_tokens > 0
    SEEN["adapters in a grammar"] += request.params.structured_outputs is not None
    SEEN["adapters at random"] += request.params.temperature > 0


def count_masked(request):
    "Count what a request with a grammar has been through."
    params = request.params
    done = request.finish_reason == "stop" and request.output_ids[-1] in GRAMMARS.eos_token_ids
    SEEN["complete answers"] += done
    SEEN["grammars over min_tokens"] += done and len(request.output_ids) <= params.min_tokens
    SEEN["masks after preemption"] += request.num_preemptions > 0
    SEEN["masks after prefix hits"] += request.num_cached_tokens > 0
    SEEN["masks of many answers"] += request.index > 0
    SEEN["masks in chunks"] += request.num_prompt_tokens > 33
    SEEN["masks with a seed"] += params.seed is not None
    SEEN["masks with penalties"] += bool(params.frequency_penalty)
    SEEN["masks with logprobs"] += params.logprobs is not None
    SEEN["masks cut by length"] += request.finish_reason == "length"


@st.composite
def requests(draw):
    shared = draw(st.sampled_from([0, 5, 16, 24, 31, 32, 40]))
    own = draw(st.lists(st.integers(0, 255), min_size=0 if shared else 1, max_size=30))
    number = draw(st.sampled_from([None, None, None, *range(len(FORMS))]))
    max_tokens = draw(st.integers(1, 12)) if number is None else draw(st.integers(4, 30))
    params = dict(
        structured_outputs=None if number is None else grammar(number),
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
        number=number, prompt_ids=tuple(PREFIX[:shared] + own), params=SamplingParams(**params),
        voice=draw(st.sampled_from([None, 0, 0, 1, 2])),
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
        attention=draw(st.sampled_from([streamed, GroupedAttention, ReferenceAttention])),
        forward=draw(st.sampled_from([FusedDecoder, Decoder, TransformersModel])),
        draw=draw(st.sampled_from([COMPILED_DRAW, sampling.draw])),
        limit=draw(st.sampled_from([None, None, 1, 5])),
        shared=draw(st.sampled_from([True, True, False])),
        fail_at=draw(st.sampled_from([None] * 5 + [1, 3, 6])),
        num_drafts=draw(st.sampled_from([0, 1, 4, 4])), spoil=draw(st.integers(1, 4)),
        share=draw(st.sampled_from([1, 3, 3, 1000, 1000])), # 1: no jump-forward
        fail_every=draw(st.sampled_from([2, 5, 1000])),
        drafts=DRAFTERS[longest % len(DRAFTERS)], # drawn, some of them would starve
        processes=1 + (longest % 7 == 3 and DEVICE == "cpu"),
        adaptive=draw(st.booleans()), draft_shape=draw(st.sampled_from(SHAPES)),
        draft_block_size=draw(st.sampled_from([1, 4, 16])),
        draft_share=draw(st.sampled_from([0, 1, 1, 2])),
        draft_manager=draw(st.sampled_from([BlockManager] + [PrefixCachingBlockManager] * 3)),
        draft_tokens=draw(st.sampled_from([8, 33, 512])),
        max_loras=draw(st.sampled_from([None, 1, 2, 3])),
        reload_at=draw(st.sampled_from([2, 4, 6, 100])))


def make_runner(plan):
    "The runner of a schedule, and its pool of adapters if it has one."
    if plan["processes"] == 2: # their cache has been there before
        tokens = plan["num_blocks"] * plan["block_size"]
        plan |= dict(block_size=BLOCK_SIZE, num_blocks=-(-tokens // BLOCK_SIZE),
                     max_loras=plan["max_loras"] and MAX_LORAS)
        runner, pool = group_of(plan["shape"])
        return runner, pool if plan["max_loras"] else None
    pool = pool_of(plan["shape"], plan["max_loras"]) if plan["max_loras"] else None
    own = pool.model if pool else model(plan["shape"])
    forward = plan["forward"](own)
    tensors = PagedKVCache(own.config, plan["num_blocks"], plan["block_size"],
                           device=own.device)
    attention = plan["attention"](tensors, own.config.num_attention_heads)
    SEEN[plan["forward"].__name__] += 1
    SEEN[plan["attention"].__name__] += 1
    return ModelRunner(LoRAForward(forward, pool) if pool else forward, attention), pool


def build(plan):
    "The engine of a schedule."
    if plan["shape"] == QUANTIZED: # peft, who says what is right, does not know its modules
        SEEN["quantized models"] += 1
        plan["max_loras"] = None
        plan["processes"] = 1
    runner, pool = make_runner(plan)
    cache = plan["manager"](plan["num_blocks"], plan["block_size"])
    chunked = plan["policy"] is ChunkedPrefill
    policy = ChunkedPrefill(plan["limit"]) if chunked else plan["policy"]()
    scheduler = Scheduler(cache, policy, plan["max_num_seqs"], plan["max_num_batched_tokens"],
                          RANKS[plan["scheduling_policy"]])
    if pool:
        scheduler.admission = AdapterAdmission(plan["max_loras"])
        scheduler.admission.num_passed = {}  # keeps those that have ended
    if not plan["shared"]:
        for request in plan["arrivals"]:
            request["shares"] = ()
    SEEN["compiled draws"] += plan["draw"] is COMPILED_DRAW
    runner = Watcher(runner, plan["fail_at"])
    mask = GrammarMask()
    proposer = make_proposer(plan, mask)
    listeners = [count, proposer] if callable(proposer) else [count]
    listeners += [pool] if pool else []
    return Engine(runner, scheduler, EOS, processors=(*DEFAULT_PROCESSORS, mask),
                  proposer=proposer, num_drafts=plan["num_drafts"], listeners=listeners,
                  self_check=True, draw=plan["draw"])


def name_voices(plan, engine):
    "The adapters of a schedule by name; None if it has none."
    pools = [one for one in engine.listeners if isinstance(one, AdapterPool)]
    if not pools:
        return None
    adapters = Adapters(pools[0], max_cpu_loras=max(2, plan["max_loras"]))
    for number in range(VOICES - 1):
        digest = adapters.load(str(number), folder_of(plan["shape"], number))
        VOICE_OF[digest] = number
    return adapters


def choose_voice(plan, adapters, r, step, engine):
    "Load the last adapter under the first one's name when its time has come; find a digest."
    if adapters is None or r["voice"] is None:
        r["voice"] = None
        return None
    if step >= plan["reload_at"] and adapters.models["0"] != (last := folder_of(
            plan["shape"], VOICES - 1)):
        SEEN["adapters over a reload"] += any(
            request.adapter == adapters.find("0") for request in engine.requests.values())
        VOICE_OF[adapters.load("0", last)] = VOICES - 1
    digest = adapters.find(str(r["voice"] % (VOICES - 1)))
    r["voice"] = VOICE_OF[digest]
    return digest


def play(plan):
    "Run a schedule to its end; return the engine, and each answer with how it ended."
    engine, answers, step = build(plan), {}, 0
    adapters = name_voices(plan, engine)

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
                    options = {name: r[name] for name in r.keys() - OWN}
                    options["adapter"] = choose_voice(plan, adapters, r, step, engine)
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
    passed = getattr(engine.scheduler.admission, "num_passed", {})
    assert all(num <= 8 for num in passed.values())
    SEEN["passed over for want of a place"] += len(passed)
    return engine, answers


def verify_form(form, token_ids):
    "Check an answer that has ended by itself, and not with a byte that ends answers here."
    if token_ids[-1] not in GRAMMARS.eos_token_ids:
        return
    text = TOKENIZER.decode(token_ids[:-1])
    if "regex" in form:
        assert re.fullmatch(form["regex"], text), text
    elif "choice" in form:
        assert text in form["choice"]
    elif "json" in form:
        Draft202012Validator(form["json"]).validate(json.loads(text))
    else:
        assert re.fullmatch(r'<[a-f]+(,(1|"c")){0,3}>', text), text


def verify(plan, answers):
    "Compare every answer with the naive loop; one that was cut must have a prefix of it."
    for i, r in enumerate(plan["arrivals"]):
        for index in range(r["params"].n):
            answer = answers[f"{i}.{index}"]
            right = naive(plan["shape"], r["prompt_ids"], r["params"], index, r["voice"])
            assert answer["reason"] in ("stop", "length", "abort", "error")
            if answer["reason"] in ("abort", "error"):
                assert r["abort"] is not None or "on purpose" in answer["error"]
                right = right[:len(answer["token_ids"])]
            assert answer["token_ids"] == right
            if answer["reason"] == "stop" and r["number"] is not None:
                verify_form(FORMS[r["number"]], right)
            if r["params"].logprobs is not None:
                assert [report.token_id for report in answer["logprobs"]] == right
            if r["params"].prompt_logprobs is not None and answer["token_ids"]:
                assert sorted(answer["prompt_logprobs"]) == list(range(1, len(r["prompt_ids"])))


@settings(max_examples=450, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(schedules())
def test_every_schedule_gives_the_tokens_of_the_naive_loop(plan):
    SEEN["schedules"] += 1
    engine, answers = play(plan)
    verify(plan, answers)
    assert not engine.requests and engine.scheduler.cache.usage == 0
    assert not FAULTS


def test_the_schedules_have_met_what_they_are_for():
    "Runs last: a random test that never meets a preemption proves nothing about preemption."
    assert SEEN["schedules"] >= 300, "runs with the test above it"
    assert SEEN["queued"] == SEEN["finished"] and SEEN["admitted"] > SEEN["preempted"]
    for what in (*MUST_BE_SEEN, *RARE):
        least = 1 if what in RARE else 20
        assert SEEN[what] >= least, f"{what}: {SEEN[what]} times only, {dict(SEEN)}"
    assert SEEN["drafts"] - SEEN["accepted drafts"] >= 20, "no draft was wrong"
