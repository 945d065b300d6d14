"""Options: declared once, refused with their name and limit, and read without PyTorch."""

import math
from dataclasses import fields

import pytest
import typer

from nanollm.args import (
    LIMITS,
    BenchOptions,
    EngineArgs,
    GenerateOptions,
    LoadArgs,
    ServeOptions,
    ServerArgs,
    leave,
    new_app,
    option,
    options_of,
    parse_bytes,
    settings_of,
)


@pytest.mark.parametrize("text", ["", "GiB", "4 apples", "4GiBs", "1e999", "nan", "--"])
def test_bytes_that_nobody_can_read_are_quoted(text):
    with pytest.raises(ValueError, match="kv_cache_memory must be a number of bytes"):
        parse_bytes(text)


def test_units_of_a_thousand_and_of_1024():
    assert parse_bytes(" 1.5 kB ") == 1500
    assert parse_bytes("1.5KiB") == parse_bytes("1.5k") == 1536
    assert parse_bytes("2tb") == 2 * 10**12


@pytest.mark.parametrize("wrong, message", [
    (dict(max_num_seqs=0), "max_num_seqs must be a whole number of at least 1, got 0"),
    (dict(num_kv_blocks=1.5), "num_kv_blocks must be a whole number"),
    (dict(kv_cache_memory="0"), "kv_cache_memory must be a whole number"),
    (dict(model_impl="vllm"), "model_impl must be auto or nanollm or transformers, got 'vllm'"),
    (dict(scheduling_policy="lifo"), "scheduling_policy must be fcfs or priority"),
    (dict(gpu_memory_utilization=0.0), "gpu_memory_utilization must be above 0"),
    (dict(gpu_memory_utilization=math.nan), "gpu_memory_utilization must be above 0"),
])
def test_engine_args_name_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        EngineArgs(**wrong)


@pytest.mark.parametrize("name", LIMITS)
def test_loads_have_limits(name):
    low, high = LIMITS[name]
    LoadArgs(**{name: low})
    for value in (low - 1, math.nan, *([high * 2] if high < math.inf else [])):
        with pytest.raises(ValueError, match=f"{name} must be from {low} to {high}"):
            LoadArgs(**{name: value})


@pytest.mark.parametrize("wrong", [
    dict(endpoint="embeddings"), dict(base_url="localhost:8000"),
])
def test_targets_are_checked(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must .* got '{value}'"):
        LoadArgs(**wrong)


@pytest.mark.parametrize("options, settings", [
    (GenerateOptions, EngineArgs()), (ServeOptions, EngineArgs()),
    (ServeOptions, ServerArgs(("a",))), (BenchOptions, LoadArgs()),
])
def test_commands_have_the_defaults_of_their_settings(options, settings):
    given = settings_of(options(), type(settings))
    others = {"request_rate"}  # a list on a command line
    if options is GenerateOptions:
        others = {"seed"}  # of sampling; the setting is the seed of random weights
    assert len(given) > 6
    for name in set(given) - others:
        assert given[name] == getattr(settings, name), name


@pytest.mark.parametrize("settings", [EngineArgs, ServerArgs, LoadArgs])
def test_every_option_says_what_it_is_for(settings):
    for one in fields(settings):
        if one.metadata:
            assert one.metadata["help"][-1] in ".?" and one.metadata["rich_help_panel"]


def test_options_of_takes_the_panels_that_are_asked_for():
    def names(*panels):
        return {one.name for one in fields(options_of("Some", LoadArgs, *panels))}

    assert names("Server") | names("Load") == names("Server", "Load")
    assert "base_url" in names("Server") and "base_url" not in names("Load")
    assert not names("Nothing")
    assert option(3, "Three.", "Load").default == 3


@pytest.mark.parametrize("end, code, message", [
    (None, 0, ""), (lambda: 5, 5, ""), (KeyboardInterrupt, 130, ""),
    (lambda: typer.BadParameter("too small"), 2, "prog: error: "),
])
def test_how_a_command_ends(capsys, end, code, message):
    app = new_app()
    app.command()(GenerateOptions)

    def run(options):
        found = end() if end else None
        if isinstance(found, BaseException):
            raise found
        return found

    with pytest.raises(SystemExit) as found:
        leave("prog", app, run, ["--raw"])
    assert found.value.code == code
    assert capsys.readouterr().err.startswith(message)
