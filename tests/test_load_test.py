import asyncio
import contextlib
import json
import math
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
import uvicorn

from nanollm.serve.load_test import (
    LoadArgs,
    Outcome,
    Report,
    arrival_times,
    first_model,
    has_text,
    make_jobs,
    plot_sweep,
    run_load,
    stream_data,
    table,
)


class Fake:
    "A server that answers as `script` says: chunks of bytes, a status, or a function."

    def __init__(self):
        self.script, self.bodies, self.paths, self.keys = [], [], [], []
        self.models, self.open, self.most_open, self.hung_up, self.warmed = (
            {"data": [{"id": "first"}, {"id": "second"}]},
            0,
            0,
            0,
            False,
        )

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        self.keys.append(dict(scope["headers"]).get(b"authorization"))
        self.paths.append(scope["path"])
        if scope["method"] == "GET":
            status = self.models if isinstance(self.models, int) else 200
            return await self.whole(send, status, json.dumps(self.models).encode())
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(json.loads(body))
        if not self.warmed:  # the request that goes ahead is not what a test is about
            self.warmed = True
            return await self.stream(send, receive, good(1))
        script = self.script(self.bodies[-1]) if callable(self.script) else self.script
        if isinstance(script, int):
            return await self.whole(send, script, b'{"error": {"message": "no"}}')
        await self.stream(send, receive, script)

    async def whole(self, send, status, content):
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        await send({"type": "http.response.body", "body": content})

    async def stream(self, send, receive, script):
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        gone = asyncio.create_task(receive())
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(b"content-type", b"text/event-stream")],
                }
            )
            for piece in script:
                if piece is None:
                    raise RuntimeError("cut")
                if isinstance(piece, float):
                    await asyncio.wait([gone], timeout=piece)
                    if gone.done():
                        self.hung_up += 1
                        return
                else:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self.open -= 1


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece="a", **more):
    return event(choices=[{"index": 0, "text": piece, **more}])


DONE = b"data: [DONE]\n\n"


def usage(prompt, completion):
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


def good(num, delay=0.0):
    pauses = [delay] * bool(delay)
    return [piece for _ in range(num) for piece in (*pauses, text())] + [
        text("", finish_reason="length"),
        usage(7, num),
        DONE,
    ]


@contextlib.contextmanager
def serving(app):
    "The fake on a thread and a free port."
    server = uvicorn.Server(
        uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False
        )
    )
    server.capture_signals = contextlib.nullcontext
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def fake():
    app = Fake()
    with serving(app) as url:
        app.url = url
        yield app


def load(fake, script=None, on_done=lambda outcome: None, **options):
    "Run a load of three against the script."
    fake.script = good(3) if script is None else script
    return asyncio.run(
        asyncio.wait_for(
            run_load(
                LoadArgs(**{"base_url": fake.url, "num_prompts": 3, "timeout_s": 20} | options),
                on_done,
            ),
            60,
        )
    )


def test_importing_it_loads_neither_torch_nor_transformers():
    code = (
        "import sys, nanollm.serve.load_test\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The workload


def test_the_same_seed_gives_the_same_load():
    args = LoadArgs(
        random_range_ratio=0.5,
        cancel_ratio=0.5,
        random_prefix_len=5,
        num_prefixes=3,
        request_rate=2,
    )
    assert make_jobs(args) == make_jobs(args) and arrival_times(args) == arrival_times(args)
    assert make_jobs(args) != make_jobs(replace(args, seed=1)) and arrival_times(
        args
    ) != arrival_times(replace(args, seed=1))


def test_rates_of_a_sweep_share_lengths_and_no_prompts():
    args = LoadArgs(
        random_range_ratio=0.5, cancel_ratio=0.5, random_input_len=20, request_rate=2
    )
    ours, theirs = make_jobs(args), make_jobs(replace(args, request_rate=4))
    assert [(len(j.prompt.split()), j.max_tokens, j.cancel_after) for j in ours] == [
        (len(j.prompt.split()), j.max_tokens, j.cancel_after) for j in theirs
    ]
    assert not {tuple(j.prompt.split()[:6]) for j in ours} & {
        tuple(j.prompt.split()[:6]) for j in theirs
    }


def test_lengths_keep_to_their_range_and_fill_it():
    jobs = make_jobs(
        LoadArgs(
            num_prompts=2000, random_input_len=20, random_output_len=10, random_range_ratio=0.5
        )
    )
    words, tokens = {len(j.prompt.split()) for j in jobs}, {j.max_tokens for j in jobs}
    assert words == set(range(10, 31)) and tokens == set(range(5, 16))
    assert {
        (len(j.prompt.split()), j.max_tokens)
        for j in make_jobs(LoadArgs(random_input_len=3, random_output_len=1))
    } == {(3, 1)}


def test_prefixes_are_shared():
    jobs = make_jobs(
        LoadArgs(num_prompts=300, random_prefix_len=12, num_prefixes=4, random_input_len=10)
    )
    assert len({tuple(j.prompt.split()[:12]) for j in jobs}) == 4
    assert len({j.prompt for j in jobs}) == 300 and {len(j.prompt.split()) for j in jobs} == {
        22
    }


@pytest.mark.parametrize("ratio, num", [(0.0, 0), (0.3, 9), (0.5, 15), (1.0, 30)])
def test_as_many_cancel_as_were_asked_for(ratio, num):
    for seed in range(5):
        jobs = make_jobs(LoadArgs(num_prompts=30, cancel_ratio=ratio, seed=seed))
        assert sum(j.cancel_after is not None for j in jobs) == num


def test_who_cancels_does_so_in_the_first_quarter():
    jobs = make_jobs(LoadArgs(num_prompts=2000, cancel_ratio=1.0, random_output_len=10))
    assert {j.cancel_after for j in jobs} == {1, 2, 3}
    jobs = make_jobs(LoadArgs(num_prompts=20, cancel_ratio=1.0, random_output_len=1))
    assert {j.cancel_after for j in jobs} == {1}


# The arrivals


@pytest.mark.parametrize(
    "burstiness, deviation", [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5), (10000.0, 0.01)]
)
def test_gaps_have_the_mean_and_the_deviation_of_their_distribution(burstiness, deviation):
    times = arrival_times(LoadArgs(num_prompts=20_001, request_rate=5, burstiness=burstiness))
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert times[0] == 0 and min(gaps) >= 0 and math.isclose(times[-1], 20_000 / 5)
    spread = math.sqrt(sum((gap - 0.2) ** 2 for gap in gaps) / len(gaps))
    assert abs(spread / 0.2 / deviation - 1) < 0.08


def test_poisson_counts_vary_as_much_as_their_mean():
    counts = [0] * 2000
    for time_s in arrival_times(LoadArgs(num_prompts=20_001, request_rate=10))[:-1]:
        counts[int(time_s)] += 1
    mean = sum(counts) / 2000
    assert (
        abs(mean - 10) < 0.1
        and abs(sum((c - mean) ** 2 for c in counts) / 2000 / mean - 1) < 0.1
    )


def test_arrivals_of_few_and_of_an_infinite_rate():
    assert arrival_times(LoadArgs(num_prompts=1, request_rate=3)) == [0.0]
    assert arrival_times(LoadArgs(num_prompts=2, request_rate=4)) == [0.0, 0.25]
    assert arrival_times(LoadArgs(num_prompts=3)) == [0.0] * 3
    assert len(arrival_times(LoadArgs(num_prompts=50, request_rate=4, burstiness=0.001))) == 50


# One request, and what may be wrong with it


@pytest.mark.parametrize(
    "script, error",
    [
        (503, "HTTP 503"),
        (429, "HTTP 429"),
        (500, "HTTP 500"),
        (404, "HTTP 404"),
        ([text(), event(error={"message": "out of memory"}), DONE], "error in the stream"),
        ([text(), None], "RemoteProtocolError"),  # the connection breaks
        (
            [text(), text()],
            "stream cut off",
        ),  # the stream ends politely in the middle of an answer
        ([], "stream cut off"),
        ([usage(3, 0), DONE], "no text"),
        ([text(""), event(choices=[{"delta": {}, "finish_reason": "stop"}]), DONE], "no text"),
        ([b"data: {not json\n\n", DONE], "malformed event"),
        ([b"data: [1, 2]\n\n", DONE], "malformed event"),
        ([b"data: null\n\n", DONE], "malformed event"),
        ([b"data: \xff\n\n", DONE], "malformed event"),
        ([event(choices=[7]), DONE], "malformed event"),
        ([event(choices=[{"delta": "text"}]), DONE], "malformed event"),
        ([text(), event(usage={"prompt_tokens": 1}), DONE], "malformed event"),
        ([text(), event(usage=[1]), DONE], "malformed event"),
    ],
)
def test_what_goes_wrong_is_counted_by_kind(fake, script, error):
    found = load(fake, script).to_dict()
    assert (
        found["errors"] == {error: 3}
        and found["failed"] == 3
        and found["completed"] == found["cancelled"] == 0
    )
    assert (
        found["median_ttft_ms"] is None
        and found["request_throughput"] == found["request_goodput"] == 0
    )
    json.dumps(found, allow_nan=False)


def test_a_server_that_falls_silent_times_out(fake):
    found = load(fake, [text(), 30.0, DONE], timeout_s=0.2).to_dict()
    assert found["errors"] == {"ReadTimeout": 3}


def test_errors_of_some_leave_the_others_alone(fake):
    calls = iter([503, good(2), 500, good(2), [text()], 503])
    found = load(fake, lambda body: next(calls), num_prompts=6, max_concurrency=1).to_dict()
    assert found["errors"] == {"HTTP 503": 2, "HTTP 500": 1, "stream cut off": 1} and (
        found["completed"],
        found["failed"],
    ) == (2, 4)
    assert found["total_output_tokens"] == 4 and found["total_input_tokens"] == 14


def test_empty_pieces_are_no_tokens_and_merged_ones_are_counted_by_the_server(fake):
    script = [
        b": a comment\n\n",
        text(""),
        text("abc"),
        event(choices=[], usage=None),
        text("d"),
        text("", finish_reason="stop"),
        usage(5, 4),
        DONE,
    ]
    outcome = load(fake, script).outcomes[0]
    assert outcome.error is None and len(outcome.times_s) == 2 and len(outcome.itl_s) == 1
    assert (outcome.prompt_tokens, outcome.output_tokens) == (5, 4)
    assert outcome.tpot_s == pytest.approx((outcome.e2el_s - outcome.ttft_s) / 3)


def test_a_server_without_usage(fake):
    found = load(fake, [text(), text(), text("b", finish_reason="stop"), DONE]).to_dict()
    assert (
        found["total_output_tokens"] == 9
        and found["total_input_tokens"] == 0
        and found["completed"] == 3
    )
    assert (
        load(fake, [text(), text("b", finish_reason="stop")]).to_dict()["completed"] == 3
    )  # nor a [DONE]


def test_pieces_of_bytes_may_be_cut_anywhere(fake):
    whole = b"".join(
        [
            'data: {"choices": [{"text": "\u2028 \u0085 \x7f é"}]}\r\n\r\n'.encode(),
            text("x", finish_reason="stop"),
            usage(1, 2),
            DONE,
        ]
    )
    pieces = [whole[i : i + 1] for i in range(len(whole))]
    outcome = load(fake, pieces, num_prompts=1).outcomes[0]
    assert outcome.error is None and len(outcome.times_s) == 2 and outcome.output_tokens == 2


def test_stream_data_splits_at_newlines_only():
    async def collect():
        response = httpx.Response(
            200,
            content=b"data:1\nid: 7\n\ndata: 2\r\n\r\n: x\n"
            b"data: \xe2\x80\xa8\xc2\x853\n\ndata: unfinished",
        )
        return [data async for data in stream_data(response)]

    assert asyncio.run(collect()) == [b"1", b"2", b"\xe2\x80\xa8\xc2\x853"]


@pytest.mark.parametrize(
    "choice, says",
    [
        ({"text": "a"}, True),
        ({"text": ""}, False),
        ({"text": None}, False),
        ({}, False),
        ({"delta": None}, False),
        ({"delta": {}}, False),
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"content": "a"}}, True),
        ({"delta": {"reasoning_content": "a"}}, True),
    ],
)
def test_has_text(choice, says):
    assert has_text(choice) is says


# What is sent


def test_the_body_of_a_request(fake):
    load(
        fake,
        model="mine",
        num_prompts=1,
        random_output_len=5,
        temperature=0.5,
        extra_body={"top_p": 0.9, "stream_options": None},
    )
    warm_up, body = fake.bodies
    assert fake.paths == ["/v1/completions"] * 2 and warm_up["max_tokens"] == 1
    job = make_jobs(LoadArgs(num_prompts=1, random_output_len=5))[0]
    assert body == {
        "model": "mine",
        "prompt": job.prompt,
        "max_tokens": 5,
        "temperature": 0.5,
        "stream": True,
        "stream_options": None,
        "ignore_eos": True,
        "top_p": 0.9,
    }
    assert warm_up["prompt"] != job.prompt


def test_chat_and_key_and_the_first_model(fake):
    def chat(body):
        assert (
            body["messages"][0]["role"] == "user"
            and "prompt" not in body
            and "ignore_eos" not in body
        )
        return [
            event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]),
            event(choices=[{"index": 0, "delta": {"content": "hi"}}]),
            event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
            usage(3, 1),
            DONE,
        ]

    report = load(
        fake,
        chat,
        endpoint="chat",
        api_key="secret",
        ignore_eos=False,
        base_url=fake.url + "/v1/",
    )
    assert len(report.completed) == 3 and {len(o.times_s) for o in report.outcomes} == {1}
    assert fake.paths == ["/v1/models"] + ["/v1/chat/completions"] * 4 and {
        body["model"] for body in fake.bodies
    } == {"first"}
    assert set(fake.keys) == {b"Bearer secret"}
    assert (
        all(math.isnan(o.tpot_s) for o in report.completed)
        and report.to_dict()["median_tpot_ms"] is None
    )


@pytest.mark.parametrize(
    "models, reason",
    [
        (401, "HTTP 401"),
        ({"data": []}, "IndexError|out of range"),
        ({}, "data"),
        ({"data": None}, "NoneType"),
        ([], "indices"),
    ],
)
def test_a_server_that_does_not_list_its_models(fake, models, reason):
    fake.models = models
    with pytest.raises(
        ValueError, match=f"{fake.url}.* does not list its models: .*({reason})"
    ):
        load(fake)


def test_a_server_that_does_not_answer():
    with pytest.raises(ValueError, match="http://127.0.0.1:9 does not list"):
        asyncio.run(run_load(LoadArgs("http://127.0.0.1:9")))
    with pytest.raises(
        ValueError, match="does not answer a request for model 'm': ConnectError"
    ):
        asyncio.run(run_load(LoadArgs("http://127.0.0.1:9", model="m")))


@pytest.mark.parametrize("options", [{}, {"model": "m"}])
def test_an_address_without_a_scheme(options):
    with pytest.raises(ValueError, match="127.0.0.1:9.? does not .*(http|Protocol)"):
        asyncio.run(run_load(LoadArgs("127.0.0.1:9", **options)))


def test_a_server_that_refuses_the_first_request(fake):
    fake.warmed = True
    with pytest.raises(ValueError, match="model 'gpt-9': HTTP 404"):
        load(fake, 404, model="gpt-9")
    assert len(fake.bodies) == 1


def test_first_model(fake):
    async def ask():
        async with httpx.AsyncClient(base_url=fake.url) as client:
            return await first_model(client)

    assert asyncio.run(ask()) == "first"


# Many of them


def test_a_closed_loop_never_has_more_open_than_it_may(fake):
    report = load(fake, good(3, delay=0.005), num_prompts=12, max_concurrency=3)
    assert len(report.completed) == 12 and fake.most_open == 3


def test_an_open_loop_does_not_wait_for_answers(fake):
    report = load(fake, [text(), 0.4, *good(1)], num_prompts=8, request_rate=200)
    assert len(report.completed) == 8 and fake.most_open == 8
    due = [o.due_s - report.outcomes[0].due_s for o in report.outcomes]
    assert due == pytest.approx(arrival_times(report.args))


def test_waiting_for_a_place_counts_as_latency(fake):
    report = load(fake, good(1, delay=0.1), num_prompts=4, request_rate=1000, max_concurrency=1)
    ttfts = [o.ttft_s for o in report.outcomes]
    assert ttfts == sorted(ttfts) and ttfts[-1] >= 0.39  # four times the service, and not once
    closed = load(fake, good(1, delay=0.1), num_prompts=4, max_concurrency=1)
    assert (
        len(closed.completed) == 4
        and closed.outcomes[-1].due_s > closed.outcomes[0].due_s + 0.29
    )


def test_a_late_client_counts_its_own_lateness(fake):
    def block(outcome):
        time.sleep(0.3)

    report = load(fake, good(1), on_done=block, num_prompts=2, request_rate=20)
    assert (
        report.outcomes[1].ttft_s > 0.2
    )  # due after 50 ms, sent when the client was free again


def test_cancellation(fake):
    report = load(
        fake, good(20, delay=0.02), num_prompts=8, random_output_len=12, cancel_ratio=1.0
    )
    jobs = make_jobs(report.args)
    assert all(o.cancelled and o.error is None for o in report.outcomes)
    assert (
        [len(o.times_s) for o in report.outcomes]
        == [o.output_tokens for o in report.outcomes]
        == [j.cancel_after for j in jobs]
    )
    found = report.to_dict()
    assert (
        found["cancelled"] == 8
        and found["completed"] == found["failed"] == 0
        and found["median_ttft_ms"] is None
    )
    deadline = time.monotonic() + 10
    while fake.hung_up < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fake.hung_up == 8 and fake.open == 0


def test_who_would_hang_up_later_than_the_end_completes(fake):
    report = load(fake, good(1), num_prompts=8, random_output_len=50, cancel_ratio=1.0)
    assert {o.cancelled for o in report.outcomes} == {
        job.cancel_after == 1 for job in make_jobs(report.args)
    }


def test_everybody_is_told_of(fake):
    seen, calls = [], iter([good(2), 503, good(2), [text()]])
    report = load(fake, lambda body: next(calls), seen.append, num_prompts=4)
    assert sorted(map(id, seen)) == sorted(map(id, report.outcomes)) and report.duration_s > 0


def test_cancelling_the_load_closes_its_connections(fake):
    async def run():
        fake.script = [text(), 30.0]
        task = asyncio.create_task(run_load(LoadArgs(fake.url, num_prompts=5)))
        while fake.open < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(run(), 20))
    deadline = time.monotonic() + 10
    while fake.open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fake.hung_up == 5


# The report


def outcome(times_s, output_tokens=None, **more):
    return Outcome(
        0.0,
        list(times_s),
        prompt_tokens=10,
        output_tokens=len(times_s) if output_tokens is None else output_tokens,
        **more,
    )


OUTCOMES = [
    outcome([0.1, 0.2, 0.4]),
    outcome([0.3, 0.5], output_tokens=5),
    outcome([0.2]),
    outcome([0.1, 9.0], cancelled=True),
    outcome([], error="HTTP 503"),
    outcome([], error="HTTP 503"),
    outcome([0.1], error="stream cut off"),
]


def test_the_arithmetic_of_the_report():
    found = Report(LoadArgs(request_rate=4), 2.0, OUTCOMES).to_dict()
    assert (found["completed"], found["cancelled"], found["failed"], found["num_prompts"]) == (
        3,
        1,
        3,
        7,
    )
    assert (
        found["errors"] == {"HTTP 503": 2, "stream cut off": 1} and found["request_rate"] == 4
    )
    assert found["request_throughput"] == found["request_goodput"] == 1.5
    assert (
        found["total_input_tokens"] == 30
        and found["output_throughput"] == found["total_output_tokens"] / 2
    )
    assert found["total_token_throughput"] == (30 + found["total_output_tokens"]) / 2
    near = pytest.approx
    assert (found["mean_ttft_ms"], found["median_ttft_ms"]) == (near(200), near(200)) and found[
        "p90_ttft_ms"
    ] == near(280)
    assert found["mean_itl_ms"] == near((100 + 200 + 200) / 3) and found[
        "median_e2el_ms"
    ] == near(400)
    assert found["mean_tpot_ms"] == near((150 + 50) / 2)  # the single token has none


@pytest.mark.parametrize(
    "slo, good",
    [
        ({}, 3),
        ({"slo_ttft_ms": 250}, 2),
        ({"slo_ttft_ms": 50}, 0),
        ({"slo_tpot_ms": 100}, 2),
        ({"slo_e2el_ms": 300}, 1),
        ({"slo_ttft_ms": 250, "slo_tpot_ms": 100}, 1),
        ({"slo_ttft_ms": 250, "slo_tpot_ms": 100, "slo_e2el_ms": 150}, 0),
    ],
)
def test_goodput_needs_every_promise(slo, good):
    assert Report(LoadArgs(**slo), 2.0, OUTCOMES).to_dict()["request_goodput"] == good / 2


@pytest.mark.parametrize("outcomes", [OUTCOMES, OUTCOMES[4:], OUTCOMES[2:3], OUTCOMES[3:4]])
def test_json_and_table_of_any_report(outcomes):
    from rich.console import Console

    report = Report(LoadArgs(slo_ttft_ms=250), 2.0, outcomes)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["request_rate"] is None  # JSON has no infinity
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(table(report))
    text = console.export_text()
    assert "Time to first token, p99 (ms)" in text and "within TTFT 250" in text
    assert all(kind in text for kind in found["errors"])


def test_plot_of_a_sweep():
    import matplotlib

    matplotlib.use("Agg")
    panels = plot_sweep(
        [
            Report(LoadArgs(request_rate=rate), 2.0, outcomes)
            for rate, outcomes in ((1, OUTCOMES), (2, OUTCOMES[4:]), (4, OUTCOMES))
        ]
    )
    assert [ax.get_ylabel() for ax in panels] == ["TTFT (ms)", "ITL (ms)"]
    [median] = [line for line in panels[0].lines if line.get_label() == "median"]
    x, y = median.get_data()
    assert (
        list(x) == [1, 2, 4] and y[0] == pytest.approx(200) and math.isnan(y[1])
    )  # where nothing was completed there is a gap
    dots = [list(line.get_ydata()) for line in panels[0].lines if line.get_marker() == "."]
    assert dots[0] == pytest.approx([100, 300, 200])
    matplotlib.pyplot.close(panels[0].figure)


@pytest.mark.parametrize("num, labels", [(99, {"median"}), (100, {"median", "p99"})])
def test_the_p99_of_few_is_not_drawn(num, labels):
    import matplotlib

    matplotlib.use("Agg")
    many = [outcome([i / 100, i / 100 + 0.1]) for i in range(1, num + 1)]
    panels = plot_sweep([Report(LoadArgs(request_rate=rate), 2.0, many) for rate in (1, 2)])
    for ax in panels:
        assert {line.get_label() for line in ax.lines if line.get_label()[0] != "_"} == labels
    if num == 100:
        [p99] = [line for line in panels[0].lines if line.get_label() == "p99"]
        assert p99.get_ydata()[0] == pytest.approx(990.1)
    matplotlib.pyplot.close(panels[0].figure)


# Against the real one


def test_a_sweep_against_our_own_server():
    from server_fixtures import running

    with running() as server:
        for rate in (math.inf, 100, 300):
            args = LoadArgs(
                server.url,
                num_prompts=10,
                request_rate=rate,
                random_input_len=6,
                random_output_len=12,
                random_range_ratio=0.5,
                random_prefix_len=10,
                num_prefixes=2,
                cancel_ratio=0.3,
                endpoint="chat" if rate == 100 else "completions",
            )
            report = asyncio.run(run_load(args))
            found = report.to_dict()
            assert not found["errors"] and found["completed"] + found["cancelled"] == 10
            assert all(
                o.output_tokens == job.max_tokens
                for o, job in zip(report.outcomes, make_jobs(args))
                if not o.cancelled
            )
        server.settled()
