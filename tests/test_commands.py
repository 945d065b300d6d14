"""`nanollm-serve` and `nanollm-bench`: names, addresses, exit codes."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from server_fixtures import running

from nanollm.serve import cli
from nanollm.serve.cli import (
    DEFAULT_NAMES,
    bench_main,
    load_args,
    model_names,
    serve_main,
)
from nanollm.serve.commands import (
    BenchOptions,
    LoadArgs,
    ServeOptions,
    UsageError,
    bind,
    check_certificate,
)

TINY = ("tiny-llama", "--load-format", "dummy", "--dtype", "float32", "--num-kv-blocks", "256")
SERVE = [sys.executable, "-c", "from nanollm.serve.cli import serve_main; serve_main()"]


def exit_of(main, *words):
    with pytest.raises(SystemExit) as done:
        main(list(words))
    return done.value.code


@pytest.fixture
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(cli, "load", lambda *args: pytest.fail("a model was loaded"))


@pytest.fixture(autouse=True)
def signals_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# Names


def test_names_of_models(tmp_path):
    assert model_names(ServeOptions()) == DEFAULT_NAMES == (
        "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert model_names(ServeOptions(model="org/name")) == ("org/name", "name")
    assert model_names(ServeOptions(model="name")) == ("name",)
    assert model_names(ServeOptions(model=f"{tmp_path}/")) == (tmp_path.name,), "no paths"
    (tmp_path / "model.gguf").touch()
    assert model_names(ServeOptions(model=f"{tmp_path}/model.gguf")) == ("model.gguf",)
    given = ServeOptions(model="org/name", served_model_names=["a", "b"])
    assert model_names(given) == ("a", "b")


# Addresses


def close(sockets):
    for sock in sockets:
        sock.close()


def test_a_bound_address_is_taken_at_once():
    [first] = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    try:
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}: Address"):
            bind("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass # it listens, and not only after a model is loaded
    finally:
        first.close()
    close(bind("127.0.0.1", port))


def both_families(host, port, **options):
    "What a resolver says of localhost on most machines; one address is listed twice."
    v6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
    v4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
    return [v6, v4, v4]


def test_a_name_with_two_addresses_has_two_sockets_and_one_port(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", both_families)
    sockets = bind("localhost", 0)
    assert {sock.family for sock in sockets} == {socket.AF_INET6, socket.AF_INET}
    [port] = {sock.getsockname()[1] for sock in sockets}
    sockets.pop(0).close()
    with pytest.raises(UsageError, match=f"localhost:{port}: .*in use"):
        bind("localhost", port) # half of it is taken
    close(sockets)
    close(bind("localhost", port)) # nothing is left of the failed one


def test_an_address_that_the_machine_lacks_is_passed_over(monkeypatch):
    def create(address, family, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return real(address, family=family, **options)

    real = socket.create_server
    monkeypatch.setattr(socket, "getaddrinfo", both_families)
    monkeypatch.setattr(socket, "create_server", create)
    sockets = bind("localhost", 0)
    assert [sock.family for sock in sockets] == [socket.AF_INET]
    close(sockets)


@pytest.mark.parametrize("host, message", [
    ("no.such.host.invalid", "no.such.host.invalid:80: "),
    ("192.0.2.1", "192.0.2.1:80: Cannot assign"),
])
def test_an_address_that_is_none(host, message):
    with pytest.raises(UsageError, match=f"cannot listen on {message}"):
        bind(host, 80)


def test_unix_sockets(tmp_path):
    path = str(tmp_path / "server.sock")
    [alive] = bind("", 0, path)
    with pytest.raises(UsageError, match=f"cannot listen on {path}: .*in use"):
        bind("", 0, path)
    alive.close() # as a killed server does, and leaves the file
    close(bind("", 0, path))
    file = tmp_path / "letter.txt"
    file.write_text("Dear")
    with pytest.raises(UsageError, match=f"cannot listen on {file}"):
        bind("", 0, str(file))
    assert file.read_text() == "Dear"
    with pytest.raises(UsageError, match="/no/such/folder/x"):
        bind("", 0, "/no/such/folder/x")


def test_address_in_use_is_found_before_the_model_is_loaded(capsys, nothing_loaded):
    [taken] = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    assert exit_of(serve_main, "--port", str(port)) == 2
    taken.close()
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


# Mistakes


@pytest.mark.parametrize("words, message", [
    (("--port", "70000"), "--port must be a whole number from 0 to 65535, got 70000"),
    (("--shutdown-timeout", "-1"), "--shutdown-timeout must be a number of at least 0"),
    (("--scheduling-policy", "lottery"), "--scheduling-policy must be fcfs or priority"),
    (("--max-num-seqs", "0"), "--max-num-seqs must be a whole number of at least 1, got 0"),
    (("--max-model-len", "4x"), "--max-model-len must be a number as in 4096, 4k or 4GiB"),
    (("--kv-cache-memory", "lots"), "--kv-cache-memory must be a number"),
    (("a", "--model", "b"), "--model is given twice: a and b"),
    (("--ssl-certfile", "/no/cert.pem", "--port", "0"), "/no/cert.pem"),
    (("--ssl-keyfile", "/no/key.pem", "--port", "0"), "/no/key.pem"),
    (("--load-format", "dummy", "--model", "no-such-shape", "--port", "0"), "no-such-shape"),
    (("--model", "/no/such/model", "--port", "0"), "/no/such/model"),
    (("--model", "/no/such/model", "--port", "0", "--speculative-config",
      '{"method": "ngram"}'),
     "speculative_config: num_speculative_tokens"),
    (("--speculative-config", "[]"), "--speculative-config must be an object in JSON, got []"),
    (("--max-loras", "0"), "--max-loras must be a whole number from 1 to 256, got 0"),
    (("--lora-modules", "a=."), "--lora-modules needs --enable-lora"),
    (("--enable-lora", "--lora-dir", "/no"), "--lora-dir needs --enable-lora and a directory"),
])
def test_bad_options_of_serve(capsys, nothing_loaded, words, message):
    logging.disable(logging.CRITICAL)
    try:
        assert exit_of(serve_main, *words) == 2
    finally:
        logging.disable(logging.NOTSET)
    err = capsys.readouterr().err
    assert err.startswith("nanollm-serve: error: ") and err.count("\n") == 1
    assert message in err


def test_a_file_that_is_no_certificate(tmp_path):
    file = tmp_path / "cert.pem"
    file.write_text("no certificate")
    with pytest.raises(UsageError, match="--ssl-certfile .*cert.pem with --ssl-keyfile None"):
        check_certificate(str(file), None)
    check_certificate(None, None)


@pytest.mark.parametrize("words, message", [
    (("--goodput", "x:1"), "ttft:MS"),
    (("--goodput", "ttft:fast"), "ttft:fast"),
    (("--num-prompts", "0"), "--num-prompts must be a whole number from 1"),
    (("--cancel-ratio", "2"), "--cancel-ratio must be a number from 0 to 1"),
    (("--request-rate", "-1"), "--request-rate"),
    (("--base-url", "http://127.0.0.1:9", "--quiet"), "127.0.0.1:9"),
])
def test_bad_options_of_bench(capsys, words, message):
    assert exit_of(bench_main, "serve", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("nanollm-bench: error: ") and message in err


def test_bench_measures_a_server_only(capsys):
    assert exit_of(bench_main, "throughput") == 2
    assert "COMMAND must be serve, got 'throughput'" in capsys.readouterr().err
    assert load_args(BenchOptions()) == [LoadArgs()]


@pytest.mark.parametrize("main, program, words", [
    (serve_main, "nanollm-serve", []), (bench_main, "nanollm-bench", ["serve"]),
    (bench_main, "nanollm-bench", []),
])
def test_help_and_version(capsys, monkeypatch, nothing_loaded, main, program, words):
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_of(main, *words, "--help") == exit_of(main, *words, "--version") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {program}") and out.splitlines()[-1].startswith(program)
    assert "examples:" in out and "Exit codes: 0" in out
    assert max(map(len, out.splitlines())) <= 80


# Loads


def test_bench_measures_a_server(capsys, tmp_path):
    with running() as server:
        words = ["serve", "--base-url", server.url, "--num-prompts", "6",
                 "--random-input-len", "4", "--random-output-len", "5", "--quiet"]
        plot = tmp_path / "knee.png"
        more = ["--request-rate", "50", "--request-rate", "200", "--json", "--plot", str(plot)]
        assert exit_of(bench_main, *words, *more) == 0
        first, second = map(json.loads, capsys.readouterr().out.splitlines())
        assert (first["completed"], first["total_output_tokens"]) == (6, 30)
        assert (first["request_rate"], second["request_rate"]) == (50, 200)
        assert plot.stat().st_size > 1000
        assert exit_of(bench_main, *words, "--endpoint", "chat") == 0
        assert "Time to first token" in capsys.readouterr().out
        server.settled()


LIGHT = """
import sys
from nanollm.serve.cli import bench_main, serve_main
try:
    (serve_main if sys.argv[1] == "serve-help" else bench_main)(sys.argv[2:])
finally:
    print(sorted({"torch", "transformers", "matplotlib"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["serve-help", "bench"])
def test_help_and_loads_need_no_torch(kind):
    with running() as server:
        words = ["--help"] if kind == "serve-help" else [
            "serve", "--base-url", server.url, "--num-prompts", "3", "--quiet"]
        done = subprocess.run([sys.executable, "-c", LIGHT, kind, *words], capture_output=True,
                              text=True)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]"
    assert ("--served-model-name" if kind == "serve-help" else "Requests/s") in done.stdout


def test_a_server_may_leave_no_choice_to_the_model():
    import httpx
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "max_tokens": 2}
    with running(enable_auto_tool_choice=False) as server:
        for more in {}, {"tool_choice": "auto"}:
            refused = httpx.post(f"{server.url}/v1/chat/completions", json=body | more)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "tool_choice"
        taken = httpx.post(f"{server.url}/v1/chat/completions", json=body | {
            "tool_choice": "none"}, timeout=60)
        assert taken.status_code == 200
    with running() as server:
        taken = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert taken.status_code == 200


# Processes


def start(*words, **env):
    return subprocess.Popen([*SERVE, *TINY, *words], stderr=subprocess.PIPE, text=True,
                            env=os.environ | env)


def test_of_two_servers_on_one_port_one_fails_before_it_loads():
    [free] = bind("127.0.0.1", 0)
    port = str(free.getsockname()[1])
    free.close()
    servers = [start("--port", port) for _ in range(2)]
    try:
        while all(server.poll() is None for server in servers):
            time.sleep(0.05)
        servers.sort(key=lambda server: server.poll() is None)
        lost, won = servers
        assert lost.returncode == 2
        [line] = lost.stderr.read().splitlines()  # whether it failed to bind or to listen
        assert line.startswith(
            f"nanollm-serve: error: cannot listen on 127.0.0.1:{port}: Address already in use")
        assert any(f"on http://127.0.0.1:{port} " in line for line in won.stderr)
        won.send_signal(signal.SIGTERM)
        assert won.wait(60) == 0
    finally:
        for server in servers:
            server.kill()
            server.stderr.close()


def test_a_unix_socket_serves_and_is_gone_afterwards(tmp_path):
    import httpx
    path = tmp_path / "server.sock"
    server = start("--uds", str(path))
    try:
        assert any("serving tiny-llama" in line for line in server.stderr)
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost") as client:
            assert client.get("/health").status_code == 200
            body = {"prompt": "Hi", "max_tokens": 3, "ignore_eos": True}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["usage"]["completion_tokens"] == 3
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0 and not path.exists()
    finally:
        server.kill()
        server.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_children_that_try_grammars_end_with_the_server(number):
    import httpx
    import psutil
    server = start("--port", "0", "--max-model-len", "512")
    try:
        url = next(found[1] for line in server.stderr
                   if (found := re.search(r"on (http://\S+) ", line)))
        body = {"prompt": "Hi", "max_tokens": 20, "structured_outputs": {"regex": "[ab]{4}"}}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert re.fullmatch("[ab]{4}", answer["choices"][0]["text"])
        children = psutil.Process(server.pid).children()
        assert children
        server.send_signal(number)
        assert server.wait(60) == (0 if number == signal.SIGTERM else -number)
        assert psutil.wait_procs(children, timeout=30)[1] == []
    finally:
        server.kill()
        server.stderr.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_certificate_is_used(tmp_path):
    import httpx
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-keyout", key, "-out", cert], check=True,
                   capture_output=True)
    check_certificate(str(cert), str(key))
    with pytest.raises(UsageError, match="is no certificate"):
        check_certificate(str(cert), None) # the key is missing
    server = start("--port", "0", "--ssl-certfile", str(cert), "--ssl-keyfile", str(key))
    try:
        found = next(re.search(r"on (https?)://127.0.0.1:(\d+)", line)
                     for line in server.stderr if "serving" in line)
        answer = httpx.get(f"https://127.0.0.1:{found[2]}/health", verify=False)
        assert answer.status_code == 200 and found[1] == "https"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_in_the_middle_of_a_conversion_leaves_nothing_behind(tmp_path, number):
    code = """
import sys, time
from pathlib import Path
from nanollm import model

def slow(gguf, folder):
    (folder / "half.safetensors").write_bytes(bytes(1000))
    print("converting", file=sys.stderr, flush=True)
    time.sleep(60)

model._write_converted = slow
from nanollm.serve.cli import serve_main
serve_main(["--port", "0", "--uds", sys.argv[1], "--model", sys.argv[2]])
"""
    gguf, uds = tmp_path / "some.gguf", tmp_path / "uds"
    gguf.write_bytes(b"GGUF")
    server = subprocess.Popen([sys.executable, "-c", code, str(uds), str(gguf)], text=True,
                              stderr=subprocess.PIPE,
                              env=os.environ | {"NANOLLM_CACHE": str(tmp_path / "cache")})
    try:
        assert any(line == "converting\n" for line in server.stderr)
        assert list((tmp_path / "cache").rglob("half.safetensors"))
        server.send_signal(number)
        assert server.wait(30) == 130
        assert not list((tmp_path / "cache").iterdir()) and not uds.exists()
    finally:
        server.kill()
        server.stderr.close()


def test_replicas_have_two_names_and_a_limit():
    assert ServeOptions(data_parallel_size=3).replicas == 3
    assert ServeOptions(replicas=2, max_replicas=4).max_replicas == 4
    assert ServeOptions(replicas=2, data_parallel_size=2).replicas == 2
    with pytest.raises(ValueError, match="replicas is given twice: 3 and 2"):
        ServeOptions(replicas=3, data_parallel_size=2)
    with pytest.raises(ValueError, match="max_replicas must be at least --replicas"):
        ServeOptions(replicas=3, max_replicas=2)


def test_a_load_on_engines_that_are_not_there(capsys):
    words = "simulate --num-prompts 40 --replicas 2 --request-rate 1".split()
    assert exit_of(bench_main, *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completed"] == 40 and found["replicas"] == 2 and found["routing_policy"]
    assert exit_of(bench_main, "simulate", "--replicas", "0") == 2
    assert "--replicas must be a whole number from 1" in capsys.readouterr().err
    assert exit_of(bench_main, "simulate", "--step-time", '{"constant_s": -1}') == 2
    assert exit_of(bench_main, "simulate", "--help") == 0
    assert "for 99 % of the requests" in " ".join(capsys.readouterr().out.split())


def test_a_socket_file_that_is_gone_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    path = tmp_path / "uds"
    options = ServeOptions(model="tiny-llama", load_format="dummy", quiet=True,
                           uds=str(path))
    assert cli.serve(options, run=lambda sockets, options, args: path.unlink() is None) == 0
