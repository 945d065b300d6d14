"""What runs replicas on Ray Serve, without Ray: routing, failures and options."""

import asyncio
import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nanollm.serve import cluster
from nanollm.serve.cluster import (
    PolicyRouting,
    RayFleet,
    RayReplica,
    running_ray,
    serve_all,
    share_of,
)
from nanollm.serve.commands import ServeOptions, UsageError
from nanollm.serve.replicas import Forwarded, ReplicaLost

NAMES = "a", "b", "c"


def replica(tag):
    "As much of a replica as the router looks at."
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=tag))


class Base:
    "What Ray's router would do."

    def __init__(self):
        self.heard = []

    def on_request_completed(self, replica_id, internal_request_id):
        self.heard.append(("completed", replica_id.unique_id, internal_request_id))

    def on_replica_actor_died(self, replica_id):
        self.heard.append(("died", replica_id.unique_id))

    def update_replicas(self, replicas):
        self.heard.append(("update", *(one.replica_id.unique_id for one in replicas)))


class Router(PolicyRouting, Base):
    "Both, as Ray gets them."


class Future:
    "As much of a future as is used."

    def __init__(self):
        self.callbacks, self.is_cancelled = [], False

    def add_done_callback(self, callback):
        self.callbacks.append(callback)

    def cancelled(self):
        return self.is_cancelled

    def cancel(self):
        self.is_cancelled = True
        for callback in self.callbacks:
            callback(self)


def router_of(policy):
    router = Router()
    router.initialize_state(policy)
    router.update_replicas([*map(replica, NAMES)])
    return router


def choose(router, call_id, request=None, names=NAMES):
    "The tag of whom the router chooses."
    pending = SimpleNamespace(
        args=[request or Forwarded({}, b"")], future=Future(),
        metadata=SimpleNamespace(internal_request_id=call_id),
        routing_context=SimpleNamespace(should_backoff=False))
    [[one]] = asyncio.run(router.choose_replicas([*map(replica, names)], pending))
    assert pending.routing_context.should_backoff
    choose.future = pending.future
    return one.replica_id.unique_id


def test_calls_are_open_until_they_are_completed():
    router = router_of("least_loaded")
    first = [choose(router, f"call {i}") for i in range(3)]
    assert sorted(first) == [*NAMES]
    router.on_request_completed(replica(first[1]).replica_id, "call 1")
    assert choose(router, "call 3") == first[1]
    assert ("completed", first[1], "call 1") in router.heard


def test_a_call_that_is_cancelled_before_it_is_sent_is_let_go():
    router = router_of("least_loaded")
    choose(router, "one")
    choose.future.cancel()
    assert not router.chooser.open
    choose(router, "two")
    for callback in choose.future.callbacks:  # assigned: it goes on
        callback(choose.future)
    assert [*router.chooser.open] == ["two"]


def test_what_a_lost_replica_has_read_is_forgotten():
    for lose in (
        lambda router, name: router.on_replica_actor_died(replica(name).replica_id),
        lambda router, name: router.update_replicas(
            [replica(other) for other in NAMES if other != name]),
    ):
        router, forgotten = router_of("prefix"), []
        name = choose(router, "one", Forwarded({}, b"", digests=(b"1",)))
        assert choose(router, "two", Forwarded({}, b"", digests=(b"1",))) == name
        router.chooser.policy.forget = forgotten.append
        lose(router, name)
        assert forgotten == [name]


def test_a_pin_wins_and_a_second_try_goes_elsewhere():
    router = router_of("round_robin")
    assert choose(router, "one", Forwarded({}, b"", pinned="c")) == "c"
    request = Forwarded({}, b"")
    assert {choose(router, "two", request) for _ in range(3)} == {*NAMES}
    assert choose(router, "three", Forwarded({}, b"", pinned="gone")) in NAMES


def test_nobody_to_choose_is_no_choice():
    router = router_of("prefix")
    assert asyncio.run(router.choose_replicas([], SimpleNamespace())) == [[]]
    assert asyncio.run(router.choose_replicas([replica("a")])) != [[]]


class Handle:
    "A handle of Serve whose replica follows a script."

    def __init__(self, *script, told=()):
        self.script, self.told, self.cancelled = script, told, 0

    def options(self, **options):
        assert options["stream"] and options["method_name"] == "answer"
        return self

    def remote(self, request):
        handle = self

        class Replies:
            def __init__(self):
                self.left = [*handle.script]

            def __aiter__(self):
                return self

            async def __anext__(self):
                await asyncio.sleep(0)
                if not self.left:
                    raise StopAsyncIteration
                one = self.left.pop(0)
                if isinstance(one, BaseException):
                    raise one
                return one

            def cancel(self):
                handle.cancelled += 1

        return Replies()

    def broadcast(self, method, name, *args):
        async def results_async(timeout_s, return_exceptions):
            if isinstance(self.told, Exception):
                raise self.told
            return self.told

        return SimpleNamespace(results_async=results_async)


async def take(fleet, most=None):
    found = []
    async with contextlib.aclosing(fleet.call(Forwarded({}, b""))) as answer:
        async for messages in answer:
            found += messages
            if len(found) == most:
                break
    return found


def test_an_answer_comes_to_its_end():
    handle = Handle([b"1"], [b"2", b"3"])
    assert asyncio.run(take(RayFleet(handle))) == [b"1", b"2", b"3"] and not handle.cancelled


@pytest.mark.parametrize("error", [RuntimeError("the actor died"), OSError("gone")])
def test_whatever_breaks_is_a_lost_replica(error):
    with pytest.raises(ReplicaLost, match=f"{type(error).__name__}: {error}"):
        asyncio.run(take(RayFleet(Handle([b"1"], error))))


def test_whoever_stops_reading_cancels():
    handle = Handle([b"1"], [b"2"])
    assert asyncio.run(take(RayFleet(handle), most=1)) == [b"1"] and handle.cancelled == 1
    handle = Handle([b"1"], asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(take(RayFleet(handle)))
    assert handle.cancelled == 1


def test_those_that_do_not_answer_are_left_out():
    told = [("a", 1), RuntimeError("dead"), ("b", 2)]
    assert asyncio.run(RayFleet(Handle(told=told)).tell("status")) == {"a": 1, "b": 2}
    assert asyncio.run(RayFleet(Handle(told=TimeoutError())).tell("status")) == {}


def test_a_dead_engine_is_an_unhealthy_replica():
    def with_engine(dead):
        engine = SimpleNamespace(dead=dead)
        return SimpleNamespace(replica=SimpleNamespace(api=SimpleNamespace(engine=engine)))

    RayReplica.check_health(with_engine(False))
    with pytest.raises(RuntimeError, match="engine has failed"):
        RayReplica.check_health(with_engine(True))


def test_a_machine_is_shared():
    two, four = (share_of(ServeOptions(replicas=n, device="cpu")) for n in (2, 4))
    assert two["kv_cache_memory"] > four["kv_cache_memory"] > 0
    assert two["threads"] >= four["threads"] >= 1
    grown = share_of(ServeOptions(replicas=2, max_replicas=4, device="cpu"))
    assert grown["kv_cache_memory"] < two["kv_cache_memory"]
    asked = share_of(ServeOptions(replicas=2, threads=7, kv_cache_memory=2**20))
    assert (asked["threads"], asked["kv_cache_memory"]) == (7, 2**20)
    assert share_of(ServeOptions(replicas=2, num_kv_blocks=9))["kv_cache_memory"] is None


def test_cores_are_counted_where_they_cannot_be_assigned(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False) # as on macOS
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert share_of(ServeOptions(replicas=2, device="cpu"))["threads"] == 4


@pytest.mark.parametrize("more", [{"model_tag": "x"}, {"data_parallel_size": 3}])
def test_options_survive_the_way_to_a_replica(more):
    options = ServeOptions(**{"replicas": 1} | more)
    again = ServeOptions(**share_of(options))
    assert (again.model, again.replicas) == (options.model, options.replicas)


def test_one_replica_is_served_as_before(monkeypatch):
    runs = []
    monkeypatch.setattr(cluster, "serve", lambda options, run, **more: runs.append(run) or 0)
    for options in ({}, {"replicas": 2}, {"max_replicas": 2}, {"max_replicas": 1}):
        assert serve_all(ServeOptions(**options)) == 0
    assert [run.__name__ for run in runs] == ["serve_one", "serve_replicas", "serve_replicas",
                                              "serve_one"]


def test_without_ray_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install nanollmserve\[distributed\]"):
        with running_ray(2):
            pass


def test_the_command_does_not_import_ray_or_torch_to_say_what_it_can():
    code = ("import sys; from nanollm.serve import cluster; cluster.serve_command.parse([]); "
            "sys.exit('ray' in sys.modules or 'torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        cluster.Nothing  # noqa: B018
