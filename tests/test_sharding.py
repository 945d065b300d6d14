"Parts of a model: what may be cut, what each process reads, and that the parts add up."

import re
import threading
from dataclasses import replace

import lora_folders
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nanollm.adapters import adaptable, read_adapter
from nanollm.compatibility import check_model, trial_logits
from nanollm.generate import generate
from nanollm.kernels import FusedDecoder, PackedLinear
from nanollm.lora import AdapterPool, LoRAForward
from nanollm.model import (
    ModelError,
    dummy_model,
    eos_token_ids,
    kv_shape,
    load_model,
    read_config,
    weight_bytes,
)
from nanollm.native import NativeError
from nanollm.paged_attention import PagedKVCache, ReferenceAttention, TransformersModel
from nanollm.quantization import quantize
from nanollm.sharding import (
    PROVEN,
    STYLES,
    AllReduced,
    VocabParallelEmbedding,
    check_size,
    load_rank,
    load_shard,
    part,
    refusal,
    shard_config,
    sizes,
    split_pair,
)
from nanollm.transformer import FAMILY, Decoder

V = 321 # odd
TINY = dict(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, max_position_embeddings=128)
IDS = torch.tensor([[1, 200, 3, 320, 7, 160, 161, 0, 99, 5]])
CPU = torch.device("cpu")
TYPES = sorted(kind for kind in PROVEN & {*transformers.CONFIG_MAPPING} # older versions have
               if transformers.CONFIG_MAPPING[kind].base_model_tp_plan) # fewer of them


class Lockstep:
    "Threads as processes: a sum waits until every rank has come to it."

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.given = [None] * size

    def all_reduce(self, rank):
        def add(x):
            self.given[rank] = x
            self.barrier.wait()
            total = sum(self.given[1:], self.given[0])
            self.barrier.wait()
            return x.copy_(total)
        return add

    def run(self, fn):
        "Return what `fn(rank)` returns for all ranks; raise what the first of them raises."
        results, errors = [None] * self.size, []

        @torch.inference_mode()
        def go(rank):
            try:
                results[rank] = fn(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=go, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            raise error
        return results


def parts_of(source, size, config=None, dtype=torch.float32, **kwargs):
    "All ranks' parts, and those who run them."
    ranks = Lockstep(size)
    config = config or read_config(str(source))
    return ranks, [load_shard(str(source), config, rank=rank, size=size, device="cpu",
                              dtype=dtype, all_reduce=ranks.all_reduce(rank), **kwargs)
                   for rank in range(size)]


def logits(ranks, owners, ids, vocab=V):
    "Logits as rank 0 would have them: of all ranks, without the padding."
    found = ranks.run(lambda rank: owners[rank](ids).logits)
    return torch.cat(found, dim=-1)[..., :vocab]


def noisy(model):
    "Move every parameter, so that no bias is 0 and no norm 1."
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.15)
    return model.eval()


def save(folder, kind="llama", **settings):
    "Save a model with noise in all its parameters; return it."
    config = AutoConfig.for_model(kind, **TINY | settings)
    model = noisy(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    return model


def distance(folder, model, size):
    "How far the parts are from the whole, relatively."
    ranks, parts = parts_of(folder, size)
    got = logits(ranks, parts, IDS)
    with torch.inference_mode():
        right = model(IDS).logits
    return float((got - right).norm() / right.norm())


def refuses(*words):
    "Expect a ModelError whose message holds all `words`."
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(ModelError, match=re.compile(pattern, re.S))


# which divisions there are

@pytest.mark.parametrize("name, expected", [
    ("smollm2-135m", [1, 3]), ("tiny-llama", [1, 2, 4]), ("tiny-qwen3", [1, 2, 4]),
    ("qwen3-0.6b", [1, 2, 4, 8, 16]), ("qwen3-8b", [1, 2, 4, 8, 16, 32])])
def test_sizes_of_the_named_shapes(name, expected):
    assert sizes(read_config(name)) == expected


@pytest.mark.parametrize("H, K, M, expected", [
    (12, 6, 96, [1, 2, 3, 6, 12]), # at 4, neither of 6 and 4 divides the other
    (8, 1, 96, [1, 2, 4, 8]), (8, 8, 100, [1, 2, 4]), (7, 7, 96, [1]),
    (8, None, 96, [1, 2, 4, 8])])
def test_heads_and_the_mlp_must_divide(H, K, M, expected):
    config = AutoConfig.for_model("llama", hidden_size=16 * H, num_attention_heads=H,
                                  num_key_value_heads=K, intermediate_size=M)
    assert sizes(config) == expected
    for size in range(1, 17):
        if size in expected:
            check_size(config, size)
            own = shard_config(config, size)
            assert own.num_attention_heads % own.num_key_value_heads == 0
        else:
            with refuses(f"among {size} processes", ", ".join(map(str, expected))):
                check_size(config, size)


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", None])
def test_a_size_that_is_no_number_of_processes(size):
    with refuses(f"among {size} processes", "1, 2, 4"):
        check_size(read_config("tiny-llama"), size)


@pytest.mark.parametrize("kind, settings, word", [
    ("gpt2", {}, "no plan"), ("opt", {}, "no plan"), ("phi3", {"pad_token_id": 0}, "gather"),
    ("qwen3_moe", {}, "moe_tp_experts"), ("helium", {}, "not been seen"),
    ("gpt_neox", {}, "not been seen"),
    ("llama", {"quantization_config": {"quant_method": "torchao"}}, "quantized")])
def test_models_that_cannot_be_cut_are_refused_by_name(kind, settings, word):
    config = AutoConfig.for_model(kind, **settings)
    assert sizes(config) == [1]
    check_size(config, 1)
    with refuses(repr(kind), "2 processes", word):
        check_size(config, 2)
    with refuses(word):
        load_shard("nowhere", config, rank=0, size=2, all_reduce=None, device="cpu",
                   dtype=torch.float32)


def test_a_smaller_config_is_a_new_one():
    config = read_config("tiny-qwen3")
    before = config.to_dict()
    own = shard_config(config, 2)
    assert config.to_dict() == before and type(own) is type(config)
    assert kv_shape(own) == kv_shape(config, 2) == (2, 1, 32)
    assert (own.num_attention_heads, own.intermediate_size) == (2, 64)
    assert own.vocab_size == config.vocab_size and own.hidden_size == config.hidden_size
    assert kv_shape(shard_config(config, 4)) == (2, 1, 32) # replicated
    own = shard_config(AutoConfig.for_model("qwen2", **TINY | dict(head_dim=None)), 2)
    assert own.head_dim == 16 # and not the width over two heads


def test_parts_cover_the_whole_and_neighbours_share():
    assert [part(12, 4, rank, 3) for rank in range(3)] == [
        slice(0, 4), slice(4, 8), slice(8, 12)]
    assert [part(6, 3, rank, 4) for rank in range(4)] == [
        slice(0, 3), slice(0, 3), slice(3, 6), slice(3, 6)]
    assert [part(5, 5, rank, 4) for rank in range(4)] == [slice(0, 5)] * 4


@pytest.mark.parametrize("H, K, size", [(8, 2, 4), (8, 4, 4), (8, 2, 8), (12, 3, 6), (6, 1, 3)])
def test_query_heads_meet_their_own_kv_head(H, K, size):
    for rank in range(size):
        queries = range(*part(H, H // size, rank, size).indices(H))
        keys = range(*part(K, max(K // size, 1), rank, size).indices(K))
        assert {q * K // H for q in queries} == {*keys}


# the parts add up, for every type of model that is let in

@pytest.mark.parametrize("kind", TYPES)
def test_the_parts_add_up(kind, tmp_path):
    tied = AutoConfig.for_model(kind, **TINY).tie_word_embeddings
    for tie in (tied, not tied):
        model = save(tmp_path / str(tie), kind, tie_word_embeddings=tie)
        for size in (2, 4): # at 4, kv heads are replicated
            off = distance(tmp_path / str(tie), model, size)
            assert off < 1e-5, f"{kind}, tied={tie}, {size} processes: off by {off:.2g}"


ALWAYS = {"output_hidden_states", "return_dict", "output_attentions", "use_cache",
          "is_encoder_decoder", "tie_word_embeddings", "is_decoder", "add_cross_attention"}


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "internlm3"])
def test_no_option_of_a_config_makes_the_sum_wrong(kind, tmp_path):
    config = AutoConfig.for_model(kind, **TINY)
    for name, value in vars(config).items():
        if isinstance(value, bool) and name[0] != "_" and name not in ALWAYS:
            model = save(tmp_path / name, kind, **{name: not value})
            try:
                off = distance(tmp_path / name, model, 2)
            except ModelError as error: # by a shape: norms over heads
                assert "norm" in str(error), f"{kind}: {name}: {error}"
            else:
                assert off < 1e-5, f"{kind} with {name}={not value} is off by {off:.2g}"


@pytest.mark.skipif("internlm3" not in TYPES, reason="an older transformers")
def test_internlm3_with_biases(tmp_path):
    "Its two options must be equal."
    biases = dict(attention_bias=True, mlp_bias=True, bias=True, qkv_bias=True)
    model = save(tmp_path, "internlm3", **biases)
    assert distance(tmp_path, model, 2) < 1e-5


def test_types_are_let_in_by_name():
    kinds = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.keys()
    plans = {kind.model_type: getattr(kind, "base_model_tp_plan", None) for kind in kinds}
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi"} <= {*TYPES}
    assert all({*plans[kind].values()} <= STYLES for kind in TYPES)
    for kind in kinds:
        if kind.model_type not in PROVEN:
            assert refusal(object.__new__(kind)) # nothing but the class decides


# what a part is

@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen3"])
def saved(request, tmp_path_factory):
    "A folder with a tiny model, and the model."
    folder = tmp_path_factory.mktemp(request.param)
    load_model(request.param, load_format="dummy", device="cpu", dtype="float32",
               progress=False).save_pretrained(folder)
    return folder, load_model(str(folder), device="cpu", dtype="float32", progress=False)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_random_weights_are_those_of_one_process(saved, size):
    folder, model = saved
    _, from_files = parts_of(folder, size)
    _, random = parts_of(folder, size, load_format="dummy")
    for a, b in zip(from_files, random, strict=True):
        own, other = a.state_dict(), b.state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_part_is_small_and_its_own(saved):
    folder, model = saved
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    for load_format in ("auto", "dummy"):
        _, parts = parts_of(folder, 2, load_format=load_format)
        for rank in parts:
            padding = weight_bytes(rank) - norms - (weight_bytes(model) - norms) // 2
            assert padding == 0
            assert rank.device == CPU and not rank.training
            for tensor in rank.parameters():
                assert tensor.is_contiguous() and not tensor.requires_grad
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, "holds the whole"


def test_a_part_looks_like_the_model(saved):
    folder, model = saved
    _, (first, second) = parts_of(folder, 2)
    assert type(first) is type(model) and first.dtype == model.dtype
    assert first.name_or_path == model.name_or_path
    assert first.get_input_embeddings().num_embeddings == 320 == first.config.vocab_size
    assert first.generation_config.to_dict() == model.generation_config.to_dict()
    assert eos_token_ids(second) == eos_token_ids(model)
    layer = first.model.layers[1]
    assert isinstance(layer.self_attn.o_proj, AllReduced)
    assert isinstance(layer.mlp.down_proj, AllReduced)
    expected = {f"{name}.base" if name.endswith(("o_proj", "down_proj")) else name
                for name in adaptable(model)}
    assert adaptable(first).keys() == expected
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert all(not buffer.is_meta for buffer in first.buffers())
    for own, whole in zip(first.buffers(), model.buffers(), strict=True):
        assert torch.equal(own, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_when_they_are_read(saved, dtype):
    folder, model = saved
    _, parts = parts_of(folder, 2, dtype=dtype)
    whole = model.model.layers[0].mlp.down_proj.weight
    got = [part.model.layers[0].mlp.down_proj.base.weight for part in parts]
    assert torch.equal(torch.cat(got, dim=1), whole.to(dtype))
    assert parts[0].dtype == parts[0].model.norm.weight.dtype == dtype


def test_a_bias_after_the_sum_is_added_once(tmp_path):
    model = save(tmp_path, attention_bias=True, mlp_bias=True)
    _, parts = parts_of(tmp_path, 4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        module = f"model.layers.0.{name}"
        own = [rank.get_submodule(module).base.bias for rank in parts]
        assert torch.equal(own[0], model.get_submodule(module).bias)
        assert own[1:] == [None] * 3
    assert distance(tmp_path, model, 4) < 1e-5


@pytest.mark.parametrize("tie", [True, False])
def test_more_rows_than_tokens(tie, tmp_path):
    "Five tokens on four processes: two, two, one and none."
    model = save(tmp_path, vocab_size=5, tie_word_embeddings=tie)
    ranks, parts = parts_of(tmp_path, 4)
    assert [len(own.lm_head.weight) for own in parts] == [2] * 4
    assert not parts[3].lm_head.weight.any() and not parts[2].lm_head.weight[1].any()
    ids = torch.tensor([[0, 1, 2, 3, 4, 4, 0]])
    got = logits(ranks, parts, ids, 5)
    torch.testing.assert_close(got, model(ids).logits)


def test_an_embedding_of_another_kind_stays_whole(tmp_path):
    model = save(tmp_path, "gemma")
    _, parts = parts_of(tmp_path, 2)
    for rank, own in enumerate(parts):
        embedding = own.get_input_embeddings()
        assert type(embedding) is type(model.get_input_embeddings()) is not nn.Embedding
        assert torch.equal(embedding.weight, model.lm_head.weight)
        rows = model.lm_head.weight[161 * rank:161 * rank + 161]
        assert torch.equal(own.lm_head.weight[:len(rows)], rows)


def test_rows_of_other_processes_are_zeros():
    weight, sums = nn.Parameter(torch.randn(3, 4)), []
    embedding = VocabParallelEmbedding(weight, 9, 3, lambda x: sums.append(x) or x)
    got = embedding(torch.tensor([[2, 3], [5, 6]]))
    assert torch.equal(got[0, 1], weight[0]) and torch.equal(got[1, 0], weight[2])
    assert not got[0, 0].any() and not got[1, 1].any() and len(sums) == 1


# files

def test_weights_in_several_files(tmp_path):
    model = save(tmp_path)
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert distance(tmp_path / "many", model, 2) < 1e-5


def changed(folder, **tensors):
    "Write tensors of a checkpoint anew; None takes one away."
    file = folder / "model.safetensors"
    kept = load_file(file) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in kept.items() if t is not None}, file,
              {"format": "pt"})


@pytest.mark.parametrize("name, tensor, words", [
    ("model.layers.1.mlp.up_proj.weight", None, ["lacks model.layers.1.mlp.up_proj.weight"]),
    ("model.norm.weight", None, ["lacks model.norm.weight"]),
    ("lm_head.weight", None, ["lacks lm_head.weight"]),
    ("model.embed_tokens.weight", torch.zeros(300, 64), ["[300, 64]", "[321, 64]"]),
    ("model.layers.0.self_attn.o_proj.weight", torch.zeros(64, 32), ["[64, 32]", "[64, 64]"]),
    ("model.layers.0.self_attn.q_proj.weight", torch.zeros(65, 64), ["[65, 64]", "[64, 64]"]),
    ("model.layers.0.input_layernorm.weight", torch.zeros(32), ["[32]", "[64]"])])
def test_a_checkpoint_that_does_not_fit(name, tensor, words, tmp_path):
    save(tmp_path, tie_word_embeddings=False)
    changed(tmp_path, **{name: tensor})
    with refuses(name, *words):
        parts_of(tmp_path, 2)


def test_a_folder_that_cannot_be_read(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678 no header")
    with refuses(str(tmp_path), "cannot read the weights"):
        parts_of(tmp_path, 2)
    (tmp_path / "model.safetensors").unlink()
    with refuses(str(tmp_path), "index.json"):
        parts_of(tmp_path, 2)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with refuses(str(tmp_path), "weight_map"):
        parts_of(tmp_path, 2)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_the_embedding_that_it_is_tied_to(same, tmp_path):
    "As transformers does it: they are one if they are equal, and two if not."
    model = save(tmp_path, tie_word_embeddings=True)
    head = model.lm_head.weight.detach().clone()
    changed(tmp_path, lm_head__weight=head if same else head + 1)
    _, parts = parts_of(tmp_path, 2)
    assert (parts[0].lm_head.weight is parts[0].model.embed_tokens.weight) == same
    whole = load_model(str(tmp_path), device="cpu", dtype="float32", progress=False)
    assert distance(tmp_path, whole, 2) < 1e-5


def test_a_hub_id_that_is_not_here():
    config = read_config("tiny-llama")
    with refuses("someone/nothing"):
        load_shard("someone/nothing", config, rank=0, size=2, all_reduce=None, device="cpu",
                   dtype=torch.float32, local_files_only=True)


def test_bytes_can_be_counted_without_any():
    config = read_config("qwen3-8b")
    own = load_shard("qwen3-8b", config, rank=0, size=8, all_reduce=None, device="meta",
                     dtype=torch.bfloat16, load_format="dummy")
    whole = dummy_model(config, torch.device("meta"), torch.bfloat16)
    assert 0 < weight_bytes(own) - weight_bytes(whole) / 8 < 2**20 # norms are not cut
    assert own.lm_head.weight.is_meta


def test_a_shard_by_name(saved, capfd):
    folder, model = saved
    more = dict(size=2, all_reduce=None, place=lambda kind: kind, device="cpu")
    own, config = load_rank(str(folder), rank=1, dtype="float32", **more)
    assert config.num_attention_heads == 4 and own.dtype == torch.float32
    assert re.search(r"2 processes on cpu, torch.float32 \(as asked\)", capfd.readouterr().err)
    _, (_, second) = parts_of(folder, 2)
    assert all(map(torch.equal, own.parameters(), second.parameters()))
    assert not load_rank(str(folder), rank=0, progress=False, **more)[0].training
    assert not capfd.readouterr().err
    with refuses("9 query heads", "among 2"):
        load_rank("smollm2-135m", rank=0, load_format="dummy", progress=False, **more)
    with refuses("nowhere"):
        load_rank("./nowhere", rank=0, progress=False, **more)
    with refuses("cuda:7", "does not work here"):
        load_rank(str(folder), rank=0, **more | {"place": lambda kind: "cuda:7"})


# who computes with it

def forwards():
    yield pytest.param(TransformersModel, id="transformers")
    yield pytest.param(Decoder, id="decoder")
    yield pytest.param(FusedDecoder, id="fused")


def make_forward(kind, model):
    try:
        return kind(model)
    except NativeError as error:
        pytest.skip(str(error))


def trials(ranks, fn, vocab=320):
    "The logits of the trial, of all ranks."
    return torch.cat(ranks.run(fn), dim=-1)[:, :vocab]


def paged(model):
    cache = PagedKVCache(model.config, 4, 4, model.dtype)
    return ReferenceAttention(cache, model.config.num_attention_heads)


@pytest.mark.parametrize("kind", forwards())
@pytest.mark.parametrize("size", [2, 4])
def test_every_forward_runs_a_part(saved, kind, size):
    folder, model = saved
    ranks, parts = parts_of(folder, size)
    calls = [make_forward(kind, own) for own in parts]
    got = trials(ranks, lambda rank: trial_logits(calls[rank], paged(parts[rank]), 320))
    right = trial_logits(TransformersModel(model), paged(model), 320)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_packing_finds_the_module_inside_the_sum(saved, monkeypatch):
    monkeypatch.setattr("nanollm.kernels.pays", lambda model: True)
    folder, model = saved
    ranks, parts = parts_of(folder, 2)
    calls = [make_forward(FusedDecoder, own) for own in parts]
    right = trial_logits(TransformersModel(model), paged(model), 320)
    for call in (lambda: None, lambda: [each.release() for each in calls]):
        call()
        got = trials(ranks, lambda rank: trial_logits(calls[rank], paged(parts[rank]), 320))
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    assert not any(type(module) is nn.Linear for own in parts for module in own.modules())
    assert type(parts[0].model.layers[0].mlp.down_proj.base) is PackedLinear


@pytest.mark.parametrize("kind", forwards())
@pytest.mark.parametrize("family", FAMILY)
def test_the_family_with_noise_and_biases(family, kind, tmp_path):
    "In float32, and packed where that pays."
    biases = dict(attention_bias=True, mlp_bias=True, attention_out_bias=True,
                  sliding_window=None)
    model = save(tmp_path, family, **biases)
    ranks, parts = parts_of(tmp_path, 2)
    calls = [make_forward(kind, own) for own in parts]
    got = trials(ranks, lambda rank: trial_logits(calls[rank], paged(parts[rank]), V), V)
    right = trial_logits(TransformersModel(model), paged(model), V)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [None, Decoder])
def test_the_trial_of_a_model_passes_on_all_ranks(saved, kind):
    ranks, parts = parts_of(saved[0], 2)
    ranks.run(lambda rank: check_model(parts[rank], kind and kind(parts[rank])))


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_tokens_as_generate(saved, size):
    folder, model = saved
    ranks, parts = parts_of(folder, size)
    for prompt in ([1, 2, 3, 4], [7, 8, 9], [250] * 20):
        ids = list(prompt)
        for _ in range(12):
            got = logits(ranks, parts, torch.tensor([ids]), 320)
            ids.append(int(got[0, -1].argmax()))
        assert ids[len(prompt):] == list(generate(model, prompt, 12))


def test_quantized_parts(saved):
    folder, model = saved
    ranks, parts = parts_of(folder, 2)
    for own in parts:
        quantize(own, "int8")
        assert not any(type(module) is nn.Linear for module in own.modules())
    right = model(IDS.clamp(max=319)).logits
    got = logits(ranks, parts, IDS.clamp(max=319), 320)
    assert (got - right).norm() / right.norm() < 0.1


# adapters

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("kind", forwards())
@pytest.mark.parametrize("size", [2, 4])
def test_an_adapter_is_cut_as_the_model_is(saved, kind, size, tmp_path):
    folder, _ = saved
    shape = "tiny-qwen3" if "qwen3" in str(folder) else "tiny-llama"
    model = lora_folders.tiny(shape)
    files = lora_folders.save(tmp_path / "adapter", shape=shape, only=MODULES)
    adapter = read_adapter(files, model, 16)
    pool = AdapterPool(model, 2, 16)
    pool.add(adapter)
    right = with_adapter(TransformersModel(model), pool, adapter.digest)
    plain = trial_logits(TransformersModel(model), paged(model), 320)
    assert (right - plain).norm() / plain.norm() > 0.1

    ranks, parts = parts_of(folder, size)
    pools, calls = [], []
    for rank, own in enumerate(parts):
        before = dict(split_pair(*item, own, rank, size) for item in adapter.weights.items())
        pools.append(AdapterPool(own, 2, 16))
        after = dict(split_pair(*item, own, rank, size) for item in adapter.weights.items())
        assert before.keys() == after.keys() == pools[rank].modules.keys()
        pools[rank].add(replace(adapter, weights=after))
        calls.append(make_forward(kind, own))
    got = trials(ranks, lambda rank: with_adapter(calls[rank], pools[rank], adapter.digest))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def with_adapter(forward, pool, digest):
    "The logits of the trial, both of its prompts with an adapter."
    call = LoRAForward(forward, pool)

    def run(token_ids, positions, attention, rows):
        batch = replace(attention.batch, adapters=[digest] * len(attention.batch.adapters))
        attention.batch = batch
        return call(token_ids, positions, attention, rows)

    with torch.inference_mode():
        return trial_logits(run, paged(forward.model), 320)


def test_pairs_cover_the_matrices(saved):
    folder, model = saved
    _, parts = parts_of(folder, 4)
    for name, module in adaptable(model).items():
        A, B = torch.randn(3, module.in_features), torch.randn(3, module.out_features)
        cut = [split_pair(name, (A, B), parts[0], rank, 4)[1] for rank in range(4)]
        if name.endswith(("o_proj", "down_proj")):
            assert torch.equal(torch.cat([a for a, _ in cut], 1), A)
            assert all(torch.equal(b, B) for _, b in cut)
        elif name.endswith(("k_proj", "v_proj")): # two heads on four processes
            assert torch.equal(torch.cat([b for _, b in cut[::2]], 1), B)
            assert torch.equal(cut[2][1], cut[3][1])
        else:
            assert torch.equal(torch.cat([b for _, b in cut], 1), B)
            assert all(torch.equal(a, A) for a, _ in cut)
