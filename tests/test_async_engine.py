"""The engine on its own thread: races with the event loop, and every end of a stream."""

import asyncio
import logging
import sys
import threading
import time
from functools import partial

import pytest
from faults import Busy, Faults

from nanollm.args import EngineArgs
from nanollm.engine import EngineLost, ModelRunner
from nanollm.generate import ContextLengthError, generate
from nanollm.llm import LLM, Answer, make_engine
from nanollm.metrics import StepLog
from nanollm.request import RequestEvent
from nanollm.sampling import SamplingParams
from nanollm.serve.async_engine import SWITCH_INTERVAL_S, AsyncEngine, EngineFailed, merge
from nanollm.serve.gate import cancel_on_disconnect
from nanollm.serve.protocol import ApiError
from nanollm.serve.text_pool import (
    MAX_LONG_TEXTS,
    MAX_SHORT_TEXTS,
    SHORT_TEXT,
    Job,
    Overloaded,
    Turns,
)
from nanollm.trace import RequestTraces


@pytest.fixture(scope="module")
def llm():
    return LLM("tiny-llama", load_format="dummy", dtype="float32", progress=False)


def greedy(num_tokens, **more):
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **more)


def with_engine(llm, work, **options):
    async def main():
        engine = AsyncEngine(llm.engine, llm.tokenizer, **options)
        await engine.start()
        try:
            return await work(engine)
        finally:
            for stream in list(engine.streams.values()):
                stream.close()
            await engine.check()
            assert engine.idle and not llm.engine.has_unfinished
            await engine.stop()

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_an_id_is_in_use_until_the_engine_has_ended_its_request(llm):
    async def work(engine):
        first = engine.submit([1, 2, 3], greedy(200), "x")
        with pytest.raises(ValueError, match="'x' is in use"):
            engine.submit([1, 2, 3], greedy(3), "x")
        assert engine.streams == {"x": first}
        first.close()
        assert not engine.streams and engine.num_unfinished == 0
        with pytest.raises(ValueError, match="'x' is in use"):
            engine.submit([1, 2, 3], greedy(3), "x")
        await engine.call(lambda: None)
        again = engine.submit([1, 2, 3], greedy(3), "x")
        assert [delta.finish_reason for delta in first.take()] == ["abort"]
        return (await again.finished())[0].token_ids

    assert with_engine(llm, work) == list(generate(llm.engine.runner.model, [1, 2, 3], 3))


@pytest.mark.parametrize("timeout_s", [0, 5])
def test_drain_with_nothing_open_delivers_everything(llm, timeout_s):
    assert with_engine(llm, lambda engine: engine.drain(timeout_s)) is True


def test_drain_with_timeout_0_aborts_what_is_open(llm):
    async def work(engine):
        stream = engine.submit([1, 2, 3], greedy(1500), "a")
        assert await engine.drain(0) is False
        return [delta.finish_reason async for delta in stream][-1]

    assert with_engine(llm, work) == "abort"


def test_close_before_add_and_twice(llm):
    async def work(engine):
        for i in range(20):
            stream = engine.submit([1, 2, 3], greedy(1500, n=1 + i % 3), f"r{i}")
            stream.close()
            stream.close()
        return engine.num_unfinished

    assert with_engine(llm, work) == 0


def test_streams_give_the_tokens_of_the_naive_loop(llm):
    prompts = [[1, 2, 3], [7] * 40, [5, 6]]

    async def work(engine):
        streams = [
            engine.submit(prompt, greedy(12), f"s{i}") for i, prompt in enumerate(prompts)
        ]
        found = [(await stream.finished())[0].token_ids for stream in streams]
        for stream in streams:
            stream.close()
        return found

    assert with_engine(llm, work) == [
        list(generate(llm.engine.runner.model, prompt, 12)) for prompt in prompts
    ]


async def started(llm, faults=None, **options):
    "An engine of its own on the same model, for tests that break it."
    inner = make_engine(
        EngineArgs(num_kv_blocks=256, self_check=True), llm.model, llm.tokenizer
    )
    if faults:
        Faults(inner).set(**faults)
    engine = AsyncEngine(inner, llm.tokenizer, **options)
    await engine.start()
    return engine


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_stop_disappoints_whoever_still_waits(llm):
    async def main():
        engine = await started(llm)
        stream = engine.submit([1, 2, 3], greedy(1900), "a")
        reader = asyncio.create_task(stream.finished())
        await asyncio.sleep(0.05)
        await engine.stop()
        with pytest.raises(EngineFailed):
            await reader
        for late in (
            lambda: engine.submit([1], greedy(1), "b"),
            lambda: engine.call(lambda: None),
        ):
            with pytest.raises(Overloaded, match="stopped"):
                found = late()
                await found

    run(main())


def test_calls_in_the_mailbox_in_front_of_the_end_are_made(llm):
    async def main():
        engine = await started(llm)
        waiting = [asyncio.create_task(engine.call(lambda i=i: i)) for i in range(20)]
        await asyncio.sleep(0)
        await engine.stop()
        return await asyncio.gather(*waiting)

    assert run(main()) == list(range(20))


def test_an_error_in_a_call_is_its_own(llm):
    async def main():
        engine = await started(llm)
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda: 1 / 0)
        assert await engine.call(lambda: 7) == 7
        await engine.stop()

    run(main())


def test_death_ends_every_stream_and_every_call(llm, caplog):
    async def main():
        died = asyncio.Event()
        engine = await started(llm, on_death=died.set)
        streams = [
            engine.submit([1, 2, 3], greedy(1900, n=1 + i % 2), f"r{i}") for i in range(4)
        ]
        await asyncio.sleep(0.05)

        def explode():
            raise MemoryError("not of a call that somebody waits for")

        engine._thread.put(explode)
        late = asyncio.create_task(engine.call(lambda: None))
        outcomes = await asyncio.gather(
            *(stream.finished() for stream in streams), late, return_exceptions=True
        )
        assert all(isinstance(outcome, EngineFailed) for outcome in outcomes[:-1]), outcomes
        assert isinstance(outcomes[-1], Overloaded)
        await asyncio.wait_for(died.wait(), 5)
        with pytest.raises(Overloaded, match="failed"):
            engine.submit([1], greedy(1), "late")
        assert not await engine.drain(0)
        await engine.stop()

    with caplog.at_level(logging.CRITICAL):
        run(main())
    assert "cannot go on" in caplog.text


@pytest.mark.parametrize("busy", [False, True])
def test_a_lost_model_is_the_end_also_when_nobody_asks(llm, caplog, busy, monkeypatch):
    watching = []
    monkeypatch.setattr(ModelRunner, "watch", lambda runner, notify: watching.append(notify))

    async def main():
        died = asyncio.Event()
        engine = await started(llm, on_death=died.set)
        while not watching:
            await asyncio.sleep(0.01)
        stream = engine.submit([1, 2, 3], greedy(1900), "r") if busy else None
        watching[0](EngineLost("rank 1 has ended"))
        await asyncio.wait_for(died.wait(), 5)
        if busy:
            with pytest.raises(EngineFailed):
                await stream.finished()
        with pytest.raises(Overloaded, match="failed"):
            engine.submit([1], greedy(1), "late")
        await engine.stop()

    with caplog.at_level(logging.CRITICAL):
        run(main())
    assert "the engine cannot go on: rank 1 has ended" in caplog.text


def test_what_cannot_be_queued_ends_its_stream_only(llm, caplog):
    async def main():
        engine = await started(llm)
        inner = engine._thread.engine
        queue, inner.queue = inner.queue, lambda *args, **options: 1 / 0
        stream = engine.submit([1, 2], greedy(3, n=2), "a")
        with pytest.raises(EngineFailed) as error:
            await stream.finished()
        assert "division" not in str(error.value)
        stream.close()
        inner.queue = queue
        assert (await engine.submit([1, 2], greedy(3), "a").finished())[
            0
        ].finish_reason == "length"
        await engine.stop()

    run(main())


def test_a_slow_reader_gets_longer_deltas_and_all_of_the_text(llm):
    async def main():
        engine = await started(llm)
        quick = engine.submit([1, 2, 3], greedy(300, n=2, logprobs=1), "quick")
        answers = await quick.finished()
        stream = engine.submit([1, 2, 3], greedy(300, n=2, logprobs=1), "slow")
        parts = [[], []]
        async for delta in stream:
            assert len(delta.token_ids) == len(delta.logprobs)
            parts[delta.index].append(delta)
            await asyncio.sleep(0.05)
            assert len(stream._pending) <= 2
        for found, answer in zip(parts, answers):
            assert "".join(delta.text for delta in found) == answer.text
            assert sum((list(delta.token_ids) for delta in found), []) == list(answer.token_ids)
            assert len(answer.token_ids) == 300 and answer.num_prompt_tokens == 3
            assert [delta.finish_reason for delta in found][-1] == "length" and len(found) < 100
        await engine.stop()

    run(main())


def test_the_queue_has_an_end_and_one_request_always_fits(llm):
    async def main():
        engine = await started(llm, faults={"step_delay_s": 0.01}, max_queued_requests=0)
        engine.capacity = 2
        streams = [engine.submit([1, 2], greedy(50, n=5), "many")]
        with pytest.raises(Overloaded, match="5 answers are unfinished, and 2 is the limit"):
            engine.submit([1, 2], greedy(1), "more")
        streams[0].close()
        await engine.submit([1, 2], greedy(1), "now").finished()
        await engine.stop()

    run(main())


def test_merge_and_hanging_up(llm):
    async def main():
        engine = await started(llm)
        streams = [engine.submit([1, 2 + i], greedy(4 + i), f"m{i}") for i in range(3)]
        counts = [0, 0, 0]
        async for i, delta in merge(streams):
            counts[i] += len(delta.token_ids)
        assert counts == [4, 5, 6]
        stream = engine.submit([1], greedy(1900), "gone")

        async def receive():
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        with pytest.raises(ApiError):
            await cancel_on_disconnect(receive, stream.finished())
        stream.close()
        await engine.call(lambda: None)
        assert not engine._thread.engine.requests
        with pytest.raises(ZeroDivisionError):
            await cancel_on_disconnect(asyncio.Event().wait, asyncio.to_thread(lambda: 1 / 0))
        await engine.stop()

    run(main())


def test_one_bad_answer_does_not_take_the_others_along(llm):
    async def main():
        engine = await started(llm, faults={"fail_request": "bad"})
        good, bad = (
            engine.submit([1, 2, 3], greedy(20), "good"),
            engine.submit([1, 2, 3], greedy(20), "bad"),
        )
        with pytest.raises(EngineFailed, match="forbidden"):
            await bad.finished()
        [answer] = await good.finished()
        assert len(answer.token_ids) == 20 and not engine.dead
        await engine.stop()

    run(main())


def test_step_log_and_traces(llm, caplog):
    async def main():
        log, traces = StepLog(interval_s=0.0), RequestTraces(max_requests=2)
        engine = await started(llm)
        engine.listen(log, traces)
        for i in range(3):
            stream = engine.submit([1] * 40, greedy(3), f"r{i}")
            await stream.finished()
            stream.close()
        await engine.call(lambda: None)
        assert traces.get("r0") is None, "the oldest is forgotten"
        story = traces.get("r2")
        assert story[0]["event"] == "queued" and story[1]["num_cached_tokens"] == 32
        await engine.stop()

    with caplog.at_level(logging.INFO, "nanollm"):
        run(main())
    assert "prefix hits" in caplog.text and "output" in caplog.text


# --- work on texts


async def occupied(engine):
    "Keep both threads of the pool; return what keeps them, and the tasks to await."
    kept, tasks = (Busy(), Busy()), []
    for busy, size in zip(kept, (SHORT_TEXT, 0)):  # a long one first: only one thread takes it
        tasks.append(asyncio.create_task(engine.run(busy, tenant="busy", size=size)))
        while not busy.begun.is_set():
            await asyncio.sleep(0.001)
    return kept, tasks


async def queued(engine, jobs):
    "Tasks that wait in the pool, in this order: pairs of a call, and whose it is or its size."
    tasks = []
    for function, options in jobs:
        tasks.append(asyncio.create_task(engine.run(function, **options)))
        await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize("size", [0, SHORT_TEXT])
def test_a_tenant_with_many_jobs_delays_another_by_one(llm, size):
    async def work(engine):
        (long, short), tasks = await occupied(engine)
        order = []
        jobs = [
            (partial(order.append, f"greedy {i}"), dict(tenant="a", size=size))
            for i in range(64)
        ]
        jobs += [
            (partial(order.append, f"modest {i}"), dict(tenant="b", size=size))
            for i in range(2)
        ]
        tasks += await queued(engine, jobs)
        long.end.set()  # one thread goes on, so that the order is that of the turns
        await asyncio.gather(tasks[0], *tasks[2:])
        short.end.set()
        await tasks[1]
        return order

    order = with_engine(llm, work)
    assert order[:5] == ["greedy 0", "modest 0", "greedy 1", "modest 1", "greedy 2"]
    assert order[5:] == [f"greedy {i}" for i in range(3, 64)]


def test_short_jobs_never_wait_behind_long_ones(llm):
    async def work(engine):
        (long, short), tasks = await occupied(engine)
        order = []
        jobs = [(partial(order.append, "long"), dict(size=SHORT_TEXT)) for _ in range(10)]
        jobs += [(partial(order.append, "short"), dict(size=SHORT_TEXT - 1))]
        tasks += await queued(engine, jobs)
        short.end.set()  # of the same tenant, and the thread for long ones is still kept
        await tasks[-1]
        assert order == ["short"]
        long.end.set()
        await asyncio.gather(*tasks)

    with_engine(llm, work)


def test_jobs_of_those_who_hung_up_are_dropped_and_do_not_count(llm):
    async def work(engine):
        kept, tasks = await occupied(engine)
        order = []

        def jobs(name, num):
            return [(partial(order.append, name), dict(tenant="a", size=SHORT_TEXT))] * num

        gone = await queued(engine, jobs("gone", MAX_LONG_TEXTS))
        [late] = await queued(engine, jobs("late", 1))
        with pytest.raises(Overloaded, match="64 texts of yours"):
            await late
        [other] = await queued(engine, [(partial(order.append, "other"), dict(tenant="b"))])
        for task in gone:
            task.cancel()
        await asyncio.sleep(0)
        waiting = await queued(engine, jobs("waiting", 3))
        for busy in kept:
            busy.end.set()
        await asyncio.gather(*tasks, *waiting, other)
        assert sorted(order) == ["other", "waiting", "waiting", "waiting"]
        assert engine.idle

    with_engine(llm, work)


def test_many_short_texts_may_wait():
    turns, jobs = Turns(MAX_SHORT_TEXTS), [Job(int) for _ in range(MAX_SHORT_TEXTS)]
    for job in jobs:
        turns.put("", job)
    with pytest.raises(Overloaded, match=str(MAX_SHORT_TEXTS)):
        turns.put("", Job(int))
    turns.put("another", Job(int))
    jobs[0].future.cancel()
    turns.put("", Job(int))
    assert turns.take() is jobs[1]


def test_turns_are_fair_with_any_queues():
    turns = Turns(100)
    for tenant, num in (("a", 5), ("b", 1), ("c", 3)):
        for i in range(num):
            turns.put(tenant, Job(f"{tenant}{i}".upper))
    found = []
    while (job := turns.take()) is not None:
        found.append(job.function())
        if len(found) == 4:  # one who comes late waits for one job of each other
            turns.put("d", Job("d0".upper))
    assert found == ["A0", "B0", "C0", "A1", "C1", "A2", "D0", "C2", "A3", "A4"]


def test_results_and_errors_of_jobs(llm):
    async def work(engine):
        assert await engine.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await engine.run(divmod, 7, 0)
        with pytest.raises(SystemExit):  # and the thread goes on
            await engine.run(sys.exit, 3, size=SHORT_TEXT)
        names = [threading.current_thread().name]
        names += [await engine.run(lambda: threading.current_thread().name)]
        assert names[0] != names[1] and names[1].startswith("nanollm-")
        assert await engine.run(len, "abc", size=SHORT_TEXT) == 3

    with_engine(llm, work)


def test_stop_and_death_disappoint_who_waits_for_the_pool(llm, caplog):
    async def main(kill):
        engine = await started(llm)
        kept, tasks = await occupied(engine)
        waiting = await queued(engine, [(int, {}), (int, dict(size=SHORT_TEXT))])
        if kill:
            engine._thread.put(lambda: 1 / 0)
            while not engine.dead:
                await asyncio.sleep(0.001)
        else:
            await engine.stop()
        for task in waiting:
            with pytest.raises(Overloaded, match="failed" if kill else "stopped"):
                await task
        for busy in kept:
            busy.end.set()
        assert await asyncio.gather(*tasks) == [None, None]  # what had begun is finished
        with pytest.raises(Overloaded):
            await engine.run(int)
        if kill:
            await engine.stop()

    run(main(kill=False))
    with caplog.at_level(logging.CRITICAL):
        run(main(kill=True))


def test_what_cannot_fit_is_refused_by_its_length(llm):
    async def work(engine):
        engine.check_length(SHORT_TEXT)  # the floor
        most = engine.max_model_len * max(map(len, llm.tokenizer.get_vocab()))
        assert most > SHORT_TEXT
        engine.check_length(most)
        with pytest.raises(ContextLengthError, match=f"{most + 1} characters.*{most} is the"):
            engine.check_length(most + 1)

    with_engine(llm, work)


def test_a_prompt_of_a_million_ids_is_not_looked_at(llm):
    class Endless(list):
        def __len__(self):
            return 10**6

        def __iter__(self):
            raise AssertionError("looked at")

    async def work(engine):
        with pytest.raises(ContextLengthError, match="1000000 prompt tokens"):
            engine.submit(Endless(), greedy(1), "a")
        assert engine.idle

    with_engine(llm, work)


# --- what the engine is told, and what it tells


def test_the_arrival_is_that_of_the_server_or_now(llm):
    async def main():
        engine, seen = await started(llm), {}

        def listen(event):
            if isinstance(event, RequestEvent):
                seen[event.request.request_id] = event.request.arrival_s

        engine.listen(listen)
        before = time.perf_counter()
        for name, options in (("given", {"arrival_s": 12.5}), ("now", {})):
            await engine.submit([1, 2], greedy(2), name, **options).finished()
        await engine.stop()
        assert seen["given"] == 12.5 and before <= seen["now"] <= time.perf_counter()

    run(main())


def test_options_reach_the_request(llm):
    async def main():
        engine, seen = await started(llm), []
        engine.listen(lambda event: seen.append(getattr(event, "request", None)))
        options = dict(priority=3, cache_salt="mine")
        await engine.submit([1, 2], greedy(2, n=2), "a", **options).finished()
        await engine.stop()
        found = {(r.request_id, r.index, r.priority, r.cache_salt) for r in seen if r}
        assert found == {("a.0", 0, 3, "mine"), ("a.1", 1, 3, "mine")}

    run(main())


def test_requests_that_still_wait_in_the_queue_are_aborted(llm):
    async def main():
        inner = make_engine(
            EngineArgs(num_kv_blocks=256, max_num_seqs=1, self_check=True),
            llm.model,
            llm.tokenizer,
        )
        engine = AsyncEngine(inner, llm.tokenizer)
        await engine.start()
        running = engine.submit([1, 2, 3], greedy(300), "running")
        waiting = [engine.submit([1, 2, 3], greedy(300, n=2), f"w{i}") for i in range(5)]
        while not running._pending:
            await asyncio.sleep(0.001)
        for stream in waiting:
            stream.close()
        assert await engine.call(lambda: set(inner.requests)) == {"running"}
        [answer] = await running.finished()
        running.close()
        assert len(answer.token_ids) == 300 and engine.idle
        await engine.stop()

    run(main())


def test_a_call_of_somebody_who_is_gone_is_not_made(llm):
    async def work(engine):
        busy, made = Busy(), []
        first = asyncio.create_task(engine.call(busy))
        while not busy.begun.is_set():
            await asyncio.sleep(0.001)
        gone = asyncio.create_task(engine.call(partial(made.append, "gone")))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert gone.cancelled()
        busy.end.set()
        await first
        await engine.call(partial(made.append, "here"))
        assert made == ["here"]

    with_engine(llm, work)


def test_a_listener_that_raises_disturbs_nobody(llm, caplog):
    async def main():
        engine = await started(llm)
        engine.listen(lambda event: 1 / 0)
        [answer] = await engine.submit([1, 2, 3], greedy(8), "a").finished()
        assert answer.token_ids == list(generate(llm.engine.runner.model, [1, 2, 3], 8))
        await engine.stop()

    run(main())
    assert "a listener has failed" in caplog.text


def test_an_on_death_that_raises_leaves_nobody_waiting(llm, caplog):
    async def main():
        engine = await started(llm, on_death=lambda: 1 / 0)
        stream = engine.submit([1, 2, 3], greedy(1900), "a")
        engine._thread.put(lambda: 1 / 0)
        with pytest.raises(EngineFailed):
            await stream.finished()
        assert engine.dead
        await engine.stop()

    run(main())


@pytest.mark.parametrize("num_failing, dead", [(2, False), (3, True)])
def test_three_failed_steps_in_a_row_are_the_end(llm, caplog, num_failing, dead):
    async def main():
        died = asyncio.Event()
        engine = await started(llm, faults={"fail_forwards": num_failing}, on_death=died.set)
        for i in range(num_failing):
            with pytest.raises(EngineFailed, match="the server could not"):
                await engine.submit([1, 2], greedy(5), f"r{i}").finished()
        if dead:
            await asyncio.wait_for(died.wait(), 5)
        else:
            await engine.submit([1, 2], greedy(5), "fine").finished()
        assert engine.dead is dead
        await engine.stop()

    run(main())


def test_answers_that_fail_for_their_own_reasons_never_end_the_engine(llm):
    async def main():
        engine = await started(llm, faults={"fail_request": "bad"})
        for i in range(5):
            with pytest.raises(EngineFailed, match="forbidden"):
                await engine.submit([1, 2], greedy(5), f"bad{i}").finished()
        assert not engine.dead
        await engine.stop()

    run(main())


def test_tokens_that_are_no_text_never_end_the_engine(llm, monkeypatch, caplog):
    def refuse(answer, output):
        raise KeyError(output.token_ids)

    async def main():
        engine = await started(llm)
        with monkeypatch.context() as broken:
            broken.setattr(Answer, "take", refuse)
            for i in range(5):
                with pytest.raises(EngineFailed, match="cannot be turned into text"):
                    await engine.submit([1, 2], greedy(5), f"bad{i}").finished()
        [answer] = await engine.submit([1, 2], greedy(5), "good").finished()
        assert len(answer.token_ids) == 5 and not engine.dead
        await engine.check()
        await engine.stop()

    run(main())


def test_counts_come_with_the_deltas_and_never_run_ahead_of_the_text(llm):
    async def main():
        engine = await started(llm)
        prompt = [5] * 40
        await engine.submit(prompt, greedy(4), "fill").finished()
        stream = engine.submit(prompt, greedy(60), "a")
        tokens, text = [], ""
        async for delta in stream:
            tokens, text = tokens + list(delta.token_ids), text + delta.text
            assert (delta.num_prompt_tokens, delta.num_cached_tokens) == (40, 32)
            assert llm.tokenizer.decode(tokens, skip_special_tokens=True).startswith(text)
            await asyncio.sleep(0.002)
        assert len(tokens) == 60
        await engine.stop()

    run(main())


def test_the_switch_interval_is_set_while_it_runs(llm):
    before = sys.getswitchinterval()

    async def work(engine):
        return sys.getswitchinterval()

    assert with_engine(llm, work) == pytest.approx(SWITCH_INTERVAL_S, rel=0.01)
    assert sys.getswitchinterval() == pytest.approx(before, rel=0.01)


def test_an_engine_that_was_never_started_can_be_stopped(llm):
    async def main():
        engine = AsyncEngine(llm.engine, llm.tokenizer)
        await engine.stop()
        with pytest.raises(Overloaded, match="stopped"):
            engine.submit([1], greedy(1), "a")

    run(main())


def test_draining_refuses_new_requests_and_lets_the_open_ones_end(llm):
    async def work(engine):
        stream = engine.submit([1, 2, 3], greedy(50), "open")
        drained = asyncio.create_task(engine.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="shutting down"):
            engine.submit([1], greedy(1), "late")
        [answer] = await stream.finished()
        assert len(answer.token_ids) == 50 and not drained.done()  # it is not delivered yet
        stream.close()
        assert await drained is True
        assert await engine.call(lambda: 3) == 3, "it still answers"

    with_engine(llm, work)
