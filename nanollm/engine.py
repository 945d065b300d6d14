"""Put it together: plan, forward, sample, commit, finish, record; and again."""

__all__ = ['logger', 'num_rows', 'flat_batch', 'ModelRunner', 'Proposer', 'propose_drafts', 'accept', 'Draw', 'NO_NUMBERS',
           'NO_TOKEN', 'sample_batch', 'fail_broken', 'note_prompt_logprobs', 'commit', 'compute', 'Engine']

import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Protocol

import torch

from .generate import check_prompt
from .model import max_context
from .paged_attention import FlatBatch, PagedAttention
from .request import FinishReason, Listener, Output, Request, RequestEvent, StepRecord, Work
from .sampling import (DEFAULT_PROCESSORS, LogitsProcessor, SamplingParams, SamplingRow,
                       TokenLogprobs, sample, token_logprobs)
from .scheduler import CacheManager, Scheduler

logger = logging.getLogger(__name__)


def num_rows(request: Request, n: int) -> int:
    "Return for how many of a request's next `n` tokens logits are needed."
    in_prompt = request.num_computed_tokens < request.num_prompt_tokens
    if in_prompt and request.params.prompt_logprobs is not None:
        return n
    return len(request.draft_ids) + 1 if n == request.gap else 0


def flat_batch(
    batch: Mapping[Request, int], # tokens to compute for each request; they have memory
    block_size: int,
) -> FlatBatch:
    "Write what a step computes as one flat row."
    flat = FlatBatch([], [], [], [], [], [], [], [])
    for request, n in batch.items():
        start, table = request.num_computed_tokens, list(request.block_table)
        known, places = request.token_ids[start:start + n], range(start, start + n)
        flat.token_ids.extend(known + request.draft_ids[:n - len(known)])
        flat.positions.extend(places)
        flat.slots.extend(table[i // block_size] * block_size + i % block_size for i in places)
        flat.query_lens.append(n)
        flat.context_lens.append(start + n)
        flat.block_tables.append(table)
        end = len(flat.token_ids)
        flat.rows.extend(range(end - num_rows(request, n), end))
        flat.adapters.append(request.adapter)
    return flat


class ModelRunner:
    "Turns a flat batch into logits. It knows a model and a cache, and no requests."

    def __init__(
        self,
        forward: Callable, # a `Decoder` or a `TransformersModel`
        attention: PagedAttention,
    ):
        self.model, self._forward, self.attention = forward.model, forward, attention
        self.block_size, self.erase = attention.cache.block_size, attention.cache.erase

    @torch.inference_mode()
    def forward(
        self,
        batch: FlatBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]: # logits (R, V); whether a token made numbers, (T,)
        "Compute the tokens of the flat row."
        tensor = self.attention.tensor
        self.attention.prepare(batch)
        logits = self._forward(tensor(batch.token_ids), tensor(batch.positions), self.attention,
                               tensor(batch.rows)) # (R, V)
        return logits, self.attention.finite


class Proposer(Protocol):
    "Guesses what comes next, for many requests at once."

    def propose(
        self,
        requests: Sequence[Request],
        max_tokens: Sequence[int], # for each request
    ) -> Sequence[Sequence[int]]: ... # token ids for each request, possibly none


def propose_drafts(proposer: Proposer, scheduler: Scheduler, num_drafts: int) -> None:
    "Draft for every running request that lacks one token only, and leave budget for all."
    requests = [request for request in scheduler.running if request.gap == 1]
    room = scheduler.max_num_batched_tokens // max(1, len(scheduler.running)) - 1
    limits = [min(num_drafts, room, request.tokens_left - 1) for request in requests]
    try:
        drafts = proposer.propose(requests, limits)
        for request, guess, limit in zip(requests, drafts, limits, strict=True):
            request.draft_ids = [operator.index(token_id) for token_id in guess][:limit]
    except Exception: # costs the drafts and nothing else
        logger.exception("the proposer has failed")
        for request in requests:
            request.draft_ids = []


Draw = tuple[int, TokenLogprobs | None] # a token, and its report if the request asked for one


def accept(
    request: Request,
    drawn: Sequence[Draw], # after its last known token, and after each of its drafts
    time_s: float,
) -> None:
    "Append drawn tokens up to the first that no draft foresaw; the rest came of a wrong guess."
    drafts, request.draft_ids = request.draft_ids, []
    for (token_id, report), draft in zip(drawn, [*drafts, None]):
        request.append(token_id, time_s)
        if report is not None:
            request.logprobs.append(report)
        if request.finished or token_id != draft:
            break
    if drawn:
        request.num_computed_tokens = request.num_tokens - 1


NO_NUMBERS = "the model's numbers for this request are NaN or infinite"
NO_TOKEN = "no token can be drawn: scores are no numbers, or every token is forbidden"


def sample_batch(
    batch: Mapping[Request, int], # tokens computed for each request
    logits: torch.Tensor, # of `flat_batch`'s rows, (R, V)
    processors: Sequence[LogitsProcessor],
) -> dict[Request, list[Draw]]: # of the requests that have caught up
    "Draw a token after the last known one and after each draft. A request without one fails."
    rows, places, end = [], [], 0
    for request, n in batch.items():
        end += num_rows(request, n)
        if n == request.gap:
            num = len(request.draft_ids)
            places += range(end - num - 1, end)
            rows += [SamplingRow(request.params, request.prompt_ids, request.output_ids,
                                 request.seed, request.stop_ids, request.draft_ids[:i], request)
                     for i in range(num + 1)]
    out = sample(logits if len(rows) == len(logits) else logits[places], rows, processors)
    drawn: dict[Request, list[Draw]] = {row.key: [] for row in rows}
    for i, (row, draw) in enumerate(zip(rows, zip(out.token_ids, out.logprobs))):
        if i not in out.failed and len(drawn[row.key]) == len(row.draft_ids):
            drawn[row.key].append(draw) # and nothing after a row that failed
    for request in [request for request, draws in drawn.items() if not draws]:
        request.finish(FinishReason.ERROR, time.perf_counter(), NO_TOKEN)
    return drawn


def fail_broken(batch: Mapping[Request, int], finite: Sequence[bool]) -> None:
    "End the requests of which a token made no numbers; a wrong guess may do so."
    end = 0
    for request, n in batch.items():
        end += n
        if not all(finite[end - n:end - len(request.draft_ids)]):
            request.finish(FinishReason.ERROR, time.perf_counter(), NO_NUMBERS)


def note_prompt_logprobs(request: Request, logits: torch.Tensor) -> None:
    "Report the prompt tokens that the logits of the tokens about to be committed predict."
    first = request.num_computed_tokens + 1
    ids = request.prompt_ids[first:first + len(logits)]
    for i in range(0, len(ids), 256): # in parts: reports take more memory than logits
        part = ids[i:i + 256]
        num_top = [request.params.prompt_logprobs] * len(part)
        reports = token_logprobs(logits[i:i + len(part)], part, num_top)
        request.prompt_logprobs.update(enumerate(reports, first + i))


def commit(
    batch: Mapping[Request, int],
    logits: torch.Tensor, # (R, V)
    drawn: Mapping[Request, Sequence[Draw]],
    cache: CacheManager,
) -> None:
    "Note what is computed now, and append the tokens that were drawn."
    now, end = time.perf_counter(), 0
    for request, n in batch.items():
        num = num_rows(request, n)
        end += num
        if request.finished: # with an error: what it computed must not be shared
            continue
        if request.params.prompt_logprobs is not None:
            note_prompt_logprobs(request, logits[end - num:end])
        request.num_computed_tokens += n
        accept(request, drawn.get(request, ()), now)
        cache.rewind(request)


def compute(
    batch: Mapping[Request, int], # tokens to compute for each request; they have memory
    runner: ModelRunner,
    cache: CacheManager,
    processors: Sequence[LogitsProcessor],
) -> list[Work]:
    "Forward, sample, commit. An error for which no single request is to blame ends them all."
    before = {request: (request.num_computed_tokens, n, len(request.draft_ids),
                        len(request.output_ids)) for request, n in batch.items()}
    try:
        flat = flat_batch(batch, runner.block_size)
        logits, finite = runner.forward(flat)
        drawn, finite = sample_batch(batch, logits, processors), finite.tolist()
        if not all(finite):
            runner.erase([slot for slot, ok in zip(flat.slots, finite) if not ok])
            fail_broken(batch, finite)
        commit(batch, logits, drawn, cache)
    except Exception as error:
        logger.exception("a step has failed")
        reason = f"{type(error).__name__}: {error}"
        for request in batch:
            request.finish(FinishReason.ERROR, time.perf_counter(), reason)
    return [Work(request, start, n, num_drafts, len(request.output_ids) - num_output,
                 tuple(request.block_table))
            for request, (start, n, num_drafts, num_output) in before.items()]


class Engine:
    "Serves many requests at once, a step at a time. It knows token ids and no text."

    def __init__(
        self,
        runner: ModelRunner, # or what has its `model`, `block_size`, `forward` and `erase`
        scheduler: Scheduler,
        eos_token_ids: Sequence[int] = (),
        max_model_len: int | None = None, # tokens of prompt and output; None: the model's limit
        processors: Sequence[LogitsProcessor] = DEFAULT_PROCESSORS,
        proposer: Proposer | None = None,
        num_drafts: int = 0, # that are asked of the proposer, per request and step
        listeners: Sequence[Listener] = (),
        self_check: bool = False, # check the memory whenever no request is left
    ):
        limit = max_context(runner.model)
        if max_model_len is not None and not 1 <= max_model_len <= limit:
            raise ValueError(f"max_model_len must be from 1 to {limit}, the model's own limit, "
                             f"got {max_model_len}")
        self.runner, self.scheduler, self.processors = runner, scheduler, processors
        self.eos_token_ids, self.max_model_len = tuple(eos_token_ids), max_model_len or limit
        self.proposer, self.num_drafts = proposer, num_drafts
        self.listeners, self.self_check = list(listeners), self_check
        self.requests: dict[str, Request] = {} # that have not ended
        self.num_steps, self._names = 0, map(str, count())

    @property
    def has_unfinished(self) -> bool: return bool(self.requests)

    def check_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None, # max_tokens None: as far as context and cache go
    ) -> tuple[list[int], SamplingParams]: # as they will be queued
        "Check a request. Raises ValueError if it is malformed or could never fit."
        try:
            prompt_ids = list(map(operator.index, prompt_ids))
        except TypeError as error:
            raise ValueError(f"token ids must be whole numbers: {error}") from error
        params = SamplingParams() if params is None else params
        if params.max_tokens is None:
            most = min(self.max_model_len, self.scheduler.cache.max_tokens + 1)
            params = params.model_copy(update={"max_tokens": max(1, most - len(prompt_ids))})
        check_prompt(self.runner.model, prompt_ids, params.max_tokens, self.max_model_len)
        params.check_vocab(self.runner.model.get_input_embeddings().num_embeddings)
        return prompt_ids, params

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None, # as for `check_request`; `n` is not looked at
        *,
        request_id: str | None = None, # None: the engine finds one
        arrival_s: float | None = None, # None: now
        **options, # index, priority, adapter, cache_salt, use_prefix_cache of `Request`
    ) -> str: # the request id
        "Queue a request. Raises ValueError, and changes nothing, if it cannot be served."
        if not isinstance(request_id, str | None):
            raise ValueError(f"a request id is a text, got {request_id!r:.80}")
        if request_id in self.requests:
            raise ValueError(f"request id {request_id!r:.80} is in use")
        if not isinstance(options.get("priority", 0), int):
            raise ValueError(f"a priority is a whole number, got {options['priority']!r:.80}")
        prompt_ids, params = self.check_request(prompt_ids, params)
        if params.prompt_logprobs is not None: # every token of the prompt has to be computed
            options["use_prefix_cache"] = False
        if request_id is None:
            request_id = next(name for name in self._names if name not in self.requests)
        request = Request(request_id, prompt_ids, params, self.eos_token_ids, **options,
                          arrival_s=time.perf_counter() if arrival_s is None else arrival_s)
        self.scheduler.add(request)
        self.requests[request_id] = request
        self._emit(RequestEvent("queued", request.arrival_s, request))
        return request_id

    def finish(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.STOP,
    ) -> Output | None: # None if it has ended
        "End a request now, for a reason that is not in its tokens, as a stop string."
        request = self.requests.get(request_id)
        if request is None:
            return None
        request.finish(reason, time.perf_counter())
        self._end(request)
        return request.output(0)

    def abort(self, request_id: str) -> Output | None: # None if it has ended
        "End a request that nobody wants any more."
        return self.finish(request_id, FinishReason.ABORT)

    def step(self) -> list[Output]:
        "Advance every scheduled request, and return what that brought."
        start_s = time.perf_counter()
        batch = self._plan(start_s)
        works = []
        if batch:
            works = compute(batch, self.runner, self.scheduler.cache, self.processors)
        outputs = [work.request.output(work.num_made) for work in works
                   if work.num_made or work.request.finished]
        for work in works:
            if work.request.finished:
                self._end(work.request)
        self._record(works, start_s)
        if self.self_check and not self.requests:
            self.check()
        return outputs

    def check(self) -> None:
        "Raise RuntimeError unless the blocks held are exactly those of the known requests."
        self.scheduler.cache.check(self.requests.values())

    def _plan(self, now):
        "Decide who computes how many tokens, and tell who came and who had to go."
        if self.proposer is not None:
            propose_drafts(self.proposer, self.scheduler, self.num_drafts)
        plan = self.scheduler.schedule()
        for kind, requests in ("preempted", plan.preempted), ("admitted", plan.admitted):
            for request in requests:
                request.admitted_s = now if request.admitted_s is None else request.admitted_s
                self._emit(RequestEvent(kind, now, request))
        return plan.batch

    def _end(self, request):
        "Take back all that a finished request has."
        self.scheduler.finish(request)
        del self.requests[request.request_id]
        self._emit(RequestEvent("finished", request.finished_s, request))

    def _record(self, works, start_s):
        s = self.scheduler
        self._emit(StepRecord(self.num_steps, start_s, time.perf_counter(), tuple(works),
                              len(s.waiting), len(s.running), s.cache.usage))
        self.num_steps += 1

    def _emit(self, event):
        for listener in self.listeners:
            try:
                listener(event)
            except Exception: # whoever watches must not stop what is watched
                logger.exception("a listener has failed")
