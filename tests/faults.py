"""Trouble on purpose; as a script: `nanollm-serve` that can be told to fail."""

import threading
import time
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Body

from nanollm.serve.cli import leave, serve, serve_command
from nanollm.serve.gate import JsonRoute
from nanollm.serve.server import Shared


class Busy:
    "Keeps the thread that calls it, until it is released."

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.end.wait(30)


class Faults:
    "Stands in front of an engine's runner, its policy and its processors."

    def __init__(self, engine):
        self.set()
        self._forward, self._plan, self._num_plans = (
            engine.runner.forward,
            engine.scheduler.policy.plan,
            0,
        )
        engine.runner.forward, engine.scheduler.policy = self.forward, self
        engine.processors = [*engine.processors, self.forbid]

    def set(self, preempt_every=0, fail_forwards=0, fail_request="", step_delay_s=0.0):
        "Set all of them; what is not given is off."
        self.preempt_every = preempt_every  # steps between two forced preemptions; 0: none
        self.fail_forwards = fail_forwards  # how many of the next forwards raise
        self.fail_request = (
            fail_request  # for requests whose id contains this, no token is allowed
        )
        self.step_delay_s = step_delay_s  # sleep in front of each forward

    def forward(self, batch):
        time.sleep(self.step_delay_s)
        if self.fail_forwards:
            self.fail_forwards -= 1
            raise RuntimeError("this forward fails on purpose")
        return self._forward(batch)

    def plan(self, plan):
        self._num_plans += 1
        if self.preempt_every and self._num_plans % self.preempt_every == 0 and plan.running:
            plan.preempt(plan.running[-1])
        self._plan(plan)

    def forbid(self, logits, rows):
        for i, row in enumerate(rows):
            if self.fail_request and self.fail_request in row.key.request_id:
                logits[i] = float("-inf")


def fault_router(faults):
    "Routes to make trouble, and to look for leaks."
    router = APIRouter(route_class=JsonRoute)

    @router.post("/debug/faults")
    async def set_faults(
        api: Shared,
        preempt_every: Annotated[int, Body(ge=0)] = 0,
        fail_forwards: Annotated[int, Body(ge=0)] = 0,
        fail_request: Annotated[str, Body()] = "",
        step_delay_s: Annotated[float, Body(ge=0, le=60)] = 0.0,
    ):
        await api.engine.call(
            partial(faults.set, preempt_every, fail_forwards, fail_request, step_delay_s)
        )

    @router.get("/debug/check")
    async def self_check(api: Shared):
        await api.engine.check()
        return {"ok": True}

    return router


def fault_routers(llm):
    "What `serve` takes to add routes."
    return [fault_router(Faults(llm.engine))]


if __name__ == "__main__":
    leave(serve_command, partial(serve, make_routers=fault_routers))
