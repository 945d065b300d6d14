"""Record what scheduler and block manager do with five requests, for the page book/steps.qmd.

    python tools/record_steps.py      # writes book/steps.js

No model runs: a request that has caught up gets a token of its own. tests/test_book.py compares
the stored file with what the engine's parts do now.
"""

import json
from pathlib import Path

from nanollm.chunked_prefill import ChunkedPrefill
from nanollm.prefix_cache import PrefixCachingBlockManager
from nanollm.request import Request
from nanollm.sampling import SamplingParams
from nanollm.scheduler import Scheduler

FILE = Path(__file__).resolve().parent.parent / "book" / "steps.js"
BLOCKS, BLOCK_SIZE, BUDGET = 9, 4, 10
COMMON = list(range(100, 109))  # the prompts of C and E begin alike
ARRIVALS = {  # step: name, prompt, tokens to make
    0: [("A", [1, 2, 3, 4, 5], 6), ("B", [11, 12, 13], 9)],
    1: [("C", [*COMMON, *range(21, 27)], 4)],
    4: [("D", [31, 32, 33, 34], 5)],
    7: [("E", [*COMMON, 41], 3)],
}


def arrivals(step):
    "The requests that come before a step."
    for name, prompt, num_new in ARRIVALS.get(step, []):
        params = SamplingParams(max_tokens=num_new, temperature=0)
        yield Request(name, prompt, params, arrival_s=float(step))


def places(cache, running, before):
    "For each block its slots: who has a token there, and whether it is of this step."
    blocks = [[None] * BLOCK_SIZE for _ in range(BLOCKS)]
    for request in running:
        for i in range(request.num_computed_tokens):
            block, slot = request.block_table[i // BLOCK_SIZE], i % BLOCK_SIZE
            names, new = blocks[block][slot] or ("", False)
            blocks[block][slot] = (names + request.request_id, new or i >= before[request])
    kept = set(cache.cached_blocks)
    return [{"slots": slots, "kept": block in kept} for block, slots in enumerate(blocks)]


def record():
    "Return what happens in every step until all requests have ended."
    cache = PrefixCachingBlockManager(BLOCKS, BLOCK_SIZE)
    scheduler = Scheduler(cache, ChunkedPrefill(), 8, BUDGET)
    frames, step = [], 0
    while step <= max(ARRIVALS) or scheduler.waiting or scheduler.running:
        events = []
        for request in arrivals(step):
            scheduler.add(request)
            events.append(f"{request.request_id} comes")
        plan = scheduler.schedule()
        for request in plan.preempted:
            events.append(f"{request.request_id} is preempted: no block is free")
        for request in plan.admitted:
            found = request.num_computed_tokens
            events.append(f"{request.request_id} is admitted"
                          + (f", {found} of its tokens are found" if found else ""))
        before = {request: request.num_computed_tokens for request in scheduler.running}
        for request, num_new in plan.batch.items():
            request.num_computed_tokens += num_new
        blocks = places(cache, scheduler.running, before)
        for request in plan.batch:
            if not request.gap:
                request.append(1000 + ord(request.request_id) * 100 + request.num_tokens, 0.0)
        for request in list(scheduler.running):
            if request.finished:
                scheduler.finish(request)
                events.append(f"{request.request_id} ends")
        batch = {request.request_id: num_new for request, num_new in plan.batch.items()}
        waiting = [request.request_id for request in scheduler.waiting]
        frames.append({"batch": batch, "blocks": blocks, "waiting": waiting, "events": events})
        step += 1
    return frames


def script():
    "The recording as a script for the page."
    frames = ",\n".join(json.dumps(frame, separators=(",", ":")) for frame in record())
    return (f"// made by tools/record_steps.py\n"
            f"window.STEPS = {{budget: {BUDGET}, frames: [\n{frames}\n]}};\n")


if __name__ == "__main__":
    FILE.write_text(script())
