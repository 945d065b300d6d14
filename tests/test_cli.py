"""`nanollm-generate`: every flag, its streams, its exit codes, its errors."""

import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from lora_folders import save

import nanollm
from nanollm.args import EngineArgs
from nanollm.chat import encode_chat
from nanollm.generate import generate
from nanollm.model import DTYPES, eos_token_ids, load_model
from nanollm.sampling import SamplingParams
from nanollm.serve import cli
from nanollm.text import byte_tokenizer, encode

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
COMMAND = [sys.executable, "-c", "from nanollm.serve.cli import generate_main; generate_main()"]


class Terminal(io.BytesIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def tiny():
    return load_model(
        "tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False
    )


@pytest.fixture
def command(capsys, monkeypatch):
    "Run a command line in this process; return exit code, stdout and stderr."

    def run(*words, stdin=None):
        raw = (
            Terminal()
            if stdin is None
            else io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode())
        )
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
        with pytest.raises(SystemExit) as end:
            cli.generate_main(list(words))
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def answers(command):
    "Run a command line with --json and return its objects."

    def run(*words, stdin=None):
        code, out, _ = command(*TINY, "--json", "--quiet", *words, stdin=stdin)
        assert code == 0
        assert out.isascii() and out.endswith("\n")
        return [json.loads(line) for line in out.splitlines()]

    return run


def test_tokens_are_those_of_the_oracle(answers, tiny):
    [answer] = answers("--prompt", "Hi", "--temperature", "0", "--max-new-tokens", "12")
    prompt_ids = encode_chat(byte_tokenizer(), [{"role": "user", "content": "Hi"}])
    assert answer["token_ids"] == list(generate(tiny, prompt_ids, 12, eos_token_ids(tiny)))
    assert set(answer) == {
        "prompt",
        "index",
        "text",
        "token_ids",
        "finish_reason",
        "stop_reason",
        "error",
        "logprobs",
        "stats",
    }
    assert (answer["prompt"], answer["index"], answer["logprobs"], answer["stats"]) == (
        "Hi",
        0,
        None,
        None,
    )
    assert answer["error"] is None


def test_raw_and_system_choose_the_prompt(answers, tiny):
    tokenizer = byte_tokenizer()
    system = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    for words, prompt_ids in (
        (["--raw"], encode(tokenizer, "Hi")),
        (["--system", "Be brief"], encode_chat(tokenizer, system)),
    ):
        [answer] = answers(
            "--prompt",
            "Hi",
            "--temperature",
            "0",
            "--max-new-tokens",
            "8",
            "--show-stats",
            *words,
        )
        assert answer["token_ids"] == list(generate(tiny, prompt_ids, 8, eos_token_ids(tiny)))
        assert answer["stats"]["prompt_tokens"] == len(prompt_ids)


def test_streaming_prints_what_no_stream_prints(command):
    words = [*TINY, "--prompt", "Grüße 🙂", "--seed", "3", "--max-new-tokens", "24", "--quiet"]
    streamed, whole = command(*words), command(*words, "--no-stream")
    assert streamed == whole
    assert streamed[0] == 0 and streamed[1].endswith("\n") and streamed[2] == ""


def test_streaming_flushes_every_piece(tiny, monkeypatch):
    pieces = []

    class Out(io.StringIO):
        def flush(self):
            pieces.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Out())
    with pytest.raises(SystemExit):
        cli.generate_main(
            [*TINY, "--prompt", "Hi", "--seed", "3", "--max-new-tokens", "30", "--quiet"]
        )
    assert len(set(pieces)) > 5


def test_seed_repeats_and_answers_differ(answers):
    words = [
        "--prompt",
        "Hi",
        "--n",
        "3",
        "--seed",
        "7",
        "--max-new-tokens",
        "10",
        "--ignore-eos",
    ]
    first, second = answers(*words), answers(*words)
    assert first == second
    assert [answer["index"] for answer in first] == [0, 1, 2]
    assert len({tuple(answer["token_ids"]) for answer in first}) == 3
    assert first != answers(*words[:-1], "--seed", "8")


def test_several_prompts_keep_their_order(answers, command):
    found = answers("--prompt", "A", "--prompt", "B", "--n", "2", "--max-new-tokens", "2")
    assert [(answer["prompt"], answer["index"]) for answer in found] == [
        ("A", 0),
        ("A", 1),
        ("B", 0),
        ("B", 1),
    ]
    code, out, err = command(
        *TINY, "--prompt", "A", "--prompt", "B\nB", "--max-new-tokens", "2", "--no-stream"
    )
    assert code == 0 and "---" not in out
    assert "--- 1 of 2: A\n" in err and "--- 2 of 2: B B\n" in err


def test_prompt_from_stdin(answers):
    assert answers("--max-new-tokens", "1", stdin="Grüße\n")[0]["prompt"] == "Grüße"
    found = answers(
        "--max-new-tokens", "1", "--prompt", "A", "--prompt", "-", stdin="two\nlines\r\n"
    )
    assert [answer["prompt"] for answer in found] == ["A", "two\nlines"]
    assert answers("--max-new-tokens", "1", "--prompt=--raw")[0]["prompt"] == "--raw"


@pytest.mark.parametrize(
    "stdin, words, message",
    [
        (None, [], "there is no prompt: give --prompt"),
        ("", [], "the prompt is empty: give --prompt"),
        ("\n", [], "the prompt is empty"),
        ("x", ["--prompt", ""], "--prompt must not be empty"),
        (b"\xff\xfe", [], "not valid UTF-8"),
        (None, ["--prompt", "\udcff"], "not valid UTF-8"),
        (None, ["--prompt", "-"], "the prompt is empty"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_loaded(
    command, monkeypatch, stdin, words, message
):
    monkeypatch.setattr(cli, "load", lambda options: pytest.fail("loaded a model for nothing"))
    code, out, err = command(*TINY, *words, stdin=stdin)
    assert (code, out) == (2, "")
    assert message in err


def test_closed_stdin(command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="--prompt"):
        cli.read_prompts(None)
    assert cli.read_prompts(["Hi"]) == ["Hi"]


def test_stop_strings(answers, command):
    words = [
        "--prompt",
        "Hi",
        "--temperature",
        "0",
        "--max-new-tokens",
        "30",
        "--ignore-eos",
        "--raw",
    ]
    [plain] = answers(*words)
    assert plain["finish_reason"] == "length" and plain["stop_reason"] is None
    at = next(
        i
        for i in range(3, len(plain["text"]) - 1)
        if plain["text"][i : i + 2] not in plain["text"][: i + 1]
    )
    stop = plain["text"][at : at + 2]
    [stopped] = answers(*words, "--stop", "never said", "--stop", stop)
    assert stopped["text"] == plain["text"][:at]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    assert len(stopped["token_ids"]) < 30
    assert command(*TINY, *words, "--quiet", "--stop", stop)[1] == stopped["text"] + "\n"


def test_stop_tokens_and_eos(answers, tiny):
    words = ["--prompt", "Hi", "--temperature", "0", "--max-new-tokens", "20", "--raw"]
    ids = answers(*words, "--ignore-eos")[0]["token_ids"]
    last = ids[5]
    [stopped] = answers(*words, "--ignore-eos", "--stop-token-id", str(last))
    assert stopped["token_ids"] == ids[: ids.index(last) + 1]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", last)
    assert stopped["text"] == byte_tokenizer().decode(stopped["token_ids"][:-1]), (
        "the stop token is no text"
    )
    [eos] = eos_token_ids(tiny)
    [ended] = answers(*words, "--logit-bias", f"{eos}=100")
    assert (ended["token_ids"], ended["text"]) == ([eos], "")
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", None)
    assert (
        len(answers(*words, "--logit-bias", f"{eos}=100", "--min-tokens", "4")[0]["token_ids"])
        == 5
    )


def test_every_sampling_flag_reaches_the_parameters(command, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "generate_all", lambda llm, jobs: seen.extend(jobs) or 1 / 0)
    flags = {
        "max_tokens": ("--max-new-tokens", "7", 7),
        "temperature": ("--temperature", "0.5", 0.5),
        "top_k": ("--top-k", "3", 3),
        "top_p": ("--top-p", "0.9", 0.9),
        "min_p": ("--min-p", "0.1", 0.1),
        "presence_penalty": ("--presence-penalty", "-0.5", -0.5),
        "frequency_penalty": ("--frequency-penalty", "0.25", 0.25),
        "repetition_penalty": ("--repetition-penalty", "1.5", 1.5),
        "logit_bias": ("--logit-bias", "4=-2", {4: -2.0}),
        "min_tokens": ("--min-tokens", "2", 2),
        "stop": ("--stop", "\n", ("\n",)),
        "stop_token_ids": ("--stop-token-id", "9", (9,)),
        "ignore_eos": ("--ignore-eos", None, True),
        "seed": ("--seed", "-5", -5),
        "n": ("--n", "2", 2),
        "logprobs": ("--logprobs", "2", 2),
    }
    words = [
        word for flag, value, _ in flags.values() for word in (flag, value) if word is not None
    ]
    with pytest.raises(ZeroDivisionError):
        cli.generate_main([*TINY, "--prompt", "Hi", "--json", "--quiet", *words])
    [job] = seen
    assert job.params == SamplingParams(
        **{name: value for name, (_, _, value) in flags.items()}
    )
    assert set(flags) == {field.name for field in fields(cli.SamplingOptions)} - {
        "max_new_tokens"
    } | {"max_tokens"}


CITY = {"type": "object", "required": ["a"], "additionalProperties": False,
        "properties": {"a": {"enum": ["x", "y"]}}}


@pytest.mark.parametrize("words, fits", [
    (["--json-schema", "city.json"], lambda text: json.loads(text)["a"] in ("x", "y")),
    (["--choice", "yes", "--choice", "no"], ("yes", "no").__contains__),
    (["--regex", "[a-c]{3}"], re.compile("[a-c]{3}").fullmatch),
    (["--grammar", "list.lark"], re.compile(r"a(,a){0,2}").fullmatch),
])
@pytest.mark.parametrize("more", [[], ["--raw"], ["--ignore-eos"], ["--n", "2", "--seed", "1"]])
def test_answers_have_the_format_asked_for(answers, tmp_path, monkeypatch, words, fits, more):
    monkeypatch.chdir(tmp_path)
    Path("city.json").write_text(json.dumps(CITY), encoding="utf-8-sig")
    Path("list.lark").write_text('start: "a" ("," "a"){0,2}')
    for answer in answers("--prompt", "Hi", "--show-stats", *words, *more):
        assert fits(answer["text"]) and answer["finish_reason"] == "stop"
        assert answer["stats"]["new_tokens"] == len(answer["token_ids"]) > 1


def test_an_answer_with_a_format_is_streamed_and_its_cut_is_noted(command, monkeypatch):
    words = [*TINY, "--prompt", "Hi", "--seed", "3", "--max-new-tokens", "9"]
    code, out, err = command(*words, "--regex", "[a-z]{40}")
    assert code == 0 and re.fullmatch("[a-z]{9}\n", out) and "cut after 9 tokens" in err
    code, out, err = command(*words, "--json-object", "--no-stream")
    assert code == 0 and out[0] == "{"


@pytest.mark.parametrize("words, message", [
    (["--json-schema", "none.json"], "--json-schema none.json: No such file or directory"),
    (["--json-schema", "."], "--json-schema .: Is a directory"),
    (["--json-schema", "latin.json"], "--json-schema latin.json: it is no text in UTF-8"),
    (["--json-schema", "cut.json"], "--json-schema cut.json is no JSON: "),
    (["--json-schema", "deep.json"], "--json-schema deep.json is no JSON: "),
    (["--json-schema", "empty"], "--json-schema empty is no JSON: "),
    (["--json-schema", "list.json"], "--json-schema: "),
    (["--grammar", "none.lark"], "--grammar none.lark: No such file"),
    (["--grammar", "empty"], "--grammar"),
    (["--choice", "a", "--regex", "b"], "--regex excludes --choice"),
])
def test_a_wrong_format_is_found_before_the_model_is_loaded(
    command, tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "load", lambda *args: pytest.fail("a model was loaded"))
    Path("latin.json").write_bytes(b'"\xe9"')
    Path("cut.json").write_text('{"type": "object"')
    Path("deep.json").write_text("[" * 100_000)
    Path("list.json").write_text("[1]")
    Path("empty").touch()
    code, out, err = command(*TINY, "--prompt", "Hi", "--quiet", *words)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("nanollm-generate: error: ") and message in err


@pytest.mark.parametrize("words, message", [
    (["--json-schema", "unique.json"], ("--json-schema: ", "uniqueItems")),
    (["--regex", "("], ("--regex: ",)),
    (["--regex", "(?=a)b"], ("--regex: ",)),
    (["--grammar", "broken.lark"], ("--grammar: ",)),
])
def test_what_cannot_be_held_is_named_with_its_flag(
    command, tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    Path("unique.json").write_text('{"type": "array", "uniqueItems": true}')
    if words[0] != "--grammar": # which may name tokens of the model
        monkeypatch.setattr(cli, "load", lambda *args: pytest.fail("a model was loaded"))
    Path("broken.lark").write_text("start: missing")
    code, out, err = command(*TINY, "--prompt", "Hi", "--quiet", *words)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert all(part in err for part in message), err


def test_defaults_are_those_of_sampling_params():
    found, params = cli.GenerateOptions(), SamplingParams(max_tokens=cli.DEFAULT_NEW_TOKENS)
    assert cli.sampling_params(found, {}) == params
    for field in fields(cli.SamplingOptions):
        if field.name != "max_new_tokens" and getattr(found, field.name) is not None:
            assert (getattr(found, field.name) or None) == (
                getattr(params, field.name) or None
            ), field.name
    [dtype] = [one for one in fields(EngineArgs) if one.name == "dtype"]
    assert get_args(dtype.type) == ("auto", *DTYPES)


def test_what_is_not_given_is_left_to_the_model():
    own = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 40}
    params = cli.sampling_params(cli.GenerateOptions(), own)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.95)
    assert params.max_tokens == 40
    given = cli.GenerateOptions(temperature=0.0, top_k=0, max_new_tokens=7)
    params = cli.sampling_params(given, own)
    assert (params.temperature, params.top_k, params.top_p) == (0, 0, 0.95)
    assert params.max_tokens == 7
    assert cli.sampling_params(cli.GenerateOptions(), own, room=5).max_tokens == 5


def test_the_models_defaults_reach_the_engine(command, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "generate_all", lambda llm, jobs: seen.extend(jobs) or 1 / 0)
    monkeypatch.setattr("nanollm.llm.default_sampling",
                        lambda model, mode: {"auto": {"temperature": 0.25}, "vllm": {}}[mode])
    for words, temperature in (([], 0.25), (["--generation-config", "vllm"], 1.0),
                               (["--temperature", "0.5"], 0.5)):
        with pytest.raises(ZeroDivisionError):
            cli.generate_main([*TINY, "--prompt", "Hi", "--quiet", *words])
        assert seen.pop().params.temperature == temperature


@pytest.mark.parametrize("words, code", [(("--prompt", "Hi"), 0), (("--prompt", ""), 2)])
def test_the_garbage_collector_is_on_again(command, words, code):
    "It is off while libraries are imported and weights are loaded."
    assert command(*TINY, "--max-new-tokens", "2", *words, "--quiet")[0] == code
    assert gc.isenabled()


def test_model_flags_reach_the_loader(command, monkeypatch):
    seen = []

    def load(model, **settings):
        seen.append((model, settings))
        raise nanollm.model.ModelError("far enough")

    monkeypatch.setattr("nanollm.tensor_parallel.Alone.load", staticmethod(load))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: seen.append(count))
    code, _, err = command(
        "--prompt",
        "Hi",
        "--model",
        "some/where",
        "--local-files-only",
        "--dtype",
        "bfloat16",
        "--device",
        "cuda:1",
        "--threads",
        "3",
    )
    assert (code, err) == (2, "nanollm-generate: error: far enough\n")
    assert seen == [
        3,
        (
            "some/where",
            dict(
                device="cuda:1",
                dtype="bfloat16",
                load_format="auto",
                local_files_only=True,
                seed=0,
                progress=True,
            ),
        ),
    ]
    assert torch.get_num_threads() == threads


def test_logprobs(answers):
    [answer] = answers(
        "--prompt",
        "Hi",
        "--seed",
        "1",
        "--max-new-tokens",
        "5",
        "--logprobs",
        "2",
        "--ignore-eos",
    )
    assert [entry["token_id"] for entry in answer["logprobs"]] == answer["token_ids"]
    for entry in answer["logprobs"]:
        assert entry["logprob"] <= 0 and entry["rank"] >= 1 and len(entry["top"]) == 2
    assert (
        answers("--prompt", "Hi", "--max-new-tokens", "1", "--logprobs", "0")[0]["logprobs"][0][
            "top"
        ]
        == []
    )


def test_default_length_shrinks_and_an_explicit_one_does_not(
    answers, command, tiny, monkeypatch
):
    context = tiny.config.max_position_embeddings
    long = "x" * (context - 5)
    [answer] = answers("--raw", "--prompt", long, "--ignore-eos")
    assert len(answer["token_ids"]) == 5
    code, out, err = command(
        *TINY, "--raw", "--prompt", long, "--max-new-tokens", "6", "--quiet"
    )
    assert (code, out) == (2, "") and str(context) in err and err.count("\n") == 1
    code, _, err = command(*TINY, "--raw", "--prompt", "x" * context, "--quiet")
    assert code == 2 and str(context) in err
    monkeypatch.setattr(cli, "DEFAULT_NEW_TOKENS", 12)
    assert (
        len(answers("--prompt", "Hi", "--min-tokens", "15", "--seed", "1")[0]["token_ids"])
        == 15
    )


def test_all_prompts_are_checked_before_the_first_token(command):
    code, out, err = command(
        *TINY, "--raw", "--prompt", "fine", "--prompt", "x" * 3000, "--quiet"
    )
    assert (code, out) == (2, "") and "3000" in err


def test_a_cut_answer_is_noted_only_if_the_limit_was_ours(command, monkeypatch):
    monkeypatch.setattr(cli, "DEFAULT_NEW_TOKENS", 12)
    words = [*TINY, "--prompt", "Hi", "--ignore-eos", "--no-stream"]
    assert "cut after 12 tokens" in command(*words)[2]
    assert "cut" not in command(*words, "--max-new-tokens", "9")[2]
    assert command(*words, "--quiet")[2] == ""


def test_stats_table_on_stderr_only(command):
    words = [
        *TINY,
        "--prompt",
        "Hi",
        "--max-new-tokens",
        "4",
        "--ignore-eos",
        "--show-stats",
        "--seed",
        "1",
    ]
    code, out, err = command(*words)
    assert code == 0 and "TTFT" not in out
    for name in (
        "prompt tok",
        "cached tok",
        "new tok",
        "TTFT (ms)",
        "TPOT (ms)",
        "E2E (s)",
        "tok/s",
        "start:",
        "cpu, float32",
    ):
        assert name in err
    assert "all" not in err.split("start:")[0].split("tok/s")[1]
    row = next(line.split() for line in err.splitlines() if line.split()[:1] == ["1"])
    assert row[2:4] == ["0", "4"] and float(row[4]) > 0
    rows = [line.split() for line in command(*words, "--n", "3")[2].splitlines()]
    total = next(row for row in rows if row[:1] == ["all"])
    assert total[3] == "12"


def test_stats_in_json(answers):
    words = ["--prompt", "Hi", "--ignore-eos", "--show-stats", "--max-new-tokens"]
    stats = answers(*words, "4")[0]["stats"]
    assert set(stats) == {
        "prompt_tokens",
        "cached_tokens",
        "new_tokens",
        "ttft_s",
        "tpot_s",
        "e2e_s",
        "tokens_per_s",
    }
    assert stats["new_tokens"] == 4 and 0 < stats["ttft_s"] < stats["e2e_s"]
    assert stats["e2e_s"] == pytest.approx(stats["ttft_s"] + 3 * stats["tpot_s"])
    assert answers(*words, "1")[0]["stats"]["tpot_s"] is None


def test_one_token_has_no_tpot_in_the_table(command):
    _, _, err = command(
        *TINY, "--prompt", "Hi", "--max-new-tokens", "1", "--show-stats", "--quiet"
    )
    assert (
        next(line.split()[5] for line in err.splitlines() if line.split()[:1] == ["1"]) == "-"
    )


def test_an_adapter_answers_where_it_is_named(answers, tmp_path):
    words = ["--prompt", "Hi", "--prompt", "You", "--temperature", "0", "--max-new-tokens", "8"]
    adapter = ["--enable-lora", "--lora-modules", f"loud={save(tmp_path / 'loud')}"]
    plain, idle, loud = ([one["token_ids"] for one in answers(*words, *more)]
                         for more in ([], adapter, [*adapter, "--lora", "loud"]))
    assert plain == idle and all(a != b for a, b in zip(plain, loud))


def test_drafts_change_no_answer(answers):
    words = ["--prompt", "abcabcabcabc", "--seed", "3", "--max-new-tokens", "24", "--n", "2"]
    for method in ("ngram", "suffix"):
        asked = json.dumps({"method": method, "num_speculative_tokens": 5})
        assert answers(*words, "--speculative-config", asked) == answers(*words)


@pytest.mark.parametrize("words, message", [
    (["--speculative-config", "ngram"], "--speculative-config must be an object in JSON"),
    (["--speculative-config", '{"method": "ngram"}'], "num_speculative_tokens: Field required"),
    (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 64}'], "got 64"),
    (["--lora", "loud"], "--lora must be one of --lora-modules, got 'loud'"),
    (["--enable-lora", "--lora-modules", "loud=nowhere"], "NAME=DIRECTORY, got 'loud=nowhere'"),
])
def test_wrong_drafts_and_adapters_are_found_before_the_model_is_loaded(
        command, monkeypatch, words, message):
    monkeypatch.setattr("nanollm.tensor_parallel.Alone.load", None)
    code, out, err = command("--prompt", "Hi", *words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_an_adapter_that_cannot_be_read_is_an_error_of_usage(command, tmp_path):
    code, out, err = command(*TINY, "--prompt", "Hi", "--quiet", "--enable-lora",
                             "--lora-modules", f"loud={tmp_path}")
    assert (code, out) == (2, "") and "adapter_config.json" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--top-p", "1.5"], "top_p"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "hot"], "--temperature"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--n", "0"], "--n"),
        (["--n", "1000"], "n"),
        (["--stop", ""], "--stop must not be empty"),
        (["--stop-token-id", "400"], "got 400"),
        (["--logit-bias", "400=1"], "got 400"),
        (["--logit-bias", "4:1"], "--logit-bias needs ID=VALUE, got 4:1"),
        (["--logit-bias", "4=1=2"], "got 4=1=2"),
        (["--logprobs", "1"], "add --json"),
        (["--logprobs", "99", "--json"], "logprobs"),
        (["--raw", "--system", "x"], "--system"),
        (["--dtype", "float8"], "--dtype must be auto or float32"),
        (["--load-format", "pickle"], "--load-format"),
        (["--device", "toaster"], "device 'toaster'"),
        (["--threads", "0"], "--threads"),
        (["--kv-cache-memory", "lots"], "--kv-cache-memory must be a number"),
        (["--kv-cache-memory", "1KiB"], "holds no block"),
        (["--block-size", "0"], "--block-size"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (
            ["--max-num-seqs", "64", "--max-num-batched-tokens", "63"],
            "max_num_batched_tokens=63",
        ),
        (["--max-model-len", "4096"], "2048"),
        (["--max-model-len", "512", "--num-kv-blocks", "4"], "max_model_len=512"),
        (["--trace", "/no/such/folder/trace.json"], "/no/such/folder/trace.json"),
        (["--no-such-flag"], "--no-such-flag"),
        (["stray"], "unrecognized arguments: stray"),
        (["--prompt"], "--prompt: expected one argument"),
        (["--max-new", "3"], "--max-new"),
        (["--model", "no-such-shape"], "unknown dummy shape"),
        (["--model", "/no/such/folder"], "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(command, words, message):
    code, out, err = command(*TINY, "--prompt", "Hi", "--quiet", *words)
    assert (code, out) == (2, "")
    assert err.startswith("nanollm-generate: error: ") and err.count("\n") == 1
    assert message in err


def test_a_model_without_template_says_raw(command, monkeypatch, answers):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    monkeypatch.setattr("nanollm.llm.load_tokenizer", lambda *args, **settings: tokenizer)
    code, out, err = command(*TINY, "--prompt", "Hi", "--quiet")
    assert (code, out) == (2, "") and "--raw" in err and err.count("\n") == 1
    assert len(answers("--prompt", "Hi", "--raw", "--max-new-tokens", "2")) == 1


def test_local_directory(command, tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    code, out, err = command(
        "--model",
        str(tmp_path),
        "--local-files-only",
        "--dtype",
        "float32",
        "--prompt",
        "Hi",
        "--max-new-tokens",
        "3",
        "--temperature",
        "0",
        "--show-stats",
        "--json",
        "--quiet",
    )
    assert code == 0 and json.loads(out)["stats"]["new_tokens"] <= 3


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "generate_all", lambda *args: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        cli.generate_main([*TINY, "--prompt", "Hi", "--quiet"])


def test_ctrl_c_keeps_the_text_and_ends_its_line(command, monkeypatch):
    def interrupted(llm, jobs):
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "generate_all", interrupted)
    assert command(*TINY, "--prompt", "Hi", "--quiet") == (130, "so far\n", "")
    monkeypatch.setattr(cli, "load", lambda options: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(*TINY, "--prompt", "Hi", "--quiet") == (130, "", "")


def test_version_and_help_leave_at_once(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(cli, "run", lambda options: pytest.fail("ran"))
    assert command("--version") == (0, f"nanollm-generate {nanollm.__version__}\n", "")
    code, out, err = command("--help")
    assert (code, err) == (0, "") and out.startswith("usage: nanollm-generate [options]\n")
    for text in ("--no-stream", "examples:", "Exit codes: 0 done, 2 bad", "Prompt:", "Output:"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    "end, code, message",
    [
        (None, 0, ""),
        (lambda: 5, 5, ""),
        (KeyboardInterrupt, 130, ""),
        (cli.UsageError("too small"), 2, "nanollm-generate: error: too small\n"),
    ],
)
def test_how_a_command_ends(capsys, end, code, message):
    def run(options):
        if isinstance(end, BaseException) or end is KeyboardInterrupt:
            raise end
        return end() if end else None

    with pytest.raises(SystemExit) as found:
        cli.leave(cli.generate_command, run, ["--raw"])
    assert found.value.code == code
    assert capsys.readouterr().err == message


def test_help_into_a_pipe_that_nobody_reads():
    line = f"{sys.executable} -c 'from nanollm.serve.cli import generate_main as m; m()' --help"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"({line}; echo $? >&2) | true"],
        capture_output=True, text=True,
    )
    assert done.stderr in ("0\n", "141\n"), "no traceback, and not Python's 120"


HEAVY = """
import sys
from nanollm.serve.cli import generate_main
try:
    generate_main(sys.argv[1:])
finally:
    print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["--dtype", "float8"]])
def test_torch_is_not_imported_for_help_and_mistakes(words):
    command = [sys.executable, "-c", HEAVY, *words]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == (0 if words[:1] in (["--help"], ["--version"]) else 2)
    assert done.stderr.splitlines()[-1] == "[]"


def start(*words, **settings):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"} | settings.pop("env", {})
    settings |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    return subprocess.Popen([*COMMAND, *TINY, *words], **settings)


ENDLESS = ["--prompt", "Hi", "--max-new-tokens", "2000", "--ignore-eos", "--quiet"]


def test_broken_pipe_ends_quietly():
    process = start(*ENDLESS)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_sigint_ends_quietly_with_a_newline():
    process = start(*ENDLESS)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    try:
        rest, err = process.communicate(timeout=30)
        assert err == b""
    except (
        subprocess.TimeoutExpired
    ):  # seen once: the first went unheard, as one that lands in a finalizer does
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")


def test_stdin_and_a_stdout_without_unicode():
    words = [
        "--raw",
        "--temperature",
        "0",
        "--max-new-tokens",
        "2",
        "--logit-bias",
        "195=100",
        "--quiet",
    ]
    process = start(*words, stdin=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate("Grüße\n".encode(), timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert out == b"??\n"


def test_a_closed_stdout_is_no_crash():
    line = "nanollm-generate --model tiny-llama --load-format dummy --prompt Hi "
    line += "--max-new-tokens 2 --quiet >&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_headings_hold_no_control_characters(command):
    _, _, errors = command(
        *TINY, "--prompt", "\x1b[31mred", "--prompt", "b", "--max-new-tokens", "1"
    )
    assert "1 of 2" in errors and "\x1b" not in errors.split("1 of 2")[1].splitlines()[0]


def test_many_prompts_share_a_batch_and_come_out_in_order(answers, tmp_path):
    trace = tmp_path / "trace.json"
    prompts = [f"{'long ' * (9 - i)}{i}" for i in range(8)]
    common = ["--n", "2", "--temperature", "0.8", "--seed", "5", "--max-new-tokens", "9"]
    tight = [
        "--max-num-seqs",
        "5",
        "--max-num-batched-tokens",
        "32",
        "--num-kv-blocks",
        "12",
        "--trace",
        str(trace),
    ]
    plain = ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    together = answers(
        *(word for prompt in prompts for word in ("--prompt", prompt)), *common, *tight
    )
    assert [(answer["prompt"], answer["index"]) for answer in together] == [
        (p, i) for p in prompts for i in range(2)
    ]
    assert together == [
        answer for prompt in prompts for answer in answers("--prompt", prompt, *common, *plain)
    ]
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"] == "finished" for event in events) == 16
    assert (
        max(event["args"]["running"] for event in events if event["name"].startswith("step "))
        == 5
    )


def test_trace_is_written_even_after_ctrl_c(command, monkeypatch, tmp_path):
    trace = tmp_path / "trace.json"
    monkeypatch.setattr(
        cli, "generate_all", lambda llm, jobs: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert command(*TINY, "--prompt", "Hi", "--quiet", "--trace", str(trace))[0] == 130
    assert {event["ph"] for event in json.loads(trace.read_text())["traceEvents"]} <= {"M"}


def test_a_failed_answer_is_reported_and_takes_no_other_with_it(command, monkeypatch):
    from nanollm.tensor_parallel import Alone

    real = Alone.load

    def broken(*args, **settings):
        model = real(*args, **settings)
        model.set_input_embeddings(
            torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.clone())
        )
        model.get_input_embeddings().weight[ord("~")] = torch.nan
        return model

    monkeypatch.setattr(Alone, "load", staticmethod(broken))
    words = [
        "--raw",
        "--prompt",
        "good",
        "--prompt",
        "bad~",
        "--prompt",
        "fine",
        "--max-new-tokens",
        "4",
    ]
    code, out, err = command(*TINY, *words, "--json", "--quiet")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and err.count("\n") == 1 and "answer 2 failed" in err
    assert [answer["finish_reason"] == "error" for answer in found] == [False, True, False]
    assert found[1]["error"] and found[0]["error"] is None
