"What both the driver and the workers of a group run in tests: a part of a tiny model."

import os
import signal
import time

import torch

from nanollm.kernels import FusedDecoder
from nanollm.lora import LoRAForward
from nanollm.model import dummy_model, load_model, read_config
from nanollm.paged_attention import GroupedAttention, PagedKVCache, TransformersModel
from nanollm.quantization import Int8Linear, quantize
from nanollm.sharding import load_shard
from nanollm.tensor_parallel import PeerLost
from nanollm.transformer import Decoder

FORWARDS = {"decoder": Decoder, "fused": FusedDecoder, "transformers": TransformersModel}
SHAPES = "tiny-llama", "tiny-qwen3"
MAX_LORAS, MAX_RANK = 2, 4
NUM_BLOCKS, BLOCK_SIZE = 64, 8


def whole_model(shape):
    "The model that one process has."
    return load_model(shape, load_format="dummy", device="cpu", dtype="float32",
                      progress=False)


def part_of(group, shape, quantized=False):
    "This process's part of it."
    model = load_shard(shape, read_config(shape), rank=group.rank, size=group.size,
                       all_reduce=group.all_reduce, device="cpu", dtype=torch.float32,
                       load_format="dummy")
    return quantize(model, "int8", Int8Linear) if quantized else model


def runner_of(settings, group):
    "Load a part, and return what computes with it, and its adapters."
    shape = settings["shape"]
    model = part_of(group, shape, settings.get("quantized", False))
    group.ready()
    num_blocks = group.least(NUM_BLOCKS + group.rank)
    cache = PagedKVCache(model.config, num_blocks, BLOCK_SIZE)
    pool = None
    if settings.get("lora"):
        group.whole = dummy_model(read_config(shape), torch.device("meta"), torch.float32)
        pool = group.pool(model, MAX_LORAS, MAX_RANK)
    forward = FORWARDS[settings.get("forward", "decoder")](model)
    if pool is not None:
        forward = LoRAForward(forward, pool)
    kind = Spoilt if group.rank else GroupedAttention
    attention = kind(cache, model.config.num_attention_heads)
    return group.runner(forward, attention), pool


RAISES, DIES, SPOILT = 300, 301, 302  # tokens that tell a worker what to do


class Faulty:
    "A worker's runner that does what the last token of a batch says."

    def __init__(self, runner):
        self.runner = runner

    def forward(self, batch):
        if batch.token_ids[-1] == RAISES:
            raise ArithmeticError("this rank fails on purpose")
        if batch.token_ids[-1] == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.runner.forward(batch)


class Spoilt(GroupedAttention):
    "Makes of the keys of one token, in the last layer, what is no number."

    def __call__(self, query, key, value, layer, scaling):
        if layer == len(self.cache.layers) - 1 and SPOILT in self.batch.token_ids:
            key[self.batch.token_ids.index(SPOILT)] = torch.nan
        return super().__call__(query, key, value, layer, scaling)


def join(settings, group):
    "Be a worker."
    runner, pool = runner_of(settings, group)
    group.follow(Faulty(runner), [pool] if pool else [])


def refuse(settings, group):
    "Be a worker that cannot load."
    raise ValueError("there is no such model")


def forget(settings, group):
    "Be a worker that ends without a word."
    os._exit(3)


def leave(settings, group):
    "Be a worker that does not stay."


def miss(settings, group):
    "Be a worker that has waited in vain for another one."
    raise PeerLost("nobody is there")


def doze(settings, group):
    "Be a worker that never has loaded."
    time.sleep(60)
