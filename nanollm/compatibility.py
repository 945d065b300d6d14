"""Try before use: which models run over blocks, and which attention reads them here."""

__all__ = ['logger', 'WISHES', 'HARMLESS', 'TRIAL_NAME', 'Forward', 'unsupported', 'trial_attention', 'trial_batch', 'check_model',
           'VarlenAttention', 'choose_attention']

import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from .model import ModelError
from .paged_attention import (FlatBatch, GroupedAttention, PagedAttention, PagedKVCache,
                              ReferenceAttention, TransformersModel, paged_attention)

logger = logging.getLogger(__name__)


def unsupported(config: PretrainedConfig) -> str | None: # None: nothing
    "Name what the config promises that paged attention does not do."
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if others := {*(kinds or ())} - {"full_attention"}:
        return f"layers of {', '.join(sorted(others))}"
    if window and not kinds and getattr(config, "use_sliding_window", True):
        return f"a sliding window of {window} tokens"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention (MLA)"
    if getattr(config, "attn_temperature_tuning", None):
        return "scores that depend on the position (attn_temperature_tuning)"
    rope = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", 0)
    if (rope.get("rope_type") == "longrope"
            and limit > rope.get("original_max_position_embeddings", limit)):
        return "positions that change with the longest request of a batch (longrope)"
    return None


WISHES = {"attention_mask": "a mask of its own", "look_ahead": "attention to later tokens",
          "sliding_window": "a sliding window", "softcap": "soft-capped scores",
          "s_aux": "attention sinks"}
HARMLESS = {"position_ids", "cache_position", "scaling"} # known from the batch, or passed on
TRIAL_NAME = "nanollm_trial"


def trial_attention(
    module, query, key, value, attention_mask, is_causal=None, paged=None, **kwargs
):
    "`paged_attention` for the trial. Raises ModelError if a layer wants more than the formula."
    kind = type(module).__name__
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    wishes = {"attention_mask": attention_mask, "look_ahead": not causal, **kwargs}
    for name, wish in wishes.items():
        if name not in HARMLESS and (isinstance(wish, torch.Tensor) or wish):
            raise ModelError(f"{kind} asks for {WISHES.get(name, name)}, "
                             "which paged attention does not compute")
    expected = paged.cache.layers[module.layer_idx].shape[3:] # (K, D)
    shapes = key.shape[1::2], value.shape[1::2], expected
    if not shapes[0] == shapes[1] == shapes[2]:
        keys, values, promised = (f"{heads} x {dim}" for heads, dim in shapes)
        raise ModelError(f"{kind} makes keys of {keys} and values of {values} numbers a token, "
                         f"and the config says {promised}")
    paged.layers_seen.append(module.layer_idx)
    scaling = kwargs.get("scaling")
    return paged_attention(module, query, key, value, attention_mask, scaling, paged)


AttentionInterface.register(TRIAL_NAME, trial_attention)


def trial_batch(
    prompts: Sequence[Sequence[int]], # B of them
    tables: Sequence[Sequence[int]], # B block tables
    parts: Sequence[tuple[int, int]], # B of them: first new token, and the one after the last
    block_size: int,
) -> FlatBatch: # with logits for all tokens
    "Write parts of several prompts as one flat row."
    places = [range(start, end) for start, end in parts]
    token_ids = [prompt[i] for prompt, row in zip(prompts, places) for i in row]
    return FlatBatch(
        token_ids=token_ids,
        positions=[i for row in places for i in row],
        slots=[table[i // block_size] * block_size + i % block_size
               for table, row in zip(tables, places) for i in row],
        query_lens=[len(row) for row in places],
        context_lens=[end for _, end in parts],
        block_tables=[list(table) for table in tables],
        rows=list(range(len(token_ids))),
        adapters=[None] * len(parts))


Forward = Callable[[torch.Tensor, torch.Tensor, PagedAttention, torch.Tensor], torch.Tensor]


@torch.inference_mode()
def check_model(
    model: PreTrainedModel,
    forward: Forward | None = None, # another way to compute it; None: `TransformersModel`
) -> None:
    "Raise ModelError, with the reason, unless a trial over blocks equals the model itself."
    config, kind = model.config.get_text_config(), type(model).__name__
    if found := unsupported(config):
        raise ModelError(f"{kind} has {found}, which paged attention does not compute")
    if not model._supports_attention_backend:
        raise ModelError(f"{kind} has attention code of its own, "
                         "which cannot be replaced by paged attention")
    vocab_size = model.get_input_embeddings().num_embeddings
    prompts = [[(37 * i + 5) % vocab_size for i in range(7)],
               [(11 * i + 3) % vocab_size for i in range(5)]]
    steps = [(0, 4), (0, 3)], [(4, 7), (3, 5)] # the second one starts in the middle
    attention = ReferenceAttention(PagedKVCache(config, 4, 4, model.dtype, model.device),
                                   config.num_attention_heads)
    attention.layers_seen, parts = [], [[], []]
    try:
        for step in steps:
            batch = trial_batch(prompts, [[0, 1], [3, 2]], step, 4)
            attention.prepare(batch)
            tensors = map(attention.tensor, (batch.token_ids, batch.positions, batch.rows))
            token_ids, positions, rows = tensors
            run = forward or TransformersModel(model, TRIAL_NAME)
            logits = run(token_ids, positions, attention, rows)
            for own, new in zip(parts, logits.split(batch.query_lens)):
                own.append(new)
        right = [model(attention.tensor(prompt)[None], use_cache=False).logits[0]
                 for prompt in prompts]
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{kind} does not run on paged attention: {error}") from error
    num_layers = len(attention.cache.layers)
    if forward is None and attention.layers_seen != 2 * list(range(num_layers)):
        num_calls = len(attention.layers_seen)
        raise ModelError(f"{kind} called its attention {num_calls} times in two steps of "
                         f"{num_layers} layers: paged attention wants one call a layer")
    a = torch.cat([*parts[0], *parts[1]]).float() # (12, V)
    b = torch.cat(right).float() # (12, V)
    off = ((a - b).norm() / b.norm()).item()
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    if not off <= limit:
        raise ModelError(f"{kind} gives other logits over blocks than by itself: "
                         f"they are off by {off:.2g}, and {limit:g} is the limit")


class VarlenAttention(PagedAttention):
    "PyTorch's FlashAttention reads blocks where they lie (CUDA, 16 bit, torch 2.12 or later)."

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
    "Return `VarlenAttention` if a trial agrees with the reference, else `GroupedAttention`."
    H, D = model.config.get_text_config().num_attention_heads, cache.layers[0].shape[4]
    grouped, varlen = GroupedAttention(cache, H), VarlenAttention(cache, H)
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return grouped
    table = list(range(min(2, cache.num_blocks)))[::-1]
    n = len(table) * cache.block_size
    first, last = (trial_batch([[0] * n], [table], [part], cache.block_size)
                   for part in ((0, n - 1), (n - 1, n)))
    noise = torch.Generator(model.device).manual_seed(0)
    K, where = cache.layers[0].shape[3], dict(dtype=model.dtype, device=model.device)
    q, k, v = (torch.empty(n, heads, D, **where).normal_(generator=noise)
               for heads in (H, K, K))
    try:
        for batch in (first, last) if n > 1 else (last,):
            own, results = batch.positions, []
            for attention in (varlen, ReferenceAttention(cache, H)):
                attention.prepare(batch)
                results.append(attention(q[own], k[own], v[own], 0, D ** -0.5))
            torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
        return varlen
    except Exception as error:
        logger.info("paged kernels are not used: %s", error)
        return grouped
    finally:
        cache.erase(first.slots + last.slots)
