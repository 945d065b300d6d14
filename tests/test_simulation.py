"""The simulation counts as the real engine does, whatever the load; its options say no."""

import json
import math
import random
from dataclasses import asdict, fields, replace
from typing import get_args

import numpy as np
import pytest
import torch

from nanollm.block_manager import BlockManager
from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.engine import Engine, ModelRunner
from nanollm.model import load_model
from nanollm.paged_attention import GroupedAttention, PagedKVCache
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import Request, StepRecord, Work
from nanollm.routing import POLICIES, RoundRobin
from nanollm.scheduler import Scheduler, WholePrompts
from nanollm.simulation import (
    WORKLOADS,
    Clients,
    Session,
    SimulateArgs,
    SimulatedEngine,
    Simulation,
    StepTime,
    Turn,
    count_work,
    find_replicas,
    fit,
    keeps_promise,
    make_simulation,
    next_request,
    params_of,
    simulate,
)
from nanollm.transformer import Decoder

torch.set_num_threads(1)
FORMULA = StepTime(0.02, 0.0007, 0.0001, 1e-6, 2e-7)
WORKLOAD = pytest.mark.parametrize("workload", sorted(WORKLOADS))


class RealEngine:
    "An engine with a model, on the virtual clock: its tokens come when the simulation says so."

    def __init__(self, model, scheduler, num_blocks, block_size, step_time):
        attention = GroupedAttention(PagedKVCache(model.config, num_blocks, block_size),
                                     model.config.num_attention_heads)
        self.engine = Engine(ModelRunner(Decoder(model), attention), scheduler,
                             listeners=[self.listen], self_check=True)
        self.step_time, self.requests, self.outputs = step_time, {}, []
        self.num_steps = self.num_computed = self.num_preempted = 0
        self.busy_s = 0.0

    def listen(self, event):
        if isinstance(event, StepRecord):
            self.record = event
        else:
            self.num_preempted += event.kind == "preempted"

    def add(self, request):
        self.requests[request.request_id] = request
        self.engine.add_request(request.prompt_ids, request.params,
                                request_id=request.request_id, arrival_s=request.arrival_s)

    def plan(self):
        self.outputs = self.engine.step()
        work = count_work((w.start, w.num_new, w.num_made > 0) for w in self.record.works)
        self.num_steps += 1
        self.num_computed += work[1]
        self.busy_s += self.step_time(work)
        return self.step_time(work)

    def commit(self, now):
        for output in self.outputs:
            request = self.requests[output.request_id]
            request.num_cached_tokens = output.num_cached_tokens
            for token_id in output.token_ids:
                request.append(token_id, now)
        return [self.requests.pop(output.request_id) for output in self.outputs
                if output.finish_reason]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen3"])
def model(request):
    return load_model(request.param, load_format="dummy", device="cpu", dtype="float32",
                      progress=False)


def small_sessions(seed, vocab_size):
    "Few and short: some share a beginning, some go on, some come at the same time."
    draw = random.Random(seed)
    ids, now = range(vocab_size), 0.0
    shared = [draw.choices(ids, k=draw.randint(8, 40)) for _ in range(2)]
    for _ in range(10):
        now += draw.choice((0, 0, 0.03, 0.3))
        turns = [Turn(draw.choices(ids, k=draw.randint(1, 30)), draw.randint(1, 12),
                      draw.choice((0, 0.05, 1))) for _ in range(draw.randint(1, 3))]
        yield Session(now, list(draw.choice([[], *shared])), turns)


def play(seed, vocab_size, policy, num_replicas, make_engine, block_size):
    "All numbers of a simulation, with engines made by `make_engine`."
    engines = {f"r{i}": make_engine() for i in range(num_replicas)}
    clients = Clients(small_sessions(seed, vocab_size), 40)
    answers = list(Simulation(clients, engines, POLICIES[policy](), block_size).run())
    rows = [(a.replica, a.arrival_s, a.num_prompt_tokens, a.num_cached_tokens,
             tuple(a.times_s.tolist())) for a in answers]
    return rows, [(engine.num_steps, engine.num_computed, engine.num_preempted, engine.busy_s)
                  for engine in engines.values()]


# -- the same as the engine


@pytest.mark.parametrize("seed", range(8))
def test_counts_and_times_equal_those_of_engines_with_a_model(model, seed):
    draw = random.Random(seed)
    block_size, budget = draw.choice((2, 4, 8)), draw.choice((8, 16, 48))
    num_blocks = draw.choice((200, 400)) // block_size  # tight, and so tight that some must go
    manager = (PrefixCachingBlockManager, PrefixCachingBlockManager, BlockManager)[seed % 3]
    policy = (ChunkedPrefill, WholePrompts)[seed % 2]
    vocab_size, size = model.config.vocab_size, (num_blocks, block_size)

    max_num_seqs = draw.choice((4, 8))

    def scheduler():
        return Scheduler(manager(*size), policy(), max_num_seqs, budget)

    args = (seed, vocab_size, sorted(POLICIES)[seed % 3], 1 + seed % 2)
    real = play(*args, lambda: RealEngine(model, scheduler(), *size, FORMULA), block_size)
    simulated = play(*args, lambda: SimulatedEngine(scheduler(), FORMULA), block_size)
    assert simulated == real
    assert len(real[0]) >= 10


def test_the_random_loads_above_preempt_and_hit():
    rows, counts = play(0, 300, "prefix", 1, lambda: SimulatedEngine(
        Scheduler(PrefixCachingBlockManager(40, 4), ChunkedPrefill(), 8, 32), FORMULA), 4)
    assert sum(count[2] for count in counts) > 0 and sum(row[3] for row in rows) > 0


@WORKLOAD
def test_all_come_to_an_end_and_nothing_leaks(workload):
    simulation = make_simulation(SimulateArgs(workload=workload, num_prompts=60, replicas=2,
                                              request_rate=20, num_kv_blocks=400))
    answers = list(simulation.run())
    assert len(answers) == 60 and set(simulation.loads.values()) == {0}
    for engine in simulation.engines.values():
        engine.scheduler.cache.check([])
        assert not engine.scheduler.running and not engine.scheduler.waiting
    for answer in answers:
        assert answer.times_s[0] > 0 and (np.diff(answer.times_s) > 0).all()


def test_names_of_blocks_are_those_that_the_block_manager_makes():
    session = next(WORKLOADS["chat"](random.Random(0), 1.0, 1000))
    session.turns = session.turns[-2:]
    request = next_request(session, "0", 0.0, 16)
    plain = Request("0", request.prompt_ids, request.params)
    manager = PrefixCachingBlockManager(100, 16)
    assert manager._hashes(plain, len(plain.prompt_ids) // 16) == request.block_hashes
    session.history += [0] * 50
    request = next_request(session, "1", 0.0, 16)
    plain = Request("1", request.prompt_ids, request.params)
    assert manager._hashes(plain, len(plain.prompt_ids) // 16) == request.block_hashes


# -- clients


def test_clients_come_in_time_and_go_on_after_answers():
    first = Session(1.0, [1], [Turn([3], 1, 0.5), Turn([2], 1)])
    second = Session(1.2, [5], [Turn([6], 1)])
    clients = Clients([first, second], 10)
    assert clients.next_s == 1.0
    assert clients.pop() == (1.0, first)
    assert first.ask().new_ids == [2] and first.history == [1, 2]
    clients.answered(first, [9], 1.1)
    assert clients.pop()[1] is second
    assert clients.pop() == (1.6, first)
    first.ask()
    assert first.history == [1, 2, 9, 3]
    clients.answered(first, [9], 2.0)
    assert clients.next_s == math.inf


def test_after_so_many_requests_nobody_sends():
    clients = Clients((Session(float(i), [], [Turn([1], 1)]) for i in range(10**9)), 3)
    assert [clients.pop()[0] for _ in range(3)] == [0.0, 1.0, 2.0]
    assert clients.next_s == math.inf


@WORKLOAD
def test_loads_come_at_the_rate_that_was_asked_for(workload):
    sessions = WORKLOADS[workload](random.Random(1), 50.0, 1000)
    taken = [next(sessions) for _ in range(2000)]
    num_requests = sum(len(session.turns) for session in taken)
    assert num_requests / taken[-1].start_s == pytest.approx(50, rel=0.08)
    assert [s.start_s for s in taken] == sorted(s.start_s for s in taken)


def test_a_request_that_could_never_fit_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="room for 320"):
        simulate(SimulateArgs(num_prompts=5, num_kv_blocks=20))


# -- the time of a step


def record(parts, seconds):
    works = tuple(Work(None, start, n, 0, int(makes), ()) for start, n, makes in parts)
    return StepRecord(0, 1.0, 1.0 + seconds, works, 0, 0, 0.0)


def random_steps(num, seed=0):
    draw = random.Random(seed)
    for _ in range(num):
        decodes = [(draw.randint(10, 900), 1, True) for _ in range(draw.randint(0, 12))]
        chunks = [(draw.randint(0, 500), draw.randint(2, 300), draw.random() < 0.5)
                  for _ in range(draw.randint(not decodes, 2))]
        yield decodes + chunks


def test_fit_finds_the_numbers_that_made_the_times():
    steps = [record(parts, FORMULA(count_work(parts))) for parts in random_steps(200)]
    for name, value in asdict(fit(steps)).items():
        assert value == pytest.approx(getattr(FORMULA, name), rel=1e-3), name


def test_fit_is_never_negative_and_bears_outliers():
    draw = random.Random(0)
    steps = []
    for parts in random_steps(60):
        for _ in range(5):
            noise = draw.choice((0.95, 1.0, 1.05, 1.0, 30.0))
            steps.append(record(parts, 0.01 * noise))
    found = fit(steps)
    assert min(asdict(found).values()) >= 0
    assert found.constant_s == pytest.approx(0.01, rel=0.2)


def test_fit_wants_different_steps():
    with pytest.raises(ValueError, match="five different steps"):
        fit([record([(0, 4, True)], 0.1)] * 100)
    with pytest.raises(ValueError, match="got 0"):
        fit([])


def test_step_time_is_plain_numbers():
    assert StepTime(**json.loads(json.dumps(asdict(FORMULA)))) == FORMULA
    assert all(type(value) is float for value in asdict(fit(
        record(parts, 0.1) for parts in random_steps(20))).values())
    assert StepTime(0.5)(count_work([(3, 5, False), (7, 1, True)])) == 0.5
    assert count_work([]) == (1, 0, 0, 0, 0)
    assert count_work([(10, 4, False), (20, 1, True)]) == (1, 5, 1, 21, 11 + 12 + 13 + 14)


# -- the tool


def test_same_seed_same_report():
    args = SimulateArgs(num_prompts=80, request_rate=8)
    assert simulate(args) == simulate(args) != simulate(replace(args, seed=1))


def test_report_is_json_with_the_options_in_front():
    found = simulate(SimulateArgs(num_prompts=50, workload="documents"))
    assert json.loads(json.dumps(found)) == found
    assert found["workload"] == "documents" and found["completed"] == 50
    assert 0 < found["hit_rate"] < 1 <= found["imbalance"]
    assert found["median_ttft_ms"] <= found["p90_ttft_ms"] <= found["p99_ttft_ms"]


def test_without_a_prefix_cache_nothing_is_found_and_all_is_computed():
    args = SimulateArgs(num_prompts=50, enable_prefix_caching=False, num_kv_blocks=10_000)
    found = simulate(args)
    assert found["hit_rate"] == 0
    made = found["total_input_tokens"] + found["total_output_tokens"] - found["completed"]
    assert found["num_computed_tokens"] == made
    assert simulate(replace(args, enable_chunked_prefill=False))["num_computed_tokens"] == made


def test_one_replica_needs_no_choice():
    found = [simulate(SimulateArgs(num_prompts=50, replicas=1, routing_policy=name))
             for name in POLICIES]
    assert len({json.dumps(one | {"routing_policy": ""}) for one in found}) == 1


def test_the_fewest_replicas_that_keep_a_promise():
    args = SimulateArgs(num_prompts=300, request_rate=12, slo_ttft_ms=1500)
    fewest = find_replicas(args)
    assert fewest > 1
    assert keeps_promise(replace(args, replicas=fewest))
    assert not keeps_promise(replace(args, replicas=fewest - 1))
    assert simulate(args)["replicas"] == fewest


def test_a_promise_that_nobody_can_keep():
    args = SimulateArgs(num_prompts=20, slo_ttft_ms=1)
    with pytest.raises(ValueError, match="slo_ttft_ms=1 is not kept by 8 replicas"):
        find_replicas(args, most=8)


@pytest.mark.parametrize("options, message", [
    (dict(workload="chats"), "workload must be chat or documents or ragged, got 'chats'"),
    (dict(replicas=0), "replicas must be a whole number from 1 to 4096, got 0"),
    (dict(request_rate=0), "request_rate must be"),
    (dict(step_time={"constant": 1}), "step_time must have the numbers of StepTime.*constant"),
    (dict(step_time={}), "step_time must have the numbers of StepTime.*constant_s"),
    (dict(step_time={"constant_s": 0}), "step_time must have numbers from 0 on"),
    (dict(step_time={"constant_s": "1"}), "step_time must have numbers.*'1'"),
    (dict(step_time={"constant_s": 1, "per_row_s": -1}), "step_time must.*'per_row_s': -1"),
    (dict(step_time="fast"), "step_time must be an object in JSON"),
    (dict(routing_policy="best"), "routing_policy must be prefix or")])
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SimulateArgs(**options)


def test_step_time_can_be_given_as_json():
    args = SimulateArgs(step_time='{"constant_s": 0.5}', num_prompts=20, request_rate=1)
    assert args.formula == StepTime(0.5)
    assert simulate(args)["median_itl_ms"] == pytest.approx(500)


def test_options_have_help_and_policies_match():
    for one in fields(SimulateArgs):
        assert one.metadata["help"].endswith("."), one.name
    choices = {one.name: get_args(one.type) for one in fields(SimulateArgs)}
    assert set(choices["routing_policy"]) == set(POLICIES)
    assert set(choices["workload"]) == set(WORKLOADS)


def test_who_has_seen_enough_may_stop():
    simulation = make_simulation(SimulateArgs(num_prompts=1000, request_rate=8))
    answers = simulation.run()
    assert [next(answers).num_prompt_tokens > 0 for _ in range(5)] == [True] * 5
    assert RoundRobin().choose(simulation.loads, ()) == "0"
    assert params_of(3) is params_of(3)
