"""The engine on its own thread: races with the event loop, and every end of a stream."""

import asyncio
import logging

import pytest
from faults import Faults

from nanollm.args import EngineArgs
from nanollm.generate import generate
from nanollm.llm import LLM, make_engine
from nanollm.metrics import StepLog
from nanollm.sampling import SamplingParams
from nanollm.serve.async_engine import AsyncEngine, EngineFailed, Overloaded, merge
from nanollm.serve.gate import cancel_on_disconnect
from nanollm.serve.protocol import ApiError
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
            await engine.call(lambda: None)
            assert not engine.streams and not engine._thread.owners
            assert not llm.engine.has_unfinished
            await engine.stop()
            llm.engine.listeners.remove(engine._thread.failed)

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_a_call_that_the_thread_takes_at_once_finds_its_arrival_time(llm):
    async def main():
        engine = AsyncEngine(llm.engine, llm.tokenizer)
        engine._idle = asyncio.Event()

        class AtOnce:
            def put(self, call):
                call()

        engine._thread._calls, seen = AtOnce(), []
        engine._thread.add = lambda stream, prompt_ids, params, options: seen.append(
            options["arrival_s"]
        )
        engine.submit([1, 2], greedy(2), "a")
        llm.engine.listeners.remove(engine._thread.failed)
        assert seen

    asyncio.run(main())


def test_an_id_in_use_is_refused_and_leaves_its_owner_alone(llm):
    async def work(engine):
        first = engine.submit([1, 2, 3], greedy(200), "x")
        with pytest.raises(ValueError, match="'x' is in use"):
            engine.submit([1, 2, 3], greedy(3), "x")
        assert engine.streams == {"x": first}
        first.close()
        again = engine.submit([1, 2, 3], greedy(3), "x")
        return (await again.finished())[0].finish_reason

    assert with_engine(llm, work) == "length"


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
            raise MemoryError("not an Exception that a step survives")

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


def test_what_cannot_be_queued_ends_its_stream_only(llm, caplog):
    async def main():
        engine = await started(llm)
        inner = engine._thread.engine
        add, inner.add_request = inner.add_request, lambda *args, **options: 1 / 0
        stream = engine.submit([1, 2], greedy(3, n=2), "a")
        with pytest.raises(EngineFailed) as error:
            await stream.finished()
        assert "division" not in str(error.value)
        stream.close()
        inner.add_request = add
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
            assert len(delta.token_ids) == len(delta.logprobs) and len(stream._pending) <= 2
            parts[delta.index].append(delta)
            await asyncio.sleep(0.05)
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
