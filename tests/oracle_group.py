"""Two processes that share a tiny model, with a cache that all schedules of the oracle use."""

from nanollm.kernels import FusedDecoder
from nanollm.lora import LoRAForward
from nanollm.paged_attention import PagedKVCache
from nanollm.streamed_attention import streamed
from nanollm.tensor_parallel import start

NUM_BLOCKS, BLOCK_SIZE, MAX_LORAS, MAX_RANK = 64, 4, 3, 4


def parts(shape, group):
    "A runner, and a pool of adapters, of one of the processes."
    model = group.load(shape, load_format="dummy", device="cpu", dtype="float32",
                       progress=False)
    group.ready()
    pool = group.pool(model, MAX_LORAS, MAX_RANK)
    cache = PagedKVCache(model.config, NUM_BLOCKS, BLOCK_SIZE)
    attention = streamed(cache, model.config.num_attention_heads)
    return group.runner(LoRAForward(FusedDecoder(model), pool), attention), pool


def follow(shape, group):
    "What the other process does."
    runner, pool = parts(shape, group)
    group.follow(runner, [pool])


def lead(shape):
    "The driver's parts, once the other process has its own."
    return parts(shape, start(follow, shape, 2, threads=1))
