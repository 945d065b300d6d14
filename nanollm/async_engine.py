"""The engine on its own thread: streams for an event loop that never waits for torch, a bounded queue, aborts, and a graceful end."""

# %%
import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from transformers import PreTrainedTokenizerBase

from .engine import NO_NUMBERS, NO_TOKEN, Engine
from .llm import Answer
from .protocol import ApiError, overloaded, server_error
from .request import FinishReason, RequestEvent, StepRecord
from .sampling import SamplingParams, TokenLogprobs
from .scheduler import Plan

logger = logging.getLogger(__name__)

# %%
@dataclass
class Delta:
    "What is new in one answer."
    index: int # which of the `n` answers
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] # one per token, if asked for
    finish_reason: str | None # stop, length, abort or error
    error: str | None = None

    def __iadd__(self, other: "Delta") -> "Delta":
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason, self.error = other.finish_reason, other.error
        return self

# %%
class Stream:
    "The answers to one request, on the event loop's side. A slow reader gets longer deltas, and not more of them."

    def __init__(self, engine: "AsyncEngine", request_id: str, num_answers: int):
        self.engine, self.request_id, self.num_unfinished = engine, request_id, num_answers
        self.answers: list[Answer] = [] # the engine's thread puts them here before the first delta
        self._pending: dict[int, Delta] = {} # by answer
        self._ready = asyncio.Event()

    def put(self, delta: Delta) -> None:
        "Add what is new in an answer."
        if delta.index in self._pending:
            self._pending[delta.index] += delta
        else:
            self._pending[delta.index] = delta
        if delta.finish_reason is not None:
            self.num_unfinished -= 1
        self._ready.set()

    def __aiter__(self): return self

    async def __anext__(self) -> Delta:
        while not self._pending:
            if not self.num_unfinished:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._pending.pop(next(iter(self._pending)))

    async def finished(self) -> list[Answer]:
        "Wait for the end of all answers. Raises ApiError if one of them has failed."
        async for delta in self:
            check_delta(delta)
        return self.answers

    def close(self) -> None:
        "Abort what is not finished; no effect if all is."
        self.engine.close(self)


def check_delta(delta: Delta) -> None:
    "Raise ApiError if an answer did not come to its end."
    if delta.finish_reason == FinishReason.ERROR:
        raise server_error(delta.error) if delta.error in (NO_NUMBERS, NO_TOKEN) else server_error()
    if delta.finish_reason == FinishReason.ABORT:
        raise overloaded("the server is shutting down and has cut this answer off")

# %%
MAX_FAILED_STEPS = 3 # in a row; after so many nobody believes in a recovery


class AsyncEngine:
    "Runs an engine on a thread of its own. Its methods belong to the event loop; only what begins with an underscore runs on the thread."

    def __init__(
        self,
        engine: Engine, # from now on only this class may touch it
        tokenizer: PreTrainedTokenizerBase,
        max_queued_requests: int = 1024, # answers beyond those that can run at the same time
        on_death: Callable[[], None] = lambda: None, # called on the event loop when the engine cannot go on
    ):
        self.engine, self.tokenizer, self.on_death = engine, tokenizer, on_death
        self.capacity = engine.scheduler.max_num_seqs + max_queued_requests
        self.draining, self.dead = False, False
        self.streams: dict[str, Stream] = {} # open ones, by request id
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._groups: dict[str, tuple[Stream, list[Answer]]] = {} # the same, on the thread's side
        self._num_failed = 0
        self._thread = threading.Thread(target=self._run, name="nanollm-engine", daemon=True)
        self._pool = ThreadPoolExecutor(2, "nanollm-text")
        engine.listeners.append(self._watch)

    async def start(self) -> None:
        "Start the thread; outputs go to the event loop that runs now."
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        await self.run(self.tokenizer.encode, "warm up")
        self._thread.start()

    async def run(self, function: Callable, *args: Any) -> Any:
        "Call a function that may take long, as tokenizing does, where it delays neither the event loop nor the engine."
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    @property
    def num_unfinished(self) -> int: return sum(stream.num_unfinished for stream in self.streams.values())

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        **options, # of `Engine.add_request`
    ) -> Stream:
        "Queue a request. Raises ValueError for a malformed one, ApiError if there is no room or the end is near."
        if self.dead or self.draining:
            raise overloaded("the server is shutting down" if self.draining else "the engine has failed")
        prompt_ids, params = self.engine.check_request(prompt_ids, params)
        if self.num_unfinished + params.n > max(self.capacity, params.n):
            raise overloaded(f"the queue is full: {self.num_unfinished} answers are unfinished, and {self.capacity} is the limit")
        stream = self.streams[request_id] = Stream(self, request_id, params.n)
        self._idle.clear()
        self._calls.put(lambda: self._add(stream, prompt_ids, params, arrival_s=arrival_s, **options))
        arrival_s = time.perf_counter()
        return stream

    def close(self, stream: Stream) -> None:
        "Forget a stream, and abort its request within one step if it is not finished."
        if self.streams.pop(stream.request_id, None) and stream.num_unfinished:
            self._calls.put(lambda: self._drop(stream.request_id))
        if not self.streams:
            self._idle.set()

    async def call(self, function: Callable[[], Any]) -> Any:
        "Run a function between two steps, on the engine's thread, and return its result."
        future = self._loop.create_future()

        def call():
            try:
                result, error = function(), None
            except Exception as caught:
                result, error = None, caught
            self._tell(lambda: future.done() or (future.set_result(result) if error is None else future.set_exception(error)))

        self._calls.put(call)
        return await future

    async def drain(self, timeout_s: float) -> bool: # whether all answers came to their end
        "Take no new requests and wait for the open ones; after `timeout_s` seconds abort them."
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
            return True
        except TimeoutError:
            for stream in self.streams.values():
                self._calls.put(lambda request_id=stream.request_id: self.engine.abort(request_id))
            return False

    async def stop(self) -> None:
        "End the thread after the step it is in."
        self._calls.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, 5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self):
        try:
            while True:
                calls = [] if self.engine.has_unfinished else [self._calls.get()]
                while not self._calls.empty():
                    calls.append(self._calls.get())
                if None in calls:
                    return
                for call in calls:
                    call()
                self._step() # also with nothing to compute: gauges and echoes of aborts
        except BaseException:
            logger.critical("the engine cannot go on", exc_info=True)
            self._tell(self._die)

    def _step(self):
        deltas = []
        for output in self.engine.step():
            stream, answers = self._groups.get(output.request_id, (None, ()))
            if stream is None or answers[output.index].finish_reason is not None: # the echo of an abort
                continue
            answer = answers[output.index]
            first = len(answer.token_ids)
            text = answer.take(output)
            deltas.append((stream, Delta(output.index, text, answer.token_ids[first:], answer.logprobs[first:], answer.finish_reason, answer.error)))
            if all(answer.finish_reason is not None for answer in answers):
                del self._groups[output.request_id]
        if deltas:
            self._tell(lambda: [stream.put(delta) for stream, delta in deltas])
        if self._num_failed >= MAX_FAILED_STEPS:
            raise RuntimeError(f"{self._num_failed} steps in a row have failed")

    def _add(self, stream, prompt_ids, params, **options):
        try:
            self.engine.add_request(prompt_ids, params, request_id=stream.request_id, **options)
        except ValueError as error:
            logger.error("a request that was checked is refused: %s", error)
            deltas = [Delta(i, "", [], [], str(FinishReason.ERROR), str(error)) for i in range(params.n)]
            return self._tell(lambda: [stream.put(delta) for delta in deltas])
        stream.answers = [Answer(self.engine, self.tokenizer, request) for request in self.engine.requests[stream.request_id]]
        self._groups[stream.request_id] = stream, stream.answers

    def _drop(self, request_id):
        self._groups.pop(request_id, None)
        self.engine.drop(request_id)

    def _watch(self, event):
        "Count the steps in a row in which everything failed at once."
        if isinstance(event, StepRecord) and event.works:
            failed = all(work.request.finish_reason is FinishReason.ERROR and work.request.error not in (NO_NUMBERS, NO_TOKEN)
                         for work in event.works)
            self._num_failed = self._num_failed + 1 if failed else 0

    def _tell(self, function):
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError: # the event loop has ended
            pass

    def _die(self):
        self.dead = True
        for stream in self.streams.values():
            for index in range(len(stream.answers) or stream.num_unfinished):
                if not stream.answers or stream.answers[index].finish_reason is None:
                    stream.put(Delta(index, "", [], [], str(FinishReason.ERROR), "the engine has failed"))
        self.on_death()

# %%
async def gone(receive: Callable) -> None:
    "Wait until the client hangs up."
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Callable, work: Awaitable) -> Any:
    "Do some work for a client, and stop it when the client hangs up. Raises ApiError then, which nobody will read."
    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone(receive))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client hung up")
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


# %%
def close(streams: Iterable[Stream]) -> None:
    "Close streams."
    for stream in streams:
        stream.close()


async def merge(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Delta]]: # number of the stream, delta
    "Yield what comes, from whichever stream it comes."
    waits = {asyncio.ensure_future(anext(stream, None)): i for i, stream in enumerate(streams)}
    try:
        while waits:
            for task in (await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED))[0]:
                i, delta = waits.pop(task), task.result()
                if delta is not None:
                    yield i, delta
                    waits[asyncio.ensure_future(anext(streams[i], None))] = i
    finally:
        for task in waits:
            task.cancel()

# %%
class StepLog:
    "A listener that logs one line every few seconds in which something happened."

    def __init__(self, interval_s: float = 5.0):
        self.interval_s, self._next_s = interval_s, 0.0
        self._restart(0.0)

    def __call__(self, event: RequestEvent | StepRecord) -> None:
        "Take one event of the engine."
        if isinstance(event, StepRecord):
            self._step(event)
        elif event.kind == "admitted" and not event.request.num_preemptions:
            self._num_queries += event.request.num_prompt_tokens
            self._num_hits += event.request.num_cached_tokens

    def _step(self, record):
        self._start_s = self._start_s or record.start_s
        num_made = sum(work.num_made for work in record.works)
        self._num_output += num_made
        self._num_prompt += sum(work.num_new for work in record.works) - num_made
        seconds, idle = record.end_s - self._start_s, not record.num_running + record.num_waiting
        if record.end_s >= self._next_s and (idle or seconds >= self.interval_s) and self._num_output + self._num_prompt:
            logger.info("running %d, waiting %d, KV cache %.1f %%, prompt %.1f tok/s, output %.1f tok/s, prefix hits %.1f %%",
                        record.num_running, record.num_waiting, 100 * record.kv_usage, self._num_prompt / seconds,
                        self._num_output / seconds, 100 * self._num_hits / max(1, self._num_queries))
            self._next_s = record.end_s + self.interval_s
            self._restart(0.0)

    def _restart(self, start_s):
        self._start_s, self._num_prompt, self._num_output, self._num_queries, self._num_hits = start_s, 0, 0, 0, 0

# %%
class RequestTraces:
    "A listener that keeps the story of the last requests, to answer why one was slow."

    def __init__(self, max_requests: int = 256):
        self.max_requests = max_requests
        self._stories: OrderedDict[str, list[dict]] = OrderedDict() # by request id

    def __call__(self, event: RequestEvent | StepRecord) -> None:
        "Take one event of the engine."
        if isinstance(event, RequestEvent):
            request, entry = event.request, {"event": event.kind}
            if event.kind == "queued" and request.request_id not in self._stories:
                self._stories[request.request_id] = []
                while len(self._stories) > self.max_requests:
                    self._stories.popitem(last=False)
            if event.kind == "admitted":
                entry["num_cached_tokens"] = request.num_computed_tokens
            if event.kind == "finished":
                entry |= {"finish_reason": request.finish_reason, "num_output_tokens": len(request.output_ids)}
            self._note(request, event.time_s, entry)
        else:
            for work in event.works:
                self._note(work.request, event.end_s, {
                    "event": "step", "step": event.step, "seconds": round(event.end_s - event.start_s, 6), "start": work.start,
                    "num_new": work.num_new, "num_made": work.num_made, "num_requests": len(event.works)})

    def _note(self, request, time_s, entry):
        if (story := self._stories.get(request.request_id)) is not None:
            story.append({"time_s": round(time_s - request.arrival_s, 6), "index": request.index, **entry})

    def get(self, request_id: str) -> list[dict] | None: # times are in seconds after arrival
        "Return the events of a request in their order, or None if it is not known (any more)."
        return self._stories.get(request_id)

# %%
class Faults:
    "Trouble on purpose, for tests of everything around the engine."

    def __init__(self, engine: Engine):
        self.preempt_every = 0 # steps between two forced preemptions; 0: none
        self.fail_forwards = 0 # how many of the next forwards raise
        self.fail_request = "" # requests whose id contains this get no logits
        self.step_delay_s = 0.0 # sleep in front of each forward
        self._forward, self._plan, self._num_plans = engine.runner.forward, engine.scheduler.policy.plan, 0
        engine.runner.forward, engine.scheduler.policy = self.forward, self

    def set(self, preempt_every: int = 0, fail_forwards: int = 0, fail_request: str = "", step_delay_s: float = 0.0) -> None:
        "Set all of them; what is not given is off."
        self.preempt_every, self.fail_forwards, self.fail_request, self.step_delay_s = preempt_every, fail_forwards, fail_request, step_delay_s

    def forward(self, batch: Any) -> Any:
        "Stand in for `ModelRunner.forward`."
        time.sleep(self.step_delay_s)
        if self.fail_forwards:
            self.fail_forwards -= 1
            raise RuntimeError("this forward fails on purpose")
        logits = self._forward(batch)
        return {request: rows for request, rows in logits.items() if not (self.fail_request and self.fail_request in request.request_id)}

    def plan(self, plan: Plan) -> None:
        "Stand in for `Policy.plan`."
        self._num_plans += 1
        if self.preempt_every and self._num_plans % self.preempt_every == 0 and plan.running:
            plan.preempt(plan.running[-1])
        self._plan(plan)
