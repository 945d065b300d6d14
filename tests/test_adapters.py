"""Adapters as files: what is read, and what is refused with which words."""

import json
import os
import pickle

import pytest
import torch
from lora_folders import random_tensors, save, tiny

from nanollm.adapters import AdapterError, read_adapter

torch.set_num_threads(1)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

# what is refused

CONFIGS = [
    (dict(use_dora=True), "use_dora=True cannot be served: DoRA also scales the rows"),
    (dict(bias="all"), "bias='all' cannot be served: biases of the model"),
    (dict(bias="lora_only"), "bias='lora_only' cannot"),
    (dict(lora_bias=True), "lora_bias=True cannot"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save=.'lm_head'. cannot be served: whole"),
    (dict(trainable_token_indices=[1]), "embeddings of tokens"),
    (dict(target_parameters=["mlp.experts.gate_up_proj"]), "belong to no linear module"),
    (dict(layer_replication=[[0, 2]]), "another model"),
    (dict(alora_invocation_tokens=[1, 2]), "aLoRA"),
    (dict(init_lora_weights="pissa"), "='pissa' cannot be served: its training"),
    (dict(init_lora_weights="pissa_niter_16"), "changing the base"),
    (dict(init_lora_weights="olora"), "changing the base"),
    (dict(init_lora_weights="corda"), "changing the base"),
    (dict(init_lora_weights="loftq"), "changing the base"),
    (dict(loftq_config={"loftq_bits": 4}), "loftq_config=.* not known here"),
    (dict(corda_config={"a": 1}), "corda_config=.* not known here"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out=True cannot be served: this is not known"),
    (dict(use_qalora=True), "use_qalora=True"),
    (dict(use_something_new={"x": 1}), "use_something_new=.* not known here"),
    (dict(peft_type="IA3"), "peft_type must be LORA, got 'IA3'"),
    (dict(peft_type=None), "peft_type must be LORA, got None"),
    (dict(r=8), "matrices of rank 4, and by the config the rank is 8"),
    (dict(rank_pattern={"q_proj": 5}), "q_proj has matrices of rank 4, and by .* is 5"),
    (dict(r=0), "no scale for .*ZeroDivisionError"), (dict(r=None), "no scale for .*TypeError"),
    (dict(lora_alpha="8"), "no scale for .*TypeError"),
    (dict(lora_alpha=float("nan")), "the scale nan"),
    (dict(lora_alpha=1e400), "the scale inf"),
    (dict(r=-4, use_rslora=True), "no scale for .*ValueError"),
    (dict(alpha_pattern=[1]), "no scale for .*AttributeError"),
    (dict(alpha_pattern={"(": 1}), "no scale for .*"),
    (dict(alpha_pattern={"(q|q)*": 1}), "could take for ever"),
    (dict(rank_pattern={"(m|m)(o|o)(d|d)(e|e)": 1}), "could take for ever"),
    (dict(rank_pattern={str(i): 1 for i in range(1025)}), "1025 patterns are too many: 1024"),
]


@pytest.mark.parametrize(("config", "why"), CONFIGS)
def test_configs_that_are_refused(tmp_path, config, why):
    model = tiny()
    read_adapter(save(tmp_path / "good"), model, 16)
    size = config.get("r", 4)
    if config.get("init_lora_weights") or size != 4:
        config = config | dict(target_modules=["q_proj"])
    folder = save(tmp_path / "bad", random_tensors(), **config)
    with pytest.raises(AdapterError, match=why):
        read_adapter(folder, model, 16)


def spoilt(change):
    "Good tensors after a change."
    tensors = random_tensors()
    change(tensors)
    return tensors


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


TENSORS = [
    (put("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 64)), "1 of 9 tensors .*"
     "lm_head.lora_A.weight: names must be like base_model.model.model.layers.0.* nor"),
    (put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 9)), "embe"),
    (put(f"{Q0}.lora_magnitude_vector", torch.zeros(64)), "1 of 9 tensors are of no"),
    (put(f"{Q0}.lora_B.bias", torch.zeros(64)), "lora_B.bias"),
    (put(f"{Q0}.base_layer.weight", torch.zeros(64, 64)), "base_layer"),
    (put("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
         torch.zeros(4, 64)), "layers.2"),
    (put("base_model.model.model.layers.0.input_layernorm.weight", torch.zeros(64)), "norm"),
    (lambda tensors: tensors.pop(f"{Q0}.lora_A.weight"), "has a matrix B alone"),
    (put(f"{Q0}.lora_A.weight", torch.zeros(4, 63)), "shapes .*, and the module turns 64 numb"),
    (put(f"{Q0}.lora_B.weight", torch.zeros(64, 3)), "shapes "),
    (put(f"{Q0}.lora_A.weight", torch.zeros(4)), "shapes "),
    (put(f"{Q0}.lora_A.weight", torch.zeros(4, 64).fill_(torch.nan)), "NaN or infinite"),
    (put(f"{Q0}.lora_B.weight", torch.full((64, 4), torch.inf)), "NaN or infinite"),
    (put(f"{Q0}.lora_B.weight", torch.full((64, 4), 3e38)), "infinite in torch.float32"),
    (lambda tensors: tensors.clear(), "0 of 0 tensors"),
]


@pytest.mark.parametrize(("change", "why"), TENSORS)
def test_tensors_that_are_refused(tmp_path, change, why):
    folder = save(tmp_path, spoilt(change))
    with pytest.raises(AdapterError, match=why):
        read_adapter(folder, tiny(), 16)


def test_a_wrong_prefix_does_not_pass_as_an_adapter_without_effect(tmp_path):
    for i, (old, new) in enumerate([("base_model.model.", ""), ("model.layers", "layers"),
                                    ("base_model.model.", "base_model.model.model.")]):
        tensors = {key.replace(old, new, 1): t for key, t in random_tensors().items()}
        folder = save(tmp_path / str(i), tensors)
        with pytest.raises(AdapterError, match="8 of 8 tensors are of no linear module"):
            read_adapter(folder, tiny(), 16)


def test_too_large_a_rank(tmp_path):
    folder = save(tmp_path, r=5)
    assert read_adapter(folder, tiny(), 5).rank == 5
    with pytest.raises(AdapterError, match="_proj has rank 5, and max_lora_rank=4 is the l"):
        read_adapter(folder, tiny(), 4)


class Trap:
    def __reduce__(self):
        return print, ("a pickle has run",)


def test_a_pickle_is_not_read(tmp_path, capsys):
    save(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(AdapterError, match="adapter_model.bin is a pickle, which could"):
        read_adapter(tmp_path, tiny(), 16)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="safetensors cannot be read"):
        read_adapter(tmp_path, tiny(), 16)
    assert capsys.readouterr().out == ""


def test_files_that_are_no_adapter(tmp_path):
    model, config = tiny(), tmp_path / "adapter_config.json"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    nowhere = tmp_path / "nowhere", tmp_path / "a\0b", tmp_path / ("x" * 300)
    for path in (tmp_path, loop, *nowhere):
        with pytest.raises(AdapterError, match="adapter_config.json cannot be read") as caught:
            read_adapter(path, model, 16)
        assert "tmp" not in str(caught.value) # who asks from far away need not know
    os.mkfifo(config)
    with pytest.raises(AdapterError, match="must be a regular file of at most 1,048,576"):
        read_adapter(tmp_path, model, 16)
    config.unlink()
    config.mkdir()
    with pytest.raises(AdapterError, match="must be a regular file"):
        read_adapter(tmp_path, model, 16)
    config.rmdir()
    save(tmp_path)
    for text in ("", "[1, 2]", "[" * 100_000, "\xff", '{"peft_type": "LORA"', "null"):
        config.write_text(text, encoding="latin1")
        with pytest.raises(AdapterError, match="adapter_config.json (is no JSON|must hold)"):
            read_adapter(tmp_path, model, 16)
    config.write_text(json.dumps({"a": "x" * 2**20}))
    with pytest.raises(AdapterError, match="of at most 1,048,576 bytes, got 1,048,5"):
        read_adapter(tmp_path, model, 16)
    save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for data in (b"", whole[:-1], whole[:100], whole[4:], b"\xff" * 64):
        weights.write_bytes(data)
        with pytest.raises(AdapterError, match="safetensors cannot be read"):
            read_adapter(tmp_path, model, 16)
    os.truncate(weights, 2**40) # sparse: it takes no room, and would take all to read
    with pytest.raises(AdapterError, match="of at most 1,1.*, got 1,099,511,627,776"):
        read_adapter(tmp_path, model, 16)


def test_the_digest_is_of_the_bytes_and_not_of_name_or_place(tmp_path):
    model = tiny()
    one, same = (read_adapter(save(tmp_path / name), model, 16).digest for name in "ab")
    other = read_adapter(save(tmp_path / "c", seed=1), model, 16).digest
    scaled = read_adapter(save(tmp_path / "d", lora_alpha=9), model, 16).digest
    assert one == same and len({one, other, scaled}) == 3
