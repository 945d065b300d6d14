"The benchmark's fields, its comparison, and its command."

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GenerationConfig

from nanollm import benchmark
from nanollm.benchmark import (
    batch_run,
    compare,
    main,
    run_benchmark,
    summarize_runs,
    transformers_run,
)
from nanollm.generate import generate
from nanollm.measure import RequestTiming
from nanollm.model import load_model

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--model",
    "tiny-llama",
    "--load-format",
    "dummy",
    "--device",
    "cpu",
    "--dtype",
    "float32",
]


@pytest.fixture(scope="module")
def model():
    return load_model(
        "tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False
    )


def run(capsys, *flags):
    "The command's JSON, which is the last line of stdout."
    main([*TINY, *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)


def test_every_case_makes_the_oracles_tokens(model):
    prompt, other = [5, 6, 7], [8, 9]
    oracle = list(generate(model, prompt, 9))
    assert transformers_run(model, prompt, 9)[0] == oracle
    rows, timings = batch_run(model, [prompt, other], 9)
    assert rows == [oracle, list(generate(model, other, 9))]
    assert [timing.num_tokens for timing in timings] == [9, 9]


def test_transformers_runs_without_the_checkpoints_own_settings(model):
    tokens = list(generate(model, [5, 6, 7], 12))
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(eos_token_id=tokens[3], repetition_penalty=1.8),
    )
    try:
        assert transformers_run(model, [5, 6, 7], 12)[0] == tokens
        assert model.generation_config.repetition_penalty == 1.8
    finally:
        model.generation_config = own


def test_a_wrong_batch_is_seen(model, monkeypatch):
    right = benchmark.generate_batch
    wrong = lambda *args: ([step[0], 0] for step in right(*args))  # noqa: E731 (the second row only)
    monkeypatch.setattr(benchmark, "generate_batch", wrong)
    report = run_benchmark(model, [[5, 6, 7], [8, 9]], 6, runs=1, batch_size=2)
    assert report["comparison"]["same_tokens"] and not report["static_batch"]["same_tokens"]


def test_fields_of_a_single_request(capsys):
    report = run(capsys, "--runs", "2", "--warmup", "1", "--max-new-tokens", "4")
    assert {
        "model",
        "device",
        "dtype",
        "torch_threads",
        "prompt_tokens",
        "max_new_tokens",
        "runs",
    } <= report.keys()
    for case in ("kv_cache_decode", "naive_full_sequence"):
        assert report[case]["mean_ttft_seconds"] > 0 and report[case]["mean_tpot_seconds"] > 0
        assert len(report[case]["elapsed_seconds"]) == 2
    assert report["comparison"]["elapsed_speedup"] == pytest.approx(
        report["naive_full_sequence"]["mean_elapsed_seconds"]
        / report["kv_cache_decode"]["mean_elapsed_seconds"]
    )
    assert (
        report["comparison"]["tpot_speedup"] > 0 and report["comparison"]["same_tokens"] is True
    )
    assert "static_batch" not in report and "transformers_generate" not in report


def test_fields_of_a_batch(capsys):
    report = run(
        capsys,
        "--batch-size",
        "4",
        "--runs",
        "1",
        "--warmup",
        "0",
        "--max-new-tokens",
        "3",
        "--skip-naive-baseline",
        "--with-transformers",
    )
    batch = report["static_batch"]
    assert batch["batch_size"] == 4
    assert batch["mean_batch_elapsed_seconds"] > 0 and batch["mean_row_tokens_per_second"] > 0
    continuous = report["continuous_batch"]
    assert (
        continuous["active_batch_sizes"] == [4, 4, 4]
        and continuous["mean_active_batch_size"] == 4
    )
    assert continuous["speedup_over_static"] > 0 and continuous["same_tokens"] is True
    assert "naive_full_sequence" not in report and "comparison" not in report
    assert report["comparison_transformers"]["same_tokens"] is True


def test_rows_of_a_ragged_batch_leave_one_after_the_other(capsys):
    report = run(
        capsys,
        "--batch-size",
        "4",
        "--ragged",
        "--runs",
        "1",
        "--warmup",
        "0",
        "--max-new-tokens",
        "16",
        "--skip-naive-baseline",
    )
    assert (
        report["continuous_batch"]["active_batch_sizes"]
        == [4] * 7 + [3] * 3 + [2] * 3 + [1] * 3
    )
    assert report["continuous_batch"]["mean_active_batch_size"] == 46 / 16
    assert report["static_batch"]["same_tokens"] and report["continuous_batch"]["same_tokens"]


def test_a_wrong_engine_is_seen(model, monkeypatch):
    right = benchmark.continuous_run
    monkeypatch.setattr(benchmark, "continuous_run", lambda *args: ([[0]], *right(*args)[1:]))
    report = run_benchmark(model, [[5, 6, 7], [8, 9]], 6, runs=1, batch_size=2)
    assert (
        report["static_batch"]["same_tokens"] and not report["continuous_batch"]["same_tokens"]
    )


def test_one_token_has_no_tpot(capsys):
    report = run(capsys, "--runs", "1", "--warmup", "0", "--max-new-tokens", "1")
    assert report["kv_cache_decode"]["mean_tpot_seconds"] is None
    assert "tpot_speedup" not in report["comparison"]


def test_prompts_are_cut_and_repeated(capsys):
    for length in (1, 100):
        report = run(
            capsys,
            "--runs",
            "1",
            "--warmup",
            "0",
            "--max-new-tokens",
            "2",
            "--prompt-tokens",
            str(length),
        )
        assert report["prompt_tokens"] == length


def test_compare_sees_wrong_tokens_in_any_run():
    def timing(t):
        return RequestTiming((t, 3 * t))

    good, bad = ([1, 2], timing(0.1)), ([1, 3], timing(0.1))
    assert compare([good, good], [([1, 2], timing(0.4))])["tpot_speedup"] == pytest.approx(4)
    assert not compare([good, bad], [good])["same_tokens"]
    assert not compare([good], [good, bad])["same_tokens"]


def test_means_are_means():
    runs = summarize_runs([RequestTiming((1.0, 2.0)), RequestTiming((3.0, 7.0))])
    assert (
        runs["mean_ttft_seconds"],
        runs["mean_tpot_seconds"],
        runs["mean_elapsed_seconds"],
    ) == (2.0, 2.5, 4.5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--runs", "0"], "runs must be at least 1, got 0"),
        (["--warmup", "-1"], "warmup must be at least 0, got -1"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be from 1 to"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--max-new-tokens", "5000"], "exceed the context of 2048"),
        (["--prompt-tokens", "0"], "prompt is empty"),
        (["--prompt", ""], "prompt is empty"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main([*TINY, *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_choice_of_baseline_is_refused(model):
    with pytest.raises(ValueError, match="context"):
        run_benchmark(model, [[1] * 2040], max_new_tokens=20, runs=1)


def test_the_script_is_the_command():
    script = str(ROOT / "benchmarks/benchmark_generate.py")
    command = [sys.executable, script, *TINY, "--runs", "1", "--max-new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["comparison"]["same_tokens"]
