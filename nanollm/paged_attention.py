"""Attention over keys and values in blocks, for requests of any length in one flat row."""

__all__ = ['FlatBatch', 'zeros', 'PagedKVCache', 'PagedAttention', 'ReferenceAttention', 'Group',
           'group_requests', 'GATHER_BYTES', 'GroupedAttention', 'NAME', 'paged_attention', 'TransformersModel', 'attention_of']

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from .model import kv_shape


@dataclass(frozen=True)
class FlatBatch:
    "What one step computes: the new tokens of B requests in one row of T, as plain lists."
    token_ids: list[int] # T
    positions: list[int] # T
    slots: list[int] # T: where the keys and values go, block * block_size + offset
    query_lens: list[int] # B: new tokens of each request, in the order of the row
    context_lens: list[int] # B: its tokens so far, new ones included
    block_tables: list[list[int]] # B
    rows: list[int] # places in the row for which logits are wanted
    adapters: list[str | None] # B


def zeros(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: str | torch.device,
) -> torch.Tensor:
    "Return zeros; on a CPU their memory is not taken before it is written to."
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    data = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


class PagedKVCache:
    "The keys and values of all blocks: one tensor (N, P, 2, K, D) per layer."

    def __init__(
        self,
        config: PretrainedConfig,
        num_blocks: int, # N
        block_size: int, # P, tokens per block
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.num_blocks, self.block_size = num_blocks, block_size
        num_layers, K, D = kv_shape(config)
        shape = num_blocks, block_size, 2, K, D # zeros: what is masked must be a number, too
        self.layers = [zeros(shape, dtype, device) for _ in range(num_layers)]

    @property
    def nbytes(self) -> int: return sum(layer.nbytes for layer in self.layers)
    @property
    def device(self) -> torch.device: return self.layers[0].device

    def write(
        self,
        layer: int,
        slots: torch.Tensor, # (T,)
        key: torch.Tensor, # (T, K, D)
        value: torch.Tensor, # (T, K, D)
    ) -> None:
        "Store the keys and values of T tokens in their slots."
        kv = torch.stack([key, value], dim=1) # (T, 2, K, D)
        self.layers[layer].flatten(0, 1).index_copy_(0, slots, kv)

    def erase(self, slots: Sequence[int]) -> None:
        "Put zeros into slots: what is no number must not reach who gets the block next."
        where = torch.tensor(slots, device=self.device)
        for layer in self.layers:
            layer.flatten(0, 1).index_fill_(0, where, 0)


class PagedAttention:
    "What a layer calls: it stores the new keys and values, then attends over blocks."

    def __init__(
        self,
        cache: PagedKVCache,
        num_heads: int, # H, query heads
    ):
        self.cache, self.num_heads = cache, num_heads

    def tensor(self, values: Sequence, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        "Bring a list to the device."
        return torch.tensor(values, dtype=dtype).to(self.cache.device, non_blocking=True)

    def prepare(self, batch: FlatBatch) -> None:
        "Do what is the same for all layers of a step."
        self.batch, self.slots = batch, self.tensor(batch.slots)
        self.finite = None # (T,), after the last layer: whose keys and values are numbers

    def __call__(
        self,
        query: torch.Tensor, # (T, H, D)
        key: torch.Tensor, # (T, K, D)
        value: torch.Tensor, # (T, K, D)
        layer: int,
        scaling: float,
    ) -> torch.Tensor: # (T, H, D), contiguous
        "Store keys and values; then each new token looks at itself and all before it."
        self.cache.write(layer, self.slots, key, value)
        if layer == len(self.cache.layers) - 1: # no number in one layer is none in the next
            both = torch.cat([key, value], dim=1) # (T, 2 * K, D)
            self.finite = both.isfinite().flatten(1).all(-1)
        return self.attend(query, layer, scaling)

    def attend(self, query: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
        "Compute attention, (T, H, D), over keys and values that are all in the cache."
        raise NotImplementedError


class ReferenceAttention(PagedAttention):
    "Request by request, as the formula says."

    def attend(self, query: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
        batch, size, outputs = self.batch, self.cache.block_size, []
        parts = query.split(batch.query_lens)
        for q, table, end in zip(parts, batch.block_tables, batch.context_lens):
            blocks = self.tensor(table[:-(-end // size)])
            kv = self.cache.layers[layer][blocks].flatten(0, 1)[:end] # (S, 2, K, D)
            k, v = kv.repeat_interleave(q.shape[1] // kv.shape[2], dim=2).unbind(1) # (S, H, D)
            scores = torch.einsum("nhd,shd->hns", q, k) * scaling # (H, n, S)
            later = torch.ones_like(scores, dtype=torch.bool).triu(end - len(q) + 1)
            weights = scores.masked_fill(later, -torch.inf).float().softmax(-1).to(q.dtype)
            outputs.append(torch.einsum("hns,shd->nhd", weights, v))
        return torch.cat(outputs)


@dataclass(frozen=True)
class Group:
    "b requests that attend together: n new tokens each, contexts padded to M blocks."
    rows: torch.Tensor | None # where their tokens are in the flat row, (b * n,); None: all
    block_ids: torch.Tensor # (b * M,)
    bias: torch.Tensor # 0 where a token may look, -inf elsewhere, (b, 1, G * n or 1, M * P)


def group_requests(
    query_lens: Sequence[int],
    num_blocks: Sequence[int], # that hold the context of each request
    max_blocks: float = math.inf, # that a group of several may gather, padding included
) -> list[list[int]]: # indices
    "Put requests together that have as many new tokens, and contexts within a factor of two."
    groups = []
    for i in sorted(range(len(query_lens)), key=lambda i: (query_lens[i], -num_blocks[i])):
        group = groups[-1] if groups else [i]
        longest = num_blocks[group[0]]
        if (not groups or query_lens[i] != query_lens[group[0]] or num_blocks[i] * 2 < longest
                or (len(group) + 1) * longest > max_blocks):
            groups.append([])
        groups[-1].append(i)
    return groups


GATHER_BYTES = 2**21 # of a group on a CPU, keys and values of one layer


class GroupedAttention(PagedAttention):
    "Gather the blocks of whole groups of requests and attend with one kernel per group."

    def prepare(self, batch: FlatBatch) -> None:
        super().prepare(batch)
        num_blocks = [-(-end // self.cache.block_size) for end in batch.context_lens]
        on_cpu = self.cache.device.type == "cpu"
        limit = GATHER_BYTES / self.cache.layers[0][0].nbytes if on_cpu else math.inf
        members = group_requests(batch.query_lens, num_blocks, limit)
        starts = [0, *accumulate(batch.query_lens)]
        self.groups = [self._group(group, starts, num_blocks) for group in members]

    def _group(self, members, starts, num_blocks):
        batch, width = self.batch, num_blocks[members[0]] # the longest comes first
        n, layer = batch.query_lens[members[0]], self.cache.layers[0]
        tables = [batch.block_tables[i][:num_blocks[i]] for i in members]
        padded = [[*table, *[table[0]] * (width - len(table))] for table in tables]
        ends = self.tensor([batch.context_lens[i] for i in members])[:, None, None] # (b, 1, 1)
        last = ends - n + torch.arange(n, device=ends.device)[:, None] # positions, (b, n, 1)
        places = torch.arange(width * self.cache.block_size, device=ends.device) # (S,)
        hidden = places > last # (b, n, S)
        bias = torch.zeros(hidden.shape, dtype=layer.dtype, device=ends.device)
        bias.masked_fill_(hidden, -torch.inf)
        repeats = self.num_heads // layer.shape[3] if n > 1 else 1
        rows = [row for i in members for row in range(starts[i], starts[i + 1])]
        whole = rows == list(range(starts[-1]))
        return Group(None if whole else self.tensor(rows), self.tensor(padded).flatten(),
                     bias.repeat(1, repeats, 1)[:, None])

    def attend(self, query: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
        kv_layer = self.cache.layers[layer] # (N, P, 2, K, D)
        (_, H, D), K = query.shape, kv_layer.shape[3]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in self.groups:
            b = len(group.bias)
            kv = kv_layer.index_select(0, group.block_ids).view(b, -1, 2, K, D) # (b, S, 2, K, D)
            k, v = kv.transpose(1, 3).unbind(2) # (b, K, S, D)
            q = query if group.rows is None else query[group.rows]
            q = q.view(b, -1, K, H // K, D).permute(0, 2, 3, 1, 4) # (b, K, G, n, D)
            x = scaled_dot_product_attention(q.flatten(2, 3), k, v, group.bias, scale=scaling)
            x = x.view(q.shape).permute(0, 3, 1, 2, 4).reshape(-1, H, D) # (b * n, H, D)
            if group.rows is None:
                return x
            out[group.rows] = x
        return out


NAME = "nanollm_paged"


def paged_attention(
    module, query, key, value, attention_mask, scaling=None, paged=None, **kwargs
):
    "The function that transformers calls in every layer: q (1, H, T, D), k and v (1, K, T, D)."
    if paged is None:
        raise RuntimeError(f"the attention function {NAME} was called without a cache: "
                           "the model does not hand it down, or was not given it")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value)) # (T, heads, D)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    return paged(q.contiguous(), k, v, module.layer_idx, scaling)[None], None


AttentionInterface.register(NAME, paged_attention)


class TransformersModel:
    "An unmodified model of transformers, called with a flat row and an attention object."

    def __init__(
        self,
        model: PreTrainedModel,
        name: str = NAME, # of the attention function
    ):
        self.model, self.name = model, name

    def __call__(
        self,
        token_ids: torch.Tensor, # (T,)
        positions: torch.Tensor, # (T,)
        attention: PagedAttention, # prepared for this step
        rows: torch.Tensor, # places in the row for which logits are wanted, (R,)
    ) -> torch.Tensor: # (R, V)
        "Run the model on the flat row; its keys and values go into the cache."
        with attention_of(self.model, self.name):
            return self.model(input_ids=token_ids[None], position_ids=positions[None], use_cache=False,
                              logits_to_keep=rows, paged=attention).logits[0]


@contextlib.contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    "Let the model use another attention function inside the block."
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
