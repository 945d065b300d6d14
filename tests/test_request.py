"A request's life: the gap, the ends, identity, outputs, and random chunks that leave no trace."

import random
import time

import pytest
from transformers import DynamicCache

from nanollm.generate import generate
from nanollm.kv_cache import forward_new
from nanollm.model import load_model
from nanollm.request import (
    FinishReason,
    Output,
    Request,
    RequestEvent,
    RequestStatus,
    StepRecord,
    Work,
)
from nanollm.sampling import Sampler, SamplingParams, row_seed, stop_ids


def make(prompt=(5, 6, 7), max_tokens=4, request_id="r", eos=(258,), **fields):
    names = ("index", "priority", "shares", "arrival_s")
    options = {name: fields.pop(name) for name in names if name in fields}
    params = SamplingParams(max_tokens=max_tokens, **fields)
    return Request(request_id, prompt, params, eos, **options)


def test_what_the_scheduler_sorts_by_can_be_sorted():
    with pytest.raises(ValueError, match="a priority is a whole number, got 0.5"):
        make(priority=0.5)
    assert make(priority=-1).priority == -1
    assert make(shares=["alice", 7]).shares == ("alice", "7") and make().shares == ()


def test_a_new_request_waits_with_nothing_computed():
    before = time.perf_counter()
    request = make(prompt=(5, 6, 7))
    assert request.status is RequestStatus.WAITING and not request.finished
    assert (request.num_tokens, request.num_prompt_tokens) == (3, 3)
    assert (request.num_computed_tokens, request.gap, request.tokens_left) == (0, 3, 4)
    assert request.output_ids == [] and request.finish_reason is None
    assert before <= request.arrival_s <= time.perf_counter()


def test_the_gap_counts_known_tokens_and_drafts():
    request = make()
    request.num_computed_tokens = 3
    assert request.gap == 0
    request.append(9, 0.0)
    assert request.gap == 1 and request.num_tokens == 4
    request.draft_ids = [1, 2]
    assert request.gap == 3 and request.num_tokens == 4
    request.num_computed_tokens = 0 # preempted
    request.draft_ids = []
    assert request.gap == 4


def test_the_prompt_is_copied_and_kept():
    prompt = [5, 6, 7]
    request = make(prompt=prompt)
    request.append(9, 0.0)
    assert prompt == [5, 6, 7] == list(request.prompt_ids)
    assert request.token_ids == [5, 6, 7, 9] and request.output_ids == [9]


def test_two_requests_share_no_state():
    one, two = make(), make()
    one.append(9, 0.0)
    one.block_table.append(3)
    assert two.token_ids == [5, 6, 7]
    assert two.output_ids == two.block_table == two.token_times_s == []


@pytest.mark.parametrize("tokens, options, reason, stop_reason", [
    ([1, 2, 3, 4], {}, FinishReason.LENGTH, None),
    ([1, 258], {}, FinishReason.STOP, None), # the model's own end
    ([1, 77], dict(stop_token_ids=[77]), FinishReason.STOP, 77),
    ([1, 2, 3, 77], dict(stop_token_ids=[77]), FinishReason.STOP, 77), # before the limit
    ([1, 258, 2, 3], dict(ignore_eos=True), FinishReason.LENGTH, None),
    ([258], dict(ignore_eos=True, stop_token_ids=[258]), FinishReason.STOP, 258),
    ([5], dict(max_tokens=1), FinishReason.LENGTH, None),
])
def test_ends_with_its_last_token(tokens, options, reason, stop_reason):
    request = make(**options)
    for i, token_id in enumerate(tokens):
        assert not request.finished
        request.append(token_id, float(i))
    assert request.finished and request.finish_reason is reason
    assert request.stop_reason == stop_reason and request.error is None
    assert request.output_ids == tokens and request.finished_s == len(tokens) - 1


def test_only_the_first_reason_counts():
    request = make()
    request.draft_ids = [1, 2]
    request.finish(FinishReason.ERROR, 3.0, "no token")
    request.finish(FinishReason.ABORT, 4.0)
    assert (request.finish_reason, request.finished_s) == (FinishReason.ERROR, 3.0)
    assert request.error == "no token"
    assert request.status is RequestStatus.FINISHED and request.draft_ids == []


def test_names_are_strings_of_the_protocol():
    assert FinishReason.LENGTH == "length" and f"{RequestStatus.RUNNING}" == "running"
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]


def test_a_request_equals_itself_alone():
    one, two = make(seed=1, arrival_s=0.0), make(seed=1, arrival_s=0.0)
    assert one == one and one != two and len({one, two, one}) == 2
    queue = [one, two]
    queue.remove(two)
    assert queue[0] is one
    place = {one: 1}
    one.append(9, 0.0) # the hash does not move with the state
    assert place[one] == 1


def test_state_cannot_be_given_or_misspelt():
    with pytest.raises(TypeError):
        Request("r", (1,), SamplingParams(), status=RequestStatus.RUNNING)
    with pytest.raises(AttributeError):
        make().num_computed_token = 3


def test_answers_of_one_prompt_have_their_own_seeds():
    group = [make(n=3, seed=5, index=i) for i in range(3)]
    seeds = [request.seed for request in group]
    assert seeds == [row_seed(group[0].params, i) for i in range(3)] and len(set(seeds)) == 3
    assert make(seed=5).seed == seeds[0] and make().seed != make().seed


def test_stop_ids_are_worked_out_once():
    request = make(stop_token_ids=[77], eos=(258, 259))
    assert request.stop_ids == stop_ids(request.params, (258, 259)) == {77, 258, 259}
    assert isinstance(request.stop_ids, frozenset)
    assert make(stop_token_ids=[77], ignore_eos=True).stop_ids == {77}


def test_an_output_is_what_is_new_and_stays_as_it_was():
    request = make(max_tokens=3, index=2, logprobs=0)
    request.num_cached_tokens = 2
    outputs = []
    for token_id in (8, 9, 10):
        request.append(token_id, 0.0)
        request.logprobs.append(f"report of {token_id}")
        outputs.append(request.output(1))
    assert [output.token_ids for output in outputs] == [[8], [9], [10]]
    assert [output.logprobs for output in outputs] == [[f"report of {i}"] for i in (8, 9, 10)]
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
    assert {(o.request_id, o.index, o.num_prompt_tokens, o.num_cached_tokens)
            for o in outputs} == {("r", 2, 3, 2)}
    assert request.output(3).token_ids == [8, 9, 10]
    with pytest.raises(AttributeError):
        outputs[0].index = 3


def test_an_output_without_tokens_reports_an_end():
    request = make()
    request.append(9, 0.0)
    request.finish(FinishReason.ERROR, 1.0, "no token")
    expected = Output("r", 0, [], [], FinishReason.ERROR, None, "no token", 3, 0, None)
    assert request.output(0) == expected


def test_log_probabilities_come_if_asked_for_and_those_of_the_prompt_once():
    request = make(prompt_logprobs=0)
    request.prompt_logprobs = {1: "one", 2: "two"}
    assert request.output(0).prompt_logprobs is None, "no token yet"
    request.append(9, 0.0)
    request.logprobs.append("not asked for")
    first = request.output(1)
    assert first.prompt_logprobs == {1: "one", 2: "two"} and first.logprobs == []
    assert first.prompt_logprobs is not request.prompt_logprobs, "a copy"
    request.append(9, 0.0)
    assert request.output(1).prompt_logprobs is None


def test_timing_counts_from_the_arrival():
    request = make(max_tokens=3, arrival_s=10.0)
    with pytest.raises(ValueError, match="token_times_s is empty"):
        _ = request.timing
    for time_s in (12.0, 12.5, 14.0):
        request.append(1, time_s)
    assert request.timing.token_times_s == (2.0, 2.5, 4.0)
    assert request.timing.ttft_s == 2.0 and request.timing.tpot_s == 1.0


def test_records_are_frozen_and_listened_to():
    heard, request = [], make()
    event = RequestEvent("queued", 0.0, request)
    work = Work(request, 0, 3, 0, 1, (4,))
    record = StepRecord(0, 0.0, 1.0, (work,), 0, 1, 0.5)
    for item in (event, record):
        heard.append(item)
    assert heard[0].request is request and heard[1].works[0].blocks == (4,)
    for frozen, name in ((event, "kind"), (work, "start"), (record, "step")):
        with pytest.raises(AttributeError):
            setattr(frozen, name, 1)


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
def test_chunks_and_preemptions_leave_no_trace(shape):
    model = load_model(shape, load_format="dummy", device="cpu", dtype="float32",
                       progress=False)
    rng = random.Random(3)
    for i in range(12):
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 20))]
        request = make(prompt, rng.randint(1, 8), seed=i, temperature=rng.choice([0, 1]),
                       frequency_penalty=rng.choice([0, 0.5]), n=2, index=i % 2)
        samplers = [Sampler([request.params], [prompt], (258,), [request.seed])
                    for _ in range(2)]
        cache = DynamicCache(config=model.config)
        while not request.finished:
            if rng.random() < 0.15:
                cache, request.num_computed_tokens = DynamicCache(config=model.config), 0
            start, n = request.num_computed_tokens, rng.randint(1, request.gap)
            logits = forward_new(model, cache, request.token_ids[start:start + n], start)
            request.num_computed_tokens += n
            if not request.gap:
                request.append(*samplers[0](logits, [request.output_ids]), 0.0)
        right = generate(model, prompt, request.params.max_tokens, (258,), samplers[1])
        assert request.output_ids == list(right)
