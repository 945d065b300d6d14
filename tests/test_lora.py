"""Adapters: what is read and what refused; places; who may come in; nobody sees another's."""

import gc
import random
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_folders import by_peft, random_tensors, save, tiny
from no_waiting import NoWaiting
from torch import nn

from nanollm.adapters import AdapterError, adaptable, read_adapter
from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import Engine, ModelRunner
from nanollm.generate import generate
from nanollm.lora import (
    AdapterAdmission,
    AdapterPool,
    Adapters,
    LoRAForward,
    LoRALinear,
    LoRARequest,
)
from nanollm.model import swap_modules
from nanollm.paged_attention import (
    FlatBatch,
    GroupedAttention,
    PagedKVCache,
    ReferenceAttention,
    TransformersModel,
)
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import Request
from nanollm.sampling import SamplingParams
from nanollm.scheduler import RANKS, Scheduler, WholePrompts
from nanollm.trace import simulate
from nanollm.transformer import Decoder

torch.set_num_threads(1)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
PROMPT = [5, 17, 200, 3, 9, 9, 41]


def batch_of(adapters, lens, size=4):
    "A first step of requests with these adapters, and prompts of these lengths."
    tables, blocks = [], 0
    for n in lens:
        tables.append(list(range(blocks, blocks - (-n // size))))
        blocks += -(-n // size)
    ids = [(7 * i + 3 * j) % 256 for i, n in enumerate(lens) for j in range(n)]
    places = [(table, j) for table, n in zip(tables, lens) for j in range(n)]
    return FlatBatch(ids, [j for _, j in places],
                     [table[j // size] * size + j % size for table, j in places],
                     list(lens), list(lens), tables, list(range(len(ids))), list(adapters))


@torch.inference_mode()
def logits_of(forward, batch):
    "The logits of all tokens of a batch, request by request."
    model = forward.model
    cache = PagedKVCache(model.config, 64, 4, model.dtype)
    attention = ReferenceAttention(cache, model.config.num_attention_heads)
    attention.prepare(batch)
    ids, places, rows = map(attention.tensor, (batch.token_ids, batch.positions, batch.rows))
    return forward(ids, places, attention, rows).split(batch.query_lens)


def pooled(folders, kind=Decoder, shape="tiny-llama", dtype=torch.float32, model=None,
           **limits):
    "A forward with a pool that knows the adapters, and their digests."
    model = model or tiny(shape, dtype)
    forward = kind(model)
    pool = AdapterPool(model, **limits)
    digests = []
    for folder in folders:
        adapter = read_adapter(folder, model, pool.max_lora_rank)
        pool.add(adapter)
        digests.append(adapter.digest)
    return LoRAForward(forward, pool), digests


# the same numbers as peft

KINDS = {
    "plain": dict(only=ALL), "rslora": dict(only=("q_proj", "down_proj"), use_rslora=True),
    "alpha pattern": dict(only=("q_proj", "o_proj"), alpha_pattern={
        "q_proj": 2, "layers.1.self_attn.o_proj": 12, "model.layers.0.self_attn.q_proj": 64}),
    "anchored": dict(only=("q_proj",), alpha_pattern={
        "^model.layers.1.self_attn.q_proj": 3, r"layers\.\d\.self_attn\.[qk]_proj": 5}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize("forward", [Decoder, TransformersModel])
def test_a_mixed_batch_equals_pefts_own_models(tmp_path, kind, shape, forward):
    folders = [save(tmp_path / str(i), shape=shape, seed=i, **KINDS[kind]) for i in range(3)]
    run, digests = pooled(folders, forward, shape, torch.float64)
    batch = batch_of([digests[1], None, digests[0], digests[2], digests[1]], [5, 3, 1, 7, 2])
    models = {None: tiny(shape, torch.float64)} | {
        digest: by_peft(folder, shape, torch.float64)
        for digest, folder in zip(digests, folders)}
    start = 0
    for adapter, n, got in zip(batch.adapters, batch.query_lens, logits_of(run, batch)):
        ids = torch.tensor(batch.token_ids[start:start + n])[None]
        with torch.inference_mode():
            right = models[adapter](ids, use_cache=False).logits[0]
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5) # some norms are float32
        if adapter is not None and n > 1: # or this would prove nothing
            with torch.inference_mode():
                plain = models[None](ids, use_cache=False).logits[0]
            assert (right - plain).abs().max() > 0.01
        start += n


def test_a_module_equals_pefts_own_in_float64(tmp_path):
    "Without the float32 that is elsewhere in a model of transformers."
    folders = [save(tmp_path / str(i), seed=i, only=ALL, lora_alpha=7 + i, use_rslora=i > 0)
               for i in range(2)]
    run, digests = pooled(folders, dtype=torch.float64)
    batch = batch_of([digests[1], None, digests[0]], [2, 3, 4])
    run.pool.prepare(batch)
    right = {None: tiny(dtype=torch.float64)} | {
        digest: by_peft(folder, dtype=torch.float64)
        for digest, folder in zip(digests, folders)}
    for name, module in run.pool.modules.items():
        x = torch.randn(9, module.in_features, dtype=torch.float64)
        for adapter, own, got in zip(batch.adapters, x.split([2, 3, 4]),
                                     module(x).split([2, 3, 4])):
            found = right[adapter].get_submodule(name)(own)
            torch.testing.assert_close(got, found, rtol=1e-12, atol=1e-12)


def test_ranks_by_pattern(tmp_path):
    ranks = {"q_proj": 2, "layers.1.self_attn.v_proj": 7}

    def rank(name):
        return next((r for key, r in ranks.items() if name.endswith(key)), 4)
    tensors = random_tensors(rank=rank)
    folder = save(tmp_path / "a", tensors, rank_pattern=ranks, use_rslora=True)
    run, [digest] = pooled([folder], dtype=torch.float64)
    assert run.pool.adapters[digest].rank == 7
    batch = batch_of([digest, None], [6, 6])
    with torch.inference_mode():
        ids = torch.tensor(batch.token_ids[:6])[None]
        right = by_peft(folder, dtype=torch.float64)(ids, use_cache=False).logits[0]
    torch.testing.assert_close(logits_of(run, batch)[0], right, rtol=1e-3, atol=1e-5)


def test_an_adapter_saved_by_peft_itself(tmp_path):
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj", "up_proj"],
                        init_lora_weights=False, task_type="CAUSAL_LM", lora_dropout=0.1)
    get_peft_model(tiny(), config).save_pretrained(tmp_path)
    run, [digest] = pooled([tmp_path], dtype=torch.float64)
    batch = batch_of([digest], [6])
    with torch.inference_mode():
        ids = torch.tensor(batch.token_ids)[None]
        right = by_peft(tmp_path, dtype=torch.float64)(ids, use_cache=False).logits[0]
    torch.testing.assert_close(logits_of(run, batch)[0], right, rtol=1e-3, atol=1e-5)


# one batch, many adapters

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_rows_are_the_same_bit_for_bit(tmp_path, dtype):
    folders = [save(tmp_path / str(i), seed=i, only=ALL) for i in range(2)]
    run, digests = pooled(folders, dtype=dtype)
    lens = [5, 3, 4, 6]
    plain = logits_of(run, batch_of([None] * 4, lens))
    mixed = logits_of(run, batch_of([digests[0], None, digests[1], None], lens))
    for i, (before, after) in enumerate(zip(plain, mixed)):
        assert torch.equal(before, after) == (i % 2 == 1)


def test_numbers_that_overflow_stay_with_their_own_adapter(tmp_path):
    wild = {key: torch.full_like(t, 6e4) for key, t in random_tensors(only=ALL).items()}
    folders = [save(tmp_path / "wild", wild, lora_alpha=4), save(tmp_path / "b")]
    run, digests = pooled(folders, dtype=torch.float16)
    lens = [3, 4, 5]
    plain = logits_of(run, batch_of([None, None, digests[1]], lens))
    mixed = logits_of(run, batch_of([digests[0], None, digests[1]], lens))
    assert not mixed[0].isfinite().all()
    assert torch.equal(plain[1], mixed[1]) and mixed[2].isfinite().all()


def test_layers_that_no_adapter_of_the_step_changes_are_skipped(tmp_path, monkeypatch):
    folders = [save(tmp_path / "a", only=("layers.0.self_attn.q_proj",)),
               save(tmp_path / "b", only=("layers.1.mlp.up_proj", "layers.0.mlp.up_proj"))]
    run, (a, b) = pooled(folders)
    calls, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args: calls.append(1) or addmm(*args))
    for adapters, num in (([None], 0), ([a], 1), ([b, None], 2), ([a, b], 3), ([None], 0)):
        calls.clear()
        logits_of(run, batch_of(adapters, [2] * len(adapters)))
        assert len(calls) == num


class EightBits(nn.Module):
    "What a quantized module looks like: no weight that could be added to."

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = base.weight.abs().amax(1, keepdim=True) / 127
        self.codes = (base.weight / self.scale).round().to(torch.int8)

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * self.scale.to(x.dtype)).T


@pytest.mark.parametrize("kind", [Decoder, TransformersModel])
def test_over_modules_that_stand_in_the_place_of_linears(tmp_path, kind):
    def quantize(name, module):
        if isinstance(module, nn.Linear) and name != "lm_head":
            return EightBits(module)
    folder = save(tmp_path, only=ALL)
    run, [digest] = pooled([folder], kind, model=swap_modules(tiny(), quantize))
    batch = batch_of([None, digest], [4, 4])
    got = logits_of(run, batch)
    reference = swap_modules(by_peft(folder), lambda name, module: quantize(
        "", module) if name.endswith("base_layer") else None)
    right = reference(torch.tensor([batch.token_ids[4:]]), use_cache=False).logits[0]
    torch.testing.assert_close(got[1], right, rtol=1e-4, atol=1e-4)
    plain = logits_of(kind(swap_modules(tiny(), quantize)), batch)
    assert torch.equal(got[0], plain[0])


def test_names_stay_and_the_head_is_left_alone():
    model = tiny()
    names = list(adaptable(model))
    pool = AdapterPool(model)
    assert list(adaptable(model)) == names == list(pool.modules) and len(names) == 2 * 7
    assert not isinstance(model.lm_head, LoRALinear)
    assert all(not module.training for module in model.modules())


def test_a_module_that_gets_other_rows_says_so(tmp_path):
    run, [digest] = pooled([save(tmp_path)])
    run.pool.prepare(batch_of([digest], [5]))
    with pytest.raises(RuntimeError, match="got 3 rows in a step of 5 tokens"):
        run.pool.modules["model.layers.0.self_attn.q_proj"](torch.zeros(3, 64))


def test_after_a_step_and_after_a_failed_one_the_model_is_the_base(tmp_path):
    run, [digest] = pooled([save(tmp_path, only=ALL)])
    right = list(generate(tiny(), PROMPT, 5))
    logits_of(run, batch_of([digest], [4]))
    assert list(generate(run.model, PROMPT, 5)) == right
    batch = batch_of([digest], [4])
    batch.token_ids[0] = 320 # no token
    with pytest.raises(IndexError):
        logits_of(run, batch)
    assert list(generate(run.model, PROMPT, 5)) == right


def test_a_step_waits_for_no_device(tmp_path):
    "Neither to bring adapters into their places nor to choose among them."
    run, digests = pooled([save(tmp_path / str(i), seed=i, only=ALL) for i in range(2)])
    adapters, far = run.pool.adapters, AdapterPool(tiny().to("meta"), 2)
    far.adapters.update(adapters)
    known = [t for m in far.modules.values() for t in (m.A, m.B, *m.parameters())]
    module = far.modules["model.layers.0.mlp.up_proj"]
    x = torch.zeros(7, 64, device="meta")
    with torch.inference_mode(), NoWaiting(x, *known):
        far.prepare(batch_of([digests[0], None, digests[1]], [4, 1, 2]))
        assert module(x).shape == (7, 128) and far.selection.others.device.type == "meta"


# places

def test_slots_are_lent_to_the_last_used(tmp_path):
    folders = [save(tmp_path / str(i), seed=i) for i in range(4)]
    run, (a, b, c, d) = pooled(folders, max_loras=2)
    for adapters, held in (([a], [a]), ([b, None], [a, b]), ([a], [b, a]), ([c], [a, c]),
                           ([d, c], [c, d]), ([None], [c, d]), ([a, b], [a, b])):
        got = logits_of(run, batch_of(adapters, [3] * len(adapters)))
        assert set(run.pool.places) == set(held)
        fresh, _ = pooled(folders)
        for one, other in zip(got, logits_of(fresh, batch_of(adapters, [3] * len(adapters)))):
            torch.testing.assert_close(one, other)


def test_a_slot_keeps_nothing_of_whom_it_held_before(tmp_path):
    folders = [save(tmp_path / "wide", only=ALL, r=8, seed=1),
               save(tmp_path / "narrow", only=("q_proj",), r=2, seed=2),
               save(tmp_path / "other", only=ALL, r=3, seed=3)]
    run, (wide, narrow, other) = pooled(folders, max_loras=2)
    logits_of(run, batch_of([wide, other], [2, 2]))
    logits_of(run, batch_of([other], [2])) # so that wide is the one to go
    got = logits_of(run, batch_of([narrow, other], [5, 5]))
    fresh, _ = pooled(folders[1:])
    for one, right in zip(got, logits_of(fresh, batch_of([narrow, other], [5, 5]))):
        torch.testing.assert_close(one, right)


def test_more_adapters_than_slots_in_one_step_is_an_error(tmp_path):
    run, digests = pooled([save(tmp_path / str(i), seed=i) for i in range(3)], max_loras=2)
    with pytest.raises(RuntimeError, match="3 adapters in one step, and max_loras=2"):
        run.pool.prepare(batch_of(digests, [1, 1, 1]))


# with an engine

def make_engine(folders, max_loras=2, num_blocks=64, max_num_seqs=8, kind=Decoder,
                manager=PrefixCachingBlockManager, policy=None, **options):
    "An engine with a pool, and what gives names to adapters."
    model = tiny()
    forward = kind(model)
    pool = AdapterPool(model, max_loras)
    cache = PagedKVCache(model.config, num_blocks, 4)
    attention = GroupedAttention(cache, model.config.num_attention_heads)
    scheduler = Scheduler(manager(num_blocks, 4), policy or ChunkedPrefill(), max_num_seqs, 64,
                          admission=AdapterAdmission(max_loras))
    engine = Engine(ModelRunner(LoRAForward(forward, pool), attention), scheduler,
                    listeners=[pool], self_check=True, **options)
    adapters = Adapters(pool)
    for name, folder in folders.items():
        adapters.load(name, folder)
    return engine, adapters


def test_an_unknown_digest_ends_its_own_request_only(tmp_path):
    engine, adapters = make_engine({"a": save(tmp_path / "a")})
    digest = adapters.find("a")

    def ask(name, adapter):
        engine.add_request([*PROMPT], SamplingParams(max_tokens=6, temperature=0),
                           request_id=name, adapter=adapter)

    ask("base", None)
    ask("known", digest)
    alone = drain(engine)
    for name, adapter in ("base", None), ("unknown", "0" * 64), ("known", digest):
        ask(name, adapter)
    ends = {}
    while engine.has_unfinished:
        ends |= {out.request_id: out for out in engine.step() if out.finish_reason}
    assert ends["unknown"].finish_reason == "error" and not ends["unknown"].token_ids
    assert "no adapter '0000" in ends["unknown"].error
    for name in alone:
        ask(name, digest if name == "known" else None)
    assert drain(engine) == alone # and what "unknown" computed is shared with nobody
    assert {ends[name].finish_reason for name in alone} == {"length"}


def drain(engine):
    "Run to the end; the tokens of each request."
    answers, n = {}, 0
    while engine.has_unfinished:
        for out in engine.step():
            assert out.error is None
            answers.setdefault(out.request_id, []).extend(out.token_ids)
        n += 1
        assert n < 1000, "no progress"
    return answers


def tokens(n): return SamplingParams(max_tokens=n, temperature=0)


def right_tokens(folder, n=6, prompt=PROMPT):
    return list(generate(tiny() if folder is None else by_peft(folder), prompt, n))


def test_a_reload_under_the_same_name(tmp_path):
    "Old requests end on old weights beside new ones, and nobody reads keys of the other."
    folder = save(tmp_path / "a", only=ALL)
    engine, adapters = make_engine({"a": folder})
    long = PROMPT * 3
    old_right, base_right = right_tokens(folder, 8, long), right_tokens(None, 8, long)
    engine.add_request(long, tokens(8), request_id="old", adapter=adapters.find("a"))
    engine.add_request(long, tokens(8), request_id="base")
    engine.step()
    engine.step()
    old = adapters.find("a")
    save(tmp_path / "a", only=ALL, seed=9) # other bytes in the same place
    assert adapters.load("a", folder) != old
    new_right = right_tokens(folder, 8, long)
    engine.add_request(long, tokens(8), request_id="new", adapter=adapters.find("a"))
    answers = {}
    while engine.has_unfinished:
        for out in engine.step():
            answers.setdefault(out.request_id, []).extend(out.token_ids)
    assert answers["new"] == new_right and old_right[-6:] == answers["old"]
    assert answers["base"] == base_right[-6:]
    assert len({tuple(old_right), tuple(new_right), tuple(base_right)}) == 3
    assert set(adapters.pool.adapters) == {adapters.find("a")} # the old one is forgotten
    engine.add_request(long, tokens(8), request_id="again", adapter=adapters.find("a"))
    request = engine.requests["again"]
    assert drain(engine)["again"] == new_right
    assert request.num_cached_tokens == len(long) // 4 * 4 # and its own keys are found


def test_the_same_tokens_share_within_an_adapter_only(tmp_path):
    engine, adapters = make_engine({name: save(tmp_path / name, seed=i, only=ALL)
                                    for i, name in enumerate("ab")})
    cached = {}
    for name, adapter in (("a", "a"), ("b", "b"), ("base", None), ("a2", "a"), ("base2", None)):
        digest = None if adapter is None else adapters.find(adapter)
        engine.add_request(PROMPT * 2, tokens(3), request_id=name, adapter=digest)
        request = engine.requests[name]
        drain(engine)
        cached[name] = request.num_cached_tokens
    assert cached == {"a": 0, "b": 0, "base": 0, "a2": 12, "base2": 12}


def test_unload_frees_when_the_last_request_has_ended(tmp_path):
    folder = save(tmp_path / "a")
    engine, adapters = make_engine({"a": folder}, max_num_seqs=1)
    digest = adapters.find("a")
    ref = weakref.ref(adapters.pool.adapters[digest])
    for name in ("runs", "waits", "gives up"):
        engine.add_request(PROMPT, tokens(6), request_id=name, adapter=digest)
    engine.step()
    adapters.unload("a")
    assert adapters.models == {} and ref() is not None
    with pytest.raises(KeyError):
        adapters.find("a")
    engine.abort("gives up")
    right = right_tokens(folder)
    answers = drain(engine)
    assert answers["waits"] == right and answers["runs"] == right[1:]
    gc.collect()
    assert ref() is None and not adapters.pool.places and not adapters.pool.adapters
    adapters.load("a", folder) # and it can come back
    engine.add_request(PROMPT, tokens(6), request_id="later", adapter=adapters.find("a"))
    assert drain(engine)["later"] == right


def test_two_names_for_the_same_bytes(tmp_path):
    folder = save(tmp_path / "a")
    engine, adapters = make_engine({"a": folder, "b": save(tmp_path / "b")})
    assert adapters.find("a") == adapters.find("b") and len(adapters.pool.adapters) == 1
    adapters.unload("a")
    assert adapters.find("b") in adapters.pool.adapters
    adapters.unload("b")
    assert not adapters.pool.adapters


def test_the_longest_unused_adapters_leave_memory_and_are_read_again(tmp_path):
    folders = {name: save(tmp_path / name, seed=i) for i, name in enumerate("abcd")}
    engine, _ = make_engine({})
    calls = []

    def call(function, *args):
        calls.append(function.__name__)
        function(*args)
    adapters = Adapters(engine.listeners[0], max_cpu_loras=2, call=call)
    for name, folder in folders.items():
        adapters.load(name, folder)
    assert [name for name in "abcd" if adapters.digest(name) is None] == ["a", "b"]
    assert calls == ["add", "add", "add", "discard", "add", "discard"]
    assert list(adapters.models.values()) == list(folders.values())
    kept = adapters.digest("c") # d is the longest unused now
    engine.add_request(PROMPT, tokens(6), request_id="0", adapter=adapters.find("a"))
    assert adapters.digest("c") == kept and adapters.digest("d") is None
    for name in "bd": # a is needed by a request, whatever the limit says
        adapters.find(name)
    assert len(adapters.pool.adapters) == 3 and adapters.digest("a") is None
    assert drain(engine)["0"] == right_tokens(folders["a"])
    assert len(adapters.pool.adapters) == 2
    with pytest.raises(ValueError, match="max_cpu_loras must be at least max_loras=2, got 1"):
        Adapters(adapters.pool, 1)


def test_files_that_change_behind_a_name_are_not_taken_in_silence(tmp_path):
    folders = {name: save(tmp_path / name, seed=i) for i, name in enumerate("abc")}
    engine, _ = make_engine({})
    adapters = Adapters(engine.listeners[0], max_cpu_loras=2)
    for name, folder in folders.items():
        adapters.load(name, folder)
    before = dict(adapters._digests)
    save(tmp_path / "a", seed=7)
    with pytest.raises(AdapterError, match="the files of adapter 'a' are not those that were"):
        adapters.find("a")
    save(tmp_path / "b", use_dora=True)
    with pytest.raises(AdapterError, match="DoRA"):
        adapters.load("b", folders["b"])
    assert adapters._digests == before # a failed load changes nothing
    assert adapters.load("a", folders["a"]) != before["a"]


def test_requests_for_adapters_are_checked():
    assert LoRARequest("a", 1, "/x").lora_path == "/x"
    for wrong, why in ((dict(lora_int_id=0), "at least 1, got 0"),
                       (dict(lora_int_id="1"), "at least 1, got '1'"),
                       (dict(lora_name=""), "must be a text")):
        with pytest.raises(ValueError, match=why):
            LoRARequest(**dict(lora_name="a", lora_int_id=1, lora_path="x") | wrong)


@pytest.mark.parametrize("kind", [Decoder, TransformersModel])
@pytest.mark.parametrize("max_loras", [1, 2, 5])
def test_many_adapters_under_pressure(tmp_path, kind, max_loras):
    "Preemptions, fewer places than adapters, base requests in between: all as peft alone."
    folders = {name: save(tmp_path / name, seed=i, only=ALL) for i, name in enumerate("abcd")}
    engine, adapters = make_engine(folders, max_loras, num_blocks=12, kind=kind)
    rng, asked = random.Random(1), {}
    for i in range(14):
        name = rng.choice(["a", "b", "c", "d", None])
        prompt, n = PROMPT[:rng.randint(1, 7)] * 2, rng.randint(3, 14)
        digest = None if name is None else adapters.find(name)
        asked[str(i)] = name, prompt, n
        engine.add_request(prompt, tokens(n), request_id=str(i), adapter=digest)
    requests = list(engine.requests.values())
    answers = drain(engine)
    models = {name: by_peft(folder) for name, folder in folders.items()} | {None: tiny()}
    for key, (name, prompt, n) in asked.items():
        assert answers[key] == list(generate(models[name], prompt, n))
    assert sum(request.num_preemptions for request in requests) > 0


# who may come in

def wish(name, adapter=None, num_new=5, num_prompt=4, **options):
    return Request(name, range(num_prompt), SamplingParams(max_tokens=num_new), adapter=adapter,
                   **options)


def names(requests): return "".join(request.request_id for request in requests)


def test_who_finds_no_slot_is_passed_over():
    admission = AdapterAdmission(2)
    running = [wish("r", "A"), wish("s")]
    waiting = [wish("a", "B"), wish("b", "C"), wish("c"), wish("d", "A"), wish("e", "D"),
               wish("f", "B")]
    assert names(admission(iter(waiting), running)) == "acdf"
    assert names(admission(iter(waiting), [])) == "abcf"
    assert not admission.num_passed # nobody has come in


def test_who_was_passed_over_eight_times_is_next():
    scheduler = Scheduler(BlockManager(100, 4), WholePrompts(), 4, 64,
                          admission=AdapterAdmission(1))
    scheduler.add(wish("first", "A", 6, arrival_s=0))
    scheduler.schedule()
    scheduler.add(wish("waits", "B", arrival_s=1))
    came = []
    for i in range(20):
        scheduler.add(wish(f"{i:02}", "A", 1, arrival_s=2 + i))
        plan = scheduler.schedule()
        came += [request.request_id for request in plan.admitted]
        for request in plan.admitted:
            request.append(0, 0)
            scheduler.finish(request)
    assert came == [f"{i:02}" for i in range(8)]
    [first] = scheduler.running
    scheduler.finish(first)
    assert names(scheduler.schedule().admitted) == "waits"


def test_nobody_gets_up_for_one_who_cannot_come_in():
    "One slot, held by A; B is first in turn by its share, and every seat is taken."
    scheduler = Scheduler(BlockManager(100, 4), ChunkedPrefill(), 2, 64,
                          admission=AdapterAdmission(1))
    crowd = [wish(f"a{i}", "A", 9, shares=("alice",), arrival_s=i) for i in range(4)]
    for request in crowd:
        scheduler.add(request)
    scheduler.schedule()
    scheduler.add(wish("b", "B", shares=("bob",), arrival_s=5))
    assert names(scheduler.order)[:5] == "a0ba1"
    plan = scheduler.schedule()
    assert not plan.preempted and not plan.admitted and len(plan.batch) == 2
    scheduler.add(wish("c", None, shares=("carl",), arrival_s=6)) # needs no slot
    plan = scheduler.schedule()
    assert names(plan.preempted) == "a1" and names(plan.admitted) == "c"
    scheduler.short_of_memory = True
    plan = scheduler.schedule()
    assert not plan.preempted # who waits in front has no slot, and who could come in is behind


@st.composite
def crowds(draw):
    "Requests with shares, priorities and adapters, and an engine that is too small for them."
    arrivals = []
    for i in range(draw(st.integers(1, 24))):
        shares = draw(st.sampled_from([(), ("a", "1"), ("a", "2"), ("b", "3")]))
        request = dict(
            name=f"{i:02}", adapter=draw(st.sampled_from([None, "A", "B", "C", "D"])),
            num_prompt=draw(st.integers(1, 20)), num_new=draw(st.integers(1, 20)),
            shares=shares, priority=draw(st.integers(0, 2)))
        arrivals.append((draw(st.integers(0, 30)), request))
    return dict(
        arrivals=arrivals, max_loras=draw(st.integers(1, 3)),
        num_blocks=draw(st.integers(10, 40)),
        max_num_seqs=draw(st.integers(1, 6)), rank=RANKS[draw(st.sampled_from(list(RANKS)))],
        policy=draw(st.sampled_from([WholePrompts, ChunkedPrefill])),
        max_passed=draw(st.sampled_from([0, 1, 8])))


@settings(max_examples=300, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(crowds())
def test_every_crowd_is_served(crowd):
    "No livelock, never more adapters than places, no preemption without somebody coming in."
    admission = AdapterAdmission(crowd["max_loras"], crowd["max_passed"])
    scheduler = Scheduler(BlockManager(crowd["num_blocks"], 4), crowd["policy"](),
                          crowd["max_num_seqs"], 64, crowd["rank"], admission)
    load = [(step, wish(**request)) for step, request in crowd["arrivals"]]
    roomy = crowd["num_blocks"] >= 10 * crowd["max_num_seqs"] # no memory is ever lacking
    steps, usual = 0, scheduler.schedule

    def schedule():
        nonlocal steps
        steps += 1
        assert steps < 4000, "no progress"
        plan = usual()
        assert plan.batch or not (scheduler.waiting or scheduler.running)
        assert len({r.adapter for r in scheduler.running} - {None}) <= crowd["max_loras"]
        if roomy:
            assert len(plan.admitted) >= len(plan.preempted)
        return plan
    scheduler.schedule = schedule
    simulate(scheduler, load)
    assert all(r.finish_reason == "length" for _, r in load)
    assert all(n <= crowd["max_passed"] for n in admission.num_passed.values())


def test_a_plan_without_adapters_is_as_before():
    "The admission changes nothing for requests that need no slot."
    for admission in (None, AdapterAdmission(1)):
        options = {} if admission is None else dict(admission=admission)
        scheduler = Scheduler(BlockManager(8, 4), WholePrompts(), 3, 64, **options)
        load = [(i, wish(str(i), num_prompt=5, num_new=9, shares=(str(i % 2),)))
                for i in range(9)]
        steps = simulate(scheduler, load)
        found = [(r.num_preemptions, r.admitted_s, r.finished_s) for _, r in load], steps
        if admission is None:
            before = found
    assert found == before
