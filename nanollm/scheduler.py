"""Decide at every step who computes how many tokens, who gets memory, and who gives it back."""

__all__ = ['CacheManager', 'by_arrival', 'by_priority', 'RANKS', 'Policy', 'Scheduler', 'Plan', 'WholePrompts']

from bisect import insort
from collections.abc import Callable, Iterable
from typing import Protocol

from .request import Request, RequestStatus


class CacheManager(Protocol):
    "Who owns the memory for keys and values; it knows tokens and requests, no tensors."
    max_tokens: int # that one request can have when it is alone
    usage: float # share of the memory that requests hold, 0 to 1

    def match(self, request: Request) -> int: ... # share what is computed; returns tokens
    def allocate(self, request: Request, num_tokens: int) -> bool: ... # room for so many in all
    def commit(self, request: Request, num_tokens: int) -> None: ... # these may be shared now
    def rewind(self, request: Request) -> None: ... # give back what held drafts
    def free(self, request: Request) -> None: ... # give back all
    def check(self, requests: Iterable[Request]) -> None: ... # RuntimeError if memory is lost


def by_arrival(request: Request) -> tuple:
    "Rank for first come, first served."
    return request.arrival_s, request.request_id


def by_priority(request: Request) -> tuple:
    "Rank by `Request.priority`, then by arrival."
    return request.priority, *by_arrival(request)


RANKS = {"fcfs": by_arrival, "priority": by_priority}


class Policy(Protocol):
    "Decides which requests compute how many tokens."

    def plan(self, plan: "Plan") -> None: ... # by its `extend` and `admit`


class Scheduler:
    "Two queues in rank order, the memory, and the limits of a step."

    def __init__(
        self,
        cache: CacheManager,
        policy: Policy,
        max_num_seqs: int = 64, # requests that run at the same time
        max_num_batched_tokens: int = 512, # the token budget of one step
        rank: Callable[[Request], tuple] = by_arrival, # the lowest goes first
    ):
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs must be from 1 to max_num_batched_tokens="
                f"{max_num_batched_tokens}, so that every running request can have a token, "
                f"got {max_num_seqs}")
        self.cache, self.policy, self.rank = cache, policy, rank
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        "Queue a request. Raises ValueError if the cache could not hold it alone."
        new = request.params.max_tokens
        need = request.num_prompt_tokens + new - 1 # the last token is never computed
        if need > self.cache.max_tokens:
            raise ValueError(
                f"{request.num_prompt_tokens} prompt tokens and {new} new ones need a KV cache "
                f"of {need} tokens, and this one has room for {self.cache.max_tokens}")
        insort(self.waiting, request, key=self.rank)

    def schedule(self) -> "Plan":
        "Plan the next step. Its tokens have memory; nothing is computed yet."
        plan = Plan(self)
        self.policy.plan(plan)
        return plan

    def finish(self, request: Request) -> None:
        "Forget a request that has ended, wherever it is, and take its memory."
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self.release(request)

    def release(self, request: Request) -> None:
        "Take a request's memory, and with it all that was computed for it."
        self.cache.free(request)
        request.num_computed_tokens = 0


class Plan:
    "What is to be computed in the next step, while it is being decided."

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.budget = scheduler, scheduler.max_num_batched_tokens
        self.batch: dict[Request, int] = {} # tokens to compute for each request
        self.admitted: list[Request] = []
        self.preempted: list[Request] = []

    @property
    def running(self) -> list[Request]: return list(self.scheduler.running) # a copy
    @property
    def waiting(self) -> list[Request]: return list(self.scheduler.waiting)

    def extend(
        self,
        request: Request, # a running one
        limit: int | None = None, # tokens at most; None: as the budget goes
    ) -> None:
        "Give a running request the tokens it lacks, if need be at the cost of the newest."
        n = self._tokens_for(request, limit)
        while n > 0 and request.status is RequestStatus.RUNNING:
            if self.scheduler.cache.allocate(request, request.num_computed_tokens + n):
                self._put(request, n)
                return
            if self.admitted: # they may share what a victim was to compute in this step
                return
            self.preempt(self.scheduler.running[-1])

    def admit(
        self,
        request: Request, # a waiting one
        limit: int | None = None, # tokens at most; None: as the budget goes
        whole: bool = False, # all its tokens in this step, or not at all
    ) -> bool: # whether it came in
        "Let a waiting request in, if there is room for all its tokens."
        s = self.scheduler
        if len(s.running) >= s.max_num_seqs or self.budget < 1 or self.preempted:
            return False
        num_cached = request.num_computed_tokens = s.cache.match(request)
        too_long = whole and self.batch and request.gap > self.budget
        if too_long or not s.cache.allocate(request, request.num_tokens):
            s.release(request)
            return False
        if not request.num_preemptions:
            request.num_cached_tokens = num_cached
        s.waiting.remove(request)
        insort(s.running, request, key=s.rank)
        request.status = RequestStatus.RUNNING
        self.admitted.append(request)
        self._put(request, request.gap if whole else self._tokens_for(request, limit))
        return True

    def preempt(self, request: Request) -> None:
        "Send a running request back to the queue. It keeps its tokens and loses their memory."
        self.scheduler.running.remove(request)
        self.scheduler.release(request)
        self.budget += self.batch.pop(request, 0)
        request.draft_ids.clear()
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        insort(self.scheduler.waiting, request, key=self.scheduler.rank)
        self.preempted.append(request)

    def _tokens_for(self, request, limit):
        return min(request.gap, self.budget, request.gap if limit is None else limit)

    def _put(self, request, n):
        end = request.num_computed_tokens + n
        del request.draft_ids[max(0, end - request.num_tokens):] # that the budget cuts off
        self.batch[request] = n
        self.budget -= n
        self.scheduler.cache.commit(request, min(end, request.num_tokens)) # never drafts


class WholePrompts:
    "Whole prompts first; meanwhile nobody decodes. Source: Kwon et al. 2023 (vLLM 0.1)."

    def plan(self, plan: Plan) -> None:
        for request in plan.waiting:
            if not plan.admit(request, whole=True):
                break
        if not plan.batch:
            for request in plan.running:
                plan.extend(request)
