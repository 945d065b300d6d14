"""Put it together: plan, forward, sample, commit, finish, record; and again."""

__all__ = ['flat_batch', 'num_rows', 'Runner', 'ModelRunner', 'Draw', 'NO_NUMBERS', 'NO_TOKEN', 'sampling_rows', 'Proposer',
           'propose_drafts', 'accept', 'note_prompt_logprobs', 'Output', 'output_of', 'Engine']

import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from transformers import PreTrainedModel

from .generate import check_prompt
from .model import max_context
from .paged_attention import FlatBatch, PagedAttention
from .request import FinishReason, Listener, Request, RequestEvent, StepRecord, Work
from .sampling import DEFAULT_PROCESSORS, LogitsProcessor, SamplingParams, SamplingRow, TokenLogprobs, sample, token_logprobs
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


def num_rows(request: Request, n: int) -> int:
    "Return for how many of the next `n` tokens of a request logits are needed: always for the last ones."
    if request.params.prompt_logprobs is not None and request.num_computed_tokens < request.num_prompt_tokens:
        return n
    return len(request.draft_ids) + 1 if n == request.gap else 0


def flat_batch(
    batch: Mapping[Request, int], # tokens to compute for each request; they have memory
    block_size: int,
) -> FlatBatch:
    "Write what a step computes as one flat row."
    flat = FlatBatch([], [], [], [], [], [], [], [])
    for request, n in batch.items():
        start, table = request.num_computed_tokens, request.block_table
        known = request.token_ids[start:start + n]
        flat.token_ids.extend(known + request.draft_ids[:n - len(known)])
        flat.positions.extend(range(start, start + n))
        flat.slots.extend(table[i // block_size] * block_size + i % block_size for i in range(start, start + n))
        flat.query_lens.append(n)
        flat.context_lens.append(start + n)
        flat.block_tables.append(list(table))
        flat.rows.extend(range(len(flat.token_ids) - num_rows(request, n), len(flat.token_ids)))
        flat.adapters.append(request.adapter)
    return flat


class Runner(Protocol):
    "Turns a flat batch into logits; it knows no requests. What it needs may be on other devices."
    model: PreTrainedModel # for its config
    block_size: int

    def forward(self, batch: FlatBatch) -> tuple[torch.Tensor, torch.Tensor]: ... # see `ModelRunner`
    def erase(self, slots: Sequence[int]) -> None: ...


class ModelRunner:
    "A model and the memory of its keys and values, on one device."

    def __init__(
        self,
        forward: Callable, # `Decoder` or `TransformersModel`
        attention: PagedAttention,
    ):
        self.model, self._forward, self.attention = forward.model, forward, attention
        self.block_size, self.erase = attention.cache.block_size, attention.cache.erase

    @torch.inference_mode()
    def forward(
        self,
        batch: FlatBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]: # logits (R, V); whether each token gave numbers, (T,)
        "Compute the tokens of the flat row."
        self.attention.prepare(batch)
        token_ids, positions, rows = map(self.attention.tensor, (batch.token_ids, batch.positions, batch.rows))
        logits = self._forward(token_ids, positions, self.attention, rows) # (R, V)
        return logits, self.attention.finite


class Proposer(Protocol):
    "Guesses what comes next, for many requests at once."

    def propose(self, requests: Sequence[Request], max_tokens: Sequence[int]) -> Sequence[Sequence[int]]: ...


def propose_drafts(proposer: Proposer, scheduler: Scheduler, num_drafts: int) -> None:
    "Let the proposer draft for every running request that lacks one token only, and leave budget for all."
    requests = [request for request in scheduler.running if request.gap == 1]
    room = scheduler.max_num_batched_tokens // max(1, len(scheduler.running)) - 1
    limits = [min(num_drafts, room, request.tokens_left - 1) for request in requests]
    try:
        drafts = list(proposer.propose(requests, limits))
        for request, guess, limit in zip(requests, drafts, limits, strict=True):
            request.draft_ids = [operator.index(token_id) for token_id in guess][:limit]
    except Exception: # costs the drafts and nothing else
        logger.exception("the proposer has failed")
        for request in requests:
            request.draft_ids = []


Draw = tuple[int, TokenLogprobs | None] # a token, and its report if the request asked for one
NO_NUMBERS = "the model's numbers for this request are NaN or infinite"
NO_TOKEN = "no token can be drawn: the model's scores are no numbers, or every token is forbidden"


def sampling_rows(
    batch: Mapping[Request, int], # tokens computed for each request
) -> tuple[list[SamplingRow], list[int]]: # rows, and where their logits are
    "Return a row for every request that has caught up, and one after each of its drafts."
    rows, places, end = [], [], 0
    for request, n in batch.items():
        end += num_rows(request, n)
        if n == request.gap:
            num = len(request.draft_ids)
            places += range(end - num - 1, end)
            rows += [SamplingRow(request.params, request.prompt_ids, request.output_ids, request.seed, request.stop_ids,
                                 draft_ids=request.draft_ids[:i], key=request) for i in range(num + 1)]
    return rows, places


def accept(request: Request, drawn: Sequence[Draw], time_s: float) -> None:
    "Append the drawn tokens up to the first that a draft did not foresee; those after it came from a wrong guess."
    drafts, request.draft_ids = request.draft_ids, []
    for (token_id, report), draft in zip(drawn, [*drafts, None]):
        request.append(token_id, time_s)
        if report is not None:
            request.logprobs.append(report)
        if request.finished or token_id != draft:
            break
    if drawn:
        request.num_computed_tokens = request.num_tokens - 1


def note_prompt_logprobs(request: Request, start: int, logits: torch.Tensor) -> None:
    "Report the prompt tokens that the logits of the tokens from `start` on predict."
    ids = request.prompt_ids[start + 1:start + 1 + len(logits)]
    for i in range(0, len(ids), 256): # in parts: a report takes several times the memory of its logits
        part = ids[i:i + 256]
        reports = token_logprobs(logits[i:i + len(part)], part, [request.params.prompt_logprobs] * len(part))
        request.prompt_logprobs.update(enumerate(reports, start + 1 + i))


@dataclass(frozen=True)
class Output:
    "What is new in one answer, with all that its reader needs to know of it."
    request_id: str
    index: int # which of the `n` answers
    token_ids: list[int]
    logprobs: list[TokenLogprobs] # one per token, if asked for
    finish_reason: FinishReason | None
    stop_reason: int | None # the stop token, if it is one that was asked for
    error: str | None
    num_prompt_tokens: int
    num_cached_tokens: int # of the prompt, found in the prefix cache
    prompt_logprobs: dict[int, TokenLogprobs] | None # by position, once, with the first tokens


def output_of(request: Request, num_made: int = 0) -> Output:
    "Report the last `num_made` tokens of a request, and its end if it has ended."
    first = len(request.output_ids) - num_made
    reports = request.logprobs[first:] if request.params.logprobs is not None else []
    of_prompt = request.prompt_logprobs if request.params.prompt_logprobs is not None and num_made and not first else None
    return Output(request.request_id, request.index, request.output_ids[first:], reports, request.finish_reason,
                  request.stop_reason, request.error, request.num_prompt_tokens, request.num_cached_tokens, of_prompt)


class Engine:
    "Serves many requests at once, a step at a time. It knows token ids and no text."

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        eos_token_ids: Sequence[int] = (),
        max_model_len: int | None = None, # tokens of prompt and output; None: the model's own limit
        processors: Sequence[LogitsProcessor] = DEFAULT_PROCESSORS,
        proposer: Proposer | None = None,
        num_drafts: int = 0, # that are asked of the proposer, per request and step
        listeners: Sequence[Listener] = (),
        self_check: bool = False, # check the memory whenever no request is left
    ):
        limit = max_context(runner.model)
        if max_model_len is not None and not 1 <= max_model_len <= limit:
            raise ValueError(f"max_model_len must be from 1 to {limit}, the model's own limit, got {max_model_len}")
        self.runner, self.scheduler, self.eos_token_ids = runner, scheduler, tuple(eos_token_ids)
        self.max_model_len, self.processors = max_model_len or limit, processors
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
        "Check a request without queueing it, on any thread. Raises ValueError if it is malformed or could never fit."
        try:
            prompt_ids = list(map(operator.index, prompt_ids))
        except TypeError as error:
            raise ValueError(f"token ids must be whole numbers: {error}") from error
        params = SamplingParams() if params is None else params
        if params.max_tokens is None:
            room = min(self.max_model_len, self.scheduler.cache.max_tokens + 1) - len(prompt_ids)
            params = params.model_copy(update={"max_tokens": max(room, 1)})
        check_prompt(self.runner.model, prompt_ids, params.max_tokens, self.max_model_len)
        params.check_vocab(self.runner.model.get_input_embeddings().num_embeddings)
        return prompt_ids, params

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None, # as for `check_request`; `n` is not looked at
        *,
        request_id: str | None = None, # None: the engine finds one
        index: int = 0, # which of the `n` answers to this prompt
        priority: int = 0, # lower goes first, if the scheduler goes by priority
        adapter: str | None = None,
        cache_salt: str = "", # cached tokens are shared only with requests of the same salt
        use_prefix_cache: bool = True, # False: compute every token of the prompt
        arrival_s: float | None = None, # None: now
    ) -> str: # the request id
        "Queue a request for one answer. Raises ValueError, and changes nothing, if it cannot be served."
        if not isinstance(request_id, str | None):
            raise ValueError(f"a request id is a text, got {request_id!r:.80}")
        if request_id in self.requests:
            raise ValueError(f"request id {request_id!r:.80} is in use")
        if not isinstance(priority, int):
            raise ValueError(f"a priority is a whole number, got {priority!r:.80}")
        prompt_ids, params = self.check_request(prompt_ids, params)
        if request_id is None:
            request_id = next(name for name in self._names if name not in self.requests)
        whole = params.prompt_logprobs is not None # they need every token of the prompt computed
        request = Request(request_id, prompt_ids, params, self.eos_token_ids, index, priority, adapter, cache_salt,
                          use_prefix_cache and not whole, time.perf_counter() if arrival_s is None else arrival_s)
        self.scheduler.add(request)
        self.requests[request_id] = request
        self._emit(RequestEvent("queued", request.arrival_s, request))
        return request_id

    def finish(self, request_id: str, reason: FinishReason = FinishReason.STOP) -> Output | None:
        "End a request now, for a reason that the engine cannot see; None if it has ended."
        request = self.requests.get(request_id)
        if request is None:
            return None
        request.finish(reason, time.perf_counter())
        self._end(request)
        return output_of(request)

    def abort(self, request_id: str) -> Output | None:
        "End a request that nobody wants any more; None if it has ended."
        return self.finish(request_id, FinishReason.ABORT)

    def step(self) -> list[Output]:
        "Advance every scheduled request, and return what that brought."
        start_s = time.perf_counter()
        batch = self._plan(start_s)
        works = self._compute(batch) if batch else []
        outputs = [output_of(work.request, work.num_made) for work in works if work.num_made or work.request.finished]
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
        "Decide who computes how many tokens, and tell the listeners who came and who had to go."
        if self.proposer is not None:
            propose_drafts(self.proposer, self.scheduler, self.num_drafts)
        plan = self.scheduler.schedule()
        for kind, requests in ("preempted", plan.preempted), ("admitted", plan.admitted):
            for request in requests:
                request.admitted_s = now if request.admitted_s is None else request.admitted_s
                self._emit(RequestEvent(kind, now, request))
        return plan.batch

    def _compute(self, batch):
        "Forward, sample, commit. An error for which no single request is to blame ends all of this step."
        before = {request: (request.num_computed_tokens, len(request.draft_ids), len(request.output_ids))
                  for request in batch}
        try:
            flat = flat_batch(batch, self.runner.block_size)
            logits, finite = self.runner.forward(flat)
            drawn = self._sample(batch, logits)
            self._fail_broken(batch, flat, finite.tolist())
            self._commit(batch, logits, drawn)
        except Exception as error:
            logger.exception("a step has failed")
            for request in batch:
                request.finish(FinishReason.ERROR, time.perf_counter(), f"{type(error).__name__}: {error}")
        return [Work(request, start, batch[request], num_drafts, len(request.output_ids) - num_output,
                     tuple(request.block_table)) for request, (start, num_drafts, num_output) in before.items()]

    def _sample(self, batch, logits):
        "Draw tokens for all requests that have caught up. One that cannot go on ends with an error."
        rows, places = sampling_rows(batch)
        out = sample(logits if len(rows) == len(logits) else logits[places], rows, self.processors)
        drawn: dict[Request, list[Draw]] = {row.key: [] for row in rows}
        for i in out.failed:
            if not rows[i].draft_ids:
                rows[i].key.finish(FinishReason.ERROR, time.perf_counter(), NO_TOKEN)
        for i, (row, token_id, report) in enumerate(zip(rows, out.token_ids, out.logprobs)):
            if i not in out.failed and len(drawn[row.key]) == len(row.draft_ids): # nothing after a failed row
                drawn[row.key].append((token_id, report))
        return drawn

    def _fail_broken(self, batch, flat, finite):
        "End requests whose keys and values are no numbers, and take these out of the memory."
        if all(finite):
            return
        self.runner.erase([slot for slot, ok in zip(flat.slots, finite) if not ok])
        end = 0
        for request, n in batch.items():
            end += n
            if not all(finite[end - n:end - len(request.draft_ids)]): # a wrong guess may be broken
                request.finish(FinishReason.ERROR, time.perf_counter(), NO_NUMBERS)

    def _commit(self, batch, logits, drawn):
        "Note what is computed now, and append the tokens that were drawn."
        now, end = time.perf_counter(), 0
        for request, n in batch.items():
            rows, start = num_rows(request, n), request.num_computed_tokens
            end += rows
            if request.finished: # with an error: what it computed must not be shared
                continue
            request.num_computed_tokens += n
            if request.params.prompt_logprobs is not None:
                note_prompt_logprobs(request, start, logits[end - rows:end])
            accept(request, drawn.get(request, ()), now)
            self.scheduler.cache.rewind(request)

    def _end(self, request):
        "Take back all that a finished request has."
        self.scheduler.finish(request)
        del self.requests[request.request_id]
        self._emit(RequestEvent("finished", request.finished_s, request))

    def _record(self, works, start_s):
        s = self.scheduler
        self._emit(StepRecord(self.num_steps, start_s, time.perf_counter(), tuple(works), len(s.waiting), len(s.running),
                              s.cache.usage))
        self.num_steps += 1

    def _emit(self, event):
        for listener in self.listeners:
            try:
                listener(event)
            except Exception: # whoever watches must not stop what is watched
                logger.exception("a listener has failed")
