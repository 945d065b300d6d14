"""A request's life: what it asks for, how far it has come, and how it ends."""

__all__ = ['RequestStatus', 'FinishReason', 'Request', 'Output', 'RequestEvent', 'Work', 'StepRecord', 'Listener']

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from .measure import RequestTiming
from .sampling import SamplingParams, TokenLogprobs, row_seed, stop_ids


class RequestStatus(StrEnum):
    "Where a request is. WAITING and RUNNING may alternate; FINISHED is for ever."
    WAITING = "waiting" # holds no memory
    RUNNING = "running" # holds memory, and may be part of a step
    FINISHED = "finished"


class FinishReason(StrEnum):
    "Why a request has ended."
    STOP = "stop" # a stop token, or a stop string found in its text
    LENGTH = "length" # max_tokens
    ABORT = "abort" # whoever asked no longer wants it
    ERROR = "error" # it could not go on; `Request.error` says why


@dataclass(frozen=True)
class Output:
    "What is new in one answer, with all that its reader has to know of it."
    request_id: str
    index: int # which of the `n` answers
    token_ids: list[int]
    logprobs: list[TokenLogprobs] # one per token, if asked for
    finish_reason: FinishReason | None
    stop_reason: int | None # the stop token, if it is one that was asked for
    error: str | None
    num_prompt_tokens: int
    num_cached_tokens: int # of the prompt, found in the prefix cache
    prompt_logprobs: dict[int, TokenLogprobs] | None # by position from 1; with the first tokens


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    "One answer in the making: what was asked, and how far it is."
    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams # max_tokens is a number
    eos_token_ids: Sequence[int] = ()
    index: int = 0 # which of the `n` answers to the same prompt
    priority: int = 0 # lower goes first, if the scheduler goes by priority
    adapter: str | None = None # what besides the tokens decides their keys and values
    cache_salt: str = "" # cached tokens are shared only with requests of the same salt
    use_prefix_cache: bool = True # False: compute every token of the prompt
    arrival_s: float = field(default_factory=time.perf_counter) # all times are of this clock

    # the rest is how far it is
    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    token_ids: list[int] = field(init=False) # prompt, then output
    output_ids: list[int] = field(default_factory=list, init=False)
    draft_ids: list[int] = field(default_factory=list, init=False) # guesses at what comes next
    num_computed_tokens: int = field(default=0, init=False) # with keys and values in the cache
    num_cached_tokens: int = field(default=0, init=False) # found there when first admitted
    num_preemptions: int = field(default=0, init=False)
    block_table: list[int] = field(default_factory=list, init=False) # in the order of tokens
    block_hashes: list[bytes] = field(default_factory=list, init=False) # of its full blocks
    seed: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False) # tokens that end it
    logprobs: list[TokenLogprobs] = field(default_factory=list, init=False) # if asked for
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: int | None = field(default=None, init=False) # a stop token that was asked for
    error: str | None = field(default=None, init=False)
    admitted_s: float | None = field(default=None, init=False) # the first time
    token_times_s: list[float] = field(default_factory=list, init=False)
    finished_s: float | None = field(default=None, init=False)

    def __post_init__(self):
        self.token_ids = list(self.prompt_ids)
        self.seed = row_seed(self.params, self.index)
        self.stop_ids = stop_ids(self.params, self.eos_token_ids)

    @property
    def num_prompt_tokens(self) -> int: return len(self.prompt_ids)
    @property
    def num_tokens(self) -> int: return len(self.token_ids) # known ones, that is without drafts
    @property
    def gap(self) -> int: # tokens that are known or guessed, and not computed
        return len(self.token_ids) + len(self.draft_ids) - self.num_computed_tokens
    @property
    def tokens_left(self) -> int: return self.params.max_tokens - len(self.output_ids)
    @property
    def finished(self) -> bool: return self.status is RequestStatus.FINISHED
    @property
    def timing(self) -> RequestTiming:
        return RequestTiming(tuple(t - self.arrival_s for t in self.token_times_s))

    def append(self, token_id: int, time_s: float) -> None:
        "Take one more output token, and finish if it is the last."
        self.token_ids.append(token_id)
        self.output_ids.append(token_id)
        self.token_times_s.append(time_s)
        if token_id in self.stop_ids:
            self.stop_reason = token_id if token_id in self.params.stop_token_ids else None
            self.finish(FinishReason.STOP, time_s)
        elif not self.tokens_left:
            self.finish(FinishReason.LENGTH, time_s)

    def finish(self, reason: FinishReason, time_s: float, error: str | None = None) -> None:
        "End the request; only the first reason counts."
        if not self.finished:
            self.status, self.finish_reason = RequestStatus.FINISHED, reason
            self.finished_s, self.error = time_s, error
            self.draft_ids = []

    def output(self, num_new: int) -> Output:
        "Report the last `num_new` tokens, and the end if it has come."
        first = len(self.output_ids) - num_new
        is_first = num_new and not first and self.params.prompt_logprobs is not None
        return Output(
            self.request_id, self.index, self.output_ids[first:],
            self.logprobs[first:] if self.params.logprobs is not None else [],
            self.finish_reason, self.stop_reason, self.error, self.num_prompt_tokens,
            self.num_cached_tokens, dict(self.prompt_logprobs) if is_first else None)


@dataclass(frozen=True)
class RequestEvent:
    "A request has gone from one place to another."
    kind: str # queued, admitted, preempted or finished
    time_s: float
    request: Request


@dataclass(frozen=True)
class Work:
    "What one step has done for one request."
    request: Request
    start: int # tokens that were computed before
    num_new: int # tokens computed, drafts included
    num_drafts: int # of them guesses
    num_made: int # output tokens that came of it
    blocks: tuple[int, ...] # that the request held


@dataclass(frozen=True)
class StepRecord:
    "What one step has done."
    step: int # 0, 1, 2, ...
    start_s: float
    end_s: float
    works: tuple[Work, ...]
    num_waiting: int # after the step, as the next two
    num_running: int
    kv_usage: float # share of the blocks that requests hold, 0 to 1


Listener = Callable[[RequestEvent | StepRecord], None] # metrics, traces and pictures
