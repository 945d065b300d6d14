"""Options: declared once, refused with their name and limit, and read without PyTorch."""

import argparse
import itertools
import json
import math
import re
from dataclasses import fields
from typing import Literal, get_args, get_origin

import pytest

from nanollm.args import (
    EngineArgs,
    ServerArgs,
    flag_of,
    parse_number,
    read_list,
    read_module,
)
from nanollm.serve.commands import (
    BenchOptions,
    Command,
    FormatOptions,
    GenerateOptions,
    LoadArgs,
    ServeOptions,
    UsageError,
    settings_of,
)

OPTIONS = [GenerateOptions, ServeOptions, BenchOptions]
by_options = pytest.mark.parametrize("options", OPTIONS)


def shown(options):
    "The fields that are options of a command."
    return [one for one in fields(options) if one.metadata.get("help")]


# Numbers


@pytest.mark.parametrize("text, number", [
    ("4096", 4096), ("-5", -5), ("1e9", 10**9), (" 7 ", 7), ("7B", 7), ("0", 0),
    ("4k", 4000), ("25.6k", 25_600), ("2m", 2 * 10**6), ("1g", 10**9), ("2t", 2 * 10**12),
    ("4K", 4096), ("1M", 2**20), ("1.5K", 1536), ("4G", 4 * 2**30), ("2T", 2 * 2**40),
    ("4KB", 4000), ("4kb", 4000), ("4gb", 4 * 10**9), ("1.5 kB", 1500), ("512 MB", 512 * 10**6),
    ("4KiB", 4096), ("4kib", 4096), ("512 MiB", 2**29), ("4GiB", 4 * 2**30), ("1tib", 2**40),
    ("1.1k", 1100), # 1100.0000000000002 in floats
])
def test_numbers_as_people_write_them(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize("text", [
    "", "k", "GiB", "4 apples", "4GiBs", "4kk", "4x", "1e999", "nan", "inf", "--", "1.2.3",
    "1.5", "1.0001k", "0x10", "9e18k", "4k4", "e9", "٤x",
])
def test_what_is_no_whole_number_is_quoted(text):
    with pytest.raises(ValueError, match=f"must be a number .* got {re.escape(repr(text))}"):
        parse_number(text)


@pytest.mark.parametrize("given, found", [
    (None, ()), ((), ()), ("*", ("*",)), (["a", "b"], ("a", "b")),
    (('["a", "b"]',), ("a", "b")),
    ('["*"]', ("*",)), (["[a]"], ("[a]",)), ((7, 8), (7, 8)),
])
def test_lists_may_be_repeated_or_json(given, found):
    assert read_list(given) == found


@pytest.mark.parametrize("text, found", [
    ("a=.", ("a", ".")), ("a=b=c", ("a", "b=c")), ("a=x y", ("a", "x y")),
    ('{"name": "a", "path": "b=c", "base_model_name": "m"}', ("a", "b=c")),
])
def test_adapters_in_one_word_or_in_json(text, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b=c", "x y"):
        (tmp_path / name).mkdir()
    assert read_module(text) == found


@pytest.mark.parametrize("text", [
    "", "a", "=.", "a=", "a=nowhere", "{",
    '{"name": "a"}', "{a=b}", '{"name": "", "path": "."}',
    '{"name": "a", "path": 7}', '{"name": "a", "path": "nowhere"}', '["a", "."]', "7", '"a"'])
def test_what_is_no_adapter_is_quoted(text):
    message = f"lora_modules must be NAME=DIRECTORY, got {re.escape(repr(text))}"
    with pytest.raises(ValueError, match=message):
        read_module(text)


# Settings check themselves


@pytest.mark.parametrize("wrong, message", [
    (dict(max_num_seqs=0), "max_num_seqs must be a whole number of at least 1, got 0"),
    (dict(max_num_seqs="4x"), "max_num_seqs must be a number as in 4096, .* got '4x'"),
    (dict(max_num_seqs=None), "max_num_seqs must be a whole number .* got None"),
    (dict(num_kv_blocks=1.5), "num_kv_blocks must be a whole number .* got 1.5"),
    (dict(kv_cache_memory="0"), "kv_cache_memory must be a whole number of at least 1, got 0"),
    (dict(model_impl="vllm"), "model_impl must be auto or nanollm or transformers, got 'vllm'"),
    (dict(quantization="int3"), "quantization must be int8 or .* or fp8, got 'int3'"),
    (dict(kv_cache_dtype=8), "kv_cache_dtype must be auto or int8 or fp8 or .*, got 8"),
    (dict(dtype="float8"), "dtype must be auto or float32 or .* got 'float8'"),
    (dict(scheduling_policy="lifo"), "scheduling_policy must be fcfs or priority"),
    (dict(generation_config="mine"), "generation_config must be auto or vllm, got 'mine'"),
    (dict(gpu_memory_utilization=0.0), "gpu_memory_utilization must be above 0"),
    (dict(speculative_config="ngram"), "speculative_config must be an object .* got 'ngram'"),
    (dict(speculative_config="[" * 9999), "speculative_config must be an object in JSON"),
    (dict(speculative_config=[1]), r"speculative_config must be an object .* got \[1\]"),
    (dict(max_loras=0), "max_loras must be a whole number from 1 to 256, got 0"),
    (dict(max_lora_rank=1024), "max_lora_rank must be a whole number from 1 to 512, got 1024"),
    (dict(max_loras=4, max_cpu_loras=3), "max_cpu_loras must be at least 4, got 3"),
    (dict(lora_modules=("a=.",)), "lora_modules needs --enable-lora"),
    (dict(lora_modules=("a=.", "a=/"), enable_lora=True), "lora_modules must have different"),
    (dict(lora_modules=("a",), enable_lora=True), "lora_modules must be NAME=DIRECTORY, got"),
    (dict(gpu_memory_utilization=math.nan), "gpu_memory_utilization must be "),
    (dict(enable_kernels="no"), "enable_kernels must be True or False, got 'no'"),
    (dict(enable_lora=None), "enable_lora must be True or False, got None"),
])
def test_engine_args_name_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        EngineArgs(**wrong)


def test_an_object_may_be_a_text_too():
    given = {"method": "ngram", "num_speculative_tokens": 5}
    args = EngineArgs(speculative_config='{"method": "ngram", "num_speculative_tokens": 5}')
    other = EngineArgs(speculative_config=given)
    assert args.speculative_config == other.speculative_config == given
    assert EngineArgs().speculative_config is None


def test_a_number_may_be_a_text_in_programs_too():
    args = EngineArgs(max_model_len="4k", kv_cache_memory="2GiB", gpu_memory_utilization="0.5")
    assert (args.max_model_len, args.kv_cache_memory) == (4000, 2**31)
    assert args.gpu_memory_utilization == 0.5


@pytest.mark.parametrize("wrong, message", [
    (dict(api_keys=("a", "")), "api_keys must not be empty"),
    (dict(served_model_names=[""]), "served_model_names must not be empty"),
    (dict(metrics_prefix="ours"), "metrics_prefix must be nanollm or vllm or both, got 'ours'"),
    (dict(reasoning_parser="gpt"), "reasoning_parser must be auto or none or think or qwen3"),
    (dict(timeout_keep_alive_s=-1), "timeout_keep_alive_s must be a number of at least 0"),
    (dict(shutdown_timeout_s=math.nan), "shutdown_timeout_s must be a number of at least 0"),
    (dict(tool_call_parser="json"), "tool_call_parser must be auto or none or hermes or"),
    (dict(max_body_bytes=0), "max_body_bytes must be a whole number of at least 1, got 0"),
    (dict(max_stored_bytes="all"), "max_stored_bytes must be a number"),
    (dict(allowed_origins='["a"'), "allowed_origins must be a list in JSON, got '\\[\"a\"'"),
])
def test_server_args_name_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        ServerArgs(**{"served_model_names": ("a",)} | wrong)


def test_closed_by_default():
    args = ServerArgs(("tiny",))
    assert args.allowed_origins == args.allowed_hosts == args.api_keys == ()
    assert args.allowed_methods == args.allowed_headers == ("*",)
    assert not (args.allow_credentials or args.enable_request_traces)
    assert ServeOptions().host == "127.0.0.1"


FORMATS = dict(json_schema="f", json_object=True, regex="", choice=("a",), grammar="g")


@pytest.mark.parametrize("first, second", itertools.combinations(FORMATS, 2))
def test_an_answer_has_one_format(first, second):
    given = {name: FORMATS[name] for name in (second, first)}
    flag = "--" + second.replace("_", "-")
    with pytest.raises(ValueError, match=f"{first} excludes {flag}: an answer has one format"):
        FormatOptions(**given)
    with pytest.raises(ValueError, match=f"{first} excludes {flag}"):
        GenerateOptions(max_num_seqs=3, **given)


@pytest.mark.parametrize("name", FORMATS)
def test_which_format_is_given(name):
    assert [one.name for one in FormatOptions(**{name: FORMATS[name]}).formats] == [name]
    assert FormatOptions(choice=()).formats == FormatOptions(json_object=False).formats == []


def test_parsers_of_calls_are_those_there_are():
    from nanollm.tools import TOOL_PARSERS
    [one] = [one for one in fields(ServerArgs) if one.name == "tool_call_parser"]
    assert get_args(one.type) == TOOL_PARSERS


LIMITED = [one for one in fields(LoadArgs) if math.isfinite(one.metadata.get("limits", [
    -math.inf])[0])]


@pytest.mark.parametrize("one", LIMITED, ids=lambda one: one.name)
def test_loads_have_limits(one):
    low, high = one.metadata["limits"]
    LoadArgs(**{one.name: low})
    for value in (low - 1, math.nan, *([high * 2] if high < math.inf else [])):
        with pytest.raises(ValueError, match=f"{one.name} must be a .*number .*{low}"):
            LoadArgs(**{one.name: value})


def test_endpoints_are_checked():
    with pytest.raises(ValueError, match="endpoint must be completions or chat, got 'embed'"):
        LoadArgs(endpoint="embed")


# From fields to flags


@by_options
def test_every_option_says_what_it_is_for(options):
    for one in shown(options):
        text = one.metadata["help"]
        assert text[0].isupper() or one.type is str or get_origin(one.type) is Literal or (
            text[0].isdigit()), text
        assert text.endswith("."), text
        if get_origin(one.type) is Literal and one.name != "what":
            assert all(choice in text for choice in get_args(one.type)), (one.name, text)
    flags = [flag_of(one) for one in shown(options)]
    assert len(flags) == len(set(flags)) > 15


@by_options
def test_help_shows_every_flag_in_80_columns(options, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = Command("program", options, "examples:\n  program --flag").format_help()
    assert max(map(len, text.splitlines())) <= 80
    for one in shown(options):
        assert re.search(rf"^  (\S+, )?{flag_of(one)}\b", text, re.M), one.name
        assert f"{one.metadata['panel']}:\n" in text
    assert text.endswith("examples:\n  program --flag\n") and "--version" in text
    assert "%" not in text


@by_options
def test_a_command_without_words_has_the_defaults_of_the_fields(options, monkeypatch):
    for name in ("NANOLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert Command("program", options).parse([]) == options()


@by_options
def test_every_flag_reaches_its_field(options, tmp_path):
    command, module = Command("program", options), f"a={tmp_path}"
    own = {"lora_modules": [module, "--enable-lora"], "max_cpu_loras": ["8"],
           "lora": ["a", "--enable-lora", "--lora-modules", module],
           "lora_dir": [str(tmp_path), "--enable-lora"], "speculative_config": ['{"a": 1}'],
           "quantization": ["int4"]}
    for one in shown(options):
        kinds = get_args(one.type) or (one.type,)
        given = {int: ["8"], float: ["0.5"], str: ["http://x"], bool: []}.get(kinds[0], ["["])
        given = own.get(one.name, given)
        if get_origin(one.type) is Literal:
            given = [kinds[-1]]
        flag, wanted = flag_of(one), None
        if one.type is bool:
            flag, wanted = (f"--no-{flag[2:]}", False) if one.default else (flag, True)
        elif get_origin(one.type) is not Literal and kinds[0] in (int, float):
            wanted = kinds[0](given[0])
        elif kinds[0] is dict:
            wanted = json.loads(given[0])
        words = [flag, *given] if flag.startswith("-") else given
        found = getattr(command.parse(words), one.name)
        wanted = given[0] if wanted is None else wanted
        assert found == ((wanted,) if get_origin(one.type) is tuple else wanted), one.name


def test_the_model_may_stand_first_and_only_once():
    command = Command("nanollm-serve", ServeOptions)
    assert command.parse(["org/name", "--port", "0"]).model == "org/name"
    assert command.parse(["--port", "0", "org/name"]).model == "org/name"
    assert command.parse(["--model", "org/name"]).model == "org/name"
    with pytest.raises(UsageError, match="--model is given twice: a and b"):
        command.parse(["a", "--model", "b"])
    with pytest.raises(UsageError, match="unrecognized arguments: b"):
        command.parse(["a", "b"])


def test_names_as_users_of_vllm_write_them():
    command = Command("nanollm-serve", ServeOptions)
    names = command.parse("m --served-model-name a b --served-model-name c".split())
    assert (names.model, names.served_model_names) == ("m", ("a", "b", "c"))
    origins = command.parse(["--allowed-origins", '["https://a.org", "https://b.org"]'])
    assert origins.allowed_origins == ("https://a.org", "https://b.org")
    assert command.parse(["--max-model-len=4k"]).max_model_len == 4000
    adapters = command.parse("m --enable-lora --lora-modules a=. b=/ --max-loras 4".split())
    assert (adapters.adapters, adapters.max_loras) == ({"a": ".", "b": "/"}, 4)
    drafts = '{"method": "ngram", "num_speculative_tokens": 5}'
    drafts = command.parse(["m", "--speculative-config", drafts]).speculative_config
    assert drafts == {"method": "ngram", "num_speculative_tokens": 5}
    calls = command.parse("m --enable-auto-tool-choice --tool-call-parser hermes".split())
    assert (calls.enable_auto_tool_choice, calls.tool_call_parser) == (True, "hermes")
    assert not command.parse(["--no-enable-auto-tool-choice"]).enable_auto_tool_choice


def test_keys_from_the_environment(monkeypatch):
    command = Command("nanollm-serve", ServeOptions)
    monkeypatch.setenv("NANOLLM_API_KEY", "secret")
    assert command.parse([]).api_keys == ("secret",)
    assert command.parse(["--api-key", "a", "--api-key", "b"]).api_keys == ("a", "b")
    monkeypatch.setenv("NANOLLM_API_KEY", "")
    assert command.parse([]).api_keys == ()
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert Command("nanollm-bench", BenchOptions).parse([]).api_key == "theirs"


@pytest.mark.parametrize("options, words, message", [
    (GenerateOptions, ["--top-p", "much"], "--top-p must be a number, got 'much'"),
    (GenerateOptions, ["--block-size", "0"], "--block-size must be a whole number"),
    (GenerateOptions, ["--stop-token-id", "x"], "--stop-token-id must be a number .* got 'x'"),
    (GenerateOptions, ["--dtype", "float8"], "--dtype must be auto or float32 .* got 'float8'"),
    (GenerateOptions, ["--choice", ""], "--choice must not be empty"),
    (GenerateOptions, ["--regex", "a", "--json-object"],
     "--json-object excludes --regex: an answer has one format"),
    (GenerateOptions, ["--stop", ""], "--stop must not be empty"),
    (GenerateOptions, ["--no-such"], "--no-such"),
    (GenerateOptions, ["--speculative-config", "5"], "--speculative-config must be an object"),
    (GenerateOptions, ["--lora-modules", "a=."], "--lora-modules needs --enable-lora"),
    (GenerateOptions, ["--enable-lora", "--lora-modules", "a=.", "--lora", "b"],
     "--lora must be one of --lora-modules, got 'b'"),
    (ServeOptions, ["--lora-dir", "."], "--lora-dir needs --enable-lora and a directory: '.'"),
    (ServeOptions, ["--enable-lora", "--lora-dir", "nowhere"], "--lora-dir needs .*'nowhere'"),
    (GenerateOptions, ["--max-new"], "--max-new"), # no abbreviations
    (GenerateOptions, ["--prompt"], "--prompt: expected one argument"),
    (ServeOptions, ["--port", "70000"], "--port must be a whole number from 0 to 65535"),
    (ServeOptions, ["--timeout-keep-alive", "-1"], "--timeout-keep-alive must be a number"),
    (ServeOptions, ["--api-key", ""], "--api-key must not be empty"),
    (ServeOptions, ["--metrics-prefix", "x"], "--metrics-prefix must be nanollm or"),
    (BenchOptions, ["chat"], "COMMAND must be serve, got 'chat'"),
    (BenchOptions, ["--request-rate", "-1"], "--request-rate must be a number of at least"),
])
def test_a_wrong_word_is_named_as_it_was_written(options, words, message):
    with pytest.raises(UsageError, match=message) as error:
        Command("program", options).parse(words)
    assert "\n" not in str(error.value)


def test_settings_of_takes_the_fields_and_no_others():
    options = ServeOptions(model="m", max_num_seqs=3, api_keys=("k",))
    engine, server = (settings_of(options, kind) for kind in (EngineArgs, ServerArgs))
    assert EngineArgs(**engine) == EngineArgs(model="m", max_num_seqs=3)
    assert ServerArgs(**server) == ServerArgs(api_keys=("k",))
    assert "port" not in server and "quiet" not in engine


def test_argparse_is_asked_for_nothing_by_default():
    actions = Command("program", GenerateOptions)._actions
    assert {action.default for action in actions if action.dest not in ("help", "version")} == {
        argparse.SUPPRESS
    }
