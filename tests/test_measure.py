"Timing identities, percentiles, the stopwatch's bookkeeping and the plotting style."

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanollm import measure
from nanollm.measure import (
    MachineCard,
    RequestTiming,
    Stopwatch,
    cache_dir,
    engine_map,
    interleave,
    machine_card,
    percentile,
    roofline_s,
    summarize,
    timed,
)

gaps = st.lists(st.floats(0, 10), min_size=1, max_size=50)


@given(gaps)
def test_timing_identities(gaps):
    timing = RequestTiming(tuple(np.cumsum(gaps)))
    assert len(timing.itl_s) == timing.num_tokens - 1
    assert sum(timing.itl_s) == pytest.approx(timing.e2e_s - timing.ttft_s, abs=1e-9)
    if timing.num_tokens > 1:
        after_first = (timing.num_tokens - 1) * timing.tpot_s
        assert timing.ttft_s + after_first == pytest.approx(timing.e2e_s)
    else:
        assert math.isnan(timing.tpot_s)


@pytest.mark.parametrize("times", [(), (-0.1, 0.2), (0.3, 0.2), (math.nan,), (0.1, math.nan)])
def test_timing_refuses_impossible_times(times):
    with pytest.raises(ValueError, match="token_times_s"):
        RequestTiming(times)


def test_a_machine_has_a_name(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert re.search(r"\S+ CPU \(\w+\), 1 thread$", measure.device_name())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert measure.device_name().endswith("2 threads")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert measure.device_name("cuda") == "NVIDIA H100"


def test_a_result_is_printed_with_its_machine(capsys):
    measure.measured("a step of one row", "12.4 ms (5 runs)")
    measure.measured("tokens computed", "368", device=None)
    assert capsys.readouterr().out == (
        f"measured: a step of one row\n    12.4 ms (5 runs); {measure.device_name()}\n"
        "measured: tokens computed\n    368; counted\n")


@given(gaps, st.floats(0, 100))
def test_percentile_is_numpys(values, q):
    assert percentile(values, q) == np.percentile(values, q)


def test_summary_of_one_value_and_of_none():
    assert summarize([2.0]) == measure.Summary(1, 2.0, 2.0, 2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="no values"):
        summarize([])


def test_stopwatch_reads_the_clock_after_the_device(monkeypatch):
    now, synced = [10.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def finish_work(device):
        synced.append(device)
        now[0] += 0.5

    monkeypatch.setattr(measure, "sync", finish_work)
    watch = Stopwatch("cpu")
    assert watch.mark() == 0.5
    assert watch.mark() == 1.0
    assert watch.marks_s == [0.5, 1.0]
    assert watch.start().marks_s == []
    assert synced == ["cpu"] * 4


def test_timed_pulls_lazily_and_keeps_the_order():
    pulled = []

    def tokens():
        for token in (7, 8, 9):
            pulled.append(token)
            yield token

    ids, timing = timed(tokens())
    assert ids == pulled == [7, 8, 9]
    assert timing.num_tokens == 3


def test_timed_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        timed([])


def test_interleave_takes_turns_and_drops_the_warmup():
    calls = []
    cases = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    results = interleave(cases, runs=2, warmup=1)
    assert calls == list("ababab")
    assert results == {"a": [3, 5], "b": [4, 6]}


def test_line_draws_band_only_for_summaries():
    import matplotlib

    matplotlib.use("Agg")
    fig, ax = measure.axes("x (s)", "y (s)", xscale="log")
    measure.line(ax, [1, 2], [summarize([1, 2]), summarize([2, 3])], "measured")
    measure.line(ax, [1, 2], [1.0, 2.0], "theory", "limit")
    assert len(ax.collections) == 1 and len(ax.lines) == 2
    assert [text.get_text() for text in ax.texts] == ["measured", "theory"]
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "x (s)"
    _, panels = measure.axes("x", "y", ncols=2)
    assert len(panels) == 2


def test_a_figure_is_the_same_svg_every_time():
    import io

    import matplotlib

    matplotlib.use("Agg")
    made = []
    for _ in range(2):
        fig, ax = measure.axes("x (s)", "y (s)")
        measure.line(ax, [1, 2], [1.0, 2.0], "a line")
        file = io.StringIO()
        fig.savefig(file, format="svg", metadata={"Date": None})
        made.append(file.getvalue())
    assert made[0] == made[1] and "a line" in made[0], "text is kept as text"


# the machine card

def test_cache_dir(monkeypatch):
    monkeypatch.setenv("NANOLLM_CACHE", "/a")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("NANOLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/b/nanollm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/c/.cache/nanollm")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    "What has been measured, in a cache of our own."
    calls, rates = [], {"bytes": 2e10, "float32": 1e11, "bfloat16": 3e11}

    def measure_rate(device, work, threads):
        calls.append(work)
        return rates[work]

    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "_measure_rate", measure_rate)
    return calls


def test_a_machine_is_measured_once(measured):
    card = machine_card()
    threads = torch.get_num_threads()
    name = measure.device_name()
    assert card == MachineCard(name, "cpu", "float32", threads, 2e10, 1e11)
    assert machine_card("cpu") == card and measured == ["bytes", "float32"]
    assert machine_card(dtype=torch.bfloat16).flops_per_s == 3e11
    assert measured == ["bytes", "float32", "bfloat16"], "one bandwidth for all dtypes"
    assert [path.name for path in cache_dir().iterdir()] == ["machine.json"]


def test_other_threads_are_another_machine(measured, monkeypatch):
    machine_card()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    assert machine_card().threads == 63 and len(measured) == 4
    monkeypatch.undo()


@pytest.mark.parametrize("content", [
    "", "{", "[]", "7", "null", '{"a": "b"}', '{"a": null}', b"\xff\xfe",
    "NAME", '{"NAME": {}}',
])
def test_a_broken_card_is_measured_again(measured, content):
    path = cache_dir() / "machine.json"
    path.parent.mkdir()
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content.replace(b"NAME", measure.device_name().encode()))
    assert machine_card().bytes_per_s == 2e10
    assert machine_card().flops_per_s == 1e11 and measured == ["bytes", "float32"]


@pytest.mark.parametrize("rate", [0, -1.0, math.nan])
def test_an_impossible_rate_is_measured_again(measured, rate):
    machine_card()
    path = cache_dir() / "machine.json"
    rates = json.loads(path.read_text())
    path.write_text(json.dumps(dict.fromkeys(rates, rate) | {"another machine": 5.0}))
    assert machine_card().bytes_per_s == 2e10
    assert json.loads(path.read_text())["another machine"] == 5.0


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(measured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "file"))
    assert machine_card().bytes_per_s == machine_card().bytes_per_s == 2e10


def test_real_rates_are_positive():
    assert measure._measure_rate("cpu", "bytes", 0) > 1e8
    assert measure._measure_rate("cpu", "float32", 0) > 1e8


def test_work_is_short_of_bytes_or_of_arithmetic():
    card = MachineCard("m", "cpu", "float32", 2, bytes_per_s=1e9, flops_per_s=1e10)
    assert roofline_s(card, flops=1e9, num_bytes=2e9) == 2.0
    assert roofline_s(card, flops=1e11, num_bytes=2e9) == 10.0


def test_roofline_puts_points_where_they_belong():
    import matplotlib

    matplotlib.use("Agg")
    card = MachineCard("m", "cpu", "float32", 2, bytes_per_s=1e9, flops_per_s=1e10)
    _, ax = measure.axes("x", "y", xscale="log", yscale="log")
    measure.roofline(ax, card, {"work": (1e9, 2e9, 4.0)})
    roof, point = ax.lines
    assert point.get_xydata().tolist() == [[0.5, 0.25]]
    assert roof.get_xydata()[1].tolist() == [10.0, 10.0]
    assert {"work", "10 GFLOP/s"} < {text.get_text() for text in ax.texts}


# the map

CHAPTERS = """
measure model transformer text generate kv_cache sampling
static_batching request trace scheduler block_manager paged_attention engine prefix_cache
chunked_prefill metrics
structured_output speculative lora quantization kernels tensor_parallel
llm benchmark async_engine chat protocol server responses page load_test cli replicas
""".split()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_chapter_has_its_place_on_the_map(chapter):
    drawing = engine_map(chapter)
    assert drawing._repr_svg_() == drawing and len(drawing) < 6000
    root = ElementTree.fromstring(drawing)
    blue = [e for e in root.iter() if "#004C97" in e.attrib.values()]
    assert blue, "nothing is blue"
    assert not re.search(r"0x[0-9a-f]+", repr(drawing))


def test_the_map_refuses_what_it_does_not_show():
    for name in ("protocl", "", "clients"):
        with pytest.raises(ValueError, match=f"no part '{name}'.*kv_cache"):
            engine_map(name)
