"""Folders of adapters for tests: random matrices under peft's names, and peft's own model."""

import json
from functools import cache

import torch
from safetensors.torch import save_file

from nanollm.adapters import adaptable
from nanollm.model import load_model

CONFIG = dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=8, bias="none",
              target_modules=["q_proj"], lora_dropout=0.0, init_lora_weights=True)


def tiny(shape="tiny-llama", dtype=torch.float32):
    "A model of its own: a pool replaces its modules."
    return load_model(shape, load_format="dummy", device="cpu", dtype="float32",
                      progress=False).to(dtype)


@cache
def shapes_of(shape):
    "Module name to (in, out)."
    return {name: (module.in_features, module.out_features)
            for name, module in adaptable(tiny(shape)).items()}


def random_tensors(shape="tiny-llama", only=("q_proj", "v_proj"), rank=4, seed=0, scale=0.3):
    "Matrices for the modules whose names end so; `rank` may be a function of the name."
    noise, tensors = torch.Generator().manual_seed(seed), {}
    for name, (width, out) in shapes_of(shape).items():
        if name.endswith(tuple(only)):
            r = rank(name) if callable(rank) else rank
            for side, size in (("A", (r, width)), ("B", (out, r))):
                numbers = torch.randn(size, generator=noise) * scale
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = numbers
    return tensors


def save(folder, tensors=None, shape="tiny-llama", seed=0, only=("q_proj", "v_proj"), **config):
    "Write an adapter as peft does; return the folder."
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | dict(target_modules=list(only)) | config
    if tensors is None:
        tensors = random_tensors(shape, only, config["r"], seed)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def by_peft(folder, shape="tiny-llama", dtype=torch.float32):
    "The base with an adapter, as peft computes it."
    from peft import PeftModel
    model = PeftModel.from_pretrained(tiny(shape), folder).get_base_model().to(dtype)
    return model.eval().requires_grad_(False)
