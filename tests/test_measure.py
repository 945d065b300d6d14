"Timing identities, percentiles, the stopwatch's bookkeeping and the plotting style."

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanollm import measure
from nanollm.measure import SLO, RequestTiming, Stopwatch, interleave, percentile, summarize, timed

gaps = st.lists(st.floats(0, 10), min_size=1, max_size=50)


@given(gaps)
def test_timing_identities(gaps):
    timing = RequestTiming(tuple(np.cumsum(gaps)))
    assert len(timing.itl_s) == timing.num_tokens - 1
    assert sum(timing.itl_s) == pytest.approx(timing.e2e_s - timing.ttft_s, abs=1e-9)
    if timing.num_tokens > 1:
        assert timing.ttft_s + (timing.num_tokens - 1) * timing.tpot_s == pytest.approx(timing.e2e_s)
    else:
        assert math.isnan(timing.tpot_s)


@pytest.mark.parametrize("times", [(), (-0.1, 0.2), (0.3, 0.2), (math.nan,), (0.1, math.nan)])
def test_timing_refuses_impossible_times(times):
    with pytest.raises(ValueError, match="token_times_s"):
        RequestTiming(times)


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


def test_goodput_counts_kept_promises_only():
    timings = [RequestTiming((0.1, 0.2)), RequestTiming((2.0, 2.1)), RequestTiming((0.1, 1.5)), RequestTiming((0.1,))]
    assert measure.goodput(timings, 2.0, SLO(ttft_s=0.5, tpot_s=0.3)) == 1.0
    assert measure.goodput(timings, 2.0, SLO()) == 2.0
    assert measure.throughput(timings, 2.0) == 3.5


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
