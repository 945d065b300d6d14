"""`nanollm-serve` and `nanollm-bench`: options, names, exit codes."""

import json
import logging
import socket
import subprocess
import sys
from dataclasses import fields

import pytest
from server_fixtures import running

from nanollm.args import (
    BenchOptions,
    EngineArgs,
    LoadArgs,
    ServeOptions,
    ServerArgs,
    UsageError,
)
from nanollm.serve.cli import DEFAULT_NAME, bench_main, bind, load_args, model_names, serve_main


def exit_of(main, *words):
    with pytest.raises(SystemExit) as done:
        main(list(words))
    return done.value.code


def test_names_of_models(tmp_path):
    assert model_names(ServeOptions()) == (DEFAULT_NAME,)
    assert model_names(ServeOptions(model="org/name")) == ("org/name",)
    assert model_names(ServeOptions(model=f"{tmp_path}/")) == (tmp_path.name,), (
        "no paths in answers"
    )
    assert model_names(ServeOptions(model="org/name", served_model_name=["a", "b"])) == (
        "a",
        "b",
    )


def test_defaults_of_options_and_settings_agree():
    options, num_shared = ServeOptions(), 0
    for settings in (ServerArgs(("x",)), EngineArgs()):
        for field in fields(settings):
            if hasattr(options, field.name):
                assert getattr(options, field.name) == getattr(settings, field.name), field.name
                num_shared += 1
    assert num_shared == 20 + 18, "of the server, and of model and engine"
    assert load_args(BenchOptions()) == [LoadArgs()]


def test_safe_defaults():
    options = ServeOptions()
    assert options.host == "127.0.0.1" and not options.enable_request_traces


def test_address_in_use_is_found_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(
        "nanollm.serve.cli.load", lambda *args, **options: pytest.fail("a model was loaded")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert exit_of(serve_main, "--port", str(port)) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cannot listen"):
        bind("no.such.host.invalid", 1)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--port", "70000"), "65535"),
        (("--shutdown-timeout", "-1"), "0"),
        (("--scheduling-policy", "lottery"), "fcfs"),
        (("--max-num-seqs", "0"), "1"),
        (
            ("--load-format", "dummy", "--model", "no-such-shape", "--port", "0"),
            "no-such-shape",
        ),
        (("--kv-cache-memory", "lots", "--port", "0"), "lots"),
    ],
)
def test_bad_options_of_serve(capsys, words, message):
    logging.disable(logging.CRITICAL)
    try:
        assert exit_of(serve_main, *words) == 2
    finally:
        logging.disable(logging.NOTSET)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--goodput", "x:1"), "ttft:MS"),
        (("--goodput", "ttft:fast"), "ttft:fast"),
        (("--num-prompts", "0"), "num_prompts"),
        (("--cancel-ratio", "2"), "cancel_ratio"),
        (("--request-rate", "-1"), "request_rate"),
        (("--base-url", "http://127.0.0.1:9", "--quiet"), "127.0.0.1:9"),
    ],
)
def test_bad_options_of_bench(capsys, words, message):
    assert exit_of(bench_main, "serve", *words) == 2
    assert message in capsys.readouterr().err


def test_bench_measures_a_server(capsys, tmp_path):
    with running() as server:
        words = [
            "serve",
            "--base-url",
            server.url,
            "--num-prompts",
            "6",
            "--random-input-len",
            "4",
            "--random-output-len",
            "5",
        ]
        plot = tmp_path / "knee.png"
        more = [
            "--request-rate",
            "50",
            "--request-rate",
            "200",
            "--json",
            "--quiet",
            "--plot",
            str(plot),
        ]
        assert exit_of(bench_main, *words, *more) == 0
        first, second = map(json.loads, capsys.readouterr().out.splitlines())
        assert (
            first["completed"] == 6
            and first["total_output_tokens"] == 30
            and first["request_rate"] == 50
        )
        assert second["request_rate"] == 200 and plot.stat().st_size > 1000
        assert exit_of(bench_main, *words, "--endpoint", "chat", "--quiet") == 0
        assert "Time to first token" in capsys.readouterr().out
        server.settled()


def test_help_is_there_without_torch():
    code = "import sys; from nanollm.serve.cli import serve_main\n"
    code += "try: serve_main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("False") and "--served-model-name" in done.stdout


def test_bench_without_a_command_is_an_error(capsys):
    assert exit_of(bench_main) == 2 and "command" in capsys.readouterr().err.lower()
