"The offline API as users of vLLM know it: what goes in, comes out and is refused."

import itertools
import json
import re
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from lora_folders import save
from tiny_tokenizers import family
from transformers import GenerationConfig

from nanollm.args import EngineArgs
from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import Output
from nanollm.generate import generate
from nanollm.kernels import FusedDecoder
from nanollm.llm import (
    LLM,
    Answer,
    TextEngine,
    default_sampling,
    make_engine,
    read_prompts,
    spread,
)
from nanollm.lora import LoRARequest
from nanollm.model import ModelError, kv_bytes_per_token, load_model
from nanollm.native import NativeError
from nanollm.outputs import NO_TEXT, Logprob, readable
from nanollm.paged_attention import GroupedAttention, TransformersModel
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.quantized_cache import GIB, kv_cache_bytes
from nanollm.request import Request, RequestEvent, StepRecord
from nanollm.sampling import Sampler, SamplingParams, TokenLogprobs, row_seed
from nanollm.scheduler import WholePrompts
from nanollm.streamed_attention import StreamedAttention
from nanollm.structured_output import Grammar, GrammarMask, StructuredOutputsParams
from nanollm.text import byte_tokenizer, with_chat_template
from nanollm.tool_grammars import call_constraint
from nanollm.tools import call_style
from nanollm.transformer import Decoder

MODEL = load_model(
    "tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False
)
TOKENIZER = byte_tokenizer()
EOS = (258,)
PER_TOKEN = kv_bytes_per_token(MODEL.config, torch.float32)
# ASCII only, so that texts can be compared
READABLE = {token_id: -100.0 for token_id in range(320) if not 32 < token_id < 127}
GREEDY = SamplingParams(
    temperature=0, max_tokens=8, ignore_eos=True, frequency_penalty=1, logit_bias=READABLE
)


def new(**options):
    return LLM(
        MODEL,
        tokenizer=TOKENIZER,
        **{"num_kv_blocks": 128, "block_size": 8, "self_check": True} | options,
    )


@pytest.fixture
def llm():
    "An engine that must be empty when the test is over."
    one = new()
    yield one
    assert_empty(one)


def assert_empty(llm):
    assert not llm.engine.requests and not llm._answers and not llm._names
    assert not llm.engine.scheduler.running and not llm.engine.scheduler.waiting
    llm.engine.check()


def naive(ids, params, index=0):
    "Token ids of the naive loop."
    sampler = Sampler([params], [ids], EOS, seeds=[row_seed(params, index)])
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
    return list(generate(MODEL, ids, params.max_tokens, stops, sampler))


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def run(llm, prompts, *args, **kwargs):
    return llm.generate(prompts, *args, use_tqdm=False, **kwargs)


# what goes in


@pytest.mark.parametrize(
    "prompts, ids",
    [
        ("Hi", [[72, 105]]),
        (["Hi", "A"], [[72, 105], [65]]),
        (("Hi", "A"), [[72, 105], [65]]),
        ({"prompt": "Hi"}, [[72, 105]]),
        ({"prompt_token_ids": [5, 6]}, [[5, 6]]),
        (
            [{"prompt_token_ids": (5, 6)}, {"prompt": "A"}, [7], "Hi"],
            [[5, 6], [65], [7], [72, 105]],
        ),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        (torch.tensor([5, 6]).numpy(), [[5, 6]]),
        ((text for text in ("Hi", "A")), [[72, 105], [65]]),
    ],
)
def test_forms_of_prompts(llm, prompts, ids):
    outputs = run(llm, prompts, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == ids
    assert [output.outputs[0].token_ids for output in outputs] == [
        naive(row, GREEDY) for row in ids
    ]


def test_prompt_text_is_kept():
    assert read_prompts(TOKENIZER, [{"prompt": "Hi", "prompt_token_ids": [1]}, [2], "A"]) == [
        ("Hi", [1]),
        (None, [2]),
        ("A", [65]),
    ]


def test_no_prompts_no_outputs(llm, capsys):
    assert llm.generate([]) == llm.chat([]) == run(llm, [], []) == list(llm.stream([])) == []
    assert capsys.readouterr().err == "" and llm.engine.num_steps == 0


def test_default_parameters(llm):
    [output] = run(llm, "Hi")
    assert len(output.outputs) == 1 and len(output.outputs[0].token_ids) <= 16


def test_one_parameter_or_one_per_prompt():
    p, q = SamplingParams(), SamplingParams(n=2)
    assert (
        spread(None, 2, p) == [p, p]
        and spread(q, 2) == [q, q]
        and spread((p, q), 2) == [p, q]
        and spread([], 0) == spread(p, 0) == []
    )
    with pytest.raises(ValueError, match="0 sampling parameters for 1 prompts"):
        spread([], 1)
    with pytest.raises(TypeError, match="SamplingParams, got str"):
        spread([p, "greedy"], 2)


def test_order_is_kept_and_ids_differ(llm):
    prompts = [f"prompt {i}" * (7 - i) for i in range(7)]
    params = [GREEDY.model_copy(update={"max_tokens": 1 + (i * 5) % 7}) for i in range(7)]
    outputs = run(llm, prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [
        p.max_tokens for p in params
    ]
    assert len({output.request_id for output in outputs}) == 7 and all(
        output.finished for output in outputs
    )


# what comes out


@pytest.mark.parametrize("caching, chunked", itertools.product([True, False], repeat=2))
def test_every_combination_equals_the_naive_loop(caching, chunked):
    llm = new(
        num_kv_blocks=20,
        block_size=4,
        max_num_seqs=3,
        max_num_batched_tokens=16,
        enable_prefix_caching=caching,
        enable_chunked_prefill=chunked,
    )
    cache, policy = llm.engine.scheduler.cache, llm.engine.scheduler.policy
    assert type(cache) is (PrefixCachingBlockManager if caching else BlockManager)
    assert type(policy) is (ChunkedPrefill if chunked else WholePrompts)
    prompts = ["Once upon a time", "Once upon a time, a fox", "x", "Once upon a table"]
    params = [
        SamplingParams(temperature=0, n=2, max_tokens=20),
        SamplingParams(seed=1, max_tokens=30),
        SamplingParams(seed=2, n=3),
        SamplingParams(temperature=0, max_tokens=9),
    ]
    for output, p in zip(run(llm, prompts, params), params, strict=True):
        assert [answer.token_ids for answer in output.outputs] == [
            naive(output.prompt_token_ids, p, i) for i in range(p.n)
        ]
        for answer in output.outputs:
            ended = answer.token_ids[-1] == EOS[0]
            assert answer.text == decode(answer.token_ids) and answer.finish_reason == (
                "stop" if ended else "length"
            )
    assert_empty(llm)


def test_several_answers(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=6, ignore_eos=True)
    [output] = run(llm, "Hello", params)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert [answer.token_ids for answer in output.outputs] == [
        naive(output.prompt_token_ids, params, i) for i in range(3)
    ]


def test_logprobs(llm):
    [output] = run(
        llm,
        "Hello",
        SamplingParams(
            seed=5,
            temperature=1.5,
            max_tokens=6,
            logprobs=2,
            prompt_logprobs=1,
            ignore_eos=True,
        ),
    )
    answer = output.outputs[0]
    assert len(answer.logprobs) == 6
    for token_id, table in zip(answer.token_ids, answer.logprobs):
        assert next(iter(table)) == token_id and len(table) in (2, 3)
        assert table[token_id].decoded_token == TOKENIZER.decode([token_id])
        assert {1, 2} <= {entry.rank for entry in table.values()}
    assert answer.cumulative_logprob == pytest.approx(
        sum(table[i].logprob for i, table in zip(answer.token_ids, answer.logprobs))
    )
    first, *others = output.prompt_logprobs
    assert (
        first is None and [next(iter(table)) for table in others] == output.prompt_token_ids[1:]
    )


def test_no_logprobs_unless_asked(llm):
    [output] = run(llm, "Hello", GREEDY)
    assert (
        output.prompt_logprobs
        is output.outputs[0].logprobs
        is output.outputs[0].cumulative_logprob
        is None
    )
    [output] = run(llm, "Hello", GREEDY.model_copy(update={"logprobs": 0}))
    assert all(len(table) == 1 for table in output.outputs[0].logprobs)


def test_readable():
    report = TokenLogprobs(65, -2.0, 2, ((66, -1.0), (65, -2.0), (67, -3.0)))
    assert readable(TOKENIZER, report) == {
        65: Logprob(-2.0, 2, "A"),
        66: Logprob(-1.0, 1, "B"),
        67: Logprob(-3.0, 3, "C"),
    }
    assert list(readable(TOKENIZER, report)) == [65, 66, 67]
    assert readable(TOKENIZER, None) is None


def test_metrics():
    llm = new(max_num_seqs=1)
    first, second = run(llm, ["a", "b"], GREEDY)
    for metrics in (first.metrics, second.metrics):
        assert len(metrics.token_times_s) == 8 and metrics.num_preemptions == 0
        assert (
            0
            <= metrics.queue_s
            <= metrics.first_token_s
            == metrics.token_times_s[0]
            <= metrics.last_token_s
            == metrics.timing.e2e_s
        )
    # each counts from its own arrival; the first waits at least until the second is there
    assert first.metrics.last_token_s <= first.metrics.queue_s + second.metrics.queue_s


def test_outputs_are_plain_data(llm):
    [output] = run(llm, "Hello", SamplingParams(max_tokens=3, logprobs=1, n=2))
    assert json.loads(json.dumps(asdict(output)))["outputs"][1]["finish_reason"] in (
        "length",
        "stop",
    )
    assert all(type(answer.finish_reason) is str for answer in output.outputs)


def test_cached_tokens_grow_and_can_be_forgotten(llm):
    text = "A conversation that is longer than a few blocks. "
    cached = [run(llm, text * turn, GREEDY)[0].num_cached_tokens for turn in (1, 2, 2)]
    assert cached == [0, len(text) // 8 * 8, (2 * len(text) - 1) // 8 * 8]
    llm.reset_prefix_cache()
    assert run(llm, text, GREEDY)[0].num_cached_tokens == 0


def test_reset_without_a_prefix_cache_and_the_tokenizer():
    llm = new(enable_prefix_caching=False)
    assert llm.reset_prefix_cache() is None and llm.get_tokenizer() is TOKENIZER


def test_priority():
    llm = new(max_num_seqs=1, scheduling_policy="priority")
    outputs = run(llm, ["a", "b", "c"], GREEDY, priority=[2, 0, 1])
    assert sorted(range(3), key=lambda i: outputs[i].metrics.queue_s) == [1, 2, 0]
    with pytest.raises(ValueError, match="2 priorities for 3 prompts"):
        run(llm, ["a", "b", "c"], GREEDY, priority=[1, 2])
    assert_empty(llm)


def test_progress_bar_counts_answers_and_is_silent_for_refused_calls(llm, monkeypatch):
    bars = []

    class Bar(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            self.n += 1

        def set_postfix_str(self, text, refresh):
            self.text = text

    monkeypatch.setattr(
        "nanollm.outputs.tqdm", lambda **kwargs: bars.append(Bar(n=0, **kwargs)) or bars[-1]
    )
    stop = decode(naive([97], GREEDY)[2:4])
    params = GREEDY.model_copy(update={"n": 3, "stop": (stop,)})
    llm.generate(["a", "b"], [params, GREEDY])
    assert (
        bars[0].n == bars[0].total == 4
        and not bars[0].disable
        and bars[0].text.endswith("output tok/s")
    )
    run(llm, "a", GREEDY)
    assert bars[1].disable and bars[1].delay > 0


# text, and where it ends


def test_stop_string_across_tokens_ends_the_request(llm):
    full = naive([97], GREEDY)
    text = decode(full)
    at = next(i for i in range(1, len(text) - 2) if text.index(text[i : i + 2]) == i)
    params = GREEDY.model_copy(update={"stop": (text[at : at + 2],)})
    for include in (False, True):
        [output] = run(
            llm, "a", params.model_copy(update={"include_stop_str_in_output": include})
        )
        answer = output.outputs[0]
        assert answer.text == text[: at + 2 * include]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", text[at : at + 2])
        assert answer.token_ids == full[: len(answer.token_ids)] and len(
            answer.token_ids
        ) < len(full)
        assert len(output.metrics.token_times_s) == len(answer.token_ids)


def test_stop_string_ends_one_answer_of_several(llm):
    params = SamplingParams(n=4, seed=3, max_tokens=12, ignore_eos=True, logit_bias=READABLE)
    texts = [decode(naive([97], params, i)) for i in range(4)]
    stop = next(char for char in texts[0] if not all(char in text for text in texts))
    [output] = run(llm, "a", params.model_copy(update={"stop": (stop,)}))
    for answer, text in zip(output.outputs, texts):
        assert answer.text == text.partition(stop)[0]
        assert answer.finish_reason == ("stop" if stop in text else "length")
        assert answer.stop_reason == (stop if stop in text else None)


def test_leader_stopped_by_its_first_token_does_not_hold_up_the_others(llm):
    first = naive([97], GREEDY)[0]
    params = GREEDY.model_copy(update={"n": 3, "stop": (decode([first]),)})
    [output] = run(llm, "a", params)
    assert [(answer.text, len(answer.token_ids)) for answer in output.outputs] == [("", 1)] * 3


def test_min_tokens_holds_back_stop_strings(llm):
    stop = decode(naive([97], GREEDY)[:1])
    [output] = run(llm, "a", GREEDY.model_copy(update={"stop": (stop,), "min_tokens": 3}))
    assert len(output.outputs[0].token_ids) >= 3


@pytest.mark.parametrize("include", [False, True])
def test_stop_token(llm, include):
    full = naive([97], GREEDY)
    params = GREEDY.model_copy(
        update={"stop_token_ids": (full[3],), "include_stop_str_in_output": include}
    )
    [output] = run(llm, "a", params)
    answer, num = output.outputs[0], full.index(full[3]) + 1
    assert answer.token_ids == full[:num] and answer.text == decode(full[: num - (not include)])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", full[3])


@pytest.mark.parametrize("skip", [True, False])
def test_end_token_of_the_model(llm, skip):
    bias = {258: 100.0}
    params = SamplingParams(
        temperature=0,
        logit_bias=bias,
        skip_special_tokens=skip,
        include_stop_str_in_output=True,
    )
    answer = run(llm, "a", params)[0].outputs[0]
    assert answer.token_ids == [258] and (answer.finish_reason, answer.stop_reason) == (
        "stop",
        None,
    )
    assert answer.text == ("" if skip else "<|im_end|>")


def test_held_back_text_is_released_at_the_end(llm):
    text = decode(naive([97], GREEDY))
    answer = run(llm, "a", GREEDY.model_copy(update={"stop": (text[-1] + "never",)}))[
        0
    ].outputs[0]
    assert answer.text == text and answer.finish_reason == "length"


def test_answer_drops_what_comes_after_its_end(llm):
    ids = naive([97], GREEDY)
    request = Request("r", [97], GREEDY.model_copy(update={"stop": (decode(ids[:1]),)}))
    answer = Answer("r", request, TOKENIZER)
    several = Output("r", 0, ids[:3], [], None, None, None, 1, 0, None)
    delta = answer.take(several)
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", ids[:1], "stop")
    assert answer.token_ids == ids[:1] and answer.stop_reason == decode(ids[:1])


def test_a_stop_string_ends_the_request_in_its_step(llm):
    ids = naive([97], GREEDY)
    stop = GREEDY.model_copy(update={"stop": (decode(ids[:2]),)})
    llm.add("r", [97], stop)
    assert [delta.finish_reason for delta in llm.step()] == [None]
    [delta] = llm.step()
    assert delta.finish_reason == "stop" and delta.stop_reason == decode(ids[:2])
    assert_empty(llm)


def test_several_answers_are_requests_with_names_of_their_own(llm):
    params = SamplingParams(
        n=3, seed=5, max_tokens=4, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    prompt_ids = list(range(20, 40))
    answers = llm.add("r", prompt_ids, params)
    assert list(llm.engine.requests) == ["r.0", "r.1", "r.2"]
    for taken in ("r", "r.1"):
        with pytest.raises(ValueError, match="in use"):
            llm.add(taken, [1], GREEDY)
    found = {}
    while llm.has_unfinished:
        for delta in llm.step():
            assert delta.request_id == "r" and delta.num_prompt_tokens == 20
            before = found.get(delta.index)
            found[delta.index] = delta if before is None else before + delta
    for index, answer in enumerate(answers):
        delta = found[index]
        assert (delta.text, delta.token_ids) == (answer.text, answer.token_ids)
        assert len(delta.logprobs) == 4 and set(delta.prompt_logprobs) == set(range(1, 20))
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    assert_empty(llm)


def test_one_answer_keeps_its_name_and_siblings_share_the_prompt(llm):
    prompt_ids = list(range(50, 90))
    llm.add("one", prompt_ids, GREEDY)
    assert list(llm.engine.requests) == ["one"]
    assert [delta.finish_reason for delta in llm.abort("one")] == ["abort"] and llm.abort(
        "one"
    ) == []
    assert_empty(llm)
    computed = []
    llm.engine.listeners.append(
        lambda event: computed.append(event) if isinstance(event, StepRecord) else None
    )
    llm.add("r", prompt_ids, GREEDY.model_copy(update={"n": 4, "max_tokens": 1}))
    llm.step()
    llm.engine.listeners.pop()
    assert sum(work.num_new for work in computed[0].works) == 40 + 3 * 8, (
        "32 of 40 tokens lie in full blocks"
    )
    assert_empty(llm)


@pytest.mark.parametrize("impl", ["auto", "nanollm", "transformers"])
def test_every_implementation_makes_the_same_tokens(impl):
    assert run(new(model_impl=impl), "a", GREEDY)[0].outputs[0].token_ids == naive([97], GREEDY)


def test_the_tokenizer_may_be_a_name(tmp_path):
    for part in (TOKENIZER, MODEL):
        part.save_pretrained(tmp_path)
    found = LLM(MODEL, tokenizer=str(tmp_path), num_kv_blocks=16)
    assert run(found, "a", GREEDY)[0].outputs[0].token_ids == naive([97], GREEDY)


# streams


def test_stream_yields_every_answer_once_to_its_end(llm):
    prompts, params = ["a", "bb"], [SamplingParams(n=2, seed=1, max_tokens=9, stop="e"), GREEDY]
    texts, ended = {}, []
    for i, answer, piece in llm.stream(prompts, params):
        place = i, answer.request.index
        assert place not in ended
        texts[place] = texts.get(place, "") + piece
        assert texts[place] == answer.text
        ended += [place] * (answer.finish_reason is not None)
    assert sorted(ended) == [(0, 0), (0, 1), (1, 0)]
    whole = run(llm, prompts, params)
    assert texts == {
        (i, answer.index): answer.text
        for i, output in enumerate(whole)
        for answer in output.outputs
    }


@pytest.mark.parametrize("num_pulled", [1, 2, 7])
def test_closing_a_stream_aborts(llm, num_pulled):
    events = []
    llm.engine.listeners.append(events.append)
    pieces = llm.stream(
        ["a", "b", "c" * 50], SamplingParams(n=2, max_tokens=100, ignore_eos=True)
    )
    for _ in range(num_pulled):
        next(pieces)
    pieces.close()
    assert_empty(llm)
    ends = [
        event.request.finish_reason
        for event in events
        if isinstance(event, RequestEvent) and event.kind == "finished"
    ]
    assert ends == ["abort"] * 6
    assert run(llm, "a", GREEDY)[0].outputs[0].token_ids == naive([97], GREEDY)


def test_a_stream_that_is_never_pulled_does_nothing(llm):
    llm.stream(["a"], GREEDY)
    assert not llm.engine.requests


def test_two_streams_and_a_call_in_between(llm):
    params = GREEDY.model_copy(update={"max_tokens": 20})
    a, b = llm.stream("a", params), llm.stream(["b", "c"], params)
    got_a, got_b, between = [], [], None
    for one, two in itertools.zip_longest(a, b):
        got_a += [one[2]] if one else []
        got_b += [two] if two else []
        between = between or run(llm, "a", GREEDY)
    assert "".join(got_a) == decode(naive([97], params))
    assert ["".join(piece for i, _, piece in got_b if i == row) for row in (0, 1)] == [
        decode(naive([x], params)) for x in (98, 99)
    ]
    assert between[0].outputs[0].token_ids == naive([97], GREEDY)


# what is refused


@pytest.mark.parametrize(
    "bad, message",
    [
        ([], "prompt 1: the prompt is empty"),
        ("", "prompt 1: the prompt is empty"),
        (
            "x" * 2040,
            "prompt 1: 2040 prompt tokens and 8 new ones exceed the context of 1024 tokens",
        ),
        ([1, 320], "prompt 1: prompt token id 320 is outside the vocabulary of 320 tokens"),
        (
            [1, 2.5],
            r"prompt 1: a prompt is a text, token ids, or a mapping .*, got \[1, 2.5\]",
        ),
        (None, "prompt 1: .* got None"),
        ({}, r"prompt 1: .* key prompt or prompt_token_ids, got \[\]"),
        ({"prompt": "a", "multi_modal_data": 1}, "prompt 1: .* got .*multi_modal_data"),
        ({"prompt": None}, "prompt 1: .* got None"),
        ("\ud800", "prompt 1: character 0 of the text"),
    ],
)
def test_a_bad_prompt_is_named_and_nothing_is_left(llm, bad, message, capsys):
    with pytest.raises(ValueError, match=message):
        llm.generate(["good", bad, "good"], GREEDY)
    assert_empty(llm)
    assert llm.engine.num_steps == 0 and capsys.readouterr().err == ""
    assert len(run(llm, "good", GREEDY)) == 1


def test_a_bad_parameter_is_named_with_its_prompt(llm):
    with pytest.raises(
        ValueError, match="prompt 1: stop_token_ids: token ids go from 0 to 319, got 400"
    ):
        run(llm, ["a", "b"], [GREEDY, GREEDY.model_copy(update={"stop_token_ids": (400,)})])
    with pytest.raises(ValueError, match="3 sampling parameters for 2 prompts"):
        run(llm, ["a", "b"], [GREEDY] * 3)


def test_a_prompt_that_exceeds_the_cache_and_one_that_just_fits():
    llm = new(num_kv_blocks=2)
    assert llm.engine.max_model_len == 16
    assert len(run(llm, [[1] * 8], GREEDY)[0].outputs[0].token_ids) == 8
    with pytest.raises(
        ValueError,
        match="prompt 0: 9 prompt tokens and 8 new ones exceed the context of 16 tokens",
    ):
        run(llm, [[1] * 9], GREEDY)
    assert (
        len(
            run(llm, [[1] * 9], GREEDY.model_copy(update={"max_tokens": None}))[0]
            .outputs[0]
            .token_ids
        )
        == 7
    )
    assert_empty(llm)


# formats

CITY = {"type": "object", "required": ["a", "b"], "additionalProperties": False,
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}}}
VALID = {
    "json": lambda text: set(json.loads(text)) == {"a", "b"},
    "choice": ("yes", "no").__contains__,
    "regex": re.compile("[a-c]{5}").fullmatch,
}


def held(kind, **more):
    asked = {"json": CITY, "choice": ("yes", "no"), "regex": "[a-c]{5}"}[kind]
    usual = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    return SamplingParams(
        structured_outputs=StructuredOutputsParams(**{kind: asked}), **usual | more)


MIXED = [
    ("plain", GREEDY), ("one", held("json")),
    ("plain too", SamplingParams(seed=3, max_tokens=9)),
    ("two", held("choice", min_tokens=20)),
    ("three", held("json", n=3, temperature=1.0, seed=5)),
    ("four", held("regex", stop="b", include_stop_str_in_output=True)),
    ("five", held("regex", frequency_penalty=1, logprobs=2, logit_bias={97: 50.0})),
]


@pytest.mark.parametrize("options", [
    {}, {"enable_jump_forward": False}, {"enable_prefix_caching": False},
    {"enable_chunked_prefill": False}, {"model_impl": "transformers"},
    {"max_num_seqs": 3, "max_num_batched_tokens": 8}, {"num_kv_blocks": 24, "block_size": 4},
], ids=str)
def test_rows_with_and_without_a_format_do_not_notice_each_other(options):
    prompts, params = map(list, zip(*MIXED))
    alone = [run(new(), [prompt], p)[0] for prompt, p in MIXED]
    mixed = new(**options)
    outputs = run(mixed, prompts, params)
    assert_empty(mixed)
    for output, other, p in zip(outputs, alone, params):
        asked = p.structured_outputs
        for answer, its in zip(output.outputs, other.outputs):
            assert (answer.token_ids, answer.text) == (its.token_ids, its.text)
            assert answer.finish_reason == ("length" if asked is None else "stop")
            [kind] = [kind for kind in VALID if asked and getattr(asked, kind)] or [None]
            if kind and not p.stop:
                assert VALID[kind](answer.text)
    assert outputs[0].outputs[0].token_ids == naive(list(b"plain"), GREEDY)
    assert re.fullmatch("[ac]{0,4}b|[ac]{5}", outputs[5].outputs[0].text)


def test_forced_tokens_need_no_steps_of_their_own_and_plain_requests_no_drafts():
    steps, records, texts = {}, [], ("the first of two texts", "another text")
    asked = SamplingParams(temperature=0, max_tokens=40,
                           structured_outputs=StructuredOutputsParams(choice=texts))
    for jump in (True, False):
        llm = new(enable_jump_forward=jump)
        llm.engine.listeners.append(records.append)
        [output] = run(llm, ["a"], asked)
        assert output.outputs[0].text in texts
        steps[jump] = llm.engine.num_steps
        records.clear()
        run(llm, ["a", "b"], GREEDY)
        works = [work for record in records if isinstance(record, StepRecord)
                 for work in record.works]
        assert works and not any(work.num_drafts for work in works)
    assert 3 * steps[True] < steps[False]


def test_the_mask_is_always_last():
    engine = make_engine(EngineArgs(num_kv_blocks=8), MODEL, processors=())
    [mask] = engine.processors
    assert isinstance(mask, GrammarMask) and engine.proposer is not None
    engine = make_engine(EngineArgs(num_kv_blocks=8, enable_jump_forward=False), MODEL)
    assert isinstance(engine.processors[-1], GrammarMask) and engine.proposer is None
    own = object()
    engine = make_engine(EngineArgs(num_kv_blocks=8), MODEL, proposer=own, num_drafts=2)
    assert (engine.proposer, engine.num_drafts) == (own, 2)


@pytest.mark.parametrize("wrong, message", [
    ({"json": {"type": "array", "uniqueItems": True}}, "json: .*uniqueItems"),
    ({"regex": "("}, "regex: "), ({"grammar": "start: missing"}, "grammar: "),
])
def test_a_format_that_cannot_be_held_is_refused_before_any_work(llm, wrong, message):
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(**wrong))
    with pytest.raises(ValueError, match=f"^prompt 1: {message}"):
        run(llm, ["a", "b"], [GREEDY, bad])
    assert_empty(llm)
    with pytest.raises(ValueError, match=f"^prompt 0: {message}"):
        llm.chat([{"role": "user", "content": "Hi"}], bad, use_tqdm=False)
    assert llm.engine.num_steps == 0


@pytest.mark.parametrize("asked", [{"json": {}}, "json", 7, object()])
def test_what_is_no_format_is_refused(llm, asked):
    with pytest.raises(ValueError, match="structured_outputs"):
        run(llm, ["a"], SamplingParams(structured_outputs=asked))


def test_what_was_not_compiled_fails_alone_in_the_engine(llm):
    first = llm.engine.add_request([97], GREEDY)
    second = llm.engine.add_request([97], held("choice"))
    outputs = {}
    while llm.engine.has_unfinished:
        for output in llm.engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert [output.finish_reason for output in outputs[second]] == ["error"]
    assert sum((output.token_ids for output in outputs[first]), []) == naive([97], GREEDY)


def test_a_grammar_is_compiled_once_and_taken_as_it_is(llm):
    params = llm.compiled([97], held("choice"))
    grammar = params.structured_outputs
    assert isinstance(grammar, Grammar) and llm.compiled([97], params) is params
    assert llm.compiled([98], held("choice")).structured_outputs is grammar
    assert llm.compiled([97], GREEDY) is GREEDY
    [output] = run(llm, ["a"], params)
    assert output.outputs[0].text in ("yes", "no")


def thinking_model():
    tokenizer = family("qwen3")
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    llm = LLM(MODEL, tokenizer=tokenizer, num_kv_blocks=128, block_size=8, self_check=True)
    # a model that thinks whenever it may, and not for long
    bias = {begin: 90.0, end: 80.0}
    return llm, held("choice", logit_bias=bias, skip_special_tokens=False), begin, end


def test_thoughts_stand_before_a_format_where_the_prompt_lets_them():
    llm, params, begin, end = thinking_model()
    [chat] = llm.chat([{"role": "user", "content": "Hi"}], params, use_tqdm=False)
    ids, text = chat.outputs[0].token_ids, chat.outputs[0].text
    assert ids[0] == begin and ids.count(end) == 1
    assert text.split("</think>")[1].strip() in ("yes", "no")
    [pieces] = llm.read(chat)
    assert "".join(p.text for p in pieces if p.kind == "text").strip() in ("yes", "no")
    raw, opened = llm.generate(["Hi", "Hi<think>"], params, use_tqdm=False)
    assert raw.outputs[0].text in ("yes", "no"), "a raw prompt is continued as it stands"
    assert opened.outputs[0].token_ids[0] == end
    assert opened.outputs[0].text.split("</think>")[1].strip() in ("yes", "no")


def test_tool_calls_are_read_offline():
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": CITY}}
    style = call_style("auto", TOKENIZER)
    asked = call_constraint(TOKENIZER, style, [tool], "required", parallel=False)
    llm = new()
    params = SamplingParams(n=2, seed=1, max_tokens=200, structured_outputs=asked)
    [output] = llm.chat([{"role": "user", "content": "Hi"}], params, tools=[tool],
                        use_tqdm=False)
    answers = llm.read(output, [tool])
    assert len(answers) == 2
    for pieces in answers:
        calls = [piece for piece in pieces if piece.kind == "call"]
        assert calls[0].name == "f" and {piece.call_id for piece in calls} != {""}
        assert set(json.loads("".join(piece.text for piece in calls))) == {"a", "b"}
    assert [piece.kind for piece in llm.read(output)[0]] == ["text"], "of nobody's tools"


WITHOUT = """
import sys
from nanollm import LLM, SamplingParams, StructuredOutputsParams
llm = LLM("tiny-llama", load_format="dummy", progress=False, num_kv_blocks=64)
plain = SamplingParams(max_tokens=3, ignore_eos=True)
assert len(llm.generate("Hi", plain, use_tqdm=False)[0].outputs[0].token_ids) == 3
assert "llguidance" not in sys.modules
sys.modules["llguidance"] = None # as if it were not installed
asked = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
try:
    llm.generate("Hi", asked, use_tqdm=False)
except ValueError as error:
    print(error)
assert len(llm.generate("Hi", plain, use_tqdm=False)[0].outputs[0].token_ids) == 3
"""


def test_only_formats_need_the_library():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'pip install "nanollmserve[structured]"' in done.stdout


# what goes wrong on the way


def test_a_failing_request_ends_alone(llm):
    nothing = SamplingParams(min_tokens=4, stop_token_ids=list(range(320)))
    good, bad, other = run(llm, ["a", "b", "a"], [GREEDY, nothing, GREEDY])
    assert good.outputs[0].token_ids == other.outputs[0].token_ids == naive([97], GREEDY)
    assert (
        bad.outputs[0].finish_reason == "error"
        and "no token can be drawn" in bad.outputs[0].error
    )
    assert (
        bad.outputs[0].token_ids == [] and bad.metrics is None and good.outputs[0].error is None
    )


def test_a_failing_step_ends_its_requests_and_the_others_go_on(monkeypatch, caplog):
    llm = new(max_num_seqs=1)
    forward, calls = llm.engine.runner.forward, []

    def broken(batch):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", broken)
    first, second = run(llm, ["a", "b"], GREEDY)
    assert (
        first.outputs[0].finish_reason == "error"
        and first.outputs[0].error == "RuntimeError: out of luck"
    )
    assert (
        first.outputs[0].token_ids == naive([97], GREEDY)[:2]
        and len(first.metrics.token_times_s) == 2
    )
    assert second.outputs[0].token_ids == naive([98], GREEDY)
    assert_empty(llm)


class Picky:
    "A tokenizer that knows nothing of one token."

    def __init__(self, unknown):
        self.backend_tokenizer, self.unknown = self, unknown
        self.backend = TOKENIZER.backend_tokenizer
        self.id_to_token = self.backend.id_to_token

    def decode(self, ids, skip_special_tokens=True):
        if self.unknown in ids:
            raise KeyError(self.unknown)
        return self.backend.decode(ids, skip_special_tokens)


def picky_engine(unknown, **options):
    "A text engine whose tokenizer raises at one token."
    llm = new(**options)
    return TextEngine(llm.engine, Picky(unknown))


def answers_of(engine, requests):
    "Run requests, by id, to their ends; return their answers."
    found = [engine.add(name, *request)[0] for name, request in requests.items()]
    while engine.has_unfinished:
        engine.step()
    return found


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_tokenizer_that_raises_ends_one_answer(place, caplog):
    bad, good = naive([97], GREEDY), naive([104, 105], GREEDY)
    unknown = bad[place]
    assert unknown not in [*good, 97, 104, 105]
    engine = picky_engine(unknown)
    good_one = [104, 105], GREEDY
    requests = {"good": good_one, "bad": ([97], GREEDY), "also": good_one}
    first, broken, last = answers_of(engine, requests)
    assert first.token_ids == last.token_ids == good and first.text == decode(good)
    known = bad[:bad.index(unknown)]
    assert (broken.finish_reason, broken.error) == ("error", NO_TEXT)
    assert broken.token_ids == known and broken.text == decode(known)
    assert "cannot be turned into text" in caplog.text
    assert_empty(engine)


def test_a_tokenizer_that_raises_at_the_end_of_a_prompt_leaves_nothing():
    good = naive([104, 105], GREEDY)
    unknown = next(token_id for token_id in range(33, 127) if token_id not in good)
    engine = picky_engine(unknown)
    with pytest.raises(KeyError):
        engine.add("r", [1, unknown], GREEDY.model_copy(update={"n": 3}))
    assert_empty(engine)
    [answer] = answers_of(engine, {"r": ([104, 105], GREEDY)})
    assert answer.token_ids == good


@pytest.mark.parametrize("n", [1, 64])
def test_the_answers_to_a_prompt_are_checked_once(llm, monkeypatch, n):
    checked, check = [], llm.engine.check_request
    monkeypatch.setattr(llm.engine, "check_request",
                        lambda *args: checked.append(args) or check(*args))
    answers = llm.add("r", [1, 2, 3], GREEDY.model_copy(update={"n": n}))
    assert len(checked) == 1 and len(answers) == n
    assert all(answer.request.prompt_ids is answers[0].request.prompt_ids for answer in answers)
    llm.abort("r")


@pytest.mark.parametrize("where", ["forward", "listener", "bar"])
def test_interrupted_and_used_again(llm, monkeypatch, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(llm.engine.runner, "forward", interrupt)
        elif where == "listener":
            patch.setattr(
                llm.engine,
                "listeners",
                [lambda event: interrupt() if isinstance(event, StepRecord) else None],
            )
        else:
            patch.setattr("nanollm.outputs.tqdm.update", interrupt)
        with pytest.raises(
            KeyboardInterrupt
        ) as kept:  # the traceback keeps all frames alive, as a notebook does
            llm.generate(["a", "b" * 40], GREEDY)
        assert_empty(llm)
        del kept
    assert run(llm, "a", GREEDY)[0].outputs[0].token_ids == naive([97], GREEDY)


# chat


def test_chat_with_one_conversation_or_several(llm):
    talk = [{"role": "user", "content": "Hi"}]
    [one] = llm.chat(talk, GREEDY, use_tqdm=False)
    two = llm.chat(
        [
            talk,
            [*talk, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}],
        ],
        [GREEDY, GREEDY],
        use_tqdm=False,
    )
    assert (
        one.prompt
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        == TOKENIZER.decode(one.prompt_token_ids)
    )
    assert (
        two[0].outputs[0].text == one.outputs[0].text
        and two[1].prompt.count("<|im_start|>") == 4
    )
    assert two[1].num_cached_tokens >= 16


def test_chat_without_generation_prompt_and_with_tools(llm, monkeypatch):
    talk = [{"role": "user", "content": "Hi"}]
    [output] = llm.chat(talk, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert output.prompt == "<|im_start|>user\nHi<|im_end|>\n"
    monkeypatch.setattr(
        TOKENIZER,
        "chat_template",
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
        "{{ messages[0].content }}",
    )
    [output] = llm.chat(
        talk, GREEDY, False, tools=[{"type": "function", "function": {"name": "add"}}]
    )
    assert output.prompt == "[add]Hi"


def test_chat_options_reach_the_template(llm, monkeypatch):
    talk = [{"role": "user", "content": "Hi"}]
    begun = [*talk, {"role": "assistant", "content": "Ho, ho"}]
    [output] = llm.chat(begun, GREEDY, use_tqdm=False, continue_final_message=True)
    assert output.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo, ho"
    with pytest.raises(ValueError, match="prompt 0: continue_final_message and"):
        llm.chat(begun, GREEDY, use_tqdm=False, continue_final_message=True,
                 add_generation_prompt=True)
    template = "{{ messages[0].content }}{% if not enable_thinking %}!{% endif %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    for think, prompt in ((False, "Hi!"), (True, "Hi")):
        [output] = llm.chat(talk, GREEDY, use_tqdm=False,
                            chat_template_kwargs={"enable_thinking": think})
        assert output.prompt == prompt
    for name in ("tools", "messages", "chat_template", "add_generation_prompt"):
        with pytest.raises(ValueError, match=f"chat_template_kwargs.{name} is no option"):
            llm.chat(talk, GREEDY, use_tqdm=False, chat_template_kwargs={name: []})


# drafts and adapters


SUFFIX = {"method": "suffix", "num_speculative_tokens": 7}
DRAFT = {"model": "tiny-llama", "num_speculative_tokens": 4}


@pytest.mark.parametrize("asked", [
    SUFFIX, DRAFT, {"method": "ngram", "num_speculative_tokens": 3}])
@pytest.mark.parametrize("jump", [True, False])
def test_drafts_change_no_token(asked, jump):
    prompts = ["abcabcabcabc", "once upon a time", "x"]
    params = [GREEDY, SamplingParams(seed=3, max_tokens=20, ignore_eos=True, n=2),
              SamplingParams(temperature=0, max_tokens=24, logprobs=2, ignore_eos=True)]
    plain, llm = new(num_kv_blocks=64), new(
        num_kv_blocks=64, load_format="dummy", speculative_config=asked, self_check=True,
        enable_jump_forward=jump)
    for a, b in zip(run(plain, prompts, params), run(llm, prompts, params)):
        for mine, other in zip(a.outputs, b.outputs, strict=True):
            assert (mine.text, mine.token_ids) == (other.text, other.token_ids)
            if mine.logprobs is not None:
                assert [list(table) for table in mine.logprobs] == [
                    list(table) for table in other.logprobs]
    assert_empty(llm)
    assert llm.engine.num_steps <= plain.engine.num_steps
    assert llm.engine.num_drafts == max(16 * jump, asked["num_speculative_tokens"])


def test_a_draft_model_shares_the_memory_and_its_tokens(monkeypatch):
    own = new(num_kv_blocks=None, kv_cache_memory=40 * 8 * PER_TOKEN, max_num_seqs=4)
    both = new(num_kv_blocks=None, kv_cache_memory=40 * 8 * PER_TOKEN, max_num_seqs=4,
               load_format="dummy", speculative_config=DRAFT)
    blocks = [llm.engine.scheduler.cache.num_blocks for llm in (own, both)]
    assert blocks == [40, 20]
    known = dict(TOKENIZER.get_vocab())
    monkeypatch.setattr(type(TOKENIZER), "get_vocab", lambda self: dict(known))
    new(load_format="dummy", speculative_config=DRAFT)
    monkeypatch.setattr("nanollm.llm.load_tokenizer", lambda *args, **more: SimpleNamespace(
        get_vocab=lambda: known | {"odd": 7}))
    with pytest.raises(ValueError, match="a draft model needs the tokenizer of its target"):
        new(load_format="dummy", speculative_config=DRAFT)


@pytest.mark.parametrize("asked, message", [
    ({}, "speculative_config: num_speculative_tokens"),
    ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens.* got 0"),
    ({"method": "ngram", "num_speculative_tokens": 33}, "num_speculative_tokens.* got 33"),
    ({"method": "eagle", "num_speculative_tokens": 3}, "speculative_config: method.*'eagle'"),
    ({"method": "draft_model", "num_speculative_tokens": 3}, "with a model"),
    (SUFFIX | {"draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size"),
    ({1: 2}, "speculative_config: "),
])
def test_wrong_drafts_are_named_before_a_model_is_loaded(monkeypatch, asked, message):
    monkeypatch.setattr("nanollm.tensor_parallel.Alone.load", None)
    with pytest.raises(ValueError, match=message) as error:
        LLM("no such model", speculative_config=asked)
    assert "\n" not in str(error.value)


@pytest.fixture
def voices(tmp_path):
    "An engine of its own with two adapters, and requests for them."
    llm = LLM("tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False,
              num_kv_blocks=64, enable_lora=True, self_check=True,
              lora_modules=[f"a={save(tmp_path / 'a', seed=1)}"])
    return llm, [LoRARequest(name, i, save(tmp_path / name, seed=i))
                 for i, name in ((1, "a"), (2, "b"))]


def test_one_adapter_for_all_or_one_for_each(voices):
    llm, (a, b) = voices
    prompts = ["the same", "the same", "the same"]
    mixed = [one.outputs[0].token_ids
             for one in llm.generate(prompts, GREEDY, False, lora_request=[a, None, b])]
    assert len(set(map(tuple, mixed))) == 3
    assert mixed[1] == naive(list(b"the same"), GREEDY), "the base is the base"
    for wanted, expected in ((a, mixed[0]), (None, mixed[1]), (b, mixed[2])):
        for output in llm.generate(prompts[:2], GREEDY, False, lora_request=wanted):
            assert output.outputs[0].token_ids == expected
    assert list(llm.adapters.models) == ["a", "b"]
    talk = [{"role": "user", "content": "Hi"}]
    said = [llm.chat(talk, GREEDY, False, lora_request=wanted)[0].outputs[0].token_ids
            for wanted in (a, None)]
    assert said[0] != said[1]
    assert_empty(llm)


def test_adapters_that_cannot_be_had_are_refused_and_nothing_is_left(voices, llm, tmp_path):
    own, (a, b) = voices
    calls = [
        (own, [a], ValueError, "1 LoRA requests for 2 prompts"),
        (own, [a, "b"], TypeError, "LoRA requests must be of type LoRARequest, got str"),
        (own, [a, LoRARequest("a", 1, b.lora_path)], ValueError, "prompt 1: adapter 'a' is"),
        (own, [a, LoRARequest("c", 3, str(tmp_path / "c"))], ValueError, "prompt 1: .*json"),
        (llm, a, ValueError, "prompt 0: a lora_request needs an engine with enable_lora=True"),
    ]
    for engine, wanted, kind, message in calls:
        with pytest.raises(kind, match=message):
            engine.generate(["x", "y"], GREEDY, False, lora_request=wanted)
        assert_empty(engine)
    assert list(own.adapters.models) == ["a"]
    with pytest.raises(ValueError, match="adapter_config.json"):
        LLM("tiny-llama", load_format="dummy", device="cpu", progress=False, num_kv_blocks=8,
            enable_lora=True, lora_modules=[f"a={tmp_path}"])


def test_adapters_and_drafts_together(voices):
    llm, (a, b) = voices
    both = LLM("tiny-llama", load_format="dummy", device="cpu", dtype="float32", progress=False,
               num_kv_blocks=64, enable_lora=True, self_check=True, speculative_config=DRAFT)
    prompts, wanted = ["abcabcabc", "x", "the same", "y"], [a, None, b, a]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    one, other = (engine.generate(prompts, params, False, lora_request=wanted)
                  for engine in (llm, both))
    assert [o.outputs[0].token_ids for o in one] == [o.outputs[0].token_ids for o in other]


def test_a_tool_loop_offline(llm):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [{"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "22"}]
    [output] = llm.chat(talk, GREEDY, use_tqdm=False)
    assert "<tool_response>\n22\n</tool_response>" in output.prompt
    assert '{"name": "f", "arguments": {}}' in output.prompt


def test_chat_errors(llm, monkeypatch):
    talk = [{"role": "user", "content": "Hi"}]
    for bad, message in (
        (
            [talk, [{"role": "wizard", "content": "?"}]],
            "prompt 1: messages\\[0\\].role is 'wizard'",
        ),
        ([talk, []], "prompt 1: messages must be a list of at least one message"),
        (
            [talk, [{"role": "user", "content": "x" * 2000}]],
            "prompt 1: .* prompt tokens and 8 new ones",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            llm.chat(bad, GREEDY, use_tqdm=False)
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    with pytest.raises(ModelError, match="^this model has no chat template"):
        llm.chat(talk, GREEDY, use_tqdm=False)


# the arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
        ({"block_size": 1.5}, "block_size .* got 1.5"),
        ({"num_kv_blocks": 0}, "num_kv_blocks .* at least 1, got 0"),
        (
            {"num_kv_blocks": None, "kv_cache_memory": -1},
            "kv_cache_memory .* at least 1, got -1",
        ),
        ({"num_kv_blocks": None, "kv_cache_memory": "lots"}, "kv_cache_memory .* got 'lots'"),
        (
            {"num_kv_blocks": None, "kv_cache_memory": "0GiB"},
            "kv_cache_memory .* at least 1, got 0",
        ),
        (
            {"model_impl": "vllm"},
            "model_impl must be auto or nanollm or transformers, got 'vllm'",
        ),
        (
            {"num_kv_blocks": None, "kv_cache_memory": 100},
            f"100 bytes holds no block of 8 tokens, which takes {8 * PER_TOKEN} bytes",
        ),
        ({"max_num_seqs": 0}, "max_num_seqs .* at least 1, got 0"),
        ({"max_num_seqs": None}, "max_num_seqs .* got None"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens .* got 0"),
        (
            {"max_num_batched_tokens": 32},
            "max_num_seqs must be from 1 to max_num_batched_tokens=32, .* got 64",
        ),
        (
            {"gpu_memory_utilization": 0},
            "gpu_memory_utilization must be above 0, up to 1, got 0",
        ),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization .* got 1.1"),
        ({"max_model_len": 0}, "max_model_len .* at least 1, got 0"),
        (
            {"max_model_len": 1025},
            r"max_model_len=1025 tokens do not fit into .* 1024 tokens \(128 blocks of 8\)",
        ),
        (
            {"max_model_len": 5000},
            "max_model_len must be from 1 to 2048, the model's own limit, got 5000",
        ),
        (
            {"scheduling_policy": "random"},
            "scheduling_policy must be fcfs or priority, got 'random'",
        ),
    ],
)
def test_wrong_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        new(**options)


def test_unknown_option_and_what_is_refused_before_loading(monkeypatch):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("nanollm.tensor_parallel.Alone.load", staticmethod(load))
    with pytest.raises(TypeError, match="pipeline_parallel_size"):
        LLM("tiny-llama", pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 needs a model by its name"):
        LLM(MODEL, tensor_parallel_size=2)
    with pytest.raises(ModelError, match="3"):
        LLM("tiny-llama", load_format="dummy", tensor_parallel_size=3)
    with pytest.raises(ValueError, match="block_size"):
        LLM("tiny-llama", block_size=-1)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    llm = LLM(
        "tiny-llama",
        load_format="dummy",
        device="cpu",
        dtype=dtype,
        num_kv_blocks=16,
        progress=False,
        self_check=True,
    )
    assert dtype == "auto" or llm.model.dtype == getattr(torch, dtype)
    assert llm.engine.runner.attention.cache.layers[0].dtype == llm.model.dtype
    assert len(run(llm, ["Hi", "Ho" * 20], GREEDY)[1].outputs[0].token_ids) == 8
    assert_empty(llm)


def test_unknown_dtype():
    with pytest.raises(
        ValueError, match="dtype must be auto or float32 or bfloat16 or float16, got 'int3'"
    ):
        LLM("tiny-llama", load_format="dummy", dtype="int3", progress=False)


def test_by_name_with_seed_and_quiet(capfd):
    one, other = (
        LLM(
            "tiny-qwen3",
            load_format="dummy",
            device="cpu",
            dtype="float32",
            seed=seed,
            num_kv_blocks=16,
            progress=False,
        )
        for seed in (0, 1)
    )
    assert (
        run(one, "Hi", GREEDY)[0].outputs[0].token_ids
        != run(other, "Hi", GREEDY)[0].outputs[0].token_ids
    )
    assert capfd.readouterr().err == ""


# what the model brings along


def with_config(**settings):
    return SimpleNamespace(generation_config=GenerationConfig(**settings))


@pytest.mark.parametrize("settings, expected", [
    ({}, {}),
    ({"eos_token_id": 2, "max_length": 100, "do_sample": True}, {}),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
     {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
    ({"temperature": 0.7}, {"temperature": 0.7}),  # whatever do_sample says, as vLLM has it
    ({"repetition_penalty": 1.05, "min_p": 0.1, "max_new_tokens": 7},
     {"repetition_penalty": 1.05, "min_p": 0.1, "max_tokens": 7}),
    ({"top_p": None, "typical_p": 0.5}, {}),
])
def test_sampling_defaults_of_a_model(settings, expected):
    model = with_config(**settings)
    assert default_sampling(model) == expected and default_sampling(model, "vllm") == {}
    assert SamplingParams(**expected)


def test_sampling_defaults_of_models_without_any():
    assert default_sampling(MODEL) == {}
    assert default_sampling(SimpleNamespace(generation_config=None)) == {}


@pytest.mark.parametrize("mode, num_tokens", [("auto", 3), ("vllm", 16)])
def test_defaults_are_for_requests_without_parameters(monkeypatch, mode, num_tokens):
    own = GenerationConfig(temperature=0.0, repetition_penalty=1.5, max_new_tokens=3)
    monkeypatch.setattr(MODEL, "generation_config", own)
    llm = new(generation_config=mode)
    default = llm.get_default_sampling_params()
    expected = SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=3)
    assert default == (expected if mode == "auto" else SamplingParams())
    talk = [{"role": "user", "content": "Hi"}]
    for outputs in (run(llm, ["a", "b"]), llm.chat(talk, use_tqdm=False)):
        assert all(0 < len(o.outputs[0].token_ids) <= num_tokens for o in outputs)
    assert len(run(llm, "a", GREEDY)[0].outputs[0].token_ids) == GREEDY.max_tokens
    if mode == "auto":
        assert run(llm, "a")[0].outputs[0].token_ids == naive([97], expected)
        pieces = list(llm.stream(["a"]))
        assert len(pieces[-1][1].token_ids) <= 3
    assert_empty(llm)


def test_a_template_from_a_file_or_as_text(tmp_path):
    text = "{{ messages[0].content | upper }}\n"
    (tmp_path / "mine.jinja").write_text(text)
    talk = [{"role": "user", "content": "Hi"}]
    for source in (text, str(tmp_path / "mine.jinja")):
        [output] = new(chat_template=source).chat(talk, GREEDY, use_tqdm=False)
        assert output.prompt == "HI"
    assert "im_start" in TOKENIZER.chat_template  # the one that was passed in keeps its own
    assert with_chat_template(TOKENIZER, None) is TOKENIZER
    with pytest.raises(ValueError, match="chat_template='no.jinja' is no file"):
        new(chat_template="no.jinja")


@pytest.mark.parametrize("kind", [Decoder, FusedDecoder])
def test_a_model_that_our_forward_cannot_compute(kind, monkeypatch, caplog):
    class Wrong(kind):
        def __call__(self, *args):
            return super().__call__(*args) * 2

    own = {"enable_kernels": kind is FusedDecoder}
    monkeypatch.setattr(f"nanollm.llm.{kind.__name__}", Wrong)
    assert isinstance(new(**own).engine.runner._forward, TransformersModel)
    [record] = [r for r in caplog.records if r.name == "nanollm.llm"]
    assert "transformers computes the model" in record.message
    assert "other logits" in record.message and len(record.message.splitlines()) == 1
    with pytest.raises(ModelError, match="other logits"):
        new(model_impl="nanollm", **own)
    unmodified = new(model_impl="transformers", **own)
    assert isinstance(unmodified.engine.runner._forward, TransformersModel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int8_dynamic", "int4"])
def test_quantized_models_pass_their_trial_and_are_fused(kind, dtype):
    llm = LLM("smollm2-135m", load_format="dummy", dtype=dtype, quantization=kind, device="cpu",
              tokenizer=TOKENIZER, num_kv_blocks=16, max_model_len=64, progress=False)
    assert isinstance(llm.engine.runner._forward, FusedDecoder)
    [output] = llm.generate([{"prompt_token_ids": [5, 6, 7]}], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == GREEDY.max_tokens


@pytest.mark.parametrize("kind", ["int8", "int8_dynamic", "int4"])
def test_adapters_and_drafts_leave_a_quantized_base_as_it_is(kind):
    def answer(**options):
        llm = LLM("smollm2-135m", load_format="dummy", dtype="float32", quantization=kind,
                  device="cpu", tokenizer=TOKENIZER, num_kv_blocks=16, max_model_len=64,
                  progress=False, **options)
        prompt = {"prompt_token_ids": [5, 6, 7] * 4}
        return llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids

    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    assert answer(enable_lora=True, speculative_config=drafts) == answer()


def test_kernels_are_used_where_they_can_be_had(monkeypatch, caplog):
    def parts(llm):
        runner = llm.engine.runner
        return type(runner._forward), type(runner.attention)

    assert parts(new()) == (FusedDecoder, StreamedAttention)
    assert parts(new(enable_kernels=False)) == (Decoder, GroupedAttention)
    assert not caplog.records
    no_compiler = "no C compiler was found: install gcc, or name one in CC"

    def fail(*_, **__):
        raise NativeError(no_compiler)

    monkeypatch.setattr("nanollm.llm.FusedDecoder", fail)
    monkeypatch.setattr("nanollm.llm.streamed", fail)
    assert parts(new()) == (Decoder, GroupedAttention)
    found = [r.message for r in caplog.records if r.name == "nanollm.llm"]
    assert len(found) == 2 and all(no_compiler in message for message in found)


# memory


def test_memory_on_a_cpu(monkeypatch):
    cpu = torch.device("cpu")
    for available, expected in ((100 * GIB, 4 * GIB), (8 * GIB, 2 * GIB)):
        monkeypatch.setattr(
            "nanollm.quantized_cache.available_memory", lambda available=available: available
        )
        assert kv_cache_bytes(EngineArgs(), cpu) == expected
        assert kv_cache_bytes(EngineArgs(kv_cache_memory=7), cpu) == 7
        assert kv_cache_bytes(EngineArgs(kv_cache_memory="2KiB"), cpu) == 2048


@pytest.mark.parametrize(
    "share, free, total, expected",
    [
        (0.9, 64 * GIB, 80 * GIB, 56 * GIB),  # 72 may be used, 16 are
        (1.0, 64 * GIB, 80 * GIB, 64 * GIB),
        (0.5, 40 * GIB, 80 * GIB, None),
        (0.5, 30 * GIB, 80 * GIB, None),
    ],
)
def test_memory_on_a_gpu(monkeypatch, share, free, total, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    args, device = EngineArgs(gpu_memory_utilization=share), torch.device("cuda", 0)
    if expected is None:
        used = (total - free) / GIB
        with pytest.raises(
            ValueError,
            match=f"0.5 of 80.0 GiB, of which {used:.1f} GiB are in use, leaves nothing",
        ):
            kv_cache_bytes(args, device)
    else:
        assert kv_cache_bytes(args, device) == expected
    assert (
        kv_cache_bytes(EngineArgs(kv_cache_memory=7, gpu_memory_utilization=share), device) == 7
    )


def engine_of(**options):
    return make_engine(EngineArgs(**options), MODEL, TOKENIZER)


@pytest.mark.parametrize(
    "memory, size, num_blocks",
    [
        (100 * 8 * PER_TOKEN, 8, 100),
        (100 * 8 * PER_TOKEN - 1, 8, 99),
        (16 * PER_TOKEN, 16, 1),
        (16 * PER_TOKEN, 1, 16),
    ],
)
def test_blocks_from_bytes(memory, size, num_blocks):
    engine = engine_of(kv_cache_memory=memory, block_size=size)
    cache = engine.scheduler.cache
    assert (cache.num_blocks, cache.block_size) == (num_blocks, size)
    assert engine.runner.attention.cache.nbytes == num_blocks * size * PER_TOKEN <= memory
    assert engine.max_model_len == num_blocks * size


def test_no_more_blocks_than_all_requests_could_use():
    assert engine_of(max_num_seqs=2).scheduler.cache.max_tokens == 2 * 2048
    assert (
        engine_of(max_num_seqs=2, max_model_len=100, block_size=16).scheduler.cache.num_blocks
        == 2 * 7
    )
    assert engine_of(max_num_seqs=2, num_kv_blocks=300).scheduler.cache.num_blocks == 300


def test_limits_of_a_step_and_of_a_request():
    engine = engine_of(num_kv_blocks=8)
    assert (
        engine.scheduler.max_num_batched_tokens == 512
        and engine.scheduler.max_num_seqs == 64
        and engine.max_model_len == 128
    )
    assert (
        engine_of(num_kv_blocks=8, max_num_seqs=1000).scheduler.max_num_batched_tokens == 1000
    )
    assert engine_of(num_kv_blocks=8, max_model_len=50).max_model_len == 50
    assert engine_of(num_kv_blocks=8, max_model_len=128).max_model_len == 128
    assert engine_of(num_kv_blocks=1000).max_model_len == 2048
    assert engine_of(num_kv_blocks=8).eos_token_ids == EOS
