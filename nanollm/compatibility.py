"""Try before use: which models run over blocks, and which attention reads them fastest here."""

__all__ = ['WISHES', 'HARMLESS', 'TRIAL_NAME', 'TRIAL', 'trial_attention', 'unsupported', 'check_model', 'VarlenAttention',
           'choose_attention']

import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from .model import ModelError
from .paged_attention import (FlatBatch, GroupedAttention, PagedAttention, PagedKVCache, ReferenceAttention, TransformersModel,
                              paged_attention)

logger = logging.getLogger(__name__)


WISHES = {"attention_mask": "a mask of its own", "look_ahead": "attention to later tokens",
          "sliding_window": "a sliding window", "softcap": "soft-capped scores", "s_aux": "attention sinks"}
HARMLESS = {"position_ids", "cache_position"} # the batch knows the positions
TRIAL_NAME = "nanollm_trial"


def trial_attention(module, query, key, value, attention_mask, is_causal=None, paged=None, **kwargs):
    "`paged_attention` for the trial. Raises ModelError if a layer wants what the formula does not say."
    kind = type(module).__name__
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scaling = kwargs.pop("scaling", None)
    for name, wish in {"attention_mask": attention_mask, "look_ahead": not causal, **kwargs}.items():
        if name not in HARMLESS and (isinstance(wish, torch.Tensor) or wish):
            raise ModelError(f"{kind} asks for {WISHES.get(name, name)}, which paged attention does not compute")
    expected = paged.cache.layers[module.layer_idx].shape[3:] # (K, D)
    if not key.shape[1::2] == value.shape[1::2] == expected:
        sizes = [f"{heads} x {dim}" for heads, dim in (key.shape[1::2], value.shape[1::2], expected)]
        raise ModelError(f"{kind} makes keys of {sizes[0]} and values of {sizes[1]} numbers a token, "
                         f"and the config says {sizes[2]}")
    paged.layers_seen.append(module.layer_idx)
    return paged_attention(module, query, key, value, attention_mask, scaling, paged)


AttentionInterface.register(TRIAL_NAME, trial_attention)


def unsupported(config: PretrainedConfig) -> str | None: # None: nothing
    "Name what the config promises that paged attention does not do."
    if kinds := {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
        return f"layers of {', '.join(sorted(kinds))}"
    window, limit = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", 0)
    if window and not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True):
        return f"a sliding window of {window} tokens"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention (MLA)"
    if getattr(config, "attn_temperature_tuning", None):
        return "scores that depend on the position (attn_temperature_tuning)"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and limit > rope.get("original_max_position_embeddings", limit):
        return "positions that change with the longest request of a batch (longrope)"
    return None


Forward = Callable[[torch.Tensor, torch.Tensor, PagedAttention, torch.Tensor], torch.Tensor]
TRIAL = ((7, 4), (5, 3)) # of two requests: tokens, and how many of them are computed in the first step


@torch.inference_mode()
def check_model(
    model: PreTrainedModel,
    forward: Forward | None = None, # another way to compute the model; None: `TransformersModel`
) -> None:
    "Raise ModelError, with the reason, unless a ragged trial over blocks equals the model's own forward."
    config, kind = model.config.get_text_config(), type(model).__name__
    if found := unsupported(config):
        raise ModelError(f"{kind} has {found}, which paged attention does not compute")
    if not model._supports_attention_backend:
        raise ModelError(f"{kind} has attention code of its own, which cannot be replaced by paged attention")
    cache = PagedKVCache(config, 4, 4, model.dtype, model.device)
    attention, got = ReferenceAttention(cache, config.num_attention_heads), [[], []]
    attention.layers_seen = []
    vocab_size = model.get_input_embeddings().num_embeddings
    prompts = [[(37 * i + 11 * j + 5) % vocab_size for j in range(n)] for i, (n, _) in enumerate(TRIAL)]
    tables, parts = [[0, 1], [3, 2]], [[(0, first), (first, n)] for n, first in TRIAL]
    try:
        for step in range(2):
            batch = _trial_batch(prompts, tables, [part[step] for part in parts], cache.block_size)
            attention.prepare(batch)
            ids, positions, rows = (attention.tensor(x) for x in (batch.token_ids, batch.positions, batch.rows))
            logits = (forward or TransformersModel(model, TRIAL_NAME))(ids, positions, attention, rows)
            for own, new in zip(got, logits.split(batch.query_lens)):
                own.append(new)
        right = [model(attention.tensor(prompt)[None], use_cache=False).logits[0] for prompt in prompts]
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{kind} does not run on paged attention: {error}") from error
    if forward is None and attention.layers_seen != 2 * list(range(len(cache.layers))):
        raise ModelError(f"{kind} called its attention {len(attention.layers_seen)} times in two steps of "
                         f"{len(cache.layers)} layers: paged attention wants one call a layer")
    a, b = torch.cat([x for own in got for x in own]).float(), torch.cat(right).float() # (12, V)
    off, limit = ((a - b).norm() / b.norm()).item(), 1e-3 if model.dtype == torch.float32 else 0.1
    if not off <= limit:
        raise ModelError(f"{kind} gives other logits over blocks than by itself: they are off by {off:.2g}, "
                         f"and {limit:g} is the limit")


def _trial_batch(prompts, tables, parts, size):
    positions = [range(start, end) for start, end in parts]
    return FlatBatch(
        [prompt[i] for prompt, row in zip(prompts, positions) for i in row], [i for row in positions for i in row],
        [table[i // size] * size + i % size for table, row in zip(tables, positions) for i in row],
        [end - start for start, end in parts], [end for _, end in parts], tables,
        list(range(sum(end - start for start, end in parts))), [None] * len(parts))


class VarlenAttention(PagedAttention):
    "PyTorch's FlashAttention reads the blocks where they lie (CUDA, 16 bit, torch 2.12 or later)."

    def prepare(self, batch: FlatBatch) -> None:
        super().prepare(batch)
        width = max(map(len, batch.block_tables))
        tables = [[*table, *[0] * (width - len(table))] for table in batch.block_tables]
        starts = [0, *accumulate(batch.query_lens)]
        self.options = dict(
            cu_seq_q=self.tensor(starts, torch.int32), cu_seq_k=None,
            max_q=max(batch.query_lens), max_k=max(batch.context_lens),
            seqused_k=self.tensor(batch.context_lens, torch.int32),
            block_table=self.tensor(tables, torch.int32))

    def attend(self, query: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn
        if "block_table" not in inspect.signature(varlen_attn).parameters:
            raise RuntimeError(f"varlen_attn of PyTorch {torch.__version__} takes no block_table: "
                               "2.12 or later is needed")
        k, v = self.cache.layers[layer].unbind(2) # (N, P, K, D)
        return varlen_attn(query, k, v, **self.options, scale=scaling, window_size=(-1, 0),
                           enable_gqa=True, num_splits=1)


def choose_attention(
    model: PreTrainedModel,
    cache: PagedKVCache, # the one to be used, still empty
) -> PagedAttention:
    "Return `VarlenAttention` if it runs here and agrees with the reference in a trial, else `GroupedAttention`."
    H = model.config.get_text_config().num_attention_heads
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return GroupedAttention(cache, H)
    blocks, size = list(range(min(2, cache.num_blocks)))[::-1], cache.block_size
    n, (K, D) = len(blocks) * size, cache.layers[0].shape[3:]
    m = min(3, n)
    slots = [blocks[i // size] * size + i % size for i in range(n)]
    batch = FlatBatch([0] * n, list(range(n)), slots, [n], [n], [blocks], [0], [None])
    last = FlatBatch([0] * m, list(range(n - m, n)), slots[-m:], [m], [n], [blocks], [0], [None])
    noise = torch.Generator(model.device).manual_seed(0)
    q, k, v = (torch.empty(n, heads, D, dtype=model.dtype, device=model.device).normal_(generator=noise)
               for heads in (H, K, K))
    chosen = VarlenAttention(cache, H)
    try:
        for part in (batch, last):
            results = []
            for attention in (chosen, ReferenceAttention(cache, H)):
                attention.prepare(part)
                t = len(part.slots)
                results.append(attention(q[-t:], k[-t:], v[-t:], 0, D ** -0.5))
            torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
    except Exception as error:
        logger.info("paged kernels are not used: %s", error)
        chosen = GroupedAttention(cache, H)
    cache.erase(slots)
    return chosen
